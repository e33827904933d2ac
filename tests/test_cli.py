"""The command line, called as a user calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    assert all(name in printed for name in ("demo", "fit", "validate", "test"))


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
