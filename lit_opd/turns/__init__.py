"""Conversations: environments that answer the student between its turns, and the sampler that plays them."""

from lit_opd.turns.environment import Answer, Environment, Episode, Response
from lit_opd.turns.sampler import TurnsSampler

__all__ = ["Answer", "Environment", "Episode", "Response", "TurnsSampler"]
