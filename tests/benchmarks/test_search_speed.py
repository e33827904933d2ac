"""What a search of shares takes beside its trials: retraining and validation."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_continual import ContinualDataModule, Task, TaskStream
from lightning_continual.callbacks import adaptive_compression
from lightning_continual.callbacks.adaptive_compression import AdaptiveCompressionCallback
from lightning_continual.search import ShareSearch

pytestmark = pytest.mark.benchmark


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).double().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_a_search_takes_no_longer_than_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        monkeypatch.setattr(owner, name, measured)

    warm = ShareSearch([0.0], [0.9], before=1.0)  # the first question loads the optimiser
    warm.tell(warm.ask(), 1.0)
    warm.ask()
    timed(adaptive_compression, "retrain")
    timed(adaptive_compression, "monitored")
    compression = AdaptiveCompressionCallback(1.0, trials=8, monitor="val_acc")
    timed(compression, "_searched")
    tasks = [Task(*(TensorDataset(torch.randn(6000, 4), torch.randint(6, (6000,))) for _ in range(2)))]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[TaskStream(1), compression],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(), datamodule=ContinualDataModule(tasks, batch_size=16))
    retrained = seconds["retrain"] * 8 / 9  # one at the end is not the search's
    assert seconds["_searched"] <= 1.1 * (retrained + seconds["monitored"])
