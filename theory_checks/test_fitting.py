"""Densities to hold bounds against: how they are named, and what rows they are fitted to."""

import math
import time

import pytest
import torch

from mlsbi import NSF, BoxPrior, Level, LevelStack
from theory_checks.densities import AffineGaussian
from theory_checks.fitting import (
    Candidate,
    check_fit,
    draw_rows,
    fit_candidates,
    fit_density,
    name_density,
    rows_to_fit,
)
from theory_checks.testing import normal_prior_of


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def stack_of(outputs=1, prior=None, before=None):
    """Outputs theta + noise / 10, so many times, each with noise of its own."""
    def run(theta, noise):
        if before is not None:
            before(theta)
        return theta + 0.1 * noise

    return LevelStack(prior or normal_prior_of(1), lambda n, generator: torch.randn(n, outputs, generator=generator),
                      [Level("only", run)])


def candidates(named, stack, numbers, **options):
    given = {"estimator": "npe", "seed": 0, "seconds": None, "embedding": None, "x_transform": "none", **options}
    return fit_candidates([name_density(one, given["estimator"]) for one in named], stack, numbers, **given)


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_a_gaussian_is_fitted_in_the_estimators_coordinates(estimator):
    levels = [Level("only", lambda theta, noise: 3 * theta + 0.1 * noise)]
    stack = LevelStack(BoxPrior([2.0], [4.0]), normal_noise, levels)
    density = fit_density("gaussian", stack, *draw_rows(stack, 2000, seed=0), estimator=estimator)
    if estimator == "nle":
        assert density.slope.item() == pytest.approx(3, rel=0.01)
        assert density.log_precision.item() == pytest.approx(math.log(10), abs=0.1)
    else:  # the logit of a uniform and the uniform have correlation 0.955
        assert density.slope.item() == pytest.approx(0.955 * (math.pi / 3**0.5) / (3 * 2 / 12**0.5), rel=0.05)


def test_a_gaussian_of_many_outputs_is_as_good_on_rows_it_has_not_seen():
    """With 300 outputs, 1000 rows and hardly a ridge it would be half as wide again as it believes."""
    stack = stack_of(300)
    [found] = candidates(["gaussian"], stack, 300)
    assert found.rows == 3000
    assert not found.fitted_to_few
    theta, x = draw_rows(stack, 1000, seed=99)
    density = found.density
    naive = AffineGaussian.fit(*draw_rows(stack, 400, seed=0))
    off = [float((theta.double() - (x.double() @ each.slope.T + each.shift)).square().mean().detach().sqrt()
                 * each.log_precision.exp().item()) for each in (density, naive)]
    assert off[0] < 1.1
    assert off[1] > 1.5


def test_few_rows_are_said_to_be_few():
    assert Candidate("a", None, rows=1000, numbers=101).fitted_to_few
    assert not Candidate("a", None, rows=1000, numbers=100).fitted_to_few
    assert not Candidate("given", None, rows=0, numbers=100).fitted_to_few
    assert rows_to_fit(10**6, gaussian=True) == 20_000


def test_rows_are_drawn_once_for_all_densities():
    ran = []
    stack = stack_of(before=lambda theta: ran.append(len(theta)))
    found = candidates(["gaussian", "gaussian", "gaussian"], stack, 1)
    assert sum(ran) < 1100  # and a few replays
    assert len({each.density.slope.item() for each in found}) == 1
    ran.clear()
    candidates([AffineGaussian([[1.0]], [0.0], [0.0])], stack, 1)
    assert ran == []


def test_time_limits_the_rows_but_leaves_a_hundred():
    slow = stack_of(before=lambda theta: time.sleep(2e-4 * len(theta)))
    assert len(draw_rows(slow, 1000, seed=0, seconds=1e-3)[0]) == 100
    some = len(draw_rows(slow, 1000, seed=0, seconds=0.3)[0])
    assert 100 < some < 400  # of 0.2 ms at least
    quick = stack_of()
    theta, x = draw_rows(quick, 1000, seed=0, seconds=1000.0)
    assert len(theta) == len(x) == 1000
    assert torch.equal(theta, draw_rows(quick, 1000, seed=0)[0])
    assert len(theta.unique()) == 1000
    assert not torch.equal(theta, draw_rows(quick, 1000, seed=1)[0])


def test_names():
    gaussian = AffineGaussian([[1.0]], [0.0], [0.0])
    assert name_density("nsf", "npe") == (Candidate("nsf", "nsf"), True)
    assert name_density(("mine", "nsf"), "npe") == (Candidate("mine", "nsf"), True)
    assert name_density(NSF(), "npe")[0].name == "nsf"
    assert name_density(gaussian, "nle") == (Candidate("AffineGaussian", gaussian), False)
    assert name_density(("mine", gaussian), "nle")[0].name == "mine"
    with pytest.raises(ValueError, match="Unknown density 'gauss'; known: .*nsf.* Or \"gaussian\""):
        name_density("gauss", "npe")
    with pytest.raises(TypeError, match="got int"):
        name_density(3, "npe")


def test_densities_of_other_shapes_are_refused():
    theta, x = torch.zeros(5, 1, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    check_fit(Candidate("mine", AffineGaussian([[1.0, 1.0]], [0.0], [0.0])), theta, x, "npe")
    with pytest.raises(ValueError, match="'mine' does not fit the stack, with 1 parameters and outputs of shape"):
        check_fit(Candidate("mine", AffineGaussian([[1.0]], [0.0], [0.0])), theta, x, "npe")
    with pytest.raises(ValueError, match="outputs of shape .2,.: 'no'"):
        check_fit(Candidate("mine", lambda theta, x: {}["no"]), theta, x, "npe")


def test_networks_are_trained_on_a_thousand_rows_at_most(monkeypatch):
    from mlsbi import NPE

    seen = []
    monkeypatch.setattr(NPE, "fit", lambda self, data, progress: seen.append(data.n) or self)
    stack = stack_of(150)
    found = candidates(["gaussian", "mdn"], stack, 150)
    assert seen == [(1000,)]
    assert [each.rows for each in found] == [1500, 1000]
    assert [each.fitted_to_few for each in found] == [False, True]
