"""A deployed model is updated every month, each time in a process of its own, and must not lose what it knew.

    python examples/update_deployed_model.py                                   # scikit-learn's digits, about a minute
    python examples/update_deployed_model.py --data fashion --folder DATA      # Fashion-MNIST with a made drift
    python examples/update_deployed_model.py --data elec2 --folder DATA        # electricity prices, real drift

A model is trained on the first months. Each further month arrives in its own process, which restores the last
checkpoint, trains on the month, and saves. What comes out is compared with training from scratch on everything seen:
accuracy on held-out data of every month (CSV, and a plot over the months), and what an update costs.

``--search 0.1 1 10`` first chooses the strength of EWC beside rehearsal: the last of the first months plays the update,
and the share of the first months' training data that is then held out is scored.

The drift of digits and Fashion-MNIST: in month m of M images are turned by 90 m / M degrees, and a class c of 10 comes
with a frequency proportional to exp(cos(2 pi (c / 10 - m / M))). Elec2 (Harries 1999) drifts by itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_continual import CostCallback, EWCCallback, RehearsalCallback, Task, restore, split_by_time

MEMORY = 20_000
METHODS: dict[str, Callable[[argparse.Namespace], list[L.Callback]]] = {
    "nothing": lambda options: [],
    "rehearsal 10 %": lambda options: [RehearsalCallback(MEMORY, 0.10)],
    "rehearsal 25 %": lambda options: [RehearsalCallback(MEMORY, 0.25)],
    "rehearsal 50 %": lambda options: [RehearsalCallback(MEMORY, 0.50)],
    "EWC": lambda options: [EWCCallback(options.strength)],
    "rehearsal 50 % + EWC": lambda options: [RehearsalCallback(MEMORY, 0.50), EWCCallback(options.beside)],
    "from scratch": lambda options: [],
}
FROM_SCRATCH = "from scratch"
# Months in all, months of the first training, epochs, learning rate, the strength of EWC, and that beside rehearsal.
SETTINGS = {
    "digits": {"months": 8, "first": 4, "epochs": 10, "lr": 3e-3, "strength": 30.0, "beside": 0.03},
    "fashion": {"months": 12, "first": 4, "epochs": 3, "lr": 1e-3, "strength": 30.0, "beside": 0.03},
    "elec2": {"months": 31, "first": 10, "epochs": 5, "lr": 1e-3, "strength": 30.0, "beside": 0.03},
}


class Classifier(L.LightningModule):
    """A module as one has it in production; nothing in it knows of continual learning."""

    def __init__(self, num_features: int, num_classes: int, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(num_features, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# --- The months -------------------------------------------------------------------------------------------------------


def load_months(data: str, folder: Path | None, num_months: int) -> list[Task]:
    if data == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
        return drifting(images, labels, num_months)
    if folder is None:
        raise SystemExit(f"--data {data} needs --folder, where the data lies.")
    if data == "fashion":
        from torchvision.datasets import FashionMNIST

        whole = FashionMNIST(folder, train=True, download=False)
        return drifting(whole.data[:, None] / 255, whole.targets, num_months)
    with (folder / "electricity.csv").open() as file:
        _, *rows = csv.reader(file)
    table = torch.tensor([[float(cell) for cell in row] for row in rows])  # in the order of time; the class comes last
    dataset = TensorDataset(table[:, :-1], table[:, -1].long())
    return split_by_time(dataset, range(len(table)), num_tasks=num_months, test_fraction=0.2)


def drifting(images: Tensor, labels: Tensor, num_months: int) -> list[Task]:
    """Deal images to months by the frequencies of their classes, and turn each month's."""
    generator = torch.Generator().manual_seed(0)
    month = torch.arange(num_months)
    frequency = torch.exp(torch.cos(2 * math.pi * (labels[:, None] / 10 - month / num_months)))
    owner = torch.multinomial(frequency, 1, generator=generator)[:, 0]
    tasks = []
    for number in range(num_months):
        own = (owner == number).nonzero()[:, 0]
        angle = torch.tensor(math.radians(90 * number / num_months))
        turn = torch.tensor([[torch.cos(angle), -torch.sin(angle), 0], [torch.sin(angle), torch.cos(angle), 0]])
        grid = nn.functional.affine_grid(turn.expand(len(own), 2, 3), list(images[own].shape), align_corners=False)
        turned = nn.functional.grid_sample(images[own], grid, align_corners=False)
        is_test = torch.rand(len(own), generator=generator) < 0.2
        tasks.append(
            Task(
                TensorDataset(turned[~is_test], labels[own][~is_test]),
                test=TensorDataset(turned[is_test], labels[own][is_test]),
            )
        )
    return tasks


# --- One month, in a process of its own -------------------------------------------------------------------------------


def run_month(options: argparse.Namespace, month: int) -> None:
    """Bring every method's model up to this month."""
    months = load_months(options.data, options.folder, options.months)
    x, _ = months[0].train[0]
    num_classes = 2 if options.data == "elec2" else 10
    for seed in range(options.seeds):
        for method in METHODS:
            L.seed_everything(1000 * seed + month, verbose=False)
            model = Classifier(x.numel(), num_classes, options.lr)
            cost = CostCallback(verbose=False)
            callbacks = [*METHODS[method](options), cost]
            folder = options.output / "checkpoints" / f"{method}-{seed}"
            deployed = folder / "deployed.ckpt"
            is_first = month == options.first - 1
            known = months[: month + 1] if is_first or method == FROM_SCRATCH else months[month : month + 1]
            if not is_first and method != FROM_SCRATCH:
                restore(deployed, model, callbacks)
            before = score(model, months[:month]) if options.gate is not None and not is_first else []
            trainer = make_trainer(callbacks, max_epochs=options.epochs)
            train = ConcatDataset([task.train for task in known])
            trainer.fit(model, DataLoader(train, batch_size=options.batch_size, shuffle=True))
            after = score(model, months)
            loss = statistics.mean(before) - statistics.mean(after[:month]) if before else 0.0
            refused = options.gate is not None and loss > options.gate
            # A refused update is kept for inspection; the deployed model stays, and the next month starts from it.
            trainer.save_checkpoint(folder / f"refused-{month}.ckpt" if refused else deployed)
            line = {"month": month, "refused": refused, "accuracy": after, **cost.tasks[-1]}
            with (folder / "history.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def make_trainer(callbacks: list[L.Callback], **limits: int) -> L.Trainer:
    return L.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )


def score(model: L.LightningModule, months: list[Task]) -> list[float]:
    """Return the accuracy on the held-out data of each month."""
    trainer = make_trainer([])
    loaders = [DataLoader(task.test, batch_size=512) for task in months]
    return [trainer.validate(model, loader, verbose=False)[0]["val_acc"] for loader in loaders]


def search(options: argparse.Namespace) -> float:
    """Return the strength that serves best when the last of the first months is an update."""
    months = [
        split_for_search(task) for task in load_months(options.data, options.folder, options.months)[: options.first]
    ]
    results = {}
    for strength in options.search:
        accuracies = []
        for seed in range(options.seeds):
            L.seed_everything(seed, verbose=False)
            model = Classifier(months[0].train[0][0].numel(), 2 if options.data == "elec2" else 10, options.lr)
            callbacks = METHODS["rehearsal 50 % + EWC"](argparse.Namespace(beside=strength))
            for part in (months[:-1], months[-1:]):
                train = ConcatDataset([task.train for task in part])
                loader = DataLoader(train, batch_size=options.batch_size, shuffle=True)
                make_trainer(callbacks, max_epochs=options.epochs).fit(model, loader)
            accuracies.append(statistics.mean(score(model, months)))
        results[strength] = statistics.mean(accuracies)
        print(f"strength {strength:g}: {100 * results[strength]:.2f} % on the validation data", flush=True)
    return max(results, key=results.__getitem__)


def split_for_search(task: Task) -> Task:
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    held = len(order) // 5
    return Task(Subset(task.train, order[held:]), test=Subset(task.train, order[:held]))


# --- All months, and what came out ------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    histories = {
        method: [
            [json.loads(line) for line in path.read_text().splitlines()]
            for seed in range(options.seeds)
            if (path := options.output / "checkpoints" / f"{method}-{seed}" / "history.jsonl").exists()
        ]
        for method in METHODS
    }
    final = {method: [last_deployed(run)["accuracy"] for run in runs] for method, runs in histories.items()}
    scratch = [update["samples"] for run in histories[FROM_SCRATCH] for update in run[1:]]
    scratch_seconds = [update["seconds"] for run in histories[FROM_SCRATCH] for update in run[1:]]
    with (options.output / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "month", "accuracy"])
        for method, runs in final.items():
            for seed, accuracies in enumerate(runs):
                writer.writerows([method, seed, month, value] for month, value in enumerate(accuracies))
    with (options.output / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "accuracy", "standard_error", "share_of_samples", "share_of_seconds", "refused"])
        print(f"{'':<22} {'accuracy, %':>16} {'samples':>9} {'seconds':>9} {'refused':>8}   of from scratch")
        for method, runs in histories.items():
            means = [statistics.mean(accuracies) for accuracies in final[method]]
            error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
            updates = [update for run in runs for update in run[1:]]
            samples = sum(update["samples"] for update in updates) / sum(scratch)
            seconds = sum(update["seconds"] for update in updates) / sum(scratch_seconds)
            refused = sum(update["refused"] for update in updates)
            writer.writerow([method, statistics.mean(means), error, samples, seconds, refused])
            accuracy = f"{100 * statistics.mean(means):.2f} ± {100 * error:.2f}"
            print(f"{method:<22} {accuracy:>16} {samples:>9.3f} {seconds:>9.3f} {refused:>8}")
    draw(options, final)
    print(f"\nTable: {options.output / 'table.csv'}\nPlot:  {options.output / 'time_decay.png'}")


def last_deployed(run: list[dict]) -> dict:
    return [update for update in run if not update["refused"]][-1]


def draw(options: argparse.Namespace, final: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for method, runs in final.items():
        values = 100 * torch.tensor(runs)
        style = {"color": "black", "linestyle": "--"} if method == FROM_SCRATCH else {}
        (line,) = ax.plot(values.mean(0), marker="o", markersize=3, label=method, **style)
        if len(runs) > 1:
            error = values.std(0) / math.sqrt(len(runs))
            low, high = values.mean(0) - error, values.mean(0) + error
            ax.fill_between(range(values.shape[1]), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.axvline(options.first - 0.5, color="grey", linewidth=0.8, linestyle=":")
    ax.set(
        xlabel="month of the held-out data",
        ylabel="accuracy after the last update, %",
        title=f"{options.data}: time decay",
    )
    ax.legend(fontsize="small")
    figure.savefig(options.output / "time_decay.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--folder", type=Path, help="where FashionMNIST/raw or electricity.csv lies")
    parser.add_argument("--output", type=Path, default=Path("deployed"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gate", type=float, help="refuse an update that loses more accuracy than this on old months")
    parser.add_argument(
        "--search", type=float, nargs="+", help="strengths of EWC to choose from, on a validation month"
    )
    parser.add_argument("--month", type=int, help=argparse.SUPPRESS)  # in the process of one month
    for name, kind in (
        ("months", int),
        ("first", int),
        ("epochs", int),
        ("lr", float),
        ("strength", float),
        ("beside", float),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"by default {[s[name] for s in SETTINGS.values()]}")
    options = parser.parse_args()
    for name, value in SETTINGS[options.data].items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.month is not None:
        run_month(options, options.month)
        return
    beside = search(options) if options.search else options.beside
    for seed in range(options.seeds):
        for method in METHODS:
            folder = options.output / "checkpoints" / f"{method}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "history.jsonl").unlink(missing_ok=True)
    for month in range(options.first - 1, options.months):
        print(f"month {month + 1} of {options.months}", file=sys.stderr)
        told = ["--month", str(month), "--beside", str(beside)]
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *told], check=True)
    report(options)


if __name__ == "__main__":
    main()
