"""Sampling responses from the student."""

from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.rollout.budget import LengthBudget
from lit_opd.rollout.decoding.sampler import DecodeSampler
from lit_opd.rollout.engine import VLLMEngine
from lit_opd.rollout.generate import TransformersSampler
from lit_opd.rollout.nccl import NCCLTransfer
from lit_opd.rollout.partial import PartialSampler
from lit_opd.rollout.ratio_stop import RatioStop
from lit_opd.rollout.replay import ReplaySampler
from lit_opd.rollout.sync import AdapterEndpoint, ReloadEndpoint, RestartCommand, WeightSync
from lit_opd.rollout.vllm import VLLMSampler

__all__ = [
    "AdapterEndpoint",
    "DecodeSampler",
    "LengthBudget",
    "NCCLTransfer",
    "PartialSampler",
    "RatioStop",
    "ReloadEndpoint",
    "ReplaySampler",
    "RestartCommand",
    "Sampler",
    "SamplingSettings",
    "TransformersSampler",
    "VLLMEngine",
    "VLLMSampler",
    "WeightSync",
]
