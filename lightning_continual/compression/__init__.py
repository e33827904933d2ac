"""Smaller networks: what to take away, how to take it away, and what it then weighs."""

from lightning_continual.compression.baselines import from_scratch, pareto_front, recommend, reinitialise_
from lightning_continual.compression.merging import merge_, merge_costs
from lightning_continual.compression.quantization import fake_quantized, quantize_affine, quantized
from lightning_continual.compression.ranking import amounts, keep_units, keep_weights
from lightning_continual.compression.saliency import magnitude, obd, obd_sd, prunable, random
from lightning_continual.compression.sizes import file_bytes, num_bytes, num_flops
from lightning_continual.compression.surgery import compact, resize_
from lightning_continual.compression.unit_saliency import dropout_damage, summed
from lightning_continual.compression.units import UnitGroup, kept_parameters, removed_units, unit_groups, zero_units_

__all__ = [
    "UnitGroup",
    "amounts",
    "compact",
    "dropout_damage",
    "fake_quantized",
    "file_bytes",
    "from_scratch",
    "keep_units",
    "keep_weights",
    "kept_parameters",
    "magnitude",
    "merge_",
    "merge_costs",
    "num_bytes",
    "num_flops",
    "obd",
    "obd_sd",
    "pareto_front",
    "prunable",
    "quantize_affine",
    "quantized",
    "random",
    "recommend",
    "reinitialise_",
    "removed_units",
    "resize_",
    "summed",
    "unit_groups",
    "zero_units_",
]
