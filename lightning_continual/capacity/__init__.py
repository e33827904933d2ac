"""The capacity of a network: which units tasks are in, and which are free for later ones."""

from lightning_continual.capacity.activity import active_units, activity_read, relative_activity
from lightning_continual.capacity.choice import Choice, graceful_choice, influence
from lightning_continual.capacity.counts import UnitCounts, count_units, units_table
from lightning_continual.capacity.forgetting import graceful_threshold, what_went_wrong
from lightning_continual.capacity.hold import Hold
from lightning_continual.capacity.kinds import (
    add_l1_gradient_,
    cut,
    cut_,
    cut_weights,
    kept_weights,
    l1_strengths,
    pin_of,
    pin_of_cut,
    reset_free_,
    untrained_units,
)
from lightning_continual.capacity.learnt import Learnt
from lightning_continual.capacity.norms import HeldStatistics, batch_norms, hold_statistics
from lightning_continual.capacity.task_view import OnlyOutputs, only_outputs
from lightning_continual.capacity.wiring import Places, Wiring, by_layer, find_wiring

__all__ = [
    "Choice",
    "HeldStatistics",
    "Hold",
    "Learnt",
    "OnlyOutputs",
    "Places",
    "UnitCounts",
    "Wiring",
    "active_units",
    "activity_read",
    "add_l1_gradient_",
    "batch_norms",
    "by_layer",
    "count_units",
    "cut",
    "cut_",
    "cut_weights",
    "find_wiring",
    "graceful_choice",
    "graceful_threshold",
    "hold_statistics",
    "influence",
    "kept_weights",
    "l1_strengths",
    "only_outputs",
    "pin_of",
    "pin_of_cut",
    "relative_activity",
    "reset_free_",
    "units_table",
    "untrained_units",
    "what_went_wrong",
]
