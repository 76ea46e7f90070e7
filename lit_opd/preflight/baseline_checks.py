"""Where a baseline of the advantage does not average out, so that it changes what is learned. See ``ValueBaseline``."""

from __future__ import annotations

from collections.abc import Iterator

from lit_opd.advantage import after_baseline_warning, baseline_warning, baselines, gate_warning
from lit_opd.preflight.subject import Subject
from lit_opd.rollout import ReplaySampler
from lit_opd.step.recipe import Recipe


def effective_baselines(recipe: Recipe) -> list[str]:
    """Class names of the baselines that reach the loss."""
    return baselines(recipe.advantage) if recipe.objective.reads_advantage else []


def baseline_warnings(module: Subject) -> Iterator[str]:
    """A line for each setting under which the baseline of the run is biased."""
    found = effective_baselines(module.recipe)
    if not found:
        return
    advantage = module.recipe.advantage
    for warning in (
        baseline_warning(advantage, module.recipe.weighting),
        after_baseline_warning(advantage),
        gate_warning(advantage),
    ):
        if warning is not None:
            yield warning
    for cause, remedy in (*_of_lengths(module), *_of_rows(module), *_of_sampling(module)):
        yield f"{cause}, so the baseline of `{found[0]}` no longer averages out and changes the expected gradient; {remedy}"


def _of_lengths(module: Subject) -> Iterator[tuple[str, str]]:
    aggregation = module.recipe.aggregation
    if aggregation in ("sequence-mean", "token-mean"):
        counted = "the row's tokens" if aggregation == "sequence-mean" else "the tokens of the step"
        yield (
            f"`model.aggregation` {aggregation} divides by {counted}, and a sampled token may end its row",
            "use constant or sequence-sum, or no baseline (only where all responses have one length is nothing changed)",
        )


def _of_rows(module: Subject) -> Iterator[tuple[str, str]]:
    if module.truncated != "keep":
        yield (
            f"`model.truncated` {module.truncated} leaves out rows by where they ended, which depends on the sampled tokens",
            "use keep, or no baseline",
        )
    dropping = [type(part).__name__ for part in module.recipe.advantage if part.drops_tokens]
    if dropping:
        yield (
            f"`{dropping[0]}` in `model.advantage` drops rows or tokens by what was sampled",
            "leave one of them out",
        )


def _of_sampling(module: Subject) -> Iterator[tuple[str, str]]:
    sampler = module.sampler
    if isinstance(sampler, ReplaySampler) and sampler.on_policy_fraction == 0 and sampler.missing == "error":
        return  # it draws nothing that is trained on
    narrow = [f"`top_p` {sampler.top_p:g}"] if sampler.top_p < 1 else []
    narrow += [f"`top_k` {sampler.top_k}"] if sampler.top_k else []
    if narrow:
        yield (
            f"`model.sampler` {type(sampler.engine).__name__} with {' and '.join(narrow)} never draws some of the tokens "
            "that are scored",
            "use top_p 1 and top_k 0, or no baseline",
        )
