r"""The accuracy matrix of a stream of tasks, and the numbers that are read from it.

Throughout, :math:`R_{ij}` is the score on task :math:`j` after training through task :math:`i`, as a tensor ``(T, T)``
(rows trained, columns tested; a 0-dimensional tensor counts as ``(1, 1)``). It is any score: accuracy, IoU, or with
``higher_is_better=False`` a loss or an error, for which :math:`-R` takes the place of :math:`R` in every difference
and maximum; so a positive transfer is always good, and positive forgetting or intransigence always bad. Results are
0-dimensional, in the units of the score, and of the dtype and on the device of :math:`R`.

An entry that was never scored is NaN. A number is NaN if it needs such an entry (each function says which it needs),
and if it averages over no tasks: transfer and forgetting do at ``T = 1``, where 0 would claim that nothing was
forgotten. While a stream is running, `trained_part` gives the square part of the tasks trained so far.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric


def average_accuracy(R: Tensor) -> Tensor:
    r"""Compute the mean score on all tasks at the end, :math:`\frac1T \sum_{j<T} R_{T-1,j}`.

    Args:
        R: Scores ``(T, T)``; needed is the last row.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        >>> average_accuracy(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(0.7500)

    References:
        - Lopez-Paz and Ranzato. *Gradient episodic memory for continual learning.* NeurIPS 2017.
    """
    return _square(R)[-1:].mean()


def average_incremental_accuracy(R: Tensor) -> Tensor:
    r"""Compute the mean over time of the mean over seen tasks, :math:`\frac1T\sum_i \frac1{i+1}\sum_{j\le i} R_{ij}`.

    Args:
        R: Scores ``(T, T)``; needed is the lower triangle with the diagonal.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        After the first task 1, after the second (0.5 + 1) / 2.

        >>> average_incremental_accuracy(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(0.8750)

    References:
        - Rebuffi et al. *iCaRL: Incremental classifier and representation learning.* CVPR 2017.
    """
    R = _square(R)
    return (R.tril().sum(dim=1) / torch.arange(1, len(R) + 1, device=R.device)).mean()


def learning_accuracy(R: Tensor) -> Tensor:
    r"""Compute the mean score on each task right after it was learnt, :math:`\frac1T \sum_j R_{jj}`.

    Args:
        R: Scores ``(T, T)``; needed is the diagonal.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        >>> learning_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.8]]))
        tensor(0.9000)

    References:
        - Riemer et al. *Learning to learn without forgetting by maximizing transfer and minimizing interference.*
          ICLR 2019.
    """
    return _square(R).diagonal().mean()


def backward_transfer(R: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Compute what later tasks gave to earlier ones, :math:`\frac1{T-1}\sum_{j<T-1} (R_{T-1,j} - R_{jj})`.

    Positive is better: later training improved earlier tasks. For a loss the difference is
    :math:`R_{jj} - R_{T-1,j}`.

    Args:
        R: Scores ``(T, T)``; needed are the last row and the diagonal.
        higher_is_better: False for a loss.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        >>> backward_transfer(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(-0.5000)

    References:
        - Lopez-Paz and Ranzato. *Gradient episodic memory for continual learning.* NeurIPS 2017.
    """
    R = _square(R, higher_is_better)
    return (R[-1:, :-1] - R.diagonal()[:-1]).mean()


def forward_transfer(R: Tensor, baseline: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Compute what earlier tasks gave to later ones, :math:`\frac1{T-1}\sum_{j\ge1} (R_{j-1,j} - b_j)`.

    Positive is better: training on the tasks before made a task not yet seen easier. For a loss the difference is
    :math:`b_j - R_{j-1,j}`.

    Args:
        R: Scores ``(T, T)``; needed is the diagonal above the main one.
        baseline: :math:`b`, scores ``(T,)`` of the untrained model; needed from task 1 on.
        higher_is_better: False for a loss.

    Raises:
        ValueError: If ``R`` is not square, or ``baseline`` is not one score a task.

    Example:
        >>> forward_transfer(torch.tensor([[1.0, 0.25], [0.5, 1.0]]), baseline=torch.tensor([0.5, 0.5]))
        tensor(-0.2500)

    References:
        - Lopez-Paz and Ranzato. *Gradient episodic memory for continual learning.* NeurIPS 2017.
    """
    R = _square(R, higher_is_better)
    b = _per_task(baseline, "baseline", R, higher_is_better)
    return (R.diagonal(1) - b[1:]).mean()


def forgetting(R: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Compute what was lost since the best, :math:`\frac1{T-1}\sum_{j<T-1} (\max_{j\le i<T-1} R_{ij} - R_{T-1,j})`.

    Positive is worse. For a loss the difference is :math:`R_{T-1,j} - \min_{j\le i<T-1} R_{ij}`. It is never less than
    the negative backward transfer, and equal to it at ``T = 2``. The paper's maximum runs over all rows before the
    last; ours starts where task :math:`j` was learnt, since nothing is forgotten before.

    Args:
        R: Scores ``(T, T)``; needed is the lower triangle with the diagonal, without the last entry.
        higher_is_better: False for a loss.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(0.5000)

    References:
        - Chaudhry et al. *Riemannian walk for incremental learning: Understanding forgetting and intransigence.*
          ECCV 2018.
    """
    R = _square(R, higher_is_better)
    past = R[:-1, :-1]
    if past.numel() == 0:
        return past.mean()  # no earlier task: NaN
    unlearnt = torch.ones_like(past, dtype=torch.bool).triu(1)
    return (past.masked_fill(unlearnt, -math.inf).amax(dim=0) - R[-1, :-1]).mean()


def intransigence(R: Tensor, reference: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Compute the inability to learn new tasks, :math:`\frac1T \sum_j (R^*_j - R_{jj})`.

    Positive is worse. For a loss the difference is :math:`R_{jj} - R^*_j`. The paper gives it for one task; this is
    the mean over tasks.

    Args:
        R: Scores ``(T, T)``; needed is the diagonal.
        reference: :math:`R^*`, scores ``(T,)`` on task ``j`` of a model trained on the data of all tasks through ``j``.
        higher_is_better: False for a loss.

    Raises:
        ValueError: If ``R`` is not square, or ``reference`` is not one score a task.

    Example:
        >>> intransigence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), reference=torch.tensor([1.0, 1.0]))
        tensor(0.2500)

    References:
        - Chaudhry et al. *Riemannian walk for incremental learning: Understanding forgetting and intransigence.*
          ECCV 2018.
    """
    R = _square(R, higher_is_better)
    return (_per_task(reference, "reference", R, higher_is_better) - R.diagonal()).mean()


def trained_part(R: Tensor) -> Tensor:
    """Return the square part ``(t, t)`` of the tasks trained so far: up to the last row with an entry that is scored.

    Args:
        R: Scores ``(T, T)``, NaN where not scored.

    Raises:
        ValueError: If ``R`` is not square.

    Example:
        >>> trained_part(torch.tensor([[1.0, 0.5], [math.nan, math.nan]]))
        tensor([[1.]])
    """
    R = _square(R)
    rows = (~R.isnan()).any(dim=1).nonzero()
    t = int(rows.max()) + 1 if len(rows) else 0
    return R[:t, :t]


_STATES = ("score_sums", "weight_sums")


class AccuracyMatrix(Metric):
    r"""Collects the score of every task after training on every task.

    .. math::
        R_{ij} = \frac{\sum_n w_n s_n}{\sum_n w_n}
        \quad\text{over the updates } n \text{ with trained} = i,\ \text{tested} = j

    The two sums are the state, in float64. They add up over processes, so that each may score its shard (weighted by
    its number of samples) or all of it; `compute`, `baseline`, `summary` and `plot` are then collective: call them on
    all processes. ``state_dict`` holds the sums of one process; one of another size can be loaded, and the matrix
    takes the larger of both sizes.

    Args:
        num_tasks: Number of tasks, ``T``; `resize` adds more.
        higher_is_better: False for a loss or an error.
        **kwargs: Arguments of `torchmetrics.Metric`, such as ``process_group``.

    Raises:
        ValueError: If ``num_tasks`` is not positive.

    Example:
        >>> matrix = AccuracyMatrix(num_tasks=2)
        >>> matrix.update(trained=0, tested=0, score=1.0)
        >>> matrix.update(trained=1, tested=0, score=0.5)
        >>> matrix.update(trained=1, tested=1, score=0.75, weight=30)
        >>> matrix.update(trained=1, tested=1, score=0.25, weight=10)  # another shard
        >>> matrix.compute()
        tensor([[1.0000,    nan],
                [0.5000, 0.6250]], dtype=torch.float64)
        >>> matrix.summary()["forgetting"]
        0.5
    """

    is_differentiable = False
    full_state_update = False

    score_sums: Tensor  # (T + 1, T): Σ w s; row 0 is the untrained model, row i + 1 after task i
    weight_sums: Tensor  # (T + 1, T): Σ w

    def __init__(self, num_tasks: int, higher_is_better: bool = True, **kwargs: Any) -> None:
        # Without the cache, which survives `load_state_dict`; a division of T² numbers needs none.
        super().__init__(compute_with_cache=False, **kwargs)
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` must be at least 1, but got {num_tasks}. `resize` adds more tasks later.")
        self.__dict__["higher_is_better"] = higher_is_better  # torchmetrics keeps it from being set as an attribute
        self._allocate(num_tasks)

    @property
    def num_tasks(self) -> int:
        """The number of tasks, ``T``."""
        return self.weight_sums.shape[1]

    @property
    def update_called(self) -> bool:
        """Whether anything is scored, by `update` or from a loaded state."""
        return bool((self.weight_sums > 0).any())

    @property
    def baseline(self) -> Tensor:
        """The scores ``(T,)`` of the untrained model, NaN where not scored."""
        return self._synced()[0][0]

    def update(self, trained: int, tested: int, score: float | Tensor, weight: float | Tensor = 1.0) -> None:
        """Add a score to an entry, which becomes the weighted mean of all scores added to it.

        Args:
            trained: The last task trained on, or -1 for the untrained model.
            tested: The task scored.
            score: One number, such as the mean over the samples scored.
            weight: The weight of this score, such as the number of samples. Of weight 0, whatever the score, adds
                nothing.

        Raises:
            ValueError: If there is no such task, ``score`` or ``weight`` is not one number, or ``weight`` is negative
                or not finite.
        """
        row = self._row(trained)
        if not 0 <= tested < self.num_tasks:
            raise ValueError(f"`tested` must lie in [0, {self.num_tasks}), but got {tested}. `resize` adds tasks.")
        s, w = _number("score", score), _number("weight", weight)
        if not 0 <= w < math.inf:
            raise ValueError(f"`weight` must be finite and not negative, but got {w}. Pass the number of samples.")
        entry = torch.zeros_like(self.weight_sums)
        entry[row, tested] = 1
        # Not in place: states made under inference mode cannot be changed outside of it.
        self.score_sums = torch.where(entry * w > 0, self.score_sums + s * w, self.score_sums)
        self.weight_sums = self.weight_sums + entry * w

    def compute(self) -> Tensor:
        """Return R, ``(T, T)``: rows trained, columns tested, NaN where not scored."""
        return self._means()[1:]

    def clear(self, trained: int) -> None:
        """Forget the scores of one row, to score it anew (after a resume, say).

        Args:
            trained: The last task trained on, or -1 for the untrained model.

        Raises:
            ValueError: If there is no such row.
        """
        row = torch.tensor([self._row(trained)], device=self.weight_sums.device)
        self.score_sums = self.score_sums.index_fill(0, row, 0.0)
        self.weight_sums = self.weight_sums.index_fill(0, row, 0.0)

    def resize(self, num_tasks: int) -> None:
        """Grow to ``num_tasks`` tasks; the new rows and columns are not scored.

        Raises:
            ValueError: If ``num_tasks`` is less than the present number.
        """
        grown = num_tasks - self.num_tasks
        if grown < 0:
            raise ValueError(
                f"`num_tasks` must be at least the present {self.num_tasks}, but got {num_tasks}: fewer would"
                " lose scores. Make a new one."
            )
        states = [pad(state, (0, grown, 0, grown)) for state in (self.score_sums, self.weight_sums)]
        self._allocate(num_tasks)
        self.score_sums, self.weight_sums = states

    def summary(self) -> dict[str, float]:
        """Return the named numbers over the tasks trained so far, those that can be computed from what is scored.

        Left out is what needs an entry that was never scored, and transfer and forgetting after one task. A score that
        is itself NaN gives NaN.

        Returns:
            ``average_accuracy``, ``average_incremental_accuracy``, ``learning_accuracy``, ``backward_transfer``,
            ``forgetting``, and ``forward_transfer`` where the untrained model was scored.

        Example:
            >>> matrix = AccuracyMatrix(num_tasks=5)
            >>> matrix.update(trained=0, tested=0, score=0.5)
            >>> matrix.summary()
            {'average_accuracy': 0.5, 'average_incremental_accuracy': 0.5, 'learning_accuracy': 0.5}
        """
        means, weights = self._synced()
        known = torch.where(weights > 0, 0.0, math.nan)  # what needs an entry never scored, is NaN of this one
        t, better = len(trained_part(known[1:])), bool(self.higher_is_better)

        def numbers(table: Tensor) -> dict[str, Tensor]:
            baseline, R = table[0, :t], table[1 : t + 1, :t]
            return {
                "average_accuracy": average_accuracy(R),
                "average_incremental_accuracy": average_incremental_accuracy(R),
                "learning_accuracy": learning_accuracy(R),
                "backward_transfer": backward_transfer(R, better),
                "forgetting": forgetting(R, better),
                "forward_transfer": forward_transfer(R, baseline, better),
            }

        computable = numbers(known)
        return {name: value.item() for name, value in numbers(means).items() if not computable[name].isnan()}

    def plot(self, ax: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Draw the matrix as a heat map (needs matplotlib; see `report.matrix_figure` for further arguments).

        Args:
            ax: The matplotlib axes to draw into; a new figure if None.
            **kwargs: ``names``, ``title``, ``label``, ``percent``.

        Returns:
            The figure and the axes.
        """
        from lightning_continual.report import matrix_figure

        if not self.higher_is_better:
            kwargs = {"label": "loss", "percent": False, **kwargs}
        figure = matrix_figure(self.compute(), ax=ax, **kwargs)
        return figure, figure.axes[0] if ax is None else ax

    def _allocate(self, num_tasks: int) -> None:
        for name in _STATES:
            zeros = torch.zeros(num_tasks + 1, num_tasks, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum", persistent=True)

    def _means(self) -> Tensor:
        return self.score_sums / self.weight_sums  # 0 / 0 is NaN: not scored

    def _synced(self) -> tuple[Tensor, Tensor]:
        """Return the means and the weights over all processes, each ``(T + 1, T)``."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._means(), self.weight_sums

    def _row(self, trained: int) -> int:
        if not -1 <= trained < self.num_tasks:
            raise ValueError(
                f"`trained` must lie in [0, {self.num_tasks}), or be -1 for the untrained model, but got {trained}."
                " `resize` adds tasks."
            )
        return trained + 1

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(wrapped)
        def square(*args: Any, **kwargs: Any) -> Any:  # torchmetrics squeezes a result of one element
            return wrapped(*args, **kwargs).reshape(self.num_tasks, self.num_tasks)

        return square

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        # torchmetrics loads states of any shape and misses none; `state_dict` is torch's own copy.
        missing_keys += [key for key in self.state_dict(prefix=prefix) if key not in state_dict]
        loaded = {key: state_dict[key] for key in (prefix + name for name in _STATES) if key in state_dict}
        size = max([self.num_tasks, *(state.shape[-1] for state in loaded.values())])
        self.resize(size)
        for key, state in loaded.items():
            grown = size - state.shape[-1]
            state_dict[key] = pad(state.to(self.weight_sums), (0, grown, 0, grown))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


def _square(R: Tensor, higher_is_better: bool = True) -> Tensor:
    """Return R as a floating ``(T, T)``, and of a loss its negative."""
    R = R.reshape(1, 1) if R.ndim == 0 else R
    if R.ndim != 2 or R.shape[0] != R.shape[1]:
        raise ValueError(
            f"`R` must be square, with a row and a column for each task, but got shape {tuple(R.shape)}."
            " For a stream that is still running, pass `R[:t, :t]`."
        )
    R = R if R.is_floating_point() else R.to(torch.get_default_dtype())
    return R if higher_is_better else -R


def _per_task(scores: Tensor, name: str, R: Tensor, higher_is_better: bool) -> Tensor:
    scores = scores.reshape(1) if scores.ndim == 0 else scores
    if scores.shape != (len(R),):
        raise ValueError(
            f"`{name}` must have one score for each of the {len(R)} tasks of `R`, shape {(len(R),)}, but got shape"
            f" {tuple(scores.shape)}."
        )
    return scores.to(R) if higher_is_better else -scores.to(R)


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"`{name}` must be one number, but got shape {tuple(value.shape)}. Average it first.")
    return float(value.item() if isinstance(value, Tensor) else value)
