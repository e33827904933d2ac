"""Synapse and neuron importance: a deployed network is retrained close to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_continual import _host
from lightning_continual.parameters import ParamDict
from lightning_continual.stream import ContinualCallback


class SynapseNeuronCallback(ContinualCallback):
    r"""Keeps the weights and activations that matter to the deployed network close to what they were.

    With :math:`\theta^*` the weights at the end of the last task, :math:`a_l` the output of layer l, and :math:`\ell`
    the loss of the *deployed* network on the *current* batch, training minimises the loss plus

    .. math::
        \lambda_w \underset{\text{tensors}}{\text{mean}} \sum_i \Omega_i (\theta_i - \theta^*_i)^2
        + \lambda_a \underset{\text{layers}}{\text{mean}} \sum_{n, j} \Omega_{lnj}
          \big(a_{lnj}(x; \theta) - a_{lnj}(x; \theta^*)\big)^2

    .. math::
        \Omega_i = \Big(\frac{\partial \ell}{\partial \theta_i}\Big|_{\theta^*}\Big)^2, \qquad
        \Omega_{lnj} = \Big(\frac{\partial \ell}{\partial a_{lnj}}\Big|_{\theta^*}\Big)^2

    No past data is needed. Layers are the modules with weights of their own. That the formula is the paper's, and that
    the deployed network sees the batch in the same mode with the same dropout masks, is our reading; the formula is
    that of the first author's code. A step costs another forward and backward pass.

    The terms join the loss in ``training_step``, so automatic optimization is needed. In the first task, which no
    deployed network precedes, nothing is done.

    Args:
        synapse: :math:`\lambda_w`; 0 leaves the term out.
        neuron: :math:`\lambda_a`; 0 leaves the term out.

    Raises:
        ValueError: If an argument lies outside its range; if a parameter is gone or of another shape.
        MisconfigurationException: With manual optimization.

    Example:
        >>> SynapseNeuronCallback(neuron=0.0).synapse
        0.001

    References:
        - Klabjan & Zhu. *Neural Network Retraining for Model Serving.* arXiv 2004.14203, 2020.
    """

    def __init__(self, synapse: float = 1e-3, neuron: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("synapse", synapse), ("neuron", neuron)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, but got {value}.")
        self.synapse = synapse
        self.neuron = neuron
        self.deployed: ParamDict = {}
        """The deployed network's parameters and buffers, by name."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the terms can join a loss."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._is_neutral and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`SynapseNeuronCallback` adds to the loss that `training_step` returns, but with manual optimization"
                " that has made its step. Use automatic optimization, or `EWCCallback`."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the terms join the loss."""
        shapes = {name: tuple(p.shape) for name, p in pl_module.named_parameters()}
        for name, value in self.deployed.items():
            if name in shapes and shapes[name] != tuple(value.shape):
                raise ValueError(
                    f"Parameter {name!r} was deployed with shape {tuple(value.shape)}, but has shape {shapes[name]}."
                    " Restore into a module of the same architecture."
                )
        self.deployed = {name: value.to(pl_module.device) for name, value in self.deployed.items()}
        super().on_train_start(trainer, pl_module)
        if not self._is_neutral:
            _host.wrap_method(pl_module, "training_step", self, partial(self._step, pl_module))

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Take the network as it is now for the deployed one."""
        if not self._is_neutral:
            whole = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self.deployed = {name: value.detach().clone() for name, value in whole}

    def _step(self, pl_module: L.LightningModule, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.deployed:
            return inner(*args, **kwargs)
        with _host.without_trace(pl_module), torch.enable_grad():
            weights, anchored = self._look_at_deployed(pl_module, args, kwargs)
        with _recording(pl_module) as outputs:
            result = inner(*args, **kwargs)
        if result is None:
            return None
        loss = _host.loss_of(result)
        parameters = dict(pl_module.named_parameters())
        if self.synapse > 0:
            terms = [
                (weights[name] * (parameters[name] - self.deployed[name]).square()).sum()
                for name in weights
                if parameters[name].requires_grad
            ]
            loss = loss + self.synapse * torch.stack(terms).mean()
        if self.neuron > 0:
            terms = [
                (importance * (now - then).square()).sum()
                for (then, importance), now in zip(anchored, outputs, strict=True)
                if importance is not None
            ]
            loss = loss + self.neuron * torch.stack(terms).mean()
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _look_at_deployed(
        self, pl_module: L.LightningModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ParamDict, list[tuple[Tensor, Tensor | None]]]:
        """Return the importance of each weight, and each layer's output with its importance, in the order of calls."""
        trainable = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        leaves = {name: self.deployed[name].detach().requires_grad_() for name in trainable}
        # Buffers are copied, for a batch norm writes into them.
        others = {name: value.clone() for name, value in self.deployed.items() if name not in trainable}
        state = {f"module.{name}": value for name, value in {**others, **leaves}.items()}
        with _recording(pl_module) as outputs:
            result = torch.func.functional_call(_TrainingStep(pl_module), state, args, kwargs)
        wanted = [*leaves.values(), *outputs]
        gradients: Sequence[Tensor | None]
        gradients = torch.autograd.grad(_host.loss_of(result), wanted, allow_unused=True)
        squares: list[Tensor | None] = [None if gradient is None else gradient.square() for gradient in gradients]
        weights = {name: square for name, square in zip(leaves, squares, strict=False) if square is not None}
        anchored = [(output.detach(), one) for output, one in zip(outputs, squares[len(leaves) :], strict=True)]
        return weights, anchored

    def state_dict(self) -> dict[str, Any]:
        """Return the deployed network."""
        return {**super().state_dict(), "deployed": dict(self.deployed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the deployed network."""
        super().load_state_dict(state_dict)
        self.deployed = dict(state_dict["deployed"])

    @property
    def _is_neutral(self) -> bool:
        return self.synapse == 0 and self.neuron == 0


class _TrainingStep(nn.Module):
    """A module whose forward is the ``training_step`` of another, so that it can be called with other weights."""

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.training_step(*args, **kwargs)


@contextmanager
def _recording(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of all layers with trainable weights of their own, in the order of their calls."""
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)

    layers = [one for one in module.modules() if any(p.requires_grad for p in one.parameters(recurse=False))]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
