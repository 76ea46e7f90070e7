"""Responses stopped by their prefix ratio against whole ones, scored by the models' own forwards and cut in a slow loop."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lit_opd.advantage import RewardExtrapolation
from lit_opd.errors import InputError
from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence
from lit_opd.preflight.module_checks import check_before, check_rollout_stop
from lit_opd.rollout import DecodeSampler, LengthBudget, RatioStop, Sampler, TransformersSampler, VLLMSampler
from lit_opd.rollout.ratio_stop import RatioWatch
from lit_opd.teacher import LocalTeacher, RemoteTeacher, RoutedTeacher
from lit_opd.types import FinishReason, Rollout, TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.fire import FiRe
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, tiny
from tests.rollout.test_decode import MODELS, Watched, flat, policy_of, prompts, settings

LONGEST = 12
THRESHOLD = 0.3
CHUNK = 3
PROMPTS = fixed.rollout(lengths=[1] * 8, prompt_lengths=[4, 2, 6, 1, 5, 3, 2, 4], truncated=set()).prompts
STOP, LENGTH, BUDGET, DRIFT, *_ = (int(reason) for reason in FinishReason)
ours = DecodeSampler(max_new_tokens=LONGEST)


def of_another_mind() -> Any:
    """A model that disagrees with those of ``MODELS``."""
    return policy_of(flat(tiny.qwen3(seed=5))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student() -> Any:
    return policy_of(MODELS["qwen3"]())


@pytest.fixture(scope="module")
def judge() -> Any:
    return of_another_mind()


def cuts(whole: Rollout, student: Any, judge: Any, *, threshold: float, temperature: float = 1.0) -> list[int | None]:
    """Of each row of ``whole`` the tokens up to the collapse, None without one; token by token."""
    with torch.no_grad():
        s = student(whole, temperature=temperature).logprobs.tolist()
        q = judge(whole, temperature=temperature, own_template=True).logprobs.tolist()
    found: list[int | None] = []
    for row, length in enumerate(whole.lengths.tolist()):
        total, cut = 0.0, None
        for t in range(length):
            total += q[row][t] - s[row][t]
            if cut is None and total <= math.log(threshold):
                cut = t + 1
        found.append(cut)
    return found


def require_cut(stopped: Rollout, whole: Rollout, at: list[int | None]) -> None:
    """``stopped`` is ``whole`` cut there, in tokens, lengths, log-probs and reasons."""
    for row, cut in enumerate(at):
        length = int(whole.lengths[row]) if cut is None else cut
        assert int(stopped.lengths[row]) == length
        assert stopped.mask[row].tolist() == [t < length for t in range(stopped.mask.shape[1])]
        assert stopped.response_ids[row, :length].tolist() == whole.response_ids[row, :length].tolist()
        assert not stopped.response_ids[row, length:].any()
        torch.testing.assert_close(stopped.sampler_logprobs[row, :length], whole.sampler_logprobs[row, :length])
        ended = bool(whole.finished[row]) and length == int(whole.lengths[row])
        reason = DRIFT if cut is not None and not ended else int(whole.finish_reason[row])
        assert int(stopped.finish_reason[row]) == reason


def drawn(whole: Rollout, at: list[int | None], *, chunk: int) -> list[int]:
    """Tokens sampled a row: to its end, or to the first look behind a collapse."""
    found = []
    for length, cut in zip(whole.lengths.tolist(), at, strict=True):
        look = length if cut is None else next(n for n in range(chunk, LONGEST + chunk + 1, chunk) if n >= cut)
        found.append(min(length, look))
    return found


BATCHES = {
    "ragged": lambda: prompts(16),
    "no padding": lambda: prompts(16, ragged=False),
    "samples of a prompt": lambda: prompts(5, repeat=4),
}


@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
@pytest.mark.parametrize("batch", sorted(BATCHES))
def test_stopped_responses_are_the_whole_ones_cut_at_the_collapse(student, judge, batch, chunk):
    rows = BATCHES[batch]()
    whole = ours.sample(student, rows, settings())
    stop = RatioStop(THRESHOLD, chunk=chunk)
    stopped = ours.sample(student, rows, settings(stop=stop.watching(judge)))
    at = cuts(whole, student, judge, threshold=THRESHOLD)
    require_cut(stopped, whole, at)
    assert stopped.num_drawn.tolist() == drawn(whole, at, chunk=chunk)
    assert {STOP, DRIFT} <= set(stopped.finish_reason.tolist())
    assert (stopped.lengths == whole.lengths).sum() > 3 and (stopped.lengths < whole.lengths).sum() > 3
    scores = judge(stopped).logprobs
    torch.testing.assert_close(
        stopped.teacher_logprobs, scores, rtol=0, atol=1e-10 if scores.dtype.itemsize == 8 else 1e-5
    )
    assert stopped.mask.shape[1] <= math.ceil(int(stopped.lengths.max()) / chunk) * chunk  # no step was run beyond


@pytest.mark.parametrize("name", sorted(MODELS))
def test_teachers_of_every_architecture_read_along(name):
    """Tied, biased, soft-capped, scaled (without a plain head), eager, learned positions; the temperature is the sampler's."""
    with pytest.warns(match="full logits") if name == "scaled" else nullcontext():
        judge = policy_of(MODELS[name]()).eval().requires_grad_(False)
    student = of_another_mind()  # than all of these
    wanted = {"temperature": 1.3}
    whole = ours.sample(student, prompts(16), settings(**wanted))
    stopped = ours.sample(student, prompts(16), settings(**wanted, stop=RatioStop(0.5, chunk=3).watching(judge)))
    at = cuts(whole, student, judge, threshold=0.5, temperature=1.3)
    require_cut(stopped, whole, at)
    assert 0 < sum(cut is not None for cut in at)


def test_a_teacher_with_a_template_of_its_own_reads_that(student, judge):
    rows = prompts(12)
    other = prompts(12).ids.flip(0).repeat(1, 2)
    mask = torch.arange(12) >= torch.arange(12).unsqueeze(-1) % 5
    own = replace(rows, teacher_ids=other, teacher_mask=mask)
    whole = ours.sample(student, own, settings())
    at = cuts(whole, student, judge, threshold=THRESHOLD)
    assert at != cuts(ours.sample(student, rows, settings()), student, judge, threshold=THRESHOLD)
    stopped = ours.sample(student, own, settings(stop=RatioStop(THRESHOLD, chunk=3).watching(judge)))
    require_cut(stopped, whole, at)


def test_a_threshold_that_no_row_reaches_changes_nothing(student, judge):
    whole = ours.sample(student, prompts(16), settings())
    stopped = ours.sample(student, prompts(16), settings(stop=RatioStop(1e-300).watching(judge)))
    require_cut(stopped, whole, [None] * 16)
    assert torch.equal(stopped.num_drawn, whole.lengths) and torch.equal(whole.num_drawn, whole.lengths)


def test_tokens_drawn_follow_their_rows(student, judge):
    stopped = ours.sample(student, prompts(16), settings(stop=RatioStop(THRESHOLD, chunk=3).watching(judge)))
    index = torch.tensor([11, 0, 7, 11])
    assert stopped.rows(index).trimmed().num_drawn.tolist() == stopped.num_drawn[index].tolist()
    assert (stopped.num_drawn > stopped.lengths).any()
    with pytest.raises(InputError, match=r"Rollout.drawn.*shape \(16,\)"):
        replace(stopped, drawn=stopped.num_drawn[1:])


def test_a_rows_response_depends_on_its_key_only(student, judge):
    """Alone, or among others that are stopped elsewhere."""
    stop = RatioStop(THRESHOLD, chunk=3).watching(judge)
    whole = ours.sample(student, prompts(16), settings(stop=stop))
    for index in (torch.tensor([11]), torch.tensor([7, 3, 2])):
        part = ours.sample(student, prompts(16).rows(index), settings(stop=stop)).trimmed()
        columns = part.mask.shape[1]
        assert torch.equal(part.response_ids, whole.response_ids[index][:, :columns])
        assert torch.equal(part.finish_reason, whole.finish_reason[index])


@pytest.mark.parametrize("chunk", [1, 3])
def test_stopped_rows_leave_the_batch(student, judge, chunk):
    """At every look: both models run, behind it, just the rows that are left, counted from the lengths."""
    wanted = settings(stop=RatioStop(THRESHOLD, chunk=chunk).watching(judge))
    with Watched(student) as steps, Watched(judge) as chunks:
        lengths = ours.sample(student, prompts(16), wanted).lengths
    looks = range(0, int(lengths.max()), chunk)
    assert chunks == [(16, 6), *[(int((lengths > look).sum()) if look else 16, chunk) for look in looks]]
    runs = range(1, min(len(looks) * chunk, LONGEST - 1) + 1)
    alive = [int((lengths > (step - step % chunk)).sum()) if step >= chunk else 16 for step in runs]
    assert [rows for rows, _ in steps[1:]] == [rows for rows in alive if rows]
    assert alive[-1] < 8


# -- in the module -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny.qwen3(seed=1), tiny.qwen3(seed=2)
    for model in (student, teacher):
        with torch.no_grad():
            model.lm_head.weight.mul_(0.2)  # flat enough that rows end at different places
    return tiny.save(student, folder / "student"), tiny.save(teacher, folder / "teacher")


def module(folders, *, dtype: str = "float64", **settings: Any) -> OPDModule:
    defaults: dict[str, Any] = {
        "sampler": DecodeSampler(max_new_tokens=LONGEST),
        "weighting": Uniform(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "gradient_clip_norm": None,
        "seed": 3,
    }
    student, teacher = StudentSettings(folders[0], dtype=dtype), LocalTeacher(folders[1], dtype=dtype)
    return OPDModule(**({"student": student, "teacher": teacher} | defaults | settings))


def one_step(folders, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], OPDModule]:
    """Record, gradient and module of one step."""
    trained, start = module(folders, **settings), fixed.StartWeights()
    collect = fixed.fit(trained, PROMPTS, watch=start)
    after = fixed.weights(trained)
    return collect.records[0], {name: start.weights[name] - value for name, value in after.items()}, trained


@pytest.mark.parametrize("truncated", ["keep", "mask", "drop"])
def test_training_responses_stop_whatever_becomes_of_truncated_ones(folders, truncated):
    """Cut where the step's own signal says; the gradient is that of the cut responses given from outside."""
    whole = one_step(folders)[0]
    ratio = torch.where(whole.rollout.mask, whole.signal.log_ratio, 0.0).cumsum(-1)
    below = (ratio <= math.log(THRESHOLD)) & whole.rollout.mask
    at = [int(row.int().argmax()) + 1 if row.any() else None for row in below]
    record, gradient, _ = one_step(folders, rollout_stop=RatioStop(THRESHOLD, chunk=3), truncated=truncated)
    reasons = record.finish_reason.tolist()
    assert DRIFT in reasons and LENGTH in reasons
    kept = torch.tensor([row for row, reason in enumerate(reasons) if reason != LENGTH or truncated != "drop"])
    stopped = record.rollout
    if truncated == "mask":
        assert not stopped.mask[torch.tensor(reasons) == LENGTH].any()
    else:
        require_cut(stopped, whole.rollout.rows(kept), [at[row] for row in kept.tolist()])
    assert record.response_tokens == sum(
        int(n) if cut is None else cut for n, cut in zip(whole.rollout.lengths, at, strict=True)
    )
    assert record.sampled_tokens == sum(drawn(whole.rollout, at, chunk=3)) > record.response_tokens
    again = module(folders, sampler=fixed.FixedSampler(stopped, max_new_tokens=LONGEST))
    assert fixed.relative_gap(gradient, fixed.gradient(again, stopped.prompts)[1]) < 1e-9


class UntilCollapse(WeightingStrategy):
    """Weight 0 where ``RatioStop`` leaves nothing."""

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """1 up to and with the first token at which the ratio is down, one after the other."""
        found = torch.zeros_like(signal.log_ratio)
        for row in range(len(found)):
            total, collapsed = 0.0, False
            for t in range(int(signal.mask[row].sum())):
                found[row, t] = float(not collapsed)
                total += float(signal.log_ratio[row, t])
                collapsed = collapsed or total <= math.log(THRESHOLD)
        return found


def test_not_generated_equals_weight_zero_where_nothing_divides_by_what_is_generated(folders):
    """Under ``constant``; under ``sequence-mean`` rows that were stopped early gain."""

    def gap(aggregation: str) -> float:
        stopped = one_step(folders, rollout_stop=RatioStop(THRESHOLD), aggregation=aggregation)[1]
        return fixed.relative_gap(stopped, one_step(folders, weighting=UntilCollapse(), aggregation=aggregation)[1])

    assert gap("constant") < 1e-9
    assert gap("sequence-mean") > 0.01


class Counted(LocalTeacher):
    """Counts the scoring passes."""

    passes = 0

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """As ever."""
        self.passes += 1
        return super().score(*args, **kwargs)


REUSED = [("float64", ImportanceWeighting()), ("float32", Uniform())]
REUSED += [
    pytest.param(*each, marks=pytest.mark.slow) for each in (("float64", Uniform()), ("float32", ImportanceWeighting()))
]


@pytest.mark.parametrize(("dtype", "weighting"), REUSED)
def test_log_probs_of_sampling_serve_as_the_scoring_pass(folders, monkeypatch, weighting, dtype):
    """The teacher runs once a token, and signal and gradient are those of a pass of its own; micro-batches cut both alike."""
    run = {"weighting": weighting, "dtype": dtype, "token_budget": 40, "truncated": "drop"}
    run |= {"rollout_stop": RatioStop(THRESHOLD, chunk=3)}
    reused, gradient, once = one_step(folders, teacher=Counted(folders[1], dtype=dtype), **run)
    cut = RatioWatch.cut
    monkeypatch.setattr(RatioWatch, "cut", lambda *args, **kwargs: replace(cut(*args, **kwargs), teacher_logprobs=None))
    scored, expected, twice = one_step(folders, teacher=Counted(folders[1], dtype=dtype), **run)
    assert once.teacher.passes == 0 and twice.teacher.passes > 1
    assert reused.rollout.teacher_logprobs is None  # a replay of the record, maybe by another teacher, scores anew
    assert torch.equal(reused.rollout.response_ids, scored.rollout.response_ids)
    torch.testing.assert_close(reused.signal.teacher_logprobs, scored.signal.teacher_logprobs, rtol=0, atol=1e-6)
    assert fixed.relative_gap(gradient, expected) < (1e-9 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize(
    "reads", [{"weighting": FiRe()}, {"objective": Divergence("reverse_kl")}], ids=["entropy", "distribution"]
)
def test_a_run_that_reads_more_of_the_teacher_scores_as_ever(folders, reads):
    run = {"rollout_stop": RatioStop(THRESHOLD, chunk=3)} | reads
    record, gradient, trained = one_step(folders, teacher=Counted(folders[1], dtype="float64"), **run)
    assert trained.teacher.passes == 1 and DRIFT in record.finish_reason.tolist()
    again = module(folders, sampler=fixed.FixedSampler(record.rollout, max_new_tokens=LONGEST), **reads)
    assert fixed.relative_gap(gradient, fixed.gradient(again, record.rollout.prompts)[1]) < 1e-9


def test_a_reference_model_still_scores(folders):
    """Only the teacher's log-probs are known from sampling."""
    run = {"advantage": [RewardExtrapolation(1.5)], "reference": LocalTeacher(folders[0], dtype="float64")}
    record = one_step(folders, rollout_stop=RatioStop(THRESHOLD), **run)[0]
    torch.testing.assert_close(record.signal.reference_logprobs, record.signal.student_logprobs)


def test_stop_and_length_budget_together(folders):
    whole = one_step(folders, rollout_stop=RatioStop(THRESHOLD, chunk=4))[0]
    both = one_step(folders, rollout_stop=RatioStop(THRESHOLD, chunk=4), length_budget=LengthBudget(5))[0]
    assert torch.equal(both.rollout.lengths, whole.rollout.lengths.clamp(max=5))
    for row, (length, reason) in enumerate(zip(whole.rollout.lengths, whole.finish_reason, strict=True)):
        assert both.finish_reason[row] == (reason if length <= 5 else BUDGET)
    assert {BUDGET, DRIFT} <= set(both.finish_reason.tolist())


def test_what_is_logged(folders):
    """Rows stopped, what they hold, what was sampled for it, and the slots that they left, counted from the record."""
    logged: dict[str, float] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    trained = module(folders, rollout_stop=RatioStop(THRESHOLD, chunk=CHUNK), truncated="keep")
    record = fixed.fit(trained, PROMPTS, watch=Look()).records[0]
    drifted = record.rollout.finish_reason == DRIFT
    assert logged["train/stopped_fraction"] == pytest.approx(int(drifted.sum()) / len(PROMPTS))
    looks = (record.rollout.lengths[drifted] / CHUNK).ceil() * CHUNK  # no row ended between its collapse and the look
    assert logged["train/tokens_saved_at_most"] == int((LONGEST - looks.clamp(max=LONGEST)).sum()) > 0
    kept = int(record.rollout.lengths.sum())
    assert logged["train/tokens"] == kept + int((looks.clamp(max=LONGEST) - record.rollout.lengths[drifted]).sum())
    assert logged["train/tokens"] > kept == round(logged["train/response_length"] * len(PROMPTS))


def test_evaluation_and_prediction_are_never_stopped(folders, monkeypatch):
    """Validation runs the watch not once and gives the numbers of a run without a stop; so does ``generate``."""

    def found(**changes: Any) -> tuple[Any, Rollout, Rollout]:
        trained = module(folders, **changes)
        answers = replace(PROMPTS, answers=("1",) * len(PROMPTS))
        run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        values = run.validate(trained, DataLoader([answers], batch_size=None), verbose=False)
        return values, trained.generate(PROMPTS), trained.generate(PROMPTS, trained.sampling_settings(greedy=True))

    plain = found()
    monkeypatch.setattr(RatioWatch, "__init__", None)  # whoever makes one fails
    stopped = found(rollout_stop=RatioStop(0.99, chunk=1))
    assert stopped[0] == plain[0] and "val/greedy_accuracy" in plain[0][0]
    for ours, theirs in zip(stopped[1:], plain[1:], strict=True):
        assert torch.equal(ours.response_ids, theirs.response_ids) and torch.equal(ours.mask, theirs.mask)


def test_a_teacher_that_is_no_number_costs_the_step_and_stops_nothing(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the rows of a skipped step are saved there

    class Broken(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.teacher.policy.causal_lm.lm_head.weight.data.fill_(math.nan)

    trained = module(folders, rollout_stop=RatioStop(THRESHOLD))
    record = fixed.fit(trained, PROMPTS, watch=Broken()).records[0]
    assert record.skipped and DRIFT not in record.finish_reason.tolist()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, r"threshold.*\(0, 1\).*0.0"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": math.nan}, "threshold.*nan"),
        ({"chunk": 0}, "chunk.*>= 1.*0"),
    ],
)
def test_values_outside_their_range(arguments, message):
    with pytest.raises(InputError, match=message):
        RatioStop(**arguments)


SAMPLERS: dict[str, tuple[Sampler, str]] = {
    "sampler": (TransformersSampler(max_new_tokens=LONGEST), "TransformersSampler.*DecodeSampler"),
    "top-p": (DecodeSampler(max_new_tokens=LONGEST, top_p=0.9), "top_p` 0.9.*use 1.0"),
    "top-k": (DecodeSampler(max_new_tokens=LONGEST, top_k=5), "top_k` 5.*use 1.0 and 0"),
}


@pytest.mark.parametrize("case", sorted(SAMPLERS))
def test_samplers_that_cannot_stop_are_refused_before_weights_load(folders, case):
    sampler, message = SAMPLERS[case]
    trained = module(folders, rollout_stop=RatioStop(), sampler=sampler)
    with pytest.raises(InputError, match=f"`model.rollout_stop` must be null.*{message}"):
        fixed.fit(trained, PROMPTS)
    assert trained.student is None


def test_a_sampler_that_cannot_stop_says_so_when_asked_directly(student, judge):
    asked = settings(stop=RatioStop(THRESHOLD).watching(judge))
    for sampler in (TransformersSampler(max_new_tokens=4), VLLMSampler(urls=["http://localhost:1"], max_new_tokens=4)):
        with pytest.raises(InputError, match=r"`SamplingSettings.stop` must be None for \w+Sampler"):
            sampler.sample(student, prompts(2), asked)


def test_teachers_that_cannot_read_along_are_refused(folders):
    remote = RemoteTeacher(["http://127.0.0.1:9"], tokenizer_path=folders[1])
    for teacher in (remote, RoutedTeacher({"a": LocalTeacher(folders[1])})):
        trained = module(folders, rollout_stop=RatioStop(), teacher=teacher)
        with pytest.raises(InputError, match=f"rollout_stop` must be null.*{type(teacher).__name__}.*LocalTeacher"):
            check_rollout_stop(trained, sharded=False)


def test_sharded_weights_are_refused(folders):
    trained = module(folders, rollout_stop=RatioStop())
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, strategy=strategy, logger=False
    )  # not fitted: a process group would stay
    with pytest.raises(InputError, match=r"rollout_stop` must be null.*sharded weights.*ddp"):
        check_before(trained, trainer, None)


def test_a_teacher_with_sliding_windows_is_refused(folders, tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": ["full_attention", "sliding_attention"]}))
    trained = module(folders, rollout_stop=RatioStop(), teacher=LocalTeacher(folder))
    with pytest.raises(
        InputError, match=r"rollout_stop` must be null.*Qwen3Config with layers of kind sliding_attention"
    ):
        fixed.fit(trained, PROMPTS)
