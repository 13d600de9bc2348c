import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.lu import LULinear
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

from mlsbi.density import flows
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import NSF, builder_from_config, builder_to_config, resolve_builder
from mlsbi.density.splines import SolvedLULinear, SplineCoupling, rational_quadratic_spline
from mlsbi.density.standardise import Standardiser


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.floats(0.5, 8.0), st.booleans(), st.integers(0, 10**6))
def test_spline_equals_nflows(bins, tail_bound, inverse, seed):
    g = torch.Generator().manual_seed(seed)
    x = 1.5 * tail_bound * torch.randn(40, 2, generator=g, dtype=torch.float64)
    x[0, 0], x[1, 0] = tail_bound, -tail_bound  # the edges belong to the spline
    w, h = 2 * torch.randn(2, 40, 2, bins, generator=g, dtype=torch.float64)
    d = 2 * torch.randn(40, 2, bins - 1, generator=g, dtype=torch.float64)
    ours = rational_quadratic_spline(x, w, h, d, tail_bound=tail_bound, inverse=inverse)
    theirs = unconstrained_rational_quadratic_spline(x, w, h, d, inverse=inverse, tail_bound=tail_bound)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)  # float64 algebra in another order


def pair(dim, condition, dtype, monkeypatch):
    """One flow of ours and one of plain nflows with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ours = NSF(transforms=3, hidden=20)(dim, condition).to(dtype)
    monkeypatch.setattr(flows, "SplineCoupling", PiecewiseRationalQuadraticCouplingTransform)
    monkeypatch.setattr(flows, "SolvedLULinear", LULinear)
    theirs = NSF(transforms=3, hidden=20)(dim, condition).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_flow_equals_nflows_in_value_and_gradient(dim, dtype, tolerance, monkeypatch):
    ours, theirs = pair(dim, 4, dtype, monkeypatch)
    g = torch.Generator().manual_seed(0)
    x, c = 3 * torch.randn(64, dim, generator=g).to(dtype), torch.randn(64, 4, generator=g).to(dtype)
    one, other = ours.log_prob(x, c), theirs.log_prob(x, c)
    assert torch.allclose(one, other, atol=tolerance, rtol=tolerance)
    one.mean().backward()
    other.mean().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if p.numel() == 0:  # the triangles of a 1 x 1 matrix
            continue
        assert torch.allclose(p.grad, q.grad, atol=tolerance, rtol=tolerance)


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


def test_density_integrates_to_one():
    density = NSF(transforms=3)(1, 2).double()
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    value = density.log_prob(grid, torch.zeros(len(grid), 2, dtype=torch.float64)).exp()
    assert torch.trapezoid(value, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-4)  # trapezoid on kinked splines


def test_samples_follow_the_density():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        density = NSF(transforms=2)(1, 1)
        drawn = density.sample(20_000, torch.tensor([[0.5]]))
    assert drawn.shape == (20_000, 1, 1)
    grid = torch.linspace(-8, 8, 2001)[:, None]
    value = density.log_prob(grid, torch.full((2001, 1), 0.5)).exp().detach()
    mean = torch.trapezoid(value * grid[:, 0], grid[:, 0]).item()
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * drawn.std().item() / math.sqrt(20_000))


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


def test_conditional_density_is_normalised_in_its_own_units():
    scalers = Standardiser(torch.tensor([10.0]), torch.tensor([5.0])), Standardiser(torch.zeros(2), torch.ones(2))
    density = ConditionalDensity(NSF(transforms=1), *scalers)
    grid = torch.linspace(-60, 80, 4001)[:, None]
    value = density.log_prob(grid, torch.zeros(len(grid), 2)).exp().detach()
    assert torch.trapezoid(value, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


def test_embedding_must_return_vectors():
    scalers = Standardiser(torch.zeros(1), torch.ones(1)), Standardiser(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"vectors \(n, k\); two rows gave \(2, 2, 2\)"):
        ConditionalDensity(NSF(), *scalers, torch.nn.Identity())
    assert ConditionalDensity(NSF(), *scalers).embedding(torch.zeros(3, 2, 2)).shape == (3, 4)


def test_builders_by_name():
    assert resolve_builder("nsf") == NSF()
    builder = NSF(transforms=7, dropout=0.1)
    assert builder_from_config(builder_to_config(builder)) == builder
    assert builder_to_config(lambda dim, condition_dim: None) is None
    with pytest.raises(ValueError, match="Unknown density 'maf'"):
        resolve_builder("maf")
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


def test_coupling_is_the_nflows_class_underneath():
    assert issubclass(SplineCoupling, PiecewiseRationalQuadraticCouplingTransform)
