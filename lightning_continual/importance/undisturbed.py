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

    Compiled graphs, which would hide the layers of the module, are off meanwhile. So is cuDNN where there is a
    recurrent layer, for it refuses a backward pass in evaluation mode.
    """
    gpus = {parameter.device.index for parameter in module.parameters() if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cudnn = torch.backends.cudnn.enabled
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.random.fork_rng(devices=sorted(gpus)))
        stack.enter_context(torch.inference_mode(False))  # which enables gradients, too
        if hasattr(torch.compiler, "set_stance"):  # torch >= 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.cudnn.enabled = cudnn and not any(isinstance(m, nn.RNNBase) for m in module.modules())
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn
            random.setstate(python_state)
            np.random.set_state(numpy_state)
