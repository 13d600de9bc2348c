"""The figure's panels, lines, points and legend are what the report holds."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from mlsbi import Level, LevelStack
from mlsbi.plots.style import GREY, level_colours
from theory_checks.densities import AffineGaussian
from theory_checks.figure import theory_figure
from theory_checks.report import theory_report
from theory_checks.testing import normal_prior_of

GAUSSIAN = AffineGaussian([[0.5]], [0.0], [0.0])


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def ladder(levels):
    """x = theta + (1.5 - 2^-l) u."""
    return LevelStack(normal_prior_of(1), normal_noise, [
        Level(f"run {level}", lambda theta, noise, level=level: theta + (1.5 - 0.5**level) * noise, 4.0**level)
        for level in range(levels)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    return {levels: theory_report(ladder(levels), title="ladder", densities=[GAUSSIAN], rows=2100, parameters=0,
                                  n=tuple(range(40, 40 - levels, -1))) for levels in (1, 2, 4)}


def drawn(axes, *, style=None, marker=None, colour=None, fill=None):
    """Lines of an axes with these looks."""
    return [line for line in axes.lines
            if (style is None or line.get_linestyle() == style) and (marker is None or line.get_marker() == marker)
            and (colour is None or to_hex(line.get_color()).lower() == colour.lower())
            and (fill is None or (line.get_markerfacecolor() == "white") != fill)]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def texts(axes):
    return " ".join(text.get_text() for text in axes.texts).replace("\n", " ")


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_left_panel_has_lines_and_points_of_each_level(reports, levels):
    report = reports[levels]
    figure, (section,) = theory_figure(report), report.sections
    assert len(figure.axes) == 2
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "rows n of the level"
    assert axes.get_title(loc="left") == f"{section.density}: a level's term"
    assert len(axes.lines) == 4 * levels  # variance, (P), (S), points
    for level, colour in enumerate(level_colours(levels)):
        for style, bound, value in (("-", "P", "estimate"), ("--", "P", "value"), (":", "S", "value")):
            (line,) = drawn(axes, style=style, colour=colour)
            check = section.of(bound)[level]
            x, y = line.get_data()
            assert x[0] == 1
            assert x[1] >= max(report.n)
            # Of slope -1, through the check at its own n.
            np.testing.assert_allclose(np.asarray(y) * np.asarray(x), getattr(check, value) * check.n)
        (points,) = drawn(axes, style="None", marker="o", colour=colour)
        slope = section.sample_slopes[level]
        np.testing.assert_allclose(points.get_xdata(), slope.at)
        np.testing.assert_allclose(points.get_ydata(), slope.variances)


@pytest.mark.parametrize("levels", [2, 4])
def test_the_right_panel_has_a_family_of_each_level_above_the_lowest(reports, levels):
    report = reports[levels]
    axes, (section,) = theory_figure(report).axes[1], report.sections
    assert len(axes.lines) == 5 * (levels - 1)  # slope 2, open points, filled point, (P), (Sl)
    assert "as levels approach each other" in axes.get_title(loc="left")
    assert "open: the fine output" in texts(axes)
    for level, colour in enumerate(level_colours(levels)[1:], start=1):
        slope, norm = section.difference_slopes[level - 1], report.norms.differences[level - 1].value
        (own,) = drawn(axes, marker="o", colour=colour, fill=True)
        assert own.get_xdata()[0] == pytest.approx(norm)
        assert own.get_ydata()[0] == pytest.approx(slope.variances[0])
        (closer,) = drawn(axes, marker="o", colour=colour, fill=False)
        np.testing.assert_allclose(closer.get_xdata(), norm * np.array(slope.at[1:]))
        np.testing.assert_allclose(closer.get_ydata(), slope.variances[1:])
        (sharp,) = drawn(axes, marker="v", colour=colour)
        check = section.of("P")[level]
        assert (sharp.get_xdata()[0], sharp.get_ydata()[0]) == pytest.approx((norm, check.value * check.n))
        smooth = section.of("S")[level]
        for style, at, through in (("-", -1, slope.variances[-1]), (":", 0, smooth.value * smooth.n)):
            (line,) = drawn(axes, style=style, marker="None", colour=colour)
            x, y = np.log(line.get_data())
            assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx(2)
            assert line.get_ydata()[at] == pytest.approx(through)


def test_one_level_has_none_to_approach(reports):
    figure = theory_figure(reports[1])
    axes = figure.axes[1]
    assert not axes.axison
    assert len(axes.lines) == 0
    assert "No two levels that differ" in texts(axes)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_legend_names_levels_and_bounds_once(reports, levels):
    (legend,) = theory_figure(reports[levels]).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"run {level}" for level in range(levels)), "bound (P)", "bounds (S0), (Sl)",
    ]  # fmt: skip
    colours = [to_hex(line.get_color()) for line in legend.get_lines()]
    assert [colour.lower() for colour in colours] == [colour.lower() for colour in
                                                      (*level_colours(levels), GREY, GREY)]


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_it_is_saved_and_the_same_again(reports, levels):
    figure = theory_figure(reports[levels])
    assert figure.get_suptitle() == "Theory of ladder"
    first = png(figure)
    assert first.startswith(b"\x89PNG")
    assert len(first) > 5000
    assert png(theory_figure(reports[levels])) == first


def test_a_row_of_panels_a_density():
    report = theory_report(ladder(2), densities=[GAUSSIAN, lambda theta, x: -(theta[:, 0] - x[:, 0].sin()) ** 2],
                           rows=300, parameters=0)
    figure = theory_figure(report)
    assert len(figure.axes) == 4
    assert figure.get_figheight() > theory_figure(replace(report, sections=report.sections[:1])).get_figheight()
    # A function without constants has (P) alone.
    left, right = figure.axes[2:]
    assert (len(left.lines), len(right.lines)) == (3 * 2, 4)
    assert drawn(left, style=":") == drawn(right, style=":") == []
    alone = theory_figure(replace(report, sections=report.sections[1:]))
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["run 0", "run 1", "bound (P)"]
    assert png(figure)


def test_levels_that_add_nothing_have_no_points_and_no_panel():
    def total(theta, noise):
        return theta + noise

    stack = LevelStack(normal_prior_of(1), normal_noise, [Level("a", total, 1.0), Level("b", total, 2.0)])
    figure = theory_figure(theory_report(stack, densities=[GAUSSIAN], rows=300, parameters=0))
    left, right = figure.axes
    upper = level_colours(2)[1]
    assert [list(line.get_xdata()) for line in drawn(left, colour=upper)] in ([], [[]])
    assert not right.axison
    assert png(figure)


def test_without_sections_the_reason_is_told():
    broken = LevelStack(normal_prior_of(1), normal_noise, [Level("only", lambda theta, noise: theta.round())])
    report = theory_report(broken, densities=[GAUSSIAN], rows=100, parameters=0)
    assert report.sections == ()
    figure = theory_figure(report)
    (axes,) = figure.axes
    assert not axes.axison
    assert report.problem
    assert report.problem in texts(axes)
    assert figure.legends == []
    assert png(figure)
