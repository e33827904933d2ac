"""What is known of tasks that share one network: whose the weights are, what each has for itself, what was searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_continual.compression.surgery import copy_of
from lightning_continual.heads import at_task
from lightning_continual.ownership import Ownership, Parts, holding
from lightning_continual.parameters import ParamDict, evaluating
from lightning_continual.search import Found


@dataclass(frozen=True)
class Packed:
    """The tasks in a network. Nothing is changed in place.

    Args:
        ownership: Which task owns each weight.
        copies: For each task the parameters and buffers that it has for itself, by name.
        found: For each task what was found for it.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> packed = Packed(Ownership.of_nobody({"weight": layer.weight}))
        >>> packed = packed.after(0, {"weight": torch.tensor([[True, False]])}, {}, Found((0.5,), (2,)))
        >>> packed.free_share
        0.5
        >>> with packed.as_task(layer, 0):
        ...     layer.weight[0, 1].item()
        0.0
    """

    ownership: Ownership = field(default_factory=Ownership)
    copies: dict[int, ParamDict] = field(default_factory=dict)
    found: dict[int, Found] = field(default_factory=dict)

    @property
    def tasks(self) -> list[int]:
        """The tasks learnt, from 0."""
        return list(self.found)

    @property
    def free_share(self) -> float:
        """The share of the weights that nobody owns; 1 before the first task."""
        total = sum(one.numel() for one in self.ownership.owners.values())
        return sum(int((one == 0).sum()) for one in self.ownership.owners.values()) / total if total else 1.0

    def aligned_with(self, parameters: Mapping[str, Tensor], parts: Parts) -> Packed:
        """Return it for a module as it stands; before the first task all its weights are free.

        Raises:
            ValueError: If a weight with owners is gone or of another shape, or one has none; if there are no weights.
        """
        if not self.found and not parts.weights:
            raise ValueError(
                "`parameters` must name weights that are trained and that tasks can share, but names none outside of"
                " the heads. Train more than the heads (`requires_grad`), or name fewer layers by `head`."
            )
        if not self.found:
            return Packed(Ownership.of_nobody({name: parameters[name] for name in parts.weights}))
        if new := [name for name in parts.weights if name not in self.ownership.owners]:
            raise ValueError(
                f"All weights must have been there, and been trained, since the first task, but {new} were not. Freeze"
                " them, or name what belongs to a task alone by `head`."
            )
        return Packed(self.ownership.aligned_with(parameters), self.copies, self.found)

    def require_after(self, task: int) -> None:
        """Raise a ValueError unless a task comes after those learnt."""
        if self.found and task <= max(self.found):
            raise ValueError(
                f"Task {task} must come after the tasks learnt, {self.tasks}, whose weights are held. Set"
                " `current_task` of the data module before each fit, or begin with a new callback and module."
            )

    def held(self, parts: Parts, *, rest: bool) -> list[str]:
        """Return the names of the parameters that tasks learnt hold as a whole: their heads, and maybe the ``rest``."""
        heads = [name for task in self.found for name in (parts.heads[task] if task < len(parts.heads) else ())]
        return [*heads, *(parts.rest if self.found and rest else ())]

    def after(self, task: int, kept: Mapping[str, Tensor], copies: ParamDict, found: Found) -> Packed:
        """Return it after another task, which takes over free weights; see `Ownership.after`.

        What has not changed since the task before is kept in memory, and saved, once.
        """
        last = self.copies.get(max(self.copies, default=task), {})
        own = {
            name: last[name] if name in last and _is_same(last[name], value) else value.detach().clone()
            for name, value in copies.items()
        }
        return Packed(self.ownership.after(task, kept), {**self.copies, task: own}, {**self.found, task: found})

    @contextmanager
    def as_task(self, model: nn.Module, task: int) -> Iterator[None]:
        """Let a model be what a task sees for a while, in evaluation mode; meanwhile there is one copy of its weights.

        Raises:
            ValueError: If the task has not been learnt, or the model does not fit.
        """
        if task not in self.found:
            raise ValueError(f"`task` must be one of the tasks learnt, {self.tasks}, but got {task}.")
        parameters = dict(model.named_parameters())
        seen = self.ownership.aligned_with(parameters).seen_by(task)
        tensors = {name: parameters[name].detach().masked_fill(~one, 0) for name, one in seen.items()}
        with evaluating(model), at_task(model, task), holding(model, {**tensors, **self.copies[task]}):
            yield

    def export(self, model: nn.Module, task: int) -> nn.Module:
        """Return a copy of a model as a task sees it, for good, frozen and in evaluation mode."""
        with self.as_task(model, task):
            copied = copy_of(model)
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
        return copied.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; of owners one byte a weight."""
        return {
            "owners": dict(self.ownership.owners),
            "copies": {str(task): dict(one) for task, one in self.copies.items()},
            "found": {str(task): one.state_dict() for task, one in self.found.items()},
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Packed:
        """Return what `state_dict` was taken of."""
        found = {int(task): Found.from_state_dict(one) for task, one in state_dict["found"].items()}
        copies = {int(task): dict(one) for task, one in state_dict["copies"].items()}
        return cls(Ownership(dict(state_dict["owners"])), copies, found)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
