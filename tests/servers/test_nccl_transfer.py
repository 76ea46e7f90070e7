"""``NCCLTransfer`` against servers that speak vLLM's routes, their NCCL group a queue."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_opd.errors import InputError, ServerError
from lit_opd.models import StudentSettings, build_student
from lit_opd.models.weights import hand_over
from lit_opd.rollout import NCCLTransfer, SamplingSettings, VLLMSampler, nccl
from lit_opd.scoring.model import ScoringModel
from tests.helpers import fake_vllm, fixed, forks, tiny

SETTINGS = SamplingSettings(max_new_tokens=8, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
TOLERANCE = 1e-4  # nats
NEVER = 0.3  # seconds that are given to what never comes


class Student:
    """A student of a folder, as far as weights are sent."""

    adapter_rank = None

    def __init__(self, path: str) -> None:
        self.policy = ScoringModel(build_student(StudentSettings(path)), vocabulary=64)

    def __call__(self, folder: Path) -> Any:
        """Never asked for."""
        raise AssertionError("no folder is written")

    def each_unit(self, take: Any) -> None:
        """One by one."""
        hand_over(self.policy, take)


class Group:
    """Queues a copy for every worker, as a broadcast brings one."""

    def __init__(self, servers: list[fake_vllm.FakeServer]) -> None:
        self.servers = servers

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """From number 0."""
        assert src == 0 and tensor.is_contiguous()
        for server in self.servers:
            server.transfer.wire.put(tensor.clone())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def servers(folders):
    with fake_vllm.serving(folders[0]) as first, fake_vllm.serving(folders[0]) as second:
        first.transfer.workers = 2
        yield [first, second]


@pytest.fixture
def sampler(servers, monkeypatch) -> VLLMSampler:
    monkeypatch.setattr(nccl.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(nccl, "installed_version", lambda: "0.23.0+cu130")
    sync = NCCLTransfer(seconds=20)
    sync.join = lambda host, port, members: Group(servers)
    made = VLLMSampler(
        [server.url for server in servers], sync=sync, max_new_tokens=8, retry_seconds=0.5, start_seconds=1.0
    )
    made.check(tokens=64, vocabulary=64)
    return made


def gap(sampler: VLLMSampler, student: Student) -> float:
    """Largest difference of log-probs, nats."""
    rows = fixed.rollout(lengths=[5, 9, 1, 4], prompt_lengths=[4, 2, 6, 3], truncated={1})
    rollout = sampler.sample(None, rows.prompts, SETTINGS)
    with torch.no_grad():
        return float((student.policy(rollout).logprobs - rollout.sampler_logprobs)[rollout.mask].abs().max())


def test_every_server_gets_every_weight_of_each_version(sampler, servers, folders):
    for version, path in enumerate([folders[1], folders[0]]):
        student = Student(path)
        sampler.prepare(student, version)
        assert gap(sampler, student) < TOLERANCE
        for server in servers:
            assert server.transfer.loaded == set(server.causal_lm.state_dict()) and server.transfer.wire.empty()
    infos = [server.transfer.joined for server in servers]
    assert [(info["rank_offset"], info["world_size"]) for info in infos] == [(1, 4), (3, 4)]
    assert len({(info["master_address"], info["master_port"]) for info in infos}) == 1
    once = ["start", *["update"] * 5, "finish"]  # two blocks, embedding, norm and head
    assert servers[0].transfer.phases == ["init", *once, *once]
    assert sampler.seconds.take()["weights"] > 0


def test_weights_never_change_under_the_requests_of_another_rank(folders, tmp_path):
    """Rank 0 has its rows of the batch that was begun, and sends the next weights, when rank 1's are not answered yet."""
    forks.succeed("tests.helpers.sampling_ranks", str(tmp_path), "ahead", *folders, "", logs=tmp_path, timeout=60)
    for report in (torch.load(tmp_path / f"report-{rank}.pt", weights_only=True) for rank in (0, 1)):
        assert report["versions"] == [0, 1] and max(report["gaps"]) < TOLERANCE


def test_a_group_is_formed_anew_where_a_server_was_lost(sampler, servers, folders):
    """It may have restarted, without a part in the old one."""
    student = Student(folders[1])
    sampler.prepare(student, 0)
    servers[1].faults = [fake_vllm.hang_up]
    assert gap(sampler, student) < TOLERANCE
    assert [server.transfer.phases.count("init") for server in servers] == [2, 2]


@pytest.mark.parametrize("phase", ["init", "start", "update", "finish"])
def test_a_server_that_fails_ends_the_run_at_once(phase, sampler, servers, folders):
    """Nothing waits for the others, and nothing is sampled from weights of no version."""
    servers[1].transfer.fails = phase
    with pytest.raises(ServerError, match=f"500.*{phase} broke"):
        sampler.prepare(Student(folders[1]), 1)
    assert sampler._version is None and sampler.sync._group is None


def test_members_that_never_join_are_not_waited_for_for_ever(sampler, servers, folders):
    sampler.sync.seconds, never = NEVER, threading.Event()
    sampler.sync.join = lambda *place: never.wait(60)
    try:
        with pytest.raises(ServerError, match=f"did not join its NCCL group within {NEVER:g} s"):
            sampler.prepare(Student(folders[1]), 0)
    finally:
        never.set()


def test_other_releases_and_students_are_refused_before_the_run(sampler, servers, monkeypatch):
    servers[1].transfer.version = "0.22.1"
    with pytest.raises(
        InputError, match=f"cannot reach {servers[1].url}: vLLM 0.22.1 is outside 0.23 to 0.32.*ReloadEndpoint"
    ):
        sampler.check(tokens=64, vocabulary=64)
    servers[1].transfer.version = "0.23.0"
    monkeypatch.setattr(nccl, "installed_version", lambda: "0.33.0")
    with pytest.raises(InputError, match="the trainer's environment: vLLM 0.33.0"):
        sampler.check(tokens=64, vocabulary=64)
    with pytest.raises(InputError, match="whole weights, got a student with LoRA"):
        sampler.check_student(8)
    monkeypatch.setattr(nccl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs vllm in the trainer's environment"):
        sampler.check(tokens=64, vocabulary=64)


def test_a_group_without_nccl_is_no_group(monkeypatch):
    """vLLM's communicator does nothing where it finds no library, and says so nowhere but in this flag."""
    import sys
    from types import ModuleType, SimpleNamespace

    common = ModuleType("common")
    common.trainer_init = lambda place: SimpleNamespace(disabled=place["world_size"] == 2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_common", common)
    monkeypatch.setattr(nccl.importlib, "import_module", lambda name: sys.modules[name])
    assert nccl.join_group("host", 1, 3) is not None
    with pytest.raises(RuntimeError, match="no NCCL library"):
        nccl.join_group("host", 1, 2)
