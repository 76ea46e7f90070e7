"""A teacher in this process."""

from __future__ import annotations

from typing import Any

import torch

from lit_opd.models import Dtype, load_causal_lm, load_config, load_tokenizer
from lit_opd.scoring import Head, ScoringModel
from lit_opd.sharding import shard
from lit_opd.teacher.base import Teacher
from lit_opd.types import Rollout, TokenScores

FIELD = "model.teacher.path"


class LocalTeacher(Teacher):
    """A frozen causal language model loaded beside the student.

    Args:
        path: a Hugging Face folder or hub id.
        dtype: of its weights; bfloat16 halves the memory and moves log-probs by about 0.01 nats.
        attn_implementation: as for the student.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the model's own Python code; off unless you trust its author.
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        attn_implementation: str = "sdpa",
        pad_token: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.dtype, self.attn_implementation = path, dtype, attn_implementation
        self.pad_token, self.trust_remote_code = pad_token, trust_remote_code
        self.policy: ScoringModel | None = None

    @property
    def provides(self) -> frozenset[str]:
        """Everything that needs the full distribution."""
        return frozenset({"teacher_entropy", "token_kl", "teacher_topk"})

    def tokenizers(self) -> list[Any]:
        """This model's tokenizer and embedding rows."""
        config = load_config(self.path, FIELD, trust_remote_code=self.trust_remote_code)
        pad = self.pad_token
        tokenizer = load_tokenizer(self.path, FIELD, pad_token=pad, trust_remote_code=self.trust_remote_code)
        return [(tokenizer, config.get_text_config().vocab_size)]

    def load(self, *, vocabulary: int) -> None:
        """Load, freeze and check the weights."""
        if self.policy is not None:
            return
        model = load_causal_lm(
            self.path,
            FIELD,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        self.policy = ScoringModel(model, vocabulary=vocabulary)
        self.policy.choose_path("teacher")
        self.policy.requires_grad_(False)
        self.policy.eval()

    def shard(self, mesh: Any) -> None:
        """Shard the weights over a device mesh."""
        shard(self._loaded(), mesh)

    def train(self, mode: bool = True) -> LocalTeacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs (and entropy where required), [B, T] nats."""
        wants = frozenset({"entropy"}) if "teacher_entropy" in requires else frozenset()
        scores, _ = self._loaded()(rollout, temperature=temperature, wants=wants, own_template=True)
        return scores

    @torch.no_grad()
    def full_head(self, rollout: Rollout) -> Head:
        """Hidden states [N, H] and head of the valid tokens."""
        return self._loaded().head(rollout, own_template=True)

    def _loaded(self) -> ScoringModel:
        if self.policy is None:
            raise RuntimeError("LocalTeacher.load has not been called")
        return self.policy
