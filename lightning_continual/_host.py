"""The one file that knows Lightning's private parts.

Everything here was measured with Lightning 2.6 and stands under test in ``tests/test__host.py``. The rest of the
package speaks to a Trainer through documented names and through this file.
"""

from __future__ import annotations

import atexit
import copy
import functools
import inspect
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import model_helpers
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchmetrics import Metric, MetricCollection
from tqdm.auto import tqdm

from lightning_continual._datasets import num_samples, require_num_samples
from lightning_continual.parameters import evaluating

# --- Methods of the user's objects, wrapped while a fit runs ----------------------------------------------------------

_Layers: TypeAlias = dict[Any, Callable[..., Any]]
_wrapped: WeakKeyDictionary[Any, dict[str, tuple[ref[Any], _Layers]]] = WeakKeyDictionary()
_observing: list[nn.Module] = []


def wrap_method(owner: Any, name: str, key: Any, layer: Callable[..., Any]) -> None:
    """Let ``layer(inner, *args, **kwargs)`` stand around ``owner.name``, where ``inner`` is what it stands around.

    Layers lie on each other in the order of their wrapping; wrapping again under the same ``key`` replaces the layer.
    They rest while we are `observing`, so that a batch looked at is the user's own. The owner's class is not touched,
    and after `unwrap_methods` of every key nothing of ours is left on the owner.
    """
    methods = _wrapped.setdefault(owner, {})
    if name in methods:
        methods[name][1][key] = layer
        return
    layers: _Layers = {key: layer}
    inner = getattr(owner, name)

    # Lightning looks through `__wrapped__` to tell which hooks a user has overridden.
    @functools.wraps(inner)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        method = inner
        for one in () if _observing else layers.values():
            method = functools.partial(one, method)
        return method(*args, **kwargs)

    methods[name] = ref(dispatch), layers
    setattr(owner, name, dispatch)


def unwrap_methods(key: Any) -> None:
    """Take away every layer that was put on under ``key``; a key without layers is no error."""
    for owner, methods in list(_wrapped.items()):
        for name, (dispatch, layers) in list(methods.items()):
            layers.pop(key, None)
            if layers:
                continue
            del methods[name]
            method = dispatch()
            if method is None or owner.__dict__.get(name) is not method:  # replaced since, or wrapped by somebody else
                continue
            inner = method.__wrapped__
            if getattr(inner, "__func__", None) is getattr(type(owner), name, None):
                delattr(owner, name)
            else:  # the user had put a method on the instance
                setattr(owner, name, inner)
        if not methods:
            del _wrapped[owner]


def batch_hook_owner(trainer: Any) -> Any:
    """Return the module or data module whose ``on_before_batch_transfer`` this fit calls."""
    return trainer._data_connector._datahook_selector.get_instance("on_before_batch_transfer")


def require_batch_hooks(pl_module: Any, who: str) -> None:
    """Raise if the module's ``training_step`` takes batches from the iterator itself, past every batch hook."""
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"`{who}` changes batches in `on_before_batch_transfer`, but `training_step(dataloader_iter)` takes them"
            " from the iterator, past every batch hook. Use `training_step(self, batch, batch_idx)`."
        )


# --- What a Trainer has -----------------------------------------------------------------------------------------------


def callbacks_of(trainer: Any) -> list[Any]:
    """Return the callbacks, in the order in which they are called."""
    return list(trainer.callbacks)


def set_callbacks(trainer: Any, callbacks: list[Any]) -> None:
    """Replace the list of callbacks; the old list, over which Lightning may be walking, is left alone."""
    trainer.callbacks = callbacks


def data_module_of(trainer: Any) -> Any:
    """Return the data module of this fit, or ``None``."""
    return trainer.datamodule


def fast_dev_run(trainer: Any) -> int:
    """Return the number of batches of ``Trainer(fast_dev_run=)``, 0 where it is off."""
    return int(trainer.fast_dev_run)


def is_compiled(pl_module: Any) -> bool:
    """Whether the module was passed through ``torch.compile``."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


# --- Where training stands --------------------------------------------------------------------------------------------


def epochs_processed(trainer: Any) -> int:
    """Return the number of epochs whose batches are all trained; it counts before ``on_train_epoch_end``."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def batches_processed(trainer: Any) -> int:
    """Return the number of batches trained over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def is_between_epochs(trainer: Any) -> bool:
    """Whether all batches of every epoch begun are trained, and ``on_train_epoch_end`` has come or is left out."""
    epoch = trainer.fit_loop.epoch_progress.current
    return bool(epoch.started <= epoch.processed)


def position(trainer: Any) -> tuple[int, int]:
    """Return ``(epoch, batches)``: the epoch that training is in or comes to next, and its batches already trained."""
    epoch, batches = epochs_processed(trainer), trainer.fit_loop.epoch_loop.batch_progress
    if is_between_epochs(trainer):
        return epoch, 0
    done = batches.is_last_batch and batches.current.processed == batches.current.ready
    return (epoch + 1, 0) if done else (epoch, batches.current.processed)


def forget_broken_epoch(trainer: Any) -> None:
    """Let an epoch that an exception broke off be begun anew, also in the counters that tell where a run resumes."""
    epochs, batches = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop.batch_progress
    for counter in (epochs.current, epochs.total, batches.total):
        counter.ready = counter.started = counter.completed = counter.processed


def epoch_was_cut_short(trainer: Any) -> bool:
    """Whether the epoch that ends now has untrained batches left (``stop``, ``max_steps``)."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def set_limits(trainer: Any, max_epochs: int, max_steps: int) -> None:
    """Set where the running fit ends; -1 is no limit."""
    trainer.fit_loop.max_epochs = max_epochs
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def reload_loaders(trainer: Any) -> None:
    """Make Lightning ask for new loaders: for training before the next epoch, for validation when it comes."""
    set_reloads_every(trainer, 1)
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def drop_early_loaders(trainer: Any) -> None:
    """Forget the loaders of which optimizers asked the length, where a checkpoint is loaded only after that (FSDP)."""
    if trainer.strategy.restore_checkpoint_after_setup:
        trainer.fit_loop._combined_loader = None


def reloads_every(trainer: Any) -> int:
    """Return the Trainer's ``reload_dataloaders_every_n_epochs``."""
    return int(trainer.reload_dataloaders_every_n_epochs)


def set_reloads_every(trainer: Any, num_epochs: int) -> None:
    """Set the Trainer's ``reload_dataloaders_every_n_epochs``, which it reads anew in every epoch."""
    trainer.reload_dataloaders_every_n_epochs = num_epochs


def leave_epoch(trainer: Any) -> None:
    """Let a run resumed from an epoch's last batch begin the next epoch at its first batch, however long it is.

    Lightning compares the batches done with the length of the loader, which by then is the next task's.
    """
    if trainer.fit_loop.epoch_loop.restarted_on_train_batch_end:
        trainer.fit_loop.epoch_loop.batch_progress.current.completed = trainer.num_training_batches


def load_loaders(trainer: Any) -> None:
    """Ask for new loaders now, if `reload_loaders` has been called."""
    trainer.fit_loop.setup_data()


def train_loader(trainer: Any) -> DataLoader[Any]:
    """Return the training loader, which must be a single one."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"One `torch.utils.data.DataLoader` is needed to read training data anew, but got {type(loader).__name__}."
        )
    return loader


def num_train_samples(trainer: Any) -> int | None:
    """Return the size of the training set over all processes, or ``None`` where it cannot be told."""
    loader = trainer.train_dataloader
    return num_samples(loader.dataset) if isinstance(loader, DataLoader) else None


def in_order(loader: DataLoader[Any], places: Sequence[int]) -> DataLoader[Any]:
    """Return a loader over ``places`` of a loader's data set, in this order, with the same workers.

    Batches are of the same size too; with a batch sampler that has no ``batch_size``, of 32.
    """
    batch_size = loader.batch_size
    if batch_size is None and loader.batch_sampler is not None:
        batch_size = getattr(loader.batch_sampler, "batch_size", 32)
    return DataLoader(
        Subset(loader.dataset, places),
        batch_size=batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )


def repeated_samples(trainer: Any) -> int:
    """Return how many of the samples in the batch now trained are repetitions that only even out the processes."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return 0
    last = (sampler.num_samples - 1) // (trainer.train_dataloader.batch_size or 1)
    if trainer.fit_loop.epoch_loop.batch_idx != last:
        return 0
    own = range(sampler.rank, sampler.num_samples * sampler.num_replicas, sampler.num_replicas)
    return sum(place >= require_num_samples(sampler.dataset) for place in own)


def to_device(trainer: Any, batch: Any) -> Any:
    """Take a batch the way to the device: precision, the batch hooks, transfer."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def is_checkpoint(callback: Any) -> bool:
    """Whether Lightning runs this callback after all others, as it does with those that save checkpoints."""
    return any(base.__name__ == "Checkpoint" for base in type(callback).__mro__)


# --- Random state and processes ---------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Return the global random state of this process in tensors and numbers that load with ``weights_only=True``."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the random state, after an exception too (unlike Lightning's ``isolate_rng``)."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """Return every process's ``value`` in the order of ranks on the first process, and only the own on the others.

    A collective: every process must come here. Checkpoints are written by the first process, from its own state.
    """
    if not _is_distributed():
        return [value]
    distributed = torch.distributed
    first = distributed.get_rank() == 0
    values: list[Any] | None = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(value, values, dst=0)
    return [value] if values is None else values


@functools.cache
def leave_process_group_at_exit() -> None:
    """Leave the process group when Python exits: gloo's threads abort a process that exits inside it."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


# --- Scoring: what `trainer.validate` would log, in the middle of a fit -----------------------------------------------


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Give every torchmetrics metric inside ``module`` a fresh state, and all that it was back at the end."""
    metrics = [one for one in module.modules() if isinstance(one, Metric | MetricCollection)]
    saved = [dict(vars(one)) for one in metrics]
    lists = [(value, list(value)) for attributes in saved for value in attributes.values() if isinstance(value, list)]
    for one, attributes in zip(metrics, saved, strict=True):
        if isinstance(one, MetricCollection):  # which of its metrics share a state is found out at the first update
            attributes["_groups"] = copy.deepcopy(one._groups)
        else:
            one.reset()  # empties lists in place
    try:
        yield
    finally:
        for one, attributes in zip(metrics, saved, strict=True):
            vars(one).clear()
            vars(one).update(attributes)
        for value, entries in lists:
            value[:] = entries


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give ``module`` its buffers back, whether they are written into or replaced."""
    saved = [(one._buffers, dict(one._buffers)) for one in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffers, before in saved:
            buffers.update(before)
        for buffer, value in values:
            buffer.copy_(value)


@contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Look at a module without leaving a trace: in evaluation mode, without gradients.

    Metrics, buffers, modes and the random state are afterwards as before.
    """
    _observing.append(module)
    try:
        with random_state_kept(), torch.no_grad(), _metrics_kept(module), _buffers_kept(module), evaluating(module):
            yield
    finally:
        _observing.pop()


@contextmanager
def _validating(trainer: Any) -> Iterator[_ResultCollection]:
    """Let ``self.log`` write into results of our own, and leave the Trainer's results and metrics as they were."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    names = "_current_fx", "_first_loop_iter", "_progress_bar_metrics", "_callback_metrics", "_logged_metrics"
    saved = {name: getattr(connector, name) for name in names}
    results, stage, function = loop._results, trainer.state.stage, trainer.lightning_module._current_fx_name
    try:
        loop._results = _ResultCollection(training=False)
        connector._current_fx = connector._first_loop_iter = None
        for name in names[2:]:
            setattr(connector, name, dict(saved[name]))
        trainer.validating = True
        yield loop._results
    finally:
        loop._results, trainer.state.stage = results, stage
        trainer.lightning_module._current_fx_name = function
        for name, value in saved.items():
            setattr(connector, name, value)


def _join_processes(results: _ResultCollection) -> None:
    """Let each logged value be that of all processes' batches, whether ``self.log`` was told ``sync_dist`` or not.

    Lightning averages the numbers of samples in integers, which is wrong where processes have unequally many.
    """
    if not _is_distributed():
        return
    logged = {key: one for key, one in results.items() if one.is_tensor and one.meta.on_epoch}
    own = {
        key: (one.value.cpu(), getattr(one, "cumulated_batch_size", torch.tensor(1)).cpu())
        for key, one in logged.items()
    }
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    for key, one in logged.items():
        values, sizes = zip(*(part[key] for part in parts if key in part), strict=True)
        if one.meta.is_max_reduction or one.meta.is_min_reduction:
            one._computed = one.meta.reduce_fx(torch.stack(values))
        else:
            one._computed = sum(values) / sum(sizes) if one.meta.is_mean_reduction else sum(values)


def score(
    trainer: Any, loader: Iterable[Any], *, limit: int | None = None, tick: Callable[[], Any] | None = None
) -> Any:
    """Return what ``trainer.validate`` would log for ``loader``, on the module as it stands in this fit.

    The module's validation hooks and its ``validation_step`` run; callbacks do not. Modes, gradients, metrics (logged
    and torchmetrics), and the random state are afterwards as before. Under several processes a collective.

    Args:
        trainer: A Trainer inside ``fit``.
        loader: Batches for ``validation_step``.
        limit: The largest number of batches; all when ``None``.
        tick: Called after every batch.

    Returns:
        The logged values by key, as floats.
    """
    module, connector = trainer.lightning_module, trainer._logger_connector
    takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)

    def hook(name: str, *args: Any) -> None:
        call._call_lightning_module_hook(trainer, name, *args)

    with observing(module), _validating(trainer) as results:
        hook("on_validation_model_eval")
        hook("on_validation_start")
        hook("on_validation_epoch_start")
        for index, batch in enumerate(loader):
            if limit is not None and index >= limit:
                break
            batch = to_device(trainer, batch)
            connector.on_batch_start(batch)
            hook("on_validation_batch_start", batch, index)
            output = call._call_strategy_hook(
                trainer, "validation_step", *((batch, index) if takes_index else (batch,))
            )
            hook("on_validation_batch_end", output, batch, index)
            connector.on_batch_end()
            if tick is not None:
                tick()
        connector.epoch_end_reached()
        hook("on_validation_epoch_end")
        _join_processes(results)
        logged = results.metrics(on_step=False)["callback"]
        hook("on_validation_end")
        return {key: float(value) for key, value in logged.items() if isinstance(value, Tensor | float | int)}


def is_overridden(name: str, pl_module: Any) -> bool:
    """Whether a module defines a hook that Lightning, under either of its names, leaves to users."""
    parent = next(one for one in type(pl_module).__mro__ if one.__name__ == "LightningModule")
    return model_helpers.is_overridden(name, pl_module, parent)


def num_batches(loader: Any) -> int | None:
    """Return the length of a loader, or ``None`` where it has none."""
    length: int | None = sized_len(loader)
    return length


def prepare_loader(trainer: Any, loader: Any) -> Any:
    """Return the user's evaluation loader as the strategy wants it (a distributed sampler, a device's own loader)."""
    loader = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=RunningStage.VALIDATING)
    return trainer.strategy.process_dataloader(loader)


# --- Progress of work beyond the training step ------------------------------------------------------------------------


@contextmanager
def progress(trainer: Any, total: int | None, description: str) -> Iterator[Callable[[], Any]]:
    """Show a bar for ``total`` pieces of work beside the Trainer's own bar, and yield what advances it by one.

    Nothing is shown where the Trainer shows no bar: when it is disabled, and on all but the first process.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled or not trainer.is_global_zero:
        yield lambda: None
    elif (rich := getattr(bar, "progress", None)) is not None:
        task = rich.add_task(description, total=math.inf if total is None else total)
        try:
            yield lambda: (rich.update(task, advance=1), bar.refresh())
        finally:
            # Hidden, not removed: Lightning's Rich bar counts on the ids of its own tasks.
            rich.update(task, visible=False)
            rich.refresh()
    else:
        with tqdm(total=total, desc=description, leave=False, dynamic_ncols=True, file=sys.stdout) as line:
            yield lambda: line.update(1)


# --- Gradients: where a penalty joins them, and how importance is read from them --------------------------------------


def require_visible_gradients(trainer: Any, who: str) -> None:
    """Raise if the strategy keeps gradients where a callback cannot see them by parameter."""
    strategy = type(trainer.strategy).__name__
    if strategy in ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"):
        raise MisconfigurationException(
            f"`{who}` needs the whole gradient of each parameter, but `{strategy}` shards them. Use 'ddp', or one"
            " device."
        )


def loss_scale(trainer: Any) -> float:
    """Return the factor by which a GradScaler lifts the loss out of the rounding of half precision; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def gradient_scale(trainer: Any, optimizer: Any) -> float:
    """Return the factor of the gradients in ``on_before_optimizer_step``.

    It is 1, but with a GradScaler and an optimizer that unscales by itself, as fused ones do.
    """
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0


def logs_now(trainer: Any) -> bool:
    """Whether the Trainer gives to its loggers what is logged in this ``on_train_batch_end``."""
    accumulates = trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()
    return bool(trainer._logger_connector.should_update_logs and not accumulates)


def all_sum(trainer: Any) -> Callable[[Tensor], Tensor]:
    """Return what sums a tensor over processes."""

    def reduce(value: Tensor) -> Tensor:
        if not _is_distributed():
            return value
        total = value.to(trainer.strategy.root_device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    return reduce


def train_data(trainer: Any, *, num_samples: int | None = None) -> DataLoader[Any]:
    """Return a loader over this process's share of the training data, in order, every sample once.

    Args:
        trainer: A Trainer inside ``fit``.
        num_samples: The number of samples over all processes, spread evenly over the data; all when ``None``, and as
            many as are trained in a ``fast_dev_run``.
    """
    loader = train_loader(trainer)
    size = require_num_samples(loader.dataset)
    limits = [size, *([] if num_samples is None else [num_samples])]
    if fast_dev_run(trainer):
        limits.append(fast_dev_run(trainer) * (loader.batch_size or 1) * trainer.world_size)
    chosen = [place * size // min(limits) for place in range(min(limits))]
    return in_order(loader, chosen[trainer.global_rank :: trainer.world_size])


@functools.cache
def _internal_attributes() -> frozenset[str]:
    return frozenset(vars(LightningModule()))


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Give ``module`` back what its own code keeps in attributes, as counters and lists of outputs."""
    internal, saved = _internal_attributes(), []
    for one in module.modules():
        own = {name: value for name, value in vars(one).items() if name not in internal}
        collections = [
            (value, copy.copy(value)) for value in own.values() if isinstance(value, list | deque | dict | set)
        ]
        saved.append((vars(one), own, collections))
    try:
        yield
    finally:
        for attributes, own, collections in saved:
            for name in attributes.keys() - own.keys() - internal:
                del attributes[name]
            attributes.update(own)
            for value, before in collections:
                value.clear()
                value.extend(before) if isinstance(value, list | deque) else value.update(before)


@contextmanager
def without_trace(module: Any) -> Iterator[None]:
    """Call ``training_step`` with nothing logged, and all that the module keeps as before afterwards.

    That is its metrics, buffers and plain attributes, and the random state.
    """
    own = vars(module).get("log")
    _observing.append(module)
    module.log = lambda *args, **kwargs: None
    try:
        with random_state_kept(), _attributes_kept(module), _metrics_kept(module), _buffers_kept(module):
            yield
    finally:
        _observing.pop()
        if own is None:
            del module.log
        else:
            module.log = own


def training_loss(trainer: Any, batch: Any) -> Tensor:
    """Return the loss of ``training_step`` for a batch on the device; to be called `without_trace`."""
    module = trainer.lightning_module
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    arguments = (batch, 0) if takes_index else (batch,)
    with trainer.precision_plugin.train_step_context():
        return loss_of(module.training_step(*arguments))


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a ``training_step`` returned: a tensor, or a mapping with the key ``"loss"``."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"`training_step` must return a loss (a tensor, or a mapping with the key 'loss'), but returned {output!r}."
        )
    return loss
