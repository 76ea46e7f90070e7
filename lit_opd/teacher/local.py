"""A teacher in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lit_opd.models import Dtype, load_causal_lm, load_config, load_tokenizer
from lit_opd.scoring import Head, ScoringModel
from lit_opd.sharding import Placement, gathered, is_sharded
from lit_opd.teacher.base import Teacher
from lit_opd.types import Rollout, TokenScores

# name in a signal's requirements -> name in the model's forward
_WANTS = {"teacher_entropy": "entropy", "teacher_topk": "topk"}


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
        return frozenset({"teacher_entropy", "teacher_topk", "token_kl", "teacher_distribution"})

    def tokenizers(self) -> list[Any]:
        """This model's tokenizer and embedding rows."""
        field, pad = f"{self.field}.path", self.pad_token
        config = load_config(self.path, field, trust_remote_code=self.trust_remote_code)
        tokenizer = load_tokenizer(self.path, field, pad_token=pad, trust_remote_code=self.trust_remote_code)
        return [(tokenizer, config.get_text_config().vocab_size)]

    def load(self, *, vocabulary: int) -> None:
        """Load, freeze and check the weights."""
        if self.policy is not None:
            return
        model = load_causal_lm(
            self.path,
            f"{self.field}.path",
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        self.policy = ScoringModel(model, vocabulary=vocabulary)
        self.policy.choose_path(self.field.removeprefix("model."))
        self.policy.requires_grad_(False)
        self.policy.eval()

    def shard(self, place: Placement) -> None:
        """Shard the weights over the ranks."""
        self.policy = place(self._loaded(), trained=False)

    def train(self, mode: bool = True) -> LocalTeacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs (entropy and top-k where required), [B, T] nats."""
        wants = frozenset(want for name, want in _WANTS.items() if name in requires)
        scores: TokenScores = self._loaded()(rollout, temperature=temperature, wants=wants, own_template=True)
        return scores

    @torch.no_grad()
    def full_head(self, rollout: Rollout) -> Head:
        """Hidden states [N, H] and head of the valid tokens."""
        return self._loaded().head(rollout, own_template=True)

    def whole_head(self) -> AbstractContextManager[None]:
        """Gathers the unit that owns the head, where the weights are sharded."""
        policy = self._loaded()
        return gathered(policy, blocks=False) if is_sharded(policy) else nullcontext()

    def _loaded(self) -> ScoringModel:
        if self.policy is None:
            raise RuntimeError("LocalTeacher.load has not been called")
        return self.policy
