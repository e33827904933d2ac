"""Modules whose parameters are sharded over processes by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_continual.parameters import ParamDict, is_sharded, whole


def reshard(module: nn.Module) -> None:
    """Let a module hold its shards: after a forward pass without a backward pass it may hold whole parameters still."""
    for one in _sharded_modules(module):
        one.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Let a module hold whole parameters of its own in every process for a while, and compute without the others.

    What is changed in them is lost. A collective; without shards nothing is done.
    """
    reshard(module)
    parameters: ParamDict = {name: one for name, one in module.named_parameters() if is_sharded(one)}
    complete: dict[int, nn.Parameter] = {
        id(one): nn.Parameter(whole(one.detach()), requires_grad=one.requires_grad) for one in parameters.values()
    }
    owners: list[dict[Any, Any]] = []
    if complete:
        for one in module.modules():
            owners += [one._parameters, one._forward_pre_hooks, one._forward_hooks]
    saved = [(owner, dict(owner)) for owner in owners]
    try:
        for owner, before in saved:
            owner.clear()
            owner.update({key: complete.get(id(one), one) for key, one in before.items() if not _is_of_fsdp(one)})
        yield
    finally:
        for owner, before in saved:
            owner.clear()
            owner.update(before)


def _is_of_fsdp(hook: Any) -> bool:
    return callable(hook) and str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def _sharded_modules(module: nn.Module) -> list[Any]:
    return [one for one in module.modules() if any(kind.__name__ == "FSDPModule" for kind in type(one).__mro__)]
