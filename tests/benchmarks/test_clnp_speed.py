"""What CLNP adds to a step: L1 and held weights, and the statistics of batch norms that are held."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from timing import seconds
from torch import Tensor, nn

from lightning_continual import capacity
from lightning_continual.callbacks.clnp import CLNPCallback
from lightning_continual.heads import TaskHead, set_task

pytestmark = pytest.mark.benchmark


class Block(nn.Module):
    """The basic block of a ResNet-18."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.short(x), inplace=True)


class Network(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs


def mlp() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU()
    return nn.Sequential(*body, TaskHead(400, 10, num_tasks=2))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), TaskHead(128, 10, num_tasks=2)
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *end)


def clnp_on(model: L.LightningModule, x: Tensor, share: float) -> tuple[CLNPCallback, Any]:
    """Return the callback after a task that needed ``share`` of the units, and a Trainer."""
    callback = CLNPCallback(l1=1e-4)
    trainer: Any = SimpleNamespace(precision_plugin=None, gradient_clip_val=None, callbacks=[callback])
    model._trainer = trainer
    callback._wiring = units = capacity.find_wiring(model, x[:2])
    layers = {name.rpartition(".")[0]: 1e-4 for name in units.rows}
    callback._strengths = capacity.l1_strengths(model, units, layers)
    active = torch.rand(units.num_units) < share
    capacity.cut_(units, dict(model.named_parameters()), active)
    callback.learnt = callback.learnt.aligned_with(units).after(0, units, active, [])
    callback._hold(model)
    return callback, trainer


def norms_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return what runs all batch norms alone, forward and backward, on inputs of the shapes they have in a step."""
    shapes: dict[nn.Module, torch.Size] = {}
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    handles = [
        one.register_forward_pre_hook(lambda layer, args: shapes.update({layer: args[0].shape})) for one in norms
    ]
    model(x)
    for handle in handles:
        handle.remove()
    inputs = [torch.randn(shapes[one], requires_grad=True) for one in norms]
    gradients = [torch.randn(shapes[one]) for one in norms]

    def run() -> None:
        for one, value, gradient in zip(norms, inputs, gradients, strict=True):
            value.grad = None
            one(value).backward(gradient)

    return run


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 2x400, 256": (mlp, (256, 784), 300),
    "ResNet, 32 of 3x32x32": (resnet, (32, 3, 32, 32), 20),
}


# What is held is read, multiplied, added to and written once a step, of about forty passes over the weights in a step.
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5], ids="held={}".format)
@pytest.mark.parametrize(("make", "shape", "repeats"), CASES.values(), ids=CASES)
def test_l1_what_is_held_and_batch_norms_cost_little_of_a_step(
    make: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int, share: float
) -> None:
    bare, model = Network(make()), Network(make())
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    optimizer, moved = (torch.optim.Adam(one.parameters(), lr=1e-4) for one in (bare, model))
    callback, trainer = clnp_on(model, x, share)
    for one in (bare, model):
        set_task(one, 1)
        F.cross_entropy(one(x), y).backward()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(bare(x), y).backward()
        optimizer.step()

    def hook() -> None:
        """What the Trainer calls before a step, and what is called after it."""
        callback.on_before_optimizer_step(trainer, model, moved)
        for function in list(moved._optimizer_step_post_hooks.values()):
            function(moved, (), {})

    runs = {"step": step, "hook": hook, "norms": norms_of(bare, x), "held norms": norms_of(model, x)}
    times = seconds(runs, repeats, of=min)
    of_hook, of_norms = times["hook"] / times["step"], (times["held norms"] - times["norms"]) / times["step"]
    print(f"step {times['step'] * 1e3:.2f} ms, L1 and pin {of_hook:+.1%}, batch norms {of_norms:+.1%} of it")
    assert of_hook + of_norms <= 0.05
