"""A deployed network is retrained on new data, with a budget: which samples, and which weights, are worth training?

    python examples/bandit_retraining.py                                  # scikit-learn's digits, about a minute
    python examples/bandit_retraining.py --data fashion --folder DATA     # Fashion-MNIST

A network is trained on the old data: images as they are. Then new data arrive: the images turned. At an equal budget
of samples (half of each batch of new ones, dealt out to old and new samples) and of weights (0.35 of them at a time) it
is retrained with

- uniform rehearsal: uniform over task × class, old and new, as the arms of the bandits are;
- a random subset of the weights, drawn anew as often as a bandit's;
- samples, weights, or both selected by bandits (`BanditSelectionCallback`);
- full retraining: all new samples and as many old ones, all weights;

each with and without the regularisation of synapses and neurons (`SynapseNeuronCallback`), which needs no old data.
Reported are accuracy on old and new held-out data, seconds of training with all that selection and rewards take,
FLOPs of the backward passes against full retraining, those of the measurement of rewards apart, and the share of the
weights trained: a mean over seeds, with the standard error of accuracies. The uniform methods measure no rewards.
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
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_continual import (
    BanditSelectionCallback,
    ContinualDataModule,
    RehearsalCallback,
    SynapseNeuronCallback,
    Task,
    restore,
)
from lightning_continual.bandits import EpsilonGreedy

MEMORY = 2000
BUDGET = 0.5, 0.35  # of samples, of weights
EVERY_MEASURED = 10  # steps from one measurement of the rewards of samples to the next
EVERY_COUNTED = (
    7  # steps from one count of FLOPs to the next; coprime to the above, so that it meets every kind of step
)


def uniform(num_arms: int) -> EpsilonGreedy:
    """A bandit that never learns."""
    return EpsilonGreedy(num_arms, epsilon=1.0)


def of_samples(policy: Any) -> L.Callback:
    options: dict[str, Any] = {"reward": "grad_norm", "memory": MEMORY, "first_task": 1}
    measure_every = 10**9 if policy is uniform else EVERY_MEASURED  # what never learns needs no rewards
    return BanditSelectionCallback("samples", policy=policy, budget=BUDGET[0], measure_every=measure_every, **options)


def of_weights(policy: Any) -> L.Callback:
    return BanditSelectionCallback("weights", policy=policy, budget=BUDGET[1], every=10)


def regularised() -> L.Callback:
    return SynapseNeuronCallback(1.0, 1.0)


METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "uniform rehearsal": lambda: [of_samples(uniform)],
    "random weights": lambda: [of_samples(uniform), of_weights(uniform)],
    "bandit samples": lambda: [of_samples("exp3")],
    "bandit weights": lambda: [of_samples(uniform), of_weights("exp3")],
    "bandit samples and weights": lambda: [of_samples("exp3"), of_weights("exp3")],
    "full retraining": lambda: [RehearsalCallback(MEMORY)],
}


class Classifier(L.LightningModule):
    """A convolutional network; nothing in it knows of continual learning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Meter(L.Callback):
    """Counts seconds, the share of weights trained, and in every seventh step FLOPs of backward passes and of rewards.

    Put `start` before all other callbacks and this one after them: then what they do in a step is counted. Seconds are
    those from the end of a step to the end of the next, so that they include the selection of samples.
    """

    class Start(L.Callback):
        """The beginning of each step."""

        def __init__(self, meter: Meter) -> None:
            self.meter = meter

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.meter.begin()

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.meter.note("backward")

    def __init__(self) -> None:
        self.seconds, self.shares, self._step = 0.0, [0.0], 0
        self.flops: dict[str, list[int]] = {"backward": [], "rewards": []}
        self._timed = 0
        self.start = Meter.Start(self)

    @property
    def whole_seconds(self) -> float:
        """Seconds of all steps: those in which FLOPs are counted, which are slower, as the mean of the others."""
        return self.seconds * self._step / max(1, self._timed)

    def begin(self) -> None:
        self._found = {"rewards": 0, "forward": 0, "backward": 0}
        self._counter = FlopCounterMode(display=False) if self._step % EVERY_COUNTED == 3 else None
        if self._counter is not None:
            self._counter.__enter__()

    def note(self, what: str) -> None:
        """Say that all that was counted since the last note was of a kind."""
        if self._counter is not None:
            self._found[what] += self._counter.get_total_flops() - sum(self._found.values())

    def on_train_epoch_start(self, *arguments: Any) -> None:
        self._start = perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.note("rewards")
        if self._counter is not None:
            trained = [p.numel() for p in pl_module.parameters() if p.requires_grad]
            self.shares.append(sum(trained) / sum(p.numel() for p in pl_module.parameters()))

    def on_before_backward(self, *arguments: Any) -> None:
        self.note("forward")

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.note("rewards")
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            for what, flops in self.flops.items():
                flops.append(self._found[what])
        else:
            self.seconds += perf_counter() - self._start
            self._timed += 1
        self._step += 1
        self._start = perf_counter()


def load(data: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    if data == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    if folder is None:
        raise SystemExit("--data fashion needs --folder, where FashionMNIST/raw lies.")
    from torchvision.datasets import FashionMNIST

    whole = FashionMNIST(folder, train=True, download=False)
    return whole.data[:20_000, None] / 255, whole.targets[:20_000]


def old_and_new(images: Tensor, labels: Tensor, degrees: float, seed: int) -> list[Task]:
    """Half of the images as they are, and half of them turned; a fifth of each is held out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    tasks = []
    for number, own in enumerate(order.chunk(2)):
        angle = torch.tensor(math.radians(degrees * number))
        turn = torch.tensor([[torch.cos(angle), -torch.sin(angle), 0], [torch.sin(angle), torch.cos(angle), 0]])
        grid = nn.functional.affine_grid(turn.expand(len(own), 2, 3), list(images[own].shape), align_corners=False)
        turned = nn.functional.grid_sample(images[own], grid, align_corners=False)
        cut = len(own) // 5
        tasks.append(
            Task(TensorDataset(turned[cut:], labels[own][cut:]), test=TensorDataset(turned[:cut], labels[own][:cut]))
        )
    return tasks


def accuracy(model: nn.Module, task: Task) -> float:
    assert isinstance(task.test, TensorDataset)
    x, y = task.test.tensors
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    model.train()
    return float((found == y).float().mean())


def fit(model: L.LightningModule, data: ContinualDataModule, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, enable_progress_bar=False, **quiet)
    trainer.fit(model, datamodule=data)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
    parser.add_argument("--folder", type=Path, help="where FashionMNIST/raw lies")
    parser.add_argument("--output", type=Path, default=Path("bandits"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of retraining")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--degrees", type=float, default=60.0, help="by which new images are turned")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(many workers|no `val_dataloader`|in eval mode|begins with what it has).*")
    warnings.filterwarnings("ignore", ".*treespec.*", FutureWarning)
    options.output.mkdir(parents=True, exist_ok=True)
    images, labels = load(options.data, options.folder)
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        tasks = old_and_new(images, labels, options.degrees, seed)
        data = ContinualDataModule(tasks, batch_size=options.batch_size, seed=seed)
        L.seed_everything(seed, verbose=False)
        model = Classifier()
        # What will remember the old data, and the deployed network, must see it trained.
        watching = [of_samples(uniform), RehearsalCallback(MEMORY), regularised()]
        checkpoint = options.output / f"deployed-{seed}.ckpt"
        fit(model, data, watching, epochs=10 if options.data == "digits" else 3).save_checkpoint(checkpoint)
        old, new = (100 * accuracy(model, task) for task in tasks)
        print(f"seed {seed}: the deployed network has {old:.1f} % on old data, {new:.1f} % on new")
        data.current_task = 1
        for name, make in METHODS.items():
            for with_it in (False, True):
                L.seed_everything(1000 + seed, verbose=False)
                model, meter = Classifier(), Meter()
                callbacks = [*make(), *([regularised()] if with_it else [])]
                restore(checkpoint, model, callbacks)
                fit(model, data, [meter.start, *callbacks, meter], options.epochs)
                old, new = (100 * accuracy(model, task) for task in tasks)
                flops = {what: statistics.mean(counts) for what, counts in meter.flops.items()}
                share = statistics.mean(meter.shares[1:])
                row = {"old": old, "new": new, "seconds": meter.whole_seconds, "share": share, **flops}
                found.setdefault((name, with_it), []).append(row)
    report(found, options.output / "table.csv")


def report(found: dict[tuple[str, bool], list[dict[str, float]]], path: Path) -> None:
    """Print the table, and write it."""
    whole = statistics.mean(row["backward"] for row in found["full retraining", False])
    table = []
    for (name, with_it), rows in found.items():
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        error = {
            key: statistics.stdev(row[key] for row in rows) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
            for key in ("old", "new")
        }
        both = statistics.mean((row["old"] + row["new"]) / 2 for row in rows)
        table.append(
            {
                "method": name + (", regularised" if with_it else ""),
                "old": f"{mean['old']:.1f} ± {error['old']:.1f}",
                "new": f"{mean['new']:.1f} ± {error['new']:.1f}",
                "mean": f"{both:.1f}",
                "seconds": f"{mean['seconds']:.1f}",
                "backward FLOPs": f"{mean['backward'] / whole:.2f}",
                "rewards' FLOPs": f"{mean['rewards'] / whole:.2f}",
                "weights": f"{mean['share']:.2f}",
            }
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    widths = {key: max(len(key), *(len(row[key]) for row in table)) for key in table[0]}
    for row in [{key: key for key in widths}, *table]:
        print(
            "  ".join(
                row[key].ljust(width) if key == "method" else row[key].rjust(width) for key, width in widths.items()
            )
        )
    print(f"\nAccuracy in %, FLOPs against the backward passes of full retraining. Table: {path}")


if __name__ == "__main__":
    main()
