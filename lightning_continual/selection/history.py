"""What a bandit did over time: probabilities, plays and rewards of its arms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_TABLES = ("probabilities", "plays", "rewards")
_MOST_ROWS, _FEWEST_ROWS, _MOST_NUMBERS = 1000, 50, 1_000_000


class History:
    """Rows over time, each with a probability, a number of plays and a reward for every arm.

    It holds at most a thousand rows, and of many arms fewer: a million numbers a table, but at least 50 rows. When
    there are more, every second is dropped, and from then on every second is left out: a longer history becomes a
    coarser one.

    Example:
        >>> history = History()
        >>> history.add(10, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), torch.tensor([0.3, float("nan")]))
        >>> history.table("rewards")
        tensor([[0.3000,    nan]])
        >>> history.table("plays", num_arms=3)
        tensor([[1., 0., nan]])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.latest: dict[str, Tensor] = {}
        """The row that was added last, kept or not, by the name of the table."""
        self._rows: dict[str, list[Tensor]] = {name: [] for name in _TABLES}
        self._stride, self._num_seen = 1, 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, probabilities: Tensor, plays: Tensor, rewards: Tensor) -> None:
        """Add a row.

        Args:
            step: How many steps of optimizers there were.
            probabilities: Of each arm to be played ``(K,)``.
            plays: How often each was ``(K,)``.
            rewards: What it gave, before it is scaled ``(K,)``; NaN where it gave nothing.
        """
        rows = zip(_TABLES, (probabilities, plays, rewards), strict=True)
        self.latest = {name: row.detach().cpu().float().clone() for name, row in rows}
        self._num_seen += 1
        if (self._num_seen - 1) % self._stride:
            return
        self.steps.append(step)
        for name, row in self.latest.items():
            self._rows[name].append(row)
        most = max(_FEWEST_ROWS, min(_MOST_ROWS, _MOST_NUMBERS // max(1, len(probabilities))))
        while len(self.steps) > most:
            self._stride *= 2
            self.steps = self.steps[::2]
            self._rows = {name: kept[::2] for name, kept in self._rows.items()}

    def table(self, name: str, num_arms: int = 0) -> Tensor:
        """Return a table over time.

        Args:
            name: ``"probabilities"``, ``"plays"`` or ``"rewards"``.
            num_arms: How many columns it has at least.

        Returns:
            The table ``(rows, K)``; NaN where an arm was not known yet.
        """
        rows = self._rows[name]
        found = pad_sequence(rows, True, torch.nan) if rows else torch.empty(0, 0)
        return torch.nn.functional.pad(found, (0, max(0, num_arms - found.shape[1])), value=torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return a tensor for each table, and numbers."""
        tables = {name: self.table(name) for name in _TABLES}
        steps = torch.tensor(self.steps, dtype=torch.int64)
        return {"steps": steps, **tables, "stride": self._stride, "num_seen": self._num_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.steps = state_dict["steps"].tolist()
        self._rows = {name: list(state_dict[name].unbind()) for name in _TABLES}
        self._stride, self._num_seen = state_dict["stride"], state_dict["num_seen"]
        self.latest = {}
