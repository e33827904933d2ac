"""The callbacks, one method each."""

from lightning_continual.callbacks.accuracy_matrix import AccuracyMatrixCallback
from lightning_continual.callbacks.cost import CostCallback
from lightning_continual.callbacks.rehearsal import RehearsalCallback

__all__ = ["AccuracyMatrixCallback", "CostCallback", "RehearsalCallback"]
