"""Training some of the weights at a time, as a bandit plays them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_continual import _host
from lightning_continual.bandits import Bandit, RunningQuantiles
from lightning_continual.constraints import Pin
from lightning_continual.selection.history import History
from lightning_continual.selection.weight_arms import WeightArms

_NUM_MEASURED = 10
"""Steps, of those that an arm is played for, in which its reward is measured."""


class WeightSelection:
    """Plays arms of weights for ``every`` steps at a time, and learns from what they gave.

    What is not played rests: it requires no gradient, so that the backward pass ends at the lowest layer that is
    played; its norms run in evaluation mode; the optimizer passes it over. Only inside a training step, though: between
    two steps the module is as it was.

    Args:
        make_arms: Returns the arms of a module.
        make_policy: Returns a bandit for a number of arms.
        budget: The share of all arms' weights that may be trained.
        every: Steps for which arms are played.
    """

    def __init__(
        self,
        make_arms: Callable[[L.LightningModule], WeightArms],
        make_policy: Callable[[int], Bandit],
        budget: float,
        every: int,
    ) -> None:
        self.budget = budget
        self.every = every
        self.history = History()
        self.policy: Bandit | None = None
        self.arms: WeightArms | None = None
        self.num_skipped = 0
        """Rewards that were not finite."""
        self._make_arms, self._make_policy = make_arms, make_policy
        self._scale = RunningQuantiles()
        self._pending: dict[str, Any] | None = None  # a state, until the module is there
        self._forget_play()

    def _forget_play(self) -> None:
        self._played: Tensor | None = None
        self._chances = torch.empty(0)
        self._steps = self._num_measured = 0
        self._has_stepped = self._has_measured = False  # in this batch
        self._totals: Tensor | None = None

    # --- The fit ------------------------------------------------------------------------------------------------------

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Deal out the module's weights, and take up what is known."""
        self.arms = arms = self._make_arms(pl_module)
        self._on_device = dataclasses.replace(
            arms, owner={name: one.to(pl_module.device) for name, one in arms.owner.items()}
        )
        self._woken: list[Callable[[], Any]] = []
        self._pin = Pin()
        smallest = int(arms.sizes.argmin())
        if self.is_idle:
            pass  # nothing to choose among
        elif float(arms.costs[smallest]) > self.budget:
            raise ValueError(
                f"`budget` must leave room for one arm, but the smallest, {arms.names[smallest]!r}, has"
                f" {float(arms.costs[smallest]):.3g} of the weights and the budget is {self.budget}. Raise it, or pass"
                " `arms=` that are smaller."
            )
        elif too_large := [name for name, cost in zip(arms.names, arms.costs, strict=True) if cost > self.budget]:
            rank_zero_warn(
                f"With `budget={self.budget}` these arms of weights are never trained, for each is larger than that:"
                f" {too_large}. Raise the budget, or pass `arms=` that are smaller, as 'units'."
            )
        self.cuts_backward = not _host.needs_every_gradient(trainer)
        if not (self.cuts_backward or self.is_idle):
            rank_zero_info(
                "Weights that are not played rest, but their gradients are computed: DDP waits for all of them, and a"
                " compiled module would be compiled anew for every play. To save that, pass"
                " `strategy='ddp_find_unused_parameters_true'`, and do not compile."
            )
        if self._pending is not None:
            self._take_up(self._pending)
            self._pending = None
        if self._played is not None:
            self._settle(pl_module)

    @property
    def is_idle(self) -> bool:
        """Whether all weights are trained all the time."""
        return self.arms is not None and (len(self.arms.names) == 1 or self.budget >= 1)

    def start_task(self) -> None:
        """Begin anew: what was worth training on other data says little."""
        self._scale = RunningQuantiles()
        self.end_task()

    def end_task(self) -> None:
        """Forget what was worth training."""
        self.policy = None
        self._forget_play()

    def before_batch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Let rest what is not played; every so often play anew first. Return whether it did."""
        assert self.arms is not None
        if self.is_idle:
            return False
        has_learnt = self._played is not None and self._steps >= self.every
        if has_learnt:
            self._learn(trainer)
        if self._played is None or has_learnt:
            self._play(pl_module)
        assert self._played is not None
        modules = dict(pl_module.named_modules())
        for name in self.arms.resting_norms(self._played):
            if modules[name].training:
                modules[name].training = False
                self._woken.append(lambda one=modules[name]: setattr(one, "training", True))  # type: ignore[misc]
        if self.cuts_backward:
            for parameter in self._resting:
                parameter.requires_grad_(False)
                self._woken.append(parameter.requires_grad_)
        return has_learnt

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Hold what rests through the step, and measure what the step gives."""
        if self.is_idle or self._played is None:
            return
        self._has_stepped = True
        for parameter in self._resting:
            parameter.grad = None  # an optimizer moves what has a gradient, were it zero
        assert self.arms is not None
        parameters = _host.parameters_of(pl_module, optimizer)
        self._pin.mask_gradients_(parameters)
        measured: list[str] = []
        if self._steps % max(1, self.every // _NUM_MEASURED) == 0:
            measured = [name for name in self.arms.owner if name in parameters and parameters[name].grad is not None]
        before = [parameters[name].detach().clone() for name in measured]
        scale = _host.gradient_scale(trainer, optimizer)
        # A fused optimizer that unscales gradients itself may leave them either way: keep them as they are now.
        scaled = [] if scale == 1 else [_dense(parameters[name].grad) / scale for name in measured]

        def after() -> None:
            self._pin.put_back_(parameters)
            if not measured:
                return
            change = torch._foreach_sub([parameters[name].detach() for name in measured], before)
            torch._foreach_mul_(change, scaled or [_dense(parameters[name].grad) for name in measured])
            torch._foreach_abs_(change)
            if self._totals is None:
                self._totals = torch.zeros(len(self._on_device.names), device=pl_module.device)
            for name, value in zip(measured, change, strict=True):
                self._on_device.add_to_(self._totals, name, value)
            self._has_measured = True

        _host.after_step(optimizer, self, after)

    def after_batch(self) -> None:
        """Wake what rested."""
        self.wake()
        self._steps += self._has_stepped
        self._num_measured += self._has_measured
        self._has_stepped = self._has_measured = False

    def wake(self) -> None:
        """Give the module back as it was."""
        for give_back in self.__dict__.get("_woken", []):
            give_back()
        self._woken = []

    def end(self) -> None:
        """Leave nothing of ours on the module and the optimizers."""
        self.wake()
        _host.forget_steps(self)

    # --- Playing and learning -----------------------------------------------------------------------------------------

    def _play(self, pl_module: L.LightningModule) -> None:
        assert self.arms is not None
        num_arms = len(self.arms.names)
        if self.policy is None:
            self.policy = self._make_policy(num_arms)
            self._rested = torch.zeros(num_arms, dtype=torch.int64)
        played, self._chances = self.policy.within(self.arms.costs, self.budget)
        self._played = torch.zeros(num_arms, dtype=torch.bool).index_fill_(0, played, True)
        self._steps = self._num_measured = 0
        self._totals = None
        self._settle(pl_module)

    def _settle(self, pl_module: L.LightningModule) -> None:
        """Find what rests in this play."""
        assert self.arms is not None
        assert self._played is not None
        parameters = dict(pl_module.named_parameters())
        whole, parts = self.arms.resting(self._played)
        self._resting = [parameters[name] for name in whole]
        pinned = {}
        for name, rows in parts.items():
            shape = [1] * parameters[name].ndim
            shape[self.arms.dims[name]] = len(rows)
            pinned[name] = rows.reshape(shape).expand_as(parameters[name]).to(pl_module.device)
        self._pin = Pin.at(parameters, pinned)

    def _learn(self, trainer: L.Trainer) -> None:
        """Reward the arms that were played, each by its mean over weights and measured steps."""
        assert self.arms is not None
        assert self._played is not None
        assert self.policy is not None
        self._rested = torch.where(self._played, 0, self._rested + self._steps)
        totals = torch.zeros(len(self.arms.names)) if self._totals is None else self._totals
        add = _host.all_sum(trainer)
        num = int(add(torch.tensor(self._num_measured)))
        rewards = add(totals).cpu().double() / (num * self.arms.sizes)
        known = self._played & rewards.isfinite()
        num_skipped = int((self._played & ~known).sum()) if num else 0  # a scaler may have skipped all steps
        if num_skipped and not self.num_skipped:
            rank_zero_warn("A reward of weights was not finite, and is skipped; so will be others. Look at the loss.")
        self.num_skipped += num_skipped
        probabilities = self.policy.probabilities()
        played = known.nonzero().flatten()
        if len(played):
            self.policy.update_subset(played, self._scale(rewards[played]), self._chances)
        rewards = torch.where(known, rewards, torch.nan)
        self.history.add(trainer.global_step, probabilities, self._played, rewards)

    def diagnostics(self) -> dict[str, float]:
        """Return the share of weights in training, and the most steps that an arm now played had rested."""
        if self.arms is None or self._played is None:
            return {}
        return {
            "share": float(self.arms.costs[self._played].sum()),
            "rested": float(self._rested[self._played].max()),
        }

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is known and played, in tensors and plain values."""
        if self._pending is not None:
            return self._pending
        state: dict[str, Any] = {"history": self.history.state_dict(), "num_skipped": self.num_skipped}
        state["scale"] = self._scale.state_dict()
        if self._played is None or self.policy is None or self.arms is None:
            return state
        return {
            **state,
            "names": list(self.arms.names),
            "policy": self.policy.state_dict(),
            "played": self._played.clone(),
            "chances": self._chances.clone(),
            "rested": self._rested.clone(),
            "steps": self._steps,
            "num_measured": self._num_measured,
            "totals": None if self._totals is None else self._totals.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, once the module is there."""
        self._pending = state_dict

    def _take_up(self, state: dict[str, Any]) -> None:
        assert self.arms is not None
        self.history.load_state_dict(state["history"])
        self.num_skipped = state["num_skipped"]
        self._scale.load_state_dict(state["scale"])
        self.policy = None
        self._forget_play()
        if "policy" not in state:
            return
        if state["names"] != list(self.arms.names):
            raise ValueError(
                f"The state knows the arms {state['names']}, but the module has {list(self.arms.names)}. Restore into a"
                " module of the same architecture, with the same `arms`."
            )
        self.policy = self._make_policy(len(self.arms.names))
        self.policy.load_state_dict(state["policy"])
        self._played, self._chances = state["played"].clone(), state["chances"].clone()
        self._rested, self._steps, self._num_measured = (
            state["rested"].clone(),
            state["steps"],
            state["num_measured"],
        )
        if state["totals"] is not None:
            self._totals = state["totals"].to(next(iter(self._on_device.owner.values())).device, copy=True)


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient
