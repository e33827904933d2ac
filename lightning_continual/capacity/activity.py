"""How active units are, as those that read them see it, and which are active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_continual.capacity.wiring import Wiring
from lightning_continual.importance.fisher import AllReduce
from lightning_continual.importance.undisturbed import undisturbed


def activity_read(
    module: nn.Module,
    wiring: Wiring,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    r"""Compute the mean activity of every unit, as it is read.

    .. math::
        \bar a_j = \max_{r} \frac1N \sum_{n=1}^{N} \frac1{|P_r|} \sum_{t \in P_r} |x^{(r)}_{njt}|

    where :math:`x^{(r)}_{nj}` is what the layer ``r`` reads of unit ``j`` for sample ``n``, behind activation, norm,
    pooling and sum, and :math:`P_r` are its positions: the pixels of a map, or the columns that a channel has behind a
    flatten. The paper has the mean activity of a unit; that it is of absolute values (of a ReLU the same), one
    value a channel, and the largest where several layers read it, is our reading.

    Args:
        module: The module; run in evaluation mode.
        wiring: Its wiring.
        batches: Batches of any structure and size; by default inputs ``(B, *)`` of ``module``.
        forward: Maps a batch to anything, by way of the module's forward; by default ``module`` itself.
        all_reduce: Sums a tensor over processes that each see a shard of the data.

    Returns:
        The activities ``(num_units,)`` in double precision; zero for outputs, and for units that nobody has read.

    Raises:
        ValueError: If ``batches`` is empty, or an activity is not finite.

    Example:
        A unit that is 2 on one sample and off on the other, and a dead one.

        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> activity_read(model, find_wiring(model, torch.ones(1, 1)), [torch.tensor([[2.0], [-7.0]])])
        tensor([1., 0., 0.], dtype=torch.float64)

    References:
        - Golkar, Kagan, Cho. *Continual Learning via Neural Pruning.* arXiv 1903.04476, 2019.
    """
    readers = {name: module.get_submodule(name.rpartition(".")[0]) for name in wiring.columns}
    device = next(module.parameters()).device
    sums = {name: torch.zeros(len(places.units), dtype=torch.float64) for name, places in wiring.columns.items()}
    counts = torch.zeros(len(readers) + 1, dtype=torch.float64)  # the last is that of all samples

    def watch(place: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            values = argument(args, kwargs).detach().abs()
            values = values if isinstance(layer, nn.Linear) else values.movedim(1, -1)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            total = values.reshape(len(values), -1, values.shape[-1]).mean(1).sum(0, dtype=torch.float64)
            sums[name] += total.cpu()
            counts[place] += len(values)

        return hook

    with undisturbed(module), torch.no_grad(), ExitStack() as stack:
        for place, (name, layer) in enumerate(readers.items()):
            stack.callback(layer.register_forward_pre_hook(watch(place, name), with_kwargs=True).remove)
        for batch in batches:
            (forward or module)(batch)
            counts[-1] += 1
    if all_reduce is not None:
        counts = all_reduce(counts.to(device)).cpu()
        sums = {name: all_reduce(value.to(device)).cpu() for name, value in sums.items()}
    if counts[-1] == 0:
        raise ValueError("`batches` must hold at least one batch, but it is empty. A generator can be read only once.")
    activity = torch.zeros(wiring.num_units, dtype=torch.float64)
    for place, name in enumerate(readers):
        units = wiring.columns[name].units
        values = (sums[name] / counts[place].clamp(min=1))[units >= 0]
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"What {name!r} reads must be finite, but on this data it is not. Look for NaN in the task's data, or"
                " weights that diverged."
            )
        read = torch.zeros_like(activity).index_add_(0, units[units >= 0], values)
        columns = torch.bincount(units[units >= 0], minlength=wiring.num_units).clamp(min=1)
        activity = torch.maximum(activity, read / columns)
    return activity


def argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the only argument of a layer's call, by position or by name.

    Example:
        >>> argument((), {"input": torch.tensor(1.0)})
        tensor(1.)
    """
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def relative_activity(wiring: Wiring, activity: Tensor) -> Tensor:
    r"""Return each unit's activity by the mean activity of the units of its layer that are not dead.

    So a common threshold suits layers of different scales (our reading).

    Args:
        wiring: The wiring.
        activity: From `activity_read`: ``(num_units,)``.

    Returns:
        Relative activities ``(num_units,)``; zero for outputs.

    Example:
        >>> units = Wiring({"0": range(3)}, {"1": range(3, 4)}, {}, {})
        >>> relative_activity(units, torch.tensor([1.0, 0.0, 3.0, 0.0]))
        tensor([0.5000, 0.0000, 1.5000, 0.0000])
    """
    relative = torch.zeros_like(activity)
    for units in wiring.layers.values():
        own = activity[units.start : units.stop]
        alive = (own > 0).sum().clamp(min=1)
        mean = own.sum() / alive
        relative[units.start : units.stop] = own / mean if mean > 0 else own
    return relative


def active_units(wiring: Wiring, activity: Tensor, thresholds: Mapping[str, float], common: float = 0.0) -> Tensor:
    r"""Return the units whose activity exceeds the threshold of their layer.

    .. math:: j \in A \iff \bar a_j > \theta_l, \qquad \text{or where no threshold is given} \quad
              \bar a_j > \rho \, \underset{i \in l,\, \bar a_i > 0}{\text{mean}} \bar a_i

    Args:
        wiring: The wiring.
        activity: From `activity_read`: ``(num_units,)``.
        thresholds: :math:`\theta_l` by layer.
        common: :math:`\rho`, for the layers without one.

    Returns:
        Which units are active: bool ``(num_units,)``; no outputs.

    Example:
        >>> units = Wiring({"0": range(3), "1": range(3, 5)}, {"2": range(5, 6)}, {}, {})
        >>> active_units(units, torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0, 0.0]), {"1": 1.5}, common=0.5)
        tensor([False, False,  True, False,  True, False])
    """
    active = relative_activity(wiring, activity) > common
    for name, threshold in thresholds.items():
        units = wiring.layers[name]
        active[units.start : units.stop] = activity[units.start : units.stop] > threshold
    for units in wiring.outputs.values():
        active[units.start : units.stop] = False
    return active
