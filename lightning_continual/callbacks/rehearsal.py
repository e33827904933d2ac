"""Rehearsal: exemplars of past tasks in every training batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_continual import _batch, _host
from lightning_continual._datasets import labels_in_batch, labels_of, num_samples, require_num_samples
from lightning_continual.data import ContinualDataModule
from lightning_continual.memory import HerdingMemory, Memory, ReservoirMemory, Selection
from lightning_continual.stream import ContinualCallback


class RehearsalCallback(ContinualCallback):
    r"""Trains on past tasks beside the new one, from a memory of exemplars.

    Every training batch of B new samples is joined with past samples before it goes to the device, so that the module
    sees one batch and the gradient is that of

    .. math:: (1 - p)\, L_{new} + p\, L_{past}

    for a loss that is a mean over the batch, with p the ``proportion``: ``mode="add"`` keeps the B new samples and adds
    :math:`p / (1 - p) \cdot B` past ones; ``mode="replace"`` keeps the size of the batch, and so of the epoch:
    :math:`p B` of its samples (rounded) are past ones, in the place of as many new ones. In the first task, and where
    the memory holds fewer, there are fewer past samples or none.

    What the memory keeps is decided batch by batch in a task's first epoch, from the new samples only (with those that
    ``"replace"`` left out), so that nothing is remembered twice. Only exemplars of *earlier* tasks are rehearsed.

    Works with any batch: tensors, tuples, named tuples, lists, mappings, dataclasses, nested, and lists of strings.
    Under several processes each remembers its share of what it saw, ``memory`` being the capacity of all together.

    Args:
        memory: The number of exemplars of a `ReservoirMemory`, or a memory.
        proportion: Share p in [0, 1) of past samples. 0 does nothing.
        mode: ``"add"`` or ``"replace"``, see above.
        selection: Which exemplars join a batch, without repetition: ``"uniform"``; ``"recent"``, more of recent tasks;
            ``"balanced"``, all classes alike; or a function, see `Memory.draw`.
        label: For memories and selections that need labels: returns those of a batch ``(B,)``. By default the second
            part of a pair, or the entry ``"label"``, ``"labels"``, ``"y"`` or ``"target"`` of a mapping.
        features: For `HerdingMemory`: ``features(pl_module, batch)`` returns ``(B, D)``.
        reload: Remember where exemplars lie in their data sets, not the exemplars, and read them again each time, so
            that augmentation is drawn anew. Needs a `ContinualDataModule` of map-style data sets.

    Raises:
        ValueError: If an argument lies outside its range, a batch has nothing to index, or labels or features are
            needed and not found.
        MisconfigurationException: If the module takes its batches past every hook, or data that are to be read again
            cannot be.

    Example:
        >>> rehearsal = RehearsalCallback(memory=500, proportion=0.25)
        >>> len(rehearsal.memory)
        0

    References:
        - Harang & Sanders. *Catastrophic Forgetting in the Context of Model Updates.* arXiv 2306.10181, 2023.
        - Ratcliff. *Connectionist models of recognition memory.* Psychological Review 1990.
    """

    def __init__(
        self,
        memory: int | Memory = 2000,
        proportion: float = 0.5,
        *,
        mode: Literal["add", "replace"] = "add",
        selection: Selection = "uniform",
        label: Callable[[Any], Tensor] | None = None,
        features: Callable[[Any, Any], Tensor] | None = None,
        reload: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= proportion < 1:
            raise ValueError(
                f"`proportion` must lie in [0, 1), but got {proportion}. Pass the share of past samples in a batch, for"
                " example 0.5; 1 would train on the past alone."
            )
        if mode not in ("add", "replace"):
            raise ValueError(f"`mode` must be 'add' or 'replace', but got {mode!r}.")
        if not callable(selection) and selection not in ("uniform", "recent", "balanced"):
            raise ValueError(
                f"`selection` must be 'uniform', 'recent' or 'balanced', but got {selection!r}. Pass one of them, or a"
                " function of (tasks, labels, before) that returns weights."
            )
        self.memory = memory if isinstance(memory, Memory) else ReservoirMemory(memory)
        if self.memory.needs_features and features is None:
            raise ValueError(
                f"`{type(self.memory).__name__}` chooses exemplars by their features. Pass `features=`, a function of"
                " module and batch, for example `lambda module, batch: module.backbone(batch[0])`."
            )
        if self.memory.needs_features and reload:
            raise ValueError(f"`reload=True` cannot be combined with `{type(self.memory).__name__}`. Leave one out.")
        self.proportion = proportion
        self.mode = mode
        self.selection = selection
        self.label = label
        self.features = features
        self.reload = reload
        self._task = 0
        self._first_epoch = 0
        self._fresh: tuple[list[_batch.Leaf], Tensor | None] | None = None  # new samples in training, their labels
        self._datasets: dict[int, Dataset[Any]] = {}  # of past tasks, to reload from
        self._parts: list[dict[str, Any]] = []  # of the memory, one a process, until training starts
        self._process = 0, 1  # rank and number

    # --- During training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the method needs, and take this process's share of the memory."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._fresh, self._datasets = None, {}
        self._process = trainer.global_rank, trainer.world_size
        if self._parts:
            self.memory.load_state_dict(self._parts, *self._process)
        else:
            self.memory.distribute(*self._process)
        if self._is_neutral:
            return
        _host.require_batch_hooks(pl_module, type(self).__name__)
        if self.reload:
            self._data(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put rehearsal in front of the batch's way to the device."""
        self._parts = []
        super().on_train_start(trainer, pl_module)
        if not self._is_neutral:
            owner = _host.batch_hook_owner(trainer)
            _host.wrap_method(owner, "on_before_batch_transfer", self, partial(self._join_past, trainer))

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Rehearse what came before this task, and remember its first epoch."""
        self._task = task
        self._first_epoch = _host.epochs_processed(trainer)
        if self._is_neutral or not self._reads_again:
            return
        # Try what the task's end will do, for it to fail now.
        some = self._own_places(trainer)[:1]
        if self.reload and self._needs_labels:
            self._labels_at(trainer, pl_module, some)
        elif not self.reload:
            self._features_at(trainer, pl_module, some)

    def _join_past(self, trainer: L.Trainer, inner: Callable[..., Any], batch: Any, dataloader_idx: int) -> Any:
        batch = inner(batch, dataloader_idx)
        if not trainer.training:
            return batch
        leaves, rebuild = _batch.flatten(batch)
        num_new = len(leaves[0])
        if (batch_size := _host.train_batch_size(trainer)) not in (None, num_new):
            _batch.require_stacked(batch, batch_size)
        share = self.proportion if self.mode == "replace" else self.proportion / (1 - self.proportion)
        past = self.memory.draw(round(share * num_new), before=self._task, selection=self.selection)
        self._fresh = None
        if not self._reads_again and _host.epochs_processed(trainer) == self._first_epoch:
            labels = self._labels(batch, num_new) if self._needs_labels else None
            # Without past samples the module gets this very batch, and may change it in place.
            self._fresh = leaves if past else [_copy(leaf) for leaf in leaves], labels
        if not past:
            return batch
        if self.reload:
            past = _batch.flatten(inner(self._read(trainer, past), dataloader_idx))[0]
        if self.mode == "replace":
            leaves = [leaf[: num_new - len(past[0])] for leaf in leaves]
        return rebuild(_batch.join(leaves, past))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch's new samples, now that they are trained."""
        if self._fresh is None:
            return
        (leaves, labels), self._fresh = self._fresh, None
        if repeated := _host.repeated_samples(trainer):
            num_new = max(0, len(leaves[0]) - repeated)
            leaves = [leaf[:num_new] for leaf in leaves]
            labels = None if labels is None else labels[:num_new]
        self.memory.add(leaves, task=self._task, labels=labels)

    # --- At the boundary ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Choose the exemplars that can only be chosen among all of a task's samples."""
        if self._is_neutral:
            return
        if self.reload:
            self._remember_places(trainer, pl_module, task)
        elif isinstance(self.memory, HerdingMemory):
            self._herd(trainer, pl_module, self.memory, task)

    def _remember_places(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        own = self._own_places(trainer)
        places = torch.tensor(own, dtype=torch.int64)
        labels = self._labels_at(trainer, pl_module, own) if self._needs_labels else None
        self.memory.add([places, torch.full_like(places, task)], task=task, labels=labels)

    def _labels_at(self, trainer: L.Trainer, pl_module: L.LightningModule, places: Sequence[int]) -> Tensor:
        if self.label is None:
            return labels_of(Subset(self._loader(trainer).dataset, places))
        with _host.observing(pl_module):
            found = [self._labels(batch, _batch.size(batch)) for batch in self._batches(trainer, places)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    def _read(self, trainer: L.Trainer, past: list[_batch.Leaf]) -> Any:
        """Return a batch of the samples at places of past tasks, such as the loader gives to training."""
        places, tasks = (torch.as_tensor(leaf).tolist() for leaf in past)
        for task in set(tasks) - self._datasets.keys():
            self._datasets[task] = self._data(trainer).training_data(task)
        samples = [self._datasets[task][place] for task, place in zip(tasks, places, strict=True)]
        return trainer.precision_plugin.convert_input(self._loader(trainer).collate_fn(samples))

    def _herd(self, trainer: L.Trainer, pl_module: L.LightningModule, memory: HerdingMemory, task: int) -> None:
        own = self._own_places(trainer)
        features, labels = self._features_at(trainer, pl_module, own, f"Herding task {task}")
        chosen, ranks = memory.choose(features, labels)
        start = 0
        with _host.observing(pl_module):
            for batch in self._batches(trainer, [own[place] for place in chosen.tolist()]):
                leaves, _ = _batch.flatten(batch)
                some = slice(start, start := start + len(leaves[0]))
                memory.add(leaves, task=task, labels=labels[chosen[some]], ranks=ranks[some])

    def _features_at(
        self, trainer: L.Trainer, pl_module: L.LightningModule, places: Sequence[int], description: str = "Trying"
    ) -> tuple[Tensor, Tensor]:
        """Return features ``(N, D)`` and labels ``(N,)``."""
        assert self.features is not None
        features, labels = [], []
        num_batches = _host.num_batches(_host.in_order(self._loader(trainer), places))
        with _host.observing(pl_module), _host.progress(trainer, num_batches, description) as tick:
            for batch in self._batches(trainer, places):
                num = _batch.size(batch)
                labels.append(self._labels(batch, num))
                found = self.features(pl_module, trainer.strategy.batch_to_device(batch, dataloader_idx=0))
                if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != num:
                    shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                    raise ValueError(
                        f"`features` must return one row a sample, ({num}, D), but got {shape}. Flatten or average"
                        " what the module computes."
                    )
                features.append(found.float().cpu())
                tick()
        return torch.cat(features), torch.cat(labels)

    def _own_places(self, trainer: L.Trainer) -> list[int]:
        """Return this process's share of the places in the task's data set."""
        rank, world_size = self._process
        return list(range(rank, require_num_samples(self._loader(trainer).dataset), world_size))

    def _batches(self, trainer: L.Trainer, places: Sequence[int]) -> Iterator[Any]:
        """Yield the samples at ``places`` of the task's data set, ready for the transfer to the device."""
        owner = _host.batch_hook_owner(trainer)
        for batch in _host.in_order(self._loader(trainer), places):
            yield owner.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)

    def _loader(self, trainer: L.Trainer) -> DataLoader[Any]:
        """Return the training loader, if its data set can be read again."""
        loader = _host.train_loader(trainer)
        if num_samples(loader.dataset) is None:
            who = "`RehearsalCallback(reload=True)`" if self.reload else f"`{type(self.memory).__name__}`"
            raise MisconfigurationException(
                f"{who} reads training data more than once, but got an iterable data set. Use a map-style one, or a"
                " memory that keeps what passes by, such as `ReservoirMemory`."
            )
        return loader

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the exemplars of all processes. A collective under several processes."""
        state = {"task": self._task, "first_epoch": self._first_epoch}
        return {**super().state_dict(), **state, "memory": self._parts or _host.gather(self.memory.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the exemplars; with another number of processes they are dealt anew."""
        super().load_state_dict(state_dict)
        self._task = state_dict["task"]
        self._first_epoch = state_dict["first_epoch"]
        self._parts = state_dict["memory"]
        self.memory.load_state_dict(self._parts, *self._process)

    @property
    def _is_neutral(self) -> bool:
        return self.proportion == 0 or self.memory.capacity == 0

    @property
    def _reads_again(self) -> bool:
        """Whether exemplars are chosen at the end of a task, among all of its data."""
        return self.reload or self.memory.needs_features

    @property
    def _needs_labels(self) -> bool:
        return self.memory.needs_labels or self.selection == "balanced"

    def _labels(self, batch: Any, num_samples: int) -> Tensor:
        who = type(self.memory).__name__ if self.memory.needs_labels else f"selection={self.selection!r}"
        return labels_in_batch(batch, num_samples, self.label, who)

    @staticmethod
    def _data(trainer: L.Trainer) -> ContinualDataModule:
        data = _host.data_module_of(trainer)
        if not isinstance(data, ContinualDataModule):
            raise MisconfigurationException(
                "`RehearsalCallback(reload=True)` reads exemplars from the data sets of past tasks, but the Trainer has"
                " no `ContinualDataModule`. Pass one, or leave `reload` out: then the exemplars are kept."
            )
        return data


def _copy(leaf: _batch.Leaf) -> _batch.Leaf:
    return leaf.clone() if isinstance(leaf, Tensor) else list(leaf)
