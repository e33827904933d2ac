"""What holds weights to where they were: softly, by a quadratic penalty; or hard, by a pin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_continual.parameters import ParamDict, is_sharded, sharded_like, whole

_LARGE = 2**14
"""Elements of a parameter, above which it pays to write some of its rows by themselves."""


@dataclass(frozen=True)
class QuadraticPenalty:
    r"""A quadratic penalty on weights, in natural parameters.

    .. math::
        P(\theta) = \tfrac12 \sum_i \Lambda_i \theta_i^2 - \sum_i \eta_i \theta_i + \text{const}
                  = \tfrac12 \sum_i \Lambda_i (\theta_i - \mu_i)^2 + r, \qquad \eta = \Lambda \mu

    A sum of such penalties is one such penalty: :math:`\Lambda` and :math:`\eta` add up. So there are two tensors a
    weight for any number of tasks, and the gradient :math:`\Lambda \theta - \eta` is that of all of them.

    Penalties combine by ``a + b`` and ``γ * a``; nothing is changed in place.

    Args:
        precision: :math:`\Lambda`, not negative, by parameter name. Names that are missing are not penalised.
        shift: :math:`\eta`, of the same names and shapes.
        residual: :math:`r`, what remains of the penalties summed up at the best weights: zero for a single one.

    Example:
        >>> one = QuadraticPenalty.around({"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])})
        >>> two = QuadraticPenalty.around({"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])})
        >>> (one + two).value({"w": torch.tensor([1.0])})  # half of 1, twice
        tensor(1.)
        >>> (one + two).gradient({"w": torch.tensor([3.0])})["w"]  # 3 + 1
        tensor([4.])

    References:
        - Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017.
        - Huszár. *Note on the quadratic penalties in elastic weight consolidation.* PNAS 2018.
    """

    precision: ParamDict = field(default_factory=dict)
    shift: ParamDict = field(default_factory=dict)
    residual: float = 0.0

    @classmethod
    def around(cls, anchor: Mapping[str, Tensor], precision: Mapping[str, Tensor]) -> QuadraticPenalty:
        r"""Return :math:`\tfrac12 \sum_i \Lambda_i (\theta_i - \theta^*_i)^2` around an anchor :math:`\theta^*`.

        In single precision at least: half precision would not hold what one task adds to many.
        """
        precise = {name: sharded_like(_precise(one.detach()).clone(), anchor[name]) for name, one in precision.items()}
        return cls(precise, {name: value * _precise(anchor[name].detach()) for name, value in precise.items()})

    def __bool__(self) -> bool:
        return bool(self.precision)

    def __add__(self, other: QuadraticPenalty) -> QuadraticPenalty:
        names = [*self.precision, *(name for name in other.precision if name not in self.precision)]
        both = [name for name in names if name in self.precision and name in other.precision]
        distance = 0.0
        for name in both:
            # The minimum of Λ₁(θ - μ₁)² + Λ₂(θ - μ₂)² is Λ₁Λ₂ / (Λ₁ + Λ₂) (μ₁ - μ₂)².
            a, b = self.precision[name].double(), other.precision[name].double()
            gap = self.shift[name].double() * b - other.shift[name].double() * a
            distance += float(whole((gap.square() / (a * b * (a + b))).nan_to_num(0.0, 0.0, 0.0).sum()))
        return QuadraticPenalty(
            _sum(self.precision, other.precision, names),
            _sum(self.shift, other.shift, names),
            self.residual + other.residual + distance / 2,
        )

    def __mul__(self, factor: float) -> QuadraticPenalty:
        return QuadraticPenalty(
            {name: factor * value for name, value in self.precision.items()},
            {name: factor * value for name, value in self.shift.items()},
            factor * self.residual,
        )

    __rmul__ = __mul__

    def gradient(self, parameters: Mapping[str, Tensor]) -> ParamDict:
        r"""Return :math:`\Lambda \theta - \eta`, by name."""
        return {name: value * parameters[name].detach() - self.shift[name] for name, value in self.precision.items()}

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        r"""Return :math:`P(\theta)`, ``()``.

        It is summed over squares of distances, so that it is accurate near the anchor, and never negative.
        """
        total = torch.tensor(self.residual)
        for name, precision in self.precision.items():
            mean = (self.shift[name] / precision).nan_to_num(0.0, 0.0, 0.0)
            own = whole((precision * (parameters[name].detach() - mean).square()).sum())
            total = total.to(own) + own / 2
        return total

    def aligned_with(self, parameters: Mapping[str, Tensor]) -> QuadraticPenalty:
        """Return the penalty for a module whose layers may have gained rows (outputs), which are free.

        Args:
            parameters: The module's parameters by name.

        Returns:
            The penalty on the parameters' device, with zeros for the new rows.

        Raises:
            ValueError: If a parameter has disappeared, or changed in another way; the error names it.
        """
        if all(name in parameters and _fits(value, parameters[name]) for name, value in self.precision.items()):
            return self
        precision, shift = {}, {}
        for name, old in self.precision.items():
            new = _successor(name, old, parameters, "penalised")
            precision[name], shift[name] = (_grown(value, new) for value in (old, self.shift[name]))
        return QuadraticPenalty(precision, shift, self.residual)

    def add_gradient_(self, parameters: Mapping[str, Tensor], strength: float) -> None:
        r"""Add :math:`\lambda (\Lambda \theta - \eta)` to the gradients of parameters, in place.

        Args:
            parameters: Some of the parameters that are penalised, by name; a missing gradient counts as zero.
            strength: :math:`\lambda`.
        """
        with torch.no_grad():
            for names in _groups([name for name in self.precision if name in parameters], parameters):
                grads = [_dense_gradient(parameters[name]) for name in names]
                # The difference first: it is zero at the anchor, and leaves the digits of the gradient alone.
                difference = torch._foreach_mul(
                    [self.precision[name] for name in names], [parameters[name].detach() for name in names]
                )
                torch._foreach_sub_(difference, [self.shift[name] for name in names])
                torch._foreach_add_(grads, difference, alpha=strength)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers. With sharded parameters a collective, for the tensors are whole."""
        precision, shift = ({name: whole(one) for name, one in of.items()} for of in (self.precision, self.shift))
        return {"precision": precision, "shift": shift, "residual": self.residual}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> QuadraticPenalty:
        """Return what `state_dict` was taken of."""
        return cls(dict(state_dict["precision"]), dict(state_dict["shift"]), float(state_dict["residual"]))


@dataclass(frozen=True)
class Pin:
    r"""Holds some weights at values, to the bit, whatever an optimizer does.

    .. math:: g_i \leftarrow 0, \qquad \theta_i \leftarrow v_i \qquad \text{for every pinned } i

    The first before a step, so that clipping by norm sees the truth; the second after it, for momentum, weight decay
    and Adam move a weight whose gradient is zero.

    Pins combine by ``a | b``, which holds what either holds; nothing is changed in place.

    Args:
        pinned: What is held (bool), by parameter name. Names that are missing are free.
        values: What it is held at, of the same names and shapes; what stands where nothing is pinned does not count.

    Example:
        >>> pin = Pin({"w": torch.tensor([True, False])}, {"w": torch.tensor([5.0, 0.0])})
        >>> weight = torch.tensor([1.0, 2.0])
        >>> pin.put_back_({"w": weight})
        >>> weight
        tensor([5., 2.])
    """

    pinned: ParamDict = field(default_factory=dict)
    values: ParamDict = field(default_factory=dict)

    @classmethod
    def at(cls, parameters: Mapping[str, Tensor], pinned: Mapping[str, Tensor]) -> Pin:
        """Return the pin that holds ``pinned`` (bool, by name) where the parameters now are."""
        kept = {name: one.detach().clone() for name, one in pinned.items()}
        return cls(kept, {name: torch.where(one, parameters[name].detach(), 0) for name, one in kept.items()})

    @classmethod
    def at_zero(cls, parameters: Mapping[str, Tensor], pinned: Mapping[str, Tensor]) -> Pin:
        """Return the pin that holds ``pinned`` (bool, by name) at zero; its values take no memory."""
        return cls(
            dict(pinned), {name: parameters[name].new_zeros(()).expand(one.shape) for name, one in pinned.items()}
        )

    def __bool__(self) -> bool:
        return bool(self.pinned)

    def __or__(self, other: Pin) -> Pin:
        pinned, values = dict(self.pinned), dict(self.values)
        for name, theirs in other.pinned.items():
            value = other.values[name]
            if name in pinned:
                ours = pinned[name]
                if bool(((values[name] != value) & ours & theirs).any()):
                    raise ValueError(
                        f"Two pins must hold what they share at one value, but they hold weights of {name!r} at"
                        " different ones. Free it in one of the two."
                    )
                theirs, value = ours | theirs, torch.where(ours, values[name], value)
            pinned[name], values[name] = theirs, value
        return Pin(pinned, values)

    def num_pinned(self) -> int:
        """Return how many weights are held."""
        return sum(int(one.sum()) for one in self.pinned.values())

    def aligned_with(self, parameters: Mapping[str, Tensor]) -> Pin:
        """Return the pin for a module whose layers may have gained rows (outputs), which are free.

        Args:
            parameters: The module's parameters by name.

        Returns:
            The pin on the parameters' devices and in their types.

        Raises:
            ValueError: If a parameter has disappeared, or changed in another way; the error names it.
        """
        if all(name in parameters and _is_like(value, parameters[name]) for name, value in self.values.items()):
            return self
        pinned, values = {}, {}
        for name, old in self.pinned.items():
            new = _successor(name, old, parameters, "pinned")
            pinned[name], values[name] = _grown(old, new), _grown(self.values[name], new).to(new.dtype)
        return Pin(pinned, values)

    def mask_gradients_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the gradients of what is held to zero, in place; parameters without gradient stay without."""
        names = [name for name in self.pinned if name in parameters and parameters[name].grad is not None]
        with torch.no_grad():
            for name in [name for name in names if name in self._rows]:
                _dense_gradient(parameters[name]).index_fill_(0, self._rows[name][0], 0.0)
            for group in _groups([name for name in names if name not in self._rows], parameters):
                grads = [_dense_gradient(parameters[name]) for name in group]
                torch._foreach_mul_(grads, [self._free[name] for name in group])

    def put_back_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set what is held to its values, in place. The rest must be finite."""
        names = [name for name in self.pinned if name in parameters]
        with torch.no_grad():
            for name in [name for name in names if name in self._rows]:
                parameters[name].detach().index_copy_(0, *self._rows[name])
            for group in _groups([name for name in names if name not in self._rows], parameters):
                weights = [parameters[name].detach() for name in group]
                # Several times faster than `where`, and as exact: a product with 1 and a sum with 0.
                torch._foreach_mul_(weights, [self._free[name] for name in group])
                held = [number for number, name in enumerate(group) if self._is_elsewhere[name]]
                if held:
                    values = [self.values[group[number]] for number in held]
                    torch._foreach_add_([weights[number] for number in held], values)

    def put_into_(self, state_dict: dict[str, Tensor]) -> None:
        """Put what is held into a ``state_dict``, which may be that of an average of weights.

        Tensors themselves do not change: those that lack a value are replaced.

        Example:
            >>> state_dict = {"w": torch.tensor([1e-9, 2.0])}
            >>> Pin({"w": torch.tensor([True, False])}, {"w": torch.zeros(2)}).put_into_(state_dict)
            >>> state_dict
            {'w': tensor([0., 2.])}
        """
        for name in self.pinned.keys() & state_dict.keys():
            found = state_dict[name]
            mask, values = self.pinned[name].to(found.device), self.values[name].to(found)
            if not torch.equal(found[mask], values[mask]):
                state_dict[name] = torch.where(mask, values, found)

    @cached_property
    def _rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of large parameters that are held by whole rows: which rows, and what they are. They alone are written."""
        found = {}
        for name, one in self.pinned.items():
            if one.ndim > 1 and one.numel() >= _LARGE:
                held = one.flatten(1).any(1)
                if torch.equal(held, one.flatten(1).all(1)):
                    index = held.nonzero().flatten()
                    found[name] = index, self.values[name][index]
        return found

    @cached_property
    def _free(self) -> ParamDict:
        """1 where nothing is held, in the type of the weights."""
        masks = {name: one for name, one in self.pinned.items() if name not in self._rows}
        return {name: (~one).to(self.values[name].dtype) for name, one in masks.items()}

    @cached_property
    def _is_elsewhere(self) -> dict[str, bool]:
        """Whether anything of a parameter is held at another value than zero."""
        return {name: bool(value.any()) for name, value in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors."""
        return {"pinned": dict(self.pinned), "values": dict(self.values)}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Pin:
        """Return what `state_dict` was taken of."""
        return cls(dict(state_dict["pinned"]), dict(state_dict["values"]))


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _fits(value: Tensor, like: Tensor) -> bool:
    return value.shape == like.shape and value.device == like.device and is_sharded(value) == is_sharded(like)


def _is_like(value: Tensor, like: Tensor) -> bool:
    return _fits(value, like) and value.dtype == like.dtype


def _successor(name: str, old: Tensor, parameters: Mapping[str, Tensor], how: str) -> Tensor:
    """Return the parameter ``name``, which may have more rows than ``old`` had, and must not differ otherwise."""
    new = parameters.get(name)
    if new is None:
        raise ValueError(
            f"Parameter {name!r} is {how}, but the module has it no more. Restore into a module of the same"
            " architecture, or begin anew without the callback's state."
        )
    if new.shape[1:] != old.shape[1:] or new.ndim != old.ndim or new.shape[:1] < old.shape[:1]:
        raise ValueError(
            f"Parameter {name!r} is {how} with shape {tuple(old.shape)}, but has shape {tuple(new.shape)}. Only rows"
            " (outputs) may be added. Restore into a module of the same architecture."
        )
    return new


def _grown(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` on the device of ``like``, and sharded like it, with zeros for its new rows."""
    if value.shape != like.shape:
        value = pad(whole(value), (0, 0) * (like.ndim - 1) + (0, len(like) - len(value)))
    return sharded_like(value, like)


def _groups(names: Sequence[str], parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Return names in groups of a million weights, or one tensor: what is computed from them stays in a cache."""
    groups: list[list[str]] = []
    size = 0
    for name in names:
        size += parameters[name].numel()
        if not groups or size > 2**20:
            groups.append([])
            size = parameters[name].numel()
        groups[-1].append(name)
    return groups


def _dense_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of ``parameter`` to add to in place: zeros if it has none."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        parameter.grad = gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
    return gradient


def _sum(one: ParamDict, two: ParamDict, names: Sequence[str]) -> ParamDict:
    return {
        name: one[name] + two[name] if name in one and name in two else one[name] if name in one else two[name]
        for name in names
    }
