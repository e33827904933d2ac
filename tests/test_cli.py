"""The command line, called as a user calls it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_continual.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call the command line with these arguments."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning-continual", *arguments])
        main()

    return call


CONFIG = Path(__file__).parent.parent / "examples" / "digits.yaml"


def test_help_names_every_command(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "compress", "fit", "validate", "test"))


def test_an_unknown_command_is_told(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("bogus")
    assert stop.value.code == 2
    assert "invalid choice: 'bogus'" in capsys.readouterr().err


def test_an_error_that_a_user_can_mend_comes_without_a_traceback(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("demo", "--seeds", "0", "--output", str(tmp_path))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "lightning-continual: `num_seeds` must be at least 1, but got 0.\n"


def test_every_argument_of_callbacks_module_and_data_can_be_configured(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", str(CONFIG), "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for argument in ("epochs_per_task", "reset_optimizer", "proportion", "selection", "monitor", "num_tasks", "hidden"):
        assert f"{argument}:" in printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")  # of jsonargparse
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jsonargparse")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_stream_runs_from_a_configuration(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.enable_progress_bar=false", "--model.hidden=20"]
    run("fit", "--config", str(CONFIG), *options, "--data.num_tasks=2")
    printed = capsys.readouterr().out
    assert "val_acc" in printed
    assert "from scratch" in printed
    (log,) = tmp_path.rglob("metrics.csv")
    assert "val_acc/average_accuracy" in log.read_text()


OWN_NETWORK = """
import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, hidden=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        self.log("val_error", (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loaders(size=90):
    y = torch.arange(size) % 3
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(0)) + 2 * nn.functional.one_hot(y, 8)
    return DataLoader(TensorDataset(x, y), 16, shuffle=True), DataLoader(TensorDataset(x, y), 45)


def own_score(module, batches, parameters):
    return {name: one.detach().square() for name, one in parameters.items()}


def save(path):
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    module, trainer = Net(), L.Trainer(max_epochs=5, accelerator="cpu", **quiet)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(path)


if __name__ == "__main__":
    save("net.ckpt")
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of somebody's own and its checkpoint."""
    for package in ("torch_pruning", "torchao", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import own_network  # type: ignore[import-not-found]

    own_network.save("net.ckpt")
    yield tmp_path
    sys.modules.pop("own_network")


def test_a_checkpoint_of_somebodys_own_module_is_compressed(
    run: Callable[..., None], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selectors = "--selector", "magnitude", "merge", "own_network:own_score"
    more = "--amount", "0.5", "0.8", "--seeds", "2", "--scratch-epochs", "1", "--tolerance", "0.1", "--output", "small"
    names = "--model", "own_network.Net", "--data", "own_network:loaders", "--data-init", "size=60"
    run("compress", "net.ckpt", *names, *selectors, *more, "--quantization", "4", "int8-weight")
    printed, progress = capsys.readouterr()
    assert "merge, 50 % of units, fine-tuned" in printed
    assert "own_score, 80 % of weights, from scratch, long" in printed
    assert "merge, 50 % of weights" not in printed
    assert " ± " in printed
    assert "Recommended: " in printed
    assert "epoch" in progress
    with Path("small", "table.csv").open() as file:
        table = list(csv.DictReader(file))
    per_seed = 2 * (2 * 4 + 2 + 1 * 2) + 2 * (2 + 2)  # weights and units of two selectors, units of merge, scratch
    assert len(table) == 1 + 2 + 2 * per_seed
    assert {"plot.png", "recommended.ckpt"} <= {path.name for path in Path("small").iterdir()}


def test_nothing_from_scratch_and_nothing_quantized_when_told_so(
    run: Callable[..., None], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "--model", "own_network:Net", "--data", "own_network:loaders"
    run("compress", "net.ckpt", *names, "--no-scratch", "--quantization", "--level", "parameter", "--amount", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        *("full", "obd-sd, 50 % of weights, before", "obd-sd, 50 % of weights, fine-tuned")
    ]
    assert not lines[4]


@pytest.mark.parametrize(("mode", "is_low"), [([], True), (["--mode", "max"], False)], ids=["by name", "max"])
def test_low_errors_are_good_unless_told_otherwise(
    run: Callable[..., None], own_folder: Path, capsys: pytest.CaptureFixture[str], mode: list[str], is_low: bool
) -> None:
    names = "--model", "own_network:Net", "--data", "own_network:loaders", "--monitor", "val_error", *mode
    run("compress", "net.ckpt", *names, "--no-scratch", "--quantization", "--level", "parameter", "--amount", "0.9")
    assert ("Recommended: full" in capsys.readouterr().out) == is_low


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--selector", "merge", "--level", "parameter"], "`selector='merge'` scores whole units"),
        (["--selector", "biggest"], "`selector` must be one of"),
        (["--amount", "1"], "`amount` must lie in [0, 1), but got 1.0"),
        (["--monitor", "val_f1"], "`monitor='val_f1'` was not logged by `validation_step`, which logged ['val_acc', "),
        (["--init", "hidden=8"], "is of another architecture than Net: size mismatch for net.0.weight"),
        (["--model", "own_network:Nett"], "`--model` got 'own_network:Nett', but 'own_network' has no 'Nett'"),
        (["--data", "nowhere:loaders"], "there is no module 'nowhere' in the current folder"),
        (["--seeds", "0"], "`--seeds` must be at least 1, but got 0"),
        (["--tolerance", "-1"], "`tolerance` must be at least 0, but got -1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_user_can_mend_is_told_before_anything_is_trained(
    run: Callable[..., None],
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    message: str,
) -> None:
    import own_network

    monkeypatch.setattr(own_network.Net, "training_step", None)  # would fail
    with pytest.raises(SystemExit) as stop:
        run("compress", "net.ckpt", "--model", "own_network:Net", "--data", "own_network:loaders", *changed)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_as_a_process_in_a_folder_with_nothing_but_the_users_module(tmp_path: Path) -> None:
    for package in ("torch_pruning", "torchao", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    command = ["-m", "lightning_continual", "compress", "net.ckpt", "--model", "own_network:Net"]
    for arguments in (["own_network.py"], [*command, "--data", "own_network:loaders"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert "Recommended: " in done.stdout
    assert "Warning" not in done.stderr
    found = {path.name for path in (tmp_path / "compressed").iterdir()}
    assert {"table.csv", "plot.png", "recommended.ckpt"} <= found
    assert {path.name for path in tmp_path.iterdir()} <= {"own_network.py", "net.ckpt", "compressed", "__pycache__"}
