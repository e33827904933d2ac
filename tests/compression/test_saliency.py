"""What weights and units are worth: against the Hessian, loops over samples, and planted damages."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from lightning_continual.compression import saliency as weights
from lightning_continual.compression import unit_saliency as units
from lightning_continual.compression.units import Slices, UnitGroup

SELECTORS: dict[str, Callable[[nn.Module, list[tuple[Tensor, Tensor]]], dict[str, Tensor]]] = {
    "random": lambda module, _: weights.random(module, generator=torch.Generator().manual_seed(3)),
    "magnitude": lambda module, _: weights.magnitude(module),
    "obd": lambda module, batches: weights.obd(module, batches, logits=lambda batch: module(batch[0])),
    "obd-sd": lambda module, batches: weights.obd_sd(module, cross_entropy(module), batches),
}


def cross_entropy(module: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: F.cross_entropy(module(batch[0]), batch[1])


def linear_net() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 4)


def pooled_net() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    ), torch.randn(7, 2, 6, 6)


over_nets = pytest.mark.parametrize("net", [linear_net, pooled_net])


def made(net: Callable[[], tuple[nn.Module, Tensor]], seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    module, x = net()
    module.double()
    for p in module.parameters():
        p.data.mul_(2)  # so that what is compared is far from zero
    return module, (x.double(), torch.arange(len(x)) % 3)


def singles(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(1), batch[1].split(1), strict=True))


def hessian_diagonal(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The definition, from the whole matrix."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(*values: Tensor) -> Tensor:
        return F.cross_entropy(
            functional_call(module, dict(zip(parameters, values, strict=True)), (batch[0],)), batch[1]
        )

    blocks = torch.autograd.functional.hessian(loss, tuple(parameters.values()))
    return {
        name: blocks[number][number].reshape(p.numel(), p.numel()).diagonal().view_as(p)
        for number, (name, p) in enumerate(parameters.items())
    }


@over_nets
def test_obd_is_half_the_hessians_diagonal_times_the_square(net: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    module, batch = made(net)
    everything = dict(module.named_parameters())
    found = weights.obd(module, [batch], logits=lambda batch: module(batch[0]), parameters=everything)
    curvature = hessian_diagonal(module, batch)
    assert list(found) == list(everything)
    for name, p in everything.items():
        assert_close(
            found[name], 0.5 * curvature[name] * p.detach() ** 2, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert found[name].max() > 1e-3


def test_obd_takes_what_the_module_gives_for_logits() -> None:
    module, (x, _) = made(linear_net)
    explicit = weights.obd(module, [x], logits=lambda x: module(x))
    for name, value in weights.obd(module, [x[:3], x[3:]]).items():
        assert_close(value, explicit[name])


@over_nets
@pytest.mark.parametrize("statistic", ["sd", "rms", "variance"])
def test_obd_sd_is_half_the_spread_of_the_samples_gradients_times_the_square(
    net: Callable[[], tuple[nn.Module, Tensor]], statistic: str
) -> None:
    module, batch = made(net)
    loss = cross_entropy(module)
    gradients = oracles.per_sample_gradients(module, loss, singles(batch))
    sd, square = oracles.deviation(gradients), oracles.mean_square(gradients)
    found = weights.obd_sd(module, loss, [batch], statistic=statistic)
    assert found
    for name, value in found.items():
        spread = {"sd": sd[name], "rms": square[name].sqrt(), "variance": sd[name] ** 2}[statistic]
        assert_close(value, 0.5 * module.get_parameter(name).detach() ** 2 * spread)
        assert value.max() > 1e-3


def test_a_loss_that_is_a_sum_is_told_apart() -> None:
    module, batch = made(linear_net)
    summed = weights.obd_sd(
        module, lambda batch: F.cross_entropy(module(batch[0]), batch[1], reduction="sum"), [batch], reduction="sum"
    )
    for name, value in weights.obd_sd(module, cross_entropy(module), [batch]).items():
        assert_close(value, summed[name])


@over_nets
@pytest.mark.parametrize("selector", ["obd", "obd-sd"])
@pytest.mark.parametrize("size", [1, 2, 3], ids="size={}".format)
def test_it_does_not_matter_how_samples_are_batched(
    net: Callable[[], tuple[nn.Module, Tensor]], selector: str, size: int
) -> None:
    module, batch = made(net)
    cut = list(zip(batch[0].split(size), batch[1].split(size), strict=True))
    whole = SELECTORS[selector](module, [batch])
    for name, value in SELECTORS[selector](module, cut).items():
        assert_close(value, whole[name])


@pytest.mark.parametrize("selector", ["obd", "obd-sd"])
def test_shards_that_are_summed_give_what_one_process_gives(selector: str) -> None:
    module, (x, y) = made(linear_net)
    seen: list[list[Tensor]] = [[], []]
    shards = [(x[:2], y[:2]), (x[2:], y[2:])]

    def run(shard: int, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if selector == "obd":
            return weights.obd(module, [shards[shard]], logits=lambda batch: module(batch[0]), all_reduce=all_reduce)
        return weights.obd_sd(module, cross_entropy(module), [shards[shard]], all_reduce=all_reduce)

    for shard in range(2):
        run(shard, lambda value, shard=shard: seen[shard].append(value.clone()) or value)
    totals = iter([one + two for one, two in zip(*seen, strict=True)])
    reduced = run(0, lambda _: next(totals))
    for name, value in SELECTORS[selector](module, [(x, y)]).items():
        assert_close(reduced[name], value)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_scores_the_prunable_weights_and_disturbs_nothing(selector: str) -> None:
    module, batch = made(lambda: (nn.Sequential(*linear_net()[0], nn.Dropout()), torch.randn(7, 4)))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = SELECTORS[selector](module, [batch])
    weights.check_saliency(found, weights.prunable(module))
    assert list(found) == ["0.weight", "2.weight"]
    assert all(bool((value >= 0).all()) and not value.requires_grad for value in found.values())
    assert torch.equal(state, torch.get_rng_state())
    assert all(one.training for one in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("selector", SELECTORS)
def test_half_precision_is_scored_in_single_or_exactly(selector: str) -> None:
    module, (x, y) = made(linear_net)
    module.bfloat16()
    found = SELECTORS[selector](module, [(x.bfloat16(), y)])
    expected = torch.bfloat16 if selector == "magnitude" else torch.float32
    assert {value.dtype for value in found.values()} == {expected}


def test_the_random_selector_is_uniform_and_its_generators() -> None:
    layer = nn.Linear(200, 100)
    first, again, other = (
        weights.random(layer, generator=torch.Generator().manual_seed(seed))["weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert_close(first.mean().item(), 0.5, atol=4 / (12 * 20_000) ** 0.5, rtol=0)  # four standard errors
    assert 0 <= first.min() < 0.001
    assert 0.999 < first.max() < 1


def test_magnitude_is_the_weights_size() -> None:
    layer = nn.Linear(3, 2)
    assert torch.equal(weights.magnitude(layer)["weight"], layer.weight.detach().abs())


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 4))
        self.table = nn.Embedding(9, 4)
        self.output = nn.Linear(4, 9)
        self.output.weight = self.table.weight
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.transposed = nn.ConvTranspose1d(4, 4, 3)
        self.depthwise = nn.Conv3d(4, 4, 3, groups=4)
        self.recurrent = nn.LSTM(4, 4, proj_size=2)
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norms = nn.ModuleList([nn.LayerNorm((3, 4)), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm((3, 4))])
        self.slope = nn.PReLU(4)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_weights_are_pruned_and_biases_norms_embeddings_and_what_is_frozen_are_not() -> None:
    module = Everything()
    found = weights.prunable(module)
    assert sorted(found) == sorted(
        [
            "twice.weight",
            "transposed.weight",
            "depthwise.weight",
            "recurrent.weight_ih_l0",
            "recurrent.weight_hh_l0",
            "recurrent.weight_hr_l0",
            "cell.weight_ih",
            "cell.weight_hh",
            "attention.q_proj_weight",
            "attention.k_proj_weight",
            "attention.v_proj_weight",
            "attention.out_proj.weight",
            "bilinear.weight",
        ]
    )
    assert all(value is module.get_parameter(name) for name, value in found.items())
    assert "in_proj_weight" in weights.prunable(nn.MultiheadAttention(4, 2))


def test_an_embedding_can_be_scored_by_its_name() -> None:
    table = nn.Embedding(9, 4)
    assert not weights.prunable(table)
    assert list(weights.magnitude(table, parameters={"weight": table.weight})) == ["weight"]


@pytest.mark.parametrize("selector", ["obd", "obd-sd"])
def test_a_frozen_parameter_has_no_curvature(selector: str) -> None:
    module, (x, y) = made(linear_net)
    module[0].weight.requires_grad_(False)
    frozen = {"0.weight": module[0].weight}
    score = {
        "obd": lambda: weights.obd(module, [x], parameters=frozen),
        "obd-sd": lambda: weights.obd_sd(module, cross_entropy(module), [(x, y)], parameters=frozen),
    }
    with pytest.raises(ValueError, match=r"`parameters` must be trainable .* but '0\.weight' is not\. Unfreeze it"):
        score[selector]()


def test_errors_of_the_importance_are_passed_on() -> None:
    module, (x, y) = made(linear_net)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        weights.obd(module, [])
    with pytest.raises(ValueError, match="`statistic` must be 'sd', 'rms' or 'variance', but got 'mad'"):
        weights.obd_sd(module, cross_entropy(module), [(x, y)], statistic="mad")


def test_what_a_users_selector_returns_is_checked() -> None:
    like = weights.prunable(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    good = {name: torch.rand_like(p) for name, p in like.items()}
    good["1.weight"][0, 0] = torch.inf  # to be kept in any case
    weights.check_saliency(good, like)
    with pytest.raises(TypeError, match="must return the saliency of each parameter by its name, but got list"):
        weights.check_saliency(list(good.values()), like)
    with pytest.raises(ValueError, match=r"pruned, 0\.weight, 1\.weight, but it misses '1\.weight'"):
        weights.check_saliency({"0.weight": good["0.weight"]}, like)
    with pytest.raises(ValueError, match=r"but it adds '0\.bias'"):
        weights.check_saliency({**good, "0.bias": torch.zeros(3)}, like)
    with pytest.raises(TypeError, match=r"The saliency of '0\.weight' must be a tensor, but got float"):
        weights.check_saliency({**good, "0.weight": 1.0}, like)
    with pytest.raises(ValueError, match=r"'0\.weight' must have the parameter's shape \(3, 2\), but has \(2, 3\)"):
        weights.check_saliency({**good, "0.weight": good["0.weight"].T}, like)
    with pytest.raises(ValueError, match=r"must not be NaN, but that of '1\.weight' is in 1 places"):
        weights.check_saliency({**good, "1.weight": torch.tensor([[1.0, torch.nan, 1.0]])}, like)


def places(number: int, width: int = 1) -> Tensor:
    return torch.arange(number * width).view(number, width)


def made_by(layer: str, number: int) -> tuple[Slices, Slices]:
    return Slices(f"{layer}.weight", 0, places(number)), Slices(f"{layer}.bias", 0, places(number))


HIDDEN = UnitGroup(("0",), 5, made_by("0", 5), (), (Slices("2.weight", 1, places(5)),))
CHANNELS = [
    UnitGroup(("0",), 3, made_by("0", 3), (), (Slices("3.weight", 1, places(3)),)),
    UnitGroup(("3",), 4, made_by("3", 4), (), (Slices("6.weight", 1, places(4)),)),
]


def test_a_units_score_is_the_sum_over_the_weights_and_bias_that_make_it() -> None:
    module, _ = made(pooled_net)
    saliency = {name: torch.rand_like(p) for name, p in units.incoming(module, CHANNELS).items()}
    assert list(saliency) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    for group, score in zip(CHANNELS, units.summed(saliency, CHANNELS), strict=True):
        (layer,) = group.layers
        for unit in range(group.num_units):
            expected = sum(value for value in saliency[f"{layer}.weight"][unit].flatten())
            assert_close(score[unit], expected + saliency[f"{layer}.bias"][unit])
        assert score.shape == (group.num_units,)


def test_units_spread_over_places_and_layers_are_summed_over_all_of_them() -> None:
    saliency = {"a": torch.rand(2, 6, 3).double(), "b": torch.rand(3).double(), "c": torch.rand(3, 2).half()}
    spread = torch.tensor([[5, 0], [1, 2], [4, 3]])
    group = UnitGroup(
        ("a", "c"), 3, (Slices("a", 1, spread), Slices("b", 0, places(3)), Slices("c", 0, places(3))), (), ()
    )
    (score,) = units.summed(saliency, [group])
    for unit in range(3):
        expected = saliency["a"][:, spread[unit, 0]].sum() + saliency["a"][:, spread[unit, 1]].sum()
        assert_close(score[unit], expected + saliency["b"][unit] + saliency["c"][unit].float().sum())


def test_scores_of_units_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"'0\.bias' is not among 0\.weight"):
        units.summed({"0.weight": torch.zeros(5, 4)}, [HIDDEN])
    with pytest.raises(ValueError, match=r"'0\.weight' is not among weight, bias"):
        units.incoming(nn.Linear(1, 1), [HIDDEN])
    with pytest.raises(ValueError, match="must be made by a weight, but those of 0 have none"):
        units.summed({}, [UnitGroup(("0",), 5, (), (), ())])


class Planted(nn.Module):
    """A loss that is less by the ``worth`` of each of its units: minus their sum."""

    def __init__(self, worth: Tensor) -> None:
        super().__init__()
        self.make = nn.Linear(1, len(worth)).to(worth)
        self.norm = nn.BatchNorm1d(len(worth), eps=0.0).to(worth)
        self.read = nn.Linear(len(worth), 1, bias=False).to(worth)
        nn.init.zeros_(self.make.weight)
        nn.init.ones_(self.make.bias)
        nn.init.ones_(self.norm.bias)
        self.read.weight.data = -worth[None] / 2  # the norm makes 2 of 1, and 1 of 0

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(self.make(x)))[:, 0]

    def group(self, start: int, stop: int) -> UnitGroup:
        unit = torch.arange(start, stop)[:, None]
        return UnitGroup(
            ("make",),
            stop - start,
            (Slices("make.weight", 0, unit), Slices("make.bias", 0, unit)),
            (Slices("norm.weight", 0, unit), Slices("norm.bias", 0, unit)),
            (Slices("read.weight", 1, unit),),
        )


def drop(module: Planted, num_masks: int, ridge: float, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """The damages, and what the masks and their losses were, seen from the loss function."""
    dropped, losses = [], []

    def loss(x: Tensor) -> Tensor:
        gone = module.make.bias == 0
        # All traces of a unit go with it.
        assert bool((module.norm.weight[gone] == 0).all())
        assert bool((module.norm.bias[gone] == 0).all())
        assert bool((module.read.weight[:, gone] == 0).all())
        assert bool((module.norm.bias[~gone] == 1).all())
        dropped.append(gone)
        losses.append(module(x).mean())
        return losses[-1]

    total = module.make.out_features
    groups = [module.group(0, total // 3), module.group(total // 3, total)]
    damage = units.dropout_damage(
        module,
        groups,
        [torch.ones(3, 1, dtype=torch.double)],
        loss=loss,
        generator=torch.Generator().manual_seed(0),
        num_masks=num_masks,
        ridge=ridge,
        **options,
    )
    assert [len(one) for one in damage] == [total // 3, total - total // 3]
    return torch.cat(damage), torch.stack(dropped), torch.stack(losses)


def test_planted_damages_are_recovered_and_a_useless_unit_has_none() -> None:
    worth = torch.linspace(-1, 2, 21).double()
    worth[7] = 0.0
    damage, _, _ = drop(Planted(worth), num_masks=200, ridge=1e-9)
    assert_close(damage, worth, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("num_masks", [20, 21, 22, 60], ids="masks={}".format)
@pytest.mark.parametrize("ridge", [0.01, 1.0], ids="ridge={}".format)
def test_damages_solve_the_ridge_regression_with_fewer_and_with_more_masks_than_units(
    num_masks: int, ridge: float
) -> None:
    torch.manual_seed(0)
    damage, dropped, losses = drop(Planted(torch.randn(21).double()), num_masks, ridge)
    # The definition as least squares: one column for the intercept, one row more for the penalty of each unit.
    share = dropped.double().mean()
    rows = torch.cat([torch.ones(num_masks, 1).double(), dropped.double()], 1) / num_masks**0.5
    penalty = (ridge * share * (1 - share)).sqrt() * torch.eye(22).double()[1:]
    targets = torch.cat([losses / num_masks**0.5, torch.zeros(21).double()])
    expected = torch.linalg.lstsq(torch.cat([rows, penalty]), targets[:, None]).solution[1:, 0]
    assert_close(damage, expected)


@pytest.mark.parametrize(("num_masks", "keep", "times"), [(50, 0.5, 25), (50, 0.9, 5), (7, 0.2, 6)])
def test_every_unit_is_dropped_equally_often_and_not_together(num_masks: int, keep: float, times: int) -> None:
    _, dropped, _ = drop(Planted(torch.ones(30).double()), num_masks, 0.1, keep=keep)
    assert dropped.sum(0).tolist() == [times] * 30
    assert len(dropped.unique(dim=1).T) > 5


def test_damages_do_not_depend_on_how_samples_are_batched_or_the_loss_is_given() -> None:
    module, (x, y) = made(linear_net)

    def run(batches: list[tuple[Tensor, Tensor]], reduction: str = "mean") -> Tensor:
        (damage,) = units.dropout_damage(
            module,
            [HIDDEN],
            iter(batches),
            loss=lambda batch: F.cross_entropy(module(batch[0]), batch[1], reduction=reduction),
            generator=torch.Generator().manual_seed(0),
            num_masks=20,
        )
        return damage

    assert_close(run([(x[:2], y[:2]), (x[2:], y[2:])]), run([(x, y)]))
    assert_close(run([(x, y)], "none"), run([(x, y)]))


def test_shards_of_damages_are_summed() -> None:
    module, (x, y) = made(linear_net)

    def run(batch: tuple[Tensor, Tensor], all_reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
        (damage,) = units.dropout_damage(
            module,
            [HIDDEN],
            [batch],
            loss=cross_entropy(module),
            generator=torch.Generator().manual_seed(0),
            num_masks=20,
            all_reduce=all_reduce,
        )
        return damage

    seen: list[list[Tensor]] = [[], []]
    for shard, part in enumerate([slice(0, 2), slice(2, 7)]):
        run((x[part], y[part]), lambda value, shard=shard: seen[shard].append(value.clone()) or value)
    totals = iter([one + two for one, two in zip(*seen, strict=True)])
    assert_close(run((x[:2], y[:2]), lambda _: next(totals)), run((x, y), None))


def spearman(one: Tensor, two: Tensor) -> float:
    ranks = torch.stack([one.argsort().argsort(), two.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_in_a_network_damages_rank_as_those_of_dropping_each_unit_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 4))
    module[3].weight.data *= torch.linspace(0.5, 3.0, 20)
    module[3].weight.data[:, 0] = 0  # a useless unit
    x = torch.randn(256, 8)
    batch = (x, module.eval()(x).detach().softmax(1))  # no network has less loss than this one
    module.train()
    group = UnitGroup(("0",), 20, made_by("0", 20), (), (Slices("3.weight", 1, places(20)),))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    (damage,) = units.dropout_damage(
        module, [group], [batch], loss=cross_entropy(module), generator=torch.Generator().manual_seed(0), keep=0.95
    )
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()
    alone = []
    with torch.no_grad():
        whole = cross_entropy(module)(batch)
        for unit in range(20):
            without = copy.deepcopy(module)
            without[3].weight[:, unit] = 0
            alone.append(cross_entropy(without)(batch) - whole)
    assert spearman(damage, torch.stack(alone)) > 0.9
    assert damage.argmin() == 0
    assert abs(damage[0]) < 0.02 * damage.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": []}, "`groups` must hold at least one group"),
        ({"keep": 1.0}, r"`keep` must lie in \(0, 1\), but got 1\.0"),
        ({"keep": 0.0}, r"`keep` must lie in \(0, 1\), but got 0\.0"),
        ({"ridge": 0.0}, r"`ridge` must be greater than 0, but got 0\.0"),
        (
            {"num_masks": 4, "keep": 0.9},
            r"drop and to keep each unit once, but got 4 with `keep=0\.9`\. Pass at least 11",
        ),
        ({"num_masks": 0}, "`num_masks` must be enough"),
        ({"batches": []}, "`batches` must hold at least one batch"),
        ({"loss": lambda batch: batch[0]}, r"loss a sample, \(7,\), but got shape \(7, 4\)"),
        ({"loss": lambda batch: batch[0].mean() / 0}, "`loss` must be finite with some units dropped"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    module, batch = made(linear_net)
    arguments = {"groups": [HIDDEN], "batches": [batch], "loss": cross_entropy(module), "num_masks": 20, **options}
    with pytest.raises(ValueError, match=message):
        units.dropout_damage(
            module, arguments.pop("groups"), arguments.pop("batches"), generator=torch.Generator(), **arguments
        )


def test_units_of_another_module_are_refused() -> None:
    module, batch = made(linear_net)
    group = UnitGroup(("0",), 5, made_by("0", 5), (), (Slices("9.weight", 1, places(5)),))
    with pytest.raises(ValueError, match=r"'9\.weight' is not among 0\.weight, 0\.bias, 2\.weight, 2\.bias"):
        units.dropout_damage(module, [group], [batch], loss=cross_entropy(module), generator=torch.Generator())
