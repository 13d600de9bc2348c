import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, SimulationError, StoreError, open_store
from mlsbi.simulation.campaign import simulate_joint
from mlsbi.simulation.repeats import simulate_repeats
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import JOINT_STREAM, REPEAT_STREAM

PRIOR = BoxPrior([0.0, 0.0], [1.0, 2.0])


class Counted:
    """Counts the rows that it simulates."""

    def __init__(self, simulate):
        self.simulate, self.rows = simulate, 0

    def __call__(self, theta, noise):
        self.rows += len(theta)
        return self.simulate(theta, noise)


def low(theta, noise):
    return theta + noise


def middle(theta, noise):
    return theta + 2 * noise


def high(theta, noise):
    raise RuntimeError("the finest level is not run")


def stack_of(*simulators):
    return LevelStack(PRIOR, lambda n, generator: torch.randn(n, 2, generator=generator),
                      [Level(f"level {i}", simulate, 10.0**i) for i, simulate in enumerate(simulators)])


STACK = stack_of(low, middle, high)
THETA = RowSource(STACK, seed=0, stream=JOINT_STREAM).thetas(1100)


def test_cheap_levels_are_run_at_the_given_theta_with_shared_noise():
    found = simulate_repeats(STACK, THETA, seed=3)
    noise = RowSource(STACK, seed=3, stream=REPEAT_STREAM).rows(0, 1100)[1]
    assert found.kept.all()
    assert found.runs == (1100, 1100)
    assert len(found.outputs) == 2
    assert torch.equal(found.outputs[0], THETA + noise)
    assert torch.equal(found.outputs[1], THETA + 2 * noise)


def test_noise_is_independent_of_the_pilots():
    pilot = simulate_joint(stack_of(low, low), 1100, seed=0, stream=JOINT_STREAM)
    assert torch.equal(pilot.theta, THETA)
    again = simulate_repeats(STACK, pilot.theta, seed=0).outputs[0]
    noises = torch.stack([(pilot.outputs[0] - THETA)[:, 0], (again - THETA)[:, 0]])
    assert abs(torch.corrcoef(noises)[0, 1].item()) < 4 / 1100**0.5


def test_rows_that_fail_are_left_out_at_every_level_and_named():
    def failing(theta, noise):
        return torch.where(noise > 2, torch.inf, theta + 2 * noise)

    with pytest.warns(UserWarning, match="Left out rows that failed"):
        found = simulate_repeats(stack_of(low, failing, high), THETA, seed=0)
    noise = RowSource(STACK, seed=0, stream=REPEAT_STREAM).rows(0, 1100)[1]
    assert torch.equal(found.kept, (noise <= 2).all(1))
    assert 0 < (~found.kept).sum() < 200
    assert torch.equal(found.outputs[0], (THETA + noise)[found.kept])
    with pytest.raises(SimulationError, match="failed"):
        simulate_repeats(stack_of(low, failing, high), THETA, seed=0, options=RunOptions())
    hopeless = stack_of(lambda theta, noise: torch.full_like(theta, torch.nan), high)
    with pytest.raises(SimulationError, match="failed"):
        simulate_repeats(hopeless, THETA[:5], seed=0)


def test_a_store_keeps_them_and_longer_theta_extend_shorter(tmp_path):
    counted = Counted(low)
    stack, options = stack_of(counted, high), RunOptions(tmp_path / "store", on_failure="drop")
    few = simulate_repeats(stack, THETA[:40], seed=1, options=options)
    many = simulate_repeats(stack, THETA[:100], seed=1, options=options)
    again = simulate_repeats(stack, THETA[:100], seed=1, options=options)
    assert counted.rows == 100
    assert torch.equal(few.outputs[0], many.outputs[0][:40])
    assert torch.equal(many.outputs[0], again.outputs[0])
    assert many.runs == again.runs == (100,)
    assert torch.equal(many.outputs[0], simulate_repeats(STACK, THETA[:100], seed=1).outputs[0])
    assert "pilot's theta with other noise, seed 1: 100 rows" in str(open_store(tmp_path / "store"))


def test_a_store_refuses_the_same_seed_at_other_theta(tmp_path):
    counted = Counted(low)
    stack, options = stack_of(counted, high), RunOptions(tmp_path / "store", on_failure="drop")
    simulate_repeats(stack, THETA[:40], seed=1, options=options)
    other = torch.cat([THETA[:30], THETA[31:60]])  # as after a row that failed before and was mended
    with pytest.raises(StoreError, match="seed 1 at other theta, from row 30 on.*Pass another seed"):
        simulate_repeats(stack, other, seed=1, options=options)
    assert counted.rows == 40
    assert simulate_repeats(stack, other, seed=2, options=options).kept.all()


def test_bad_requests():
    with pytest.raises(ValueError, match="at least two levels"):
        simulate_repeats(stack_of(low), THETA, seed=0)
    with pytest.raises(ValueError, match="no further rows to redraw"):
        simulate_repeats(STACK, THETA, seed=0, options=RunOptions(on_failure="redraw"))
    with pytest.raises(ValueError, match=r"theta of shape \(n, 2\)"):
        simulate_repeats(STACK, THETA[:, :1], seed=0)
    with pytest.raises(ValueError, match="at least one theta"):
        simulate_repeats(STACK, THETA[:0], seed=0)
    with pytest.raises(ValueError, match="inside the prior's support"):
        simulate_repeats(STACK, THETA + 5, seed=0)
