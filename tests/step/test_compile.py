"""Compiled blocks: the same gradients and samples, and a clear error where nothing can compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.models.sharding import compile_layers
from lit_opd.rollout import TransformersSampler
from tests.helpers import fixed, tiny

ROWS = fixed.rollout(lengths=[5, 9, 1, 7], prompt_lengths=[4, 2, 6, 1], truncated={1})


@pytest.mark.slow  # a minute of compilation
def test_compiled_blocks_train_and_sample_alike(tmp_path):
    folders = tiny.pair(tmp_path)
    found = {}
    for compiled in (False, True):
        trained = fixed.module(folders, ROWS)
        trained.student_settings = replace(trained.student_settings, compile=compiled)
        loss, gradient = fixed.gradient(trained, ROWS.prompts)
        sampler = TransformersSampler(max_new_tokens=6)
        settings = trained.sampling_settings(max_new_tokens=6)
        found[compiled] = loss, gradient, sampler.sample(trained.student, ROWS.prompts, settings).response_ids
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert fixed.relative_gap(found[True][1], found[False][1]) < 1e-6
    assert torch.equal(found[True][2], found[False][2])


def test_without_a_compiler_the_setting_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"model\.student\.compile"):
        compile_layers(None)
