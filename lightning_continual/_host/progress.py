"""Progress of work beyond the training step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def progress(trainer: Any, total: int | None, description: str) -> Iterator[Callable[[], Any]]:
    """Show a bar for ``total`` pieces of work beside the Trainer's own bar, and yield what advances it by one.

    Nothing is shown where the Trainer shows no bar: when it is disabled, and on all but the first process.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled or not trainer.is_global_zero:
        yield lambda: None
    elif (rich := getattr(bar, "progress", None)) is not None:
        task = rich.add_task(description, total=math.inf if total is None else total)
        try:
            yield lambda: (rich.update(task, advance=1), bar.refresh())
        finally:
            # Hidden, not removed: Lightning's Rich bar counts on the ids of its own tasks.
            rich.update(task, visible=False)
            rich.refresh()
    else:
        with tqdm(total=total, desc=description, leave=False, dynamic_ncols=True, file=sys.stdout) as line:
            yield lambda: line.update(1)
