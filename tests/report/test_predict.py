"""``train.py predict``: the numbers of every token against plain transformers, and a page that lets nothing through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_opd.report.tokens_page import PredictedResponse, PredictedToken, render, token_texts
from lit_opd.weighting import TIP
from tests.helpers import fixed, tiny
from tests.helpers import math_world as world
from tests.helpers.pages import HOSTILE, Reader, assert_only_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("predict")
    world.models(made)
    return made


@pytest.fixture(scope="module")
def predicted(folder: Path) -> Path:
    return world.run(world.config(folder / "config"), folder / "run", "--data.val_batch", "3", command="predict")


# -- the file ----------------------------------------------------------------------------------------------------------


def logprobs(folder: Path, ids: list[int], prompt: list[int]) -> list[float]:
    """Log-probs of ``ids`` after ``prompt`` under the model in ``folder``, nats."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids].tolist()


def test_every_token_has_the_log_probs_of_plain_transformers(predicted, folder):
    rows = world.lines(predicted, "predictions.jsonl")
    assert [row["row_id"] for row in rows] == [f"val-{n:05d}" for n in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = [token["id"] for token in row["tokens"]]
        for who in ("student", "teacher"):
            ours = [token[f"{who}_logprob"] for token in row["tokens"]]
            assert ours == pytest.approx(logprobs(folder / who, ids, prompt), abs=2e-5)
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["response"]
        assert "".join(token["text"] for token in row["tokens"]) == tokenizer.decode(ids)
        assert row["finish_reason"] in ("stop", "length") and row["reference"].isdigit()


def test_the_weights_are_the_strategys(predicted):
    """IW-OPD by a slow loop: 1 + 0.5 (1 - disagreement before t / all disagreement)."""
    for row in world.lines(predicted, "predictions.jsonl"):
        gaps = [abs(token["teacher_logprob"] - token["student_logprob"]) for token in row["tokens"]]
        for place, token in enumerate(row["tokens"]):
            assert token["weight"] == pytest.approx(1.5 - 0.5 * sum(gaps[:place]) / sum(gaps), abs=1e-4)


def test_a_prediction_weighs_by_what_training_computes(tmp_path):
    """``TIP`` reads token KL where something computes it: a prediction does, for the page, and training does not."""
    rollout = fixed.rollout(lengths=[9, 4, 12, 7], prompt_lengths=[3, 5, 4, 4], truncated=set())
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    trained = fixed.module(tiny.pair(tmp_path), rollout, weighting=TIP(0.3), **frozen)
    (record,) = fixed.fit(trained, rollout.prompts).records
    predicted = trained.predict_step(rollout.prompts, 0)
    assert predicted.signal.token_kl is not None and not torch.equal(TIP(0.3)(predicted.signal), record.weights)
    assert torch.equal(predicted.weights, record.weights)


@pytest.mark.parametrize(
    ("strategy", "options"), [("FiRe", []), ("FirstFraction", ["--model.weighting.fraction", "0.3"])]
)
def test_strategies_that_need_more_or_drop_tokens_predict_too(folder, strategy, options):
    path = world.config(folder / "config")
    run = world.run(path, folder / strategy, "--model.weighting", strategy, *options, command="predict")
    weights = [token["weight"] for row in world.lines(run, "predictions.jsonl") for token in row["tokens"]]
    assert len(set(weights)) > 1
    assert f"Token weights of {strategy}" in (run / "predictions.html").read_text()


# -- the page ----------------------------------------------------------------------------------------------------------


def response(*texts: str, **changes) -> PredictedResponse:
    tokens = tuple(PredictedToken(n, text, -0.5, -0.5 - n, 1.0 + n / 10) for n, text in enumerate(texts))
    made = PredictedResponse("row", "prompt", "".join(texts), "42", "stop", tokens)
    return replace(made, **changes)


def test_the_page_lets_no_markup_of_a_response_through():
    plain = render([response(*["a"] * len(HOSTILE))], strategy="Uniform")
    text = "".join(HOSTILE)
    page = render(
        [response(*HOSTILE, prompt=text, row_id=text, reference=text, finish_reason=text)], strategy=text, total=1
    )
    # the strategy in title and heading; row id, prompt, facts (twice), and the tokens themselves
    assert_only_text(page, plain, shown=7)
    for place, (said, token) in enumerate(zip(Reader(page).titles, HOSTILE, strict=True)):
        assert said.startswith(f"position {place + 1}: {token!r} (id {place})\nweight 1.")


def test_control_characters_and_line_breaks_stay_text():
    text = "\n\u202e\u0000\n\t  x"
    page = Reader(render([response(text, prompt=text)], strategy="Uniform"))
    assert f"\n{text}" in page.text  # a browser drops the first line break of a <pre>, so the page has one to drop
    assert text.replace("\n", "\u21b5\n") in page.text


def test_a_token_shows_its_numbers_and_is_shaded_between_the_pages_extremes():
    page = Reader(render([response("a", "b", "c")], strategy="Uniform"))
    assert page.titles[2].splitlines() == [
        "position 3: 'c' (id 2)",
        "weight 1.2000",
        "student -0.5000",
        "teacher -2.5000",
        "disagreement 2.0000 nats",
    ]
    assert [style.split(";") for style in page.styles] == [
        ["--w:0.000", "--d:0.000"],
        ["--w:0.500", "--d:0.500"],
        ["--w:1.000", "--d:1.000"],
    ]


def test_equal_weights_empty_pages_and_left_out_responses_are_fine():
    even = replace(response("a"), tokens=(PredictedToken(1, "a", -1.0, -1.0, 1.0),) * 2)
    assert Reader(render([even], strategy="Uniform")).styles == ["--w:0.500;--d:0.000"] * 2
    assert "0 responses" in render([], strategy="Uniform")
    assert "0 tokens" in render([replace(even, tokens=())], strategy="Uniform")
    assert "1 of 9 responses" in render([even], strategy="Uniform", total=9)
    assert "\u21b5\n" in render([response("\n")], strategy="Uniform")


def test_the_page_of_a_run_holds_its_responses(predicted):
    page = Reader((predicted / "predictions.html").read_text(encoding="utf-8"))
    rows = world.lines(predicted, "predictions.jsonl")
    assert len(page.titles) == sum(len(row["tokens"]) for row in rows)
    assert all(row["response"] in page.text for row in rows)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as the worst case of a byte-level BPE."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_characters_of_several_tokens_are_shown_once_and_whole():
    tokenizer = byte_tokenizer()
    text = "a \u00e9 \u4e2d\U0001f600 b"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == len(text.encode())
    assert "".join(texts) == text and not any("\ufffd" in part for part in texts)
    broken = token_texts(tokenizer, tokenizer("\U0001f600")["input_ids"][:2] + tokenizer("abc")["input_ids"])
    assert "".join(broken).endswith("abc")


def test_tokens_without_a_score_are_in_no_mean_and_say_so():
    """A teacher with another tokenizer scores the second and the third of three tokens, at 0.5 and 1.5 nats."""
    tokens = (
        PredictedToken(1, "a", 0.0, 0.0, 0.0, scored=False),
        PredictedToken(2, "b", -1.0, -1.5, 1.0),
        PredictedToken(3, "c", -1.0, -2.5, 2.0),
    )
    made = response(tokens=tokens)
    assert (made.mean_weight, made.mean_disagreement) == (1.5, 1.0)
    page = render([made], strategy="Uniform")
    assert "mean weight 1.500, mean disagreement 1.000 nats" in page and "1 to 2</label>" in page
    assert [("no score" in said) for said in Reader(page).titles] == [True, False, False]
    assert [token.get("scored") for token in made.to_json()["tokens"]] == [False, None, None]
