"""Who makes and reads each weight, against an enumeration by hand; what cannot be served."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_continual.capacity import by_layer, cut_weights, find_wiring, kept_weights
from lightning_continual.heads import TaskHead


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.Conv2d(3, 2, 1)
        self.outer = nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(F.relu(x).flatten(1))


class Through(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def influenced(model: nn.Module, x: Tensor, tensors: dict[str, Tensor], name: str, index: tuple[int, ...]) -> Tensor:
    """The outputs that change when one weight does."""
    before = model(x)
    with torch.no_grad():
        own = tensors[name][index].item()
        tensors[name][index] = own + 0.37
        changed = (model(x) != before).any(0)
        tensors[name][index] = own
    return changed


@pytest.mark.parametrize("seed", range(3))
def test_a_free_weight_has_no_path_to_an_active_output_and_kept_ones_are_all_of_the_others(seed: int) -> None:
    """The oracle: change every weight by itself, and look at which outputs change."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    wiring, tensors = find_wiring(model, torch.randn(5, 3).double()), dict(model.named_parameters())
    active = torch.rand(wiring.num_units) < 0.5
    active[[0, 4]] = True  # not an empty layer
    active[-2:] = torch.tensor([True, False])  # one output is a task's that was learnt
    kept, cut = kept_weights(wiring, tensors, active), cut_weights(wiring, tensors, active)
    with torch.no_grad():
        for name, places in cut.items():
            tensors[name][places] = 0.0
    x = torch.randn(5, 3).double()
    for name, tensor in tensors.items():
        for index in [tuple(one) for one in torch.ones_like(tensor).nonzero().tolist()]:
            changes = bool(influenced(model, x, tensors, name, index)[0])
            # A cut weight would let a free unit interfere: its change reaches the output.
            assert changes == bool(kept[name][index] | cut[name][index]), (name, index)
            assert not (kept[name][index] & cut[name][index])


def test_the_three_kinds_of_weights_are_those_of_an_enumeration_of_pairs() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    wiring, tensors = find_wiring(model, torch.randn(1, 2)), dict(model.named_parameters())
    sets = [{0, 1}, {0, 2}, {1}, {0}]  # inputs, both hidden layers, outputs
    active = torch.tensor([unit in own for own, size in zip(sets[1:], (3, 2, 2), strict=True) for unit in range(size)])
    kept, cut = kept_weights(wiring, tensors, active), cut_weights(wiring, tensors, active)
    for place, name in enumerate(["0", "2", "4"]):
        rows, columns = tensors[f"{name}.weight"].shape
        for i in range(rows):
            assert bool(kept[f"{name}.bias"][i]) == (i in sets[place + 1])
            assert not cut[f"{name}.bias"][i]
            for j in range(columns):
                assert bool(kept[f"{name}.weight"][i, j]) == (i in sets[place + 1] and j in sets[place])
                assert bool(cut[f"{name}.weight"][i, j]) == (i in sets[place + 1] and j not in sets[place])


def test_a_residual_sum_shares_its_units_and_a_flatten_spreads_them() -> None:
    wiring = find_wiring(Residual(), torch.randn(2, 1, 2, 2))
    assert wiring.layers == {"stem": range(3), "inner": range(3, 5)}
    assert wiring.outputs == {"head": range(5, 7)}
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "norm.running_var", "outer.weight"):
        assert wiring.rows[name].units.tolist() == [0, 1, 2]
    assert wiring.columns["inner.weight"].units.tolist() == [0, 1, 2]
    assert wiring.columns["outer.weight"].units.tolist() == [3, 4]
    assert wiring.columns["head.weight"].units.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "stem.weight" not in wiring.columns


def test_every_task_of_a_head_reads_the_same_units_though_one_was_traced() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 3), TaskHead(3, [1, 2], num_tasks=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x), task=1)

    wiring = find_wiring(Explicit(), torch.randn(1, 2))
    assert wiring.outputs == {"head.layers.0": range(3, 4), "head.layers.1": range(4, 6)}
    assert wiring.columns["head.layers.0.weight"].units.tolist() == [0, 1, 2]
    assert wiring.outputs_of(1).tolist() == [4, 5]


def test_what_has_no_influence_on_the_outputs_is_left_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 3), "other": nn.LayerNorm(3), "head": nn.Linear(3, 1)})
    wiring = find_wiring(model, torch.randn(1, 2), forward=lambda m, x: m["head"](m["body"](x).relu()))
    assert not [name for name in wiring.rows if name.startswith("other")]


def test_a_depthwise_convolution_keeps_channels_apart() -> None:
    body = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten()
    wiring = find_wiring(nn.Sequential(*body, nn.Linear(16, 2)), torch.randn(2, 1, 6, 6))
    assert wiring.layers == {"0": range(4)}
    assert wiring.rows["1.weight"].units.tolist() == [0, 1, 2, 3]
    assert "1.weight" not in wiring.columns


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (nn.LayerNorm(8), r"Layer '1' \(LayerNorm\) mixes units"),
        (nn.LayerNorm(8, elementwise_affine=False), r"Layer '1' \(LayerNorm\) mixes units"),
        (Through(lambda x: F.normalize(x, dim=1)), r"The units of layer '0' are mixed before they are read"),
        (nn.Softmax(1), r"Parameter '0\.weight' of layer '0' \(Linear\) makes no units that can be told apart"),
        (Through(lambda x: x - x.mean(1, keepdim=True)), r"Parameter '0\.weight' of layer '0'"),
        (nn.PReLU(), r"Parameter '1\.weight' of layer '1' \(PReLU\) .* give a PReLU one weight a channel"),
        (nn.Dropout(0.5), None),
        (nn.GELU(), None),
        (nn.PReLU(8), None),
        (nn.BatchNorm1d(8), None),
    ],
    ids=str,
)
def test_what_mixes_units_is_named_and_what_does_not_is_served(between: nn.Module, message: str | None) -> None:
    model = nn.Sequential(nn.Linear(6, 8), between, nn.ReLU(), nn.Linear(8, 3))
    if message is None:
        assert find_wiring(model, torch.randn(4, 6)).layers == {"0": range(8)}
        return
    with pytest.raises(ValueError, match=message):
        find_wiring(model, torch.randn(4, 6))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.LocalResponseNorm(3), "LocalResponseNorm"),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), "InstanceNorm2d"),
    ],
    ids=str,
)
def test_norms_of_maps_that_mix_channels_or_keep_statistics_are_refused(layer: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=rf"Layer '1' \({name}\)"):
        find_wiring(model, torch.randn(2, 1, 6, 6))


class Normed(nn.Module):
    """Inputs by their running mean, in a buffer of its own."""

    def __init__(self, *, is_read: bool) -> None:
        super().__init__()
        self.is_read = is_read
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean())
        return x - self.mean if self.is_read else x


@pytest.mark.parametrize(
    ("layer", "buffer", "kind"),
    [
        (nn.BatchNorm1d(3), "running_mean", "BatchNorm1d"),
        (nn.BatchNorm1d(3, affine=False), "running_mean", "BatchNorm1d"),
        (Normed(is_read=True), "mean", "Normed"),
    ],
    ids=["norm", "norm without weights", "own"],
)
def test_statistics_of_inputs_that_training_changes_are_refused(layer: nn.Module, buffer: str, kind: str) -> None:
    module = nn.Sequential(layer, nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    message = rf"Buffer '0\.{buffer}' of layer '0' \({kind}\) changes in training, .* or set the layer to `eval\(\)`"
    with pytest.raises(ValueError, match=message):
        find_wiring(module, torch.randn(5, 3))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3, affine=False).eval(),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        Normed(is_read=False),
        Normed(is_read=True).eval(),
    ],
    ids=["eval", "no statistics", "not read", "own in eval"],
)
def test_buffers_that_stay_or_that_outputs_do_not_depend_on_are_served(layer: nn.Module) -> None:
    module = nn.Sequential(layer, nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    assert find_wiring(module, torch.randn(5, 3)).layers == {"1": range(4)}


def test_what_mixes_units_a_little_is_refused_too() -> None:
    # In bfloat16 one part in a hundred is little; to the bit it is not the same.
    for dtype, size in ((torch.bfloat16, 1e-1), (torch.float32, 1e-5)):
        between = Through(lambda x, size=size: x + size * x.mean(1, keepdim=True))
        module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), between, nn.Linear(8, 2)).to(dtype)
        with pytest.raises(ValueError, match=r"are mixed before they are read|told apart"):
            find_wiring(module, torch.randn(5, 3, dtype=dtype))


class Shaking(nn.Module):
    """Gives a little more each time, as kernels do that are not deterministic."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Shaking.calls += 1
        return x * (1 + 1e-6 * (Shaking.calls % 7))


def test_kernels_that_are_not_deterministic_are_no_reason_to_refuse() -> None:
    body = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()  # whose count of batches changes in training
    assert find_wiring(nn.Sequential(Shaking(), *body, nn.Linear(4, 2)), torch.randn(5, 3)).layers == {"1": range(4)}
    assert Shaking.calls > 5
    mixing = Through(lambda x: x + x.mean(1, keepdim=True))
    with pytest.raises(ValueError, match=r"are mixed before they are read|told apart"):
        find_wiring(nn.Sequential(Shaking(), *body, mixing, nn.Linear(4, 2)), torch.randn(5, 3))


def test_units_that_are_returned_beside_the_logits_are_refused_with_the_remedy() -> None:
    class Both(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self[0](x).relu()
            return self[1](hidden), hidden

    module = Both(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"If the module returns units beside its logits, pass `forward`"):
        find_wiring(module, torch.randn(5, 3))
    assert find_wiring(module, torch.randn(5, 3), forward=lambda net, x: net(x)[0]).layers == {"0": range(4)}


def test_attention_is_refused() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.attention, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    with pytest.raises(ValueError, match=r"Layer 'attention' \(MultiheadAttention\) mixes units"):
        find_wiring(Attending(), torch.randn(3, 2, 4))


def test_a_module_must_have_one_output_layer_and_units_before_it() -> None:
    x = torch.randn(2, 3)
    two = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)])
    with pytest.raises(ValueError, match=r"must have one output layer .*, but found '1', '2'\. Use `TaskHead"):
        find_wiring(two, x, forward=lambda m, x: [m[1](m[0](x)), m[2](m[0](x))])
    with pytest.raises(ValueError, match=r"but found none\."):
        find_wiring(nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)), x)
    with pytest.raises(ValueError, match=r"Sequential must have units between its inputs and its outputs, but has"):
        find_wiring(nn.Sequential(nn.Linear(3, 4)), x)
    with pytest.raises(
        ValueError, match=r"Linear could not be traced: .*Pass `forward`, a function of module and batch"
    ):
        find_wiring(nn.Linear(3, 4), torch.randn(2, 5))


def test_the_outputs_of_a_task_are_its_own_or_named() -> None:
    head = find_wiring(nn.Sequential(nn.Linear(2, 3), TaskHead(3, 2, num_tasks=2)), torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"The `TaskHead` has 2 tasks, but task 2 is to be learnt"):
        head.outputs_of(2)
    plain = find_wiring(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), torch.randn(1, 2))
    assert plain.outputs_of(0, [1, 3]).tolist() == [4, 6]
    for classes, found in ((None, "found none for task 5"), ([], "found none for task 5"), ([0, 4], r"got \[0, 4\]")):
        with pytest.raises(ValueError, match=rf"which of the 4 outputs of '1' are its own, but {found}"):
            plain.outputs_of(5, classes)


def test_the_first_pattern_that_matches_a_layer_counts() -> None:
    assert by_layer({"a.*": 1.0, "*.0": 2.0}, ["a.0", "b.0", "c"], "l1") == {"a.0": 1.0, "b.0": 2.0}
    with pytest.raises(ValueError, match=r"`l1` has the pattern 'd', which names no layer of \['a'\]"):
        by_layer({"d": 1.0}, ["a"], "l1")


def test_tracing_leaves_the_module_and_the_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    find_wiring(model, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model[0].weight.requires_grad
