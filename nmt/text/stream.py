"""Lines from a file, a pipe or a terminal, as they come, whatever they hold. Memory does not grow with their number."""

import codecs
import os
import re
import select
from collections import Counter, deque
from collections.abc import Iterator

from nmt.errors import UserError
from nmt.text import files

BLOCK_BYTES = 1 << 16
LINE_BYTES = 1 << 22  # of a line that are kept
FIRST_WINDOW, LARGEST_WINDOW = 256, 4096  # lines
WINDOW_BYTES = 1 << 20
PATIENCE = 0.05  # seconds that a window which is not full waits for more lines
# Characters that neither a reader nor a model can use, and that could control a terminal. White space is none of them.
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")

# What may happen to a line. A number of lines stands in front where it is told.
NOT_UTF8 = "line(s) not in UTF-8: the wrong bytes became U+FFFD"
CONTROL = "line(s) with control characters, such as NUL: these became spaces"
HUGE = f"line(s) of more than {LINE_BYTES >> 20} MiB: what is beyond was left out"
RETURN = "line(s) with a CR in the middle, which ends no line here"
UTF_16 = "line that begins as UTF-16 does: convert the text by iconv -f UTF-16 -t UTF-8"


class Changes(Counter[str]):
    """Counts what happened to lines, by kind.

    Attributes:
        line: number of the line at hand, from 1. 0: lines have no numbers.
        first: kind → the line where it happened first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line = 0
        self.first: dict[str, int] = {}

    def note(self, kind: str) -> None:
        """Something happened to the line at hand."""
        self[kind] += 1
        self.first.setdefault(kind, self.line)


def windows(
    file: int, changes: Changes, name: str = "standard input", first: int = FIRST_WINDOW
) -> Iterator[list[str]]:
    r"""Reads a file to its end, some lines at a time. Lines end at `\n` alone.

    A window that is not full is handed on if no more lines come for a moment. So whoever writes a line into a pipe gets
    it translated while the pipe stays open. The first windows are small, and the first translations come soon.

    Args:
        file: a descriptor.
        changes: counts the lines that had to be changed, by `NOT_UTF8`, `CONTROL` and the like.
        name: the file's, for errors.
        first: lines of the first window.

    Yields:
        The lines of a window, `readable`. At least one.

    Raises:
        UserError: io, the file cannot be read.
    """
    lines: deque[bytes] = deque()  # complete, and not yet handed on
    pending = 0  # bytes in `lines`
    open_line = bytearray()
    at_end, most = False, first
    while lines or not at_end:
        full = len(lines) >= most or pending >= WINDOW_BYTES
        if not at_end and not full and (not lines or _has_more(file)):
            try:
                block = os.read(file, BLOCK_BYTES)
            except OSError as error:
                raise UserError("io", f"cannot read: {error.strerror}", name, "give a text file") from error
            at_end = not block
            head, *rest = block.split(b"\n")
            room = LINE_BYTES + 1 - len(open_line)  # one byte more tells that the line is too long
            open_line += head[:room]
            for part in rest:
                lines.append(bytes(open_line))
                pending += len(open_line)
                open_line[:] = part
            if at_end and open_line:
                lines.append(bytes(open_line))
                pending += len(open_line)
            continue
        window: list[bytes] = []
        size = 0
        while lines and len(window) < most and size < WINDOW_BYTES:
            window.append(lines.popleft())
            size += len(window[-1])
        pending -= size
        if window:
            yield [_numbered(line, changes) for line in window]
            most = min(2 * most, LARGEST_WINDOW)


def _numbered(line: bytes, changes: Changes) -> str:
    changes.line += 1
    if changes.line == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        changes.note(UTF_16)
    return readable(line, changes)


def _has_more(file: int) -> bool:
    """Whether something can be read soon. The end of a file counts."""
    return bool(select.select([file], [], [], PATIENCE)[0])


def readable(line: bytes, changes: Changes) -> str:
    r"""A line as text, without what nobody sees at its ends. What is no text is replaced.

    Args:
        line: without its `\n`.
        changes: as in `windows`.

    >>> changes = Changes()
    >>> readable(b"Ein\0Hund \xff\r", changes), sorted(changes.values())
    ('Ein Hund �', [1, 1])
    """
    if len(line) > LINE_BYTES:
        changes.note(HUGE)
        edge = LINE_BYTES
        while edge > LINE_BYTES - 4 and line[edge] & 0xC0 == 0x80:
            edge -= 1  # to the first byte of a character
        line = line[:edge]
    try:
        text = line.decode()
    except UnicodeDecodeError:
        changes.note(NOT_UTF8)
        text = line.decode(errors="replace")
    if _CONTROL.search(text):
        changes.note(CONTROL)
        text = _CONTROL.sub(" ", text)
    text = files.stripped(text)
    if "\r" in text:
        changes.note(RETURN)
    return text
