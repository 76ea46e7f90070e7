"""Answer metrics against enumeration, evaluation sets from files, rows that survive a kill, comparisons."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.evaluation import (
    PROMPT_SUFFIX,
    AnswerRow,
    AnswerSettings,
    Comparison,
    EvaluationFile,
    PastEvaluation,
    difference,
    flips,
    load_sets,
    past_evaluations,
    reached,
    read_comparison,
)
from lit_opd.evaluation.sets import set_name
from lit_opd.evaluation.statistics import (
    AnswerStatistics,
    bootstrap_interval,
    majority_credit,
    paired_difference,
    pass_at_k,
    pass_ks,
)
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.sources import DataSource
from tests.helpers import tiny

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")

# -- metrics -----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_stays_finite_for_many_samples():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(32, 0, 32) == 0.0 and pass_at_k(32, 1, 32) == 1.0
    with pytest.raises(ValueError, match="k"):
        pass_at_k(4, 1, 5)


def test_the_reported_ks():
    assert pass_ks(32) == [1, 4, 8, 16, 32]
    assert pass_ks(24) == [1, 4, 8, 16, 24]
    assert pass_ks(2) == [1, 2]


def test_majority_breaks_ties_at_random_in_expectation():
    """Against playing the vote out: every order of the samples, the first of the most frequent answers wins."""
    for votes in itertools.product([0, 1, 5, 9], repeat=4):
        wins = []
        for order in itertools.permutations(votes):
            cast = [vote for vote in order if vote]
            wins.append(bool(cast) and max(cast, key=cast.count) == 1)
        assert majority_credit(list(votes)) == pytest.approx(sum(wins) / len(wins))


def test_the_bootstrap_interval_is_seeded_and_close_to_the_normal_one():
    values = torch.tensor([0.0] * 60 + [1.0] * 40, dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    half = 1.96 * (0.4 * 0.6 / 100) ** 0.5
    assert low == pytest.approx(0.4 - half, abs=0.02) and high == pytest.approx(0.4 + half, abs=0.02)
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_a_paired_difference_is_narrower_than_the_spread_over_problems():
    """Every problem gains exactly 0.1: the paired interval has no width although the problems differ widely."""
    theirs = {str(n): n / 20 for n in range(11)}
    ours = {name: value + 0.1 for name, value in theirs.items()} | {"only ours": 0.0}
    assert paired_difference(ours, theirs) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(ours, {"other": 1.0}) is None


def columns(samples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    names = ("problem", "sample", "group", "correct", "truncated", "timeout", "no_answer", "length", "vote")
    return {
        name: torch.tensor([sample.get(name, sample["problem"]) for sample in samples], dtype=torch.int64)
        for name in names
    }


def test_statistics_count_every_sample_once_and_equal_a_slow_loop():
    draw = random.Random(0)
    samples = []
    for problem, sample in itertools.product(range(7), range(5)):
        correct = int(draw.random() < problem / 6)
        vote = 1 if correct else draw.choice([0, 2, 3])
        row = {"problem": problem, "sample": sample, "correct": correct, "vote": vote, "length": draw.randrange(9)}
        samples.append(row | {"truncated": draw.randrange(2), "timeout": 0, "no_answer": int(vote == 0)})
    metric = AnswerStatistics(seed=1)
    metric.update(**columns(samples[:20]))
    metric.update(**columns([]))
    metric.update(**columns(samples[10:]))  # ten of them for the second time
    values = metric.compute()
    by_problem = [[row for row in samples if row["problem"] == problem] for problem in range(7)]
    rates = [sum(row["correct"] for row in rows) / 5 for rows in by_problem]
    assert values["avg_at_k"] == pytest.approx(sum(rates) / 7)
    interval = bootstrap_interval(torch.tensor(rates, dtype=torch.float64), seed=1)
    assert (values["avg_at_k_low"], values["avg_at_k_high"]) == interval
    for k in (1, 4, 5):
        drawn = [itertools.combinations([row["correct"] for row in rows], k) for rows in by_problem]
        shares = [[any(draw) for draw in draws] for draws in drawn]
        assert values[f"pass_at_{k}"] == pytest.approx(sum(sum(share) / len(share) for share in shares) / 7)
    credits = [majority_credit([row["vote"] for row in rows]) for rows in by_problem]
    assert values["majority_at_k"] == pytest.approx(sum(credits) / 7)
    for name, field in (
        ("truncated_fraction", "truncated"),
        ("no_answer_fraction", "no_answer"),
        ("response_length", "length"),
    ):
        assert values[name] == pytest.approx(sum(row[field] for row in samples) / 35)
    assert values["problems"] == 7


def test_repeats_of_a_problem_add_samples_and_no_problems():
    """Each of six problems stands in four rows of five samples: every number is that of six problems with twenty samples."""
    draw = random.Random(1)
    rows = []
    for problem, sample in itertools.product(range(24), range(5)):
        correct = int(draw.random() < problem % 6 / 5)
        rows.append(
            {
                "problem": problem,
                "sample": sample,
                "group": problem % 6,
                "correct": correct,
                "vote": 1 if correct else 7,
            }
            | dict.fromkeys(("truncated", "timeout", "no_answer", "length"), 0)
        )
    pooled = [row | {"problem": row["problem"] % 6, "sample": row["problem"] // 6 * 5 + row["sample"]} for row in rows]
    values = []
    for samples in (rows, pooled):
        metric = AnswerStatistics(seed=1)
        metric.update(**columns(samples))
        values.append(metric.compute())
    assert values[0] == values[1] and values[0]["problems"] == 6 and "pass_at_20" in values[0]
    rates = [sum(row["correct"] for row in rows if row["group"] == group) / 20 for group in range(6)]
    interval = bootstrap_interval(torch.tensor(rates, dtype=torch.float64), seed=1)
    assert (values[0]["avg_at_k_low"], values[0]["avg_at_k_high"]) == interval


# -- sets --------------------------------------------------------------------------------------------------------------


def encoder() -> PromptEncoder:
    return PromptEncoder(tiny.tokenizer(), chat_template=False)


def load(*sources: str | DataSource, suffix: str | None = None, seed: int = 0):
    parts = [DataSource(source) if isinstance(source, str) else source for source in sources]
    return load_sets(parts, encoder(), suffix=suffix, seed=seed)


def write(path: Path, *lines: str, start: str = "") -> str:
    path.write_text(start + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("prompt", ["problem", "question", "Problem", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "Answer", "solution"])
def test_the_usual_field_names_are_found(tmp_path, prompt, answer):
    path = write(
        tmp_path / "aime.jsonl", json.dumps({prompt: "1 + 1", answer: "so \\boxed{2}" if answer == "solution" else 2})
    )
    (loaded,) = load(path)
    assert [(p.text, p.reference) for p in loaded.problems] == [("1 + 1", "2")]
    assert (loaded.name, loaded.integers) == ("aime", True)


def test_a_bom_and_blank_lines_are_read_over(tmp_path):
    row = '{"id": %d, "problem": "1 + 1", "answer": "2"}'
    path = write(tmp_path / "a.jsonl", row % 1, "", row % 2, "   ", start="\ufeff")
    assert sorted(problem.problem_id for problem in load(path)[0].problems) == ["1", "2"]


@pytest.mark.parametrize("answer", [', "answer": null', "", ', "answer": ""', ', "answer": " \\\\boxed{} "'])
def test_a_missing_answer_is_an_error_with_file_and_line(tmp_path, answer):
    row = '{"problem": "1 + 1"%s}'
    path = write(tmp_path / "a.jsonl", row % ', "answer": "2"', "", row % answer, start="\ufeff")
    with pytest.raises(InputError, match=r"a\.jsonl:3: the answer is missing"):
        load(path)


def test_gsm8k_answers_and_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": ["a", "b"], "answer": ["so 3\n#### 1,003", "#### -4"]})
    parquet.write_table(table, tmp_path / "g.parquet")
    (loaded,) = load(str(tmp_path / "g.parquet"))
    assert sorted(problem.reference for problem in loaded.problems) == ["-4", "1,003"] and loaded.integers


def test_the_suffix_goes_only_where_no_box_is_mentioned(tmp_path):
    rows = [{"problem": "1 + 1", "answer": 2}, {"problem": "2 + 2 in \\boxed{}", "answer": 4}]
    chat = {"problem": [{"role": "user", "content": "3 + 3"}], "answer": 6}
    path = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    texts = {problem.reference: problem.text for problem in load(path, suffix=PROMPT_SUFFIX)[0].problems}
    assert texts == {"2": "1 + 1" + PROMPT_SUFFIX, "4": "2 + 2 in \\boxed{}"}
    path = write(tmp_path / "b.jsonl", json.dumps(chat))
    chats = load_sets([DataSource(path)], PromptEncoder(tiny.tokenizer()), suffix=" box", seed=0)
    assert chats[0].problems[0].text == "3 + 3 box"


def test_the_order_depends_on_the_seed_alone_and_streams_on_the_set(tmp_path):
    rows = [json.dumps({"id": n, "problem": f"{n} + 1", "answer": n + 1}) for n in range(9)]
    one, two = write(tmp_path / "one.jsonl", *rows), write(tmp_path / "two.jsonl", *reversed(rows))
    first, again, other = load(one)[0], load(DataSource(two, id_prefix="one"))[0], load(one, seed=1)[0]
    ids = [problem.problem_id for problem in first.problems]
    assert ids == [problem.problem_id for problem in again.problems]
    assert ids != [problem.problem_id for problem in other.problems] and ids != sorted(ids)
    assert {problem.prompt.row_id for problem in first.problems} == {f"one/{n}" for n in range(9)}


def test_a_bare_hub_id_reads_the_test_split_and_else_train(monkeypatch):
    """A stand-in for the hub, which has no network here."""
    asked: list[tuple[str, str]] = []
    held = {"org/math": "test", "org/aime_2024": "train"}

    def load_dataset(path: str, name: str | None, split: str):
        asked.append((path, split))
        if held.get(path) != split:
            raise ValueError(f"no split {split}")
        return [{"problem": "1 + 1", "answer": "2"}]

    monkeypatch.setattr("lit_opd.prompts.sources._datasets", lambda path: SimpleNamespace(load_dataset=load_dataset))
    assert [loaded.name for loaded in load("org/math", "org/aime_2024")] == ["math", "aime_2024"]
    assert [split for path, split in asked if path == "org/aime_2024"] == ["test", "validation", "train"]
    asked.clear()
    assert load(DataSource("org/aime_2024", id_prefix="a"), DataSource("org/math", split="test"))
    assert asked[-1] == ("org/math", "test") and len(asked) == 4
    with pytest.raises(InputError, match="org/nowhere"):
        load("org/nowhere")


def test_sets_need_names_of_their_own(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"problem": "1", "answer": "2"}')
    with pytest.raises(InputError, match="'a' twice"):
        load(path, path)
    assert [loaded.name for loaded in load(path, DataSource(path, id_prefix="b b"))] == ["a", "b_b"]
    assert set_name(DataSource("opencompass/AIME2025")) == "AIME2025"
    assert set_name(DataSource("math-ai/aime-v1.5")) == "aime-v1.5"


def test_latex_answers_without_math_verify_are_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_opd.evaluation.sets.math_verify_available", lambda: False)
    write(tmp_path / "integers.jsonl", '{"problem": "1", "answer": "2"}')
    assert load(str(tmp_path / "integers.jsonl"))
    path = write(tmp_path / "latex.jsonl", '{"problem": "1", "answer": "\\\\frac{1}{2}"}')
    with pytest.raises(InputError, match=r"math-verify; pip install 'lit-opd\[eval\]'"):
        load(path)


@needs_data
def test_the_public_sets_load():
    names = ["aime24", "aime25", "gsm8k_test", "math500"]
    sets = load(*[str(DATA / f"{name}.jsonl") for name in names], suffix=PROMPT_SUFFIX)
    assert [len(loaded.problems) for loaded in sets] == [30, 30, 1319, 500]
    assert [loaded.integers for loaded in sets] == [True, True, True, False]
    for loaded in sets:
        assert all(
            problem.text.count("within \\boxed{}") == 1 for problem in loaded.problems if "boxed{}" in problem.text
        )
        assert sum("\\boxed" in problem.text for problem in loaded.problems) == len(loaded.problems)


# -- rows --------------------------------------------------------------------------------------------------------------


def row(**changes) -> AnswerRow:
    values = {
        "set": "a", "step": 0, "problem_id": "1", "sample": 0, "reference": "2", "answer": "2", "correct": True,
        "category": "correct", "length": 3, "finish_reason": "stop", "text": "caf\u00e9 \u2028\n\\boxed{2}", "problems": 2,
        "samples": 2, "tokens": 10, "settings": "f00",
    }  # fmt: skip
    return AnswerRow(**(values | changes))


def rows(step: int, correct: list[list[bool]], **changes) -> list[AnswerRow]:
    shape = {"problems": len(correct), "samples": len(correct[0]), "step": step}
    return [
        row(problem_id=f"p{problem}", sample=sample, correct=value, **(shape | changes))
        for problem, values in enumerate(correct)
        for sample, value in enumerate(values)
    ]


def test_rows_come_back_as_written_and_a_cut_line_is_repaired(tmp_path):
    file = EvaluationFile(tmp_path / "run" / "evaluation.jsonl")
    file.repair()
    assert list(file.rows()) == []
    written = [row(), row(sample=1, answer=None, correct=False, category="no_answer")]
    file.append(written[:1])
    whole = file.path.read_bytes()
    file.append(written[1:])
    assert list(file.rows()) == written
    for cut in range(1, 40):
        file.path.write_bytes(whole + file.path.read_bytes()[len(whole) :][:-cut])
        file.repair()
        assert file.path.read_bytes() == whole
        file.append(written[1:])
    assert list(file.rows()) == written


def test_lines_go_aside_and_come_back_as_they_were_and_a_kill_in_between_loses_none(tmp_path):
    file = EvaluationFile(tmp_path / "evaluation.jsonl")
    assert file.set_aside(lambda row: False) == []
    file.take_back(lambda row: True)
    assert not list(tmp_path.iterdir())
    written = [row(step=step, sample=sample, weights=f"w{step}") for step in (0, 5, 7) for sample in (0, 1)]
    file.append(written)
    lines = file.path.read_bytes().splitlines(keepends=True)
    assert file.set_aside(lambda row: row.step < 5) == [5, 7]
    assert list(file.rows()) == written[:2] and list(file.rows(aside=True)) == written
    file.take_back(lambda row: row.weights == "w5")
    assert file.path.read_bytes().splitlines(keepends=True) == lines[:4]
    with file.aside.open("ab") as torn:
        torn.write(lines[0][:9])
    file.repair()
    file.take_back(lambda row: True)
    assert file.path.read_bytes().splitlines(keepends=True) == lines and not file.aside.exists()


def test_a_full_disk_where_lines_go_aside_leaves_them_where_they_are(tmp_path, file_limit, capsys):
    file = EvaluationFile(tmp_path / "evaluation.jsonl")
    file.append([row(step=step) for step in range(3)])
    before = file.path.read_bytes()
    file_limit(len(before) // 2)
    with pytest.raises(InputError, match=r"evaluation\.jsonl could not be moved to .*aside: \[Errno 27\]"):
        file.set_aside(lambda row: row.step < 1)
    file_limit(None)
    assert file.path.read_bytes() == before and {path.name for path in tmp_path.iterdir()} <= {
        "evaluation.jsonl",
        "evaluation.jsonl.aside",
    }


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps(asdict(row())) + "\n{broken\n")
    with pytest.raises(InputError, match=r"evaluation\.jsonl:2"):
        list(EvaluationFile(path).rows())
    path.write_text('{"set": "a"}\n')
    with pytest.raises(InputError, match=r"evaluation\.jsonl:1: not a line"):
        list(EvaluationFile(path).rows())


def test_only_complete_evaluations_count_and_doubled_lines_once():
    whole = rows(0, [[True, False], [True, True]])
    half = rows(5, [[True, False], [True, True]])[:3]
    found = past_evaluations([*whole, *half, *half, *whole[:2]])
    assert [(past.set, past.step, past.accuracy) for past in found] == [("a", 0, {"p0": 0.5, "p1": 1.0})]
    assert found[0].mean == 0.75


def test_repeated_problems_are_compared_as_one_and_older_files_are_read(tmp_path):
    repeated = [
        row(problem_id=f"p{n}", group="p0", sample=n % 2, correct=n == 0, problems=2) for n in (0, 1) for _ in (0, 1)
    ]
    repeated = [replace(line, sample=sample) for line, sample in zip(repeated, (0, 1, 0, 1), strict=True)]
    assert past_evaluations(repeated)[0].accuracy == {"p0": 0.5}
    values = asdict(row())
    del values["group"]
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps(values) + "\n")
    assert [line.group for line in EvaluationFile(path).rows()] == [""]


def test_votes_join_equal_answers_and_right_ones():
    right, same = row(), row(answer="1/1", correct=True)
    wrong, equal, none = (row(answer=a, correct=False) for a in ("3", "03.0", None))
    assert right.vote == same.vote != wrong.vote == equal.vote
    assert none.vote == 0


def test_cut_responses_and_open_boxes_are_truncated():
    assert not row().truncated
    assert row(finish_reason="length").truncated and row(category="truncated").truncated


def test_the_fingerprint_follows_what_changes_samples(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"id": 1, "problem": "1", "answer": "2"}', '{"id": 2, "problem": "2", "answer": "2"}'
    )
    problems = load(path)[0]
    settings = AnswerSettings(samples=4, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8, seed=0, rows=16)
    first = settings.fingerprint(problems)
    assert replace(settings, rows=3).fingerprint(problems) == first
    assert replace(settings, temperature=0.5).fingerprint(problems) != first
    assert replace(settings, seed=1).fingerprint(problems) != first
    assert settings.fingerprint(load(path, suffix=" a")[0]) != first


# -- comparisons -------------------------------------------------------------------------------------------------------


def past(step: int, **accuracy: float) -> PastEvaluation:
    return PastEvaluation("a", step, "f00", tokens=100 * step, accuracy=accuracy)


def test_the_target_is_reached_at_the_first_step_that_has_it():
    history = [past(10, p=0.9), past(0, p=0.1), past(5, p=0.5), past(7, p=0.4)]
    found = reached(history, 0.5)
    assert found is not None and (found.step, found.tokens) == (5, 500)
    assert reached(history, 0.95) is None


def test_flips_are_the_largest_changes_the_harder_problem_first():
    start = past(0, easy=0.5, hard=0.0, same=0.3, lost=1.0, little=0.2)
    now = past(5, easy=1.0, hard=0.5, same=0.3, lost=0.25, little=0.3)
    found = flips(start, now, most=3)
    assert [flip.problem_id for flip in found] == ["lost", "hard", "easy"]
    assert found[0].change == -0.75


def test_another_runs_folder_is_compared_by_problem(tmp_path):
    theirs = rows(5, [[False, False], [True, True]])
    EvaluationFile(tmp_path / "evaluation.jsonl").append(theirs)
    other = read_comparison(str(tmp_path), ["a"])
    ours = Comparison.of(past_evaluations(rows(5, [[True, False], [True, True]]))).at("a", 5)
    assert ours is not None
    assert difference("delta_run", ours, other.at("a", 5), seed=0)["delta_run"] == 0.25
    assert difference("delta_run", ours, other.at("a", 6), seed=0) == {}
    with pytest.raises(InputError, match="compare_to.*one of b, got .* with a"):
        read_comparison(str(tmp_path), ["b"])
    with pytest.raises(InputError, match="compare_to"):
        read_comparison(str(tmp_path / "nowhere"), ["a"])
