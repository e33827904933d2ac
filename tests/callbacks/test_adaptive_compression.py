"""Adaptive compression: each task owns few weights, sees the same network for ever, and shares are searched."""

from __future__ import annotations

import copy
import csv
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
from conftest import make_tasks
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_continual import (
    AccuracyMatrixCallback,
    CLNPCallback,
    ContinualDataModule,
    PruningCallback,
    Task,
    TaskStream,
    restore,
)
from lightning_continual._host import retraining
from lightning_continual.callbacks.adaptive_compression import AdaptiveCompressionCallback
from lightning_continual.heads import TaskHead

Make = Callable[..., L.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
    # What Lightning says where there is an `OnExceptionCheckpoint`.
    pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint available)"),
]


class Net(L.LightningModule):
    """Linear, normalised, linear, and a head a task."""

    def __init__(self, make_optimizer: Any = None, *, masked: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 10), nn.BatchNorm1d(10), nn.Linear(10, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = TaskHead(8, 2, num_tasks=3, masked=masked)
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        self.optimizers_made = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.second(self.norm(self.first(x)).relu()).relu()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        self.optimizers_made += 1
        return self.make_optimizer(self.parameters())


def net(make_optimizer: Any = None, **options: Any) -> Net:
    L.seed_everything(3, verbose=False)
    return Net(make_optimizer, **options).double()


def double_tasks(*numbers: int) -> list[Task]:
    tasks = make_tasks(numbers or (24, 24, 24))
    return [
        Task(
            *(TensorDataset(part.tensors[0].double(), part.tensors[1]) for part in (one.train, one.val, one.test)),
            classes=one.classes,
        )
        for one in tasks
    ]


def data_of(*numbers: int, batch_size: int = 4) -> ContinualDataModule:
    return ContinualDataModule(double_tasks(*numbers), batch_size=batch_size)


def packnet(**options: Any) -> AdaptiveCompressionCallback:
    return AdaptiveCompressionCallback(**{"monitor": None, "share": 0.5, **options})


def searched(tolerance: float = 0.2, **options: Any) -> AdaptiveCompressionCallback:
    return AdaptiveCompressionCallback(tolerance, **{"monitor": "val_acc", "trials": 3, **options})


def inputs() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).double()


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.05),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.05),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
}


class Watch(L.Callback):
    """Notes what each task sees at its end, and compares it with what it sees later."""

    def __init__(self, compression: AdaptiveCompressionCallback) -> None:
        self.compression = compression
        self.seen: dict[int, Tensor] = {}
        self.exports: dict[int, nn.Module] = {}

    def outputs(self, module: nn.Module, task: int) -> Tensor:
        with self.compression.as_task(module, task), torch.no_grad():
            return module(inputs().to(module.first.weight.dtype))

    def on_task_end(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.seen[task] = self.outputs(pl_module, task)
        self.exports[task] = self.compression.export_task(pl_module, task)
        for old, before in self.seen.items():
            assert torch.equal(self.outputs(pl_module, old), before), f"task {old} after task {task}"
            with torch.no_grad():
                assert torch.equal(self.exports[old](inputs().to(before.dtype)), before)


# --- Nothing of a task is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["hold", "per-task"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_old_tasks_stay_the_same_to_the_bit(trainer: Make, optimizer: Any, norms: Any) -> None:
    module, compression = net(optimizer), packnet(norms=norms)
    watch = Watch(compression)
    trainer(TaskStream(3), compression, watch, gradient_clip_val=0.5, precision="64-true").fit(
        module, datamodule=data_of()
    )
    assert compression.tasks == [0, 1, 2]
    assert not torch.equal(watch.seen[0][:, :2], watch.seen[1][:, 2:4])
    again = packnet(norms=norms)
    again.load_state_dict(compression.state_dict())
    assert torch.equal(Watch(again).outputs(module, 0), watch.seen[0])


class Decaying(Net):
    """Its loss has a penalty on all parameters, those of other tasks' heads too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * sum(p.square().sum() for p in self.parameters())


@pytest.mark.parametrize("norms", ["hold", "per-task"])
def test_the_accuracy_matrix_scores_what_each_task_sees(trainer: Make, norms: Any) -> None:
    matrix = AccuracyMatrixCallback("val_loss", higher_is_better=False, verbose=False, baseline=False)
    trainer(packnet(norms=norms), matrix, TaskStream(2)).fit(net(), datamodule=data_of())
    scores = matrix.matrix.compute()
    for task in range(3):
        learnt = scores[task:, task]
        assert torch.equal(learnt, learnt[:1].expand_as(learnt))


class Centred(Net):
    """Keeps a running mean of its inputs in a buffer, by which it centres them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) * self.table)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("norms", ["hold", "per-task"])
def test_buffers_that_training_changes_are_each_tasks_own(trainer: Make, norms: Any, tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Centred().double(), packnet(norms=norms)
    trainer(TaskStream(2), compression, Watch(compression), precision="64-true").fit(module, datamodule=data_of())
    means, tables = ([compression.packed.copies[task][name] for task in range(3)] for name in ("mean", "table"))
    assert not torch.equal(means[0], means[1])
    assert tables[0] is tables[1] is tables[2]


def test_heads_of_old_tasks_are_held(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Decaying().double(), packnet()
    trainer(TaskStream(2), compression, Watch(compression), precision="64-true").fit(module, datamodule=data_of())


class MaxNorm(Net):
    """Scales rows of weights down after every step."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.5))


def test_a_module_that_writes_to_its_weights_after_steps_changes_no_old_task(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = MaxNorm().double(), packnet()
    trainer(TaskStream(2), compression, Watch(compression), precision="64-true").fit(module, datamodule=data_of())


class Thaw(BaseFinetuning):
    """Freezes the first layers, and thaws them in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.first, pl_module.norm], train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.first, pl_module.norm], optimizer, lr=0.05)


class Filtered(Net):
    """Trains what is not frozen when it is asked for its optimizers."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.05)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_layers_that_thaw_within_a_task_are_held(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression, data = Filtered().double(), packnet(), data_of()
    watch = Watch(compression)
    for task in range(2):
        data.current_task = task
        trainer(Thaw(), compression, max_epochs=3, precision="64-true").fit(module, datamodule=data)
        watch.on_task_end(cast(Any, None), module, task)


class Unsteady(Filtered):
    """Freezes its first layer for its first epoch, that of retraining too."""

    def on_train_epoch_start(self) -> None:
        self.first.requires_grad_(self.current_epoch > 0)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_layers_that_thaw_while_retraining_stay_pruned(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Unsteady(OPTIMIZERS["SGD"]).double(), packnet(retrain_epochs=2)
    module.configure_optimizers = lambda: OPTIMIZERS["SGD"](module.parameters())
    checked = []

    class Check(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for name, owners in compression.packed.ownership.owners.items():
                assert torch.equal(pl_module.get_parameter(name) == 0, owners == 0)
                checked.append(name)

    trainer(compression, Check(), max_epochs=2, precision="64-true").fit(module, datamodule=data_of())
    assert checked == ["first.weight", "second.weight"]


def test_one_fit_a_task_and_restore_keep_old_tasks_too(trainer: Make, tmp_path: Path) -> None:
    compression, data, seen = packnet(), data_of(), []
    for task in range(3):
        module, again = net(), packnet()
        if task > 0:
            restore(tmp_path / "deployed.ckpt", module, [again])
        compression, data.current_task = again, task
        runner = trainer(compression, max_epochs=2, precision="64-true")
        runner.fit(module, datamodule=data)
        runner.save_checkpoint(tmp_path / "deployed.ckpt")
        seen.append(Watch(compression).outputs(module, task))
        for old, before in enumerate(seen):
            assert torch.equal(Watch(compression).outputs(module, old), before)


@pytest.mark.parametrize("norms", ["hold", "per-task"])
@pytest.mark.parametrize("comes_first", [True, False], ids="average_first={}".format)
def test_an_average_of_weights_changes_nothing_of_tasks_learnt(
    trainer: Make, tmp_path: Path, comes_first: bool, norms: Any
) -> None:
    module, compression = net(), packnet(norms=norms)
    watch, average = Watch(compression), EMAWeightAveraging(decay=0.9)
    order = [average, compression] if comes_first else [compression, average]
    fit = trainer(TaskStream(3), *order, watch, precision="64-true", num_sanity_val_steps=0)
    fit.fit(module, datamodule=data_of())
    require_as_learnt(compression, watch, module)
    if comes_first:
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        restore(tmp_path / "deployed.ckpt", deployed := net(), [])
        require_as_learnt(compression, watch, deployed)


@pytest.mark.parametrize("norms", ["hold", "per-task"])
@pytest.mark.parametrize("average", ["SWA", "EMA"])
def test_one_fit_a_task_may_end_with_an_average(trainer: Make, tmp_path: Path, average: str, norms: Any) -> None:
    module, compression, data = net(), packnet(norms=norms), data_of()
    watch = Watch(compression)
    for task in range(3):
        data.current_task = task
        swa = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
        first = swa if average == "SWA" else EMAWeightAveraging(decay=0.9)
        options = {"max_epochs": 3, "precision": "64-true", "num_sanity_val_steps": 0}
        fit = trainer(first, compression, **options)
        fit.fit(module, datamodule=data)
        fit.save_checkpoint(tmp_path / "deployed.ckpt")
        restore(tmp_path / "deployed.ckpt", module, [])
        watch.on_task_end(cast(Any, None), module, task)
    require_as_learnt(compression, watch, module)


def require_as_learnt(compression: AdaptiveCompressionCallback, watch: Watch, module: Net) -> None:
    for task in range(3):
        assert torch.equal(watch.outputs(module, task), watch.seen[task])
    for name, owners in compression.packed.ownership.owners.items():
        assert torch.equal(module.get_parameter(name) == 0, owners == 0)
    assert len({tuple(seen.flatten().tolist()) for seen in watch.seen.values()}) == 3


def test_a_fit_that_trains_nothing_writes_nothing(trainer: Make) -> None:
    module, compression = net(), packnet()
    trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data_of())
    with torch.no_grad():
        module.first.weight.fill_(1.0)
    compression.setup(trainer(compression), module, "fit")
    compression.on_fit_end(trainer(compression), module)
    assert module.first.weight.eq(1.0).all()


class FirstStep(L.Callback):
    """Keeps the weights with which each task starts."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.weights.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})


@pytest.mark.parametrize("restart", ["zero", "drawn"])
def test_free_weights_start_at_zero_or_drawn_anew(trainer: Make, restart: Any) -> None:
    module, compression, first = net(), packnet(restart=restart, share=0.75), FirstStep()
    watch = Watch(compression)
    trainer(TaskStream(2), compression, first, watch, precision="64-true").fit(module, datamodule=data_of())
    require_as_learnt(compression, watch, module)
    for task in (1, 2):
        for name, owners in compression.packed.ownership.owners.items():
            start = first.weights[task][name][(owners == 0) | (owners > task)]
            if restart == "zero":
                assert not start.any()
            else:
                bound = first.weights[task][name].shape[1] ** -0.5  # of `nn.Linear`
                assert start.all()
                assert 0.8 * bound < start.abs().max() <= bound
                assert not torch.equal(start, first.weights[0][name][(owners == 0) | (owners > task)])


def test_a_layer_that_cannot_be_drawn_anew_is_named_before_training(trainer: Make) -> None:
    class Own(nn.Linear):
        reset_parameters = None  # type: ignore[assignment]

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight, self.bias = nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.zeros(10))

    module = Net()
    module.first = Own()
    with pytest.raises(
        ValueError, match=r"`restart='drawn'` must have layers with a `reset_parameters`, but \['first'\]"
    ):
        trainer(TaskStream(1), packnet(restart="drawn")).fit(module.double(), datamodule=data_of())


def test_the_last_task_sees_the_module_as_it_stands(trainer: Make) -> None:
    module, compression = net(), packnet()
    trainer(TaskStream(2), compression, precision="64-true").fit(module, datamodule=data_of())
    with compression.as_task(module, 2), torch.no_grad():
        seen = module(inputs())
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(inputs()), seen)


class Single(Net):
    """One output layer for all tasks, which the user's own code knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)


@pytest.mark.parametrize("head", [(), "head.*"], ids=["pruned with the rest", "a copy a task"])
def test_one_output_layer_serves_too(trainer: Make, head: Any) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Single().double(), packnet(head=head)
    watch = Watch(compression)
    trainer(TaskStream(2), compression, watch, precision="64-true").fit(module, datamodule=data_of())
    assert ("head.weight" in compression.packed.ownership.owners) == (head == ())


def test_a_norm_in_a_head_has_a_copy_a_task_too(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Single(), packnet(head="head.*")
    module.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    trainer(TaskStream(2), compression, Watch(compression), precision="64-true").fit(
        module.double(), datamodule=data_of()
    )
    means = [compression.packed.copies[task]["head.1.running_mean"] for task in range(3)]
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])


class Recurrent(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True), TaskHead(5, 2, num_tasks=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.first(x)[:, None].expand(-1, 3, -1))[0][:, -1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1] % 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class UNet(L.LightningModule):
    """One step down, one up with a skip, and an output layer of which each task has a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = (self.layer(*sizes) for sizes in ((1, 4), (4, 6), (10, 4)))
        self.head = nn.Conv2d(4, 2, 1)

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = nn.functional.interpolate(self.deep(nn.functional.max_pool2d(fine, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([fine, coarse], 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


@pytest.mark.parametrize("norms", ["hold", "per-task"])
def test_segmentation_of_old_tasks_stays_the_same_to_the_bit(trainer: Make, norms: Any) -> None:
    L.seed_everything(3, verbose=False)
    images, tasks = torch.randn(12, 1, 6, 6), []
    for kind in (images > 0, images > 1, images < -1):
        data = TensorDataset(images, kind[:, 0].long())
        tasks.append(Task(data, data))
    module, compression, seen = UNet(), searched(norms=norms, head="head.*", trials=2, num_tasks=3), []

    class Compare(L.Callback):
        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            for old in range(task + 1):
                with compression.as_task(pl_module, old), torch.no_grad():
                    outputs = pl_module(images)
                seen.extend([outputs] if old == len(seen) else [])
                assert torch.equal(outputs, seen[old])
                assert torch.equal(compression.export_task(pl_module, old)(images), seen[old])

    trainer(TaskStream(2), compression, Compare()).fit(module, datamodule=ContinualDataModule(tasks, batch_size=4))
    assert not torch.equal(seen[0], seen[1])
    assert set(compression.packed.ownership.owners) == {"down.0.weight", "deep.0.weight", "up.0.weight"}


def test_recurrent_layers_are_served(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Recurrent(), packnet()
    trainer(TaskStream(2), compression, Watch(compression)).fit(
        module, datamodule=ContinualDataModule(make_tasks(val=False), batch_size=4)
    )
    owners = compression.packed.ownership.owners
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "first.weight"} == set(owners)


def test_trainer_test_sees_each_loaders_task(trainer: Make) -> None:
    module, compression = net(), packnet()
    tester = trainer(TaskStream(2), compression, precision="64-true")
    data = data_of()
    tester.fit(module, datamodule=data)
    before = copy.deepcopy(module.state_dict())
    tested = tester.test(module, datamodule=data, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for task, found in enumerate(tested):
        x, y = data.tasks[task].test.tensors
        with compression.as_task(module, task), torch.no_grad():
            assert_close(found[f"loss/dataloader_idx_{task}"], float(nn.functional.cross_entropy(module(x), y)))


# --- PackNet ----------------------------------------------------------------------------------------------------------


def test_with_a_fixed_share_it_is_packnet(trainer: Make) -> None:
    """Against PackNet written by hand: one loop over weights, values put back after every step."""
    share, epochs, retrain_epochs = 0.6, 2, 2
    module, compression = net(OPTIMIZERS["SGD"]), packnet(share=share, retrain_epochs=retrain_epochs)
    oracle = copy.deepcopy(module)
    batches = Batches()
    trainer(TaskStream(epochs), compression, batches, precision="64-true").fit(module, datamodule=data_of())

    weights = ["first.weight", "second.weight"]
    rest = ["first.bias", "norm.weight", "norm.bias", "second.bias"]
    named = dict(oracle.named_parameters())
    owner = {name: torch.zeros_like(named[name], dtype=torch.long) for name in weights}
    for task, (trained, retrained) in enumerate(zip(batches.trained, retrained_batches(3), strict=True)):
        oracle.head.task = task

        def train(batches: Any, is_free: dict[str, Tensor], task: int = task) -> None:
            optimizer = OPTIMIZERS["SGD"](oracle.parameters())
            oracle.train()
            if task > 0:
                oracle.norm.eval()
            for x, y in batches:
                before = {name: p.detach().clone() for name, p in named.items()}
                optimizer.zero_grad()
                nn.functional.cross_entropy(oracle(x), y).backward()
                optimizer.step()
                with torch.no_grad():
                    for name in weights:
                        named[name].copy_(torch.where(is_free[name], named[name], before[name]))
                    for name in rest if task > 0 else ():
                        named[name].copy_(before[name])

        train(trained, {name: owner[name] == 0 for name in weights})
        stays = {}
        with torch.no_grad():
            for name in weights:
                free = owner[name] == 0
                sizes = sorted(named[name][free].abs().tolist())
                number = round(share * len(sizes))
                limit = sizes[number - 1] if number else -1.0
                stays[name] = free & (named[name].abs() > limit)
                named[name][free & ~stays[name]] = 0
        train(retrained, stays)
        for name in weights:
            owner[name][stays[name]] = task + 1
    for name, value in oracle.state_dict().items():
        assert_close(module.state_dict()[name], value)
    for name in weights:
        assert torch.equal(compression.packed.ownership.owners[name].long(), owner[name])


class Batches(L.Callback):
    """Keeps what each task was trained on."""

    def __init__(self) -> None:
        self.trained: list[list[Any]] = []

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.trained.append([])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trained[-1].append([part.clone() for part in batch])


@pytest.fixture(autouse=True)
def retrained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the batches that each retraining serves."""
    RETRAINED.clear()
    shuffled = retraining._shuffled

    def noted(trainer: Any, seed: str) -> Any:
        batches = list(itertools.islice(shuffled(trainer, seed), 1000))
        RETRAINED.append(batches)
        return batches

    monkeypatch.setattr(retraining, "_shuffled", noted)


RETRAINED: list[list[Any]] = []


def retrained_batches(num_tasks: int) -> list[list[Any]]:
    """Return for each task all batches of its retraining."""
    epochs = len(RETRAINED) // num_tasks
    tasks = [RETRAINED[task * epochs : (task + 1) * epochs] for task in range(num_tasks)]
    return [[batch for epoch in task for batch in epoch] for task in tasks]


def test_retraining_sees_each_sample_of_the_task_once_an_epoch(trainer: Make) -> None:
    trainer(TaskStream(1), packnet(retrain_epochs=2), precision="64-true").fit(net(), datamodule=data_of(24, 18, 10))
    assert len(RETRAINED) == 6
    for epoch, size in zip(RETRAINED, (24, 24, 18, 18, 10, 10), strict=True):
        numbers = torch.cat([x[:, 0] for x, _ in epoch]) * 1000 % 1000
        assert sorted(numbers.round().long().tolist()) == list(range(size))
    assert not torch.equal(RETRAINED[0][0][0], RETRAINED[1][0][0])


def test_pruned_weights_are_zero_until_the_next_task_trains_them(trainer: Make) -> None:
    module, compression = net(), packnet(share=0.75)
    trainer(TaskStream(2), compression, precision="64-true").fit(module, datamodule=data_of())
    for name, owners in compression.packed.ownership.owners.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight == 0, owners == 0)
        n = owners.numel()
        left = n
        for task in range(3):
            own = int((owners == task + 1).sum())
            assert 0 < own <= left - round(0.75 * left)  # those which training left at zero go too
            left -= own
        assert int((owners == 1).sum()) == n - round(0.75 * n)


def test_shares_may_be_given_task_by_task(trainer: Make) -> None:
    """Two thirds, a half, nothing given back: PackNet with equal parts, but for weights that training leaves at 0."""
    compression = packnet(share=[2 / 3, 1 / 2, 0.0])
    trainer(TaskStream(2), compression, precision="64-true").fit(net(), datamodule=data_of())
    assert [one.share for one in compression.packed.found.values()] == [2 / 3, 1 / 2, 0.0]
    for counts in compression.packed.ownership.counts().values():
        assert abs(counts[1] - sum(counts) / 3) <= 1
        assert abs(counts[2] - sum(counts) / 3) <= 1
        assert counts[3] <= sum(counts) / 3 + 1


def test_a_share_that_is_missing_is_named_before_training(trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"`share` must be one number, or one for each task, but got 2 and none for t"):
        trainer(TaskStream(1), packnet(share=[0.5, 0.5])).fit(net(), datamodule=data_of())
    assert not RETRAINED


def test_an_owner_takes_one_byte_a_weight(trainer: Make) -> None:
    compression = packnet()
    trainer(TaskStream(1), compression, precision="64-true").fit(net(), datamodule=data_of())
    owners = compression.state_dict()["packed"]["owners"]
    assert all(
        one.dtype == torch.uint8 and one.shape == Net().get_parameter(name).shape for name, one in owners.items()
    )


# --- Retraining is a fit in miniature ---------------------------------------------------------------------------------


class Scheduled(Net):
    """Steps a schedule sized by the Trainer, notes rates, keeps counters and metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.totals: list[int] = []

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        self.totals.append(total)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        RATES.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


RATES: list[float] = []


def test_retraining_has_optimizers_and_schedules_of_its_own(trainer: Make) -> None:
    RATES.clear()
    L.seed_everything(3, verbose=False)
    module = Scheduled().double()
    trainer(TaskStream(2), packnet(retrain_epochs=3), precision="64-true", accumulate_grad_batches=2).fit(
        module, datamodule=data_of(16, 16, 16)
    )
    expected = [0.1 * (1 - step / 4) for step in range(4) for _ in range(2)]  # 2 epochs of 4 batches, 2 to a step
    again = [0.1 * (1 - step / 6) for step in range(6) for _ in range(2)]
    assert_close(torch.tensor(RATES), torch.tensor((expected + again) * 3))


class Unsized(IterableDataset[Any]):
    """24 samples, which it does not say."""

    def __iter__(self) -> Iterator[Any]:
        return iter(double_tasks()[0].train)


class Stepwise(Net):
    """Lowers its rate after every epoch, and notes rates and steps, and how many it is told there will be."""

    def configure_optimizers(self) -> Any:
        TOTALS.append(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        RATES.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        RATES.append(0.0)


TOTALS: list[float] = []


@pytest.mark.parametrize("limit", [1.0, 9], ids="limit_train_batches={}".format)
def test_data_without_a_length_have_an_end_in_retraining_too(trainer: Make, limit: Any) -> None:
    """Epochs of 6 batches, 4 to a step: what is left over steps at the end, and the schedule goes on."""
    RATES.clear()
    TOTALS.clear()
    module = Stepwise().double()
    runner = trainer(
        packnet(retrain_epochs=2),
        max_epochs=2,
        accumulate_grad_batches=4,
        limit_train_batches=limit,
        precision="64-true",
    )
    runner.fit(module, DataLoader(Unsized(), 4))
    epoch = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 0])
    assert_close(torch.tensor(RATES[-16:]), torch.cat([0.1 * epoch, 0.01 * epoch]))
    assert len(TOTALS) == 2
    assert TOTALS[0] == TOTALS[1]


def test_data_without_a_length_have_a_bar_without_a_total(trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(packnet(), TQDMProgressBar(1), max_epochs=1, precision="64-true", enable_progress_bar=True).fit(
        net(), DataLoader(Unsized(), 4)
    )
    printed = capsys.readouterr().out
    assert "Compressing task 0 by 0.500: 0it" in printed
    assert str(sys.maxsize) not in printed


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> Any:
        return torch.rand(4).double(), 0


def test_workers_draw_something_else_in_each_epoch_of_retraining(trainer: Make) -> None:
    trainer(packnet(retrain_epochs=2), max_epochs=1, precision="64-true").fit(
        net(), DataLoader(Noise(), 4, num_workers=1)
    )
    assert not torch.equal(RETRAINED[0][0][0], RETRAINED[1][0][0])


class Manual(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        one.zero_grad()
        two.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        one.step()
        two.step()

    def configure_optimizers(self) -> Any:
        late = [*self.second.parameters(), *self.head.parameters()]
        early = [*self.first.parameters(), *self.norm.parameters()]
        return torch.optim.SGD(early, lr=0.05, momentum=0.9), torch.optim.AdamW(late, lr=0.01)


def test_manual_optimization_is_served(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Manual().double(), packnet()
    watch = Watch(compression)
    runner = trainer(TaskStream(2), compression, watch, precision="64-true")
    runner.fit(module, datamodule=data_of(16, 16, 16))
    assert runner.global_step == 3 * 2 * 4 * 2
    assert all(int((one > 0).sum()) for one in compression.packed.ownership.owners.values())


def test_a_sampler_of_the_users_own_is_used(trainer: Make) -> None:
    data = double_tasks()[0].train
    weights = [1.0 if number < 3 else 0.0 for number in range(len(data))]
    loader = DataLoader(data, 4, sampler=WeightedRandomSampler(weights, 12))
    trainer(packnet(), max_epochs=1, precision="64-true").fit(net(), loader)
    numbers = {round(float(x)) for batch in RETRAINED[0] for x in batch[0][:, 0] * 1000}
    assert len(RETRAINED[0]) == 3
    assert numbers <= {0, 1, 2}


class Doubling(DataLoader[Any]):
    """Changes batches as it serves them, as loaders that mix or augment do."""

    def __iter__(self) -> Any:
        return ([2 * x, y] for x, y in super().__iter__())


def test_a_loader_that_serves_in_a_way_of_its_own_is_used(trainer: Make) -> None:
    data = double_tasks()[0].train
    trainer(packnet(), max_epochs=1, precision="64-true").fit(net(), Doubling(data, len(data)))
    assert torch.equal(RETRAINED[0][0][0], 2 * data.tensors[0])


def test_one_validation_loader_may_have_a_name(trainer: Make) -> None:
    task, compression = double_tasks()[0], searched()
    loaders: Any = {"held out": DataLoader(task.val, 4)}
    trainer(compression, max_epochs=1, precision="64-true").fit(net(), DataLoader(task.train, 4), loaders)
    assert len(compression.trials(0)) == 3


def test_an_order_that_is_not_shuffled_stays(trainer: Make) -> None:
    loader = DataLoader(double_tasks()[0].train, 5, drop_last=True)
    trainer(packnet(), max_epochs=1, precision="64-true").fit(net(), loader)
    assert [round(float(x)) for batch in RETRAINED[0] for x in batch[0][:, 0] * 1000] == list(range(20))


@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (0.5, 3)], ids=str)
def test_the_trainers_limit_of_batches_is_kept(trainer: Make, limit: Any, expected: int) -> None:
    module = net()
    steps = []
    module.on_train_batch_end = lambda *args: steps.append(0)
    trainer(packnet(), max_epochs=1, limit_train_batches=limit, precision="64-true").fit(
        module, DataLoader(double_tasks()[0].train, 4)
    )
    assert len(steps) == 2 * expected


# --- Searching disturbs nothing ---------------------------------------------------------------------------------------


def test_a_search_ends_as_if_its_share_had_been_given(trainer: Make) -> None:
    """Trials leave no trace: weights, norms, optimizers, counts, random state."""
    ends = []
    for compression in (searched(), None):
        L.seed_everything(3, verbose=False)
        module = Net(OPTIMIZERS["Adam"], dropout=0.3).double()
        if compression is None:
            compression = packnet(share=ends[0][1].packed.found[0].shares[0])
        runner = trainer(TaskStream(2, reset_optimizer=False), compression, precision="64-true")
        runner.fit(module, datamodule=ContinualDataModule(double_tasks()[:1], batch_size=4))
        ends.append((module.state_dict(), compression, torch.get_rng_state(), runner.global_step, runner.current_epoch))
        moments = [value for state in runner.optimizers[0].state.values() for value in state.values()]
        ends[-1] += (moments,)
    (weights, search, *one), (expected, _, *two) = ends
    assert len(search.trials(0)) == 3
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert torch.equal(one[0], two[0])
    assert one[1:3] == two[1:3] == [12, 2]
    assert one[3]
    assert all(torch.equal(a, b) for a, b in zip(one[3], two[3], strict=True))


class Replacing(Net):
    """Keeps a running mean of its inputs in a buffer, which every step replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return super().training_step(batch, batch_idx)


class Ready(Net):
    """Makes its optimizer once, and returns it whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.double().parameters(), lr=0.05, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)]


@pytest.mark.parametrize("kind", [Replacing, Ready])
def test_trials_leave_no_trace_in_what_a_module_makes_itself(trainer: Make, kind: Any) -> None:
    ends: list[Any] = []
    for share in (None, 0):
        L.seed_everything(3, verbose=False)
        module = kind().double()
        compression = searched() if share is None else packnet(share=ends[0][1].packed.found[0].share)
        trainer(compression, max_epochs=2, precision="64-true").fit(module, datamodule=data_of())
        ends.append((module.state_dict(), compression))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    if kind is Ready:
        assert module.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)  # of two epochs, not of retraining
        assert module.optimizer.state


class Counting(Net):
    """Keeps a counter, a metric and what it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.accuracy = MulticlassAccuracy(num_classes=6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.accuracy.update(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)


def test_retraining_is_not_counted_measured_or_logged(trainer: Make, tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    module, logger = Counting().double(), CSVLogger(tmp_path)
    data = ContinualDataModule(double_tasks()[:1], batch_size=4)
    trainer(TaskStream(2), searched(), precision="64-true", logger=logger, log_every_n_steps=1).fit(
        module, datamodule=data
    )
    assert len(RETRAINED) == 4
    assert module.steps == 12
    assert int(sum(getattr(module.accuracy, name) for name in ("tp", "fn")).sum()) == 48
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        assert sum(bool(row["train_loss"]) for row in csv.DictReader(file)) == 12
    assert "log" not in vars(module)


def test_the_choice_is_the_largest_share_that_keeps_the_score(trainer: Make) -> None:
    module, compression = net(), searched(0.3, trials=4)
    trainer(TaskStream(3), compression, precision="64-true").fit(module, datamodule=data_of())
    for task in range(3):
        found = compression.packed.found[task]
        good = [one.shares[0] for one in found.trials if one.score >= found.before - 0.3]
        assert len(found.trials) == 4
        assert found.shares[0] == max(good)
        assert found.after == next(one.score for one in found.trials if one.shares == found.shares)


def test_a_loss_can_be_searched_by(trainer: Make) -> None:
    compression = searched(0.3, monitor="val_loss", higher_is_better=False)
    trainer(TaskStream(2), compression, precision="64-true").fit(net(), datamodule=data_of())
    for found in compression.packed.found.values():
        good = [one.shares[0] for one in found.trials if one.score <= found.before + 0.3]
        assert found.shares[0] == max(good)


def test_blocks_have_shares_of_their_own(trainer: Make) -> None:
    compression = searched(blocks=2, trials=4)
    trainer(TaskStream(2), compression, precision="64-true").fit(
        net(), datamodule=ContinualDataModule(double_tasks()[:1], batch_size=4)
    )
    found = compression.packed.found[0]
    assert len({one.shares[0] - one.shares[1] for one in found.trials}) > 1
    owners = compression.packed.ownership.owners
    for name, share in zip(("first.weight", "second.weight"), found.shares, strict=True):
        assert int((owners[name] == 0).sum()) == min(round(share * owners[name].numel()), owners[name].numel() - 1)


def test_the_floor_leaves_room_for_the_tasks_to_come(trainer: Make) -> None:
    compression = searched(1.0, objective="scalarised", weight=0.0, num_tasks=3, floor=0.3, trials=2)
    left = []

    class Note(L.Callback):
        def on_task_end(self, *args: Any) -> None:
            left.append(compression.packed.free_share)

    trainer(TaskStream(1), compression, Note(), precision="64-true").fit(net(), datamodule=data_of())
    assert left[0] >= 0.6 - 0.01
    assert left[1] >= 0.3 - 0.01
    lows = [min(one.shares[0] for one in compression.trials(task)) for task in range(2)]
    assert lows[0] >= 0.6
    assert lows[1] >= 0.3 / left[0] - 0.01


class Broken(Net):
    """Its score is NaN while most of the network is pruned."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sparsity = float((self.second.weight == 0).float().mean())
        self.log("val_acc", math.nan if sparsity > 0.6 else 0.9)


def test_a_trial_whose_score_is_nan_is_told_and_not_chosen(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    module, compression = Broken().double(), searched(0.01, trials=5)
    trainer(TaskStream(1), compression, precision="64-true").fit(
        module, datamodule=ContinualDataModule(double_tasks()[:1], batch_size=4)
    )
    scores = [one.score for one in compression.trials(0)]
    assert len(scores) == 5
    assert any(math.isnan(score) for score in scores)
    assert compression.packed.found[0].after == pytest.approx(0.9)
    assert compression.packed.found[0].share <= 0.62


class Ruined(Net):
    """Its score is lost with the first weight that is pruned."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.9 if bool((self.second.weight != 0).all()) else 0.1)


def test_where_no_share_keeps_the_score_it_warns(trainer: Make) -> None:
    L.seed_everything(3, verbose=False)
    with pytest.warns(UserWarning, match=r"No share kept `tolerance=0.01` in task 0: val_acc was 0.9 before, and 0.1"):
        trainer(TaskStream(1), searched(0.01), precision="64-true").fit(
            Ruined().double(), datamodule=ContinualDataModule(double_tasks()[:1], batch_size=4)
        )


# --- Broken off and resumed -------------------------------------------------------------------------------------------


class BrokenOffError(RuntimeError):
    pass


def stream_run(trainer: Make, folder: Path, *, stop_at: int | None = None, **options: Any) -> Any:
    """Train three tasks; break off in the validation after so many retrainings."""
    fit = options.pop("fit", {})
    compression = searched(0.5, trials=4, **options)
    module = net(OPTIMIZERS["Adam"], dropout=0.2)
    if stop_at is not None:

        def interrupt() -> None:
            if len(RETRAINED) == stop_at:
                raise BrokenOffError

        module.on_validation_start = interrupt
    callbacks = [TaskStream(2), compression]
    if stop_at is not None:
        callbacks.append(OnExceptionCheckpoint(folder, "broken"))
    runner = trainer(*callbacks, precision="64-true", enable_checkpointing=stop_at is not None)
    with suppress(BrokenOffError):
        runner.fit(module, datamodule=data_of(), **fit)
    return module, compression


@pytest.mark.parametrize("stop_at", [5, 7], ids="retraining {}".format)
def test_broken_off_in_a_search_it_goes_on_with_the_trials_it_has(trainer: Make, tmp_path: Path, stop_at: int) -> None:
    whole, expected = stream_run(trainer, tmp_path)
    retrained = len(RETRAINED)
    RETRAINED.clear()
    stream_run(trainer, tmp_path, stop_at=stop_at)
    known = torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"]["AdaptiveCompressionCallback"]
    assert len(known["search"]["trials"]) == (stop_at - 1) % 5
    RETRAINED.clear()
    again, compression = stream_run(
        trainer, tmp_path, fit={"ckpt_path": tmp_path / "broken.ckpt", "weights_only": True}
    )
    assert len(RETRAINED) == retrained - (stop_at - 1)
    for task in range(3):
        assert compression.trials(task) == expected.trials(task)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_task_that_begins_anew_is_searched_anew(trainer: Make) -> None:
    """The trials of a fit that was broken off are of other weights."""
    module, compression = net(), searched(0.5)

    def interrupt() -> None:
        if len(RETRAINED) == 2:
            raise BrokenOffError

    module.on_validation_start = interrupt
    with suppress(BrokenOffError):
        trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data_of())
    assert len(compression.state_dict()["search"]["trials"]) == 1
    RETRAINED.clear()
    module.on_validation_start = lambda: None
    trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data_of())
    assert len(RETRAINED) == 4


def test_a_callback_that_has_ended_a_task_can_go_back_into_it(trainer: Make, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    module, compression, ends = net(), packnet(), []
    for path in (None, tmp_path / "within.ckpt"):
        trainer(compression, Save(), max_epochs=1, precision="64-true").fit(
            module, datamodule=data_of(), ckpt_path=path, weights_only=True
        )
        ends.append(copy.deepcopy(module.state_dict()))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_killed_in_a_search_it_has_the_trials_from_storage(trainer: Make, tmp_path: Path) -> None:
    """As after a kill: no checkpoint of the search, only one from before it."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "before.ckpt")

    storage = str(tmp_path / "searches.db")
    whole, expected = stream_run(trainer, tmp_path)
    retrained = len(RETRAINED)
    RETRAINED.clear()
    save = Save()
    stream_run(lambda *callbacks, **options: trainer(*callbacks, save, **options), tmp_path, stop_at=3, storage=storage)
    RETRAINED.clear()
    again, compression = stream_run(
        trainer, tmp_path, storage=storage, fit={"ckpt_path": tmp_path / "before.ckpt", "weights_only": True}
    )
    assert len(RETRAINED) == retrained - 2
    for task in range(3):
        assert compression.trials(task) == expected.trials(task)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


class Constant(Net):
    """Whatever it learns, its score is the same."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.5)


@pytest.mark.parametrize("other", [False, True], ids=["the same weights", "other weights"])
def test_storage_gives_its_trials_to_the_same_weights_only(trainer: Make, tmp_path: Path, other: bool) -> None:
    for again in (False, True):
        L.seed_everything(3 + (again and other), verbose=False)
        module, compression = Constant().double(), searched(storage=str(tmp_path / "searches.db"))
        RETRAINED.clear()
        trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data_of())
        assert len(RETRAINED) == (1 if again and not other else 4)
        assert len(compression.trials(0)) == 3


def test_a_folder_for_storage_that_is_not_there_is_named_before_training(trainer: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`storage` must be a file in a folder that is there, but got '.*nowhere"):
        trainer(searched(storage=str(tmp_path / "nowhere" / "searches.db"))).fit(net(), datamodule=data_of())


def test_a_signal_to_terminate_is_heard_between_two_trials(trainer: Make, tmp_path: Path) -> None:
    compression, module = searched(0.1, trials=4), net()

    class Terminate(L.Callback):
        def on_task_end(self, trainer: Any, *args: Any) -> None:
            trainer._signal_connector.received_sigterm = True

    with pytest.raises(SystemExit):
        trainer(TaskStream(1), Terminate(), compression, precision="64-true").fit(module, datamodule=data_of())
    assert len(RETRAINED) == 1
    assert len(compression.state_dict()["search"]["trials"]) == 1


# --- Processes, cost, progress, loggers -------------------------------------------------------------------------------


def test_two_processes_search_together_and_equal_one(trainer: Make, tmp_path: Path) -> None:
    class Keep(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trials = [one for task in range(2) for one in compression.trials(task)]
            shares = torch.tensor([one.shares[0] for one in trials])
            torch.save((pl_module.state_dict(), shares), tmp_path / f"{trainer.world_size}-{trainer.global_rank}")

    for devices in (1, 2):
        L.seed_everything(3, verbose=False)
        module = Plain().double()
        compression = searched(0.1, trials=3)
        options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        data = ContinualDataModule(double_tasks(24, 16)[:2], batch_size=8 // devices)
        trainer(TaskStream(2), compression, Keep(), precision="64-true", **options).fit(module, datamodule=data)
    (one, shares), (first, first_shares), (second, second_shares) = (
        torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first_shares, second_shares)
    assert_close(first_shares, shares)
    for name in one:
        assert_close(first[name], one[name])
        assert torch.equal(first[name], second[name])


def test_two_processes_end_with_the_same_norms(trainer: Make, tmp_path: Path) -> None:
    class Keep(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / str(trainer.global_rank))

    module = Single().double()
    data = ContinualDataModule([Task(double_tasks()[0].train)], batch_size=4)
    trainer(packnet(), Keep(), precision="64-true", devices=2, strategy="ddp_fork", max_epochs=1).fit(
        module, datamodule=data
    )
    first, second = (torch.load(tmp_path / name) for name in "01")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).double().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_a_trial_shows_its_share_and_the_best_so_far(trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(
        TaskStream(1), searched(1.0), TQDMProgressBar(refresh_rate=1), precision="64-true", enable_progress_bar=True
    ).fit(net(), datamodule=data_of())
    printed = capsys.readouterr().out
    assert "Task 0, trial 1 of 3: share 0.500" in printed
    assert "trial 2 of 3: share 0." in printed
    assert "best so far 0.500" in printed


def test_what_was_found_is_logged_and_drawn(trainer: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compression, logger = searched(), CSVLogger(tmp_path)
    trainer(TaskStream(1), compression, precision="64-true", logger=logger).fit(net(), datamodule=data_of())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"compression/share", "compression/score", "compression/free"} <= set(header)
    assert compression.plot_search(1).axes[0].get_xlabel() == "share given back"
    assert len(compression.plot_capacity().axes[0].patches) == 3 * 4
    assert len(compression.plot_scores().axes[0].patches) == 2 * 3


class Wide(Plain):
    """Notes how many bytes of tensors there are in its steps."""

    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6)
        )

    def on_before_zero_grad(self, optimizer: Any) -> None:
        BYTES.append(0)
        if not 10 < len(BYTES) <= 18:
            return
        alive = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.numel() > 10_000]
        grads = [one.grad for one in self.parameters() if one.grad is not None]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in [*alive, *grads]}
        BYTES[-1] = sum(storages.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


BYTES: list[int] = []


def test_a_trial_takes_one_copy_of_the_weights_and_a_byte_each(trainer: Make) -> None:
    BYTES.clear()
    module = Wide()
    data = ContinualDataModule(make_tasks((8, 8)), batch_size=4)
    trainer(TaskStream(2), searched(1.0, trials=2)).fit(module, datamodule=data)
    weights = 400 * 400 * 4
    training, trials = BYTES[10:14], BYTES[14:18]  # of the second task; before it 4 steps and 3 retrainings of 2
    assert len(BYTES) == 20
    assert max(trials) - max(training) <= (1 + 1 / 4 + 0.05) * weights


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, r"`tolerance` must be at least 0 and finite, but got -0.1"),
        ({"tolerance": math.nan}, r"`tolerance` must be at least 0 and finite, but got nan"),
        ({"weight": -1.0}, r"`weight` must be at least 0"),
        ({"trials": 0}, r"`trials` must lie in 1, 2, \.\.\., but got 0"),
        ({"retrain_epochs": 0}, r"`retrain_epochs` must lie in 1"),
        ({"blocks": 6}, r"`blocks` must lie in 1\.\.5, but got 6"),
        ({"num_tasks": 256}, r"`num_tasks` must lie in 1\.\.255, but got 256"),
        ({"objective": "both"}, r"`objective` must be 'constrained' or 'scalarised', but got 'both'"),
        ({"restart": "one"}, r"`restart` must be 'zero' or 'drawn', but got 'one'"),
        ({"norms": "free"}, r"`norms` must be 'hold' or 'per-task', but got 'free'"),
        ({"share": 1.0}, r"`share` must lie in \[0, 1\), but got 1.0"),
        ({"share": [0.5, -0.1]}, r"`share` must lie in \[0, 1\), but got \[0.5, -0.1\]"),
        ({"monitor": None}, r"`monitor` must name the score to search by, but got None"),
        ({"floor": 0.1}, r"`floor` must lie in \[0, 1 / `num_tasks`\], but got 0.1 with `num_tasks=None`"),
        ({"floor": 0.3, "num_tasks": 4}, r"`floor` must lie in \[0, 1 / `num_tasks`\], but got 0.3"),
        ({"floor": -0.1, "num_tasks": 4}, r"`floor` must lie in"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveCompressionCallback(**{"monitor": "val_acc", **options})


def test_a_floor_that_a_fixed_share_cannot_keep_is_named_before_training(trainer: Make) -> None:
    module = net()
    with pytest.raises(ValueError, match=r"`share=0.2` must be at least 0.400 in task 0.*2 tasks to come"):
        trainer(TaskStream(1), packnet(share=0.2, num_tasks=3, floor=0.2)).fit(module, datamodule=data_of())
    assert module.optimizers_made == 1
    assert not RETRAINED


def test_without_validation_data_it_says_what_to_do(trainer: Make) -> None:
    data = ContinualDataModule(make_tasks(val=False), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"needs one loader of validation data for task 0.*`share`"):
        trainer(TaskStream(1), searched()).fit(net(), datamodule=data)


@pytest.mark.parametrize("other", [PruningCallback(), CLNPCallback()], ids=lambda one: type(one).__name__)
def test_another_callback_that_prunes_or_holds_is_refused(trainer: Make, other: L.Callback) -> None:
    with pytest.raises(MisconfigurationException, match=rf"must alone say .* \['{type(other).__name__}'\], too"):
        trainer(TaskStream(1), packnet(), other).fit(net(), datamodule=data_of())


def test_an_unknown_score_is_named_before_training(trainer: Make) -> None:
    with pytest.raises(MisconfigurationException, match=r"found no such metric; `validation_step` logged \['val_acc'"):
        trainer(TaskStream(1), searched(monitor="val_f1"), precision="64-true").fit(net(), datamodule=data_of())


def test_a_pattern_that_names_nothing_is_named(trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"`parameters` has the pattern 'third\.\*', which names none of"):
        trainer(TaskStream(1), packnet(parameters=["third.*"])).fit(net(), datamodule=data_of())
    with pytest.raises(ValueError, match=r"`head` has the pattern 'third\.\*', which names none of"):
        trainer(TaskStream(1), packnet(head=["third.*"])).fit(net(), datamodule=data_of())


def test_a_module_with_nothing_to_share_is_named_before_training(trainer: Make) -> None:
    module = net()
    for frozen in (module.first, module.norm, module.second):
        frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`parameters` must name weights that are trained.*Train more than the heads"):
        trainer(TaskStream(1), packnet()).fit(module, datamodule=data_of())


def test_what_is_frozen_after_the_first_task_stays(trainer: Make) -> None:
    module, compression, data = net(), packnet(), data_of()
    watch = Watch(compression)
    for task in range(2):
        data.current_task = task
        trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data)
        watch.on_task_end(cast(Any, None), module, task)
        for frozen in (module.first, module.norm, module.second):
            frozen.requires_grad_(False)


def test_a_task_that_was_learnt_is_not_trained_again(trainer: Make) -> None:
    compression, module, data = packnet(), net(), data_of()
    trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data)
    with (
        pytest.warns(UserWarning, match="has ended task 0 before"),
        pytest.raises(ValueError, match=r"Task 0 must come after the tasks learnt, \[0\]"),
    ):
        trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data)


def test_a_task_that_was_not_learnt_cannot_be_seen() -> None:
    with (
        pytest.raises(ValueError, match=r"`task` must be one of the tasks learnt, \[\], but got 0"),
        packnet().as_task(net(), 0),
    ):
        pass


def test_several_training_loaders_are_refused(trainer: Make) -> None:
    loaders = {name: DataLoader(double_tasks()[0].train, 4) for name in "ab"}
    with pytest.raises(MisconfigurationException, match=r"One `torch\.utils\.data\.DataLoader` is needed"):
        trainer(packnet(), max_epochs=1).fit(net(), loaders)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(iter(double_tasks()[0].train))


def test_retraining_on_data_without_an_end_is_refused(trainer: Make) -> None:
    with pytest.raises(MisconfigurationException, match=r"retrains for whole epochs.*Pass `limit_train_batches=`"):
        trainer(packnet(), max_steps=4, max_epochs=-1).fit(net(), DataLoader(Endless(), 4))
    module, compression = net(), packnet()
    trainer(compression, max_steps=4, max_epochs=-1, limit_train_batches=3, precision="64-true").fit(
        module, DataLoader(Endless(), 4)
    )
    assert compression.tasks == [0]


def test_a_score_before_that_is_nan_is_named(trainer: Make) -> None:
    module = net()
    module.validation_step = lambda batch, batch_idx: module.log("val_acc", math.nan)
    with pytest.raises(ValueError, match=r"`before` must be finite, but got nan"):
        trainer(searched(), max_epochs=1, precision="64-true").fit(module, datamodule=data_of())


def test_with_no_free_weights_left_it_warns(trainer: Make) -> None:
    with pytest.warns(UserWarning, match="has no free weights for task 1"):
        trainer(TaskStream(1), packnet(share=0.0), precision="64-true").fit(
            net(), datamodule=ContinualDataModule(double_tasks()[:2], batch_size=4)
        )


def test_without_free_weights_nothing_is_searched(trainer: Make) -> None:
    module, compression, data = net(), packnet(share=0.0), data_of()
    trainer(compression, max_epochs=1, precision="64-true").fit(module, datamodule=data)
    again, data.current_task = searched(), 1
    again.load_state_dict(compression.state_dict())
    RETRAINED.clear()
    with pytest.warns(UserWarning, match="has no free weights for task 1"):
        trainer(again, max_epochs=1, precision="64-true").fit(module, datamodule=data)
    assert again.trials(1) == []
    assert len(RETRAINED) == 1
    assert again.packed.found[1].after is not None
