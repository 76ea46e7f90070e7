"""The testbed's tokenizer: one token a character, `\\boxed{` one token, and a chat template.

The template puts one marker before a user message and the end symbol after an assistant's; the response follows the
prompt directly:

    <user> f s j ... 4 1 7 0 9 3 ... \\boxed{ 0 9 3 } <eos>

A marker where the response begins would make its first code a special case, read across one token more than the others.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_opd.testbed.task import BOX

PAD, EOS, UNKNOWN, USER = "<pad>", "<eos>", "<unk>", "<user>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN, USER)
CHARACTERS = string.digits + string.ascii_letters + "={}\\ .,\n"
MAX_LENGTH = 256

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<user>' -}}{%- endif -%}"
    "{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer whose decoding joins the pieces without spaces; unknown characters become `<unk>`."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, BOX, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of ``prompt`` in chat format; the response follows directly."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)  # type: ignore[return-value]
