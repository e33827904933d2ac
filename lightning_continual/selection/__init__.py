"""What is trained of the data and of the weights: groups of samples and of weights, and the play of some of them."""

from lightning_continual.selection.grouping import Grouping
from lightning_continual.selection.history import History
from lightning_continual.selection.sample_rewards import Reward, SampleRewards
from lightning_continual.selection.samples import SampleSelection
from lightning_continual.selection.weight_arms import WeightArms, dealer
from lightning_continual.selection.weights import WeightSelection

__all__ = [
    "Grouping",
    "History",
    "Reward",
    "SampleRewards",
    "SampleSelection",
    "WeightArms",
    "WeightSelection",
    "dealer",
]
