"""SDPO through the real step: the gradient against one written out, what is counted, exact resume, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_opd.advantage import RewardExtrapolation, ValueBaseline
from lit_opd.errors import InputError
from lit_opd.evaluation import Reward, ValidationSettings
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.preflight.hindsight_checks import check_hindsight
from lit_opd.preflight.module_checks import check_window
from lit_opd.prompts import HindsightPrompt, PeerDemonstration, PromptDataModule
from lit_opd.rollout import RatioStop, TransformersSampler
from lit_opd.step.recipe import WarmUp
from lit_opd.teacher import LocalTeacher, SelfTeacher
from lit_opd.types import Rollout
from lit_opd.weighting import Uniform
from tests.helpers import fixed, tiny

SAMPLES, PROMPTS, TOKENS = 3, 4, 6


class EarlyLetter(Reward):
    """1 where the response begins with a letter of the first half of the vocabulary; keeps what it saw."""

    def __init__(self, bound: int = 20) -> None:
        self.bound = bound
        self.seen: list[Rollout] = []

    def score(self, responses, rollout):
        """By the first id."""
        self.seen.append(rollout)
        return [float(int(row[0]) < self.bound) for row in rollout.response_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny.pair(tmp_path_factory.mktemp("models"))[0]


def prompts(folder: Path, own: Any = None, **settings: Any) -> PromptDataModule:
    rows = [{"id": str(number), "prompt": f"{number} + {number} ="} for number in range(PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = PeerDemonstration("{prompt}{demonstration}", max_prompt_tokens=40) if own is None else own
    settings = {"prompt_batch": PROMPTS, "samples_per_prompt": SAMPLES, "max_prompt_tokens": 16} | settings
    return PromptDataModule(str(folder / "rows.jsonl"), teacher_prompt=own, **settings)


def module(student: str, **settings: Any) -> OPDModule:
    defaults: dict[str, Any] = {
        "student": StudentSettings(student, dtype="float64"),
        "teacher": SelfTeacher("live"),
        "sampler": TransformersSampler(max_new_tokens=TOKENS),
        "weighting": Uniform(),
        "objective": Divergence("reverse_kl"),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "gradient_clip_norm": None,
        "reward": EarlyLetter(),
        "seed": 3,
        "validation": ValidationSettings(divergence=False),
    }
    return OPDModule(**(defaults | settings))


def fit(trained: OPDModule, data: PromptDataModule, *, steps: int, **settings: Any) -> tuple[fixed.Collect, L.Trainer]:
    collect, start = fixed.Collect(), fixed.StartWeights()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[collect, start],
    )  # fmt: skip
    trainer.fit(trained, datamodule=data, **settings)
    collect.start = start.weights
    return collect, trainer


def texts(data: PromptDataModule, ids: Tensor, mask: Tensor) -> list[str]:
    tokenizer = data.encoder.tokenizer
    return [
        tokenizer.decode(row[valid].tolist(), skip_special_tokens=True) for row, valid in zip(ids, mask, strict=True)
    ]


def by_hand(trained: OPDModule, data: PromptDataModule, seen: Rollout, *, without: str) -> tuple[Tensor, int]:
    """Mean over rows with a hint ("drop") or all rows of the token means of KL(student || teacher), each row by itself; and how
    many rows have a hint."""
    model, tokenizer = trained.student.causal_lm, data.encoder.tokenizer
    said = texts(data, seen.response_ids, seen.mask)
    rewards = [float(int(row[0]) < 20) for row in seen.response_ids]
    losses, hinted = [], 0
    for row in range(len(seen)):
        group = range(row // SAMPLES * SAMPLES, row // SAMPLES * SAMPLES + SAMPLES)
        shown = [said[other].strip() for other in group if other != row and rewards[other] and said[other].strip()]
        question = f"{seen.prompts.row_ids[row]} + {seen.prompts.row_ids[row]} ="
        response = seen.response_ids[row][seen.mask[row]].tolist()

        def logprobs(text: str, response: list[int] = response) -> Tensor:
            prompt = [2, *tokenizer(text, add_special_tokens=False)["input_ids"], 3]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1)

        if not shown and without == "drop":
            continue
        student = logprobs(question)
        teacher = logprobs(question + shown[0] if shown else question).detach()
        hinted += bool(shown)
        losses.append((student.exp() * (student - teacher)).sum(-1).mean())
    return torch.stack(losses).mean(), hinted


@pytest.mark.parametrize("without", ["drop", "plain"])
def test_a_step_is_the_gradient_of_the_divergence_from_the_student_with_its_peers_answer(folder, tmp_path, without):
    data = prompts(tmp_path, PeerDemonstration("{prompt}{demonstration}", without=without, max_prompt_tokens=40))
    trained = module(folder)
    collect, trainer = fit(trained, data, steps=1)
    after, reference = fixed.weights(trained), module(folder)
    reference.configure_model()
    loss, hinted = by_hand(reference, data, trained.reward.seen[0], without=without)
    loss.backward()
    assert 0 < hinted < SAMPLES * PROMPTS
    wanted = {
        name: value.grad for name, value in reference.student.causal_lm.named_parameters() if value.grad is not None
    }
    ours = {name: collect.start[name] - after[name] for name in wanted}
    assert fixed.relative_gap(ours, wanted) < 1e-9
    assert collect.losses[0] == pytest.approx(float(loss), rel=1e-9)
    assert float(trainer.callback_metrics["train/hint_fraction"]) == hinted / (SAMPLES * PROMPTS)
    assert float(trainer.callback_metrics["train/hint_refused_fraction"]) == 0.0
    rewards = [float(int(row[0]) < 20) for row in trained.reward.seen[0].response_ids]
    assert float(trainer.callback_metrics["train/reward"]) == pytest.approx(sum(rewards) / len(rewards))
    assert float(trainer.callback_metrics["train/tokens"]) == int(trained.reward.seen[0].mask.sum())


def test_micro_batches_of_any_size_give_the_same_step(folder, tmp_path):
    found = []
    for budget in (None, 48):
        trained = module(folder, token_budget=budget)
        fit(trained, prompts(tmp_path), steps=1)
        found.append(fixed.weights(trained))
    assert all(torch.allclose(found[1][name], value, atol=1e-12, rtol=0) for name, value in found[0].items())


def test_a_batch_in_which_nobody_succeeds_changes_nothing(folder, tmp_path):
    trained = module(folder, reward=EarlyLetter(bound=0))
    collect, trainer = fit(trained, prompts(tmp_path), steps=1)
    after = fixed.weights(trained)
    assert all(torch.equal(collect.start[name], value) for name, value in after.items())
    assert collect.losses == [0.0] and float(trainer.callback_metrics["train/hint_fraction"]) == 0.0


def test_a_step_logs_the_share_of_rows_whose_prompt_was_too_long(folder, tmp_path):
    data = prompts(tmp_path, PeerDemonstration("{prompt}{demonstration}", max_prompt_tokens=3))
    trained = module(folder)
    _, trainer = fit(trained, data, steps=1)
    _, hinted = by_hand(trained, data, trained.reward.seen[0], without="plain")
    assert 0 < hinted < SAMPLES * PROMPTS
    assert float(trainer.callback_metrics["train/hint_fraction"]) == 0.0
    assert float(trainer.callback_metrics["train/hint_refused_fraction"]) == hinted / (SAMPLES * PROMPTS)


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(folder, tmp_path):
    def run(steps: int, **settings: Any) -> tuple[OPDModule, L.Trainer]:
        trained = module(
            folder,
            teacher=SelfTeacher("ema", decay=0.8),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        )
        return trained, fit(trained, prompts(tmp_path, prompt_batch=2), steps=steps, **settings)[1]

    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again, _ = run(2, ckpt_path=tmp_path / "half.ckpt")
    hints = [rollout.response_ids for rollout in whole.reward.seen[1:]]
    assert all(torch.equal(ours.response_ids, theirs) for ours, theirs in zip(again.reward.seen, hints, strict=True))
    for name, value in fixed.weights(whole).items():
        assert torch.equal(fixed.weights(again)[name], value), name
    assert not torch.equal(
        whole.student.causal_lm.lm_head.weight, half.lightning_module.student.causal_lm.lm_head.weight
    )


# -- bad input ---------------------------------------------------------------------------------------------------------


class Told(HindsightPrompt):
    """Needs no reward and no other sample."""

    def render(self, attempt, peers):
        """Nothing."""


def checked(trained: OPDModule, data: PromptDataModule) -> None:
    data.use_tokenizer(trained.tokenizer).setup("fit")
    check_hindsight(trained, data)


@pytest.mark.parametrize(
    ("changes", "samples", "words"),
    [
        ({"reward": None}, 3, ["`model.reward` must be given", "PeerDemonstration", "AnswerReward"]),
        ({}, 1, ["`data.samples_per_prompt` must be >= 2", "PeerDemonstration", "got 1"]),
        ({"rollout_stop": RatioStop()}, 3, ["`model.rollout_stop` must be null", "RatioStop"]),
        ({"warmup": WarmUp(2)}, 3, ["`model.warmup` must be null", "WarmUp"]),
    ],
)
def test_what_the_run_cannot_give_is_one_line_before_it(folder, tmp_path, changes, samples, words):
    with pytest.raises(InputError) as refused:
        checked(module(folder, **changes), prompts(tmp_path, samples_per_prompt=samples))
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words)


def test_a_class_that_needs_neither_is_let_through_and_validation_without_hints_is_warned_of(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hindsight(module(folder), prompts(tmp_path, "{prompt} hint"))
        check_hindsight(module(folder, reward=None), prompts(tmp_path, Told(), samples_per_prompt=1))
    with pytest.warns(UserWarning, match=r"model\.validation\.divergence.*PeerDemonstration"):
        check_hindsight(module(folder, validation=ValidationSettings()), prompts(tmp_path))


def test_a_value_baseline_is_warned_of_where_the_teacher_may_read_the_response_it_scores(folder, tmp_path):
    trained = module(folder, advantage=[ValueBaseline()], objective=PolicyLoss())
    with pytest.warns(
        UserWarning, match="`data.teacher_prompt` Told may show .*`ValueBaseline` no longer averages out .*; show"
    ):
        check_hindsight(trained, prompts(tmp_path, Told()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hindsight(trained, prompts(tmp_path))
        check_hindsight(
            module(folder, advantage=[ValueBaseline()], objective=Divergence("reverse_kl")), prompts(tmp_path, Told())
        )


def test_the_longest_prompt_of_the_teacher_must_fit_into_its_window(folder, tmp_path):
    trained, data = module(folder), prompts(tmp_path, PeerDemonstration("{demonstration}", max_prompt_tokens=58))
    data.use_tokenizer(trained.tokenizer).setup("fit")
    check_window(trained, data)  # 58 + 6 of 64
    data.teacher_prompt = PeerDemonstration("{demonstration}", max_prompt_tokens=59)
    with pytest.raises(
        InputError, match=r"`model\.teacher`, 64 tokens, got 6 after prompts of up to 59.*teacher_prompt"
    ):
        check_window(trained, data)


def test_the_window_of_a_reference_need_not_hold_it(folder, tmp_path):
    """Prompts of the student have up to 16 tokens: 16 + 6 of 22."""
    wide, narrow, short = (
        LocalTeacher(tiny.save(tiny.qwen3(seed=2, window=window), tmp_path / str(window))) for window in (256, 22, 21)
    )
    third = {"reference": narrow, "advantage": [RewardExtrapolation(1.5)], "objective": PolicyLoss()}
    trained = module(folder, teacher=wide, **third)
    data = prompts(tmp_path, PeerDemonstration("{demonstration}", max_prompt_tokens=100))
    data.use_tokenizer(trained.tokenizer).setup("fit")
    check_window(trained, data)
    with pytest.raises(InputError, match=r"`model\.reference`, 21 tokens, got 6 after prompts of up to 16"):
        check_window(module(folder, teacher=wide, **(third | {"reference": short})), data)
