"""Bandits: which of several arms to play next, learnt from the rewards of those played before.

A policy is a distribution over orders of its arms; single plays, subsets and plays within a budget are all read off
such orders. Every policy draws its random numbers from a generator of its own.
"""

from lightning_continual.bandits.bandit import Bandit
from lightning_continual.bandits.exponential import Exp3, Exp3M, Exp3S
from lightning_continual.bandits.index import EpsilonGreedy, SlidingWindowUCB
from lightning_continual.bandits.naming import make_bandit
from lightning_continual.bandits.rounding import capped_marginals, dependent_rounding
from lightning_continual.bandits.scaling import RunningQuantiles
from lightning_continual.bandits.thompson import ThompsonSampling

__all__ = [
    "Bandit",
    "EpsilonGreedy",
    "Exp3",
    "Exp3M",
    "Exp3S",
    "RunningQuantiles",
    "SlidingWindowUCB",
    "ThompsonSampling",
    "capped_marginals",
    "dependent_rounding",
    "make_bandit",
]
