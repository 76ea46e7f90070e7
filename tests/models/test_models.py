"""Loading, agreement of vocabularies, export."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_opd.errors import InputError
from lit_opd.models.export import export_folder
from lit_opd.models.loading import load_causal_lm, load_generation_config, load_tokenizer
from lit_opd.models.student import StudentSettings, build_student
from lit_opd.models.vocabulary import agree_vocabularies
from tests.helpers import tiny


def test_the_first_ten_differing_tokens_are_named():
    ours, theirs = tiny.tokenizer("abcdefghijklmnop"), tiny.tokenizer("ponmlkjihgfedcba")
    with pytest.raises(InputError) as raised:
        agree_vocabularies(ours, theirs, student_rows=64, teacher_rows=64)
    message = str(raised.value)
    assert "16 tokens differ" in message and "'a' (student 4, teacher 19)" in message
    assert message.count("(student") == 10 and "'k'" not in message


def test_a_token_one_side_lacks_is_a_difference():
    with pytest.raises(InputError, match=r"1 tokens differ: 'd' \(student 7, teacher absent\)"):
        agree_vocabularies(tiny.tokenizer("abcd"), tiny.tokenizer("abc"), student_rows=64, teacher_rows=64)


def test_rows_behind_the_last_token_are_cut():
    same = tiny.tokenizer("abcd")
    assert agree_vocabularies(same, tiny.tokenizer("abcd"), student_rows=64, teacher_rows=80) == 8
    assert agree_vocabularies(same, same, student_rows=8, teacher_rows=8) == 8
    with pytest.raises(InputError, match="8 ids.*student 6"):
        agree_vocabularies(same, same, student_rows=6, teacher_rows=80)


def test_a_missing_folder_names_setting_and_value(tmp_path):
    with pytest.raises(InputError, match="model.student.path.*nowhere"):
        load_causal_lm(str(tmp_path / "nowhere"), "model.student.path", dtype="float32")
    with pytest.raises(InputError, match="local folder"):
        load_tokenizer("no-such-org/no-such-model", "model.student.path")


def test_pickled_weights_are_not_loaded(tmp_path):
    """A folder with only pytorch_model.bin, which is a pickle, is refused."""
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "model")
    state = tiny.qwen3(seed=1).state_dict()
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="model.student.path"):
        load_causal_lm(folder, "model.student.path", dtype="float32")


def test_half_precision_weights_warn(tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "model")
    with pytest.warns(UserWarning, match="AdamW at a small learning rate loses most updates"):
        build_student(StudentSettings(folder, dtype="bfloat16"))


def test_an_export_is_whole_replaces_the_old_one_and_keeps_generation_settings(tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "model")
    GenerationConfig(eos_token_id=[1, 5], pad_token_id=0, temperature=0.6, do_sample=True).save_pretrained(folder)
    student = build_student(StudentSettings(folder))
    assert student.generation_config.temperature in (None, 1.0)
    with torch.no_grad():
        student.lm_head.weight.add_(1.0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.txt").write_text("old")
    export_folder(student, tiny.tokenizer(), out, state=None, generation=load_generation_config(folder))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again.lm_head.weight, student.lm_head.weight)
    assert again.generation_config.temperature == 0.6 and again.generation_config.eos_token_id == [1, 5]
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.TEMPLATE
    assert not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
