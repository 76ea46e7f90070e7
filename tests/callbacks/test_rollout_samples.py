"""Samples against the record they came from; a whole batch saved, read back and weighted again."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks import RolloutSamples
from callbacks.rollout_samples import _verdict, sample_rows
from lit_opd import saved_steps
from lit_opd.errors import InputError
from lit_opd.files import append_lines, drop_lines_after, read_lines
from lit_opd.report.replay import load_record, load_rollout, save_record
from lit_opd.types import FinishReason, Replayed, StepRecord, TopK
from lit_opd.weighting.fire import FiRe
from lit_opd.weighting.importance import ImportanceWeighting
from tests.callbacks.test_position_profile import Records
from tests.helpers import cases, profiled, tiny, wandb_file

KEYS = [
    *("step", "row_id", "prompt", "response", "answer", "verdict", "teacher", "length", "finish_reason"),
    *("reverse_kl_k1", "disagreement", "weight_mean", "disagreement_by_tenth", "weight_by_tenth", "tokens"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Seven steps; samples every third, whole batches every second; entropies are computed."""
    folder = tmp_path_factory.mktemp("run")
    logger, records = WandbLogger(save_dir=folder, offline=True), Records()
    callbacks = [RolloutSamples(every=3, count=3, save_rollouts_every=2), records]
    profiled.fit(folders, folder, callbacks, steps=7, logger=logger, settings={"weighting": FiRe()})
    logger.experiment.finish()
    return folder, records.seen


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_come_at_the_first_step_and_on_schedule(finished):
    assert [line["step"] for line in lines(finished[0])] == [1, 1, 1, 3, 3, 3, 6, 6, 6]


def test_samples_equal_slow_loops_over_the_record(finished):
    folder, records = finished
    letters = tiny.tokenizer()
    for number, line in enumerate(lines(folder)):
        row, record = number % 3, records[line["step"] - 1]
        rollout, signal, length = record.rollout, record.signal, cases.LENGTHS[number % 3]
        assert list(line) == KEYS and line["row_id"] == f"row-{row}" and line["length"] == length
        assert line["finish_reason"] == ("length" if row in cases.TRUNCATED else "stop")
        assert line["response"] == letters.decode(rollout.response_ids[row, :length])
        assert line["prompt"] == letters.decode(rollout.prompts.ids[row, -cases.PROMPTS[row] :])
        ratios = [float(signal.teacher_logprobs[row, t] - signal.student_logprobs[row, t]) for t in range(length)]
        weights = [float(record.weights[row, t]) for t in range(length)]
        assert line["reverse_kl_k1"] == pytest.approx(-sum(ratios) / length)
        assert line["disagreement"] == pytest.approx(sum(map(abs, ratios)) / length)
        assert line["weight_mean"] == pytest.approx(sum(weights) / length)
        tokens = line["tokens"]
        assert "".join(tokens["text"]) == line["response"] and len(tokens["text"]) == length
        assert tokens["weight"] == pytest.approx(weights, abs=1e-4)
        pairs = zip(tokens["teacher_logprob"], tokens["student_logprob"], strict=True)
        assert [teacher - student for teacher, student in pairs] == pytest.approx(ratios, abs=2e-4)
        for tenth in range(10):
            inside = [t for t in range(length) if tenth * 2 * length <= (2 * t + 1) * 10 < (tenth + 1) * 2 * length]
            expected = sum(weights[t] for t in inside) / len(inside) if inside else None
            found = line["weight_by_tenth"][tenth]
            assert found == (None if expected is None else pytest.approx(expected))


def test_the_wandb_table_equals_the_lines(finished):
    folder, _ = finished
    rows = [row for row in wandb_file.history(folder / "wandb") if "samples.path" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 3, 6]
    (run,) = (folder / "wandb").glob("offline-run-*")
    for row in rows:
        table = json.loads((run / "files" / row["samples.path"]).read_text())
        expected = [line for line in lines(folder) if line["step"] == row["trainer/global_step"]]
        assert table["data"] == [[line[name] for name in table["columns"]] for line in expected]
        assert {"prompt", "response", "reverse_kl_k1", "finish_reason", "weight_mean"} <= set(table["columns"])


def test_samples_are_graded_and_long_ones_keep_their_first_tokens(finished):
    record = finished[1][0]
    prompts = replace(record.rollout.prompts, answers=tuple(record.rollout.prompts.row_ids))
    lines = sample_rows(
        replace(record, rollout=replace(record.rollout, prompts=prompts)), tiny.tokenizer(), 2, tokens=3
    )
    assert [line["verdict"] for line in lines] == ["no_answer"] * 2
    for line, length in zip(lines, cases.LENGTHS, strict=False):
        assert {len(column) for column in line["tokens"].values()} == {min(3, length)}
        assert line["response"].startswith("".join(line["tokens"]["text"]))
    (plain,) = sample_rows(record, tiny.tokenizer(), 1)
    assert "tokens" not in plain and plain["verdict"] is None  # no answers
    assert _verdict("so \\boxed{42}", "42.0") == "correct" and _verdict("\\boxed{41}", "42") == "wrong"
    assert _verdict("\\boxed{x + 1}", "1 + x") is None and _verdict("\\boxed{4", "4") == "truncated"


def test_the_divergence_of_a_saved_response_is_not_told(finished):
    """It was not sampled by the student; how much both models differ on it is."""
    record, rows = finished[1][0], len(finished[1][0].rollout)
    old = torch.arange(rows) == 1
    told = Replayed(old, torch.ones_like(old), torch.zeros(rows, dtype=torch.int64))
    record = replace(record, rollout=replace(record.rollout, replayed=told))
    lines = sample_rows(record, tiny.tokenizer(), 3)
    assert [line["reverse_kl_k1"] is None for line in lines] == [False, True, False]
    assert all(line["disagreement"] > 0 for line in lines)


def test_a_resumed_run_writes_no_sample_twice(folders, tmp_path):
    checkpoint = tmp_path / "middle.ckpt"
    profiled.fit(folders, tmp_path, [RolloutSamples(every=2, count=1), profiled.SaveAt(3, checkpoint)], steps=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    profiled.fit(folders, tmp_path, [RolloutSamples(every=2, count=1)], steps=6, ckpt_path=checkpoint)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4, 6]


def test_a_last_line_cut_inside_a_character_goes_and_one_before_it_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    append_lines(path, [{"step": 1, "response": "é"}, {"step": 2, "response": "日本"}])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index("本".encode()) + 1])
    assert drop_lines_after(path, 2) == read_lines(path) == [{"step": 1, "response": "é"}]
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
    path.write_bytes(b'{"step": 1, "response": "\xe6"}\n' + whole)
    with pytest.raises(ValueError, match=r"samples\.jsonl:1 must be a JSON object"):
        drop_lines_after(path, 2)


def test_a_full_disk_where_a_run_goes_on_leaves_its_lines_as_they_were(tmp_path, file_limit, capsys):
    """``capsys`` keeps standard error out of files."""
    path = tmp_path / "samples.jsonl"
    append_lines(path, [{"step": step, "response": "a" * 100} for step in range(9)])
    before = path.read_bytes()
    file_limit(200)
    with pytest.raises(InputError, match=r"--run_dir.*samples\.jsonl.*File too large.*free some "):
        drop_lines_after(path, 7)
    file_limit(None)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
    assert len(drop_lines_after(path, 7)) == 8


# -- whole batches -----------------------------------------------------------------------------------------------------


def assert_same(ours: Any, theirs: Any, path: str = "record") -> None:
    """Every field of two records, bit for bit."""
    assert type(ours) is type(theirs), path
    if is_dataclass(theirs):
        for field in fields(theirs):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name), f"{path}.{field.name}")
    elif isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def test_saved_batches_are_the_records_bit_for_bit(finished):
    folder, records = finished
    names = sorted(path.name for path in (folder / "rollouts").iterdir())
    assert names == ["step-2.safetensors", "step-4.safetensors", "step-6.safetensors"]
    for step in (2, 4, 6):
        loaded = load_record(folder / "rollouts" / f"step-{step}.safetensors")
        assert loaded.signal.student_entropy is not None
        assert_same(loaded, records[step - 1])


def test_every_optional_field_survives(finished, tmp_path):
    whole: StepRecord = finished[1][0]
    shape = (*whole.signal.mask.shape, 3)
    topk = TopK(torch.randint(0, 40, shape), torch.randn(shape))
    prompts = replace(
        whole.rollout.prompts,
        answers=("1", None, "é", *[None] * 4),
        teachers=("a", "b", *[None] * 5),
        teacher_ids=whole.rollout.prompts.ids.clone(),
        teacher_mask=whole.rollout.prompts.mask.clone(),
    )
    signal = replace(whole.signal, advantage=whole.signal.log_ratio * 2, teacher_topk=topk, token_kl=whole.loss.abs())
    full = replace(whole, rollout=replace(whole.rollout, prompts=prompts), signal=signal)
    assert_same(load_record(save_record(full, tmp_path / "new" / "full.safetensors")), full)


def test_a_loaded_rollout_can_be_weighted_again(finished):
    """What replay is for: the stored signal gives the stored weights, and another strategy its own."""
    folder, records = finished
    rollout, signal = load_rollout(folder / "rollouts" / "step-4.safetensors")
    assert torch.equal(FiRe()(signal, progress=records[3].progress), records[3].weights)
    assert float(ImportanceWeighting()(signal)[0, 0]) == 1.5
    assert int(rollout.finish_reason[2]) == FinishReason.LENGTH and rollout.provenance.engine == "fixed"


def test_a_write_that_fails_leaves_no_file(finished, tmp_path, monkeypatch):
    def break_off(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(saved_steps, "save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_record(finished[1][0], tmp_path / "step-1.safetensors")
    assert not (tmp_path / "step-1.safetensors").exists()


def test_other_files_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="nowhere"):
        load_record(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(InputError, match="text.safetensors"):
        load_record(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="lit_opd.step/1"):
        load_record(tmp_path / "other.safetensors")


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="tokens"):
        RolloutSamples(tokens=-1)
    for name in ("every", "count", "save_rollouts_every"):
        with pytest.raises(InputError, match=name):
            RolloutSamples(**{name: 0})
