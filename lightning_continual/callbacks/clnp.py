"""Continual learning via neural pruning: later tasks are learnt by units that earlier ones do not need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_continual import _host, capacity
from lightning_continual._host.loggers import write_table_and_figure
from lightning_continual._host.validation import LastValidation, monitored, share_of, validation_loader
from lightning_continual.compression.surgery import copy_of
from lightning_continual.constraints import Pin
from lightning_continual.data import seed_of
from lightning_continual.report.units import units_figure
from lightning_continual.stream import ContinualCallback


class CLNPCallback(ContinualCallback):
    r"""Learns each task in units that earlier tasks do not need, so that nothing of them is lost, to the bit.

    While a task is trained, :math:`\alpha \lVert w \rVert_1` joins the loss of the weights that are free. At its end
    the units that it needs become active:

    .. math::
        A \leftarrow A \cup \{j : \bar a_j > \theta_l\} \cup \{\text{outputs of the task}\}

    with :math:`\bar a_j` the mean activity of unit j of layer l on the task's training data, as the next layers read
    it. A weight by which unit i reads unit j is then

    - *kept* where both are active, with the biases and norms of active units: held for ever;
    - *cut* where i is active and j is not, for training j would interfere: set to zero, and held there;
    - *free* where i is not active: drawn anew, and trained by later tasks, which reuse active units at no cost.

    The threshold is found by graceful forgetting: raised from 0, in units of the mean activity in a layer, as long as
    the score on the task's validation data, with the other units cut, falls by no more than ``tolerance``; see
    `graceful_threshold`. That costs three passes over the validation data (where the fit's own validation is used and
    cannot be, resumed or in several processes, it may be one more), and the activities one over the training data.

    Old tasks' logits stay the same to the bit, through any optimizer, weight decay, clipping, precision, strategy and
    other callbacks. The active channels of a batch norm hold their statistics, and are normalised by them in
    training, too. Every task needs outputs of its own: a `TaskHead`, or the task's ``classes`` of one output layer
    (class-incremental); the logits of a task are then those of its outputs.

    Needed are layers that keep units apart: linear layers, convolutions, batch norms, activations, pooling, flatten,
    residual sums, dropout. Which unit reads which is found by tracing. In the callbacks list put it before
    `AccuracyMatrixCallback` and `EWCCallback`, which then see the network after the cut. What the paper leaves open
    (activity of channels, the search, the scale of thresholds) is our reading.

    To every logger go ``clnp/{layer}/free``, ``new``, ``reused`` and ``idle`` (see `UnitCounts`) and, where it takes
    them, the table and the figure ``clnp/units``.

    Args:
        tolerance: m, how much of the score one is ready to lose at each task's end.
        l1: α; or a mapping from patterns of layer names, as ``{"backbone.*": 1e-4}``, to one each.
        threshold: θ, of the activity itself, in place of the search; or a mapping from patterns of layer names to one
            each, for some layers. ``math.inf`` keeps nothing of any task; with ``l1=0`` nothing is done then.
        monitor: The key under which ``validation_step`` logs the score.
        higher_is_better: False where ``monitor`` is a loss or an error.
        classes: Of one output layer for all tasks: for each task the outputs that are its own; by default the
            ``classes`` of the tasks of a `ContinualDataModule`.
        forward: Returns the outputs of module and batch; by default the module's output for the first part of the
            batch.
        passes: How many passes over the validation data the search may take, 2 or more. With more than 3, a threshold
            that does not hold is followed by smaller ones.
        num_samples: Samples of the training data for the activities, over all processes; all by default.
        seed: Of the free weights' new values.

    Raises:
        ValueError: If an argument lies outside its range; if a layer mixes units or no output layer is found (the
            error names it and what to do); if a task has no outputs of its own; if the module does not fit to what was
            learnt.
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
        for name, number, least in (("passes", passes, 2), ("num_samples", num_samples, 1)):
            if number is not None and number < least:
                raise ValueError(f"`{name}` must be at least {least}, but got {number}. Leave it out for the default.")
        self.tolerance = tolerance
        self.monitor = monitor
        self.higher_is_better = higher_is_better
        self.classes = classes
        self.forward = forward
        self.passes = passes
        self.num_samples = num_samples
        self.seed = seed
        self.learnt = capacity.Learnt()
        """Which units tasks are in, and how many there are."""
        self._pin = Pin()
        self._wiring: capacity.Wiring | None = None  # in a fit
        self._thresholds: dict[str, float] = {}
        self._strengths: dict[str, float] = {}
        self._validation = LastValidation(monitor)
        self._ends: list[Callable[[], None]] = []  # of hooks

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
        """Let a model be what a task sees: in evaluation mode, its head at the task.

        Where one output layer serves all tasks, the outputs of other tasks are minus infinity. The model is the one
        that was trained, or one with its weights; a task that was not learnt raises a ValueError.
        """
        with self.learnt.as_task(model, task):
            yield

    def export_task(self, model: nn.Module, task: int) -> nn.Module:
        """Return a copy of a model as a task sees it, for good: see `as_task`.

        It stands alone, in evaluation mode, and can be exported, as by ``torch.export.export``.
        """
        with self.as_task(model, task):
            copied = copy_of(model)
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        return copied.eval()

    # --- Before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that gradients can be seen."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._is_neutral:
            _host.require_visible_gradients(trainer, type(self).__name__)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find who reads whom, hold what earlier tasks need, and check what the end of the task will need."""
        if not self._is_neutral:
            self._wire(trainer, pl_module)
            if not self._keeps_nothing:
                self._hold(pl_module)
                first, data = self._current_task(trainer), _host.data_module_of(trainer)
                for task in range(first, getattr(data, "num_tasks", first + 1)):
                    self._require_outputs(trainer, task)
                if self._is_searched:
                    loader = validation_loader(trainer, self._current_task(trainer), type(self).__name__)
                    monitored(trainer, loader, self.monitor, type(self).__name__, limit=1)
        super().on_train_start(trainer, pl_module)

    def _wire(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        norms = [one for one in pl_module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        if norms and _host.is_compiled(pl_module):
            raise MisconfigurationException(
                "`CLNPCallback` holds the statistics of batch norms by hooks, of which a compiled module does not know."
                " Train it without `torch.compile`, or without batch norms."
            )
        with _host.observing(pl_module):
            samples = _host.train_data(trainer, num_samples=2 * trainer.world_size)
            batch = _host.to_device(trainer, next(iter(samples)))
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
            tasks = getattr(_host.data_module_of(trainer), "tasks", [])
            classes = [getattr(one, "classes", None) or () for one in tasks]
        units = self._units.outputs_of(task, classes[task] if task < len(classes) else None)
        self.learnt.require_free(units, task)
        return units

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Warn of layers that have no free units left."""
        if self._is_neutral or self._keeps_nothing:
            return
        self._require_outputs(trainer, task)
        if full := self.learnt.full_layers(self._units):
            rank_zero_warn(
                f"`CLNPCallback` has no free units for task {task} in layers {full}. They only give what earlier tasks"
                " have learnt. Use wider layers, or a larger `tolerance` or `l1`."
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
        _host.hold(pl_module, optimizer, self, self._pin)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the score, which the end of the task may ask for."""
        self._validation.note(trainer)

    def _hold(self, pl_module: L.LightningModule) -> None:
        """Hold what is active where it now is."""
        active = self.learnt.units
        self._pin = capacity.pin_of(self._units, dict(pl_module.named_parameters()), active)
        self._let_go()
        self._ends = capacity.hold_statistics(pl_module, self._units, active)

    def _let_go(self) -> None:
        for end in self._ends:
            end()
        self._ends = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the user's objects as they were."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the user's objects as they were."""
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    # --- At the boundary ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Find the units that the task needs, keep them, cut what would interfere, and free the rest."""
        if self._is_neutral or self._keeps_nothing:
            return
        units = self._units
        self._share_statistics(pl_module)
        outputs = self._require_outputs(trainer, task)
        before = self.learnt.units
        activity = self._activity(trainer, pl_module, task)

        always = capacity.untrained_units(pl_module, units)
        always[outputs] = True

        def reached(common: float) -> Tensor:
            return always | capacity.active_units(units, activity, self._thresholds, common)

        common, search = 0.0, None
        if self._is_searched:
            search = self._search(trainer, pl_module, task, activity, lambda value: before | reached(value))
            common = search["threshold"]
        active = before | reached(common)
        capacity.cut_(units, dict(pl_module.named_parameters()), active)
        capacity.reset_free_(pl_module, units, active, seed=seed_of(self.seed, task, "clnp"))
        self.learnt = self.learnt.after(task, units, reached(common), outputs.tolist(), search)
        self._hold(pl_module)
        if trainer.is_global_zero:
            self._log(trainer, task)

    def _share_statistics(self, pl_module: L.LightningModule) -> None:
        """Let every process have the first one's statistics, as the strategy does in a forward pass."""
        for name, one in pl_module.named_buffers():
            if _host.is_distributed() and name in self._units.rows:
                one.copy_(_host.gather_everywhere(one.cpu())[0])

    def _activity(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> Tensor:
        loader, add = _host.train_data(trainer, num_samples=self.num_samples), _host.all_sum(trainer)
        bar = _host.progress(trainer, _host.num_batches(loader), f"Activities of task {task}")
        with _host.observing(pl_module), bar as tick:

            def run(batch: Any) -> None:
                with trainer.precision_plugin.val_step_context():
                    self._outputs_for(pl_module, _host.to_device(trainer, batch))
                tick()

            return capacity.activity_read(pl_module, self._units, loader, forward=run, all_reduce=add)

    def _search(
        self, trainer: L.Trainer, pl_module: Any, task: int, activity: Tensor, active_at: Callable[[float], Tensor]
    ) -> dict[str, float]:
        """Return the common threshold, and the scores before and after the cut."""
        units, parameters, who = self._units, dict(pl_module.named_parameters()), type(self).__name__
        loader = validation_loader(trainer, task, who)
        share = share_of(trainer, loader, parts=8)
        searched = ~active_at(math.inf)
        for name in self._thresholds:
            searched[units.layers[name].start : units.layers[name].stop] = False
        with _host.progress(trainer, None, f"Graceful forgetting of task {task}") as tick:

            def score(common: float | None, of_share: bool) -> float:
                active = torch.zeros(units.num_units).bool() if common is None else active_at(common)
                with capacity.cut(units, parameters, active):
                    return monitored(trainer, share if of_share else loader, self.monitor, who, tick=tick)

            search = capacity.graceful_threshold(
                capacity.relative_activity(units, activity)[searched],
                score,
                tolerance=self.tolerance,
                passes=self.passes,
                before=self._validation.score(trainer, lambda: score(None, False)),
                with_share=share is not None,
                higher_is_better=self.higher_is_better,
            )
        if "before" in search and search["threshold"] == 0:
            rank_zero_warn(
                f"`CLNPCallback` found no threshold for task {task} that costs at most `tolerance={self.tolerance}`:"
                f" only dead units are cut. Pass more `passes` than {self.passes}, or a larger `tolerance` or `l1`."
            )
        return search

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
        """Whether there are layers without a threshold given."""
        return len(self._thresholds) < len(self._units.layers)
