"""Levels whose parameters differ, on the Ornstein-Uhlenbeck process with and without its start as a parameter."""

import pytest
import torch

from mlsbi import MDN, NPE, Emulation, Level, LevelStack, SingleLevel, TrainingOptions, simulate, tasks
from mlsbi.tasks import ou

FOUR = tasks.get("ou", parameters=4)
NAMES = FOUR.prior.names
OPTIONS = TrainingOptions(learning_rate=5e-3, epochs=100)
SMALL = MDN(components=1, hidden=16)


def stack_of(low, high):
    return LevelStack(FOUR.prior, ou.noise, [Level("low", low[0], 1.0, low[1]), Level("high", high[0], 100.0, high[1])])


FEWER_LOW = stack_of((ou.stationary, NAMES[:3]), (ou.euler, None))
FEWER_HIGH = stack_of((ou.euler, None), (lambda theta, noise: 0.1 + ou.euler(theta, noise), NAMES[:3]))


def spread_of(stack, strategy, n):
    """Posterior standard deviation of X_0 over the prior's, its mean over observations of the finest level."""
    data = simulate(stack, n, seed=0, progress=False)
    npe = NPE(stack.prior, strategy=strategy, density=SMALL, training=OPTIONS, seed=0)
    npe.fit(data, 2, progress=False)
    x = simulate(stack, (1, 40), seed=1, progress=False).levels[1].fine
    draws = npe.posterior().sample_batched((500,), x, seed=0)[..., 3]
    return float(draws.std(0).mean()) / (4 / 12**0.5)


@pytest.mark.parametrize(("strategy", "most"), [
    ("multilevel", 0.87),  # whose correction by the pairs has most to undo
    ("transfer_then_multilevel", 0.8), ("transfer", 0.6), ("high", 0.6),
    (Emulation(((SMALL, SingleLevel(-1)),), rows=1000), 0.6),
], ids=str)
def test_a_parameter_that_only_the_high_level_has_is_learned_from_it(strategy, most):
    assert spread_of(FEWER_LOW, strategy, (300, 150)) < most


@pytest.mark.parametrize("strategy", ["transfer", "high"])
def test_a_parameter_that_only_the_low_level_has_keeps_its_prior(strategy):
    assert spread_of(FEWER_HIGH, strategy, (300, 150)) > 0.7


def test_the_controls_learn_the_contrary():
    """Rows of the low level alone teach the prior of what it lacks, and the value of what the high level lacks."""
    assert spread_of(FEWER_LOW, "low", (300, 150)) > 0.9
    assert spread_of(FEWER_HIGH, "low", (300, 150)) < 0.5


def test_the_task_declares_what_its_low_level_has():
    assert FOUR.stack.levels[0].parameters == ("gamma", "mu", "sigma")
    theta, noise = torch.rand(3, 4), torch.randn(3, 100)
    moved = theta + torch.tensor([0.0, 0.0, 0.0, 0.5])
    low = FOUR.stack.levels[0]
    assert torch.equal(low.run(theta, noise), low.run(moved, noise))
