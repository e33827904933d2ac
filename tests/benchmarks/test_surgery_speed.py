"""What removing half of the units of a ResNet-18 saves: time of inference on one thread, and bytes on the disk."""

import pytest
import torch
from torch.utils.benchmark import Timer
from torchvision.models import resnet18

from lightning_continual.compression.surgery import compact
from lightning_continual.compression.units import unit_groups

pytestmark = pytest.mark.benchmark


def seconds(runs, repeats):
    """Fewest seconds of each function, measured in turn: what else the machine does only adds to them."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(Timer("run()", globals={"run": run}, num_threads=1).timeit(1).median)
    return {name: min(values) for name, values in times.items()}


def halved(model, x):
    groups = unit_groups(model, x)
    kept = [torch.randperm(group.num_units) < group.num_units // 2 for group in groups]
    return compact(model, x, groups=groups, kept=kept)


@pytest.mark.parametrize("pixels", [64, 224])
def test_half_of_the_units_cost_much_less_than_half(pixels, tmp_path):
    torch.manual_seed(0)
    model, x = resnet18(weights=None).eval(), torch.randn(8, 3, pixels, pixels)
    models = {"whole": model, "half": halved(model, x[:1])}
    sizes = {}
    for name, one in models.items():
        torch.save(one.state_dict(), tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
    with torch.no_grad():
        times = seconds({name: lambda one=one: one(x) for name, one in models.items()}, repeats=9)
    faster, size = times["whole"] / times["half"], sizes["half"] / sizes["whole"]
    print(f"{pixels}x{pixels}: {faster:.2f} times faster, {size:.3f} of the bytes")
    assert faster >= 1.8
    assert size <= 0.35


def test_finding_and_removing_units_takes_seconds():
    model, x = resnet18(weights=None), torch.randn(2, 3, 64, 64)
    forward = seconds({"forward": lambda: model(x), "compact": lambda: halved(model, x)}, repeats=3)
    print(f"finding and removing units takes as long as {forward['compact'] / forward['forward']:.0f} forward passes")
    assert forward["compact"] <= 60 * forward["forward"]
