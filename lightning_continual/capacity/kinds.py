"""The three kinds of weights: those of active units are kept or cut, all others are free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_continual.capacity.wiring import Wiring
from lightning_continual.constraints import Pin
from lightning_continual.parameters import ParamDict, redraw_, trainable


def kept_weights(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> ParamDict:
    r"""Return which weights active units need: those by which they read active units, and their biases.

    With :math:`A` the active units, of the weight by which unit ``i`` reads unit ``j``

    .. math:: \text{kept}_{ij} = [i \in A] \, [j \in A], \qquad \text{cut}_{ij} = [i \in A] \, [j \notin A],
              \qquad \text{free}_{ij} = [i \notin A]

    Inputs of the module are always active. So are scales, shifts and running statistics of norms, by their unit alone.

    Args:
        wiring: Who makes and reads each weight.
        tensors: Parameters or buffers, by name.
        active: Which units are active: bool ``(num_units,)``.

    Returns:
        For each of ``tensors`` that makes units a bool tensor of its shape.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found, weights = find_wiring(model, torch.ones(1, 1)), dict(model.named_parameters())
        >>> active = torch.tensor([True, False, True, False])  # a unit of the first layer, and an output
        >>> kept_weights(found, weights, active)["2.weight"]
        tensor([[ True, False],
                [False, False]])
        >>> cut_weights(found, weights, active)["2.weight"]
        tensor([[False,  True],
                [False, False]])
    """
    return {name: rows & columns for name, rows, columns in _places(wiring, tensors, active)}


def cut_weights(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> ParamDict:
    """Return which weights would let free units interfere with active ones; see `kept_weights`.

    Example:
        >>> cut_weights(Wiring({}, {}, {}, {}), {}, torch.tensor([]))
        {}
    """
    return {name: rows & ~columns for name, rows, columns in _places(wiring, tensors, active)}


def cut_(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> None:
    """Set to zero what `cut_weights` of the same arguments says, in place.

    Example:
        >>> cut_(Wiring({}, {}, {}, {}), {}, torch.tensor([]))
    """
    with torch.no_grad():
        for name, rows, columns in _places(wiring, tensors, active):
            if name in wiring.columns:
                tensors[name].masked_fill_(rows & ~columns, 0.0)


@contextmanager
def cut(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> Iterator[None]:
    """Set to zero for a while what `cut_weights` of the same arguments says.

    Example:
        >>> with cut(Wiring({}, {}, {}, {}), {}, torch.tensor([])):
        ...     pass
    """
    saved = {name: tensors[name].detach().clone() for name in wiring.columns if name in tensors}
    try:
        cut_(wiring, tensors, active)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value)


def pin_of(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> Pin:
    """Return the pin that holds the weights of active units, kept ones and cut ones, where they now are.

    Example:
        >>> pin_of(Wiring({}, {}, {}, {}), {}, torch.tensor([])).num_pinned()
        0
    """
    places = {name: rows.expand(tensors[name].shape) for name, rows, _ in _places(wiring, tensors, active)}
    return Pin.at(tensors, {name: one for name, one in places.items() if bool(one.any())})


def pin_of_cut(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> Pin:
    """Return the pin that holds at zero what `cut_weights` of the same arguments says, and nothing else.

    Example:
        >>> pin_of_cut(Wiring({}, {}, {}, {}), {}, torch.tensor([])).num_pinned()
        0
    """
    places = {name: one for name, one in cut_weights(wiring, tensors, active).items() if bool(one.any())}
    return Pin.at_zero(tensors, places)


def reset_free_(module: nn.Module, wiring: Wiring, active: Tensor, *, seed: int) -> None:
    """Draw the weights of units that are not active anew, in place, as their layers do it (``reset_parameters``).

    Parameters that do not require gradients stay; so does what active units need.

    Args:
        module: The module.
        wiring: Its wiring.
        active: Which units are active: bool ``(num_units,)``.
        seed: Of the draw; the global random state is left alone.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> before = model[0].weight.detach().clone()
        >>> reset_free_(model, find_wiring(model, torch.ones(1, 1)), torch.tensor([True, False, True]), seed=0)
        >>> (model[0].weight == before).flatten()
        tensor([ True, False])
    """
    trained = trainable(module)
    tensors = {**trained, **dict(module.named_buffers())}
    needed = pin_of(wiring, tensors, active).pinned
    layers = {_layer(name): list[str]() for name in wiring.rows if name in trained}
    for name in tensors:
        if _layer(name) in layers:
            layers[_layer(name)].append(name)
    everywhere = {name: torch.ones_like(tensors[name], dtype=torch.bool) for names in layers.values() for name in names}
    redraw_(module, {name: ~needed[name] if name in needed else one for name, one in everywhere.items()}, seed=seed)


def add_l1_gradient_(parameters: Mapping[str, Tensor], strengths: Mapping[str, float], scale: float = 1.0) -> None:
    r"""Add the gradient :math:`\alpha \operatorname{sign}(w)` of :math:`\alpha \lVert w \rVert_1`, in place.

    Args:
        parameters: Parameters by name; those without gradient are left alone.
        strengths: :math:`\alpha` by name; those missing are left alone.
        scale: A factor of all gradients, as of a scaled loss.

    Example:
        >>> weight = torch.tensor([3.0, 0.0, -2.0], requires_grad=True)
        >>> weight.grad = torch.zeros(3)
        >>> add_l1_gradient_({"w": weight}, {"w": 0.5})
        >>> weight.grad
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    with torch.no_grad():
        for name, strength in strengths.items():
            weight = parameters.get(name)
            if weight is not None and weight.grad is not None and strength:
                weight.grad.add_(weight.detach().sign(), alpha=strength * scale)


def l1_strengths(module: nn.Module, wiring: Wiring, layers: Mapping[str, float]) -> dict[str, float]:
    r"""Return :math:`\alpha` by parameter: of weights of layers, and of weights and biases of norms.

    Behind a norm the size of a layer's weights does not matter, but that of the norm's. Biases of layers are left out.

    Args:
        module: The module.
        wiring: Its wiring.
        layers: :math:`\alpha` by the layers' names.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> l1_strengths(model, find_wiring(model, torch.ones(2, 1)), {"0": 0.1, "1": 0.2})
        {'0.weight': 0.1, '1.weight': 0.2, '1.bias': 0.2}
    """
    strengths = {}
    for name, parameter in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        weight = getattr(module.get_submodule(layer), "weight", parameter)
        if name in wiring.rows and layer in layers and not (kind == "bias" and weight.ndim > 1):
            strengths[name] = layers[layer]
    return strengths


def untrained_units(module: nn.Module, wiring: Wiring) -> Tensor:
    """Return the units whose parameters, all of them, require no gradients: there is nothing to free.

    Example:
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        >>> _ = model[0].requires_grad_(False)
        >>> untrained_units(model, find_wiring(model, torch.ones(1, 1)))
        tensor([ True,  True, False])
    """
    trained = torch.zeros(wiring.num_units, dtype=torch.bool)
    for name, parameter in module.named_parameters():
        if name in wiring.rows and parameter.requires_grad:
            trained[wiring.rows[name].units] = True
    return ~trained


def _places(wiring: Wiring, tensors: Mapping[str, Tensor], active: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, whether the units made are active, whether those read are, each of the tensor's number of dims."""
    for name, rows in wiring.rows.items():
        if name in tensors:
            made = rows.of(active.to(tensors[name].device), tensors[name].ndim)
            columns = wiring.columns.get(name)
            read = torch.ones_like(made) if columns is None else columns.of(active.to(made.device), made.ndim)
            shape = tensors[name].shape
            yield name, made.expand(shape), read.expand(shape)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
