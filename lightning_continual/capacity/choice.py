"""Which units a task keeps: those that reach the threshold, and no more than leaves units for the tasks to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_continual.capacity.activity import active_units, relative_activity
from lightning_continual.capacity.forgetting import graceful_threshold
from lightning_continual.capacity.kinds import cut
from lightning_continual.capacity.wiring import Wiring


def influence(wiring: Wiring, tensors: Mapping[str, Tensor], activity: Tensor, outputs: Tensor) -> Tensor:
    r"""Compute how much units pass on: their activity times the size of the weights that read them.

    .. math:: \bar a_j \lVert w_{\cdot j} \rVert_2, \qquad
              \lVert w_{\cdot j} \rVert_2^2 = \sum_{i \notin O} w_{ij}^2

    over all weights by which units i read unit j, but for the outputs of other tasks O. A unit that is active at all
    times, but of which nobody makes use, has none. This is our reading; the paper has the activity alone.

    Args:
        wiring: The wiring.
        tensors: The module's parameters by name.
        activity: From `activity_read`: ``(num_units,)``.
        outputs: The numbers of the task's outputs.

    Returns:
        Influences ``(num_units,)`` in double precision; zero for outputs.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> found, activity = find_wiring(model, torch.ones(1, 1)), torch.tensor([2.0, 7.0, 0.0, 0.0])
        >>> influence(found, dict(model.named_parameters()), activity, torch.tensor([2, 3]))
        tensor([10.,  7.,  0.,  0.], dtype=torch.float64)
        >>> influence(found, dict(model.named_parameters()), activity, torch.tensor([2]))
        tensor([6., 0., 0., 0.], dtype=torch.float64)
    """
    counted = torch.ones(wiring.num_units, dtype=torch.bool)
    for units in wiring.outputs.values():
        counted[units.start : units.stop] = False
    counted[outputs] = True
    squares = torch.zeros(wiring.num_units, dtype=torch.float64)
    for name, columns in wiring.columns.items():
        weight = tensors[name].detach()
        own = wiring.rows[name].of(counted.to(weight.device), weight.ndim) * weight
        of_columns = own.movedim(columns.dim, 0).flatten(1).square().sum(1, dtype=torch.float64).cpu()
        squares.index_add_(0, columns.units[columns.units >= 0], of_columns[columns.units >= 0])
    return activity.double() * squares.sqrt()


@dataclass(frozen=True)
class Choice:
    """The choice of a task's units.

    Args:
        wiring: The wiring.
        measure: What the units are judged by, as `activity_read` or `influence`: ``(num_units,)``.
        thresholds: Of ``measure``, by layer; the layers without one share a relative one, see `active_units`.
        before: Which units earlier tasks need: bool ``(num_units,)``.
        always: Which units are active whatever their measure: bool ``(num_units,)``.
        num_tasks: How many tasks, with this one, the free units of each layer are to last for; None for no limit.

    Example:
        Of three free units two tasks get one and two; the most active one is kept.

        >>> units, nothing = Wiring({"0": range(3)}, {"1": range(3, 4)}, {}, {}), torch.zeros(4).bool()
        >>> choice = Choice(units, torch.tensor([1.0, 2.0, 3.0, 0.0]), {}, nothing, nothing, num_tasks=2)
        >>> choice.reached(0.5), choice.kept(0.5), choice.is_short(0.5)
        (tensor([False,  True,  True, False]), tensor([False, False,  True, False]), True)
    """

    wiring: Wiring
    measure: Tensor
    thresholds: Mapping[str, float]
    before: Tensor
    always: Tensor
    num_tasks: int | None = None

    def reached(self, common: float = 0.0) -> Tensor:
        """Return the units above the threshold, which is ``common`` where none is given: bool ``(num_units,)``."""
        return self.always | active_units(self.wiring, self.measure, self.thresholds, common)

    def kept(self, common: float = 0.0) -> Tensor:
        r"""Return those of `reached` that the task keeps: bool ``(num_units,)``.

        That is all of them where earlier tasks need them too; of the :math:`F` free ones of a layer at most
        :math:`\max(1, \lfloor F / T \rfloor)` for :math:`T` tasks to come, with this one, those of the largest measure.
        """
        reached = self.reached(common)
        if self.num_tasks is not None:
            for units in self.wiring.layers.values():
                place = slice(units.start, units.stop)
                free = ~(self.before | self.always)[place]
                most, new = max(1, int(free.sum()) // self.num_tasks), reached[place] & free
                if new.sum() > most:
                    best = self.measure[place].masked_fill(~new, -math.inf).topk(most).indices
                    reached[place] &= ~free
                    reached[units.start + best] = True
        return reached

    def is_short(self, common: float = 0.0) -> bool:
        """Return whether the task gets fewer units than there are above the threshold."""
        return bool((self.reached(common) != self.kept(common)).any())

    def relative(self) -> Tensor:
        """Return the units' relative measures, in the layers that have no threshold of their own."""
        searched = ~(self.before | self.always)
        for units in [*(self.wiring.layers[name] for name in self.thresholds), *self.wiring.outputs.values()]:
            searched[units.start : units.stop] = False
        return relative_activity(self.wiring, self.measure)[searched]


def graceful_choice(
    choice: Choice, tensors: Mapping[str, Tensor], score: Callable[[bool], float], **options: Any
) -> dict[str, float]:
    """Search the common threshold of a choice of units by graceful forgetting, in relative measures.

    Args:
        choice: The choice.
        tensors: The module's parameters by name. While a score is asked for, what it would cut is zero.
        score: Returns the score of the module as it is, on a share of the data if the argument is true.
        options: See `graceful_threshold`.

    Returns:
        What `graceful_threshold` found.

    Example:
        The second of two units can be cut, for its weight is zero.

        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model, nothing = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1)), torch.zeros(3).bool()
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> always, weights = torch.tensor([False, False, True]), dict(model.named_parameters())
        >>> units = Choice(find_wiring(model, torch.ones(1, 1)), torch.tensor([3.0, 1.0, 0.0]), {}, nothing, always)
        >>> found = graceful_choice(units, weights, lambda _: float(weights["1.weight"].detach().sum()), tolerance=0.1)
        >>> units.reached(found["threshold"])
        tensor([ True, False,  True])
    """

    def score_at(common: float | None, of_share: bool) -> float:
        nothing = torch.zeros(choice.wiring.num_units, dtype=torch.bool)
        active = nothing if common is None else choice.before | choice.reached(common)
        with cut(choice.wiring, tensors, active):
            return score(of_share)

    return graceful_threshold(choice.relative(), score_at, **options)
