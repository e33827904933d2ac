"""Gradients of single samples for any module: by ``torch.func.vmap``, or one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode

from lightning_continual import _batch
from lightning_continual.importance.moments import Moments, accumulator_dtype, chunks
from lightning_continual.parameters import ParamDict, computing_with

Totals = Callable[[Any, int], list[Tensor]]
"""Maps a batch and its number of samples to the scalars whose per-sample gradients are meant."""


def moments_by_vmap(
    module: nn.Module, totals: Totals, batch: Any, parameters: ParamDict, *, with_sums: bool
) -> Moments:
    """Compute the moments of ``parameters`` for all samples at once.

    Raises:
        Exception: Whatever ``vmap`` raises where it cannot follow the module.
    """
    leaves, rebuild = _batch.flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) < len(leaves):
        raise TypeError("vmap takes tensors only.")
    # All parameters detached, not only those asked for: autograd need not follow underneath.
    everything = {name: p.detach() for name, p in module.named_parameters()}
    asked = {name: p.detach() for name, p in parameters.items()}

    def of_one(*sample: Tensor) -> tuple[ParamDict, ParamDict]:
        one = rebuild([leaf.unsqueeze(0) for leaf in sample])

        def values_with(asked: ParamDict) -> Tensor:
            with computing_with(module, everything | asked), _BatchedState():
                return torch.stack(totals(one, 1))

        values, pull_back, *_ = vjp(values_with, asked)
        squares: ParamDict = {}
        sums: ParamDict = {}
        for row in torch.eye(len(values), dtype=values.dtype, device=values.device):
            for name, gradient in pull_back(row)[0].items():
                gradient = gradient.to(accumulator_dtype(gradient))
                squares[name] = squares.get(name, 0) + gradient.square()
                if with_sums:
                    sums[name] = sums.get(name, 0) + gradient
        return squares, sums

    moments = Moments(with_sums)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for part in chunks(len(tensors[0]), sum(p.numel() for p in parameters.values())):
            squares, sums = vmap(of_one, randomness="different")(*(leaf[part] for leaf in tensors))
            for name in parameters:
                moments.add_sums(name, squares=squares[name].sum(0))
                if with_sums:
                    moments.add_sums(name, sums=sums[name].sum(0))
    return moments


def moments_by_loop(totals: Totals, batch: Any, parameters: ParamDict, *, with_sums: bool) -> Moments:
    """Compute the moments of ``parameters`` one sample at a time."""
    leaves, rebuild = _batch.flatten(batch)
    moments = Moments(with_sums)
    for index in range(len(leaves[0])):
        one = rebuild(_batch.take(leaves, torch.tensor([index])))
        for gradients in ordinary_gradients(totals(one, 1), list(parameters.values())):
            moments.add_single(parameters, gradients)
    return moments


def ordinary_gradients(totals: Sequence[Tensor], inputs: Sequence[Any]) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield, for each scalar, its gradients with respect to ``inputs`` (``None``: does not depend on it)."""
    for number, total in enumerate(totals):
        yield torch.autograd.grad(total, inputs, retain_graph=number + 1 < len(totals), allow_unused=True)


class _BatchedState(TorchFunctionMode):
    """Gives recurrent layers an initial state for each sample: they write into it, which vmap allows only then."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            x, state, *rest = args
            zero = 0 * x.detach().flatten()[0]
            state = tuple(h + zero for h in state) if isinstance(state, tuple | list) else state + zero
            args = (x, state, *rest)
        return func(*args, **(kwargs or {}))
