"""What an update costs, against training from scratch on everything seen."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import lightning.pytorch as L
from torch.utils.flop_counter import FlopCounterMode

from lightning_continual import _batch, _host
from lightning_continual.stream import ContinualCallback


class CostCallback(ContinualCallback):
    r"""Counts what each task costs: samples, seconds, floating point operations.

    A sample counts each time it is trained, an exemplar of a past task like a new one. Seconds are those of training,
    from batch to batch, without validation and boundaries. FLOPs are what ``torch.utils.flop_counter`` counts (matrix
    products, convolutions, attention; two for a multiplication and addition) in the first step of the task, forward
    and backward, times samples.

    Training from scratch would train everything seen so far for as many epochs as this task had, so that after task t

    .. math:: \text{ratio} = \frac{n_t}{E_t \sum_{s \le t} N_s}

    with :math:`n_t` the samples trained in task t, :math:`E_t` its epochs, and :math:`N_s` the size of the training set
    of task s. Its samples, seconds and FLOPs are those of this task, divided by the ratio.

    To every logger go ``cost/samples``, ``cost/seconds``, ``cost/flops`` and ``cost/ratio`` after each task, and the
    first three of training from scratch, ``cost/scratch_samples`` and so on. They are printed when the fit ends.

    Args:
        verbose: Whether to print a table when the fit ends.

    Example:
        >>> CostCallback().total()
        {'samples': 0.0, 'seconds': 0.0, 'flops': 0.0}

    References:
        - Harang & Sanders. *Catastrophic Forgetting in the Context of Model Updates.* arXiv 2306.10181, 2023.
    """

    def __init__(self, *, verbose: bool = True) -> None:
        super().__init__()
        self.verbose = verbose
        self.tasks: list[dict[str, float]] = []
        """For each task ended ``samples``, ``seconds``, ``flops``, the same of training from scratch
        (``scratch_samples``, ...), ``size`` (of its training set) and ``ratio``."""
        self._now = {"samples": 0.0, "seconds": 0.0, "flops_per_sample": 0.0, "epochs_before": 0.0}
        self._since: float | None = None  # the clock's last reading; None where it stands
        self._counter: FlopCounterMode | None = None
        self._counting = ExitStack()

    def total(self) -> dict[str, float]:
        """Return samples, seconds and FLOPs of all tasks that have ended."""
        return {name: float(sum(task[name] for task in self.tasks)) for name in ("samples", "seconds", "flops")}

    # --- Counting -----------------------------------------------------------------------------------------------------

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Count from zero."""
        epochs = float(_host.epochs_processed(trainer))
        self._now = {"samples": 0.0, "seconds": 0.0, "flops_per_sample": 0.0, "epochs_before": epochs}
        self._since = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock where it stands, and count the operations of the task's first step."""
        self._since = self._since or perf_counter()
        if self._now["flops_per_sample"] == 0 and not _host.is_compiled(pl_module):
            self._counter = self._counting.enter_context(FlopCounterMode(display=False))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples trained."""
        num_samples = _batch.size(batch)
        if self._counter is not None:
            self._counting.close()
            self._now["flops_per_sample"] = self._counter.get_total_flops() / num_samples
            self._counter = None
        now = perf_counter()
        assert self._since is not None
        self._now["samples"] += num_samples * trainer.world_size
        self._now["seconds"] += now - self._since
        self._since = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._since = None

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Sum up the task, and log."""
        samples = self._now["samples"]
        epochs = _host.epochs_processed(trainer) - self._now["epochs_before"]
        size = samples / epochs if (known := _host.num_train_samples(trainer)) is None else float(known)
        seen = size + sum(one["size"] for one in self.tasks)
        ratio = samples / (epochs * seen)
        flops = self._now["flops_per_sample"] * samples
        cost = {"samples": samples, "seconds": self._now["seconds"], "flops": flops}
        scratch = {f"scratch_{name}": value / ratio for name, value in cost.items()}
        summary = {**cost, **scratch, "size": size, "ratio": ratio}
        self.tasks.append(summary)
        for logger in trainer.loggers:
            metrics = {f"cost/{name}": value for name, value in summary.items() if name != "size"}
            logger.log_metrics(metrics, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what the tasks cost."""
        super().on_fit_end(trainer, pl_module)
        if self.verbose and self._has_trained and trainer.is_global_zero and self.tasks:
            sys.stdout.write(self.table() + "\n")

    def _leave(self) -> None:
        self._counting.close()
        self._counter = None
        super()._leave()

    def table(self) -> str:
        """Return what each task and the whole stream cost, and beside it what training from scratch would have."""
        columns = "samples", "seconds", "flops", "scratch_samples", "scratch_seconds", "scratch_flops"
        total = {name: sum(task[name] for task in self.tasks) for name in columns}
        total["ratio"] = total["samples"] / total["scratch_samples"]
        heads = f"{'samples':>12} {'seconds':>10} {'GFLOPs':>12}"
        lines = [f"{'':>5} {'this':>12} {'from scratch':>36}", f"{'task':>5} {heads} {heads} {'ratio':>7}"]
        for name, task in [*((str(number), task) for number, task in enumerate(self.tasks)), ("all", total)]:
            cells = f"{name:>5}"
            for prefix in ("", "scratch_"):
                flops = f"{task[f'{prefix}flops'] / 1e9:,.1f}" if task[f"{prefix}flops"] else "-"
                cells += f" {task[f'{prefix}samples']:>12,.0f} {task[f'{prefix}seconds']:>10.1f} {flops:>12}"
            lines.append(f"{cells} {task['ratio']:>7.3f}")
        return "\n".join(lines)

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {**super().state_dict(), "tasks": [dict(task) for task in self.tasks], "now": dict(self._now)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the counts."""
        super().load_state_dict(state_dict)
        self.tasks = [dict(task) for task in state_dict["tasks"]]
        self._now = dict(state_dict["now"])
