"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_continual.bandits.bandit import Bandit
from lightning_continual.bandits.exponential import Exp3, Exp3M, Exp3S
from lightning_continual.bandits.index import EpsilonGreedy, SlidingWindowUCB
from lightning_continual.bandits.thompson import ThompsonSampling

_POLICIES: dict[str, Callable[..., Bandit]] = {
    "exp3": Exp3,
    "exp3s": Exp3S,
    "exp3m": Exp3M,
    "ucb": SlidingWindowUCB,
    "thompson": ThompsonSampling,
    "epsilon-greedy": EpsilonGreedy,
}


def make_bandit(policy: str | Callable[[int], Bandit], num_arms: int, *, seed: int = 0) -> Bandit:
    """Return a bandit of a policy.

    Args:
        policy: ``"exp3"``, ``"exp3s"``, ``"exp3m"``, ``"ucb"``, ``"thompson"`` or ``"epsilon-greedy"``, each with its
            default arguments; or a function of the number of arms.
        num_arms: How many arms.
        seed: Of the bandit's own generator; a function has its own.

    Returns:
        The bandit.

    Raises:
        ValueError: If no policy has that name.
        TypeError: If a function returns anything but a bandit of that many arms.

    Example:
        >>> make_bandit("exp3", 3).num_arms
        3
        >>> make_bandit(lambda num_arms: EpsilonGreedy(num_arms, epsilon=0.3), 3).epsilon
        0.3
    """
    if isinstance(policy, str):
        if policy not in _POLICIES:
            raise ValueError(
                f"`policy` must be one of {', '.join(map(repr, _POLICIES))}, but got {policy!r}. For other arguments,"
                " pass a function of the number of arms that returns a bandit."
            )
        return _POLICIES[policy](num_arms, seed=seed)
    bandit = policy(num_arms)
    if not isinstance(bandit, Bandit) or bandit.num_arms != num_arms:
        what = f"a bandit of {bandit.num_arms} arms" if isinstance(bandit, Bandit) else type(bandit).__name__
        raise TypeError(
            f"`policy` must return a bandit of {num_arms} arms, but got {what}. Pass the number of arms on, for example"
            " `lambda num_arms: EpsilonGreedy(num_arms, epsilon=0.3)`."
        )
    return bandit
