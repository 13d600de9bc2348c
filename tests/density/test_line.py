"""Flows of what linear maps leave: `line=True`."""

import pytest
import torch

from mlsbi import MAF, NSF
from mlsbi.density.linear import Shift
from mlsbi.density.registry import builder_from_config, builder_to_config

DENSITIES = [NSF(transforms=2, hidden=4, line=True), MAF(transforms=2, hidden=4, line=True)]


def rows(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    condition = torch.randn(n, 3, generator=g)
    slope = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
    return condition @ slope.T + 0.1 * torch.randn(n, 2, generator=g), condition, slope


def test_shift_takes_the_line_away_and_puts_it_back():
    x, condition, slope = rows()
    shift = Shift(2, 3)
    assert torch.equal(shift(x, condition)[0], x)  # at first
    with torch.no_grad():
        shift.weight.copy_(slope)
    left, log_det = shift(x, condition)
    assert torch.allclose(left, x - condition @ slope.T, atol=1e-5)
    assert torch.equal(log_det, torch.zeros(len(x)))
    back, log_det = shift.inverse(left, condition)
    assert torch.allclose(back, x, atol=1e-5)
    assert torch.equal(log_det, torch.zeros(len(x)))


def test_a_shift_keeps_all_digits_in_mixed_precision():
    x, condition, slope = rows(n=10)
    shift = Shift(2, 3)
    with torch.no_grad():
        shift.weight.copy_(slope)
        whole, _ = shift(x, condition)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, log_det = shift(x, condition)
    assert torch.equal(whole, mixed)
    assert log_det.dtype == torch.float32


@pytest.mark.parametrize("builder", DENSITIES, ids=str)
def test_a_density_with_a_line_is_normalised_and_learns_a_line_in_few_steps(builder):
    x, condition, _ = rows()
    scores = {}
    for line in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            density = type(builder)(**{**vars(builder), "line": line})(2, 3)
        optimiser = torch.optim.Adam(density.parameters(), lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            loss = -density.log_prob(x, condition).mean()
            loss.backward()
            optimiser.step()
        scores[line] = float(loss.detach())
    assert scores[True] < scores[False] - 0.1
    density.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = density.sample(2000, condition[:1])[:, 0]
        grid = torch.cartesian_prod(*[torch.linspace(float(side.min()) - 3, float(side.max()) + 3, 160)
                                      for side in drawn.T])
        area = torch.prod((grid[-1] - grid[0]) / 159)
        mass = density.log_prob(grid, condition[:1].expand(len(grid), -1)).exp().sum() * area
    assert float(mass) == pytest.approx(1.0, abs=0.03)  # a grid of 160 points a side


@pytest.mark.parametrize("builder", DENSITIES, ids=str)
def test_a_line_is_part_of_the_configuration(builder):
    assert builder_from_config(builder_to_config(builder)) == builder
