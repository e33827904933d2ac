"""Task heads inside a Trainer: which task they are at, and what they need of the strategy."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_continual.heads import TaskHead, require_tasks, set_task, task_heads

_before: WeakKeyDictionary[nn.Module, dict[TaskHead, int | None]] = WeakKeyDictionary()


def require_task_heads(trainer: Any, num_tasks: int) -> None:
    """Raise unless the module's task heads serve so many tasks, and the strategy bears that only one is in use."""
    module = trainer.lightning_module
    try:
        require_tasks(module, num_tasks)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    options = getattr(trainer.strategy, "_ddp_kwargs", None)
    waits = options is not None and (not options.get("find_unused_parameters") or options.get("static_graph", False))
    for name, head in task_heads(module).items():
        if waits and head.num_tasks > 1:
            raise MisconfigurationException(
                f"The `TaskHead` {name!r} leaves the parameters of all tasks but one without gradients, for which DDP"
                ' waits. Pass `strategy="ddp_find_unused_parameters_true"` to the Trainer (without a static graph).'
            )


class FollowsLoaders(L.Callback):
    """Where several loaders are evaluated outside a fit, lets task heads be at the task of each loader's number.

    With more loaders than tasks, heads are left alone: those loaders are not one a task.
    """

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Go to the loader's task; in a fit stay at the task in training."""
        if trainer.state.fn != "fit":
            _enter(pl_module, dataloader_idx, len(trainer.num_val_batches))

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Go to the loader's task."""
        _enter(pl_module, dataloader_idx, len(trainer.num_test_batches))

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Go to the loader's task."""
        _enter(pl_module, dataloader_idx, len(trainer.num_predict_batches))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Go back to the task before the evaluation."""
        _leave(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Go back to the task before the evaluation: Lightning does not call `teardown` after an exception."""
        _leave(pl_module)


def _enter(module: nn.Module, loader: int, num_loaders: int) -> None:
    heads = task_heads(module).values()
    if num_loaders < 2 or any(head.num_tasks < num_loaders for head in heads):
        return
    if module not in _before:  # the first of several callbacks
        _before[module] = {head: head.task for head in heads}
    set_task(module, loader)


def _leave(module: nn.Module) -> None:
    for head, task in _before.pop(module, {}).items():
        head.task = task
