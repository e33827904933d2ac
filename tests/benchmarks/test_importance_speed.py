"""What importance costs, against ordinary training passes over the same samples in the same run."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from lightning_continual.importance import empirical_fisher, exact_fisher

pytestmark = pytest.mark.benchmark
NUM_CLASSES = 10


def cnn():
    return (
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4096, 128),
            nn.ReLU(),
            nn.Linear(128, NUM_CLASSES),
        ),
        torch.randn(1024, 3, 32, 32),
    )


def mlp():
    return (
        nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, NUM_CLASSES)),
        torch.randn(1024, 784),
    )


def ordinary(model, x, y, size):
    for inputs, labels in zip(x.split(size), y.split(size), strict=True):
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()


def empirical(model, x, y, size):
    batches = list(zip(x.split(size), y.split(size), strict=True))
    return empirical_fisher(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches)


def exact(model, x, y, size):
    return exact_fisher(model, x.split(size))


def empirical_by_loop(model, x, y, size):
    total = [torch.zeros_like(p) for p in model.parameters()]
    for sample, label in zip(x.split(1), y.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(sample), label), list(model.parameters()))
        for value, gradient in zip(total, gradients, strict=True):
            value.addcmul_(gradient, gradient)
    return total


def exact_by_loop(model, x, y, size):
    total = [torch.zeros_like(p) for p in model.parameters()]
    for sample in x.split(1):
        logs = F.log_softmax(model(sample)[0], 0)
        for label, log in enumerate(logs):
            gradients = torch.autograd.grad(log, list(model.parameters()), retain_graph=label + 1 < len(logs))
            for value, gradient in zip(total, gradients, strict=True):
                value.addcmul_(gradient, gradient, value=log.exp().item())
    return total


def seconds(runs, repeats):
    """Median seconds of each function, measured in turn, so that a disturbance meets all of them."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(Timer("run()", globals={"run": run}, num_threads=1).timeit(1).median)
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.mark.parametrize(
    ("make", "empirical_limit", "exact_limit"), [(cnn, 2.0, 10.0), (mlp, 1.5, 10.0)], ids=["cnn", "mlp"]
)
def test_importance_costs_little_more_than_ordinary_passes(make, empirical_limit, exact_limit):
    torch.manual_seed(0)
    model, x = make()
    y = torch.randint(NUM_CLASSES, (len(x),))
    runs = {function.__name__: lambda f=function: f(model, x, y, 128) for function in (ordinary, empirical, exact)}
    times = seconds(runs, repeats=5)
    ratios = {name: times[name] / times["ordinary"] for name in ("empirical", "exact")}
    assert ratios["empirical"] <= empirical_limit, ratios
    assert ratios["exact"] <= exact_limit, ratios


# On one thread the network of convolutions is bound by arithmetic, which a loop over samples does no less fast.
@pytest.mark.parametrize(("make", "factor"), [(cnn, 1.0), (mlp, 4.0)], ids=["cnn", "mlp"])
@pytest.mark.parametrize(
    ("fast", "slow"), [(empirical, empirical_by_loop), (exact, exact_by_loop)], ids=["empirical", "exact"]
)
def test_importance_is_faster_than_a_loop_over_samples(make, factor, fast, slow):
    torch.manual_seed(0)
    model, x = make()
    x = x[:256]
    y = torch.randint(NUM_CLASSES, (len(x),))
    times = seconds({"fast": lambda: fast(model, x, y, 128), "slow": lambda: slow(model, x, y, 128)}, repeats=3)
    assert times["slow"] >= factor * times["fast"], times["slow"] / times["fast"]
