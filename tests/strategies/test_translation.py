import math

import pytest
import torch

from mlsbi import MAF, MDN, NLE, NPE, BoxPrior, MultilevelData, SingleLevel, TrainingOptions, Translation, tasks
from mlsbi.strategies import translation
from mlsbi.training.loop import minimise

PRIOR = BoxPrior([-2.0], [2.0], names=["mean"])
SMALL = MDN(components=1, hidden=8, layers=1)
FLOW = MAF(transforms=1, hidden=8, line=True)
QUICK = TrainingOptions(epochs=4)


def stack(n, *, shared=True, dim=1, seed=0, levels=2):
    """Normal noise around theta; each level above bends it and widens it, by the same noise or by its own."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for level, rows in enumerate(n):
        theta = 4 * torch.rand(rows, 1, generator=g) - 2
        u = torch.randn(rows, dim, generator=g)
        v = u if shared else torch.randn(rows, dim, generator=g)
        outputs = [theta + (0.3 + 0.3 * at) * (u if at == level else v) + 0.5 * at for at in range(levels)]
        found.append((theta, outputs[level], outputs[level - 1]) if level else (theta, outputs[0]))
    return MultilevelData.from_arrays(found)


def watch(monkeypatch):
    seen = []
    monkeypatch.setattr(translation, "minimise", lambda members, **named: seen.append(members) or minimise(
        members, **named))
    return seen


def translated(monkeypatch, data, *, options=None, strategy=None, kind=NLE, ensemble=1):
    """Rows that the network of the finest level is trained on, in standardised units, and the estimator."""
    seen = watch(monkeypatch)
    fitted = kind(PRIOR, strategy=strategy or Translation(FLOW), density=SMALL, training=options or TrainingOptions(
        epochs=60, learning_rate=5e-3), seed=0).fit(data, ensemble=ensemble, progress=False)
    return seen[-1][0].train[0], fitted


def law(rows, fitted):
    """Intercept, slope and width of outputs given theta, by least squares."""
    network = fitted.networks[0]
    x, theta = network.input_scaler.inverse(rows.input)[:, 0], network.condition_scaler.inverse(rows.fine)[:, 0]
    design = torch.stack([torch.ones_like(theta), theta], 1)
    line = torch.linalg.lstsq(design, x).solution
    return *line.tolist(), float((x - design @ line).std())


def test_runs_of_the_cheap_level_become_what_the_finest_would_have_given(monkeypatch):
    """Twenty pairs tell the map, as their own sixteen outputs could not: their mean is known to 0.6 / 4 alone."""
    rows, fitted = translated(monkeypatch, stack((600, 20)))
    assert len(rows) == 480 + 16  # a fifth is held out of each
    assert law(rows, fitted) == pytest.approx((0.5, 1.0, 0.6), abs=0.08)  # 480 rows know their mean to 0.03


def test_the_control_of_levels_that_share_nothing_still_has_the_right_law(monkeypatch):
    """Residuals then carry all of the noise."""
    intercept, slope, width = law(*translated(monkeypatch, stack((600, 60), shared=False)))
    assert intercept == pytest.approx(0.5, abs=0.25)  # three times 0.6 / sqrt(48)
    assert slope == pytest.approx(1.0, abs=0.25)
    assert width == pytest.approx(0.6, abs=0.15)


@pytest.mark.parametrize("dim", [2, 9])
def test_what_noise_explains_is_not_left_to_chance(monkeypatch, dim):
    """Cheap rows and their translations go up and down together, by as much as the levels share."""
    alike = {}
    for shared in (True, False):
        data = stack((300, 60), shared=shared, dim=dim)
        seen = watch(monkeypatch)
        NLE(PRIOR, strategy=Translation(FLOW), density=SMALL, training=TrainingOptions(epochs=40, learning_rate=5e-3),
            seed=0).fit(data, progress=False)
        before, after = seen[-2][0].train[0], seen[-1][0].train[0]
        x, y, theta = before.input[:240, 0], after.input[:240, 0], after.fine[:240]
        assert torch.equal(before.fine[:240], theta)
        design = torch.cat([torch.ones(240, 1), theta], 1)
        x, y = (part - design @ torch.linalg.lstsq(design, part).solution for part in (x, y))
        alike[shared] = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert alike[True] > 0.99
    assert alike[False] < 0.35  # 0.065 by chance; residuals of near pairs bring some of the noise back


@pytest.mark.parametrize("n", [(60, 2), (60, 3)])
def test_two_pairs_are_few_but_no_error(n):
    fitted = NLE(PRIOR, strategy=Translation(FLOW), density=SMALL, training=QUICK, seed=0).fit(stack(n), progress=False)
    assert fitted.likelihood.log_prob(torch.zeros(1, 1), torch.zeros(1, 1)).isfinite().all()


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("dim", [1, 2, 9])
@pytest.mark.parametrize("kind", [NLE, NPE])
def test_stages_of_any_stack(monkeypatch, levels, dim, kind):
    n = (60, 30, 10)[:levels]
    seen = watch(monkeypatch)
    fitted = kind(PRIOR, strategy=Translation(FLOW), density=SMALL, training=QUICK, seed=0).fit(
        stack(n, dim=dim, levels=levels), progress=False)
    assert len(seen) == levels
    kept = [round(0.8 * rows) for rows in n]
    # A level's flow knows what was translated from below, the level's runs, and the coarse halves of the pairs above.
    assert [len(members[0].train[0]) for members in seen] == [sum(kept[: at + 2]) for at in range(levels)]
    assert fitted.history.labels == (*[f"flow of level {level}" for level in range(levels - 1)], "translated")
    finest = seen[-1][0]
    own = finest.train[0].outputs[0][-kept[-1]:]
    assert own.shape == (kept[-1], dim)
    assert len(finest.validation[0]) == n[-1] - kept[-1]
    assert bool(finest.train[0].outputs[0].isfinite().all())


def test_outputs_keep_their_shape(monkeypatch):
    levels = stack((60, 20), dim=6).levels
    data = MultilevelData.from_arrays([
        (levels[0].theta, levels[0].fine.reshape(-1, 2, 3)),
        (levels[1].theta, levels[1].fine.reshape(-1, 2, 3), levels[1].coarse.reshape(-1, 2, 3))])
    rows, fitted = translated(monkeypatch, data, options=QUICK, kind=NPE)
    assert rows.fine.shape == (64, 2, 3)
    assert fitted.posterior(torch.zeros(2, 3)).sample((5,), seed=0).shape == (5, 1)


def test_fewer_levels_longer_outputs_and_other_densities_are_refused():
    one = MultilevelData.from_arrays([(torch.zeros(9, 1), torch.randn(9, 2))])
    with pytest.raises(ValueError, match="at least 2 levels to translate between"):
        NPE(PRIOR, strategy=Translation(), seed=0).fit(one, progress=False)
    with pytest.raises(ValueError, match="at most 64 numbers"):
        NPE(PRIOR, strategy=Translation(), seed=0).fit(stack((20, 10), dim=65), progress=False)
    with pytest.raises(ValueError, match="whose noise can be told"):
        Translation(SMALL)
    assert Translation("maf") == Translation(MAF())


@pytest.mark.slow
def test_a_likelihood_from_fifty_pairs_is_closer_than_what_fifty_runs_or_the_cheap_level_teach():
    """On g-and-k, whose finest level has tails that the cheap one lacks."""
    task = tasks.get("g_and_k")
    data = task.simulate((4000, 50), 9100)
    theta, x = task.test(4000, 9100)
    exact = task.likelihood(x, theta)
    lost = {}
    for name, strategy in (("translation", Translation()), ("high", SingleLevel(-1)), ("low", SingleLevel(0))):
        fitted = NLE(task.prior, strategy=strategy, density=task.density, x_transform=task.x_transform, seed=0).fit(
            data, ensemble=3, progress=False)
        lost[name] = float((exact - fitted.likelihood.log_prob(x, theta)).mean())
    assert lost["translation"] < 0.6 * lost["high"]
    assert lost["translation"] < 0.6 * lost["low"]
    assert all(math.isfinite(value) for value in lost.values())
