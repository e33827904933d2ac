"""Merging: what it costs is what least squares says, and copies, multiples and constants cost nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.compression.merging import MergeCosts, merge_, merge_costs, not_mergeable
from lightning_continual.compression.surgery import compact
from lightning_continual.compression.units import UnitGroup, unit_groups


def mlp(bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 4, bias=bias))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.GELU(), nn.Flatten(), nn.Linear(5 * 16, 3))


def convolutions(padding: int = 0, mode: str = "zeros", bias: bool = True) -> nn.Module:
    reader = nn.Conv2d(5, 3, 3, padding=padding, padding_mode=mode, bias=bias)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.Sigmoid(), reader)


def transposed() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 5, 3), nn.Sigmoid(), nn.ConvTranspose1d(5, 2, 3, stride=2))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class TwoReaders(nn.Module):
    """Two layers read the same units, each behind another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.one(x.sigmoid()) + self.two(x.relu())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3,)),
    "without_bias": (lambda: mlp(bias=False), (3,)),
    "flattened": (flattened, (1, 6, 6)),
    "convolutions": (convolutions, (1, 7, 7)),
    "padded": (lambda: convolutions(padding=1), (1, 7, 7)),
    "reflected": (lambda: convolutions(1, "reflect"), (1, 7, 7)),
    "transposed": (transposed, (1, 8)),
    "sequence": (Sequence, (4, 3)),
    "two_readers": (TwoReaders, (3,)),
}
WITH_CONSTANT = {"mlp", "flattened", "convolutions", "reflected", "sequence"}


def network(name: str, seed: int = 0, samples: int = 9) -> tuple[nn.Module, Tensor, UnitGroup]:
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = make().double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    x = torch.randn(samples, *shape, dtype=torch.double)
    (group,) = unit_groups(model, x)
    return model, x, group


def read_values(model: nn.Module, name: str, x: Tensor) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """By hand, for each reading layer: the values of each unit, and the weights that read it."""
    with torch.no_grad():
        if name == "two_readers":
            hidden = model.first(x)
            values, readers = [hidden.sigmoid(), hidden.relu()], [model.one, model.two]
        elif name == "sequence":
            values, readers = [model.first(x).relu().flatten(0, 1)], [model.second]
        else:
            values, readers = [model[:-1](x)], [model[-1]]
    units = (model.first if hasattr(model, "first") else model[0]).weight.shape[0]
    found, weights = [], []
    for value, reader in zip(values, readers, strict=True):
        if name == "flattened":
            value = value.unflatten(1, (units, -1))
        weight = reader.weight.detach()
        weight = weight if name == "transposed" else weight.transpose(0, 1)
        found.append([value[:, unit].flatten().numpy() for unit in range(units)])
        weights.append([part.numpy() for part in weight.chunk(units)])
    return found, weights


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_a_least_squares_fit_of_each_pair(name: str) -> None:
    model, x, group = network(name)
    (found,) = merge_costs(model, [group], x.split(4))
    values, weights = read_values(model, name, x)
    for unit in range(group.num_units):
        for other in range(group.num_units):
            if unit == other:
                continue
            cost = 0.0
            for reader, (own, weight) in enumerate(zip(values, weights, strict=True)):
                with_constant = name in WITH_CONSTANT or (name == "two_readers" and reader == 0)
                columns = [own[other]] + ([np.ones_like(own[other])] if with_constant else [])
                solution, *_ = np.linalg.lstsq(np.stack(columns, 1), own[unit], rcond=None)
                residual = own[unit] - np.stack(columns, 1) @ solution
                cost += (weight[unit] ** 2).sum() * (residual**2).mean()
                assert_close(found.alphas[reader][unit, other].item(), solution[0])
                assert_close(found.betas[reader][unit, other].item(), solution[1] if with_constant else 0.0)
            assert_close(found.costs[unit, other].item(), cost)
    assert (found.costs.diagonal() == inf).all()


def rows(model: nn.Module) -> list[Tensor]:
    maker = model.first if hasattr(model, "first") else model[0]
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    return [maker.weight, maker.bias, *(t for n in norms for t in (n.weight, n.bias, n.running_mean, n.running_var))]


def but(num_units: int, *gone: int) -> Tensor:
    return torch.tensor([unit not in gone for unit in range(num_units)])


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_copies_merge_without_a_change_of_outputs(name: str) -> None:
    model, x, group = network(name)
    with torch.no_grad():
        for tensor in rows(model):
            tensor[3] = tensor[1]
            tensor[4] = tensor[1]
    before = model(x)
    (costs,) = merge_costs(model, [group], [x])
    assert_close(costs.costs[3, 1].item(), 0.0, atol=1e-12, rtol=0)
    merge_(model, group, costs, but(group.num_units, 1, 4))
    assert_close(model(x), before)
    small = compact(model, x)
    assert_close(small(x), before)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["sequence", "without_bias", "two_readers"])
def test_a_multiple_of_a_unit_merges_without_a_change_of_outputs(name: str) -> None:
    model, x, group = network(name)
    if name == "without_bias":
        model[1] = nn.LeakyReLU()
    if name == "two_readers":
        model.forward = lambda x: model.one(model.first(x).relu()) + model.two(model.first(x).abs())
    with torch.no_grad():
        for tensor in rows(model):
            tensor[2] = 2 * tensor[0]
    before = model(x)
    (costs,) = merge_costs(model, [group], [x])
    for alpha in costs.alphas:
        assert_close(alpha[2, 0].item(), 2.0)
    merge_(model, group, costs, but(group.num_units, 2))
    assert_close(model(x), before)


@pytest.mark.parametrize("name", ["mlp", "flattened", "convolutions", "reflected", "sequence"])
def test_a_constant_unit_goes_into_the_bias(name: str) -> None:
    model, x, group = network(name)
    maker = model.first if hasattr(model, "first") else model[0]
    with torch.no_grad():
        maker.weight[2] = 0
        maker.bias[2] = 1.5
    before = model(x)
    (costs,) = merge_costs(model, [group], [x])
    merge_(model, group, costs, but(group.num_units, 2))
    assert_close(model(x), before)


@pytest.mark.parametrize("name", ["without_bias", "padded", "transposed"])
def test_a_constant_that_no_bias_can_stand_for_is_not_free(name: str) -> None:
    model, x, group = network(name)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    (costs,) = merge_costs(model, [group], [x])
    assert costs.costs[2].min() > 0.01 * model[-1].weight.square().mean()
    assert all((beta == 0).all() for beta in costs.betas)


def test_merging_is_worth_more_than_removing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2)).double()
    x = torch.randn(200, 3, dtype=torch.double)
    (group,) = unit_groups(model, x)
    (costs,) = merge_costs(model, [group], [x])
    keep = costs.scores() > costs.scores().median()
    merged = copy.deepcopy(model)
    merge_(merged, group, costs, keep)
    removed = compact(model, x, kept=[keep])
    assert (merged(x) - model(x)).square().mean() < 0.25 * (removed(x) - model(x)).square().mean()


def test_what_one_merge_loses_is_its_cost() -> None:
    model, x, group = network("mlp", samples=50)
    (costs,) = merge_costs(model, [group], [x])
    merged = copy.deepcopy(model)
    merge_(merged, group, costs, but(6, 2))
    lost = (merged(x) - model(x)).square().sum(1).mean()
    assert_close(lost, costs.costs[2].min())


def cost_of(costs: Tensor, left: set[int]) -> float:
    return sum(min(costs[j, i].item() for i in left) for j in range(len(costs)) if j not in left)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_removing_one_unit_after_another(seed: int) -> None:
    torch.manual_seed(seed)
    costs = torch.rand(7, 7, dtype=torch.double).fill_diagonal_(inf)
    kept, expected, rises, total = set(range(7)), [inf] * 7, [], 0.0
    while len(kept) > 1:
        after = {unit: cost_of(costs, kept - {unit}) for unit in sorted(kept)}
        unit = min(after, key=after.__getitem__)
        rises.append(after[unit] - total)
        total, expected[unit] = after[unit], rises[-1]
        kept -= {unit}
    assert rises == sorted(rises)
    assert_close(MergeCosts(costs, (), ()).scores(), torch.tensor(expected, dtype=torch.double))


def test_of_copies_one_is_free() -> None:
    model, x, group = network("mlp")
    with torch.no_grad():
        for tensor in rows(model):
            tensor[3] = tensor[1]
    (costs,) = merge_costs(model, [group], [x])
    scores = costs.scores()
    one, two = scores[[1, 3]].sort().values.tolist()
    assert one == pytest.approx(0, abs=1e-12)
    assert two > 1e-6
    assert scores.isinf().sum() == 1


def test_a_single_unit_has_nothing_to_merge_with() -> None:
    assert MergeCosts(torch.tensor([[inf]]), (), ()).scores().tolist() == [inf]


@pytest.mark.parametrize("pair", [(1, 4), (1, 9), (4, 9)], ids=str)
def test_costs_do_not_depend_on_batches(pair: tuple[int, int]) -> None:
    model, x, group = network("convolutions")
    x = x + 100  # far from zero, where sums of squares round
    one, two = (merge_costs(model, [group], x.split(size))[0] for size in pair)
    assert_close(one.costs, two.costs)
    for alphas in zip(one.alphas + one.betas, two.alphas + two.betas, strict=True):
        assert_close(*alphas)


def test_measuring_leaves_no_trace() -> None:
    model, x, group = network("flattened")
    model.train()
    state = copy.deepcopy(model.state_dict())
    randoms = torch.get_rng_state()
    merge_costs(model, [group], [x])
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(randoms, torch.get_rng_state())
    assert not any(one._forward_pre_hooks for one in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_forward_says_how_a_batch_is_used() -> None:
    model, x, group = network("mlp")
    (one,) = merge_costs(model, [group], [x])
    (two,) = merge_costs(model, [group], [(x, torch.zeros(9))], forward=lambda model, batch: model(batch[0]))
    assert torch.equal(one.costs, two.costs)


def test_parameters_keep_their_identity_and_dtype() -> None:
    model, x, group = network("convolutions")
    model.bfloat16()
    parameters = list(model.parameters())
    (costs,) = merge_costs(model, [group], [x.bfloat16()])
    merge_(model, group, costs, but(5, 0, 1))
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    assert {p.dtype for p in parameters} == {torch.bfloat16}


def test_a_weight_that_layers_share_cannot_take_what_is_merged() -> None:
    model, x, _ = network("mlp")
    tied = nn.Sequential(*model, nn.Tanh(), nn.Linear(4, 4).double())
    (group,) = unit_groups(tied[:3], x)
    assert not_mergeable(tied, group) is None
    other = nn.Linear(6, 4).double()
    other.weight = tied[2].weight
    tied.append(other)
    assert not_mergeable(tied, group) == "'2.weight', which reads the units of 0, is shared by layers"


def test_units_that_no_plain_layer_reads_cannot_be_merged() -> None:
    model, x, group = network("mlp")
    grouped = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Conv1d(6, 4, 1, groups=2)).double()
    message = r"'2\.weight', which reads the units of 0, is not the weight of a linear layer or a convolution without"
    with pytest.raises(ValueError, match=r"`groups` must hold groups whose units can be merged, but " + message):
        merge_costs(grouped, [group], [x])
    (costs,) = merge_costs(model, [group], [x])
    with pytest.raises(ValueError, match=r"`group` must be one whose units can be merged, but " + message):
        merge_(grouped, group, costs, but(6, 1))


def test_bad_batches_are_named() -> None:
    model, x, group = network("mlp")
    with pytest.raises(ValueError, match=r"'2\.weight' must be used in the forward pass of at least one batch"):
        merge_costs(model, [group], [])
    with pytest.raises(ValueError, match=r"What the layer of '2\.weight' reads must be finite, but it is not"):
        merge_costs(model, [group], [x, torch.full_like(x, torch.nan)])


def test_what_is_kept_must_fit() -> None:
    model, x, group = network("mlp")
    (costs,) = merge_costs(model, [group], [x])
    with pytest.raises(ValueError, match=r"shape \(6,\) for the units of 0, but got torch\.bool and \(5,\)"):
        merge_(model, group, costs, but(5, 1))
    with pytest.raises(ValueError, match="must keep a unit of every group, but got none of 0"):
        merge_(model, group, costs, but(6, *range(6)))
