"""Text -> tokens -> Megatron's indexed dataset -> batches. The face of the folder; read in this order:

- ``text``: documents out of .jsonl, .txt and .parquet files, packed or not
- ``split``: what is validation, and the heads of documents that make the validation slice
- ``tokens``: bytes, or a file of Hugging Face, SentencePiece or tiktoken
- ``encode``: chunks of text to tokens, in several processes
- ``prepared``: the .bin/.idx folder, made once, shared by all trials
- ``make``: ``gatesweep data prepare``, the same folder made ahead, from many files
- ``sources``: all corpora of a trial: what is trained on, what is measured
- ``batches``: training batches by step, validation windows by split

Names are loaded when they are first asked for: the processes that tokenize need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.corpus.batches import (
        Batch,
        OpenedDatasets,
        TrainBatches,
        ValidationBatches,
        train_dataset,
        training_samples,
        validation_batches,
    )
    from models.corpus.prepared import Prepared, PreparedSplit, prepare
    from models.corpus.sources import Sources, gather
    from models.corpus.text import CorpusError

_HOMES = {
    "batches": (
        "Batch",
        "OpenedDatasets",
        "TrainBatches",
        "ValidationBatches",
        "train_dataset",
        "training_samples",
        "validation_batches",
    ),
    "prepared": ("Prepared", "PreparedSplit", "prepare"),
    "sources": ("Sources", "gather"),
    "text": ("CorpusError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "CorpusError",
    "OpenedDatasets",
    "Prepared",
    "PreparedSplit",
    "Sources",
    "TrainBatches",
    "ValidationBatches",
    "gather",
    "prepare",
    "train_dataset",
    "training_samples",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
