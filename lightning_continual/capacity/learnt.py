"""What is known of the tasks learnt: which units they are in, and which outputs are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_continual.capacity.counts import UnitCounts, count_units
from lightning_continual.capacity.kinds import cut_weights
from lightning_continual.capacity.task_view import only_outputs
from lightning_continual.capacity.wiring import Wiring
from lightning_continual.compression.surgery import copy_of
from lightning_continual.heads import at_task, task_heads
from lightning_continual.parameters import ParamDict, evaluating


@dataclass(frozen=True)
class Learnt:
    """The units and outputs that tasks are in.

    Args:
        active: By layer which units are active; the output layers come last.
        outputs: By task its outputs, counted from 0 over all output layers.
        counts: The units of every layer after each task.
        searches: By task what the search of its threshold found: the score before the cut, after it, the threshold.

    Example:
        >>> units = Wiring({"0": range(2)}, {"1": range(2, 4)}, {}, {})
        >>> learnt = Learnt().aligned_with(units).after(0, units, torch.tensor([True, False, True, False]), [2])
        >>> learnt.active["0"], learnt.outputs, learnt.free_units()
        (tensor([ True, False]), {0: [0]}, {'0': 1})
    """

    active: ParamDict = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    counts: list[UnitCounts] = field(default_factory=list)
    searches: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def units(self) -> Tensor:
        """Which units are active: bool ``(num_units,)``, numbered as in the `Wiring`."""
        return torch.cat([one.cpu() for one in self.active.values()])

    def aligned_with(self, wiring: Wiring) -> Learnt:
        """Return it with all layers of a wiring, none of whose units is active if nothing is known yet.

        Raises:
            ValueError: If it was learnt with other layers.
        """
        sizes = {name: len(one) for name, one in {**wiring.layers, **wiring.outputs}.items()}
        known = {name: len(one) for name, one in self.active.items()}
        if not known:
            return Learnt({name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()})
        if known != sizes:
            raise ValueError(
                f"The module must have the units that tasks were learnt with, {known}, but has {sizes}. Restore into a"
                " module of the same architecture."
            )
        return self

    def require_cut(self, wiring: Wiring, parameters: Mapping[str, Tensor]) -> None:
        """Raise a ValueError unless what was cut is zero in a module's parameters."""
        for name, places in cut_weights(wiring, parameters, self.units).items():
            if bool((parameters[name].detach()[places] != 0).any()):
                raise ValueError(
                    f"Weights of {name!r} were cut, and must be zero, but are not: the module's weights are not those"
                    " that the tasks were learnt with. Restore both from one checkpoint."
                )

    def require_free(self, outputs: Tensor, task: int, num_tasks: int | None = None) -> None:
        """Raise a ValueError if tasks have some of these outputs already, or there are to be no more tasks.

        Args:
            outputs: The outputs, numbered as in the `Wiring`.
            task: The task to be learnt.
            num_tasks: How many tasks the units are to last for.
        """
        if num_tasks is not None and task >= num_tasks:
            raise ValueError(
                f"`num_tasks` must be at least {task + 1}, for task {task} is to be learnt, but got {num_tasks}. Pass"
                " the number of all tasks."
            )
        if bool(self.units[outputs].any()):
            raise ValueError(
                f"Task {task} must have outputs of its own, but earlier tasks have some of them, which are held. Use a"
                " `TaskHead`, or pass `classes` that are other ones for each task."
            )

    def full_layers(self, wiring: Wiring) -> str:
        """Return what there is to say of layers without free units; empty where there are none."""
        full = {name: len(units) for name, units in wiring.layers.items() if bool(self.active[name].all())}
        return ", ".join(f"{name!r} (0 of {size})" for name, size in full.items())

    def after(
        self,
        task: int,
        wiring: Wiring,
        reached: Tensor,
        outputs: list[int],
        search: dict[str, float] | None = None,
    ) -> Learnt:
        """Return what is known after another task, which the units ``reached`` are in."""
        active, ranges = self.units | reached, {**wiring.layers, **wiring.outputs}
        first = min(one.start for one in wiring.outputs.values())
        return Learnt(
            {name: active[one.start : one.stop].clone() for name, one in ranges.items()},
            {**self.outputs, task: [one - first for one in outputs]},
            [*self.counts, *count_units(wiring, task, self.units, reached)],
            {**self.searches, **({} if search is None else {task: search})},
        )

    def free_units(self) -> dict[str, int]:
        """Return how many units of each layer are free after the last task."""
        last = max((one.task for one in self.counts), default=0)
        return {one.layer: one.free for one in self.counts if one.task == last}

    def reused_units(self) -> dict[str, list[int]]:
        """Return for each layer how many units of earlier tasks each task has used."""
        layers = dict.fromkeys(one.layer for one in self.counts)
        return {layer: [one.reused for one in self.counts if one.layer == layer] for layer in layers}

    @contextmanager
    def as_task(self, model: nn.Module, task: int) -> Iterator[None]:
        """Let a model be what a task sees for a while: in evaluation mode, with the task's outputs.

        Raises:
            ValueError: If the task has not been learnt.
        """
        if task not in self.outputs:
            raise ValueError(f"`task` must be one of the tasks learnt, {list(self.outputs)}, but got {task}.")
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(at_task(model, task))
            if not task_heads(model):
                stack.enter_context(only_outputs(model, list(self.active)[-1], self.outputs[task]))
            yield

    def export_task(self, model: nn.Module, task: int) -> nn.Module:
        """Return a copy of a model as a task sees it, for good: in evaluation mode, without gradients."""
        with self.as_task(model, task):
            copied = copy_of(model)
        return copied.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "active": dict(self.active),
            "outputs": {str(task): list(one) for task, one in self.outputs.items()},
            "counts": [asdict(one) for one in self.counts],
            "searches": {str(task): dict(one) for task, one in self.searches.items()},
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Learnt:
        """Return what `state_dict` was taken of."""
        counts = [UnitCounts(**one) for one in state_dict["counts"]]
        outputs, searches = (
            {int(task): value.copy() for task, value in state_dict[name].items()} for name in ("outputs", "searches")
        )
        return cls(dict(state_dict["active"]), outputs, counts, searches)
