"""Rewards of any scale, brought into [0, 1]."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class RunningQuantiles:
    r"""Rescale rewards to [0, 1] by two quantiles of the recent ones.

    .. math::
        r = \min\left(1, \max\left(0, \frac{x - q_{\text{low}}}{q_{\text{high}} - q_{\text{low}}}\right)\right)

    where the quantiles are those of the rewards of earlier calls, interpolated linearly; those of this call come into
    the history after. Where both quantiles are equal, what equals them becomes ½, what is below 0, and what is above 1.
    In the first call, nothing is known and all become ½. So a constant reward always becomes ½, from which the Exp3
    family learns nothing.

    Graves et al. keep a uniform sample of all rewards; the window is our reading, as old rewards say little of a
    network that has learnt since.

    Args:
        low: The level of the lower quantile, in [0, 1].
        high: The level of the upper one, above ``low``.
        window: How many rewards are remembered.

    Raises:
        ValueError: If the levels are not ``0 <= low < high <= 1``, or ``window`` is below 1.

    Example:
        >>> scale = RunningQuantiles(low=0.0, high=1.0)
        >>> scale(torch.tensor([10.0, 20.0]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> scale(torch.tensor([5.0, 12.5, 20.0]))
        tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)

    References:
        - Graves, Bellemare, Menick, Munos, Kavukcuoglu. *Automated curriculum learning for neural networks.* ICML 2017.
    """

    def __init__(self, low: float = 0.2, high: float = 0.8, *, window: int = 1000) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"`low` and `high` must satisfy 0 <= low < high <= 1, but got {low} and {high}. Pass levels of"
                " quantiles, for example 0.2 and 0.8."
            )
        if window < 1:
            raise ValueError(f"`window` must be 1 or more, but got {window}. Pass how many rewards are remembered.")
        self.low = low
        self.high = high
        self.window = window
        self._history = torch.zeros(0, dtype=torch.float64)  # oldest first

    def __call__(self, rewards: Tensor) -> Tensor:
        """Rescale rewards by the history, and add them to it.

        Args:
            rewards: Of any shape and scale.

        Returns:
            Rewards in [0, 1], of the same shape, in double precision on the CPU.

        Raises:
            ValueError: If a reward is not finite; nothing is added then.
        """
        rewards = rewards.detach().to("cpu", torch.float64)
        if not bool(rewards.isfinite().all()):
            raise ValueError(
                f"`rewards` must be finite, but got {rewards[~rewards.isfinite()][:3].tolist()}. Leave such plays out."
            )
        scaled = self._scaled(rewards)
        self._history = torch.cat((self._history, rewards.flatten()))[-self.window :]
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """Return the history, oldest first."""
        return {"history": self._history.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; of a longer history than the window, the latest part."""
        self._history = state_dict["history"].cpu()[-self.window :].clone()

    def _scaled(self, rewards: Tensor) -> Tensor:
        if not len(self._history):
            return torch.full_like(rewards, 0.5)
        ascending = self._history.sort().values
        low, high = (_quantile(ascending, level) for level in (self.low, self.high))
        if high > low:
            return ((rewards - low) / (high - low)).clamp(0.0, 1.0)
        return 0.5 + 0.5 * (rewards - low).sign()


def _quantile(ascending: Tensor, level: float) -> float:
    position = level * (len(ascending) - 1)
    below = int(position)
    value = float(ascending[below])
    if below == position:
        return value
    return value + (position - below) * (float(ascending[below + 1]) - value)
