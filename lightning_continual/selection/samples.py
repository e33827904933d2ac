"""Training on some of the samples, as a bandit plays them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from lightning_continual import _batch, _host
from lightning_continual._datasets import labels_in_batch
from lightning_continual.bandits import Bandit, RunningQuantiles
from lightning_continual.data import seed_of
from lightning_continual.memory import ClassBalancedMemory
from lightning_continual.parameters import evaluating, trainable
from lightning_continual.selection.history import History
from lightning_continual.selection.sample_arms import ArmTable, cluster_centres, nearest, pick

Reward: TypeAlias = Literal["loss_progress", "grad_norm", "memory_loss"]
SampleArmsOf: TypeAlias = "Literal['class', 'kmeans'] | Callable[[Any], Tensor]"

_ANY_TASK = -1  # the group of arms that a user's function numbers


class SampleSelection:
    """Deals the slots of each batch out to arms of new samples and exemplars, and learns from what they gave.

    Args:
        make_policy: Returns a bandit for a number of arms.
        budget: Slots a batch, as a share of its new samples.
        arms: How samples are dealt out to arms.
        reward: What is learnt from.
        measure_every: Steps from one measurement of rewards to the next.
        memory: Exemplars, grouped by arm.
        losses: Returns the losses ``(B,)`` of module and batch.
        label: Returns the labels of a batch.
        features: Returns the features ``(B, D)`` of module and batch.
        num_clusters: Of k-means, for each task.
        unbiased: Whether samples are weighed by how much more often than at random they are drawn.
    """

    def __init__(
        self,
        make_policy: Callable[[int], Bandit],
        budget: float,
        *,
        arms: SampleArmsOf,
        reward: Reward,
        measure_every: int,
        memory: ClassBalancedMemory,
        losses: Callable[[Any, Any], Tensor] | None,
        label: Callable[[Any], Tensor] | None,
        features: Callable[[Any, Any], Tensor] | None,
        num_clusters: int,
        unbiased: bool,
    ) -> None:
        if arms not in ("class", "kmeans") and not callable(arms):
            raise ValueError(
                f"`arms` of samples must be 'class', 'kmeans' or a function of the batch, but got {arms!r}. Pass"
                " `select='weights'` for arms of weights."
            )
        self.budget, self.arms, self.reward, self.measure_every = budget, arms, reward, measure_every
        self.memory, self.losses, self.label, self.features = memory, losses, label, features
        self.num_clusters, self.unbiased = num_clusters, unbiased
        self.table = ArmTable()
        self.history = History()
        self.policy: Bandit | None = None
        self.num_skipped = 0
        """Rewards that were not finite."""
        self._make_policy = make_policy
        self._scale = RunningQuantiles()
        self._centres: Tensor | None = None
        self._parts: list[dict[str, Any]] = []  # of the memory, one a process, until training starts
        self._process = 0, 1
        self._task = self._first_epoch = self._steps = 0
        self._plays = torch.zeros(0, dtype=torch.int64)  # since the last measurement
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._fresh: tuple[list[_batch.Leaf], Tensor] | None = None  # new samples in training, their arms
        self._trained: Tensor | None = None  # the arms of the samples in training
        self._chances = torch.empty(0)
        self._weights: Tensor | None = None
        self._before: Tensor | None = None  # what is measured before the step, by arm
        self._held: Any = None  # exemplars whose loss is measured

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
        self.policy, self._scale = None, RunningQuantiles()
        if self.arms == "kmeans":
            self._centres = self._cluster(trainer, pl_module)

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
        arms = self._arms_of(pl_module, batch, num_new)
        num_arms = len(self.table)
        if self.policy is None:
            self.policy = self._make_policy(num_arms)
        self.policy.grow(num_arms)
        slots, past = self.memory.slots_by_label(self._task)
        pool = torch.bincount(arms, minlength=num_arms)
        if past:
            pool[list(past)] += torch.tensor([len(places) for places in past.values()])
        num_slots = max(1, round(self.budget * num_new))
        is_first = self.memory.capacity > 0 and _host.epochs_processed(trainer) == self._first_epoch
        takes_all = num_slots >= int(pool.sum())
        self._forget_batch()
        if is_first:
            # Without a choice the module gets this very batch, and may change it in place.
            self._fresh = leaves if not (everything or takes_all) else [_copy(leaf) for leaf in leaves], arms
        if everything or num_arms == 1:
            return batch
        available = pool > 0
        self._chances = self.policy.probabilities(available=available)
        # Also where all is taken: the bandits of all processes draw alike.
        drawn = torch.bincount(self.policy.draw(num_slots, available=available), minlength=num_arms)
        if takes_all:
            drawn = pool
        elif not self.unbiased:
            drawn = self._within(pool, drawn)
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

    def weighed_loss(self, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
        """Return the mean of the batch's losses, each times its weight; ``None`` where nothing is to be weighed."""
        if self._weights is None:
            return None
        losses = self._losses_of(pl_module, batch)
        return (self._weights.to(losses) * losses).mean()

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Measure what rewards are computed from, every so often."""
        is_due = self._steps % self.measure_every == 0 and _host.steps_now(trainer)
        if self._trained is None or not is_due:
            return
        self._require_same_size(batch)
        if self.reward == "memory_loss":
            self._held = self._draw_held(trainer, batch)
        with self._looking(pl_module):
            self._before = self._measure(trainer, pl_module, batch)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> bool:
        """Remember the batch's new samples; learn, if rewards are measured, and return whether they are."""
        if self._fresh is not None:
            (leaves, arms), self._fresh = self._fresh, None
            if repeated := _host.repeated_samples(trainer):
                num_new = max(0, len(leaves[0]) - repeated)
                leaves, arms = [leaf[:num_new] for leaf in leaves], arms[:num_new]
            self.memory.add(leaves, task=self._task, labels=arms)
        rewards = self._before
        if rewards is not None:
            if self.reward != "grad_norm":
                with self._looking(pl_module):
                    rewards = rewards - self._measure(trainer, pl_module, batch)
            self._learn(trainer, rewards)
        self._steps += 1 if _host.steps_now(trainer) else 0
        self._forget_batch()
        return rewards is not None

    # --- Arms ---------------------------------------------------------------------------------------------------------

    def _arms_of(self, pl_module: L.LightningModule, batch: Any, num_samples: int) -> Tensor:
        """Return the arm of each sample of a new batch ``(B,)``; all processes number new arms alike."""
        group = self._task
        if self.arms == "class":
            keys = labels_in_batch(batch, num_samples, self.label, "BanditSelectionCallback(arms='class')")
        elif self.arms == "kmeans":
            assert self._centres is not None
            keys = nearest(self._features_of(pl_module, batch, num_samples), self._centres)
        else:
            assert callable(self.arms)
            group, found = _ANY_TASK, self.arms(batch)
            if not isinstance(found, Tensor) or found.shape != (num_samples,) or found.is_floating_point():
                what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"`arms` must return one whole number a sample, ({num_samples},), but got {what}. Return a tensor"
                    " of the arm of each sample of the batch."
                )
            keys = found.detach().cpu().long()
        if self._process[1] > 1:
            for unknown in _host.gather_everywhere(self.table.unknown(group, keys)):
                self.table.add(unknown)
        return self.table.numbers(group, keys)

    def _features_of(self, pl_module: L.LightningModule, batch: Any, num_samples: int) -> Tensor:
        if self.features is None:
            leaves, _ = _batch.flatten(batch)
            found: Any = next((leaf.flatten(1) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), None)
        else:
            with _host.observing(pl_module):
                found = self.features(pl_module, batch)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != num_samples:
            shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"`features` must return one row a sample, ({num_samples}, D), but got {shape}. Pass a function of"
                " module and batch that flattens or averages what is computed."
            )
        return found.detach().float().cpu()

    def _cluster(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        loader = _host.train_data(trainer, num_samples=min(10_000, _host.num_train_samples(trainer) or 10_000))
        features = [torch.empty(0, 0)]
        with _host.progress(trainer, _host.num_batches(loader), f"Arms of task {self._task}") as tick:
            for batch in loader:
                found = self._features_of(pl_module, trainer.precision_plugin.convert_input(batch), _batch.size(batch))
                features.append(found)
                tick()
        own = torch.cat(features[1:])
        return cluster_centres(torch.cat(_host.gather_everywhere(own)), self.num_clusters, seed_of(self._task) % 2**32)

    def _within(self, pool: Tensor, drawn: Tensor) -> Tensor:
        """Deal slots for which an arm has no samples left out to the other arms, likewise by their probabilities."""
        assert self.policy is not None
        while (excess := int((drawn - pool).clamp(min=0).sum())) > 0:
            drawn = torch.minimum(drawn, pool)
            chances = self.policy.probabilities(available=drawn < pool)
            # Not the bandit's generator: other processes may have no slots left over.
            more = torch.multinomial(chances, excess, True, generator=self.memory.generator)
            drawn = drawn + torch.bincount(more, minlength=len(pool))
        return drawn

    # --- Rewards ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _looking(self, pl_module: L.LightningModule) -> Iterator[None]:
        with _host.without_trace(pl_module), evaluating(pl_module), torch.set_grad_enabled(self.reward == "grad_norm"):
            yield

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor:
        """Return what is measured for each arm ``(K,)``; NaN for arms that are not trained now."""
        assert self._trained is not None
        values = torch.full((len(self.table),), torch.nan, dtype=torch.float64)
        arms = torch.unique(self._trained)
        if self.reward == "memory_loss":
            if self._held is not None:
                values[arms] = float(self._loss_of(trainer, pl_module, self._held))
        elif self.reward != "grad_norm" and self.losses is not None:
            losses = self._losses_of(pl_module, batch).double().cpu()
            counts = torch.bincount(self._trained, minlength=len(values))
            sums = torch.zeros_like(values).index_add_(0, self._trained, losses)
            values[arms] = (sums / counts)[arms]
        else:
            leaves, rebuild = _batch.flatten(batch)
            for arm in arms.tolist():
                some = (self._trained == arm).nonzero().flatten()
                loss = self._loss_of(trainer, pl_module, rebuild(_batch.take(leaves, some)))
                if self.reward == "grad_norm":
                    gradients = torch.autograd.grad(
                        loss, list(trainable(pl_module).values()), allow_unused=True, materialize_grads=True
                    )
                    loss = torch.stack(torch._foreach_norm(gradients)).norm()
                values[arm] = float(loss)
        return values

    def _loss_of(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor:
        if self.losses is not None:
            return self._losses_of(pl_module, batch).mean()
        return _host.training_loss(trainer, batch)

    def _losses_of(self, pl_module: L.LightningModule, batch: Any) -> Tensor:
        assert self.losses is not None
        losses = self.losses(pl_module, batch)
        size = _batch.size(batch)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"`losses` must return one loss a sample, ({size},), but got {shape}. Compute the loss with"
                " `reduction='none'`."
            )
        return losses

    def _draw_held(self, trainer: L.Trainer, batch: Any) -> Any:
        """Return exemplars of earlier tasks, as many as a batch has samples, on the device; None if there are none."""
        leaves, rebuild = _batch.flatten(batch)
        past = self.memory.draw(len(leaves[0]), before=self._task)
        return trainer.strategy.batch_to_device(rebuild(past), dataloader_idx=0) if past else None

    def _require_same_size(self, batch: Any) -> None:
        assert self._trained is not None
        if (size := _batch.size(batch)) != len(self._trained):
            raise ValueError(
                f"The batch in training must have the {len(self._trained)} samples that were selected, but has {size}."
                " Put callbacks that change batches before this one, and let `on_after_batch_transfer` keep the number"
                " of samples."
            )

    def _learn(self, trainer: L.Trainer, rewards: Tensor) -> None:
        """Update the bandit with the mean reward of each arm ``(K,)``, NaN where it has none, over all processes."""
        assert self.policy is not None
        assert self._trained is not None
        num_arms = len(rewards)
        counts = torch.bincount(self._trained, minlength=num_arms)
        wrong = (counts > 0) & ~rewards.isfinite()
        if self.reward == "memory_loss" and self._held is None:
            wrong = torch.zeros_like(wrong)  # nothing is remembered yet
        add = _host.all_sum(trainer)
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
        self.history.add(trainer.global_step, chances, plays, means)
        self._plays = torch.zeros(num_arms, dtype=torch.int64)
        if bool(known.any()):
            scaled = torch.zeros(num_arms, dtype=torch.float64)
            scaled[known] = self._scale(means[known])
            played = torch.arange(num_arms).repeat_interleave(counts)
            # What was played though it was not likely, for want of others, counts as one slot of the batch.
            likely = torch.where(known, chances.clamp(min=1 / len(self._trained)), chances)
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
            "table": self.table.state_dict(),
            "history": self.history.state_dict(),
            "scale": self._scale.state_dict(),
            "policy": None if self.policy is None else self.policy.state_dict(),
            "centres": self._centres,
            "memory": self._parts or _host.gather(self.memory.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._task, self._first_epoch = state_dict["task"], state_dict["first_epoch"]
        self._steps, self._plays = state_dict["steps"], state_dict["plays"].clone()
        self.num_skipped, self._centres = state_dict["num_skipped"], state_dict["centres"]
        self.table.load_state_dict(state_dict["table"])
        self.history.load_state_dict(state_dict["history"])
        self._scale.load_state_dict(state_dict["scale"])
        self.policy = None
        if state_dict["policy"] is not None:
            self.policy = self._make_policy(int(state_dict["policy"]["num_arms"]))
            self.policy.load_state_dict(state_dict["policy"])
        self._parts = state_dict["memory"]
        self.memory.load_state_dict(self._parts, *self._process)


def _copy(leaf: _batch.Leaf) -> _batch.Leaf:
    return leaf.clone() if isinstance(leaf, Tensor) else list(leaf)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)))
