"""What to ship: a trained network pruned, quantized and trained from scratch, compared by score and bytes."""

from lightning_continual.comparison.command import compress, load_compressed
from lightning_continual.comparison.setting import Setting
from lightning_continual.comparison.variants import Plan, compare

__all__ = ["Plan", "Setting", "compare", "compress", "load_compressed"]
