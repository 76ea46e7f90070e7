"""Whether a model can go on from the keys and values of earlier turns, which its configuration and a probe tell."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from lit_opd.errors import first_line
from lit_opd.rollout.base import autocast_dtype
from lit_opd.rollout.decoding.key_values import CachedRows, require_full_attention

GAP = 1e-4  # nats between next-token log-probs after a text read in two parts and in one; 16-bit numbers get the looser bound
GAP_HALF = 0.1
FIRST, SECOND = (1, 3), (4, 2)  # tokens of the two rows of the probe, in its two parts

_FOUND: WeakKeyDictionary[Any, dict[torch.dtype | None, str | None]] = WeakKeyDictionary()


class CannotGoOn(Exception):
    """Of a model that keeps something else than keys and values of all earlier tokens."""

    def __init__(self, config: Any, why: str) -> None:
        super().__init__(why)


@torch.no_grad()
def why_not(model: Any, device: torch.device) -> str | None:
    """Why each turn must be read from its beginning; None where the model goes on. Looked at once for each dtype of autocast.

    Args:
        model: a ``ScoringModel``.
        device: of its weights.
    """
    found, dtype = _FOUND.setdefault(model, {}), autocast_dtype(device)
    if dtype not in found:
        found[dtype] = _why_not(model, device)
    return found[dtype]


def _why_not(model: Any, device: torch.device) -> str | None:
    config = model.causal_lm.config.get_text_config()
    try:
        require_full_attention(config, refusal=CannotGoOn)
        gap = _gap(model, device)
    except CannotGoOn as error:
        return f"it has {error}"
    except Exception as error:  # code of any model, called in a way that it may not know
        return f"it does not go on from a cache ({type(error).__name__}: {first_line(error)})"
    half = autocast_dtype(device) is not None or any(value.dtype.itemsize <= 2 for value in model.parameters())
    return None if gap <= (GAP_HALF if half else GAP) else f"log-probs after a cache differ by {gap:.3g} nats"


def _gap(model: Any, device: torch.device) -> float:
    """Largest difference in nats between a text of two rows read in two parts, the rows changing places, and in one."""
    rows = torch.tensor([1, 0], device=device)
    texts = [[(7 * row + place) % model.vocabulary for place in range(first + second)]
             for row, (first, second) in enumerate(zip(FIRST, SECOND, strict=True))]  # fmt: skip
    heads, tails = zip(*((text[:first], text[first:]) for text, first in zip(texts, FIRST, strict=True)), strict=True)
    parts = _read(model, heads, device)
    parts.keep(rows)
    parts.read(*_padded([tails[row] for row in rows.tolist()], device))
    whole = _read(model, texts, device)
    two, one = (model.next_logits(cached.states).log_softmax(-1) for cached in (parts, whole))
    one = one[rows]
    return float(
        (two - one)[one != -torch.inf].abs().max()
    )  # not of entries that name no token; NaN stays, to be found


def _read(model: Any, texts: Any, device: torch.device) -> CachedRows:
    most = sum(FIRST) + sum(SECOND)
    return CachedRows(model, *_padded(texts, device), most=most, refusal=CannotGoOn)


def _padded(texts: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 and mask bool [rows, columns], left-padded."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts], device=device)
    mask = torch.tensor([[False] * (width - len(text)) + [True] * len(text) for text in texts], device=device)
    return ids, mask
