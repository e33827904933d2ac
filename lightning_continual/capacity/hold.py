"""What tasks need of a module, held while others are trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_continual.capacity.kinds import pin_of
from lightning_continual.capacity.norms import hold_statistics
from lightning_continual.capacity.wiring import Wiring
from lightning_continual.constraints import Pin


class Hold:
    """Weights and statistics of active units, held where they now are; batch norms compute with them, by hooks.

    Args:
        module: The module.
        wiring: Its wiring.
        active: Which units are active: bool ``(num_units,)``.

    Attributes:
        weights: The pin of the weights, which is to be put back after each step.
        statistics: The pin of the norms' running statistics.

    Example:
        >>> import torch
        >>> from lightning_continual.capacity.wiring import find_wiring
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> hold = Hold(model, find_wiring(model, torch.ones(1, 1)), torch.tensor([True, False, True]))
        >>> _ = model[1].running_mean.fill_(3.0)  # as an average of models does
        >>> hold.put_back_(model)
        >>> model[1].running_mean
        tensor([0., 3.])
        >>> hold.end()
    """

    def __init__(self, module: nn.Module, wiring: Wiring, active: Tensor) -> None:
        self.weights: Pin = pin_of(wiring, dict(module.named_parameters()), active)
        self.statistics: Pin = pin_of(wiring, dict(module.named_buffers()), active)
        self._ends: list[Callable[[], None]] = hold_statistics(module, wiring, active)

    def put_back_(self, module: nn.Module) -> None:
        """Put weights and statistics back where they were, in place, whatever has written to them."""
        self.weights.put_back_(dict(module.named_parameters()))
        self.statistics.put_back_(dict(module.named_buffers()))

    def put_into_(self, state_dict: dict[str, Tensor]) -> None:
        """Put weights and statistics into a ``state_dict``; see `Pin.put_into_`."""
        self.weights.put_into_(state_dict)
        self.statistics.put_into_(state_dict)

    def end(self) -> None:
        """Take the hooks away; a second time it does nothing."""
        while self._ends:
            self._ends.pop()()
