"""Runs whose every logged number can be known: scripted responses, graded by hand, through the real module and Trainer.

Both what is run on one process and on two and what ``metric_truth`` computes slowly start from here.
"""

from __future__ import annotations

import csv
import json
import math
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from tokenizers import decoders
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from callbacks import PositionProfile, Summary, Throughput
from lit_opd.advantage import Clip
from lit_opd.evaluation import VALIDATION_DOMAIN, ValidationSettings
from lit_opd.module import OPDModule
from lit_opd.objective import PolicyLoss
from lit_opd.rollout import LengthBudget, Sampler
from lit_opd.rollout.base import Seconds
from lit_opd.run.csv_logger import RunCSVLogger
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout, TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import fixed, tiny

TEMPERATURE, SLOTS = 0.8, 24
CLIP, DUAL, CAP, BOUND = 0.05, 1.1, 3.0, 0.5  # of ratio, loss, importance and gradient norm
RATE, DECAY = 0.05, 0.9  # learning rate, and its factor at every optimizer step
UPDATES = 2  # optimizer steps a batch
A_CLIP = 2.0  # nats, of the advantage
BUDGET = LengthBudget(start=6, end=13)
TOKEN_BUDGET = 40  # several micro-batches
SLEEPS = {"sampling": 0.01, "scoring": 0.1, "updating": 0.02}  # seconds in each phase
ENGINE = {"weights": 0.002, "engine_start": 0.004, "engine_sleep": 0.001, "engine_wake": 0.003}  # seconds of a sampling
LETTERS = tiny.LETTERS + "\\{}#"
STOP, CUT, SHORT, DRIFT, *_ = FinishReason
HUGE = 2**24 + 1  # the first whole number that float32 lacks

# -- the responses that are trained on ---------------------------------------------------------------------------------

RANK_ROWS = {1: [[0, 1, 2, 3, 4, 5, 6, 7]], 2: [[0, 2, 4, 6, 7], [1, 3, 5]]}  # rows of each rank, by number of ranks
PROMPTS = [4, 6, 3, 8, 5, 2, 7, 3]
BATCHES: list[list[tuple[int, FinishReason, int]]] = [  # tokens of a row, how it ended, tokens that were cut off again
    [(5, STOP, 0), (1, STOP, 0), (12, CUT, 0), (7, SHORT, 0), (3, DRIFT, 2), (9, CUT, 0), (2, STOP, 0), (11, STOP, 0)],
    [(3, STOP, 0), (8, CUT, 0), (4, STOP, 0), (6, STOP, 0), (6, SHORT, 0), (10, DRIFT, 5), (1, CUT, 0), (7, DRIFT, 0)],
    [(6, CUT, 0), (12, CUT, 0), (2, STOP, 0), (5, CUT, 0), (9, SHORT, 0), (7, CUT, 0), (4, STOP, 0), (3, STOP, 0)],
]


def batch(number: int) -> Rollout:
    """A rollout of ``BATCHES``: [B, T] float64, sampler log-probs of noise, so that some importance weights reach the cap."""
    rows = BATCHES[number]
    lengths = [length for length, _, _ in rows]
    unfinished = {row for row, (_, reason, _) in enumerate(rows) if reason != STOP}
    plain = fixed.rollout(lengths=lengths, prompt_lengths=PROMPTS, truncated=unfinished, seed=number)
    noise = torch.rand(plain.mask.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return replace(
        plain,
        sampler_logprobs=-8 * noise,
        finish_reason=torch.tensor([int(reason) for _, reason, _ in rows], dtype=torch.int8),
        drawn=torch.tensor([length + cut for length, _, cut in rows]),
    )


def spoilt(rollout: Rollout, row: int) -> Rollout:
    """The sampler says NaN of the last token of a row."""
    logprobs = rollout.sampler_logprobs.clone()
    logprobs[row, int(rollout.lengths[row]) - 1] = float("nan")
    return replace(rollout, sampler_logprobs=logprobs)


# -- the responses that are evaluated ----------------------------------------------------------------------------------

FILLERS = {10, 11}  # rows that only fill a batch: they do not count
GREEDY = -1  # key of the greedy responses; sample j has j
RANK_QUESTIONS = [  # of each validation batch, for the first and for the second rank; samples of all but the last are drawn
    ([0, 1, 2], [3]),  # the second rank's has no answer
    ([4], [5, 6, 10]),
    ([7, 11], [8]),  # no rank has an answer
    ([9], [10]),
]
BATCH_LIMIT = 3
QUESTIONS: list[tuple[str | None, tuple[str, ...]]] = [
    # the answer, and how each response ends (S: by itself, L: at the limit, B: at a budget), whether it is right, and its text:
    # greedy, then four samples
    ("12", (r"S+a \boxed{12}", r"S+\boxed{012}", r"S-\boxed{21}", "L-12", "S+#### 12")),
    ("7", (r"S-\boxed{7} or \boxed{8}", r"S+\boxed{8} or \boxed{7}", r"L-so \boxed{7", r"S-7", r"L+ \boxed{7} and")),
    (None, ("S.abc", r"S.\boxed{1}", "L.abcdefghijklmnopqrst", "S.", "S.12")),
    (None, (r"L.\boxed{12}", "S.a", "B.abcdefgh", "S.abcdefghijk", "S.0")),
    ("40", (r"L-4 \boxed{4}", r"S+x\boxed{40}", r"S+\boxed{40} ", r"S+y\boxed{40}", r"S-\boxed{40}\boxed{4}")),
    ("5", (r"S+\boxed{5}", r"S-five", r"B-abcde", r"S+abcdefgh\boxed{5}", r"L-")),
    ("123", (r"S+\boxed{123}", "L-1", r"S-\boxed{12}3", r"S+\boxed{123}", "S-\\boxed{}")),
    (None, ("S.q", "L.qrstuvwxyz0123", "S.a", "S.a", "S.a")),
    (None, ("S.", "S.0 = 0 + 0 = 0", "L.a", "L.a", "L.a")),
    ("9", (r"S-\boxed{99}", r"S+\boxed{9}", r"S+\boxed{9}", r"S+\boxed{9}", r"S+\boxed{9}")),
    ("3", (r"S+\boxed{3}", r"L+abcdefgh\boxed{3}", r"S+\boxed{3}", r"S+\boxed{3}", r"S+\boxed{3}")),
    (None, ("S.a", "L.abcdefghijklm", "S.a", "S.a", "S.a")),
]
ENDS = {"S": STOP, "L": CUT, "B": SHORT}


def tokenizer() -> Any:
    """One token a character, and the text of tokens without anything between them."""
    built = tiny.tokenizer(LETTERS)
    built.backend_tokenizer.decoder = decoders.Fuse()
    return built


def evaluated(draw: int) -> Rollout:
    """The responses of one draw to all questions, float32 [B, T]; the sampler's log-probs are not looked at."""
    texts = [responses[draw + 1] for _, responses in QUESTIONS]
    place = tokenizer().convert_tokens_to_ids
    ids = [[*map(place, text[2:]), *([1] if text[0] == "S" else [])] or [place("a")] for text in texts]
    columns = max(map(len, ids))
    mask = torch.arange(columns) < torch.tensor([len(row) for row in ids]).unsqueeze(-1)
    padded = torch.tensor([row + [5] * (columns - len(row)) for row in ids])
    reasons = torch.tensor([int(ENDS[text[0]]) for text in texts], dtype=torch.int8)
    return Rollout(questions(), padded, mask, torch.zeros(mask.shape), reasons, Provenance("scripted"))


def questions() -> PromptBatch:
    """All questions, B rows; fillers are not counted."""
    rows = len(QUESTIONS)
    plain = fixed.rollout(
        lengths=[1] * rows, prompt_lengths=[3 + row % 4 for row in range(rows)], truncated=set(), seed=9
    )
    return replace(
        plain.prompts,
        row_keys=torch.arange(500, 500 + rows),
        answers=tuple(answer for answer, _ in QUESTIONS),
        counted=torch.tensor([row not in FILLERS for row in range(rows)]),
    )


# -- the runs ----------------------------------------------------------------------------------------------------------


class Uneven(WeightingStrategy):
    """w_t = 1/2 + 1/i_t + min(|q_t - s_t|, 1); every third token is dropped. Asks for both entropies."""

    @property
    def requires(self) -> frozenset[str]:
        """So that they are profiled."""
        return frozenset({"student_entropy", "teacher_entropy"})

    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """[B, T] in (1/2, 5/2]."""
        return 0.5 + 1.0 / signal.mask.cumsum(-1).clamp(min=1).double() + signal.disagreement.clamp(max=1.0)

    def keep(self, signal: TokenSignal, progress: float) -> Tensor:
        """bool [B, T]."""
        return signal.mask.cumsum(-1) % 3 != 0


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        settings: of the module, beside what all runs share; ``truncated``, ``aggregation``, ``mini_batches`` and ``epochs``.
        weighting: the strategy's name in ``STRATEGIES``.
        batches: numbers of ``BATCHES`` in the order of training.
        bad: the batch, counted from 0, in which the sampler says NaN; None for none.
        samples: validation samples a prompt.
        budgeted: with ``BUDGET`` as the length budget.
        window: optimizer steps of a window of profile and throughput.
    """

    settings: dict[str, Any]
    weighting: str
    batches: tuple[int, ...]
    bad: int | None
    samples: int
    budgeted: bool
    window: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return UPDATES * len(self.batches)

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """What is trained on, batch by batch."""
        found = [batch(number) for number in self.batches]
        return [spoilt(one, row=3) if place == self.bad else one for place, one in enumerate(found)]


STRATEGIES = {"uneven": Uneven, "importance": ImportanceWeighting}
CASES = {
    "kept": Case(
        {"truncated": "keep", "aggregation": "sequence-mean", "mini_batches": 2, "epochs": 1},
        weighting="uneven",
        batches=(0, 1),
        bad=None,
        samples=4,
        budgeted=True,
        window=4,
    ),
    "dropped": Case(  # the last batch leaves nothing on the second of two ranks
        {"truncated": "drop", "aggregation": "constant", "mini_batches": 1, "epochs": 2},
        weighting="importance",
        batches=(0, 1, 2),
        bad=1,
        samples=3,
        budgeted=False,
        window=3,
    ),
}


class Scripted(Sampler):
    """Returns the responses that were written for the optimizer step, or for the draw of a validation.

    It runs the student once, as an engine that reads it does: under FSDP2 every rank must then sample as often as the others.
    """

    max_logprob_gap = math.inf  # written by hand

    def __init__(self, train: list[Rollout], *, in_process: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.in_process = in_process
        self.train, self.evaluated = train, {draw: evaluated(draw) for draw in range(GREEDY, 4)}
        self.calls = 0
        self.seconds = Seconds(*ENGINE)

    def sample(self, model: Any, prompts: PromptBatch, settings: Any) -> Rollout:
        """The rows of the keys that were asked for."""
        if settings.greedy:
            whole = self.evaluated[GREEDY]
        elif settings.domain:
            whole = self.evaluated[settings.domain - VALIDATION_DOMAIN]
        else:
            whole = self.train[settings.step // UPDATES]
        rows = {int(key): row for row, key in enumerate(whole.prompts.row_keys)}
        chosen = whole.rows(torch.tensor([rows[int(key)] for key in prompts.row_keys]))
        for name, seconds in ENGINE.items():  # it is started once, and asleep from then on
            if self.calls == 0 or name != "engine_start":
                with self.seconds(name):
                    time.sleep(seconds)
        self.calls += 1
        with torch.no_grad():
            model.head(chosen)
        version = settings.weights_version - settings.step // UPDATES
        return replace(chosen, prompts=prompts, provenance=replace(chosen.provenance, weights_version=version))


def module(folders: tuple[str, str], case: Case) -> OPDModule:
    """Plain gradient descent under a schedule and a bound on the gradient."""
    return fixed.module(
        folders,
        case.rollouts[0],
        sampler=Scripted(case.rollouts, in_process=not case.budgeted, max_new_tokens=SLOTS, temperature=TEMPERATURE),
        weighting=STRATEGIES[case.weighting](),
        advantage=[Clip(A_CLIP)],
        objective=PolicyLoss(clip=CLIP, dual_clip=DUAL, importance_cap=CAP),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step),
        gradient_clip_norm=BOUND,
        token_budget=TOKEN_BUDGET,
        length_budget=BUDGET if case.budgeted else None,
        validation=ValidationSettings(samples=case.samples, batch_limit=BATCH_LIMIT),
        **case.settings,
    )


# -- what is looked at -------------------------------------------------------------------------------------------------


class Numbers(Logger):
    """Keeps what loggers get, by step; a name twice at a step is an error."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        assert step is not None and not metrics.keys() & self.rows[step].keys(), (step, sorted(metrics))
        self.rows[step] |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class QuickProfile(PositionProfile):
    """Without pictures, which take seconds."""

    def _draw(self, trainer: L.Trainer) -> dict[str, Path]:
        return {}


@dataclass
class Report:
    """What a rank saw of a run, in plain values.

    Args:
        logged: to the loggers, by step.
        told: ``trainer.callback_metrics`` at the end of each batch and validation, by step.
        marks: (name, seconds) of what happened, in order: the start of training, of a batch and of its first backward, the
            ends of phases, batches and validations.
        seconds: ``StepRecord.seconds`` of each batch.
        samplings: calls of the sampler.
        sampled: calls of the sampler up to the end of each batch.
        wall: seconds of the whole run.
        memory: peak resident memory of this process in MiB before and after.
        warnings: everything that was warned of.
        summary: ``summary.json``, on the first rank.
    """

    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    told: dict[int, dict[str, float]] = field(default_factory=dict)
    marks: list[tuple[str, float]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    samplings: int = 0
    sampled: list[int] = field(default_factory=list)
    wall: float = 0.0
    memory: tuple[float, float] = (0.0, 0.0)
    warnings: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None


class Watch(L.Callback):
    """Fills the report; sleeps at the end of every phase, so that each takes a time of its own."""

    def __init__(self) -> None:
        self.report = Report()

    def _mark(self, name: str) -> None:
        self.report.marks.append((name, time.perf_counter()))

    def _tell(self, trainer: L.Trainer) -> None:
        told = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.report.told.setdefault(trainer.global_step, {}).update(told)

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Sleep, and note the phase's end."""
        if name in SLEEPS and (done == total or name == "sampling"):
            time.sleep(SLEEPS[name])
            self._mark(name)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        self._mark("start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note it."""
        self._mark("batch")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note it."""
        self._mark("backward")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note it."""
        self._mark("batch end")
        self.report.seconds.append(dict(outputs["step"].seconds))
        self.report.sampled.append(getattr(pl_module.sampler, "calls", 0))
        self._tell(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        self._mark("validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        self._mark("validation end")
        self._tell(trainer)


def peak_mib() -> float:
    """Of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def kept_warnings(into: list[str]) -> Iterator[None]:
    """Collects every warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    into += [str(one.message) for one in said]


def loaders(case: Case, *, rank: int, ranks: int) -> tuple[DataLoader, DataLoader]:
    """Batches of training and of validation that a rank has."""
    rows = torch.tensor(RANK_ROWS[ranks][rank])
    train = [rollout.prompts.rows(rows) for rollout in case.rollouts]
    parts = [[*first, *second] if ranks == 1 else (first, second)[rank] for first, second in RANK_QUESTIONS]
    val = [questions().rows(torch.tensor(part)) for part in parts]
    return DataLoader(train, batch_size=None), DataLoader(val, batch_size=None)  # type: ignore[arg-type]


def run(folders: tuple[str, str], folder: Path, case: Case, *, rank: int = 0, ranks: int = 1, **trainer: Any) -> Report:
    """Fit in ``folder``; validations before the first step and behind the last."""
    watch, numbers = Watch(), Numbers()
    report = watch.report
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "max_steps": case.steps,
        "default_root_dir": folder,
        "logger": numbers,
        "log_every_n_steps": 1,
        "val_check_interval": len(case.batches) + 1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    }
    callbacks = [watch, QuickProfile(every=case.window), Throughput(every=case.window), Summary()]
    before, start = peak_mib(), time.perf_counter()
    with kept_warnings(report.warnings):
        trained = module(folders, case)
        L.Trainer(**(settings | trainer), callbacks=callbacks).fit(trained, *loaders(case, rank=rank, ranks=ranks))
    report.wall, report.memory = time.perf_counter() - start, (before, peak_mib())
    report.logged, report.samplings = dict(numbers.rows), trained.sampler.calls  # type: ignore[attr-defined]
    report.summary = json.loads((folder / "summary.json").read_text()) if rank == 0 else None
    return report


def counts(
    folders: tuple[str, str], folder: Path, *, rank: int = 0, ranks: int = 1, **trainer: Any
) -> dict[str, float]:
    """The sampled tokens of a batch of more than 2^24, as they reach each who is told. Each row lost all but a few."""
    whole = batch(0)
    huge = replace(
        whole, drawn=torch.full((len(whole),), HUGE), finish_reason=torch.full_like(whole.finish_reason, DRIFT)
    )
    watch, numbers, summary = Watch(), Numbers(), Summary()
    prompts = huge.prompts.rows(torch.tensor(RANK_ROWS[ranks][rank]))
    loggers = [numbers, RunCSVLogger(str(folder))]
    settings = {"default_root_dir": folder, "logger": loggers, "log_every_n_steps": 1, "devices": ranks}
    settings |= {"use_distributed_sampler": False}
    fixed.fit(fixed.module(folders, huge), prompts, watch=[watch, summary], **(settings | trainer))
    name, found = "train/tokens", {}
    if rank == 0:
        (line,) = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        found = {"file": float(line[name]), "summary": json.loads((folder / "summary.json").read_text())["tokens"]}
    return found | {"logger": numbers.rows[1][name], "callbacks": watch.report.told[1][name]}


def pair(folder: Path) -> tuple[str, str]:
    """Student and teacher that can write a box."""
    built = [(name, tiny.qwen3(seed=seed)) for name, seed in (("student", 1), ("teacher", 2))]
    student, teacher = (tiny.save(model, folder / name, with_tokenizer=tokenizer()) for name, model in built)
    return student, teacher


def norms_in_float64() -> tuple[Any, str, Any]:
    """For ``setattr``: transformers' norm rounds to float32 whatever the weights are: a last bit before it is 1e-8 after it."""

    def forward(self: Any, states: Tensor) -> Tensor:
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    return Qwen3RMSNorm, "forward", forward
