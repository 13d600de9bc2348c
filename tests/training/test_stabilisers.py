import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import MIXTURE, make_descent, make_members, make_network, make_terms, train

from mlsbi.density.mixture_density import MDN
from mlsbi.training.descent import Objective
from mlsbi.training.members import Member
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions
from mlsbi.training.stabilisers import (
    adjust,
    averaged_share,
    clip_correction,
    clip_norm,
    difference_penalty,
    project,
    rescale,
)

SEEDS = st.integers(0, 10**6)
vectors = SEEDS.map(lambda seed: torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(vectors)
def test_projected_gradients_do_not_conflict(pair):
    base, correction = pair
    new_base, new_correction, conflict = project(base, correction)
    assert bool(conflict) == bool(base @ correction < 0)
    if conflict:
        assert (new_base @ correction).item() == pytest.approx(0.0, abs=1e-5)  # float32
        assert (new_correction @ base).item() == pytest.approx(0.0, abs=1e-5)
        assert (new_base + new_correction) @ base >= -1e-5
        assert (new_base + new_correction) @ correction >= -1e-5
    else:
        assert torch.equal(new_base, base)
        assert torch.equal(new_correction, correction)


@given(vectors)
def test_rescaled_gradient_keeps_direction_and_takes_length(pair):
    coarse, fine = pair
    new = rescale(coarse, fine)
    assert new.norm().item() == pytest.approx(fine.norm().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(new, coarse, dim=0).item() == pytest.approx(1.0, abs=1e-5)


@given(vectors, st.floats(0.01, 10))
def test_a_clipped_correction_keeps_its_direction_and_gets_no_longer(pair, limit):
    base, correction = pair
    new = clip_correction(base, correction, limit)
    assert new.norm() <= limit * base.norm() * (1 + 1e-5)
    assert torch.nn.functional.cosine_similarity(new, correction, dim=0).item() == pytest.approx(1.0, abs=1e-5)
    if correction.norm() < limit * base.norm():
        assert torch.equal(new, correction)
    else:
        assert new.norm().item() == pytest.approx(limit * base.norm().item(), rel=1e-5)


@given(vectors, st.floats(0.01, 10))
def test_a_clipped_gradient_is_that_of_torch(pair, limit):
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.grad = pair[0].clone()
    torch.nn.utils.clip_grad_norm_([parameter], limit)
    clipped, length = clip_norm(pair[0], limit)
    assert torch.allclose(clipped, parameter.grad, rtol=1e-5)
    assert length.item() == pytest.approx(pair[0].norm().item())


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_vectors_along_the_last_axis_are_adjusted_one_by_one(seed):
    a, b = draw(2, 3, 2, 5, seed=seed)
    a[0, 0], b[2, 1], a[1, 1] = 0.0, 0.0, -b[1, 1]
    flat = [(one, other) for one, other in zip(a.reshape(-1, 5), b.reshape(-1, 5), strict=True)]
    for function in (rescale, lambda x, y: clip_correction(x, y, 0.7), lambda x, y: clip_norm(x, 1.3)[0],
                     lambda x, y: project(x, y)[0], lambda x, y: project(x, y)[1],
                     lambda x, y: project(x, y)[2][..., None].double()):
        expected = torch.stack([function(*pair) for pair in flat])
        assert torch.allclose(function(a, b).reshape(expected.shape), expected, atol=1e-12)


def test_zero_gradients_are_harmless():
    zero = torch.zeros(3)
    for given_ in ({"use_rescale": True, "use_project": True}, {"use_rescale": True, "use_project": True,
                                                                "correction_limit": 0.5}):
        adjusted = adjust([zero, zero, zero], torch.ones(2), **given_)
        assert torch.equal(adjusted.gradient, zero)
        assert adjusted.cosine.item() == 0.0
        assert not bool(adjusted.projected)
    assert torch.equal(clip_norm(zero, 1.0)[0], zero)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_lengths_far_from_one_are_no_trouble(scale):
    a, b = scale * torch.tensor([3.0, 4.0]), scale * torch.tensor([-4.0, 2.0])
    assert torch.allclose(rescale(a, b), b.norm() / a.norm() * a, rtol=1e-5)
    assert torch.allclose(clip_correction(a, b, 0.1).norm(), 0.1 * a.norm(), rtol=1e-5)
    assert all(bool(part.isfinite().all()) for part in project(a, b)[:2])


def test_without_adjustments_the_step_is_the_gradient_of_the_telescope():
    g = draw(5, 4)
    adjusted = adjust(list(g), torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64), use_rescale=False,
                      use_project=False)
    exact = 0.3 * g[0] + 0.6 * g[1] - 0.3 * g[2] + g[3] - 0.6 * g[4]
    assert torch.allclose(adjusted.gradient, exact, atol=1e-12)
    assert not bool(adjusted.projected)
    base, correction = 0.3 * g[0], exact - 0.3 * g[0]
    assert adjusted.base_norm.item() == pytest.approx(base.norm().item())
    assert adjusted.correction_norm.item() == pytest.approx(correction.norm().item())
    assert adjusted.cosine.item() == pytest.approx(torch.nn.functional.cosine_similarity(base, correction, 0).item())


def test_rescaling_does_not_cancel_the_weights():
    fine, coarse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    adjusted = adjust([torch.zeros(2), fine, coarse], torch.tensor([0.5, 1.0]), use_rescale=True, use_project=False)
    assert adjusted.gradient.tolist() == [1.0, -0.5]


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([None, 0.5, 2.0]))
def test_a_step_is_algorithm_1(seed, rescales, projects, limit):
    """Rescale, then weigh, sum, limit, and project both vectors by the other as it was."""
    g, weights = draw(5, 6, seed=seed), torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64)
    factors = [g[half].norm() / g[half + 1].norm() if rescales else 1.0 for half in (1, 3)]
    base = 0.4 * g[0]
    correction = 0.7 * g[1] - 0.4 * factors[0] * g[2] + g[3] - 0.7 * factors[1] * g[4]
    inner, fired = base @ correction, False
    if limit is not None and correction.norm() > limit * base.norm():
        correction = limit * base.norm() / correction.norm() * correction
    if projects and inner < 0:
        fired = True
        inner = base @ correction
        base, correction = (base - inner / correction.square().sum() * correction,
                            correction - inner / base.square().sum() * base)
    adjusted = adjust(list(g), weights, use_rescale=rescales, use_project=projects, correction_limit=limit)
    assert torch.allclose(adjusted.gradient, base + correction, atol=1e-12)
    assert bool(adjusted.projected) == fired


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([None, 0.5]))
def test_members_are_adjusted_as_each_would_be_alone(seed, limit):
    g, weights = draw(5, 4, 6, seed=seed), torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)).double()
    together = adjust(list(g), weights, use_rescale=True, use_project=True, correction_limit=limit)
    for member in range(4):
        alone = adjust(list(g[:, member]), weights[member], use_rescale=True, use_project=True, correction_limit=limit)
        for name in ("gradient", "base_norm", "correction_norm", "cosine", "projected"):
            assert torch.allclose(getattr(together, name)[member].double(), getattr(alone, name).double(), atol=1e-12)


def test_steps_take_the_adjusted_gradient():
    """What `Descent` gives is `adjust` of the gradients of the halves' means, for members with weights of their own."""
    terms = make_terms((60, 30), dtype=torch.float64)
    networks = [make_network(MIXTURE, seed, dtype=torch.float64, spread=0.2) for seed in range(2)]
    weights = torch.tensor([[0.3, 1.0], [0.9, 1.0]], dtype=torch.float64)
    objective = Objective(rescale=True, project=True, correction_limit=0.8)
    descent, plan = make_descent(networks, terms, objective)
    _, gradient, recorded = descent.gradient(next(iter(plan.epoch())), weights)
    for member, network in enumerate(networks):
        halves = [-network.standard_log_prob(term.input, condition).mean()
                  for term in terms for condition in (term.fine, term.coarse) if condition is not None]
        slopes = [torch.cat([part.flatten() for part in torch.autograd.grad(half, list(network.parameters()))])
                  for half in halves]
        expected = adjust(slopes, weights[member], use_rescale=True, use_project=True, correction_limit=0.8)
        assert torch.allclose(gradient[member], expected.gradient, atol=1e-10)
        assert recorded["cosine"][member].item() == pytest.approx(expected.cosine.item(), abs=1e-9)


def test_the_correction_is_never_longer_than_its_limit():
    terms = make_terms((60, 30), dtype=torch.float64)
    network = make_network(MIXTURE, dtype=torch.float64, spread=0.5)
    ones = torch.ones(1, 2, dtype=torch.float64)
    found = []
    for limit in (1e9, 0.1):
        descent, plan = make_descent([network], terms, Objective(correction_limit=limit))
        step = next(iter(plan.epoch()))
        _, gradient, recorded = descent.gradient(step, ones)
        alone, low = make_descent([network], terms[:1])
        base = alone.gradient(next(iter(low.epoch())), ones[:, :1])[1]
        found.append(((gradient - base).norm() / base.norm()).item())
        assert recorded["correction_norm"] / recorded["base_norm"] == pytest.approx(found[0])  # before it was limited
    assert found[0] > 0.1
    assert found[1] == pytest.approx(0.1)


def test_the_penalty_is_the_sum_of_standard_errors():
    losses = [draw(3, rows, seed=rows) for rows in (9, 7)] + [draw(3, 7, seed=1), draw(3, 5), draw(3, 5, seed=2)]
    weights = torch.tensor([[0.5, 0.2, 1.0]] * 3, dtype=torch.float64)
    found = difference_penalty(losses, weights, [1000, 50, 20])
    first = (0.2 * losses[1] - 0.5 * losses[2]).var(1, correction=0)
    second = (losses[3] - 0.2 * losses[4]).var(1, correction=0)
    assert torch.allclose(found, (first / 50).sqrt() + (second / 20).sqrt(), atol=1e-12)
    alone = torch.stack([difference_penalty([half[member] for half in losses], weights[member], [1000, 50, 20])
                         for member in range(3)])
    assert torch.allclose(found, alone, atol=1e-12)


def test_the_penalty_of_equal_halves_is_zero_and_has_a_slope():
    for dtype in (torch.float32, torch.float64):
        low, half = torch.randn(5, dtype=dtype), torch.randn(4, dtype=dtype, requires_grad=True)
        penalty = difference_penalty([low, half, half + 0.0], torch.ones(2, dtype=dtype), [5, 4])
        assert penalty.item() == pytest.approx(0.0, abs=1e-8)
        assert bool(torch.autograd.grad(penalty, half)[0].isfinite().all())
        constant = difference_penalty([low, half, half + 3.0], torch.ones(2, dtype=dtype), [5, 4])
        assert constant.item() == pytest.approx(0.0, abs=1e-3)  # a shift of all rows alike costs nothing


@pytest.mark.parametrize("adjusts", [{}, {"rescale": True, "project": True}, {"correction_limit": 0.5}])
def test_the_penaltys_gradient_is_that_of_finite_differences(adjusts):
    terms = make_terms((40, 12), dtype=torch.float64)
    network = make_network(MDN(components=1, hidden=3, layers=1), dtype=torch.float64, spread=0.3)
    weights = torch.tensor([[0.6, 1.0]], dtype=torch.float64)
    (plain, plan), (penalised, _) = (make_descent([network], terms, Objective(difference_penalty=factor, **adjusts))
                                     for factor in (0.0, 2.5))
    step, = plan.epoch()
    found = (penalised.gradient(step, weights)[1] - plain.gradient(step, weights)[1])[0]

    def value(flat):
        losses = plain.stack.together(flat[None], step.input, step.condition, {})
        return 2.5 * difference_penalty(losses.split(step.sizes, 1), weights, plan.n).item()

    flat = plain.flat.detach()[0]
    for at in range(len(flat)):
        shift = torch.zeros_like(flat)
        shift[at] = 1e-5
        # 1e-6: the error of a central difference of this step, in float64.
        assert found[at].item() == pytest.approx((value(flat + shift) - value(flat - shift)) / 2e-5, abs=1e-6)
    assert found.abs().max() > 0.01


def test_the_penalty_draws_the_correction_seen_towards_the_one_held_out():
    """Four pairs and a wide network: plain descent makes their difference as negative as it can."""
    terms, (_, held) = make_terms((200, 4)), make_terms((2, 400), seed=9)
    gaps = []
    for factor in (0.0, 5.0):
        network = make_network(MDN(components=1, hidden=16, layers=1))
        options = TrainingOptions(epochs=150, learning_rate=5e-3, batch_size=None)
        train([Member(network, terms, [], 0)], Objective(difference_penalty=factor), options)
        with torch.no_grad():
            seen, unseen = (
                float((network.standard_log_prob(term.input, term.coarse)
                       - network.standard_log_prob(term.input, term.fine)).mean()) for term in (terms[1], held)
            )
        gaps.append(abs(seen - unseen))
    assert gaps[1] < 0.5 * gaps[0]


def test_a_penalty_without_levels_changes_nothing():
    found = []
    for factor in (0.0, 3.0):
        histories = train(make_members(2, MIXTURE, n=(60,)), Objective(difference_penalty=factor, rescale=True))
        found.append([history.best_loss for history in histories])
    assert found[0] == found[1]


@given(st.floats(0.0, 0.999), st.integers(1, 10**5))
def test_the_averages_share_falls_to_that_of_its_decay(decay, step):
    share = averaged_share(decay, step)
    assert 1 - decay - 1e-12 <= share <= 1.0
    assert averaged_share(decay, step + 1) <= share
    if step > 10 * decay / (1 - decay) + 1:
        assert share == pytest.approx(1 - decay)


def test_a_stable_descent_of_few_pairs():
    """What Algorithm 1 is for: four pairs whose fine half a wide network tells from the coarse one."""
    terms = make_terms((200, 4))
    pairs = Term(terms[1].input, terms[1].fine, terms[1].coarse + 3.0)
    worst = []
    for objective in (Objective(), Objective(rescale=True, project=True)):
        history, = train([Member(make_network(MIXTURE), [terms[0], pairs], [], 0)], objective,
                         TrainingOptions(epochs=80, learning_rate=0.02, batch_size=None))
        worst.append(min(record["loss"] for record in history.epochs))
    assert worst[0] < -10  # the sum runs off: no density of 200 rows is as likely as that
    assert math.isfinite(worst[1])
    assert worst[1] > worst[0] / 2
