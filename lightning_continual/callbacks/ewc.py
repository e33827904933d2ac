"""Elastic weight consolidation: weights that past tasks need are held softly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_continual import _batch, _host
from lightning_continual._datasets import require_num_samples
from lightning_continual.constraints import QuadraticPenalty
from lightning_continual.data import seed_of
from lightning_continual.importance import batched_fisher, empirical_fisher, exact_fisher, sampled_fisher
from lightning_continual.parameters import ParamDict, evaluating, trainable
from lightning_continual.stream import ContinualCallback

Kind: TypeAlias = Literal["empirical", "exact", "sampled", "batched"]


class EWCCallback(ContinualCallback):
    r"""Holds the weights that past tasks need, as far as they need them.

    After tasks 1, ..., t training minimises

    .. math:: L(\theta) + \frac\lambda2 \sum_{s \le t} \sum_i F_{s,i} (\theta_i - \theta^*_{s,i})^2

    with :math:`\theta^*_s` the weights at the end of task s and :math:`F_s` the diagonal of the Fisher information on
    its data, a mean over samples of squares of *per-sample* gradients, so that λ does not depend on the batch size.

    The penalty's gradient is added to ``p.grad`` before the optimizer's step, where gradients are unscaled,
    accumulated and reduced, and not yet clipped: the step is that of a penalty written into the loss, for any
    optimizer, precision and strategy. All tasks together cost two tensors a weight. In the last step of an epoch with
    fewer batches than ``accumulate_grad_batches``, too, the penalty has its full strength. A step for which
    ``training_step`` returned ``None`` stays without one. As ``ewc/penalty`` the penalty, times λ, is logged after
    the step. With parameters sharded by FSDP2 the penalty is sharded alike; for the estimate each process holds the
    whole network for a while.

    Args:
        strength: λ. 0 does nothing.
        fisher: ``"empirical"`` (the labels of the data; any loss), ``"exact"`` (the expectation over the labels of a
            classifier), ``"sampled"`` (one label drawn from the model), ``"batched"`` (squares of batch means, for
            comparison only), or a function of module and batches that returns one tensor a parameter, a mean over
            samples; it is called in evaluation mode, on each process's share of the data, and averaged over processes.
        decay: γ in (0, 1], by which the old penalty fades at each boundary:
            :math:`\Lambda \leftarrow \gamma\Lambda + F`.
        online: Whether the whole penalty moves to the latest weights (Schwarz et al.), instead of each task's staying
            at its own.
        num_samples: Samples of the training data for the Fisher information, over all processes; all by default.
        loss: For a module whose ``training_step`` cannot be called alone (manual optimization), or is not a mean over
            samples: returns the loss of module and batch, a mean, or one loss a sample ``(B,)``.
        logits: For ``"exact"`` and ``"sampled"``: returns the logits ``(B, C)`` of module and batch; by default the
            module's output for the first part of the batch.
        parameters: Patterns of the names of parameters to hold, as ``"backbone.*"``; those frozen are left out.

    Raises:
        ValueError: If an argument lies outside its range; if the Fisher information is not finite (the parameter and
            the batch are named, and the old penalty stands); if a penalised parameter is gone or of another shape.
        MisconfigurationException: If the strategy hides gradients, the module needs ``loss``, or the optimizer
            searches along a line.

    Example:
        >>> EWCCallback(strength=100.0).penalty
        QuadraticPenalty(precision={}, shift={}, residual=0.0)

    References:
        - Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017.
        - Schwarz et al. *Progress & Compress.* ICML 2018 (online EWC).
        - van de Ven. *On the Computation of the Fisher Information in Continual Learning.* ICLR Blogposts 2025.
    """

    def __init__(
        self,
        strength: float,
        *,
        fisher: Kind | Callable[[Any, Any], ParamDict] = "empirical",
        decay: float = 1.0,
        online: bool = False,
        num_samples: int | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any, Any], Tensor] | None = None,
        parameters: str | Sequence[str] = "*",
    ) -> None:
        super().__init__()
        if not 0 <= strength < math.inf:
            raise ValueError(f"`strength` must be at least 0 and finite, but got {strength}.")
        if not 0 < decay <= 1:
            raise ValueError(
                f"`decay` must lie in (0, 1], but got {decay}. Pass 1.0 to hold all tasks alike, less to let older ones"
                " fade."
            )
        if not callable(fisher) and fisher not in get_args(Kind):
            raise ValueError(f"`fisher` must be one of {get_args(Kind)} or a function, but got {fisher!r}.")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, but got {num_samples}. Leave it out to use all.")
        self.strength = strength
        self.fisher = fisher
        self.decay = decay
        self.online = online
        self.num_samples = num_samples
        self.loss = loss
        self.logits = logits
        self.parameters = [parameters] if isinstance(parameters, str) else list(parameters)
        self.penalty = QuadraticPenalty()
        self._is_checked = False  # in this fit

    # --- During training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that gradients can be seen, and the loss computed."""
        super().setup(trainer, pl_module, stage)
        self._is_checked = False
        if stage != "fit" or self.strength == 0:
            return
        _host.require_visible_gradients(trainer, type(self).__name__, sharded=True)
        if self.fisher in ("empirical", "batched") and self.loss is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"`EWCCallback(fisher={self.fisher!r})` takes the loss from `training_step`, but with manual"
                " optimization that makes a step. Pass `loss=`, a function of module and batch."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit what is known to the module as it stands, and check that its data can be read anew."""
        if self.strength > 0:
            self._fit_to(pl_module)
            names = [name for name, _ in pl_module.named_parameters()]
            for pattern in self.parameters:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"`parameters` has the pattern {pattern!r}, which names no parameter of {names}.")
            _host.train_data(trainer)
            if any(group.get("line_search_fn") for one in trainer.optimizers for group in one.param_groups):
                raise MisconfigurationException(
                    "`EWCCallback` adds to gradients, but a line search compares losses. Leave `line_search_fn` out."
                )
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try on two samples before the first step what else would fail after the last."""
        if self.strength > 0 and not self._is_checked and not callable(self.fisher):
            if self.fisher != "batched":
                batch = _batch.first(batch, 2)
            self._estimate(trainer, pl_module, [batch], task=0)
        self._is_checked = True

    def _fit_to(self, pl_module: L.LightningModule) -> None:
        _host.reshard(pl_module)
        self.penalty = self.penalty.aligned_with(dict(pl_module.named_parameters()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the penalty's gradient."""
        if self.strength == 0 or not self.penalty:
            return
        parameters = _host.parameters_of(pl_module, optimizer)
        if all(one.grad is None for one in parameters.values()):
            return  # `training_step` returned `None`: nothing is to move
        self._fit_to(pl_module)  # a head may have grown
        self.penalty.add_gradient_(parameters, self.strength * _host.gradient_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty, as often as the Trainer logs."""
        if self.strength == 0 or not self.penalty or not _host.logs_now(trainer):
            return
        value = self.strength * self.penalty.value(dict(pl_module.named_parameters()))
        pl_module.log("ewc/penalty", value, on_step=True, on_epoch=False)

    # --- At the boundary ----------------------------------------------------------------------------------------------

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Anchor the weights, each with the importance that the task gives it."""
        if self.strength == 0:
            return
        self._fit_to(pl_module)
        estimated = self._estimate(trainer, pl_module, self._batches(trainer, task), task)
        parameters = trainable(pl_module)
        fisher = {
            name: value
            for name, value in estimated.items()
            if name in parameters and any(fnmatchcase(name, pattern) for pattern in self.parameters)
        }
        new = self.decay * self.penalty + QuadraticPenalty.around(parameters, fisher)
        if self.online:
            new = QuadraticPenalty.around(dict(pl_module.named_parameters()), new.precision)
        self.penalty = new

    def _estimate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batches: Iterable[Any], task: int
    ) -> ParamDict:
        def loss(batch: Any) -> Tensor:
            return _host.training_loss(trainer, batch) if self.loss is None else self.loss(pl_module, batch)

        def logits(batch: Any) -> Tensor:
            if self.logits is not None:
                return self.logits(pl_module, batch)
            output: Tensor = pl_module(batch[0] if isinstance(batch, tuple | list) else batch)
            return output

        shares: dict[str, Any] = {"all_reduce": _host.all_sum(trainer)}
        with _host.without_trace(pl_module), _host.unsharded(pl_module):
            if callable(self.fisher):
                return self._call(self.fisher, trainer, pl_module, batches)
            if self.fisher == "exact":
                return exact_fisher(pl_module, batches, logits=logits, **shares)
            if self.fisher == "sampled":
                generator = torch.Generator().manual_seed(seed_of(task, "fisher", trainer.global_rank))
                return sampled_fisher(pl_module, batches, logits=logits, generator=generator, **shares)
            if self.fisher == "batched":
                return batched_fisher(pl_module, loss, batches, **shares)
            return empirical_fisher(pl_module, loss, batches, **shares)

    def _call(
        self,
        fisher: Callable[[Any, Any], ParamDict],
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batches: Iterable[Any],
    ) -> ParamDict:
        """Call a user's function, check what it returns, and average over processes, each by its samples."""
        with evaluating(pl_module):
            found = fisher(pl_module, batches)
        parameters = dict(pl_module.named_parameters())
        for name, value in found.items():
            if name not in parameters or parameters[name].shape != value.shape:
                shape = tuple(parameters[name].shape) if name in parameters else "no parameter of this name"
                raise ValueError(
                    f"`fisher` must return tensors by parameter name and of its shape, but got {name!r} of shape"
                    f" {tuple(value.shape)}, where the module has {shape}."
                )
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise ValueError(
                    f"The importance of parameter {name!r} must be finite and not negative. Look for NaN in the task's"
                    " data."
                )
        add = _host.all_sum(trainer)
        own = torch.tensor(float(require_num_samples(self._data(trainer).dataset)), dtype=torch.float64)
        share = float(own / add(own))
        return {name: add(share * found[name].detach()) for name in parameters if name in found}

    def _data(self, trainer: L.Trainer) -> DataLoader[Any]:
        return _host.train_data(trainer, num_samples=self.num_samples)

    def _batches(self, trainer: L.Trainer, task: int) -> Iterator[Any]:
        """Yield batches of the task's training data on the device, with a progress bar."""
        loader = self._data(trainer)
        with _host.progress(trainer, _host.num_batches(loader), f"Fisher information of task {task}") as tick:
            for batch in loader:
                yield _host.to_device(trainer, batch)
                tick()

    # --- State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the penalty."""
        return {**super().state_dict(), "penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the penalty."""
        super().load_state_dict(state_dict)
        self.penalty = QuadraticPenalty.from_state_dict(state_dict["penalty"])
