"""What removing half of the units of a ResNet-18 saves: time of inference on one thread, and bytes on the disk."""

import pytest
import torch
from timing import seconds
from torchvision.models import resnet18

from lightning_continual.compression.surgery import compact
from lightning_continual.compression.units import unit_groups

pytestmark = pytest.mark.benchmark


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
        times = seconds({name: lambda one=one: one(x) for name, one in models.items()}, repeats=9, of=min)
    faster, size = times["whole"] / times["half"], sizes["half"] / sizes["whole"]
    print(f"{pixels}x{pixels}: {faster:.2f} times faster, {size:.3f} of the bytes")
    assert faster >= 1.8
    assert size <= 0.35


def test_finding_and_removing_units_takes_seconds():
    model, x = resnet18(weights=None), torch.randn(2, 3, 64, 64)
    forward = seconds({"forward": lambda: model(x), "compact": lambda: halved(model, x)}, repeats=3, of=min)
    print(f"finding and removing units takes as long as {forward['compact'] / forward['forward']:.0f} forward passes")
    assert forward["compact"] <= 60 * forward["forward"]
