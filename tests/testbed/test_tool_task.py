"""The embedded task with tools: its conversations, its files, and what the shipped models can do when they really talk."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_opd.errors import InputError
from lit_opd.prompts.encoding import PromptEncoder, collate, encode_rows
from lit_opd.prompts.sources import PromptRow
from lit_opd.rollout import DecodeSampler, SamplingSettings
from lit_opd.scoring.model import ScoringModel
from lit_opd.testbed import TOOLS_ASSETS, read_records
from lit_opd.testbed import tool_build as building
from lit_opd.testbed.tool_task import TableTools, draw_problem, make_tool_tokenizer, table, tool_problems
from lit_opd.turns import TurnsSampler
from lit_opd.turns.calls import tool_calls

NUM_TALKS = 48


def messages(problem) -> list[dict]:
    """The right conversation as a data set would hold it, calls as objects."""
    names = [("lookup", {"key": word}) for word in problem.words]
    names.append(("calculator", {"expression": "+".join(problem.values)}))
    heard = [*problem.values, problem.answer]
    found = [{"role": "user", "content": problem.prompt}]
    for (name, arguments), value in zip(names, heard, strict=True):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        found += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": value}]
    return [*found, {"role": "assistant", "content": f"\\boxed{{{problem.answer}}}"}]


def test_what_the_models_learn_from_is_what_the_template_makes_of_calls():
    tokenizer, problem = make_tool_tokenizer(), draw_problem(random.Random(3))
    ids, targets = building.supervised_conversations([problem], tokenizer)
    assert ids[0].tolist() == tokenizer.apply_chat_template(messages(problem), return_dict=False)
    said = tokenizer.decode(ids[0][targets[0] != building.NOT_SUPERVISED])
    assert said == "".join(f"{said}<eos>" for said, _ in problem.turns)
    for text, _ in problem.turns[:-1]:
        (call,) = tool_calls(text)
        assert call.wrong is None and len(tokenizer.encode(text)) <= 13
    assert tokenizer.decode(tokenizer.encode("error: no tool x")) == "error: no tool x"


def test_the_files_hold_right_answers_and_no_prompt_twice():
    train, val = (read_records(TOOLS_ASSETS / f"{name}.jsonl") for name in ("train", "val"))
    entries = table()
    for row in [*train, *val]:
        assert sum(int(entries[word]) for word in row["prompt"].split("+")) == int(row["answer"])
    prompts = [row["prompt"] for row in [*train, *val]]
    assert len(set(prompts)) == len(prompts) == len(train) + len(val) and {len(row["answer"]) for row in train} == {3}


def talk(name: str) -> list[float]:
    """Rewards of greedy conversations."""
    model = AutoModelForCausalLM.from_pretrained(TOOLS_ASSETS / name)
    tokenizer = AutoTokenizer.from_pretrained(TOOLS_ASSETS / name)
    policy = ScoringModel(model, vocabulary=len(tokenizer))
    policy.choose_path(name)
    rows = [
        PromptRow(row["id"], row["prompt"], row["answer"])
        for row in read_records(TOOLS_ASSETS / "val.jsonl")[:NUM_TALKS]
    ]
    encoder = PromptEncoder(tokenizer)
    sampler = TurnsSampler(DecodeSampler(max_new_tokens=96), TableTools(), max_turns=6, max_turn_tokens=20)
    sampler.attach(tokenizer, encoder)
    settings = SamplingSettings(
        max_new_tokens=96, stop_ids=(tokenizer.eos_token_id,), pad_id=0, vocabulary=len(tokenizer), greedy=True
    )
    prompts = collate(encode_rows(rows, encoder, keep_rows=True), 0)
    return sampler.sample(policy, prompts, settings).reward.nan_to_num().tolist()


def test_the_teacher_answers_by_its_tools_and_the_student_half_does():
    teacher, student = (sum(talk(name)) / NUM_TALKS for name in ("teacher", "student"))
    assert teacher > 0.95 and 0.15 < student < 0.65


def test_a_build_writes_what_it_trained_and_replaces_only_a_build(tmp_path, monkeypatch):
    for plan in ("TOOL_TEACHER", "TOOL_STUDENT"):
        small = replace(getattr(building, plan), hidden_size=16, num_steps=2, batch_size=2)
        monkeypatch.setattr(building, plan, small)
    for name, size in (("NUM_TRAIN", 8), ("NUM_VAL", 4), ("NUM_CHECKED", 4)):
        monkeypatch.setattr(building, name, size)
    building.build_tools(tmp_path / "out", seed=1)
    first = (tmp_path / "out" / "student" / "model.safetensors").read_bytes()
    building.build_tools(tmp_path / "out", seed=1)
    assert (tmp_path / "out" / "student" / "model.safetensors").read_bytes() == first
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == set(building.ENTRIES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="older build"):
        building.build_tools(tmp_path / "mine")
    with pytest.raises(InputError, match="tool_problems.count"):
        tool_problems(count=0, seed=1)
