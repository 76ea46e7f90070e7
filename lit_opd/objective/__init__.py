"""From weighted signals to one scalar."""

from lit_opd.objective.aggregation import Aggregation, aggregate, denominator
from lit_opd.objective.base import Objective, TokenLoss
from lit_opd.objective.divergence import Divergence
from lit_opd.objective.likelihood import Likelihood
from lit_opd.objective.policy import PolicyLoss

__all__ = [
    "Aggregation",
    "Divergence",
    "Likelihood",
    "Objective",
    "PolicyLoss",
    "TokenLoss",
    "aggregate",
    "denominator",
]
