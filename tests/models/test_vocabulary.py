"""What a model names as ends, and ids without a token: cut or masked in sampling, scoring and divergences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import GenerationConfig

from lit_opd.errors import InputError
from lit_opd.models.loading import load_tokenizer
from lit_opd.models.student import StudentSettings
from lit_opd.models.vocabulary import agree_vocabularies, configured_stops, unused_ids
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence
from lit_opd.rollout import DecodeSampler, SamplingSettings, TransformersSampler, VLLMSampler
from lit_opd.rollout.vllm import only_tokens
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import token_kl
from lit_opd.teacher import LocalTeacher, RoutedTeacher
from lit_opd.types import PromptBatch, Rollout
from tests.helpers import fake_vllm, tiny

HOLES, USED, ROWS = (6, 17, 29), 40, 64
TOKENS = [n for n in range(USED) if n not in HOLES]

# -- ends --------------------------------------------------------------------------------------------------------------


def edited(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({name: value for name, value in (content | values).items() if value is not None}))


@pytest.mark.parametrize(
    ("generation", "config", "text_config", "token", "ends"),
    [
        (None, [1, 7], None, tiny.EOS, {1, 7}),
        (5, 7, None, tiny.EOS, {1, 5, 7}),
        ([5, 6], None, None, tiny.EOS, {1, 5, 6}),
        (None, None, None, tiny.EOS, {1}),
        (None, None, [8], tiny.EOS, {1, 8}),
        (5, 7, None, None, {5, 7}),
        (None, 7, None, tiny.USER, {2, 7}),
    ],
)
def test_ends_are_all_that_the_three_files_name(
    tmp_path: Path, generation: object, config: object, text_config: object, token: str | None, ends: set[int]
) -> None:
    folder = Path(tiny.save(tiny.qwen3(seed=1), tmp_path))
    edited(folder / "generation_config.json", eos_token_id=generation)
    edited(folder / "config.json", eos_token_id=config, text_config=text_config and {"eos_token_id": text_config})
    made = load_tokenizer(str(folder), "model.student.path")
    made.eos_token = token
    assert configured_stops(str(folder), made) == ends


def test_ends_that_are_no_tokens_are_named_and_left_out(tmp_path: Path) -> None:
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path, with_tokenizer=tiny.tokenizer())
    GenerationConfig(eos_token_id=[1, 60]).save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"end tokens \[60\] are ids that its tokenizer does not have"):
        assert configured_stops(folder, load_tokenizer(folder, "model.student.path")) == {1}


def test_the_export_names_the_ends_that_were_sampled(tmp_path: Path) -> None:
    folder = Path(tiny.save(tiny.qwen3(seed=1), tmp_path / "student"))
    edited(folder / "generation_config.json", eos_token_id=5, temperature=0.6, do_sample=True)
    for stops, ends in ((None, [1, 5]), ([7], 7)):
        module = OPDModule(StudentSettings(str(folder)), LocalTeacher(str(folder)), DecodeSampler(stop_token_ids=stops))
        module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        module.configure_model()
        assert module.sampling_settings(step=0).stop_ids == tuple(ends if isinstance(ends, list) else [ends])
        written = GenerationConfig.from_pretrained(module.export_student(tmp_path / "out"))
        assert written.eos_token_id == ends and written.temperature == 0.6


# -- remedies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["model.student", "model.teacher", "model.reference", "model.teacher.teachers.math"])
def test_a_missing_pad_token_is_asked_for_by_the_role(tmp_path: Path, role: str) -> None:
    bare = tiny.tokenizer(rows=64)
    bare.pad_token = None
    path = tiny.save(tiny.qwen3(seed=1), tmp_path, with_tokenizer=bare)
    for pad, what in ((None, "no pad token"), ("nope", "got 'nope'")):
        teacher = LocalTeacher(path, pad_token=pad)
        if "teachers" in role:
            asked = RoutedTeacher({"math": teacher}).tokenizers
        else:
            teacher.field, asked = role, teacher.tokenizers
        if role == "model.student":
            asked = lambda: OPDModule(StudentSettings(path, pad_token=pad), LocalTeacher(path)).tokenizer  # noqa: B023, E731
        with pytest.raises(InputError, match=rf"`{role}.pad_token`") as raised:
            asked()
        assert what in str(raised.value)
    assert load_tokenizer(path, "--student", pads=False).pad_token_id is None


# -- ids without a token -----------------------------------------------------------------------------------------------


def with_holes(rows: int, seed: int) -> ScoringModel:
    model = tiny.qwen3(seed=seed, rows=rows).double()
    with torch.no_grad():  # what has no token would be the likeliest of all
        model.lm_head.weight[[*HOLES, *range(USED, rows)]] *= 3.0
    return ScoringModel(model, vocabulary=USED, unused=HOLES).eval()


@pytest.fixture(scope="module")
def student() -> ScoringModel:
    return with_holes(ROWS, 1)


@pytest.fixture(scope="module")
def prompts() -> PromptBatch:
    ids = torch.tensor(TOKENS)[torch.randint(0, len(TOKENS), (24, 5), generator=torch.Generator().manual_seed(0))]
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(24), tuple(map(str, range(24))))


def settings(**changes: object) -> SamplingSettings:
    ids = (*HOLES, *range(USED, ROWS))
    return SamplingSettings(max_new_tokens=12, stop_ids=(1,), pad_id=0, vocabulary=USED, unused_ids=ids, **changes)  # type: ignore[arg-type]


def plain_logprobs(policy: ScoringModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """[B, T, tokens] float64: the model's own logits of the tokens that there are, and nothing else."""
    ids = torch.cat([rollout.prompts.ids, rollout.response_ids], -1)
    logits = policy.causal_lm(input_ids=ids).logits[:, rollout.prompts.ids.shape[1] - 1 : -1, TOKENS]
    return (logits / temperature).log_softmax(-1)


def picked(logprobs: Tensor, rollout: Rollout) -> Tensor:
    place = torch.zeros(ROWS, dtype=torch.int64)
    place[TOKENS] = torch.arange(len(TOKENS))
    return logprobs.gather(-1, place[rollout.response_ids].unsqueeze(-1)).squeeze(-1)[rollout.mask]


@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"greedy": True}], ids=lambda c: str(c)
)
def test_engines_sample_tokens_only_with_their_log_probs(
    student: ScoringModel, prompts: PromptBatch, changes: dict, full_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "full_logits", full_logits)
    drawn = [
        sampler.sample(student, prompts, settings(**changes)) for sampler in (DecodeSampler(), TransformersSampler())
    ]
    assert torch.equal(drawn[0].response_ids, drawn[1].response_ids)
    assert set(drawn[0].response_ids[drawn[0].mask].tolist()) <= set(TOKENS)
    if not {"top_p", "top_k"} & changes.keys():
        wanted = picked(plain_logprobs(student, drawn[0], changes.get("temperature", 1.0)), drawn[0])
        for rollout in drawn:
            assert torch.allclose(rollout.sampler_logprobs[rollout.mask].double(), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def rollout(student: ScoringModel, prompts: PromptBatch) -> Rollout:
    return DecodeSampler().sample(student, prompts, settings())


@pytest.mark.parametrize("full_logits", [False, True])
def test_scores_and_gradients_are_those_of_the_tokens_alone(
    student: ScoringModel, rollout: Rollout, full_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher are padded to different sizes; top-k lists, entropy and the divergence hold tokens only."""
    teacher = with_holes(80, 2)
    for policy in (student, teacher):
        monkeypatch.setattr(policy, "full_logits", full_logits)
    against = teacher.head(rollout)
    scores = student(rollout, temperature=0.7, wants=frozenset({"entropy", "topk", "token_kl"}), against=against)
    ours, theirs = (plain_logprobs(policy, rollout, 0.7) for policy in (student, teacher))
    mask = rollout.mask
    assert torch.allclose(scores.logprobs[mask], picked(ours, rollout), atol=1e-9)
    assert torch.allclose(scores.entropy[mask], -(ours.exp() * ours).sum(-1)[mask], atol=1e-9)
    assert torch.allclose(scores.token_kl[mask], (ours.exp() * (ours - theirs)).sum(-1)[mask], atol=1e-8)
    assert set(scores.topk.ids[mask].flatten().tolist()) <= set(TOKENS)
    assert torch.allclose(scores.topk.logprobs[mask], ours.topk(32, -1).values[mask], atol=1e-9)
    weight, upstream = student.causal_lm.lm_head.weight, torch.rand(mask.shape, dtype=torch.float64) * mask
    (found,) = torch.autograd.grad((scores.logprobs * upstream).sum(), weight)
    (wanted,) = torch.autograd.grad((picked(ours, rollout) * upstream[mask]).sum(), weight)
    assert torch.allclose(found, wanted, atol=1e-9) and not found[[*HOLES, *range(USED, ROWS)]].any()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("top_k", [None, 4, 36])
def test_divergences_count_tokens_only(student: ScoringModel, rollout: Rollout, kind: str, top_k: int | None) -> None:
    """With holes and padding as with heads that have rows for the tokens alone, values and gradients."""
    term, teacher = Divergence(kind, top_k=top_k), with_holes(80, 2)
    heads = [policy.head(rollout) for policy in (student, teacher)]
    found = term.token_divergence(*heads, temperature=0.7)
    small = [replace(head, weight=head.weight[TOKENS], limit=None, unused=None) for head in heads]  # type: ignore[index]
    wanted = term.token_divergence(*small, temperature=0.7)
    assert torch.allclose(found, wanted, atol=1e-9)
    weight = student.causal_lm.lm_head.weight
    grads = [torch.autograd.grad(value.sum(), weight, retain_graph=True)[0] for value in (found, wanted)]
    assert torch.allclose(*grads, atol=1e-8) and grads[0].any()
    assert torch.allclose(token_kl(*heads), token_kl(*small), atol=1e-8)


def test_a_cut_of_nothing_is_the_whole_bit_for_bit(rollout: Rollout) -> None:
    model = tiny.qwen3(seed=1, rows=USED)
    whole = ScoringModel(model, vocabulary=USED)(rollout).logprobs
    head = ScoringModel(model, vocabulary=USED).head(rollout)
    assert head.unused is None and torch.equal(ScoringModel(model, vocabulary=USED, unused=())(rollout).logprobs, whole)


def test_servers_are_asked_for_tokens_only(tmp_path: Path, student: ScoringModel, prompts: PromptBatch) -> None:
    student.causal_lm.float().save_pretrained(tmp_path)
    try:
        with fake_vllm.serving(str(tmp_path)) as server:
            sampler = VLLMSampler([server.url], max_new_tokens=12, logprobs_mode="processed_logprobs")
            drawn = sampler.sample(None, prompts, settings())
            few = sampler.sample(None, prompts, replace(settings(), unused_ids=tuple(set(range(ROWS)) - set(range(9)))))
            with pytest.raises(Exception, match="ids that the tokenizer does not have"):
                server.always = fake_vllm.changed(
                    lambda answer: [c["token_ids"].__setitem__(0, 17) for c in answer["choices"]]
                )
                VLLMSampler([server.url], max_new_tokens=12, retry_seconds=0).sample(None, prompts, settings())
    finally:
        student.causal_lm.double()
    assert set(drawn.response_ids[drawn.mask].tolist()) <= set(TOKENS) and few.response_ids.max() < 9
    wanted = picked(plain_logprobs(student, drawn), drawn)
    assert torch.allclose(drawn.sampler_logprobs[drawn.mask].double(), wanted, atol=1e-4)
    assert list(only_tokens(settings())) == ["logit_bias"] and only_tokens(replace(settings(), unused_ids=())) == {}


def test_holes_and_padding_follow_from_the_tokenizer(tmp_path: Path) -> None:
    made = tiny.tokenizer("abcd")
    words = json.loads(made.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    vocabulary["d"] = 10
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    from transformers import PreTrainedTokenizerFast

    holed = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token=tiny.PAD, eos_token=tiny.EOS
    )
    assert unused_ids(made) == () and unused_ids(holed) == (7, 8, 9)
    assert agree_vocabularies(holed, holed, student_rows=64, teacher_rows=80) == 11
    paths = [
        tiny.save(tiny.qwen3(seed=n, rows=rows), tmp_path / str(n), with_tokenizer=holed)
        for n, rows in ((1, 64), (2, 80))
    ]
    module = OPDModule(StudentSettings(paths[0]), LocalTeacher(paths[1]))
    assert (module.vocabulary, module.unused_ids) == (11, (7, 8, 9, *range(11, 64)))
    module.configure_model()
    for policy in (module.student, module.teacher.policy):  # type: ignore[union-attr]
        assert (policy.vocabulary, policy.unused) == (11, (7, 8, 9))
