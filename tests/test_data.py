"""The loaders of a stream: the right data, in an order that depends on nothing but seed, task and epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy
import pytest
import torch
from conftest import Classifier, make_tasks
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_continual import _host
from lightning_continual.data import ContinualDataModule, EvaluationSampler, TaskLoader, TaskSampler, seed_of
from lightning_continual.stream import TaskStream
from lightning_continual.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def counting(start: int, number: int) -> TensorDataset:
    return TensorDataset(torch.arange(start, start + number))


class Stream(IterableDataset):
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(torch.arange(self.number), strict=True))


def numbers_of(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def process(rank: int, world_size: int) -> Any:
    return SimpleNamespace(global_rank=rank, world_size=world_size)


def batches_of(sampler: Any, batch_size: int) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def task_sampler(number: int, trainer: Any = None, **options: Any) -> TaskSampler:
    defaults = {"shuffle": True, "seed": 0, "task": 0, "limit": None}
    return TaskSampler(range(number), trainer=trainer, **{**defaults, **options})


def samples(batch: Any) -> list[int]:
    """The numbers, in the stream, of a batch of `make_tasks`."""
    return [round(1000 * value) for value in batch[0][:, 0].tolist()]


class Recorder(L.Callback):
    """The samples of every batch, by task and epoch."""

    def __init__(self) -> None:
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self.trained.append((trainer.datamodule.current_task, trainer.current_epoch, samples(batch)))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *a: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append((trainer.datamodule.current_task, trainer.current_epoch, samples(batch)))


# --- The order of training --------------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_that_depends_on_seed_task_and_epoch() -> None:
    orders = {}
    for seed in range(2):
        for task in range(2):
            sampler = task_sampler(50, seed=seed, task=task)
            for epoch in range(3):
                sampler.set_epoch(epoch)
                orders[seed, task, epoch] = list(sampler)
                assert sorted(orders[seed, task, epoch]) == list(range(50))
                assert list(sampler) == orders[seed, task, epoch]
    assert len(set(map(tuple, orders.values()))) == 12


def test_the_seed_of_an_order_is_the_same_on_every_machine() -> None:
    assert seed_of(0, 1, 2) == 8703209590962626244


def test_without_shuffling_the_order_is_that_of_the_data_in_every_epoch() -> None:
    sampler = task_sampler(7, shuffle=False)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(range(7))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False], ids="shuffle={}".format)
@pytest.mark.parametrize("number", [24, 25, 5, 1], ids="samples={}".format)
def test_processes_together_see_batch_by_batch_what_one_sees_with_larger_batches(
    number: int, shuffle: bool, world_size: int
) -> None:
    whole = batches_of(task_sampler(number, shuffle=shuffle), 2 * world_size)
    parts = [
        batches_of(task_sampler(number, process(rank, world_size), shuffle=shuffle), 2) for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert len({len(part[-1]) for part in parts}) == 1
    order = list(chain(*whole))
    repeated = (order * world_size)[number : number + -number % world_size]
    for position, batch in enumerate(whole):
        union = [part[position] for part in parts]
        together = [sample for row in zip(*union, strict=True) for sample in row]
        assert together == batch + (repeated if position == len(whole) - 1 else [])


def test_an_epoch_begun_in_its_middle_is_the_rest_of_it() -> None:
    for trainer in (None, process(0, 2), process(1, 2)):
        sampler = task_sampler(25, trainer)
        whole = list(sampler)
        sampler.start = 8
        assert list(sampler) == whole[8:]
        assert len(sampler) == len(whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_limited_epoch_is_the_first_part_of_it(world_size: int) -> None:
    whole = list(task_sampler(25, process(0, world_size)))
    limited = task_sampler(25, process(0, world_size), limit=6)
    assert list(limited) == whole[:6]
    assert len(limited) == 6
    assert list(task_sampler(25, process(0, world_size), limit=1000)) == whole


def test_workers_do_not_change_the_order(trainer: Callable[..., L.Trainer]) -> None:
    runs = []
    for num_workers in (0, 2):
        data = ContinualDataModule(make_tasks([10, 6]), batch_size=4, num_workers=num_workers)
        trainer(recorder := Recorder(), TaskStream(2), limit_val_batches=0).fit(Classifier(), datamodule=data)
        runs.append(recorder.trained)
    assert len(runs[0]) == 10
    assert runs[0] == runs[1]


def test_persistent_workers_go_on_to_the_next_epochs_order(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule(make_tasks([8, 8]), batch_size=4, num_workers=1, persistent_workers=True)
    trainer(recorder := Recorder(), TaskStream(3), limit_val_batches=0).fit(Classifier(), datamodule=data)
    expected = []
    for task in range(2):
        sampler = task_sampler(8, task=task)
        for epoch in range(3 * task, 3 * task + 3):
            sampler.set_epoch(epoch)
            expected += [(task, epoch, [1000 * task + n for n in batch]) for batch in batches_of(sampler, 4)]
    assert recorder.trained == expected


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_every_sample_is_evaluated_once_and_repeated_only_where_that_evens_out_the_batches() -> None:
    for number in range(1, 26):
        for world_size in range(1, 6):
            for batch_size in range(1, 6):
                parts = []
                for rank in range(world_size):
                    trainer = process(rank, world_size)
                    sampler = EvaluationSampler(range(number), batch_size=batch_size, trainer=trainer)
                    assert len(list(sampler)) == len(sampler)
                    parts.append(batches_of(sampler, batch_size))
                where = f"{number} samples, {world_size} processes, batches of {batch_size}"
                assert len({len(part) for part in parts}) == 1, where
                seen = [sample for part in parts for batch in part for sample in batch]
                assert set(seen) == set(range(number)), where
                assert all(sorted(part) == part for part in parts[0]), where
                # Each process must have a last batch, and full ones before it: fewer samples cannot do that.
                rounds = -(-number // (world_size * batch_size))
                least = world_size * ((rounds - 1) * batch_size + 1)
                assert len(seen) == max(number, least), where


def test_one_process_evaluates_in_order() -> None:
    data = ContinualDataModule([Task(counting(0, 5), counting(10, 5), counting(20, 3))], batch_size=2)
    assert numbers_of(data.val_dataloader()) == [[10, 11], [12, 13], [14]]
    assert [numbers_of(loader) for loader in data.test_dataloader()] == [[[20, 21], [22]]]
    assert numbers_of(data.evaluation_dataloader(0, "val")) == [[10, 11], [12, 13], [14]]
    assert numbers_of(data.evaluation_dataloader(0, "test")) == [[20, 21], [22]]


@pytest.mark.parametrize("number", [7, 8, 9], ids="samples={}".format)
def test_what_validation_logs_is_right_with_two_processes(trainer: Callable[..., L.Trainer], number: int) -> None:
    # Lightning averages the number of samples of the processes in integers: they must be equal.
    class Constant(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("one", torch.tensor(1.0), sync_dist=True)

        def on_validation_epoch_end(self) -> None:
            assert self.trainer.callback_metrics["one"] == 1

    data = ContinualDataModule(make_tasks([number]), batch_size=2)
    trainer(TaskStream(), strategy="ddp_fork", devices=2).fit(Constant(), datamodule=data)


# --- A fit over the stream --------------------------------------------------------------------------------------------


def test_the_loaders_of_training_and_validation_serve_one_task_after_another(
    trainer: Callable[..., L.Trainer],
) -> None:
    data = ContinualDataModule(make_tasks([8, 6, 4]), batch_size=4)
    trainer(recorder := Recorder(), TaskStream(2)).fit(Classifier(), datamodule=data)
    for served in (recorder.trained, recorder.validated):
        assert [task for task, _, _ in served] == [0] * 4 + [1] * 4 + [2] * 2
        for epoch, number in enumerate([8, 8, 6, 6, 4, 4]):
            seen = list(chain(*(sample for _, when, sample in served if when == epoch)))
            assert sorted(seen) == [1000 * (epoch // 2) + sample for sample in range(number)]


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 1}], ids=str)
def test_validation_at_other_times_is_on_the_task_in_training(
    trainer: Callable[..., L.Trainer], options: dict[str, Any]
) -> None:
    data = ContinualDataModule(make_tasks([8, 6, 8]), batch_size=4)
    trainer(recorder := Recorder(), TaskStream(3), **options).fit(Classifier(), datamodule=data)
    assert {task for task, _, _ in recorder.validated} == {0, 1, 2}
    for task, epoch, sample in recorder.validated:
        assert task == epoch // 3
        assert {number // 1000 for number in sample} == {task}


def test_two_processes_train_on_what_one_does_in_order(trainer: Callable[..., L.Trainer]) -> None:
    class Check(Recorder):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            rank = trainer.global_rank
            own = [(task, sample) for task, _, sample in self.trained]
            first = [[0, 2], [4, 6]] if rank == 0 else [[1, 3], [5, 7]]
            second = [[1000, 1002], [1004]] if rank == 0 else [[1001, 1003], [1000]]
            assert own == [(0, first[0]), (0, first[1]), (1, second[0]), (1, second[1])]

    data = ContinualDataModule(make_tasks([8, 5]), batch_size=2, shuffle=False)
    trainer(Check(), TaskStream(), strategy="ddp_fork", devices=2, limit_val_batches=0).fit(
        Classifier(), datamodule=data
    )


def test_two_processes_shuffle_alike_and_anew_in_every_epoch(trainer: Callable[..., L.Trainer]) -> None:
    one = trainer(recorder := Recorder(), TaskStream(2))
    one.fit(Classifier(), datamodule=ContinualDataModule(make_tasks([8, 12]), batch_size=4))

    class Check(Recorder):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            expected = [(task, epoch, seen[trainer.global_rank :: 2]) for task, epoch, seen in recorder.trained]
            assert self.trained == expected

    data = ContinualDataModule(make_tasks([8, 12]), batch_size=2)
    trainer(Check(), TaskStream(2), strategy="ddp_fork", devices=2, limit_val_batches=0).fit(
        Classifier(), datamodule=data
    )


def test_an_ordered_stream_stays_in_order_with_a_task_each_fit_too(trainer: Callable[..., L.Trainer]) -> None:
    class Check(Recorder):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert list(chain(*(sample for _, _, sample in self.trained))) == list(range(trainer.global_rank, 8, 2)) * 2

    data = ContinualDataModule(make_tasks([8]), batch_size=2, shuffle=False)
    fit = trainer(Check(), strategy="ddp_fork", devices=2, max_epochs=2, limit_val_batches=0)
    fit.fit(Classifier(), datamodule=data)


def test_loaders_do_not_draw_from_the_global_random_state() -> None:
    class Noisy(TensorDataset):
        pass

    data = ContinualDataModule([Task(counting(0, 9), counting(0, 4), counting(0, 4))], batch_size=2)
    before = _host.random_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
        assert len(numbers_of(loader)) == len(loader)
    after = _host.random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]


def test_workers_are_seeded_by_seed_task_and_epoch() -> None:
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[float, ...]:
            return torch.rand(()).item(), random.random(), numpy.random.rand()

    def draws(task: int, epoch: int) -> Any:
        data = ContinualDataModule([Task(Noisy()), Task(Noisy())], batch_size=2, num_workers=1)
        data.current_task = task
        data._resumed = (epoch, 0)
        return torch.stack(next(iter(data.train_dataloader())))

    first = draws(0, 0)
    torch.rand(3)
    assert torch.equal(draws(0, 0), first)
    assert not torch.equal(draws(0, 1), first)
    assert not torch.equal(draws(1, 0), first)


def test_overfit_batches_trains_and_validates_on_the_same_batches(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule(make_tasks([12, 12]), batch_size=4)
    fit = trainer(recorder := Recorder(), TaskStream(2), overfit_batches=1)
    with pytest.warns(UserWarning, match="turning off the (train|val).* dataloader shuffling"):
        fit.fit(Classifier(), datamodule=data)
    assert [(task, sample) for task, _, sample in recorder.trained] == [
        (0, [0, 1, 2, 3]),
        (0, [0, 1, 2, 3]),
        (1, [1000, 1001, 1002, 1003]),
        (1, [1000, 1001, 1002, 1003]),
    ]


def test_a_stream_without_validation_data_is_not_validated(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule(make_tasks([8, 8], val=False, test=False), batch_size=4)
    with pytest.warns(UserWarning, match="no `val_dataloader`"):  # Lightning's own word on it
        trainer(recorder := Recorder(), TaskStream()).fit(Classifier(), datamodule=data)
    assert len(recorder.trained) == 4
    assert recorder.validated == []


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("without", [0, 1], ids="task {} without".format)
def test_only_tasks_with_validation_data_are_validated(trainer: Callable[..., L.Trainer], without: int) -> None:
    tasks = make_tasks([8, 8, 8])
    tasks[without] = Task(tasks[without].train)
    data = ContinualDataModule(tasks, batch_size=4)
    trainer(recorder := Recorder(), TaskStream(2)).fit(Classifier(), datamodule=data)
    assert {task for task, _, _ in recorder.validated} == {0, 1, 2} - {without}
    assert [task for task, _, _ in recorder.trained] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_loader_of_the_users_own_subclass_is_served(trainer: Callable[..., L.Trainer]) -> None:
    class Own(ContinualDataModule):
        def val_dataloader(self) -> Any:
            return DataLoader(make_tasks([4])[0].train, batch_size=4)

    data = Own(make_tasks([8, 8], val=False), batch_size=4)
    trainer(recorder := Recorder(), TaskStream()).fit(Classifier(), datamodule=data)
    assert [sample for _, _, sample in recorder.validated] == [[0, 1, 2, 3]] * 2


def test_trainer_test_goes_over_all_tasks(trainer: Callable[..., L.Trainer]) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            tested.append((dataloader_idx, samples(batch)))

    tested: list[Any] = []
    trainer().test(Tested(), ContinualDataModule(make_tasks([3, 2]), batch_size=2), verbose=False)
    assert tested == [(0, [0, 1]), (0, [2]), (1, [1000, 1001])]


# --- Iterable data sets -----------------------------------------------------------------------------------------------


def test_an_iterable_data_set_keeps_its_order_and_needs_no_length(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule([Task(Stream(5), Stream(3)), Task(Stream(4))], batch_size=2)
    assert numbers_of(data.train_dataloader()) == [[0, 1], [2, 3], [4]]
    assert numbers_of(data.val_dataloader()) == [[0, 1], [2]]
    with pytest.raises(TypeError):
        len(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
def test_an_iterable_data_set_is_resumed_by_skipping_what_was_trained(workers: int) -> None:
    data = ContinualDataModule([Task(Stream(9)), Task(Stream(9))], batch_size=2, num_workers=workers)
    data.load_state_dict({"current_task": 1, "epoch": 3, "batches": 2, "batches_left": 4})
    assert data.current_task == 1
    assert numbers_of(data.train_dataloader()) == [[4, 5], [6, 7]]


@pytest.mark.parametrize("options", [{"epochs_per_task": 2}, {"steps_per_task": 5}], ids=str)
def test_a_stream_of_iterable_data_sets_is_trained(trainer: Callable[..., L.Trainer], options: Any) -> None:
    class Samples(Stream):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.full((4,), number / 1000.0), 0) for number in range(self.number)])

    data = ContinualDataModule([Task(Samples(6)), Task(Samples(4))], batch_size=2)
    trainer(recorder := Recorder(), TaskStream(**options)).fit(Classifier(), datamodule=data)
    seen = [(task, sample) for task, _, sample in recorder.trained]
    first, second = [(0, [n, n + 1]) for n in (0, 2, 4)], [(1, [n, n + 1]) for n in (0, 2)]
    expected = first + first[:2] + second * 2 + second[:1] if "steps_per_task" in options else first * 2 + second * 2
    assert seen == expected


# --- Hold-out, options, state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "held"), [(0.2, 2), (0.25, 2), (0.001, 1), (0.89, 9)])
def test_held_out_samples_are_disjoint_from_training_and_always_the_same(fraction: float, held: int) -> None:
    def parts(seed: int = 0) -> list[tuple[list[int], list[int]]]:
        data = ContinualDataModule(
            [Task(counting(0, 10)), Task(counting(0, 10))], batch_size=3, val_fraction=fraction, seed=seed
        )
        found = []
        for data.current_task in range(2):
            loaders = data.train_dataloader(), data.val_dataloader()
            found.append(tuple(list(chain(*numbers_of(loader))) for loader in loaders))
        return found

    for train, val in parts():
        assert len(val) == held
        assert sorted(train + val) == list(range(10))
        assert val == sorted(val)
    assert parts() == parts()
    if held == 2:
        assert parts()[0][1] != parts()[1][1]
        assert parts()[0] != parts(seed=1)[0]


def test_validation_data_that_a_task_brings_is_used_as_it_is() -> None:
    tasks = [Task(counting(0, 10), counting(100, 2)), Task(counting(0, 10))]
    data = ContinualDataModule(tasks, batch_size=20, val_fraction=0.5)
    assert numbers_of(data.val_dataloader()) == [[100, 101]]
    assert len(numbers_of(data.train_dataloader())[0]) == 10
    assert len(data.training_data(0)) == 10
    data.current_task = 1
    assert len(numbers_of(data.val_dataloader())[0]) == 5
    assert len(data.training_data(1)) == 5


def test_further_arguments_reach_the_loaders() -> None:
    def collate(samples: list[Any]) -> Any:
        return [len(samples)]

    tasks = [Task(counting(0, 5), counting(0, 5), counting(0, 5))]
    data = ContinualDataModule(
        tasks, batch_size=2, num_workers=1, persistent_workers=True, pin_memory=True, collate_fn=collate, drop_last=True
    )
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()[0]
    for loader in (train, val, test):
        assert loader.num_workers == 1
        assert loader.persistent_workers
        assert loader.pin_memory
        assert loader.collate_fn is collate
    assert (len(train), len(val), len(test)) == (2, 3, 3)  # an evaluation drops nothing
    data = ContinualDataModule(tasks, batch_size=2, collate_fn=collate, drop_last=True)
    assert list(data.train_dataloader()) == [[2], [2]]
    assert list(data.val_dataloader()) == [[2], [2], [1]]


def test_batches_left_limits_the_next_loader() -> None:
    data = ContinualDataModule([Task(counting(0, 9))], batch_size=2, shuffle=False)
    assert len(data.train_dataloader()) == 5
    data.batches_left = 2
    assert len(data.train_dataloader()) == 2
    assert numbers_of(data.train_dataloader()) == [[0, 1], [2, 3]]
    data.batches_left = 100
    assert numbers_of(data.train_dataloader()) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_state_is_where_the_stream_stands() -> None:
    data = ContinualDataModule([Task(counting(0, 9))] * 3, batch_size=2, shuffle=False)
    state = {"current_task": 2, "epoch": 4, "batches": 1, "batches_left": 3}
    data.load_state_dict(state)
    assert data.state_dict() == state
    assert numbers_of(data.train_dataloader()) == [[2, 3], [4, 5]]
    data.load_state_dict({**state, "batches_left": -1})
    assert data.batches_left is None
    data.setup("fit")
    assert data.state_dict() == {"current_task": 2, "epoch": 0, "batches": 0, "batches_left": -1}


def test_a_loader_begins_where_training_stands_in_the_order_of_its_epoch() -> None:
    data = ContinualDataModule([Task(counting(0, 9))], batch_size=2)
    data.load_state_dict({"current_task": 0, "epoch": 4, "batches": 2, "batches_left": -1})
    sampler = task_sampler(9)
    sampler.set_epoch(4)
    assert numbers_of(data.train_dataloader()) == batches_of(sampler, 2)[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "`tasks` must hold at least one task, but got none. Pass what `split_by_class"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, but got 0"),
        ({"val_fraction": 1.0}, r"`val_fraction` must lie in \[0, 1\), but got 1.0. Pass the share"),
        ({"val_fraction": -0.1}, r"`val_fraction` must lie in \[0, 1\), but got -0.1"),
        ({"sampler": None}, "`sampler` cannot be passed: the order of a stream.*Use `shuffle=False`"),
        ({"batch_sampler": None}, "`batch_sampler` cannot be passed"),
        ({"generator": None}, "`generator` cannot be passed"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualDataModule(**{"tasks": [Task(counting(0, 4))], **arguments})


def test_a_task_outside_the_stream_is_refused() -> None:
    data = ContinualDataModule([Task(counting(0, 4))] * 2)
    for task in (-1, 2):
        with pytest.raises(ValueError, match=rf"`current_task` must lie in 0..1, but got {task}"):
            data.current_task = task


def test_a_checkpoint_of_a_longer_stream_is_refused() -> None:
    data = ContinualDataModule([Task(counting(0, 4))] * 2)
    with pytest.raises(ValueError, match=r"is in task 2, but the stream has 2 tasks. Resume with the tasks"):
        data.load_state_dict({"current_task": 2, "epoch": 0, "batches": 0, "batches_left": -1})


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused() -> None:
    data = ContinualDataModule([Task(counting(0, 2))], val_fraction=0.9)
    with pytest.raises(ValueError, match=r"`val_fraction=0.9` leaves no training data of the 2 of task 0"):
        data.train_dataloader()


def test_nothing_can_be_held_out_of_an_iterable_data_set() -> None:
    data = ContinualDataModule([Task(Stream(4))], val_fraction=0.5)
    with pytest.raises(ValueError, match=r"needs data sets with a length, but task 0 is an iterable one. Pass `val=`"):
        data.train_dataloader()


def test_tasks_without_test_data_are_named() -> None:
    data = ContinualDataModule([Task(counting(0, 4), test=counting(0, 1)), Task(counting(0, 4))])
    with pytest.raises(ValueError, match=r"must have test data, but tasks \[1\] have none. Pass `test=`"):
        data.test_dataloader()
    assert data.evaluation_dataloader(1, "test") is None
    assert data.evaluation_dataloader(0, "val") is None


def test_a_loader_serves_its_epoch_again_when_asked_again() -> None:
    data = ContinualDataModule([Task(counting(0, 9))], batch_size=2)
    loader = data.train_dataloader()
    assert isinstance(loader, TaskLoader)
    assert numbers_of(loader) == numbers_of(loader)
