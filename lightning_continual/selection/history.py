"""What a bandit did over time: probabilities, plays and rewards of its arms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CAPACITY = 1000
"""Rows kept at most; when there are more, every second is dropped, and from then on every second is left out."""


class History:
    """Rows over time, each with a probability, a number of plays and a reward for every arm.

    It never holds more than a thousand rows: a longer history becomes a coarser one.

    Example:
        >>> history = History()
        >>> history.add(10, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), torch.tensor([0.3, float("nan")]))
        >>> history.table("rewards")
        tensor([[0.3000,    nan]])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._rows: dict[str, list[Tensor]] = {"probabilities": [], "plays": [], "rewards": []}
        self._stride, self._num_seen = 1, 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, probabilities: Tensor, plays: Tensor, rewards: Tensor) -> None:
        """Add a row.

        Args:
            step: The Trainer's step.
            probabilities: Of each arm to be played ``(K,)``.
            plays: How often each was ``(K,)``.
            rewards: What it gave, before it is scaled ``(K,)``; NaN where it gave nothing.
        """
        self._num_seen += 1
        if (self._num_seen - 1) % self._stride:
            return
        self.steps.append(step)
        for name, row in (("probabilities", probabilities), ("plays", plays), ("rewards", rewards)):
            self._rows[name].append(row.detach().cpu().float().clone())
        if len(self.steps) > _CAPACITY:
            self._stride *= 2
            self.steps = self.steps[::2]
            self._rows = {name: rows[::2] for name, rows in self._rows.items()}

    def table(self, name: str) -> Tensor:
        """Return ``"probabilities"``, ``"plays"`` or ``"rewards"`` over time ``(rows, K)``; NaN before an arm was."""
        rows = self._rows[name]
        num_arms = max(map(len, rows), default=0)
        table = torch.full((len(rows), num_arms), torch.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return table

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, lists and dicts."""
        rows = {name: list(rows) for name, rows in self._rows.items()}
        return {"steps": list(self.steps), "rows": rows, "stride": self._stride, "num_seen": self._num_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.steps = list(state_dict["steps"])
        self._rows = {name: list(rows) for name, rows in state_dict["rows"].items()}
        self._stride, self._num_seen = state_dict["stride"], state_dict["num_seen"]
