"""Batches of any structure come apart and together again, with nothing lost."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_continual._batch import flatten, join, require_stacked, size, take


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    x: Any
    name: Any = "kept"


@dataclass(frozen=True)
class Frozen:
    x: Any
    scale: float = 0.5


@dataclass(frozen=True, slots=True)
class Slots:
    x: Any
    y: Any


@dataclass
class Derived:
    x: Any
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = -1


Untyped = namedtuple("Untyped", "x y")


class Encoding(UserDict):
    """Like the batches of tokenizers: a mapping that has more than its items."""

    def __init__(self, data: Any, language: str = "") -> None:
        super().__init__(data)
        self.language = language


def columns(*rows: int) -> Tensor:
    return torch.tensor([[float(row), -float(row)] for row in rows])


def numbers(*rows: int) -> Tensor:
    return torch.tensor(rows)


def words(*rows: int) -> list[str]:
    return [f"sample {row}" for row in rows]


def vocabulary(*rows: int) -> Any:
    return defaultdict(list, {"x": columns(*rows), "y": numbers(*rows)})


STRUCTURES = {
    "tensor": columns,
    "vector": numbers,
    "tuple": lambda *rows: (columns(*rows), numbers(*rows)),
    "tuple of one": lambda *rows: (columns(*rows),),
    "NamedTuple": lambda *rows: Pair(columns(*rows), numbers(*rows)),
    "namedtuple": lambda *rows: Untyped(columns(*rows), words(*rows)),
    "list": lambda *rows: [columns(*rows), numbers(*rows)],
    "dict": lambda *rows: {"x": columns(*rows), "y": numbers(*rows)},
    "OrderedDict": lambda *rows: OrderedDict(y=numbers(*rows), x=columns(*rows)),
    "defaultdict": vocabulary,
    "mapping with more": lambda *rows: Encoding({"x": columns(*rows)}, language="nl"),
    "read-only mapping": lambda *rows: MappingProxyType({"x": columns(*rows)}),
    "dataclass": lambda *rows: Sample(columns(*rows)),
    "frozen dataclass": lambda *rows: Frozen(columns(*rows)),
    "dataclass with slots": lambda *rows: Slots(columns(*rows), numbers(*rows)),
    "dataclass of more than its arguments": lambda *rows: Derived(columns(*rows)),
    "strings": words,
    "tuple of strings": lambda *rows: (columns(*rows), tuple(words(*rows))),
    "bytes": lambda *rows: {"x": columns(*rows), "raw": [word.encode() for word in words(*rows)]},
    "numbers": lambda *rows: {"x": columns(*rows), "weight": [0.5 * row for row in rows]},
    "settings": lambda *rows: {"x": columns(*rows), "scale": 0.5, "none": None, "name": "set", "empty": [], "t": 3},
    "0-dimensional tensors": lambda *rows: (columns(*rows), torch.tensor(0.1)),
    "nested": lambda *rows: {
        "images": [columns(*rows), {"mask": numbers(*rows) > 2}],
        "text": Pair(words(*rows), (numbers(*rows), Sample(Frozen(numbers(*rows)), torch.tensor(True)))),
    },
}
every_structure = pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)


def assert_equal(found: Any, expected: Any) -> None:
    """The same types, values and settings, all the way down."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict | UserDict | MappingProxyType):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
        assert getattr(found, "language", None) == getattr(expected, "language", None)
        assert getattr(found, "default_factory", None) is getattr(expected, "default_factory", None)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif hasattr(expected, "__dataclass_fields__"):
        for name in expected.__dataclass_fields__:
            assert_equal(getattr(found, name), getattr(expected, name))
    else:
        assert found == expected


@every_structure
def test_a_batch_put_together_from_its_own_leaves_is_the_batch(make: Any) -> None:
    batch = make(1, 2, 3)
    leaves, rebuild = flatten(batch)
    assert [len(leaf) for leaf in leaves] == [3] * len(leaves)
    assert all(isinstance(leaf, Tensor | list) for leaf in leaves)
    assert_equal(rebuild(leaves), make(1, 2, 3))


@every_structure
def test_samples_are_taken_from_every_leaf_alike(make: Any) -> None:
    leaves, rebuild = flatten(make(1, 2, 3, 4))
    assert_equal(rebuild(take(leaves, torch.tensor([2, 0, 2]))), make(3, 1, 3))


@every_structure
def test_two_batches_join_sample_by_sample_into_the_first_ones_structure(make: Any) -> None:
    leaves, rebuild = flatten(make(1, 2))
    past, _ = flatten(make(7, 8, 9))
    assert_equal(rebuild(join(leaves, past)), make(1, 2, 7, 8, 9))


@every_structure
def test_taking_apart_and_together_leaves_the_users_batch_alone(make: Any) -> None:
    batch = make(1, 2, 3)
    leaves, rebuild = flatten(batch)
    rebuild(join(take(leaves, torch.tensor([2])), take(leaves, torch.tensor([1]))))
    assert_equal(batch, make(1, 2, 3))


@every_structure
def test_the_size_of_a_batch_is_its_number_of_samples(make: Any) -> None:
    assert size(make(1)) == 1
    assert size(make(4, 5, 6)) == 3


def test_no_samples_can_be_taken() -> None:
    leaves, rebuild = flatten((columns(1, 2), words(1, 2)))
    x, names = rebuild(take(leaves, torch.tensor([], dtype=torch.int64)))
    assert x.shape == (0, 2)
    assert names == []


def test_what_belongs_to_the_whole_batch_is_of_the_incoming_batch() -> None:
    _, rebuild = flatten({"x": columns(1), "scale": 0.5, "t": torch.tensor(1.0)})
    past, _ = flatten({"x": columns(9), "scale": 0.1, "t": torch.tensor(3.0)})
    assert_equal(rebuild(past), {"x": columns(9), "scale": 0.5, "t": torch.tensor(1.0)})


def test_joining_does_not_change_the_type_of_samples() -> None:
    (joined,) = join([numbers(1, 2).to(torch.uint8)], [numbers(3).to(torch.uint8)])
    assert_equal(joined, torch.tensor([1, 2, 3], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.tensor(1.0), r"a tensor of shape \(\)"),
        (None, "NoneType None"),
        ({"scale": 0.5}, r"dict \{'scale': 0.5\}"),
        ("a string", "str 'a string'"),
        ([], r"list \[\]"),
        (Sample, "type"),
    ],
    ids=repr,
)
def test_a_batch_with_nothing_to_index_is_refused_by_name(batch: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"must hold something with one entry a sample, but got {found}"):
        flatten(batch)


def test_parts_of_different_lengths_are_named() -> None:
    batch = {"x": columns(1, 2), "more": [numbers(1, 2, 3), Sample(words(1, 2))]}
    named = r"batch\['x'\]: 2, batch\['more'\]\[0\]: 3, batch\['more'\]\[1\]\.x: 2"
    with pytest.raises(ValueError, match=rf"same number of samples, but got {named}.*`collate_fn`"):
        flatten(batch)


def test_too_few_leaves_do_not_make_a_batch() -> None:
    _, rebuild = flatten({"x": columns(1), "y": numbers(1)})
    with pytest.raises(ValueError, match=r"has 2 parts \(batch\['x'\], batch\['y'\]\), but got 1"):
        rebuild([columns(1)])


def test_samples_that_changed_their_shape_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"part 1 was \(5,\) torch\.float32 and is \(3,\) torch\.float32.*Pad"):
        join([numbers(1), torch.zeros(2, 3)], [numbers(1), torch.zeros(2, 5)])


def test_samples_that_changed_their_type_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"part 0 was \(\) torch\.int64 and is \(\) torch\.float32"):
        join([torch.zeros(2)], [numbers(1)])


def test_a_column_does_not_join_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"Part 0 of the batch was a Tensor and is now a list"):
        join([words(1)], [numbers(1)])


def test_batches_of_different_parts_do_not_join() -> None:
    with pytest.raises(ValueError, match="the same parts, but got 1 and 2 of them"):
        join([numbers(1)], [numbers(1), numbers(1)])


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(3, 8, 8) for _ in range(4)],
        ([torch.zeros(3, 8, 8) for _ in range(4)], torch.zeros(3)),
        {"boxes": [{"xy": torch.zeros(3, 2)} for _ in range(4)]},
    ],
    ids=["list", "pair", "mappings"],
)
def test_samples_that_were_not_stacked_are_told_from_parts(batch: Any) -> None:
    with pytest.raises(
        ValueError, match="A batch must be stacked, but this one of 4 samples holds a list of 4 entries"
    ):
        require_stacked(batch, 4)


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(2, 3), torch.zeros(2)],  # two parts of two samples
        [torch.zeros(3, 3), torch.zeros(3)],  # the last batch
        {"x": torch.zeros(1, 4), "word": ["a"]},
    ],
    ids=["parts", "last", "mapping"],
)
@pytest.mark.parametrize("batch_size", [4, 8])
def test_stacked_batches_are_left_alone(batch: Any, batch_size: int) -> None:
    require_stacked(batch, batch_size)
