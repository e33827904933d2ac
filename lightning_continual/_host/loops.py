"""What a Trainer has, where training stands, and how far it goes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import model_helpers


def callbacks_of(trainer: Any) -> list[Any]:
    """Return the callbacks, in the order in which they are called."""
    return list(trainer.callbacks)


def set_callbacks(trainer: Any, callbacks: list[Any]) -> None:
    """Replace the list of callbacks; the old list, over which Lightning may be walking, is left alone."""
    trainer.callbacks = callbacks


def is_checkpoint(callback: Any) -> bool:
    """Whether Lightning runs this callback after all others, as it does with those that save checkpoints."""
    return any(base.__name__ == "Checkpoint" for base in type(callback).__mro__)


def data_module_of(trainer: Any) -> Any:
    """Return the data module of this fit, or ``None``."""
    return trainer.datamodule


def fast_dev_run(trainer: Any) -> int:
    """Return the number of batches of ``Trainer(fast_dev_run=)``, 0 where it is off."""
    return int(trainer.fast_dev_run)


def is_compiled(pl_module: Any) -> bool:
    """Whether the module was passed through ``torch.compile``."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def is_overridden(name: str, owner: Any) -> bool:
    """Whether a module or callback defines a hook that Lightning, under either of its names, leaves to users."""
    parent = next(one for one in type(owner).__mro__ if one.__name__ in ("LightningModule", "Callback"))
    return model_helpers.is_overridden(name, owner, parent)


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


def leave_epoch(trainer: Any) -> None:
    """Let a run resumed from an epoch's last batch begin the next epoch at its first batch, however long it is.

    Lightning compares the batches done with the length of the loader, which by then is the next task's.
    """
    if trainer.fit_loop.epoch_loop.restarted_on_train_batch_end:
        trainer.fit_loop.epoch_loop.batch_progress.current.completed = trainer.num_training_batches


def steps_now(trainer: Any) -> bool:
    """Whether this batch is the last that is accumulated before the optimizer's step."""
    return not trainer.fit_loop._should_accumulate()


def logs_now(trainer: Any) -> bool:
    """Whether the Trainer gives to its loggers what is logged in this ``on_train_batch_end``."""
    accumulates = trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()
    return bool(trainer._logger_connector.should_update_logs and not accumulates)
