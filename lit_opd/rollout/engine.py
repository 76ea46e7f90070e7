"""Sampling from a vLLM engine of the trainer's own, one a rank, on the rank's device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lit_opd.distributed import shared_failure
from lit_opd.errors import InputError, ServerError, first_line, require
from lit_opd.rollout.base import Sampler, SamplingSettings
from lit_opd.rollout.vllm import as_rollout, only_tokens, row_seeds, row_texts, sampled_tokens
from lit_opd.servers.client import Malformed
from lit_opd.types import PromptBatch, Rollout

PACKAGE = "vllm"


class VLLMEngine(Sampler):
    """Samples from ``vllm.LLM``, started from the exported student at the first batch and given new weights by vLLM's own
    ``reload_weights`` from the same folder after every update. vLLM runs its model in a child process that shares the
    rank's device; ``sleep`` frees that memory while the trainer updates.

    The engine is asked for processed log-probs: they are those of the sampled distribution at any temperature, top-p, top-k.
    Keep ``PolicyLoss.importance_cap``: engine and trainer never compute exactly the same log-probs.

    Args:
        folder: where the student is exported before the engine reads it; every rank must see it.
        max_logprob_gap: nats; an update whose mean |student - sampler log-prob| is larger is an error. None for no bound.
        memory_fraction: of the device's memory, for the engine's weights and KV cache; ignored on a CPU, where
            VLLM_CPU_KVCACHE_SPACE (GiB) bounds the cache.
        sleep: move the engine's weights to host memory and drop its cache after each sampling; needs CUDA, off on a CPU.
        engine_options: further arguments of ``vllm.LLM``, such as {enforce_eager: true}.
        max_new_tokens, temperature, top_p, top_k, stop_token_ids: see ``Sampler``.
    Raises:
        InputError: a value outside its range.
    """

    in_process = False

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
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_p, top_k, stop_token_ids)
        self.folder, self.max_logprob_gap, self.memory_fraction = (
            Path(folder).absolute(),
            max_logprob_gap,
            memory_fraction,
        )
        self.sleep, self.engine_options = sleep, dict(engine_options or {})
        name = type(self).__name__
        require(
            max_logprob_gap is None or max_logprob_gap > 0, f"{name}.max_logprob_gap", "> 0 or null", max_logprob_gap
        )
        require(0 < memory_fraction < 1, f"{name}.memory_fraction", "in (0, 1)", memory_fraction)
        self._llm: Any = None
        self._version: int | None = None  # weights the engine has; None before it was started
        self._window: int | None = None  # tokens a row may hold

    def check(self, *, tokens: int | None, vocabulary: int) -> None:
        """The package is installed."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise InputError(
                "`model.sampler` must be a sampler whose packages are installed, got VLLMEngine without vllm; install the "
                "extra vllm (pip install -e .[vllm]), or use VLLMSampler with a server of its own environment"
            )
        self._window = tokens

    def prepare(self, export: Callable[[Path], Any], weights_version: int) -> None:
        """Export the student and start the engine from it, or reload the running one; called on every rank."""
        if self._version == weights_version:
            return
        export(self.folder)
        with shared_failure():
            if self._llm is None:
                self._llm = self._started()
            else:
                self._reload()
        self._version = weights_version

    @property
    def _sleeps(self) -> bool:
        return self.sleep and torch.cuda.is_available()

    def _started(self) -> Any:
        options: dict[str, Any] = {
            "model": str(self.folder),
            "logprobs_mode": "processed_logprobs",
            "max_model_len": self._window,
            "gpu_memory_utilization": self.memory_fraction,
            "enable_sleep_mode": self._sleeps,
        }
        if not torch.cuda.is_available():  # vLLM 0.32: a prompt cut in two breaks the CPU's seeded generators
            options["enable_chunked_prefill"] = False
        with self._failing("could not be started"), _own_device():
            return importlib.import_module(PACKAGE).LLM(**(options | self.engine_options))

    def _reload(self) -> None:
        with self._failing("could not take the new weights"):
            if self._sleeps:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
            if self._sleeps:
                self._llm.wake_up(tags=["kv_cache"])
            self._llm.reset_prefix_cache()

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
            "max_tokens": settings.max_new_tokens,
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
        return [make(**common, seed=seed) for seed in row_seeds(prompts, settings)]

    def _sampled(
        self, texts: list[list[int]], parameters: list[Any], settings: SamplingSettings
    ) -> list[tuple[list[int], list[float]]]:
        if self._sleeps:
            self._llm.wake_up()
        requests = [{"prompt_token_ids": text} for text in texts]
        answers = self._llm.generate(requests, parameters, use_tqdm=False)
        if self._sleeps:
            self._llm.sleep(level=1)
        return [sampled_tokens(_choice(answer), text, settings) for answer, text in zip(answers, texts, strict=True)]

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever vLLM raises, as one error that says what was being done."""
        try:
            yield
        except (Exception, Malformed) as error:
            raise ServerError(
                f"`model.sampler`: the vLLM engine {what}: {first_line(error)}; see vLLM's messages above, then go on with "
                "--ckpt_path last"
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
