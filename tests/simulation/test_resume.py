import errno
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlsbi import (
    BoxPrior,
    Level,
    LevelStack,
    MultilevelData,
    StoreError,
    accept_code,
    open_store,
    optimal_allocation,
    per_sample,
    pilot,
    simulate,
)
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM, Stream

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0], names=["a", "b"])


def noise(n, generator):
    return {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)}


class Counted:
    """A simulator that counts its rows in this process."""

    def __init__(self, function):
        self.function, self.rows = function, 0

    def __call__(self, theta, noise):
        left = os.environ.get(f"MLSBI_TEST_LEFT_{self.function.__name__}")  # held here it would be part of the stack
        if left is not None and self.rows >= int(left):
            raise KeyboardInterrupt
        self.rows += len(theta)
        return self.function(theta, noise)

    def __reduce__(self):
        return self.function.__reduce__()


def low(theta, noise):
    return theta[:, :1] + noise["u"]


def high(theta, noise):
    return theta[:, :1] + noise["u"] + 0.1 * noise["v"][:, None] * theta[:, 1:]


def middle(theta, noise):
    return theta[:, :1] + noise["u"] + 0.1 * noise["v"][:, None]


def stack_of(*levels, prior=PRIOR, draw=noise):
    names = {2: ("low", "high"), 3: ("low", "middle", "high")}[len(levels)]
    return LevelStack(prior, draw, [Level(name, level, 10.0**k) for k, (name, level) in enumerate(zip(names, levels,
                                                                                                     strict=True))])


PLAIN = stack_of(low, high)


def run(stack=PLAIN, n=(3000, 50), **options):
    return simulate(stack, n, **{"seed": 1, "progress": False, **options})


def equal(one, other):
    return one.n == other.n and all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine)
        and (a.coarse is None or torch.equal(a.coarse, b.coarse)) for a, b in zip(one, other, strict=True))


@pytest.fixture
def counted():
    return Counted(low), Counted(high)


def test_a_store_changes_nothing_and_is_the_data(tmp_path):
    data = run(store=tmp_path / "store")
    assert equal(data, run())
    assert data.runs == run().runs
    assert equal(open_store(tmp_path / "store").data(), data)
    assert open_store(tmp_path / "store").runs == data.runs


def test_a_finished_campaign_runs_nothing_again(tmp_path, counted):
    first = run(stack_of(*counted), store=tmp_path / "store")
    before = [level.rows for level in counted]
    again = run(stack_of(*counted), store=tmp_path / "store")
    assert [level.rows for level in counted] == before
    assert equal(first, again)
    assert first.runs == again.runs
    assert first.seconds == pytest.approx(again.seconds)


def test_more_rows_are_simulated_and_fewer_are_read(tmp_path, counted):
    run(stack_of(*counted), n=(1000, 20), store=tmp_path / "store")
    before = [level.rows for level in counted]
    more = run(stack_of(*counted), n=(1500, 50), store=tmp_path / "store")
    assert [level.rows - was for level, was in zip(counted, before, strict=True)] == [500 + 30, 30]
    assert equal(more, run(n=(1500, 50)))
    assert equal(run(stack_of(*counted), n=(10, 5), store=tmp_path / "store"), run(n=(10, 5)))


@pytest.mark.parametrize("left", [0, 2, 5, 31, 200, 700])
def test_an_interrupted_campaign_goes_on_where_it_was(left, tmp_path, counted, monkeypatch):
    monkeypatch.setenv("MLSBI_TEST_LEFT_low", str(left))
    with pytest.raises(KeyboardInterrupt):
        run(stack_of(*counted), n=(900, 40), batch_size=30, store=tmp_path / "store")
    done = counted[0].rows
    monkeypatch.delenv("MLSBI_TEST_LEFT_low")
    data = run(stack_of(*counted), n=(900, 40), batch_size=30, store=tmp_path / "store")
    assert equal(data, run(n=(900, 40)))
    assert data.runs == run(n=(900, 40)).runs  # replays too are not made twice
    assert counted[0].rows <= data.runs[0] + 2  # at most the rows between a level's run and its file
    assert done <= counted[0].rows


def low_row(theta, noise):
    return theta[:1] + noise["u"]


def test_rows_that_run_one_by_one_are_kept_one_by_one_from_the_first(tmp_path):
    calls = []

    @per_sample
    def interrupted(theta, noise):
        calls.append(theta.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return theta[:1] - noise["u"]

    with pytest.raises(KeyboardInterrupt):
        run(stack_of(per_sample(low_row), interrupted), store=tmp_path / "store")
    kept = open_store(tmp_path / "store")
    assert list(kept.ok(Stream(1, 1, (0, 1)))) == [(0, 1)]
    assert kept.data().levels[1].theta.tolist() == calls[:1]


def test_a_simulator_may_change_the_working_directory(tmp_path, monkeypatch):
    def wandering(theta, noise):
        os.chdir(tmp_path / "elsewhere")
        return low(theta, noise)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    data = run(stack_of(wandering, high), store="store")
    assert equal(data, run())
    assert equal(open_store(tmp_path / "store").data(), data)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_on_a_full_disk_workers_finish_and_nothing_is_lost(tmp_path, monkeypatch):
    log, sync = tmp_path / "log", os.fsync
    log.mkdir()

    @per_sample
    def noted(theta, noise):
        name = theta.tobytes().hex()
        (log / f"{name} begun").touch()
        time.sleep(0.06)  # what takes that long is worth a file at once
        (log / f"{name} ended").touch()
        return theta[:1] - noise["u"]

    def fsync(descriptor):
        if len(list(log.glob("* ended"))) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    def noted_as(what):
        return {path.name.split()[0] for path in log.glob(f"* {what}")}

    def names(theta):
        return {row.tobytes().hex() for row in theta.numpy()}

    stack, n = stack_of(per_sample(low_row), noted), (20, 24)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="no space left") as caught:
        run(stack, n=n, workers=2, batch_size=1, store=tmp_path / "store")
    monkeypatch.setattr(os, "fsync", sync)
    part, kept = caught.value.data, open_store(tmp_path / "store").data()
    assert noted_as("begun") == noted_as("ended") == names(part.levels[1].theta)
    assert 0 < len(kept.levels[1]) < len(part.levels[1]) < n[1]
    for path in log.iterdir():
        path.unlink()
    undisturbed = simulate(stack_of(per_sample(low_row), per_sample(lambda theta, noise: theta[:1] - noise["u"])), n,
                           seed=1, progress=False)
    assert equal(run(stack, n=n, reuse=part), undisturbed)
    assert noted_as("begun") == names(undisturbed.levels[1].theta) - names(part.levels[1].theta)
    for path in log.iterdir():
        path.unlink()
    assert equal(run(stack, n=n, store=tmp_path / "store"), undisturbed)
    assert noted_as("begun") == names(undisturbed.levels[1].theta) - names(kept.levels[1].theta)


def test_the_finest_level_is_run_first(tmp_path):
    order = []

    def traced(level):
        def simulate_and_note(theta, noise):
            if len(theta) > 2:
                order.append((level, len(theta)))
            return (low, high)[level](theta, noise)

        return simulate_and_note

    run(stack_of(traced(0), traced(1)), n=(900, 40), batch_size=20)
    assert [name for name, _ in order[:4]] == [0, 1, 0, 1]  # pairs
    assert {name for name, _ in order[4:]} == {0}


@pytest.mark.slow
def test_a_pilot_and_its_campaign_share_a_store(tmp_path, counted):
    stack, store = stack_of(*counted), tmp_path / "store"
    report = pilot(stack, 16, seed=0, store=store, progress=False)
    plan = optimal_allocation(report, budget=2000)
    data = simulate(stack, plan, seed=1, reuse=report.data, store=store, progress=False)
    assert equal(open_store(store).data(), data)
    assert open_store(store).runs[1] == data.runs[1] == counted[1].rows
    before = [level.rows for level in counted]
    again = pilot(stack, 16, seed=0, store=store, progress=False)
    assert [level.rows for level in counted] == before
    assert again.spent == report.spent
    assert (again.losses == report.losses).all()
    pilot(stack, 24, seed=0, store=store, progress=False)
    assert counted[1].rows - before[1] == 8


def test_measured_costs_come_from_the_store(tmp_path):
    free = LevelStack(PRIOR, noise, [Level("low", low), Level("high", high)])
    report = pilot(free, 16, seed=0, store=tmp_path / "store", progress=False)
    assert report.cost_unit == "seconds"
    assert pilot(free, 16, seed=0, store=tmp_path / "store", progress=False).costs == pytest.approx(report.costs)
    run(free, store=tmp_path / "store")
    costs = open_store(tmp_path / "store").costs
    assert len(costs) == 2
    assert all(0 < cost < 1 for cost in costs)
    measured = report.with_costs(costs)
    plan = optimal_allocation(measured, budget=1000 * costs[1])
    assert plan.cost <= 1000 * costs[1]
    assert plan.pair_costs == pytest.approx((costs[0], costs[0] + costs[1]))
    assert measured.spent == pytest.approx(sum(n * cost for n, cost in zip(report.data.runs, costs, strict=True)))
    with pytest.raises(ValueError, match="A store measures"):
        report.with_costs([1.0, float("nan")])


@pytest.mark.parametrize("what", ["pilot", "arrays", "all", "own", "head"])
def test_reused_rows_are_never_repeated(what, tmp_path):
    store, n = tmp_path / "store", (400, 60)
    report = pilot(PLAIN, 16, seed=0, store=store, progress=False)
    first = run(n=(90, 7))
    arrays = MultilevelData.from_arrays([tuple(array for array in (level.theta, level.fine, level.coarse)
                                               if array is not None) for level in first], PLAIN.names)
    run(n=(300, 30), reuse=first, store=store)  # so that the store has neither the first rows nor the last
    kept = open_store(store)
    reuse = {"pilot": report.data, "arrays": arrays, "all": kept.data(), "own": kept.data(seed=1),
             "head": kept.data().head((40, 25))}[what]  # fmt: skip
    for data in (run(n=n, store=store, reuse=reuse), run(n=n, reuse=reuse)):
        assert data.n == n
        for level, old in zip(data, reuse, strict=True):
            assert len(torch.unique(level.theta, dim=0)) == len(level)
            assert torch.equal(level.theta[:len(old)], old.theta)
        assert equal(data, run(n=n)) == (what == "arrays")  # the others have rows of another seed, or lack the first
        if what == "pilot":  # whose seed is another: the campaign's own rows begin with the first
            for level, old, own in zip(data, reuse, run(n=n), strict=True):
                assert torch.equal(level.theta[len(old):], own.theta[:len(level) - len(old)])


@pytest.mark.filterwarnings("ignore:Replaced rows")
def test_reused_rows_among_which_some_failed_are_never_repeated(tmp_path):
    def failing(theta, noise):
        return torch.where(theta[:, :1] < 0.5, torch.nan, high(theta, noise))

    stack = stack_of(low, failing)
    for seed in range(20):
        store, options = tmp_path / str(seed), {"seed": seed, "on_failure": "redraw"}
        run(stack, n=(9, 9), reuse=run(stack, n=(9, 4), **options), store=store, **options)
        for reuse in (open_store(store).data(), run(stack, n=(20, 7), **options)):
            data = run(stack, n=(30, 20), reuse=reuse, store=store, **options)
            assert data.n == (30, 20)
            assert [len(torch.unique(level.theta, dim=0)) for level in data] == [30, 20]


def test_test_rows_and_sets_are_kept_too(tmp_path, counted):
    stack, options = stack_of(*counted), RunOptions(tmp_path / "store", on_failure="drop")
    kept = [
        (simulate_level(stack, -1, 30, seed=1, stream=TEST_STREAM, options=options),
         simulate_sets(stack, -1, 20, 3, seed=1, stream=TEST_STREAM, options=options))
        for _ in range(2)
    ]
    assert counted[1].rows == 30 + 60
    for one, other in zip(*kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(kept[0][1][0], simulate_sets(PLAIN, -1, 20, 3, seed=1, stream=TEST_STREAM)[0])
    with pytest.raises(StoreError, match="no finished rows"):
        open_store(tmp_path / "store").data()


@pytest.mark.parametrize(("stack", "difference"), [
    (stack_of(low, high, prior=BoxPrior([0.0, -1.0], [1.0, 2.0], names=["a", "b"])), "prior"),
    (stack_of(low, middle), "level 'high'"),
    (stack_of(low, middle, high), "levels"),
    (stack_of(low, high, draw=lambda n, g: {key: 2 * u for key, u in noise(n, g).items()}), "noise"),
], ids=["prior", "code", "levels", "noise"])  # fmt: skip
def test_another_stack_is_refused_before_anything_is_run(stack, difference, tmp_path):
    before = run(n=(20, 5), store=tmp_path / "store")
    with pytest.raises(StoreError, match=f"(?s)holds simulations of another stack.*{difference}"):
        run(stack, n=(30, 9, 4)[:len(stack)], store=tmp_path / "store")
    assert equal(run(n=(20, 5), store=tmp_path / "store"), before)


def test_code_can_be_accepted_and_nothing_else(tmp_path):
    before = run(n=(20, 5), store=tmp_path / "store")
    rewritten = stack_of(low, lambda theta, u: u["u"] + theta[:, :1] + 0.1 * theta[:, 1:] * u["v"][:, None])
    with pytest.raises(StoreError, match=r"(?s)level 'high': its code changed.*mlsbi.accept_code\(store, stack\)"):
        run(rewritten, n=(20, 5), store=tmp_path / "store")
    accept_code(tmp_path / "store", rewritten)
    assert equal(run(rewritten, n=(20, 5), store=tmp_path / "store"), before)
    with pytest.raises(StoreError, match="level 'high': its code changed"):
        run(n=(20, 5), store=tmp_path / "store")
    other = stack_of(low, high, prior=BoxPrior([0.0, -1.0], [1.0, 2.0], names=["a", "b"]))
    with pytest.raises(StoreError, match="(?s)prior.*own store.$"):
        accept_code(tmp_path / "store", other)
    with pytest.raises(StoreError, match="levels"):
        accept_code(tmp_path / "store", stack_of(low, middle, high))


def test_another_layout_is_refused(tmp_path):
    run(n=(20, 5), store=tmp_path / "store")
    manifest = tmp_path / "store" / "store.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "layout": 99}))
    with pytest.raises(StoreError, match="layout"):
        run(n=(20, 5), store=tmp_path / "store")


def test_corrected_costs_are_no_other_stack(tmp_path):
    run(n=(20, 5), store=tmp_path / "store")
    dearer = LevelStack(PRIOR, noise, [Level("low", low, 1.0), Level("high", high, 25.0)])
    run(dearer, n=(20, 5), store=tmp_path / "store")


def test_a_second_campaign_is_refused_while_one_runs(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def waiting(theta, noise):
        started.set()
        go_on.wait(20)
        return low(theta, noise)

    slow = stack_of(waiting, high)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, slow, n=(20, 5), store=tmp_path / "store")
        started.wait(20)
        with pytest.raises(StoreError, match="writ"):
            run(slow, n=(20, 5), store=tmp_path / "store")
        go_on.set()
        assert equal(first.result(), run(n=(20, 5)))


def test_a_campaign_of_another_process_is_seen(tmp_path):
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_run_in, args=(tmp_path / "store",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert equal(run(n=(200, 5), store=tmp_path / "store"), run(n=(200, 5)))


def _run_in(store):
    run(n=(100, 2), store=store)


def test_reused_rows_far_behind_the_first_are_not_repeated(tmp_path):
    run(n=(3000, 30), reuse=run(n=(2500, 20)), store=tmp_path / "store")
    behind = open_store(tmp_path / "store").data(seed=1)  # 500 rows of level 0, behind 2500 that it does not have
    data = run(n=(4000, 60), reuse=behind)
    assert [len(torch.unique(level.theta, dim=0)) for level in data] == [4000, 60]
