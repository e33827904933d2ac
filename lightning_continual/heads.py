"""Output layers that know the task: an output layer of its own for every task, of which one is in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class TaskHead(nn.Module):
    r"""An output layer for every task, of which that of the current `task` is in use.

    .. math:: z_t = W_t h + b_t, \qquad W_t \in \mathbb R^{O_t \times D}

    For task-incremental use, where the task of an input is known. Each task has parameters of its own: those of the
    other tasks are not computed and get no gradient, so that no optimizer moves them. The head follows `task`, which
    `TaskStream` (or, where one fit is one task, any callback of this package) sets to the task in training, and
    `AccuracyMatrixCallback` to the task that it scores; in ``trainer.validate``, ``test`` and ``predict`` with several
    loaders these callbacks set it to the number of the loader. After a fit it stays at the task last trained.

    All samples of a batch are of one task. (Rehearsal mixes tasks in a batch: for it use one output layer for all.)

    With None as task the outputs of all tasks stand side by side: class-incremental inference, where the task of an
    input is not known.

    Args:
        in_features: :math:`D`.
        out_features: The number of outputs of every task, or a list of :math:`O_t`, one a task.
        num_tasks: How many tasks there can be.
        masked: Whether the outputs always are those of all tasks, :math:`\sum_t O_t`, in the order of the tasks, with
            :math:`-\infty` at those of other tasks. Labels are then numbered through all tasks, as in
            `split_by_class` with classes in ascending order, else within a task.

    Raises:
        ValueError: If a number is less than 1, or ``out_features`` has not one number a task.

    Example:
        Two outputs for the first task, one for the second.

        >>> head = TaskHead(4, [2, 1], num_tasks=2)
        >>> head.task = 1
        >>> head(torch.ones(5, 4)).shape
        torch.Size([5, 1])
        >>> head(torch.ones(5, 4), task=0).shape, head(torch.ones(5, 4), task=None).shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
        >>> TaskHead(4, [2, 1], num_tasks=2, masked=True)(torch.ones(1, 4), task=0)[0, 2]
        tensor(-inf, grad_fn=<SelectBackward0>)
    """

    def __init__(
        self, in_features: int, out_features: int | Sequence[int], *, num_tasks: int, masked: bool = False
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` must be at least 1, but got {num_tasks}.")
        outputs = [out_features] * num_tasks if isinstance(out_features, int) else list(out_features)
        if len(outputs) != num_tasks:
            raise ValueError(
                f"`out_features` must be one number, or one for each of {num_tasks} tasks, but got {outputs}."
            )
        for name, least in (("in_features", in_features), ("out_features", min(outputs))):
            if least < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {least}.")
        self.in_features = in_features
        self.out_features = outputs
        self.masked = masked
        self.layers = nn.ModuleList(nn.Linear(in_features, number) for number in outputs)
        self._task: int | None = None

    @property
    def num_tasks(self) -> int:
        """How many tasks there can be."""
        return len(self.out_features)

    @property
    def task(self) -> int | None:
        """The task whose outputs `forward` gives, from 0; None for all. It is not saved with the weights."""
        return self._task

    @task.setter
    def task(self, task: int | None) -> None:
        self._task = self._checked(task)

    def forward(self, x: Tensor, task: int | Tensor | Literal["current"] | None = "current") -> Tensor:
        r"""Return the outputs of one task, or of all.

        Args:
            x: Features ``(B, *, D)``.
            task: The task, from 0, or None for all; by default the one in `task`.

        Returns:
            Outputs ``(B, *, O_t)``; for None, or where ``masked``, ``(B, *, O)`` with :math:`O = \sum_t O_t`.

        Raises:
            ValueError: If there is no such task, or more than one.
        """
        task = self._task if not isinstance(task, Tensor) and task == "current" else self._checked(task)
        if task is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        outputs: Tensor = self.layers[task](x)
        if not self.masked:
            return outputs
        before, after = sum(self.out_features[:task]), sum(self.out_features[task + 1 :])
        return nn.functional.pad(outputs, (before, after), value=float("-inf"))

    def extra_repr(self) -> str:
        """Return what `print` shows of it."""
        return f"{self.in_features}, {self.out_features}, masked={self.masked}, task={self.task}"

    def _checked(self, task: int | Tensor | None) -> int | None:
        if isinstance(task, Tensor):
            if task.numel() != 1:
                raise ValueError(
                    f"`task` must be one number for all samples, but got a tensor of shape {tuple(task.shape)}. Pass"
                    " `int(task[0])`, and let all samples of a batch be of one task."
                )
            task = int(task)
        if task is not None and not 0 <= task < self.num_tasks:
            raise ValueError(
                f"`task` must lie in 0..{self.num_tasks - 1}, or be None for the outputs of all tasks, but got {task}."
                " Make the `TaskHead` with a larger `num_tasks`."
            )
        return task


def task_heads(module: nn.Module) -> dict[str, TaskHead]:
    """Return the task heads in a module, by name.

    Example:
        >>> list(task_heads(nn.Sequential(nn.ReLU(), TaskHead(2, 3, num_tasks=2))))
        ['1']
    """
    return {name: one for name, one in module.named_modules() if isinstance(one, TaskHead)}


def require_tasks(module: nn.Module, num_tasks: int) -> None:
    """Raise unless every task head in a module serves so many tasks.

    Raises:
        ValueError: If one serves fewer; the error names it.

    Example:
        >>> require_tasks(TaskHead(2, 3, num_tasks=2), num_tasks=2)
    """
    for name, head in task_heads(module).items():
        if head.num_tasks < num_tasks:
            raise ValueError(
                f"`num_tasks` of the `TaskHead` {name!r} must be at least {num_tasks}, the number of tasks, but is"
                f" {head.num_tasks}. Make it with `num_tasks={num_tasks}`."
            )


def set_task(module: nn.Module, task: int | None) -> None:
    """Let every task head in a module give the outputs of a task.

    Args:
        module: Any module; without task heads nothing happens.
        task: The task, from 0, or None for all tasks.

    Raises:
        ValueError: If a head serves no such task; none is changed then.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), TaskHead(2, 3, num_tasks=2))
        >>> set_task(model, 1)
        >>> model[1].task
        1
    """
    if task is not None:
        require_tasks(module, task + 1)
    for head in task_heads(module).values():
        head.task = task


@contextmanager
def at_task(module: nn.Module, task: int | None) -> Iterator[None]:
    """Let every task head in a module give the outputs of a task for a while.

    Args:
        module: Any module; without task heads nothing happens.
        task: The task, from 0, or None for all tasks.

    Raises:
        ValueError: If a head serves no such task.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), TaskHead(2, 3, num_tasks=2))
        >>> with at_task(model, 1):
        ...     model(torch.ones(1, 2)).shape
        torch.Size([1, 3])
        >>> model(torch.ones(1, 2)).shape
        torch.Size([1, 6])
    """
    before = {head: head.task for head in task_heads(module).values()}
    set_task(module, task)
    try:
        yield
    finally:
        for head, own in before.items():
            head.task = own
