"""Which arm each sample of a batch is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_continual import _batch, _host
from lightning_continual._datasets import labels_in_batch
from lightning_continual.data import seed_of
from lightning_continual.selection.sample_arms import ArmTable, cluster_centres, nearest

SampleArmsOf: TypeAlias = "Literal['class', 'kmeans'] | Callable[[Any], Tensor]"

_ANY_TASK = -1  # the group of arms that a user's function numbers


class Grouping:
    """Deals samples out to arms: by task and class, by clusters of features, or by a function.

    Args:
        arms: How.
        label: Returns the labels of a batch.
        features: Returns the features ``(B, D)`` of module and batch.
        num_clusters: Of k-means, for each task.

    Raises:
        ValueError: If ``arms`` is none of these.
    """

    def __init__(
        self,
        arms: SampleArmsOf,
        label: Callable[[Any], Tensor] | None,
        features: Callable[[Any, Any], Tensor] | None,
        num_clusters: int,
    ) -> None:
        if arms not in ("class", "kmeans") and not callable(arms):
            raise ValueError(
                f"`arms` of samples must be 'class', 'kmeans' or a function of the batch, but got {arms!r}. Pass"
                " `select='weights'` for arms of weights."
            )
        self.arms, self.label, self.features, self.num_clusters = arms, label, features, num_clusters
        self.table = ArmTable()
        self._centres: Tensor | None = None

    def start_task(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Find the clusters of a new task's samples, where they are wanted."""
        if self.arms == "kmeans":
            self._centres = self._cluster(trainer, pl_module, task)

    def of(self, pl_module: L.LightningModule, batch: Any, num_samples: int, task: int) -> Tensor:
        """Return the arm of each sample of a new batch ``(B,)``; all processes number new arms alike."""
        group = task
        if self.arms == "class":
            with with_remedy(
                "Or pass `arms=`, a function from a batch to the arm of each sample, whatever its labels."
            ):
                keys = labels_in_batch(batch, num_samples, self.label, "BanditSelectionCallback(arms='class')")
        elif self.arms == "kmeans":
            assert self._centres is not None
            keys = nearest(self._features_of(pl_module, batch, num_samples), self._centres)
        else:
            assert callable(self.arms)
            group, found = _ANY_TASK, self.arms(batch)
            if not isinstance(found, Tensor) or found.shape != (num_samples,) or found.is_floating_point():
                what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"`arms` must return one whole number a sample, ({num_samples},), but got {what}. Return a tensor"
                    " of the arm of each sample of the batch."
                )
            keys = found.detach().cpu().long()
        if _host.is_distributed():
            for unknown in _host.gather_everywhere(self.table.unknown(group, keys)):
                self.table.add(unknown)
        return self.table.numbers(group, keys)

    def _features_of(self, pl_module: L.LightningModule, batch: Any, num_samples: int) -> Tensor:
        if self.features is None:
            leaves, _ = _batch.flatten(batch)
            found: Any = next((leaf.flatten(1) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), None)
        else:
            with _host.observing(pl_module):
                found = self.features(pl_module, batch)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != num_samples:
            shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"`features` must return one row a sample, ({num_samples}, D), but got {shape}. Pass a function of"
                " module and batch that flattens or averages what is computed."
            )
        return found.detach().float().cpu()

    def _cluster(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> Tensor:
        _host.train_loader(trainer)
        size = _host.num_train_samples(trainer)
        if size is None:
            raise MisconfigurationException(
                "`BanditSelectionCallback(arms='kmeans')` reads training data before each task, but got an iterable"
                " data set. Use a map-style one, or arms that need no reading: `arms='class'`, or a function of the"
                " batch."
            )
        owner, features = _host.batch_hook_owner(trainer), [torch.empty(0, 0)]
        loader = _host.train_data(trainer, num_samples=min(10_000, size))
        with (
            _host.observing(pl_module),
            _host.progress(trainer, _host.num_batches(loader), f"Arms of task {task}") as tick,
        ):
            for batch in loader:
                seen = owner.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
                features.append(self._features_of(pl_module, seen, _batch.size(seen)))
                tick()
        own = torch.cat(features[1:])
        return cluster_centres(torch.cat(_host.gather_everywhere(own)), self.num_clusters, seed_of(task) % 2**32)

    def state_dict(self) -> dict[str, Any]:
        """Return the arms that are known, and the clusters."""
        return {"table": self.table.state_dict(), "centres": self._centres}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.table.load_state_dict(state_dict["table"])
        self._centres = state_dict["centres"]


@contextmanager
def with_remedy(remedy: str) -> Iterator[None]:
    """Add one more remedy to the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
