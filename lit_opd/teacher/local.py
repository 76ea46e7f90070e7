"""A teacher in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lit_opd.models import Dtype, load_causal_lm, load_config, load_tokenizer
from lit_opd.scoring import Head, ScoringModel
from lit_opd.sharding import gathered, is_sharded, shard
from lit_opd.teacher.base import Teacher
from lit_opd.types import Rollout, TokenScores

# name in a signal's requirements -> name in the model's forward
_WANTS = {"teacher_entropy": "entropy", "teacher_topk": "topk"}
_HEAD_READERS = frozenset({"token_kl", "teacher_distribution"})


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
        self._kept: list[tuple[Rollout, Tensor]] = []  # hidden states [N, H] of a batch's micro-batches
        self._read = False  # a new batch begins with the first score after a read

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
        """Log-probs (entropy and top-k where required), [B, T] nats."""
        wants = frozenset(want for name, want in _WANTS.items() if name in requires)
        policy = self._loaded()
        head = self._remembered_head(rollout) if self._remembers(requires) else None
        scores: TokenScores = policy(rollout, temperature=temperature, wants=wants, own_template=True, head=head)
        return scores

    def _remembers(self, requires: frozenset[str]) -> bool:
        """Whether the update will ask for the head again; sharded ranks must run the same forwards, so they do."""
        policy = self._loaded()
        return bool(requires & _HEAD_READERS) and not policy.plain and not is_sharded(policy)

    def _remembered_head(self, rollout: Rollout) -> Head:
        """``full_head``, whose hidden states are kept until the next batch: H numbers a token."""
        if self._read:
            self._kept, self._read = [], False
        head = self._loaded().head(rollout, own_template=True)
        self._kept.append((rollout, head.hidden))
        return head

    @torch.no_grad()
    def full_head(self, rollout: Rollout) -> Head:
        """Hidden states [N, H] and head of the valid tokens."""
        self._read = True
        for kept, hidden in self._kept:
            if _same_tokens(kept, rollout):
                return self._loaded().linear_head(hidden)
        return self._loaded().head(rollout, own_template=True)

    def whole_head(self) -> AbstractContextManager[None]:
        """Gathers the unit that owns the head, where the weights are sharded."""
        policy = self._loaded()
        return gathered(policy, blocks=False) if is_sharded(policy) else nullcontext()

    def _loaded(self) -> ScoringModel:
        if self.policy is None:
            raise RuntimeError("LocalTeacher.load has not been called")
        return self.policy


def _same_tokens(one: Rollout, other: Rollout) -> bool:
    """Whether a frozen model makes the same of both."""
    prompts, others = one.prompts, other.prompts
    pairs = (
        (one.response_ids, other.response_ids),
        (one.mask, other.mask),
        (prompts.ids, others.ids),
        (prompts.mask, others.mask),
        (prompts.teacher_ids, others.teacher_ids),
        (prompts.teacher_mask, others.teacher_mask),
    )
    return all(
        left is right
        or (left is not None and right is not None and left.shape == right.shape and torch.equal(left, right))
        for left, right in pairs
    )
