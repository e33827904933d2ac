"""Continual learning via neural pruning: later tasks are learnt by units that earlier ones do not need."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_continual import _host, capacity
from lightning_continual._host.loggers import write_table_and_figure
from lightning_continual._host.retraining import retrain, retraining_batches, share_buffers, weights_kept
from lightning_continual._host.validation import (
    LastValidation,
    monitored,
    share_of,
    validation_loader,
    warn_of_direction,
)
from lightning_continual.constraints import Pin
from lightning_continual.data import ContinualDataModule, seed_of
from lightning_continual.report.units import units_figure
from lightning_continual.stream import ContinualCallback


class CLNPCallback(ContinualCallback):
    r"""Learns each task in units that earlier tasks do not need, so that nothing of them is lost, to the bit.

    While a task is trained, :math:`\alpha \lVert w \rVert_1` joins the loss of the weights that are free. At its end
    the units that it needs become active:

    .. math::
        A \leftarrow A \cup \{j : \bar a_j > \theta_l\} \cup \{\text{outputs of the task}\}

    with :math:`\bar a_j` the mean activity of unit j of layer l on the training data, as the next layers read it. A
    weight by which unit i reads unit j is then

    - *kept* where both are active, with the biases and norms of active units: held for ever;
    - *cut* where i is active and j is not, for training j would interfere: set to zero, and held there;
    - *free* where i is not active: drawn anew, and trained by later tasks, which reuse active units at no cost.

    The threshold is found by graceful forgetting: raised from 0, in units of the layer's mean activity, as long as the
    score on validation data, with the other units cut, falls by no more than ``tolerance``; see `graceful_threshold`.
    That costs three passes over the validation data (one more where the fit's own validation cannot be used, resumed
    or in several processes), and the activities one over the training data.

    Old tasks' logits stay the same to the bit, through any optimizer, weight decay, clipping, precision, strategy and
    other callbacks. The active channels of a batch norm hold their statistics, and are normalised by them in
    training, too. Every task needs outputs of its own: a `TaskHead`, or its ``classes`` of one output layer.

    Needed are layers that keep units apart: linear layers, convolutions, batch norms, activations, pooling, flatten,
    residual sums, dropout; who reads whom is found by tracing. In the callbacks list put it before
    `AccuracyMatrixCallback` and `EWCCallback`, which then see the network after the cut, and after Lightning's averages
    of weights (`EMAWeightAveraging`, `StochasticWeightAveraging`), which then are what is cut. What the paper leaves
    open (activity of channels, the search, the scale of thresholds) is our reading. To every logger go the `UnitCounts`
    as ``clnp/{layer}/free``, ``new``, ``reused``, ``idle`` and, where it takes them, the table and figure
    ``clnp/units``.

    Args:
        tolerance: m, how much of the score may be lost at each task's end, before any retraining.
        l1: α; or a mapping from patterns of layer names, as ``{"backbone.*": 1e-4}``, to one each.
        threshold: θ, of the ``measure`` itself, in place of the search; or a mapping from patterns of layer names to
            one each, for some layers. ``math.inf`` keeps nothing; with ``l1=0`` nothing is done then.
        monitor: The key under which ``validation_step`` logs the score.
        higher_is_better: False where ``monitor`` is a loss or an error.
        classes: Of one output layer for all tasks: the outputs of each task; by default the ``classes`` of the tasks
            of a `ContinualDataModule`.
        forward: Returns the outputs of module and batch; by default those for the first part of the batch.
        passes: How many passes over the validation data the search may take, 2 or more. With more than 3, a threshold
            that does not hold is followed by smaller ones.
        num_samples: Samples of the training data for the activities, over all processes; all by default.
        measure: What thresholds are of: ``"activity"``, as in the paper, or ``"influence"`` (our reading), which is
            that times the size of the weights that read a unit, and finds more to cut; see `influence`.
        num_tasks: How many tasks the units are to last for (our reading): each keeps at most an even share of a
            layer's free units, though it cost more than ``tolerance``; see `Choice`. No limit by default.
        retrain_epochs: Epochs on the task's data after the cut, of what is kept, without L1 (our reading): so the cut
            may go deep. Of callbacks this one alone takes part. The score after it costs a pass more.
        seed: Of the free weights' new values.

    Raises:
        ValueError: If an argument lies outside its range; if a layer mixes units (the error names it) or no output
            layer is found; if a task has no outputs of its own; if the module does not fit to what was learnt.
        MisconfigurationException: Without validation data or threshold; if ``monitor`` is not logged; if the strategy
            hides gradients; for a compiled module with batch norms.
        ImportError: If torch-pruning, which traces the module, is not installed.

    Example:
        >>> clnp = CLNPCallback(tolerance=0.01)
        >>> clnp.free_units(), clnp.reused_units()
        ({}, {})

    References:
        - Golkar, Kagan, Cho. *Continual Learning via Neural Pruning.* arXiv 1903.04476, 2019.
    """

    def __init__(
        self,
        tolerance: float = 0.005,
        *,
        l1: float | Mapping[str, float] = 1e-5,
        threshold: float | Mapping[str, float] | None = None,
        monitor: str = "val_acc",
        higher_is_better: bool = True,
        classes: Sequence[Sequence[int]] | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        passes: int = 3,
        num_samples: int | None = None,
        measure: Literal["activity", "influence"] = "activity",
        num_tasks: int | None = None,
        retrain_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.l1: dict[str, float] = dict(l1) if isinstance(l1, Mapping) else {"*": l1}
        given = {} if threshold is None else threshold if isinstance(threshold, Mapping) else {"*": threshold}
        self.threshold: dict[str, float] = dict(given)
        for name, values in (("tolerance", [tolerance]), ("l1", self.l1.values())):
            for value in values:
                if not 0 <= value < math.inf:
                    raise ValueError(f"`{name}` must be at least 0 and finite, but got {value}.")
        for value in self.threshold.values():
            if not value >= 0:
                raise ValueError(f"`threshold` must be at least 0, but got {value}. Leave it out to have it searched.")
        counts = (passes, 2), (num_samples, 1), (num_tasks, 1), (retrain_epochs, 0)
        for name, (number, least) in zip(("passes", "num_samples", "num_tasks", "retrain_epochs"), counts, strict=True):
            if number is not None and number < least:
                raise ValueError(f"`{name}` must be at least {least}, but got {number}. Leave it out for the default.")
        if measure not in ("activity", "influence"):
            raise ValueError(f"`measure` must be 'activity' or 'influence', but got {measure!r}.")
        self.tolerance = tolerance
        self.monitor = monitor
        self.higher_is_better = higher_is_better
        self.classes = classes
        self.forward = forward
        self.passes = passes
        self.num_samples = num_samples
        self.measure = measure
        self.num_tasks = num_tasks
        self.retrain_epochs = retrain_epochs
        self.seed = seed
        self.learnt = capacity.Learnt()  # which units tasks are in, and how many there are
        self.pin = Pin()
        self._wiring: capacity.Wiring | None = None  # in a fit
        self._thresholds: dict[str, float] = {}
        self._strengths: dict[str, float] = {}
        self._validation = LastValidation(monitor)
        self._held: capacity.Hold | None = None

    # --- What is known ------------------------------------------------------------------------------------------------

    def free_units(self) -> dict[str, int]:
        """Return how many units of each layer no task needs, after the tasks so far; empty before the first."""
        return self.learnt.free_units()

    def reused_units(self) -> dict[str, list[int]]:
        """Return for each layer how many units of earlier tasks each task has used, in the order of tasks."""
        return self.learnt.reused_units()

    def table(self) -> str:
        """Write the counts of units in plain text; see `units_table`."""
        return capacity.units_table(self.learnt.counts)

    def plot(self, ax: Any = None) -> Any:
        """Draw the counts as stacked bars; see `units_figure`."""
        return units_figure(self.learnt.counts, ax=ax)

    @contextmanager
    def as_task(self, model: nn.Module, task: int) -> Iterator[None]:
        """Let a model (that which was trained, or one with its weights) be what a task sees, in evaluation mode.

        Where one output layer serves all tasks, other tasks' outputs are minus infinity. A task that was not learnt
        raises a ValueError.
        """
        with self.learnt.as_task(model, task):
            yield

    def export_task(self, model: nn.Module, task: int) -> nn.Module:
        """Return a copy of a model as a task sees it, which stands alone and can be exported; see `as_task`."""
        return self.learnt.export_task(model, task)

    # --- Before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that gradients can be seen."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._is_neutral:
            _host.require_visible_gradients(trainer, type(self).__name__)
            warn_of_direction(self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find who reads whom, hold what earlier tasks need, and check what the end of the task will need."""
        if not self._is_neutral:
            self._wire(trainer, pl_module)
            if not self._keeps_nothing:
                self._hold(pl_module)
                first, data = self._current_task(trainer), _host.data_module_of(trainer)
                for task in range(first, data.num_tasks if isinstance(data, ContinualDataModule) else first + 1):
                    self._require_outputs(trainer, task)
                if self._is_searched:
                    self._score(trainer, validation_loader(trainer, first, type(self).__name__), limit=1)
        super().on_train_start(trainer, pl_module)

    def _wire(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        norms = [one for one in pl_module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        if norms and _host.is_compiled(pl_module):
            raise MisconfigurationException(
                "`CLNPCallback` holds the statistics of batch norms by hooks, of which a compiled module does not know."
                " Train it without `torch.compile`, or without batch norms."
            )
        with _host.observing(pl_module):
            batch = _host.to_device(trainer, next(iter(_host.train_data(trainer, num_samples=2 * trainer.world_size))))
        self._wiring = units = capacity.find_wiring(pl_module, batch, forward=self._outputs_for)
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in units.rows))
        self._strengths = capacity.l1_strengths(pl_module, units, capacity.by_layer(self.l1, layers, "l1"))
        self._thresholds = capacity.by_layer(self.threshold, list(units.layers), "threshold")
        self.learnt = self.learnt.aligned_with(units)
        self.learnt.require_cut(units, dict(pl_module.named_parameters()))

    def _outputs_for(self, module: Any, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(module, batch)
        # A compiled forward is that of the module itself, in a copy too.
        call = type(module).forward.__get__(module) if _host.is_compiled(module) else module
        return call(batch[0] if isinstance(batch, tuple | list) else batch)

    def _require_outputs(self, trainer: L.Trainer, task: int) -> Tensor:
        """Return the numbers of a task's outputs; raise if there are none, or earlier tasks have some of them."""
        classes = self.classes
        if classes is None:
            data = _host.data_module_of(trainer)
            classes = [one.classes or () for one in data.tasks] if isinstance(data, ContinualDataModule) else []
        units = self._units.outputs_of(task, classes[task] if task < len(classes) else None)
        self.learnt.require_free(units, task, self.num_tasks)
        return units

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Warn of layers that have no free units left, and of earlier tasks of which nothing is held."""
        if self._is_neutral or self._keeps_nothing:
            return
        self._require_outputs(trainer, task)
        if missed := [one for one in range(task) if one not in self.learnt.outputs]:
            rank_zero_warn(
                f"`CLNPCallback` was not there at the end of tasks {missed}: nothing of them is held. If they are to be"
                " kept, `restore` it with the module from a checkpoint that was saved after the last of them."
            )
        if full := self.learnt.full_layers(self._units):
            rank_zero_warn(
                f"`CLNPCallback` has no free units for task {task} in layers {full}. They only give what earlier tasks"
                " have learnt. Use wider layers, `num_tasks`, or a larger `tolerance` or `l1`."
            )

    # --- During training ----------------------------------------------------------------------------------------------

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the weights' absolute values, and hold what earlier tasks need."""
        if self._is_neutral:
            return
        parameters = _host.parameters_of(pl_module, optimizer)
        if all(one.grad is None for one in parameters.values()):
            return  # `training_step` returned `None`: nothing is to move
        capacity.add_l1_gradient_(parameters, self._strengths, _host.gradient_scale(trainer, optimizer))
        _host.hold(pl_module, optimizer, self, self.pin)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the score, which the end of the task may ask for."""
        self._validation.note(trainer)

    def _hold(self, pl_module: L.LightningModule) -> None:
        """Hold what is active where it now is."""
        if self._held is not None:
            self._held.end()
        self._held = capacity.Hold(pl_module, self._units, self.learnt.units)
        self.pin = self._held.weights

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put what tasks need into the checkpoint, if it is of an average of weights."""
        if self._held is not None and _host.is_of_average(checkpoint):
            self._held.put_into_(checkpoint["state_dict"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put back what tasks need, should an average of weights have taken its place."""
        if self._has_trained:
            self._put_back(pl_module)
        super().on_fit_end(trainer, pl_module)

    def _put_back(self, pl_module: L.LightningModule) -> None:
        if self._held is not None:
            self._held.put_back_(pl_module)

    def _leave(self) -> None:
        super()._leave()
        if self._held is not None:
            self._held.end()

    # --- At the boundary ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Find the units that the task needs, keep them, cut what would interfere, and free the rest."""
        if self._is_neutral or self._keeps_nothing:
            return
        units, parameters = self._units, dict(pl_module.named_parameters())
        share_buffers(pl_module)
        self._put_back(pl_module)  # an average of weights, now trained with, may have lost some bits of it
        outputs = self._require_outputs(trainer, task)
        measure = self._activity(trainer, pl_module, task)
        if self.measure == "influence":
            measure = capacity.influence(units, parameters, measure, outputs)
        always = capacity.untrained_units(pl_module, units).index_fill_(0, outputs, True)
        left = None if self.num_tasks is None else self.num_tasks - task
        choice = capacity.Choice(units, measure, self._thresholds, self.learnt.units, always, left)
        search = self._search(trainer, pl_module, task, choice) if self._is_searched else None
        common = search["threshold"] if search is not None else 0.0
        kept = choice.kept(common)
        active = choice.before | kept
        with weights_kept(pl_module, if_broken_off=True):
            capacity.cut_(units, parameters, active)
            if self.retrain_epochs:
                self._retrain(trainer, pl_module, task, active)
            if search is not None:
                if self.retrain_epochs or choice.is_short(common):
                    search["after"] = self._score(trainer, validation_loader(trainer, task, type(self).__name__))
                if wrong := capacity.what_went_wrong(
                    search, task, self.tolerance, self.higher_is_better, retrained=self.retrain_epochs > 0
                ):
                    rank_zero_warn(f"`CLNPCallback` {wrong}")
        capacity.reset_free_(pl_module, units, active, seed=seed_of(self.seed, task, "clnp"))
        _host.put_back_others(trainer, self)
        self.learnt = self.learnt.after(task, units, kept, outputs.tolist(), search)
        self._hold(pl_module)
        if trainer.is_global_zero:
            self._log(trainer, task)

    def _activity(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> Tensor:
        loader, add = _host.train_data(trainer, num_samples=self.num_samples), _host.all_sum(trainer)
        bar = _host.progress(trainer, _host.num_batches(loader), f"Activities of task {task}")
        with _host.observing(pl_module), bar as tick:

            def run(batch: Any) -> None:
                with trainer.precision_plugin.val_step_context():
                    self._outputs_for(pl_module, _host.to_device(trainer, batch))
                tick()

            return capacity.activity_read(pl_module, self._units, loader, forward=run, all_reduce=add)

    def _score(self, trainer: L.Trainer, loader: Any, **options: Any) -> float:
        return monitored(trainer, loader, self.monitor, type(self).__name__, **options)

    def _search(self, trainer: L.Trainer, pl_module: Any, task: int, choice: capacity.Choice) -> dict[str, float]:
        """Return the common threshold, and the scores before and after the cut."""
        loader = validation_loader(trainer, task, type(self).__name__)
        share = share_of(trainer, loader, parts=8)
        with _host.progress(trainer, None, f"Graceful forgetting of task {task}") as tick:

            def score(of_share: bool = False) -> float:
                return self._score(trainer, share if of_share else loader, tick=tick)

            return capacity.graceful_choice(
                choice,
                dict(pl_module.named_parameters()),
                score,
                tolerance=self.tolerance,
                passes=self.passes,
                before=self._validation.score(trainer, score),
                with_share=share is not None,
                higher_is_better=self.higher_is_better,
            )

    def _retrain(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int, active: Tensor) -> None:
        """Train the weights that the task keeps for some epochs more, without L1; what is cut stays cut."""
        parameters, strengths = dict(pl_module.named_parameters()), self._strengths
        self.pin |= capacity.pin_of_cut(self._units, parameters, active)
        self._strengths = {}
        number, seed = retraining_batches(trainer), seed_of(self.seed, task, "retrain")
        total = None if number == sys.maxsize else self.retrain_epochs * number
        with _host.progress(trainer, total, f"Retraining what task {task} keeps") as tick:
            retrain(trainer, self, epochs=self.retrain_epochs, seed=seed, tick=tick)
        self._strengths = strengths
        share_buffers(pl_module)
        self._put_back(pl_module)  # should the module write to weights after its last step
        capacity.cut_(self._units, parameters, active)
        _host.put_back_others(trainer, self)

    def _log(self, trainer: L.Trainer, task: int) -> None:
        counts, step = [one for one in self.learnt.counts if one.task == task], trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({key: value for one in counts for key, value in one.metrics("clnp").items()}, step)
        rows = [list(asdict(one).values()) for one in self.learnt.counts]
        write_table_and_figure(trainer, "clnp/units", list(asdict(counts[0])), rows, self.plot)

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return which units are active, and what was counted."""
        return {**super().state_dict(), "learnt": self.learnt.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.learnt = capacity.Learnt.from_state_dict(state_dict["learnt"])

    @property
    def _units(self) -> capacity.Wiring:
        assert self._wiring is not None
        return self._wiring

    @property
    def _keeps_nothing(self) -> bool:
        return set(self.threshold.values()) == {math.inf} and "*" in self.threshold

    @property
    def _is_neutral(self) -> bool:
        return self._keeps_nothing and not any(self.l1.values())

    @property
    def _is_searched(self) -> bool:
        return len(self._thresholds) < len(self._units.layers)
