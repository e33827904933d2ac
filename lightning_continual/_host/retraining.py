"""Training inside a fit, at a boundary: with the user's own ``training_step`` and optimizers, and nothing else."""

from __future__ import annotations

import math
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.progress import _BatchProgress, _Progress, _SchedulerProgress
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_continual._datasets import num_samples
from lightning_continual._host.loaders import in_order, num_batches, to_device, train_loader
from lightning_continual._host.loops import fast_dev_run
from lightning_continual._host.methods import observing_now
from lightning_continual._host.processes import gather_everywhere, is_distributed, random_state_kept
from lightning_continual._host.traces import _attributes_kept, _metrics_kept


def retrain(trainer: Any, callback: Any, *, epochs: int, seed: int, tick: Callable[[], Any] | None = None) -> None:
    """Train the module for some epochs more on the task's training data, as a new fit would.

    It is trained by its own ``training_step``, automatic or manual, with fresh optimizers and schedulers of its
    ``configure_optimizers`` (sized for these epochs), under the Trainer's strategy, precision, accumulation and
    clipping. Its hooks run; of callbacks only those of ``callback``. Nothing is logged. But for weights, buffers and
    gradients (then there are none) everything is afterwards as before: optimizers and schedulers, the counts of epochs
    and steps, metrics, attributes of the module, modes, the random state.

    Under several processes a collective.

    Args:
        trainer: A Trainer inside ``fit``.
        callback: The callback that trains.
        epochs: How many epochs.
        seed: Determines the order of the data and what is drawn at random.
        tick: Called after every batch.
    """
    module = trainer.lightning_module
    with _fit_kept(trainer), _quiet(trainer, module):
        trainer.callbacks = [callback]
        module.zero_grad(set_to_none=True)
        own, number = set(map(id, trainer.optimizers)), retraining_batches(trainer)
        trainer.fit_loop.max_batches = math.inf if number == sys.maxsize else number  # as Lightning has it
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = epochs, -1
        _seed(seed, trainer.global_rank)
        trainer.strategy.setup_optimizers(trainer)
        for optimizer in trainer.optimizers:
            if id(optimizer) in own:  # made once by the module, which returns it again
                optimizer.state = defaultdict(dict)
        for epoch in range(epochs):
            _train_epoch(trainer, _shuffled(trainer, f"{seed}/{epoch}"), tick)
        module.zero_grad(set_to_none=True)


def retraining_batches(trainer: Any) -> int:
    """Return how many batches of each process `retrain` trains in an epoch; ``sys.maxsize`` where none can tell."""
    loader, size = train_loader(trainer), _plain_size(train_loader(trainer))
    if size is None:
        length = num_batches(loader)
    else:
        own, batch_size = -(-size // trainer.world_size), loader.batch_size or 1
        length = max(1, own // batch_size) if loader.drop_last else -(-own // batch_size)
    limit = fast_dev_run(trainer) or trainer.limit_train_batches
    if length is None:
        return limit if isinstance(limit, int) else sys.maxsize
    return max(1, min(length, limit) if isinstance(limit, int) else int(length * limit))


@contextmanager
def weights_kept(module: nn.Module, *, if_broken_off: bool = False) -> Iterator[None]:
    """Give a module the values of its parameters and buffers back; meanwhile there is one copy of them.

    Buffers are given back whether they are written into or replaced.

    Args:
        module: The module.
        if_broken_off: Do so only after an exception.
    """
    owners = [(one._buffers, dict(one._buffers)) for one in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    saved = [one.detach().clone() for one in tensors]
    is_through = False
    try:
        yield
        is_through = True
    finally:
        if not (is_through and if_broken_off):
            for buffers, before in owners:
                buffers.update(before)
            with torch.no_grad():
                for one, value in zip(tensors, saved, strict=True):
                    one.data.copy_(value)


def share_buffers(module: nn.Module) -> None:
    """Let every process have the first one's buffers. A collective."""
    for one in module.buffers():
        if is_distributed():
            one.copy_(gather_everywhere(one.cpu())[0])


def raise_if_told_to_stop(trainer: Any) -> None:
    """Raise what a fit raises where a process was told to terminate, on all processes. A collective."""
    if any(gather_everywhere(bool(trainer.received_sigterm))):
        raise SIGTERMException


def _train_epoch(trainer: Any, batches: Iterable[Any], tick: Callable[[], Any] | None) -> None:
    loop, module = trainer.fit_loop.epoch_loop, trainer.lightning_module
    loop.batch_progress.reset_on_run()
    loop.batch_progress.is_last_batch = False
    call._call_lightning_module_hook(trainer, "on_train_epoch_start")
    is_sized = num_batches(train_loader(trainer)) is not None
    for index, (batch, is_last) in enumerate(_with_end(batches, trainer.fit_loop.max_batches, is_sized)):
        batch = to_device(trainer, batch)
        loop.batch_progress.increment_ready()
        loop.batch_progress.is_last_batch = is_last
        call._call_callback_hooks(trainer, "on_train_batch_start", batch, index)
        if call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index) == -1:
            break
        arguments = loop._build_kwargs(OrderedDict(), batch, index)
        if module.automatic_optimization:
            output = loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            output = loop.manual_optimization.run(arguments)
        loop.batch_progress.increment_processed()
        loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        if loop.batch_progress.is_last_batch:
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        call._call_callback_hooks(trainer, "on_train_batch_end", output, batch, index)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", output, batch, index)
        loop.batch_progress.increment_completed()
        if tick is not None:
            tick()
    trainer.fit_loop.epoch_progress.increment_ready()
    trainer.fit_loop.epoch_progress.increment_started()
    trainer.fit_loop.epoch_progress.increment_processed()
    call._call_lightning_module_hook(trainer, "on_train_epoch_end")
    trainer.fit_loop.epoch_progress.increment_completed()


def _with_end(batches: Iterable[Any], most: float, is_sized: bool) -> Iterator[tuple[Any, bool]]:
    """Yield batches and whether each is the last; of data without a length, the next one is read to know it."""
    left = iter(batches) if most == math.inf else islice(batches, int(most))
    if is_sized:
        yield from ((batch, index + 1 == most) for index, batch in enumerate(left))
        return
    for batch in left:
        for following in left:
            yield batch, False
            batch = following
        yield batch, True


@contextmanager
def _fit_kept(trainer: Any) -> Iterator[None]:
    """Give a fit back its optimizers, counts, limits, callbacks and loggers, with counts of their own meanwhile."""
    fit, epoch, strategy = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.strategy
    fresh: list[tuple[Any, dict[str, Any]]] = [
        (
            epoch,
            {
                "batch_progress": _BatchProgress(),
                "scheduler_progress": _SchedulerProgress(),
                "automatic_optimization": _AutomaticOptimization(trainer),
                "manual_optimization": _ManualOptimization(trainer),
                "max_steps": epoch.max_steps,
            },
        ),
        (fit, {"epoch_progress": _Progress(), "max_batches": fit.max_batches, "max_epochs": fit.max_epochs}),
        (strategy, {name: getattr(strategy, name) for name in ("_optimizers", "_lightning_optimizers")}),
        (strategy, {"lr_scheduler_configs": strategy.lr_scheduler_configs}),
        (trainer, {"callbacks": trainer.callbacks, "_loggers": [DummyLogger() for _ in trainer.loggers]}),
    ]
    saved = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in fresh]
    optimizers, scaler = strategy.optimizers, trainer.precision_plugin.state_dict()
    states = [(one, one.state, [dict(group) for group in one.param_groups]) for one in optimizers]
    should_stop = trainer.should_stop
    try:
        for optimizer in optimizers:  # off the accelerator, where the fresh ones take their place
            _optimizer_to_device(optimizer, torch.device("cpu"))
        for owner, values in fresh:
            for name, value in values.items():
                setattr(owner, name, value)
        yield
    finally:
        for owner, values in saved:
            for name, value in values.items():
                setattr(owner, name, value)
        for optimizer, state, groups in states:
            if optimizer.state is not state:
                optimizer.state = state
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
            _optimizer_to_device(optimizer, strategy.root_device)
        trainer.precision_plugin.load_state_dict(scaler)
        trainer.should_stop = should_stop


@contextmanager
def _quiet(trainer: Any, module: Any) -> Iterator[None]:
    """Let the module log nothing, and keep what it keeps, but weights and buffers."""
    own, function = vars(module).get("log"), module._current_fx_name
    modes = [(one, one.training) for one in module.modules()]
    observing_now.append(module)
    module.log = lambda *args, **kwargs: None
    try:
        with random_state_kept(), _attributes_kept(module), _metrics_kept(module):
            yield
    finally:
        observing_now.pop()
        module._current_fx_name = function
        for one, mode in modes:
            one.training = mode
        if own is None:
            del module.log
        else:
            module.log = own


def _plain_size(loader: DataLoader[Any]) -> int | None:
    """Return the size of a loader's data if it serves every sample once, in order or shuffled; else ``None``."""
    size, sampler = num_samples(loader.dataset), loader.sampler
    has_own_way = type(loader).__iter__ is not DataLoader.__iter__ and not getattr(loader, "serves_its_sampler", False)
    if size is None or loader.batch_size is None or has_own_way:
        return None
    if isinstance(sampler, DistributedSampler):
        return size if sampler.dataset is loader.dataset else None
    if isinstance(sampler, RandomSampler):
        return None if sampler.replacement or sampler.num_samples != size else size
    return size if isinstance(sampler, SequentialSampler) else None


def _shuffled(trainer: Any, seed: str) -> Iterable[Any]:
    """Return an epoch of the training data: in an order of our own, or, with a sampler of the user's, in its order."""
    loader = train_loader(trainer)
    size = _plain_size(loader)
    if size is None:
        return loader
    if getattr(loader.sampler, "shuffle", not isinstance(loader.sampler, SequentialSampler)):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(_number(seed)))
    else:
        order = torch.arange(size)
    number = -(-size // trainer.world_size)
    own = order[(torch.arange(number) * trainer.world_size + trainer.global_rank) % size]
    if loader.drop_last and number >= (loader.batch_size or 1):
        own = own[: number - number % (loader.batch_size or 1)]
    ordered = in_order(loader, own.tolist())
    ordered.generator.manual_seed(_number(f"{seed}/workers of rank {trainer.global_rank}"))
    return ordered


def _number(seed: str) -> int:
    return random.Random(seed).getrandbits(48)


def _seed(seed: int, rank: int) -> None:
    """Seed all that is drawn from, each process with its own; to be called where the random state is kept."""
    number = _number(f"{seed}/rank {rank}")
    torch.manual_seed(number)
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number % 2**32)
