"""A real vLLM server on the CPU against transformers; ``make vllm-test`` installs it into .venv-vllm and runs this."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.models import LoraSettings
from lit_opd.rollout import AdapterEndpoint, ReloadEndpoint, RestartCommand, SamplingSettings, VLLMSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher import LocalTeacher, RemoteTeacher
from tests.helpers import fixed, tiny
from tests.vllm import servers, ways

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4  # nats
SETTINGS = SamplingSettings(max_new_tokens=16, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"), hidden=64)  # vLLM's CPU attention wants heads of 32


@pytest.fixture(scope="module")
def rows():
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


@torch.no_grad()
def student_logprobs(path: str, drawn) -> torch.Tensor:
    return ScoringModel(AutoModelForCausalLM.from_pretrained(path), vocabulary=64)(drawn).logprobs


def test_scores_samples_and_new_weights_agree_with_transformers(folders, rows, tmp_path):
    server = servers.RealServer(folders[0], tmp_path / "server.log")
    server.start()
    try:
        teacher = RemoteTeacher([server.url], folders[0], start_seconds=servers.START_SECONDS)
        teacher.check(temperature=1.0, tokens=63)
        sampler = VLLMSampler([server.url], sync=ReloadEndpoint(folders[1]), max_new_tokens=16)
        sampler.check(tokens=64, vocabulary=64)
        for path in folders:
            if path == folders[1]:
                sampler.prepare(lambda folder: folder, 1)
            local = LocalTeacher(path)
            local.load(vocabulary=64)
            assert torch.allclose(teacher.score(rows).logprobs, local.score(rows).logprobs, atol=TOLERANCE, rtol=0)
            drawn = sampler.sample(None, rows.prompts, SETTINGS)
            assert torch.allclose(drawn.sampler_logprobs, student_logprobs(path, drawn), atol=TOLERANCE, rtol=0)
            assert torch.equal(sampler.sample(None, rows.prompts, SETTINGS).response_ids, drawn.response_ids)
        assert drawn.provenance.weights_version == 1
        old = student_logprobs(folders[0], drawn)
        assert (drawn.sampler_logprobs - old).abs().max() > 1.0  # the weights are other ones
        with pytest.raises(Exception, match="400.*out of vocabulary"):
            sampler.check(tokens=64, vocabulary=65)
    finally:
        server.kill()


def test_lists_and_chosen_tokens_agree_with_transformers(folders, rows, tmp_path):
    """The lists of K, what is above --max-logprobs, and the student's own tokens where this vLLM scores chosen ones."""
    server = servers.RealServer(folders[0], tmp_path / "server.log", flags=("--enable-scale-out",))
    server.start()
    try:
        settings = {"start_seconds": servers.START_SECONDS}
        teacher = RemoteTeacher([server.url], folders[0], top_k=20, **settings)
        teacher.check(temperature=1.0, tokens=63)
        with torch.no_grad():
            head = ScoringModel(AutoModelForCausalLM.from_pretrained(folders[0]), vocabulary=64).head(rows)
        table = head.logits(slice(None), 1.0).log_softmax(-1)
        best = table.topk(20)
        found = teacher.score(rows, requires=frozenset({"teacher_topk"})).topk
        assert torch.equal(found.ids[rows.mask], best.indices)
        assert torch.allclose(found.logprobs[rows.mask], best.values, atol=TOLERANCE, rtol=0)
        with pytest.raises(InputError, match="`model.teacher.top_k` must be at most.*got 65.*max allowed: 64"):
            teacher._check_lists(65, 63)
        why = teacher.ask_candidates(8)
        if why is not None:  # the first model runner, which CPUs get
            assert "model runner" in why
            return
        chosen = torch.randint(0, 64, (*rows.mask.shape, 8), generator=torch.Generator().manual_seed(0))
        scores = teacher.score_candidates(rows, chosen)
        wanted = table.gather(-1, chosen[rows.mask])
        assert torch.allclose(scores.candidates.logprobs[rows.mask], wanted, atol=TOLERANCE, rtol=0)
    finally:
        server.kill()


def test_adapters_travel_alone_each_version_under_its_own_name(folders, rows, tmp_path):
    """Two versions, then a server that was killed and started again without any."""
    server = servers.RealServer(folders[0], tmp_path / "server.log", flags=("--enable-lora", "--max-lora-rank", "8"))
    server.start()
    try:
        sync = AdapterEndpoint(str(tmp_path / "adapter"))
        sampler = VLLMSampler([server.url], sync=sync, max_new_tokens=16, start_seconds=servers.START_SECONDS)
        sampler.check(tokens=64, vocabulary=64)
        plain = student_logprobs(folders[0], rows)
        for version in (0, 1):
            weights = ways.student(folders[0], LoraSettings(rank=4, alpha=8.0), seed=100 * version)
            sampler.prepare(weights, version)
            drawn = sampler.sample(None, rows.prompts, SETTINGS)
            with torch.no_grad():
                scored = weights.policy(drawn).logprobs
            assert torch.allclose(drawn.sampler_logprobs, scored, atol=TOLERANCE, rtol=0)
            assert drawn.provenance.weights_version == version
            assert (weights.policy(rows).logprobs - plain).abs().max() > 0.1  # nats: the adapter changes something
        server.kill()
        server.start()
        again = sampler.sample(None, rows.prompts, SETTINGS)
        assert torch.equal(again.response_ids, drawn.response_ids)
        assert torch.allclose(again.sampler_logprobs, drawn.sampler_logprobs, atol=TOLERANCE, rtol=0)
    finally:
        server.kill()


def test_a_restart_command_brings_the_new_weights(folders, rows, tmp_path):
    """Both pushes start a server of the exported student."""
    port, pid = servers.free_port(), tmp_path / "server.pid"
    command = [sys.executable, "-m", "tests.vllm.servers", str(port), "{folder}", str(pid)]
    sync = RestartCommand(command, folder=str(tmp_path / "exported"))
    waits = {"retry_seconds": servers.START_SECONDS}
    sampler = VLLMSampler([f"http://127.0.0.1:{port}"], sync=sync, max_new_tokens=16, **waits)
    try:
        for version, path in enumerate(folders):

            def export(folder: Path, path: str = path) -> None:
                shutil.copytree(path, folder, dirs_exist_ok=True)

            sampler.prepare(export, version)
            drawn = sampler.sample(None, rows.prompts, SETTINGS)
            assert torch.allclose(drawn.sampler_logprobs, student_logprobs(path, drawn), atol=TOLERANCE, rtol=0)
            assert drawn.provenance.weights_version == version
    finally:
        servers.end(int(pid.read_text()))
