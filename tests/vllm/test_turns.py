"""Conversations on a real vLLM server, and batches that it samples while another one trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import lightning as L
import pytest
import torch

from lit_opd.rollout import ReloadEndpoint, VLLMSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher import RemoteTeacher
from tests.helpers import fixed, tiny
from tests.helpers.talking import WINDOW, Counting, prompts, sampler, scored, settings, tokenizer
from tests.servers.test_ahead import as_of, fit, rollouts
from tests.vllm import servers

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4  # nats
BLOCK = 32  # tokens of a block of the prefix cache, the least that vLLM has on a CPU
STEPS = 4


def flat(seed: int) -> Any:
    """Turns end at different places; vLLM's CPU attention wants heads of 32."""
    model = tiny.qwen3(seed=seed, window=WINDOW, hidden=64)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.15)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    return tuple(tiny.save(flat(seed), folder / str(seed), with_tokenizer=tokenizer()) for seed in (4, 5))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def server(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory):
    flags = ("--block-size", str(BLOCK), "--enable-prefix-caching")
    running = servers.RealServer(folders[0], tmp_path_factory.mktemp("log") / "server.log", flags=flags)
    running.start()
    yield running
    running.kill()


def student(folder: str) -> ScoringModel:
    from transformers import AutoModelForCausalLM

    return scored(AutoModelForCausalLM.from_pretrained(folder))


def prefix_tokens(url: str) -> tuple[float, float]:
    """Tokens that the prefix cache was asked for and had, since the server started."""
    text = httpx.get(f"{url}/metrics").text
    found = {
        name: sum(
            float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total{{[^}}]*}} (\S+)$", text, re.M)
        )
        for name in ("queries", "hits")
    }
    return found["queries"], found["hits"]


def test_a_conversation_is_what_one_forward_says_and_its_beginning_is_not_read_again(server, folders, tmp_path):
    """Of both versions of the weights; a teacher on the same server scores the same ids."""
    engine = VLLMSampler(
        [server.url], sync=ReloadEndpoint(folders[1]), max_new_tokens=60, start_seconds=servers.START_SECONDS
    )
    engine.check(tokens=WINDOW, vocabulary=64)
    talk = sampler(engine, Counting())
    for version, folder in enumerate(folders):
        policy = student(folder)
        if version:
            talk.prepare(lambda _: Path(folders[1]), 1)
        before = prefix_tokens(server.url)
        rollout = talk.sample(policy, prompts(12), settings())
        asked, had = (now - then for now, then in zip(prefix_tokens(server.url), before, strict=True))
        assert int(rollout.num_turns.max()) == 3 and rollout.provenance.weights_version == version
        ours = policy(rollout).logprobs.detach()
        assert torch.allclose(ours, rollout.sampler_logprobs, atol=TOLERANCE, rtol=0)
        assert float(ours[rollout.mask].max()) < 0
        again = talk.sample(policy, prompts(12), settings())
        assert torch.equal(again.response_ids, rollout.response_ids) and torch.equal(again.turn, rollout.turn)
        teacher = RemoteTeacher([server.url], folder, start_seconds=servers.START_SECONDS)
        assert torch.allclose(teacher.score(rollout).logprobs, ours, atol=TOLERANCE, rtol=0)
        # whole blocks of what was sent before; a version that went on from the other one's keys would be nats away
        assert asked > had >= BLOCK


def test_a_batch_ahead_is_sampled_by_the_version_that_it_records(server, folders, tmp_path):
    """Log-probs are those of the student as it was one batch before, of no other version, and step 1 is that of no overlap."""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{i} + {i} ="}) + "\n" for i in range(10)))
    found: dict[int, list[Any]] = {}
    for ahead in (0, 1):
        students: list[Any] = []

        class Copy(L.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, *_: Any, kept: Any = students) -> None:
                kept.append(fixed.weights(module))

        given = {"ahead": ahead, "timeout": 300.0, "retry_seconds": 60.0, "start_seconds": servers.START_SECONDS}
        trained, collect = fit(
            folders, str(train), server.url, tmp_path / "pushed", watch=(Copy(),), sampling=given, steps=STEPS, lr=0.5
        )
        found[ahead] = done = rollouts(collect)
        versions = [rollout.provenance.weights_version for rollout in done]
        assert versions == ([0, 0, 1, 2] if ahead else [0, 1, 2, 3])
        for step, rollout in enumerate(done):
            gaps = [
                float((as_of(trained, weights)(rollout).logprobs.detach() - rollout.sampler_logprobs).abs().max())
                for weights in students
            ]
            assert gaps[versions[step]] < TOLERANCE
            assert min(gap for version, gap in enumerate(gaps) if version != versions[step]) > 10 * TOLERANCE
    assert torch.equal(found[0][0].response_ids, found[1][0].response_ids)
    assert found[0][1].prompts.row_ids == found[1][1].prompts.row_ids
