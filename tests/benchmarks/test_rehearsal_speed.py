"""What rehearsal adds to the training step that it joins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_continual.callbacks import RehearsalCallback

pytestmark = pytest.mark.benchmark


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 10),
    )


@pytest.mark.parametrize(("network", "most"), [(mlp, 0.08), (cnn, 0.02)], ids=["mlp", "cnn"])
def test_the_hook_costs_little_beside_the_step(network: Any, most: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    rehearsal = RehearsalCallback(memory=2000)
    rehearsal.memory.add([torch.randn(20_000, 1, 28, 28), torch.randint(10, (20_000,))], task=0)
    rehearsal._task = 1
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    trainer: Any = SimpleNamespace(
        training=True, fit_loop=SimpleNamespace(epoch_progress=progress), train_dataloader=None, world_size=1
    )

    def hook() -> Any:  # both of its hooks, in the first epoch of a task
        joined = rehearsal._join_past(trainer, lambda batch, _: batch, batch, 0)
        rehearsal.on_train_batch_end(trainer, None, None, joined, 0)  # type: ignore[arg-type]
        return joined

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    x, y = hook()
    assert len(x) == 128
    costs = [
        Timer(statement, globals={"hook": hook, "step": step, "x": x, "y": y}).blocked_autorange(min_run_time=2).median
        for statement in ("hook()", "step(x, y)")
    ]
    print(f"hook {costs[0] * 1e6:.0f} µs, step {costs[1] * 1e6:.0f} µs, ratio {costs[0] / costs[1]:.3f}")
    assert costs[0] <= most * costs[1]
