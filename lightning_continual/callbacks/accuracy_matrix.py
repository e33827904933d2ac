"""The accuracy matrix: every task scored after training on every task."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as L
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_continual import _host
from lightning_continual._host.heads import require_task_heads
from lightning_continual._host.validation import warn_of_direction
from lightning_continual.data import ContinualDataModule
from lightning_continual.metrics import AccuracyMatrix
from lightning_continual.report import matrix_figure, print_matrix
from lightning_continual.stream import ContinualCallback


class AccuracyMatrixCallback(ContinualCallback):
    r"""Scores every task after each task, by the module's own ``validation_step``.

    .. math:: R_{ij} = \text{score on task } j \text{ after training through task } i

    The score is what ``trainer.validate`` with the same ``limit_val_batches`` would log under ``monitor`` for the data
    of the task, to all digits and over all processes, whether the module expects one loader or several, and without a
    trace: modes, gradients, random state, metrics and what is logged in the fit stay as they were. Every `TaskHead` of
    the module is at the task that is scored.

    To every logger go ``{monitor}/task_{j}`` for each task and the numbers of `AccuracyMatrix.summary`
    (``{monitor}/average_accuracy``, ...); to W&B also a table ``{monitor}/matrix`` and a heat map
    ``{monitor}/matrix_plot``; to TensorBoard the heat map ``{monitor}/matrix``. When the fit ends, the matrix is
    printed.

    Args:
        monitor: The key under which ``validation_step`` (or ``on_validation_epoch_end``) logs the score.
        split: The tasks' ``"test"`` or ``"val"`` data; by default ``"test"`` where all tasks have it, else ``"val"``.
        loaders: Without a `ContinualDataModule`, one evaluation loader a task (or period), with those of later tasks
            or not. The list may grow between fits.
        baseline: Whether to score the untrained model too, which forward transfer needs.
        higher_is_better: False where ``monitor`` is a loss or an error.
        verbose: Whether to print the matrix when the fit ends.

    Raises:
        MisconfigurationException: Before training: if there is nothing to score on; if a `TaskHead` serves fewer
            tasks; if ``monitor`` is not logged (the error lists what is).

    Example:
        >>> AccuracyMatrixCallback("val_loss", higher_is_better=False).state_key
        "AccuracyMatrixCallback{'monitor': 'val_loss', 'split': None}"

    References:
        - Lopez-Paz & Ranzato. *Gradient Episodic Memory for Continual Learning.* NeurIPS 2017.
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        *,
        split: Literal["test", "val"] | None = None,
        loaders: Sequence[Any] | None = None,
        baseline: bool = True,
        higher_is_better: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if split not in ("test", "val", None):
            raise ValueError(f"`split` must be 'test', 'val' or None, but got {split!r}.")
        if loaders is not None and len(loaders) == 0:
            raise ValueError("`loaders` must hold one evaluation loader a task, but got none.")
        self.monitor = monitor
        self.split = split
        self.loaders = loaders
        self.baseline = baseline
        self.higher_is_better = higher_is_better
        self.verbose = verbose
        # Scores are reduced over processes before they come here: the sums need not be.
        self.matrix = AccuracyMatrix(1, higher_is_better, sync_on_compute=False)

    @property
    def state_key(self) -> str:
        """Tell apart several in one Trainer."""
        return self._generate_state_key(monitor=self.monitor, split=self.split)

    def plot(self, ax: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Draw the matrix; see `AccuracyMatrix.plot`."""
        return self.matrix.plot(ax, **{"label": self.monitor, **kwargs})

    # --- Scoring ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is something to score, and by what."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        warn_of_direction(self)
        if not _host.is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"`AccuracyMatrixCallback` scores by `validation_step`, but {type(pl_module).__name__} has none. Define"
                f" one that logs {self.monitor!r}."
            )
        self._sources(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Try one batch, so that an unknown ``monitor`` is found before training, in whatever task it begins."""
        sources = self._sources(trainer)
        require_task_heads(trainer, len(sources))
        self._score(trainer, sources[:1], "Trying the metric", limit=1)
        super().on_train_start(trainer, pl_module)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Score the untrained model."""
        if task == 0 and self.baseline:
            self._score_row(trainer, -1)

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Score all tasks, and log."""
        self._score_row(trainer, task)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the matrix."""
        super().on_fit_end(trainer, pl_module)
        if self.verbose and self._has_trained and trainer.is_global_zero and self.matrix.update_called:
            print_matrix(self.matrix.compute(), label=self.monitor)

    def _score_row(self, trainer: L.Trainer, trained: int) -> None:
        sources = self._sources(trainer)
        self.matrix.resize(max(len(sources), trained + 1, self.matrix.num_tasks))
        scores = self._score(trainer, sources, "Scoring before training" if trained < 0 else f"Scoring after {trained}")
        self.matrix.clear(trained)
        for tested, score in enumerate(scores):
            self.matrix.update(trained, tested, score)
        if trainer.is_global_zero:
            self._log(trainer, trained, scores)

    def _score(self, trainer: L.Trainer, loaders: list[Any], description: str, limit: int | None = None) -> list[float]:
        limits = [limit or _host.validation_limit(trainer, loader) for loader in loaders]
        lengths = [_host.num_batches(loader) for loader in loaders]
        pairs = zip(lengths, limits, strict=True)
        total = None if None in lengths else sum(min(length, most or length) for length, most in pairs if length)
        scores = []
        with _host.progress(trainer, total, description) as tick:
            for task, (loader, most) in enumerate(zip(loaders, limits, strict=True)):
                logged = _host.score(trainer, loader, limit=most, tick=tick, task=task)
                if self.monitor not in logged:
                    raise MisconfigurationException(
                        f"`AccuracyMatrixCallback(monitor={self.monitor!r})` found no such metric on task {task};"
                        f" `validation_step` logged {sorted(logged)}. Monitor one of these, or log it by `self.log`."
                    )
                scores.append(logged[self.monitor])
        return scores

    def _sources(self, trainer: L.Trainer) -> list[Any]:
        """Return one evaluation loader a task."""
        data = _host.data_module_of(trainer)
        if self.loaders is not None:
            return [_host.prepare_loader(trainer, loader) for loader in self.loaders]
        if not isinstance(data, ContinualDataModule):
            raise MisconfigurationException(
                "`AccuracyMatrixCallback` found no data to score on: the Trainer has no `ContinualDataModule`. Pass"
                " `loaders=`, one evaluation loader a task."
            )
        for split in ("test", "val") if self.split is None else (self.split,):
            loaders = [data.evaluation_dataloader(task, split) for task in range(data.num_tasks)]
            if None not in loaders:
                return loaders
        missing = [task for task, loader in enumerate(loaders) if loader is None]
        raise MisconfigurationException(
            f"Every task must have {split} data to be scored on, but tasks {missing} have none. Pass `test=` to what"
            " makes the stream, or `val_fraction=` to `ContinualDataModule`."
        )

    # --- Logging ----------------------------------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, trained: int, scores: list[float]) -> None:
        metrics = {f"task_{task}": score for task, score in enumerate(scores)}
        if trained >= 0:
            metrics.update(self.matrix.summary())
        step, key = trainer.global_step, f"{self.monitor}/matrix"
        logger: Any
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.monitor}/{name}": value for name, value in metrics.items()}, step)
            if trained < 0:
                continue
            writes_figures = hasattr(logger.experiment, "add_figure")
            if hasattr(logger, "log_table"):
                rows = [[row, *values] for row, values in enumerate(self.matrix.compute().tolist())]
                tasks = [f"task {task}" for task in range(self.matrix.num_tasks)]
                logger.log_table(key, columns=["after task", *tasks], data=rows)
            if not (writes_figures or hasattr(logger, "log_image")):
                continue
            if importlib.util.find_spec("matplotlib") is None:
                rank_zero_warn(
                    f"The heat map {key!r} is not drawn: matplotlib is missing. Install it by"
                    ' `pip install "lightning-continual[plots]"`.'
                )
            elif writes_figures:
                logger.experiment.add_figure(key, self._figure(), step)
            else:
                logger.log_image(f"{key}_plot", [self._figure()])

    def _figure(self) -> Any:
        return matrix_figure(self.matrix.compute(), label=self.monitor)

    # --- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the matrix's sums."""
        return {**super().state_dict(), "matrix": dict(self.matrix.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the matrix."""
        super().load_state_dict(state_dict)
        self.matrix.load_state_dict(state_dict["matrix"])
