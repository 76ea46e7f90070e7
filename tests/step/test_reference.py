"""The reference model: a third frozen scorer, loaded only where its log-probs are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_opd.advantage import RewardExtrapolation
from lit_opd.errors import InputError
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.teacher import BaseModelTeacher, LocalTeacher, SelfTeacher
from lit_opd.weighting.combinators import BatchMeanOne
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny
from tests.step.test_reuse import row_logprobs

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("models")
    return *tiny.pair(folder), tiny.save(tiny.qwen3(seed=3), folder / "reference")


@pytest.fixture(scope="module")
def rollout():
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2, 5})


def module(folders, rollout, **settings):
    student, teacher, reference = folders
    defaults = {"reference": LocalTeacher(reference, dtype="float64"), "advantage": [RewardExtrapolation(1.5)]}
    return fixed.module((student, teacher), rollout, **(defaults | settings))


@pytest.mark.parametrize("weighting", [Uniform, lambda: BatchMeanOne(ImportanceWeighting())], ids=["inside", "before"])
@pytest.mark.parametrize("budget", [None, 20])
def test_extrapolation_reads_the_references_own_logprobs(folders, rollout, weighting, budget):
    """A' = q - s + 0.5 (q - reference), each model asked row by row without padding."""
    from transformers import AutoModelForCausalLM

    trained = module(folders, rollout, weighting=weighting(), token_budget=budget)
    signal = fixed.fit(trained, rollout.prompts).records[0].signal
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            s, q, r = (torch.stack(row_logprobs(model, rollout, row)) for model in models)
        # transformers computes some norms in float32 whatever the weights are
        torch.testing.assert_close(signal.reference_logprobs[row, :length], r, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            signal.effective_advantage[row, :length], q - s + 0.5 * (q - r), rtol=1e-6, atol=1e-6
        )
        assert not signal.reference_logprobs[row, length:].any()


LORA = LoraSettings(rank=2)
INITIAL = {
    "a copy": (lambda path: LocalTeacher(path, dtype="float64"), None),
    "below adapters": (lambda path: BaseModelTeacher(), LORA),
    "kept": (lambda path: SelfTeacher("frozen"), None),
}


@pytest.mark.parametrize("kind", sorted(INITIAL))
def test_the_initial_student_reads_its_own_prompt_beside_a_teacher_that_is_told_more(folders, rollout, kind):
    """A hint of 8 tokens before the prompt: the teacher is the same model, and only it reads the hint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    prompts, hint = rollout.prompts, torch.arange(4, 12).expand(len(LENGTHS), -1)
    ids, mask = torch.cat([hint, prompts.ids], -1), torch.cat([hint > 0, prompts.mask], -1)
    told = replace(rollout, prompts=replace(prompts, teacher_ids=ids, teacher_mask=mask))
    read = replace(rollout, prompts=replace(prompts, ids=ids, mask=mask))
    build, lora = INITIAL[kind]
    student = StudentSettings(folders[0], dtype="float64", lora=lora)
    trained = module(folders, told, student=student, teacher=build(folders[0]), reference=build(folders[0]))
    signal = fixed.fit(trained, told.prompts).records[0].signal
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            plain, hinted = (torch.stack(row_logprobs(model, batch, row)) for batch in (rollout, read))
        torch.testing.assert_close(signal.reference_logprobs[row, :length], plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(signal.teacher_logprobs[row, :length], hinted, rtol=1e-6, atol=1e-6)
        assert float((plain - hinted).abs().max()) > 1e-2


def test_a_missing_reference_is_named_before_anything_is_loaded(folders, rollout):
    with pytest.raises(InputError, match="`model.reference` must be a teacher"):
        fixed.fit(module(folders, rollout, reference=None), rollout.prompts)


def test_the_reference_is_frozen_and_in_no_checkpoint(folders, rollout):
    trained = module(folders, rollout)
    fixed.fit(trained, rollout.prompts)
    reference = list(trained.reference.parameters())
    assert reference and not any(p.requires_grad or p.grad is not None for p in reference)
    optimized = {id(p) for group in trained.optimizers().param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in reference}
    assert {name.split(".")[0] for name in trained.state_dict()} == {"student"}
    assert not trained.reference.policy.training


def test_a_reference_that_nothing_reads_warns_and_is_not_loaded(folders, rollout):
    trained = module(folders, rollout, advantage=[])
    with pytest.warns(UserWarning, match="`model.reference` has no effect"):
        fixed.fit(trained, rollout.prompts)
    assert trained.reference.policy is None


def test_errors_name_the_references_own_setting(folders, rollout, tmp_path):
    other = tiny.save(tiny.qwen3(seed=3), tmp_path / "other", with_tokenizer=tiny.tokenizer(tiny.LETTERS[::-1]))
    for path in (other, str(tmp_path / "absent")):
        with pytest.raises(InputError, match="`model.reference.path`"):
            fixed.fit(module(folders, rollout, reference=LocalTeacher(path)), rollout.prompts)
