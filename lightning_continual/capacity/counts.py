"""How many units of each layer are free, new and reused, task by task, and a table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_continual.capacity.wiring import Wiring


@dataclass(frozen=True)
class UnitCounts:
    """The units of one layer after a task.

    Args:
        task: The task, from 0.
        layer: The layer.
        free: Units that no task needs.
        new: Units that this task needs, and no earlier one.
        reused: Units of earlier tasks that are active in this task.
        idle: Units of earlier tasks that are not active in this task.

    Example:
        >>> UnitCounts(task=1, layer="0", free=5, new=1, reused=3, idle=1).total
        10
    """

    task: int
    layer: str
    free: int
    new: int
    reused: int
    idle: int

    @property
    def total(self) -> int:
        """The number of units of the layer."""
        return self.free + self.new + self.reused + self.idle

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return ``{prefix}/{layer}/free``, ``new``, ``reused`` and ``idle``."""
        return {
            f"{prefix}/{self.layer}/{part}": float(getattr(self, part)) for part in ("free", "new", "reused", "idle")
        }


def count_units(wiring: Wiring, task: int, before: Tensor, reached: Tensor) -> list[UnitCounts]:
    """Count the units of every layer after a task.

    Args:
        wiring: The wiring.
        task: The task, from 0.
        before: Which units earlier tasks need: bool ``(num_units,)``.
        reached: Which units are active in this task: bool ``(num_units,)``.

    Returns:
        Counts, one a layer.

    Example:
        >>> units = Wiring({"0": range(4)}, {"1": range(4, 5)}, {}, {})
        >>> import torch
        >>> before, reached = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 0, 1]).bool()
        >>> count_units(units, 1, before, reached)
        [UnitCounts(task=1, layer='0', free=1, new=1, reused=1, idle=1)]
    """
    counts = []
    for name, units in wiring.layers.items():
        old, now = before[units.start : units.stop], reached[units.start : units.stop]
        parts = {"free": ~old & ~now, "new": ~old & now, "reused": old & now, "idle": old & ~now}
        counts.append(UnitCounts(task, name, **{part: int(units.sum()) for part, units in parts.items()}))
    return counts


def units_table(counts: Sequence[UnitCounts]) -> str:
    """Write counts as an aligned table in plain text.

    Args:
        counts: Counts, of any tasks and layers.

    Returns:
        One line for the header and one for each of ``counts``, without a final newline.

    Example:
        >>> print(units_table([UnitCounts(0, "net.0", free=7, new=3, reused=0, idle=0)]))
        task  layer  units  new  reused  idle  free
           0  net.0     10    3       0     0     7
    """
    table = [["task", "layer", "units", "new", "reused", "idle", "free"]]
    table += [[str(one) for one in (c.task, c.layer, c.total, c.new, c.reused, c.idle, c.free)] for c in counts]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    )
