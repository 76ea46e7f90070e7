"""The student as its own teacher: what it scores with at each step, what a checkpoint holds, and a student that is left alone."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from callbacks import RunCheckpoint, StopOnSignal
from lit_opd.errors import InputError, Stopped
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.module import OPDModule
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.preflight import estimate, read_plan
from lit_opd.preflight.module_checks import check_self_teacher
from lit_opd.prompts import PromptDataModule
from lit_opd.teacher import BaseModelTeacher, LocalTeacher, RoutedTeacher, SelfTeacher
from tests.helpers import fixed, tiny

PLAIN = fixed.rollout(lengths=[5, 9, 1, 7], prompt_lengths=[4, 2, 6, 1], truncated={1})
OTHER = fixed.rollout(lengths=[1] * 4, prompt_lengths=[3, 5, 2, 4], truncated=set(), seed=5).prompts
# the teacher reads prompts of its own: with the student's it would agree with it for ever
ROWS = replace(PLAIN, prompts=replace(PLAIN.prompts, teacher_ids=OTHER.ids, teacher_mask=OTHER.mask))
STEPS = 4
OBJECTIVES = {"policy": PolicyLoss, "divergence": lambda: Divergence("reverse_kl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny.pair(tmp_path_factory.mktemp("models"))[0]


def module(folder: str, teacher, objective=None, *, lora=False, dtype="float64", **settings) -> OPDModule:
    adapters = LoraSettings(rank=2, alpha=64.0) if lora else None
    return OPDModule(
        StudentSettings(folder, dtype=dtype, lora=adapters),
        teacher,
        sampler=fixed.FixedSampler(ROWS, max_new_tokens=9),
        objective=objective,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.5),
        gradient_clip_norm=None,
        **settings,
    )


class Watch(L.Callback):
    """The trained weights before the first step and after each, in float64."""

    def on_train_start(self, trainer, pl_module):
        """Begin."""
        self.seen = [trained_weights(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Go on."""
        self.seen.append(trained_weights(pl_module))


def trained_weights(trained) -> dict[str, torch.Tensor]:
    named = trained.student.named_parameters()
    return {name: value.detach().double().clone() for name, value in named if value.requires_grad}


def watched(trained: OPDModule, **settings):
    watch = Watch()
    torch.manual_seed(1)  # of the adapters
    collect = fixed.fit(trained, ROWS.prompts, watch=watch, **({"steps": STEPS} | settings))
    return watch.seen, collect.records


def scored_with(trained: OPDModule, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs by a second model with ``weights``."""
    other = deepcopy(trained.student)
    other.load_state_dict(weights, strict=False)
    second = LocalTeacher("nowhere")
    second.policy = other
    return second.score(ROWS).logprobs


def averages(seen, decay: float, every: int) -> list[dict[str, torch.Tensor]]:
    """The average before each step, by hand."""
    found = [dict(seen[0])]
    for step, student in enumerate(seen[1:], start=1):
        last = found[-1]
        if step % every == 0:
            last = {name: decay * last[name] + (1 - decay) * student[name] for name in last}
        found.append(last)
    return found


def assert_close(ours, theirs, *, atol):
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        assert torch.allclose(ours[name].double(), theirs[name], atol=atol, rtol=0), name


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize(("decay", "every"), [(0.7, 1), (0.4, 3), (0.0, 1), (1.0, 1)])
def test_the_average_is_that_of_a_loop_and_scores_as_a_second_model_with_it(folder, lora, decay, every):
    trained = module(folder, SelfTeacher("ema", decay, every), lora=lora)
    seen, records = watched(trained)
    by_hand = averages(seen, decay, every)
    assert_close(trained.teacher.values, by_hand[-1], atol=1e-14)
    for record, average in zip(records, by_hand, strict=False):
        expected = scored_with(trained, average)
        assert torch.allclose(record.signal.teacher_logprobs, expected, atol=1e-10, rtol=0)
    assert any((seen[0][name] - seen[-1][name]).abs().max() > 1e-3 for name in seen[0])


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_live_teacher_is_a_second_model_with_the_students_weights_at_each_step(folder, lora):
    trained = module(folder, SelfTeacher("live"), lora=lora)
    seen, records = watched(trained)
    for record, weights in zip(records, seen, strict=False):
        expected = scored_with(trained, weights)
        assert torch.allclose(record.signal.teacher_logprobs, expected, atol=1e-10, rtol=0)
    assert not trained.teacher.values and not list(trained.teacher.parameters())


def crossed(first, second):
    """Every pair; in `make test` each value of either once or twice, along the diagonal."""
    shorter = min(len(first), len(second))
    return [
        pytest.param(one, other, id=f"{one}-{other}", marks=() if (a - b) % shorter == 0 else pytest.mark.slow)
        for a, one in enumerate(first)
        for b, other in enumerate(second)
    ]


@pytest.mark.parametrize(("objective", "lora"), crossed(list(OBJECTIVES), [False, True]))
def test_a_frozen_teacher_trains_as_the_model_the_run_began_with(folder, objective, lora):
    second = BaseModelTeacher() if lora else LocalTeacher(folder, "float64")
    ours, theirs = (
        module(folder, teacher, OBJECTIVES[objective](), lora=lora) for teacher in (SelfTeacher("frozen"), second)
    )
    (found, _), (expected, _) = watched(ours), watched(theirs)
    assert_close(found[-1], expected[-1], atol=1e-9)


@pytest.mark.parametrize(("objective", "update"), crossed(list(OBJECTIVES), ["live", "ema", "frozen"]))
def test_no_gradient_flows_through_the_teacher(folder, objective, update):
    """At the first step all three have the student's weights: the gradient is that with a frozen second model."""
    ours = module(folder, SelfTeacher(update), OBJECTIVES[objective]())
    theirs = module(folder, LocalTeacher(folder, "float64"), OBJECTIVES[objective]())
    (found, _), (expected, _) = watched(ours, steps=1), watched(theirs, steps=1)
    assert_close(found[-1], expected[-1], atol=1e-12)
    moved = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    assert moved > 1e-3


@pytest.mark.parametrize("update", ["live", "ema"])
def test_the_student_is_left_as_it_was(folder, update):
    trained = module(folder, SelfTeacher(update, 0.5))
    watched(trained, steps=2)
    before = {name: (value.data_ptr(), value.clone()) for name, value in trained.student.named_parameters()}
    part = trained.student.causal_lm.get_decoder()
    part.training = True
    head = trained.teacher.full_head(ROWS)
    trained.teacher.score(ROWS)
    assert part.training and [p for p in trained.student.modules() if p.training] == [part]
    for name, value in trained.student.named_parameters():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    assert not head.weight.requires_grad and not head.hidden.requires_grad
    average = trained.teacher.values.get("model.lm_head.weight", trained.student.causal_lm.lm_head.weight)
    assert torch.equal(head.weight, average.to(head.weight))


def test_a_failure_while_it_scores_gives_the_student_its_weights_back(folder):
    trained = module(folder, SelfTeacher("ema", 0.5))
    watched(trained, steps=2)
    before = trained_weights(trained)
    with pytest.raises(ZeroDivisionError), trained.teacher._as_teacher():
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in trained_weights(trained).items())


def signalled(monkeypatch, number: int) -> list[int]:
    """This process gets a SIGTERM after the ``number``-th copy between teacher and student; the copies are counted."""
    copy, seen = torch.Tensor.copy_, [0]

    def counted(own, *arguments, **options):
        done = copy(own, *arguments, **options)
        if sys._getframe(1).f_code.co_name == "_exchanged":
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_signal_while_weights_are_exchanged_saves_the_students(folder, tmp_path, monkeypatch, lora):
    """Of n weights a step copies n to the student and n back; the signal comes in the second step."""

    def trained_until(number: int, name: str):
        seen = signalled(monkeypatch, number)
        trained, watch, run = module(folder, SelfTeacher("ema", 0.5), lora=lora), Watch(), tmp_path / name
        torch.manual_seed(1)  # of the adapters
        callbacks = [StopOnSignal(), watch, RunCheckpoint()]
        options = {"enable_checkpointing": True, "default_root_dir": run}
        with suppress(Stopped):
            fixed.fit(trained, ROWS.prompts, steps=2, watch=callbacks, **options)
        monkeypatch.undo()
        return seen[0], watch.seen, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    total, whole, _ = trained_until(0, "whole")
    n = total // 4
    assert n == len(whole[0]) and total == 4 * n and n > 2
    for number in (2 * n + 1, 3 * n, 3 * n + 1, 3 * n + n // 2, 4 * n - 1, 4 * n):
        _, seen, saved = trained_until(number, str(number))
        assert len(seen) == 2 and saved["global_step"] == 1
        weights = {name.removeprefix("student."): value for name, value in saved["state_dict"].items()}
        assert all(torch.equal(weights[name], value) for name, value in whole[1].items()), number
        average = saved["self_teachers"]["teacher"]
        assert any(not torch.equal(average[name], value) for name, value in whole[1].items())


def test_a_half_precision_student_is_averaged_in_float32(folder):
    trained = module(folder, SelfTeacher("ema", 0.999), dtype="bfloat16")
    with pytest.warns(UserWarning, match="half-precision"):
        seen, _ = watched(trained)
    assert {value.dtype for value in trained.teacher.values.values()} == {torch.float32}
    assert_close(trained.teacher.values, averages(seen, 0.999, 1)[-1], atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_run_goes_on_bit_for_bit_and_keeps_no_more_than_it_needs(folder, tmp_path, lora):
    def own(**settings):
        trained = module(folder, SelfTeacher("ema", 0.6), lora=lora)
        seen, records = watched(trained, **settings)
        return trained.teacher.values, seen[-1], records[-1].signal.teacher_logprobs

    whole = own()
    path = tmp_path / "half.ckpt"
    own(steps=2, save=path)
    again = own(load=path)
    for ours, theirs in zip(again[:2], whole[:2], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(again[2], whole[2])
    saved = torch.load(path, weights_only=True)["self_teachers"]["teacher"]
    assert all((".lora_" in name) == lora for name in saved)
    assert not [name for name in torch.load(path, weights_only=True)["state_dict"] if "teacher" in name]


def test_a_checkpoint_without_an_average_starts_one_from_its_student(folder, tmp_path):
    path = tmp_path / "live.ckpt"
    watched(module(folder, SelfTeacher("live")), steps=2, save=path)
    trained = module(folder, SelfTeacher("ema", 1.0))
    seen, _ = watched(trained, load=path)
    assert_close(trained.teacher.values, seen[0], atol=0)


def test_an_average_of_another_student_is_refused(folder):
    trained = module(folder, SelfTeacher("ema"))
    trained.configure_model()
    state = trained.teacher.state()
    name = next(iter(state))
    for wrong in ({**state, name: state[name][:1]}, {"x": state[name]}):
        with pytest.raises(InputError, match="--ckpt_path"):
            trained.teacher.restore(wrong)


def test_it_is_found_inside_other_teachers(folder):
    inner = SelfTeacher("ema", 0.5)
    rows = replace(ROWS, prompts=replace(ROWS.prompts, teachers=("a",) * 4))
    trained = module(folder, RoutedTeacher({"a": inner}))
    trained.sampler.rollout = rows
    watch = Watch()
    fixed.fit(trained, rows.prompts, steps=2, watch=watch)
    assert_close(inner.values, averages(watch.seen, 0.5, 1)[-1], atol=1e-14)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"decay": bad}, "decay") for bad in (-0.1, 1.1, float("nan"), float("inf"), True, "0.9")]
    + [({"every": bad}, "every") for bad in (0, -1, 1.5, True)]
    + [({"update": bad}, "update") for bad in ("EMA", "", None)],
    ids=str,
)
def test_a_value_outside_its_range_is_one_line(settings, field):
    with pytest.raises(InputError, match=rf"SelfTeacher\.{field}. must be") as refused:
        SelfTeacher(**settings)
    assert "\n" not in str(refused.value)


def data(tmp_path, **settings) -> PromptDataModule:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "hint": "b"}\n')
    found = PromptDataModule(str(tmp_path / "rows.jsonl"), prompt_batch=1, **settings)
    found.use_tokenizer(tiny.tokenizer()).setup("fit")
    return found


def test_a_live_teacher_that_reads_the_same_is_refused_and_others_are_warned_of(folder, tmp_path):
    same, other = data(tmp_path), data(tmp_path, teacher_prompt="{prompt}{hint}")
    for update in ("live", "ema", "frozen"):
        trained = module(folder, SelfTeacher(update))
        trained.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        check_self_teacher(trained, other)
        if update == "live":
            with pytest.raises(InputError, match=r"data\.teacher_prompt.*nothing to learn"):
                check_self_teacher(trained, same)
        else:
            with pytest.warns(UserWarning, match=r"data\.teacher_prompt.*nothing to learn"):
                check_self_teacher(trained, same)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["frozen", "ema", "live"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preflight_counts_what_is_kept_and_what_is_put_aside(folder, update, lora, dtype):
    """Against what a real teacher holds: its values and, while they stand in the student's place, the student's own."""
    trained = module(folder, SelfTeacher(update=update), lora=lora, dtype=dtype)
    data = SimpleNamespace(
        prompt_batch=4, samples_per_prompt=1, longest_prompt=6, val=None, val_fraction=0, val_batch=1
    )
    plan = read_plan({"accelerator": "cpu", "devices": 1}, strategy="auto", memory_gb=1.0)
    counted = estimate(trained, data, plan).always.get("frozen models", 0.0)
    fixed.fit(trained, ROWS.prompts, steps=1)
    values = trained.teacher.values
    aside = sum(value.nbytes for value in trained.student.parameters() if value.requires_grad) if values else 0
    assert counted == sum(value.nbytes for value in values.values()) + aside
    assert bool(values) == (update != "live")
