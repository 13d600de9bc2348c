r"""Each figure draws what it claims, from any sensible input, and leaves no trace."""

import io
import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import binomtest

from mlsbi import plots
from mlsbi.allocation.comparing import ErrorCurve, error_curves
from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.data import MultilevelData
from mlsbi.plots.failures import read_tries
from mlsbi.plots.style import COLOURS, TRUTH
from mlsbi.store.records import Records, Stream
from mlsbi.store.store import create_store
from mlsbi.training.history import History, join_histories


def make_data(levels, outputs=(5,), n=30, names=None):
    generator = torch.Generator().manual_seed(levels)
    arrays = [(torch.rand(n, 2, generator=generator), torch.randn(n, *outputs, generator=generator))]
    for _ in range(levels - 1):
        coarse = torch.randn(n, *outputs, generator=generator)
        fine = coarse + 0.3 * torch.randn(n, *outputs, generator=generator)
        arrays.append((torch.rand(n, 2, generator=generator), fine, coarse))
    return MultilevelData.from_arrays(arrays, names)


def make_tails(levels):
    low = torch.tan(torch.linspace(-1.5, 1.5, 61))[:, None]
    theta = torch.zeros(61, 1)
    return MultilevelData.from_arrays([(theta, low), (theta, low * 1.2, low)][:levels])


def make_plan(levels):
    variances, costs = [8.0, 0.9, 0.05][:levels], [1.0, 10.0, 100.0][:levels]
    return optimal_allocation(variances, costs, budget=20_000.0)


def make_curves(levels, **changes):
    """Corrections of half the spread of the level before, on independent normals."""
    variances = 4.0 ** -np.arange(levels)
    covariance = np.minimum.outer(np.cumsum(variances), np.cumsum(variances))
    return error_curves(variances, 3.0 ** np.arange(levels), covariance=covariance, **changes)


def make_pilot(levels):
    return pd.DataFrame({
        "level": ["coarse", "medium", "fine"][:levels],
        "cost per run": [1.0, 10.0, 100.0][:levels],
        "cost per row": [1.0, 11.0, 110.0][:levels],
        "variance": [8.0, 7.5, 7.4][:levels],
        "variance of correction": [8.0, 0.9, 0.0][:levels],
        "correlation with level below": [np.nan, 0.94, 0.99][:levels],
        "kurtosis": [3.0, 120.0, np.nan][:levels],
        "consistency": [np.nan, 0.4, 1.7][:levels],
    })


def make_history(levels, *, epochs=60, seed=0, early=1.0, weights="unit", validation=True, every=20, adjusted=True):
    generator = np.random.default_rng(seed)
    records = []
    for epoch in range(epochs):
        record = {"loss": early * np.exp(-epoch) + 1 / (1 + epoch), "fine_0": 2.0 + generator.normal()}
        for level in range(1, levels):
            record[f"fine_{level}"], record[f"coarse_{level}"] = generator.normal(size=2)
            record[f"weight_{level - 1}"] = 1.0 if weights == "unit" else 1 / (1 + epoch)
        record["gradient_norm"] = float(generator.uniform())
        recorded = levels > 1 and epoch % every == 0
        for name in ("base_norm", "correction_norm", "cosine", "projected") if adjusted else ():
            record[name] = float(generator.uniform()) if recorded else np.nan
        record["validation_loss"] = record["loss"] + 0.5 if validation else np.nan
        records.append(record)
    return History(epochs=records, best_epoch=epochs // 2, best_loss=1.0)


def make_stages(levels, *, epochs=(30, 12), seed=0):
    """What transfer learning leaves: the stages in a row, the best epoch that of the last."""
    stages = [make_history(1, epochs=count, seed=seed + index) for index, count in enumerate(epochs[:levels])]
    return join_histories(stages)


def make_draws(dim, n=400, seed=0):
    return np.random.default_rng(seed).normal(0.5, 0.1, size=(n, dim))


def make_tries(dim=3, n=400, seed=0):
    """Rows of the unit cube, of which those with a large first parameter failed, and a few more."""
    generator = np.random.default_rng(seed)
    theta = generator.uniform(size=(n, dim))
    return theta, (theta[:, 0] > 0.8) | (generator.uniform(size=n) < 0.02)


FIGURES = {
    **{f"coupled {n}": lambda n=n: plots.coupled(make_data(n)) for n in (1, 2, 3)},
    "coupled, one output": lambda: plots.coupled(make_data(2, (1,))),
    "coupled, images": lambda: plots.coupled(make_data(2, (4, 4))),
    "coupled, one pair": lambda: plots.coupled(make_data(2, n=1)),
    **{f"plan {n}": lambda n=n: plots.plan(make_plan(n)) for n in (1, 2, 3)},
    **{f"pilot {n}": lambda n=n: plots.pilot(make_pilot(n)) for n in (1, 2, 3)},
    **{f"errors {n}": lambda n=n: plots.errors(make_curves(n)) for n in (1, 2, 3, 9)},
    "errors, planned": lambda: plots.errors(make_curves(3, budget=5000.0), 5000.0),
    "errors, one budget": lambda: plots.errors(make_curves(2, budgets=[50.0]), 50.0),
    "errors, none": lambda: plots.errors([ErrorCurve("all levels", (0,), (1.0, 2.0), (0.0, 0.0))]),
    "errors, nothing bought": lambda: plots.errors([ErrorCurve("all levels", (0,), (1.0, 2.0), (np.nan, np.nan))]),
    **{f"losses {n}": lambda n=n: plots.losses([make_history(n)]) for n in (1, 2, 3)},
    "losses, ensemble": lambda: plots.losses([make_history(2, seed=i, epochs=50 + i) for i in range(3)]),
    "losses, one epoch": lambda: plots.losses([make_history(2, epochs=1)]),
    **{f"losses, {n} stages": lambda n=n: plots.losses([make_stages(n, epochs=(9,) * n)]) for n in (1, 2, 4)},
    "losses, stages of an ensemble": lambda: plots.losses([make_stages(2, epochs=(20 + i, 9 - i)) for i in range(3)]),
    **{f"quality {n}": lambda n=n: plots.quality(
        [100.0, 100.0, 20.0, 1.0][:n], [0.1, 0.11, np.inf, 300.0][:n], [0.1, 0.1, np.nan, 5.0][:n],
        names=["multilevel", "transfer", "high", "low"][:n], prior=1.0, exact=-50.0) for n in (1, 2, 3, 4)},
    "coupled, one output with tails": lambda: plots.coupled(make_tails(2)),
    "coupled, one output of one level": lambda: plots.coupled(make_tails(1)),
    "pairs, five sets": lambda: plots.pairs({str(i): make_draws(3, seed=i) for i in range(4)}, reference=make_draws(3)),
    "coverage": lambda: plots.coverage({"a": np.linspace(0.01, 0.99, 50), "b": np.linspace(0.1, 0.5, 70)}),
    **{f"ranks {d}": lambda d=d: plots.ranks(np.random.default_rng(0).integers(0, 101, (200, d)), 100)
       for d in (1, 2, 5)},
    **{f"pairs {d}": lambda d=d: plots.pairs(make_draws(d)) for d in (1, 2, 5)},
    **{f"failures {d}": lambda d=d: plots.failures(*make_tries(d)) for d in (1, 2, 5, 8)},
    "failures, none": lambda: plots.failures(make_tries(2)[0], np.zeros(400, bool)),
    "failures, all": lambda: plots.failures(make_tries(2)[0], np.ones(400, bool)),
    "failures, one row": lambda: plots.failures([[0.5, 0.5]], [True]),
    "failures, constant parameter": lambda: plots.failures(np.full((50, 2), 0.0), np.arange(50) < 3),
    "failures, few values": lambda: plots.failures(np.arange(60).reshape(-1, 2) % 4, np.arange(30) < 3),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_leaves_nothing_behind(name):
    before = dict(mpl.rcParams)
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before
    assert all(text.get_fontsize() >= 9 for text in figure.findobj(mpl.text.Text) if text.get_text())


def test_plots_need_neither_pyplot_nor_torch_and_the_package_does_not_import_matplotlib():
    code = ("import sys, mlsbi; assert 'matplotlib' not in sys.modules; from mlsbi import plots; import numpy as np;"
            "assert 'torch' not in sys.modules;"
            "plots.pairs(np.random.rand(50, 2)).savefig('/dev/null', format='png');"
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


class TestCoupled:
    def test_draws_both_twins_of_each_pair(self):
        data = make_data(2, names=["cheap", "dear"])
        figure = plots.coupled(data, n=3)
        assert len(figure.axes) == 3 + 1
        for row, axes in enumerate(figure.axes[:3]):
            twins = {line.get_label(): line.get_ydata() for line in axes.lines}
            np.testing.assert_array_equal(twins["dear"], data.levels[1].fine[row])
            np.testing.assert_array_equal(twins["cheap"], data.levels[1].coarse[row])

    def test_correlation_is_numpys(self):
        data = make_data(3)
        [line] = [line for line in plots.coupled(data).axes[-1].lines if line.get_label() == "correlation"]
        top = data.levels[-1]
        expected = [np.corrcoef(top.fine[:, k], top.coarse[:, k])[0, 1] for k in range(5)]
        np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-12)

    def test_constant_output_is_left_out_and_counted(self):
        theta, x = torch.rand(9, 1), torch.randn(9, 3)
        x[:, 1] = 2.0
        axes = plots.coupled(MultilevelData.from_arrays([(theta, x), (theta, x * 2, x)])).axes[-1]
        [line] = [line for line in axes.lines if line.get_label() == "correlation"]
        np.testing.assert_array_equal(line.get_xdata(), [1, 3])
        assert any("1 constant" in text.get_text() for text in axes.texts)

    def test_single_level_shows_its_own_samples_only(self):
        data = make_data(1)
        figure = plots.coupled(data)
        assert len(figure.axes) == 4
        assert all(len(axes.lines) == 1 for axes in figure.axes)

    @pytest.mark.parametrize(("axis", "scale"), [([1, 2, 3, 4, 5], "linear"), ([0.1, 1, 2, 5, 9], "log"),
                                                 ([-1, 0, 1, 50, 99], "linear")])
    def test_axis_is_logarithmic_over_a_positive_decade(self, axis, scale):
        axes = plots.coupled(make_data(2), axis=axis, x_label="time (s)").axes
        assert axes[0].get_xscale() == axes[-1].get_xscale() == scale
        assert axes[-1].get_xlabel() == "time (s)"
        np.testing.assert_array_equal(axes[0].lines[0].get_xdata(), axis)

    def test_flattened_outputs_say_so(self):
        figure = plots.coupled(make_data(2, (4, 3)))
        assert len(figure.axes[0].lines[0].get_ydata()) == 12
        assert "4 x 3 flattened" in figure.axes[-1].get_xlabel()

    def test_one_output_is_a_scatter_of_twins(self):
        data = make_data(2, (1,))
        axes = plots.coupled(data).axes[0]
        points = axes.collections[0].get_offsets()
        np.testing.assert_array_equal(points, np.hstack([data.levels[1].coarse, data.levels[1].fine]))
        assert axes.get_xscale() == axes.get_yscale() == "linear"

    def test_long_tails_of_one_output_are_shrunk(self):
        axes = plots.coupled(make_tails(2)).axes[0]
        assert axes.get_xscale() == axes.get_yscale() == "asinh"
        assert "tails shrunk" in axes.get_xlabel()
        assert "of their ranks 1.000" in axes.get_title(loc="left")
        ticks = axes.get_xticks()
        assert 0 in ticks
        places = axes.transAxes.inverted().transform(axes.transData.transform([(tick, 0) for tick in ticks]))[:, 0]
        assert len(places) >= 5
        assert np.diff(places).min() > 0.07
        histogram = plots.coupled(make_tails(1)).axes[0]
        assert histogram.get_xscale() == "asinh"
        assert sum(bar.get_height() for bar in histogram.patches) == 61

    def test_titles_name_the_parameters(self):
        data = make_data(2)
        title = plots.coupled(data, names=["alpha", "beta"]).axes[0].get_title(loc="left")
        assert title.startswith(f"alpha {float(data.levels[1].theta[0, 0]):.2g}, beta ")

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"axis of shape \(5,\)"):
            plots.coupled(make_data(2), axis=[1, 2])
        with pytest.raises(ValueError, match="2 names, one per parameter"):
            plots.coupled(make_data(2), names=["a"])
        with pytest.raises(ValueError, match="n >= 1"):
            plots.coupled(make_data(2), n=0)


class TestPlanning:
    @pytest.mark.parametrize("form", [lambda plan: plan, lambda plan: plan.to_dict()])
    def test_plan_shows_rows_and_shares(self, form):
        plan = make_plan(3)
        rows, cost, variance = plots.plan(form(plan)).axes
        assert [text.get_text() for text in rows.texts] == [f"{n:,}" for n in plan.n]
        assert rows.get_xscale() == "log"
        ends = [bar.get_x() + bar.get_width() for bar in rows.patches]
        np.testing.assert_allclose(ends, plan.n)
        np.testing.assert_allclose([bar.get_width() for bar in cost.patches], np.divide(plan.level_costs, plan.cost))
        np.testing.assert_allclose([bar.get_width() for bar in variance.patches], plan.shares)

    def test_existing_rows_and_pilot_cost_are_told(self):
        record = {**make_plan(2).to_dict(), "names": ["cheap", "dear"], "rows": [0, 64], "overhead": 5000.0}
        record["cost"] += record["overhead"]
        figure = plots.plan(record)
        assert figure.axes[0].texts[1].get_text().endswith("(64 exist)")
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cheap", "dear"]
        assert "20%" in figure.get_supxlabel()

    def test_errors_are_the_curves_on_log_axes(self):
        curves = make_curves(3, budget=5000.0)
        axes = plots.errors(curves, 5000.0, unit="hours").axes[0]
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert "hours" in axes.get_xlabel()
        assert "nats" in axes.get_ylabel()
        lines = {line.get_label(): line for line in axes.lines}
        for curve in curves:
            np.testing.assert_array_equal(lines[curve.label].get_xdata(), curve.budgets)
            np.testing.assert_array_equal(lines[curve.label].get_ydata(), curve.errors)
        assert lines["all levels"].get_linewidth() > 2 * max(
            line.get_linewidth() for label, line in lines.items() if label.startswith(("without", "level"))
        )
        points = [line for line in axes.lines if line.get_marker() == "o"]
        at = curves[0].budgets.index(5000.0)
        assert sorted(line.get_ydata()[0] for line in points) == sorted(curve.errors[at] for curve in curves)
        assert any(list(line.get_xdata()) == [5000.0, 5000.0] for line in axes.lines)  # the vertical mark
        texts = [text.get_text() for text in axes.texts]
        assert "planned: 5,000" in texts
        ratio = curves[-1].errors[at] / curves[0].errors[at] - 1
        assert f"level 2 alone {ratio:+.0%}" in texts

    @pytest.mark.parametrize("levels", [2, 9, *(pytest.param(levels, marks=pytest.mark.slow) for levels in (3, 15))])
    def test_names_of_error_lines_do_not_overlap(self, levels):
        figure = plots.errors(make_curves(levels, budget=1e9), 1e9)
        figure.savefig(io.BytesIO(), dpi=100)
        names = [text for text in figure.axes[0].texts if text.get_text() and text.get_position()[0] > 4]
        assert len(names) == levels + 1 if levels > 2 else 2
        boxes = [text.get_window_extent() for text in names]
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0
            assert box.y1 <= figure.bbox.y1

    def test_error_lines_without_an_end_are_told(self):
        curves = [ErrorCurve("all levels", (0, 1), (1.0, 2.0), (np.nan, np.nan)),
                  ErrorCurve("fine alone", (1,), (1.0, 2.0), (0.0, 0.0))]
        assert plots.errors(curves).get_supxlabel() == "all levels: no budget here buys it.\nfine alone: no error."

    def test_pilot_shows_the_table(self):
        frame = make_pilot(2)
        variance, cost, correlation = plots.pilot(frame).axes
        ends = sorted(bar.get_x() + bar.get_width() for bar in variance.patches)
        np.testing.assert_allclose(ends, [0.9, 7.5, 8.0, 8.0])
        np.testing.assert_allclose([bar.get_x() + bar.get_width() for bar in cost.patches], [1, 10])
        [bar] = correlation.patches  # level 0 has no level below
        assert (bar.get_width(), bar.get_y() + bar.get_height() / 2) == (0.94, 1.0)

    def test_pilot_takes_a_report(self):
        class Report:
            cost_unit, integrand = "seconds", "gradient"

            def to_frame(self):
                return make_pilot(2)

        figure = plots.pilot(Report())
        assert figure.axes[1].get_xlabel() == "seconds (log scale)"
        assert figure.axes[0].get_title(loc="left") == "Variance of the gradient"

    def test_pilot_takes_a_table_read_from_json(self):
        frame = make_pilot(2).astype(object)
        frame.loc[0, "correlation with level below"], frame.loc[0, "consistency"] = None, "nan"
        assert len(plots.pilot(frame).axes[2].patches) == 1

    def test_pilot_names_what_to_worry_about(self):
        assert "kurtosis 120" in plots.pilot(make_pilot(3)).get_supxlabel()
        assert "consistency 1.70" in plots.pilot(make_pilot(3)).get_supxlabel()
        assert "consistency" not in plots.pilot(make_pilot(2)).get_supxlabel()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least one curve"):
            plots.errors([])
        with pytest.raises(ValueError, match="all at the same budgets; got 2 that differ"):
            plots.errors([*make_curves(1), *make_curves(1, budgets=[5.0])])
        with pytest.raises(ValueError, match=r"positive, finite budget; got -1\.0"):
            plots.errors(make_curves(2), -1.0)
        with pytest.raises(ValueError, match="shares missing"):
            plots.plan({key: value for key, value in make_plan(2).to_dict().items() if key != "shares"})
        with pytest.raises(ValueError, match=r"\['kurtosis'\] missing"):
            plots.pilot(make_pilot(2).drop(columns="kurtosis"))


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


class TestLosses:
    def test_one_level_has_one_panel(self):
        assert len(plots.losses([make_history(1)]).axes) == 1

    def test_one_level_of_a_named_stack(self):
        assert len(plots.losses([make_history(1)], ["cheap", "dear"]).axes) == 1

    def test_weights_are_shown_when_they_change(self):
        assert len(plots.losses([make_history(2)]).axes) == 4
        figure = plots.losses([make_history(2, weights="estimated")])
        assert len(figure.axes) == 5
        assert sum("Weight of" in title for title in titles(figure)) == 1

    def test_gradients_are_shown_where_they_were_adjusted(self):
        """Plain steps record nothing but the length of the whole gradient."""
        plain = plots.losses([make_history(2, adjusted=False), make_history(2, seed=1, adjusted=False)])
        assert len(plain.axes) == 2
        assert not any("radient" in title or "Angle" in title for title in titles(plain))
        assert len(plots.losses([make_history(3, adjusted=False, weights="estimated")]).axes) == 3

    def test_kept_epoch_is_marked_for_every_member(self):
        histories = [make_history(2, seed=i, epochs=40 + 10 * i) for i in range(3)]
        axes = plots.losses(histories).axes[0]
        marks = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
        expected = [(h.best_epoch, h.epochs[h.best_epoch]["validation_loss"]) for h in histories]
        np.testing.assert_allclose(marks, expected)
        assert len(axes.lines) == 3 * 3

    def test_frames_do_as_well_as_histories(self):
        history = make_history(2)
        frame = history.to_frame().assign(best_epoch=history.best_epoch)
        for one, other in zip(plots.losses([history]).axes, plots.losses([frame]).axes, strict=True):
            for a, b in zip(one.lines, other.lines, strict=True):
                np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())

    def test_huge_early_losses_do_not_set_the_axis(self):
        tame, wild = (plots.losses([make_history(1, early=early)]).axes[0] for early in (1.0, 1e6))
        assert wild.get_ylim()[1] < 10
        assert "not shown" in wild.get_xlabel()
        assert "not shown" not in tame.get_xlabel()

    def test_unrecorded_epochs_are_skipped(self):
        [norms] = [axes for axes in plots.losses([make_history(2, epochs=61)]).axes
                   if "gradients" in axes.get_title(loc="left")]
        assert [list(line.get_xdata()) for line in norms.lines] == [[0, 20, 40, 60]] * 2

    def test_many_records_are_smoothed(self):
        figure = plots.losses([make_history(2, epochs=200, every=1)])
        labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
        assert labels == ["cosine, running mean", "share of steps projected, running mean"]

    def test_without_held_out_rows_the_title_says_so(self):
        assert "no rows were held out" in titles(plots.losses([make_history(2, validation=False)]))[0]

    def test_names_reach_the_legend(self):
        axes = plots.losses([make_history(2)], ["cheap", "dear"]).axes[1]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "dear, fine half", "cheap, coarse half", "cheap, own rows"
        ]  # fmt: skip

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least one history"):
            plots.losses([])
        with pytest.raises(ValueError, match="at least one epoch"):
            plots.losses([History()])
        with pytest.raises(ValueError, match="2 names, one per level"):
            plots.losses([make_history(2)], ["a"])


class TestStages:
    def test_each_stage_has_a_panel_with_epochs_of_its_own(self):
        first, second = plots.losses([make_stages(2)], ["cheap", "dear"]).axes
        assert titles(first.figure) == ["Stage 1: cheap", "Stage 2: dear"]
        for axes, epochs in ((first, 30), (second, 12)):
            for line in axes.lines[:2]:  # not joined to the other stage's
                np.testing.assert_array_equal(line.get_xdata(), np.arange(epochs))

    def test_stages_are_called_by_their_labels_in_which_levels_have_their_names(self):
        history = make_stages(2)
        history.labels = ("level 0", "Auto, level 1")
        first, second = plots.losses([history], ["cheap", "dear"]).axes
        assert first.get_title("left") == "Stage 1: cheap"
        assert second.get_title("left") == "Stage 2: Auto, dear"
        history.labels = ("all levels at once", "level 1")
        assert [axes.get_title("left") for axes in plots.losses([history]).axes] == [
            "Stage 1: all levels at once", "Stage 2: level 1"]

    def test_only_the_last_stage_marks_its_best_epoch(self):
        marks = [[line for line in axes.lines if line.get_label() == "weights kept"]
                 for axes in plots.losses([make_stages(2)]).axes]
        assert marks[0] == []
        assert list(marks[1][0].get_xdata()) == [6]  # of 12, counted from the stage's first

    def test_members_of_an_ensemble_begin_stages_apart(self):
        figure = plots.losses([make_stages(2, epochs=(30, 12)), make_stages(2, epochs=(50, 20), seed=9)])
        assert [len(line.get_xdata()) for line in figure.axes[1].lines if line.get_marker() != "o"] == [12, 12, 20, 20]
        assert titles(figure)[1] == "Stage 2: level 1 (2 networks)"

    def test_the_finest_level_may_be_left_out(self):
        assert titles(plots.losses([make_stages(1)], ["cheap", "dear"])) == ["Stage 1: cheap"]
        with pytest.raises(ValueError, match="at least 2 names, one per stage"):
            plots.losses([make_stages(2)], ["cheap"])


def by_name(figure):
    """Markers of the strategies."""
    return {line.get_label(): line for line in figure.axes[0].lines if line.get_marker() in ("o", "^")}


def boxes(figure):
    """Extents of all texts within the axes."""
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]


def say(figure):
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))


class TestQuality:
    OPTIONS = {"names": ["multilevel", "transfer", "high"]}

    def test_points_bars_and_lines_are_at_their_places(self):
        figure = plots.quality([100, 50, 10], [0.1, 0.2, 0.5], [0.05, 0.04, np.nan], prior=1.0, exact=-0.5,
                               **self.OPTIONS)
        axes = figure.axes[0]
        assert axes.get_xscale() == "log"
        points = by_name(figure)
        np.testing.assert_array_equal(points["transfer"].get_xydata(), [[50, 0.2]])
        bars = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 2]
        for bar in ([0.0, 0.2], [1.0, 1.0], [-0.5, -0.5]):
            assert any(np.allclose(bar, one) for one in bars), bar
        assert {text.get_text() for text in axes.texts} >= {"prior", "exact posterior", *self.OPTIONS["names"]}
        assert plots.quality([9, 10, 11], [0.1, 0.2, 0.5], [0, 0, 0], **self.OPTIONS).axes[0].get_xscale() == "linear"

    def test_infinite_and_far_scores_are_marked_at_the_edge_and_told(self):
        figure = plots.quality([1, 2, 3], [0.1, np.inf, 500.0], [0.1, np.nan, 30], prior=0.5, **self.OPTIONS)
        axes, points = figure.axes[0], by_name(figure)
        assert [points[name].get_marker() for name in self.OPTIONS["names"]] == ["o", "^", "o"]  # two are compared
        assert "transfer: infinite" in say(figure)
        assert "some true parameters got no density" in say(figure)
        figure = plots.quality([1, 2, 3], [0.1, 0.3, 500.0], [0.1, 0.1, 30], prior=0.5, **self.OPTIONS)
        axes, point = figure.axes[0], by_name(figure)["high"]
        assert "high: 500" in say(figure)
        assert point.get_ydata()[0] == axes.get_ylim()[1] < 10
        assert "Triangles" not in say(plots.quality([1, 2, 3], [0.1, 0.3, 0.4], [0.1] * 3, **self.OPTIONS))

    @pytest.mark.parametrize(("prior", "told"), [(400.0, "prior: 400, above"), (-400.0, "prior: −400, below")])
    def test_a_far_line_is_told_and_does_not_set_the_axis(self, prior, told):
        figure = plots.quality([1, 2, 3], [0.1, 0.2, 0.3], [0.05] * 3, prior=prior, **self.OPTIONS)
        assert told in say(figure)
        assert np.abs(figure.axes[0].get_ylim()).max() < 2

    @pytest.mark.parametrize("costs", [[0, 0, 0], [100, 100, 10], [100, 99, 98]], ids=str)
    @pytest.mark.parametrize(("scores", "lines"), [([0.1, 0.1, 0.1], (0.11, 0.11)), ([0.1, 0.12, 0.11], (90, 90)),
                                                   ([np.inf] * 3, (0.11, 0.05)), ([0.1, 0.1, np.inf], (0.11, 0.1))])
    def test_names_do_not_overlap(self, costs, scores, lines):
        figure = plots.quality(costs, scores, [0.05] * 3, prior=lines[0], exact=lines[1], **self.OPTIONS)
        found = boxes(figure)
        for index, box in enumerate(found):
            assert not any(box.overlaps(other) for other in found[:index])
        assert all(figure.axes[0].get_window_extent().padded(1).contains(*corner)
                   for box in found for corner in (box.min, box.max))

    def test_equal_costs_stand_side_by_side(self):
        figure = plots.quality([7, 7, 7], [0.1, 0.2, 0.3], [0.05] * 3, **self.OPTIONS)
        figure.draw_without_rendering()
        places = [line.get_transform().transform(line.get_xydata())[0, 0] for line in by_name(figure).values()]
        assert np.diff(places).min() > 10
        assert list(figure.axes[0].get_xticks()) == [7]

    @pytest.mark.parametrize(("values", "match"), [
        (([1, 2], [0.1, 0.2, 0.3], [0, 0, 0]), "as many costs, scores and errors as names"),
        (([1, 2, -1], [0.1, 0.2, 0.3], [0, 0, 0]), "finite costs of at least 0"),
        (([1, 2, 3], [0.1, np.nan, 0.3], [0, 0, 0]), "scores that are numbers or inf"),
    ])  # fmt: skip
    def test_bad_input(self, values, match):
        with pytest.raises(ValueError, match=match):
            plots.quality(*values, **self.OPTIONS)


class TestCalibration:
    def test_coverage_curve_is_the_share_found(self):
        levels = np.array([0.1, 0.4, 0.4, 0.95])
        axes = plots.coverage({"mine": levels}).axes[0]
        [line] = [line for line in axes.lines if line.get_label() == "mine"]
        stated, found = line.get_data()
        np.testing.assert_array_equal(found, [(levels <= at).mean() for at in stated])
        assert "n = 4 test" in axes.get_title(loc="left")

    @pytest.mark.parametrize(("power", "inside"), [(1.0, 0.9), (3.0, 0.2)])
    def test_band_tells_calibrated_from_over_confident(self, power, inside):
        u = (np.arange(500) + 0.5) / 500
        axes = plots.coverage({"mine": u ** (1 / power)}).axes[0]  # levels near 1 when the posterior is too narrow
        vertices = axes.collections[0].get_paths()[0].vertices
        [line] = [line for line in axes.lines if line.get_label() == "mine"]
        within = []
        for stated, found in line.get_xydata():
            band = vertices[np.isclose(vertices[:, 0], stated), 1]
            within.append(band.min() <= found <= band.max())
        assert np.mean(within) >= inside if power == 1 else np.mean(within) <= inside

    def test_ranks_are_counted(self):
        ranks = np.array([[0, 10]] * 40 + [[10, 10]] * 40)
        left, right = plots.ranks(ranks, 10, ["a", "b"]).axes[:2]
        heights = [axes.patches[0].get_data().values for axes in (left, right)]
        assert heights[0][0] == heights[0][-1] > 0
        assert heights[0][1:-1].sum() == heights[1][:-1].sum() == 0
        assert titles(left.figure)[:2] == ["a", "b"]

    def test_bins_hold_equally_many_ranks_where_they_can(self):
        axes = plots.ranks(np.random.default_rng(0).integers(0, 1001, (400, 1)), 1000).axes[0]
        assert len(axes.patches[0].get_data().values) == 13  # 1001 = 7 * 11 * 13

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least one posterior"):
            plots.coverage({})
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            plots.coverage({"a": [0.2, 1.5]})
        with pytest.raises(ValueError, match=r"shape \(B,\)"):
            plots.coverage({"a": [[0.2]]})
        with pytest.raises(ValueError, match=r"ranks of shape \(B, D\)"):
            plots.ranks([1, 2, 3], 10)
        with pytest.raises(ValueError, match=r"within 0 \.\. 10; got 1 \.\. 11"):
            plots.ranks([[1], [11]], 10)
        with pytest.raises(ValueError, match="1 names, one per parameter"):
            plots.ranks([[1], [3]], 10, ["a", "b"])


class TestPairs:
    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_one_panel_a_parameter_and_a_pair(self, dim):
        figure = plots.pairs(make_draws(dim))
        assert sum(axes.get_visible() for axes in figure.axes) == dim * (dim + 1) // 2

    def test_truth_is_at_its_place(self):
        truth = [0.3, 0.6, 0.9]
        grid = np.reshape(plots.pairs(make_draws(3), truth=truth).axes, (3, 3))
        for k in range(3):
            [line] = [line for line in grid[k, k].lines if line.get_color() == TRUTH]
            np.testing.assert_array_equal(line.get_xdata(), [truth[k]] * 2)
            assert grid[k, k].get_xlim()[0] < truth[k] < grid[k, k].get_xlim()[1]
        [mark] = [line for line in grid[2, 0].lines if line.get_marker() == "s"]
        np.testing.assert_array_equal(mark.get_xydata(), [[0.3, 0.9]])

    def test_axes_show_the_box(self):
        grid = np.reshape(plots.pairs(make_draws(2), low=[0, -1], high=[2, 3]).axes, (2, 2))
        assert grid[1, 0].get_xlim() == (0, 2)
        assert grid[1, 0].get_ylim() == (-1, 3)

    @pytest.mark.parametrize("box", [{}, {"low": [0.0], "high": [1.0]}])
    def test_density_integrates_to_one(self, box):
        draws = np.random.default_rng(0).beta(1, 3, size=(4000, 1))  # much of it at the edge of the box
        axes = plots.pairs(draws, **box).axes[0]
        [curve] = [line for line in axes.lines if to_hex(line.get_color()) == COLOURS[0].lower()]
        x, y = curve.get_data()
        assert np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) == pytest.approx(1, abs=0.01)  # one cell in 160, at each end
        if box:
            assert y[0] == pytest.approx(3, rel=0.1)  # reflected, not smoothed over the edge

    def test_contours_hold_half_and_nine_tenths(self):
        draws = np.random.default_rng(0).normal(size=(20_000, 2))
        axes = np.reshape(plots.pairs(draws).axes, (2, 2))[1, 0]
        contours = axes.collections[-1]
        outer, inner = contours.get_paths()
        held = [path.contains_points(draws).mean() for path in (outer, inner)]
        assert held == pytest.approx([0.9, 0.5], abs=0.02)  # smoothing widens by 1%

    def test_one_parameter_is_drawn_with_its_prior(self):
        axes = plots.pairs(make_draws(1), names=["mu"], low=[0.0], high=[4.0]).axes[0]
        assert any(set(line.get_ydata()) == {0.25} for line in axes.lines)
        assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["posterior", "prior"]
        assert axes.get_title(loc="left").startswith("Posterior of mu: 0.49")

    def test_legend_names_every_set(self):
        def legend(figure):
            return [text.get_text() for text in figure.legends[0].get_texts()]

        sets = {"one": make_draws(2), "two": make_draws(2, seed=1)}
        assert legend(plots.pairs(sets, reference=make_draws(2))) == ["one", "two", "reference posterior"]
        assert legend(plots.pairs(sets, reference=make_draws(2), labels=["a", "b", "c"])) == ["a", "b", "c"]

    def test_several_sets_have_one_contour_each_and_no_filling(self):
        def contours(count):
            sets = {str(index): make_draws(2, n=4000, seed=index) for index in range(count)}
            figure = plots.pairs(sets, reference=make_draws(2, n=4000))
            axes = np.reshape(figure.axes, (2, 2))[1, 0]
            return figure.legends[0].get_title().get_text(), [len(one.get_paths()) for one in axes.collections]

        assert contours(1) == ("regions that hold 50% and 90%", [1, 1, 2, 2])  # two filled
        assert contours(4) == ("regions that hold 50%", [1] * 5)

    def test_constant_draws_are_drawn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plots.pairs(np.full((50, 2), 0.3)).savefig(io.BytesIO(), dpi=40)

    @pytest.mark.parametrize(("options", "match"), [
        ({"samples": np.zeros(20)}, r"shape \(n, D\); got \(20,\)"),
        ({"samples": np.zeros((3, 2))}, "at least 10 finite draws"),
        ({"samples": np.full((20, 2), np.nan)}, "20 of them not finite"),
        ({"samples": {}}, "at least one set"),
        ({"samples": {"a": make_draws(2), "b": make_draws(3)}}, "same number of parameters"),
        ({"samples": make_draws(2), "names": ["a"]}, "2 names, one per parameter"),
        ({"samples": make_draws(2), "truth": [1.0]}, r"truth of shape \(2,\)"),
        ({"samples": make_draws(2), "low": [0.0, 0.0]}, "low and high together"),
        ({"samples": make_draws(2), "low": [0.0, 1.0], "high": [1.0, 1.0]}, "low < high"),
        ({"samples": make_draws(2), "labels": ["a", "b"]}, "1 labels"),
    ])  # fmt: skip
    def test_bad_input(self, options, match):
        with pytest.raises(ValueError, match=match):
            plots.pairs(**options)


class TestFailures:
    @staticmethod
    def fractions(axes):
        """Centres, fractions and ends of the intervals of a panel on the diagonal."""
        [bars] = axes.containers
        line, _, (across, upright) = bars.lines
        ends = np.array([segment[:, 1] for segment in upright.get_segments()])
        assert len(across.get_segments()) == len(ends)
        return *line.get_data(), ends

    @staticmethod
    def title(figure):
        return figure._suptitle.get_text()  # get_suptitle is newer than the oldest matplotlib we allow

    @staticmethod
    def scattered(axes):
        return {one.get_label(): np.asarray(one.get_offsets()) for one in axes.collections}

    def test_fractions_per_bin_are_counts_with_wilson_intervals(self):
        theta, failed = make_tries(2)
        grid = np.reshape(plots.failures(theta, failed, low=[0, 0], high=[1, 1]).axes, (2, 2))
        for k in range(2):
            centres, fractions, ends = self.fractions(grid[k, k])
            np.testing.assert_allclose(centres, np.linspace(0.05, 0.95, 10))
            for place, (fraction, (low, high)) in enumerate(zip(fractions, ends, strict=True)):
                inside = np.floor(10 * theta[:, k]) == place
                test = binomtest(int(failed[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
                assert fraction == pytest.approx(failed[inside].mean())
                assert (low, high) == pytest.approx((test.low, test.high), abs=1e-6)
            [dashed] = [line for line in grid[k, k].lines if line.get_linestyle() == "--"]
            assert set(dashed.get_ydata()) == {failed.mean()}

    def test_bins_without_a_box_hold_equally_many_rows(self):
        theta = np.random.default_rng(0).lognormal(sigma=2, size=(1000, 1))
        failed = theta[:, 0] > np.quantile(theta, 0.95)
        _, fractions, _ = self.fractions(plots.failures(theta, failed).axes[0])
        assert fractions == pytest.approx([0] * 9 + [0.5])

    def test_rows_are_where_they_are_failed_ones_on_top(self):
        theta, failed = make_tries(3)
        grid = np.reshape(plots.failures(theta, failed).axes, (3, 3))
        for row, column in ((1, 0), (2, 0), (2, 1)):
            found = self.scattered(grid[row, column])
            assert list(found) == ["succeeded", "failed"]
            np.testing.assert_array_equal(found["failed"], theta[failed][:, [column, row]])
            np.testing.assert_array_equal(found["succeeded"], theta[~failed][:, [column, row]])
        assert not any(axes.get_visible() for axes in grid[np.triu_indices(3, 1)])

    def test_many_rows_are_thinned_and_it_says_so(self):
        theta, failed = make_tries(2, n=20_000)
        figure = plots.failures(theta, failed)
        found = self.scattered(np.reshape(figure.axes, (2, 2))[1, 0])
        assert all(len(points) <= 3000 for points in found.values())
        assert any(label.startswith("failed (") and label.endswith(f"of {failed.sum():,} drawn)") for label in found)
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert set(found) < set(texts)
        assert self.title(figure).startswith(f"{failed.sum():,} of 20,000 rows failed")

    def test_the_six_parameters_that_matter_are_drawn_in_their_order(self):
        generator = np.random.default_rng(3)
        theta = generator.uniform(size=(5000, 9))
        failed = generator.uniform(size=5000) < theta[:, [8, 1, 2, 5, 6, 4]].mean(1) ** 4
        figure = plots.failures(theta, failed, names=list("abcdefghi"))
        titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
        assert titles == ["b", "c", "e", "f", "g", "i"]
        assert "6 of 9 parameters" in self.title(figure)
        assert "parameters" not in self.title(plots.failures(*make_tries(6)))

    def test_title_tells_how_many(self):
        theta, _ = make_tries(2)
        rows = np.arange(400)
        assert self.title(plots.failures(theta, rows < 50)) == "50 of 400 rows failed (12.5%)"
        assert self.title(plots.failures(theta, rows < 0)) == "0 of 400 rows failed (0%)"

    def test_axes_show_the_box_and_names(self):
        theta, failed = make_tries(2)
        figure = plots.failures(theta, failed, names=["mu", "tau"], low=[0, -1], high=[2, 3])
        grid = np.reshape(figure.axes, (2, 2))
        assert grid[1, 0].get_xlim() == (0, 2)
        assert grid[1, 0].get_ylim() == (-1, 3)
        assert (grid[1, 0].get_xlabel(), grid[1, 0].get_ylabel()) == ("mu", "tau")
        single = plots.failures(theta[:, :1], failed, names=["mu"])
        assert len(single.axes) == 1
        assert single.axes[0].get_xlabel() == "mu"

    def test_single_precision_at_the_edge_of_the_box_is_inside(self):
        theta = np.array([[0.0], [0.1]], np.float32)
        assert float(theta.max()) > 0.1  # in double precision
        _, fractions, _ = self.fractions(plots.failures(theta, [False, True], low=[0.0], high=[0.1]).axes[0])
        np.testing.assert_array_equal(fractions, [0, 1])

    @pytest.mark.parametrize(("changes", "match"), [
        ({"theta": np.zeros(4)}, r"shape \(n, D\); got \(4,\)"),
        ({"theta": np.zeros((0, 2)), "failed": np.zeros(0, bool)}, "at least one row"),
        ({"theta": np.zeros((4, 0))}, r"shape \(n, D\)"),
        ({"theta": np.full((4, 2), np.nan)}, "4 of 4 rows are not"),
        ({"failed": [True, False]}, r"booleans of shape \(4,\)"),
        ({"failed": [0, 1, 0, 1]}, "booleans"),
        ({"failed": np.zeros((4, 1), bool)}, "booleans"),
        ({"names": ["a"]}, "2 names, one per parameter"),
        ({"low": [0, 0]}, "low and high together"),
        ({"low": [0], "high": [1]}, r"low and high of shape \(2,\)"),
        ({"low": [0, 1], "high": [1, 1]}, "low < high"),
        ({"low": [0, 0], "high": [1, np.inf]}, "finite low < high"),
        ({"low": [0, 0], "high": [1, 0.4]}, "4 of 4 rows are outside"),
    ], ids=str)  # fmt: skip
    def test_bad_input(self, changes, match):
        given = {"theta": np.full((4, 2), 0.5), "failed": np.zeros(4, bool), **changes}
        with pytest.raises(ValueError, match=match):
            plots.failures(given.pop("theta"), given.pop("failed"), **given)


def make_store(folder, streams, failed=()):
    """Ten rows of each stream, theta that tells which; those in `failed` went wrong, one of them repaired since."""
    store = create_store(folder, {}, ["low", "middle", "high"], ["mu", "tau"])
    with store.writing() as writer:
        for number, stream in enumerate(streams):
            index = np.arange(10)
            ones = np.ones((10, len(stream.levels)))
            theta = np.stack([np.full(10, number), index], 1).astype(np.float32)
            for again in (False, True):
                rows = index[:1] if again else index
                records = Records(index, theta, (ones,) * len(stream.levels),
                                  (np.isin(index, failed) & (not again)).astype(np.uint8), ones.astype(int), ones)
                writer.add(stream, records.take(rows))
                writer.flush()
    return store


class TestReadTries:
    STREAMS = (Stream(1, 0, (0,)), Stream(1, 1, (0, 1)), Stream(2, 2, (1, 2)), Stream(1, 1 << 16, (0, 1, 2)),
               Stream(3, 1 << 17, (2,)))

    def test_rows_of_a_finest_level_are_found_over_seeds_and_purposes(self, tmp_path):
        store = make_store(tmp_path / "store", self.STREAMS, failed=[0, 3, 7])
        for level, numbers in ((0, {0}), (1, {1}), (2, {2, 3, 4}), (-1, {2, 3, 4})):
            theta, failed = read_tries(store, level)
            assert theta.shape == (10 * len(numbers), 2)
            assert set(theta[:, 0]) == numbers
            assert failed.dtype == bool
            np.testing.assert_array_equal(failed, np.isin(theta[:, 1], [3, 7]))  # row 0 was repaired

    def test_a_level_without_rows_has_none(self, tmp_path):
        theta, failed = read_tries(make_store(tmp_path / "store", self.STREAMS[:1]), 2)
        assert theta.shape == (0, 2)
        assert failed.shape == (0,)

    @pytest.mark.parametrize("level", [3, -4])
    def test_unknown_levels(self, tmp_path, level):
        with pytest.raises(ValueError, match=r"a level from -3 to 2"):
            read_tries(make_store(tmp_path / "store", ()), level)
