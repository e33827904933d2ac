"""The weights of a network, dealt out to arms: layers, groups named by patterns, or units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_continual.parameters import ParamDict, trainable

Deal: TypeAlias = "Callable[[nn.Module, Collection[str] | None], WeightArms]"
"""From a module and the names of the parameters that are to be dealt out (None: the trainable ones) to arms."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Patterns = Mapping[str, "str | Sequence[str]"]
"""Patterns of parameter names, as ``"encoder.*"``, by the name of the arm."""


@dataclass(frozen=True)
class WeightArms:
    """Which arm each weight belongs to; a parameter that is missing belongs to none, and is always trained.

    Args:
        names: A name for each of the K arms.
        owner: By parameter name the arm ``()`` of all its weights, or the arms ``(rows,)`` of its rows.
        dims: By parameter name the dimension along which its rows lie.
        sizes: The number of weights of each arm ``(K,)``.
        norms: By the name of a layer that keeps running statistics the arms it follows ``(n,)``.
    """

    names: tuple[str, ...]
    owner: ParamDict
    dims: dict[str, int]
    sizes: Tensor
    norms: ParamDict

    @property
    def costs(self) -> Tensor:
        """The share of all arms' weights that each arm has ``(K,)``."""
        return self.sizes.double() / self.sizes.sum()

    def resting(self, played: Tensor) -> tuple[set[str], ParamDict]:
        """Return what rests when only some arms are played.

        Args:
            played: Which arms are ``(K,)``.

        Returns:
            The names of parameters that rest as a whole, and for those that rest in part which rows do, in a shape
            that broadcasts to the parameter's.
        """
        whole, parts = set(), {}
        for name, arms in self.owner.items():
            rests = ~played[arms]
            if bool(rests.all()):
                whole.add(name)
            elif bool(rests.any()):
                parts[name] = rests
        return whole, parts

    def resting_norms(self, played: Tensor) -> list[str]:
        """Return the layers with running statistics that rest when only some arms ``(K,)`` are played."""
        return [name for name, arms in self.norms.items() if not bool(played[arms].any())]

    def add_to_(self, totals: Tensor, name: str, values: Tensor) -> None:
        """Add values of a parameter's weights, all not negative, to the totals ``(K,)`` of their arms, in place."""
        arms = self.owner[name].reshape(-1)
        rows = values.sum().reshape(1) if self.owner[name].ndim == 0 else _by_row(values, self.dims[name])
        totals.index_add_(0, arms, rows.to(totals))


def layer_arms(
    module: nn.Module, names: Collection[str] | None = None, *, head: str | Sequence[str] | None = None
) -> WeightArms:
    """Make an arm of each layer: of its weights, and of the normalisation that follows it.

    Layers are the modules with own parameters of two or more dimensions, in the order of their definition; a
    normalisation, or what else has only vectors, belongs to the layer before it, or to none if it is the first. A
    parameter that two layers share belongs to the first of them. The head is no arm, nor what others share with it.

    Args:
        module: The network.
        names: The parameters that are dealt out, each by its first name; the trainable ones if None.
        head: Patterns of the names of parameters that are always trained; the last layer if None. Of a shared
            parameter any name will do.

    Raises:
        ValueError: If a pattern of ``head`` names nothing, or nothing is left for arms.

    Example:
        >>> layer_arms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))).names
        ('0',)
    """
    parameters = _Parameters(module, names, head)
    groups = {layer: [name for name, _ in own] for layer, own in parameters.layers().items()}
    return _whole(module, groups)


def pattern_arms(
    module: nn.Module,
    names: Collection[str] | None = None,
    *,
    patterns: Patterns,
    head: str | Sequence[str] | None = None,
) -> WeightArms:
    """Make an arm of each group of parameters that patterns name; what no pattern names is always trained.

    Args:
        module: The network.
        names: The parameters that are dealt out, each by its first name; the trainable ones if None.
        patterns: Patterns of parameter names, by the arm's name. Of a shared parameter any name will do.
        head: Patterns of the names of parameters that are always trained; the last layer if None.

    Raises:
        ValueError: If a pattern names nothing but the head, or two arms name the same parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        >>> pattern_arms(model, patterns={"body": ["0.*", "1.*"]}).sizes
        tensor([21])
    """
    parameters = _Parameters(module, names, head)
    groups: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for arm, wanted in patterns.items():
        groups[arm] = []
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            found = [name for name in parameters.named(pattern) if name not in parameters.head]
            if not found:
                free = [name for name in parameters.aliases if name not in parameters.head]
                raise ValueError(
                    f"Arm {arm!r} has the pattern {pattern!r}, which names no trainable parameter but the head's; there"
                    f" are {free}."
                )
            for name in found:
                if taken.setdefault(name, arm) != arm:
                    raise ValueError(
                        f"Parameter {name!r} must belong to one arm, but {taken[name]!r} and {arm!r} name it. Make the"
                        " patterns narrower."
                    )
            groups[arm] += [name for name in found if name not in groups[arm]]
    return _whole(module, groups)


def unit_arms(
    module: nn.Module, names: Collection[str] | None = None, *, head: str | Sequence[str] | None = None
) -> WeightArms:
    """Make an arm of each unit: of its row in a layer's weights, its bias, and its place in the norm that follows.

    What has no row for each unit, as a layer's scale, is always trained.

    Args:
        module: The network.
        names: The parameters that are dealt out, each by its first name; the trainable ones if None.
        head: Patterns of the names of parameters that are always trained; the last layer if None.

    Raises:
        ValueError: If a pattern of ``head`` names nothing, or nothing is left for arms.

    Example:
        >>> unit_arms(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))).names
        ('0[0]', '0[1]', '0[2]')
    """
    modules = dict(module.named_modules())
    units: list[str] = []
    owner: ParamDict = {}
    dims: dict[str, int] = {}
    sizes: list[Tensor] = []
    for layer, parameters in _Parameters(module, names, head).layers().items():
        # The weights of a transposed convolution have their outputs in the second dimension.
        dim = 1 if getattr(modules[layer], "transposed", False) else 0
        lengths = [p.shape[dim if p.ndim > 1 else 0] for _, p in sorted(parameters, key=_dimensions) if p.ndim]
        if not lengths:
            continue
        rows = lengths[0]
        arms = torch.arange(len(units), len(units) + rows)
        total = torch.zeros(rows, dtype=torch.int64)
        for name, parameter in parameters:
            along = dim if parameter.ndim > 1 else 0
            if parameter.ndim == 0 or parameter.shape[along] != rows:
                continue
            owner[name], dims[name] = arms, along
            total += parameter.numel() // rows
        units += [f"{layer}[{unit}]" for unit in range(rows)]
        sizes.append(total)
    return WeightArms(tuple(units), owner, dims, torch.cat(sizes), _norms(module, owner))


def dealer(arms: Literal["layers", "units"] | Patterns | None, head: str | Sequence[str] | None = None) -> Deal:
    """Return what deals out the weights of a module: `layer_arms` (also for None), `unit_arms` or `pattern_arms`.

    Raises:
        ValueError: If ``arms`` is none of these.

    Example:
        >>> dealer("units")(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None).names
        ('0[0]', '0[1]')
    """
    if isinstance(arms, Mapping):
        if not arms:
            raise ValueError("`arms` of weights must name one arm at least, but got none. Pass 'layers', for example.")
        return partial(pattern_arms, patterns=arms, head=head)
    if arms not in (None, "layers", "units"):
        raise ValueError(
            f"`arms` of weights must be 'layers', 'units' or patterns of parameter names by arm, but got {arms!r}. Pass"
            " `select='samples'` for arms of samples."
        )
    return partial(unit_arms if arms == "units" else layer_arms, head=head)


class _Parameters:
    """The parameters of a module that are dealt out, in their layers, and those of the head."""

    def __init__(self, module: nn.Module, names: Collection[str] | None, head: str | Sequence[str] | None) -> None:
        wanted = set(trainable(module) if names is None else names)
        first = {id(one): name for name, one in module.named_parameters() if name in wanted}
        self.aliases: dict[str, list[str]] = {name: [] for name in first.values()}
        for name, one in module.named_parameters(remove_duplicate=False):
            if id(one) in first:
                self.aliases[first[id(one)]].append(name)
        self._layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
        last: set[str] = set()  # the parameters of the last layer so far, with those that it shares
        taken: set[str] = set()
        for layer, one in module.named_modules():
            own = [(first[id(p)], p) for p in one.parameters(recurse=False) if id(p) in first]
            fresh = [(name, p) for name, p in own if name not in taken]
            taken.update(name for name, _ in own)
            if _is_layer(one, own):
                last = set()
            if _is_layer(one, own) or last:
                last.update(name for name, _ in own)
            if _is_layer(one, fresh):
                self._layers[layer] = fresh
            elif fresh and self._layers:
                self._layers[next(reversed(self._layers))] += fresh
        if not self._layers:
            raise ValueError("The module must have trainable weights to select from, but it has none.")
        self.head = last if head is None else self._named_by(head)

    def named(self, pattern: str) -> list[str]:
        """Return the parameters of which any name matches."""
        return [name for name, all_names in self.aliases.items() if any(fnmatchcase(one, pattern) for one in all_names)]

    def layers(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return the names and parameters of each layer but the head."""
        layers = {
            layer: [(name, one) for name, one in own if name not in self.head] for layer, own in self._layers.items()
        }
        layers = {layer: own for layer, own in layers.items() if any(one.ndim for _, one in own)}
        if not layers:
            raise ValueError(
                "The module must have trainable weights beside its head, moved by an optimizer, but it has none. Pass"
                " `head=`, patterns that leave some, or select samples only."
            )
        return layers

    def _named_by(self, head: str | Sequence[str]) -> set[str]:
        patterns = [head] if isinstance(head, str) else list(head)
        for pattern in patterns:
            if not self.named(pattern):
                raise ValueError(
                    f"`head` has the pattern {pattern!r}, which names no trainable parameter. Pass names as"
                    f" {next(iter(self.aliases))!r}, or patterns as 'classifier.*'."
                )
        return {name for pattern in patterns for name in self.named(pattern)}


def _is_layer(module: nn.Module, own: Sequence[tuple[str, nn.Parameter]]) -> bool:
    return any(one.ndim > 1 for _, one in own) and not isinstance(module, _NORMS)


def _dimensions(named: tuple[str, nn.Parameter]) -> int:
    """Sort what has two or more dimensions before what has fewer."""
    return -min(named[1].ndim, 2)


def _whole(module: nn.Module, groups: Mapping[str, Sequence[str]]) -> WeightArms:
    """Return arms of whole parameters, by the names of parameters in each."""
    parameters = dict(module.named_parameters())
    owner = {name: torch.tensor(arm) for arm, group in enumerate(groups.values()) for name in group}
    sizes = torch.tensor([sum(parameters[name].numel() for name in group) for group in groups.values()])
    return WeightArms(tuple(groups), owner, {}, sizes, _norms(module, owner))


def _norms(module: nn.Module, owner: ParamDict) -> ParamDict:
    """Return the arms of each layer with running statistics: those of its parameters, or of the layer before it."""
    norms: ParamDict = {}
    arms: Tensor | None = None
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, one in module.named_modules():
        own = [first[id(parameter)] for parameter in one.parameters(recurse=False)]
        if own:
            found = [owner[parameter].reshape(-1) for parameter in own if parameter in owner]
            arms = torch.unique(torch.cat(found)) if found else None
        if arms is not None and isinstance(getattr(one, "running_mean", None), Tensor):
            norms[name] = arms
    return norms


def _by_row(values: Tensor, dim: int) -> Tensor:
    others = [other for other in range(values.ndim) if other != dim]
    return values.sum(others) if others else values
