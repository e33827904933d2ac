"""Memories: which of the samples seen are kept, and which of the kept ones come back.

A memory holds leaves (see `lightning_continual._batch`), so samples of any structure, and knows of each its task and,
where given, its label. Every memory draws its random numbers from a generator of its own.
"""

from lightning_continual.memory.grouped import ClassBalancedMemory, TaskMemory
from lightning_continual.memory.herding import HerdingMemory, herd
from lightning_continual.memory.memory import Memory, Selection
from lightning_continual.memory.reservoir import ReservoirMemory

__all__ = [
    "ClassBalancedMemory",
    "HerdingMemory",
    "Memory",
    "ReservoirMemory",
    "Selection",
    "TaskMemory",
    "herd",
]
