"""Ownership: every weight is owned by one task or free, and each task sees its own and earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.heads import TaskHead
from lightning_continual.ownership import (
    MOST_TASKS,
    Ownership,
    blocks_of,
    holding,
    least_share,
    parts_of,
    pin_but,
    prune_,
    smallest_freed,
)
from lightning_continual.packed import Packed
from lightning_continual.report.ownership import capacity_figure, scores_figure, search_figure
from lightning_continual.search import Found, Trial


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(11, generator=generator)}


def test_tasks_see_what_a_loop_over_weights_says() -> None:
    ownership, owner = Ownership.of_nobody(weights()), {}
    for task in range(4):
        chosen = {
            name: torch.rand(w.shape, generator=torch.Generator().manual_seed(task)) < 0.3
            for name, w in weights().items()
        }
        kept = {name: one & (ownership.owners[name] == 0) for name, one in chosen.items()}
        ownership = ownership.after(task, kept)
        for name, one in kept.items():
            for place in range(one.numel()):
                if one.flatten()[place]:
                    owner[name, place] = task
    for task in range(4):
        for name, seen in ownership.seen_by(task).items():
            for place, one in enumerate(seen.flatten().tolist()):
                assert one == (owner.get((name, place), 99) <= task)
    for name, counts in ownership.counts().items():
        for task in range(4):
            assert counts[task + 1] == sum(value == task for (layer, _), value in owner.items() if layer == name)
        assert sum(counts) == weights()[name].numel()
        assert counts[0] == int(ownership.free()[name].sum())


def test_nothing_is_changed_in_place() -> None:
    before = Ownership.of_nobody({"a": torch.zeros(2)})
    before.after(0, {"a": torch.tensor([True, False])})
    assert before.owners["a"].tolist() == [0, 0]


def test_255_tasks_fit_into_a_byte() -> None:
    ownership = Ownership.of_nobody({"a": torch.zeros(300)})
    for task in range(MOST_TASKS):
        ownership = ownership.after(task, {"a": torch.arange(300) == task})
    assert ownership.owners["a"].dtype == torch.uint8
    assert int(ownership.seen_by(254)["a"].sum()) == 255
    assert int(ownership.seen_by(99)["a"].sum()) == 100
    with pytest.raises(ValueError, match=r"`task` must lie in 0\.\.254.*but got 255"):
        ownership.after(255, {"a": torch.arange(300) == 299})


def test_an_owned_weight_cannot_be_taken() -> None:
    ownership = Ownership.of_nobody({"a": torch.zeros(2)}).after(0, {"a": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="`kept` must be free weights, but some of 'a' are owned"):
        ownership.after(1, {"a": torch.tensor([True, False])})


def test_another_architecture_is_named() -> None:
    ownership = Ownership.of_nobody({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'a' must have shape \(2,\).*but has shape \(3,\)"):
        ownership.aligned_with({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'a' must have shape \(2,\).*but is not there"):
        ownership.aligned_with({"b": torch.zeros(2)})
    parts = parts_of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["*"], [])
    known = Packed(Ownership.of_nobody({"0.weight": torch.zeros(1, 1)}), {0: {}}, {0: Found((0.5,), (1,))})
    with pytest.raises(ValueError, match=r"since the first task, but \['1.weight'\] were not"):
        known.aligned_with({"0.weight": torch.zeros(1, 1), "1.weight": torch.zeros(1, 1)}, parts)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_the_smallest_weights_go(share: float) -> None:
    parameters = weights()
    trained = {
        name: torch.rand(w.shape, generator=torch.Generator().manual_seed(5)) < 0.6 for name, w in parameters.items()
    }
    kept = smallest_freed(parameters, trained, {"a": share, "b": share / 2})
    for name, of_layer in (("a", share), ("b", share / 2)):
        sizes = sorted(
            abs(float(w)) for w, t in zip(parameters[name].flatten(), trained[name].flatten(), strict=True) if t
        )
        stay = sizes[min(round(of_layer * len(sizes)), len(sizes) - 1) :]
        for w, t, k in zip(*(one[name].flatten() for one in (parameters, trained, kept)), strict=True):
            assert bool(k) == (bool(t) and abs(float(w)) >= stay[0])


def test_weights_that_training_has_left_at_zero_go_too() -> None:
    kept = smallest_freed({"a": torch.tensor([0.0, 1.0, 0.0, 2.0])}, {"a": torch.ones(4).bool()}, {"a": 0.25})
    assert kept["a"].tolist() == [False, True, False, True]


def test_a_layer_with_nothing_trained_keeps_nothing() -> None:
    kept = smallest_freed({"a": torch.ones(2)}, {"a": torch.zeros(2).bool()}, {"a": 0.5})
    assert kept["a"].tolist() == [False, False]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_its_range_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=r"`shares` must lie in \[0, 1\], but got .* for 'a'"):
        smallest_freed({"a": torch.ones(2)}, {"a": torch.ones(2).bool()}, {"a": share})


def test_a_pin_holds_what_is_not_free() -> None:
    parameters = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0]), "c": torch.tensor([5.0])}
    pin = pin_but(parameters, {"a": torch.tensor([True, False, True])}, ["b"])
    moved = {name: torch.zeros_like(one) for name, one in parameters.items()}
    pin.put_back_(moved)
    assert {name: one.tolist() for name, one in moved.items()} == {"a": [0.0, 2.0, 0.0], "b": [4.0], "c": [0.0]}
    assert not pin_but(parameters, {"a": torch.ones(3).bool()}, [])


def test_pruning_leaves_what_was_not_trained() -> None:
    weight = nn.Parameter(torch.tensor([0.1, 2.0, -0.2, 3.0]))
    kept = prune_({"a": weight}, {"a": torch.tensor([False, True, True, True])}, {"a": 0.4})
    assert kept["a"].tolist() == [False, True, False, True]
    assert_close(weight.detach(), torch.tensor([0.1, 2.0, 0.0, 3.0]))


def test_values_return_to_the_bit_after_an_exception_too() -> None:
    layer = nn.BatchNorm1d(2)
    nn.init.normal_(layer.weight)
    before = {name: one.clone() for name, one in layer.state_dict().items()}

    def fail() -> None:
        with holding(layer, {"weight": torch.ones(2), "running_var": torch.zeros(2)}):
            assert layer.weight.tolist() == [1.0, 1.0]
            assert layer.running_var.tolist() == [0.0, 0.0]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(torch.equal(one, before[name]) for name, one in layer.state_dict().items())


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_blocks_follow_each_other_and_none_is_empty(num_blocks: int) -> None:
    sizes = {"a": 1000, "b": 1, "c": 1, "d": 5, "e": 1000, "f": 2}
    blocks = blocks_of(sizes, num_blocks)
    assert len(blocks) == num_blocks
    assert all(blocks)
    assert [name for block in blocks for name in block] == list(sizes)


def test_blocks_are_of_about_as_many_weights() -> None:
    assert blocks_of(dict.fromkeys("abcdef", 10), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert blocks_of({"a": 1, "b": 1, "c": 1, "d": 100}, 2) == [["a", "b", "c"], ["d"]]


def test_more_blocks_than_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"`blocks` must lie in 1\.\.2, the number of layers, but got 3"):
        blocks_of({"a": 1, "b": 1}, 3)


def test_the_floor_lets_every_task_have_its_part() -> None:
    """However much each task keeps, within its bound, all later ones find the floor."""
    total, floor, num_tasks = 1000, 0.15, 6
    free = total
    for task in range(num_tasks):
        assert free >= floor * total
        share = least_share(free, total, floor, num_tasks - 1 - task)
        free = round(share * free)  # it keeps as much as it may
    assert free == 0
    assert least_share(5, 10, 0.2, -1) == 0.0
    assert least_share(0, 10, 0.2, 0) == 0.0


def test_a_floor_that_cannot_be_kept_is_named() -> None:
    with pytest.raises(ValueError, match=r"`floor=0.2` must leave 40 free weights for 2 tasks to come, but only 30"):
        least_share(30, 100, 0.2, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.norm = nn.Embedding(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.out, self.head = nn.Linear(4, 2), TaskHead(4, 2, num_tasks=2)


def test_parameters_are_divided() -> None:
    parts = parts_of(Model(), ["*"], ["out.*"])
    assert parts.weights == ["layer.weight"]
    assert parts.own == ["out.weight", "out.bias"]
    assert parts.rest == ["words.weight", "layer.bias", "norm.weight", "norm.bias"]
    assert parts.heads[1] == ["head.layers.1.weight", "head.layers.1.bias"]
    assert parts.of_each_task(rest=False) == parts.own
    statistics = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert parts.of_each_task(rest=True) == [*parts.own, *parts.rest, *statistics]


def test_buffers_of_the_state_are_each_tasks_own() -> None:
    model = Model()
    model.layer.register_buffer("mean", torch.zeros(4))
    model.layer.register_buffer("cache", torch.zeros(4), persistent=False)
    assert parts_of(model, ["*"], []).of_each_task(rest=False) == ["layer.mean"]


def test_statistics_of_a_norm_in_a_head_are_each_tasks_own() -> None:
    parts = parts_of(Model(), ["*"], ["norm.*"])
    statistics = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert parts.norms == parts.statistics == []
    assert parts.of_each_task(rest=False) == ["norm.weight", "norm.bias", *statistics]


def test_without_weights_to_share_it_says_so() -> None:
    with pytest.raises(ValueError, match="`parameters` must name weights that are trained and that tasks can share"):
        Packed().aligned_with({}, parts_of(nn.BatchNorm1d(2), [], []))


def test_what_has_not_changed_is_kept_once() -> None:
    packed, kept = Packed(Ownership.of_nobody({"w": torch.zeros(1)})), {"w": torch.tensor([False])}
    table, mean = torch.ones(2), torch.zeros(2)
    for task in range(3):
        packed = packed.after(task, kept, {"table": table, "mean": mean}, Found((0.5,), (1,)))
        mean += task
    assert packed.copies[0]["table"] is packed.copies[2]["table"]
    assert [packed.copies[task]["mean"].tolist() for task in range(3)] == [[0, 0], [0, 0], [1, 1]]
    other = packed.after(3, kept, {"table": table.double(), "mean": mean}, Found((0.5,), (1,)))
    assert other.copies[3]["table"].dtype == torch.float64


def test_weights_that_are_not_asked_for_are_held_as_a_whole() -> None:
    parts = parts_of(Model(), ["layer.*"], [])
    assert parts.weights == ["layer.weight"]
    assert {"out.weight", "out.bias"} <= set(parts.rest)


def test_a_packed_model_survives_its_state() -> None:
    model = Model()
    packed = Packed().aligned_with(dict(model.named_parameters()), parts_of(model, ["*"], ["out.*"]))
    kept = {"layer.weight": torch.eye(4).bool()}
    packed = packed.after(
        0, kept, {"out.bias": model.out.bias}, Found((0.75,), (16,), 0.9, 0.8, (Trial((0.75,), 0.8),))
    )
    again = Packed.from_state_dict(packed.state_dict())
    assert again.found == packed.found
    assert torch.equal(again.ownership.owners["layer.weight"], torch.eye(4, dtype=torch.uint8))
    held = model.out.bias.detach().clone()
    nn.init.zeros_(model.out.bias)
    with again.as_task(model, 0):
        assert torch.equal(model.out.bias, held)
        assert_close(model.layer.weight.detach(), model.layer.weight.detach().diag().diag())
        assert model.head.task == 0
        assert not model.training
    assert model.training
    assert again.free_share == 0.75
    assert again.held(parts_of(model, ["*"], []), rest=False) == ["head.layers.0.weight", "head.layers.0.bias"]


# --- Figures ----------------------------------------------------------------------------------------------------------


def found(**options: Any) -> Found:
    trials = Trial((0.5,), 0.90), Trial((0.7,), 0.89), Trial((0.9,), float("nan"))
    return Found(**{"shares": (0.7,), "sizes": (100,), "before": 0.9, "after": 0.89, "trials": trials, **options})


def test_the_search_is_drawn_with_its_trials_and_its_choice() -> None:
    pytest.importorskip("matplotlib")
    axes = search_figure(found(), tolerance=0.01, label="mIoU").axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert lines["trials"].tolist() == [[0.5, 0.9], [0.7, 0.89]]
    assert lines["no score"][0][0] == 0.9
    assert lines["chosen"].tolist() == [[0.7, 0.89]]
    assert lines["tolerated"][0][1] == pytest.approx(0.89)
    assert axes.get_ylabel() == "mIoU"


def test_capacity_is_drawn_by_layer_and_task() -> None:
    pytest.importorskip("matplotlib")
    ownership = Ownership.of_nobody(weights()).after(0, {name: w > 0 for name, w in weights().items()})
    axes = capacity_figure(ownership).axes[0]
    heights = [round(bar.get_height(), 6) for bar in axes.patches]
    shares = [100 * int((w > 0).sum()) / w.numel() for w in weights().values()]
    both = 100 * sum(int((w > 0).sum()) for w in weights().values()) / 46
    assert heights == [round(one, 6) for one in (*shares, both, *(100 - one for one in (*shares, both)))]


def test_scores_are_drawn_before_and_after() -> None:
    pytest.importorskip("matplotlib")
    axes = scores_figure({0: found(), 3: found(after=0.5)}).axes[0]
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [0.9, 0.9, 0.89, 0.5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "3"]


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="`found` must have trials, but has none"):
        search_figure(found(trials=()))
    with pytest.raises(ValueError, match="`ownership` must have weights, but has none"):
        capacity_figure(Ownership())
    with pytest.raises(ValueError, match="`found` must have scores, but has none"):
        scores_figure({0: found(after=None)})
