"""Tasks of different size and difficulty in one network: how much each gives back is searched, not fixed.

    python examples/adaptive_compression.py                                # handwritten digits of scikit-learn
    python examples/adaptive_compression.py --folder DATA --seeds 3 --seed 3  # MNIST, Fashion-MNIST, CIFAR-10

Is the share larger for a simpler task? Each of three tasks is learnt alone:

    python examples/adaptive_compression.py --folder DATA --order 5 --width 100 --epochs 20 --retrain 5 \\
        --tolerance 0.015 --seed 2

A multilayer perceptron with a head a task. `adaptive` searches the share of each task (12 trials, accuracy may fall by
the tolerance); `fixed` is PackNet with one share for all. Written are a table (mean accuracy on test data with its
standard error over seeds, capacity used, accuracy and share of each task) and three figures of the first seed: the
searches, the capacity by task, the scores before and after compression. A little weight decay lets weights go whose
inputs are always zero, so that magnitude means something.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_continual import AdaptiveCompressionCallback, ContinualDataModule, Task, TaskHead, TaskStream

Images = tuple[Tensor, Tensor]  # (N, D) and (N,)


class Network(L.LightningModule):
    def __init__(self, in_features: int, width: int, num_tasks: int) -> None:
        super().__init__()
        body = [nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*body, TaskHead(width, 10, num_tasks=num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Images, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)  # of a task, or of retraining
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def task(name: str, train: Images, test: Images, seed: int = 0) -> Task:
    """Hold every fifth training image out, to search by."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    own, held = order[len(order) // 5 :], order[: len(order) // 5]
    parts = [TensorDataset(train[0][places], train[1][places]) for places in (own, held)]
    return Task(*parts, TensorDataset(*test), name=name)


def digits(seed: int) -> list[Task]:
    """Two digits; five others; all, under noise; a few, with their pixels permuted."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x, y = torch.from_numpy(loaded.data).float() / 16, torch.from_numpy(loaded.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    noisy, permuted = x + 0.3 * torch.randn(x.shape, generator=generator), x[:, torch.randperm(64, generator=generator)]
    choices = {
        "0 and 1": (x, y < 2),
        "2 to 6": (x, (y >= 2) & (y < 7)),
        "all, noisy": (noisy, y >= 0),
        "permuted, a third": (permuted, torch.arange(len(x)) % 3 == 0),
    }
    tasks = []
    for name, (images, chosen) in choices.items():
        images, labels = images[chosen], y[chosen]
        cut = len(labels) * 3 // 4
        tasks.append(task(name, (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), seed))
    return tasks


def first(images: Images, number: int) -> Images:
    return images[0][:number], images[1][:number]


def sources(folder: Path) -> dict[str, tuple[Images, Images]]:
    """Return training and test images of each source, as 784 numbers; of CIFAR-10 the grey inner 28×28."""
    from torchvision.datasets import MNIST, FashionMNIST

    found = {}
    for name, source in (("MNIST", MNIST), ("Fashion-MNIST", FashionMNIST)):
        parts = [source(folder, train=train, download=False) for train in (True, False)]
        found[name] = tuple((one.data.flatten(1) / 255, one.targets) for one in parts)
    arrays = np.load(folder / "cifar10_10k.npz")
    images = [torch.from_numpy(arrays[f"{part}_x"]).float().mean(-1)[:, 2:30, 2:30] for part in ("train", "test")]
    labels = [torch.from_numpy(arrays[f"{part}_y"]).long().flatten() for part in ("train", "test")]
    found["CIFAR-10"] = tuple((x.flatten(1) / 255, y) for x, y in zip(images, labels, strict=True))
    return found


def mixed(folder: Path, seed: int) -> list[Task]:
    """A tenth of MNIST, Fashion-MNIST, CIFAR-10, and a tenth of MNIST with its pixels permuted."""
    found = sources(folder)
    pixels = torch.randperm(784, generator=torch.Generator().manual_seed(seed))
    mnist = [(x[:, pixels], y) for x, y in found["MNIST"]]
    return [
        task("MNIST, a tenth", first(found["MNIST"][0], 6000), found["MNIST"][1], seed),
        task("Fashion-MNIST", first(found["Fashion-MNIST"][0], 12000), found["Fashion-MNIST"][1], seed),
        task("CIFAR-10, grey", *found["CIFAR-10"], seed),
        task("permuted, a tenth", first(mnist[0], 6000), mnist[1], seed),
    ]


def run(tasks: list[Task], share: float | None, options: argparse.Namespace, seed: int) -> Any:
    """Train all tasks; return the callback and the accuracy of each task on its test data at the end."""
    L.seed_everything(seed, verbose=False)
    compression = AdaptiveCompressionCallback(
        options.tolerance,
        trials=options.trials,
        monitor="val_acc",
        retrain_epochs=options.retrain,
        share=share,
        num_tasks=len(tasks) if share is None else None,
        seed=seed,
    )
    data = ContinualDataModule(tasks, batch_size=options.batch_size, seed=seed)
    model = Network(tasks[0].train[0][0].numel(), options.width, len(tasks))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the stream decides
        callbacks=[TaskStream(options.epochs), compression],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
        check_val_every_n_epoch=options.epochs,
    )
    trainer.fit(model, datamodule=data)
    if tasks[0].test is None:
        return compression, []
    return compression, [next(iter(one.values())) for one in trainer.test(model, data, verbose=False)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def compare(options: argparse.Namespace) -> None:
    methods = {"adaptive": None, **{f"fixed {share:g}": share for share in options.fixed}}
    found: dict[str, list[tuple[float, float, list[float], list[float]]]] = {method: [] for method in methods}
    for seed in range(options.seed, options.seed + options.seeds):
        tasks = digits(seed) if options.folder is None else mixed(options.folder, seed)
        for method, share in methods.items():
            compression, scores = run(tasks, share, options, seed)
            shares = [one.share for one in compression.packed.found.values()]
            used = 1 - compression.packed.free_share
            found[method].append((statistics.mean(scores), used, scores, shares))
            print(
                f"seed {seed}, {method:<10} {100 * statistics.mean(scores):6.2f} %, {100 * used:5.1f} % used",
                flush=True,
            )
            if share is None and seed == options.seed:
                draw(compression, len(tasks), options.output)
    names = [one.name for one in tasks]
    with (options.output / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["method", "mean", "standard_error", "used", "adaptive_minus_this", "error_of_it"]
        writer.writerow([*header, *names, *(f"share of {name}" for name in names)])
        for method, runs in found.items():
            (mean, error), used = mean_and_error([one[0] for one in runs]), statistics.mean(one[1] for one in runs)
            gains = [adaptive[0] - one[0] for adaptive, one in zip(found["adaptive"], runs, strict=True)]
            scores, shares = (
                [statistics.mean(task) for task in zip(*(one[i] for one in runs), strict=True)] for i in (2, 3)
            )
            writer.writerow([method, mean, error, used, *mean_and_error(gains), *scores, *shares])
            print(f"{method:<10} {100 * mean:6.2f} ± {100 * error:.2f} %, {100 * used:5.1f} % of the weights used")
            for name, score, share in zip(names, scores, shares, strict=True):
                print(f"    {name:<20} {100 * score:6.2f} %, gave back {share:.3f}")


def draw(compression: AdaptiveCompressionCallback, num_tasks: int, folder: Path) -> None:
    for number in range(num_tasks):
        compression.plot_search(number).savefig(folder / f"search_{number}.png")
    compression.plot_capacity().savefig(folder / "capacity.png")
    compression.plot_scores().savefig(folder / "scores.png")


def simple_and_hard(folder: Path, seed: int) -> list[Task]:
    """Small handwritten digits, a tenth of MNIST, and Fashion-MNIST, with large validation sets."""
    from sklearn.datasets import load_digits

    loaded, generator = load_digits(), torch.Generator().manual_seed(seed)
    small = nn.functional.interpolate(torch.from_numpy(loaded.images).float()[:, None] / 16, (28, 28)).flatten(1)
    found = {"digits": ((small, torch.from_numpy(loaded.target)), None), **sources(folder)}
    tasks = []
    for name, number, held in (("digits", 1000, 797), ("MNIST", 6000, 6000), ("Fashion-MNIST", 12000, 6000)):
        (x, y), _ = found[name]
        order = torch.randperm(len(y), generator=generator)[: number + held]
        parts = [TensorDataset(x[places], y[places]) for places in (order[:number], order[number:])]
        tasks.append(Task(*parts, name=name))
    return tasks


def order(options: argparse.Namespace) -> None:
    """Search the share of a simple, small task and of a larger, harder one, each alone in a fresh network."""
    found: dict[str, list[float]] = {}
    for seed in range(options.seed, options.seed + options.order):
        for one in simple_and_hard(options.folder, seed):
            compression, _ = run([one], None, options, seed)
            found.setdefault(one.name, []).append(compression.packed.found[0].share)
        print(seed, *(f"{name} {shares[-1]:.3f}" for name, shares in found.items()), flush=True)
    with (options.output / "order.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "mean_share", "standard_error", "seeds_above_the_last", *range(options.order)])
        for name, shares in found.items():
            above = sum(a > b for a, b in zip(shares, list(found.values())[-1], strict=True))
            writer.writerow([name, *mean_and_error(shares), above, *shares])
            mean, error = mean_and_error(shares)
            print(f"{name:<14} {mean:.3f} ± {error:.3f}, larger than the last in {above} of {len(shares)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where MNIST/raw, FashionMNIST/raw and cifar10_10k.npz lie")
    parser.add_argument("--output", type=Path, default=Path("compression"), help="where tables and figures go")
    parser.add_argument("--order", type=int, default=0, metavar="SEEDS", help="compare single tasks on so many seeds")
    parser.add_argument("--fixed", type=float, nargs="*", default=[0.5, 0.75])
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="8; 40 of the small handwritten digits")
    parser.add_argument("--retrain", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    if options.order and options.folder is None:
        parser.error("--order needs --folder")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.epochs = options.epochs or (40 if options.folder is None else 8)
    options.output.mkdir(parents=True, exist_ok=True)
    order(options) if options.order else compare(options)


if __name__ == "__main__":
    main()
