"""What a comparison of small networks gave: rows, their means over seeds, a table, and a figure of scores and bytes."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_continual._extras import require
from lightning_continual.compression.baselines import pareto_front, recommend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL, PRUNED, QUANTIZED = "full", "pruned", "quantized"
AS_TRAINED, BEFORE, FINE_TUNED = "as trained", "before", "fine-tuned"
SHORT, LONG = "from scratch, short", "from scratch, long"

# By family and level a name and a colour (of Okabe & Ito's, for colour-blind readers); from scratch, a lighter one.
_COLORS = {
    (PRUNED, "parameter"): ("weights pruned", "#0072B2", "weights, from scratch", "#56B4E9"),
    (PRUNED, "unit"): ("units pruned", "#D55E00", "units, from scratch", "#E69F00"),
    (QUANTIZED, ""): ("quantized", "#009E73", "", ""),
}
_MARKERS = "os^DvP<>Xdh8p"
_TICKS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)


@dataclass(frozen=True)
class Row:
    """One network of a comparison: what it is, what it scores, what it weighs, what it costs.

    Args:
        family: ``"full"``, ``"pruned"`` or ``"quantized"``.
        stage: ``"as trained"``; of pruned networks ``"before"`` and ``"fine-tuned"``, or ``"from scratch, short"`` and
            ``"from scratch, long"``: the same zeros or widths, trained anew; of quantized ones ``"before"``.
        seed: Of the run, or of the network.
        selector: What chose the weights or units, or the kind of quantization; empty where it makes no difference.
        level: ``"parameter"`` or ``"unit"``; of uniform quantization ``"tensor"`` or ``"channel"``.
        amount: The share of weights, or of the units of each layer, that was removed.
        bits: Of quantized weights.
        score: What ``validation_step`` logs.
        num_bytes: See `lightning_continual.compression.sizes.num_bytes`.
        file_bytes: See `lightning_continual.compression.sizes.file_bytes`.
        num_parameters: Parameters that are not held at zero.
        num_flops: Floating point operations for one sample; zeros count.
        seconds: What pruning and training took, scoring left out.
        note: Why there is no score.

    Example:
        >>> Row("full", "as trained", seed=0, score=0.9, num_bytes=440.0).name
        'full'
        >>> Row("pruned", "before", 0, selector="obd", level="unit", amount=0.5).name
        'obd, 50 % of units, before'
    """

    family: str
    stage: str
    seed: int
    selector: str = ""
    level: str = ""
    amount: float = math.nan
    bits: float = math.nan
    score: float = math.nan
    num_bytes: float = math.nan
    file_bytes: float = math.nan
    num_parameters: float = math.nan
    num_flops: float = math.nan
    seconds: float = math.nan
    note: str = ""

    @property
    def name(self) -> str:
        """What it is, in words."""
        if self.family == FULL:
            return FULL
        if self.family == QUANTIZED:
            return f"{self.bits:.0f} bits per {self.level}" if self.level else self.selector
        what = f"{100 * self.amount:g} % of {'units' if self.level == 'unit' else 'weights'}"
        return ", ".join(filter(None, [self.selector, what, self.stage]))


@dataclass(frozen=True)
class Summary:
    """Rows of one kind, over seeds.

    Args:
        row: Means over seeds; its seed is that of the best score.
        error: The standard error of the mean score; NaN of a single one.
        num_seeds: The number of scores.

    Example:
        >>> Summary(Row("full", "as trained", 0, score=0.9), math.nan, 1).row.score
        0.9
    """

    row: Row
    error: float
    num_seeds: int


def summarize(rows: Iterable[Row], *, lower_is_better: bool = False) -> list[Summary]:
    """Average rows of one kind over seeds, in the order in which kinds first come.

    Args:
        rows: All rows.
        lower_is_better: Whether the best score is the lowest.

    Returns:
        One summary for each family, selector, level, amount, bits and stage. Rows with a note do not count, but where a
        kind has no others; one that diverged (NaN) makes the mean NaN.

    Example:
        >>> rows = [Row("full", "as trained", seed, score=score) for seed, score in enumerate([0.5, 0.75, 1.0])]
        >>> (summary,) = summarize(rows)
        >>> summary.row.score, round(summary.error, 4), summary.row.seed  # 1/4 by the root of 3
        (0.75, 0.1443, 2)
    """
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.family, row.selector, row.level, str(row.amount), str(row.bits), row.stage)
        kinds.setdefault(key, []).append(row)
    results = []
    for group in kinds.values():
        scored = [row for row in group if not row.note]
        if not scored:
            results.append(Summary(group[0], math.nan, 0))
            continue
        sign = -1.0 if lower_is_better else 1.0
        best = max(scored, key=lambda row: -math.inf if math.isnan(row.score) else sign * row.score)
        names = ("score", "num_bytes", "file_bytes", "num_parameters", "num_flops", "seconds")
        means: dict[str, Any] = {name: statistics.fmean(getattr(row, name) for row in scored) for name in names}
        scores = torch.tensor([row.score for row in scored], dtype=torch.float64)
        error = scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        results.append(Summary(replace(best, **means), error, len(scored)))
    return results


def smallest_within(summaries: Sequence[Summary], tolerance: float, *, lower_is_better: bool = False) -> Summary | None:
    """Return the smallest kind of network that scores nearly as well as the full one; see `recommend`.

    Args:
        summaries: One of which is the full network's.
        tolerance: What may be lost, in the unit of the score.
        lower_is_better: Whether lower scores are better.

    Returns:
        The smallest by ``num_bytes``; None if even the full network has no score.

    Raises:
        ValueError: If there is no full network, or ``tolerance`` is negative.

    Example:
        >>> full = Row("full", "as trained", 0, score=0.9, num_bytes=440.0)
        >>> small = Row("pruned", "fine-tuned", 0, "obd", "parameter", 0.9, score=0.89, num_bytes=60.0)
        >>> smallest_within([Summary(full, math.nan, 1), Summary(small, math.nan, 1)], 0.02).row.name
        'obd, 90 % of weights, fine-tuned'
    """
    full = next((one.row.score for one in summaries if one.row.family == FULL), None)
    if full is None:
        raise ValueError("`summaries` must hold the full network, but none is of the family 'full'. Score it, too.")
    sign = -1.0 if lower_is_better else 1.0
    found = recommend(_column(summaries, "num_bytes"), sign * _column(summaries, "score"), sign * full, tolerance)
    return None if found is None else summaries[found]


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows as CSV: a column for each field, empty where there is no number.

    Args:
        rows: All rows.
        path: The file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> write_rows([Row("full", "as trained", 0, score=0.5)], path)
        >>> path.read_text().splitlines()[1]
        'full,as trained,0,,,,,0.5,,,,,,'
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def summary_table(summaries: Sequence[Summary], *, label: str = "score", lower_is_better: bool = False) -> str:
    """Write summaries as an aligned table in plain text: scores ± their standard errors over seeds, sizes, costs.

    Scores that all lie in [0, 1] are shown in percent, unless lower ones are better.

    Args:
        summaries: All summaries; the first full network's bytes count as 1.
        label: What is scored.
        lower_is_better: Whether lower scores are better.

    Returns:
        One line for the header and one for each summary, without a final newline.

    Example:
        >>> full = Row("full", "as trained", 0, score=0.9, num_bytes=440.0, num_parameters=110.0, num_flops=200.0)
        >>> print(summary_table([Summary(full, 0.01, 3)], label="val_acc"))
              val_acc, %  bytes  of full  parameters  FLOPs  seconds
        full  90.0 ± 1.0    440    1.000         110    200        -
    """
    percent = not lower_is_better and _is_share(summaries)
    full = next((one.row.num_bytes for one in summaries if one.row.family == FULL), math.nan)
    header = ["", f"{label}, %" if percent else label, "bytes", "of full", "parameters", "FLOPs", "seconds"]
    lines = [header]
    for one in summaries:
        row, score = one.row, one.row.note and f"left out: {one.row.note}"
        if not score:
            score = _score(row.score, percent) + (f" ± {_score(one.error, percent)}" if one.num_seeds > 1 else "")
        counts = [_count(value) for value in (row.num_bytes, row.num_parameters, row.num_flops)]
        share = "-" if math.isnan(row.num_bytes) else f"{row.num_bytes / full:.3f}"
        seconds = "-" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
        lines.append([row.name, score, counts[0], share, *counts[1:], seconds])
    widths = [max(len(line[i]) for line in lines if "left out" not in line[1] or not i) for i in range(len(header))]
    return "\n".join(
        f"{first:<{widths[0]}}  {second}"
        if second.startswith("left out")
        else "  ".join([first.ljust(widths[0]), *map(str.rjust, [second, *rest], widths[1:])])
        for first, second, *rest in lines
    )


def compression_figure(
    summaries: Sequence[Summary], *, label: str = "score", title: str = "", lower_is_better: bool = False
) -> Figure:
    """Draw scores against bytes: one marker a selector, one colour a family, and the Pareto front over all.

    Bars are standard errors over seeds. Filled markers are networks as one would ship them; hollow ones are pruned ones
    before fine-tuning, and those that were trained from scratch for a short time. Networks on the front are numbered,
    and named in the legend. Scores that all lie in [0, 1] are on a logit scale, which gives 98 to 99 % as much room as
    50 to 67 %, unless lower ones are better; others that are all positive on a logarithmic one. No global state of
    matplotlib is used: save by ``savefig``.

    Args:
        summaries: All summaries; those without a score are left out.
        label: What is scored.
        title: The title of the axes.
        lower_is_better: Whether lower scores are better; then the axis is turned around.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> full = Row("full", "as trained", 0, score=0.9, num_bytes=440.0)
        >>> figure = compression_figure([Summary(full, math.nan, 1)], label="val_acc")
        >>> figure.axes[0].get_xscale(), figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('log', 'bytes', 'val_acc, %')
    """
    drawn = [one for one in summaries if math.isfinite(one.row.score)]
    size, scores = _column(drawn, "num_bytes"), _column(drawn, "score")
    figure: Figure = require("matplotlib.figure", "plots").Figure((11.0, 6.0), layout="constrained")
    ax = figure.add_subplot()
    percent = not lower_is_better and _is_share(drawn)
    unit = ", %" * percent + " (lower is better)" * lower_is_better
    ax.set(xscale="log", xlabel="bytes", ylabel=label + unit, title=title)
    heights = _scaled(ax, scores, percent)
    names = list(dict.fromkeys(_selector(one.row) for one in drawn if one.row.family != FULL))
    markers = {name: _MARKERS[place % len(_MARKERS)] for place, name in enumerate(names)}
    for one, x, y in zip(drawn, size.tolist(), heights.tolist(), strict=True):
        color, is_full = _style(one.row)[1], one.row.family == FULL
        ax.errorbar(
            *(x, y, one.error if one.num_seeds > 1 else None),
            marker="*" if is_full else markers[_selector(one.row)],
            markersize=14 if is_full else 6,
            markerfacecolor=color if _is_filled(one.row) else "none",
            color=color,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
    is_on_front = pareto_front(size, -scores if lower_is_better else scores)
    front = sorted(is_on_front.nonzero().flatten().tolist(), key=lambda place: float(size[place]))
    ax.plot(size[front].tolist(), heights[front].tolist(), color="grey", linewidth=1, drawstyle="steps-post", zorder=1)
    for first, last in _neighbours(size[front].tolist()):
        point = float(size[front[last]]), float(heights[front[last]])
        text = str(first + 1) if first == last else f"{first + 1}-{last + 1}"
        ax.annotate(text, point, (-4, 6), textcoords="offset points", ha="right", fontsize=8, weight="bold")
    if lower_is_better:
        ax.invert_yaxis()
    ax.margins(0.06, 0.08)
    ax.grid(alpha=0.25)
    _legend(ax, drawn, markers, [drawn[place].row.name for place in front])
    return figure


def _scaled(ax: Any, scores: Tensor, is_share: bool) -> Tensor:
    """Choose the scale of scores, and return where they lie on it: 0 and 1 have no place on a logit scale."""
    if not is_share or not len(scores):
        if bool((scores > 0).all()) and len(scores):
            ax.set_yscale("log")
        return scores
    inside = scores[(scores > 0) & (scores < 1)]
    rest = min(inside.min().item(), 1 - inside.max().item()) / 2 if len(inside) else 0.01
    heights = scores.clamp(min(rest, 0.01), 1 - min(rest, 0.01))
    ax.set_yscale("logit")
    low, high = heights.min().item(), heights.max().item()
    ticks = [one for one in _TICKS if 0.8 * low <= one <= 1 - 0.8 * (1 - high)]
    ax.set_yticks(ticks, [f"{100 * one:g}" for one in ticks])
    ax.yaxis.set_minor_locator(require("matplotlib.ticker", "plots").NullLocator())
    return heights


def _neighbours(sizes: Sequence[float]) -> list[tuple[int, int]]:
    """Return the first and last place of what lies within 5 % of size, and so would be numbered at one point."""
    groups: list[tuple[int, int]] = []
    for place, size in enumerate(sizes):
        if groups and size < 1.05 * sizes[groups[-1][0]]:
            groups[-1] = groups[-1][0], place
        else:
            groups.append((place, place))
    return groups


def _legend(ax: Any, drawn: Sequence[Summary], markers: dict[str, str], front: Sequence[str]) -> None:
    line = require("matplotlib.lines", "plots").Line2D
    dark: dict[str, Any] = {"color": "#444444", "linestyle": "none"}
    colors = dict(_style(one.row) for one in drawn)
    handles = [
        line([], [], color=color, marker="*" if name == FULL else "s", linestyle="none", label=name)
        for name, color in colors.items()
    ]
    handles += [
        line([], [], marker=marker, label=name or "widths, by any selector", **dark) for name, marker in markers.items()
    ]
    if any(not _is_filled(one.row) for one in drawn):
        text = "hollow: before fine-tuning,\nor from scratch, short"
        handles.append(line([], [], marker="o", markerfacecolor="none", label=text, **dark))
    handles.append(line([], [], color="grey", linewidth=1, label="Pareto front"))
    handles += [line([], [], linestyle="none", label=f"{number}  {name}") for number, name in enumerate(front, 1)]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)


def _style(row: Row) -> tuple[str, str]:
    """Return the name and the colour of a family."""
    if row.family == FULL:
        return FULL, "black"
    *trained, scratch, lighter = _COLORS[row.family, row.level if row.family == PRUNED else ""]
    return (scratch, lighter) if row.stage in (SHORT, LONG) else (trained[0], trained[1])


def _selector(row: Row) -> str:
    return f"bits per {row.level}" if row.family == QUANTIZED and row.level else row.selector


def _is_filled(row: Row) -> bool:
    return row.family != PRUNED or row.stage in (FINE_TUNED, LONG)


def _is_share(summaries: Sequence[Summary]) -> bool:
    return all(math.isnan(one.row.score) or 0 <= one.row.score <= 1 for one in summaries)


def _column(summaries: Sequence[Summary], name: str) -> Tensor:
    return torch.tensor([getattr(one.row, name) for one in summaries], dtype=torch.float64)


def _score(value: float, percent: bool) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}" if percent else f"{value:.4g}"


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
