"""All corpora of a trial, prepared: what it is measured on, what it trains on, what else it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import DataConfig
from models.corpus.prepared import SPLITS, Prepared, prepare


@dataclass(frozen=True)
class Sources:
    """``blend`` has a member a corpus that is trained on, with its weight: without a blend, the main one alone."""

    main: Prepared
    blend: tuple[tuple[Prepared, float], ...]
    validation_sets: dict[str, Prepared]


def gather(data: DataConfig, data_dir: Path) -> Sources:
    """Prepare all that ``data`` names. Raises CorpusError."""

    def corpus(name: str, sha256: str, **changes: Any) -> DataConfig:
        return data.model_copy(update={"corpus": name, "corpus_sha256": sha256, **changes})

    main = prepare(data, data_dir, ("validation", "slice") if data.blend else SPLITS)
    blend = [
        (prepare(corpus(member.corpus, member.corpus_sha256), data_dir, ("train",)), member.weight)
        for member in data.blend
    ]
    sets = {}
    for one in data.validation_sets:
        every = one.validation_every or data.validation_every
        own = corpus(one.corpus, one.corpus_sha256, validation_every=every)
        sets[one.name] = prepare(own, data_dir, ("validation", "slice"))
    return Sources(main, tuple(blend) or ((main, 1.0),), sets)
