"""What several functions take, measured in turn in one run."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch.utils.benchmark import Timer


def seconds(
    runs: dict[str, Callable[[], Any]], repeats: int, of: Callable[[Sequence[float]], float] = median
) -> dict[str, float]:
    """Median (or least) seconds of each function, measured in turn, so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(Timer("run()", globals={"run": run}, num_threads=1).timeit(1).median)
    return {name: of(values) for name, values in times.items()}
