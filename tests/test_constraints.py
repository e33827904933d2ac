"""The quadratic penalty: its algebra, its gradient, its value. The pin: what it holds through optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.constraints import Pin, QuadraticPenalty


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def random_like(model: nn.Module, seed: int, *, positive: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if positive else torch.randn
    return {name: draw(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


def separate(model: nn.Module, anchors: list[dict[str, Tensor]], precisions: list[dict[str, Tensor]]) -> Tensor:
    """The definition: one sum of squares a task."""
    total = torch.zeros((), dtype=torch.float64)
    for anchor, precision in zip(anchors, precisions, strict=True):
        for name, p in model.named_parameters():
            total = total + 0.5 * (precision[name] * (p - anchor[name]) ** 2).sum()
    return total


@pytest.mark.parametrize("num_tasks", [1, 2, 20])
def test_merged_penalties_have_the_value_and_the_gradient_of_their_sum(model: nn.Module, num_tasks: int) -> None:
    anchors = [random_like(model, seed) for seed in range(num_tasks)]
    precisions = [random_like(model, 100 + seed, positive=True) for seed in range(num_tasks)]
    precisions[0]["0.weight"][0] = 0.0  # weights that one task does not need
    penalty = QuadraticPenalty()
    for anchor, precision in zip(anchors, precisions, strict=True):
        penalty = penalty + QuadraticPenalty.around(anchor, precision)
    expected = separate(model, anchors, precisions)
    assert_close(penalty.value(parameters_of(model)), expected.detach())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for (name, value), gradient in zip(penalty.gradient(parameters_of(model)).items(), gradients, strict=True):
        assert_close(value, gradient, msg=name)
    assert len(penalty.precision) == len(gradients)


def test_a_factor_fades_value_and_gradient(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(random_like(model, 0), random_like(model, 1, positive=True))
    penalty = penalty + QuadraticPenalty.around(random_like(model, 2), random_like(model, 3, positive=True))
    assert_close((0.25 * penalty).value(parameters_of(model)), 0.25 * penalty.value(parameters_of(model)))
    for name, value in (0.25 * penalty).gradient(parameters_of(model)).items():
        assert_close(value, 0.25 * penalty.gradient(parameters_of(model))[name])


def test_at_its_anchor_a_penalty_is_zero_to_the_bit(model: nn.Module) -> None:
    anchor = {name: p.detach().float() for name, p in model.named_parameters()}
    penalty = QuadraticPenalty.around(anchor, {name: torch.rand_like(p) + 0.5 for name, p in anchor.items()})
    assert penalty.value(anchor) < 1e-12
    assert all(bool((value == 0).all()) for value in penalty.gradient(anchor).values())


def test_the_gradient_is_added_in_place_and_a_missing_one_is_zero(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(random_like(model, 0), random_like(model, 1, positive=True))
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    penalty.add_gradient_(parameters_of(model), strength=3.0)
    expected = penalty.gradient(parameters_of(model))
    assert_close(first.grad, 1 + 3 * expected["0.weight"])
    assert_close(others[0].grad, 3 * expected["0.bias"])


def test_at_its_anchor_it_adds_nothing_to_the_bit_however_strong(model: nn.Module) -> None:
    model.float()
    penalty = QuadraticPenalty.around(parameters_of(model), random_like(model, 1, positive=True))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    penalty.add_gradient_(parameters_of(model), strength=1e6)
    assert all(bool((p.grad == 1e-3).all()) for p in model.parameters() if p.grad is not None)


def test_many_and_large_parameters_are_all_served() -> None:
    sizes = (3, 2**20 - 5, 2, 1, 2**20 + 1, 7)
    parameters = {f"p{number}": nn.Parameter(torch.zeros(size)) for number, size in enumerate(sizes)}
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    QuadraticPenalty.around(ones, ones).add_gradient_(parameters, strength=2.0)
    assert all(bool((p.grad == -2).all()) for p in parameters.values() if p.grad is not None)
    assert not [name for name, p in parameters.items() if p.grad is None]


def test_a_sparse_gradient_becomes_a_dense_one() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    zeros, ones = {"weight": torch.zeros(5, 2)}, {"weight": torch.ones(5, 2)}
    QuadraticPenalty.around(zeros, ones).add_gradient_(parameters_of(table), strength=3.0)
    expected = 3 * table.weight.detach()
    expected[1] += 2
    assert_close(table.weight.grad, expected)


def test_half_precision_is_remembered_in_single(model: nn.Module) -> None:
    anchor = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    penalty = QuadraticPenalty.around(anchor, {name: torch.ones_like(p) for name, p in anchor.items()})
    small = QuadraticPenalty.around(anchor, {name: torch.full_like(p, 2.0**-12) for name, p in anchor.items()})
    for value in (penalty + small).precision.values():
        assert_close(value, torch.full_like(value, 1 + 2.0**-12, dtype=torch.float32), rtol=0, atol=0)


def test_only_the_parameters_given_receive_a_gradient(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(random_like(model, 0), random_like(model, 1, positive=True))
    penalty.add_gradient_({"0.weight": model[0].weight}, strength=1.0)
    assert model[0].weight.grad is not None
    assert model[0].bias.grad is None


def test_nothing_is_changed_by_what_comes_after(model: nn.Module) -> None:
    precision = random_like(model, 1, positive=True)
    penalty = QuadraticPenalty.around(parameters_of(model), precision)
    before = penalty.value(parameters_of(model)).clone()
    _ = penalty + penalty, 0.5 * penalty
    precision["0.weight"].mul_(100)
    with torch.no_grad():
        model[0].weight.zero_()
    assert penalty.value(parameters_of(model)) > before


def test_new_rows_are_free(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(parameters_of(model), random_like(model, 1, positive=True))
    model[2] = nn.Linear(4, 5).double()
    grown = penalty.aligned_with(parameters_of(model))
    gradient = grown.gradient(parameters_of(model))
    assert gradient["2.weight"].shape == (5, 4)
    assert bool((gradient["2.weight"][2:] == 0).all())
    assert bool((gradient["2.bias"][2:] == 0).all())
    assert bool((gradient["2.weight"][:2] != 0).all())


def test_a_scalar_parameter_is_no_row(model: nn.Module) -> None:
    scale = {"scale": torch.tensor(2.0)}
    penalty = QuadraticPenalty.around(scale, {"scale": torch.tensor(3.0)})
    assert torch.equal(penalty.aligned_with(scale).precision["scale"], torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"'scale' is penalised with shape \(\), but has shape \(2,\)"):
        penalty.aligned_with({"scale": torch.zeros(2)})


def test_a_parameter_that_disappeared_is_named(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(parameters_of(model), random_like(model, 1, positive=True))
    with pytest.raises(ValueError, match=r"Parameter '2\.weight' is penalised, but the module has it no more"):
        penalty.aligned_with(dict(model[:2].named_parameters()))


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (2, 4, 1)], ids=str)
def test_a_parameter_of_another_shape_is_named(model: nn.Module, shape: tuple[int, ...]) -> None:
    penalty = QuadraticPenalty.around(parameters_of(model), random_like(model, 1, positive=True))
    with pytest.raises(ValueError, match=r"'2\.weight' is penalised with shape \(2, 4\), but has shape"):
        penalty.aligned_with({**parameters_of(model), "2.weight": torch.zeros(shape)})


def test_the_state_loads_with_weights_only_and_is_the_penalty(model: nn.Module) -> None:
    penalty = QuadraticPenalty.around(random_like(model, 0), random_like(model, 1, positive=True))
    penalty = penalty + QuadraticPenalty.around(random_like(model, 2), random_like(model, 3, positive=True))
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    loaded = QuadraticPenalty.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.value(parameters_of(model)), penalty.value(parameters_of(model)))


def test_nothing_is_no_penalty(model: nn.Module) -> None:
    assert not QuadraticPenalty()
    assert QuadraticPenalty().value(parameters_of(model)) == 0
    QuadraticPenalty().add_gradient_(parameters_of(model), strength=1.0)
    assert all(p.grad is None for p in model.parameters())


# --- Pin --------------------------------------------------------------------------------------------------------------


def random_pin(model: nn.Module, seed: int = 0, share: float = 0.5) -> Pin:
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters_of(model)
    return Pin.at(
        parameters, {name: torch.rand(p.shape, generator=generator) < share for name, p in parameters.items()}
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_is_pinned_stays_to_the_bit_and_the_rest_is_trained(model: nn.Module, make: Callable[..., object]) -> None:
    optimizer: torch.optim.Optimizer = make(model.parameters())
    inputs = torch.randn(8, 3, dtype=torch.float64)
    for _ in range(2):  # momentum from before
        model(inputs).square().sum().backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pin = random_pin(model)
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        pin.mask_gradients_(parameters_of(model))
        assert all(bool((p.grad[pin.pinned[name]] == 0).all()) for name, p in model.named_parameters())
        optimizer.step()
        pin.put_back_(parameters_of(model))
    for name, p in model.named_parameters():
        held = pin.pinned[name]
        assert torch.equal(p[held], before[name][held])
        assert not (p[~held] == before[name][~held]).any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_large_parameters_are_held_by_rows_as_by_elements(share: float) -> None:
    model = nn.Linear(200, 100, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = torch.rand(100, generator=torch.Generator().manual_seed(0)) < share
    pin = Pin.at(parameters_of(model), {"weight": rows[:, None].expand(100, 200), "bias": rows})
    for p in model.parameters():
        p.grad, p.data = torch.ones_like(p), torch.full_like(p, torch.nan)  # as where a step has diverged
    pin.mask_gradients_({"weight": model.weight})
    pin.put_back_({"weight": model.weight})
    assert torch.equal(model.weight[rows], before["weight"][rows])
    assert bool(model.weight[~rows].isnan().all())
    assert torch.equal(model.weight.grad == 0, rows[:, None].expand(100, 200))
    assert bool(model.bias.grad.all())


def test_a_pin_at_zero_holds_zeros(model: nn.Module) -> None:
    pinned = {"0.weight": torch.eye(4, 3) > 0}
    Pin(pinned, {"0.weight": torch.zeros(4, 3, dtype=torch.float64)}).put_back_(parameters_of(model))
    assert torch.equal(model[0].weight == 0, pinned["0.weight"])


def test_the_union_of_pins_holds_what_either_holds(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one, two = random_pin(model, 0), random_pin(model, 1)
    del two.pinned["0.bias"], two.values["0.bias"], one.pinned["2.bias"], one.values["2.bias"]
    both = one | two
    for p in model.parameters():
        p.data.fill_(7.0)
    both.put_back_(parameters_of(model))
    for name, p in model.named_parameters():
        nothing = torch.zeros_like(p, dtype=torch.bool)
        held = one.pinned.get(name, nothing) | two.pinned.get(name, nothing)
        assert torch.equal(p, torch.where(held, before[name], 7.0))
    assert both.num_pinned() == sum(int((p != 7.0).sum()) for p in model.parameters())


def test_pins_that_disagree_do_not_unite(model: nn.Module) -> None:
    one = random_pin(model, share=1.0)
    model[2].bias.data += 1.0
    with pytest.raises(ValueError, match=r"at one value, but they hold weights of '2\.bias' at different ones"):
        one | random_pin(model, share=1.0)


def test_missing_gradients_stay_missing_and_other_parameters_are_left_alone(model: nn.Module) -> None:
    pin = random_pin(model, share=1.0)
    model[0].weight.grad = torch.ones(4, 3, dtype=torch.float64)
    model[0].bias.grad = torch.ones(4, dtype=torch.float64)
    pin.mask_gradients_({"0.weight": model[0].weight, "2.weight": model[2].weight})
    assert not model[0].weight.grad.any()
    assert model[0].bias.grad.all()
    assert model[2].weight.grad is None


def test_new_rows_of_a_pinned_layer_are_free(model: nn.Module) -> None:
    pin = random_pin(model, share=1.0)
    grown = {**parameters_of(model), "2.weight": nn.Parameter(torch.ones(3, 4, dtype=torch.float64))}
    pin.aligned_with(grown).put_back_(grown)
    assert torch.equal(grown["2.weight"][:2], model[2].weight)
    assert torch.equal(grown["2.weight"][2], torch.ones(4, dtype=torch.float64))
    assert pin.aligned_with(parameters_of(model)) is pin


def test_a_pinned_parameter_that_disappeared_or_changed_is_named(model: nn.Module) -> None:
    pin = random_pin(model)
    parameters = parameters_of(model)
    with pytest.raises(ValueError, match=r"'2\.bias' is pinned, but the module has it no more"):
        pin.aligned_with({name: p for name, p in parameters.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"'0\.weight' is pinned with shape \(4, 3\), but has shape \(4, 2\)"):
        pin.aligned_with({**parameters, "0.weight": torch.zeros(4, 2, dtype=torch.float64)})


def test_a_pin_follows_the_type_of_the_weights(model: nn.Module) -> None:
    pin = random_pin(model)
    model.bfloat16()
    aligned = pin.aligned_with(parameters_of(model))
    aligned.put_back_(parameters_of(model))
    for name, p in model.named_parameters():
        held = pin.pinned[name]
        assert torch.equal(p[held], pin.values[name][held].bfloat16())


def test_the_state_of_a_pin_loads_with_weights_only(model: nn.Module) -> None:
    pin, file = random_pin(model), io.BytesIO()
    torch.save(pin.state_dict(), file)
    file.seek(0)
    again = Pin.from_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(again.pinned[name], value) for name, value in pin.pinned.items())
    assert all(torch.equal(again.values[name], value) for name, value in pin.values.items())


def test_an_empty_pin_is_no_pin() -> None:
    assert not Pin()
    assert not Pin() | Pin()
    assert Pin().num_pinned() == 0
