"""What the engine adds to a step, and scoring to validation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_continual.callbacks import AccuracyMatrixCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.stream import TaskStream
from lightning_continual.tasks import Task

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore::UserWarning")]


class Network(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Steps(L.Callback):
    """Times from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_train_epoch_start(self, *args: Any) -> None:
        self.last = None

    def on_train_batch_end(self, *args: Any) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def dataset(num_samples: int) -> TensorDataset:
    return TensorDataset(torch.randn(num_samples, 784), torch.randint(10, (num_samples,)))


def test_a_step_in_a_stream_costs_what_a_bare_step_costs(trainer: Callable[..., L.Trainer]) -> None:
    sets = [dataset(25_600) for _ in range(2)]

    def bare(steps: Steps) -> None:
        loaders = DataLoader(torch.utils.data.ConcatDataset(sets), batch_size=128, shuffle=True)
        trainer(steps, max_epochs=1).fit(Network(), loaders)

    def stream(steps: Steps) -> None:
        data = ContinualDataModule([Task(one) for one in sets], batch_size=128)
        trainer(TaskStream(), steps).fit(Network(), datamodule=data)

    medians: dict[str, list[float]] = {"bare": [], "stream": []}
    for _ in range(5):  # in turn, for the machine's speed drifts
        for name, run in (("bare", bare), ("stream", stream)):
            steps = Steps()
            run(steps)
            medians[name].append(statistics.median(steps.seconds))
    ratio = statistics.median(one / two for one, two in zip(medians["stream"], medians["bare"], strict=True))
    print(f"step {statistics.median(medians['bare']) * 1e6:.0f} µs, ratio {ratio:.3f}")
    assert ratio <= 1.03


def test_scoring_costs_what_validation_costs(trainer: Callable[..., L.Trainer]) -> None:
    sets = [dataset(12_800) for _ in range(4)]
    matrix, validator, other = AccuracyMatrixCallback(baseline=False, verbose=False), trainer(), Network()
    loaders = [DataLoader(one, batch_size=128) for one in sets]
    seconds: dict[str, list[float]] = {"scoring": [], "validation": []}

    class Score(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            def validate() -> None:
                for loader in loaders:
                    validator.validate(other, loader, verbose=False)

            runs = {"scoring": lambda: matrix._score_row(trainer, 0), "validation": validate}
            for _ in range(7):  # in turn, for the machine's speed drifts
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)

    data = ContinualDataModule([Task(dataset(128), test=one) for one in sets], batch_size=128)
    trainer(TaskStream(), Score(), matrix).fit(Network(), datamodule=data)
    ratio = statistics.median(one / two for one, two in zip(seconds["scoring"], seconds["validation"], strict=True))
    print(f"validation {statistics.median(seconds['validation']) * 1e3:.0f} ms, ratio {ratio:.3f}")
    assert ratio <= 1.1
