"""What we know of Lightning's private parts: wrapped methods, random state, scoring in mid-fit, progress, processes."""

from __future__ import annotations

import copy
import functools
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy
import pytest
import torch
from conftest import Classifier, make_tasks
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_continual import _host
from lightning_continual.constraints import Pin
from lightning_continual.data import ContinualDataModule
from lightning_continual.stream import TaskStream

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

# --- Wrapped methods --------------------------------------------------------------------------------------------------


class Owner:
    def speak(self, word: str, end: str = ".") -> str:
        """Say it."""
        return word + end


def saying(before: str, after: str = "") -> Callable[..., str]:
    return lambda inner, *args, **kwargs: before + inner(*args, **kwargs) + after


def test_layers_stand_around_each_other_in_the_order_of_wrapping() -> None:
    owner = Owner()
    _host.wrap_method(owner, "speak", "first", saying("(", ")"))
    _host.wrap_method(owner, "speak", "second", saying("[", "]"))
    assert owner.speak("yes", end="!") == "[(yes!)]"
    _host.unwrap_methods("first")
    assert owner.speak("yes") == "[yes.]"
    _host.unwrap_methods("second")


def test_wrapping_again_under_the_same_key_replaces_the_layer_in_its_place() -> None:
    owner = Owner()
    _host.wrap_method(owner, "speak", "first", saying("(", ")"))
    _host.wrap_method(owner, "speak", "second", saying("[", "]"))
    _host.wrap_method(owner, "speak", "first", saying("{", "}"))
    assert owner.speak("yes") == "[{yes.}]"
    _host.unwrap_methods("first")
    _host.unwrap_methods("second")


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")], ids=str)
def test_after_unwrapping_every_key_nothing_of_ours_is_left(order: tuple[str, str]) -> None:
    owner = Owner()
    _host.wrap_method(owner, "speak", "first", saying("("))
    _host.wrap_method(owner, "speak", "second", saying("["))
    for key in (*order, *order, "unknown"):
        _host.unwrap_methods(key)
    assert vars(owner) == {}
    assert owner.speak("yes") == "yes."
    assert owner not in _host.methods._wrapped


def test_a_method_that_the_user_put_on_the_instance_is_put_back() -> None:
    def own(word: str) -> str:
        return word.upper()

    owner = Owner()
    owner.speak = own  # type: ignore[method-assign]
    _host.wrap_method(owner, "speak", "key", saying("("))
    assert owner.speak("yes") == "(YES"
    _host.unwrap_methods("key")
    assert vars(owner) == {"speak": own}


def test_a_method_that_was_replaced_meanwhile_stays() -> None:
    def own(word: str) -> str:
        return word.upper()

    owner = Owner()
    _host.wrap_method(owner, "speak", "key", saying("("))
    owner.speak = own  # type: ignore[method-assign]
    _host.unwrap_methods("key")
    assert vars(owner) == {"speak": own}


def test_what_somebody_else_wrapped_around_ours_stays() -> None:
    owner = Owner()
    _host.wrap_method(owner, "speak", "key", saying("("))
    inner = owner.speak

    @functools.wraps(inner)
    def theirs(word: str) -> str:
        return f"<{inner(word)}>"

    owner.speak = theirs  # type: ignore[method-assign]
    _host.unwrap_methods("key")
    assert owner.speak("yes") == "<yes.>"
    _host.wrap_method(owner, "speak", "key", saying("[", "]"))
    assert owner.speak("yes") == "[<yes.>]"
    _host.unwrap_methods("key")
    assert vars(owner) == {"speak": theirs}


def test_owners_are_told_apart_and_their_class_is_not_touched() -> None:
    one, other = Owner(), Owner()
    _host.wrap_method(one, "speak", "key", saying("("))
    assert (one.speak("yes"), other.speak("yes"), Owner().speak("yes")) == ("(yes.", "yes.", "yes.")
    assert one.speak.__doc__ == "Say it."
    _host.unwrap_methods("key")


def test_lightning_still_knows_which_hooks_a_user_has_overridden() -> None:
    class Hooked(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    plain, hooked = Classifier(), Hooked()
    for module in (plain, hooked):
        _host.wrap_method(module, "on_before_batch_transfer", "key", lambda inner, *args: inner(*args))
    assert not is_overridden("on_before_batch_transfer", plain)
    assert is_overridden("on_before_batch_transfer", hooked)
    _host.unwrap_methods("key")


def test_layers_rest_while_we_observe() -> None:
    module = Classifier()
    _host.wrap_method(module, "forward", "key", lambda inner, x: inner(x) + 100)
    with _host.observing(module):
        assert module.forward(torch.zeros(1, 4)).max() < 50
        with _host.observing(module):
            pass
        assert module.forward(torch.zeros(1, 4)).max() < 50
    assert module.forward(torch.zeros(1, 4)).min() > 50
    _host.unwrap_methods("key")


def test_a_training_step_that_takes_the_iterator_is_refused(tmp_path: Path) -> None:
    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    _host.require_batch_hooks(Classifier(), "RehearsalCallback")
    with pytest.raises(MisconfigurationException, match=r"`RehearsalCallback` changes batches.*batch, batch_idx"):
        _host.require_batch_hooks(Iterating(), "RehearsalCallback")


# --- Random state -----------------------------------------------------------------------------------------------------


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.standard_normal(),
        torch.rand(1).item(),
    ]


@pytest.mark.parametrize("drawn", [0, 1, 3], ids="drawn={}".format)  # odd: a second Gaussian number lies in store
def test_random_state_goes_through_a_checkpoint_to_the_bit(tmp_path: Path, drawn: int) -> None:
    for _ in range(drawn):
        draws()
    torch.save(_host.random_state(), tmp_path / "state.pt")
    expected = [draws() for _ in range(700)]  # more than numpy and python keep in store
    draws()
    _host.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draws() for _ in range(700)] == expected


def test_reading_the_random_state_draws_nothing() -> None:
    L.seed_everything(1, verbose=False)
    expected = draws()
    L.seed_everything(1, verbose=False)
    _host.random_state()
    assert draws() == expected


# --- Scoring ----------------------------------------------------------------------------------------------------------


class Logging(Classifier):
    """Logs in one way each; `log_here` gets logits and labels, `log_at_end` nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log_here(self(x), y)

    def log_here(self, logits: Tensor, y: Tensor) -> None:
        raise NotImplementedError


def correct(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).float()


class MeanOfTensors(Logging):
    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.log("loss", nn.functional.cross_entropy(logits, y), prog_bar=True)
        self.log("acc", correct(logits, y).mean(), on_step=True, on_epoch=True)


class Dictionary(Logging):
    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.log_dict({"acc": correct(logits, y).mean(), "mean": logits.mean()})


class OtherReductions(Logging):
    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.log("sum", correct(logits, y).sum(), reduce_fx="sum")
        self.log("max", logits.max(), reduce_fx="max")
        self.log("min", logits.min(), reduce_fx=torch.min)
        self.log("step", logits.min(), on_step=True, on_epoch=False)


class GivenBatchSize(Logging):
    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.log("acc", correct(logits, y).mean(), batch_size=1)


class Metrics(Logging):
    def __init__(self) -> None:
        super().__init__()
        self.acc = MulticlassAccuracy(6, average="micro")
        self.mean = MeanMetric()

    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.acc(logits, y)
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.mean.update(logits)
        self.log("mean", self.mean)


class Collection(Logging):
    def __init__(self) -> None:
        super().__init__()
        self.all = MetricCollection(
            [MulticlassAccuracy(6), MulticlassPrecision(6, average="micro"), MulticlassRecall(6)], prefix="val_"
        )

    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.all.update(logits, y)
        self.log_dict(self.all)


class AtEpochEnd(Logging):
    def __init__(self) -> None:
        super().__init__()
        self.values = CatMetric()

    def log_here(self, logits: Tensor, y: Tensor) -> None:
        self.values.update(logits[:, 0])

    def on_validation_epoch_end(self) -> None:
        self.log("median", self.values.compute().median())
        self.values.reset()


class WithoutBatchIndex(Logging):
    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        self.log("acc", correct(self(batch[0]), batch[1]).mean())


class AnyArguments(Logging):
    def validation_step(self, *args: Any) -> None:  # type: ignore[override]
        (x, y), batch_idx = args
        self.log("acc", correct(self(x), y).mean() + batch_idx)


class Options(Logging):
    def validation_step(self, batch: Any, **options: Any) -> None:  # type: ignore[override]
        self.log("acc", correct(self(batch[0]), batch[1]).mean())


class MoreLoaders(Logging):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("acc", correct(self(batch[0]), batch[1]).mean() + 10 * dataloader_idx)


class OwnHooks(Logging):
    """Puts its own weights in place for validation, and changes batches on their way to the device."""

    def on_validation_start(self) -> None:
        self.shift = 2.0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]} if self.trainer.validating else batch

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self(batch["x"]).mean() + self.shift)


KINDS = [
    MeanOfTensors,
    Dictionary,
    OtherReductions,
    GivenBatchSize,
    Metrics,
    Collection,
    AtEpochEnd,
    WithoutBatchIndex,
    AnyArguments,
    Options,
    MoreLoaders,
    OwnHooks,
]


def evaluation_loader(number: int = 10, batch_size: int = 4) -> DataLoader[Any]:
    """The last batch is smaller."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(number, 4, generator=generator), torch.randint(0, 6, (number,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class ScoreAtTheEnd(L.Callback):
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.scores: Any = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.scores = _host.score(trainer, evaluation_loader(), **self.options)


def train_loader() -> DataLoader[Any]:
    return DataLoader(make_tasks([12])[0].train, batch_size=4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_scores_are_what_validate_logs_to_all_digits(trainer: Callable[..., L.Trainer], kind: type[Logging]) -> None:
    module, scoring = kind(), ScoreAtTheEnd()
    trainer(scoring, max_epochs=1, limit_val_batches=0).fit(module, train_loader())
    validator = trainer()
    validator.validate(module, evaluation_loader(), verbose=False)
    assert len(scoring.scores) > 0
    assert scoring.scores == {key: float(value) for key, value in validator.callback_metrics.items()}


def test_scoring_stops_at_the_limit_and_ticks_after_every_batch(trainer: Callable[..., L.Trainer]) -> None:
    ticks: list[None] = []
    module, scoring = MeanOfTensors(), ScoreAtTheEnd(limit=2, tick=lambda: ticks.append(None))
    trainer(scoring, max_epochs=1, limit_val_batches=0).fit(module, train_loader())
    validator = trainer(limit_val_batches=2)
    validator.validate(module, evaluation_loader(), verbose=False)
    assert scoring.scores == {key: float(value) for key, value in validator.callback_metrics.items()}
    assert len(ticks) == 2


class Everything(Classifier):
    """A module with everything that scoring could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Dropout(0.5).eval()
        self.shared = MulticlassAccuracy(6, average="micro")  # training and validation both
        self.list = CatMetric()
        self.range = MinMaxMetric(MeanMetric())  # keeps more than its states
        self.all = MetricCollection([SumMetric(), MaxMetric(), MulticlassAccuracy(6)])
        self.groups = MetricCollection([MulticlassRecall(6), MulticlassPrecision(6)])
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("latest", torch.zeros(1))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(self.norm(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            logits = self(batch[0])
        self.shared.update(logits, batch[1])
        self.log("train_acc", self.shared, on_step=False, on_epoch=True)
        self.list.update(batch[0][:, 0])
        self.range.update(batch[0])
        self.groups.update(logits, batch[1])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails and batch_idx == 1:
            raise RuntimeError("the data is broken")
        logits = self(batch[0])
        self.seen += len(logits)
        self.latest = logits.mean().reshape(1)
        self.shared(logits, batch[1])
        self.list.update(logits[:, 0])
        self.range(logits)
        self.range.compute()
        self.groups.update(logits, batch[1])
        self.log("val_shared", self.shared, prog_bar=True)
        self.log("val_steps", logits.mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict(self.groups)
        self.log("noise", torch.rand(()) + random.random() + numpy.random.rand())
        super().validation_step(batch, batch_idx)


def state_of(trainer: L.Trainer, module: Everything) -> dict[str, Any]:
    connector, val_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    metrics = [one for one in module.modules() if type(one).__module__.startswith("torchmetrics")]
    return {
        "modes": [one.training for one in module.modules()],
        "weights": [value.clone() for value in module.state_dict().values()],
        "buffers": [value.clone() for value in module.buffers()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "metrics": copy.deepcopy(
            [{name: value for name, value in vars(one).items() if not callable(value)} for one in metrics]
        ),
        "random": _host.random_state(),
        "logged": [dict(connector._callback_metrics), dict(connector._logged_metrics)],
        "bar": dict(connector._progress_bar_metrics),
        "connector": (connector._current_fx, connector._first_loop_iter, module._current_fx_name),
        "results": copy.deepcopy({key: vars(one) for key, one in trainer._results.items()}),
        "val results": (id(val_loop._results), len(val_loop._results)),
        "stage": trainer.state.stage,
        "grad": torch.is_grad_enabled(),
    }


def assert_identical(found: Any, expected: Any, path: str = "") -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, Tensor):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_identical(found[key], value, f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_identical(one, other, f"{path}.{number}")
    elif not isinstance(expected, nn.Module) and not type(expected).__module__.startswith("lightning"):
        assert found == expected, path


class ScoreEverywhere(L.Callback):
    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.number = 0

    def _score(self, trainer: L.Trainer, pl_module: Everything) -> None:
        before = state_of(trainer, pl_module)
        pl_module.fails = self.fails
        if self.fails:
            with pytest.raises(RuntimeError, match="the data is broken"):
                _host.score(trainer, evaluation_loader())
        else:
            _host.score(trainer, evaluation_loader())
        pl_module.fails = False
        assert_identical(state_of(trainer, pl_module), before)
        self.number += 1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._score(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._score(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._score(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # one on purpose
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("fails", [False, True], ids="fails={}".format)
def test_scoring_leaves_no_trace(trainer: Callable[..., L.Trainer], fails: bool) -> None:
    runs = []
    for scoring in ([], [ScoreEverywhere(fails)]):
        L.seed_everything(5, verbose=False)
        module = Everything()
        fit = trainer(*scoring, max_epochs=2, num_sanity_val_steps=0)  # the first use of every metric is ours
        fit.fit(module, train_loader(), evaluation_loader())
        runs.append((list(module.state_dict().values()), fit.callback_metrics, list(module.list.value)))
    assert scoring[0].number == 1 + 6 + 6 + 2
    assert_identical(runs[1], runs[0])


def test_a_metric_that_is_logged_in_training_too_is_scored_on_its_own(trainer: Callable[..., L.Trainer]) -> None:
    class Shared(Metrics):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.acc.update(self(batch[0]), batch[1])
            self.log("train_acc", self.acc, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module, scoring = Shared(), ScoreAtTheEnd()
    trainer(scoring, max_epochs=1, limit_val_batches=0).fit(module, train_loader())
    validator = trainer()
    validator.validate(module, evaluation_loader(), verbose=False)
    assert scoring.scores == {key: float(value) for key, value in validator.callback_metrics.items()}


# --- Several processes ------------------------------------------------------------------------------------------------


class Sharded(Classifier):
    """Logs in all ways, synchronised or not."""

    def __init__(self, sync_dist: bool) -> None:
        super().__init__()
        self.sync_dist = sync_dist
        self.acc = MulticlassAccuracy(6, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("mean", correct(logits, batch[1]).mean(), sync_dist=self.sync_dist)
        self.log("both", logits.mean(), on_step=True, on_epoch=True, sync_dist=self.sync_dist)
        self.log("sum", logits.sum(), reduce_fx="sum", sync_dist=self.sync_dist)
        self.log("max", logits.max(), reduce_fx="max", sync_dist=self.sync_dist)
        self.log("min", logits.min(), reduce_fx="min", sync_dist=self.sync_dist)
        self.acc.update(logits, batch[1])
        self.log("acc", self.acc)
        if self.trainer.is_global_zero:
            self.log("first", logits.max(), reduce_fx="max", rank_zero_only=True)


@pytest.mark.parametrize("number", [16, 19, 23], ids="samples={}".format)
@pytest.mark.parametrize("sync_dist", [False, True], ids="sync_dist={}".format)
def test_two_processes_score_what_one_does(trainer: Callable[..., L.Trainer], sync_dist: bool, number: int) -> None:
    tasks = make_tasks([number])
    module = Sharded(sync_dist)
    validator = trainer(logger=False)
    validator.validate(module, DataLoader(tasks[0].val, batch_size=2), verbose=False)
    expected = {key: float(value) for key, value in validator.callback_metrics.items()}

    class Check(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            loader = trainer.datamodule.evaluation_dataloader(0, "val")
            scores = _host.score(trainer, loader)
            first = scores.pop("first", None)
            assert (first is not None) == trainer.is_global_zero
            del expected["first"]
            assert scores.keys() == expected.keys()
            for key, value in expected.items():
                assert scores[key] == pytest.approx(value, rel=1e-6), key
            everywhere: list[Any] = [None, None]
            torch.distributed.all_gather_object(everywhere, scores)
            assert everywhere == [scores, scores]

    data = ContinualDataModule(tasks, batch_size=2)
    trainer(Check(), TaskStream(), strategy="ddp_fork", devices=2, limit_train_batches=1, limit_val_batches=0).fit(
        module, datamodule=data
    )


def test_gather_brings_every_processs_value_to_the_first(trainer: Callable[..., L.Trainer]) -> None:
    class Check(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            values = _host.gather({"rank": trainer.global_rank, "value": torch.tensor([trainer.global_rank + 0.5])})
            if trainer.global_rank == 0:
                assert values == [{"rank": 0, "value": torch.tensor([0.5])}, {"rank": 1, "value": torch.tensor([1.5])}]
            else:
                assert values == [{"rank": 1, "value": torch.tensor([1.5])}]

    assert _host.gather(3) == [3]
    fit = trainer(Check(), strategy="ddp_fork", devices=2, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(Classifier(), train_loader())


@pytest.mark.parametrize(
    ("number", "batch_size", "drop_last", "limit"),
    [
        (8, 2, False, 1.0),
        (9, 2, False, 1.0),
        (9, 3, True, 1.0),
        (11, 4, True, 1.0),
        (9, 2, False, 2),
        (1, 2, False, 1.0),
    ],
)
def test_repeated_samples_are_counted_in_the_batch_that_holds_them(
    trainer: Callable[..., L.Trainer], number: int, batch_size: int, drop_last: bool, limit: float
) -> None:
    data = ContinualDataModule(
        make_tasks([number], val=False, test=False), batch_size=batch_size, shuffle=False, drop_last=drop_last
    )

    class Check(L.Callback):
        """Sample 0 comes again at the end, and is known by its first feature."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            again = int((batch[0][:, 0] == 0).sum()) - int(index == 0 and trainer.global_rank == 0)
            assert _host.repeated_samples(trainer) == again

    fit = trainer(Check(), TaskStream(2), strategy="ddp_fork", devices=2, limit_train_batches=limit)
    fit.fit(Classifier(), datamodule=data)


def test_one_process_repeats_nothing(trainer: Callable[..., L.Trainer]) -> None:
    class Check(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            assert _host.repeated_samples(trainer) == 0

    trainer(Check(), max_epochs=1).fit(Classifier(), train_loader())
    trainer(Check(), TaskStream()).fit(Classifier(), datamodule=ContinualDataModule(make_tasks([9]), batch_size=2))


SCRIPT = """
    import sys
    import warnings

    import lightning.pytorch as L
    import torch
    from lightning.pytorch.demos.boring_classes import BoringModel

    from lightning_continual.data import ContinualDataModule
    from lightning_continual.stream import TaskStream
    from lightning_continual.tasks import Task

    warnings.simplefilter("ignore")
    tasks = [Task(torch.randn(8, 32), val=torch.randn(4, 32)) for _ in range(2)]
    trainer = L.Trainer(
        strategy="ddp", devices=2, accelerator="cpu", callbacks=[TaskStream()], max_epochs=-1, barebones=True
    )
    trainer.fit(BoringModel(), datamodule=ContinualDataModule(tasks, batch_size=2))
    assert trainer.global_step == 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_a_script_of_two_processes_ends_well(tmp_path: Path, attempt: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ended = subprocess.run([sys.executable, str(script)], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "terminate called" not in ended.stderr


# --- Progress ---------------------------------------------------------------------------------------------------------


class Working(L.Callback):
    def __init__(self) -> None:
        self.ticked = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with _host.progress(trainer, 3, "Counting sheep") as tick:
            for _ in range(3):
                tick()
                self.ticked += 1


def test_progress_is_a_line_of_its_own_beside_tqdm(
    trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"enable_progress_bar": True, "max_epochs": 2}
    trainer(working := Working(), TQDMProgressBar(), **options).fit(Classifier(), train_loader())
    assert working.ticked == 6
    assert "Counting sheep: " in capsys.readouterr().out


def test_progress_is_a_task_of_the_rich_bar_hidden_when_done(trainer: Callable[..., L.Trainer]) -> None:
    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            shown = trainer.progress_bar_callback.progress.tasks
            ours = [task for task in shown if "sheep" in task.description]
            assert len(ours) == trainer.current_epoch + 1
            assert [(task.completed, task.total, task.visible) for task in ours] == [(3, 3, False)] * len(ours)

    options = {"enable_progress_bar": True, "max_epochs": 2}
    trainer(working := Working(), Look(), RichProgressBar(), **options).fit(Classifier(), train_loader())
    assert working.ticked == 6


def test_progress_is_not_shown_without_a_bar(
    trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    class Disable(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.progress_bar_callback.disable()

    trainer(working := Working(), max_epochs=1).fit(Classifier(), train_loader())
    trainer(working, Disable(), max_epochs=1, enable_progress_bar=True).fit(Classifier(), train_loader())
    assert working.ticked == 6
    assert "sheep" not in "".join(capsys.readouterr())


def test_a_rich_line_is_hidden_after_an_exception_too(trainer: Callable[..., L.Trainer]) -> None:
    class Fail(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with pytest.raises(RuntimeError), _host.progress(trainer, None, "Counting sheep"):
                raise RuntimeError
            (ours,) = [task for task in trainer.progress_bar_callback.progress.tasks if "sheep" in task.description]
            assert not ours.visible

    trainer(Fail(), RichProgressBar(), enable_progress_bar=True, max_epochs=1).fit(Classifier(), train_loader())


# --- Training data, read anew -----------------------------------------------------------------------------------------


class Evens(torch.utils.data.Sampler[list[int]]):
    """Yields batches of its own making, of no fixed size."""

    def __iter__(self) -> Any:
        yield from ([0, 2], [4])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"batch_size": 3}, [3, 2]),
        ({"batch_sampler": torch.utils.data.BatchSampler(range(9), 2, drop_last=True)}, [2, 2, 1]),
        ({"batch_sampler": Evens()}, [5]),
    ],
    ids=["batch_size", "batch_sampler", "custom"],
)
def test_places_are_read_in_order_whatever_makes_the_batches(options: dict[str, Any], sizes: list[int]) -> None:
    loader = DataLoader(TensorDataset(torch.arange(9)), **options)
    batches = [batch.tolist() for (batch,) in _host.in_order(loader, [8, 1, 5, 0, 3])]
    assert [place for batch in batches for place in batch] == [8, 1, 5, 0, 3]
    assert [len(batch) for batch in batches] == sizes


def started(worker: int) -> None:
    """What each worker of a loader does first."""
    torch.utils.data.get_worker_info().dataset.dataset.places.add_(100)


class Places(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.places = torch.arange(9)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Tensor:
        return self.places[place]


def test_workers_that_read_in_order_begin_as_the_loaders_own() -> None:
    loader = DataLoader(Places(), 2, num_workers=1, worker_init_fn=started, multiprocessing_context="fork")
    again = _host.in_order(loader, [8, 1])
    assert [batch.tolist() for batch in again] == [[108, 101]]
    assert again.multiprocessing_context is loader.multiprocessing_context


# --- After a step -----------------------------------------------------------------------------------------------------


def test_what_is_done_after_a_step_can_be_replaced_and_forgotten() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer, calls = torch.optim.SGD([parameter], lr=0.1), []
    _host.after_step(optimizer, "one", lambda: calls.append("first"))
    _host.after_step(optimizer, "one", lambda: calls.append("second"))
    _host.after_step(optimizer, "two", lambda: calls.append("other"))
    optimizer.step()
    assert sorted(calls) == ["other", "second"]
    _host.forget_steps("one")
    _host.release("two")
    optimizer.step()
    assert len(calls) == 2
    _host.forget_steps("three")


class Pinned(L.Callback):
    """Holds the first layer's first row, as a method that pins does."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not hasattr(self, "pin"):
            rows = torch.zeros_like(pl_module.net[0].weight, dtype=torch.bool)
            rows[0] = True
            self.pin = Pin.at(dict(pl_module.named_parameters()), {"net.0.weight": rows})
        _host.hold(pl_module, optimizer, self, self.pin)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"plugins": "scaler"},
        {"precision": "bf16-mixed"},
        {"devices": 2, "strategy": "ddp_fork"},
    ],
    ids=str,
)
def test_what_is_held_stays_where_it_was_through_a_fit(
    trainer: Callable[..., L.Trainer], options: dict[str, Any]
) -> None:
    if "plugins" in options:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # overflows at first
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    module, data = Classifier(), ContinualDataModule(make_tasks(val=False), batch_size=4)
    before = module.net[0].weight.detach().clone()
    trainer(Pinned(), max_epochs=2, **options).fit(module, datamodule=data)
    assert torch.equal(module.net[0].weight[0], before[0])
    assert not torch.equal(module.net[0].weight[1:], before[1:])


class Looks(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """A callback of somebody else's, which may look at gradients."""


class LooksItself(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The same in the user's module."""


class Muon(torch.optim.SGD):
    """An optimizer of somebody else's, which may mix gradients."""


class MixesGradients(Classifier):
    def configure_optimizers(self) -> Any:
        return Muon(self.parameters(), lr=0.1)


class GradientsSeen(Pinned):
    """Notes whether the gradients of what is held are zero."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.are_zero = not pl_module.net[0].weight.grad[0].any()


@pytest.mark.parametrize(
    ("make", "callbacks", "options", "are_zero"),
    [
        (Classifier, [L.callbacks.ModelSummary()], {}, False),
        (Classifier, [], {"gradient_clip_val": 1.0}, True),
        (Classifier, [Looks()], {}, True),
        (Classifier, [L.callbacks.LambdaCallback(on_before_zero_grad=lambda *args: None)], {}, True),
        (LooksItself, [], {}, True),
        (MixesGradients, [], {}, True),
    ],
    ids=["unseen", "clipping", "callback", "lambda", "module", "optimizer"],
)
def test_gradients_of_what_is_held_are_set_to_zero_where_others_may_look_at_them(
    trainer: Callable[..., L.Trainer],
    make: Callable[[], Classifier],
    callbacks: list[L.Callback],
    options: dict[str, Any],
    are_zero: bool,
) -> None:
    torch.manual_seed(0)
    pinned, module = GradientsSeen(), make()
    data = ContinualDataModule(make_tasks(val=False), batch_size=4)
    before = module.net[0].weight.detach().clone()
    trainer(pinned, *callbacks, max_epochs=1, **options).fit(module, datamodule=data)
    assert pinned.are_zero == are_zero
    assert torch.equal(module.net[0].weight[0], before[0])
