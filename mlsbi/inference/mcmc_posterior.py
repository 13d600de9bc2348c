r"""Posteriors that are known up to a factor, sampled by MCMC."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.inference.ascent import climb
from mlsbi.inference.convergence import Convergence
from mlsbi.inference.ensemble import run_emcee
from mlsbi.inference.evidence import Evidence, fewest_draws, log_evidence
from mlsbi.inference.hmc import run_hmc
from mlsbi.inference.importance import Resampling, Sample, run_importance
from mlsbi.inference.mcmc import Chain, start_points, thin
from mlsbi.inference.observations import read_length, read_set, read_sets, read_theta
from mlsbi.priors import Unbounded, in_support, parameter_names, sample_prior
from mlsbi.randomness import child_seed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MCMCOptions", "MCMCPosterior"]

_CHUNK = 1 << 16  # outputs evaluated at once
_EMCEE_LIMIT = 10  # parameters; random-walk moves slow down with more
_IMPORTANCE_LIMIT = 6  # parameters; proposals miss more and more of the mass with more
_PRIOR_DRAWS = 10_000
_BATCH_PRIOR_DRAWS = 1000  # per observation of a batch
_ASCENTS = 16
_BATCH_STARTS = 300
_BATCH_STEPS = 2000


@dataclass(frozen=True)
class MCMCOptions:
    r"""How a posterior is sampled.

    Args:
        method: `"emcee"`, an ensemble of walkers with differential evolution moves; `"hmc"`, Hamiltonian Monte Carlo
            with gradients; `"importance"`, weighted proposals that close in on the posterior. `"auto"`: for one
            observation emcee up to 10 parameters, for many at once importance sampling up to 6, HMC beyond.
        walkers: Walkers of emcee, 4 per parameter and at least 64 when left out; HMC has a chain for every eight.
        effective: Effective draws of every parameter to reach, at least as many as are asked for up to 1000.
        max_steps: Steps of each walker at most; HMC on many observations takes no more than 2000.
        prior_draws: Prior draws of which the starting points are chosen; when left out 10 000, and 1000 for each of
            many observations at once.

    Raises:
        ValueError: If a choice is unknown or a number too small.
    """

    method: Literal["auto", "emcee", "hmc", "importance"] = "auto"
    walkers: int | None = None
    effective: int = 400
    max_steps: int = 10_000
    prior_draws: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("auto", "emcee", "hmc", "importance"):
            raise ValueError(f'Expected method "auto", "emcee", "hmc" or "importance"; got {self.method!r}.')
        numbers = (self.effective, self.max_steps, self.prior_draws, self.walkers)
        if min(number for number in numbers if number is not None) < 1:
            raise ValueError(f"Expected positive numbers of walkers, draws and steps; got {self}.")


class MCMCPosterior:
    r"""The posterior of m independent observations under a likelihood, known up to a factor.

    Chains run in unbounded space, so no draw leaves the prior's support. They start from prior draws re-weighted by
    the likelihood. After sampling, `convergence` says how far the draws can be relied on; a chain that has not
    converged also warns. `normaliser` is the last one estimated, with its errors.

    Args:
        likelihood: Log density `(n,)` of outputs x `(n, ...)`, each given its theta `(n, D)`, all on the CPU;
            impossible combinations may be `-inf`. HMC needs it differentiable in theta.
        prior: The prior.
        x_shape: Shape of one output.
        x: Default observations, shape `(m, ...)`, or one of shape `(...)`.
        mcmc: How to sample.

    Raises:
        ValueError: If the observations do not have the shape of the outputs, there is none, or they are not finite.
    """

    def __init__(
        self,
        likelihood: Callable[[Tensor, Tensor], Tensor],
        prior: Distribution,
        x_shape: tuple[int, ...],
        x: Any = None,
        *,
        mcmc: MCMCOptions | None = None,
    ) -> None:
        self.likelihood = likelihood
        self.prior = prior
        self.mcmc = mcmc if mcmc is not None else MCMCOptions()
        self.convergence: tuple[Convergence | Resampling, ...] = ()
        self.normaliser: Evidence | None = None
        self._x_shape = tuple(x_shape)
        self._unbounded = Unbounded(prior)
        self._inside = sample_prior(prior, 1, seed=0)[0]
        self.x: Tensor | None = None if x is None else read_set(x, self._x_shape)

    def set_default_x(self, x: Any) -> MCMCPosterior:
        """Sets the observations that calls without `x` use; returns the posterior."""
        self.x = read_set(x, self._x_shape)
        return self

    def sample(
        self, sample_shape: Sequence[int] = (1,), x: Any = None, seed: int | None = None, *, progress: bool = False
    ) -> Tensor:
        r"""Draws from the posterior of one set of observations.

        Args:
            sample_shape: `(n,)`.
            x: Observations `(m, ...)` or one `(...)`; the default ones when left out.
            seed: Seed of the chain; a fresh one when left out. Global random states are left as found.
            progress: Whether to show a progress bar.

        Returns:
            Parameters, shape `(n, D)`. They are spread over a chain, so n draws may hold less than n independent
            ones; `convergence` tells.

        Raises:
            ValueError: If no prior draw has a finite likelihood, so that the chain cannot start.
        """
        return self._sample(read_length(sample_shape), self._observation(x), seed, progress=progress)[:, 0]

    def sample_batched(
        self, sample_shape: Sequence[int], x: Any, seed: int | None = None, *, progress: bool = False
    ) -> Tensor:
        """Draws `(n, B, D)` given sets of observations x `(B, m, ...)`, or single ones `(B, ...)`.

        All are sampled together until the last one is done, so a seed gives the same draws for the same batch only.
        """
        return self._sample(read_length(sample_shape), read_sets(x, self._x_shape), seed, progress=progress)

    @torch.no_grad()
    def log_prob(self, theta: Any, x: Any = None) -> Tensor:
        """Log of prior times likelihood at theta `(n, D)` or `(D,)`, shape `(n,)`, *not normalised* over theta.

        It is `-inf` outside the prior's support; `log_normaliser` estimates what is missing.
        """
        points = torch.as_tensor(theta, dtype=torch.get_default_dtype())
        points = points[None] if points.ndim == 1 else points
        return self._log_prob_sets(points[:, None], self._observation(x))[:, 0]

    @torch.no_grad()
    def log_prob_batched(self, theta: Any, x: Any) -> Tensor:
        """As `log_prob`, of theta `(n, B, D)` (or `(n, 1, D)`) given sets x `(B, m, ...)`, shape `(n, B)`."""
        return self._log_prob_sets(theta, read_sets(x, self._x_shape))

    def log_normaliser(self, x: Any, *, draws: Tensor | None = None, seed: int = 0) -> Tensor:
        r"""Log of the integral over theta of prior times likelihood, shape `(B,)`, by importance sampling.

        Args:
            x: Sets of observations, shape `(B, m, ...)`, or single ones `(B, ...)`.
            draws: Posterior draws `(n, B, D)` that show where the mass is; made here when left out or too few.
            seed: Seed of the proposals.
        """
        return self.evidence(x, draws=draws, seed=seed).value.float()

    @torch.no_grad()
    def evidence(self, x: Any, *, draws: Tensor | None = None, seed: int = 0) -> Evidence:
        """As `log_normaliser`, with its standard error and the effective number of proposals, each `(B,)`."""
        sets = read_sets(x, self._x_shape)
        needed = max(400, fewest_draws(self.prior.event_shape[0]))
        if draws is None or len(draws) < needed:
            draws = self._sample(needed, sets, child_seed(seed, 0), progress=False)
        self.normaliser = log_evidence(lambda z: self._log_target(z, sets), self._unbounded.to(draws),
                                       seed=child_seed(seed, 1))
        return self.normaliser

    def map(self, x: Any = None, *, seed: int = 0, steps: int = 200) -> Tensor:
        r"""The parameters of highest posterior density, shape `(D,)`.

        Args:
            x: Observations; the default ones when left out.
            seed: Seed of the prior draws, of which the best 16 start an ascent.
            steps: Steps of the ascent.
        """
        sets = self._observation(x)
        draws = sample_prior(self.prior, max(self.mcmc.prior_draws or _PRIOR_DRAWS, _ASCENTS), seed=child_seed(seed))
        with torch.no_grad():
            best = self._log_prob_sets(draws[:, None], sets)[:, 0].topk(_ASCENTS)
        if not bool(best.values[0] > -torch.inf):
            raise ValueError("No prior draw has a finite likelihood: there is nowhere to climb from. Check that the "
                             "observation is like the training outputs.")
        start = draws[best.indices]

        def density(z: Tensor) -> Tensor:
            theta = self._unbounded.back(z)
            return self.prior.log_prob(theta) + self._log_likelihood(theta[:, None], sets)[:, 0]

        found = self._unbounded.back(climb(density, self._unbounded.to(start), steps=steps))
        candidates = torch.cat([start, found])
        with torch.no_grad():
            return candidates[self._log_prob_sets(candidates[:, None], sets)[:, 0].argmax()]

    def to_frame(self, n: int = 1000, x: Any = None, seed: int | None = None) -> pd.DataFrame:
        """Draws as a table with one named column per parameter."""
        import pandas as pd  # slow to import, and little else here needs it

        return pd.DataFrame(self.sample((n,), x, seed).numpy(), columns=list(parameter_names(self.prior)))

    def _sample(self, n: int, sets: Tensor, seed: int | None, *, progress: bool) -> Tensor:
        method = self._method(len(sets))
        if method == "importance":
            sample = self._run_importance(sets, child_seed(seed, 2), n)
            self._report(sample.convergence, len(sets))
            return self._unbounded.back(sample.draws)
        if method == "hmc":
            chain = self._run_hmc(sets, child_seed(seed, 0), n, progress=progress)
            self._report(chain.convergence, len(sets))
            return self._unbounded.back(thin(chain, n))
        chains = [self._run_emcee(sets[index:index + 1], child_seed(seed, 1, index), n, progress=progress)
                  for index in range(len(sets))]
        self._report([chain.convergence[0] for chain in chains], len(sets))
        return self._unbounded.back(torch.cat([thin(chain, n) for chain in chains], 1))

    def _method(self, batch: int) -> str:
        if self.mcmc.method != "auto":
            return self.mcmc.method
        dim = self.prior.event_shape[0]
        if batch == 1:
            return "emcee" if dim <= _EMCEE_LIMIT else "hmc"
        return "importance" if dim <= _IMPORTANCE_LIMIT else "hmc"

    def _report(self, found: Sequence[Convergence | Resampling], batch: int) -> None:
        self.convergence = tuple(found)
        failed = [one.warning for one in found if one.warning is not None]
        if failed:
            which = "" if batch == 1 else f" {len(failed)} of {batch} chains; the first:"
            warnings.warn(f"MCMC has not converged.{which} {failed[0]}", UserWarning, stacklevel=4)

    def _run_emcee(self, sets: Tensor, seed: int, n: int, *, progress: bool) -> Chain:
        walkers = self.mcmc.walkers or max(64, 4 * self.prior.event_shape[0])
        start = self._starts(sets, walkers, seed)[0]

        @torch.no_grad()
        def target(z: Tensor) -> Tensor:
            return self._log_target(z[:, None], sets)[:, 0]

        return run_emcee(target, start, effective=self._enough(n), least=n, max_steps=self.mcmc.max_steps,
                         seed=child_seed(seed, 2), progress=progress)

    def _run_hmc(self, sets: Tensor, seed: int, n: int, *, progress: bool) -> Chain:
        chains = max(16, (self.mcmc.walkers or 0) // 8)
        start = self._starts(sets, chains, seed)
        # All of a batch go on until the last one is done: one that is stuck should not hold up the others for long.
        most = self.mcmc.max_steps if len(sets) == 1 else min(self.mcmc.max_steps, _BATCH_STEPS)
        return run_hmc(lambda z: self._log_target(z.transpose(0, 1), sets).T, start, effective=self._enough(n),
                       least=n, max_steps=most, seed=child_seed(seed, 2), progress=progress)

    @torch.no_grad()
    def _run_importance(self, sets: Tensor, seed: int, n: int) -> Sample:
        start = self._starts(sets, _BATCH_STARTS, seed)
        return run_importance(lambda z: self._log_target(z, sets), start.transpose(0, 1), n,
                              effective=self._enough(n), seed=child_seed(seed, 2))

    def _enough(self, n: int) -> int:
        return max(self.mcmc.effective, min(n, 1000))

    @torch.no_grad()
    def _starts(self, sets: Tensor, count: int, seed: int) -> Tensor:
        """Starting points `(B, count, D)` in unbounded space."""
        draws = self.mcmc.prior_draws or (_PRIOR_DRAWS if len(sets) == 1 else _BATCH_PRIOR_DRAWS)
        theta = sample_prior(self.prior, draws, seed=child_seed(seed, 0))
        value = self._log_likelihood(theta[:, None].expand(-1, len(sets), -1), sets)
        return start_points(self._unbounded.to(theta), value, count, seed=child_seed(seed, 1))

    def _log_target(self, z: Tensor, sets: Tensor) -> Tensor:
        """Unnormalised log density of unbounded z `(n, B, D)` given sets `(B, m, ...)`, shape `(n, B)`."""
        theta = self._unbounded.back(z)
        inside = in_support(self.prior, theta)  # rounding can put a point on an edge that does not belong to it
        theta = torch.where(inside[..., None], theta, self._inside.to(theta))
        value = self.prior.log_prob(theta) + self._unbounded.log_abs_det(z, theta)
        return torch.where(inside, value + self._log_likelihood(theta, sets), -torch.inf)

    def _log_prob_sets(self, theta: Any, sets: Tensor) -> Tensor:
        points = read_theta(theta, len(sets), self.prior.event_shape[0])
        inside = in_support(self.prior, points)
        points = torch.where(inside[..., None], points, self._inside)
        value = self.prior.log_prob(points) + self._log_likelihood(points, sets)
        return torch.where(inside, value, -torch.inf)

    def _log_likelihood(self, theta: Tensor, sets: Tensor) -> Tensor:
        """Sum of the outputs' log densities, shape `(n, B)`, at theta `(n, B, D)`; NaN counts as `-inf`."""
        batch, m = sets.shape[:2]
        parts = []
        for points in theta.split(max(1, _CHUNK // (batch * m))):
            rows = points[:, :, None].expand(-1, -1, m, -1).reshape(-1, theta.shape[-1])
            x = sets.expand(len(points), *sets.shape).reshape(-1, *self._x_shape)
            parts.append(self.likelihood(x, rows).reshape(len(points), batch, m).sum(-1))
        value = torch.cat(parts)
        return value.masked_fill(value.isnan(), -torch.inf)

    def _observation(self, x: Any) -> Tensor:
        if x is None:
            if self.x is None:
                raise ValueError("No observation: pass x, or set one with posterior.set_default_x(x_o).")
            return self.x
        return read_set(x, self._x_shape)

    def __repr__(self) -> str:
        given = "no observation set" if self.x is None else f"given {self.x.shape[1]} x of shape {self._x_shape}"
        return f"MCMCPosterior({', '.join(parameter_names(self.prior))}; {given}; not normalised)"
