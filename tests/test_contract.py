"""What every callback promises, whatever it does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_continual import (
    AccuracyMatrixCallback,
    AdaptiveCompressionCallback,
    BanditSelectionCallback,
    ClassBalancedMemory,
    CLNPCallback,
    ContinualDataModule,
    CostCallback,
    EWCCallback,
    HerdingMemory,
    PruningCallback,
    RehearsalCallback,
    SynapseNeuronCallback,
    TaskEarlyStopping,
    TaskMemory,
    TaskStream,
)

Make = Callable[[], L.Callback]

pytestmark = pytest.mark.filterwarnings("ignore:`CLNPCallback` (has no free units|found no threshold)")


@dataclass(frozen=True)
class Row:
    """A callback under contract: add one to `ROWS`, and all tests below run for it."""

    active: Make
    neutral: Make | None = None
    """Turned down to nothing. An observer (None) changes nothing even when active."""
    distributed: Make | None = None
    """A form in which two processes must equal one, where the active one draws at random."""
    needs_stream: bool = False
    in_fit: bool = True
    """Whether it can be alone in a fit without a stream (False: it needs loaders or a data module of ours)."""


def herding() -> L.Callback:
    return RehearsalCallback(HerdingMemory(12), features=lambda module, batch: module.net[:2](batch[0]))


def matrix() -> L.Callback:
    return AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False)


BY_LOSS: dict[str, Any] = {"monitor": "val_loss", "higher_is_better": False}

ROWS = {
    "rehearsal": Row(
        active=lambda: RehearsalCallback(12),
        neutral=lambda: RehearsalCallback(12, proportion=0.0),
        distributed=lambda: RehearsalCallback(1000, proportion=0.98),  # more than there is: all of it, each time
    ),
    "rehearsal, replacing": Row(
        active=lambda: RehearsalCallback(TaskMemory(12), mode="replace", selection="recent"),
        neutral=lambda: RehearsalCallback(0, mode="replace"),
    ),
    "rehearsal, balanced": Row(
        active=lambda: RehearsalCallback(ClassBalancedMemory(12), selection="balanced"),
        neutral=lambda: RehearsalCallback(ClassBalancedMemory(0)),
    ),
    "rehearsal, herding": Row(
        active=herding,
        neutral=lambda: RehearsalCallback(HerdingMemory(12), 0.0, features=lambda module, batch: batch[0]),
    ),
    "rehearsal, reloading": Row(
        active=lambda: RehearsalCallback(12, reload=True),
        neutral=lambda: RehearsalCallback(0, reload=True),
        in_fit=False,
        distributed=lambda: RehearsalCallback(1000, proportion=0.98, reload=True),
    ),
    "accuracy matrix": Row(active=matrix, in_fit=False),
    "cost": Row(active=lambda: CostCallback(verbose=False)),
    "ewc": Row(
        active=lambda: EWCCallback(10.0),
        neutral=lambda: EWCCallback(0.0),
        distributed=lambda: EWCCallback(10.0, fisher="exact"),
    ),
    "synapse and neuron": Row(
        active=lambda: SynapseNeuronCallback(0.01, 0.01),
        neutral=lambda: SynapseNeuronCallback(0.0, 0.0),
    ),
    "bandit of samples": Row(
        active=lambda: BanditSelectionCallback("samples", budget=0.5, measure_every=2, memory=12),
        neutral=lambda: BanditSelectionCallback("samples", budget=1.0, measure_every=2, memory=0),
    ),
    "bandit of samples, clustered": Row(
        active=lambda: BanditSelectionCallback(
            "samples", arms="kmeans", num_clusters=2, reward="grad_norm", measure_every=2, memory=12, policy="thompson"
        ),
        neutral=lambda: BanditSelectionCallback(arms=lambda batch: torch.zeros_like(batch[1])),  # one arm
    ),
    "bandit of weights": Row(
        active=lambda: BanditSelectionCallback("weights", head="net.3.bias", budget=0.6, every=3),
        neutral=lambda: BanditSelectionCallback("weights", head="net.3.bias", budget=1.0, every=3),
        distributed=lambda: BanditSelectionCallback("weights", head="net.3.bias", budget=0.6, every=3),
    ),
    "bandit of weights, by unit": Row(
        active=lambda: BanditSelectionCallback("weights", arms="units", budget=0.5, every=3, policy="exp3m"),
        neutral=lambda: BanditSelectionCallback("weights", arms={"all": "*"}),  # one arm
    ),
    "pruning": Row(
        active=lambda: PruningCallback("obd-sd", 0.5),
        neutral=lambda: PruningCallback("obd-sd", 0.0),
        distributed=lambda: PruningCallback("obd-sd", 0.5, rounds=2),
    ),
    "pruning, by steps": Row(
        active=lambda: PruningCallback("obd", 0.6, when={"every_n_steps": 1}, rounds=2, schedule="cubic"),
        neutral=lambda: PruningCallback("random", 0.0, when=[0, 1]),
    ),
    "pruning, units": Row(
        active=lambda: PruningCallback("merge", 0.5, level="unit", when=[0]),
        neutral=lambda: PruningCallback("merge", 0.0, level="unit"),
        distributed=lambda: PruningCallback("merge", 0.5, level="unit", when=[0]),
    ),
    "clnp": Row(
        active=lambda: CLNPCallback(threshold=0.5, l1=1e-3, classes=[[0, 1], [2, 3], [4, 5]]),
        neutral=lambda: CLNPCallback(threshold=math.inf, l1=0.0),
        distributed=lambda: CLNPCallback(threshold=0.5, l1=1e-3, classes=[[0, 1], [2, 3], [4, 5]]),
    ),
    "clnp, searching": Row(
        active=lambda: CLNPCallback(0.1, l1=1e-3, passes=4, monitor="val_loss", higher_is_better=False),
        neutral=lambda: CLNPCallback(threshold={"net.*": math.inf, "*": math.inf}, l1={"*": 0.0}),
        in_fit=False,
        distributed=lambda: CLNPCallback(1.0, l1=1e-3, passes=4, monitor="val_loss", higher_is_better=False),
    ),
    "adaptive compression": Row(
        active=lambda: AdaptiveCompressionCallback(100.0, **BY_LOSS, trials=2, restart="drawn"),
        neutral=lambda: AdaptiveCompressionCallback(100.0, **BY_LOSS, parameters=()),
        distributed=lambda: AdaptiveCompressionCallback(100.0, **BY_LOSS, trials=2, restart="drawn"),
    ),
    "packnet": Row(
        active=lambda: AdaptiveCompressionCallback(share=0.5, monitor=None),
        neutral=lambda: AdaptiveCompressionCallback(share=0.5, monitor=None, parameters=()),
        distributed=lambda: AdaptiveCompressionCallback(share=0.5, monitor=None),
    ),
    "task early stopping": Row(
        active=lambda: TaskEarlyStopping("val_loss", patience=1, min_delta=0.5),
        neutral=lambda: TaskEarlyStopping("val_loss", patience=1000),
        needs_stream=True,
    ),
}

over_all = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def rows(**wanted: Any) -> Any:
    chosen = {name: row for name, row in ROWS.items() if all(bool(getattr(row, key)) == v for key, v in wanted.items())}
    return pytest.mark.parametrize("row", chosen.values(), ids=chosen)


class State(L.Callback):
    """Keeps the random state as the fit leaves it, and the step it comes to."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.random = torch.get_rng_state(), random.getstate()
        self.step = trainer.global_step


def run(
    trainer: Callable[..., L.Trainer],
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    data: ContinualDataModule | None = None,
    fit: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Any, int]:
    """Train a stream of three tasks in one fit; return weights, random state and number of steps."""
    L.seed_everything(5, verbose=False)
    module = Classifier() if module is None else module
    data = data or ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4)
    state = State()
    trainer(*callbacks, TaskStream(3), state, **options).fit(module, datamodule=data, **fit or {})
    assert all(value.isfinite().all() for value in module.state_dict().values())
    return module.state_dict(), state.random, state.step


def run_fits(trainer: Callable[..., L.Trainer], *callbacks: L.Callback, **options: Any) -> dict[str, Tensor]:
    """Train three tasks in one fit each, with a new Trainer each time; return the weights."""
    L.seed_everything(5, verbose=False)
    module, data = Classifier(), ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4)
    for task in range(3):
        data.current_task = task
        trainer(*callbacks, max_epochs=2, **options).fit(module, datamodule=data)
    return module.state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def identical(one: Any, two: Any) -> bool:
    """Whether two states are the same to the bit, in values and types; but for seconds, which no run repeats."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            name.endswith("seconds") or identical(value, two[name]) for name, value in one.items()
        )
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(identical, one, two))
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
    return bool(one == two)


MONITORS = {
    "accuracy matrix": lambda **options: AccuracyMatrixCallback(loaders=[DataLoader(range(3))], **options),
    "clnp": CLNPCallback,
    "adaptive compression": lambda **options: AdaptiveCompressionCallback(100.0, trials=1, **options),
}


@pytest.mark.parametrize("make", MONITORS.values(), ids=MONITORS)
def test_a_loss_of_which_more_is_taken_for_better_is_warned_of(
    trainer: Callable[..., L.Trainer], make: Callable[..., Any]
) -> None:
    callback = make(monitor="val_loss")
    with pytest.warns(match=f"`{type(callback).__name__}` takes a high 'val_loss' for good.*`higher_is_better=False`"):
        callback.setup(trainer(TaskStream(1), callback), Classifier(), "fit")
    right = make(monitor="val_loss", higher_is_better=False), make(monitor="val_acc")
    for callback in right:  # and warnings are errors
        callback.setup(trainer(TaskStream(1), callback), Classifier(), "fit")


# --- Neutral and active -----------------------------------------------------------------------------------------------


@over_all
def test_turned_down_to_nothing_it_changes_nothing_to_the_bit(trainer: Callable[..., L.Trainer], row: Row) -> None:
    weights, state, steps = run(trainer, (row.neutral or row.active)())
    expected, expected_state, expected_steps = run(trainer)
    assert same(weights, expected)
    assert identical(state, expected_state)
    assert steps == expected_steps


@rows(needs_stream=False)
def test_without_a_stream_too_it_changes_nothing_when_turned_down(trainer: Callable[..., L.Trainer], row: Row) -> None:
    assert same(run_fits(trainer, (row.neutral or row.active)()), run_fits(trainer))


@over_all
def test_active_it_changes_the_weights_unless_it_observes(trainer: Callable[..., L.Trainer], row: Row) -> None:
    assert same(run(trainer, row.active())[0], run(trainer)[0]) == (row.neutral is None)


@rows(needs_stream=False)
def test_without_a_stream_each_fit_is_a_task(trainer: Callable[..., L.Trainer], row: Row) -> None:
    callback: Any = row.active()
    assert same(run_fits(trainer, callback), run_fits(trainer)) == (row.neutral is None)
    assert callback._tasks_ended == 3


@rows(needs_stream=False)
def test_one_fit_a_task_is_the_stream_with_new_optimizers(trainer: Callable[..., L.Trainer], row: Row) -> None:
    calls: dict[str, list[Any]] = {"stream": [], "fits": []}
    for way, go in (("stream", run), ("fits", run_fits)):
        callback: Any = row.active()
        start, end = callback.on_task_start, callback.on_task_end
        callback.on_task_start = lambda t, m, task, log=calls[way], s=start: (
            log.append(("start", task)),
            s(t, m, task),
        )
        callback.on_task_end = lambda t, m, task, log=calls[way], e=end: (log.append(("end", task)), e(t, m, task))
        go(trainer, callback)
    assert calls["stream"] == calls["fits"] == [(when, task) for task in range(3) for when in ("start", "end")]


# --- State ------------------------------------------------------------------------------------------------------------


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@over_all
@pytest.mark.parametrize("step", [8, 20], ids="step={}".format)  # in the second epoch, in the second task
def test_restored_it_continues_as_the_original_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path, row: Row, step: int
) -> None:
    path = tmp_path / "stopped.ckpt"
    original = row.active()
    weights, state, steps = run(trainer, original, SaveAt(path, step))
    restored = row.active()
    again, again_state, again_steps = run(trainer, restored, fit={"ckpt_path": path, "weights_only": True})
    assert same(again, weights)
    assert identical(again_state, state)
    assert again_steps == steps
    assert identical(restored.state_dict(), original.state_dict())


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) in (str, int) and is_plain(one) for key, one in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) in (Tensor, int, float, bool, str, type(None))


@over_all
def test_state_is_plain_and_loads_with_weights_only(
    trainer: Callable[..., L.Trainer], tmp_path: Path, row: Row
) -> None:
    callback = row.active()
    run(trainer, callback)
    state = callback.state_dict()
    assert is_plain(state)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = row.active()
    fresh.load_state_dict(loaded)
    assert identical(fresh.state_dict(), state)


@over_all
def test_what_state_returned_does_not_change_afterwards(trainer: Callable[..., L.Trainer], row: Row) -> None:
    class Snapshot(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 20:
                self.state = callback.state_dict()
                torch.save(self.state, copy)

    copy, callback, snapshot = BytesIO(), row.active(), Snapshot()
    run(trainer, callback, snapshot)
    copy.seek(0)
    assert identical(snapshot.state, torch.load(copy, weights_only=True))


@over_all
def test_two_of_a_kind_in_two_trainers_share_nothing(trainer: Callable[..., L.Trainer], row: Row) -> None:
    first, second = row.active(), row.active()
    before = second.state_dict()
    run(trainer, first)
    assert identical(second.state_dict(), before)


# --- The boundary -----------------------------------------------------------------------------------------------------


@rows(needs_stream=False)
@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_epochs": 1, "limit_train_batches": 0}], ids=str)
def test_a_fit_that_trains_nothing_is_no_task(
    trainer: Callable[..., L.Trainer], row: Row, options: dict[str, Any]
) -> None:
    callback: Any = row.active()
    before = callback.state_dict()
    module, data = Classifier(), ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4)
    trainer(callback, **options).fit(module, datamodule=data)
    assert callback._tasks_ended == 0
    assert identical(callback.state_dict(), before)


@rows(needs_stream=False)
def test_a_fit_that_raises_is_no_task(trainer: Callable[..., L.Trainer], row: Row) -> None:
    callback: Any = row.active()
    data = ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4)
    with pytest.raises(RuntimeError, match="in mid-task"):
        trainer(callback, Raise(3), max_epochs=2).fit(Classifier(), datamodule=data)
    assert callback._tasks_ended == 0


class Raise(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("in mid-task")


# --- The module -------------------------------------------------------------------------------------------------------


def traces(module: Any) -> Any:
    """Return all of a module that a callback could add to."""
    private = {name: value for name, value in vars(module).items() if "hook" in name}
    return (
        list(module.state_dict()),
        sorted(vars(module)),
        [(name, type(one), one.training, len(vars(one))) for name, one in module.named_modules()],
        {name: len(value) for name, value in private.items() if isinstance(value, dict)},
        [len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in module.modules()],
        [(name, p.requires_grad, len(p._backward_hooks or ())) for name, p in module.named_parameters()],
    )


class Trace(L.Callback):
    def __init__(self) -> None:
        self.traces: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        # A method wrapped while the fit runs is allowed, and nothing else.
        wrapped = [name for name, value in vars(pl_module).items() if hasattr(value, "__wrapped__")]
        saved = {name: vars(pl_module).pop(name) for name in wrapped}
        self.traces.append(traces(pl_module))
        vars(pl_module).update(saved)


@over_all
def test_the_module_and_the_data_gain_nothing(trainer: Callable[..., L.Trainer], row: Row) -> None:
    found = []
    for callbacks in ([row.active()], []):
        module, data, trace = Classifier(), ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4), Trace()
        before = sorted(vars(data))
        run(trainer, *callbacks, trace, module=module, data=data)
        assert sorted(vars(data)) == before
        found.append([trace.traces[0], trace.traces[-1], traces(module)])
    with_it, without = found
    assert with_it == without


@over_all
@pytest.mark.parametrize("step", [1, 5, 20], ids="step={}".format)
def test_an_exception_leaves_no_wrapper(trainer: Callable[..., L.Trainer], row: Row, step: int) -> None:
    module, data = Classifier(), ContinualDataModule(make_tasks((22, 18, 14)), batch_size=4)
    with pytest.raises(RuntimeError, match="in mid-task"):
        run(trainer, row.active(), Raise(step), module=module, data=data)
    for owner in (module, data):
        assert not [name for name, value in vars(owner).items() if hasattr(value, "__wrapped__")]


class Broken(Classifier):
    """Raises in a step of training, wherever its training step is called from."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training and self.trainer.global_step >= self.step:
            raise RuntimeError("in a training step")
        return super().training_step(batch, batch_idx)


@over_all
@pytest.mark.parametrize("step", [1, 9, 20], ids="step={}".format)
def test_an_exception_in_a_training_step_leaves_the_module_as_it_was(
    trainer: Callable[..., L.Trainer], row: Row, step: int
) -> None:
    def seen(module: Any) -> Any:
        return traces(module)[4:], [(name, one.training) for name, one in module.named_modules()]

    module = Broken(step)
    before = seen(module)
    with pytest.raises(RuntimeError, match="in a training step"):
        run(trainer, row.active(), module=module)
    assert seen(module) == before
    assert not [name for name, value in vars(module).items() if hasattr(value, "__wrapped__")]
    assert "log" not in vars(module)


@rows(in_fit=True, needs_stream=False)
def test_any_loader_serves_where_each_fit_is_a_task(trainer: Callable[..., L.Trainer], row: Row) -> None:
    def weights(*callbacks: L.Callback) -> dict[str, Tensor]:
        L.seed_everything(5, verbose=False)
        module = Classifier()
        for task in make_tasks((22, 18, 14)):
            loaders = DataLoader(task.train, 4, shuffle=True), DataLoader(task.val, 4)
            trainer(*callbacks, max_epochs=1).fit(module, *loaders)
        return module.state_dict()

    assert same(weights(row.active()), weights()) == (row.neutral is None)
    if row.neutral is not None:
        assert same(weights(row.neutral()), weights())


# --- Processes --------------------------------------------------------------------------------------------------------


class Keep(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.state_dict(), f"{self.path}-{trainer.global_rank}")


class Synced(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)


@pytest.mark.parametrize(
    "make",
    [row.distributed or row.active for row in ROWS.values() if row.distributed or not row.neutral or row.needs_stream],
    ids=[name for name, row in ROWS.items() if row.distributed or not row.neutral or row.needs_stream],
)
def test_two_processes_equal_one_with_the_doubled_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path, make: Make
) -> None:
    for devices in (1, 2):
        L.seed_everything(5, verbose=False)
        module = Synced(dropout=0.0).double()
        data = ContinualDataModule(make_tasks((24, 16, 8)), batch_size=8 // devices)
        options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        trainer(make(), TaskStream(2), Keep(tmp_path / f"of-{devices}"), precision="64-true", **options).fit(
            module, datamodule=data
        )
    one, first, second = (torch.load(tmp_path / name) for name in ("of-1-0", "of-2-0", "of-2-1"))
    assert_close(first, one)
    assert identical(second, first)
