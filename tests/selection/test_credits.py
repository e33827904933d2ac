"""Credits of arms, against a loop over every step and weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from lightning_continual.selection.credits import Credits
from lightning_continual.selection.weight_arms import layer_arms, unit_arms


def credits_of(model: nn.Module, make: object, stride: int) -> Credits:
    return Credits(make(model), num_optimizers=2, stride=stride, device=torch.device("cpu"))  # type: ignore[operator]


def test_each_arm_has_the_mean_over_its_weights_and_the_steps_measured_of_each_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    named = dict(model.named_parameters())
    moved = [["0.weight", "0.bias", "1.weight"], ["1.bias", "2.weight"]]  # arm 1 is of both; 2.bias never has one
    generator = torch.Generator().manual_seed(0)
    credit, given = credits_of(model, layer_arms, stride=3), []
    for step in range(11):
        number = int(step % 4 == 0)  # one steps three times as often as the other
        if credit.is_due(number):
            found = {name: torch.rand(named[name].shape, generator=generator) for name in moved[number]}
            credit.add(number, found)
            given.append((number, found))
    assert [number for number, _ in given] == [1, 0, 0, 0]
    rewards, measured = credit.rewards(lambda value: value)
    assert measured.tolist() == [True, True, True]
    for arm in range(3):
        size = sum(one.numel() for name, one in named.items() if name.startswith(f"{arm}."))
        expected = 0.0
        for number in (0, 1):
            values = [
                [float(value) for name in found if name.startswith(f"{arm}.") for value in found[name].flatten()]
                for one, found in given
                if one == number
            ]
            expected += sum(map(sum, values)) / len(values)
        assert_close(float(rewards[arm]), expected / size, rtol=1e-5, atol=0)  # summed in single precision


def test_what_was_not_measured_is_told_and_units_have_their_rows() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    credit = credits_of(model, unit_arms, stride=1)
    credit.add(1, {"0.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]])})
    rewards, measured = credit.rewards(lambda value: value)
    assert rewards.tolist() == [6 / 4, 4 / 4, 0, 0]
    assert measured.tolist() == [True, True, False, False]


def test_credits_that_load_the_state_go_on_to_the_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    one, two = (credits_of(model, layer_arms, stride=2) for _ in range(2))
    one.is_due(0)
    one.add(0, {"0.bias": torch.tensor([1.0, 2.0])})
    two.load_state_dict(one.state_dict())
    for credit in (one, two):
        assert not credit.is_due(0)
        assert credit.is_due(0)
        credit.add(0, {"0.bias": torch.tensor([0.1, 0.2])})
    assert all(torch.equal(a, b) for a, b in zip(one.rewards(lambda v: v), two.rewards(lambda v: v), strict=True))
