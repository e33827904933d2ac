"""Selectors by name, and what they are for: choosing weights or units, and setting to zero what is not kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_continual.compression.merging import MergeCosts, merge_, merge_costs, not_mergeable
from lightning_continual.compression.ranking import Scope, keep_units, keep_weights
from lightning_continual.compression.saliency import (
    Parameters,
    check_saliency,
    magnitude,
    obd,
    obd_sd,
    prunable,
    random,
)
from lightning_continual.compression.unit_saliency import dropout_damage, incoming, summed
from lightning_continual.compression.units import UnitGroup, kept_parameters, removed_units, zero_units_
from lightning_continual.importance import AllReduce
from lightning_continual.importance.fisher import Statistic
from lightning_continual.parameters import ParamDict, evaluating

WeightSelector: TypeAlias = Literal["random", "magnitude", "obd", "obd-sd"]
"""Selectors that score single weights; a unit is worth the sum over what makes it."""
UnitSelector: TypeAlias = Literal["dropout-damage", "merge"]
"""Selectors that score units only."""
Scores: TypeAlias = Callable[[Any, Iterable[Any], Parameters], Mapping[str, Tensor]]
"""Maps module, batches and the parameters to score, by name, to one tensor a parameter, of its shape."""
Selector: TypeAlias = WeightSelector | UnitSelector | Scores
Level: TypeAlias = Literal["parameter", "unit"]


@dataclass(frozen=True)
class Evidence:
    """What selectors may look at; each takes of it what it needs.

    Args:
        batches: Returns batches of this process's data, anew with every call; for ``"merge"`` of the data of all.
        loss: Maps a batch to its mean loss ``()``, or to one loss a sample ``(B,)``.
        outputs: Maps module and batch to the outputs; for ``"obd"`` these are logits ``(B, C)``.
        generator: Where random numbers come from; the same on all processes.
        statistic: Of ``"obd-sd"``, see `obd_sd`.
        num_samples: How many samples ``batches`` hold: by it the results of a function are averaged over processes.
        all_reduce: Sums a tensor over processes that each see a shard of the data.
        masks_per_unit: Of ``"dropout-damage"``: masks for each unit.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> Evidence(list, lambda x: model(x).mean(), nn.Module.__call__, torch.Generator()).masks_per_unit
        10
    """

    batches: Callable[[], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    outputs: Callable[[Any, Any], Any]
    generator: torch.Generator
    statistic: Statistic = "sd"
    num_samples: int = 1
    all_reduce: AllReduce | None = None
    masks_per_unit: int = 10

    def num_masks(self, groups: Sequence[UnitGroup]) -> int:
        """Return how many masks ``"dropout-damage"`` draws for all units of some groups."""
        return max(self.masks_per_unit * sum(group.num_units for group in groups), 20)


def check_selector(selector: Any, *, level: Any, scope: Any, statistic: Any) -> None:
    """Raise if these arguments are unknown, or do not go together.

    Args:
        selector: A `Selector`.
        level: ``"parameter"`` or ``"unit"``.
        scope: See `keep_weights`.
        statistic: See `obd_sd`.

    Raises:
        ValueError: If one is unknown, or ``selector`` scores units and ``level`` is ``"parameter"``.

    Example:
        >>> check_selector("obd", level="unit", scope="global", statistic="sd")
    """
    known = {"level": (level, Level), "scope": (scope, Scope), "statistic": (statistic, Statistic)}
    for name, (value, values) in known.items():
        if value not in get_args(values):
            raise ValueError(f"`{name}` must be one of {get_args(values)}, but got {value!r}.")
    if callable(selector):
        return
    names = get_args(WeightSelector) + get_args(UnitSelector)
    if selector not in names:
        raise ValueError(f"`selector` must be one of {names} or a function, but got {selector!r}.")
    if level == "parameter" and selector in get_args(UnitSelector):
        raise ValueError(
            f"`selector={selector!r}` scores whole units, but got `level='parameter'`. Pass `level='unit'`, or one of"
            f" {get_args(WeightSelector)}."
        )


def matching(module: nn.Module, patterns: Iterable[str]) -> ParamDict:
    """Return the weights that can be pruned (see `prunable`) and match one of some patterns, by name.

    Args:
        module: The module.
        patterns: Patterns of names, as ``"backbone.*"``.

    Raises:
        ValueError: If a pattern matches none.

    Example:
        >>> list(matching(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["1.*"]))
        ['1.weight']
    """
    weights, found = prunable(module), set[str]()
    for pattern in patterns:
        names = {name for name in weights if fnmatchcase(name, pattern)}
        if not names:
            raise ValueError(
                f"`parameters` has the pattern {pattern!r}, which names none of the weights that can be pruned,"
                f" {list(weights)}. Pass patterns of these names."
            )
        found |= names
    return {name: one for name, one in weights.items() if name in found}


def reads_data(selector: Selector) -> bool:
    """Whether a selector looks at batches.

    Example:
        >>> [name for name in get_args(WeightSelector) if reads_data(name)]
        ['obd', 'obd-sd']
    """
    return selector not in ("random", "magnitude")


def weight_saliency(selector: Selector, module: nn.Module, parameters: Parameters, evidence: Evidence) -> ParamDict:
    """Score weights: the less, the sooner they go.

    Args:
        selector: A `WeightSelector`: see `random`, `magnitude`, `obd` and `obd_sd`; or a function. A function is called
            in evaluation mode; its results are averaged over processes, each by its samples.
        module: The module whose weights they are.
        parameters: The parameters to score, by name.
        evidence: What the selector may look at.

    Returns:
        One tensor a parameter, of its shape.

    Raises:
        TypeError: If a function does not return tensors by name.
        ValueError: If a function returns other names or shapes, or NaN; if ``selector`` does not score weights; for
            what the selectors raise.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> evidence = Evidence(list, layer, nn.Module.__call__, torch.Generator())  # magnitude looks at nothing
        >>> weight_saliency("magnitude", layer, dict(layer.named_parameters()), evidence)
        {'weight': tensor([[3., 4.]])}
        >>> weight_saliency(lambda module, batches, parameters: parameters, layer, {"weight": layer.weight}, evidence)
        {'weight': tensor([[ 3., -4.]])}
    """
    if callable(selector):
        with evaluating(module):
            found = selector(module, evidence.batches(), parameters)
        check_saliency(found, parameters)
        return _averaged({name: found[name].detach() for name in parameters}, evidence)
    if selector not in get_args(WeightSelector):
        raise ValueError(
            f"`selector` must be one of {get_args(WeightSelector)} or a function to score weights, but got"
            f" {selector!r}. Units are scored by `unit_scores`."
        )
    if selector == "random":
        return random(module, generator=evidence.generator, parameters=parameters)
    if selector == "magnitude":
        return magnitude(module, parameters=parameters)
    shared: dict[str, Any] = {"all_reduce": evidence.all_reduce, "parameters": parameters}
    if selector == "obd":
        return obd(module, evidence.batches(), logits=lambda batch: evidence.outputs(module, batch), **shared)
    return obd_sd(module, evidence.loss, evidence.batches(), statistic=evidence.statistic, **shared)


def unit_scores(
    selector: Selector, module: nn.Module, groups: Sequence[UnitGroup], evidence: Evidence, *, amount: float
) -> list[Tensor]:
    """Score units: the less, the sooner they go. Scores are to be compared within a group.

    Args:
        selector: Any `Selector`; of one that scores weights, the sum over what makes a unit counts (see `summed`).
        module: The module whose units they are.
        groups: Groups of units, for ``"merge"`` from `mergeable`.
        evidence: What the selector may look at.
        amount: The share of units that will be removed: ``"dropout-damage"`` drops as many, at least 5 % and at most
            90 %, because a unit that can be spared while all others are there may be missed when they are gone.

    Returns:
        For each group the scores ``(num_units,)``.

    Raises:
        TypeError: If a function does not return tensors by name.
        ValueError: For what `weight_saliency` and the selectors raise.

    Example:
        >>> from lightning_continual.compression.units import unit_groups
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [-4.0]])), model[0].bias.data.fill_(1.0)
        >>> evidence = Evidence(list, model, nn.Module.__call__, torch.Generator())  # magnitude looks at nothing
        >>> unit_scores("magnitude", model, unit_groups(model, torch.ones(1, 1)), evidence, amount=0.5)
        [tensor([4., 5.])]
    """
    if selector == "merge":
        return [one.scores() for one in _costs(module, groups, evidence)]
    if selector == "dropout-damage":
        return dropout_damage(
            module,
            groups,
            evidence.batches(),
            loss=evidence.loss,
            generator=evidence.generator,
            num_masks=evidence.num_masks(groups),
            keep=min(max(1 - amount, 0.1), 0.95),
            all_reduce=evidence.all_reduce,
        )
    return summed(weight_saliency(selector, module, incoming(module, groups), evidence), groups)


def eligible(
    selector: Selector, module: nn.Module, groups: Sequence[UnitGroup], weights: Iterable[str]
) -> list[UnitGroup]:
    """Return the groups of units that may be pruned.

    Args:
        selector: What is to prune: ``"merge"`` only groups that are read by layers into which units can be merged.
        module: The module whose units they are.
        groups: Groups of units.
        weights: The names of weights that may be pruned.

    Returns:
        The groups all of whose parameters are trainable, and all of whose units are made by such weights.

    Raises:
        ValueError: If there is none; the error says why.

    Example:
        >>> from lightning_continual.compression.units import unit_groups
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> groups = unit_groups(model, torch.ones(1, 1))
        >>> [group.layers for group in eligible("merge", model, groups, ["0.weight"])]
        [('0',)]
    """
    parameters, names = dict(module.named_parameters()), set(weights)
    found = [
        group
        for group in groups
        if all(parameters[one.parameter].requires_grad for one in group.parameters)
        and all(one.parameter in names for one in group.incoming if parameters[one.parameter].ndim > 1)
    ]
    objections = [not_mergeable(module, group) if selector == "merge" else None for group in found]
    results = [group for group, reason in zip(found, objections, strict=True) if reason is None]
    if not results:
        reason = next((one for one in objections if one is not None), "no hidden layer has units of its own")
        raise ValueError(
            f"Pruning units needs a layer whose units can be removed, but {reason}. Unfreeze the hidden layers, let"
            " `parameters` name their weights, or prune weights by `level='parameter'`."
        )
    return results


def prune_weights_(
    selector: Selector,
    module: nn.Module,
    parameters: Parameters,
    amount: float,
    evidence: Evidence,
    *,
    scope: Scope = "global",
    kept: Mapping[str, Tensor] | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> ParamDict:
    """Set the weights of least saliency to zero, in place, and say which are kept.

    Args:
        selector: See `weight_saliency`.
        module: The module.
        parameters: The parameters to prune, by name.
        amount: The share of weights to remove, of all of them, in [0, 1).
        evidence: What the selector may look at.
        scope: See `keep_weights`.
        kept: Which weights are left from before, by name; of parameters that are missing, all.
        held: Which weights may not go, though fewer be removed, by name; of parameters that are missing, none.

    Returns:
        One boolean tensor a parameter, true where the weight is kept.

    Raises:
        TypeError: See `weight_saliency`.
        ValueError: See `weight_saliency` and `keep_weights`; then nothing is changed.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> evidence = Evidence(list, layer, nn.Module.__call__, torch.Generator())  # magnitude looks at nothing
        >>> prune_weights_("magnitude", layer, {"weight": layer.weight}, 0.5, evidence)
        {'weight': tensor([[False,  True]])}
        >>> layer.weight.data
        tensor([[ 0., -4.]])
    """
    saliency, old, held = weight_saliency(selector, module, parameters, evidence), kept or {}, held or {}
    saliency |= {name: saliency[name].masked_fill(one, torch.inf) for name, one in held.items() if name in saliency}
    before = {name: old.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}
    left = keep_weights(saliency, amount, scope=scope, kept=before)
    for name in [name for name, keep in left.items() if name in held and bool((held[name] & ~keep).any())]:
        warnings.warn(f"`amount={amount}` would take weights that others hold: fewer are pruned.", stacklevel=2)
        left[name] |= held[name]
    with torch.no_grad():
        for name, keep in left.items():
            parameters[name].masked_fill_(~keep, 0.0)
    return left


def prune_units_(
    selector: Selector,
    module: nn.Module,
    groups: Sequence[UnitGroup],
    amount: float,
    evidence: Evidence,
    *,
    min_units: int = 1,
) -> ParamDict:
    """Set the units of least score in every group to zero, in place, and say which weights are kept.

    With ``"merge"`` what a removed unit gave goes on through the one that is most like it (see `merge_`). Units that
    are zero already count as removed.

    Args:
        selector: See `unit_scores`.
        module: The module.
        groups: Groups of units from `eligible`.
        amount: The share of units to remove of every group, in [0, 1).
        evidence: What the selector may look at.
        min_units: The number of units that a group keeps at least.

    Returns:
        For each parameter of ``groups`` a boolean tensor of its shape, true where the weight is kept.

    Raises:
        TypeError: See `unit_scores`.
        ValueError: See `unit_scores` and `keep_units`; then nothing is changed.

    Example:
        >>> from lightning_continual.compression.units import unit_groups
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [-4.0]])), model[0].bias.data.fill_(1.0)
        >>> evidence = Evidence(list, model, nn.Module.__call__, torch.Generator())  # magnitude looks at nothing
        >>> kept = prune_units_("magnitude", model, unit_groups(model, torch.ones(1, 1)), 0.5, evidence)
        >>> kept["0.bias"], model[0].bias.data
        (tensor([False,  True]), tensor([0., 1.]))
    """
    costs = _costs(module, groups, evidence) if selector == "merge" else []
    if selector == "merge":
        scores = [one.scores() for one in costs]
    else:
        scores = unit_scores(selector, module, groups, evidence, amount=amount)
    kept = keep_units(scores, amount, min_units=min_units, kept=removed_units(module, groups))
    if selector == "merge":
        for group, one, keep in zip(groups, costs, kept, strict=True):
            merge_(module, group, one, keep)
    else:
        zero_units_(module, groups, kept)
    return kept_parameters(module, groups, kept)


def _costs(module: nn.Module, groups: Sequence[UnitGroup], evidence: Evidence) -> list[MergeCosts]:
    """Return the costs of merging; processes have read the same data, and are made to agree to the last bit."""
    costs = merge_costs(module, groups, evidence.batches(), forward=evidence.outputs)
    if evidence.all_reduce is None:
        return costs
    add = evidence.all_reduce
    number = add(torch.ones((), device=next(module.parameters()).device))

    def mean(values: Tensor) -> Tensor:
        return add(values) / number.to(values.device)

    return [MergeCosts(mean(one.costs), tuple(map(mean, one.alphas)), tuple(map(mean, one.betas))) for one in costs]


def _averaged(saliency: ParamDict, evidence: Evidence) -> ParamDict:
    """Average over processes, each by its number of samples."""
    if evidence.all_reduce is None:
        return saliency
    add = evidence.all_reduce
    total = add(torch.tensor(float(evidence.num_samples), device=next(iter(saliency.values())).device))
    return {name: add(value * (evidence.num_samples / total).to(value)) for name, value in saliency.items()}
