"""Loading student and teacher, agreement of their tokenizers, LoRA, export."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lit_opd.types import InputError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
NAMED_DIFFERENCES = 10  # differing tokens listed in an error
NAMED_WEIGHTS = 5
_LONGEST_REASON = 300  # characters of what a library says


@dataclass
class LoraSettings:
    """Low-rank adapters on the student (package ``peft``, extra ``lora``).

    Args:
        rank: rank of the adapters.
        alpha: scale numerator; the update is alpha / rank * B A.
        dropout: dropout on the adapter's input; anything but 0 makes sampler and scorer differ.
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
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...
        gradient_checkpointing: recompute activations in the backward pass.
        lora: train adapters only.
        compile: compile every transformer block with ``torch.compile`` (dynamic shapes); needs a C++ compiler on a CPU, takes
            a minute at the start, and pays for long runs only.
        pad_token: the tokenizer's pad token where it has none of its own.
        trust_remote_code: run the model's own Python code; off unless you trust its author.
        lazy: under FSDP2 each rank reads only its own shards; false, or with LoRA, every rank loads all of it first.
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


def _require_reachable(path: str, field: str) -> None:
    looks_local = not path.strip() or path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.isdir(path)
    if looks_local and not os.path.isfile(os.path.join(os.path.expanduser(path), "config.json")):
        raise InputError(
            f"`{field}` must be a Hugging Face folder with a config.json, or a hub id, got {path!r}; "
            "check the path (relative paths start at the current folder)"
        )


def _reason(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _hub_error(field: str, path: str, error: Exception) -> InputError:
    """What a loader of transformers raised; it may be anything."""
    if os.path.isdir(os.path.expanduser(path)):
        remedy = "correct that file, or copy the folder again"
    else:
        remedy = "without a network, download the model elsewhere and give its local folder"
    return InputError(f"`{field}` could not be loaded from {path!r}: {_reason(error).rstrip('.')}; {remedy}")


def load_config(path: str, field: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of ``path``; ``field`` names the setting in errors."""
    from transformers import AutoConfig

    _require_reachable(path, field)
    try:
        return AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # its checks of the values raise classes of their own
        raise _hub_error(field, path, error) from error


def load_generation_config(path: str) -> Any:
    """The generation config of ``path``; transformers' defaults where the folder has none.

    Raises:
        InputError: there is one, and it cannot be read; its stop ids would be lost.
    """
    from transformers import GenerationConfig

    folder = os.path.expanduser(path)
    file = os.path.join(folder, "generation_config.json")
    if os.path.isdir(folder) and not os.path.isfile(file):
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # broken JSON is an OSError here, values of another type are others
        if not os.path.isfile(file) and isinstance(error, OSError):
            return GenerationConfig()  # of a hub id
        raise InputError(f"{file}: not a generation config ({_reason(error)}); correct or delete it") from error


def load_tokenizer(path: str, field: str, *, pad_token: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``path``, left-padding.

    Raises:
        InputError: it cannot be loaded, or has no pad token and none is configured.
    """
    from transformers import AutoTokenizer

    _require_reachable(path, field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # broken files raise many types
        raise _hub_error(field, path, error) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise InputError(
            f"`{field}` must hold a tokenizer, got {path!r} without a vocabulary; copy tokenizer.json there too"
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(f"`pad_token` must be a token of the tokenizer at {path!r}, got {pad_token!r}")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"`{field}`: the tokenizer at {path!r} has no pad token and none is configured; set "
            "`model.student.pad_token` to one of its tokens (one that never occurs in a response is best)"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def load_causal_lm(
    path: str,
    field: str,
    *,
    dtype: str,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> Any:
    """A causal language model in ``dtype``, safetensors only unless the folder has nothing else it can load safely.

    ``quantization`` is what ``quantization_config`` returns. This process holds the whole model.
    """
    from transformers import AutoModelForCausalLM

    _require_reachable(path, field)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            os.path.expanduser(path),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # our own error names them
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files and shapes that do not fit raise many types
        raise _hub_error(field, path, error) from error
    model, report = loaded
    _require_complete(report, field, path)
    return model


def _require_complete(report: dict[str, Any], field: str, path: str) -> None:
    """transformers fills weights that a file lacks with random numbers and goes on; a distillation from noise shows no error.

    Raises:
        InputError: weights are missing or of another shape. Weights too many only warn: some models store parts that we do
            not use.
    """
    mismatched = {str(entry[0]) for entry in report.get("mismatched_keys") or ()}
    for what, names in (
        ("lacks", report.get("missing_keys")),
        ("has other shapes of", mismatched),
        ("has too many", report.get("unexpected_keys")),
    ):
        found = sorted(names or ())
        if not found:
            continue
        listed = ", ".join(found[:NAMED_WEIGHTS]) + (", ..." if len(found) > NAMED_WEIGHTS else "")
        message = f"`{field}` {path!r} {what} weights for its config.json, {len(found)} of them: {listed}"
        if what != "has too many":
            raise InputError(f"{message}; give weights and config.json of one model")
        warnings.warn(f"{message}; is its config.json of another architecture?", stacklevel=3)


def empty_causal_lm(
    path: str, field: str, *, dtype: str, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> Any:
    """The architecture of ``path`` in ``dtype``, parameters on the meta device, buffers real; ``lazy.fill`` reads weights.

    Raises:
        InputError: a quantised checkpoint, which cannot be sharded.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(path, field, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"`{field}` must not be a quantised checkpoint when weights are sharded, got {path!r}; use its unquantised "
            "version or `RemoteTeacher`"
        )
    handle = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]  # may return another
    try:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # sizes that are no sizes raise many types
        raise _hub_error(field, path, error) from error
    finally:
        handle.remove()
    _keep_float32(model, getattr(torch, dtype))
    return model.eval()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A registration hook: parameters lose their memory as they are made."""
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """The parameters and stored buffers that the architecture keeps in float32, as ``from_pretrained`` would."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for pattern, kept in plan.items():
        for name, value in model.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name):
                value.data = value.data.to(kept)


def quantization_config(settings: dict[str, Any], field: str) -> Any:
    """transformers' quantisation config from its dictionary; the backend's package is asked for before weights are read.

    Args:
        settings: "quant_method" and the fields of that method's config, or "load_in_4bit" / "load_in_8bit" of bitsandbytes.
        field: names it in errors.
    Raises:
        InputError: an unknown method or field, or a backend that is not installed or cannot run here.
    """
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    try:
        config = AutoQuantizationConfig.from_dict(dict(settings))
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment(device_map=None)
    except Exception as error:  # backends raise what they like
        raise InputError(
            f"`{field}` must be a quantisation that transformers can apply here, got {settings}: {_reason(error)}; "
            "install its package, correct it, or set it to null"
        ) from error
    return config


def agree_vocabularies(
    student: Any, teacher: Any, *, student_rows: int, teacher_rows: int, field: str = "model.teacher.path"
) -> int:
    """Check that both tokenizers map the same tokens to the same ids.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_rows: rows of the student's embedding, padding included.
        teacher_rows: rows of the teacher's embedding.
        field: names the teacher's setting in errors.
    Returns:
        number of leading vocabulary entries both models share; rows beyond are padding and are cut.
    Raises:
        InputError: naming the first ten tokens that differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)]
    if differing:
        shown = ", ".join(
            f"{token!r} (student {ours.get(token, 'absent')}, teacher {theirs.get(token, 'absent')})"
            for token in differing[:NAMED_DIFFERENCES]
        )
        raise InputError(
            f"`{field}` must share the student's vocabulary, but {len(differing)} tokens differ: {shown}; "
            "choose a teacher of the same tokenizer family"
        )
    used = max(ours.values(), default=-1) + 1
    shared = min(student_rows, teacher_rows)
    if shared < used:
        raise InputError(
            f"the embeddings must cover the tokenizer's {used} ids, got student {student_rows} and teacher {teacher_rows} rows"
        )
    return shared


def configured_stops(path: str, tokenizer: Any) -> set[int]:
    """Token ids at which the model of ``path`` ends a response: its generation config's, and the tokenizer's."""
    configured = load_generation_config(path).eos_token_id
    found = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    if not all(stop is None or isinstance(stop, int) for stop in found):
        raise InputError(
            f"`eos_token_id` in generation_config.json of {path!r} must be token ids, got {found[:-1]}; correct it"
        )
    return set(found) - {None}


def stop_warning(student: Any, stop_ids: tuple[int, ...], teacher: Any, *, role: str = "teacher") -> str | None:
    """A warning where student and teacher end a response differently, as Base and Instruct models of one family do.

    A stop id that the teacher never writes makes it call every end of a response unlikely; an end of turn of the teacher's
    that does not stop the student makes it write on behind its answers.

    Args:
        student: the student's tokenizer.
        stop_ids: ids that end a response of the student.
        teacher: the teacher's tokenizer, which names its folder.
        role: what the warning calls it.
    Returns:
        None where all stop ids are the teacher's too, and the end of turn of its tokenizer is among them.
    """
    theirs = configured_stops(teacher.name_or_path, teacher)
    if not theirs or (set(stop_ids) <= theirs and teacher.eos_token_id in (None, *stop_ids)):
        return None
    ours = ", ".join(f"{student.convert_ids_to_tokens(stop)!r} ({stop})" for stop in sorted(stop_ids))
    other = ", ".join(f"{teacher.convert_ids_to_tokens(stop)!r} ({stop})" for stop in sorted(theirs))
    end = "none" if teacher.eos_token_id is None else f"{teacher.eos_token!r} ({teacher.eos_token_id})"
    return (
        f"the student stops at {ours}, but the {role} at {other} with the end of turn {end}: a stop that the {role} never "
        "writes is scored as unlikely; set `model.sampler.stop_token_ids` to ids that both end a response with"
    )


def build_student(settings: StudentSettings, *, empty: bool = False) -> Any:
    """The student with its options applied: LoRA, gradient checkpointing, frozen or trainable weights, no dropout.

    ``empty`` builds it without weights, see ``empty_causal_lm``.
    """
    model = (empty_causal_lm if empty else load_causal_lm)(
        settings.path,
        "model.student.path",
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.dtype in ("bfloat16", "float16"):
        warnings.warn(
            f"`model.student.dtype` is {settings.dtype}: AdamW at a small learning rate loses most updates on half-precision "
            "weights; keep float32 and set --trainer.precision bf16-mixed",
            stacklevel=2,
        )
    _remove_dropout(model)
    _clear_generation_defaults(model)
    if settings.lora is not None:
        model = _with_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.lora is not None:
            model.enable_input_require_grads()
    return model


def _remove_dropout(model: nn.Module) -> None:
    """Dropout would make the scored policy another than the sampled one."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


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


def export_folder(
    model: Any, tokenizer: Any, path: str | Path, *, state: dict[str, Any] | None, generation: Any = None
) -> Path:
    """Write a Hugging Face folder atomically: safetensors, tokenizer, generation config; LoRA merged.

    Args:
        model: a transformers model or a PEFT wrapper of one.
        tokenizer: saved beside it.
        path: the folder; replaced when it exists.
        state: full weights by name where the model is sharded, else None.
        generation: the generation config to write, None for the model's own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        plain = _merged(model)
        original, plain.generation_config = plain.generation_config, generation or plain.generation_config
        try:
            plain.save_pretrained(temporary, state_dict=state, safe_serialization=True)
        finally:
            plain.generation_config = original
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _merged(model: Any) -> Any:
    """The plain transformers model; adapters are merged into a copy, so that training can go on."""
    if not hasattr(model, "merge_and_unload"):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()
