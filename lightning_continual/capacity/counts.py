"""How many units of each layer are free, new and reused, task by task: as a table, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_continual._extras import require
from lightning_continual.capacity.wiring import Wiring

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"reused": "#00204c", "idle": "#7c7b78", "new": "#ffe945", "free": "#e8e8e8"}


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


def units_figure(counts: Sequence[UnitCounts], *, title: str = "", ax: Axes | None = None) -> Figure:
    """Draw counts as stacked bars, in percent of a layer's units: a group of bars a layer, a bar a task.

    From below: reused, idle, new and free units. Colours are told apart by colour-blind readers. No global state of
    matplotlib is used: save the figure by ``savefig``.

    Args:
        counts: Counts, of any tasks and layers.
        title: The title of the axes.
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no counts.

    Example:
        >>> figure = units_figure([UnitCounts(0, "net.0", free=7, new=3, reused=0, idle=0)])
        >>> [round(bar.get_height()) for bar in figure.axes[0].patches]
        [0, 0, 30, 70]
    """
    if not counts:
        raise ValueError("`counts` must hold the counts of a task at least, but is empty. Train a task.")
    layers, tasks = (list(dict.fromkeys(values)) for values in zip(*((c.layer, c.task) for c in counts), strict=True))
    if ax is None:
        width = max(4.0, min(0.16 * len(layers) * (len(tasks) + 1) + 1.5, 16.0))
        ax = require("matplotlib.figure", "plots").Figure((width, 3.4), layout="compressed").add_subplot()
    figure = ax.figure.figure
    places = [layers.index(c.layer) * (len(tasks) + 1) + tasks.index(c.task) for c in counts]
    bottoms = [0.0] * len(counts)
    for part, color in _PARTS.items():
        heights = [100.0 * getattr(c, part) / max(1, c.total) for c in counts]
        ax.bar(places, heights, 0.9, bottom=bottoms, label=part, color=color, edgecolor="white", linewidth=0.3)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    middles = [place * (len(tasks) + 1) + (len(tasks) - 1) / 2 for place in range(len(layers))]
    ax.set(xlabel="layer, and task by task", ylabel="units (%)", title=title, ylim=(0, 100))
    ax.set_xticks(middles, layers, rotation=30 if max(map(len, layers)) > 6 else 0)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, reverse=True)
    return figure
