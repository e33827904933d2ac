"""What a bandit is told of plays: brought to the CPU, and checked."""

from __future__ import annotations

import torch
from torch import Tensor


def plays(arms: Tensor, rewards: Tensor, num_arms: int) -> tuple[Tensor, Tensor]:
    """Return arms that exist and their rewards in [0, 1].

    Args:
        arms: ``(n,)``, integers.
        rewards: ``(n,)``, on any device.
        num_arms: How many arms there are.

    Returns:
        Arms ``(n,)``, and rewards ``(n,)`` in double precision.

    Raises:
        ValueError: If they are not as described.

    Example:
        >>> plays(torch.tensor([1]), torch.tensor([0.5]), num_arms=2)
        (tensor([1]), tensor([0.5000], dtype=torch.float64))
    """
    arms, rewards = arms.detach().cpu(), rewards.detach().to("cpu", torch.float64)
    if arms.dtype != torch.int64 or arms.ndim != 1 or arms.shape != rewards.shape:
        raise ValueError(
            f"`arms` must hold integers and `rewards` a number for each, but got {arms.dtype} of shape"
            f" {tuple(arms.shape)} and shape {tuple(rewards.shape)}. Pass both as (n,), one entry a play."
        )
    if len(arms):
        first, last = (int(arm) for arm in arms.aminmax())
        if first < 0 or last >= num_arms:
            raise ValueError(
                f"`arms` must lie in [0, {num_arms}), but got {min(first, 0) or last}. Call `grow` first if there are"
                " more."
            )
        low, high = (float(reward) for reward in rewards.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(
                f"`rewards` must be finite and lie in [0, 1], but got values from {low} to {high}. Rescale them, for"
                " example by `RunningQuantiles`."
            )
    return arms, rewards


def chances(probabilities: Tensor, arms: Tensor, num_arms: int) -> Tensor:
    """Return the probabilities that arms were played with.

    Args:
        probabilities: ``(K,)``, on any device.
        arms: Those that were played ``(n,)``.
        num_arms: :math:`K`.

    Returns:
        Probabilities ``(K,)`` in double precision.

    Raises:
        ValueError: If the shape differs, or an arm was played that has no probability.

    Example:
        >>> chances(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]), num_arms=2)
        tensor([0., 1.], dtype=torch.float64)
    """
    probabilities = probabilities.detach().to("cpu", torch.float64)
    if probabilities.shape != (num_arms,) or not bool((probabilities[arms] > 0).all()):
        raise ValueError(
            f"`probabilities` must be positive for the arms played and of shape ({num_arms},), but got"
            f" {probabilities.tolist()}. Pass those that the arms were drawn with."
        )
    return probabilities


def playable(available: Tensor | None, num_arms: int) -> Tensor | None:
    """Return which arms may be played, or None for all.

    Args:
        available: Boolean ``(K,)``, on any device; None for all.
        num_arms: :math:`K`.

    Returns:
        Boolean ``(K,)``, or None.

    Raises:
        ValueError: If it is not as described, or names no arm.

    Example:
        >>> playable(torch.tensor([True, False]), num_arms=2)
        tensor([ True, False])
    """
    if available is None:
        return None
    if available.shape != (num_arms,) or available.dtype != torch.bool:
        raise ValueError(
            f"`available` must be boolean of shape ({num_arms},), but got {available.dtype} of shape"
            f" {tuple(available.shape)}. Pass True for each arm that may be played."
        )
    mask = available.cpu()
    if not bool(mask.any()):
        raise ValueError("`available` must be true for an arm at least, but it is for none. Stop playing instead.")
    return mask
