"""Modules that are different ones to different tasks, in evaluation outside a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning.pytorch as L
from torch import nn

from lightning_continual._host.heads import FollowsLoaders
from lightning_continual.heads import task_heads


class SeesLoaders(FollowsLoaders, ABC):
    """Where several loaders are evaluated outside a fit, lets a module be what the task of each loader's number sees.

    To be derived before `FollowsLoaders`, whose rule it keeps: with more loaders than tasks of a head, those loaders
    are not one a task. A loader whose task is not learnt sees the module as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sight = ExitStack()
        self._seen: int | None = None

    @property
    @abstractmethod
    def tasks(self) -> list[int]:
        """The tasks learnt, from 0."""

    @abstractmethod
    def as_task(self, model: nn.Module, task: int) -> AbstractContextManager[None]:
        """Let a model be what a task sees."""

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the module be what the loader's task sees; in a fit leave it as it is."""
        if trainer.state.fn != "fit":
            self._see(pl_module, dataloader_idx, len(trainer.num_val_batches))
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the module be what the loader's task sees."""
        self._see(pl_module, dataloader_idx, len(trainer.num_test_batches))
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the module be what the loader's task sees."""
        self._see(pl_module, dataloader_idx, len(trainer.num_predict_batches))
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def _see(self, module: nn.Module, loader: int, num_loaders: int) -> None:
        heads = task_heads(module).values()
        if num_loaders < 2 or loader == self._seen or any(head.num_tasks < num_loaders for head in heads):
            return
        self._look_away()
        self._seen = loader
        if loader in self.tasks:
            self._sight.enter_context(self.as_task(module, loader))

    def _look_away(self) -> None:
        self._sight.close()
        self._seen = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the module be what it was."""
        self._look_away()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let the module be what it was: Lightning does not call `teardown` after an exception."""
        self._look_away()
        super().on_exception(trainer, pl_module, exception)
