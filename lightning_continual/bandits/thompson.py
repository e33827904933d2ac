"""Thompson sampling: arms are ordered by a draw of their mean rewards from the posterior."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_continual.bandits.bandit import Bandit


@final
class ThompsonSampling(Bandit):
    r"""Play each arm as often as it is the best one under the posterior of the mean rewards.

    .. math::
        \theta_a \sim \mathcal N\left(\frac{S_a}{N_a + 1}, \frac{1}{N_a + 1}\right)
        \quad \text{or} \quad \theta_a \sim \mathrm{Beta}(1 + S_a, 1 + N_a - S_a), \qquad
        S_a = \sum x_a

    for :math:`N_a` plays with rewards :math:`x_a`; arms are ordered by :math:`\theta`. ``"gaussian"`` is for any
    reward, ``"beta"`` for rewards that are 0 or 1; with rewards in between, which count as a part of a success (our
    reading), it overstates their variance. With a discount :math:`\gamma`, both :math:`S` and :math:`N` of all arms are
    multiplied by it in every round before the new plays are added, so that the posterior returns to the prior (Raj and
    Kalyani), for rewards that drift.

    Without a discount, the expected regret after :math:`T \ge K` plays is :math:`O(\sqrt{K T \ln K})` (gaussian) or
    :math:`O(\sqrt{K T \ln T})` (beta) for all mean rewards (Agrawal and Goyal). On average over mean rewards drawn from
    the prior, Beta(1, 1), the latter has at most (Russo and Van Roy)

    .. math::
        \sqrt{\tfrac12 K T \ln K}.

    Args:
        num_arms: :math:`K`.
        likelihood: ``"gaussian"`` or ``"beta"``.
        discount: :math:`\gamma`, in (0, 1]; 1 forgets nothing.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1, ``likelihood`` is unknown, or ``discount`` is outside (0, 1].

    Example:
        >>> bandit = ThompsonSampling(num_arms=2, likelihood="beta")
        >>> bandit.update(torch.arange(2).repeat(1000), torch.tensor([0.0, 1.0]).repeat(1000))
        >>> bandit.probabilities()
        tensor([0., 1.], dtype=torch.float64)

    References:
        - Agrawal, Goyal. *Further optimal regret bounds for Thompson sampling.* AISTATS 2013.
        - Russo, Van Roy. *An information-theoretic analysis of Thompson sampling.* JMLR 2016.
        - Raj, Kalyani. *Taming non-stationary bandits: a Bayesian approach.* arXiv 1707.09727 (2017).
    """

    def __init__(
        self,
        num_arms: int,
        *,
        likelihood: Literal["gaussian", "beta"] = "gaussian",
        discount: float = 1.0,
        seed: int = 0,
    ) -> None:
        if likelihood not in ("gaussian", "beta"):
            raise ValueError(
                f"`likelihood` must be 'gaussian' or 'beta', but got {likelihood!r}. Pass 'beta' for rewards 0 and 1."
            )
        if not 0 < discount <= 1:
            raise ValueError(
                f"`discount` must lie in (0, 1], but got {discount}. Pass what remains of a play after one more round,"
                " for example 0.99, or 1 to forget nothing."
            )
        super().__init__(num_arms, seed=seed)
        self.likelihood = likelihood
        self.discount = discount
        self._counts = torch.zeros(num_arms, dtype=torch.float64)
        self._sums = torch.zeros(num_arms, dtype=torch.float64)

    def _draw(self, num: int, mask: Tensor | None) -> Tensor:
        return self._masked_scores(num, self._generator, mask).argmax(1)

    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        if self.likelihood == "gaussian":
            noise = torch.randn(num, self._num_arms, generator=generator, dtype=torch.float64)
            return self._sums / (self._counts + 1) + noise / (self._counts + 1).sqrt()
        shapes = torch.stack((1 + self._sums, 1 + (self._counts - self._sums).clamp(min=0)))
        # The public distributions draw from the global generator only.
        successes, failures = torch._standard_gamma(shapes.repeat(num, 1, 1), generator=generator).unbind(1)
        return successes / (successes + failures)

    def _probabilities(self, available: Tensor | None) -> Tensor:
        first = self._simulated_scores(available).argmax(1)
        return torch.bincount(first, minlength=self._num_arms).double() / len(first)

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        self._counts = self.discount * self._counts + torch.bincount(arms, minlength=self._num_arms)
        self._sums = self.discount * self._sums + torch.bincount(arms, rewards, minlength=self._num_arms)

    def _grow(self, num_new: int) -> None:
        self._counts, self._sums = (pad(known, (0, num_new)) for known in (self._counts, self._sums))

    def _knowledge(self) -> tuple[str, ...]:
        return "counts", "sums"
