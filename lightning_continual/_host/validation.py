"""Scores on the validation data of the task in training, of all of it or of a share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from lightning_continual._datasets import num_samples
from lightning_continual._host.loaders import in_order, num_batches, validation_limit
from lightning_continual._host.loops import data_module_of
from lightning_continual._host.scoring import score

_ERRORS = {
    *("loss", "error", "err", "mse", "rmse", "mae", "mape", "msle", "smape", "nll", "bce", "crossentropy", "entropy"),
    *("perplexity", "ppl", "wer", "cer", "fid", "brier", "ece", "deviance", "hinge", "kl"),
}


def is_error(monitor: str) -> bool:
    """Return whether a name, as ``"val_loss"`` or ``"test/rmse"``, is that of a score of which less is better."""
    words = set(re.split(r"[^a-z]+", monitor.lower()))
    return bool(words & _ERRORS) or "loss" in monitor.lower()


def warn_of_direction(callback: Any) -> None:
    """Warn where by its name the ``monitor`` of a callback is better the lower it is, and it takes high for good."""
    if callback.monitor is not None and callback.higher_is_better and is_error(callback.monitor):
        rank_zero_warn(
            f"`{type(callback).__name__}` takes a high {callback.monitor!r} for good. If it is a loss or an error, pass"
            " `higher_is_better=False`."
        )


def validation_loader(trainer: Any, task: int, who: str) -> Any:
    """Return the loader of a task's validation data.

    That is of a `ContinualDataModule` the task's ``"val"`` data, every sample once; else the Trainer's only validation
    loader.

    Raises:
        MisconfigurationException: If there is none, or there are several; ``who`` needs it.
    """
    data = data_module_of(trainer)
    if hasattr(data, "evaluation_dataloader"):
        if (loader := data.evaluation_dataloader(task, "val")) is not None:
            return loader
        raise MisconfigurationException(
            f"`{who}` needs validation data, but task {task} has none. Pass `val=` to the task, `val_fraction=` to"
            " `ContinualDataModule`, or `threshold=`."
        )
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and loop._data_source.is_defined():
        loop.setup_data()  # as Lightning does when it first validates
    loaders = trainer.val_dataloaders
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    if len(loaders) != 1 or loaders[0] is None:
        found = 0 if loaders in ([None], []) else len(loaders)
        raise MisconfigurationException(
            f"`{who}` needs the task's validation data, one loader, but found {found}. Pass it to `fit` (and leave"
            " `limit_val_batches` above 0), or pass `threshold=`."
        )
    return loaders[0]


class LastValidation:
    """The score that the fit's own validation has found, as long as the module stays what it was."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self._found: tuple[Any, float] | None = None  # of which state of training

    def note(self, trainer: Any) -> None:
        """Remember the score; to be called in ``on_validation_end``."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and not trainer.sanity_checking:
            self._found = _state_of(trainer), float(value)

    def score(self, trainer: Any, otherwise: Callable[[], float]) -> Callable[[], float] | None:
        """Return what gives the score of the module as it is, where the fit ends every epoch with validation.

        A run resumed after such a validation does not know it, nor do several processes, which may have logged what
        each one found, nor where an average of the weights is what is validated. They ask ``otherwise``, at a cost, and
        else go on as others do.
        """
        every = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0
        if not trainer.enable_validation or not every:
            return None
        if trainer.world_size > 1 or any(isinstance(one, WeightAveraging) for one in trainer.callbacks):
            return otherwise
        state, value = self._found or (None, 0.0)
        return otherwise if state != _state_of(trainer) else lambda: value


def _state_of(trainer: Any) -> tuple[int, int]:
    """Return numbers that differ after a step, and after a parameter or buffer is written to."""
    module = trainer.lightning_module
    return trainer.global_step, sum(one._version for one in [*module.parameters(), *module.buffers()])


def share_of(trainer: Any, loader: Any, parts: int) -> Any:
    """Return a loader over one of so many parts of what is validated, in full batches; drawn, and always the same.

    Every process has as many samples. There is none (``None``) for iterable data, and for less than ``parts`` batches.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    size, most, batches = num_samples(loader.dataset), validation_limit(trainer, loader), num_batches(loader)
    if size is None or batches is None or min(batches, most or batches) < parts or loader.batch_size is None:
        return None
    batches = min(batches, most or batches)
    size = min(size, batches * loader.batch_size * trainer.world_size)
    number = batches // parts * loader.batch_size * trainer.world_size
    # Drawn: where labels come in turns, every so-manieth sample would be of one class.
    places = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:number].sort().values.tolist()
    return in_order(loader, places[trainer.global_rank :: trainer.world_size])


def monitored(
    trainer: Any,
    loader: Any,
    monitor: str,
    who: str,
    *,
    limit: int | None = None,
    tick: Callable[[], Any] | None = None,
) -> float:
    """Return what the module's ``validation_step`` logs under ``monitor`` for a loader; see `score`.

    Raises:
        MisconfigurationException: If there is no such metric; the error lists what there is.
    """
    logged = score(trainer, loader, limit=limit or validation_limit(trainer, loader), tick=tick)
    if monitor not in logged:
        raise MisconfigurationException(
            f"`{who}(monitor={monitor!r})` found no such metric; `validation_step` logged {sorted(logged)}. Monitor one"
            " of these, or log it by `self.log`."
        )
    return float(logged[monitor])
