r"""What the outputs of two levels have in common: information about theta, and the form it comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.diagnostics.arrays import Array, as_finite
from mlsbi.randomness import check_seed

__all__ = ["FEWEST", "Coherence", "MutualInformation", "coherence", "mutual_information"]

FEWEST = 20
"""Rows below which nothing is said."""

_FOLDS = 5
_SPLITS = 5  # ways to cut the folds of a summary
_STRENGTHS = np.logspace(-2, 4, 13)  # of ridge regression, on standardised columns
_COMPONENTS = 10  # of x in a summary; with their squares and products 65 columns
_READING = 2  # place of the cheap level's reading of the other output
_QUANTILE = 0.95  # of what permuted rows give


@dataclass(frozen=True, eq=False)
class MutualInformation:
    r"""What two levels know together about theta, in nats; estimates of n rows, never below 0.

    Args:
        values: For each parameter, or each column of the user's summary, shape `(k,)`.
        control: What the mean of `values` stays below in 95% of cases where rows are permuted, so that there is
            nothing to find.
        carried: As `values`, where the summary fitted to the cheap level reads both outputs, as a network does that
            was trained there and is not tuned yet; 0 where it then reads the other output the wrong way round. Shape
            `(k,)`.
        carried_control: The same of `carried` as `control` of `values`.
    """

    values: Array
    control: float
    carried: Array
    carried_control: float

    @property
    def mean(self) -> float:
        """Mean over summaries, in nats."""
        return float(self.values.mean())

    @property
    def mean_carried(self) -> float:
        """Mean of `carried` over summaries, in nats."""
        return float(self.carried.mean())


@dataclass(frozen=True)
class Coherence:
    r"""How much of one level's output another's explains, as shares of its variance on rows left out of the fit.

    Args:
        linear: By the best linear map of the whole output.
        control: What `linear` stays below in 95% of cases where rows are permuted.
        in_place: By a line through the same entry of the other output, rising or level, so that an entry of the other
            sign explains nothing; NaN where shapes differ.
    """

    linear: float
    control: float
    in_place: float

    @property
    def alignment(self) -> float:
        """Part of what a linear map finds that is already in place, 0 to 1; 0 where it finds nothing above control.

        It is small where entries are reordered, mixed or of the other sign, which a network has to unlearn, and says
        nothing of how strongly the levels are coupled. NaN where shapes differ.
        """
        if np.isnan(self.in_place):
            return float("nan")
        if self.linear <= self.control:
            return 0.0
        return min(max(self.in_place, 0.0) / self.linear, 1.0)


def mutual_information(
    low: ArrayLike, high: ArrayLike, theta: ArrayLike | None = None, *,
    summary: Callable[[Array], ArrayLike] | None = None,
    permutations: int = 20, seed: int = 0,
) -> MutualInformation:  # fmt: skip
    r"""Mutual information between summaries of two levels' outputs at the same theta, with independent noise.

    With the same noise in both it would be infinite where levels agree. Being no more than what either level knows
    of theta, it is small where the cheap one is too noisy to learn from. It is estimated from distances to nearest
    neighbours, for one summary at a time.

    Without a summary of yours, each level has its own: a prediction of each parameter from x, by ridge regression on
    the first ten principal components, with their squares and products or without, whichever and of whatever
    strength cross-validation finds best for that parameter, for rows that it was not fitted to; five times, on other
    folds, and the information averaged. Predictions of a parameter that x does not tell share what x tells of others,
    so that information counts only as far as each prediction has as much about the parameter itself. x should have no
    heavy tails then. Few rows find less than there is: of ten outputs that are theta and noise, with 2.0 nats, 1.1 at
    n = 20, 1.5 at 40, 1.7 at 64 and 1.9 at 100; what only squares tell needs about 100.

    Args:
        low: Outputs of the cheap level, shape `(n, ...)`, n at least 20.
        high: Outputs of the other level, shape `(n, ...)`; each row at the theta of the same row of `low`, with
            noise of its own.
        theta: Parameters, shape `(n, D)`; only without a summary. What a line can predict is best, such as unbounded
            coordinates where the prior has long tails.
        summary: `summary(x) -> (n, k)`, used for both levels.
        permutations: Permutations of rows that `control` is taken from.
        seed: Seed of the folds and permutations.

    Returns:
        Information per parameter, or per column of `summary`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If rows do not match, are too few or not finite, or theta is missing.

    References:
        | Estimating mutual information (Kraskov, Stoegbauer and Grassberger, 2004), by scikit-learn
        | https://doi.org/10.1103/PhysRevE.69.066138

    Example:
        >>> rng = np.random.default_rng(0)
        >>> theta = rng.normal(size=(500, 1))
        >>> low, high = theta + 0.5 * rng.normal(size=(2, 500, 1))  # correlation 0.8
        >>> found = mutual_information(low, high, theta)
        >>> bool(abs(found.mean - -0.5 * np.log(1 - 0.8**2)) < 0.1)
        True
    """
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError as error:
        raise _missing("mutual_information") from error
    rng, state = _randomness(seed, permutations)
    x_low, x_high = _as_rows(low, high)
    # In each: the cheap level's summary of its own output, the other's of its own, and the cheap level's of that.
    if summary is not None:
        mine, other = (_apply(summary, x) for x in (np.asarray(low), np.asarray(high)))
        if mine.shape != other.shape:
            raise ValueError(f"Expected summaries of one shape for both levels; got {mine.shape} and {other.shape}.")
        splits, goal = [(mine, other, other)], None
    else:
        if theta is None:
            raise ValueError("Expected theta, which outputs are summarised as predictions of; or pass a summary.")
        parameters = as_finite(theta, "theta", ("n", "D"))
        if len(parameters) != len(x_low):
            raise ValueError(f"Expected one theta a row; got {len(parameters)} for {len(x_low)} rows.")
        if x_low.shape != x_high.shape:
            raise ValueError(f"Expected outputs of one size at both levels; got {x_low.shape[1]} and "
                             f"{x_high.shape[1]} numbers a row. Pass a summary.")
        splits = [_predict_left_out(x_low, x_high, parameters, state + i) for i in range(_SPLITS)]
        goal = parameters

    def information(one: Array, two: Array) -> Array:
        return np.array([mutual_info_regression(one[:, j : j + 1], two[:, j], random_state=state)[0]
                         for j in range(one.shape[1])])

    most = [np.array([np.full(each.shape[1], np.inf) if goal is None else information(each, goal) for each in split])
            for split in splits]

    def shared(place: int, order: Array | slice = slice(None)) -> Array:
        """Of the cheap level's summary, its rows in some order, and another; mean over splits."""
        found = []
        for split, bound in zip(splits, most, strict=True):
            one, two = split[0][order], split[place]
            least = np.minimum.reduce([information(one, two), bound[0], bound[place]])
            # Information has no sign, but a network that takes large for small is not helped by it.
            found.append(least * (_covariances(one, two) > 0) if place == _READING else least)
        return np.mean(found, 0)

    orders = [rng.permutation(len(x_low)) for _ in range(permutations)]
    controls = [float(np.quantile([shared(place, order).mean() for order in orders], _QUANTILE))
                for place in (1, _READING)]
    return MutualInformation(shared(1), controls[0], shared(_READING), controls[1])


def coherence(low: ArrayLike, high: ArrayLike, *, permutations: int = 20, seed: int = 0) -> Coherence:
    r"""How much of `high` a linear map of `low` explains, and how much each entry of `low` explains of the same entry.

    Shares of variance, on rows that the map was not fitted to, mean over the entries of `high` that vary; 1 at best,
    and below 0 where the mean of `high` would be nearer. A linear map undoes any reordering and mixing of entries,
    so it sees the coupling only. Where it explains more than entries do in place, a fixed linear map of the cheap
    output, fitted on other rows, makes a better level of it.

    Args:
        low: Outputs of the cheap level, shape `(n, ...)`, n at least 20.
        high: Outputs of the other level at the same theta and noise, shape `(n, ...)`.
        permutations: Permutations of rows that `control` is taken from.
        seed: Seed of the folds and permutations.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If rows do not match, are too few or not finite, or nothing in `high` varies.

    Example:
        >>> high = np.random.default_rng(0).normal(size=(100, 6))
        >>> reordered = coherence(high[:, ::-1], high)
        >>> bool(reordered.linear > 0.99), bool(reordered.in_place < 0.1)
        (True, True)
    """
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise _missing("coherence") from error
    rng, state = _randomness(seed, permutations)
    x_low, x_high = _as_rows(low, high)
    varies = np.ptp(x_high, axis=0) > 0
    if not varies.any():
        raise ValueError("Expected outputs of the finer level that vary; every entry is constant.")
    same_shape = np.shape(low) == np.shape(high)
    fine = StandardScaler().fit_transform(x_high[:, varies])
    left, widths, _ = np.linalg.svd(fine, full_matrices=False)
    turned = left * widths  # as far apart as before, so with the same errors, and narrow where outputs are wide
    orders = [np.arange(len(fine)), *(rng.permutation(len(fine)) for _ in range(permutations))]
    errors, totals = np.zeros(len(orders)), np.zeros(len(orders))
    missed = 0.0
    for train, test in _split(len(fine), state):
        # With all components kept this is a rotation, which ridge regression does not see; wide outputs get narrow.
        rotate = _components(x_low[train])
        known, unknown = rotate(x_low[train]), rotate(x_low[test])
        for place, order in enumerate(orders):
            goal, truth = turned[order[train]], turned[order[test]]
            found = RidgeCV(_STRENGTHS).fit(known, goal).predict(unknown).reshape(truth.shape)
            errors[place] += ((truth - found) ** 2).sum()
            totals[place] += ((truth - goal.mean(0)) ** 2).sum()
        if same_shape:
            missed += _miss_in_place(x_low[:, varies], fine, train, test)
    shares = 1 - errors / totals
    in_place = 1 - missed / float(totals[0]) if same_shape else float("nan")
    return Coherence(float(shares[0]), float(np.quantile(shares[1:], _QUANTILE)), in_place)


def _miss_in_place(low: Array, high: Array, train: Array, test: Array) -> float:
    """Squared errors of a rising line from each entry to the same entry, summed over rows left out."""
    centre, goal = low[train].mean(0), high[train].mean(0)
    spread = ((low[train] - centre) ** 2).sum(0)
    common = ((low[train] - centre) * (high[train] - goal)).sum(0)
    slope = np.maximum(common, 0) / np.where(spread > 0, spread, 1.0)
    return float(((high[test] - goal - slope * (low[test] - centre)) ** 2).sum())


def _predict_left_out(low: Array, high: Array, theta: Array, state: int) -> tuple[Array, Array, Array]:
    """What one level's output says of theta, the other's of the same rows, and the first's reading of the second."""
    found = tuple(np.empty(theta.shape) for _ in range(3))
    for train, test in _split(len(theta), state):  # a row's theta must be unknown to the summaries of both levels
        cheap, fine = (_fit_summary(x[train], theta[train]) for x in (low, high))
        for place, summary, x in zip(found, (cheap, fine, cheap), (low, high, high), strict=True):
            place[test] = summary(x[test])
    return found[0], found[1], found[2]


def _fit_summary(x: Array, theta: Array) -> Callable[[Array], Array]:
    """Predicts theta from x, in the mean and spread of the rows fitted to.

    Those differ from fold to fold, alike for both levels, which would be taken for information.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    rotate = _components(x, most=_COMPONENTS)
    # One strength for 65 columns hides what ten of them tell: each parameter has the squares it can afford, or none.
    models = [make_pipeline(PolynomialFeatures(degree, include_bias=False), StandardScaler(),
                            RidgeCV(_STRENGTHS, alpha_per_target=True)).fit(rotate(x), theta) for degree in (1, 2)]
    best = np.argmax([np.reshape(model[-1].best_score_, -1) for model in models], axis=0)

    def predict(rows: Array) -> Array:
        found = np.stack([model.predict(rotate(rows)).reshape(len(rows), -1) for model in models])
        return np.asarray(found[best, :, np.arange(len(best))].T)

    fitted = predict(x)
    centre, width = fitted.mean(0), fitted.std(0)
    width = np.where(width > 0, width, 1.0)
    return lambda rows: (predict(rows) - centre) / width


def _covariances(one: Array, two: Array) -> Array:
    """Of each column with the same column."""
    return np.asarray(((one - one.mean(0)) * (two - two.mean(0))).mean(0))


def _components(x: Array, most: int | None = None) -> Callable[[Array], Array]:
    """The first principal components of x, each entry in its own spread; constant entries are left out of them."""
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(x)
    basis = np.linalg.svd(scale.transform(x), full_matrices=False)[2][:most].T
    return lambda rows: scale.transform(rows) @ basis


def _split(n: int, state: int) -> list[tuple[Array, Array]]:
    from sklearn.model_selection import KFold

    return list(KFold(_FOLDS, shuffle=True, random_state=state).split(np.empty(n)))


def _apply(summary: Callable[[Array], ArrayLike], x: Array) -> Array:
    found = as_finite(summary(x), "summaries", ("n", "k"))
    if len(found) != len(x):
        raise ValueError(f"Expected a summary of shape ({len(x)}, k), one row per row of x; got {found.shape}.")
    return found


def _as_rows(low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    """Both outputs as finite matrices, with the same number of rows."""
    rows: list[Any] = []
    for name, values in (("low", low), ("high", high)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim < 2 or array.size == 0:
            raise ValueError(f"Expected {name} of shape (n, ...), not empty; got {array.shape}. Pass x[:, None] where "
                             "an output is one number.")
        rows.append(as_finite(array.reshape(len(array), -1), name, ("n", "outputs")))
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"Expected one row of each level per theta; got {len(rows[0])} and {len(rows[1])} rows.")
    if len(rows[0]) < FEWEST:
        raise ValueError(f"Expected at least {FEWEST} rows; got {len(rows[0])}. Take more pilot rows.")
    return rows[0], rows[1]


def _randomness(seed: int, permutations: int) -> tuple[np.random.Generator, int]:
    if permutations < 1:
        raise ValueError(f"Expected at least one permutation; got {permutations}.")
    rng = np.random.default_rng(check_seed(seed))
    return rng, int(rng.integers(2**31))  # scikit-learn takes 32 bits


def _missing(name: str) -> ImportError:
    return ImportError(f"{name} needs scikit-learn, which is not installed: pip install mlsbi[metrics]")
