"""The ``PromptDataModule``: ties sources, filters, encoding and loading together."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_opd import distributed, hub
from lit_opd.errors import InputError, first_line, require
from lit_opd.prompts.encoding import (
    EncodedPrompt,
    PromptEncoder,
    SpecialTokensInText,
    encode_rows,
    pad_token_id,
)
from lit_opd.prompts.hindsight import Hindsight, HindsightPrompt, Trial
from lit_opd.prompts.loading import EvaluationLoader, PromptLoader, PromptOrder
from lit_opd.prompts.sources import ColumnNames, DataSource, PromptRow, read_prompts, require_unique_ids
from lit_opd.prompts.teacher_prompt import TeacherPrompt
from lit_opd.prompts.teacher_prompt import teacher_prompt as as_teacher_prompt
from lit_opd.streams import stable_hash
from lit_opd.types import DataRow

_HASH_RANGE = 1 << 63
DEFAULT_SPLIT_SEED = 42
_POSITIVE = ("prompt_batch", "samples_per_prompt", "max_prompt_tokens", "val_batch")


class PromptDataModule(LightningDataModule):
    """Prompts for on-policy distillation, from JSON lines, Parquet, a folder or a hub data set.

    An epoch of the trainer is ``len(train_dataloader())`` batches: enough to draw every prompt once (with weights:
    each source in its share, see ``PromptOrder``). The constructor stores settings; ``setup`` reads and tokenises.

    Args:
        train: a source, or several that are mixed (``DataSource`` with weights).
        val: validation source(s); also used by test and predict.
        prompt_batch: prompts a step over all ranks, a multiple of the number of ranks.
        samples_per_prompt: responses sampled a prompt, in adjacent rows on one rank.
        max_prompt_tokens: longest rendered prompt, in the student's tokens.
        prompt_column: column of the prompt, text or chat messages (a trailing assistant turn is dropped); with dots inside an
            object. None: the first usual name (prompt, problem, question, ...), together with what belongs to it there
            (Alpaca's input, a system column); see docs/data.md.
        answer_column: column of the reference answer, such as reward_model.ground_truth; None: the first usual name, or no
            answers.
        id_column: column of unique row ids; None: "id" where present, else "<file stem>-<row>"; "#": always the latter.
        teacher_column: column that names the teacher of a row; None: one teacher.
        filter: ``column op value``, or several that must all hold, on ``train``; see ``RowFilter``. A validation
            source has its own, ``DataSource.filter``.
        system_prompt: put before conversations without a system message.
        chat_template: True, False (plain text), or "auto": when the tokenizer has one.
        template_options: variables of the template, e.g. {"enable_thinking": false}.
        teacher_tokenizer: folder or hub id, where the teacher renders its own template; None: the module's
            ``teacher_tokenizer``, else the student's.
        teacher_chat_template: None: like the student's.
        teacher_template_options: None: the student's; a teacher with a tokenizer of its own does not take ``chat_template``.
        teacher_system_prompt: None: the student's.
        teacher_prompt: what the teacher reads in place of the student's prompt, of the row's columns: a text such as
            "{problem} A correct solution: {solution} Now solve it yourself.", chat messages with such contents, or a class of
            your own (``TeacherPrompt``); or of what was sampled: ``PeerDemonstration``, or a ``HindsightPrompt`` of your own.
            See docs/data.md. None: the student's.
        val_fraction: share of the training rows held out by a hash of (split seed, row id), instead of ``val``. Rows of other ids
            may repeat a prompt on both sides; a warning counts them.
        val_batch: validation prompts a batch over all ranks.
        val_limit: keep the first so many validation prompts.
        seed: of the order of the training prompts; None: the run's (the module's ``seed``, else ``seed_everything``).
        split_seed: of ``val_fraction``; None: ``seed`` where that is set, else 42, so that runs of other seeds are measured on
            the same rows.
        too_long: what happens to prompts above ``max_prompt_tokens``: "filter" (counted) or "error".
        special_tokens_in_text: "escape": strings like <|im_end|> in the data stay text; "refuse": they are an error;
            "allow": they become control tokens, and prompts that are rendered already are taken as they are.
        tokenizer: folder or hub id, of the student's vocabulary, whose chat template renders; None: the tokenizer of the
            trainer's module.
        pad_token: where the tokenizer has no pad token.
        keep_rows: hand the columns of each row on with its prompt; always done where the trainer's sampler asks for them, as one
            that plays an environment does.
    """

    def __init__(
        self,
        train: str | DataSource | list[str | DataSource],
        val: str | DataSource | list[str | DataSource] | None = None,
        prompt_batch: int = 128,
        samples_per_prompt: int = 1,
        max_prompt_tokens: int = 2048,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        id_column: str | None = None,
        teacher_column: str | None = None,
        filter: str | list[str] | None = None,
        system_prompt: str | None = None,
        chat_template: bool | Literal["auto"] = "auto",
        template_options: dict[str, Any] | None = None,
        teacher_tokenizer: str | None = None,
        teacher_chat_template: bool | Literal["auto"] | None = None,
        teacher_template_options: dict[str, Any] | None = None,
        teacher_system_prompt: str | None = None,
        teacher_prompt: str | list[dict[str, str]] | TeacherPrompt | HindsightPrompt | None = None,
        val_fraction: float | None = None,
        val_batch: int = 64,
        val_limit: int | None = None,
        seed: int | None = None,
        too_long: Literal["filter", "error"] = "filter",
        special_tokens_in_text: SpecialTokensInText = "escape",
        tokenizer: str | None = None,
        pad_token: str | None = None,
        split_seed: int | None = None,
        keep_rows: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.prompt_batch, self.samples_per_prompt = prompt_batch, samples_per_prompt
        self.max_prompt_tokens, self.too_long = max_prompt_tokens, too_long
        self.columns = ColumnNames(prompt_column, answer_column, id_column, teacher_column)
        self.filter = filter
        self.system_prompt, self.chat_template, self.template_options = system_prompt, chat_template, template_options
        self.teacher_tokenizer_path = teacher_tokenizer
        self.teacher_chat_template, self.teacher_system_prompt = teacher_chat_template, teacher_system_prompt
        self.teacher_template_options = teacher_template_options
        self.teacher_prompt: TeacherPrompt | HindsightPrompt | None = as_teacher_prompt(teacher_prompt)
        self.val_fraction, self.val_batch, self.val_limit = val_fraction, val_batch, val_limit
        self.seed, self.split_seed, self.special_tokens_in_text = seed, split_seed, special_tokens_in_text
        self.tokenizer_path, self.pad_token, self.keep_rows = tokenizer, pad_token, keep_rows
        self.may_differ = False  # from the checkpoint's data, where a run goes on and was told so
        self._tokenizers: tuple[Any | None, Any | None] = (None, None)  # what `use_tokenizer` was given
        self._sampler: Any = None  # what `use_sampler` was given
        self._forget()

    def _forget(self) -> None:
        self._train_prompts: list[EncodedPrompt] | None = None
        self._val_prompts: list[EncodedPrompt] | None = None
        self._train_rows: list[list[PromptRow]] | None = None
        self._train_texts: dict[str, str] = {}
        self._loader: PromptLoader | None = None
        self._encoders: tuple[PromptEncoder, PromptEncoder | None] | None = None
        self._state_to_load: dict[str, int] | None = None

    # ------------------------------------------------------------------------------------------------- tokenizers

    def use_tokenizer(self, tokenizer: Any, teacher_tokenizer: Any | None = None) -> PromptDataModule:
        """The tokenizers of student and teacher; other ones forget what was set up with the last.

        The setting ``tokenizer`` takes the student's place where it has the same vocabulary and is refused where not; of the
        teacher's, the object given here holds before the setting.
        """
        if self._tokenizers[0] is not tokenizer or self._tokenizers[1] is not teacher_tokenizer:
            self._tokenizers = (tokenizer, teacher_tokenizer)
            self._forget()
        return self

    def use_sampler(self, sampler: Any) -> PromptDataModule:
        """Make of each row what this sampler asks for: columns (``reads_rows``), texts (``reads_texts``), the ``tools`` shown."""
        if self._sampler is not sampler:
            self._sampler = sampler
            self._forget()
        return self

    @property
    def encoder(self) -> PromptEncoder:
        """How the student's prompts are rendered."""
        return self._both_encoders()[0]

    @property
    def teacher_encoder(self) -> PromptEncoder | None:
        """How the teacher's prompts are rendered, None where it reads the student's."""
        return self._both_encoders()[1]

    def _both_encoders(self) -> tuple[PromptEncoder, PromptEncoder | None]:
        if self._encoders is None:
            tokenizer, teacher_tokenizer = self._both_tokenizers()
            student = PromptEncoder(
                tokenizer,
                self.chat_template,
                self.template_options,
                self.system_prompt,
                self.special_tokens_in_text,
                owner="PromptDataModule.",
                tools=self._sampler_has("tools"),
            )
            self._encoders = (student, self._teacher_encoder(tokenizer, teacher_tokenizer))
        return self._encoders

    def _teacher_encoder(self, tokenizer: Any, teacher_tokenizer: Any | None) -> PromptEncoder | None:
        chat_template, options, system = (
            self.teacher_chat_template,
            self.teacher_template_options,
            self.teacher_system_prompt,
        )
        own = (chat_template, options, system, self.teacher_prompt)
        writes = isinstance(
            self.teacher_prompt, HindsightPrompt
        )  # the student writes a part of it, and may write anything
        shares = teacher_tokenizer in (None, tokenizer)
        if shares and all(setting is None for setting in own):
            return None
        if options is None:
            options = self.template_options if shares else _without_template(self.template_options)
        return PromptEncoder(
            tokenizer if teacher_tokenizer is None else teacher_tokenizer,
            self.chat_template if chat_template is None else chat_template,
            options,
            self.system_prompt if system is None else system,
            "escape" if writes and self.special_tokens_in_text == "refuse" else self.special_tokens_in_text,
            owner="PromptDataModule.teacher_",
            tools=self._sampler_has("tools"),
        )

    @property
    def hindsight(self) -> Hindsight | None:
        """What gives sampled responses the teacher's prompts; None where those are made of columns, or of nothing."""
        own = self.teacher_prompt
        if not isinstance(own, HindsightPrompt) or self.teacher_encoder is None:
            return None
        pads = self._shared_options()
        pad_id = pads["pad_id"] if pads["teacher_pad_id"] is None else pads["teacher_pad_id"]
        return Hindsight(
            own,
            student=self.encoder,
            teacher=self.teacher_encoder,
            samples=self.samples_per_prompt,
            pad_id=pad_id,
            keeps_rows=self._hands_rows_on,
        )

    @property
    def _hands_rows_on(self) -> bool:
        """Something asks for the data rows behind the prompts."""
        return self.keep_rows or bool(self._sampler_has("reads_rows"))

    def _sampler_has(self, name: str) -> Any:
        """An attribute of the sampler given to ``use_sampler``, else of the trainer's; None without one."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        sampler = getattr(module, "sampler", None) if self._sampler is None else self._sampler
        return getattr(sampler, name, None)

    def _both_tokenizers(self) -> tuple[Any, Any | None]:
        student = self._found_tokenizer(self._tokenizers[0], None, "tokenizer")
        if self.tokenizer_path:
            own = loaded_tokenizer(self.tokenizer_path, "tokenizer")
            if student is not None:
                _require_vocabulary(own, student, self.tokenizer_path)
            student = own
        if student is None:
            raise InputError(
                "`PromptDataModule.tokenizer` must be a tokenizer folder or hub id when the module has no `tokenizer`, "
                "got None; set it, or call `use_tokenizer`"
            )
        return student, self._found_tokenizer(self._tokenizers[1], self.teacher_tokenizer_path, "teacher_tokenizer")

    def _found_tokenizer(self, given: Any | None, path: str | None, name: str) -> Any | None:
        """The object given to ``use_tokenizer``, else the configured path's, else the trainer's module's."""
        if given is not None:
            return given
        if path:
            return loaded_tokenizer(path, name)
        return getattr(self.trainer.lightning_module, name, None) if self.trainer is not None else None

    # ------------------------------------------------------------------------------------------------------ set-up

    def setup(self, stage: str | None = None) -> None:
        """Read, filter and tokenise what ``stage`` needs; a second call does nothing.

        Raises:
            InputError: for every setting or row that is wrong, before anything is trained.
        """
        self._check_settings()
        pad_token_id(self.encoder.tokenizer, self.pad_token, field="PromptDataModule.pad_token")
        if stage in ("fit", None) and self._train_prompts is None:
            self._check_ranks()
            self._train_prompts, self._order = self._ordered_train()
            self._warn_of_trained()
        if self._val_prompts is None:
            self._val_prompts = self._encoded_val()
            self._warn_of_trained()
        if self._train_prompts is not None:
            self._train_rows = None  # the texts have served
        if stage in ("validate", "test", "predict") and not self._val_prompts:
            raise InputError(f"`PromptDataModule.val` must name data (or set `val_fraction`) to {stage}, got None")

    def _check_settings(self) -> None:
        own, limit, fraction = type(self).__name__, self.val_limit, self.val_fraction
        for name in _POSITIVE:
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, f"{own}.{name}", "at least 1", value)
        require(limit is None or limit >= 1, f"{own}.val_limit", "at least 1 or None", limit)
        require(fraction is None or 0 < fraction < 1, f"{own}.val_fraction", "between 0 and 1", fraction)
        require(self.val is None or fraction is None, f"{own}.val_fraction", "None when `val` is given", fraction)
        require(self.too_long in ("filter", "error"), f"{own}.too_long", "'filter' or 'error'", self.too_long)
        for name, sources in (("train", self.train), ("val", self.val)):
            require(sources not in ([], ""), f"{own}.{name}", "at least one source", sources)

    def _check_ranks(self) -> None:
        world = distributed.world_size()
        field, wanted = f"{type(self).__name__}.prompt_batch", f"a multiple of the number of ranks ({world})"
        require(self.prompt_batch % world == 0, field, wanted, self.prompt_batch, "change it or the devices")

    def _ordered_train(self) -> tuple[list[EncodedPrompt], PromptOrder]:
        kept = self._split_train()[0]
        if self._sampler_has("reads_texts"):
            self._train_texts = {row.row_id: _last_user_text(row) for rows in kept for row in rows}
        sources = [self._encoded(rows, "train") for rows in kept]
        prompts = self._without_needless_teacher_ids([prompt for source in sources for prompt in source])
        order = PromptOrder([len(source) for source in sources], _weights(_source_list(self.train)), self.order_seed)
        if len(prompts) < self.prompt_batch:
            rank_zero_warn(
                f"`PromptDataModule.train` has {len(prompts)} prompts, fewer than `prompt_batch` {self.prompt_batch}: "
                "a batch repeats prompts, with different samples"
            )
        return prompts, order

    @property
    def order_seed(self) -> int:
        """Of the order of the training prompts: the setting, else the run's seed."""
        if self.seed is not None:
            return self.seed
        module = self.trainer.lightning_module if self.trainer is not None else None
        given = getattr(module, "seed", None)
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if given is None else int(given)

    def _split_train(self) -> tuple[list[list[PromptRow]], list[PromptRow]]:
        """Training rows by source, and the rows held out by ``val_fraction``."""
        if self._train_rows is None:
            self._train_rows = self._read(self.train, self.filter)
        if self.val_fraction is None:
            return self._train_rows, []
        kept = [[row for row in rows if not self._held_out(row)] for rows in self._train_rows]
        held_out = [row for rows in self._train_rows for row in rows if self._held_out(row)]
        field, wanted = f"{type(self).__name__}.val_fraction", "such that train (each source) and validation have rows"
        remedy = "change it or `split_seed`, or give a `val` file"
        require(bool(held_out) and all(kept), field, wanted, self.val_fraction, remedy)
        return kept, held_out

    def _held_out(self, row: PromptRow) -> bool:
        assert self.val_fraction is not None
        seeds = (self.split_seed, self.seed, DEFAULT_SPLIT_SEED)
        seed = next(seed for seed in seeds if seed is not None)
        return stable_hash(f"split\0{seed}\0{row.row_id}") < self.val_fraction * _HASH_RANGE

    def _encoded_val(self) -> list[EncodedPrompt]:
        if self.val is not None:
            rows = [row for source in self._read(self.val, None) for row in source]
        else:
            rows = self._split_train()[1] if self.val_fraction is not None else []
        encoded = self._encoded(rows, "val") if rows else []
        return self._without_needless_teacher_ids(encoded)[: self.val_limit]

    def _warn_of_trained(self) -> None:
        """Where validation prompts have the tokens of training prompts, whatever their row ids."""
        if not self._train_prompts or not self._val_prompts:
            return
        trained = {prompt.ids.numpy().tobytes() for prompt in self._train_prompts}
        found = [prompt for prompt in self._val_prompts if prompt.ids.numpy().tobytes() in trained]
        if found:
            field = "val" if self.val_fraction is None else "val_fraction"
            rank_zero_warn(
                f"`PromptDataModule.{field}`: {len(found)} of {len(self._val_prompts)} validation prompts are trained on "
                f"too (the same tokens; first: row {found[0].row_id!r}), so validation is not of unseen prompts alone; leave "
                "repeated prompts out of `train`, or give a `val` file of others"
            )

    def _read(
        self, sources: str | DataSource | list[str | DataSource], filters: str | list[str] | None
    ) -> list[list[PromptRow]]:
        given = self.teacher_prompt
        own = Trial(given) if isinstance(given, HindsightPrompt) else given
        parts = [
            read_prompts(source, self.columns, filters=filters, teacher_prompt=own) for source in _source_list(sources)
        ]
        require_unique_ids([row for rows in parts for row in rows])
        return parts if given is own else [self._tried(rows) for rows in parts]

    def _tried(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """``rows`` as the teacher reads them without a hint, once one of them was rendered with a hint."""
        encode_rows(rows[:1], self.encoder, self.teacher_encoder)
        return [replace(row, teacher_prompt=None) for row in rows]

    def _encoded(self, rows: Sequence[PromptRow], stage: str) -> list[EncodedPrompt]:
        keep = (
            self.keep_rows or bool(self._sampler_has("reads_rows")) or isinstance(self.teacher_prompt, HindsightPrompt)
        )
        encoded = encode_rows(rows, self.encoder, self.teacher_encoder, keep_rows=keep)
        too_long = [(row, prompt) for row, prompt in zip(rows, encoded, strict=True) if self._too_long(prompt)]
        if too_long:
            longest = max(len(prompt.ids) for _, prompt in too_long)
            row, prompt = too_long[0]
            if self.too_long == "error":
                raise InputError(
                    f"{row.where}: the prompt has {len(prompt.ids)} tokens, more than "
                    f"`PromptDataModule.max_prompt_tokens` {self.max_prompt_tokens} ({len(too_long)} such rows, the "
                    f"longest {longest}); raise it, or set `too_long: filter`"
                )
            if len(too_long) == len(rows):
                raise InputError(
                    f"`PromptDataModule.max_prompt_tokens` must leave prompts, got {self.max_prompt_tokens}: all "
                    f"{len(rows)} {stage} prompts are longer, the longest has {longest} tokens; raise it"
                )
            rank_zero_info(
                f"{stage}: dropped {len(too_long)} of {len(rows)} prompts longer than {self.max_prompt_tokens} tokens "
                f"(longest {longest})"
            )
        return [prompt for prompt in encoded if not self._too_long(prompt)]

    def _too_long(self, prompt: EncodedPrompt) -> bool:
        return len(prompt.ids) > self.max_prompt_tokens

    def rows_by_teacher(self) -> dict[str | None, str]:
        """Every teacher name in what was set up (None where a row has none) with the first row that has it."""
        found: dict[str | None, str] = {}
        for stage, prompts in (("train", self._train_prompts), ("val", self._val_prompts)):
            for prompt in prompts or ():
                found.setdefault(prompt.teacher, f"{stage} row {prompt.row_id!r}")
        return found

    def first_prompts(self, count: int) -> list[list[int]]:
        """The student's ids of the first training prompts, once set up; fewer where there are fewer."""
        return [prompt.ids.tolist() for prompt in (self._train_prompts or ())[:count]]

    @property
    def teacher_reads_more(self) -> bool:
        """The training prompts, once set up, are others for the teacher than for the student, or become others."""
        return isinstance(self.teacher_prompt, HindsightPrompt) or any(
            prompt.teacher_ids is not None for prompt in self._train_prompts or ()
        )

    # ----------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> PromptLoader:
        """The same loader at every call: its position is the run's."""
        if self._loader is None:
            self.setup("fit")
            assert self._train_prompts is not None
            self._loader = PromptLoader(
                self._train_prompts,
                self._order,
                prompt_batch=self.prompt_batch,
                samples_per_prompt=self.samples_per_prompt,
                processed=self._num_processed if self.trainer is not None else None,
                repeated=self._num_repeated(),
                may_differ=self.may_differ,
                **self._shared_options(),
            )
        if self._state_to_load is not None:
            self._loader.load_state_dict(self._state_to_load)
            self._state_to_load = None
        return self._loader

    def _num_repeated(self) -> int | None:
        """Batches that ``trainer.overfit_batches`` trains on again and again; None for all."""
        asked = self.trainer.overfit_batches if self.trainer is not None else 0  # type: ignore[attr-defined]
        epoch = math.ceil(len(self._order) / self.prompt_batch)
        return None if not asked else max(1, int(asked * epoch)) if isinstance(asked, float) else int(asked)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Validation prompts in file order; an empty list without validation data."""
        self.setup("val")
        if not self._val_prompts:
            return []
        return EvaluationLoader(self._val_prompts, batch=self.val_batch, **self._shared_options())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _shared_options(self) -> dict[str, Any]:
        teacher = self.teacher_encoder.tokenizer if self.teacher_encoder else None
        return {
            "pad_id": pad_token_id(self.encoder.tokenizer, self.pad_token, field="PromptDataModule.pad_token"),
            "teacher_pad_id": getattr(teacher, "pad_token_id", None),
            "rank": distributed.rank(),
            "world": distributed.world_size(),
        }

    def _num_processed(self) -> int:
        assert self.trainer is not None
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The loader's position. Lightning restores a loader's own state only inside an epoch, this one always."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training asks for its loader, so validating other data with a checkpoint is no error."""
        self._state_to_load = state_dict.get("loader")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, the teacher's rendering included (its bound where that is made after sampling);
        ``max_prompt_tokens`` before the data is read."""
        prompts = [*(self._train_prompts or ()), *(self._val_prompts or ())]
        rendered = [ids for prompt in prompts for ids in (prompt.ids, prompt.teacher_ids) if ids is not None]
        longest = max((len(ids) for ids in rendered), default=self.max_prompt_tokens)
        own = self.teacher_prompt
        return max(longest, own.max_prompt_tokens) if isinstance(own, HindsightPrompt) else longest

    @property
    def training_prompts(self) -> dict[str, torch.Tensor]:
        """Ids of every training prompt by row id, int64 [P] each, as the student reads it; empty before ``setup``."""
        return {prompt.row_id: prompt.ids for prompt in self._train_prompts or ()}

    @property
    def training_texts(self) -> dict[str, str]:
        """The last user turn of every training prompt by row id; empty where no sampler compares it, and before ``setup``."""
        return self._train_texts

    @property
    def training_rows(self) -> list[DataRow]:
        """The data rows that go with training prompts; empty where nothing reads them, and before ``setup``."""
        return [prompt.data for prompt in self._train_prompts or () if prompt.data is not None]

    @property
    def num_prompts(self) -> tuple[int, int]:
        """Training and validation prompts that were read and kept."""
        return len(self._train_prompts or ()), len(self._val_prompts or ())

    def _without_needless_teacher_ids(self, prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
        """Where the teacher's rendering equals the student's on all rows, one copy is enough."""
        teacher = self.teacher_encoder
        if teacher is not None and teacher.tokenizer.get_vocab() != self.encoder.tokenizer.get_vocab():
            return prompts  # equal numbers are other tokens
        if any(p.teacher_ids is not None and not torch.equal(p.ids, p.teacher_ids) for p in prompts):
            return prompts
        return [replace(prompt, teacher_ids=None) for prompt in prompts]


def _source_list(sources: str | DataSource | list[str | DataSource]) -> list[DataSource]:
    parts = sources if isinstance(sources, list) else [sources]
    return [DataSource(part) if isinstance(part, str) else part for part in parts]


def _weights(sources: Sequence[DataSource]) -> list[float] | None:
    """Relative shares, or None where no source has one."""
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) != len(sources):
        missing = next(source.path for source in sources if source.weight is None)
        raise InputError(f"`DataSource.weight` must be given for all sources or for none, got None for {missing}")
    if any(not 0 < weight < float("inf") for weight in given):
        raise InputError(f"`DataSource.weight` must be above 0, got {given}; leave a source out instead")
    return given or None


def _last_user_text(row: PromptRow) -> str:
    return next((str(message["content"]) for message in reversed(row.messages) if message["role"] == "user"), "")


def _without_template(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Variables alone: the control tokens of a template are those of one tokenizer."""
    return options and {name: value for name, value in options.items() if name != "chat_template"}


def _require_vocabulary(own: Any, student: Any, path: str) -> None:
    """Prompts are read by the student, so their tokens have its ids."""
    ours, theirs = student.get_vocab(), own.get_vocab()
    differing = [token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)]
    if differing:
        raise InputError(
            f"`PromptDataModule.tokenizer` must have the student's vocabulary, got {path!r}, in which {len(differing)} tokens "
            f"differ (such as {differing[0]!r}); leave it out, and give a chat template in `template_options` (`chat_template`)"
        )


def loaded_tokenizer(path: str, name: str) -> Any:
    """The tokenizer that the setting ``name`` names.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    if not os.path.exists(path):
        hub.silence()  # once, before its client tries again and again
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # missing folder, no network, broken files: third parties raise many types
        reason, remedy = hub.failure(first_line(error), "model")
        raise InputError(
            f"`PromptDataModule.{name}` must be a tokenizer folder or hub id, got {path!r} ({reason}); check the path, or "
            f"{remedy}"
        ) from error
