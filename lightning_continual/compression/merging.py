"""Merging units: what a unit gave goes on through another one that behaves like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_continual.compression.units import Forward, Slices, UnitGroup, call, check_kept, zero_units_
from lightning_continual.importance.undisturbed import undisturbed


@dataclass(frozen=True)
class MergeCosts:
    r"""What it costs to let one unit of a group stand for another one.

    Args:
        costs: Of replacing unit j by unit i, ``(U, U)``, j along the rows; infinite on the diagonal.
        alphas: For each of the group's ``outgoing``, :math:`\alpha_{ji}` ``(U, U)``.
        betas: For each of the group's ``outgoing``, :math:`\beta_{ji}` ``(U, U)``.
    """

    costs: Tensor
    alphas: tuple[Tensor, ...]
    betas: tuple[Tensor, ...]

    def scores(self) -> Tensor:
        r"""Return what each unit's elimination costs, when the cheapest ones go first.

        A set of removed units costs the sum over them of the cost by their best unit that is left. Units are removed
        one by one, each time that one which raises this sum least (two copies of each other are not both cheap); a
        unit's score is the rise. Rises never fall, so units with the lowest scores are those removed first. The order
        is our reading.

        Returns:
            The scores ``(U,)``; infinite for the last unit, for which none could stand.

        Example:
            The first two units are copies: one of them is free, the other one as dear as the third lets it be.

            >>> one = torch.tensor([[inf, 0.0, 4.0], [0.0, inf, 4.0], [9.0, 9.0, inf]])
            >>> MergeCosts(one, (), ()).scores()
            tensor([0., 8., inf])
        """
        costs = self.costs.clone()
        num_units = len(costs)
        kept = torch.ones(num_units, dtype=torch.bool, device=costs.device)
        scores = torch.full_like(costs[0], inf)
        best = costs.topk(min(2, num_units), dim=1, largest=False)
        values, targets = best.values, best.indices
        for _ in range(num_units - 1):
            # Without unit u, those that it stands for need their second best.
            rise = torch.where(kept, values[:, 0], inf)
            rise.index_add_(0, targets[~kept, 0], (values[:, 1] - values[:, 0])[~kept])
            unit = int(rise.argmin())
            scores[unit] = rise[unit]
            kept[unit] = False
            costs[:, unit] = inf
            stale = (targets == unit).any(1)
            again = costs[stale].topk(2, dim=1, largest=False)
            values[stale], targets[stale] = again.values, again.indices
        return scores


def merge_costs(
    module: nn.Module, groups: Sequence[UnitGroup], batches: Iterable[Any], *, forward: Forward | None = None
) -> list[MergeCosts]:
    r"""Compute what it costs to eliminate each unit by each other one.

    A layer that reads units j and i as :math:`a_j` and :math:`a_i` does without j if :math:`a_j` is an affine function
    of :math:`a_i`:

    .. math::
        a_j \approx \alpha_{ji} a_i + \beta_{ji}, \qquad
        c_{ji} = \|w_{\text{out},j}\|^2 \, \frac1N \sum_{n=1}^{N} (a_{nj} - \alpha_{ji} a_{ni} - \beta_{ji})^2

    with :math:`\alpha, \beta` by least squares: then :math:`c_{ji}` is the mean square of what is lost of a linear
    layer's outputs, summed over these. Values are those that the reading layer gets, behind activations and
    normalisations; :math:`N` counts samples, positions of maps and sequences, and the columns of a channel behind a
    flatten. Where several layers read the units, each has its own :math:`\alpha, \beta`, and costs add up.

    :math:`\beta` is 0 for layers without a bias, and for convolutions that pad with zeros or are transposed, which do
    not see a constant at the border. That each of a channel's columns and kernel positions shares :math:`\alpha` and
    :math:`\beta`, and the formula of the cost, are our reading.

    Args:
        module: The module; run in evaluation mode.
        groups: Groups of its units, from `unit_groups`, read by layers for which `not_mergeable` has no objection.
        batches: Batches of any structure and size.
        forward: Maps the module and a batch to anything, by way of the module's forward; by default the module is
            called: a tuple or list holds several arguments, a dictionary named ones.

    Returns:
        One for each group, in double precision.

    Raises:
        ValueError: If ``batches`` is empty, a group cannot be merged, a layer that reads units is not used, or values
            are not finite.

    Example:
        The second unit is twice the first one, and the third a constant.

        >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [0.0]]))
        >>> _ = model[0].bias.data.copy_(torch.tensor([0.0, 0.0, 5.0]))
        >>> from lightning_continual.compression.units import unit_groups
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> (found,) = merge_costs(model, unit_groups(model, x), [x])
        >>> found.alphas[0][1, 0].item(), found.betas[0][2, 0].item()
        (2.0, 5.0)
    """
    objections = [reason for group in groups if (reason := not_mergeable(module, group)) is not None]
    if objections:
        raise ValueError(
            f"`groups` must hold groups whose units can be merged, but {objections[0]}. Leave such groups out."
        )
    readers = [[(_reader(module, slices), slices) for slices in group.outgoing] for group in groups]
    moments = [[_Moments() for _ in ones] for ones in readers]
    with undisturbed(module), torch.no_grad(), ExitStack() as stack:
        for ones, collected in zip(readers, moments, strict=True):
            for (layer, slices), one in zip(ones, collected, strict=True):
                stack.callback(layer.register_forward_pre_hook(_watch(one, slices)).remove)
        for batch in batches:
            (forward or call)(module, batch)
    return [_costs(ones, collected) for ones, collected in zip(readers, moments, strict=True)]


def merge_(module: nn.Module, group: UnitGroup, costs: MergeCosts, kept: Tensor) -> None:
    r"""Merge the units of a group that are not kept into those that are, in place.

    For each such unit j and the kept unit i with the lowest cost, in each layer that reads them,

    .. math::
        w_{\text{out},i} \leftarrow w_{\text{out},i} + \alpha_{ji} w_{\text{out},j}, \qquad
        b \leftarrow b + \beta_{ji} \sum w_{\text{out},j}

    (the sum over kernel positions, and the columns of a channel behind a flatten), and unit j is set to zero, as by
    `zero_units_`. Groups are merged one after the other with costs that were computed before: then the errors of one
    are not made up for in the next.

    Args:
        module: The module.
        group: One of its groups.
        costs: The costs of this group, from `merge_costs`.
        kept: Which units are kept: bool ``(num_units,)``.

    Raises:
        ValueError: If ``kept`` is no bool tensor of this shape, or keeps no unit; if the group cannot be merged.

    Example:
        The second unit is twice the first one.

        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[1.0, 10.0]]))
        >>> from lightning_continual.compression.units import unit_groups
        >>> (group,) = unit_groups(model, torch.ones(1, 1))
        >>> (costs,) = merge_costs(model, [group], [torch.ones(1, 1)])
        >>> merge_(model, group, costs, torch.tensor([True, False]))
        >>> model[2].weight.data
        tensor([[21.,  0.]])
    """
    check_kept([group], [kept])
    reason = not_mergeable(module, group)
    if reason is not None:
        raise ValueError(f"`group` must be one whose units can be merged, but {reason}. Remove its units unmerged.")
    kept = kept.to(costs.costs.device)
    removed = (~kept).nonzero().flatten()
    targets = costs.costs[removed].masked_fill(~kept, inf).argmin(1)
    with torch.no_grad():
        for slices, alphas, betas in zip(group.outgoing, costs.alphas, costs.betas, strict=True):
            layer = _reader(module, slices)
            alpha, beta = alphas[removed, targets], betas[removed, targets]
            columns = _columns(layer, slices)  # (U, k, outputs, kernel)
            lost = columns[removed.to(columns.device)].double()
            columns = columns.double().index_add(
                0, targets.to(columns.device), alpha.to(columns.device)[:, None, None, None] * lost
            )
            _set_columns_(layer, slices, columns.to(layer.weight.dtype))
            if layer.bias is not None:
                layer.bias += (beta.to(lost.device)[:, None] * lost.sum((1, 3))).sum(0).to(layer.bias.dtype)
    zero_units_(module, [group], [kept])


def not_mergeable(module: nn.Module, group: UnitGroup) -> str | None:
    """Return why the units of a group cannot be merged, or ``None`` if they can.

    They can if each of the layers that read them is a linear layer or a convolution without groups.

    Args:
        module: The module.
        group: One of its groups, from `unit_groups`.

    Example:
        >>> slices = Slices("0.weight", 0, torch.tensor([[0], [1]]))
        >>> group = UnitGroup(("table",), 2, (), (), (slices,))
        >>> print(not_mergeable(nn.Sequential(nn.Embedding(2, 2)), group))
        '0.weight', which reads the units of table, is not the weight of a linear layer or a convolution without groups
    """
    owners = dict(module.named_modules())
    for slices in group.outgoing:
        name, _, attribute = slices.parameter.rpartition(".")
        layer: Any = owners.get(name)
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and layer.groups == 1)
        if not plain or attribute != "weight" or slices.dim != _inputs_dim(layer):
            return (
                f"{slices.parameter!r}, which reads the units of {', '.join(group.layers)}, is not the weight of a"
                " linear layer or a convolution without groups"
            )
        sharers = [one for one in module.modules() if any(p is layer.weight for p in one._parameters.values())]
        if len(sharers) > 1:
            return f"{slices.parameter!r}, which reads the units of {', '.join(group.layers)}, is shared by layers"
    return None


def _inputs_dim(layer: Any) -> int:
    """Return the dimension of a layer's weight along which its inputs lie."""
    return 0 if isinstance(layer, _ConvNd) and layer.transposed else 1


def _reader(module: nn.Module, slices: Slices) -> Any:
    return module.get_submodule(slices.parameter.rpartition(".")[0])


def _keeps_constants(layer: Any) -> bool:
    """Whether a constant input is one at the layer's output, up to a bias."""
    if layer.bias is None or isinstance(layer, nn.Linear):
        return layer.bias is not None
    pads = layer.padding_mode == "zeros" and layer.padding != "valid" and set(layer.padding) != {0}
    return not layer.transposed and not pads


def _columns(layer: Any, slices: Slices) -> Tensor:
    """Return the weights that read each unit, ``(U, k, outputs, kernel)``."""
    weight: Tensor = layer.weight.detach().movedim(_inputs_dim(layer), 0)
    return weight.reshape(len(weight), weight.shape[1], -1)[slices.places.to(weight.device)]


def _set_columns_(layer: Any, slices: Slices, columns: Tensor) -> None:
    weight = layer.weight.movedim(_inputs_dim(layer), 0)
    weight[slices.places.flatten().to(weight.device)] = columns.reshape(-1, *weight.shape[1:])


class _Moments:
    """First and second moments of values ``(N, U)``, in double precision, about their mean in the first batch."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.sums = self.products = torch.empty(0)

    def add(self, values: Tensor) -> None:
        values = values.double()
        if self.count == 0:
            self.shift = values.mean(0)
            self.sums, self.products = torch.zeros_like(self.shift), values.new_zeros(2 * values.shape[1:])
        values = values - self.shift
        self.count += len(values)
        self.sums += values.sum(0)
        self.products += values.T @ values

    def fit(self, with_constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return α, β and the mean square residual of each unit (rows) as a function of each other one."""
        offset = self.sums / self.count
        mean, second = self.shift + offset, self.products / self.count - offset.outer(offset)
        if not with_constant:
            second = second + mean.outer(mean)
        own = second.diagonal()
        # What is below rounding is constant.
        floor = torch.finfo(second.dtype).eps * (own + mean.square())
        alpha = torch.where(own > floor, second / own, 0.0)
        residual = (own[:, None] - alpha * second).clamp(min=0)
        beta = mean[:, None] - alpha * mean if with_constant else torch.zeros_like(alpha)
        return alpha, beta, residual


def _watch(moments: _Moments, slices: Slices) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        values: Tensor = inputs[0]
        if isinstance(layer, _ConvNd):
            if values.ndim == len(layer.kernel_size) + 1:
                values = values[None]
            values = values.movedim(1, -1)
        values = values.flatten(0, -2) if values.ndim > 1 else values[None]
        values = values[:, slices.places.to(values.device)]  # (N, U, k)
        moments.add(values.movedim(2, 1).flatten(0, 1))

    return hook


def _costs(readers: list[tuple[Any, Slices]], moments: list[_Moments]) -> MergeCosts:
    total, alphas, betas = torch.zeros(()), [], []
    for (layer, slices), one in zip(readers, moments, strict=True):
        if one.count == 0:
            raise ValueError(
                f"The layer of {slices.parameter!r} must be used in the forward pass of at least one batch, but it is"
                " not. Pass at least one batch; a generator can be read only once."
            )
        alpha, beta, residual = one.fit(_keeps_constants(layer))
        if not residual.isfinite().all():
            raise ValueError(
                f"What the layer of {slices.parameter!r} reads must be finite, but it is not. Look at the batches, and"
                " at the weights of the layers before it."
            )
        weights = _columns(layer, slices).double().square().sum((1, 2, 3))
        total = total.to(residual) + weights[:, None] * residual
        alphas.append(alpha)
        betas.append(beta)
    return MergeCosts(total.fill_diagonal_(inf), tuple(alphas), tuple(betas))
