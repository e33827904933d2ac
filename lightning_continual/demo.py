"""The demo: a network forgets handwritten digits, and rehearsal prevents it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, TensorDataset
from tqdm.auto import tqdm

from lightning_continual._extras import require
from lightning_continual.callbacks import AccuracyMatrixCallback, CostCallback, EWCCallback, RehearsalCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.metrics import average_accuracy, forgetting
from lightning_continual.report import matrix_figure
from lightning_continual.stream import TaskStream
from lightning_continual.tasks import Task, split_by_class

FROM_SCRATCH = "from scratch"
METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "fine-tuning": list,
    "EWC": lambda: [EWCCallback(strength=1000.0)],
    "rehearsal": lambda: [RehearsalCallback(memory=200)],
    "rehearsal + EWC": lambda: [RehearsalCallback(memory=200), EWCCallback(strength=10.0)],
    FROM_SCRATCH: lambda: [_NewWeights()],
}
"""The methods that the demo compares, by name: what they add to a Trainer."""


class DigitsClassifier(L.LightningModule):
    """A small network for 8×8 digits, as one writes it without this package.

    Args:
        hidden: Units of the hidden layer.
        lr: Learning rate of Adam.

    Example:
        >>> DigitsClassifier()(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, hidden: int = 200, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of images ``(B, 64)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        x, y = batch
        self.log("val_acc", (self(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class DigitsDataModule(ContinualDataModule):
    """The 1,797 handwritten digits that scikit-learn ships, as a stream of tasks of different digits.

    A fifth of the images are test data, the same in every stream.

    Args:
        num_tasks: Number of tasks; it divides 10.
        batch_size: Samples of one batch.
        seed: Determines the order of the training data.

    Example:
        >>> data = DigitsDataModule()
        >>> data.num_tasks, data.tasks[1].classes
        (5, (2, 3))
    """

    def __init__(self, num_tasks: int = 5, batch_size: int = 32, seed: int = 0) -> None:
        train, test = digits()
        super().__init__(split_by_class(train, test, num_tasks=num_tasks), batch_size, seed=seed)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return training and test data of handwritten digits; needs scikit-learn, and no network.

    Returns:
        Images ``(64,)`` in [0, 1] with their labels: 1,437 for training and 360 for testing.

    Example:
        >>> train, test = digits()
        >>> len(train), len(test)
        (1437, 360)
    """
    require("sklearn", "demo")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    is_test = torch.arange(len(x)) % 5 == 0
    return TensorDataset(x[~is_test], y[~is_test]), TensorDataset(x[is_test], y[is_test])


def run_demo(folder: Path, *, num_seeds: int = 3, resume: bool = False) -> str:
    """Train every method with every seed, and return a table of what came out.

    Args:
        folder: Where results, checkpoints and the picture of the matrices go.
        num_seeds: Seeds, 0, 1, ...; the table shows means and, after ±, standard deviations over them.
        resume: Whether to go on with what an interrupted demo has left in the folder. Otherwise its runs begin anew.

    Returns:
        The table, and where the files lie.

    Raises:
        ImportError: If scikit-learn or matplotlib is not installed.
        ValueError: If ``num_seeds`` is less than 1.
    """
    if num_seeds < 1:
        raise ValueError(f"`num_seeds` must be at least 1, but got {num_seeds}.")
    require("sklearn", "demo")
    require("matplotlib", "demo")
    runs = folder / "runs"
    if runs.exists() and not resume:
        shutil.rmtree(runs)
    runs.mkdir(parents=True, exist_ok=True)
    jobs = [(method, seed) for method in METHODS for seed in range(num_seeds)]
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    num_tasks = DigitsDataModule().num_tasks
    with _quiet(), tqdm(total=len(jobs) * num_tasks, unit="task", dynamic_ncols=True, file=sys.stderr) as bar:
        for method, seed in jobs:
            bar.set_description(f"{method}, seed {seed}")
            results[method].append(_run(runs / f"{method}-{seed}", method, seed, bar))
            bar.n = num_tasks * sum(map(len, results.values()))
            bar.refresh()
    picture = folder / "matrices.png"
    _draw(results, picture)
    return f"{_table(results)}\n\nMatrices: {picture}\nResults:  {runs}"


class _NewWeights(L.Callback):
    """Begins every task with new weights."""

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        for module in pl_module.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


class _Progress(L.Callback):
    """Moves the demo's bar by one a task."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.bar.update(1)


def _run(folder: Path, method: str, seed: int, bar: Any) -> dict[str, Any]:
    """Train one method with one seed, or go on with it, or read what it gave."""
    done, last = folder / "result.json", folder / "last.ckpt"
    if done.exists():
        loaded: dict[str, Any] = json.loads(done.read_text())
        return loaded
    L.seed_everything(seed, verbose=False)
    matrix, cost = AccuracyMatrixCallback(verbose=False, baseline=False), CostCallback(verbose=False)
    checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the stream decides
        callbacks=[TaskStream(epochs_per_task=10), *METHODS[method](), matrix, cost, _Progress(bar), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: ContinualDataModule = DigitsDataModule(seed=seed)
    if method == FROM_SCRATCH:
        seen = [data.tasks[: task + 1] for task in range(data.num_tasks)]
        tasks = [Task(ConcatDataset([one.train for one in past]), test=past[-1].test) for past in seen]
        data = ContinualDataModule(tasks, data.batch_size, seed=seed)
    ckpt_path = str(last) if last.exists() else None
    trainer.fit(DigitsClassifier(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    R = matrix.matrix.compute()
    result = {
        "accuracy": average_accuracy(R).item(),
        "forgetting": forgetting(R).item(),
        **cost.total(),
        "matrix": R.tolist(),
    }
    # In one step, so that an interrupted demo finds a whole result or none.
    whole = done.with_suffix(".new")
    whole.write_text(json.dumps(result))
    os.replace(whole, done)
    return result


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return means over seeds; samples and seconds are those of the whole stream."""
    lines = [
        f"{'':<16} {'accuracy, %':>14} {'forgetting, %':>14} {'samples':>9} {'of from scratch':>16} {'seconds':>8}"
    ]
    scratch = statistics.mean(run["samples"] for run in results[FROM_SCRATCH])
    for method, runs in results.items():
        accuracy, forgotten = (_mean([100 * run[name] for run in runs]) for name in ("accuracy", "forgetting"))
        samples, seconds = (statistics.mean(run[name] for run in runs) for name in ("samples", "seconds"))
        share = samples / scratch
        lines.append(f"{method:<16} {accuracy:>14} {forgotten:>14} {samples:>9,.0f} {share:>16.2f} {seconds:>8.1f}")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def _draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * 3, 4.4 * 2), layout="constrained")
    *axes, last = figure.subplots(2, 3).flat
    last.set_axis_off()
    for ax, (method, runs) in zip(axes, results.items(), strict=True):
        R = torch.tensor([run["matrix"] for run in runs]).mean(dim=0)
        matrix_figure(R, title=method, ax=ax)
    figure.savefig(path, dpi=150)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning tells about devices and loaders, and use one thread: a small network is slower on more."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
