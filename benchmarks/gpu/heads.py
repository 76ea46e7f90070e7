"""The output head alone, forward and backward: milliseconds, memory beside inputs and gradients, agreement with plain logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import MIB, Bench
from lit_opd.objective import Divergence
from lit_opd.scoring.tiles import Head, token_entropy, token_kl, token_logprobs

Gradient = tuple[Tensor, Tensor, Tensor]  # log-probs, gradients of states and of the weight
DTYPES = (torch.bfloat16, torch.float32)


def run(bench: Bench) -> None:
    """Every way through the head that is there."""
    for dtype in DTYPES if bench.on_gpu else (torch.float32,):
        hidden, weight, targets = _inputs(bench, dtype)
        name = str(dtype).removeprefix("torch.")
        truth: Gradient | None = None
        for kind, values in WAYS.items():

            def measure() -> dict[str, Any]:
                """Time and memory of a gradient; of all ways after plain logits also the distance from theirs."""
                nonlocal truth
                found = _gradient(values, hidden, weight, targets)  # noqa: B023
                row = _figures(bench, lambda: _gradient(values, hidden, weight, targets))  # noqa: B023
                truth = found if kind == "plain logits" else truth  # noqa: B023
                return row | ({} if truth is None or truth is found else _against(found, truth))

            bench.attempt(f"log-probs, {kind}, {name}", measure)
        del truth
        _statistics(bench, name, hidden, weight)


def _inputs(bench: Bench, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = bench.sizes
    hidden = torch.randn(sizes.head_tokens, sizes.student.width, device=bench.device).to(dtype)
    weight = (torch.randn(sizes.vocabulary, sizes.student.width, device=bench.device) * sizes.student.width**-0.5).to(
        dtype
    )
    return hidden, weight, torch.randint(sizes.vocabulary, (sizes.head_tokens,), device=bench.device)


def _gradient(values: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> Gradient:
    states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    found = values(states, head, targets)
    found.sum().backward()
    assert states.grad is not None and head.grad is not None
    return found.detach(), states.grad, head.grad


def _figures(bench: Bench, run: Callable[[], Any]) -> dict[str, Any]:
    bench.synchronise()
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    bench.reset_peak()
    seconds = bench.median_seconds(run, bench.sizes.head_repeats)
    peak = bench.peak()
    return {"ms": round(1000 * seconds, 1), "extra_mib": None if peak is None else round((peak - before) / MIB)}


def _against(found: Gradient, truth: Gradient) -> dict[str, float]:
    names = ("logprob_nats", "states_gradient", "weight_gradient")
    most = (found[0].float() - truth[0].float()).abs().max()
    shares = [((a - b).float().norm() / b.float().norm()) for a, b in zip(found[1:], truth[1:], strict=True)]
    return {name: float(value) for name, value in zip(names, (most, *shares), strict=True)}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [N] of states [N, H] and a head [V, H] by whole logits."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N], the project's own, by whichever way it takes on this device."""
    return token_logprobs(Head(hidden, weight), targets)


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] by cut-cross-entropy, which leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")  # type: ignore[no-any-return]


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] by Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")  # type: ignore[no-any-return]


WAYS = {"plain logits": plain, "ours": ours, "cut-cross-entropy": cut, "Liger": liger}


def _statistics(bench: Bench, name: str, hidden: Tensor, weight: Tensor) -> None:
    """What weightings and objectives read beside the sampled token's log-prob."""
    other = torch.roll(hidden, 1, 0)
    objective = Divergence("reverse_kl")

    def divergence() -> None:
        states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        objective.token_divergence(Head(states, head), Head(other, weight), temperature=1.0).sum().backward()

    def entropy() -> None:
        with torch.no_grad():
            token_entropy(Head(hidden, weight))

    def kl() -> None:
        with torch.no_grad():
            token_kl(Head(hidden, weight), Head(other, weight))

    for what, run in (("full reverse KL, gradient", divergence), ("entropy", entropy), ("token KL", kl)):
        bench.attempt(f"{what}, {name}", lambda run=run: _figures(bench, run))  # type: ignore[misc]
