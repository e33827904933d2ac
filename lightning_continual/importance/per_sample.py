r"""Sums over samples of gradients and of their squares, without a loop over the samples.

The gradient of sample ``n`` is that of the loss of a batch which holds this sample alone. Three ways lead to it, chosen
for each parameter:

1. *Layers.* While the loss is computed, calls of known layers are recorded, with their parameters detached, so that
   autograd never computes an ordinary gradient. One backward pass gives the gradients of the layers' outputs; closed
   forms give the rest.
2. *vmap.* What is used in another way (recurrent layers, attention, a bare ``nn.Parameter``) goes through
   ``torch.func.vmap``.
3. *Loop.* Where that fails, one sample at a time.

The first way holds only where samples do not interact, and where each has its own rows in the layer's input. Neither is
taken on trust: the result is compared with ordinary gradients for a few samples of the first batch, and parameters for
which it differs go the other ways.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_continual import _batch
from lightning_continual.importance.fallback import moments_by_loop, moments_by_vmap, ordinary_gradients
from lightning_continual.importance.moments import Contraction, Moments, Term, accumulator_dtype
from lightning_continual.importance.recording import Recorder, Use
from lightning_continual.parameters import trainable

Reduction: TypeAlias = Literal["mean", "sum"]

_LOGGER = logging.getLogger("lightning_continual")
_TOLERANCE = 1e-2
"""Relative difference of squared gradients left to rounding; where samples interact it is far larger."""
_NUM_VERIFIED = 3
"""Samples for which the closed forms are compared with ordinary gradients."""


class PerSampleGradients:
    r"""Accumulate :math:`\sum_n g_n^2` and, if asked to, :math:`\sum_n g_n`, for every trainable parameter.

    A parameter that the loss does not use has gradient zero. To be used inside `undisturbed`.

    Args:
        module: The module whose trainable parameters are meant.
        loss: Maps a batch to its loss: the mean or the sum over its samples ``()``, or one loss a sample ``(B,)``, or
            ``K`` of them ``(B, K)``, whose gradients are squared one by one and summed.
        reduction: What a loss of shape ``()`` is.
        with_sums: Whether to accumulate the sums of the gradients, too.

    Raises:
        ValueError: If ``reduction`` is neither ``"mean"`` nor ``"sum"``, or ``module`` has no trainable parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any], Tensor],
        reduction: Reduction = "mean",
        *,
        with_sums: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` must be 'mean' or 'sum', but got {reduction!r}.")
        self.parameters = trainable(module)
        if not self.parameters:
            raise ValueError("The module must have a trainable parameter, but it has none. Unfreeze some.")
        self.count = 0
        self.moments = Moments(with_sums)
        self._module = module
        self._loss = loss
        self._reduction = reduction
        self._with_sums = with_sums
        self._axes: dict[tuple[str, int], int | None] | None = None
        self._slow: set[str] = set()
        self._vmap_works = True
        self._num_batches = 0

    def update(self, batch: Any) -> None:
        """Add the samples of ``batch``.

        Raises:
            ValueError: If the loss is not of a documented shape, is evidently not the ``reduction`` given, or depends
                on no trainable parameter; or if a gradient is not finite.
        """
        num_samples, known = _batch.size(batch), set(self._slow)
        moments = Moments(self._with_sums)
        if len(self._slow) < len(self.parameters):
            totals, uses = self._record(batch, num_samples)
            if self._axes is None and num_samples > 1:
                self._axes = self._verify(batch, num_samples)
            axes = _guess_axes(uses, num_samples) if self._axes is None else self._axes
            moments.update(*self._by_layers(totals, uses, axes, num_samples))
        if self._slow:
            moments.update(self._by_vmap_or_loop(batch), self._slow)
        if self._slow - known:
            how, names = "vmap" if self._vmap_works else "a loop over the samples", ", ".join(sorted(self._slow))
            _LOGGER.info("Gradients of single samples: by %s for %s; by closed forms for the others.", how, names)
        check_finite(moments, self.parameters, self._num_batches)
        self.moments.update(moments, self.parameters)
        self.count += num_samples
        self._num_batches += 1

    def _totals(self, batch: Any, num_samples: int) -> list[Tensor]:
        """Return the scalars whose gradient is the sum over samples of per-sample gradients: one, or ``K``."""
        loss = self._loss(batch)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise ValueError(f"`loss` must return a tensor of floating point numbers, but got {loss!r}.")
        if loss.ndim == 0:
            return [loss * num_samples if self._reduction == "mean" else loss]
        if loss.ndim > 2 or len(loss) != num_samples:
            raise ValueError(
                f"`loss` must return the loss of the batch, (), or one loss a sample, ({num_samples},), but got shape"
                f" {tuple(loss.shape)}. Average over all other dimensions."
            )
        return [loss.sum()] if loss.ndim == 1 else list(loss.sum(0))

    def _record(self, batch: Any, num_samples: int) -> tuple[list[Tensor], dict[str, list[Use]]]:
        names = {id(self.parameters[name]): name for name in self._fast(self.parameters)}
        with Recorder(names) as recorder:
            totals = self._totals(batch, num_samples)
        if not totals[0].requires_grad:
            raise ValueError(
                "`loss` must depend on a trainable parameter, but its result requires no gradient. Compute it from the"
                " module's output, without `detach` or `no_grad`."
            )
        return totals, recorder.uses

    def _by_layers(
        self,
        totals: list[Tensor],
        uses: Mapping[str, list[Use]],
        axes: Mapping[tuple[str, int], int | None],
        num_samples: int,
    ) -> tuple[Moments, list[str]]:
        """Return the moments, and the names of the parameters for which they hold; give up the others."""
        for name, its_uses in uses.items():
            for number, use in enumerate(its_uses):
                axis = axes.get((name, number))
                if axis is None or not use.fits(axis, num_samples):
                    self._slow.add(name)
        edges = list({id(use.edge): use.edge for its_uses in uses.values() for use in its_uses}.values())
        contraction = Contraction(self._with_sums)
        with torch.autocast(totals[0].device.type, enabled=False):
            for found in ordinary_gradients(totals, [*edges, *(self.parameters[name] for name in uses)]):
                deltas = {id(edge): delta for edge, delta in zip(edges, found, strict=False)}
                # A parameter that still is in the graph is used outside of the known layers, too.
                self._slow |= {name for name, g in zip(uses, found[len(edges) :], strict=True) if g is not None}
                for name in self._fast(uses):
                    terms = [
                        _term(use, axes[name, number], delta, num_samples, self.parameters[name])
                        for number, use in enumerate(uses[name])
                        if (delta := deltas[id(use.edge)]) is not None
                    ]
                    if terms:
                        contraction.add(name, terms)
            return contraction.compute(), self._fast(uses)

    def _fast(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self._slow]

    def _by_vmap_or_loop(self, batch: Any) -> Moments:
        slow = {name: p for name, p in self.parameters.items() if name in self._slow}
        if self._vmap_works:
            try:
                return moments_by_vmap(self._module, self._totals, batch, slow, with_sums=self._with_sums)
            except Exception as error:  # whatever it is: if it is not vmap's own, the loop meets it again
                self._vmap_works = False
                _LOGGER.info("Gradients of single samples: vmap cannot follow this module (%s).", error)
        return moments_by_loop(self._totals, batch, slow, with_sums=self._with_sums)

    def _verify(self, batch: Any, num_samples: int) -> dict[tuple[str, int], int | None]:
        """Find the samples' axis in each use; give up those that do not yield the gradients of single samples."""
        leaves, rebuild = _batch.flatten(batch)
        chosen = torch.linspace(0, num_samples - 1, min(num_samples, _NUM_VERIFIED)).long()
        count = len(chosen)
        self._check_reduction(leaves, rebuild, count)
        totals, uses = self._record(rebuild(_batch.take(leaves, chosen)), count)
        axes = _guess_axes(uses, count)
        found, served = self._by_layers([_mixed(totals)], uses, axes, count)
        parameters = list(self.parameters.values())
        expected = Moments(with_sums=False)
        for index in chosen:
            # The sample repeated, not alone, so that the same kernels round in the same way.
            totals = self._totals(rebuild(_batch.take(leaves, index.repeat(count))), count)
            for gradients in ordinary_gradients([_mixed(totals) / count], parameters):
                expected.add_single(self.parameters, gradients)
        largest = max((squares.norm() for squares in expected.squares.values()), default=torch.zeros(()))
        for name in served:
            truth = expected.squares.get(name, torch.zeros_like(self.parameters[name]))
            rounding = (100 * torch.finfo(truth.dtype).eps) ** 2 * largest
            if (found.squares.get(name, 0.0) - truth).norm() > _TOLERANCE * truth.norm() + rounding:
                self._slow.add(name)
        return axes

    def _check_reduction(self, leaves: Sequence[_batch.Leaf], rebuild: Callable[..., Any], count: int) -> None:
        """Compare the loss of a sample with that of several copies of it."""
        first = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            one = self._loss(rebuild(_batch.take(leaves, first)))
            many = self._loss(rebuild(_batch.take(leaves, first.repeat(count))))
        wrong, name = (count, "sum") if self._reduction == "mean" else (1, "mean")
        if many.ndim == 0 and abs(many - wrong * one) < 1e-2 * abs(one):
            raise ValueError(
                f"`loss` must be the {self._reduction} over the samples of a batch, but {count} copies of a sample have"
                f" {wrong} times its loss. Pass `reduction={name!r}`."
            )


def check_finite(moments: Moments, names: Iterable[str], number: int) -> None:
    """Raise a ``ValueError`` that names the first parameter with a gradient in batch ``number`` that is not finite."""
    sums = {name: moments.squares[name].sum() for name in names if name in moments.squares}
    finite = torch.stack([value.isfinite().cpu() for value in sums.values()]).tolist() if sums else []
    for name, is_finite in zip(sums, finite, strict=True):
        if not is_finite:
            raise ValueError(
                f"Gradients must be finite, but those of parameter {name!r} are not in batch {number} (counted from 0)."
                " Look for NaN in the data, for weights that diverged, or for a loss that is undefined for a single"
                " sample."
            )


def _guess_axes(uses: Mapping[str, list[Use]], num_samples: int) -> dict[tuple[str, int], int | None]:
    return {
        (name, number): use.sample_axis(num_samples)
        for name, its_uses in uses.items()
        for number, use in enumerate(its_uses)
    }


def _term(use: Use, axis: int | None, delta: Tensor, num_samples: int, parameter: Tensor) -> Term:
    assert axis is not None
    dtype = accumulator_dtype(parameter)
    a = use.input.to(dtype) if use.input.is_floating_point() else use.input
    return Term(use.gradient, use.arrange(a, axis, num_samples), use.arrange(delta.to(dtype), axis, num_samples))


def _mixed(totals: Sequence[Tensor]) -> Tensor:
    """Return one combination of all, with different weights lest it vanish where the sum does."""
    return torch.stack([(1 + k / len(totals)) * total for k, total in enumerate(totals)]).sum()
