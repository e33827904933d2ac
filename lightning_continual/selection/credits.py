"""What steps of optimizers gave, credited to the arms of weights that they moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_continual.selection.weight_arms import WeightArms


class Credits:
    r"""Adds up, for each arm, by how much steps reduced the loss to first order.

    .. math::
        r_a = \frac1{\lvert a \rvert} \sum_o \frac1{n_{oa}} \sum_{t} \sum_{i \in a \cap o}
              \lvert g_i \, \Delta\theta_i \rvert

    over the steps t of optimizer o that are measured, :math:`n_{oa}` of them with a gradient for a parameter of arm a:
    arms of optimizers that step more or less often are judged alike.

    Args:
        arms: Which weights are whose.
        num_optimizers: How many optimizers move them.
        stride: Steps of an optimizer from one measured to the next.
        device: Where the weights are.

    Example:
        >>> arms = WeightArms(("a",), {"w": torch.tensor(0)}, {}, torch.tensor([2]), {})
        >>> credits = Credits(arms, num_optimizers=1, stride=2, device=torch.device("cpu"))
        >>> [credits.is_due(0), credits.is_due(0), credits.is_due(0)]
        [True, False, True]
        >>> credits.add(0, {"w": torch.tensor([1.0, 3.0])})
        >>> credits.rewards(lambda value: value)
        (tensor([2.], dtype=torch.float64), tensor([True]))
    """

    def __init__(self, arms: WeightArms, num_optimizers: int, stride: int, device: torch.device) -> None:
        self._arms, self._stride = arms, stride
        self._on_device = dataclasses.replace(arms, owner={name: one.to(device) for name, one in arms.owner.items()})
        num_arms = len(arms.names)
        self._steps = torch.zeros(num_optimizers, dtype=torch.int64)
        self._counts = torch.zeros(num_optimizers, num_arms, dtype=torch.int64)
        self._totals = torch.zeros(num_optimizers, num_arms, device=device)

    def is_due(self, optimizer: int) -> bool:
        """Count a step of an optimizer, and return whether it is to be measured."""
        self._steps[optimizer] += 1
        return (int(self._steps[optimizer]) - 1) % self._stride == 0

    def add(self, optimizer: int, reductions: Mapping[str, Tensor]) -> None:
        r"""Credit what a step gave.

        Args:
            optimizer: Its number.
            reductions: :math:`\lvert g_i \, \Delta\theta_i \rvert`, by parameter name.
        """
        for name, values in reductions.items():
            self._on_device.add_to_(self._totals[optimizer], name, values)
        if reductions:
            arms = torch.cat([self._arms.owner[name].reshape(-1) for name in reductions])
            self._counts[optimizer, torch.unique(arms)] += 1

    def rewards(self, add: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the reward of each arm ``(K,)``, and which arms were measured ``(K,)``.

        Args:
            add: Sums a tensor over processes.
        """
        totals, counts = add(self._totals).cpu().double(), add(self._counts).cpu()
        return (totals / counts.clamp(min=1)).sum(0) / self._arms.sizes, counts.sum(0) > 0

    def state_dict(self) -> dict[str, Any]:
        """Return tensors."""
        return {"steps": self._steps.clone(), "counts": self._counts.clone(), "totals": self._totals.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._steps, self._counts = state_dict["steps"].clone(), state_dict["counts"].clone()
        self._totals = state_dict["totals"].to(self._totals.device, copy=True)
