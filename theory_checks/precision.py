r"""Distributions with all their numbers in float64."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

__all__ = ["in_float64"]


def in_float64(prior: Distribution) -> Distribution:
    r"""A copy whose parameters, and those of its parts, transforms and constraints, are float64.

    Some distributions round what they are given to the type of their parameters, or refuse another. Modules and other
    objects that a distribution of one's own may hold are shared with the original as they are.

    Example:
        >>> import torch
        >>> prior = torch.distributions.Gamma(torch.ones(1), torch.ones(1))
        >>> theta = torch.ones(1, dtype=torch.float64)
        >>> prior.log_prob(theta).dtype, in_float64(prior).log_prob(theta).dtype
        (torch.float32, torch.float64)
    """
    twin: Distribution = _twin(prior, {})
    return twin


def _twin(value: Any, twins: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_twin(one, twins) for one in value)
    if type(value) is dict:
        return {key: _twin(one, twins) for key, one in value.items()}
    if not isinstance(value, (Distribution, Transform, Constraint)):
        return value
    if id(value) not in twins:  # a transform and its inverse hold each other
        twin = object.__new__(type(value))
        twins[id(value)] = twin
        for key, one in vars(value).items():
            twin.__dict__[key] = None if isinstance(one, weakref.ref) else _twin(one, twins)
    return twins[id(value)]
