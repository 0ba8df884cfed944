"""Lines as they come: windows of them, what is replaced, and that memory does not grow."""

import os
import threading
import tracemalloc

from nmt.text import stream

import pytest
from conftest import refused


def read(content: bytes, first: int = 1000) -> tuple[list[list[str]], stream.Changes]:
    """The windows of a text that comes through a pipe all at once."""
    changes = stream.Changes()
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        return list(stream.windows(reading, changes, first=first)), changes
    finally:
        thread.join()
        os.close(reading)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"a\n\n b \r\n", ["a", "", "b"]),
        ("\ufeffa\u2028b\x85c\rd\x0be\x0cf\n".encode(), ["a\u2028b\x85c\rd\x0be\x0cf"]),
    ],
)
def test_a_line_ends_at_a_line_feed_alone(content, lines):
    windows, changes = read(content)
    assert [line for window in windows for line in window] == lines
    assert changes == ({stream.RETURN: 1} if "\r" in "".join(lines) else {})


def test_what_is_no_text_is_replaced_and_counted():
    windows, changes = read(b"a\0b\n\x1b[31mred\x7f\n\xff\xfe\nok\n" + "ä".encode()[:1] + b"\n")
    assert windows == [["a b", "[31mred", "��", "ok", "�"]]
    assert changes == {stream.CONTROL: 2, stream.NOT_UTF8: 2}
    assert changes.first == {stream.CONTROL: 1, stream.NOT_UTF8: 3}


@pytest.mark.parametrize("letter", ["a", "ä", "€", "😀"])
@pytest.mark.parametrize("shift", range(4))
def test_a_huge_line_is_cut_between_two_letters(monkeypatch, letter, shift):
    monkeypatch.setattr(stream, "LINE_BYTES", 100)
    line = "x" * shift + letter * 1000
    windows, changes = read(f"{line}\n{line}\nshort\n".encode())
    (lines,) = windows
    assert lines[2] == "short"
    assert line.startswith(lines[0]) and lines[0] == lines[1]
    assert 100 - 4 < len(lines[0].encode()) <= 100
    assert changes == {stream.HUGE: 2}


def test_a_line_of_the_largest_size_is_whole(monkeypatch):
    monkeypatch.setattr(stream, "LINE_BYTES", 100)
    assert read(b"x" * 100 + b"\ny")[0] == [["x" * 100, "y"]]
    assert set(stream.readable(b"\x80" * 101, stream.Changes())) == {"�"}, "bytes that begin no letter"


def test_windows_grow_to_their_limits(monkeypatch):
    monkeypatch.setattr(stream, "LARGEST_WINDOW", 40)
    windows, _ = read(b"a line\n" * 300, first=10)
    assert [len(window) for window in windows] == [10, 20, 40, 40, 40, 40, 40, 40, 30]
    monkeypatch.setattr(stream, "WINDOW_BYTES", 100)
    windows, _ = read(b"x" * 60 + b"\n" + b"a line\n" * 300, first=10)
    assert max(len("".join(window)) for window in windows) <= 106
    assert sum(map(len, windows)) == 301


def test_lines_that_are_there_do_not_wait_for_more():
    reading, writing = os.pipe()
    windows = stream.windows(reading, stream.Changes())
    for line in (b"one\n", b"two\nthree\nfo", b"ur\n"):
        os.write(writing, line)
        if b"fo" in line:
            assert next(windows) == ["two", "three"]
        else:
            assert next(windows) == [{b"one\n": "one", b"ur\n": "four"}[line]]
    os.close(writing)
    assert list(windows) == []
    os.close(reading)


def most_held(content: bytes, separator: bytes) -> int:
    """How much was read and not yet handed on, at most: line ends, or bytes with an empty separator."""
    taken = handed = most = 0
    real = os.read

    def counting(file: int, size: int) -> bytes:
        nonlocal taken
        block = real(file, size)
        taken += block.count(separator) if separator else len(block)
        return block

    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writing, content), os.close(writing)))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", counting)
        for window in stream.windows(reading, stream.Changes()):
            most = max(most, taken - handed)
            handed += len(window) if separator else sum(len(line) + 1 for line in window)
    assert handed == taken
    thread.join()
    os.close(reading)
    return most


def test_no_more_than_a_window_and_a_block_are_held():
    """The fast sibling of the test with a million lines in test_translate.py."""
    assert most_held(b"a line\n" * 200_000, b"\n") <= stream.LARGEST_WINDOW + stream.BLOCK_BYTES // 7 + 1
    long_lines = (b"x" * 30_000 + b"\n") * 400
    assert most_held(long_lines, b"") <= stream.WINDOW_BYTES + stream.BLOCK_BYTES + 30_001 < len(long_lines) / 10


def test_of_a_line_without_an_end_no_more_is_held_than_is_kept(monkeypatch):
    monkeypatch.setattr(stream, "LINE_BYTES", 1000)
    content = b"x" * 8_000_000
    tracemalloc.start()
    try:
        windows, _ = read(content)
        assert windows == [["x" * 1000]]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    refused("io", next, stream.windows(folder, stream.Changes(), "its name"), says="its name")
    os.close(folder)


def test_files_of_another_make_are_told_of():
    """Old line ends, and UTF-16. Each line is read as it is."""
    windows, changes = read(b"ein\r\nzwei\rdrei\n\r\nvier\rf\n")
    assert windows == [["ein", "zwei\rdrei", "", "vier\rf"]]
    assert changes == {stream.RETURN: 2} and changes.first == {stream.RETURN: 2}
    for codec in ("utf-16-le", "utf-16-be"):
        windows, changes = read("\ufeffHund\nKatze\n".encode(codec))
        assert changes[stream.UTF_16] == 1 and changes.first[stream.UTF_16] == 1
    assert stream.UTF_16 not in read("Hund\n".encode("utf-16-le") * 2)[1]
