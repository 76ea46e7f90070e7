"""Activations computed again in the backward pass, in evaluation mode.

transformers ties its own recomputation to train mode, in which a model may draw at random: dropout under any name, layers or
experts that are left out, noise on a router. The policy that is trained must be the one that sampled, so the student stays in
evaluation mode, and its blocks are recomputed from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_opd.errors import InputError


def recompute_blocks(model: Any) -> None:
    """Keep only the input of every repeated block of ``model`` for the backward pass, whatever mode the block is in.

    Names, weights and hooks of the blocks stay as they are.

    Raises:
        InputError: a model without such blocks.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = list(_outermost(model, names))
    if not blocks:
        raise InputError(
            f"`model.student.gradient_checkpointing` must be false for a {type(model).__name__}, which names no blocks to "
            "recompute, got true; lower `model.token_budget` instead"
        )
    for block in blocks:
        block.forward = partial(_recomputed, block)


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    """The blocks inside ``module``, none inside another."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's forward, inside its hooks: those of FSDP must not run again in the backward pass."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
