"""Synapse and neuron importance: the loss is the formula's, and nothing else is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_ewc import Busy, InTwo, Keep, Untrained, samples
from test_resume import assert_same
from test_resume import run as run_stream
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_continual import ContinualDataModule, EWCCallback, SynapseNeuronCallback, TaskStream, _host, restore

Make = Callable[..., L.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
]


# --- The formula ------------------------------------------------------------------------------------------------------


def called(net: nn.Sequential, x: Tensor, random_state: Tensor) -> list[Tensor]:
    """Return the outputs of all layers with trainable weights, and last that of the network."""
    torch.set_rng_state(random_state)
    outputs = []
    for layer in net:
        x = layer(x)
        if any(p.requires_grad for p in layer.parameters()):
            outputs.append(x)
            x = x.clone()
    return [*outputs, x]


def terms(
    net: nn.Sequential, deployed: nn.Sequential, batch: Any, random_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both terms without their strengths, by the definition, one tensor and one unit after the other."""
    x, y = batch
    before = torch.get_rng_state()
    *then, logits = called(deployed, x, random_state)
    weights = {name: p for name, p in deployed.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(logits, y)
    slopes = torch.autograd.grad(loss, [*weights.values(), *then])
    *now, logits = called(net, x, random_state)
    torch.set_rng_state(before)

    current = dict(net.named_parameters())
    synapse = sum(
        (slope**2 * (current[name] - weights[name].detach()) ** 2).sum()
        for name, slope in zip(weights, slopes, strict=False)
    )
    neuron = 0.0
    for slope, a, b in zip(slopes[len(weights) :], now, then, strict=True):
        for sample in range(len(x)):
            neuron = neuron + (slope[sample] ** 2 * (a[sample] - b[sample].detach()) ** 2).sum()
    return nn.functional.cross_entropy(logits, y), synapse / len(weights), neuron / len(now)


class Plain(L.LightningModule):
    def __init__(self, *layers: nn.Module, lr: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def mlp() -> Plain:
    return Plain(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))


def cnn() -> Plain:
    """With a batch norm, and layers that work in place on the output of the one before."""
    return Plain(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 2),
        nn.Dropout(0.3, inplace=True),
        nn.Flatten(),
        nn.Linear(4, 6),
    )


def twice() -> Plain:
    """A layer called twice, and another that has its weight."""
    layer, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = layer.weight
    return Plain(nn.Linear(4, 6), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), other)


def frozen() -> Plain:
    module = mlp()
    module.net[0].requires_grad_(False)
    module.net[3].bias.requires_grad_(False)
    return module


class Centred(nn.Module):
    """Keeps a mean in a buffer, and computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean.clone()


def centred() -> Plain:
    return Plain(Centred(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))


class Compare(L.Callback):
    """Compares every step with the formula, once there is a deployed network."""

    def __init__(self, synapse: float, neuron: float) -> None:
        self.strengths = synapse, neuron
        self.deployed: Any = None
        self.compared = 0
        self.largest = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.net, self.batch, self.state = copy.deepcopy(pl_module.net), batch, torch.get_rng_state()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.deployed is None:
            return
        loss, synapse, neuron = terms(self.net, copy.deepcopy(self.deployed), self.batch, self.state)
        self.expected = loss + self.strengths[0] * synapse + self.strengths[1] * neuron
        parameters = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        slopes = torch.autograd.grad(self.expected, list(parameters.values()))
        current = dict(pl_module.net.named_parameters())
        for name, slope in zip(parameters, slopes, strict=True):
            assert_close(current[name].grad, slope)
        self.largest = max(self.largest, float((self.expected - loss).detach()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        assert set(outputs) == {"loss", "logits"}
        if self.deployed is not None:
            assert_close(outputs["loss"], self.expected.detach())
            self.compared += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.deployed = copy.deepcopy(pl_module.net)


@pytest.mark.parametrize("make", [mlp, cnn, twice, frozen, centred], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("synapse", "neuron"), [(3.0, 0.0), (0.0, 3.0), (1.0, 2.0)], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(trainer: Make, make: Any, synapse: float, neuron: float) -> None:
    L.seed_everything(1, verbose=False)
    module, compare = make(), Compare(synapse, neuron)
    callback = SynapseNeuronCallback(synapse, neuron)
    for seed in range(3):
        trainer(callback, compare, max_epochs=1, precision="64-true").fit(module, DataLoader(samples(24, seed), 4))
    assert compare.compared == 12
    assert compare.largest > 1e-3


def test_in_half_precision_the_terms_do_not_vanish(trainer: Make) -> None:
    # Half precision has 11 bits: outputs of about 1 that differ by 0.1, and their slopes, are good to some 5e-3, their
    # squares to twice that. The squares of the slopes themselves are below what half precision can hold.
    class Ratio(Compare):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None: ...

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            loss, *parts = terms(self.net, self.deployed, self.batch, self.state)
            expected = sum(strength * part.detach() for strength, part in zip(self.strengths, parts, strict=True))
            ratios.append(float((outputs["loss"] - loss.detach()) / expected))

    ratios: list[float] = []
    for strengths in ((1e8, 0.0), (0.0, 1e8)):
        L.seed_everything(1, verbose=False)
        module = Plain(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), lr=0.0)
        module.net[2].weight.data *= 1e-3  # so that slopes are small: below 1e-6 a unit
        module.net[2].bias.data.zero_()
        callback, ratio = SynapseNeuronCallback(*strengths), Ratio(*strengths)
        ratio.deployed = copy.deepcopy(module.net)
        callback.deployed = {f"net.{name}": p.detach().clone() for name, p in ratio.deployed.named_parameters()}
        with torch.no_grad():
            module.net[0].weight += 0.3 * torch.randn_like(module.net[0].weight)
        scaler = torch.amp.GradScaler("cpu", init_scale=2**12)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer(callback, ratio, max_epochs=1, plugins=precision).fit(module, DataLoader(samples(768), 256))
    assert_close(torch.tensor(ratios), torch.ones(6), rtol=2e-2, atol=0)


def test_compiled_it_is_the_same(trainer: Make) -> None:
    ends = []
    for compiled in (False, True):
        L.seed_everything(1, verbose=False)
        module = Plain(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        callback = SynapseNeuronCallback(1.0, 1.0)
        for _ in range(2):
            fitted: Any = torch.compile(module, backend="eager") if compiled else module
            trainer(callback, max_epochs=1).fit(fitted, DataLoader(samples(24), 4))
        ends.append(module.state_dict())
    assert_close(*ends)


# --- Where nothing is to be seen --------------------------------------------------------------------------------------


def ends_of(trainer: Make, callbacks: list[L.Callback], *, steps: tuple[int, ...]) -> dict[str, Any]:
    """Train fit after fit, so many steps each; return everything there is at the end."""
    L.seed_everything(1, verbose=False)
    module = Busy()
    for seed, number in enumerate(steps):
        fit = trainer(*callbacks, max_epochs=1, limit_train_batches=number, log_every_n_steps=1)
        fit.fit(module, DataLoader(samples(24, seed), 4, shuffle=True))
    return {**module.state_dict(), **fit.callback_metrics, "random": torch.get_rng_state(), "calls": module.calls}


@pytest.mark.parametrize("steps", [(6,), (6, 1)], ids=["the first task", "at the deployed weights"])
def test_where_the_terms_are_zero_everything_is_as_without_them_to_the_bit(trainer: Make, steps: Any) -> None:
    # Busy has dropout, batch norms, metrics, counters; it logs in every way.
    with_it, without = (ends_of(trainer, one, steps=steps) for one in ([SynapseNeuronCallback(9.0, 9.0)], []))
    assert with_it.keys() == without.keys()
    assert not [
        name for name, value in with_it.items() if not torch.equal(*map(torch.as_tensor, (value, without[name])))
    ]


def test_turned_down_it_is_no_callback_whatever_is_known(trainer: Make) -> None:
    known = SynapseNeuronCallback(0.0, 0.0)
    known.deployed = {"of another module": torch.zeros(3)}
    with_it, without = (ends_of(trainer, one, steps=(6, 6)) for one in ([known], []))
    assert not [
        name for name, value in with_it.items() if not torch.equal(*map(torch.as_tensor, (value, without[name])))
    ]
    assert list(known.deployed) == ["of another module"]


def test_the_look_at_the_deployed_network_leaves_no_trace_on_the_module(trainer: Make) -> None:
    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            steps = trainer.global_step
            assert pl_module.calls - self.calls == steps
            assert len(pl_module.losses) == steps
            assert sum(pl_module.seen.values()) - self.seen == 4 * steps
            assert pl_module.accuracy._update_count == steps
            assert int(pl_module.norm.num_batches_tracked) - self.tracked == steps

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.calls, self.seen = pl_module.calls, sum(pl_module.seen.values())
            self.tracked = int(pl_module.norm.num_batches_tracked)

    module, callback = Busy(), SynapseNeuronCallback(1.0, 1.0)
    for _ in range(2):
        trainer(callback, Count(), max_epochs=1).fit(module, DataLoader(samples(24), 4))


def test_no_optimizer_and_no_module_sees_the_deployed_network(trainer: Make) -> None:
    class See(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            (group,) = trainer.optimizers[0].param_groups
            assert [id(p) for p in group["params"]] == [id(p) for p in pl_module.parameters()]
            assert len(trainer.optimizers[0].state) == len(group["params"])
            assert list(pl_module.state_dict()) == names
            assert not any(one._forward_hooks for one in pl_module.modules())

    module, callback = Classifier(), SynapseNeuronCallback(1.0, 1.0)
    names = list(module.state_dict())
    for _ in range(2):
        trainer(callback, See(), max_epochs=1).fit(module, DataLoader(samples(24), 4))
    assert not any(value.requires_grad for value in callback.deployed.values())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_the_module_skips_stays_skipped(trainer: Make) -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx >= 2 else super().training_step(batch, batch_idx)

    ends = []
    for batches in (2, 6):
        L.seed_everything(1, verbose=False)
        module, callback = Skips(nn.Linear(4, 6)), SynapseNeuronCallback(1.0, 1.0)
        for _ in range(2):
            trainer(callback, max_epochs=1, limit_train_batches=batches).fit(module, DataLoader(samples(24), 4))
        ends.append(module.state_dict())
    assert_close(*ends, rtol=0, atol=0)


def test_with_ewc_the_importance_is_that_of_the_plain_loss(trainer: Make) -> None:
    L.seed_everything(1, verbose=False)
    module, ewc = mlp().double(), EWCCallback(1.0, decay=1e-300)
    for _ in range(2):
        callbacks = [SynapseNeuronCallback(100.0, 100.0), ewc]
        callbacks[0].deployed = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        callbacks[0].deployed = {name: value.detach() + 0.1 for name, value in callbacks[0].deployed.items()}
        trainer(*callbacks, max_epochs=1, precision="64-true").fit(module, DataLoader(samples(24), 4))
    alone = EWCCallback(1.0)
    module.lr = 0.0
    trainer(alone, max_epochs=1, precision="64-true").fit(module, DataLoader(samples(24), 4))
    assert_close(ewc.penalty.precision, alone.penalty.precision)


# --- Processes, state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("synapse", "neuron"), [(3.0, 0.0), (0.0, 3.0)], ids=str)
def test_two_processes_equal_one_with_the_doubled_batch(
    trainer: Make, tmp_path: Path, synapse: float, neuron: float
) -> None:
    for devices in (1, 2):
        L.seed_everything(1, verbose=False)
        module = Plain(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        data = ContinualDataModule(make_tasks((24, 16, 16), val=False), batch_size=8 // devices)
        options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        keep = Keep(tmp_path / f"of-{devices}")
        callback = SynapseNeuronCallback(synapse, neuron)
        trainer(callback, TaskStream(2), keep, precision="64-true", **options).fit(module, datamodule=data)
    one, first, second = (torch.load(tmp_path / name) for name in ("of-1-0", "of-2-0", "of-2-1"))
    assert_close(first, one)
    assert_close(second, first, rtol=0, atol=0)


def test_restored_in_another_process_it_goes_on_as_if_it_had_not_stopped(trainer: Make, tmp_path: Path) -> None:
    def months(stop: bool) -> tuple[Any, Any]:
        L.seed_everything(1, verbose=False)
        module, callback, path = cnn(), SynapseNeuronCallback(1.0, 1.0), tmp_path / "deployed.ckpt"
        for month in range(3):
            if stop and month:
                module, callback = cnn(), SynapseNeuronCallback(1.0, 1.0)
                restore(path, module, [callback])
            torch.manual_seed(month)
            fit = trainer(callback, max_epochs=2)
            fit.fit(module, DataLoader(samples(16, month), 4, shuffle=True))
            fit.save_checkpoint(path)
        return module.state_dict(), callback.state_dict()

    (whole, one), (stopped, two) = months(False), months(True)
    assert_close(stopped, whole, rtol=0, atol=0)
    assert_close(two, one, rtol=0, atol=0)
    assert one["tasks_ended"] == 3


def test_a_checkpoint_from_anywhere_resumes_to_the_bit(tmp_path: Path) -> None:
    def make() -> list[L.Callback]:
        return [TaskStream(2), SynapseNeuronCallback(1.0, 1.0)]

    *whole, saved = run_stream(tmp_path, make)
    for path in saved[4:-1:7]:
        assert_same(run_stream(tmp_path, make, ckpt=path), whole, path)


@pytest.mark.parametrize("call", [14, 15], ids=["in the look at the deployed network", "in the step"])
def test_an_exception_in_the_training_step_leaves_nothing_behind(trainer: Make, call: int) -> None:
    class Fails(Busy):
        number = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            type(self).number += 1
            result = super().training_step(batch, batch_idx)
            if type(self).number == call:
                raise RuntimeError("in a step")
            return result

    module, callback = Fails(), SynapseNeuronCallback(1.0, 1.0)
    trainer(callback, max_epochs=1).fit(module, DataLoader(samples(24), 4))
    names, deployed = sorted(vars(module)), {name: value.clone() for name, value in callback.deployed.items()}
    modes = [one.training for one in module.modules()]
    with pytest.raises(RuntimeError, match="in a step"):
        trainer(callback, max_epochs=2).fit(module, DataLoader(samples(48), 4))
    assert module.number == call
    assert sorted(vars(module)) == names
    assert [one.training for one in module.modules()] == modes
    assert not any(one._forward_hooks for one in module.modules())
    assert_close(callback.deployed, deployed, rtol=0, atol=0)
    assert callback._tasks_ended == 1


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["synapse", "neuron"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_strength_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0 and finite, but got {value}"):
        SynapseNeuronCallback(**{name: value})


def test_the_strategy_is_asked_before_training(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_host, "require_visible_gradients", lambda trainer, who: asked.append(who))
    trainer(SynapseNeuronCallback(), fast_dev_run=True).fit(Classifier(), DataLoader(samples(8), 4))
    assert asked == ["SynapseNeuronCallback"]


def test_manual_optimization_is_refused_before_training(trainer: Make) -> None:
    with pytest.raises(MisconfigurationException, match=r"adds to the loss .* Use automatic optimization"):
        trainer(SynapseNeuronCallback(), Untrained(), max_epochs=1).fit(InTwo(), DataLoader(samples(8), 4))
    trainer(SynapseNeuronCallback(0.0, 0.0), max_epochs=1).fit(InTwo(), DataLoader(samples(8), 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: nn.Sequential(nn.Linear(4, 6)), r"has shape \(8, 4\) for 'net\.0\.weight', .* shape \(6, 4\)"),
        (lambda net: net[:3], r"has shape \(8, 8\) for 'net\.3\.weight', but the module has no such parameter"),
        (lambda net: net.append(nn.Linear(6, 6)), r"has no such parameter for 'net\.6\.weight', .* shape \(6, 6\)"),
    ],
    ids=["another shape", "gone", "new"],
)
def test_another_architecture_is_named_before_training(trainer: Make, change: Any, message: str) -> None:
    module, callback = mlp(), SynapseNeuronCallback()
    trainer(callback, max_epochs=1).fit(module, DataLoader(samples(8), 4))
    module.net = change(module.net)
    with pytest.raises(ValueError, match=message):
        trainer(callback, Untrained(), max_epochs=1).fit(module, DataLoader(samples(8), 4))
