"""The student's weights for an engine that is no part of this process: Hugging Face names, whole tensors, one unit at a time.

A unit is a transformer block, or what is outside the blocks: one weight at a time under FSDP2, all of it under FSDP1. Shards are
gathered for the moment in which their unit is handed over and dropped again, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from lit_opd.distributed import is_rank_zero, shared_failure
from lit_opd.errors import InputError
from lit_opd.models.export import export_adapter, export_folder, export_frame
from lit_opd.models.export_check import ExportCheck, unsharded
from lit_opd.models.loading import load_generation_config
from lit_opd.models.sharding import full_state, is_sharded, transformer_layers
from lit_opd.models.student import StudentSettings

Unit = list[tuple[str, Tensor]]  # names and whole tensors
Held = list[tuple[str, nn.Module, str]]  # name of a weight in the model, the module that owns it, its name there
ADAPTER_WEIGHTS = ".lora_"  # in the names of an adapter's weights
FSDP1_WRAPPER = "_fsdp_wrapped_module."  # what FSDP1 puts into names


class StudentWeights:
    """The student for what reads it outside this process: an engine, or a folder. Every method is a collective.

    Args:
        policy: the student's ``ScoringModel``, sharded or not.
        settings: how it was loaded.
        tokenizer: saved in folders.
        stop_ids: ids that end a response, for the generation config of folders.
    """

    def __init__(self, policy: Any, settings: StudentSettings, tokenizer: Any, *, stop_ids: Sequence[int]) -> None:
        self.policy, self.settings, self.tokenizer, self.stop_ids = policy, settings, tokenizer, stop_ids

    @property
    def path(self) -> str:
        """Of the model it was loaded from."""
        return os.path.expanduser(self.settings.path)

    @property
    def adapter_rank(self) -> int | None:
        """None without LoRA."""
        return None if self.settings.lora is None else self.settings.lora.rank

    def __call__(self, folder: Path) -> Any:
        """All of it as a folder; a sampler's responses are compared with the student anyway, so the folder is not."""
        return self.export(folder, compared=False)

    def export(self, folder: str | Path, *, compared: bool) -> Path:
        """Write all of it as a Hugging Face folder, adapters merged, by rank 0; returns on every rank when it is there.

        Args:
            folder: appears whole or not at all; replaced when it exists.
            compared: rank 0 loads it again on the CPU and compares its log-probs on a few tokens with the student's.
        Raises:
            InputError: on every rank, the folder is not the student.
        """
        check = ExportCheck.of(self.policy, self.tokenizer, self.settings) if compared else None
        state = full_state(self.policy) if is_sharded(self.policy) else None
        with shared_failure():
            if is_rank_zero():
                model, state = unsharded(self.policy, self.settings, state)
                export_folder(model, self.tokenizer, folder, state=state, generation=self._generation(), check=check)
        return Path(folder)

    def _generation(self) -> Any:
        """The base's generation config with this student's ends."""
        found = load_generation_config(self.settings.path)
        found.eos_token_id = self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)
        return found

    def frame(self, folder: Path) -> None:
        """The folder without weights, by rank 0; returns on every rank when it is there."""
        with shared_failure():
            if is_rank_zero():
                export_frame(self.policy.causal_lm, self.tokenizer, folder, generation=self._generation())

    def adapter(self, folder: Path) -> None:
        """The adapter as a PEFT folder, by rank 0; returns on every rank when it is there."""
        state = adapter_state(self.policy)
        with shared_failure():
            if is_rank_zero():
                export_adapter(self.policy.model, folder, state=state)

    def each_unit(self, take: Callable[[Unit], None]) -> None:
        """See ``hand_over``."""
        hand_over(self.policy, take)


def adapter_state(policy: Any) -> dict[str, Tensor]:
    """Whole weights of a student's adapter by name, [...] each, on every rank.

    Raises:
        InputError: under FSDP1, whose wrappers hold adapter and base model as one.
    """
    if isinstance(policy, FullyShardedDataParallel):
        raise InputError("`VLLMEngine.weights` must be folder for a student with LoRA under FSDPStrategy, got adapter")
    return {name: _whole(value) for name, value in policy.model.named_parameters() if ADAPTER_WEIGHTS in name}


def hand_over(policy: Any, take: Callable[[Unit], None]) -> None:
    """Give ``take`` the weights that ``export_folder`` writes, unit after unit. A collective where weights are sharded.

    The tensors are valid until ``take`` returns and must not be changed: where nothing is sharded they are the weights.

    Args:
        policy: the student's ``ScoringModel``, sharded or not, without adapters.
        take: gets (name, whole tensor in the weights' dtype, on their device) of a unit. When it raises, the units that are left
            are gathered all the same, since other ranks take part, and then its exception is raised.
    """
    model, failure = policy.causal_lm, None
    for owner, held in _units(policy):
        with torch.no_grad(), _gathered(owner):
            unit = _as_stored(model, {name: _whole(getattr(module, key)) for name, module, key in held})
            if failure is None:
                try:
                    take(unit)
                except Exception as error:  # whatever it is, it is raised below
                    failure = error
            del unit
    if failure is not None:
        raise failure


def _units(policy: Any) -> Iterator[tuple[nn.Module, Held]]:
    """The module whose shards a unit needs, and the unit's weights: those outside the blocks in the order of the model."""
    model = policy.causal_lm
    blocks = {id(block) for block in transformer_layers(model)}
    found: dict[int, tuple[nn.Module, Held]] = {}
    owner_of = {
        id(module.module): module for module in policy.modules() if isinstance(module, FullyShardedDataParallel)
    }
    inside = [(name, module) for name, module in model.named_modules() if id(module) in blocks]
    for name, module, key in _stored(model):
        block = next((block for prefix, block in inside if name.startswith(_plain(prefix + "."))), None)
        if block is not None:
            found.setdefault(id(block), (owner_of.get(id(block), block), []))[1].append((name, module, key))
        elif isinstance(policy, FullyShardedDataParallel):
            found.setdefault(id(policy), (policy, []))[1].append((name, module, key))
        else:
            found[id(module), key] = (policy, [(name, module, key)])  # type: ignore[index]
    yield from found.values()


def _stored(model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """Every weight that a folder of the model holds, once: parameters and persistent buffers, of tied ones the first."""
    skipped = set(getattr(model, "all_tied_weights_keys", None) or ()) | set(model._keys_to_ignore_on_save or ())
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            name = _plain(f"{prefix}.{key}" if prefix else key)
            if value is None or key in module._non_persistent_buffers_set or name in skipped or id(value) in seen:
                continue
            seen.add(id(value))
            yield name, module, key


def _plain(name: str) -> str:
    return name.replace(FSDP1_WRAPPER, "")


def _gathered(owner: nn.Module) -> AbstractContextManager[Any]:
    """FSDP1 gathers a wrapper's weights as one; FSDP2 weight by weight, see ``_whole``."""
    if isinstance(owner, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(owner, recurse=False, writeback=False)
    return nullcontext()


def _whole(value: Tensor) -> Tensor:
    """All of a weight, on every rank."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _as_stored(model: Any, unit: dict[str, Tensor]) -> Unit:
    """Under the names and in the layout of a folder's files, which differ for some models (the experts of a mixture)."""
    return list(revert_weight_conversion(model, unit).items())
