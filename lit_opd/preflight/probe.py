"""A few prompts through the real models on this machine's CPU, before a run: what no configuration can tell.

Does the sampler draw from what the scorer scores, is the teacher finite, and is the signal of a student that is its own
teacher 0?
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_opd.errors import InputError, first_line
from lit_opd.models.agreement import gap_bound
from lit_opd.preflight.module_checks import longest_row
from lit_opd.preflight.plan import GIB, Plan, host_memory
from lit_opd.preflight.sizes import NotEstimated, model_size
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.step.scores import by_chunk
from lit_opd.teacher import LocalTeacher
from lit_opd.types import Rollout, TokenScores

ROWS, TOKENS = 4, 16  # responses and their length
LARGEST = 2 * GIB  # bytes of weights that are loaded without being asked to: seconds on a CPU
MEMORY_SHARE = 0.7  # of this machine's memory that the weights may take
OWN, HALF_OWN = 1e-4, 0.05  # nats: largest |A| of a student that is its own teacher, scored row by row


class NotProbed(Exception):
    """Why the models were not tried out; ``by_choice`` where nothing is left to do."""

    def __init__(self, reason: str, *, by_choice: bool = False) -> None:
        super().__init__(reason)
        self.by_choice = by_choice


@dataclass(frozen=True)
class Probe:
    """What a few responses showed, in nats.

    Args:
        tokens: sampled.
        gap: mean |student - sampler log-prob|.
        gap_bound: what it must not pass.
        disagreement: mean |teacher - student log-prob|.
        own: largest |A| with the student's weights as the teacher's, None where no teacher is local.
        own_bound: what it must not pass.
    """

    tokens: int
    gap: float
    gap_bound: float
    disagreement: float
    own: float | None
    own_bound: float


def probe(module: Subject, data: PromptDataModule, trainer: Trainer, plan: Plan, *, deep: bool | None) -> Probe:
    """Load the models, sample ``ROWS`` short responses and score them.

    Args:
        module: the ``OPDModule``; its models stay loaded.
        data: the ``PromptDataModule``, set up.
        trainer: of one process on the CPU.
        plan: where the run is meant to run.
        deep: True loads models of any size that fits here, False none, None small ones on disk for a run on CPUs.
    Raises:
        NotProbed: no model was loaded.
        InputError: a model cannot be loaded or run, or gives a log-prob that is not finite.
    """
    _require_wanted(module, plan, deep)
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            return _probed(module, data)
    except InputError:
        raise
    except Exception as error:  # a foreign model may fail anywhere
        raise InputError(
            f"a few prompts could not be sampled and scored: {type(error).__name__}: {first_line(error)}; try the "
            "model alone with transformers"
        ) from error


def _require_wanted(module: Subject, plan: Plan, deep: bool | None) -> None:
    if deep is False:
        raise NotProbed("--deep false", by_choice=True)
    if not module.sampler.in_process:
        reason = "the sampler is not in this process; the first step compares it (model.sampler.max_logprob_gap)"
        raise NotProbed(reason, by_choice=True)
    paths = [module.student_settings.path, *(part.path for part in _local(module))]
    weights = sum(_bytes(module, path) for path in dict.fromkeys(paths))
    if weights > MEMORY_SHARE * host_memory():
        raise NotProbed(f"the weights take {weights / GIB:.1f} GiB in float32, too much for this machine")
    if deep:
        return
    missing = [path for path in paths if not any(Path(path).expanduser().glob("*.safetensors"))]
    if missing:
        raise NotProbed(f"no weights in {missing[0]}")
    if plan.accelerator != "cpu" or weights > LARGEST:
        raise NotProbed(f"the weights of {weights / GIB:.1f} GiB would be loaded on this machine's CPU")


def _local(module: Subject) -> list[LocalTeacher]:
    return [part for scorer in module.scorers.values() for part in scorer.modules() if isinstance(part, LocalTeacher)]


def _bytes(module: Subject, path: str) -> int:
    from lit_opd.models.loading import load_config

    code = module.student_settings.trust_remote_code
    try:
        return 4 * model_size(load_config(path, "model.student.path", trust_remote_code=code)).parameters
    except NotEstimated as error:
        raise NotProbed(f"the size of {path} is not known: {error}") from error


def _probed(module: Subject, data: PromptDataModule) -> Probe:
    module.longest_row = longest_row(module, data)
    module.configure_model()
    batch = next(iter(data.train_dataloader()))
    settings = module.sampling_settings(max_new_tokens=min(TOKENS, module.sampler.max_new_tokens))
    rollout = module.sampler.sample(module.student, batch.rows(torch.arange(min(ROWS, len(batch)))), settings)
    temperature = module.sampler.temperature
    student = module.student(rollout, temperature=temperature).logprobs
    _require_finite("student", student, rollout)
    disagreement = 0.0
    for role, scorer in module.scorers.items():
        read = rollout if role == "teacher" else rollout.without_teacher_prompts()
        with scorer.on_device(rollout.mask.device):
            scored = scorer.score(read, temperature=temperature)
        _require_finite(role, scored.logprobs, rollout)
        if role == "teacher":
            disagreement = _disagreement(scored, student, rollout)
    half = student.dtype != torch.float64 and _computes_in_half(module)
    return Probe(
        tokens=int(rollout.mask.sum()),
        gap=_mean((student - rollout.sampler_logprobs).abs(), rollout.mask),
        gap_bound=module.sampler.max_logprob_gap or gap_bound(half=half),
        disagreement=disagreement,
        own=_own_signal(module, rollout, student) if _local(module) else None,
        own_bound=HALF_OWN if half else OWN,
    )


def _disagreement(teacher: TokenScores, student: Tensor, rollout: Rollout) -> float:
    """Mean |teacher - student| over what the teacher scores: tokens, or chunks where it has another tokenizer."""
    values = {"student_logprobs": student, "teacher_logprobs": teacher.logprobs}
    both = by_chunk(values, rollout.mask, teacher.chunks)
    return _mean((both["teacher_logprobs"] - both["student_logprobs"]).abs(), both["mask"])


def _computes_in_half(module: Subject) -> bool:
    return str(module.trainer.precision).startswith("bf16") or module.student_settings.dtype in ("bfloat16", "float16")


def _own_signal(module: Subject, rollout: Rollout, student: Tensor) -> float:
    """Largest |teacher - student| where the teacher is the student, scored as a teacher and one row at a time."""
    own = LocalTeacher(module.student_settings.path)
    own.policy = module.student
    same, largest = rollout.without_teacher_prompts(), 0.0
    for row in range(len(rollout)):
        part = same.rows(torch.tensor([row])).trimmed()
        scored = own.score(part, temperature=module.sampler.temperature).logprobs
        largest = max(largest, float((scored[0] - student[row, : scored.shape[1]]).abs().max()))
    return largest


def _require_finite(role: str, logprobs: Tensor, rollout: Rollout) -> None:
    bad = (~torch.isfinite(logprobs) & rollout.mask).any(-1)
    if bool(bad.any()):
        row = rollout.prompts.row_ids[int(bad.nonzero()[0])]
        raise InputError(
            f"the {role}'s log-probs are not finite on a response to data row {row!r}; look for NaN in its weights, or try "
            "another dtype"
        )


def _mean(values: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1))
