"""Task heads: what they compute, what they leave alone, and whom they follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import make_tasks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_continual.callbacks.accuracy_matrix import AccuracyMatrixCallback
from lightning_continual.callbacks.ewc import EWCCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.heads import TaskHead, at_task, require_tasks, set_task, task_heads
from lightning_continual.stream import ContinualCallback, TaskStream, restore

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Incremental(L.LightningModule):
    """A task-incremental module: two outputs a task, labels numbered within a task."""

    def __init__(self, num_tasks: int = 3, *, masked: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = TaskHead(8, 2, num_tasks=num_tasks, masked=masked)
        self.seen: list[tuple[str, int | None, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, batch: Any, where: str) -> Tensor:
        x, y = batch
        self.seen.append((where, self.head.task, int(y[0]) // 2))
        logits = self(x)
        if where != "predict":
            self.log("acc", (logits.argmax(1) == (y if self.head.masked else y % 2)).float().mean())
        return nn.functional.cross_entropy(logits, y if self.head.masked else y % 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch, "val"))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch, "predict")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def stream_of(num_tasks: int = 3) -> ContinualDataModule:
    return ContinualDataModule(make_tasks([16] * num_tasks), batch_size=8)


# --- What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
def test_each_task_has_a_linear_layer_of_its_own(shape: tuple[int, ...]) -> None:
    head, x = TaskHead(4, [2, 3, 1], num_tasks=3).double(), torch.randn(shape, dtype=torch.float64)
    for task, number in enumerate([2, 3, 1]):
        head.task = task
        layer = head.layers[task]
        assert head(x).shape == (*shape[:-1], number)
        assert_close(head(x), x @ layer.weight.T + layer.bias)


def test_masked_outputs_of_other_tasks_are_minus_infinity() -> None:
    head, x = TaskHead(4, [2, 3, 1], num_tasks=3, masked=True).double(), torch.randn(5, 4, dtype=torch.float64)
    everything = head(x, task=None)
    owners = [0, 0, 1, 1, 1, 2]
    for task in range(3):
        for output, owner in enumerate(owners):
            expected = everything[:, output] if owner == task else torch.full_like(everything[:, output], -torch.inf)
            assert_close(head(x, task=task)[:, output], expected)


@pytest.mark.parametrize("masked", [False, True], ids="masked={}".format)
def test_without_a_task_the_outputs_of_all_stand_side_by_side(masked: bool) -> None:
    head, x = TaskHead(4, [2, 1], num_tasks=2, masked=masked), torch.randn(5, 4)
    assert_close(head(x), torch.cat([layer(x) for layer in head.layers], dim=1))
    assert not head(x).isinf().any()


@pytest.mark.parametrize("masked", [False, True], ids="masked={}".format)
def test_an_explicit_task_wins(masked: bool) -> None:
    head, x = TaskHead(4, 2, num_tasks=2, masked=masked), torch.randn(5, 4)
    head.task = 1
    own = head(x)
    assert torch.equal(head(x, task=1), own)
    assert not torch.equal(head(x, task=0), own)
    assert head(x, task=None).shape == (5, 4)
    assert head.task == 1


@pytest.mark.parametrize("masked", [False, True], ids="masked={}".format)
def test_heads_not_in_use_have_no_gradient_and_no_optimizer_moves_them(masked: bool) -> None:
    head = TaskHead(4, 2, num_tasks=3, masked=masked)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.1)
    head.task = 1
    y = torch.tensor([0, 1]) + 2 * masked
    nn.functional.cross_entropy(head(torch.randn(2, 4)), y).backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {"layers.1.weight", "layers.1.bias"}
    assert all(bool(p.grad.isfinite().all()) for p in head.layers[1].parameters())
    optimizer.step()
    moved = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"layers.1.weight", "layers.1.bias"}


def test_masked_and_separate_heads_train_alike() -> None:
    torch.manual_seed(0)
    separate, masked = TaskHead(4, 2, num_tasks=3).double(), TaskHead(4, 2, num_tasks=3, masked=True).double()
    masked.load_state_dict(separate.state_dict())
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    nn.functional.cross_entropy(separate(x, task=1), y).backward()
    nn.functional.cross_entropy(masked(x, task=1), y + 2).backward()
    assert_close(masked.layers[1].weight.grad, separate.layers[1].weight.grad)


def test_the_task_is_not_saved_with_the_weights() -> None:
    head = TaskHead(4, 2, num_tasks=2)
    head.task = 1
    assert list(head.state_dict()) == [f"layers.{task}.{name}" for task in range(2) for name in ("weight", "bias")]
    again = TaskHead(4, 2, num_tasks=2)
    again.load_state_dict(head.state_dict())
    assert again.task is None


def test_it_is_exported_at_its_task() -> None:
    head, x = TaskHead(4, 2, num_tasks=2), torch.randn(3, 4)
    head.task = 1
    exported = torch.export.export(head, (x,)).module()
    head.task = 0
    assert_close(exported(x), head(x, task=1))


def test_it_says_at_which_task_it_is() -> None:
    assert repr(TaskHead(4, [2, 1], num_tasks=2)).startswith("TaskHead(\n  4, [2, 1], masked=False, task=None\n")


# --- All heads of a module --------------------------------------------------------------------------------------------


def several() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"a": TaskHead(4, 2, num_tasks=2), "b": nn.Sequential(TaskHead(4, 1, num_tasks=3)), "c": nn.Linear(4, 1)}
    )


def test_all_heads_of_a_module_go_to_a_task() -> None:
    module = several()
    assert list(task_heads(module)) == ["a", "b.0"]
    set_task(module, 1)
    assert [head.task for head in task_heads(module).values()] == [1, 1]
    set_task(module, None)
    assert [head.task for head in task_heads(module).values()] == [None, None]


def test_if_one_head_has_no_such_task_none_is_changed() -> None:
    module = several()
    with pytest.raises(ValueError, match=r"of the `TaskHead` 'a' must be at least 3, .*, but is 2\. Make it with `num"):
        set_task(module, 2)
    assert [head.task for head in task_heads(module).values()] == [None, None]


def test_for_a_while_and_back_each_to_its_own_whatever_happens() -> None:
    module = several()
    module["a"].task = 0
    with pytest.raises(KeyError), at_task(module, 1):  # noqa: PT012
        assert [head.task for head in task_heads(module).values()] == [1, 1]
        raise KeyError
    assert [head.task for head in task_heads(module).values()] == [0, None]


# --- Whom they follow -------------------------------------------------------------------------------------------------


def test_in_a_stream_they_are_at_the_task_whose_batch_it_is(trainer: Callable[..., L.Trainer]) -> None:
    module = Incremental()
    trainer(TaskStream(2), num_sanity_val_steps=2).fit(module, datamodule=stream_of())
    assert {where for where, *_ in module.seen} == {"train", "val"}
    assert all(at == of for _, at, of in module.seen)
    assert {of for *_, of in module.seen} == {0, 1, 2}
    assert module.head.task == 2


def test_at_the_boundary_they_are_at_the_task_that_ends(trainer: Callable[..., L.Trainer]) -> None:
    class Look(L.Callback):
        def __init__(self) -> None:
            self.at: list[Any] = []

        def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.at.append(("start", task, pl_module.head.task))

        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.at.append(("end", task, pl_module.head.task))

    trainer(TaskStream(1), look := Look()).fit(Incremental(), datamodule=stream_of())
    assert look.at == [(when, task, task) for task in range(3) for when in ("start", "end")]


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 5, 6], ids="step={}".format)  # two batches an epoch, two epochs a task
def test_resumed_they_are_where_they_were(trainer: Callable[..., L.Trainer], tmp_path: Path, step: int) -> None:
    L.seed_everything(1, verbose=False)
    whole = Incremental()
    trainer(TaskStream(2), SaveAt(tmp_path / "saved", step)).fit(whole, datamodule=stream_of())
    module = Incremental()
    trainer(TaskStream(2), num_sanity_val_steps=2).fit(module, datamodule=stream_of(), ckpt_path=tmp_path / "saved")
    trained = [seen for seen in module.seen if seen[0] == "train"]
    assert all(at == of for _, at, of in trained)
    assert len(trained) == 12 - step
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("with_data_module", [True, False], ids="data module={}".format)
def test_where_each_fit_is_a_task_any_callback_leads_them(
    trainer: Callable[..., L.Trainer], with_data_module: bool
) -> None:
    module, data, method = Incremental(), stream_of(), ContinualCallback()
    for task in range(3):
        data.current_task = task
        loaders = [DataLoader(one, 8) for one in (data.tasks[task].train, data.tasks[task].val)]
        source = {"datamodule": data} if with_data_module else {}
        trainer(method, max_epochs=1, num_sanity_val_steps=2).fit(module, *(() if source else loaders), **source)
    assert {of for *_, of in module.seen} == {0, 1, 2}
    assert all(at == of for _, at, of in module.seen)


def test_a_callback_added_later_does_not_lead_them_back(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    module, old = Incremental(), ContinualCallback()
    tasks = make_tasks([16] * 3)
    trainer(old, max_epochs=1).fit(module, DataLoader(tasks[0].train, 8))
    fit = trainer(old, EWCCallback(1.0), max_epochs=1)
    fit.fit(module, DataLoader(tasks[1].train, 8))
    assert module.head.task == 1
    fit.save_checkpoint(tmp_path / "deployed.ckpt")
    again = ContinualCallback()
    restore(tmp_path / "deployed.ckpt", module, [again])
    trainer(again, max_epochs=1).fit(module, DataLoader(tasks[2].train, 8))
    assert module.head.task == 2


@pytest.mark.parametrize("masked", [False, True], ids="masked={}".format)
def test_every_task_is_scored_with_its_own_head(trainer: Callable[..., L.Trainer], masked: bool) -> None:
    L.seed_everything(1, verbose=False)
    module, data = Incremental(masked=masked), stream_of()
    matrix = AccuracyMatrixCallback("acc", verbose=False)
    trainer(TaskStream(2), matrix).fit(module, datamodule=data)
    for task in range(3):
        x, y = (torch.stack(parts) for parts in zip(*data.tasks[task].test, strict=True))
        right = module.head(module.body(x), task=task).argmax(1) == (y if masked else y % 2)
        assert_close(matrix.matrix.compute()[2, task].item(), right.float().mean().item())
    assert all(at == of for _, at, of in module.seen)
    assert module.head.task == 2


def test_tested_after_the_fit_each_loader_has_its_head_and_the_task_comes_back(
    trainer: Callable[..., L.Trainer],
) -> None:
    module, data = Incremental(), stream_of()
    first = trainer(TaskStream(1), ContinualCallback())
    first.fit(module, datamodule=data)
    for way in (lambda: first.test(module, data, verbose=False), lambda: first.predict(module, data.test_dataloader())):
        module.seen.clear()
        way()
        assert [of for *_, of in module.seen] == [0, 0, 1, 1, 2, 2]
        assert all(at == of for _, at, of in module.seen)
        assert module.head.task == 2


def test_validated_on_several_loaders_too_and_after_an_exception(trainer: Callable[..., L.Trainer]) -> None:
    class Fail(L.Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if module.head.task == 1:
                raise RuntimeError("in evaluation")

    module, loaders = Incremental(), stream_of().test_dataloader()
    for task in (2, 0):
        module.head.task = task
        trainer(ContinualCallback()).validate(module, loaders, verbose=False)
        assert all(at == of for _, at, of in module.seen)
        assert module.head.task == task
    with pytest.raises(RuntimeError, match="in evaluation"):
        trainer(ContinualCallback(), Fail()).validate(module, loaders, verbose=False)
    assert module.head.task == 0


def test_in_a_fit_and_with_more_loaders_than_tasks_they_stay(trainer: Callable[..., L.Trainer]) -> None:
    module, loaders = Incremental(num_tasks=2), stream_of().test_dataloader()
    trainer(ContinualCallback(), max_epochs=1, num_sanity_val_steps=1).fit(module, loaders[0], loaders[:2])
    assert {at for _, at, _ in module.seen} == {0}
    module.seen.clear()
    trainer(ContinualCallback()).test(module, loaders, verbose=False)
    assert {at for _, at, _ in module.seen} == {0}


# --- Processes --------------------------------------------------------------------------------------------------------


def test_two_processes_train_the_heads_as_one_with_the_doubled_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Keep(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.world_size}-{trainer.global_rank}")

    class Quiet(Incremental):
        def log(self, name: str, value: Any, **options: Any) -> None:
            pass

    for devices in (1, 2):
        L.seed_everything(5, verbose=False)
        options = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"} if devices == 2 else {}
        data = ContinualDataModule(make_tasks([16, 16, 16]), batch_size=8 // devices)
        trainer(TaskStream(2), Keep(), precision="64-true", **options).fit(Quiet().double(), datamodule=data)
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        assert_close(first[name], value)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("callback", [TaskStream, ContinualCallback])
def test_ddp_that_waits_for_every_gradient_is_refused(trainer: Callable[..., L.Trainer], callback: Any) -> None:
    with pytest.raises(Exception, match='Pass `strategy="ddp_find_unused_parameters_true"` to the Trainer'):
        trainer(callback(), devices=2, strategy="ddp_fork").fit(Incremental(), datamodule=stream_of())


def test_with_a_single_task_ddp_has_nothing_to_wait_for(trainer: Callable[..., L.Trainer]) -> None:
    class Quiet(Incremental):
        def log(self, name: str, value: Any, **options: Any) -> None:
            pass

    trainer(TaskStream(1), devices=2, strategy="ddp_fork").fit(Quiet(num_tasks=1), datamodule=stream_of(1))


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, r"`num_tasks` must be at least 1, but got 0"),
        ({"out_features": [2, 3]}, r"must be one number, or one for each of 3 tasks, but got \[2, 3\]"),
        ({"out_features": 0}, r"`out_features` must be at least 1, but got 0"),
        ({"in_features": 0}, r"`in_features` must be at least 1, but got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskHead(**{"in_features": 4, "out_features": 2, "num_tasks": 3, **arguments})


def test_one_task_may_be_a_tensor_and_one_for_each_sample_is_refused() -> None:
    head, x = TaskHead(4, 2, num_tasks=3), torch.ones(5, 4)
    assert torch.equal(head(x, task=torch.tensor(1)), head(x, task=1))
    assert torch.equal(head(x, task=torch.tensor([1])), head(x, task=1))
    with pytest.raises(ValueError, match=r"`task` must be one number .* shape \(5,\)\. Pass `int\(task\[0\]\)`"):
        head(x, task=torch.tensor([1, 1, 1, 1, 1]))


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_there_is_not_is_refused(task: int) -> None:
    head = TaskHead(4, 2, num_tasks=3)
    message = rf"`task` must lie in 0\.\.2, or be None for the outputs of all tasks, but got {task}\. Make the `TaskH"
    with pytest.raises(ValueError, match=message):
        head.task = task
    with pytest.raises(ValueError, match=message):
        head(torch.ones(1, 4), task=task)


def test_more_tasks_than_the_head_serves_are_refused_before_training(trainer: Callable[..., L.Trainer]) -> None:
    message = r"`num_tasks` of the `TaskHead` 'head' must be at least {}, .*, but is 2\. Make it with `num_tasks={}`"
    require_tasks(Incremental(num_tasks=2), 2)
    module, data = Incremental(num_tasks=2), stream_of()
    with pytest.raises(MisconfigurationException, match=message.format(3, 3)):
        trainer(TaskStream(1)).fit(module, datamodule=data)
    matrix = AccuracyMatrixCallback("acc", loaders=data.test_dataloader(), verbose=False)
    with pytest.raises(MisconfigurationException, match=message.format(3, 3)):
        trainer(matrix, max_epochs=1).fit(module, DataLoader(data.tasks[0].train, 8))
    data.current_task = 2
    with pytest.raises(MisconfigurationException, match=message.format(3, 3)):
        trainer(ContinualCallback(), max_epochs=1).fit(module, datamodule=data)
    assert not [seen for seen in module.seen if seen[0] == "train"]
