"""How active the units of a network are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_continual.importance.fisher import AllReduce
from lightning_continual.importance.undisturbed import undisturbed


def unit_activity(
    module: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    activation: Callable[[Tensor], Tensor] = F.relu,
    all_reduce: AllReduce | None = None,
) -> dict[str, Tensor]:
    r"""Compute the mean activation of each unit of some layers.

    .. math::
        \bar a_j = \frac1N \sum_{n=1}^{N} \frac1{|P|} \sum_{t \in P} \phi(z_{njt})

    where :math:`z_{nj}` is what unit ``j`` of the layer gives for sample ``n``, and :math:`P` are its positions: the
    pixels of a convolution's map, the places of a sequence. (CLNP has one value a unit; one value a channel, the mean
    over its map, is our reading.) A layer that is used several times has the mean over its uses.

    Args:
        module: The module; run in evaluation mode.
        layers: Names, as in ``named_modules()``, of layers with output ``(B, units)``, ``(B, units, *)``, or, for
            linear and layer norm layers, ``(B, *, units)``.
        batches: Batches of any structure and size; by default inputs ``(B, *)`` of ``module``.
        forward: Maps a batch to anything, by way of the module's forward; by default ``module`` itself.
        activation: What the network applies to the outputs of ``layers``; name a batch norm, not its convolution, if
            one comes between. For layers that are themselves activations pass ``torch.nn.Identity()`` (or leave it:
            ReLU applied twice is ReLU).
        all_reduce: Sums a tensor over processes that each see a shard of the data; it is applied to the sums and the
            counts before they are divided.

    Returns:
        For each layer the mean activations ``(units,)``.

    Raises:
        ValueError: If a layer does not exist or is not used, or ``batches`` is empty.

    Example:
        A unit that is 2 on one sample and off on the other.

        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> _ = model[0].weight.data.fill_(1.0)
        >>> unit_activity(model, ["0"], [torch.tensor([[2.0], [-7.0]])])
        {'0': tensor([1.])}

    References:
        - Golkar, Kagan, Cho. *Continual Learning via Neural Pruning.* arXiv 1903.04476, 2019.
    """
    modules = dict(module.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        known = ", ".join(name for name in modules if name)
        raise ValueError(f"`layers` must name layers of the module, but got {missing[0]!r}. It has {known}.")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            values = activation(output).to(torch.promote_types(output.dtype, torch.float32))
            if not isinstance(layer, nn.Linear | nn.LayerNorm):
                values = values.movedim(1, -1)
            total = values.flatten(1, -2).mean(1).sum(0) if values.ndim > 2 else values.sum(0)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] += len(values)

        return hook

    with undisturbed(module), torch.no_grad(), ExitStack() as stack:
        for name in layers:
            stack.callback(modules[name].register_forward_hook(watch(name)).remove)
        for batch in batches:
            (forward or module)(batch)
    unused = [name for name in layers if name not in sums]
    if unused:
        raise ValueError(
            f"Every layer must be used in the forward pass of at least one batch, but {unused[0]!r} is not. Pass at"
            " least one batch, and in `layers` only what is called as a module."
        )
    if all_reduce is not None:
        counts = {name: int(all_reduce(torch.tensor(counts[name], device=sums[name].device))) for name in layers}
        sums = {name: all_reduce(sums[name]) for name in layers}
    return {name: sums[name] / counts[name] for name in layers}
