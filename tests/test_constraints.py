"""The quadratic penalty: its algebra, its gradient, its value."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.constraints import QuadraticPenalty


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
