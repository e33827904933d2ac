"""Training some of the weights at a time, as a bandit plays them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_continual import _host
from lightning_continual.bandits import Bandit, RunningQuantiles
from lightning_continual.constraints import Pin
from lightning_continual.selection.credits import Credits
from lightning_continual.selection.history import History
from lightning_continual.selection.weight_arms import Deal, WeightArms

_NUM_MEASURED = 10
"""Steps of an optimizer, of those that an arm is played for, in which its reward is measured."""


class WeightSelection:
    """Plays arms of weights for ``every`` steps at a time, and learns from what they gave.

    What is not played rests: it requires no gradient, so that the backward pass ends at the lowest layer that is
    played; its norms run in evaluation mode; the optimizer passes it over. Only inside a training step, though: between
    two steps the module is as it was. What is frozen when a task begins, and what no optimizer moves, is of no arm.

    Args:
        deal: Returns the arms of a module.
        make_policy: Returns a bandit for a number of arms, and a task.
        budget: The share of all arms' weights that may be trained.
        every: Steps for which arms are played.
        has_head: Whether the user said what is always trained.
    """

    def __init__(
        self, deal: Deal, make_policy: Callable[[int, int], Bandit], budget: float, every: int, *, has_head: bool
    ) -> None:
        self.budget = budget
        self.every = every
        self.history = History()
        self.policy: Bandit | None = None
        self.arms: WeightArms | None = None
        """Those of the task in training; None until it trains."""
        self.num_skipped = 0
        """Rewards that were not finite."""
        self._deal, self._make_policy, self._has_head = deal, make_policy, has_head
        self._dealt: tuple[list[str], list[str]] = [], []  # the names of arms, and of all that was dealt out
        self._columns: dict[str, int] = {}  # of the history, by the name of the arm
        self._scale = RunningQuantiles()
        self._task = 0
        self._told: set[str] = set()
        self._woken: list[Callable[[], Any]] = []
        self._frozen: list[Tensor] = []
        self._forget_play()

    def _forget_play(self) -> None:
        self.policy = None
        self._pending: dict[str, Any] | None = None  # the state of a play, until the module is there
        self._played: Tensor | None = None
        self._chances = torch.empty(0)
        self._steps = 0
        self._has_stepped = False  # in this batch
        self._unseen: list[str] = []  # parameters of arms that are played which have had no gradient in this play
        self._credits: Credits | None = None

    @property
    def names(self) -> list[str]:
        """A name for each arm that there was in any task."""
        return list(self._columns)

    # --- The fit ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a fit; what is to be gone on with, or begun anew, comes with the first batch or the task's start."""
        self.arms = None

    def start_task(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Begin anew, with the weights that are trained now: what was worth training on other data says little."""
        self._task, self._scale = task, RunningQuantiles()
        self.end_task()
        moved = {name for one in trainer.optimizers for name in _host.parameters_of(pl_module, one)}
        self._deal_out(trainer, pl_module, moved)

    def end_task(self) -> None:
        """Forget what was worth training."""
        self._forget_play()

    def _go_on(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on inside a task: deal out as it was at its start, and take up what was played."""
        play = self._play_state()
        if play is None:
            self.start_task(trainer, pl_module, self._task)
            return
        self._deal_out(trainer, pl_module, play["parameters"])
        assert self.arms is not None
        if play["names"] != list(self.arms.names):
            raise ValueError(
                f"The state knows the arms {play['names']}, but the module has {list(self.arms.names)}. Resume with a"
                " module of the same architecture, and the same `arms`."
            )
        self._take_up(play, self._new_credits(trainer, pl_module, self.arms))
        self._settle(pl_module)

    def _deal_out(self, trainer: L.Trainer, pl_module: L.LightningModule, parameters: Collection[str]) -> None:
        if any(isinstance(one, torch.optim.LBFGS) for one in trainer.optimizers):
            raise MisconfigurationException(
                "`BanditSelectionCallback` lets weights rest through a step, but `LBFGS` moves all of them together,"
                " several times within one. Use another optimizer, or select samples only."
            )
        self.arms = arms = self._deal(pl_module, parameters)
        self._dealt = list(arms.names), sorted(parameters)
        for name in arms.names:
            self._columns.setdefault(name, len(self._columns))
        self._pin = Pin()
        if self.is_idle:
            return
        if len(trainer.optimizers) > 1 and not self._has_head:
            raise MisconfigurationException(
                "`BanditSelectionCallback` must leave something to train in each step, but got"
                f" {len(trainer.optimizers)} optimizers and no `head`. Pass `head=`, patterns of parameters that are"
                " always trained, some of each optimizer, for example `['generator.out.*', 'discriminator.out.*']`."
            )
        smallest = int(arms.sizes.argmin())
        if float(arms.costs[smallest]) > self.budget:
            raise ValueError(
                f"`budget` must leave room for one arm, but the smallest, {arms.names[smallest]!r}, has"
                f" {float(arms.costs[smallest]):.3g} of the weights and the budget is {self.budget}. Raise it, or pass"
                " `arms=` that are smaller."
            )
        if too_large := [name for name, cost in zip(arms.names, arms.costs, strict=True) if cost > self.budget]:
            self._tell(
                f"With `budget={self.budget}` these arms of weights are never trained, for each is larger than that:"
                f" {too_large}. Raise the budget, or pass `arms=` that are smaller, as 'units'."
            )
        self.cuts_backward = not _host.needs_every_gradient(trainer)
        if not self.cuts_backward:
            self._tell(
                "Weights that are not played rest, but their gradients are computed: DDP waits for all of them, and a"
                " compiled module would be compiled anew for every play. To save that, pass"
                " `strategy='ddp_find_unused_parameters_true'`, and do not compile.",
                rank_zero_info,
            )

    def _tell(self, message: str, how: Callable[[str], Any] = rank_zero_warn) -> None:
        if message not in self._told:
            self._told.add(message)
            how(message)

    @property
    def is_idle(self) -> bool:
        """Whether all weights are trained all the time."""
        return self.arms is not None and (len(self.arms.names) == 1 or self.budget >= 1)

    def before_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> bool:
        """Let rest what is not played; every so often play anew first. Return whether it learnt from the last play.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            step: How many steps of optimizers there were, for the history.
        """
        if self.arms is None:
            self._go_on(trainer, pl_module)
        assert self.arms is not None
        if self.is_idle:
            return False
        has_learnt = self._played is not None and self._steps >= self.every
        if has_learnt:
            self._learn(trainer, step)
        if self._played is None or has_learnt:
            self._play(trainer, pl_module)
        assert self._played is not None
        modules = dict(pl_module.named_modules())
        for name in self.arms.resting_norms(self._played):
            if modules[name].training:
                modules[name].training = False
                self._woken.append(partial(setattr, modules[name], "training", True))
        if self.cuts_backward:
            self._freeze()
        return has_learnt

    def _freeze(self) -> None:
        """Let nothing move what rests; what the user has frozen is left alone, for it must not be thawed later."""
        for parameter in self._resting:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Hold what rests through the step, and measure what the step gives."""
        if self.is_idle or self._played is None:
            return
        assert self.arms is not None
        assert self._credits is not None
        credit, self._has_stepped = self._credits, True
        for parameter in self._resting:
            parameter.grad = None  # an optimizer moves what has a gradient, were it zero
        self._freeze()  # the backward pass is over; other callbacks that add to gradients pass over what is frozen
        parameters = _host.parameters_of(pl_module, optimizer)
        self._pin.mask_gradients_(parameters)
        self._unseen = [name for name in self._unseen if name not in parameters or parameters[name].grad is None]
        number = next(number for number, one in enumerate(trainer.optimizers) if one is optimizer)
        measured: list[str] = []
        if credit.is_due(number):
            measured = [name for name in self.arms.owner if name in parameters and parameters[name].grad is not None]
        before = [parameters[name].detach().clone() for name in measured]
        # Copied: optimizers change gradients in place, and fused ones unscale them.
        gradients = [_dense(parameters[name].grad) for name in measured]
        if measured:
            gradients = list(torch._foreach_div(gradients, _host.gradient_scale(trainer, optimizer)))

        def after() -> None:
            if not self.cuts_backward:
                self._thaw()  # before the next backward pass, also within this batch
            self._pin.put_back_(parameters)
            if measured:
                change = torch._foreach_sub([parameters[name].detach() for name in measured], before)
                torch._foreach_mul_(change, gradients)
                torch._foreach_abs_(change)
                credit.add(number, dict(zip(measured, change, strict=True)))

        _host.after_step(optimizer, self, after)

    def after_batch(self) -> None:
        """Wake what rested."""
        self.wake()
        self._steps += self._has_stepped
        self._has_stepped = False

    def wake(self) -> None:
        """Give the module back as it was."""
        self._thaw()
        for give_back in self._woken:
            give_back()
        self._woken = []

    def end(self) -> None:
        """Leave nothing of ours on the module and the optimizers."""
        self.wake()
        _host.forget_steps(self)

    # --- Playing and learning -----------------------------------------------------------------------------------------

    def _play(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.arms is not None
        num_arms = len(self.arms.names)
        if self.policy is None:
            self.policy = self._make_policy(num_arms, self._task)
            self._rested = torch.zeros(num_arms, dtype=torch.int64)
        played, self._chances = self.policy.within(self.arms.costs, self.budget)
        self._played = torch.zeros(num_arms, dtype=torch.bool).index_fill_(0, played, True)
        self._steps = 0
        self._credits = self._new_credits(trainer, pl_module, self.arms)
        whole, _ = self.arms.resting(self._played)
        self._unseen = [name for name in self.arms.owner if name not in whole]
        self._settle(pl_module)

    def _new_credits(self, trainer: L.Trainer, pl_module: L.LightningModule, arms: WeightArms) -> Credits:
        return Credits(arms, len(trainer.optimizers), max(1, self.every // _NUM_MEASURED), pl_module.device)

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

    def _learn(self, trainer: L.Trainer, step: int) -> None:
        """Reward the arms that were played, each by its mean over weights and the steps that it was measured in."""
        assert self.arms is not None
        assert self._played is not None
        assert self.policy is not None
        assert self._credits is not None
        self._warn_of_arms_without_gradient()
        self._rested = torch.where(self._played, 0, self._rested + self._steps)
        rewards, measured = self._credits.rewards(_host.all_sum(trainer))
        measured &= self._played  # none, if a scaler has skipped all steps
        known = measured & rewards.isfinite()
        num_skipped = int((measured & ~known).sum())
        if num_skipped and not self.num_skipped:
            rank_zero_warn("A reward of weights was not finite, and is skipped; so will be others. Look at the loss.")
        self.num_skipped += num_skipped
        probabilities = self.policy.probabilities()
        played = known.nonzero().flatten()
        if len(played):
            self.policy.update_subset(played, self._scale(rewards[played]), self._chances)
        rewards = torch.where(known, rewards, torch.nan)
        self.history.add(step, *(self._row(values) for values in (probabilities, self._played, rewards)))

    def _row(self, values: Tensor) -> Tensor:
        """Return values of the arms as a row of the history; NaN for arms of other tasks."""
        assert self.arms is not None
        columns = torch.tensor([self._columns[name] for name in self.arms.names])
        return torch.full((len(self._columns),), torch.nan).index_copy_(0, columns, values.float())

    def _warn_of_arms_without_gradient(self) -> None:
        assert self.arms is not None
        assert self._played is not None
        if not self._unseen:
            return
        without = self._played.clone()
        for name in self.arms.owner.keys() - set(self._unseen):
            without[self.arms.owner[name]] = False
        names = [name for name, has_none in zip(self.arms.names, without.tolist(), strict=True) if has_none]
        if names and "without gradient" not in self._told:
            self._told.add("without gradient")
            rank_zero_warn(
                f"Arms of weights were played, but had no gradient in any step: {names[:5]}. They may be frozen, not"
                " part of the loss, or of an optimizer that did not step. Name them in `head=`, so that they are no"
                " arms; with activation checkpointing, pass `checkpoint(..., use_reentrant=False)`."
            )

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
        return {
            "names": self.names,
            "history": self.history.state_dict(),
            "num_skipped": self.num_skipped,
            "scale": self._scale.state_dict(),
            "task": self._task,
            "play": self._play_state(),
        }

    def _play_state(self) -> dict[str, Any] | None:
        if self._pending is not None or self._played is None:
            return self._pending
        assert self.policy is not None
        assert self._credits is not None
        names, parameters = self._dealt
        return {
            "names": names,
            "parameters": parameters,
            "policy": self.policy.state_dict(),
            "played": self._played.clone(),
            "chances": self._chances.clone(),
            "rested": self._rested.clone(),
            "steps": self._steps,
            "credits": self._credits.state_dict(),
            "unseen": list(self._unseen),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; what was played, once the module is there."""
        self._columns = {name: column for column, name in enumerate(state_dict["names"])}
        self.history.load_state_dict(state_dict["history"])
        self.num_skipped, self._task = state_dict["num_skipped"], state_dict["task"]
        self._scale.load_state_dict(state_dict["scale"])
        self._forget_play()
        self._pending = state_dict["play"]

    def _take_up(self, play: dict[str, Any], credit: Credits) -> None:
        self._forget_play()
        self.policy, self._credits = self._make_policy(len(play["names"]), self._task), credit
        self.policy.load_state_dict(play["policy"])
        credit.load_state_dict(play["credits"])
        self._played, self._chances = play["played"].clone(), play["chances"].clone()
        self._rested, self._steps, self._unseen = play["rested"].clone(), play["steps"], list(play["unseen"])


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient
