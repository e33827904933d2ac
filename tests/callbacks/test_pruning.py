"""Pruning: exactly the amount asked is zero, and stays zero, whatever trains the rest."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import oracles
import pytest
import torch
from conftest import make_tasks
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_resume import assert_same
from test_resume import run as run_stream
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_continual import ContinualDataModule, EWCCallback, RehearsalCallback, TaskStream, _host, restore
from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.compression import selectors
from lightning_continual.constraints import Pin
from lightning_continual.parameters import evaluating

Make = Callable[..., L.Trainer]
Tensors = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
]

WEIGHTS = ["random", "magnitude", "obd", "obd-sd"]
UNITS = [*WEIGHTS, "dropout-damage", "merge"]


class Net(L.LightningModule):
    """Linear, normalised, linear: 48 + 72 + 36 weights, and what is not to be pruned."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 12), nn.BatchNorm1d(12)
        nn.init.constant_(self.norm.bias, 0.1)
        self.second, self.head = nn.Linear(12, 6), nn.Linear(6, 6)
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu())

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class InTwo(Net):
    """Two optimizers, stepped by hand, one of them every other time."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for number, optimizer in enumerate(self.optimizers()):
            if number == 0 or batch_idx % 2:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        early = [*self.first.parameters(), *self.norm.parameters()]
        return torch.optim.SGD(early, lr=0.05, momentum=0.9), torch.optim.Adam(
            [*self.second.parameters(), *self.head.parameters()], lr=0.01
        )


NAMES = ["first.weight", "second.weight", "head.weight"]


def samples(number: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(number, 4, generator=generator), torch.randint(6, (number,), generator=generator))


def loader(number: int = 48, seed: int = 0, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(samples(number, seed), batch_size, shuffle=True)


def copy_of(module: nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def num_zeros(module: nn.Module) -> int:
    return sum(int((p == 0).sum()) for name, p in module.named_parameters() if name in NAMES)


def zeros_of(module: Any) -> Tensors:
    return {name: p == 0 for name, p in module.named_parameters() if name in NAMES}


def net(make_optimizer: Any = None, kind: type[Net] = Net, seed: int = 1) -> Net:
    L.seed_everything(seed, verbose=False)
    return kind(make_optimizer)


class Watch(L.Callback):
    """Notes after each step how many weights are zero, which ones, and what else is zero."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.zeros: list[Tensors] = []
        self.other: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.counts.append(num_zeros(pl_module))
        self.zeros.append(zeros_of(pl_module))
        self.other |= {n for n, p in pl_module.named_parameters() if n not in NAMES and bool((p == 0).any())}


class Keep(L.Callback):
    """Keeps what each process ends with."""

    def __init__(self, path: Path, what: Callable[[Any], Any] = lambda module: module.state_dict()) -> None:
        self.path = path
        self.what = what

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.what(pl_module), f"{self.path}-{trainer.global_rank}")

    def load(self, rank: int = 0) -> Any:
        return torch.load(f"{self.path}-{rank}")


# --- Zeros stay -------------------------------------------------------------------------------------------------------


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)


def fused_adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def lbfgs(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, lr=0.01, max_iter=3)


def searching(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe")


def half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


SETTINGS: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "SGD": (sgd, dict),
    "Adam": (adam, dict),
    "AdamW": (adamw, dict),
    "fused AdamW": (fused_adamw, dict),
    "LBFGS": (lbfgs, dict),
    "LBFGS, searching": (searching, dict),
    "bf16": (adamw, lambda: {"precision": "bf16-mixed"}),
    "bf16 throughout": (adamw, lambda: {"precision": "bf16-true"}),
    "fp64": (adamw, lambda: {"precision": "64-true"}),
    "fp16": (sgd, half),
    "fp16, fused": (fused_adamw, half),
    "accumulation": (sgd, lambda: {"accumulate_grad_batches": 5}),
    "clipping": (adam, lambda: {"gradient_clip_val": 0.5}),
}


@pytest.mark.parametrize(("make_optimizer", "options"), SETTINGS.values(), ids=SETTINGS)
def test_sparsity_is_the_amount_to_one_weight_and_stays(trainer: Make, make_optimizer: Any, options: Any) -> None:
    module, watch = net(make_optimizer), Watch()
    selector: Any = "magnitude" if options().get("precision") == "bf16-true" else "obd-sd"
    start, pruning = copy_of(module), PruningCallback(selector, 0.83, when=[1])  # when there is momentum
    trainer(pruning, watch, max_epochs=4, **options()).fit(module, loader())
    assert watch.counts == [0] * 12 + [round(0.83 * 156)] * 36
    assert all(torch.equal(zeros[name], watch.zeros[-1][name]) for zeros in watch.zeros[12:] for name in NAMES)
    assert watch.other == set()  # norms and biases live on
    assert pruning.sparsity == round(0.83 * 156) / 156
    for name in NAMES:
        free = ~watch.zeros[-1][name]
        assert bool((module.get_parameter(name)[free].double() != start[name][free].double()).any())


@pytest.mark.parametrize("kind", [InTwo], ids=["two optimizers by hand"])
def test_with_manual_optimization_too(trainer: Make, kind: Any) -> None:
    module, watch = net(kind=kind), Watch()
    pruning = PruningCallback("obd-sd", 0.5, when=[1], loss=lambda module, batch: module.loss(batch))
    trainer(pruning, watch, max_epochs=3).fit(module, loader())
    assert watch.counts == [0] * 12 + [78] * 24


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)], ids="backend={}".format
)
def test_a_compiled_module_too(trainer: Make, backend: str) -> None:
    module, watch = net(sgd), Watch()
    compiled: Any = torch.compile(module, backend=backend)
    trainer(PruningCallback("obd-sd", 0.5, when=[0]), watch, max_epochs=2).fit(compiled, loader())
    assert set(watch.counts) == {78}


def test_units_of_a_compiled_module_too(trainer: Make) -> None:
    module, pruning = net(sgd), PruningCallback("obd-sd", 0.5, level="unit", when=[0])
    compiled: Any = torch.compile(module, backend="eager")
    trainer(pruning, max_epochs=1).fit(compiled, loader())
    small: Any = pruning.compact(module)
    assert (small.first.out_features, small.second.out_features) == (6, 3)
    assert_close(small.eval()(samples().tensors[0]), module.eval()(samples().tensors[0]))


class Plain(Net):
    """Without normalisation, so that averaging ends with the average itself; with validation."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__(make_optimizer)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.validated: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(num_zeros(self))


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("validates", [True, False], ids="validates={}".format)
@pytest.mark.parametrize("comes_first", [True, False], ids="average_first={}".format)
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_average_over_unpruned_weights_has_the_zeros_too(
    trainer: Make, tmp_path: Path, average: Any, comes_first: bool, validates: bool
) -> None:
    module, pruning, other = net(adamw, Plain), PruningCallback("magnitude", 0.5, when=[2]), average()
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    order = [other, pruning] if comes_first else [pruning, other]
    fit = trainer(*order, saves, max_epochs=4, num_sanity_val_steps=0, enable_checkpointing=True)
    fit.fit(module, loader(), DataLoader(samples(8), 4) if validates else None)
    assert num_zeros(module) == 78
    assert module.validated == [0] * 4 * validates + [78] * 4 * validates
    if comes_first or validates:
        saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"]
        assert sum(int((saved[name] == 0).sum()) for name in NAMES) == 78


def test_optimizers_that_step_past_lightning_move_no_zero(trainer: Make) -> None:
    class Past(Net):
        def __init__(self, make_optimizer: Any = None) -> None:
            super().__init__(make_optimizer)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    module, watch = net(adamw, Past), Watch()
    trainer(PruningCallback("magnitude", 0.5, when=[1]), watch, max_epochs=3).fit(module, loader())
    assert watch.counts == [0] * 12 + [78] * 24


def test_zeros_stay_in_two_processes(trainer: Make, tmp_path: Path) -> None:
    watch = Watch()
    keep = Keep(tmp_path / "of", lambda module: {"state": copy_of(module), "counts": watch.counts})
    pruning = PruningCallback("obd-sd", 0.83, when={"every_n_steps": 2}, rounds=2)
    trainer(pruning, watch, keep, max_epochs=3, strategy="ddp_fork", devices=2).fit(net(adamw), loader())
    first, second = keep.load(0), keep.load(1)
    assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["counts"][:2] == [0, 0]
    assert set(first["counts"][4:]) == {round(0.83 * 156)}


@pytest.mark.parametrize("when", [{"every_n_steps": 5}, [0, 1, 2]], ids=str)
@pytest.mark.parametrize("level", ["parameter", "unit"])
def test_a_checkpoint_from_anywhere_resumes_to_the_bit(trainer: Make, tmp_path: Path, when: Any, level: Any) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(*callbacks: L.Callback, **fit: Any) -> tuple[Any, Any]:
        module, pruning = net(adamw), PruningCallback("obd-sd", 0.8, when=when, rounds=3, level=level)
        data = ContinualDataModule(make_tasks((20,), val=False), batch_size=4)
        # Pruning stands on either side of what saves.
        order = [*callbacks, pruning] if when == [0, 1, 2] else [pruning, *callbacks]
        trainer(*order, max_epochs=4).fit(module, datamodule=data, **fit)
        return module.state_dict(), pruning

    whole, original = run(Save())
    assert original.rounds_made == 3
    for step in (3, 5, 7, 10, 13, 15, 18):
        again, restored = run(ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert not [name for name, value in whole.items() if not torch.equal(value, again[name])], step
        assert_close(restored.state_dict(), original.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"selector": "random", "rounds": 3, "schedule": "cubic"}], ids=str)
def test_in_a_stream_too(tmp_path: Path, options: dict[str, Any]) -> None:
    def make() -> list[L.Callback]:
        return [TaskStream(2), PruningCallback(amount=0.6, **options)]

    *whole, saved = run_stream(tmp_path, make)
    for path in saved[4:-1:6]:
        assert_same(run_stream(tmp_path, make, ckpt=path), whole, path)


@pytest.mark.parametrize("way", ["the same Trainer", "a new Trainer", "restored"])
def test_zeros_stay_in_a_second_fit(trainer: Make, tmp_path: Path, way: str) -> None:
    module, pruning, watch = net(adamw), PruningCallback("obd", 0.9), Watch()
    fit = trainer(pruning, watch, max_epochs=1)
    fit.fit(module, loader())
    assert watch.counts == [0] * 12  # pruned at its end
    assert num_zeros(module) == round(0.9 * 156)
    pruned = zeros_of(module)
    if way == "the same Trainer":
        fit.fit_loop.max_epochs = 4
    elif way == "a new Trainer":
        fit = trainer(pruning, watch, max_epochs=3)
    else:
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        module, pruning = net(adamw, seed=9), PruningCallback("obd", 0.9)
        restore(tmp_path / "deployed.ckpt", module, [pruning])
        fit = trainer(pruning, watch, max_epochs=3)
    before = copy_of(module)
    fit.fit(module, loader(seed=1))
    assert watch.counts[12:] == [round(0.9 * 156)] * 36
    assert all(torch.equal(zeros[name], pruned[name]) for zeros in watch.zeros[12:] for name in NAMES)
    assert not torch.equal(module.head.weight, before["head.weight"])
    assert pruning.rounds_made == 1  # the second task's end prunes no more


@pytest.mark.parametrize(
    ("amount", "rounds", "made", "zeros"), [(0.8, 1, 0, 125), (0.8, 4, 1, 125), (0.5, 1, 1, 78), (0.2, 1, 1, 78)]
)
def test_a_larger_amount_goes_on_where_a_smaller_one_was_reached(
    trainer: Make, tmp_path: Path, amount: float, rounds: int, made: int, zeros: int
) -> None:
    fit = trainer(PruningCallback("magnitude", 0.5), max_epochs=1)
    fit.fit(net(), loader())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    module, pruning = net(seed=9), PruningCallback("magnitude", amount, rounds=rounds, when={"every_n_steps": 1})
    restore(tmp_path / "half.ckpt", module, [pruning])
    assert pruning.rounds_made == made  # of four rounds to 80 %, the first stops short of a half
    half = zeros_of(module)
    trainer(pruning, max_epochs=1).fit(module, loader())
    assert num_zeros(module) == zeros
    assert all(bool(zeros_of(module)[name][half[name]].all()) for name in NAMES)


def test_a_checkpoint_is_that_of_an_ordinary_network_with_zeros(trainer: Make, tmp_path: Path) -> None:
    module, plain = net(), net()
    fit = trainer(PruningCallback("magnitude", 0.75), max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "pruned.ckpt")
    assert list(module.state_dict()) == list(plain.state_dict())
    loaded = Net.load_from_checkpoint(tmp_path / "pruned.ckpt", make_optimizer=None)
    assert num_zeros(loaded) == 117
    plain.load_state_dict(torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"])
    x = samples().tensors[0]
    for one in (loaded, plain):
        assert torch.equal(one.eval()(x), module.eval()(x))
    trainer(max_epochs=1).fit(loaded.train(), loader())  # without the callback it is a network like any other


def test_a_mask_can_be_laid_on_other_weights(trainer: Make) -> None:
    module, pruning = net(), PruningCallback("magnitude", 0.8)
    trainer(pruning, max_epochs=1).fit(module, loader())
    mask, other, watch = zeros_of(module), net(seed=7), Watch()
    forward, seen = other.forward, []
    other.forward = lambda x: (seen.append(num_zeros(other)), forward(x))[1]  # type: ignore[method-assign]
    trainer(pruning, watch, max_epochs=1).fit(other, loader())
    assert set(seen) == {round(0.8 * 156)}  # from the first batch on
    assert all(torch.equal(zeros[name], mask[name]) for zeros in watch.zeros for name in NAMES)


def test_state_holds_one_bit_of_knowledge_a_weight_and_no_values(trainer: Make) -> None:
    module, pruning = net(), PruningCallback("magnitude", 0.8)
    trainer(pruning, max_epochs=1).fit(module, loader())
    state = pruning.state_dict()
    assert {name: (value.dtype, value.shape) for name, value in state["pinned"].items()} == {
        name: (torch.bool, module.get_parameter(name).shape) for name in NAMES
    }


# --- Nothing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["task_end", [0], {"every_n_steps": 1}], ids=str)
def test_amount_zero_is_no_callback(trainer: Make, when: Any) -> None:
    ends = []
    for callbacks in ([PruningCallback("obd-sd", 0.0, when=when)], []):
        module = net(sgd)
        trainer(*callbacks, max_epochs=2).fit(module, loader())
        ends.append({**module.state_dict(), "random": torch.get_rng_state()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("selector", UNITS)
def test_a_round_leaves_all_but_the_weights_as_it_was(trainer: Make, selector: Any) -> None:
    module = net()
    module.norm.eval()
    module.seen = 0  # type: ignore[assignment]
    step = module.training_step

    def counting(batch: Any, batch_idx: int) -> Any:
        module.seen += 1  # type: ignore[operator]
        module.log("loss", 1.0)
        torch.rand(3)
        return step(batch, batch_idx)

    module.training_step = counting  # type: ignore[method-assign]
    pruning, taken = PruningCallback(selector, 0.5, level="unit"), []
    end = pruning.on_task_end

    def ended(trainer: Any, pl_module: Any, task: int) -> None:
        for function in (lambda: None, lambda: end(trainer, pl_module, task)):
            function()
            buffers = {name: one.clone() for name, one in pl_module.named_buffers()}
            gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
            own = [pl_module.seen, *sorted(vars(pl_module)), *(one.training for one in pl_module.modules())]
            taken.append((buffers, gradients, torch.get_rng_state(), own))

    pruning.on_task_end = ended  # type: ignore[method-assign]
    trainer(pruning, max_epochs=1).fit(module, loader())
    before, after = taken
    assert_close(after[:3], before[:3], rtol=0, atol=0)
    assert after[3] == before[3]
    assert pruning.rounds_made == 1


# --- What goes --------------------------------------------------------------------------------------------------------


def expected_saliency(selector: Any, module: Any, data: TensorDataset) -> Tensors:
    """By the definition, sample after sample."""
    singles = [(x[None], y[None]) for x, y in data]
    weights = {name: module.get_parameter(name).detach() for name in NAMES}
    with evaluating(module):
        if selector == "magnitude":
            return {name: w.abs() for name, w in weights.items()}
        if selector == "obd":
            curvature = oracles.exact_fisher(module, [x for x, _ in singles])
        else:
            gradients = oracles.per_sample_gradients(module, module.loss, singles)
            if selector == "rms":
                curvature = {name: value.sqrt() for name, value in oracles.mean_square(gradients).items()}
            else:
                curvature = {n: d**2 if selector == "variance" else d for n, d in oracles.deviation(gradients).items()}
    return {name: w**2 * curvature[name] / 2 for name, w in weights.items()}


def lowest(saliency: Tensors, amount: float, scope: str) -> Tensors:
    together = [list(saliency)] if scope == "global" else [[name] for name in saliency]
    pruned = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in saliency.items()}
    for names in together:
        places = [(float(v), n, i) for n in names for i, v in enumerate(saliency[n].flatten())]
        for _, name, index in sorted(places)[: round(amount * len(places))]:
            pruned[name].view(-1)[index] = True
    return pruned


class InDouble(Net):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("selector", ["magnitude", "obd", "obd-sd", "rms", "variance"])
def test_what_is_pruned_has_the_least_saliency_on_the_tasks_data(trainer: Make, selector: Any, scope: Any) -> None:
    module, ends = net(kind=InDouble), []

    class End(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            ends.append({name: one.clone() for name, one in pl_module.state_dict().items()})

    options = {"selector": "obd-sd", "statistic": selector} if selector in ("rms", "variance") else {}
    pruning = PruningCallback(**{"selector": selector, **options}, amount=0.6, scope=scope)
    trainer(End(), pruning, max_epochs=1, precision="64-true").fit(module, loader())
    pruned = zeros_of(module)
    module.load_state_dict(ends[0])
    x, y = samples().tensors
    expected = lowest(expected_saliency(selector, module, TensorDataset(x.double(), y)), 0.6, scope)
    assert all(torch.equal(pruned[name], expected[name]) for name in NAMES)


def test_random_depends_on_the_seed_alone(trainer: Make) -> None:
    found = []
    for seed, batch_size in ((0, 4), (0, 6), (1, 4)):
        module = net()
        pruning = PruningCallback("random", 0.5, seed=seed)
        trainer(pruning, max_epochs=1).fit(module, loader(batch_size=batch_size))
        found.append(torch.cat([one.flatten() for one in zeros_of(module).values()]))
    assert torch.equal(found[0], found[1])
    assert 50 < int((found[0] ^ found[2]).sum()) < 106


def by_function(module: Any, batches: Iterator[Any], parameters: Any) -> Tensors:
    """|w| times the mean of the data, the same in any order and number of shares."""
    assert not module.training
    mean = torch.cat([x for x, _ in batches]).mean()
    return {name: p.detach().abs() * mean for name, p in parameters.items()}


def test_a_functions_results_are_averaged_over_processes_each_by_its_samples() -> None:
    layer, other = nn.Linear(2, 3), torch.rand(3, 2)

    def add(value: Tensor) -> Tensor:
        """Sum over this process, of three samples, and another one, of one sample."""
        return value + (1.0 if value.ndim == 0 else 0.25 * other)

    evidence = selectors.Evidence(list, layer, nn.Module.__call__, torch.Generator(), num_samples=3, all_reduce=add)
    found = selectors.weight_saliency(lambda module, batches, p: p, layer, {"weight": layer.weight}, evidence)
    assert_close(found["weight"], 0.75 * layer.weight.detach() + 0.25 * other)


@pytest.mark.parametrize("level", ["parameter", "unit"])
@pytest.mark.parametrize("selector", [*UNITS, by_function], ids=lambda one: getattr(one, "__name__", one))
def test_two_processes_prune_what_one_prunes(trainer: Make, tmp_path: Path, selector: Any, level: Any) -> None:
    if level == "parameter" and selector in ("dropout-damage", "merge"):
        return
    states = []
    for devices in (1, 2):
        module = net(lambda parameters: torch.optim.SGD(parameters, lr=0.0), kind=InDouble)
        keep = Keep(tmp_path / str(devices))
        module.norm.momentum = 0.0  # statistics too are those of the start
        options = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        pruning = PruningCallback(selector, 0.5, level=level)
        trainer(pruning, keep, max_epochs=1, precision="64-true", **options).fit(module, loader(23))
        states += [keep.load(rank) for rank in range(devices)]
    assert_close(states[1], states[2], rtol=0, atol=0)
    for name in NAMES:
        assert torch.equal(states[0][name] == 0, states[1][name] == 0), name
        assert_close(states[0][name], states[1][name])


def test_patterns_say_what_may_go(trainer: Make) -> None:
    module = net()
    pruning = PruningCallback("magnitude", 0.75, parameters=["first.*", "second.weight"])
    trainer(pruning, max_epochs=1).fit(module, loader())
    assert list(pruning.pin.pinned) == ["first.weight", "second.weight"]
    assert num_zeros(module) == 90


def test_frozen_weights_do_not_go(trainer: Make) -> None:
    module = net()
    module.second.requires_grad_(False)
    trainer(PruningCallback("obd-sd", 0.5), max_epochs=1).fit(module, loader())
    assert num_zeros(module) == 42
    assert not bool((module.second.weight == 0).any())


def test_a_head_may_grow_right_before_a_round(trainer: Make) -> None:
    class Grow(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.head = nn.Linear(6, 8)
                trainer.strategy.setup_optimizers(trainer)

    module, pruning = net(), PruningCallback("magnitude", 0.5, when=[0, 1])
    trainer(Grow(), pruning, max_epochs=2).fit(module, loader())
    assert num_zeros(module) == 84  # half of 168


def test_rows_that_a_head_gains_are_free_until_the_next_round(trainer: Make) -> None:
    module, pruning = net(), PruningCallback("magnitude", 0.5, rounds=2)
    trainer(pruning, max_epochs=1).fit(module, loader())
    grown = nn.Linear(6, 8)
    with torch.no_grad():
        grown.weight[:6] = module.head.weight
    module.head, watch = grown, Watch()
    trainer(pruning, watch, max_epochs=1).fit(module, loader())
    first = round((1 - 0.5**0.5) * 156)
    assert set(watch.counts) == {first}
    assert num_zeros(module) == 84  # half of 168


# --- When -------------------------------------------------------------------------------------------------------------


def shares(watch: Watch) -> list[float]:
    return [round(count / 156, 2) for count in watch.counts]


def test_rounds_at_epochs_come_before_their_first_step(trainer: Make) -> None:
    pruning, watch = PruningCallback("magnitude", 0.75, when=[1, 2]), Watch()
    trainer(pruning, watch, max_epochs=4).fit(net(), loader(8))
    assert shares(watch) == [0.0] * 2 + [0.5] * 2 + [0.75] * 4
    assert pruning.rounds == 2


def test_rounds_by_steps_come_after_so_many_of_them(trainer: Make) -> None:
    pruning, watch = PruningCallback("random", 0.875, when={"every_n_steps": 2}, rounds=3), Watch()
    trainer(pruning, watch, max_epochs=3, accumulate_grad_batches=2).fit(net(), loader(20))
    # Of five batches in an epoch three make a step: the second, the fourth, and the last.
    assert shares(watch) == [0.0] * 4 + [0.5] * 3 + [0.75] * 3 + [0.87] * 5


def test_a_round_that_the_last_step_makes_due_comes_at_the_tasks_end(trainer: Make) -> None:
    module, watch = net(), Watch()
    trainer(PruningCallback("magnitude", 0.5, when={"every_n_steps": 4}), watch, max_epochs=2).fit(module, loader(8))
    assert watch.counts == [0] * 4
    assert num_zeros(module) == 78


def test_steps_count_over_tasks(trainer: Make) -> None:
    module, pruning, watch = net(), PruningCallback("magnitude", 0.5, when={"every_n_steps": 3}), Watch()
    with pytest.warns(UserWarning, match=r"has made 0 of 1 rounds, and stands at 0\.000 of 0\.5"):
        trainer(pruning, watch, max_epochs=1).fit(module, loader(8))
    trainer(pruning, watch, max_epochs=1).fit(module, loader(8))
    assert watch.counts == [0, 0, 0, 78]


def test_at_the_ends_of_tasks_there_is_a_round_each_until_all_are_made(trainer: Make) -> None:
    pruning, watch = PruningCallback("magnitude", 0.75, rounds=2), Watch()
    data = ContinualDataModule(make_tasks((8, 8, 8), val=False), batch_size=4)
    trainer(pruning, TaskStream(1), watch).fit(net(), datamodule=data)
    assert shares(watch) == [0.0] * 2 + [0.5] * 2 + [0.75] * 2


def test_epochs_are_those_of_the_task(trainer: Make) -> None:
    pruning, watch = PruningCallback("magnitude", 0.75, when=[1, 3]), Watch()
    data = ContinualDataModule(make_tasks((8, 8), val=False), batch_size=4)
    with pytest.warns(UserWarning, match=r"has made 1 of 2 rounds, and stands at 0\.500 of 0\.75"):
        trainer(pruning, TaskStream(2), watch).fit(net(), datamodule=data)
    assert shares(watch) == [0.0] * 2 + [0.5] * 6  # no task has a fourth epoch


# --- Units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", UNITS)
def test_units_go_with_all_that_makes_and_reads_them_and_stay_away(trainer: Make, selector: Any) -> None:
    module, pruning = net(adamw), PruningCallback(selector, 0.5, level="unit", when=[0])
    trainer(pruning, max_epochs=3).fit(module, loader())
    for layer, norm, reader, number in (
        (module.first, module.norm, module.second, 12),
        (module.second, None, module.head, 6),
    ):
        gone = layer.bias == 0
        assert int(gone.sum()) == number // 2
        assert bool((layer.weight[gone] == 0).all())
        assert bool((reader.weight[:, gone] == 0).all())
        assert bool((reader.weight[:, ~gone] != 0).any())
        if norm is not None:
            assert torch.equal(norm.weight == 0, gone)
            assert torch.equal(norm.bias == 0, gone)
    assert not bool((module.head.bias == 0).any())


def test_layers_keep_as_many_units_as_asked(trainer: Make) -> None:
    module = net()
    trainer(PruningCallback("magnitude", 0.9, level="unit", min_units=4), max_epochs=1).fit(module, loader())
    assert [int((layer.bias != 0).sum()) for layer in (module.first, module.second)] == [4, 4]


def test_rounds_of_units_add_up(trainer: Make) -> None:
    module, counts = net(adamw), []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            counts.append(int((pl_module.first.bias == 0).sum()))

    pruning = PruningCallback("obd-sd", 0.75, level="unit", when=[0, 1])
    trainer(pruning, Count(), max_epochs=2).fit(module, loader(8))
    assert counts == [6, 6, 9, 9]


def test_patterns_choose_layers_whose_units_may_go(trainer: Make) -> None:
    module = net()
    pruning = PruningCallback("magnitude", 0.5, level="unit", parameters="second.*")
    trainer(pruning, max_epochs=1).fit(module, loader())
    assert not bool((module.first.bias == 0).any())
    assert int((module.second.bias == 0).sum()) == 3


def test_copies_merge_without_a_trace_in_the_outputs(trainer: Make) -> None:
    module = net(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    module.norm.momentum = 0.0
    with torch.no_grad():  # units in twos, the second of each at another size before the normalisation
        module.first.weight[6:], module.first.bias[6:] = 3 * module.first.weight[:6], 3 * module.first.bias[:6]
        module.norm.bias.zero_()
        module.second.weight[3:], module.second.bias[3:] = 2 * module.second.weight[:3], 2 * module.second.bias[:3]
    x, data = samples().tensors[0], loader()
    expected = module.eval()(x)
    module.train()
    trainer(PruningCallback("merge", 0.5, level="unit"), max_epochs=1).fit(module, data)
    assert int((module.first.bias == 0).sum()) == 6
    assert int((module.second.bias == 0).sum()) == 3
    assert_close(module.eval()(x), expected)


@pytest.mark.parametrize("given", [True, False], ids="example_inputs={}".format)
def test_compact_is_small_and_gives_the_same_outputs(trainer: Make, given: bool) -> None:
    module, pruning = net(adamw), PruningCallback("obd-sd", 0.5, level="unit", when=[0])
    trainer(pruning, max_epochs=1).fit(module, loader())
    x = samples().tensors[0]
    small: Any = pruning.compact(module, x[:1] if given else None)
    assert_close(small.eval()(x), module.eval()(x))
    assert type(small) is Net
    assert (small.first.weight.shape, small.second.weight.shape, small.head.weight.shape) == ((6, 4), (3, 6), (6, 3))
    assert module.first.weight.shape == (12, 4)
    before = small.head.weight.clone()
    trainer(max_epochs=1).fit(small.train(), loader())  # it trains on
    assert bool((small.head.weight != before).any())


def test_compact_reads_the_zeros_of_a_checkpoint(trainer: Make, tmp_path: Path) -> None:
    module, pruning = net(), PruningCallback("magnitude", 0.5, level="unit")
    fit = trainer(pruning, max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "pruned.ckpt")
    loaded, x = Net.load_from_checkpoint(tmp_path / "pruned.ckpt", make_optimizer=None), samples().tensors[0]
    fresh = PruningCallback(level="unit")
    with pytest.raises(ValueError, match=r"`compact` needs data, but this callback has seen none\. Pass `example_inp"):
        fresh.compact(loaded)
    small: Any = fresh.compact(loaded, x)
    assert small.first.out_features == 6
    assert_close(small.eval()(x), module.eval()(x))


def test_compact_takes_batches_of_any_structure(trainer: Make) -> None:
    class ByName(Net):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    module = net(kind=ByName)
    pruning = PruningCallback("obd", 0.5, level="unit", logits=lambda module, batch: module(batch["x"]))
    data = [{"x": x, "y": y, "name": "of a sample"} for x, y in samples()]
    trainer(pruning, max_epochs=1).fit(module, DataLoader(data, 4))
    assert pruning.compact(module).first.out_features == 6  # type: ignore[union-attr]


# --- With others ------------------------------------------------------------------------------------------------------


def test_at_a_boundary_it_prunes_and_then_ewc_anchors(trainer: Make) -> None:
    module, pruning, ewc = net(adamw), PruningCallback("magnitude", 0.7), EWCCallback(50.0)
    for seed in range(2):
        watch = Watch()
        trainer(pruning, ewc, watch, max_epochs=2).fit(module, loader(seed=seed))
        if seed == 0:
            anchored = {name: ewc.penalty.shift[name] == 0 for name in NAMES}
            assert all(bool(anchored[name][zeros].all()) for name, zeros in zeros_of(module).items())
    assert set(watch.counts) == {round(0.7 * 156)}


@pytest.mark.parametrize("first", ["pruning", "ewc"])
def test_a_penalty_moves_no_zero_in_either_order(trainer: Make, first: str) -> None:
    module, ewc = net(adamw), EWCCallback(50.0)
    trainer(ewc, max_epochs=1).fit(module, loader())  # anchored before anything is pruned
    pruning, watch = PruningCallback("obd-sd", 0.7, when=[0]), Watch()
    order = [pruning, ewc] if first == "pruning" else [ewc, pruning]
    trainer(*order, watch, max_epochs=2).fit(module, loader(seed=1))
    assert set(watch.counts) == {round(0.7 * 156)}


class Holder(L.Callback):
    """Holds a part of the first weights, as a method that protects earlier tasks does."""

    def __init__(self, module: Net, part: Any) -> None:
        weight = module.first.weight
        pinned = torch.zeros_like(weight, dtype=torch.bool)
        pinned[part] = True
        self.pin = Pin.at({"first.weight": weight}, {"first.weight": pinned})


def test_what_another_callback_holds_is_not_pruned(trainer: Make) -> None:
    module = net(adamw)
    module.first.weight.data[:2] = 1e-4  # of least magnitude
    before, holder = module.first.weight.detach().clone(), Holder(module, slice(1))
    pruning, watch = PruningCallback("magnitude", 0.7, when=[0]), Watch()
    trainer(pruning, holder, watch, max_epochs=1).fit(module, loader())
    assert set(watch.counts) == {round(0.7 * 156)}
    assert not pruning.pin.pinned["first.weight"][0].any()
    assert pruning.pin.pinned["first.weight"][1].all()
    assert not torch.equal(module.first.weight[0], before[0])  # which the other one holds, if it does


def test_where_other_callbacks_leave_too_little_less_is_pruned_with_a_warning(trainer: Make) -> None:
    module = net(adamw)
    pruning, holder = PruningCallback("magnitude", 0.9, scope="layer", when=[0]), Holder(module, slice(None))
    with pytest.warns(UserWarning, match=r"`amount=0\.9` would take weights that others hold: fewer are pruned"):
        trainer(pruning, holder, max_epochs=1).fit(module, loader())
    assert not pruning.pin.pinned["first.weight"].any()
    assert int(pruning.pin.pinned["second.weight"].sum()) == round(0.9 * 72)


def test_units_in_which_another_callback_holds_weights_are_refused(trainer: Make) -> None:
    pytest.importorskip("torch_pruning")
    module = net(adamw)
    pruning, holder = PruningCallback("magnitude", 0.5, level="unit"), Holder(module, slice(1))
    with pytest.raises(MisconfigurationException, match=r"remove units in which \['Holder'\] hold weights"):
        trainer(pruning, holder, Untrained(), max_epochs=1).fit(module, loader())


def test_with_rehearsal_the_saliency_is_of_the_tasks_own_data(trainer: Make) -> None:
    seen: list[Tensor] = []

    def selector(module: Any, batches: Any, parameters: Any) -> Tensors:
        seen.append(torch.cat([y for _, y in batches]))
        return {name: p.detach().abs() for name, p in parameters.items()}

    module, watch, tasks = net(sgd), Watch(), make_tasks((16, 12), val=False)
    callbacks = [RehearsalCallback(16), PruningCallback(selector, 0.7, rounds=2), TaskStream(2), watch]
    trainer(*callbacks).fit(module, datamodule=ContinualDataModule(tasks, batch_size=4))
    assert [len(y) for y in seen] == [2, 16, 12]  # two samples to try it
    assert [sorted(y.unique().tolist()) for y in seen[1:]] == [[0, 1], [2, 3]]
    assert set(watch.counts[8:]) == {round((1 - 0.3**0.5) * 156)}
    assert num_zeros(module) == round(0.7 * 156)


def test_with_ewc_and_rehearsal_a_stream_resumes_to_the_bit(tmp_path: Path) -> None:
    def make() -> list[L.Callback]:
        pruning = PruningCallback("obd-sd", 0.6, rounds=2)
        return [TaskStream(2), RehearsalCallback(memory=12), pruning, EWCCallback(5.0)]

    *whole, saved = run_stream(tmp_path, make)
    for path in saved[6:-1:9]:
        assert_same(run_stream(tmp_path, make, ckpt=path), whole, path)


# --- What is told -----------------------------------------------------------------------------------------------------


def test_sparsity_is_logged_at_each_round_in_all_and_by_parameter(trainer: Make, tmp_path: Path) -> None:
    pruning = PruningCallback("magnitude", 0.75, when=[0, 1], scope="layer")
    logger = CSVLogger(tmp_path, name="", version="")
    module = net()
    trainer(pruning, max_epochs=2, logger=logger).fit(module, loader(8))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert [(row["step"], row["pruning/sparsity"], row["pruning/sparsity/head.weight"]) for row in rows] == [
        (0, 0.5, 0.5),
        (2, 0.75, 0.75),
    ]


def test_progress_is_shown_while_data_are_read(trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = PruningCallback("obd-sd", 0.5)
    trainer(pruning, TQDMProgressBar(), max_epochs=1, enable_progress_bar=True).fit(net(), loader())
    assert "Pruning, round 1 of 1" in capsys.readouterr().out


def test_num_samples_are_read_and_no_more(trainer: Make) -> None:
    seen: list[int] = []

    def selector(module: Any, batches: Any, parameters: Any) -> Tensors:
        seen.append(sum(len(x) for x, _ in batches))
        return {name: p.detach().abs() for name, p in parameters.items()}

    trainer(PruningCallback(selector, 0.5, num_samples=10), max_epochs=1).fit(net(), loader())
    assert seen == [2, 10]


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 1.0}, r"`amount` must lie in \[0, 1\), but got 1\.0\. Pass the share"),
        ({"amount": -0.1}, r"`amount` must lie in \[0, 1\), but got -0\.1"),
        ({"amount": math.nan}, r"`amount` must lie in \[0, 1\), but got nan"),
        (
            {"selector": "largest"},
            r"`selector` must be one of \('random', .*'merge'\) or a function, but got 'largest'",
        ),
        ({"selector": "merge"}, r"`selector='merge'` scores whole units, but .* Pass `level='unit'`, or one of"),
        ({"selector": "dropout-damage"}, r"`selector='dropout-damage'` scores whole units"),
        ({"level": "layer"}, r"`level` must be one of \('parameter', 'unit'\), but got 'layer'"),
        ({"scope": "local"}, r"`scope` must be one of \('global', 'layer'\), but got 'local'"),
        ({"statistic": "mad"}, r"`statistic` must be one of \('sd', 'rms', 'variance'\), but got 'mad'"),
        ({"schedule": "linear"}, r"`schedule` must be .*, but got 'linear'"),
        ({"rounds": 0}, r"`rounds` must be at least 1, but got 0"),
        ({"rounds": 3, "when": [0, 1]}, r"`rounds` must be the 2 epochs of `when`, but got 3\. Leave it out"),
        ({"num_samples": 0}, r"`num_samples` must be at least 1, but got 0"),
        ({"min_units": 0}, r"`min_units` must be at least 1, but got 0"),
        *(
            ({"when": when}, r"`when` must be 'task_end', a list of epochs that rise .*, but got ")
            for when in ("epoch_end", [], [2, 1], [-1, 0], [0.5], {"every_n_steps": 0}, {"every": 3}, 100)
        ),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningCallback(**arguments)


class Untrained(L.Callback):
    """Fails if anything was trained."""

    def on_train_batch_end(self, *args: Any) -> None:
        pytest.fail("it has trained")


def wrong_shape(module: Any, batches: Any, parameters: Any) -> Tensors:
    return {name: torch.zeros(2) for name in parameters}


def wrong_name(module: Any, batches: Any, parameters: Any) -> Tensors:
    return {"weight": torch.zeros(2)}


def not_a_number(module: Any, batches: Any, parameters: Any) -> Tensors:
    return {name: torch.full_like(p, torch.nan) for name, p in parameters.items()}


@pytest.mark.parametrize("level", ["parameter", "unit"])
@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (wrong_shape, r"The saliency of 'first\.weight' must have the parameter's shape \(12, 4\), but has \(2,\)"),
        (
            wrong_name,
            r"A selector must return the saliency of the parameters that are pruned, .* misses 'first\.weight'",
        ),
        (not_a_number, r"Saliency must not be NaN, but that of 'first\.weight' is in 48 places"),
    ],
)
def test_what_a_function_returns_is_checked_before_training(
    trainer: Make, selector: Any, message: str, level: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(PruningCallback(selector, level=level), Untrained(), max_epochs=1).fit(net(), loader())


def test_a_layer_that_would_be_pruned_to_nothing_is_named(trainer: Make) -> None:
    pruning = PruningCallback("magnitude", 0.987, scope="layer")
    with pytest.raises(ValueError, match=r"'head\.weight' would lose all of its 36: pruning a layer to nothing"):
        trainer(pruning, Untrained(), max_epochs=1).fit(net(), loader())

    def selector(module: Any, batches: Any, parameters: Any) -> Tensors:
        return {name: torch.full_like(p, float(name != "head.weight")) for name, p in parameters.items()}

    module = net()
    pruning = PruningCallback(selector, 0.5)
    with pytest.raises(ValueError, match=r"'head\.weight' would lose all of its 36.* Lower `amount`, or pass `scope="):
        trainer(pruning, max_epochs=1).fit(module, loader())
    assert num_zeros(module) == 0
    assert not pruning.pin
    assert pruning.rounds_made == 0


def test_a_pattern_that_names_nothing_is_named_before_training(trainer: Make) -> None:
    pruning = PruningCallback(parameters=["first.*", "norm.*"])
    with pytest.raises(ValueError, match=r"`parameters` has the pattern 'norm\.\*', which names none of the weights"):
        trainer(pruning, Untrained(), max_epochs=1).fit(net(), loader())


def test_a_module_without_units_is_told_so_before_training(trainer: Make) -> None:
    pruning = PruningCallback("magnitude", level="unit", parameters="head.*")
    with pytest.raises(ValueError, match="Pruning units needs a layer whose units can be removed, but no hidden layer"):
        trainer(pruning, Untrained(), max_epochs=1).fit(net(), loader())


def test_units_that_nothing_can_be_merged_into_are_told_before_training(trainer: Make) -> None:
    class Depthwise(Net):
        def __init__(self, make_optimizer: Any = None) -> None:
            super().__init__(make_optimizer)
            self.first, self.second = nn.Conv1d(1, 12, 4), nn.Conv1d(12, 12, 1, groups=12)  # type: ignore[assignment]
            self.head = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x[:, None])).flatten(1))

    pruning = PruningCallback("merge", 0.5, level="unit", parameters="first.*")
    with pytest.raises(ValueError, match=r"Pruning units needs .* but "):
        trainer(pruning, Untrained(), max_epochs=1).fit(net(kind=Depthwise), loader())


def test_a_module_without_logits_is_told_so_before_training(trainer: Make) -> None:
    class Embeds(Net):
        def forward(self, x: Tensor) -> Any:
            return {"embedding": super().forward(x)}

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0])["embedding"], batch[1])

    with pytest.raises(ValueError, match=r"needs logits of shape .* Pass `logits`"):
        trainer(PruningCallback("obd"), Untrained(), max_epochs=1).fit(net(kind=Embeds), loader())
    pruning = PruningCallback("obd", 0.5, logits=lambda module, batch: module(batch[0])["embedding"])
    trainer(pruning, max_epochs=1).fit(net(kind=Embeds), loader())
    assert pruning.sparsity == 0.5


@pytest.mark.parametrize("arguments", [{"selector": "obd"}, {"level": "unit"}], ids=str)
def test_a_batch_whose_first_part_the_module_does_not_take_is_told_before_training(
    trainer: Make, arguments: Any
) -> None:
    class ByName(Net):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    data = DataLoader([{"x": x, "y": y} for x, y in samples()], 4)
    with pytest.raises(ValueError, match=r"calls the module with the first part .* got TypeError: .* Pass `logits=`"):
        trainer(PruningCallback(**arguments), Untrained(), max_epochs=1).fit(net(kind=ByName), data)


def test_manual_optimization_needs_a_loss(trainer: Make) -> None:
    with pytest.raises(MisconfigurationException, match=r"PruningCallback\('obd-sd'\)` takes the loss .* Pass `loss=`"):
        trainer(PruningCallback(), Untrained(), max_epochs=1).fit(net(kind=InTwo), loader())
    trainer(PruningCallback("obd", 0.5), max_epochs=1).fit(net(kind=InTwo), loader())


@pytest.mark.filterwarnings("ignore:.*Your `IterableDataset` has `__len__` defined")
def test_data_that_cannot_be_read_anew_are_refused_unless_they_need_not_be(trainer: Make) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples(8))

    with pytest.raises(TypeError, match="The data set must be map-style"):
        trainer(PruningCallback(), Untrained(), max_epochs=1).fit(net(), DataLoader(Endless(), 4))
    for level in ("parameter", "unit"):
        pruning = PruningCallback("magnitude", 0.5, level=level)  # type: ignore[arg-type]
        trainer(pruning, max_epochs=1).fit(net(), DataLoader(Endless(), 4))
        assert pruning.rounds_made == 1


def test_a_checkpoint_of_another_architecture_is_named_before_training(trainer: Make) -> None:
    module, pruning = net(), PruningCallback("magnitude", 0.5)
    trainer(pruning, max_epochs=1).fit(module, loader())
    other = net()
    other.head = nn.Linear(5, 6)
    with pytest.raises(ValueError, match=r"'head\.weight' is pinned with shape \(6, 6\), but has shape \(6, 5\)"):
        trainer(pruning, Untrained(), max_epochs=1).fit(other, loader())
    other.head = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Parameter 'head\.weight' is pinned, but the module has it no more"):
        trainer(pruning, Untrained(), max_epochs=1).fit(other, loader())


def test_the_strategy_is_asked_before_training(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_host, "require_visible_gradients", lambda trainer, who: asked.append(who))
    trainer(PruningCallback(), fast_dev_run=True).fit(net(), loader())
    assert asked == ["PruningCallback"]


def test_without_torch_pruning_units_are_refused_before_training(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"This needs `torch_pruning`.*lightning-continual\[prune\]"):
        trainer(PruningCallback(level="unit"), Untrained(), max_epochs=1).fit(net(), loader())


def test_scattered_zeros_cannot_be_compacted(trainer: Make) -> None:
    with pytest.raises(
        ValueError, match=r"`compact` takes away units; zeros of `level='parameter'` lie scattered in all"
    ):
        PruningCallback().compact(net())


def test_a_selector_of_units_scores_no_weights() -> None:
    evidence = selectors.Evidence(list, nn.Identity(), nn.Module.__call__, torch.Generator())
    with pytest.raises(ValueError, match=r"`selector` must be one of \('random', .* to score weights, but got 'merge'"):
        selectors.weight_saliency("merge", nn.Linear(1, 1), {}, evidence)


# --- On real data -----------------------------------------------------------------------------------------------------


class Fashion(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)


class AtOnce(TensorDataset):
    """Reads a batch by one index."""

    def __getitems__(self, places: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(places)]


def fashion(folder: Path, part: str) -> AtOnce:
    def read(kind: str, header: int) -> Tensor:
        content = (folder / "FashionMNIST" / "raw" / f"{part}-{kind}-ubyte").read_bytes()[header:]
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    x, y = read("images-idx3", 16).view(-1, 784).float() / 255, read("labels-idx1", 8).long()
    return AtOnce((x - 0.286) / 0.353, y)


@pytest.mark.slow
def test_on_fashion_mnist_obd_sd_prunes_better_than_obd_and_magnitude(trainer: Make, real_data: Path) -> None:
    (x, y), whole = fashion(real_data, "t10k").tensors, fashion(real_data, "train")
    train = AtOnce(*(part[:30_000] for part in whole.tensors))
    scores: dict[tuple[str, float], list[float]] = {}

    def fit(module: Fashion, *callbacks: L.Callback, seed: int, epochs: int) -> float:
        L.seed_everything(seed, verbose=False)
        data = DataLoader(train, 128, shuffle=True, collate_fn=tuple)
        trainer(*callbacks, max_epochs=epochs).fit(module, data)
        with torch.no_grad():
            return 100 * float((module(x).argmax(1) == y).double().mean())

    for seed in range(5):
        L.seed_everything(seed, verbose=False)
        module = Fashion()
        scores.setdefault(("dense", 0.0), []).append(fit(module, seed=seed, epochs=4))
        trained = copy_of(module)
        for amount in (0.95, 0.98):
            for selector in ("magnitude", "obd", "obd-sd"):
                module.load_state_dict(trained)
                pruning = PruningCallback(selector, amount, when=[0], num_samples=10_000)  # type: ignore[arg-type]
                score = fit(module, pruning, seed=100 + seed, epochs=1)
                scores.setdefault((selector, amount), []).append(score)
                weights = torch.cat([p.flatten() for p in module.parameters() if p.ndim > 1])
                assert int((weights == 0).sum()) == round(amount * len(weights))

    def error(values: list[float]) -> float:
        return statistics.stdev(values) / len(values) ** 0.5

    table = [f"{key}: {statistics.mean(values):.2f} ± {error(values):.2f}" for key, values in scores.items()]
    for amount in (0.95, 0.98):
        for other in ("obd", "magnitude"):
            gains = [a - b for a, b in zip(scores["obd-sd", amount], scores[other, amount], strict=True)]
            assert statistics.mean(gains) > error(gains), (other, amount, gains, table)
