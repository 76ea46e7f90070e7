"""Tokenizers of unlike families, trained on a few lines, for tests of what two of them have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "The moon has no air, so a feather and a hammer dropped there in 1971 reached the ground together.",
    "Let x = 12 + 7. Then x is 19, and the answer is \\boxed{19}.\n\n  def f(x):\n    return x ** 2 + 1  # naïve",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein; ça va, señor? Жили-были старик со старухой.",
    "日本語の文章と中文的句子。 שלום עולם, مرحبا بالعالم 👩‍🚀🚀 e\u0301 ½ ﬁn",
)
PAD, EOS, UNK = "<pad>", "<end>", "<unk>"


def _trained(pieces: Tokenizer, *, size: int, alphabet: list[str] | None = None) -> tuple[dict[str, int], list]:
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet or [], show_progress=False)
    pieces.train_from_iterator(LINES, trainer)
    model = json.loads(pieces.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def wrapped(inner: Tokenizer, *, special: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """As transformers loads it, with pad and end tokens behind the vocabulary and further special ones."""
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, EOS, *special)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"pad_token": PAD, "eos_token": EOS} | names))


def byte_level(size: int = 400, *, form: str | None = None, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3, Qwen (with the normal form "NFC") and SmolLM."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _trained(pieces, size=size, alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.normalizer = normalizers.NFC() if form == "NFC" else None
    return wrapped(inner, special=special)


def sentence_piece(size: int = 300, *, prefix: bool = False, byte_tokens: bool = True) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece has it: ``▁`` for a space, byte tokens for what it does not know (Gemma); with ``prefix`` a space
    before the text (Llama 2)."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "▁")
    vocabulary, merges = _trained(pieces, size=size)
    tokens = [UNK, *([f"<0x{byte:02X}>" for byte in range(256)] if byte_tokens else []), *vocabulary]
    numbered = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(
        models.BPE(vocab=numbered, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=byte_tokens)
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(steps if prefix else steps[1:])
    ending = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending])
    return wrapped(inner, unk_token=UNK)


def literal(
    merges: list[tuple[str, str]], letters: str = "abcdef ", *, ids: Mapping[str, int] | None = None, **options
):
    """BPE over a few letters whose merges are given; ``ids`` gives the numbering."""
    tokens = [*letters, *(first + second for first, second in merges)]
    inner = Tokenizer(models.BPE(vocab=ids or {token: place for place, token in enumerate(tokens)}, merges=merges))
    inner.decoder = decoders.Fuse()
    return wrapped(inner, **options)
