"""Loading student and teacher, agreement of their tokenizers, LoRA, export."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lit_opd import hub
from lit_opd.errors import InputError
from lit_opd.models.plain_outputs import switch_off

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
NAMED_WEIGHTS = 5
ADAPTER = "adapter_config.json"
_ATTENTION = re.compile(r"attn_implementation|scaled_dot_product|(flash|flex|paged)[ _-]?att", re.IGNORECASE)
_TEXT_CONFIGS = ("text_config", "decoder", "generator", "llm_config", "language_config")  # parts of composed models
_LONGEST_REASON = 300  # characters of what a library says


def _require_reachable(path: str, field: str) -> None:
    _refuse_adapter(Path(path).expanduser(), field)
    looks_local = not path.strip() or path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.isdir(path)
    if looks_local and not os.path.isfile(os.path.join(os.path.expanduser(path), "config.json")):
        raise InputError(
            f"`{field}` must be a Hugging Face folder with a config.json, or a hub id, got {path!r}; "
            "check the path (relative paths start at the current folder)"
        )
    if not looks_local:
        hub.silence()  # once, before its client tries again and again


def _refuse_adapter(folder: Path, field: str) -> None:
    """transformers would load an adapter's base model from elsewhere, put the adapter on it, and freeze the base."""
    if not (folder / ADAPTER).is_file():
        return
    if any(folder.glob("model*.safetensors")):
        raise InputError(
            f"`{field}` must hold one model, got {str(folder)!r} with whole weights and an adapter beside them; delete or move "
            f"{ADAPTER} and adapter_model.* to train the whole weights, or merge the adapter (peft's merge_and_unload) and "
            "give the merged folder"
        )
    raise InputError(
        f"`{field}` must hold a whole model, got the adapter {str(folder)!r}; merge it into its base model (peft's "
        "merge_and_unload), save that with the tokenizer, and give the merged folder"
    )


def _reason(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _hub_error(field: str, path: str, error: Exception) -> InputError:
    """What a loader of transformers raised; it may be anything."""
    reason = _reason(error).rstrip(".")
    if _ATTENTION.search(str(error)):
        setting = f"{field.removesuffix('.path')}.attn_implementation"
        remedy = f"set `{setting}` to one that this model and machine have, such as eager"
    elif os.path.isdir(os.path.expanduser(path)):
        remedy = "correct that file, or copy the folder again"
    else:
        reason, remedy = hub.failure(reason, "model")
    return InputError(f"`{field}` could not be loaded from {path!r}: {reason}; {remedy}")


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


def named_ends(path: str) -> list[Any]:
    """What config.json of ``path`` names as ``eos_token_id``, for the model and its text model; empty where it names none.

    The file itself is read: a configuration class has defaults that the model's author never wrote.
    """
    raw = raw_config(path)
    parts = [raw, *(raw.get(name) for name in _TEXT_CONFIGS)]
    return [part["eos_token_id"] for part in parts if isinstance(part, dict) and part.get("eos_token_id") is not None]


def raw_config(path: str) -> dict[str, Any]:
    """config.json of ``path`` as its file has it, without a configuration class's defaults; empty where it cannot be read."""
    from transformers import PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(os.path.expanduser(path))
    except (OSError, ValueError):
        return {}  # ``load_config`` says what is wrong with it
    return dict(raw)


def load_tokenizer(
    path: str, field: str, *, pad_token: str | None = None, trust_remote_code: bool = False, pads: bool = True
) -> Any:
    """The tokenizer of ``path``, left-padding.

    Args:
        path: a Hugging Face folder or hub id.
        field: names the setting of the path in errors; the remedies name its neighbour ``pad_token``.
        pad_token: the pad token where it has none of its own.
        trust_remote_code: run the tokenizer's own Python code.
        pads: False where nothing is padded with it, so that it needs no pad token.
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
    setting = f"{field.rpartition('.')[0]}.pad_token"  # of the role whose path it is
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"`{setting}` must be a token of the tokenizer at {path!r}, got {pad_token!r}; e.g. its end token "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = pad_token
    if pads and tokenizer.pad_token_id is None:
        raise InputError(
            f"`{field}`: the tokenizer at {path!r} has no pad token and none is configured; set "
            f"`{setting}` to one of its tokens (one that never occurs in a response is best)"
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

    config = load_config(path, field, trust_remote_code=trust_remote_code)
    switched_off = switch_off(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            os.path.expanduser(path),
            config=config,
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
    model.switched_off = switched_off  # for its export
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
    switched_off = switch_off(config)
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
    model.switched_off = switched_off
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
