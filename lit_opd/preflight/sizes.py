"""Sizes of a model from its configuration alone: it is built on the meta device, no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lit_opd.models.sharding import transformer_layers
from lit_opd.models.student import LoraSettings, _with_lora
from lit_opd.rollout.decoding.plain_decoder import is_plain_decoder

SAMPLE = 1024  # elements of the weight on which a fused optimizer is measured


class NotEstimated(Exception):
    """Why the memory of a model does not follow from its configuration."""


@dataclass(frozen=True)
class ModelSize:
    """What the memory formula needs to know of a model. Counts are elements unless said otherwise.

    Args:
        parameters: all weights, tied ones once.
        trainable: shapes of the weights an optimizer gets.
        layer: weights of the largest repeated block.
        outside: weights outside the repeated blocks: embedding, last norm, head.
        layers: repeated blocks.
        vocabulary: V, rows of the head.
        hidden: H, the residual stream.
        query: attention heads times head size.
        key: key/value heads times head size.
        heads: attention heads.
        inner: width of the MLP; of all experts a token passes, where there are several.
        normed_heads: queries and keys are normalised head by head, as in Qwen3.
        trains_head: the head's weight is trained.
        lookup: weights of an embedding that is not the head's too: rows are looked up, nothing is multiplied.
        plain: its decode steps are those of ``PlainDecoder``.
    """

    parameters: int
    trainable: tuple[tuple[int, ...], ...]
    layer: int
    outside: int
    layers: int
    vocabulary: int
    hidden: int
    query: int
    key: int
    heads: int
    inner: int
    normed_heads: bool
    trains_head: bool
    lookup: int = 0
    plain: bool = False

    @property
    def num_trainable(self) -> int:
        """Elements an optimizer gets."""
        return sum(_count(shape) for shape in self.trainable)

    @property
    def largest_trained(self) -> int:
        """Elements of the largest weight that an optimizer gets."""
        return max((_count(shape) for shape in self.trainable), default=0)


def model_size(config: Any, *, lora: LoraSettings | None = None, trust_remote_code: bool = False) -> ModelSize:
    """Sizes of the causal language model of a transformers configuration.

    Args:
        config: a transformers configuration.
        lora: adapters to add.
        trust_remote_code: the model has Python code of its own.
    Raises:
        NotEstimated: a quantised model, code of its own, or an architecture that cannot be built or read this way.
    """
    from transformers import AutoModelForCausalLM

    if trust_remote_code:
        raise NotEstimated("it has code of its own (trust_remote_code)")
    if getattr(config, "quantization_config", None) is not None:
        raise NotEstimated("it is quantised")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            layers = transformer_layers(model)
            outside = _numel(model.parameters()) - sum(_numel(layer.parameters()) for layer in layers)
            head = model.get_output_embeddings().weight
            model = _with_lora(model, lora) if lora is not None else model
        return _read(config.get_text_config(), model, layers, outside, head)
    except Exception as error:  # a foreign configuration may fail anywhere in its model's constructor
        raise NotEstimated(f"{type(config).__name__} could not be read: {type(error).__name__}: {error}") from error


def _read(config: Any, model: Any, layers: list[nn.Module], outside: int, head: nn.Parameter) -> ModelSize:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights, embedding = list(model.parameters()), model.get_input_embeddings().weight
    return ModelSize(
        parameters=_numel(weights),
        trainable=tuple(tuple(weight.shape) for weight in weights if weight.requires_grad),
        layer=max(_numel(layer.parameters()) for layer in layers),
        outside=outside,
        layers=len(layers),
        vocabulary=head.shape[0],
        hidden=config.hidden_size,
        query=heads * size,
        key=(getattr(config, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        inner=_inner(config),
        normed_heads=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        trains_head=head.requires_grad,
        lookup=0 if embedding is head else embedding.numel(),
        plain=is_plain_decoder(model.get_base_model() if hasattr(model, "get_base_model") else model),
    )


def _inner(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        return int(experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size))
    return int(config.intermediate_size)


def optimizer_bytes(
    factory: Callable[[Iterable], Optimizer], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> int:
    """Bytes of an optimizer's state after one step, on the meta device.

    Args:
        factory: from parameters to an optimizer.
        shapes: of the trained weights.
        dtype: of the weights and gradients.
    Raises:
        NotEstimated: the optimizer does not run on the meta device.
    """
    weights = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    try:
        optimizer = factory(weights)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    except Exception as error:  # an optimizer of the user's own may do anything
        if "fused" in str(error):
            return _fused_bytes(factory, shapes, dtype)
        raise NotEstimated(f"its state could not be counted: {type(error).__name__}: {error}") from error
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in values)


def _fused_bytes(
    factory: Callable[[Iterable], Optimizer], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> int:
    """The same for torch's fused optimizers, which refuse the meta device and work element by element: from a small weight."""
    sample = nn.Parameter(torch.zeros(SAMPLE, dtype=dtype))
    sample.grad = torch.zeros_like(sample)
    optimizer = factory([sample])
    optimizer.step()
    state = [value for value in optimizer.state[sample].values() if torch.is_tensor(value)]
    elementwise = sum(value.element_size() for value in state if value.numel() == SAMPLE)
    once = sum(value.element_size() * value.numel() for value in state if value.numel() != SAMPLE)
    return sum(elementwise * _count(shape) + once for shape in shapes)


def _numel(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
