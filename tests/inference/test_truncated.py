import json
import math

import pytest
import torch
from torch.distributions import Independent, Normal

from mlsbi import BoxPrior
from mlsbi.inference.truncated import Region, TruncatedPrior, TruncationError, density_region, truncate_prior
from mlsbi.priors import check_prior, sample_prior

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0], names=["rate", "shift"])


class Bell:
    """A normal posterior, not truncated to the prior's box, with exact draws and densities."""

    def __init__(self, mean, sd):
        self.law = Independent(Normal(torch.tensor(mean), torch.tensor(sd)), 1)

    def log_prob(self, theta):
        return self.law.log_prob(theta)

    def sample(self, shape, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.law.sample(shape)


class Pair:
    """The mixture of two normals, as an ensemble of two networks."""

    def __init__(self, *members):
        self.members = members

    def log_prob(self, theta):
        return torch.stack([member.log_prob(theta) for member in self.members]).logsumexp(0) - math.log(2)

    def sample(self, shape, seed):
        return torch.cat([member.sample((shape[0] // 2,), seed + index) for index, member in enumerate(self.members)])


def ball(mean, radius):
    """A disc about a mean."""
    bell, centre = Bell(mean, [1.0, 1.0]), torch.tensor(mean)
    return Region(bell, (-0.5 * radius**2 - math.log(2 * math.pi),), centre - 1.1 * radius, centre + 1.1 * radius)


def test_a_region_leaves_out_the_share_asked_for():
    bell = Bell([0.5, 0.0], [0.1, 0.2])
    region = density_region(bell, outside=0.05, draws=50_000, seed=0)
    fresh = bell.sample((50_000,), seed=1)
    # The density of a normal in two dimensions falls below its 5% quantile outside a radius of 2.448 sd.
    assert float((~region.holds(fresh)).double().mean()) == pytest.approx(0.05, abs=0.005)
    edge = torch.tensor([[0.5 + 0.1 * 2.40, 0.0], [0.5 + 0.1 * 2.50, 0.0]])
    assert region.holds(edge).tolist() == [True, False]
    assert region.holds(torch.zeros(0, 2)).shape == (0,)


def test_a_union_keeps_what_any_network_sees():
    """Of two networks one is too sure of itself; what the other leaves out is the share asked for, not twice that."""
    narrow, wide = Bell([0.5, 0.0], [0.02, 0.02]), Bell([0.5, 0.0], [0.1, 0.2])
    both = Pair(narrow, wide)
    fresh = wide.sample((50_000,), seed=1)
    union, mixture = (density_region(both, union=union, outside=0.05, draws=50_000, seed=0) for union in (True, False))
    assert float((~union.holds(fresh)).double().mean()) == pytest.approx(0.05, abs=0.005)
    assert float((~mixture.holds(fresh)).double().mean()) == pytest.approx(0.10, abs=0.01)
    # Two that see different places: both are in it.
    apart = density_region(Pair(Bell([0.2, 0.0], [0.01, 0.01]), Bell([0.8, 0.0], [0.01, 0.01])), union=True, seed=0)
    assert apart.holds(torch.tensor([[0.2, 0.0], [0.5, 0.0], [0.8, 0.0]])).tolist() == [True, False, True]
    truncated = truncate_prior(PRIOR, [union], seed=0)
    again = TruncatedPrior.from_settings(PRIOR, [both], json.loads(json.dumps(truncated.settings())))
    assert torch.equal(again.holds(fresh), union.holds(fresh))
    assert "|" in repr(again)


def test_draws_are_the_priors_inside():
    region = ball([0.5, 0.0], 0.3)
    truncated = truncate_prior(PRIOR, [region], seed=0)
    share = math.pi * 0.3**2 / 2
    assert not truncated.resampled
    assert truncated.share == pytest.approx(share, rel=0.2)
    assert truncated.acceptance == pytest.approx(math.pi / 4 / 1.21, rel=0.2)  # of the box about the disc
    draws = sample_prior(truncated, 20_000, seed=1)
    assert truncated.holds(draws).all()
    # Uniform in a disc: radius squared is uniform, and so is the angle.
    away = draws - torch.tensor([0.5, 0.0])
    ranks = (away.square().sum(1) / 0.09).sort().values
    grid = (torch.arange(20_000) + 0.5) / 20_000
    assert float((ranks - grid).abs().max()) < 1.63 / math.sqrt(20_000)  # KS, 1%
    assert float(away.mean(0).abs().max()) < 4 * 0.15 / math.sqrt(20_000)


def test_rows_of_an_earlier_round_that_lie_inside_have_the_law_of_new_ones():
    """What multilevel rounds rest on, and why regions are nested."""
    outer, inner = ball([0.5, 0.0], 0.4), ball([0.3, 0.0], 0.3)  # not inside the first by itself
    first = truncate_prior(PRIOR, [outer], seed=0)
    second = truncate_prior(PRIOR, [outer, inner], seed=0)
    old = sample_prior(first, 40_000, seed=1)
    old, new = old[second.holds(old)], sample_prior(second, 20_000, seed=2)
    assert outer.holds(new).all()
    assert inner.holds(new).all()
    error = (old.var(0) / len(old) + new.var(0) / len(new)).sqrt()
    assert float(((old.mean(0) - new.mean(0)) / error).abs().max()) < 4
    # The control: without nesting new rows lie where no old one can.
    alone = sample_prior(truncate_prior(PRIOR, [inner], seed=0), 20_000, seed=2)
    assert float(((old.mean(0) - alone.mean(0)) / error).abs().max()) > 20


def test_density_and_support():
    truncated = truncate_prior(PRIOR, [ball([0.5, 0.0], 0.3)], seed=0)
    points = torch.tensor([[[0.5, 0.0], [0.5, 0.31], [2.0, 0.0]]])
    log_prob = truncated.log_prob(points)
    assert log_prob.shape == (1, 3)
    assert log_prob[0, 0].exp() * math.pi * 0.09 == pytest.approx(1.0, rel=0.2)
    assert log_prob[0, 1:].tolist() == [-math.inf, -math.inf]
    assert truncated.names == ("rate", "shift")
    check_prior(truncated)
    assert "log q >= " in repr(truncated)
    assert truncated.sample().shape == (2,)
    assert truncated.sample((2, 3)).shape == (2, 3, 2)


def test_seeds_reproduce_and_leave_global_state():
    truncated = truncate_prior(PRIOR, [ball([0.5, 0.0], 0.3)], seed=0)
    state = torch.get_rng_state()
    first, again, other = (sample_prior(truncated, 50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_region_is_found_in_its_box():
    bell = Bell([0.5, 0.0], [0.001, 0.001])
    truncated = truncate_prior(PRIOR, [density_region(bell, outside=1e-3, draws=20_000, seed=0)], seed=0)
    assert not truncated.resampled
    radius = 0.001 * math.sqrt(2 * math.log(1e3))
    assert truncated.share == pytest.approx(math.pi * radius**2 / 2, rel=0.2)
    away = (sample_prior(truncated, 4000, seed=1) - torch.tensor([0.5, 0.0])) / radius
    assert float(away.square().sum(1).median()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))


class Wide(Independent):
    """A prior that is not a box: its draws are all that is proposed."""

    def __init__(self):
        super().__init__(Normal(torch.zeros(2), torch.ones(2)), 1, validate_args=False)


def test_other_priors_are_cut_too():
    prior, region = Wide(), ball([1.0, 0.0], 0.5)
    truncated = truncate_prior(prior, [region], seed=0)
    assert truncated.share == truncated.acceptance
    draws, drawn = sample_prior(truncated, 5000, seed=1), sample_prior(prior, 200_000, seed=2)
    kept = drawn[region.holds(drawn)]
    assert truncated.share == pytest.approx(len(kept) / len(drawn), rel=0.2)
    error = (draws.var(0) / len(draws) + kept.var(0) / len(kept)).sqrt()
    assert float(((draws.mean(0) - kept.mean(0)) / error).abs().max()) < 4


def test_what_cannot_be_found_is_resampled():
    prior, bell = Wide(), Bell([0.5, 0.0], [0.001, 0.001])
    region = density_region(bell, outside=1e-3, draws=20_000, seed=0)
    radius = 0.001 * math.sqrt(2 * math.log(1e3))
    truncated = truncate_prior(prior, [region], seed=0)
    assert truncated.resampled
    density = math.exp(-0.125) / (2 * math.pi)
    assert truncated.share == pytest.approx(density * math.pi * radius**2, rel=0.4)
    assert 1 <= truncated.effective < 256
    draws = sample_prior(truncated, 4000, seed=1)
    assert truncated.holds(draws).all()
    away = (draws - torch.tensor([0.5, 0.0])) / radius
    # Wider than the posterior's own (a median of .1), and not as wide as the truncated prior's (.5).
    assert 0.25 < float(away.square().sum(1).median()) < 0.55


def test_rounds_that_contradict_each_other_are_told():
    far = [density_region(Bell([0.2, 0.0], [1e-4, 1e-4]), draws=2000, seed=0),
           density_region(Bell([0.8, 0.0], [1e-4, 1e-4]), draws=2000, seed=0)]
    with pytest.raises(TruncationError, match="contradict each other"):
        truncate_prior(PRIOR, far, seed=0)


def test_draws_that_never_come_are_told():
    nothing = ball([5.0, 5.0], 0.1)
    with pytest.raises(TruncationError, match="lie in the truncated prior"):
        TruncatedPrior(PRIOR, [nothing], share=0.5, acceptance=0.5).sample((10,))
    with pytest.raises(TruncationError, match="Nearly no draw"):
        TruncatedPrior(PRIOR, [nothing], share=0.5, acceptance=0.5, resampled=True).sample((1,))


def test_it_is_kept_as_json_and_read_back():
    bell = Bell([0.5, 0.0], [0.1, 0.2])
    regions = [density_region(bell, outside=outside, draws=5000, seed=0) for outside in (1e-3, 1e-2)]
    truncated = truncate_prior(PRIOR, regions, seed=0)
    again = TruncatedPrior.from_settings(PRIOR, [bell, bell], json.loads(json.dumps(truncated.settings())))
    assert torch.equal(sample_prior(truncated, 50, seed=1), sample_prior(again, 50, seed=1))
    assert (again.share, repr(again)) == (truncated.share, repr(truncated))
