import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, SimulationError, open_store, per_sample, simulate
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import Stream

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0], names=["a", "b"])


def noise(n, generator):
    return torch.randn(n, 3, generator=generator)


def low(theta, noise):
    return theta[:, :1] + noise


def high(theta, noise):
    return theta[:, :1] + noise * (1 + theta[:, 1:] / 10)


def bad(theta, limit=0.8):
    """Rows that fail in these tests."""
    return theta[..., 0] > limit


def raising(theta, noise):
    if bool(bad(theta).any()):
        raise ZeroDivisionError("a is too large")
    return high(theta, noise)


def nan(theta, noise):
    return torch.where(bad(theta)[:, None], torch.nan, high(theta, noise))


@per_sample
def raising_row(theta, noise):
    if theta[0] > 0.8:
        raise ZeroDivisionError("a is too large")
    return theta[0] + noise * (1 + theta[1] / 10)


@per_sample
def late_row(theta, noise):
    if theta[0] > 0.8:
        raise TimeoutError("10 s are over")
    return theta[0] + noise * (1 + theta[1] / 10)


@per_sample
def ragged_row(theta, noise):
    x = theta[0] + noise * (1 + theta[1] / 10)
    return x[:2] if theta[0] > 0.8 else x


@per_sample
def mixed_row(theta, noise):
    x = theta[0] + noise * (1 + theta[1] / 10)
    return x.astype(np.float64) if theta[0] > 0.8 else x


def stack_of(top=raising, bottom=low):
    return LevelStack(PRIOR, noise, [Level("low", bottom, 1), Level("high", top, 10)])


def run(stack, n=(200, 40), **options):
    return simulate(stack, n, **{"seed": 1, "progress": False, **options})


def rows(n, stream=1, *, seed=1):
    return RowSource(stack_of(), seed=seed, stream=stream).rows(0, n)


FAILING = pytest.mark.parametrize(("top", "status", "message"), [
    (raising, "exception", "Level 'high': ZeroDivisionError: a is too large"),
    (raising_row, "exception", "Level 'high': ZeroDivisionError: a is too large"),
    (nan, "not finite", "Level 'high' returned 3 NaN or infinite of 3 values"),
    (late_row, "time-out", "Level 'high': TimeoutError: 10 s are over"),
    (ragged_row, "wrong shape", r"rows of one shape, (3,); level 'high' returned (2,)"),
    (mixed_row, "wrong type", "of one type, float32 as in its first rows; it returned float64"),
], ids=["exception", "exception of a row", "nan", "time-out", "shape", "dtype"])  # fmt: skip


@FAILING
@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.filterwarnings("ignore:Left out rows")
def test_dropped_rows_are_those_that_fail_and_no_others(top, status, message, batch_size, tmp_path):
    data = run(stack_of(top), on_failure="drop", batch_size=batch_size, store=tmp_path / "store")
    theta, u = rows(40)
    kept = ~bad(theta)
    assert 0 < int(kept.sum()) < 40
    assert torch.equal(data.levels[1].theta, theta[kept])
    assert torch.allclose(data.levels[1].fine, high(theta, u)[kept])
    assert torch.equal(data.levels[1].coarse, low(theta, u)[kept])
    assert data.failures == (0, int((~kept).sum()))
    table = open_store(tmp_path / "store").failures()
    assert sorted(table["index"]) == torch.nonzero(~kept).flatten().tolist()
    assert set(table["status"]) == {status}
    assert all(message in text for text in table["message"])
    assert np.allclose(table.sort_values("index")[["a", "b"]], theta[~kept].numpy())
    assert set(table["seed"]) == {1}


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 50}, {"workers": 2}, {}], ids=str)
@pytest.mark.filterwarnings("ignore:Replaced rows")
def test_redrawn_rows_are_the_first_that_succeed(options):
    data = run(stack_of(), on_failure="redraw", **options)
    theta, u = rows(100)
    good = torch.nonzero(~bad(theta)).flatten()[:40]
    assert data.n == (200, 40)
    assert torch.equal(data.levels[1].theta, theta[good])
    assert torch.allclose(data.levels[1].fine, high(theta, u)[good])
    assert data.failures == (0, int(good[-1]) + 1 - 40)


def failing_below(limit, sign):
    """A simulator of a row or a batch."""

    def simulate_above(theta, noise):
        if (theta[..., 0] < limit).any():
            raise ZeroDivisionError("a is too small")
        return theta[..., :1] + sign * noise

    return simulate_above


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize("kind", [lambda function: function, per_sample], ids=["vectorised", "row by row"])
@pytest.mark.filterwarnings("ignore:Replaced rows")
def test_redrawn_rows_are_simulated_whatever_fails_first(kind, batch_size):
    n, first_failed = (5, 24), 0
    stacks = [(limit, stack_of(kind(failing_below(limit, -1)), bottom=kind(failing_below(limit, 1))))
              for limit in (0.15, 0.5)]  # few and many: room is made in steps of a quarter of the rows
    for seed in range(60):
        limit, stack = stacks[seed % 2]
        data = run(stack, n, seed=seed, on_failure="redraw", batch_size=batch_size)
        for stream, level in enumerate(data):
            theta, u = rows(100, stream, seed=seed)
            good = torch.nonzero(theta[:, 0] >= limit).flatten()[:n[stream]]
            assert torch.equal(level.theta, theta[good])
            assert torch.equal(level.fine, theta[good, :1] + (1, -1)[stream] * u[good])
            assert data.failures[stream] == int(good[-1]) + 1 - n[stream]
        assert torch.equal(level.coarse, theta[good, :1] + u[good])
        first_failed += int(good[0]) > 0
    assert first_failed > 10


@pytest.mark.filterwarnings("ignore:Replaced rows")
def test_redrawing_few_rows_does_not_give_up_when_those_fail():
    for seed in range(30):
        assert run(stack_of(failing_below(0.4, -1)), (2, 2), seed=seed, on_failure="redraw").n == (2, 2)


def test_failed_rows_are_told_with_the_fraction_and_what_it_means():
    with pytest.warns(UserWarning, match=r"of 40 at level 'high' \(\d+.\d%\).*the part of the prior where simulations"):
        run(stack_of(nan), on_failure="drop")
    with pytest.warns(UserWarning, match="Replaced rows that failed"):
        run(stack_of(nan), on_failure="redraw")


@FAILING
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_by_default_a_failure_ends_the_campaign(top, status, message, workers):
    with pytest.raises(SimulationError, match="of 'high' failed. Row ") as caught:
        run(stack_of(top), batch_size=4, workers=workers)
    assert message in str(caught.value)
    assert 'on_failure="drop"' in str(caught.value)
    theta, _ = rows(40)
    told = caught.value.failures[0]  # with several workers, not always the first of all
    row = int(told.removeprefix("row ").partition(":")[0])
    assert bool(bad(theta)[row])
    assert told.startswith(f"row {row}: {status}")
    assert message in told
    assert f"Row {row} (a = {float(theta[row, 0]):.6g}, b = " in str(caught.value)


def test_what_was_finished_comes_with_the_error_and_can_be_reused():
    with pytest.raises(SimulationError) as caught:
        run(stack_of(), batch_size=4)
    theta, u = rows(40)
    first = int(torch.nonzero(bad(theta))[0])
    part = caught.value.data
    assert len(part.levels[1]) >= first > 0
    with pytest.warns(UserWarning, match="Left out rows"):
        whole = run(stack_of(), on_failure="drop", reuse=part)
    assert torch.equal(whole.levels[1].theta, theta[~bad(theta)])
    assert torch.allclose(whole.levels[1].fine, high(theta, u)[~bad(theta)])
    assert whole.failures[1] == int(bad(theta).sum())


@pytest.mark.parametrize("top", [raising, raising_row, nan], ids=["exception", "row", "nan"])
@pytest.mark.parametrize(("threads", "batch_size"), [(1, 20), (1, None), (3, 3)])
def test_rows_that_come_with_the_error_stop_before_the_first_that_failed(top, threads, batch_size):
    with ThreadPoolExecutor(threads) as pool:
        options = {"batch_size": batch_size, "executor": pool if threads > 1 else None}
        with pytest.raises(SimulationError) as caught:
            run(stack_of(top), **options)
        mended = run(stack_of(high), reuse=caught.value.data, **options)
    theta, u = rows(40)
    part = caught.value.data
    assert 2 <= len(part.levels[1]) <= int(torch.nonzero(bad(theta))[0])
    assert torch.equal(part.levels[1].theta, theta[:len(part.levels[1])])
    assert part.failures == (0, 0)
    assert mended.n == (200, 40)
    assert torch.equal(mended.levels[1].theta, theta)
    assert torch.allclose(mended.levels[1].fine, high(theta, u))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore:Left out rows")
def test_a_simulator_that_exits_fails_its_row(workers, tmp_path):
    def exiting(limit):
        def simulate_or_exit(theta, noise):
            if bool(bad(theta, limit).any()):
                sys.exit("no licence")
            return theta[..., :1] - noise

        return simulate_or_exit

    stack = stack_of(exiting(0.7), bottom=per_sample(exiting(0.8)))
    data = run(stack, on_failure="drop", workers=workers, store=tmp_path / "store")
    table = open_store(tmp_path / "store").failures()
    for stream, (name, n, limit) in enumerate((("low", 200, 0.8), ("high", 40, 0.7))):
        theta, _ = rows(n, stream)
        assert torch.equal(data.levels[stream].theta, theta[~bad(theta, limit)])
        assert sorted(table["index"][table["level"] == name]) == torch.nonzero(bad(theta, limit)).flatten().tolist()
    assert set(table["status"]) == {"exception"}
    assert table["message"].str.contains("SystemExit: no licence").all()


def test_the_cause_is_chained_where_it_happened_here():
    with pytest.raises(SimulationError) as caught:
        run(stack_of(raising_row))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failed_row_does_not_run_others_again():
    calls = []

    @per_sample
    def counted(theta, noise):
        calls.append(theta[0])
        return raising_row.function(theta, noise)

    with pytest.warns(UserWarning, match="Left out rows"):
        run(stack_of(counted), on_failure="drop", batch_size=20)
    assert len(calls) == len(set(calls)) == 40


def test_the_fine_level_is_not_run_where_the_coarse_one_failed():
    seen = []

    def counted(theta, noise):
        seen.append(theta)
        return high(theta, noise)

    with pytest.warns(UserWarning, match="Left out rows"):
        data = run(stack_of(counted, bottom=nan), on_failure="drop")
    theta, _ = rows(40)
    assert not bool(bad(torch.cat(seen)).any())
    assert data.runs[1] == int((~bad(theta)).sum())


def test_failed_tries_are_counted_as_runs():
    with pytest.warns(UserWarning, match="Left out rows"):
        data = run(stack_of(), on_failure="drop", batch_size=20)
    assert data.runs[1] > 40  # halves of a failed batch are run again
    with pytest.warns(UserWarning, match="Left out rows"):
        assert run(stack_of(raising_row), on_failure="drop", batch_size=20).runs[1] == 40


@pytest.mark.parametrize("batch_size", [7, None])
@pytest.mark.filterwarnings("ignore:Left out rows")
def test_runs_of_every_level_are_counted_whichever_raises(batch_size, tmp_path):
    calls = [0, 0]

    def counted(level, function):
        def simulate_and_count(theta, noise):
            calls[level] += len(theta)
            return function(theta, noise)

        return simulate_and_count

    stack = stack_of(counted(1, high), bottom=counted(0, raising))
    options = {"on_failure": "drop", "batch_size": batch_size}
    assert run(stack, **options).runs == tuple(calls)
    assert calls[0] > 240 > 40 > calls[1]  # halves are run again; where the coarse one fails, the fine level is not run
    calls[:] = 0, 0
    assert run(stack, store=tmp_path / "store", **options).runs == tuple(calls)
    before = list(calls)
    again = run(stack, store=tmp_path / "store", retry_failed=True, **options)
    assert calls[0] > before[0]
    for data in (again, run(stack, store=tmp_path / "store", **options)):
        assert data.runs == tuple(calls) == open_store(tmp_path / "store").runs


def test_redrawing_stops_where_next_to_nothing_succeeds():
    def rarely(theta, noise):
        return torch.where(theta[:, :1] > 0.02, torch.nan, high(theta, noise))

    with pytest.raises(SimulationError, match="redrawing the failed ones would take many times the 40 rows"):
        run(stack_of(rarely), on_failure="redraw", batch_size=50)


def test_failures_in_a_store_are_told_before_anything_is_run(tmp_path):
    calls = []

    @per_sample
    def counted(theta, noise):
        calls.append(1)
        return raising_row.function(theta, noise)

    options = {"store": tmp_path / "store", "batch_size": 4}
    with pytest.raises(SimulationError):
        run(stack_of(counted), **options)
    before = len(calls)
    with pytest.raises(SimulationError, match="in an earlier campaign"):
        run(stack_of(counted), **options)
    assert len(calls) == before
    with pytest.warns(UserWarning, match="Left out rows"):
        data = run(stack_of(counted), on_failure="drop", **options)
    assert len(calls) == 40
    with pytest.warns(UserWarning, match="Replaced rows"):
        more = run(stack_of(counted), on_failure="redraw", **options)
    assert more.n == (200, 40)
    assert len(calls) == 40 + 40 - data.n[1] + more.failures[1] - data.failures[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top", [raising, raising_row, nan], ids=["exception", "row", "nan"])
@pytest.mark.filterwarnings("ignore:Left out rows")
def test_going_on_after_failures_gives_what_dropping_them_at_once_does(top, seed, tmp_path):
    with pytest.raises(SimulationError):
        run(stack_of(top), seed=seed, store=tmp_path / "store")
    data, at_once = (run(stack_of(top), seed=seed, on_failure="drop", **more) for more in
                     ({"store": tmp_path / "store"}, {}))
    for one, other in zip(data, at_once, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.fine, other.fine)
    assert torch.equal(data.levels[1].coarse, at_once.levels[1].coarse)


def test_failed_rows_can_be_run_again(tmp_path):
    broken = tmp_path / "broken"
    broken.touch()

    @per_sample
    def sometimes(theta, noise):
        if broken.exists() and theta[0] > 0.8:
            raise OSError("licence server is down")
        return theta[0] + noise

    options = {"store": tmp_path / "store", "n": (20, 40)}
    with pytest.warns(UserWarning, match="Left out rows"):
        run(stack_of(sometimes), on_failure="drop", **options)
    broken.unlink()
    data = run(stack_of(sometimes), retry_failed=True, **options)
    assert data.n == (20, 40)
    assert torch.equal(data.levels[1].theta, rows(40)[0])
    assert run(stack_of(sometimes), **options).failures == (0, 0)
    assert len(open_store(tmp_path / "store").failures()) == 0


@pytest.mark.parametrize("mended", [0, 3, 100])
@pytest.mark.filterwarnings("ignore:Replaced rows")
def test_redrawing_with_failed_rows_tried_again_runs_no_finished_one(mended, tmp_path):
    called, limit = [], tmp_path / "limit"
    limit.write_text("0.5")

    @per_sample
    def sometimes(theta, noise):
        called.append(theta.tobytes())
        if theta[0] < float(limit.read_text()):
            raise OSError("licence server is down")
        return theta[0] - noise

    options = {"n": (20, 12), "on_failure": "redraw", "store": tmp_path / "store"}
    first = run(stack_of(sometimes), **options)
    tried, _ = rows(12 + first.failures[1])
    failed = torch.nonzero(tried[:, 0] < 0.5).flatten()
    assert len(failed) == first.failures[1] > 3
    values = tried[failed, 0].sort(descending=True).values.tolist()
    lowest = (*values, 0.0)[min(mended, len(values)) - 1] if mended else 0.5
    limit.write_text(repr(lowest))
    called.clear()
    again = run(stack_of(sometimes), retry_failed=True, **options)
    theta, u = rows(100)
    good = torch.nonzero(theta[:, 0] >= lowest).flatten()[:12]
    assert torch.equal(again.levels[1].theta, theta[good])
    assert torch.equal(again.levels[1].fine, theta[good, :1] - u[good])
    assert len(called) == len(set(called)) > 0
    assert set(called) <= {row.tobytes() for row in theta[failed].numpy()}  # all of which failed before


def test_a_broken_contract_keeps_what_was_finished(tmp_path):
    def shrinking(theta, noise):
        return low(theta, noise)[:-1] if len(theta) == 50 else low(theta, noise)

    with pytest.raises(ValueError, match="level 'low' to return 50 rows"):
        run(stack_of(high, bottom=shrinking), batch_size=50, store=tmp_path / "store")
    assert len(open_store(tmp_path / "store").data().levels[1]) == 40


def test_a_broken_contract_lets_workers_finish_what_they_run(tmp_path):
    theta, _ = rows(12)
    broken, log = theta[6].numpy().tobytes().hex(), tmp_path / "log"
    log.mkdir()

    def late(theta, noise):
        names = [row.tobytes().hex() for row in theta.numpy()]
        for name in names:
            (log / f"{name} begun").touch()
        if broken in names:
            return high(theta, noise)[:0]
        time.sleep(0.15 if not (log / f"{broken} begun").exists() else 0.5)
        for name in names:
            (log / f"{name} ended").touch()
        return high(theta, noise)

    with pytest.raises(ValueError, match="level 'high' to return 1 rows"):
        run(stack_of(late), (20, 12), workers=2, batch_size=1, store=tmp_path / "store")
    begun, ended = ({path.name.split()[0] for path in log.glob(f"* {what}")} for what in ("begun", "ended"))
    assert begun - ended == {broken}
    kept = {row.tobytes().hex() for part in open_store(tmp_path / "store").read(Stream(1, 1, (0, 1)))
            for row in part.theta}  # fmt: skip
    assert kept == ended


def test_simulators_that_cannot_travel_are_named():
    lock = torch.multiprocessing.get_context("spawn").Lock()

    def unpicklable(theta, noise):
        return low(theta, noise) if lock else theta

    with pytest.raises(SimulationError, match="rows 0 to 1 of 'low': .* Can the simulators be pickled"):
        run(stack_of(high, bottom=unpicklable), workers=2)


@pytest.mark.parametrize(("options", "match"), [
    ({"on_failure": "ignore"}, 'on_failure "raise", "drop" or "redraw"'),
    ({"retry_failed": True}, "a store beside retry_failed=True"),
])
def test_bad_choices(options, match):
    with pytest.raises(ValueError, match=match):
        run(stack_of(high), **options)
    with pytest.raises(TypeError, match="a function that makes one"):
        run(stack_of(high), executor=7)
