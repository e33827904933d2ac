"""Batch norms whose active channels stay what they are while the others are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    r"""Lets some channels of a batch norm be normalised as in evaluation, in training too; a forward hook.

    With :math:`A` the active channels, whose running mean :math:`\mu` and variance :math:`\sigma^2` are held,

    .. math::
        y_c = \gamma_c \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c \quad (c \in A)

    and the batch norm's own output else. So a channel gives in training what tasks that use it see in evaluation, but
    for rounding. No gradient goes back through these channels: what makes them is held, to its beginning.

    Args:
        layer: The batch norm.
        active: Which channels are active: bool ``(C,)``.

    Example:
        The first channel keeps its mean of 0 and variance of 1.

        >>> layer = nn.BatchNorm1d(2, eps=1e-12)
        >>> hold = HeldStatistics(layer, torch.tensor([True, False]))
        >>> handle = layer.register_forward_hook(hold)
        >>> layer(torch.tensor([[3.0, 3.0], [5.0, 5.0]])).tolist()
        [[3.0, -1.0], [5.0, 1.0]]
        >>> layer.running_mean.tolist()
        [0.0, 0.4000000059604645]
    """

    def __init__(self, layer: _BatchNorm, active: Tensor) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self._active = active.to(layer.running_mean.device)
        self._mean, self._variance = layer.running_mean.detach().clone(), layer.running_var.detach().clone()

    def __call__(self, layer: Any, args: Any, output: Tensor) -> Tensor:
        """Put the statistics back, and give the output with active channels as in evaluation."""
        if not layer.training or not layer.track_running_stats:
            return output
        shape = [1, -1] + [1] * (output.ndim - 2)
        with torch.no_grad():
            # `data`: what autograd remembers of the buffers must not seem to have changed.
            for buffer, value in ((layer.running_mean, self._mean), (layer.running_var, self._variance)):
                buffer.data.copy_(torch.where(self._active, value, buffer))
            scale = torch.rsqrt(self._variance + layer.eps) * (1.0 if layer.weight is None else layer.weight)
            shift = (0.0 if layer.bias is None else layer.bias) - self._mean * scale
            scale, shift = (torch.where(self._active, one, 0).view(shape) for one in (scale, shift))
            held = torch.addcmul(shift, args[0].to(shift.dtype), scale).to(output.dtype)
        return torch.addcmul(held, output, (~self._active).to(output.dtype).view(shape))


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
            ends.append(layer.register_forward_hook(HeldStatistics(layer, channels)).remove)
    return ends
