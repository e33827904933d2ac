"""Tables and figures for whatever loggers a Trainer has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_warn


def write_table_and_figure(
    trainer: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], figure: Callable[[], Any]
) -> None:
    """Give a table to loggers that take tables, and a figure to those that take figures or images.

    To W&B go the table ``key`` and the image ``{key}_plot``, to TensorBoard the figure ``key``. To be called on the
    first process.

    Args:
        trainer: The Trainer.
        key: The name.
        columns: The columns of the table.
        rows: Its rows.
        figure: Makes the figure; called only where a logger takes one, and matplotlib is installed.
    """
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
        takes_figures = hasattr(logger.experiment, "add_figure")
        if not (takes_figures or hasattr(logger, "log_image")):
            continue
        if importlib.util.find_spec("matplotlib") is None:
            rank_zero_warn(
                f"The figure {key!r} is not drawn: matplotlib is missing. Install it by"
                ' `pip install "lightning-continual[plots]"`.'
            )
        elif takes_figures:
            logger.experiment.add_figure(key, figure(), trainer.global_step)
        else:
            logger.log_image(f"{key}_plot", [figure()])
