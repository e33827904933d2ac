"""Bandit selection: what rests, what is drawn, what is rewarded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
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
    _host,
    restore,
    split_by_class,
)
from lightning_continual.bandits import EpsilonGreedy
from lightning_continual.selection import history as history_module

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


@pytest.mark.parametrize("bandit_first", [False, True])
def test_ewc_does_not_move_what_rests(trainer: Make, bandit_first: bool) -> None:
    module, watch = Deep(), Watch()
    ewc, bandit = EWCCallback(1000.0), BanditSelectionCallback("weights", budget=0.4, every=4, first_task=1)
    data = ContinualDataModule(make_tasks((24, 24), val=False), batch_size=8)
    callbacks = [bandit, ewc] if bandit_first else [ewc, bandit]
    trainer(*callbacks, watch, TaskStream(4)).fit(module, datamodule=data)
    assert set(ewc.penalty.precision) == {name for name, _ in module.named_parameters()}
    assert all(all(step["requires"].values()) for step in watch.steps[:12])  # the first task is trained whole
    for step in watch.steps[12:]:
        moved = {name for name in step["requires"] if not torch.equal(step["after"][name], step["before"][name])}
        assert moved == {name for name, requires in step["requires"].items() if requires}
        assert len(moved) < len(step["requires"])


class Rests(L.Callback):
    """Asserts that what is not played does not move, and is awake between steps; to be listed after the bandit."""

    def __init__(self, bandit: BanditSelectionCallback) -> None:
        self.bandit, self.num_steps = bandit, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert all(p.requires_grad for p in pl_module.parameters())
        weights = self.bandit.weights
        if trainer.datamodule.current_task == 0:
            return
        assert weights is not None
        assert weights.arms is not None
        assert weights._played is not None
        assert not weights.cuts_backward
        resting, _ = weights.arms.resting(weights._played)
        assert resting
        moved = {name for name, p in pl_module.named_parameters() if not torch.equal(p, self.before[name])}
        assert moved == self.before.keys() - resting
        self.num_steps += 1

    def on_train_end(self, *args: Any) -> None:
        assert self.num_steps == 12


@pytest.mark.parametrize("bandit_first", [False, True])
@pytest.mark.parametrize("way", [pytest.param("compiled", marks=pytest.mark.slow), "ddp_fork"])
def test_ewc_does_not_move_what_rests_where_its_gradient_is_computed(
    trainer: Make, way: str, bandit_first: bool
) -> None:
    class Norms(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = self.net[4] = nn.Identity()

    ewc, bandit = EWCCallback(1000.0), BanditSelectionCallback("weights", budget=0.4, every=4, first_task=1)
    data = ContinualDataModule(make_tasks((24, 24), val=False), batch_size=8 if way == "compiled" else 4)
    callbacks = [bandit, ewc] if bandit_first else [ewc, bandit]
    torch.compiler.reset()
    module: Any = torch.compile(Norms(), backend="eager") if way == "compiled" else Norms()
    options: dict[str, Any] = {} if way == "compiled" else {"devices": 2, "strategy": way}
    trainer(*callbacks, Rests(bandit), TaskStream(4), **options).fit(module, datamodule=data)


class Student(Deep):
    """Has a teacher that no optimizer moves, defined after all else."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def test_what_no_optimizer_moves_is_of_no_arm(trainer: Make) -> None:
    bandit, watch = BanditSelectionCallback("weights", budget=0.4, every=2), Watch()
    trainer(bandit, watch, max_epochs=2).fit(Student(), loader())
    assert bandit.arm_names() == ["net.0", "net.3", "net.6"]
    assert all(step["requires"]["net.8.weight"] for step in watch.steps)  # the head is the student's
    assert all(step["requires"]["teacher.0.weight"] for step in watch.steps)


class Gan(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for optimizer, real in zip(self.optimizers(), (True, False), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            made = nn.functional.softplus(self.discriminator(self.generator(torch.randn_like(x))) * (1 if real else -1))
            loss = made.mean() + (nn.functional.softplus(-self.discriminator(x)).mean() if real else 0)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(one.parameters()) for one in (self.discriminator, self.generator)]


def test_several_optimizers_need_a_head_of_each(trainer: Make) -> None:
    bandit = BanditSelectionCallback("weights", budget=0.5, every=2)
    with pytest.raises(MisconfigurationException, match="leave something to train in each step, but got 2 optimizers"):
        trainer(bandit, max_epochs=5).fit(Gan(), loader())
    trainer(BanditSelectionCallback("weights", budget=1.0), max_epochs=1).fit(Gan(), loader())  # nothing rests
    watch = Watch()
    bandit = BanditSelectionCallback("weights", head=["*.4.*"], budget=0.4, every=2)
    trainer(bandit, watch, max_epochs=5).fit(Gan(), loader())
    plays = bandit.history()["plays"]
    assert bandit.arm_names() == ["generator.0", "generator.2", "discriminator.0", "discriminator.2"]
    assert bool((plays.sum(0) > 0).all())
    assert bool((bandit.history()["rewards"].isnan() == (plays == 0)).all())
    for step in watch.steps:
        moved = {name for name in step["requires"] if not torch.equal(step["after"][name], step["before"][name])}
        assert moved == {name for name, requires in step["requires"].items() if requires}


def test_a_second_backward_pass_in_a_batch_finds_all_gradients_where_all_are_needed(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "needs_every_gradient", lambda trainer: True)

    class Twice(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            before = {name: p.detach().clone() for name, p in self.named_parameters()}
            for _ in range(2):
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
                assert all(p.grad is not None for p in self.parameters())
                optimizer.step()
            self.moved = {name for name, p in self.named_parameters() if not torch.equal(p, before[name])}

    module = Twice()
    trainer(BanditSelectionCallback("weights", budget=0.4, policy=only(2)), max_epochs=1).fit(module, loader())
    assert module.moved == {"net.6.weight", "net.6.bias", "net.8.weight", "net.8.bias"}


class Alternating(Deep):
    """Trains its lower half in every second batch, and its upper half in the others, on always the same batch."""

    def __init__(self, parity: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net[1] = self.net[4] = nn.Identity()
        self.parity = parity

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=1e-9) for part in (self.net[:6], self.net[6:])]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        self.optimizers()[(batch_idx + self.parity) % 2].step()  # type: ignore[index, union-attr]


def test_arms_of_optimizers_that_take_turns_are_judged_alike(trainer: Make) -> None:
    rewards = []
    x, y = (leaf[:1].expand(64, *leaf.shape[1:]) for leaf in loader().dataset.tensors)  # type: ignore[attr-defined]
    for parity in (0, 1):
        torch.manual_seed(0)
        module = Alternating(parity)
        bandit = BanditSelectionCallback("weights", head="net.8.*", budget=0.99, every=20, policy=only(0, 2))
        trainer(bandit, max_epochs=3, precision="64-true").fit(module, DataLoader(TensorDataset(x, y), 8))
        rewards.append(bandit.history()["rewards"][0])
        for arm, name in ((0, "net.0"), (2, "net.6")):
            own = list(module.get_submodule(name).parameters())
            loss = cross_entropy(module(x[:8].double()), y[:8])
            slope = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, own))
            expected = 1e-9 * slope / sum(p.numel() for p in own)
            assert_close(float(rewards[-1][arm]), expected, rtol=1e-4, atol=0)  # of differences of weights of 1e-1
    assert_close(rewards[0], rewards[1], rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_that_changes_gradients_in_place_is_measured_by_those_before(trainer: Make, foreach: bool) -> None:
    rewards = []
    for own in (False, foreach):
        torch.manual_seed(0)
        make = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=own)
        bandit = BanditSelectionCallback("weights", budget=0.4, every=4)
        trainer(bandit, max_epochs=2, gradient_clip_val=0.1).fit(Deep(make), loader())
        rewards.append(bandit.history()["rewards"])
    assert_close(rewards[1], rewards[0], equal_nan=True)


def test_what_the_user_freezes_in_mid_fit_stays_frozen_and_is_told_when_played(trainer: Make) -> None:
    class Freeze(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[3].requires_grad_(False)
                self.weight = pl_module.net[3].weight.clone()

    module, freeze = Deep(), Freeze()
    bandit = BanditSelectionCallback("weights", budget=0.4, every=2)
    with pytest.warns(UserWarning, match=r"were played, but had no gradient in any step: \['net.3'\]") as warned:
        trainer(freeze, bandit, max_epochs=6).fit(module, loader())
    assert len([one for one in warned if "no gradient" in str(one.message)]) == 1
    assert not module.net[3].weight.requires_grad
    assert torch.equal(module.net[3].weight, freeze.weight)
    assert bandit.weights is not None
    assert bandit.weights.num_skipped == 0


def test_layers_that_are_thawed_between_tasks_become_arms(trainer: Make) -> None:
    module = Deep()
    module.net[0].requires_grad_(False)
    bandit = BanditSelectionCallback("weights", budget=0.6, every=2)
    trainer(bandit, max_epochs=1).fit(module, loader())
    assert bandit.arm_names() == ["net.3", "net.6"]
    module.net[0].requires_grad_(True)
    trainer(bandit, max_epochs=4).fit(module, loader())
    assert bandit.arm_names() == ["net.3", "net.6", "net.0"]
    plays = bandit.history()["plays"]
    assert plays[:, 2].isnan().tolist() == [True] * 3 + [False] * 15
    assert plays[3:, 2].sum() > 0
    labels = [tick.get_text() for tick in bandit.plot().axes[0].get_yticklabels()]
    assert labels == bandit.arm_names()


def test_tasks_have_other_random_plays_and_steps_go_on(trainer: Make) -> None:
    bandit, found = BanditSelectionCallback("weights", budget=0.4, every=1, policy="exp3"), []
    for _ in range(3):
        trainer(bandit, max_epochs=1).fit(Deep(), loader())
        found.append(bandit.history()["plays"][-7:].argmax(1).tolist())
    assert found[0] != found[1] != found[2]
    assert bandit.history()["steps"].tolist() == [step + 8 * task for task in range(3) for step in range(1, 8)]


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


def per_sample(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1], reduction="none")


class Unequal(torch.utils.data.Sampler[list[int]]):
    """Batches of eight samples for the first process, and of four for the second."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        for start in range(0, 64, 8):
            yield list(range(start, start + 8 - 4 * rank))

    def __len__(self) -> int:
        return 8


class Policies(L.Callback):
    def __init__(self, path: Path, bandit: BanditSelectionCallback) -> None:
        self.path, self.bandit = path, bandit

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        assert self.bandit.samples is not None
        if trainer.global_step == 8:
            state = {"policy": self.bandit.samples.policy.state_dict(), "history": self.bandit.history()}  # type: ignore[union-attr]
            torch.save(state, f"{self.path}-{trainer.global_rank}")


@pytest.mark.parametrize("policy", ["exp3", "ucb", "thompson", "epsilon-greedy"])
def test_policies_of_two_processes_stay_alike_with_batches_of_other_sizes(
    trainer: Make, tmp_path: Path, policy: str
) -> None:
    bandit = BanditSelectionCallback(policy=policy, memory=0, budget=0.5, measure_every=2)
    data = DataLoader(loader(num_classes=3).dataset, batch_sampler=Unequal())
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 1}
    trainer(bandit, Policies(tmp_path / "of", bandit), **options).fit(Deep(), data)
    one, two = (torch.load(tmp_path / f"of-{rank}") for rank in range(2))
    assert one["policy"].pop("policy") == two["policy"].pop("policy")
    assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert one["history"]["plays"].sum(1).tolist() == [6, 12, 12, 12]  # four and two slots a step


class Contrasting(Classifier):
    """Compares its outputs with those of the other processes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean = self.all_gather(self(batch[0]).detach().mean(0)).mean(0)  # type: ignore[union-attr]
        return cross_entropy(self(batch[0]) - mean, batch[1])


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
@pytest.mark.parametrize("reward", ["loss_progress", "grad_norm", "memory_loss"])
def test_processes_with_other_numbers_of_arms_make_as_many_passes(trainer: Make, reward: Any) -> None:
    y = torch.zeros(64, dtype=torch.int64)
    y[1::2] = torch.arange(32) % 3 + 1  # the second process has three classes, the first has one
    tasks = [Task(TensorDataset(torch.randn(64, 4), y))] * 2
    bandit = BanditSelectionCallback(reward=reward, budget=0.75, measure_every=1, memory=1)  # of the first alone
    data = ContinualDataModule(tasks, batch_size=8, shuffle=False)
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=20))  # else a failure would hang
    trainer(bandit, TaskStream(1), devices=2, strategy=strategy).fit(Contrasting(), datamodule=data)


def test_kmeans_clusters_what_is_dealt_out(trainer: Make) -> None:
    class Small(Deep):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / 1000, batch[1]]

    bandit = BanditSelectionCallback(arms="kmeans", num_clusters=4, memory=0)
    trainer(bandit, max_epochs=2).fit(Small(), loader())
    assert len(bandit.arm_names()) == 4


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_module_that_changes_batches_in_place_leaves_the_memory_alone(trainer: Make, budget: float) -> None:
    class InPlace(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].zero_()
            return super().training_step(batch, batch_idx)

    for arms in (lambda batch: torch.zeros_like(batch[1]), "class"):
        bandit = BanditSelectionCallback(arms=arms, budget=budget, memory=64)
        trainer(bandit, max_epochs=1).fit(InPlace(), loader())
        assert bandit.samples is not None
        assert bool((bandit.samples.memory.read(torch.arange(64))[0] != 0).any(1).all())


def test_a_small_batch_gets_two_slots_at_least(trainer: Make) -> None:
    module = Deep()
    trainer(BanditSelectionCallback(memory=0), max_epochs=1).fit(module, loader(num_samples=66))
    assert module.sizes == [2] * 9  # 0.3 of 8, and both of the last two: a batch norm fails on one


def test_exemplars_are_measured_as_batches_before_the_transfer(trainer: Make) -> None:
    states: list[Tensor] = []

    class Renamed(Deep):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x = batch[0] + 0.1 * torch.randn_like(batch[0])
            states.append(torch.get_rng_state())
            return {"x": x, "y": batch[1], "weight": torch.ones(len(batch[1]))}

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert torch.equal(states[0], torch.get_rng_state())  # though exemplars were augmented since
            states.clear()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    bandit = BanditSelectionCallback(reward="memory_loss", measure_every=1, budget=0.5, memory=8)
    for _ in range(2):
        trainer(bandit, max_epochs=1).fit(Renamed(), loader())
    assert bandit.history()["rewards"].isfinite().any(1).tolist() == [False] * 8 + [True] * 8


def test_losses_are_computed_in_the_precision_of_the_training(trainer: Make) -> None:
    class Fresh(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ torch.eye(6)  # of the default type of the moment

    for unbiased in (False, True):
        bandit = BanditSelectionCallback(losses=per_sample, measure_every=1, memory=0, unbiased=unbiased)
        trainer(bandit, max_epochs=1, precision="64-true").fit(Fresh(), loader())
        assert bool(bandit.history()["rewards"].isfinite().any())


def test_a_training_step_without_a_loss_is_skipped_and_counted(trainer: Make) -> None:
    class Sparing(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if bool((batch[1] == 1).all()) else super().training_step(batch, batch_idx)

    for reward in ("loss_progress", "grad_norm"):
        bandit = BanditSelectionCallback(reward=reward, measure_every=1, budget=1.0, memory=0)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="A reward of samples was not finite, and is skipped"):
            trainer(bandit, max_epochs=1).fit(Sparing(), loader())
        assert bandit.samples is not None
        assert bandit.samples.num_skipped == 8
        assert bandit.history()["rewards"].isfinite().sum(0).tolist() == [int(arm != 1) * 8 for arm in range(6)]


def test_weights_of_samples_are_not_given_to_another_batch(trainer: Make) -> None:
    bandit = BanditSelectionCallback(unbiased=True, losses=per_sample, budget=0.5, memory=0, measure_every=10**6)
    data = ContinualDataModule(make_tasks((32, 32), val=False), batch_size=8)
    with pytest.raises(ValueError, match="must have the 4 samples that were selected, but has 8"):
        # The first batch of a task is not measured: its step is yet to come.
        trainer(bandit, RehearsalCallback(16), TaskStream(1), accumulate_grad_batches=2).fit(
            Classifier(), datamodule=data
        )


def test_a_policy_that_never_plays_an_arm_cannot_weigh(trainer: Make) -> None:
    bandit = BanditSelectionCallback(policy=only(1), unbiased=True, losses=per_sample, memory=0)
    message = r"`unbiased=True` divides by .*, but `EpsilonGreedy` never plays \['0/0', '0/2', '0/3'\]. Pass a policy"
    with pytest.raises(ValueError, match=message):
        trainer(bandit, max_epochs=1).fit(Deep(), loader())


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


@pytest.mark.parametrize("select", ["samples", "weights"])
def test_of_a_long_history_the_row_just_measured_is_logged(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, select: Any
) -> None:
    monkeypatch.setattr(history_module, "_MOST_ROWS", 4)
    monkeypatch.setattr(history_module, "_FEWEST_ROWS", 2)
    logger = Log()
    own: Any = {"memory": 0, "measure_every": 1, "arms": lambda batch: batch[1] % 2, "budget": 1.0}
    bandit = BanditSelectionCallback(select, **(own if select == "samples" else {"every": 1, "budget": 0.4}))
    trainer(bandit, max_epochs=3, logger=logger, log_every_n_steps=10**6).fit(Deep(), loader())
    assert len(bandit.history()["steps"]) <= 4
    rewards = [
        tuple(value for name, value in row.items() if name.startswith(f"bandit/{select}/reward/"))
        for row in logger.rows
    ]
    rewards = [values for values in rewards if values]
    assert len(rewards) == len(set(rewards)) == (24 if select == "samples" else 23)


def test_an_arm_that_appears_after_the_last_measurement_is_drawn_blank(trainer: Make) -> None:
    y = torch.cat([torch.arange(40) % 2, torch.full((8,), 5)])
    bandit = BanditSelectionCallback(memory=0)
    trainer(bandit, max_epochs=1).fit(Deep(), DataLoader(TensorDataset(torch.randn(48, 4), y), 8))
    assert bandit.history()["plays"].shape == (1, 3)
    assert bandit.history()["plays"].isnan().tolist() == [[False, False, True]]
    assert [tick.get_text() for tick in bandit.plot().axes[0].get_yticklabels()] == ["0/0", "0/1", "0/5"]


def test_what_was_done_can_be_looked_at_without_a_fit(trainer: Make) -> None:
    make = partial(BanditSelectionCallback, "both", budget=[0.5, 0.4], every=2, measure_every=2)
    bandit, other = make(), make()
    trainer(bandit, max_epochs=1).fit(Deep(), loader())
    other.load_state_dict(bandit.state_dict())
    for select in ("samples", "weights"):
        assert other.arm_names(select) == bandit.arm_names(select)  # type: ignore[arg-type]
        assert_close(other.history(select), bandit.history(select), equal_nan=True)  # type: ignore[arg-type]
        assert len(other.plot(select).axes) == 2  # type: ignore[arg-type]
    assert other.history("samples")["steps"].tolist() == [1, 3, 5, 7]


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": "all"}, "`select` must be 'samples', 'weights' or 'both', but got 'all'"),
        ({"policy": "greedy"}, "`policy` must be one of 'exp3', .* but got 'greedy'"),
        ({"reward": "luck"}, r"`reward` must be one of \('loss_progress', .*\), but got 'luck'"),
        ({"budget": 0.0}, r"`budget` must lie in \(0, 1\], but got 0\.0"),
        ({"budget": (0.5, 1.5), "select": "both"}, r"`budget` must lie in \(0, 1\], but got 1\.5"),
        ({"budget": (0.5, 0.1, 0.1), "select": "both"}, "may be pairs, one for samples and one for weights, but got 3"),
        (
            {"budget": (0.5, 0.1)},
            r"`budget` may be a pair, .* with `select='both'`, but got \(0\.5, 0\.1\) with 'samples'",
        ),
        (
            {"arms": ["class", "units"], "select": "weights"},
            r"`arms` may be a pair, .*, but got \['class', 'units'\] with 'weights'",
        ),
        (
            {"select": "weights", "losses": len},
            "`losses` is for samples, but `select='weights'`. Leave it out, or pass",
        ),
        (
            {"select": "weights", "memory": 5, "reward": "grad_norm"},
            "`reward` and `memory` are for samples, but `select='weights'`. Leave them out, or pass `select='both'`",
        ),
        ({"every": 7}, "`every` is for weights, but `select='samples'`"),
        ({"head": "fc.*"}, "`head` is for weights, but `select='samples'`"),
        (
            {"reward": "memory_loss", "memory": 0},
            "`reward='memory_loss'` is the loss of exemplars, but `memory` has room",
        ),
        ({"unbiased": True, "losses": len, "policy": "ucb"}, "`unbiased=True` divides by .* `policy='ucb'` gives none"),
        (
            {"unbiased": True, "losses": len, "policy": "thompson"},
            "but `policy='thompson'` gives none to some. Pass 'exp3'",
        ),
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


def test_a_memory_that_holds_samples_is_refused() -> None:
    memory = ClassBalancedMemory(10)
    memory.add([torch.zeros(2)], task=0, labels=torch.tensor([3, 4]))
    with pytest.raises(
        ValueError, match=r"`memory` must be empty, for its labels will be .*, but it has seen 2 samples"
    ):
        BanditSelectionCallback(memory=memory)


def test_samples_that_change_shape_are_told_not_to_be_remembered(trainer: Make) -> None:
    class Padded(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0][:, :4], batch[1]), batch_idx)

    samples = [(torch.randn(4 + number // 8), number % 3) for number in range(32)]
    trainer(BanditSelectionCallback(memory=0), max_epochs=1).fit(Padded(), DataLoader(samples, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Samples must have the same shape .* Or pass `memory=0` to BanditSelection"):
        trainer(BanditSelectionCallback(), max_epochs=1).fit(Padded(), DataLoader(samples, 8))  # type: ignore[arg-type]


def test_labels_that_are_no_classes_are_told(trainer: Make) -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8)), 4)
    with pytest.raises(ValueError, match=r"needs labels, .* found torch.float32 \(4,\) .* Or pass `arms=`, a function"):
        trainer(BanditSelectionCallback(), max_epochs=1).fit(Deep(), data)


def test_clusters_of_iterable_data_are_refused(trainer: Make) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.randn(4), number % 3) for number in range(16)])

    trainer(BanditSelectionCallback(), max_epochs=1).fit(Deep(), DataLoader(Stream(), 8))
    with pytest.raises(MisconfigurationException, match=r"but got an iterable data set. Use .* `arms='class'`"):
        trainer(BanditSelectionCallback(arms="kmeans"), max_epochs=1).fit(Deep(), DataLoader(Stream(), 8))


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


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_refused(trainer: Make, search: Any) -> None:
    module = Deep(lambda p: torch.optim.LBFGS(p, line_search_fn=search))
    with pytest.raises(MisconfigurationException, match="but `LBFGS` moves all of them together, several times within"):
        trainer(BanditSelectionCallback("weights", budget=0.4), max_epochs=1).fit(module, loader())


class Stop(L.Callback):
    """Saves a checkpoint after some step, or breaks off."""

    def __init__(self, path: Path | None, step: int = 5) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.path is None:
                raise KeyError("broken off")
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_module_of_other_arms_does_not_resume(trainer: Make, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    trainer(BanditSelectionCallback("weights", budget=0.4, every=2), Stop(path), max_epochs=1).fit(Deep(), loader())
    other = BanditSelectionCallback("weights", arms={"a": "net.0.*", "b": "net.3.*"}, budget=0.7)
    with pytest.raises(ValueError, match=r"The state knows the arms \['net.0', 'net.3', 'net.6'\], but the module has"):
        trainer(other, max_epochs=1).fit(Deep(), loader(), ckpt_path=path, weights_only=True)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_arms_are_resumed_as_they_were_dealt_whatever_was_thawed_since(trainer: Make, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    module = Deep()
    module.net[0].requires_grad_(False)
    bandit = BanditSelectionCallback("weights", budget=0.6, every=2)
    trainer(bandit, Stop(path), max_epochs=1).fit(module, loader())
    assert bandit.arm_names() == ["net.3", "net.6"]
    again = BanditSelectionCallback("weights", budget=0.6, every=2)
    trainer(again, max_epochs=1).fit(Deep(), loader(), ckpt_path=path, weights_only=True)
    assert again.arm_names() == ["net.3", "net.6"]
    assert again.history()["plays"].tolist() == bandit.history()["plays"].tolist()


class Shallow(Deep):
    """Two arms that are none of `Deep`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 6))
        )


def test_what_was_played_when_a_fit_broke_off_is_dropped_but_not_the_history(trainer: Make, tmp_path: Path) -> None:
    bandit = BanditSelectionCallback("weights", budget=0.7, every=2)
    with pytest.raises(KeyError):
        trainer(bandit, Stop(None), max_epochs=1).fit(Deep(), loader())
    trainer(bandit, max_epochs=1).fit(Shallow(), loader())
    assert bandit.arm_names() == ["net.0", "net.3", "net.6", "net.2", "net.5"]
    assert bandit.history()["steps"].tolist() == [2, 4, 7, 9, 11]  # the fifth batch was the last of the first fit
    assert bandit.history()["plays"].isnan().any(1).tolist() == [True] * 5


@pytest.mark.filterwarnings("ignore:.*was saved inside a task")
def test_a_checkpoint_of_mid_task_is_restored_for_the_next_update(trainer: Make, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    trainer(BanditSelectionCallback("weights", budget=0.7, every=2), Stop(path), max_epochs=1).fit(Deep(), loader())
    module = Deep()
    module.net[0].requires_grad_(False)
    bandit = BanditSelectionCallback("weights", budget=0.7, every=2)
    restore(path, module, [bandit])
    assert bandit.arm_names() == ["net.0", "net.3", "net.6"]
    assert len(bandit.plot().axes) == 2
    trainer(bandit, max_epochs=1).fit(module, loader())
    plays = bandit.history()["plays"]
    assert plays.shape == (5, 3)
    assert bool(plays[2:, 0].isnan().all())
    assert bandit.state_dict()["weights"]["play"] is None


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
