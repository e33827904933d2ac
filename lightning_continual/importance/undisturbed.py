"""Watching a module without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from lightning_continual.parameters import evaluating


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run ``module`` in evaluation mode with gradients recorded, and leave modes and random states as they were.

    Compiled graphs, which would hide the layers of the module, are off meanwhile. So is autocast's cache, which would
    hand on weights that were cast without gradients, and cuDNN where there is a recurrent layer, for it refuses a
    backward pass in evaluation mode.
    """
    gpus = {parameter.device.index for parameter in module.parameters() if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cudnn, cache = torch.backends.cudnn.enabled, torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.random.fork_rng(devices=sorted(gpus)))
        stack.enter_context(torch.inference_mode(False))  # which enables gradients, too
        if hasattr(torch.compiler, "set_stance"):  # torch >= 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.set_autocast_cache_enabled(False)
            torch.backends.cudnn.enabled = cudnn and not any(isinstance(m, nn.RNNBase) for m in module.modules())
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn
            torch.set_autocast_cache_enabled(cache)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
