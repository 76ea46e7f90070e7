"""One decode step of a plain decoder in few operations.

At a small batch half of a step's time goes into starting operations: transformers runs about 240 for four layers, this runs
about 90. The step has fixed shapes and reads nothing back to the host, so a CUDA graph can replay it.

A model is served where its decoder is of a class whose forward was read, with modules of the kinds run here: what depends on
the position shows on no short probe, such as Ministral 3's factor on late queries. Before the first use one step is compared
with the model's own nevertheless.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.masked import at_least_float32
from lit_opd.rollout.decoding.layers import (
    FEW_ROWS,
    Norm,
    attended_by_kernel,
    attended_by_products,
    head_norm,
    product,
    turned,
    two_products,
    written,
)

_DECODERS = {
    f"transformers.models.{name}.modeling_{name}.{kind}Model"
    for name, kind in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
_GATHERS = "torch.distributed.fsdp."  # hooks of FSDP2, which has gathered the weights when a step is run


def is_plain_decoder(model: Any) -> bool:
    """True where ``model``, a transformers causal language model, has a decoder of a known class (a subclass is not), with
    the modules that ``PlainDecoder`` runs, and no hooks but those that gather sharded weights."""
    decoder, linear = model.get_decoder(), model.get_output_embeddings()
    if f"{type(decoder).__module__}.{type(decoder).__qualname__}" not in _DECODERS:
        return False
    rotary = getattr(decoder, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in _FIXED_ROTATIONS or type(linear) is not nn.Linear:
        return False
    if any(_is_hooked(module) for module in model.modules()):
        return False
    return _is_plain_norm(decoder.norm) and all(_is_plain_layer(layer) for layer in decoder.layers)


def has_whole_weights(model: Any) -> bool:
    """False where the weights of a model are shards."""
    return not any(hasattr(weight, "full_tensor") for weight in model.parameters())


def _is_hooked(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not all(type(getattr(hook, "__self__", None)).__module__.startswith(_GATHERS) for hook in hooks)


def _is_plain_layer(layer: Any) -> bool:
    names = {name for name, _ in layer.named_children()}
    if names != _LAYER:
        return False
    attention = {name for name, _ in layer.self_attn.named_children()}
    if attention not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or {n for n, _ in layer.mlp.named_children()} != _MLP:
        return False
    products = [*(getattr(layer.self_attn, n) for n in _ATTENTION), *(getattr(layer.mlp, n) for n in _MLP - {"act_fn"})]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(layer.self_attn, name) for name in attention & _HEAD_NORMS]
    if len({getattr(norm, "variance_epsilon", None) for norm in norms[2:]}) > 1:
        return False
    return all(type(product) is nn.Linear for product in products) and all(_is_plain_norm(norm) for norm in norms)


def _is_plain_norm(norm: Any) -> bool:
    return hasattr(norm, "weight") and hasattr(norm, "variance_epsilon")


class _Layer:
    """The modules of one layer, taken out."""

    def __init__(self, layer: Any, rows: int, half: torch.dtype | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = (
            Norm(norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        turning = [attention.q_proj, attention.k_proj]
        self.inputs = two_products(turning, [attention.v_proj], rows=rows, half=half)
        self.out = product([attention.o_proj], rows=rows, half=half)
        self.gates = two_products([mlp.gate_proj], [mlp.up_proj], rows=rows, half=half)
        self.down = product([mlp.down_proj], rows=rows, half=half)
        self.head_norm, self.activation, self.size = head_norm(attention), mlp.act_fn, attention.head_dim
        self.num_keys = attention.k_proj.out_features // self.size

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, query heads + heads, size], values [B, heads, size]."""
        turning, values = (heads.unflatten(-1, (-1, self.size)) for heads in self.inputs(states))
        return turning if self.head_norm is None else self.head_norm(turning), values

    def mlp(self, states: Tensor) -> Tensor:
        """[B, H] -> [B, H]."""
        gate, up = self.gates(states)
        return self.down(self.activation(gate).mul_(up))


def _takes_products(weight: Tensor, half: torch.dtype | None) -> bool:
    """On a CPU two products are faster than a fused kernel; under autocast only the kernel keeps scores in float32."""
    return weight.device.type == "cpu" and half is None


class PlainDecoder:
    """Runs the model behind ``is_plain_decoder`` on one token a row.

    Args:
        model: the transformers causal language model; its weights must not change while this object is used.
        rows: B.
        columns: positions there may be.
        half: the 16-bit dtype of products and attention, as under autocast; None for that of the weights.
    """

    def __init__(self, model: Any, *, rows: int, columns: int, half: torch.dtype | None = None) -> None:
        decoder, linear = model.get_decoder(), model.get_output_embeddings()
        self.embedding, self.last = (
            decoder.embed_tokens.weight,
            Norm(decoder.norm.weight, decoder.norm.variance_epsilon),
        )
        self.layers = [_Layer(layer, rows, half) for layer in decoder.layers]
        self.head = product([linear], rows=rows, half=half)
        self.dtype = linear.weight.dtype if half is None else half  # of keys and values
        positions = torch.arange(columns, device=linear.weight.device).unsqueeze(0)
        cos, sin = (values[0].unsqueeze(1) for values in decoder.rotary_emb(self.embedding[:1], positions))
        size = cos.shape[-1] // 2
        # [columns, 2, 1, size], the sine signed for ``roll``
        self.turns = torch.stack([cos, torch.cat([-sin[..., :size], sin[..., size:]], -1)], 1)
        scale = decoder.layers[0].self_attn.scaling
        if _takes_products(linear.weight, half):
            self.attended = partial(attended_by_products, scale=linear.weight.new_tensor(scale))
        else:
            self.attended = partial(attended_by_kernel, scale=scale)
        self.packs = linear.weight.device.type == "cpu" and self.dtype == torch.float32 and rows > FEW_ROWS

    def is_for(self, rows: int) -> bool:
        """False where fewer rows would take other products."""
        return not self.packs or rows > FEW_ROWS

    def states(
        self,
        ids: Tensor,
        positions: Tensor,
        column: Tensor | int,
        caches: list[tuple[Tensor, Tensor]],
        columns: int,
        bias: Tensor | None,
    ) -> Tensor:
        """Hidden states behind the last norm, [B, H]; keys and values of the token are written into ``caches``.

        Args:
            ids: int64 [B].
            positions: int64 [B].
            column: int64 [1], where keys and values go; or its number.
            caches: a layer's keys and values each, [B, heads, columns or more, size].
            columns: leading columns that are attended to.
            bias: [B, columns], -inf where nothing stands; None where every column counts.
        """
        states = self.embedding[ids]
        cos, sin = self.turns[positions].unbind(1)
        for layer, cache in zip(self.layers, caches, strict=True):
            turning, values = layer.heads(layer.before(states))
            turning = turned(turning, cos, sin)
            turning = turning if turning.dtype == self.dtype else turning.to(self.dtype)
            query, key = turning[:, : -layer.num_keys], turning[:, -layer.num_keys :]
            keys, values = written(cache, column, key, values, columns)
            states.add_(layer.out(self.attended(query, keys, values, bias)))
            states.add_(layer.mlp(layer.after(states)))
        return self.last(states)

    def logits(self, states: Tensor) -> Tensor:
        """[B, V], at least float32."""
        return at_least_float32(self.head(states))
