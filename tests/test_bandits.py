"""Bandits: what each policy plays and learns, against slow definitions, laws and the bounds of its paper."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_continual.bandits import (
    Bandit,
    EpsilonGreedy,
    Exp3,
    Exp3M,
    Exp3S,
    RunningQuantiles,
    SlidingWindowUCB,
    ThompsonSampling,
    capped_marginals,
    dependent_rounding,
    make_bandit,
)

POLICIES: dict[str, Callable[[int, int], Bandit]] = {
    "exp3": lambda num_arms, seed: Exp3(num_arms, seed=seed),
    "exp3-fixed": lambda num_arms, seed: Exp3(num_arms, exploration=0.3, seed=seed),
    "exp3s": lambda num_arms, seed: Exp3S(num_arms, exploration=0.3, sharing=1e-3, seed=seed),
    "exp3m": lambda num_arms, seed: Exp3M(num_arms, seed=seed),
    "ucb": lambda num_arms, seed: SlidingWindowUCB(num_arms, window=40, seed=seed),
    "thompson": lambda num_arms, seed: ThompsonSampling(num_arms, seed=seed),
    "thompson-beta": lambda num_arms, seed: ThompsonSampling(num_arms, likelihood="beta", discount=0.95, seed=seed),
    "greedy": lambda num_arms, seed: EpsilonGreedy(num_arms, epsilon=0.2, seed=seed),
    "greedy-step": lambda num_arms, seed: EpsilonGreedy(num_arms, epsilon=0.2, step_size=0.1, seed=seed),
}
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
exponential = pytest.mark.parametrize("make", [POLICIES[name] for name in ("exp3", "exp3-fixed", "exp3s", "exp3m")])

GREEDY = EpsilonGreedy, SlidingWindowUCB
MEANS = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.6], dtype=torch.float64)


def train(bandit: Bandit, *, num_rounds: int = 30, num_plays: int = 4) -> Bandit:
    """Play, and give rewards that depend on the arm and a little on chance."""
    generator = torch.Generator().manual_seed(99)
    means = MEANS.repeat(bandit.num_arms)[: bandit.num_arms]
    for _ in range(num_rounds):
        arms = bandit.draw(num_plays)
        noise = 0.1 * torch.rand(num_plays, generator=generator, dtype=torch.float64)
        bandit.update(arms, means[arms] + noise)
    return bandit


def frequencies(arms: Tensor, num_arms: int) -> Tensor:
    return torch.bincount(arms.flatten(), minlength=num_arms).double()


def assert_frequent(counts: Tensor, probabilities: Tensor, num: int, simulated: int | None = None) -> None:
    """Frequencies lie within 5 standard errors (of both, where the probability is one of ``simulated`` orders).

    Beyond that lies one in two million; the floor is a count of 15, which a Poisson of mean below 2 passes as rarely.
    """
    variance = probabilities * (1 - probabilities) * (1 / num + (1 / simulated if simulated else 0))
    floor = 15 / min(num, simulated or num)
    assert bool(((counts / num - probabilities).abs() <= 5 * variance.sqrt() + floor * (probabilities < floor)).all())


# ---------------------------------------------------------------------------------------------------- what is played


@every_policy
def test_an_order_holds_every_arm_once(make: Callable[[int, int], Bandit]) -> None:
    orders = train(make(5, 0)).orders(50)
    assert torch.equal(orders.sort(1).values, torch.arange(5).expand(50, 5))
    assert orders.dtype == torch.int64


@every_policy
@pytest.mark.parametrize("available", [None, [True, False, True, True, False]], ids=["all", "some"])
def test_plays_and_first_places_come_as_often_as_said(
    make: Callable[[int, int], Bandit], available: list[bool] | None
) -> None:
    bandit, num = train(make(5, 1)), 4000
    mask = None if available is None else torch.tensor(available)
    probabilities = bandit.probabilities(available=mask)
    assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    simulated = 512 if isinstance(bandit, ThompsonSampling) else None
    for arms in (bandit.draw(num, available=mask), bandit.orders(num, available=mask)[:, 0]):
        assert_frequent(frequencies(arms, 5), probabilities, num, simulated)


@exponential
def test_orders_are_draws_without_replacement(make: Callable[[int, int], Bandit]) -> None:
    bandit, num = train(make(4, 2)), 20000
    p = bandit.probabilities().tolist()
    counts = frequencies(bandit.orders(num) @ torch.tensor([64, 16, 4, 1]), 256)
    expected = torch.zeros(256, dtype=torch.float64)
    for a, b, c, d in itertools.permutations(range(4)):
        expected[64 * a + 16 * b + 4 * c + d] = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
    assert_frequent(counts, expected, num)


@every_policy
def test_an_arm_that_is_not_available_is_never_played(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(5, 3))
    available = torch.tensor([True, False, True, False, True])  # the best arm is not
    for arms in (
        bandit.draw(500, available=available),
        bandit.orders(500, available=available)[:, :3],
        bandit.subset(3, available=available)[0],
        bandit.within(torch.tensor([2.0, 1.0, 2.0, 1.0, 3.0]), 4.0, available=available)[0],
    ):
        assert bool(available[arms].all())
    for probabilities in (
        bandit.probabilities(available=available),
        bandit.subset(2, available=available)[1],
        bandit.within(torch.tensor([2.0, 1.0, 2.0, 1.0, 3.0]), 4.0, available=available)[1],
    ):
        assert bool((probabilities[~available] == 0).all())
    only = torch.tensor([False, False, False, True, False])
    assert bandit.draw(9, available=only).tolist() == 9 * [3]
    assert bandit.probabilities(available=only).tolist() == [0, 0, 0, 1, 0]


@every_policy
@pytest.mark.parametrize("num_plays", [1, 2, 4, 5])
def test_a_subset_has_its_size_and_its_probabilities(make: Callable[[int, int], Bandit], num_plays: int) -> None:
    bandit, num = train(make(5, 4)), 200
    drawn = [bandit.subset(num_plays) for _ in range(num)]
    assert all(len(set(arms.tolist())) == len(arms) == num_plays for arms, _ in drawn)
    first = drawn[0][1]
    assert_close(first.sum(), torch.tensor(float(num_plays), dtype=torch.float64), atol=5 / 512, rtol=0)
    assert bool((first[drawn[0][0]] > 0).all())
    assert_frequent(frequencies(torch.cat([arms for arms, _ in drawn]), 5), first.clamp(max=1), num, 512)
    if num_plays == 5:
        assert first.tolist() == 5 * [1]


@every_policy
def test_a_budget_is_never_exceeded_nor_left_where_an_arm_fits(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(6, 5))
    costs = torch.tensor([0.5, 0.25, 1.0, 3.0, 0.125, 0.25])
    for _ in range(30):
        arms, probabilities = bandit.within(costs, 1.5)
        rest = 1.5 - float(costs[arms].sum())
        assert rest >= 0
        assert len(set(arms.tolist())) == len(arms)
        assert not [arm for arm in range(6) if arm not in arms.tolist() and costs[arm] <= rest]
        assert bool((probabilities[arms] >= 1 / 513).all())
        assert probabilities[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cost", "num_arms"), [(0.1, 3), (0.7, 7), (1 / 3, 11), (123456.7, 20)])
def test_equal_costs_give_as_many_arms_as_the_budget_has_costs(cost: float, num_arms: int, dtype: torch.dtype) -> None:
    bandit = Exp3(2 * num_arms)
    arms, probabilities = bandit.within(torch.full((2 * num_arms,), cost, dtype=dtype), num_arms * cost)
    assert len(arms) == num_arms
    assert_close(probabilities.sum(), torch.tensor(float(num_arms), dtype=torch.float64), atol=1e-9, rtol=0)


def test_integer_costs_are_kept_exactly() -> None:
    costs = torch.tensor([10**9, 10**9, 1])
    for seed in range(20):
        arms, _ = Exp3(3, seed=seed).within(costs, 2 * 10**9)
        assert int(costs[arms].sum()) <= 2 * 10**9


def test_a_budget_for_everything_plays_everything() -> None:
    available = torch.tensor([True, True, False])
    arms, probabilities = Exp3(3).within(torch.tensor([1.0, 2.0, 9.0]), 3.0, available=available)
    assert sorted(arms.tolist()) == [0, 1]
    assert probabilities.tolist() == [1, 1, 0]


def walk(order: Sequence[int], costs: Sequence[float], budget: float) -> set[int]:
    played = set()
    for arm in order:
        if costs[arm] <= budget:
            budget -= costs[arm]
            played.add(arm)
    return played


def test_the_probability_to_fit_a_budget_is_that_over_all_orders() -> None:
    bandit, costs, budget = train(Exp3(4, exploration=0.3)), [3.0, 2.0, 2.0, 1.0], 4.0
    p = bandit.probabilities().tolist()
    expected = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        a, b, c, _ = order
        chance = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
        for arm in walk(order, costs, budget):
            expected[arm] += chance
    _, probabilities = bandit.within(torch.tensor(costs), budget)
    assert_frequent(probabilities * 512, expected, 512)
    same = Exp3(4, exploration=0.3)
    same.load_state_dict(bandit.state_dict())
    order = same.orders(1)[0].tolist()
    assert set(bandit.within(torch.tensor(costs), budget)[0].tolist()) == walk(order, costs, budget)


class Surprising(Bandit):
    """A policy as users write them: what is played next is what no simulation foresees."""

    def _scores(self, num: int, generator: torch.Generator) -> Tensor:
        scores = torch.arange(num * self.num_arms, dtype=torch.float64).reshape(num, self.num_arms)
        return scores if num == 1 else -scores

    def _probabilities(self, available: Tensor | None) -> Tensor:
        return torch.full((self.num_arms,), 1 / self.num_arms, dtype=torch.float64)

    def _learn(self, arms: Tensor, rewards: Tensor, probabilities: Tensor | None, num_draws: int) -> None:
        pass

    def _grow(self, num_new: int) -> None:
        pass

    def _knowledge(self) -> tuple[str, ...]:
        return ()


def test_an_arm_that_was_played_has_a_probability() -> None:
    arms, probabilities = Surprising(3).subset(1)
    assert arms.tolist() == [2]
    assert_close(probabilities, torch.tensor([1, 0, 1 / 513], dtype=torch.float64))


@every_policy
def test_asking_does_not_disturb(make: Callable[[int, int], Bandit]) -> None:
    one, two = train(make(5, 6)), train(make(5, 6))
    first = one.probabilities()
    assert torch.equal(first, one.probabilities())
    one.state_dict()
    assert torch.equal(one.draw(20), two.draw(20))


def test_what_is_simulated_is_not_what_is_played_next() -> None:
    bandits = [Exp3(4, seed=seed) for seed in range(40)]
    simulated = torch.stack([bandit._simulated_scores(None)[0].argmax() for bandit in bandits])
    played = torch.stack([bandit.orders(1)[0, 0] for bandit in bandits])
    assert 0 < int((simulated == played).sum()) < 25  # 10 expected; 25 or more has probability 1e-6


# --------------------------------------------------------------------------------------------------- what is learnt


def exp3_probabilities(weights: list[float], gamma: float) -> list[float]:
    return [(1 - gamma) * w / sum(weights) + gamma / len(weights) for w in weights]


@pytest.mark.parametrize("sharing", [None, 0.01], ids=["exp3", "exp3s"])
def test_exponential_weights_are_those_of_the_paper(sharing: float | None) -> None:
    gamma, K = 0.2, 4
    bandit = Exp3(K, exploration=gamma) if sharing is None else Exp3S(K, exploration=gamma, sharing=sharing)
    weights = K * [1.0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        (arm,), (reward,) = bandit.draw().tolist(), torch.rand(1, generator=generator, dtype=torch.float64).tolist()
        p = exp3_probabilities(weights, gamma)
        assert_close(bandit.probabilities(), torch.tensor(p, dtype=torch.float64))
        total = sum(weights)
        for a in range(K):
            estimate = 0.5 + ((reward - 0.5) / p[a] if a == arm else 0.0)
            weights[a] *= math.exp(gamma * estimate / K)
            if sharing is not None:
                weights[a] += math.e * sharing / K * total
        bandit.update(torch.tensor([arm]), torch.tensor([reward], dtype=torch.float64))


@pytest.mark.parametrize("num_plays", [1, 2, 5, 7])
def test_without_a_horizon_the_rate_is_that_of_twice_the_rounds(num_plays: int) -> None:
    K, rounds = 8, 300
    bandit = Exp3M(K)
    gains = torch.linspace(-2000, 2000, K, dtype=torch.float64)
    bandit.load_state_dict({**bandit.state_dict(), "plays": num_plays * torch.tensor(rounds - 1.0), "gains": gains})
    gamma = math.sqrt(K * math.log(K / num_plays) / ((math.e - 1) * num_plays * 2 * rounds))
    expected = capped_marginals(gains * gamma / K, num_plays, gamma)
    assert_close(bandit.subset(num_plays)[1], expected)
    if num_plays == 1:
        assert_close(bandit.probabilities(), expected)


def test_plays_of_one_round_count_as_one_an_arm_at_most_and_those_of_a_subset_as_one_each() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    bandit = Exp3(3)
    bandit.update(torch.tensor([0, 2, 0, 1]), torch.tensor([1.0, 0.0, 0.5, 0.75]), p)
    mean = [0.5 + 0.5 / 0.5 / 4, 0.5 + 0.25 / 0.3 / 4, 0.5 - 0.5 / 0.2 / 4]
    assert_close(bandit.state_dict()["gains"], 3 * torch.tensor(mean, dtype=torch.float64))
    assert bandit.state_dict()["plays"] == 3
    bandit = Exp3(3)
    bandit.update(torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), p)
    mean = [0.5 + 0.5 / 0.5 / 2, 0.5, 0.5 - 0.5 / 0.2 / 2]
    assert_close(bandit.state_dict()["gains"], 2 * torch.tensor(mean, dtype=torch.float64))
    bandit = Exp3(3)
    bandit.update_subset(torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), 2 * p)
    assert_close(bandit.state_dict()["gains"], 2 * torch.tensor([1.0, 0.5, 0.5 - 0.5 / 0.4], dtype=torch.float64))
    assert bandit.state_dict()["plays"] == 2


def test_what_is_shared_in_a_round_goes_with_the_rounds_that_its_plays_count_as() -> None:
    bandit = Exp3S(3, exploration=0.3, sharing=0.1)
    bandit.update(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    estimates = [0.5 + 0.5 * 3 / 2, 0.5 - 0.5 * 3 / 2, 0.5]
    weights = [math.exp(0.1 * 2 * estimate) + 2 * math.e * 0.1 / 3 * 3 for estimate in estimates]
    assert_close(bandit.probabilities(), torch.tensor(exp3_probabilities(weights, 0.3), dtype=torch.float64))


def test_many_plays_of_one_round_teach_as_fast_as_every_arm_played_alone() -> None:
    together, alone = Exp3(4), Exp3(4)
    rewards = torch.tensor([0.9, 0.1, 0.5, 0.4], dtype=torch.float64)
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    for _ in range(10):
        together.update(torch.arange(4).repeat(100), rewards.repeat(100), uniform)
        for arm in range(4):
            alone.update(torch.tensor([arm]), rewards[arm : arm + 1], uniform)
    assert_close(together.probabilities(), alone.probabilities())


def test_the_estimate_is_unbiased_and_its_square_within_what_the_proof_needs() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.3, 0.8], dtype=torch.float64)
    trained = train(Exp3(4, exploration=0.2))
    p = trained.probabilities()
    mean, square = torch.zeros_like(p), torch.zeros_like(p)
    for arm in range(4):
        bandit = Exp3(4)
        bandit.update(torch.tensor([arm]), rewards[arm : arm + 1], p)
        estimate = bandit.state_dict()["gains"]
        mean += p[arm] * estimate
        square += p[arm] * estimate**2
    assert_close(mean, rewards)
    assert float((p * square).sum()) <= 0.75 + 4 / 4


@exponential
def test_arms_that_all_give_a_half_stay_equal_to_the_bit(make: Callable[[int, int], Bandit]) -> None:
    bandit = make(7, 0)
    for number in range(50):
        arms = bandit.draw(5)
        bandit.update(arms, torch.full((5,), 0.5))
        arms, probabilities = bandit.subset(1 + number % 7)
        bandit.update_subset(arms, torch.full((len(arms),), 0.5), probabilities)
    assert bandit.probabilities().tolist() == 7 * [1 / 7]
    marginals = Exp3M(7).subset(3)[1]
    assert marginals.unique().numel() == 1


def test_raw_rewards_that_are_constant_leave_all_arms_equal_to_the_bit() -> None:
    bandit, scale = Exp3(5), RunningQuantiles()
    for _ in range(20):
        arms = bandit.draw(8)
        bandit.update(arms, scale(torch.full((8,), -3.7)))
    assert bandit.probabilities().tolist() == 5 * [1 / 5]


@exponential
def test_weights_stay_finite_when_one_arm_always_wins(make: Callable[[int, int], Bandit]) -> None:
    bandit = make(5, 0)
    rare = torch.full((5,), 1e-4, dtype=torch.float64)  # so that 2,000 rounds weigh as ten million
    for _ in range(2000):
        bandit.update(torch.tensor([1]), torch.tensor([1.0]), rare)
    probabilities = bandit.probabilities()
    assert bool(probabilities.isfinite().all())
    assert bool((probabilities > 0).all())
    assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert int(probabilities.argmax()) == 1
    assert bool(bandit.subset(2)[1].isfinite().all())
    assert bool(bandit.orders(10)[:, 0].eq(1).any())


@pytest.mark.slow
@exponential
def test_weights_stay_finite_after_a_hundred_thousand_plays(make: Callable[[int, int], Bandit]) -> None:
    bandit = make(5, 0)
    for _ in range(100_000):
        bandit.update(torch.tensor([1]), torch.tensor([1.0]))
    probabilities = bandit.probabilities()
    assert bool(probabilities.isfinite().all())
    assert int(probabilities.argmax()) == 1


def slow_index(history: list[tuple[int, float]], window: int, xi: float, num_arms: int) -> list[float]:
    recent = history[-window:]
    index = []
    for arm in range(num_arms):
        rewards = [reward for one, reward in recent if one == arm]
        bound = math.sqrt(xi * math.log(min(len(history), window)) / len(rewards)) if rewards else 0.0
        index.append(sum(rewards) / len(rewards) + bound if rewards else math.inf)
    return index


def test_sliding_window_ucb_plays_the_highest_index() -> None:
    bandit = SlidingWindowUCB(4, window=15, exploration=0.7)
    history: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for number in range(60):
        arms = bandit.draw(1 + number % 3)
        if history:
            index = slow_index(history, 15, 0.7, 4)
            best = [arm for arm in range(4) if index[arm] == max(index)]
            assert_close(bandit._index(), torch.tensor(index, dtype=torch.float64))
            assert_close(
                bandit.probabilities(),
                torch.tensor([(arm in best) / len(best) for arm in range(4)], dtype=torch.float64),
            )
            assert set(arms.tolist()) <= set(best)
            assert bandit.orders(1)[0].tolist() == sorted(range(4), key=lambda a: -index[a]) or math.inf in index
            seen.add(len(best))
        rewards = torch.rand(len(arms), generator=generator, dtype=torch.float64)
        bandit.update(arms, rewards)
        history += zip(arms.tolist(), rewards.tolist(), strict=True)
    assert seen >= {1, 3}


def test_a_window_forgets_what_is_older() -> None:
    bandit, fresh = SlidingWindowUCB(3, window=10), SlidingWindowUCB(3, window=10)
    bandit.update(torch.tensor([0, 1, 2] * 20), torch.ones(60))
    for one in (bandit, fresh):
        one.update(torch.arange(10) % 2, torch.linspace(0, 1, 10))
    assert torch.equal(bandit.probabilities(), fresh.probabilities())
    assert bandit.probabilities().tolist() == [0, 0, 1]


@pytest.mark.parametrize("step_size", [None, 0.3], ids=["mean", "step"])
def test_epsilon_greedy_follows_the_means(step_size: float | None) -> None:
    bandit = EpsilonGreedy(3, epsilon=0.3, step_size=step_size)
    means: list[float | None] = [None, None, None]
    counts = [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        arms = bandit.draw(1 + number % 4)
        rewards = torch.rand(len(arms), generator=generator, dtype=torch.float64)
        bandit.update(arms, rewards)
        for arm in set(arms.tolist()):
            new = rewards[arms == arm].tolist()
            average = sum(new) / len(new)
            for _ in new:  # plays of one round count alike: each as their average
                counts[arm] += 1
                old = means[arm]
                step = 1 / counts[arm] if step_size is None else step_size
                means[arm] = average if old is None else old + step * (average - old)
        if None not in means:
            best = max(range(3), key=lambda a: means[a] or 0.0)
            expected = [0.1 + 0.7 * (arm == best) for arm in range(3)]
            assert_close(bandit.probabilities(), torch.tensor(expected, dtype=torch.float64))
            known = torch.tensor([mean or 0.0 for mean in means], dtype=torch.float64)
            assert_close(bandit.state_dict()["means"], known)
    assert None not in means


@pytest.mark.parametrize("bandit", [EpsilonGreedy(4, epsilon=0.0), SlidingWindowUCB(4)], ids=lambda b: type(b).__name__)
def test_arms_never_played_come_first_in_an_order_by_chance(bandit: Bandit) -> None:
    bandit.update(torch.tensor([1]), torch.tensor([1.0]))
    assert_close(bandit.probabilities(), torch.tensor([1, 0, 1, 1], dtype=torch.float64) / 3)
    orders = bandit.orders(600)
    assert bool((orders[:, 3] == 1).all())
    assert_frequent(frequencies(orders[:, 1], 4), bandit.probabilities(), 600)


def test_a_random_order_of_epsilon_greedy_is_uniform() -> None:
    bandit = EpsilonGreedy(4, epsilon=1.0)
    bandit.update(torch.arange(4), torch.tensor([0.1, 0.9, 0.3, 0.4]))
    last = bandit.orders(4000)[:, 3]
    assert_frequent(frequencies(last, 4), torch.full((4,), 0.25, dtype=torch.float64), 4000)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("likelihood", ["gaussian", "beta"])
def test_thompson_plays_an_arm_as_often_as_it_is_the_best(likelihood: str, discount: float) -> None:
    bandit = ThompsonSampling(2, likelihood=likelihood, discount=discount)  # type: ignore[arg-type]
    N, S = [0.0, 0.0], [0.0, 0.0]
    for arms, rewards in [([0, 1, 1], [1.0, 0.0, 1.0]), ([0], [0.0]), ([1, 1], [1.0, 1.0]), ([0, 1], [0.0, 1.0])]:
        bandit.update(torch.tensor(arms), torch.tensor(rewards))
        N, S = [discount * n for n in N], [discount * s for s in S]
        for arm, reward in zip(arms, rewards, strict=True):
            N[arm], S[arm] = N[arm] + 1, S[arm] + reward
    if likelihood == "gaussian":
        gap = S[0] / (N[0] + 1) - S[1] / (N[1] + 1)
        first = 0.5 * (1 + math.erf(gap / math.sqrt(2 * (1 / (N[0] + 1) + 1 / (N[1] + 1)))))
    else:
        grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        one, two = (grid.log() * S[a] + (1 - grid).log() * (N[a] - S[a]) for a in range(2))
        one, two = one.exp() / one.exp().sum(), two.exp() / two.exp().sum()
        first = float((one * (two.cumsum(0) - two / 2)).sum())
    expected = torch.tensor([first, 1 - first], dtype=torch.float64)
    assert_frequent(frequencies(bandit.draw(20000), 2), expected, 20000)
    assert_frequent(512 * bandit.probabilities(), expected, 512)


@every_policy
def test_names_of_arms_do_not_matter(make: Callable[[int, int], Bandit]) -> None:
    permutation = torch.tensor([3, 0, 4, 1, 2])
    one, two = make(5, 0), make(5, 0)
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    for _ in range(30):
        arms, rewards = torch.randint(5, (6,), generator=generator), torch.rand(6, generator=generator)
        one.update(arms, rewards, p)
        two.update(permutation[arms], rewards, torch.empty(5).scatter_(0, permutation, p))
    # Simulated probabilities have two standard errors of at most sqrt(1 / 4 / 512); five of them are allowed.
    tolerance = 5 * math.sqrt(0.5 / 512) if isinstance(one, ThompsonSampling) else 1e-7
    assert_close(two.probabilities()[permutation], one.probabilities(), atol=tolerance, rtol=1e-7)


@every_policy
def test_a_bandit_that_loads_the_state_goes_on_to_the_bit(make: Callable[[int, int], Bandit]) -> None:
    one, two = train(make(5, 7)), make(3, 8)
    one.grow(6)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(10):
        assert torch.equal(one.probabilities(), two.probabilities())
        for a, b in zip(one.within(torch.ones(6), 3), two.within(torch.ones(6), 3), strict=True):
            assert torch.equal(a, b)
        arms, probabilities = one.subset(4)
        assert torch.equal(arms, two.subset(4)[0])
        for bandit in (one, two):
            bandit.update_subset(arms, MEANS[arms % 5], probabilities)
            train(bandit, num_rounds=2)


@every_policy
def test_a_state_is_not_changed_by_what_comes_after(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(5, 0))
    state = bandit.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    train(bandit)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    after = bandit.probabilities()
    for value in bandit.state_dict().values():
        if isinstance(value, Tensor):
            value.zero_()
    assert torch.equal(bandit.probabilities(), after)
    other = make(5, 0)
    other.load_state_dict(state)
    train(other)
    assert all(torch.equal(state[name], value) for name, value in before.items())


@every_policy
def test_growing_keeps_what_is_known(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(5, 9), num_rounds=100)
    before = bandit.probabilities()
    bandit.grow(5)
    assert torch.equal(bandit.probabilities(), before)
    bandit.grow(8)
    assert bandit.num_arms == 8
    old = torch.arange(8) < 5
    after = bandit.probabilities(available=old)
    assert int(after.argmax()) == int(before.argmax()) == 1
    if isinstance(bandit, GREEDY):
        assert_close(after[:5], before)
        assert bool((bandit.probabilities()[5:] > 0).all())
        assert set(bandit.orders(1)[0, :3].tolist()) == {5, 6, 7} or isinstance(bandit, EpsilonGreedy)
    train(bandit)
    assert bool(bandit.probabilities().isfinite().all())


@exponential
def test_a_new_arm_has_the_mean_weight(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(5, 9), num_rounds=100)
    gains = bandit.state_dict()["gains"]
    bandit.grow(7)
    assert torch.equal(bandit.state_dict()["gains"][:5], gains)
    log_weights = bandit._log_weights()  # type: ignore[attr-defined]
    assert_close(log_weights[5:].exp(), log_weights[:5].exp().mean().expand(2))


@exponential
def test_arms_that_join_equals_are_their_equals_to_the_bit(make: Callable[[int, int], Bandit]) -> None:
    bandit = make(1, 0)
    for num_arms in (1, 3, 4, 10):
        bandit.grow(num_arms)
        bandit.update(bandit.draw(4), torch.full((4,), 0.5))
        assert bandit.probabilities().tolist() == num_arms * [1 / num_arms]


@every_policy
def test_a_single_arm_is_played(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(1, 0))
    assert bandit.draw(3).tolist() == [0, 0, 0]
    assert bandit.probabilities().tolist() == [1]
    assert [one.tolist() for one in bandit.subset(1)] == [[0], [1]]


@every_policy
def test_no_play_is_no_round(make: Callable[[int, int], Bandit]) -> None:
    bandit = train(make(4, 0))
    before = bandit.state_dict()
    nothing = torch.zeros(0, dtype=torch.int64)
    bandit.update(nothing, torch.zeros(0))
    bandit.update_subset(nothing, torch.zeros(0), torch.ones(4))
    after = bandit.state_dict()
    assert after["num_rounds"] == before["num_rounds"]
    assert all(torch.equal(after[name], before[name]) for name in before if isinstance(before[name], Tensor))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for make in POLICIES.values():
        bandit = train(make(5, 0))
        bandit.subset(2), bandit.orders(2), bandit.within(torch.ones(5), 2), bandit.probabilities()
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------- several plays


def slow_marginals(weights: list[float], k: int, gamma: float) -> list[float]:
    """The definition, with the cap found by halving."""
    K = len(weights)
    limit = (1 / k - gamma / K) / (1 - gamma)
    capped = weights
    if max(weights) >= limit * sum(weights):
        low, high = 0.0, max(weights)
        for _ in range(200):
            alpha = (low + high) / 2
            total = sum(min(w, alpha) for w in weights)
            low, high = (alpha, high) if alpha < limit * total else (low, alpha)
        capped = [min(w, high) for w in weights]
    return [k * ((1 - gamma) * w / sum(capped) + gamma / K) for w in capped]


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("num_arms", "num_plays"), [(2, 1), (5, 1), (5, 3), (9, 4), (9, 8)])
@pytest.mark.parametrize("exploration", [0.02, 0.5])
def test_capped_marginals_are_those_of_the_paper(
    spread: float, num_arms: int, num_plays: int, exploration: float
) -> None:
    generator = torch.Generator().manual_seed(num_arms)
    log_weights = spread * torch.randn(num_arms, generator=generator, dtype=torch.float64)
    marginals = capped_marginals(log_weights, num_plays, exploration)
    expected = slow_marginals(log_weights.exp().tolist(), num_plays, exploration)
    assert_close(marginals, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-7)
    assert_close(marginals.sum(), torch.tensor(float(num_plays), dtype=torch.float64))
    assert float(marginals.max()) <= 1
    assert_close(capped_marginals(log_weights + 5e4, num_plays, exploration), marginals)


def test_with_any_range_of_weights_marginals_are_finite() -> None:
    log_weights = torch.tensor([1e6, 1e5, 0.0, -1e6, -1e6], dtype=torch.float64)
    marginals = capped_marginals(log_weights, 2, 1e-3)
    expected = torch.tensor([1, 1 - 3 * 2e-3 / 5, 2e-3 / 5, 2e-3 / 5, 2e-3 / 5], dtype=torch.float64)
    assert_close(marginals, expected)


@pytest.mark.parametrize("num_plays", [1, 3, 6])
def test_exp3m_plays_arms_as_often_as_its_marginals_say(num_plays: int) -> None:
    num = 4000
    bandit = Exp3M(8, exploration=0.1)
    gains = torch.tensor([0, 10, 20, 30, 60, 100, 3, 70], dtype=torch.float64)
    bandit.load_state_dict({**bandit.state_dict(), "gains": gains})
    marginals = bandit.subset(num_plays)[1]
    expected = slow_marginals((gains * 0.1 / 8).exp().tolist(), num_plays, 0.1)
    assert_close(marginals, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-7)
    drawn = torch.stack([bandit.subset(num_plays)[0] for _ in range(num)])
    assert bool((drawn.diff(dim=1) > 0).all())  # distinct
    assert_frequent(frequencies(drawn, 8), marginals, num)


def test_for_single_plays_exp3m_is_exp3() -> None:
    one, several = train(Exp3(5)), train(Exp3M(5))
    assert torch.equal(one.probabilities(), several.probabilities())
    assert_close(several.subset(1)[1], one.probabilities())


def test_dependent_rounding_keeps_any_marginals() -> None:
    marginals = torch.tensor([1.0, 0.9, 0.05, 0.0, 0.55, 0.5, 0.3, 0.7], dtype=torch.float64)
    generator, num = torch.Generator().manual_seed(0), 4000
    drawn = [dependent_rounding(marginals, generator) for _ in range(num)]
    assert {len(arms) for arms in drawn} == {4}
    assert_frequent(frequencies(torch.cat(drawn), 8), marginals, num)


@pytest.mark.parametrize("seed", range(5))
def test_dependent_rounding_has_its_size_whatever_the_rounding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for num_plays in range(1, 40):
        log_weights = 3 * torch.randn(40, generator=generator, dtype=torch.float64)
        marginals = capped_marginals(log_weights, num_plays, 0.01)
        assert len(dependent_rounding(marginals, generator)) == num_plays


# ------------------------------------------------------------------------------------------------------------ regret


def mean_rewards(num_rounds: int, num_arms: int, num_segments: int) -> Tensor:
    """Mean rewards ``(T, K)``: 0.8 for the best arm, which is another one in each segment, and 0.2 for all others."""
    best = torch.arange(num_rounds) * num_segments // num_rounds % num_arms
    return 0.2 + 0.6 * torch.nn.functional.one_hot(best, num_arms).double()


def regret(bandit: Bandit, means: Tensor, seed: int) -> float:
    """Play Bernoulli arms, and return how much less than the best arm of every round was expected of those played."""
    rewards = torch.rand(means.shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64) < means
    played = []
    for given in rewards.double().unbind():
        arm = bandit.draw()
        bandit.update(arm, given[arm])
        played.append(arm)
    return float((means.max(1).values - means.gather(1, torch.stack(played))[:, 0]).sum())


def exp3_bound(T: int, K: int, S: int) -> float:
    return 2 * math.sqrt(math.e - 1) * math.sqrt(T * K * math.log(K))


def exp3s_bound(T: int, K: int, S: int) -> float:
    return 2 * math.sqrt(math.e - 1) * math.sqrt(K * T * (S * math.log(K * T) + math.e))


def ucb_bound(T: int, K: int, S: int, xi: float = 0.6, gap: float = 0.6) -> float:
    window = T // 10
    factor = 2 / math.log(window) * math.ceil(math.log(window) / math.log(1 + 4 * math.sqrt(1 - 1 / (2 * xi))))
    plays = (4 * xi / gap**2 + factor) * T * math.log(window) / window + window * (S - 1) + math.log(window) ** 2
    return gap * plays * (K - 1 if S == 1 else K)


def greedy_bound(T: int, K: int, S: int, epsilon: float = 0.3, gap: float = 0.6) -> float:
    x = epsilon * torch.arange(1, T + 1, dtype=torch.float64) / (2 * K)
    greedy = 2 * x * (-x / 5).exp() + 4 / gap**2 * (-(gap**2) * x.floor() / 2).exp()
    return epsilon * T * gap * (K - 1) / K + (K - 1) * gap * float(greedy.clamp(max=1).sum())


def gaussian_bound(T: int, K: int, S: int) -> float:
    return math.sqrt(K * T * math.log(K))  # the paper gives the order; the constant here is 1


def exp3s_of(T: int, K: int, S: int, seed: int) -> Bandit:
    gamma = min(1.0, math.sqrt(K * (S * math.log(K * T) + math.e) / ((math.e - 1) * T)))
    return Exp3S(K, exploration=gamma, sharing=1 / T, seed=seed)


def tuned_exp3(T: int, K: int, S: int, seed: int) -> Bandit:
    return Exp3(K, exploration=min(1.0, math.sqrt(K * math.log(K) / ((math.e - 1) * T))), seed=seed)


Published = tuple[Callable[[int, int, int, int], Bandit], Callable[[int, int, int], float], int]

PUBLISHED: dict[str, Published] = {
    "exp3": (lambda T, K, S, seed: Exp3(K, seed=seed), exp3_bound, 1),
    "exp3-tuned": (tuned_exp3, exp3_bound, 1),
    "exp3s": (exp3s_of, exp3s_bound, 1),
    "exp3s-switching": (exp3s_of, exp3s_bound, 3),
    "ucb": (lambda T, K, S, seed: SlidingWindowUCB(K, window=T // 10, seed=seed), ucb_bound, 1),
    "ucb-switching": (lambda T, K, S, seed: SlidingWindowUCB(K, window=T // 10, seed=seed), ucb_bound, 2),
    "thompson": (lambda T, K, S, seed: ThompsonSampling(K, seed=seed), gaussian_bound, 1),
    "greedy": (lambda T, K, S, seed: EpsilonGreedy(K, epsilon=0.3, seed=seed), greedy_bound, 1),
}
sizes = pytest.mark.parametrize(
    ("T", "K", "num_seeds"), [(3000, 3, 3), pytest.param(10_000, 3, 20, marks=pytest.mark.slow)], ids=["small", "full"]
)


@sizes
@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_regret_stays_below_the_published_bound(published: Published, T: int, K: int, num_seeds: int) -> None:
    make, bound, num_segments = published
    means = mean_rewards(T, K, num_segments)
    uniform = float((means.max(1).values[:, None] - means).mean(1).sum())
    limit = bound(T, K, num_segments)
    assert limit < 0.6 * T  # what the worst play would have; else the bound says nothing
    found = [regret(make(T, K, num_segments, seed), means, seed) for seed in range(num_seeds)]
    assert sum(found) / num_seeds < min(limit, uniform)


@sizes
def test_the_bayesian_regret_of_thompson_sampling_stays_below_its_bound(T: int, K: int, num_seeds: int) -> None:
    found = []
    for seed in range(num_seeds):
        prior = torch.rand(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(regret(ThompsonSampling(K, likelihood="beta", seed=seed), prior.expand(T, K), seed))
    assert sum(found) / num_seeds < math.sqrt(K * T * math.log(K) / 2)


@pytest.mark.parametrize(
    ("T", "num_seeds"), [(2000, 2), pytest.param(5_000, 20, marks=pytest.mark.slow)], ids=["small", "full"]
)
@pytest.mark.parametrize("horizon", [True, False], ids=["tuned", "default"])
def test_the_regret_of_several_plays_stays_below_the_published_bound(T: int, num_seeds: int, horizon: bool) -> None:
    K, k, total = 6, 2, 0.0
    means = torch.tensor([0.8, 0.2, 0.2, 0.8, 0.2, 0.2], dtype=torch.float64)
    gamma = min(1.0, math.sqrt(K * math.log(K / k) / ((math.e - 1) * k * T)))
    for seed in range(num_seeds):
        bandit = Exp3M(K, exploration=gamma if horizon else None, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for given in (torch.rand(T, K, generator=generator, dtype=torch.float64) < means).double().unbind():
            arms, marginals = bandit.subset(k)
            bandit.update_subset(arms, given[arms], marginals)
            total += float(1.6 - means[arms].sum())
    bound = 2 * math.sqrt(math.e - 1) * math.sqrt(k * T * K * math.log(K / k))
    assert bound < 1.2 * T
    assert total / num_seeds < min(bound, 0.8 * T)  # 0.8: two uniform arms a round


# ----------------------------------------------------------------------------------------------------------- scaling


def test_rewards_are_scaled_by_quantiles_of_what_came_before() -> None:
    scale = RunningQuantiles(0.2, 0.8, window=30)
    generator, history = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.float64)
    for number in range(20):
        rewards = torch.randn(1 + number % 7, generator=generator, dtype=torch.float64)
        scaled = scale(rewards)
        expected = torch.full_like(rewards, 0.5)
        if number:
            low, high = torch.quantile(history[-30:], torch.tensor([0.2, 0.8], dtype=torch.float64))
            if high > low:
                expected = ((rewards - low) / (high - low)).clamp(0, 1)
            else:
                expected = torch.where(rewards > low, 1.0, torch.where(rewards < low, 0.0, 0.5)).double()
        assert_close(scaled, expected)
        history = torch.cat((history, rewards))


def test_rewards_of_the_first_call_are_a_half_whatever_they_are() -> None:
    assert RunningQuantiles()(torch.tensor([[-1e9, 0.0], [3.0, 1e9]])).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_with_one_value_known_rewards_are_below_at_or_above_it() -> None:
    scale = RunningQuantiles()
    scale(torch.full((5,), 2.0))
    assert scale(torch.tensor([1.0, 2.0, 3.0])).tolist() == [0, 0.5, 1]


def test_scaled_rewards_do_not_depend_on_unit_and_origin() -> None:
    one, two = RunningQuantiles(), RunningQuantiles()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards = torch.randn(16, generator=generator, dtype=torch.float64)
        assert_close(one(rewards), two(1000 * rewards - 7))


def test_scaling_that_loads_the_state_goes_on_to_the_bit() -> None:
    one, two, small = RunningQuantiles(window=50), RunningQuantiles(window=50), RunningQuantiles(window=10)
    rewards = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for row in rewards[:4]:
        one(row)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    assert len(file.getvalue()) < 3000  # no more than the window
    file.seek(0)
    state = torch.load(file, weights_only=True)
    two.load_state_dict(state)
    small.load_state_dict(state)
    assert torch.equal(one(rewards[4]), two(rewards[4]))
    assert torch.equal(one(rewards[5]), two(rewards[5]))
    assert torch.equal(small.state_dict()["history"], rewards[3, 10:].double())


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("exp3", Exp3),
        ("exp3s", Exp3S),
        ("exp3m", Exp3M),
        ("ucb", SlidingWindowUCB),
        ("thompson", ThompsonSampling),
        ("epsilon-greedy", EpsilonGreedy),
    ],
)
def test_policies_have_names(name: str, policy: type[Bandit]) -> None:
    bandit = make_bandit(name, 5, seed=3)
    assert type(bandit) is policy
    same, other = policy(5, seed=3), policy(5, seed=4)
    drawn = bandit.orders(20)
    assert torch.equal(drawn, same.orders(20))
    assert not torch.equal(drawn, other.orders(20))


def test_a_policy_may_be_a_function_of_the_number_of_arms() -> None:
    assert make_bandit(lambda num_arms: EpsilonGreedy(num_arms, epsilon=0.4), 7).num_arms == 7
    with pytest.raises(TypeError, match=r"`policy` must return a bandit of 7 arms, but got a bandit of 3 arms"):
        make_bandit(lambda num_arms: Exp3(3), 7)
    with pytest.raises(TypeError, match=r"`policy` must return a bandit of 7 arms, but got int"):
        make_bandit(lambda num_arms: num_arms, 7)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"`policy` must be one of 'exp3', 'exp3s', .*, but got 'exp4'"):
        make_bandit("exp4", 7)


# ---------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Exp3(0), r"`num_arms` must be 1 or more, but got 0"),
        (lambda: Exp3(3, exploration=0.0), r"`exploration` must lie in \(0, 1\], but got 0.0"),
        (lambda: Exp3M(3, exploration=1.1), r"`exploration` must lie in \(0, 1\], but got 1.1"),
        (lambda: Exp3S(3, sharing=0.0), r"`sharing` must lie in \(0, 1\], but got 0.0"),
        (lambda: SlidingWindowUCB(3, window=0), r"`window` must be 1 or more, but got 0"),
        (lambda: SlidingWindowUCB(3, exploration=0.0), r"`exploration` must be positive, but got 0.0"),
        (lambda: EpsilonGreedy(3, epsilon=-0.1), r"`epsilon` must lie in \[0, 1\], but got -0.1"),
        (lambda: EpsilonGreedy(3, step_size=0.0), r"`step_size` must lie in \(0, 1\], but got 0.0"),
        (lambda: ThompsonSampling(3, likelihood="t"), r"`likelihood` must be 'gaussian' or 'beta', but got 't'"),  # type: ignore[arg-type]
        (lambda: ThompsonSampling(3, discount=0.0), r"`discount` must lie in \(0, 1\], but got 0.0"),
        (lambda: RunningQuantiles(0.8, 0.2), r"`low` and `high` must satisfy 0 <= low < high <= 1, but got 0.8 and"),
        (lambda: RunningQuantiles(window=0), r"`window` must be 1 or more, but got 0"),
    ],
)
def test_a_bad_argument_is_refused_at_once(construct: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        construct()


NAN = float("nan")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda b: b.draw(0), r"`num` must be 1 or more, but got 0"),
        (lambda b: b.orders(0), r"`num` must be 1 or more, but got 0"),
        (lambda b: b.draw(available=torch.zeros(3, dtype=torch.bool)), r"`available` must be true for an arm at least"),
        (
            lambda b: b.draw(available=torch.ones(3)),
            r"`available` must be boolean of shape \(3,\), but got torch.float",
        ),
        (lambda b: b.draw(available=torch.tensor([True])), r"`available` must be boolean of shape \(3,\), but got .*1"),
        (lambda b: b.subset(0), r"`num_plays` must lie in \[1, 3\], the number of available arms, but got 0"),
        (lambda b: b.subset(4), r"`num_plays` must lie in \[1, 3\], the number of available arms, but got 4"),
        (
            lambda b: b.subset(2, available=torch.tensor([True, False, False])),
            r"`num_plays` must lie in \[1, 1\], the number of available arms, but got 2",
        ),
        (lambda b: b.within(torch.ones(3), 0.5), r"`budget` must cover an available arm at least, but got 0.5"),
        (lambda b: b.within(torch.ones(3), NAN), r"`budget` must cover an available arm at least, but got nan"),
        (
            lambda b: b.within(torch.tensor([1.0, 9.0, 9.0]), 2.0, available=torch.tensor([False, True, True])),
            r"`budget` must cover an available arm at least, but got 2.0, and the cheapest costs 9.0",
        ),
        (lambda b: b.within(torch.ones(2), 1.0), r"`costs` must have shape \(3,\), but got \(2,\)"),
        (lambda b: b.within(torch.tensor([1.0, -1.0, NAN]), 1.0), r"`costs` must be finite and not negative"),
        (lambda b: b.update(torch.tensor([3]), torch.ones(1)), r"`arms` must lie in \[0, 3\), but got 3"),
        (lambda b: b.update(torch.tensor([-1, 2]), torch.ones(2)), r"`arms` must lie in \[0, 3\), but got -1"),
        (lambda b: b.update(torch.tensor([0.0]), torch.ones(1)), r"`arms` must hold integers and `rewards` a number"),
        (lambda b: b.update(torch.tensor([0]), torch.ones(2)), r"`arms` must hold integers and `rewards` a number"),
        (lambda b: b.update(torch.tensor([0]), torch.tensor([1.01])), r"`rewards` must be finite and lie in \[0, 1\]"),
        (lambda b: b.update(torch.tensor([0]), torch.tensor([-0.01])), r"`rewards` must be finite and lie in \[0, 1\]"),
        (
            lambda b: b.update(torch.arange(2), torch.tensor([0.5, NAN])),
            r"`rewards` must be finite and lie in \[0, 1\]",
        ),
        (
            lambda b: b.update(torch.tensor([1]), torch.ones(1), torch.tensor([1.0, 0.0, 0.0])),
            r"`probabilities` must be positive for the arms played and of shape \(3,\), but got \[1.0, 0.0, 0.0\]",
        ),
        (
            lambda b: b.update_subset(torch.tensor([1]), torch.ones(1), torch.ones(2)),
            r"`probabilities` must be positive for the arms played and of shape \(3,\)",
        ),
        (
            lambda b: b.update_subset(torch.tensor([1, 1]), torch.ones(2), torch.ones(3)),
            r"`arms` must hold each arm at most once, but got \[1, 1\]",
        ),
        (lambda b: b.grow(2), r"`num_arms` must be 3 or more, but got 2"),
        (
            lambda b: b.load_state_dict(EpsilonGreedy(3).state_dict()),
            r"`state_dict` must be that of Exp3, but got that of EpsilonGreedy",
        ),
    ],
)
def test_a_bad_use_is_refused_and_changes_nothing(use: Callable[[Bandit], object], message: str) -> None:
    bandit = Exp3(3)
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=message):
        use(bandit)
    after = bandit.state_dict()
    assert all(
        torch.equal(torch.as_tensor(after[name]), torch.as_tensor(before[name])) for name in ("gains", "generator")
    )


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_raw_reward_that_is_not_finite_is_refused_and_not_remembered(value: float) -> None:
    scale = RunningQuantiles()
    with pytest.raises(ValueError, match=r"`rewards` must be finite, but got \[(nan|inf)\]"):
        scale(torch.tensor([1.0, value]))
    assert len(scale.state_dict()["history"]) == 0
