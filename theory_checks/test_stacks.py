from itertools import pairwise

import pytest
import torch
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from torch.distributions import Independent

import mlsbi
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.levels import LevelStack
from mlsbi.randomness import seeded
from theory_checks.densities import AffineGaussian, SharedMixture
from theory_checks.generators import Affine, MixedNoise, NoiseBlock, NormalNoise, Polynomial, Saturating, UniformNoise
from theory_checks.stacks import box_prior, gaussians, mixtures, networks, problems, random_network, stacks


def inputs(stack, n, seed=0):
    """Theta and noise in float64."""
    with seeded(seed):
        theta = stack.prior.sample((n,))
    return theta.double(), stack.draw_noise(n, torch.Generator().manual_seed(seed)).double()


def base_of(level):
    """The generator of a level without its noise block and its perturbation."""
    run = level.simulate.generator if isinstance(level.simulate, NoiseBlock) else level.simulate
    return getattr(run, "base", run)


@settings(deadline=None, max_examples=40)
@given(stack=stacks(coupled=None))
def test_every_stack_is_valid_deterministic_and_finite(stack):
    assert isinstance(stack, LevelStack)
    assert 2 <= len(stack) <= 5
    assert all(below < above for below, above in pairwise(stack.costs))
    theta, noise = inputs(stack, 200)
    assert stack.noise(3, torch.Generator()).equal(stack.noise(3, torch.Generator()))
    assert noise.shape[1] == len(stack.noise.columns)
    for level in stack.levels:
        kept = theta.clone(), noise.clone()
        x = level.simulate(theta, noise)
        assert x.ndim == 2
        assert len(x) == 200
        assert x.shape[1] in (1, 2, 3)
        assert bool(x.isfinite().all())
        assert float(x.abs().max()) < 1e3
        assert bool((x.std(0) > 0).all()), "every output depends on the noise"
        assert x.equal(level.simulate(theta, noise))
        assert x[:1].equal(level.simulate(theta[:1], noise[:1])), "a row must not depend on the others"
        assert theta.equal(kept[0])
        assert noise.equal(kept[1])
        single = level.simulate(theta.float(), noise.float())
        assert x.dtype == torch.float64
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), x, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(stack=stacks(coupled=None, levels=(1, 3)))
def test_slopes_of_every_level_match_finite_differences(stack):
    theta, noise = (part.requires_grad_() for part in inputs(stack, 2))
    for level in stack.levels:
        assert torch.autograd.gradcheck(level.simulate, (theta, noise))


def differences(stack, n=400):
    """Root mean squares of the last two levels' difference: at the same noise, and at shuffled noise."""
    theta, noise = inputs(stack, n)
    coarse, fine = (level.simulate for level in stack.levels[-2:])
    x = fine(theta, noise)
    return tuple(float((x - coarse(theta, at)).square().mean().sqrt()) for at in (noise, noise.roll(1, 0)))


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_coupled_levels_differ_little_and_others_as_much_as_at_shuffled_noise(data):
    paired, shuffled = differences(data.draw(stacks(coupled=True, gap=(1e-4, 1e-4))))
    assume(shuffled > 0.02)  # the parts of an output that depend on the noise may nearly cancel
    assert paired < 0.2 * shuffled
    paired, shuffled = differences(data.draw(stacks(coupled=False, gap=(1e-4, 1e-4))))
    assert 0.8 < paired / shuffled < 1.25


@settings(deadline=None, max_examples=20)
@given(stack=stacks(levels=(3, 5), gap=(1e-3, 1e-3)))
def test_gaps_fall_by_one_rate_and_scale_a_difference(stack):
    gaps = [level.simulate.gap for level in stack.levels[:-1]]
    assert gaps[0] == pytest.approx(1e-3)
    assert len({round(above / below, 9) for below, above in pairwise(gaps)} | {0.5}) <= 2
    assert all(below > above > 0 for below, above in pairwise(gaps))
    theta, noise = inputs(stack, 50)
    perturbation = stack.levels[0].simulate.perturbation(theta, noise)
    for (coarse, fine), by in zip(pairwise(stack.levels), pairwise([*gaps, 0.0]), strict=True):
        difference = coarse.simulate(theta, noise) - fine.simulate(theta, noise)
        torch.testing.assert_close(difference, (by[0] - by[1]) * perturbation, rtol=1e-6, atol=1e-12)


KINDS = {"affine": Affine, "polynomial": Polynomial, "saturating": Saturating}
NOISES = {"uniform": UniformNoise, "normal": NormalNoise, "mixed": MixedNoise}


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_options_are_honoured(data):
    levels, parameters, outputs, noise_dim = (data.draw(st.integers(1, 4)) for _ in range(4))
    generator, noise = data.draw(st.sampled_from(sorted(KINDS))), data.draw(st.sampled_from(sorted(NOISES)))
    prior, coupled = data.draw(st.sampled_from(["box", "normal"])), data.draw(st.booleans())
    stack = data.draw(stacks(
        levels=levels, parameters=parameters, outputs=(outputs, outputs), noise_dim=noise_dim, generators=[generator],
        noises=[noise], priors=[prior], coupled=coupled,
    ))
    assert len(stack) == levels
    assert stack.prior.event_shape == (parameters,)
    assert isinstance(stack.prior, mlsbi.BoxPrior) == (prior == "box")
    assert isinstance(stack.noise, NOISES[noise])
    assert len(stack.noise.columns) == noise_dim * (1 if coupled else levels)
    assert all(isinstance(base_of(level), KINDS[generator]) for level in stack.levels)
    assert all(isinstance(level.simulate, NoiseBlock) != coupled for level in stack.levels)
    theta, draws = inputs(stack, 3)
    assert all(level.simulate(theta, draws).shape == (3, outputs) for level in stack.levels)


def test_every_kind_is_reached():
    reached = set()

    @settings(deadline=None, max_examples=100, database=None, derandomize=True)
    @given(stack=stacks(coupled=None))
    def collect(stack):
        x = stack.levels[0].simulate(*inputs(stack, 1))
        reached.update({
            type(base_of(stack.levels[0])), type(stack.noise), type(stack.prior), type(stack.levels[-1].simulate),
            ("levels", len(stack)), ("parameters", *stack.prior.event_shape), ("outputs", x.shape[1]),
            ("laws", *sorted(set(stack.noise.columns))),
        })

    collect()
    sizes = {(name, size) for name in ("parameters", "outputs") for size in (1, 2, 3)}
    assert reached >= {
        *KINDS.values(), *NOISES.values(), mlsbi.BoxPrior, Independent, NoiseBlock, *sizes,
        *(("levels", number) for number in (2, 3, 4, 5)), ("laws", "normal", "uniform"),
    }


@pytest.mark.slow
def test_failures_shrink_to_two_small_levels():
    stack = find(
        stacks(generators=["affine", "polynomial"]), lambda stack: isinstance(stack.noise, NormalNoise),
        settings=settings(database=None, deadline=None, derandomize=True),
    )
    simplest = Affine(theta_slope=((0.0,),), noise_slope=((1.0,),), shift=(0.0,))
    assert stack.levels[1].simulate == simplest
    assert stack.levels[0].simulate.perturbation == simplest
    assert repr(stack.prior) == repr(box_prior([0.0], [0.5]))
    assert stack.costs == (1.0, 2.0)
    assert repr(stack.noise) == "NormalNoise(dim=1)"


@settings(deadline=None, max_examples=4)
@given(stack=stacks(coupled=None, levels=(2, 3)))
def test_mlsbi_simulates_them(stack):
    data = mlsbi.simulate(stack, 20, seed=0, progress=False)
    assert data.n == (20,) * len(stack)
    assert data.levels[1].coarse.shape == data.levels[0].fine.shape


def test_noise_has_the_laws_it_tells():
    draws = MixedNoise(("uniform", "normal", "uniform"))(20_000, torch.Generator().manual_seed(0))
    # Five standard errors of a mean of 20000, with deviations 12^-1/2 and 1.
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.5, 0.0, 0.5]), atol=0.035, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.tensor([1 / 12, 1.0, 1 / 12]), atol=0.05, rtol=0)
    assert float(draws[:, ::2].min()) >= 0
    assert float(draws[:, ::2].max()) <= 1
    assert float(draws.T.corrcoef().triu(1).abs().max()) < 0.04
    assert UniformNoise(2).columns == ("uniform", "uniform")
    assert NormalNoise(1).columns == ("normal",)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_problems_fit_and_are_finite(data):
    estimator = data.draw(st.sampled_from(["npe", "nle"]))
    kind = data.draw(st.sampled_from(["gaussian", "mixture", "nsf", "mdn", "maf"]))
    stack, density = data.draw(problems(estimator=estimator, density=kind, levels=2))
    theta, noise = inputs(stack, 100)
    x = stack.levels[-1].simulate(theta, noise)
    log_q = density.log_prob(theta, x) if estimator == "npe" else density.log_prob(x, theta)
    assert log_q.shape == (100,)
    assert log_q.dtype == torch.float64
    assert bool(log_q.isfinite().all())
    own = {"gaussian": AffineGaussian, "mixture": SharedMixture}.get(kind, ConditionalDensity)
    assert isinstance(density, own)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_networks_are_ready_and_come_from_their_seed(data):
    kind = data.draw(st.sampled_from(["nsf", "mdn", "maf"]))
    dim, condition_dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    density = data.draw(networks(dim, condition_dim, kind))
    assert not any(module.training for module in density.modules())
    assert {value.dtype for value in density.parameters()} == {torch.float64}

    before = torch.get_rng_state()
    one, two, start, other = (
        random_network(dim, condition_dim, kind=kind, seed=seed, scale=scale)
        for seed, scale in ((3, 0.5), (3, 0.5), (3, 0.0), (4, 0.5))
    )
    assert torch.get_rng_state().equal(before)
    generator = torch.Generator().manual_seed(0)
    y, c = (torch.randn(100, size, generator=generator).double() for size in (dim, condition_dim))
    assert one.log_prob(y, c).equal(two.log_prob(y, c))
    assert (one.log_prob(y, c) - start.log_prob(y, c)).abs().mean().item() > 0.01, "far from the start"
    assert not one.log_prob(y, c).equal(other.log_prob(y, c))


@settings(deadline=None, max_examples=10)
@given(density=st.one_of(gaussians(2, 3), mixtures(2, 3)))
def test_closed_densities_are_normalised_in_the_input(density):
    assume(bool((density.log_precision.abs() <= 0.5).all()))
    axis = torch.linspace(-25, 25, 301, dtype=torch.float64)
    y = torch.cartesian_prod(axis, axis)
    condition = torch.tensor([[0.5, -1.0, 0.3]], dtype=torch.float64).expand(len(y), 3)
    mass = density.log_prob(y, condition).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("options", "match"), [
    ({"levels": 0}, "levels as a number"), ({"levels": (3, 2)}, "levels as a number"),
    ({"parameters": (0, 1)}, "parameters as a number"), ({"outputs": 2.5}, "outputs as a number"),
    ({"noise_dim": (1, 2, 3)}, "noise_dim as a number"), ({"generators": ["cubic"]}, "generators from"),
    ({"generators": "affine"}, "generators from"), ({"noises": []}, "noises from"),
    ({"priors": ["cauchy"]}, "priors from"), ({"coupled": "yes"}, "coupled as True"),
    ({"gap": (0.0, 1.0)}, "gap as the smallest"), ({"gap": (1.0, 0.5)}, "gap as the smallest"),
    ({"gap": 0.1}, "gap as the smallest"), ({"gap": (1.0, float("inf"))}, "gap as the smallest"),
])
def test_wrong_options_of_stacks_are_refused_at_once(options, match):
    for strategy in (stacks, problems):
        with pytest.raises(ValueError, match=match):
            strategy(**options)


def test_other_wrong_options_are_refused_at_once():
    for call, match in (
        (lambda: problems(estimator="abc"), "estimator from"), (lambda: problems(density="flow"), "density from"),
        (lambda: problems(density=()), "density from"), (lambda: networks(1, 1, "flow"), "kind from"),
        (lambda: gaussians(0, 1), "dim as a number"), (lambda: mixtures(1, 0), "condition_dim as a number"),
        (lambda: networks(0, 1), "dim as a number"), (lambda: random_network(1, 1, kind="flow", seed=0), "kind from"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
