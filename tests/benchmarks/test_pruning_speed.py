"""What holding zeros adds to a step, and what a saliency costs beside a loop over samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from timing import seconds
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.constraints import Pin
from lightning_continual.importance import empirical_fisher, gradient_deviation

pytestmark = pytest.mark.benchmark


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet18(num_classes=10)  # 11 M weights
    return network


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class Wrapped(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


# Holding reads and writes each weight once more, where nothing else looks at the gradients: 3 of about 80 passes over
# the weights in a step of 8 small images, with little to compute for each weight, and fewer in one of more to compute.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "ResNet-18, 8 of 3x64x64": (resnet, (8, 3, 64, 64), 15, 0.2),
    "ResNet-18, 64 of 3x64x64": (resnet, (64, 3, 64, 64), 5, 0.03),
    "MLP, 128 of 784": (mlp, (128, 784), 300, 0.2),
    "MLP, 1024 of 784": (mlp, (1024, 784), 60, 0.03),
}


@pytest.mark.parametrize(("make", "shape", "repeats", "limit"), CASES.values(), ids=CASES)
def test_holding_zeros_costs_little_of_a_step(
    make: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int, limit: float
) -> None:
    model = Wrapped(make())
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    pruning = PruningCallback("magnitude", 0.9)
    parameters = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    pruning.pin = Pin.at(parameters, {name: torch.rand_like(p) < 0.9 for name, p in parameters.items()})
    trainer: Any = SimpleNamespace(precision_plugin=None, gradient_clip_val=None, callbacks=[pruning])
    model._trainer = trainer
    idle: Any = torch.optim.SGD(parameters.values(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)  # so that there are gradients to hold
        F.cross_entropy(model.network(x), y).backward()
        optimizer.step()

    def hold() -> None:
        """What the Trainer calls before a step, and what is called after it."""
        pruning.on_before_optimizer_step(trainer, model, idle)
        for hook in list(idle._optimizer_step_post_hooks.values()):
            hook(idle, (), {})

    times = seconds({"step": step, "hold": hold}, repeats)
    share = times["hold"] / times["step"]
    print(f"step {times['step'] * 1e3:.2f} ms, pin {times['hold'] * 1e3:.3f} ms, {share:.1%} of a step")
    assert share <= limit


def by_hessian_importance(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loop over samples in torch-pruning's documentation of `HessianImportance`, and the mean that it means."""
    importance = pytest.importorskip("torch_pruning").importance.HessianImportance()
    importance.zero_grad()
    for loss in F.cross_entropy(model(x), y, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    return {name: importance._accu_grad[p] / importance._counter[p] for name, p in model.named_parameters()}


def by_loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The mean square of the gradient, a sample at a time."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(one[None]), label[None]), list(model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.square() / len(x)
    return total


def test_mean_squares_of_gradients_are_right_and_three_times_faster_than_torch_prunings() -> None:
    model = resnet().eval()
    x, y = torch.randn(64, 3, 64, 64), torch.randint(10, (64,))
    batches = [(x, y)]

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    few, labels = x[:4].double(), y[:4]
    model.double()
    ours, expected = empirical_fisher(model, loss, [(few, labels)]), by_loop(model, few, labels)
    for name, value in expected.items():
        assert_close(ours[name], value)
    theirs = by_hessian_importance(model, few, labels)
    last = by_loop(model, few[-1:], labels[-1:])  # of all samples theirs keeps the last one
    kept = all(bool((theirs[name] - value).norm() <= 1e-6 * value.norm()) for name, value in last.items())
    print(f"torch-pruning's is the square of the last sample's gradient: {kept}")
    model.float()
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: empirical_fisher(model, loss, batches),
        "deviation": lambda: gradient_deviation(model, loss, batches, statistic="rms"),
        "loop": lambda: by_loop(model, x, y),
    }
    times = seconds(runs, repeats=1)
    start = time.perf_counter()
    by_hessian_importance(model, x, y)  # once: half a minute, for each of its backward passes is of the whole batch
    times["torch-pruning"] = time.perf_counter() - start
    ratios = {name: round(times["torch-pruning"] / value, 2) for name, value in times.items()}
    print({name: f"{value:.2f} s" for name, value in times.items()}, "times as fast as torch-pruning:", ratios)
    assert times["ours"] <= times["torch-pruning"] / 3
