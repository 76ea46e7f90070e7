"""What teacher prompts that are made after sampling ask of the run."""

from __future__ import annotations

import warnings

from lit_opd.errors import InputError
from lit_opd.preflight.baseline_checks import effective_baselines
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import HindsightPrompt, PeerDemonstration, PromptDataModule


def check_hindsight(module: Subject, data: PromptDataModule | None) -> None:
    """Responses have what the prompts are made of, and nothing reads the teacher before they are made.

    Raises:
        InputError: naming the setting.
    """
    own = getattr(data, "teacher_prompt", None)
    if not isinstance(own, HindsightPrompt):
        return
    name = type(own).__name__
    plays = getattr(module.sampler, "environment", None) is not None
    if own.reads_reward and module.reward is None and not plays:
        raise InputError(
            f"`model.reward` must be given for `data.teacher_prompt` {name}, which reads a reward, got null; set it to "
            "AnswerReward, to a class of your own, or sample with TurnsSampler"
        )
    samples = getattr(data, "samples_per_prompt", 1)
    if own.compares and samples < 2:
        raise InputError(
            f"`data.samples_per_prompt` must be >= 2 for `data.teacher_prompt` {name}, which shows the teacher another sample "
            f"of the same prompt, got {samples}; 8 is usual"
        )
    for setting, given in (("model.rollout_stop", module.rollout_stop), ("model.warmup", module.warmup)):
        if given is not None:
            raise InputError(
                f"`{setting}` must be null with `data.teacher_prompt` {name}, got {type(given).__name__}: there the teacher "
                "would score without what it reads after sampling; leave it out"
            )
    found = effective_baselines(module.recipe)
    if found and not isinstance(own, PeerDemonstration):
        warnings.warn(
            f"`data.teacher_prompt` {name} may show the teacher something of the response that it scores, and what the teacher "
            f"thinks of a token then depends on the sampled tokens, so the baseline of `{found[0]}` no longer averages out and "
            "changes the expected gradient; show it other samples only, as PeerDemonstration does, or use no baseline",
            stacklevel=2,
        )
    if module.validation.divergence:
        warnings.warn(
            f"`model.validation.divergence` compares with the teacher without what `data.teacher_prompt` {name} shows it, as no "
            "prompt is made in validation; set it to false",
            stacklevel=2,
        )
