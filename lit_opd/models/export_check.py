"""Is an exported folder the student? Both give the same log-probs to a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError
from lit_opd.models.agreement import computes_in_half, gap_bound, verdict
from lit_opd.models.loading import load_causal_lm
from lit_opd.models.positions import fix_positions
from lit_opd.models.sharding import gathered, is_sharded
from lit_opd.models.student import StudentSettings, build_student

_TEXT = "Ann has 12 apples and 3 pears: 12 + 3 = 15."
_TOKENS = 12  # of the text, which are compared; fewer than 4 are filled up
_ON_CPU = ("sdpa", "eager")  # attention that runs there


class ExportCheck:
    """What the student says of a few tokens, to hold an exported folder against. Call it with the folder.

    Args:
        ids: int64 [1, n], on the CPU.
        logprobs: the student's, [n, V] nats, on the CPU.
        half: they were computed in half precision.
        dtype: of the student's weights.
        settings: how the student was loaded.
        longest: as ``fix_positions`` had it.
    """

    def __init__(
        self, ids: Tensor, logprobs: Tensor, *, half: bool, dtype: str, settings: StudentSettings, longest: int | None
    ) -> None:
        self.ids, self.logprobs, self.half = ids, logprobs, half
        self.dtype, self.settings, self.longest = dtype, settings, longest

    @classmethod
    @torch.no_grad()
    def of(cls, student: Any, tokenizer: Any, settings: StudentSettings) -> ExportCheck:
        """Ask the student, a ``ScoringModel``; a collective where its weights are sharded."""
        like = next(student.parameters())
        ids = _ids(tokenizer, student.vocabulary)
        with torch.autocast(like.device.type, enabled=False):
            if is_sharded(student):
                with gathered(student):
                    logits = student.run(_logits, ids.to(like.device))
            else:
                logits = _logits(student, ids.to(like.device))
        return cls(
            ids,
            logits.float().log_softmax(-1).cpu(),
            half=logits.dtype.itemsize <= 2 or computes_in_half(student),
            dtype=str(like.dtype).removeprefix("torch."),
            settings=settings,
            longest=getattr(student.causal_lm, "longest_row", None),
        )

    @torch.no_grad()
    def __call__(self, folder: Path) -> None:
        """Load the folder and compare; random states stay as they are.

        Raises:
            InputError: another policy.
        """
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when the student was loaded
            try:
                logits = self._exported(str(folder))
            except InputError as error:
                raise InputError(
                    f"the exported student cannot be loaded again: {error}; nothing was exported"
                ) from error
        there = logits[0].float().log_softmax(-1)
        gap = float((there[:, : self.logprobs.shape[1]] - self.logprobs).abs().mean())
        bound = gap_bound(half=self.half)
        found = verdict(gap, bound)
        said = (
            f"the exported student's log-probs differ from the trained student's by a mean of {gap:.3g} nats on a few tokens, "
            f"where {'half' if self.half else 'full'} precision explains {bound:g}"
        )
        if found == "contradict":
            raise InputError(f"{said}; nothing was exported, the weights are in the checkpoints")
        if found == "differ":
            warnings.warn(said, stacklevel=2)

    def _exported(self, folder: str) -> Tensor:
        settings = self.settings
        attention = settings.attn_implementation if settings.attn_implementation in _ON_CPU else "eager"
        model = load_causal_lm(
            folder,
            "export",
            dtype=self.dtype,
            attn_implementation=attention,
            trust_remote_code=settings.trust_remote_code,
        )
        fix_positions(model, field="export", longest=self.longest)
        logits: Tensor = model.eval()(input_ids=self.ids, use_cache=False).logits
        return logits


def _logits(student: Any, ids: Tensor) -> Tensor:
    """[n, V] of the student itself, adapters included."""
    logits: Tensor = student.causal_lm(input_ids=ids, use_cache=False).logits
    return logits[0]


def _ids(tokenizer: Any, vocabulary: int) -> Tensor:
    """Text, no special token: those of pictures and sounds mean something else to some models."""
    found = tokenizer(_TEXT, add_special_tokens=False)["input_ids"][:_TOKENS]
    found = [token for token in found if token < vocabulary] + list(range(max(0, 4 - len(found))))
    return torch.tensor([found])


def unsharded(
    student: Any, settings: StudentSettings, state: dict[str, Any] | None
) -> tuple[Any, dict[str, Any] | None]:
    """The model to export and its full weights: adapters are merged in a new copy, which holds them, where it was sharded or its
    base quantised. Of a quantised base the copy has what its weights stand for, so that it is the policy that was trained.

    Args:
        student: a ``ScoringModel``, sharded or not.
        settings: how the student was loaded.
        state: the full weights by name where it is sharded, else None.
    """
    if settings.quantization is not None:
        state = dequantized(student.model)
    if state is None or settings.lora is None:
        return student.model, state
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given when the student was loaded
        model = build_student(replace(settings, quantization=None))
    model.load_state_dict(state, strict=False)  # a tied weight may be named once; the check sees what is missing
    return model, None


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, each of its own shape [...], on the CPU: of quantised ones what they stand for, without
    their tables."""
    from peft.utils.integrations import dequantize_bnb_weight

    found = {name: value.detach().cpu() for name, value in model.named_parameters() if value.is_floating_point()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            found[f"{name}.weight"] = dequantize_bnb_weight(weight, state=getattr(module, "state", None)).detach().cpu()
    return found
