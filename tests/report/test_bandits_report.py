"""Figures of bandits: arms from top to bottom, time to the right."""

import pytest
import torch
from torch.testing import assert_close

from lightning_continual.report import bandit_figure


def test_a_figure_of_a_bandit_has_an_arm_a_row_and_time_to_the_right() -> None:
    pytest.importorskip("matplotlib")
    values = torch.rand(60, 50)
    values[:30, 40:] = torch.nan  # arms that came later
    figure = bandit_figure(values, 10 * torch.arange(60), names=[f"arm {arm}" for arm in range(50)], label="plays")
    axes = figure.axes[0]
    assert_close(torch.tensor(axes.images[0].get_array().filled(float("nan"))), values.double().T, equal_nan=True)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"arm {arm}" for arm in range(0, 50, 2)]
    assert [tick.get_text() for tick in axes.get_xticklabels()][:2] == ["0", "80"]
    assert figure.axes[1].get_ylabel() == "plays"


def test_a_bandit_without_measurements_or_with_other_names_is_told() -> None:
    with pytest.raises(ValueError, match=r"but got \(0, 3\)\. Train until something is measured"):
        bandit_figure(torch.empty(0, 3))
    with pytest.raises(ValueError, match="`steps` and `names` must be 2 and 3, as `values`, but got 2 and 1"):
        bandit_figure(torch.rand(2, 3), names=["one"])
