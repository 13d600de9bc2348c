import pytest
import torch

from mlsbi.training.regression import GaussianProcess


def rows(n, seed=0, features=3):
    return torch.randn(2, n, features, generator=torch.Generator().manual_seed(seed))


def target(x, noise=0.0, seed=1):
    smooth = torch.stack([x[0, :, 0].sin(), 0.5 * x[1, :, 1] - 0.2])
    return smooth + noise * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(seed))


def test_it_learns_a_curve_and_a_line_from_forty_rows():
    x, new = rows(40), rows(200, 2)
    process = GaussianProcess.fit(x, target(x))
    error = (process(new).float() - target(new)).square().mean(1).sqrt()
    assert error[0] < 0.15
    assert error[1] < 0.05
    mean = (target(new) - target(x).mean(1, keepdim=True)).square().mean(1).sqrt()
    assert bool((error < mean / 4).all())  # the control: what knowing no features leaves


def test_features_that_do_not_matter_get_long_lengths():
    x = rows(60)
    lengths = GaussianProcess.fit(x, target(x)).logs[0, :3].exp()
    assert lengths[0] < 0.5 * lengths[1:].min()


def test_residuals_are_those_of_predictions_by_all_other_rows():
    x = rows(25)
    y = target(x, noise=0.3)
    process = GaussianProcess.fit(x, y)
    for left_out in (0, 7):
        rest = [row for row in range(25) if row != left_out]
        kernel = torch.linalg.inv(process.inverse)
        weights = torch.linalg.solve(kernel[:, rest][:, :, rest], y.double()[:, rest, None])
        predicted = (kernel[:, left_out, rest][:, None] @ weights)[:, 0, 0]
        assert torch.allclose(process.residuals[:, left_out], y[:, left_out].double() - predicted, atol=1e-8)


def test_residuals_tell_the_noise():
    x = rows(150)
    residuals = GaussianProcess.fit(x, target(x, noise=0.3)).residuals
    assert residuals.std(1).tolist() == pytest.approx([0.3, 0.3], rel=0.2)  # 0.3 / sqrt(2 * 150) and what is learned


def test_few_and_equal_rows_are_no_error():
    x = torch.ones(1, 2, 3)
    assert bool(GaussianProcess.fit(x, torch.zeros(1, 2))(x).isfinite().all())
