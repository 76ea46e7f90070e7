"""A real vLLM server on the CPU against transformers; ``make vllm-test`` installs it into .venv-vllm and runs this."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.rollout import ReloadEndpoint, SamplingSettings, VLLMSampler
from lit_opd.scoring import ScoringModel
from lit_opd.teacher import LocalTeacher, RemoteTeacher
from tests import fixed, tiny

pytestmark = pytest.mark.vllm
PYTHON = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"
START_SECONDS = 300.0
TOLERANCE = 1e-4  # nats
SETTINGS = SamplingSettings(max_new_tokens=16, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"), hidden=64)  # vLLM's CPU attention wants heads of 32


@pytest.fixture(scope="module")
def url(folders, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", folders[0]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-logprobs", "64", "--served-model-name", "student"]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        environment = os.environ | offline | settings
        running = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)
    try:
        address = f"http://127.0.0.1:{port}"
        RemoteTeacher([address], folders[0], retry_seconds=START_SECONDS).check(temperature=1.0, tokens=None)
        yield address
    finally:
        running.terminate()
        running.wait(60)


@torch.no_grad()
def student_logprobs(path: str, drawn) -> torch.Tensor:
    return ScoringModel(AutoModelForCausalLM.from_pretrained(path), vocabulary=64)(drawn).logprobs


def test_scores_samples_and_new_weights_agree_with_transformers(folders, url):
    rows = fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})
    teacher = RemoteTeacher([url], folders[0])
    sampler = VLLMSampler([url], sync=ReloadEndpoint(folders[1]), max_new_tokens=16)
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
