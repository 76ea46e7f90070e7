"""Log-probabilities of given tokens without a [B, T, V] tensor."""

from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head

__all__ = ["Head", "ScoringModel"]
