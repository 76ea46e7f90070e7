"""Competition mathematics early in training: the gain of position-aware weighting shows in the first ten steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lit_opd.callbacks.throughput import left_out

from lit_opd.distributed import shared_failure
from lit_opd.errors import InputError
from lit_opd.evaluation import (
    PROMPT_SUFFIX,
    UNKNOWN_WEIGHTS,
    Answering,
    AnswerSettings,
    Comparison,
    EvaluationFile,
    EvaluationSet,
    Grader,
    PastEvaluation,
    SampledBatch,
    SetEvaluation,
    difference,
    flips,
    load_sets,
    past_evaluations,
    reached,
    read_comparison,
    require_room,
    undisturbed,
    weights_mark,
)
from lit_opd.evaluation.history import FILE_NAME
from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.prompts.encoding import PromptEncoder
from lit_opd.prompts.sources import DataSource
from lit_opd.run.lightning import log_agreed
from lit_opd.run.tracking import crossed, log_media, log_numbers, wandb_runs

DEFAULT_STEPS = (0, 1, 2, 5, 10, 20)
SECONDS_PER_MINUTE = 60.0
Sets = str | DataSource | list[str | DataSource]


class EarlyAIMEEvaluation(Callback):
    """avg@k, pass@k and majority@k on problem sets: before training, densely early, and at an interval after.

    Every graded sample is appended to ``evaluation.jsonl`` in the run folder as it comes; a resumed run completes a half
    evaluation and repeats no finished one, as long as its weights are the same again. The student's sampler draws the answers,
    so any engine serves. Random streams are its own: training gives the same weights with and without this callback. Metrics:
    docs/evaluation.md.

    Args:
        sets: files (.jsonl, .parquet), folders or hub ids, e.g. AIME 2024 and 2025; problem and answer columns are found
            among the usual names. Of a bare hub id the test split is taken, else validation, else train.
        steps: optimizer steps to evaluate at, 0 is before training; default 0, 1, 2, 5, 10, 20. Empty for none.
        every: also at every multiple of so many steps, 0 included.
        samples: answers a problem (the k of avg@k).
        temperature: of these answers, > 0.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        max_new_tokens: response slots, default the sampler's.
        seed: of random streams, of the subset under a budget and of bootstrap intervals.
        prompt_suffix: added at the end of problems that mention no box; null for none.
        chat_template: as in ``PromptDataModule``; null takes the data module's.
        template_options: variables of the template; null takes the data module's.
        system_prompt: null takes the data module's.
        batch: rows a call of the sampler on each rank.
        token_budget: response tokens one evaluation of all sets may take at most; problems are left out by seed to fit.
        minutes: wall minutes one evaluation of all sets may take, estimated from a first batch; likewise.
        compare_to: another run's ``evaluation.jsonl`` or run folder, for paired differences at equal steps.
        target: accuracy in (0, 1]; steps and tokens to reach it are logged once avg@k is there.
        grader: answers that are no integers are compared in its worker processes.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        sets: Sets,
        steps: list[int] | None = None,
        every: int | None = None,
        samples: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int | None = None,
        seed: int = 42,
        prompt_suffix: str | None = PROMPT_SUFFIX,
        chat_template: bool | Literal["auto"] | None = None,
        template_options: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        batch: int = 64,
        token_budget: int | None = None,
        minutes: float | None = None,
        compare_to: str | None = None,
        target: float | None = None,
        grader: Grader | None = None,
    ) -> None:
        parts = sets if isinstance(sets, list) else [sets]
        self.sources = [DataSource(part) if isinstance(part, str) else part for part in parts]
        self.steps, self.every = list(DEFAULT_STEPS) if steps is None else list(steps), every
        self.samples, self.temperature, self.top_p, self.top_k = samples, temperature, top_p, top_k
        self.max_new_tokens, self.seed, self.prompt_suffix = max_new_tokens, seed, prompt_suffix
        self.chat_template, self.template_options, self.system_prompt = chat_template, template_options, system_prompt
        self.batch, self.token_budget, self.minutes = batch, token_budget, minutes
        self.compare_to, self.target = compare_to, target
        self.grader = grader or Grader()
        self._check_values()
        self._sets: list[EvaluationSet] | None = None
        self._other: Comparison | None = None
        self._planned: dict[str, int] = {}  # problems of each set under the minutes budget
        self._tokens = 0  # sampled for training so far, all ranks
        self._last = 0  # optimizer step at the end of the last training batch
        self._told_budget = False
        self._loaded_step = 0  # optimizer step of a checkpoint that is only evaluated

    def _check_values(self) -> None:
        allowed = {
            "sources": (bool(self.sources), "at least one set"),
            "steps": (all(step >= 0 for step in self.steps), "steps >= 0"),
            "every": (self.every is None or self.every >= 1, ">= 1 or null"),
            "samples": (self.samples >= 1, ">= 1"),
            "temperature": (0 < self.temperature < math.inf, "> 0 and finite"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps all candidates)"),
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, ">= 1 or null"),
            "batch": (self.batch >= 1, ">= 1"),
            "token_budget": (self.token_budget is None or self.token_budget >= 1, ">= 1 or null"),
            "minutes": (self.minutes is None or self.minutes > 0, "> 0 or null"),
            "target": (self.target is None or 0 < self.target <= 1, "in (0, 1] or null"),
        }
        for name, (holds, wanted) in allowed.items():
            if not holds:
                shown = "sets" if name == "sources" else name
                raise InputError(f"`EarlyAIMEEvaluation.{shown}` must be {wanted}, got {getattr(self, name)!r}")
        if not self.steps and self.every is None:
            raise InputError("`EarlyAIMEEvaluation.steps` must name a step where `every` is null, got []")

    # -- before the run ----------------------------------------------------------------------------------------------

    def check(self, pl_module: Answering, data: PromptDataModule | None) -> None:
        """Read and render every set; all errors of the user come now, before anything is written.

        Args:
            pl_module: for its tokenizer, context window and sampling defaults.
            data: the data module, whose template settings serve where this callback has none, and whose ``tokenizer`` renders.
        """
        if self._sets is not None:
            return
        renders = isinstance(data, PromptDataModule) and data.tokenizer_path
        encoder = PromptEncoder(
            data.encoder.tokenizer if data is not None and renders else pl_module.tokenizer,
            self._template("chat_template", data, "auto"),
            self._template("template_options", data, None),
            self._template("system_prompt", data, None),
            owner="EarlyAIMEEvaluation.",
            tools=pl_module.sampler.tools,
        )
        sets = load_sets(self.sources, encoder, suffix=self.prompt_suffix, seed=self.seed)
        window = getattr(pl_module.student_config.get_text_config(), "max_position_embeddings", None)
        require_room(sets, self._length(pl_module), window)
        longest = max(loaded.longest_prompt for loaded in sets) + self._length(pl_module)
        pl_module.sampler.make_room(longest, field="EarlyAIMEEvaluation.max_new_tokens")
        if self.compare_to is not None:
            self._other = read_comparison(self.compare_to, [loaded.name for loaded in sets])
        self._sets = sets

    def _template(self, name: str, data: PromptDataModule | None, default: Any) -> Any:
        own = getattr(self, name)
        return own if own is not None else getattr(data, name, default)

    def _length(self, pl_module: Answering) -> int:
        return self.max_new_tokens or int(pl_module.sampler.max_new_tokens)

    def sampled_batch(self, pl_module: Answering, *, ranks: int) -> SampledBatch | None:
        """The largest call of the sampler on one of ``ranks``, whose memory ``preflight`` counts; None before ``check``."""
        if self._sets is None:
            return None
        length, sizes = self._length(pl_module), {loaded.name: len(loaded.problems) for loaded in self._sets}
        if self.token_budget is not None and self.minutes is None:
            sizes = shared_out(sizes, self.samples, self.token_budget / length)
        rows = min(self.batch, math.ceil(max(sizes.values()) * self.samples / ranks))
        return SampledBatch(rows, max(loaded.longest_prompt for loaded in self._sets), length)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The checks, for those who call the trainer themselves."""
        if stage in ("fit", "validate", "test"):
            self.check(_answering(pl_module), getattr(trainer, "datamodule", None))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"tokens": self._tokens, "planned": dict(self._planned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._tokens, self._planned = state_dict["tokens"], dict(state_dict["planned"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step: ``validate`` and ``test`` restore the weights only."""
        self._loaded_step = int(checkpoint["global_step"])

    # -- when --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training, or where a resumed run left off."""
        file = self._file(trainer)
        step = self._last = trainer.global_step
        weights = weights_mark(_answering(pl_module))
        with shared_failure():
            if trainer.is_global_zero:
                file.repair()
                if trainer.ckpt_path is None and step == 0:
                    _set_aside(file.path)
                else:
                    _set_later_aside(file, step, weights)
        due = step in self.steps or (self.every is not None and step % self.every == 0)
        if due and not (trainer.ckpt_path is not None and self._finished(trainer, _answering(pl_module), step, file)):
            self._evaluate(trainer, _answering(pl_module), step, file)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """On schedule; a batch that makes several optimizer steps is evaluated once at its end."""
        step, last = trainer.global_step, self._last
        self._last = step
        self._tokens += int(trainer.callback_metrics.get("train/tokens", torch.tensor(0)))
        listed = any(last < wanted <= step for wanted in self.steps)
        if listed or (self.every is not None and crossed(step, last, self.every)):
            self._evaluate(trainer, _answering(pl_module), step, self._file(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand-alone: ``train.py validate``. The validation inside a fit is the module's own."""
        if trainer.state.fn in ("validate", "test"):
            file = EvaluationFile(self._file(trainer).path.with_name(f"evaluation-{trainer.state.fn.value}.jsonl"))
            if trainer.is_global_zero:
                file.path.unlink(missing_ok=True)
            log_agreed(pl_module, self._evaluate(trainer, _answering(pl_module), self._loaded_step, file))

    on_test_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the worker processes."""
        self.grader.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the worker processes."""
        self.grader.close()

    def _file(self, trainer: Trainer) -> EvaluationFile:
        return EvaluationFile(Path(trainer.default_root_dir) / FILE_NAME)

    # -- what --------------------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: Trainer, pl_module: Answering, step: int, file: EvaluationFile) -> dict[str, float]:
        """Evaluate all sets, log and tell; metrics by full name, equal on all ranks."""
        values: dict[str, float] = {}
        with left_out(trainer), undisturbed(pl_module), trainer.precision_plugin.val_step_context():
            runs = self._runs(pl_module, file)
            sizes = self._sizes(trainer, pl_module, runs, file)
            weights = weights_mark(pl_module)
            for run in runs:
                name = run.problems.name
                found = run.run(pl_module, step=step, weights=weights, tokens=self._tokens, num_problems=sizes[name])
                values |= {f"eval/{name}/{key}": value for key, value in found.items()}
        values |= trainer.strategy.broadcast(
            self._compared(trainer, runs, step, file) if trainer.is_global_zero else {}
        )
        if trainer.state.fn == "fit":
            log_numbers(trainer, values, step)
        for run in runs:
            rank_zero_info(_line(run.problems, self.samples, step, values))
        return values

    def _runs(self, pl_module: Answering, file: EvaluationFile) -> list[SetEvaluation]:
        settings = AnswerSettings(
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self._length(pl_module),
            seed=self.seed,
            rows=self.batch,
        )
        assert self._sets is not None
        return [SetEvaluation(loaded, settings, self.grader, file) for loaded in self._sets]

    def _finished(self, trainer: Trainer, pl_module: Answering, step: int, file: EvaluationFile) -> bool:
        """True when the file holds this step's evaluation of every set; asked where a run goes on, equal on all ranks."""
        wanted = {(run.problems.name, step, run.fingerprint) for run in self._runs(pl_module, file)}
        found = past_evaluations(file.rows()) if trainer.is_global_zero else []
        return trainer.strategy.broadcast(wanted <= {(past.set, past.step, past.settings) for past in found})

    def _compared(
        self, trainer: Trainer, runs: list[SetEvaluation], step: int, file: EvaluationFile
    ) -> dict[str, float]:
        """Differences to step 0 and to the other run, and the way to the target, by full name; on rank 0."""
        prints = {run.fingerprint for run in runs}
        past = Comparison.of([found for found in past_evaluations(file.rows()) if found.settings in prints])
        values: dict[str, float] = {}
        for run in runs:
            name = run.problems.name
            now, start = past.at(name, step), past.at(name, 0)
            assert now is not None  # it was just completed
            found = difference("delta_start", now, start, seed=self.seed) if step else {}
            if self._other is not None:
                found |= difference("delta_run", now, self._matching(name, step, run), seed=self.seed)
            if trainer.state.fn == "fit":
                found |= self._way(past.history(name))
            values |= {f"eval/{name}/{key}": value for key, value in found.items()}
            if start is not None and step:
                self._log_flips(trainer, run.problems, start, now, step)
        return values

    def _way(self, history: list[PastEvaluation]) -> dict[str, float]:
        """Steps and tokens to the target, empty before it is reached."""
        first = reached(history, self.target) if self.target is not None else None
        return {} if first is None else {"steps_to_target": float(first.step), "tokens_to_target": float(first.tokens)}

    def _matching(self, name: str, step: int, run: SetEvaluation) -> PastEvaluation | None:
        assert self._other is not None
        theirs = self._other.at(name, step)
        if theirs is not None and theirs.settings != run.fingerprint:
            rank_zero_warn(f"{self.compare_to}: {name!r} was evaluated there with other settings, prompts or seed")
        return theirs

    def _log_flips(
        self, trainer: Trainer, problems: EvaluationSet, start: PastEvaluation, now: PastEvaluation, step: int
    ) -> None:
        """A W&B table of the problems whose accuracy changed most since step 0."""
        if not wandb_runs(trainer):
            return
        import wandb

        by_id = {problem.problem_id: problem for problem in problems.problems}
        table = wandb.Table(columns=["problem_id", "problem", "reference", "start", "now", "change"])
        for flip in flips(start, now):
            problem = by_id[flip.problem_id]
            table.add_data(flip.problem_id, problem.text, problem.reference, flip.start, flip.now, flip.change)
        log_media(trainer, {f"eval/{problems.name}/flips": table}, step)

    # -- budget ------------------------------------------------------------------------------------------------------

    def _sizes(
        self, trainer: Trainer, pl_module: Answering, runs: list[SetEvaluation], file: EvaluationFile
    ) -> dict[str, int]:
        """Problems of each set that fit the budget; the same at every step, so that steps compare."""
        whole = {run.problems.name: len(run.problems.problems) for run in runs}
        sizes = whole
        if self.token_budget is not None:
            sizes = shared_out(whole, self.samples, self.token_budget / self._length(pl_module))
        if self.minutes is not None:
            if self._planned.keys() != whole.keys():
                self._planned = self._measured(trainer, pl_module, runs, file, whole)
            sizes = {name: min(size, self._planned[name]) for name, size in sizes.items()}
        if sizes != whole and not self._told_budget:
            self._told_budget = True
            parts = ", ".join(f"{sizes[name]} of {count} in {name}" for name, count in whole.items())
            rank_zero_info(f"the evaluation budget leaves a random subset of problems (seed {self.seed}): {parts}")
        return sizes

    def _measured(
        self,
        trainer: Trainer,
        pl_module: Answering,
        runs: list[SetEvaluation],
        file: EvaluationFile,
        whole: dict[str, int],
    ) -> dict[str, int]:
        """From the lines of a killed run where there are some, else from the speed of one batch."""
        assert self.minutes is not None
        prints = {run.fingerprint for run in runs}
        known: dict[str, int] = {}
        if trainer.is_global_zero:
            known = {row.set: row.problems for row in file.rows(aside=True) if row.settings in prints}
        known = trainer.strategy.broadcast(known)
        if known.keys() >= whole.keys():
            return {name: known[name] for name in whole}
        seconds = runs[0].seconds_per_row(pl_module)
        planned = shared_out(whole, self.samples, self.minutes * SECONDS_PER_MINUTE / seconds)
        return trainer.strategy.broadcast({name: known.get(name, size) for name, size in planned.items()})


def _answering(pl_module: LightningModule) -> Answering:
    """Hooks are handed any module; this project's has what an evaluation asks for."""
    return cast(Answering, pl_module)


def shared_out(whole: dict[str, int], samples: int, rows: float) -> dict[str, int]:
    """Problems of each set when ``rows`` samples may be drawn in all: sets shrink alike, each keeps at least one.

    >>> shared_out({"a": 30, "b": 30}, samples=32, rows=960)
    {'a': 15, 'b': 15}
    """
    fraction = min(1.0, rows / (samples * sum(whole.values())))
    return {name: max(1, int(count * fraction)) for name, count in whole.items()}


def _set_aside(path: Path) -> None:
    """A new run does not go on with another run's lines."""
    if path.is_file() and path.stat().st_size:
        path.replace(path.with_name(f"{path.name}.previous"))
        rank_zero_warn(f"{path} was another run's; it is now {path.name}.previous")


def _set_later_aside(file: EvaluationFile, step: int, weights: str) -> None:
    """A run that goes on has no lines of later steps, nor of other weights at its step; those it makes again come back."""
    own = (weights, UNKNOWN_WEIGHTS)
    moved = file.set_aside(lambda row: row.step < step or (row.step == step and row.weights in own))
    if moved:
        rank_zero_info(
            f"the run goes on from step {step}: its evaluations at {', '.join(map(str, moved))} are in {file.aside.name} now; "
            "one counts again where its step is made again with the same weights"
        )


def _line(problems: EvaluationSet, samples: int, step: int, values: dict[str, float]) -> str:
    """One line for the log."""
    name = problems.name
    mean, low, high = (values[f"eval/{name}/avg_at_k{end}"] for end in ("", "_low", "_high"))
    text = f"evaluation at step {step}: {name} avg@{samples} {mean:.3f} [{low:.3f}, {high:.3f}]"
    if problems.repeats:
        text += f" over {values[f'eval/{name}/problems']:.0f} different problems, repeated in the set"
    for key, label in (("delta_start", "step 0"), ("delta_run", "the other run")):
        if f"eval/{name}/{key}" in values:
            text += f", {values[f'eval/{name}/{key}']:+.3f} to {label}"
    return text
