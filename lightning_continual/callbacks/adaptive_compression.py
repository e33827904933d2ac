"""Adaptive compression: each task owns as few weights as it can do with, and leaves the rest to later tasks."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_continual import _extras, _host
from lightning_continual._host.loggers import write_table_and_figure
from lightning_continual._host.retraining import (
    raise_if_told_to_stop,
    retrain,
    retraining_batches,
    share_buffers,
    weights_kept,
)
from lightning_continual._host.sights import SeesLoaders
from lightning_continual._host.validation import monitored, validation_loader, warn_of_direction
from lightning_continual.constraints import Pin
from lightning_continual.data import ContinualDataModule, seed_of
from lightning_continual.ownership import (
    Parts,
    blocks_of,
    least_share,
    parts_of,
    pin_but,
    prune_,
)
from lightning_continual.packed import Packed
from lightning_continual.parameters import ParamDict, not_redrawn, redraw_, trainable
from lightning_continual.report.ownership import capacity_figure, scores_figure, search_figure
from lightning_continual.search import Found, Objective, ShareSearch, Trial
from lightning_continual.stream import ContinualCallback

_MOST = 0.99


class AdaptiveCompressionCallback(SeesLoaders, ContinualCallback):
    r"""Prunes the network after each task as far as the task allows; later tasks train what became free.

    PackNet's ownership: a task trains all weights that are free, while those of earlier tasks are held. At its end, of
    each layer the smallest share p of the weights just trained is set to zero and free again, the others are retrained
    for ``retrain_epochs`` and owned by the task for ever. Task t runs with the weights of tasks up to t (`as_task`), so
    that nothing of it is lost, to the bit, whatever later tasks train.

    The share is found for each task by Bayesian optimisation (see `ShareSearch`), as the largest with

    .. math:: s(p) \ge s_0 - \text{tolerance}

    where :math:`s_0` is the score on the task's validation data before, and :math:`s(p)` that after pruning and
    retraining, both as measured and as all trials let expect. A simple task gives back more than a hard one. A trial
    prunes, retrains and scores, and everything is put back: weights, buffers, optimizers, random state. It costs
    ``retrain_epochs`` over the training data and a pass over the validation data, and there is one copy of the weights
    in memory (on an accelerator the optimizers' state waits outside it). What the paper leaves open (the objective, the
    bounds, blocks, the floor) is our reading.

    Retraining is by the module's own ``training_step``, its hooks and optimizers of ``configure_optimizers``, made
    anew and sized for it; other callbacks rest, nothing is logged, and schedulers that watch a metric stay where they
    are.

    Biases, norms and all else that is trained but not pruned belong to the first task and are held after it, with the
    norms' running statistics (then the norms are in evaluation mode); or each task has its own. Other buffers of the
    state, which training may change, are each task's own in any case. Every task needs an output layer: a `TaskHead`;
    any layer named by ``head``, of which each task has a copy; or one for all, which is then pruned like other layers.

    A search that is broken off goes on where it was, and ends with the same choice: the trials are in the state, so
    that a checkpoint saved then (by Lightning's ``OnExceptionCheckpoint`` after an interrupt, an error or, between two
    trials, a signal to terminate) resumes in the search, with a `TaskStream`. A process that is killed saves nothing:
    it resumes from its last checkpoint before, trains up to the boundary, and has the trials still if ``storage`` is
    given.

    ``trainer.test`` with a loader a task, as those of a `ContinualDataModule`, sees each loader's task. In the
    callbacks list put it before `AccuracyMatrixCallback`, and after Lightning's averages of weights. To every logger go
    ``compression/share``, ``free`` and ``score`` and, where it takes them, the tables and figures
    ``compression/trials`` and ``compression/capacity``.

    Args:
        tolerance: How much of the score one is ready to lose at each task's end.
        trials: How many shares are tried for each task.
        monitor: The key under which ``validation_step`` logs the score; None is possible with a fixed ``share``.
        retrain_epochs: Epochs over the task's data after pruning, in each trial and at the end.
        share: A fixed share in [0, 1) to give back, or one a task, in place of the search: PackNet.
        objective: ``"constrained"``, or ``"scalarised"``: the largest :math:`s(p) / s_0 + w p`.
        weight: :math:`w`.
        blocks: In how many parts the network is divided, each with its own share, 1 to 5.
        num_tasks: How many tasks there will be, if it is known.
        floor: With ``num_tasks``, the share of all weights that each task to come is to find for itself, in
            [0, 1 / ``num_tasks``]; by default half of an equal part.
        higher_is_better: False where ``monitor`` is a loss or an error.
        norms: ``"hold"`` or ``"per-task"``: what becomes of all that is trained but has no owners.
        restart: From where free weights start into a task after the first: ``"zero"``, as the papers have it, or
            ``"drawn"``, anew as their layers draw them (our reading).
        storage: A file for the SQLite database of all searches, which optuna's dashboard shows.
        seed: Of the searches and of retraining.
        parameters: Patterns of the weights to prune, as ``"backbone.*"``; an empty list does nothing at all.
        head: Patterns of the parameters of which each task has a copy of its own, with the statistics of norms there.

    Raises:
        ValueError: If an argument lies outside its range; if the floor cannot be kept; if a task is trained a second
            time; if the module does not fit to what was learnt, or trains nothing that tasks can share; if the score
            before pruning is NaN or, to be divided by, not above 0.
        MisconfigurationException: Without validation data; if ``monitor`` is not logged; if the strategy hides
            gradients; with several training loaders, or one without a length in a fit that ends by ``max_steps``.
        ImportError: If optuna is not installed.

    Example:
        >>> compression = AdaptiveCompressionCallback(0.01, trials=10, monitor="val_acc")
        >>> compression.tasks, compression.trials(0)
        ([], [])

    References:
        - Srivastava, Berman, Blaschko, Tuia. *Adaptive Compression-based Lifelong Learning.* BMVC 2019.
        - Mallya, Lazebnik. *PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning.* CVPR 2018.
    """

    def __init__(
        self,
        tolerance: float = 0.01,
        *,
        trials: int = 12,
        monitor: str | None,
        retrain_epochs: int = 1,
        share: float | Sequence[float] | None = None,
        objective: Objective = "constrained",
        weight: float = 0.1,
        blocks: int = 1,
        num_tasks: int | None = None,
        floor: float | None = None,
        higher_is_better: bool = True,
        norms: Literal["hold", "per-task"] = "hold",
        restart: Literal["zero", "drawn"] = "zero",
        storage: str | None = None,
        seed: int = 0,
        parameters: str | Sequence[str] = "*",
        head: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value in {"tolerance": tolerance, "weight": weight}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, but got {value}.")
        for name, number, most in (
            ("trials", trials, math.inf),
            ("retrain_epochs", retrain_epochs, math.inf),
            ("blocks", blocks, 5),
            ("num_tasks", num_tasks, 255),
        ):
            if number is not None and not 1 <= number <= most:
                raise ValueError(f"`{name}` must lie in 1..{most}, but got {number}.".replace("..inf", ", 2, ..."))
        if objective not in ("constrained", "scalarised"):
            raise ValueError(f"`objective` must be 'constrained' or 'scalarised', but got {objective!r}.")
        if norms not in ("hold", "per-task"):
            raise ValueError(f"`norms` must be 'hold' or 'per-task', but got {norms!r}.")
        if restart not in ("zero", "drawn"):
            raise ValueError(f"`restart` must be 'zero' or 'drawn', but got {restart!r}.")
        if share is not None and not all(
            0 <= one < 1 for one in ([share] if isinstance(share, int | float) else share)
        ):
            raise ValueError(f"`share` must lie in [0, 1), but got {share}. Leave it out to have it searched.")
        if share is None and monitor is None:
            raise ValueError(
                "`monitor` must name the score to search by, but got None. Pass a key, or a fixed `share`."
            )
        if floor is not None and (num_tasks is None or not 0 <= floor * num_tasks <= 1):
            raise ValueError(
                f"`floor` must lie in [0, 1 / `num_tasks`], but got {floor} with `num_tasks={num_tasks}`. Each of them"
                " is to find so much: pass both, for example `num_tasks=5, floor=0.1`."
            )
        self.tolerance = tolerance
        self.num_trials = trials
        self.monitor = monitor
        self.retrain_epochs = retrain_epochs
        self.share = share if share is None or isinstance(share, int | float) else list(share)
        self.objective = objective
        self.weight = weight
        self.blocks = blocks
        self.num_tasks = num_tasks
        self.floor = (0.0 if num_tasks is None else 0.5 / num_tasks) if floor is None else floor
        self.higher_is_better = higher_is_better
        self.norms = norms
        self.restart = restart
        self.storage = storage
        self.seed = seed
        self.parameters = [parameters] if isinstance(parameters, str) else list(parameters)
        self.head = [head] if isinstance(head, str) else list(head)
        self.packed = Packed()
        """What is known: whose the weights are, what each task has for itself, what was found."""
        self._search: dict[str, Any] = {}  # that is not at its end
        self._pin = Pin()
        self._statistics = Pin()  # of the norms that are held
        self._is_compressed = False  # the module, and nothing has been trained since
        self._modes: list[tuple[nn.Module, bool]] = []  # of norms, in a batch
        self._norms: list[nn.Module] = []  # whose statistics are held, in a fit
        self._trained: set[str] | None = None  # the names of what is trained, while a task is

    # --- What is known ------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[int]:
        """The tasks learnt, from 0."""
        return self.packed.tasks

    def trials(self, task: int) -> list[Trial]:
        """Return the trials of a task's search, in their order; none before it, or with a fixed share."""
        return list(self.packed.found[task].trials) if task in self.tasks else []

    @contextmanager
    def as_task(self, model: nn.Module, task: int) -> Iterator[None]:
        """Let a model be what a task sees: only its weights and those of earlier tasks, in evaluation mode.

        Heads are at the task, and what each task has for itself is that of the task. Meanwhile there is one copy of
        the weights.

        Args:
            model: The module that was trained, or one with its weights.
            task: A task that was learnt, from 0; others raise a ValueError.
        """
        with self.packed.as_task(model, task):
            yield

    def export_task(self, model: nn.Module, task: int) -> nn.Module:
        """Return a copy of a model as a task sees it, for good, which stands alone; see `as_task`.

        Args:
            model: The module that was trained, or one with its weights.
            task: A task that was learnt, from 0; others raise a ValueError.
        """
        return self.packed.export(model, task)

    def plot_search(self, task: int, ax: Any = None) -> Any:
        """Draw the search of a task's share; see `search_figure`."""
        limit = None if self.objective == "scalarised" else self.tolerance * (1 if self.higher_is_better else -1)
        return search_figure(self.packed.found[task], tolerance=limit, label=self.monitor or "score", ax=ax)

    def plot_capacity(self, ax: Any = None) -> Any:
        """Draw what each task owns of each layer; see `capacity_figure`."""
        return capacity_figure(self.packed.ownership, ax=ax)

    def plot_scores(self, ax: Any = None) -> Any:
        """Draw each task's score before and after compression; see `scores_figure`."""
        return scores_figure(self.packed.found, label=self.monitor or "score", ax=ax)

    # --- Before training ----------------------------------------------------------------------------------------------

    @property
    def _is_neutral(self) -> bool:
        return not self.parameters

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the method needs."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._is_neutral:
            _host.require_visible_gradients(trainer, type(self).__name__)
            warn_of_direction(self)
            if others := [type(one).__name__ for one in _host.holders(trainer, self)]:
                raise MisconfigurationException(
                    "`AdaptiveCompressionCallback` must alone say which weights are pruned and held, but the Trainer"
                    f" has {others}, too. Use one of them."
                )
            if self.share is None:
                _extras.require("optuna", "bayes")
            if self.storage is not None and not _from_first(Path(self.storage).absolute().parent.is_dir()):
                raise ValueError(
                    f"`storage` must be a file in a folder that is there, but got {self.storage!r}. Make the folder"
                    " first."
                )
            data = _host.data_module_of(trainer)
            if isinstance(data, ContinualDataModule):
                self._fixed(data.num_tasks - 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold what earlier tasks own, and check what the end of the task will need."""
        if not self._is_neutral:
            weights = self._hold(pl_module).weights
            if self.restart == "drawn" and (layers := not_redrawn(pl_module, weights)):
                raise ValueError(
                    f"`restart='drawn'` must have layers with a `reset_parameters`, but {layers} have none. Pass"
                    " 'zero', or leave their weights out of `parameters`."
                )
            if retraining_batches(trainer) == sys.maxsize and trainer.max_steps != -1:
                raise MisconfigurationException(
                    "`AdaptiveCompressionCallback` retrains for whole epochs, but the training data have no length, and"
                    " may have no end: the fit ends by `max_steps`. Pass `limit_train_batches=` to the Trainer, as a"
                    " number of batches."
                )
            if self.monitor is not None:
                self._score(trainer, self._current_task(trainer), limit=1)
        super().on_train_start(trainer, pl_module)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Check that there are weights for the task, and let them start anew."""
        if self._is_neutral:
            return
        self._is_compressed, self._search = False, {}  # a search of this task was of other weights
        self.packed.require_after(task)
        self._bounds(task)
        if self.restart == "drawn" and self.tasks:
            redraw_(pl_module, self.packed.ownership.free(), seed=seed_of(self.seed, task, "restart"))
        if self.packed.free_share == 0:
            rank_zero_warn(
                f"`AdaptiveCompressionCallback` has no free weights for task {task}: it trains its head only. Use a"
                " larger network, a larger `tolerance`, or `num_tasks` with a `floor`."
            )

    def _hold(self, pl_module: L.LightningModule) -> Parts:
        """Hold what is owned where it now is."""
        parts, parameters = parts_of(pl_module, self.parameters, self.head), dict(pl_module.named_parameters())
        self._trained = set(trainable(pl_module))
        self.packed = self.packed.aligned_with(parameters, parts)
        holds_rest = self.norms == "hold"
        self._pin = pin_but(parameters, self.packed.ownership.free(), self.packed.held(parts, rest=holds_rest))
        held = parts.norms if self.tasks and holds_rest else ()
        self._norms = [pl_module.get_submodule(name) for name in held]
        buffers = dict(pl_module.named_buffers())
        names = parts.statistics if held else ()
        self._statistics = Pin.at(buffers, {name: torch.ones_like(buffers[name], dtype=torch.bool) for name in names})
        return parts

    def _held(self, pl_module: L.LightningModule) -> Pin:
        """Return what is held now; after a boundary that is also what has been given back, at zero."""
        if not self._is_compressed:
            return self._pin
        return self._pin | Pin.at_zero(dict(pl_module.named_parameters()), self.packed.ownership.free())

    def _put_back(self, pl_module: L.LightningModule) -> None:
        """Put back what is held, should an average of weights have taken its place."""
        self._held(pl_module).put_back_(dict(pl_module.named_parameters()))
        self._statistics.put_back_(dict(pl_module.named_buffers()))

    # --- During training ----------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let norms whose statistics are held compute with them; hold what an epoch has begun to train."""
        if batch_idx == 0 and self._trained not in (None, set(trainable(pl_module))):
            self._put_back(pl_module)
            self._hold(pl_module)
        self._free_norms()
        self._modes = [(one, one.training) for one in self._norms]
        for one in self._norms:
            one.training = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give norms their mode back."""
        self._free_norms()

    def _free_norms(self) -> None:
        for one, mode in self._modes:
            one.training = mode
        self._modes = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hold what is owned."""
        _host.hold(pl_module, optimizer, self, self._pin)

    # --- At the boundary ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Find the shares, give them back, retrain what stays, and own it."""
        if self._is_neutral:
            return
        share_buffers(pl_module)
        self._put_back(pl_module)
        parts = self._hold(pl_module)
        is_searched = self.share is None and self.packed.free_share > 0
        found = self._searched(trainer, task, parts) if is_searched else self._given(trainer, task)
        title = f"Compressing task {task} by {found.share:.3f}"
        with self._progress(trainer, task, title) as tick, weights_kept(pl_module, if_broken_off=True):
            kept = self._compress(trainer, task, parts, found.shares, tick)
            found = replace(found, after=self._score(trainer, task, tick))
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        copies = {name: tensors[name] for name in parts.of_each_task(rest=self.norms == "per-task")}
        self.packed, self._search = self.packed.after(task, kept, copies, found), {}
        self._hold(pl_module)
        self._is_compressed = True
        if trainer.is_global_zero:
            self._log(trainer, task)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put what is held into the checkpoint, if it is of an average of weights."""
        if _host.is_of_average(checkpoint):
            self._held(pl_module).put_into_(checkpoint["state_dict"])
            self._statistics.put_into_(checkpoint["state_dict"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put back what is held, and the zeros, should an average of weights have taken their place."""
        if self._has_trained:
            self._put_back(pl_module)
        super().on_fit_end(trainer, pl_module)

    def _given(self, trainer: L.Trainer, task: int) -> Found:
        """Return what there is without a search: a fixed share, or none where no weights are free."""
        return Found((self._fixed(task) or 0.0,) * self.blocks, self._bounds(task)[1], self._score(trainer, task))

    def _fixed(self, task: int) -> float | None:
        """Return the share that was given for a task."""
        if not isinstance(self.share, list):
            return self.share
        if task >= len(self.share):
            raise ValueError(
                f"`share` must be one number, or one for each task, but got {len(self.share)} and none for task {task}."
                " Pass more of them."
            )
        return self.share[task]

    def _searched(self, trainer: L.Trainer, task: int, parts: Parts) -> Found:
        """Search the task's shares, from where a search was broken off; the first process asks, all try."""
        lows, sizes = self._bounds(task)
        if self._search.get("task") != task:
            self._search = {"task": task, "before": self._score(trainer, task), "trials": []}
        before, is_first = self._search["before"], trainer.is_global_zero
        search = ShareSearch(  # in all processes, so that an error is raised in all; asked and told in the first
            lows,
            [max(_MOST, (1 + low) / 2) for low in lows],
            before=before,
            tolerance=self.tolerance,
            objective=self.objective,
            weight=self.weight,
            sizes=sizes,
            higher_is_better=self.higher_is_better,
            seed=seed_of(self.seed, task, "search") % 2**31,
            storage=self.storage if is_first else None,
            name=f"task {task}, {self.monitor}, retrained {self.retrain_epochs}, {_digest(trainer.lightning_module)}",
        )
        if is_first:
            for shares, score in self._search["trials"][len(search.trials) :]:
                search.tell(shares, score)
        trials = _from_first(search.trials)
        while len(trials) < self.num_trials:
            shares = _from_first(search.ask() if is_first else None)
            title = f"Task {task}, trial {len(trials) + 1} of {self.num_trials}" + (
                search.summary() if is_first else ""
            )
            with self._progress(trainer, task, title) as tick, weights_kept(trainer.lightning_module):
                self._compress(trainer, task, parts, shares, tick)
                score = self._score(trainer, task, tick)
            if is_first:
                search.tell(shares, score)
            trials = [*trials, Trial(shares, score)]
            self._search = {**self._search, "trials": [[list(one.shares), one.score] for one in trials]}
            raise_if_told_to_stop(trainer)
        chosen = _from_first(search.chosen())
        if chosen is None or not search.is_feasible(chosen):
            rank_zero_warn(
                f"No share kept `tolerance={self.tolerance}` in task {task}: {self.monitor} was {before:.4g} before,"
                f" and {'NaN' if chosen is None else format(chosen.score, '.4g')} at best. Retrain longer"
                " (`retrain_epochs`), or tolerate more."
            )
        return Found(lows if chosen is None else chosen.shares, sizes, before, trials=tuple(trials))

    def _bounds(self, task: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return for each block the least share, and how many weights it has to give."""
        free, total = self._counts()
        to_come = 0 if self.num_tasks is None else self.num_tasks - 1 - task
        lows = tuple(least_share(n, N, self.floor, to_come) for n, N in zip(free, total, strict=True))
        share = self._fixed(task)
        if share is not None and share < max(lows):
            raise ValueError(
                f"`share={share}` must be at least {max(lows):.3f} in task {task}, so that each of {to_come} tasks"
                f" to come finds `floor={self.floor}` of the weights. Pass a larger share, or a smaller floor."
            )
        return lows, tuple(map(float, free))

    def _counts(self) -> tuple[list[int], list[int]]:
        """Return how many weights of each block are free, and how many it has."""
        owners = self.packed.ownership.owners
        blocks = [[owners[name] for name in block] for block in self._blocks()]
        return [sum(int((one == 0).sum()) for one in block) for block in blocks], [
            sum(one.numel() for one in block) for block in blocks
        ]

    def _blocks(self) -> list[list[str]]:
        return blocks_of({name: one.numel() for name, one in self.packed.ownership.owners.items()}, self.blocks)

    def _compress(
        self, trainer: L.Trainer, task: int, parts: Parts, shares: Sequence[float], tick: Callable[[], Any]
    ) -> ParamDict:
        """Give shares of the free weights back, and retrain what stays; return what that is."""
        parameters = dict(trainer.lightning_module.named_parameters())
        of_layers = {name: share for block, share in zip(self._blocks(), shares, strict=True) for name in block}
        kept = prune_(parameters, self.packed.ownership.free(), of_layers)
        _host.forget_steps(self)  # and with it the pin of training, whose place in memory the new one takes
        self._pin = Pin()
        self._pin = pin_but(parameters, kept, self.packed.held(parts, rest=self.norms == "hold"))
        self._trained = None
        retrain(trainer, self, epochs=self.retrain_epochs, seed=seed_of(self.seed, task, "retrain"), tick=tick)
        share_buffers(trainer.lightning_module)
        self._put_back(trainer.lightning_module)  # should the module write to weights after its last step
        return kept

    def _score(
        self, trainer: L.Trainer, task: int, tick: Callable[[], Any] | None = None, limit: int | None = None
    ) -> Any:
        """Return the score on the task's validation data; None where none was asked for."""
        if self.monitor is None:
            return None
        return monitored(
            trainer, self._validation(trainer, task), self.monitor, type(self).__name__, tick=tick, limit=limit
        )

    def _validation(self, trainer: L.Trainer, task: int) -> Any:
        try:
            return validation_loader(trainer, task, type(self).__name__)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                f"`AdaptiveCompressionCallback` needs one loader of validation data for task {task}. Pass `val=` to the"
                " task, `val_fraction=` to `ContinualDataModule`, or a loader to `fit` (and leave `limit_val_batches`"
                " above 0); or a fixed `share` with `monitor=None`."
            ) from error

    def _progress(self, trainer: L.Trainer, task: int, title: str) -> Any:
        """Show a bar for retraining and scoring once."""
        number = retraining_batches(trainer)
        total = None if number == sys.maxsize else self.retrain_epochs * number
        if self.monitor is not None:
            loader = self._validation(trainer, task)
            length, limit = _host.num_batches(loader), _host.validation_limit(trainer, loader)
            total = None if length is None or total is None else total + min(length, limit or length)
        return _host.progress(trainer, total, title)

    def _log(self, trainer: L.Trainer, task: int) -> None:
        found = self.packed.found[task]
        metrics = {"share": found.share, "free": self.packed.free_share}
        metrics |= {} if found.after is None else {"score": found.after}
        for logger in trainer.loggers:
            logger.log_metrics({f"compression/{name}": value for name, value in metrics.items()}, trainer.global_step)
        columns = ["task", "trial", *(f"share_{block}" for block in range(self.blocks)), "score"]
        rows = [
            [number, trial, *one.shares, one.score]
            for number, of_task in self.packed.found.items()
            for trial, one in enumerate(of_task.trials)
        ]
        if found.trials:
            write_table_and_figure(trainer, "compression/trials", columns, rows, lambda: self.plot_search(task))
        capacity = [[name, *counts] for name, counts in self.packed.ownership.counts().items()]
        owners = ["free", *(f"task {one}" for one in range(task + 1))]
        write_table_and_figure(trainer, "compression/capacity", ["layer", *owners], capacity, self.plot_capacity)

    def _leave(self) -> None:
        self._free_norms()
        super()._leave()

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, one byte a weight, and the trials of a search that is not at its end."""
        return {**super().state_dict(), "packed": self.packed.state_dict(), "search": dict(self._search)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._is_compressed = False  # a task may have been trained since
        self.packed, self._search = Packed.from_state_dict(state_dict["packed"]), dict(state_dict["search"])


def _digest(module: nn.Module) -> str:
    """Return a few letters that differ for other weights, so that a search in ``storage`` is taken up for the same."""
    sums = [float(one.detach().float().sum()) for one in module.parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:8]


def _from_first(value: Any) -> Any:
    """Return the first process's value. A collective."""
    return _host.gather_everywhere(value)[0]
