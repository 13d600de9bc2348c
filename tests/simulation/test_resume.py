import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, StoreError, accept_code, open_store, optimal_allocation, pilot, simulate
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0], names=["a", "b"])


def noise(n, generator):
    return {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)}


class Counted:
    """A simulator that counts its rows in this process."""

    def __init__(self, function):
        self.function, self.rows, self.left = function, 0, []

    def __call__(self, theta, noise):
        if self.left and self.rows >= self.left[0]:
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
def test_an_interrupted_campaign_goes_on_where_it_was(left, tmp_path, counted):
    counted[0].left.append(left)
    with pytest.raises(KeyboardInterrupt):
        run(stack_of(*counted), n=(900, 40), batch_size=30, store=tmp_path / "store")
    done = counted[0].rows
    counted[0].left.clear()
    data = run(stack_of(*counted), n=(900, 40), batch_size=30, store=tmp_path / "store")
    assert equal(data, run(n=(900, 40)))
    assert data.runs == run(n=(900, 40)).runs  # replays too are not made twice
    assert counted[0].rows <= data.runs[0] + 2  # at most the rows between a level's run and its file
    assert done <= counted[0].rows


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
