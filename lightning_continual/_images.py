"""Transforms of the images of a stream, as small callables that can be pickled (for the workers of a loader)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

KEYS = ("image", "x", "pixel_values", "input")


@dataclass(frozen=True)
class OnImage:
    """Apply a transform to the image of a sample, and keep the rest of the sample and its type.

    The image is the sample itself, the first element of a tuple, ``NamedTuple`` or list, or the entry of a mapping
    under the first of the keys ``"image"``, ``"x"``, ``"pixel_values"``, ``"input"`` that it has.

    Args:
        transform: Maps an image to an image.

    Raises:
        TypeError: When called with a sample whose image is no tensor.

    Example:
        >>> OnImage(torch.neg)((torch.ones(2), 7))
        (tensor([-1., -1.]), 7)
    """

    transform: Callable[[Tensor], Tensor]

    def __call__(self, sample: Any) -> Any:
        if isinstance(sample, Mapping):
            key = next((key for key in KEYS if key in sample), None)
            if key is None:
                raise TypeError(
                    f"A sample must have its image under one of the keys {', '.join(KEYS)}, but got the keys"
                    f" {list(sample)}. Rename the image's key in the data set."
                )
            return {**sample, key: self._image(sample[key])}
        if isinstance(sample, tuple | list) and sample:
            parts = (self._image(sample[0]), *sample[1:])
            return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)
        return self._image(sample)

    def _image(self, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            raise TypeError(
                f"The image of a sample must be a tensor, but got {type(image).__name__}. Make images tensors in the"
                " data set, as with `transform=torchvision.transforms.ToTensor()`."
            )
        return self.transform(image)


@dataclass(frozen=True)
class PermutePixels:
    r"""Move the pixels of an image to other positions, the same for all images and channels.

    .. math::
        y_{c, i} = x_{c, \pi(i)}, \qquad \pi \text{ a uniformly random permutation of the positions}

    Args:
        seed: Determines the permutation, together with the number of positions.

    Raises:
        ValueError: When called with an image that is not ``(H, W)``, ``(C, H, W)`` or ``(D,)``.

    Example:
        >>> PermutePixels(seed=0)(torch.arange(4)).sort().values
        tensor([0, 1, 2, 3])
    """

    seed: int

    def __call__(self, image: Tensor) -> Tensor:
        if image.ndim not in (1, 2, 3):
            raise ValueError(
                "An image must have the shape (H, W), (C, H, W) or (D,) for its pixels to be permuted, but got"
                f" {tuple(image.shape)}. Reshape it in the data set."
            )
        pixels = image.flatten(start_dim=-min(image.ndim, 2))  # (D,) or (C, D)
        permutation = _permutation(self.seed, pixels.shape[-1]).to(image.device)
        return pixels.index_select(-1, permutation).reshape(image.shape)


@dataclass(frozen=True)
class Rotate:
    r"""Turn an image counter-clockwise about its centre (as ``torch.rot90`` and torchvision do).

    With :math:`p, q` the pixel coordinates from the centre (x to the right, y down), interpolated bilinearly:

    .. math::
        y(p) = x(q), \qquad q = \begin{pmatrix} \cos a & -\sin a \\ \sin a & \cos a \end{pmatrix} p

    What lies outside of the image counts as 0. Integer images are rounded and keep their type.

    Args:
        degrees: The angle :math:`a` in degrees.

    Raises:
        ValueError: When called with an image that is not ``(H, W)`` or ``(C, H, W)``.

    Example:
        >>> Rotate(90.0)(torch.tensor([[1, 2], [3, 4]]))
        tensor([[2, 4],
                [1, 3]])
    """

    degrees: float

    def __call__(self, image: Tensor) -> Tensor:
        if image.ndim not in (2, 3):
            raise ValueError(
                f"An image must have the shape (H, W) or (C, H, W) to be rotated, but got {tuple(image.shape)}. Reshape"
                " it in the data set."
            )
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        height, width = image.shape[-2:]
        grid = _rotation_grid(self.degrees, height, width, dtype, image.device)
        planes = image.to(dtype).reshape(1, -1, height, width)
        rotated = grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        rotated = rotated if image.is_floating_point() else rotated.round()
        return rotated.reshape(image.shape).to(image.dtype)


@lru_cache(maxsize=128)
def _permutation(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=128)
def _rotation_grid(degrees: float, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return where each pixel of the rotated image is read, ``(1, H, W, 2)`` in units of half the image's sides."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]], dtype=torch.float64)
    return affine_grid(theta, [1, 1, height, width], align_corners=False).to(device, dtype)
