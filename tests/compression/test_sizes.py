"""Bytes and operations, against numbers that were counted by hand."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_continual.compression.quantization import fake_quantized, quantized
from lightning_continual.compression.sizes import check_kept, file_bytes, num_bytes, num_flops


def pruned(layer: nn.Module, num_kept: int, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A layer with that many weights left, and which."""
    order = torch.randperm(layer.weight.numel(), generator=torch.Generator().manual_seed(seed))
    kept = (order < num_kept).view(layer.weight.shape)
    layer.weight.data = torch.where(kept, 1.0, 0.0).to(layer.weight)
    return layer, {"weight": kept}


# --- Bytes ------------------------------------------------------------------------------------------------------------


def test_dense_values_count_at_their_dtype() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 3, bias=False).double(), nn.Linear(3, 3).bfloat16())
    assert num_bytes(model) == 4 * (10 * 20 + 20) + 8 * (20 * 3) + 2 * (3 * 3 + 3)


def test_statistics_of_norms_count_and_what_is_not_saved_does_not() -> None:
    norm = nn.BatchNorm1d(7)
    norm.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert (
        num_bytes(norm) == 4 * 4 * 7 + 8
    )  # weight, bias, mean, variance, and the number of batches as a 64-bit integer


def test_what_is_shared_counts_once() -> None:
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11, bias=False))
    model[1].weight = model[0].weight
    model.again = model[0]
    assert num_bytes(model) == 4 * 55
    one = nn.BatchNorm1d(2, affine=False)
    assert num_bytes(nn.Sequential(one, one)) == 4 * 4 + 8


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [
        (4000, 4 * 4000),  # dense: a mask would be 500 bytes more
        (3990, 4 * 4000),
        (3870, 500 + 4 * 3870),
        (2000, 500 + 4 * 2000),  # a bit for each place
        # Of each weight 6 bits for one of 50 columns, 81 times the bits of a number up to that of the weights.
        (100, 4 * 100 + 75 + 71),
        (63, 4 * 63 + math.ceil(63 * 6 / 8) + math.ceil(81 * 6 / 8)),
        (64, 4 * 64 + math.ceil(64 * 6 / 8) + math.ceil(81 * 7 / 8)),
        (1, 4 + 1 + 11),
        (0, 0),
    ],
)
def test_the_cheapest_form_of_a_sparse_tensor_counts(num_kept: int, expected: int) -> None:
    layer, kept = pruned(nn.Linear(50, 80, bias=False), num_kept)
    assert num_bytes(layer, kept=kept) == expected
    assert num_bytes(layer) == 16_000


def test_convolutions_are_rows_of_output_channels() -> None:
    layer, kept = pruned(nn.Conv2d(8, 4, 3, bias=False), 10)  # 4 rows of 72, 7 bits a column, 4 bits a number up to 10
    assert num_bytes(layer, kept=kept) == 40 + math.ceil(70 / 8) + math.ceil(5 * 4 / 8)


@pytest.mark.parametrize(("columns", "width"), [(64, 6), (65, 7), (128, 7)])
def test_a_column_takes_the_bits_that_tell_it_from_the_others(columns: int, width: int) -> None:
    layer, kept = pruned(nn.Linear(columns, 4, bias=False), 8)
    assert num_bytes(layer, kept=kept) == 4 * 8 + width + math.ceil(5 * 4 / 8)


def test_a_vector_may_be_sparse_too() -> None:
    layer = nn.Linear(1, 64)
    layer.bias.data = (torch.arange(64) % 8 == 0).float()
    assert num_bytes(layer, kept={"bias": layer.bias > 0}) == 4 * 64 + 4 * 8 + 8  # a mask of 8 bytes


@pytest.mark.parametrize(
    ("bits", "values", "zero_point"), [(16, 2000, 2), (9, 1125, 2), (8, 1000, 1), (6, 750, 1), (3, 375, 1), (2, 250, 1)]
)
def test_quantized_values_are_packed_and_have_a_scale_and_a_zero_point(bits: int, values: int, zero_point: int) -> None:
    layer = nn.Linear(50, 20)
    assert num_bytes(layer, bits=bits) == values + 4 + zero_point + 4 * 20
    assert num_bytes(layer, bits=bits, per="channel") == values + 20 * (4 + zero_point) + 4 * 20
    assert num_bytes(fake_quantized(layer, bits), bits=bits) == num_bytes(layer, bits=bits)


def test_channels_of_a_transposed_convolution_are_its_second_dimension() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    assert num_bytes(layer, bits=8, per="channel") == 3 * 5 * 4 + 5 * 5 + 4 * 5


def test_bits_may_differ_from_weight_to_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    norm = num_bytes(model[2])
    assert num_bytes(model, bits={"0.weight": 4}) == (32 + 5) + 4 * 64 + norm
    assert num_bytes(model, bits={"0.weight": 4, "1.weight": 2}) == (32 + 5) + (16 + 5) + norm
    assert num_bytes(model, bits={}) == num_bytes(model)


def test_pruned_and_quantized_is_both() -> None:
    layer, kept = pruned(nn.Linear(50, 80, bias=False), 100)
    assert num_bytes(layer, kept=kept, bits=4) == 50 + 75 + 71 + 5
    layer, kept = pruned(nn.Linear(50, 80, bias=False), 2000)
    assert num_bytes(layer, kept=kept, bits=4) == 500 + 1000 + 5
    layer, kept = pruned(nn.Linear(50, 80, bias=False), 3500)  # a mask would be dearer than zeros of 4 bits
    assert num_bytes(layer, kept=kept, bits=4) == 2000 + 5


def test_the_size_of_a_sparse_tensor_grows_with_what_is_kept() -> None:
    sizes = [num_bytes(layer, kept=kept) for layer, kept in (pruned(nn.Linear(9, 7), n) for n in range(64))]
    assert sizes == sorted(sizes)


def test_torchaos_tensors_count_as_what_they_are_made_of() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
    rest = 4 * (32 + 10) + num_bytes(model[1])
    eight = (64 * 32 + 5 * 32) + (32 * 10 + 5 * 10)
    assert num_bytes(quantized(model, "int8-weight")) == eight + rest
    four = (64 * 32 // 2 + 8 * 32) + (32 * 10 + 5 * 10)
    assert num_bytes(quantized(model, "int4-weight")) == four + rest
    kept = {"0.weight": torch.zeros(32, 64, dtype=torch.bool)}
    assert num_bytes(quantized(model, "int8-weight"), kept=kept, bits=2) == eight + rest  # it stores zeros, too


def test_the_file_is_what_torch_save_writes() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file_bytes(model) == len(file.getvalue())
    assert num_bytes(model) < file_bytes(model) < num_bytes(model) + 6000
    large = nn.Linear(512, 512)
    assert file_bytes(quantized(large, "int8-weight")) < file_bytes(large) / 3.5


def test_masks_that_do_not_fit_are_refused() -> None:
    layer = nn.Linear(3, 2)
    fine = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`kept` must name parameters of the module, but got 'wait'\."):
        num_bytes(layer, kept={"wait": fine})
    with pytest.raises(
        ValueError, match=r"`kept` must have the parameters' shapes, but 'weight' has \(3, 2\) for \(2, 3"
    ):
        num_bytes(layer, kept={"weight": fine.T})
    with pytest.raises(TypeError, match=r"`kept` must hold booleans, but 'weight' has dtype torch\.float32"):
        num_bytes(layer, kept={"weight": fine.float()})
    with pytest.raises(
        ValueError, match=r"Weights that are not kept must be zero, but 'weight' has some that are not\."
    ):
        num_bytes(layer, kept={"weight": ~fine})
    check_kept({"weight": ~fine}, layer)


def test_bits_that_do_not_fit_are_refused() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"`bits` must name weights that `channel_dims` gives .*, but got 'bias'"):
        num_bytes(layer, bits={"bias": 8})
    for bits in (0, 17, 2.5):
        with pytest.raises(ValueError, match=rf"`bits` must be integers from 1 to 16, but got {bits} for 'weight'"):
            num_bytes(layer, bits=bits)
    with pytest.raises(ValueError, match="`per` must be one of 'tensor', 'channel', but got 'row'"):
        num_bytes(layer, bits=8, per="row")


# --- Operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(3, 4), (2, 3), 2 * 2 * 3 * 4),
        (nn.Conv2d(3, 8, 3), (2, 3, 6, 6), 2 * 2 * 16 * 8 * 27),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 5, 5), 2 * 25 * 8 * 9),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), (5, 3), 2 * 5 * (12 + 4)),
        (nn.LSTM(8, 16, num_layers=2, bidirectional=True), (2, 5, 8), 2 * 10 * 2 * 64 * (8 + 16 + 32 + 16)),
        (nn.GRU(8, 16, batch_first=True), (2, 5, 8), 2 * 10 * 48 * (8 + 16)),
        # Four projections, keys by queries and weights by values, the two layers of the feed-forward part.
        (
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            (2, 5, 32),
            2 * 2 * (5 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 5 * 5 * 32),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_two_for_each_multiplication_and_addition(
    module: nn.Module, shape: tuple[int, ...], expected: int, frozen: bool
) -> None:
    assert num_flops(module.requires_grad_(not frozen), torch.ones(shape)) == expected


def test_smaller_layers_cost_less_and_zeros_do_not() -> None:
    layer = nn.Linear(100, 100)
    layer.weight.data[:50] = 0.0
    assert num_flops(layer, torch.ones(1, 100)) == 20_000
    assert num_flops(nn.Linear(100, 50), torch.ones(1, 100)) == 10_000


@pytest.mark.parametrize("kind", ["int8-weight", "int8-dynamic", "int4-weight"])
def test_integers_count_like_floating_point_numbers(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    for shape in ((64,), (5, 64), (2, 3, 64)):
        x = torch.ones(shape)
        assert num_flops(quantized(model, kind), x) == num_flops(model, x) == 2 * x[..., 0].numel() * 32 * (64 + 10)


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


def test_inputs_are_a_tensor_or_arguments_or_for_a_function() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    for inputs in ((a, b), {"b": b, "a": a}):
        assert num_flops(Product(), inputs) == 60
    assert num_flops(Product(), [a, b], forward=lambda module, pair: module(*pair) + module(*pair)) == 120


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout().eval()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.dropout(self.norm(self.layer(x + torch.rand_like(x))))


def test_counting_leaves_the_module_and_the_random_state_as_they_were() -> None:
    module = Restless()
    buffer = module.count
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [one.training for one in module.modules()]
    random = torch.get_rng_state()
    assert num_flops(module, torch.ones(3, 4)) == 2 * 3 * 16
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.count is buffer
    assert [one.training for one in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in module.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    module = Restless()
    buffer = module.count
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        num_flops(module, torch.ones(3, 5))
    assert module.training
    assert module.count is buffer
    assert module.count == 0
    assert torch.backends.mha.get_fastpath_enabled()
