"""Recording the calls of layers in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_continual.importance.layers import LAYERS, Gradient


@dataclass(frozen=True)
class Use:
    """One use of a parameter by a layer: the layer's input, and where the gradient of its output will pass by."""

    gradient: Gradient
    input: Tensor
    output_shape: torch.Size
    is_sequence: bool
    edge: GradientEdge

    def sample_axis(self, num_samples: int) -> int | None:
        """Guess which axis of input and output is that of the samples; ``None`` where none can be."""
        if num_samples > 1 and self.output_shape[0] != num_samples and self.fits(1, num_samples):
            return 1
        return 0 if self.fits(0, num_samples) else None

    def fits(self, axis: int, num_samples: int) -> bool:
        """Whether the samples may lie along ``axis``; along the first one, each may have several rows on end."""
        if axis == 1:
            return self.is_sequence and len(self.output_shape) > 2 and self.output_shape[1] == num_samples
        return self.output_shape[0] % num_samples == 0

    def arrange(self, x: Tensor, axis: int, num_samples: int) -> Tensor:
        """Arrange ``(N * K, *)``, or ``(T, N, *)`` for axis 1, as ``(N, K, *)``."""
        return x.movedim(1, 0).unsqueeze(1) if axis == 1 else x.view(num_samples, -1, *x.shape[1:])


class Recorder(TorchFunctionMode):
    """Records, while active, the uses of parameters by known layers, and keeps these parameters out of the graph.

    Args:
        names: The names of the parameters to record, by ``id``.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.uses: dict[str, list[Use]] = {name: [] for name in names.values()}
        self._names = names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = LAYERS.get(func)
        call = layer(*args, **kwargs) if layer is not None and torch.is_grad_enabled() else None
        gradients = [] if call is None else [(p, g) for p, g in call.gradients if id(p) in self._names]
        if call is None or not gradients:
            return func(*args, **kwargs)
        # Still requiring gradients, so that the layer keeps for its backward pass what it always does (checkpointing
        # compares), but not those of the parameters: asked for nothing, autograd does not compute them.
        detached = {id(p): p.detach().requires_grad_() for p, _ in gradients}
        output = func(
            *(detached.get(id(value), value) for value in args),
            **{key: detached.get(id(value), value) for key, value in kwargs.items()},
        )
        # An edge of the graph, unlike the tensor, stays what it is when the output is changed in place.
        edge = get_gradient_edge(output)
        for p, gradient in gradients:
            use = Use(gradient, call.input.detach(), output.shape, call.is_sequence, edge)
            self.uses[self._names[id(p)]].append(use)
        return output
