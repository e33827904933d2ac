"""Quantization beside pruning: uniform grids of any number of bits to compare with, and integers by torchao."""

from __future__ import annotations

import copy
import logging
import warnings
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_continual._extras import require

Per: TypeAlias = Literal["tensor", "channel"]
Kind: TypeAlias = Literal["int8-weight", "int4-weight", "int8-dynamic"]
M = TypeVar("M", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (
    *(nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding, nn.EmbeddingBag),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)


def quantize_affine(x: Tensor, bits: int, *, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Round a tensor to a uniform grid of :math:`2^b` levels that spans its values and has a level at zero.

    With :math:`n = 2^b - 1`, and the range widened to include zero,

    .. math::
        l = \min(0, \min x), \quad h = \max(0, \max x), \quad s = \frac{h - l}{n}, \quad
        z = \Big\lfloor -\frac{l}{s} + \tfrac12 \Big\rfloor, \quad
        q = \operatorname{clamp}\!\big(\operatorname{round}(x / s + z),\ 0,\ n\big)

    so that :math:`\hat x = s (q - z)` (see `dequantize_affine`) is zero where :math:`x` is: what was pruned stays so.
    The error is at most :math:`s / 2`, but for rounding in the tensor's own precision. A grid is quantized to itself.
    A positive factor of :math:`x` is one of :math:`s`; a negative one mirrors the codes, :math:`n - q`, unless
    :math:`-l / s` lies half way between two integers, for an even number of levels has no middle.

    Args:
        x: Values of any shape.
        bits: :math:`b`, 1 to 16.
        dim: Where given, each slice along this dimension (each channel) has a grid of its own.

    Returns:
        The codes :math:`q` (of the shape of ``x``), the scale :math:`s` (in single precision at least) and the zero
        point :math:`z`. The last two are of shape ``()``, or with ``dim`` of as many dimensions as ``x``, all of size 1
        but that one. Codes and zero points are 32-bit integers; they need ``bits`` bits. Where all is zero, so are the
        codes, and the scale is 1.

    Raises:
        ValueError: If ``bits`` or ``dim`` lies outside its range; if ``x`` is empty, or not finite.
        TypeError: If ``x`` does not hold floating point numbers.

    Example:
        Three bits between -1 and 2.5: the levels are half a unit apart, the third one is zero.

        >>> codes, scale, zero_point = quantize_affine(torch.tensor([-1.0, 0.0, 0.2, 1.4, 2.5]), bits=3)
        >>> codes, scale, zero_point
        (tensor([0, 2, 2, 5, 7], dtype=torch.int32), tensor(0.5000), tensor(2, dtype=torch.int32))
        >>> dequantize_affine(codes, scale, zero_point)
        tensor([-1.0000,  0.0000,  0.0000,  1.5000,  2.5000])

    References:
        - Jacob et al. *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.*
          CVPR 2018.
    """
    num_steps = 2 ** _checked_bits(bits) - 1
    if not x.is_floating_point():
        raise TypeError(f"`x` must hold floating point numbers, but its dtype is {x.dtype}.")
    if not x.numel():
        raise ValueError(f"`x` must hold at least one value, but its shape is {tuple(x.shape)}.")
    if dim is not None and not -x.ndim <= dim < x.ndim:
        raise ValueError(f"`dim` must be a dimension of `x`, which has {x.ndim}, but got {dim}.")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    others = [one for one in range(x.ndim) if dim is None or one != dim % x.ndim]
    low, high = (x, x) if not others else (x.amin(others, dim is not None), x.amax(others, dim is not None))
    low, high = low.clamp(max=0), high.clamp(min=0)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("`x` must be finite, but holds NaN or infinite values. Has training diverged?")
    scale = high / num_steps - low / num_steps  # not of the difference, which may overflow
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale + 0.5).floor_()
    codes = (x / scale + zero_point).round_().clamp_(0, num_steps)
    return codes.int(), scale, zero_point.int()


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    r"""Return the values :math:`\hat x = s (q - z)` of the codes that `quantize_affine` gave.

    Args:
        codes: :math:`q`, of any shape.
        scale: :math:`s`, of a shape that broadcasts to that of the codes.
        zero_point: :math:`z`, of the scale's shape.

    Returns:
        Values of the codes' shape, and the scale's dtype.

    Example:
        >>> dequantize_affine(torch.tensor([0, 1, 3]), torch.tensor(0.5), torch.tensor(1))
        tensor([-0.5000,  0.0000,  1.0000])
    """
    return scale * (codes - zero_point)


def channel_dims(module: nn.Module) -> dict[str, int]:
    """Return the weights that quantization is about, by name, and the dimension along which their output channels lie.

    They are those of linear, bilinear, convolution, embedding, recurrent and attention layers: the floating point
    parameters of at least two dimensions that are not biases. The channels lie along dimension 0, with transposed
    convolutions along dimension 1; the channel of an embedding is one of its vectors. A shared weight counts once. A
    weight that is parametrized (as by a weight norm), or quantized already, is not among them.

    Args:
        module: Any module.

    Returns:
        One dimension per weight, in the order of ``named_parameters()``.

    Example:
        >>> channel_dims(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))
        {'0.weight': 1, '3.weight': 0}
    """
    dims: dict[int, int] = {}
    for layer in module.modules():
        if not isinstance(layer, _LAYERS):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            plain = parameter.is_floating_point() and not hasattr(parameter, "__tensor_flatten__")
            if plain and not name.startswith("bias") and parameter.ndim >= 2 and parameter.numel():
                dims.setdefault(id(parameter), int(isinstance(layer, _TRANSPOSED)))
    return {name: dims[id(one)] for name, one in module.named_parameters() if id(one) in dims}


def fake_quantized(module: M, bits: int, *, per: Per = "tensor") -> M:
    r"""Return a copy whose weights take no more than :math:`2^b` values each tensor, or each output channel.

    The weights of `channel_dims` are rounded by `quantize_affine`, and are floating point numbers still: the copy
    computes what a network of ``bits`` bits would, at any number of bits, on any device, and no faster. Biases, norms
    and buffers stay. What it would weigh is told by `num_bytes` with the same ``bits`` and ``per``.

    Args:
        module: The module, which is left as it is.
        bits: :math:`b`, 1 to 16.
        per: Whether each ``"tensor"`` or each output ``"channel"`` has its own grid.

    Returns:
        The copy, detached from any Trainer.

    Raises:
        ValueError: If ``bits`` or ``per`` is none of the above, if there is no weight to quantize, or one is not
            finite, which is named.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-1.0, 0.3, 2.0]]))
        >>> fake_quantized(layer, bits=2).weight.data  # levels at -1, 0, 1 and 2
        tensor([[-1.,  0.,  2.]])
    """
    _checked_bits(bits)
    dims = channel_dims(module)
    _check_choice("per", per, get_args(Per))
    if not dims:
        raise ValueError(
            f"`module` must have a weight to quantize, but {type(module).__name__} has none in a linear, convolution,"
            " embedding, recurrent or attention layer. Take parametrizations off first, for example a weight norm."
        )
    result = detached_copy(module)
    parameters = dict(result.named_parameters())
    with torch.no_grad():
        for name, dim in dims.items():
            try:
                grid = quantize_affine(parameters[name], bits, dim=dim if per == "channel" else None)
            except ValueError as error:
                raise ValueError(f"Parameter {name!r} cannot be quantized: {error}") from error
            parameters[name].copy_(dequantize_affine(*grid))
    return result


def quantized(module: M, kind: Kind) -> M:
    """Return a copy that stores and computes with integers, by torchao, on the CPU.

    - ``"int8-weight"``: weights in 8 bits, symmetric, a scale for each output channel; activations stay.
    - ``"int8-dynamic"``: of linear layers the activations, too, a scale for each sample and position.
    - ``"int4-weight"``: of linear layers the weights in 4 bits, a scale and an offset for each group of 128, 64 or 32
      inputs, whichever divides their number first. torchao packs 4 bits only where inputs are a multiple of 32 and
      outputs of 16; other linear layers have 8-bit weights. Weights that were zero need not stay zero.

    Served are linear layers, and with 8-bit weights in every kind 2d convolutions and embeddings: of exactly these
    classes, in half or single precision. Everything else is left as it is, and so is a layer that would not become
    smaller, such as a depthwise convolution. `num_bytes` and `file_bytes` tell what the copy really weighs.

    A shared weight stays shared. The weights of the copy cannot be trained.

    Args:
        module: The module, which is left as it is.
        kind: One of the above.

    Returns:
        The copy, on the CPU, detached from any Trainer.

    Raises:
        ValueError: If ``kind`` is none of the above, or no layer can be served in its way.
        ImportError: If torchao is not installed, or has no 4-bit weights for the CPU.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = quantized(model, "int8-weight")
        >>> x = torch.ones(2, 64)
        >>> torch.allclose(small(x), model(x), atol=0.05)
        True
    """
    _check_choice("kind", kind, get_args(Kind))
    torchao = _torchao()
    result = detached_copy(module).cpu()
    num_served = 0
    for layers in _layers_by_weight(result):
        special, config = _config(torchao, kind, layers)
        first, weight = layers[0], layers[0].weight
        torchao.quantize_(first, config, filter_fn=lambda one, _, first=first: one is first)
        if stored_bytes(first.weight) >= stored_bytes(weight):
            first.weight = weight
            del first.extra_repr  # which torchao has put on the layer
            continue
        for layer in layers[1:]:
            layer.weight = first.weight
        num_served += special
    if not num_served:
        needed = {
            "int8-weight": "a linear layer, a 2d convolution or an embedding that becomes smaller by it",
            "int4-weight": "a linear layer whose inputs are a multiple of 32 and whose outputs are a multiple of 16",
            "int8-dynamic": "a linear layer that becomes smaller by it",
        }
        raise ValueError(
            f"`kind={kind!r}` needs {needed[kind]}, in half or single precision and not parametrized, but"
            f" {type(module).__name__} has none. Convert a module in double precision by `module.float()`, choose"
            " another kind, or compare by `fake_quantized`, which rounds any layer to any number of bits."
        )
    return result


def detached_copy(module: M) -> M:
    """Return a deep copy that knows no Trainer, and whose methods are its own.

    A LightningModule leaves its Trainer out by itself. A method that is wrapped on the instance, as callbacks do while
    a fit runs, would still be the original's: the copy has that of its class.

    Args:
        module: Any module.

    Returns:
        The copy; gradients are not copied.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> torch.equal(detached_copy(layer).weight, layer.weight)
        True
    """
    result = copy.deepcopy(module)
    for one in result.modules():
        for name, value in list(vars(one).items()):
            own = getattr(type(one), name, None)
            while isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
                value = value.__wrapped__
            if own is not None and getattr(value, "__func__", None) is own:
                delattr(one, name)
    return result


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; of one of torchao's, of the tensors that it is made of.

    Args:
        tensor: Codes, scales and zero points count where it is made of them.

    Returns:
        Bytes.

    Example:
        >>> stored_bytes(torch.zeros(3, 4, dtype=torch.bfloat16))
        24
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _checked_bits(bits: int) -> int:
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"`bits` must be an integer from 1 to 16, but got {bits!r}. Pass for example 8, 4 or 2.")
    return bits


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def _torchao() -> ModuleType:
    """Import torchao, which at its import sets a filter of warnings, and has torch 2.15 log a line."""
    logger = logging.getLogger("torch.utils._pytree")
    logger.addFilter(_is_worth_a_line)
    try:
        with warnings.catch_warnings():
            return require("torchao.quantization", "prune")
    finally:
        logger.removeFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return "is an Enum subclass and is now natively supported" not in str(record.msg)


def _layers_by_weight(module: nn.Module) -> list[list[Any]]:
    """Return the layers of each weight that torchao may be asked to quantize."""
    owners: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    for one in module.modules():
        for name, parameter in one.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((one, name, parameter))
    return [
        [one for one, _, _ in places]
        for places in owners.values()
        if all(name == "weight" and _may_be_served(one, weight) for one, name, weight in places)
    ]


def _may_be_served(layer: nn.Module, weight: nn.Parameter) -> bool:
    return (
        (type(layer) in (nn.Linear, nn.Conv2d) or (type(layer) is nn.Embedding and layer.max_norm is None))
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not hasattr(weight, "__tensor_flatten__")
        and weight.numel() > 0
        and weight.shape[1] > 1  # torchao fails on layers of one input
    )


def _config(torchao: ModuleType, kind: Kind, layers: list[Any]) -> tuple[bool, Any]:
    """Return whether layers that share a weight can be served in the way of ``kind``, and torchao's name for how."""
    types = {type(layer) for layer in layers}
    quiet = {"set_inductor_config": False}  # which would be for the whole process
    if nn.Conv2d in types:
        return kind == "int8-weight", torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    if kind == "int8-dynamic" and types == {nn.Linear}:
        reduce = require("torchao.utils", "prune").should_reduce_range(torch.device("cpu"))
        return True, torchao.Int8DynamicActivationInt8WeightConfig(reduce_range=reduce, **quiet)
    if kind == "int4-weight" and types == {nn.Linear}:
        rows, columns = layers[0].weight.shape
        group = next((size for size in (128, 64, 32) if columns % size == 0), None)
        if rows % 16 == 0 and group is not None:
            return True, _int4().PrototypeInt4WeightOnlyConfig(group_size=group, **quiet)
    return kind == "int8-weight", torchao.Int8WeightOnlyConfig(**quiet)


def _int4() -> ModuleType:
    try:
        return require("torchao.prototype.quantization.int4", "prune")
    except ModuleNotFoundError as error:
        raise ImportError(
            "`kind='int4-weight'` needs 4-bit weights for the CPU, which this version of torchao does not have."
            " Install torchao 0.18, or choose 'int8-weight'."
        ) from error
