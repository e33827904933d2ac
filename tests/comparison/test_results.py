"""Rows of a comparison: their means, the table, the file, the figure."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from lightning_continual.comparison.results import (
    Row,
    Summary,
    compression_figure,
    smallest_within,
    summarize,
    summary_table,
    write_rows,
)

pytest.importorskip("matplotlib")


def pruned(amount: float, stage: str = "fine-tuned", seed: int = 0, **numbers: Any) -> Row:
    return Row("pruned", stage, seed, "obd", "unit", amount, **numbers)


FULL = Row("full", "as trained", 0, score=0.9, num_bytes=1000.0, num_parameters=250.0, num_flops=500.0, seconds=1.0)
ROWS = [
    FULL,
    pruned(0.5, score=0.88, num_bytes=500.0),
    pruned(0.5, "before", score=0.6, num_bytes=500.0),
    pruned(0.9, score=0.7, num_bytes=100.0),
    Row("quantized", "before", 0, "uniform", "tensor", bits=4.0, score=0.85, num_bytes=125.0),
    pruned(0.99, note="too much"),
]


def test_means_and_standard_errors_are_over_the_seeds_of_a_kind() -> None:
    scores = [0.5, 0.7, 0.65]
    rows = [FULL, *(pruned(0.5, seed=seed, score=s, num_bytes=100.0 + seed) for seed, s in enumerate(scores))]
    full, one = summarize(rows)
    assert (full.row.name, full.row.score, full.num_seeds) == ("full", 0.9, 1)
    assert math.isnan(full.error)
    assert one.row.score == pytest.approx(sum(scores) / 3)
    assert one.error == pytest.approx(statistics.pstdev(scores) / math.sqrt(3 - 1))
    assert (one.row.num_bytes, one.row.seed, one.num_seeds) == (101.0, 1, 3)
    assert summarize(rows, lower_is_better=True)[1].row.seed == 0


def test_a_seed_left_out_does_not_count_and_a_diverged_one_spoils_the_mean() -> None:
    left_out = pruned(0.5, note="too much")
    (one,) = summarize([left_out, pruned(0.5, seed=1, score=0.5)])
    assert (one.row.score, one.num_seeds, one.row.note) == (0.5, 1, "")
    (none,) = summarize([left_out])
    assert (none.row.note, none.num_seeds) == ("too much", 0)
    (diverged,) = summarize([pruned(0.5, score=math.nan), pruned(0.5, seed=1, score=0.5)])
    assert math.isnan(diverged.row.score)
    assert diverged.row.seed == 1


@pytest.mark.parametrize(("tolerance", "name"), [(0.0, "full"), (0.02, "50 %"), (0.05, "4 bits"), (0.5, "90 %")])
def test_the_smallest_within_the_tolerance(tolerance: float, name: str) -> None:
    found = smallest_within(summarize(ROWS), tolerance)
    assert found is not None
    assert name in found.row.name


def test_of_losses_the_tolerance_is_upwards() -> None:
    rows = [FULL, pruned(0.5, score=0.95, num_bytes=500.0), pruned(0.9, score=1.5, num_bytes=100.0)]
    found = smallest_within(summarize(rows), 0.1, lower_is_better=True)
    assert found is not None
    assert found.row.num_bytes == 500.0


def test_without_the_full_network_nothing_can_be_recommended() -> None:
    with pytest.raises(ValueError, match="`summaries` must hold the full network"):
        smallest_within(summarize(ROWS[1:]), 0.1)


def test_the_file_has_a_column_for_each_number(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [one["family"] for one in table] == [row.family for row in ROWS]
    assert [float(one["num_bytes"] or "nan") for one in table[:5]] == [row.num_bytes for row in ROWS[:5]]
    assert table[0]["amount"] == table[5]["score"] == ""
    assert table[5]["note"] == "too much"


def test_the_table_tells_scores_in_percent_sizes_and_what_was_left_out() -> None:
    rows = [*ROWS, pruned(0.5, seed=1, score=0.86, num_bytes=500.0)]
    lines = summary_table(summarize(rows), label="val_acc").splitlines()
    assert lines[0].split() == ["val_acc,", "%", "bytes", "of", "full", "parameters", "FLOPs", "seconds"]
    assert lines[1].split() == ["full", "90.0", "1,000", "1.000", "250", "500", "1.0"]
    assert "obd, 50 % of units, fine-tuned" in lines[2]
    assert "87.0 ± 1.0" in lines[2]
    assert "0.500" in lines[2]
    assert lines[6].endswith("left out: too much")
    losses = summary_table([Summary(Row("full", "as trained", 0, score=1.2345, num_bytes=4.0), math.nan, 1)])
    assert "1.234" in losses.splitlines()[1]
    assert "%" not in losses.splitlines()[0]


def drawn(figure: Any) -> list[tuple[float, float]]:
    """Return the points that have a marker."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "_", "|", None)]
    return sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines)


def test_every_score_is_drawn_at_its_bytes_and_the_front_joins_what_is_worth_considering() -> None:
    figure = compression_figure(summarize(ROWS), label="val_acc", title="Net")
    ax = figure.axes[0]
    assert drawn(figure) == sorted((row.num_bytes, row.score) for row in ROWS[:5])
    (front,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [
        *((100.0, 0.7), (125.0, 0.85), (500.0, 0.88), (1000.0, 0.9))
    ]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel(), ax.get_title()) == ("log", "logit", "val_acc, %", "Net")
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [text for text in texts if text[0] in "1234"] == [
        "1  obd, 90 % of units, fine-tuned",
        "2  4 bits per tensor",
        "3  obd, 50 % of units, fine-tuned",
        "4  full",
    ]
    assert {"full", "units pruned", "quantized", "obd", "bits per tensor", "Pareto front"} <= set(texts)
    assert "weights pruned" not in texts
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4"]


def test_neighbours_on_the_front_are_numbered_together() -> None:
    rows = [pruned(share / 100, score=share / 100, num_bytes=100.0 + share) for share in (10, 11, 12, 50)]
    figure = compression_figure(summarize([FULL, *rows]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1-3", "4", "5"]


def test_hollow_is_what_one_would_not_ship() -> None:
    figure = compression_figure(summarize(ROWS))
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [float(line.get_ydata()[0]) for line in hollow] == [0.6]


def test_bars_are_standard_errors() -> None:
    rows = [FULL, pruned(0.5, score=0.5, num_bytes=500.0), pruned(0.5, seed=1, score=0.7, num_bytes=500.0)]
    (bar,) = [one for one in compression_figure(summarize(rows)).axes[0].collections if len(one.get_segments())]
    (low, high) = [y for _, y in bar.get_segments()[0]]
    assert (low, high) == pytest.approx((0.5, 0.7))  # 0.6 ± 0.1: half their distance is the standard error of two


def test_scores_of_nought_and_one_have_a_place_on_the_scale() -> None:
    rows = [Row("full", "as trained", 0, score=1.0, num_bytes=10.0), pruned(0.5, score=0.0, num_bytes=5.0)]
    heights = [y for _, y in drawn(compression_figure(summarize(rows)))]
    assert 0 < heights[0] < 0.05
    assert 0.95 < heights[1] < 1


def test_losses_are_drawn_the_better_the_higher() -> None:
    rows = [
        Row("full", "as trained", 0, score=2.0, num_bytes=10.0),
        pruned(0.5, score=3.0, num_bytes=5.0),
        pruned(0.6, score=4.0, num_bytes=7.0),
    ]
    ax = compression_figure(summarize(rows), lower_is_better=True, label="val_loss").axes[0]
    assert ax.yaxis_inverted()
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "val_loss (lower is better)")
    (front,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert list(front.get_ydata()) == [3.0, 2.0]


def test_errors_below_one_are_no_shares() -> None:
    summaries = summarize([Row("full", "as trained", 0, score=0.0055, num_bytes=10.0), pruned(0.5, score=0.29)])
    assert summary_table(summaries, label="mse", lower_is_better=True).splitlines()[1].split()[:2] == ["full", "0.0055"]
    assert compression_figure(summaries, lower_is_better=True).axes[0].get_yscale() == "log"
    assert "mse, %" in summary_table(summaries, label="mse")
