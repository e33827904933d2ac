"""How many weights and units go, which ones, and in how many rounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_continual.compression.ranking import amounts, keep_units, keep_weights

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 3, 2, 2), "d": (1, 1)}


def saliency_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if kind == "ties":
        made = {name: (value * 2).round() for name, value in made.items()}
    elif kind == "zeros":
        made = {name: torch.zeros_like(value) for name, value in made.items()}
    elif kind == "mixed":
        made["b"], made["c"] = made["b"].double(), made["c"].to(torch.bfloat16)
    elif kind == "channels_last":
        made["c"] = made["c"].to(memory_format=torch.channels_last)
    return made


KINDS = ["distinct", "ties", "mixed", "channels_last"]


def by_sorting(saliency: dict[str, Tensor], number: int, kept: dict[str, Tensor] | None) -> set[tuple[str, int]]:
    """The definition: of all places in order, those that are gone, then the lowest that are left."""
    places = [(name, place) for name, value in saliency.items() for place in range(value.numel())]
    gone = {(name, place) for name, place in places if kept and not kept[name].flatten()[place]}
    left = sorted((one for one in places if one not in gone), key=lambda one: float(saliency[one[0]].flatten()[one[1]]))
    return gone | set(left[: max(number - len(gone), 0)])


def removed(kept: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, place) for name, mask in kept.items() for place in (~mask).flatten().nonzero().flatten().tolist()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amount", [0.0, 0.01, 0.1, 0.25, 0.5, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_lowest_go_and_the_first_among_equals(kind: str, amount: float, seed: int) -> None:
    saliency = saliency_of(kind, seed)
    saliency["d"][:] = 9.0
    found = keep_weights(saliency, amount)
    assert removed(found) == by_sorting(saliency, round(amount * 47), None)
    assert all(mask.dtype == torch.bool and mask.shape == saliency[name].shape for name, mask in found.items())


@pytest.mark.parametrize("kind", [*KINDS, "zeros"])
@pytest.mark.parametrize("amount", [0.1, 0.4, 0.75])
def test_by_layer_each_parameter_loses_its_share(kind: str, amount: float) -> None:
    saliency = {name: value for name, value in saliency_of(kind).items() if name != "d"}
    for name, mask in keep_weights(saliency, amount, scope="layer").items():
        assert removed({name: mask}) == by_sorting({name: saliency[name]}, round(amount * mask.numel()), None)


@pytest.mark.parametrize("amount", [0.0, 0.001, 1 / 3, 0.49, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("values", [1, 3, 10**6], ids="values={}".format)
def test_amounts_are_exact_to_one_weight(amount: float, values: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (*range(4, 60), 1000, 1001, 4097, 16385):
        first, second = torch.randint(values, (size,), generator=generator).float().split([size // 3, size - size // 3])
        first[0] = second[-1] = torch.inf  # so that neither is pruned to nothing
        number = round(amount * size)
        if number <= size - 2:
            assert len(removed(keep_weights({"a": first, "b": second}, amount))) == number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0.0, 0.2, 0.5, 0.7])
def test_what_is_gone_counts_and_stays_gone(kind: str, scope: str, amount: float) -> None:
    saliency = {name: value for name, value in saliency_of(kind).items() if name != "d"}
    saliency["b"][:2] = 99.0  # however much they seem to matter now
    kept = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in saliency.items()}
    kept["b"][:2] = False
    kept["c"][0] = False
    before = {name: mask.clone() for name, mask in kept.items()}
    found = keep_weights(saliency, amount, scope=scope, kept=kept)
    if scope == "global":
        assert removed(found) == by_sorting(saliency, round(amount * 46), kept)
    for name, mask in found.items():
        assert not (mask & ~kept[name]).any()
        assert torch.equal(kept[name], before[name])
        if scope == "layer":
            number = round(amount * mask.numel())
            assert removed({name: mask}) == by_sorting({name: saliency[name]}, number, {name: kept[name]})


def test_pruning_in_rounds_ends_where_one_shot_does() -> None:
    saliency = {"a": torch.randn(40, 30).abs(), "b": torch.randn(20, 40).abs()}
    kept = None
    for amount in amounts(0.9, 5):
        kept = keep_weights(saliency, amount, kept=kept)
    once = keep_weights(saliency, 0.9)
    assert all(torch.equal(mask, once[name]) for name, mask in (kept or {}).items())


def test_infinity_keeps_and_zeros_have_no_sign() -> None:
    saliency = {"w": torch.tensor([torch.inf, 0.0, -0.0, -torch.inf, 1.0, 0.0])}
    assert keep_weights(saliency, 0.5)["w"].tolist() == [True, False, False, False, True, True]


def test_numbers_of_several_types_are_ranked_in_the_finest() -> None:
    fine = torch.tensor([1 + 1e-12, 1.0, 1 + 1e-13], dtype=torch.double)
    found = keep_weights({"a": fine, "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, 0.6)
    assert found["a"].tolist() == [True, False, False]
    assert found["b"].tolist() == [False, True]


@pytest.mark.slow
def test_more_weights_are_ranked_than_a_quantile_takes() -> None:
    saliency = {"a": torch.rand(5000, 3000), "b": torch.rand(4000, 1000)}
    found = keep_weights(saliency, 0.9)
    assert sum(int((~mask).sum()) for mask in found.values()) == round(0.9 * 19_000_000)
    assert max(saliency[name][~mask].max() for name, mask in found.items()) <= min(
        saliency[name][mask].min() for name, mask in found.items()
    )


@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.2, float("nan")])
def test_an_amount_is_a_share(amount: float) -> None:
    message = rf"`amount` must lie in \[0, 1\), but got {amount}\. Pass the share of weights or units"
    with pytest.raises(ValueError, match=message):
        keep_weights({"w": torch.ones(2)}, amount)
    with pytest.raises(ValueError, match=message):
        keep_units([torch.ones(2)], amount)
    with pytest.raises(ValueError, match=message):
        amounts(amount, 1)


def test_saliency_that_cannot_be_ranked_is_refused() -> None:
    good = {"a": torch.ones(3), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="`saliency` must not be NaN, but that of 'b' is"):
        keep_weights({**good, "b": torch.tensor([1.0, torch.nan])}, 0.5)
    with pytest.raises(ValueError, match="`saliency` must hold at least one parameter, but it is empty"):
        keep_weights({}, 0.5)
    with pytest.raises(ValueError, match="`scope` must be 'global' or 'layer', but got 'local'"):
        keep_weights(good, 0.5, scope="local")
    for kept in ({"a": torch.ones(3)}, {**good, "b": torch.ones(3)}, {**good, "c": torch.ones(3)}):
        with pytest.raises(
            ValueError, match=r"`kept` must have the names and shapes of `saliency`, but differs in '[bc]'"
        ):
            keep_weights(good, 0.5, kept=kept)


def test_a_layer_is_not_pruned_to_nothing() -> None:
    saliency = {"a": torch.ones(8), "b": torch.zeros(2)}
    assert keep_weights(saliency, 0.1)["b"].tolist() == [False, True]
    with pytest.raises(
        ValueError, match=r"'b' would lose all of its 2: pruning a layer to nothing .* or pass `scope='la"
    ):
        keep_weights(saliency, 0.2)
    with pytest.raises(ValueError, match=r"Its saliency is 0 throughout.* name only the others by `parameters`\.$"):
        keep_weights(saliency, 0.2)
    with pytest.raises(ValueError, match=r"takes the same share of every parameter\.$"):
        keep_weights({"a": torch.ones(8), "b": torch.full((2,), 0.5)}, 0.2)
    keep_weights(saliency, 0.2, scope="layer")
    with pytest.raises(ValueError, match=r"'b' would lose all of its 2: .* cuts the network\. Lower `amount`\.$"):
        keep_weights(saliency, 0.8, scope="layer")
    assert keep_weights({**saliency, "none": torch.zeros(0, 3)}, 0.1)["none"].shape == (0, 3)


def lowest(score: Tensor, number: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda unit: float(score[unit]))[:number])


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("min_units", [1, 3])
def test_in_each_group_the_lowest_units_go_and_some_stay(amount: float, min_units: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(6, (size,), generator=generator).double() for size in (1, 2, 4, 30, 101)]
    for score, mask in zip(scores, keep_units(scores, amount, min_units=min_units), strict=True):
        number = max(min(round(amount * len(score)), len(score) - min_units), 0)
        assert (~mask).nonzero().flatten().tolist() == lowest(score, number)


def test_units_that_are_gone_count_and_stay_gone() -> None:
    score = torch.tensor([9.0, 1.0, 2.0, 3.0, torch.inf, 5.0])
    kept = torch.tensor([False, True, True, True, True, True])
    assert keep_units([score], 0.5, kept=[kept])[0].tolist() == [False, False, False, True, True, True]
    assert keep_units([score], 0.1, kept=[kept])[0].tolist() == kept.tolist()
    assert keep_units([score], 0.9, min_units=4, kept=[kept])[0].tolist() == [False, False, True, True, True, True]
    only = torch.tensor([True, False, False, False, False, False])
    assert keep_units([score], 0.9, min_units=4, kept=[only])[0].tolist() == only.tolist()
    assert kept.tolist() == [False, True, True, True, True, True]


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    good = [torch.ones(3), torch.ones(2)]
    with pytest.raises(ValueError, match="`min_units` must be at least 1, but got 0"):
        keep_units(good, 0.5, min_units=0)
    with pytest.raises(ValueError, match="`scores` must hold at least one group of units, but it is empty"):
        keep_units([], 0.5)
    with pytest.raises(ValueError, match=r"one number a unit, .* but group 1 has NaN"):
        keep_units([good[0], torch.tensor([1.0, torch.nan])], 0.5)
    with pytest.raises(ValueError, match=r"but group 1 has shape \(2, 1\)"):
        keep_units([good[0], torch.ones(2, 1)], 0.5)
    with pytest.raises(ValueError, match="one tensor a group, 2 of them, but has 1"):
        keep_units(good, 0.5, kept=[torch.ones(3)])
    with pytest.raises(ValueError, match=r"of the 2 units of group 1 .* but has shape \(3,\)"):
        keep_units(good, 0.5, kept=[torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match=r"of the 2 units of group 1 .* but has no unit left"):
        keep_units(good, 0.5, kept=[torch.ones(3), torch.zeros(2)])


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.9, 0.98])
def test_geometric_rounds_take_the_same_share_of_what_is_left(amount: float, rounds: int) -> None:
    found = [0.0, *amounts(amount, rounds)]
    shares = [(1 - after) / (1 - before) for before, after in pairwise(found)]
    assert_close(shares, [(1 - amount) ** (1 / rounds)] * rounds)
    assert found[-1] == amount
    assert len(found) == rounds + 1


def test_cubic_rounds_take_much_at_first_and_little_at_the_end() -> None:
    assert_close(amounts(0.8, 4, schedule="cubic"), [0.8 * (1 - 27 / 64), 0.8 * (1 - 8 / 64), 0.8 * (1 - 1 / 64), 0.8])
    assert amounts(0.7, 1, schedule="cubic") == [0.7]
    assert amounts(0.7, 1, schedule="one-shot") == [0.7]


def test_schedules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="`rounds` must be at least 1, but got 0"):
        amounts(0.5, 0)
    with pytest.raises(ValueError, match="`schedule` must be 'geometric', 'cubic' or 'one-shot', but got 'linear'"):
        amounts(0.5, 2, schedule="linear")
    with pytest.raises(ValueError, match="`rounds` must be 1 with `schedule='one-shot'`, but got 3"):
        amounts(0.5, 3, schedule="one-shot")
