"""Permuted MNIST, 10 permutations, a head a task, MLP 784-100-100: the setting of WSN (Kang et al., ICML 2022).

    python examples/reproduce/packnet_permuted_mnist.py --folder DATA        # DATA holds MNIST/raw

The task is known at test time. Every task owns a part of the weights and has biases of its own; nothing of it is lost.
`adaptive` searches how much each task leaves to the later ones, on a tenth of the training images that is held out.
`packnet equal parts` gives every task a tenth of the weights, `packnet 0.75` three quarters of what is free back each
time; `fine-tuning` holds nothing. Adam at 1e-3 falling to 0 over 8 epochs, then one epoch of retraining; batches of 64;
a little weight decay, which lets weights go whose inputs are always zero. Reported is the mean accuracy over the test
images of all tasks at the end. Published: PackNet 96.37, EWC 92.01, fine-tuning 78.22, one network a task 97.37.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from lightning_continual import (
    AdaptiveCompressionCallback,
    ContinualDataModule,
    TaskHead,
    TaskStream,
    permute_pixels,
)

PUBLISHED = {"adaptive": 96.37, "packnet equal parts": 96.37, "packnet 0.75": 96.37, "fine-tuning": 78.22}


class Network(L.LightningModule):
    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        body = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
        self.net = nn.Sequential(*body, TaskHead(100, 10, num_tasks=num_tasks))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)  # of a task, or of retraining
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def mnist(folder: Path, *, train: bool) -> TensorDataset:
    whole = MNIST(folder, train=train, download=False)
    return TensorDataset(whole.data.flatten(1) / 255, whole.targets)


def compression(method: str, num_tasks: int, options: argparse.Namespace, seed: int) -> AdaptiveCompressionCallback:
    shares: dict[str, float | Sequence[float] | None] = {
        "adaptive": None,
        "packnet equal parts": [1 - 1 / left for left in range(num_tasks, 0, -1)],
        "packnet 0.75": 0.75,
    }
    share = shares[method]
    return AdaptiveCompressionCallback(
        options.tolerance,
        trials=options.trials,
        monitor="val_acc",
        share=share,
        num_tasks=num_tasks if share is None else None,
        floor=options.floor if share is None else None,
        norms="per-task",
        seed=seed,
    )


def run(method: str, seed: int, options: argparse.Namespace) -> tuple[float, float, list[float]]:
    """Return the mean accuracy over all tasks, the share of the weights used, and what each task gave back."""
    L.seed_everything(seed, verbose=False)
    train, test = (mnist(options.folder, train=part) for part in (True, False))
    data = ContinualDataModule(
        permute_pixels(train, test, num_tasks=options.tasks, seed=seed), batch_size=64, val_fraction=0.1, seed=seed
    )
    compressions = [] if method == "fine-tuning" else [compression(method, options.tasks, options, seed)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the stream decides
        callbacks=[TaskStream(options.epochs), *compressions],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=options.epochs,
    )
    model = Network(options.tasks)
    trainer.fit(model, datamodule=data)
    scores = [next(iter(one.values())) for one in trainer.test(model, data, verbose=False)]
    used, shares = math.nan, []
    for one in compressions:
        used, shares = 1 - one.packed.free_share, [found.share for found in one.packed.found.values()]
    print(f"seed {seed}, {method}: {100 * statistics.mean(scores):.2f} %, {100 * used:.0f} % used", flush=True)
    return 100 * statistics.mean(scores), 100 * used, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where MNIST/raw lies")
    parser.add_argument("--output", type=Path, default=Path("packnet_permuted_mnist.csv"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=0.006)
    parser.add_argument("--floor", type=float, default=0.08)
    parser.add_argument("--methods", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeds = range(options.seed, options.seed + options.seeds)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "published", "mean", "standard_error", "used", *seeds])
        for method in options.methods:
            scores, used, shares = zip(*(run(method, seed, options) for seed in seeds), strict=True)
            error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
            writer.writerow([method, PUBLISHED[method], statistics.mean(scores), error, statistics.mean(used), *scores])
            file.flush()
            print(
                f"{method:<20} {statistics.mean(scores):6.2f} ± {error:.2f}, published {PUBLISHED[method]:.2f};"
                f" {statistics.mean(used):.0f} % of the weights used; gave back first:"
                f" {' '.join(f'{one:.2f}' for one in shares[0])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
