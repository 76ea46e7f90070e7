"""The student as configured: LoRA, recomputed activations, always in evaluation mode."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lit_opd.errors import InputError
from lit_opd.models.loading import Dtype, _reason, empty_causal_lm, load_causal_lm, quantization_config
from lit_opd.models.positions import fix_positions
from lit_opd.models.recomputation import recompute_blocks

Quantization = Literal["4bit", "8bit"]
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "8bit": {"load_in_8bit": True},
}


@dataclass
class LoraSettings:
    """Low-rank adapters on the student (package ``peft``, extra ``lora``).

    Args:
        rank: rank of the adapters.
        alpha: scale numerator; the update is alpha / rank * B A.
        dropout: has no effect but a warning: the policy that is scored must be the one that sampled, which has no dropout.
        target_modules: module names to adapt, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("rank", self.rank >= 1, ">= 1"),
            ("alpha", 0 < self.alpha < math.inf, "> 0 and finite"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("target_modules", bool(self.target_modules), "at least one module name, or all-linear"),
        ):
            if not ok:
                raise InputError(f"`LoraSettings.{name}` must be {allowed}, got {getattr(self, name)!r}")


@dataclass
class StudentSettings:
    """What the student is loaded from and how.

    Args:
        path: a Hugging Face folder or hub id.
        dtype: of the master weights; keep float32 and choose bf16 compute with ``--trainer.precision bf16-mixed``.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; with FlashAttention or "flex_attention" rows are scored
            without padding.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: train adapters only.
        compile: compile every transformer block with ``torch.compile`` (dynamic shapes); needs a C++ compiler on a CPU, takes
            a minute at the start, and pays for long runs only.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the model's own Python code; off unless you trust its author.
        lazy: under FSDP2 each rank reads only its own shards; false, or with LoRA, every rank loads all of it first.
        quantization: of the base below adapters (QLoRA): "4bit" is NF4 with bfloat16 products, "8bit" is LLM.int8; package
            bitsandbytes. The adapters keep float32. Not sharded, and sampled in this process.
    Raises:
        InputError: quantised without LoRA.
    """

    path: str
    dtype: Dtype = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    compile: bool = False
    pad_token: str | None = None
    trust_remote_code: bool = False
    lazy: bool = True
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.lora is None:
            raise InputError(
                f"`model.student.quantization` must be null without `model.student.lora`, got {self.quantization!r}: quantised "
                "weights are not trained; set `model.student.lora.rank`"
            )


def base_quantization(settings: StudentSettings) -> Any:
    """transformers' quantisation config of the base, None where it is not quantised.

    Raises:
        InputError: the package is missing, or cannot run here.
    """
    if settings.quantization is None:
        return None
    return quantization_config(QUANTIZATIONS[settings.quantization], "model.student.quantization")


def build_student(settings: StudentSettings, *, empty: bool = False, longest: int | None = None) -> Any:
    """The student with its options applied: LoRA, gradient checkpointing, frozen or trainable weights.

    Args:
        settings: see there.
        empty: without weights, see ``empty_causal_lm``.
        longest: tokens of the run's longest row, None where it is not known; see ``fix_positions``.
    """
    how: dict[str, Any] = {
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    if (quantization := base_quantization(settings)) is not None:
        how["quantization"] = quantization
    model = (empty_causal_lm if empty else load_causal_lm)(settings.path, "model.student.path", **how)
    if settings.dtype in ("bfloat16", "float16") and settings.lora is None:  # peft keeps adapters in float32
        warnings.warn(
            f"`model.student.dtype` is {settings.dtype}: AdamW at a small learning rate loses most updates on half-precision "
            "weights; keep float32 and set --trainer.precision bf16-mixed",
            stacklevel=2,
        )
    _clear_generation_defaults(model)
    fix_positions(model, field="model.student", longest=longest)
    if settings.gradient_checkpointing:
        recompute_blocks(model)
    if settings.lora is not None:
        model = _with_lora(model, settings.lora)
    return model.eval()


def adapter_names(model: nn.Module) -> frozenset[str]:
    """Names of what a student with adapters trains: the adapters, and whatever else peft left trainable."""
    return frozenset(name for name, value in model.named_parameters() if value.requires_grad)


def _clear_generation_defaults(model: Any) -> None:
    """A checkpoint's own defaults (repetition penalty, top-k ...) would silently bend the sampled distribution."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()


def _with_lora(model: nn.Module, settings: LoraSettings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            "`model.student.lora` needs the package peft; install the extra: pip install -e '.[lora]'"
        ) from error
    if settings.dropout:
        warnings.warn(
            f"`model.student.lora.dropout` is {settings.dropout} and has no effect: the student is trained as it samples, "
            "without dropout",
            stacklevel=3,
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it, a float serves
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(
            f"`model.student.lora` must fit the model, got target_modules {settings.target_modules!r}: {_reason(error)}; "
            "all-linear fits every model"
        ) from error
