"""Looking at a module without leaving a trace."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_continual._host.methods import observing_now
from lightning_continual._host.processes import random_state_kept
from lightning_continual.parameters import evaluating


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Give every torchmetrics metric inside ``module`` a fresh state, and all that it was back at the end."""
    metrics = [one for one in module.modules() if isinstance(one, Metric | MetricCollection)]
    saved = [dict(vars(one)) for one in metrics]
    lists = [(value, list(value)) for attributes in saved for value in attributes.values() if isinstance(value, list)]
    for one, attributes in zip(metrics, saved, strict=True):
        if isinstance(one, MetricCollection):  # which of its metrics share a state is found out at the first update
            attributes["_groups"] = copy.deepcopy(one._groups)
        else:
            one.reset()  # empties lists in place
    try:
        yield
    finally:
        for one, attributes in zip(metrics, saved, strict=True):
            vars(one).clear()
            vars(one).update(attributes)
        for value, entries in lists:
            value[:] = entries


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give ``module`` its buffers back, whether they are written into or replaced."""
    saved = [(one._buffers, dict(one._buffers)) for one in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffers, before in saved:
            buffers.update(before)
        for buffer, value in values:
            buffer.copy_(value)


@functools.cache
def _internal_attributes() -> frozenset[str]:
    return frozenset(vars(LightningModule()))


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Give ``module`` back what its own code keeps in attributes, as counters and lists of outputs."""
    internal, saved = _internal_attributes(), []
    for one in module.modules():
        own = {name: value for name, value in vars(one).items() if name not in internal}
        collections = [
            (value, copy.copy(value)) for value in own.values() if isinstance(value, list | deque | dict | set)
        ]
        saved.append((vars(one), own, collections))
    try:
        yield
    finally:
        for attributes, own, collections in saved:
            for name in attributes.keys() - own.keys() - internal:
                del attributes[name]
            attributes.update(own)
            for value, before in collections:
                value.clear()
                value.extend(before) if isinstance(value, list | deque) else value.update(before)


@contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Look at a module without leaving a trace: in evaluation mode, without gradients.

    Metrics, buffers, modes and the random state are afterwards as before.
    """
    observing_now.append(module)
    try:
        with random_state_kept(), torch.no_grad(), _metrics_kept(module), _buffers_kept(module), evaluating(module):
            yield
    finally:
        observing_now.pop()


@contextmanager
def without_trace(module: Any) -> Iterator[None]:
    """Call ``training_step`` with nothing logged, and all that the module keeps as before afterwards.

    That is its metrics, buffers and plain attributes, and the random state.
    """
    own = vars(module).get("log")
    observing_now.append(module)
    module.log = lambda *args, **kwargs: None
    try:
        with random_state_kept(), _attributes_kept(module), _metrics_kept(module), _buffers_kept(module):
            yield
    finally:
        observing_now.pop()
        if own is None:
            del module.log
        else:
            module.log = own
