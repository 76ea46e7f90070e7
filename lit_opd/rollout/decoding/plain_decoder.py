"""One decode step of a plain decoder in few operations.

At a small batch half of a step's time goes into starting operations: transformers runs about 240 for four layers, this runs
about 100. Attention is two batched products, which for a single query are twice as fast on a CPU as its fused kernel, and
large float32 weights that meet few rows are packed once a rollout for oneDNN, at half the time of MKL's product.

A model is served where its decoder is of a class whose forward was read, with modules of the kinds run here: what depends on
the position shows on no short probe, such as Ministral 3's factor on late queries. Before the first use one step is compared
with the model's own nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_opd.masked import at_least_float32
from lit_opd.rollout.decoding.key_values import Slab

FEW_ROWS = 16  # up to so many a packed product is faster,
LARGE_WEIGHT = 2**17  # from so many elements on
_DECODERS = {
    f"transformers.models.{name}.modeling_{name}.{kind}Model"
    for name, kind in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone

Product = Callable[[Tensor], Tensor]


def is_plain_decoder(model: Any) -> bool:
    """True where ``model``, a transformers causal language model, has a decoder of a known class (a subclass is not), with
    the modules that ``PlainDecoder`` runs, and no hooks."""
    decoder, linear = model.get_decoder(), model.get_output_embeddings()
    if f"{type(decoder).__module__}.{type(decoder).__qualname__}" not in _DECODERS:
        return False
    rotary = getattr(decoder, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in _FIXED_ROTATIONS or type(linear) is not nn.Linear:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return _is_plain_norm(decoder.norm) and all(_is_plain_layer(layer) for layer in decoder.layers)


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
    return all(type(product) is nn.Linear for product in products) and all(_is_plain_norm(norm) for norm in norms)


def _is_plain_norm(norm: Any) -> bool:
    return hasattr(norm, "weight") and hasattr(norm, "variance_epsilon")


def _product(linear: nn.Linear, rows: int) -> Product:
    """``linear`` for that many rows."""
    weight, bias = linear.weight, linear.bias
    slow = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LARGE_WEIGHT
    if rows > FEW_ROWS or not slow or not torch.backends.mkldnn.is_available():
        return lambda states: F.linear(states, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


class _Norm:
    """Root-mean-square normalisation; on a CPU in four operations, half the time of ``F.rms_norm``."""

    def __init__(self, module: Any) -> None:
        self.weight, self.epsilon = module.weight.detach(), module.variance_epsilon
        self.fused = self.weight.device.type != "cpu" or self.weight.dtype.itemsize < torch.float32.itemsize
        size = len(self.weight)
        self.scaled, self.least = self.weight * size**0.5, self.weight.new_tensor(size * self.epsilon).sqrt()

    def __call__(self, states: Tensor) -> Tensor:
        """Over the last dimension."""
        if self.fused:
            return F.rms_norm(states, self.weight.shape, self.weight, self.epsilon)
        length = torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True), self.least)
        return (states / length).mul_(self.scaled)


class _Layer:
    """The modules of one layer, taken out."""

    def __init__(self, layer: Any, rows: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.query, self.key, self.value, self.out = (
            _product(getattr(attention, name), rows) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.head_norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self.gate, self.up, self.down = (_product(getattr(mlp, n), rows) for n in ("gate_proj", "up_proj", "down_proj"))
        self.activation, self.size = mlp.act_fn, attention.head_dim

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, query heads, size], key [B, heads, size] and value [B, heads, 1, size]."""
        shape = len(states), -1, self.size
        query, key, value = (product(states).view(shape) for product in (self.query, self.key, self.value))
        if self.head_norms is not None:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
        return query, key, value.unsqueeze(2)


class PlainDecoder:
    """Runs the model behind ``is_plain_decoder`` on one token a row.

    Args:
        model: the transformers causal language model; its weights must not change while this object is used.
        rows: B.
        columns: positions there may be.
    """

    def __init__(self, model: Any, *, rows: int, columns: int) -> None:
        decoder, linear = model.get_decoder(), model.get_output_embeddings()
        self.embedding, self.last = decoder.embed_tokens.weight, _Norm(decoder.norm)
        self.layers = [_Layer(layer, rows) for layer in decoder.layers]
        self.head = _product(linear, rows)
        positions = torch.arange(columns, device=linear.weight.device).unsqueeze(0)
        cos, sin = (values[0].unsqueeze(1) for values in decoder.rotary_emb(self.embedding[:1], positions))
        half = cos.shape[-1] // 2
        # [columns, 1, size] each, signed for ``roll``
        self.key_turns = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        scale = decoder.layers[0].self_attn.scaling
        self.query_turns = self.key_turns[0] * scale, self.key_turns[1] * scale

    def states(self, ids: Tensor, positions: Tensor, mask: Tensor | None, slabs: list[Slab]) -> Tensor:
        """Hidden states behind the last norm, [B, H].

        Args:
            ids: int64 [B].
            positions: int64 [B].
            mask: bool [B, cached + 1], False on padding; None where there is none.
            slabs: a layer's keys and values each; one column is appended.
        """
        states, bias = self.embedding[ids], None
        key_turn, query_turn = ([turn[positions] for turn in turns] for turns in (self.key_turns, self.query_turns))
        if mask is not None:
            bias = torch.where(mask, 0.0, -torch.inf).to(states.dtype)
        for layer, slab in zip(self.layers, slabs, strict=True):
            query, key, value = layer.heads(layer.before(states))
            keys, values = slab.update(_turned(key, key_turn).unsqueeze(2), value)  # [B, heads, columns, size]
            states = states + layer.out(_attended(_turned(query, query_turn), keys, values, bias))
            inner = layer.after(states)
            states = states + layer.down(layer.activation(layer.gate(inner)).mul_(layer.up(inner)))
        return self.last(states)

    def logits(self, states: Tensor) -> Tensor:
        """[B, V], at least float32."""
        return at_least_float32(self.head(states))


def _attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query a row.

    Args:
        query: [B, query heads, size], scaled; neighbours share a key.
        keys: [B, heads, columns, size].
        values: [B, heads, columns, size].
        bias: [B, columns], -inf on padding; None where there is none.
    Returns:
        [B, query heads * size].
    """
    rows, heads, columns, size = keys.shape
    grouped, keys = query.view(rows * heads, -1, size), keys.flatten(0, 1).transpose(1, 2)
    if bias is None:
        scores = torch.bmm(grouped, keys)
    else:
        scores = torch.baddbmm(bias.repeat_interleave(heads, 0).unsqueeze(1), grouped, keys)
    share = scores.softmax(-1, dtype=at_least_float32(scores[:0]).dtype).to(values.dtype)
    return torch.bmm(share, values.flatten(0, 1)).view(rows, -1)


def _turned(heads: Tensor, turn: list[Tensor]) -> Tensor:
    """Rotary embedding of [B, heads, size], where the two halves of a head are the coordinates of its planes."""
    return torch.addcmul(heads * turn[0], heads.roll(heads.shape[-1] // 2, -1), turn[1])
