"""Units of a network (output features, channels), and the parameters that make and read each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_continual._extras import require
from lightning_continual.compression import surgery
from lightning_continual.compression.couplings import EXCLUDED, Couplings, Entry
from lightning_continual.importance.undisturbed import undisturbed
from lightning_continual.parameters import ParamDict

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""Maps a module and its inputs to its outputs."""


@dataclass(frozen=True)
class Slices:
    """Where in one parameter units lie: unit u owns the ``places[u]`` along ``dim``.

    Args:
        parameter: Name in ``named_parameters()``; in `UnitGroup.buffers`, in ``named_buffers()``.
        dim: The dimension of the parameter along which units lie.
        places: Indices ``(num_units, k)``; k is 1 but where a unit is spread, as a channel over a flatten's columns.

    Example:
        Two channels of two pixels each, flattened, are read by a linear layer.

        >>> slices = Slices("head.weight", 1, torch.tensor([[0, 1], [2, 3]]))
        >>> torch.ones(1, 4).index_fill(slices.dim, slices.places[1], 0.0)
        tensor([[1., 1., 0., 0.]])
    """

    parameter: str
    dim: int
    places: Tensor


@dataclass(frozen=True)
class UnitGroup:
    """Units that stand or fall together, as those of layers whose outputs are summed.

    Args:
        layers: Names of the layers that make the units.
        num_units: How many units there are.
        incoming: Weights and biases of the layers that make the units.
        norms: Weights and biases of normalisations that the units pass, and what else scales or shifts them.
        outgoing: Weights that read the units.
        buffers: Running statistics of normalisations that the units pass.

    Example:
        >>> groups = unit_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2))
        >>> groups[0].layers, groups[0].num_units
        (('0',), 3)
        >>> [slices.parameter for slices in groups[0].outgoing]
        ['2.weight']
    """

    layers: tuple[str, ...]
    num_units: int
    incoming: tuple[Slices, ...]
    norms: tuple[Slices, ...]
    outgoing: tuple[Slices, ...]
    buffers: tuple[Slices, ...] = ()

    @property
    def parameters(self) -> tuple[Slices, ...]:
        """All slices of parameters."""
        return self.incoming + self.norms + self.outgoing


def unit_groups(
    module: nn.Module, example_inputs: Any, *, forward: Forward | None = None, exclude: Iterable[str] = ()
) -> list[UnitGroup]:
    """Find the units that can be removed from a module, in groups that stand or fall together.

    torch-pruning's graph of dependencies, traced in one forward pass, proposes: channels that are summed or multiplied
    are one unit, a channel owns its H·W columns behind a flatten, a grouped convolution's groups are its units. Then
    a copy with other weights loses half of all units, and the other half: a group without which the smaller network
    does not compute what the network with zeros does (a softmax over channels, a reshape to fixed sizes) is left out.
    So are outputs of the module, and units that pass a layer norm or a group norm (whose statistics would change), a
    multi-head attention or a recurrent layer, a layer with parametrized weights, a normalisation with neither weights
    nor running statistics, or what torch-pruning cannot follow. Of a transformer's layers only the feed-forward units
    remain. Windowed attention (Swin) takes torch-pruning 1.6 without end: prune weights there.

    The module is not touched; all happens in copies, in evaluation mode.

    Args:
        module: Any module; a graph that depends on values is traced as it is for ``example_inputs``. Layers that only
            training uses, as auxiliary heads, are not seen, and keep the sizes that they had.
        example_inputs: What the module is called with, of any batch size: a tuple or list holds several arguments, a
            dictionary named ones.
        forward: Maps the module and ``example_inputs`` to its outputs (tensors in any structure), if a call of the
            module does not.
        exclude: Patterns, as ``"head.*"``, of parameters that shall keep all their units.

    Returns:
        Groups of two units or more, in the order of the module's parameters. A layer has several groups where parts
        of its outputs go separate ways.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If the module cannot be copied or called, or its outputs do not depend on parameters.

    Example:
        The second layer makes the outputs; only the first one has units that can be spared.

        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> (group,) = unit_groups(model, torch.ones(1, 1, 4, 4))
        >>> group.num_units, [tuple(slices.places.shape) for slices in group.outgoing]
        (4, [(4, 4)])

    References:
        - Fang et al. *DepGraph: Towards Any Structural Pruning.* CVPR 2023.
    """
    copied = surgery.copy_of(module)
    with undisturbed(copied):
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        proposed = _proposed(copied, example_inputs, forward or call, tuple(exclude))
        return surgery.verified(copied, proposed, example_inputs, forward or call)


def call(module: nn.Module, inputs: Any) -> Any:
    """Call ``module``: a tuple or list holds several arguments, a dictionary named ones.

    Example:
        >>> call(nn.Identity(), {"input": 3})
        3
    """
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return all tensors of an output: of lists, tuples, dictionaries and dataclasses, nested at will.

    Example:
        >>> tensors_of({"logits": torch.tensor(1.0), "hidden": [torch.tensor(2.0), None]})
        [tensor(1.), tensor(2.)]
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if hasattr(outputs, "__dataclass_fields__"):
        outputs = vars(outputs)
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [one for part in outputs for one in tensors_of(part)] if isinstance(outputs, list | tuple) else []


def kept_parameters(module: nn.Module, groups: Sequence[UnitGroup], kept: Sequence[Tensor]) -> ParamDict:
    r"""Return which weights are left when units are removed.

    With a unit go its incoming weights and bias, the weights and biases of normalisations that it passes, and its
    outgoing weights: a unit that is zero before a sigmoid is 1/2 behind it.

    Args:
        module: The module.
        groups: Its groups, from `unit_groups`.
        kept: For each group, which units are kept: bool ``(num_units,)``.

    Returns:
        For each parameter of ``groups`` a bool tensor of its shape; false is to be zero.

    Raises:
        ValueError: If ``kept`` has not one bool tensor a group, of its number of units, or keeps no unit of a group.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> kept = kept_parameters(model, unit_groups(model, torch.ones(1, 1)), [torch.tensor([True, False])])
        >>> kept["0.bias"], kept["2.weight"]
        (tensor([ True, False]), tensor([[ True, False]]))
    """
    check_kept(groups, kept)
    parameters, masks = dict(module.named_parameters()), {}
    for group, keep in zip(groups, kept, strict=True):
        for slices in group.parameters:
            parameter = parameters[slices.parameter]
            if slices.parameter not in masks:
                masks[slices.parameter] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
            gone = slices.places[~keep.cpu()].flatten().to(parameter.device)
            masks[slices.parameter].index_fill_(slices.dim, gone, False)
    return masks


def zero_units_(module: nn.Module, groups: Sequence[UnitGroup], kept: Sequence[Tensor]) -> None:
    """Set to zero what `kept_parameters` of the same arguments says, in place; buffers are left as they are.

    Raises:
        ValueError: As `kept_parameters`.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid(), nn.Linear(2, 1))
        >>> zero_units_(model, unit_groups(model, torch.ones(1, 1)), [torch.tensor([True, False])])
        >>> [(p == 0).sum().item() for p in model.parameters()]
        [1, 1, 1, 0]
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, keep in kept_parameters(module, groups, kept).items():
            parameters[name].masked_fill_(~keep, 0.0)


def removed_units(module: nn.Module, groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Recognise removed units: all that `kept_parameters` names of them is zero.

    Args:
        module: The module.
        groups: Its groups, from `unit_groups`.

    Returns:
        For each group, which units are kept: bool ``(num_units,)``; false is removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Sigmoid(), nn.Linear(2, 1))
        >>> groups = unit_groups(model, torch.ones(1, 1))
        >>> zero_units_(model, groups, [torch.tensor([True, False])])
        >>> removed_units(model, groups)
        [tensor([ True, False])]
    """
    parameters = dict(module.named_parameters())
    found = []
    for group in groups:
        keep = torch.zeros(group.num_units, dtype=torch.bool)
        for slices in group.parameters:
            parameter = parameters[slices.parameter].detach().movedim(slices.dim, 0)
            keep |= (parameter != 0).reshape(len(parameter), -1).any(1).cpu()[slices.places].any(1)
        found.append(keep)
    return found


def check_kept(groups: Sequence[UnitGroup], kept: Sequence[Tensor]) -> None:
    """Raise the ValueError of `kept_parameters` unless ``kept`` says for each group which units are kept.

    Example:
        >>> check_kept([], [])
    """
    if len(kept) != len(groups):
        raise ValueError(
            f"`kept` must hold one bool tensor a group, but got {len(kept)} for {len(groups)} groups. Pass the groups"
            " that it was made for, from `unit_groups`."
        )
    for group, keep in zip(groups, kept, strict=True):
        layers = ", ".join(group.layers)
        if keep.shape != (group.num_units,) or keep.dtype != torch.bool:
            raise ValueError(
                f"`kept` must have dtype torch.bool and shape ({group.num_units},) for the units of {layers}, but got"
                f" {keep.dtype} and {tuple(keep.shape)}. Pass true for each unit to keep."
            )
        if not keep.any():
            raise ValueError(
                f"`kept` must keep a unit of every group, but got none of {layers}. Keep at least one of its"
                f" {group.num_units} units, or `exclude` the layer."
            )


_TIMES_PER_NODE = 50  # it takes 3 in a DenseNet
_ROLES = ("incoming", "norms", "outgoing", "buffers")


class _Counted(list[Any]):
    """The dependencies of a node; so many times in all may they be looked at, for torch-pruning can go in circles."""

    def __init__(self, dependencies: Iterable[Any], times_left: list[int]) -> None:
        super().__init__(dependencies)
        self.times_left = times_left

    def __iter__(self) -> Iterator[Any]:
        self.times_left[0] -= 1
        if self.times_left[0] < 0:
            raise RuntimeError("torch-pruning goes around in circles")
        return super().__iter__()


def _proposed(module: nn.Module, inputs: Any, forward: Forward, exclude: tuple[str, ...]) -> list[UnitGroup]:
    """Return what torch-pruning finds, unit by unit, joined where units share entries of a tensor."""
    pruning = require("torch_pruning", "prune")
    graph = pruning.DependencyGraph()
    outputs: list[Tensor] = []

    def run(model: nn.Module, inputs: Any) -> list[Tensor]:
        outputs.extend(tensor for tensor in tensors_of(forward(model, inputs)) if tensor.grad_fn is not None)
        return outputs

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            graph.build_dependency(module, inputs, forward_fn=run, verbose=False)
    except Exception as error:
        remedy = "Pass `example_inputs` that the module takes, or `forward`, a function of the module and these inputs"
        if outputs:
            remedy = "The module runs, but torch-pruning cannot follow it. Prune its weights by `level='parameter'`"
        raise ValueError(
            f"The graph of {type(module).__name__} could not be traced: {type(error).__name__}: {error}. {remedy}."
        ) from error
    if not outputs:
        raise ValueError(
            f"The graph of {type(module).__name__} could not be traced: no output depends on a parameter. Pass"
            " `forward`, a function of the module and `example_inputs` that returns differentiable tensors."
        )
    names = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    results = {output.grad_fn for output in outputs}
    couplings, times_left, nodes = Couplings(), [0], list(graph.module2node.values())
    for node in nodes:
        node.dependencies = _Counted(node.dependencies, times_left)
    for layer in [one for one in graph.module2node if isinstance(one, nn.Linear | _ConvNd)]:
        pruner = graph.get_pruner_of_module(layer)
        units = list(range(pruner.get_out_channels(layer)))
        times_left[0] = _TIMES_PER_NODE * len(nodes)
        try:
            items = graph.get_pruning_group(layer, pruner.prune_out_channels, units)
        except Exception:  # as of a layer that a GRU reads, or one with circular padding
            continue
        for item in items:
            node, handler = item.dep.target, item.dep.handler
            own = graph.get_pruner_of_module(node.module)
            reads, makes = handler == own.prune_in_channels, handler == own.prune_out_channels
            is_result = node.type == pruning.ops.OPTYPE.OUTPUT or (makes and node.grad_fn in results)
            parts = None if is_result else _parts(node.module, reads, makes, node.pruning_dim)
            for index, unit in zip(item.idxs, item.root_idxs, strict=True):
                entry = ("unit", str(id(layer)), 0, unit)
                if parts is None:
                    couplings.join(entry, EXCLUDED)
                for role, tensor, dim, width in parts or ():
                    name = str(id(tensor)) if role == "share" else names.get(id(tensor))
                    if name is None or any(fnmatchcase(name, pattern) for pattern in exclude):
                        couplings.join(entry, EXCLUDED)
                    else:
                        couplings.join(entry, (role, name, dim, index // width))
    order = {name: place for place, name in enumerate(names.values())}
    return sorted(_groups(couplings.sets(), order), key=lambda group: order[group.incoming[0].parameter])


_Part: TypeAlias = tuple[str, Any, int, int]
"""A role, a tensor, its dimension of the units, and how many indices share a place in it (one but for groups)."""


def _parts(layer: Any, reads: bool, makes: bool, dim: int) -> list[_Part] | None:
    """Return what of a layer belongs to the units that it reads or makes; none if that cannot go."""
    parts: list[_Part] = []
    if isinstance(layer, nn.Linear | _ConvNd):
        transposed = isinstance(layer, _ConvNd) and layer.transposed
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        if makes:
            parts += [("incoming", layer.weight, int(transposed), 1)] if groups == 1 or not transposed else []
            parts += [("incoming", layer.bias, 0, 1)] if layer.bias is not None else []
        if not isinstance(layer, _ConvNd) or groups == 1:
            return parts + ([("outgoing", layer.weight, 1 - int(transposed), 1)] if reads else [])
        if reads and makes and layer.in_channels != layer.out_channels:
            return None  # torch-pruning takes it for depthwise
        # A group of channels goes as a whole: those that it reads with those that it makes.
        if reads and transposed:
            parts.append(("incoming", layer.weight, 0, 1))
        return [*parts, ("share", layer, 0, (layer.in_channels if reads else layer.out_channels) // groups)]
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        buffers = [layer.running_mean, layer.running_var]
        parts = [("norms", p, 0, 1) for p in (layer.weight, layer.bias) if p is not None]
        return (parts + [("buffers", b, 0, 1) for b in buffers if b is not None]) or None
    if isinstance(layer, nn.PReLU):
        return [("norms", layer.weight, 0, 1)] if layer.num_parameters > 1 else []
    if isinstance(layer, nn.Embedding):
        return [("incoming", layer.weight, 1, 1)]
    if isinstance(layer, nn.Parameter):
        return [("norms", layer, dim, 1)]
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.MultiheadAttention | nn.RNNBase):
        return None
    return []  # torch-pruning's own stand-in for a function


def _groups(sets: Iterable[list[Entry]], order: dict[str, int]) -> Iterator[UnitGroup]:
    """Gather units with entries in the same tensors, and as many, into groups."""
    alike: dict[tuple[tuple[str, str, int, int], ...], list[dict[tuple[str, str, int], list[int]]]] = {}
    for entries in sets:
        places: dict[tuple[str, str, int], list[int]] = {}
        for role, name, dim, index in entries:
            if role in _ROLES:
                places.setdefault((role, name, dim), []).append(index)
        if {"incoming", "outgoing"} <= {role for role, _, _ in places}:
            alike.setdefault(tuple(sorted((*key, len(own)) for key, own in places.items())), []).append(places)
    for units in alike.values():
        slices: dict[str, list[Slices]] = {role: [] for role in _ROLES}
        units.sort(key=lambda unit: min(next(iter(unit.values()))))
        for role, name, dim in sorted(units[0], key=lambda key: order[key[1]]) if len(units) > 1 else ():
            slices[role].append(Slices(name, dim, torch.tensor([sorted(unit[role, name, dim]) for unit in units])))
        layers = tuple(dict.fromkeys(one.parameter.rpartition(".")[0] for one in slices["incoming"]))
        if layers:
            yield UnitGroup(layers, len(units), **{role: tuple(found) for role, found in slices.items()})
