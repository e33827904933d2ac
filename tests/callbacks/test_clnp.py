"""CLNP in training: what old tasks give stays the same to the bit; what it costs; what it finds; what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_continual.callbacks.accuracy_matrix import AccuracyMatrixCallback
from lightning_continual.callbacks.clnp import CLNPCallback
from lightning_continual.callbacks.ewc import EWCCallback
from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.callbacks.rehearsal import RehearsalCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.heads import TaskHead
from lightning_continual.parameters import evaluating
from lightning_continual.stream import ContinualCallback, TaskStream, restore
from lightning_continual.tasks import Task, permute_pixels, split_by_class

pytestmark = [
    pytest.mark.filterwarnings("ignore:`CLNPCallback` has no free units"),
    pytest.mark.filterwarnings("ignore:`CLNPCallback` found no threshold"),
    pytest.mark.filterwarnings("ignore:`CLNPCallback` lost more than"),
]


class Block(nn.Module):
    """The basic block of a ResNet-18."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity()
        if stride > 1 or inputs != width:
            self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.short(x))


def body_of(kind: str) -> tuple[nn.Module, int]:
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()), 16
    if kind == "cnn":
        first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)
        return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()), 8
    stem = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
    blocks = Block(6, 6, 1), Block(6, 6, 1), Block(6, 10, 2), Block(10, 10, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 10


class Network(L.LightningModule):
    def __init__(self, kind: str = "mlp", optimizer: str = "sgd", *, masked: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.body, width = body_of(kind)
        self.head = nn.Linear(width, 6) if plain else TaskHead(width, 2, num_tasks=3, masked=masked)
        self.numbered = masked or plain
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y if self.numbered else y % 2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == (y if self.numbered else y % 2)).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)
        make = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return make(self.parameters(), lr=0.01, weight_decay=0.05)


def images(num_tasks: int = 3, number: int = 48) -> list[Task]:
    """Images of two classes a task, which a line through them tells apart."""
    generator, tasks = torch.Generator().manual_seed(1), []
    for task in range(num_tasks):
        parts = []
        for _ in range(3):
            y = torch.arange(number) % 2 + 2 * task
            x = torch.randn(number, 1, 6, 6, generator=generator)
            x[torch.arange(number), 0, task] += 2.0 * (y % 2)[:, None]
            parts.append(TensorDataset(x, y))
        tasks.append(Task(*parts, classes=(2 * task, 2 * task + 1)))
    return tasks


def stream(**options: Any) -> ContinualDataModule:
    return ContinualDataModule(images(), **{"batch_size": 12, **options})


class Logits(ContinualCallback):
    """Keeps the logits of every task on its test data right after its own training, and the weights then."""

    def __init__(self, clnp: CLNPCallback, tasks: list[Task] | None = None) -> None:
        super().__init__()
        self.clnp = clnp
        self.tasks = tasks or images()
        self.logits: dict[int, Tensor] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def of(self, module: nn.Module, task: int) -> Tensor:
        x = torch.stack([one for one, _ in self.tasks[task].test])
        with torch.no_grad(), self.clnp.as_task(module, task):
            return module(x.to(next(module.parameters()).dtype))

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.logits[task] = self.of(pl_module, task)
        self.weights[task] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def require_same(self, module: nn.Module) -> None:
        assert len(self.logits) == len(self.tasks)
        for task, logits in self.logits.items():
            assert torch.equal(self.of(module, task), logits), f"task {task}"
        first, last = self.weights[0], self.weights[len(self.tasks) - 1]
        assert any(not torch.equal(first[name], value) for name, value in last.items() if "body" in name)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "logits": dict(self.logits), "weights": dict(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.logits, self.weights = dict(state_dict["logits"]), dict(state_dict["weights"])


THRESHOLDS: dict[str, dict[str, float]] = {
    "mlp": {"*": 0.3},
    "cnn": {"body.0": 0.75, "*": 0.15},
    "resnet": {"body.0": 0.31, "*": 0.1},
}


def clnp(kind: str = "mlp", **options: Any) -> CLNPCallback:
    return CLNPCallback(**{"threshold": THRESHOLDS[kind], "l1": 1e-3, **options})


def require_some_of_each(callback: CLNPCallback) -> None:
    """What is tested must be there: units of the first task, and free ones for the second."""
    first = [one for one in callback.learnt.counts if one.task == 0]
    assert all(one.new > 0 for one in first), first
    assert sum(one.free for one in first) >= 4, first
    assert sum(one.new for one in callback.learnt.counts if one.task == 1) > 0


# --- Zero deterioration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", pytest.param("resnet", marks=pytest.mark.slow)])
def test_old_tasks_logits_stay_the_same_to_the_bit(
    trainer: Callable[..., L.Trainer], kind: str, optimizer: str
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, optimizer), clnp(kind)
    logits = Logits(method)
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mlp", {"precision": "bf16-mixed", "gradient_clip_val": 0.1}),
        ("cnn", {"precision": "bf16-mixed", "accumulate_grad_batches": 3}),
        ("resnet", {"precision": "bf16-mixed", "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ("cnn", {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        ("mlp", {"precision": "64-true"}),
    ],
    ids=str,
)
def test_so_they_do_in_other_precisions_clipped_and_accumulated(
    trainer: Callable[..., L.Trainer], kind: str, options: dict[str, Any]
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, "adamw"), clnp(kind)
    logits = Logits(method)
    trainer(TaskStream(2), method, logits, **options).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)


def test_so_they_do_in_half_precision_with_steps_that_overflow(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    module, method = Network("cnn"), clnp("cnn")
    logits = Logits(method)
    trainer(TaskStream(2), method, logits, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]).fit(
        module, datamodule=stream()
    )
    logits.require_same(module)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_so_they_do_beside_ewc_and_rehearsal(trainer: Callable[..., L.Trainer], kind: str, order: int) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, "sgd"), clnp(kind)
    logits = Logits(method)
    methods = [method, EWCCallback(10.0), RehearsalCallback(20)][::order]
    trainer(TaskStream(2), *methods, logits, gradient_clip_val=0.5).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)


@pytest.mark.parametrize("plain", [False, True], ids=["masked head", "one output layer"])
def test_so_they_do_with_labels_numbered_through_all_tasks(trainer: Callable[..., L.Trainer], plain: bool) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(masked=True, plain=plain), clnp()
    logits = Logits(method)
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)
    for task, kept in logits.logits.items():
        assert (~kept.isinf()).all(0).nonzero().flatten().tolist() == [2 * task, 2 * task + 1]


def shared(**options: Any) -> CLNPCallback:
    """One that cuts deep, shares the units out among three tasks, and retrains."""
    deep = {"threshold": None, "tolerance": 0.02, "measure": "influence", "num_tasks": 3, "retrain_epochs": 2}
    return clnp(**{**deep, **options})


class Zeros(ContinualCallback):
    """Says at each task's end whether what is pruned is zero."""

    def __init__(self, pruning: PruningCallback) -> None:
        super().__init__()
        self.pruning = pruning
        self.found: list[bool] = []

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        parameters = dict(pl_module.named_parameters())
        pinned = self.pruning.pin.pinned
        self.found.append(not any(bool(parameters[name][zeros].any()) for name, zeros in pinned.items()))


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
@pytest.mark.parametrize("when", ["task_end", {"every_n_steps": 5}], ids=["at ends", "by steps"])
@pytest.mark.parametrize("retrains", [False, True], ids=["cut", "retrained"])
def test_so_they_do_beside_pruning_whose_zeros_stay_zero(
    trainer: Callable[..., L.Trainer], order: int, when: Any, retrains: bool
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network("mlp", "adamw"), shared(threshold=0.05) if retrains else clnp()
    pruning = PruningCallback("magnitude", 0.2, rounds=3, when=when)
    logits, zeros = Logits(method), Zeros(pruning)
    trainer(TaskStream(2), *[method, pruning][::order], zeros, logits).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)
    assert pruning.rounds_made == 3
    assert pruning.sparsity == pytest.approx(0.2, abs=0.01)
    assert zeros.found == [True] * 3


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_so_they_do_where_what_is_kept_is_retrained_after_a_deep_cut(
    trainer: Callable[..., L.Trainer], kind: str, optimizer: str
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, optimizer), shared(threshold=0.0)
    logits = Logits(method)
    trainer(TaskStream(2), method, logits, gradient_clip_val=0.5).fit(module, datamodule=stream())
    logits.require_same(module)
    counts = method.learnt.counts
    assert all(one.new == (one.free + one.new) // (3 - one.task) for one in counts if one.task < 2)  # an even share
    assert all(one.new > 0 for one in counts)


@pytest.mark.parametrize("comes_first", [True, False], ids="average_first={}".format)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_so_they_do_where_averages_take_the_place_of_weights(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str, comes_first: bool
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, "adamw"), clnp(kind)
    logits, average = Logits(method), EMAWeightAveraging(decay=0.9)
    order = [average, method] if comes_first else [method, average]
    fit = trainer(TaskStream(2), *order, logits, num_sanity_val_steps=0)
    fit.fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)
    if comes_first:
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        restore(tmp_path / "deployed.ckpt", deployed := Network(kind), [])
        logits.require_same(deployed)


def test_the_score_before_the_cut_is_that_of_the_weights_and_not_of_their_average(
    trainer: Callable[..., L.Trainer],
) -> None:
    L.seed_everything(3, verbose=False)
    found: list[float] = []

    class Score(ContinualCallback):
        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            x, y = next(iter(DataLoader(data.tasks[task].val, 1000)))
            with torch.no_grad(), evaluating(pl_module):
                found.append(float((pl_module(x).argmax(1) == y % 2).float().mean()))

    module, method, data = Network("mlp", "adamw"), clnp(threshold=None, tolerance=0.05), stream()
    average = EMAWeightAveraging(decay=0.999)  # far behind
    trainer(TaskStream(2), average, Score(), method, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert [one["before"] for one in method.learnt.searches.values()] == pytest.approx(found)


@pytest.mark.parametrize("average", ["SWA", "EMA"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_so_they_do_in_one_fit_a_task_each_of_which_ends_with_an_average(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str, average: str
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, "adamw"), shared(threshold=0.0, retrain_epochs=0)
    logits, data = Logits(method), stream()
    for task in range(3):
        if task > 0:  # as in another process, from what was deployed
            restore(tmp_path / "deployed.ckpt", module := Network(kind, "adamw"), [method, logits])
        data.current_task = task
        swa = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
        first = swa if average == "SWA" else EMAWeightAveraging(decay=0.9)
        fit = trainer(first, method, logits, max_epochs=3, num_sanity_val_steps=0)
        fit.fit(module, datamodule=data)
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        assert len(logits.logits) == task + 1
    logits.require_same(module)
    assert all(one.new > 0 for one in method.learnt.counts)


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("step", [8, 11], ids="step={}".format)  # of 4 a epoch, 2 epochs a task: boundary, in a task
@pytest.mark.parametrize("how", ["threshold", "searched", "retrained"])
def test_so_they_do_over_a_resume_which_changes_nothing(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str, step: int, how: str
) -> None:
    def method() -> CLNPCallback:
        if how == "retrained":
            return shared()
        return clnp(threshold=None, tolerance=0.05) if how == "searched" else clnp(kind)

    L.seed_everything(3, verbose=False)
    whole, first = Network(kind, "adam"), method()
    logits = Logits(first)
    trainer(TaskStream(2), first, logits, SaveAt(tmp_path / "at", step)).fit(whole, datamodule=stream())
    module, again = Network(kind, "adam"), method()
    others = Logits(again)
    trainer(TaskStream(2), again, others).fit(module, datamodule=stream(), ckpt_path=tmp_path / "at", weights_only=True)
    others.require_same(module)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in whole.state_dict().items())
    assert again.learnt.counts == first.learnt.counts
    assert again.learnt.searches == first.learnt.searches


def test_what_takes_time_at_the_boundary_shows_a_bar(
    trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = TQDMProgressBar(refresh_rate=1)
    trainer(TaskStream(1), shared(), bar, enable_progress_bar=True).fit(Network(), datamodule=stream())
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    for title in ("Activities of task 0", "Graceful forgetting of task 1", "Retraining what task 2 keeps"):
        assert title in printed


class Shrinking(Network):
    """Writes to its weights after each batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for parameter in self.body.parameters():
                parameter.mul_(0.999)


def test_so_they_do_where_the_module_writes_to_its_weights(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Shrinking("mlp"), shared(threshold=0.05)
    logits = Logits(method)
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    logits.require_same(module)


class BrokenOffError(RuntimeError):
    pass


class Breaking(Network):
    """Breaks in a training step, of 8 in a task."""

    def __init__(self, *args: Any, step: int) -> None:
        super().__init__(*args)
        self.steps_left = step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps_left -= 1
        if self.steps_left == 0:
            raise BrokenOffError
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint available)")
@pytest.mark.parametrize("step", [9, 13], ids="step={}".format)
def test_broken_off_in_retraining_and_resumed_it_ends_as_if_it_had_not_been(
    trainer: Callable[..., L.Trainer], tmp_path: Path, step: int
) -> None:
    L.seed_everything(3, verbose=False)
    whole, first = Network("cnn", "adam"), shared()
    trainer(TaskStream(2), first).fit(whole, datamodule=stream())
    L.seed_everything(3, verbose=False)
    with pytest.raises(BrokenOffError):
        trainer(TaskStream(2), shared(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True).fit(
            Breaking("cnn", "adam", step=step), datamodule=stream()
        )
    module, again = Network("cnn", "adam"), shared()
    path = tmp_path / "on_exception.ckpt"
    trainer(TaskStream(2), again).fit(module, datamodule=stream(), ckpt_path=path, weights_only=True)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in whole.state_dict().items())
    assert again.learnt.counts == first.learnt.counts


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_so_they_do_in_one_fit_a_task_each_from_the_deployed_checkpoint(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str
) -> None:
    L.seed_everything(3, verbose=False)
    deployed, kept = tmp_path / "deployed.ckpt", {}
    for task, data in enumerate(images()):
        module, method = Network(kind, "adamw"), clnp(kind)
        logits = Logits(method)
        if task > 0:
            restore(deployed, module, [method, logits])
        fit = trainer(method, logits, max_epochs=2)
        fit.fit(module, DataLoader(data.train, 12, shuffle=True), DataLoader(data.val, 12))
        fit.save_checkpoint(deployed)
        assert module.head.task == task
        kept[task] = method.free_units()
    logits.require_same(module)
    assert all(kept[0][layer] >= kept[1][layer] >= kept[2][layer] for layer in kept[0])


class Keep(L.Callback):
    def __init__(self, path: Path, logits: Logits) -> None:
        self.path, self.logits = path, logits

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logits.require_same(pl_module)
        state = {"active": self.logits.clnp.learnt.active, "weights": pl_module.state_dict()}
        torch.save({**state, "hidden": self.logits.clnp.learnt.searches}, f"{self.path}-{trainer.global_rank}")


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("how", ["threshold", "searched", "retrained"])
def test_two_processes_keep_the_same_units_and_forget_nothing(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str, how: str
) -> None:
    L.seed_everything(3, verbose=False)
    module = Network(kind, "sgd")
    searched = how != "threshold"
    method = clnp(threshold=None, tolerance=0.05, passes=6) if searched else clnp(kind)
    method = shared() if how == "retrained" else method
    logits = Logits(method)
    options = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}
    if not searched:
        options["limit_val_batches"] = 0  # in which processes would come to share their statistics
    trainer(TaskStream(2), method, logits, Keep(tmp_path / "of", logits), **options).fit(
        module, datamodule=stream(batch_size=6)
    )
    one, two = (torch.load(f"{tmp_path}/of-{rank}") for rank in range(2))
    assert one["hidden"] == two["hidden"]
    assert all(torch.equal(value, two["active"][name]) for name, value in one["active"].items())
    of_processes = [name for name in one["weights"] if "running" in name or "num_batches" in name]
    assert all(
        torch.equal(one["weights"][name], two["weights"][name])
        for name in module.state_dict()
        if name not in of_processes
    )
    for layer, norm in {"body.0": "body.1", "body.5": "body.6"}.items() if kind == "cnn" else ():
        active, name = one["active"][layer], f"{norm}.running_mean"
        assert active.any()
        assert torch.equal(one["weights"][name][active], two["weights"][name][active])


def test_without_the_statistics_of_batch_norms_they_would_not(
    trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_continual.capacity.hold.hold_statistics", lambda *args: [])
    monkeypatch.setattr("lightning_continual.capacity.Hold.put_back_", lambda *args: None)
    L.seed_everything(3, verbose=False)
    module, method = Network("cnn"), clnp("cnn")
    logits = Logits(method)
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    with pytest.raises(AssertionError, match="task 0"):
        logits.require_same(module)


def test_new_tasks_are_learnt_on_top_of_the_old_ones(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network("mlp", "adam"), clnp(threshold=None, tolerance=0.05, passes=6)
    matrix = AccuracyMatrixCallback("val_acc", verbose=False)
    data = ContinualDataModule(images(number=120), batch_size=12)
    trainer(TaskStream(8), method, matrix).fit(module, datamodule=data)
    R = matrix.matrix.compute()
    assert bool((R.diag() > 0.85).all()), R
    assert all(torch.equal(R[task:, task], R[task, task].expand(3 - task)) for task in range(3))


# --- What it finds ----------------------------------------------------------------------------------------------------


class Planted(L.Callback):
    """Makes, before the boundary, one unit dead and one of great use."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            layer = pl_module.body[1]
            layer.weight[3] = 0.0
            layer.bias[3] = -1.0
            layer.bias[5] = 10.0


@pytest.mark.parametrize("threshold", [0.0, None], ids="threshold={}".format)
def test_a_planted_dead_unit_is_free_and_a_live_one_is_not(
    trainer: Callable[..., L.Trainer], threshold: float | None
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(), clnp(threshold=threshold)
    data = ContinualDataModule(images(1), batch_size=12)
    trainer(Planted(), TaskStream(1), method).fit(module, datamodule=data)
    assert not method.learnt.active["body.1"][3]
    assert method.learnt.active["body.1"][5]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_score_falls_by_no_more_than_the_tolerance_and_a_larger_one_frees_no_less(
    trainer: Callable[..., L.Trainer], kind: str
) -> None:
    class Score(L.Callback):
        def __init__(self) -> None:
            self.scores: list[float] = []

        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            pl_module.eval()
            x, y = (torch.stack(parts) for parts in zip(*data.tasks[task].val, strict=True))
            self.scores.append(float((pl_module(x).argmax(1) == y % 2).float().mean()))
            pl_module.train()

    free = []
    for tolerance in (0.0, 0.05, 0.2):
        L.seed_everything(3, verbose=False)
        data = ContinualDataModule(images(1, number=240), batch_size=12)
        module, method = Network(kind), CLNPCallback(tolerance, l1=1e-3)
        before, after = Score(), Score()
        trainer(TaskStream(4), before, method, after).fit(module, datamodule=data)
        assert before.scores[0] - after.scores[0] <= tolerance + 1e-6
        if "after" in method.learnt.searches[0]:
            assert math.isclose(method.learnt.searches[0]["after"], after.scores[0], rel_tol=1e-5)
        assert math.isclose(method.learnt.searches[0]["before"], before.scores[0], rel_tol=1e-5)
        free.append(sum(method.free_units().values()))
    assert free == sorted(free)
    assert free[-1] > free[0]


@pytest.mark.parametrize("batches", [3, 8, 11], ids="batches={}".format)
@pytest.mark.parametrize("passes", [2, 3], ids="passes={}".format)
@pytest.mark.parametrize("validates", [True, False], ids="validates={}".format)
def test_the_boundary_costs_its_passes_and_no_more(
    trainer: Callable[..., L.Trainer], batches: int, passes: int, validates: bool
) -> None:
    class Counting(Network):
        forwards = 0
        calls = 0
        samples = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += len(x)
            return super().forward(x)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.calls += 1
            self.samples += len(batch[0])
            super().validation_step(batch, batch_idx)

    class Boundary(L.Callback):
        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            if not hasattr(pl_module, "counted"):
                pl_module.counted = pl_module.calls, pl_module.samples, pl_module.forwards
            else:
                before = pl_module.counted
                pl_module.cost = [
                    now - then
                    for now, then in zip((pl_module.calls, pl_module.samples, pl_module.forwards), before, strict=True)
                ]

    L.seed_everything(3, verbose=False)
    task, val = images(1, number=60)[0], images(1, number=12 * batches - 5)[0].val
    data = ContinualDataModule([Task(task.train, val)], batch_size=12)
    module = Counting()
    method, options = clnp(threshold=None, passes=passes), {} if validates else {"check_val_every_n_epoch": 2}
    trainer(TaskStream(1), Boundary(), method, Boundary(), **options).fit(module, datamodule=data)
    calls, samples, forwards = module.cost
    assert calls <= passes * batches
    assert samples <= passes * len(val)
    assert forwards - samples == len(task.train)


def test_thresholds_and_l1_may_differ_by_layer(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module = Network()
    method = clnp(threshold={"body.1": math.inf, "*": 0.0}, l1={"body.1": 10.0, "body.3": 0.0})
    start = copy.deepcopy(module)
    trainer(TaskStream(1), method).fit(module, datamodule=ContinualDataModule(images(1), batch_size=48))
    assert method.free_units()["body.1"] == 24
    assert method.free_units()["body.3"] < 16
    plain = copy.deepcopy(start)
    trainer(TaskStream(1)).fit(plain, datamodule=ContinualDataModule(images(1), batch_size=48))
    other = clnp(threshold=math.inf, l1={"body.1": 10.0})
    penalised = copy.deepcopy(start)
    trainer(TaskStream(1), other).fit(penalised, datamodule=ContinualDataModule(images(1), batch_size=48))
    # One step of SGD from the same weights: the gradient differs by α sign(w), that of other layers does not.
    difference = plain.body[1].weight - penalised.body[1].weight
    expected = 0.05 * 1.9 * 10.0 * start.body[1].weight.sign()  # Nesterov's momentum: 1 + 0.9
    torch.testing.assert_close(difference, expected)
    assert torch.equal(plain.body[3].weight, penalised.body[3].weight)
    assert torch.equal(plain.body[1].bias, penalised.body[1].bias)


class Retraining(L.Callback):
    """Keeps the weights where the boundary begins and ends."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.named_parameters()})


def test_retraining_moves_what_the_task_keeps_by_its_loss_alone_and_leaves_what_is_cut(
    trainer: Callable[..., L.Trainer],
) -> None:
    L.seed_everything(3, verbose=False)
    module, data = Network(), ContinualDataModule(images(1), batch_size=48)  # one step an epoch
    method, before, after = clnp(retrain_epochs=1, l1=10.0), Retraining(), Retraining()
    trainer(TaskStream(1), before, method, after).fit(module, datamodule=data)
    active = method.learnt.active
    (start,), (end,) = before.weights, after.weights
    rows, columns = active["body.3"][:, None], active["body.1"][None]
    assert bool((end["body.3.weight"][(rows & ~columns).expand(16, 24)] == 0).all())
    # One step of SGD from what was kept, on the loss without L1, as by hand.
    hand = Network()
    hand.load_state_dict({**start, "body.3.weight": start["body.3.weight"].masked_fill(rows & ~columns, 0.0)})
    hand.head.task = 0
    x, y = whole(data.tasks[0].train)
    optimizer = hand.configure_optimizers()
    nn.functional.cross_entropy(hand(x), y % 2).backward()
    optimizer.step()
    kept = (rows & columns).expand(16, 24)
    assert bool(kept.any())
    torch.testing.assert_close(end["body.3.weight"][kept], hand.body[3].weight.detach()[kept])
    assert bool((end["body.3.weight"][kept] != start["body.3.weight"][kept]).all())
    torch.testing.assert_close(end["head.layers.0.bias"], hand.head.layers[0].bias.detach())


def whole(data: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*(data[place] for place in range(len(data))), strict=True)
    return torch.stack(x), torch.stack(y)


def test_the_score_after_retraining_is_told_and_a_loss_is_warned_of(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network("mlp", "adam"), shared(num_tasks=24, retrain_epochs=0, tolerance=0.0)
    data = ContinualDataModule(images(1, number=120), batch_size=12)
    with pytest.warns(
        UserWarning, match=r"lost more than `tolerance=0\.0` at the end of task 0: the score was .* before"
    ):
        trainer(TaskStream(8), method).fit(module, datamodule=data)
    assert all(one.new == 1 for one in method.learnt.counts)  # of 24 units, and of 16
    (found,) = method.learnt.searches.values()
    L.seed_everything(3, verbose=False)
    module, method = Network("mlp", "adam"), shared(num_tasks=4, retrain_epochs=8)
    trainer(TaskStream(8), method).fit(module, datamodule=data)
    (again,) = method.learnt.searches.values()
    assert again["before"] == found["before"]
    assert again["after"] > found["after"]
    with torch.no_grad(), method.as_task(module, 0):
        x, y = whole(data.tasks[0].val)
        score = float((module(x).argmax(1) == y % 2).float().mean())
    assert math.isclose(again["after"], score, rel_tol=1e-5)


def test_frozen_layers_stay_and_their_units_are_active(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(), clnp(threshold=100.0)
    module.body[1].requires_grad_(False)
    before = module.body[1].weight.clone()
    data = ContinualDataModule(images(1), batch_size=12)
    trainer(TaskStream(1), method).fit(module, datamodule=data)
    assert torch.equal(module.body[1].weight, before)
    assert method.free_units() == {"body.1": 0, "body.3": 16}


def test_free_weights_are_drawn_anew_and_as_before_for_the_same_seed(trainer: Callable[..., L.Trainer]) -> None:
    ends = []
    for seed in (0, 0, 1):
        L.seed_everything(3, verbose=False)
        module, method = Network("cnn"), clnp("cnn", seed=seed)
        trainer(TaskStream(1), method).fit(module, datamodule=ContinualDataModule(images(1), batch_size=12))
        ends.append(module.state_dict())
        free = ~method.learnt.active["body.0"]
        assert bool((module.body[1].running_mean[free] == 0).all())
        assert bool((module.body[1].weight[free] == 1).all())
        assert not (module.body[1].running_mean[~free] == 0).any()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not torch.equal(ends[0]["body.0.weight"], ends[2]["body.0.weight"])


# --- As one task sees it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["task head", "one output layer"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_task_can_be_exported(trainer: Callable[..., L.Trainer], plain: bool, kind: str) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(kind, plain=plain), clnp(kind)
    logits = Logits(method)
    trainer(TaskStream(1), method, logits).fit(module, datamodule=stream())
    x = torch.stack([one for one, _ in logits.tasks[1].test])
    alone = method.export_task(module, 1)
    keys = list(module.state_dict())
    assert torch.equal(alone(x), logits.of(module, 1))
    assert not alone.training
    assert list(module.state_dict()) == keys
    exported = torch.export.export(alone, (x,)).module()
    torch.testing.assert_close(exported(x), logits.of(module, 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(alone(x), logits.logits[1])


def test_seen_as_a_task_it_is_in_evaluation_mode_and_comes_back(trainer: Callable[..., L.Trainer]) -> None:
    module, method = Network("cnn"), clnp("cnn")
    trainer(TaskStream(1), method).fit(module, datamodule=stream())
    module.train()
    module.body[1].eval()
    with method.as_task(module, 0):
        assert not any(one.training for one in module.modules())
        assert module.head.task == 0
    assert module.training
    assert not module.body[1].training
    assert module.head.task == 2
    with (
        pytest.raises(ValueError, match=r"`task` must be one of the tasks learnt, \[0, 1, 2\], but got 3"),
        method.as_task(module, 3),
    ):
        pass


# --- Diagnostics ------------------------------------------------------------------------------------------------------


class Logged:
    """A logger that takes everything."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.tables: list[Any] = []
        self.images: list[str] = []
        self.save_dir = self.name = self.version = self.root_dir = self.log_dir = None
        self.experiment = object()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append({name: value for name, value in metrics.items() if name.startswith("clnp/")})

    def log_table(self, key: str, columns: list[str], data: list[Any]) -> None:
        self.tables.append((key, columns, data))

    def log_image(self, key: str, images: list[Any]) -> None:
        self.images.append(key)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def test_units_are_counted_logged_tabled_and_drawn(trainer: Callable[..., L.Trainer]) -> None:
    pytest.importorskip("matplotlib")
    L.seed_everything(3, verbose=False)
    module, method, logger = Network(), clnp(), Logged()
    trainer(TaskStream(1), method, logger=[logger]).fit(module, datamodule=stream())
    counts = method.learnt.counts
    assert [(one.task, one.layer) for one in counts] == [
        (task, name) for task in range(3) for name in ("body.1", "body.3")
    ]
    assert all(one.total == {"body.1": 24, "body.3": 16}[one.layer] for one in counts)
    assert method.free_units() == {one.layer: one.free for one in counts[-2:]}
    assert method.reused_units()["body.3"] == [counts[place].reused for place in (1, 3, 5)]
    assert int(method.learnt.active["body.1"].sum()) == 24 - method.free_units()["body.1"]
    assert sum(one.new for one in counts if one.layer == "body.1") == 24 - method.free_units()["body.1"]
    logged = [metrics for metrics in logger.metrics if metrics]
    assert [metrics["clnp/body.1/free"] for metrics in logged] == [one.free for one in counts[::2]]
    assert logger.tables[-1][:2] == ("clnp/units", ["task", "layer", "free", "new", "reused", "idle"])
    assert len(logger.tables[-1][2]) == 6
    assert logger.images == ["clnp/units_plot"] * 3
    assert method.table().splitlines()[0].split() == ["task", "layer", "units", "new", "reused", "idle", "free"]
    assert len(method.plot().axes[0].patches) == 4 * 6


def test_a_layer_without_free_units_is_warned_of_before_training(trainer: Callable[..., L.Trainer]) -> None:
    module, method = Network(), CLNPCallback(threshold={"body.1": 0.0, "*": 1.0}, l1=0.0)
    with torch.no_grad():
        module.body[1].bias.fill_(5.0)  # every unit is active
    with pytest.warns(UserWarning, match=r"no free units for task 1 in layers 'body\.1' \(0 of 24\)\. They only"):
        trainer(TaskStream(1), method).fit(module, datamodule=stream())


def test_earlier_tasks_of_which_nothing_is_held_are_warned_of(trainer: Callable[..., L.Trainer]) -> None:
    data = stream()
    data.current_task = 2
    with pytest.warns(
        UserWarning, match=r"not there at the end of tasks \[0, 1\]: nothing of them is held\. If .* `rest"
    ):
        trainer(clnp(), max_epochs=1).fit(Network(), datamodule=data)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_data_module_of_the_users_own_may_have_attributes_of_the_same_names(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Own(L.LightningDataModule):
        num_tasks, tasks = 5, 3

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(images()[0].train, 12)

    method = clnp(classes=[[0, 1]])
    trainer(method, max_epochs=1, limit_val_batches=0).fit(Network(plain=True), datamodule=Own())
    assert method.learnt.outputs == {0: [0, 1]}
    message = r"found none for task 0\. Pass `classes=`"
    with pytest.raises(ValueError, match=message):
        trainer(clnp(), max_epochs=1, limit_val_batches=0).fit(Network(plain=True), datamodule=Own())


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_statistics_of_inputs_are_refused_in_training_and_served_as_they_are_in_evaluation(
    trainer: Callable[..., L.Trainer],
) -> None:
    L.seed_everything(3, verbose=False)
    module, method = Network(), clnp()
    module.body = nn.Sequential(nn.BatchNorm2d(1, affine=False), module.body)
    method.threshold, logits = {"*": 0.3}, Logits(method)
    message = r"Buffer 'body\.0\.running_mean' of layer 'body\.0' \(BatchNorm2d\) changes in training"
    fails(trainer, clnp(), module, stream(), ValueError, message)
    module.body[0].eval()
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    logits.require_same(module)


def test_a_search_that_finds_nothing_is_told(trainer: Callable[..., L.Trainer]) -> None:
    module, method = Network(), clnp(threshold=None, tolerance=0.0, passes=2)
    data = ContinualDataModule(images(1, number=120), batch_size=12)
    with pytest.warns(UserWarning, match=r"no threshold for task 0 that costs at most `tolerance=0\.0`: only dead"):
        trainer(TaskStream(4), method).fit(module, datamodule=data)


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -0.1}, r"`tolerance` must be at least 0 and finite, but got -0\.1"),
        ({"tolerance": math.inf}, r"`tolerance` must be at least 0 and finite, but got inf"),
        ({"l1": -1.0}, r"`l1` must be at least 0 and finite, but got -1"),
        ({"l1": {"*": math.nan}}, r"`l1` must be at least 0 and finite, but got nan"),
        ({"threshold": -1.0}, r"`threshold` must be at least 0, but got -1\.0\. Leave it out to have it searched"),
        ({"threshold": {"a": math.nan}}, r"`threshold` must be at least 0, but got nan"),
        ({"passes": 1}, r"`passes` must be at least 2, but got 1"),
        ({"num_samples": 0}, r"`num_samples` must be at least 1, but got 0"),
        ({"num_tasks": 0}, r"`num_tasks` must be at least 1, but got 0"),
        ({"retrain_epochs": -1}, r"`retrain_epochs` must be at least 0, but got -1"),
        ({"measure": "size"}, r"`measure` must be 'activity' or 'influence', but got 'size'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLNPCallback(**arguments)


def fails(
    trainer: Callable[..., L.Trainer], method: CLNPCallback, module: Any, data: Any, kind: Any, message: str
) -> None:
    """Whether it is refused before the first step."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(kind, match=message):
        trainer(TaskStream(1), method).fit(module, datamodule=data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_without_validation_data_and_threshold_it_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule([Task(one.train, test=one.test, classes=one.classes) for one in images()], batch_size=12)
    message = r"`CLNPCallback` needs validation data, but task 0 has none\. Pass .*`threshold=`"
    fails(trainer, clnp(threshold=None), Network(), data, MisconfigurationException, message)
    trainer(TaskStream(1), clnp()).fit(Network(), datamodule=data)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_nor_without_one_validation_loader(trainer: Callable[..., L.Trainer]) -> None:
    train, val = (DataLoader(one, 12) for one in (images()[0].train, images()[0].val))
    for loaders, found in ((None, 0), ([val, val], 2)):
        with pytest.raises(
            MisconfigurationException, match=rf"validation data, one loader, but found {found}\. Pass it"
        ):
            trainer(clnp(threshold=None), max_epochs=1, limit_val_batches=1.0).fit(Network(), train, loaders)


def test_a_loader_is_found_before_lightning_validates_for_the_first_time(trainer: Callable[..., L.Trainer]) -> None:
    train, val = (DataLoader(one, 12) for one in (images()[0].train, images()[0].val))
    method = clnp(threshold=None)
    trainer(method, max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0).fit(Network(), train, val)
    assert "before" in method.learnt.searches[0]


def test_an_unknown_metric_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    message = r"`CLNPCallback\(monitor='f1'\)` found no such metric; `validation_step` logged \['val_acc'\]"
    fails(trainer, clnp(threshold=None, monitor="f1"), Network(), stream(), MisconfigurationException, message)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(24), r"Layer 'body\.1' \(LayerNorm\) mixes units: .* Use batch norm in its place"),
        (nn.Softmax(1), r"Parameter 'body\.0\.weight' of layer 'body\.0' \(Linear\) makes no units that can be told"),
    ],
    ids=["LayerNorm", "Softmax"],
)
def test_a_layer_that_mixes_units_is_refused(trainer: Callable[..., L.Trainer], layer: nn.Module, message: str) -> None:
    module = Network()
    module.body = nn.Sequential(nn.Linear(36, 24), layer, nn.Linear(24, 16))
    data = ContinualDataModule(images(1), batch_size=12)
    flat = Task(
        TensorDataset(torch.randn(12, 36), torch.arange(12) % 2),
        TensorDataset(torch.randn(12, 36), torch.arange(12) % 2),
    )
    fails(trainer, clnp(), module, ContinualDataModule([flat], batch_size=12), ValueError, message)
    del data


def test_a_module_without_output_layer_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    module = Network(plain=True)
    module.head = nn.Sequential(nn.Linear(16, 6), nn.LogSoftmax(1))
    fails(
        trainer, clnp(), module, stream(), ValueError, r"must have one output layer .* but found none\. Use `TaskHead"
    )


def test_tasks_without_outputs_of_their_own_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    module = Network(plain=True)
    tasks = [Task(one.train, one.val) for one in images()]
    message = (
        r"`classes` must say for each task which of the 6 outputs of 'head' are its own, but found none for task 0"
    )
    fails(trainer, clnp(), module, ContinualDataModule(tasks), ValueError, message)
    message = r"but found none for task 2\. Pass `classes=`"  # more tasks than there are outputs for
    fails(trainer, clnp(classes=[[0, 1], [2, 3]]), module, ContinualDataModule(tasks), ValueError, message)
    message = r"but got \[4, 6\]"
    fails(trainer, clnp(classes=[[0, 1], [2, 3], [4, 6]]), module, ContinualDataModule(tasks), ValueError, message)
    method = clnp(classes=[[0, 1], [2, 3], [1, 4]])
    with pytest.raises(ValueError, match=r"Task 2 must have outputs of its own, but earlier tasks have some of them"):
        trainer(TaskStream(1), method).fit(module, datamodule=ContinualDataModule(tasks, batch_size=12))


def test_more_tasks_than_the_head_has_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule(images(4), batch_size=12)
    fails(
        trainer,
        clnp(),
        Network(),
        data,
        MisconfigurationException,
        r"must be at least 4, the number of tasks, but is 3",
    )


def test_more_tasks_than_units_are_to_last_for_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    message = r"`num_tasks` must be at least 3, for task 2 is to be learnt, but got 2\. Pass the number of all tasks"
    fails(trainer, clnp(num_tasks=2), Network(), stream(), ValueError, message)


def test_patterns_that_name_no_layer_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    for name in ("l1", "threshold"):
        message = rf"`{name}` has the pattern 'boddy\.\*', which names no layer of \['body\.1', 'body\.3'"
        fails(trainer, clnp(**{name: {"boddy.*": 1.0}}), Network(), stream(), ValueError, message)


def test_what_was_learnt_with_other_weights_or_another_network_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    method, data = clnp(), stream()
    trainer(method, max_epochs=1).fit(Network(), datamodule=data)
    data.current_task = 1
    with pytest.raises(ValueError, match=r"Weights of '.*' were cut, and must be zero, but are not"):
        trainer(method, max_epochs=1).fit(Network(), datamodule=data)
    with pytest.raises(
        ValueError, match=r"must have the units that tasks were learnt with, \{'body\.1': 24, .*but has"
    ):
        trainer(method, max_epochs=1).fit(Network("cnn"), datamodule=data)


def test_a_compiled_module_with_batch_norms_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    module = torch.compile(Network("cnn"), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"of which a compiled module does not know\. Train it without"):
        trainer(TaskStream(1), clnp()).fit(module, datamodule=stream())


def test_another_compiled_module_is_served(trainer: Callable[..., L.Trainer]) -> None:
    L.seed_everything(3, verbose=False)
    module, method = torch.compile(Network("mlp"), backend="eager"), clnp()
    logits = Logits(method)
    trainer(TaskStream(2), method, logits).fit(module, datamodule=stream())
    logits.require_same(module)
    require_some_of_each(method)


def test_ddp_that_waits_for_every_gradient_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(Exception, match='Pass `strategy="ddp_find_unused_parameters_true"` to the Trainer'):
        trainer(TaskStream(1), clnp(), devices=2, strategy="ddp_fork").fit(Network(), datamodule=stream())


# --- The user's objects -----------------------------------------------------------------------------------------------


def test_after_the_fit_and_after_an_exception_no_hook_is_left(trainer: Callable[..., L.Trainer]) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                assert any(one._forward_hooks for one in module.modules())
                raise RuntimeError("in the second task")

    module = Network("cnn")
    trainer(TaskStream(1), clnp("cnn")).fit(module, datamodule=stream())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    module = Network("cnn")
    with pytest.raises(RuntimeError, match="in the second task"):
        trainer(TaskStream(1), clnp("cnn"), Fail()).fit(module, datamodule=stream())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_l1_alone_needs_neither_outputs_nor_validation_and_keeps_nothing(trainer: Callable[..., L.Trainer]) -> None:
    method = CLNPCallback(l1=1e-2, threshold=math.inf)
    module = Classifier()
    trainer(TaskStream(1), method).fit(module, datamodule=ContinualDataModule(make_tasks(val=False)))
    assert method.free_units() == {}
    assert (module.net[0].weight == 0).sum() == 0


# --- Real data --------------------------------------------------------------------------------------------------------


def fashion(folder: Path) -> list[Task]:
    datasets = pytest.importorskip("torchvision").datasets
    parts = []
    for train, number in ((True, 8000), (False, 5000)):
        whole = datasets.FashionMNIST(folder, train=train, download=False)
        parts.append(TensorDataset(whole.data[:number, None].float() / 255, whole.targets[:number]))
    return split_by_class(*parts, num_tasks=5)


def small_cnn() -> Network:
    module = Network("mlp", "adam")
    first = (
        nn.Conv2d(1, 16, 5, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )
    module.body = nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 64), nn.ReLU())
    module.head = TaskHead(64, 2, num_tasks=5)
    return module


@pytest.mark.slow
def test_fashion_by_class_is_not_forgotten_and_almost_as_good_as_one_network_a_task(
    trainer: Callable[..., L.Trainer], real_data: Path
) -> None:
    def run(tasks: list[Task], *methods: L.Callback) -> Tensor:
        L.seed_everything(0, verbose=False)
        matrix = AccuracyMatrixCallback("val_acc", split="test", verbose=False, baseline=False)
        data = ContinualDataModule(tasks, batch_size=32, val_fraction=0.15)
        trainer(TaskStream(4), *methods, matrix).fit(small_cnn(), datamodule=data)
        return matrix.matrix.compute()

    tasks = fashion(real_data)
    R = run(tasks, CLNPCallback(0.01, l1={"body.1": 1e-3, "body.4": 1e-3, "head.*": 1e-3, "*": 1e-4}))
    assert all(torch.equal(R[task:, task], R[task, task].expand(5 - task)) for task in range(5))
    alone = [float(run([Task(one.train, test=one.test)])) for one in tasks]
    assert float(R[-1].mean()) > sum(alone) / 5 - 0.02


class Digits(Network):
    """784-400-400-10, a head a task, Adam; the learning rate falls along a cosine."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        first = nn.Flatten(), nn.Linear(784, 400), nn.ReLU()
        self.body = nn.Sequential(*first, nn.Linear(400, 400), nn.ReLU())
        self.head = TaskHead(400, 10, num_tasks=10)
        self.numbered, self.lr = True, lr

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def permuted_digits(folder: Path) -> list[Task]:
    datasets = pytest.importorskip("torchvision").datasets
    parts = []
    for train, number in ((True, 10_000), (False, 2000)):
        whole = datasets.MNIST(folder, train=train, download=False)
        parts.append(TensorDataset(whole.data[:number, None].float() / 255, whole.targets[:number]))
    return permute_pixels(*parts, num_tasks=10, seed=0)


@pytest.mark.slow
def test_ten_permutations_fit_into_400_units_a_layer_and_none_is_forgotten(
    trainer: Callable[..., L.Trainer], real_data: Path
) -> None:
    L.seed_everything(0, verbose=False)
    strengths = {"body.1": 1e-4, "body.3": 1e-4, "head.*": 1e-3}
    method = CLNPCallback(0.001, l1=strengths, measure="influence", num_tasks=10, retrain_epochs=2)
    matrix = AccuracyMatrixCallback("val_acc", split="test", verbose=False, baseline=False)
    data = ContinualDataModule(permuted_digits(real_data), batch_size=128, val_fraction=0.1)
    trainer(TaskStream(1), method, matrix).fit(Digits(lr=1e-2), datamodule=data)
    R = matrix.matrix.compute()
    assert all(torch.equal(R[task:, task], R[task, task].expand(10 - task)) for task in range(10))
    assert all(one.new > 0 for one in method.learnt.counts)
    assert float(R[-1].mean()) > 0.86  # three short epochs a task, of 9000 samples
