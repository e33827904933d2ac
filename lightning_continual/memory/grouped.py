"""Memories that give every class, or every task, the same room."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lightning_continual._batch import Leaf
from lightning_continual.memory.memory import Memory


class GroupedMemory(Memory, ABC):
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
class ClassBalancedMemory(GroupedMemory):
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
class TaskMemory(GroupedMemory):
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
