"""Comparing small forms of trained networks, and saving the smallest that is good enough."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_continual.comparison import Plan, compare, compress, load_compressed
from lightning_continual.comparison.results import BEFORE, FINE_TUNED, LONG, SHORT, Row
from lightning_continual.comparison.setting import Setting

pytest.importorskip("torch_pruning")
pytest.importorskip("torchao")
pytest.importorskip("matplotlib")


class Net(L.LightningModule):
    """A module as users write them."""

    def __init__(self, hidden: int = 32, sloppy: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.epochs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.epochs.append(self.current_epoch)
            self.logger.experiment.add_scalar("begun", 1.0)  # a logger of one's own
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, steps)]


class Silent(Net):
    """A module without ``forward``."""

    forward = L.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self.head(self.body(batch[0])).argmax(1) == batch[1]).float().mean())


class ByName(Net):
    """A module whose batches are dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch["x"]).argmax(1) == batch["y"]).float().mean())


class ByHand(Net):
    """A module that makes its steps by itself."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__(hidden)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loaders()[0]

    def val_dataloader(self) -> DataLoader[Any]:
        return loaders()[1]


def samples(number: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(number) % 3
    x = torch.randn(number, 32, generator=generator) + 2.0 * nn.functional.one_hot(y, 32)
    return x, y


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    train, val = TensorDataset(*samples(96, 0)), TensorDataset(*samples(60, 1))
    return DataLoader(train, 16, shuffle=True), DataLoader(val, 30)


def setting(**options: Any) -> Setting:
    return Setting(**{"data": loaders(), "monitor": "val_acc", "accelerator": "cpu", **options})


def trained(seed: int = 0, kind: type[Net] = Net) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = kind()
    setting().fit(net, 4, seed)
    net.epochs.clear()
    return net


@pytest.fixture(scope="module")
def net() -> Net:
    return trained()


def listed(networks: Any, plan: Plan, how: Setting | None = None) -> list[tuple[Row, Any]]:
    return list(compare(networks, how or setting(), plan, verbose=False))


def accuracy(network: nn.Module) -> float:
    x, y = samples(60, 1)
    with torch.no_grad():
        return sum(int(network(one[None]).argmax() == label) for one, label in zip(x, y, strict=True)) / 60


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in network.named_parameters() if one.ndim > 1}


# --- The comparison ---------------------------------------------------------------------------------------------------


def test_every_score_is_that_of_the_network_beside_it(net: Net) -> None:
    for row, network in listed({0: net}, Plan(["magnitude", "merge"], [0.5], num_samples=None)):
        assert row.score == pytest.approx(accuracy(network)), row.name


def test_before_fine_tuning_the_smallest_weights_are_zero_and_nothing_else_has_changed(net: Net) -> None:
    plan = Plan(["magnitude"], [0.75], ["parameter"], [], scratch_epochs=0)
    _, (row, network), (tuned, after) = listed({0: net}, plan)
    assert (row.stage, tuned.stage) == (BEFORE, FINE_TUNED)
    number = sum(p.numel() for p in weights(net).values())
    assert number == 32 * 32 + 32 * 16 + 16 * 3
    gone = round(0.75 * number)
    threshold = sorted(float(one) for p in weights(net).values() for one in p.detach().abs().flatten())[gone]
    for name, p in net.named_parameters():
        expected = torch.where(p.abs() < threshold, 0.0, p) if p.ndim > 1 else p
        assert_close(network.get_parameter(name), expected, rtol=0, atol=0)
        if p.ndim > 1:
            assert_close(after.get_parameter(name) == 0, expected == 0)
    total = sum(p.numel() for p in net.parameters())
    assert row.num_parameters == tuned.num_parameters == total - gone
    assert row.num_flops == 2 * number
    bitmasks = sum(-(-p.numel() // 8) for p in weights(net).values())
    assert row.num_bytes <= 4 * (total - gone) + bitmasks
    assert row.num_bytes < row.file_bytes


def test_from_scratch_has_the_same_zeros_other_weights_and_its_own_number_of_epochs(net: Net) -> None:
    plan = Plan(["obd-sd"], [0.8], ["parameter"], [], epochs=2, scratch_epochs=5)
    found = {row.stage: network for row, network in listed({0: net}, plan)[1:]}
    assert {stage: network.epochs for stage, network in found.items()} == {
        BEFORE: [],
        FINE_TUNED: [0, 1],
        SHORT: [0, 1, 0, 1],  # of the fine-tuned network, and its own
        LONG: [0, 1, 0, 1, 2, 3, 4],
    }
    for name, p in weights(found[BEFORE]).items():
        for stage in (FINE_TUNED, SHORT, LONG):
            assert_close(found[stage].get_parameter(name) == 0, p == 0)
        assert not torch.equal(found[SHORT].get_parameter(name), found[FINE_TUNED].get_parameter(name))


def test_units_are_really_gone_and_widths_that_selectors_share_are_trained_once(net: Net) -> None:
    found = listed({0: net}, Plan(["magnitude", "obd"], [0.75], ["unit"], []))
    assert [(row.selector, row.stage) for row, _ in found[1:]] == [
        *(("magnitude", BEFORE), ("magnitude", FINE_TUNED), ("", SHORT), ("", LONG)),
        *(("obd", BEFORE), ("obd", FINE_TUNED)),
    ]
    for row, network in found[1:]:
        assert [tuple(p.shape) for p in weights(network).values()] == [(8, 32), (4, 8), (3, 4)]
        assert row.num_parameters == 8 * 32 + 8 + 4 * 8 + 4 + 3 * 4 + 3
        assert row.num_bytes == 4 * row.num_parameters
        assert row.num_flops == 2 * (8 * 32 + 4 * 8 + 3 * 4)


def test_nothing_passed_in_is_changed(net: Net) -> None:
    before, random, attributes = copy.deepcopy(net.state_dict()), torch.get_rng_state(), set(vars(net))
    listed({0: net}, Plan(["random"], [0.5]))
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(net)) == attributes
    assert not net.epochs


def test_seeds_decide_what_is_random_and_nothing_else(net: Net) -> None:
    plan = Plan(["random", "magnitude"], [0.5], ["parameter"], ["8"], scratch_epochs=1)
    first, second = (listed({0: net, 1: net}, plan) for _ in range(2))
    for (one, network), (two, again) in zip(first, second, strict=True):
        assert (one.name, one.seed, one.score) == (two.name, two.seed, two.score)
        assert_close(network.state_dict(), again.state_dict(), rtol=0, atol=0)
    by_seed: dict[Any, dict[str, Any]] = {0: {}, 1: {}}
    for row, network in first:
        by_seed[row.seed][row.name] = network.head.weight
    assert set(by_seed[0]) - set(by_seed[1]) == {"full", "8 bits per tensor"}  # of one network, once
    for name, weight in by_seed[1].items():
        assert torch.equal(weight, by_seed[0][name]) == (name == "magnitude, 50 % of weights, before"), name


def test_several_networks_are_each_compared_with_themselves() -> None:
    plan = Plan(["magnitude"], [0.0], ["parameter", "unit"], [], scratch_epochs=0)
    networks = {3: trained(3), 5: trained(5)}
    found = listed(networks, plan)
    assert [row.seed for row, _ in found if row.family == "full"] == [3, 5]
    for row, network in found:
        if row.stage == BEFORE:  # nothing is removed
            assert_close(network.state_dict(), networks[row.seed].state_dict(), rtol=0, atol=0)
            assert row.num_parameters == sum(p.numel() for p in network.parameters())


def test_quantized_networks_weigh_their_bits(net: Net) -> None:
    found = {row.name: (row, network) for row, network in listed({0: net}, Plan([], quantizations=None))}
    assert len(found) == 1 + 6 * 2 + 3
    num_weights = sum(p.numel() for p in weights(net).values())
    rest = 4 * (32 + 16 + 3)
    for bits in (8, 4, 2):
        row, network = found[f"{bits} bits per tensor"]
        assert row.num_bytes == sum(-(-p.numel() * bits // 8) + 5 for p in weights(net).values()) + rest
        assert all(len(p.unique()) <= 2**bits for p in weights(network).values())
        row, network = found[f"{bits} bits per channel"]
        assert row.num_bytes == -(-num_weights * bits // 8) + 5 * (32 + 16 + 3) + rest
    assert found["int8-weight"][0].num_bytes < found["full"][0].num_bytes / 2


def test_what_does_not_fit_is_left_out_where_all_was_asked_for_and_an_error_by_name(net: Net) -> None:
    small = Net(hidden=31)  # no multiple of 16
    small.body[2] = nn.Linear(31, 16)
    notes = {row.name: row.note for row, _ in listed({0: small}, Plan([]))}
    assert [name for name, note in notes.items() if note] == ["int4-weight"]
    with pytest.raises(ValueError, match=r"`kind='int4-weight'` needs a linear layer whose inputs"):
        listed({0: small}, Plan([], quantizations=["int4-weight"]))


def test_a_variant_that_cannot_be_is_left_out_with_the_reason_and_the_others_go_on(net: Net) -> None:
    def head_first(module: Any, batches: Any, parameters: Any) -> dict[str, Tensor]:
        return {name: torch.full_like(p, float(name != "head.weight")) for name, p in parameters.items()}

    found = listed({0: net}, Plan([head_first, "magnitude"], [0.1], ["parameter"], [], scratch_epochs=0))
    (row, network), *others = found[1:]
    assert network is None
    assert math.isnan(row.score)
    assert "'head.weight' would lose all of its 48" in row.note
    assert [one.name for one, _ in others] == [
        "magnitude, 10 % of weights, before",
        "magnitude, 10 % of weights, fine-tuned",
    ]


def test_a_module_without_forward_can_lose_weights_and_has_no_count_of_operations() -> None:
    silent = trained(kind=Silent)
    plan = Plan(["magnitude", "obd-sd"], [0.5], ["parameter"], ["8"], scratch_epochs=1)
    found = listed({0: silent}, plan)
    assert len(found) == 2 + 2 * 4
    assert all(math.isnan(row.num_flops) and not math.isnan(row.score) for row, _ in found)


def test_of_batches_that_are_dictionaries_what_can_be_compared_is(net: Net) -> None:
    data = [{"x": x, "y": y} for x, y in zip(*samples(96, 0), strict=True)]
    how = setting(data=(DataLoader(data, 16), DataLoader(data, 48)))
    found = listed({0: ByName()}, Plan(["magnitude", "obd"], [0.5], quantizations=["8"], scratch_epochs=0), how)
    assert all(math.isnan(row.num_flops) for row, _ in found)
    assert [row.name for row, _ in found if not row.note] == [
        *("full", "8 bits per tensor", "magnitude, 50 % of weights, before", "magnitude, 50 % of weights, fine-tuned")
    ]
    assert all("calls the module with the first part of a batch" in row.note for row, _ in found[4:])


def test_a_selector_that_manual_optimization_cannot_serve_does_not_hold_up_the_others() -> None:
    found = listed({0: ByHand()}, Plan(["obd-sd", "magnitude"], [0.5], ["parameter"], [], scratch_epochs=0))
    assert ["Pass `loss=`" in row.note for row, _ in found] == [False, True, False, False]


def test_a_data_module_serves_as_well_as_loaders(net: Net) -> None:
    plan = Plan(["magnitude"], [0.5], ["unit"], ["4"])
    one, two = (listed({0: net}, plan, setting(data=data) if data else None) for data in (None, Data()))
    assert [(row.name, row.score) for row, _ in one] == [(row.name, row.score) for row, _ in two]


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (Plan(["obd-sd"], [0.75], ["parameter"], [], scratch_epochs=0), "obd-sd, 75 % of weights, fine-tuned"),
        (Plan(["obd-sd"], [0.75], ["unit"], [], scratch_epochs=0), "obd-sd, 75 % of units, fine-tuned"),
        (Plan([], quantizations=["8", "8-channel"]), "8 bits per tensor"),
        (Plan([], quantizations=["int8-weight"]), "int8-weight"),
        (Plan([], quantizations=["int4-weight"]), "int4-weight"),
        (Plan([], quantizations=["int8-dynamic"]), "int8-dynamic"),
        (Plan([], quantizations=[]), "full"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_recommended_file_holds_the_network_of_the_table(net: Net, tmp_path: Path, plan: Plan, name: str) -> None:
    tolerance = 0.5
    found = compress({0: net}, setting(), plan, tmp_path, tolerance=tolerance, verbose=False)
    assert found.recommended is not None
    assert found.recommended.row.name in (name, name.replace("fine-tuned", "before"))
    names = {path.name for path in tmp_path.iterdir()}
    assert (
        {"table.csv", "plot.png", "recommended.ckpt"}
        <= names
        <= {*("table.csv", "plot.png", "recommended.ckpt", "recommended.ckpt.gz")}
    )
    for path in tmp_path.glob("recommended.*"):
        loaded = load_compressed(path, Net())
        assert accuracy(loaded) == pytest.approx(found.recommended.row.score)
        if "of units" in name:
            assert loaded.body[0].out_features == 8
    if "weights" in name or "bits" in name or name == "full":
        plain = Net.load_from_checkpoint(tmp_path / "recommended.ckpt", weights_only=True)
        assert accuracy(plain) == pytest.approx(found.recommended.row.score)
    if "weights" in name:
        assert (tmp_path / "recommended.ckpt.gz").stat().st_size < (tmp_path / "recommended.ckpt").stat().st_size / 2


def test_the_smallest_within_the_tolerance_is_recommended_and_a_smaller_one_is_worse(net: Net, tmp_path: Path) -> None:
    plan = Plan(["magnitude"], [0.5, 0.97], ["unit"], ["2", "16"], scratch_epochs=2)
    found = compress({0: net, 1: net}, setting(), plan, tmp_path, tolerance=0.05, verbose=False)
    assert found.recommended is not None
    full, chosen = found.summaries[0].row, found.recommended.row
    assert chosen.score >= full.score - 0.05
    smaller = [one.row for one in found.summaries if one.row.num_bytes < chosen.num_bytes]
    assert smaller
    assert all(row.score < full.score - 0.05 for row in smaller)
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found.rows) == 1 + 2 + 2 * 2 * 4
    assert [float(row["score"]) for row in table] == [row.score for row in found.rows]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"Recommended: {chosen.name}: val_acc" in found.text
    assert "Net(...)" in found.text


def test_of_losses_the_lowest_is_the_best(net: Net, tmp_path: Path) -> None:
    how = setting(monitor="val_loss", lower_is_better=True)
    plan = Plan([], quantizations=["2", "8"])
    found = compress({0: net}, how, plan, tmp_path, tolerance=0.01, verbose=False)
    losses = {one.row.name: one.row.score for one in found.summaries}
    assert losses["2 bits per tensor"] > losses["full"] + 0.01
    assert found.recommended is not None
    assert found.recommended.row.name == "8 bits per tensor"
    assert "lower is better, tolerance 0.01" in found.text


@pytest.mark.parametrize(
    ("monitor", "is_error"),
    [
        *[("val_loss", True), ("valid_mse", True), ("test/RMSE", True), ("error_rate", True), ("val.perplexity", True)],
        *[("val_acc", False), ("val_score", False), ("terror", False), ("f1", False), ("valloss", True)],
    ],
)
def test_the_name_of_a_score_tells_whether_low_is_good_unless_told(monitor: str, is_error: bool) -> None:
    assert setting(monitor=monitor).lower_is_better is is_error
    assert setting(monitor=monitor, lower_is_better=not is_error).lower_is_better is not is_error


def test_a_folder_used_again_keeps_no_file_of_before(net: Net, tmp_path: Path) -> None:
    for plan in (Plan([], quantizations=["4"]), Plan([], quantizations=[])):
        compress({0: net}, setting(), plan, tmp_path, tolerance=1.0, verbose=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "recommended.ckpt", "table.csv"]


def test_a_comparison_that_is_broken_off_leaves_its_table_and_no_file_of_before(net: Net, tmp_path: Path) -> None:
    class Stops(Net):
        def on_train_start(self) -> None:
            raise RuntimeError("no space left")

    compress({0: net}, setting(), Plan([], quantizations=["4"]), tmp_path, tolerance=1.0, verbose=False)
    with pytest.raises(RuntimeError, match="no space left"):
        compress({0: Stops()}, setting(), Plan(["magnitude"], quantizations=["8"]), tmp_path, verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert "pruned" not in (tmp_path / "table.csv").read_text()


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amounts": [0.5, 1.0]}, r"`amount` must lie in \[0, 1\), but got 1.0"),
        ({"selectors": ["merge"], "levels": ["parameter"]}, r"`selector='merge'` scores whole units.*level='unit'"),
        ({"selectors": ["biggest"]}, r"`selector` must be one of .*'obd-sd'.*, but got 'biggest'"),
        ({"levels": ["layer"]}, r"`level` must be one of \('parameter', 'unit'\), but got 'layer'"),
        ({"levels": []}, r"`levels` must name one of .* but it is empty"),
        ({"epochs": 0}, r"`epochs` must be at least 1, but got 0"),
        ({"scratch_epochs": -1}, r"`scratch_epochs` must be at least 0, but got -1"),
        ({"num_samples": 0}, r"`num_samples` must be at least 1, but got 0"),
        ({"quantizations": ["17"]}, r"`quantizations` must be bits from 1 to 16.*but got '17'"),
        ({"selectors": ["obd", "magnitude", "obd"]}, r"`selectors` must differ by name, but 'obd' is there twice"),
        ({"selectors": [lambda: 1, lambda: 2]}, r"`selectors` must differ by name, but '<lambda>' is there twice"),
        ({"amounts": [0.5, 0.5]}, r"`amounts` must differ by name, but 0\.5 is there twice"),
        ({"levels": ["unit", "unit"]}, r"`levels` must differ by name, but 'unit' is there twice"),
        ({"quantizations": ["8", "8"]}, r"`quantizations` must differ by name, but '8' is there twice"),
        ({"quantizations": ["int3"]}, r"or one of \('int8-weight', .*but got 'int3'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_a_metric_that_is_not_logged_is_told_before_anything_is_trained(net: Net, tmp_path: Path) -> None:
    class Untrainable(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"`monitor='f1'` was not logged .* logged \['val_acc', 'val_loss'\]"):
        compress({0: Untrainable()}, setting(monitor="f1"), Plan(), tmp_path, verbose=False)


def test_bad_input_is_told(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`tolerance` must be at least 0, but got -0\.1"):
        compress({0: net}, setting(), Plan(), tmp_path, tolerance=-0.1)
    with pytest.raises(ValueError, match="`networks` must hold a trained network"):
        compress({}, setting(), Plan(), tmp_path)
    diverged = copy.deepcopy(net)
    diverged.head.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="full network's 'val_loss' must be a number, but it is NaN"):
        compress({0: diverged}, setting(monitor="val_loss"), Plan(), tmp_path, verbose=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "'bias' is not in the module"),
        (lambda: nn.ModuleDict({**dict(Net().named_children()), "more": nn.Linear(1, 1)}), "'more.bias' is missing"),
    ],
)
def test_a_checkpoint_of_another_module_is_told(
    net: Net, tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    torch.save(
        {"state_dict": {**net.state_dict(), **({} if "more" in message else {"bias": torch.zeros(2)})}},
        tmp_path / "a.ckpt",
    )
    with pytest.raises(ValueError, match=message.replace("'bias'", "'(bias|body.0.bias)'")):
        load_compressed(tmp_path / "a.ckpt", make())
