"""Text -> tokens -> Megatron's indexed dataset -> batches. The face of the folder; read in this order:

- ``text``: documents out of a .jsonl file, what is validation, heads of documents
- ``tokens``: bytes, or a Hugging Face tokenizer.json
- ``prepared``: the .bin/.idx folder, made once, shared by all trials
- ``batches``: training batches by step, validation windows by split
"""

from models.corpus.batches import Batch, TrainBatches, ValidationBatches, train_dataset, validation_batches
from models.corpus.prepared import Prepared, PreparedSplit, prepare
from models.corpus.text import CorpusError

__all__ = [
    "Batch",
    "CorpusError",
    "Prepared",
    "PreparedSplit",
    "TrainBatches",
    "ValidationBatches",
    "prepare",
    "train_dataset",
    "validation_batches",
]
