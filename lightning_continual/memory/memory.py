"""What all memories share: slots, drawing, state, and shares of several processes."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_continual._batch import Leaf, take
from lightning_continual.memory.store import DiskStore, RamStore, grown, restore

Weigh: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""From the tasks and labels (int64, ``(n,)``) of exemplars and the present task to nonnegative weights ``(n,)``."""

Selection: TypeAlias = "Literal['uniform', 'recent', 'balanced'] | Weigh"
"""How exemplars are drawn."""


class Memory(ABC):
    """What all memories share: slots, drawing, and state.

    In a run of several processes each holds its share of the capacity (see `distribute`); ``len``, ``num_seen``,
    ``tasks`` and ``labels`` are those of this process.

    Args:
        capacity: Number of exemplars, over all processes. 0 keeps nothing.
        path: A folder for the exemplars; None keeps them in RAM. Files there only grow (see `DiskStore`), so that the
            state of any time stays valid; it needs the folder.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.
    """

    needs_labels: ClassVar[bool] = False
    """Whether `add` needs labels."""
    needs_features: ClassVar[bool] = False
    """Whether exemplars are chosen by their features, at the end of a task."""
    _generator: torch.Generator

    def __init__(self, capacity: int, *, path: str | os.PathLike[str] | None, seed: int) -> None:
        if capacity < 0:
            raise ValueError(
                f"`capacity` must be a number of exemplars, 0 or more, but got {capacity}. Pass 0 to keep nothing."
            )
        self.capacity = capacity
        self.seed = seed
        self._path = None if path is None else Path(path)
        self._columns = {"tasks": torch.empty(0, dtype=torch.int64), "labels": torch.empty(0, dtype=torch.int64)}
        self._length = 0
        self._per_task = torch.zeros(1, dtype=torch.int64)
        self._num_seen = 0
        self._version = 0
        self._weights: tuple[tuple[int, int] | None, Tensor, Tensor] | None = None
        self._by_label: tuple[tuple[int, int], tuple[Tensor, dict[int, range]]] | None = None
        self._take_share(0, 1)

    def __len__(self) -> int:
        return self._length

    @property
    def tasks(self) -> Tensor:
        """The task of each exemplar (int64, ``(n,)``)."""
        return self._columns["tasks"][: self._length]

    @property
    def labels(self) -> Tensor:
        """The label of each exemplar (int64, ``(n,)``), -1 where unknown."""
        return self._columns["labels"][: self._length]

    @property
    def num_seen(self) -> int:
        """Number of samples ever offered."""
        return self._num_seen

    @property
    def generator(self) -> torch.Generator:
        """The memory's own random generator, which is part of its state."""
        return self._generator

    @property
    def version(self) -> int:
        """A number that is another one whenever the content is."""
        return self._version

    @abstractmethod
    def add(self, leaves: Sequence[Leaf], *, task: int, labels: Tensor | None = None) -> None:
        """Offer samples to the memory, which keeps some of them.

        Args:
            leaves: The samples: tensors ``(B, *)`` and lists of length ``B``.
            task: The task they are of, 0 or more.
            labels: Their labels, integers ``(B,)``.

        Raises:
            ValueError: If ``task`` is negative, labels are needed and missing or are no integers ``(B,)``, or samples
                differ in shape or type from those kept.
            OSError: If the disk is full. What was remembered is not lost.
        """

    def num_available(self, before: int) -> int:
        """Return how many exemplars are of tasks before ``before``."""
        return int(self._per_task[: max(before, 0)].sum())

    def draw(self, num: int, *, before: int, selection: Selection = "uniform", timescale: float = 1.0) -> list[Leaf]:
        r"""Draw exemplars of the tasks before ``before``, without replacement.

        They are drawn one after the other, each time with probabilities proportional to weights :math:`w_i`:

        - ``"uniform"``: :math:`w_i = 1`;
        - ``"recent"``: :math:`w_i = e^{-a_i / \tau}`, where the age :math:`a_i` is ``before - 1 - task``, in tasks;
        - ``"balanced"``: :math:`w_i = 1 / n_{y_i}`, where :math:`n_y` counts the exemplars of class :math:`y`;
        - a function of ``(tasks, labels, before)`` of the exemplars to draw from.

        The cost of the first two does not depend on the number of exemplars, unless few can be drawn; the weights
        of ``"balanced"`` are computed anew when the content or ``before`` have changed, those of a function always.

        Args:
            num: How many; fewer if there are fewer (of positive weight).
            before: The present task. Its own exemplars, and those of later tasks, are not drawn.
            selection: What the weights are.
            timescale: :math:`\tau`, in tasks, for ``"recent"``.

        Returns:
            The leaves of the exemplars, in random order; an empty list if there are none.

        Raises:
            ValueError: If ``selection`` is unknown, ``timescale`` is not positive, ``"balanced"`` meets an exemplar
                without label, or a function returns anything but finite nonnegative numbers ``(n,)``.

        Example:
            >>> from lightning_continual.memory import ReservoirMemory
            >>> memory = ReservoirMemory(capacity=10)
            >>> memory.add([torch.tensor([1.0, 2.0])], task=0)
            >>> memory.add([torch.tensor([3.0, 4.0])], task=1)
            >>> memory.draw(2, before=1)[0].sort().values
            tensor([1., 2.])
            >>> memory.draw(2, before=0)
            []
        """
        if not callable(selection) and selection not in ("uniform", "recent", "balanced"):
            raise ValueError(
                f"`selection` must be 'uniform', 'recent' or 'balanced', but got {selection!r}. Pass one of them, or a"
                " function of (tasks, labels, before) that returns weights."
            )
        if timescale <= 0:
            raise ValueError(f"`timescale` must be positive, but got {timescale}. Pass a number of tasks, such as 1.0.")
        num = min(num, self.num_available(before))
        if num <= 0:
            return []
        if selection in ("uniform", "recent"):
            slots = self._draw_by_task(num, before, timescale if selection == "recent" else torch.inf)
        else:
            slots = self._draw_weighted(num, before, selection if callable(selection) else None)
        return self.read(slots)

    def slots_by_label(self, before: int) -> tuple[Tensor, dict[int, range]]:
        """Return the slots of the exemplars of tasks before ``before``, sorted by label.

        Args:
            before: The present task.

        Returns:
            The slots ``(n,)``, and for each label the positions in them that have it.

        Example:
            >>> from lightning_continual.memory import ReservoirMemory
            >>> memory = ReservoirMemory(capacity=10)
            >>> memory.add([torch.tensor([1.0, 2.0, 3.0])], task=0, labels=torch.tensor([5, 7, 5]))
            >>> memory.slots_by_label(before=1)
            (tensor([0, 2, 1]), {5: range(0, 2), 7: range(2, 3)})
        """
        if self._by_label is None or self._by_label[0] != (self._version, before):
            eligible = (self.tasks < before).nonzero().flatten()
            labels, order = self.labels[eligible].sort(stable=True)
            found, counts = torch.unique_consecutive(labels, return_counts=True)
            ends = [0, *counts.cumsum(0).tolist()]
            places = {label: range(*ends[number : number + 2]) for number, label in enumerate(found.tolist())}
            self._by_label = (self._version, before), (eligible[order], places)
        return self._by_label[1]

    def read(self, slots: Tensor) -> list[Leaf]:
        """Return the leaves of the exemplars in ``slots``; an empty list if there are none.

        Example:
            >>> from lightning_continual.memory import ReservoirMemory
            >>> memory = ReservoirMemory(capacity=10)
            >>> memory.add([torch.tensor([1.0, 2.0, 3.0])], task=0)
            >>> memory.read(torch.tensor([2, 0]))
            [tensor([3., 1.])]
        """
        return self._store.get(slots) if len(slots) else []

    def distribute(self, rank: int, world_size: int) -> None:
        """Become the part of process ``rank``: a share of the capacity, a generator and a subfolder of its own.

        The first ``capacity % world_size`` processes take the remainder. Exemplars on disk go to ``path/rank-{rank}``
        if there is more than one process. Called again with the same arguments it does nothing.

        Raises:
            ValueError: If ``rank`` is not one of ``world_size``, or samples have been added.

        Example:
            >>> from lightning_continual.memory import ReservoirMemory
            >>> memory = ReservoirMemory(capacity=5)
            >>> memory.distribute(1, 2)
            >>> memory.add([torch.zeros(10)], task=0)
            >>> len(memory)
            2
        """
        if not 0 <= rank < world_size:
            raise ValueError(
                f"`rank` must be one of {world_size} processes, but got {rank}. Pass a number from 0 to world_size - 1."
            )
        if (rank, world_size) == (self._rank, self._world_size):
            return
        if self._num_seen:
            raise ValueError(
                f"A memory must be distributed before samples are added, but it has seen {self._num_seen}. Call"
                " `distribute` first, or give all parts of its state to `load_state_dict`."
            )
        self._take_share(rank, world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what this process holds: tensors, numbers, strings, lists and dicts, copied.

        On disk, the state holds where the exemplars lie, not the exemplars.
        """
        return {
            "class": type(self).__name__,
            "share": self._share,
            "num_seen": self._num_seen,
            "generator": self._generator.get_state(),
            "columns": {name: column[: self._length].clone() for name, column in self._columns.items()},
            "store": self._store.state(self._length),
        }

    def load_state_dict(self, parts: Sequence[dict[str, Any]], rank: int = 0, world_size: int = 1) -> None:
        """Take over the state of a memory, whatever the number of processes that it was saved by.

        With as many parts as processes, process ``rank`` goes on from ``parts[rank]`` to the bit. With another number
        exemplar ``i`` of all goes to process ``i % world_size`` and ``num_seen`` is shared in proportion. Nothing is
        lost, unless the capacity has become smaller; then a reservoir drops at random, the others by priority.

        Args:
            parts: The `state_dict` of every process, in RAM or on disk, in the order of ranks. Not kept, not changed.
            rank: This process.
            world_size: Number of processes.

        Raises:
            ValueError: If the state is of another class of memory, or there is none.
            FileNotFoundError: If exemplars on disk are missing.
        """
        names = sorted({str(part["class"]) for part in parts})
        if names != [type(self).__name__]:
            raise ValueError(
                f"The state of a {type(self).__name__} must come from a {type(self).__name__}, but it comes from"
                f" {' and '.join(names) or 'nothing'}. Make the memory that the checkpoint was made with."
            )
        self._take_share(rank, world_size)
        same = len(parts) == world_size
        chosen = [parts[rank]] if same else list(parts)
        columns = {name: torch.cat([part["columns"][name].cpu() for part in chosen]) for name in self._columns}
        num_seen = sum(int(part["num_seen"]) for part in chosen)
        kept = self._reduce(chosen, columns, self._share if same else self.capacity)
        if same:
            self._generator.set_state(chosen[0]["generator"].cpu())
        else:
            self._generator = new_generator(self.seed, rank, world_size, num_seen)
            owner = self._deal({name: column[kept] for name, column in columns.items()}, world_size)
            kept = kept[owner == rank]
            ends = [0, *torch.bincount(owner, minlength=world_size).cumsum(0).tolist()]
            total = max(ends[-1], 1)
            num_seen = num_seen * ends[rank + 1] // total - num_seen * ends[rank] // total
        self._columns = {name: column[kept] for name, column in columns.items()}
        self._length = len(kept)
        self._per_task = torch.bincount(self.tasks, minlength=1)
        self._num_seen = num_seen
        self._version += 1
        self._load_store(chosen, kept)
        self._settle(chosen[0] if same else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": self._generator.get_state(), "_weights": None, "_by_label": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])

    @abstractmethod
    def _reduce(self, parts: Sequence[dict[str, Any]], columns: dict[str, Tensor], capacity: int) -> Tensor:
        """Return which exemplars of ``parts`` (joined in ``columns``) stay within ``capacity``: int64, in order."""

    @abstractmethod
    def _settle(self, part: dict[str, Any] | None) -> None:
        """Derive what depends on the loaded content; ``part`` is what is gone on from, None if parts were merged."""

    def _deal(self, columns: dict[str, Tensor], world_size: int) -> Tensor:
        """Return the process that each of the loaded exemplars goes to."""
        return torch.arange(len(columns["tasks"])) % world_size

    def _take_share(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._share = self.capacity // world_size + (rank < self.capacity % world_size)
        self._generator = new_generator(self.seed, rank, world_size)
        folder = None if self._path is None else self._path / (f"rank-{rank}" if world_size > 1 else "")
        self._store: RamStore | DiskStore = RamStore() if folder is None else DiskStore(folder)

    def _load_store(self, parts: Sequence[dict[str, Any]], kept: Tensor) -> None:
        folder = self._store.path if isinstance(self._store, DiskStore) else None
        lengths = [len(part["columns"]["tasks"]) for part in parts]
        for number, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            source = restore(part["store"], folder)
            in_place = isinstance(source, RamStore) if folder is None else getattr(source, "path", None) == folder
            if in_place and len(parts) == 1 and len(kept) == length:
                self._store = source
                return
            first = sum(lengths[:number])
            slots = ((kept >= first) & (kept < first + length)).nonzero().flatten()
            for start in range(0, len(slots), 4096):
                block = slots[start : start + 4096]
                self._store.put(block, source.get(kept[block] - first))

    def _described(self, num: int, task: int, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the columns of ``num`` new samples."""
        if task < 0:
            raise ValueError(f"`task` must be 0 or more, but got {task}. Pass the index of the task.")
        if labels is None:
            if self.needs_labels:
                raise ValueError(
                    f"{type(self).__name__} must be given the labels of samples, but got none. Pass `label=` to"
                    " RehearsalCallback: a function of the batch that returns its labels."
                )
            return {"tasks": torch.full((num,), task), "labels": torch.full((num,), -1)}
        if labels.shape != (num,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"`labels` must be integers of shape ({num},), but got {tuple(labels.shape)} {labels.dtype}. Return"
                " one class a sample from `label=` of RehearsalCallback."
            )
        return {"tasks": torch.full((num,), task), "labels": labels.detach().to("cpu", torch.int64)}

    def _write(self, leaves: Sequence[Leaf], columns: dict[str, Tensor], positions: Tensor, slots: Tensor) -> None:
        """Put the samples at ``positions`` of a batch into ``slots``."""
        is_whole = torch.equal(positions, torch.arange(len(leaves[0])))  # as while a memory fills: no copy then
        self._store.put(slots, leaves if is_whole else take(leaves, positions))
        counts = torch.bincount(columns["tasks"][positions], minlength=len(self._per_task))
        counts[: len(self._per_task)] += self._per_task
        if int(slots.min()) < self._length:
            replaced = self._columns["tasks"][slots[slots < self._length]]
            counts -= torch.bincount(replaced, minlength=len(counts))
        self._per_task = counts
        self._length = max(self._length, int(slots.max()) + 1)
        for name, new in columns.items():
            self._columns[name] = column = grown(self._columns[name], self._length)
            column.index_copy_(0, slots, new.index_select(0, positions))
        self._version += 1

    def _draw_by_task(self, num: int, before: int, timescale: float) -> Tensor:
        """Draw slots with weights that depend on the task alone, without looking at all of them."""
        rates = torch.zeros(len(self._per_task), dtype=torch.float64)
        if timescale == torch.inf:
            rates[:before] = 1.0
        else:
            present = self._per_task[:before].nonzero().flatten()
            # Relative to the latest, and never 0: however old, an exemplar can be drawn.
            rates[present] = ((present - present[-1]).double() / timescale).exp().clamp(min=1e-300)
        # The first different ones of a sequence drawn with replacement are a draw without.
        num_tries = 16 + int(2 * num * self._length / float(self._per_task.double() @ rates))
        slots: list[int] = []
        if num_tries < self._length:
            tries = torch.randint(self._length, (num_tries,), generator=self._generator)
            luck = torch.rand(num_tries, generator=self._generator, dtype=torch.float64)
            slots = list(dict.fromkeys(tries[luck < rates[self.tasks[tries]]].tolist()))[:num]
        if len(slots) == num:
            return torch.tensor(slots)
        first = torch.tensor(slots, dtype=torch.int64)
        weights = rates[self.tasks].index_fill_(0, first, 0.0)
        rest = weights.nonzero().flatten()
        more = torch.multinomial(weights[rest], num - len(first), generator=self._generator)
        return torch.cat((first, rest[more]))

    def _draw_weighted(self, num: int, before: int, selection: Weigh | None) -> Tensor:
        """Draw slots with weights given by a function, or by the frequency of labels."""
        key = (self._version, before)
        if selection is not None or self._weights is None or self._weights[0] != key:
            eligible = (self.tasks < before).nonzero().flatten()
            weights = (selection or _by_label)(self.tasks[eligible], self.labels[eligible], before)
            weights = _checked(weights, len(eligible))
            self._weights = (key if selection is None else None), eligible[weights > 0], weights[weights > 0]
        _, slots, weights = self._weights
        num = min(num, len(slots))
        return slots[torch.multinomial(weights, num, generator=self._generator)] if num else slots


def _by_label(tasks: Tensor, labels: Tensor, before: int) -> Tensor:
    if bool((labels == -1).any()):
        raise ValueError(
            "`selection='balanced'` must know the label of every exemplar, but some were added without. Pass `label=`"
            " to RehearsalCallback: a function of the batch that returns its labels."
        )
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    weights: Tensor = counts[inverse].double().reciprocal()
    return weights


def _checked(weights: Tensor, num: int) -> Tensor:
    weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    wrong = weights[~(weights.isfinite() & (weights >= 0))]
    if weights.shape != (num,) or len(wrong):
        raise ValueError(
            f"`selection` must return finite nonnegative weights of shape ({num},), but got {tuple(weights.shape)} with"
            f" {wrong[:3].tolist() or 'no'} wrong values. Return one weight for each of the tasks and labels given."
        )
    return weights


def new_generator(*words: int) -> torch.Generator:
    """Return a generator whose seed mixes all of ``words``."""
    return torch.Generator().manual_seed(random.Random(repr(words)).getrandbits(63))
