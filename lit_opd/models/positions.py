"""Position encodings that depend on the other rows of a batch, made to depend on the row alone.

LongRoPE has two sets of angles, and transformers takes the one for long texts as soon as one row of the batch, or of the text
written so far, is longer than the first pre-training's window; dynamic NTK stretches its angles with the longest row. A row's
log-probs would then depend on its neighbours, and a response's first tokens on whether it became long.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

FIXED = "fixed"  # the type of a rotation that nothing updates any more


def fix_positions(model: nn.Module, *, field: str, longest: int | None) -> None:
    """Choose one set of angles for all rows, where the model has several.

    Args:
        model: with its position encodings in memory.
        field: "model.student", "model.teacher", for the warning.
        longest: tokens of the run's longest row; None where it is not known. Where all rows are short enough the angles
            for short texts are what every batch gets, and the model is left as it is.
    """
    model.longest_row = longest  # type: ignore[assignment]  # for its export
    chosen = [_fixed(module, longest) for module in model.modules() if _kinds(module)]
    if any(chosen):
        warnings.warn(
            f"`{field}`: LongRoPE with rows that may be longer than its first window: all rows get the angles for long texts, "
            "as in vLLM, so that no row depends on its neighbours; transformers gives short texts the others. For short "
            "texts lower `data.max_prompt_tokens` and `model.sampler.max_new_tokens` (and those of the validation)",
            stacklevel=3,
        )


def takes_long_angles(model: nn.Module) -> bool:
    """Whether ``fix_positions`` gave the angles for long texts to all rows of ``model``, whose log-probs are then others."""
    forwards = (getattr(module, "forward", None) for module in model.modules())
    return any(isinstance(forward, partial) and forward.func is _as_in_a_long_text for forward in forwards)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Types of rotation that depend on the batch, by kind of layer (None where all are alike)."""
    kind = getattr(module, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return {
        layers: name
        for layers, name in kinds.items()
        if isinstance(name, str) and (name == "longrope" or "dynamic" in name)
    }


def _fixed(module: Any, longest: int | None) -> bool:
    """Fix the rotations of ``module``; True where the angles for long texts were taken."""
    taken: dict[str | None, int] = {}
    for layers, kind in _kinds(module).items():
        if kind == "longrope":
            first, whole = _window(module.config, layers), module.config.max_position_embeddings
            if whole > first and (longest is None or longest > first):
                taken[layers] = first
        elif layers is None:
            module.rope_type = FIXED  # rows longer than the model's window, which would stretch it, are refused
        else:
            module.rope_type = {**module.rope_type, layers: FIXED}
    if taken:
        module.forward = partial(_as_in_a_long_text, module, taken)
    return bool(taken)


def _window(config: Any, layers: str | None) -> int:
    """Tokens from which on the angles for long texts are taken."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = parameters.get(layers, parameters) if layers is not None else parameters
    named = parameters.get("original_max_position_embeddings")
    return int(named or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _as_in_a_long_text(
    module: Any, windows: dict[str | None, int], states: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, ...]:
    """The module's own forward, shown one position more that lies after the first window.

    Args:
        module: gives cosines and sines [..., L, D].
        windows: first windows, by kind of layer.
        states: for their dtype and device.
        position_ids: int64 [..., L].
        layer_type: kind of layer, where the module has several.
    """
    kind = {} if layer_type is None else {"layer_type": layer_type}
    own = type(module).forward
    if layer_type not in windows:
        return own(module, states, position_ids, **kind)  # type: ignore[no-any-return]
    shown = F.pad(position_ids, (0, 1), value=windows[layer_type])
    return tuple(values[..., :-1, :] for values in own(module, states, shown, **kind))
