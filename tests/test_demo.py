"""The demo: what a newcomer sees, and that an interrupted one ends like any other."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_continual.demo import run_demo

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def without_seconds(table: str) -> list[str]:
    return [re.sub(r"\S+$", "", line) for line in table.split("\n\n")[0].splitlines()[1:]]


def read(folder: Path, method: str) -> dict[str, float]:
    return json.loads((folder / "runs" / f"{method}-0" / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a demo of one seed wrote, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, num_seeds=1)


def test_the_demo_shows_forgetting_and_that_rehearsal_prevents_it(finished: tuple[Path, str]) -> None:
    folder, report = finished
    forgets, rehearses = read(folder, "fine-tuning"), read(folder, "rehearsal")
    assert forgets["accuracy"] < 0.35
    assert rehearses["accuracy"] > 0.85
    assert forgets["forgetting"] > 0.5 > rehearses["forgetting"]
    assert 1.5 * forgets["samples"] < rehearses["samples"] < 2 * forgets["samples"]
    assert (folder / "matrices.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "matrices.png") in report
    assert f"{100 * rehearses['accuracy']:.1f} ± 0.0" in report


@pytest.mark.slow
def test_a_demo_killed_in_the_middle_of_a_run_resumes_to_the_same_table(
    tmp_path: Path, finished: tuple[Path, str]
) -> None:
    """And so do the same seeds."""

    def demo(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "lightning_continual", "demo", "--seeds", "1", "--output", *arguments]

    killed = tmp_path / "killed"
    process = subprocess.Popen(demo(str(killed)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = killed / "runs" / "rehearsal-0" / "last.ckpt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert checkpoint.exists()
    assert not checkpoint.with_name("result.json").exists()
    resumed = subprocess.run(demo(str(killed), "--resume"), check=True, capture_output=True, text=True, timeout=120)
    whole, table = finished
    assert without_seconds(resumed.stdout) == without_seconds(table)
    assert read(killed, "rehearsal")["matrix"] == read(whole, "rehearsal")["matrix"]


def test_a_finished_run_is_read_not_trained_again(finished: tuple[Path, str]) -> None:
    folder, first = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert run_demo(folder, num_seeds=1, resume=True) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == stamps


def test_no_seeds_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_seeds` must be at least 1, but got 0"):
        run_demo(tmp_path, num_seeds=0)
