"""A ``vllm`` module whose engine is a tiny transformers model, strict about the protocol of weight transfer.

It knows what vLLM documents of its worker side: phases in order, fields by name, bytes that fit shapes; it copies weights out of
the sender's buffer before the call returns, and its weights are noise until some were loaded (``load_format: dummy``).
"""

from __future__ import annotations

import base64
import pickle
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

UPDATE = {"names", "dtype_names", "shapes", "ipc_handles_pickled", "tensor_sizes"}
BUFFERS: dict[int, Tensor] = {}


def handle(buffer: Tensor) -> dict[str, tuple[Any, ...]]:
    """As of CUDA: a name of the device, and what opens the buffer."""
    BUFFERS[id(buffer)] = buffer
    return {"device": (id(buffer),)}


@dataclass
class SamplingParams:
    """The fields that are used here."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool


@dataclass
class LoRARequest:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """``fails`` is the name of a method that raises when it is called next."""

    version = "0.32.0"
    fails: str | None = None
    made: LLM

    def __init__(self, model: str, load_format: str = "auto", **options: Any) -> None:
        self.calls: list[str] = []
        self.options = {"model": model, "load_format": load_format, **options}
        self._call("LLM")
        if load_format == "dummy":
            torch.manual_seed(5)
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.window = self.model.config.max_position_embeddings
        assert (options.get("max_model_len") or 0) <= self.window, "max_model_len is greater than the model's"
        self.adapters: dict[int, Any] = {}
        self.met, self.updating, self.asleep, self.loaded = False, False, False, set[str]()
        type(self).made = self

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if type(self).fails == name:
            raise RuntimeError(f"{name} broke")

    # -- weights -----------------------------------------------------------------------------------------------------

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        """``reload_weights`` from a folder."""
        self._call(method)
        assert method == "reload_weights"
        self.model = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).eval()

    def reset_prefix_cache(self) -> bool:
        """Nothing is cached."""
        self._call("reset_prefix_cache")
        return True

    @property
    def packed_at_init(self) -> bool:
        """From 0.27 on."""
        return tuple(map(int, self.version.split(".")[:2])) >= (0, 27)

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        """Once."""
        self._call("init")
        assert self.options["weight_transfer_config"] == {"backend": "ipc"} and not self.met
        assert request == {"init_info": {"packed": True} if self.packed_at_init else {}}
        self.met = True

    def start_weight_update(self) -> None:
        """Opens a session."""
        self._call("start")
        assert self.met and not self.updating
        self.updating, self.loaded = True, set()

    def update_weights(self, request: dict[str, Any]) -> None:
        """One packed chunk."""
        self._call("update")
        info = dict(request["update_info"])
        assert self.updating and (self.packed_at_init or info.pop("packed") is True) and set(info) == UPDATE
        (number,) = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))["device"]
        sizes = info["tensor_sizes"]
        parts = BUFFERS[number][: sum(sizes)].split(sizes)
        own = self.model.state_dict()
        for name, dtype, shape, part in zip(info["names"], info["dtype_names"], info["shapes"], parts, strict=True):
            value = part.view(getattr(torch, dtype)).view(*shape)
            assert own[name].shape == value.shape and name not in self.loaded, name
            own[name].copy_(value)
            self.loaded.add(name)

    def finish_weight_update(self) -> None:
        """Closes it; what did not come is what vLLM would only warn of."""
        self._call("finish")
        assert self.updating
        self.updating = False

    # -- sleep -------------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """Nothing may be asked until it is woken."""
        self._call("sleep")
        self.asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        """All of it, or weights first."""
        self._call(f"wake {tags}")
        self.asleep = tags == ["weights"]

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, requests: list[dict[str, Any]], parameters: list[SamplingParams], use_tqdm: bool, lora_request: Any = None
    ) -> list[Any]:
        """Token by token, with a generator a row."""
        self._call("generate")
        assert not self.asleep and not self.updating
        return [
            self._answer(request["prompt_token_ids"], one, lora_request)
            for request, one in zip(requests, parameters, strict=True)
        ]

    def _answer(self, prompt: list[int], asked: SamplingParams, lora: LoRARequest | None) -> Any:
        model = self.model if lora is None else self._adapted(lora)
        ids, generator, found = list(prompt), torch.Generator().manual_seed(asked.seed % 2**32), []
        most = min(asked.max_tokens, (self.options.get("max_model_len") or self.window) - len(prompt))
        assert most > 0, "The prompt is longer than the maximum model length"
        while len(found) < most and not (found and ids[-1] in asked.stop_token_ids):
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
            ids.append(token)
            found.append({token: SimpleNamespace(logprob=float(logprobs[token]))})
        output = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=found)
        return SimpleNamespace(outputs=[output], prompt_token_ids=prompt)

    def _adapted(self, lora: LoRARequest) -> Any:
        """Read once for each number, as vLLM does."""
        from peft import PeftModel

        assert self.options["enable_lora"] and self.options["max_lora_rank"] >= 8
        if lora.lora_int_id not in self.adapters:
            base = AutoModelForCausalLM.from_pretrained(self.options["model"])
            self.adapters[lora.lora_int_id] = PeftModel.from_pretrained(base, lora.lora_path).eval()
        return self.adapters[lora.lora_int_id]


def install(patch: Any, version: str = "0.32.0") -> type[LLM]:
    """Put the module where ``import vllm`` finds it, for as long as ``patch`` lasts; its engine's class."""
    own = type("LLM", (LLM,), {"version": version})
    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.__version__, module.LLM, module.SamplingParams = version, own, SamplingParams  # type: ignore[attr-defined]
    module.__spec__ = ModuleSpec("vllm", loader=None)
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for one in (module, lora, request):
        patch.setitem(sys.modules, one.__name__, one)
    return own
