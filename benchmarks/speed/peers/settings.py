"""The settings both sides run, and the models and prompts they share. Imports neither side's packages but transformers."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =+-*/().,:;?!"
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}{% else %}{{ message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT_TOKENS = 28
NUM_PROMPTS = 256


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Args:
        name: of the row.
        batch: prompts a step, one sample each.
        tokens: response tokens of every row; no token ends a response.
        vocabulary: embedding rows of the random models; None for the pair in ``folder``.
        folder: with ``student`` and ``teacher``, None for random models.
        steps: measured optimizer steps a run; one more goes before.
    """

    name: str
    batch: int
    tokens: int
    vocabulary: int | None = None
    folder: str | None = None
    steps: int = 3


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("tiny-b16-t128", 16, 128, vocabulary=64, steps=10),
        Setting("tiny-b64-t256", 64, 256, vocabulary=64, steps=4),
        Setting("bigvocab-b4-t256", 4, 256, vocabulary=151936, steps=3),
        Setting("bigvocab-b4-t1024", 4, 1024, vocabulary=151936, steps=1),
        Setting("smol-b4-t128", 4, 128, folder="runs/smollm2", steps=2),
    )
}


@contextmanager
def written(setting: Setting) -> Iterator[list[str]]:
    """Absolute paths of student, teacher and prompts, there as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (str(Path(path).absolute()) for path in write_pair(setting, Path(folder)))
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(student, prompts)
        yield [student, teacher, str(prompts)]


def write_pair(setting: Setting, folder: Path) -> tuple[str, str]:
    """The student's and the teacher's folder; random models are written: Qwen3, 4 layers, width 128 and 256, tied heads."""
    if setting.folder is not None:
        return str(Path(setting.folder) / "student"), str(Path(setting.folder) / "teacher")
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    for seed, (name, width) in enumerate((("student", 128), ("teacher", 256))):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=setting.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        model.save_pretrained(folder / name)
        word_tokenizer(config.vocab_size).save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


def word_tokenizer(size: int) -> object:
    """One token a character, and tokens that no text becomes up to ``size``: ids without a token are neither sampled nor
    scored, and a side that cut them would have less to do."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, EOS, USER, ASSISTANT, *LETTERS]
    vocabulary = {token: index for index, token in enumerate([*words, *(f"<{n}>" for n in range(len(words), size))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, additional_special_tokens=[USER, ASSISTANT]
    )
    built.chat_template = TEMPLATE
    return built


def write_prompts(student: str, path: Path) -> None:
    """JSON lines with ``prompt``, rendered to at most ``PROMPT_TOKENS`` tokens by the student's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(NUM_PROMPTS):
            text = "".join(draw.choice("abcdefghij klmnopqrs") for _ in range(4 * PROMPT_TOKENS))
            while _length(tokenizer, text) > PROMPT_TOKENS and text:
                text = text[:-1]
            file.write(json.dumps({"prompt": text or "a"}) + "\n")


def _length(tokenizer: object, text: str) -> int:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


def peak_bytes() -> int:
    """Highest resident set since ``reset_peak``."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident set now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start a new peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
