"""Figures and text tables."""

from lightning_continual.report.bandits import bandit_figure
from lightning_continual.report.matrix import matrix_figure, matrix_table, print_matrix

__all__ = ["bandit_figure", "matrix_figure", "matrix_table", "print_matrix"]
