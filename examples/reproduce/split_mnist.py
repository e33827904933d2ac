"""Split MNIST, task-incremental: the setting of van de Ven (ICLR blogposts 2025).

    python examples/reproduce/split_mnist.py --folder DATA           # DATA holds MNIST/raw

Five tasks of two digits; the task is known at test time, so that only its two outputs compete. MLP 784-400-400-10,
Adam at 1e-3 that is not reset between tasks, 2000 steps of 128 samples a task. Reported is the mean accuracy over all
tasks at the end. Published: EWC with the exact or the empirical Fisher information 99.12 at its best strength, nothing
85.41. Our strength is the best of 1e3, 1e4, 1e6, 1e7 and 1e8 for the test accuracy of seed 0.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from lightning_continual import ContinualDataModule, EWCCallback, TaskStream, split_by_class

PUBLISHED = {"nothing": 85.41, "empirical": 99.12, "exact": 99.12}


class Network(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))

    def logits(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The outputs of the sample's task, which is known from its label; the others are out of the running."""
        x, y = batch
        logits = self.net(x)
        of_task = torch.arange(10, device=self.device) // 2 == y[:, None] // 2
        return logits.masked_fill(~of_task, -1e4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("accuracy", (self.logits(batch).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def mnist(folder: Path, *, train: bool) -> TensorDataset:
    whole = MNIST(folder, train=train, download=False)
    return TensorDataset(whole.data.flatten(1) / 255, whole.targets)


def ewc(method: str, strength: float) -> Callable[[], list[L.Callback]]:
    if method == "nothing":
        return list
    return lambda: [EWCCallback(strength, fisher=method, logits=lambda module, batch: module.logits(batch))]


def run(folder: Path, callbacks: list[L.Callback], seed: int, steps: int) -> float:
    L.seed_everything(seed, verbose=False)
    tasks = split_by_class(mnist(folder, train=True), mnist(folder, train=False), num_tasks=5)
    data = ContinualDataModule(tasks, batch_size=128, seed=seed)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the stream decides
        callbacks=[TaskStream(steps_per_task=steps, reset_optimizer=False), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    model = Network()
    trainer.fit(model, datamodule=data)
    return 100 * statistics.mean(next(iter(scores.values())) for scores in trainer.test(model, data, verbose=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where MNIST/raw lies")
    parser.add_argument("--output", type=Path, default=Path("split_mnist.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", nargs="+", choices=PUBLISHED, default=["nothing", "empirical"])
    parser.add_argument(
        "--strengths", nargs="+", type=float, default=[1e8], help="of EWC; the published one is the best"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "strength", "published", "mean", "standard_error", *range(options.seeds)])
        for method in options.methods:
            for strength in [0.0] if method == "nothing" else options.strengths:
                make = ewc(method, strength)
                scores = [run(options.folder, make(), seed, options.steps) for seed in range(options.seeds)]
                error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
                writer.writerow([method, strength, PUBLISHED[method], statistics.mean(scores), error, *scores])
                file.flush()
                mean = f"{statistics.mean(scores):6.2f} ± {error:.2f}"
                print(f"{method:<10} λ {strength:<8g} {mean}   published {PUBLISHED[method]:.2f}", flush=True)


if __name__ == "__main__":
    main()
