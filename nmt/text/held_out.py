"""Takes validation and test pairs out of the training pairs, for a user who has one pair of files.

Which pairs are taken depends on the text alone. Each source has a key, the hash of what its words look like. The pairs
with the smallest keys are the test pairs, and those with the next ones the validation pairs. So every run, machine and
seed takes the same ones. No source that is held out stays in train, not even in other letter case or spacing.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.errors import UserError
from nmt.text import files
from nmt.text.tokens import normalised

RULE = 1  # raise it when other pairs are taken of the same text


class HeldOut(NamedTuple):
    """What is taken out of the training pairs.

    Attributes:
        paths: the source and target file of the training pairs.
        digests: their `files.content_sha256`.
        pairs: in each split that is taken out.
        limits: the largest key of each such split, the smallest first. Each split begins behind the one before it.
        repeats: how many more pairs have a source that is held out. No split has them.
    """

    paths: tuple[Path, Path]
    digests: Sequence[str]
    pairs: int
    limits: dict[str, int]
    repeats: int

    def part(self, split: str) -> Iterator[files.Chunk]:
        """The lines of one split, in the order of the files.

        Args:
            split: one of `files.SPLITS`. "train" is all that stays, also the pairs with an empty side.

        Yields:
            Chunks without the lines of the other splits. `first` counts these lines too.

        Raises:
            UserError: as from `files.pair_chunks` and `files.split_lines`.
        """
        seen: set[int] = set()
        for chunk in files.pair_chunks(self.paths, self.digests):
            src, trg = (
                files.split_lines(text, path, chunk.first) for text, path in zip(chunk.texts, self.paths, strict=True)
            )
            is_wanted = [self._split_of(*pair, seen) == split for pair in zip(src, trg, strict=True)]
            if any(is_wanted):
                src_text, trg_text = (_lines(text, is_wanted) for text in chunk.texts)
                yield files.Chunk(self.paths, chunk.first, (src_text, trg_text))

    def _split_of(self, src: str, trg: str, seen: set[int]) -> str | None:
        """The split of a pair. None: it repeats a source that is held out. `seen` has the keys that are."""
        if not (src and trg):
            return "train"
        key = key_of(src)
        for split, limit in self.limits.items():
            if key <= limit:
                if key in seen:
                    return None
                seen.add(key)
                return split
        return "train"

    def note(self) -> str:
        """A line for the log."""
        taken = " and ".join(f"{self.pairs} {NAMES[split]}" for split in reversed(self.limits))
        line = f"--val-split: {taken} pairs were taken out of {self.paths[0].name} and {self.paths[1].name}"
        return line + (f"; {self.repeats} more have the same sources and were left out" if self.repeats else "")


def _lines(text: bytes, is_wanted: list[bool]) -> bytes:
    """The wanted lines of a text."""
    lines = text.split(b"\n")  # perhaps with an empty one at the end, which is none
    return b"".join(line + b"\n" for line, wanted in zip(lines, is_wanted, strict=False) if wanted)


NAMES = {"val": "validation", "test": "test"}


def key_of(src: str) -> int:
    """The key of a source, below 2**128. Sources that differ in case or spacing alone have the same.

    >>> key_of("Ein  Hund.") == key_of("ein hund."), key_of("Ein Hund.") == key_of("Ein Hund")
    (True, False)
    """
    text = " ".join(normalised(src).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def choose(paths: tuple[Path, Path], digests: Sequence[str], pairs: int, splits: Sequence[str]) -> HeldOut:
    """Reads the training pairs and decides which of them are held out. Memory grows with `pairs` alone.

    Args:
        paths, digests: as in `HeldOut`.
        pairs: wanted in each split.
        splits: "test", "val" or both.

    Raises:
        UserError: data, fewer pairs would stay in train than are taken out. Or as from `HeldOut.part`.
    """
    splits = [split for split in ("test", "val") if split in splits]  # so that the test pairs never depend on val
    most = pairs * len(splits)
    counts: dict[int, int] = {}  # pairs with each of the smallest keys
    heap: list[int] = []  # these keys, negated: the largest comes first
    total = 0
    for chunk in files.pair_chunks(paths, digests):
        for src in files.read_pairs(chunk).src:
            total += 1
            key = key_of(src)
            if key in counts:
                counts[key] += 1
            elif len(heap) < most:
                heapq.heappush(heap, -key)
                counts[key] = 1
            elif key < -heap[0]:
                del counts[-heapq.heapreplace(heap, -key)]
                counts[key] = 1
    keys = sorted(counts)
    with_these = sum(counts.values())
    if len(keys) < most or total - with_these < most:
        raise _too_many(paths, pairs, len(splits), total, [counts[key] for key in keys])
    limits = {split: keys[(number + 1) * pairs - 1] for number, split in enumerate(splits)}
    return HeldOut(paths, digests, pairs, limits, with_these - most)


def _too_many(paths: tuple[Path, Path], pairs: int, splits: int, total: int, counts: list[int]) -> UserError:
    """Says how many pairs may be held out at most.

    Args:
        paths, pairs: as in `choose`.
        splits: how many splits are held out.
        total: pairs in train.
        counts: how many of them have each key, the smallest first.
    """
    fits, stay = 0, total
    for taken, count in enumerate(counts, 1):
        stay -= count
        if taken % splits == 0 and stay >= taken:
            fits = taken // splits
    what = f"--val-split {pairs} takes {pairs * splits} pairs out of {total}, and as many must stay for training"
    where = f"{paths[0]} and {paths[1].name}"
    todo = f"give --val-split {fits} or less" if fits else "it has too few different sources: add pairs"
    return UserError("data", what, where, todo)
