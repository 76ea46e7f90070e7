"""The student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_opd.files import whole_folder


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
    with whole_folder(path, replace=True) as draft:
        plain = _merged(model)
        original, plain.generation_config = plain.generation_config, generation or plain.generation_config
        try:
            plain.save_pretrained(draft, state_dict=state, safe_serialization=True)
        finally:
            plain.generation_config = original
        tokenizer.save_pretrained(draft)
    return path


def _merged(model: Any) -> Any:
    """The plain transformers model; adapters are merged into a copy, so that training can go on."""
    if not hasattr(model, "merge_and_unload"):
        return model
    import copy

    return copy.deepcopy(model).merge_and_unload()
