"""From saliency to what is kept: how many weights or units, which ones, and over how many rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_continual.parameters import ParamDict

Scope: TypeAlias = Literal["global", "layer"]
Schedule: TypeAlias = Literal["geometric", "cubic", "one-shot"]
When: TypeAlias = Literal["task_end"] | Sequence[int] | Mapping[str, int]


def keep_weights(
    saliency: Mapping[str, Tensor],
    amount: float,
    *,
    scope: Scope = "global",
    kept: Mapping[str, Tensor] | None = None,
) -> ParamDict:
    r"""Remove the weights of least saliency, and say which are kept.

    Of :math:`N` weights exactly :math:`\mathrm{round}(a N)` are removed. Among equal ones those of the first
    parameters, and in a parameter the first ones, go first; so the result is the same on every process. Weights removed
    before count, and stay removed even where they are more than that.

    It takes, for a while, about 16 bytes for every float32 number that is ranked together: of all parameters, or with
    ``scope="layer"`` of the largest.

    Args:
        saliency: One tensor a parameter, by name, of any shapes; infinity keeps a weight while others are left.
        amount: The share :math:`a` of weights to remove, in [0, 1).
        scope: ``"global"`` ranks the weights of all parameters together; ``"layer"`` those of each parameter, of which
            each then loses the share :math:`a`.
        kept: Which weights are left from before (true), by name; by default all.

    Returns:
        One boolean tensor a parameter, of its shape and device: true where the weight is kept.

    Raises:
        ValueError: If ``amount`` lies outside [0, 1), ``scope`` is unknown, ``saliency`` is empty or NaN somewhere,
            ``kept`` does not fit, or a parameter would lose its last weight; the error names it.

    Example:
        >>> saliency = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}
        >>> keep_weights(saliency, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
        >>> keep_weights(saliency, 0.25, kept={"a": torch.tensor([True, False]), "b": torch.tensor([True, True])})
        {'a': tensor([ True, False]), 'b': tensor([True, True])}
    """
    _check_amount(amount)
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', but got {scope!r}.")
    if not saliency:
        raise ValueError(
            "`saliency` must hold at least one parameter, but it is empty. Unfreeze the weights to prune, or name them"
            " to the selector by `parameters`."
        )
    for name, value in saliency.items():
        if bool(value.isnan().any()):
            raise ValueError(f"`saliency` must not be NaN, but that of {name!r} is. Look for weights that diverged.")
    left = _kept_before(saliency, kept)
    together = [list(saliency)] if scope == "global" else [[name] for name in saliency]
    for names in together:
        size = sum(saliency[name].numel() for name in names)
        _remove_lowest_([saliency[name] for name in names], [left[name] for name in names], round(amount * size))
    for name, mask in left.items():
        if mask.numel() and not bool(mask.any()):
            remedy = ", or pass `scope='layer'`, which takes the same share of every parameter" * (scope == "global")
            if scope == "global" and not bool(saliency[name].any()):
                remedy += (
                    ". Its saliency is 0 throughout, as where no output depends on it: then name only the others by"
                )
                remedy += " `parameters`"
            raise ValueError(
                f"Every parameter must keep a weight, but with `amount={amount}` and `scope={scope!r}` {name!r} would"
                f" lose all of its {mask.numel()}: pruning a layer to nothing cuts the network. Lower `amount`{remedy}."
            )
    return left


def keep_units(
    scores: Sequence[Tensor], amount: float, *, min_units: int = 1, kept: Sequence[Tensor] | None = None
) -> list[Tensor]:
    r"""Remove the units of least score in every group, and say which are kept.

    Of the :math:`n` units of a group :math:`\min(\mathrm{round}(a n), n - m)` are removed, where :math:`m` is
    ``min_units``. Groups are ranked each by itself, for scores are sums over as many weights as a unit happens to have,
    and a ranking of all together wipes out whole layers. Among equal units the first go first. Units removed before
    count, and stay removed.

    Args:
        scores: The scores ``(num_units,)`` of every group.
        amount: The share :math:`a` of units to remove, in [0, 1).
        min_units: The number :math:`m \ge 1` of units that a group keeps at least.
        kept: Which units of every group are left from before (true); by default all.

    Returns:
        For each group ``(num_units,)``, true where the unit is kept, on the device of its scores.

    Raises:
        ValueError: If ``amount`` lies outside [0, 1), ``min_units`` is less than 1, ``scores`` is empty, not of one
            dimension or NaN somewhere, or ``kept`` does not fit or has a group without units.

    Example:
        >>> keep_units([torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([5.0, 6.0])], 0.75)
        [tensor([False, False, False,  True]), tensor([False,  True])]
    """
    _check_amount(amount)
    if min_units < 1:
        raise ValueError(
            f"`min_units` must be at least 1, but got {min_units}. A layer without units cuts the network."
        )
    if not scores:
        raise ValueError(
            "`scores` must hold at least one group of units, but it is empty. Choose a network with a hidden layer."
        )
    before = [torch.ones(len(score), dtype=torch.bool) for score in scores] if kept is None else kept
    if len(before) != len(scores):
        raise ValueError(f"`kept` must have one tensor a group, {len(scores)} of them, but has {len(before)}.")
    results = []
    for number, (score, old) in enumerate(zip(scores, before, strict=True)):
        if score.ndim != 1 or bool(score.isnan().any()):
            found = f"shape {tuple(score.shape)}" if score.ndim != 1 else "NaN"
            raise ValueError(f"`scores` must be one number a unit, (num_units,), but group {number} has {found}.")
        if old.shape != score.shape or not bool(old.any()):
            found = f"shape {tuple(old.shape)}" if old.shape != score.shape else "no unit left"
            raise ValueError(
                f"`kept` must say of each of the {len(score)} units of group {number} whether it is left, and leave"
                f" one, but has {found}."
            )
        mask = old.to(score.device, torch.bool, copy=True)
        places = mask.nonzero().flatten()
        excess = min(round(amount * len(score)), len(score) - min_units) - (len(score) - len(places))
        mask[places[score[places].argsort(stable=True)[: max(excess, 0)]]] = False
        results.append(mask)
    return results


def amounts(amount: float, rounds: int, *, schedule: Schedule = "geometric") -> list[float]:
    r"""Return the share of weights that is removed in all after each of some rounds of pruning.

    .. math::
        a_r^\text{geometric} = 1 - (1 - a)^{r / R}, \qquad
        a_r^\text{cubic} = a \left(1 - \left(1 - \frac rR\right)^{3}\right), \qquad r = 1, \ldots, R

    Geometric rounds each remove the same share of what is left; cubic ones much at first, while there is redundancy,
    and little at the end. One shot is one round. The last is :math:`a`, to the bit.

    Args:
        amount: The share :math:`a` to remove in the end, in [0, 1).
        rounds: The number :math:`R` of rounds.
        schedule: ``"geometric"``, ``"cubic"`` or ``"one-shot"``.

    Returns:
        :math:`R` numbers, never falling.

    Raises:
        ValueError: If ``amount`` lies outside [0, 1), ``rounds`` is less than 1, or more than 1 with ``"one-shot"``, or
            ``schedule`` is unknown.

    Example:
        >>> amounts(0.75, 2)  # half, and half of what is left
        [0.5, 0.75]
        >>> amounts(0.5, 2, schedule="cubic")
        [0.4375, 0.5]

    References:
        - Frankle, Carbin. *The Lottery Ticket Hypothesis.* ICLR 2019 (geometric).
        - Zhu, Gupta. *To prune, or not to prune: exploring the efficacy of pruning for model compression.* ICLR
          Workshop 2018 (cubic).
    """
    _check_amount(amount)
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, but got {rounds}.")
    if schedule not in ("geometric", "cubic", "one-shot"):
        raise ValueError(f"`schedule` must be 'geometric', 'cubic' or 'one-shot', but got {schedule!r}.")
    if schedule == "one-shot" and rounds > 1:
        raise ValueError(
            f"`rounds` must be 1 with `schedule='one-shot'`, but got {rounds}. Pass 'geometric' or 'cubic' to prune in"
            " rounds."
        )
    shares = [number / rounds for number in range(1, rounds)]
    if schedule == "cubic":
        return [*(amount * (1 - (1 - share) ** 3) for share in shares), amount]
    return [*(1 - (1 - amount) ** share for share in shares), amount]


def epochs_and_steps(when: Any) -> tuple[list[int] | None, int | None]:
    """Return at which epochs, or after how many steps, rounds are made; nothing for the end of a task.

    Args:
        when: ``"task_end"``, a list of epochs, or ``{"every_n_steps": n}``.

    Returns:
        The epochs or None, and the number of steps or None.

    Raises:
        ValueError: If ``when`` is none of these.

    Example:
        >>> epochs_and_steps([0, 2]), epochs_and_steps({"every_n_steps": 5}), epochs_and_steps("task_end")
        (([0, 2], None), (None, 5), (None, None))
    """
    if isinstance(when, Mapping) and list(when) == ["every_n_steps"]:
        every = when["every_n_steps"]
        if isinstance(every, int) and every >= 1:
            return None, every
    elif isinstance(when, Sequence) and not isinstance(when, str) and len(when) > 0:
        epochs = list(when)
        if all(isinstance(one, int) for one in epochs) and epochs[0] >= 0 and epochs == sorted(set(epochs)):
            return epochs, None
    elif when == "task_end":
        return None, None
    raise ValueError(
        "`when` must be 'task_end', a list of epochs that rise from 0 or later, or {'every_n_steps': n} with n at least"
        f" 1, but got {when!r}."
    )


def _check_amount(amount: float) -> None:
    if not 0 <= amount < 1:
        raise ValueError(
            f"`amount` must lie in [0, 1), but got {amount}. Pass the share of weights or units to remove, for example"
            " 0.9."
        )


def _kept_before(saliency: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None) -> ParamDict:
    """Return masks that may be written to, contiguous so that they may be flattened."""
    if kept is None:
        return {name: torch.ones(x.shape, dtype=torch.bool, device=x.device) for name, x in saliency.items()}
    for name in [*saliency, *kept]:
        if name not in kept or name not in saliency or kept[name].shape != saliency[name].shape:
            raise ValueError(f"`kept` must have the names and shapes of `saliency`, but differs in {name!r}.")
    return {
        name: kept[name].to(x.device, torch.bool).clone(memory_format=torch.contiguous_format)
        for name, x in saliency.items()
    }


def _remove_lowest_(values: Sequence[Tensor], masks: Sequence[Tensor], number: int) -> None:
    """Set to false the places of the lowest values that are still true, until ``number`` are false in all."""
    number -= sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)
    if number <= 0:
        return
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    candidates = torch.cat(
        [
            (value.flatten() if bool(mask.all()) else value[mask]).to(values[0].device, dtype)
            for value, mask in zip(values, masks, strict=True)
        ]
    )
    threshold = candidates.kthvalue(number).values
    num_ties = number - int((candidates < threshold).count_nonzero())
    del candidates
    for value, mask in zip(values, masks, strict=True):
        value, limit = value.to(dtype), threshold.to(value.device)
        if num_ties:
            ties = (mask & (value == limit)).flatten().nonzero().flatten()[:num_ties]
            mask.view(-1)[ties] = False
            num_ties -= len(ties)
        mask &= value >= limit
