"""What is done right after an optimizer's step, while a fit runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_continual._host.loops import is_overridden
from lightning_continual.constraints import Pin
from lightning_continual.parameters import ParamDict

_ELEMENTWISE = {
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.ASGD, optim.Rprop),
}
"""Optimizers that move each weight by its own gradients alone, whatever those of other weights are."""

_hooks: WeakKeyDictionary[Optimizer, dict[Any, Any]] = WeakKeyDictionary()


def parameters_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters of ``module`` that an optimizer moves, by name; those frozen are left out."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: one for name, one in module.named_parameters() if one.requires_grad and id(one) in own}


def after_step(optimizer: Optimizer, key: Any, function: Callable[[], None]) -> None:
    """Call ``function`` after each of an optimizer's steps; under the same ``key`` a later call takes its place.

    A step that a GradScaler skips is none. Every function of a key is forgotten by `forget_steps`.
    """
    hooks = _hooks.setdefault(optimizer, {})
    if key in hooks:
        hooks[key].remove()
    hooks[key] = optimizer.register_step_post_hook(lambda *args: function())


def forget_steps(key: Any) -> None:
    """Take away what was put after steps under ``key``; a key without is no error."""
    for optimizer, hooks in list(_hooks.items()):
        if key in hooks:
            hooks.pop(key).remove()
        if not hooks:
            del _hooks[optimizer]


def hold(module: nn.Module, optimizer: Optimizer, key: Any, pin: Pin) -> None:
    """Hold what is pinned through the optimizer's next step; to be called in ``on_before_optimizer_step`` of ``key``.

    Gradients are set to zero only where something else may look at them, for that costs as much as the rest.
    """
    if not pin:
        return
    parameters = parameters_of(module, optimizer)
    if _is_seen_by_others(module, optimizer, key):
        pin.mask_gradients_(parameters)
    after_step(optimizer, key, lambda: pin.put_back_(parameters))


def _is_seen_by_others(module: Any, optimizer: Optimizer, key: Any) -> bool:
    """Whether a gradient may have a say in other weights' steps, or be seen by another callback or the user."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.gradient_clip_val or type(optimizer) not in _ELEMENTWISE:
        return True
    if optimizer._optimizer_step_pre_hooks:
        return True
    hooks = ("on_before_optimizer_step", "on_before_zero_grad")
    own = (*hooks, "configure_gradient_clipping", "optimizer_step")
    others = [one for one in trainer.callbacks if one is not key]
    return any(is_overridden(name, module) for name in own) or any(
        is_overridden(name, one) for one in others for name in hooks
    )


def holders(trainer: Any, but: Any) -> list[Any]:
    """Return the other callbacks that hold weights, or will: those with a `Pin` as ``pin``."""
    return [one for one in trainer.callbacks if one is not but and isinstance(getattr(one, "pin", None), Pin)]


def held_by_others(trainer: Any, but: Any) -> ParamDict:
    """Return which weights other callbacks hold at values that are not zero, by parameter name."""
    held: ParamDict = {}
    for pin in (one.pin for one in holders(trainer, but)):
        for name, pinned in pin.pinned.items():
            mask = pinned & (pin.values[name] != 0)
            held[name] = held[name] | mask if name in held else mask
    return held


def is_of_average(checkpoint: dict[str, Any]) -> bool:
    """Whether the ``state_dict`` of a checkpoint is that of an average of weights, by Lightning's `WeightAveraging`."""
    return "current_model_state" in checkpoint


def put_back_others(trainer: Any, but: Any) -> None:
    """Put back what other callbacks hold, where a callback has written to weights outside of a step."""
    parameters = dict(trainer.lightning_module.named_parameters())
    for one in holders(trainer, but):
        one.pin.put_back_(parameters)
