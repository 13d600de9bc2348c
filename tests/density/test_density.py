import math

import pytest
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.lu import LULinear

from mlsbi.density.autoregressive import AffineAutoregressive
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.linear import SolvedLULinear
from mlsbi.density.mixture_density import MDN
from mlsbi.density.registry import builder_from_config, builder_to_config, resolve_builder
from mlsbi.density.splines import SplineCoupling
from mlsbi.density.standardise import Standardiser
from mlsbi.randomness import seeded


@pytest.mark.parametrize("dim", [1, 3])
def test_forward_and_inverse_undo_each_other(dim):
    flow = NSF(transforms=3)(dim, 2).double().flow
    x, c = torch.randn(100, dim, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    noise, down = flow._transform(x, c)
    back, up = flow._transform.inverse(noise, c)
    assert torch.allclose(back, x, atol=1e-6)  # a quadratic equation per spline
    assert torch.allclose(down, -up, atol=1e-6)


def test_transforms_are_usable_under_vmap():
    flow = NSF(transforms=2, hidden=8)(2, 3)
    x, c = torch.randn(4, 6, 2), torch.randn(4, 6, 3)
    mapped = torch.func.vmap(flow.log_prob)(x, c)
    assert torch.allclose(mapped, torch.stack([flow.log_prob(a, b) for a, b in zip(x, c, strict=True)]), atol=1e-5)


BUILDERS = [NSF(transforms=3, hidden=16), MAF(transforms=3, hidden=16), MDN(components=3, hidden=16)]


def stirred(builder, dim, condition_dim):
    """A density in float64 whose parameters are far from their start, where many are zero."""
    with seeded(0):
        density = builder(dim, condition_dim).double()
        with torch.no_grad():
            for parameter in density.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return density


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: type(builder).__name__)
def test_density_integrates_to_one(builder):
    density = stirred(builder, 1, 2)
    grid = torch.linspace(-200, 200, 80_001, dtype=torch.float64)[:, None]
    for condition in (0.0, 1.5):
        value = density.log_prob(grid, torch.full((len(grid), 2), condition, dtype=torch.float64)).exp()
        assert torch.trapezoid(value, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)  # trapezoid on kinked splines


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: type(builder).__name__)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_samples_follow_the_density(builder, dim):
    """Importance weights q'/q of a reference q' have mean one under q, and give the reference's mean."""
    density = stirred(builder, dim, 2)
    condition = torch.tensor([[0.5, -0.5], [-1.0, 0.3]], dtype=torch.float64)
    with torch.no_grad(), seeded(1):
        drawn = density.sample(20_000, condition)
        assert drawn.shape == (20_000, 2, dim)
        for index in range(2):
            x = drawn[:, index]
            near = x[(x - x.median(0).values).abs().sum(1).argsort()[:2000]]  # narrower: weights have a variance
            inner = torch.distributions.Normal(near.mean(0), near.std(0))
            log_q = density.log_prob(x, condition[index].expand(len(x), -1))
            weight = (inner.log_prob(x).sum(1) - log_q).exp()
            error = weight.std() / math.sqrt(len(x))
            assert weight.mean().item() == pytest.approx(1.0, abs=4 * error.item() + 1e-3)
            assert error < 0.1


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: type(builder).__name__)
def test_every_parameter_has_a_gradient_and_conditions_matter(builder):
    density = stirred(builder, 3, 2)
    x, c = (torch.randn(50, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (3, 2))
    density.log_prob(x, c).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in density.parameters())
    assert not torch.allclose(density.log_prob(x, c), density.log_prob(x, c + 1))


@pytest.mark.parametrize("builder", [*BUILDERS, MAF(transforms=1)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_every_feature_sees_the_condition(builder, dim):
    """In a masked network the first feature does not, unless something is done about it."""
    if isinstance(builder, NSF) and dim == 1:
        builder = NSF(transforms=1)
    density = stirred(builder, dim, 2)
    with torch.no_grad():
        drawn = []
        for condition in (-1.0, 1.0):
            with seeded(1):
                drawn.append(density.sample(400, torch.full((1, 2), condition, dtype=torch.float64))[:, 0])
    assert ((drawn[0] - drawn[1]).abs().mean(0) > 0.01).all()


def test_maf_is_autoregressive_and_mdn_is_a_mixture():
    """The density of the last feature given the others integrates to one at any value of the others."""
    grid = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    for builder in (MAF(transforms=1, hidden=8), MDN(components=2)):
        density = stirred(builder, 2, 1)
        points = torch.cartesian_prod(torch.linspace(-40, 40, 401, dtype=torch.float64), grid[::20])
        value = density.log_prob(points, torch.zeros(len(points), 1, dtype=torch.float64)).exp().sum() * 0.2**2
        assert value.item() == pytest.approx(1.0, abs=0.01)


def test_lu_inverse_and_gradients():
    layer = SolvedLULinear(3, identity_init=False)
    x = torch.randn(7, 3)
    y, up = layer(x)
    back, down = layer.inverse(y)
    assert torch.allclose(back, x, atol=1e-5)
    assert torch.allclose(up, -down)


def test_standardiser_is_one_for_all_levels_and_keeps_constants():
    low, high = torch.zeros(30, 2), torch.full((10, 2), 4.0)
    low[:, 1] = high[:, 1] = 7.0
    scaler = Standardiser.fit([low, high])
    assert scaler.mean.tolist() == [1.0, 7.0]
    assert scaler.scale[0].item() == pytest.approx(math.sqrt(3.0))
    assert scaler.scale[1].item() == 1.0
    assert torch.allclose(scaler.inverse(scaler(high)), high)
    assert set(scaler.state_dict()) == {"mean", "scale"}


@pytest.mark.parametrize("transform", ["none", "asinh"])
def test_conditional_density_is_normalised_in_its_own_units(transform):
    rows = 10 + 5 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    density = ConditionalDensity(NSF(transforms=1), Standardiser.fit([rows], transform=transform),
                                 Standardiser(torch.zeros(2), torch.ones(2)))
    grid = 10 + 60 * torch.linspace(-3, 3, 20_001)[:, None] ** 5
    value = density.log_prob(grid, torch.zeros(len(grid), 2)).exp().detach()
    assert torch.trapezoid(value, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


def test_asinh_tames_heavy_tails_and_is_undone():
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) ** 5
    plain, bent = Standardiser.fit([x]), Standardiser.fit([x], transform="asinh")
    assert plain(x).abs().max() > 15
    assert bent(x).abs().max() < 5
    assert torch.allclose(bent.inverse(bent(x)), x, rtol=1e-4, atol=1e-4)  # float32 through asinh and sinh
    # The same in other units, unlike asinh of the numbers themselves.
    assert torch.allclose(Standardiser.fit([1000 * x + 7], transform="asinh")(1000 * x + 7), bent(x), atol=2e-3)


def test_log_det_is_that_of_the_map():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for transform in ("none", "asinh"):
        scaler = Standardiser.fit([3 * x + 1], transform=transform)
        jacobians = torch.func.vmap(torch.func.jacrev(lambda row, s=scaler: s(row[None])[0]))(x)
        expected = torch.linalg.slogdet(jacobians.double())[1]
        assert torch.allclose(scaler.log_abs_det(x).expand(5).double(), expected, atol=1e-5)


def test_shared_axes_have_one_scale():
    x = torch.arange(4.0) * 10 + torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    for transform in ("none", "asinh"):
        scaler = Standardiser.fit([x], transform=transform, shared=(0,))
        assert scaler.mean.unique().numel() == scaler.scale.unique().numel() == 1
        assert torch.equal(scaler(x.flip(1)), scaler(x).flip(1))
    assert Standardiser.fit([x], shared=(0,)).scale[0].item() == pytest.approx(x.std(correction=0).item(), rel=1e-5)


def test_embedding_must_return_vectors():
    scalers = Standardiser(torch.zeros(1), torch.ones(1)), Standardiser(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"vectors \(n, k\), k the same.*gave \(2, 2, 2\)"):
        ConditionalDensity(NSF(), *scalers, torch.nn.Identity())
    assert ConditionalDensity(NSF(), *scalers).embedding(torch.zeros(3, 2, 2)).shape == (3, 4)


def test_builders_by_name():
    assert resolve_builder("nsf") == NSF()
    builder = NSF(transforms=7, dropout=0.1)
    assert builder_from_config(builder_to_config(builder)) == builder
    assert builder_to_config(lambda dim, condition_dim: None) is None
    for known, kind in (("nsf", NSF), ("maf", MAF), ("mdn", MDN)):
        assert builder_from_config(builder_to_config(resolve_builder(known))) == kind()
    with pytest.raises(ValueError, match="Unknown density 'made'"):
        resolve_builder("made")
    with pytest.raises(TypeError, match="builder"):
        resolve_builder(3)


@pytest.mark.parametrize("options", [{"transforms": 0}, {"bins": 1}, {"tail_bound": 0.0}, {"dropout": 1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        NSF(**options)


def test_one_coupling_cannot_model_two_features():
    assert NSF(transforms=1)(1, 3)
    with pytest.raises(ValueError, match="at least 2 transforms for 2 features"):
        NSF(transforms=1)(2, 3)


def test_transforms_are_the_nflows_classes_underneath():
    assert issubclass(SplineCoupling, PiecewiseRationalQuadraticCouplingTransform)
    assert issubclass(SolvedLULinear, LULinear)
    assert issubclass(AffineAutoregressive, MaskedAffineAutoregressiveTransform)


@pytest.mark.parametrize("builder", [*BUILDERS[:2], NSF(transforms=2, line=True)], ids=str)
@pytest.mark.parametrize("dim", [1, 3])
def test_noise_is_what_draws_were_made_from(builder, dim):
    density = stirred(builder, dim, 2)
    condition = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with seeded(3), torch.no_grad():
        draws = density.sample(4, condition)
    with seeded(3):
        noise = torch.randn(200, dim, dtype=torch.float64).reshape(50, 4, dim).transpose(0, 1)
    found = density.noise(draws.reshape(200, dim), condition.repeat(4, 1)).reshape(4, 50, dim)
    assert torch.allclose(found, noise, atol=1e-6)  # a quadratic equation per spline
