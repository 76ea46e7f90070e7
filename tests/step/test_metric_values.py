"""Every logged number against a slow computation, on one process and on two; and no documented name is without one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_opd.evaluation import Evaluator, ValidationSettings
from lit_opd.step.scalars import logged, scalars
from lit_opd.types import FinishReason, Replayed, StepRecord
from tests.callbacks.test_position_profile import record
from tests.helpers import forks, metric_ranks, metric_runs
from tests.helpers import metric_truth as truths
from tests.helpers.metric_runs import CASES, ENGINE, SLEEPS, UPDATES, Case, Report

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240  # seconds; a hang is a failure
PAUSE = 0.05  # seconds that a busy machine may let a process wait between two lines


@pytest.fixture(scope="module", autouse=True)
def norms_in_float64():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*metric_runs.norms_in_float64())
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return metric_runs.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["few", pytest.param("whole", marks=pytest.mark.slow)])
def extent(request: pytest.FixtureRequest) -> str:
    """Of the runs of two ranks: each case and each strategy once, or each case under both."""
    return str(request.param)


@pytest.fixture(scope="module")
def two_processes(folders, extent, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank saw: reports by case and strategy, and "counts"."""
    out = tmp_path_factory.mktemp("ranks")
    forks.succeed("tests.helpers.metric_ranks", str(out), extent, *folders, logs=out, timeout=TIME_LIMIT)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def reports(folders, extent, two_processes, tmp_path_factory) -> dict[tuple[str, str], list[Report]]:
    """Of each run, rank by rank."""
    found = {}
    for name in CASES:
        found[name, "one process"] = [metric_runs.run(folders, tmp_path_factory.mktemp(name), CASES[name])]
    for name, strategy in metric_ranks.RUNS[extent]:
        found[name, strategy] = [Report(**rank[f"{name} {strategy}"]) for rank in two_processes]
    return found


@pytest.fixture(scope="module")
def known(folders) -> dict[tuple[str, int], truths.Truth]:
    """By case and number of processes."""
    return {(name, n): truths.Slow(folders, case, ranks=n).truth() for name, case in CASES.items() for n in (1, 2)}


# -- what a run should log ---------------------------------------------------------------------------------------------


def same(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def windows(case: Case) -> dict[int, range]:
    """The batches of each window by the optimizer step at its end: the first batch's end at or behind each multiple."""
    found, start = {}, 0
    for batch in range(len(case.batches)):
        end = UPDATES * (batch + 1)
        if end // case.window > (end - UPDATES) // case.window:
            found[end], start = range(start, batch + 1), batch + 1
    return found


def steps(case: Case, truth: truths.Truth) -> dict[int, dict[str, float]]:
    table = truths.STEP | (truths.WITH_BUDGET if case.budgeted else {})
    return {step.number: {name: value(step) for name, value in table.items()} for step in truth.steps}


def validations(case: Case, truth: truths.Truth) -> dict[int, dict[str, float]]:
    return {at: {n: value(found) for n, value in truths.VALIDATION.items()} for at, found in truth.validations.items()}


def profiles(case: Case, truth: truths.Truth) -> dict[int, dict[str, float]]:
    """Entropies only where the strategy asks for them; what was skipped is left out."""
    found = {}
    for end, batches in windows(case).items():
        tokens = [token for batch in batches if not truth.steps[batch].skipped for token in truth.steps[batch].tokens]
        found[end] = {
            name: value(tokens)
            for name, value in truths.PROFILE.items()
            if case.weighting == "uneven" or not name.endswith("entropy")
        }
    return found


VALUES = {
    name: expected
    for table, expected in (
        (truths.STEP | truths.WITH_BUDGET, steps),
        (truths.VALIDATION, validations),
        (truths.PROFILE, profiles),
    )
    for name in table
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name, reports, known):
    """On one process and two, at every step at which it should be there and at no other; both ranks say the same."""
    seen = 0
    for (case, world), ranks in reports.items():
        expected = VALUES[name](CASES[case], known[case, len(ranks)])
        wanted = {step: values[name] for step, values in expected.items() if name in values}
        for report in ranks[:1] if name in truths.PROFILE else ranks:  # the first rank logs the profile
            logged = {step: row[name] for step, row in report.logged.items() if name in row}
            assert logged.keys() == wanted.keys(), (case, world)
            for step, value in wanted.items():
                assert same(logged[step], value), (case, world, step, logged[step], value)
        seen += sum(math.isfinite(value) for value in wanted.values())
    assert seen >= 2, "the name was hardly tested"


# -- times -------------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """Of ``Throughput``.

    Args:
        row: what was logged at its end.
        sampled: tokens of all ranks, cut off ones included.
        trained: tokens in the denominators.
        ranks: of each rank, marks from the window's first to the one behind its last batch.
        seconds: of each rank, those of the phases by batch.
        memory: of each rank, peak resident MiB before and after the run.
    """

    row: dict[str, float]
    sampled: int
    trained: int
    ranks: list[list[tuple[str, float]]]
    seconds: list[list[dict[str, float]]]
    memory: list[tuple[float, float]]

    @property
    def wall(self) -> float:
        """Seconds, as the first rate says; ``bounds`` holds it against the marks."""
        return self.sampled / self.row["throughput/sampled_tokens_per_second"]

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds in batches, and seconds from mark to mark less half of those in validations."""
        least, most = [], []
        for marks in self.ranks:
            least.append(between(marks, "batch", "batch end"))
            most.append(marks[-1][1] - marks[0][1] - between(marks, "validation", "validation end") / 2)
        return max(least), max(most)

    def phase(self, name: str) -> float:
        """Seconds on the rank that took longest."""
        return max(math.fsum(batch[name] for batch in batches) for batches in self.seconds)

    def share(self, name: str) -> tuple[float, float]:
        """Of the wall time, exactly."""
        return (self.phase(name) / self.wall,) * 2

    @property
    def other(self) -> tuple[float, float]:
        """What is left; phases that are longest on different ranks may leave nothing."""
        return (max(0.0, 1 - math.fsum(self.share(name)[0] for name in SLEEPS)),) * 2


def between(marks: list[tuple[str, float]], first: str, last: str) -> float:
    """Seconds from each mark ``first`` to the next ``last``, in all."""
    starts, ends = ([at for name, at in marks if name == wanted] for wanted in (first, last))
    return math.fsum(end - start for start, end in zip(starts, ends, strict=True))


THROUGHPUT: dict[str, Callable[[Window], tuple[float, float]]] = {  # least and largest value
    "throughput/sampled_tokens_per_second": lambda w: (w.sampled / w.bounds[1], w.sampled / w.bounds[0]),
    "throughput/trained_tokens_per_second": lambda w: (w.trained / w.wall,) * 2,
    "throughput/share_sampling": lambda w: w.share("sampling"),
    "throughput/share_scoring": lambda w: w.share("scoring"),
    "throughput/share_updating": lambda w: w.share("updating"),
    "throughput/share_other": lambda w: w.other,
    "throughput/peak_memory_mib": lambda w: (max(m[0] for m in w.memory), max(m[1] for m in w.memory)),
}


def throughputs(case: Case, truth: truths.Truth, ranks: list[Report]) -> dict[int, Window]:
    """By the optimizer step at the end."""
    found = {}
    for end, batches in windows(case).items():
        made = [truth.steps[batch] for batch in batches]
        found[end] = Window(
            row=ranks[0].logged[end],
            sampled=sum(length + cut for step in made for length, _, cut in step.rows),
            trained=sum(token.kept for step in made if not step.skipped for token in step.tokens),
            ranks=[in_window(report.marks, batches) for report in ranks],
            seconds=[[report.seconds[batch] for batch in batches] for report in ranks],
            memory=[report.memory for report in ranks],
        )
    return found


def in_window(marks: list[tuple[str, float]], batches: range) -> list[tuple[str, float]]:
    """From the start of training or the end of the batch before, to what comes behind the last batch."""
    ends = [0] + [place for place, (name, _) in enumerate(marks) if name == "batch end"]
    (_, start), *inside, (_, end) = marks[ends[batches.start] : ends[batches.stop] + 2]
    return [("from", start), *inside, ("to", end)]


@pytest.mark.parametrize("name", THROUGHPUT)
def test_throughput(name, reports, known):
    for (case, world), ranks in reports.items():
        found = throughputs(CASES[case], known[case, len(ranks)], ranks)
        for report in ranks:
            assert {step for step, row in report.logged.items() if name in row} == found.keys()
            assert all(report.logged[step][name] == window.row[name] for step, window in found.items())
        for step, window in found.items():
            least, most = THROUGHPUT[name](window)
            value = window.row[name]
            assert least - 1e-9 * abs(least) <= value <= most + 1e-9 * abs(most), (
                case,
                world,
                step,
                least,
                value,
                most,
            )


@dataclass
class Batch:
    """When what happened in a batch; ``seconds`` are what was logged of it."""

    marks: dict[str, float]
    seconds: dict[str, float]

    def took(self, first: str, last: str) -> float:
        """Seconds from mark to mark, 0 where one is missing: a batch that is skipped has no end of its updates."""
        return self.marks[last] - self.marks[first] if last in self.marks else 0.0


TIME: dict[str, Callable[[Batch], tuple[float, float]]] = {  # least and largest value
    "time/sampling": lambda b: (SLEEPS["sampling"], b.took("batch", "scoring")),
    "time/scoring": lambda b: (
        b.took("sampling", "scoring") - b.seconds["sampling"] - PAUSE,
        b.took("sampling", "backward"),
    ),
    "time/updating": lambda b: (b.took("backward", "updating"), b.took("scoring", "batch end")),
}


ENGINE_TIME = {f"time/{name}": seconds for name, seconds in ENGINE.items()}  # of one sampling


@pytest.mark.parametrize("name", TIME)
def test_time(name, reports):
    """Marks inside a phase and around it; each rank logs its own."""
    for (case, world), ranks in reports.items():
        for report in ranks:
            logged = {step: row[name] for step, row in report.logged.items() if name in row}
            phase = name.removeprefix("time/")
            assert list(logged.values()) == [seconds[phase] for seconds in report.seconds]
            for batch in batches(report):
                least, most = TIME[name](batch)
                assert 0 <= least <= batch.seconds[phase] <= most, (case, world, batch)


@pytest.mark.parametrize("name", ENGINE_TIME)
def test_the_seconds_of_an_engine(name, reports):
    """Of all samplings since the step before, those of validations too; the start is in the first step alone."""
    for (case, world), ranks in reports.items():
        for report in ranks:
            logged = [row[name] for row in report.logged.values() if name in row]
            assert len(logged) == len(report.sampled)
            for at, (seconds, until) in enumerate(zip(logged, report.sampled, strict=True)):
                calls = until - (report.sampled[at - 1] if at else 0)
                calls = int(at == 0) if name == "time/engine_start" else calls
                least = calls * ENGINE_TIME[name]
                assert least <= seconds <= least + calls * PAUSE, (case, world, at)


def batches(report: Report) -> list[Batch]:
    """Of a mark that comes again, the first backward and the last of all others; a bad batch is not updated to its end."""
    found: list[Batch] = []
    for name, at in report.marks:
        if name == "batch":
            found.append(Batch({}, report.seconds[len(found)]))
        if found and "batch end" not in found[-1].marks:
            found[-1].marks[name] = found[-1].marks.get(name, at) if name == "backward" else at
    return found


# -- names -------------------------------------------------------------------------------------------------------------


# what a sampler, a teacher or an option of a callback adds; their values are tested with them: rollout/test_replay.py,
# rollout/test_partial.py, teacher/test_aligned_teacher.py, weighting/test_rewards.py, and for lists of likely tokens
# callbacks/test_position_profile.py
OF_OTHER_PARTS = {"train/replay_gap", "train/replayed_fraction", "train/aligned_fraction", "train/reward"}
OF_OTHER_PARTS |= {"train/trained_rows", "train/trained_tokens", "train/older_fraction", "train/older_gap"}
OF_OTHER_PARTS |= {"train/hint_fraction", "train/hint_refused_fraction"}
OF_OTHER_PARTS |= {"train/waiting_rows", "train/waiting_tokens", "train/waiting_steps"}


def documented() -> set[str]:
    """Every name in the first column of a table of docs/metrics.md and, of the profile, of docs/reading-the-plots.md."""
    found = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("| `") else ""
        found |= set(re.findall(r"`(\w+/[\w/]+)`", cell))
        if "`band_90`" in cell:
            found |= {f"val/disagreement/band_{tenth}0" for tenth in range(10)}
    page = (ROOT / "docs" / "reading-the-plots.md").read_text()
    found |= set(re.findall(r"`(profile/\w+/\w+|train/\w+)`", page))
    return {name for name in found if "/list_" not in name} - OF_OTHER_PARTS


def test_every_documented_name_has_a_value_test():
    assert documented() == {*VALUES, *THROUGHPUT, *TIME, *ENGINE_TIME}


def test_every_logged_name_is_documented_and_every_documented_one_is_logged(reports):
    logged = {name for ranks in reports.values() for report in ranks for row in report.logged.values() for name in row}
    assert logged == documented()


def test_callbacks_are_told_what_is_logged(reports):
    for (case, world), ranks in reports.items():
        for report in ranks:
            for step, row in report.logged.items():
                told = {name: value for name, value in row.items() if name.split("/")[0] in ("train", "time", "val")}
                told.pop("train/gradient_scale_proxy", None)  # by a callback, to the loggers only
                found = {name: report.told[step][name] for name in told}
                assert repr(found) == repr(told), (case, world, step)  # a NaN is a NaN


# -- what is left of a run ---------------------------------------------------------------------------------------------


def test_the_summary_holds_the_first_and_the_last_validation_and_sums(reports, known):
    for (name, world), ranks in reports.items():
        case, truth, summary = CASES[name], known[name, len(ranks)], ranks[0].summary
        ends = {"start": truth.validations[0], "end": truth.validations[case.steps]}
        for short, long in (("greedy", "greedy_accuracy"), ("avg_at_4", "avg_at_k"), ("reverse_kl", "reverse_kl")):
            for when, answers in ends.items():
                value = summary[f"{short}_{when}"]
                absent = short == "avg_at_4" and case.samples != 4
                assert value is None if absent else same(value, truths.VALIDATION[f"val/{long}"](answers)), (
                    name,
                    world,
                )
        assert summary["steps"] == case.steps
        assert summary["tokens"] == sum(truths.STEP["train/tokens"](step) for step in truth.steps)
        marks = ranks[0].marks
        assert marks[-1][1] - marks[0][1] - 1e-3 <= summary["seconds"] <= ranks[0].wall


# -- exact counts, and what Lightning says -----------------------------------------------------------------------------


def test_more_tokens_than_float32_counts_are_logged_exactly(folders, two_processes, tmp_path):
    """To loggers, to the file, to callbacks and to the summary; also where two ranks add theirs."""
    exact = len(metric_runs.PROMPTS) * metric_runs.HUGE
    assert float(torch.tensor(float(exact), dtype=torch.float32)) != exact
    one, (first, second) = metric_runs.counts(folders, tmp_path), (rank["counts"] for rank in two_processes)
    assert set(one.values()) == set(first.values()) == set(second.values()) == {exact}
    assert len(one) == len(first) == 4


def test_lightning_advises_nothing_about_what_is_logged_on_two_ranks(reports):
    for ranks in reports.values():
        for report in ranks:
            assert not [line for line in report.warnings if "sync_dist" in line or "self.log(" in line]


def test_a_rank_whose_batch_has_no_answers_samples_as_often_as_the_other(reports):
    """Under FSDP2 every sampling gathers weights: a rank that left one out ended the run with mismatched collectives."""
    answered = [
        [any(metric_runs.QUESTIONS[row][0] is not None for row in rows) for rows in ranks]
        for ranks in metric_runs.RANK_QUESTIONS
    ]
    assert [True, False] in answered and [False, False] in answered
    for (name, _), ranks in reports.items():
        case, greedy = CASES[name], sum(map(any, answered))
        evaluation = greedy + sum(case.samples if any(batch) else 1 for batch in answered[: metric_runs.BATCH_LIMIT])
        assert {report.samplings for report in ranks} == {len(case.batches) + 2 * evaluation}


def test_a_validation_is_logged_from_the_device_of_the_strategy(folders):
    """NCCL reduces nothing that is on the CPU; "meta" stands for a device that is not here."""
    trained = metric_runs.module(folders, CASES["kept"])
    seen: dict[str, Any] = {}
    trained.evaluator.compute = lambda: {"val/reverse_kl": 0.5}  # type: ignore[method-assign]
    trained.log_dict = lambda values, **options: seen.update(values, options=options)  # type: ignore[method-assign]
    strategy = SimpleNamespace(root_device=torch.device("meta"))

    class Stub:
        state, global_step, fit_loop = SimpleNamespace(fn="fit"), 3, None

    stub = Stub()
    stub.strategy = strategy  # type: ignore[attr-defined]
    trained._trainer = stub  # type: ignore[assignment]
    trained.on_validation_epoch_end()
    assert seen.pop("options") == {"sync_dist": True, "reduce_fx": "max"}
    assert {name: (value.device.type, value.dtype) for name, value in seen.items()} == dict.fromkeys(
        ("val/reverse_kl", "step"), ("meta", torch.float64)
    )


# -- holes -------------------------------------------------------------------------------------------------------------


def tokens_of(one: StepRecord) -> list[truths.Token]:
    """Valid tokens of a record, row by row."""
    signal, found = one.signal, []
    for row in range(len(signal)):
        columns = [column for column in range(signal.mask.shape[1]) if signal.mask[row, column]]
        for i, column in enumerate(columns, 1):
            at = (row, column)
            s, q, b, kl = (
                float(getattr(signal, name)[at])
                for name in ("student_logprobs", "teacher_logprobs", "sampler_logprobs", "token_kl")
            )
            token = truths.Token(row, i, len(columns), s, q, b, 0.0, 0.0, kl, finished=True)
            token.weight, token.kept, token.clipped = float(one.weights[at]), bool(one.kept[at]), bool(one.clipped[at])
            found.append(token)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_holes_and_empty_rows_count_nowhere(seed):
    """No sampler leaves holes, but a record may have them: the step's statistics against loops over its valid tokens."""
    one = record(seed)
    tokens = tokens_of(one)
    rows = [(sum(t.row == row for t in tokens), int(one.finish_reason[row]), 0) for row in range(len(one.signal))]
    norm = float(one.grad_norm)
    step = truths.Step(one.step, tokens, rows, [], norm, learning_rate=0.0, budget=None, skipped=False, skipped_steps=0)
    found = {name: float(value) for name, value in scalars(one).items()}
    assert len(found) == 13
    for name, value in found.items():
        assert same(value, truths.STEP[name](step)), name


def test_a_saved_response_that_a_budget_cuts_saves_no_tokens():
    """Nothing would have been generated for it: 100 - n of the rows that were sampled now, n their tokens."""
    one = record(0)
    rows = len(one.rollout)
    old = torch.arange(rows) % 2 == 0
    rollout = replace(
        one.rollout,
        finish_reason=torch.full((rows,), int(FinishReason.BUDGET), dtype=torch.int8),
        drawn=torch.where(old, 0, one.rollout.lengths),
        replayed=Replayed(old, old, torch.zeros(rows, dtype=torch.int64)),
    )
    settings = {"skipped_steps": 0, "learning_rate": 0.0, "max_new_tokens": 100, "length_budget": 50}
    found = logged(
        replace(one, rollout=rollout, finish_reason=rollout.finish_reason),
        loss=torch.zeros(()),
        stops_early=True,
        engine_seconds={},
        **settings,
    )
    wanted = sum(100 - n for n, saved in zip(rollout.lengths.tolist(), old.tolist(), strict=True) if not saved)
    assert float(found["train/tokens_saved_at_most"]) == wanted > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_holes_and_rows_that_do_not_count_are_in_no_validation(seed):
    one = record(seed)
    counted = torch.arange(len(one.signal)) % 4 != 3
    tokens = [token for token in tokens_of(one) if counted[token.row]]
    evaluator = Evaluator(ValidationSettings())
    for part in (slice(0, 2), slice(2, None)):
        rows = torch.arange(len(counted))[part]
        evaluator.add_divergence(one.signal.rows(rows), counted[rows])
    found, answers = evaluator.compute(), [truths.Answer(draw=0, right=None, finished=True, tokens=tokens)]
    assert len(found) == 12
    for name, value in found.items():
        assert same(value, truths.VALIDATION[name](answers)), name
