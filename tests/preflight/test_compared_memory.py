"""What a comparison with the teacher's whole vocabulary holds in each phase: the budget against live tensors of real steps."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config

from lit_opd.advantage import ValueBaseline
from lit_opd.objective import Divergence
from lit_opd.preflight import estimate, read_plan
from lit_opd.preflight.memory import (
    DIVERGENCE_TILES,
    MIXED,
    OFFLOADED,
    STATES,
    TEACHER_HEAD,
    Held,
    Rank,
    Workload,
)
from lit_opd.preflight.plan import GIB, Plan
from lit_opd.preflight.sizes import ModelSize, model_size
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.micro_batches import micro_batches
from lit_opd.step.scores import Scores
from lit_opd.step.update import Update
from lit_opd.teacher import LocalTeacher, MixedTeacher, SelfTeacher, local
from lit_opd.weighting.combinators import BatchMeanOne
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import cases, compared_ranks, fixed, forks, tiny

ROWS, PROMPT, RESPONSE, VOCABULARY = 6, 4, 5, 64
STUDENT, TEACHER = 16, 24  # hidden sizes
FLOAT64 = 8  # bytes
TWO_ROWS = 2 * (PROMPT + RESPONSE)  # a token budget: three micro-batches
MICRO, WHOLE = (rows * RESPONSE * TEACHER * FLOAT64 for rows in (2, ROWS))
PHASES = ("scoring", "head", "layers", "optimizer")
CPU = read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=1.0)
GPU = replace(CPU, accelerator="gpu")
EVEN = fixed.rollout(lengths=[RESPONSE] * ROWS, prompt_lengths=[PROMPT] * ROWS, truncated=set())
DATA: Any = SimpleNamespace(
    prompt_batch=ROWS, samples_per_prompt=1, longest_prompt=PROMPT, val=None, val_fraction=0.0, val_batch=1
)

CASES = {
    "divergence": {"objective": Divergence("reverse_kl")},
    "divergence at once": {"objective": Divergence("reverse_kl"), "token_budget": None},
    "two epochs": {"objective": Divergence("jsd"), "epochs": 2},
    "mini-batches": {"objective": Divergence("forward_kl"), "mini_batches": 3},
    "baseline": {"advantage": [ValueBaseline()]},
    "baseline, scored before": {"advantage": [ValueBaseline()], "weighting": BatchMeanOne(ImportanceWeighting())},
    "baseline, mini-batches": {"advantage": [ValueBaseline()], "mini_batches": 3},
    "both": {
        "objective": Divergence("reverse_kl"),
        "advantage": [ValueBaseline()],
        "weighting": BatchMeanOne(ImportanceWeighting()),
    },
    "neither": {},
}
EXPECTED = {  # bytes in scoring, head, layers and optimizer
    "divergence": (WHOLE, WHOLE, WHOLE, 0),
    "divergence at once": (WHOLE, WHOLE, WHOLE, 0),
    "two epochs": (WHOLE, WHOLE, WHOLE, WHOLE),
    "mini-batches": (0, MICRO, MICRO, 0),
    "baseline": (WHOLE, WHOLE, WHOLE - MICRO, 0),
    "baseline, scored before": (WHOLE, 0, 0, 0),
    "baseline, mini-batches": (WHOLE, 0, 0, 0),
    "both": (WHOLE, WHOLE, WHOLE, 0),
    "neither": (0, 0, 0, 0),
}


class LiveStates(TorchDispatchMode):
    """Counts the bytes of all living [N, H] tensors of the teacher's hidden size that were made while it is on, weights aside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.weights: set[int] = set()

    def begin(self, teacher: Any) -> None:
        """Leave out its weights, of which views are made."""
        self.weights = {value.untyped_storage()._cdata for value in teacher.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what ``func`` made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == TEACHER:
                storage = value.untyped_storage()
                if storage._cdata not in self.weights and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        return out

    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.sizes.values())


class Watched(torch.optim.SGD):
    """Tells when it steps."""

    note: Any = staticmethod(lambda phase: None)

    def step(self, *given: Any, **named: Any) -> Any:
        """As ever."""
        self.note("optimizer")
        return super().step(*given, **named)


@pytest.fixture
def folders(tmp_path):
    student = tiny.save(tiny.llama(seed=1, hidden=STUDENT), tmp_path / "student")
    return student, tiny.save(tiny.qwen3(seed=2, hidden=TEACHER), tmp_path / "teacher")


def module(folders: tuple[str, str], **settings: Any) -> Any:
    defaults = {"weighting": Uniform(), "token_budget": TWO_ROWS, "optimizer": lambda given: Watched(given, lr=1.0)}
    return fixed.module(folders, EVEN, **(defaults | settings))


def peaks(trained: Any, live: Any, monkeypatch: pytest.MonkeyPatch, **trainer: Any) -> dict[str, int]:
    """The most that ``live`` counts in each phase of the update of one batch."""
    found = dict.fromkeys(PHASES, 0)

    def note(phase: str) -> None:
        found[phase] = max(found[phase], live.total())

    run, score, head = Update.run, Scores.score_frozen, ScoringModel.linear_head

    def watched_layer(layer: Any, given: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: note("layers"))

    def watched_run(self: Any, *given: Any, **named: Any) -> Any:
        layer = trained.student.causal_lm.get_decoder().layers[0]
        layer.register_forward_hook(watched_layer)
        live.begin(trained.teacher)
        with live:
            return run(self, *given, **named)

    def watched_score(self: Any, *given: Any) -> None:
        score(self, *given)
        note("scoring")

    def watched_head(self: Any, hidden: Any) -> Any:
        if self is trained.student and torch.is_grad_enabled():
            note("head")
        return head(self, hidden)

    monkeypatch.setattr(Update, "run", watched_run)
    monkeypatch.setattr(Scores, "score_frozen", watched_score)
    monkeypatch.setattr(ScoringModel, "linear_head", watched_head)
    monkeypatch.setattr(Watched, "note", staticmethod(note))
    fixed.fit(trained, EVEN.prompts, steps=trained.recipe.updates, **trainer)
    return found


def parts(trained: Any, plan: Plan, name: str) -> dict[str, float]:
    found = estimate(trained, DATA, plan)
    return {phase: found.phases[phase].get(name, 0) for phase in PHASES}


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("name", CASES)
def test_the_teachers_states_are_counted_where_they_live(folders, name, monkeypatch):
    """By hand, by the budget, and by the tensors that are alive in a real step."""
    trained = module(folders, **CASES[name])
    expected = dict(zip(PHASES, EXPECTED[name], strict=True))
    assert parts(trained, CPU, STATES) == expected
    assert peaks(trained, LiveStates(), monkeypatch) == expected


def test_a_mixtures_states_live_until_the_backward_pass_ends(folders, monkeypatch):
    """Two teachers run again for each micro-batch; in the head the budget has one more tile of logits, 10 x 64 float32."""
    teacher = MixedTeacher([LocalTeacher(folders[1], dtype="float64") for _ in range(2)])
    trained = module(folders, teacher=teacher, objective=Divergence("reverse_kl"))
    assert parts(trained, CPU, STATES) == {"scoring": 0, "head": 0, "layers": 2 * MICRO, "optimizer": 0}
    assert parts(trained, CPU, MIXED)["head"] == 2 * MICRO + 2 * RESPONSE * VOCABULARY * 4
    assert peaks(trained, LiveStates(), monkeypatch) == {
        "scoring": 0,
        "head": 2 * MICRO,
        "layers": 2 * MICRO,
        "optimizer": 0,
    }


def test_autocasts_copy_of_the_teachers_head_is_counted(folders, monkeypatch):
    """States in 16 bits, and the float32 weight [64, 24] in 16 bits until the backward pass ends; the last one has three rows."""
    settings = {"objective": Divergence("reverse_kl"), "teacher": LocalTeacher(folders[1]), "dtype": "float32"}
    trained = module(folders, **settings)
    plan = replace(CPU, precision="bf16-mixed")
    cast = VOCABULARY * TEACHER * 2
    states = dict.fromkeys(PHASES[:3], WHOLE / 4) | {"optimizer": 0}
    assert parts(trained, plan, STATES) == states
    assert parts(trained, plan, TEACHER_HEAD) == {"scoring": 0, "head": cast, "layers": cast, "optimizer": 0}
    found = peaks(trained, LiveStates(), monkeypatch, precision="bf16-mixed")
    assert found == {"scoring": WHOLE / 4, "head": WHOLE / 4 + cast, "layers": WHOLE / 4 + cast, "optimizer": 0}


# -- offload -----------------------------------------------------------------------------------------------------------


class Elsewhere(LocalTeacher):
    """An offloaded teacher whose host weights nothing can compute with, as if a device read them: they are NaN, and only the
    copies that are brought to the device hold the values. Counts the bytes of the copies that are alive."""

    def __init__(self, path: str, **settings: Any) -> None:
        super().__init__(path, dtype="float64", offload=True, **settings)
        self.values: dict[int, torch.Tensor] = {}
        self.copies: dict[int, int] = {}

    def load(self, *, vocabulary: int) -> None:
        """Read, then spoil."""
        super().load(vocabulary=vocabulary)
        for weight in self.policy.parameters():
            self.values[id(weight)] = weight.detach().clone()
            weight.detach().fill_(math.nan)

    def copy(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """In place of ``local._copy``: from the host to the one device of this machine."""
        if id(value) not in self.values:
            return value  # a copy already, or a buffer
        copied = torch.nn.Parameter(self.values[id(value)].clone(), requires_grad=False)
        storage = copied.untyped_storage()
        self.copies[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.copies.pop, storage._cdata)
        return copied

    def begin(self, teacher: Any) -> None:
        """Nothing to leave out."""

    def total(self) -> int:
        """Bytes on the device now."""
        return sum(self.copies.values())

    def __enter__(self) -> None:
        """Counting needs no block."""

    def __exit__(self, *_: Any) -> None:
        """Nothing to undo."""


HEAD_BYTES = VOCABULARY * TEACHER * FLOAT64
OFFLOAD_CASES = {name: CASES[name] for name in CASES if name != "divergence at once"}
IN_UPDATE = {  # what of the teacher is on the device in head, layers and optimizer
    "divergence": "head",
    "two epochs": "head",
    "mini-batches": "whole",
    "baseline": "head",
    "baseline, scored before": "nothing",
    "baseline, mini-batches": "nothing",
    "both": "head",
    "neither": "nothing",
}


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:.*averages out")
@pytest.mark.parametrize("name", OFFLOAD_CASES)
def test_of_an_offloaded_teacher_the_update_holds_what_the_budget_counts(folders, name, monkeypatch):
    teacher = Elsewhere(folders[1])
    monkeypatch.setattr(local, "_copy", teacher.copy)
    trained = module(folders, teacher=teacher, **OFFLOAD_CASES[name])
    parameters = sum(weight.numel() for weight in tiny.qwen3(seed=2, hidden=TEACHER).parameters())
    held = {"head": HEAD_BYTES, "whole": parameters * FLOAT64, "nothing": 0}[IN_UPDATE[name]]
    counted = {"whole": OFFLOADED, "head": TEACHER_HEAD, "nothing": OFFLOADED}[IN_UPDATE[name]]
    expected = dict.fromkeys(PHASES, held)
    if counted == OFFLOADED:
        expected["scoring"] = parameters * FLOAT64
    else:
        expected["scoring"] = 0  # of the head, which ``OFFLOADED`` has there
        assert parts(trained, GPU, OFFLOADED) == {"scoring": parameters * FLOAT64} | dict.fromkeys(PHASES[1:], 0)
    assert parts(trained, GPU, counted) == expected
    found = peaks(trained, teacher, monkeypatch)
    assert found == dict.fromkeys(PHASES, held) | {"scoring": 0}  # it has left when the last score is there
    assert not teacher.copies


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:.*averages out")
@pytest.mark.parametrize("name", OFFLOAD_CASES)
def test_an_offloaded_teacher_gives_the_gradients_of_one_that_is_not(folders, name, monkeypatch):
    """Through all steps of a batch, bit for bit, whatever is on the device."""
    weights = []
    for teacher in (LocalTeacher(folders[1], dtype="float64"), Elsewhere(folders[1])):
        if isinstance(teacher, Elsewhere):
            monkeypatch.setattr(local, "_copy", teacher.copy)
        trained = module(folders, teacher=teacher, **OFFLOAD_CASES[name])
        fixed.fit(trained, EVEN.prompts, steps=2 * trained.recipe.updates)
        weights.append(fixed.weights(trained))
    assert all(bool(torch.isfinite(value).all()) for value in weights[1].values())
    assert fixed.relative_gap(*weights) == 0.0


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:.*averages out", "ignore:out of memory")
@pytest.mark.parametrize("trains", [True, False], ids=["update", "scoring pass"])
def test_an_offloaded_teacher_is_whole_again_after_memory_ran_out(folders, trains, monkeypatch):
    """The micro-batches are cut anew, so that no kept states fit them: its body runs again, on the device for all of them."""
    ran_out, copied, student = [], [], Scores.student
    settings = CASES["both"] | {"token_budget": 3 * (PROMPT + RESPONSE)}

    def once(self: Any, part: Any, rows: Any) -> Any:
        scores = student(self, part, rows)
        if torch.is_grad_enabled() == trains and not ran_out:
            ran_out.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores

    monkeypatch.setattr(Scores, "student", once)
    weights = []
    for teacher in (LocalTeacher(folders[1], dtype="float64"), Elsewhere(folders[1])):
        if isinstance(teacher, Elsewhere):
            copy = teacher.copy
            monkeypatch.setattr(local, "_copy", lambda *given, copy=copy: copied.append(id(given[0])) or copy(*given))
        ran_out.clear()
        trained = module(folders, teacher=teacher, **settings)
        fixed.fit(trained, EVEN.prompts)
        assert len(ran_out) == 1 and len(ran_out[0]) == 3
        weights.append(fixed.weights(trained))
    assert fixed.relative_gap(*weights) == 0.0
    embedding = next(iter(teacher.values))  # is no part of the head
    assert copied.count(embedding) == 2 + (
        not trains
    )  # to score; after memory ran out once a pass, not once a micro-batch
    assert not teacher.copies


def test_a_dummy_micro_batch_does_not_run_an_unsharded_teacher_again(tmp_path):
    """A rank with fewer micro-batches than the other has dropped its states by then; the whole of an offloaded teacher would be
    brought back for nothing."""
    folders = tiny.pair(tmp_path)
    forks.succeed("tests.helpers.compared_ranks", str(tmp_path), *folders, logs=tmp_path, timeout=300)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    lengths = cases.rollout().layout.row_lengths
    counts = [len(micro_batches(lengths[rank::2], token_budget=cases.BUDGET)) for rank in (0, 1)]
    assert counts[0] != counts[1]
    for name in compared_ranks.CASES:
        settings = cases.gradient_cases()[name]
        loss, expected = fixed.gradient(fixed.module(folders, cases.rollout(), **settings), cases.rollout().prompts)
        for found, gradient, passes in (rank[name] for rank in ranks):
            assert found == pytest.approx(loss, rel=1e-9)
            assert fixed.relative_gap(gradient, expected) < 1e-9
            assert passes == max(counts)  # to score; where a rank has fewer micro-batches, one of them twice


# -- by hand -----------------------------------------------------------------------------------------------------------

ROW = 8192  # longest response
BODIES = {"student": (2048, 6144, 28, 16), "teacher": (4096, 12288, 36, 32)}  # H, I, layers, heads
ENTRIES = 151936


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelSize]:
    """Qwen3-1.7B and a teacher of 8B, both with tied heads."""
    found = {}
    for role, (hidden, inner, layers, heads) in BODIES.items():
        config = Qwen3Config(
            vocab_size=ENTRIES,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
        found[role] = model_size(config)
    return found


WORK = Workload(
    rows=256,
    prompt=1024,
    response=ROW,
    token_budget=16384,
    checkpointing=True,
    local_sampler=False,
    train_tiles=DIVERGENCE_TILES,
    compares=True,
    differentiates=True,
    keeps_scored=True,
    keeps_states=True,
)
BF16 = replace(GPU, precision="bf16-mixed")
STATE_BYTES = 256 * 2**13 * 2**12 * 2  # 16 GiB
MICRO_BYTES = 2**13 * 2**12 * 2  # one row, 64 MiB
HEAD_WEIGHT = ENTRIES * 4096  # elements


def held(sizes: dict[str, ModelSize], work: Workload, teacher: Held, plan: Plan = BF16) -> dict[str, dict[str, float]]:
    """What the comparison adds, by phase and part."""
    rank = Rank(Held(sizes["student"], 4), work, plan, frozen=[teacher], compared=[teacher])
    with_it = rank.budget()
    plain = replace(work, compares=False, differentiates=False, keeps_scored=False, keeps_states=False)
    without = replace(rank, work=plain).budget()
    return {
        phase: {name: size - without.phases[phase].get(name, 0) for name, size in with_it.phases[phase].items()
                if size != without.phases[phase].get(name, 0)}
        for phase in PHASES
    }  # fmt: skip


def test_the_states_of_256_long_responses_take_16_gib(sizes):
    assert STATE_BYTES == 16 * GIB
    found = held(sizes, WORK, Held(sizes["teacher"], 2))
    kept = {STATES: STATE_BYTES}
    assert found == {"scoring": kept, "head": kept, "layers": kept, "optimizer": {}}
    twice = held(sizes, replace(WORK, epochs=2), Held(sizes["teacher"], 2))
    assert twice["optimizer"] == kept


def test_an_offloaded_teacher_leaves_its_head_and_a_row_of_states(sizes):
    head = {TEACHER_HEAD: HEAD_WEIGHT * 2}
    micro = {STATES: MICRO_BYTES}
    found = held(sizes, WORK, Held(sizes["teacher"], 2, offload=True))
    assert found == {"scoring": {}, "head": head | micro, "layers": head | micro, "optimizer": head}


def test_a_teacher_that_runs_again_in_the_update_is_whole_for_it(sizes):
    """14.1 GiB, and the student's gradients while it runs: with mini-batches of 64 rows no states are kept."""
    work = replace(WORK, mini_batches=4, keeps_scored=False, keeps_states=False)
    found = held(sizes, work, Held(sizes["teacher"], 2, offload=True))
    whole, micro = {OFFLOADED: 2 * sizes["teacher"].parameters}, {STATES: MICRO_BYTES}
    gradients = {"gradients": 4 * sizes["student"].num_trainable}
    assert found == {"scoring": gradients, "head": whole | micro, "layers": whole | micro, "optimizer": whole}
    assert whole[OFFLOADED] == pytest.approx(14.1 * GIB, rel=0.01)


def test_the_head_of_a_sharded_teacher_is_whole_for_the_backward_pass(sizes):
    """A rank holds an eighth of the blocks, and all of embedding, last norm and head."""
    work = replace(WORK, keeps_scored=False, keeps_states=False)
    found = held(sizes, work, Held(sizes["teacher"], 2), replace(BF16, local_ranks=8, shards=8))
    outside = {TEACHER_HEAD: 2 * (HEAD_WEIGHT + 4096), STATES: MICRO_BYTES}
    assert found["head"] == found["layers"] == outside and found["optimizer"] == {}


def test_float32_teachers_have_a_copy_in_16_bits_and_self_teachers_one_of_their_own(sizes):
    work = replace(WORK, keeps_scored=False, keeps_states=False)
    assert held(sizes, work, Held(sizes["teacher"], 4))["head"][TEACHER_HEAD] == HEAD_WEIGHT * 2
    own = held(sizes, work, Held(sizes["student"], 4, copied=True))["layers"]
    assert own[TEACHER_HEAD] == ENTRIES * 2048 * (4 + 2)
    kl = held(sizes, replace(work, differentiates=False), Held(sizes["student"], 4, copied=True))
    assert TEACHER_HEAD in kl["head"] and not kl["layers"]


def test_validation_counts_the_states_of_its_batch(sizes):
    work = replace(WORK, val_rows=32, val_response=4096)
    rank = Rank(Held(sizes["student"], 4), work, BF16, compared=[Held(sizes["teacher"], 2)])
    parts = [replace(rank, work=replace(work, val_compares=on)).budget().phases["validation"] for on in (True, False)]
    assert parts[0].pop(STATES) == 32 * 4096 * 4096 * 2 and parts[0] == parts[1]


@pytest.mark.parametrize("update", ["ema", "live"])
def test_a_self_teacher_is_the_student_in_the_budget(folders, update):
    """10 tokens of the micro-batch, and a copy of the tied head where its weights are others."""
    trained = module(folders, teacher=SelfTeacher(update), objective=Divergence("reverse_kl"))
    states, copy = 2 * RESPONSE * STUDENT * FLOAT64, VOCABULARY * STUDENT * FLOAT64 * (update == "ema")
    assert parts(trained, CPU, STATES) == {"scoring": 0, "head": states, "layers": states, "optimizer": 0}
    assert parts(trained, CPU, TEACHER_HEAD) == {"scoring": 0, "head": copy, "layers": copy, "optimizer": 0}
