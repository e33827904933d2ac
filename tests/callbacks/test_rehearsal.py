"""Rehearsal: which samples every batch is made of, and what is remembered."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lightning_continual import (
    AccuracyMatrixCallback,
    ClassBalancedMemory,
    ContinualDataModule,
    HerdingMemory,
    RehearsalCallback,
    ReservoirMemory,
    Task,
    TaskMemory,
    TaskStream,
    restore,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer` in `LightningModule`"),
]


def numbers(x: Tensor) -> list[int]:
    """Return which samples of `make_tasks` these are: 1000 times the task, plus the place in it."""
    return (x[:, 0] * 1000).round().long().tolist()


def tasks_of(samples: list[int]) -> list[int]:
    return [number // 1000 for number in samples]


def remembered(rehearsal: RehearsalCallback) -> list[int]:
    """Return all samples in a memory, sorted. Draws from the memory's generator."""
    leaves = rehearsal.memory.draw(10**6, before=10**6)
    if not leaves:
        return []
    if rehearsal.reload:  # what is kept are places and tasks
        return sorted((leaves[0] + 1000 * leaves[1]).tolist())
    return sorted(numbers(leaves[0]))


class Seer(Classifier):
    """Notes the batches that it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"dropout": 0.0, **options})
        self.trained: list[tuple[int, list[int]]] = []  # task, samples
        self.validated: list[list[int]] = []
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        task = getattr(self.trainer.datamodule, "current_task", 0)
        self.trained.append((task, numbers(batch[0])))
        self.batches.append([part.clone() for part in batch])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(numbers(batch[0]))
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def in_task(self, task: int) -> list[list[int]]:
        return [samples for where, samples in self.trained if where == task]


@pytest.fixture
def stream(trainer: Callable[..., L.Trainer]) -> Callable[..., Seer]:
    """Train a stream with rehearsal and return the module that saw it."""

    def run(rehearsal: RehearsalCallback, data: ContinualDataModule | None = None, epochs: int = 1, **options: Any):
        torch.manual_seed(1)
        module = options.pop("module", None) or Seer()
        data = data or ContinualDataModule(make_tasks(val=False), batch_size=4)
        trainer(TaskStream(epochs), rehearsal, *options.pop("callbacks", []), **options).fit(module, datamodule=data)
        return module

    return run


# --- The batch --------------------------------------------------------------------------------------------------------


class Gradients(L.Callback):
    """Compares the gradient of every step with that of the two losses, each written by hand."""

    def __init__(self, proportion: float) -> None:
        self.proportion = proportion
        self.compared = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        x, y = pl_module.batches[-1]
        past = torch.tensor(tasks_of(numbers(x))) < trainer.datamodule.current_task
        if not past.any():
            return
        new_loss, past_loss = (nn.functional.cross_entropy(pl_module(x[some]), y[some]) for some in (~past, past))
        loss = (1 - self.proportion) * new_loss + self.proportion * past_loss
        expected = torch.autograd.grad(loss, list(pl_module.parameters()))
        assert_close([p.grad for p in pl_module.parameters()], list(expected))
        self.compared += 1


@pytest.mark.parametrize(("proportion", "mode"), [(0.5, "add"), (0.25, "add"), (0.5, "replace"), (2 / 3, "replace")])
def test_the_gradient_is_that_of_both_losses_in_proportion(
    stream: Callable[..., Seer], proportion: float, mode: Any
) -> None:
    check = Gradients(proportion)
    data = ContinualDataModule(make_tasks((24, 24), val=False), batch_size=6)
    stream(RehearsalCallback(24, proportion, mode=mode), data, callbacks=[check], precision="64-true")
    assert check.compared == 4


@pytest.mark.parametrize(
    ("proportion", "batch_size", "mode", "past", "past_in_rest"),
    [
        (0.5, 4, "add", 4, 2),
        (0.5, 4, "replace", 2, 1),
        (0.25, 4, "add", 1, 1),  # 4/3 and 2/3 of a sample
        (0.25, 4, "replace", 1, 0),
        (0.75, 4, "add", 12, 6),
        (0.75, 4, "replace", 3, 2),
        (0.1, 4, "add", 0, 0),
        (0.9, 4, "replace", 4, 2),
        (0.9, 4, "add", 22, 18),  # of 36 asked for, all there are
        (0.5, 5, "replace", 2, 1),
    ],
)
def test_past_samples_are_counted_by_the_proportion(
    stream: Callable[..., Seer], proportion: float, batch_size: int, mode: Any, past: int, past_in_rest: int
) -> None:
    data = ContinualDataModule(make_tasks((22, 22), val=False), batch_size=batch_size)
    seen = stream(RehearsalCallback(100, proportion, mode=mode), data)
    *full, rest = seen.in_task(1)
    for samples, size, expected in [*((one, batch_size, past) for one in full), (rest, 2, past_in_rest)]:
        assert len(samples) == (size if mode == "replace" else size + expected)
        assert tasks_of(samples) == [1] * (len(samples) - expected) + [0] * expected
        assert len(set(samples)) == len(samples)


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_memory_smaller_than_asked_gives_all_it_has(stream: Callable[..., Seer], mode: Any) -> None:
    seen = stream(RehearsalCallback(3, mode=mode), ContinualDataModule(make_tasks((24, 24), val=False), batch_size=8))
    first, *later = seen.in_task(1)
    assert tasks_of(first) == [1] * (5 if mode == "replace" else 8) + [0] * 3
    # The new task takes places in the memory.
    assert all(tasks_of(samples).count(0) <= 3 for samples in later)


def test_the_first_task_is_left_alone_and_later_ones_rehearse_only_earlier_ones(
    stream: Callable[..., Seer], trainer: Callable[..., L.Trainer]
) -> None:
    seen, plain = stream(RehearsalCallback(100), epochs=2), Seer()
    torch.manual_seed(1)
    data = ContinualDataModule(make_tasks(val=False), batch_size=4)
    trainer(TaskStream(2)).fit(plain, datamodule=data)
    assert seen.in_task(0) == plain.in_task(0)
    for task in (1, 2):
        for samples, new in zip(seen.in_task(task), plain.in_task(task), strict=True):
            assert samples[:4] == new
            assert len(samples) == 8
            assert all(where < task for where in tasks_of(samples[4:]))
    assert set(chain(*(tasks_of(samples[4:]) for samples in seen.in_task(2)))) == {0, 1}


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor
    scale: float = 0.5


def words(y: Tensor) -> list[str]:
    return [f"class {label}" for label in y.tolist()]


STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "tensor": (lambda x, y: x, lambda batch: (batch, None)),
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "named tuple": (Named, lambda batch: (batch.x, batch.y)),
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "dict": (lambda x, y: {"x": x, "y": y, "scale": 0.5}, lambda batch: (batch["x"], batch["y"])),
    "nested": (lambda x, y: {"inputs": [x, (x,)], "y": Named(x, y)}, lambda b: (b["inputs"][1][0], b["y"].y)),
    "dataclass": (Record, lambda batch: (batch.x, batch.y)),
    "strings": (lambda x, y: (x, words(y)), lambda batch: (batch[0], batch[1])),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_any_batch_structure_is_rehearsed(trainer: Callable[..., L.Trainer], structure: str, mode: Any) -> None:
    pack, unpack = STRUCTURES[structure]
    found: list[tuple[list[int], Any]] = []

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = unpack(batch)
            like = pack(x, torch.zeros(len(x)))
            assert type(batch) is type(like)
            if isinstance(batch, dict):
                assert batch.keys() == like.keys()
                assert batch.get("scale") == like.get("scale")
            found.append((numbers(x), y if y is None or isinstance(y, list) else y.tolist()))
            return self(x).sum()

    def collate(samples: list[Any]) -> Any:
        return pack(*default_collate(samples))

    data = ContinualDataModule(make_tasks((8, 8), val=False), batch_size=4, collate_fn=collate)
    trainer(TaskStream(), RehearsalCallback(8, mode=mode)).fit(Module(), datamodule=data)
    assert [len(samples) for samples, _ in found] == ([4, 4, 8, 8] if mode == "add" else [4, 4, 4, 4])
    for samples, y in found:
        labels = [2 * (number // 1000) + number % 2 for number in samples]
        assert y in (None, labels, words(torch.tensor(labels)))
    assert all(tasks_of(samples).count(0) == len(samples) // 2 for samples, _ in found[2:])


def test_validation_and_scoring_see_their_own_batches(stream: Callable[..., Seer]) -> None:
    data = ContinualDataModule(make_tasks((8, 8)), batch_size=4)
    matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
    seen = stream(RehearsalCallback(8), data, callbacks=[matrix], num_sanity_val_steps=2)
    assert any(len(samples) == 8 for _, samples in seen.trained)
    assert len(seen.validated) > 10
    assert all(samples in ([t, t + 1, t + 2, t + 3] for t in (0, 4, 1000, 1004)) for samples in seen.validated)


def test_exemplars_are_remembered_as_they_came_though_the_module_changes_its_batch(
    stream: Callable[..., Seer],
) -> None:
    class Careless(Seer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
            batch[0].add_(100.0)
            return loss

    rehearsal = RehearsalCallback(100)
    seen = stream(rehearsal, module=Careless())
    assert all(len(samples) == 8 and max(samples) < 3000 for samples in seen.in_task(1))
    assert remembered(rehearsal) == [*range(24), *range(1000, 1024), *range(2000, 2024)]


# --- What is remembered -----------------------------------------------------------------------------------------------

EVERYTHING = [*range(23), *range(1000, 1017), *range(2000, 2009)]


@pytest.mark.parametrize("epochs", [1, 3], ids="epochs={}".format)
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_every_sample_is_remembered_once(stream: Callable[..., Seer], epochs: int, mode: Any) -> None:
    rehearsal = RehearsalCallback(100, mode=mode)
    stream(rehearsal, ContinualDataModule(make_tasks((23, 17, 9), val=False), batch_size=4), epochs)
    assert remembered(rehearsal) == EVERYTHING
    assert rehearsal.memory.num_seen == len(EVERYTHING)


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [3, 6, 8, 14, 15], ids="step={}".format)
def test_every_sample_is_remembered_once_by_a_run_that_is_resumed(
    trainer: Callable[..., L.Trainer], tmp_path: Path, step: int
) -> None:
    path = tmp_path / "stopped.ckpt"

    def run(*callbacks: L.Callback, ckpt: Path | None = None) -> RehearsalCallback:
        rehearsal = RehearsalCallback(100)
        data = ContinualDataModule(make_tasks((23, 17, 9), val=False), batch_size=4)
        trainer(TaskStream(2), rehearsal, *callbacks).fit(Seer(), datamodule=data, ckpt_path=ckpt, weights_only=True)
        return rehearsal

    run(SaveAt(path, step))
    assert remembered(run(ckpt=path)) == EVERYTHING


def test_a_run_that_raised_remembers_its_task_from_the_new_trainers_first_epoch(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Killed(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.killed = False

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.datamodule.current_task == 1:
                raise RuntimeError("killed")

    rehearsal, engine = RehearsalCallback(100), TaskStream(2)
    data = ContinualDataModule(make_tasks((23, 17, 9), val=False), batch_size=4)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(engine, rehearsal, Killed()).fit(Seer(), datamodule=data)
    trainer(engine, rehearsal).fit(Seer(), datamodule=data)
    assert remembered(rehearsal) == EVERYTHING


class Keep(L.Callback):
    """Writes what every process remembers."""

    def __init__(self, folder: Path, rehearsal: RehearsalCallback) -> None:
        self.folder, self.rehearsal = folder, rehearsal

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        where = self.folder / f"{trainer.global_rank}-of-{trainer.world_size}"
        torch.save({"samples": remembered(self.rehearsal), "seen": self.rehearsal.memory.num_seen}, where)

    def read(self, world_size: int) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"{rank}-of-{world_size}") for rank in range(world_size)]


@pytest.mark.parametrize("kind", ["stream", "loader", "herding", "reload"])
def test_two_processes_remember_every_sample_once_between_them(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: str
) -> None:
    features = {"features": lambda module, batch: batch[0]} if kind == "herding" else {}
    memory = HerdingMemory(100) if kind == "herding" else 100
    rehearsal = RehearsalCallback(memory, reload=kind == "reload", **features)
    keep, processes = Keep(tmp_path, rehearsal), {"devices": 2, "strategy": "ddp_fork"}
    if kind == "loader":
        loader = DataLoader(make_tasks((23,))[0].train, batch_size=4, shuffle=True)
        trainer(rehearsal, keep, max_epochs=2, **processes).fit(Seer(), loader)
    else:
        data = ContinualDataModule(make_tasks((23,), val=False), batch_size=4)
        trainer(TaskStream(2), rehearsal, keep, **processes).fit(Seer(), datamodule=data)
    first, second = keep.read(2)
    assert sorted(first["samples"] + second["samples"]) == list(range(23))


def test_the_capacity_is_that_of_all_processes_and_a_checkpoint_serves_any_number_of_them(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    path = tmp_path / "deployed.ckpt"
    first, second = make_tasks((23, 17))

    class Save(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(path)

    rehearsal = RehearsalCallback(11)
    keep = Keep(tmp_path, rehearsal)
    trainer(rehearsal, Save(), keep, max_epochs=1, devices=2, strategy="ddp_fork").fit(
        Seer(), DataLoader(first.train, 4)
    )
    held = [part["samples"] for part in keep.read(2)]
    assert [len(samples) for samples in held] == [6, 5]
    everything = sorted(chain(*held))

    for world_size in (1, 3):
        module, again = Seer(), RehearsalCallback(11, proportion=0.9)
        restore(path, module, [again])
        keep = Keep(tmp_path, again)
        options = {} if world_size == 1 else {"devices": world_size, "strategy": "ddp_fork"}
        assert remembered(again) == everything
        # No step: what is read back is what was dealt.
        trainer(again, keep, max_epochs=1, limit_train_batches=1, **options).fit(Seer(), DataLoader(second.train, 1))
        parts = [part["samples"] for part in keep.read(world_size)]
        past = [[number for number in samples if number < 1000] for samples in parts]
        assert sum(map(len, parts)) == 11
        assert set(chain(*past)) <= set(everything)
        assert len(list(chain(*past))) >= 11 - world_size


def test_turned_down_to_nothing_it_carries_its_exemplars_through_two_processes(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Save(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "second.ckpt")

    first, second = make_tasks((23, 17))
    fit = trainer(RehearsalCallback(11), max_epochs=1)
    fit.fit(Seer(), DataLoader(first.train, 4))
    fit.save_checkpoint(tmp_path / "first.ckpt")
    module, resting, restored = Seer(), RehearsalCallback(11, proportion=0.0), RehearsalCallback(11)
    restore(tmp_path / "first.ckpt", module, [resting])
    trainer(resting, Save(), max_epochs=1, devices=2, strategy="ddp_fork").fit(module, DataLoader(second.train, 4))
    restore(tmp_path / "second.ckpt", Seer(), [restored])
    assert remembered(restored) == remembered(resting)
    assert len(remembered(restored)) == 11


def test_the_four_memories_keep_what_they_promise_over_a_stream(stream: Callable[..., Seer]) -> None:
    def run(memory: Any, **options: Any) -> RehearsalCallback:
        rehearsal = RehearsalCallback(memory, **options)
        stream(rehearsal)
        return rehearsal

    reservoir = run(ReservoirMemory(12))
    assert (len(reservoir.memory), reservoir.memory.num_seen) == (12, 72)
    balanced = run(ClassBalancedMemory(12))
    assert sorted(balanced.memory.labels.tolist()) == sorted([0, 1, 2, 3, 4, 5] * 2)
    per_task = run(TaskMemory(12))
    assert sorted(per_task.memory.tasks.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    herding = run(HerdingMemory(12), features=lambda module, batch: module.net[:2](batch[0]))
    assert sorted(herding.memory.labels.tolist()) == sorted([0, 1, 2, 3, 4, 5] * 2)
    for rehearsal in (balanced, herding):
        x, y = rehearsal.memory.draw(12, before=3)
        assert [2 * (number // 1000) + number % 2 for number in numbers(x)] == y.tolist()


def herded(features: Tensor, num: int) -> list[int]:
    """iCaRL's greedy choice, one candidate at a time, in float64."""
    unit = [row / row.norm() for row in features.double()]
    mean = sum(unit) / len(unit)
    chosen: list[int] = []
    for _ in range(num):

        def distance(candidate: int) -> float:
            some = [unit[index] for index in [*chosen, candidate]]
            return float((mean - sum(some) / len(some)).norm())

        chosen.append(min((n for n in range(len(unit)) if n not in chosen), key=distance))
    return chosen


def test_herding_chooses_what_the_definition_by_loop_chooses(trainer: Callable[..., L.Trainer]) -> None:
    dataset = make_tasks((23,))[0].train
    module = Classifier(dropout=0.5)
    rehearsal = RehearsalCallback(HerdingMemory(7), features=lambda module, batch: module.net[:3](batch[0]))
    trainer(rehearsal, max_epochs=1).fit(module, DataLoader(dataset, 4, shuffle=True))
    x, y = dataset.tensors
    with torch.no_grad():
        features = module.eval().net[:3](x)
    expected = []
    for label, num in ((0, 4), (1, 3)):  # the class seen first takes the remainder
        members = (y == label).nonzero().flatten().tolist()
        expected += [members[place] for place in herded(features[members], num)]
    assert remembered(rehearsal) == sorted(expected)


def test_herding_leaves_the_modules_modes_gradients_and_random_state_alone(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Check(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            state = [p.grad.clone() for p in pl_module.parameters()], torch.get_rng_state()
            modes = [module.training for module in pl_module.modules()]
            self.states = [*getattr(self, "states", []), (state, modes)]

    before, after = Check(), Check()
    rehearsal = RehearsalCallback(HerdingMemory(7), features=lambda module, batch: module(batch[0]))
    loader = DataLoader(make_tasks((23,))[0].train, 4)
    trainer(before, rehearsal, after, max_epochs=1).fit(Classifier(dropout=0.5), loader)
    assert_close(after.states, before.states, rtol=0, atol=0)


# --- Labels and selection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pack", "label"),
    [
        (lambda x, y: [x, y], None),
        (lambda x, y: (x, y), None),
        (lambda x, y: {"x": x, "label": y}, None),
        (lambda x, y: {"x": x, "labels": y}, None),
        (lambda x, y: {"x": x, "y": y}, None),
        (lambda x, y: {"x": x, "target": y}, None),
        (lambda x, y: {"x": x, "y": y.int()}, None),
        (lambda x, y: (x, x, y), lambda batch: batch[2]),
        (lambda x, y: x, lambda batch: 2 * (batch[:, 0] >= 1).long() + (batch[:, 0] * 1000).round().long() % 2),
    ],
)
def test_labels_are_found_or_told(trainer: Callable[..., L.Trainer], pack: Any, label: Any) -> None:
    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch if isinstance(batch, Tensor) else batch[0]
            return self(x).sum()

    def collate(samples: list[Any]) -> Any:
        return pack(*default_collate(samples))

    data = ContinualDataModule(make_tasks((8, 8), val=False), batch_size=4, collate_fn=collate)
    rehearsal = RehearsalCallback(ClassBalancedMemory(8), label=label)
    trainer(TaskStream(), rehearsal).fit(Module(), datamodule=data)
    assert sorted(rehearsal.memory.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("pack", "options", "message"),
    [
        (lambda x, y: x, {"memory": ClassBalancedMemory(8)}, "`ClassBalancedMemory` needs labels, one whole number"),
        (lambda x, y: (x, y, y), {"memory": ClassBalancedMemory(8)}, "but found NoneType for 4 samples. Pass `label=`"),
        (lambda x, y: (x, y.float()), {"memory": ClassBalancedMemory(8)}, r"found torch.float32 \(4,\) for 4 samples"),
        (lambda x, y: (x, x.long()), {"selection": "balanced"}, r"`selection='balanced'` needs labels, .* \(4, 4\)"),
        (
            lambda x, y: (x, y),
            {"memory": ClassBalancedMemory(8), "label": lambda batch: batch[1].tolist()},
            "but found list for 4 samples",
        ),
    ],
)
def test_labels_that_are_missing_are_missed_before_the_first_step(
    trainer: Callable[..., L.Trainer], pack: Any, options: dict[str, Any], message: str
) -> None:
    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("a step was trained")

    loader = DataLoader(make_tasks((8,))[0].train, 4, collate_fn=lambda samples: pack(*default_collate(samples)))
    with pytest.raises(ValueError, match=message):
        trainer(RehearsalCallback(**options), max_epochs=1).fit(Module(), loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features": lambda module, batch: batch[0][:, 0]},
            r"`features` must return one row a sample, \(1, D\), but got",
        ),
        ({"features": lambda module, batch: [1.0]}, r"but got list. Flatten or average what the module computes"),
        (
            {"features": lambda module, batch: batch[0], "label": lambda batch: None},
            "`HerdingMemory` needs labels, one whole number a sample, but found NoneType for 1 samples",
        ),
    ],
)
def test_herding_tries_its_functions_before_the_first_step(
    trainer: Callable[..., L.Trainer], options: dict[str, Any], message: str
) -> None:
    module = Seer()
    with pytest.raises(ValueError, match=message):
        trainer(RehearsalCallback(HerdingMemory(8), **options), max_epochs=1).fit(
            module, DataLoader(make_tasks((8,))[0].train, 4)
        )
    assert not module.trained


def test_reload_tries_to_find_labels_before_the_first_step(stream: Callable[..., Seer]) -> None:
    module, data = Seer(), ContinualDataModule([Task(TensorDataset(torch.randn(8, 4), torch.randn(8)))], batch_size=4)
    with pytest.raises(ValueError, match=r"Every sample must have a whole number for a label, but sample 0 has Tensor"):
        stream(RehearsalCallback(ClassBalancedMemory(8), reload=True), data, module=module)
    with pytest.raises(ValueError, match=r"needs labels, one whole number a sample, but found torch.float32 \(1,\)"):
        stream(RehearsalCallback(ClassBalancedMemory(8), reload=True, label=lambda b: b[1] + 0.5), data, module=module)
    assert not module.trained


def test_labels_are_not_asked_for_where_they_are_not_needed(trainer: Callable[..., L.Trainer]) -> None:
    def label(batch: Any) -> Tensor:
        raise AssertionError("labels are not needed")

    loader = DataLoader(make_tasks((8,))[0].train, 4)
    trainer(RehearsalCallback(8, label=label), max_epochs=1).fit(Seer(), loader)


def test_a_function_selects_exemplars(stream: Callable[..., Seer]) -> None:
    calls = []

    def odd_ones_of_the_first_task(tasks: Tensor, labels: Tensor, before: int) -> Tensor:
        calls.append((set(tasks.tolist()), set(labels.tolist()), before))
        return (labels == 1).double()

    seen = stream(RehearsalCallback(ClassBalancedMemory(100), selection=odd_ones_of_the_first_task))
    past = list(chain(*(samples[4:] for samples in seen.in_task(1) + seen.in_task(2))))
    assert len(past) == 2 * 24
    assert all(number < 24 and number % 2 for number in past)
    assert ({0}, {0, 1}, 1) in calls
    assert ({0, 1}, {0, 1, 2, 3}, 2) in calls


def test_recent_tasks_are_selected_more_often(stream: Callable[..., Seer]) -> None:
    seen = stream(RehearsalCallback(100, selection="recent"), epochs=20)
    past = list(chain(*(tasks_of(samples[4:]) for samples in seen.in_task(2))))
    # Four of 48, one after the other with weights 1 and 1/e: by the first draws' odds 1 : e, within a few of 480.
    assert 0.68 < past.count(1) / len(past) < 0.78


def test_balanced_selection_draws_rare_classes_as_often_as_others(stream: Callable[..., Seer]) -> None:
    x = torch.zeros(44, 4)
    x[:, 0] = torch.arange(44) / 1000
    y = (torch.arange(44) >= 40).long()  # 40 of class 0, 4 of class 1
    data = ContinualDataModule([Task(TensorDataset(x, y)), make_tasks((24, 24), val=False)[1]], batch_size=2)
    seen = stream(RehearsalCallback(44, selection="balanced"), data, epochs=20)
    first = [samples[2] for samples in seen.in_task(1)]
    rare = sum(number >= 40 for number in first) / len(first)
    assert len(first) == 240
    assert abs(rare - 0.5) < 4 * (0.25 / 240) ** 0.5  # four standard errors


# --- Reading exemplars again ------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Draws the last feature anew each time a sample is read."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return torch.cat((x[:3], torch.rand(1))), y


def augmented_tasks() -> list[Task]:
    return [Task(Augmented(task.train), classes=task.classes) for task in make_tasks((24, 24, 24), val=False)]


def variants(seen: Seer) -> dict[int, list[float]]:
    """Return, of each exemplar rehearsed in task 1, the values of the feature that is drawn."""
    found: dict[int, list[float]] = {}
    for (task, samples), (x, _) in zip(seen.trained, seen.batches, strict=True):
        for number, value in zip(samples, x[:, 3].tolist(), strict=True):
            if task == 1 and number < 1000:
                found.setdefault(number, []).append(value)
    return found


def test_reload_draws_augmentation_anew(stream: Callable[..., Seer]) -> None:
    data = partial(ContinualDataModule, batch_size=8, val_fraction=0.25)
    kept = variants(stream(RehearsalCallback(6), data(augmented_tasks()), epochs=3))
    again = variants(stream(RehearsalCallback(6, reload=True), module := data(augmented_tasks()), epochs=3))
    assert len(kept) == len(again) == 6
    for values in kept.values():
        assert len(set(values)) == 1
    for values in again.values():
        assert len(values) == len(set(values)) > 1
    held_out = {number for batch in module.evaluation_dataloader(0, "val") for number in numbers(batch[0])}
    assert not held_out & again.keys()


@pytest.mark.parametrize("label", [None, lambda batch: batch[1]], ids=["found", "told"])
def test_reload_serves_memories_that_need_labels(stream: Callable[..., Seer], label: Any) -> None:
    rehearsal = RehearsalCallback(ClassBalancedMemory(12), reload=True, label=label)
    seen = stream(rehearsal, ContinualDataModule(augmented_tasks(), batch_size=4))
    assert sorted(rehearsal.memory.labels.tolist()) == sorted([0, 1, 2, 3, 4, 5] * 2)
    for samples, (_, y) in zip((samples for _, samples in seen.trained), seen.batches, strict=True):
        assert [2 * (number // 1000) + number % 2 for number in samples] == y.tolist()


def test_reload_asks_label_for_the_labels_of_batches(stream: Callable[..., Seer]) -> None:
    rehearsal = RehearsalCallback(ClassBalancedMemory(12), reload=True, label=lambda batch: batch[1] % 2)
    stream(rehearsal, ContinualDataModule(augmented_tasks(), batch_size=4))
    assert sorted(rehearsal.memory.labels.tolist()) == [0] * 6 + [1] * 6


def test_reload_needs_a_continual_data_module(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"the Trainer has no `ContinualDataModule`. Pass one, or leave"
    ):
        trainer(RehearsalCallback(6, reload=True), max_epochs=1).fit(Seer(), DataLoader(make_tasks()[0].train, 4))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_tasks((8,))[0].train)


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({"memory": HerdingMemory(8), "features": lambda module, batch: batch[0]}, "`HerdingMemory`"),
        ({"reload": True}, r"`RehearsalCallback\(reload=True\)`"),
    ],
    ids=["herding", "reload"],
)
def test_data_that_cannot_be_read_twice_are_refused_before_training(
    trainer: Callable[..., L.Trainer], options: dict[str, Any], who: str
) -> None:
    module = Seer()
    with pytest.raises(MisconfigurationException, match=f"{who} reads training data more than once, but got an iter"):
        trainer(TaskStream(), RehearsalCallback(**options)).fit(
            module, datamodule=ContinualDataModule([Task(Endless())])
        )
    assert not module.trained


# --- The module's and the data module's own hook ----------------------------------------------------------------------


def count_one(batch: Any) -> Any:
    """Add 1 to the last feature, which is 0: what has passed twice shows 2."""
    x, y = batch
    return x + torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=x.dtype), y


class HookedModule(Seer):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return count_one(batch)


class HookedData(ContinualDataModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return count_one(batch)


@pytest.mark.parametrize("owner", ["module", "data module"])
@pytest.mark.parametrize("kind", ["reservoir", "herding", "reload"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_users_hook_is_passed_once_by_every_sample(
    stream: Callable[..., Seer], owner: str, kind: str, precision: Any
) -> None:
    tasks = []
    for task in make_tasks((8, 8, 8)):
        parts = [task.train, task.val, task.test]
        for part in parts:
            part.tensors[0][:, 3] = 0
        tasks.append(Task(*parts))
    data = (ContinualDataModule if owner == "module" else HookedData)(tasks, batch_size=4)
    module = HookedModule() if owner == "module" else Seer()
    options: dict[str, Any] = {"memory": HerdingMemory(24)} if kind == "herding" else {"memory": 24}
    if kind == "herding":
        options["features"] = lambda module, batch: batch[0]
    rehearsal = RehearsalCallback(reload=kind == "reload", **options)
    stream(rehearsal, data, epochs=2, module=module, precision=precision)
    assert [len(samples) for _, samples in module.trained] == [4] * 4 + [8] * 8
    for x, _ in module.batches:
        assert x[:, 3].tolist() == [1.0] * len(x)
    assert "on_before_batch_transfer" not in {**vars(module), **vars(data)}


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_training_step_past_every_hook_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    class Module(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise AssertionError("a step was trained")

    with pytest.raises(MisconfigurationException, match="`RehearsalCallback` changes batches in `on_before_batch"):
        trainer(RehearsalCallback(8), max_epochs=1).fit(Module(), DataLoader(make_tasks()[0].train, 4))


# --- Any way to train -------------------------------------------------------------------------------------------------


class Manual(Seer):
    """Two optimizers that take turns at their parts of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[3].parameters())


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Seer, {}),
        (Manual, {}),
        (Seer, {"accumulate_grad_batches": 4}),
        (Seer, {"gradient_clip_val": 0.1}),
        (Seer, {"precision": "bf16-mixed"}),
        (Seer, {"plugins": fp16}),
    ],
    ids=["plain", "manual", "accumulate", "clip", "bf16", "fp16"],
)
def test_a_run_is_the_run_on_the_joined_batches(
    trainer: Callable[..., L.Trainer], module: Callable[[], Seer], options: dict[str, Any]
) -> None:
    def options_now() -> dict[str, Any]:
        return {name: value() if callable(value) else value for name, value in options.items()}

    torch.manual_seed(3)
    rehearsed, rehearsal = module(), RehearsalCallback(10)
    plain = module()
    plain.load_state_dict(rehearsed.state_dict())
    for task in make_tasks((22, 22, 22)):
        rehearsed.batches.clear()
        first = trainer(rehearsal, max_epochs=2, **options_now())
        first.fit(rehearsed, DataLoader(task.train, 4, shuffle=True))
        batches = rehearsed.batches[:: 2 if module is Manual else 1]
        joined = DataLoader(batches, batch_size=None)
        second = trainer(max_epochs=1, **options_now())
        if "accumulate_grad_batches" in options:  # an epoch's last step takes fewer batches
            second = trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1, **options_now())
            epochs = [DataLoader(batches[:6], batch_size=None), DataLoader(batches[6:], batch_size=None)]
            plain.train_dataloader = lambda epochs=epochs: epochs.pop(0)  # type: ignore[method-assign]
            second.fit(plain)
        else:
            second.fit(plain, joined)
        assert second.global_step == first.global_step
    for name, value in rehearsed.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_steps_skipped_in_fp16_are_remembered_too(trainer: Callable[..., L.Trainer]) -> None:
    class Overflow(L.Callback):
        skipped = 0

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.skipped += any(not p.grad.isfinite().all() for p in pl_module.parameters())

    overflow, rehearsal = Overflow(), RehearsalCallback(100)
    loader = DataLoader(make_tasks((23,))[0].train, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer(rehearsal, overflow, max_epochs=1, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler)).fit(
        Seer(), loader
    )
    assert overflow.skipped > 0
    assert remembered(rehearsal) == list(range(23))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_rehearsed(trainer: Callable[..., L.Trainer], backend: str) -> None:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(3)
        module, rehearsal = Classifier(dropout=0.0), RehearsalCallback(100)
        model = torch.compile(module, backend=backend) if compiled else module
        data = ContinualDataModule(make_tasks((24, 24), val=False), batch_size=4)
        trainer(TaskStream(), rehearsal).fit(model, datamodule=data)
        assert len(remembered(rehearsal)) == 48
        weights.append(module.state_dict())
    assert_close(weights[1], weights[0])


# --- One fit a task ---------------------------------------------------------------------------------------------------


def test_in_production_each_month_rehearses_the_months_before(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "deployed.ckpt"
    for month, task in enumerate(make_tasks((23, 17, 9))):
        module, rehearsal = Seer(), RehearsalCallback(100)  # a new process knows nothing but the checkpoint
        if month:
            restore(checkpoint, module, [rehearsal])
            assert remembered(rehearsal) == [number for number in EVERYTHING if number < 1000 * month]
        update = trainer(rehearsal, max_epochs=2)
        update.fit(module, DataLoader(task.train, 4, shuffle=True))
        update.save_checkpoint(checkpoint)
        for _, samples in module.trained:
            new = [number for number in samples if number // 1000 == month]
            past = [number for number in samples if number // 1000 < month]
            assert len(new) + len(past) == len(samples)
            assert len(past) == (len(new) if month else 0)
        assert remembered(rehearsal) == [number for number in EVERYTHING if number < 1000 * (month + 1)]


def test_one_callback_serves_several_trainers(trainer: Callable[..., L.Trainer]) -> None:
    module, rehearsal = Seer(), RehearsalCallback(100)
    for task in make_tasks((23, 17, 9)):
        trainer(rehearsal, max_epochs=2).fit(module, DataLoader(task.train, 4, shuffle=True))
    assert remembered(rehearsal) == EVERYTHING


def test_a_pytorch_lightning_trainer_and_module_are_served(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 6)
            self.trained: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trained.append(numbers(batch[0]))
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, rehearsal = Module(), RehearsalCallback(100)
    for task in make_tasks((8, 8)):
        trainer = pl.Trainer(
            callbacks=[rehearsal],
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(task.train, 4))
    assert [len(samples) for samples in module.trained] == [4, 4, 8, 8]
    assert remembered(rehearsal) == [*range(8), *range(1000, 1008)]
    assert "on_before_batch_transfer" not in vars(module)


@pytest.mark.slow
def test_a_memory_on_disk_survives_the_end_of_its_process(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        import lightning.pytorch as L
        from conftest import Classifier, make_tasks
        from lightning_continual import *

        ckpt = sys.argv[1] if len(sys.argv) > 1 else None
        rehearsal = RehearsalCallback(ReservoirMemory(100, path="exemplars"))

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, *args):
                if ckpt is None and trainer.global_step == 9:
                    trainer.save_checkpoint("stopped.ckpt")
                    sys.exit()

        trainer = L.Trainer(
            callbacks=[TaskStream(), rehearsal, Stop()], logger=False, accelerator="cpu", enable_progress_bar=False
        )
        data = ContinualDataModule(make_tasks((23, 17, 9), val=False), batch_size=4)
        trainer.fit(Classifier(), datamodule=data, ckpt_path=ckpt, weights_only=True)
        samples = rehearsal.memory.draw(100, before=9)[0][:, 0]
        print("remembered", sorted((samples * 1000).round().int().tolist()))
        """
    )
    (tmp_path / "run.py").write_text(script)
    tests = Path(__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]!r}; exec(open('run.py').read())"
    for argument in ([], ["stopped.ckpt"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argument], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert f"remembered {EVERYTHING}" in done.stdout
    assert any((tmp_path / "exemplars").iterdir())


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proportion", [-0.1, 1.0, 2])
def test_a_proportion_outside_its_range_is_refused(proportion: float) -> None:
    with pytest.raises(ValueError, match=rf"`proportion` must lie in \[0, 1\), but got {proportion}. Pass the share"):
        RehearsalCallback(proportion=proportion)


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`mode` must be 'add' or 'replace', but got 'both'"):
        RehearsalCallback(mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`capacity` must be a number of exemplars, 0 or more, but got -1"):
        RehearsalCallback(-1)
    with pytest.raises(ValueError, match=r"`HerdingMemory` chooses exemplars by their features. Pass `features=`"):
        RehearsalCallback(HerdingMemory(8))
    with pytest.raises(ValueError, match=r"`reload=True` cannot be combined with `HerdingMemory`. Leave one out"):
        RehearsalCallback(HerdingMemory(8), features=lambda module, batch: batch, reload=True)
    with pytest.raises(ValueError, match="`selection` must be 'uniform', 'recent' or 'balanced', but got 'random'"):
        RehearsalCallback(selection="random")  # type: ignore[arg-type]
