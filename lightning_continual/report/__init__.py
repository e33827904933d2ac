"""Figures and text tables."""

from lightning_continual.report.bandits import bandit_figure
from lightning_continual.report.matrix import matrix_figure, matrix_table, print_matrix
from lightning_continual.report.ownership import capacity_figure, scores_figure, search_figure
from lightning_continual.report.units import units_figure

__all__ = [
    "bandit_figure",
    "capacity_figure",
    "matrix_figure",
    "matrix_table",
    "print_matrix",
    "scores_figure",
    "search_figure",
    "units_figure",
]
