"""What bandit selection costs, and what it saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from lightning_continual import BanditSelectionCallback
from lightning_continual.bandits import EpsilonGreedy

pytestmark = pytest.mark.benchmark


class Network(nn.Module):
    """As much of a LightningModule as the hooks ask for."""

    device = torch.device("cpu")
    automatic_optimization = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


def trainer_of(module: nn.Module, batch_size: int, *optimizers: torch.optim.Optimizer) -> Any:
    from contextlib import nullcontext

    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)), _should_accumulate=lambda: False
    )
    return SimpleNamespace(
        training=True,
        fit_loop=loop,
        world_size=1,
        loggers=[],
        optimizers=list(optimizers),
        train_dataloader=SimpleNamespace(batch_size=batch_size, sampler=None),
        strategy=SimpleNamespace(),
        lightning_module=module,
        precision_plugin=SimpleNamespace(train_step_context=nullcontext),
    )


def resnet() -> Network:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return Network(torchvision.models.resnet18(num_classes=10))


def from_the_head(num_arms: int) -> EpsilonGreedy:
    """A policy that plays arms from the head downwards."""
    policy = EpsilonGreedy(num_arms, epsilon=0.0)
    policy.update(torch.arange(num_arms), torch.linspace(0, 1, num_arms), torch.ones(num_arms))
    return policy


def step(model: Network, optimizer: Any, batch: Any, weights: Any = None, trainer: Any = None) -> None:
    if weights is not None:
        weights.before_batch(trainer, model, 0)
    optimizer.zero_grad()
    model.training_step(batch, 0).backward()
    if weights is not None:
        weights.before_step(trainer, model, optimizer)
    optimizer.step()
    if weights is not None:
        weights.after_batch()


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def prepared(model: Network, optimizer: torch.optim.Optimizer, policy: Any, every: int) -> tuple[Any, Any]:
    bandit = BanditSelectionCallback("weights", policy=policy, budget=0.3, every=every)
    trainer, weights = trainer_of(model, 32, optimizer), bandit.weights
    assert weights is not None
    weights.start_task(trainer, model, 0)  # type: ignore[arg-type]
    return trainer, weights


def test_weights_that_rest_near_the_input_save_a_part_of_the_step() -> None:
    model = resnet()
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer, weights = prepared(model, optimizer, from_the_head, every=10**6)
    times: dict[str, list[float]] = {"full": [], "played": []}
    runs = {
        "full": partial(step, model, optimizer, batch),
        "played": partial(step, model, optimizer, batch, weights, trainer),
    }
    for run in runs.values():
        run()
    for _ in range(7):
        for name, run in runs.items():
            times[name].append(Timer("run()", globals={"run": run}, num_threads=1).timeit(1).median)
    full, played = (min(times[name]) for name in ("full", "played"))  # a busy neighbour only adds to a time
    operations = {name: flops(run) for name, run in runs.items()}
    print(
        f"near the head: {played / full:.2f} of the step, {operations['played'] / operations['full']:.2f} of its FLOPs"
    )
    assert played <= 0.8 * full


def test_what_a_bandit_plays_over_a_run_is_told() -> None:
    model = resnet()
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer, weights = prepared(model, optimizer, "exp3", every=2)
    full, played = [], []
    whole = partial(step, model, optimizer, batch)
    whole()
    for _ in range(12):
        start = perf_counter()
        whole()
        full.append(perf_counter() - start)
        start = perf_counter()
        for _ in range(2):
            step(model, optimizer, batch, weights, trainer)
        played.append((perf_counter() - start) / 2)
    shares = [flops(partial(step, model, optimizer, batch, weights, trainer)) / flops(whole) for _ in range(6)]
    ratio = statistics.mean(played) / statistics.mean(full)
    print(f"mean over 12 plays: {ratio:.2f} of the step; {statistics.mean(shares):.2f} of its FLOPs")
    assert ratio <= 1.05


def cnn() -> Network:
    return Network(
        nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 10)),
        )
    )


def mlp() -> Network:
    return Network(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    )


@pytest.mark.parametrize(("network", "most"), [(cnn, 0.03), (mlp, 0.35)], ids=["cnn", "mlp"])
def test_selecting_samples_costs_little_and_half_of_them_saves_as_much(network: Any, most: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bandit = BanditSelectionCallback("samples", budget=0.5)
    trainer, samples = trainer_of(model, 64), bandit.samples
    assert samples is not None
    x, y = torch.randn(4000, 1, 28, 28), torch.arange(4000) % 10
    samples.memory.add([x, y], task=0, labels=samples.grouping.table.numbers(0, y))
    samples._task = 1
    new = torch.randn(64, 1, 28, 28), torch.randint(10, 20, (64,)) % 10
    select = partial(samples.select, trainer, model, new, everything=False)
    half = select()
    assert len(half[0]) == 32

    def own() -> None:
        """Everything but the measurement of rewards, in the first epoch of a task."""
        batch = select()
        samples.after_step(trainer, model, batch, 0)  # type: ignore[arg-type]

    def measured() -> None:
        batch = select()
        samples._steps = 0
        samples.before_step(trainer, model, batch)  # type: ignore[arg-type]
        samples.after_step(trainer, model, batch, 0)  # type: ignore[arg-type]

    runs = {
        "own": own,
        "measured": measured,
        "full": partial(step, model, optimizer, new),
        "half": partial(step, model, optimizer, half),
    }
    times = {
        name: Timer("run()", globals={"run": run}, num_threads=1).blocked_autorange(min_run_time=1).median
        for name, run in runs.items()
    }
    every = samples.measure_every
    rewards = (times["measured"] - times["own"]) / every
    epoch = (times["half"] + times["own"] + rewards) / times["full"]
    print(
        f"selection {times['own'] * 1e6:.0f} µs, rewards {rewards * 1e6:.0f} µs a step (every {every}), "
        f"step {times['full'] * 1e3:.2f} ms: {times['own'] / times['full']:.3f} + {rewards / times['full']:.3f}; "
        f"an epoch of half the samples takes {epoch:.2f} of the full one"
    )
    assert times["own"] + rewards <= most * times["full"]
    if network is cnn:
        assert epoch <= 0.6
