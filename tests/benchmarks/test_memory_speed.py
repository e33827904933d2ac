"""Memories keep up with training: what an `add` and a draw cost, in time and in resident memory."""

import pytest
import torch
from torch.utils.benchmark import Timer

from lightning_continual.memory import ReservoirMemory, TaskMemory

pytestmark = pytest.mark.benchmark


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def resident_megabytes():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def median(statement, **names):
    return Timer(statement, globals=names).blocked_autorange(min_run_time=2).median


def test_a_reservoir_takes_100_000_samples_a_second():
    memory, block = ReservoirMemory(2000), [torch.randn(10, 3, 32, 32), torch.arange(10)]
    memory.add([torch.randn(2000, 3, 32, 32), torch.arange(2000)], task=0)
    assert median("memory.add(block, task=0)", memory=memory, block=block) < 10 / 100_000


def test_a_reservoir_takes_a_whole_stream_at_100_000_samples_a_second():
    block = [torch.randn(10, 3, 32, 32), torch.arange(10)]

    def stream():  # from the first sample on: it fills, then replaces less and less
        memory = ReservoirMemory(2000)
        for _ in range(2000):
            memory.add(block, task=0)

    seconds = median("stream()", stream=stream)
    print(f"{20_000 / seconds:,.0f} samples a second")
    assert seconds < 20_000 / 100_000


def test_a_uniform_draw_from_a_million_takes_less_than_100_microseconds():
    memory = ReservoirMemory(1_000_000)
    for task in range(10):
        memory.add([torch.zeros(100_000, 1)], task=task)
    assert median("memory.draw(64, before=10)", memory=memory) < 100e-6
    assert median("memory.draw(64, before=5)", memory=memory) < 100e-6
    assert median("memory.num_available(5)", memory=memory) < 20e-6


def test_a_million_images_on_disk_are_served_from_little_memory(tmp_path):
    memory = TaskMemory(1_000_000, path=tmp_path)
    images = torch.randint(256, (2_000, 3, 32, 32), dtype=torch.uint8)
    before = resident_megabytes()
    for task in range(10):
        for _ in range(50):
            memory.add([images], task=task)
    assert len(memory) == 1_000_000
    most = 0.0
    for _ in range(1000):
        (drawn,) = memory.draw(64, before=10)
        assert drawn.shape == (64, 3, 32, 32)
        most = max(most, resident_megabytes())
    assert most - before < 300
    assert median("memory.draw(64, before=10)", memory=memory) < 1e-3
