"""Random numbers that belong to a row, not to a batch: the same whatever the batch cut, the rank or the device.

SplitMix64 (Steele, Lea, Flood, 2014) used as a counter-based generator: draw i of a stream is a hash of (stream seed,
i), so nothing has state, all rows are drawn in one vectorised call without a host synchronisation, and a longer request
starts with the shorter one. A ``torch.Generator`` per row would read only the low 32 bits of its seed on a CPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # the odd constant nearest to 2^64 / golden ratio
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MANTISSA_BITS = 53  # of a float64


def stream_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order; negative parts are allowed.

    >>> stream_seed(1, 2) == stream_seed(1, 2), stream_seed(1, 2) == stream_seed(2, 1)
    (True, False)
    """
    return _folded(parts) >> 1


def row_uniforms(seed: int, row_keys: Tensor, step: int, count: int, *, domain: int = 0, first: int = 0) -> Tensor:
    """Uniform draws in [0, 1), one independent stream a row.

    Args:
        seed: the seed of the experiment or of the strategy.
        row_keys: int64 [B]; rows with the same key get the same draws.
        step: optimizer step; another step draws anew.
        count: draws a row.
        domain: separates users of the same (seed, key, step) that must not share draws.
        first: draws of each stream that are passed over.
    Returns:
        float64 [B, count], on the device of ``row_keys``.
    """
    start = torch.full_like(row_keys, _signed(_folded((seed, step, domain))))
    streams = _mixed_tensor(start + row_keys + _signed(_GAMMA)).unsqueeze(-1)
    index = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=row_keys.device)
    bits = _mixed_tensor(streams + index * _signed(_GAMMA))
    return _logical_shift(bits, 64 - _MANTISSA_BITS).double() * 2.0**-_MANTISSA_BITS


def turn_keys(row_keys: Tensor, turn: int) -> Tensor:
    """The streams of a later turn of the same rows, int64 [B] as ``row_keys``; those of turn 0 are the rows' own."""
    if turn == 0:
        return row_keys
    return torch.tensor([stream_seed(key, turn) for key in row_keys.tolist()], dtype=torch.int64).to(row_keys.device)


def token_uniforms(seed: int, row_keys: Tensor, step: int, mask: Tensor, *, domain: int = 0) -> Tensor:
    """``row_uniforms`` dealt to the valid tokens: the i-th one gets the row's i-th draw, wherever its column is.

    Args:
        mask: bool [B, T], may have holes.
    Returns:
        float64 [B, T] in [0, 1); 1 where masked, above every draw.
    """
    draws = row_uniforms(seed, row_keys, step, mask.shape[1], domain=domain)
    return torch.where(mask, draws.gather(1, (mask.cumsum(-1) - 1).clamp(min=0)), 1.0)


def _folded(parts: tuple[int, ...]) -> int:
    state = 0
    for part in parts:
        state = _mixed(state + part + _GAMMA)
    return state


def _mixed(value: int) -> int:
    """SplitMix64's output function on a 64-bit unsigned integer."""
    value &= _MASK64
    for shift, multiplier in _MULTIPLIERS:
        value = ((value ^ (value >> shift)) * multiplier) & _MASK64
    return value ^ (value >> _LAST_SHIFT)


def _mixed_tensor(value: Tensor) -> Tensor:
    """``_mixed`` on int64, whose products wrap modulo 2^64 like the unsigned ones."""
    for shift, multiplier in _MULTIPLIERS:
        value = (value ^ _logical_shift(value, shift)) * _signed(multiplier)
    return value ^ _logical_shift(value, _LAST_SHIFT)


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; int64 has only the one that copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit unsigned integer."""
    return value - (1 << 64) if value >> 63 else value


def row_key(row_id: str, sample: int) -> int:
    """The 63-bit name of the random stream of one sample of one prompt; the same on every machine and run.

    >>> row_key("aime-0", 0) == row_key("aime-0", 0), row_key("aime-0", 0) == row_key("aime-0", 1)
    (True, False)
    """
    return stable_hash(f"{row_id}\0{sample}")


_KEY_BITS = (1 << 63) - 1


def stable_hash(text: str) -> int:
    """63 bits of BLAKE2b, as a non-negative int."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _KEY_BITS
