"""Where a penalty joins the gradients, and the loss they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_continual._host.loops import is_compiled


def require_visible_gradients(trainer: Any, who: str, *, sharded: bool = False) -> None:
    """Raise if the strategy keeps gradients where a callback cannot see them by parameter.

    Args:
        trainer: The Trainer.
        who: The callback's name, for the message.
        sharded: Whether the callback can do with parameters that FSDP2 shards.
    """
    strategy, remedy = trainer.strategy, "Use 'ddp', or one device."
    name = type(strategy).__name__
    if name == "ModelParallelStrategy" and sharded:
        if strategy._tensor_parallel_size == 1:  # by now a number: "auto" is all devices of a node
            return
        remedy = "Pass `tensor_parallel_size=1`, or use 'ddp'."
    if name in ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"):
        remedy = "Use `ModelParallelStrategy` (FSDP2), 'ddp', or one device." if sharded and "FSDPS" in name else remedy
        raise MisconfigurationException(
            f"`{who}` needs the whole gradient of each parameter, but `{name}` shards them. {remedy}"
        )


def needs_every_gradient(trainer: Any) -> bool:
    """Whether parameters must require gradients as they did at the start of the fit.

    DDP waits for the gradient of each, unless it looks for unused ones; a compiled module is compiled anew for others.
    """
    options = getattr(trainer.strategy, "_ddp_kwargs", None)
    waits = options is not None and (not options.get("find_unused_parameters") or options.get("static_graph", False))
    module = trainer.lightning_module
    return waits or is_compiled(module) or any(type(one).__name__ == "OptimizedModule" for one in module.modules())


def loss_scale(trainer: Any) -> float:
    """Return the factor by which a GradScaler lifts the loss out of the rounding of half precision; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def gradient_scale(trainer: Any, optimizer: Any) -> float:
    """Return the factor of the gradients in ``on_before_optimizer_step``.

    It is 1, but with a GradScaler and an optimizer that unscales by itself, as fused ones do.
    """
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0


def training_output(trainer: Any, batch: Any) -> Any:
    """Return what ``training_step`` returns for a batch on the device; to be called `without_trace`."""
    module = trainer.lightning_module
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    arguments = (batch, 0) if takes_index else (batch,)
    with trainer.precision_plugin.train_step_context():
        return module.training_step(*arguments)


def training_loss(trainer: Any, batch: Any) -> Tensor:
    """Return the loss of ``training_step`` for a batch on the device; to be called `without_trace`."""
    return loss_of(training_output(trainer, batch))


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a ``training_step`` returned: a tensor, or a mapping with the key ``"loss"``."""
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"`training_step` must return a loss (a tensor, or a mapping with the key 'loss'), but returned {output!r}."
        )
    return loss
