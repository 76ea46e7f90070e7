"""Sampling responses from the student."""

from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.rollout.generate import TransformersSampler

__all__ = ["Sampler", "SamplingSettings", "TransformersSampler"]
