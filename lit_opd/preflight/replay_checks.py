"""What training on saved responses asks of the run: files that answer the data, and an objective that may read them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from lit_opd.errors import InputError
from lit_opd.objective import Likelihood, PolicyLoss
from lit_opd.preflight.baseline_checks import effective_baselines
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.prompts.special_tokens import SpecialTokens
from lit_opd.rollout import ReplaySampler
from lit_opd.rollout.base import TextFacts
from lit_opd.step.recipe import Recipe


def check_replay(module: Subject, data: PromptDataModule | None) -> None:
    """A warm-up has answers to train on; a sampler that replays has read them, and nothing reads them that may not.

    Raises:
        InputError: naming the setting.
    """
    sampler = module.sampler
    if module.warmup is not None and not isinstance(sampler, ReplaySampler):
        raise InputError(
            f"`model.sampler` must be ReplaySampler with `model.warmup`, got {type(sampler).__name__}: the warm-up trains on "
            "saved responses; name their files there, with `on_policy_fraction: 1` to sample all later ones"
        )
    inside = [part for part in vars(sampler).values() if isinstance(part, ReplaySampler)]
    if inside:
        raise InputError(
            f"`{type(sampler).__name__}.sampler` must be one that draws tokens itself, got ReplaySampler: saved responses answer "
            "the data's prompts, not an environment's"
        )
    sampler.know_texts(_facts(module, data))
    if isinstance(sampler, ReplaySampler):
        _check_use(module, sampler, data)


def _facts(module: Subject, data: PromptDataModule | None) -> TextFacts:
    tokenizer, stops = module.tokenizer, module.stop_ids
    own = tokenizer.eos_token_id
    return TextFacts(
        encode=SpecialTokens(tokenizer).ordinary,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        stop_ids=stops,
        end_id=own if own in stops or not stops else stops[0],
        vocabulary=module.vocabulary,
        prompts=None if data is None else getattr(data, "training_prompts", None),
        samples=getattr(data, "samples_per_prompt", 1),
        texts=getattr(data, "training_texts", {}),
    )


def _check_use(module: Subject, sampler: ReplaySampler, data: PromptDataModule | None) -> None:
    if sampler.on_policy_fraction == 1.0 and module.warmup is None:
        raise InputError(
            "`ReplaySampler.on_policy_fraction` must be below 1 without `model.warmup`, got 1: nothing would be read; lower it, "
            "or take its `fresh` as the sampler"
        )
    prompts = getattr(data, "training_prompts", None)
    lacking = sampler.lacking(prompts) if module.warmup is not None and prompts else []
    if lacking:
        raise InputError(
            f"`ReplaySampler.paths` must hold a response to every prompt with `model.warmup`, got none to {len(lacking)} of "
            f"{len(prompts or ())} (first: {lacking[0]!r}); leave those out of the data"
        )
    for recipe in _reading(module, sampler):
        _check_recipe(recipe, sampler)


def likelihood_warnings(module: Subject) -> Iterator[str]:
    """A likelihood of the student's own samples has nothing to learn from, unless something leaves some of them out."""
    sampler, recipe = module.sampler, module.recipe
    replays = isinstance(sampler, ReplaySampler) and sampler.on_policy_fraction < 1.0
    chosen = any(part.drops_tokens for part in recipe.advantage)
    if isinstance(recipe.objective, Likelihood) and not replays and not chosen:
        yield (
            f"`model.objective` Likelihood has `{type(sampler).__name__}`, which draws from the student: the expected gradient "
            "of its own samples' likelihood is zero, but for what the weighting makes of single tokens; take ReplaySampler, or "
            "another objective"
        )


def _reading(module: Subject, sampler: ReplaySampler) -> Iterator[Recipe]:
    """The recipes that meet saved responses."""
    *warmup, later = module.recipes
    yield from warmup
    if sampler.on_policy_fraction < 1.0:
        yield later


def _check_recipe(recipe: Recipe, sampler: ReplaySampler) -> None:
    objective = recipe.objective
    if not objective.reads_advantage:
        return
    name = type(objective).__name__
    if not sampler.knows_sampler and sampler.unknown_sampler == "refuse":
        raise InputError(
            f"`{name}` must have the sampler's log-probs of saved responses for its importance weights, got texts without "
            "them: take `Divergence` or `Likelihood`, rollouts of `RolloutSamples.save_rollouts_every`, or "
            "`ReplaySampler.unknown_sampler: as_student` to train without a correction, which is biased"
        )
    uncorrected = isinstance(objective, PolicyLoss) and objective.importance_cap is None
    _require_no_baseline(recipe, sampler, uncorrected=uncorrected)
    if sampler.knows_sampler and uncorrected:
        warnings.warn(
            f"`{name}.importance_cap` is null: saved responses count as if the student had written them now, which is biased",
            stacklevel=2,
        )


def _require_no_baseline(recipe: Recipe, sampler: ReplaySampler, *, uncorrected: bool) -> None:
    """On text of another that counts as the student's a baseline is fine-tuning on it, whatever the teacher says of it."""
    found = effective_baselines(recipe)
    if not found or (sampler.knows_sampler and not uncorrected):
        return
    setting = "`PolicyLoss.importance_cap` null" if uncorrected else "`ReplaySampler.unknown_sampler` as_student"
    raise InputError(
        f"`model.advantage` must have no baseline with {setting}, got {found[0]}: saved responses count as the student's own, "
        "and the baseline would raise their tokens whatever the teacher says of them; leave the baseline out, or take rollouts "
        "whose sampler is known and an importance cap"
    )
