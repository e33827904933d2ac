"""The boundary between tasks, and the two ways to reach it: a stream in one fit, or one fit a task."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import fsspec
import lightning.pytorch as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_continual import _host
from lightning_continual._host.heads import FollowsLoaders, require_task_heads
from lightning_continual.data import ContinualDataModule
from lightning_continual.heads import set_task


class ContinualCallback(FollowsLoaders):
    """A callback that learns at the boundaries between tasks; the base of every method in this package.

    Subclasses implement `on_task_start` and `on_task_end`, and need not know how a boundary is reached:

    - With a `TaskStream` among the Trainer's callbacks, one ``fit`` runs all tasks, and the stream calls them.
    - Without one, each completed ``fit`` is one task. It is counted from 0, over restarts too, or it is the
      ``current_task`` of a `ContinualDataModule`. A fit that raises, or trains nothing, is no task.

    Every `TaskHead` of the module is at the current task, in either way.

    State is what ``state_dict`` returns; subclasses extend it, and `load_state_dict`.
    """

    def __init__(self) -> None:
        self._tasks_ended = 0
        self._in_task = False
        self._has_trained = False  # in this fit

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Called before the first batch of a task; not again when training resumes inside it."""

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Called after the last batch of a task, in the order of the Trainer's callbacks."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the processes; subclasses check what they need, and raise before training starts."""
        self._has_trained = False
        if stage == "fit" and _stream(trainer) is None:
            self._in_task = False  # if a fit was broken off inside a task; a checkpoint to resume is loaded after this
        if trainer.world_size > 1:
            _host.leave_process_group_at_exit()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let task heads be at the task that is to be trained; raise if they do not serve it."""
        if _stream(trainer) is None:
            require_task_heads(trainer, num_tasks=1 + _latest_task(trainer))
            set_task(pl_module, _latest_task(trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a task, where one fit is one task."""
        self._has_trained = True
        if _stream(trainer) is None:
            set_task(pl_module, _latest_task(trainer))  # there are strategies that load a checkpoint after `fit` starts
        if _stream(trainer) is None and not self._in_task:
            self._warn_of_the_same_task(trainer)
            with _host.random_state_kept():
                _start(self, trainer, self._current_task(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the task, where one fit is one task."""
        if _stream(trainer) is None:
            with _host.random_state_kept():
                _end(self, trainer, self._current_task(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit trained nothing because an earlier one had reached its limit."""
        if not self._has_trained:
            _raise_if_at_limit(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the user's objects as they were."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the user's objects as they were: Lightning does not call `teardown` after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        """Take away all that was put on the user's objects; subclasses that put something there themselves add it."""
        _host.release(self)

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback knows, in tensors and plain values."""
        return {"tasks_ended": self._tasks_ended, "in_task": self._in_task}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._tasks_ended = state_dict["tasks_ended"]
        self._in_task = state_dict["in_task"]

    def _warn_of_the_same_task(self, trainer: L.Trainer) -> None:
        data = _host.data_module_of(trainer)
        if isinstance(data, ContinualDataModule) and data.current_task < self._tasks_ended:
            rank_zero_warn(
                f"{type(self).__name__} has ended task {data.current_task} before, and this fit trains it again. Set"
                " `current_task` of the data module before each fit, or add a `TaskStream`, which does."
            )

    def _current_task(self, trainer: L.Trainer) -> int:
        task = getattr(_host.data_module_of(trainer), "current_task", None)
        return self._tasks_ended if task is None else int(task)


class TaskStream(FollowsLoaders):
    r"""Runs a whole stream of tasks in one ``fit``.

    At the end of a task's last epoch the stream calls ``on_task_end`` of every callback that has it, in the order of
    the callbacks list; then the data module serves the next task, optimizers and schedulers are made anew, and
    ``on_task_start`` is called. One fit means one logger run with a step that goes on, one wrapping by DDP, any
    launcher, and checkpoints that resume to the bit, within a task or at its boundary.

    A task ends after every other callback's ``on_train_epoch_end``, before checkpoints are saved, and begins before
    every other callback's ``on_train_epoch_start``. The stream takes these places in the Trainer's list itself.

    Every `TaskHead` of the module is at the task in training, and stays at the last one after the fit.

    A fit that ends inside an epoch (an exception, ``trainer.should_stop``) does not end the task: the next ``fit`` of
    the same Trainer trains that epoch anew, or, with ``steps_per_task``, the steps that are left.

    Args:
        epochs_per_task: Epochs over each task's data. The Trainer's own ``max_epochs`` can be left out.
        steps_per_task: Instead of epochs, optimizer steps (``accumulate_grad_batches`` batches each) a task; the last
            epoch of a task is cut where they are done.
        reset_optimizer: What happens to optimizers at a boundary: ``"full"`` calls ``configure_optimizers`` anew, so
            that schedulers begin again, sized for one task by ``trainer.estimated_stepping_batches``; ``"state"``
            forgets only what optimizers remember (momentum, moments); ``False`` keeps everything. With these two,
            schedulers go on, and ``trainer.estimated_stepping_batches`` is that of the stream, if all tasks are of the
            size of the first.

    Raises:
        ValueError: If an argument lies outside its range.
        MisconfigurationException: Without a `ContinualDataModule`; if ``Trainer(max_epochs=)`` says otherwise; if a
            `TaskHead` serves fewer tasks.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_continual.tasks import Task
        >>> tasks = [Task(torch.randn(8, 32), val=torch.randn(2, 32)), Task(torch.randn(4, 32), val=torch.randn(2, 32))]
        >>> data = ContinualDataModule(tasks, batch_size=2)
        >>> stream = TaskStream(epochs_per_task=2)
        >>> trainer = L.Trainer(max_epochs=-1, callbacks=[stream], barebones=True, accelerator="cpu")
        >>> trainer.fit(BoringModel(), datamodule=data)
        >>> trainer.global_step  # 2 epochs of 4 batches, 2 epochs of 2 batches
        12
    """

    def __init__(
        self,
        epochs_per_task: int = 1,
        *,
        steps_per_task: int | None = None,
        reset_optimizer: Literal["full", "state", False] = "full",
    ) -> None:
        if epochs_per_task < 1:
            raise ValueError(f"`epochs_per_task` must be at least 1, but got {epochs_per_task}.")
        if steps_per_task is not None and steps_per_task < 1:
            raise ValueError(f"`steps_per_task` must be at least 1, but got {steps_per_task}.")
        if steps_per_task is not None and epochs_per_task != 1:
            raise ValueError(
                f"Only one of `epochs_per_task` and `steps_per_task` can be given, but got {epochs_per_task} and"
                f" {steps_per_task}. Leave one out."
            )
        if reset_optimizer not in ("full", "state", False):
            raise ValueError(f"`reset_optimizer` must be 'full', 'state' or False, but got {reset_optimizer!r}.")
        self.epochs_per_task = epochs_per_task
        self.steps_per_task = steps_per_task
        self.reset_optimizer = reset_optimizer
        self._task = 0
        self._in_task = False
        self._epochs_before = 0  # epochs and batches of the tasks before this one
        self._batches_before = 0
        self._random_state: dict[str, Any] | None = None  # to put back: of a checkpoint, or from before validation
        self._limits: tuple[int | None, int] = (None, -1)  # `max_epochs` and `max_steps`, as last set here
        self._reload_every: int | None = None  # epochs, as the user has it
        self._has_trained = False

    @property
    def task(self) -> int:
        """The task in training, from 0; the number of tasks when the stream has ended."""
        return self._task

    # --- The fit ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the Trainer, take the place in its callbacks, and tell the first optimizers how long a task is."""
        if stage != "fit":
            return
        data = self._data(trainer)
        streams = [one for one in _host.callbacks_of(trainer) if isinstance(one, TaskStream)]
        if len(streams) > 1:
            raise MisconfigurationException(f"A Trainer runs one `TaskStream`, but it has {len(streams)}. Remove one.")
        if any(type(one).__name__ == "EarlyStopping" for one in _host.callbacks_of(trainer)):
            rank_zero_warn(
                "`EarlyStopping` ends the whole stream at the first task that stops improving. Use"
                " `TaskEarlyStopping`, which ends the task."
            )
        free = {None, -1, 1000, self._limits[0]}  # 1000 is what Lightning makes of `None`
        if self.steps_per_task is None:
            free.add(self.epochs_per_task * data.num_tasks)
        if trainer.max_epochs not in free and not _host.fast_dev_run(trainer):
            raise MisconfigurationException(
                f"`TaskStream` decides how long to train, but got `Trainer(max_epochs={trainer.max_epochs})`. Leave"
                " `max_epochs` out, or pass -1."
            )
        if any(_host.is_checkpoint(one) and getattr(one, "monitor", None) for one in _host.callbacks_of(trainer)):
            rank_zero_warn(
                "A checkpoint callback with `monitor` keeps the checkpoint that was best on the task then in training,"
                " often an early one, which knows nothing of later tasks. Leave `monitor` out to keep the last."
            )
        # A new list: Lightning is walking over the old one.
        others = [one for one in _host.callbacks_of(trainer) if one is not self and not isinstance(one, _TaskOpener)]
        place = len(others) - sum(map(_host.is_checkpoint, others))
        _host.set_callbacks(trainer, [_TaskOpener(self), *others[:place], self, *others[place:]])
        if trainer.world_size > 1:
            _host.leave_process_group_at_exit()
        self._has_trained = False
        self._random_state = None
        self._reload_every = _host.reloads_every(trainer)
        data.current_task = min(self._task, data.num_tasks - 1)  # the first optimizers may ask for its length
        data.batches_left = self._loader_length(trainer, self._batches_of_task(trainer))
        # The first optimizers are made between this hook and the next. `fast_dev_run` limits the steps of the whole
        # fit; here it is to run one batch of every task.
        self._limits = None, -1 if _host.fast_dev_run(trainer) else trainer.max_steps
        epochs, steps = self._size_of_task(trainer)
        tasks = 1 if self.reset_optimizer == "full" else data.num_tasks  # that these optimizers will be used for
        _host.set_limits(trainer, epochs * tasks, steps if steps == -1 else steps * tasks)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if every task is trained already."""
        data = self._data(trainer)
        if self._task >= data.num_tasks:
            raise MisconfigurationException(
                f"This stream has ended: all {data.num_tasks} tasks are trained. To train it again, make a new Trainer"
                " and new callbacks, without the `ckpt_path` of a finished run; to go on with more tasks, pass a"
                " `ContinualDataModule` with the old tasks and the new ones."
            )
        data.current_task = self._task
        require_task_heads(trainer, data.num_tasks)
        set_task(pl_module, self._task)
        _host.drop_early_loaders(trainer)
        self._set_end(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the stream, or continue where a checkpoint was saved."""
        self._has_trained = True
        if _host.epochs_processed(trainer) < self._epochs_before:  # a new Trainer: the task begins again
            self._epochs_before, self._batches_before, self._in_task = 0, 0, False
        self._set_end(trainer)
        if self._in_task:
            set_task(pl_module, self._task)
        if (bar := trainer.progress_bar_callback) is not None:
            _host.wrap_method(bar, "get_metrics", self, self._with_task)
        if self._in_task and _host.is_between_epochs(trainer):
            # A checkpoint of an epoch's last batch resumes after `on_train_epoch_end`: do what it would have done.
            if self._is_done(trainer):
                self._end_task(trainer)
                _host.load_loaders(trainer)
            else:
                self._cut_epoch(trainer)
            _host.leave_epoch(trainer)
        if not self._in_task and self._task < self._data(trainer).num_tasks:
            self._start_task(trainer)
        if (state := self._random_state) is not None:
            self._random_state = None

            # What other hooks of this moment draw must not change what training goes on with.
            def put_back(inner: Any, *args: Any) -> None:
                inner(*args)
                _host.set_random_state(state)

            _host.wrap_method(trainer.strategy, "on_train_start", self, put_back)

    def open_task(self, trainer: L.Trainer) -> None:
        """Begin the next task if the last has ended, now that its loader is there; called by the stream itself."""
        if not self._in_task:
            self._start_task(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the random state, so that a checkpoint saved in validation holds that of training."""
        if not trainer.sanity_checking:
            self._random_state = _host.random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the random state of training back: whether validation runs does not change training."""
        if self._random_state is not None and not trainer.sanity_checking:
            _host.set_random_state(self._random_state)
            self._random_state = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the task, if this was its last epoch."""
        if _host.epoch_was_cut_short(trainer):
            self._epochs_before += 1  # it counts for nothing
            return
        # Every one is asked, each epoch, for they count.
        early = [
            one.should_end_task(trainer) for one in _host.callbacks_of(trainer) if isinstance(one, TaskEarlyStopping)
        ]
        if any(early) or self._is_done(trainer):
            self._end_task(trainer)
        else:
            self._cut_epoch(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit trained nothing."""
        if not self._has_trained:
            _raise_if_at_limit(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the user's objects as they were."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._leave(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the user's objects as they were."""
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit":
            self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        _host.release(self)
        self._reload_as_before(trainer)
        self._reload_every = None

    def _reload_as_before(self, trainer: L.Trainer) -> None:
        if self._reload_every is not None:
            _host.set_reloads_every(trainer, self._reload_every)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, and every process's random state."""
        return {
            "task": self._task,
            "in_task": self._in_task,
            "epochs_before": self._epochs_before,
            "batches_before": self._batches_before,
            "random_states": _host.gather(self._random_state or _host.random_state()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; with another number of processes the first one's random state."""
        self._task = state_dict["task"]
        self._in_task = state_dict["in_task"]
        self._epochs_before = state_dict["epochs_before"]
        self._batches_before = state_dict["batches_before"]
        states = state_dict["random_states"]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._random_state = states[rank] if rank < len(states) else states[0]

    # --- The boundary -----------------------------------------------------------------------------------------------

    def _start_task(self, trainer: L.Trainer) -> None:
        self._reload_as_before(trainer)
        set_task(trainer.lightning_module, self._task)
        _host.reshard(trainer.lightning_module)  # lest optimizers be made for parameters that last a forward pass
        if self._task > 0 and self.reset_optimizer == "full":
            _host.set_limits(trainer, *self._size_of_task(trainer))
            trainer.strategy.setup_optimizers(trainer)
            self._set_end(trainer)
        elif self._task > 0 and self.reset_optimizer == "state":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self._call(_start, trainer)
        self._in_task = True

    def _end_task(self, trainer: L.Trainer) -> None:
        self._call(_end, trainer)
        self._task += 1
        self._in_task = False
        self._epochs_before = _host.epochs_processed(trainer)
        self._batches_before = _host.batches_processed(trainer)
        data = self._data(trainer)
        if self._task < data.num_tasks:
            data.current_task = self._task
            data.batches_left = self._loader_length(trainer, self._batches_of_task(trainer))
            _host.reload_loaders(trainer)
        self._set_end(trainer)

    def _call(self, boundary: Callable[[L.Callback, L.Trainer, int], None], trainer: L.Trainer) -> None:
        with _host.random_state_kept():
            if self._random_state is not None:
                _host.set_random_state(self._random_state)
            for callback in _host.callbacks_of(trainer):
                boundary(callback, trainer, self._task)

    def _is_done(self, trainer: L.Trainer) -> bool:
        if (batches := self._batches_left(trainer)) is not None:
            return batches <= 0
        epochs, _ = self._size_of_task(trainer)
        return _host.epochs_processed(trainer) - self._epochs_before >= epochs

    def _size_of_task(self, trainer: L.Trainer) -> tuple[int, int]:
        """Return the ``max_epochs`` and ``max_steps`` of a fit of one task."""
        if _host.fast_dev_run(trainer):
            return 1, -1
        if self.steps_per_task is not None:
            return self.steps_per_task, self.steps_per_task
        return self.epochs_per_task, -1

    def _set_end(self, trainer: L.Trainer) -> None:
        """Let the fit end with the last task."""
        tasks_left = self._data(trainer).num_tasks - self._task
        epochs, steps = self._size_of_task(trainer)
        max_epochs = self._epochs_before + tasks_left * epochs if steps == -1 or tasks_left == 0 else -1
        self._limits = max_epochs, self._limits[1]
        _host.set_limits(trainer, *self._limits)

    def _batches_of_task(self, trainer: L.Trainer) -> int | None:
        """Return the number of batches of a task, or ``None`` where it has a number of epochs."""
        if self.steps_per_task is None or _host.fast_dev_run(trainer):
            return None
        return self.steps_per_task * trainer.accumulate_grad_batches

    def _batches_left(self, trainer: L.Trainer) -> int | None:
        batches = self._batches_of_task(trainer)
        return None if batches is None else batches - (_host.batches_processed(trainer) - self._batches_before)

    @staticmethod
    def _loader_length(trainer: L.Trainer, batches: int | None) -> int | None:
        """Return how long a loader must be for the Trainer to take ``batches`` of it."""
        share = trainer.limit_train_batches
        if batches is None or isinstance(share, int) or share == 0:
            return batches
        length = math.ceil(batches / share)
        return length + (int(length * share) < batches)

    def _cut_epoch(self, trainer: L.Trainer) -> None:
        """Make the next epoch end where the task's steps are done."""
        batches = self._batches_left(trainer)
        if batches is not None and batches < trainer.num_training_batches:
            self._data(trainer).batches_left = self._loader_length(trainer, batches)
            _host.reload_loaders(trainer)

    def _with_task(self, inner: Any, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Show "task i/T" in the progress bar, before the other metrics."""
        tasks = self._data(trainer).num_tasks
        return {"task": f"{min(self._task + 1, tasks)}/{tasks}", **inner(trainer, pl_module)}

    def _data(self, trainer: L.Trainer) -> ContinualDataModule:
        data = _host.data_module_of(trainer)
        if not isinstance(data, ContinualDataModule):
            raise MisconfigurationException(
                f"`TaskStream` needs a `ContinualDataModule`, but got {type(data).__name__}. Pass"
                " `trainer.fit(model, datamodule=ContinualDataModule(tasks))`; with loaders of your own leave"
                " `TaskStream` out: then each fit is one task."
            )
        return data


class _TaskOpener(L.Callback):
    """Stands first among the callbacks, so that a task has begun when the others learn of its first epoch."""

    def __init__(self, stream: TaskStream) -> None:
        self.stream = stream

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the next task."""
        self.stream.open_task(trainer)


class TaskEarlyStopping(L.Callback):
    """Ends a task, not the stream, when a metric has stopped improving.

    Asked once at the end of every epoch in which validation has run (every epoch, if there is none). What it
    remembers begins anew with every task. Under several processes the metric is averaged over them. A run resumed from
    a checkpoint of an epoch's last batch does not count this epoch: Lightning does not validate it.

    Args:
        monitor: The key of a metric that the module logs with ``self.log``, in validation or over a training epoch.
        patience: Epochs without improvement after which the task ends.
        mode: ``"min"`` or ``"max"``: which direction is better.
        min_delta: The least change that counts as an improvement.

    Raises:
        ValueError: If an argument lies outside its range.
        MisconfigurationException: Without a `TaskStream`, or if ``monitor`` was not logged; the error lists what was.

    Example:
        >>> TaskEarlyStopping("val_loss", patience=2).patience
        2
    """

    def __init__(
        self, monitor: str, patience: int = 3, *, mode: Literal["min", "max"] = "min", min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, but got {patience}.")
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max', but got {mode!r}.")
        if min_delta < 0:
            raise ValueError(f"`min_delta` must be at least 0, but got {min_delta}.")
        self.monitor = monitor
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self._best: float | None = None
        self._epochs = 0  # without improvement
        self._validated = False  # since it was last asked
        self._latest: float | None = None  # what validation logged

    @property
    def state_key(self) -> str:
        """Tell apart several in one Trainer."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is a stream whose tasks can end."""
        if stage == "fit" and _stream(trainer) is None:
            raise MisconfigurationException(
                "`TaskEarlyStopping` ends a task of a `TaskStream`, but the Trainer has none. Add one, or use"
                " Lightning's `EarlyStopping` where each fit is one task."
            )

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Forget the task before."""
        self._best, self._epochs = None, 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the value, which a run resumed after this validation will not have."""
        if not trainer.sanity_checking:
            self._validated = True
            self._latest = self._value(trainer)

    def should_end_task(self, trainer: L.Trainer) -> bool:
        """Whether the task should end now; the same answer on every process."""
        if trainer.enable_validation and not self._validated and any(trainer.num_val_batches):
            return False
        self._validated = False
        value = self._value(trainer) if self._latest is None else self._latest
        if value is None:
            raise MisconfigurationException(
                f"`TaskEarlyStopping(monitor={self.monitor!r})` found no such metric; logged were"
                f" {sorted(trainer.callback_metrics)}. Log it by `self.log` in `validation_step`, or monitor one of"
                " these."
            )
        gain = 0.0 if self._best is None else (self._best - value if self.mode == "min" else value - self._best)
        if self._best is None or gain > self.min_delta:
            self._best, self._epochs = value, 0
        else:
            self._epochs += 1
        return self._epochs >= self.patience

    def _value(self, trainer: L.Trainer) -> float | None:
        """Return the metric, averaged over the processes that logged it: the same on all, as is the state."""
        value = trainer.callback_metrics.get(self.monitor)
        own = [0.0, 0.0] if value is None else [float(value), 1.0]
        total, number = trainer.strategy.reduce(
            torch.tensor(own, device=trainer.strategy.root_device), reduce_op="sum"
        ).tolist()
        return total / number if number else None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the epochs since, and what is not yet counted."""
        state = {"best": self._best, "epochs": self._epochs}
        return {**state, "validated": self._validated, "latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._best, self._epochs = state_dict["best"], state_dict["epochs"]
        self._validated, self._latest = state_dict["validated"], state_dict["latest"]


def restore(
    checkpoint: str | Path, model: L.LightningModule, callbacks: Iterable[L.Callback], *, weights_only: bool = True
) -> None:
    """Load a deployed model for its next update: its weights, and what the callbacks know.

    Unlike ``trainer.fit(ckpt_path=)`` this takes nothing of the old run's course: no epoch counters, no optimizer
    state. The next fit is the next task.

    Args:
        checkpoint: A file, or an address that fsspec knows, which ``trainer.save_checkpoint`` (or a checkpoint
            callback) wrote.
        model: A module of the checkpoint's architecture; its weights and buffers are replaced.
        callbacks: The callbacks that will be given to the next Trainer. One about which the checkpoint knows nothing
            keeps its state, with a warning.
        weights_only: Whether to load nothing but tensors and plain values. A checkpoint that you trust may hold other
            objects, as hyperparameters; load it with False.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a `TaskStream` is among the callbacks, or the checkpoint holds objects of other kinds.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> deployed, model = BoringModel(), BoringModel()
        >>> trainer = L.Trainer(max_epochs=1, barebones=True, accelerator="cpu")
        >>> trainer.fit(deployed)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(f"{folder}/deployed.ckpt")
        ...     restore(f"{folder}/deployed.ckpt", model, [])
        >>> torch.equal(model.layer.weight, deployed.layer.weight)
        True
    """
    path = os.fspath(checkpoint)
    callbacks = list(callbacks)
    if any(isinstance(one, TaskStream) for one in callbacks):
        raise ValueError(
            "`restore` begins a new run, but got a `TaskStream`, which continues one. Resume a stream by"
            " `trainer.fit(model, datamodule=data, ckpt_path=...)`."
        )
    try:
        with fsspec.open(path, "rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no checkpoint {path!r}. Pass a file that `save_checkpoint` wrote."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path!r} holds more than tensors and plain values, for example among its hyperparameters. If you trust"
            " it, pass `weights_only=False`."
        ) from error
    if _host.is_overridden("configure_model", model):
        model.configure_model()  # makes the layers whose weights are loaded
    model.on_load_checkpoint(loaded)
    model.load_state_dict(loaded["state_dict"])
    states = loaded.get("callbacks", {})
    for callback in callbacks:
        if callback.state_key not in states:
            rank_zero_warn(f"{path!r} holds nothing about {callback.state_key}: it begins with what it has.")
            continue
        callback.load_state_dict(states[callback.state_key])
        if isinstance(callback, ContinualCallback) and callback._in_task:
            rank_zero_warn(
                f"{path!r} was saved inside a task: what {callback.state_key} learns at the task's end is not in"
                " it. Save by `trainer.save_checkpoint(...)` after `fit`."
            )
            callback._in_task = False
            callback._tasks_ended += 1


def _stream(trainer: L.Trainer) -> TaskStream | None:
    return next((one for one in _host.callbacks_of(trainer) if isinstance(one, TaskStream)), None)


def _latest_task(trainer: L.Trainer) -> int:
    """Return the task that this fit trains, without a stream; a callback added later may know of fewer tasks."""
    callbacks = _host.callbacks_of(trainer)
    return max(one._current_task(trainer) for one in callbacks if isinstance(one, ContinualCallback))


def _start(callback: L.Callback, trainer: L.Trainer, task: int) -> None:
    if (method := getattr(callback, "on_task_start", None)) is not None:
        method(trainer, trainer.lightning_module, task)
    if isinstance(callback, ContinualCallback):
        callback._in_task = True


def _end(callback: L.Callback, trainer: L.Trainer, task: int) -> None:
    if (method := getattr(callback, "on_task_end", None)) is not None:
        method(trainer, trainer.lightning_module, task)
    if isinstance(callback, ContinualCallback):
        callback._in_task, callback._tasks_ended = False, task + 1


def _raise_if_at_limit(trainer: L.Trainer) -> None:
    """Raise if a fit trained nothing for the sole reason that an earlier one came to its end."""
    epochs, steps = _host.epochs_processed(trainer), trainer.global_step
    if trainer.limit_train_batches != 0 and (epochs > 0 or steps > 0):
        raise MisconfigurationException(
            f"This fit trained nothing: the Trainer had already reached its limit (`max_epochs={trainer.max_epochs}`,"
            f" `max_steps={trainer.max_steps}`) after {epochs} epochs and {steps} steps. Make a new Trainer for each"
            " fit, or raise its limits."
        )
