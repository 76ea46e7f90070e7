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
    scale_of,
    turned,
    two_products,
    written,
)

_DECODERS = {
    f"transformers.models.{name}.modeling_{name}.{kind}Model"
    for name, kind in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
        ("gemma3", "Gemma3Text"),
    )
}
_BENT = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)  # what Gemma's may do, and this does not
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MORE_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # of Gemma: before and after each part
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
    rotations = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    rotations = list(rotations.values()) if isinstance(rotations, dict) else [rotations]
    if any(rotation not in _FIXED_ROTATIONS for rotation in rotations) or type(linear) is not nn.Linear:
        return False
    if any(getattr(decoder.config, name, None) for name in _BENT):
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
    if names not in (_LAYER, _LAYER | _MORE_NORMS):
        return False
    attention = {name for name, _ in layer.self_attn.named_children()}
    if attention not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or {n for n, _ in layer.mlp.named_children()} != _MLP:
        return False
    products = [*(getattr(layer.self_attn, n) for n in _ATTENTION), *(getattr(layer.mlp, n) for n in _MLP - {"act_fn"})]
    of_heads = [getattr(layer.self_attn, name) for name in attention & _HEAD_NORMS]
    norms = [*(getattr(layer, name) for name in names - {"self_attn", "mlp"}), *of_heads]
    if not all(_is_plain_norm(norm) for norm in norms) or len({scale_of(norm)[1] for norm in of_heads}) > 1:
        return False
    return all(type(product) is nn.Linear for product in products)


def _is_plain_norm(norm: Any) -> bool:
    return hasattr(norm, "weight") and (hasattr(norm, "variance_epsilon") or type(norm).__name__ == "Gemma3RMSNorm")


class _Layer:
    """The modules of one layer, taken out.

    Args:
        layer: of transformers.
        kind: of its rotary positions; None where all layers have the same.
        rows, half: as for ``PlainDecoder``.
    """

    def __init__(self, layer: Any, kind: str | None, rows: int, half: torch.dtype | None) -> None:
        attention, mlp, self.kind = layer.self_attn, layer.mlp, kind
        self.before, self.after = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.of_attention = self.of_mlp = None  # norms of what a part adds
        if hasattr(layer, "pre_feedforward_layernorm"):
            self.of_attention, self.after = self.after, Norm.of(layer.pre_feedforward_layernorm)
            self.of_mlp = Norm.of(layer.post_feedforward_layernorm)
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

    def mixed(self, attended: Tensor) -> Tensor:
        """What the attention adds to the states, [B, query heads * size] -> [B, H]."""
        added = self.out(attended)
        return added if self.of_attention is None else self.of_attention(added)

    def mlp(self, states: Tensor) -> Tensor:
        """What the MLP adds, [B, H] -> [B, H]."""
        gate, up = self.gates(self.after(states))
        added = self.down(self.activation(gate).mul_(up))
        return added if self.of_mlp is None else self.of_mlp(added)


def _kinds(decoder: Any) -> list[str | None]:
    """The kind of each layer's rotary positions; None where all layers have the same."""
    several = isinstance(decoder.rotary_emb.rope_type, dict)
    return list(decoder.config.layer_types) if several else [None] * len(decoder.layers)


def _turns(decoder: Any, kind: str | None, columns: int) -> Tensor:
    """Cosines and sines of all positions, [columns, 2, 1, size], the sine signed for ``roll``."""
    weight = decoder.embed_tokens.weight
    positions = torch.arange(columns, device=weight.device).unsqueeze(0)
    found = decoder.rotary_emb(weight[:1], positions, *([] if kind is None else [kind]))
    cos, sin = (values[0].unsqueeze(1) for values in found)
    size = cos.shape[-1] // 2
    return torch.stack([cos, torch.cat([-sin[..., :size], sin[..., size:]], -1)], 1)


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
        self.embedding, self.last, kinds = decoder.embed_tokens.weight, Norm.of(decoder.norm), _kinds(decoder)
        self.embed_scale = getattr(decoder.embed_tokens, "embed_scale", None)
        self.layers = [_Layer(layer, kind, rows, half) for layer, kind in zip(decoder.layers, kinds, strict=True)]
        self.head = product([linear], rows=rows, half=half)
        self.dtype = linear.weight.dtype if half is None else half  # of keys and values
        self.turns = {kind: _turns(decoder, kind, columns) for kind in dict.fromkeys(kinds)}
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
        """Hidden states after the last norm, [B, H]; keys and values of the token are written into ``caches``.

        Args:
            ids: int64 [B].
            positions: int64 [B].
            column: int64 [1], where keys and values go; or its number.
            caches: a layer's keys and values each, [B, heads, columns or more, size].
            columns: leading columns that are attended to.
            bias: [B, columns], -inf where nothing stands; None where every column counts.
        """
        states = self.embedding[ids]
        states = states if self.embed_scale is None else states * self.embed_scale.to(states.dtype)
        turns = {kind: turns[positions].unbind(1) for kind, turns in self.turns.items()}
        for layer, cache in zip(self.layers, caches, strict=True):
            turning, values = layer.heads(layer.before(states))
            turning = turned(turning, *turns[layer.kind])
            turning = turning if turning.dtype == self.dtype else turning.to(self.dtype)
            query, key = turning[:, : -layer.num_keys], turning[:, -layer.num_keys :]
            keys, values = written(cache, column, key, values, columns)
            states.add_(layer.mixed(self.attended(query, keys, values, bias)))
            states.add_(layer.mlp(states))
        return self.last(states)

    def logits(self, states: Tensor) -> Tensor:
        """[B, V], at least float32."""
        return at_least_float32(self.head(states))
