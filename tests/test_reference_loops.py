import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from mlsbi import NSF, tasks
from mlsbi.strategies.fitting import posterior_problem
from mlsbi.training.objective import batch_terms, telescope

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NETWORKS = [NSF(transforms=2, bins=2, tail_bound=2.0), NSF()]


def experiment(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return importlib.import_module(name)


reference_loops, timing = experiment("reference_loops"), experiment("timing")
needs_sbi = pytest.mark.skipif(not reference_loops.sbi_installed(), reason="needs sbi")


@pytest.fixture(scope="module")
def problem():
    return posterior_problem(tasks.get("ou").simulate((60, 20), 0), tasks.get("ou").prior)


def halves_of(problem, dtype=torch.float64):
    halves = batch_terms([problem.standardise(term) for term in problem.terms]).halves()
    return [(input.to(dtype), condition.to(dtype)) for input, condition in halves]


def loop_and_network(problem, density, dtype=torch.float64, **options):
    """A plain loop with the weights of a network that the library built, moved away from their initial symmetry."""
    network = problem.network(density, None, seed=3).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.density.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    loop = reference_loops.PlainLoop(density, 3, 5, **options)
    loop.flow.to(dtype)
    loop.copy_weights(network)
    return loop, network


def library_loss_and_gradient(network, halves):
    losses = [-network.standard_log_prob(input, condition) for input, condition in halves]
    loss = telescope(losses, [1.0] * (len(halves) // 2 + 1))
    return loss.detach(), torch.autograd.grad(loss, list(network.density.parameters()))


@pytest.mark.parametrize("halves_together", [False, True])
@pytest.mark.parametrize("density", NETWORKS, ids=["paper", "default"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_loss_and_gradient_are_the_librarys(problem, density, dtype, tolerance, halves_together):
    loop, network = loop_and_network(problem, density, dtype, halves_together=halves_together)
    halves = halves_of(problem, dtype)
    loss, gradient = loop.loss_and_gradient(loop.passes(halves))
    expected, expected_gradient = library_loss_and_gradient(network, halves)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert [part.shape for part in gradient] == [part.shape for part in expected_gradient]
    for part, wanted in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(part, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("halves_together", [False, True])
def test_three_levels_telescope_with_the_librarys_signs(problem, halves_together):
    loop, network = loop_and_network(problem, NSF(), halves_together=halves_together)
    low, fine, coarse = halves_of(problem)
    halves = [low, fine, coarse, (coarse[0][:7], fine[1][:7]), (fine[0][:7], coarse[1][:7])]
    loss, _ = loop.loss_and_gradient(loop.passes(halves))
    torch.testing.assert_close(loss, library_loss_and_gradient(network, halves)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("halves_together", [False, True])
def test_exchanged_halves_are_noticed(problem, halves_together):
    loop, network = loop_and_network(problem, NSF(), halves_together=halves_together)
    low, fine, coarse = halves_of(problem)
    loss, _ = loop.loss_and_gradient(loop.passes([low, coarse, fine]))
    expected, _ = library_loss_and_gradient(network, [low, fine, coarse])
    assert abs(loss - expected) > 1e-3


def test_a_different_architecture_is_refused(problem):
    loop = reference_loops.PlainLoop(NSF(bins=4), 3, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loop.copy_weights(problem.network(NSF(), None, seed=0))


@pytest.mark.parametrize("halves_together", [False, True])
@pytest.mark.parametrize("stretch", [1.0, 10.0], ids=["short gradient", "clipped gradient"])
def test_a_step_is_adam_on_the_clipped_gradient_of_the_librarys_loss(problem, halves_together, stretch):
    loop, network = loop_and_network(problem, NSF(), halves_together=halves_together)
    halves = [(stretch * input, condition) for input, condition in halves_of(problem)]
    parameters = list(network.density.parameters())
    optimiser = torch.optim.Adam(parameters)
    for _ in range(3):
        _, gradient = library_loss_and_gradient(network, halves)
        length = torch.cat([part.flatten() for part in gradient]).norm()
        assert (length > 5) == (stretch > 1)
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part * min(5 / (float(length) + 1e-6), 1.0)
        optimiser.step()
        loop.step(loop.passes(halves))
    # 1e-6: Adam divides by the root of a squared gradient, so rounding weighs more where gradients are small.
    for found, wanted in zip(loop.parameters, parameters, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_dropout_is_part_of_the_plain_network(problem):
    loop = reference_loops.PlainLoop(NSF(dropout=0.5), 3, 5)
    assert {module.p for module in loop.flow.modules() if isinstance(module, nn.Dropout)} == {0.5}
    passes = loop.passes(halves_of(problem, torch.float32))
    with torch.no_grad():
        loop.flow._transform._transforms[0].transform_net.final_layer.weight.normal_(
            generator=torch.Generator().manual_seed(0)
        )
    assert loop.loss_and_gradient(passes)[0] != loop.loss_and_gradient(passes)[0]


@needs_sbi
def test_the_flow_of_sbi_has_the_same_parameters():
    theta, x = torch.randn(20, 3), torch.randn(20, 5)
    for density in NETWORKS:
        theirs, ours = reference_loops.sbi_builder(density)(theta, x), reference_loops.plain_flow(density, 3, 5)
        assert [part.shape for part in theirs.parameters()] == [part.shape for part in ours.parameters()]


@needs_sbi
def test_timing_sbi_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = tasks.get("ou")
    level = task.simulate((1, 100), 0).levels[1]
    before = torch.get_rng_state()
    seconds = reference_loops.sbi_epoch_seconds(level.theta, level.fine, task.prior, batch_size=20, epochs=2)
    assert 0 < seconds < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_measurements_are_compared_pair_by_pair():
    ones, others = iter([1.0, 2.0, 9.0, 4.0, 5.0]), iter([1.0, 1.0, 3.0, 1.0, 1.0])
    found = timing.compare(lambda: next(ones), lambda: next(others), 5)
    # Ratios 1, 2, 3, 4, 5; the ratio of the medians would be 4.
    names = ("lowest", "lower_quartile", "ratio", "upper_quartile", "highest")
    assert [found[name] for name in names] == [1, 2, 3, 4, 5]
    assert (found["seconds"], found["reference_seconds"], found["repetitions"]) == (4.0, 1.0, 5)


def test_both_are_called_alternately_and_as_often():
    calls = []
    found = timing.in_turn(lambda: calls.append("one"), lambda: calls.append("other"), 3)
    assert calls == ["one", "other"] * 4  # the first pair is not timed
    assert found["repetitions"] == 3


def test_short_calls_are_repeated_until_a_measurement_is_long_enough():
    counts = {"slow": 0, "fast": 0, "waits": 0}

    def wait(name, seconds):
        counts[name] += 1
        timing.time.sleep(seconds)

    found = timing.in_turn(lambda: wait("slow", 0.004), lambda: wait("fast", 0.002), 2, at_least=0.01,
                           wait=lambda: wait("waits", 0.0))
    assert counts["slow"] == counts["fast"] >= 2 + 2 * 2
    assert counts["waits"] == 2 + 2 * 2
    assert found["seconds"] < 0.02  # of one call
    assert found["ratio"] > 1
