"""Graceful forgetting: how far a threshold can be raised at a small loss of the score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

_PROBES = 6
"""How many thresholds are tried on a share of the data."""


def graceful_threshold(
    values: Tensor,
    score: Callable[[float | None, bool], float],
    *,
    tolerance: float,
    passes: int = 3,
    before: Callable[[], float] | None = None,
    with_share: bool = True,
    higher_is_better: bool = True,
) -> dict[str, float]:
    r"""Search the largest threshold at which a score falls by no more than a tolerance, raising it from 0.

    .. math:: \theta^* = \max \{\theta \in \{0, v_1, \ldots, v_K\} : \text{score}(\theta) \ge \text{best} - m\}

    with the best score that without a threshold. To ask for all :math:`v_k` is dear. So a bisection of six probes asks
    for the score on a share of the data (an eighth). A share is less sure: half the tolerance may be lost there, and a
    tenth of the steps is taken back. What is left is checked on all data. If it does not hold, a bisection of as many
    checks as remain goes on below, and ends at 0 where nothing holds. So what is returned has been checked on all
    data, or is 0, at which only what is never active counts as inactive. (The idea is the paper's, the procedure our
    reading.)

    Args:
        values: Thresholds :math:`v_k` to try.
        score: Maps a threshold (or None) to the score, on a share of the data if the second argument is true, else on
            all of it. No question is asked twice.
        tolerance: m.
        passes: How often the score on all data may be asked for, where that on a share counts as an eighth; with 2
            there is only one probe, on all data.
        before: Returns the score without a threshold at no cost, where it is known.
        with_share: Whether there is a share; without one a bisection asks for the score on all data.
        higher_is_better: False where the score is a loss.

    Returns:
        The ``"threshold"``, and the score ``"before"`` and ``"after"``, as far as it was asked for.

    Example:
        A score that falls from 1 by a hundredth for each unit cut, of a hundred.

        >>> import torch
        >>> def score(threshold, of_share):
        ...     return 1.0 - (threshold or 0.0) / 100
        >>> graceful_threshold(torch.arange(1.0, 101.0), score, tolerance=0.205)
        {'before': 1.0, 'after': 0.91, 'threshold': 9.0}
        >>> graceful_threshold(torch.arange(1.0, 101.0), score, tolerance=0.205, passes=9, with_share=False)
        {'before': 1.0, 'after': 0.8, 'threshold': 20.0}

    References:
        - Golkar, Kagan, Cho. *Continual Learning via Neural Pruning.* arXiv 1903.04476, 2019.
    """
    tried: list[float] = [0.0, *sorted({value for value in values.tolist() if value > 0})]
    scores: dict[tuple[float | None, bool], float] = {}

    def ask(threshold: float | None, of_share: bool) -> float:
        key = threshold, of_share
        if key not in scores:
            scores[key] = before() if before is not None and key == (None, False) else score(*key)
        return scores[key]

    def holds(place: int, of_share: bool) -> bool:
        loss = ask(None, of_share) - ask(tried[place], of_share)
        return (loss if higher_is_better else -loss) <= (tolerance / 2 if of_share else tolerance)

    low, high, checks = 0, len(tried) - 1, passes - (before is None)
    if with_share and checks > 1:
        high, checks = _bisect(low, high, _PROBES, lambda place: holds(place, True)), checks - 1
        high -= high // 10
        if high > low:
            low, high, checks = (high, high, 0) if holds(high, False) else (low, high - 1, checks - 1)
    found = _bisect(low, high, checks, lambda place: holds(place, False))
    result = {"before": ask(None, False)} if (None, False) in scores else {}
    if (tried[found], False) in scores:
        result["after"] = scores[tried[found], False]
    return {**result, "threshold": tried[found]}


def what_went_wrong(
    search: Mapping[str, float], task: int, tolerance: float, higher_is_better: bool = True, *, retrained: bool = False
) -> str:
    """Return what there is to warn of after a task's boundary; empty where all went well.

    Args:
        search: What `graceful_threshold` returned, with ``"after"`` the score of what was kept in the end.
        task: The task.
        tolerance: m.
        higher_is_better: False where the score is a loss.
        retrained: Whether what was kept was retrained.

    Example:
        >>> what_went_wrong({"before": 0.9, "after": 0.7, "threshold": 1.0}, 2, 0.05).partition(":")[0]
        'lost more than `tolerance=0.05` at the end of task 2'
        >>> what_went_wrong({"before": 0.9, "after": 0.9, "threshold": 1.0}, 2, 0.05)
        ''
    """
    before, after = (search.get(name, math.nan) for name in ("before", "after"))
    if (before - after if higher_is_better else after - before) > tolerance:
        return (
            f"lost more than `tolerance={tolerance}` at the end of task {task}: the score was {before:.4g} before the"
            f" cut, and is {after:.4g}. Pass more `retrain_epochs` or a larger `l1`, or use wider layers."
        )
    if "before" in search and search["threshold"] == 0 and not retrained:
        return (
            f"found no threshold for task {task} that costs at most `tolerance={tolerance}`: only dead units are cut."
            " Pass more `passes`, or a larger `tolerance` or `l1`."
        )
    return ""


def _bisect(low: int, high: int, probes: int, accepts: Callable[[int], bool]) -> int:
    """Return the largest place found that is accepted; ``low`` needs not to be asked."""
    for _ in range(probes):
        if low >= high:
            break
        middle = (low + high + 1) // 2
        if accepts(middle):
            low = middle
        else:
            high = middle - 1
    return low
