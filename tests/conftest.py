"""What tests share: a small stream, a small module, a quiet Trainer, runs of two processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_continual.data import ContinualDataModule
from lightning_continual.tasks import Task

torch.set_num_threads(1)


class Classifier(L.LightningModule):
    """A module as users write them: nothing in it knows of this package."""

    def __init__(self, dropout: float = 0.2, schedule: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 6))
        self.schedule = schedule
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if not self.schedule:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_tasks(num_samples: Sequence[int] = (24, 24, 24), *, val: bool = True, test: bool = True) -> list[Task]:
    """Tasks of two classes each; the first feature of a sample is its number in the stream."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for task, number in enumerate(num_samples):
        parts = []
        for _ in range(3):
            y = torch.arange(number) % 2 + 2 * task
            x = torch.randn(number, 4, generator=generator) + y[:, None]
            x[:, 0] = torch.arange(number) + 1000 * task
            parts.append(TensorDataset(x / torch.tensor([1000.0, 1, 1, 1]), y))
        tasks.append(
            Task(parts[0], parts[1] if val else None, parts[2] if test else None, classes=(2 * task, 2 * task + 1))
        )
    return tasks


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks()


@pytest.fixture
def data(tasks: list[Task]) -> ContinualDataModule:
    return ContinualDataModule(tasks, batch_size=4)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Make a Trainer that writes nothing and says nothing, unless told to."""

    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": -1,
            "default_root_dir": str(tmp_path),
        }
        return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip where it is not given."""
    folder = os.environ.get("LIGHTNING_CONTINUAL_DATA")
    if not folder:
        pytest.skip("real data: set LIGHTNING_CONTINUAL_DATA to a folder with MNIST/raw, FashionMNIST/raw, ...")
    return Path(folder)
