"""Killed anywhere and resumed: bit-identical to the run that was not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_continual.callbacks import AccuracyMatrixCallback, BanditSelectionCallback, RehearsalCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.memory import ClassBalancedMemory, HerdingMemory, TaskMemory
from lightning_continual.stream import TaskEarlyStopping, TaskStream


class Everywhere(ModelCheckpoint):
    """Saves after every step, every validation and every epoch; in a resumed run nothing."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        super().__init__()
        self.folder = folder
        self.resumed = resumed
        self.saved: list[Path] = []

    def _save_here(self, trainer: L.Trainer, when: str) -> None:
        if not (self.resumed or trainer.sanity_checking):
            self.saved.append(self.folder / f"{len(self.saved):03d}-step-{trainer.global_step}-{when}.ckpt")
            trainer.save_checkpoint(self.saved[-1])

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save_here(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save_here(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save_here(trainer, "epoch")


def run(folder: Path, make: Callable[[], list[L.Callback]], *, workers: int = 0, ckpt: Path | None = None) -> Any:
    L.seed_everything(7, verbose=False)
    if ckpt is not None:
        torch.rand(100)  # another process would not be at the same place of its random stream
    module = Classifier(dropout=0.3, schedule=True)
    data = ContinualDataModule(make_tasks(num_samples=[18, 12, 22]), batch_size=4, num_workers=workers)
    matrix, everywhere = AccuracyMatrixCallback(verbose=False), Everywhere(folder, resumed=ckpt is not None)
    trainer = L.Trainer(
        callbacks=[*make(), matrix, everywhere],
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return module.state_dict(), matrix.matrix.compute(), trainer, everywhere.saved


def assert_same(resumed: Any, whole: Any, path: Path) -> None:
    for name, value in whole[0].items():
        assert torch.equal(resumed[0][name], value), f"{path.name}: {name}"
    assert torch.equal(resumed[1], whole[1]), path.name
    assert resumed[2].global_step == whole[2].global_step, path.name
    assert resumed[2].current_epoch == whole[2].current_epoch, path.name


RUNS = {
    "epochs": lambda: [TaskStream(epochs_per_task=2), RehearsalCallback(memory=12)],
    "steps": lambda: [TaskStream(steps_per_task=7), RehearsalCallback(memory=12, mode="replace")],
    "state": lambda: [TaskStream(2, reset_optimizer="state"), RehearsalCallback(TaskMemory(12), selection="recent")],
    "early": lambda: [
        TaskStream(epochs_per_task=4),
        TaskEarlyStopping("val_loss", patience=1, min_delta=0.2),
        RehearsalCallback(ClassBalancedMemory(9), selection="balanced"),
    ],
    "herding": lambda: [
        RehearsalCallback(HerdingMemory(12), features=lambda module, batch: module.net[:2](batch[0])),
        TaskStream(epochs_per_task=2),
    ],
    "reload": lambda: [RehearsalCallback(12, reload=True), TaskStream(epochs_per_task=2)],
    "bandits": lambda: [
        BanditSelectionCallback(
            "both", budget=(0.75, 0.6), head="net.3.bias", every=3, measure_every=2, memory=12, policy="thompson"
        ),
        TaskStream(epochs_per_task=2),
    ],
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_every_checkpoint_resumes_to_the_bit(tmp_path: Path, make: Callable[[], list[L.Callback]]) -> None:
    *whole, saved = run(tmp_path, make)
    assert len(saved) > 30
    if make is RUNS["early"]:  # Lightning validates no epoch that a checkpoint of its last batch resumes after
        pairs = pairwise([*saved, saved[-1]])
        saved = [path for path, after in pairs if not ("batch" in path.name and "validation" in after.name)]
    for path in saved[:-1]:
        assert_same(run(tmp_path, make, ckpt=path), whole, path)
    with pytest.raises(MisconfigurationException, match="This stream has ended: all 3 tasks are trained"):
        run(tmp_path, make, ckpt=saved[-1])


@pytest.mark.slow
def test_every_checkpoint_resumes_to_the_bit_with_workers(tmp_path: Path) -> None:
    *whole, saved = run(tmp_path, RUNS["epochs"], workers=2)
    for path in saved[:-1:7]:
        assert_same(run(tmp_path, RUNS["epochs"], workers=2, ckpt=path), whole, path)
