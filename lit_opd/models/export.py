"""The student as a Hugging Face folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lit_opd.files import whole_folder
from lit_opd.models.plain_outputs import restore


def export_folder(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    state: dict[str, Any] | None,
    generation: Any = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a Hugging Face folder atomically: safetensors, tokenizer, generation config; LoRA merged.

    Args:
        model: a transformers model or a PEFT wrapper of one.
        tokenizer: saved beside it.
        path: the folder; replaced when it exists.
        state: full weights by name where the model is sharded, else None.
        generation: the generation config to write, None for the model's own.
        check: is shown the folder before it takes its place, and raises where it must not; None for no check.
    """
    path = Path(path)
    with whole_folder(path, replace=True) as draft:
        plain = _merged(model)
        original, plain.generation_config = plain.generation_config, generation or plain.generation_config
        try:
            plain.save_pretrained(draft, state_dict=state, safe_serialization=True)
        finally:
            plain.generation_config = original
        restore(draft / "config.json", getattr(plain, "switched_off", []))
        tokenizer.save_pretrained(draft)
        del plain
        if check is not None:
            check(draft)
    return path


def export_frame(model: Any, tokenizer: Any, path: str | Path, *, generation: Any) -> Path:
    """Write the folder of ``export_folder`` without weights, for a reader that gets those by another way.

    Args:
        model: a transformers model without adapters.
        tokenizer: saved beside the configuration.
        path: the folder; replaced when it exists.
        generation: the generation config to write.
    """
    path = Path(path)
    with whole_folder(path, replace=True) as draft:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        config.save_pretrained(draft)
        generation.save_pretrained(draft)
        restore(draft / "config.json", getattr(model, "switched_off", []))
        tokenizer.save_pretrained(draft)
    return path


def export_adapter(model: Any, path: str | Path, *, state: dict[str, Any]) -> Path:
    """Write a PEFT folder: the adapter's configuration and weights.

    Args:
        model: a PEFT wrapper.
        path: the folder; replaced when it exists.
        state: whole weights of the adapter by name.
    """
    path = Path(path)
    with whole_folder(path, replace=True) as draft:
        model.save_pretrained(draft, state_dict=state, safe_serialization=True, save_embedding_layers=False)
    return path


def _merged(model: Any) -> Any:
    """The plain transformers model; adapters are merged into a copy, so that training can go on."""
    if not hasattr(model, "merge_and_unload"):
        return model
    whole = copy.deepcopy(model)
    _untie(whole.get_base_model())
    return whole.merge_and_unload()


def _untie(model: Any) -> None:
    """Give the head a weight of its own where it shares the embedding's and one of the two has an adapter.

    An adapter changes one of them; merged into the shared weight it would change both.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inner, outer = (getattr(module, "base_layer", module) for module in (embedding, head))
    adapted = inner is not embedding or outer is not head
    if not adapted or getattr(outer, "weight", None) is not inner.weight:
        return
    outer.weight = nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
