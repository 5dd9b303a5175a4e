"""Meta's tokenizer.model, sentencepiece in Llama 1 and 2 and tiktoken in Llama 3, as a Hugging Face tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from obsprune.errors import InputError, first_line

TOKENIZER = "tokenizer.model"
RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")
"""A line of a tiktoken file: a token in base64 and its rank. A sentencepiece file is a protocol buffer."""
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = 256
"""Special tokens of Llama 3, behind all others."""
NAMED = {0: BEGIN, 1: END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
NAMED_SINCE = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
"""Of Llama 3, and of 3.1 and later beside them (Meta's tokenizer.py)."""


def convert_tokenizer(path: Path, directory: Path, since: bool, longest: int) -> dict[str, Any]:
    """Writes the tokenizer to a directory; returns what a config says about it. since: Llama 3.1 or later; longest: the
    longest text of the model.

    Raises InputError when the file is neither of the two kinds.
    """
    try:
        with path.open("rb") as file:
            tiktoken = RANK.fullmatch(file.readline(1024))
        made = _tiktoken(path, since, longest) if tiktoken else _sentencepiece(path, longest)
        made.save_pretrained(directory)
    except Exception as error:  # both libraries fail in many ways
        raise InputError(f"{path} is no tokenizer of Meta's ({first_line(error)}); download it again") from error
    return {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}


def _sentencepiece(path: Path, longest: int) -> Any:
    """BPE as sentencepiece runs it: every text gets a blank in front, one that begins with a blank too, which
    transformers 5 leaves out.
    """
    make: Any = LlamaTokenizer
    backend = make(**make.convert_to_native_format(vocab_file=str(path)), add_bos_token=True).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return _wrapped(backend, longest, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _tiktoken(path: Path, since: bool, longest: int) -> Any:
    """Byte-level BPE with Llama 3's splitting (transformers' default) and its beginning-of-text token."""
    convert: Any = TikTokenConverter
    backend = convert(str(path), extra_special_tokens=special_tokens(since)).converted()
    template = processors.TemplateProcessing(
        single=f"{BEGIN}:0 $A:0",
        pair=f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, backend.token_to_id(BEGIN))],
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return _wrapped(backend, longest, bos_token=BEGIN, eos_token=END)


def _wrapped(backend: Any, longest: int, **special: str) -> Any:
    make: Any = PreTrainedTokenizerFast
    inputs = ["input_ids", "attention_mask"]
    return make(tokenizer_object=backend, model_max_length=longest, model_input_names=inputs, **special)


def special_tokens(since: bool) -> list[str]:
    """In the order of their ids; those without a name are numbered."""
    named = NAMED | (NAMED_SINCE if since else {})
    free = iter(range(SPECIAL))
    return [named.get(index) or f"<|reserved_special_token_{next(free)}|>" for index in range(SPECIAL)]
