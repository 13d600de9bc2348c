"""What adjustments do to the mean of a step's gradient: closed forms, large samples, and a plain step without bias."""

import math
from types import SimpleNamespace

import pytest
import torch

from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Gradient
from theory_checks.measuring import measure
from theory_checks.stabilising import AdjustedGradient, adjusted_gradient
from theory_checks.testing import two_levels


def world(*levels):
    """Rows of each level's gradient, each `(rows, parameters)`; nothing else is looked at."""
    return SimpleNamespace(values=torch.stack([torch.as_tensor(rows, dtype=torch.float64) for rows in levels]),
                           stack=range(len(levels)))


def constant(*gradients, rows=3):
    """The same gradient in every row, so that steps have no spread."""
    return world(*([gradient] * rows for gradient in gradients))


def noisy(levels=3, rows=400, parameters=4, *, seed=0, common=0.8):
    """Levels that share noise, and whose means differ a little."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, parameters, generator=generator, dtype=torch.float64)
    return world(*(1 + 0.3 * level + common * shared + 0.4 * torch.randn(rows, parameters, generator=generator,
                                                                       dtype=torch.float64)
                   for level in range(levels)))


def spread_of(found, n, weights):
    """Root of the sum of traces of a_l f^l - a_(l-1) f^(l-1), by rows of the world, over the length of the truth."""
    total = 0.0
    for level, size in enumerate(n):
        rows = weights[level] * found.values[level]
        if level:
            rows = rows - weights[level - 1] * found.values[level - 1]
        total += float(rows.var(0, correction=0).sum()) / size
    return math.sqrt(total) / float(found.values[-1].mean(0).norm())


@pytest.mark.parametrize(("levels", "n", "weights"), [
    (1, (5,), None), (2, (20, 4), None), (3, (30, 10, 2), None), (2, (20, 4), (0.0, 1.0)), (2, (20, 4), (0.6, 1.0)),
    (3, (30, 10, 2), (0.2, 1.5, 1.0)), (2, (1, 1), None),
])  # fmt: skip
def test_a_plain_step_is_unbiased_with_the_spread_of_its_terms(levels, n, weights):
    rows = noisy(levels)
    found = adjusted_gradient(rows, n, weights=weights, repetitions=2000, seed=3)
    exact = spread_of(rows, n, weights or (1.0,) * levels)
    # 2000 sums of squares in 4 parameters that share their noise: a variance to 1 / sqrt(1000), its root to half.
    assert found.spread == pytest.approx(exact, rel=0.08)
    assert abs(found.z) < 4
    assert found.bias < 2.5 * exact / math.sqrt(2000)
    assert found.name == "plain"


def test_a_plain_steps_z_is_standard_over_seeds():
    rows = noisy(2)
    z = torch.tensor([adjusted_gradient(rows, (10, 3), repetitions=100, seed=seed).z for seed in range(100)])
    assert abs(float(z.mean())) < 0.4
    assert 0.75 < float(z.std()) < 1.3


# In order: level 0 and level 1, options, the step that all repetitions take, all by hand.
ADJUSTED = [
    ([3.0, 4.0], [0.0, 2.0], {}, [0.0, 2.0]),
    # The coarse twin (3, 4) gets length 2: (3, 4) + (0, 2) - (1.2, 1.6).
    ([3.0, 4.0], [0.0, 2.0], {"rescale": True}, [1.8, 4.4]),
    # The correction (-1, 1) is against (1, 0): (1, 0) + (-1, 1) / 2, and (-1, 1) + (1, 0).
    ([1.0, 0.0], [0.0, 1.0], {"project": True}, [0.5, 1.5]),
    ([1.0, 0.0], [2.0, 1.0], {"project": True}, [2.0, 1.0]),
    # The correction (-3, 4) of length 5 is cut to half of the length 3.
    ([3.0, 0.0], [0.0, 4.0], {"correction_limit": 0.5}, [3.0 - 0.9, 1.2]),
    ([3.0, 0.0], [3.0, 1.0], {"correction_limit": 0.5}, [3.0, 1.0]),
    # Rescaled to (1, 0), so that (-1, 1) is against (2, 0): (2, 0) + (-1, 1), and (-1, 1) + (1, 0).
    ([2.0, 0.0], [0.0, 1.0], {"rescale": True, "project": True}, [1.0, 2.0]),
    # Weights come behind rescaling: 0.5 (3, 4) + (0, 2) - 0.5 (1.2, 1.6).
    ([3.0, 4.0], [0.0, 2.0], {"rescale": True, "weights": (0.5, 1.0)}, [0.9, 3.2]),
    ([3.0, 4.0], [0.0, 2.0], {"rescale": True, "weights": (0.0, 1.0)}, [0.0, 2.0]),
]


@pytest.mark.parametrize(("coarse", "fine", "options", "step"), ADJUSTED)
def test_the_bias_of_a_step_without_noise_is_by_hand(coarse, fine, options, step):
    found = adjusted_gradient(constant(coarse, fine), (2, 2), repetitions=10, **options)
    assert found.bias == pytest.approx(math.dist(step, fine) / math.hypot(*fine), abs=1e-12)
    assert found.spread == pytest.approx(0, abs=1e-12)


def test_rescaling_one_positive_parameter_leaves_level_0():
    """Coarse times |fine| / |coarse| is fine: the correction is 0, and the mean step that of level 0, 40% of the truth.

    Spread and z are those of level 0's mean.
    """
    generator = torch.Generator().manual_seed(1)
    base = 1 + 0.3 * (torch.rand(500, 1, generator=generator, dtype=torch.float64) - 0.5)
    base = base / base.mean()
    rows = world(base, 2.5 * base)
    found = adjusted_gradient(rows, (8, 2), rescale=True, repetitions=4000)
    spread = float(base.std(correction=0)) / math.sqrt(8) / 2.5
    assert found.bias == pytest.approx(0.6, rel=0.005)
    assert found.spread == pytest.approx(spread, rel=0.05)
    assert found.z == pytest.approx(0.6 / spread * math.sqrt(2000), rel=0.1)
    assert adjusted_gradient(rows, (8, 2), repetitions=4000).bias < 0.01


def test_the_bias_of_rescaling_is_that_of_a_large_sample():
    """Against the mean step by another program, vectorised, over 200 times as many steps."""
    rows, n, repetitions = noisy(2), (6, 2), 1000
    generator = torch.Generator().manual_seed(99)
    steps = 200 * repetitions
    base = rows.values[0, torch.randint(0, 400, (steps, n[0]), generator=generator)].mean(1)
    pair = torch.randint(0, 400, (steps, n[1]), generator=generator)
    fine, coarse = rows.values[1, pair].mean(1), rows.values[0, pair].mean(1)
    step = base + fine - coarse * fine.norm(dim=1, keepdim=True) / coarse.norm(dim=1, keepdim=True)
    true = rows.values[1].mean(0)
    bias = float((step.mean(0) - true).norm() / true.norm())
    spread = float(step.var(0).sum()) ** 0.5 / float(true.norm())
    found = [adjusted_gradient(rows, n, rescale=True, repetitions=repetitions, seed=seed) for seed in range(4)]
    for each in found:
        assert abs(each.bias - bias) < 4 * spread / math.sqrt(repetitions)
        assert each.spread == pytest.approx(spread, rel=0.1)
        assert each.z > 4
    assert bias > 0.1  # far above what chance gives


def test_more_rows_shrink_the_spread_and_not_the_bias():
    rows = noisy(2)
    few, many = (adjusted_gradient(rows, n, rescale=True, seed=1) for n in ((4, 4), (64, 64)))
    assert many.spread == pytest.approx(few.spread / 4, rel=0.15)
    assert many.bias == pytest.approx(few.bias, rel=0.5)


def test_chance_is_taken_off_the_bias():
    """Without it the bias of a plain step would be spread / sqrt(repetitions) in square mean; half are below that."""
    rows = noisy(2)
    found = [adjusted_gradient(rows, (2, 1), repetitions=50, seed=seed) for seed in range(60)]
    chance = found[0].spread / math.sqrt(50)
    squares = torch.tensor([each.bias for each in found]).square().mean()
    assert float(squares) < 0.7 * chance**2
    assert sum(each.bias == 0 for each in found) > 15


def test_the_truth_is_the_finest_levels_mean():
    """So weights that end in other than 1 are off by their difference, whatever a_0 is."""
    rows = noisy(2)
    found = adjusted_gradient(rows, (50, 50), weights=(0.3, 1.2))
    assert found.bias == pytest.approx(0.2, rel=0.1)


def test_the_seed_decides_and_the_names_tell():
    rows = noisy(2)
    options = {"rescale": True, "project": True, "correction_limit": 1.0, "repetitions": 20}
    one, again, other = (adjusted_gradient(rows, (4, 2), seed=seed, **options) for seed in (1, 1, 2))
    assert one == again != other
    assert one.name == "rescale + project + correction_limit"
    names = [adjusted_gradient(rows, (4, 2), repetitions=4, **{way: value}).name
             for way, value in (("rescale", True), ("project", True), ("correction_limit", 2.0))]
    assert names == ["rescale", "project", "correction_limit"]
    assert str(AdjustedGradient("rescale", 0.123, 5.64, 0.5)) == (
        "rescale: bias 12.3% of the gradient (5.6 standard errors), spread 50%")  # fmt: skip


def test_gradients_of_a_stack():
    """The same from simulators: a plain step without bias, a rescaled one with."""
    density = AffineGaussian([[0.4]], [0.2], [0.1])
    rows = measure(two_levels(0.5), Gradient(density, "npe"), rows=500, noise_constant=1.0)
    plain, rescaled = (adjusted_gradient(rows, (20, 10), rescale=rescale, repetitions=2000)
                       for rescale in (False, True))
    assert abs(plain.z) < 4
    assert plain.spread == pytest.approx(spread_of(rows, (20, 10), (1.0, 1.0)), rel=0.08)
    assert rescaled.z > 4
    assert rescaled.bias > 5 * plain.bias


@pytest.mark.parametrize("n", [(), (5,), (5, 5, 5), (5, 0), (-1, 5), (5, 2.5)])
def test_wrong_sizes_are_refused(n):
    with pytest.raises(ValueError, match="Expected 2 whole numbers of at least 1 as n, one per level; got"):
        adjusted_gradient(noisy(2), n, repetitions=4)
