"""Semantic segmentation of tasks one after the other in one small U-Net: nothing forgotten, capacity as needed.

    python examples/adaptive_segmentation.py                  # shapes drawn at random
    python examples/adaptive_segmentation.py --folder DATA --tasks drives --epochs 24 --retrain 8 --trials 3 \\
        --tolerance 0 --floor 0.15 --batch-size 4 --seeds 3   # street scenes: camvid_120x90.npz of DATA

The tasks of street scenes are four drives, one at dusk, with all classes, of which the last quarter of frames is the
test; or (`--tasks classes`) three groups of classes over the same images: sky, building and tree; road, pavement and
fence; cars, pedestrians and cyclists, everything else being background. Shares are searched by the mean intersection
over union of torchmetrics on the validation images (a mean over images). Written is that of the test images (each class
over all images, then the mean) for the network of all tasks and for one network a task, which trains for as many
epochs, with standard errors over seeds, and a picture of predictions.

The command above gave 34.2 ± 0.3 % on average over the drives, and 34.1 ± 0.1 with a network for each. Groups of
classes (`--tasks classes --width 16 --epochs 12 --retrain 6 --trials 2 --tolerance 0 --floor 0.25 --seeds 3`) gave
43.2 ± 0.7, and 44.2 ± 0.3 with a network for each, from 43 to 69 % of the weights of one.
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
import matplotlib.figure
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.segmentation import MeanIoU

from lightning_continual import AdaptiveCompressionCallback, ContinualDataModule, Task, TaskStream

# Classes of CamVid: 0 sky, 1 building, 2 pole, 3 road, 4 pavement, 5 tree, 6 sign, 7 fence, 8 car, 9 pedestrian,
# 10 cyclist, 11 unlabelled.
STREET = {"far": [0, 1, 5], "ground": [3, 4, 7], "vehicles": [8, 9, 10]}
EVERYTHING = list(range(11))
# The drives of CamVid, as they lie in the parts of the file: the first at dusk, the others by day.
DRIVES = {
    "0001TP": [("train", 0, 62), ("test", 0, 62)],
    "0006R0": [("train", 62, 163)],
    "0016E5": [("train", 163, 367), ("val", 0, 101)],
    "Seq05VD": [("test", 62, 233)],
}
SHAPES = {"disc": [1], "square": [2], "bars": [3]}


def block(in_channels: int, out_channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for number in (in_channels, out_channels):
        layers += [nn.Conv2d(number, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(L.LightningModule):
    """Two steps down, two up; the last layer is named `head`, of which each task has a copy of its own."""

    def __init__(self, width: int, num_outputs: int, lr: float) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv2d(width, num_outputs, 1)
        self.iou = MeanIoU(num_outputs, include_background=False, input_format="index")
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down[0](x)
        middle = self.down[1](nn.functional.max_pool2d(fine, 2))
        coarse = self.down[2](nn.functional.max_pool2d(middle, 2))
        for layer, skip in zip(self.up, (middle, fine), strict=True):
            coarse = nn.functional.interpolate(coarse, skip.shape[-2:], mode="nearest")
            coarse = layer(torch.cat([coarse, skip], dim=1))
        return self.head(coarse)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        known = batch[1] != 255
        self.iou.update(torch.where(known, self(batch[0]).argmax(1), 0), torch.where(known, batch[1], 0))
        self.log("val_miou", self.iou)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)  # of a task, or of retraining
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def of_task(labels: Tensor, classes: list[int], unlabelled: int) -> Tensor:
    """Number a task's classes from 1; 0 is everything else, and 255 what has no label."""
    own = torch.zeros_like(labels)
    for number, one in enumerate(classes, 1):
        own[labels == one] = number
    own[labels == unlabelled] = 255
    return own


def shapes(number: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw a disc, a square and two bars into each image, under noise."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(number, size, size, dtype=torch.long)
    for one in labels:
        a, b, c, d, e = (torch.rand(5, generator=generator) * (size - 12) + 6).tolist()
        one[((x - e).abs() < 2) | ((x - e - 5).abs() < 2)] = 3
        one[((x - a).abs() < 5) & ((y - b).abs() < 5)] = 2
        one[(x - c) ** 2 + (y - d) ** 2 < 30] = 1
    colors = torch.tensor([[0.3, 0.3, 0.3], [0.7, 0.3, 0.3], [0.3, 0.6, 0.3], [0.3, 0.3, 0.7]])
    images = colors[labels].movedim(-1, 1)
    return images + 0.3 * torch.randn(images.shape, generator=generator), labels


def street_scenes(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images and labels, by part of the data set."""
    arrays = np.load(options.folder / "camvid_120x90.npz")
    parts = {}
    for name in ("train", "val", "test"):
        x = torch.from_numpy(arrays[f"{name}_x"]).float().movedim(-1, 1) / 255
        x = nn.functional.interpolate(x, scale_factor=options.scale, mode="area")
        y = torch.from_numpy(arrays[f"{name}_y"]).long()[:, None].float()
        parts[name] = x - 0.5, nn.functional.interpolate(y, x.shape[-2:], mode="nearest")[:, 0].long()
    return parts


def groups_of_classes(
    parts: list[tuple[Tensor, Tensor]], groups: dict[str, list[int]], unlabelled: int, most: int | None
) -> list[Task]:
    return [
        Task(*(TensorDataset(x[:most], of_task(y[:most], classes, unlabelled)) for x, y in parts), name=name)
        for name, classes in groups.items()
    ]


def sequences(parts: dict[str, tuple[Tensor, Tensor]], most: int | None) -> list[Task]:
    """Make a task of each drive; of its frames the last quarter is for the test, 15 % before it for validation."""
    tasks = []
    for name, places in DRIVES.items():
        x = torch.cat([parts[part][0][first:last] for part, first, last in places])[:most]
        y = of_task(torch.cat([parts[part][1][first:last] for part, first, last in places])[:most], EVERYTHING, 11)
        sizes = [len(x) - len(x) * 2 // 5, len(x) * 2 // 5 - len(x) // 4, len(x) // 4]
        split = zip(x.split(sizes), y.split(sizes), strict=True)
        tasks.append(Task(*(TensorDataset(*one) for one in split), name=name))
    return tasks


def load(options: argparse.Namespace) -> list[Task]:
    if options.folder is None:
        return groups_of_classes([shapes(n, seed) for seed, n in enumerate((160, 60, 60))], SHAPES, -1, options.images)
    parts = street_scenes(options)
    if options.tasks == "drives":
        return sequences(parts, options.images)
    return groups_of_classes(list(parts.values()), STREET, 11, options.images)


class Seen(L.Callback):
    """Keeps what each task predicts when it has been learnt."""

    def __init__(self, compression: AdaptiveCompressionCallback, tasks: list[Task]) -> None:
        self.compression = compression
        self.images = [one.test.tensors[0][:20] for one in tasks]
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def of(self, model: nn.Module, task: int) -> Tensor:
        with self.compression.as_task(model, task):
            return model(self.images[task])

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.outputs.append(self.of(pl_module, task))


def fit(
    tasks: list[Task],
    num_outputs: int,
    epochs: int,
    callbacks: list[L.Callback],
    seed: int,
    options: argparse.Namespace,
) -> UNet:
    L.seed_everything(seed, verbose=False)
    model = UNet(options.width, num_outputs, options.lr)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the stream decides
        callbacks=[TaskStream(epochs), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
        check_val_every_n_epoch=epochs,
    )
    trainer.fit(model, datamodule=ContinualDataModule(tasks, batch_size=options.batch_size, seed=seed))
    return model


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(20)])


def miou(predicted: Tensor, labels: Tensor, num_outputs: int) -> float:
    """Mean over the classes of the task, each over all images."""
    known = labels != 255
    scores = []
    for number in range(1, num_outputs):
        a, b = (predicted == number) & known, (labels == number) & known
        if bool((a | b).any()):
            scores.append(float((a & b).sum() / (a | b).sum()))
    return statistics.mean(scores)


def picture(tasks: list[Task], predicted: list[Tensor], path: Path) -> None:
    """Draw for each task three test images, their labels, and what the network of all tasks predicts."""
    most = max(int(one.where(one != 255, 0).max()) for task in tasks for one in [task.test.tensors[1]])
    figure = matplotlib.figure.Figure((3 * 2.2 * len(tasks), 5.2), layout="compressed")
    axes = figure.subplots(3, 3 * len(tasks))
    for number, (task, found) in enumerate(zip(tasks, predicted, strict=True)):
        images, labels = task.test.tensors
        columns = axes[:, 3 * number : 3 * number + 3]
        for row, place in zip(columns, range(0, len(images), -(-len(images) // 3)), strict=True):
            image, known = images[place], labels[place] != 255
            row[0].imshow(((image - image.min()) / (image.max() - image.min())).movedim(0, -1))
            for ax, one in zip(row[1:], (labels[place].where(known, 0), found[place]), strict=True):
                ax.imshow(one, cmap="tab20", vmin=0, vmax=most, interpolation="nearest")
        for ax, kind in zip(columns[0], ("image", "labels", "predicted"), strict=True):
            ax.set_title(f"{task.name}: {kind}")
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def run(tasks: list[Task], num_outputs: int, seed: int, options: argparse.Namespace) -> list[tuple[float, ...]]:
    """Return for each task its score in the network of all, in one of its own, and what it gave back."""
    compression = AdaptiveCompressionCallback(
        options.tolerance,
        trials=options.trials,
        monitor="val_miou",
        retrain_epochs=options.retrain,
        objective="constrained" if options.weight is None else "scalarised",
        weight=options.weight or 0.0,
        num_tasks=len(tasks),
        floor=options.floor,
        norms="per-task",
        restart=options.restart,
        head="head.*",
        seed=seed,
    )
    seen = Seen(compression, tasks)
    model = fit(tasks, num_outputs, options.epochs, [compression, seen], seed, options)
    changed = sum(not torch.equal(before, seen.of(model, task)) for task, before in enumerate(seen.outputs))
    found, rows = [], []
    for number, one in enumerate(tasks):
        images, labels = one.test.tensors
        with compression.as_task(model, number):
            found.append(predictions(model, images))
        alone = fit([one], num_outputs, options.epochs + options.retrain, [], seed, options).eval()
        scores = [miou(predicted, labels, num_outputs) for predicted in (found[-1], predictions(alone, images))]
        rows.append((*scores, compression.packed.found[number].share))
    used = 1 - compression.packed.free_share
    print(f"seed {seed}: {100 * used:.0f} % of one network used; tasks whose outputs have changed since: {changed}")
    texts = [f"{one.name} {100 * a:.1f} (alone {100 * b:.1f})" for one, (a, b, _) in zip(tasks, rows, strict=True)]
    print("   ", ", ".join(texts), flush=True)
    if seed == 0:
        picture(tasks, found, options.output / "predictions.png")
        compression.plot_capacity().savefig(options.output / "capacity.png")
        compression.plot_scores().savefig(options.output / "scores.png")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where camvid_120x90.npz lies")
    parser.add_argument("--tasks", choices=["classes", "drives"], default="classes", help="of the street scenes")
    parser.add_argument("--output", type=Path, default=Path("segmentation"), help="where table and figures go")
    parser.add_argument("--images", type=int, default=None, help="so many images of each part, for a quick run")
    parser.add_argument("--scale", type=float, default=0.5, help="of the street scenes")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--retrain", type=int, default=2)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--weight", type=float, help="of the share given back, against the score, without a tolerance")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--floor", type=float, help="of the weights for each task to come")
    parser.add_argument("--restart", choices=["zero", "drawn"], default="drawn", help="of free weights")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.output.mkdir(parents=True, exist_ok=True)

    tasks = load(options)
    num_outputs = 1 + max(int(y[y != 255].max()) for one in tasks for y in [one.train.tensors[1]])
    rows = [run(tasks, num_outputs, seed, options) for seed in range(options.seeds)]
    names = [one.name for one in tasks]
    with (options.output / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "miou", "error", "alone", "error_alone", "gap", "error_gap", "share"])
        for place, name in enumerate([*names, "mean"]):
            together, alone, shares = (
                [row[place][column] if name in names else statistics.mean(one[column] for one in row) for row in rows]
                for column in range(3)
            )
            gaps = [b - a for a, b in zip(together, alone, strict=True)]
            columns = [mean_and_error(one) for one in (together, alone, gaps)]
            if name in names:
                writer.writerow([name, *(value for column in columns for value in column), statistics.mean(shares)])
            texts = [
                f"{100 * mean:5.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}") for mean, error in columns
            ]
            print(
                f"{name:<10} mIoU {texts[0]}, alone {texts[1]}, gap {texts[2]}, gave back {statistics.mean(shares):.3f}"
            )


if __name__ == "__main__":
    main()
