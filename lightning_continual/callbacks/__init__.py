"""The callbacks, one method each."""

from lightning_continual.callbacks.accuracy_matrix import AccuracyMatrixCallback
from lightning_continual.callbacks.adaptive_compression import AdaptiveCompressionCallback
from lightning_continual.callbacks.bandit_selection import BanditSelectionCallback
from lightning_continual.callbacks.clnp import CLNPCallback
from lightning_continual.callbacks.cost import CostCallback
from lightning_continual.callbacks.ewc import EWCCallback
from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.callbacks.rehearsal import RehearsalCallback
from lightning_continual.callbacks.synapse_neuron import SynapseNeuronCallback

__all__ = [
    "AccuracyMatrixCallback",
    "AdaptiveCompressionCallback",
    "BanditSelectionCallback",
    "CLNPCallback",
    "CostCallback",
    "EWCCallback",
    "PruningCallback",
    "RehearsalCallback",
    "SynapseNeuronCallback",
]
