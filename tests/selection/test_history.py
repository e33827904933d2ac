"""The history of a bandit: what is kept of it, and what becomes of it."""

from __future__ import annotations

import io

import pytest
import torch
from torch.testing import assert_close

from lightning_continual.selection import History
from lightning_continual.selection import history as module

NAN = float("nan")


def filled(num_rows: int, num_arms: int = 2) -> History:
    """Row n holds n, 10 n and 100 n."""
    history = History()
    for row in range(num_rows):
        history.add(row, *(torch.full((num_arms,), float(row * factor)) for factor in (1, 10, 100)))
    return history


@pytest.mark.parametrize("num_rows", [1, 8, 9, 16, 17, 100])
def test_a_long_history_becomes_a_coarser_one(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 8)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 2)
    history = filled(num_rows)
    stride = 1
    while len(range(0, num_rows, stride)) > 8:
        stride *= 2
    assert history.steps == list(range(0, num_rows, stride))
    assert_close(history.table("plays")[:, 1], 10.0 * torch.tensor(history.steps))


def test_of_many_arms_fewer_rows_are_kept_but_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_NUMBERS", 400)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 6)
    assert 10 < len(filled(100, num_arms=20)) <= 20
    assert 3 < len(filled(100, num_arms=200)) <= 6


def test_the_latest_row_is_known_where_it_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 8)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 2)
    history = filled(20)
    assert history.steps[-1] == 16
    assert history.latest["rewards"].tolist() == [1900.0, 1900.0]


def test_arms_that_were_not_known_have_no_number() -> None:
    history = filled(1)
    history.add(1, *3 * [torch.ones(3)])
    assert_close(history.table("rewards", 4), torch.tensor([[0, 0, NAN, NAN], [1, 1, 1, NAN]]), equal_nan=True)
    assert history.table("rewards").shape == (2, 3)
    assert History().table("rewards", 2).shape == (0, 2)


def test_it_goes_on_after_its_state_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 8)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 2)
    one, two, file = filled(11), History(), io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    for history in (one, two):
        for row in range(11, 40):
            history.add(row, *3 * [torch.full((3,), float(row))])
    assert one.steps == two.steps
    assert torch.equal(one.table("plays").nan_to_num(-1), two.table("plays").nan_to_num(-1))


def test_its_state_is_a_tensor_a_table() -> None:
    state = filled(500, num_arms=3).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)} == {
        "steps": (500,),
        "probabilities": (500, 3),
        "plays": (500, 3),
        "rewards": (500, 3),
    }
