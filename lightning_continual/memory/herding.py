"""Exemplars whose mean feature is that of their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_continual._batch import Leaf
from lightning_continual.memory.grouped import GroupedMemory


@final
class HerdingMemory(GroupedMemory):
    """As many exemplars of every class, those whose mean feature approaches the class's best (iCaRL).

    At the end of a task, `choose` ranks the task's samples by `herd` and `add` takes the chosen ones. When later
    classes make quotas shrink, the tail of every ranking goes.

    Args:
        capacity: The number of exemplars, over all processes. 0 keeps nothing.
        growing: Whether ``capacity`` is per class, and the memory grows with the number of classes.
        path: A folder for the exemplars; None keeps them in RAM.
        seed: Of the memory's own generator.

    Raises:
        ValueError: If ``capacity`` is negative.
        OSError: If ``path`` cannot be written to.

    Example:
        >>> memory = HerdingMemory(capacity=2)
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> labels = torch.tensor([5, 5, 5])
        >>> indices, ranks = memory.choose(features, labels)
        >>> indices
        tensor([1, 0])
        >>> memory.add([indices], task=0, labels=labels[indices], ranks=ranks)
        >>> memory.draw(2, before=1)[0].sort().values
        tensor([0, 1])

    References:
        - Rebuffi et al. *iCaRL: Incremental classifier and representation learning.* CVPR 2017.
    """

    needs_labels: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def quota(self, num_classes: int) -> int:
        """Return how many exemplars this process holds of a class when there are ``num_classes``, rounded up.

        Example:
            >>> HerdingMemory(capacity=100).quota(3)
            34
        """
        return self._share if self.growing else -(-self._share // num_classes)

    def choose(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Choose exemplars of a task, as many of each class as there will be room for.

        Args:
            features: Of all samples of the task, ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            The indices of the chosen samples, and the rank of each within its class (0 is the first); both int64.

        Raises:
            ValueError: If ``labels`` are no integers ``(N,)``.
        """
        ids = self._described(len(features), 0, labels)["labels"]
        unique, new = torch.unique(ids, return_counts=True)
        known = torch.tensor([self._groups.get(group, -1) for group in unique.tolist()], dtype=torch.int64)
        counts = torch.cat((self._held, new[known < 0]))
        counts[known[known >= 0]] += new[known >= 0]
        numbers = known.clone()
        numbers[known < 0] = torch.arange(len(self._held), len(counts))
        quotas = self._quotas(counts, self._share)[numbers]
        indices, ranks = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for group, num in zip(unique.tolist(), torch.minimum(quotas, new).tolist(), strict=True):
            members = (ids == group).nonzero().flatten()
            indices.append(members[herd(features[members.to(features.device)], num)])
            ranks.append(torch.arange(num))
        return torch.cat(indices), torch.cat(ranks)

    def add(  # noqa: D417
        self, leaves: Sequence[Leaf], *, task: int, labels: Tensor | None = None, ranks: Tensor | None = None
    ) -> None:
        """Offer chosen samples to the memory.

        Args:
            ranks: The herding rank of each within its class, integers ``(B,)``; default: their order in the batch.

        Raises:
            ValueError: As `Memory.add`, and if ``ranks`` are not of shape ``(B,)``.
        """
        num = len(leaves[0])
        priorities = self._priorities(num) if ranks is None else -ranks.detach().to("cpu", torch.float64)
        if priorities.shape != (num,):
            raise ValueError(
                f"`ranks` must be of shape ({num},), but got {tuple(priorities.shape)}. Pass what `choose` returned."
            )
        self._add(leaves, self._described(num, task, labels), priorities)

    def _priorities(self, num: int) -> Tensor:
        return -torch.arange(num, dtype=torch.float64)

    def _ids(self, columns: dict[str, Tensor]) -> Tensor:
        return columns["labels"]


def herd(features: Tensor, num: int) -> Tensor:
    r"""Rank samples so that the mean feature of the first few is close to that of all.

    With features :math:`\varphi` normalised to length 1, and their mean :math:`\mu`, one after the other is picked:

    .. math::
        p_k = \operatorname*{argmin}_{x} \Bigl\| \mu - \frac1k \Bigl(\varphi(x) + \sum_{j<k} \varphi(p_j)\Bigr) \Bigr\|

    without repetition.

    Args:
        features: ``(N, D)``.
        num: How many to pick; at most ``N`` are.

    Returns:
        The indices of the picked samples, in their order (int64, ``(num,)``, on the CPU).

    Example:
        The mean of (1, 0), (0.6, 0.8), (0, 1) is (0.53, 0.6): the second is closest; with it, the first mends more.

        >>> herd(torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), 3)
        tensor([1, 0, 2])

    References:
        - Rebuffi et al. *iCaRL: Incremental classifier and representation learning.* CVPR 2017, Algorithm 4.
    """
    features = torch.nn.functional.normalize(features.detach().float())
    num = min(num, len(features))
    mean, squares = features.mean(0), features.square().sum(1)
    picked = torch.empty(num, dtype=torch.int64, device=features.device)
    barred = torch.zeros_like(squares)
    total = torch.zeros_like(mean)
    for k in range(1, num + 1):
        # ||k mean - total - x||^2 without what is the same for all x.
        distances = squares - 2 * (features @ (k * mean - total)) + barred
        picked[k - 1] = best = distances.argmin()
        barred[best] = torch.inf
        total += features[best]
    return picked.cpu()
