"""Quantization: the grid against loops and laws, copies that leave the original alone, torchao's integers."""

from __future__ import annotations

import functools
import io
import logging
import math
import random
import subprocess
import sys
import types
from collections.abc import Callable

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_continual.compression.quantization import (
    channel_dims,
    dequantize_affine,
    detached_copy,
    fake_quantized,
    quantize_affine,
    quantized,
    stored_bytes,
)

BITS = [16, 8, 6, 4, 3, 2, 1]
KINDS = ["int8-weight", "int4-weight", "int8-dynamic"]

over_bits = pytest.mark.parametrize("bits", BITS, ids="{}bits".format)


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def restored(x: Tensor, bits: int, dim: int | None = None) -> Tensor:
    return dequantize_affine(*quantize_affine(x, bits, dim=dim))


def nearest_level(row: list[float], bits: int) -> list[float]:
    """The definition: list all levels, take the nearest one to each value."""
    low, high = min(0.0, *row), max(0.0, *row)
    if low == high:
        return [0.0 for _ in row]
    step = (high - low) / (2**bits - 1)
    at_zero = math.floor(-low / step + 0.5)
    levels = [step * (code - at_zero) for code in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - value)) for value in row]


# --- The grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("shift", [-5.0, -0.3, 0.0, 0.3, 5.0])
def test_every_value_goes_to_the_nearest_level(bits: int, shift: float) -> None:
    x = values(0, 60) + shift
    assert_close(restored(x, bits), torch.tensor(nearest_level(x.tolist(), bits), dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_each_channel_has_a_grid_of_its_own(dim: int) -> None:
    x = values(1, 3, 4, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0]).double()
    codes, scale, zero_point = quantize_affine(x, 4, dim=dim)
    assert scale.shape == zero_point.shape == tuple(x.shape[i] if i == dim % 3 else 1 for i in range(3))
    for channel in range(x.shape[dim]):
        one = x.select(dim, channel)
        expected = torch.tensor(nearest_level(one.flatten().tolist(), 4), dtype=torch.float64).view_as(one)
        assert_close(dequantize_affine(codes, scale, zero_point).select(dim, channel), expected)


@over_bits
@pytest.mark.parametrize("dim", [None, 0])
def test_the_error_is_at_most_half_a_step(bits: int, dim: int | None) -> None:
    for seed in range(20):
        x = values(seed, 4, 50) + seed / 5 - 2
        codes, scale, zero_point = quantize_affine(x, bits, dim=dim)
        error = (dequantize_affine(codes, scale, zero_point) - x).abs()
        assert bool((error <= scale / 2 * (1 + 1e-9)).all())
        assert int(codes.min()) == 0
        assert int(codes.max()) == 2**bits - 1


@over_bits
def test_the_error_in_single_precision_is_half_a_step_and_a_rounding(bits: int) -> None:
    x = values(3, 10_000, dtype=torch.float32)
    codes, scale, zero_point = quantize_affine(x, bits)
    # x / s + z is below 2**16 and rounded twice to 24 bits: the code is off by 2**-8 at most.
    assert float((dequantize_affine(codes, scale, zero_point) - x).abs().max()) <= float(scale) * (0.5 + 2**-7)


@over_bits
@pytest.mark.parametrize("dim", [None, 0])
def test_zero_stays_zero_to_the_bit(bits: int, dim: int | None) -> None:
    x = values(4, 6, 30) + 0.7
    x[:, ::3] = 0.0
    x[2] = 0.0
    assert bool((restored(x, bits, dim)[x == 0] == 0).all())


@over_bits
@pytest.mark.parametrize("dim", [None, 0])
def test_a_grid_is_quantized_to_itself(bits: int, dim: int | None) -> None:
    for seed in range(20):
        once, *_ = first = quantize_affine(values(seed, 4, 50) + seed / 5 - 2, bits, dim=dim)
        again, *_ = second = quantize_affine(dequantize_affine(*first), bits, dim=dim)
        assert torch.equal(again, once)
        assert_close(dequantize_affine(*second), dequantize_affine(*first))


def test_a_range_with_zero_half_way_between_two_levels_is_quantized_to_itself() -> None:
    for bits in BITS:
        num_steps = 2**bits - 1
        for below in range(min(num_steps, 8)):  # steps from the lowest value to zero, and another half
            x = torch.tensor([-below - 0.5, 0.3, num_steps - below - 0.5], dtype=torch.float64)
            codes, *_ = quantize_affine(x, bits)
            assert (int(codes.min()), int(codes.max())) == (0, num_steps)
            assert_close(restored(restored(x, bits), bits), restored(x, bits))


@over_bits
@pytest.mark.parametrize("factor", [0.37, 8.0, 1e-200, 1e200], ids=str)
def test_a_positive_factor_is_one_of_the_scale(bits: int, factor: float) -> None:
    x = values(5, 100)
    codes, scale, zero_point = quantize_affine(x, bits)
    codes_of_scaled, scale_of_scaled, zero_point_of_scaled = quantize_affine(factor * x, bits)
    assert torch.equal(codes_of_scaled, codes)
    assert torch.equal(zero_point_of_scaled, zero_point)
    assert_close(scale_of_scaled / factor, scale)


@over_bits
def test_a_sign_mirrors_the_codes(bits: int) -> None:
    x = values(6, 100)
    codes, scale, zero_point = quantize_affine(x, bits)
    mirrored, same_scale, mirrored_zero_point = quantize_affine(-x, bits)
    assert torch.equal(mirrored, 2**bits - 1 - codes)
    assert torch.equal(mirrored_zero_point, 2**bits - 1 - zero_point)
    assert_close(same_scale, scale)


def test_what_is_all_zero_has_scale_one() -> None:
    for dim in (None, 0):
        codes, scale, _ = quantize_affine(torch.zeros(3, 2), 4, dim=dim)
        assert not codes.any()
        assert bool((scale == 1).all())


def test_a_range_wider_than_the_dtype_does_not_overflow() -> None:
    x = torch.tensor([-3e38, 0.0, 3e38])
    assert_close(restored(x, 8), x, rtol=0, atol=3e38 / 255 * 1.001)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_scale_in_single(dtype: torch.dtype) -> None:
    x = values(7, 50, dtype=dtype)
    _, scale, _ = quantize_affine(x, 8)
    assert scale.dtype == torch.float32
    assert_close(restored(x, 8), restored(x.float(), 8), rtol=0, atol=0)


def test_a_number_alone_is_a_level() -> None:
    assert_close(restored(torch.tensor(-2.5), 2), torch.tensor(-2.5))
    assert_close(restored(torch.tensor([1.0, -2.0]), 2, dim=0), torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("bits", [0, 17, -1, 2.5, "8"])
def test_bits_outside_their_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"`bits` must be an integer from 1 to 16, but got {bits!r}"):
        quantize_affine(torch.ones(1), bits)
    with pytest.raises(ValueError, match="`bits` must be an integer from 1 to 16"):
        fake_quantized(nn.Linear(1, 1), bits)


def test_values_that_have_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="`x` must be finite, but holds NaN or infinite values"):
        quantize_affine(torch.tensor([1.0, math.nan]), 8)
    with pytest.raises(ValueError, match="`x` must be finite, but holds NaN or infinite values"):
        quantize_affine(torch.tensor([[1.0, -math.inf], [1.0, 2.0]]), 8, dim=0)
    with pytest.raises(ValueError, match=r"`x` must hold at least one value, but its shape is \(0, 3\)"):
        quantize_affine(torch.ones(0, 3), 8)
    with pytest.raises(TypeError, match=r"`x` must hold floating point numbers, but its dtype is torch\.int64"):
        quantize_affine(torch.tensor([1]), 8)
    for dim in (2, -3):
        with pytest.raises(ValueError, match=f"`dim` must be a dimension of `x`, which has 2, but got {dim}"):
            quantize_affine(torch.ones(1, 2), 8, dim=dim)


# --- Modules with rounded weights -------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose1d(4, 6, 2)
        self.table = nn.Embedding(5, 3)
        self.lstm = nn.LSTM(3, 2)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


def test_weights_of_layers_are_quantized_and_nothing_else() -> None:
    assert channel_dims(Everything()) == {
        "conv.weight": 0,
        "up.weight": 1,
        "table.weight": 0,
        "lstm.weight_ih_l0": 0,
        "lstm.weight_hh_l0": 0,
        "attention.in_proj_weight": 0,
        "attention.out_proj.weight": 0,
    }


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_a_copy_has_rounded_weights_and_the_rest_to_the_bit(bits: int, per: str) -> None:
    module = Everything()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = fake_quantized(module, bits, per=per)
    dims = channel_dims(module)
    for name, value in result.state_dict().items():
        assert torch.equal(module.state_dict()[name], before[name]), name
        expected = before[name]
        if name in dims or name == "head.weight":
            dim = dims.get(name, 0) if per == "channel" else None
            expected = restored(before[name], bits, dim)
            parts = expected.unbind(dim) if dim is not None else [expected]
            assert all(len(part.unique()) <= 2**bits for part in parts), name
        assert torch.equal(value, expected), name
    assert result.head.weight is result.table.weight


def test_fewer_bits_are_further_away_and_channels_are_nearer() -> None:
    layer = nn.Linear(40, 30).double()
    layer.weight.data = values(8, 30, 40) * values(9, 30, 1)
    x = values(10, 20, 40)

    def error(bits: int, per: str) -> float:
        return float((fake_quantized(layer, bits, per=per)(x) - layer(x)).detach().norm())

    errors = [error(bits, "tensor") for bits in (16, 8, 6, 4, 3, 2)]
    assert errors == sorted(errors)
    assert all(error(bits, "channel") < error(bits, "tensor") for bits in (8, 6, 4, 3, 2))


def test_a_copy_can_be_trained() -> None:
    result = fake_quantized(nn.Linear(2, 1), 4)
    result(torch.ones(1, 2)).sum().backward()
    assert result.weight.grad is not None


def test_half_precision_stays_half_precision() -> None:
    assert fake_quantized(nn.Linear(3, 2).bfloat16(), 4).weight.dtype == torch.bfloat16


def test_a_module_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`module` must have a weight to quantize, but BatchNorm1d has none"):
        fake_quantized(nn.BatchNorm1d(3), 8)


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`per` must be one of 'tensor', 'channel', but got 'row'\."):
        fake_quantized(nn.Linear(1, 1), 8, per="row")


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"Parameter '1\.weight' cannot be quantized: `x` must be finite"):
        fake_quantized(model, 8)


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [detached_copy, functools.partial(fake_quantized, bits=8), functools.partial(quantized, kind="int8-weight")],
)
def test_a_module_attached_to_a_trainer_is_copied_without_it(
    copied: Callable[[nn.Module], nn.Module], trainer: Callable[..., L.Trainer], data: L.LightningDataModule
) -> None:
    module = Classifier()
    one = trainer(max_epochs=1, limit_val_batches=0)
    one.fit(module, data)
    result = copied(module)
    assert module.trainer is one
    assert result._trainer is None
    x = torch.randn(3, 4)
    assert_close(result.eval()(x), module.eval()(x), atol=0.1, rtol=0)
    assert trainer().validate(result, data, verbose=False)


def test_a_method_that_is_wrapped_on_the_instance_is_the_copys_own() -> None:
    layer = nn.Linear(2, 1)
    calls = []

    @functools.wraps(layer.forward)
    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return forward.__wrapped__(x)

    layer.forward = forward
    result = detached_copy(layer)
    result.weight.data.zero_()
    assert torch.equal(result(torch.ones(1, 2)), result.bias[None])
    assert not calls
    assert layer.forward is forward


def test_a_function_that_a_user_put_there_stays() -> None:
    layer = nn.Linear(2, 1)
    layer.activation = torch.relu
    layer.forward = types.MethodType(lambda self, x: 3 * x, layer)
    result = detached_copy(layer)
    assert result.activation is torch.relu
    assert_close(result(torch.ones(1)), torch.tensor([3.0]))


# --- Integers by torchao ----------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def relative_error(small: nn.Module, full: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - full(x)).norm() / full(x).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "tolerance"), [("int8-weight", 0.02), ("int8-dynamic", 0.03), ("int4-weight", 0.2)])
def test_integers_compute_nearly_the_same_and_leave_the_original_alone(
    model: nn.Module, kind: str, tolerance: float, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = quantized(model, kind)
    for shape in ((64,), (1, 64), (7, 64), (2, 3, 64)):
        x = torch.randn(shape, dtype=dtype)
        assert 0 < relative_error(result, model, x) < tolerance
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result[0].bias.requires_grad
    assert not result[0].weight.requires_grad


def test_bytes_are_those_of_codes_scales_and_zero_points(model: nn.Module) -> None:
    # 8 bits: a byte a weight, 4 for the scale and 1 for the zero point of each row.
    for kind in ("int8-weight", "int8-dynamic"):
        result = quantized(model, kind)
        assert stored_bytes(result[0].weight) == 128 * 64 + 128 * 5
        assert stored_bytes(result[2].weight) == 10 * 128 + 10 * 5
    # 4 bits: half a byte a weight, 8 for each group of 64 inputs; ten outputs are no multiple of 16.
    result = quantized(model, "int4-weight")
    assert stored_bytes(result[0].weight) == 128 * 64 // 2 + 128 * 8
    assert stored_bytes(result[2].weight) == 10 * 128 + 10 * 5


@pytest.mark.parametrize(("num_inputs", "group"), [(256, 128), (192, 64), (96, 32)])
def test_four_bits_have_the_largest_group_that_divides_the_inputs(num_inputs: int, group: int) -> None:
    weight = quantized(nn.Linear(num_inputs, 16), "int4-weight").weight
    assert stored_bytes(weight) == 16 * num_inputs // 2 + 16 * num_inputs // group * 8


@pytest.mark.parametrize("kind", ["int8-weight", "int8-dynamic"])
def test_eight_bits_leave_zeros_where_they_are(model: nn.Module, kind: str) -> None:
    model[0].weight.data[:, ::2] = 0.0
    assert bool((quantized(model, kind)[0].weight.dequantize()[:, ::2] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_with_weights_only_and_computes_the_same(model: nn.Module, kind: str) -> None:
    result = quantized(model, kind)
    file = io.BytesIO()
    torch.save(result.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), result(x))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding="same")
        self.second = nn.Conv2d(16, 8, 3, groups=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.head = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depthwise(self.first(x).relu()).relu())
        return self.head(self.up(self.norm(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("kind", ["int8-weight", "int8-dynamic"])
def test_convolutions_have_eight_bits_where_that_is_smaller(kind: str) -> None:
    module = Vision().eval()
    result = quantized(module, kind)
    # A scale (4 bytes) and zero point (1) for each output channel and place of the kernel.
    assert stored_bytes(result.first.weight) == 16 * 3 * 9 + 16 * 9 * 5
    assert stored_bytes(result.second.weight) == 8 * 8 * 9 + 8 * 9 * 5
    assert stored_bytes(result.head.weight) == 32 * 8 + 32 * 5
    for name in ("depthwise.weight", "up.weight", "norm.weight"):
        assert torch.equal(result.get_parameter(name), module.get_parameter(name))
    assert relative_error(result, module, torch.randn(2, 3, 8, 8)) < 0.05


def test_a_layer_that_would_not_become_smaller_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 2)).bfloat16()
    result = quantized(model, "int8-weight")  # of the convolution: 1 + (2 + 1) / 2 bytes a weight, instead of 2
    assert type(result[0].weight) is nn.Parameter
    assert str(result[0]) == str(model[0])
    assert stored_bytes(result[2].weight) == 2 * 8 + 2 * 5
    x = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16)
    assert relative_error(result, model, x) < 0.02


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32, padding_idx=0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(x)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_shared_weights_stay_shared_and_attention_stays_as_it_is(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    module = Language().train(training)
    for dropout in (one for one in module.modules() if isinstance(one, nn.Dropout)):
        dropout.p = 0.0
    for layer in module.encoder.layers:
        layer.self_attn.dropout = 0.0
    result = quantized(module, kind)
    assert result.head.weight is result.table.weight
    assert stored_bytes(result.head.weight) == 48 * 32 + 48 * 5
    assert type(result.encoder.layers[0].self_attn.out_proj.weight) is nn.Parameter
    assert type(result.encoder.layers[0].linear1.weight) is not nn.Parameter
    assert result.training is training
    tokens = torch.randint(48, (2, 6))
    assert relative_error(result, module, tokens) < (0.15 if kind == "int4-weight" else 0.03)


def test_layers_of_other_classes_and_shared_with_them_are_left() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * 2).T

    module = nn.Sequential(nn.Linear(64, 32), Own(32, 16), nn.Linear(32, 32), nn.Embedding(64, 32, max_norm=1.0))
    module.raw = module[2].weight
    result = quantized(module, "int8-weight")
    assert stored_bytes(result[0].weight) < 4 * 64 * 32
    for number in (1, 2, 3):
        assert torch.equal(result[number].weight, module[number].weight)


@pytest.mark.parametrize(
    ("kind", "module", "needed"),
    [
        ("int8-weight", nn.Linear(64, 64).double(), "a linear layer, a 2d convolution or an embedding"),
        ("int8-weight", nn.Linear(1, 64), "a linear layer, a 2d convolution or an embedding"),
        ("int8-weight", nn.ConvTranspose2d(4, 4, 3), "a linear layer, a 2d convolution or an embedding"),
        ("int4-weight", nn.Linear(64, 10), "a linear layer whose inputs are a multiple of 32"),
        ("int4-weight", nn.Linear(48, 16), "a linear layer whose inputs are a multiple of 32"),
        ("int8-dynamic", nn.Conv2d(8, 8, 3), "a linear layer that becomes smaller by it"),
        ("int8-dynamic", nn.Embedding(8, 8), "a linear layer that becomes smaller by it"),
    ],
    ids=str,
)
def test_where_no_layer_can_be_served_an_error_says_what_is_needed(kind: str, module: nn.Module, needed: str) -> None:
    message = rf"`kind='{kind}'` needs {needed}.*but {type(module).__name__} has none\..*`fake_quantized`"
    with pytest.raises(ValueError, match=message):
        quantized(module, kind)


def test_what_is_quantized_already_is_not_quantized_again(model: nn.Module) -> None:
    result = quantized(model, "int8-weight")
    assert channel_dims(result) == {}
    with pytest.raises(ValueError, match="`module` must have a weight to quantize, but Sequential has none"):
        fake_quantized(result, 8)
    with pytest.raises(ValueError, match="but Sequential has none"):
        quantized(result, "int8-weight")


def test_an_unknown_kind_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="`kind` must be one of 'int8-weight', 'int4-weight', 'int8-dynamic', but got"):
        quantized(model, "int2-weight")


def test_a_torchao_without_four_bits_for_the_cpu_is_an_error_with_a_remedy(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantization.int4", None)
    with pytest.raises(ImportError, match=r"`kind='int4-weight'` needs 4-bit weights for the CPU, .* Install torchao"):
        quantized(model, "int4-weight")
    quantized(model, "int8-weight")


def test_nothing_of_the_process_is_changed(model: nn.Module) -> None:
    import torch._inductor.config as compiler

    def state() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.get_float32_matmul_precision(),
            compiler.coordinate_descent_tuning,
            compiler.force_fuse_int_mm_with_mul,
            list(logging.getLogger("torch.utils._pytree").filters),
        ]

    with compiler.patch(coordinate_descent_tuning=False, force_fuse_int_mm_with_mul=False):
        before = state()
        for kind in KINDS:
            quantized(model, kind)
        fake_quantized(model, 4)
        assert state() == before


@pytest.mark.slow
def test_importing_torchao_says_nothing_and_leaves_the_filters_of_warnings() -> None:
    code = """
import warnings
from torch import nn
from lightning_continual.compression.quantization import quantized
before = list(warnings.filters)
quantized(nn.Linear(32, 32), "int8-weight")
assert warnings.filters == before
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
