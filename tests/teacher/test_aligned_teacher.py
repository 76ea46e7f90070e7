"""A teacher with another tokenizer: the plain one where only the numbering differs, hand arithmetic where merges do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd.advantage import RewardExtrapolation
from lit_opd.compare.gradients import KeptGradient
from lit_opd.errors import InputError
from lit_opd.models.loading import load_tokenizer
from lit_opd.models.student import StudentSettings, build_student
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.preflight.aligned_checks import check_aligned
from lit_opd.preflight.module_checks import require_scored
from lit_opd.prompts import PromptDataModule
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.micro_batches import MicroBatches
from lit_opd.step.recipe import Recipe
from lit_opd.step.scalars import scalars
from lit_opd.step.scores import Scores
from lit_opd.step.skips import Skips
from lit_opd.step.token_budget import TokenBudget
from lit_opd.step.update import Update
from lit_opd.teacher import AlignedTeacher, CachedTeacher, LocalTeacher, RemoteTeacher, RoutedTeacher, SelfTeacher
from lit_opd.teacher.aligned import _cut
from lit_opd.teacher.alignment import AlignedRow, Chunk
from lit_opd.types import Rollout
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import aligned, fixed, spelled
from tests.helpers import fake_vllm as fake

TEXTS = ["abcdef", "de abab f", "f", "abc", "cab de", "ab"]
PROMPTS = ["a", "fed", "ab cd", "e", "c c c", "abcde"]
SIZE = 2 + len(aligned.LETTERS) + len(aligned.MERGES)
FEWER = [aligned.MERGES[0], aligned.MERGES[2]]
PLAIN_LOSS = PolicyLoss(clip=None, dual_clip=None, importance_cap=None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders: a student; a teacher of its tokenizer; the same with other ids; one with fewer merges, and one with none."""
    folder = tmp_path_factory.mktemp("models")
    order = [(7 * place + 3) % SIZE for place in range(SIZE)]
    assert sorted(order) == list(range(SIZE))
    same, other = aligned.tokenizer(aligned.MERGES), aligned.tokenizer(aligned.MERGES, order=order)
    fewer = aligned.tokenizer(FEWER, order=[(5 * place + 1) % (SIZE - 1) for place in range(SIZE - 1)])
    teacher = aligned.model(2, SIZE)
    return {
        "student": aligned.save(aligned.model(1, SIZE), folder / "student", same),
        "plain": aligned.save(teacher, folder / "plain", same),
        "permuted": aligned.save(aligned.permuted(teacher, order), folder / "permuted", other),
        "fewer": aligned.save(aligned.model(3, SIZE - 1), folder / "fewer", fewer),
        "letters": aligned.save(aligned.model(4, SIZE - 3), folder / "letters", aligned.tokenizer([])),
    }


@cache
def tokens(path: str):
    return load_tokenizer(path, "model.student.path")


def rows(world: dict[str, str], teacher: str, texts=TEXTS, **settings) -> Rollout:
    return aligned.rollout(
        tokens(world["student"]), tokens(world[teacher]), texts, prompts=PROMPTS[: len(texts)], **settings
    )


@cache
def local(folder: str) -> LocalTeacher:
    return LocalTeacher(folder, dtype="float64")


@cache
def plain_model(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def loaded(world: dict[str, str], teacher: str, **settings) -> AlignedTeacher:
    found = AlignedTeacher(local(world[teacher]), **settings)
    found.know_tokenizer(tokens(world["student"]))
    found.know_stop_ids((tokens(world["student"]).eos_token_id,))
    found.load(vocabulary=SIZE)
    return found


@cache
def student_model(folder: str) -> ScoringModel:
    found = ScoringModel(build_student(StudentSettings(folder, dtype="float64")), vocabulary=len(tokens(folder)))
    found.choose_path("student")
    return found


def stepped(world: dict[str, str], teacher, batch: Rollout, *, token_budget=None, **recipe):
    """The record of one update, and its gradient by name, as a training step makes it."""
    student = student_model(world["student"])
    settings = {"objective": PLAIN_LOSS, "weighting": Uniform(), "max_new_tokens": batch.mask.shape[1]} | recipe
    if isinstance(teacher, LocalTeacher):
        teacher.load(vocabulary=student.vocabulary)
    kept = KeptGradient(student, 0)
    update = Update(
        Recipe(**settings),
        Scores(student, {"teacher": teacher}, Recipe(**settings), batch, temperature=1.0, step=0),
        MicroBatches(batch, TokenBudget(), token_budget),
        kept,
        lambda name, done, total: None,
        skips=Skips(most=0),
        progress=0.0,
    )
    record = update.run()
    names = [name for name, value in student.causal_lm.named_parameters() if value.requires_grad]
    return record, dict(zip(names, kept.gradient, strict=True))


class Reads(Uniform):
    """A weighting that asks for a field of the signal."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.field})


def without_teacher_ids(batch: Rollout) -> Rollout:
    return replace(batch, prompts=replace(batch.prompts, teacher_ids=None, teacher_mask=None))


def same_bits(first, second) -> None:
    """In float32, of float64 results: a softmax adds up the vocabulary in another order where its ids are others."""
    assert torch.equal(first.float(), second.float())


# -- the student's tokenizer with other ids ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["single", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_other_ids_change_no_score(world, chunks, temperature):
    plain = local(world["plain"])
    plain.load(vocabulary=SIZE)
    batch, requires = rows(world, "permuted"), frozenset({"teacher_entropy"})
    expected = plain.score(without_teacher_ids(batch), temperature=temperature, requires=requires)
    found = loaded(world, "permuted", chunks=chunks).score(batch, temperature=temperature, requires=requires)
    same_bits(found.logprobs, expected.logprobs)
    same_bits(found.entropy, expected.entropy)
    assert torch.equal(found.chunks.lengths, batch.mask.long())


@pytest.mark.parametrize("chunks", ["single", "sum"])
@pytest.mark.parametrize("weighting", [Uniform(), ImportanceWeighting()], ids=["uniform", "importance"])
def test_other_ids_change_no_gradient(world, chunks, weighting):
    batch = rows(world, "permuted", cut=frozenset({2}))
    expected = stepped(world, local(world["plain"]), without_teacher_ids(batch), weighting=weighting)
    teacher = loaded(world, "permuted", chunks=chunks)
    found = stepped(world, teacher, batch, weighting=weighting)
    for name, value in expected[1].items():
        same_bits(found[1][name], value)
    same_bits(found[0].signal.teacher_logprobs, expected[0].signal.teacher_logprobs)
    assert torch.equal(found[0].kept, expected[0].kept)


@pytest.mark.parametrize(
    "objective",
    [
        Divergence("reverse_kl"),
        Divergence("forward_kl"),
        Divergence("jsd", beta=0.3),
        Divergence("forward_kl", top_k=3),
    ],
    ids=["reverse", "forward", "jsd", "top-k"],
)
def test_other_ids_change_no_divergence(world, objective):
    batch = rows(world, "permuted")
    expected = stepped(world, local(world["plain"]), without_teacher_ids(batch), objective=objective)
    teacher = loaded(world, "permuted")
    found = stepped(world, teacher, batch, objective=objective)
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-12, atol=1e-12)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-11, atol=1e-12)


# -- other merges, by hand ---------------------------------------------------------------------------------------------


def table(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs [tokens, V] before each token of the response."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return torch.log(torch.softmax(logits, -1))[len(prompt) - 1 : -1]


# student "abc|de|f|END" and teacher "ab|c|de|f|END": (tokens of the student, tokens of the teacher)
BY_HAND = {
    "abcdef": [((0,), (0, 1)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,))],
    "de abab f": [((n,), (n,)) for n in range(7)],
    "f": [((0,), (0,)), ((1,), (1,))],
    "abc": [((0,), (0, 1)), ((1,), (2,))],
    "cab de": [((n,), (n,)) for n in range(5)],
    "ab": [((0,), (0,)), ((1,), (1,))],
}


# a student "a|b|c|d|e|f|END" and the teacher "abc|de|f|END"
LETTER_BY_LETTER = {
    "abcdef": [((0, 1, 2), (0,)), ((3, 4), (1,)), ((5,), (2,)), ((6,), (3,))],
    "de abab f": [
        ((0, 1), (0,)),
        ((2,), (1,)),
        ((3, 4), (2,)),
        ((5, 6), (3,)),
        ((7,), (4,)),
        ((8,), (5,)),
        ((9,), (6,)),
    ],
    "f": [((0,), (0,)), ((1,), (1,))],
    "abc": [((0, 1, 2), (0,)), ((3,), (1,))],
    "cab de": [((0,), (0,)), ((1, 2), (1,)), ((3,), (2,)), ((4, 5), (3,)), ((6,), (4,))],
    "ab": [((0, 1), (0,)), ((2,), (1,))],
}
CUTS = {"by the teacher": ("student", "fewer", BY_HAND), "by the student": ("letters", "permuted", LETTER_BY_LETTER)}


def by_hand(world, batch: Rollout, name: str, cuts: dict, chunks: str):
    """For each row: (student's sum with gradient, teacher's sum, last token of the student) of its chunks; the student."""
    student, teacher = plain_model(world["student"]), plain_model(world[name])
    theirs, found = tokens(world[name]), []
    for row, text in enumerate(TEXTS):
        prompt = batch.prompts.ids[row][batch.prompts.mask[row]].tolist()
        ids = batch.response_ids[row][batch.mask[row]].tolist()
        other = theirs(text, add_special_tokens=False)["input_ids"] + [theirs.eos_token_id]
        ours = table(student, prompt, ids)
        with torch.no_grad():
            their = table(teacher, theirs(PROMPTS[row], add_special_tokens=False)["input_ids"], other)
        found.append(
            [
                (sum(ours[n, ids[n]] for n in mine), float(sum(their[n, other[n]] for n in its)), mine[-1])
                for mine, its in cuts[text]
                if chunks == "sum" or len(mine) == len(its) == 1
            ]
        )
    return found, student


@pytest.mark.parametrize("chunks", ["single", "sum"])
@pytest.mark.parametrize("cut", CUTS)
def test_scores_of_other_merges_are_those_of_hand_arithmetic(world, cut, chunks):
    ours, name, cuts = CUTS[cut]
    world = world | {"student": world[ours]}
    batch = rows(world, name)
    expected = torch.zeros(batch.mask.shape, dtype=torch.float64)
    ends = torch.zeros(batch.mask.shape, dtype=torch.bool)
    for row, parts in enumerate(by_hand(world, batch, name, cuts, chunks)[0]):
        for _, their, last in parts:
            expected[row, last], ends[row, last] = their, True
    found = loaded(world, name, chunks=chunks).score(batch)
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found.chunks.ends, ends)


@pytest.mark.parametrize("chunks", ["single", "sum"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum"])
def test_a_step_on_other_merges_is_that_of_hand_arithmetic(world, cut, chunks, aggregation):
    """- Agg[(Q - S) S], S and Q the sums over a chunk; what has no score is in no denominator."""
    ours, name, cuts = CUTS[cut]
    world = world | {"student": world[ours]}
    batch = rows(world, name)
    parts, student = by_hand(world, batch, name, cuts, chunks)
    student.zero_grad()
    losses = [sum((ours.detach() - their) * ours for ours, their, _ in row) for row in parts]
    counts = [len(row) for row in parts]
    if aggregation == "sequence-mean":
        loss = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(losses)
    else:
        loss = sum(losses) / (sum(counts) if aggregation == "token-mean" else len(losses))
    loss.backward()
    teacher = loaded(world, name, chunks=chunks, min_aligned=0.0)
    record, gradient = stepped(world, teacher, batch, aggregation=aggregation)
    for name, value in student.named_parameters():
        torch.testing.assert_close(gradient[name], value.grad, rtol=1e-9, atol=1e-10)
    assert int(record.kept.sum()) == sum(counts)


def test_a_weighting_sees_a_chunk_as_one_token(tmp_path):
    """A student whose "ab" and "c" are one token of the teacher: positions count chunks, sums stand at their ends."""
    student, teacher = (aligned.tokenizer(merges) for merges in (FEWER, aligned.MERGES))
    folders = {
        "student": aligned.save(aligned.model(1, SIZE - 1), tmp_path / "student", student),
        "big": aligned.save(aligned.model(2, SIZE), tmp_path / "teacher", teacher),
    }
    seen = []

    class Watches(WeightingStrategy):
        requires = frozenset({"student_entropy", "teacher_entropy"})

        def weights(self, signal, progress):
            seen.append(signal)
            return torch.ones_like(signal.log_ratio)

    batch = replace(
        aligned.rollout(student, teacher, ["abcdef"], prompts=["a"]),
        sampler_logprobs=torch.tensor([[-1.0, -2.0, -4.0, -8.0, -16.0]]),
    )
    stepped(folders, loaded(folders, "big", chunks="sum"), batch, weighting=Watches())
    model = plain_model(folders["student"])
    ids = batch.response_ids[0].tolist()
    logs = table(model, student("a")["input_ids"], ids).detach()
    own, entropy = logs[range(5), ids], -(logs.exp() * logs).sum(-1)
    signal = seen[0]
    assert signal.mask.tolist() == [[False, True, True, True, True]]
    assert signal.sampler_logprobs.tolist() == [[0.0, -3.0, -4.0, -8.0, -16.0]]
    torch.testing.assert_close(
        signal.student_logprobs[0, 1:], torch.cat([own[:2].sum(0, keepdim=True), own[2:]]), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        signal.student_entropy[0, 1:], torch.cat([entropy[:2].sum(0, keepdim=True), entropy[2:]]), rtol=1e-6, atol=1e-6
    )
    assert bool((signal.teacher_entropy[0, 1:] > 0).all()) and signal.teacher_entropy[0, 0] == 0


def test_entropies_of_a_chunk_are_sums_over_its_tokens(world):
    batch, wanted = rows(world, "fewer"), frozenset({"teacher_entropy"})
    found = loaded(world, "fewer", chunks="sum").score(batch, requires=wanted).entropy
    theirs, model = tokens(world["fewer"]), plain_model(world["fewer"])
    ids = theirs("abcdef", add_special_tokens=False)["input_ids"] + [theirs.eos_token_id]
    logs = table(model, theirs(PROMPTS[0])["input_ids"], ids).detach()
    entropy = -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(found[0, 0], entropy[:2].sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0, 1], entropy[2], rtol=1e-9, atol=1e-9)


# -- the shared vocabulary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_divergence_is_over_the_tokens_that_both_have_and_one_bucket(world, kind):
    """By names of tokens: "abc" is in the bucket of the student, whose mass is of one token; the teacher's bucket is empty."""
    batch = rows(world, "fewer")
    teacher = loaded(world, "fewer", min_aligned=0.0)
    record, _ = stepped(world, teacher, batch, objective=Divergence(kind))
    models = [plain_model(world[who]) for who in ("student", "fewer")]
    ours, theirs = tokens(world["student"]), tokens(world["fewer"])
    names = sorted(theirs.get_vocab())
    assert set(ours.get_vocab()) - set(names) == {"abc"}
    row, text = 1, TEXTS[1]
    prompt = batch.prompts.ids[row][batch.prompts.mask[row]].tolist()
    ids = batch.response_ids[row][batch.mask[row]].tolist()
    other = theirs(text, add_special_tokens=False)["input_ids"] + [theirs.eos_token_id]
    p = table(models[0], prompt, ids).exp()
    q = table(models[1], theirs(PROMPTS[row], add_special_tokens=False)["input_ids"], other).exp()
    rounding = torch.finfo(torch.float64).eps
    p = torch.cat([p[:, ours.convert_tokens_to_ids(names)], p[:, ours.convert_tokens_to_ids(["abc"])] + rounding], -1)
    q = torch.cat([q[:, theirs.convert_tokens_to_ids(names)], torch.full((len(q), 1), rounding)], -1)
    m = (p + q) / 2
    kl = {"reverse_kl": [(1.0, p, q)], "forward_kl": [(1.0, q, p)], "jsd": [(0.5, q, m), (0.5, p, m)]}[kind]
    expected = sum(share * (first * (first / second).log()).sum(-1) for share, first, second in kl)
    torch.testing.assert_close(record.loss[row, : len(ids)], expected.detach(), rtol=1e-7, atol=1e-9)


def test_pairs_are_of_equal_bytes_and_of_equal_roles(tmp_path):
    student, teacher = spelled.byte_level(), spelled.sentence_piece()
    found = AlignedTeacher(LocalTeacher("nowhere"))
    found.__dict__["prompt_tokenizer"] = teacher
    teacher.name_or_path = aligned.save(aligned.model(0, len(teacher)), tmp_path, teacher)
    found.know_tokenizer(student)
    found.know_stop_ids((student.eos_token_id,))
    ours, theirs = found._pairs
    assert len(set(ours)) == len(ours) == len(set(theirs)) == len(theirs) > 300
    named = dict(zip(ours, theirs, strict=True))
    assert named[student.eos_token_id] == teacher.eos_token_id and named[student.pad_token_id] == teacher.pad_token_id
    spelling = found.aligner.student.spelled, found.aligner.teacher.spelled
    plain = [pair for pair in named.items() if spelling[0][pair[0]] is not None]
    assert all(spelling[0][mine] == spelling[1][its] for mine, its in plain) and len(plain) == len(ours) - 2
    letter = student.convert_tokens_to_ids("A")
    assert named[letter] == teacher.convert_tokens_to_ids("A") if "A" in teacher.get_vocab() else True
    assert teacher.convert_tokens_to_ids("<0x61>") not in theirs and teacher.convert_tokens_to_ids("<0xFF>") in theirs


# -- what stays the same -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["single", "sum"])
def test_a_row_does_not_depend_on_its_neighbours(world, chunks):
    batch, teacher = rows(world, "fewer"), loaded(world, "fewer", chunks=chunks)
    whole = teacher.score(batch)
    for row in range(len(batch)):
        alone = teacher.score(batch.take([row]).trimmed())
        width = alone.logprobs.shape[1]
        torch.testing.assert_close(alone.logprobs[0], whole.logprobs[row, :width], rtol=1e-11, atol=1e-12)
        assert torch.equal(alone.chunks.lengths[0], whole.chunks.lengths[row, :width])


@pytest.mark.parametrize(
    "settings",
    [{"chunks": "single"}, {"chunks": "sum"}, {"objective": Divergence("reverse_kl")}],
    ids=["single", "sum", "divergence"],
)
def test_micro_batches_equal_one(world, settings):
    batch = rows(world, "fewer")
    options = {"chunks": settings.get("chunks", "single"), "min_aligned": 0.0}
    others = {name: value for name, value in settings.items() if name != "chunks"}

    def found(**more):
        return stepped(world, loaded(world, "fewer", **options), batch, **others, **more)

    (record, weights), (cut, same) = found(), found(token_budget=16)
    torch.testing.assert_close(cut.loss, record.loss, rtol=1e-9, atol=1e-11)
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-9, atol=1e-11)
    assert torch.equal(cut.chunks.lengths, record.chunks.lengths) and torch.equal(cut.kept, record.kept)


def test_a_batch_used_twice_keeps_its_chunks(world):
    """The first of two updates is that of one; the ratio of the second is a chunk's."""
    batch = rows(world, "fewer")

    def found(**more):
        teacher = loaded(world, "fewer", chunks="sum")
        return stepped(world, teacher, batch, objective=PolicyLoss(importance_cap=None), **more)[0]

    once, twice = found(), found(epochs=2)
    torch.testing.assert_close(twice.signal.student_logprobs, once.signal.student_logprobs, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(twice.loss, once.loss, rtol=1e-10, atol=1e-11)  # no weight changed between them
    assert torch.equal(twice.kept, once.kept)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_share_with_a_score_is_logged(world):
    """Of 33 tokens by hand, 13 are alone in their chunk."""
    batch = rows(world | {"student": world["letters"]}, "permuted")
    chunks = [chunk for row in LETTER_BY_LETTER.values() for chunk in row]
    alone, total = sum(len(mine) == 1 for mine, _ in chunks), sum(len(mine) for mine, _ in chunks)
    assert (alone, total) == (13, int(batch.mask.sum())) == (13, 33)
    share = {}
    for how in ("single", "sum"):
        teacher = loaded(world | {"student": world["letters"]}, "permuted", chunks=how, min_aligned=0.3)
        record, _ = stepped(world | {"student": world["letters"]}, teacher, batch)
        share[how] = float(scalars(record)["train/aligned_fraction"])
    assert share == {"single": pytest.approx(13 / 33), "sum": 1.0}
    same = without_teacher_ids(rows(world, "plain"))
    plain = stepped(world, local(world["plain"]), same)[0]
    assert plain.chunks is None and "train/aligned_fraction" not in scalars(plain)


def test_a_training_run_logs_it(world):
    """Through the module, which tells the teacher of the student's tokenizer and end."""
    batch = rows(world, "fewer")
    teacher = AlignedTeacher(LocalTeacher(world["fewer"], dtype="float64"), chunks="sum")
    module = fixed.module((world["student"], world["plain"]), batch, teacher=teacher, objective=PLAIN_LOSS)
    record = fixed.fit(module, batch.prompts).records[0]
    assert float(module.trainer.callback_metrics["train/aligned_fraction"]) == 1.0
    expected = loaded(world, "fewer", chunks="sum").score(batch)
    torch.testing.assert_close(record.signal.teacher_logprobs, expected.logprobs, rtol=1e-10, atol=1e-11)
    assert torch.equal(record.chunks.lengths, expected.chunks.lengths)


@pytest.mark.parametrize("chunks", ["single", "sum"])
def test_a_reference_reads_the_students_tokens(world, chunks):
    """The initial student as reference: before the first update its log-probs are the student's, of chunks their sums."""
    batch = rows(world, "fewer")
    teacher = AlignedTeacher(LocalTeacher(world["fewer"], dtype="float64"), chunks=chunks, min_aligned=0.1)
    settings = {"teacher": teacher, "objective": PLAIN_LOSS, "advantage": [RewardExtrapolation(1.5)]}
    module = fixed.module((world["student"], world["plain"]), batch, with_reference=True, **settings)
    signal = fixed.fit(module, batch.prompts).records[0].signal
    torch.testing.assert_close(signal.reference_logprobs, signal.student_logprobs, rtol=1e-9, atol=1e-9)
    assert signal.mask.any(-1).sum() > 3


def test_a_batch_below_the_bound_ends_the_run_and_says_what_to_do(world):
    batch = rows(world, "fewer", texts=["abcabc", "abc"])
    with pytest.raises(InputError) as told:
        stepped(world, loaded(world, "fewer"), batch)
    assert str(told.value) == (
        "`model.teacher.min_aligned` must be at most the share of tokens that the teacher scores, 0.400 (2 of 5), got 0.8; set "
        "`chunks: sum` to score chunks of several tokens too, choose a teacher whose tokenizer is nearer to the student's, or "
        "lower it"
    )
    assert told.value.on_every_rank


def test_what_the_window_cannot_hold_has_no_score():
    row = AlignedRow([5, 6, 7], [Chunk(0, 1, 0, 1), Chunk(1, 2, 1, 3)])
    assert _cut(row, 3) == _cut(row, None) == row
    assert _cut(row, 2) == AlignedRow([5, 6], row.chunks[:1]) and _cut(row, 0) == AlignedRow([], [])


def test_rows_longer_than_the_teachers_window_are_cut_there(world, tmp_path):
    tokenizer = tokens(world["fewer"])
    short = aligned.save(aligned.model(3, SIZE - 1, window=8), tmp_path, tokenizer)
    batch = rows(world, "fewer", texts=["a a a a", "f"])
    found = loaded(world | {"short": short}, "short", chunks="sum").score(batch)
    assert found.chunks.ends[0].tolist() == [True] * 7 + [False]  # one token of a prompt, eight of a response
    whole = loaded(world, "fewer", chunks="sum").score(batch)
    torch.testing.assert_close(found.logprobs[0, :7], whole.logprobs[0, :7], rtol=1e-10, atol=1e-11)


def test_a_batch_of_which_the_teacher_reads_nothing_is_finite(world):
    batch = rows(world, "fewer", texts=["f", "ab"])
    empty = replace(batch, response_ids=torch.full_like(batch.response_ids, tokens(world["student"]).pad_token_id))
    teacher = loaded(world, "fewer")
    teacher.aligner.roles.clear()
    found = teacher.score(empty, requires=frozenset({"teacher_distribution"}))
    assert not found.chunks.ends.any() and not found.logprobs.any()
    shared = teacher.full_head(empty, states=found.states)
    assert bool(torch.isfinite(shared.teacher(slice(None), 1.0)).all())


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["single", "sum"])
def test_a_teacher_on_servers_gives_the_same(world, chunks):
    batch = rows(world, "fewer")
    expected = loaded(world, "fewer", chunks=chunks).score(batch)
    with fake.serving(world["fewer"]) as server:
        found = AlignedTeacher(RemoteTeacher([server.url], world["fewer"]), chunks=chunks)
        found.know_tokenizer(tokens(world["student"]))
        found.know_stop_ids((tokens(world["student"]).eos_token_id,))
        found.check(temperature=1.0, tokens=20)
        found.load(vocabulary=SIZE)
        assert found.inner.window == 63 and found.provides == frozenset()
        scores = found.score(batch)
    assert torch.allclose(scores.logprobs.double(), expected.logprobs, atol=1e-4, rtol=0)
    assert torch.equal(scores.chunks.lengths, expected.chunks.lengths)


def test_a_cache_stands_inside(world, tmp_path, monkeypatch):
    """Where it sees the teacher's own tokens; the second time nothing is computed."""
    batch, asked = rows(world, "fewer"), []
    expected = loaded(world, "fewer").score(batch)
    score = LocalTeacher.score
    monkeypatch.setattr(
        LocalTeacher, "score", lambda own, part, **how: asked.append(len(part)) or score(own, part, **how)
    )
    for _ in range(2):
        found = AlignedTeacher(CachedTeacher(local(world["fewer"]), str(tmp_path)))
        found.know_tokenizer(tokens(world["student"]))
        found.know_stop_ids((tokens(world["student"]).eos_token_id,))
        found.load(vocabulary=SIZE)
        scores = found.score(batch)
        torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=1e-10, atol=1e-10)
        assert torch.equal(scores.chunks.lengths, expected.chunks.lengths)
    assert len(asked) == 1


# -- the data and the checks -------------------------------------------------------------------------------------------


def data(folder: Path, prompts=("abcdef", "de ab"), **settings) -> PromptDataModule:
    path = folder / "train.jsonl"
    path.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    return PromptDataModule(str(path), prompt_batch=2, **settings)


def checked(world, folder, teacher, prompts=("abcdef", "de ab"), weighting=None, reference=None, **settings):
    module = fixed.module(
        (world["student"], world["plain"]),
        rows(world, "fewer"),
        teacher=teacher,
        reference=reference,
        objective=PLAIN_LOSS,
        weighting=weighting,
    )
    given = data(folder, prompts, **settings)
    given.use_tokenizer(module.tokenizer, None if settings else module.teacher_tokenizer)
    given.setup("fit")
    return check_aligned(module, given), given


def test_the_data_renders_prompts_in_the_teachers_tokens(world, tmp_path):
    found, given = checked(world, tmp_path, AlignedTeacher(LocalTeacher(world["fewer"]), chunks="sum"))
    batch = next(iter(given.train_dataloader()))
    theirs = tokens(world["fewer"])
    assert sorted(
        theirs.decode(row[valid]) for row, valid in zip(batch.teacher_ids, batch.teacher_mask, strict=True)
    ) == ["abcdef", "de ab"]
    assert found == (6, 6)  # abc|de|f and de| |ab
    assert checked(world, tmp_path, AlignedTeacher(LocalTeacher(world["fewer"])))[0] == (5, 6)


def test_equal_numbers_of_other_tokens_are_kept(world, tmp_path):
    """Both render "\\0\\1..." alike in numbers; they are other tokens, so the teacher's are not left out."""
    given = data(tmp_path, ["f"])
    first, second = aligned.tokenizer([]), aligned.tokenizer([], letters="f" + aligned.LETTERS[:-2] + " ")
    ids = {name: place for place, name in enumerate([spelled.PAD, spelled.EOS, *"abcdef "])}
    swapped = dict(ids, a=ids["b"], b=ids["a"])
    first, second = (spelled.literal([], ids=each) for each in (ids, swapped))
    given.use_tokenizer(first, second)
    given.setup("fit")
    assert next(iter(given.train_dataloader())).teacher_ids is not None
    given.use_tokenizer(first, spelled.literal([], ids=ids))
    given.setup("fit")
    assert next(iter(given.train_dataloader())).teacher_ids is None


def test_conversations_are_refused(world, tmp_path):
    module = fixed.module(
        (world["student"], world["plain"]), rows(world, "fewer"), teacher=AlignedTeacher(LocalTeacher(world["fewer"]))
    )
    module.sampler.environment = object()
    with pytest.raises(InputError, match="got AlignedTeacher, which aligns answers of one turn"):
        check_aligned(module, None)


def test_a_share_below_the_bound_is_refused_before_the_run(world, tmp_path):
    with pytest.raises(
        InputError, match=r"`model.teacher.min_aligned` must be at most .* 0.500 \(2 of 4\), got 0.8; set `chunks: sum`"
    ):
        checked(world, tmp_path, AlignedTeacher(LocalTeacher(world["fewer"])), ["abcf", "abcf"])
    assert checked(world, tmp_path, AlignedTeacher(LocalTeacher(world["fewer"]), min_aligned=0.5), ["abcf"])[0] == (
        1,
        2,
    )


def test_prompts_of_another_tokenizer_are_refused(world, tmp_path):
    with pytest.raises(
        InputError, match="`data.teacher_tokenizer` must be that of `model.teacher`, got .*plain.*; leave it out"
    ):
        checked(
            world,
            tmp_path,
            AlignedTeacher(LocalTeacher(world["fewer"])),
            teacher_tokenizer=world["plain"],
            teacher_system_prompt=None,
            chat_template=False,
        )


def test_a_teacher_of_the_same_tokenizer_is_said_to_need_no_alignment(world, tmp_path):
    with pytest.warns(UserWarning, match="`model.teacher`: the teacher has the student's tokenizer"):
        checked(world, tmp_path, AlignedTeacher(LocalTeacher(world["plain"])))


def test_inside_other_teachers_and_as_a_reference_it_is_refused(world, tmp_path):
    inside = RoutedTeacher({"a": AlignedTeacher(LocalTeacher(world["fewer"]))})
    with pytest.raises(InputError, match="`model.teacher` must not hold an AlignedTeacher inside, got RoutedTeacher"):
        checked(world, tmp_path, inside)
    reads = Reads("reference_logprobs")
    with pytest.raises(
        InputError, match="`model.reference` must not hold an AlignedTeacher inside, got AlignedTeacher"
    ):
        third = AlignedTeacher(LocalTeacher(world["fewer"]))
        checked(world, tmp_path, LocalTeacher(world["plain"]), weighting=reads, reference=third)
    routed = RoutedTeacher({"a": loaded(world, "fewer")})
    batch = rows(world, "fewer")
    batch = replace(batch, prompts=replace(batch.prompts, teachers=("a",) * len(batch)))
    with pytest.raises(InputError, match="`RoutedTeacher.teachers` must not hold an AlignedTeacher"):
        routed.score(batch)


def test_teachers_of_one_tokenizer_stand_inside(world):
    names = ("a", "b", "a", "b", "a", "b")
    inner = RoutedTeacher({name: LocalTeacher(world["fewer"], dtype="float64") for name in "ab"})
    found = AlignedTeacher(inner)
    found.know_tokenizer(tokens(world["student"]))
    found.know_stop_ids((tokens(world["student"]).eos_token_id,))
    found.load(vocabulary=SIZE)
    batch = rows(world, "fewer")
    scores = found.score(replace(batch, prompts=replace(batch.prompts, teachers=names)))
    torch.testing.assert_close(scores.logprobs, loaded(world, "fewer").score(batch).logprobs, rtol=1e-11, atol=1e-12)
    mixed = AlignedTeacher(RoutedTeacher({"a": LocalTeacher(world["fewer"]), "b": LocalTeacher(world["plain"])}))
    with pytest.raises(InputError, match="`model.teacher.teacher.path` must share the student's vocabulary"):
        _ = mixed.prompt_tokenizer


def test_scores_are_kept_on_disk_inside_and_say_the_same(world, tmp_path):
    batch, expected = rows(world, "fewer"), loaded(world, "fewer", chunks="sum").score(rows(world, "fewer"))
    for _ in range(2):
        found = AlignedTeacher(CachedTeacher(local(world["fewer"]), str(tmp_path)), chunks="sum")
        found.know_tokenizer(tokens(world["student"]))
        found.know_stop_ids((tokens(world["student"]).eos_token_id,))
        found.load(vocabulary=SIZE)
        assert found.inner.window == 64 and found.revision() == local(world["fewer"]).revision()
        scores = found.score(batch)
        torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=1e-11, atol=1e-12)
        assert torch.equal(scores.chunks.lengths, expected.chunks.lengths)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(batch)


def test_fields_of_one_token_are_refused_for_chunks_of_several(world, tmp_path):
    teacher = AlignedTeacher(LocalTeacher(world["fewer"]), chunks="sum")
    with pytest.raises(
        InputError, match="`model.teacher.chunks` must be single with `Reads`, which reads token_ids, got sum"
    ):
        checked(world, tmp_path, teacher, weighting=Reads("token_ids"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": "all"}, "`AlignedTeacher.chunks` must be single or sum, got 'all'"),
        ({"min_aligned": 1.5}, r"`AlignedTeacher.min_aligned` must be in \[0, 1\], got 1.5"),
        ({"min_aligned": float("nan")}, r"`AlignedTeacher.min_aligned` must be in \[0, 1\], got nan"),
        ({"min_aligned": True}, r"`AlignedTeacher.min_aligned` must be in \[0, 1\], got True"),
        (
            {"teacher": SelfTeacher("live")},
            "`AlignedTeacher.teacher` must have a tokenizer of its own, got SelfTeacher",
        ),
        ({"teacher": AlignedTeacher(LocalTeacher("x"))}, "must have a tokenizer of its own, got AlignedTeacher"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AlignedTeacher(**({"teacher": LocalTeacher("nowhere")} | settings))


def test_an_end_of_turn_that_is_no_token_is_refused(world):
    with pytest.raises(
        InputError, match="`model.teacher.end_token` must be a token of the teacher's tokenizer, got '<no>'"
    ):
        loaded(world, "fewer", end_token="<no>")


def test_prompts_without_the_teachers_tokens_are_refused(world):
    with pytest.raises(InputError, match="`PromptBatch.teacher_ids` must be the prompts in the teacher's tokens"):
        loaded(world, "fewer").score(without_teacher_ids(rows(world, "fewer")))


def test_what_chunks_of_several_tokens_cannot_give_is_refused_by_name(world):
    module = fixed.module(
        (world["student"], world["plain"]),
        rows(world, "fewer"),
        teacher=AlignedTeacher(LocalTeacher(world["fewer"]), chunks="sum"),
        objective=Divergence("reverse_kl"),
    )
    with pytest.raises(
        InputError,
        match="`Divergence` must have .*teacher_distribution.*`AlignedTeacher` cannot give; set `model.teacher.chunks: single`",
    ):
        require_scored(module.recipe, module.teacher, None)
