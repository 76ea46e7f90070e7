"""Which code meets an output head: Triton kernels on CUDA, the tiles everywhere else. One place decides.

Both give the same numbers. The environment variable ``LIT_OPD_HEAD`` says which: "auto" (the default) takes the kernels for
bfloat16 and float32 heads on CUDA where they run, "tiles" never does, "triton" stops the run where they cannot be taken.
Before their first use on a device they are compared with the tiles there; where they do not run or differ, "auto" warns once
and goes on with the tiles. float16 and float64 heads stay with the tiles.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_opd.errors import InputError
from lit_opd.scoring import tiles
from lit_opd.scoring.mixed import MixedHead
from lit_opd.scoring.tiles import Head

VARIABLE = "LIT_OPD_HEAD"
Choice = Literal["auto", "triton", "tiles"]
Code = Literal["triton", "tiles"]
DTYPES = (torch.bfloat16, torch.float32)  # the kernels sum in float32; slopes of a float16 head may vanish

PROBE_TOKENS, PROBE_WIDTH, PROBE_REST = 3, 16, 64  # of the comparison; entries: a block of the kernels and the rest
PROBE_VALUES = 1e-2  # nats
PROBE_GRADIENT = 0.05  # of its norm; a wrong kernel is off by its whole size


def choice() -> Choice:
    """What ``LIT_OPD_HEAD`` says.

    Raises:
        InputError: it is none of the three.
    """
    given = os.environ.get(VARIABLE) or "auto"
    if given not in get_args(Choice):
        raise InputError(
            f"the environment variable `{VARIABLE}` must be one of {', '.join(get_args(Choice))}, got {given!r}; leave it out "
            "for auto"
        )
    return given  # type: ignore[return-value]  # checked above


def check_choice(device: str) -> None:
    """Refuse before a run what would be refused at its first score.

    Args:
        device: type of the run's device.
    Raises:
        InputError: ``LIT_OPD_HEAD`` is none of its three, or asks for kernels that are not for this device.
    """
    why = _foreign(device)
    if choice() == "triton" and why:
        raise _refusal(why)


def code(*heads: Head) -> Code:
    """Which code meets these heads, "triton" or "tiles"; ``InputError`` where the kernels are asked for and cannot run."""
    wanted = choice()
    if wanted == "tiles":
        if heads[0].hidden.is_cuda:
            _say_once(f"head: tiles, as {VARIABLE} says")
        return "tiles"
    why = next((why for why in map(_unfit, heads) if why), None)
    if why is None:
        why = _unusable(heads[0].hidden.device, heads[0].hidden.dtype)
        if why and wanted == "auto":
            _warn_once(why)
    if why and wanted == "triton":
        raise _refusal(why)
    if not why:
        _say_once(f"head: triton on {heads[0].hidden.device}, {str(heads[0].hidden.dtype).removeprefix('torch.')}")
    return "tiles" if why else "triton"


def kernels(*heads: Head) -> Any | None:
    """The module ``lit_opd.scoring.kernels.head`` where it meets these heads; None where the tiles do."""
    if code(*heads) == "tiles":
        return None
    from lit_opd.scoring.kernels import head

    return head


def _unfit(head: Head) -> str | None:
    """Why the kernels are not for this head."""
    if isinstance(head, MixedHead):
        return "the head is several teachers', and the kernels are for one"
    dtype = head.hidden.dtype
    if dtype not in DTYPES:
        return f"the head is {str(dtype).removeprefix('torch.')}, and the kernels are for bfloat16 and float32"
    return _foreign(head.hidden.device.type)


def _foreign(device: str) -> str | None:
    """Why the kernels are not for a device; Triton's interpreter runs them on a CPU, for tests."""
    interpreted = choice() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        None if device == "cuda" or interpreted else f"the head is on the device {device}, and the kernels are for cuda"
    )


def _refusal(why: str) -> InputError:
    return InputError(f"the environment variable `{VARIABLE}` must be auto or tiles here, got 'triton': {why}")


@functools.cache
def _say_once(text: str) -> None:
    from lightning.pytorch.utilities.rank_zero import (
        rank_zero_info,  # slow to import, and scoring needs nothing else of it
    )

    rank_zero_info(text)


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"head: tiles, which take more time and memory than Triton's kernels, because {why}", stacklevel=2)


@functools.cache
def _unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not taken on a device, found by running them there; None where they are right."""
    try:
        from lit_opd.scoring.kernels import head, products
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the extra: pip install -e '.[cuda]'"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            student, teacher = (_made_up(seed, products.BLOCK + PROBE_REST, device, dtype) for seed in (0, 1))
            return next((why for why in _differences(head, student, teacher) if why), None)
    except Exception as error:  # a compiler, a driver and a device, each with errors of its own
        first = (str(error).strip().splitlines() or [""])[0]
        return f"its kernels do not run on {device} ({type(error).__name__}: {first})"


def _made_up(seed: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Head:
    generator = torch.Generator().manual_seed(seed)  # no state of the run's

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return Head(draw(PROBE_TOKENS, PROBE_WIDTH), draw(vocabulary, PROBE_WIDTH))


def _differences(fused: Any, student: Head, teacher: Head) -> Any:
    """Why the kernels are wrong, one kernel after the other; None for one that is right."""
    targets = torch.arange(PROBE_TOKENS, device=student.hidden.device) * (student.vocabulary // PROBE_TOKENS)
    yield _difference("log-probs", lambda of: of.token_logprobs(student, targets), fused, student)
    yield _difference("entropy", lambda of: of.token_entropy(student), fused, None)
    yield _difference("KL", lambda of: of.token_kl(student, teacher), fused, None)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        found = fused.token_divergence(student, teacher, kind=kind)
        plain = _plain_divergence(kind, *(head.logits(slice(None), 1.0).log_softmax(-1) for head in (student, teacher)))
        yield _gap(kind, found, plain, student)


def _plain_divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """From log-probs [N, V], the JSD at beta = 1/2."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum(-1)

    q = q.detach()
    mixture = torch.logaddexp(p, q) - torch.tensor(2.0).log().item()
    return {"reverse_kl": kl(p, q), "forward_kl": kl(q, p), "jsd": (kl(p, mixture) + kl(q, mixture)) / 2}[kind]


def _difference(name: str, function: Callable[[Any], Tensor], fused: Any, head: Head | None) -> str | None:
    return _gap(name, function(fused), function(tiles), head)


def _gap(name: str, mine: Tensor, theirs: Tensor, head: Head | None) -> str | None:
    """Why ``mine`` [N] is not ``theirs``, in value or in gradient of ``head``; None where it is."""
    value = float((mine - theirs).detach().abs().max())
    if not value <= PROBE_VALUES:
        return f"its kernels give {name} that differ by {value:.3g} nats"
    if head is None:
        return None
    upstream = torch.linspace(-1.0, 2.0, PROBE_TOKENS, device=mine.device)
    assert head.weight is not None
    inputs = [head.hidden, head.weight]
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (mine, theirs))
    for ours, plain in zip(*gradients, strict=True):
        share = float((ours - plain).float().norm() / plain.float().norm())
        if not share <= PROBE_GRADIENT:
            return f"its kernels give a gradient of {name} that differs by a share of {share:.3g}"
    return None


# -- what scoring asks of a head ---------------------------------------------------------------------------------------


def token_logprobs(head: Head, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi(target) for each token, int64 [N] -> [N] nats, at least float32, differentiable; see ``tiles``."""
    return (kernels(head) or tiles).token_logprobs(head, targets, temperature=temperature)  # type: ignore[no-any-return]


def token_entropy(head: Head, *, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary entropy at each token, [N] nats, no gradient; see ``tiles``."""
    return (kernels(head) or tiles).token_entropy(head, temperature=temperature)  # type: ignore[no-any-return]


def token_kl(student: Head, teacher: Head, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) at each token, [N] nats, no gradient; see ``tiles``."""
    return (kernels(student, teacher) or tiles).token_kl(student, teacher, temperature=temperature)  # type: ignore[no-any-return]


def token_topk(head: Head, *, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ids int64 and log-probs of the k likeliest entries, [N, K] each, no gradient; see ``tiles``."""
    return (kernels(head) or tiles).token_topk(head, k=k, temperature=temperature)  # type: ignore[no-any-return]


def token_listed(head: Head, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi of listed entries, int64 [N, K] -> [N, K] nats, no gradient; see ``tiles``, which all devices run."""
    return tiles.token_listed(head, ids, temperature=temperature)
