"""Tasks of different size and difficulty in one network: how much each gives back is searched, not fixed.

    python examples/adaptive_compression.py                                # handwritten digits of scikit-learn
    python examples/adaptive_compression.py --folder DATA                  # MNIST, Fashion-MNIST and CIFAR-10 of DATA
    python examples/adaptive_compression.py --folder DATA --order 5        # is the share larger for a simpler task?

A multilayer perceptron with a head a task. `adaptive` searches the share of each task (12 trials, accuracy may fall by
the tolerance); `fixed` is PackNet with one share for all. Written are a table (share and accuracy of each task, mean,
capacity used) and three figures: the searches, the capacity by task, the scores before and after compression.
"""

from __future__ import annotations

import argparse
import csv
import logging
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
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
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
    scores = [next(iter(one.values())) for one in trainer.test(model, data, verbose=False)]
    return compression, scores


def compare(options: argparse.Namespace) -> None:
    tasks = digits(options.seed) if options.folder is None else mixed(options.folder, options.seed)
    methods = {"adaptive": None, **{f"fixed {share:g}": share for share in options.fixed}}
    rows = []
    for method, share in methods.items():
        compression, scores = run(tasks, share, options, options.seed)
        used = 1 - compression.packed.free_share
        shares = [one.share for one in compression.packed.found.values()]
        rows.append([method, statistics.mean(scores), used, *scores, *shares])
        print(
            f"{method:<10} {100 * statistics.mean(scores):6.2f} % on average, {100 * used:5.1f} % of the weights used"
        )
        for number, one in enumerate(tasks):
            print(f"    {one.name:<20} {100 * scores[number]:6.2f} %, gave back {shares[number]:.3f}")
        if share is None:
            adaptive = compression
    with (options.output / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [one.name for one in tasks]
        writer.writerow(["method", "mean", "used", *names, *(f"share of {name}" for name in names)])
        writer.writerows(rows)
    for number in range(len(tasks)):
        adaptive.plot_search(number).savefig(options.output / f"search_{number}.png")
    adaptive.plot_capacity().savefig(options.output / "capacity.png")
    adaptive.plot_scores().savefig(options.output / "scores.png")


def order(options: argparse.Namespace) -> None:
    """Search the share of a simple, small task and of larger, harder ones, each alone in a fresh network."""
    found = sources(options.folder)
    sizes = {"MNIST": 6000, "Fashion-MNIST": 12000, "CIFAR-10": 10000}
    with (options.output / "order.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", *sizes])
        for seed in range(options.order):
            shares = []
            for name, number in sizes.items():
                one = task(name, first(found[name][0], number), found[name][1], seed)
                shares.append(run([one], None, options, seed)[0].packed.found[0].share)
            writer.writerow([seed, *shares])
            file.flush()
            print(seed, *(f"{name} {share:.3f}" for name, share in zip(sizes, shares, strict=True)), flush=True)


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
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.epochs = options.epochs or (40 if options.folder is None else 8)
    options.output.mkdir(parents=True, exist_ok=True)
    order(options) if options.order else compare(options)


if __name__ == "__main__":
    main()
