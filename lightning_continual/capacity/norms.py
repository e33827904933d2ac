"""Batch norms whose active channels stay what they are while the others are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_continual.capacity.activity import argument
from lightning_continual.capacity.wiring import Wiring


def batch_norms(module: nn.Module, wiring: Wiring) -> dict[str, _BatchNorm]:
    """Return the batch norms in a module's wiring that keep running statistics, by name.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> list(batch_norms(model, find_wiring(model, torch.ones(1, 1))))
        ['1']
    """
    names = [name.removesuffix(".running_mean") for name in wiring.rows if name.endswith(".running_mean")]
    found = {name: module.get_submodule(name) for name in names}
    return {name: one for name, one in found.items() if isinstance(one, _BatchNorm)}


class HeldStatistics:
    r"""Lets some channels of a batch norm be normalised as in evaluation, in training too; a pair of forward hooks.

    With :math:`A` the active channels, whose running mean :math:`\mu` and variance :math:`\sigma^2` are held,

    .. math::
        y_c = \gamma_c \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c \quad (c \in A)

    and the batch norm's own output else. So a channel gives in training what tasks that use it see in evaluation, but
    for rounding. No gradient goes back through these channels: what makes them is held, to its beginning. The batch
    norm has weights of zero for them while it runs, by which it stops their gradients itself; then they alone are
    computed as in evaluation, and written over its output.

    Args:
        layer: The batch norm, whose weights of active channels stay what they are.
        active: Which channels are active: bool ``(C,)``.

    Example:
        The first channel keeps its mean of 0 and variance of 1.

        >>> layer = nn.BatchNorm1d(2, eps=1e-12)
        >>> end = HeldStatistics(layer, torch.tensor([True, False])).begin()
        >>> layer(torch.tensor([[3.0, 3.0], [5.0, 5.0]])).tolist()
        [[3.0, -1.0], [5.0, 1.0]]
        >>> layer.running_mean.tolist()
        [0.0, 0.4000000059604645]
        >>> end()
    """

    def __init__(self, layer: _BatchNorm, active: Tensor) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = layer.running_mean.detach(), layer.running_var.detach()
        self._layer = layer
        self._channels = active.to(mean.device).nonzero().flatten()
        self._free = (~active).to(mean.device, mean.dtype)
        self._mean, self._variance = mean[self._channels], variance[self._channels]
        self._scale = None if layer.weight is None else layer.weight.detach()[self._channels]
        self._shift = None if layer.bias is None else layer.bias.detach()[self._channels]
        self._weight: list[Tensor | None] = []  # while the batch norm runs

    def begin(self) -> Callable[[], None]:
        """Begin to hold, and return what ends it."""
        handles = (
            self._layer.register_forward_pre_hook(self._before),
            self._layer.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _before(self, layer: Any, args: Any) -> None:
        if layer.training and layer.track_running_stats:
            weight = layer.weight
            self._weight.append(weight)
            layer._parameters["weight"] = self._free if weight is None else weight * self._free.to(weight.dtype)

    def _after(self, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Put the statistics back, and let active channels of the output be as in evaluation, in place."""
        if not self._weight:
            return
        layer._parameters["weight"] = self._weight.pop()
        if output is None:
            return  # the batch norm raised
        with torch.no_grad():
            # `data`: what autograd remembers of buffers and output must not seem to have changed.
            layer.running_mean.data.index_copy_(0, self._channels, self._mean)
            layer.running_var.data.index_copy_(0, self._channels, self._variance)
            read = argument(args, kwargs).detach().index_select(1, self._channels)
            held = batch_norm(read, self._mean, self._variance, self._scale, self._shift, eps=layer.eps)
            output.data[:, self._channels] = held.to(output.dtype)


def hold_statistics(module: nn.Module, wiring: Wiring, active: Tensor) -> list[Callable[[], None]]:
    """Let the active channels of all batch norms of a module hold their statistics; see `HeldStatistics`.

    Args:
        module: The module.
        wiring: Its wiring.
        active: Which units are active: bool ``(num_units,)``.

    Returns:
        Functions that end it.

    Example:
        >>> hold_statistics(nn.Linear(1, 1), Wiring({}, {}, {}, {}), torch.tensor([]))
        []
    """
    ends = []
    for name, layer in batch_norms(module, wiring).items():
        channels = wiring.rows[f"{name}.running_mean"].of(active, num_dims=1)
        if bool(channels.any()):
            ends.append(HeldStatistics(layer, channels).begin())
    return ends
