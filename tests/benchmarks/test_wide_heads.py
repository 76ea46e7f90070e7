"""The widened student of benchmarks/speed/wide_heads.py computes what the old one does, and its zeros stay zeros."""

from __future__ import annotations

import torch

from benchmarks.speed.wide_heads import spread, widened
from tests.helpers import tiny


def test_wider_heads_are_the_same_function_and_their_zeros_get_no_gradient():
    narrow = tiny.qwen3(seed=1)
    wide = widened(narrow)
    ids = torch.randint(2, 64, (4, 30), generator=torch.Generator().manual_seed(0))
    ours, theirs = (model.double()(ids).logits.log_softmax(-1) for model in (wide, narrow))
    assert float((ours - theirs).abs().max()) < 1e-3 < float((theirs - theirs.roll(1, 0)).abs().max())
    ours.square().sum().backward()
    new = torch.ones(16, dtype=torch.bool).index_fill(0, spread(8), False)
    for layer in wide.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            gradient = getattr(attention, name).weight.grad.unflatten(0, (-1, 16))
            assert not gradient[:, new].any() and gradient[:, ~new].any()
        assert not attention.o_proj.weight.grad.unflatten(1, (-1, 16))[:, :, new].any()
        assert not attention.q_norm.weight.grad[new].any() and not attention.k_norm.weight.grad[new].any()
