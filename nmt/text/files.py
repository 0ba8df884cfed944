"""Parallel text files: finds the six, reads them a chunk of lines at a time, and refuses files that are no text.

Files may be larger than memory, and so may a line. No more than about two chunks of each file are held here.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.errors import UserError
from nmt.storage import stream_sha256

SPLITS = ("train", "val", "test")
CHUNK_BYTES = 1 << 18  # of each side at most, unless a line is longer: about 0.1 s of tokenising
LINE_BYTES = 1 << 18  # of a line that are kept, far more than `tokens.MAX_CHARACTERS` take

# Characters that nobody sees: the soft hyphen, the zero-width space, the marks of direction, the word joiner and the
# byte order mark. The zero-width joiners, U+200C and U+200D, tell words of Persian and Hindi apart. So they stay.
UNSEEN = "\u00ad\u200b\u200e\u200f\u2060\ufeff"
_MARGIN = UNSEEN + "".join(filter(str.isspace, map(chr, range(0x3001))))
_INNER_RETURN = re.compile(rb"\r[^\r\n]")


def find_files(
    data_dir: Path,
    langs: tuple[str, str],
    names: tuple[str, str, str],
    wanted: Sequence[str] = SPLITS,
    val_split: int = 0,
) -> list[tuple[Path, Path] | None] | None:
    """The source and target file of train, val and test, or of some of them, all of one folder. Or None.

    Args:
        data_dir: holds the files, or the folder `multi30k` with the files.
        langs: the files' suffixes, source and target.
        names: the files' stems for train, val and test.
        wanted: the splits, out of `SPLITS`. If both folders have them, and one has all six files, it is that one.
        val_split: above 0, val and test may be missing, if train is wanted. Then None stands for them.

    Raises:
        UserError: data, both folders have them all.
    """
    named = {split: name for name, split in zip(names, SPLITS, strict=True) if split in wanted}
    can_split = val_split > 0 and "train" in wanted
    found: list[list[tuple[Path, Path] | None]] = []
    for folder in folders(data_dir):
        pairs = [_find_pair(folder, name, langs) for name in named.values()]
        is_there = [
            pair is not None or (can_split and split != "train" and not _has_half(folder, name, langs))
            for pair, (split, name) in zip(pairs, named.items(), strict=True)
        ]
        if all(is_there):
            found.append(pairs)
    if len(found) == 2 and not _are_same(*found):
        whole = [pairs for pairs in found if all(has_pair(_folder_of(pairs), name, langs) for name in names)]
        if len(whole) == 1 and not val_split:
            return whole[0]
        first, second = map(_folder_of, found)
        todo = f"name {first} with --data-dir to use that one, or move it away to use the other"
        raise UserError("data", f"two corpora, one in {first} and one in {second}", str(data_dir), todo)
    return found[0] if found else None


def _folder_of(pairs: Sequence[tuple[Path, Path] | None]) -> Path:
    return next(pair[0].parent for pair in pairs if pair)


def _are_same(one: list[tuple[Path, Path] | None], other: list[tuple[Path, Path] | None]) -> bool:
    """Whether both are the same files, found by way of a link."""
    return all(
        first == second if first is None or second is None else all(map(os.path.samefile, first, second))
        for first, second in zip(one, other, strict=True)
    )


def any_corpus(data_dir: Path, langs: tuple[str, str]) -> bool:
    """Whether `data_dir`, or `multi30k` in it, has a file of one of the languages, whatever its stem."""
    suffixes = tuple(f".{lang}{packed}" for lang in langs for packed in ("", ".gz"))
    return any(path.name.endswith(suffixes) for path in _present(data_dir))


def any_training_file(data_dir: Path) -> bool:
    """Whether `data_dir`, or `multi30k` in it, has a file called `train`, of whatever language and spelling."""
    return any(path.name.casefold().startswith("train.") for path in _present(data_dir))


def _present(data_dir: Path) -> list[Path]:
    return sorted(path for folder in folders(data_dir) if folder.is_dir() for path in folder.iterdir())


def folders(data_dir: Path) -> list[Path]:
    """Where the files are looked for."""
    return [data_dir / "multi30k", data_dir]


def stems(name: str) -> list[str]:
    """The stems that a split's files may have. `name` is what the user calls it."""
    return ["test", "test2016", "test_2016_flickr"] if name == "test" else [name]


def _sides(folder: Path, stem: str, langs: tuple[str, str]) -> list[list[Path]]:
    """The files of one stem that are there: those of the source, those of the target. A plain one comes first."""
    return [
        [path for packed in ("", ".gz") if os.path.isfile(path := folder / f"{stem}.{lang}{packed}")] for lang in langs
    ]


def _find_pair(folder: Path, name: str, langs: tuple[str, str]) -> tuple[Path, Path] | None:
    """A split's two files under one stem, or None."""
    for stem in stems(name):
        src, trg = _sides(folder, stem, langs)
        if src and trg:
            return src[0], trg[0]
    return None


def _has_half(folder: Path, name: str, langs: tuple[str, str]) -> bool:
    """Whether one side of a split is there without the other."""
    return any(any(_sides(folder, stem, langs)) for stem in stems(name)) and not has_pair(folder, name, langs)


def has_pair(folder: Path, name: str, langs: tuple[str, str]) -> bool:
    """Whether a split's two files are in this very folder. `name` is their stem."""
    return _find_pair(folder, name, langs) is not None


def any_pair(data_dir: Path, name: str, langs: tuple[str, str]) -> bool:
    """Whether a split's two files are in `data_dir`, or in `multi30k` in it. `name` is their stem."""
    return any(has_pair(folder, name, langs) for folder in folders(data_dir))


def count_lines(path: Path, most: int) -> int:
    """The lines of a file, or `most` if it has more than these."""
    with _opened(path) as file:
        return sum(1 for _ in itertools.islice(file, most))


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
    """Reads a split's two files from their first to their last line. Of a long line, `LINE_BYTES` are kept.

    Args:
        paths: source and target.
        digests: the files' `content_sha256` when the cache was looked up.

    Raises:
        UserError: data (different numbers of lines, changed since, no whole gzip file, or no text), io.
    """
    first = 1
    with _opened(paths[0]) as src_file, _opened(paths[1]) as trg_file:
        sides = [_Lines(file, path) for file, path in zip((src_file, trg_file), paths, strict=True)]
        while True:
            lines = min([side.fill() for side in sides])
            if first == 1:
                for side in sides:
                    side.check_first_line()
            if not lines:
                break
            src, trg = (side.take(lines) for side in sides)
            yield Chunk(paths, first, (src, trg))
            first += lines
        more = [side.count_rest() for side in sides]
        if any(more):
            _raise_different_counts(paths, *(first - 1 + lines for lines in more))
    for side, expected in zip(sides, digests, strict=True):
        if side.digest.hexdigest() != expected:
            todo = "start again when it is complete"
            raise UserError("data", "the file changed while it was read", str(side.path), todo)


class _Lines:
    """Reads a file's lines, about `CHUNK_BYTES` at a time.

    Args:
        file: is read to its end.
        path: its name, for errors.

    Attributes:
        digest: the sha256 of what has been read.
    """

    def __init__(self, file: io.BufferedIOBase, path: Path):
        self._file, self.path = file, path
        self.digest = hashlib.sha256()
        self._pending = b""  # read, and not yet taken
        self._taken = 0  # lines
        self._at_end = False

    def fill(self) -> int:
        """Reads until there is a chunk to take, or at least one line. Returns how many lines there are."""
        while len(self._pending) < CHUNK_BYTES and not self._at_end:
            self._read_on()
        while b"\n" not in self._pending and not self._at_end:
            if len(self._pending) < LINE_BYTES:
                self._read_on()
            else:
                self._skip_to_line_end()
        has_open_line = self._at_end and self._pending and not self._pending.endswith(b"\n")
        return self._pending.count(b"\n") + bool(has_open_line)

    def take(self, lines: int) -> bytes:
        """The next lines. There are so many."""
        rest = b"".join(self._pending.split(b"\n", lines)[lines:])
        text = self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        self._taken += lines
        return text

    def check_first_line(self) -> None:
        """Refuses a file that is no text, as its first line shows, or whose lines end in CR alone.

        Such files have other numbers of lines too. But this is the fault to report.
        """
        if self._pending.count(b"\n") == 1 and not self._at_end:
            self._read_on()
        line, _, more = self._pending.partition(b"\n")
        split_lines(line, self.path)
        if not more and _INNER_RETURN.search(line):
            what = "one line with carriage returns (CR) inside: only LF and CR LF end a line here"
            raise UserError("data", what, str(self.path), "convert it, for example with: tr '\\r' '\\n' <OLD >NEW")

    def count_rest(self) -> int:
        """How many lines come after those that were taken. They are not kept."""
        lines, last = 0, b"\n"
        while self._pending or not self._at_end:
            lines += self._pending.count(b"\n")
            last = self._pending[-1:] or last
            self._pending = b""
            self._read_on()
        return lines + (last != b"\n")

    def _read_on(self) -> None:
        self._pending += self._read()

    def _read(self) -> bytes:
        with _reading(self.path):
            block = self._file.read(CHUNK_BYTES)
        self.digest.update(block)
        self._at_end = not block
        return block

    def _skip_to_line_end(self) -> None:
        """Cuts the line that fills `_pending`. What is cut off has to be text too."""
        edge = LINE_BYTES - 1
        while edge > LINE_BYTES - 4 and self._pending[edge] & 0xC0 == 0x80:
            edge -= 1  # to the first byte of a character
        kept, block = self._pending[:edge], self._pending[edge:]
        decoder = codecs.getincrementaldecoder("utf-8")()
        while True:
            part, newline, rest = block.partition(b"\n")
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block has begun
            try:
                decoder.decode(part, final=bool(newline) or self._at_end)
            except UnicodeDecodeError as error:
                byte = edge - waiting + error.start
                raise _no_utf8(self.path, self._taken + 1, byte, error.object[error.start]) from error
            if b"\0" in part:
                raise _nul(self.path, self._taken + 1, edge + part.index(b"\0"))
            if newline or self._at_end:
                self._pending = kept + newline + rest
                return
            edge += len(part)
            block = self._read()


def _raise_different_counts(paths: tuple[Path, Path], src_lines: int, trg_lines: int) -> None:
    todo = "line n of one must be the translation of line n of the other"
    raise UserError("data", f"{src_lines} lines and {trg_lines} lines", " and ".join(map(str, paths)), todo)


def split_lines(content: bytes, name: str | Path, first: int = 1) -> list[str]:
    r"""The `stripped` lines of a text. They end at `\n` alone.

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
        raise _no_utf8(name, *_place(content, error.start, first), content[error.start]) from error
    if "\0" in text:
        raise _nul(name, *_place(content, content.index(b"\0"), first))
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # no line begins after the last line's end
    return list(map(stripped, lines))


def stripped(line: str) -> str:
    """The line without what nobody sees at its ends: white space, and the characters of `UNSEEN`."""
    return line.strip(_MARGIN)


def _place(content: bytes, offset: int, first: int) -> tuple[int, int]:
    """A byte's line, and where it stands in the line, from 0."""
    return first + content.count(b"\n", 0, offset), offset - content.rfind(b"\n", 0, offset) - 1


def _no_utf8(name: str | Path, line: int, byte: int, value: int) -> UserError:
    what = f"byte {byte + 1} of line {line}, {value:#04x}, is not UTF-8"
    return UserError("data", what, f"{name}:{line}", "convert the file to UTF-8")


def _nul(name: str | Path, line: int, byte: int) -> UserError:
    what = f"byte {byte + 1} of line {line}, 0x00, is a NUL"
    return UserError("data", what, f"{name}:{line}", "remove it, or convert the file to UTF-8")


class Pairs(NamedTuple):
    """The lines of a chunk, without the pairs that have an empty side.

    Attributes:
        src, trg: the lines of both sides.
        dropped: how many pairs have an empty side.
        returns: how many lines have a carriage return (CR) inside.
    """

    src: list[str]
    trg: list[str]
    dropped: int
    returns: int


def read_pairs(chunk: Chunk) -> Pairs:
    """The pairs of a chunk.

    Raises:
        UserError: data, as `split_lines`.
    """
    src, trg = (split_lines(text, path, chunk.first) for text, path in zip(chunk.texts, chunk.paths, strict=True))
    kept = [pair for pair in zip(src, trg, strict=True) if all(pair)]
    returns = sum("\r" in line for pair in kept for line in pair) if any(b"\r" in text for text in chunk.texts) else 0
    return Pairs([line for line, _ in kept], [line for _, line in kept], len(src) - len(kept), returns)
