"""Remote teacher, routed teacher and vLLM sampler against a local server that runs a real tiny model, and fails on demand."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError, ServerError
from lit_opd.models.student import LoraSettings
from lit_opd.rollout import AdapterEndpoint, ReloadEndpoint, SamplingSettings, VLLMSampler
from lit_opd.scoring.model import ScoringModel
from lit_opd.teacher import LocalTeacher, RemoteTeacher, RoutedTeacher
from lit_opd.types import Rollout
from tests.helpers import fake_vllm as fake
from tests.helpers import fixed, tiny

FAST = {"timeout": 2.0, "retry_seconds": 3.0, "start_seconds": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def server(folders):
    with fake.serving(folders[1]) as running:
        yield running


@pytest.fixture(scope="module")
def rows() -> Rollout:
    return fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})


def local(path: str) -> LocalTeacher:
    teacher = LocalTeacher(path)
    teacher.load(vocabulary=64)
    return teacher


def remote(folders, *servers, **changes) -> RemoteTeacher:
    return RemoteTeacher([s.url for s in servers], folders[1], **(FAST | {"rows_per_request": 2} | changes))


# -- the remote teacher ------------------------------------------------------------------------------------------------


def test_a_remote_teacher_scores_as_the_local_one(folders, server, rows):
    theirs = local(folders[1]).score(rows).logprobs
    ours = remote(folders, server).score(rows).logprobs
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0) and not ours[~rows.mask].any()
    own = replace(rows.prompts, teacher_ids=rows.prompts.ids.flip(1), teacher_mask=rows.prompts.mask.roll(1, 0))
    templated = replace(rows, prompts=own)
    theirs = local(folders[1]).score(templated).logprobs
    assert torch.allclose(remote(folders, server).score(templated).logprobs, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(ours, theirs, atol=1e-2)


def test_two_servers_share_the_load_and_one_carries_on_alone(folders, server, rows):
    with fake.serving(folders[1]) as second:
        teacher = remote(folders, server, second, rows_per_request=1)
        whole = teacher.score(rows).logprobs
        assert server.requests and second.requests
    assert torch.equal(teacher.score(rows).logprobs, whole)  # the second is down


def test_rows_without_valid_tokens_are_not_sent(folders, server, rows):
    teacher = remote(folders, server)
    empty = replace(rows, mask=torch.zeros_like(rows.mask))
    assert not teacher.score(empty).logprobs.any() and server.requests == 0


def first(answer: dict) -> dict:
    return answer["choices"][-1]


PASSING = {
    "error 500": fake.status(500),
    "busy": fake.status(429),
    "late": fake.delay(2.5),
    "trickle": fake.trickle,
    "cut": fake.cut,
    "hang up": fake.hang_up,
    "garbled": fake.raw(b'{"choices": [}'),
    "binary": fake.raw(b"\xff\x00\x9f"),
    "null": fake.raw(b"null"),
    "missing log-probs": fake.changed(lambda a: first(a).pop("prompt_logprobs")),
    "too few log-probs": fake.changed(lambda a: first(a)["prompt_logprobs"].pop()),
    "another token": fake.changed(lambda a: first(a)["prompt_logprobs"].__setitem__(-1, {"99": {"logprob": -1.0}})),
    "nan": fake.changed(lambda a: next(iter(first(a)["prompt_logprobs"][-1].values())).update(logprob=float("nan"))),
    "clamped": fake.changed(lambda a: next(iter(first(a)["prompt_logprobs"][-1].values())).update(logprob=-9999.0)),
    "too few choices": fake.changed(lambda a: a["choices"].pop()),
    "same index": fake.changed(lambda a: [c.update(index=0) for c in a["choices"]]),
}
LASTING = PASSING | {
    "another model": fake.changed(lambda a: a.update(model="other")),
    "not found": fake.status(404),
    "redirect": fake.status(307, Location="http://127.0.0.1:1/v1/completions"),
    "too long": fake.raw(b" " * 200_000),
    "too long by its header": fake.raw(b"", length=10**12),
}


@pytest.mark.parametrize("name", sorted(PASSING))
def test_a_passing_fault_is_tried_again(folders, server, rows, name):
    whole = remote(folders, server).score(rows).logprobs
    server.faults = [PASSING[name]]
    assert torch.equal(remote(folders, server).score(rows).logprobs, whole)


# of those that pass, each of which must be seen to be tried again, one a kind: by the status, the connection, the content
FIRST = {"error 500", "cut", "late", "null", "nan", "too few choices"} | (LASTING.keys() - PASSING.keys())
LAST = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in sorted(LASTING)]


@pytest.mark.parametrize("name", LAST)
def test_a_lasting_fault_is_one_clear_error_in_bounded_time(folders, server, rows, name):
    teacher = remote(folders, server, timeout=0.5, retry_seconds=0.5, max_response_bytes=100_000)
    teacher.check(temperature=1.0, tokens=20)
    server.always = LASTING[name]
    start = time.monotonic()
    with pytest.raises(ServerError, match="model.teacher.urls.*127.0.0.1.*--ckpt_path last"):
        teacher.score(rows)
    assert time.monotonic() - start < 5


def test_embedding_rows_beyond_the_shared_vocabulary_are_named(folders, server):
    with pytest.warns(UserWarning, match="all 64 embedding rows.*has 43 ids"):
        remote(folders, server).load(vocabulary=43)


def test_what_is_wrong_before_the_run_is_said(folders, server, rows):
    with pytest.raises(InputError, match="temperature.*0.7"):
        remote(folders, server).check(temperature=0.7, tokens=None)
    with pytest.raises(InputError, match="'other'"):
        remote(folders, server, model="other").check(temperature=1.0, tokens=None)
    remote(folders, server).check(temperature=1.0, tokens=63)
    with pytest.raises(InputError, match="--max-model-len 65"):
        remote(folders, server).check(temperature=1.0, tokens=64)
    for url in ("ftp://host", "host:8000", "http://u:p@host", "http://host:x"):
        with pytest.raises(InputError, match="urls"):
            RemoteTeacher([url], folders[1])


# -- several teachers --------------------------------------------------------------------------------------------------


def test_rows_go_to_the_teacher_they_name(folders, server, rows):
    names = ("b", "a", "a", "b", "a", "b")
    named = replace(rows, prompts=replace(rows.prompts, teachers=names))
    routed = RoutedTeacher({"a": local(folders[0]), "b": remote(folders, server)})
    assert routed.provides == frozenset()
    ours = routed.score(named).logprobs
    by_name = {"a": local(folders[0]).score(rows).logprobs, "b": local(folders[1]).score(rows).logprobs}
    theirs = torch.stack([by_name[name][row] for row, name in enumerate(names)])
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    both = RoutedTeacher({"a": local(folders[0]), "b": local(folders[1])})
    assert both.provides == {"teacher_entropy", "teacher_topk"}
    scores = both.score(named, requires=both.provides)
    assert scores.entropy is not None and scores.topk is not None
    short = RoutedTeacher({"a": local(folders[0]), "b": remote(folders, server, top_k=5)})
    whole = short.score(named, requires=frozenset({"teacher_topk"})).topk.ids
    assert whole.shape[-1] == short.list_size == 5
    for rows_of_one in ([1, 2, 4], [0, 3, 5]):  # a micro-batch may hold rows of one teacher alone, and joins the others
        part = short.score(named.rows(torch.tensor(rows_of_one)), requires=frozenset({"teacher_topk"})).topk.ids
        assert torch.equal(part, whole[rows_of_one][:, : part.shape[1]])
    for bad in (None, "c"):
        wrong = replace(rows, prompts=replace(rows.prompts, teachers=(*names[:-1], bad)))
        with pytest.raises(InputError, match="'a', 'b'.*row 5.*row-5"):
            routed.score(wrong)


# -- the sampler -------------------------------------------------------------------------------------------------------

SETTINGS = SamplingSettings(max_new_tokens=8, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)


def sampler(*servers, **changes) -> VLLMSampler:
    return VLLMSampler([s.url for s in servers], **(FAST | {"max_new_tokens": 8} | changes))


def student(path: str) -> ScoringModel:
    return ScoringModel(AutoModelForCausalLM.from_pretrained(path), vocabulary=64)


@torch.no_grad()
def test_sampled_rows_have_the_students_logprobs_and_their_own_streams(folders, server, rows):
    drawn = sampler(server).sample(None, rows.prompts, SETTINGS)
    theirs = student(folders[1])(drawn).logprobs
    assert torch.allclose(drawn.sampler_logprobs, theirs, atol=1e-5, rtol=0)
    assert (drawn.finished == (drawn.response_ids == 1).any(-1)).all() and drawn.provenance.engine == "vllm"
    index = torch.tensor([4, 1])
    alone = sampler(server, max_concurrency=1).sample(None, rows.prompts.rows(index), SETTINGS)
    assert torch.equal(alone.response_ids[alone.mask], drawn.response_ids[index][drawn.mask[index]])
    other = sampler(server).sample(None, rows.prompts, replace(SETTINGS, step=1))
    assert other.mask.shape != drawn.mask.shape or not torch.equal(other.response_ids, drawn.response_ids)


def test_logprobs_of_another_distribution_are_refused(server, rows):
    for change in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(InputError, match="processed_logprobs"):
            sampler(server, **change)
        sampler(server, logprobs_mode="processed_logprobs", **change)
    drawn = sampler(server).sample(None, rows.prompts, replace(SETTINGS, temperature=0.7))
    assert drawn.sampler_logprobs[drawn.mask].isnan().all()


SAMPLER_FAULTS = {
    "no ids": lambda a: first(a).pop("token_ids"),
    "no log-probs": lambda a: first(a).update(logprobs=None),
    "other length": lambda a: first(a)["logprobs"]["token_logprobs"].append(-1.0),
    "other prompt": lambda a: first(a).update(prompt_token_ids=[5]),
    "outside": lambda a: first(a).update(token_ids=[70], logprobs={"token_logprobs": [-1.0]}),
    "stopped early": lambda a: first(a).update(token_ids=[7], logprobs={"token_logprobs": [-1.0]}),
}


@pytest.mark.parametrize("name", sorted(SAMPLER_FAULTS))
def test_a_sampler_refuses_a_wrong_answer(server, rows, name):
    server.always = fake.changed(SAMPLER_FAULTS[name])
    with pytest.raises(ServerError, match="model.sampler.urls"):
        sampler(server, retry_seconds=0.5).sample(None, rows.prompts, SETTINGS)


def test_training_with_servers_pushes_weights_and_equals_local_scoring(folders, rows, tmp_path):
    """Two steps: the second is sampled from the new weights, so the gap stays at rounding."""
    with fake.serving(folders[0], model="student") as draws, fake.serving(folders[1]) as scores:
        sync = ReloadEndpoint(str(tmp_path / "student"))
        vllm = sampler(draws, sync=sync, max_logprob_gap=1e-4)
        teacher = RemoteTeacher([scores.url], folders[1], **FAST)
        trained = _module(folders, vllm, teacher)
        done = fixed.fit(trained, rows.prompts, steps=3)
        assert draws.reloads == 3
        assert [record.rollout.provenance.weights_version for record in done.records] == [0, 1, 2]
        reference = local(folders[1]).score(done.records[-1].rollout).logprobs
        assert torch.allclose(done.records[-1].signal.teacher_logprobs, reference, atol=1e-5, rtol=0)


def test_stale_weights_stop_the_run(folders, rows):
    with fake.serving(folders[1], model="student") as draws:  # another model than the student
        trained = _module(folders, sampler(draws, max_logprob_gap=0.05), LocalTeacher(folders[1]))
        with pytest.raises(InputError, match="max_logprob_gap.*no weight was changed"):
            fixed.fit(trained, rows.prompts, steps=1)


def test_a_server_that_came_back_gets_the_weights_again(folders, server, rows, tmp_path):
    ours = sampler(server, sync=ReloadEndpoint(folders[1]))
    ours.prepare(lambda folder: folder, 0)
    whole = ours.sample(None, rows.prompts, SETTINGS)
    server.faults = [fake.hang_up]
    assert torch.equal(ours.sample(None, rows.prompts, SETTINGS).response_ids, whole.response_ids)
    assert server.reloads == 2


def test_a_server_that_goes_away_during_a_push_gets_the_whole_push_again(folders, server):
    ours = sampler(server, sync=ReloadEndpoint(folders[1]))
    server.broken_resets = [True]
    ours.prepare(lambda folder: folder, 1)
    assert server.reloads == 2
    server.broken_resets = [True, False] * 3
    with pytest.raises(ServerError, match="each of 3 pushes"):
        ours.prepare(lambda folder: folder, 2)


def test_of_a_student_with_lora_only_the_adapter_goes_to_the_servers(folders, rows, tmp_path):
    """Each version under a name of its own, the older one removed; a server that was restarted, and lost all, gets it again."""
    with fake.serving(folders[0], model="student") as draws:
        folder = tmp_path / "adapter"
        vllm = sampler(draws, sync=AdapterEndpoint(str(folder)), max_logprob_gap=1e-4)
        trained = _module(folders, vllm, LocalTeacher(folders[1]), lora=LoraSettings(rank=4, alpha=8.0))
        done = fixed.fit(trained, rows.prompts, steps=3)
        assert [record.rollout.provenance.weights_version for record in done.records] == [0, 1, 2]
        gaps = [(r.signal.student_logprobs - r.rollout.sampler_logprobs)[r.rollout.mask] for r in done.records]
        assert max(float(gap.abs().max()) for gap in gaps) < 1e-4
        (name,) = draws.adapters
        assert name.startswith("student-") and name.endswith("-3")
        another = sampler(draws)  # of a run that goes on: what is left of this one is no second model
        another.check(tokens=12, vocabulary=64)
        assert another.servers.model == "student"
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
        before = vllm.sample(None, rows.prompts, SETTINGS)
        for number, faults in (("4", []), ("5", [fake.hang_up])):  # restarted between two batches, and within one
            draws.adapters.clear()
            draws.faults = faults
            assert torch.equal(vllm.sample(None, rows.prompts, SETTINGS).response_ids, before.response_ids)
            assert list(draws.adapters) == [name.removesuffix("3") + number]
        draws.load_adapter = lambda name, path: None  # type: ignore[method-assign]
        draws.adapters.clear()
        with pytest.raises(ServerError, match="went away in each of 3 samplings"):
            vllm.sample(None, rows.prompts, SETTINGS)


def test_adapters_need_a_student_that_has_one(folders, server, rows):
    trained = _module(folders, sampler(server, sync=AdapterEndpoint()), LocalTeacher(folders[1]))
    with pytest.raises(InputError, match="model.sampler.sync.*without LoRA, got AdapterEndpoint"):
        fixed.fit(trained, rows.prompts, steps=1)


def _module(folders, vllm, teacher, lora=None):
    from lit_opd.models.student import StudentSettings
    from lit_opd.module import OPDModule

    return OPDModule(
        StudentSettings(folders[0], lora=lora),
        teacher,
        sampler=vllm,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )


def test_servers_without_sync_are_recorded_with_the_weights_they_hold(server, rows):
    """And said once, at the first batch that the weights are behind: not at every batch of a run of thousands."""
    ours, said = sampler(server), []
    for version in (0, 1, 20, 21):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.prepare(lambda folder: pytest.fail("nothing is exported"), version)
        said += [(version, str(warning.message)) for warning in caught if "sync" in str(warning.message)]
        drawn = ours.sample(None, rows.prompts, replace(SETTINGS, weights_version=version))
        assert drawn.provenance.weights_version == 0
    assert [version for version, _ in said] == [1] and "recorded as version 0" in said[0][1]


# -- checkpoints that are evaluated ------------------------------------------------------------------------------------


class Save(L.Callback):
    """A checkpoint after each optimizer step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def evaluate(trained, prompts, path: Path, what: str) -> None:
    """By a trainer of its own, whose step stays 0."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    counted = replace(prompts, counted=torch.ones(len(prompts), dtype=torch.bool))
    getattr(trainer, what)(trained, DataLoader([counted], batch_size=None), ckpt_path=path)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_every_checkpoint_that_is_evaluated_answers_itself(folders, rows, tmp_path, what):
    """Also where one process evaluates several, all of them at step 0 of their trainers."""
    with fake.serving(folders[0], model="student") as draws:
        vllm = sampler(draws, sync=ReloadEndpoint(str(tmp_path / "student")))
        trained = _module(folders, vllm, LocalTeacher(folders[1]))
        fixed.fit(trained, rows.prompts, steps=2, watch=Save(tmp_path))
        pushes = draws.reloads
        for number, step in enumerate((1, 2, 1), start=1):
            path = tmp_path / f"{step}.ckpt"
            evaluate(trained, rows.prompts, path, what)
            assert draws.reloads == pushes + number
            kept = torch.load(path, weights_only=True)["state_dict"]
            for name, value in draws.causal_lm.state_dict().items():
                assert torch.equal(value, kept[f"student.model.{name}"]), name


def test_a_checkpoint_is_not_evaluated_by_servers_that_never_get_its_weights(folders, rows, tmp_path, capsys):
    """By a trainer of one's own, and on the command line before any model is loaded; training goes on from it as before."""
    from callbacks import default_callbacks
    from lit_opd.cli.command import main
    from tests.servers.test_server_recovery import write_config

    with fake.serving(folders[0], model="student") as draws:
        trained = _module(folders, sampler(draws, max_logprob_gap=100.0), LocalTeacher(folders[1]))
        fixed.fit(trained, rows.prompts, steps=1, watch=Save(tmp_path))
        for what in ("validate", "test", "predict"):
            with pytest.raises(InputError, match=r"`model.sampler.sync` must be set .*--ckpt_path\), got null"):
                evaluate(trained, rows.prompts, tmp_path / "1.ckpt", what)
        asked, config = draws.requests, write_config(tmp_path, folders, draws.url, sync=None, max_logprob_gap=None)
        words = ["--config", str(config), "--ckpt_path", str(tmp_path / "1.ckpt")]
        with pytest.raises(SystemExit):
            main(default_callbacks, ["validate", *words, "--run_dir", str(tmp_path / "run")])
        assert "`model.sampler.sync` must be set" in capsys.readouterr().err and draws.requests == asked
        fixed.fit(trained, rows.prompts, steps=2, load=tmp_path / "1.ckpt")


def test_exported_folder_is_absolute():
    assert ReloadEndpoint("here").folder == Path("here").absolute()


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_takes_routed_teachers_and_servers(folders, tmp_path, capsys):
    import json

    import yaml

    from callbacks import default_callbacks
    from lit_opd.cli.command import main

    rows = [{"prompt": f"{i} + {i} =", "teacher": "ab"[i % 2]} for i in range(8)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with fake.serving(folders[1]) as scores, fake.serving(folders[0], model="student") as draws:
        away = {"urls": [scores.url], "tokenizer_path": folders[1]} | FAST
        teachers = {
            "a": {"class_path": "lit_opd.teacher.LocalTeacher", "init_args": {"path": folders[1]}},
            "b": {"class_path": "lit_opd.teacher.RemoteTeacher", "init_args": away},
        }
        sync = {"class_path": "lit_opd.rollout.ReloadEndpoint", "init_args": {"folder": str(tmp_path / "student")}}
        drawing = {"urls": [draws.url], "max_new_tokens": 8, "sync": sync} | FAST
        config = {
            "wandb": {"mode": "disabled"},
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
            "model": {
                "student": {"path": folders[0]},
                "teacher": {"class_path": "lit_opd.teacher.RoutedTeacher", "init_args": {"teachers": teachers}},
                "sampler": {"class_path": "lit_opd.rollout.VLLMSampler", "init_args": drawing},
            },
            "data": {"train": str(data), "prompt_batch": 4, "max_prompt_tokens": 24, "teacher_column": "teacher"},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        main(default_callbacks, ["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")])
        assert draws.reloads >= 2 and scores.requests
    with pytest.raises(SystemExit):
        main(
            default_callbacks, ["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "again")]
        )
    assert scores.url in capsys.readouterr().err and not (tmp_path / "again").exists()
