"""How networks are trained and scored when many are compared: by their own steps, on one device, and quietly."""

from __future__ import annotations

import logging
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_continual import _host
from lightning_continual._host.validation import is_error


@dataclass(frozen=True)
class Setting:
    """How networks are trained and scored: by their own ``training_step`` and ``validation_step``, and a Trainer.

    Args:
        data: A LightningDataModule, or training and validation loader.
        monitor: What ``validation_step`` logs as the score.
        lower_is_better: Whether lower scores are better, as of a loss. By default the name tells: they are where one of
            its words, as of ``"val_loss"`` or ``"test/rmse"``, is that of an error.
        accelerator: See ``Trainer``; networks are on one device.

    Example:
        >>> from lightning_continual.demo import DigitsClassifier
        >>> from torch.utils.data import DataLoader
        >>> model, loader = DigitsClassifier(), DataLoader([(torch.zeros(64), 3)])
        >>> Setting((loader, loader), monitor="val_acc").score(model) in (0.0, 1.0)
        True
        >>> Setting((loader, loader), monitor="f1").score(model)
        Traceback (most recent call last):
        ValueError: `monitor='f1'` was not logged by `validation_step`, which logged ['val_acc']. Monitor one of these,
        or log it by `self.log`.
    """

    data: Any
    monitor: str = "val_acc"
    lower_is_better: bool | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        if self.lower_is_better is None:
            object.__setattr__(self, "lower_is_better", is_error(self.monitor))

    def score(self, network: L.LightningModule, *callbacks: L.Callback, accelerator: str | None = None) -> float:
        """Return what the network's ``validation_step`` logs as ``monitor``; the global random state is left alone.

        Raises:
            ValueError: If that is nothing; the error lists what there is.
        """
        with quiet(), _seeded(0):
            trainer = self._trainer(callbacks, accelerator or self.accelerator)
            if isinstance(self.data, L.LightningDataModule):
                results = trainer.validate(network, datamodule=self.data, verbose=False)
            else:
                results = trainer.validate(network, self.data[1], verbose=False)
        logged = {key: float(value) for one in results for key, value in one.items()}
        if self.monitor not in logged:
            remedy = "Monitor one of these, or log it by `self.log`." if logged else "Pass data for validation, too."
            raise ValueError(
                f"`monitor={self.monitor!r}` was not logged by `validation_step`, which logged {sorted(logged)}."
                f" {remedy}"
            )
        return logged[self.monitor]

    def fit(self, network: L.LightningModule, epochs: int, seed: int, *callbacks: L.Callback) -> float:
        """Train the network with its own optimizer, in place; the global random state is left alone.

        Returns:
            Seconds.
        """
        start = time.perf_counter()
        with quiet(), _seeded(seed):
            trainer = self._trainer(callbacks, self.accelerator, max_epochs=epochs)
            if isinstance(self.data, L.LightningDataModule):
                trainer.fit(network, datamodule=self.data)
            else:
                trainer.fit(network, *self.data)
        return time.perf_counter() - start

    def _trainer(self, callbacks: Sequence[L.Callback], accelerator: str, **options: Any) -> L.Trainer:
        return L.Trainer(
            accelerator=accelerator,
            devices=1,
            callbacks=list(callbacks),
            logger=DummyLogger(),  # for modules that write to their logger
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning tells of devices, loaders and limits with each of many short runs.

    Example:
        >>> with quiet():
        ...     logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
        False
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _host.random_state_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)
        yield
