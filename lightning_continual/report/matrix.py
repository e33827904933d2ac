"""Figures and text tables of the accuracy matrix.

Scores that all lie in [0, 1] are shown in percent unless ``percent`` says otherwise, others with three significant
digits; entries that were never scored (NaN) stay blank, in text ``-``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from lightning_continual._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def matrix_figure(
    R: Tensor,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    label: str = "accuracy",
    percent: bool | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw an accuracy matrix as a heat map with the numbers in its cells.

    Colours (cividis, made for colour-blind readers) run from 0 to 1 where scores are shown in percent, so that figures
    can be compared, else from the least to the greatest score. Numbers shrink, then drop their decimals, then drop
    out where cells are too small for them. No global state of matplotlib is used: save the figure by ``savefig``.

    Args:
        R: Scores ``(T, T)``; rows trained, columns tested.
        names: A name for each task; their indices if None.
        title: The title of the axes.
        label: What is scored, at the colour bar.
        percent: Whether to show percent; if None, where all scores lie in [0, 1].
        ax: The axes to draw into; a new figure if None.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``R`` is not square, or ``names`` is not one name a task.

    Example:
        >>> figure = matrix_figure(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['100.0', '0.0', '50.0', '100.0']
    """
    values, names = _table(R, names)
    percent = _is_share(values) if percent is None else percent
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = (0.0, 1.0) if percent or not finite else (min(finite), max(finite))
    T = len(values)
    if ax is None:
        side = max(2.4, min(0.55 * T, 9.0))
        ax = require("matplotlib.figure", "plots").Figure((side + 1.6, side + 0.9), layout="compressed").add_subplot()
    figure = ax.figure.figure  # of a subfigure, the whole one
    grid = torch.tensor(values, dtype=torch.float64).numpy()
    image = ax.imshow(grid, cmap="cividis", vmin=low, vmax=high)
    ticks = require("matplotlib.ticker", "plots").PercentFormatter(1.0, decimals=0) if percent else None
    figure.colorbar(image, cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)), label=label, format=ticks)
    ax.set(xticks=range(T), yticks=range(T), xticklabels=names, yticklabels=names)
    ax.set(xlabel="on task", ylabel="after task", title=title)
    if max(map(len, names)) > 3:
        ax.tick_params(axis="x", labelrotation=45)
    figure.draw_without_rendering()  # settles the layout, and so the size of a cell
    cell = ax.get_window_extent().width / figure.dpi * 72 / T  # in points
    step = math.ceil(16.0 / cell)  # so that tick labels do not overlap
    shown = range(0, T, step)
    ax.set(xticks=shown, yticks=shown, xticklabels=names[::step], yticklabels=names[::step])
    for decimals in (1, 0):
        texts = [[_format(value, percent, decimals) for value in row] for row in values]
        # A digit is 0.64 of the font size wide; leave 20 % of the cell free.
        size = min(10.0, 0.8 * cell / (0.64 * max(len(text) for row in texts for text in row) or 1))
        if size >= 6.0:
            break
    else:
        return figure
    colors = image.to_rgba(grid)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                color = _contrasting(*colors[i, j, :3].tolist())
                ax.text(j, i, text, ha="center", va="center", fontsize=size, color=color)
    return figure


def matrix_table(
    R: Tensor, *, names: Sequence[str] | None = None, label: str = "accuracy", percent: bool | None = None
) -> str:
    """Write an accuracy matrix as an aligned table in plain text.

    Args:
        R: Scores ``(T, T)``; rows trained, columns tested.
        names: A name for each task; their indices if None.
        label: What is scored, in the corner.
        percent: Whether to show percent; if None, where all scores lie in [0, 1].

    Returns:
        One line for the header and one for each task, without a final newline.

    Raises:
        ValueError: If ``R`` is not square, or ``names`` is not one name a task.

    Example:
        >>> print(matrix_table(torch.tensor([[1.0, float("nan")], [0.5, 0.625]])))
        accuracy, %   on 0  on 1
        after 0      100.0     -
        after 1       50.0  62.5
    """
    header, *rows = _cells(R, names, label, percent)
    table = [header, *rows]
    first, *rest = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, rest, strict=True))])
        for name, *cells in table
    )
    return "\n".join(lines)


def print_matrix(
    R: Tensor,
    *,
    names: Sequence[str] | None = None,
    label: str = "accuracy",
    percent: bool | None = None,
    file: TextIO | None = None,
) -> None:
    """Write an accuracy matrix to a stream: as a rich table where rich is installed, else as `matrix_table`.

    Args:
        R: Scores ``(T, T)``; rows trained, columns tested.
        names: A name for each task; their indices if None.
        label: What is scored, in the corner.
        percent: Whether to show percent; if None, where all scores lie in [0, 1].
        file: The stream; standard output if None.

    Raises:
        ValueError: If ``R`` is not square, or ``names`` is not one name a task.

    Example:
        >>> import io
        >>> file = io.StringIO()
        >>> print_matrix(torch.tensor([[0.75]]), names=["January"], file=file)
        >>> "after January" in file.getvalue(), "75.0" in file.getvalue()
        (True, True)
    """
    file = sys.stdout if file is None else file
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        file.write(matrix_table(R, names=names, label=label, percent=percent) + "\n")
        return
    header, *rows = _cells(R, names, label, percent)
    table = Table()
    for position, column in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, column))
        table.add_column(Text(column[0]), justify="right" if position else "left", no_wrap=True, min_width=width)
    for i, cells in enumerate(rows):
        # Bold is what was scored right after it was learnt.
        table.add_row(*(Text(cell, "bold" if j == i + 1 else "") for j, cell in enumerate(cells)))
    Console(file=file).print(table, soft_wrap=True)  # a wide table is not cut


def _table(R: Tensor, names: Sequence[str] | None) -> tuple[list[list[float]], list[str]]:
    R = R.reshape(1, 1) if R.ndim == 0 else R
    if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) == 0:
        raise ValueError(f"`R` must be square, with a row and a column for each task, but got shape {tuple(R.shape)}.")
    if names is not None and len(names) != len(R):
        raise ValueError(f"`names` must name each of the {len(R)} tasks, but got {len(names)} names.")
    return R.detach().double().tolist(), list(map(str, range(len(R)) if names is None else names))


def _is_share(values: list[list[float]]) -> bool:
    return all(math.isnan(value) or 0 <= value <= 1 for row in values for value in row)


def _format(value: float, percent: bool, decimals: int = 1) -> str:
    """Return percent with so many decimals, or two significant digits and so many more; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{100 * value:.{decimals}f}" if percent else f"{value:.{2 + decimals}g}"


def _cells(R: Tensor, names: Sequence[str] | None, label: str, percent: bool | None) -> list[list[str]]:
    """Return header and rows, each as many cells as tasks and one."""
    values, names = _table(R, names)
    percent = _is_share(values) if percent is None else percent
    header = [f"{label}, %" if percent else label, *(f"on {name}" for name in names)]
    rows = zip(names, values, strict=True)
    return [header, *([f"after {name}", *(_format(value, percent) or "-" for value in row)] for name, row in rows)]


def _contrasting(*rgb: float) -> str:
    """Return black or white, whichever has the higher contrast (WCAG 2) on an sRGB colour."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"
