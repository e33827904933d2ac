"""Which units there are, what is zero without them, and that looking for them leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import resnet18

from lightning_continual.compression.units import (
    UnitGroup,
    kept_parameters,
    removed_units,
    unit_groups,
    zero_units_,
)


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), activation or nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


class Residual(nn.Module):
    """Two layers are summed; a third one works between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.back(self.inner(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        return self.head(torch.cat([self.up(self.deep(x).relu()), x], 1))


def where(slices: tuple) -> dict[tuple[str, int], list[list[int]]]:
    return {(one.parameter, one.dim): one.places.tolist() for one in slices}


def rows(number: int, offset: int = 0) -> list[list[int]]:
    return [[offset + row] for row in range(number)]


def test_the_units_of_a_hidden_layer_are_its_rows_and_the_columns_behind() -> None:
    first, second = unit_groups(mlp(), torch.ones(1, 3))
    assert (first.layers, first.num_units) == (("0",), 5)
    assert where(first.incoming) == {("0.weight", 0): rows(5), ("0.bias", 0): rows(5)}
    assert where(first.outgoing) == {("2.weight", 1): rows(5)}
    assert (first.norms, first.buffers) == ((), ())
    assert (second.layers, second.num_units) == (("2",), 4)
    assert where(second.outgoing) == {("4.weight", 1): rows(4)}


@pytest.mark.parametrize(
    ("conv", "pixels", "shape"),
    [(nn.Conv1d, 4, (6,)), (nn.Conv2d, 8, (6, 4)), (nn.Conv3d, 8, (4, 4, 4))],
    ids=["1d", "2d", "3d"],
)
def test_a_channel_owns_its_columns_behind_a_flatten(conv: type, pixels: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(conv(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * pixels, 2))
    (group,) = unit_groups(model, torch.ones(2, 1, *shape))
    expected = [list(range(pixels * channel, pixels * (channel + 1))) for channel in range(3)]
    assert where(group.outgoing) == {("3.weight", 1): expected}


def test_a_batch_norm_goes_with_the_channel_and_so_do_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.PReLU(3), nn.Conv2d(3, 1, 1))
    (group,) = unit_groups(model, torch.ones(1, 1, 4, 4))
    assert where(group.incoming) == {("0.weight", 0): rows(3)}
    assert where(group.norms) == {("1.weight", 0): rows(3), ("1.bias", 0): rows(3), ("2.weight", 0): rows(3)}
    assert where(group.buffers) == {("1.running_mean", 0): rows(3), ("1.running_var", 0): rows(3)}


def test_layers_whose_outputs_are_summed_share_their_units() -> None:
    stream, inner = unit_groups(Residual(), torch.ones(1, 1, 6, 6))
    assert stream.layers == ("stem", "back")
    assert where(stream.outgoing) == {("inner.weight", 1): rows(4), ("head.weight", 1): rows(4)}
    assert (inner.layers, inner.num_units) == (("inner",), 6)


def test_behind_a_concatenation_units_lie_one_after_the_other() -> None:
    down, deep, up = unit_groups(Concatenated(), torch.ones(1, 1, 8, 8))
    assert where(down.outgoing) == {("deep.weight", 1): rows(3), ("head.weight", 1): rows(3, offset=2)}
    assert where(deep.outgoing) == {("up.weight", 0): rows(4)}
    assert where(up.incoming) == {("up.weight", 1): rows(2), ("up.bias", 0): rows(2)}
    assert where(up.outgoing) == {("head.weight", 1): rows(2)}


class Halves(nn.Module):
    """The two halves of one layer go separate ways."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.one, self.two = nn.Linear(2, 5), nn.Linear(2, 3), nn.Linear(2, 2)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.whole(x) + torch.cat([self.one(x), self.two(x)], 1)).relu())


def test_a_layer_whose_units_go_separate_ways_has_several_groups() -> None:
    one, two = unit_groups(Halves(), torch.ones(2, 2))
    assert (one.layers, two.layers) == (("whole", "one"), ("whole", "two"))
    assert where(one.incoming)["whole.weight", 0] == rows(3)
    assert where(two.incoming)["whole.weight", 0] == rows(2, offset=3)
    assert where(two.incoming)["two.weight", 0] == rows(2)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_convolution_passes_the_units_of_the_layer_before(multiplier: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4 * multiplier, 3, groups=4), nn.Conv2d(4 * multiplier, 1, 1)
    )
    (group,) = unit_groups(model, torch.ones(1, 1, 5, 5))
    own = [list(range(multiplier * unit, multiplier * (unit + 1))) for unit in range(4)]
    assert group.layers == ("0", "1")
    assert where(group.incoming) == {
        ("0.weight", 0): rows(4),
        ("0.bias", 0): rows(4),
        ("1.weight", 0): own,
        ("1.bias", 0): own,
    }
    assert where(group.outgoing) == {("2.weight", 1): own}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_units_of_a_grouped_convolution_are_its_groups(transposed: bool) -> None:
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(nn.Conv2d(1, 6, 1), conv(6, 12, 3, groups=3), nn.Conv2d(12, 1, 1))
    (group,) = unit_groups(model, torch.ones(1, 1, 5, 5))
    pairs, fours = [[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert where(group.incoming) == {
        ("0.weight", 0): pairs,
        ("0.bias", 0): pairs,
        ("1.weight", 0): pairs if transposed else fours,
        ("1.bias", 0): fours,
    }
    assert where(group.outgoing) == {("2.weight", 1): fours}


def test_a_grouped_convolution_of_one_output_a_group_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 3, 3, groups=3), nn.Conv2d(3, 1, 1))
    assert unit_groups(model, torch.ones(1, 1, 5, 5)) == []


def test_of_a_transformer_the_feed_forward_units_are_found() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    groups = unit_groups(model, torch.randn(2, 4, 3))
    assert [group.layers for group in groups] == [("1.layers.0.linear1",), ("1.layers.1.linear1",)]
    assert [group.num_units for group in groups] == [12, 12]


def test_in_a_residual_network_every_output_but_the_last_is_a_unit_once() -> None:
    model = resnet18(weights=None)
    groups = unit_groups(model, torch.randn(1, 3, 32, 32))
    owners: dict[str, list[int]] = {}
    for group in groups:
        for slices in group.incoming:
            assert slices.dim == 0
            owners.setdefault(slices.parameter, []).extend(slices.places.flatten().tolist())
    expected = {
        f"{name}.weight": list(range(layer.out_channels))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    assert {name: sorted(found) for name, found in owners.items()} == expected


class Norms(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 4), norm, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4, affine=False, track_running_stats=False),
        nn.Softmax(-1),
        Function(lambda x: x.view(-1, 4) + 0),
        Function(lambda x: x - x.mean(1, keepdim=True)),
        Function(lambda x: x.cumprod(1)),
        Function(lambda x: x.flip(1)),
        Function(lambda x: x * x.detach().argmax(1, keepdim=True)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
    ids=["layer_norm", "group_norm", "bare", "softmax", "view", "mean", "cumprod", "flip", "argmax", "parametrized"],
)
def test_units_without_which_others_would_change_are_left_alone(norm: nn.Module) -> None:
    assert unit_groups(Norms(norm), torch.randn(3, 2)) == []


def test_one_group_that_cannot_go_does_not_hold_up_the_others() -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.Softmax(1), nn.Linear(4, 3), nn.Linear(3, 1))
    assert [group.layers for group in unit_groups(model, torch.randn(3, 2))] == [("0",), ("4",)]


class Head(nn.Module):
    """The last norm of the branch is zero, as residual networks begin: what happens in it cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.back = nn.Linear(2, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.gain = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (x + self.gain * self.back(self.branch(x).softmax(1))).relu().sum(1)


def test_a_branch_that_is_silent_at_first_hides_nothing() -> None:
    assert "branch" not in {layer for group in unit_groups(Head(), torch.randn(3, 2)) for layer in group.layers}


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
        hidden = self.first(x * scale).relu()
        features = self.second(hidden).relu()
        return {"features": (features, "a word"), "logits": self.third(features)}


def test_all_that_a_module_returns_keeps_its_units() -> None:
    (group,) = unit_groups(Several(), torch.ones(1, 2))
    assert group.layers == ("first",)


@pytest.mark.parametrize(
    "inputs", [(torch.ones(1, 2), 0.5), [torch.ones(1, 2)], {"scale": 0.5, "x": torch.ones(1, 2)}], ids=type
)
def test_a_tuple_holds_arguments_and_a_dictionary_named_ones(inputs: object) -> None:
    assert len(unit_groups(Several(), inputs)) == 1


def test_forward_says_how_the_module_is_used() -> None:
    def logits(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["pixels"])["logits"]

    groups = unit_groups(Several(), {"pixels": torch.ones(1, 2)}, forward=logits)
    assert [group.layers for group in groups] == [("first",), ("second",)]


def test_what_is_excluded_keeps_its_units() -> None:
    model = mlp()
    assert [group.layers for group in unit_groups(model, torch.ones(1, 3), exclude=["0.*"])] == [("2",)]
    assert [group.layers for group in unit_groups(model, torch.ones(1, 3), exclude=["2.weight"])] == []
    assert [group.layers for group in unit_groups(model, torch.ones(1, 3), exclude=["4.weight"])] == [("0",)]


class Tied(nn.Module):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Linear(8, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x).relu(), self.two(-x).tanh()], 1))


def test_units_of_layers_that_share_a_weight_are_shared() -> None:
    (group,) = unit_groups(Tied(), torch.randn(2, 3))
    assert where(group.outgoing) == {("last.weight", 1): [[unit, 4 + unit] for unit in range(4)]}
    assert group.num_units == 4


def test_frozen_layers_have_units_too_and_gradients_need_not_be_enabled() -> None:
    model = mlp().requires_grad_(False)
    with torch.no_grad():
        assert len(unit_groups(model, torch.ones(1, 3))) == 2


def random_kept(groups: list[UnitGroup], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(group.num_units, generator=generator) < 0.5 for group in groups]
    for keep in kept:
        keep[int(torch.randint(len(keep), (), generator=generator))] = True
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Residual, Concatenated], ids=["residual", "concatenated"])
def test_zeros_are_those_of_the_definition_and_recognised(make: type[nn.Module], seed: int) -> None:
    model = make().double()
    groups = unit_groups(model, torch.randn(2, 1, 8, 8, dtype=torch.double))
    kept = random_kept(groups, seed)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            for slices in (*group.incoming, *group.norms, *group.outgoing):
                for unit, places in enumerate(slices.places.tolist()):
                    for place in places:
                        if not keep[unit]:
                            expected.get_parameter(slices.parameter).select(slices.dim, place).zero_()
    masks = kept_parameters(model, groups, kept)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero_units_(model, groups, kept)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected.get_parameter(name))
        assert torch.equal(p, before[name] * masks[name] if name in masks else before[name])
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), expected.buffers(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(removed_units(model, groups), kept, strict=True))


def test_a_unit_is_removed_only_when_nothing_of_it_is_left() -> None:
    model = mlp()
    groups = unit_groups(model, torch.ones(1, 3))
    with torch.no_grad():
        model[0].weight[1] = model[0].bias[1] = 0
    assert removed_units(model, groups)[0].all()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    assert removed_units(model, groups)[0].tolist() == [True, False, True, True, True]


def test_what_is_not_a_number_is_zero_after_removal() -> None:
    model = mlp()
    groups = unit_groups(model, torch.ones(1, 3))
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    zero_units_(model, groups, [torch.arange(5) > 0, torch.arange(4) < 9])
    assert_close(model[0].weight[0], torch.zeros(3))


def test_a_sigmoid_of_a_removed_unit_is_not_heard() -> None:
    model = mlp(nn.Sigmoid()).double()
    x = torch.randn(5, 3, dtype=torch.double)
    keep = torch.tensor([True, False, True, True, False])
    zero_units_(model, unit_groups(model, x), [keep, torch.ones(4, dtype=torch.bool)])
    hidden = torch.sigmoid(model[0](x))[:, keep]
    assert_close(model(x), model[3:](hidden @ model[2].weight[:, keep].T + model[2].bias))


def test_looking_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Dropout(), nn.BatchNorm1d(2, momentum=None))
    model[0].norm.eval()
    model[0].stem.requires_grad_(False)
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    handle = model.register_forward_hook(lambda *_: None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [one.training for one in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    randoms = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    groups = unit_groups(model, torch.randn(0).new_ones(2, 1, 6, 6))
    assert len(groups) == 2
    assert torch.equal(randoms[0], torch.get_rng_state())
    assert randoms[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert [one.training for one in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert [p.requires_grad for p in model.parameters()] == [False, False] + [True] * (len(parameters) - 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert list(model._forward_hooks) == [handle.id]
    assert not any(one._forward_hooks for one in model[0].modules())
    assert capsys.readouterr() == ("", "")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such size")


def test_a_module_that_cannot_be_called_is_named_and_left_as_it_was() -> None:
    model = Broken().train()
    with pytest.raises(ValueError, match=r"graph of Broken could not be traced: RuntimeError: no such size\. Pass"):
        unit_groups(model, torch.ones(1, 2))
    assert model.training
    assert not model.layer._forward_hooks


def test_a_module_that_runs_but_cannot_be_followed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise ZeroDivisionError("modulo by zero")

    monkeypatch.setattr("torch_pruning.dependency.index_mapping.update_index_mapping", fails)
    with pytest.raises(
        ValueError, match=r"ZeroDivisionError: modulo by zero\. The module runs, but torch-pruning cann"
    ):
        unit_groups(mlp(), torch.ones(1, 3))


def test_a_layer_that_cannot_be_followed_does_not_hold_up_the_others() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.gru = nn.Linear(2, 4), nn.GRU(4, 6, batch_first=True)
            self.behind, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.behind(self.gru(self.before(x).relu())[0][:, -1]).relu())

    assert [group.layers for group in unit_groups(Gated(), torch.randn(3, 5, 2))] == [("behind",)]


@pytest.mark.parametrize(("conv", "pixels"), [(nn.Conv1d, (4,)), (nn.Conv3d, (4, 4, 4))])
def test_circular_padding_through_which_torch_pruning_goes_without_end_is_left_alone(conv: Any, pixels: Any) -> None:
    first, padded = conv(1, 4, 2), conv(4, 6, 1, padding=1, padding_mode="circular")
    model = nn.Sequential(first, nn.ReLU(), padded, nn.ReLU(), conv(6, 5, 1), nn.ReLU(), conv(5, 2, 1))
    layers = [group.layers for group in unit_groups(model, torch.randn(2, 1, *pixels))]
    assert ("4",) in layers
    assert ("0",) not in layers


def test_outputs_without_a_gradient_are_named() -> None:
    with pytest.raises(ValueError, match=r"graph of Linear could not be traced: no output depends on a parameter"):
        unit_groups(nn.Linear(2, 3), torch.ones(1, 2), forward=lambda model, x: model(x).argmax(1))


def test_a_module_that_cannot_be_copied_is_named() -> None:
    model = mlp()
    model.cache = model(torch.ones(1, 3))  # of a gradient history
    with pytest.raises(ValueError, match=r"Sequential must be a module that `copy\.deepcopy` can copy, but got"):
        unit_groups(model, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([torch.ones(5, dtype=torch.bool)], r"`kept` must hold one bool tensor a group, but got 1 for 2 groups"),
        (
            [torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)],
            r"shape \(5,\) for the units of 0, but got torch\.bool and \(4,\)",
        ),
        ([torch.ones(5), torch.ones(4)], r"must have dtype torch\.bool .* but got torch\.float32 and \(5,\)"),
        (
            [torch.ones(5, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)],
            r"must keep a unit of every group, but got none of 2\. Keep at least one of its 4 units",
        ),
    ],
    ids=["number", "shape", "dtype", "nothing"],
)
def test_what_is_kept_must_fit(kept: list[Tensor], message: str) -> None:
    model = mlp()
    groups = unit_groups(model, torch.ones(1, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        kept_parameters(model, groups, kept)
    with pytest.raises(ValueError, match=message):
        zero_units_(model, groups, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
