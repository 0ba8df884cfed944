"""Parallel text files: finds the six, reads them a chunk of lines at a time, and refuses files that are no text.

Files may be larger than memory. No more than a chunk of each is held here, or one line if that is longer.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.errors import UserError
from nmt.storage import stream_sha256

SPLITS = ("train", "val", "test")
CHUNK_BYTES = 1 << 18  # of the source, with the same lines of the target: about 0.1 s of tokenising


def find_files(data_dir: Path, langs: tuple[str, str], names: tuple[str, str, str]) -> list[tuple[Path, Path]]:
    """The source and target file of train, val and test, all of one folder.

    Args:
        data_dir: holds the files, or the folder `multi30k` with the files.
        langs: the files' suffixes, source and target.
        names: the files' stems for train, val and test.

    Raises:
        UserError: data, no folder has them all. The message has the paths that were tried.
    """
    tried: list[Path] = []
    for folder in _folders(data_dir):
        missing: list[Path] = []
        pairs = [pair for name in names if (pair := _find_pair(folder, name, langs, missing))]
        if len(pairs) == len(names):
            return pairs
        if folder.is_dir():
            tried += missing
    absent = tried or [data_dir]
    todo = "put it there, or name other files (--src-lang, --trg-lang, --train-name, ...) or another --data-dir"
    raise UserError("data", f"missing; tried {', '.join(map(str, absent))}", str(data_dir), todo)


def any_corpus(data_dir: Path, langs: tuple[str, str]) -> bool:
    """Whether `data_dir`, or `multi30k` in it, has a file of one of the languages, whatever its stem."""
    suffixes = tuple(f".{lang}{packed}" for lang in langs for packed in ("", ".gz"))
    folders = (folder for folder in _folders(data_dir) if folder.is_dir())
    return any(path.name.endswith(suffixes) for folder in folders for path in folder.iterdir())


def _folders(data_dir: Path) -> list[Path]:
    return [data_dir / "multi30k", data_dir]


def _find_pair(folder: Path, name: str, langs: tuple[str, str], missing: list[Path]) -> tuple[Path, Path] | None:
    """A split's two files under one stem, or None. The paths of a side that is not there are added to `missing`."""
    for stem in ["test", "test2016", "test_2016_flickr"] if name == "test" else [name]:
        sides = [[folder / f"{stem}.{lang}{packed}" for packed in ("", ".gz")] for lang in langs]
        present = [[path for path in paths if os.path.isfile(path)] for paths in sides]
        src, trg = present
        if src and trg:
            return src[0], trg[0]
        missing += [path for paths, found in zip(sides, present, strict=True) if not found for path in paths]
    return None


def text_bytes(path: Path) -> int:
    """About how many bytes of text a file holds. Compressed text is taken to be three times as long."""
    return path.stat().st_size * (3 if path.suffix == ".gz" else 1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file to read its text, decompressed if the name ends in `.gz`.

    Raises as `_reading` does, for the body too. So the body only reads this file. It puts the reading of another file
    into a `_reading` of that file.
    """
    packed = path.suffix == ".gz"
    with _reading(path):
        if packed and not path.stat().st_size:
            raise EOFError("the file is empty")
        with gzip.open(path) if packed else open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the body's errors into a UserError: io (the file cannot be read) or data (it is no whole gzip file)."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError("data", f"not a whole gzip file: {error}", str(path), "fetch the file again") from error
    except OSError as error:
        raise UserError("io", f"cannot read: {error.strerror}", str(path), "check its permissions") from error


def content_sha256(path: Path) -> str:
    """The sha256 of a file's text, decompressed. Raises as `_reading` does."""
    with _opened(path) as file:
        return stream_sha256(file)


class Chunk(NamedTuple):
    """The same lines of both files of a split.

    Attributes:
        paths: source and target file.
        first: the number of the first line, from 1.
        texts: these lines of each file, unchanged.
    """

    paths: tuple[Path, Path]
    first: int
    texts: tuple[bytes, bytes]


def pair_chunks(paths: tuple[Path, Path], digests: Sequence[str]) -> Iterator[Chunk]:
    """Reads a split's two files from their first to their last line.

    Args:
        paths: source and target.
        digests: the files' `content_sha256` when the cache was looked up.

    Raises:
        UserError: data (different numbers of lines, changed since, or no whole gzip file), io.
    """
    seen = hashlib.sha256(), hashlib.sha256()
    first = 1
    with _opened(paths[0]) as src_file, _opened(paths[1]) as trg_file:
        while True:
            with _reading(paths[0]):
                src = src_file.read(CHUNK_BYTES)
                src += src_file.readline()
            if not src:
                break
            lines = count_lines(src)
            with _reading(paths[1]):
                trg = list(itertools.islice(trg_file, lines))
            if first == 1:  # in UTF-16 the numbers of lines differ too, but the encoding is the fault to report
                for path, text in zip(paths, (src, b"".join(trg[:1])), strict=True):
                    split_lines(text.partition(b"\n")[0], path)
            if len(trg) < lines:
                _raise_different_counts(paths, first - 1 + lines + sum(1 for _ in src_file), first - 1 + len(trg))
            texts = (src, b"".join(trg))
            for digest, text in zip(seen, texts, strict=True):
                digest.update(text)
            yield Chunk(paths, first, texts)
            first += lines
        if more := sum(1 for _ in trg_file):
            _raise_different_counts(paths, first - 1, first - 1 + more)
    for path, digest, expected in zip(paths, seen, digests, strict=True):
        if digest.hexdigest() != expected:
            raise UserError("data", "the file changed while it was read", str(path), "start again when it is complete")


def count_lines(text: bytes) -> int:
    r"""The number of lines. They end at `\n` alone, and the last one may lack it."""
    return text.count(b"\n") + (not text.endswith(b"\n"))


def _raise_different_counts(paths: tuple[Path, Path], src_lines: int, trg_lines: int) -> None:
    todo = "line n of one must be the translation of line n of the other"
    raise UserError("data", f"{src_lines} lines and {trg_lines} lines", " and ".join(map(str, paths)), todo)


def split_lines(content: bytes, name: str | Path, first: int = 1) -> list[str]:
    r"""The stripped lines of a text. They end at `\n` alone. A byte order mark at the file's start is removed.

    Args:
        content: whole lines of a file.
        name: the file, for errors.
        first: the number of the first of these lines in the file.

    Raises:
        UserError: data, the text is not UTF-8 or has a NUL. The message has the line and the byte.

    >>> split_lines("\ufeffEin Hund\u2028bellt. \r\n\nJa!".encode(), "train.de")
    ['Ein Hund\u2028bellt.', '', 'Ja!']
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _bad_byte(content, error.start, name, first, "is not UTF-8", "convert the file to UTF-8") from error
    if "\0" in text:
        todo = "remove it, or convert the file to UTF-8"
        raise _bad_byte(content, content.index(b"\0"), name, first, "is a NUL", todo)
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # no line begins after the last line's end
    if first == 1 and lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    return [line.strip() for line in lines]


def _bad_byte(content: bytes, offset: int, name: str | Path, first: int, fault: str, todo: str) -> UserError:
    line = first + content.count(b"\n", 0, offset)
    byte = offset - content.rfind(b"\n", 0, offset)
    return UserError("data", f"byte {byte} of line {line}, {content[offset]:#04x}, {fault}", f"{name}:{line}", todo)


def read_pairs(chunk: Chunk) -> tuple[list[str], list[str], int]:
    """The lines of both sides, without the pairs that have an empty side, and how many pairs those were.

    Raises:
        UserError: data, as `split_lines`.
    """
    src, trg = (split_lines(text, path, chunk.first) for text, path in zip(chunk.texts, chunk.paths, strict=True))
    kept = [pair for pair in zip(src, trg, strict=True) if all(pair)]
    return [line for line, _ in kept], [line for _, line in kept], len(src) - len(kept)
