"""Removing units for good: a dense, smaller module of the same class, with the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_continual.compression import units
from lightning_continual.compression.quantization import detached_copy
from lightning_continual.parameters import ParamDict


def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward: units.Forward | None = None,
    groups: Sequence[units.UnitGroup] | None = None,
    kept: Sequence[Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a module without its removed units.

    In evaluation mode it gives the same outputs as ``model`` with the removed units at zero (`zero_units_`), to
    rounding. It is a module of the same class with smaller tensors, nothing else: it can be trained (an optimizer that
    is made anew), saved and exported. Its ``state_dict`` loads into a module that was made small by `resize_`.

    A trainer to which ``model`` is attached stays with ``model``.

    Args:
        model: Any module; it is not touched.
        example_inputs: See `unit_groups`.
        forward: See `unit_groups`.
        groups: The groups that ``kept`` is for; by default those of `unit_groups`.
        kept: For each group, which units are kept: bool ``(num_units,)``; by default all but those which are zero
            (`removed_units`).

    Returns:
        The smaller module, on the same device and in the same modes. Gradients are not taken over.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If ``kept`` has not one bool tensor a group, of its number of units, or keeps no unit of a group;
            for what `unit_groups` raises.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1))
        >>> small = compact(model, torch.ones(1, 2), kept=[torch.tensor([True, False, False, True])])
        >>> small
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): Sigmoid()
          (2): Linear(in_features=2, out_features=1, bias=True)
        )
        >>> torch.equal(small[0].weight, model[0].weight[[0, 3]])
        True
    """
    if groups is None:
        groups = units.unit_groups(model, example_inputs, forward=forward)
    if kept is None:
        kept = units.removed_units(model, groups)
    units.check_kept(groups, kept)
    small = copy_of(model)
    remove_units_(small, groups, kept)
    return small


def resize_(module: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give the tensors of a module the shapes of a compacted one, in place, so that its ``state_dict`` loads.

    Args:
        module: A module of the full size, of the class and with the arguments of the one that was compacted.
        state_dict: The ``state_dict`` of what `compact` returned.

    Returns:
        ``module``. Tensors that changed their shape hold zeros until the ``state_dict`` is loaded.

    Raises:
        ValueError: If a tensor's number of dimensions differs, or a layer other than linear layers, convolutions,
            embeddings, batch and instance norms and PReLU has another shape.

    Example:
        >>> def make():
        ...     return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> keep = torch.tensor([True, False, False, True])
        >>> small = compact(make(), torch.ones(1, 2), kept=[keep])
        >>> again = resize_(make(), small.state_dict())
        >>> again.load_state_dict(small.state_dict())
        <All keys matched successfully>
        >>> again[2].in_features
        2
    """
    found = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    changed = {name: value for name, value in state_dict.items() if name in found and value.shape != found[name].shape}
    for name, value in changed.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        if value.ndim != found[name].ndim or isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} has shape {tuple(found[name].shape)}, but got {tuple(value.shape)}, which removing units"
                " does not make of it. Pass the module from which the smaller one was made, at its full size."
            )
    _replace_(
        module, {name: torch.zeros_like(found[name]).resize_(value.shape).zero_() for name, value in changed.items()}
    )
    return module


def copy_of(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, which has no gradients, and whose methods are its own (see `detached_copy`).

    Args:
        module: Any module.

    Returns:
        The copy.

    Raises:
        ValueError: If the module cannot be copied.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> copied = copy_of(layer)
        >>> torch.equal(copied.weight, layer.weight), copied.weight is layer.weight
        (True, False)
    """
    try:
        return detached_copy(module)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} must be a module that `copy.deepcopy` can copy, but got"
            f" {type(error).__name__}: {error}. Remove what it holds beside parameters, buffers and settings, such as"
            " tensors with a gradient history, open files or loaders."
        ) from error


def remove_units_(module: nn.Module, groups: Sequence[units.UnitGroup], kept: Sequence[Tensor]) -> None:
    """Remove units from the tensors of a module, in place; `compact` does so in a copy.

    Parameters become other objects: an optimizer that holds the former ones trains nothing any more.

    Args:
        module: The module.
        groups: Its groups, from `unit_groups`.
        kept: For each group, which units are kept: bool ``(num_units,)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> remove_units_(model, units.unit_groups(model, torch.ones(1, 1)), [torch.tensor([True, False, True])])
        >>> model[0].out_features, model[2].weight.shape
        (2, torch.Size([1, 2]))
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stays: dict[tuple[str, int], Tensor] = {}
    for group, keep in zip(groups, kept, strict=True):
        if keep.all():
            continue
        for slices in (*group.parameters, *group.buffers):
            size = tensors[slices.parameter].shape[slices.dim]
            mask = stays.setdefault((slices.parameter, slices.dim), torch.ones(size, dtype=torch.bool))
            mask[slices.places[~keep.cpu()].flatten()] = False
    smaller: ParamDict = {}
    for (name, dim), mask in stays.items():
        value = smaller.get(name, tensors[name].detach())
        smaller[name] = value.index_select(dim, mask.nonzero().flatten().to(value.device))
    _replace_(module, smaller)


def _replace_(module: nn.Module, tensors: ParamDict) -> None:
    """Put other tensors in the place of parameters and buffers, wherever they are shared, and what layers say of it."""
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    new: dict[int, Tensor] = {}
    for name, value in tensors.items():
        old = named[name]
        is_parameter = isinstance(old, nn.Parameter)
        new[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
    for layer in module.modules():
        entries: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
        changed = [(values, name, id(old)) for values in entries for name, old in values.items() if id(old) in new]
        for values, name, key in changed:
            values[name] = new[key]
        if changed:
            _read_sizes_(layer)


def _read_sizes_(layer: Any) -> None:
    """Set the numbers by which a layer describes itself from the shapes of its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        first, second = layer.weight.shape[:2]
        if layer.groups > 1:  # whole groups were removed
            layer.groups = first // ((layer.in_channels if layer.transposed else layer.out_channels) // layer.groups)
        sizes = (first, second * layer.groups)
        layer.in_channels, layer.out_channels = sizes if layer.transposed else sizes[::-1]
    elif isinstance(layer, _BatchNorm | _InstanceNorm):
        layer.num_features = len(layer.weight if layer.weight is not None else layer.running_mean)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def verified(
    module: nn.Module, groups: Sequence[units.UnitGroup], inputs: Any, forward: units.Forward
) -> list[units.UnitGroup]:
    """Return the groups without which a copy with other weights computes what it does with zeros in their place.

    If it does when all groups together lose one half of their units, and when they lose the other half, that is all of
    them; else they are tried one by one.

    Args:
        module: The module, in evaluation mode.
        groups: Groups to try.
        inputs: What ``forward`` takes.
        forward: Maps a module and ``inputs`` to its outputs.

    Example:
        A softmax over units is one over fewer units.

        >>> model = nn.Sequential(nn.Linear(1, 4), nn.Softmax(1), nn.Linear(4, 1))
        >>> units.unit_groups(model, torch.ones(2, 1))
        []
    """
    probe = copy_of(module)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in probe.parameters():
            if value.is_floating_point():  # zeros, as in the last norm of a block, would hide what goes wrong
                value.add_(0.1 * (float(value.square().mean().sqrt()) or 1.0) * torch.randn_like(value))
        for layer in probe.modules():
            if isinstance(layer, _BatchNorm | _InstanceNorm) and layer.track_running_stats:
                for statistic in (layer.running_mean, layer.running_var):
                    if statistic is not None:
                        statistic.add_(torch.rand_like(statistic))
    if _agrees(probe, groups, inputs, forward):
        return list(groups)
    accepted: list[units.UnitGroup] = []
    for group in groups:
        if _agrees(probe, [*accepted, group], inputs, forward):
            accepted.append(group)
    return accepted


def _agrees(probe: nn.Module, groups: Sequence[units.UnitGroup], inputs: Any, forward: units.Forward) -> bool:
    half = [torch.randperm(group.num_units) >= group.num_units // 2 for group in groups]
    try:
        full = _outputs(probe, inputs, forward)
        for kept in (half, [~keep for keep in half]):  # each unit goes once
            zeroed, small = copy_of(probe), copy_of(probe)
            units.zero_units_(zeroed, groups, kept)
            remove_units_(small, groups, kept)
            results = full, _outputs(zeroed, inputs, forward), _outputs(small, inputs, forward)
            if not all(_close(*outputs) for outputs in zip(*results, strict=True)):
                return False
    except Exception:  # whatever a module raises when its sizes are others
        return False
    return True


def _outputs(module: nn.Module, inputs: Any, forward: units.Forward) -> list[Tensor]:
    torch.manual_seed(0)
    return [tensor.detach() for tensor in units.tensors_of(forward(module, inputs))]


def _close(full: Tensor, zeroed: Tensor, small: Tensor) -> bool:
    """Whether an output is the same, measured by what the removal changed at all."""
    if zeroed.shape != small.shape or not zeroed.is_floating_point():
        return torch.equal(zeroed, small)
    eps = max(torch.finfo(zeroed.dtype).eps, 2.0**-10 if zeroed.is_cuda else 0.0)  # TensorFloat-32 may be in use
    rounding = min(64 * eps, eps**0.5) * zeroed.norm()
    return bool((zeroed - small).norm() <= eps**0.5 * (full - zeroed).norm() + rounding)
