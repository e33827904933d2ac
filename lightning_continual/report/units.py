"""Figures of the units that tasks are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_continual._extras import require
from lightning_continual.capacity import UnitCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"reused": "#00204c", "idle": "#7c7b78", "new": "#ffe945", "free": "#e8e8e8"}


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
