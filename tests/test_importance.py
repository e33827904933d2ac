import logging
import random

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_continual.importance import (
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    gradient_deviation,
    sampled_fisher,
    unit_activity,
)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)), rows(6)


def rows(*shape):
    return torch.randn(7, *shape, dtype=torch.double)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding="same")
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", bias=False)
        self.head = nn.Linear(6, 4)
        self.norm.running_mean.uniform_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.max_pool2d(x + F.relu(self.block(x)), 2)
        x = x + self.block(x)  # the same layer again, on a smaller map
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.embedding(x, self.embedding.weight, padding_idx=-1)
        return self.head(self.rnn(x)[0][:, -1])


class TiedTransformer(nn.Module):
    """Embedding and output projection share their weight; a bare parameter holds the positions."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(9, 8)
        self.positions = nn.Parameter(torch.randn(5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.project = nn.Linear(8, 9)
        self.project.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x) + self.positions
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.project(x).mean(1)


class Attentive(nn.Module):
    """Attention written with linear layers: sequence first, and normalised."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.places = nn.Embedding(5, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embedding(x.T) + self.places(torch.arange(5))[:, None]  # (T, B, 8)
        q, k, v = self.qkv(self.norm(x)).transpose(0, 1).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.rms(x.flatten(0, 1))).unflatten(0, (-1, 5)).mean(1)  # rows (B * T, 8)


class Frames(nn.Module):
    """Samples of several images each."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.norm(self.convolution(x.flatten(0, 1)))).mean((2, 3))
        return self.head(x).unflatten(0, (-1, 3)).mean(1)


class Odd(nn.Module):
    """A parametrised layer, a bare parameter, a layer never used, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.scale = nn.Parameter(torch.rand(8))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Bilinear(8, 8, 4)

    def forward(self, x):
        x = checkpoint(lambda x: self.frozen(torch.tanh(self.first(x))), x, use_reentrant=False) * self.scale
        return self.head(x, x)


def convolutions(*layers, shape):
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        units = model(rows(*shape)).flatten(1).shape[1]
    return nn.Sequential(*model, nn.Flatten(), nn.Linear(units, 4)), rows(*shape)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")

MODELS = {
    "mlp": mlp,
    "rows of several positions": lambda: (
        nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), Mean(1)),
        rows(5, 6),
    ),
    "residual": lambda: (Residual(), rows(3, 6, 6)),
    "lstm": lambda: (Recurrent(), torch.randint(9, (7, 5))),
    "tied transformer": lambda: (TiedTransformer(), torch.randint(9, (7, 5))),
    "tied transformer, sequence first": lambda: (TiedTransformer(False), torch.randint(9, (7, 5))),
    "attention by linear layers": lambda: (Attentive(), torch.randint(9, (7, 5))),
    "frames": lambda: (Frames(), rows(3, 2, 5, 5)),
    "odd": lambda: (Odd(), rows(6)),
    "depthwise": lambda: convolutions(
        nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 8, 2, groups=8), shape=(4, 6, 5)
    ),
    "strided, dilated, grouped": lambda: convolutions(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=2), shape=(4, 9, 8)
    ),
    "same": lambda: convolutions(nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), shape=(2, 6, 6)),
    "valid, reflected": lambda: convolutions(
        nn.Conv2d(2, 3, 3, padding="valid"), nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), shape=(2, 6, 6)
    ),
    "one dimension": lambda: convolutions(
        nn.Conv1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 3, groups=2), shape=(3, 9)
    ),
    "three dimensions": lambda: convolutions(
        nn.Conv3d(2, 4, 2, padding=1, groups=2), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 2), shape=(2, 3, 4, 3)
    ),
    "transposed": lambda: convolutions(
        nn.ConvTranspose2d(4, 6, 3, stride=(3, 2), padding=1, output_padding=1, dilation=(1, 2), groups=2),
        nn.GroupNorm(3, 6),
        nn.InstanceNorm2d(6, affine=True),
        shape=(4, 3, 4),
    ),
    "channels last": lambda: convolutions(
        ChannelsLast(), nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm([4, 4, 4]), shape=(3, 4, 4)
    ),
}


SLOW = ["lstm", "tied transformer", "tied transformer, sequence first", "attention by linear layers", "odd"]


class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.mean(self.dim)


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=MODELS, ids=str)
def case(request):
    """A module in evaluation mode, inputs and labels of seven samples."""
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model.double().eval(), inputs, torch.randint(4, (7,))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model, inputs = mlp()
    return model.double(), inputs, torch.randint(4, (7,))


def cross_entropy(model, **kwargs):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], **kwargs)


def batches_of(size, *tensors):
    split = [tensor.split(size) for tensor in tensors]
    return list(zip(*split, strict=True)) if len(tensors) > 1 else list(split[0])


def labels_of(model, x, seed):
    """Labels drawn from the model, sample by sample, by inverting the distribution function."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for sample in x:
        cumulative = F.softmax(model(sample[None])[0].detach(), 0).cumsum(0)
        uniform = torch.rand((), generator=generator, dtype=torch.double)
        labels.append(next(label for label, bound in enumerate(cumulative) if uniform <= bound))
    return torch.tensor(labels)


# Oracles


def test_the_empirical_fisher_is_the_mean_square_of_gradients_of_single_samples(case):
    model, x, y = case
    loss = cross_entropy(model)
    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, batches_of(4, x, y)), expected)


def test_the_exact_fisher_is_the_expectation_over_classes(case):
    model, x, _ = case
    assert_close(exact_fisher(model, batches_of(4, x)), oracles.exact_fisher(model, batches_of(1, x)))


def test_the_sampled_fisher_is_the_empirical_one_of_labels_drawn_from_the_model(case):
    model, x, _ = case
    y = labels_of(model, x, seed=3)
    found = sampled_fisher(model, batches_of(4, x), generator=torch.Generator().manual_seed(3))
    assert_close(found, oracles.empirical_fisher(model, cross_entropy(model), batches_of(1, x, y)))


def test_the_gradient_deviation_is_the_standard_deviation_over_samples(case):
    model, x, y = case
    loss = cross_entropy(model)
    expected = oracles.deviation(oracles.per_sample_gradients(model, loss, batches_of(1, x, y)))
    assert_close(gradient_deviation(model, loss, batches_of(4, x, y)), expected)


def test_the_batched_fisher_is_the_mean_square_of_gradients_of_batches(small):
    model, x, y = small
    loss = cross_entropy(model)
    batches = batches_of(3, x, y)
    assert_close(batched_fisher(model, loss, batches), oracles.batched_fisher(model, loss, batches))


def test_the_other_statistics_are_the_square_of_the_deviation_and_the_root_mean_square(small):
    model, x, y = small
    loss, batches = cross_entropy(model), batches_of(4, x, y)
    deviation = gradient_deviation(model, loss, batches)
    squares = {name: value.square() for name, value in deviation.items()}
    assert_close(gradient_deviation(model, loss, batches, statistic="variance"), squares)
    roots = {name: value.sqrt() for name, value in empirical_fisher(model, loss, batches).items()}
    assert_close(gradient_deviation(model, loss, batches, statistic="rms"), roots)


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_in_single_precision_the_relative_error_is_below_one_in_a_hundred_thousand(kind):
    torch.manual_seed(0)
    model, x = MODELS[kind]()
    y = torch.randint(4, (7,))
    model = model.double().eval()
    expected = oracles.empirical_fisher(model, cross_entropy(model), batches_of(1, x, y))
    model = model.float()
    found = empirical_fisher(model, cross_entropy(model), batches_of(4, x.float(), y))
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm()


def test_a_loss_in_which_samples_have_weights_counts_for_what_it_is_on_one_sample(small):
    model, x, y = small
    loss = cross_entropy(model, weight=torch.tensor([0.1, 1.0, 5.0, 2.0], dtype=torch.double))
    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, [(x, y)]), expected)


def test_a_loss_in_which_samples_interact_counts_for_what_it_is_on_one_sample(small):
    model, x, y = small

    def loss(batch):
        logits = model(batch[0])
        return F.cross_entropy(logits - logits.mean(0) / 2, batch[1])

    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, [(x, y)]), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6], ids="size={}".format)
def test_a_dimension_as_long_as_the_batch_is_not_taken_for_it(size):
    torch.manual_seed(0)
    model, x, y = Attentive().double(), torch.randint(9, (6, 5)), torch.randint(4, (6,))
    loss = cross_entropy(model)
    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, batches_of(size, x, y)), expected)


def test_rows_that_are_ordered_by_time_first_are_not_taken_for_samples():
    class Interleaved(nn.Linear):
        def forward(self, x):
            return super().forward(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).mean(0)

    torch.manual_seed(0)
    model, x, y = Interleaved(6, 4).double(), rows(3, 6), torch.randint(4, (7,))
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)  # uniform predictions
    assert_close(exact_fisher(model, [x]), oracles.exact_fisher(model, batches_of(1, x)))
    expected = oracles.empirical_fisher(model, cross_entropy(model), batches_of(1, x, y))
    assert_close(empirical_fisher(model, cross_entropy(model), [(x, y)]), expected)


def test_a_batch_in_which_samples_lose_their_rows_is_served(small):
    model, x, y = small

    def loss(batch):
        padded = F.pad(batch[0], (0, 0, 0, 1)) if len(batch[0]) == 2 else batch[0]
        return F.cross_entropy(model(padded)[: len(batch[0])], batch[1])

    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, batches_of(5, x, y)), expected)


def test_layers_that_are_called_for_some_batches_only_are_served(small):
    model, x, y = small
    extra = nn.Linear(4, 4).double()
    module = nn.ModuleList([model, extra])

    def loss(batch):
        logits = model(batch[0])
        return F.cross_entropy(extra(extra(logits)) if batch[0].sum() > x[6].sum() - 1e-9 else logits, batch[1])

    order = x.sum(1).argsort()
    batches = batches_of(1, x[order], y[order])
    assert_close(empirical_fisher(module, loss, batches), oracles.empirical_fisher(module, loss, batches))


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)], ids=str)
def test_many_samples_are_cut_into_parts_that_fit_the_memory_set_aside(monkeypatch, positions):
    monkeypatch.setattr("lightning_continual.importance.moments._WORKSPACE", 100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 4)).double()
    x, y = rows(*positions, 6), torch.randint(4, (7,))

    def loss(batch):
        return F.cross_entropy(model(batch[0]).flatten(1, -2).mean(1) if positions else model(batch[0]), batch[1])

    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, [(x, y)]), expected)


# Laws


@pytest.mark.parametrize("size", [1, 2, 3, 7], ids="size={}".format)
def test_results_do_not_depend_on_how_samples_are_batched(case, size):
    model, x, y = case
    loss = cross_entropy(model)
    batches, whole = batches_of(size, x, y), [(x, y)]
    assert_close(empirical_fisher(model, loss, batches), empirical_fisher(model, loss, whole))
    assert_close(gradient_deviation(model, loss, batches), gradient_deviation(model, loss, whole))
    assert_close(exact_fisher(model, batches_of(size, x)), exact_fisher(model, [x]))
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert_close(
        sampled_fisher(model, batches_of(size, x), generator=seeded[0]),
        sampled_fisher(model, [x], generator=seeded[1]),
    )


def test_results_do_not_depend_on_the_order_of_samples(small):
    model, x, y = small
    loss = cross_entropy(model)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    shuffled = batches_of(4, x[order], y[order])
    assert_close(empirical_fisher(model, loss, shuffled), empirical_fisher(model, loss, batches_of(4, x, y)))
    assert_close(exact_fisher(model, batches_of(4, x[order])), exact_fisher(model, batches_of(4, x)))


def test_sums_and_losses_of_single_samples_give_what_the_mean_gives(small):
    model, x, y = small
    batches = batches_of(4, x, y)
    mean = empirical_fisher(model, cross_entropy(model), batches)
    assert_close(empirical_fisher(model, cross_entropy(model, reduction="sum"), batches, reduction="sum"), mean)
    assert_close(empirical_fisher(model, cross_entropy(model, reduction="none"), batches), mean)


def test_on_batches_of_one_the_batched_fisher_is_the_empirical_one(small):
    model, x, y = small
    loss = cross_entropy(model)
    assert_close(batched_fisher(model, loss, batches_of(1, x, y)), empirical_fisher(model, loss, [(x, y)]))


def test_the_sampled_fisher_is_the_exact_one_on_average(small):
    model, x, _ = small
    many = x[:1].expand(4000, -1)
    exact = exact_fisher(model, [x[:1]])
    found = sampled_fisher(model, [many], generator=torch.Generator().manual_seed(0))
    for name, value in exact.items():
        # A mean over n draws of g**2 deviates by max(g**2) / sqrt(n), and max(g**2) < value / min(p), p > 0.1 here.
        assert (found[name] - value).norm() < 3 * 10 / 4000**0.5 * value.norm()


def test_frozen_parameters_are_left_out_and_unused_ones_have_importance_zero(small):
    model, x, y = small
    model[0].weight.requires_grad_(False)
    module = nn.ModuleDict({"model": model, "unused": nn.Linear(2, 2)})
    found = empirical_fisher(module, cross_entropy(model), [(x, y)])
    names = ["0.bias", "2.weight", "4.weight", "4.bias"]
    assert list(found) == [*(f"model.{name}" for name in names), "unused.weight", "unused.bias"]
    assert_close(found["unused.weight"], torch.zeros(2, 2))
    expected = oracles.empirical_fisher(module, cross_entropy(model), batches_of(1, x, y))
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_shape_and_type_of_the_parameters(small, dtype):
    model, x, y = small
    model = model.to(dtype)
    found = empirical_fisher(model, cross_entropy(model), [(x.to(dtype), y)])
    for name, parameter in model.named_parameters():
        assert found[name].shape == parameter.shape
        assert found[name].dtype == dtype
        assert not found[name].requires_grad


def test_a_batch_norm_in_half_precision_is_served():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    whole = empirical_fisher(model, cross_entropy(model), [(x, y)])
    model.bfloat16()
    half = empirical_fisher(model, cross_entropy(model), [(x.bfloat16(), y)])
    for name, value in whole.items():
        # Gradients have the precision of bfloat16, 1/256, and are squared.
        assert_close(half[name].float().sum(), value.sum(), rtol=0.05, atol=0)


def test_in_half_precision_squares_do_not_underflow(small):
    model, x, y = small
    expected = empirical_fisher(model, cross_entropy(model), [(x, y)])
    model = model.half()
    found = gradient_deviation(model, lambda b: cross_entropy(model)(b) / 1000, [(x.half(), y)], statistic="rms")
    for name, value in expected.items():
        # Gradients of about 1e-4 have the precision of half-precision subnormal numbers, 6e-8, and are squared exactly.
        assert_close(found[name].double() * 1000, value.sqrt(), rtol=1e-2, atol=1e-3)


def test_under_autocast_gradients_are_squared_in_the_parameters_type(small):
    model, x, y = small
    model, x = model.float(), x.float()

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model)(batch)

    expected = empirical_fisher(model, cross_entropy(model), [(x, y)])
    found = empirical_fisher(model, loss, [(x, y)])
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(empirical_fisher(model, loss, [(x, y)]), found, rtol=0, atol=0)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        # Two products in bfloat16 (precision 1/256) make the gradient, and it is squared.
        assert (found[name] - value).norm() < 8 / 256 * value.norm()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_caller_may_have_switched_gradients_off(small, context):
    model, x, y = small
    expected = empirical_fisher(model, cross_entropy(model), [(x, y)])
    with context():
        assert_close(empirical_fisher(model, cross_entropy(model), [(x, y)]), expected)


def test_what_the_loss_computes_without_gradients_does_not_count(small):
    model, x, y = small

    def loss(batch):
        with torch.no_grad():
            target = model(batch[0])
        return F.cross_entropy(model(batch[0]) + target, batch[1])

    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, [(x, y)]), expected)


def test_a_layer_may_change_the_output_of_the_one_before_in_place(small):
    _, x, y = small
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).double()
    expected = oracles.empirical_fisher(model, cross_entropy(model), batches_of(1, x, y))
    assert_close(empirical_fisher(model, cross_entropy(model), [(x, y)]), expected)


def test_a_batch_may_be_a_dictionary_with_strings():
    torch.manual_seed(0)
    model, x, y = Recurrent().double(), torch.randint(9, (7, 5)), torch.randint(4, (7,))
    batches = [{"x": x, "label": (y, ["a"] * 7)}]
    expected = oracles.empirical_fisher(model, cross_entropy(model), batches_of(1, x, y))
    found = empirical_fisher(model, lambda batch: F.cross_entropy(model(batch["x"]), batch["label"][0]), batches)
    assert_close(found, expected)


def test_an_embedding_with_sparse_gradients_gives_what_one_with_dense_gradients_gives():
    torch.manual_seed(0)
    x, y = torch.randint(9, (7, 5)), torch.randint(4, (7,))
    table = nn.Embedding(9, 5, sparse=True)
    module = nn.ModuleDict({"table": table, "head": nn.Linear(5, 4)}).double()

    def loss(batch):
        return F.cross_entropy(module["head"](table(batch[0]).sum(1)), batch[1])

    found = empirical_fisher(module, loss, [(x, y)])
    table.sparse = False
    assert_close(found, oracles.empirical_fisher(module, loss, batches_of(1, x, y)))


def test_logits_may_be_had_from_batches_of_any_structure(small):
    model, x, y = small
    expected = exact_fisher(model, [x])
    assert_close(exact_fisher(model, [(x, y)], logits=lambda batch: model(batch[0])), expected)
    found = sampled_fisher(
        model, [(x, y)], generator=torch.Generator().manual_seed(0), logits=lambda batch: model(batch[0])
    )
    assert_close(found, sampled_fisher(model, [x], generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
def test_a_compiled_module_gives_what_the_module_gives(small):
    model, x, y = small
    expected = empirical_fisher(model, cross_entropy(model), [(x, y)])
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    found = empirical_fisher(compiled, cross_entropy(compiled), [(x, y)])
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)


def of_two_shards(estimate, shards):
    """What the second of two processes computes, given an all-reduce that adds what the first one sent."""
    sent = []
    estimate(shards[0], lambda tensor: sent.append(tensor.clone()) or tensor)
    result = estimate(shards[1], lambda tensor: tensor + sent.pop(0))
    assert sent == []
    return result


@pytest.mark.parametrize(
    "estimate",
    [
        lambda m, b, r: empirical_fisher(m, cross_entropy(m), b, all_reduce=r),
        lambda m, b, r: batched_fisher(m, cross_entropy(m), b, all_reduce=r),
        lambda m, b, r: gradient_deviation(m, cross_entropy(m), b, all_reduce=r),
        lambda m, b, r: exact_fisher(m, b, logits=lambda batch: m(batch[0]), all_reduce=r),
        lambda m, b, r: unit_activity(m, ["0", "2"], b, forward=lambda batch: m(batch[0]), all_reduce=r),
    ],
    ids=["empirical", "batched", "deviation", "exact", "activity"],
)
def test_two_processes_with_a_shard_each_get_what_one_gets_from_all(small, estimate):
    model, x, y = small
    batches = batches_of(2, x, y)
    found = of_two_shards(lambda shard, all_reduce: estimate(model, shard, all_reduce), [batches[:3], batches[3:]])
    assert_close(found, estimate(model, batches, None))


def state(model):
    modes = [(name, module.training) for name, module in model.named_modules()]
    flags = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    backends = [torch.backends.cudnn.enabled, torch.is_grad_enabled()]
    tensors = [p.grad for p in model.parameters()] + [t.clone() for t in model.state_dict().values()]
    rng = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.tensor(np.random.get_state()[1])]
    return [modes, flags, hooks, backends], [None if t is None else t.clone() for t in tensors + rng]


def assert_same_state(one, two):
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.fixture
def disturbable():
    """A training module with gradients, one layer evaluated, one frozen; and a loader that draws random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.PReLU(), nn.Linear(64, 5), nn.Linear(5, 4)
    )
    x, y = torch.randn(7, 3, 6, 6), torch.randint(4, (7,))
    model(x).sum().backward()
    model[0].bias.grad = None
    model[1].eval()
    model[5].requires_grad_(False)
    data = torch.utils.data.TensorDataset(x, y)
    return model, torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)


@pytest.mark.parametrize("fails", [False, True], ids=["to the end", "stopped by an exception"])
@pytest.mark.parametrize(
    "estimate",
    [
        empirical_fisher,
        batched_fisher,
        gradient_deviation,
        lambda m, loss, b: exact_fisher(m, b, logits=lambda batch: loss(batch) + m(batch[0])),
        lambda m, loss, b: sampled_fisher(
            m, b, generator=torch.Generator(), logits=lambda batch: loss(batch) + m(batch[0])
        ),
        lambda m, loss, b: unit_activity(m, ["0", "1"], b, forward=loss),
    ],
    ids=["empirical", "batched", "deviation", "exact", "sampled", "activity"],
)
def test_nothing_but_the_result_tells_that_it_was_computed(disturbable, estimate, fails):
    model, loader = disturbable

    def loss(batch):
        assert not any(module.training for module in model.modules())
        random.random(), np.random.rand(), torch.rand(1)
        if fails and len(batch[0]) == 1:
            raise RuntimeError("stop")
        return F.cross_entropy(model(batch[0]), batch[1])

    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            estimate(model, loss, loader)
    else:
        estimate(model, loss, loader)
    assert_same_state(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # which have kernels of their own
def test_parameters_used_outside_of_known_layers_are_named_once(caplog, dtype):
    torch.manual_seed(0)
    model = Recurrent().to(dtype)
    x, y = torch.randint(9, (6, 5)), torch.randint(4, (6,))
    with caplog.at_level(logging.INFO, "lightning_continual"):
        empirical_fisher(model, cross_entropy(model), batches_of(2, x, y))
    assert caplog.messages == [
        "Gradients of single samples: by vmap for rnn.bias_hh_l0, rnn.bias_ih_l0, rnn.weight_hh_l0, rnn.weight_ih_l0;"
        " by closed forms for the others."
    ]


def test_recurrent_layers_run_without_cudnn_which_has_no_backward_pass_in_evaluation_mode():
    model, seen = Recurrent(), []

    def loss(batch):
        seen.append(torch.backends.cudnn.enabled)
        return cross_entropy(model)(batch)

    empirical_fisher(model, loss, [(torch.randint(9, (2, 5)), torch.randint(4, (2,)))])
    assert not any(seen)
    assert torch.backends.cudnn.enabled


def test_layers_in_which_the_samples_come_second_are_served(caplog):
    torch.manual_seed(0)
    model, x, y = Attentive().double(), torch.randint(9, (7, 5)), torch.randint(4, (7,))
    with caplog.at_level(logging.INFO, "lightning_continual"):
        empirical_fisher(model, cross_entropy(model), [(x, y)])
    assert caplog.messages == [
        "Gradients of single samples: by vmap for places.weight; by closed forms for the others."
    ]


def test_what_vmap_cannot_follow_is_looped_over(caplog):
    torch.manual_seed(0)
    model, (x, y) = Odd().double(), (rows(6), torch.randint(4, (7,)))
    with caplog.at_level(logging.INFO, "lightning_continual"):
        empirical_fisher(model, cross_entropy(model), batches_of(4, x, y))
    assert caplog.messages[0].startswith("Gradients of single samples: vmap cannot follow this module (")
    assert caplog.messages[1:] == [
        "Gradients of single samples: by a loop over the samples for first.parametrizations.weight.original0,"
        " first.parametrizations.weight.original1, head.bias, head.weight, scale; by closed forms for the others."
    ]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in SLOW])
def test_known_layers_go_without_vmap_and_loop(caplog, kind):
    torch.manual_seed(0)
    model, x = MODELS[kind]()
    model = model.double()
    with caplog.at_level(logging.INFO, "lightning_continual"):
        empirical_fisher(model, cross_entropy(model), batches_of(4, x, torch.randint(4, (7,))))
    assert caplog.messages == []


# Activity


def test_the_activity_of_a_linear_unit_is_the_mean_over_samples_after_the_activation(small):
    model, x, _ = small
    expected = sum(F.relu(model[0](sample)) for sample in x) / 7
    assert_close(unit_activity(model, ["0"], batches_of(4, x)), {"0": expected.detach()})


@pytest.mark.parametrize("size", [1, 4, 7], ids="size={}".format)
def test_the_activity_of_a_channel_is_the_mean_over_its_map(size):
    torch.manual_seed(0)
    model = Residual().double()
    x = rows(3, 6, 6)
    model.eval()
    first = sum(F.relu(model.norm(model.stem(sample[None])))[0].mean((1, 2)) for sample in x) / 7
    found = unit_activity(model, ["norm", "block"], batches_of(size, x))
    assert_close(found["norm"], first.detach())
    assert found["block"].shape == (6,)


def test_a_layer_used_twice_has_the_mean_activity_of_its_uses():
    layer = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(layer, layer)
    nn.init.constant_(layer.weight, 1.0)
    found = unit_activity(model, ["0"], [torch.tensor([[1.0, 0.0]])], activation=nn.Identity())
    assert_close(found, {"0": torch.tensor([1.5, 1.5])})


def test_the_positions_of_a_sequence_are_averaged():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    found = unit_activity(nn.Sequential(layer), ["0"], [torch.tensor([[[1.0], [3.0]], [[-5.0], [4.0]]])])
    assert_close(found, {"0": torch.tensor([2.0])})


def test_a_layer_that_does_not_exist_is_refused(small):
    with pytest.raises(
        ValueError, match=r"`layers` must name layers of the module, but got 'fc'\. It has 0, 1, 2, 3, 4"
    ):
        unit_activity(small[0], ["fc"], [small[1]])


def test_a_layer_that_is_not_called_is_refused(small):
    module = nn.ModuleDict({"model": small[0], "unused": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"used in the forward pass of at least one batch, but 'unused' is not"):
        unit_activity(module, ["model.0", "unused"], [small[1]], forward=small[0])


# Messages


def test_a_parameter_whose_gradient_is_not_finite_is_named_with_the_batch(small):
    model, x, y = small
    x[5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"parameter '0\.weight' are not in batch 2 \(counted from 0\)"):
        empirical_fisher(model, cross_entropy(model), batches_of(2, x, y))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' are not in batch 2 \(counted from 0\)"):
        batched_fisher(model, cross_entropy(model), batches_of(2, x, y))


@pytest.mark.parametrize(
    "estimate",
    [
        lambda m: exact_fisher(m, []),
        lambda m: sampled_fisher(m, [], generator=torch.Generator()),
        lambda m: empirical_fisher(m, cross_entropy(m), []),
        lambda m: batched_fisher(m, cross_entropy(m), []),
        lambda m: gradient_deviation(m, cross_entropy(m), []),
    ],
    ids=["exact", "sampled", "empirical", "batched", "deviation"],
)
def test_no_batch_is_refused(small, estimate):
    with pytest.raises(ValueError, match=r"`batches` must hold at least one batch, but it is empty"):
        estimate(small[0])


@pytest.mark.parametrize(
    ("logits", "found"),
    [
        (lambda x: x.mean(), r"a tensor of shape \(\)"),
        (lambda x: x[:, :1], r"a tensor of shape \(7, 1\)"),
        (lambda x: x[:, :, None], r"a tensor of shape \(7, 6, 1\)"),
        (lambda x: {"logits": x}, "dict"),
    ],
    ids=["a number", "one column", "three dimensions", "a dictionary"],
)
def test_a_module_without_logits_is_refused_with_the_remedy(small, logits, found):
    model, x, _ = small
    message = rf"needs logits of shape \(B, C\) with C > 1, but the module gives {found}\..*use the empirical Fisher"
    with pytest.raises(ValueError, match="exact.*" + message):
        exact_fisher(model, [x], logits=logits)
    with pytest.raises(ValueError, match="sampled.*" + message):
        sampled_fisher(model, [x], logits=logits, generator=torch.Generator())


def test_a_sum_that_is_said_to_be_a_mean_is_noticed(small):
    model, x, y = small
    with pytest.raises(ValueError, match=r"3 copies of a sample have 3 times its loss\. Pass `reduction='sum'`"):
        empirical_fisher(model, cross_entropy(model, reduction="sum"), [(x, y)])
    with pytest.raises(ValueError, match=r"3 copies of a sample have 1 times its loss\. Pass `reduction='mean'`"):
        empirical_fisher(model, cross_entropy(model), [(x, y)], reduction="sum")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits: logits[..., None], r"one loss a sample, \(7,\), but got shape \(7, 4, 1\)"),
        (lambda logits: logits[:2, 0], r"one loss a sample, \(7,\), but got shape \(2,\)"),
        (lambda logits: 0.5, r"must return a tensor of floating point numbers, but got 0\.5"),
        (lambda logits: logits.mean().detach(), r"must depend on a trainable parameter"),
    ],
    ids=["three dimensions", "too few", "a number", "detached"],
)
def test_what_is_no_loss_is_refused(small, loss, message):
    model, x, _ = small
    with pytest.raises(ValueError, match=message):
        empirical_fisher(model, lambda batch: loss(model(batch)), [x])


def test_statistics_of_the_batch_in_evaluation_mode_are_refused(small):
    _, x, y = small
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with pytest.raises(ValueError, match=r"uses the statistics of the batch.*Use `track_running_stats=True`"):
        empirical_fisher(model, cross_entropy(model), [(x, y)])


def test_unknown_words_are_refused(small):
    model, x, y = small
    with pytest.raises(ValueError, match=r"`statistic` must be 'sd', 'rms' or 'variance', but got 'mad'"):
        gradient_deviation(model, cross_entropy(model), [(x, y)], statistic="mad")
    with pytest.raises(ValueError, match=r"`reduction` must be 'mean' or 'sum', but got 'none'"):
        empirical_fisher(model, cross_entropy(model), [(x, y)], reduction="none")


def test_a_module_that_is_frozen_is_refused(small):
    model, x, y = small
    with pytest.raises(ValueError, match=r"must have a trainable parameter"):
        empirical_fisher(model.requires_grad_(False), cross_entropy(model), [(x, y)])


def test_a_module_registered_twice_keeps_its_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Bilinear(3, 3, 3)
            self.b = self.a
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.b(self.a(x, x), x))

    torch.manual_seed(0)
    model, x, y = Twice().double(), torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    found = empirical_fisher(model, cross_entropy(model), [(x, y)])
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    squares = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), model.a.weight)[0]
        ** 2
        for n in range(8)
    ]
    assert_close(found["a.weight"], torch.stack(squares).mean(0))
