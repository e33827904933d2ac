"""Pruning: weights or units that training can do without are set to zero, and held there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_continual import _batch, _extras, _host
from lightning_continual._datasets import require_num_samples
from lightning_continual.compression import selectors
from lightning_continual.compression.ranking import Schedule, Scope, When, amounts, epochs_and_steps, keep_weights
from lightning_continual.compression.selectors import Evidence, Level, Selector, matching, reads_data
from lightning_continual.compression.surgery import compact
from lightning_continual.compression.units import UnitGroup, unit_groups
from lightning_continual.constraints import Pin
from lightning_continual.data import seed_of
from lightning_continual.importance.fisher import Statistic
from lightning_continual.parameters import evaluating
from lightning_continual.stream import ContinualCallback


class PruningCallback(ContinualCallback):
    r"""Sets to zero the weights, or the units, that are missed least, and holds them there.

    Rounds of pruning remove the shares :math:`a_1 \le \dots \le a_R = a` of all that may be pruned (see `amounts`);
    what is trained between and after them is the fine-tuning. In a round the selector gives each weight a saliency on
    the task's training data, and the least salient ones are set to zero, in place: no parameter gets another name, and
    a checkpoint is one of an ordinary network with zeros in it.

    A zero stays one, to the bit, in every later step, task, fit and resumed run, whatever the optimizer: its gradient
    is set to zero before the step, and its value put back after it. Gradients that another callback adds later in the
    list move it no more; they only count in the norm by which gradients are clipped. Averages of weights that another
    callback keeps have the zeros, too, in validation, in checkpoints (put that callback before this one), and at the
    fit's end. At a task's end callbacks act in the order of the list: put pruning before `EWCCallback`, which then
    anchors the pruned weights. Weights that `CLNPCallback` holds for earlier tasks are not pruned.

    At ``level="parameter"`` single weights of linear, convolutional, recurrent and attention layers are pruned;
    biases, normalisations and embeddings are not (see `prunable`). At ``level="unit"`` whole features and channels go,
    with all that makes and reads them; `compact` then returns the small dense network. Each round logs the share of
    zeros, ``pruning/sparsity``, and by parameter.

    Args:
        selector: ``"random"``; ``"magnitude"``; ``"obd"`` (Optimal Brain Damage, for classifiers); ``"obd-sd"`` (the
            spread of the gradient in the place of the curvature, any loss); for units also ``"dropout-damage"`` (the
            loss regressed on random dropout) and ``"merge"`` (units that others can stand for go on through these); or
            a function of module, batches and the parameters to score by name, that returns one tensor a parameter,
            larger for weights to keep. It is called in evaluation mode, on each process's share of the data, and
            averaged over processes.
        amount: The share a in [0, 1) of weights, or of the units of each layer, to remove in all. 0 does nothing.
        level: ``"parameter"`` or ``"unit"``.
        when: ``"task_end"``: a round at the end of each task (of each fit, without a `TaskStream`, when a checkpoint
            callback has saved its last file: save by ``trainer.save_checkpoint`` after ``fit``) until all are made;
            a list of epochs, as ``[0, 2, 4]``: a round at the start of these epochs of a task, counted from 0, so that
            ``[0]`` prunes a trained network before its fine-tuning; or ``{"every_n_steps": 100}``: a round after every
            so many optimizer steps, counted over tasks and fits.
        rounds: The number R of rounds, over all tasks and fits; of a list of epochs it is the length. Where a state is
            loaded whose rounds were others, those that remove no more than what is gone already count as made.
        schedule: ``"geometric"``, ``"cubic"`` or ``"one-shot"``: how the amount grows over the rounds.
        scope: ``"global"`` ranks all weights together, ``"layer"`` those of each parameter. Units are ranked by layer.
        statistic: Of ``"obd-sd"``: ``"sd"``, ``"rms"`` or ``"variance"``.
        num_samples: Samples of the training data that the selector looks at, over all processes; all by default, but
            256 for ``"dropout-damage"``, which runs the network on them ten times for each unit.
        loss: As of `EWCCallback`, for a ``training_step`` that cannot be called alone (manual optimization).
        logits: Returns the outputs of module and batch, for ``"obd"`` logits ``(B, C)``; by default the module's
            output for the first part of the batch.
        parameters: Patterns of the names of weights that may be pruned, as ``"backbone.*"``.
        min_units: The number of units that each layer keeps at least.
        seed: For ``"random"`` and ``"dropout-damage"``.

    Raises:
        ValueError: If an argument lies outside its range, a selector for units is asked for weights, or ``parameters``
            names no weight; if a function returns no saliency (other names, shapes, NaN); if a layer would be pruned
            to nothing; if a pruned parameter is gone or of another shape.
        MisconfigurationException: If the strategy hides gradients, or the module needs ``loss``.
        ImportError: For units, if torch-pruning is not installed.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model, pruning = BoringModel(), PruningCallback("magnitude", 0.75)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[pruning], barebones=True, accelerator="cpu")
        >>> trainer.fit(model)
        >>> int((model.layer.weight == 0).sum()), model.layer.weight.numel(), pruning.sparsity
        (48, 64, 0.75)

    References:
        - LeCun, Denker, Solla. *Optimal Brain Damage.* NeurIPS 1989.
        - Harang & Sanders. *Magnificent Minified Models.* arXiv 2306.10177, 2023 (the comparison; our readings of it).
    """

    def __init__(
        self,
        selector: Selector = "obd-sd",
        amount: float = 0.9,
        *,
        level: Level = "parameter",
        when: When = "task_end",
        rounds: int = 1,
        schedule: Schedule = "geometric",
        scope: Scope = "global",
        statistic: Statistic = "sd",
        num_samples: int | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any, Any], Any] | None = None,
        parameters: str | Sequence[str] = "*",
        min_units: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        selectors.check_selector(selector, level=level, scope=scope, statistic=statistic)
        for name, number in {"num_samples": num_samples, "min_units": min_units}.items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {number}. Leave it out for the default.")
        self._epochs, self._every = epochs_and_steps(when)
        self.rounds = rounds if self._epochs is None else len(self._epochs)
        if rounds not in (1, self.rounds):
            raise ValueError(f"`rounds` must be the {self.rounds} epochs of `when`, but got {rounds}. Leave it out.")
        self.amounts = amounts(amount, self.rounds, schedule=schedule)
        self.selector = selector
        self.amount = amount
        self.level = level
        self.when = when
        self.scope = scope
        self.statistic = statistic
        self.num_samples = num_samples
        self.loss = loss
        self.logits = logits
        self.parameters = [parameters] if isinstance(parameters, str) else list(parameters)
        self.min_units = min_units
        self.seed = seed
        self.pin = Pin()  # the zeros that are held
        self.rounds_made = 0
        self._steps = 0  # since the last round
        self._first_epoch = 0  # of the task
        self._has_stepped = False  # in this batch
        self._is_checked = False  # in this fit
        self._groups: list[UnitGroup] | None = None
        self._example: Any = None  # a batch of two samples

    # --- During training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the method needs."""
        super().setup(trainer, pl_module, stage)
        self._is_checked, self._groups = False, None
        if stage != "fit" or self.amount == 0:
            return
        _host.require_visible_gradients(trainer, type(self).__name__)
        if self.level == "unit":
            _extras.require("torch_pruning", "prune")
            if others := [type(one).__name__ for one in _host.holders(trainer, self)]:
                raise MisconfigurationException(
                    f"`PruningCallback(level='unit')` would remove units in which {others} hold weights. Use one."
                )
        if self.selector in ("obd-sd", "dropout-damage") and not (self.loss or pl_module.automatic_optimization):
            raise MisconfigurationException(
                f"`PruningCallback({self.selector!r})` takes the loss from `training_step`, but with manual"
                " optimization that makes a step. Pass `loss=`, a function of module and batch."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit what is known to the module as it stands, and check that there is something to prune."""
        self._put_back(pl_module)
        if self._is_unfinished:
            weights = matching(pl_module, self.parameters)
            if self.scope == "layer" and self.level == "parameter":
                keep_weights({name: one.detach() for name, one in weights.items()}, self.amount, scope="layer")
            if reads_data(self.selector):
                _host.train_data(trainer)
        super().on_train_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put zeros back, should validation be of an average of weights."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if batch_idx == 0 and trainer.state.fn == "fit":
            self._put_back(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put zeros into the checkpoint, should it be of an average of weights."""
        if self._fit_to(pl_module):
            self.pin.put_into_(checkpoint["state_dict"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put zeros back, should an average of weights have taken the place of these."""
        self._put_back(pl_module)
        super().on_fit_end(trainer, pl_module)

    def _put_back(self, pl_module: L.LightningModule) -> None:
        if self._fit_to(pl_module):
            self.pin.put_back_(dict(pl_module.named_parameters()))

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Count the task's epochs from here."""
        self._first_epoch = _host.epochs_processed(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make a round that is due; and before the first step try what would else fail in a round."""
        self._has_stepped = False
        if self._is_unfinished and not self._is_checked:
            self._try(trainer, pl_module, batch)
            self._is_checked = True
        while self._is_unfinished and self._is_due(trainer):
            self._prune(trainer, pl_module)
        if not pl_module.automatic_optimization:  # which may step past the hooks of Lightning
            for optimizer in trainer.optimizers:
                self._hold(pl_module, optimizer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hold the zeros."""
        if not self._has_stepped:  # of several optimizers the first one counts
            self._has_stepped = True
            self._steps += 1
        self._hold(pl_module, optimizer)

    def _hold(self, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if self._fit_to(pl_module):
            _host.hold(pl_module, optimizer, self, self.pin)

    def _fit_to(self, pl_module: L.LightningModule) -> bool:
        """Let the pin be for the module as it stands (a head may have grown), and say whether it holds anything."""
        parameters = dict(pl_module.named_parameters()) if self.pin else {}
        if (aligned := self.pin.aligned_with(parameters)) is not self.pin:
            self.pin = Pin.at_zero(parameters, aligned.pinned)
        return self.amount > 0 and bool(self.pin)

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Make a round, if it is for the task's end, or has become due with its last step."""
        if self._is_unfinished and (self.when == "task_end" or (self._every is not None and self._is_due(trainer))):
            self._prune(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the task, where one fit is one task; warn of rounds for which the fit was too short."""
        super().on_train_end(trainer, pl_module)
        if self._is_unfinished and self.when != "task_end":
            rank_zero_warn(
                f"`PruningCallback(when={self.when!r})` has made {self.rounds_made} of {self.rounds} rounds, and stands"
                f" at {self.sparsity:.3f} of {self.amount}: the fit came to its end first. Fit longer, let rounds come"
                " earlier, or go on with the next fit."
            )

    @property
    def sparsity(self) -> float:
        """The share of zeros that are held, of all weights that could be pruned; 0 before the first round."""
        return self.pin.num_pinned() / max(1, sum(one.numel() for one in self.pin.pinned.values()))

    def compact(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Return a copy of a pruned network without its removed units: small and dense, with the same outputs.

        It is a module of the same class, to be trained (by a Trainer without this callback), saved and exported.

        Args:
            model: A network that was pruned at ``level="unit"``, maybe from a checkpoint: its zeros tell all.
            example_inputs: What ``model`` is called with (a tuple holds several arguments, a dictionary named ones);
                by default two samples of the last fit's data.

        Raises:
            ValueError: With ``level="parameter"``; without data; if the model cannot be traced.
        """
        if self.level != "unit":
            raise ValueError(
                "`compact` takes away units; zeros of `level='parameter'` lie scattered in all. Pass `level='unit'`."
            )
        if example_inputs is not None:
            return compact(model, example_inputs)
        if self._example is None:
            raise ValueError("`compact` needs data, but this callback has seen none. Pass `example_inputs=`.")
        return compact(model, _batch.first(self._example, 2, next(model.parameters()).device), forward=self._outputs)

    # --- A round ------------------------------------------------------------------------------------------------------

    @property
    def _is_unfinished(self) -> bool:
        return self.amount > 0 and self.rounds_made < self.rounds

    def _is_due(self, trainer: L.Trainer) -> bool:
        if self._epochs is not None:
            return _host.epochs_processed(trainer) - self._first_epoch >= self._epochs[self.rounds_made]
        return self._every is not None and self._steps >= self._every

    def _outputs(self, module: Any, batch: Any) -> Any:
        if self.logits is not None:
            return self.logits(module, batch)
        return module(batch[0] if isinstance(batch, tuple | list) else batch)

    def _evidence(self, trainer: L.Trainer, batches: Callable[[], Iterable[Any]], **options: Any) -> Evidence:
        def loss(batch: Any) -> Tensor:
            if self.loss is not None:
                return self.loss(trainer.lightning_module, batch)
            return _host.training_loss(trainer, batch)

        generator = torch.Generator().manual_seed(seed_of(self.seed, "pruning", self.rounds_made))
        return Evidence(
            batches, loss, self._outputs, generator, self.statistic, all_reduce=_host.all_sum(trainer), **options
        )

    def _try(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Score by two samples."""
        if self.level == "parameter" and not reads_data(self.selector):
            return
        few = _batch.first(batch, 2)
        evidence = self._evidence(trainer, lambda: [few], num_samples=_batch.size(few), masks_per_unit=0)
        with _host.without_trace(pl_module):
            if self.level == "unit" or self.selector == "obd":
                self._try_outputs(pl_module, few)
            if self.level == "unit":
                groups = self._groups_of(trainer, pl_module, few)
                selectors.unit_scores(self.selector, pl_module, groups, evidence, amount=0.5)
            else:
                selectors.weight_saliency(self.selector, pl_module, matching(pl_module, self.parameters), evidence)

    def _try_outputs(self, pl_module: L.LightningModule, batch: Any) -> None:
        try:
            with evaluating(pl_module), torch.no_grad():
                self._outputs(pl_module, batch)
        except Exception as error:
            raise ValueError(
                "`PruningCallback` calls the module with the first part of a batch, or by `logits`, but got"
                f" {type(error).__name__}: {error}. Pass `logits=`, a function of module and batch."
            ) from error

    def _groups_of(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any = None) -> list[UnitGroup]:
        """Return the groups of units that may be pruned, the same on all processes."""
        if self._groups is None:
            if batch is None:  # a run resumed at a task's end
                loader = _host.train_data(trainer, num_samples=2 * trainer.world_size)
                batch = _host.to_device(trainer, next(iter(loader)))
            self._example = _batch.first(batch, 2, "cpu")
            found = _host.gather_everywhere(unit_groups(pl_module, batch, forward=self._outputs))[0]
            self._groups = selectors.eligible(self.selector, pl_module, found, matching(pl_module, self.parameters))
        return self._groups

    def _prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make a round."""
        self._fit_to(pl_module)
        kept = {name: ~one for name, one in self.pin.pinned.items()}
        who, amount, loader = self.selector, self.amounts[self.rounds_made], self._data(trainer)
        size = 0 if loader is None else require_num_samples(loader.dataset)
        evidence = self._evidence(trainer, lambda: self._batches(trainer, loader) if loader else (), num_samples=size)
        with _host.without_trace(pl_module):
            if self.level == "unit":
                groups, least = self._groups_of(trainer, pl_module), self.min_units
                kept |= selectors.prune_units_(who, pl_module, groups, amount, evidence, min_units=least)
            else:
                weights, held = matching(pl_module, self.parameters), _host.held_by_others(trainer, self)
                kept |= selectors.prune_weights_(
                    who, pl_module, weights, amount, evidence, scope=self.scope, kept=kept, held=held
                )
        self.pin = Pin.at_zero(dict(pl_module.named_parameters()), {name: ~one for name, one in kept.items()})
        self.rounds_made, self._steps = self.rounds_made + 1, 0
        metrics = {f"pruning/sparsity/{name}": float(one.float().mean()) for name, one in self.pin.pinned.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/sparsity": self.sparsity, **metrics}, trainer.global_step)

    def _data(self, trainer: L.Trainer) -> DataLoader[Any] | None:
        """Return a loader over this process's share of the data; to merge units, each process needs all."""
        if not reads_data(self.selector):
            return None
        limit = 256 if self.selector == "dropout-damage" else None
        loader = _host.train_data(trainer, num_samples=self.num_samples or limit)
        if self.selector != "merge":
            return loader
        dataset: Any = loader.dataset
        shares: list[list[int]] = _host.gather_everywhere(list(dataset.indices))
        return _host.in_order(_host.train_loader(trainer), sorted(place for share in shares for place in share))

    def _batches(self, trainer: L.Trainer, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield batches on the device, with a progress bar."""
        round_of = f"{self.rounds_made + 1} of {self.rounds}"
        with _host.progress(trainer, _host.num_batches(loader), f"Pruning, round {round_of}") as tick:
            for batch in loader:
                yield _host.to_device(trainer, batch)
                tick()

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is held at zero, and how far the rounds are."""
        amount = self.amounts[self.rounds_made - 1] if self.rounds_made else 0.0
        own = {"amount": amount, "steps": self._steps, "first_epoch": self._first_epoch}
        return {**super().state_dict(), **own, "pinned": dict(self.pin.pinned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.rounds_made = sum(0 < one <= state_dict["amount"] for one in self.amounts)
        self._steps, self._first_epoch = state_dict["steps"], state_dict["first_epoch"]
        self.pin = Pin.at_zero(state_dict["pinned"], state_dict["pinned"])
