"""A compact network is smaller, gives the same outputs, and is a network like any other."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from lightning_continual.compression.surgery import compact, copy_of, resize_
from lightning_continual.compression.units import UnitGroup, unit_groups, zero_units_


def mlp(activation: type[nn.Module] = nn.Sigmoid) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Linear(4 * 9, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 2),
    )


class Depthwise(nn.Module):
    """As in a MobileNet: expand, filter each channel, squeeze and excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.expand, self.each = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.inner = nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.project, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = nn.functional.hardswish(self.inner(self.each(self.expand(x))))
        y = y * torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x + self.project(y), 1), 1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 3, groups=4)
        self.back, self.last = nn.ConvTranspose2d(16, 8, 3, groups=4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.back(self.second(self.first(x)).sigmoid()).tanh())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up, self.last = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(9, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x).relu()
        two = self.norm(self.two(nn.functional.max_pool2d(one, 2))).sigmoid()
        return self.head(self.last(torch.cat([one, self.up(two)], 1)).relu())


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Linear(16, 8), encoder, nn.Linear(8, 2))


class Tied(nn.Module):
    """Two layers have one weight, and a third one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 6), nn.Linear(3, 6, bias=False), nn.Linear(12, 2)
        self.two.weight = self.one.weight
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x).relu(), self.two(-x).tanh()
        return self.last(torch.cat([self.twice(one).sigmoid(), self.twice(two).sigmoid()], 1))


def small_resnet() -> nn.Module:
    return resnet18(weights=None, num_classes=10)


PIXELS = (1, 8, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3,)),
    "mlp_gelu": (lambda: mlp(nn.GELU), (3,)),
    "cnn": (lambda: nn.Sequential(nn.ZeroPad2d(1), cnn()), PIXELS),
    "depthwise": (Depthwise, PIXELS),
    "grouped": (Grouped, PIXELS),
    "unet": (UNet, PIXELS),
    "transformer": (transformer, (5, 3)),
    "tied": (Tied, (3,)),
    "resnet18": (small_resnet, (3, 32, 32)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in double precision with statistics away from their initial values, and inputs."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = make().double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return model, torch.randn(2, *shape, dtype=torch.double)


def random_kept(groups: list[UnitGroup], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(group.num_units, generator=generator) < 0.5 for group in groups]
    for keep in kept:
        keep[int(torch.randint(len(keep), (), generator=generator))] = True
    return kept


def first_half(groups: list[UnitGroup]) -> list[Tensor]:
    return [torch.arange(group.num_units) < group.num_units // 2 for group in groups]


def masked(model: nn.Module, groups: list[UnitGroup], kept: list[Tensor]) -> nn.Module:
    zeroed = copy.deepcopy(model)
    zero_units_(zeroed, groups, kept)
    return zeroed


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_network_with_zeros(name: str, seed: int) -> None:
    model, x = network(name, seed)
    groups = unit_groups(model, x)
    assert groups
    kept = random_kept(groups, seed)
    zeroed = masked(model, groups, kept)
    for small in (compact(model, x, kept=kept), compact(zeroed, x)):
        assert type(small) is type(model)
        assert_close(small(x), zeroed(x))
        assert not torch.allclose(small(x), model(x))
        assert count(small) < count(model)
        assert flops(small, x) < flops(model, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_fall_as_the_kept_units_say(name: str) -> None:
    model, x = network(name)
    groups = unit_groups(model, x)
    kept = random_kept(groups, 1)
    sizes = {name: list(p.shape) for name, p in model.named_parameters()}
    for group, keep in zip(groups, kept, strict=True):
        for slices in (*group.incoming, *group.norms, *group.outgoing):
            sizes[slices.parameter][slices.dim] -= int((~keep).sum()) * slices.places.shape[1]
    small = compact(model, x, groups=groups, kept=kept)
    assert {name: list(p.shape) for name, p in small.named_parameters()} == sizes
    assert count(small) == sum(math.prod(size) for size in sizes.values())


def test_half_a_network_has_the_parameters_counted_by_hand() -> None:
    model, x = network("cnn")
    small = compact(model, x, kept=first_half(unit_groups(model, x)))
    conv, conv2, linear, norm, last = small[1][0], small[1][3], small[1][7], small[1][8], small[1][9]
    assert (conv.in_channels, conv.out_channels, small[1][1].num_features) == (1, 3, 3)
    assert (conv2.in_channels, conv2.out_channels, small[1][4].num_features, small[1][5].num_parameters) == (3, 2, 2, 2)
    assert (linear.in_features, linear.out_features, norm.num_features, last.in_features) == (18, 2, 2, 2)
    #                      conv    norm    conv            norm    prelu linear   linear
    assert count(small) == 3 * 9 + 2 * 3 + 2 * 3 * 9 + 2 + 2 * 2 + 2 + 2 * 18 + 2 + 2 * 2 + 2


def test_groups_of_convolutions_are_counted_anew() -> None:
    model, x = network("grouped")
    small = compact(model, x, kept=[torch.tensor([True, False, True, True])])
    assert (small.first.out_channels, small.second.groups, small.second.in_channels) == (6, 3, 6)
    assert (small.second.out_channels, small.back.in_channels, small.back.groups) == (12, 12, 3)
    assert (small.back.out_channels, small.last.in_channels) == (6, 6)
    model, x = network("depthwise")
    small = compact(model, x, kept=first_half(unit_groups(model, x)))
    assert (small.each.groups, small.each.in_channels, small.each.out_channels) == (4, 4, 4)


def test_what_was_shared_is_shared() -> None:
    model, x = network("tied")
    small = compact(model, x, kept=first_half(unit_groups(model, x)))
    assert small.one.weight is small.two.weight
    assert (small.one.out_features, small.two.out_features) == (3, 3)


def test_without_removed_units_the_copy_is_the_module() -> None:
    model, x = network("unet")
    small = compact(model, x)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_module_is_not_touched_and_the_copy_is_like_it() -> None:
    model, x = network("depthwise")
    model.train()
    model.norm.eval()
    model.requires_grad_(False)
    model.expand.requires_grad_(True)
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradient = model.expand.weight.grad.clone()
    small = compact(model, x, kept=first_half(unit_groups(model, x)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.expand.weight.grad, gradient)
    assert all(p.grad is None for p in small.parameters())
    assert {name for name, p in small.named_parameters() if p.requires_grad} == {"expand.weight", "expand.bias"}
    modes = [(name, one.training) for name, one in model.named_modules()]
    assert modes == [(name, one.training) for name, one in small.named_modules()]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.is_contiguous() for p in small.parameters())
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.parameters()}


class Convolutional(Classifier):
    """A LightningModule as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )


@pytest.fixture
def fitted(trainer: Callable[..., L.Trainer]) -> Convolutional:
    torch.manual_seed(0)
    model = Convolutional()
    trainer(max_epochs=2).fit(model, loader(), loader())
    return model


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 5, 5, generator=generator), torch.arange(24) % 3
    return DataLoader(TensorDataset(x + y[:, None, None, None], y), batch_size=8)


def test_a_lightning_module_stays_one_that_trains_and_saves(
    fitted: Convolutional, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    x = next(iter(loader()))[0]
    kept = first_half(unit_groups(fitted, x))
    small = compact(fitted, x, kept=kept)
    assert type(small) is Convolutional
    assert fitted._trainer is not None
    assert small._trainer is None
    assert [keep.sum() for keep in kept] == [4, 6]
    before = copy.deepcopy(small.state_dict())
    again = trainer(max_epochs=2)
    again.fit(small, loader(), loader())
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters() if p.ndim > 1)
    assert float(again.callback_metrics["train_loss"]) < math.log(3)
    again.save_checkpoint(tmp_path / "small.ckpt")
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"]
    loaded = Convolutional()
    assert resize_(loaded, saved) is loaded
    loaded.load_state_dict(saved)
    assert (loaded.net[0].out_channels, loaded.net[1].num_features, loaded.net[4].in_features) == (4, 4, 36)
    assert torch.equal(loaded.eval()(x), small.eval()(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_module_takes_the_sizes_of_a_compact_one(name: str) -> None:
    model, x = network(name)
    small = compact(model, x, kept=random_kept(unit_groups(model, x), 2))
    fresh, _ = network(name, seed=7)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resize_(fresh, state).load_state_dict(state)
    assert str(fresh) == str(small)
    assert torch.equal(fresh(x), small(x))


def test_another_architecture_is_not_resized() -> None:
    with pytest.raises(ValueError, match=r"'weight' has shape \(3,\), but got \(2,\), which removing units does not"):
        resize_(nn.LayerNorm(3), nn.LayerNorm(2).state_dict())
    with pytest.raises(ValueError, match=r"'weight' has shape \(1, 1\), but got \(1, 1, 1\)"):
        resize_(nn.Linear(1, 1), nn.Conv1d(1, 1, 1).state_dict())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([torch.ones(8, dtype=torch.bool)], r"`kept` must hold one bool tensor a group, but got 1 for 2"),
        ([torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)], r"shape \(6,\) for the units of 2"),
        ([torch.zeros(8, dtype=torch.bool), torch.ones(6, dtype=torch.bool)], r"but got none of 0\. Keep at least one"),
    ],
    ids=["number", "shape", "nothing"],
)
def test_what_is_kept_must_fit(kept: list[Tensor], message: str) -> None:
    model, x = network("mlp")
    with pytest.raises(ValueError, match=message):
        compact(model, x, kept=kept)


def test_a_network_of_zeros_is_not_compacted_to_nothing() -> None:
    model, x = network("mlp")
    for p in model.parameters():
        nn.init.zeros_(p)
    with pytest.raises(ValueError, match="must keep a unit of every group, but got none of 0"):
        compact(model, x)


def test_a_module_that_cannot_be_traced_is_named() -> None:
    model, _ = network("mlp")
    with pytest.raises(ValueError, match="The graph of Sequential could not be traced: RuntimeError"):
        compact(model, torch.ones(1, 4, dtype=torch.double))


def test_a_copy_is_attached_to_no_trainer_and_hidden_modules_neither(fitted: Convolutional) -> None:
    outer = nn.Sequential(fitted)
    copied = copy_of(outer)
    assert copied[0]._trainer is None
    assert fitted._trainer is not None
    assert copied[0].hparams == fitted.hparams


@pytest.mark.parametrize(
    "name", [name if name != "resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_an_exported_program_gives_the_same_outputs(name: str) -> None:
    model, x = network(name)
    small = compact(model, x, kept=random_kept(unit_groups(model, x), 3))
    program = torch.export.export(small, (x,))
    assert_close(program.module()(x), small(x))


def test_a_lightning_module_is_exported(fitted: Convolutional) -> None:
    x = next(iter(loader()))[0]
    small = compact(fitted, x, kept=first_half(unit_groups(fitted, x))).eval()
    assert_close(torch.export.export(small, (x,)).module()(x), small(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = network(name)
    small: Any = compact(model, x, kept=random_kept(unit_groups(model, x), 3)).float()
    x = x.float()
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), small(x), atol=1e-5, rtol=1e-5)
