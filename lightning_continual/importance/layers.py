r"""Per-sample gradients of a layer's parameters, from the layer's input and the gradient of its output.

With input :math:`a` and gradient of the output :math:`\delta`, both ``(N, K, *)`` (``N`` samples, each ``K`` rows of
what the layer took for its batch, usually one), the gradient of sample ``n`` is a sum over its rows and positions
``t``, for a linear layer

.. math::
    g_n = \sum_t \delta_{nt} a_{nt}^\top, \qquad
    \sum_n g_n^2 = (\delta^2)^\top a^2 \quad\text{where there is one position only.}

Convolutions are linear layers over their windows; normalisations are products with the normalised input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gradient:
    """How the gradients of one parameter follow from ``(a, δ)`` of one call of a layer.

    Args:
        per_sample: Maps ``(a, δ)`` to the gradients of single samples ``(N, *shape)``.
        workspace: Maps ``(a, δ)`` to the number of elements that ``per_sample`` needs for a sample.
        square_sum: Maps ``(a, δ)`` to the sum over samples of squared gradients, where that needs no gradients.
        is_outer: Whether, with one position, the gradient of a sample is the outer product of ``δ`` and ``a``.
    """

    per_sample: Formula
    workspace: Callable[[Tensor, Tensor], int]
    square_sum: Formula | None = None
    is_outer: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, and the gradients of the parameters that it was given."""

    input: Tensor
    gradients: list[tuple[Tensor, Gradient]]
    is_sequence: bool = False
    """Whether the second dimension may be that of the samples: ``(T, B, *)``."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:  # noqa: A002
    gradients = [(weight, Gradient(_outer, lambda *_: weight.numel(), is_outer=True))]
    return Call(input, gradients + _bias(bias, partial(_sum_to_last, ndim=1)), is_sequence=True)


def _outer(a: Tensor, delta: Tensor) -> Tensor:
    return torch.bmm(delta.flatten(1, -2).mT, a.flatten(1, -2))


def _convolution(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Call | None:
    kernel = tuple(weight.shape[2:])
    if input.ndim != weight.ndim:  # one sample without a batch dimension
        return None
    windows = _Windows(kernel, _each(stride, kernel), _pads(padding, kernel, dilation), _each(dilation, kernel), groups)
    gradient = Gradient(windows.contract, lambda a, delta: windows.size(a, delta, weight))
    return Call(input, [(weight, gradient), *_bias(bias, _sum_to_channel)])


def _transposed_convolution(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Call | None:
    kernel = tuple(weight.shape[2:])
    if input.ndim != weight.ndim:
        return None
    windows = _Windows(kernel, _each(stride, kernel), _pads(padding, kernel, dilation), _each(dilation, kernel), groups)
    # The adjoint of a convolution: input and output change places.
    gradient = Gradient(lambda a, delta: windows.contract(delta, a), lambda a, delta: windows.size(delta, a, weight))
    return Call(input, [(weight, gradient), *_bias(bias, _sum_to_channel)])


@dataclass(frozen=True)
class _Windows:
    """The windows of a convolution."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def contract(self, a: Tensor, delta: Tensor) -> Tensor:
        """Map ``(N, K, C, *)`` and ``(N, K, O, *)`` to gradients ``(N, O, C / groups, *kernel)``."""
        samples, rows = a.shape[:2]
        a = F.pad(a.flatten(0, 1), [side for pair in reversed(self.pads) for side in pair])
        delta = delta.flatten(0, 1)
        positions = delta.shape[2:]
        batch, channel, *space = a.stride()
        windows = a.as_strided(
            (*a.shape[:2], *self.kernel, *positions),
            (
                batch,
                channel,
                *(step * by for step, by in zip(space, self.dilation, strict=True)),
                *(step * by for step, by in zip(space, self.stride, strict=True)),
            ),
            a.storage_offset(),
        )
        columns = windows.reshape(len(a) * self.groups, -1, prod(positions))
        gradients = torch.bmm(delta.reshape(len(columns), -1, prod(positions)), columns.mT)
        gradients = gradients.view(samples, rows, delta.shape[1], a.shape[1] // self.groups, *self.kernel)
        return gradients.squeeze(1) if rows == 1 else gradients.sum(1)

    def size(self, a: Tensor, delta: Tensor, weight: Tensor) -> int:
        """Return the number of elements that `contract` needs for a sample."""
        rows, channels = a.shape[1:3]
        return rows * max(weight.numel(), channels * prod(self.kernel) * prod(delta.shape[3:]))


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    padding = None if padding_idx is None else padding_idx % len(weight)
    per_sample = partial(_scatter, num_rows=len(weight), padding=padding)
    squares = partial(_scatter_squares, num_rows=len(weight), padding=padding)
    return Call(input, [(weight, Gradient(per_sample, lambda *_: weight.numel(), squares))], is_sequence=True)


def _scatter(a: Tensor, delta: Tensor, num_rows: int, padding: int | None) -> Tensor:
    slots, values = _slots(a, delta, num_rows, padding)
    flat = delta.new_zeros(len(a) * num_rows, delta.shape[-1]).index_add_(0, slots, values)
    return flat.view(len(a), num_rows, -1)


def _scatter_squares(a: Tensor, delta: Tensor, num_rows: int, padding: int | None) -> Tensor:
    slots, values = _slots(a, delta, num_rows, padding)
    used, where = torch.unique(slots, return_inverse=True)
    sums = values.new_zeros(len(used), values.shape[-1]).index_add_(0, where, values)
    return values.new_zeros(num_rows, values.shape[-1]).index_add_(0, used % num_rows, sums.square_())


def _slots(a: Tensor, delta: Tensor, num_rows: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """Return the row ``n * num_rows + index`` of every index, and what is added there."""
    index = a.flatten(1).long()
    slots = (index + num_rows * torch.arange(len(a), device=a.device)[:, None]).flatten()
    values = delta.reshape(len(slots), -1)
    if padding is not None:
        kept = index.flatten() != padding
        slots, values = slots[kept], values[kept]
    return slots, values


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call:
    if training:
        raise ValueError(
            "A sample has no gradient of its own where a batch normalisation uses the statistics of the batch, but"
            " this module has one that does so in evaluation mode. Use `track_running_stats=True`, or GroupNorm."
        )

    def normalise(x: Tensor) -> Tensor:
        # Without weights it takes no half precision beside statistics of half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = (None if one is None else one.to(dtype) for one in (running_mean, running_var))
        return F.batch_norm(x.to(dtype), mean, var, eps=eps)

    return Call(input, _affine(weight, bias, normalise, _sum_to_channel))


def _group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Call:
    normalise = partial(F.group_norm, num_groups=num_groups, eps=eps)
    return Call(input, _affine(weight, bias, normalise, _sum_to_channel))


def _instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call:
    normalise = partial(
        F.instance_norm, running_mean=running_mean, running_var=running_var, use_input_stats=use_input_stats, eps=eps
    )
    return Call(input, _affine(weight, bias, normalise, _sum_to_channel))


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Call:
    normalise = partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    total = partial(_sum_to_last, ndim=len(normalized_shape))
    return Call(input, _affine(weight, bias, normalise, total), is_sequence=True)


def _rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Call:
    normalise = partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    total = partial(_sum_to_last, ndim=len(normalized_shape))
    return Call(input, _affine(weight, None, normalise, total), is_sequence=True)


def _affine(
    weight: Tensor | None, bias: Tensor | None, normalise: Callable[..., Tensor], total: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Gradient]]:
    """Return the gradients of ``weight`` and ``bias`` in ``weight * normalise(input) + bias``."""

    def per_sample(a: Tensor, delta: Tensor) -> Tensor:
        return total(delta * normalise(a.flatten(0, 1)).view_as(delta))

    scale = [] if weight is None else [(weight, Gradient(per_sample, lambda _, delta: delta[0].numel()))]
    return scale + _bias(bias, total)


def _bias(bias: Tensor | None, total: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Gradient]]:
    """Return the gradient of what is added to every position of the output."""
    if bias is None:
        return []
    return [(bias, Gradient(lambda _, delta: total(delta), lambda _, delta: delta[0].numel()))]


def _sum_to_last(x: Tensor, ndim: int) -> Tensor:
    """Sum ``(N, K, *, *shape)`` to ``(N, *shape)`` with ``ndim`` dimensions of shape."""
    return x.sum(tuple(range(1, x.ndim - ndim)))


def _sum_to_channel(x: Tensor) -> Tensor:
    """Sum ``(N, K, C, *)`` to ``(N, C)``."""
    return x.sum((1, *range(3, x.ndim)))


def _each(value: int | Sequence[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return one number a spatial dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _pads(
    padding: str | int | Sequence[int], kernel: tuple[int, ...], dilation: int | Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the padding before and after, for every spatial dimension."""
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        totals = [by * (size - 1) for by, size in zip(_each(dilation, kernel), kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in _each(padding, kernel))


LAYERS: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
"""What is known of each layer function; a call that it does not cover gives ``None``."""
