"""Sampling from a vLLM engine of the trainer's own, one a rank, on the rank's device."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from lit_opd.distributed import is_rank_zero, shared_failure
from lit_opd.errors import InputError, ServerError, require
from lit_opd.rollout.base import Sampler, SamplingSettings, Seconds
from lit_opd.rollout.engine_output import Output, reason, remedy
from lit_opd.rollout.ipc import IPC_CONFIG, IPC_ENVIRONMENT, IPCTransfer
from lit_opd.rollout.vllm import as_rollout, only_tokens, row_seeds, row_texts, sampled_tokens
from lit_opd.rollout.weights import (
    ADAPTER_RANKS,
    PACKAGE,
    StudentWeights,
    Way,
    installed_version,
    require_way,
    settled_way,
)
from lit_opd.servers.client import Malformed
from lit_opd.types import PromptBatch, Rollout

GO_ON = "then go on with --ckpt_path last"
LOOK = "see vLLM's messages above"


class VLLMEngine(Sampler):
    """Samples from ``vllm.LLM``, started at the first batch. vLLM runs its model in a child process that shares the rank's
    device; ``sleep`` frees that memory while the trainer updates.

    New weights reach it after every update, in one of these ways:

    - "folder": the student is exported, and the engine's own ``reload_weights`` reads it. Works everywhere.
    - "ipc": vLLM's weight transfer by CUDA IPC (vLLM 0.23 to 0.32), a block at a time, without a disk; the engine is started
      with random weights, so that a transfer that brought nothing cannot stay unseen.
    - "adapter": of a student with LoRA only the adapter is written; the engine holds the model the student was loaded from.

    The engine is asked for processed log-probs: they are those of the sampled distribution at any temperature, top-p, top-k.
    Keep ``PolicyLoss.importance_cap``: engine and trainer never compute exactly the same log-probs.

    Args:
        folder: where the student, its configuration or its adapter is written before the engine reads it; every rank must see it.
        weights: how they travel; "auto" is the adapter of a student with LoRA, else "ipc" where it works, else "folder". The run
            says which.
        max_logprob_gap: nats; an update whose mean |student - sampler log-prob| is larger is an error. None compares the first
            step alone: a warning above what half precision explains, an error above ten times that.
        memory_fraction: of the device's memory, for the engine's weights and KV cache; ignored on a CPU, where
            VLLM_CPU_KVCACHE_SPACE (GiB) bounds the cache.
        sleep: move the engine's weights to host memory and drop its cache after each rollout, of a conversation or a partial one
            after its last call; needs CUDA, off on a CPU.
        engine_options: further arguments of ``vllm.LLM``, such as {enforce_eager: true}.
        max_new_tokens: response slots, >= 1.
        temperature: > 0; scoring divides the logits by the same value.
        top_p: nucleus mass in (0, 1].
        top_k: candidates, 0 for all.
        stop_token_ids: ids that end a response, default those of the model's generation config and tokenizer.
    Raises:
        InputError: a value outside its range.
    """

    in_process = False
    continues = heeds_room = True
    seconds: Seconds

    def __init__(
        self,
        folder: str = "runs/vllm-student",
        max_logprob_gap: float | None = 0.5,
        memory_fraction: float = 0.4,
        sleep: bool = True,
        engine_options: dict[str, Any] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop_token_ids: list[int] | None = None,
        weights: Way = "auto",
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_p, top_k, stop_token_ids)
        self.folder, self.max_logprob_gap, self.memory_fraction = (
            Path(folder).absolute(),
            max_logprob_gap,
            memory_fraction,
        )
        self.sleep, self.engine_options, self.weights = sleep, dict(engine_options or {}), weights
        name = type(self).__name__
        require(
            max_logprob_gap is None or max_logprob_gap > 0, f"{name}.max_logprob_gap", "> 0 or null", max_logprob_gap
        )
        require(0 < memory_fraction < 1, f"{name}.memory_fraction", "in (0, 1)", memory_fraction)
        require(weights in get_args(Way), f"{name}.weights", f"one of {', '.join(get_args(Way))}", weights)
        self.seconds = Seconds("engine_start", "weights", "engine_sleep", "engine_wake")
        self._llm: Any = None
        self._way: Way | None = None  # "auto" settled
        self._transfer: IPCTransfer | None = None
        self._adapter: Any = None  # vLLM's name for the student's adapter
        self._num_adapters = 0  # that it was given
        self._output, self._asleep, self._stays_awake = Output(), False, False
        self._holds_weights = False  # it was started, and holds some of the student's
        self._version: int | None = None  # weights the engine has; None until a run has brought its own
        self._window: int | None = None  # tokens a row of training or validation may hold
        self._room = 0  # the same of other rows, see ``make_room``
        self._held: int | None = None  # the same of the running engine; None for the model's own

    def check(self, *, tokens: int | None, vocabulary: int) -> None:
        """The package is installed."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise InputError(
                "`model.sampler` must be a sampler whose packages are installed, got VLLMEngine without vllm; install the "
                "extra vllm (pip install -e .[vllm]), add --model.sampler DecodeSampler, which needs no package, or use "
                "VLLMSampler with a server of its own environment"
            )
        self._window = tokens
        if tokens is not None:
            self._require_held(tokens, "model.sampler.max_new_tokens")

    def make_room(self, tokens: int, *, field: str) -> None:
        """See ``Sampler.make_room``."""
        self._require_held(tokens, field)
        self._room = max(self._room, tokens)

    @property
    def _longest(self) -> int | None:
        """Tokens that a row may hold, None for as many as the model allows."""
        return None if self._window is None else max(self._window, self._room)

    def _require_held(self, tokens: int, field: str) -> None:
        """The length that the user chose, or that a running engine was started with, is enough."""
        held = self.engine_options.get("max_model_len", self._held)
        if isinstance(held, int) and 0 < held < tokens:
            raise InputError(
                f"`{field}` must leave room in VLLMEngine's rows of {held} tokens, got up to {tokens}, the prompt included; "
                f"lower it, or set `engine_options: {{max_model_len: {tokens}}}` before the engine starts"
            )

    def check_student(self, adapter_rank: int | None) -> None:
        """Its weights can go the configured way."""
        require_way(self.weights, adapter_rank)

    # -- weights -----------------------------------------------------------------------------------------------------

    def prepare(self, student: StudentWeights, weights_version: int) -> None:
        """Bring the student's weights to the engine, which is started before the first; called on every rank.

        Raises:
            ServerError: on every rank, the engine could not be started or could not take them.
        """
        if self._version == weights_version:
            return
        self._version = None  # the weights are of no version until all of this is done
        if self._way is None:
            self._way = self._settled(student)
        with self.seconds("weights"):
            self._write(student)
        with shared_failure():
            self._wake_or_start(student)
        with self.seconds("weights"), shared_failure(), self._failing("could not take the new weights"):
            self._take(student)
        with shared_failure(), self._failing("could not empty its cache"):
            self._wake("kv_cache")
            self._llm.reset_prefix_cache()
        self._version, self._holds_weights = weights_version, True

    def forget_weights(self) -> None:
        """See ``Sampler.forget_weights``."""
        self._version = None

    def _settled(self, student: StudentWeights) -> Way:
        """What "auto" is here, said once a run."""
        version = installed_version()
        way, why = settled_way(self.weights, student.adapter_rank, on_cuda=torch.cuda.is_available(), version=version)
        if is_rank_zero():
            print(f"vLLM {version} takes the student's weights by way of: {way} ({why})", file=sys.stderr, flush=True)
        return way

    def _write(self, student: StudentWeights) -> None:
        """What the engine reads from the folder; each of these speaks to all ranks and fails on all."""
        if self._way == "folder":
            student(self.folder)
        elif self._way == "adapter":
            student.adapter(self.folder)
        elif self._llm is None:
            student.frame(self.folder)

    def _wake_or_start(self, student: StudentWeights) -> None:
        if self._llm is not None:
            with self._failing("could not be woken"):
                self._wake("weights")
            return
        with self.seconds("engine_start"):
            self._llm, self._held = self._started(student), self._longest

    def _take(self, student: StudentWeights) -> None:
        """The engine's weights become the student's; by IPC all ranks take part to the end, whoever fails."""
        if self._way == "ipc":
            self._transfer = self._transfer or IPCTransfer(self._llm, installed_version())
            self._transfer.send(student)
        elif self._way == "adapter":
            request = importlib.import_module(f"{PACKAGE}.lora.request").LoRARequest
            self._num_adapters += 1  # a new number for each: vLLM keeps what it read under the old one
            self._adapter = request(f"student-{self._num_adapters}", self._num_adapters, str(self.folder))
        elif self._holds_weights:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})

    @property
    def _sleeps(self) -> bool:
        return self.sleep and torch.cuda.is_available()

    def _wake(self, *parts: str) -> None:
        """Bring back the parts of the engine that sleep, all of them where none is named."""
        if self._asleep:
            with self.seconds("engine_wake"):
                self._llm.wake_up(tags=list(parts) or None)
            self._asleep = bool(parts) and "kv_cache" not in parts

    def _started(self, student: StudentWeights) -> Any:
        options: dict[str, Any] = {
            "model": str(self.folder),
            "logprobs_mode": "processed_logprobs",
            "max_model_len": self._longest,
            "gpu_memory_utilization": self.memory_fraction,
            "enable_sleep_mode": self._sleeps,
            **self._way_options(student),
        }
        if not torch.cuda.is_available():  # vLLM 0.32: a prompt cut in two breaks the CPU's seeded generators
            options["enable_chunked_prefill"] = False
        with self._failing("could not be started"), _own_device(), self._output.shared():
            return importlib.import_module(PACKAGE).LLM(**(options | self.engine_options))

    def _way_options(self, student: StudentWeights) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that the way of the weights needs."""
        if self._way == "ipc":
            os.environ.update(IPC_ENVIRONMENT)
            return {"load_format": "dummy", "weight_transfer_config": dict(IPC_CONFIG)}
        if self._way == "adapter":
            rank = student.adapter_rank or 0
            most = next(allowed for allowed in ADAPTER_RANKS if allowed >= rank)
            return {"model": student.path, "enable_lora": True, "max_loras": 1, "max_lora_rank": most}
        return {}

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Rollout:
        """One response a row, [B, T <= max_new_tokens]; see ``Sampler.sample``. ``model`` is not read.

        Raises:
            ServerError: the engine failed.
        """
        assert self._llm is not None and self._version is not None, "prepare comes first"
        texts = row_texts(prompts)
        with shared_failure(), self._failing("failed while sampling"):
            rows = self._sampled(texts, self._parameters(prompts, settings), settings)
        return as_rollout(prompts, rows, settings, version=self._version)

    def _parameters(self, prompts: PromptBatch, settings: SamplingSettings) -> list[Any]:
        common: dict[str, Any] = {
            "temperature": 0.0 if settings.greedy else settings.temperature,
            "top_p": 1.0 if settings.greedy else settings.top_p,
            "top_k": 0 if settings.greedy else settings.top_k,
            "stop_token_ids": list(settings.stop_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            **_with_whole_numbers(only_tokens(settings)),
        }
        make = importlib.import_module(PACKAGE).SamplingParams
        rows = zip(row_seeds(prompts, settings), settings.rooms(len(prompts)), strict=True)
        return [make(**common, seed=seed, max_tokens=room) for seed, room in rows]

    def _sampled(
        self, texts: list[list[int]], parameters: list[Any], settings: SamplingSettings
    ) -> list[tuple[list[int], list[float]]]:
        self._wake()
        requests = [{"prompt_token_ids": text} for text in texts]
        answers = self._llm.generate(requests, parameters, use_tqdm=False, lora_request=self._adapter)
        if not self._stays_awake:
            self._sleep()
        return [
            sampled_tokens(_choice(answer), text, replace(settings, max_new_tokens=room))
            for answer, text, room in zip(answers, texts, settings.rooms(len(texts)), strict=True)
        ]

    @contextmanager
    def kept_awake(self) -> Iterator[None]:
        """See ``Sampler.kept_awake``."""
        self._stays_awake = True
        try:
            yield
        finally:
            self._stays_awake = False
        with shared_failure(), self._failing("failed while sampling"):
            self._sleep()

    def _sleep(self) -> None:
        """Give the device's memory back, where that is configured."""
        if self._sleeps and not self._asleep:
            with self.seconds("engine_sleep"):
                self._llm.sleep(level=1)
            self._asleep = True

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever vLLM raises, as one error that says what was being done, why it failed and what helps."""
        self._output.forget()
        try:
            yield
        except (Exception, Malformed) as error:
            why = reason(error, self._output.text).rstrip(". ")
            raise ServerError(
                f"`model.sampler`: the vLLM engine {what}: {why}; {remedy(why) or LOOK}, {GO_ON}"
            ) from error


def _with_whole_numbers(only: dict[str, Any]) -> dict[str, Any]:
    """JSON has no numbers as keys, ``SamplingParams`` wants them."""
    bias = only.get("logit_bias")
    return only if bias is None else {"logit_bias": {int(token): value for token, value in bias.items()}}


def _choice(answer: Any) -> dict[str, Any]:
    """One answer of ``LLM.generate`` in the form of a server's."""
    output = answer.outputs[0]
    tokens = list(output.token_ids)
    values = [found[token].logprob for token, found in zip(tokens, output.logprobs or [], strict=False)]
    return {"token_ids": tokens, "logprobs": {"token_logprobs": values}, "prompt_token_ids": answer.prompt_token_ids}


@contextmanager
def _own_device() -> Iterator[None]:
    """The engine's process, started inside, sees this rank's CUDA device only."""
    if not torch.cuda.is_available():
        yield
        return
    name, index = "CUDA_VISIBLE_DEVICES", torch.cuda.current_device()
    before = os.environ.get(name)
    os.environ[name] = before.split(",")[index] if before else str(index)
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
