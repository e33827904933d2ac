"""The cost of an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.loggers import CSVLogger

from lightning_continual.callbacks import AccuracyMatrixCallback, CostCallback, RehearsalCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.stream import TaskStream

MakeTrainer = Callable[..., L.Trainer]


def test_samples_and_the_ratio_to_training_from_scratch_are_counted(trainer: MakeTrainer) -> None:
    cost = CostCallback()
    data = ContinualDataModule(make_tasks([16, 24, 8]), batch_size=4)
    trainer(TaskStream(epochs_per_task=2), cost).fit(Classifier(), datamodule=data)
    assert [task["samples"] for task in cost.tasks] == [32, 48, 16]
    assert [task["ratio"] for task in cost.tasks] == [32 / 32, 48 / (2 * 40), 16 / (2 * 48)]
    assert [task["scratch_samples"] for task in cost.tasks] == [32, 80, 96]
    assert cost.tasks[1]["scratch_flops"] == pytest.approx(cost.tasks[1]["flops"] * 80 / 48)
    assert cost.total()["samples"] == 96


def test_exemplars_of_the_past_cost_like_new_samples(trainer: MakeTrainer) -> None:
    cost = CostCallback(verbose=False)
    data = ContinualDataModule(make_tasks([16, 16]), batch_size=4)
    trainer(cost, RehearsalCallback(memory=100), TaskStream()).fit(Classifier(), datamodule=data)
    assert [task["samples"] for task in cost.tasks] == [16, 32]


def test_flops_are_those_of_forward_and_backward(trainer: MakeTrainer) -> None:
    cost = CostCallback(verbose=False)
    data = ContinualDataModule(make_tasks([16]), batch_size=4)
    trainer(cost, TaskStream()).fit(Classifier(), datamodule=data)
    # Two for a multiply-add; layer 4 x 16: forward and the weights' gradient; layer 16 x 6: the input's gradient too.
    assert cost.tasks[0]["flops"] == 16 * 2 * (2 * 4 * 16 + 3 * 16 * 6)


def test_seconds_leave_out_validation_and_the_boundary(trainer: MakeTrainer) -> None:
    class Slow(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.05)
            super().validation_step(batch, batch_idx)

    cost = CostCallback(verbose=False)
    data = ContinualDataModule(make_tasks([16, 16]), batch_size=4)
    fit = trainer(AccuracyMatrixCallback(verbose=False), TaskStream(epochs_per_task=2), cost)
    start = time.perf_counter()
    fit.fit(Slow(), datamodule=data)
    assert time.perf_counter() - start > 0.05 * 4 * 10
    assert all(8 * 0.01 <= task["seconds"] < 0.4 for task in cost.tasks)


def test_counts_go_on_after_a_resume(trainer: MakeTrainer, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(*extra: L.Callback, ckpt_path: Path | None = None) -> list[dict[str, float]]:
        cost = CostCallback(verbose=False)
        data = ContinualDataModule(make_tasks([16, 16]), batch_size=4)
        torch.manual_seed(0)
        trainer(TaskStream(), cost, *extra).fit(Classifier(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return [{name: value for name, value in task.items() if "seconds" not in name} for task in cost.tasks]

    assert run(Save()) == run(ckpt_path=tmp_path / "middle.ckpt")


def test_every_task_is_logged_and_the_table_printed(
    trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path)
    data = ContinualDataModule(make_tasks([16, 16]), batch_size=4)
    trainer(TaskStream(), CostCallback(), logger=logger, log_every_n_steps=1).fit(Classifier(), datamodule=data)
    first, heads, *tasks, whole = capsys.readouterr().out.splitlines()
    assert "from scratch" in first
    assert heads.split() == ["task", *2 * ["samples", "seconds", "GFLOPs"], "ratio"]
    assert [line.split()[0] for line in tasks] == ["0", "1"]
    assert whole.split()[0] == "all"
    assert whole.split()[-1] == f"{32 / 48:.3f}"
    log = (Path(logger.log_dir) / "metrics.csv").read_text()
    for name in ("samples", "seconds", "flops", "ratio", "scratch_samples", "scratch_seconds", "scratch_flops"):
        assert f"cost/{name}" in log


def test_an_exception_ends_the_count_of_operations(trainer: MakeTrainer) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("broken")

    cost = CostCallback()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(TaskStream(), cost).fit(Broken(), datamodule=ContinualDataModule(make_tasks([8]), batch_size=4))
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None
