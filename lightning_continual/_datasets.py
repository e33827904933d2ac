"""What can be known of a data set without reading it, and data sets whose samples are changed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

LABEL_KEYS = ("label", "labels", "y", "target")


def num_samples(dataset: Any) -> int | None:
    """Return the number of samples, or ``None`` of an iterable data set.

    Example:
        >>> num_samples([1, 2, 3])
        3
    """
    return None if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") else len(dataset)


def require_num_samples(dataset: Any) -> int:
    """Return the number of samples of a map-style data set, and raise of any other."""
    size = num_samples(dataset)
    if size is None:
        raise TypeError(
            f"The data set must be map-style (with `__len__` and `__getitem__`), but got {type(dataset).__name__}. Make"
            " a `Task` of each of your iterable data sets instead."
        )
    return size


def labels_of(dataset: Dataset[Any], label: Callable[[Any], Any] | None = None) -> Tensor:
    """Return the labels of a data set, without reading its samples where that is possible.

    Without reading: from its attribute ``targets`` or ``labels`` (through its ``target_transform``, if it has one), the
    last tensor of a ``TensorDataset``, and so through every ``Subset`` and ``ConcatDataset``. Else each sample is read
    once: its label is the last element of a tuple or list, or the entry ``"label"``, ``"labels"``, ``"y"`` or
    ``"target"`` of a mapping.

    Args:
        dataset: Map-style data set of ``N`` samples.
        label: Returns the label of a sample; every sample is read.

    Returns:
        The labels, int64 ``(N,)``.

    Raises:
        TypeError: If the data set is iterable.
        ValueError: If a sample has no whole number for a label.

    Example:
        >>> labels_of([("a", 3), ("b", 1)])
        tensor([3, 1])
        >>> labels_of([("a", 3), ("b", 1)], label=lambda sample: ord(sample[0]))
        tensor([97, 98])
    """
    size = require_num_samples(dataset)
    known = known_labels(dataset) if label is None else None
    if known is not None:
        return known
    read = label or _label_in
    return torch.tensor([_whole_number(read(dataset[index]), index) for index in range(size)], dtype=torch.int64)


def labels_in_batch(batch: Any, size: int, label: Callable[[Any], Any] | None, who: str) -> Tensor:
    """Return the labels of a batch of ``size`` samples, int64 ``(size,)`` on the CPU.

    They are what ``label`` returns; by default the second part of a pair, or the entry ``"label"``, ``"labels"``,
    ``"y"`` or ``"target"`` of a mapping.

    Raises:
        ValueError: If there are none; ``who`` needs them.

    Example:
        >>> labels_in_batch((torch.zeros(2, 3), torch.tensor([4, 5])), 2, None, "This")
        tensor([4, 5])
    """
    if label is not None:
        labels = label(batch)
    elif isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.shape != (size,) or labels.is_floating_point():
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"`{who}` needs labels, one whole number a sample, but found {found} for {size} samples. Pass `label=`, a"
            " function from a batch to its labels."
        )
    return labels.detach().cpu().long()


def known_labels(dataset: Any) -> Tensor | None:
    """Return the labels, int64 ``(N,)``, or ``None`` if samples would have to be read.

    Example:
        >>> known_labels(Subset(TensorDataset(torch.zeros(3, 2), torch.tensor([5, 6, 7])), [2, 0]))
        tensor([7, 5])
    """
    size = num_samples(dataset)
    for name in ("targets", "labels"):
        labels = _to_labels(getattr(dataset, name, None), size, getattr(dataset, "target_transform", None))
        if labels is not None:
            return labels
    if isinstance(dataset, TensorDataset):
        return _to_labels(dataset.tensors[-1], size)
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    return None


def mapped(dataset: Dataset[Any], transform: Callable[[Any], Any]) -> Dataset[Any]:
    """Return the data set with a transform applied to each sample when it is read; labels stay as they are.

    Example:
        >>> mapped(TensorDataset(torch.ones(1)), list)[0]
        [tensor(1.)]
    """
    return MappedIterable(dataset, transform) if isinstance(dataset, IterableDataset) else Mapped(dataset, transform)


@dataclass(frozen=True, eq=False)
class Mapped(Dataset[Any]):
    """A map-style data set with a transform applied to each sample when it is read; labels stay as they are."""

    dataset: Dataset[Any]
    transform: Callable[[Any], Any]

    def __len__(self) -> int:
        return require_num_samples(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return [self.transform(sample) for sample in self.dataset.__getitems__(indices)]
        return [self[index] for index in indices]

    @property
    def targets(self) -> Tensor:
        """The labels, int64 ``(N,)``, if they are known without reading."""
        labels = known_labels(self.dataset)
        if labels is None:
            raise AttributeError(f"The labels of {type(self.dataset).__name__} are not known without reading it.")
        return labels


@dataclass(frozen=True, eq=False)
class MappedIterable(IterableDataset[Any]):
    """An iterable data set with a transform applied to each sample when it is read."""

    dataset: IterableDataset[Any]
    transform: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Any]:
        return map(self.transform, self.dataset)

    def __len__(self) -> int:
        # Where the data set does not tell: the `TypeError` that loaders expect.
        return len(self.dataset)  # type: ignore[arg-type]


def _to_labels(values: Any, size: int | None, transform: Callable[[Any], Any] | None = None) -> Tensor | None:
    """Return ``values`` as int64 ``(N,)``, or ``None`` if they are not one whole number a sample."""
    if values is None or isinstance(values, Mapping | set | frozenset):
        return None
    try:
        if transform is not None or not isinstance(values, Tensor):
            values = values.tolist() if hasattr(values, "tolist") else list(values)
            values = torch.tensor(values if transform is None else [transform(value) for value in values])
    except (TypeError, ValueError, RuntimeError):  # names, ragged boxes, methods
        return None
    whole: Tensor = values.long()
    return whole.flatten().cpu() if whole.numel() == size and bool((whole == values).all()) else None


def _label_in(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return next((sample[key] for key in LABEL_KEYS if key in sample), None)
    return sample[-1] if isinstance(sample, tuple | list) and sample else None


def _whole_number(value: Any, index: int) -> int:
    try:
        is_label = bool(int(value) == value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        is_label = False
    if not is_label:
        raise ValueError(
            f"Every sample must have a whole number for a label, but sample {index} has {type(value).__name__}"
            f" {value!r:.60}. Pass `label=`, a function from a sample to its label."
        )
    return int(value)
