"""EWC: the step is that of a penalty in the loss, and what is anchored is the Fisher information of the task's data."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import oracles
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_resume import assert_same
from test_resume import run as run_stream
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_continual import ContinualDataModule, EWCCallback, RehearsalCallback, TaskStream, _host, restore
from lightning_continual.constraints import QuadraticPenalty
from lightning_continual.data import seed_of
from lightning_continual.importance import empirical_fisher
from lightning_continual.parameters import evaluating

Make = Callable[..., L.Trainer]
Tensors = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
]


# --- The step ---------------------------------------------------------------------------------------------------------


class Penalised(Classifier):
    """A classifier with two tasks to remember; told to, it has the penalty written into its loss."""

    def __init__(self, by_hand: bool = False, strength: float = 3.0, make_optimizer: Any = None) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 2)
        self.by_hand = by_hand
        self.strength = strength
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        generator = torch.Generator().manual_seed(3)

        def draw(function: Any, factor: float) -> Tensors:
            return {n: factor * function(p.shape, generator=generator) for n, p in self.named_parameters()}

        self.anchors = [draw(torch.randn, 0.5) for _ in range(2)]
        self.fisher = [draw(torch.rand, 1.0) for _ in range(2)]
        self.fisher[0]["net.0.weight"][:5] = 0.0  # weights that one task does not need

    def by_formula(self) -> Tensor:
        """(λ/2) Σ_s Σ_i F_s (θ - θ_s)², as it stands in the paper."""
        total = torch.zeros(())
        for fisher, anchor in zip(self.fisher, self.anchors, strict=True):
            for name, parameter in self.named_parameters():
                total = total + (fisher[name] * (parameter - anchor[name]) ** 2).sum()
        return self.strength / 2 * total

    def loss(self, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        if self.by_hand:
            with torch.autocast("cpu", enabled=False):
                loss = loss + self.by_formula()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def callbacks(self, **options: Any) -> list[L.Callback]:
        """Return what stands for the penalty: nothing, or EWC that knows the two tasks."""
        if self.by_hand:
            return []
        ewc = EWCCallback(self.strength, **options)
        for fisher, anchor in zip(self.fisher, self.anchors, strict=True):
            ewc.penalty = ewc.penalty + QuadraticPenalty.around(anchor, fisher)
        return [ewc]


class Linear(Penalised):
    """A loss linear in the weights: its gradients do not depend on how half precision rounds them.

    Otherwise one weight in 10^4 that differs in its last digit is cast to the other neighbour, and two runs are soon
    apart by 10^-4, which is no matter of the penalty.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](x.repeat(1, 4)) + self.net[0](x)[:, :6]

    def loss(self, batch: Any) -> Tensor:
        loss = -self(batch[0]).gather(1, batch[1][:, None]).float().mean()
        with torch.autocast("cpu", enabled=False):
            return loss + self.by_formula() if self.by_hand else loss


class InTwo(Penalised):
    """Two optimizers, stepped by hand, one of them every other time."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for number, optimizer in enumerate(self.optimizers()):
            if number == 0 or batch_idx % 2:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        early = [*self.net[0].parameters(), *self.unused.parameters()]
        return torch.optim.SGD(early, lr=0.05), torch.optim.Adam(self.net[3].parameters(), lr=0.01)


class Steps(L.Callback):
    """Counts the steps that optimizers really make."""

    def __init__(self) -> None:
        self.made = 0

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer: Any, *args: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips steps by itself
        self.made += found_inf is None or not bool(found_inf)


class Keep(L.Callback):
    """Keeps what each process ends with."""

    def __init__(self, path: Path, what: Callable[[Any], Any] = lambda module: module.state_dict()) -> None:
        self.path = path
        self.what = what

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.what(pl_module), f"{self.path}-{trainer.global_rank}")

    def load(self, rank: int = 0) -> Any:
        return torch.load(f"{self.path}-{rank}")


def samples(number: int = 192, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(number, 4, generator=generator), torch.randint(6, (number,), generator=generator))


def relative(one: Tensors, two: Tensors) -> float:
    return max(float((value - two[name]).norm() / two[name].norm()) for name, value in one.items())


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-4)


def fused_adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-4, fused=True)


def half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2**20)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


STEPS: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "fp32": (None, dict),
    "bf16": (sgd, lambda: {"precision": "bf16-mixed"}),
    "fp64": (None, lambda: {"precision": "64-true"}),
    "momentum and weight decay": (sgd, dict),
    "Adam": (adam, dict),
    "fused Adam": (fused_adam, dict),
    "accumulation": (sgd, lambda: {"accumulate_grad_batches": 4}),
    "clipping by norm": (sgd, lambda: {"gradient_clip_val": 0.5}),
    "clipping by value": (sgd, lambda: {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
    "fp16 that skips": (sgd, half),
    "fp16 that skips, clipped": (sgd, lambda: {**half(), "gradient_clip_val": 0.5}),
    "fp16 that skips, accumulated": (adam, lambda: {**half(), "accumulate_grad_batches": 4}),
    "fp16 that skips, fused": (fused_adam, half),
}


@pytest.mark.parametrize(("make_optimizer", "options"), STEPS.values(), ids=STEPS)
def test_the_step_is_that_of_the_penalty_in_the_loss(trainer: Make, make_optimizer: Any, options: Any) -> None:
    ends, counts = [], []
    for by_hand in (False, True):
        L.seed_everything(1, verbose=False)
        is_half = "plugins" in options() or options().get("precision") == "bf16-mixed"
        module, steps = (Linear if is_half else Penalised)(by_hand, make_optimizer=make_optimizer), Steps()
        fit = trainer(*module.callbacks(), steps, max_steps=50, **options())
        fit.fit(module, DataLoader(samples(), 4, shuffle=True))
        assert fit.global_step == 50
        ends.append(module.state_dict())
        counts.append(steps.made)
    assert relative(*ends) <= 1e-6
    assert counts[0] == counts[1]
    assert (counts[0] < 50) == ("plugins" in options())  # fp16 has skipped some


def test_with_two_optimizers_stepped_by_hand_too(trainer: Make) -> None:
    ends = []
    for by_hand in (False, True):
        L.seed_everything(1, verbose=False)
        module = InTwo(by_hand)
        callbacks = module.callbacks(loss=lambda module, batch: module.loss(batch))
        trainer(*callbacks, max_epochs=1).fit(module, DataLoader(samples(), 4))
        ends.append(module.state_dict())
    assert relative(*ends) <= 1e-6


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)], ids="backend={}".format
)
def test_a_compiled_module_too(trainer: Make, backend: str) -> None:
    ends = []
    for by_hand in (False, True):
        L.seed_everything(1, verbose=False)
        module = Penalised(by_hand, make_optimizer=sgd)
        compiled: Any = module if by_hand else torch.compile(module, backend=backend)
        trainer(*module.callbacks(), max_epochs=1).fit(compiled, DataLoader(samples(), 4))
        ends.append(module.state_dict())
    assert relative(*ends) <= 1e-6


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_fork_find_unused_parameters_true"])
def test_in_two_processes_too(trainer: Make, tmp_path: Path, strategy: str) -> None:
    ends = []
    for by_hand in (False, True):
        L.seed_everything(1, verbose=False)
        module = Penalised(by_hand, make_optimizer=sgd)
        if strategy == "ddp_fork":
            del module.unused
        keep = Keep(tmp_path / str(by_hand))
        options = {"strategy": strategy, "devices": 2, "max_epochs": 1}
        if by_hand:
            options["strategy"] = "ddp_fork"  # the penalty in the loss uses all parameters
        callbacks = module.callbacks()
        if callbacks and strategy == "ddp_fork":
            penalty = callbacks[0].penalty
            for part in (penalty.precision, penalty.shift):
                del part["unused.weight"], part["unused.bias"]
        trainer(*callbacks, keep, **options).fit(module, DataLoader(samples(), 2, shuffle=True))
        ends.append(keep.load(0))
        assert_close(keep.load(1), ends[-1], rtol=0, atol=0)
    assert relative(*ends) <= 1e-6


class Flat(Classifier):
    """A loss without a slope."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def knowing(
    module: L.LightningModule, anchor: Tensors, precision: Tensors, strength: float = 1.0, **options: Any
) -> EWCCallback:
    """Return EWC that has seen a task."""
    ewc = EWCCallback(strength, **options)
    ewc.penalty = QuadraticPenalty.around(anchor, precision)
    return ewc


def copy_of(module: nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2, 4], ids="accumulate={}".format)
def test_on_a_flat_loss_weights_return_to_the_anchor_geometrically(trainer: Make, accumulate: int) -> None:
    strength, lr, steps = 2.0, 0.1, 10
    module = Flat().double()
    start = copy_of(module)
    anchor = {name: torch.randn_like(p) for name, p in start.items()}
    fisher = {name: torch.rand_like(p) for name, p in start.items()}
    trainer(
        knowing(module, anchor, fisher, strength),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    ).fit(module, DataLoader(samples(4 * accumulate * steps + 4), 4))
    steps += 1  # the last one with a batch alone, and the penalty's full strength
    for name, p in module.named_parameters():
        assert_close(p - anchor[name], (start[name] - anchor[name]) * (1 - lr * strength * fisher[name]) ** steps)


@pytest.mark.parametrize("make_optimizer", [adam, sgd], ids=["Adam", "SGD"])
def test_at_the_anchor_the_penalty_is_nothing_to_the_bit(trainer: Make, make_optimizer: Any) -> None:
    # Adam makes a full step of any rounding.
    ends = []
    for ewc in (True, False):
        L.seed_everything(1, verbose=False)
        module = Flat(
            lambda parameters: adam(parameters) if make_optimizer is adam else torch.optim.SGD(parameters, 1.0)
        )
        start = copy_of(module)
        precision = {name: torch.rand_like(p) for name, p in start.items()}
        callbacks = [knowing(module, start, precision, 1e4)] if ewc else []
        trainer(*callbacks, max_epochs=1).fit(module, DataLoader(samples(40), 4))
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_in_half_precision_small_moves_are_seen(trainer: Make) -> None:
    class Once(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            found.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    found: list[Tensors] = []
    L.seed_everything(1, verbose=False)
    module = Flat().to(torch.bfloat16)
    anchor = copy_of(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1 + 2**-7)  # the least there is
    moved = copy_of(module)
    fisher = {name: torch.rand(p.shape) for name, p in anchor.items()}
    ewc = knowing(module, anchor, fisher)
    trainer(ewc, Once(), max_steps=1, precision="bf16-true").fit(module, DataLoader(samples(8), 4))
    for name, gradient in found[0].items():
        expected = fisher[name] * (moved[name].float() - anchor[name].float())
        assert_close(gradient.float(), expected, rtol=2**-8, atol=1e-7)
    assert all(value.dtype == torch.float32 for value in ewc.penalty.precision.values())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_the_module_skips_stays_skipped(trainer: Make) -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx >= 2 and self.training else super().training_step(batch, batch_idx)

    ends = []
    for batches in (2, 10):
        L.seed_everything(1, verbose=False)
        module = Skips()
        anchor = {name: torch.zeros_like(p) for name, p in copy_of(module).items()}
        ewc = knowing(module, anchor, {name: torch.ones_like(p) for name, p in anchor.items()})
        trainer(ewc, max_epochs=1, limit_train_batches=batches).fit(module, DataLoader(samples(40), 4))
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_what_thaws_in_mid_task_is_held_from_then_on(trainer: Make) -> None:
    class Backbone(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[:2]
            self.head = self.net[2:]
            del self.net

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Backbone()
    start = copy_of(module)
    anchor = {name: p + 1 for name, p in start.items()}
    ewc = knowing(module, anchor, {name: torch.ones_like(p) for name, p in start.items()})
    thaw = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.1, should_align=False)
    trainer(ewc, thaw, max_epochs=2).fit(module, DataLoader(samples(20), 4))
    for name, p in module.named_parameters():
        steps = 5 if name.startswith("backbone") else 10
        assert_close(p - anchor[name], torch.full_like(p, -(0.9**steps)), rtol=1e-4, atol=1e-5)


def test_strength_zero_is_no_callback_whatever_is_known(trainer: Make) -> None:
    ends = []
    for ewc in (True, False):
        L.seed_everything(1, verbose=False)
        module = Classifier()
        zeros = {name: torch.zeros_like(p) for name, p in copy_of(module).items()}
        known = {**zeros, "of another module": torch.zeros(3)}
        callbacks = [knowing(module, known, known, strength=0.0)] if ewc else []
        trainer(*callbacks, max_epochs=1).fit(module, DataLoader(samples(40), 4, shuffle=True))
        ends.append({**module.state_dict(), "random": torch.get_rng_state()})
        assert not callbacks or callbacks[0].penalty.precision.keys() == known.keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# --- What is anchored -------------------------------------------------------------------------------------------------


def loss_of(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def by_function(module: Any, batches: Iterator[Any]) -> Tensors:
    assert not module.training
    return empirical_fisher(module, lambda batch: 2 * loss_of(module, batch), batches)


def sampled_oracle(module: Any, shares: list[list[Any]], task: int) -> Tensors:
    labelled = []
    for rank, share in enumerate(shares):
        generator = torch.Generator().manual_seed(seed_of(task, "fisher", rank))
        for x, _ in share:
            uniform = torch.rand(1, 1, generator=generator, dtype=torch.float64)
            labelled.append((x, (module(x).detach().softmax(1).cumsum(1) < uniform).sum(1)))
    return oracles.empirical_fisher(module, lambda sample: loss_of(module, sample), labelled)


def expected_fisher(kind: Any, module: Any, data: Any, processes: int = 1, batch_size: int = 4) -> Tensors:
    """By the definition: sample after sample, or batch after batch, of each process's share in its order."""
    with evaluating(module):
        return _expected_fisher(kind, module, data, processes, batch_size)


def _expected_fisher(kind: Any, module: Any, data: Any, processes: int, batch_size: int) -> Tensors:
    everything = [[data[place] for place in range(rank, len(data), processes)] for rank in range(processes)]
    shares = [[(x[None], y[None]) for x, y in share] for share in everything]
    singles = [sample for share in shares for sample in share]
    if kind == "exact":
        return oracles.exact_fisher(module, [x for x, _ in singles])
    if kind == "sampled":
        return sampled_oracle(module, shares, task=0)
    if kind == "batched":
        batches = [
            [torch.cat(part) for part in zip(*share[first : first + batch_size], strict=True)]
            for share in shares
            for first in range(0, len(share), batch_size)
        ]
        return oracles.batched_fisher(module, lambda batch: loss_of(module, batch), batches)
    factor = 2 if kind is by_function else 1
    return oracles.empirical_fisher(module, lambda sample: factor * loss_of(module, sample), singles)


KINDS = {
    kind if isinstance(kind, str) else "callable": kind
    for kind in ("empirical", "exact", "sampled", "batched", by_function)
}
over_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@over_kinds
def test_the_importance_is_that_of_the_definition_on_the_tasks_data(trainer: Make, kind: Any) -> None:
    L.seed_everything(1, verbose=False)
    module, data = Classifier().double(), samples(22)
    ewc = EWCCallback(1.0, fisher=kind)
    trainer(ewc, max_epochs=1, precision="64-true").fit(module, DataLoader(data, 4, shuffle=True))
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    expected = expected_fisher(kind, module, data)
    assert_close(ewc.penalty.precision, expected)
    assert_close(ewc.penalty.shift, {name: expected[name] * p.detach() for name, p in module.named_parameters()})


def test_each_task_draws_its_own_labels(trainer: Make) -> None:
    L.seed_everything(1, verbose=False)
    module, ewc, precisions = Classifier(lr=0.0), EWCCallback(1.0, fisher="sampled"), []
    for _ in range(2):
        trainer(ewc, max_epochs=1).fit(module, DataLoader(samples(12), 4))
        precisions.append(ewc.penalty.precision["net.0.weight"])
    assert not torch.allclose(precisions[1], 2 * precisions[0], rtol=0.01)


def test_a_training_step_may_take_the_batch_alone(trainer: Make) -> None:
    class Alone(Classifier):
        def training_step(self, batch: Any) -> Tensor:
            return loss_of(self, batch)

    ewc = EWCCallback(1.0)
    trainer(ewc, max_epochs=1).fit(Alone(), DataLoader(samples(12), 4))
    assert ewc.penalty


@over_kinds
def test_in_two_processes_it_is_the_same(trainer: Make, tmp_path: Path, kind: Any) -> None:
    L.seed_everything(1, verbose=False)
    module, data = Classifier().double(), samples(21)  # one process has a sample more
    ewc = EWCCallback(1.0, fisher=kind)
    keep = Keep(tmp_path / "of", lambda module: {"module": module.state_dict(), **ewc.penalty.state_dict()})
    trainer(ewc, keep, max_epochs=1, precision="64-true", strategy="ddp_fork", devices=2).fit(
        module, DataLoader(data, 4, shuffle=True)
    )
    first, second = keep.load(0), keep.load(1)
    assert_close(first, second, rtol=0, atol=0)
    module.load_state_dict(first["module"])
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    assert_close(first["precision"], expected_fisher(kind, module, data, processes=2))
    if kind not in ("sampled", "batched"):  # which depend on the order, and on the batches
        assert_close(first["precision"], expected_fisher(kind, module, data))


@pytest.mark.parametrize("processes", [1, 2], ids="processes={}".format)
@pytest.mark.parametrize(("num_samples", "places"), [(5, [0, 4, 8, 13, 17]), (22, range(22)), (100, range(22))])
def test_num_samples_are_spread_evenly_over_the_data(
    trainer: Make, tmp_path: Path, num_samples: int, places: Any, processes: int
) -> None:
    L.seed_everything(1, verbose=False)
    module, data = Classifier().double(), samples(22)
    ewc = EWCCallback(1.0, num_samples=num_samples)
    keep = Keep(tmp_path / "of", lambda module: {"module": module.state_dict(), **ewc.penalty.state_dict()})
    options = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
    trainer(ewc, keep, max_epochs=1, precision="64-true", **options).fit(module, DataLoader(data, 4, shuffle=True))
    module.load_state_dict(keep.load()["module"])
    part = TensorDataset(data.tensors[0][list(places)].double(), data.tensors[1][list(places)])
    assert_close(keep.load()["precision"], expected_fisher("empirical", module, part))


@pytest.mark.parametrize("decay", [1.0, 0.5], ids="decay={}".format)
@pytest.mark.parametrize("online", [False, True], ids="online={}".format)
def test_over_three_tasks_the_penalty_is_the_formula(trainer: Make, decay: float, online: bool) -> None:
    L.seed_everything(1, verbose=False)
    module, ewc = Classifier().double(), EWCCallback(0.1, decay=decay, online=online)
    fisher, anchors = [], []
    for seed in range(3):
        data = samples(12, seed)
        trainer(ewc, max_epochs=1, precision="64-true").fit(module, DataLoader(data, 4, shuffle=True))
        data = TensorDataset(data.tensors[0].double(), data.tensors[1])
        fisher.append(expected_fisher("empirical", module, data))
        anchors.append(copy_of(module))
    other = {name: p + torch.randn_like(p) for name, p in anchors[-1].items()}
    by_hand, slope = torch.zeros((), dtype=torch.float64), {name: torch.zeros_like(p) for name, p in other.items()}
    for task in range(3):
        for name, value in fisher[task].items():
            distance = other[name] - anchors[-1 if online else task][name]
            by_hand += decay ** (2 - task) * (value * distance**2).sum() / 2
            slope[name] += decay ** (2 - task) * value * distance
    assert_close(ewc.penalty.value(other), by_hand)
    assert_close(ewc.penalty.gradient(other), slope)


@pytest.mark.parametrize(
    ("patterns", "held"),
    [
        ("net.0.*", ["net.0.weight", "net.0.bias"]),
        ("*.weight", ["net.0.weight", "net.3.weight"]),
        (["net.3.bias", "net.0.b*"], ["net.0.bias", "net.3.bias"]),
    ],
    ids=str,
)
def test_patterns_say_which_parameters_are_held(trainer: Make, patterns: Any, held: list[str]) -> None:
    module, ewc = Classifier(), EWCCallback(1.0, parameters=patterns)
    trainer(ewc, max_epochs=1).fit(module, DataLoader(samples(8), 4))
    assert list(ewc.penalty.precision) == held


def test_frozen_parameters_are_neither_anchored_nor_moved(trainer: Make) -> None:
    module = Classifier()
    module.net[0].requires_grad_(False)
    frozen = module.net[0].weight.clone()
    anchor = {name: torch.zeros_like(p) for name, p in copy_of(module).items()}
    ewc = knowing(module, anchor, {name: torch.ones_like(p) for name, p in anchor.items()}, parameters="net.*")
    trainer(ewc, max_epochs=1).fit(module, DataLoader(samples(8), 4))
    assert torch.equal(module.net[0].weight, frozen)
    assert_close(ewc.penalty.precision["net.0.weight"], torch.ones_like(frozen))  # as it was
    assert bool((ewc.penalty.precision["net.3.weight"] >= 1).all())


def test_shared_and_scalar_parameters_are_held_too(trainer: Make) -> None:
    class Tied(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self.net[4].weight = self.net[2].weight
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    L.seed_everything(1, verbose=False)
    module, data, ewc = Tied().double(), samples(12), EWCCallback(1.0)
    for _ in range(2):
        trainer(ewc, max_epochs=1, precision="64-true").fit(module, DataLoader(data, 4))
    ewc = EWCCallback(1.0)
    trainer(ewc, max_epochs=1, precision="64-true").fit(module, DataLoader(data, 4))
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    assert_close(ewc.penalty.precision, expected_fisher("empirical", module, data))
    assert "scale" in ewc.penalty.precision


def test_with_rehearsal_the_importance_is_of_the_tasks_own_data(trainer: Make) -> None:
    for reload in (False, True):
        L.seed_everything(1, verbose=False)
        module, ewc, found = Classifier().double(), EWCCallback(1.0), []
        tasks = make_tasks((16, 12), val=False)
        data = ContinualDataModule(tasks, batch_size=4)
        end = ewc.on_task_end

        def ended(trainer: Any, module: Any, task: int, ewc: Any = ewc, end: Any = end, found: Any = found) -> None:
            before = ewc.penalty
            end(trainer, module, task)
            found.append((ewc.penalty, before, copy_of(module)))

        ewc.on_task_end = ended  # type: ignore[method-assign]
        trainer(TaskStream(2), RehearsalCallback(16, reload=reload), ewc, precision="64-true").fit(
            module, datamodule=data
        )
        for task, (after, before, weights) in enumerate(found):
            module.load_state_dict(weights)
            x, y = tasks[task].train.tensors
            fisher = expected_fisher("empirical", module, TensorDataset(x.double(), y))
            old = before.precision or {name: torch.zeros_like(p) for name, p in weights.items()}
            assert_close({name: after.precision[name] - old[name] for name in fisher}, fisher)


# --- Any module, left as it was ---------------------------------------------------------------------------------------


class Busy(L.LightningModule):
    """Does in its training step all that modules do there, and takes a batch of any structure."""

    def __init__(self, structure: str = "tuple") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6))
        self.net[1].eval()  # frozen statistics, as users do
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.structure = structure
        self.accuracy = MulticlassAccuracy(6)
        self.metrics = MetricCollection({"mean": MeanMetric()})
        self.losses: list[Tensor] = []
        self.seen: Counter[int] = Counter()
        self.calls = 0
        self.register_buffer("average", torch.zeros(()))

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.structure == "dict":
            return batch["x"], batch["y"]
        if self.structure == "nested":
            return batch["input"][0]["x"], batch["target"][0]
        return batch

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.unpack(batch)
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.metrics["mean"].update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "twice": 2 * loss}, on_epoch=True, on_step=False)
        self.losses.append(loss.detach())
        self.seen.update(y.tolist())
        self.calls += 1
        self.average.lerp_(loss.detach().float() + torch.rand(()), 0.1)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.losses).mean())
        self.log("calls", float(self.calls))
        self.log("collected", self.metrics.compute()["mean"])
        self.metrics.reset()
        self.losses.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def structured(structure: str, data: TensorDataset) -> list[Any]:
    pairs = [(x, y) for x, y in data]
    if structure == "dict":
        return [{"x": x, "y": y} for x, y in pairs]
    return [{"input": [{"x": x}], "target": (y,)} for x, y in pairs] if structure == "nested" else pairs


@pytest.mark.parametrize("structure", ["tuple", "dict", "nested"])
def test_a_batch_may_have_any_structure(trainer: Make, structure: str) -> None:
    L.seed_everything(1, verbose=False)
    module, data, ewc = Busy(structure).double(), samples(12), EWCCallback(1.0)
    loader = DataLoader(structured(structure, data), 4)
    trainer(ewc, max_epochs=2, precision="64-true", log_every_n_steps=1).fit(module, loader)
    module.structure = "tuple"
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    assert_close(ewc.penalty.precision, expected_fisher("empirical", module, data))


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_logits_may_be_computed_from_any_structure(trainer: Make, kind: Any) -> None:
    L.seed_everything(1, verbose=False)
    module, data = Busy("dict").double(), samples(12)
    ewc = EWCCallback(1.0, fisher=kind, logits=lambda module, batch: module(batch["x"]))
    trainer(ewc, max_epochs=1, precision="64-true").fit(module, DataLoader(structured("dict", data), 4))
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    assert_close(ewc.penalty.precision, expected_fisher(kind, module, data))


def snapshot(trainer: L.Trainer, module: Busy) -> Any:
    states = [module.accuracy.metric_state, module.metrics["mean"].metric_state]
    counts = [module.accuracy._update_count, module.metrics["mean"]._update_count]
    return {
        "modes": [one.training for one in module.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "metrics": [{name: value.clone() for name, value in state.items()} for state in states],
        "counts": counts,
        "logged": [dict(trainer.callback_metrics), dict(trainer.logged_metrics), dict(trainer.progress_bar_metrics)],
        "random": _host.random_state()["torch"],
        "python": _host.random_state()["python"],
        "own": [list(module.losses), dict(module.seen), module.calls, sorted(vars(module))],
    }


@over_kinds
def test_the_boundary_leaves_everything_as_it_was_to_the_bit(trainer: Make, kind: Any) -> None:
    L.seed_everything(1, verbose=False)
    module, ewc, taken = Busy(), EWCCallback(1.0, fisher=kind), []
    end = ewc.on_task_end

    def ended(trainer: Any, pl_module: Any, task: int) -> None:
        taken.append(snapshot(trainer, pl_module))
        end(trainer, pl_module, task)
        taken.append(snapshot(trainer, pl_module))

    ewc.on_task_end = ended  # type: ignore[method-assign]
    tasks = make_tasks((16, 12), val=False)
    trainer(ewc, TaskStream(2), log_every_n_steps=1).fit(module, datamodule=ContinualDataModule(tasks, batch_size=4))
    assert len(taken) == 4
    for before, after in (taken[:2], taken[2:]):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert_close(after[name], value, rtol=0, atol=0, msg=name) if name != "own" else None
        assert str(before["own"]) == str(after["own"])
    assert any(gradient is not None for gradient in taken[0]["gradients"])


@pytest.mark.parametrize("way", ["stream", "fit"])
def test_the_first_task_is_trained_and_logged_as_without_it(trainer: Make, way: str) -> None:
    ends = []
    for callbacks in ([EWCCallback(1.0)], []):
        L.seed_everything(1, verbose=False)
        module, options = Busy(), {"max_epochs": 2}
        if way == "stream":
            callbacks, options = [*callbacks, TaskStream(2)], {}
        data = ContinualDataModule(make_tasks((16,), val=False), batch_size=4)
        fit = trainer(*callbacks, log_every_n_steps=1, **options)
        fit.fit(module, datamodule=data)
        ends.append({**module.state_dict(), **fit.callback_metrics, "random": torch.get_rng_state()})
    assert ends[0].keys() == ends[1].keys()
    assert not [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]


# --- A head that grows ------------------------------------------------------------------------------------------------


def grow(module: Any) -> None:
    """Give the last layer two more outputs."""
    old = module.net[3]
    module.net[3] = nn.Linear(16, old.out_features + 2).to(old.weight)
    with torch.no_grad():
        module.net[3].weight[: old.out_features] = old.weight
        module.net[3].bias[: old.out_features] = old.bias


class Grow(L.Callback):
    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        if task > 0:
            grow(pl_module)
            trainer.strategy.setup_optimizers(trainer)


class PenaltyGradients(L.Callback):
    """Keeps what one of the callbacks before the other adds to the gradients."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Tensors]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.found.append((str(trainer.global_step), {n: p.grad.clone() for n, p in pl_module.named_parameters()}))


def small_head() -> Classifier:
    module = Classifier()
    module.net[3] = nn.Linear(16, 2)
    return module


def check_growth(before: PenaltyGradients, after: PenaltyGradients, ewc: EWCCallback) -> None:
    rows = [one["net.3.weight"].shape[0] for _, one in after.found]
    assert sorted(set(rows)) == [2, 4, 6]
    last = [
        {name: b[name] - a[name] for name in a}
        for (_, a), (_, b) in zip(before.found, after.found, strict=True)
        if len(a["net.3.bias"]) == 4
    ]
    assert all(bool((added["net.3.weight"][2:] == 0).all()) for added in last)
    assert any(bool((added["net.3.weight"][:2] != 0).any()) for added in last)
    assert ewc.penalty.precision["net.3.weight"].shape == (6, 16)


@pytest.mark.parametrize("place", ["before", "after"])
def test_rows_that_a_head_gains_in_a_stream_are_free(trainer: Make, place: str) -> None:
    L.seed_everything(1, verbose=False)
    ewc, before, after = EWCCallback(100.0), PenaltyGradients(), PenaltyGradients()
    callbacks = [Grow(), before, ewc, after] if place == "before" else [before, ewc, after, Grow()]
    data = ContinualDataModule(make_tasks((16, 16, 16), val=False), batch_size=4)
    trainer(TaskStream(2), *callbacks).fit(small_head(), datamodule=data)
    check_growth(before, after, ewc)


def test_rows_that_a_head_gains_between_fits_are_free(trainer: Make, tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    ewc, before, after, module = EWCCallback(100.0), PenaltyGradients(), PenaltyGradients(), small_head()
    for number, task in enumerate(make_tasks((16, 16, 16))):
        fit = trainer(before, ewc, after, max_epochs=2)
        fit.fit(module, DataLoader(task.train, 4))
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        ewc = EWCCallback(100.0)
        restore(tmp_path / "deployed.ckpt", module, [ewc])
        if number < 2:
            grow(module)
    check_growth(before, after, ewc)


# --- What is logged ---------------------------------------------------------------------------------------------------


class ByHand(L.Callback):
    """Computes the penalty after every batch by the formula."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(float(pl_module.by_formula().detach()))


def logged_in(folder: Path) -> dict[int, float]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return {int(row["step"]): float(row["ewc/penalty"]) for row in csv.DictReader(lines) if row["ewc/penalty"]}


@pytest.mark.parametrize("accumulate", [1, 2], ids="accumulate={}".format)
def test_the_penalty_is_logged_as_often_as_the_trainer_logs(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    def counted(penalty: QuadraticPenalty, parameters: Any) -> Tensor:
        calls.append(1)
        return value_of(penalty, parameters)

    calls, value_of = [], QuadraticPenalty.value
    monkeypatch.setattr(QuadraticPenalty, "value", counted)
    L.seed_everything(1, verbose=False)
    module, by_hand = Penalised(), ByHand()
    fit = trainer(
        *module.callbacks(),
        by_hand,
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=5,
        accumulate_grad_batches=accumulate,
    )
    fit.fit(module, DataLoader(samples(80), 4))
    found, number = logged_in(tmp_path), 20 // accumulate
    assert list(found) == list(range(4, number, 5))
    assert len(calls) == len(found)  # it is not computed for nothing
    for step, value in found.items():
        assert value == pytest.approx(by_hand.values[(step + 1) * accumulate - 1], rel=1e-5)
    assert float(fit.callback_metrics["ewc/penalty"]) == pytest.approx(by_hand.values[-1], rel=1e-5)


def test_with_two_optimizers_it_is_logged_as_often(trainer: Make, tmp_path: Path) -> None:
    module, by_hand = InTwo(), ByHand()
    callbacks = module.callbacks(loss=lambda module, batch: module.loss(batch))
    options = {"max_epochs": 1, "logger": CSVLogger(tmp_path), "log_every_n_steps": 5}
    trainer(*callbacks, by_hand, **options).fit(module, DataLoader(samples(80), 4))
    assert list(logged_in(tmp_path).values()) == pytest.approx(by_hand.values[4::5], rel=1e-5)


def test_a_bare_trainer_is_not_asked_to_log() -> None:
    module = Penalised()
    L.Trainer(barebones=True, max_epochs=1, callbacks=module.callbacks(), accelerator="cpu").fit(
        module, DataLoader(samples(8), 4)
    )


# --- In production ----------------------------------------------------------------------------------------------------


def test_restored_in_another_process_it_goes_on_as_if_it_had_not_stopped(trainer: Make, tmp_path: Path) -> None:
    def months(stop: bool) -> tuple[Any, EWCCallback]:
        L.seed_everything(1, verbose=False)
        module, ewc, path = Classifier(), EWCCallback(5.0, decay=0.5), tmp_path / "deployed.ckpt"
        for month in range(3):
            if stop and month:
                module, ewc = Classifier(), EWCCallback(5.0, decay=0.5)
                restore(path, module, [ewc])
            torch.manual_seed(month)
            fit = trainer(ewc, max_epochs=2)
            fit.fit(module, DataLoader(samples(16, month), 4, shuffle=True))
            fit.save_checkpoint(path)
        return module.state_dict(), ewc

    (whole, one), (stopped, two) = months(False), months(True)
    assert not [name for name, value in whole.items() if not torch.equal(value, stopped[name])]
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert one._tasks_ended == 3


@pytest.mark.parametrize("options", [{}, {"online": True, "fisher": "sampled"}], ids=["separate", "online, sampled"])
def test_a_checkpoint_from_anywhere_resumes_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def make() -> list[L.Callback]:
        return [TaskStream(2), EWCCallback(5.0, decay=0.8, **options)]

    *whole, saved = run_stream(tmp_path, make)
    for path in saved[4:-1:7]:
        assert_same(run_stream(tmp_path, make, ckpt=path), whole, path)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_dry_run_reads_no_more_than_it_trains(trainer: Make, kind: Any) -> None:
    class Counting(TensorDataset):
        reads = 0

        def __getitem__(self, place: Any) -> Any:
            type(self).reads += 1
            return super().__getitem__(place)

    data, module = Counting(*samples(100).tensors), Classifier()
    trainer(EWCCallback(1.0, fisher=kind), fast_dev_run=2).fit(module, DataLoader(data, 4))
    assert Counting.reads <= 20


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"`strength` must be at least 0 and finite, but got -1\.0"),
        ({"strength": float("inf")}, r"`strength` must be at least 0 and finite, but got inf"),
        ({"strength": float("nan")}, r"`strength` must be at least 0 and finite, but got nan"),
        ({"decay": 0.0}, r"`decay` must lie in \(0, 1\], but got 0\.0\. Pass 1\.0"),
        ({"decay": 1.5}, r"`decay` must lie in \(0, 1\], but got 1\.5"),
        ({"fisher": "diagonal"}, r"`fisher` must be one of \('empirical', .*\) or a function, but got 'diagonal'"),
        ({"num_samples": 0}, r"`num_samples` must be at least 1, but got 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWCCallback(**{"strength": 1.0, **arguments})


class Untrained(L.Callback):
    """Fails if anything was trained."""

    def on_train_batch_end(self, *args: Any) -> None:
        pytest.fail("it has trained")


def test_a_pattern_that_names_nothing_is_named_before_training(trainer: Make) -> None:
    ewc = EWCCallback(1.0, parameters=["net.0.*", "backbone.*"])
    with pytest.raises(ValueError, match=r"`parameters` has the pattern 'backbone\.\*', which names no parameter of"):
        trainer(ewc, Untrained(), max_epochs=1).fit(Classifier(), DataLoader(samples(8), 4))


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_module_without_logits_is_told_so_before_training(trainer: Make, kind: Any) -> None:
    class Embeds(Classifier):
        def forward(self, x: Tensor) -> Any:
            return {"embedding": self.net(x)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0])["embedding"], batch[1])

    with pytest.raises(ValueError, match=f"The {kind} Fisher information needs logits of shape .* Pass `logits`"):
        trainer(EWCCallback(1.0, fisher=kind), Untrained(), max_epochs=1).fit(Embeds(), DataLoader(samples(8), 4))
    ewc = EWCCallback(1.0, fisher=kind, logits=lambda module, batch: module(batch[0])["embedding"])
    trainer(ewc, max_epochs=1).fit(Embeds(), DataLoader(samples(8), 4))
    assert ewc.penalty


def test_a_loss_that_is_a_sum_is_told_so_before_training(trainer: Make) -> None:
    class Sums(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    with pytest.raises(ValueError, match="`loss` must be the mean over the samples of a batch"):
        trainer(EWCCallback(1.0), Untrained(), max_epochs=1).fit(Sums(dropout=0.0), DataLoader(samples(8), 4))


@pytest.mark.filterwarnings("ignore:.*Your `IterableDataset` has `__len__` defined")
def test_data_that_cannot_be_read_anew_is_refused_before_training(trainer: Make) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples(8))

    with pytest.raises((TypeError, ValueError, MisconfigurationException)):
        trainer(EWCCallback(1.0), Untrained(), max_epochs=1).fit(Classifier(), DataLoader(Endless(), 4))


def test_a_parameter_that_is_gone_is_named_before_training(trainer: Make) -> None:
    module = Classifier()
    ewc = knowing(module, copy_of(module), copy_of(module))
    module.net[3] = nn.Identity()
    with pytest.raises(ValueError, match=r"Parameter 'net\.3\.weight' is penalised, but the module has it no more"):
        trainer(ewc, Untrained(), max_epochs=1).fit(module, DataLoader(samples(8), 4))


@pytest.mark.parametrize("layer", [nn.Linear(16, 5), nn.Linear(8, 6)], ids=["fewer rows", "other columns"])
def test_a_parameter_of_another_shape_is_named_before_training(trainer: Make, layer: nn.Module) -> None:
    module = Classifier()
    ewc = knowing(module, copy_of(module), copy_of(module))
    module.net[3] = layer
    with pytest.raises(ValueError, match=r"'net\.3\.weight' is penalised with shape \(6, 16\), but has shape"):
        trainer(ewc, Untrained(), max_epochs=1).fit(module, DataLoader(samples(8), 4))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"])
def test_a_strategy_that_hides_gradients_is_named(name: str) -> None:
    hiding = SimpleNamespace(strategy=type(name, (), {})())
    with pytest.raises(MisconfigurationException, match=f"`EWCCallback` needs the whole gradient .* but `{name}`"):
        _host.require_visible_gradients(hiding, "EWCCallback")
    _host.require_visible_gradients(SimpleNamespace(strategy=type("DDPStrategy", (), {})()), "EWCCallback")


def test_the_strategy_is_asked_before_training(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_host, "require_visible_gradients", lambda trainer, who, **options: asked.append(who))
    trainer(EWCCallback(1.0), fast_dev_run=True).fit(Classifier(), DataLoader(samples(8), 4))
    assert asked == ["EWCCallback"]


def test_importance_that_is_not_finite_names_parameter_and_batch_and_the_old_stands(trainer: Make) -> None:
    module, ewc = Classifier(), EWCCallback(1.0)
    trainer(ewc, max_epochs=1).fit(module, DataLoader(samples(12), 4))
    old = ewc.penalty.state_dict()
    x, y = samples(12).tensors
    x[9] = torch.nan
    loader = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(ValueError, match=r"those of parameter 'net\.0\.weight' are not in batch 2 \(counted from 0\)"):
        trainer(ewc, max_epochs=1, limit_train_batches=2).fit(module, loader)
    assert_close(ewc.penalty.state_dict(), old, rtol=0, atol=0)
    assert ewc._tasks_ended == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {"net.0.weight": -found["net.0.weight"] - 1}, r"'net\.0\.weight' must be finite and not neg"),
        (lambda found: {"net.0.weight": found["net.0.weight"] / 0}, r"'net\.0\.weight' must be finite and not neg"),
        (lambda found: {"net.0.weight": torch.ones(3)}, r"got 'net\.0\.weight' of shape \(3,\), where .* \(16, 4\)"),
        (lambda found: {"0.weight": torch.ones(3)}, r"got '0\.weight' of shape \(3,\), .* no parameter of this name"),
    ],
    ids=["negative", "infinite", "shape", "name"],
)
def test_what_a_function_returns_is_checked(trainer: Make, change: Any, message: str) -> None:
    def fisher(module: Any, batches: Any) -> Tensors:
        return change(copy_of(module))

    with pytest.raises(ValueError, match=message):
        trainer(EWCCallback(1.0, fisher=fisher), max_epochs=1).fit(Classifier(), DataLoader(samples(8), 4))


def test_manual_optimization_needs_a_loss(trainer: Make) -> None:
    for kind in ("empirical", "batched"):
        with pytest.raises(MisconfigurationException, match=rf"fisher='{kind}'\)` takes the loss .* Pass `loss=`"):
            trainer(EWCCallback(1.0, fisher=kind), Untrained(), max_epochs=1).fit(InTwo(), DataLoader(samples(8), 4))
    trainer(EWCCallback(1.0, fisher="exact"), max_epochs=1).fit(InTwo(), DataLoader(samples(8), 4))


def test_a_line_search_is_refused(trainer: Make) -> None:
    module = Penalised(make_optimizer=lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"))
    with pytest.raises(MisconfigurationException, match="a line search compares losses"):
        trainer(*module.callbacks(), Untrained(), max_epochs=1).fit(module, DataLoader(samples(8), 4))
