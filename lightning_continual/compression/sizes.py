"""What a network weighs, in bytes, and what it costs to compute, in floating point operations."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_continual.compression.quantization import Per, channel_dims, stored_bytes
from lightning_continual.importance.undisturbed import undisturbed
from lightning_continual.parameters import computing_with

_SCALE_BYTES = 4


def num_bytes(
    module: nn.Module,
    *,
    kept: Mapping[str, Tensor] | None = None,
    bits: int | Mapping[str, int] | None = None,
    per: Per = "tensor",
) -> int:
    r"""Count the bytes that must be stored to compute what a network computes.

    Every parameter, and every buffer that belongs to the state (as a batch norm's statistics), counts once, however
    often it is shared. Of a tensor of :math:`N` values of :math:`w` bits in :math:`R` rows (its first dimension),
    :math:`m` of them kept, the cheapest of three forms counts; with :math:`B(n) = \lceil n / 8 \rceil` the bytes of
    :math:`n` bits,

    .. math::
        \begin{aligned}
        \text{dense:}\quad & B(N w) \\
        \text{bitmask and values:}\quad & B(N) + B(m w) \\
        \text{compressed sparse rows:}\quad
            & B(m w) + B(m \lceil \log_2 (N / R) \rceil) + B((R + 1) \lceil \log_2 (m + 1) \rceil)
        \end{aligned}

    Compressed sparse rows hold of each weight kept its value and its column, and of each row where it begins; that
    these indices are packed to whole bits is our reading. Tensors without an entry in ``kept`` are dense.

    Quantized weights (see `fake_quantized`) have :math:`w = b`, and for the tensor, or each of its output channels, a
    scale in single precision (4 bytes) and a zero point (1 byte, above 8 bits 2). Without ``bits``, :math:`w` is that
    of the dtype. Of what torchao has quantized (see `quantized`) its codes, scales and zero points count, dense.

    Args:
        module: The module.
        kept: By parameter name true where a weight is kept, of its shape. All others must be zero.
        bits: Of all weights that `channel_dims` names, or by name of some of them; None where nothing is quantized.
        per: Whether each ``"tensor"`` or each output ``"channel"`` has a scale and a zero point.

    Returns:
        Bytes.

    Raises:
        ValueError: If a name is not one of the module's, a shape is not that of the weights, a weight that is not kept
            is not zero, or ``bits`` or ``per`` is none of the above.
        TypeError: If ``kept`` does not hold booleans.

    Example:
        A hundred weights and ten biases of 4 bytes. Then 5 of the weights are left, of 1 byte each: 5 bytes of values,
        3 of columns (4 bits each), 5 of where rows begin (3 bits each), 5 of scale and zero point, and the biases.

        >>> layer = nn.Linear(10, 10)
        >>> num_bytes(layer)
        440
        >>> kept = torch.arange(100).view(10, 10) % 20 == 0
        >>> layer.weight.data *= kept
        >>> num_bytes(layer, kept={"weight": kept}, bits=8)
        58

    References:
        - Han, Mao & Dally. *Deep Compression.* ICLR 2016.
    """
    if per not in get_args(Per):
        raise ValueError(f"`per` must be one of {', '.join(map(repr, get_args(Per)))}, but got {per!r}.")
    parameters = dict(module.named_parameters())
    kept = dict(kept or {})
    check_kept(kept, module)
    for name, mask in kept.items():
        if not _is_quantized(one := parameters[name]) and bool(one.detach()[~mask.to(one.device)].any()):
            raise ValueError(
                f"Weights that are not kept must be zero, but {name!r} has some that are not. Set them to zero first."
            )
    grids = _grids(module, bits, per, parameters)
    total = sum(_parameter_bytes(one, kept.get(name), grids.get(name)) for name, one in parameters.items())
    state = module.state_dict(keep_vars=True)
    return total + sum(stored_bytes(one) for name, one in module.named_buffers() if name in state)


def file_bytes(module: nn.Module) -> int:
    """Return the size of the file that ``torch.save`` makes of the module's ``state_dict``; it is written to memory.

    Names and the file's own structure are in it, zeros too: this is what a checkpoint of the weights takes on a disk
    without further ado, and `num_bytes` what it could.

    Args:
        module: The module.

    Returns:
        Bytes.

    Example:
        >>> file_bytes(nn.Linear(100, 100)) > num_bytes(nn.Linear(100, 100))
        True
    """
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


def num_flops(module: nn.Module, example_inputs: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> int:
    """Count the floating point operations of a forward pass: two for a multiplication and addition.

    Counted are matrix products, convolutions, attention and recurrent layers (by ``torch.utils.flop_counter``); not
    what works on each value, as activations and norms, nor look-ups. Zeros cost as much as any weight: only what is
    really smaller is cheaper. Integers by torchao count like floating point numbers. The pass runs in evaluation mode,
    and leaves the module's modes, buffers and the random state as they were.

    Args:
        module: The module.
        example_inputs: A batch: a tensor, a tuple of positional or a dictionary of keyword arguments.
        forward: Maps the module and ``example_inputs`` to anything, where the module is not just called with them.

    Returns:
        Operations of the whole batch.

    Example:
        Two samples, 3 x 4 multiplications and additions each.

        >>> num_flops(nn.Linear(3, 4), torch.ones(2, 3))
        48
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    others = {
        torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
        torch.ops.aten._int_mm: _int8_flops,
        torch.ops.aten._weight_int4pack_mm_for_cpu: _int4_flops,
    }
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(module), computing_with(module, buffers), torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer, which counts as none
            with FlopCounterMode(display=False, custom_mapping=others) as counter:
                (forward or _call)(module, example_inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _recurrent_flops(
    inputs: Sequence[int], input_weight: Sequence[int], hidden_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Return the operations of one layer and direction, of which shapes are given."""
    return 2 * inputs[0] * inputs[1] * (math.prod(input_weight) + math.prod(hidden_weight))


def _int8_flops(inputs: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * inputs[0] * math.prod(weight)


def _int4_flops(inputs: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * inputs[0] * inputs[1] * weight[0]  # two weights are packed into each byte of a row


def check_kept(kept: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise if masks of kept weights do not fit a module.

    Args:
        kept: By parameter name true where a weight is kept, of its shape.
        module: The module.

    Raises:
        ValueError: If a name is none of the module's parameters, or a shape is another.
        TypeError: If a mask does not hold booleans.

    Example:
        >>> check_kept({"weight": torch.ones(2, 3, dtype=torch.bool)}, nn.Linear(3, 2))
        >>> check_kept({"bias": torch.ones(3, dtype=torch.bool)}, nn.Linear(3, 2))
        Traceback (most recent call last):
        ValueError: `kept` must have the parameters' shapes, but 'bias' has (3,) for (2,).
    """
    parameters = dict(module.named_parameters())
    for name, mask in kept.items():
        if name not in parameters:
            raise ValueError(
                f"`kept` must name parameters of the module, but got {name!r}. Of a shared one, pass the first name in"
                " `named_parameters()`."
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"`kept` must hold booleans, but {name!r} has dtype {mask.dtype}.")
        shapes = tuple(mask.shape), tuple(parameters[name].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"`kept` must have the parameters' shapes, but {name!r} has {shapes[0]} for {shapes[1]}.")


def _grids(
    module: nn.Module, bits: int | Mapping[str, int] | None, per: Per, parameters: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """Return the bits of each quantized weight, and how many grids it has."""
    dims = channel_dims(module)
    by_name = {} if bits is None else dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(dims, bits)
    for name, one in by_name.items():
        if name not in dims:
            raise ValueError(f"`bits` must name weights that `channel_dims` gives for the module, but got {name!r}.")
        if not isinstance(one, int) or not 1 <= one <= 16:
            raise ValueError(f"`bits` must be integers from 1 to 16, but got {one!r} for {name!r}.")
    return {name: (one, parameters[name].shape[dims[name]] if per == "channel" else 1) for name, one in by_name.items()}


def _parameter_bytes(parameter: Tensor, kept: Tensor | None, grid: tuple[int, int] | None) -> int:
    if _is_quantized(parameter):
        return stored_bytes(parameter)
    width, num_grids = grid or (8 * parameter.element_size(), 0)
    zero_point = 1 if width <= 8 else 2
    return _values_bytes(parameter, kept, width) + num_grids * (_SCALE_BYTES + zero_point)


def _values_bytes(parameter: Tensor, kept: Tensor | None, width: int) -> int:
    num = parameter.numel()
    dense = _bytes(num * width)
    if kept is None or num == 0:
        return dense
    num_kept, num_rows = int(kept.sum()), parameter.shape[0] if parameter.ndim else 1
    values = _bytes(num_kept * width)
    columns, starts = (num // num_rows - 1).bit_length(), num_kept.bit_length()  # the logarithms, rounded up
    rows = values + _bytes(num_kept * columns) + _bytes((num_rows + 1) * starts)
    return min(dense, _bytes(num) + values, rows)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _is_quantized(parameter: Tensor) -> bool:
    return hasattr(parameter, "__tensor_flatten__")
