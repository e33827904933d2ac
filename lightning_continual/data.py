"""The data module of a stream: the loaders of the current task, in an order that survives a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from lightning_continual import _host
from lightning_continual.tasks import Task


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts, and is the same on every machine.

    Example:
        >>> seed_of(0, 1, 2) == seed_of(0, 1, 2), seed_of(0, 1, 2) == seed_of(0, 2, 1)
        (True, False)
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class TaskSampler(DistributedSampler[Any]):
    """The training order of one task: a function of (seed, task, epoch), computed when it is first needed.

    Process r of W takes every W-th sample from the r-th on, so that W processes together see, batch by batch, what one
    process with W times the batch size sees. As in every `DistributedSampler`, the first samples come a second time
    where the processes do not divide the data set. Unlike it, an order without shuffling stays as it is: Lightning
    leaves a sampler of this class alone.
    """

    start = 0
    """The number of the epoch's samples of this process that are already trained."""

    def __init__(self, dataset: Any, *, shuffle: bool, seed: int, task: int, limit: int | None, trainer: Any) -> None:
        world_size, rank = _processes(trainer)
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.task = task
        if limit is not None:
            self.num_samples = min(self.num_samples, limit)

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.task, self.epoch))
            order = torch.randperm(length, generator=generator)
        else:
            order = torch.arange(length)
        own = torch.arange(self.start, self.num_samples) * self.num_replicas + self.rank
        yield from order[own % length].tolist()


class EvaluationSampler(DistributedSampler[Any]):
    """Every sample once, in order, over all processes: for scores, which are joined over processes sample by sample.

    All processes have the same number of batches. Only where that cannot be otherwise (the last round of batches has
    fewer samples than there are processes) some processes repeat one sample.
    """

    def __init__(self, dataset: Any, *, batch_size: int, trainer: Any) -> None:
        world_size, rank = _processes(trainer)
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        least, more = divmod(len(dataset), world_size)
        repeats = more > 0 and least % batch_size == 0
        self.num_samples = least + (rank < more or repeats)

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        return iter([(self.rank + self.num_replicas * number) % length for number in range(self.num_samples)])


class TaskLoader(DataLoader[Any]):
    """The training loader of one task, which begins where training stands.

    The workers' seeds are a function of (seed, task, epoch); the global random state is not drawn from.

    Args:
        dataset: The task's training data.
        position: Returns (epoch, batches of it that are already trained) when an epoch begins.
        seeds: Seed and task.
        limit: The largest number of batches of an epoch; all when ``None``.
        loader: Further arguments of `torch.utils.data.DataLoader`.
    """

    serves_its_sampler = True
    """What it serves is what its sampler draws, and nothing else: another order may take its place."""

    def __init__(
        self,
        dataset: Any,
        *,
        position: Callable[[], tuple[int, int]],
        seeds: tuple[int, int],
        limit: int | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(dataset, generator=torch.Generator(), **loader)
        self.position = position
        self.seeds = seeds
        self.limit = limit

    def __iter__(self) -> Any:
        epoch, batches = self.position()
        assert self.generator is not None
        self.generator.manual_seed(seed_of(*self.seeds, epoch, "workers"))
        if isinstance(self.sampler, TaskSampler):
            assert self.batch_size is not None
            self.sampler.set_epoch(epoch)
            self.sampler.start = batches * self.batch_size
            return super().__iter__()
        return islice(super().__iter__(), batches, self.limit)

    def __len__(self) -> int:
        length = super().__len__()
        return length if self.limit is None else min(length, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader can be resumed; where it stands is the data module's state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: see `state_dict`."""


class ContinualDataModule(L.LightningDataModule):
    r"""Serves a stream of tasks, one at a time.

    `train_dataloader` and `val_dataloader` serve the task `current_task`, which `TaskStream` moves on (or you do, in
    runs of one fit a task); `test_dataloader` serves every task, a loader each.

    The order of the training data is a function of (``seed``, task, epoch), whatever the number of workers, and where
    training stands in it is saved in checkpoints. Under several processes, each has its share of every batch, and a
    stream that is not shuffled stays in order.

    Args:
        tasks: The tasks in the order of training, as the builders return them (`split_by_class`, ...).
        batch_size: Samples of one batch, on each process.
        val_fraction: Share in [0, 1) of a task's training data to hold out for validation, drawn at random by
            ``seed``, in tasks that bring no validation data.
        num_workers: Processes that load data.
        shuffle: Whether to shuffle the training data anew in every epoch. Iterable data sets keep their own order, and
            under several processes (or workers) must divide themselves.
        seed: Determines order and hold-out.
        **loader: Further arguments of `torch.utils.data.DataLoader`: ``pin_memory``, ``persistent_workers``,
            ``collate_fn``, ``drop_last``, ...

    Raises:
        ValueError: If there are no tasks, or an argument lies outside its range.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> def period(start):
        ...     return Task(TensorDataset(torch.arange(start, start + 6.0)))
        >>> data = ContinualDataModule([period(0), period(10)], batch_size=2, shuffle=False)
        >>> [batch[0].tolist() for batch in data.train_dataloader()]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        >>> data.current_task = 1
        >>> next(iter(data.train_dataloader()))[0].tolist()
        [10.0, 11.0]
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        batch_size: int = 32,
        *,
        val_fraction: float = 0.0,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        **loader: Any,
    ) -> None:
        super().__init__()
        if len(tasks) == 0:
            raise ValueError(
                "`tasks` must hold at least one task, but got none. Pass what `split_by_class(...)` returns."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"`val_fraction` must lie in [0, 1), but got {val_fraction}. Pass the share of each task's training"
                " data to validate on, for example 0.1."
            )
        if taken := {"sampler", "batch_sampler", "generator"} & loader.keys():
            raise ValueError(
                f"`{taken.pop()}` cannot be passed: the order of a stream is a function of `seed`, the task and the"
                " epoch. Use `shuffle=False` for data in a fixed order, or an iterable data set for another order."
            )
        self.tasks = list(tasks)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.seed = seed
        self.batches_left: int | None = None
        """The largest number of batches that the next training loader serves; all when ``None``."""
        self._loader = loader
        self._current_task = 0
        self._resumed = (0, 0)
        overridden = type(self).val_dataloader is not ContinualDataModule.val_dataloader
        if val_fraction == 0 and all(task.val is None for task in self.tasks) and not overridden:
            # Lightning does not validate with a data module that does not override this.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def num_tasks(self) -> int:
        """The number of tasks."""
        return len(self.tasks)

    @property
    def current_task(self) -> int:
        """The task, from 0, whose data the next train and validation loaders serve."""
        return self._current_task

    @current_task.setter
    def current_task(self, task: int) -> None:
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"`current_task` must lie in 0..{self.num_tasks - 1}, but got {task}.")
        self._current_task = task

    def train_dataloader(self) -> TaskLoader:
        """Return the training loader of the current task."""
        train = self.training_data(self.current_task)
        loader = {"drop_last": False, **self._loader}
        if not isinstance(train, IterableDataset):
            loader["sampler"] = TaskSampler(
                train,
                shuffle=self.shuffle,
                seed=self.seed,
                task=self.current_task,
                limit=None if self.batches_left is None else self.batches_left * self.batch_size,
                trainer=self.trainer,
            )
        return TaskLoader(
            train,
            position=self._position,
            seeds=(self.seed, self.current_task),
            limit=self.batches_left,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            **loader,
        )

    def val_dataloader(self) -> Any:
        """Return the validation loader of the current task; an empty list where only other tasks have such data."""
        loader = self._evaluation_loader(self.current_task, "val", self._even_sampler)
        return [] if loader is None else loader

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test loaders of all tasks."""
        loaders = [self._evaluation_loader(task, "test", self._even_sampler) for task in range(self.num_tasks)]
        if missing := [task for task, loader in enumerate(loaders) if loader is None]:
            raise ValueError(
                f"Every task must have test data, but tasks {missing} have none. Pass `test=` to the function that"
                " makes the stream, or to `Task`."
            )
        return [loader for loader in loaders if loader is not None]

    def evaluation_dataloader(self, task: int, split: str) -> DataLoader[Any] | None:
        """Return a loader over a task's ``"val"`` or ``"test"`` data, every sample once, in order.

        This is for scores that are joined by the number of samples. `val_dataloader` and `test_dataloader` differ from
        it under several processes: like Lightning's own they give each process as many samples, the first ones a
        second time, for ``self.log(sync_dist=True)`` goes wrong otherwise.

        Args:
            task: The task, from 0.
            split: ``"val"`` or ``"test"``.

        Returns:
            The loader, or ``None`` where the task has no such data.
        """
        return self._evaluation_loader(task, split, self._exact_sampler)

    def _evaluation_loader(
        self, task: int, split: str, sampler: Callable[[Any], DistributedSampler[Any]]
    ) -> DataLoader[Any] | None:
        dataset = self._split(task)[1] if split == "val" else self.tasks[task].test
        if dataset is None:
            return None
        loader = {**self._loader, "drop_last": False}
        if not isinstance(dataset, IterableDataset):
            loader["sampler"] = sampler(dataset)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(seed_of(self.seed, task, split)),
            **loader,
        )

    def _exact_sampler(self, dataset: Any) -> EvaluationSampler:
        return EvaluationSampler(dataset, batch_size=self.batch_size, trainer=self.trainer)

    def _even_sampler(self, dataset: Any) -> DistributedSampler[Any]:
        world_size, rank = _processes(self.trainer)
        return DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=False)

    def training_data(self, task: int) -> Dataset[Any]:
        """Return the data that a task is trained on: without what ``val_fraction`` holds out."""
        return self._split(task)[0]

    def setup(self, stage: str) -> None:
        """Forget where an earlier fit was resumed or broken off; what is restored for this fit comes after."""
        self._resumed = (0, 0)
        if stage == "fit" and self.trainer is not None:
            _host.forget_broken_epoch(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the task, and where in it training stands."""
        epoch, batches = self._resumed if self.trainer is None else _host.position(self.trainer)
        limit = -1 if self.batches_left is None else self.batches_left
        return {"current_task": self.current_task, "epoch": epoch, "batches": batches, "batches_left": limit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if state_dict["current_task"] >= self.num_tasks:
            raise ValueError(
                f"The checkpoint is in task {state_dict['current_task']}, but the stream has {self.num_tasks} tasks."
                " Resume with the tasks that the run was started with (more may follow)."
            )
        self.current_task = state_dict["current_task"]
        self.batches_left = None if state_dict["batches_left"] < 0 else state_dict["batches_left"]
        self._resumed = state_dict["epoch"], state_dict["batches"]

    def _position(self) -> tuple[int, int]:
        epoch = 0 if self.trainer is None else _host.epochs_processed(self.trainer)
        return max((epoch, 0), self._resumed)

    def _split(self, task: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Return the training and validation data of a task, with ``val_fraction`` held out where it must be."""
        data = self.tasks[task]
        if data.val is not None or self.val_fraction == 0:
            return data.train, data.val
        if isinstance(data.train, IterableDataset):
            raise ValueError(
                f"`val_fraction` needs data sets with a length, but task {task} is an iterable one. Pass `val=` to"
                " `Task`."
            )
        length = len(data.train)  # type: ignore[arg-type]
        held = max(1, round(length * self.val_fraction))
        if held == length:
            raise ValueError(
                f"`val_fraction={self.val_fraction}` leaves no training data of the {length} of task {task}."
            )
        generator = torch.Generator().manual_seed(seed_of(self.seed, task, "val_fraction"))
        order = torch.randperm(length, generator=generator)
        val, train = order[:held].sort().values.tolist(), order[held:].sort().values.tolist()
        return Subset(data.train, train), Subset(data.train, val)


def _processes(trainer: Any) -> tuple[int, int]:
    """Return the number of processes, and which of them this is."""
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
