"""``VLLMEngine`` with a fake vLLM: the ways of the weights, their order, and what happens when one fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_opd.errors import InputError, ServerError
from lit_opd.models import LoraSettings, StudentSettings, build_student, load_tokenizer
from lit_opd.models.weights import StudentWeights
from lit_opd.rollout import PartialSampler, SamplingSettings, VLLMEngine, engine, ipc, weights
from lit_opd.rollout.weights import settled_way
from lit_opd.scoring.model import ScoringModel
from tests.helpers import fake_llm, fixed, talking, tiny

SETTINGS = SamplingSettings(max_new_tokens=12, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
TOLERANCE = 1e-4  # nats
VERSIONS = ["0.23.0", "0.26.1", "0.27.1", "0.32.0"]  # ends of the two ways to say "packed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def by_ipc(monkeypatch):
    """As on a CUDA device."""
    monkeypatch.setattr(ipc, "cuda_handle", fake_llm.handle)
    monkeypatch.setattr(engine, "settled_way", lambda way, *rank, **rest: (way, "as configured"))


def student(path: str, *, lora: LoraSettings | None = None, seed: int = 0) -> StudentWeights:
    """A student of a folder; its adapter changes something, by ``seed``."""
    settings = StudentSettings(path, lora=lora)
    model = build_student(settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + len(name))))
    return StudentWeights(
        ScoringModel(model, vocabulary=64),
        settings,
        load_tokenizer(path, "path"),
        stop_ids=(1,),
    )


def rows() -> Any:
    return fixed.rollout(lengths=[5, 9, 1], prompt_lengths=[4, 2, 6], truncated={1}).prompts


def gap(sampler: VLLMEngine, own: StudentWeights) -> float:
    """Largest difference of log-probs, nats, between what the engine sampled and the student."""
    rollout = sampler.sample(None, rows(), SETTINGS)
    with torch.no_grad():
        scored = own.policy(rollout).logprobs
    return float((scored - rollout.sampler_logprobs)[rollout.mask].abs().max())


def made(tmp_path: Path, way: str) -> VLLMEngine:
    sampler = VLLMEngine(str(tmp_path / "written"), max_new_tokens=12, weights=way)  # type: ignore[arg-type]
    sampler.check(tokens=64, vocabulary=64)
    return sampler


@pytest.mark.parametrize("version", VERSIONS)
def test_by_ipc_every_weight_arrives_and_no_file_holds_one(version, folders, by_ipc, monkeypatch, tmp_path):
    llm = fake_llm.install(monkeypatch, version)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: True)
    sampler = made(tmp_path, "ipc")
    for number, path in enumerate(folders):
        own = student(path)
        sampler.prepare(own, number)
        assert gap(sampler, own) < TOLERANCE
        assert llm.made.loaded == set(own.policy.causal_lm.state_dict())
    calls = [call for call in llm.made.calls if call != "update"]
    once = ["start", "finish", "reset_prefix_cache", "generate"]
    assert calls == ["LLM", "init", *once, *once]
    assert not list((tmp_path / "written").glob("*.safetensors")) and (tmp_path / "written" / "config.json").is_file()


@pytest.mark.parametrize("way", ["ipc", "folder", "adapter"])
def test_another_run_brings_its_weights_under_a_version_that_was_there(way, folders, by_ipc, monkeypatch, tmp_path):
    """Two checkpoints that one process evaluates are both of version 0."""
    fake_llm.install(monkeypatch)
    lora = LoraSettings(rank=4) if way == "adapter" else None
    sampler = PartialSampler(made(tmp_path, way), budget=2)  # what stands around an engine passes it on
    for number, path in enumerate(folders):
        own = student(folders[0] if lora else path, lora=lora, seed=number)
        sampler.forget_weights()
        sampler.prepare(own, 0)
        assert gap(sampler.sampler, own) < TOLERANCE


def test_the_engine_holds_the_longest_row_that_anything_asks_for(folders, monkeypatch, tmp_path):
    """An evaluation's rows may be longer than those of training; what the engine cannot hold is refused before it samples."""
    llm = fake_llm.install(monkeypatch)
    sampler = VLLMEngine(str(tmp_path / "written"), max_new_tokens=4, weights="folder")
    sampler.check(tokens=10, vocabulary=64)
    PartialSampler(sampler, budget=2).make_room(36, field="EarlyAIMEEvaluation.max_new_tokens")
    sampler.prepare(student(folders[0]), 0)
    assert llm.made.options["max_model_len"] == 36
    drawn = sampler.sample(None, rows(), replace(SETTINGS, max_new_tokens=30, stop_ids=(63,)))
    assert int(drawn.lengths.max()) == 30
    sampler.check(tokens=36, vocabulary=64)
    needs = r"must leave room in VLLMEngine's rows of {} tokens, got up to {}.*max_model_len: {}}}`"
    with pytest.raises(InputError, match="`Other.length` " + needs.format(36, 37, 37)):
        sampler.make_room(37, field="Other.length")
    chosen = VLLMEngine(max_new_tokens=4, engine_options={"max_model_len": 12})
    chosen.check(tokens=12, vocabulary=64)
    with pytest.raises(InputError, match="`model.sampler.max_new_tokens` " + needs.format(12, 13, 13)):
        chosen.check(tokens=13, vocabulary=64)


def test_an_engine_of_noise_is_seen(folders, by_ipc, monkeypatch, tmp_path):
    """What makes a transfer that brings nothing visible: the engine did not start from the student's weights."""
    fake_llm.install(monkeypatch)
    monkeypatch.setattr(ipc.IPCTransfer, "send", lambda self, student: None)
    sampler, own = made(tmp_path, "ipc"), student(folders[0])
    sampler.prepare(own, 0)
    assert gap(sampler, own) > 1.0


def test_one_buffer_of_the_largest_unit_is_used(folders, by_ipc, monkeypatch, tmp_path):
    """Never more than a unit beside the weights, and none once they arrived; older releases would leak one a transfer."""
    seen: list[int] = []
    monkeypatch.setattr(ipc, "cuda_handle", lambda buffer: seen.append(len(buffer)) or fake_llm.handle(buffer))
    for version in ("0.27.1", "0.28.0"):
        fake_llm.install(monkeypatch, version)
        seen.clear()
        sampler, own = made(tmp_path, "ipc"), student(folders[0])
        for number in range(2):
            sampler.prepare(own, number)
        sizes = []
        own.each_unit(lambda unit, sizes=sizes: sizes.append(sum(value.nbytes for _, value in unit)))
        growing = seen if version == "0.27.1" else seen[: len(seen) // 2]
        assert (
            growing == sorted(set(growing))
            and growing[-1] == max(sizes)
            and seen == growing * (len(seen) // len(growing))
        )
        assert (sampler._transfer.sent.buffer is None) == (version == "0.28.0")


@pytest.mark.parametrize("what", ["init", "start", "update", "finish"])
def test_a_transfer_that_fails_ends_the_run_and_is_of_no_version(what, folders, by_ipc, monkeypatch, tmp_path):
    llm = fake_llm.install(monkeypatch)
    sampler, own = made(tmp_path, "ipc"), student(folders[0])
    monkeypatch.setattr(llm, "fails", what)
    with pytest.raises(ServerError, match=f"could not take the new weights: {what} broke; .*--ckpt_path last"):
        sampler.prepare(own, 0)
    with pytest.raises(AssertionError, match="prepare comes first"):
        sampler.sample(None, rows(), SETTINGS)


def test_a_conversation_and_a_partial_rollout_sleep_behind_their_last_call(folders, by_ipc, monkeypatch, tmp_path):
    """So the prefix cache lives as long as they do; what was said is the student's, turn by turn."""
    llm = fake_llm.install(monkeypatch)
    monkeypatch.setattr(VLLMEngine, "_sleeps", True)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: True)
    own, drawn = (
        student(folders[0]),
        SamplingSettings(max_new_tokens=60, stop_ids=tuple(range(4, 22)), pad_id=0, vocabulary=64),
    )
    talk = talking.sampler(made(tmp_path, "ipc"), talking.Counting(), max_turns=3, max_turn_tokens=None)
    talk.prepare(own, 0)
    rollout = talk.sample(None, talking.prompts(3), drawn)
    with torch.no_grad():
        gaps = (own.policy(rollout).logprobs - rollout.sampler_logprobs)[rollout.mask].abs()
    assert len({int(length) for length in rollout.read.sum(-1)}) > 1  # so the last turn has another room in each row
    assert int(rollout.num_turns.max()) == 3 and float(gaps.max()) < TOLERANCE
    calls = [call for call in llm.made.calls if call.startswith(("wake", "sleep", "generate"))]
    assert calls == ["generate"] * 3 + ["sleep"]
    parts = PartialSampler(talk.sampler, budget=2, waiting=0.4)
    parts.sample(None, rows(), replace(SETTINGS, stop_ids=(), replay="some"))
    calls = [call for call in llm.made.calls if call.startswith(("wake", "sleep", "generate"))][4:]
    assert calls == ["wake None"] + ["generate"] * 6 + ["sleep"]  # twelve tokens, as one of three rows may wait


def test_a_sleeping_engine_is_woken_for_its_weights_first(folders, by_ipc, monkeypatch, tmp_path):
    """Its cache comes back when the weights are there; each is timed."""
    llm = fake_llm.install(monkeypatch)
    monkeypatch.setattr(VLLMEngine, "_sleeps", True)
    sampler, own = made(tmp_path, "ipc"), student(folders[0])
    for number in range(2):
        sampler.prepare(own, number)
        assert gap(sampler, own) < TOLERANCE
        assert gap(sampler, own) < TOLERANCE
    calls = [call for call in llm.made.calls if call.startswith(("wake", "sleep", "start", "generate"))]
    drawn = ["generate", "sleep", "wake None", "generate", "sleep"]
    assert calls == ["start", *drawn, "wake ['weights']", "start", "wake ['kv_cache']", *drawn]
    seconds = sampler.seconds.take()
    assert all(value > 0 for value in seconds.values()) and set(sampler.seconds.take().values()) == {0.0}


@pytest.mark.parametrize("way", ["folder", "auto"])
def test_without_cuda_the_folder_is_read(way, folders, monkeypatch, tmp_path, capsys):
    llm = fake_llm.install(monkeypatch)
    sampler = made(tmp_path, way)
    for number, path in enumerate(folders):
        own = student(path)
        sampler.prepare(own, number)
        assert gap(sampler, own) < TOLERANCE
    assert llm.made.calls == [
        "LLM",
        "reset_prefix_cache",
        "generate",
        "reload_weights",
        "reset_prefix_cache",
        "generate",
    ]
    why = "as configured" if way == "folder" else "there is no CUDA device"
    assert capsys.readouterr().err.count(f"takes the student's weights by way of: folder ({why})") == 1


def test_of_a_student_with_lora_the_adapter_travels(folders, monkeypatch, tmp_path):
    llm = fake_llm.install(monkeypatch)
    sampler, lora = made(tmp_path, "auto"), LoraSettings(rank=4)
    sampler.check_student(4)
    for number in range(2):
        own = student(folders[0], lora=lora, seed=number)
        sampler.prepare(own, number)
        assert gap(sampler, own) < TOLERANCE
    assert llm.made.options["model"] == folders[0] and len(llm.made.adapters) == 2
    assert [path.name for path in (tmp_path / "written").glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_a_way_that_cannot_be_gone_is_refused_before_the_run():
    for way, rank in (("ipc", 4), ("adapter", None), ("auto", 1024)):
        with pytest.raises(InputError, match="VLLMEngine.weights"):
            VLLMEngine(weights=way).check_student(rank)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`VLLMEngine.weights` must be one of auto, folder, ipc, adapter, got 'disk'"):
        VLLMEngine(weights="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "installed", "expected"),
    [
        ("0.22.1", {"ray", "requests"}, "outside 0.23 to 0.32"),
        ("0.23.0", {"ray", "requests"}, None),
        ("0.26.1+cu130", {"requests"}, "needs ray for it"),
        ("0.27.0", set(), None),
        ("0.32.0", set(), None),
        ("0.33.0", set(), "outside 0.23 to 0.32"),
        ("1.0", set(), "outside 0.23 to 0.32"),
        ("dev", set(), "outside 0.23 to 0.32"),
    ],
)
def test_auto_takes_ipc_where_it_works_and_says_why_not(version, installed, expected, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: name in installed or None)
    way, why = settled_way("auto", None, on_cuda=True, version=version)
    assert way == ("ipc" if expected is None else "folder") and (expected is None or expected in why)
    assert settled_way("folder", None, on_cuda=True, version=version)[0] == "folder"
    if expected is not None:
        with pytest.raises(InputError, match=f"must be folder or auto here, got ipc: .*{expected}"):
            settled_way("ipc", None, on_cuda=True, version=version)
