"""How much each weight and unit matters: Fisher information, spread of gradients, activity.

Everything here is a pure function of a module and batches. It leaves the module, its gradients, modes and buffers, and
the global random states as they were.
"""

from lightning_continual.importance.activity import unit_activity
from lightning_continual.importance.fisher import (
    AllReduce,
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    gradient_deviation,
    sampled_fisher,
)

__all__ = [
    "AllReduce",
    "batched_fisher",
    "empirical_fisher",
    "exact_fisher",
    "gradient_deviation",
    "sampled_fisher",
    "unit_activity",
]
