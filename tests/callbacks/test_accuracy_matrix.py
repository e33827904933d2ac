"""The accuracy matrix: its numbers against validation by hand, and that it leaves no trace."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_continual import AccuracyMatrixCallback, ContinualDataModule, RehearsalCallback, Task, TaskStream

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

NUMBERS = ["average_accuracy", "average_incremental_accuracy", "learning_accuracy"]
TRANSFERS = ["backward_transfer", "forgetting", "forward_transfer"]


def by_hand(module: Any, datasets: list[Any], batch_size: int = 4) -> tuple[Tensor, Tensor]:
    """Return accuracies and losses, of a copy of the network in evaluation mode; float64 sums of batch means."""
    net = nn.Sequential(*(layer for layer in module.net if not isinstance(layer, nn.Dropout)))
    accuracies, losses = [], []
    with torch.no_grad():
        for dataset in datasets:
            accuracy = loss = 0.0
            for x, y in DataLoader(dataset, batch_size, generator=torch.Generator()):
                logits = net(x)
                accuracy += float((logits.argmax(1) == y).sum())
                loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            accuracies.append(accuracy / len(dataset))
            losses.append(loss / len(dataset))
    return torch.tensor(accuracies).double(), torch.tensor(losses).double()


class ByHand(L.Callback):
    """Scores all tasks by a loop of its own when a task ends."""

    def __init__(self, datasets: list[Any]) -> None:
        self.datasets = datasets
        self.accuracies: list[Tensor] = []
        self.losses: list[Tensor] = []

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        accuracies, losses = by_hand(pl_module, self.datasets)
        self.accuracies.append(accuracies)
        self.losses.append(losses)


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_every_entry_is_that_of_a_loop_by_hand(trainer: Callable[..., L.Trainer]) -> None:
    tasks = make_tasks((24, 18, 22))
    module, oracle = Classifier(), ByHand([task.test for task in tasks])
    accuracy = AccuracyMatrixCallback(verbose=False)
    loss = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
    before = by_hand(module, oracle.datasets)
    trainer(TaskStream(2), oracle, accuracy, loss).fit(module, datamodule=ContinualDataModule(tasks, batch_size=4))
    assert_close(accuracy.matrix.compute(), torch.stack(oracle.accuracies), rtol=1e-6, atol=0)
    assert_close(loss.matrix.compute(), torch.stack(oracle.losses), rtol=1e-6, atol=0)
    assert_close(accuracy.matrix.baseline, before[0], rtol=1e-6, atol=0)
    assert_close(loss.matrix.baseline, before[1], rtol=1e-6, atol=0)
    assert len(set(loss.matrix.compute().flatten().tolist())) == 9


def test_every_entry_is_what_validate_logs_to_all_digits(trainer: Callable[..., L.Trainer]) -> None:
    tasks, module = make_tasks((24, 18, 22)), Classifier()
    loaders = [DataLoader(task.test, 4) for task in tasks]
    matrix = AccuracyMatrixCallback("val_loss", loaders=loaders, higher_is_better=False, verbose=False)
    expected = []
    for task in tasks:
        trainer(matrix, max_epochs=2).fit(module, DataLoader(task.train, 4))
        for loader in loaders:
            (logged,) = trainer().validate(module, loader, verbose=False)
            expected.append(logged["val_loss"])
    assert matrix.matrix.compute().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("split", "val", "test", "scored"),
    [
        (None, [1, 1], [1, 1], "test"),
        ("test", [1, 1], [1, 1], "test"),
        ("val", [1, 1], [1, 1], "val"),
        (None, [1, 1], [1, 0], "val"),
        (None, [0, 1], [1, 1], "test"),
    ],
)
def test_the_split_is_the_one_asked_for_or_that_all_tasks_have(
    trainer: Callable[..., L.Trainer], split: Any, val: list[int], test: list[int], scored: str
) -> None:
    tasks = [
        Task(task.train, task.val if has_val else None, task.test if has_test else None)
        for task, has_val, has_test in zip(make_tasks((24, 22)), val, test, strict=True)
    ]
    oracle = ByHand([getattr(task, scored) for task in tasks])
    matrix = AccuracyMatrixCallback("val_loss", split=split, higher_is_better=False, verbose=False)
    trainer(TaskStream(), oracle, matrix).fit(Classifier(), datamodule=ContinualDataModule(tasks, batch_size=4))
    assert_close(matrix.matrix.compute(), torch.stack(oracle.losses), rtol=1e-6, atol=0)


def test_a_held_out_fraction_can_be_scored(trainer: Callable[..., L.Trainer]) -> None:
    data = ContinualDataModule(make_tasks((24, 22), val=False, test=False), batch_size=4, val_fraction=0.25)
    oracle = ByHand([data.evaluation_dataloader(task, "val").dataset for task in range(2)])  # type: ignore[union-attr]
    matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
    trainer(TaskStream(), oracle, matrix).fit(Classifier(), datamodule=data)
    assert_close(matrix.matrix.compute(), torch.stack(oracle.losses), rtol=1e-6, atol=0)


def test_loaders_may_grow_from_fit_to_fit(trainer: Callable[..., L.Trainer]) -> None:
    module, loaders = Classifier(), []
    matrix = AccuracyMatrixCallback(
        "val_loss", loaders=loaders_of(make_tasks()[:1], loaders), higher_is_better=False, verbose=False
    )
    expected = torch.full((3, 3), torch.nan, dtype=torch.float64)
    tasks = make_tasks()
    for month, task in enumerate(tasks):
        if month:
            loaders_of([task], loaders)
        trainer(matrix, max_epochs=1).fit(module, DataLoader(task.train, 4))
        _, expected[month, : month + 1] = by_hand(module, [one.test for one in tasks[: month + 1]])
    assert_close(matrix.matrix.compute(), expected, rtol=1e-6, atol=0, equal_nan=True)


def loaders_of(tasks: list[Task], loaders: list[Any]) -> list[Any]:
    loaders += [DataLoader(task.test, 4) for task in tasks]
    return loaders


class WithMetrics(Classifier):
    """Logs a torchmetrics object, and what only the whole epoch can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(6, average="micro")
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.outputs.append(logits.argmax(1) == y)

    def on_validation_epoch_end(self) -> None:
        self.log("epoch", torch.cat(self.outputs).float().mean())
        self.outputs.clear()


@pytest.mark.parametrize("monitor", ["accuracy", "epoch"])
def test_metric_objects_and_epoch_ends_are_scored(trainer: Callable[..., L.Trainer], monitor: str) -> None:
    tasks = make_tasks((24, 18, 22))
    oracle, matrix = ByHand([task.test for task in tasks]), AccuracyMatrixCallback(monitor, verbose=False)
    trainer(TaskStream(), oracle, matrix).fit(WithMetrics(), datamodule=ContinualDataModule(tasks, batch_size=4))
    assert_close(matrix.matrix.compute(), torch.stack(oracle.accuracies), rtol=1e-6, atol=0)


class Synced(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)


class Write(L.Callback):
    def __init__(self, path: Path, matrix: AccuracyMatrixCallback) -> None:
        self.path, self.matrix = path, matrix

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.matrix.matrix.state_dict(), f"{self.path}-{trainer.global_rank}")


@pytest.mark.parametrize(
    "module",
    [
        Synced,
        pytest.param(
            Classifier,
            marks=pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
        ),
    ],
    ids=["sync_dist", "plain"],
)
def test_two_processes_score_what_one_scores(
    trainer: Callable[..., L.Trainer], tmp_path: Path, module: Callable[..., Any]
) -> None:
    for devices in (1, 2):
        torch.manual_seed(3)
        matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
        data = ContinualDataModule(make_tasks((24, 23, 19), val=False), batch_size=4 // devices)
        options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        write = Write(tmp_path / f"of-{devices}", matrix)
        trainer(TaskStream(2), matrix, write, **options).fit(module(dropout=0.0, lr=1e-9), datamodule=data)
    one, first, second = (torch.load(tmp_path / name) for name in ("of-1-0", "of-2-0", "of-2-1"))
    assert one["weight_sums"].sum() == 12  # baseline and three rows
    assert_close(first, one, rtol=1e-6, atol=0)  # float32 sums over other batches
    assert_close(second, first, rtol=0, atol=0)


def test_two_monitors_in_one_trainer_are_told_apart(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    both = (
        AccuracyMatrixCallback(verbose=False),
        AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False),
    )
    first = trainer(TaskStream(), *both)
    first.fit(Classifier(), datamodule=ContinualDataModule(make_tasks(), batch_size=4))
    assert both[0].state_key != both[1].state_key
    first.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    for one in both:
        again = AccuracyMatrixCallback(one.monitor, higher_is_better=one.higher_is_better)
        again.load_state_dict(saved[one.state_key])
        assert_close(again.matrix.compute(), one.matrix.compute(), rtol=0, atol=0)


def test_a_row_scored_again_replaces_the_old_one(trainer: Callable[..., L.Trainer]) -> None:
    class Twice(L.Callback):
        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            with torch.no_grad():
                pl_module.net[3].bias += 1.0  # what was scored before is no more
            matrix.on_task_end(trainer, pl_module, task)

    tasks = make_tasks()
    matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
    oracle = ByHand([task.test for task in tasks])
    trainer(TaskStream(), matrix, Twice(), oracle).fit(
        Classifier(), datamodule=ContinualDataModule(tasks, batch_size=4)
    )
    assert_close(matrix.matrix.compute(), torch.stack(oracle.losses), rtol=1e-6, atol=0)
    assert set(matrix.matrix.weight_sums.flatten().tolist()) == {1.0}


def test_a_run_killed_while_it_scored_scores_the_row_anew(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    class Kill(L.Callback):
        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            if task == 1:
                trainer.save_checkpoint(tmp_path / "scored.ckpt")
                raise KeyboardInterrupt

    def run(*callbacks: L.Callback, **options: Any) -> Tensor:
        torch.manual_seed(3)
        matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)
        data = ContinualDataModule(make_tasks(), batch_size=4)
        trainer(TaskStream(), matrix, *callbacks).fit(Classifier(dropout=0.0), datamodule=data, **options)
        return matrix.matrix.compute()

    with pytest.raises(SystemExit):
        run(Kill())
    assert_close(run(ckpt_path=tmp_path / "scored.ckpt", weights_only=True), run(), rtol=0, atol=0)


def test_without_the_baseline_the_untrained_model_is_not_scored(trainer: Callable[..., L.Trainer]) -> None:
    matrix = AccuracyMatrixCallback(baseline=False, verbose=False)
    trainer(TaskStream(), matrix).fit(Classifier(), datamodule=ContinualDataModule(make_tasks(), batch_size=4))
    assert matrix.matrix.baseline.isnan().all()
    assert "forward_transfer" not in matrix.matrix.summary()
    assert not matrix.matrix.compute().isnan().any()


def test_fast_dev_run_scores_one_batch_of_every_task(trainer: Callable[..., L.Trainer]) -> None:
    class Counting(Classifier):
        validated = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            type(self).validated += 1

    matrix = AccuracyMatrixCallback(verbose=False)
    data = ContinualDataModule(make_tasks(val=False), batch_size=4)
    trainer(TaskStream(), matrix, fast_dev_run=True).fit(Counting(), datamodule=data)
    assert Counting.validated == 1 + 4 * 3


# --- What can be missing ----------------------------------------------------------------------------------------------


class Untrained(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step was trained")


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("engine", ["stream", "fit"])
@pytest.mark.parametrize("first", [0, 2], ids="task {}".format)
def test_an_unknown_monitor_is_named_before_training_with_what_was_logged(
    trainer: Callable[..., L.Trainer], baseline: bool, engine: str, first: int
) -> None:
    data = ContinualDataModule(make_tasks(), batch_size=4)
    matrix = AccuracyMatrixCallback("accuracy", baseline=baseline)
    callbacks: list[L.Callback] = [matrix]
    if engine == "fit":
        data.current_task, matrix._tasks_ended = first, first
    else:
        callbacks.append(TaskStream())
        callbacks[1]._task = first  # type: ignore[attr-defined]
    message = (
        r"monitor='accuracy'\)` found no such metric on task 0; `validation_step` logged \['val_acc', 'val_loss'\]"
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer(*callbacks, max_epochs=1 if engine == "fit" else -1).fit(Untrained(), datamodule=data)


def test_a_module_without_validation_step_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    class Module(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("a step was trained")

        def configure_optimizers(self) -> None:
            return None

    data = ContinualDataModule(make_tasks(val=False), batch_size=4)
    with pytest.raises(
        MisconfigurationException, match=r"scores by `validation_step`, but Module has none. Define one"
    ):
        trainer(TaskStream(), AccuracyMatrixCallback()).fit(Module(), datamodule=data)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, r"Every task must have val data to be scored on, but tasks \[0, 1, 2\] have none. Pass `test=`"),
        ("test", r"Every task must have test data to be scored on, but tasks \[0, 1, 2\] have none"),
    ],
)
def test_data_without_anything_to_score_on_are_refused(
    trainer: Callable[..., L.Trainer], split: Any, message: str
) -> None:
    data = ContinualDataModule(make_tasks(val=False, test=False), batch_size=4)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(TaskStream(), AccuracyMatrixCallback(split=split)).fit(Untrained(), datamodule=data)


def test_loaders_of_ones_own_need_evaluation_loaders(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(MisconfigurationException, match=r"found no data to score on: .* Pass `loaders=`"):
        trainer(AccuracyMatrixCallback(), max_epochs=1).fit(Untrained(), DataLoader(make_tasks()[0].train, 4))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`split` must be 'test', 'val' or None, but got 'train'"):
        AccuracyMatrixCallback(split="train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`loaders` must hold one evaluation loader a task, but got none"):
        AccuracyMatrixCallback(loaders=[])


def test_a_pytorch_lightning_trainer_and_module_are_served(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tasks, module = make_tasks((8, 8)), Module()
    loaders = [DataLoader(task.test, 4) for task in tasks]
    matrix = AccuracyMatrixCallback("val_loss", loaders=loaders, higher_is_better=False, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for task in tasks:
        fit = pl.Trainer(
            callbacks=[matrix], max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet
        )
        fit.fit(module, DataLoader(task.train, 4), loaders[0])
    _, losses = by_hand(module, [task.test for task in tasks])
    assert_close(matrix.matrix.compute()[1], losses, rtol=1e-6, atol=0)


# --- No trace ---------------------------------------------------------------------------------------------------------


class Decisions(L.Callback):
    """Notes all that the user's own callbacks can see."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _note(self, when: str, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
        values = [{name: float(value) for name, value in one.items()} for one in metrics]
        self.seen.append((when, trainer.global_step, trainer.current_epoch, values))

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._note("start", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._note("batch", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._note("epoch", trainer)

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._note("end", trainer)


class Verbose(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("shown", float(len(batch[0])), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        assert "val_loss" in self.trainer.callback_metrics  # reading makes Lightning write
        assert self.trainer.progress_bar_metrics is not None


@pytest.mark.filterwarnings("ignore:A checkpoint callback with `monitor`")
@pytest.mark.parametrize("engine", ["stream", "fit"])
def test_what_the_users_callbacks_see_and_decide_is_the_same(
    trainer: Callable[..., L.Trainer], tmp_path: Path, engine: str
) -> None:
    def run(*observers: L.Callback, name: str) -> Any:
        torch.manual_seed(3)
        decisions = Decisions()
        best = ModelCheckpoint(tmp_path / name, "{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=2)
        callbacks: list[L.Callback] = [*observers, decisions, best]
        data = ContinualDataModule(make_tasks(), batch_size=4)
        if engine == "stream":
            fit = trainer(TaskStream(3), *callbacks, enable_checkpointing=True)
        else:
            stop = EarlyStopping("val_loss", patience=1, min_delta=0.3)
            fit = trainer(*callbacks, stop, enable_checkpointing=True, max_epochs=9)
        fit.fit(module := Verbose(), datamodule=data)
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        return decisions.seen, files, fit.current_epoch, float(best.best_model_score), module.state_dict()

    without = run(name="without")
    scored = run(AccuracyMatrixCallback(verbose=False), name="with")
    assert scored[:4] == without[:4]
    assert_close(scored[4], without[4], rtol=0, atol=0)
    assert len(without[1]) == 2
    assert engine == "stream" or without[2] < 9


def test_loaders_and_steps_that_draw_at_random_do_not_change_training(trainer: Callable[..., L.Trainer]) -> None:
    class Drawing(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([batch[0] + torch.rand(1), batch[1]], batch_idx)

    def run(*callbacks: L.Callback) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = Drawing()
        trainer(*callbacks, max_epochs=2).fit(module, DataLoader(make_tasks()[0].train, 4, shuffle=True))
        return module.state_dict()

    loaders = [DataLoader(task.test, 4, shuffle=True) for task in make_tasks()]
    assert_close(run(AccuracyMatrixCallback(loaders=loaders, verbose=False)), run(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_the_modules_metrics_modes_and_hooks_are_left_as_they_were(trainer: Callable[..., L.Trainer]) -> None:
    class Frozen(WithMetrics):
        def __init__(self) -> None:
            super().__init__()
            self.train_accuracy = MulticlassAccuracy(6, average="micro")
            self.net[2].eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.train_accuracy.update(self(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    class Compare(L.Callback):
        def _state(self, module: Any) -> Any:
            metric = module.train_accuracy
            modes = [one.training for one in module.modules()]
            grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            return metric.tp.clone(), metric.fp.clone(), metric._update_count, modes, grads, torch.get_rng_state()

        def on_task_end(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
            states.append(self._state(pl_module))

    states: list[Any] = []
    data = ContinualDataModule(make_tasks(), batch_size=4)
    matrix = AccuracyMatrixCallback("accuracy", verbose=False)
    trainer(TaskStream(), Compare(), matrix, Compare()).fit(Frozen(), datamodule=data)
    assert len(states) == 6
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert_close(before, after, rtol=0, atol=0)
        assert before[2] > 0


# --- What is logged and printed ---------------------------------------------------------------------------------------


def fit_with(trainer: Callable[..., L.Trainer], *loggers: Any, **options: Any) -> tuple[AccuracyMatrixCallback, Tensor]:
    matrix = AccuracyMatrixCallback(**{"verbose": False, **options})
    fit = trainer(TaskStream(2), matrix, logger=list(loggers))
    fit.fit(Classifier(), datamodule=ContinualDataModule(make_tasks(), batch_size=4))
    return matrix, matrix.matrix.compute()


def test_a_csv_file_holds_every_score_and_number(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    matrix, R = fit_with(trainer, CSVLogger(tmp_path, name="csv", version=0))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_acc/task_0"]]
    assert [int(row["step"]) for row in rows] == [0, 12, 24, 36]
    scores = torch.tensor([[float(row[f"val_acc/task_{task}"]) for task in range(3)] for row in rows]).double()
    assert_close(scores, torch.cat((matrix.matrix.baseline[None], R)), rtol=1e-6, atol=0)
    for name, value in matrix.matrix.summary().items():
        assert float(rows[-1][f"val_acc/{name}"]) == pytest.approx(value, rel=1e-6)
    assert sorted(matrix.matrix.summary()) == sorted(NUMBERS + TRANSFERS)
    assert rows[1]["val_acc/forgetting"] == ""  # nothing to forget yet
    assert rows[1]["val_acc/average_accuracy"] != ""


def test_tensorboard_gets_scalars_and_a_heat_map(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, R = fit_with(trainer, TensorBoardLogger(tmp_path, name="tb", version=0))
    (file,) = (tmp_path / "tb" / "version_0").glob("events*")
    read = events.EventAccumulator(str(file))
    read.Reload()
    for task in range(3):
        found = [(event.step, event.value) for event in read.Scalars(f"val_acc/task_{task}")]
        assert [step for step, _ in found] == [0, 12, 24, 36]
        assert [value for _, value in found[1:]] == pytest.approx(R[:, task].tolist(), rel=1e-6)
    assert {f"val_acc/{name}" for name in NUMBERS + TRANSFERS} <= set(read.Tags()["scalars"])
    figures = read.Images("val_acc/matrix")
    assert [figure.step for figure in figures] == [12, 24, 36]
    assert all(figure.encoded_image_string.startswith(b"\x89PNG") for figure in figures)


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Read the history from an offline run: LevelDB's log format around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record, history = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # a header does not cross a block's end
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or a last part
            parsed = Record.FromString(record)
            if parsed.history.item:
                items = parsed.history.item
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return history


def test_wandb_gets_scalars_a_table_and_a_heat_map(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    matrix, R = fit_with(trainer, WandbLogger(offline=True, save_dir=tmp_path, project="test"))
    wandb.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    tables = sorted(run.glob("files/media/table/val_acc/matrix*.table.json"), key=lambda path: path.stat().st_mtime)
    assert len(tables) == 3
    table = json.loads(tables[-1].read_text())
    assert table["columns"] == ["after task", "task 0", "task 1", "task 2"]
    assert_close(torch.tensor(table["data"]).double()[:, 1:], R, rtol=1e-6, atol=0)
    assert [row[0] for row in table["data"]] == [0, 1, 2]
    images = list(run.glob("files/media/images/val_acc/matrix_plot*.png"))
    assert len(images) == 3
    (file,) = run.glob("run-*.wandb")
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + 20  # wandb's own process may still be writing after `finish`
    while len(rows) < 4 and time.monotonic() < deadline:
        rows = [row for row in wandb_history(file) if "val_acc/task_0" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 12, 24, 36]
    assert [row["val_acc/task_2"] for row in rows[1:]] == pytest.approx(R[:, 2].tolist(), rel=1e-6)
    assert rows[-1]["val_acc/forgetting"] == pytest.approx(matrix.matrix.summary()["forgetting"], rel=1e-6)


def test_every_logger_gets_everything(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    fit_with(trainer, CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two"))
    one, two = ((tmp_path / name / "version_0" / "metrics.csv").read_text() for name in ("one", "two"))
    assert one == two
    assert "val_acc/task_2" in one


def test_the_matrix_is_printed_when_the_fit_ends(trainer: Callable[..., L.Trainer], capsys: Any) -> None:
    _, R = fit_with(trainer, verbose=True)
    out = capsys.readouterr().out
    assert out.count("after 2") == 1
    for value in R[2].tolist():
        assert f"{100 * value:.1f}" in out
    fit_with(trainer, verbose=False)
    assert "after" not in capsys.readouterr().out


def test_plot_draws_the_matrix(trainer: Callable[..., L.Trainer]) -> None:
    pytest.importorskip("matplotlib")
    matrix, R = fit_with(trainer)
    figure, ax = matrix.plot()
    assert [text.get_text() for text in ax.texts] == [f"{100 * value:.1f}" for value in R.flatten().tolist()]
    assert matrix.plot(ax=ax)[1] is ax
    assert figure is ax.figure


def test_scoring_does_not_wake_rehearsal(trainer: Callable[..., L.Trainer]) -> None:
    def run(*callbacks: L.Callback) -> list[int]:
        torch.manual_seed(3)
        rehearsal = RehearsalCallback(20)
        data = ContinualDataModule(make_tasks(), batch_size=4)
        trainer(*callbacks, TaskStream(), rehearsal).fit(Classifier(), datamodule=data)
        return (rehearsal.memory.draw(20, before=3)[0][:, 0] * 1000).tolist()

    assert run(AccuracyMatrixCallback(verbose=False)) == run()


def test_tasks_of_one_sample_and_one_task_are_a_matrix(trainer: Callable[..., L.Trainer]) -> None:
    one = TensorDataset(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    matrix = AccuracyMatrixCallback(verbose=False)
    data = ContinualDataModule([Task(one, one, one)], batch_size=4)
    trainer(TaskStream(), matrix).fit(Classifier(), datamodule=data)
    assert matrix.matrix.compute().shape == (1, 1)


def test_a_module_that_expects_several_loaders_is_served(trainer: Callable[..., L.Trainer]) -> None:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            assert dataloader_idx == 0
            super().validation_step(batch, batch_idx)

    matrix = AccuracyMatrixCallback(verbose=False)
    data = ContinualDataModule(make_tasks([8, 8], val=False), batch_size=4)
    trainer(TaskStream(), matrix).fit(Several(), datamodule=data)
    assert not matrix.matrix.compute().isnan().any()


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (0.5, 3), (1.0, 6), (0, 6)])
def test_scoring_is_limited_as_validation_is(trainer: Callable[..., L.Trainer], limit: float, batches: int) -> None:
    class Counts(Classifier):
        scored = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.scored += 1
            super().validation_step(batch, batch_idx)

    module, matrix = Counts(), AccuracyMatrixCallback(baseline=False, verbose=False)
    data = ContinualDataModule(make_tasks([24], val=False), batch_size=4)
    trainer(TaskStream(), matrix, limit_val_batches=limit).fit(module, datamodule=data)
    assert module.scored == 1 + batches  # one to try the metric
