"""A teacher and a damaged student from one GGUF file: what ``smollm2`` and ``gemma3`` share.

Transformers reads GGUF, but keeps calling the result quantised and refuses to save it; so the weights are copied into a fresh
float32 model. The student is that model with some layers removed: pruning in depth, then healing by on-policy distillation.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lit_opd.errors import InputError
from lit_opd.files import whole_folder

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


def given_file(file: str | Path | None, install: str) -> Path | None:
    """The file that was named, None where none was.

    Raises:
        InputError: it is not there, or the reader ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading a GGUF file needs the package `gguf`, which is not installed; run: {install}")
    if file is not None and not Path(file).is_file():
        raise InputError(f"`--gguf` must be a GGUF file, got {str(file)!r}, which does not exist")
    return None if file is None else Path(file)


def package_folder(package: str, install: str) -> Path:
    """Folder of an installed package, which is found and not imported: importing may need what is not installed.

    Raises:
        InputError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the package `{package}` is not installed; run: {install}; or name a file with --gguf FILE")
    return Path(found.submodule_search_locations[0])


def load_gguf(file: Path, kind: type) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model of the class ``kind`` (float32, dequantised, eval) and left-padding tokenizer of a GGUF ``file``."""
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if not issubclass(type(model), kind):
        family = kind.__name__.removesuffix("ForCausalLM")
        raise InputError(f"`--gguf` must hold a {family} model, got {type(model).__name__} in {file}")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.padding_side = "left"  # a decoder continues after the last column
    tokenizer.init_kwargs["padding_side"] = "left"  # what save_pretrained writes
    return model.eval(), tokenizer


def copy_plain(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The weights of ``model`` in a fresh float32 model of its class that can be saved.

    Raises:
        InputError: tokenizer and embedding differ in size, or the tokenizer has no end or pad symbol.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise InputError(
            f"the tokenizer must have {model.config.vocab_size} tokens like the model, got {len(tokenizer)}"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError("the GGUF file must name an end and a pad symbol; take the one of the package")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    symbols = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten; the caller's random stream stays
        plain = type(model)(type(model.config)(**(settings | symbols))).float()
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(**symbols)
    return plain.eval()


def prune_layers(model: Any, layers: Sequence[int]) -> Any:
    """A copy of ``model`` without the decoder layers ``layers``; ``model`` stays as it is.

    Args:
        model: any decoder with ``model.layers`` in the layout of Llama (Qwen3 and Gemma 3 too).
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


def require_new(out: Path) -> None:
    """
    Raises:
        InputError: ``out`` is there and no empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`--out` must be a new or empty folder, got {str(out)!r}; remove it or choose another")


def write_pair(out: Path, loaded: Any, tokenizer: PreTrainedTokenizerBase, removed_layers: Sequence[int]) -> Conversion:
    """Write ``out/teacher`` and ``out/student`` as Hugging Face folders, checked by loading them again.

    Args:
        out: a folder that does not exist yet or is empty; it appears only when everything in it is good.
        loaded: what ``load_gguf`` gave.
        tokenizer: of the model.
        removed_layers: what the student lacks, see ``prune_layers``.
    Raises:
        InputError: see ``copy_plain`` and ``prune_layers``; or ``out`` is not empty.
        RuntimeError: a saved model does not compute what the GGUF model does.
    """
    require_new(out)
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
def _checked_error(folder: Path, loaded: Any, skipped: Sequence[int]) -> float:
    """Largest abs logit difference of the model in ``folder`` from ``loaded`` with the layers ``skipped`` left out."""
    saved: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


def _logits_skipping(model: Any, ids: Tensor, skipped: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of ``model`` where each layer of ``skipped`` hands on what it was given."""
    hooks = [model.model.layers[index].register_forward_hook(lambda _, given, __: given[0]) for index in skipped]
    try:
        logits: Tensor = model(ids, use_cache=False).logits
        return logits
    finally:
        for hook in hooks:
            hook.remove()


# -- the command ---------------------------------------------------------------------------------------------------------


def _layer_list(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be layer numbers with commas, like 6,10,14; got {text!r}")
    return tuple(int(index) for index in text.split(","))


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _report(done: Conversion, next_command: str) -> str:
    lines = [
        f"{name:8}{folder}  {parameters / 1e6:.1f} M parameters, {_megabytes(folder):.0f} MB, "
        f"largest logit difference from the GGUF model {error:.1e}"
        for name, folder, parameters, error in (
            ("teacher", done.teacher, done.teacher_parameters, done.teacher_logit_error),
            ("student", done.student, done.student_parameters, done.student_logit_error),
        )
    ]
    return "\n".join([*lines, "next: " + next_command])


def run_command(
    arguments: Sequence[str] | None,
    *,
    module: str,
    about: str,
    package: str,
    removed_layers: Sequence[int],
    convert: Callable[..., Conversion],
    next_command: str,
) -> None:
    """The command line of a module; wrong input ends it with one line and exit status 2.

    Args:
        arguments: without the program's name; None for those of the process.
        module: its name after ``python -m``.
        about: a line for ``--help``.
        package: that holds the file, for ``--help``.
        removed_layers: the default of ``--remove``.
        convert: from the folder, and ``gguf`` and ``removed_layers`` by name.
        next_command: said at the end.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--out", required=True, help="folder to write, with teacher/ and student/ in it")
    parser.add_argument("--gguf", help=f"GGUF file to convert (default: the one of the package {package})")
    removed = ",".join(map(str, removed_layers))
    parser.add_argument(
        "--remove", type=_layer_list, default=tuple(removed_layers), help=f"student's removed layers ({removed})"
    )
    given = parser.parse_args(arguments)
    try:
        print(_report(convert(given.out, gguf=given.gguf, removed_layers=given.remove), next_command))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
