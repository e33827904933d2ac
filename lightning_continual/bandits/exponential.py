"""Exponential weights: for rewards that follow no law, as those of a network that changes while it learns."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from lightning_continual.bandits.bandit import Bandit
from lightning_continual.bandits.rounding import capped_marginals, dependent_rounding


class _ExponentialWeights(Bandit):
    """Weights that grow exponentially with the estimated rewards; see `Exp3`, whose symbols are used."""

    def __init__(self, num_arms: int, *, exploration: float | None, seed: int) -> None:
        if exploration is not None and not 0 < exploration <= 1:
            raise ValueError(
                f"`exploration` must lie in (0, 1], but got {exploration}. Pass the share of plays that are uniform,"
                " for example 0.1."
            )
        super().__init__(num_arms, seed=seed)
        self.exploration = exploration
        self._gains = torch.zeros(num_arms, dtype=torch.float64)  # the sum of the estimates x̂
        self._plays = torch.zeros((), dtype=torch.float64)

    def _gamma(self, num_plays: int = 1) -> float:
        if self.exploration is not None:
            return self.exploration
        entropy = self._num_arms * math.log(self._num_arms / num_plays)
        return min(1.0, math.sqrt(entropy / ((math.e - 1) * 2 * (float(self._plays) + num_plays))))

    def _log_weights(self, num_plays: int = 1) -> Tensor:
        return self._gains * (self._gamma(num_plays) / self._num_arms)

    def _probabilities(self, available: Tensor | None) -> Tensor:
        # p = q + γ (1/K - q), which is 1/K to the bit where q is.
        probabilities = self._log_weights().softmax(0)
        probabilities += (1 / self._num_arms - probabilities) * self._gamma()
        if available is None:
            return probabilities
        probabilities *= available
        return probabilities / probabilities.sum()

    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        # Clocks that ring at rates p ring in the order of draws without replacement; a Gumbel number is -ln of a clock.
        clocks = torch.empty(num, self._num_arms, dtype=torch.float64).exponential_(generator=generator)
        return self._probabilities(None) / clocks

    def _estimates(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> Tensor:
        if probabilities is None:
            probabilities = self._probabilities(None)
        shares = (rewards - 0.5) / (probabilities[arms] * num_draws)
        mean = torch.full_like(self._gains, 0.5).index_add_(0, arms, shares)
        return mean * self._worth(arms)

    def _worth(self, arms: Tensor) -> int:
        """Return the single plays that a round counts as: more of them than arms would tell nothing new."""
        return min(len(arms), self._num_arms)

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        self._gains = self._gains + self._estimates(arms, rewards, probabilities, num_draws)
        self._plays = self._plays + self._worth(arms)

    def _grow(self, num_new: int) -> None:
        # With all weights equal, the logarithm of their mean is zero to the bit.
        highest = self._gains.max()
        rate = self._gamma() / self._num_arms
        mean = highest + (rate * (self._gains - highest)).exp().mean().log() / rate
        self._gains = torch.cat((self._gains, mean.expand(num_new)))

    def _knowledge(self) -> tuple[str, ...]:
        return ("gains", "plays")


@final
class Exp3(_ExponentialWeights):
    r"""Exponential weights for exploration and exploitation: no assumption on the rewards but that they lie in [0, 1].

    .. math::
        p_a = (1 - \gamma) \frac{w_a}{\sum_b w_b} + \frac{\gamma}{K}, \qquad
        w_a = \exp\left(\frac{\gamma}{K} \sum_t \hat x_{a, t}\right), \qquad
        \hat x_a = \tfrac12 + \frac{\mathbb 1[a \text{ played}]}{p_a} (x_a - \tfrac12)

    The estimate :math:`\hat x` is unbiased, as the paper's :math:`\mathbb 1[a \text{ played}]\, x_a / p_a`. The control
    variate ½ is our reading: arms that all give ½ keep equal weights to the bit, whichever are played, and nothing is
    learnt from how often an arm was played. The paper's proof needs :math:`\frac\gamma K \hat x_a \le 1`, which holds
    as :math:`p_a \ge \gamma / K`, and :math:`\mathbb E \sum_a p_a \hat x_a^2 \le K`, which holds as

    .. math::
        \sum_a p_a \left(\tfrac14 + (x_a - \tfrac12) + \frac{(x_a - \tfrac12)^2}{p_a}\right)
        \le \tfrac14 + \tfrac12 + \tfrac K4 \le K \qquad (K \ge 1).

    So its bounds hold, of the expected regret after :math:`T` rounds against the best single arm:
    :math:`(e - 1) \gamma T + K \ln K / \gamma` for every :math:`\gamma`, and

    .. math::
        2 \sqrt{e - 1} \sqrt{T K \ln K} \qquad \text{for} \quad
        \gamma = \min\left(1, \sqrt{\frac{K \ln K}{(e - 1) T}}\right).

    Without a horizon, round :math:`t` uses the :math:`\gamma_t` of the horizon :math:`2 t`, also for the weights:
    :math:`w_a = \exp(\frac{\gamma_t}{K} \sum_{s < t} \hat x_{a, s})` (our reading). It costs a factor
    :math:`\sqrt 2`.

    Of :math:`n` plays that are learnt from together, :math:`\hat x` is the mean estimate, times the number
    :math:`\min(n, K)` of rounds that they count as: of rewards that were measured at one time, more than one for each
    arm tell nothing new. Distinct arms that are played together count as one round each (our reading).

    Args:
        num_arms: :math:`K`.
        exploration: :math:`\gamma`, in (0, 1]; None for one that falls with the rounds.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1, or ``exploration`` is outside (0, 1].

    Example:
        The estimates are 1/2 + 2 · 1/2 and 1/2, so the weights are as e to 1.

        >>> bandit = Exp3(num_arms=2, exploration=1.0)
        >>> bandit.update(torch.tensor([0]), torch.tensor([1.0]))
        >>> bandit.state_dict()["gains"]
        tensor([1.5000, 0.5000], dtype=torch.float64)

    References:
        - Auer, Cesa-Bianchi, Freund, Schapire. *The nonstochastic multiarmed bandit problem.* SIAM Journal on Computing
          2002.
    """

    def __init__(self, num_arms: int, *, exploration: float | None = None, seed: int = 0) -> None:
        super().__init__(num_arms, exploration=exploration, seed=seed)


@final
class Exp3S(_ExponentialWeights):
    r"""Exp3 for a best arm that switches: every round, all arms receive a share of the total weight.

    .. math::
        w_a \leftarrow w_a \exp\left(\frac{\gamma}{K} \hat x_a\right) + \frac{e \alpha}{K} \sum_b w_b

    with probabilities and estimates :math:`\hat x` as in `Exp3`; :math:`\alpha` is multiplied by the number of rounds
    that plays learnt from together count as (our reading). No arm falls so far behind that it could not come back.
    Against the best sequence of arms with :math:`S - 1` switches, the expected regret after :math:`T` rounds is at most

    .. math::
        \frac{K (S \ln(K / \alpha) + e \alpha T)}{\gamma} + (e - 1) \gamma T, \qquad \text{hence} \quad
        2 \sqrt{e - 1} \sqrt{K T \, (S \ln(K T) + e)}

    for :math:`\alpha = 1 / T` and :math:`\gamma = \min(1, \sqrt{K (S \ln(K T) + e) / ((e - 1) T)})`.

    Args:
        num_arms: :math:`K`.
        exploration: :math:`\gamma`, in (0, 1].
        sharing: :math:`\alpha`, in (0, 1]; about one over the number of rounds.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1, or ``exploration`` or ``sharing`` is outside (0, 1].

    Example:
        However often one arm wins, the other needs few rounds to overtake it.

        >>> bandit = Exp3S(num_arms=2, sharing=0.01)
        >>> for winner in 1000 * [0] + 100 * [1]:
        ...     bandit.update(torch.tensor([0, 1]), torch.tensor([1.0 - winner, winner]))
        >>> int(bandit.probabilities().argmax())
        1

    References:
        - Auer, Cesa-Bianchi, Freund, Schapire. *The nonstochastic multiarmed bandit problem.* SIAM Journal on Computing
          2002, section 8.
    """

    def __init__(self, num_arms: int, *, exploration: float = 0.1, sharing: float = 1e-4, seed: int = 0) -> None:
        if not 0 < sharing <= 1:
            raise ValueError(
                f"`sharing` must lie in (0, 1], but got {sharing}. Pass about one over the number of rounds; Exp3"
                " shares nothing."
            )
        super().__init__(num_arms, exploration=exploration, seed=seed)
        self.sharing = sharing

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        rate = self._gamma() / self._num_arms
        log_weights = self._log_weights()
        shared = log_weights.logsumexp(0) + math.log(math.e * self.sharing * self._worth(arms) / self._num_arms)
        grown = log_weights + rate * self._estimates(arms, rewards, probabilities, num_draws)
        log_weights = torch.logaddexp(grown, shared)
        self._gains = (log_weights - log_weights.max()) / rate
        self._plays = self._plays + self._worth(arms)


@final
class Exp3M(_ExponentialWeights):
    r"""Exp3 for several distinct arms a round: `subset` has exact probabilities.

    With weights :math:`w_a = \exp(\frac{\gamma}{K} \sum_t k \hat x_{a, t})` and :math:`k` plays, arms are drawn by
    `dependent_rounding` with the probabilities of `capped_marginals`, and :math:`\hat x` is that of `Exp3` with these
    probabilities. For :math:`k = 1` it is Exp3. Against the best :math:`k` arms, the expected regret after :math:`T`
    rounds, in rewards summed over the plays of a round, is at most
    :math:`(e - 1) \gamma k T + \frac K\gamma \ln\frac Kk` for every :math:`\gamma`, and

    .. math::
        2 \sqrt{e - 1} \sqrt{k T K \ln\frac Kk} \qquad \text{for} \quad
        \gamma = \min\left(1, \sqrt{\frac{K \ln(K / k)}{(e - 1) k T}}\right).

    Our reading: arms whose weight is capped learn as all others do, where the paper leaves their weights as they are.
    That is to follow the regularised leader among all distributions over :math:`k` distinct arms, with the entropy as
    regulariser (Audibert et al.), so the bound holds as well; and a constant added to all rewards changes nothing.
    Without a horizon, round :math:`t` uses the :math:`\gamma_t` of the horizon :math:`2 t`, as in Exp3.

    Args:
        num_arms: :math:`K`.
        exploration: :math:`\gamma`, in (0, 1]; None for one that falls with the rounds.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1, or ``exploration`` is outside (0, 1].

    Example:
        >>> arms, probabilities = Exp3M(num_arms=4).subset(3)
        >>> len(arms), probabilities
        (3, tensor([0.7500, 0.7500, 0.7500, 0.7500], dtype=torch.float64))

    References:
        - Uchiya, Nakamura, Kudo. *Algorithms for adversarial bandit problems with multiple plays.* ALT 2010.
        - Audibert, Bubeck, Lugosi. *Regret in online combinatorial optimization.* Mathematics of Operations Research
          2014.
    """

    def __init__(self, num_arms: int, *, exploration: float | None = None, seed: int = 0) -> None:
        super().__init__(num_arms, exploration=exploration, seed=seed)

    def _subset(self, num_plays: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidates = torch.arange(self._num_arms) if mask is None else mask.nonzero().flatten()
        marginals = capped_marginals(self._log_weights(num_plays)[candidates], num_plays, self._gamma(num_plays))
        arms = candidates[dependent_rounding(marginals, self._generator)]
        return arms, torch.zeros_like(self._gains).index_copy_(0, candidates, marginals)
