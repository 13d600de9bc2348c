import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.func import functional_call, grad, jacrev, vmap

from theory_checks.densities import AffineGaussian, SharedMixture
from theory_checks.stacks import gaussians, mixtures

FAR = 1e8  # where a gradient's constant part is a fraction of 1e-8
ROUNDING = 1e-9  # relative, of float64 gradients of sums of squares
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


def points(dim, n=400, seed=0):
    """Vectors in random directions, of lengths from 1e-2 to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    direction = nn.functional.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
    return direction * 10 ** (6 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 2)


def sizes_of(density):
    return density.slope.shape


def log_q(density):
    """The log density of one v = (input, condition)."""
    dim = len(density.slope)
    return lambda v: density.log_prob(v[None, :dim], v[None, dim:])[0]


def hessian(f):
    return jacrev(grad(f))


def allowance(v, dim):
    """What (A3) multiplies by the growth constant."""
    return v[..., :dim].norm(dim=-1) + v[..., dim:].norm(dim=-1) + 1


class Call(nn.Module):
    def __init__(self, density):
        super().__init__()
        self.density = density

    def forward(self, v):
        return log_q(self.density)(v)


def parameter_slopes(density, name):
    """v -> d/dv of d log q / d parameter, of shape (*parameter.shape, len(v))."""
    fixed = {key: value.detach() for key, value in Call(density).named_parameters()}

    def in_parameter(v):
        return grad(lambda value: functional_call(Call(density), {**fixed, f"density.{name}": value}, (v,)))(
            fixed[f"density.{name}"]
        )

    return jacrev(in_parameter)


@settings(deadline=None, max_examples=25)
@given(density=SIZES.flatmap(lambda sizes: st.one_of(gaussians(*sizes), mixtures(*sizes))))
def test_constants_bound_gradients_their_differences_and_hessians(density):
    dim, condition_dim = sizes_of(density)
    constants = density.constants
    v = points(dim + condition_dim)
    # Components of a mixture meet near the origin of what the Gaussians see: look there too.
    v = torch.cat([v, points(dim + condition_dim, seed=1).clamp(-3, 3)])
    slopes = vmap(grad(log_q(density)))(v).detach()
    assert bool((slopes.norm(dim=1) <= constants.growth * allowance(v, dim) * (1 + ROUNDING)).all())

    near = v + 1e-2 * v.norm(dim=1, keepdim=True) * points(dim + condition_dim, len(v), seed=2).sign()
    for other, of_other in ((near, vmap(grad(log_q(density)))(near).detach()), (v.roll(1, 0), slopes.roll(1, 0))):
        rounding = 1e-12 * torch.maximum(slopes.norm(dim=1), of_other.norm(dim=1))
        change = (slopes - of_other).norm(dim=1) - rounding
        assert bool((change <= constants.lipschitz * (v - other).norm(dim=1) * (1 + ROUNDING)).all())

    bend = torch.linalg.matrix_norm(vmap(hessian(log_q(density)))(v[400:]).detach(), 2)
    assert float(bend.max()) <= constants.lipschitz * (1 + ROUNDING)


def attained(affine, v0, dim):
    """The smallest constants of a map v -> affine(v), approached at 0 or far out, along singular vectors."""
    matrix = jacrev(affine)(v0).detach()
    candidates = [torch.zeros_like(v0)]
    for block in (slice(0, dim), slice(dim, None)):
        direction = torch.zeros_like(v0)
        direction[block] = torch.linalg.svd(matrix[:, block]).Vh[0]
        candidates += [FAR * direction]
    growth = max((affine(v).norm() / allowance(v, dim)).item() for v in candidates)
    steepest = torch.linalg.svd(matrix).Vh[0]
    return growth, (affine(v0 + steepest) - affine(v0)).norm().item()


@settings(deadline=None, max_examples=25)
@given(density=SIZES.flatmap(lambda sizes: gaussians(*sizes)))
def test_a_gaussians_constants_are_attained(density):
    dim, condition_dim = sizes_of(density)
    slope = grad(log_q(density))
    growth, lipschitz = attained(slope, torch.zeros(dim + condition_dim, dtype=torch.float64), dim)
    constants = density.constants
    assert constants.growth == pytest.approx(growth, rel=1e-6)
    assert constants.lipschitz == pytest.approx(lipschitz, rel=1e-6)
    assert growth > constants.growth / 2, "half of it must be violated"
    assert lipschitz > constants.lipschitz / 2, "half of it must be violated"


@settings(deadline=None, max_examples=15)
@given(density=SIZES.flatmap(lambda sizes: gaussians(*sizes)))
def test_gradient_constants_bound_and_are_attained(density):
    dim, condition_dim = sizes_of(density)
    v, v0 = points(dim + condition_dim, 60), torch.zeros(dim + condition_dim, dtype=torch.float64)
    known = density.gradient_constants
    assert set(known) == {name for name, _ in density.named_parameters()}
    for name, parameter in density.named_parameters():
        constants, slopes = known[name], parameter_slopes(density, name)
        assert constants.growth.shape == constants.lipschitz.shape == parameter.shape
        found = vmap(slopes)(v).detach().reshape(len(v), parameter.numel(), -1)
        for index, (growth, lipschitz) in enumerate(
            zip(constants.growth.flatten().tolist(), constants.lipschitz.flatten().tolist(), strict=True)
        ):
            own = found[:, index]
            assert bool((own.norm(dim=1) <= growth * allowance(v, dim) * (1 + ROUNDING)).all())
            change = (own - own.roll(1, 0)).norm(dim=1) - 1e-12 * own.norm(dim=1).max()
            assert bool((change <= lipschitz * (v - v.roll(1, 0)).norm(dim=1) * (1 + ROUNDING)).all())
            best, steepest = attained(
                lambda at, index=index, slopes=slopes: slopes(at).flatten(0, -2)[index], v0, dim
            )
            assert growth == pytest.approx(best, rel=1e-6)
            assert lipschitz == pytest.approx(steepest, rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(density=SIZES.flatmap(lambda sizes: mixtures(*sizes)))
def test_mixture_agrees_with_torch_and_with_one_component_is_a_gaussian(density):
    dim, condition_dim = sizes_of(density)
    generator = torch.Generator().manual_seed(0)
    y, c = (torch.randn(7, size, generator=generator, dtype=torch.float64) for size in (dim, condition_dim))
    logits = (c @ density.weight.T + density.bias).tanh() @ density.readout.T
    parts = Independent(
        Normal((c @ density.slope.T)[:, None] + density.centres, (-density.log_precision).exp().expand(7, 1, -1)), 1
    )
    torch.testing.assert_close(density.log_prob(y, c), MixtureSameFamily(Categorical(logits=logits), parts).log_prob(y))

    single = SharedMixture(density.slope, density.centres[:1], density.log_precision, density.readout[:1],
                           density.weight, density.bias)
    gaussian = AffineGaussian(density.slope, density.centres[0], density.log_precision)
    assert single.constants.growth == pytest.approx(gaussian.constants.growth, rel=1e-12)
    assert single.constants.lipschitz == pytest.approx(gaussian.constants.lipschitz, rel=1e-12)
    torch.testing.assert_close(single.log_prob(y, c), gaussian.log_prob(y, c))


@settings(deadline=None, max_examples=20)
@given(density=SIZES.flatmap(lambda sizes: gaussians(*sizes)))
def test_gaussian_agrees_with_torch(density):
    dim, condition_dim = sizes_of(density)
    generator = torch.Generator().manual_seed(0)
    y, c = (torch.randn(7, size, generator=generator, dtype=torch.float64) for size in (dim, condition_dim))
    normal = Independent(Normal(c @ density.slope.T + density.shift, (-density.log_precision).exp()), 1)
    torch.testing.assert_close(density.log_prob(y, c), normal.log_prob(y))
    assert density.log_prob(y.float(), c.float()).dtype == torch.float64


def test_mixture_constants_are_close_where_it_is_simple():
    far = 20.0  # centres at -20 and 20, equally likely: at 0 the second derivative is 20^2 - 1
    density = SharedMixture([[0.0]], [[-far], [far]], [0.0], [[0.0], [0.0]], [[1.0]], [0.0])
    middle = hessian(log_q(density))(torch.zeros(2, dtype=torch.float64))[0, 0].item()
    assert middle == pytest.approx(far**2 - 1)
    assert density.constants.lipschitz == pytest.approx(far**2)
    assert density.constants.growth == pytest.approx(far)


def aligned(slope, centre, log_precision, pull, steep, likelier):
    """Components at -centre and centre, whose weights' gradients differ by 2 pull steep at 0, in the pull's direction.

    A hidden unit that is 1 everywhere makes the first component likelier by a factor exp(2 likelier).
    """
    return SharedMixture([[slope]], [[-centre], [centre]], [log_precision], [[pull, likelier], [-pull, -likelier]],
                         [[steep], [0.0]], [0.0, 20.0])


@pytest.mark.parametrize(("density", "v"), [
    # The posterior's covariance, of pull and weights together: p = 1/2 and pi = 0.
    pytest.param(aligned(10.0, 2.0, 0.0, 20.0, 1.0, 8.0), [4.0, 0.0], id="posterior"),
    # S and the prior's covariance: p = 1, from far away, and pi = 1/2.
    pytest.param(aligned(20.0, 0.01, 0.0, 20.0, 1.0, 0.0), [2000.0, 0.0], id="prior"),
    # The curvature of the weights: p = 1 and pi = 0, where |tanh''| is largest.
    pytest.param(aligned(0.0, 0.5, 0.0, 0.05, 100.0, 8.0), [60.0, math.atanh(3**-0.5) / 100], id="bend"),
])
def test_every_term_of_a_mixtures_lipschitz_constant_is_needed(density, v):
    found = torch.linalg.matrix_norm(hessian(log_q(density))(torch.tensor(v, dtype=torch.float64)), 2).item()
    assert 0.9 < found / density.constants.lipschitz <= 1


def test_every_term_of_a_mixtures_growth_is_needed():
    density = aligned(10.0, 1e5, math.log(0.1), 5000.0, 1.0, 8.0)  # pull and weights both 1e4: p = 1 and pi = 0
    v = torch.tensor([0.02, 0.0], dtype=torch.float64)
    found = (grad(log_q(density))(v).norm() / allowance(v, 1)).item()
    assert 0.9 < found / density.constants.growth <= 1


def test_components_of_different_precisions_have_no_global_constant():
    def log_mixture(v):
        logs = torch.stack([-0.5 * (4 * v[0] ** 2 + v[1] ** 2), -0.5 * (v[0] ** 2 + 4 * v[1] ** 2)])
        return logs.logsumexp(0)

    bends = [float(torch.linalg.matrix_norm(hessian(log_mixture)(radius * torch.ones(2).double()), 2))
             for radius in (10.0, 100.0, 1000.0)]
    assert bends[1] / bends[0] == pytest.approx(100, rel=0.1)
    assert bends[2] / bends[1] == pytest.approx(100, rel=0.1)


@settings(deadline=None, max_examples=15)
@given(density=SIZES.flatmap(lambda sizes: gaussians(*sizes)))
def test_fit_recovers_the_coefficients(density):
    dim, condition_dim = sizes_of(density)
    generator = torch.Generator().manual_seed(0)
    c = 5 + 3 * torch.randn(20_000, condition_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(20_000, dim, generator=generator, dtype=torch.float64)
    y = c @ density.slope.T + density.shift + noise / density.log_precision.exp()
    fitted = AffineGaussian.fit(y, c)
    sd = (-density.log_precision).exp()
    # Five standard errors: of a slope sd / (3 sqrt n), of a shift sd sqrt(1 + condition_dim (5 / 3)^2) / sqrt n.
    error = 5 * sd / math.sqrt(20_000)
    ridge = 1e-5 * (1 + density.slope.abs().sum())
    assert bool(((fitted.slope - density.slope).abs() <= error[:, None] / 3 + ridge).all())
    of_shift = error * math.sqrt(1 + condition_dim * 25 / 9)
    assert bool(((fitted.shift - density.shift).abs() <= of_shift + 5 * ridge).all())
    assert bool(((fitted.log_precision - density.log_precision).abs() <= 5 / math.sqrt(2 * 20_000) + 1e-3).all())


def test_fit_of_collinear_and_constant_conditions_stays_small():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    y = 3 * one + 0.1 * torch.randn(500, 1, generator=generator, dtype=torch.float64)
    c = torch.cat([one, one, torch.full_like(one, 1e3 + 0.1)], 1)
    for ridge in (1e-12, 1e-6):
        fitted = AffineGaussian.fit(y, c, ridge=ridge)
        torch.testing.assert_close(fitted.slope[0].detach(), torch.tensor([1.5, 1.5, 0.0]).double(), atol=0.02, rtol=0)
        assert fitted.log_precision.item() == pytest.approx(math.log(10), abs=0.1)
    exact = AffineGaussian.fit(torch.cat([3 * one, torch.full_like(one, 7.0)], 1), one, ridge=1e-6)
    expected = torch.stack([3 * one.std(correction=0), torch.tensor(1.0).double()]) * 1e-3
    torch.testing.assert_close((-exact.log_precision).exp().detach(), expected, rtol=1e-3, atol=0)


def test_fit_reads_any_rows_and_refuses_what_it_cannot_fit():
    y, c = torch.rand(9, 2), torch.rand(9, 2, 2)
    assert AffineGaussian.fit(y, c).slope.shape == (2, 4)
    for arguments, match in (
        ((y[:, 0], c), "as many rows"), ((y, c[:8]), "as many rows"), ((y[:0], c[:0]), "at least one"),
        ((y / 0, c), "finite rows"),
    ):
        with pytest.raises(ValueError, match=match):
            AffineGaussian.fit(*arguments)
    with pytest.raises(ValueError, match="ridge of at least"):
        AffineGaussian.fit(y, c, ridge=0.0)


def test_shapes_are_checked_and_parameters_are_their_own():
    with pytest.raises(ValueError, match="Expected slope"):
        AffineGaussian([[1.0, 2.0]], [0.0, 0.0], [0.0])
    with pytest.raises(ValueError, match="Expected slope"):
        AffineGaussian([1.0], [0.0], [0.0])
    with pytest.raises(ValueError, match="Expected slope"):
        SharedMixture([[1.0]], [[0.0], [1.0]], [0.0], [[0.0]], [[1.0]], [0.0])
    slope = torch.ones(1, 1, dtype=torch.float64)
    density = AffineGaussian(slope, [0.0], [0.0])
    slope.zero_()
    assert density.slope.item() == 1
    assert repr(density) == "AffineGaussian([[1.0]], [0.0], [0.0])"
