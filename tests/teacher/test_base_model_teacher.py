"""A LoRA student whose base model is the teacher: equal to a second copy of the base, without one."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from callbacks import RunCheckpoint, StopOnSignal
from lit_opd.errors import InputError, Stopped
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.teacher import BaseModelTeacher, LocalTeacher, RoutedTeacher
from tests.helpers import fixed, tiny

PLAIN = fixed.rollout(lengths=[5, 9, 1, 7], prompt_lengths=[4, 2, 6, 1], truncated={1})
OTHER = fixed.rollout(lengths=[1] * 4, prompt_lengths=[3, 5, 2, 4], truncated=set(), seed=5).prompts
# the teacher reads prompts of its own: with the student's it would agree with it for ever
PROMPTS = replace(PLAIN.prompts, teacher_ids=OTHER.ids, teacher_mask=OTHER.mask)
ROWS = replace(PLAIN, prompts=PROMPTS)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny.pair(tmp_path_factory.mktemp("models"))[0]


def module(folder: str, teacher, objective=None, *, lora=True) -> OPDModule:
    settings = StudentSettings(folder, dtype="float64", lora=LoraSettings(rank=4, alpha=64.0) if lora else None)
    return OPDModule(
        settings,
        teacher,
        sampler=fixed.FixedSampler(ROWS, max_new_tokens=9),
        objective=objective,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        gradient_clip_norm=None,
    )


def fit(trained: OPDModule) -> fixed.Collect:
    """From the same first adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fixed.fit(trained, ROWS.prompts, steps=STEPS)


def adapters(trained: OPDModule) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in trained.student.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("objective", [PolicyLoss, lambda: Divergence("reverse_kl")], ids=["policy", "divergence"])
def test_training_equals_that_with_a_second_copy_of_the_base(folder, objective):
    """Three steps: from the second on, student and teacher differ."""
    shared, copied = (
        module(folder, teacher, objective()) for teacher in (BaseModelTeacher(), LocalTeacher(folder, "float64"))
    )
    found, expected = (fit(trained) for trained in (shared, copied))
    for ours, theirs in zip(found.records, expected.records, strict=True):
        assert torch.allclose(ours.signal.teacher_logprobs, theirs.signal.teacher_logprobs, atol=1e-6, rtol=0)
    assert found.records[-1].signal.log_ratio.abs().max() > 1e-2
    for name, value in adapters(copied).items():
        assert torch.allclose(adapters(shared)[name], value, atol=1e-5, rtol=0), name
    assert not any(part.training for part in shared.student.modules())


def test_there_is_no_second_copy(folder):
    shared = module(folder, BaseModelTeacher())
    fixed.fit(shared, ROWS.prompts)
    assert not list(shared.teacher.parameters())
    assert not [name for name in shared.state_dict() if "teacher" in name]


def test_a_signal_while_the_adapters_are_switched_on_again_leaves_them_all_on(folder, tmp_path, monkeypatch):
    """Adapters that were left off would be missing from what the checkpoint takes for trained."""
    switch, on = BaseTunerLayer.enable_adapters, []

    def told(layer, enabled):
        switch(layer, enabled)
        on.append(enabled)
        if on.count(True) == 1 and enabled:
            os.kill(os.getpid(), signal.SIGTERM)

    shared = module(folder, BaseModelTeacher())
    shared.configure_model()
    names = set(adapters(shared))
    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", told)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(Stopped):
        fixed.fit(shared, ROWS.prompts, watch=[StopOnSignal(), RunCheckpoint()], **options)
    assert on.count(True) > 1 and names and set(adapters(shared)) == names
    assert not any(layer.disable_adapters for layer in shared.modules() if isinstance(layer, BaseTunerLayer))


def test_it_needs_adapters(folder):
    for teacher in (BaseModelTeacher(), RoutedTeacher({"a": BaseModelTeacher()})):
        with pytest.raises(InputError, match=r"model\.student\.lora.*BaseModelTeacher"):
            fixed.fit(module(folder, teacher, lora=False), ROWS.prompts)
