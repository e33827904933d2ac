"""The boundary between tasks: in one fit over a stream, and in one fit a task."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_continual import _host
from lightning_continual.data import ContinualDataModule
from lightning_continual.stream import ContinualCallback, TaskEarlyStopping, TaskStream, restore

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def stream_of(*num_samples: int, val: bool = False, **options: Any) -> ContinualDataModule:
    """Tasks of these sizes, in batches of 4."""
    return ContinualDataModule(make_tasks(num_samples, val=val, test=False), **{"batch_size": 4, **options})


class Boundaries(L.Callback):
    """A callback of anyone's: nothing in it knows of this package but the two names."""

    def __init__(self, name: str = "", calls: list[Any] | None = None) -> None:
        self.name = name
        self.calls = [] if calls is None else calls

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.calls.append((f"{self.name}start", task, trainer.global_step))

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.calls.append((f"{self.name}end", task, trainer.global_step))


class Method(ContinualCallback):
    """A method of ours: its state is the tasks it has seen end."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[int] = []
        self.ended: list[int] = []

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.started.append(task)

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.ended.append(task)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ended": list(self.ended)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ended = list(state_dict["ended"])


class Trained(L.Callback):
    """The number of batches trained, by task, and the epochs of each."""

    def __init__(self) -> None:
        self.batches: dict[int, int] = {}
        self.epochs: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        task = int(batch[1][0]) // 2  # by the labels, whatever the engine says
        self.batches[task] = self.batches.get(task, 0) + 1
        epochs = self.epochs.setdefault(task, [])
        if trainer.current_epoch not in epochs:
            epochs.append(trainer.current_epoch)


# --- How long a task is -----------------------------------------------------------------------------------------------


def test_every_task_is_trained_for_its_epochs(trainer: Callable[..., L.Trainer]) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(2), trained, boundaries)
    fit.fit(Classifier(), datamodule=stream_of(12, 8, 20))
    assert trained.batches == {0: 6, 1: 4, 2: 10}
    assert trained.epochs == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert boundaries.calls == [
        ("start", 0, 0),
        ("end", 0, 6),
        ("start", 1, 6),
        ("end", 1, 10),
        ("start", 2, 10),
        ("end", 2, 20),
    ]
    assert (fit.global_step, fit.current_epoch) == (20, 6)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7], ids="steps={}".format)
@pytest.mark.parametrize("accumulate", [1, 2], ids="accumulate={}".format)
@pytest.mark.parametrize("limit", [1.0, 2, 0.7], ids="limit={}".format)
def test_every_task_is_trained_for_its_steps(
    trainer: Callable[..., L.Trainer], steps: int, accumulate: int, limit: float
) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(
        TaskStream(steps_per_task=steps),
        trained,
        boundaries,
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
    )
    fit.fit(Classifier(), datamodule=stream_of(12, 28, 8))
    assert trained.batches == dict.fromkeys(range(3), steps * accumulate)
    assert [(what, task) for what, task, _ in boundaries.calls] == [
        (what, task) for task in range(3) for what in ("start", "end")
    ]
    for task, in_epoch in enumerate([3, 7, 2]):
        length = limit if isinstance(limit, int) else int(in_epoch * limit)
        assert len(trained.epochs[task]) == -(-steps * accumulate // min(length, in_epoch))


def test_the_last_task_is_not_longer_than_the_others_under_a_step_limit(trainer: Callable[..., L.Trainer]) -> None:
    trained = Trained()
    fit = trainer(TaskStream(2), trained, max_steps=7)
    fit.fit(Classifier(), datamodule=stream_of(12, 8))
    assert trained.batches == {0: 6, 1: 1}
    assert fit.global_step == 7


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("options", [{"epochs_per_task": 5}, {"steps_per_task": 5}], ids=str)
def test_fast_dev_run_runs_its_batches_of_every_task(
    trainer: Callable[..., L.Trainer], batches: int, options: dict[str, int]
) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(**options), trained, boundaries, fast_dev_run=batches)
    fit.fit(Classifier(schedule=True), datamodule=stream_of(12, 12, 12))
    assert trained.batches == dict.fromkeys(range(3), batches)
    assert len(boundaries.calls) == 6


# --- Optimizers -------------------------------------------------------------------------------------------------------


class Watching(Classifier):
    """Remembers its optimizers, and how many steps each was told it had."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.configured: list[Any] = []
        self.told: list[float] = []
        self.at_task_start: list[Any] = []

    def configure_optimizers(self) -> Any:
        self.told.append(self.trainer.estimated_stepping_batches)
        configured = super().configure_optimizers()
        self.configured.append(configured)
        return configured

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        task = int(batch[1][0]) // 2
        if task == len(self.at_task_start):
            (optimizer,) = self.trainer.optimizers
            momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
            self.at_task_start.append((optimizer, momentum, optimizer.param_groups[0]["lr"]))


def trained_by_hand(module: Classifier, data: ContinualDataModule, epochs: int, reset: Any) -> None:
    """The stream in plain torch, with the order of the data as documented."""
    make = lambda: torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9)  # noqa: E731
    optimizer, epoch = make(), 0
    for task in range(data.num_tasks):
        data.current_task = task
        if task > 0 and reset == "full":
            optimizer = make()
        elif task > 0 and reset == "state":
            for value in optimizer.state.values():
                value["momentum_buffer"] = None
        for _ in range(epochs):
            data._resumed = (epoch, 0)
            for x, y in data.train_dataloader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(module.net(x), y).backward()
                optimizer.step()
            epoch += 1


@pytest.mark.parametrize("reset", ["full", "state", False], ids="reset={}".format)
def test_a_stream_equals_the_loop_written_by_hand_to_the_bit(trainer: Callable[..., L.Trainer], reset: Any) -> None:
    module, by_hand = Classifier(dropout=0.0), Classifier(dropout=0.0)
    by_hand.load_state_dict(module.state_dict())
    trainer(TaskStream(2, reset_optimizer=reset)).fit(module, datamodule=stream_of(12, 8, 12))
    trained_by_hand(by_hand, stream_of(12, 8, 12), 2, reset)
    for one, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_full_reset_makes_optimizers_and_schedulers_anew_for_one_task(trainer: Callable[..., L.Trainer]) -> None:
    module = Watching(schedule=True)
    trainer(TaskStream(3)).fit(module, datamodule=stream_of(12, 8, 20))
    assert module.told == [9, 6, 15]
    optimizers = [optimizer for optimizer, _, _ in module.at_task_start]
    assert len(set(map(id, optimizers))) == 3
    assert [momentum for _, momentum, _ in module.at_task_start] == [[], [], []]
    assert [lr for _, _, lr in module.at_task_start] == pytest.approx([module.lr / 25] * 3)  # as OneCycleLR begins
    for [_], [scheduler] in module.configured:
        assert scheduler["scheduler"].last_epoch == scheduler["scheduler"].total_steps


@pytest.mark.parametrize(("accumulate", "told"), [(1, 7), (2, 7)])
def test_schedulers_are_sized_for_the_steps_of_a_task(
    trainer: Callable[..., L.Trainer], accumulate: int, told: int
) -> None:
    module = Watching(schedule=True)
    fit = trainer(TaskStream(steps_per_task=7), accumulate_grad_batches=accumulate)
    fit.fit(module, datamodule=stream_of(16, 24, 16))
    assert module.told == [told] * 3


def test_a_reset_of_the_state_keeps_the_optimizer_and_its_scheduler(trainer: Callable[..., L.Trainer]) -> None:
    module = Watching(schedule=True)
    trainer(TaskStream(2, reset_optimizer="state")).fit(module, datamodule=stream_of(12, 12, 12))
    assert module.told == [18]
    assert len({id(optimizer) for optimizer, _, _ in module.at_task_start}) == 1
    assert [momentum for _, momentum, _ in module.at_task_start] == [[], [], []]
    assert len({lr for _, _, lr in module.at_task_start}) == 3


def test_without_a_reset_momentum_goes_on(trainer: Callable[..., L.Trainer]) -> None:
    module = Watching()
    trainer(TaskStream(2, reset_optimizer=False)).fit(module, datamodule=stream_of(12, 12))
    assert module.told == [12]
    (first, none, _), (second, momentum, _) = module.at_task_start
    assert first is second
    assert none == []
    assert len(momentum) == 4
    assert all(value.any() for value in momentum)


@pytest.mark.parametrize("reset", ["full", "state", False], ids="reset={}".format)
def test_several_optimizers_are_reset_alike(trainer: Callable[..., L.Trainer], reset: Any) -> None:
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.states: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            if int(batch[1][0]) // 2 == len(self.states):
                self.states.append([len(one.state) for one in self.trainer.optimizers])
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.net[0].parameters()), torch.optim.Adam(self.net[3].parameters())]

    module, trained = Manual(), Trained()
    fit = trainer(TaskStream(2, reset_optimizer=reset), trained)
    fit.fit(module, datamodule=stream_of(12, 8))
    assert trained.batches == {0: 6, 1: 4}
    assert fit.global_step == 20
    assert module.states == [[0, 0], [2, 2] if reset is False else [0, 0]]


def test_what_watches_learning_rates_sees_those_of_every_task(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(TaskStream(2), LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    fit.fit(Classifier(schedule=True), datamodule=stream_of(12, 12))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert len(rates) == 12
    assert rates[:6] == rates[6:]


def test_a_data_module_used_before_serves_its_first_task_again(trainer: Callable[..., L.Trainer]) -> None:
    data = stream_of(12, 8)
    for _ in range(2):
        trained = Trained()
        module = Watching(schedule=True)
        trainer(TaskStream(1), trained).fit(module, datamodule=data)
        assert trained.batches == {0: 3, 1: 2}
        assert module.told == [3, 2]


# --- One run ----------------------------------------------------------------------------------------------------------


def test_loggers_see_one_run_whose_step_goes_on(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(TaskStream(2), logger=logger, log_every_n_steps=1)
    fit.fit(Classifier(), datamodule=stream_of(12, 8, val=True))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(10))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [2, 5, 7, 9]
    assert [int(row["epoch"]) for row in rows if row["val_loss"]] == [0, 1, 2, 3]


def test_boundaries_come_in_the_order_of_the_callbacks_list(trainer: Callable[..., L.Trainer]) -> None:
    calls: list[Any] = []
    fit = trainer(Boundaries("b ", calls), TaskStream(), Boundaries("a ", calls), Boundaries("c ", calls))
    fit.fit(Classifier(), datamodule=stream_of(4, 8))
    assert calls == [
        (f"{name} {what}", task, step)
        for task, what, step in [(0, "start", 0), (0, "end", 1), (1, "start", 1), (1, "end", 3)]
        for name in "bac"
    ]


def test_a_task_begins_with_its_own_loader_and_its_own_optimizer(trainer: Callable[..., L.Trainer]) -> None:
    class Look(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
            assert trainer.datamodule.current_task == task
            assert len(trainer.train_dataloader) == trainer.num_training_batches == [3, 2, 5][task]
            assert not trainer.optimizers[0].state

        def on_task_end(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
            assert trainer.datamodule.current_task == task
            assert len(trainer.train_dataloader) == [3, 2, 5][task]
            assert trainer.optimizers[0].state

    trainer(Look(), TaskStream()).fit(Classifier(), datamodule=stream_of(12, 8, 20))


def test_checkpoints_hold_what_the_boundary_left(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = [checkpoint, method := Method(), TaskStream(2)]
    fit = trainer(*callbacks, enable_checkpointing=True)
    fit.fit(Classifier(), datamodule=stream_of(8, 8))
    states = [torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True) for epoch in range(4)]
    assert [state["callbacks"]["Method"]["ended"] for state in states] == [[], [0], [0], [0, 1]]
    assert [state["callbacks"]["TaskStream"]["task"] for state in states] == [0, 1, 1, 2]
    assert [type(one) for one in fit.callbacks[1:]] == [Method, TaskStream, ModelCheckpoint]
    assert method.ended == [0, 1]


def test_work_at_a_boundary_does_not_move_the_random_state_of_training(trainer: Callable[..., L.Trainer]) -> None:
    class Drawing(L.Callback):
        def on_task_start(self, *args: Any) -> None:
            torch.rand(17)

        def on_task_end(self, *args: Any) -> None:
            torch.rand(17)

    weights = []
    for callbacks in ([], [Drawing()]):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.5)
        trainer(*callbacks, TaskStream(2)).fit(module, datamodule=stream_of(8, 8))
        weights.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_whether_validation_runs_does_not_change_training(trainer: Callable[..., L.Trainer]) -> None:
    class Noisy(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_noise", torch.rand(()))

    weights = []
    for options in ({"limit_val_batches": 0}, {}, {"val_check_interval": 1}):
        L.seed_everything(3, verbose=False)
        module = Noisy(dropout=0.5)
        trainer(TaskStream(2), **options).fit(module, datamodule=stream_of(8, 8, val=True))
        weights.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_the_users_own_reloading_goes_on(trainer: Callable[..., L.Trainer]) -> None:
    class Counted(ContinualDataModule):
        served: list[int]

        def train_dataloader(self) -> Any:
            self.served.append(self.current_task)
            return super().train_dataloader()

    for every, expected in ((0, [0, 1, 2]), (1, [0, 0, 1, 1, 2, 2])):
        data = Counted(make_tasks([8, 8, 8], val=False), batch_size=4)
        data.served = []
        fit = trainer(TaskStream(2), reload_dataloaders_every_n_epochs=every)
        fit.fit(Classifier(), datamodule=data)
        assert data.served == expected
        assert fit.reload_dataloaders_every_n_epochs == every


# --- Ends before the end ----------------------------------------------------------------------------------------------


class Failing(Classifier):
    """Fails once, at a step of its choice."""

    def __init__(self, at: int, exception: BaseException) -> None:
        super().__init__()
        self.at = at
        self.exception = exception

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.at:
            self.at = -1
            raise self.exception
        return super().training_step(batch, batch_idx)


class Wrapping(ContinualCallback):
    """Wraps what methods wrap."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for name in ("training_step", "on_before_batch_transfer"):
            _host.wrap_method(pl_module, name, self, lambda inner, *args, **kwargs: inner(*args, **kwargs))


def functions_on(*owners: Any) -> list[set[str]]:
    lightnings = {"log", "log_dict"}  # which it gives to callbacks for good
    return [{name for name, value in vars(owner).items() if inspect.isroutine(value)} - lightnings for owner in owners]


@pytest.mark.parametrize("exception", [RuntimeError("broken"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("options", [{"epochs_per_task": 2}, {"steps_per_task": 7}], ids=str)
def test_an_exception_leaves_no_wrapper_and_the_next_fit_goes_on(
    trainer: Callable[..., L.Trainer], exception: BaseException, options: dict[str, int]
) -> None:
    module, data, bar = Failing(9, exception), stream_of(12, 12, 12), TQDMProgressBar()
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(**options), Wrapping(), trained, boundaries, bar, enable_progress_bar=True)
    owners = module, data, bar, fit.strategy
    before = functions_on(*owners)
    with pytest.raises(SystemExit if isinstance(exception, KeyboardInterrupt) else type(exception)):
        fit.fit(module, datamodule=data)
    assert functions_on(*owners) == before
    assert not any(owner in _host.methods._wrapped for owner in owners)
    assert [(what, task) for what, task, _ in boundaries.calls] == [("start", 0), ("end", 0), ("start", 1)]

    fit.fit(module, datamodule=data)
    assert functions_on(*owners) == before
    assert [(what, task) for what, task, _ in boundaries.calls] == [
        (what, task) for task in range(3) for what in ("start", "end")
    ]
    if "steps_per_task" in options:
        assert trained.batches == {0: 7, 1: 7, 2: 7}
    else:  # the broken epoch is begun anew; it had got through none of its batches
        assert trained.batches == {0: 6, 1: 6, 2: 6}


def test_an_epoch_broken_off_is_begun_anew_and_resumes_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in (7, 9, 12):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module, data = Failing(4, RuntimeError("broken")), stream_of(12, 12)
    fit = trainer(TaskStream(2), Save())
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(module, datamodule=data)
    fit.fit(module, datamodule=data)
    assert fit.global_step == 13
    for step in (7, 9, 12):
        resumed, again = Classifier(), trainer(TaskStream(2))
        torch.rand(5)
        again.fit(resumed, datamodule=stream_of(12, 12), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert again.global_step == 13, step
        for one, other in zip(resumed.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other), step


def test_a_run_goes_on_from_the_checkpoint_of_an_exception(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(path)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
            samples.setdefault(trainer.current_epoch, []).extend(batch[0][:, 0].tolist())

    samples: dict[int, list[float]] = {}
    trained, path = Trained(), tmp_path / "on_exception.ckpt"
    fit = trainer(TaskStream(2), Save(), trained)
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(Failing(8, RuntimeError("broken")), datamodule=stream_of(12, 12))  # in the last batch of an epoch
    assert trained.batches == {0: 6, 1: 2}
    again = trainer(TaskStream(2), Save(), trained)
    again.fit(Classifier(), datamodule=stream_of(12, 12), ckpt_path=path, weights_only=True)
    assert trained.batches == {0: 6, 1: 6}
    assert [len(set(seen)) for seen in samples.values()] == [12] * 4
    assert again.global_step == 12


@pytest.mark.parametrize("where", ["on_task_start", "on_task_end"])
def test_a_boundary_that_fails_is_done_anew_in_the_next_fit(trainer: Callable[..., L.Trainer], where: str) -> None:
    class Fails(L.Callback):
        fails = True

    def fail(self: Any, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        if task == 1 and self.fails:
            self.fails = False
            raise RuntimeError("broken")

    setattr(Fails, where, fail)
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(Fails(), boundaries, TaskStream(2), trained)
    data = stream_of(8, 8, 8)
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(Classifier(), datamodule=data)
    fit.fit(Classifier(), datamodule=data)
    assert trained.batches == {0: 4, 1: 4, 2: 4}
    assert [(what, task) for what, task, _ in boundaries.calls] == [
        (what, task) for task in range(3) for what in ("start", "end")
    ]
    assert fit.reload_dataloaders_every_n_epochs == 0


def test_an_exception_between_two_tasks_is_none_in_either(trainer: Callable[..., L.Trainer]) -> None:
    class Fails(L.Callback):
        fails = True

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2 and self.fails:
                self.fails = False
                raise RuntimeError("broken")

    trained, boundaries = Trained(), Boundaries()
    fit = trainer(Fails(), TaskStream(2), trained, boundaries)
    with pytest.raises(RuntimeError, match="broken"):
        fit.fit(Classifier(), datamodule=stream_of(8, 8))
    assert fit.reload_dataloaders_every_n_epochs == 0
    fit.fit(Classifier(), datamodule=stream_of(8, 8))
    assert trained.batches == {0: 4, 1: 4}
    assert boundaries.calls == [("start", 0, 0), ("end", 0, 4), ("start", 1, 4), ("end", 1, 8)]


def test_a_strategy_that_loads_checkpoints_late_resumes_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Late(SingleDeviceStrategy):
        """Like FSDP: after the optimizers are made."""

        restore_checkpoint_after_setup = True

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module = Classifier(schedule=True)
    trainer(TaskStream(), Save(), strategy=Late("cpu")).fit(module, datamodule=stream_of(12, 16))
    for step in (1, 3, 4, 6):
        resumed, again, trained = Classifier(schedule=True), stream_of(12, 16), Trained()
        fit = trainer(TaskStream(), trained, strategy=Late("cpu"))
        fit.fit(resumed, datamodule=again, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert trained.batches == ({0: 2, 1: 4} if step == 1 else {1: 7 - step})
        for one, other in zip(resumed.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other), step


def test_two_processes_resume_to_the_bit(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.rand(trainer.global_rank + 1)  # each process has its own random state

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"epoch-{trainer.current_epoch}.ckpt")

    def run(*callbacks: L.Callback, ckpt: Path | None = None) -> Classifier:
        L.seed_everything(1, verbose=False)
        module = Classifier(dropout=0.5, schedule=True)
        fit = trainer(TaskStream(2), *callbacks, strategy="ddp_fork", devices=2)
        fit.fit(module, datamodule=stream_of(8, 11, batch_size=2), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run(Save())
    for name in ("1", "2", "4", "epoch-1", "7", "9"):
        resumed = run(ckpt=tmp_path / f"{name}.ckpt")
        for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(one, other), name


class Stop(L.Callback):
    def __init__(self, *steps: int) -> None:
        self.steps = list(steps)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.steps.remove(trainer.global_step)
            trainer.should_stop = True


@pytest.mark.parametrize("at", [1, 4, 7, 10], ids="at={}".format)
def test_a_stop_in_the_middle_of_an_epoch_ends_the_fit_not_the_task(trainer: Callable[..., L.Trainer], at: int) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(2), trained, boundaries, Stop(at))
    data = stream_of(12, 12)
    fit.fit(Classifier(), datamodule=data)
    assert fit.global_step == at
    assert len(boundaries.calls) == (1 if at < 6 else 3)
    fit.fit(Classifier(), datamodule=data)  # the epoch cut short counts for nothing
    cut, task = at % 3, at // 6
    assert trained.batches == {0: 6, 1: 6} | {task: 6 + cut}
    assert [(what, task) for what, task, _ in boundaries.calls] == [
        (what, task) for task in range(2) for what in ("start", "end")
    ]


def test_a_stop_counts_the_steps_that_were_done(trainer: Callable[..., L.Trainer]) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(steps_per_task=5), trained, boundaries, Stop(2, 6, 7))
    data = stream_of(12, 12)
    for steps in (2, 6, 7, 10):
        fit.fit(Classifier(), datamodule=data)
        assert fit.global_step == steps
    assert trained.batches == {0: 5, 1: 5}
    assert len(boundaries.calls) == 4


def test_a_stop_at_the_end_of_an_epoch_lets_the_task_end(trainer: Callable[..., L.Trainer]) -> None:
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskStream(1), trained, boundaries, Stop(3))
    fit.fit(Classifier(), datamodule=stream_of(12, 12))
    assert [(what, task) for what, task, _ in boundaries.calls] == [("start", 0), ("end", 0)]
    fit.fit(Classifier(), datamodule=stream_of(12, 12))
    assert trained.batches == {0: 3, 1: 3}


def test_callbacks_in_a_new_trainer_begin_the_task_again(trainer: Callable[..., L.Trainer]) -> None:
    callbacks = [TaskStream(2), trained := Trained(), boundaries := Boundaries()]
    with pytest.raises(RuntimeError, match="broken"):
        trainer(*callbacks).fit(Failing(9, RuntimeError("broken")), datamodule=stream_of(12, 12, 12))
    trainer(*callbacks).fit(Classifier(), datamodule=stream_of(12, 12, 12))
    assert trained.batches == {0: 6, 1: 3 + 6, 2: 6}
    assert [(what, task) for what, task, _ in boundaries.calls] == [
        ("start", 0),
        ("end", 0),
        ("start", 1),
        ("start", 1),
        ("end", 1),
        ("start", 2),
        ("end", 2),
    ]


# --- A fit that trains nothing ----------------------------------------------------------------------------------------


def test_a_stream_that_has_ended_says_so(trainer: Callable[..., L.Trainer]) -> None:
    fit, data = trainer(TaskStream()), stream_of(4, 4)
    fit.fit(Classifier(), datamodule=data)
    with pytest.raises(MisconfigurationException, match=r"all 2 tasks are trained.*make a new Trainer.*the new ones"):
        fit.fit(Classifier(), datamodule=data)


def test_a_stream_goes_on_with_more_tasks(trainer: Callable[..., L.Trainer]) -> None:
    stream, trained = TaskStream(2), Trained()
    fit = trainer(stream, trained)
    fit.fit(Classifier(), datamodule=stream_of(4, 8))
    assert stream.task == 2
    fit.fit(Classifier(), datamodule=stream_of(4, 8, 12))
    assert trained.batches == {0: 2, 1: 4, 2: 6}
    assert stream.task == 3


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 2}], ids=str)
def test_a_second_fit_that_would_train_nothing_is_an_error(
    trainer: Callable[..., L.Trainer], limit: dict[str, int]
) -> None:
    method = Method()
    fit, loader = trainer(method, **limit), DataLoader(make_tasks([8])[0].train, batch_size=4)
    fit.fit(Classifier(), loader)
    said = rf"trained nothing.*max_epochs={limit['max_epochs']}.*after 1 epochs and 2 steps.*Make a new Trainer"
    with pytest.raises(MisconfigurationException, match=said):
        fit.fit(Classifier(), loader)
    assert method.ended == [0]


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"limit_train_batches": 0.0}, {"max_epochs": 0}])
def test_a_fit_that_is_told_to_train_nothing_is_no_error_and_no_task(
    trainer: Callable[..., L.Trainer], options: dict[str, Any]
) -> None:
    method = Method()
    loader = DataLoader(make_tasks([8])[0].train, batch_size=4)
    trainer(method, **{"max_epochs": 1, **options}).fit(Classifier(), loader)
    assert (method.started, method.ended) == ([], [])
    trainer(method, max_epochs=1).fit(Classifier(), loader)
    assert (method.started, method.ended) == ([0], [0])


def test_a_stream_told_to_train_nothing_is_no_error(trainer: Callable[..., L.Trainer]) -> None:
    fit = trainer(stream := TaskStream(), boundaries := Boundaries(), limit_train_batches=0)
    fit.fit(Classifier(), datamodule=stream_of(8, 8))
    assert boundaries.calls == []
    assert stream.task == 0


# --- Progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_task(trainer: Callable[..., L.Trainer], kind: type[Any]) -> None:
    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            metrics = trainer.progress_bar_callback.get_metrics(trainer, pl_module)
            assert next(iter(metrics)) == "task"
            shown.append(metrics["task"])

    shown: list[str] = []
    bar = kind()
    trainer(TaskStream(), Look(), bar, enable_progress_bar=True).fit(Classifier(), datamodule=stream_of(8, 4, 4))
    assert shown == ["1/3", "1/3", "2/3", "3/3"]
    assert "get_metrics" not in vars(bar)


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs_per_task": 0}, "`epochs_per_task` must be at least 1, but got 0"),
        ({"steps_per_task": 0}, "`steps_per_task` must be at least 1, but got 0"),
        ({"epochs_per_task": 2, "steps_per_task": 3}, "Only one of .* but got 2 and 3. Leave one out"),
        ({"reset_optimizer": "none"}, "`reset_optimizer` must be 'full', 'state' or False, but got 'none'"),
        ({"reset_optimizer": True}, "`reset_optimizer` must be 'full', 'state' or False, but got True"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_stream_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskStream(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "`patience` must be at least 1, but got 0"),
        ({"mode": "auto"}, "`mode` must be 'min' or 'max', but got 'auto'"),
        ({"min_delta": -0.1}, "`min_delta` must be at least 0, but got -0.1"),
    ],
    ids=str,
)
def test_bad_arguments_of_early_stopping_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskEarlyStopping("val_loss", **arguments)


@pytest.mark.parametrize("max_epochs", [0, 3, 5])
def test_a_trainer_that_decides_otherwise_is_refused(trainer: Callable[..., L.Trainer], max_epochs: int) -> None:
    with pytest.raises(MisconfigurationException, match=rf"max_epochs={max_epochs}\)`. Leave `max_epochs` out"):
        trainer(TaskStream(2), max_epochs=max_epochs).fit(Classifier(), datamodule=stream_of(4, 4))


@pytest.mark.parametrize("max_epochs", [-1, 1000, 4])
def test_a_trainer_that_decides_alike_is_accepted(trainer: Callable[..., L.Trainer], max_epochs: int) -> None:
    fit = trainer(TaskStream(2), max_epochs=max_epochs)
    fit.fit(Classifier(), datamodule=stream_of(4, 4))
    assert fit.global_step == 4


def test_two_streams_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    class Other(TaskStream):
        pass

    with pytest.raises(MisconfigurationException, match=r"one `TaskStream`, but it has 2. Remove one"):
        trainer(TaskStream(), Other()).fit(Classifier(), datamodule=stream_of(4))


def test_a_stream_needs_its_data_module(trainer: Callable[..., L.Trainer]) -> None:
    loader = DataLoader(make_tasks([8])[0].train, batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"needs a `ContinualDataModule`, but got NoneType.*leave"):
        trainer(TaskStream()).fit(Classifier(), loader)


def test_early_stopping_of_the_whole_stream_is_warned_of(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.warns(UserWarning, match="ends the whole stream at the first task.*`TaskEarlyStopping`"):
        trainer(TaskStream(), EarlyStopping("train_loss")).fit(Classifier(), datamodule=stream_of(4))


def test_a_stream_in_validation_does_nothing(trainer: Callable[..., L.Trainer]) -> None:
    (metrics,) = trainer(TaskStream(), Method()).validate(Classifier(), stream_of(4, 4, val=True), verbose=False)
    assert set(metrics) == {"val_loss", "val_acc"}


# --- Early stopping of a task -----------------------------------------------------------------------------------------


class Scripted(Classifier):
    """Logs what a script says, by epoch."""

    def __init__(self, val: list[float] | None = None, train: list[float] | None = None) -> None:
        super().__init__()
        self.val = val
        self.train_script = train

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.train_script is not None:
            value = torch.tensor(float(self.train_script[self.current_epoch]))
            self.log("train_metric", value, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.val is not None:
            self.log("metric", torch.tensor(float(self.val[self.current_epoch])), on_epoch=True)


@pytest.mark.parametrize(
    ("options", "script", "epochs"),
    [
        ({"patience": 1}, [5.0, 4, 4, 9, 9], [3, 2]),
        ({"patience": 2}, [5.0, 4, 6, 3, 3, 3, 9, 8, 7, 6, 5, 4], [6, 6]),
        ({"patience": 1, "mode": "max"}, [1.0, 2, 2, 0, 1, 0], [3, 3]),
        ({"patience": 1, "min_delta": 0.5}, [5.0, 4, 3.5, 9, 8.6], [3, 2]),
        ({"patience": 1, "min_delta": 0.5, "mode": "max"}, [0.0, 1, 1.5, 9, 9.4], [3, 2]),
        ({"patience": 1}, [float("nan"), float("nan"), 1, 1], [2, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", ["val", "train"])
def test_a_task_ends_when_its_metric_stops_improving(
    trainer: Callable[..., L.Trainer], options: dict[str, Any], script: list[float], epochs: list[int], split: str
) -> None:
    monitor = "metric" if split == "val" else "train_metric"
    trained, boundaries = Trained(), Boundaries()
    fit = trainer(TaskEarlyStopping(monitor, **options), TaskStream(6), trained, boundaries)
    fit.fit(Scripted(**{split: script}), datamodule=stream_of(8, 8, val=split == "val"))
    assert [len(trained.epochs[task]) for task in range(2)] == epochs
    assert len(boundaries.calls) == 4
    assert fit.current_epoch == sum(epochs)


def test_a_task_is_judged_only_when_validation_has_run(trainer: Callable[..., L.Trainer]) -> None:
    script = [0.0, 5, 0, 5, 0, 6]  # validated in every second epoch
    trained = Trained()
    fit = trainer(TaskEarlyStopping("metric", patience=2), TaskStream(6), trained, check_val_every_n_epoch=2)
    fit.fit(Scripted(val=script), datamodule=stream_of(8, val=True))
    assert len(trained.epochs[0]) == 6
    assert fit.current_epoch == 6


def test_several_can_watch_a_task(trainer: Callable[..., L.Trainer]) -> None:
    stops = [TaskEarlyStopping("metric", 2), TaskEarlyStopping("metric", 4, mode="max")]
    assert len({one.state_key for one in stops}) == 2
    trained = Trained()
    trainer(*stops, TaskStream(9), trained).fit(
        Scripted(val=[1.0, 2, 3, 1, 1, 1]), datamodule=stream_of(8, 8, val=True)
    )
    assert [len(trained.epochs[task]) for task in range(2)] == [3, 3]


def test_an_unknown_monitor_lists_what_was_logged(trainer: Callable[..., L.Trainer]) -> None:
    fit = trainer(TaskEarlyStopping("val_los"), TaskStream(2))
    said = r"monitor='val_los'\)` found no such metric; logged were \['train_loss', 'val_acc', 'val_loss'\]"
    with pytest.raises(MisconfigurationException, match=said):
        fit.fit(Classifier(), datamodule=stream_of(8, val=True))


def test_early_stopping_of_a_task_needs_a_stream(trainer: Callable[..., L.Trainer]) -> None:
    fit = trainer(TaskEarlyStopping("val_loss"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"but the Trainer has none. Add one, or use"):
        fit.fit(Classifier(), datamodule=stream_of(8))


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_all_processes_end_a_task_together_and_hold_the_same_state(trainer: Callable[..., L.Trainer]) -> None:
    class Differing(Classifier):
        """The mean over the two processes is 5, 4, 4; on the first alone it falls, on the second it rises."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            means = [5.0, 4.0, 4.0] * 2
            own = self.current_epoch * (1 if self.global_rank else -1)
            self.log("metric", torch.tensor(means[self.current_epoch % 6] + own))

    class Check(Boundaries):
        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            assert trainer.current_epoch == 3 * task + 2
            everywhere: list[Any] = [None, None]
            torch.distributed.all_gather_object(everywhere, stop.state_dict())
            assert everywhere[0] == everywhere[1]
            assert everywhere[0]["best"] == 4.0

    stop = TaskEarlyStopping("metric", patience=1)
    fit = trainer(Check(), stop, TaskStream(6), strategy="ddp_fork", devices=2)
    fit.fit(Differing(), datamodule=stream_of(8, 8, val=True))


# --- One fit, one task ------------------------------------------------------------------------------------------------


def loader(task: int = 0) -> DataLoader[Any]:
    return DataLoader(make_tasks([8, 8, 8])[task].train, batch_size=4)


def test_fits_are_counted_as_tasks(trainer: Callable[..., L.Trainer]) -> None:
    method = Method()
    for task in range(3):
        trainer(method, max_epochs=2).fit(Classifier(), loader(task))
        assert method.started == method.ended == list(range(task + 1))


def test_a_data_module_says_which_task_a_fit_is(trainer: Callable[..., L.Trainer]) -> None:
    method, data = Method(), stream_of(8, 8, 8)
    for data.current_task in (0, 2):
        trained = Trained()
        trainer(method, trained, max_epochs=1).fit(Classifier(), datamodule=data)
        assert trained.batches == {data.current_task: 2}
    assert method.started == method.ended == [0, 2]
    trainer(method, max_epochs=1).fit(Classifier(), loader())  # and then they are counted on
    assert method.ended == [0, 2, 3]


def test_a_fit_that_raises_is_no_task_and_the_next_one_starts_it_anew(trainer: Callable[..., L.Trainer]) -> None:
    method = Method()
    trainer(method, max_epochs=1).fit(Classifier(), loader())
    with pytest.raises(RuntimeError, match="broken"):
        trainer(method, max_epochs=1).fit(Failing(1, RuntimeError("broken")), loader(1))
    assert (method.started, method.ended) == ([0, 1], [0])
    trainer(method, max_epochs=1).fit(Classifier(), loader(1))
    assert (method.started, method.ended) == ([0, 1, 1], [0, 1])


def test_a_fit_resumed_inside_its_task_does_not_start_it_again(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    trainer(Method(), Save(), max_epochs=1).fit(Classifier(), loader())
    method = Method()
    again = trainer(method, max_epochs=2)
    with pytest.warns(UserWarning, match="ended before the epoch ended"):  # Lightning's, for a plain loader
        again.fit(Classifier(), loader(), ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    assert (method.started, method.ended) == ([], [0])


def test_a_stop_ends_the_task_where_a_fit_is_one(trainer: Callable[..., L.Trainer]) -> None:
    trainer(method := Method(), Stop(1), max_epochs=5).fit(Classifier(), loader())
    assert method.ended == [0]


def test_validating_and_testing_is_no_task(trainer: Callable[..., L.Trainer]) -> None:
    method = Method()
    trainer(method).validate(Classifier(), loader(), verbose=False)
    assert (method.started, method.ended) == ([], [])


# --- restore ----------------------------------------------------------------------------------------------------------


def deployed(trainer: Callable[..., L.Trainer], path: Path, *callbacks: L.Callback) -> Classifier:
    module = Classifier()
    fit = trainer(*callbacks, max_epochs=2)
    fit.fit(module, loader())
    fit.save_checkpoint(path)
    return module


def test_an_update_begins_with_the_weights_and_what_the_callbacks_know(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    path = tmp_path / "deployed.ckpt"
    before = deployed(trainer, path, Method())
    module, method = Classifier(), Method()
    restore(path, module, [method])
    for one, other in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
    assert method.ended == [0]
    fit = trainer(method, max_epochs=1)
    fit.fit(module, loader(1))
    assert (fit.current_epoch, fit.global_step) == (1, 2)  # its own, not the old run's
    assert (method.started, method.ended) == ([1], [0, 1])


def test_an_update_after_a_stream_is_the_next_task(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    fit = trainer(TaskStream(), Method())
    fit.fit(Classifier(), datamodule=stream_of(4, 4))
    fit.save_checkpoint(tmp_path / "stream.ckpt")
    module, method = Classifier(), Method()
    restore(str(tmp_path / "stream.ckpt"), module, iter([method]))
    trainer(method, max_epochs=1).fit(module, loader(2))
    assert (method.started, method.ended) == ([2], [0, 1, 2])


def test_a_checkpoint_loads_without_this_package(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    fit = trainer(TaskStream(), TaskEarlyStopping("train_loss"), Method())
    fit.fit(module := Classifier(), datamodule=stream_of(4, 4))
    fit.save_checkpoint(tmp_path / "stream.ckpt")
    loaded = torch.load(tmp_path / "stream.ckpt", weights_only=True)
    plain = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 6))
    plain.load_state_dict({name.removeprefix("net."): value for name, value in loaded["state_dict"].items()})
    x = torch.randn(3, 4)
    assert torch.equal(plain.eval()(x), module.eval()(x))
    assert loaded["state_dict"].keys() == Classifier().state_dict().keys()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*none\.ckpt'. Pass a file"):
        restore(tmp_path / "none.ckpt", Classifier(), [])


def test_a_callback_that_the_checkpoint_does_not_know_is_warned_of(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    deployed(trainer, tmp_path / "deployed.ckpt")
    method = Method()
    with pytest.warns(UserWarning, match=r"deployed\.ckpt' holds nothing about Method: it begins with what it has"):
        restore(tmp_path / "deployed.ckpt", Classifier(), [method])
    assert method.ended == []


def test_a_checkpoint_from_inside_a_task_is_warned_of(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="last")  # saves before the fit, and so the task, ends
    trainer(checkpoint, Method(), max_epochs=1, enable_checkpointing=True).fit(Classifier(), loader())
    method = Method()
    with pytest.warns(UserWarning, match="was saved inside a task: what Method learns at the task's end is not in it"):
        restore(tmp_path / "last.ckpt", Classifier(), [method])
    trainer(method, max_epochs=1).fit(Classifier(), loader(1))
    assert (method.started, method.ended) == ([1], [1])


def test_a_stream_is_resumed_not_restored(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    deployed(trainer, tmp_path / "deployed.ckpt")
    module = Classifier()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"got a `TaskStream`, which continues one. Resume.*ckpt_path"):
        restore(tmp_path / "deployed.ckpt", module, [TaskStream()])
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))


def test_what_a_module_keeps_in_a_checkpoint_itself_is_restored(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Own(Classifier):
        vocabulary: tuple[str, ...] = ()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["vocabulary"] = self.vocabulary

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.vocabulary = checkpoint["vocabulary"]

    module = Own()
    module.vocabulary = ("a", "b")
    fit = trainer(max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    again = Own()
    restore(tmp_path / "own.ckpt", again, [])
    assert again.vocabulary == ("a", "b")


def test_other_callbacks_meet_the_tasks_own_optimizer_at_its_first_epoch(
    trainer: Callable[..., L.Trainer], data: ContinualDataModule
) -> None:
    class Looks(L.Callback):
        rates: ClassVar[list[float]] = []

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                assert self.rates[-1] == trainer.optimizers[0].param_groups[0]["lr"]

    fit = trainer(Looks(), TaskStream(epochs_per_task=2))
    fit.fit(Classifier(schedule=True), datamodule=data)
    assert Looks.rates[0] == Looks.rates[2] == Looks.rates[4] != Looks.rates[1]


def test_a_checkpoint_callback_that_monitors_is_warned_of(
    trainer: Callable[..., L.Trainer], data: ContinualDataModule
) -> None:
    fit = trainer(TaskStream(), ModelCheckpoint(monitor="val_acc"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="keeps the checkpoint that was best on the task then in training"):
        fit.fit(Classifier(), datamodule=data)


def test_training_a_task_again_without_a_stream_is_warned_of(trainer: Callable[..., L.Trainer]) -> None:
    data, method = ContinualDataModule(make_tasks([8, 8]), batch_size=4), ContinualCallback()
    trainer(method, max_epochs=1).fit(Classifier(), datamodule=data)
    with pytest.warns(UserWarning, match="has ended task 0 before, and this fit trains it again"):
        trainer(method, max_epochs=1).fit(Classifier(), datamodule=data)


def test_a_checkpoint_with_other_objects_is_restored_by_those_who_trust_it(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Parametrized(Classifier):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    deployed, module = Parametrized(tmp_path), Parametrized(tmp_path)
    fit = trainer(max_epochs=1)
    fit.fit(deployed, torch.utils.data.DataLoader(make_tasks([8])[0].train, 4))
    fit.save_checkpoint(tmp_path / "deployed.ckpt")
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values.*`weights_only=False`"):
        restore(tmp_path / "deployed.ckpt", module, [])
    restore(tmp_path / "deployed.ckpt", module, [], weights_only=False)
    assert torch.equal(module.net[0].weight, deployed.net[0].weight)


def test_layers_made_in_configure_model_are_restored(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = torch.nn.Sequential(torch.nn.Linear(4, 6))

    deployed, module = Late(), Late()
    fit = trainer(max_epochs=1)
    fit.fit(deployed, torch.utils.data.DataLoader(make_tasks([8])[0].train, 4))
    fit.save_checkpoint(tmp_path / "deployed.ckpt")
    restore(f"file://{tmp_path}/deployed.ckpt", module, [])
    assert torch.equal(module.net[0].weight, deployed.net[0].weight)
