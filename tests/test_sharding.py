"""Modules sharded by FSDP2: the same numbers as with DDP, and whole tensors in checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.testing import assert_close

from lightning_continual import _host
from lightning_continual.parameters import is_sharded, sharded_like, whole

# A run of its own: the strategy starts its processes from a script.
SCRIPT = """
import os
import sys
import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset
from lightning_continual import *
from lightning_continual._host import reshard
from lightning_continual.parameters import whole


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    def configure_model(self):
        if sys.argv[1] == "fsdp":
            for one in (self.net[0], self.net):
                fully_shard(one, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)


class Save(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            trainer.save_checkpoint("middle.ckpt")


def task(seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(33, 4, generator=generator), torch.randn(4, 3, generator=generator)
    data = TensorDataset(x, (x @ w).argmax(1))
    return Task(data, val=data)


def run(methods, checkpoint=None):
    L.seed_everything(0, verbose=False)
    module, data = Net(), ContinualDataModule([task(0), task(1), task(2)], batch_size=8)
    strategy = "ddp"
    if sys.argv[1] == "fsdp":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=-1, callbacks=[TaskStream(2), *methods],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    reshard(module)
    return {name: whole(one.detach()) for name, one in module.named_parameters()}


if __name__ == "__main__":
    ewc, matrix = EWCCallback(10.0), AccuracyMatrixCallback("val_acc")
    found = {"weights": run([RehearsalCallback(20), ewc, matrix, CostCallback(), Save()])}
    found |= {"penalty": ewc.penalty.state_dict(), "matrix": matrix.matrix.compute()}
    again = [RehearsalCallback(20), EWCCallback(10.0), AccuracyMatrixCallback("val_acc"), CostCallback()]
    found["resumed"] = run(again, "middle.ckpt")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(found, "found.pt")
"""


def run(way: str, folder: Path) -> Any:
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py", way], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
def test_sharded_by_fsdp2_the_numbers_are_those_of_ddp_and_resume_to_the_bit(tmp_path: Path) -> None:
    expected, found = run("ddp", tmp_path / "ddp"), run("fsdp", tmp_path / "fsdp")
    for part in ("weights", "penalty", "matrix"):
        assert_close(found[part], expected[part])
    assert_close(found["resumed"], found["weights"], rtol=0, atol=0)
    state = torch.load(tmp_path / "fsdp" / "middle.ckpt", weights_only=True)
    precision = state["callbacks"]["EWCCallback"]["penalty"]["precision"]
    assert {name: one.shape for name, one in precision.items()} == {
        name: one.shape for name, one in found["weights"].items()
    }


def test_tensors_that_are_not_sharded_stay_what_they_are() -> None:
    one = torch.ones(2)
    assert not is_sharded(one)
    assert whole(one) is one
    assert sharded_like(one, torch.zeros(3)) is one


def test_a_module_without_shards_is_left_alone() -> None:
    module = torch.nn.Linear(2, 1)
    before = dict(module.named_parameters())
    with _host.unsharded(module):
        assert all(one is before[name] for name, one in module.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "sharded", "message"),
    [
        ("ModelParallelStrategy", {"_tensor_parallel_size": 2}, True, "Pass `tensor_parallel_size=1`"),
        ("ModelParallelStrategy", {"_tensor_parallel_size": "auto"}, True, "Pass `tensor_parallel_size=1`"),
        ("ModelParallelStrategy", {"_tensor_parallel_size": 1}, False, "Use 'ddp', or one device"),
        ("FSDPStrategy", {}, True, r"Use `ModelParallelStrategy` \(FSDP2\), 'ddp'"),
        ("DeepSpeedStrategy", {}, True, "Use 'ddp', or one device"),
    ],
)
def test_what_cannot_be_served_is_told(name: str, options: dict[str, Any], sharded: bool, message: str) -> None:
    trainer = SimpleNamespace(strategy=type(name, (), options)())
    with pytest.raises(MisconfigurationException, match=f"`Callback` needs the whole gradient.*`{name}`.*{message}"):
        _host.require_visible_gradients(trainer, "Callback", sharded=sharded)
    fits = SimpleNamespace(strategy=type("ModelParallelStrategy", (), {"_tensor_parallel_size": 1})())
    _host.require_visible_gradients(fits, "Callback", sharded=True)
