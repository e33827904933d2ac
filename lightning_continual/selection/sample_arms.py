"""Samples dealt out to arms: by task and class, by clusters of features, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_continual._extras import require


class ArmTable:
    """Numbers arms, in the order in which their keys come.

    Example:
        >>> table = ArmTable()
        >>> table.numbers(0, torch.tensor([7, 3, 7]))
        tensor([1, 0, 1])
        >>> table.numbers(1, torch.tensor([7]))
        tensor([2])
        >>> table.names()
        ['0/3', '0/7', '1/7']
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, keys: Sequence[tuple[int, int]]) -> None:
        """Give a number to each key that has none."""
        for key in keys:
            self._numbers.setdefault(key, len(self._numbers))

    def unknown(self, group: int, keys: Tensor) -> list[tuple[int, int]]:
        """Return the keys of a group, sorted, that have no number yet."""
        found = [(group, key) for key in torch.unique(keys).tolist()]
        return [key for key in found if key not in self._numbers]

    def numbers(self, group: int, keys: Tensor) -> Tensor:
        """Return the arm of each key (int64, ``(B,)``) of a group; new ones get a number."""
        unique, inverse = torch.unique(keys, return_inverse=True)
        known = [self._numbers.setdefault((group, key), len(self._numbers)) for key in unique.tolist()]
        return torch.tensor(known, dtype=torch.int64)[inverse]

    def names(self) -> list[str]:
        """Return a name for each arm: group and key."""
        return [f"{group}/{key}" for group, key in self._numbers]

    def state_dict(self) -> dict[str, Any]:
        """Return the keys in the order of their numbers."""
        return {"keys": [list(key) for key in self._numbers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._numbers = {(group, key): number for number, (group, key) in enumerate(state_dict["keys"])}


def cluster_centres(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return the centres ``(K, D)`` of k-means of features ``(N, D)``; fewer where there are fewer different ones.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> cluster_centres(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2, seed=0).sort(0).values
        tensor([[ 0.5000],
                [10.5000]])
    """
    num_clusters = min(num_clusters, len(torch.unique(features, dim=0)))
    kmeans = require("sklearn.cluster", "kmeans").KMeans(num_clusters, n_init=3, random_state=seed)
    centres = kmeans.fit(features.double().numpy()).cluster_centers_
    return torch.as_tensor(centres, dtype=features.dtype)


def nearest(features: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest of the centres ``(K, D)`` to each of the features ``(B, D)``: int64, ``(B,)``.

    Example:
        >>> nearest(torch.tensor([[9.0], [1.0]]), torch.tensor([[0.5], [10.5]]))
        tensor([1, 0])
    """
    return torch.cdist(features, centres).argmin(1)


def pick(
    arms: Sequence[int],
    drawn: Sequence[int],
    past: Mapping[int, Sequence[int]],
    choose: Callable[[Sequence[int], int], list[int]],
) -> tuple[list[int], list[int], list[int]]:
    """Pick samples of a pool for slots that are dealt out to arms: at random, and anew only when an arm is used up.

    Args:
        arms: The arm of each new sample, ``B`` of them.
        drawn: The number of slots of each arm, ``K`` of them.
        past: The places of each arm's exemplars.
        choose: Returns so many of some numbers, at random and without repetition, as ``random.sample``.

    Returns:
        The positions of new samples, ascending; the places of exemplars; and the arm of each, in this order.

    Example:
        >>> import random
        >>> pick([0, 1, 0], [2, 1], {1: range(0)}, random.Random(0).sample)
        ([0, 1, 2], [], [0, 1, 0])
    """
    new: dict[int, list[int]] = {}
    for position, arm in enumerate(arms):
        new.setdefault(arm, []).append(position)
    positions: list[int] = []
    places: list[int] = []
    past_arms: list[int] = []
    for arm, num in enumerate(drawn):
        if num == 0:
            continue
        mine, exemplars = new.get(arm, []), past.get(arm, range(0))
        size = len(mine) + len(exemplars)
        chosen = [*range(size)] * (num // size) + choose(range(size), num % size)
        for one in chosen:
            if one < len(mine):
                positions.append(mine[one])
            else:
                places.append(exemplars[one - len(mine)])
                past_arms.append(arm)
    positions.sort()
    return positions, places, [*(arms[position] for position in positions), *past_arms]
