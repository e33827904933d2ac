"""Bandit selection: what is worth training, of the data and of the weights, is learnt while training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_continual import _host
from lightning_continual.bandits import Bandit, make_bandit
from lightning_continual.data import seed_of
from lightning_continual.memory import ClassBalancedMemory
from lightning_continual.report import bandit_figure
from lightning_continual.selection import Grouping, Reward, SampleRewards, SampleSelection, WeightSelection, dealer
from lightning_continual.stream import ContinualCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LOGGED = 64
"""Arms of which each is logged; of more arms, only the summary."""

_OF_SAMPLES = "reward", "measure_every", "memory", "unbiased", "losses", "label", "features", "num_clusters"
_OF_WEIGHTS = "every", "head"
_NOT_UNBIASED = "ucb", "thompson"


class BanditSelectionCallback(ContinualCallback):
    r"""Trains on the samples, and trains the weights, that a multi-armed bandit finds worth it.

    *Samples.* Each batch of B new samples gives ``budget`` times B slots, two at least. They are drawn over arms, each
    a group of the new samples of the batch and of the exemplars that are remembered of earlier tasks; within an arm
    samples are drawn at random, none twice. New samples that are not selected go through no forward pass. Every
    ``measure_every`` steps each arm a in the batch is rewarded, with L the loss of its samples in the batch, in
    evaluation mode, :math:`\theta'` the weights after the step, and M exemplars of earlier tasks:

    .. math::
        r_a = L_a(\theta) - L_a(\theta') \;\text{(loss\_progress)}, \quad
        \lVert \nabla_\theta L_a(\theta) \rVert \;\text{(grad\_norm)}, \quad
        L_M(\theta) - L_M(\theta') \;\text{(memory\_loss, the same for all arms in the batch)}

    *Weights.* Every ``every`` steps arms of weights are played that together have at most a share ``budget`` of the
    arms' weights; the others rest: the backward pass ends at the lowest layer that is played, norms of layers that rest
    run in evaluation mode, and the optimizer passes them over. What it remembers of them (momentum, moments) rests too,
    and goes on from there; how long an arm now played had rested at most is logged. The head is always trained, and
    what is defined before the first layer; what is frozen when a task begins, or is in no optimizer, is of no arm. An
    arm is rewarded with the loss reduction that is credited to it, to first order, a mean over its weights:

    .. math:: r_a = \frac1{\lvert a \rvert} \sum_{i \in a} \lvert g_i \, \Delta\theta_i \rvert

    measured in about ten steps of each optimizer, with g the gradient before it is clipped. Rewards are rescaled to [0,
    1] by their running 20 and 80 % quantiles. Each task begins without preferences. That samples and weights are
    selected by bandits is the paper's; which bandit, arms and rewards is our reading.

    All processes decide alike. With a plain DDP, or a compiled module, what rests does not move either, but its
    gradient is computed; use ``strategy="ddp_find_unused_parameters_true"`` to save that. A compiled network with batch
    norms is compiled anew for each play that is new, as their modes are.

    Beside `RehearsalCallback` (put it before this one, and pass ``memory=0``) it selects from the joined batch. Past
    samples are then in the arms of the present task; for arms of their own, use this callback's memory instead, or a
    function for ``arms``. Of two of these callbacks, put samples before weights: gradient norms are of all weights
    then. With one arm there is nothing to choose, and nothing is changed.

    Args:
        select: ``"samples"``, ``"weights"`` or ``"both"``. With ``"both"``, ``arms`` and ``budget`` may be pairs, the
            first for samples. Arguments of the other selection must be left out.
        policy: ``"exp3"``, ``"exp3s"``, ``"exp3m"``, ``"ucb"``, ``"thompson"``, ``"epsilon-greedy"``, or a function of
            the number of arms that returns a `Bandit`. A policy by name has other random numbers in every task.
        reward: Of samples, see above.
        arms: Of samples: ``"class"`` (task × class, the default), ``"kmeans"`` (clusters of features, for each task),
            or a function from a batch on the CPU to the arm of each sample, whole numbers ``(B,)``. Of weights:
            ``"layers"`` (the default, each with its norm), ``"units"`` (the rest of a layer that is played in part has
            its values held, while its moments fade), or patterns of parameter names by the arm's name, as
            ``{"low": "encoder.0.*"}``; what they do not name is always trained.
        budget: Share in (0, 1] of the batch that is trained, and of the weights. 1 trains all weights; of samples as
            many as there are new ones.
        every: Steps for which weights are played.
        measure_every: Steps from one measurement of the samples' rewards to the next.
        memory: Exemplars of earlier tasks: how many (the arms share them equally), or an empty `ClassBalancedMemory`.
        unbiased: Whether each sample is weighed by :math:`(n_a / n) / p_a`, with :math:`n_a` of the :math:`n` samples
            to choose from in its arm and :math:`p_a` the arm's probability, so that the expected gradient is that of
            all samples. An arm with fewer samples than slots is then drawn from anew. Needs ``losses``, and a policy
            that plays every arm now and then, as ``"exp3"``; ``training_step`` is not called.
        losses: Returns one loss a sample ``(B,)`` of module and batch, for ``unbiased``, manual optimization, and
            rewards in one forward pass.
        label: For arms by class: returns the labels ``(B,)`` of a batch; by default as in `RehearsalCallback`.
        features: For ``"kmeans"``: returns ``(B, D)`` of module and batch, on the CPU; by default the samples.
        num_clusters: Of k-means, for each task.
        head: Patterns of the names of parameters that are always trained; by default the last layer that is defined.
            Needed with several optimizers: some of each one's.
        first_task: The task from which on it selects; 1 trains the first task on everything.
        seed: Of the bandits, and of the memory.

    Raises:
        ValueError: If an argument lies outside its range or belongs to the other selection, no arm of weights fits the
            budget, or a function returns something of the wrong shape.
        MisconfigurationException: For weights, with LBFGS, or with several optimizers and no ``head``; for samples,
            where the module takes its batches past every hook, or has manual optimization without ``losses``, or data
            for k-means are iterable.

    Example:
        >>> BanditSelectionCallback("weights", budget=0.25).every
        100

    References:
        - Klabjan & Zhu. *Neural Network Retraining for Model Serving.* arXiv 2004.14203, 2020.
        - Graves et al. *Automated curriculum learning for neural networks.* ICML 2017 (loss progress, quantiles).
        - Salehi, Celis & Thiran. *Stochastic optimization with bandit sampling.* arXiv 1708.02544, 2017 (norms).
    """

    def __init__(
        self,
        select: Literal["samples", "weights", "both"] = "samples",
        *,
        policy: str | Callable[[int], Bandit] = "exp3",
        reward: Reward = "loss_progress",
        arms: Any = None,
        budget: float | Sequence[float] = 0.3,
        every: int = 100,
        measure_every: int = 100,
        memory: int | ClassBalancedMemory = 2000,
        unbiased: bool = False,
        losses: Callable[[Any, Any], Tensor] | None = None,
        label: Callable[[Any], Tensor] | None = None,
        features: Callable[[Any, Any], Tensor] | None = None,
        num_clusters: int = 10,
        head: str | Sequence[str] | None = None,
        first_task: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if select not in ("samples", "weights", "both"):
            raise ValueError(f"`select` must be 'samples', 'weights' or 'both', but got {select!r}.")
        if reward not in get_args(Reward):
            raise ValueError(f"`reward` must be one of {get_args(Reward)}, but got {reward!r}.")
        for name, value, least in (
            ("every", every, 1),
            ("measure_every", measure_every, 1),
            ("num_clusters", num_clusters, 1),
            ("first_task", first_task, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, but got {value}.")
        self._require_own_arguments(select, locals())
        sample_arms, weight_arms = (arms, None) if _is_of_samples(arms) else (None, arms)
        if isinstance(arms, list | tuple):
            sample_arms, weight_arms = _both("arms", arms, select)
        elif select != "both":
            sample_arms = weight_arms = arms
        budgets: Any = _both("budget", budget, select) if isinstance(budget, list | tuple) else (budget, budget)
        for share in budgets:
            if not 0 < share <= 1:
                raise ValueError(
                    f"`budget` must lie in (0, 1], but got {share}. Pass the share to train, for example 0.3."
                )
        self.select = select
        self.budget = budget
        self.every = every
        self.first_task = first_task
        make_bandit(policy, 1, seed=seed)  # an unknown policy is told now
        self.samples: SampleSelection | None = None
        """What selects samples."""
        self.weights: WeightSelection | None = None
        """What selects weights."""
        if select in ("samples", "both"):
            if unbiased:
                _require_unbiased(losses, policy)
            self.samples = SampleSelection(
                partial(_bandit_of_task, policy, seed, "samples"),
                budgets[0],
                grouping=Grouping("class" if sample_arms is None else sample_arms, label, features, num_clusters),
                rewards=SampleRewards(reward, losses),
                measure_every=measure_every,
                memory=_memory(memory, seed, reward),
                unbiased=unbiased,
            )
        if select in ("weights", "both"):
            self.weights = WeightSelection(
                dealer(weight_arms, head),
                partial(_bandit_of_task, policy, seed, "weights"),
                budgets[1],
                every,
                has_head=head is not None,
            )
        self._num_steps = 0  # of optimizers, over all fits
        self._last_step = 0  # of the Trainer's, already counted
        self._is_on = False

    @property
    def state_key(self) -> str:
        """Tells one of each ``select`` apart in a Trainer's callbacks, so that policies can differ."""
        return f"{type(self).__qualname__}{{'select': {self.select!r}}}"

    @classmethod
    def _require_own_arguments(cls, select: str, arguments: dict[str, Any]) -> None:
        """Raise if an argument that differs from its default belongs to what is not selected."""
        defaults = inspect.signature(cls.__init__).parameters
        for kind, names in (("samples", _OF_SAMPLES), ("weights", _OF_WEIGHTS)):
            given = [name for name in names if arguments[name] != defaults[name].default]
            if given and select not in (kind, "both"):
                what = " and ".join(f"`{name}`" for name in given)
                raise ValueError(
                    f"{what} {'is' if len(given) == 1 else 'are'} for {kind}, but `select={select!r}`. Leave"
                    f" {'it' if len(given) == 1 else 'them'} out, or pass `select='both'`."
                )

    # --- During training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the methods need, and take this process's share of the memory."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.samples is not None:
            self.samples.prepare(trainer.global_rank, trainer.world_size)
            _host.require_batch_hooks(pl_module, type(self).__name__)
            if self.samples.rewards.losses is None and not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    "`BanditSelectionCallback` takes losses from `training_step`, but with manual optimization that"
                    " makes a step. Pass `losses=`, a function of module and batch that returns one loss a sample."
                )
            if self.samples.unbiased and not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    "`BanditSelectionCallback(unbiased=True)` gives the loss in the place of `training_step`, but with"
                    " manual optimization that makes a step. Use automatic optimization, or leave `unbiased` out."
                )
        if self.weights is not None:
            _host.require_visible_gradients(trainer, type(self).__name__)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, and put the selection of samples in front of the batch's way to the device."""
        self._last_step = trainer.global_step
        if self.weights is not None:
            self.weights.begin()
        if self.samples is not None:
            self.samples.begin()
            owner = _host.batch_hook_owner(trainer)
            _host.wrap_method(owner, "on_before_batch_transfer", self, partial(self._select, trainer, pl_module))
            if self.samples.unbiased:
                _host.wrap_method(
                    pl_module, "training_step", self, partial(self._weigh, self.samples, trainer, pl_module)
                )
        super().on_train_start(trainer, pl_module)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Begin a task without preferences."""
        self._is_on = task >= self.first_task
        for selection in (self.samples, self.weights):
            if selection is not None:
                selection.start_task(trainer, pl_module, task)

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """End the task; what is remembered stays."""
        for selection in (self.samples, self.weights):
            if selection is not None:
                selection.end_task()

    def _select(
        self, trainer: L.Trainer, pl_module: L.LightningModule, inner: Callable[..., Any], batch: Any, index: int
    ) -> Any:
        batch = inner(batch, index)
        assert self.samples is not None
        return self.samples.select(trainer, pl_module, batch, everything=not self._is_on) if trainer.training else batch

    @staticmethod
    def _weigh(
        samples: SampleSelection,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        inner: Callable[..., Any],
        batch: Any,
        *args: Any,
    ) -> Any:
        loss = samples.weighed_loss(trainer, pl_module, batch)
        return inner(batch, *args) if loss is None else loss

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let rest what is not played, and measure where a reward is due."""
        if self.samples is not None and self._is_on:
            self.samples.before_step(trainer, pl_module, batch)
        if self.weights is not None and self._is_on and self.weights.before_batch(trainer, pl_module, self._num_steps):
            self._log(trainer, "weights", self.weights)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hold what rests."""
        if self.weights is not None and self._is_on:
            self.weights.before_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the module back as it was; remember new samples, and learn where a reward is due."""
        self._num_steps += trainer.global_step - self._last_step
        self._last_step = trainer.global_step
        if self.weights is not None and self._is_on:
            self.weights.after_batch()
        if self.samples is not None and self.samples.after_step(trainer, pl_module, batch, self._num_steps):
            self._log(trainer, "samples", self.samples)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module back as it was, if another callback broke off the epoch."""
        if self.weights is not None:
            self.weights.wake()

    def _leave(self) -> None:
        if self.weights is not None:
            self.weights.end()
        super()._leave()

    # --- Diagnostics --------------------------------------------------------------------------------------------------

    def arm_names(self, select: Literal["samples", "weights"] | None = None) -> list[str]:
        """Return a name for each arm: of samples ``"task/class"``, of weights the layer's; of all tasks so far.

        Args:
            select: Which arms, where both are selected.
        """
        return self._selection(select).names

    def history(self, select: Literal["samples", "weights"] | None = None) -> dict[str, Tensor]:
        """Return ``"steps"`` ``(rows,)``, ``"probabilities"``, ``"plays"`` and ``"rewards"`` ``(rows, K)`` over time.

        A row is a measurement; of a long history every second, fourth, ... is kept. Steps are those of optimizers, over
        all fits. Rewards are as measured, before they are rescaled; NaN is what was not measured, and arms that were
        not there. Of weights, ``"plays"`` tells which arms were played.

        Args:
            select: Which arms, where both are selected.
        """
        selection = self._selection(select)
        history, num_arms = selection.history, len(selection.names)
        tables = {name: history.table(name, num_arms) for name in ("probabilities", "plays", "rewards")}
        return {"steps": torch.tensor(history.steps, dtype=torch.int64), **tables}

    def plot(
        self,
        select: Literal["samples", "weights"] | None = None,
        *,
        what: Literal["probabilities", "plays", "rewards"] = "probabilities",
    ) -> Figure:
        """Draw arms × time as a heat map.

        Args:
            select: Which arms, where both are selected.
            what: What to draw of each arm.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing has been measured yet.
        """
        history = self.history(select)
        names = self.arm_names(select)
        return bandit_figure(history[what], history["steps"], names=names or None, label=what)

    def _selection(self, select: str | None) -> SampleSelection | WeightSelection:
        found = {"samples": self.samples, "weights": self.weights}
        known = [name for name, one in found.items() if one is not None]
        selection = found.get(known[0] if select is None and len(known) == 1 else str(select))
        if selection is None:
            raise ValueError(f"`select` must be one of {known}, which this callback selects, but got {select!r}.")
        return selection

    @staticmethod
    def _log(trainer: L.Trainer, kind: str, selection: SampleSelection | WeightSelection) -> None:
        """Log the last measurement to every logger, but for what was not measured."""
        if not trainer.loggers:
            return
        latest, names = selection.history.latest, selection.names
        metrics: dict[str, float] = {}
        for what, one in (("probabilities", "probability"), ("plays", "plays"), ("rewards", "reward")):
            if len(names) <= _MOST_LOGGED:
                row = zip(names, latest[what].tolist(), strict=False)
                found = {f"bandit/{kind}/{one}/{name}": value for name, value in row}
                metrics.update({name: value for name, value in found.items() if value == value})
        chances = latest["probabilities"]
        metrics[f"bandit/{kind}/entropy"] = float(torch.special.entr(chances[chances > 0]).sum())
        if isinstance(selection, WeightSelection):
            metrics.update({f"bandit/weights/{name}": value for name, value in selection.diagnostics().items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, played and remembered. A collective under several processes."""
        state: dict[str, Any] = {"is_on": self._is_on, "num_steps": self._num_steps}
        for name, selection in (("samples", self.samples), ("weights", self.weights)):
            if selection is not None:
                state[name] = selection.state_dict()
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._is_on, self._num_steps = state_dict["is_on"], state_dict["num_steps"]
        for name, selection in (("samples", self.samples), ("weights", self.weights)):
            if selection is not None:
                selection.load_state_dict(state_dict[name])


def _both(name: str, value: Sequence[Any], select: str) -> tuple[Any, Any]:
    if select != "both":
        raise ValueError(
            f"`{name}` may be a pair, one for samples and one for weights, with `select='both'`, but got {value!r} with"
            f" {select!r}. Pass one value."
        )
    if len(value) != 2:
        raise ValueError(
            f"`arms` and `budget` may be pairs, one for samples and one for weights, but got {len(value)} values."
        )
    return value[0], value[1]


def _is_of_samples(arms: Any) -> bool:
    return callable(arms) or (isinstance(arms, str) and arms in ("class", "kmeans"))


def _bandit_of_task(policy: str | Callable[[int], Bandit], seed: int, kind: str, num_arms: int, task: int) -> Bandit:
    return make_bandit(policy, num_arms, seed=seed_of(seed, kind, task))


def _require_unbiased(losses: Any, policy: Any) -> None:
    if losses is None:
        raise ValueError(
            "`unbiased=True` weighs the loss of each sample. Pass `losses=`, a function of module and batch that"
            " returns one loss a sample, for example `lambda module, batch: F.cross_entropy(module(batch[0]),"
            " batch[1], reduction='none')`."
        )
    if isinstance(policy, str) and policy in _NOT_UNBIASED:
        raise ValueError(
            f"`unbiased=True` divides by the probability of each arm, but `policy={policy!r}` gives none to some. Pass"
            " 'exp3'."
        )


def _memory(memory: int | ClassBalancedMemory, seed: int, reward: Reward) -> ClassBalancedMemory:
    if isinstance(memory, int):
        memory = ClassBalancedMemory(memory, seed=seed)
    if not isinstance(memory, ClassBalancedMemory):
        raise TypeError(
            "`memory` must be a number of exemplars or a `ClassBalancedMemory`, whose groups are the arms, but got"
            f" {type(memory).__name__}."
        )
    if memory.num_seen:
        raise ValueError(
            f"`memory` must be empty, for its labels will be the numbers of arms, but it has seen {memory.num_seen}"
            " samples. Pass a new one; what a callback remembers is restored from a checkpoint."
        )
    if reward == "memory_loss" and memory.capacity == 0:
        raise ValueError(
            "`reward='memory_loss'` is the loss of exemplars, but `memory` has room for none. Pass a number of"
            " exemplars, or another reward."
        )
    return memory
