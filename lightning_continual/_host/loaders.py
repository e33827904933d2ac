"""Loaders: the Trainer's own, and ours over the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_continual._datasets import num_samples, require_num_samples
from lightning_continual._host.loops import fast_dev_run


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


def train_batch_size(trainer: Any) -> Any:
    """Return the ``batch_size`` of the training loader, or ``None`` where it has none."""
    return getattr(trainer.train_dataloader, "batch_size", None)


def num_train_samples(trainer: Any) -> int | None:
    """Return the size of the training set over all processes, or ``None`` where it cannot be told."""
    loader = trainer.train_dataloader
    return num_samples(loader.dataset) if isinstance(loader, DataLoader) else None


def num_batches(loader: Any) -> int | None:
    """Return the length of a loader, or ``None`` where it has none."""
    length: int | None = sized_len(loader)
    return length


def validation_limit(trainer: Any, loader: Any) -> int | None:
    """Return to how many batches of a loader the Trainer limits validation; ``None`` where it does not.

    Validation that is switched off, by 0, is no limit.
    """
    limit, length = trainer.limit_val_batches, num_batches(loader)
    if isinstance(limit, float):
        return None if limit in (0.0, 1.0) or length is None else max(1, int(length * limit))
    return limit or None


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
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )


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


def prepare_loader(trainer: Any, loader: Any) -> Any:
    """Return the user's evaluation loader as the strategy wants it (a distributed sampler, a device's own loader)."""
    loader = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=RunningStage.VALIDATING)
    return trainer.strategy.process_dataloader(loader)


def to_device(trainer: Any, batch: Any) -> Any:
    """Take a batch the way to the device: precision, the batch hooks, transfer."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
