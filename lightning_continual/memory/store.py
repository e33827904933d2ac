"""Where exemplars lie, addressed by slot: in RAM, or in files that only ever grow."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from lightning_continual._batch import Leaf, take

Kind: TypeAlias = "tuple[tuple[int, ...], str]"
"""Shape and type of a sample's part, as a checkpoint can hold them; the type of a list's entries is ``"list"``."""


@final
class RamStore:
    """One tensor or list a leaf, which grows geometrically.

    Args:
        state: What `state` returned, to begin with (copied).

    Example:
        >>> store = RamStore()
        >>> store.put(torch.tensor([1, 0]), [torch.tensor([[10.0], [20.0]]), ["a", "b"]])
        >>> store.get(torch.tensor([0]))
        [tensor([[20.]]), ['b']]
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        columns: list[Leaf] = [] if state is None else state["columns"]
        self._columns = [_copied(column) for column in columns]

    def put(self, slots: Tensor, leaves: Sequence[Leaf]) -> None:
        """Write sample ``i`` of ``leaves`` to slot ``slots[i]`` (int64, distinct, ``(B,)``).

        Raises:
            ValueError: If the leaves differ in number, shape or type from those that were put first.
        """
        if self._columns:
            _require_same([_kind(column) for column in self._columns], [_kind(leaf) for leaf in leaves])
        else:
            self._columns = [
                torch.empty(0, *leaf.shape[1:], dtype=leaf.dtype) if isinstance(leaf, Tensor) else [] for leaf in leaves
            ]
        size = int(slots.max()) + 1
        for number, (column, leaf) in enumerate(zip(self._columns, leaves, strict=True)):
            if isinstance(column, Tensor) and isinstance(leaf, Tensor):
                self._columns[number] = column = grown(column, size)
                column.index_copy_(0, slots, leaf.detach().cpu())
            elif isinstance(column, list):
                column.extend([None] * (size - len(column)))
                for slot, entry in zip(slots.tolist(), leaf, strict=True):
                    column[slot] = entry

    def get(self, slots: Tensor) -> list[Leaf]:
        """Return the samples at ``slots`` (int64, ``(N,)``), as copies."""
        return take(self._columns, slots)

    def state(self, num_slots: int) -> dict[str, Any]:
        """Return a copy of the first ``num_slots`` slots."""
        return {"kind": "ram", "columns": [_copied(column[:num_slots]) for column in self._columns]}


@final
class DiskStore:
    """One file a tensor leaf, to which samples are appended; only the table from slot to row is in RAM.

    A row is never overwritten: a slot that is written again gets a new row at the end. So a state, which holds the
    table, stays valid however much the files grow after it. Lists (of strings) stay in RAM and in the state.

    The files are written by ordinary writes, so that a full disk is an error and not a crash, and read through a
    mapping whose pages are given back after each read, so that resident memory stays small.

    Args:
        path: The folder; created if need be. Several stores may share it: each has file names of its own.
        state: What `state` returned, to begin with. Its files are looked for in ``path``, then where they were.

    Raises:
        OSError: If the folder cannot be made or written to.
        FileNotFoundError: If the files of ``state`` are missing or too short.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = DiskStore(folder)
        ...     store.put(torch.tensor([0, 1]), [torch.tensor([[1, 2], [3, 4]])])
        ...     store.put(torch.tensor([0]), [torch.tensor([[5, 6]])])
        ...     store.get(torch.tensor([1, 0]))
        [tensor([[3, 4],
                [5, 6]])]
    """

    def __init__(self, path: str | os.PathLike[str], state: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._name = uuid.uuid4().hex[:12]
        self._kinds: list[Kind] = []
        self._rows = torch.empty(0, dtype=torch.int64)
        self._lists = RamStore()
        self._mapped: dict[int, tuple[mmap.mmap, Tensor]] = {}
        if state is None:
            _require_writable(self.path)
        else:
            self._name = state["name"]
            self._kinds = [(tuple(shape), dtype) for shape, dtype in zip(state["shapes"], state["dtypes"], strict=True)]
            self._rows = state["rows"].cpu().clone()
            self._lists = RamStore(state["lists"])
            self._find(Path(state["path"]))

    def put(self, slots: Tensor, leaves: Sequence[Leaf]) -> None:
        """Write sample ``i`` of ``leaves`` to slot ``slots[i]`` (int64, distinct, ``(B,)``).

        Raises:
            ValueError: If the leaves differ in number, shape or type from those that were put first.
            OSError: If the files cannot be written, as on a full disk. Then the store is as it was.
        """
        kinds = [_kind(leaf) for leaf in leaves]
        _require_same(self._kinds or kinds, kinds)
        self._kinds = kinds
        first = self._append({i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)})
        self._lists.put(slots, [leaf for leaf in leaves if isinstance(leaf, list)])
        self._rows = grown(self._rows, int(slots.max()) + 1)
        self._rows[slots] = torch.arange(first, first + len(slots))

    def get(self, slots: Tensor) -> list[Leaf]:
        """Return the samples at ``slots`` (int64, ``(N,)``), as copies."""
        rows = self._rows[slots]
        lists = iter(self._lists.get(slots))
        return [
            next(lists) if dtype == "list" else self._read(number, rows, shape, dtype)
            for number, (shape, dtype) in enumerate(self._kinds)
        ]

    def state(self, num_slots: int) -> dict[str, Any]:
        """Return where the first ``num_slots`` slots lie, and a copy of their lists."""
        return {
            "kind": "disk",
            "path": str(self.path),
            "name": self._name,
            "rows": self._rows[:num_slots].clone(),
            "shapes": [list(shape) for shape, _ in self._kinds],
            "dtypes": [dtype for _, dtype in self._kinds],
            "lists": self._lists.state(num_slots),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def _file(self, number: int) -> Path:
        return self.path / f"{self._name}-{number}.bin"

    def _append(self, leaves: dict[int, Tensor]) -> int:
        """Write the samples behind all that the files hold, and return the row of the first."""
        sizes = {number: _size(self._file(number)) for number in leaves}
        # Behind the longest, because an interrupted write may have left more in one file than in another.
        first = max((size // max(1, _stride(self._kinds[i])) for i, size in sizes.items()), default=0)
        number = 0
        try:
            for number, leaf in leaves.items():
                self._file(number).touch()
                with open(self._file(number), "r+b", buffering=0) as file:
                    file.seek(first * _stride(self._kinds[number]))
                    flat = leaf.detach().cpu().contiguous().reshape(-1)
                    _write(file, flat.view(torch.uint8).numpy().data)
        except OSError as error:
            for written, size in sizes.items():
                with suppress(OSError):
                    os.truncate(self._file(written), size)
            raise OSError(
                error.errno,
                f"Exemplars could not be written to {self._file(number)} ({error.strerror or error}). Nothing that was"
                " remembered is lost, and checkpoints stay valid. Free disk space, or pass a smaller `capacity` or a"
                " `path` on a larger disk.",
            ) from error
        return first

    def _read(self, number: int, rows: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
        stride = _stride(self._kinds[number])
        if not stride or not len(rows):
            return torch.empty(len(rows), *shape, dtype=getattr(torch, dtype))
        if number not in self._mapped or int(rows.max()) >= len(self._mapped[number][1]):
            self._mapped[number] = _map(self._file(number), stride)
        mapping, table = self._mapped[number]
        taken = table.index_select(0, rows)
        if hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)
        return taken.view(getattr(torch, dtype)).reshape(len(rows), *shape)

    def _find(self, former: Path) -> None:
        """Set ``path`` to the folder that has the files: the one asked for, else the one they were written to."""
        num_rows = int(self._rows.max()) + 1 if len(self._rows) else 0
        needed = {i: num_rows * _stride(kind) for i, kind in enumerate(self._kinds) if kind[1] != "list"}
        asked = self.path
        for self.path in (asked, former):
            if all(_size(self._file(number)) >= size for number, size in needed.items()):
                return
        number = next(number for number, size in needed.items() if _size(self._file(number)) < size)
        raise FileNotFoundError(
            f"The exemplars of this state must lie in {self._file(number)}, with at least {needed[number]} bytes, but"
            f" the file has {_size(self._file(number))}. Put the folder back there, or pass its new place as `path`."
        )


def restore(state: dict[str, Any], path: Path | None = None) -> RamStore | DiskStore:
    """Return the store that ``state`` was taken of; files are looked for in ``path`` first."""
    return RamStore(state) if state["kind"] == "ram" else DiskStore(path or state["path"], state)


def grown(column: Tensor, size: int) -> Tensor:
    """Return ``column`` if it has ``size`` rows, else a copy with at least ``size``, and at least twice its own."""
    if len(column) >= size:
        return column
    new = torch.empty(max(size, 2 * len(column)), *column.shape[1:], dtype=column.dtype)
    new[: len(column)] = column
    return new


def _copied(leaf: Leaf) -> Leaf:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else list(leaf)


def _kind(leaf: Leaf) -> Kind:
    return (tuple(leaf.shape[1:]), str(leaf.dtype).removeprefix("torch.")) if isinstance(leaf, Tensor) else ((), "list")


def _stride(kind: Kind) -> int:
    """Return the number of bytes a sample takes."""
    shape, dtype = kind
    size: int = getattr(torch, dtype).itemsize
    return math.prod(shape) * size


def _require_same(old: Sequence[Kind], new: Sequence[Kind]) -> None:
    if len(old) != len(new):
        raise ValueError(
            f"Batches must have the same parts at all times, but there were {len(old)} and are {len(new)} of them."
            " Return the same structure for every sample, or start a new memory."
        )
    for number, (was, now) in enumerate(zip(old, new, strict=True)):
        if was != now:
            raise ValueError(
                f"Samples must have the same shape and type in every batch, but part {number} was {was[0]} {was[1]} and"
                f" is {now[0]} {now[1]}. Pad to a fixed size in `collate_fn`, or start a new memory."
            )


def _require_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"probe")
    except OSError as error:
        raise OSError(
            error.errno,
            f"`path` must be a folder that can be written to, but got {str(path)!r} ({error.strerror or error}). Pass"
            " another folder, or none to keep exemplars in RAM.",
        ) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(file: FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _map(path: Path, stride: int) -> tuple[mmap.mmap, Tensor]:
    """Map the whole rows of a file, as a table of bytes ``(rows, stride)``."""
    num_rows = _size(path) // stride
    with open(path, "rb") as file:
        # Private and writable (though never written) because torch warns of tensors over read-only memory.
        mapping = mmap.mmap(file.fileno(), num_rows * stride, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return mapping, torch.frombuffer(mapping, dtype=torch.uint8).view(num_rows, stride)
