"""Batches out of prepared corpora: by optimizer step for training, by window for validation.

Both are functions of their arguments alone. A step's samples do not depend on the number of ranks or on the
micro-batch, and resuming at a step needs no state. No loader processes: a batch is a few memory-mapped reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from models import trust
from models.config import DataConfig
from models.corpus.prepared import Prepared, SplitName, made_aside
from models.corpus.sources import Sources

Batch = dict[str, torch.Tensor]
"""tokens, labels, position_ids (int64) and loss_mask (float32), each [micro_batch, sequence]; with
``data.separate_documents`` also document_ids (int64)."""


class Samples(Protocol):
    """What TrainBatches needs of a GPTDataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


class _EndOfDocument:
    """All that GPTDataset asks of a tokenizer. Without ``pad`` it masks nothing, as no text of ours is padded."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size, eod=eod)


def train_dataset(prepared: Prepared, data: DataConfig, num_samples: int, seed: int) -> GPTDataset:
    """Megatron's GPTDataset over the training split: at least ``num_samples`` sequences, shuffled by ``seed``.

    Sequences run over document ends, the tokens of a document being followed by an eod. Within one epoch of the
    corpus, a sample does not depend on ``num_samples``: a longer trial starts with the same data.
    With torch.distributed up, every rank must call it: rank 0 writes the index files, the others wait for them.
    Trials that run at once share the files: Megatron writes them in place, so they are made aside and renamed.
    It reads them with ``allow_pickle``, so they are signed, and each key has its own (Untrusted: somebody else's).
    """
    name = f"mcore{_megatron_version()}-length{data.sequence_length}-samples{num_samples}-seed{seed}"
    found: list[Any] = [None, None]
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        indices_dir = prepared.indices_directory / f"{name}-key{trust.key_id()}"
        if not indices_dir.exists():
            with made_aside(indices_dir) as aside:
                _gpt_dataset(prepared, data, num_samples, seed, aside)
                trust.seal(aside, "indices")
        found = [indices_dir, _refusal(indices_dir)]
    if distributed:
        torch.distributed.broadcast_object_list(found)
    indices_dir, refusal = found
    if refusal is not None:
        raise trust.Untrusted(refusal)
    return _gpt_dataset(prepared, data, num_samples, seed, indices_dir)


@cache
def _megatron_version() -> str:
    """Of the installed package: it is searched for on the disk, so once a process."""
    return version("megatron-core")


class OpenedDatasets:
    """What a gang's rank has opened, for its next trial with the same text, length and seed: the arms of a block.

    They were checked when they were opened, and their files stay mapped; ``Prepared`` is read anew by every trial.
    All ranks of a gang see the same trials in the same order, so that they find the same ones here.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._found: OrderedDict[tuple[Prepared, int, int, int], GPTDataset] = OrderedDict()

    def train_dataset(self, prepared: Prepared, data: DataConfig, num_samples: int, seed: int) -> GPTDataset:
        """``train_dataset``, or what it returned before."""
        key = (prepared, data.sequence_length, num_samples, seed)
        found = self._found.pop(key, None)
        if found is None:
            found = train_dataset(prepared, data, num_samples, seed)
        self._found[key] = found
        if len(self._found) > self._most:
            self._found.popitem(last=False)
        return found


def _refusal(indices_dir: Path) -> str | None:
    """Why an index cache is not opened. It can be made anew at any time, so there is one mend for all."""
    try:
        trust.check(indices_dir, "indices")
    except trust.Altered as fault:
        return f"index cache {indices_dir} is not as it was written: {fault}; remove the folder, it is made anew"
    except trust.Untrusted as refusal:
        return f"{refusal}. Or remove the folder, it is made anew"
    return None


def training_samples(
    sources: Sources, data: DataConfig, num_samples: int, seed: int, opened: OpenedDatasets | None = None
) -> Any:
    """What a trial trains on (Samples): ``train_dataset`` of its one corpus, or Megatron's blend of several.

    The next sample is always of the member that is furthest behind its share, so that no member is ever more than one
    sample ahead of it. A member's own samples come in its own order, as if it were alone.
    """
    open_one = train_dataset if opened is None else opened.train_dataset
    if len(sources.blend) == 1:
        return open_one(sources.blend[0][0], data, num_samples, seed)
    weights = [weight for _, weight in sources.blend]
    wanted = [math.ceil(num_samples * weight / sum(weights)) + 1 for weight in weights]
    members = [
        open_one(prepared, data, number, seed) for (prepared, _), number in zip(sources.blend, wanted, strict=True)
    ]
    # Its index is made in memory, 10 bytes a sample: Megatron would write the file in place, and trials share it.
    config = dataclasses.replace(members[0].config, path_to_cache=None)
    return BlendedDataset(members, weights, num_samples, config)


def _gpt_dataset(prepared: Prepared, data: DataConfig, num_samples: int, seed: int, indices_dir: Path) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=data.sequence_length,
        blend=([prepared.prefix("train")], None),
        split="1,0,0",
        path_to_cache=str(indices_dir),
        tokenizer=_EndOfDocument(prepared.vocab_size, prepared.eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = GPTDataset.build_low_level_dataset(prepared.prefix("train"), config)
    indices = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
    # The path only names the index files, and the same corpus may lie under several paths.
    return GPTDataset(documents, "train", indices, num_samples, Split.train, config)


class TrainBatches:
    """A rank's share of each optimizer step's samples.

    Step s (0-based) takes samples [s * batch_sequences, (s + 1) * batch_sequences) of the data set; data-parallel
    rank r of num_ranks a contiguous part of them, in micro-batches of ``micro_batch_sequences`` (None: all at once).
    ``separate_at``: the end-of-document token, where documents are to be separate.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_sequences: int,
        micro_batch_sequences: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        separate_at: int | None = None,
    ) -> None:
        if batch_sequences % num_ranks:
            raise ValueError(
                f"a batch of {batch_sequences} sequences cannot be dealt evenly to {num_ranks} data-parallel ranks"
            )
        self._dataset = dataset
        self._batch_sequences = batch_sequences
        self._share = batch_sequences // num_ranks
        self._rank = rank
        self._separate_at = separate_at
        self.micro_batch_sequences = micro_batch_sequences or self._share
        if self._share % self.micro_batch_sequences:
            raise ValueError(
                f"a rank's share of {self._share} sequences ({batch_sequences} over {num_ranks} data-parallel ranks) "
                f"must be a multiple of micro_batch_sequences {self.micro_batch_sequences}"
            )
        self.num_micro_batches = self._share // self.micro_batch_sequences

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of optimizer step ``step`` (0-based), in order."""
        end = (step + 1) * self._batch_sequences
        if end > len(self._dataset):
            raise IndexError(f"step {step} needs {end:,} samples, the data set was built for {len(self._dataset):,}")
        first = step * self._batch_sequences + self._rank * self._share
        for start in range(first, first + self._share, self.micro_batch_sequences):
            batch = _stack([self._dataset[i] for i in range(start, start + self.micro_batch_sequences)])
            yield batch if self._separate_at is None else separated(batch, self._separate_at)


def _stack(samples: Sequence[dict[str, torch.Tensor]]) -> Batch:
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def separated(batch: Batch, eod: int) -> Batch:
    """The batch with ``document_ids``, and positions that start anew in every document.

    An end-of-document token opens the document behind it, whose first token is predicted from it alone: each document
    is learnt as ``eod text -> text eod``, as if it were a sequence of its own. (Megatron's reset counts the eod to the
    document before, which so shows itself to the first token of the next.)
    """
    tokens_BS = batch["tokens"]
    starts_BS = tokens_BS == eod
    place_S = torch.arange(tokens_BS.shape[1])
    start_BS = torch.where(starts_BS, place_S, 0).cummax(dim=1).values
    return {**batch, "document_ids": starts_BS.long().cumsum(dim=1), "position_ids": place_S - start_BS}


class ValidationBatches:
    """Windows over a split, dealt so that every rank has equally many batches; iterate as often as wanted.

    The stream is eod, document 1, eod, document 2, eod, ...; each token is predicted once, from those before it in
    its window. Masked out are the eod targets, so that what is summed is nats of text, and the padding.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: DataConfig,
        split: Literal["slice", "full"],
        batch_sequences: int,
        rank: int = 0,
        num_ranks: int = 1,
        multiple_of: int = 1,
    ) -> None:
        stored: SplitName = "slice" if split == "slice" else "validation"
        content = prepared.split(stored)
        self.num_tokens = content.num_tokens
        """Targets with loss mask 1, over all ranks."""
        self.num_bytes = content.num_bytes
        """UTF-8 bytes of the text that those tokens are."""
        self._length = data.sequence_length
        self._batch_sequences = batch_sequences
        self._rank = rank
        self._num_ranks = num_ranks
        self._multiple_of = multiple_of
        self._eod = prepared.eod
        self._separate = data.separate_documents
        prefix = prepared.prefix(stored)
        # Not IndexedDataset's own arrays: they are views that turn into segmentation faults when it is collected.
        self._stream: np.ndarray[Any, Any] = np.memmap(f"{prefix}.bin", IndexedDataset(prefix).index.dtype, mode="r")

    def bits_per_byte(self, total_nats: float) -> float:
        """From the masked sum of losses over all batches of all ranks. Comparable over tokenizers."""
        return total_nats / math.log(2) / self.num_bytes

    def __len__(self) -> int:
        number = -(-len(self._stream) // (self._length * self._batch_sequences * self._num_ranks))
        return -(-number // self._multiple_of) * self._multiple_of

    def __iter__(self) -> Iterator[Batch]:
        batch_tokens = self._batch_sequences * self._length
        for index in range(len(self)):
            yield self._batch((index * self._num_ranks + self._rank) * batch_tokens, batch_tokens)

    def _batch(self, start: int, size: int) -> Batch:
        """Targets [start, start + size) of the stream; past its end tokens are eod and the mask is 0."""
        labels = np.full(size, self._eod, dtype=np.int64)
        tokens = labels.copy()
        label_part = self._stream[start : start + size]
        labels[: len(label_part)] = label_part
        # The stored stream lacks the leading eod, so position i is predicted from i - 1 and the first from eod.
        first = 1 if start == 0 else 0
        token_part = self._stream[max(start - 1, 0) : start + size - 1]
        tokens[first : first + len(token_part)] = token_part
        shape = (self._batch_sequences, self._length)
        labels_BS = torch.from_numpy(labels).view(shape)
        batch = {
            "tokens": torch.from_numpy(tokens).view(shape),
            "labels": labels_BS,
            "loss_mask": (labels_BS != self._eod).float(),
            "position_ids": torch.arange(self._length).expand(shape).contiguous(),
        }
        return separated(batch, self._eod) if self._separate else batch


def validation_batches(
    prepared: Prepared,
    data: DataConfig,
    split: Literal["slice", "full"],
    batch_sequences: int,
    rank: int = 0,
    num_ranks: int = 1,
    multiple_of: int = 1,
) -> ValidationBatches:
    """The batches that data-parallel rank ``rank`` of ``num_ranks`` evaluates on the fixed slice or the full split.

    Their number is a multiple of ``multiple_of``, filled up with batches in which nothing counts.
    """
    return ValidationBatches(prepared, data, split, batch_sequences, rank, num_ranks, multiple_of)
