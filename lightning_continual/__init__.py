"""Continual learning for PyTorch Lightning: callbacks for any ``LightningModule``."""

from lightning_continual.callbacks.accuracy_matrix import AccuracyMatrixCallback
from lightning_continual.callbacks.adaptive_compression import AdaptiveCompressionCallback
from lightning_continual.callbacks.bandit_selection import BanditSelectionCallback
from lightning_continual.callbacks.clnp import CLNPCallback
from lightning_continual.callbacks.cost import CostCallback
from lightning_continual.callbacks.ewc import EWCCallback
from lightning_continual.callbacks.pruning import PruningCallback
from lightning_continual.callbacks.rehearsal import RehearsalCallback
from lightning_continual.callbacks.synapse_neuron import SynapseNeuronCallback
from lightning_continual.data import ContinualDataModule
from lightning_continual.heads import TaskHead
from lightning_continual.memory import ClassBalancedMemory, HerdingMemory, Memory, ReservoirMemory, TaskMemory
from lightning_continual.metrics import (
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
)
from lightning_continual.stream import ContinualCallback, TaskEarlyStopping, TaskStream, restore
from lightning_continual.tasks import (
    Task,
    from_avalanche,
    permute_pixels,
    rotate_images,
    split_by_class,
    split_by_time,
)

__version__ = "0.1.0"

__all__ = [
    "AccuracyMatrix",
    "AccuracyMatrixCallback",
    "AdaptiveCompressionCallback",
    "BanditSelectionCallback",
    "CLNPCallback",
    "ClassBalancedMemory",
    "ContinualCallback",
    "ContinualDataModule",
    "CostCallback",
    "EWCCallback",
    "HerdingMemory",
    "Memory",
    "PruningCallback",
    "RehearsalCallback",
    "ReservoirMemory",
    "SynapseNeuronCallback",
    "Task",
    "TaskEarlyStopping",
    "TaskHead",
    "TaskMemory",
    "TaskStream",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "from_avalanche",
    "intransigence",
    "learning_accuracy",
    "permute_pixels",
    "restore",
    "rotate_images",
    "split_by_class",
    "split_by_time",
]
