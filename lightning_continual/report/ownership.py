"""Figures of adaptive compression: the search of a share, the capacity that tasks use, the scores they have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lightning_continual._extras import require
from lightning_continual.ownership import Ownership
from lightning_continual.search import Found, mean_share, posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def search_figure(
    found: Found, *, tolerance: float | None = None, label: str = "score", title: str = "", ax: Axes | None = None
) -> Figure:
    """Draw the search of a share: what was tried, what is expected between, and what was chosen.

    The curve is the mean of a Gaussian process through the trials (see `posterior`), the band two of its standard
    deviations, which mean something where there is one block. Trials without a score are crosses at the lower edge.

    Args:
        found: The search.
        tolerance: By how much the score may fall, drawn as a line below the score before; negative where it may rise;
            no line if None.
        label: What the score is.
        title: The title of the axes.
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there was no search.

    Example:
        >>> from lightning_continual.search import Trial
        >>> trials = Trial((0.5,), 0.90), Trial((0.9,), 0.60)
        >>> figure = search_figure(Found((0.5,), (100,), before=0.91, after=0.90, trials=trials), tolerance=0.01)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['posterior mean, ±2 SD', 'trials', 'before', 'tolerated', 'chosen']
    """
    if not found.trials:
        raise ValueError("`found` must have trials, but has none. Search the share instead of fixing it.")
    ax = _axes(ax, 5.2, 3.4)
    points = [(mean_share(one.shares, found.sizes), one.score) for one in found.trials]
    finite = [(share, score) for share, score in points if math.isfinite(score)]
    if len(finite) > 1:
        x, y = torch.tensor(finite, dtype=torch.float64).unbind(1)
        at = torch.linspace(float(x.min()), float(x.max()), 200, dtype=torch.float64)
        mean, deviation = posterior(x, y, at)
        ax.plot(at, mean, color="#00204c", label="posterior mean, ±2 SD")
        ax.fill_between(at, mean - 2 * deviation, mean + 2 * deviation, color="#00204c", alpha=0.15, linewidth=0)
    if finite:
        ax.plot(*zip(*finite, strict=True), "o", color="#7c7b78", label="trials")
    if lost := [share for share, score in points if not math.isfinite(score)]:
        ax.plot(lost, [0.02] * len(lost), "x", color="black", transform=ax.get_xaxis_transform(), label="no score")
    if found.before is not None:
        ax.axhline(found.before, color="#7c7b78", linewidth=1, label="before")
        if tolerance is not None:
            ax.axhline(found.before - tolerance, color="#7c7b78", linewidth=1, linestyle="--", label="tolerated")
    if found.after is not None:
        ax.plot([found.share], [found.after], "*", color="#ffe945", markeredgecolor="black", ms=14, label="chosen")
    ax.set(xlabel="share given back", ylabel=label, title=title)
    ax.legend(frameon=False, fontsize="small")
    return ax.figure.figure


def capacity_figure(ownership: Ownership, *, title: str = "", ax: Axes | None = None) -> Figure:
    """Draw what each task owns of each layer, in percent of its weights, as stacked bars; the last bar is all layers.

    Args:
        ownership: Who owns each weight.
        title: The title of the axes.
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no weights.

    Example:
        >>> figure = capacity_figure(Ownership({"w": torch.tensor([1, 2, 2, 0], dtype=torch.uint8)}))
        >>> [round(bar.get_height()) for bar in figure.axes[0].patches]  # of w and of all: task 0, task 1, free
        [25, 25, 50, 50, 25, 25]
    """
    counts = ownership.counts()
    if not counts:
        raise ValueError("`ownership` must have weights, but has none. Train a task.")
    layers = {**counts, "all": [sum(column) for column in zip(*counts.values(), strict=True)]}
    num_tasks = len(layers["all"]) - 1
    ax = _axes(ax, max(4.0, min(0.5 * len(layers) + 2.0, 16.0)), 3.4)
    colors = require("matplotlib", "plots").colormaps["cividis"]
    bottoms = [0.0] * len(layers)
    for task in [*range(num_tasks), None]:
        heights = [100.0 * one[0 if task is None else task + 1] / max(1, sum(one)) for one in layers.values()]
        color = "#e8e8e8" if task is None else colors(task / max(1, num_tasks - 1))
        name = "free" if task is None else f"task {task}"
        ax.bar(range(len(layers)), heights, 0.8, bottom=bottoms, label=name, color=color, edgecolor="white")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    ax.set(ylabel="weights (%)", title=title, ylim=(0, 100))
    ax.set_xticks(range(len(layers)), list(layers), rotation=90 if max(map(len, layers)) > 6 else 0)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, reverse=True)
    return ax.figure.figure


def scores_figure(
    found: Mapping[int, Found], *, label: str = "score", title: str = "", ax: Axes | None = None
) -> Figure:
    """Draw each task's score before and after compression, with the share given back above.

    Args:
        found: What was found for each task.
        label: What the score is.
        title: The title of the axes.
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no task has scores.

    Example:
        >>> figure = scores_figure({0: Found((0.75,), (8,), before=0.9, after=0.89)})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['75 %']
    """
    scored = {task: (one.before, one.after, one.share) for task, one in found.items() if one.after is not None}
    if not scored:
        raise ValueError("`found` must have scores, but has none. Train a task with a `monitor`.")
    ax = _axes(ax, max(3.6, min(0.7 * len(scored) + 1.6, 16.0)), 3.2)
    for offset, column, name, color in ((-0.2, 0, "before", "#7c7b78"), (0.2, 1, "after", "#00204c")):
        heights = [one[column] for one in scored.values()]
        ax.bar(
            [task + offset for task in scored],
            [math.nan if one is None else one for one in heights],
            0.38,
            label=name,
            color=color,
        )
    for task, (before, after, share) in scored.items():
        ax.annotate(
            f"{share:.0%}".replace("%", " %"), (task, max(before or 0.0, after or 0.0)), ha="center", va="bottom"
        )
    ax.margins(y=0.12)
    ax.set(xlabel="task", ylabel=label, title=title)
    ax.set_xticks(list(scored))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return ax.figure.figure


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    made: Axes = require("matplotlib.figure", "plots").Figure((width, height), layout="compressed").add_subplot()
    return made
