import pytest
from torch import nn

from lightning_continual.parameters import evaluating, trainable


@pytest.fixture
def module():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    module[1][1].eval()
    return module


def modes(module):
    return {name: submodule.training for name, submodule in module.named_modules()}


def test_trainable_are_the_parameters_that_require_a_gradient_by_name(module):
    module[0].weight.requires_grad_(False)
    assert list(trainable(module)) == ["0.bias", "1.1.weight", "1.1.bias"]
    assert trainable(module)["0.bias"] is module[0].bias


def test_a_shared_parameter_is_trainable_once():
    module = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    module[1].weight = module[0].weight
    assert list(trainable(module)) == ["0.weight"]


def test_while_evaluating_every_submodule_is_in_evaluation_mode(module):
    with evaluating(module):
        assert not any(modes(module).values())


def test_after_evaluating_every_submodule_has_its_own_mode_back(module):
    before = modes(module)
    with evaluating(module):
        pass
    assert modes(module) == before
    assert before == {"": True, "0": True, "1": True, "1.0": True, "1.1": False}


def test_after_an_exception_every_submodule_has_its_own_mode_back(module):
    before = modes(module)
    with pytest.raises(RuntimeError, match="stop"), evaluating(module):
        raise RuntimeError("stop")
    assert modes(module) == before


def test_a_module_that_is_evaluated_already_stays_so(module):
    module.eval()
    with evaluating(module):
        pass
    assert not any(modes(module).values())
