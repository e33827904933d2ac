"""Small networks compared: a trained one pruned, fine-tuned, quantized, and its small forms trained from scratch."""

from __future__ import annotations

import copy
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tqdm.auto import tqdm

from lightning_continual import _batch, _host
from lightning_continual._extras import require
from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.comparison import results as report
from lightning_continual.comparison.results import Row
from lightning_continual.comparison.setting import Setting
from lightning_continual.compression.baselines import from_scratch
from lightning_continual.compression.quantization import Kind, Per, detached_copy, fake_quantized, quantized
from lightning_continual.compression.ranking import amounts as rounds_of
from lightning_continual.compression.selectors import Level, Selector, UnitSelector, check_selector
from lightning_continual.compression.sizes import file_bytes, num_bytes, num_flops
from lightning_continual.constraints import Pin
from lightning_continual.parameters import ParamDict

UNIFORM = tuple(f"{bits}{suffix}" for bits in (16, 8, 6, 4, 3, 2) for suffix in ("", "-channel"))
"""Uniform quantizations: to so many bits, per tensor or per channel."""


@dataclass(frozen=True)
class Plan:
    """What is compared with the full network.

    Args:
        selectors: Selectors of weights and units, see `PruningCallback`.
        amounts: Shares of weights, or of the units of each layer, to remove, in [0, 1).
        levels: ``"parameter"``, ``"unit"``; where both are, selectors that score units only are left out at the first.
        quantizations: Bits per tensor, as ``"4"``, or per channel, as ``"4-channel"`` (see `fake_quantized`), and kinds
            of torchao, as ``"int8-weight"`` (see `quantized`). By default all that fit the network.
        epochs: Epochs of fine-tuning; the short budget from scratch.
        scratch_epochs: The long budget from scratch, in epochs; with 0 nothing is trained from scratch.
        num_samples: Samples of the training data that a selector looks at; all with None.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> Plan(selectors=["merge", "obd"], levels=["parameter", "unit"]).pairs
        [('merge', 'unit'), ('obd', 'parameter'), ('obd', 'unit')]
    """

    selectors: Sequence[Selector] = ("obd-sd",)
    amounts: Sequence[float] = (0.75, 0.9, 0.95)
    levels: Sequence[Level] = ("parameter", "unit")
    quantizations: Sequence[str] | None = None
    epochs: int = 1
    scratch_epochs: int = 3
    num_samples: int | None = 10_000
    pairs: list[tuple[Selector, Level]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for amount in self.amounts:
            rounds_of(amount, 1)
        for name, least in {"epochs": 1, "scratch_epochs": 0, "num_samples": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, but got {value}. Leave it out for the default.")
        names = [_name(one) for one in self.selectors]
        lists = {"selectors": names, "amounts": self.amounts, "quantizations": self.quantizations or ()}
        for name, values in {**lists, "levels": self.levels}.items():
            if twice := [one for place, one in enumerate(values) if one in values[:place]]:
                raise ValueError(f"`{name}` must differ by name, but {twice[0]!r} is there twice. Name each once.")
        if not self.levels and self.selectors:
            raise ValueError(f"`levels` must name one of {get_args(Level)}, but it is empty. Leave it out for both.")
        pairs: list[tuple[Selector, Level]] = []
        for selector in self.selectors:
            only_units = selector in get_args(UnitSelector) and "unit" in self.levels
            levels: Sequence[Level] = ["unit"] if only_units else self.levels
            for level in levels:
                check_selector(selector, level=level, scope="global", statistic="sd")
                pairs.append((selector, level))
        object.__setattr__(self, "pairs", pairs)
        for name in self.quantizations or ():
            _quantization(name)


def compare(
    networks: Mapping[int, L.LightningModule], setting: Setting, plan: Plan, *, verbose: bool = True
) -> Iterator[tuple[Row, L.LightningModule | None]]:
    """Yield small forms of trained networks, each scored, with what it weighs.

    First come the full networks, then by network the quantized ones, and the pruned ones: before and after fine-tuning,
    and trained from scratch (see `from_scratch`) with the same zeros or widths. From scratch, widths that several
    selectors share are trained once. The networks that are passed are not changed.

    Args:
        networks: Trained networks by seed; one network may stand under several seeds.
        setting: How they are trained and scored.
        plan: What is compared.
        verbose: Whether to show progress.

    Yields:
        A row, and its network with the Trainer that scored it; no network where a note in the row says why it was left
        out (as where a layer would be pruned to nothing).

    Raises:
        ValueError: If there is no network, the score is not logged, or a quantization that the plan names does not fit.
        ImportError: If what the plan names is not installed.

    Example:
        >>> from lightning_continual.demo import DigitsClassifier
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([(torch.rand(64), label) for label in range(10)])
        >>> plan = Plan(["magnitude"], [0.5], ["parameter"], ["8"], scratch_epochs=0)
        >>> setting = Setting((loader, loader), monitor="val_acc", accelerator="cpu")
        >>> for row, network in compare({0: DigitsClassifier(hidden=10)}, setting, plan, verbose=False):
        ...     print(f"{row.name}: {row.num_bytes:.0f} bytes, {row.num_parameters:.0f} parameters")
        full: 3040 bytes, 760 parameters
        8 bits per tensor: 830 bytes, 760 parameters
        magnitude, 50 % of weights, before: 1653 bytes, 390 parameters
        magnitude, 50 % of weights, fine-tuned: 1653 bytes, 390 parameters
    """
    if not networks:
        raise ValueError("`networks` must hold a trained network, but it is empty. Pass for example {0: model}.")
    bench = _Bench(setting, plan)
    distinct = {seed: one for seed, one in networks.items() if _is_first(networks, seed)}
    for seed, network in distinct.items():
        row, scored = bench.row(Row(report.FULL, report.AS_TRAINED, seed), detached_copy(network))
        if math.isnan(row.score):
            raise ValueError(
                f"The full network's {setting.monitor!r} must be a number, but it is NaN. Has it diverged?"
            )
        yield row, scored
    if any(level == "unit" for _, level in plan.pairs):
        require("torch_pruning", "prune")
    per_variant = plan.epochs + (plan.epochs + plan.scratch_epochs if plan.scratch_epochs else 0)
    total = len(networks) * len(plan.pairs) * len(plan.amounts) * per_variant
    with tqdm(total=total, unit="epoch", dynamic_ncols=True, file=sys.stderr, disable=not verbose) as bar:
        for seed, network in distinct.items():
            for name in (*UNIFORM, *get_args(Kind)) if plan.quantizations is None else plan.quantizations:
                bar.set_description(f"quantized, {name}, seed {seed}")
                yield bench.quantized(name, network, seed)
        for seed, network in networks.items():
            trained: set[Any] = set()
            for selector, level in plan.pairs:
                for amount in plan.amounts:
                    row = Row(report.PRUNED, "", seed, _name(selector), level, amount)
                    bar.set_description(f"{row.name}, seed {seed}")
                    yield from bench.pruned(row, selector, network, trained)
                    bar.update(per_variant)


class _Bench:
    """Makes rows: prunes, quantizes, trains, scores and weighs."""

    def __init__(self, setting: Setting, plan: Plan) -> None:
        self.setting = setting
        self.plan = plan
        self._inputs: Any = None  # of one sample

    def row(
        self,
        row: Row,
        network: L.LightningModule,
        *,
        kept: ParamDict | None = None,
        accelerator: str | None = None,
        **known: Any,
    ) -> tuple[Row, L.LightningModule]:
        """Score and weigh a network."""
        watch = _Watch() if self._inputs is None else None
        known["score"] = self.setting.score(network, *filter(None, [watch]), accelerator=accelerator)
        if watch is not None:
            self._inputs = watch.inputs
        num_zeros = sum(int((~mask).sum()) for mask in (kept or {}).values())
        known.setdefault("num_bytes", float(num_bytes(network, kept=kept)))
        known["file_bytes"] = float(file_bytes(network))
        known["num_parameters"] = float(sum(one.numel() for one in network.parameters()) - num_zeros)
        known["num_flops"] = self._flops(network)
        return replace(row, **known), network

    def quantized(self, name: str, network: L.LightningModule, seed: int) -> tuple[Row, L.LightningModule | None]:
        """Round or convert the weights of a network; what was not asked for by name may be left out."""
        how, start = _quantization(name), time.perf_counter()
        if isinstance(how, str):
            row = Row(report.QUANTIZED, report.BEFORE, seed, how, bits=4.0 if how == "int4-weight" else 8.0)
        else:
            row = Row(report.QUANTIZED, report.BEFORE, seed, "uniform", how[1], bits=float(how[0]))
        try:
            small = quantized(network, how) if isinstance(how, str) else fake_quantized(network, how[0], per=how[1])
        except (ValueError, ImportError) as error:
            if self.plan.quantizations is not None:
                raise
            return replace(row, note=" ".join(str(error).split())), None
        row = replace(row, seconds=time.perf_counter() - start)
        if isinstance(how, str):
            return self.row(row, small, accelerator="cpu")
        return self.row(row, small, num_bytes=float(num_bytes(small, bits=how[0], per=how[1])))

    def pruned(
        self, row: Row, selector: Selector, full: L.LightningModule, trained: set[Any]
    ) -> Iterator[tuple[Row, L.LightningModule | None]]:
        """Prune and fine-tune a network, and train what is left of it from scratch."""
        network, first = detached_copy(full), _FirstStep()
        level: Any = row.level
        pruning = PruningCallback(
            selector, row.amount, level=level, when=[0], num_samples=self.plan.num_samples, seed=row.seed
        )
        try:
            seconds = self.setting.fit(network, self.plan.epochs, row.seed, pruning, first)
        except (ValueError, MisconfigurationException) as error:  # what this selector does to this network
            yield replace(row, stage=report.FINE_TUNED, note=" ".join(str(error).split())), None
            return
        before = detached_copy(full)
        before.load_state_dict(first.weights)
        kept = {name: ~one.cpu() for name, one in pruning.pin.pinned.items()} if level == "parameter" else {}
        if level == "unit" and row.amount:
            before, network = (self._small(pruning, one) for one in (before, network))
        yield self.row(replace(row, stage=report.BEFORE, seconds=first.seconds), before, kept=kept)
        yield self.row(replace(row, stage=report.FINE_TUNED, seconds=seconds), network, kept=kept)
        if not self.plan.scratch_epochs:
            return
        if level == "unit":
            widths = (row.amount, *(one.shape for one in network.parameters()))
            if widths in trained:
                return
            trained.add(widths)
            row = replace(row, selector="")
        for stage, epochs in ((report.SHORT, self.plan.epochs), (report.LONG, self.plan.scratch_epochs)):
            anew = from_scratch(network, kept=kept, seed=row.seed)
            seconds = self.setting.fit(anew, epochs, row.seed, _Zeros(kept))
            yield self.row(replace(row, stage=stage, seconds=seconds), anew, kept=kept)

    @staticmethod
    def _small(pruning: PruningCallback, network: L.LightningModule) -> L.LightningModule:
        small = pruning.compact(network)
        assert isinstance(small, L.LightningModule)
        return small

    def _flops(self, network: L.LightningModule) -> float:
        if not _host.is_overridden("forward", network):
            return math.nan
        try:
            return float(num_flops(network, self._inputs, lambda module, inputs: module(inputs)))
        except Exception:  # whatever a module raises that does not take the first part of a batch
            return math.nan


class _Watch(L.Callback):
    """Takes the inputs of the first sample."""

    inputs: Any = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.inputs is not None:
            return
        one = _batch.first(batch, 1, "cpu")
        self.inputs = one[0] if isinstance(one, tuple | list) else one


class _FirstStep(L.Callback):
    """Takes the weights as they are before the first step; it stands behind what prunes there."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}
        self.seconds = math.nan
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.weights:
            self.weights = copy.deepcopy(pl_module.state_dict())
            self.seconds = time.perf_counter() - self._start


class _Zeros(L.Callback):
    """Holds what is not kept at zero, where it stands when training starts."""

    def __init__(self, kept: ParamDict) -> None:
        self.kept = kept
        self.pin = Pin()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        self.pin = Pin.at(parameters, {name: ~one.to(parameters[name].device) for name, one in self.kept.items()})

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        _host.hold(pl_module, optimizer, self, self.pin)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _host.release(self)


def _quantization(name: str) -> tuple[int, Per] | Kind:
    """Return bits and what has a grid of its own, or a kind of torchao's."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if name == kind:
            return kind
    match = re.fullmatch(r"(\d+)(-channel)?", name)
    if match is None or not 1 <= int(match[1]) <= 16:
        raise ValueError(
            f"`quantizations` must be bits from 1 to 16, as '4' or '4-channel', or one of {get_args(Kind)}, but got"
            f" {name!r}."
        )
    return int(match[1]), "channel" if match[2] else "tensor"


def _name(selector: Selector) -> str:
    return selector if isinstance(selector, str) else getattr(selector, "__name__", type(selector).__name__)


def _is_first(networks: Mapping[int, L.LightningModule], seed: int) -> bool:
    return next(one for one, network in networks.items() if network is networks[seed]) == seed
