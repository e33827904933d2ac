import copy
import io
import math
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from lightning_continual.metrics import (
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    trained_part,
)

NAN = math.nan


def square(T, seed=0):
    return torch.rand(T, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(T, seed=7):
    return torch.rand(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(R, b, better=True):
    """All named numbers; ``b`` serves as baseline and as reference."""
    return {
        "average_accuracy": average_accuracy(R),
        "average_incremental_accuracy": average_incremental_accuracy(R),
        "learning_accuracy": learning_accuracy(R),
        "backward_transfer": backward_transfer(R, higher_is_better=better),
        "forward_transfer": forward_transfer(R, b, higher_is_better=better),
        "forgetting": forgetting(R, higher_is_better=better),
        "intransigence": intransigence(R, b, higher_is_better=better),
    }


def numbers_by_loops(R, b, better=True):
    R, b, T = R.tolist(), b.tolist(), len(R)
    best, sign = (max, 1) if better else (min, -1)
    lost = [best(R[i][j] for i in range(j, T - 1)) - R[T - 1][j] for j in range(T - 1)]
    return {
        "average_accuracy": sum(R[T - 1][j] for j in range(T)) / T,
        "average_incremental_accuracy": sum(sum(R[i][j] for j in range(i + 1)) / (i + 1) for i in range(T)) / T,
        "learning_accuracy": sum(R[j][j] for j in range(T)) / T,
        "backward_transfer": sign * sum(R[T - 1][j] - R[j][j] for j in range(T - 1)) / (T - 1),
        "forward_transfer": sign * sum(R[j - 1][j] - b[j] for j in range(1, T)) / (T - 1),
        "forgetting": sign * sum(lost) / (T - 1),
        "intransigence": sign * sum(b[j] - R[j][j] for j in range(T)) / T,
    }


def filled(R, baseline=None):
    matrix = AccuracyMatrix(len(R))
    for i in range(len(R)):
        for j in range(len(R)):
            if not R[i, j].isnan():
                matrix.update(i, j, R[i, j])
    for j in range(len(R) if baseline is not None else 0):
        matrix.update(-1, j, baseline[j])
    return matrix


@pytest.mark.parametrize("better", [True, False], ids="higher_is_better={}".format)
@pytest.mark.parametrize("T", [2, 3, 7], ids="T={}".format)
def test_every_number_equals_its_definition_by_loops(T, better):
    for seed in range(5):
        R, b = square(T, seed), row(T)
        for name, value in numbers(R, b, better).items():
            assert value.shape == ()
            assert value.item() == pytest.approx(numbers_by_loops(R, b, better)[name], abs=1e-14), name


def test_a_loss_is_a_score_of_the_opposite_sign():
    R, b = square(4), row(4)
    for name in ("backward_transfer", "forward_transfer", "forgetting", "intransigence"):
        assert_close(numbers(-R, -b, better=False)[name], numbers(R, b)[name], rtol=0, atol=0)


@pytest.mark.parametrize("better", [True, False], ids="higher_is_better={}".format)
def test_of_a_constant_matrix_every_difference_is_positive_zero(better):
    differences = numbers(torch.full((4, 4), 0.3), torch.full((4,), 0.3), better)
    for name in ("backward_transfer", "forward_transfer", "forgetting", "intransigence"):
        assert str(differences[name].item()) == "0.0"


def test_forgetting_is_never_less_than_negative_backward_transfer_and_equal_at_two_tasks():
    for seed in range(10):
        assert forgetting(square(5, seed)) >= -backward_transfer(square(5, seed))
        assert_close(forgetting(square(2, seed)), -backward_transfer(square(2, seed)))


def test_average_accuracy_is_learning_accuracy_plus_backward_transfer():
    R = square(5)
    assert_close(average_accuracy(R), learning_accuracy(R) + 4 / 5 * backward_transfer(R))


def test_the_order_of_columns_does_not_matter_to_average_accuracy():
    R = square(5)
    assert_close(average_accuracy(R[:, [3, 1, 0, 4, 2]]), average_accuracy(R))


def test_learning_what_the_reference_learns_is_no_intransigence():
    R = square(4)
    assert intransigence(R, R.diagonal()) == 0
    assert_close(intransigence(R, R.diagonal() + 0.25), torch.tensor(0.25, dtype=torch.float64))


def test_with_one_task_transfer_and_forgetting_are_nan_and_the_means_are_the_score():
    for R in (torch.tensor(0.5), torch.tensor([[0.5]])):
        found = numbers(R, R.reshape(-1)[0])
        for name in ("average_accuracy", "average_incremental_accuracy", "learning_accuracy"):
            assert found[name] == 0.5
        for name in ("backward_transfer", "forward_transfer", "forgetting"):
            assert found[name].isnan()
            assert found[name].shape == ()
        assert found["intransigence"] == 0


def test_of_no_task_every_number_is_nan():
    assert all(value.isnan() for value in numbers(torch.empty(0, 0), torch.empty(0)).values())


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("average_accuracy", "...\n...\nxxx"),
        ("average_incremental_accuracy", "x..\nxx.\nxxx"),
        ("learning_accuracy", "x..\n.x.\n..x"),
        ("backward_transfer", "x..\n.x.\nxx."),
        ("forward_transfer", ".x.\n..x\n..."),
        ("forgetting", "x..\nxx.\nxx."),
        ("intransigence", "x..\n.x.\n..x"),
    ],
)
def test_a_number_is_nan_exactly_if_an_entry_that_it_needs_is(name, needed):
    for i, line in enumerate(needed.split("\n")):
        for j, mark in enumerate(line):
            R = square(3)
            R[i, j] = NAN
            for better in (True, False):
                assert numbers(R, row(3), better)[name].isnan().item() == (mark == "x"), (i, j)


def test_the_baseline_of_the_first_task_is_not_needed():
    b = row(3)
    b[0] = NAN
    assert not forward_transfer(square(3), b).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_results_keep_the_dtype_and_device_of_the_matrix(dtype):
    for device in ("cpu", "meta"):
        R = torch.eye(3, dtype=dtype, device=device)
        for value in numbers(R, torch.zeros(3, dtype=torch.float64, device=device)).values():
            assert value.dtype == dtype
            assert value.device.type == device


def test_integer_scores_count_as_floating_ones():
    assert average_accuracy(torch.tensor([[1, 0], [0, 1]])) == 0.5


def test_the_matrix_given_is_not_changed():
    R = square(4)
    before = R.clone()
    numbers(R, row(4), better=False)
    assert torch.equal(R, before)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)], ids=str)
def test_a_matrix_that_is_not_square_is_an_error_that_names_the_shape(shape):
    R, b = torch.zeros(shape), torch.zeros(2)
    for function in (average_accuracy, average_incremental_accuracy, learning_accuracy, backward_transfer, forgetting):
        with pytest.raises(ValueError, match=r"`R` must be square.*but got shape \(" + str(shape[0])):
            function(R)
    for function in (forward_transfer, intransigence):
        with pytest.raises(ValueError, match="`R` must be square"):
            function(R, b)
    with pytest.raises(ValueError, match="`R` must be square"):
        trained_part(R)


def test_a_baseline_or_reference_of_another_length_is_an_error():
    with pytest.raises(ValueError, match=r"`baseline` must have one score for each of the 3 tasks .*got shape \(2,\)"):
        forward_transfer(square(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`reference` must have one score for each of the 3 tasks.*\(1, 3\)"):
        intransigence(square(3), torch.zeros(1, 3))


def test_the_trained_part_ends_with_the_last_row_that_has_a_score():
    R = torch.full((4, 4), NAN)
    assert trained_part(R).shape == (0, 0)
    R[0, 0] = 1.0
    assert torch.equal(trained_part(R), torch.tensor([[1.0]]))
    R[2, 3] = 0.0  # row 1 was skipped
    assert trained_part(R).shape == (3, 3)
    assert trained_part(torch.tensor(0.5)).shape == (1, 1)


def test_an_entry_is_the_weighted_mean_of_its_updates():
    matrix = AccuracyMatrix(2)
    matrix.update(1, 0, 0.5, weight=30)
    matrix.update(1, 0, torch.tensor([0.9]), weight=torch.tensor(10))
    matrix.update(trained=-1, tested=1, score=0.125)
    assert_close(matrix.compute(), torch.tensor([[NAN, NAN], [0.6, NAN]], dtype=torch.float64), equal_nan=True)
    assert_close(matrix.baseline, torch.tensor([NAN, 0.125], dtype=torch.float64), equal_nan=True)


def test_a_weight_of_zero_adds_nothing_even_if_the_score_is_nan():
    matrix = AccuracyMatrix(1)
    matrix.update(0, 0, NAN, weight=0)
    assert not matrix.update_called
    matrix.update(0, 0, 0.5)
    matrix.update(0, 0, NAN, weight=0)
    assert matrix.compute().item() == 0.5


def test_a_score_of_nan_stays_in_its_entry():
    matrix = filled(square(2))
    matrix.update(0, 1, NAN)
    assert torch.equal(matrix.compute().isnan(), torch.tensor([[False, True], [False, False]]))
    assert matrix.summary()["average_accuracy"] == average_accuracy(square(2)).item()


def test_one_task_gives_a_matrix_of_one_entry_although_torchmetrics_squeezes():
    matrix = AccuracyMatrix(1)
    matrix.update(0, 0, 0.5)
    assert matrix.compute().shape == (1, 1)
    assert matrix.baseline.shape == (1,)
    assert pickle.loads(pickle.dumps(matrix)).compute().shape == (1, 1)
    assert matrix(0, 0, 1.0).shape == (1, 1)


def test_forward_returns_the_update_alone_and_adds_it():
    matrix = filled(square(2))
    alone = matrix(1, 1, torch.tensor(0.25, requires_grad=True), weight=3)
    assert_close(alone, torch.tensor([[NAN, NAN], [NAN, 0.25]], dtype=torch.float64), equal_nan=True)
    assert_close(matrix.compute()[1, 1], (square(2)[1, 1] + 0.75) / 4)


def test_a_result_changed_by_the_user_leaves_the_matrix_alone():
    matrix = filled(square(2))
    matrix.compute().zero_()
    matrix.baseline.zero_()
    assert_close(matrix.compute(), square(2))


def test_scores_may_be_added_inside_and_outside_of_inference_mode():
    matrix = AccuracyMatrix(1)
    with torch.inference_mode():
        matrix.reset()
        matrix.update(0, 0, 1.0)
    matrix.update(0, 0, 0.0)
    assert matrix.compute().item() == 0.5
    with torch.inference_mode():
        matrix.resize(2)
    matrix.clear(0)
    assert not matrix.update_called


def test_an_unscored_matrix_is_nan_with_a_warning():
    matrix = AccuracyMatrix(2)
    assert matrix.summary() == {}
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert matrix.compute().isnan().all()


def test_a_cleared_row_can_be_scored_again():
    matrix = filled(square(3), row(3))
    matrix.update(1, 0, NAN)
    before = matrix.compute()
    matrix.clear(1)
    assert torch.equal(matrix.compute().isnan().all(dim=1), torch.tensor([False, True, False]))
    matrix.update(1, 0, 0.125)
    assert matrix.compute()[1, 0] == 0.125
    assert torch.equal(matrix.compute()[[0, 2]], before[[0, 2]])
    matrix.clear(-1)
    assert matrix.baseline.isnan().all()
    assert torch.equal(matrix.compute()[[0, 2]], before[[0, 2]])


def test_a_resized_matrix_keeps_its_scores_and_its_size_through_reset():
    matrix = filled(square(2), row(2))
    matrix.resize(4)
    assert matrix.num_tasks == 4
    assert torch.equal(matrix.compute()[:2, :2], square(2))
    assert torch.equal(matrix.baseline[:2], row(2))
    assert matrix.compute().isnan().sum() == 12
    matrix.update(3, 3, 0.5)
    assert matrix.compute()[3, 3] == 0.5
    matrix.reset()
    assert matrix.num_tasks == 4
    assert not matrix.update_called


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))])
def test_a_copy_has_the_scores_and_goes_its_own_way(copied):
    matrix = AccuracyMatrix(2, higher_is_better=False)
    matrix.update(0, 0, 0.5)
    twin = copied(matrix)
    assert twin.higher_is_better is False
    twin.update(0, 0, 1.0)
    assert twin.compute()[0, 0] == 0.75
    assert matrix.compute()[0, 0] == 0.5


@pytest.mark.parametrize("size", [1, 2, 5], ids="into={}".format)
def test_a_saved_matrix_is_loaded_into_the_larger_of_both_sizes(size):
    module = torch.nn.ModuleDict({"matrix": filled(square(2), row(2))})
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    loaded = torch.nn.ModuleDict({"matrix": AccuracyMatrix(size)})
    loaded.load_state_dict(state)
    matrix = loaded["matrix"]
    assert matrix.num_tasks == max(size, 2)
    assert torch.equal(matrix.compute()[:2, :2], square(2))  # without a warning that nothing was scored
    assert torch.equal(matrix.baseline[:2], row(2))
    matrix.update(0, 0, 0.0)
    assert torch.equal(state["matrix.score_sums"], module["matrix"].score_sums)
    matrix.reset()
    assert matrix.num_tasks == max(size, 2)


def test_loading_replaces_scores_and_a_state_without_them_is_an_error():
    matrix = filled(square(3))
    matrix.compute()
    matrix.load_state_dict(filled(square(2, seed=1)).state_dict())
    assert torch.equal(matrix.compute()[:2, :2], square(2, seed=1))
    assert matrix.compute()[2].isnan().all()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"score_sums\", \"weight_sums\""):
        matrix.load_state_dict({})
    assert sorted(matrix.load_state_dict({}, strict=False).missing_keys) == ["score_sums", "weight_sums"]


def test_moving_keeps_float64_and_takes_all_states_along():
    matrix = AccuracyMatrix(2).half().to("meta")
    matrix.resize(3)
    assert {matrix.score_sums.device.type, matrix.weight_sums.device.type} == {"meta"}
    assert matrix.weight_sums.dtype == torch.float64


@pytest.mark.parametrize("better", [True, False], ids="higher_is_better={}".format)
def test_the_summary_of_a_running_stream_is_that_of_the_tasks_trained_so_far(better):
    R, b = square(4), row(4)
    matrix = AccuracyMatrix(4, higher_is_better=better)
    for j in range(4):
        matrix.update(-1, j, b[j])
    for t in range(1, 5):
        for j in range(4):
            matrix.update(t - 1, j, R[t - 1, j])
        expected = {k: v.item() for k, v in numbers(R[:t, :t], b[:t], better).items() if k != "intransigence"}
        assert matrix.summary() == {k: v for k, v in expected.items() if not math.isnan(v)}
        assert len(matrix.summary()) == (3 if t == 1 else 6)


def test_the_summary_leaves_out_what_needs_an_entry_never_scored():
    R = square(3).tril()
    R[R == 0] = NAN
    assert set(filled(R, row(3)).summary()) == set(numbers(R, row(3))) - {"forward_transfer", "intransigence"}
    assert "forward_transfer" not in filled(square(3)).summary()
    R[1, 0] = NAN
    assert set(filled(R).summary()) == {"average_accuracy", "learning_accuracy", "backward_transfer"}


def test_the_summary_shows_a_score_that_is_nan():
    matrix = AccuracyMatrix(1)
    matrix.update(0, 0, NAN)
    assert math.isnan(matrix.summary()["average_accuracy"])


def score_a_shard(rank, file):
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        matrix = AccuracyMatrix(2)
        matrix.update(0, 0, score=[0.5, 0.9][rank], weight=[30, 10][rank])
        matrix.update(-1, 1, score=[0.25, 0.75][rank])
        if rank == 0:
            matrix.update(1, 0, score=0.125)
        for _ in range(2):  # asking does not add up
            found = matrix.compute()
            assert found[0, 0].item() == pytest.approx(0.6)
            assert found[1, 0] == 0.125
            assert found[:, 1].isnan().all()
            assert matrix.baseline[1] == 0.5
            assert "learning_accuracy" not in matrix.summary()
        matrix.update(1, 1, score=rank)
        assert matrix.summary()["average_accuracy"] == (0.125 + 0.5) / 2
        assert matrix.weight_sums[1, 0] == [30, 10][rank]
    finally:
        dist.destroy_process_group()


def test_over_two_processes_an_entry_is_the_weighted_mean_of_the_shards(tmp_path):
    torch.multiprocessing.start_processes(score_a_shard, (tmp_path / "store",), nprocs=2, start_method="fork")


def test_a_matrix_draws_itself_into_new_or_given_axes():
    figure = pytest.importorskip("matplotlib.figure")
    fig, ax = filled(square(2)).plot(title="mine")
    assert ax is fig.axes[0]
    assert ax.get_title() == "mine"
    given = figure.Figure().subplots(1, 2)[1]
    fig, ax = filled(square(2)).plot(given)
    assert ax is given
    assert fig is given.figure


def test_a_loss_is_not_drawn_in_percent():
    pytest.importorskip("matplotlib")
    matrix = AccuracyMatrix(1, higher_is_better=False)
    matrix.update(0, 0, 0.5)
    _, ax = matrix.plot()
    assert [text.get_text() for text in ax.texts] == ["0.5"]


def test_arguments_out_of_range_are_errors_that_name_them():
    with pytest.raises(ValueError, match="`num_tasks` must be at least 1, but got 0"):
        AccuracyMatrix(0)
    matrix = AccuracyMatrix(2)
    for trained in (-2, 2):
        with pytest.raises(ValueError, match=rf"`trained` must lie in \[0, 2\), or be -1 .* but got {trained}"):
            matrix.update(trained, 0, 1.0)
        with pytest.raises(ValueError, match="`trained` must lie in"):
            matrix.clear(trained)
    for tested in (-1, 2):
        with pytest.raises(ValueError, match=rf"`tested` must lie in \[0, 2\), but got {tested}"):
            matrix.update(0, tested, 1.0)
    for weight in (-1, math.inf, NAN):
        with pytest.raises(ValueError, match="`weight` must be finite and not negative, but got"):
            matrix.update(0, 0, 1.0, weight=weight)
    with pytest.raises(ValueError, match=r"`score` must be one number, but got shape \(3,\)"):
        matrix.update(0, 0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"`num_tasks` must be at least the present 2, but got 1"):
        matrix.resize(1)
    assert not matrix.update_called
