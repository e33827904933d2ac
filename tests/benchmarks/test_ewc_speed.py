"""What EWC adds to a step, however many tasks it holds, and beside another library's penalty in the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timing import seconds
from torch import nn

from lightning_continual.callbacks import EWCCallback
from lightning_continual.constraints import QuadraticPenalty

pytestmark = pytest.mark.benchmark


@pytest.fixture
def model() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.resnet18()  # 11 M weights
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return network


def hook_of(model: nn.Module, num_tasks: int) -> Callable[[], Any]:
    """Return the hook as the Trainer calls it, on a model that has seen so many tasks."""
    ewc = EWCCallback(1e-6)
    for _ in range(num_tasks):
        anchor = {name: p + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
        precision = {name: torch.rand_like(p) for name, p in model.named_parameters()}
        ewc.penalty = ewc.penalty + QuadraticPenalty.around(anchor, precision)
    trainer: Any = SimpleNamespace(precision_plugin=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: ewc.on_before_optimizer_step(trainer, model, optimizer)  # type: ignore[arg-type]


def test_twenty_tasks_cost_what_one_costs(model: nn.Module) -> None:
    times = seconds({"one": hook_of(model, 1), "twenty": hook_of(model, 20)}, repeats=60)
    ratio = times["twenty"] / times["one"]
    print(f"1 task {times['one'] * 1e3:.1f} ms, 20 tasks {times['twenty'] * 1e3:.1f} ms, ratio {ratio:.2f}")
    assert ratio <= 1.1


@pytest.mark.filterwarnings("ignore")  # of another library
def test_at_ten_tasks_it_is_twenty_times_as_fast_as_avalanche(model: nn.Module) -> None:
    avalanche = pytest.importorskip("avalanche.training.plugins.ewc")
    data = pytest.importorskip("avalanche.training.utils").ParamData
    num_tasks = 10
    plugin, other = avalanche.EWCPlugin(ewc_lambda=1e-6), copy.deepcopy(model)
    for task in range(num_tasks):
        for name, p in other.named_parameters():
            saved, importance = p.detach() + 0.01 * torch.randn_like(p), torch.rand_like(p)
            plugin.saved_params[task][name] = data(name, p.shape, init_tensor=saved, device="cpu")
            plugin.importances[task][name] = data(name, p.shape, init_tensor=importance, device="cpu")
    clock = SimpleNamespace(train_exp_counter=num_tasks)
    strategy = SimpleNamespace(clock=clock, model=other, device=torch.device("cpu"))

    def theirs() -> None:  # the penalty's part of a step: forward and backward
        strategy.loss = torch.zeros(())
        plugin.before_backward(strategy)
        strategy.loss.backward()

    times = seconds({"ours": hook_of(model, num_tasks), "theirs": theirs}, repeats=15)
    ratio = times["theirs"] / times["ours"]
    print(f"ours {times['ours'] * 1e3:.1f} ms, avalanche {times['theirs'] * 1e3:.1f} ms, ratio {ratio:.1f}")
    assert ratio >= 20
