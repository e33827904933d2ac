"""Saliency of units: sums of what their weights are worth, and the damage of dropping them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_continual import _batch
from lightning_continual.compression.units import UnitGroup
from lightning_continual.importance import AllReduce
from lightning_continual.importance.fisher import Loss
from lightning_continual.importance.undisturbed import undisturbed
from lightning_continual.parameters import ParamDict, computing_with


def incoming(module: nn.Module, groups: Sequence[UnitGroup]) -> ParamDict:
    """Return the weights and biases that make the units, by name: what a weight-level selector is to score for them.

    Args:
        module: The module whose units they are.
        groups: Groups of units.

    Returns:
        The parameters themselves, each once.

    Raises:
        ValueError: If the module has no parameter of a name; the error names it.

    Example:
        >>> from lightning_continual.compression.units import Slices
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> rows = torch.tensor([[0], [1]])
        >>> hidden = UnitGroup(("0",), 2, (Slices("0.weight", 0, rows), Slices("0.bias", 0, rows)), (), ())
        >>> list(incoming(model, [hidden]))
        ['0.weight', '0.bias']
    """
    parameters = dict(module.named_parameters())
    return {s.parameter: _found(parameters, s.parameter) for group in groups for s in group.incoming}


def summed(saliency: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> list[Tensor]:
    r"""Sum the saliency of weights to scores of units.

    .. math::
        S_u = \sum_{k \in \text{in}(u)} s_k

    over the weights and biases that make unit ``u`` (in all layers of its group), not over those that read it. Scores
    are to be compared within a group: they are sums over as many weights as a unit happens to have.

    Args:
        saliency: The saliency of the parameters in `incoming`, at least, by name.
        groups: Groups of units.

    Returns:
        For each group the scores ``(num_units,)``, at least in float32.

    Raises:
        ValueError: If the saliency of a parameter is missing; the error names it.

    Example:
        >>> from lightning_continual.compression.units import Slices
        >>> rows = torch.tensor([[0], [1]])
        >>> hidden = UnitGroup(("0",), 2, (Slices("0.weight", 0, rows), Slices("0.bias", 0, rows)), (), ())
        >>> summed({"0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "0.bias": torch.tensor([10.0, 0.0])}, [hidden])
        [tensor([13.,  7.])]
    """
    scores = []
    for group in groups:
        score: Tensor | None = None
        for s in group.incoming:
            value = _found(saliency, s.parameter)
            value = value.to(torch.promote_types(value.dtype, torch.float32)).movedim(s.dim, 0)
            places = s.places.to(value.device)
            part = value.reshape(len(value), -1).sum(1)[places].sum(1)
            score = part if score is None else score + part.to(score.device)
        if score is None:
            raise ValueError(f"Units must be made by a weight, but those of {', '.join(group.layers)} have none.")
        scores.append(score)
    return scores


def dropout_damage(
    module: nn.Module,
    groups: Sequence[UnitGroup],
    batches: Iterable[Any],
    *,
    loss: Loss,
    generator: torch.Generator,
    num_masks: int = 1000,
    keep: float = 0.9,
    ridge: float = 0.1,
    all_reduce: AllReduce | None = None,
) -> list[Tensor]:
    r"""Estimate the damage of dropping each unit from the loss under random dropout of many.

    With :math:`m_{ku} = 1` where mask ``k`` keeps unit ``u`` (of all units of all groups), and :math:`L_k` the mean
    loss over all samples without the units that mask ``k`` drops,

    .. math::
        \min_{b, \beta} \; \frac1K \sum_{k=1}^{K} \Bigl(L_k - b - \sum_u \beta_u (1 - m_{ku})\Bigr)^{2}
        + \rho \, q (1 - q) \sum_u \beta_u^2

    and the damage of unit ``u`` is :math:`\beta_u`: by how much its absence raises the loss, on average over the
    absence of others; below zero where the network is better without it. :math:`q (1 - q)` is the variance of a mask's
    entry, so that the ridge :math:`\rho` shrinks by :math:`1 / (1 + \rho)` where masks are uncorrelated.

    The idea of regressing the loss on dropout masks is published, the estimator is our reading of it. Each unit is
    dropped by exactly :math:`K q = \mathrm{round}(K (1 - p))` masks, :math:`p` the probability ``keep``, and which ones
    is drawn for each unit independently: so no unit goes unmeasured, and all are measured equally well.

    A unit is dropped by setting to zero the weights and biases that make it, those of the normalisations that it
    passes, and the weights that read it. The module is run in evaluation mode, ``num_masks`` times a batch, and
    batches are read once. With as many masks as units, or fewer, the ranking is rough; take ten times as many. Near
    ``keep=1`` the damage is that of dropping the unit alone. A unit that can be spared while all others are there may
    be missed when they are gone: to prune much at once, choose ``keep`` near the share of units to be left.

    Args:
        module: The module whose units are meant.
        groups: Groups of units.
        batches: A few batches of any structure and size.
        loss: Maps a batch to the mean loss over its samples ``()``, or to one loss a sample ``(B,)``.
        generator: Where masks come from; the same on all processes.
        num_masks: The number :math:`K` of masks.
        keep: The share :math:`p` of masks that keep a unit, in (0, 1).
        ridge: :math:`\rho`, greater than zero.
        all_reduce: Sums a tensor over processes that each see a shard of the data; it is applied to the sums of losses
            and to the count before they are divided.

    Returns:
        For each group the damages ``(num_units,)`` in the unit of the loss, at least in float32.

    Raises:
        ValueError: If ``groups`` or ``batches`` is empty, ``keep``, ``ridge`` or ``num_masks`` is out of range,
            ``num_masks`` is too few for ``keep``, the module has no parameter of a name, or ``loss`` is not as
            described or not finite.

    Example:
        The loss is less by 3 with one unit, and by nothing with the other.

        >>> from lightning_continual.compression.units import Slices
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.fill_(1.0), model[1].weight.data.copy_(torch.tensor([[-3.0, 0.0]]))
        >>> units = torch.tensor([[0], [1]])
        >>> hidden = UnitGroup(("0",), 2, (Slices("0.weight", 0, units),), (), (Slices("1.weight", 1, units),))
        >>> (damage,) = dropout_damage(
        ...     model, [hidden], [torch.ones(4, 1)], loss=lambda x: model(x).mean(), generator=torch.Generator(),
        ...     ridge=1e-6,
        ... )
        >>> damage.round(decimals=3) + 0.0
        tensor([3., 0.])
    """
    if not groups:
        raise ValueError("`groups` must hold at least one group of units, but it is empty.")
    if not 0 < keep < 1:
        raise ValueError(f"`keep` must lie in (0, 1), but got {keep}. Pass the share of masks that keep a unit.")
    if not ridge > 0:
        raise ValueError(f"`ridge` must be greater than 0, but got {ridge}. Pass a small one, such as 1e-6, for none.")
    num_drops = round(num_masks * (1 - keep))
    if not 0 < num_drops < num_masks:
        raise ValueError(
            f"`num_masks` must be enough to drop and to keep each unit once, but got {num_masks} with `keep={keep}`."
            f" Pass at least {int(1 / min(keep, 1 - keep)) + 1}, and rather a few times the number of units."
        )
    sizes = [group.num_units for group in groups]
    uniform = torch.rand(sum(sizes), num_masks, generator=generator, device=generator.device)
    dropped = (uniform.argsort(1) < num_drops).T.cpu()
    losses = _losses_without(module, groups, dropped.split_with_sizes(sizes, 1), batches, loss, all_reduce)
    like = next(module.parameters())
    damage = _ridge(dropped.double(), losses, ridge)
    return list(damage.to(like.device, torch.promote_types(like.dtype, torch.float32)).split_with_sizes(sizes))


def _losses_without(
    module: nn.Module,
    groups: Sequence[UnitGroup],
    dropped: Sequence[Tensor],
    batches: Iterable[Any],
    loss: Loss,
    all_reduce: AllReduce | None,
) -> Tensor:
    """Return the mean loss ``(K,)`` under each row of ``dropped``, ``(K, num_units)`` a group."""
    parameters = dict(module.named_parameters())
    sums, count = torch.zeros(len(dropped[0]), dtype=torch.float64), 0
    with undisturbed(module), torch.no_grad():
        for batch in batches:
            num_samples = _batch.size(batch)
            totals = []
            for rows in zip(*dropped, strict=True):
                with computing_with(module, _without(parameters, groups, rows)):
                    totals.append(_total(loss(batch), num_samples))
            sums += torch.stack(totals).cpu().double()
            count += num_samples
    if all_reduce is not None:
        device = next(iter(parameters.values())).device
        count = int(all_reduce(torch.tensor(count, device=device)))
        sums = all_reduce(sums.to(device)).cpu()
    if count == 0:
        raise ValueError("`batches` must hold at least one batch, but it is empty. A generator can be read only once.")
    if not bool(sums.isfinite().all()):
        raise ValueError(
            "`loss` must be finite with some units dropped, but it is not. Look for NaN in the data, or for a loss that"
            " is undefined where a layer gives nothing but zeros."
        )
    return sums / count


def _without(parameters: Mapping[str, Tensor], groups: Sequence[UnitGroup], dropped: Sequence[Tensor]) -> ParamDict:
    """Return the parameters in which units have a part, with zeros for those that are ``dropped``."""
    changed: ParamDict = {}
    for group, row in zip(groups, dropped, strict=True):
        for s in (*group.incoming, *group.norms, *group.outgoing):
            before = changed[s.parameter] if s.parameter in changed else _found(parameters, s.parameter)
            places = s.places[row.to(s.places.device)].flatten().to(before.device)
            changed[s.parameter] = before.index_fill(s.dim, places, 0.0)
    return changed


def _total(value: Tensor, num_samples: int) -> Tensor:
    if value.ndim == 0:
        return value * num_samples
    if value.shape != (num_samples,):
        raise ValueError(
            f"`loss` must return the mean loss of the batch, (), or one loss a sample, ({num_samples},), but got shape"
            f" {tuple(value.shape)}. Average over all other dimensions."
        )
    return value.sum()


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Regress ``y`` ``(K,)`` on ``x`` ``(K, U)`` and a constant; all columns have the same number of ones."""
    share = x[:, 0].mean()
    x, y = x - share, y - y.mean()
    penalty = ridge * float(share * (1 - share)) * len(x)
    if x.shape[1] <= len(x):
        primal: Tensor = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        return primal
    dual: Tensor = torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype), y)
    return x.T @ dual


def _found(values: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise ValueError(
            f"What units need must be there, but {name!r} is not among {', '.join(values)}. Score all parameters of"
            " `incoming`, and find the units in the module that they belong to."
        )
    return values[name]
