"""Memories: what is kept, what comes back, and that both survive restarts and other numbers of processes."""

import copy
import errno
import io
import math
import os
import pickle
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from lightning_continual.memory import (
    ClassBalancedMemory,
    HerdingMemory,
    ReservoirMemory,
    TaskMemory,
    grouped,
    herd,
    reservoir,
    store,
)

MEMORIES = [ReservoirMemory, ClassBalancedMemory, TaskMemory, HerdingMemory]
GROUPED = MEMORIES[1:]


def content(filled):
    """The numbers in a memory, in the order of slots."""
    return filled._store.get(torch.arange(len(filled)))[0].flatten().long().tolist()


def offer(filled, numbers, task=0, labels=None, **more):
    numbers = torch.as_tensor(numbers)
    labels = numbers % 3 if labels is None else labels
    filled.add([numbers.float().view(-1, 1), [str(int(n)) for n in numbers]], task=task, labels=labels, **more)


def stream(filled, num=200, block=10, first=0, num_tasks=4):
    for numbers in torch.arange(first, first + num).split(block):
        offer(filled, numbers, task=(int(numbers[0]) - first) * num_tasks // num)
    return filled


def assert_same(one, two):
    """Whether two states are equal to the bit."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list):
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert_close(one, two, rtol=0, atol=0)
    else:
        assert one == two


def saved(*memories):
    """The memories' states, as a checkpoint gives them back."""
    buffer = io.BytesIO()
    torch.save([filled.state_dict() for filled in memories], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- the reservoir ------------------------------------------------------------------------------------------------


def off_by_one(shape, num_seen, capacity, generator):
    count = torch.arange(num_seen + 1, num_seen + 1 + shape[-1])
    slots = torch.randint(2**62, shape, generator=generator) % (count + 1)
    return torch.where(count <= capacity, count - 1, slots)


def reservoirs(runs, capacity, num, block, slots_of):
    """Many reservoirs at once, ``(runs, capacity)``: the decisions of `ReservoirMemory.add`, without its storage."""
    generator = torch.Generator().manual_seed(runs + 31 * capacity + block)
    kept = torch.full((runs * capacity,), -1)
    for items in torch.arange(num).split(block):
        slots = slots_of((runs, len(items)), int(items[0]), capacity, generator)
        accepted = slots < capacity
        places = (slots + capacity * torch.arange(runs)[:, None])[accepted]
        last = reservoir._last_writers(places)
        kept[places[last]] = items.expand(runs, -1)[accepted][last]
    return kept.view(runs, capacity)


def uniformity(kept, num, edges):
    r"""The p-value of Pearson's test that each run is a sample of ``capacity`` of ``num`` without replacement.

    The counts of bins with shares w have covariance R M (n - M) / (n - 1) (diag(w) - w w^T), so that the usual sum
    times (n - 1) / (n - M) is chi-square of one degree of freedom less than bins.
    """
    runs, capacity = kept.shape
    bins = torch.bucketize(torch.arange(num), torch.tensor(edges), right=True)
    observed = torch.bincount(bins[kept.flatten()], minlength=len(edges) + 1).double()
    expected = runs * capacity * torch.bincount(bins, minlength=len(edges) + 1).double() / num
    statistic = ((observed - expected) ** 2 / expected).sum() * (num - 1) / (num - capacity)
    return torch.special.gammaincc(torch.tensor(len(edges) / 2).double(), statistic / 2).item()


CASES = [
    (1, 10, 20_000),
    (10, 100, 20_000),
    pytest.param(7, 1000, 50_000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("block", [1, 3, 64], ids="block={}".format)
@pytest.mark.parametrize(("capacity", "num", "runs"), CASES)
def test_a_reservoir_keeps_every_sample_with_the_same_probability(capacity, num, runs, block):
    doubling = [capacity * 2**k for k in range(10) if capacity * 2**k < num]
    kept = reservoirs(runs, capacity, num, block, reservoir._reservoir_slots)
    assert uniformity(kept, num, list(range(1, num))) > 0.001
    assert uniformity(kept, num, doubling) > 0.001

    mutant = reservoirs(runs, capacity, num, block, off_by_one)
    assert uniformity(mutant, num, doubling) < 0.001


@pytest.mark.parametrize("block", [1, 3, 64], ids="block={}".format)
@pytest.mark.parametrize("capacity", [1, 7, 100])
def test_a_reservoir_holds_what_writing_the_slots_one_by_one_leaves(capacity, block):
    filled = ReservoirMemory(capacity, seed=3)
    generator = torch.Generator()
    generator.set_state(filled.state_dict()["generator"])
    slots = {}
    for numbers in torch.arange(300).split(block):
        offer(filled, numbers)
        drawn = reservoir._reservoir_slots((len(numbers),), int(numbers[0]), capacity, generator)
        for slot, number in zip(drawn.tolist(), numbers.tolist(), strict=True):
            if slot < capacity:
                slots[slot] = number
    assert content(filled) == [slots[slot] for slot in range(capacity)]
    assert filled.labels.tolist() == [number % 3 for number in content(filled)]
    assert filled.num_seen == 300


@pytest.mark.slow
def test_the_memory_itself_is_uniform_too():
    kept = []
    for seed in range(20_000):
        filled = ReservoirMemory(1, seed=seed)
        for numbers in torch.arange(10).split(3):
            filled.add([numbers], task=0)
        kept.append(content(filled))
    assert uniformity(torch.tensor(kept), 10, list(range(1, 10))) > 0.001


def test_a_reservoir_loaded_into_a_larger_capacity_stays_uniform_and_fills():
    old, runs = [], 1500
    for seed in range(runs):
        small = ReservoirMemory(5, seed=seed)
        small.add([torch.arange(50)], task=0)
        large = ReservoirMemory(10, seed=seed)
        large.load_state_dict([small.state_dict()])
        for numbers in torch.arange(50, 250).split(50):
            large.add([numbers], task=0)
        assert len(set(content(large))) == 10
        old.append(sum(number < 50 for number in content(large)))
    # A fifth of the samples is old, so two of the ten exemplars, give or take four standard errors.
    assert sum(old) / runs == pytest.approx(2, abs=4 * torch.tensor(old).double().std().item() / math.sqrt(runs))


def test_a_reservoir_that_is_still_filling_its_new_room_goes_on_to_the_bit():
    large, restored = ReservoirMemory(30), ReservoirMemory(30)
    large.load_state_dict(saved(stream(ReservoirMemory(5))))
    stream(large, 100, first=200)
    assert 5 < len(large) < 30
    restored.load_state_dict(saved(large))
    assert content(stream(restored, 1000, first=300)) == content(stream(large, 1000, first=300))


# ---- groups -------------------------------------------------------------------------------------------------------


def water_filling(counts, capacity):
    """Give one slot after the other to the group that has least, the first such group first."""
    quotas = [0] * len(counts)
    for _ in range(min(capacity, sum(counts))):
        group = min((g for g in range(len(counts)) if quotas[g] < counts[g]), key=lambda g: quotas[g])
        quotas[group] += 1
    return quotas


@pytest.mark.parametrize("capacity", [0, 1, 2, 5, 17, 40, 1000])
def test_quotas_are_those_of_water_filling(capacity):
    generator = torch.Generator().manual_seed(capacity)
    for num_groups in [1, 2, 3, 10]:
        counts = torch.randint(0, 20, (num_groups,), generator=generator)
        assert grouped._fill(counts, capacity).tolist() == water_filling(counts.tolist(), capacity)


@pytest.mark.parametrize("block", [1, 7, 500], ids="block={}".format)
@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("kind", GROUPED)
def test_every_group_holds_its_quota_of_highest_priorities(kind, growing, block, monkeypatch):
    capacity = 20
    filled = kind(capacity, growing=growing)
    generator = torch.Generator().manual_seed(block)
    monkeypatch.setattr(kind, "_priorities", lambda self, num: torch.rand(num, generator=generator).double())
    priorities = torch.rand(500, generator=torch.Generator().manual_seed(block)).double()
    groups = torch.tensor([-5] * 300 + [9] * 4 + [1] * 100 + [10**12] * 96)
    tasks = torch.arange(500) * 4 // 500
    for index in torch.arange(500).split(block):
        if kind is TaskMemory:
            for task in tasks[index].unique().tolist():
                offer(filled, index[tasks[index] == task], task=task)
        else:
            offer(filled, index, labels=groups[index])
    keys = tasks if kind is TaskMemory else groups
    offered = list(zip(keys.tolist(), priorities.tolist(), range(500), strict=True))
    counts = Counter(key for key, _, _ in offered)  # in the order of arrival
    quotas = (
        [min(capacity, count) for count in counts.values()]
        if growing
        else water_filling(list(counts.values()), capacity)
    )
    expected = []
    for key, quota in zip(counts, quotas, strict=True):
        best = sorted((entry for entry in offered if entry[0] == key), key=lambda entry: -entry[1])[:quota]
        expected += [number for _, _, number in best]
    assert sorted(content(filled)) == sorted(expected)
    assert len(filled) == sum(quotas)


def test_a_class_balanced_memory_samples_every_class_uniformly():
    runs, kept = 1000, torch.zeros(20)
    labels = torch.tensor([0] * 12 + [1] * 8)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    for seed in range(runs):
        filled = ClassBalancedMemory(4, seed=seed)
        for index in torch.arange(20).split(6):
            filled.add([index], task=0, labels=labels[index])
        assert filled.labels.bincount().tolist() == [2, 2]
        kept[content(filled)] += 1
    for label, num in [(0, 12), (1, 8)]:
        expected = 2 * runs / num
        statistic = ((kept[labels == label] - expected) ** 2).sum() / expected * (num - 1) / (num - 2)
        assert torch.special.gammaincc(torch.tensor((num - 1) / 2), statistic / 2) > 0.001


def test_a_class_takes_new_samples_into_new_room_at_the_rate_that_it_kept_the_old():
    small, large = ClassBalancedMemory(5), ClassBalancedMemory(1000)
    offer(small, range(500), labels=torch.zeros(500, dtype=torch.int64))
    large.load_state_dict(saved(small))
    offer(large, range(500, 1000), labels=torch.zeros(500, dtype=torch.int64))
    assert 5 < len(large) < 30


@pytest.mark.parametrize("block", [1, 7, 64], ids="block={}".format)
def test_a_task_memory_holds_the_latest_of_every_task(block):
    filled = TaskMemory(12)
    for numbers in torch.arange(150).split(block):
        for task in (numbers // 50).unique().tolist():
            offer(filled, numbers[numbers // 50 == task], task=task)
    assert sorted(content(filled)) == [46, 47, 48, 49, 96, 97, 98, 99, 146, 147, 148, 149]


def herd_slowly(features, num):
    features = features.double()
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    picked = []
    for _ in range(num):
        rest = [i for i in range(len(features)) if i not in picked]
        picked.append(min(rest, key=lambda i: float((features.mean(0) - features[[*picked, i]].mean(0)).norm())))
    return picked


@pytest.mark.parametrize(("num_samples", "width"), [(1, 3), (12, 2), (40, 16)])
def test_herding_is_the_greedy_loop(num_samples, width):
    features = torch.randn(num_samples, width, generator=torch.Generator().manual_seed(num_samples)) + 0.5
    features[num_samples // 2] = 0  # a sample that activates nothing
    assert herd(features, num_samples).tolist() == herd_slowly(features, num_samples)
    assert herd(features, 100).tolist() == herd_slowly(features, num_samples)
    assert herd(features, 0).tolist() == []
    scales = torch.rand(num_samples, 1) + 0.1
    assert herd(scales * features, 3).tolist() == herd(features, 3).tolist()


def test_a_herding_memory_keeps_the_head_of_every_ranking_when_classes_come():
    filled, rankings = HerdingMemory(12), {}
    features = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    for task, classes in enumerate([[5, 3], [4], [9]]):
        labels = torch.tensor([classes[i % len(classes)] for i in range(30)])
        index = torch.arange(30 * task, 30 * task + 30)
        for label in classes:
            members = index[labels == label]
            rankings[label] = members[herd(features[members], 30)].tolist()
        chosen, ranks = filled.choose(features[index], labels)
        assert len(chosen) == sum(water_filling([30] * len(rankings), 12)[-len(classes) :])
        offer(filled, index[chosen], task=task, labels=labels[chosen], ranks=ranks)
        assert len(filled) == 12
        quota = filled.quota(len(rankings))
        assert quota == 12 // len(rankings)
        assert sorted(content(filled)) == sorted(n for ranking in rankings.values() for n in ranking[:quota])


def test_a_growing_memory_holds_as_many_of_every_group():
    for filled in [ClassBalancedMemory(5, growing=True), TaskMemory(5, growing=True)]:
        for task in range(30):
            offer(filled, range(task * 10, task * 10 + 10), task=task, labels=torch.full((10,), task))
        assert filled.tasks.bincount().tolist() == [5] * 30
    assert HerdingMemory(5, growing=True).quota(100) == 5


# ---- drawing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["uniform", "recent", "balanced", lambda tasks, labels, before: 1 + labels])
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_draw_repeats_nothing_and_is_of_earlier_tasks(kind, selection):
    filled = stream(kind(40))
    for before in range(6):
        available = int((filled.tasks < before).sum())
        assert filled.num_available(before) == available
        for num in [0, 1, 5, 40, 1000]:
            drawn = filled.draw(num, before=before, selection=selection)
            numbers = drawn[0].flatten().long().tolist() if drawn else []
            assert len(numbers) == len(set(numbers)) == min(num, available)
            assert all(number * 4 // 200 < before for number in numbers)
            assert not drawn or drawn[1] == [str(number) for number in numbers]
    assert filled.draw(3, before=0, selection=selection) == []
    assert filled.draw(-1, before=3, selection=selection) == []


def frequencies(filled, runs, num, **more):
    counts = torch.zeros(200)
    for _ in range(runs):
        counts[filled.draw(num, **more)[0].flatten().long()] += 1
    return counts / runs


@pytest.mark.parametrize("capacity", [50, 200], ids="capacity={}".format)  # by listing, by trying
def test_a_uniform_draw_is_uniform(capacity):
    filled, runs = stream(ReservoirMemory(capacity)), 4000
    seen = frequencies(filled, runs, 5, before=3)[content(filled)]
    eligible = filled.tasks < 3
    num = int(eligible.sum())
    assert seen[~eligible].sum() == 0
    statistic = ((seen[eligible] - 5 / num) ** 2).sum() * runs / (5 / num) * (num - 1) / (num - 5)
    assert torch.special.gammaincc(torch.tensor((num - 1) / 2), statistic / 2) > 0.001


@pytest.mark.parametrize("selection", ["recent", "function", "balanced"])
def test_one_draw_has_the_probabilities_of_the_weights(selection):
    filled, runs = stream(ReservoirMemory(200)), 6000
    if selection == "balanced":
        filled = ClassBalancedMemory(30)
        offer(filled, range(20), labels=torch.tensor([0] * 15 + [1] * 4 + [2]))
    tasks, labels = filled.tasks, filled.labels
    weights = {
        "recent": torch.exp(-(2.0 - tasks) / 0.7) * (tasks < 3),
        "function": (1.0 + labels) * (tasks < 3),
        "balanced": 1.0 / labels.bincount()[labels],
    }[selection]
    if selection == "function":
        seen = frequencies(filled, runs, 1, before=3, selection=lambda tasks, labels, before: 1 + labels)
    else:
        seen = frequencies(filled, runs, 1, before=3, selection=selection, timescale=0.7)
    probabilities = (weights / weights.sum())[weights > 0]
    seen = seen[content(filled)]
    assert seen[weights == 0].sum() == 0
    statistic = ((seen[weights > 0] - probabilities) ** 2 / probabilities).sum() * runs
    assert torch.special.gammaincc(torch.tensor((len(probabilities) - 1) / 2), statistic / 2) > 0.001


@pytest.mark.parametrize("tries", [0, 3, 1000], ids="tries={}".format)
def test_a_weighted_draw_of_several_is_one_after_the_other_however_it_is_made(tries, monkeypatch):
    """Two of three, with weights 1, e, e²: the chance of each pair in closed form, by tries, by listing and by both."""
    filled = ReservoirMemory(3)
    for task in range(3):
        offer(filled, [task], task=task)
    randint = torch.randint
    if tries:
        # As if there were a million, so that tries are made at all; the slots are those of three.
        filled._length, filled._per_task, length = 10**6, filled._per_task * 333_333, 3
        monkeypatch.setattr(
            torch, "randint", lambda high, num, generator: randint(length, (tries,), generator=generator)
        )
        monkeypatch.setattr(torch, "rand", lambda num, rand=torch.rand, **more: rand(tries, **more))
        monkeypatch.setattr(ReservoirMemory, "tasks", property(lambda self: self._columns["tasks"][:3]))
    runs, pairs = 6000, Counter()
    for _ in range(runs):
        pairs[tuple(sorted(filled.draw(2, before=3, selection="recent")[0].flatten().long().tolist()))] += 1
    w = [math.exp(task) / sum(math.exp(t) for t in range(3)) for task in range(3)]
    statistic = 0.0
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        chance = w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j])
        statistic += (pairs[i, j] - runs * chance) ** 2 / (runs * chance)
    assert math.exp(-statistic / 2) > 0.001  # chi-square of two degrees of freedom


def test_the_oldest_can_be_drawn_however_short_the_timescale():
    filled = stream(ReservoirMemory(40))
    drawn = filled.draw(40, before=4, selection="recent", timescale=1e-6)[0]
    assert sorted(drawn.flatten().long().tolist()) == sorted(content(filled))
    assert int(filled.draw(1, before=4, selection="recent", timescale=1e-6)[0]) >= 150


def test_a_function_gets_the_exemplars_of_earlier_tasks_each_time():
    filled, calls = stream(ReservoirMemory(40)), []

    def only_one_label(tasks, labels, before):
        calls.append((tasks, labels, before))
        return labels == len(calls) % 3

    filled.draw(5, before=2, selection="balanced")
    for _ in range(3):
        filled.draw(1000, before=2, selection=only_one_label)
    tasks, labels, before = calls[0]
    assert_close(tasks, filled.tasks[filled.tasks < 2])
    assert_close(labels, filled.labels[filled.tasks < 2])
    assert before == 2
    assert len(calls) == 3


def test_balanced_weights_follow_the_content():
    filled = ClassBalancedMemory(1000)
    offer(filled, range(100), labels=torch.tensor([0] * 99 + [1]))
    filled.draw(1, before=1, selection="balanced")
    offer(filled, range(100, 199), labels=torch.full((99,), 2))
    drawn = filled.draw(150, before=1, selection="balanced")[0].flatten()
    assert (drawn >= 100).sum() > 20


# ---- disk, state, processes ---------------------------------------------------------------------------------------


def as_numbers(state):
    """A state without what differs between RAM and disk."""
    return {key: value for key, value in state.items() if key != "store"}


@pytest.mark.parametrize("kind", MEMORIES)
def test_disk_equals_ram_to_the_bit(kind, tmp_path):
    one, two = stream(kind(40)), stream(kind(40, path=tmp_path))
    assert content(one) == content(two)
    assert_same(as_numbers(one.state_dict()), as_numbers(two.state_dict()))
    assert_close(one.draw(9, before=3)[0], two.draw(9, before=3)[0], rtol=0, atol=0)


@pytest.mark.parametrize("to_disk", [False, True], ids="to_disk={}".format)
@pytest.mark.parametrize("from_disk", [False, True], ids="from_disk={}".format)
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_restored_memory_goes_on_as_the_original_to_the_bit(kind, from_disk, to_disk, tmp_path):
    original = stream(kind(40, path=tmp_path / "one" if from_disk else None))
    (state,) = saved(original)
    before = copy.deepcopy(state)
    stream(original, 100, first=200)
    restored = kind(40, path=tmp_path / "two" if to_disk else None, seed=9)
    restored.load_state_dict([state])
    stream(restored, 100, first=200)
    assert content(restored) == content(original)
    assert_same(as_numbers(restored.state_dict()), as_numbers(original.state_dict()))
    assert_close(restored.draw(9, before=3)[0], original.draw(9, before=3)[0], rtol=0, atol=0)
    assert_same(state, before)


def test_an_older_state_is_valid_after_the_memory_has_gone_on(tmp_path):
    original = stream(ReservoirMemory(40, path=tmp_path))
    then, (state,) = content(original), saved(original)
    stream(original, 500, first=200)
    restored = ReservoirMemory(40, path=tmp_path)
    restored.load_state_dict([state])
    assert content(restored) == then
    assert restored.state_dict()["store"]["name"] == state["store"]["name"]  # not copied
    now = content(original)
    stream(restored, 500, first=1000)
    assert content(original) == now


@pytest.mark.parametrize("path", [None, "folder"], ids="path={}".format)
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (1, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize(
    ("kind", "growing"),
    [(kind, growing) for kind in MEMORIES for growing in (False, True) if kind in GROUPED or not growing],
)
def test_another_number_of_processes_shares_everything(kind, growing, old, new, path, tmp_path):
    options = ({"growing": True} if growing else {}) | {"path": path and tmp_path / path}
    parts = []
    for rank in range(old):
        part = kind(41, **options)
        part.distribute(rank, old)
        parts.append(stream(part, first=1000 * rank))
    states = saved(*parts)
    shares = []
    for rank in range(new):
        share = kind(41, **options)
        share.load_state_dict(states, rank, new)
        shares.append(share)
    everything = sorted(n for part in parts for n in content(part))
    assert sorted(n for share in shares for n in content(share)) == everything
    assert sum(share.num_seen for share in shares) == 200 * old
    assert max(map(len, shares)) - min(map(len, shares)) <= (4 if growing else 1)
    for rank, share in enumerate(shares):
        assert [number % 3 for number in content(share)] == share.labels.tolist()
        length, quota = len(share), 41 // new + (rank < 41 % new)
        latest = range(10_000, 10_040)
        offer(share, latest, task=7)
        assert len(share) == length if not growing else len(share) >= length
        if kind is TaskMemory:
            offer(share, range(20_000, 20_050), task=3)
            assert min(n for n, task in zip(content(share), share.tasks, strict=True) if task == 3) >= 20_000
            assert (share.tasks == 7).sum() >= quota // 5
    if kind is ReservoirMemory:
        assert all(share.num_seen - 40 == pytest.approx(200 * old * length / 41, abs=200) for share in shares)


def test_the_parts_of_a_memory_draw_different_numbers():
    parts = []
    for rank in range(2):
        part = ReservoirMemory(20)
        part.distribute(rank, 2)
        parts.append(content(stream(part)))
    assert parts[0] != parts[1]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_smaller_capacity_drops_and_a_larger_one_fills(kind):
    original = stream(kind(40))
    smaller, larger = kind(10), kind(100)
    smaller.load_state_dict(saved(original))
    larger.load_state_dict(saved(original))
    assert len(smaller) == 10
    assert set(content(smaller)) < set(content(original))
    assert sorted(content(larger)) == sorted(content(original))
    if kind is TaskMemory:
        assert set(content(smaller)) >= {48, 49, 98, 99, 148, 149, 198, 199}
    for each in [smaller, larger]:
        stream(each, 400, first=200)
        assert each.num_available(10) == len(each) >= min(each.capacity, 41)


def test_distributed_memories_share_the_capacity_and_the_folder(tmp_path):
    for rank, share in enumerate([3, 2, 2]):
        part = ReservoirMemory(7, path=tmp_path)
        part.distribute(rank, 3)
        stream(part)
        part.distribute(rank, 3)
        assert len(part) == share
        assert list((tmp_path / f"rank-{rank}").iterdir())
        with pytest.raises(ValueError, match="must be distributed before samples are added, but it has seen 200"):
            part.distribute(rank, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda filled: pickle.loads(pickle.dumps(filled))])
@pytest.mark.parametrize("path", [None, "folder"], ids="path={}".format)
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_copied_memory_goes_on_as_the_original(kind, path, copied, tmp_path):
    original = stream(kind(40, path=path and tmp_path / path))
    original.draw(5, before=2, selection="balanced")
    twin = copied(original)
    stream(original, 100, first=200)
    stream(twin, 100, first=200)
    assert content(twin) == content(original)
    assert_close(twin.draw(9, before=3)[0], original.draw(9, before=3)[0])


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_full_disk_changes_nothing(kind, tmp_path, monkeypatch):
    filled = stream(kind(40, path=tmp_path))
    before, state = content(filled), filled.state_dict()

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        with pytest.raises(OSError, match="Nothing that was remembered is lost"):
            offer(filled, range(1000, 1500), task=9)
    after = filled.state_dict()
    assert content(filled) == before
    for key in ["num_seen", "columns", "store"]:
        assert_same(after[key], state[key])
    assert filled.num_available(10) == 40
    offer(filled, range(1000, 1500), task=9)
    assert len(filled) == 40


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_version_changes_with_the_content_and_only_then(kind):
    filled = kind(10)
    versions = {filled.version}
    for numbers in torch.arange(100).split(5):
        before, version = content(filled) if len(filled) else [], filled.version
        offer(filled, numbers)
        assert (content(filled) != before) == (filled.version != version) or kind is HerdingMemory
        versions.add(filled.version)
    assert len(versions) > 2


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_global_random_state_is_untouched(kind, tmp_path):
    state = torch.get_rng_state()
    filled = stream(kind(40, path=tmp_path))
    for selection in ["uniform", "recent", "balanced"]:
        filled.draw(5, before=3, selection=selection)
    kind(10).load_state_dict([filled.state_dict()], 0, 1)
    kind(10).load_state_dict([filled.state_dict()], 1, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("path", [None, "folder"], ids="path={}".format)
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_capacity_of_nothing_keeps_nothing(kind, path, tmp_path):
    filled = stream(kind(0, path=path and tmp_path / path))
    assert len(filled) == filled.version == 0
    assert filled.draw(5, before=10) == []
    restored = kind(0)
    restored.load_state_dict(saved(filled, filled))
    assert len(restored) == 0
    assert not list(tmp_path.glob("**/*.bin"))


def test_an_empty_memory_can_be_saved_and_loaded(tmp_path):
    for kind in MEMORIES:
        for states in [saved(kind(5)), saved(kind(5), kind(5, path=tmp_path))]:
            restored = kind(5)
            restored.load_state_dict(states)
            assert len(stream(restored)) == 5


# ---- messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReservoirMemory(-1), "`capacity` must be a number of exemplars, 0 or more, but got -1. Pass 0"),
        (lambda: offer(ReservoirMemory(3), [1], task=-1), "`task` must be 0 or more, but got -1. Pass"),
        (lambda: ClassBalancedMemory(3).add([torch.zeros(2)], task=0), "ClassBalancedMemory must .* `label=` to Reh"),
        (lambda: HerdingMemory(3).add([torch.zeros(2)], task=0), "HerdingMemory must be given the labels"),
        (
            lambda: offer(TaskMemory(3), [1, 2], labels=torch.zeros(2)),
            r"integers of shape \(2,\), but got \(2,\) torch.f",
        ),
        (
            lambda: offer(TaskMemory(3), [1, 2], labels=torch.arange(3)),
            r"shape \(2,\), but got \(3,\) torch.int64. Return",
        ),
        (
            lambda: offer(HerdingMemory(3), [1, 2], ranks=torch.arange(3)),
            r"`ranks` must be of shape \(2,\), but got \(3,\)",
        ),
        (
            lambda: ReservoirMemory(3).draw(1, before=1, selection="latest"),
            r"'uniform', 'recent' or .* got 'latest'. Pass",
        ),
        (
            lambda: ReservoirMemory(3).draw(1, before=1, timescale=0.0),
            "`timescale` must be positive, but got 0.0. Pass",
        ),
        (lambda: ReservoirMemory(3).distribute(2, 2), "`rank` must be one of 2 processes, but got 2"),
        (
            lambda: TaskMemory(3).load_state_dict(saved(ReservoirMemory(3))),
            "a TaskMemory, but it comes from a? ?Reservoir",
        ),
        (lambda: TaskMemory(3).load_state_dict([]), "but it comes from nothing. Make"),
    ],
)
def test_a_wrong_argument_is_named_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]])
def test_weights_that_are_none_are_refused(weights):
    filled = ReservoirMemory(3)
    offer(filled, [0, 1, 2])
    with pytest.raises(ValueError, match=r"finite nonnegative weights of shape \(3,\), but got .* Return one weight"):
        filled.draw(1, before=1, selection=lambda tasks, labels, before: torch.tensor(weights))


def test_a_balanced_draw_without_labels_is_refused():
    filled = ReservoirMemory(3)
    filled.add([torch.zeros(3)], task=0)
    with pytest.raises(ValueError, match=r"must know the label of every exemplar.* Pass `label=` to RehearsalCallback"):
        filled.draw(1, before=1, selection="balanced")


def test_a_folder_that_cannot_be_written_is_refused_in_the_constructor(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="`path` must be a folder that can be written to"):
        TaskMemory(3, path=tmp_path / "file")
