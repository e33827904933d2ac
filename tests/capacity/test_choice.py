"""Which units a task keeps: what they pass on, their even share, and the search among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.capacity import (
    Choice,
    Learnt,
    Wiring,
    cut_weights,
    find_wiring,
    graceful_choice,
    influence,
    pin_of_cut,
    what_went_wrong,
)
from lightning_continual.heads import TaskHead


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU()
    return nn.Sequential(*body, TaskHead(4, 2, num_tasks=2)).double()


def choice_of(sizes: list[int], measure: Tensor, before: Tensor, **options: int) -> Choice:
    layers, start = {}, 0
    for place, size in enumerate(sizes):
        layers[str(place)] = range(start, start + size)
        start += size
    wiring = Wiring(layers, {"out": range(start, start + 1)}, {}, {})
    always = torch.zeros(start + 1, dtype=torch.bool)
    always[-1] = True
    return Choice(wiring, measure, {}, before, always, **options)


def test_what_a_unit_passes_on_is_found_by_a_loop_over_the_weights_that_read_it() -> None:
    model = network()
    wiring = find_wiring(model, torch.randn(2, 1, 4, 4).double())
    activity = torch.rand(wiring.num_units).double()
    weights = {name: one.detach() for name, one in model.named_parameters()}
    found = influence(wiring, weights, activity, wiring.outputs_of(1))
    expected = torch.zeros_like(activity)
    for channel in range(3):  # of four positions each, behind the flatten
        squares = [float(weights["3.weight"][row, channel * 4 + at]) ** 2 for row in range(4) for at in range(4)]
        expected[channel] = float(activity[channel]) * sum(squares) ** 0.5
    for unit in range(4):  # read by the head of task 1, and not by that of task 0
        squares = [float(weights["5.layers.1.weight"][row, unit]) ** 2 for row in range(2)]
        expected[3 + unit] = float(activity[3 + unit]) * sum(squares) ** 0.5
    assert_close(found, expected)


def test_a_unit_that_nobody_makes_use_of_has_no_influence_however_active() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0.0
    wiring, activity = find_wiring(model, torch.ones(1, 1)), torch.tensor([1.0, 100.0, 1.0, 0.0, 0.0])
    found = influence(wiring, dict(model.named_parameters()), activity, torch.tensor([3, 4]))
    assert found[1] == 0
    assert bool((found[[0, 2]] > 0).all())


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])
def test_tasks_that_would_take_all_units_get_even_shares_until_none_is_left(num_tasks: int) -> None:
    sizes = [12, 30]
    before = torch.zeros(sum(sizes) + 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for task in range(num_tasks):
        measure = torch.rand(len(before), generator=generator) + 0.1
        choice = choice_of(sizes, measure, before, num_tasks=num_tasks - task)
        kept = choice.kept()
        new = kept & ~before
        assert bool(kept[before].all())  # what is reused costs nothing
        for units in choice.wiring.layers.values():
            place = slice(units.start, units.stop)
            free = ~before[place]
            threshold = measure[place][new[place]].min()
            assert bool((measure[place][free & ~new[place]] < threshold).all())  # the largest ones
        taken.append([int(new[units.start : units.stop].sum()) for units in choice.wiring.layers.values()])
        before = before | kept
    assert bool(before.all())
    for layer, size in enumerate(sizes):
        shares = [one[layer] for one in taken]
        assert sum(shares) == size
        assert max(shares) - min(shares) <= 1


def test_where_less_is_reached_than_its_share_a_task_keeps_that_and_leaves_the_rest() -> None:
    measure = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0, 0.0, 0.0])
    before = torch.tensor([False, True, False, False, False, False, False])
    choice = choice_of([6], measure, before, num_tasks=2)  # five are free: at most two
    assert choice.kept().nonzero().flatten().tolist() == [1, 2, 3, 6]
    assert not choice.is_short()
    assert choice_of([6], measure, before, num_tasks=5).kept().nonzero().flatten().tolist() == [1, 3, 6]
    assert choice_of([6], measure, before, num_tasks=5).is_short()
    assert choice_of([6], measure, before, num_tasks=90).kept().nonzero().flatten().tolist() == [1, 3, 6]
    assert choice_of([6], measure, before).kept().nonzero().flatten().tolist() == [1, 2, 3, 6]


def test_units_that_cannot_be_trained_count_for_no_share() -> None:
    measure, nothing = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]), torch.zeros(5, dtype=torch.bool)
    wiring = Wiring({"0": range(4)}, {"out": range(4, 5)}, {}, {})
    always = torch.tensor([False, False, False, True, True])
    kept = Choice(wiring, measure, {}, nothing, always, num_tasks=3).kept()
    assert kept.tolist() == [False, False, True, True, True]


def test_the_search_tries_free_units_alone_of_layers_without_threshold_and_leaves_the_weights() -> None:
    model = network()
    wiring, weights = find_wiring(model, torch.randn(2, 1, 4, 4).double()), dict(model.named_parameters())
    saved = {name: one.detach().clone() for name, one in weights.items()}
    before = torch.zeros(wiring.num_units, dtype=torch.bool)
    before[3] = True
    measure = torch.arange(1.0, wiring.num_units + 1)
    choice = Choice(wiring, measure, {"0": 0.5}, before, torch.zeros_like(before))
    assert_close(choice.relative(), measure[4:7] / measure[3:7].mean())
    seen = []

    def score(of_share: bool) -> float:
        seen.append(int((weights["3.weight"] == 0).all(1).sum()))
        return 1.0

    found = graceful_choice(choice, weights, score, tolerance=0.0, passes=9, with_share=False)
    assert found == {"before": 1.0, "after": 1.0, "threshold": float(choice.relative().max())}
    assert seen[0] == 0
    assert all(torch.equal(one, saved[name]) for name, one in weights.items())


def test_what_is_cut_is_pinned_at_zero_and_nothing_else() -> None:
    model = network()
    wiring, weights = find_wiring(model, torch.randn(2, 1, 4, 4).double()), dict(model.named_parameters())
    active = torch.rand(wiring.num_units, generator=torch.Generator().manual_seed(2)) > 0.5
    pin, places = pin_of_cut(wiring, weights, active), cut_weights(wiring, weights, active)
    assert pin.num_pinned() == sum(int(one.sum()) for one in places.values()) > 0
    assert all(torch.equal(one, places[name]) for name, one in pin.pinned.items())
    assert not any(bool(value.any()) for value in pin.values.values())


@pytest.mark.parametrize("higher", [True, False])
def test_a_loss_above_the_tolerance_is_told_and_one_within_is_not(higher: bool) -> None:
    sign = 1.0 if higher else -1.0
    search = {"before": 0.0, "after": -0.02 * sign, "threshold": 1.0}
    assert what_went_wrong(search, 1, 0.03, higher) == ""
    assert "lost more than `tolerance=0.01` at the end of task 1: the score was 0 before the cut, and is" in (
        what_went_wrong(search, 1, 0.01, higher, retrained=True)
    )
    nothing = {"before": 0.9, "threshold": 0.0}
    assert what_went_wrong(nothing, 1, 0.01, higher).startswith("found no threshold for task 1 that costs at most")
    assert what_went_wrong(nothing, 1, 0.01, higher, retrained=True) == ""


def test_a_task_beyond_those_that_units_are_to_last_for_is_refused() -> None:
    model = network()
    wiring = find_wiring(model, torch.randn(2, 1, 4, 4).double())
    learnt = Learnt().aligned_with(wiring)
    learnt.require_free(wiring.outputs_of(1), 1, 2)
    with pytest.raises(
        ValueError, match=r"`num_tasks` must be at least 2, for task 1 is to be learnt, but got 1\. Pass"
    ):
        learnt.require_free(wiring.outputs_of(1), 1, 1)
