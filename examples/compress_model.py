"""What to ship: a trained network pruned, quantized, and its small forms trained from scratch, at equal bytes.

    python examples/compress_model.py                                               # scikit-learn's digits, a minute
    python examples/compress_model.py --data fashion --folder DATA --seeds 5 --grid full        # an MLP, hours
    python examples/compress_model.py --data fashion --folder DATA --net cnn --selector obd-sd magnitude

The comparison of "Magnificent Minified Models" (Harang & Sanders 2023): selectors, amounts, weights or units; before
and after fine-tuning, against the same zeros or widths trained from scratch, as long as the fine-tuning, and as long as
training and fine-tuning took together; and quantization. Each seed is a network of its own. It is the comparison that
``lightning-continual compress`` makes for one checkpoint; ``--save`` writes such a checkpoint of the first network.

Two claims of the paper are held against the table: that fine-tuning what is left of pruned weights does slightly better
than training it from scratch; and that with pruned units training from scratch does much better.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_continual.comparison import Plan, Setting, compress
from lightning_continual.comparison.results import FINE_TUNED, LONG, PRUNED, SHORT, Summary

# Batch size, epochs of training and of fine-tuning; selectors and amounts of the reduced grid.
SETTINGS = {
    "digits": {
        "batch_size": 32,
        "epochs": 15,
        "fine_tuning": 2,
        "selector": ["magnitude", "obd-sd", "merge"],
        "amount": [0.5, 0.75, 0.9, 0.95],
    },
    "fashion": {
        "batch_size": 128,
        "epochs": 5,
        "fine_tuning": 1,
        "selector": ["magnitude", "obd", "obd-sd"],
        "amount": [0.75, 0.9, 0.95, 0.98],
    },
}
ALL_SELECTORS = ["random", "magnitude", "obd", "obd-sd", "dropout-damage", "merge"]
ALL_AMOUNTS = [0.5, 0.75, 0.9, 0.95, 0.98]


class Classifier(L.LightningModule):
    """A module as one has it in production; nothing in it knows of compression."""

    def __init__(self, net: str = "mlp", side: int = 8, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        if net == "mlp":
            head = [nn.Linear(side**2, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
            self.net = nn.Sequential(nn.Flatten(), *head)
        else:
            norm = nn.BatchNorm2d if net == "cnn-norm" else nn.Identity
            self.net = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)),
            )
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def load(data: str, folder: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images ``(1, side, side)`` with their labels."""
    if data == "digits":
        from lightning_continual.demo import digits

        return tuple(TensorDataset(one.tensors[0].view(-1, 1, 8, 8), one.tensors[1]) for one in digits())
    if folder is None:
        raise SystemExit(f"--data {data} needs --folder, where FashionMNIST/raw lies.")
    from torchvision.datasets import FashionMNIST

    parts = [FashionMNIST(folder, train=train, download=False) for train in (True, False)]
    return tuple(TensorDataset(one.data[:, None] / 255, one.targets) for one in parts)


def loaders(data: str = "digits", folder: str | None = None, batch_size: int = 128) -> tuple[DataLoader, DataLoader]:
    """Return training and validation loader, as ``lightning-continual compress --data`` wants them."""
    train, test = load(data, None if folder is None else Path(folder))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 512)


def claims(summaries: list[Summary]) -> str:
    """Write accuracies by level and amount: fine-tuned by each selector, and from scratch (mean over selectors)."""
    pruned = [one.row for one in summaries if one.row.family == PRUNED and one.num_seeds]
    lines = []
    for level in dict.fromkeys(row.level for row in pruned):
        own = [row for row in pruned if row.level == level]
        names = list(dict.fromkeys(row.selector for row in own if row.stage == FINE_TUNED))
        header = "".join(f"{name:>16}" for name in [*names, "scratch, short", "scratch, long"])
        lines += ["", f"{level + ', % removed':<22}{header}"]
        for amount in dict.fromkeys(row.amount for row in own):
            cells = []
            for stage, name in [*((FINE_TUNED, name) for name in names), (SHORT, None), (LONG, None)]:
                found = [
                    100 * row.score
                    for row in own
                    if row.stage == stage and row.amount == amount and name in (None, row.selector)
                ]
                cells.append(f"{sum(found) / len(found):.2f}" if found else "-")
            lines.append(f"{100 * amount:<22g}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--folder", type=Path, help="where FashionMNIST/raw lies")
    parser.add_argument("--net", choices=["mlp", "cnn", "cnn-norm"], default="mlp")
    parser.add_argument("--output", type=Path, default=Path("compressed"))
    parser.add_argument("--seeds", type=int, default=1, help="networks")
    parser.add_argument("--grid", choices=["reduced", "full"], default="reduced")
    parser.add_argument("--selector", nargs="+", help="by default those of the grid")
    parser.add_argument("--amount", nargs="+", type=float, help="by default those of the grid")
    parser.add_argument("--level", nargs="+", choices=["parameter", "unit"], default=["parameter", "unit"])
    parser.add_argument("--epochs", type=int, help="of training, by default 15 for digits, 5 for fashion")
    parser.add_argument("--fine-tuning", type=int, help="epochs, by default 2 for digits, 1 for fashion")
    parser.add_argument("--scratch", type=int, help="epochs from scratch, by default all of both; 0 leaves it out")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--save", type=Path, help="where to put a checkpoint of the first network")
    options = parser.parse_args()
    defaults = SETTINGS[options.data]
    epochs, fine_tuning = options.epochs or defaults["epochs"], options.fine_tuning or defaults["fine_tuning"]
    is_full = options.grid == "full"
    plan = Plan(
        options.selector or (ALL_SELECTORS if is_full else defaults["selector"]),
        options.amount or (ALL_AMOUNTS if is_full else defaults["amount"]),
        options.level,
        epochs=fine_tuning,
        scratch_epochs=epochs + fine_tuning if options.scratch is None else options.scratch,
    )
    data = loaders(options.data, options.folder, defaults["batch_size"])
    setting = Setting(data)
    networks = {}
    for seed in range(options.seeds):
        print(f"training network {seed + 1} of {options.seeds}", file=sys.stderr)
        L.seed_everything(seed, verbose=False)
        networks[seed] = Classifier(options.net, side=8 if options.data == "digits" else 28)
        setting.fit(networks[seed], epochs, seed)
    if options.save is not None:
        networks[0].trainer.save_checkpoint(options.save, weights_only=True)
    comparison = compress(networks, setting, plan, options.output, tolerance=options.tolerance)
    print(comparison.text)
    print(claims(comparison.summaries))


if __name__ == "__main__":
    main()
