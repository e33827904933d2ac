"""What every bandit is: a distribution over orders of its arms, learnt from rewards."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_continual.bandits.budget import affordable, priced
from lightning_continual.bandits.plays import chances, playable, plays

_NUM_SIMULATIONS = 512


class Bandit(ABC):
    r"""A distribution over orders of :math:`K` arms, best to play first, learnt from rewards in [0, 1].

    Everything that is played is read off such orders: a single play is the first place, a subset the first places, and
    what fits a budget is found by walking along one. Arms are numbered from 0. All tensors live on the CPU, in double
    precision; the arguments may come from any device.

    A policy is a subclass that says how arms are scored (`_scores`: a random score an arm, higher is earlier), how
    likely each is to come first (`_probabilities`), what is learnt from a play (`_learn`), what is known of new arms
    (`_grow`), and which tensors hold its knowledge (`_knowledge`).

    Args:
        num_arms: :math:`K`.
        seed: Of the bandit's own generator.

    Raises:
        ValueError: If ``num_arms`` is below 1.

    Example:
        >>> from lightning_continual.bandits import Exp3
        >>> bandit = Exp3(num_arms=4)
        >>> for _ in range(500):
        ...     arms = bandit.draw(8)
        ...     bandit.update(arms, (arms == 2).double())  # only arm 2 is worth anything
        >>> int(bandit.probabilities().argmax())
        2
    """

    def __init__(self, num_arms: int, *, seed: int = 0) -> None:
        if num_arms < 1:
            raise ValueError(
                f"`num_arms` must be 1 or more, but got {num_arms}. Pass the number of things to choose from."
            )
        self._num_arms = num_arms
        self._num_rounds = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def num_arms(self) -> int:
        """:math:`K`, the number of arms."""
        return self._num_arms

    def orders(self, num: int, *, available: Tensor | None = None) -> Tensor:
        """Draw independent orders of all arms, best to play first.

        Args:
            num: How many orders.
            available: Which arms may be played, boolean ``(K,)``; the others come last. None for all.

        Returns:
            Arms ``(num, K)``; each row is a permutation.

        Raises:
            ValueError: If ``num`` is below 1, or ``available`` is not as described or names no arm.

        Example:
            >>> from lightning_continual.bandits import EpsilonGreedy
            >>> bandit = EpsilonGreedy(num_arms=3, epsilon=0.0)
            >>> bandit.update(torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.9, 0.5]))
            >>> bandit.orders(1)
            tensor([[1, 2, 0]])
        """
        _at_least_one("num", num)
        scores = self._masked_scores(num, self._generator, playable(available, self._num_arms))
        return scores.argsort(1, descending=True)

    def draw(self, num: int = 1, *, available: Tensor | None = None) -> Tensor:
        """Draw independent single plays, which may repeat: the first places of as many orders.

        Args:
            num: How many plays.
            available: Which arms may be played, boolean ``(K,)``; None for all.

        Returns:
            Arms ``(num,)``.

        Raises:
            ValueError: If ``num`` is below 1, or ``available`` is not as described or names no arm.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> Exp3(num_arms=3).draw(2, available=torch.tensor([False, True, False]))
            tensor([1, 1])
        """
        _at_least_one("num", num)
        return self._draw(num, playable(available, self._num_arms))

    def subset(self, num_plays: int, *, available: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw distinct arms to be played together: the first places of one order.

        Args:
            num_plays: How many arms, at most those available.
            available: Which arms may be played, boolean ``(K,)``; None for all.

        Returns:
            The arms ``(num_plays,)``, and the probability of every arm ``(K,)`` to be among them. Probabilities are
            simulated as in `within`, except where a policy knows them, or all arms are played.

        Raises:
            ValueError: If ``num_plays`` is below 1 or above the number of available arms.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> arms, probabilities = Exp3(num_arms=3).subset(3)
            >>> arms.sort().values, probabilities
            (tensor([0, 1, 2]), tensor([1., 1., 1.], dtype=torch.float64))
        """
        mask = playable(available, self._num_arms)
        num_available = self._num_arms if mask is None else int(mask.sum())
        if not 1 <= num_plays <= num_available:
            raise ValueError(
                f"`num_plays` must lie in [1, {num_available}], the number of available arms, but got {num_plays}."
                " Distinct arms are played; `draw` gives plays that repeat."
            )
        return self._subset(num_plays, mask)

    def within(self, costs: Tensor, budget: float, *, available: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Draw distinct arms whose costs together fit a budget.

        One order is walked from its best arm on, and each arm is played whose cost still fits what remains of the
        budget. Equal costs :math:`c` and a budget :math:`m c` give exactly :math:`m` arms; a budget is kept up to the
        rounding of the costs' dtype.

        The probability of an arm to be played is estimated by walking 512 more orders. They are of another generator,
        the same whenever asked between two updates. An arm that is played counts as at least :math:`1 / 513`, so that
        one may divide by it.

        Args:
            costs: What each arm costs, ``(K,)``; finite and not negative.
            budget: How much may be spent, in the units of ``costs``.
            available: Which arms may be played, boolean ``(K,)``; None for all.

        Returns:
            The arms ``(m,)`` in the order of the walk, and the probability of every arm ``(K,)`` to be among them.

        Raises:
            ValueError: If no available arm fits the budget, or ``costs`` is not as described.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> arms, probabilities = Exp3(num_arms=3).within(torch.tensor([1, 5, 2]), budget=3)
            >>> arms.sort().values, probabilities
            (tensor([0, 2]), tensor([1., 0., 1.], dtype=torch.float64))
        """
        mask = playable(available, self._num_arms)
        if costs.shape != (self._num_arms,):
            raise ValueError(
                f"`costs` must have shape ({self._num_arms},), but got {tuple(costs.shape)}. Pass one cost an arm."
            )
        costs, limit = priced(costs, budget, mask)
        order = self.orders(1, available=available)
        (played,) = affordable(order, costs, limit)
        arms = order[0][played[order[0]]]
        if torch.equal(played, costs.isfinite()):  # whatever the order
            return arms, played.double()
        simulated = self._simulated_scores(mask).argsort(1, descending=True)
        probabilities = affordable(simulated, costs, limit).double().mean(0)
        probabilities[arms] = probabilities[arms].clamp(min=1 / (_NUM_SIMULATIONS + 1))
        return arms, probabilities

    def probabilities(self, *, available: Tensor | None = None) -> Tensor:
        """Return the probability of every arm to be the next single play.

        Exact where the policy has a formula; else (Thompson sampling) the frequency in 512 orders, the same whenever
        asked between two updates.

        Args:
            available: Which arms may be played, boolean ``(K,)``; the others have none. None for all.

        Returns:
            Probabilities ``(K,)`` in double precision; they sum to 1.

        Raises:
            ValueError: If ``available`` is not as described or names no arm.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> Exp3(num_arms=4).probabilities(available=torch.tensor([True, False, True, False]))
            tensor([0.5000, 0.0000, 0.5000, 0.0000], dtype=torch.float64)
        """
        return self._probabilities(playable(available, self._num_arms))

    def update(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None = None) -> None:
        r"""Learn from independent plays, as `draw` gives them: one round, in which arms may repeat.

        Where a policy estimates rewards (the Exp3 family), it does so by the mean over the plays,
        :math:`\frac1n \sum_j \mathbb 1[a_j = a] (\ldots) / p_a`; `Exp3` says how much a round weighs.

        Args:
            arms: The arms that were played ``(n,)``; none at all is no round.
            rewards: What each play gave ``(n,)``, in [0, 1].
            probabilities: Those that the arms were played with ``(K,)``; by default those of now. Only the Exp3
                family needs them.

        Raises:
            ValueError: If an arm does not exist, a reward is not finite or outside [0, 1], or an arm was played that
                has no probability.

        Example:
            >>> from lightning_continual.bandits import EpsilonGreedy
            >>> bandit = EpsilonGreedy(num_arms=2, epsilon=0.0)
            >>> bandit.update(torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.0, 0.8]))
            >>> bandit.probabilities()  # arm 0 has mean 0.5, arm 1 has mean 0.4
            tensor([1., 0.], dtype=torch.float64)
        """
        arms, rewards = plays(arms, rewards, self._num_arms)
        if len(arms):
            known = None if probabilities is None else chances(probabilities, arms, self._num_arms)
            self._learn(arms, rewards, known, len(arms))
            self._num_rounds += 1

    def update_subset(self, arms: Tensor, rewards: Tensor, probabilities: Tensor) -> None:
        r"""Learn from distinct arms that were played together, as `subset` and `within` give them: one round.

        Where a policy estimates rewards, each arm counts in full: :math:`\mathbb 1[a \text{ played}] (\ldots) / p_a`.

        Args:
            arms: The arms that were played ``(m,)``, each once; none at all is no round.
            rewards: What each arm gave ``(m,)``, in [0, 1].
            probabilities: Of every arm to be among those played ``(K,)``, as drawn with them.

        Raises:
            ValueError: If an arm does not exist or repeats, a reward is not finite or outside [0, 1], or an arm was
                played that has no probability.

        Example:
            >>> from lightning_continual.bandits import Exp3M
            >>> bandit = Exp3M(num_arms=3)
            >>> arms, probabilities = bandit.subset(2)
            >>> bandit.update_subset(arms, torch.tensor([1.0, 0.0]), probabilities)
            >>> bool(bandit.probabilities()[arms[0]] > bandit.probabilities()[arms[1]])
            True
        """
        arms, rewards = plays(arms, rewards, self._num_arms)
        if len(arms) and int(arms.bincount().max()) > 1:
            raise ValueError(
                f"`arms` must hold each arm at most once, but got {arms.tolist()}. Pass arms that were drawn with"
                " repetition to `update`."
            )
        if len(arms):
            self._learn(arms, rewards, chances(probabilities, arms, self._num_arms), 1)
            self._num_rounds += 1

    def grow(self, num_arms: int) -> None:
        """Add arms after the present ones, which stay as they are known.

        A new arm has the mean weight (Exp3 family), or comes in as never played (the others). The Exp3 family learns at
        a rate that falls with the number of arms, so its weights also come closer to each other.

        Args:
            num_arms: How many there are then.

        Raises:
            ValueError: If that is fewer than now.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> bandit = Exp3(num_arms=2)
            >>> bandit.grow(4)
            >>> bandit.probabilities()
            tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
        """
        if num_arms < self._num_arms:
            raise ValueError(
                f"`num_arms` must be {self._num_arms} or more, but got {num_arms}. Arms stay; leave out those that"
                " cannot be played by `available`."
            )
        num_new = num_arms - self._num_arms
        if num_new:
            self._num_arms = num_arms
            self._grow(num_new)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt and the state of the generator, as tensors, numbers and strings.

        A bandit constructed with the same arguments that loads it goes on to the bit.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> sorted(Exp3(num_arms=2).state_dict())
            ['gains', 'generator', 'num_arms', 'num_rounds', 'plays', 'policy']
        """
        return {
            "policy": type(self).__name__,
            "num_arms": self._num_arms,
            "num_rounds": self._num_rounds,
            "generator": self._generator.get_state(),
            **{name: getattr(self, f"_{name}").clone() for name in self._knowledge()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, with as many arms as it has.

        Args:
            state_dict: That of a bandit of the same policy.

        Raises:
            ValueError: If it is that of another policy.

        Example:
            >>> from lightning_continual.bandits import Exp3
            >>> one, two = Exp3(num_arms=9, seed=1), Exp3(num_arms=9, seed=2)
            >>> two.load_state_dict(one.state_dict())
            >>> torch.equal(one.draw(5), two.draw(5))
            True
        """
        if state_dict["policy"] != type(self).__name__:
            raise ValueError(
                f"`state_dict` must be that of {type(self).__name__}, but got that of {state_dict['policy']}. Construct"
                " the policy that was saved, or begin anew without its state."
            )
        self._num_arms, self._num_rounds = int(state_dict["num_arms"]), int(state_dict["num_rounds"])
        self._generator.set_state(state_dict["generator"].cpu())
        for name in self._knowledge():
            setattr(self, f"_{name}", state_dict[name].cpu().clone())

    @abstractmethod
    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        """Return random scores ``(num, K)`` without ties, above minus infinity: arms are ordered by them."""

    @abstractmethod
    def _probabilities(self, available: Tensor | None) -> Tensor:
        """Return the probability of every arm ``(K,)`` to have the highest score of those available."""

    @abstractmethod
    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        """Learn from plays; an arm was expected ``num_draws * probabilities`` times (None: those of now)."""

    @abstractmethod
    def _grow(self, num_new: int) -> None:
        """Make room for arms that were added to `num_arms`."""

    @abstractmethod
    def _knowledge(self) -> tuple[str, ...]:
        """Return the names of the tensors that hold what was learnt, without the underscore."""

    def _draw(self, num: int, mask: Tensor | None) -> Tensor:
        return torch.multinomial(self._probabilities(mask), num, True, generator=self._generator)

    def _subset(self, num_plays: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.within(torch.ones(self._num_arms, dtype=torch.float64), num_plays, available=mask)

    def _masked_scores(self, num: int, generator: torch.Generator, mask: Tensor | None) -> Tensor:
        scores = self._scores(num, generator)
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    def _simulated_scores(self, mask: Tensor | None) -> Tensor:
        """Return many scores ``(S, K)`` of a generator that is the same between two updates, and not that of plays."""
        words = (self._generator.initial_seed(), self._num_rounds, self._num_arms)
        generator = torch.Generator().manual_seed(random.Random(repr(words)).getrandbits(63))
        return self._masked_scores(_NUM_SIMULATIONS, generator, mask)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be 1 or more, but got {value}. Pass how many draws are wanted.")
