"""A trained network compressed in many ways: the comparison written, the smallest that is good enough saved."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from torch import nn

from lightning_continual._extras import require
from lightning_continual.comparison import results as report
from lightning_continual.comparison.results import Row, Summary
from lightning_continual.comparison.setting import Setting
from lightning_continual.comparison.variants import Plan, compare
from lightning_continual.compression.surgery import resize_

M = TypeVar("M", bound=nn.Module)

_LATER = ("plot.png", "recommended.ckpt", "recommended.ckpt.gz")  # what is written when all is compared
_PACKED = ("parameter", "tensor", "channel")  # levels whose zeros or bits PyTorch writes out


@dataclass(frozen=True)
class Comparison:
    """What `compress` found.

    Args:
        rows: One for each network and seed.
        summaries: Their means over seeds.
        recommended: The smallest within the tolerance.
        text: The table, the recommendation, and where files lie.
    """

    rows: list[Row]
    summaries: list[Summary]
    recommended: Summary | None
    text: str


def compress(
    networks: Mapping[int, L.LightningModule],
    setting: Setting,
    plan: Plan,
    folder: Path,
    *,
    tolerance: float = 0.01,
    verbose: bool = True,
) -> Comparison:
    """Compare small forms of trained networks, write what came out into a folder, and recommend one.

    The folder gets ``table.csv`` (a row a network and seed), ``plot.png`` (scores against bytes), and
    ``recommended.ckpt``, the checkpoint of the smallest network whose mean score is within the tolerance of the full
    one's. Smallest is by `num_bytes`, what its weights take when zeros and bits are packed; PyTorch writes them out, so
    that there may be a ``recommended.ckpt.gz``, too. `load_compressed` reads either.

    Args:
        networks: Trained networks by seed; one network may stand under several seeds.
        setting: How they are trained and scored.
        plan: What is compared.
        folder: Made if it is not there; files of these names in it are replaced.
        tolerance: What may be lost, in the unit of the score.
        verbose: Whether to show progress.

    Returns:
        What came out.

    Raises:
        ImportError: If matplotlib, or what the plan needs, is not installed.
        ValueError: If an argument lies outside its range, or the score is not logged.

    Example:
        >>> from lightning_continual.demo import DigitsClassifier
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([(torch.rand(64), label) for label in range(10)])
        >>> setting, plan = Setting((loader, loader), accelerator="cpu"), Plan(selectors=[], quantizations=["16"])
        >>> folder = Path(tempfile.mkdtemp())
        >>> found = compress({0: DigitsClassifier()}, setting, plan, folder, tolerance=1.0, verbose=False)
        >>> found.recommended.row.name
        '16 bits per tensor'
        >>> load_compressed(folder / "recommended.ckpt", DigitsClassifier()).net[0].out_features
        200
    """
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least 0, but got {tolerance}. Pass for example 0.01.")
    require("matplotlib", "plots")
    folder.mkdir(parents=True, exist_ok=True)
    lower = bool(setting.lower_is_better)
    sign = -1.0 if lower else 1.0
    rows: list[Row] = []
    saved: dict[str, dict[int, Path]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        for row, network in compare(networks, setting, plan, verbose=verbose):
            for name in _LATER if not rows else ():
                (folder / name).unlink(missing_ok=True)  # of a comparison before, which the table is no more of
            rows.append(row)
            report.write_rows(rows, folder / "table.csv")  # at once: a long comparison may be broken off
            full = [sign * one.score for one in rows if one.family == report.FULL]
            if network is not None and sign * row.score >= sum(full) / len(full) - tolerance - 1e-9:
                saved.setdefault(row.name, {})[row.seed] = path = Path(kept) / f"{len(rows)}.ckpt"
                network.trainer.save_checkpoint(path, weights_only=True)
        summaries = report.summarize(rows, lower_is_better=lower)
        kind = type(next(iter(networks.values()))).__name__
        options: dict[str, Any] = {"label": setting.monitor, "lower_is_better": lower}
        report.compression_figure(summaries, title=kind, **options).savefig(folder / "plot.png", dpi=150)
        found = report.smallest_within(summaries, tolerance, lower_is_better=lower)
        text = report.summary_table(summaries, **options)
        if found is not None:
            files = _write(saved[found.row.name][found.row.seed], folder, found)
            within = f"{'lower' if lower else 'higher'} is better, tolerance {tolerance:g}"
            text += "\n\n" + _recommendation(found, summaries[0], within, setting.monitor, files, kind)
    text += f"\nTable: {folder / 'table.csv'}\nPlot:  {folder / 'plot.png'}"
    return Comparison(rows, summaries, found, text)


def load_compressed(checkpoint: str | Path, module: M) -> M:
    """Load a checkpoint that `compress` has saved into a module of the full size, which thereby becomes small.

    Args:
        checkpoint: The file; ``.gz`` is unpacked.
        module: A module of the class and with the arguments of the full one.

    Returns:
        The module; of a pruned one, its smaller layers have other parameters than before: make optimizers anew.

    Raises:
        ValueError: If a weight is missing, or of a shape that removing units does not make.

    Example:
        >>> model, path = nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "recommended.ckpt"
        >>> torch.save({"state_dict": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}}, path)
        >>> load_compressed(path, model).weight.data
        tensor([[1., 1.]])
    """
    state = _read(Path(checkpoint))["state_dict"]
    names = set(module.state_dict())
    if names != set(state):
        name, missing = sorted(names ^ set(state))[0], names - set(state)
        where = "is missing in the checkpoint" if name in missing else "is not in the module"
        raise ValueError(f"{name!r} {where}. Pass a module of the class that was compressed, with its arguments.")
    packed = any(hasattr(value, "__tensor_flatten__") for value in state.values())  # torchao's
    if not packed:
        resize_(module, state)
    module.load_state_dict(state, assign=packed)
    return module


def _write(saved: Path, folder: Path, found: Summary) -> list[Path]:
    """Put a checkpoint into the folder; a packed one, too, where its zeros or bits allow a smaller file."""
    plain, packed = folder / "recommended.ckpt", folder / "recommended.ckpt.gz"
    shutil.copyfile(saved, plain)
    if found.row.level not in _PACKED:
        return [plain]
    with plain.open("rb") as source, gzip.open(packed, "wb") as target:
        shutil.copyfileobj(source, target)
    return [plain, packed]


def _recommendation(found: Summary, full: Summary, within: str, monitor: str, files: list[Path], kind: str) -> str:
    row, share = found.row, found.row.num_bytes / full.row.num_bytes
    sizes = ", ".join(f"{file} ({file.stat().st_size:,} bytes on disk)" for file in files)
    how = f"load_compressed({str(files[-1])!r}, {kind}(...))"
    return (
        f"Recommended: {row.name}: {monitor} {row.score:.4g} (full {full.row.score:.4g}, {within}) in"
        f" {row.num_bytes:,.0f} bytes, {share:.3f} of the full network's.\nSaved: {sizes}.\nLoad it by `from"
        f" lightning_continual.comparison import load_compressed` and `{how}`, the module made with its arguments of"
        " now."
    )


def _read(path: Path) -> dict[str, Any]:
    data = io.BytesIO(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    try:
        return _loaded(data)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error):
            raise
    with warnings.catch_warnings():
        require("torchao.quantization", "prune")  # which makes its tensors known
    data.seek(0)
    return _loaded(data)


def _loaded(data: io.BytesIO) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(data, map_location="cpu", weights_only=True)
    return loaded
