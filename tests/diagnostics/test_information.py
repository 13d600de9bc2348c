import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from mlsbi.diagnostics import coherence, mutual_information  # noqa: E402


def gaussian(n, seed=0, width=0.5, outputs=1):
    """Theta, and two outputs of it with noise of their own; the outputs' correlation is 1 / (1 + width**2)."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, 1))
    low, high = theta + width * rng.normal(size=(2, n, outputs))
    return theta, low, high


@pytest.mark.parametrize("width", [0.3, 1.0])
def test_information_between_gaussians_is_exact(width):
    theta, low, high = gaussian(800, width=width)
    exact = -0.5 * np.log(1 - 1 / (1 + width**2) ** 2)
    found = mutual_information(low, high, theta, permutations=1)
    assert found.values == pytest.approx([exact], abs=0.1)  # standard error of the neighbour estimate about 0.03
    assert found.carried == pytest.approx([exact], abs=0.1)
    coupled = mutual_information(low, low, summary=lambda x: x, permutations=1)
    assert coupled.mean > exact + 1  # negative control: the same noise in both


@pytest.mark.slow
def test_information_that_is_not_there_is_seldom_above_the_control():
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        theta, low, high = rng.normal(size=(40, 1)), rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
        found.append(mutual_information(low, high, theta, permutations=20, seed=seed))
    assert sum(one.mean > one.control for one in found) <= 3  # 5% to 10% each: P(more) < 0.01
    theta, low, high = gaussian(100)
    shared = mutual_information(low, high, theta)
    assert shared.mean > 2 * shared.control


@pytest.mark.slow
def test_what_a_summary_was_fitted_to_is_not_what_it_is_judged_by():
    exact = -0.5 * np.log(1 - 1 / (1 + 3**2 / 10) ** 2)  # the mean of ten outputs says all
    found = [mutual_information(low, high, theta, permutations=1).mean
             for theta, low, high in (gaussian(80, seed, width=3.0, outputs=10) for seed in range(4))]
    assert np.mean(found) < exact


def test_a_constant_level_knows_nothing():
    theta, low, high = gaussian(100)
    found = mutual_information(0 * low, high, theta)
    assert found.mean < 0.1
    assert found.mean_carried < 0.1


def test_information_is_seen_in_squares_too():
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.5, 2, size=(300, 1))
    low, high = theta * rng.normal(size=(2, 300, 10))
    found = mutual_information(low, high, theta)
    assert found.mean > 0.1 > found.control
    assert mutual_information(low, high, summary=lambda x: x.mean(1, keepdims=True)).mean < 0.1  # negative control


def test_a_parameter_that_the_cheap_level_ignores_counts_nothing():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(300, 2))
    low = theta[:, :1] + 0.3 * rng.normal(size=(300, 2))
    high = theta + 0.3 * rng.normal(size=(300, 2))
    found = mutual_information(low, high, theta)
    assert found.values[0] > 0.5
    assert found.carried[0] > 0.15  # half of the second entry is what the cheap level would have there
    assert max(found.values[1], found.carried[1]) < 0.1
    read = mutual_information(low, high, summary=lambda x: x @ np.ones((2, 1)))
    assert read.mean > 0.15  # negative control: any summary shares something


@pytest.mark.slow
def test_another_order_keeps_the_information_and_loses_what_is_carried():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(300, 1))
    low, high = (np.concatenate([theta, np.zeros((300, 3))], 1) + 0.3 * noise for noise in rng.normal(size=(2, 300, 4)))
    straight = mutual_information(low, high, theta)
    reversed_ = mutual_information(low[:, ::-1], high, theta)
    assert reversed_.mean == pytest.approx(straight.mean, abs=0.05)
    assert straight.mean_carried == pytest.approx(straight.mean, abs=0.1)
    assert reversed_.mean_carried < 0.1 * straight.mean_carried


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(20, 0.7), (64, 1.5), (100, 1.7)])
def test_few_rows_find_most_of_what_is_linear(n, least):
    """Ten outputs, each theta and noise, whose mean tells all; squares and products are 55 columns of nothing."""
    exact = -0.5 * np.log(1 - 1 / (1 + 0.3**2 / 10) ** 2)  # 2.02
    found = [mutual_information(low, high, theta, permutations=1)
             for theta, low, high in (gaussian(n, seed, width=0.3, outputs=10) for seed in range(4))]
    for values in ([one.mean for one in found], [one.mean_carried for one in found]):
        assert least < np.mean(values) < exact + 0.1


@pytest.mark.slow
def test_squares_are_seen_at_pilot_sizes_beside_what_is_linear():
    rng = np.random.default_rng(0)
    theta = rng.uniform(size=(100, 2)) * [6, 1] + [0, 0.2]
    low, high = theta[:, :1] + theta[:, 1:] * rng.normal(size=(2, 100, 8))
    found = mutual_information(low, high, theta)
    assert found.values[0] > 0.8
    assert found.values[1] > 0.1 > found.control


@pytest.mark.slow
def test_information_has_no_sign_and_what_is_carried_has_one():
    theta, low, high = gaussian(100, outputs=3)
    straight, flipped = (mutual_information(sign * low, high, theta) for sign in (1, -1))
    assert flipped.mean == pytest.approx(straight.mean, abs=1e-6)
    assert straight.mean_carried > straight.carried_control
    assert flipped.mean_carried == 0


def test_outputs_of_any_shape_and_reproducible_numbers():
    theta, low, high = gaussian(60, outputs=12)
    flat = mutual_information(low, high, theta, permutations=2, seed=4)
    image = mutual_information(low.reshape(60, 3, 4), high.reshape(60, 3, 4), theta, permutations=2, seed=4)
    assert (flat.mean, flat.control, flat.mean_carried) == (image.mean, image.control, image.mean_carried)
    assert coherence(low, high, seed=4) == coherence(low.reshape(60, 3, 4), high.reshape(60, 3, 4), seed=4)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_coherence_is_the_share_explained(share):
    rng = np.random.default_rng(0)
    low, rest = rng.normal(size=(2, 2000, 4))
    found = coherence(low, np.sqrt(share) * low + np.sqrt(1 - share) * rest, permutations=3)
    assert found.linear == pytest.approx(share, abs=0.03)  # standard error about 0.02 / sqrt(4)
    assert found.in_place == pytest.approx(share, abs=0.03)
    assert found.alignment == pytest.approx(1, abs=0.02)
    assert found.control < 0.01


def test_a_linear_map_undoes_an_order_and_entries_in_place_do_not():
    high = np.random.default_rng(0).normal(size=(200, 6))
    straight, reordered, flipped = (coherence(low, high, permutations=3) for low in (high, high[:, ::-1], -7 * high))
    assert straight.alignment > 0.99
    assert reordered.linear > 0.99
    assert reordered.alignment < 0.1
    assert coherence(7 * high + 1, high, permutations=3).in_place > 0.99  # a line undoes a scale
    assert flipped.linear > 0.99
    assert flipped.alignment < 0.01


def test_alignment_does_not_need_coupled_noise():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(400, 3))
    low, high = theta + rng.normal(size=(2, 400, 3))
    found, reordered = coherence(low, high), coherence(np.roll(low, 1, axis=1), high)
    assert found.in_place < 0.3
    assert found.alignment > 0.9
    assert reordered.alignment < 0.1


@pytest.mark.slow
def test_coherence_that_is_not_there():
    rng = np.random.default_rng(0)
    found = [coherence(*rng.normal(size=(2, 40, 3)), permutations=20, seed=seed) for seed in range(20)]
    assert sum(one.linear > one.control for one in found) <= 5
    assert all(one.alignment == 0 for one in found if one.linear <= one.control)


def test_coherence_of_other_shapes_of_constants_and_of_wide_outputs():
    rng = np.random.default_rng(0)
    high = rng.normal(size=(100, 4))
    wide = coherence(high @ rng.normal(size=(4, 300)), high, permutations=2)
    assert wide.linear > 0.98
    assert np.isnan(wide.in_place)
    assert np.isnan(wide.alignment)
    constant = np.concatenate([high, np.ones((100, 1))], 1)
    assert coherence(constant, constant).linear == pytest.approx(coherence(high, high).linear, abs=1e-9)
    factors = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 400))
    assert coherence(factors, factors[:, ::-1], permutations=2).linear > 0.98
    with pytest.raises(ValueError, match="every entry is constant"):
        coherence(high, 0 * high)


@pytest.mark.filterwarnings("ignore:Features")
def test_bad_inputs():
    theta, low, high = gaussian(30)
    for check in (lambda *x: mutual_information(*x, theta), coherence):
        with pytest.raises(ValueError, match=r"low of shape \(n, ...\), not empty; got \(30,\)"):
            check(low[:, 0], high)
        with pytest.raises(ValueError, match="30 and 29 rows"):
            check(low, high[:29])
        with pytest.raises(ValueError, match="at least 20 rows; got 19"):
            check(low[:19], high[:19])
        with pytest.raises(ValueError, match="finite high"):
            check(low, high * np.nan)
    with pytest.raises(ValueError, match="Expected theta"):
        mutual_information(low, high)
    with pytest.raises(ValueError, match="one theta a row; got 29 for 30"):
        mutual_information(low, high, theta[:29])
    with pytest.raises(ValueError, match="one size at both levels"):
        mutual_information(low, np.tile(high, 2), theta)
    with pytest.raises(ValueError, match=r"summary of shape \(30, k\)"):
        mutual_information(low, high, summary=lambda x: x[:3])
    with pytest.raises(ValueError, match="one shape for both levels"):
        mutual_information(low, np.tile(high, 2), summary=lambda x: x)
    with pytest.raises(ValueError, match="at least one permutation"):
        coherence(low, high, permutations=0)


def test_without_scikit_learn(monkeypatch):
    theta, low, high = gaussian(30)
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"mutual_information needs scikit-learn.*pip install mlsbi\[metrics\]"):
        mutual_information(low, high, theta)
    with pytest.raises(ImportError, match=r"coherence needs scikit-learn"):
        coherence(low, high)
