"""Batches of any structure: taken apart into leaves, indexed, joined, and put together again.

A *leaf* is what has one entry a sample: a tensor ``(B, *)``, or a list or tuple of strings or numbers of length ``B``.
Everything else in a batch (scalars, ``None``, settings) belongs to the batch as a whole and is kept as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Leaf: TypeAlias = "Tensor | list[Any]"


def flatten(batch: Any) -> tuple[list[Leaf], Callable[[Sequence[Leaf]], Any]]:
    """Take a batch apart into its leaves, and return a function that puts leaves back into the batch's structure.

    Args:
        batch: A tensor, or a tuple, ``NamedTuple``, list, mapping or dataclass of batches, nested at will.

    Returns:
        The leaves, each with one entry a sample, in the order of the structure; and a function from as many leaves
        (of any common length) to a batch of the same structure, types and settings.

    Raises:
        ValueError: If the batch has nothing to index, or its leaves disagree about the number of samples.

    Example:
        >>> leaves, rebuild = flatten({"x": torch.ones(2, 3), "name": ["a", "b"], "scale": 0.5})
        >>> [len(leaf) for leaf in leaves]
        [2, 2]
        >>> rebuild([leaf[:1] for leaf in leaves])
        {'x': tensor([[1., 1., 1.]]), 'name': ['a'], 'scale': 0.5}
    """
    leaves: list[Leaf] = []
    paths: list[str] = []
    _collect(batch, leaves, paths, "batch")
    if not leaves:
        raise ValueError(
            f"A batch must hold something with one entry a sample, but got {_describe(batch)}. Return tensors with a"
            " first dimension of the batch size (or lists of strings) from the data set."
        )
    if len({len(leaf) for leaf in leaves}) > 1:
        found = ", ".join(f"{path}: {len(leaf)}" for path, leaf in zip(paths, leaves, strict=True))
        raise ValueError(
            f"All parts of a batch must have the same number of samples, but got {found}. Give `collate_fn` a common"
            " first dimension (pad or stack), or put what belongs to the whole batch into 0-dimensional tensors."
        )

    def rebuild(new: Sequence[Leaf]) -> Any:
        if len(new) != len(leaves):
            raise ValueError(f"This batch has {len(leaves)} parts ({', '.join(paths)}), but got {len(new)}.")
        return _rebuild(batch, iter(new))

    return leaves, rebuild


def size(batch: Any) -> int:
    """Return the number of samples in a batch (see `flatten` for what a batch can be).

    Example:
        >>> size((torch.zeros(4, 3), {"y": torch.zeros(4)}))
        4
    """
    return len(flatten(batch)[0][0])


def require_stacked(batch: Any, batch_size: int) -> None:
    """Raise if a batch is, or holds, a list of samples that were not stacked.

    Such a list looks like one of parts, and the first dimension of a sample like that of the batch.

    Args:
        batch: A batch, as the data loader makes it.
        batch_size: The number of samples that it should hold.

    Raises:
        ValueError: If it has another number of samples, and holds a list of ``batch_size`` tensors or mappings.

    Example:
        >>> require_stacked([torch.zeros(4, 3), torch.zeros(4)], batch_size=4)
    """
    found = size(batch)
    if found != batch_size and _holds_samples(batch, batch_size):
        raise ValueError(
            f"A batch must be stacked, but this one of {batch_size} samples holds a list of {batch_size} entries. Stack"
            " or pad the samples in `collate_fn`, so that every part is a tensor with a first dimension of the batch"
            " size."
        )


def _holds_samples(node: Any, batch_size: int) -> bool:
    children = (
        list(node.values()) if isinstance(node, Mapping) else list(node) if isinstance(node, list | tuple) else []
    )
    is_list = isinstance(node, list | tuple) and not hasattr(node, "_fields")
    if is_list and len(children) == batch_size and all(isinstance(child, Tensor | Mapping) for child in children):
        return True
    return any(_holds_samples(child, batch_size) for child in children)


def first(batch: Any, number: int, device: torch.device | str | None = None) -> Any:
    """Return the first samples of a batch, in its structure; tensors detached, and on a device if one is named.

    Example:
        >>> first((torch.arange(3), ["a", "b", "c"]), 2)
        (tensor([0, 1]), ['a', 'b'])
    """
    leaves, rebuild = flatten(batch)
    return rebuild([one[:number].detach().to(device) if isinstance(one, Tensor) else one[:number] for one in leaves])


def take(leaves: Sequence[Leaf], index: Tensor) -> list[Leaf]:
    """Return the samples at ``index`` (int64, ``(N,)``) of every leaf."""
    rows: list[int] | None = None
    taken: list[Leaf] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            taken.append(leaf.index_select(0, index.to(leaf.device)))
        else:
            rows = index.tolist() if rows is None else rows
            taken.append([leaf[row] for row in rows])
    return taken


def join(first: Sequence[Leaf], second: Sequence[Leaf]) -> list[Leaf]:
    """Concatenate two lists of leaves sample by sample; the second follows the first to its device.

    Raises:
        ValueError: If the two differ in their number of leaves, or in a leaf's shape or type.
    """
    if len(first) != len(second):
        raise ValueError(f"Batches must have the same parts, but got {len(first)} and {len(second)} of them.")
    return [_join(number, one, two) for number, (one, two) in enumerate(zip(first, second, strict=True))]


def _join(number: int, one: Leaf, two: Leaf) -> Leaf:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape[1:] != two.shape[1:] or one.dtype != two.dtype:
            raise ValueError(
                f"Samples must have the same shape and type in every batch, but part {number} was"
                f" {tuple(two.shape[1:])} {two.dtype} and is {tuple(one.shape[1:])} {one.dtype}. Pad to a fixed size"
                " in `collate_fn`."
            )
        return torch.cat((one, two.to(one.device)))
    if isinstance(one, list) and isinstance(two, list):
        return one + two
    raise ValueError(f"Part {number} of the batch was a {type(two).__name__} and is now a {type(one).__name__}.")


def _collect(node: Any, leaves: list[Leaf], paths: list[str], path: str) -> None:
    if isinstance(node, Tensor):
        if node.ndim:
            leaves.append(node)
            paths.append(path)
    elif isinstance(node, Mapping):
        for key, child in node.items():
            _collect(child, leaves, paths, f"{path}[{key!r}]")
    elif _is_column(node):
        leaves.append(list(node))
        paths.append(path)
    elif _is_dataclass(node):
        for field in dataclasses.fields(node):
            _collect(getattr(node, field.name), leaves, paths, f"{path}.{field.name}")
    elif isinstance(node, list | tuple):
        for position, child in enumerate(node):
            _collect(child, leaves, paths, f"{path}[{position}]")


def _rebuild(node: Any, leaves: Any) -> Any:
    if isinstance(node, Tensor):
        return next(leaves) if node.ndim else node
    if isinstance(node, Mapping):
        items = {key: _rebuild(child, leaves) for key, child in node.items()}
        if not isinstance(node, MutableMapping):
            return type(node)(items)  # type: ignore[call-arg]
        # Not from its type: a mapping may be more than its items (a default, a tokenizer's encodings).
        mapping = copy.copy(node)
        mapping.update(items)
        return mapping
    if _is_column(node):
        column = next(leaves)
        return tuple(column) if isinstance(node, tuple) else column
    if _is_dataclass(node):
        # Not `replace`: a batch may have fields that its constructor does not take.
        new = copy.copy(node)
        for field in dataclasses.fields(node):
            object.__setattr__(new, field.name, _rebuild(getattr(node, field.name), leaves))
        return new
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(_rebuild(child, leaves) for child in node))
    if isinstance(node, list | tuple):
        return type(node)(_rebuild(child, leaves) for child in node)
    return node


def _is_column(node: Any) -> bool:
    """Whether ``node`` is a list of strings or numbers, one a sample, as torch's default collate leaves strings."""
    return (
        isinstance(node, list | tuple)
        and not hasattr(node, "_fields")
        and len(node) > 0
        and all(isinstance(entry, str | bytes | int | float) for entry in node)
    )


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    return f"{type(batch).__name__} {batch!r}"[:80]
