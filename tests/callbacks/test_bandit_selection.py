"""Bandit selection: what rests, what is drawn, what is rewarded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_continual import (
    BanditSelectionCallback,
    ClassBalancedMemory,
    ContinualDataModule,
    EWCCallback,
    RehearsalCallback,
    ReservoirMemory,
    Task,
    TaskStream,
    split_by_class,
)
from lightning_continual.bandits import EpsilonGreedy

Make = Callable[..., L.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Deep(L.LightningModule):
    """Three layers and a head, with batch norms."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU()),
            *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)),
        )
        self.make = make or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training:  # not where a reward is measured
            self.sizes.append(len(batch[0]))
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def loader(num_samples: int = 64, batch_size: int = 8, num_classes: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num_samples) % num_classes
    x = torch.randn(num_samples, 4, generator=generator) + y[:, None]
    return DataLoader(TensorDataset(x, y), batch_size)


class Watch(L.Callback):
    """Keeps weights, buffers and what a step sees, before and after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append(
            {
                "before": copy.deepcopy(pl_module.state_dict()),
                "requires": {name: p.requires_grad for name, p in pl_module.named_parameters()},
                "modes": {name: one.training for name, one in pl_module.named_modules()},
            }
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps[-1]["has_grad"] = {name: p.grad is not None for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps[-1]["after"] = copy.deepcopy(pl_module.state_dict())
        self.steps[-1]["later"] = {name: p.requires_grad for name, p in pl_module.named_parameters()}


class Log(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        self.rows.append(dict(metrics))


def only(*arms: int) -> Callable[[int], EpsilonGreedy]:
    """A policy that plays some arms before others, always."""

    def make(num_arms: int) -> EpsilonGreedy:
        policy = EpsilonGreedy(num_arms, epsilon=0.0)
        rewards = torch.tensor([float(arm in arms) for arm in range(num_arms)])
        policy.update(torch.arange(num_arms), rewards, torch.ones(num_arms))
        return policy

    return make


# --- Weights ----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_what_is_not_played_rests_and_what_is_played_is_trained(trainer: Make, make: Any, options: Any) -> None:
    torch.manual_seed(0)
    module, watch = Deep(make), Watch()
    bandit = BanditSelectionCallback("weights", budget=0.4, every=2)
    trainer(bandit, watch, max_epochs=8, **options).fit(module, loader())
    assert len(watch.steps) == 64
    played_once = set()
    for step in watch.steps:
        moved = {name for name, value in step["after"].items() if not torch.equal(value, step["before"][name])}
        trained = {name for name, requires in step["requires"].items() if requires}
        assert {"net.8.weight", "net.8.bias"} <= trained  # the head
        played_once |= trained
        statistics = {f"{name}.running_mean" for name in ("net.1", "net.4") if step["modes"][name]}
        assert {name for name in moved if name.endswith("running_mean")} == statistics
        parameters = {name for name in moved if name in step["requires"]}
        if "has_grad" in step:
            assert parameters == trained == {name for name, has in step["has_grad"].items() if has}
        else:
            assert not parameters  # the step is yet to come
        assert step["modes"]["net.1"] == step["requires"]["net.0.weight"] == step["requires"]["net.1.weight"]
        assert step["modes"]["net.4"] == step["requires"]["net.3.weight"]
        share = sum(module.get_parameter(name).numel() for name in trained if "net.8" not in name)
        assert share <= 0.4 * sum(p.numel() for name, p in module.named_parameters() if "net.8" not in name)
    assert played_once == {name for name, _ in module.named_parameters()}


def test_between_steps_and_afterwards_the_module_is_as_it_was(trainer: Make) -> None:
    module, watch = Deep(), Watch()
    module.net[3].bias.requires_grad_(False)
    module.net[1].eval()
    trainer(BanditSelectionCallback("weights", budget=0.4, every=4), watch, max_epochs=2).fit(module, loader())
    for step in watch.steps:
        assert step["later"] == {name: name != "net.3.bias" for name, _ in module.named_parameters()}
        assert torch.equal(step["after"]["net.3.bias"], watch.steps[0]["before"]["net.3.bias"])
    assert [name for name, one in module.net.named_modules() if not one.training] == ["1"]


def test_the_backward_pass_ends_at_the_lowest_layer_that_is_played(trainer: Make) -> None:
    class Probed(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.hidden = [self.net[:3](batch[0])]
            self.hidden.append(self.net[3:6](self.hidden[0]))
            self.hidden.append(self.net[6:8](self.hidden[1]))
            return cross_entropy(self.net[8](self.hidden[2]), batch[1])

    module = Probed()
    trainer(BanditSelectionCallback("weights", policy=only(2), budget=0.4), max_epochs=1).fit(module, loader())
    assert [hidden.requires_grad for hidden in module.hidden] == [False, False, True]


def test_the_reward_of_an_arm_is_its_mean_first_order_loss_reduction(trainer: Make) -> None:
    class Gradients(L.Callback):
        def __init__(self) -> None:
            self.sums: list[dict[str, Tensor]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            named = pl_module.named_parameters()
            self.sums.append({name: p.grad.double().square().sum() for name, p in named if p.grad is not None})

    module, gradients = Deep(lambda p: torch.optim.SGD(p, lr=0.05)), Gradients()
    bandit = BanditSelectionCallback("weights", budget=0.4, every=4)
    trainer(bandit, gradients, max_epochs=1).fit(module, loader())
    history = bandit.history()
    assert history["steps"].tolist() == [4]  # the second play is not over
    names = {"net.0": ("net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias")}
    for arm, name in enumerate(bandit.arm_names()):
        members = names.get(name, (f"{name}.weight", f"{name}.bias"))
        size = sum(module.get_parameter(one).numel() for one in members)
        # With plain SGD the change is -lr * g.
        expected = sum(0.05 * step[one] for step in gradients.sums[:4] for one in members if one in step) / (4 * size)
        reward = history["rewards"][0, arm]
        assert bool(history["plays"][0, arm]) == (not bool(reward.isnan()))
        if not reward.isnan():
            assert_close(reward.double(), torch.as_tensor(expected), rtol=1e-5, atol=0)  # summed in single precision


def test_a_higher_reward_makes_an_arm_likelier(trainer: Make) -> None:
    class Steep(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # Only the second layer has a slope to speak of.
            return 1e-4 * super().training_step(batch, batch_idx) + self.net[3].weight.square().mean()

    bandit = BanditSelectionCallback("weights", budget=0.4, every=2)
    trainer(bandit, max_epochs=20).fit(Steep(lambda p: torch.optim.SGD(p, lr=0.05)), loader())
    assert bandit.history()["probabilities"][-1].argmax() == bandit.arm_names().index("net.3")
    assert bandit.history()["probabilities"][-1].max() > 0.5


def test_units_rest_alone(trainer: Make) -> None:
    module, watch = Deep(), Watch()
    bandit = BanditSelectionCallback("weights", arms="units", budget=0.4, every=4)
    trainer(bandit, watch, max_epochs=2).fit(module, loader())
    shares = []
    for step in watch.steps:
        moved = {name: step["after"][name] != step["before"][name] for name in step["requires"]}
        assert bool(moved["net.8.weight"].any())
        rows = moved["net.0.weight"].any(1)
        for name in ("net.0.bias", "net.1.bias"):
            assert not bool((moved[name] & ~rows).any())
        shares.append([bool(row) for name in ("net.0", "net.3", "net.6") for row in moved[f"{name}.weight"].any(1)])
    played = torch.tensor(shares).reshape(4, 4, 24).any(1)
    assert bool((played.sum(1) < 12).all())
    assert bool((played.sum(1) > 4).all())
    assert len({tuple(row) for row in played.tolist()}) == 4


def test_moments_of_what_rests_rest_too_and_the_rest_is_told(trainer: Make) -> None:
    class Moments(L.Callback):
        def __init__(self) -> None:
            self.found: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            state = trainer.optimizers[0].state
            self.found.append(
                {name: state[p]["exp_avg"].clone() for name, p in pl_module.named_parameters() if p in state}
            )

    module, moments, watch = Deep(lambda p: torch.optim.Adam(p, lr=0.01)), Moments(), Watch()
    logger = Log()
    trainer(
        *(BanditSelectionCallback("weights", budget=0.4, every=2), moments, watch),
        max_epochs=4,
        logger=logger,
        log_every_n_steps=1,
    ).fit(module, loader())
    for step, (one, two) in enumerate(zip(moments.found, moments.found[1:], strict=False), 1):
        for name, before in one.items():
            assert torch.equal(before, two[name]) == (not watch.steps[step]["requires"][name]), (step, name)
    rested = [row["bandit/weights/rested"] for row in logger.rows if "bandit/weights/rested" in row]
    assert max(rested) >= 2
    assert all(value % 2 == 0 for value in rested)


def test_patterns_make_arms_and_what_they_do_not_name_is_trained(trainer: Make) -> None:
    module, watch = Deep(), Watch()
    bandit = BanditSelectionCallback("weights", arms={"low": "net.0.*", "high": ["net.6.*"]}, budget=0.7, every=3)
    trainer(bandit, watch, max_epochs=3).fit(module, loader())
    assert bandit.arm_names() == ["low", "high"]
    for step in watch.steps:
        assert step["requires"]["net.3.weight"]
        assert step["requires"]["net.1.weight"]
        assert step["requires"]["net.0.weight"] != step["requires"]["net.6.weight"]


class Keep(L.Callback):
    def __init__(self, path: Path, bandit: BanditSelectionCallback) -> None:
        self.path, self.bandit = path, bandit

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        history = self.bandit.history()
        torch.save({**pl_module.state_dict(), "plays": history["plays"]}, f"{self.path}-{trainer.global_rank}")


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_fork_find_unused_parameters_true"])
def test_two_processes_play_alike_whether_or_not_the_backward_pass_is_cut(
    trainer: Make, tmp_path: Path, strategy: str
) -> None:
    class Norms(Deep):  # of single processes: their statistics differ
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = self.net[4] = nn.Identity()

    found = []
    for devices in (1, 2):
        torch.manual_seed(0)
        bandit = BanditSelectionCallback("weights", budget=0.4, every=2)
        options = {"devices": 2, "strategy": strategy} if devices == 2 else {}
        data = ContinualDataModule(make_tasks((48, 48), val=False), batch_size=8 // devices)
        keep = Keep(tmp_path / str(devices), bandit)
        trainer(bandit, keep, TaskStream(4), precision="64-true", **options).fit(Norms().double(), datamodule=data)
        found += [torch.load(tmp_path / f"{devices}-{rank}") for rank in range(devices)]
    for other in found[1:]:
        assert torch.equal(other["plays"], found[0]["plays"])
        assert_close(other, found[0])
    assert len(found[0]["plays"]) > 10


@pytest.mark.slow
def test_a_compiled_module_is_played_as_any_other(trainer: Make) -> None:
    weights = []
    for compiles in (False, True):
        torch.manual_seed(0)
        torch.compiler.reset()
        module = Deep()
        fitted: Any = torch.compile(module, backend="eager") if compiles else module
        trainer(BanditSelectionCallback("weights", budget=0.4, every=4), max_epochs=3).fit(fitted, loader())
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_step_that_the_scaler_skips_gives_no_reward(trainer: Make) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    bandit = BanditSelectionCallback("weights", budget=0.4, every=2)
    trainer(bandit, max_epochs=4, plugins=plugin).fit(Deep(), loader())
    assert scaler.get_scale() < 2.0**22
    rewards = bandit.history()["rewards"]
    assert bandit.weights is not None
    assert rewards[~rewards.isnan()].isfinite().all()


def test_gradients_that_a_fused_optimizer_unscales_itself_are_rewarded_unscaled(trainer: Make) -> None:
    rewards = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        bandit = BanditSelectionCallback("weights", budget=0.4, every=4)
        module = Deep(lambda p: torch.optim.SGD(p, lr=0.05, fused=True))
        trainer(bandit, max_epochs=1, plugins=plugin).fit(module, loader())
        rewards.append(bandit.history()["rewards"])
    # Gradients in half precision, 1/1024, have other rounding under another scale.
    assert_close(rewards[1].nan_to_num(), rewards[0].nan_to_num(), rtol=0.05, atol=0)


def test_ewc_does_not_move_what_rests(trainer: Make) -> None:
    module, watch = Deep(), Watch()
    ewc, bandit = EWCCallback(1000.0), BanditSelectionCallback("weights", budget=0.4, every=4, first_task=1)
    data = ContinualDataModule(make_tasks((24, 24), val=False), batch_size=8)
    for callbacks in ([ewc, bandit, watch, TaskStream(4)],):
        trainer(*callbacks).fit(module, datamodule=data)
    assert set(ewc.penalty.precision) == {name for name, _ in module.named_parameters()}
    assert all(all(step["requires"].values()) for step in watch.steps[:12])  # the first task is trained whole
    for step in watch.steps[12:]:
        moved = {name for name in step["requires"] if not torch.equal(step["after"][name], step["before"][name])}
        assert moved == {name for name, requires in step["requires"].items() if requires}
        assert len(moved) < len(step["requires"])


# --- Samples ----------------------------------------------------------------------------------------------------------


class Batches(L.Callback):
    def __init__(self) -> None:
        self.found: list[tuple[int, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append((trainer.datamodule.current_task if trainer.datamodule else 0, batch[0].clone()))


def origin(x: Tensor) -> Tensor:
    """The task that each sample of `make_tasks` is of."""
    return (x[:, 0] * 1000).round().long() // 1000


@pytest.mark.parametrize("budget", [0.25, 0.5, 1.0])
def test_a_batch_has_the_slots_of_its_budget_and_no_sample_twice(trainer: Make, budget: float) -> None:
    module, batches = Classifier(dropout=0.0), Batches()
    bandit = BanditSelectionCallback("samples", budget=budget, measure_every=3, memory=24)
    data = ContinualDataModule(make_tasks((32, 32, 32), val=False), batch_size=8)
    trainer(bandit, batches, TaskStream(2)).fit(module, datamodule=data)
    for task, x in batches.found:
        assert len(x) == 8 * budget
        assert len(x.unique(dim=0)) == len(x)
        assert bool((origin(x) <= task).all())
    for task in (1, 2):
        origins = torch.cat([origin(x) for one, x in batches.found if one == task])
        assert set(origins.tolist()) == set(range(task + 1))
    assert bandit.arm_names() == ["0/0", "0/1", "1/2", "1/3", "2/4", "2/5"]


def test_slots_that_an_arm_cannot_fill_go_to_the_others(trainer: Make) -> None:
    batches = Batches()
    bandit = BanditSelectionCallback("samples", budget=0.5, policy=only(0), memory=4)
    data = ContinualDataModule(make_tasks((8, 8), val=False), batch_size=8)
    trainer(bandit, batches, TaskStream(1)).fit(Classifier(), datamodule=data)
    assert [len(x) for _, x in batches.found] == [4, 4]
    # The first class of the first task has two exemplars; what comes next is that task's other class, or a new one.
    assert sorted(origin(batches.found[1][1]).tolist())[:2] == [0, 0]


def test_the_memory_is_grouped_by_arm_and_keeps_only_new_samples_once(trainer: Make) -> None:
    bandit = BanditSelectionCallback("samples", budget=0.5, memory=ClassBalancedMemory(12))
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(bandit, TaskStream(3)).fit(Classifier(), datamodule=data)
    assert bandit.samples is not None
    memory = bandit.samples.memory
    assert memory.num_seen == 64  # once each, selected or not
    assert torch.bincount(memory.labels).tolist() == [3, 3, 3, 3]
    assert memory.tasks.tolist() == [int(arm > 1) for arm in memory.labels]


class Recorded(Classifier):
    """Keeps weights before and after each step, and the batch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.net.append(nn.BatchNorm1d(6))
        self.steps: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before = copy.deepcopy(self.state_dict()), batch

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((*self.before, copy.deepcopy(self.state_dict())))


def loss_with(weights: Any, x: Tensor, y: Tensor) -> Tensor:
    module = Recorded()
    module.load_state_dict(weights)
    return cross_entropy(module.eval()(x), y)


@pytest.mark.parametrize("with_losses", [False, True])
@pytest.mark.parametrize("reward", ["loss_progress", "grad_norm"])
def test_rewards_are_those_of_the_definition(trainer: Make, reward: Any, with_losses: bool) -> None:
    losses = (
        (lambda module, batch: cross_entropy(module(batch[0]), batch[1], reduction="none")) if with_losses else None
    )
    module = Recorded()
    bandit = BanditSelectionCallback("samples", budget=0.5, reward=reward, measure_every=2, losses=losses)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(bandit, TaskStream(1)).fit(module, datamodule=data)
    history = bandit.history()
    assert history["steps"].tolist() == [1, 3, 5, 7]
    for row, (before, (x, y), after) in enumerate(module.steps[::2]):
        for arm in range(history["rewards"].shape[1]):
            own = y == arm  # here classes are arms, in the order of tasks
            found = history["rewards"][row, arm]
            if not own.any():
                assert found.isnan()
                continue
            if reward == "loss_progress":
                expected = loss_with(before, x[own], y[own]) - loss_with(after, x[own], y[own])
            else:
                copied = Recorded()
                copied.load_state_dict(before)
                gradients = torch.autograd.grad(cross_entropy(copied.eval()(x[own]), y[own]), list(copied.parameters()))
                expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)  # differences in single precision


def test_the_loss_of_exemplars_rewards_all_arms_in_the_batch_alike(trainer: Make) -> None:
    bandit = BanditSelectionCallback("samples", budget=0.5, reward="memory_loss", measure_every=1, memory=8)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(bandit, TaskStream(1)).fit(Recorded(), datamodule=data)
    rewards = bandit.history()["rewards"]
    assert bool(rewards[:4].isnan().all())  # nothing is remembered of earlier tasks
    for row in rewards[4:]:
        assert len(row[~row.isnan()].unique()) == 1
    assert bandit.samples is not None
    assert bandit.samples.num_skipped == 0


def test_measuring_leaves_no_trace(trainer: Make) -> None:
    weights = []
    for measure_every in (1, 1000):
        L.seed_everything(1, verbose=False)
        module = Recorded()
        bandit = BanditSelectionCallback("samples", arms="class", memory=0, budget=1.0, measure_every=measure_every)
        trainer(bandit, max_epochs=2).fit(module, loader())
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_weighed_samples_expect_the_mean_of_the_whole_pool(trainer: Make) -> None:
    class Weighed(L.Callback):
        def __init__(self) -> None:
            self.sums: list[Tensor] = []

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if pl_module.net[0].weight.grad is not None:
                self.sums.append(pl_module.net[0].weight.grad.clone())

    def lopsided(num_arms: int) -> EpsilonGreedy:
        policy = EpsilonGreedy(num_arms, epsilon=0.6)
        policy.update(torch.arange(num_arms), torch.arange(num_arms) / num_arms, torch.ones(num_arms))
        return policy

    class Still(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    module, weighed = Still(dropout=0.0), Weighed()
    data = loader(num_samples=30, batch_size=30, num_classes=4)  # 8, 8, 7, 7 of each class
    bandit = BanditSelectionCallback(
        *("samples",),
        policy=lopsided,
        budget=0.2,
        unbiased=True,
        memory=0,
        measure_every=10**6,
        losses=lambda module, batch: cross_entropy(module(batch[0]), batch[1], reduction="none"),
    )
    trainer(bandit, weighed, max_epochs=1500).fit(module, data)
    x, y = data.dataset.tensors  # type: ignore[attr-defined]
    (expected,) = torch.autograd.grad(cross_entropy(module(x), y), [module.net[0].weight])
    found = torch.stack(weighed.sums)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= 5 * error + 1e-6).all())  # five standard errors


def test_rewards_that_are_not_finite_are_skipped_counted_and_told_once(trainer: Make) -> None:
    def losses(module: Any, batch: Any) -> Tensor:
        found = cross_entropy(module(batch[0]), batch[1], reduction="none")
        return torch.where(batch[1] == 1, torch.inf, found)

    bandit = BanditSelectionCallback("samples", budget=1.0, memory=0, measure_every=1, losses=losses)
    with pytest.warns(UserWarning, match="A reward of samples was not finite, and is skipped") as warned:
        trainer(bandit, max_epochs=2).fit(Deep(), loader())
    assert len([one for one in warned if "not finite" in str(one.message)]) == 1
    assert bandit.samples is not None
    assert bandit.samples.num_skipped == 16
    rewards = bandit.history()["rewards"]
    assert bool(rewards[:, 1].isnan().all())
    assert bool(rewards[:, 0].isfinite().all())


def test_an_arm_that_runs_empty_is_not_played(trainer: Make) -> None:
    bandit = BanditSelectionCallback("samples", budget=0.5, policy=only(5), memory=0, measure_every=1)
    module = Deep()
    trainer(bandit, max_epochs=1).fit(module, loader(num_samples=64, batch_size=8))  # not all classes in each batch
    assert module.sizes == [4] * 8
    plays = bandit.history()["plays"]
    assert bool((plays.sum(1) == 4).all())


def test_arms_may_be_clusters_of_features(trainer: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(64) % 3
    x = 0.1 * torch.randn(64, 4, generator=generator) + 10 * groups[:, None]
    batches: list[Any] = []

    class Seen(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches.append(batch[0].mean(1).div(10).round().long())
            return super().training_step(batch, batch_idx)

    bandit = BanditSelectionCallback(
        arms="kmeans", num_clusters=3, memory=0, budget=0.5, policy=only(1), measure_every=10**6
    )
    bandit.samples.budget = 0.25  # type: ignore[union-attr]
    trainer(bandit, max_epochs=1).fit(Seen(), DataLoader(TensorDataset(x, groups), 16))
    assert len(bandit.arm_names()) == 3
    assert len(torch.cat(batches[1:]).unique()) == 1  # one arm is one cluster


def test_features_may_come_from_the_module(trainer: Make) -> None:
    bandit = BanditSelectionCallback(arms="kmeans", num_clusters=2, features=lambda m, batch: m.net[0](batch[0]))
    trainer(bandit, max_epochs=1).fit(Deep(), loader())
    assert len(bandit.arm_names()) == 2
    wrong = BanditSelectionCallback(arms="kmeans", features=lambda m, batch: batch[1])
    with pytest.raises(ValueError, match=r"`features` must return one row a sample, \(8, D\), but got shape \(8,\)"):
        trainer(wrong, max_epochs=1).fit(Deep(), loader())


def test_any_structure_of_batches_is_served(trainer: Make) -> None:
    class Dicts(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert len(batch["name"]) == len(batch["x"])
            return super().training_step((batch["x"], batch["label"]), batch_idx)

    x, y = loader().dataset.tensors  # type: ignore[attr-defined]
    samples = [{"x": one, "label": two, "name": str(int(two))} for one, two in zip(x, y, strict=True)]
    module = Dicts()
    bandit = BanditSelectionCallback("both", budget=(0.5, 0.4), every=2, measure_every=2)
    trainer(bandit, max_epochs=1).fit(module, DataLoader(samples, 8))  # type: ignore[arg-type]
    assert set(bandit.arm_names("samples")) == {f"0/{number}" for number in range(6)}
    assert bandit.arm_names("weights") == ["net.0", "net.3", "net.6"]


def test_manual_optimization_needs_losses(trainer: Make) -> None:
    class Manual(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match="with manual optimization that makes"):
        trainer(BanditSelectionCallback(), max_epochs=1).fit(Manual(), loader())

    def losses(module: Any, batch: Any) -> Tensor:
        return cross_entropy(module.net(batch[0]), batch[1], reduction="none")

    module, watch = Manual(), Watch()
    bandit = BanditSelectionCallback("both", budget=(0.5, 0.4), losses=losses, measure_every=2, every=2)
    trainer(bandit, watch, max_epochs=1).fit(module, loader())
    assert set(module.sizes) == {4}
    for step in watch.steps:
        moved = {name for name in step["requires"] if not torch.equal(step["after"][name], step["before"][name])}
        assert moved == {name for name, requires in step["requires"].items() if requires}
    unbiased = BanditSelectionCallback(losses=losses, unbiased=True)
    with pytest.raises(MisconfigurationException, match="Use automatic optimization, or leave `unbiased` out"):
        trainer(unbiased, max_epochs=1).fit(Manual(), loader())


def test_after_rehearsal_it_selects_from_the_joined_batch(trainer: Make) -> None:
    module, batches = Classifier(dropout=0.0), Batches()
    bandit = BanditSelectionCallback(budget=0.5, memory=0, measure_every=2)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(RehearsalCallback(16, proportion=0.5), bandit, batches, TaskStream(2)).fit(module, datamodule=data)
    assert {len(x) for task, x in batches.found if task == 1} == {8}  # half of 8 new and 8 past samples
    assert set(torch.cat([origin(x) for task, x in batches.found if task == 1]).tolist()) == {0, 1}


def test_before_rehearsal_it_says_that_the_batch_has_changed(trainer: Make) -> None:
    bandit = BanditSelectionCallback(budget=0.5, memory=0, measure_every=1)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    with pytest.raises(ValueError, match="must have the 4 samples that were selected, but has 8"):
        trainer(bandit, RehearsalCallback(16), TaskStream(1)).fit(Classifier(), datamodule=data)


@pytest.mark.parametrize("policy", ["exp3", "exp3s", "exp3m", "ucb", "thompson", "epsilon-greedy"])
def test_every_policy_selects_both(trainer: Make, policy: str) -> None:
    module = Deep()
    bandit = BanditSelectionCallback("both", policy=policy, budget=0.5, every=2, measure_every=2, memory=8)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(bandit, TaskStream(2)).fit(module, datamodule=data)
    for select in ("samples", "weights"):
        history = bandit.history(select)  # type: ignore[arg-type]
        assert len(history["steps"]) > 2
        assert_close(history["probabilities"].nansum(1), torch.ones(len(history["steps"])))


class Decisions(L.Callback):
    def __init__(self, path: Path, bandit: BanditSelectionCallback) -> None:
        self.path, self.bandit = path, bandit

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        history = {**self.bandit.history("samples"), "names": self.bandit.arm_names("samples")}
        torch.save(history, f"{self.path}-{trainer.global_rank}")


def test_two_processes_number_and_value_arms_alike(trainer: Make, tmp_path: Path) -> None:
    bandit = BanditSelectionCallback("both", budget=(0.5, 0.4), every=2, measure_every=2, memory=8)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=4)
    trainer(
        *(bandit, Decisions(tmp_path / "of", bandit), TaskStream(2)),
        devices=2,
        strategy="ddp_fork_find_unused_parameters_true",
    ).fit(Deep(), datamodule=data)
    one, two = (torch.load(tmp_path / f"of-{rank}") for rank in range(2))
    assert one["names"] == two["names"] == ["0/0", "0/1", "1/2", "1/3"]
    for name in ("steps", "probabilities", "plays", "rewards"):
        assert torch.equal(one[name].nan_to_num(), two[name].nan_to_num())
    assert bool((one["plays"].nansum(1) % 4 == 0).all())  # two slots of each process


class Names(L.Callback):
    def __init__(self, path: Path, bandit: BanditSelectionCallback) -> None:
        self.path, self.bandit = path, bandit

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.bandit.arm_names(), f"{self.path}-{trainer.global_rank}")


def test_two_processes_that_see_arms_in_another_order_number_them_alike(trainer: Make, tmp_path: Path) -> None:
    bandit = BanditSelectionCallback(arms=lambda batch: (batch[0][:, 0] * 1000).round().long() % 32, memory=8)
    data = ContinualDataModule(make_tasks((32,), val=False), batch_size=2)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    trainer(bandit, Names(tmp_path / "of", bandit), TaskStream(1), **options).fit(Classifier(), datamodule=data)
    one, two = (torch.load(tmp_path / f"of-{rank}") for rank in range(2))
    assert one == two
    assert sorted(one) == sorted(f"-1/{number}" for number in range(32))


# --- Diagnostics ------------------------------------------------------------------------------------------------------


def test_what_it_does_is_logged_and_drawn(trainer: Make) -> None:
    logger = Log()
    bandit = BanditSelectionCallback("both", budget=(0.5, 0.4), every=2, measure_every=2, memory=8)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    trainer(bandit, TaskStream(2), logger=logger, log_every_n_steps=1).fit(Deep(), datamodule=data)
    logged = {name for row in logger.rows for name in row}
    for name in bandit.arm_names("samples"):
        assert {f"bandit/samples/{what}/{name}" for what in ("probability", "plays", "reward")} <= logged
    for name in bandit.arm_names("weights"):
        assert {f"bandit/weights/{what}/{name}" for what in ("probability", "plays")} <= logged
    assert any(name.startswith("bandit/weights/reward/") for name in logged)  # of what was played
    assert {"bandit/weights/share", "bandit/weights/entropy", "bandit/samples/entropy"} <= logged
    rows = [row for row in logger.rows if "bandit/weights/share" in row]
    assert all(0 < row["bandit/weights/share"] <= 0.4 for row in rows)
    for select in ("samples", "weights"):
        for what in ("probabilities", "plays", "rewards"):
            figure = bandit.plot(select, what=what)  # type: ignore[arg-type]
            labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
            assert labels == bandit.arm_names(select)  # type: ignore[arg-type]


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": "all"}, "`select` must be 'samples', 'weights' or 'both', but got 'all'"),
        ({"policy": "greedy"}, "`policy` must be one of 'exp3', .* but got 'greedy'"),
        ({"reward": "luck"}, r"`reward` must be one of \('loss_progress', .*\), but got 'luck'"),
        ({"budget": 0.0}, r"`budget` must lie in \(0, 1\], but got 0\.0"),
        ({"budget": (0.5, 1.5), "select": "both"}, r"`budget` must lie in \(0, 1\], but got 1\.5"),
        ({"budget": (0.5, 0.1, 0.1)}, "may be pairs, one for samples and one for weights, but got 3 values"),
        ({"every": 0}, "`every` must be at least 1, but got 0"),
        ({"measure_every": 0}, "`measure_every` must be at least 1, but got 0"),
        ({"num_clusters": 0}, "`num_clusters` must be at least 1, but got 0"),
        ({"first_task": -1}, "`first_task` must be at least 0, but got -1"),
        ({"unbiased": True}, "`unbiased=True` weighs the loss of each sample. Pass `losses=`"),
        (
            {"arms": "layers"},
            "`arms` of samples must be 'class', 'kmeans' or a function of the batch, but got 'layers'",
        ),
        ({"select": "weights", "arms": "class"}, "`arms` of weights must be 'layers', 'units' or patterns .* 'class'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BanditSelectionCallback(**arguments)


def test_a_memory_that_does_not_group_is_refused() -> None:
    with pytest.raises(TypeError, match="`memory` must be a number of exemplars or a `ClassBalancedMemory`"):
        BanditSelectionCallback(memory=ReservoirMemory(10))  # type: ignore[arg-type]


def test_a_budget_that_no_arm_fits_is_told_before_training(trainer: Make) -> None:
    module = Deep()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError, match=r"`budget` must leave room for one arm, but the smallest, 'net\.0', has 0\.28"
    ):
        trainer(BanditSelectionCallback("weights", budget=0.2), max_epochs=1).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_arms_that_are_too_large_for_the_budget_are_told(trainer: Make) -> None:
    bandit = BanditSelectionCallback("weights", budget=0.3)
    with pytest.warns(UserWarning, match=r"are never trained, for each is larger than that: \['net.3', 'net.6'\]"):
        trainer(bandit, max_epochs=1).fit(Deep(), loader())


@pytest.mark.parametrize(
    ("arms", "found"),
    [
        (lambda batch: batch[1][:-1], r"torch\.int64 \(7,\)"),
        (lambda batch: batch[0], r"torch\.float32 \(8, 4\)"),
        (lambda batch: [0] * 8, "list"),
    ],
)
def test_a_function_for_arms_of_wrong_length_is_told(trainer: Make, arms: Any, found: str) -> None:
    with pytest.raises(ValueError, match=r"`arms` must return one whole number a sample, \(8,\), but got " + found):
        trainer(BanditSelectionCallback(arms=arms), max_epochs=1).fit(Deep(), loader())


def test_losses_of_wrong_shape_are_told(trainer: Make) -> None:
    bandit = BanditSelectionCallback(losses=lambda module, batch: torch.zeros(()), measure_every=1)
    with pytest.raises(ValueError, match=r"`losses` must return one loss a sample, \(2,\), but got shape \(\)"):
        trainer(bandit, max_epochs=1).fit(Deep(), loader())


def test_labels_that_are_missing_are_told(trainer: Make) -> None:
    bandit = BanditSelectionCallback(label=lambda batch: None)
    with pytest.raises(ValueError, match=r"BanditSelectionCallback\(arms='class'\)` needs labels, one whole number"):
        trainer(bandit, max_epochs=1).fit(Deep(), loader())


def test_a_line_search_is_refused(trainer: Make) -> None:
    module = Deep(lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"))
    with pytest.raises(MisconfigurationException, match="but a line search moves them within one"):
        trainer(BanditSelectionCallback("weights", budget=0.4), max_epochs=1).fit(module, loader())


def test_a_module_of_other_arms_does_not_take_up_the_state(trainer: Make) -> None:
    bandit = BanditSelectionCallback("weights", budget=0.4, every=2)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                self.state = copy.deepcopy(bandit.state_dict())

    stop = Stop()
    trainer(bandit, stop, max_epochs=1).fit(Deep(), loader())
    other = BanditSelectionCallback("weights", arms={"a": "net.0.*", "b": "net.3.*"}, budget=0.7)
    other.load_state_dict(stop.state)
    with pytest.raises(ValueError, match=r"The state knows the arms \['net.0', 'net.3', 'net.6'\], but the module has"):
        trainer(other, max_epochs=1).fit(Deep(), loader())


def test_only_what_is_selected_has_a_history() -> None:
    with pytest.raises(ValueError, match=r"`select` must be one of \['weights'\], which this callback selects"):
        BanditSelectionCallback("weights").history("samples")
    with pytest.raises(ValueError, match=r"`select` must be one of \['samples', 'weights'\].*but got None"):
        BanditSelectionCallback("both").plot()


# --- Where it must win ------------------------------------------------------------------------------------------------


def uniform(num_arms: int) -> EpsilonGreedy:
    return EpsilonGreedy(num_arms, epsilon=1.0)


def wins(found: list[float], other: list[float]) -> bool:
    """Whether ``found`` is above ``other``, seed by seed, by more than two standard errors of the difference."""
    difference = torch.tensor(found) - torch.tensor(other)
    return float(difference.mean()) > 2 * float(difference.std() / len(found) ** 0.5)


class TwoParts(L.LightningModule):
    """Eight classes by a linear layer, which nothing disturbs, and sixteen on a circle by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.easy = nn.Linear(8, 8)
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.easy(x[:, 2:]), self.net(x[:, :2])], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def half_at_risk(seed: int) -> list[Task]:
    """The past has eight easy classes and every second on the circle; the new task brings those between them."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(16) / 16 * 2 * torch.pi
    circle = 1.6 * torch.stack([angles.cos(), angles.sin()], 1)

    def draw(classes: range, num_samples: int) -> TensorDataset:
        y = torch.tensor(classes).repeat_interleave(num_samples)
        x = torch.zeros(len(y), 10)
        easy = y < 8
        place = torch.where(y < 16, 2 * (y - 8), 2 * (y - 16) + 1)  # on the circle
        noise = 0.1 * torch.randn(len(y), 10, generator=generator)
        x[easy, 2:] = 8 * torch.eye(8)[y[easy]] + noise[easy, 2:]
        x[~easy, :2] = circle[place[~easy]] + noise[~easy, :2]
        return TensorDataset(x, y)

    return [
        Task(draw(range(16), 150), test=draw(range(16), 100)),
        Task(draw(range(16, 24), 400), test=draw(range(16, 24), 100)),
    ]


@pytest.mark.slow
def test_by_gradient_norms_it_finds_the_past_that_is_at_risk_and_beats_uniform_plays(trainer: Make) -> None:
    def run(seed: int, policy: Any) -> tuple[float, float]:
        L.seed_everything(seed, verbose=False)
        tasks, module = half_at_risk(seed), TwoParts()
        bandit = BanditSelectionCallback(
            *("samples",),
            policy=policy,
            reward="grad_norm",
            budget=0.125,
            measure_every=5,
            arms=lambda batch: (batch[1] >= 8).long() + (batch[1] >= 16).long(),  # easy, at risk, new
            memory=800,
            first_task=1,
            seed=seed,
        )
        data = ContinualDataModule(tasks, batch_size=64, seed=seed)
        for task, epochs in enumerate((10, 6)):
            data.current_task = task
            trainer(bandit, max_epochs=epochs).fit(module, datamodule=data)
        x, y = (torch.cat(parts) for parts in zip(*(task.test.tensors for task in tasks), strict=True))  # type: ignore[union-attr]
        plays = bandit.history()["plays"].nansum(0)
        return float((module(x).argmax(1) == y).float().mean()), float(plays[1] / plays[:2].sum())

    found, other = ([run(seed, policy) for seed in range(5)] for policy in ("exp3", uniform))
    assert sum(share for _, share in found) / 5 >= 0.6  # of the past that is played
    assert abs(sum(share for _, share in other) / 5 - 0.5) < 0.05
    assert wins([accuracy for accuracy, _ in found], [accuracy for accuracy, _ in other])


class Gated(nn.Module):
    def __init__(self, gate: float) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(32, 32), gate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * torch.relu(self.linear(x))


class Six(L.LightningModule):
    """Six layers, of which four hardly reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Gated(gate) for gate in (1.0, 0.02, 0.02, 1.0, 0.02, 0.02)))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


@pytest.mark.slow
def test_it_finds_the_two_layers_of_six_that_suffice_and_beats_uniform_plays(trainer: Make) -> None:
    def run(seed: int, policy: Any) -> tuple[float, float]:
        L.seed_everything(seed, verbose=False)
        generator = torch.Generator().manual_seed(seed)
        teacher, x = (
            nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)),
            torch.randn(6000, 32, generator=generator),
        )
        for p in teacher.parameters():
            p.data = torch.randn(p.shape, generator=generator) * (0.6 if p.ndim > 1 else 0.1)
        y = teacher(x).argmax(1)
        module = Six()
        bandit = BanditSelectionCallback("weights", policy=policy, budget=0.34, every=10, head="head.*", seed=seed)
        train = DataLoader(TensorDataset(x[:4000], y[:4000]), 32, shuffle=True)
        trainer(bandit, max_epochs=6).fit(module, train)
        plays = bandit.history()["plays"].sum(0)
        accuracy = (module(x[4000:]).argmax(1) == y[4000:]).float().mean()
        return float(accuracy), float((plays[0] + plays[3]) / plays.sum())

    found, other = ([run(seed, policy) for seed in range(5)] for policy in ("exp3", uniform))
    assert sum(share for _, share in found) / 5 >= 0.6
    assert abs(sum(share for _, share in other) / 5 - 1 / 3) < 0.1
    assert wins([accuracy for accuracy, _ in found], [accuracy for accuracy, _ in other])


@pytest.mark.slow
def test_on_split_mnist_it_is_not_worse_than_uniform_plays(trainer: Make, real_data: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    parts = []
    for train, size in ((True, 10_000), (False, 4000)):
        found = datasets.MNIST(real_data, train=train, download=False)
        parts.append(TensorDataset(found.data[:size].flatten(1) / 255, found.targets[:size]))

    class Network(Deep):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.Adam(p, lr=1e-3))
            self.net = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    def run(seed: int, policy: Any) -> float:
        L.seed_everything(seed, verbose=False)
        module, tasks = Network(), split_by_class(*parts, num_tasks=5)
        bandit = BanditSelectionCallback(
            "samples", policy=policy, budget=0.5, memory=500, measure_every=5, first_task=1, seed=seed
        )
        trainer(bandit, TaskStream(1)).fit(module, datamodule=ContinualDataModule(tasks, batch_size=64, seed=seed))
        x, y = parts[1].tensors
        return float((module(x).argmax(1) == y).float().mean())

    found, other = (sum(run(seed, policy) for seed in range(3)) / 3 for policy in ("exp3", uniform))
    assert found >= other - 0.005
