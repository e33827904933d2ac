import io
import itertools
import math
import sys

import pytest
import torch

from lightning_continual.report import matrix_figure, matrix_table, print_matrix

NAN = math.nan


def square(T):
    return torch.rand(T, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draw(R, **arguments):
    pytest.importorskip("matplotlib")
    return matrix_figure(R, **arguments)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_each_cell_holds_its_own_number_in_percent():
    figure = draw(torch.tensor([[0.25, 0.0], [0.5, 1.0]]))
    at = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert at == {(0, 0): "25.0", (1, 0): "0.0", (0, 1): "50.0", (1, 1): "100.0"}  # (column, row)


def test_cells_without_a_score_stay_blank():
    assert texts(draw(torch.tensor([[0.25, NAN], [NAN, 1.0]]))) == ["25.0", "100.0"]
    assert texts(draw(torch.full((2, 2), NAN))) == []
    assert texts(draw(torch.full((2, 2), NAN), percent=False)) == []


def test_scores_beyond_a_share_have_three_digits_and_their_own_scale():
    figure = draw(torch.tensor([[1.25, -0.5], [NAN, 1000.0]]), label="loss")
    assert texts(figure) == ["1.25", "-0.5", "1e+03"]
    assert figure.axes[0].images[0].get_clim() == (-0.5, 1000.0)


def test_percent_runs_from_0_to_1_and_can_be_turned_off():
    R = torch.tensor([[0.5, 0.25], [0.25, 0.5]])
    figure = draw(R)
    figure.draw_without_rendering()
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)
    assert figure.axes[0].child_axes[0].get_yticklabels()[-1].get_text() == "100%"
    assert texts(draw(-R))[0] == "-0.5"
    figure = draw(R, percent=False)
    assert texts(figure) == ["0.5", "0.25", "0.25", "0.5"]
    assert figure.axes[0].images[0].get_clim() == (0.25, 0.5)
    assert texts(draw(2 * R, percent=True))[0] == "100.0"


def test_an_infinite_score_does_not_spoil_the_scale():
    figure = draw(torch.tensor([[2.0, math.inf], [1.0, 3.0]]))
    assert figure.axes[0].images[0].get_clim() == (1.0, 3.0)
    assert texts(figure)[1] == "inf"


@pytest.mark.parametrize("T", [1, 2, 5, 10, 20], ids="T={}".format)
@pytest.mark.parametrize("percent", [True, False], ids="percent={}".format)
def test_numbers_fit_into_their_cells(T, percent):
    figure = draw(square(T), percent=percent)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    cell = axes.get_window_extent().width / T
    assert len(axes.texts) == T * T
    for text in axes.texts:
        assert text.get_window_extent().width < 0.95 * cell
        assert text.get_fontsize() >= 6.0


def test_numbers_lose_decimals_and_then_drop_out_where_cells_are_small():
    figures = pytest.importorskip("matplotlib.figure")
    found = []
    for width in (6, 3, 2):
        axes = figures.Figure((width, width)).subplots()
        found.append(texts(draw(torch.full((12, 12), 0.5), ax=axes))[:1])
    assert found == [["50.0"], ["50"], []]


@pytest.mark.parametrize("T", [20, 60], ids="T={}".format)
def test_tick_labels_do_not_overlap_and_name_their_tasks(T):
    figure = draw(square(T))
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [int(label.get_text()) for label in labels] == [round(label.get_position()[0]) for label in labels]
    boxes = [label.get_window_extent() for label in labels]
    assert all(one.x1 < two.x0 for one, two in itertools.pairwise(boxes))


def test_numbers_are_white_on_dark_and_black_on_bright_cells():
    figure = draw(torch.tensor([[0.0, 1.0], [0.3, 0.7]]))
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "black", "white", "black"]


def test_names_title_and_label_are_written():
    figure = draw(square(2), names=["January", "February"], title="Months", label="IoU")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["January", "February"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["January", "February"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Months", "on task", "after task")
    assert axes.child_axes[0].get_ylabel() == "IoU"
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {45.0}


def test_given_axes_are_drawn_into_also_in_a_subfigure():
    figures = pytest.importorskip("matplotlib.figure")
    whole = figures.Figure()
    axes = whole.subfigures(1, 2)[1].subplots()
    assert draw(square(2), ax=axes) is whole
    assert len(axes.texts) == 4


def test_a_figure_can_be_saved_and_pyplot_holds_no_figure(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    matrix_figure(torch.eye(2)).savefig(tmp_path / "matrix.png")
    assert pyplot.get_fignums() == before
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match=r'pip install "lightning-continual\[plots\]"'):
        matrix_figure(torch.eye(2))


def test_a_table_is_aligned_and_shows_missing_scores_as_a_dash():
    table = matrix_table(torch.tensor([[1.0, NAN], [0.5, 0.0625]]), names=["a", "January"], label="F1")
    assert table == (
        "F1, %           on a  on January\n"
        "after a        100.0           -\n"
        "after January   50.0         6.2"
    )  # fmt: skip


def test_a_table_of_other_scores_has_three_digits():
    assert matrix_table(torch.tensor([[12.345]]), label="loss") == "loss     on 0\nafter 0  12.3"
    assert matrix_table(torch.tensor(0.5), percent=False) == "accuracy  on 0\nafter 0    0.5"


@pytest.mark.parametrize("rich", [True, False], ids="rich={}".format)
def test_a_printed_matrix_has_every_number_uncut_in_its_row(rich, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.table", None)
    R, file = square(30), io.StringIO()
    print_matrix(R, names=[f"[task {i}]" for i in range(30)], file=file)
    lines = [line for line in file.getvalue().splitlines() if "after" in line]
    assert len(lines) == 30
    for i, line in enumerate(lines):
        assert f"after [task {i}]" in line  # not taken for markup
        cells = line.partition("]")[2].replace("│", " ").split()
        assert cells == [f"{100 * value:.1f}" for value in R[i].tolist()]
    assert ("│" in file.getvalue()) == rich


def test_a_matrix_is_printed_to_the_present_standard_output(capsys):
    print_matrix(torch.tensor([[0.5]]))
    assert "50.0" in capsys.readouterr().out


@pytest.mark.parametrize("function", [draw, matrix_table, print_matrix])
def test_a_bad_matrix_or_bad_names_are_errors(function):
    with pytest.raises(ValueError, match=r"`R` must be square, .* but got shape \(2, 3\)"):
        function(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`R` must be square, .* but got shape \(0, 0\)"):
        function(torch.zeros(0, 0))
    with pytest.raises(ValueError, match="`names` must name each of the 2 tasks, but got 1 names"):
        function(torch.zeros(2, 2), names=["a"])
