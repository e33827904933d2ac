"""Sums over samples of gradients and of squared gradients, and how the terms of layers make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_continual.importance.layers import Gradient
from lightning_continual.parameters import ParamDict

_WORKSPACE = 2**22
"""Elements held at a time for gradients of single samples: enough to keep a processor busy, few enough for caches."""


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which squares of numbers like ``x`` are summed: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Moments:
    """For each parameter the sums over samples of squared gradients and, if asked for, of gradients.

    A parameter that is missing has gradient zero. Sums are at least in float32.
    """

    with_sums: bool
    squares: ParamDict = field(default_factory=dict)
    sums: ParamDict = field(default_factory=dict)

    def add(self, name: str, gradients: Tensor) -> None:
        """Add gradients ``(N, *shape)`` of single samples, which are overwritten."""
        if self.with_sums:
            self.add_sums(name, sums=gradients.sum(0))
        self.add_sums(name, squares=gradients.square_().sum(0))

    def add_sums(self, name: str, *, squares: Tensor | None = None, sums: Tensor | None = None) -> None:
        """Add what is summed over samples already; the tensors now belong to the moments."""
        for total, value in ((self.squares, squares), (self.sums, sums)):
            if value is not None:
                total[name] = total[name].add_(value) if name in total else value

    def add_single(self, names: Iterable[str], gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one sample (``None``: zero)."""
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(accumulator_dtype(gradient))
                self.add_sums(name, squares=gradient.square(), sums=gradient.clone() if self.with_sums else None)

    def update(self, other: Moments, names: Iterable[str]) -> None:
        """Add the moments of other samples for the parameters in ``names``; the tensors now belong to these moments."""
        for name in names:
            self.add_sums(name, squares=other.squares.get(name), sums=other.sums.get(name))


@dataclass(frozen=True)
class Term:
    """One use of a parameter: the layer's input ``a`` and the gradient ``δ`` of its output, both ``(N, K, *)``."""

    gradient: Gradient
    a: Tensor
    delta: Tensor

    def per_sample(self, part: slice) -> Tensor:
        """Return the gradients of some of the samples."""
        return self.gradient.per_sample(self.a[part], self.delta[part])

    def total(self) -> Tensor:
        """Return the sum of the gradients over samples: the gradient of all of them taken as one."""
        return self.gradient.per_sample(self.a.flatten(0, 1)[None], self.delta.flatten(0, 1)[None])[0]

    @property
    def is_outer(self) -> bool:
        """Whether the gradient of a sample is the outer product of ``δ`` and ``a``."""
        return self.gradient.is_outer and self.a.numel() == len(self.a) * self.a.shape[-1]


class Contraction:
    """Makes moments of terms.

    Args:
        with_sums: Whether to sum the gradients, too.
    """

    def __init__(self, with_sums: bool) -> None:
        self._moments = Moments(with_sums)
        self._outer: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, terms: Sequence[Term]) -> None:
        """Add what the terms of all uses of one parameter make of its gradients."""
        first = terms[0]
        if len(terms) == 1 and first.is_outer:
            # Of the terms that have the input in common, δ² is summed before it meets a².
            energy = first.delta.flatten(1).square()
            self._outer[name] = (energy + self._outer[name][0] if name in self._outer else energy, first.a.flatten(1))
        elif len(terms) == 1 and first.gradient.square_sum is not None:
            self._moments.add_sums(name, squares=first.gradient.square_sum(first.a, first.delta))
        else:
            largest = max(term.gradient.workspace(term.a, term.delta) for term in terms)
            for part in chunks(len(first.a), largest):
                # A parameter used several times has one gradient, the sum over its uses; only then comes the square.
                gradients = first.per_sample(part)
                for term in terms[1:]:
                    gradients += term.per_sample(part)
                self._moments.add(name, gradients)
            return
        if self._moments.with_sums:
            self._moments.add_sums(name, sums=first.total())

    def compute(self) -> Moments:
        """Return the moments of all terms added."""
        while self._outer:
            name, (energy, a) = self._outer.popitem()
            self._moments.add_sums(name, squares=energy.mT @ a.square())
        return self._moments


def chunks(num_samples: int, elements_each: int) -> list[slice]:
    """Cut ``num_samples`` into slices whose gradients fit the memory set aside for them."""
    step = max(1, _WORKSPACE // max(elements_each, 1))
    return [slice(start, start + step) for start in range(0, num_samples, step)]
