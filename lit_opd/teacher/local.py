"""A teacher in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError, require
from lit_opd.models.base import weights_revision
from lit_opd.models.lazy import fill
from lit_opd.models.loading import (
    Dtype,
    empty_causal_lm,
    load_causal_lm,
    load_config,
    load_tokenizer,
    quantization_config,
)
from lit_opd.models.positions import fix_positions
from lit_opd.models.sharding import Placement, gathered, is_sharded
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.stops import StopClass
from lit_opd.scoring.tiles import Head
from lit_opd.teacher.base import SCORE_WANTS, StopMass, Teacher
from lit_opd.types import Rollout, TokenScores

_HEAD_READERS = frozenset({"token_kl", "teacher_distribution"})


class LocalTeacher(Teacher):
    """A frozen causal language model loaded beside the student.

    On one device, or under DDP, every process holds all of it. Under FSDP2 a rank holds its shards, and while loading also
    its part of one parameter (twice that for a mixture's stacked experts; all of it where fused weights are split), see
    docs/scale-out.md. Offload and quantisation are unverified on CUDA.

    Args:
        path: a Hugging Face folder or hub id.
        dtype: of its weights; bfloat16 halves the memory and moves log-probs by about 0.01 nats.
        attn_implementation: as for the student.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the model's own Python code; off unless you trust its author.
        lazy: under FSDP2 each rank reads only its own shards; false: every rank loads all of it first, then shards.
        offload: keep the weights in host memory: under FSDP2 a unit is copied to the device when it runs, else the whole
            teacher for the time it scores a batch. The hidden states that the update reads stay in host memory too, and of the
            weights only the output head is on the device for it; see docs/scale-out.md. No effect on a CPU.
        quantization: transformers' quantisation config as a dictionary, such as ``{"load_in_8bit": true}`` (bitsandbytes);
            neither sharded nor offloaded.
        stop_mass: what a sampled stop token is scored with: "own", its own mass, or "sum", the mass of all stop ids together,
            the student's and this model's: for a student whose end token this model never writes. Entropies, top-k lists and
            ``token_kl`` are those of single tokens.
    Raises:
        InputError: quantised and offloaded, or a value outside its range.
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        attn_implementation: str = "sdpa",
        pad_token: str | None = None,
        trust_remote_code: bool = False,
        lazy: bool = True,
        offload: bool = False,
        quantization: dict[str, Any] | None = None,
        stop_mass: StopMass = "own",
    ) -> None:
        super().__init__()
        if quantization is not None and offload:
            raise InputError(
                f"`LocalTeacher.offload` must be false with `quantization`, got true and {quantization}: quantised weights "
                "stay on their device; choose one of the two"
            )
        require(stop_mass in get_args(StopMass), "LocalTeacher.stop_mass", "own or sum", stop_mass)
        self.stop_mass = stop_mass
        self.lazy, self.offload, self.quantization = lazy, offload, quantization
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

    def revision(self) -> str | None:
        """Of the files; None where they are not safetensors."""
        return weights_revision(self.path, f"{self.field}.path")

    @property
    def reader_config(self) -> Any:
        """Of this model."""
        field = f"{self.field}.path"
        return load_config(self.path, field, trust_remote_code=self.trust_remote_code).get_text_config()

    def reader(self) -> ScoringModel:
        """This model."""
        return self._loaded()

    def attach(self, student: ScoringModel) -> None:
        """The student's tokenizer is the teacher's: what it has no token for has no mass here either."""
        self.unused_ids = student.unused

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """The quantisation is one that transformers can apply here."""
        if self.quantization is not None:
            quantization_config(self.quantization, f"{self.field}.quantization")

    def load(self, *, vocabulary: int) -> None:
        """Load, freeze and check all of the weights in this process."""
        if self.policy is not None:
            return
        extra: dict[str, Any] = {}
        if self.quantization is not None:
            extra["quantization"] = quantization_config(self.quantization, f"{self.field}.quantization")
        self._hold(load_causal_lm(self.path, f"{self.field}.path", **self._how(), **extra), vocabulary)

    def load_sharded(self, place: Placement, *, vocabulary: int) -> None:
        """Read this rank's shards only, unless ``lazy`` is false."""
        if self.policy is not None:
            return
        if not self.lazy:
            super().load_sharded(place, vocabulary=vocabulary)
            return
        self._require_plain()
        policy = self._hold(empty_causal_lm(self.path, f"{self.field}.path", **self._how()), vocabulary)
        self.shard(place)
        device = torch.device("cpu") if self.offload else None
        fill(policy, policy.causal_lm, path=self.path, setting=f"{self.field}.path", device=device)

    def shard(self, place: Placement) -> None:
        """Shard the weights over the ranks."""
        self._require_plain()
        self._keep(place(self._loaded(), trained=False, offload=self.offload))

    def _require_plain(self) -> None:
        if self.quantization is not None:
            raise InputError(
                f"`{self.field}.quantization` must be null when weights are sharded, got {self.quantization}; train with ddp "
                "or one device, or use `RemoteTeacher`"
            )

    def _how(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    def _hold(self, model: Any, vocabulary: int) -> ScoringModel:
        fix_positions(model, field=self.field, longest=self.longest_row)
        policy = ScoringModel(model, vocabulary=vocabulary, unused=self.unused_ids)
        policy.choose_path(self.field.removeprefix("model."))
        policy.requires_grad_(False)
        policy.eval()
        self._keep(policy)
        return policy

    def _keep(self, policy: ScoringModel) -> None:
        if self.offload:
            self.__dict__["policy"] = policy  # no submodule: Lightning moves those to the device
        else:
            self.policy = policy

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Copies of offloaded weights on ``device`` while the block runs; FSDP2 moves its own."""
        with self._copied(self._loaded().modules(), device):
            yield

    @contextmanager
    def head_on_device(self, device: torch.device) -> Iterator[None]:
        """As ``on_device``, of the output head alone; ``full_head`` brings the rest for its own forward where it needs one."""
        policy = self._loaded()
        head = policy.causal_lm.get_output_embeddings()
        with self._copied([policy] if head is None else [policy, *head.modules()], device):
            yield

    @contextmanager
    def _copied(self, modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
        """Copies of the weights and buffers that ``modules`` own in their place; blocks may stand inside each other."""
        if not self.offload or is_sharded(self._loaded()):
            yield
            return
        slots = [
            (module, name, value)
            for module in modules
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
        try:
            with torch.inference_mode(False):
                moved = {id(value): _copy(value, device) for _, _, value in slots}  # tied weights are one
            for module, name, value in slots:
                setattr(module, name, moved[id(value)])
            yield
        finally:
            for module, name, value in slots:
                setattr(module, name, value)

    def train(self, mode: bool = True) -> LocalTeacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Log-probs (entropy and top-k where required), [B, T] nats; the hidden states where the head will be read."""
        wants = frozenset(want for name, want in SCORE_WANTS.items() if name in requires)
        policy = self._loaded()
        head = policy.head(rollout, own_template=True) if self._serves_states(requires) else None
        scores: TokenScores = policy(
            rollout, temperature=temperature, wants=wants, own_template=True, head=head, stops=self._stops
        )
        if head is None:
            return scores
        # those of a whole batch may be many times a micro-batch's memory
        return replace(scores, states=head.hidden.cpu() if self.offload else head.hidden)

    @cached_property
    def _stops(self) -> StopClass | None:
        """What a stop token is scored with; None where that is its own mass."""
        if self.stop_mass == "own":
            return None
        ((tokenizer, _),) = self.tokenizers()
        return self._stop_class(self.path, tokenizer)

    def _serves_states(self, requires: frozenset[str]) -> bool:
        """Whether the update will ask for the head again; sharded ranks must run the same forwards, so they do."""
        policy = self._loaded()
        return bool(requires & _HEAD_READERS) and not policy.full_logits and not is_sharded(policy)

    @torch.no_grad()
    def full_head(self, rollout: Rollout, *, states: Tensor | None = None) -> Head:
        """Hidden states [N, H] and head of the valid tokens."""
        policy, device = self._loaded(), rollout.mask.device
        if states is not None:
            return policy.linear_head(states.to(device))
        with self.on_device(device):
            return policy.head(rollout, own_template=True)

    def whole_head(self) -> AbstractContextManager[None]:
        """Gathers the unit that owns the head, where the weights are sharded."""
        policy = self._loaded()
        return gathered(policy, blocks=False) if is_sharded(policy) else nullcontext()

    def _loaded(self) -> ScoringModel:
        if self.policy is None:
            raise RuntimeError("LocalTeacher.load has not been called")
        return self.policy


def _copy(value: Tensor, device: torch.device) -> Tensor:
    """A frozen parameter or a buffer on ``device``; itself where it is there already."""
    copy = value.to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) and copy is not value else copy
