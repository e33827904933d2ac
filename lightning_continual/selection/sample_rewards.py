"""What each arm of samples gives in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_continual import _batch, _host
from lightning_continual.parameters import evaluating, trainable

Reward: TypeAlias = Literal["loss_progress", "grad_norm", "memory_loss"]


class SampleRewards:
    """Measures before and after a step, and leaves no trace of it on the module.

    All processes make the same number of passes through ``training_step``, which may speak with the others: those that
    have fewer arms repeat one, and discard what it gives.

    Args:
        reward: What is measured.
        losses: Returns the losses ``(B,)`` of module and batch.
    """

    def __init__(self, reward: Reward, losses: Callable[[Any, Any], Tensor] | None) -> None:
        self.reward, self.losses = reward, losses
        self.forget()

    def forget(self) -> None:
        """Drop what was measured before a step."""
        self._before: Tensor | None = None
        self._trained = torch.empty(0, dtype=torch.int64)
        self._held: Any = None
        self._num_passes = 0

    @property
    def is_measuring(self) -> bool:
        """Whether the step now taken is measured."""
        return self._before is not None

    @property
    def lacks_exemplars(self) -> bool:
        """Whether there is nothing whose loss could be measured, as nothing is remembered yet."""
        return self.reward == "memory_loss" and self._held is None

    def before_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        trained: Tensor,
        num_arms: int,
        draw_held: Callable[[], Any],
    ) -> None:
        """Measure before a step.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            batch: What is trained.
            trained: The arm of each of its samples ``(B,)``.
            num_arms: K.
            draw_held: Returns a batch of exemplars of earlier tasks, or None.
        """
        self._trained = trained
        with self._looking(pl_module):
            self._held = draw_held() if self.reward == "memory_loss" else None
            passes = self._passes(batch)
            self._num_passes = max(_host.gather_everywhere(len(passes)))
            self._before = self._measure(trainer, pl_module, batch, passes, num_arms)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor:
        """Return what the step gave each arm ``(K,)``; NaN for arms that were not trained."""
        assert self._before is not None
        if self.reward == "grad_norm":
            return self._before
        with self._looking(pl_module):
            return self._before - self._measure(trainer, pl_module, batch, self._passes(batch), len(self._before))

    def losses_of(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor:
        """Return the losses ``(B,)`` that the user's function gives, in the precision of the training."""
        assert self.losses is not None
        with trainer.precision_plugin.train_step_context():
            losses = self.losses(pl_module, batch)
        size = _batch.size(batch)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"`losses` must return one loss a sample, ({size},), but got {shape}. Compute the loss with"
                " `reduction='none'`."
            )
        return losses

    @contextmanager
    def _looking(self, pl_module: L.LightningModule) -> Iterator[None]:
        with _host.without_trace(pl_module), evaluating(pl_module), torch.set_grad_enabled(self.reward == "grad_norm"):
            yield

    def _passes(self, batch: Any) -> list[tuple[Tensor, Any]]:
        """Return batches to be passed through the module, each with the arms that its value is of."""
        arms = torch.unique(self._trained)
        if self.reward == "memory_loss":
            return [] if self._held is None else [(arms, self._held)]
        if self.reward == "loss_progress" and self.losses is not None:
            return [(arms, batch)]
        leaves, rebuild = _batch.flatten(batch)
        places = [(self._trained == arm).nonzero().flatten() for arm in arms]
        return [(arm.reshape(1), rebuild(_batch.take(leaves, own))) for arm, own in zip(arms, places, strict=True)]

    def _measure(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        passes: list[tuple[Tensor, Any]],
        num_arms: int,
    ) -> Tensor:
        """Return what is measured for each arm ``(K,)``; NaN for arms that are not trained now."""
        values = torch.full((num_arms,), torch.nan, dtype=torch.float64)
        if self.reward == "loss_progress" and self.losses is not None:
            losses = self.losses_of(trainer, pl_module, batch).double().cpu()
            sums = torch.zeros_like(values).index_add_(0, self._trained, losses)
            arms = torch.unique(self._trained)
            values[arms] = (sums / torch.bincount(self._trained, minlength=num_arms))[arms]
            return values
        for number in range(self._num_passes):
            if number < len(passes):
                arms, some = passes[number]
                values[arms] = self._value(trainer, pl_module, some)
            else:
                self._value(trainer, pl_module, passes[0][1] if passes else batch)  # for the other processes
        return values

    def _value(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> float:
        if self.losses is not None:
            loss = self.losses_of(trainer, pl_module, batch).mean()
        else:
            output = _host.training_output(trainer, batch)
            if output is None:  # nothing is trained on such a batch
                return torch.nan
            loss = _host.loss_of(output)
        if self.reward == "grad_norm":
            weights = list(trainable(pl_module).values())
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            loss = torch.stack(torch._foreach_norm(gradients)).norm()
        return float(loss)
