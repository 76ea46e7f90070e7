"""Builders of token signals that the tests share, and the discovery of every strategy in the package."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

import lit_opd.weighting  # noqa: F401  importing it imports every strategy
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import WeightingStrategy

TOKEN_FIELDS = ("student_logprobs", "teacher_logprobs", "sampler_logprobs", "reference_logprobs", "advantage")
STATE_FIELDS = ("student_entropy", "teacher_entropy", "token_kl")  # column t is a function of the tokens before t
FLOAT_FIELDS = TOKEN_FIELDS + STATE_FIELDS


def random_field(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Plausible float64 content: log-probs in (-6, 0), advantages of either sign, entropies and KL in (0, 2)."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name in STATE_FIELDS:
        return 2.0 * draws
    return 4.0 * draws - 2.0 if name == "advantage" else -6.0 * draws**2 - 1e-3


def random_signal(mask: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float64, step: int = 3) -> TokenSignal:
    """A signal of three turns with every optional field but top-k lists, on ``mask`` (bool [B, T]); row keys 100, 101, ..."""
    generator = torch.Generator().manual_seed(seed)
    content = {name: random_field(name, tuple(mask.shape), generator).to(dtype) for name in FLOAT_FIELDS}
    columns = mask.shape[1]
    turn = (3 * torch.arange(columns) // max(columns, 1)).expand(mask.shape)
    return TokenSignal(mask=mask, row_keys=100 + torch.arange(len(mask)), step=step, turn=turn, **content)


def holey_mask(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """bool [rows, columns] with holes, starts past column 0, an empty row, a one-token row and a full row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < torch.linspace(0.3, 0.9, rows).unsqueeze(-1)
    mask[0] = False
    mask[1] = torch.arange(columns) == columns // 2
    mask[2] = True
    mask[3] = torch.arange(columns) < columns // 2
    return mask


def mask_of(lengths: list[int], columns: int) -> Tensor:
    """bool [B, columns], right-padded rows."""
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(-1)


def small_signal(student: list[float], teacher: list[float], dtype: torch.dtype = torch.float64) -> TokenSignal:
    """One unpadded row from two lists of log-probs."""
    values = torch.tensor([student, teacher], dtype=dtype)
    return TokenSignal(
        student_logprobs=values[:1], teacher_logprobs=values[1:], mask=torch.ones(1, len(student), dtype=torch.bool)
    )


def changed_columns(signal: TokenSignal, names: tuple[str, ...], columns: Tensor, *, seed: int) -> TokenSignal:
    """The signal with fresh random content in ``columns`` (bool [T]) of the fields ``names``."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(signal.mask.shape)
    fresh = {n: torch.where(columns, random_field(n, shape, generator), getattr(signal, n)) for n in names}
    return replace(signal, **fresh)


def padded(signal: TokenSignal, left: int, right: int, value: float) -> TokenSignal:
    """The signal with masked columns on both sides that hold ``value``."""
    sides = (left, right)
    content = {n: torch.nn.functional.pad(getattr(signal, n), sides, value=value) for n in FLOAT_FIELDS}
    if signal.turn is not None:
        content["turn"] = torch.nn.functional.pad(signal.turn, sides, value=-7)
    return replace(signal, mask=torch.nn.functional.pad(signal.mask, sides, value=False), **content)


def strategy_classes() -> list[type[WeightingStrategy]]:
    """Every concrete strategy of the package, by name."""
    found, queue = set(), [WeightingStrategy]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            if cls.__module__.startswith("lit_opd.weighting.") and not inspect.isabstract(cls):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def all_examples() -> list[tuple[str, WeightingStrategy]]:
    """(test id, instance) of every example of every strategy."""
    return [(f"{cls.__name__}-{i}", example) for cls in strategy_classes() for i, example in enumerate(cls.examples())]
