"""Estimators of the diagonal of the Fisher information, and what else is made of gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_continual.importance.fallback import ordinary_gradients
from lightning_continual.importance.moments import Moments, accumulator_dtype
from lightning_continual.importance.per_sample import PerSampleGradients, Reduction, check_finite
from lightning_continual.importance.undisturbed import undisturbed
from lightning_continual.parameters import ParamDict, trainable

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Maps the tensor of this process to the sum of the tensors of all processes."""
Loss: TypeAlias = Callable[[Any], Tensor]
Statistic: TypeAlias = Literal["sd", "rms", "variance"]


def exact_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    logits: Callable[[Any], Tensor] | None = None,
    all_reduce: AllReduce | None = None,
) -> ParamDict:
    r"""Compute the diagonal of the Fisher information of a classifier.

    The expectation over labels is taken under the model's own predictive distribution:

    .. math::
        F_i = \frac1N \sum_{n=1}^{N} \sum_{c=1}^{C} p_\theta(c \mid x_n)
              \left(\frac{\partial \log p_\theta(c \mid x_n)}{\partial \theta_i}\right)^{\!2}

    Gradients are squared one sample at a time, so the result does not depend on how samples are batched. One forward
    pass and ``C`` backward passes a batch. This is also the diagonal of the generalised Gauss-Newton matrix of the
    cross-entropy, hence for networks of ReLU and max-pooling, almost everywhere, that of its Hessian.

    Args:
        model: The module whose trainable parameters are meant.
        batches: Batches of any structure and size; by default inputs ``(B, *)`` of ``model``.
        logits: Maps a batch to the logits ``(B, C)``; by default ``model`` itself.
        all_reduce: Sums a tensor over processes that each see a shard of the data; it is applied to the sums and the
            count before they are divided.

    Returns:
        One tensor per trainable parameter, of the parameter's shape, dtype and device; zero where the parameter is not
        used.

    Raises:
        ValueError: If ``batches`` is empty, the module gives no logits ``(B, C)``, or a gradient is not finite.

    Example:
        With two classes and logits ``w x`` the Fisher information is ``p (1 - p) x**2``.

        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.zero_()  # p = 1/2 everywhere
        >>> exact_fisher(model, [torch.tensor([[2.0]])])["weight"]
        tensor([[1.0000],
                [1.0000]])

    References:
        - Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017.
        - van de Ven. *On the Computation of the Fisher Information in Continual Learning.* ICLR Blogposts 2025.
        - LeCun, Denker, Solla. *Optimal Brain Damage.* NeurIPS 1989.
    """

    def weighted_log_probabilities(batch: Any) -> Tensor:
        log_probabilities = _logits(logits or model, batch, "exact").log_softmax(1)
        # The square of the weight sqrt(p) is the p of the formula.
        return (log_probabilities.detach() / 2).exp() * log_probabilities

    with undisturbed(model):
        return _mean_squares(PerSampleGradients(model, weighted_log_probabilities), batches, all_reduce)


def sampled_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    generator: torch.Generator,
    logits: Callable[[Any], Tensor] | None = None,
    all_reduce: AllReduce | None = None,
) -> ParamDict:
    r"""Estimate the diagonal of the Fisher information of a classifier with one label a sample, drawn from the model.

    .. math::
        F_i = \frac1N \sum_{n=1}^{N} \left(\frac{\partial \log p_\theta(y_n \mid x_n)}{\partial \theta_i}\right)^{\!2},
        \qquad y_n \sim p_\theta(\cdot \mid x_n)

    Its expectation is `exact_fisher`, its cost does not grow with the number of classes. The label is found from one
    uniform number a sample, so the same generator gives the same labels however samples are batched.

    Args:
        model: The module whose trainable parameters are meant.
        batches: Batches of any structure and size; by default inputs ``(B, *)`` of ``model``.
        generator: Where the labels come from; its state advances by one number a sample.
        logits: Maps a batch to the logits ``(B, C)``; by default ``model`` itself.
        all_reduce: See `exact_fisher`.

    Returns:
        One tensor per trainable parameter, of the parameter's shape, dtype and device.

    Raises:
        ValueError: If ``batches`` is empty, the module gives no logits ``(B, C)``, or a gradient is not finite.

    Example:
        A model without doubt draws the label that it predicts, and its Fisher information is zero.

        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[200.0], [0.0]]))
        >>> sampled_fisher(model, [torch.ones(3, 1)], generator=torch.Generator())["weight"]
        tensor([[0.],
                [0.]])

    References:
        - Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017.
        - van de Ven. *On the Computation of the Fisher Information in Continual Learning.* ICLR Blogposts 2025.
    """

    def labels(batch: Any) -> Tensor:
        with torch.no_grad():
            values = _logits(logits or model, batch, "sampled")
        cumulative = values.cpu().double().softmax(1).cumsum(1)
        uniform = torch.rand(len(values), 1, generator=generator, device=generator.device, dtype=torch.float64).cpu()
        return (cumulative < uniform).sum(1).clamp(max=values.shape[1] - 1).to(values.device)

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(_logits(logits or model, batch[0], "sampled"), batch[1], reduction="none")

    with undisturbed(model):
        labelled = ((batch, labels(batch)) for batch in batches)
        return _mean_squares(PerSampleGradients(model, loss), labelled, all_reduce)


def empirical_fisher(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    reduction: Reduction = "mean",
    all_reduce: AllReduce | None = None,
) -> ParamDict:
    r"""Compute the mean square of the gradients of single samples; for a negative log-likelihood, the empirical Fisher.

    .. math::
        F_i = \frac1N \sum_{n=1}^{N} \left(\frac{\partial \ell_n}{\partial \theta_i}\right)^{\!2}

    where :math:`\ell_n` is the loss of a batch that holds sample ``n`` alone. Any loss will do, and the labels are the
    data's. Gradients are squared one sample at a time, so the result does not depend on how samples are batched.

    A weighted mean (class weights, padding that is ignored) counts for what it is on each sample alone, where a weight
    common to the sample cancels. To have weights counted, return one weighted loss a sample.

    Args:
        module: The module whose trainable parameters are meant.
        loss: Maps a batch to the loss of the batch ``()``, or to one loss a sample ``(B,)``.
        batches: Batches of any structure and size.
        reduction: Whether a loss of shape ``()`` is the mean or the sum over the samples.
        all_reduce: See `exact_fisher`.

    Returns:
        One tensor per trainable parameter, of the parameter's shape, dtype and device; zero where the parameter is not
        used.

    Raises:
        ValueError: If ``batches`` is empty, ``loss`` is not as described, or a gradient is not finite.

    Example:
        The loss ``w x`` has gradient ``x``: the mean of 1 and 9.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> empirical_fisher(model, lambda x: model(x).mean(), [torch.tensor([[1.0], [3.0]])])["weight"]
        tensor([[5.]])

    References:
        - Kirkpatrick et al. *Overcoming catastrophic forgetting in neural networks.* PNAS 2017.
        - van de Ven. *On the Computation of the Fisher Information in Continual Learning.* ICLR Blogposts 2025.
    """
    with undisturbed(module):
        return _mean_squares(PerSampleGradients(module, loss, reduction), batches, all_reduce)


def batched_fisher(
    module: nn.Module, loss: Loss, batches: Iterable[Any], *, all_reduce: AllReduce | None = None
) -> ParamDict:
    r"""Compute the mean square of the gradients of batches: only to compare with work that used it.

    .. math::
        F_i = \frac1K \sum_{k=1}^{K} \left(\frac{\partial L_k}{\partial \theta_i}\right)^{\!2}

    where :math:`L_k` is the loss of batch ``k``, a mean over its samples, as in Avalanche and many others. It depends
    on how samples are batched: near a minimum it is smaller than `empirical_fisher` by the batch size, and so the
    strength that goes with it is larger by as much.

    Args:
        module: The module whose trainable parameters are meant.
        loss: Maps a batch to its loss ``()``.
        batches: Batches of any structure and size.
        all_reduce: See `exact_fisher`.

    Returns:
        One tensor per trainable parameter, of the parameter's shape, dtype and device.

    Raises:
        ValueError: If ``batches`` is empty, or a gradient is not finite.

    Example:
        The loss ``w x`` has gradient ``x``: the mean of 1 and 3, squared.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> batched_fisher(model, lambda x: model(x).mean(), [torch.tensor([[1.0], [3.0]])])["weight"]
        tensor([[4.]])

    References:
        - van de Ven. *On the Computation of the Fisher Information in Continual Learning.* ICLR Blogposts 2025.
    """
    with undisturbed(module):
        parameters = trainable(module)
        moments = Moments(with_sums=False)
        count = 0
        for batch in batches:
            new = Moments(with_sums=False)
            for gradients in ordinary_gradients([loss(batch)], list(parameters.values())):
                new.add_single(parameters, gradients)
            check_finite(new, parameters, count)
            moments.update(new, parameters)
            count += 1
        return _like(parameters, _mean(parameters, moments.squares, count, all_reduce))


def gradient_deviation(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "sd",
    reduction: Reduction = "mean",
    all_reduce: AllReduce | None = None,
) -> ParamDict:
    r"""Compute how far the gradients of single samples spread.

    .. math::
        \mathrm{SD}_i = \sqrt{\frac1N \sum_{n=1}^{N} (g_{ni} - \bar g_i)^2}, \qquad
        \mathrm{RMS}_i = \sqrt{\frac1N \sum_{n=1}^{N} g_{ni}^2}, \qquad
        g_n = \frac{\partial \ell_n}{\partial \theta}

    with :math:`\ell_n` as in `empirical_fisher`. The variance is computed as the mean square less the squared mean,
    which rounds badly where the spread is far below the mean.

    Args:
        module: The module whose trainable parameters are meant.
        loss: Maps a batch to the loss of the batch ``()``, or to one loss a sample ``(B,)``.
        batches: Batches of any structure and size.
        statistic: The standard deviation ``"sd"`` over all samples (division by ``N``), its square ``"variance"``, or
            the root mean square ``"rms"``.
        reduction: Whether a loss of shape ``()`` is the mean or the sum over the samples.
        all_reduce: See `exact_fisher`.

    Returns:
        One tensor per trainable parameter, of the parameter's shape, dtype and device.

    Raises:
        ValueError: If ``statistic`` is unknown, ``batches`` is empty, ``loss`` is not as described, or a gradient is
            not finite.

    Example:
        The loss ``w x`` has gradient ``x``: 1 and 3 lie one from their mean.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> gradient_deviation(model, lambda x: model(x).mean(), [torch.tensor([[1.0], [3.0]])])["weight"]
        tensor([[1.]])
    """
    if statistic not in ("sd", "rms", "variance"):
        raise ValueError(f"`statistic` must be 'sd', 'rms' or 'variance', but got {statistic!r}.")
    with undisturbed(module):
        gradients = PerSampleGradients(module, loss, reduction, with_sums=statistic != "rms")
        for batch in batches:
            gradients.update(batch)
    squares = _mean(gradients.parameters, gradients.moments.squares, gradients.count, all_reduce)
    if statistic != "rms":
        means = _mean(gradients.parameters, gradients.moments.sums, gradients.count, all_reduce)
        squares = {name: (square - means[name].square()).clamp(min=0) for name, square in squares.items()}
    if statistic != "variance":
        squares = {name: square.sqrt() for name, square in squares.items()}
    return _like(gradients.parameters, squares)


def _mean_squares(gradients: PerSampleGradients, batches: Iterable[Any], all_reduce: AllReduce | None) -> ParamDict:
    for batch in batches:
        gradients.update(batch)
    parameters = gradients.parameters
    return _like(parameters, _mean(parameters, gradients.moments.squares, gradients.count, all_reduce))


def _mean(parameters: ParamDict, sums: ParamDict, count: int, all_reduce: AllReduce | None) -> ParamDict:
    """Divide the sums, zero where there is none, by the count, both first summed over processes."""
    sums = {
        name: sums[name] if name in sums else torch.zeros_like(p, dtype=accumulator_dtype(p), requires_grad=False)
        for name, p in parameters.items()
    }
    if all_reduce is not None:
        device = next(iter(sums.values())).device
        count = int(all_reduce(torch.tensor(count, device=device)))
        sums = {name: all_reduce(value) for name, value in sums.items()}
    if count == 0:
        raise ValueError("`batches` must hold at least one batch, but it is empty. A generator can be read only once.")
    return {name: value / count for name, value in sums.items()}


def _like(parameters: ParamDict, values: ParamDict) -> ParamDict:
    return {name: value.to(parameters[name].dtype) for name, value in values.items()}


def _logits(model: Callable[[Any], Any], batch: Any, kind: str) -> Tensor:
    logits = model(batch)
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 2 and logits.shape[1] > 1:
        return logits
    found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(
        f"The {kind} Fisher information needs logits of shape (B, C) with C > 1, but the module gives {found}. Pass"
        " `logits`, a function from a batch to logits, or use the empirical Fisher information, which needs none."
    )
