"""Arms of weights: which weights are whose, what rests, and what is credited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_continual.selection.weight_arms import WeightArms, dealer, layer_arms, pattern_arms, unit_arms


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.ConvTranspose2d(4, 5, 2),
        nn.LayerNorm([2, 2]),
        nn.Flatten(),
        nn.Linear(20, 2),
    )


def played(arms: WeightArms, *names: str) -> torch.Tensor:
    return torch.tensor([name in names for name in arms.names])


def test_layers_are_arms_with_their_norms_and_the_last_is_the_head(model: nn.Module) -> None:
    arms = layer_arms(model)
    assert arms.names == ("0", "2", "4")
    assert arms.sizes.tolist() == [2 * 3 * 9 + 3 + 6, 3 * 4 * 9, 4 * 5 * 4 + 5 + 8]
    assert_close(float(arms.costs.sum()), 1.0)
    whole, parts = arms.resting(played(arms, "2"))
    assert whole == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias", "5.weight", "5.bias"}
    assert not parts
    assert arms.resting_norms(played(arms, "2")) == ["1"]
    assert arms.resting_norms(played(arms, "0", "4")) == ["3"]


def test_a_head_can_be_named(model: nn.Module) -> None:
    assert layer_arms(model, head="0.*").names == ("0", "2", "4", "7")
    assert layer_arms(model, head=["0.*", "1.*", "4.bias"]).names == ("2", "4", "7")


def test_patterns_make_arms_and_the_rest_is_always_trained(model: nn.Module) -> None:
    arms = pattern_arms(model, patterns={"first": ["0.*", "1.weight"], "second": "2.*"})
    assert arms.names == ("first", "second")
    assert arms.sizes.tolist() == [2 * 3 * 9 + 3 + 3, 3 * 4 * 9]
    assert arms.resting(played(arms))[0] == {"0.weight", "0.bias", "1.weight", "2.weight"}


def test_each_unit_has_its_row_its_bias_and_its_place_in_the_norm(model: nn.Module) -> None:
    arms = unit_arms(model)
    assert arms.names[:4] == ("0[0]", "0[1]", "0[2]", "2[0]")
    assert arms.sizes.tolist() == [2 * 9 + 1 + 2] * 3 + [3 * 9] * 4 + [4 * 4 + 1] * 5
    whole, parts = arms.resting(played(arms, "0[1]", "4[2]"))
    assert whole == {"2.weight"}
    assert parts["0.weight"].tolist() == parts["1.bias"].tolist() == [True, False, True]
    assert parts["4.weight"].tolist() == parts["4.bias"].tolist() == [True, True, False, True, True]
    assert arms.dims["4.weight"] == 1
    assert arms.resting_norms(played(arms, "0[1]")) == ["3"]


@pytest.mark.parametrize("make", [layer_arms, unit_arms])
def test_credits_are_summed_over_the_weights_of_each_arm(model: nn.Module, make: object) -> None:
    arms = make(model)  # type: ignore[operator]
    totals = torch.zeros(len(arms.names), dtype=torch.float64)
    for name in arms.owner:
        arms.add_to_(totals, name, torch.ones_like(dict(model.named_parameters())[name]))
    assert_close(totals, arms.sizes.double())


def test_a_shared_parameter_belongs_to_the_layer_that_has_it_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    assert layer_arms(model).sizes.tolist() == [9 + 3 + 3]
    assert "1.bias" in layer_arms(model).owner


def test_frozen_parameters_are_nobodys(model: nn.Module) -> None:
    model[2].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    arms = layer_arms(model)
    assert arms.names == ("0",)
    assert "4.bias" in arms.owner
    assert arms.resting_norms(played(arms)) == ["1"]


def test_what_cannot_be_selected_from_is_told(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="must have trainable weights beside its head"):
        layer_arms(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have trainable weights to select from"):
        layer_arms(nn.ReLU())
    with pytest.raises(ValueError, match=r"`head` has the pattern 'nothing\.\*', which names no trainable parameter"):
        layer_arms(model, head="nothing.*")
    with pytest.raises(ValueError, match=r"Arm 'a' has the pattern 'x\.\*', which names no trainable parameter but"):
        pattern_arms(model, patterns={"a": "x.*"})
    with pytest.raises(ValueError, match=r"'0\.bias' must belong to one arm, but 'a' and 'b' name it"):
        pattern_arms(model, patterns={"a": "0.*", "b": "*.bias"})


def test_what_is_not_named_to_be_dealt_out_is_nobodys_though_it_can_be_trained(model: nn.Module) -> None:
    student = nn.ModuleDict({"net": model, "teacher": nn.Linear(3, 3)})
    moved = [name for name, _ in student.named_parameters() if name.startswith("net.")]
    assert layer_arms(student, moved).names == ("net.0", "net.2", "net.4")  # the head is the student's
    frozen_since = [name for name in moved if name != "net.0.weight"]
    student.requires_grad_(False)
    assert layer_arms(student, moved).sizes.tolist() == layer_arms(model.requires_grad_()).sizes.tolist()
    assert layer_arms(student, frozen_since).names == ("net.2", "net.4")


class Scaled(nn.Module):
    """Has a scalar and a norm before its first layer, and a layer with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.BatchNorm1d(4)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.first.scale = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("make", [layer_arms, unit_arms])
def test_what_comes_before_the_first_layer_is_always_trained(make: Any) -> None:
    arms = make(Scaled())
    assert {name.partition("[")[0] for name in arms.names} == {"first"}
    assert set(arms.owner) - {"first.scale"} == {"first.weight", "first.bias"}
    assert arms.resting_norms(torch.zeros(len(arms.names), dtype=torch.bool)) == []
    assert pattern_arms(Scaled(), patterns={"a": "norm.*", "b": "temperature"}).sizes.tolist() == [8, 1]


def test_units_of_a_layer_with_a_scale_have_their_rows_alone() -> None:
    arms = unit_arms(Scaled())
    assert arms.sizes.tolist() == [5, 5, 5]
    assert "first.scale" not in arms.owner
    assert unit_arms(Scaled(), head=["last.*", "first.weight"]).sizes.tolist() == [1, 1, 1]


class Tied(nn.Module):
    """The head has the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.deep = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 6)
        self.head.weight = self.embedding.weight


def test_a_head_that_shares_its_weights_is_the_head() -> None:
    arms = layer_arms(Tied())
    assert arms.names == ("body", "deep")
    assert set(arms.owner) == {"body.weight", "body.bias", "deep.weight", "deep.bias"}


def test_a_shared_parameter_is_named_by_any_of_its_names() -> None:
    assert layer_arms(Tied(), head="head.weight").names == ("body", "deep")
    assert layer_arms(Tied(), head="embedding.*").owner.keys() == layer_arms(Tied(), head="head.weight").owner.keys()
    assert pattern_arms(Tied(), patterns={"a": "head.weight"}, head="body.*").sizes.tolist() == [48]


def test_a_norm_after_a_layer_with_shared_weights_rests_with_their_arm() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    arms = layer_arms(model)
    assert arms.resting_norms(torch.tensor([False])) == ["2"]
    assert arms.resting_norms(torch.tensor([True])) == []


def test_no_patterns_are_told() -> None:
    with pytest.raises(ValueError, match="`arms` of weights must name one arm at least, but got none"):
        dealer({})
