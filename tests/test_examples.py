"""The examples: each runs as a user runs it, in an empty folder."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_a_deployed_model_is_updated_month_by_month(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    months = "--months", "5", "--first", "3"
    printed = run("update_deployed_model.py", *months, "--search", "1", "100", folder=tmp_path)
    table = read(tmp_path / "deployed" / "table.csv")
    accuracy = {method: float(row["accuracy"]) for method, row in table.items()}
    assert len(accuracy) == 7
    assert accuracy["rehearsal 50 %"] > accuracy["EWC"] > accuracy["nothing"]
    assert float(table["from scratch"]["share_of_samples"]) == 1
    assert float(table["nothing"]["share_of_samples"]) < 0.3
    assert all(method in printed for method in accuracy)
    assert printed.count("% on the validation data") == 2
    with (tmp_path / "deployed" / "accuracy.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7 * 5
    assert (tmp_path / "deployed" / "time_decay.png").read_bytes().startswith(b"\x89PNG")


def test_a_gate_refuses_an_update_that_forgets(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run("update_deployed_model.py", "--months", "4", "--first", "3", "--gate", "0.05", folder=tmp_path)
    table = read(tmp_path / "deployed" / "table.csv")
    assert table["nothing"]["refused"] == "1"
    assert table["from scratch"]["refused"] == "0"
    folder = tmp_path / "deployed" / "checkpoints" / "nothing-0"
    assert {path.name for path in folder.glob("*.ckpt")} == {"deployed.ckpt", "refused-3.ckpt"}


def test_bandits_retrain_at_equal_budget(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    printed = run("bandit_retraining.py", "--seeds", "1", "--epochs", "1", folder=tmp_path)
    table = read(tmp_path / "bandits" / "table.csv")
    assert len(table) == 12
    assert float(table["full retraining"]["backward FLOPs"]) == 1
    assert float(table["full retraining"]["weights"]) == 1
    for method in ("random weights", "bandit weights", "bandit samples and weights"):
        assert float(table[method]["backward FLOPs"]) < float(table["uniform rehearsal"]["backward FLOPs"]) < 0.3
        assert float(table[method]["weights"]) < 0.45  # and the head
    assert float(table["bandit samples"]["old"].split()[0]) > 80
    assert all(method in printed for method in table)


def test_the_settings_of_the_published_numbers_run(tmp_path: Path, real_data: Path) -> None:
    pytest.importorskip("torchvision")
    folder = ["--folder", str(real_data), "--seeds", "1"]
    run("reproduce/split_mnist.py", *folder, "--steps", "20", folder=tmp_path)
    run("reproduce/permuted_mnist.py", *folder, "--tasks", "2", "--methods", "ER 200", folder=tmp_path)
    few = "--tasks", "2", "--epochs", "1", "--methods", "packnet equal parts"
    run("reproduce/packnet_permuted_mnist.py", *folder, *few, folder=tmp_path)
    split, permuted = read(tmp_path / "split_mnist.csv"), read(tmp_path / "permuted_mnist.csv")
    assert float(read(tmp_path / "packnet_permuted_mnist.csv")["packnet equal parts"]["mean"]) > 90
    assert set(split) == {"nothing", "empirical"}
    assert float(permuted["ER 200"]["mean"]) > 85


def test_a_trained_network_is_compared_with_its_small_forms(tmp_path: Path) -> None:
    for package in ("sklearn", "matplotlib", "torch_pruning", "torchao"):
        pytest.importorskip(package)
    grid = "--selector", "random", "merge", "obd-sd", "--amount", "0.5", "0.9", "--seeds", "1"
    printed = run("compress_model.py", *grid, "--save", "full.ckpt", folder=tmp_path)
    with (tmp_path / "compressed" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    score = {
        (row["selector"], row["level"], row["amount"], row["stage"]): float(row["score"])
        for row in rows
        if row["seed"] == "0" and row["family"] == "pruned"
    }
    assert len(rows) == 1 + 15 + 2 * 2 * 4 + 3 * 2 * 2 + 2 * 2
    assert score["obd-sd", "parameter", "0.5", "before"] > score["random", "parameter", "0.5", "before"] + 0.1
    assert score["merge", "unit", "0.9", "before"] > score["random", "unit", "0.9", "before"] + 0.1
    assert "unit, % removed" in printed
    assert "Recommended: " in printed
    assert (tmp_path / "compressed" / "plot.png").read_bytes().startswith(b"\x89PNG")
    # The command makes the same comparison for a checkpoint.
    names = "--model", "compress_model:Classifier", "--data", "compress_model:loaders"
    command = ["-m", "lightning_continual", "compress", "full.ckpt", *names, "--no-scratch", "--quantization", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, *command, "--output", "again"], **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    with (tmp_path / "again" / "table.csv").open() as file:
        assert next(csv.DictReader(file))["score"] == rows[0]["score"]


def test_the_comparison_runs_on_fashion_mnist(tmp_path: Path, real_data: Path) -> None:
    for package in ("torchvision", "matplotlib", "torch_pruning", "torchao"):
        pytest.importorskip(package)
    folder = ["--data", "fashion", "--folder", str(real_data)]
    grid = "--selector", "magnitude", "--amount", "0.75", "--level", "unit", "--epochs", "1"
    printed = run("compress_model.py", *folder, *grid, "--scratch", "0", folder=tmp_path)
    assert "magnitude, 75 % of units, fine-tuned" in printed


def test_shares_are_searched_for_tasks_of_different_size(tmp_path: Path) -> None:
    for extra in ("sklearn", "matplotlib", "optuna"):
        pytest.importorskip(extra)
    few = "--trials", "3", "--epochs", "15", "--width", "60", "--fixed", "0.5"
    printed = run("adaptive_compression.py", *few, folder=tmp_path)
    table = read(tmp_path / "compression" / "table.csv")
    assert set(table) == {"adaptive", "fixed 0.5"}
    assert float(table["adaptive"]["mean"]) > 0.6
    assert float(table["adaptive"]["0 and 1"]) > 0.9
    assert 0.8 < float(table["fixed 0.5"]["used"]) <= 1 - 0.5**4 + 0.01  # less, where inputs are always zero
    assert "of the weights used" in printed
    for name in ("search_0", "search_3", "capacity", "scores"):
        assert (tmp_path / "compression" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_segmentation_forgets_nothing(tmp_path: Path) -> None:
    for extra in ("matplotlib", "optuna"):
        pytest.importorskip(extra)
    few = "--trials", "2", "--epochs", "5", "--width", "4"
    printed = run("adaptive_segmentation.py", *few, folder=tmp_path)
    with (tmp_path / "segmentation" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["disc", "square", "bars"]
    assert all(float(row["miou"]) > 0.2 for row in rows)
    assert "of one network used" in printed
    for name in ("predictions", "capacity", "scores"):
        assert (tmp_path / "segmentation" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_segmentation_of_drives_one_after_the_other(tmp_path: Path, real_data: Path) -> None:
    for extra in ("matplotlib", "optuna"):
        pytest.importorskip(extra)
    few = "--images", "12", "--trials", "1", "--epochs", "1", "--retrain", "1", "--width", "4"
    run("adaptive_segmentation.py", "--folder", str(real_data), "--tasks", "drives", *few, folder=tmp_path)
    with (tmp_path / "segmentation" / "table.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["0001TP", "0006R0", "0016E5", "Seq05VD"]


@pytest.mark.long
def test_in_400_units_clnp_is_a_point_above_ewc(tmp_path: Path, real_data: Path) -> None:
    """Ten permutations, ten epochs each. Leads of seeds 0 to 2 were 1.01, 1.07 and 0.94 points."""
    pytest.importorskip("torchvision")
    pytest.importorskip("torch_pruning")
    common = "--folder", str(real_data), "--width", "400", "--epochs", "10", "--lr", "5e-3"
    own = {
        "clnp": ("--retrain-epochs", "5", "--l1", "3e-5", "3e-5", "3e-4"),
        "ewc": ("--method", "ewc", "--strength", "3000"),
    }
    with ThreadPoolExecutor() as threads:
        runs = [
            threads.submit(run, "clnp_permuted_mnist.py", *common, *options, folder=tmp_path)
            for options in own.values()
        ]
        printed = [one.result() for one in runs]
    assert "tasks whose logits have changed since: 0" in printed[0]
    means = {method: float(read(tmp_path / "clnp" / f"{method}.csv")[method]["mean"]) for method in own}
    assert means["clnp"] > 97.5
    assert means["clnp"] - means["ewc"] > 0.8


def test_clnp_learns_permuted_digits_and_forgets_nothing(tmp_path: Path, real_data: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("torch_pruning")
    options = "--tasks", "2", "--width", "100", "--epochs", "2", "--tolerance", "0.01"
    printed = run("clnp_permuted_mnist.py", "--folder", str(real_data), *options, folder=tmp_path)
    assert "tasks whose logits have changed since: 0" in printed
    assert float(read(tmp_path / "clnp" / "clnp.csv")["clnp"]["mean"]) > 60
    assert (tmp_path / "clnp" / "units.png").read_bytes().startswith(b"\x89PNG")
