"""Tasks, and how streams of them are made from ordinary data sets: lazily, no sample is copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_continual._avalanche import read_evaluation_stream, read_train_stream
from lightning_continual._datasets import Mapped, labels_of, mapped, num_samples, require_num_samples
from lightning_continual._images import OnImage, PermutePixels, Rotate


@dataclass(frozen=True, eq=False)
class Task:
    """The data available at one time of a stream.

    Args:
        train: Training data set, map-style or iterable.
        val: Validation data set, if there is one.
        test: Test data set, if there is one.
        name: A name for reports.
        classes: The labels of the task, if it has a set of its own.

    Raises:
        TypeError: If one of them is no data set (but a ``DataLoader``, say), or ``train`` is None.
        ValueError: If one of the data sets is known to be empty.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> task = Task(TensorDataset(torch.zeros(3, 2)), name="January", classes=torch.tensor([0, 1]))
        >>> len(task.train), task.test, task.classes
        (3, None, (0, 1))
    """

    train: Dataset[Any]
    val: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    name: str = ""
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            dataset = getattr(self, split)
            if dataset is None and split != "train":
                continue
            where = f"`{split}` of the task {self.name!r}" if self.name else f"`{split}` of a task"
            if isinstance(dataset, DataLoader) or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
                raise TypeError(
                    f"{where} must be a data set, but got {type(dataset).__name__}. Pass a `torch.utils.data.Dataset`"
                    " (of a loader: `loader.dataset`)."
                )
            if num_samples(dataset) == 0:
                remedy = "Take the task out of the stream" if split == "train" else "Pass None"
                raise ValueError(f"{where} must have samples, but it is empty. {remedy}, or check how it was split.")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(int(label) for label in self.classes))


def split_by_class(
    train: Dataset[Any],
    test: Dataset[Any] | None = None,
    *,
    num_tasks: int,
    class_order: Sequence[int] | None = None,
    seed: int | None = None,
    label: Callable[[Any], Any] | None = None,
) -> list[Task]:
    """Divide a data set into tasks of equally many classes each (class-incremental).

    Args:
        train: Map-style training data set of class labels; see `labels_of` for where labels are found.
        test: Test data set of the same classes, divided alike.
        num_tasks: Number of tasks; must divide the number of classes.
        class_order: The order in which classes arrive. Default: ascending.
        seed: Shuffles the classes instead.
        label: Returns the label of a sample, where `labels_of` does not find it.

    Returns:
        Tasks of `torch.utils.data.Subset`, samples in the order of the data set; labels are left as they are.

    Raises:
        TypeError: If a data set is iterable.
        ValueError: If ``num_tasks`` does not divide the number of classes, ``class_order`` is no permutation of the
            classes, both ``class_order`` and ``seed`` are given, no labels can be found, or ``test`` has other classes.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(8, 2), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))
        >>> [(task.name, task.train.indices) for task in split_by_class(data, num_tasks=2)]
        [('classes 0, 1', [0, 1, 6, 7]), ('classes 2, 3', [2, 3, 4, 5])]
    """
    _check_num_tasks(num_tasks)
    labels = labels_of(train, label)
    classes = sorted(set(labels.tolist()))
    if num_tasks > len(classes) or len(classes) % num_tasks:
        divisors = [divisor for divisor in range(1, len(classes) + 1) if len(classes) % divisor == 0]
        raise ValueError(
            f"`num_tasks` must divide the number of classes, but got num_tasks={num_tasks} and {len(classes)} classes."
            f" Pass one of {divisors}, or a `Subset` of the data set with other classes."
        )
    order = _class_order(classes, class_order, seed)
    test_labels = None if test is None else labels_of(test, label)
    unseen = set() if test_labels is None else set(test_labels.tolist()) - set(classes)
    if unseen:
        raise ValueError(
            f"`test` must have the classes of `train`, but also has {sorted(unseen)}. Pass a `Subset` without them."
        )
    share = len(order) // num_tasks
    groups = [order[start : start + share] for start in range(0, len(order), share)]
    return [
        Task(
            train=_of_classes(train, labels, group),
            test=None if test is None or test_labels is None else _of_classes(test, test_labels, group),
            name=f"classes {', '.join(map(str, group))}",
            classes=tuple(group),
        )
        for group in groups
    ]


def permute_pixels(
    train: Dataset[Any], test: Dataset[Any] | None = None, *, num_tasks: int, seed: int = 0
) -> list[Task]:
    """Make every task but the first from its own fixed permutation of the pixels (domain-incremental).

    The permutation acts on the positions, the same for training and test data and for all channels; it depends on
    ``seed``, the task's index and the number of positions alone. Images are permuted when a sample is read.

    Args:
        train: Training data set, map-style or iterable. Its images, tensors ``(H, W)``, ``(C, H, W)`` or ``(D,)``, are
            the sample itself, its first element, or its entry ``"image"``, ``"x"``, ``"pixel_values"`` or ``"input"``.
            One sample is read to check.
        test: Test data set, of which every task sees all samples.
        num_tasks: Number of tasks.
        seed: Determines the permutations.

    Returns:
        Tasks; the first has the data sets as they are.

    Raises:
        TypeError: If images are not tensors.
        ValueError: If ``num_tasks`` is less than 1, or an image has another shape.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> first, second = permute_pixels(TensorDataset(torch.arange(9.0).reshape(1, 9)), num_tasks=2)
        >>> first.train[0][0]
        tensor([0., 1., 2., 3., 4., 5., 6., 7., 8.])
        >>> second.train[0][0].equal(first.train[0][0]), second.train[0][0].sort().values.equal(first.train[0][0])
        (False, True)

    References:
        - Goodfellow et al. *An empirical investigation of catastrophic forgetting in gradient-based neural networks.*
          ICLR 2014.
    """
    _check_num_tasks(num_tasks)
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in range(1, num_tasks)]
    return _transformed(
        train,
        test,
        [None, *(PermutePixels(one) for one in seeds)],
        [f"permutation {task}" for task in range(num_tasks)],
    )


def rotate_images(
    train: Dataset[Any],
    test: Dataset[Any] | None = None,
    *,
    num_tasks: int,
    max_degrees: float = 180.0,
    seed: int | None = None,
) -> list[Task]:
    r"""Make every task from images turned by its own angle (domain-incremental).

    Task :math:`t` of :math:`T` is turned counter-clockwise by :math:`t / T` of ``max_degrees``, or, with ``seed``, by
    an angle drawn uniformly from :math:`[0, \text{max\_degrees})`, the first task included. Images are turned when
    a sample is read, interpolated bilinearly; what lies outside of the image counts as 0; integer images are rounded.

    Args:
        train: Training data set, map-style or iterable, of images ``(H, W)`` or ``(C, H, W)``; where a sample has its
            image, see `permute_pixels`. One sample is read to check.
        test: Test data set, of which every task sees all samples.
        num_tasks: Number of tasks.
        max_degrees: The end of the range of angles, excluded.
        seed: Draws the angles.

    Returns:
        Tasks; one of angle 0 has the data sets as they are.

    Raises:
        TypeError: If images are not tensors.
        ValueError: If ``num_tasks`` is less than 1, ``max_degrees`` is not finite, or an image has another shape.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> tasks = rotate_images(TensorDataset(torch.tensor([[[1, 2], [3, 4]]])), num_tasks=2)
        >>> tasks[1].name, tasks[1].train[0][0]
        ('rotation 90.0°', tensor([[2, 4],
                [1, 3]]))

    References:
        - Lopez-Paz, Ranzato. *Gradient episodic memory for continual learning.* NeurIPS 2017.
        - Buzzega et al. *Dark experience for general continual learning.* NeurIPS 2020.
    """
    _check_num_tasks(num_tasks)
    if not math.isfinite(max_degrees):
        raise ValueError(f"`max_degrees` must be finite, but got {max_degrees}. Pass an angle in degrees, as 180.0.")
    if seed is None:
        shares = [task / num_tasks for task in range(num_tasks)]
    else:
        generator = torch.Generator().manual_seed(seed)
        shares = [float(torch.rand((), dtype=torch.float64, generator=generator)) for _ in range(num_tasks)]
    angles = [share * max_degrees for share in shares]
    return _transformed(
        train,
        test,
        [Rotate(angle) if angle else None for angle in angles],
        [f"rotation {angle:.1f}°" for angle in angles],
    )


def split_by_time(
    dataset: Dataset[Any], timestamps: Iterable[Any], *, num_tasks: int, test_fraction: float = 0.0, seed: int = 0
) -> list[Task]:
    """Divide a data set into successive periods of (nearly) equally many samples.

    Samples are ordered by time, those of equal times as in the data set; times that are equal may fall on both sides of
    a boundary. Task :math:`t` of :math:`T` has the samples from ``t * N // T`` to ``(t + 1) * N // T`` of that order.

    Args:
        dataset: Map-style data set of :math:`N` samples.
        timestamps: One time a sample: numbers, ISO strings, datetimes, or anything else that can be compared.
        num_tasks: Number of tasks, at most :math:`N`.
        test_fraction: Share of each period that is held out at random as ``test``, rounded to whole samples.
        seed: Draws the samples that are held out.

    Returns:
        Tasks of `torch.utils.data.Subset` in the order of time.

    Raises:
        TypeError: If the data set is iterable, or times cannot be compared with each other.
        ValueError: If there are not as many times as samples, a time is NaN, there are fewer samples than tasks, or
            ``test_fraction`` leaves no sample of a period to train or to test.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(4))
        >>> tasks = split_by_time(data, ["2024-03-01", "2024-01-01", "2024-04-01", "2024-02-01"], num_tasks=2)
        >>> [(task.name, task.train.indices) for task in tasks]
        [('2024-01-01 to 2024-02-01', [1, 3]), ('2024-03-01 to 2024-04-01', [0, 2])]
    """
    _check_num_tasks(num_tasks)
    size = require_num_samples(dataset)
    times = timestamps.tolist() if isinstance(timestamps, Tensor) else list(timestamps)
    order = _time_order(times, size)
    if num_tasks > size:
        raise ValueError(
            f"`num_tasks` must not exceed the number of samples, but got num_tasks={num_tasks} and {size} samples. Pass"
            f" at most {size}."
        )
    if not 0.0 <= test_fraction < 1.0:
        raise ValueError(f"`test_fraction` must lie in [0, 1), but got {test_fraction}. Pass a share, as 0.2.")
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for task in range(num_tasks):
        period = order[task * size // num_tasks : (task + 1) * size // num_tasks]
        kept, held_out = _hold_out(period, test_fraction, generator)
        tasks.append(
            Task(
                train=Subset(dataset, kept),
                test=Subset(dataset, held_out) if test_fraction else None,
                name=f"{times[period[0]]} to {times[period[-1]]}",
            )
        )
    return tasks


def from_avalanche(benchmark: Any) -> list[Task]:
    """Read the tasks of an Avalanche benchmark: class-, domain- or task-incremental.

    A task's data sets are those of the experiences of ``train_stream``, ``valid_stream`` (or ``val_stream``) and
    ``test_stream``, the first with Avalanche's transforms for training, the others with those for evaluation. Samples
    lose their trailing task label, if they have one: a module sees ``(x, y)``. A test stream of one experience serves
    every task. Nothing is copied, and Avalanche is not imported.

    Args:
        benchmark: An Avalanche benchmark, or any object of its shape.

    Returns:
        Tasks, in the order of ``train_stream``. Their classes are those that the experience tells, else those of the
        ``targets`` of its data set.

    Raises:
        TypeError: If the object or one of its experiences lacks what an Avalanche benchmark has.
        ValueError: If a stream has another number of experiences than ``train_stream``.

    Example:
        With Avalanche: ``from_avalanche(SplitMNIST(n_experiences=5))``. Any object of that shape will do.

        >>> from types import SimpleNamespace
        >>> january = SimpleNamespace(dataset=[("x", 7), ("x", 3)], classes_in_this_experience={7, 3})
        >>> benchmark = SimpleNamespace(train_stream=[january], test_stream=[january])
        >>> from_avalanche(benchmark)
        [Task(train=[('x', 7), ('x', 3)], val=None, test=[('x', 7), ('x', 3)], name='experience 0', classes=(3, 7))]
    """
    train = read_train_stream(benchmark)
    valid_stream = "valid_stream" if hasattr(benchmark, "valid_stream") else "val_stream"
    val = read_evaluation_stream(benchmark, valid_stream, len(train))
    test = read_evaluation_stream(benchmark, "test_stream", len(train))
    return [
        Task(dataset, val[task], test[task], name=f"experience {task}", classes=classes)
        for task, (dataset, classes) in enumerate(train)
    ]


def _transformed(
    train: Dataset[Any],
    test: Dataset[Any] | None,
    transforms: Sequence[Callable[[Tensor], Tensor] | None],
    names: Sequence[str],
) -> list[Task]:
    """Make one task a transform of images, where ``None`` leaves the data sets as they are."""
    tasks = []
    for transform, name in zip(transforms, names, strict=True):
        if transform is None:
            tasks.append(Task(train, test=test, name=name))
            continue
        on_image = OnImage(transform)
        tasks.append(Task(mapped(train, on_image), test=None if test is None else mapped(test, on_image), name=name))
    if isinstance(tasks[-1].train, Mapped):
        with torch.random.fork_rng(devices=[]):  # images of a wrong kind: now, not when the second task begins
            tasks[-1].train[0]
    return tasks


def _class_order(classes: list[int], class_order: Sequence[int] | None, seed: int | None) -> list[int]:
    if class_order is not None and seed is not None:
        raise ValueError(
            f"One of `class_order` and `seed` must be None, but got {list(class_order)} and {seed}."
            " Pass the one you mean."
        )
    if class_order is not None:
        order = [int(one) for one in class_order]
        if sorted(order) != classes:
            raise ValueError(
                f"`class_order` must have each of the classes {classes} once, but got {order}. Pass them all."
            )
        return order
    if seed is not None:
        shuffled = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
        return [classes[place] for place in shuffled.tolist()]
    return classes


def _of_classes(dataset: Dataset[Any], labels: Tensor, classes: list[int]) -> Subset[Any]:
    return Subset(dataset, torch.isin(labels, torch.tensor(classes)).nonzero().flatten().tolist())


def _time_order(times: list[Any], size: int) -> list[int]:
    if len(times) != size:
        raise ValueError(
            f"`timestamps` must have one time a sample, but got {len(times)} times and {size} samples. Pass the times"
            " of this data set, in its order."
        )
    try:
        unordered = [place for place, time in enumerate(times) if time != time]  # not a number, not a time
        order = sorted(range(size), key=times.__getitem__)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`timestamps` must be comparable with each other, but got {type(times[0]).__name__}s where: {error}. Pass"
            " numbers, ISO strings or datetimes, all of one kind."
        ) from error
    if unordered:
        place = unordered[0]
        raise ValueError(f"`timestamps` must be times, but got {times[place]} for sample {place}. Leave it out.")
    return order


def _hold_out(period: list[int], fraction: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Divide a period at random into what is kept and what is held out, both in the order of time."""
    size = round(fraction * len(period))
    if fraction and not 0 < size < len(period):
        raise ValueError(
            f"`test_fraction` must leave samples to train and to test in every period, but {fraction} of {len(period)}"
            f" samples is {size}. Pass another share, or fewer tasks."
        )
    chosen = set(torch.randperm(len(period), generator=generator)[:size].tolist())
    kept = [sample for place, sample in enumerate(period) if place not in chosen]
    return kept, [period[place] for place in sorted(chosen)]


def _check_num_tasks(num_tasks: int) -> None:
    if num_tasks < 1:
        raise ValueError(
            f"`num_tasks` must be at least 1, but got {num_tasks}. Pass the number of tasks of the stream."
        )
