import io

import numpy as np
import pytest

from mlsbi import plots

DONE = [{"share": 1.0, "n": (200, 20), "inside": (200, 20)}, {"share": 0.04, "n": (0, 9), "inside": (12, 11)},
        {"share": 0.0003, "n": (50, 4), "inside": (60, 8)}]


def draws(dim):
    return np.random.default_rng(0).normal(size=(3, 100, dim)) / np.array([1, 2, 4])[:, None, None]


@pytest.mark.parametrize("dim", [1, 3, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (2, 5))])
def test_every_round_and_parameter_is_there(dim):
    figure = plots.rounds(DONE, draws(dim), levels=["low", "high"], exact=draws(dim)[2],
                          names=[f"p{index}" for index in range(dim)])
    shares, rows, *marginals = figure.axes
    assert shares.get_yscale() == "log"
    assert list(shares.lines[0].get_ydata()) == [1.0, 0.04, 0.0003]
    heights = sorted(round(patch.get_height()) for patch in rows.patches)
    assert heights == sorted([200, 0, 0, 12, 50, 10, 20, 0, 9, 2, 4, 4])
    assert [axes.get_title(loc="left") or axes.get_title() for axes in marginals] == [f"p{i}" for i in range(dim)]
    assert all(len([line for line in axes.lines if len(line.get_xdata()) > 2]) == 4 for axes in marginals)
    figure.savefig(io.BytesIO(), format="png")


def test_rounds_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, n, D\)"):
        plots.rounds(DONE[:2], draws(2), levels=["low", "high"])
    with pytest.raises(ValueError, match="at least one"):
        plots.rounds([], np.zeros((0, 5, 2)), levels=["low", "high"])
