from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, MultilevelData, SimulationError, per_sample, simulate
from mlsbi.simulation.campaign import simulate_joint, simulate_level
from mlsbi.simulation.seeding import BLOCK, RowSource
from mlsbi.store.records import TEST_STREAM

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])


def noise(n, generator):
    return {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)}


def low(theta, noise):
    return theta[:, :1] + noise["u"]


def high(theta, noise):
    return theta[:, :1] + noise["u"] + 0.1 * noise["v"][:, None] * theta[:, 1:]


def make(low=low, high=high, noise=noise, costs=(1, 10)):
    return LevelStack(PRIOR, noise, [Level("low", low, costs[0]), Level("high", high, costs[1])])


def equal(one: MultilevelData, other: MultilevelData) -> bool:
    return all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine)
        and (a.coarse is None) == (b.coarse is None) and (a.coarse is None or torch.equal(a.coarse, b.coarse))
        for a, b in zip(one, other, strict=True)
    )


def draw_rows(stack, start, stop, *, seed, stream):
    return RowSource(stack, seed=seed, stream=stream).rows(start, stop)


def run(stack=None, n=(3000, 50), **options):
    return simulate(stack or make(), n, **{"seed": 1, "progress": False, **options})


def test_rows_are_what_the_simulators_give_at_the_drawn_inputs():
    data = run()
    theta, u = draw_rows(make(), 0, 50, seed=1, stream=1)
    assert torch.equal(data.levels[1].theta, theta)
    assert torch.equal(data.levels[1].fine, high(theta, u))
    assert torch.equal(data.levels[1].coarse, low(theta, u))


@pytest.mark.parametrize("batch_size", [1, 7, 1024, 5000])
def test_batch_size_changes_nothing(batch_size):
    n = (1500, 20) if batch_size == 1 else (3000, 50)
    assert equal(run(n=n), run(n=n, batch_size=batch_size))


def test_a_larger_n_extends_a_smaller_one():
    assert equal(run(n=(3000, 50)).head((1100, 9)), run(n=(1100, 9)))


def test_seeds_and_levels_have_their_own_rows():
    assert not torch.equal(run().levels[0].theta, run(seed=2).levels[0].theta)
    data = run()
    assert not bool((data.levels[0].theta[:50] == data.levels[1].theta).any())
    theta, _ = simulate_level(make(), -1, 50, seed=1, stream=TEST_STREAM)
    assert not bool((theta == data.levels[1].theta).any())


def test_threads_and_processes_change_nothing():
    with ThreadPoolExecutor(3) as pool:
        assert equal(run(), run(executor=pool, batch_size=100))
    assert equal(run(), run(workers=2, batch_size=500))


def test_a_process_pool_of_the_standard_library(tmp_path):
    # Simulators must be importable by name there.
    stack = LevelStack(PRIOR, torch_noise, [Level("low", torch.add, 1), Level("high", torch.sub, 2)])
    with ProcessPoolExecutor(2) as pool:
        assert equal(run(stack), run(stack, executor=pool, batch_size=500))


def torch_noise(n, generator):
    return torch.randn(n, 2, generator=generator)


def test_the_global_random_state_is_left_alone():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    run()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


def test_identical_levels_have_zero_correction():
    data = run(make(high=low))
    assert torch.equal(data.levels[1].fine, data.levels[1].coarse)


def test_a_black_box_gets_one_seed_a_row():
    def simulate_rows(theta, seeds):
        pairs = zip(theta, seeds, strict=True)
        return np.stack([np.random.default_rng(int(seed)).normal(float(t[0]), size=2) for t, seed in pairs])

    stack = LevelStack(PRIOR, "seed", [Level("low", simulate_rows, 1), Level("high", simulate_rows, 2)])
    data = run(stack, n=(20, 5))
    assert torch.equal(data.levels[1].fine, data.levels[1].coarse)
    assert len(set(data.levels[0].fine[:, 0].tolist())) == 20


def test_replays_are_counted_as_runs():
    # low: its own rows, one per pair, and two replayed rows; high is replayed only on request.
    assert run(n=(100, 10)).runs == (112, 10)
    assert run(n=(100, 10), replay_finest=True).runs == (112, 12)


def test_reused_rows_come_first_and_count():
    first = run(n=(10, 4), seed=7)
    data = run(n=(30, 6), reuse=first)
    assert data.n == (30, 6)
    assert equal(data.head((10, 4)), first)
    assert data.runs == (10 + 20 + 4 + 2 + 2, 6)  # the first campaign replayed two rows, the second need not


def test_reusing_data_of_the_same_seed_extends_it():
    assert equal(run(n=(2000, 40)), run(n=(2000, 40), reuse=run(n=(900, 10))))


def test_reuse_of_more_than_is_asked_is_refused():
    with pytest.raises(ValueError, match="has 10 already"):
        run(n=(5, 4), reuse=run(n=(10, 4)))
    with pytest.raises(ValueError, match="reused data of the levels"):
        run(reuse=MultilevelData.from_arrays([(PRIOR.sample((3,)), torch.zeros(3, 3))] , names=["other"]))


def fail_above(limit):
    def simulate_with_holes(theta, noise):
        return torch.where(theta[:, :1] > limit, torch.nan, high(theta, noise))

    return simulate_with_holes


def test_nan_rows_are_left_out_with_their_twins_counted_and_warned_about():
    with pytest.warns(UserWarning, match="of 50 at level 'high'"):
        data = run(make(high=fail_above(0.8)), on_failure="drop")
    lost = data.failures[1]
    assert data.failures[0] == 0
    assert 0 < lost < 50
    assert data.n == (3000, 50 - lost)
    assert data.runs[1] == 50
    assert bool((data.levels[1].theta[:, 0] <= 0.8).all())
    theta, u = draw_rows(make(), 0, 50, seed=1, stream=1)
    assert torch.equal(data.levels[1].coarse, low(theta, u)[theta[:, 0] <= 0.8])


@pytest.mark.parametrize("on_failure", ["drop", "redraw"])
def test_nothing_finite_is_an_error(on_failure):
    with pytest.raises(SimulationError, match="Every one of the first 32 rows of level 'high' failed"):
        run(make(high=fail_above(-1.0)), on_failure=on_failure)


def changing(theta, noise):
    noise["u"] += 1
    return noise["u"]


def unseeded(theta, noise):
    return theta[:, :1] + torch.randn(len(theta), 3)


def of_the_batch(theta, noise):
    return low(theta, noise) - noise["u"].mean(0)


def reseeding(theta, noise):
    generator = torch.Generator().manual_seed(0)
    return theta[:, :1] + torch.randn(len(theta), 3, generator=generator)


def unseeded_noise(n, generator):
    return {"u": torch.randn(n, 3), "v": torch.rand(n, generator=generator)}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=str)
def test_changes_in_place_are_found_where_they_happen(options):
    with pytest.raises(ValueError, match="level 'low' changed theta or noise in place"):
        run(make(low=changing), **options)


def spoiling(theta, noise):
    x = low(theta, noise)
    theta[theta[:, 0] > 0.9] = 0.5  # rare, and in none of the first rows
    return x


@per_sample
def spoiling_row(theta, noise):
    x = theta[:1] + noise["u"]
    if theta[0] > 0.9:
        theta[:], noise["u"][:] = 0.5, 0.0
    return x


@pytest.mark.slow
def test_rows_that_a_simulator_changes_are_its_own():
    stack = make(low=spoiling_row, high=spoiling_row)
    data = run(stack, n=(300, 50))
    for stream, n in enumerate((300, 50)):
        theta, u = draw_rows(make(), 0, n, seed=1, stream=stream)
        changed = theta[:, 0] > 0.9
        assert bool(changed.any())
        assert not bool(changed[:2].any())
        assert torch.equal(data.levels[stream].theta, theta)
        assert torch.equal(data.levels[stream].fine, low(theta, u))
    assert torch.equal(data.levels[1].coarse, data.levels[1].fine)  # which is run after it
    with ThreadPoolExecutor(2) as pool:
        assert equal(data, run(stack, n=(300, 50), executor=pool))
    assert equal(data, run(stack, n=(300, 50), workers=2))


@pytest.mark.parametrize("level", ["low", "high"])
@pytest.mark.parametrize("threads", [1, 2])
def test_late_changes_of_theta_in_place_are_found(level, threads):
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match=f"level '{level}' changed theta or noise in"):
        run(make(**{level: spoiling}), executor=pool if threads > 1 else None)


def test_blocks_are_drawn_once():
    drawn = []

    def counted(n, generator):
        drawn.append(n)
        return noise(n, generator)

    run(make(noise=counted), n=(100, 20), batch_size=1)
    assert drawn.count(BLOCK) == 2


@pytest.mark.parametrize(
    ("stack", "options", "match"),
    [
        (make(low=of_the_batch), {}, "let no row depend on another"),
        (make(low=reseeding), {}, "'low' is not deterministic"),
        (make(noise=unseeded_noise), {}, "draw from its generator alone"),
        (make(low=lambda t, u: torch.complex(low(t, u), low(t, u))), {}, "complex"),
        (make(), {"seed": -1}, "at least 0 as seed"),
        (make(), {"seed": None}, "at least 0 as seed"),
        (make(), {"n": 20.0}, "a whole number or one per level"),
        (make(low=lambda t, u: low(t, u)[:1]), {}, "level 'low' to return 2 rows"),
        (make(high=lambda t, u: high(t, u)[:, :2]), {}, r"one shape, \(3,\); level 'high' returned \(2,\)"),
        (make(low=lambda t, u: t[:, 0], high=lambda t, u: t[:, 0]), {}, r"x\[:, None\]"),
        (make(low=lambda t, u: "text"), {}, "tensor or array; got str"),
        (make(low=unseeded), {}, "'low' is not deterministic"),
        (make(high=unseeded), {"replay_finest": True}, "'high' is not deterministic"),
        (make(low=changing), {}, "changed theta or noise in place"),
        (make(), {"n": (10, 0)}, "at least one row per level"),
        (make(), {"n": (10, 5, 2)}, "one number per level, 2"),
        (make(), {"n": (10.5, 5)}, "whole numbers"),
        (make(), {"batch_size": 0}, "batch_size >= 1"),
        (make(), {"workers": 0}, "workers >= 1"),
    ],
)
def test_bad_simulators_and_requests(stack, options, match):
    with pytest.raises(ValueError, match=match):
        run(stack, **options)


def test_a_bad_finest_level_is_found_before_the_bulk_is_run():
    seen = []

    def counted(theta, noise):
        seen.append(len(theta))
        return low(theta, noise)

    with pytest.raises(ValueError, match="one shape"):
        run(make(low=counted, high=lambda t, u: high(t, u)[:, :2]))
    assert sum(seen) <= 3 * 2  # level 0's probe, its replay, the coarse half of the first pairs


def test_joint_rows_share_theta_and_noise():
    joint = simulate_joint(make(), 30, seed=3, stream=9)
    theta, u = draw_rows(make(), 0, 30, seed=3, stream=9)
    assert torch.equal(joint.theta, theta)
    assert torch.equal(joint.outputs[0], low(theta, u))
    assert torch.equal(joint.outputs[1], high(theta, u))


def test_draws_do_not_depend_on_how_they_are_cut():
    whole = draw_rows(make(), 0, 2 * BLOCK + 5, seed=1, stream=0)
    part = draw_rows(make(), BLOCK - 3, BLOCK + 4, seed=1, stream=0)
    assert torch.equal(whole[0][BLOCK - 3 : BLOCK + 4], part[0])
    assert torch.equal(whole[1]["u"][BLOCK - 3 : BLOCK + 4], part[1]["u"])
