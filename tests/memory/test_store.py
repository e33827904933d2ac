"""The stores: what lies in a slot is what was put there last, and nothing that was remembered is lost."""

import copy
import errno
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close

import lightning_continual.memory.store as store_module
from lightning_continual.memory.store import DiskStore, RamStore, restore

DTYPES = [torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64]


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    return RamStore() if request.param == "ram" else DiskStore(tmp_path)


def numbered(numbers, shape=(3,), dtype=torch.float32):
    """One sample a number, filled with it."""
    return torch.tensor(numbers).view(-1, *[1] * len(shape)).expand(-1, *shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (3, 4, 5)], ids=str)
def test_a_slot_holds_what_was_put_there_last(store, dtype, shape):
    expected = {}
    for numbers, slots in [([1, 2, 3], [2, 0, 1]), ([4, 0], [0, 7]), ([5], [2])]:
        store.put(torch.tensor(slots), [numbered(numbers, shape, dtype), [str(number) for number in numbers]])
        expected.update(zip(slots, numbers, strict=True))
    values, names = store.get(torch.tensor(list(expected)))
    assert_close(values, numbered(list(expected.values()), shape, dtype), rtol=0, atol=0)
    assert values.dtype == dtype
    assert names == [str(number) for number in expected.values()]


def test_what_is_got_is_a_copy(store):
    store.put(torch.tensor([0]), [torch.ones(1, 2)])
    store.get(torch.tensor([0]))[0].zero_()
    assert store.get(torch.tensor([0]))[0].sum() == 2


def test_what_is_put_may_need_gradients_and_lie_in_any_order(store):
    leaf = torch.arange(6.0).view(3, 2).T.requires_grad_()
    store.put(torch.tensor([0, 1]), [leaf])
    assert_close(store.get(torch.tensor([1, 0]))[0], leaf.detach().flip(0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ([torch.zeros(1, 4), ["a"]], r"part 0 was \(3,\) float32 and is \(4,\) float32. Pad .* in `collate_fn`"),
        ([torch.zeros(1, 3).double(), ["a"]], r"part 0 was \(3,\) float32 and is \(3,\) float64"),
        ([torch.zeros(1, 3), torch.zeros(1)], r"part 1 was \(\) list and is \(\) float32"),
        ([torch.zeros(1, 3)], r"there were 2 and are 1 of them"),
    ],
)
def test_samples_that_differ_from_the_first_are_refused_and_change_nothing(store, leaves, message):
    store.put(torch.tensor([0]), [torch.ones(1, 3), ["one"]])
    with pytest.raises(ValueError, match=message):
        store.put(torch.tensor([0]), leaves)
    values, names = store.get(torch.tensor([0]))
    assert values.sum() == 3
    assert names == ["one"]


def test_a_state_restores_to_the_bit_and_stays_valid_when_the_store_goes_on(store, tmp_path):
    store.put(torch.tensor([0, 1, 2, 3]), [numbered([1, 2, 3, 4]), ["a", "b", "c", "d"]])
    buffer = io.BytesIO()
    state = store.state(2)
    torch.save(state, buffer)
    store.put(torch.tensor([0, 1, 3]), [numbered([7, 8, 9]), ["x", "y", "z"]])
    buffer.seek(0)
    old = restore(torch.load(buffer, weights_only=True), tmp_path)
    for twin in [old, restore(state)]:
        values, names = twin.get(torch.tensor([1, 0]))
        assert_close(values, numbered([2, 1]))
        assert names == ["b", "a"]

    old.put(torch.tensor([0]), [numbered([5]), ["e"]])
    assert_close(old.get(torch.tensor([0, 1]))[0], numbered([5, 2]))
    assert_close(store.get(torch.tensor([0, 1, 2, 3]))[0], numbered([7, 8, 3, 9]))


def test_a_state_holds_no_more_than_the_slots_asked_for():
    store = RamStore()
    store.put(torch.arange(1000), [torch.zeros(1000, 8)])
    (column,) = store.state(2)["columns"]
    assert column.untyped_storage().nbytes() == 2 * 8 * 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))], ids=["copy", "pickle"]
)
def test_a_copied_store_has_the_same_content_and_goes_its_own_way(store, copied):
    store.put(torch.tensor([0, 1]), [numbered([1, 2])])
    store.get(torch.tensor([0]))
    twin = copied(store)
    twin.put(torch.tensor([0]), [numbered([3])])
    store.put(torch.tensor([1]), [numbered([4])])
    assert_close(twin.get(torch.tensor([0, 1]))[0], numbered([3, 2]))
    assert_close(store.get(torch.tensor([0, 1]))[0], numbered([1, 4]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_and_appends_without_disturbing_its_parent(tmp_path):
    store = DiskStore(tmp_path)
    store.put(torch.tensor([0, 1]), [numbered([1, 2])])
    store.get(torch.tensor([0]))
    child = os.fork()
    if not child:
        store.put(torch.tensor([0]), [numbered([3])])
        os._exit(0 if bool((store.get(torch.tensor([0, 1]))[0] == numbered([3, 2])).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    store.put(torch.tensor([1]), [numbered([4])])
    assert_close(store.get(torch.tensor([0, 1]))[0], numbered([1, 4]))


def test_stores_in_one_folder_do_not_meet(tmp_path):
    one, two = DiskStore(tmp_path), DiskStore(tmp_path)
    one.put(torch.tensor([0]), [numbered([1])])
    two.put(torch.tensor([0]), [numbered([2], shape=(5,), dtype=torch.int16)])
    assert_close(one.get(torch.tensor([0]))[0], numbered([1]))
    assert_close(two.get(torch.tensor([0]))[0], numbered([2], shape=(5,), dtype=torch.int16))


def test_what_an_interrupted_write_left_behind_does_no_harm(tmp_path):
    store = DiskStore(tmp_path)
    store.put(torch.tensor([0]), [numbered([1]), numbered([1], shape=(2,))])
    with next(tmp_path.glob("*-0.bin")).open("ab") as file:
        file.write(b"one and a half row")
    store.put(torch.tensor([1]), [numbered([2]), numbered([2], shape=(2,))])
    first, second = store.get(torch.tensor([0, 1]))
    assert_close(first, numbered([1, 2]))
    assert_close(second, numbered([1, 2], shape=(2,)))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_loses_nothing_and_says_so(tmp_path, monkeypatch, failing):
    store = DiskStore(tmp_path)
    leaves = [numbered([1, 2]), numbered([1, 2], dtype=torch.int64), ["a", "b"]]
    store.put(torch.tensor([0, 1]), leaves)
    sizes = {path: path.stat().st_size for path in tmp_path.iterdir()}
    write, calls = store_module._write, []

    def full(file, data):
        calls.append(data)
        if len(calls) == failing:
            write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_write", full)
        with pytest.raises(
            OSError, match=r"-[01]\.bin \(No space left on device\)\. Nothing that was .*lost.* Free disk"
        ):
            store.put(torch.tensor([0, 2]), [numbered([8, 9]), numbered([8, 9], dtype=torch.int64), ["x", "y"]])

    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == sizes
    assert_close(store.get(torch.tensor([0, 1]))[0], leaves[0])
    assert_close(store.get(torch.tensor([0, 1]))[1], leaves[1])
    assert store.get(torch.tensor([0, 1]))[2] == ["a", "b"]
    store.put(torch.tensor([0]), [numbered([3]), numbered([3], dtype=torch.int64), ["c"]])
    assert_close(store.get(torch.tensor([0, 1]))[0], numbered([3, 2]))


@pytest.mark.slow
def test_a_real_limit_on_the_size_of_files_loses_nothing(tmp_path):
    script = f"""
        import resource, torch
        from lightning_continual.memory.store import DiskStore
        store = DiskStore({str(tmp_path)!r})
        store.put(torch.arange(10), [torch.ones(10, 100)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            store.put(torch.arange(10), [torch.zeros(10, 100)])
        except OSError as error:
            assert "Nothing that was remembered is lost" in str(error)
        else:
            raise SystemExit("no error")
        assert store.get(torch.arange(10))[0].sum() == 1000
        store.put(torch.arange(2), [torch.zeros(2, 100)])
        assert store.get(torch.arange(10))[0].sum() == 800
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"`path` must be a folder that can be written to, but got '.*file/memory' \(Not a"
    ):
        DiskStore(tmp_path / "file" / "memory")


def test_missing_and_short_files_are_named(tmp_path):
    store = DiskStore(tmp_path / "old")
    store.put(torch.arange(2), [numbered([1, 2])])
    state = store.state(2)
    (file,) = (tmp_path / "old").iterdir()
    os.truncate(file, 20)
    with pytest.raises(FileNotFoundError, match=rf"lie in {file}, with at least 24 bytes, but the file has 20. Put"):
        restore(state)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="or pass its new place as `path`"):
        restore(state, tmp_path / "elsewhere")


def test_a_folder_that_has_moved_is_found_at_its_new_place(tmp_path):
    store = DiskStore(tmp_path / "old")
    store.put(torch.arange(2), [numbered([1, 2])])
    state = store.state(2)
    (tmp_path / "old").rename(tmp_path / "new")
    assert_close(restore(state, tmp_path / "new").get(torch.arange(2))[0], numbered([1, 2]))


def test_reading_does_not_leave_the_file_in_memory(tmp_path):
    store = DiskStore(tmp_path)
    for start in range(0, 40_000, 2000):
        store.put(torch.arange(start, start + 2000), [numbered([start // 2000] * 2000, (32, 32, 3), torch.uint8)])
    before = resident_kilobytes()
    for slots in torch.randperm(40_000).split(64):
        store.get(slots)
    assert resident_kilobytes() - before < 40_000  # of 120,000


def resident_kilobytes():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1])
