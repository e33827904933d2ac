import copy
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
        self.embedding = nn.Embedding(9, 5, padding_idx=-1)
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


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


# ------------------------------------------------------------------------------------------------- oracles


def test_the_empirical_fisher_is_the_mean_square_of_gradients_of_single_samples(case):
    model, x, y = case
    loss = cross_entropy(model)
    expected = oracles.empirical_fisher(model, loss, batches_of(1, x, y))
    assert_close(empirical_fisher(model, loss, batches_of(4, x, y)), expected)


def test_the_exact_fisher_is_the_expectation_over_classes(case):
    model, x, _ = case
    assert_close(exact_fisher(model, batches_of(4, x)), oracles.exact_fisher(model, batches_of(1, x)))


def test_the_gradient_deviation_is_the_standard_deviation_over_samples(case):
    model, x, y = case
    loss = cross_entropy(model)
    expected = oracles.deviation(oracles.per_sample_gradients(model, loss, batches_of(1, x, y)))
    assert_close(gradient_deviation(model, loss, batches_of(4, x, y)), expected)
