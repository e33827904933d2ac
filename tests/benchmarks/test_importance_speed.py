"""What importance costs, against ordinary training passes over the same samples in the same run."""

import pytest
import torch
import torch.nn.functional as F
from timing import seconds
from torch import nn
from torch.utils.data import Dataset

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
    print({name: round(ratio, 2) for name, ratio in ratios.items()})
    assert ratios["empirical"] <= empirical_limit, ratios
    assert ratios["exact"] <= exact_limit, ratios


class Samples(Dataset):
    """A data set as avalanche-lib reads it: (x, y, task label)."""

    def __init__(self, x, y):
        self.x, self.targets = x, y.tolist()
        self.targets_task_labels = [0] * len(y)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.x[index], self.targets[index], 0


# On one thread a network of convolutions is bound by its arithmetic, which avalanche-lib, a sample at a time, does no
# less fast than an ordinary pass over a batch: 4 times faster would be faster than an ordinary pass.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "factor"), [(cnn, 1.4), (mlp, 4.0)], ids=["cnn", "mlp"])
def test_the_empirical_fisher_is_that_of_avalanche_and_faster(make, factor):
    plugins = pytest.importorskip("avalanche.training.plugins.ewc")
    benchmarks = pytest.importorskip("avalanche.benchmarks.utils")
    torch.manual_seed(0)
    model, x = make()
    x, y = x[:256], torch.randint(NUM_CLASSES, (256,))
    samples = benchmarks.as_classification_dataset(Samples(x, y))
    optimizer, plugin = torch.optim.SGD(model.parameters(), lr=0.1), plugins.EWCPlugin(1.0)

    def avalanche():
        model.eval()
        return plugin.compute_importances(model, nn.CrossEntropyLoss(), optimizer, samples, "cpu", 1)

    theirs, ours = avalanche(), empirical(model, x, y, 128)
    for name, value in ours.items():
        assert (theirs[name].data - value).norm() <= 1e-4 * value.norm()
    times = seconds({"avalanche": avalanche, "ours": lambda: empirical(model, x, y, 128)}, repeats=5)
    print(f"{times['avalanche'] / times['ours']:.1f} times faster than avalanche-lib")
    assert times["avalanche"] >= factor * times["ours"]
