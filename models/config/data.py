"""What is learnt from and measured on: corpora, tokenizer, sequences."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from models.config.base import Count, Frozen, Positive, as_tuple, integral


class ValidationConfig(Frozen):
    """How often, and on how much of the validation split, the loss is measured."""

    slice_bytes: Count = 32_768
    points: Count = 4
    """Evaluations on the slice, evenly spaced over the schedule; the last one is at its end."""
    full_at_end: bool = False
    """Once more on the whole validation split when the trial ends."""
    slice_documents: Count | None = None
    """At most so many validation documents, evenly spaced, give a head to the slice; None: all of them."""


class BlendMember(Frozen):
    """One corpus of a blend, and its share of the training sequences, relative to the other members' weights."""

    corpus: str
    weight: Positive
    corpus_sha256: str = ""


class ValidationSet(Frozen):
    """One more corpus that the loss is measured on, beside the validation split of ``data.corpus``."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,14}$")]
    """In records: ``NAME`` for its slice, ``NAME/full`` for the whole."""
    corpus: str
    validation_every: Count | None = None
    """Which documents count, as in ``data``, whose value None stands for; 1 takes all of a corpus that was held out."""
    corpus_sha256: str = ""


class DataConfig(Frozen):
    """The corpora and how they are cut into tokens. The hashes and the vocabulary are filled in by the plan."""

    corpus: str = "sotu"
    """``sotu`` (built in), a .jsonl file (also .gz, .xz, .bz2, .zst) with a ``text`` field a line, or a folder that
    ``gatesweep data prepare`` made. Its validation split is what verdicts are about."""
    blend: Annotated[tuple[BlendMember, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="a list such as [{corpus: a.jsonl, weight: 0.7}, {corpus: b.jsonl, weight: 0.3}], each corpus once",
    )
    """What is trained on in place of ``corpus`` alone: the members' training splits, in exact proportions."""
    tokenizer: str = "bytes"
    """``bytes`` (built in, 256 tokens), or the path of a Hugging Face tokenizer.json, a SentencePiece .model, or a
    .tiktoken file of BPE ranks."""
    sequence_length: Count = 256
    separate_documents: bool = False
    """A token attends only within its own document. False packs documents: attention runs over their ends."""
    validation_every: Annotated[int, BeforeValidator(integral), Field(ge=2)] = 20
    """Document i (0-based) is validation when i % validation_every == validation_every - 1."""
    validation: ValidationConfig = ValidationConfig()
    padded_vocab_size: Count | None = None
    """Rows of the embedding, at least the tokenizer's tokens: so that tensor ranks divide them, or as published."""
    validation_sets: Annotated[tuple[ValidationSet, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="a list such as [{name: books, corpus: books.jsonl, validation_every: 1}], each name once, "
        "of at most 15 of a-z, 0-9, _ and -",
    )
    """Measured whenever ``corpus`` is, recorded beside it; no verdict looks at them."""
    vocab_size: Count = 256
    corpus_sha256: str = ""
    tokenizer_sha256: str = ""

    @model_validator(mode="after")
    def _each_once(self) -> DataConfig:
        corpora = [member.corpus_sha256 or member.corpus for member in self.blend]
        if twice := next((m.corpus for m, c in zip(self.blend, corpora, strict=True) if corpora.count(c) > 1), None):
            raise ValueError(f"blend has the corpus {twice} more than once; allowed: one member a corpus")
        names = [one.name for one in self.validation_sets]
        if wrong := next((name for name in names if names.count(name) > 1 or name in ("slice", "full")), None):
            raise ValueError(
                f"validation_sets: the name {wrong!r} is taken; allowed: each name once, and neither slice nor full"
            )
        return self
