"""Avalanche benchmarks, read by their shape: Avalanche is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from lightning_continual._datasets import known_labels, mapped


def read_train_stream(benchmark: Any) -> list[tuple[Dataset[Any], tuple[int, ...] | None]]:
    """Return the data, with transforms for training, and the classes of each experience of ``train_stream``."""
    if not hasattr(benchmark, "train_stream"):
        raise TypeError(
            f"`benchmark` must be an Avalanche benchmark, but {type(benchmark).__name__} has no `train_stream`. Make"
            " one with `avalanche.benchmarks`, or a list of `Task` of your own."
        )
    read = []
    for experience in benchmark.train_stream:
        dataset = _data(experience, "train")
        classes = getattr(experience, "classes_in_this_experience", None)
        if classes is None:
            labels = known_labels(dataset)
            classes = None if labels is None else set(labels.tolist())
        read.append((dataset, None if classes is None else tuple(sorted(classes))))
    return read


def read_evaluation_stream(benchmark: Any, name: str, num_tasks: int) -> list[Dataset[Any] | None]:
    """Return the data for each task, with transforms for evaluation; a stream of one experience serves every task."""
    if not hasattr(benchmark, name):
        return [None] * num_tasks
    datasets: list[Dataset[Any] | None] = [_data(experience, "eval") for experience in getattr(benchmark, name)]
    if len(datasets) == 1:
        return datasets * num_tasks
    if len(datasets) != num_tasks:
        raise ValueError(
            f"`{name}` must have one experience or as many as `train_stream`, but has {len(datasets)} against"
            f" {num_tasks}. Make a list of `Task` of your own, and choose which data belongs to which task."
        )
    return datasets


def _data(experience: Any, transforms: str) -> Dataset[Any]:
    if not hasattr(experience, "dataset"):
        raise TypeError(
            f"An experience of an Avalanche benchmark must have a `dataset`, but {type(experience).__name__} has none."
            " Make the benchmark with `avalanche.benchmarks`."
        )
    dataset: Dataset[Any] = experience.dataset
    switch = getattr(dataset, transforms, None)
    dataset = switch() if callable(switch) else dataset
    return mapped(dataset, _drop_task_label) if hasattr(dataset, "targets_task_labels") else dataset


def _drop_task_label(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return {key: value for key, value in sample.items() if key != "targets_task_labels"}
    return tuple(sample[:-1])
