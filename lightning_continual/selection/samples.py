"""Training on some of the samples, as a bandit plays them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from lightning_continual import _batch, _host
from lightning_continual.bandits import Bandit, RunningQuantiles
from lightning_continual.memory import ClassBalancedMemory
from lightning_continual.selection.grouping import Grouping, with_remedy
from lightning_continual.selection.history import History
from lightning_continual.selection.sample_arms import pick
from lightning_continual.selection.sample_rewards import SampleRewards


class SampleSelection:
    """Deals the slots of each batch out to arms of new samples and exemplars, and learns from what they gave.

    Args:
        make_policy: Returns a bandit for a number of arms, and a task.
        budget: Slots a batch, as a share of its new samples; two at least.
        grouping: How samples are dealt out to arms.
        rewards: What is learnt from.
        measure_every: Steps from one measurement of rewards to the next.
        memory: Exemplars, grouped by arm.
        unbiased: Whether samples are weighed by how much more often than at random they are drawn.
    """

    def __init__(
        self,
        make_policy: Callable[[int, int], Bandit],
        budget: float,
        *,
        grouping: Grouping,
        rewards: SampleRewards,
        measure_every: int,
        memory: ClassBalancedMemory,
        unbiased: bool,
    ) -> None:
        self.budget, self.measure_every, self.memory, self.unbiased = budget, measure_every, memory, unbiased
        self.grouping, self.rewards = grouping, rewards
        self.history = History()
        self.policy: Bandit | None = None
        self.num_skipped = 0
        """Rewards that were not finite."""
        self._make_policy = make_policy
        self._scale = RunningQuantiles()
        self._parts: list[dict[str, Any]] = []  # of the memory, one a process, until training starts
        self._process = 0, 1
        self._task = self._first_epoch = self._steps = 0
        self._plays = torch.zeros(0, dtype=torch.int64)  # since the last measurement
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._fresh: tuple[list[_batch.Leaf], Tensor] | None = None  # new samples in training, their arms
        self._rebuild: Callable[[Sequence[_batch.Leaf]], Any] | None = None  # the structure of the batch, on the CPU
        self._trained: Tensor | None = None  # the arms of the samples in training
        self._chances = torch.empty(0)
        self._weights: Tensor | None = None
        self.rewards.forget()

    @property
    def names(self) -> list[str]:
        """A name for each arm, ``"task/class"``."""
        return self.grouping.table.names()

    # --- The fit ------------------------------------------------------------------------------------------------------

    def prepare(self, rank: int, world_size: int) -> None:
        """Take a process's share of the memory."""
        self._process = rank, world_size
        self._forget_batch()
        if self._parts:
            self.memory.load_state_dict(self._parts, rank, world_size)
        else:
            self.memory.distribute(rank, world_size)

    def begin(self) -> None:
        """Go on with the memory as it is."""
        self._parts = []

    def start_task(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Begin anew: what is worth training now is not what was."""
        self._task, self._first_epoch, self._steps = task, _host.epochs_processed(trainer), 0
        self._scale = RunningQuantiles()
        self.end_task()
        self.grouping.start_task(trainer, pl_module, task)

    def end_task(self) -> None:
        """Forget what was worth training."""
        self.policy = None
        self._plays = self._plays[:0]

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *, everything: bool) -> Any:
        """Return the batch that is trained in the place of one of new samples: that one, if ``everything`` is."""
        leaves, rebuild = _batch.flatten(batch)
        num_new = len(leaves[0])
        if (batch_size := _host.train_batch_size(trainer)) not in (None, num_new):
            _batch.require_stacked(batch, batch_size)
        arms = self.grouping.of(pl_module, batch, num_new, self._task)
        num_arms = len(self.grouping.table)
        if self.policy is None:
            self.policy = self._make_policy(num_arms, self._task)
        self.policy.grow(num_arms)
        slots, past = self.memory.slots_by_label(self._task)
        pool = torch.bincount(arms, minlength=num_arms)
        if past:
            pool[list(past)] += torch.tensor([len(places) for places in past.values()])
        num_slots = max(min(2, num_new), round(self.budget * num_new))  # a batch norm fails on one sample
        is_first = self.memory.capacity > 0 and _host.epochs_processed(trainer) == self._first_epoch
        takes_all = num_slots >= int(pool.sum())
        is_whole = everything or num_arms == 1
        self._forget_batch()
        self._rebuild = rebuild
        if is_first:
            # Without a choice the module gets this very batch, and may change it in place.
            self._fresh = [_copy(leaf) for leaf in leaves] if is_whole or takes_all else leaves, arms
        if is_whole:
            return batch
        self._chances = self.policy.probabilities(available=pool > 0)
        if takes_all:
            drawn = pool
        elif self.unbiased:
            self._require_chances(pool)
            drawn = self._draw(num_slots)
        else:
            drawn = self._within(pool, self._draw(num_slots))
        seed = int(torch.randint(2**62, (), generator=self.memory.generator))
        positions, places, trained = pick(arms.tolist(), drawn.tolist(), past, random.Random(seed).sample)
        self._trained = torch.tensor(trained, dtype=torch.int64)
        if self.unbiased:
            share = pool.double() / pool.sum()
            self._weights = None if takes_all else (share / self._chances)[self._trained]
        self._plays = _padded(self._plays, num_arms) + torch.bincount(self._trained, minlength=num_arms)
        if takes_all and not places:
            return batch
        chosen = _batch.take(leaves, torch.tensor(positions, dtype=torch.int64))
        old = self.memory.read(slots[torch.tensor(places, dtype=torch.int64)])
        return rebuild(_batch.join(chosen, old) if old else chosen)

    def weighed_loss(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
        """Return the mean of the batch's losses, each times its weight; ``None`` where nothing is to be weighed."""
        if self._weights is None:
            return None
        self._require_same_size(batch)
        losses = self.rewards.losses_of(trainer, pl_module, batch)
        return (self._weights.to(losses) * losses).mean()

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Measure what rewards are computed from, every so often."""
        is_due = self._steps % self.measure_every == 0 and _host.steps_now(trainer)
        if self._trained is None or not is_due:
            return
        self._require_same_size(batch)
        num_arms = len(self.grouping.table)
        self.rewards.before_step(trainer, pl_module, batch, self._trained, num_arms, lambda: self._draw_held(trainer))

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, step: int) -> bool:
        """Remember the batch's new samples; learn, if rewards are measured, and return whether they are.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            batch: What was trained.
            step: How many steps of optimizers there were, for the history.
        """
        if self._fresh is not None:
            (leaves, arms), self._fresh = self._fresh, None
            if repeated := _host.repeated_samples(trainer):
                num_new = max(0, len(leaves[0]) - repeated)
                leaves, arms = [leaf[:num_new] for leaf in leaves], arms[:num_new]
            with with_remedy("Or pass `memory=0` to BanditSelectionCallback: then nothing is remembered."):
                self.memory.add(leaves, task=self._task, labels=arms)
        is_measured = self.rewards.is_measuring
        if is_measured:
            self._learn(trainer, self.rewards.after_step(trainer, pl_module, batch), step)
        self._steps += 1 if _host.steps_now(trainer) else 0
        self._forget_batch()
        return is_measured

    # --- Drawing ------------------------------------------------------------------------------------------------------

    def _draw(self, num_slots: int) -> Tensor:
        """Return how many slots each arm gets ``(K,)``."""
        # Not by the bandit's generator: other processes may have other numbers of slots, and all must decide alike.
        arms = torch.multinomial(self._chances, num_slots, True, generator=self.memory.generator)
        return torch.bincount(arms, minlength=len(self._chances))

    def _within(self, pool: Tensor, drawn: Tensor) -> Tensor:
        """Deal slots for which an arm has no samples left out to the other arms, likewise by their probabilities."""
        assert self.policy is not None
        while (excess := int((drawn - pool).clamp(min=0).sum())) > 0:
            drawn = torch.minimum(drawn, pool)
            chances = self.policy.probabilities(available=drawn < pool)
            more = torch.multinomial(chances, excess, True, generator=self.memory.generator)
            drawn = drawn + torch.bincount(more, minlength=len(pool))
        return drawn

    def _require_chances(self, pool: Tensor) -> None:
        never = ((pool > 0) & (self._chances == 0)).nonzero().flatten().tolist()
        if never:
            raise ValueError(
                "`unbiased=True` divides by the probability of each arm, but"
                f" `{type(self.policy).__name__}` never plays {[self.names[arm] for arm in never[:3]]}. Pass a policy"
                " that plays every arm now and then, for example 'exp3'."
            )

    # --- Rewards ------------------------------------------------------------------------------------------------------

    def _draw_held(self, trainer: L.Trainer) -> Any:
        """Return exemplars of earlier tasks, as many as a batch has samples, on the device; None if there are none."""
        assert self._trained is not None
        assert self._rebuild is not None
        past = self.memory.draw(len(self._trained), before=self._task)
        return trainer.strategy.batch_to_device(self._rebuild(past), dataloader_idx=0) if past else None

    def _require_same_size(self, batch: Any) -> None:
        assert self._trained is not None
        if (size := _batch.size(batch)) != len(self._trained):
            raise ValueError(
                f"The batch in training must have the {len(self._trained)} samples that were selected, but has {size}."
                " Put callbacks that change batches before this one, and let `on_after_batch_transfer` keep the number"
                " of samples."
            )

    def _learn(self, trainer: L.Trainer, rewards: Tensor, step: int) -> None:
        """Update the bandit with the mean reward of each arm ``(K,)``, NaN where it has none, over all processes."""
        assert self.policy is not None
        assert self._trained is not None
        num_arms = len(rewards)
        counts = torch.bincount(self._trained, minlength=num_arms)
        wrong = (counts > 0) & ~rewards.isfinite()
        if self.rewards.lacks_exemplars:
            wrong = torch.zeros_like(wrong)
        add = _host.all_sum(trainer)
        num_slots = int(add(counts.sum())) / trainer.world_size
        num_wrong = int(add(wrong.sum()))
        if num_wrong and not self.num_skipped:
            rank_zero_warn("A reward of samples was not finite, and is skipped; so will be others. Look at the loss.")
        self.num_skipped += num_wrong
        counts = torch.where(rewards.isfinite(), counts, 0)
        sums = add(torch.where(counts > 0, counts * rewards, 0)).cpu()
        chances = add(_padded(self._chances, num_arms)).cpu() / trainer.world_size
        counts, plays = add(counts).cpu(), add(_padded(self._plays, num_arms)).cpu()
        known = counts > 0
        means = torch.where(known, sums / counts, torch.nan)
        self.history.add(step, chances, plays, means)
        self._plays = torch.zeros(num_arms, dtype=torch.int64)
        if bool(known.any()):
            scaled = torch.zeros(num_arms, dtype=torch.float64)
            scaled[known] = self._scale(means[known])
            played = torch.arange(num_arms).repeat_interleave(counts)
            # What was played though it was not likely, for want of others, counts as one slot of a batch.
            likely = torch.where(known, chances.clamp(min=1 / num_slots), chances)
            self.policy.update(played, scaled[played], likely)

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is known and remembered. A collective under several processes."""
        return {
            "task": self._task,
            "first_epoch": self._first_epoch,
            "steps": self._steps,
            "plays": self._plays.clone(),
            "num_skipped": self.num_skipped,
            "grouping": self.grouping.state_dict(),
            "history": self.history.state_dict(),
            "scale": self._scale.state_dict(),
            "policy": None if self.policy is None else self.policy.state_dict(),
            "memory": self._parts or _host.gather(self.memory.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._task, self._first_epoch = state_dict["task"], state_dict["first_epoch"]
        self._steps, self._plays = state_dict["steps"], state_dict["plays"].clone()
        self.num_skipped = state_dict["num_skipped"]
        self.grouping.load_state_dict(state_dict["grouping"])
        self.history.load_state_dict(state_dict["history"])
        self._scale.load_state_dict(state_dict["scale"])
        self.policy = None
        if state_dict["policy"] is not None:
            self.policy = self._make_policy(int(state_dict["policy"]["num_arms"]), self._task)
            self.policy.load_state_dict(state_dict["policy"])
        self._parts = state_dict["memory"]
        self.memory.load_state_dict(self._parts, *self._process)


def _copy(leaf: _batch.Leaf) -> _batch.Leaf:
    return leaf.clone() if isinstance(leaf, Tensor) else list(leaf)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)))
