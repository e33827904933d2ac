"""What a pruned network is compared with: itself trained from scratch; and which of many networks to take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_continual.compression.quantization import detached_copy
from lightning_continual.compression.sizes import check_kept

M = TypeVar("M", bound=nn.Module)


def reinitialise_(module: M, *, seed: int) -> M:
    """Draw the weights of a module anew, in place.

    Each submodule's own ``reset_parameters`` (with attention and transformers ``_reset_parameters``) is called, those
    inside a submodule before its own. So statistics of norms are reset, too, and on the CPU a chain of PyTorch's layers
    becomes what its constructors give after ``torch.manual_seed(seed)``. What a user's constructor does to weights is
    not known here: it belongs into a ``reset_parameters`` of the user's module, which has the last word.

    A parameter that nothing draws anew, such as an ``nn.Parameter`` of a module without ``reset_parameters``, or what a
    parametrized weight is computed from, keeps its value, and a warning names it. Buffers that no ``reset_parameters``
    writes to stay.

    Args:
        module: The module; on an error it is as it was.
        seed: Of the draws. The global random state is left alone.

    Returns:
        The module.

    Raises:
        Exception: What a ``reset_parameters`` raises.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> first = reinitialise_(layer, seed=0).weight.clone()
        >>> torch.equal(reinitialise_(layer, seed=0).weight, first)
        True
    """
    saved = [(one, one.detach().clone()) for one in [*module.parameters(), *module.buffers()]]
    gpus = sorted({one.device.index for one, _ in saved if one.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=gpus):
            for generator in [torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)]:
                generator.manual_seed(seed)
            kept_as_they_are = _draw_anew(module)
    except BaseException:
        _put_back(saved)
        raise
    _put_back([(one, value) for one, value in saved if id(one) in kept_as_they_are])
    if names := [repr(name) for name, one in module.named_parameters() if id(one) in kept_as_they_are]:
        warnings.warn(
            f"No `reset_parameters` draws {', '.join(names)} anew: trained values stay there, which flatters training"
            " from scratch. Give the module that owns them a `reset_parameters`.",
            stacklevel=2,
        )
    return module


def from_scratch(model: M, *, kept: Mapping[str, Tensor] | None = None, seed: int) -> M:
    """Return the same architecture with weights drawn anew, to be trained as a baseline of a pruned network.

    Widths are those of the given module: of a compacted network the baseline is as narrow. With ``kept``, the baseline
    has the same zeros; hold them there while it is trained by a `Pin`, as pruning does. The training budget is the
    caller's: as long as fine-tuning took (short), and as long as training and pruning took together (long).

    Args:
        model: The pruned network, which is left as it is.
        kept: By parameter name true where a weight is kept, of its shape; others become zero.
        seed: See `reinitialise_`, which also tells what is not drawn anew.

    Returns:
        The new network, detached from any Trainer; what is frozen and which mode it is in is as in ``model``.

    Raises:
        ValueError: If ``kept`` names no parameter of the model, or has another shape.
        TypeError: If ``kept`` does not hold booleans.

    Example:
        >>> pruned = nn.Linear(2, 1)
        >>> kept = {"weight": torch.tensor([[True, False]])}
        >>> from_scratch(pruned, kept=kept, seed=0).weight != 0
        tensor([[ True, False]])

    References:
        - Liu et al. *Rethinking the Value of Network Pruning.* ICLR 2019.
    """
    check_kept(kept or {}, model)
    result = reinitialise_(detached_copy(model), seed=seed)
    parameters = dict(result.named_parameters())
    with torch.no_grad():
        for name, mask in (kept or {}).items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)
    return result


def pareto_front(num_bytes: Tensor, score: Tensor) -> Tensor:
    r"""Tell which networks are worth considering: no other is at most as big and at least as good, and not the same.

    .. math::
        i \text{ is on the front} \iff \nexists j:\ b_j \le b_i,\ a_j \ge a_i,\ (b_j, a_j) \ne (b_i, a_i)

    Args:
        num_bytes: :math:`b`, ``(n,)``.
        score: :math:`a`, ``(n,)``, the higher the better. One that is NaN is never on the front.

    Returns:
        Booleans ``(n,)``; of several networks of equal size and score either all or none.

    Raises:
        ValueError: If the two are not of one shape ``(n,)``.

    Example:
        The third one is bigger than the second, and no better.

        >>> pareto_front(torch.tensor([10, 20, 30, 40]), torch.tensor([0.7, 0.9, 0.9, 0.95]))
        tensor([ True,  True, False,  True])
    """
    _check_pairs(num_bytes, score)
    smaller, better = num_bytes[:, None] < num_bytes, score[:, None] > score
    at_most_as_big, at_least_as_good = num_bytes[:, None] <= num_bytes, score[:, None] >= score
    beaten = (at_most_as_big & at_least_as_good & (smaller | better)).any(0)
    return ~beaten & ~score.isnan()


def recommend(num_bytes: Tensor, score: Tensor, full_score: float, tolerance: float) -> int | None:
    r"""Return the smallest network that is nearly as good as the full one: :math:`a_i \ge a_\text{full} - \epsilon`.

    Args:
        num_bytes: :math:`b`, ``(n,)``.
        score: :math:`a`, ``(n,)``, the higher the better. One that is NaN is not recommended.
        full_score: :math:`a_\text{full}`, of the network that nothing was taken from.
        tolerance: :math:`\epsilon`, not negative, in the unit of the scores.

    Returns:
        The index; of several of equal size the best one, of equally good ones the first. None where none is good
        enough.

    Raises:
        ValueError: If the tensors are not of one shape ``(n,)``, ``tolerance`` is negative, or a number is NaN.

    Example:
        >>> recommend(torch.tensor([10, 20, 30]), torch.tensor([0.70, 0.89, 0.91]), full_score=0.90, tolerance=0.02)
        1
    """
    _check_pairs(num_bytes, score)
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least 0, but got {tolerance}. Pass for example 0.01.")
    if math.isnan(full_score):
        raise ValueError(f"`full_score` must be a number, but got {full_score}. Has training diverged?")
    good = (score >= full_score - tolerance).nonzero().flatten().tolist()
    sizes, scores = num_bytes.tolist(), score.tolist()
    return min(good, key=lambda one: (sizes[one], -scores[one], one), default=None)


def _check_pairs(num_bytes: Tensor, score: Tensor) -> None:
    if num_bytes.ndim != 1 or num_bytes.shape != score.shape:
        raise ValueError(
            f"`num_bytes` and `score` must be of one shape (n,), but are of {tuple(num_bytes.shape)} and"
            f" {tuple(score.shape)}."
        )


def _draw_anew(module: nn.Module) -> set[int]:
    """Reset every submodule, and return the ids of the parameters that this did not reach; these are not restored."""
    # A parametrized weight is computed from others, which a reset of the layer does not write to.
    parametrized = {id(p) for one in module.modules() if isinstance(one, ParametrizationList) for p in one.parameters()}
    drawable = [one for one in module.parameters() if one.is_floating_point() or one.is_complex()]
    for one in drawable:
        if id(one) not in parametrized:
            one.fill_(math.nan)  # which shows wherever nothing is written
    for submodule in _inside_out(module, set()):
        reset = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
        if callable(reset):
            reset()
    return {id(one) for one in drawable if id(one) in parametrized or bool(one.isnan().any())}


def _inside_out(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """Yield every submodule once, what is inside of one before it."""
    if id(module) in seen:
        return
    seen.add(id(module))
    for child in module.children():
        yield from _inside_out(child, seen)
    yield module


def _put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for one, value in saved:
            one.copy_(value)
