import numpy as np
import pytest

from mlsbi.diagnostics import fom, mse, nrmse

B, N = 400, 500


def gaussian_case(seed=0):
    """Truth and draws of the exact posterior N(x / 2, I / 2) of theta ~ N(0, I), x ~ N(theta, I)."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((B, 2))
    x = theta + rng.standard_normal((B, 2))
    return theta, x / 2 + np.sqrt(0.5) * rng.standard_normal((N, B, 2))


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_fom_of_gaussians(dim):
    rng = np.random.default_rng(0)
    root = np.tril(rng.uniform(0.5, 1.0, (dim, dim)))
    samples = rng.standard_normal((N, B, dim)) @ root.T + 7.0
    low, high = np.full(dim, -10.0), np.linspace(10.0, 30.0, dim)
    exact = np.linalg.det(root @ root.T / np.outer(high - low, high - low)) ** (-1 / dim)
    found = fom(samples, low, high)
    too_large = 1 + (dim + 1) / (2 * N) + 1 / (N * dim)
    assert found.mean == pytest.approx(exact * too_large, abs=4 * found.standard_error)
    assert found.n == B
    narrow = fom(samples / 2, low, high)
    assert narrow.mean == pytest.approx(4 * found.mean, rel=1e-10)


def test_fom_does_not_depend_on_units():
    _, samples = gaussian_case()
    low, high, unit = np.array([-5.0, -6.0]), np.array([5.0, 4.0]), np.array([1e-9, 1e6])
    assert fom(samples * unit, low * unit, high * unit).mean == pytest.approx(fom(samples, low, high).mean, rel=1e-10)


def test_errors_of_an_exact_posterior():
    theta, samples = gaussian_case()
    exact = 0.5 * (1 + 1 / N)  # the posterior variance, and that of the mean of N draws
    error = 4 * exact * np.sqrt(2 / B)
    assert mse(theta, samples) == pytest.approx(exact, abs=error)
    assert (mse(theta, samples + 1.0) > exact + error).all()
    assert nrmse(theta, samples, scale=[1.0, 2.0]) == pytest.approx(np.sqrt(mse(theta, samples)) / [1.0, 2.0])
    assert nrmse(theta, samples) == pytest.approx(np.sqrt(mse(theta, samples)) / np.ptp(theta, axis=0))


def test_bad_inputs():
    theta, samples = gaussian_case()
    box = np.zeros(2), np.ones(2)
    with pytest.raises(ValueError, match=r"samples of shape \(n, B, D\)"):
        fom(samples[0], *box)
    with pytest.raises(ValueError, match=r"low of shape \(2,\)"):
        fom(samples, np.zeros(3), np.ones(2))
    with pytest.raises(ValueError, match="low < high"):
        fom(samples, np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="more draws than parameters; got n=2 and D=2"):
        fom(samples[:2], *box)
    with pytest.raises(ValueError, match="vary in every parameter; at 1 observations"):
        fom(np.where(np.arange(B)[:, None] == 3, 0.1, samples), *box)
    with pytest.raises(ValueError, match="not singular; at 400 observations"):
        fom(samples[..., :1].repeat(2, -1), *box)
    for score in (mse, nrmse):
        with pytest.raises(ValueError, match=r"\(B, D\) and \(n, B, D\)"):
            score(theta[:5], samples)
        with pytest.raises(ValueError, match="finite theta; got 1 NaN"):
            score(np.where(np.arange(2 * B).reshape(B, 2) == 1, np.nan, theta), samples)
    with pytest.raises(ValueError, match="positive scale"):
        nrmse(theta, samples, scale=[1.0, 0.0])
    with pytest.raises(ValueError, match="Pass scale"):
        nrmse(theta[:1], samples[:, :1])
