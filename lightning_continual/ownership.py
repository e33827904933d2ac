"""Who owns each weight: a network shared by tasks, each of which sees its own weights and those of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_continual.compression.ranking import keep_weights
from lightning_continual.compression.saliency import prunable
from lightning_continual.constraints import Pin
from lightning_continual.heads import task_heads
from lightning_continual.parameters import ParamDict, trainable

MOST_TASKS = 255
"""How many tasks one byte a weight tells apart from each other and from nobody."""


@dataclass(frozen=True)
class Ownership:
    r"""Which task owns each weight, in one byte a weight.

    .. math::
        o_i = \begin{cases} 0 & \text{weight } i \text{ is free} \\ t + 1 & \text{task } t \text{ owns it} \end{cases}

    A task trains the weights that are free, gives most of them back, and owns the rest for ever. Task t runs with the
    weights of tasks up to t; all others are zero to it. Nothing is changed in place.

    Args:
        owners: :math:`o`, uint8, by parameter name.

    Example:
        >>> mine = Ownership.of_nobody({"w": torch.zeros(3)}).after(0, {"w": torch.tensor([True, False, False])})
        >>> both = mine.after(1, {"w": torch.tensor([False, True, False])})
        >>> both.owners["w"], both.seen_by(0)["w"], both.free()["w"]
        (tensor([1, 2, 0], dtype=torch.uint8), tensor([ True, False, False]), tensor([False, False,  True]))

    References:
        - Mallya, Lazebnik. *PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning.* CVPR 2018.
    """

    owners: ParamDict = field(default_factory=dict)

    @classmethod
    def of_nobody(cls, parameters: Mapping[str, Tensor]) -> Ownership:
        """Return it with all of these weights free."""
        return cls({name: torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for name, p in parameters.items()})

    def __bool__(self) -> bool:
        return bool(self.owners)

    def free(self) -> ParamDict:
        """Return which weights nobody owns: bool, by name."""
        return {name: one == 0 for name, one in self.owners.items()}

    def seen_by(self, task: int) -> ParamDict:
        """Return which weights a task runs with, those of tasks up to it: bool, by name."""
        return {name: (one > 0) & (one <= task + 1) for name, one in self.owners.items()}

    def after(self, task: int, kept: Mapping[str, Tensor]) -> Ownership:
        """Return it after a task took over free weights.

        Args:
            task: The task, from 0.
            kept: Which weights it takes: bool, by name, all of them free.

        Raises:
            ValueError: If ``task`` is not one of the 255 that a byte holds, or a weight is owned already.
        """
        if not 0 <= task < MOST_TASKS:
            raise ValueError(
                f"`task` must lie in 0..{MOST_TASKS - 1}, which one byte a weight holds, but got {task}. Begin a new"
                " network."
            )
        for name, one in kept.items():
            if bool((self.owners[name][one] != 0).any()):
                raise ValueError(f"`kept` must be free weights, but some of {name!r} are owned. Pass a part of `free`.")
        return Ownership({name: one.masked_fill(kept[name], task + 1) for name, one in self.owners.items()})

    def counts(self) -> dict[str, list[int]]:
        """Return by name how many weights are free, and how many each task owns: ``(1 + num_tasks)`` numbers."""
        length = 1 + max((int(one.max()) for one in self.owners.values() if one.numel()), default=0)
        return {name: one.flatten().bincount(minlength=length).tolist() for name, one in self.owners.items()}

    def aligned_with(self, parameters: Mapping[str, Tensor]) -> Ownership:
        """Return it on the devices of parameters.

        Raises:
            ValueError: If a parameter is gone or of another shape; the error names it.
        """
        for name, one in self.owners.items():
            if name not in parameters or parameters[name].shape != one.shape:
                found = f"has shape {tuple(parameters[name].shape)}" if name in parameters else "is not there"
                raise ValueError(
                    f"Parameter {name!r} must have shape {tuple(one.shape)}, with which tasks own its weights, but"
                    f" {found}. Restore into a module of the same architecture; a head that grows belongs to `head`."
                )
        return Ownership({name: one.to(parameters[name].device) for name, one in self.owners.items()})


def smallest_freed(
    parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor], shares: Mapping[str, float]
) -> ParamDict:
    r"""Say which of the weights just trained stay, when of each layer the smallest are given back.

    .. math::
        |\{\text{given back}\}| = \min(\mathrm{round}(p_l\, n_l),\; n_l - 1)

    of the :math:`n_l` weights of layer l just trained, those of least :math:`|w|`; among equal ones the first. Weights
    that are zero, which training has not moved, all go.

    Args:
        parameters: The weights, by name.
        trained: Which of them were trained: bool, by name.
        shares: :math:`p_l` in [0, 1], by name.

    Returns:
        Which stay: bool, by name of ``trained``, part of it.

    Raises:
        ValueError: If a share lies outside [0, 1], or weights are NaN.

    Example:
        The last weight was not trained; of the other three a third goes.

        >>> trained = {"w": torch.tensor([True, True, True, False])}
        >>> smallest_freed({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}, trained, {"w": 1 / 3})
        {'w': tensor([ True, False,  True, False])}
    """
    kept = {}
    for name, mine in trained.items():
        share = shares[name]
        if not 0 <= share <= 1:
            raise ValueError(f"`shares` must lie in [0, 1], but got {share} for {name!r}.")
        kept[name] = mine.clone()
        sizes = parameters[name].detach()[mine].abs()
        if len(sizes):
            amount = min(share, (len(sizes) - 1) / len(sizes))
            kept[name][mine] = keep_weights({name: sizes}, amount, scope="layer")[name] & (sizes > 0)
    return kept


def prune_(parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor], shares: Mapping[str, float]) -> ParamDict:
    """Set the smallest of the weights just trained to zero, in place; see `smallest_freed`.

    Returns:
        Which stay: bool, by name.

    Example:
        >>> weight = torch.tensor([3.0, -1.0])
        >>> prune_({"w": weight}, {"w": torch.tensor([True, True])}, {"w": 0.5})
        {'w': tensor([ True, False])}
        >>> weight
        tensor([3., 0.])
    """
    kept = smallest_freed(parameters, trained, shares)
    for name, one in kept.items():
        parameters[name].detach().masked_fill_(trained[name] & ~one, 0)
    return kept


def pin_but(parameters: Mapping[str, Tensor], free: Mapping[str, Tensor], held: Sequence[str]) -> Pin:
    """Return the pin that holds all weights that are not free where they are, and whole parameters.

    Args:
        parameters: All parameters, by name.
        free: Which weights are trained: bool, by name.
        held: The names of parameters that are held as a whole.

    Example:
        >>> pin = pin_but({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.tensor([True, False])}, ["b"])
        >>> pin.pinned
        {'w': tensor([False,  True]), 'b': tensor([True])}
    """
    whole = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in held}
    owned = {name: ~one for name, one in free.items()}
    return Pin.at(parameters, {name: one for name, one in {**owned, **whole}.items() if bool(one.any())})


@dataclass(frozen=True)
class Parts:
    """Which parameters of a module are treated how, by name.

    Args:
        weights: Those whose single weights have owners.
        own: Those of which each task has a copy of its own.
        heads: For each task the parameters of its layers in a `TaskHead`.
        rest: All others that are trained: biases, norms, embeddings, and weights not asked for.
        norms: The modules that keep running statistics, but for those in a head of which each task has a copy.
        statistics: These statistics, which are buffers.
        buffers: All other buffers of the state, which training may change whatever is held.
    """

    weights: list[str]
    own: list[str]
    heads: list[list[str]]
    rest: list[str]
    norms: list[str]
    statistics: list[str]
    buffers: list[str]

    def of_each_task(self, *, rest: bool) -> list[str]:
        """Return the parameters and buffers that each task has for itself; with ``rest`` norms and all else, too."""
        return [*self.own, *self.buffers, *([*self.rest, *self.statistics] if rest else ())]


def parts_of(module: nn.Module, parameters: Sequence[str], head: Sequence[str]) -> Parts:
    """Divide the parameters of a module.

    Args:
        module: Any module.
        parameters: Patterns of the weights that have owners; of these, what `prunable` returns is taken.
        head: Patterns of parameters of which each task has a copy of its own.

    Raises:
        ValueError: If a pattern names nothing.

    Example:
        >>> from lightning_continual.heads import TaskHead
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), TaskHead(3, 2, num_tasks=2))
        >>> parts = parts_of(model, ["*"], [])
        >>> parts.weights, parts.rest, parts.norms
        (['0.weight'], ['0.bias', '1.weight', '1.bias'], ['1'])
        >>> parts.heads
        [['2.layers.0.weight', '2.layers.0.bias'], ['2.layers.1.weight', '2.layers.1.bias']]
    """
    named, weights = list(trainable(module)), prunable(module)
    heads: list[list[str]] = []
    for prefix, one in task_heads(module).items():
        for task, layer in enumerate(one.layers):
            heads += [[] for _ in range(task + 1 - len(heads))]
            heads[task] += [f"{prefix}.layers.{task}.{name}".lstrip(".") for name, _ in layer.named_parameters()]
    taken = {name for names in heads for name in names}
    own = [name for name in named if name not in taken and _matches(name, head)]
    owned = [name for name in weights if name not in {*taken, *own} and _matches(name, parameters)]
    for argument, patterns, there in (("parameters", parameters, list(weights)), ("head", head, named)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in there):
                raise ValueError(f"`{argument}` has the pattern {pattern!r}, which names none of {there}.")
    rest = [name for name in named if name not in {*taken, *own, *owned}]
    norms = {
        name: one
        for name, one in module.named_modules()
        if isinstance(one, _NormBase) and one.running_mean is not None and not _matches(f"{name}.running_mean", head)
    }
    statistics = [f"{name}.{buffer}".lstrip(".") for name, one in norms.items() for buffer, _ in one.named_buffers()]
    saved = module.state_dict().keys() - {*statistics}
    others = [name for name, _ in module.named_buffers() if name in saved]
    return Parts(owned, own, heads, rest, list(norms), statistics, others)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters and buffers of a module have other values for a while, by name; their own return to the bit.

    Values are written in place, so that views of them (as recurrent layers keep) have them too.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with holding(layer, {"weight": torch.tensor([[2.0]])}):
        ...     layer(torch.tensor([[3.0]])).item()
        6.0
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    saved = {name: own[name].detach().clone() for name in tensors}
    try:
        for name, value in tensors.items():
            own[name].data.copy_(value)
        yield
    finally:
        for name, value in saved.items():
            own[name].data.copy_(value)


def blocks_of(sizes: Mapping[str, int], num_blocks: int) -> list[list[str]]:
    """Divide layers into blocks that follow each other, of about as many weights.

    A layer is in block b where its middle weight lies in the b-th part of all; blocks that would be empty take the
    layer nearest to them.

    Args:
        sizes: The number of weights of each layer, in the order of the network.
        num_blocks: How many blocks.

    Returns:
        The names of the layers of each block.

    Raises:
        ValueError: If there are fewer layers than blocks.

    Example:
        >>> blocks_of({"a": 10, "b": 50, "c": 50}, 2)
        [['a', 'b'], ['c']]
    """
    names, total = list(sizes), sum(sizes.values())
    if not 1 <= num_blocks <= len(names):
        raise ValueError(f"`blocks` must lie in 1..{len(names)}, the number of layers, but got {num_blocks}.")
    blocks: list[list[str]] = [[] for _ in range(num_blocks)]
    before, block = 0, 0
    for number, name in enumerate(names):
        wanted = int((before + sizes[name] / 2) * num_blocks / total) if total else 0
        # Each block takes a layer at least, and leaves one for each block to come.
        least = num_blocks - (len(names) - number)
        block = min(max(wanted, least, block), block + bool(blocks[block]), num_blocks - 1)
        blocks[block].append(name)
        before += sizes[name]
    return blocks


def least_share(free: int, total: int, floor: float, tasks_to_come: int) -> float:
    r"""Return the least share of the free weights to give back, so that tasks to come find enough.

    .. math:: p_{\min} = \frac{f\, (T - 1 - t)\, N}{n}

    Each task to come is to find :math:`f N` weights that are its own.

    Args:
        free: :math:`n`, the weights that the task has trained.
        total: :math:`N`, all weights.
        floor: :math:`f`.
        tasks_to_come: :math:`T - 1 - t`.

    Raises:
        ValueError: If it is more than 1: there are too few free weights left.

    Example:
        >>> least_share(free=80, total=100, floor=0.2, tasks_to_come=2)
        0.5
    """
    needed = floor * max(0, tasks_to_come) * total
    if needed > free:
        raise ValueError(
            f"`floor={floor}` must leave {needed:.0f} free weights for {tasks_to_come} tasks to come, but only {free}"
            " are left. Lower `floor`, or use a larger network."
        )
    return needed / free if free else 0.0
