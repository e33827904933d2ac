"""Which units make and read each weight of a module, and which outputs belong to which task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_continual.compression.surgery import copy_of
from lightning_continual.compression.units import Forward, UnitGroup, call, tensors_of, unit_groups
from lightning_continual.heads import at_task, task_heads
from lightning_continual.importance.undisturbed import undisturbed

_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True)
class Places:
    """The units along one dimension of a tensor.

    Args:
        dim: The dimension.
        units: For each index along ``dim`` the number of its unit; -1 where there is none (an input).

    Example:
        >>> Places(0, torch.tensor([4, 5])).of(torch.tensor([False, False, False, False, True, False]), num_dims=2)
        tensor([[ True],
                [False]])
    """

    dim: int
    units: Tensor

    def of(self, active: Tensor, num_dims: int) -> Tensor:
        """Return whether units are active, shaped to be broadcast along ``dim``; inputs always are."""
        units = self.units.to(active.device)
        found = active[units.clamp(min=0)] | (units < 0)
        return found.view([-1 if dim == self.dim else 1 for dim in range(num_dims)])


@dataclass(frozen=True)
class Wiring:
    """Which units make and read each weight of a module.

    Units are numbered through all layers, and the outputs of the module follow as units of their own, so that one bool
    tensor ``(num_units,)`` says which are active.

    Args:
        layers: For each group of layers that make the same units (as those of a residual sum), named by the first, the
            range of the units' numbers.
        outputs: For each output layer the range of its outputs' numbers.
        rows: By parameter, and by buffer of batch norms, the units that it makes.
        columns: By parameter the units that it reads; one that is missing reads inputs.
        task_layers: For each task the output layers that are its own (of a `TaskHead`); empty where one output layer
            serves all tasks.

    Example:
        >>> found = find_wiring(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2))
        >>> found.layers, found.outputs, found.num_units
        ({'0': range(0, 3)}, {'2': range(3, 4)}, 4)
        >>> found.columns["2.weight"].units
        tensor([0, 1, 2])
    """

    layers: dict[str, range]
    outputs: dict[str, range]
    rows: dict[str, Places]
    columns: dict[str, Places]
    task_layers: list[list[str]] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """How many units there are, with the outputs."""
        return max(one.stop for one in [*self.layers.values(), *self.outputs.values()])

    def outputs_of(self, task: int, classes: Sequence[int] | None = None) -> Tensor:
        """Return the numbers of the outputs of a task.

        Args:
            task: The task, from 0.
            classes: Where one output layer serves all tasks, the outputs of the task.

        Raises:
            ValueError: If there are none, or ``classes`` are missing or outside the output layer.
        """
        if self.task_layers:
            if task >= len(self.task_layers):
                raise ValueError(
                    f"The `TaskHead` has {len(self.task_layers)} tasks, but task {task} is to be learnt. Make it with a"
                    " larger `num_tasks`."
                )
            return torch.tensor([unit for name in self.task_layers[task] for unit in self.outputs[name]])
        ((name, units),) = self.outputs.items()
        if not classes or not all(0 <= one < len(units) for one in classes):
            got = f"got {list(classes)}" if classes else f"found none for task {task}"
            raise ValueError(
                f"`classes` must say for each task which of the {len(units)} outputs of {name!r} are its own, but"
                f" {got}. Pass `classes=`, as [[0, 1], [2, 3]], or use a `TaskHead`."
            )
        return torch.tensor([units[one] for one in classes])


def find_wiring(module: nn.Module, example_inputs: Any, *, forward: Forward | None = None) -> Wiring:
    r"""Find the units of a module, who reads them, and the outputs.

    The layers are found by `unit_groups`: channels that are summed are one unit, a channel owns its columns behind a
    flatten. Served is what keeps units apart, so that what one unit gives does not depend on units that none of its
    weights reads: linear layers, convolutions, batch norms, activations, pooling, dropout. This is tried out on a
    copy, whose inactive units are given other weights: the outputs must be the same to the bit. Nor may they depend on
    buffers that a forward pass in training changes, but for the statistics of units (see `batch_norms`).

    The outputs are those of a `TaskHead`, or of one linear layer or convolution whose output the module returns.

    Args:
        module: Any module, in the modes that it is trained in; it is not touched.
        example_inputs: See `unit_groups`.
        forward: See `unit_groups`.

    Returns:
        The wiring. Parameters without influence on the outputs are not in it.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If a layer mixes units, or cannot be served for another reason, or no output layer is found; the
            error names the layer.

    Example:
        >>> find_wiring(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), torch.ones(1, 2))
        Traceback (most recent call last):
        ValueError: Layer '1' (LayerNorm) mixes units: a task's outputs would change with units that later tasks
        train. Use batch norm in its place, or none.
    """
    run = forward or call
    copied, modes = copy_of(module), [one.training for one in module.modules()]
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with undisturbed(copied), at_task(copied, None):
        called, used, returned = _traced(copied, example_inputs, run)
        for name in called:
            if isinstance(copied.get_submodule(name), _MIXING):
                raise ValueError(
                    f"Layer {name!r} ({type(copied.get_submodule(name)).__name__}) mixes units: a task's outputs would"
                    " change with units that later tasks train. Use batch norm in its place, or none."
                )
        task_layers = _task_layers(copied)
        of_heads = [name for task in task_layers for name in task]
        others = [name for name in returned if name not in of_heads]
        if len(others) + bool(of_heads) != 1:
            ends = ", ".join(map(repr, [*task_heads(copied), *others])) or "none"
            raise ValueError(
                "A module must have one output layer (a `TaskHead`, or a linear layer or convolution whose output it"
                f" returns), but found {ends}. Use `TaskHead(in_features, out_features, num_tasks=...)`, or pass"
                " `forward`, a function of module and batch that returns the logits."
            )
        groups = unit_groups(copied, example_inputs, forward=forward)
        found = _gathered(copied, groups, of_heads or others, task_layers)
        _require_steady(copied, found, example_inputs, run, modes)
        _require_all(copied, found, used)
        if not found.layers:
            raise ValueError(
                f"{type(module).__name__} must have units between its inputs and its outputs, but has none. Put a layer"
                " before the output layer."
            )
        _require_apart(copied, found, example_inputs, run)
    return found


def by_layer(patterns: Mapping[str, float], layers: Sequence[str], argument: str) -> dict[str, float]:
    """Return the value of the first pattern that matches, by layer; layers that none matches are left out.

    Raises:
        ValueError: If a pattern matches no layer; the error names the ``argument``.

    Example:
        >>> by_layer({"head": 1.0, "*": 2.0}, ["body.0", "head"], "l1")
        {'head': 1.0, 'body.0': 2.0}
    """
    found: dict[str, float] = {}
    for pattern, value in patterns.items():
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"`{argument}` has the pattern {pattern!r}, which names no layer of {list(layers)}.")
        found.update({name: value for name in matched if name not in found})
    return found


def _traced(module: nn.Module, inputs: Any, forward: Forward) -> tuple[list[str], list[str], list[str]]:
    """Return the layers called, the parameters with influence on the outputs, the layers whose output is one."""
    outputs: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda layer, args, output: outputs.setdefault(name, []).extend(tensors_of(output))

    with ExitStack() as stack:
        for name, one in module.named_modules():
            stack.callback(one.register_forward_hook(watch(name)).remove)
        try:
            results = [one for one in tensors_of(forward(module, inputs)) if one.requires_grad]
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} could not be traced: {type(error).__name__}: {error}. Pass `forward`, a"
                " function of module and batch that returns the logits."
            ) from error
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = sum((one.sum() for one in results), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True) if results else ()
    used = [name for name, one in zip(parameters, gradients, strict=bool(results)) if one is not None]
    returned = [
        name
        for name, given in outputs.items()
        if isinstance(module.get_submodule(name), nn.Linear | _ConvNd) and any(a is b for a in given for b in results)
    ]
    return list(outputs), used, returned


def _task_layers(module: nn.Module) -> list[list[str]]:
    """Return for each task the names of its output layers in all task heads."""
    heads = task_heads(module)
    number = min((head.num_tasks for head in heads.values()), default=0)
    return [[f"{name}.layers.{task}".lstrip(".") for name in heads] for task in range(number)]


def _gathered(
    module: nn.Module, groups: Iterable[UnitGroup], outputs: Sequence[str], task_layers: list[list[str]]
) -> Wiring:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    rows: dict[str, Places] = {}
    columns: dict[str, Places] = {}
    layers: dict[str, range] = {}
    start = 0
    for group in groups:
        name = group.layers[0]
        while name in layers:
            name += "'"  # another part of its units
        layers[name] = range(start, start + group.num_units)
        units = torch.arange(start, start + group.num_units)[:, None]
        for places, found in (((*group.incoming, *group.norms, *group.buffers), rows), (group.outgoing, columns)):
            for one in places:
                size = tensors[one.parameter].shape[one.dim]
                own = found.setdefault(one.parameter, Places(one.dim, torch.full((size,), -1)))
                own.units[one.places] = units.expand_as(one.places)
        start += group.num_units
    ranges: dict[str, range] = {}
    for name in outputs:
        layer: Any = module.get_submodule(name)
        number = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        ranges[name] = range(start, start + number)
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in tensors:
                rows[f"{name}.{kind}"] = Places(0, torch.arange(start, start + number))
        start += number
    for tasks in zip(*task_layers, strict=True):  # of one head: all read the same, though one may not have been used
        reads = next((columns[f"{name}.weight"] for name in tasks if f"{name}.weight" in columns), None)
        columns.update({} if reads is None else {f"{name}.weight": reads for name in tasks})
    return Wiring(layers, ranges, rows, columns, task_layers)


def _require_steady(module: nn.Module, found: Wiring, inputs: Any, forward: Forward, modes: Sequence[bool]) -> None:
    """Raise if the outputs depend on a buffer that training changes, and that is not of units, which could hold it."""
    probe = copy_of(module)
    for one, training in zip(probe.modules(), modes, strict=True):
        one.training = training
    try:
        with torch.no_grad():
            forward(probe, inputs)
    except Exception:
        return  # it needs more in training than the two samples, or than `forward` gives it
    before, after = (dict(one.named_buffers()) for one in (module, probe))
    shared = [name for name in before if name in after and name not in found.rows]
    moved = [name for name in shared if not _is_same(before[name], after[name])]
    stays = _comparison(module, inputs, forward)

    def matter(names: Sequence[str]) -> bool:
        other = copy_of(module)
        for name in names:
            layer, _, kind = name.rpartition(".")
            other.get_submodule(layer).register_buffer(kind, after[name].clone())
        return not stays(other)

    if moved and matter(moved):
        name = next((one for one in moved if matter([one])), moved[0])
        layer = name.rpartition(".")[0]
        kind = type(module.get_submodule(layer)).__name__
        raise ValueError(
            f"Buffer {name!r} of layer {layer!r} ({kind}) changes in training, and is not of units that can be told"
            " apart, as statistics of the inputs are not: all tasks' outputs would change with it. Scale inputs by"
            " fixed numbers, or set the layer to `eval()` before `fit`."
        )


def _require_all(module: nn.Module, found: Wiring, used: Sequence[str]) -> None:
    """Raise if a weight with influence on the outputs makes no unit."""
    for name in used:
        if name not in found.rows or bool((found.rows[name].units < 0).any()):
            layer = name.rpartition(".")[0]
            kind = type(module.get_submodule(layer)).__name__
            raise ValueError(
                f"Parameter {name!r} of layer {layer!r} ({kind}) makes no units that can be told apart: they go through"
                " something that mixes them, have fixed sizes, or share it. Use linear layers, convolutions, batch"
                " norms and `flatten(1)`, and give a PReLU one weight a channel. If the module returns units beside its"
                " logits, pass `forward`, a function of module and batch that returns the logits alone."
            )
    for name in found.rows:
        layer = name.rpartition(".")[0]
        if name.endswith("running_mean") and not isinstance(module.get_submodule(layer), _BatchNorm):
            raise ValueError(
                f"Layer {layer!r} ({type(module.get_submodule(layer)).__name__}) keeps running statistics, which only"
                " batch norms may. Make it with `track_running_stats=False`."
            )


def _require_apart(module: nn.Module, found: Wiring, inputs: Any, forward: Forward) -> None:
    """Raise unless outputs that read half of the units of every layer do not depend on the other half."""
    if not _are_apart(module, found, found.layers, inputs, forward):
        mixed = [name for name in found.layers if not _are_apart(module, found, [name], inputs, forward)]
        raise ValueError(
            f"The units of layer {(mixed or list(found.layers))[0]!r} are mixed before they are read (by a norm, a"
            " softmax, a sum over units, ...): a task's outputs would change with units that later tasks train. Let"
            " each weight read a unit by itself."
        )


def _are_apart(module: nn.Module, found: Wiring, layers: Iterable[str], inputs: Any, forward: Forward) -> bool:
    active = torch.ones(found.num_units, dtype=torch.bool)
    for name in layers:
        units = found.layers[name]
        active[units.start + torch.randperm(len(units))[: len(units) // 2]] = False
    probe = copy_of(module)
    tensors = {**dict(probe.named_parameters()), **dict(probe.named_buffers())}
    with torch.no_grad():
        for name, value in probe.named_parameters():
            value.add_(_noise(value))  # zeros, as in the last norm of a block, would hide what is mixed
            if name in found.columns:
                value.mul_(~found.rows[name].of(active, value.ndim) | found.columns[name].of(active, value.ndim))
        stays = _comparison(probe, inputs, forward)
        for name, places in found.rows.items():
            free = ~places.of(active, tensors[name].ndim)
            tensors[name].add_(free * _noise(tensors[name]).abs())
        return stays(probe)


def _comparison(module: nn.Module, inputs: Any, forward: Forward) -> Callable[[nn.Module], bool]:
    """Return what says whether a module gives what this one gives now, to the bit.

    Where this one itself does not when asked twice, as with kernels that are not deterministic, up to rounding.
    """
    outputs, again = (_outputs_of(module, inputs, forward) for _ in range(2))
    is_same = _is_same if all(map(_is_same, outputs, again)) else _is_close
    return lambda other: all(map(is_same, outputs, _outputs_of(other, inputs, forward)))


def _outputs_of(module: nn.Module, inputs: Any, forward: Forward) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [one for one in tensors_of(forward(module, inputs)) if one.is_floating_point()]


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Return whether tensors are the same to the bit; so are infinities, and what is not a number."""
    return one.shape == two.shape and bool(((one == two) | (one.isnan() & two.isnan())).all())


def _is_close(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).norm() <= torch.finfo(one.dtype).eps ** 0.5 * one.norm())


def _noise(value: Tensor) -> Tensor:
    size = float(value.square().mean().sqrt()) if value.is_floating_point() else 0.0
    return 0.1 * (size or 1.0) * torch.randn_like(value, dtype=torch.get_default_dtype()).to(value.dtype)
