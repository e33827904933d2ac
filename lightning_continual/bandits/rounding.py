"""Distinct arms with given probabilities: capped weights, and dependent rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capped_marginals(log_weights: Tensor, num_plays: int, exploration: float) -> Tensor:
    r"""Compute the probability of each of :math:`K` arms to be among :math:`k` distinct ones, by their weights.

    .. math::
        p_a = k \left((1 - \gamma) \frac{w'_a}{\sum_b w'_b} + \frac{\gamma}{K}\right), \qquad
        w'_a = \min(w_a, \alpha), \qquad
        \frac{\alpha}{\sum_b w'_b} = \frac{1/k - \gamma/K}{1 - \gamma}

    The cap :math:`\alpha` is that for which the heaviest arms have probability 1; where none would exceed it, there is
    no cap. The number of capped arms, below :math:`k`, is found among all candidates at once, in logarithms.

    Args:
        log_weights: :math:`\ln w`, ``(K,)``.
        num_plays: :math:`k`, in [1, K].
        exploration: :math:`\gamma`, in (0, 1]; any if all arms are played.

    Returns:
        Probabilities ``(K,)``; they sum to :math:`k`.

    Example:
        The first arm is certain, and the others share the second play.

        >>> capped_marginals(torch.tensor([100.0, 0.0, 0.0]), num_plays=2, exploration=0.5)
        tensor([1.0000, 0.5000, 0.5000])

    References:
        - Uchiya, Nakamura, Kudo. *Algorithms for adversarial bandit problems with multiple plays.* ALT 2010.
    """
    num_arms = len(log_weights)
    if num_plays == num_arms or exploration >= 1:
        return torch.full_like(log_weights, num_plays / num_arms)
    cap = (1 / num_plays - exploration / num_arms) / (1 - exploration)
    shares = log_weights.log_softmax(0)
    descending = shares.sort(descending=True).values
    # With the s heaviest arms capped, the others share 1 - s cap in proportion to their weights.
    rests = descending.flip(0).logcumsumexp(0).flip(0)[:num_plays]
    factors = torch.log1p(-cap * torch.arange(num_plays, dtype=shares.dtype)) - rests
    fits = factors + descending[:num_plays] <= math.log(cap) + 1e-12
    shares = (shares + factors[fits.int().argmax()]).clamp(max=math.log(cap)).exp()
    return (num_plays * torch.lerp(shares, torch.full_like(shares, 1 / num_arms), exploration)).clamp(max=1.0)


def dependent_rounding(marginals: Tensor, generator: torch.Generator) -> Tensor:
    r"""Draw a set of fixed size whose members have given probabilities, exactly.

    Two fractional probabilities at a time, one of them becomes 0 or 1 and the other takes up the difference, with
    chances that leave both expectations as they were. Pairs are formed in a random order. The last one is whole, as all
    sum to an integer.

    Args:
        marginals: The probability of each of :math:`K` arms, ``(K,)``, in [0, 1]; they sum to an integer :math:`m`.
        generator: Where the random numbers come from.

    Returns:
        Arms ``(m,)``, distinct, in ascending order.

    Example:
        >>> dependent_rounding(torch.tensor([1.0, 0.0, 1.0]), torch.Generator())
        tensor([0, 2])

    References:
        - Gandhi, Khuller, Parthasarathy, Srinivasan. *Dependent rounding and its applications to approximation
          algorithms.* Journal of the ACM 2006.
    """
    values: list[float] = marginals.tolist()
    order: list[int] = torch.randperm(len(values), generator=generator).tolist()
    coins: list[float] = torch.rand(len(values), generator=generator, dtype=torch.float64).tolist()
    left = order[0]  # the arm whose probability is still to be settled
    for arm, coin in zip(order[1:], coins[1:], strict=True):
        one, two = values[left], values[arm]
        total = one + two
        if total <= 1:
            winner = left if coin * total < one else arm
            values[left], values[arm] = 0.0, 0.0
            values[winner] = total
        else:
            winner = left if coin * (2 - total) < 1 - two else arm
            values[left], values[arm] = total - 1, total - 1
            values[winner] = 1.0
        if values[left] in (0.0, 1.0):
            left = arm
    return torch.tensor([arm for arm, value in enumerate(values) if value > 0.5], dtype=torch.int64)
