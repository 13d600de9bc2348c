r"""How well two sets of draws can be told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import distance

from mlsbi.diagnostics.arrays import Array, as_two_sets
from mlsbi.randomness import check_seed

__all__ = ["c2st", "mmd"]


def c2st(
    reference: ArrayLike, samples: ArrayLike, *, seed: int = 0, folds: int = 5, classifier: Any = None
) -> float:
    r"""Cross-validated accuracy of a classifier that tells two sets of draws apart: 0.5 where it cannot, 1 at best.

    Both sets are standardised by the mean and standard deviation of the reference. Of sets of different sizes, the
    larger is cut to a random subset of the smaller's size, so that guessing gives 0.5; folds hold as many of each.
    With n draws left of each set, a calibrated score has a standard deviation of about :math:`1 / \sqrt{8 n}`.

    The classifier is a perceptron with two hidden layers of 10 D rectified units, fitted by Adam for at most 1000
    epochs, and stopped when its accuracy on a tenth of its training rows has not improved for 50: the setting of
    the `sbi` package. A classifier too weak, or draws too few, give a score nearer to 0.5.

    Args:
        reference: Draws from the right distribution, shape `(n, D)`.
        samples: Draws under test, shape `(m, D)`.
        seed: Seed of the subset, of the folds and of the default classifier.
        folds: Folds of the cross-validation, at least 2. Each set needs 10 draws a fold.
        classifier: A scikit-learn classifier, which is cloned for each fold; the perceptron when left out.

    Returns:
        Share of draws classified rightly, all folds together.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If shapes do not fit, something is not finite, there are too few draws, or a parameter of the
            reference is constant.

    References:
        | Revisiting classifier two-sample tests (Lopez-Paz and Oquab, 2017)
        | https://arxiv.org/abs/1610.06545

    Example:
        >>> rng = np.random.default_rng(0)
        >>> c2st(rng.normal(0.0, 1.0, (200, 1)), rng.normal(9.0, 1.0, (100, 1))) > 0.98
        True
    """
    try:
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError("c2st needs scikit-learn, which is not installed: pip install mlsbi[metrics]") from error
    if folds < 2:
        raise ValueError(f"Expected at least 2 folds; got {folds}.")
    right, tested = as_two_sets(reference, samples, least=10 * folds)
    ranges = np.ptp(right, axis=0)
    if not (ranges > 0).all():
        raise ValueError(f"Expected a reference that varies in every parameter; got ranges {ranges.tolist()}.")
    centre, width = right.mean(0), right.std(0)
    generator = np.random.default_rng(check_seed(seed))
    n, dim = min(len(right), len(tested)), right.shape[1]
    rows = np.concatenate([(_subset(one, n, generator) - centre) / width for one in (right, tested)])
    labels = np.repeat([0, 1], n)
    state = int(generator.integers(2**31))  # scikit-learn takes 32 bits
    if classifier is None:
        classifier = MLPClassifier((10 * dim, 10 * dim), activation="relu", solver="adam", max_iter=1000,
                                   early_stopping=True, n_iter_no_change=50, random_state=state)
    split = StratifiedKFold(folds, shuffle=True, random_state=state)
    return float((cross_val_predict(classifier, rows, labels, cv=split) == labels).mean())


def mmd(reference: ArrayLike, samples: ArrayLike, *, bandwidth: float | None = None, squared: bool = True) -> float:
    r"""Maximum mean discrepancy between two sets of draws, with the Gaussian kernel.

    .. math:: k(a, b) = \exp\left(-\frac{|a - b|^2}{2 h^2}\right), \qquad
        MMD^2 = E\, k(x, x') + E\, k(y, y') - 2 E\, k(x, y)

    Nothing is standardised: scale parameters of different units first, both sets alike. Scores compare only at one
    bandwidth. Time and memory grow with :math:`(n + m)^2`.

    Args:
        reference: Draws x, shape `(n, D)`.
        samples: Draws y, shape `(m, D)`.
        bandwidth: The kernel's h, in the unit of the draws; the median distance between any two of all n + m draws
            when left out.
        squared: Whether to return the unbiased estimate of the square (a U-statistic: no draw meets itself), which
            is about 0, above or below, where both distributions agree. If not, the square root of the biased
            estimate (a V-statistic, never below 0), which is positive even then.

    Raises:
        ValueError: If shapes do not fit, something is not finite, a set has fewer than 2 draws, the bandwidth is
            not positive, or the median distance is 0.

    References:
        | A kernel two-sample test (Gretton et al., 2012), lemma 6 and equation 5
        | https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> round(mmd([[0.0], [0.0]], [[1.0], [1.0]], bandwidth=1.0), 4)  # 2 - 2 exp(-1/2)
        0.7869
    """
    x, y = as_two_sets(reference, samples, least=2)
    n, m = len(x), len(y)
    within_x, within_y, between = (
        distance.pdist(x, "sqeuclidean"), distance.pdist(y, "sqeuclidean"), distance.cdist(x, y, "sqeuclidean")
    )  # fmt: skip
    if bandwidth is None:
        # The median of distances, not the root of that of squares: an even number of them has two in the middle.
        bandwidth = float(np.median(np.sqrt(np.concatenate([within_x, within_y, between.ravel()]))))
        if bandwidth == 0:
            raise ValueError("Expected draws that differ; their median distance is 0. Pass a bandwidth.")
    if not (np.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"Expected a positive bandwidth; got {bandwidth}.")
    kernel_x, kernel_y, kernel_xy = (
        np.exp(squares / (-2 * bandwidth**2)) for squares in (within_x, within_y, between)
    )
    if squared:
        return float(kernel_x.mean() + kernel_y.mean() - 2 * kernel_xy.mean())
    biased = (n + 2 * kernel_x.sum()) / n**2 + (m + 2 * kernel_y.sum()) / m**2 - 2 * kernel_xy.mean()
    return float(np.sqrt(max(biased, 0.0)))  # below 0 by rounding only


def _subset(draws: Array, n: int, generator: np.random.Generator) -> Array:
    return draws if len(draws) == n else draws[generator.choice(len(draws), n, replace=False)]
