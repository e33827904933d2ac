"""Activities, thresholds, what is kept and drawn anew, statistics that are held, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.capacity import (
    HeldStatistics,
    Learnt,
    UnitCounts,
    active_units,
    activity_read,
    add_l1_gradient_,
    cut,
    cut_,
    find_wiring,
    graceful_threshold,
    hold_statistics,
    l1_strengths,
    only_outputs,
    pin_of,
    relative_activity,
    reset_free_,
    units_table,
)
from lightning_continual.heads import TaskHead
from lightning_continual.report import units_figure


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh()
    model = nn.Sequential(*body, nn.Linear(4, 2)).double()
    model[1].running_mean.normal_()
    return model


# --- Activity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(9,), (2, 3, 4)], ids=str)
def test_activities_are_those_of_a_loop_over_samples_and_positions_however_batched(sizes: tuple[int, ...]) -> None:
    model = network()
    x = torch.randn(9, 1, 4, 4).double()
    wiring = find_wiring(model, x[:2])
    found = activity_read(model, wiring, x.split(list(sizes)))
    model.eval().requires_grad_(False)
    expected = torch.zeros(wiring.num_units, dtype=torch.float64)
    for sample in x:
        maps = model[:3](sample[None])[0]
        for channel in range(3):
            expected[channel] += sum(abs(float(value)) for value in maps[channel].flatten()) / maps[channel].numel() / 9
        for unit, value in enumerate(model[:6](sample[None])[0]):
            expected[3 + unit] += abs(float(value)) / 9
    assert_close(found, expected)


def test_a_unit_is_as_active_as_the_layer_that_reads_most_of_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.head((self.b(h.relu()) + self.c((-h).relu())).relu())

    model, x = Two().double(), torch.randn(7, 2).double()
    wiring = find_wiring(model, x)
    h = model.a(x)
    expected = torch.maximum(h.relu().mean(0), (-h).relu().mean(0))
    assert_close(activity_read(model, wiring, [x])[:3], expected.detach())


def test_shards_of_the_data_sum_to_all_of_it() -> None:
    model, x = network(), torch.randn(8, 1, 4, 4).double()
    wiring = find_wiring(model, x[:2])
    shares: list[Tensor] = []
    activity_read(model, wiring, [x[:3]], all_reduce=lambda value: (shares.append(value.clone()), value)[1])
    others = iter(shares)
    found = activity_read(model, wiring, [x[3:]], all_reduce=lambda value: value + next(others))
    assert_close(found, activity_read(model, wiring, [x]))


def test_activities_must_be_of_something_and_finite() -> None:
    model, x = network(), torch.randn(2, 1, 4, 4).double()
    wiring = find_wiring(model, x)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, but it is empty"):
        activity_read(model, wiring, [])
    with pytest.raises(ValueError, match=r"What '4\.weight' reads must be finite"):
        activity_read(model, wiring, [x * torch.nan])


def test_thresholds_do_not_depend_on_the_scale_of_a_layer() -> None:
    wiring = find_wiring(nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2), nn.Linear(2, 1)), torch.ones(1, 1))
    activity = torch.tensor([1.0, 2.0, 0.0, 5.0, 1.0, 0.0])
    scaled = activity * torch.tensor([10.0, 10, 10, 0.1, 0.1, 1])
    for common in (0.0, 0.5, 0.7, 1.0):
        assert torch.equal(active_units(wiring, activity, {}, common), active_units(wiring, scaled, {}, common))
    assert active_units(wiring, activity, {}, 0.7).tolist() == [False, True, False, True, False, False]
    assert active_units(wiring, activity, {"0": 1.0}, 0.0).tolist() == [False, True, False, True, True, False]
    assert_close(relative_activity(wiring, activity), torch.tensor([2 / 3, 4 / 3, 0.0, 5 / 3, 1 / 3, 0.0]))


# --- Graceful forgetting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.2, 0.5])
@pytest.mark.parametrize("passes", [2, 3, 4, 8, 20])
@pytest.mark.parametrize("with_share", [False, True])
def test_what_is_found_holds_and_costs_its_passes(tolerance: float, passes: int, with_share: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(200, generator=generator).double()
    asked = []

    def score(threshold: float | None, of_share: bool) -> float:
        asked.append(of_share)
        return 0.9 if threshold is None else 0.9 - (values <= threshold).double().mean().item() ** 2

    found = graceful_threshold(values, score, tolerance=tolerance, passes=passes, with_share=with_share)
    assert asked.count(False) + asked.count(True) / 8 <= passes
    assert not with_share or passes == 2 or asked.count(True) <= 7
    assert found["threshold"] == 0 or found["before"] - found["after"] <= tolerance
    if passes == 20 and not with_share:  # enough for all: the largest
        cuts = [(values <= value).double().mean().item() for value in values]
        best = max(
            (value for value, share in zip(values.tolist(), cuts, strict=True) if share**2 <= tolerance), default=0
        )
        assert found["threshold"] == best


def test_a_larger_tolerance_never_finds_less() -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(1)).double()

    def score(threshold: float | None, of_share: bool) -> float:
        return 1.0 if threshold is None else 1.0 - (values <= threshold).double().mean().item()

    found = [graceful_threshold(values, score, tolerance=one / 50)["threshold"] for one in range(40)]
    assert found == sorted(found)
    assert found[-1] > found[10] > found[2] > 0
    for one, threshold in enumerate(found):  # on a share half of it may be lost
        assert (values <= threshold).double().mean().item() <= one / 100


def test_of_a_loss_more_is_worse() -> None:
    values = torch.arange(1.0, 11.0)

    def loss(threshold: float | None, of_share: bool) -> float:
        return 1.0 + (threshold or 0.0)

    found = graceful_threshold(values, loss, tolerance=4.5, passes=9, with_share=False, higher_is_better=False)
    assert found == {"before": 1.0, "after": 5.0, "threshold": 4.0}


def test_where_the_share_deceives_smaller_thresholds_are_checked() -> None:
    values = torch.arange(1.0, 101.0)

    def score(threshold: float | None, of_share: bool) -> float:
        return float(of_share or (threshold or 0.0) <= 30)

    assert graceful_threshold(values, score, tolerance=0.1, passes=3)["threshold"] == 0
    assert graceful_threshold(values, score, tolerance=0.1, passes=12)["threshold"] == 30
    assert graceful_threshold(values, lambda *_: float("nan"), tolerance=0.1, passes=9)["threshold"] == 0


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_a_cut_for_a_while_leaves_the_weights_to_the_bit() -> None:
    model = network()
    wiring, parameters = find_wiring(model, torch.randn(2, 1, 4, 4).double()), dict(model.named_parameters())
    before = {name: one.detach().clone() for name, one in parameters.items()}
    active = torch.tensor([True, False, True, False, True, True, False, True, False])
    with pytest.raises(KeyError), cut(wiring, parameters, active):  # noqa: PT012
        assert bool((parameters["4.weight"][1, 4:8] == 0).all())
        assert bool((parameters["4.weight"][0] != 0).all())
        assert bool((parameters["6.weight"][0, [0, 3]] == 0).all())
        raise KeyError
    assert all(torch.equal(one, before[name]) for name, one in parameters.items())
    pin = pin_of(wiring, parameters, active)
    assert pin.num_pinned() == sum([2 * 9 + 2, 2 * 2, 2 * 12 + 2, 4 + 1])


def test_weights_of_free_units_are_drawn_anew_and_nothing_else() -> None:
    model = network()
    model[4].bias.requires_grad_(False)
    wiring = find_wiring(model, torch.randn(2, 1, 4, 4).double())
    active = torch.tensor([True, False, True, False, True, True, False, True, False])
    cut_(wiring, dict(model.named_parameters()), active)
    before, state = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    reset_free_(model, wiring, active, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    for name, places in wiring.rows.items():
        rows = active[places.units]
        assert torch.equal(after[name][rows], before[name][rows]), name
        if name.endswith("weight") and name != "1.weight":
            assert not (after[name][~rows] == before[name][~rows]).any(), name
    assert torch.equal(after["4.bias"], before["4.bias"])
    assert after["1.running_mean"][1] == 0
    again = network()
    cut_(wiring, dict(again.named_parameters()), active)
    reset_free_(again, wiring, active, seed=3)
    assert torch.equal(again[0].weight, model[0].weight)


def test_l1_is_of_weights_and_norms_and_leaves_what_has_no_gradient() -> None:
    model = network()
    wiring = find_wiring(model, torch.randn(2, 1, 4, 4).double())
    strengths = l1_strengths(model, wiring, {"0": 1.0, "1": 2.0, "6": 3.0})
    assert strengths == {"0.weight": 1.0, "1.weight": 2.0, "1.bias": 2.0, "6.weight": 3.0}
    parameters = dict(model.named_parameters())
    parameters["0.weight"].grad = torch.ones_like(parameters["0.weight"])
    add_l1_gradient_(parameters, strengths, scale=4.0)
    assert_close(parameters["0.weight"].grad, 1 + 4.0 * parameters["0.weight"].detach().sign())
    assert parameters["6.weight"].grad is None


# --- Batch norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_active_channels_are_normalised_as_in_evaluation_and_the_others_as_in_training(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, free = nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    for one in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
        one.uniform_(0.5, 2.0)
    free.load_state_dict(layer.state_dict())
    x, active = torch.randn(5, 4, 3, 3).double(), torch.tensor([True, False, True, False])
    expected = torch.where(active[:, None, None], layer.eval()(x), free(x))
    statistics = torch.where(active, layer.running_mean, free.running_mean)
    layer.train()
    if dtype != torch.float64:
        layer, x = layer.to(dtype), x.to(dtype)
    end = HeldStatistics(layer, active).begin()
    given = layer(x)
    assert given.dtype == dtype
    tolerances = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    assert_close(given, expected.to(dtype), **tolerances)
    assert_close(layer.running_mean, statistics.to(dtype), **tolerances)
    end()


def test_free_channels_have_the_gradient_of_a_batch_norm_and_two_uses_are_no_trouble() -> None:
    torch.manual_seed(0)
    layer, bare = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    x = torch.randn(6, 3).double()
    active = torch.tensor([False, True, False])
    HeldStatistics(layer, active).begin()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for one, given in zip((layer, bare), inputs, strict=True):
        one(one(given)).square().sum().backward()
    assert_close(inputs[0].grad[:, ~active], inputs[1].grad[:, ~active])
    assert bool((inputs[0].grad[:, active] == 0).all())
    assert layer.running_mean[1] == 0
    assert layer.running_var[1] == 1


def test_statistics_are_held_only_where_channels_are_active_and_not_in_evaluation() -> None:
    model = network()
    wiring = find_wiring(model, torch.randn(2, 1, 4, 4).double())
    nothing = torch.zeros(wiring.num_units, dtype=torch.bool)
    assert hold_statistics(model, wiring, nothing) == []
    nothing[0] = True
    (end,) = hold_statistics(model, wiring, nothing)
    x = torch.randn(4, 1, 4, 4).double()
    model.eval()
    held = model(x)
    end()
    assert torch.equal(model(x), held)
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("affine", [True, False], ids="affine={}".format)
def test_a_batch_norm_is_what_it_was_after_each_call_whether_it_raises_or_not(affine: bool) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3, affine=affine).double()
    own, x = layer.weight, torch.randn(5, 3).double()
    names = [name for name, _ in layer.named_parameters()]
    expected = x.clone()  # mean 0 and variance 1, but for ε
    end = HeldStatistics(layer, torch.tensor([True, True, False])).begin()
    for _ in range(2):
        assert_close(layer(input=x)[:, :2], expected[:, :2] / (1 + layer.eps) ** 0.5)
        assert layer.weight is own
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            layer(x[0])
        assert layer.weight is own
        assert [name for name, _ in layer.named_parameters()] == names
    end()
    assert not layer._forward_hooks
    assert_close(layer(x).mean(0), torch.zeros(3).double())


def test_activities_are_of_what_layers_are_given_by_name_too() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](input=self[0](input=x).relu())

    torch.manual_seed(0)
    model, x = Named(nn.Linear(2, 3), nn.Linear(3, 1)), torch.randn(6, 2)
    found = activity_read(model, find_wiring(model, x), [x])
    assert_close(found[:3], model[0](x).relu().mean(0).double().detach())


# --- What is known ----------------------------------------------------------------------------------------------------


def test_only_some_outputs_of_a_convolution_stay_and_the_layer_comes_back() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 3, 1))
    own = model[1]
    with pytest.raises(KeyError), only_outputs(model, "1", [2]):  # noqa: PT012
        assert model(torch.ones(1, 1, 2, 2)).isinf().all(dim=(0, 2, 3)).tolist() == [True, True, False]
        raise KeyError
    assert model[1] is own


def test_what_is_known_comes_back_from_its_state() -> None:
    model = nn.Sequential(nn.Linear(2, 3), TaskHead(3, 2, num_tasks=2))
    wiring = find_wiring(model, torch.randn(1, 2))
    reached = torch.tensor([True, False, True, False, False, True, True])
    learnt = Learnt().aligned_with(wiring).after(1, wiring, reached, [5, 6], {"threshold": 0.5})
    again = Learnt.from_state_dict(learnt.state_dict())
    assert torch.equal(again.units, learnt.units)
    assert (again.outputs, again.counts, again.searches) == ({1: [2, 3]}, learnt.counts, {1: {"threshold": 0.5}})
    assert learnt.counts == [UnitCounts(1, "0", free=1, new=2, reused=0, idle=0)]
    after = learnt.after(2, wiring, torch.tensor([False, True, True, True, True, False, False]), [3, 4])
    assert after.counts[1] == UnitCounts(2, "0", free=0, new=1, reused=1, idle=1)
    assert (after.free_units(), after.reused_units()) == ({"0": 0}, {"0": [0, 1]})
    assert learnt.units.sum() == 4  # as it was


def test_counts_are_drawn_in_percent_of_the_layer_and_tabled() -> None:
    pytest.importorskip("matplotlib")
    counts = [UnitCounts(task, layer, free=2, new=1, reused=4, idle=1) for task in range(2) for layer in ("a", "bb")]
    axes = units_figure(counts, title="units").axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [50.0] * 4 + [12.5] * 8 + [25.0] * 4
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "bb"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["free", "new", "idle", "reused"]
    assert [line.split() for line in units_table(counts).splitlines()][2] == ["0", "bb", "8", "1", "4", "1", "2"]
    with pytest.raises(ValueError, match="`counts` must hold the counts of a task at least, but is empty"):
        units_figure([])
