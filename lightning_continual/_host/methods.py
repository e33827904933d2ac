"""Methods of the user's objects, wrapped while a fit runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

_Layers: TypeAlias = dict[Any, Callable[..., Any]]
_wrapped: WeakKeyDictionary[Any, dict[str, tuple[ref[Any], _Layers]]] = WeakKeyDictionary()
observing_now: list[nn.Module] = []


def wrap_method(owner: Any, name: str, key: Any, layer: Callable[..., Any]) -> None:
    """Let ``layer(inner, *args, **kwargs)`` stand around ``owner.name``, where ``inner`` is what it stands around.

    Layers lie on each other in the order of their wrapping; wrapping again under the same ``key`` replaces the layer.
    They rest while we are `observing`, so that a batch looked at is the user's own. The owner's class is not touched,
    and after `unwrap_methods` of every key nothing of ours is left on the owner.
    """
    methods = _wrapped.setdefault(owner, {})
    if name in methods:
        methods[name][1][key] = layer
        return
    layers: _Layers = {key: layer}
    inner = getattr(owner, name)

    # Lightning looks through `__wrapped__` to tell which hooks a user has overridden.
    @functools.wraps(inner)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        method = inner
        for one in () if observing_now else layers.values():
            method = functools.partial(one, method)
        return method(*args, **kwargs)

    methods[name] = ref(dispatch), layers
    setattr(owner, name, dispatch)


def unwrap_methods(key: Any) -> None:
    """Take away every layer that was put on under ``key``; a key without layers is no error."""
    for owner, methods in list(_wrapped.items()):
        for name, (dispatch, layers) in list(methods.items()):
            layers.pop(key, None)
            if layers:
                continue
            del methods[name]
            method = dispatch()
            if method is None or owner.__dict__.get(name) is not method:  # replaced since, or wrapped by somebody else
                continue
            inner = method.__wrapped__
            if getattr(inner, "__func__", None) is getattr(type(owner), name, None):
                delattr(owner, name)
            else:  # the user had put a method on the instance
                setattr(owner, name, inner)
        if not methods:
            del _wrapped[owner]


def batch_hook_owner(trainer: Any) -> Any:
    """Return the module or data module whose ``on_before_batch_transfer`` this fit calls."""
    return trainer._data_connector._datahook_selector.get_instance("on_before_batch_transfer")


def require_batch_hooks(pl_module: Any, who: str) -> None:
    """Raise if the module's ``training_step`` takes batches from the iterator itself, past every batch hook."""
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"`{who}` changes batches in `on_before_batch_transfer`, but `training_step(dataloader_iter)` takes them"
            " from the iterator, past every batch hook. Use `training_step(self, batch, batch_idx)`."
        )
