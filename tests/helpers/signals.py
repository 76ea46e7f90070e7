"""Builders of token signals that the tests share, and the discovery of every strategy in the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import lit_opd.weighting  # noqa: F401  importing it imports every strategy
from lit_opd.types import TokenSignal, TopK
from lit_opd.weighting.base import WeightingStrategy

TOKEN_FIELDS = ("student_logprobs", "teacher_logprobs", "sampler_logprobs", "reference_logprobs", "advantage")
STATE_FIELDS = ("student_entropy", "teacher_entropy", "token_kl")  # column t is a function of the tokens before t
FLOAT_FIELDS = TOKEN_FIELDS + STATE_FIELDS
LIST_FIELDS = ("student_topk", "teacher_topk")  # functions of the tokens before t too
LISTED = "student_at_teacher_topk"
VOCABULARY, LISTED_TOKENS = (
    24,
    20,
)  # of the made-up distributions; lists shorter than the vocabulary, longer than k = 16


def random_field(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Plausible float64 content: log-probs in (-6, 0), advantages of either sign, entropies and KL in (0, 2)."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name in STATE_FIELDS:
        return 2.0 * draws
    return 4.0 * draws - 2.0 if name == "advantage" else -6.0 * draws**2 - 1e-3


def random_lists(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> dict[str, object]:
    """Top-k lists of two distributions that agree in part, and the student's log-probs of the teacher's list."""
    shared, own, other = torch.randn((3, *shape, VOCABULARY), generator=generator, dtype=torch.float64)
    student, teacher = ((2 * shared + part).log_softmax(-1) for part in (own, other))
    found = [logprobs.topk(LISTED_TOKENS, -1) for logprobs in (student, teacher)]
    lists = {
        name: TopK(ids=top.indices, logprobs=top.values.to(dtype)) for name, top in zip(LIST_FIELDS, found, strict=True)
    }
    return {**lists, LISTED: student.gather(-1, found[1].indices).to(dtype)}


def random_signal(mask: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float64, step: int = 3) -> TokenSignal:
    """A signal of three turns with every optional field, on ``mask`` (bool [B, T]); row keys 100, 101, ..."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(mask.shape)
    content = {name: random_field(name, shape, generator).to(dtype) for name in FLOAT_FIELDS}
    lists = random_lists(shape, generator, dtype)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    turn = (3 * torch.arange(shape[1]) // max(shape[1], 1)).expand(shape)
    known = {"row_keys": 100 + torch.arange(len(mask)), "step": step, "token_ids": ids, "turn": turn}
    return TokenSignal(mask=mask, **known, **content, **lists)  # type: ignore[arg-type]


def mapped(signal: TokenSignal, function: Callable[[str, Tensor], Tensor]) -> TokenSignal:
    """The signal with every per-token tensor replaced: ``function`` of its name and the tensor [B, T] or [B, T, K]."""
    changes: dict[str, object] = {}
    for name in (*FLOAT_FIELDS, "mask", "token_ids", "turn", LISTED, *LIST_FIELDS):
        value = getattr(signal, name)
        if isinstance(value, TopK):
            changes[name] = TopK(ids=function("ids", value.ids), logprobs=function("logprobs", value.logprobs))
        elif value is not None:
            changes[name] = function(name, value)
    return replace(signal, **changes)  # type: ignore[arg-type]


def along(columns: Tensor, value: Tensor) -> Tensor:
    """``columns`` [B, T] or [T] with further dimensions, so that it meets ``value`` [B, T] or [B, T, K]."""
    return columns if value.ndim == 2 else columns.unsqueeze(-1)


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
    """The signal with fresh random content in ``columns`` (bool [T]) of the fields ``names``; with state fields go the lists,
    with token fields the tokens."""
    fresh = random_signal(signal.mask, seed=seed + 10_000)
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(signal.mask.shape)
    changes = {n: torch.where(columns, random_field(n, shape, generator), getattr(signal, n)) for n in names}
    others = ((LISTED, *LIST_FIELDS) if set(STATE_FIELDS) <= set(names) else ()) + (
        ("token_ids",) if set(TOKEN_FIELDS) <= set(names) else ()
    )

    def mixed(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(along(columns, old), new, old)

    for name in others:
        new, old = getattr(fresh, name), getattr(signal, name)
        if isinstance(old, TopK):
            changes[name] = TopK(ids=mixed(new.ids, old.ids), logprobs=mixed(new.logprobs, old.logprobs))
        elif old is not None:
            changes[name] = mixed(new, old)
    return replace(signal, **changes)


def padded(signal: TokenSignal, left: int, right: int, value: float) -> TokenSignal:
    """The signal with masked columns on both sides that hold ``value``."""

    def grown(name: str, tensor: Tensor) -> Tensor:
        fill = value if tensor.is_floating_point() else -7 if name == "turn" else 0
        return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (left, right), value=fill)

    return mapped(signal, grown)


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
