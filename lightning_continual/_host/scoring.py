"""What ``trainer.validate`` would log, in the middle of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_continual._host.loaders import to_device
from lightning_continual._host.loops import callbacks_of
from lightning_continual._host.processes import is_distributed
from lightning_continual._host.traces import observing
from lightning_continual.heads import at_task


def score(
    trainer: Any,
    loader: Iterable[Any],
    *,
    limit: int | None = None,
    tick: Callable[[], Any] | None = None,
    task: int | None = None,
) -> Any:
    """Return what ``trainer.validate`` would log for ``loader``, on the module as it stands in this fit.

    The module's validation hooks and its ``validation_step`` run; callbacks do not. Modes, gradients, metrics (logged
    and torchmetrics), and the random state are afterwards as before. Under several processes a collective.

    Args:
        trainer: A Trainer inside ``fit``.
        loader: Batches for ``validation_step``.
        limit: The largest number of batches; all when ``None``.
        tick: Called after every batch.
        task: The task whose network is scored: task heads are at it, and a callback that has learnt it (with `tasks`
            and `as_task`) shows what it sees. The module as it stands when ``None``.

    Returns:
        The logged values by key, as floats.
    """
    module, connector = trainer.lightning_module, trainer._logger_connector
    takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
    takes_loader = "dataloader_idx" in inspect.signature(module.validation_step).parameters

    def hook(name: str, *args: Any) -> None:
        call._call_lightning_module_hook(trainer, name, *args)

    with observing(module), _seen_by(trainer, task), _validating(trainer) as results:
        hook("on_validation_model_eval")
        hook("on_validation_start")
        hook("on_validation_epoch_start")
        for index, batch in enumerate(loader):
            if limit is not None and index >= limit:
                break
            batch = to_device(trainer, batch)
            connector.on_batch_start(batch)
            hook("on_validation_batch_start", batch, index)
            arguments = (batch, index) if takes_index else (batch,)
            loader_index = {"dataloader_idx": 0} if takes_loader else {}
            output = call._call_strategy_hook(trainer, "validation_step", *arguments, **loader_index)
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


@contextmanager
def _seen_by(trainer: Any, task: int | None) -> Iterator[None]:
    """Let the module be what a task sees: heads at the task, and what a callback that has learnt it makes of it."""
    with ExitStack() as stack:
        if task is not None:
            stack.enter_context(at_task(trainer.lightning_module, task))
            for one in callbacks_of(trainer):
                if hasattr(one, "as_task") and task in getattr(one, "tasks", ()):
                    stack.enter_context(one.as_task(trainer.lightning_module, task))
        yield


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
    if not is_distributed():
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
