"""Figures of what bandits did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_continual._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bandit_figure(
    values: Tensor,
    steps: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    label: str = "probabilities",
    ax: Axes | None = None,
) -> Figure:
    """Draw what a bandit did as a heat map: arms from top to bottom, time from left to right.

    Args:
        values: One row a measurement, one column an arm ``(rows, K)``; NaN stays blank.
        steps: The step of each measurement ``(rows,)``; their numbers if None.
        names: A name for each arm; their indices if None. Of many, every second, third, ... is written.
        title: The title of the axes.
        label: What is shown, at the colour bar.
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no measurement, or ``names`` or ``steps`` are of another number.

    Example:
        >>> figure = bandit_figure(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), names=["old", "new"])
        >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        ['old', 'new']
    """
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"`values` must have a row for each measurement and a column for each arm, but got {tuple(values.shape)}."
            " Train until something is measured."
        )
    num_rows, num_arms = values.shape
    names = list(map(str, range(num_arms))) if names is None else list(names)
    steps = torch.arange(num_rows) if steps is None else steps
    if (len(steps), len(names)) != (num_rows, num_arms):
        raise ValueError(
            f"`steps` and `names` must be {num_rows} and {num_arms}, as `values`, but got {len(steps)} and"
            f" {len(names)}."
        )
    if ax is None:
        height = max(1.8, min(0.22 * num_arms, 9.0))
        ax = require("matplotlib.figure", "plots").Figure((7.5, height + 0.9), layout="compressed").add_subplot()
    figure = ax.figure.figure
    image = ax.imshow(values.detach().double().T.numpy(), cmap="cividis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label, pad=0.02)
    rows = range(0, num_arms, math.ceil(num_arms / 40))
    columns = range(0, num_rows, math.ceil(num_rows / 8))
    ax.set(yticks=rows, yticklabels=[names[row] for row in rows], xlabel="step", ylabel="arm", title=title)
    ax.set(xticks=columns, xticklabels=[str(int(steps[column])) for column in columns])
    return figure
