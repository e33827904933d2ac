"""The search of a share by asking and telling: as much as possible, as long as a score holds."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_continual._extras import require

Objective = Literal["constrained", "scalarised"]
Sampler = Literal["gp", "random"]
_ROUNDING = 1e-2  # up to which violation an expected score holds: a process is a little smooth even without noise


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Args:
        shares: The shares tried, one a block.
        score: The score they led to; NaN where there was none.
    """

    shares: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Found:
    """What a search found, or the shares that were given without one.

    Args:
        shares: The shares chosen, one a block.
        sizes: How many weights each block had to give.
        before: The score before anything was given up; None if it was not taken.
        after: The score at the end, with the shares chosen.
        trials: The trials of the search.

    Example:
        >>> Found(shares=(0.5, 0.9), sizes=(300, 100)).share
        0.6
    """

    shares: tuple[float, ...]
    sizes: tuple[float, ...]
    before: float | None = None
    after: float | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def share(self) -> float:
        """The mean of the shares chosen, each block by its weights."""
        return mean_share(self.shares, self.sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        own = {"shares": list(self.shares), "sizes": list(self.sizes), "before": self.before, "after": self.after}
        return {**own, "trials": [[list(one.shares), one.score] for one in self.trials]}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Found:
        """Return what `state_dict` was taken of."""
        trials = tuple(Trial(tuple(shares), score) for shares, score in state_dict["trials"])
        shares, sizes, before, after = (state_dict[name] for name in ("shares", "sizes", "before", "after"))
        return cls(tuple(shares), tuple(sizes), before, after, trials)


def mean_share(shares: Sequence[float], sizes: Sequence[float]) -> float:
    """Return the mean of shares, each by its size; 0 where there is nothing.

    Example:
        >>> mean_share([0.0, 1.0], [1, 3])
        0.75
    """
    return sum(size * share for size, share in zip(sizes, shares, strict=True)) / (sum(sizes) or 1.0)


class ShareSearch:
    r"""Searches the shares :math:`p_1, \ldots, p_B` of what can be given up, by Bayesian optimisation.

    With weights :math:`v_b` of the blocks and :math:`\bar p = \sum_b v_b p_b / \sum_b v_b`:

    .. math::
        \text{constrained:}\quad \max \bar p \quad\text{where}\quad s(p) \ge s_0 - m, \qquad
        \text{scalarised:}\quad \max \frac{s(p)}{s_0} + w \bar p

    Scores that are losses are negated (and :math:`s / s_0` is then :math:`s_0 / s`, at most 10). A trial whose score is
    not finite is infeasible. Optuna says what to try: a Gaussian process with a Matérn-5/2 kernel, and expected
    improvement times the probability that the constraint holds, told as

    .. math::
        c = \operatorname{sign}(v) \ln(1 + |v|), \qquad v = \frac{(s_0 - m) - s}{\max(m, 10^{-3} |s_0|)}

    (at least one of them positive), which has the same sign as the violation, but in which a network pruned to ruin
    does not hide what happens near the limit. The least shares count as feasible beforehand: nothing is lost where
    nothing is given up, and less than a bound is no choice. Objective, scale and this are our reading of the paper.

    Scores are noisy, and the largest share that happens to hold is a lucky one. With one block the choice is therefore
    the largest of which both the score holds and, there, the mean of a Gaussian process through all (`posterior`).

    Each trial asked is a function of the seed and the trials told so far, so that a search can be broken off and taken
    up again.

    Args:
        lows: The least share of each block.
        highs: The largest share of each block.
        before: :math:`s_0`, the score before anything is given up.
        tolerance: :math:`m \ge 0`.
        objective: ``"constrained"`` or ``"scalarised"``.
        weight: :math:`w \ge 0`, for ``"scalarised"``.
        sizes: :math:`v_b`; by default equal.
        higher_is_better: False for losses.
        seed: Of what is drawn.
        sampler: ``"gp"``, or ``"random"`` to compare with.
        storage: A file for a SQLite database of optuna, which its dashboard shows, and from which a search of the same
            name and arguments is taken up.
        name: The study's name in ``storage``; a digest of the arguments follows it.

    Raises:
        ValueError: If an argument lies outside its range.
        ImportError: If optuna is not installed.

    Example:
        >>> search = ShareSearch([0.0], [0.99], before=0.9, tolerance=0.01)
        >>> search.ask()
        (0.5,)
        >>> search.tell((0.5,), 0.895)
        >>> search.tell(search.ask(), float("nan"))
        >>> search.chosen()
        Trial(shares=(0.5,), score=0.895)

    References:
        - Srivastava, Berman, Blaschko, Tuia. *Adaptive Compression-based Lifelong Learning.* BMVC 2019.
        - Gardner et al. *Bayesian Optimization with Inequality Constraints.* ICML 2014.
    """

    def __init__(
        self,
        lows: Sequence[float],
        highs: Sequence[float],
        *,
        before: float,
        tolerance: float = 0.01,
        objective: Objective = "constrained",
        weight: float = 1.0,
        sizes: Sequence[float] | None = None,
        higher_is_better: bool = True,
        seed: int = 0,
        sampler: Sampler = "gp",
        storage: str | None = None,
        name: str = "shares",
    ) -> None:
        if not lows or len(lows) != len(highs):
            raise ValueError(f"`lows` and `highs` must be one share a block, but got {len(lows)} and {len(highs)}.")
        if not all(0 <= low <= high < 1 for low, high in zip(lows, highs, strict=True)):
            raise ValueError(
                f"Shares must lie in [0, 1), `lows` not above `highs`, but got {list(lows)} and {list(highs)}."
            )
        if not math.isfinite(before):
            raise ValueError(f"`before` must be finite, but got {before}. Look for NaN in the validation data.")
        for key, value in {"tolerance": tolerance, "weight": weight}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"`{key}` must be at least 0 and finite, but got {value}.")
        if objective not in ("constrained", "scalarised"):
            raise ValueError(f"`objective` must be 'constrained' or 'scalarised', but got {objective!r}.")
        if objective == "scalarised" and before <= 0:
            raise ValueError(f"`before` must be above 0 to divide by, but got {before}. Use `objective='constrained'`.")
        self.lows, self.highs = tuple(lows), tuple(highs)
        self.sizes = tuple(sizes or [1.0] * len(lows))
        self.before, self.tolerance, self.higher_is_better = before, tolerance, higher_is_better
        self.objective, self.weight = objective, weight
        self.sampler, self.seed = sampler, seed
        self._optuna = require("optuna", "bayes")
        with _quiet(self._optuna):
            self._study = self._made(storage, name)
        self._asked: Any = None

    @property
    def trials(self) -> list[Trial]:
        """The trials told so far, in their order."""
        complete = (self._optuna.trial.TrialState.COMPLETE,)
        told = [one for one in self._study.get_trials(deepcopy=False, states=complete) if "score" in one.user_attrs]
        return [Trial(self._shares(one.params), float(one.user_attrs["score"])) for one in told]

    def ask(self) -> tuple[float, ...]:
        """Return the shares to try next, one a block. Asked again before it is told, the answer is the same."""
        if self._asked is None:
            samplers, seed = self._optuna.samplers, (self.seed * 1009 + len(self.trials)) % 2**31
            with _quiet(self._optuna):
                if self.sampler == "random":
                    self._study.sampler = samplers.RandomSampler(seed=seed)
                else:
                    self._study.sampler = samplers.GPSampler(seed=seed, n_startup_trials=1)
                    if not self.trials:
                        middle = [(low + high) / 2 if low else min(0.5, high) for low, high in self._ranges]
                        self._study.enqueue_trial(dict(zip(self._keys, middle, strict=True)))
                self._asked = self._study.ask()
                for key, (low, high) in zip(self._keys, self._ranges, strict=True):
                    self._asked.suggest_float(key, low, high)
        return self._shares(self._asked.params)

    def tell(self, shares: Sequence[float], score: float) -> None:
        """Note the score of shares: those last asked, or others (of a search broken off).

        Args:
            shares: The shares, one a block.
            score: Their score; NaN or infinite where there was none.
        """
        shares, told = tuple(shares), Trial(tuple(shares), float(score))
        with _quiet(self._optuna):
            if self._asked is not None and self._shares(self._asked.params) == shares:
                self._asked.set_user_attr("score", told.score)
                for key, value in self._constraints(told).items():
                    self._asked.set_constraint(key, value)
                self._study.tell(self._asked, self.value(told))
            else:
                self._add(told, {"score": told.score})
        self._asked = None

    def value(self, trial: Trial) -> float:
        """Return what is maximised; a trial without score is worth as much as one whose score is 0."""
        if self.objective == "constrained":
            return mean_share(trial.shares, self.sizes)
        ratio, least = 0.0, self.before / 10
        if math.isfinite(trial.score):
            ratio = trial.score / self.before if self.higher_is_better else self.before / max(trial.score, least)
        return ratio + self.weight * mean_share(trial.shares, self.sizes)

    def violation(self, trial: Trial) -> float:
        """Return the constraint c, which holds where it is not positive."""
        if not math.isfinite(trial.score):
            return math.log1p(10.0)
        if self.objective == "scalarised":
            return -1.0
        loss = self.before - trial.score if self.higher_is_better else trial.score - self.before
        scaled = (loss - self.tolerance) / (max(self.tolerance, 1e-3 * abs(self.before)) or 1.0)
        return math.copysign(math.log1p(abs(scaled)), scaled)

    def is_feasible(self, trial: Trial) -> bool:
        """Whether the constraint holds; NaN never does."""
        return self.violation(trial) <= 0

    def chosen(self) -> Trial | None:
        """Return the best feasible trial, if there is none that of the best score; None without a finite score."""
        finite = [one for one in self.trials if math.isfinite(one.score)]
        if feasible := [one for one in finite if self.is_feasible(one)]:
            return max(self._expected_to_hold(finite, feasible) or feasible, key=self.value)
        return max(finite, key=lambda one: one.score if self.higher_is_better else -one.score, default=None)

    def _expected_to_hold(self, trials: list[Trial], among: list[Trial]) -> list[Trial]:
        """Return those of some trials whose constraint holds for the score that all trials let expect."""
        if self.objective == "scalarised" or len(self.lows) > 1:
            return among
        x, y = torch.tensor([(one.shares[0], one.score) for one in trials], dtype=torch.float64).unbind(1)
        means = dict(zip(trials, posterior(x, y, x)[0].tolist(), strict=True))
        return [one for one in among if self.violation(Trial(one.shares, means[one])) <= _ROUNDING]

    def _constraints(self, trial: Trial) -> dict[str, float]:
        """Return what optuna is told: where scores are added up, one that is not finite is but a bad one."""
        return {"loss": self.violation(trial)} if self.objective == "constrained" else {}

    def summary(self) -> str:
        """Return in a few words what is asked for now, and what is best so far, for a progress bar."""
        asked, best = ("/".join(f"{share:.3f}" for share in shares) for shares in (self.ask(), self._best_shares()))
        return f": share {asked}" + f", best so far {best}" * bool(best)

    def _best_shares(self) -> tuple[float, ...]:
        best = self.chosen()
        return () if best is None or not self.is_feasible(best) else best.shares

    @property
    def _keys(self) -> list[str]:
        return [f"share_{number}" for number in range(len(self.lows))]

    @property
    def _ranges(self) -> list[tuple[float, float]]:
        return list(zip(self.lows, self.highs, strict=True))

    def _shares(self, params: dict[str, float]) -> tuple[float, ...]:
        return tuple(params[key] for key in self._keys)

    def _made(self, storage: str | None, name: str) -> Any:
        """Return the study: a new one, or that of ``storage``."""
        url = None if storage is None else f"sqlite:///{storage}"
        own = {"before": self.before, "lows": list(self.lows), "highs": list(self.highs), "objective": self.objective}
        own |= {"tolerance": self.tolerance, "weight": self.weight, "higher_is_better": self.higher_is_better}
        own |= {"sizes": list(self.sizes), "seed": self.seed, "sampler": self.sampler}
        digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]
        study = self._optuna.create_study(
            storage=url, study_name=f"{name} ({digest})", direction="maximize", load_if_exists=True
        )
        if not study.user_attrs:
            for key, value in own.items():
                study.set_user_attr(key, value)
            if self.objective == "constrained":
                self._study = study
                self._add(Trial(self.lows, self.before), {})
        for one in study.get_trials(deepcopy=False):
            if not one.state.is_finished():  # broken off
                study.tell(one.number, state=self._optuna.trial.TrialState.FAIL)
        return study

    def _add(self, trial: Trial, attributes: dict[str, float]) -> None:
        """Let the study know a trial that it has not asked for."""
        ranges = [self._optuna.distributions.FloatDistribution(*one) for one in self._ranges]
        self._study.add_trial(
            self._optuna.create_trial(
                params=dict(zip(self._keys, trial.shares, strict=True)),
                distributions=dict(zip(self._keys, ranges, strict=True)),
                value=self.value(trial),
                user_attrs=attributes,
                constraints=self._constraints(trial),
            )
        )


def posterior(x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean and standard deviation of a Gaussian process through measurements of one variable.

    .. math::
        k(r) = \sigma^2 \Bigl(1 + \tfrac{\sqrt5 r}{\ell} + \tfrac{5 r^2}{3 \ell^2}\Bigr) e^{-\sqrt5 r / \ell}, \qquad
        \mu_* = \bar y + k_*^\top K^{-1} (y - \bar y), \quad
        \sigma_*^2 = k_{**} - k_*^\top K^{-1} k_*

    with :math:`K = k(x, x) + \tau^2 I`; :math:`\ell` and :math:`\tau` are the likeliest of a grid, :math:`\sigma^2` in
    closed form. It is for the choice and for figures: the sampler has a process of its own.

    Args:
        x: Where was measured ``(N,)``.
        y: What was measured ``(N,)``, finite.
        at: Where to predict ``(M,)``.

    Returns:
        Mean and standard deviation ``(M,)``, float64.

    Raises:
        ValueError: If there are no measurements, or one is not finite.

    Example:
        >>> mean, deviation = posterior(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.5]))
        >>> mean[1], bool(deviation[1] > deviation[0])
        (tensor(2., dtype=torch.float64), True)

    References:
        - Rasmussen, Williams. *Gaussian Processes for Machine Learning.* MIT Press 2006.
    """
    x, y, at = x.double(), y.double(), at.double()
    if x.shape != y.shape or x.ndim != 1 or not len(x) or not bool(y.isfinite().all()):
        raise ValueError(
            f"`x` and `y` must be finite measurements, (N,) each, but got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    span = float((torch.cat([x, at]).max() - torch.cat([x, at]).min()).clamp_min(1e-9))
    centred = y - y.mean()
    best: tuple[float, Any] = (math.inf, None)
    for length in (0.05, 0.1, 0.2, 0.4, 0.8):
        for noise in (1e-6, 1e-4, 1e-2, 1e-1):
            matrix = matern(x, x, length * span) + noise * torch.eye(len(x), dtype=x.dtype)
            factor = torch.linalg.cholesky(matrix)
            solved = torch.cholesky_solve(centred[:, None], factor)[:, 0]
            variance = (centred @ solved / len(x)).clamp_min(1e-18)
            negative = float(len(x) / 2 * variance.log() + factor.diagonal().log().sum())
            if negative < best[0]:
                best = negative, (length, factor, solved, variance)
    length, factor, solved, variance = best[1]
    cross = matern(at, x, length * span)
    explained = (cross * torch.cholesky_solve(cross.T, factor).T).sum(1)
    return y.mean() + cross @ solved, (variance * (1 - explained).clamp_min(0)).sqrt()


def matern(x: Tensor, y: Tensor, length: float) -> Tensor:
    r"""Return Matérn's kernel with :math:`\nu = 5/2` between points of one variable; see `posterior`.

    Example:
        >>> matern(torch.zeros(1), torch.zeros(1), 1.0)
        tensor([[1.]])
    """
    r = math.sqrt(5) * (x[:, None] - y[None]).abs() / length
    return (1 + r + r.square() / 3) * torch.exp(-r)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Let optuna say nothing of trials and of what it calls experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
