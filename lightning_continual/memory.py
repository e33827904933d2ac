"""Memories: which of the samples seen are kept, and which of the kept ones come back.

A memory holds leaves (see `lightning_continual._batch`), so samples of any structure, and knows of each its task and,
where given, its label. Every memory draws its random numbers from a generator of its own.
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor

from lightning_continual._batch import Leaf, take
from lightning_continual._store import DiskStore, RamStore, grown, restore

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
        return self._store.get(slots) if len(slots) else []

    def distribute(self, rank: int, world_size: int) -> None:
        """Become the part of process ``rank``: a share of the capacity, a generator and a subfolder of its own.

        The first ``capacity % world_size`` processes take the remainder. Exemplars on disk go to ``path/rank-{rank}``
        if there is more than one process. Called again with the same arguments it does nothing.

        Raises:
            ValueError: If ``rank`` is not one of ``world_size``, or samples have been added.

        Example:
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
            self._generator = _generator(self.seed, rank, world_size, num_seen)
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
        return {**self.__dict__, "_generator": self._generator.get_state(), "_weights": None}

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
        self._generator = _generator(self.seed, rank, world_size)
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
        self._store.put(slots, take(leaves, positions))
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


@final
class ReservoirMemory(Memory):
    r"""A uniform sample of everything seen: after :math:`n` samples, each is kept with probability :math:`M / n`.

    Vitter's algorithm R: sample :math:`t = 1, 2, \ldots` goes to slot :math:`t - 1` while :math:`t \le M`; after that
    a slot :math:`j` is drawn uniformly from :math:`\{0, \ldots, t - 1\}`, and the sample replaces what is there if
    :math:`j < M`. It does not matter how samples are cut into batches.

    A memory loaded into a larger capacity than it was filled to keeps new samples at the rate at which the old ones
    had been kept, until it is full; so old and new stay equally represented.

    Args:
        capacity: :math:`M`, the number of exemplars, over all processes. 0 keeps nothing.
        path: A folder for the exemplars; None keeps them in RAM.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.

    Example:
        >>> memory = ReservoirMemory(capacity=3)
        >>> for start in range(0, 100, 10):
        ...     memory.add([torch.arange(start, start + 10)], task=0)
        >>> len(memory), memory.num_seen
        (3, 100)

    References:
        - Vitter. *Random sampling with a reservoir.* ACM Transactions on Mathematical Software 1985.
    """

    def __init__(self, capacity: int = 2000, *, path: str | os.PathLike[str] | None = None, seed: int = 0) -> None:
        super().__init__(capacity, path=path, seed=seed)
        self._rate = 1.0  # of keeping, while there is room

    def add(self, leaves: Sequence[Leaf], *, task: int, labels: Tensor | None = None) -> None:
        """Offer samples to the memory, which keeps some of them (see `Memory.add`)."""
        num = len(leaves[0])
        columns = self._described(num, task, labels)
        if self._rate < 1 and self._length < self._share:
            positions, slots = self._offer_to_room(num)
        else:
            slots = _reservoir_slots((num,), self._num_seen, self._share, self._generator)
            positions = (slots < self._share).nonzero().flatten()
            slots = slots[positions]
        if len(positions):
            last = _last_writers(slots)
            self._write(leaves, columns, positions[last], slots[last])
        self._num_seen += num

    def state_dict(self) -> dict[str, Any]:
        """Return what this process holds (see `Memory.state_dict`)."""
        return {**super().state_dict(), "rate": self._rate}

    def _offer_to_room(self, num: int) -> tuple[Tensor, Tensor]:
        """Fill free slots at the rate at which the present exemplars were kept, and go on from there."""
        room = self._share - self._length
        kept = torch.rand(num, generator=self._generator, dtype=torch.float64) < self._rate
        positions = kept.nonzero().flatten()[:room]
        slots = self._length + torch.arange(len(positions))
        if len(positions) < room:
            return positions, slots
        start = int(positions[-1]) + 1
        rest = _reservoir_slots((num - start,), self._num_seen + start, self._share, self._generator)
        accepted = (rest < self._share).nonzero().flatten()
        return torch.cat((positions, start + accepted)), torch.cat((slots, rest[accepted]))

    def _reduce(self, parts: Sequence[dict[str, Any]], columns: dict[str, Tensor], capacity: int) -> Tensor:
        num, num_seen = len(columns["tasks"]), sum(int(part["num_seen"]) for part in parts)
        self._rate = num / num_seen if num_seen else 1.0
        if num <= capacity:
            return torch.arange(num)
        return torch.randperm(num, generator=_generator(self.seed, num_seen))[:capacity].sort().values

    def _settle(self, part: dict[str, Any] | None) -> None:
        if part is not None and part["share"] == self._share:
            self._rate = float(part["rate"])


class _GroupedMemory(Memory, ABC):
    """A memory whose groups share the capacity equally, each keeping what has the highest priority.

    A group that was over its quota has a floor, the highest priority it has ever dropped; what is not above is not
    kept. So a group holds exactly those of its samples that lie above its floor.
    """

    def __init__(
        self, capacity: int = 2000, *, growing: bool = False, path: str | os.PathLike[str] | None = None, seed: int = 0
    ) -> None:
        self.growing = growing
        self._groups: dict[int, int] = {}
        self._held = torch.empty(0, dtype=torch.int64)
        self._floors = torch.empty(0, dtype=torch.float64)
        super().__init__(capacity, path=path, seed=seed)
        self._columns["priorities"] = torch.empty(0, dtype=torch.float64)

    def add(self, leaves: Sequence[Leaf], *, task: int, labels: Tensor | None = None) -> None:
        """Offer samples to the memory, which keeps some of them (see `Memory.add`)."""
        num = len(leaves[0])
        self._add(leaves, self._described(num, task, labels), self._priorities(num))

    def state_dict(self) -> dict[str, Any]:
        """Return what this process holds (see `Memory.state_dict`)."""
        groups = torch.tensor(list(self._groups), dtype=torch.int64)
        return {**super().state_dict(), "groups": groups, "floors": self._floors.clone()}

    @abstractmethod
    def _priorities(self, num: int) -> Tensor:
        """Return the priorities of ``num`` new samples (float64)."""

    @abstractmethod
    def _ids(self, columns: dict[str, Tensor]) -> Tensor:
        """Return the group of each sample."""

    def _add(self, leaves: Sequence[Leaf], columns: dict[str, Tensor], priorities: Tensor) -> None:
        num, held = len(priorities), self._length
        columns["priorities"] = priorities
        unique, inverse = torch.unique(self._ids(columns), return_inverse=True)
        table = self._index(unique)
        index = table[inverse]
        passing = (priorities > self._floors[index]).nonzero().flatten()
        counts = self._held + torch.bincount(index[passing], minlength=len(self._held))
        quotas = self._quotas(counts, self._share)
        victims = torch.empty(0, dtype=torch.int64)
        if bool((counts > quotas).any()):
            ids = torch.cat(
                (self._ids({name: c[:held] for name, c in self._columns.items()}), unique[inverse][passing])
            )
            ranking = torch.cat((self._columns["priorities"][:held], priorities[passing]))
            dropped, floors = self._drop(ids, ranking, counts - quotas)
            victims = dropped[dropped < held]
            stays = torch.ones(len(passing), dtype=torch.bool)
            stays[dropped[dropped >= held] - held] = False
            passing = passing[stays]
        else:
            floors = self._floors
        if len(passing):
            slots = torch.cat((victims, torch.arange(held, held + len(passing) - len(victims))))
            self._write(leaves, columns, passing, slots)
        self._held, self._floors = torch.minimum(counts, quotas), floors
        self._num_seen += num

    def _index(self, ids: Tensor) -> Tensor:
        """Return the numbers of groups, new ones included, in the order of their first arrival."""
        numbers = torch.tensor([self._groups.setdefault(group, len(self._groups)) for group in ids.tolist()])
        num_new = len(self._groups) - len(self._held)
        if num_new:
            self._held = torch.cat((self._held, torch.zeros(num_new, dtype=torch.int64)))
            self._floors = torch.cat((self._floors, torch.full((num_new,), -torch.inf, dtype=torch.float64)))
        return numbers.to(torch.int64)

    def _quotas(self, counts: Tensor, capacity: int) -> Tensor:
        """Return how many samples each group may hold, of ``counts`` that it has."""
        return counts.clamp(max=capacity) if self.growing else _fill(counts, capacity)

    def _drop(self, ids: Tensor, priorities: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples of lowest priority, ``excess[g]`` of each group, and the floors that this makes."""
        dropped, floors = [], self._floors.clone()
        for group, number in self._groups.items():
            if excess[number] > 0:
                members = (ids == group).nonzero().flatten()
                lowest = priorities[members].topk(int(excess[number]), largest=False)
                floors[number] = torch.maximum(floors[number], lowest.values.max())
                dropped.append(members[lowest.indices])
        return torch.cat(dropped), floors

    def _reduce(self, parts: Sequence[dict[str, Any]], columns: dict[str, Tensor], capacity: int) -> Tensor:
        self._groups, self._held, self._floors = {}, self._held[:0], self._floors[:0]
        for part in parts:
            numbers = self._index(part["groups"])
            self._floors[numbers] = torch.maximum(self._floors[numbers], part["floors"].cpu())
        ids = self._ids(columns)
        counts = self._count(ids)
        excess = counts - self._quotas(counts, capacity)
        stays = torch.ones(len(ids), dtype=torch.bool)
        if bool(excess.any()):
            dropped, self._floors = self._drop(ids, columns["priorities"], excess)
            stays[dropped] = False
        return stays.nonzero().flatten()

    def _deal(self, columns: dict[str, Tensor], world_size: int) -> Tensor:
        # Group by group, so that every process gets its part of every group.
        order = self._ids(columns).argsort(stable=True)
        places = torch.arange(len(order))
        if self.growing:
            _, counts = torch.unique(self._ids(columns), return_counts=True)
            places -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        owner = torch.empty_like(places)
        owner[order] = places % world_size
        return owner

    def _settle(self, part: dict[str, Any] | None) -> None:
        self._held = self._count(self._ids({name: column[: self._length] for name, column in self._columns.items()}))

    def _count(self, ids: Tensor) -> Tensor:
        unique, counts = torch.unique(ids, return_counts=True)
        numbers = self._index(unique)
        return torch.zeros_like(self._held).index_copy_(0, numbers, counts)


@final
class ClassBalancedMemory(_GroupedMemory):
    r"""As many exemplars of every class, each a uniform sample of that class.

    Every sample gets a random priority; every class keeps its highest. The quota :math:`q` of all classes is that of
    water-filling, :math:`\sum_c \min(n_c, q) \le M`, and what is left over goes to the classes seen first. Within
    a class the sample is exactly uniform as long as its quota only shrinks, which it always does, unless a state is
    loaded into a larger capacity or merged from several processes.

    Args:
        capacity: :math:`M`, the number of exemplars, over all processes. 0 keeps nothing.
        growing: Whether ``capacity`` is per class, and the memory grows with the number of classes.
        path: A folder for the exemplars; None keeps them in RAM.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.

    Example:
        >>> memory = ClassBalancedMemory(capacity=4)
        >>> memory.add([torch.arange(100)], task=0, labels=torch.tensor([7] * 98 + [8] * 2))
        >>> memory.labels.sort().values
        tensor([7, 7, 8, 8])

    References:
        - Chrysakis & Moens. *Online continual learning from imbalanced data.* ICML 2020 (the aim; the priorities are
          our way to it).
    """

    needs_labels: ClassVar[bool] = True

    def _priorities(self, num: int) -> Tensor:
        return torch.rand(num, generator=self._generator, dtype=torch.float64)

    def _ids(self, columns: dict[str, Tensor]) -> Tensor:
        return columns["labels"]


@final
class TaskMemory(_GroupedMemory):
    r"""As many exemplars of every task, the most recent ones of each: a ring per task.

    The quota of all tasks is that of water-filling, :math:`\sum_s \min(n_s, q) \le M`; what is left over goes to the
    first tasks.

    Args:
        capacity: :math:`M`, the number of exemplars, over all processes. 0 keeps nothing.
        growing: Whether ``capacity`` is per task, and the memory grows with the number of tasks.
        path: A folder for the exemplars; None keeps them in RAM.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.

    Example:
        >>> memory = TaskMemory(capacity=4)
        >>> memory.add([torch.arange(10)], task=0)
        >>> memory.add([torch.arange(10, 20)], task=1)
        >>> memory.draw(4, before=2)[0].sort().values
        tensor([ 8,  9, 18, 19])

    References:
        - Lopez-Paz & Ranzato. *Gradient episodic memory for continual learning.* NeurIPS 2017.
        - Chaudhry et al. *On tiny episodic memories in continual learning.* 2019 (ring buffer).
    """

    def _priorities(self, num: int) -> Tensor:
        return torch.arange(self._num_seen, self._num_seen + num, dtype=torch.float64)

    def _ids(self, columns: dict[str, Tensor]) -> Tensor:
        return columns["tasks"]

    def _settle(self, part: dict[str, Any] | None) -> None:
        super()._settle(part)
        # What comes next must be later than what was merged from elsewhere.
        priorities = self._columns["priorities"]
        if len(priorities):
            early = min(0.0, self._num_seen - 1 - float(priorities.max()))
            self._columns["priorities"] = priorities + early
            self._floors += early


@final
class HerdingMemory(_GroupedMemory):
    """As many exemplars of every class, those whose mean feature approaches the class's best (iCaRL).

    At the end of a task, `choose` ranks the task's samples by `herd` and `add` takes the chosen ones. When later
    classes make quotas shrink, the tail of every ranking goes.

    Args:
        capacity: The number of exemplars, over all processes. 0 keeps nothing.
        growing: Whether ``capacity`` is per class, and the memory grows with the number of classes.
        path: A folder for the exemplars; None keeps them in RAM.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.

    Example:
        >>> memory = HerdingMemory(capacity=2)
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> labels = torch.tensor([5, 5, 5])
        >>> indices, ranks = memory.choose(features, labels)
        >>> indices
        tensor([1, 0])
        >>> memory.add([indices], task=0, labels=labels[indices], ranks=ranks)
        >>> memory.draw(2, before=1)[0].sort().values
        tensor([0, 1])

    References:
        - Rebuffi et al. *iCaRL: Incremental classifier and representation learning.* CVPR 2017.
    """

    needs_labels: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def quota(self, num_classes: int) -> int:
        """Return how many exemplars this process holds of a class when there are ``num_classes``, rounded up.

        Example:
            >>> HerdingMemory(capacity=100).quota(3)
            34
        """
        return self._share if self.growing else -(-self._share // num_classes)

    def choose(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Choose exemplars of a task, as many of each class as there will be room for.

        Args:
            features: Of all samples of the task, ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            The indices of the chosen samples, and the rank of each within its class (0 is the first); both int64.

        Raises:
            ValueError: If ``labels`` are no integers ``(N,)``.
        """
        ids = self._described(len(features), 0, labels)["labels"]
        unique, new = torch.unique(ids, return_counts=True)
        known = torch.tensor([self._groups.get(group, -1) for group in unique.tolist()], dtype=torch.int64)
        counts = torch.cat((self._held, new[known < 0]))
        counts[known[known >= 0]] += new[known >= 0]
        numbers = known.clone()
        numbers[known < 0] = torch.arange(len(self._held), len(counts))
        quotas = self._quotas(counts, self._share)[numbers]
        indices, ranks = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for group, num in zip(unique.tolist(), torch.minimum(quotas, new).tolist(), strict=True):
            members = (ids == group).nonzero().flatten()
            indices.append(members[herd(features[members.to(features.device)], num)])
            ranks.append(torch.arange(num))
        return torch.cat(indices), torch.cat(ranks)

    def add(  # noqa: D417
        self, leaves: Sequence[Leaf], *, task: int, labels: Tensor | None = None, ranks: Tensor | None = None
    ) -> None:
        """Offer chosen samples to the memory.

        Args:
            ranks: The herding rank of each within its class, integers ``(B,)``; default: their order in the batch.

        Raises:
            ValueError: As `Memory.add`, and if ``ranks`` are not of shape ``(B,)``.
        """
        num = len(leaves[0])
        priorities = self._priorities(num) if ranks is None else -ranks.detach().to("cpu", torch.float64)
        if priorities.shape != (num,):
            raise ValueError(
                f"`ranks` must be of shape ({num},), but got {tuple(priorities.shape)}. Pass what `choose` returned."
            )
        self._add(leaves, self._described(num, task, labels), priorities)

    def _priorities(self, num: int) -> Tensor:
        return -torch.arange(num, dtype=torch.float64)

    def _ids(self, columns: dict[str, Tensor]) -> Tensor:
        return columns["labels"]


def herd(features: Tensor, num: int) -> Tensor:
    r"""Rank samples so that the mean feature of the first few is close to that of all.

    With features :math:`\varphi` normalised to length 1, and their mean :math:`\mu`, one after the other is picked:

    .. math::
        p_k = \operatorname*{argmin}_{x} \Bigl\| \mu - \frac1k \Bigl(\varphi(x) + \sum_{j<k} \varphi(p_j)\Bigr) \Bigr\|

    without repetition.

    Args:
        features: ``(N, D)``.
        num: How many to pick; at most ``N`` are.

    Returns:
        The indices of the picked samples, in their order (int64, ``(num,)``, on the CPU).

    Example:
        The mean of (1, 0), (0.6, 0.8), (0, 1) is (0.53, 0.6): the second is closest; with it, the first mends more.

        >>> herd(torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), 3)
        tensor([1, 0, 2])

    References:
        - Rebuffi et al. *iCaRL: Incremental classifier and representation learning.* CVPR 2017, Algorithm 4.
    """
    features = torch.nn.functional.normalize(features.detach().float())
    num = min(num, len(features))
    mean, squares = features.mean(0), features.square().sum(1)
    picked = torch.empty(num, dtype=torch.int64, device=features.device)
    barred = torch.zeros_like(squares)
    total = torch.zeros_like(mean)
    for k in range(1, num + 1):
        # ||k mean - total - x||^2 without what is the same for all x.
        distances = squares - 2 * (features @ (k * mean - total)) + barred
        picked[k - 1] = best = distances.argmin()
        barred[best] = torch.inf
        total += features[best]
    return picked.cpu()


def _reservoir_slots(shape: tuple[int, ...], num_seen: int, capacity: int, generator: torch.Generator) -> Tensor:
    """Return the slot of each of the next samples (the last dimension); those not below ``capacity`` are not kept."""
    count = torch.arange(num_seen + 1, num_seen + 1 + shape[-1])
    slots = torch.randint(2**63 - 1, shape, generator=generator).remainder_(count)
    return slots if num_seen >= capacity else torch.where(count <= capacity, count - 1, slots)


def _last_writers(slots: Tensor) -> Tensor:
    """Return the position of the last occurrence of every slot."""
    last = {slot: position for position, slot in enumerate(slots.tolist())}
    return torch.tensor(list(last.values()), dtype=torch.int64)


def _fill(counts: Tensor, capacity: int) -> Tensor:
    """Return ``min(counts, q)`` for the largest ``q`` that fits, and one more for the first groups if there is room."""
    if int(counts.sum()) <= capacity:
        return counts
    ordered = counts.sort().values
    levels = (capacity - ordered.cumsum(0) + ordered) // torch.arange(len(counts), 0, -1)
    level = int(levels[levels < ordered][0])
    quotas = counts.clamp(max=level)
    more = (counts > level).nonzero().flatten()[: capacity - quotas.sum()]
    return quotas.index_fill(0, more, level + 1)


def _by_label(tasks: Tensor, labels: Tensor, before: int) -> Tensor:  # noqa: ARG001
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


def _generator(*words: int) -> torch.Generator:
    """Return a generator whose seed mixes all of ``words``."""
    return torch.Generator().manual_seed(random.Random(repr(words)).getrandbits(63))
