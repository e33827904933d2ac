"""The random state of each process, and what processes tell each other."""

from __future__ import annotations

import atexit
import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Return the global random state of this process in tensors and numbers that load with ``weights_only=True``."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the random state, after an exception too (unlike Lightning's ``isolate_rng``)."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """Return every process's ``value`` in the order of ranks on the first process, and only the own on the others.

    A collective: every process must come here. Checkpoints are written by the first process, from its own state.
    """
    if not is_distributed():
        return [value]
    distributed = torch.distributed
    first = distributed.get_rank() == 0
    values: list[Any] | None = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(value, values, dst=0)
    return [value] if values is None else values


def gather_everywhere(value: Any) -> list[Any]:
    """Return every process's ``value`` in the order of ranks on every process. A collective."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def all_sum(trainer: Any) -> Callable[[Tensor], Tensor]:
    """Return what sums a tensor over processes."""

    def reduce(value: Tensor) -> Tensor:
        if not is_distributed():
            return value
        total = value.to(trainer.strategy.root_device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    return reduce


@functools.cache
def leave_process_group_at_exit() -> None:
    """Leave the process group when Python exits: gloo's threads abort a process that exits inside it."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)
