"""A uniform sample of all that was seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_continual._batch import Leaf
from lightning_continual.memory.memory import Memory, new_generator


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
        return torch.randperm(num, generator=new_generator(self.seed, num_seen))[:capacity].sort().values

    def _settle(self, part: dict[str, Any] | None) -> None:
        if part is not None and part["share"] == self._share:
            self._rate = float(part["rate"])


def _reservoir_slots(shape: tuple[int, ...], num_seen: int, capacity: int, generator: torch.Generator) -> Tensor:
    """Return the slot of each of the next samples (the last dimension); those not below ``capacity`` are not kept."""
    count = torch.arange(num_seen + 1, num_seen + 1 + shape[-1])
    slots = torch.randint(2**63 - 1, shape, generator=generator).remainder_(count)
    return slots if num_seen >= capacity else torch.where(count <= capacity, count - 1, slots)


def _last_writers(slots: Tensor) -> Tensor:
    """Return the position of the last occurrence of every slot."""
    last = {slot: position for position, slot in enumerate(slots.tolist())}
    return torch.tensor(list(last.values()), dtype=torch.int64)
