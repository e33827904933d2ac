"""Synapse and neuron importance: a deployed network is retrained close to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_continual import _host
from lightning_continual.parameters import ParamDict, computing_with, trainable
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

    No past data is needed. Layers are the modules with trainable weights of their own whose output is a tensor, the
    tensors their weights; weights and layers without influence on the loss are left out of the means. The batch is
    that of all processes together. That the formula is the paper's, and that
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
        """Check that the terms can be computed, and join a loss."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._is_neutral:
            return
        _host.require_visible_gradients(trainer, type(self).__name__)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`SynapseNeuronCallback` adds to the loss that `training_step` returns, but with manual optimization"
                " that has made its step. Use automatic optimization, or `EWCCallback`."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the terms join the loss."""
        super().on_train_start(trainer, pl_module)
        if not self._is_neutral:
            self._require_same_parameters(pl_module)
            self.deployed = {name: value.to(pl_module.device) for name, value in self.deployed.items()}
            _host.wrap_method(pl_module, "training_step", self, partial(self._step, trainer, pl_module))

    def _require_same_parameters(self, pl_module: L.LightningModule) -> None:
        if not self.deployed:
            return
        now = {name: tuple(p.shape) for name, p in pl_module.named_parameters()}
        then = {name: tuple(value.shape) for name, value in self.deployed.items()}
        buffers = {name for name, _ in pl_module.named_buffers()}
        for name in [*now, *(name for name in then if name not in now and name not in buffers)]:
            if now.get(name) != then.get(name):
                was, has = (f"shape {one[name]}" if name in one else "no such parameter" for one in (then, now))
                raise ValueError(
                    f"The deployed network has {was} for {name!r}, but the module has {has}. Restore into a module of"
                    " the same architecture; a head that grows is for `EWCCallback`."
                )

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Take the network as it is now for the deployed one."""
        if not self._is_neutral:
            whole = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self.deployed = {name: value.detach().clone() for name, value in whole}

    def _step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not self.deployed:
            return inner(*args, **kwargs)
        self._require_same_parameters(pl_module)
        with _host.without_trace(pl_module), torch.enable_grad():
            weights, anchored = self._look_at_deployed(trainer, pl_module, args, kwargs)
        with ExitStack() as stack:
            outputs = stack.enter_context(_recording(pl_module)) if self.neuron > 0 else []
            result = inner(*args, **kwargs)
        if result is None:
            return None
        loss = _host.loss_of(result)
        parameters = dict(pl_module.named_parameters())
        synapses = [
            (importance * (parameters[name] - self.deployed[name]).square()).sum()
            for name, importance in weights.items()
        ]
        neurons = [
            (importance * (_precise(now) - _precise(then)).square()).sum()
            for (then, importance), now in zip(anchored, outputs, strict=True)
            if importance is not None
        ]
        for strength, terms in ((self.synapse, synapses), (self.neuron, neurons)):
            if strength > 0 and terms:
                loss = loss + strength * torch.stack(terms).mean()
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _look_at_deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ParamDict, list[tuple[Tensor, Tensor | None]]]:
        """Return the importance of each weight, and each layer's output with its importance, in the order of calls."""
        leaves = {name: self.deployed[name].detach().requires_grad_() for name in trainable(pl_module)}
        # Buffers are copied, for a batch norm writes into them.
        others = {name: value.clone() for name, value in self.deployed.items() if name not in leaves}
        with _recording(pl_module) as outputs, computing_with(pl_module, {**others, **leaves}):
            result = pl_module.training_step(*args, **kwargs)
        if self.neuron == 0:
            outputs.clear()
        if result is None:
            return {}, [(output.detach(), None) for output in outputs]
        scale, processes = _host.loss_scale(trainer), trainer.world_size
        wanted = [*leaves.values(), *outputs]
        gradients = torch.autograd.grad(scale * _host.loss_of(result), wanted, allow_unused=True)
        precise = [None if gradient is None else _precise(gradient) / scale for gradient in gradients]
        # The loss is a mean over processes: so is its gradient, and a process's outputs have their share in it.
        add, weights = _host.all_sum(trainer), {}
        for (name, leaf), gradient in zip(leaves.items(), precise, strict=False):
            if add(torch.tensor(float(gradient is not None))) > 0:
                weights[name] = (add(torch.zeros_like(leaf) if gradient is None else gradient) / processes).square()
        squares = [None if gradient is None else gradient.square() / processes for gradient in precise[len(leaves) :]]
        return weights, [(output.detach(), square) for output, square in zip(outputs, squares, strict=True)]

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


@contextmanager
def _recording(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of all layers with trainable weights of their own, in the order of their calls."""
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        outputs.append(output)
        return output.clone()  # what comes next may work in place

    layers = [one for one in module.modules() if any(p.requires_grad for p in one.parameters(recurse=False))]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if hasattr(torch.compiler, "set_stance"):  # torch >= 2.6; a compiled graph does not know of hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield outputs


def _precise(value: Tensor) -> Tensor:
    """Return a tensor in single precision at least: squares of small gradients vanish in half precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
