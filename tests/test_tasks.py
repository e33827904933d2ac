import math
import os
import pickle
from collections import namedtuple
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_continual._datasets import labels_of
from lightning_continual.tasks import (
    Task,
    from_avalanche,
    permute_pixels,
    rotate_images,
    split_by_class,
    split_by_time,
)

DATA = os.environ.get("LIGHTNING_CONTINUAL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="LIGHTNING_CONTINUAL_DATA names no folder of data sets")
# Avalanche imports jaxopt where that is installed, and warns of its own streams.
avalanche_may_warn = pytest.mark.filterwarnings(
    "ignore:JAXopt is no longer maintained:DeprecationWarning",
    "ignore:stream generator will be converted to a list:UserWarning",
)


class Samples(Dataset):
    """Map-style samples that count how often each is read."""

    def __init__(self, samples, **attributes):
        self.samples = samples
        self.reads = [0] * len(samples)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.samples[index]


class Batched(Samples):
    def __getitems__(self, indices):
        return [self.samples[index] for index in indices]


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class SizedStream(Stream):
    def __len__(self):
        return len(self.samples)


Pair = namedtuple("Pair", ["picture", "label"])


def images(num=6, shape=(2, 4, 5), **kwargs):
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(1), **kwargs)


def remainder(value):
    return value % 2


def second(sample):
    return sample[1]


# --- Task


def test_a_task_keeps_its_data_sets_and_the_labels_as_plain_numbers():
    data, val = TensorDataset(torch.zeros(3)), TensorDataset(torch.zeros(2))
    task = Task(data, val, name="May", classes=torch.tensor([4, 1]))
    assert (task.train, task.val, task.test, task.name) == (data, val, None, "May")
    assert task.classes == (4, 1)
    assert all(type(label) is int for label in task.classes)
    with pytest.raises(AttributeError):
        task.name = "June"


@pytest.mark.parametrize("data", [Stream([1]), SizedStream([])], ids=["no length", "length 0"])
def test_a_task_takes_an_iterable_data_set_without_asking_for_its_length(data):
    assert Task(data).train is data


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_names_the_empty_data_set(split):
    datasets = {"train": [1], split: TensorDataset(torch.zeros(0))}
    with pytest.raises(ValueError, match=rf"`{split}` of the task 'May' must have samples, but it is empty\. \w+"):
        Task(**datasets, name="May")


@pytest.mark.parametrize("data", [None, 3, DataLoader([1])], ids=lambda data: type(data).__name__)
def test_a_task_refuses_what_is_no_data_set(data):
    with pytest.raises(TypeError, match=f"`train` of a task must be a data set, but got {type(data).__name__}. Pass"):
        Task(data)


# --- Labels


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, lambda y: np.array(y, np.uint8), torch.Tensor])
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_are_taken_from_an_attribute_without_reading_samples(kind, name):
    data = Samples(["?"] * 3, **{name: kind([2, 0, 1])})
    assert labels_of(data).dtype == torch.int64
    assert labels_of(data).tolist() == [2, 0, 1]
    assert data.reads == [0, 0, 0]


def test_labels_follow_subsets_and_concatenations_without_reading_samples():
    data = Samples(["?"] * 4, targets=[5, 6, 7, 8])
    nested = ConcatDataset([Subset(Subset(data, [3, 1, 0]), np.array([2, 0])), TensorDataset(torch.tensor([9]))])
    assert labels_of(nested).tolist() == [5, 8, 9]
    assert data.reads == [0] * 4


def test_labels_are_read_where_only_some_parts_of_a_concatenation_tell_theirs():
    data = ConcatDataset([TensorDataset(torch.tensor([9])), Samples([("x", 4)])])
    assert labels_of(data).tolist() == [9, 4]


def test_labels_are_what_a_sample_shows_after_the_target_transform():
    assert labels_of(Samples(["?"] * 3, targets=torch.tensor([4, 3, 5]), target_transform=remainder)).tolist() == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": None},
        {"labels": ["cat", "dog", "eel"]},  # the names of the classes, as many as samples
        {"labels": {0: "cat", 1: "dog", 2: "eel"}},
        {"targets": [0, 1]},
        {"targets": torch.zeros(3, 2)},
        {"targets": torch.tensor([0.5, 1.0, 2.0])},
        {"targets": torch.tensor(3)},
        {"targets": remainder},
    ],
    ids=lambda attributes: str(attributes).partition(" at 0x")[0],  # the same in every process
)
def test_an_attribute_that_holds_no_label_a_sample_is_passed_over(attributes):
    assert labels_of(Samples([("x", 7), ("x", 8), ("x", 9)], **attributes)).tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "sample",
    [("x", 3), ["x", torch.tensor(3)], Pair("x", np.int64(3)), ("x", torch.tensor([3.0]))]
    + [{"x": 0, key: 3} for key in ("label", "labels", "y", "target")],
    ids=str,
)
def test_other_labels_are_found_by_reading_each_sample_once(sample):
    data = Samples([sample, sample])
    assert labels_of(data).tolist() == [3, 3]
    assert data.reads == [1, 1]


def test_a_function_finds_labels_even_where_the_data_set_tells_others():
    data = Samples([("x", 3, "extra"), ("x", 4, "extra")], targets=[8, 9])
    assert labels_of(data, label=second).tolist() == [3, 4]


@pytest.mark.parametrize(
    "sample", [torch.zeros(3), ("x", "3"), ("x", 0.5), ("x", torch.zeros(3)), {"x": 1}, (), ("x", math.inf)], ids=str
)
def test_a_sample_without_a_label_is_refused_with_the_remedy(sample):
    with pytest.raises(ValueError, match=r"whole number for a label, but sample 0 has .*Pass `label=`, a function"):
        labels_of([sample])


def test_labels_of_an_iterable_data_set_are_refused():
    with pytest.raises(TypeError, match=r"must be map-style .* but got Stream\. Make a `Task` of each"):
        labels_of(Stream([("x", 1)]))


# --- split_by_class


def test_classes_come_in_equal_groups_and_each_sample_once():
    labels = torch.tensor([3, 9, 1, 1, 7, 3, 9, 7])
    tasks = split_by_class(TensorDataset(torch.arange(8), labels), num_tasks=2)
    assert [task.classes for task in tasks] == [(1, 3), (7, 9)]
    assert [task.name for task in tasks] == ["classes 1, 3", "classes 7, 9"]
    assert [[int(x) for x, _ in task.train] for task in tasks] == [[0, 2, 3, 5], [1, 4, 6, 7]]
    assert all(task.test is None and task.val is None for task in tasks)


def test_test_data_is_divided_as_the_training_data_is():
    data = TensorDataset(torch.arange(4), torch.arange(4))
    tasks = split_by_class(data, Subset(data, [3, 2, 1, 0, 3]), num_tasks=2, class_order=[2, 0, 3, 1])
    assert [task.classes for task in tasks] == [(2, 0), (3, 1)]
    assert [[int(x) for x, _ in task.train] for task in tasks] == [[0, 2], [1, 3]]
    assert [[int(x) for x, _ in task.test] for task in tasks] == [[2, 0], [3, 1, 3]]


def test_a_seed_shuffles_the_classes_reproducibly_and_leaves_the_random_stream_alone():
    data = TensorDataset(torch.arange(10), torch.arange(10))
    state = torch.get_rng_state()
    orders = [[task.classes[0] for task in split_by_class(data, num_tasks=10, seed=seed)] for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10))


def test_splitting_by_class_reads_no_sample_and_copies_no_tensor():
    x = torch.rand(6, 2)
    data = Samples(list(x), targets=[0, 1, 2, 0, 1, 2])
    tasks = split_by_class(data, data, num_tasks=3)
    assert data.reads == [0] * 6
    assert [task.train[1].data_ptr() for task in tasks] == [x[index].data_ptr() for index in (3, 4, 5)]


def test_classes_can_be_told_by_a_function_of_the_sample():
    tasks = split_by_class(
        [("x", 1, "a"), ("x", 0, "b")], [("x", 0, "c")] * 2 + [("x", 1, "d")], num_tasks=2, label=second
    )
    assert [task.train[0][2] for task in tasks] == ["b", "a"]
    assert [len(task.test) for task in tasks] == [2, 1]


@pytest.mark.parametrize("num_tasks", [4, 12])
def test_classes_that_do_not_divide_are_refused_with_the_divisors(num_tasks):
    data = TensorDataset(torch.arange(6), torch.arange(6))
    with pytest.raises(ValueError, match=rf"num_tasks={num_tasks} and 6 classes\. Pass one of \[1, 2, 3, 6\]"):
        split_by_class(data, num_tasks=num_tasks)


def test_a_data_set_without_samples_has_no_classes_to_divide():
    with pytest.raises(ValueError, match="num_tasks=1 and 0 classes"):
        split_by_class([], num_tasks=1)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]], ids=str)
def test_a_class_order_that_is_no_permutation_is_refused(order):
    data = TensorDataset(torch.arange(3), torch.arange(3))
    with pytest.raises(
        ValueError, match=r"`class_order` must have each of the classes \[0, 1, 2\] once, but got \[0, 1"
    ):
        split_by_class(data, num_tasks=3, class_order=order)


def test_a_class_order_and_a_seed_exclude_each_other():
    with pytest.raises(ValueError, match=r"One of `class_order` and `seed` must be None, but got \[0\] and 0\. Pass"):
        split_by_class(TensorDataset(torch.zeros(1)), num_tasks=1, class_order=[0], seed=0)


def test_classes_that_only_the_test_data_has_are_refused_and_not_dropped():
    train, test = TensorDataset(torch.arange(2)), TensorDataset(torch.arange(4))
    with pytest.raises(ValueError, match=r"`test` must have the classes of `train`, but also has \[2, 3\]\. Pass a"):
        split_by_class(train, test, num_tasks=2)


@needs_data
def test_fashion_mnist_is_split_by_its_targets_without_reading_an_image(monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    train, test = (datasets.FashionMNIST(DATA, train=part) for part in (True, False))
    monkeypatch.setattr(datasets.FashionMNIST, "__getitem__", None)
    tasks = split_by_class(train, test, num_tasks=5)
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [(len(task.train), len(task.test)) for task in tasks] == [(12_000, 2_000)] * 5
    assert all(set(labels_of(task.test).tolist()) == set(task.classes) for task in tasks)


# --- permute_pixels


def test_the_first_task_has_the_data_sets_as_they_are():
    train, test = TensorDataset(images()), TensorDataset(images())
    first = permute_pixels(train, test, num_tasks=2)[0]
    assert first.train is train
    assert first.test is test


@pytest.mark.parametrize("shape", [(20,), (4, 5), (1, 4, 5), (3, 4, 5)], ids=str)
def test_pixels_are_moved_by_one_permutation_for_all_images_channels_and_splits(shape):
    positions = torch.arange(20).reshape(shape[-2:]).expand(shape).clone()
    x = torch.stack([positions, positions + 100])
    _, task = permute_pixels(TensorDataset(x, torch.tensor([7, 8])), TensorDataset(x.flip(0)), num_tasks=2)
    permutation = task.train[0][0].reshape(-1, 20)[0]
    assert permutation.equal(permute_pixels([torch.arange(20)], num_tasks=2)[1].train[0])
    assert permutation.sort().values.equal(torch.arange(20))
    for image in (task.train[0][0], task.train[1][0] - 100, task.test[0][0] - 100, task.test[1][0]):
        assert image.shape == shape
        assert (image.reshape(-1, 20) == permutation).all()
    assert task.train[1][1] == 8


def test_the_permutation_of_a_task_is_a_function_of_seed_and_index_alone():
    x = torch.arange(30).reshape(1, 30)

    def permuted(num_tasks, seed):
        return [task.train[0][0].tolist() for task in permute_pixels(TensorDataset(x), num_tasks=num_tasks, seed=seed)]

    state = torch.get_rng_state()
    five, other = permuted(5, 0), permuted(5, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert permuted(3, 0) == five[:3]
    assert len({tuple(row) for row in five + other[1:]}) == 9


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, 1),
        lambda x: [x, 1],
        lambda x: Pair(x, 1),
        lambda x: {"image": x, "y": 1},
        lambda x: {"y": 1, "x": x},
        lambda x: {"pixel_values": x, "y": 1},
        lambda x: {"input": x, "y": 1},
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "image", "x", "pixel_values", "input"],
)
def test_the_image_is_found_in_the_sample_and_the_rest_is_kept(make):
    x = torch.arange(9)
    (expected,) = permute_pixels([x], num_tasks=2)[1].train
    assert not expected.equal(x)
    (found,) = permute_pixels(Samples([make(x)]), num_tasks=2)[1].train
    assert str(found) == str(make(expected))
    assert type(found) is type(make(expected))


def test_samples_are_transformed_when_they_are_read_and_one_to_check():
    data = Samples([(x, 0) for x in images()])
    tasks = permute_pixels(data, num_tasks=9)
    assert data.reads == [1, 0, 0, 0, 0, 0]
    assert tasks[3].train[4]
    assert data.reads == [1, 0, 0, 0, 1, 0]


def test_samples_are_read_in_batches_where_the_data_set_can():
    x = images()
    data = Batched([(one, index) for index, one in enumerate(x)])
    task = permute_pixels(data, num_tasks=2)[1]
    assert [label for _, label in task.train.__getitems__([5, 2])] == [5, 2]
    one_by_one = [task.train[index] for index in (5, 2)]
    data.reads = [0] * 6
    ((batch, labels),) = DataLoader(task.train, sampler=[5, 2], batch_size=2)
    assert data.reads == [0] * 6
    assert labels.tolist() == [5, 2]
    assert batch.equal(torch.stack([one_by_one[0][0], one_by_one[1][0]]))


def test_samples_are_read_one_by_one_where_the_data_set_cannot_read_batches():
    data = permute_pixels([(x, index) for index, x in enumerate(images())], num_tasks=2)[1].train
    ((_, labels),) = DataLoader(data, sampler=[5, 2], batch_size=2)
    assert labels.tolist() == [5, 2]


def test_transformed_data_sets_tell_their_labels_only_where_these_are_known_without_reading():
    known = permute_pixels(TensorDataset(images(2), torch.tensor([4, 5])), num_tasks=2)[1].train
    unknown = permute_pixels(Samples([(x, 4) for x in images(2)]), num_tasks=2)[1].train
    assert known.targets.tolist() == labels_of(known).tolist() == [4, 5]
    assert not hasattr(unknown, "targets")
    assert labels_of(unknown).tolist() == [4, 4]


@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_iterable_data_sets_are_transformed_as_map_style_ones(kind):
    x = images()
    streamed = permute_pixels(kind(x), num_tasks=2)[1].train
    expected = torch.stack([permute_pixels(x, num_tasks=2)[1].train[index] for index in range(6)])
    assert isinstance(streamed, IterableDataset)
    assert torch.stack(list(streamed)).equal(expected)
    assert torch.cat(list(DataLoader(streamed, batch_size=4))).equal(expected)
    if kind is SizedStream:
        assert len(streamed) == 6
    else:
        with pytest.raises(TypeError, match="has no len"):
            len(streamed)


@pytest.mark.parametrize("build", [permute_pixels, rotate_images])
@pytest.mark.parametrize("image", [np.zeros((4, 4)), "picture"], ids=["ndarray", "str"])
def test_images_that_are_no_tensors_are_refused_before_training(build, image):
    match = rf"must be a tensor, but got {type(image).__name__}\. Make images tensors in the data set, .*ToTensor"
    with pytest.raises(TypeError, match=match):
        build([(image, 0)], num_tasks=2)


def test_a_sample_without_an_image_is_refused():
    with pytest.raises(TypeError, match=r"under one of the keys image, x, .* but got the keys \['img'\]\. Rename"):
        permute_pixels([{"img": torch.zeros(4)}], num_tasks=2)


@pytest.mark.parametrize(
    ("build", "shape"),
    [(permute_pixels, ()), (permute_pixels, (1, 2, 3, 4)), (rotate_images, (9,)), (rotate_images, ())],
)
def test_images_of_other_shapes_are_refused(build, shape):
    with pytest.raises(ValueError, match=r"must have the shape \(H, W\).* but got \(.*\)\. Reshape it"):
        build([torch.zeros(shape)], num_tasks=2)


# --- rotate_images


def turned(x, degrees):
    """One image turned by ``degrees``: the second of two tasks, at half the range."""
    return rotate_images([x], num_tasks=2, max_degrees=2 * degrees)[1].train[0]


@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (28, 28), (1, 7, 7), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_are_those_of_rot90_counter_clockwise(shape, dtype, quarters):
    x = images(1, shape, dtype=dtype)[0]
    assert turned(x, 90.0 * quarters).dtype == dtype
    assert_close(turned(x, 90.0 * quarters), x.rot90(quarters, (-2, -1)), atol=1e-5, rtol=0)


def loop_rotation(x, degrees):
    """Every pixel of the result interpolated by hand between four pixels of ``x``."""
    height, width = x.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            right, down = column - (width - 1) / 2, row - (height - 1) / 2
            j, i = cos * right - sin * down + (width - 1) / 2, sin * right + cos * down + (height - 1) / 2
            for near_i in (math.floor(i), math.floor(i) + 1):
                for near_j in (math.floor(j), math.floor(j) + 1):
                    if 0 <= near_i < height and 0 <= near_j < width:
                        out[row, column] += (1 - abs(i - near_i)) * (1 - abs(j - near_j)) * x[near_i, near_j]
    return out


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (9, 6)], ids=str)
@pytest.mark.parametrize("degrees", [1.0, 33.0, 90.0, 123.4])
def test_a_rotation_equals_bilinear_interpolation_by_hand(shape, degrees):
    x = images(1, shape, dtype=torch.float64)[0]
    assert_close(turned(x, degrees), loop_rotation(x, degrees), atol=1e-7, rtol=0)  # a pixel on the border may fall off


def test_integer_images_are_rounded_and_keep_their_type():
    x = (images(1, (6, 6))[0] * 255).round()
    expected = turned(x, 30.0)
    assert turned(x.to(torch.uint8), 30.0).dtype == torch.uint8
    assert turned(x.to(torch.uint8), 30.0).equal(expected.round().to(torch.uint8))
    assert turned(x.half(), 30.0).dtype == torch.float16


def test_tasks_are_turned_by_equal_steps_from_the_images_as_they_are():
    data = TensorDataset(images())
    tasks = rotate_images(data, data, num_tasks=4, max_degrees=360.0)
    assert tasks[0].train is tasks[0].test is data
    assert [task.name for task in tasks] == ["rotation 0.0°", "rotation 90.0°", "rotation 180.0°", "rotation 270.0°"]
    for quarters, task in enumerate(tasks):
        for split in (task.train, task.test):
            assert_close(split[3][0], data[3][0] if not quarters else turned(data[3][0], 90.0 * quarters))


def test_a_seed_draws_the_angles_uniformly_the_first_included():
    def angles(seed, num_tasks):
        tasks = rotate_images([torch.zeros(2, 2)], num_tasks=num_tasks, max_degrees=90.0, seed=seed)
        return [task.train.transform.transform.degrees for task in tasks]

    state = torch.get_rng_state()
    drawn = torch.tensor(angles(0, 1000))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.min() >= 0
    assert drawn.max() < 90
    assert abs(drawn.mean() - 45) < 5 * 90 / math.sqrt(12 * 1000)  # five standard errors
    assert angles(0, 3) == angles(0, 1000)[:3] != angles(1, 3)


def test_an_angle_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"`max_degrees` must be finite, but got inf\. Pass"):
        rotate_images([torch.zeros(2, 2)], num_tasks=2, max_degrees=math.inf)


def test_checking_an_image_leaves_the_random_stream_alone():
    state = torch.get_rng_state()
    permute_pixels(Augmented(), num_tasks=2)
    assert torch.equal(state, torch.get_rng_state())


class Augmented(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.rand(4)


# --- split_by_time


@pytest.mark.parametrize(
    "kind",
    [
        list,
        torch.tensor,
        np.array,
        lambda days: [f"2024-01-{day:02}" for day in days],
        lambda days: [datetime(2024, 1, 1) + timedelta(days=day) for day in days],
        lambda days: np.array([f"2024-01-{day:02}" for day in days], "datetime64[s]"),
    ],
    ids=["list", "tensor", "ndarray", "iso", "datetime", "datetime64"],
)
def test_periods_follow_each_other_in_time(kind):
    data = Samples(["?"] * 7)
    tasks = split_by_time(data, kind([5, 1, 4, 1, 3, 9, 2]), num_tasks=3)
    assert [task.train.indices for task in tasks] == [[1, 3], [6, 4], [2, 0, 5]]  # equal times in the data set's order
    assert all(task.test is None and task.classes is None for task in tasks)
    assert data.reads == [0] * 7


def test_a_period_is_named_by_its_first_and_last_time():
    tasks = split_by_time([0, 0, 0, 0], torch.tensor([4, 2, 3, 1]), num_tasks=2)
    assert [task.name for task in tasks] == ["1 to 2", "3 to 4"]


@pytest.mark.parametrize(("num_samples", "num_tasks"), [(10, 3), (7, 7), (100, 7), (5, 1)])
def test_periods_are_nearly_equal_and_have_every_sample_once(num_samples, num_tasks):
    times = torch.rand(num_samples).tolist()
    periods = [task.train.indices for task in split_by_time([0] * num_samples, times, num_tasks=num_tasks)]
    assert max(map(len, periods)) - min(map(len, periods)) <= 1
    assert [sample for period in periods for sample in period] == sorted(
        range(num_samples), key=lambda sample: times[sample]
    )


def test_a_share_of_each_period_is_held_out_at_random_in_the_order_of_time():
    times = torch.randperm(40).tolist()

    def split(seed):
        return split_by_time([0] * 40, times, num_tasks=2, test_fraction=0.25, seed=seed)

    whole = split_by_time([0] * 40, times, num_tasks=2)
    for task, period, other, same in zip(split(0), whole, split(1), split(0), strict=True):
        assert len(task.test) == 5
        assert sorted(task.train.indices + task.test.indices) == sorted(period.train.indices)
        for part in (task.train.indices, task.test.indices):
            assert part == sorted(part, key=times.__getitem__)
        assert task.test.indices == same.test.indices != other.test.indices
        assert task.test.indices not in (period.train.indices[:5], period.train.indices[-5:])
        assert task.name == period.name


@pytest.mark.parametrize(
    ("times", "kwargs", "match"),
    [
        ([1, 2], {"num_tasks": 1}, r"one time a sample, but got 2 times and 3 samples\. Pass"),
        ([1, 2, 3], {"num_tasks": 4}, r"but got num_tasks=4 and 3 samples\. Pass at most 3"),
        ([1, math.nan, 3], {"num_tasks": 1}, r"must be times, but got nan for sample 1\. Leave"),
        ([1, 2, 3], {"num_tasks": 1, "test_fraction": 1.0}, r"must lie in \[0, 1\), but got 1.0\. Pass"),
        ([1, 2, 3], {"num_tasks": 1, "test_fraction": -0.1}, r"must lie in \[0, 1\), but got -0.1\. Pass"),
        ([1, 2, 3], {"num_tasks": 1, "test_fraction": 0.1}, r"0.1 of 3 samples is 0\. Pass another share"),
        ([1, 2, 3], {"num_tasks": 1, "test_fraction": 0.9}, r"0.9 of 3 samples is 3\. Pass another share"),
    ],
    ids=str,
)
def test_times_that_cannot_be_split_are_refused(times, kwargs, match):
    with pytest.raises(ValueError, match=match):
        split_by_time([0, 0, 0], times, **kwargs)


def test_times_that_cannot_be_compared_are_refused():
    with pytest.raises(TypeError, match=r"`timestamps` must be comparable with each other, .*'str'.* Pass"):
        split_by_time([0, 0], [1, "2024-01-01"], num_tasks=1)


def test_an_iterable_data_set_cannot_be_split_by_time():
    with pytest.raises(TypeError, match="must be map-style"):
        split_by_time(Stream([0, 0]), [1, 2], num_tasks=1)


# --- from_avalanche


def avalanche():
    """Avalanche, training and test data of four classes with the ``targets`` that it asks for."""
    benchmarks = pytest.importorskip("avalanche.benchmarks")
    x, y = images(40, (1, 4, 4)), torch.arange(40) % 4
    train, test = TensorDataset(x, y), TensorDataset(x[:8], y[:8])
    train.targets, test.targets = y.tolist(), y[:8].tolist()
    return benchmarks, train, test


def assert_same_samples(dataset, avalanche_dataset):
    """The same (x, y) without a task label, and the labels known beforehand are those that samples show."""
    assert len(dataset) == len(avalanche_dataset)
    for index, (theirs_x, theirs_y, *_) in enumerate(avalanche_dataset):
        x, y = dataset[index]
        assert x.equal(theirs_x)
        assert int(y) == int(theirs_y)
    assert labels_of(dataset).tolist() == [int(dataset[index][1]) for index in range(len(dataset))]


@avalanche_may_warn
@pytest.mark.parametrize("task_labels", [False, True], ids="task_labels={}".format)
@pytest.mark.parametrize("from_zero", [False, True], ids="from_zero={}".format)
def test_a_class_or_task_incremental_benchmark_of_avalanche_becomes_tasks(task_labels, from_zero):
    benchmarks, train, test = avalanche()
    benchmark = benchmarks.nc_benchmark(
        train, test, 2, task_labels=task_labels, seed=1, class_ids_from_zero_in_each_exp=from_zero
    )
    tasks = from_avalanche(benchmark)
    assert [task.name for task in tasks] == ["experience 0", "experience 1"]
    assert [task.classes for task in tasks] == ([(0, 1)] * 2 if from_zero else [(1, 3), (0, 2)])
    for task, learnt, tested in zip(tasks, benchmark.train_stream, benchmark.test_stream, strict=True):
        assert len(learnt.dataset[0]) == 3
        assert_same_samples(task.train, learnt.dataset)
        assert_same_samples(task.test, tested.dataset)
        assert task.val is None
        assert pickle.loads(pickle.dumps(task.train))[0][0].equal(task.train[0][0])
        batch = next(iter(DataLoader(task.train, batch_size=5)))
        assert [part.shape for part in batch] == [(5, 1, 4, 4), (5,)]


@avalanche_may_warn
def test_a_test_stream_of_one_experience_serves_every_task_of_a_domain_incremental_benchmark():
    benchmarks, train, test = avalanche()
    benchmark = benchmarks.ni_benchmark(train, test, 4, seed=1)
    tasks = from_avalanche(benchmark)
    assert [set(task.classes) for task in tasks] == [
        set(exp.classes_in_this_experience) for exp in benchmark.train_stream
    ]
    assert [len(task.train) for task in tasks] == [10] * 4
    for task in tasks:
        assert_same_samples(task.test, benchmark.test_stream[0].dataset)


@avalanche_may_warn
def test_a_validation_stream_of_avalanche_becomes_the_validation_data():
    benchmarks, train, test = avalanche()
    benchmark = benchmarks.nc_benchmark(train, test, 2, task_labels=True, seed=1)
    benchmark = benchmarks.benchmark_with_validation_stream(benchmark, validation_size=0.2)
    for task, valid in zip(from_avalanche(benchmark), benchmark.valid_stream, strict=True):
        assert (len(task.train), len(task.val), len(task.test)) == (16, 4, 4)
        assert_same_samples(task.val, valid.dataset)


@avalanche_may_warn
def test_data_without_task_labels_keeps_its_samples_and_tells_classes_by_its_targets():
    benchmarks, train, test = avalanche()
    utils = pytest.importorskip("avalanche.benchmarks.utils")
    train, test = utils.as_classification_dataset(train), utils.as_classification_dataset(test)
    benchmark = benchmarks.benchmark_from_datasets(
        train=[train.subset([0, 4]), train.subset([1, 3])], test=[test, test]
    )
    tasks = from_avalanche(benchmark)
    assert [task.classes for task in tasks] == [(0,), (1, 3)]
    assert_same_samples(tasks[1].train, benchmark.train_stream[1].dataset)


@avalanche_may_warn
def test_training_data_has_avalanches_transforms_for_training_and_the_other_those_for_evaluation():
    benchmarks, train, test = avalanche()
    benchmark = benchmarks.nc_benchmark(
        train, test, 2, task_labels=False, seed=1, train_transform=torch.neg, eval_transform=torch.square
    )
    benchmark = benchmarks.benchmark_with_validation_stream(benchmark, validation_size=0.2)
    for task in from_avalanche(benchmark):
        assert (task.train[0][0] <= 0).all()
        assert (task.val[0][0] >= 0).all()
        assert (task.test[0][0] >= 0).all()


@avalanche_may_warn
@needs_data
def test_split_mnist_of_avalanche_becomes_tasks():
    avalanche()
    classic = pytest.importorskip("avalanche.benchmarks.classic")
    benchmark = classic.SplitMNIST(5, dataset_root=DATA, seed=1)
    tasks = from_avalanche(benchmark)
    assert sorted(sum((task.classes for task in tasks), ())) == list(range(10))
    assert (sum(len(task.train) for task in tasks), sum(len(task.test) for task in tasks)) == (60_000, 10_000)
    for task in tasks:
        assert set(labels_of(task.train).tolist()) == set(labels_of(task.test).tolist()) == set(task.classes)
        assert task.train[0][0].shape == (1, 28, 28)
        assert task.train[0][1] == labels_of(task.train)[0]


def test_an_attribute_called_train_need_not_be_avalanches():
    data = Samples([("x", 7)], train=True)  # as of torchvision's MNIST
    benchmark = SimpleNamespace(train_stream=[SimpleNamespace(dataset=data, classes_in_this_experience=[7, 3])])
    (task,) = from_avalanche(benchmark)
    assert task.train is data
    assert task.classes == (3, 7)


def test_a_mapping_loses_its_task_label():
    data = Samples([{"x": 1, "y": 2, "targets_task_labels": 0}], targets_task_labels=[0])
    benchmark = SimpleNamespace(train_stream=[SimpleNamespace(dataset=data)])
    assert from_avalanche(benchmark)[0].train[0] == {"x": 1, "y": 2}


def test_a_validation_stream_may_be_called_val_and_streams_may_be_generators():
    experiences = [SimpleNamespace(dataset=[("x", label)]) for label in range(2)]
    benchmark = SimpleNamespace(train_stream=iter(experiences), val_stream=iter(experiences))
    tasks = from_avalanche(benchmark)
    assert [(task.val, task.test, task.classes) for task in tasks] == [
        ([("x", 0)], None, None),
        ([("x", 1)], None, None),
    ]


@pytest.mark.parametrize("name", ["test_stream", "valid_stream", "val_stream"])
def test_a_stream_of_another_length_is_refused(name):
    experience = SimpleNamespace(dataset=[("x", 0)])
    benchmark = SimpleNamespace(train_stream=[experience] * 3, **{name: [experience] * 2})
    with pytest.raises(ValueError, match=f"`{name}` must have one experience .* but has 2 against 3. Make a list"):
        from_avalanche(benchmark)


def test_what_is_no_benchmark_is_refused():
    with pytest.raises(TypeError, match=r"must be an Avalanche benchmark, but list has no `train_stream`\. Make"):
        from_avalanche([Task([1])])
    with pytest.raises(TypeError, match=r"must have a `dataset`, but int has none\. Make"):
        from_avalanche(SimpleNamespace(train_stream=[1]))


# --- All builders


@pytest.mark.parametrize(
    "build",
    [
        split_by_class,
        permute_pixels,
        rotate_images,
        lambda data, **kwargs: split_by_time(data, [1], **kwargs),
    ],
    ids=["split_by_class", "permute_pixels", "rotate_images", "split_by_time"],
)
@pytest.mark.parametrize("num_tasks", [0, -1])
def test_a_stream_has_at_least_one_task(build, num_tasks):
    with pytest.raises(ValueError, match=f"`num_tasks` must be at least 1, but got {num_tasks}. Pass"):
        build(TensorDataset(torch.zeros(1, 2, 2), torch.zeros(1)), num_tasks=num_tasks)


@pytest.mark.parametrize("build", [split_by_class, permute_pixels, rotate_images])
def test_data_sets_of_a_stream_can_be_pickled(build):
    for task in build(TensorDataset(images(4), torch.arange(4)), num_tasks=2):
        copy = pickle.loads(pickle.dumps(task.train))
        assert copy[1][0].equal(task.train[1][0])
        assert labels_of(copy).tolist() == labels_of(task.train).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("build", [permute_pixels, rotate_images])
def test_spawned_workers_read_the_same_samples(build):
    data = build(TensorDataset(images(4)), num_tasks=2)[1].train
    alone = torch.cat([x for (x,) in DataLoader(data, batch_size=2)])
    workers = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat([x for (x,) in workers]).equal(alone)
