"""Which documents are validation, and the heads of those that make up the validation slice."""

from __future__ import annotations

from collections.abc import Sequence

ROOM_FOR_A_CHARACTER = 4
"""Bytes of the longest UTF-8 character: kept behind a head, so that a cut can be moved off a character."""


def is_validation(index: int, validation_every: int) -> bool:
    """Whether document ``index`` (0-based) belongs to the validation split."""
    return index % validation_every == validation_every - 1


class Slice:
    """Gathers the heads of validation documents; what it keeps is bounded by the slice, not by the corpus.

    ``num_documents``: at most so many documents give a head, evenly spaced; None: all.
    """

    def __init__(self, num_bytes: int, num_documents: int | None = None) -> None:
        self._num_bytes = num_bytes
        self._num_documents = num_documents
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._stride = 1
        self._seen = 0
        self._kept_bytes = 0
        self._shrink_at = 16 * num_bytes

    def add(self, head: bytes) -> None:
        """The next validation document's text, or its first ``num_bytes + ROOM_FOR_A_CHARACTER`` bytes."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self._heads.append(head)
        self._sizes.append(len(head))
        self._kept_bytes += len(head)
        if self._num_documents is not None and len(self._heads) > self._num_documents:
            self._heads, self._sizes = self._heads[::2], self._sizes[::2]
            self._stride *= 2
            self._kept_bytes = sum(map(len, self._heads))
        if self._kept_bytes > self._shrink_at:
            self._shrink()

    def _shrink(self) -> None:
        # A later document can only lower what each one gives.
        most = max(equal_shares(self._sizes, self._num_bytes)) + 1
        self._heads = [head[: most + ROOM_FOR_A_CHARACTER] for head in self._heads]
        self._kept_bytes = sum(map(len, self._heads))
        self._shrink_at = max(self._shrink_at, 2 * self._kept_bytes)

    def texts(self) -> list[str]:
        """Each document's head, whole characters, in the order of the documents; empty ones are left out."""
        shares = equal_shares(self._sizes, self._num_bytes)
        heads = [utf8_head(head, share) for head, share in zip(self._heads, shares, strict=True)]
        return [head.decode() for head in heads if head]


def equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Deal ``total`` evenly; what is too small for its share gives the rest to the others.

    Sums to min(total, sum(sizes)); shares that are not exhausted differ by at most 1, the first being larger.
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    for place, index in enumerate(order := sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))):
        shares[index] = min(sizes[index], left // (len(order) - place))
        left -= shares[index]
    return shares


def utf8_head(encoded: bytes, limit: int) -> bytes:
    """The longest whole-character head of ``encoded`` (UTF-8, perhaps cut later) of at most ``limit`` bytes."""
    if limit >= len(encoded):
        return encoded
    while limit > 0 and encoded[limit] & 0xC0 == 0x80:
        limit -= 1
    return encoded[:limit]
