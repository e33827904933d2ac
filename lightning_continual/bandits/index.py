"""Policies that rank arms by what their rewards were on average: with a confidence bound, or with plays at random."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_continual.bandits.bandit import Bandit


@final
class SlidingWindowUCB(Bandit):
    r"""The upper confidence bound of each arm's mean reward over the last plays.

    .. math::
        I_a = \bar x_a + \sqrt{\frac{\xi \ln \min(t, \tau)}{N_a}}

    where :math:`N_a` counts the plays of an arm among the last :math:`\tau` plays of all arms, :math:`\bar x_a` is
    their mean reward, and :math:`t` counts all plays so far. Arms are ordered by their index; those not played in the
    window come first, and ties are broken at random. Given the past, plays differ only by ties: `draw` of many gives
    one arm many times.

    For :math:`\xi > \frac12` and rewards whose means change :math:`\Upsilon` times in :math:`T` plays, an arm is
    expected to be played, while it is not the best, at most

    .. math::
        C(\tau) \frac{T \ln \tau}{\tau} + \tau \Upsilon + \ln^2 \tau, \qquad
        C(\tau) = \frac{4 \xi}{\Delta_a^2} \frac{\lceil T / \tau \rceil}{T / \tau}
        + \frac{2}{\ln \tau} \left\lceil \frac{\ln \tau}{\ln(1 + 4 \sqrt{1 - 1 / (2 \xi)})} \right\rceil

    times, where :math:`\Delta_a` is its smallest gap to the best arm in that time.

    Args:
        num_arms: :math:`K`.
        window: :math:`\tau`, in plays. Each update costs time in proportion to it.
        exploration: :math:`\xi`, positive; the paper's experiments use 0.6.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` or ``window`` is below 1, or ``exploration`` is not positive.

    Example:
        >>> bandit = SlidingWindowUCB(num_arms=2, window=4)
        >>> bandit.update(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
        >>> bandit.probabilities()  # arm 0 was played once in the window: 0 + sqrt(0.83); arm 1: 1 + sqrt(0.28)
        tensor([0., 1.], dtype=torch.float64)

    References:
        - Garivier, Moulines. *On upper-confidence bound policies for switching bandit problems.* ALT 2011.
    """

    def __init__(self, num_arms: int, *, window: int = 1000, exploration: float = 0.6, seed: int = 0) -> None:
        if window < 1:
            raise ValueError(f"`window` must be 1 or more, but got {window}. Pass how many plays are remembered.")
        if not exploration > 0:
            raise ValueError(f"`exploration` must be positive, but got {exploration}. Pass for example 0.6.")
        super().__init__(num_arms, seed=seed)
        self.window = window
        self.exploration = exploration
        self._arms = torch.zeros(0, dtype=torch.int64)  # the plays in the window, oldest first
        self._rewards = torch.zeros(0, dtype=torch.float64)

    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        return _with_random_ties(self._index(), num, generator)

    def _probabilities(self, available: Tensor | None) -> Tensor:
        return _shared_by_the_best(self._index(), available)

    def _index(self) -> Tensor:
        counts = torch.bincount(self._arms, minlength=self._num_arms).double()
        sums = torch.bincount(self._arms, self._rewards, minlength=self._num_arms)
        bounds = (self.exploration * math.log(max(len(self._arms), 1)) / counts).sqrt()
        return (sums / counts + bounds).masked_fill(counts == 0, torch.inf)

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        self._arms = torch.cat((self._arms, arms))[-self.window :]
        self._rewards = torch.cat((self._rewards, rewards))[-self.window :]

    def _grow(self, num_new: int) -> None:
        pass

    def _knowledge(self) -> tuple[str, ...]:
        return "arms", "rewards"


@final
class EpsilonGreedy(Bandit):
    r"""A random order with probability :math:`\varepsilon`, else that of the mean rewards.

    .. math::
        \mu_a \leftarrow \mu_a + \eta_a (\bar x_a - \mu_a), \qquad
        \eta_a = \frac{n_a}{N_a} \quad \text{or} \quad 1 - (1 - \eta)^{n_a}

    for :math:`n_a` plays in a round, of mean reward :math:`\bar x_a`, and :math:`N_a` plays so far: the mean of all
    rewards, or with a constant step :math:`\eta` one that forgets, for rewards that drift. An arm never played comes
    first, its first mean is that of its first rewards, and ties are broken at random.

    For a constant :math:`\varepsilon` regret grows with the number of plays :math:`T`. With the mean of all rewards, no
    change, gaps :math:`\Delta_a` to the best of :math:`K` arms, and :math:`x_t = \varepsilon t / (2 K)`, it is
    expected to be at most

    .. math::
        \frac{\varepsilon T}{K} \sum_a \Delta_a + \sum_a \Delta_a \sum_{t=1}^{T} \min\left(1,
        2 x_t e^{-x_t / 5} + \frac{4}{\Delta_a^2} e^{-\Delta_a^2 \lfloor x_t \rfloor / 2}\right)

    that is, random plays, and greedy plays of a worse arm as bounded in the proof of Theorem 3 of the reference (there
    for a falling :math:`\varepsilon`, here for a constant one: our reading).

    Args:
        num_arms: :math:`K`.
        epsilon: :math:`\varepsilon`, in [0, 1].
        step_size: :math:`\eta`, in (0, 1]; None for the mean of all rewards.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1, ``epsilon`` is outside [0, 1], or ``step_size`` outside (0, 1].

    Example:
        >>> bandit = EpsilonGreedy(num_arms=2, epsilon=0.2)
        >>> bandit.update(torch.tensor([0, 1]), torch.tensor([0.3, 0.7]))
        >>> bandit.probabilities()
        tensor([0.1000, 0.9000], dtype=torch.float64)

    References:
        - Auer, Cesa-Bianchi, Fischer. *Finite-time analysis of the multiarmed bandit problem.* Machine Learning 2002.
        - Sutton, Barto. *Reinforcement learning: an introduction.* 2nd edition 2018, chapter 2.
    """

    def __init__(self, num_arms: int, *, epsilon: float = 0.1, step_size: float | None = None, seed: int = 0) -> None:
        if not 0 <= epsilon <= 1:
            raise ValueError(f"`epsilon` must lie in [0, 1], but got {epsilon}. Pass the share of random plays.")
        if step_size is not None and not 0 < step_size <= 1:
            raise ValueError(
                f"`step_size` must lie in (0, 1], but got {step_size}. Pass the weight of a new reward, or None for the"
                " mean of all."
            )
        super().__init__(num_arms, seed=seed)
        self.epsilon = epsilon
        self.step_size = step_size
        self._counts = torch.zeros(num_arms, dtype=torch.float64)
        self._means = torch.zeros(num_arms, dtype=torch.float64)

    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        scores = _with_random_ties(self._values(), num, generator)
        explores = torch.rand(num, 1, generator=generator, dtype=torch.float64) < self.epsilon
        return scores.where(~explores, scores.frac())  # below a rank, a uniform number is left

    def _probabilities(self, available: Tensor | None) -> Tensor:
        best = _shared_by_the_best(self._values(), available)
        uniform = torch.ones_like(best) if available is None else available.double()
        return best + (uniform / uniform.sum() - best) * self.epsilon

    def _values(self) -> Tensor:
        return self._means.masked_fill(self._counts == 0, torch.inf)

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        new = torch.bincount(arms, minlength=self._num_arms).double()
        means = torch.bincount(arms, rewards, minlength=self._num_arms) / new.clamp(min=1)
        counts = self._counts + new
        steps = new / counts.clamp(min=1)
        if self.step_size is not None:
            steps = steps.where(self._counts == 0, 1 - (1 - self.step_size) ** new)
        self._counts, self._means = counts, self._means + steps * (means - self._means)

    def _grow(self, num_new: int) -> None:
        self._counts, self._means = (pad(known, (0, num_new)) for known in (self._counts, self._means))

    def _knowledge(self) -> tuple[str, ...]:
        return "counts", "means"


def _with_random_ties(values: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Return ranks of values plus uniform numbers in [0, 1), ``(num, K)``: ties are broken anew in each row."""
    ranks: Tensor = torch.unique(values, return_inverse=True)[1]
    return ranks + torch.rand(num, len(values), generator=generator, dtype=torch.float64)


def _shared_by_the_best(values: Tensor, available: Tensor | None) -> Tensor:
    """Return one over the number of the highest available values for each of them, else zero."""
    if available is not None:
        values = values.masked_fill(~available, -torch.inf)
    best = (values == values.max()).double()
    return best / best.sum()
