"""The built-in byte tokenizer as a tokenizer.json: a token a UTF-8 byte, its id the byte.

Byte-level BPE without merges. Nothing is declared special, the end of a document (byte 0) neither: a special token
is matched in the text before it is cut into bytes, and the letter that stands for byte 0 there is one that texts use.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer_json() -> str:
    """What ``tokenizers`` and ``transformers`` load; gives the ids of ``tokenizer: bytes``."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(pretty=True) + "\n"


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it prints, else one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
