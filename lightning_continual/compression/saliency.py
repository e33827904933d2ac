"""Saliency of weights: what is lost, by each selector's estimate, where a weight is set to zero."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_continual.importance import AllReduce, exact_fisher, gradient_deviation
from lightning_continual.importance.fisher import Loss, Statistic
from lightning_continual.importance.per_sample import Reduction
from lightning_continual.parameters import ParamDict, trainable

Parameters: TypeAlias = Mapping[str, Tensor]

_EXCEPTED = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
_WEIGHT = re.compile(r"weight|weight_[ih][hr](_.+)?|.+_proj_weight")


def prunable(module: nn.Module) -> ParamDict:
    """Return the parameters whose single weights are pruned, by name; a shared one once, by its first name.

    These are the trainable tensors of two or more dimensions that torch's layers, and those written after them, call
    weights: ``weight`` of linear layers and convolutions, transposed or not, ``weight_ih*``, ``weight_hh*`` and
    ``weight_hr*`` of recurrent layers, ``in_proj_weight`` and ``*_proj_weight`` of attention. What is left out, by our
    reading:

    - biases, and all parameters of normalisations: they are few, and what they hold is not a product with an input;
    - embeddings, also where an output layer shares the table: a row is looked up, not summed up, and what a rare row
      is worth shows only on the rare samples that have it. To prune one, pass it to a selector by ``parameters``;
    - parameters of weights that are computed (``torch.nn.utils.parametrize``): a zero of theirs is none of the weight;
    - bare parameters of other names, such as positions and class tokens.

    Args:
        module: Any module.

    Returns:
        The parameters themselves; none where the module has nothing of the kind.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> _ = model[3].requires_grad_(False)
        >>> list(prunable(model))
        ['1.weight']
    """
    weights: set[int] = set()
    excepted: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, _EXCEPTED):
                excepted.add(id(parameter))
            elif _WEIGHT.fullmatch(name) and parameter.ndim >= 2:
                weights.add(id(parameter))
    return {name: parameter for name, parameter in trainable(module).items() if id(parameter) in weights - excepted}


def random(module: nn.Module, *, generator: torch.Generator, parameters: Parameters | None = None) -> ParamDict:
    r"""Draw the saliency of each weight: the selector that the others must beat.

    .. math::
        s_k \sim \mathcal U[0, 1)

    Args:
        module: The module whose weights are meant.
        generator: Where the numbers come from, in the order of the parameters; the same on all processes.
        parameters: The parameters to score, by name; by default `prunable`.

    Returns:
        One tensor per parameter, of its shape and device, at least in float32 (fewer digits would be full of ties).

    Example:
        >>> saliency = random(nn.Linear(3, 2), generator=torch.Generator().manual_seed(0))
        >>> {name: tuple(value.shape) for name, value in saliency.items()}
        {'weight': (2, 3)}
    """
    return {
        name: torch.rand(p.shape, generator=generator, device=generator.device, dtype=_precise(p)).to(p.device)
        for name, p in _chosen(module, parameters).items()
    }


def magnitude(module: nn.Module, *, parameters: Parameters | None = None) -> ParamDict:
    r"""Return the size of each weight.

    .. math::
        s_k = |w_k|

    Args:
        module: The module whose weights are meant.
        parameters: The parameters to score, by name; by default `prunable`.

    Returns:
        One tensor per parameter, of its shape, dtype and device; in the unit of the weights.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-3.0, 2.0]]))
        >>> magnitude(layer)
        {'weight': tensor([[3., 2.]])}

    References:
        - Han, Pool, Tran, Dally. *Learning both Weights and Connections for Efficient Neural Networks.* NeurIPS 2015.
    """
    return {name: p.detach().abs() for name, p in _chosen(module, parameters).items()}


def obd(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    logits: Callable[[Any], Tensor] | None = None,
    all_reduce: AllReduce | None = None,
    parameters: Parameters | None = None,
) -> ParamDict:
    r"""Compute the saliency of Optimal Brain Damage for a classifier.

    .. math::
        s_k = \tfrac12 h_{kk} w_k^2, \qquad
        h_{kk} = \frac1N \sum_{n=1}^{N} \frac{\partial^2 \ell_n}{\partial w_k^2}

    with :math:`\ell` the cross-entropy: by how much its mean over the samples grows, to second order at a minimum, if
    this weight alone is set to zero. :math:`h_{kk}` is taken from `exact_fisher`, the diagonal of the generalised
    Gauss-Newton matrix. For networks of ReLU and max-pooling that is, almost everywhere, the diagonal of the Hessian;
    for others it is what LeCun, Denker and Solla take in its place, too (the Levenberg-Marquardt approximation).

    Samples count one by one, so the result does not depend on how they are batched, and labels are not needed.

    Args:
        module: The module whose weights are meant; run in evaluation mode.
        batches: Batches of any structure and size; by default inputs ``(B, *)`` of ``module``.
        logits: Maps a batch to the logits ``(B, C)``; by default ``module`` itself.
        all_reduce: Sums a tensor over processes that each see a shard of the data; see `exact_fisher`.
        parameters: The parameters to score, by name; by default `prunable`.

    Returns:
        One tensor per parameter, of its shape and device, at least in float32; in nats per sample.

    Raises:
        ValueError: If ``batches`` is empty, the module gives no logits ``(B, C)``, a gradient is not finite, or one of
            ``parameters`` is not a trainable one.

    Example:
        With two classes and logits ``w x`` the curvature is ``p (1 - p) x**2``, here 1.

        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.fill_(4.0)  # p = 1/2
        >>> obd(model, [torch.tensor([[2.0]])])["weight"].round(decimals=4)
        tensor([[8.],
                [8.]])

    References:
        - LeCun, Denker, Solla. *Optimal Brain Damage.* NeurIPS 1989.
    """
    chosen = _chosen(module, parameters)
    _require_trainable(chosen, module)
    return _half_times_square(exact_fisher(module, batches, logits=logits, all_reduce=all_reduce), chosen)


def obd_sd(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "sd",
    reduction: Reduction = "mean",
    all_reduce: AllReduce | None = None,
    parameters: Parameters | None = None,
) -> ParamDict:
    r"""Compute the saliency of OBD-SD: the spread of the gradient in the place of the curvature.

    .. math::
        s_k = \tfrac12 w_k^2 \, \mathrm{SD}_n(g_{nk}), \qquad g_{nk} = \frac{\partial \ell_n}{\partial w_k}

    with the standard deviation over all samples (division by ``N``). This is our reading: the method is described as a
    variation on `obd`, its formula is not published. Because the spread is the root of a curvature, weights in flat
    directions are spared more than by `obd`. Any loss will do, and the labels are the data's.

    Args:
        module: The module whose weights are meant; run in evaluation mode.
        loss: Maps a batch to the loss of the batch ``()``, or to one loss a sample ``(B,)``.
        batches: Batches of any structure and size.
        statistic: ``"sd"``; ``"rms"``, the root mean square, nearly the same at a minimum; or ``"variance"``, the
            square of ``"sd"``, with which weights rank much as with `obd`.
        reduction: Whether a loss of shape ``()`` is the mean or the sum over the samples.
        all_reduce: Sums a tensor over processes that each see a shard of the data; see `gradient_deviation`.
        parameters: The parameters to score, by name; by default `prunable`.

    Returns:
        One tensor per parameter, of its shape and device, at least in float32.

    Raises:
        ValueError: If ``statistic`` is unknown, ``batches`` is empty, ``loss`` is not as described, a gradient is not
            finite, or one of ``parameters`` is not a trainable one.

    Example:
        The loss ``w x`` has gradient ``x``: 1 and 3 lie one from their mean.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(4.0)
        >>> obd_sd(model, lambda x: model(x).mean(), [torch.tensor([[1.0], [3.0]])])
        {'weight': tensor([[8.]])}
    """
    chosen = _chosen(module, parameters)
    _require_trainable(chosen, module)
    spread = gradient_deviation(module, loss, batches, statistic=statistic, reduction=reduction, all_reduce=all_reduce)
    return _half_times_square(spread, chosen)


def check_saliency(saliency: Any, like: Parameters) -> None:
    """Raise if what a user's selector returned is no saliency of these parameters.

    Args:
        saliency: What it returned: one tensor a parameter, by name, the larger the more is lost with the weight.
        like: The parameters that are pruned, by name.

    Raises:
        TypeError: If ``saliency`` is not a mapping from names to tensors.
        ValueError: If a parameter is missing or unknown, or its saliency has another shape or NaN in it; the error
            names it.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> check_saliency({"weight": torch.zeros(2)}, prunable(layer))
        Traceback (most recent call last):
        ValueError: The saliency of 'weight' must have the parameter's shape (1, 2), but has (2,). Return one number a
        weight, larger for weights to keep.
    """
    if not isinstance(saliency, Mapping):
        raise TypeError(
            f"A selector must return the saliency of each parameter by its name, but got {type(saliency).__name__}."
            " Return a dict of tensors, such as `{name: p.detach().abs() for name, p in parameters.items()}`."
        )
    for name in [*like, *saliency]:
        if name not in saliency or name not in like:
            verb = "misses" if name in like else "adds"
            raise ValueError(
                f"A selector must return the saliency of the parameters that are pruned, {', '.join(like)}, but it"
                f" {verb} {name!r}. Return a dict with these names."
            )
    for name, parameter in like.items():
        value = saliency[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"The saliency of {name!r} must be a tensor, but got {type(value).__name__}.")
        if value.shape != parameter.shape:
            raise ValueError(
                f"The saliency of {name!r} must have the parameter's shape {tuple(parameter.shape)}, but has"
                f" {tuple(value.shape)}. Return one number a weight, larger for weights to keep."
            )
        if bool(value.isnan().any()):
            raise ValueError(
                f"Saliency must not be NaN, but that of {name!r} is in {int(value.isnan().sum())} places. Look for"
                " weights that diverged, or for a division by zero in the selector."
            )


def _chosen(module: nn.Module, parameters: Parameters | None) -> Parameters:
    return prunable(module) if parameters is None else parameters


def _require_trainable(parameters: Parameters, module: nn.Module) -> None:
    known = trainable(module)
    unknown = next((name for name in parameters if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"`parameters` must be trainable ones of the module, by their first name, but {unknown!r} is not. Unfreeze"
            " it, leave it out, or use a selector that needs no gradients: 'random' or 'magnitude'."
        )


def _half_times_square(curvature: ParamDict, parameters: Parameters) -> ParamDict:
    return {name: curvature[name] * p.detach().to(_precise(p)).square() / 2 for name, p in parameters.items()}


def _precise(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
