"""What fits a budget, when arms with costs are walked along in an order."""

from __future__ import annotations

import torch
from torch import Tensor


def priced(costs: Tensor, budget: float, available: Tensor | None) -> tuple[Tensor, float]:
    r"""Return checked costs, and the budget with room for the rounding of their sum.

    .. math::
        B' = B \, (1 + \epsilon_c + K \epsilon)

    where :math:`\epsilon_c` is the precision of the costs' dtype, for what was rounded before, and :math:`\epsilon`
    that of the sum. So :math:`m` equal costs :math:`c` fit a budget :math:`m c`.

    Args:
        costs: What each arm costs, ``(K,)``.
        budget: :math:`B`, in the units of ``costs``.
        available: Which arms may be played, boolean ``(K,)``; None for all.

    Returns:
        Costs ``(K,)`` in double precision, infinite where not available; and :math:`B'`.

    Raises:
        ValueError: If a cost is negative or not finite, or no available arm fits the budget.

    Example:
        >>> priced(torch.tensor([1.0, 2.0]), 3.0, torch.tensor([True, False]))[0]
        tensor([1., inf], dtype=torch.float64)
    """
    precision = torch.finfo(costs.dtype if costs.is_floating_point() else torch.float64).eps
    costs = costs.detach().to("cpu", torch.float64)
    if not bool((costs.isfinite() & (costs >= 0)).all()):
        raise ValueError(
            f"`costs` must be finite and not negative, but got {costs.tolist()}. Pass what a play of each arm costs,"
            " for example its number of weights."
        )
    if available is not None:
        costs = costs.masked_fill(~available, torch.inf)
    limit = budget * (1 + precision + len(costs) * torch.finfo(torch.float64).eps)
    if not float(costs.min()) <= limit:
        raise ValueError(
            f"`budget` must cover an available arm at least, but got {budget}, and the cheapest costs"
            f" {float(costs.min())}. Raise the budget, or cut the arms smaller."
        )
    return costs, limit


def affordable(orders: Tensor, costs: Tensor, limit: float) -> Tensor:
    """Walk along orders, and play each arm whose cost fits what then remains of the budget.

    Args:
        orders: Arms ``(S, K)``; each row is a permutation.
        costs: What each arm costs, ``(K,)``; infinite for what may not be played.
        limit: The budget of each walk, in the units of ``costs``.

    Returns:
        Which arms are played, boolean ``(S, K)``, by arm.

    Example:
        The dear arm 0 fits where it comes first, and then the others do not.

        >>> affordable(torch.tensor([[0, 1, 2], [1, 0, 2]]), torch.tensor([3.0, 2.0, 1.0]), limit=3.0)
        tensor([[ True, False, False],
                [False,  True,  True]])
    """
    remaining = torch.full((len(orders),), limit, dtype=torch.float64)
    fits = torch.empty_like(orders, dtype=torch.bool)
    for place, cost in enumerate(costs[orders].unbind(1)):
        fits[:, place] = cost <= remaining
        remaining -= cost.where(fits[:, place], 0.0)
    return torch.empty_like(fits).scatter_(1, orders, fits)
