"""Training from scratch: weights drawn anew, the same zeros; and which of many networks to take, against loops."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier
from torch import Tensor, nn

from lightning_continual.compression.baselines import from_scratch, pareto_front, recommend, reinitialise_


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.MultiheadAttention(8, 2),
        nn.LSTM(8, 3),
        nn.Embedding(5, 3, padding_idx=0),
    )


def trained(module: nn.Module) -> nn.Module:
    """Far from what any initialisation gives, statistics of norms included."""
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(100.0)
    return module


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- Drawing anew -----------------------------------------------------------------------------------------------------


def test_a_module_drawn_anew_is_what_its_constructor_gives_with_the_seed() -> None:
    module = trained(chain())
    assert reinitialise_(module, seed=7) is module
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert equal(module, chain())


def test_the_seed_decides() -> None:
    one, same, other = (reinitialise_(trained(chain()), seed=seed) for seed in (1, 1, 2))
    assert equal(one, same)
    assert not torch.equal(one[2].weight, other[2].weight)


def test_random_states_are_left_alone() -> None:
    module = chain()
    before = torch.get_rng_state(), random.getstate()
    from_scratch(module, seed=0)
    reinitialise_(module, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_parameters_stay_the_same_objects_as_frozen_as_they_were() -> None:
    module = chain()
    module[2].weight.requires_grad_(False)
    before = list(module.parameters())
    reinitialise_(module, seed=0)
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    assert [p.requires_grad for p in module.parameters()] == [p is not module[2].weight for p in before]
    assert module.training


class Own(nn.Module):
    """A module whose `reset_parameters` has the last word over its layers, by way of `data`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.layer.bias.data.fill_(0.5)
        self.gain.data.fill_(1.0)


def test_a_reset_of_the_users_comes_after_that_of_the_layers_inside() -> None:
    module = reinitialise_(trained(Own()), seed=0)
    assert torch.equal(module.layer.bias.data, torch.full((2,), 0.5))
    assert torch.equal(module.gain.data, torch.ones(2))
    assert float(module.layer.weight.detach().abs().max()) < 1


def test_a_module_that_is_registered_twice_is_drawn_once() -> None:
    layer = nn.Linear(3, 3)
    module = nn.Sequential(layer, nn.Linear(3, 3), nn.Sequential(layer))
    reinitialise_(module, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    assert torch.equal(layer.weight, first.weight)
    assert torch.equal(module[1].weight, second.weight)


def test_what_nothing_draws_anew_is_named_and_keeps_its_value() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.cls = nn.Parameter(torch.ones(3))
            self.pairs = nn.Parameter(torch.ones(4))
            self.index = nn.Parameter(torch.arange(3), requires_grad=False)

        def reset_parameters(self) -> None:
            self.pairs.data[:2] = 0.0

    module = trained(Tokens())
    with pytest.warns(UserWarning, match=r"No `reset_parameters` draws 'cls', 'pairs' anew: trained values stay there"):
        reinitialise_(module, seed=0)
    assert torch.equal(module.cls.data, torch.full((3,), 101.0))
    assert torch.equal(module.pairs.data, torch.full((4,), 101.0))
    assert torch.equal(module.index, torch.arange(3))
    assert float(module.layer.weight.detach().abs().max()) < 1


@pytest.mark.parametrize(
    "parametrize",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_what_a_parametrized_weight_is_computed_from_is_named(parametrize: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the last one is deprecated
        layer = parametrize(nn.Linear(4, 4))
    layer(torch.ones(1, 4))
    with pytest.warns(UserWarning, match=r"draws '.*(original|weight_orig).*' anew: trained values stay"):
        reinitialise_(layer, seed=0)
    assert all(bool(value.isfinite().all()) for value in layer.state_dict().values())
    assert bool(layer(torch.ones(1, 4)).isfinite().all())


def test_a_reset_that_fails_leaves_everything_as_it_was() -> None:
    class Broken(nn.Linear):
        broken = False

        def reset_parameters(self) -> None:
            if self.broken:
                raise ArithmeticError("no")
            super().reset_parameters()

    module = trained(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Broken(2, 2)))
    module[2].broken = True
    before = copy.deepcopy(module)
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="no"):
        reinitialise_(module, seed=0)
    assert equal(module, before)
    assert torch.equal(torch.get_rng_state(), state)


# --- From scratch -----------------------------------------------------------------------------------------------------


def test_a_baseline_has_the_same_widths_and_shares_nothing() -> None:
    model = trained(chain())
    model[2] = nn.Linear(16, 8, bias=False)  # not what a constructor would make
    before = copy.deepcopy(model)
    baseline = from_scratch(model, seed=0)
    assert equal(model, before)
    assert {n: p.shape for n, p in baseline.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in baseline.parameters()}
    assert equal(baseline, reinitialise_(copy.deepcopy(model), seed=0))


def test_a_baseline_has_the_same_zeros_and_elsewhere_the_draws() -> None:
    model = trained(chain())
    kept = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        for name, p in model.named_parameters()
        if name in ("0.0.weight", "2.weight", "2.bias")
    }
    baseline, dense = from_scratch(model, kept=kept, seed=4), from_scratch(model, seed=4)
    for (name, p), full in zip(baseline.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(p, full * kept[name] if name in kept else full), name
    assert bool((model[2].weight != 0).all())


def test_a_shared_weight_stays_shared() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    kept = torch.tensor([[True, False, True]]).expand(4, 3)
    baseline = from_scratch(model, kept={"0.weight": kept}, seed=0)
    assert baseline[0].weight is baseline[1].weight
    assert torch.equal(baseline[1].weight != 0, kept)


def test_a_baseline_of_a_module_attached_to_a_trainer_can_be_fitted(
    trainer: Callable[..., L.Trainer], data: L.LightningDataModule
) -> None:
    module = Classifier()
    first = trainer(max_epochs=1, limit_val_batches=0)
    first.fit(module, data)
    baseline = from_scratch(module, seed=0)
    start = copy.deepcopy(baseline.net.state_dict())
    trainer(max_epochs=1, limit_val_batches=0).fit(baseline, data)
    assert module.trainer is first
    assert not torch.equal(baseline.net[0].weight, start["0.weight"])


def test_masks_that_do_not_fit_are_refused() -> None:
    layer = nn.Linear(3, 2)
    fine = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`kept` must name parameters of the module, but got 'wait'\."):
        from_scratch(layer, kept={"wait": fine}, seed=0)
    with pytest.raises(
        ValueError, match=r"`kept` must have the parameters' shapes, but 'weight' has \(3, 2\) for \(2, 3"
    ):
        from_scratch(layer, kept={"weight": fine.T}, seed=0)
    with pytest.raises(TypeError, match=r"`kept` must hold booleans, but 'weight' has dtype torch\.float32"):
        from_scratch(layer, kept={"weight": fine.float()}, seed=0)


# --- Which to take ----------------------------------------------------------------------------------------------------


def clouds() -> list[tuple[Tensor, Tensor]]:
    """Points with many ties, and with none."""
    pairs = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        levels = 3 if seed % 2 else 1000
        draws = torch.randint(levels, (2, seed), generator=generator)
        pairs.append((draws[0], draws[1] / levels))
    return pairs


def test_the_front_is_what_no_other_beats() -> None:
    for sizes, scores in clouds():
        expected = []
        for size, score in zip(sizes.tolist(), scores.tolist(), strict=True):
            others = list(zip(sizes.tolist(), scores.tolist(), strict=True))
            expected.append(not any(b <= size and a >= score and (b < size or a > score) for b, a in others))
        assert pareto_front(sizes, scores).tolist() == expected


def test_the_front_does_not_depend_on_the_order() -> None:
    for sizes, scores in clouds():
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
        assert torch.equal(pareto_front(sizes[order], scores[order]), pareto_front(sizes, scores)[order])


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5, math.inf])
def test_the_smallest_that_is_good_enough_is_recommended(tolerance: float) -> None:
    for sizes, scores in clouds():
        full = float(scores.max()) if len(scores) else 1.0
        best = None
        for i, (size, score) in enumerate(zip(sizes.tolist(), scores.tolist(), strict=True)):
            if score < full - tolerance:
                continue
            if best is None or size < sizes[best] or (size == sizes[best] and score > scores[best]):
                best = i
        assert recommend(sizes, scores, full, tolerance) == best


def test_what_is_recommended_is_on_the_front() -> None:
    for sizes, scores in clouds()[1:]:
        chosen = recommend(sizes, scores, float(scores.max()), 0.1)
        assert chosen is not None
        assert bool(pareto_front(sizes, scores)[chosen])


def test_where_none_is_good_enough_none_is_recommended() -> None:
    assert recommend(torch.tensor([1, 2]), torch.tensor([0.5, 0.6]), full_score=0.9, tolerance=0.1) is None
    assert recommend(torch.tensor([]), torch.tensor([]), full_score=0.9, tolerance=0.1) is None


def test_a_score_at_the_limit_is_good_enough() -> None:
    assert recommend(torch.tensor([1, 2]), torch.tensor([0.875, 1.0]), full_score=1.0, tolerance=0.125) == 0


def test_what_has_diverged_is_neither_on_the_front_nor_recommended() -> None:
    sizes, scores = torch.tensor([1, 2, 3]), torch.tensor([math.nan, 0.8, 0.9])
    assert pareto_front(sizes, scores).tolist() == [False, True, True]
    assert recommend(sizes, scores, 0.8, 0.0) == 1


def test_arguments_that_make_no_comparison_are_refused() -> None:
    one, two = torch.ones(1), torch.ones(2)
    for call in (pareto_front, lambda a, b: recommend(a, b, 1.0, 0.1)):
        for a, b in ((one, two), (torch.ones(1, 1), torch.ones(1, 1))):
            with pytest.raises(
                ValueError, match=r"`num_bytes` and `score` must be of one shape \(n,\), but are of \(1,"
            ):
                call(a, b)
    for tolerance in (-0.1, math.nan):
        with pytest.raises(ValueError, match=rf"`tolerance` must be at least 0, but got {tolerance}\."):
            recommend(one, one, 1.0, tolerance)
    with pytest.raises(ValueError, match=r"`full_score` must be a number, but got nan"):
        recommend(one, one, math.nan, 0.1)
