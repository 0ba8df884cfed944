"""Text to words: spaCy's rules, in this process or in several, a chunk of lines at a time.

What a process hands on is compact, numbers and the chunk's distinct words, so that the process that collects the
chunks has little to do. torch is not imported here.
"""

import collections
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, NoReturn

from nmt.errors import UserError
from nmt.text import files

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_CHARACTERS = 10_000  # of a line
MAX_WORDS = 254  # of a sentence; 256 with <sos> and <eos>
# Lines that spaCy is given as one text: a call costs more than a line, and a longer text leaves the processor's cache.
LINES_PER_DOC = 30
WORDS_KEPT = 1_000_000  # by a tokenizer: it never forgets one of its own accord
BYTES_PER_PROCESS = 10 << 20  # a process needs seconds to import spaCy: less text than that is done sooner without it
PATIENCE = 5.0  # seconds that processes have for ending by themselves
AHEAD = 3  # chunks that each process may have, and results for each that may wait for their turn


class Tokens(NamedTuple):
    """Tokenised lines.

    Attributes:
        words: the distinct tokens, lower-cased.
        ids: [tokens] unsigned integers, each token's place in `words`, line after line.
        lengths: [lines] int64, in tokens.
        cut: how many lines were too long.
    """

    words: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    cut: int

    def sentences(self) -> list[list[str]]:
        """The tokens of each line, white-space tokens among them."""
        tokens = map(self.words.__getitem__, self.ids.tolist())
        return [list(itertools.islice(tokens, length)) for length in self.lengths.tolist()]


def tokenise(lines: list[str], lang: str) -> tuple[list[list[str]], int]:
    """Lower-cased tokens of each line, by the rules of spaCy's blank pipeline, cut to `MAX_WORDS`.

    Args:
        lines: of each, stripped, the first `MAX_CHARACTERS` are read; a line end within is a space.
        lang: spaCy's code of the language.

    Returns:
        The tokens of each line, white-space tokens among them, and how many lines were cut.

    Raises:
        UserError: usage, if spaCy has no tokenizer for the language, or not without a package that is missing.

    >>> tokenise(["Ein Hund bellt.", "Geht's?"], "de")
    ([['ein', 'hund', 'bellt', '.'], ["geht's", '?']], 0)
    """
    tokens = tokenise_lines([line.replace("\n", " ").strip() for line in lines], lang)
    return tokens.sentences(), tokens.cut


def tokenise_lines(lines: list[str], lang: str) -> Tokens:
    """As `tokenise`, in its compact form; the lines must be stripped, and hold no line end."""
    from spacy.attrs import LOWER
    from spacy.tokenizer import Tokenizer

    tokenizer = _tokenizer(lang)
    strings = tokenizer.vocab.strings
    newline = strings.add("\n")
    # A rule-based tokenizer makes a token of each line's end and looks no further than it, so that many lines can be
    # one text. Others, such as the Chinese one, are given line by line.
    together = LINES_PER_DOC if isinstance(tokenizer, Tokenizer) else 1
    heads = [line[:MAX_CHARACTERS].rstrip() for line in lines]
    texts = [head for head in heads if head]
    pieces = []
    for start in range(0, len(texts), together):
        pieces.append(tokenizer("\n".join(texts[start : start + together])).to_array(LOWER))
        pieces.append(np.array([newline], np.uint64))
    hashes = np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)

    is_end = hashes == newline
    lengths = np.zeros(len(heads), np.int64)
    lengths[np.array([bool(head) for head in heads], bool)] = np.diff(np.flatnonzero(is_end), prepend=-1) - 1
    hashes = hashes[~is_end]
    cut = (lengths > MAX_WORDS) | np.array([len(line) > MAX_CHARACTERS for line in lines], bool)
    if cut.any():
        starts = np.cumsum(lengths) - lengths
        hashes = hashes[np.arange(len(hashes)) - np.repeat(starts, lengths) < MAX_WORDS]
        lengths = np.minimum(lengths, MAX_WORDS)
    distinct, ids = np.unique(hashes, return_inverse=True)
    words = [strings[key] for key in distinct.tolist()]
    if len(strings) > WORDS_KEPT:
        _tokenizer.cache_clear()
    return Tokens(words, ids.astype(np.min_scalar_type(len(words))), lengths, int(cut.sum()))


@functools.cache
def _tokenizer(lang: str):
    import spacy  # here, because a start from the cache does not need the seconds that it takes

    try:
        return spacy.blank(lang).tokenizer
    except (ImportError, AttributeError) as error:  # AttributeError: one of spaCy's modules that is no language
        reason = str(error).splitlines()[0]
        todo = "install what it needs, or choose another of spaCy's languages (xx for one that has none)"
        raise UserError("usage", f"no tokenizer for {lang!r}: {reason}", "--src-lang, --trg-lang", todo) from error


class TokenChunk(NamedTuple):
    """What becomes of a `files.Chunk`: both sides' tokens, and how many pairs had an empty side."""

    src: Tokens
    trg: Tokens
    dropped: int


def tokenise_chunk(chunk: files.Chunk, langs: tuple[str, str]) -> TokenChunk:
    """The tokens of a chunk's pairs; raises what reading and tokenising it raises."""
    src, trg, dropped = files.read_pairs(chunk)
    return TokenChunk(tokenise_lines(src, langs[0]), tokenise_lines(trg, langs[1]), dropped)


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def tokenised(langs: tuple[str, str], processes: int) -> Iterator[Callable[[Iterable[files.Chunk]], Iterator]]:
    """A `map` of `tokenise_chunk` that keeps the order; while the body runs, processes share the chunks. A map that was
    not followed to its end, or has raised an error, must be the last one.

    Args:
        langs: spaCy's codes of both languages.
        processes: fewer than 2 stand for this one.

    Raises:
        RuntimeError: from the map, a process was killed or has failed.
        UserError: from the map, as `tokenise_chunk`.
    """
    if processes < 2:
        yield functools.partial(map, functools.partial(tokenise_chunk, langs=langs))
        return
    pipes, far_ends = zip(*(multiprocessing.Pipe() for _ in range(processes)), strict=True)
    descriptors = [end.fileno() for end in far_ends]
    # A program of its own, and not a process of multiprocessing: that would import the main program again, and with
    # it torch, which takes longer than to tokenise a hundred thousand lines. In a session of its own Ctrl-C does not
    # reach it. Only a process without threads can be forked safely, so numpy is told to start none.
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-m", "nmt.text", *langs, *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
        pass_fds=descriptors,
        start_new_session=True,
    )
    try:
        for end in far_ends:
            end.close()
        yield functools.partial(_in_turn, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _in_turn(pipes: list[Connection], chunks: Iterable[files.Chunk]) -> Iterator[TokenChunk]:
    """The results of `chunks`, in their order, whichever process is done first; that one gets the next chunk. One pipe
    each: a shared one could break in the hands of a process that is killed, and leave the others and us waiting."""
    numbered = enumerate(chunks)
    out: dict[Connection, collections.deque[int]] = {pipe: collections.deque() for pipe in pipes}
    results: dict[int, TokenChunk | UserError] = {}  # that wait for their turn
    turn = 0
    while True:
        while min(map(len, out.values())) < AHEAD and len(results) < AHEAD * len(pipes):
            given = next(numbered, None)
            if given is None:
                break
            number, chunk = given
            pipe = min(pipes, key=lambda pipe: len(out[pipe]))
            with _named_failure():
                pipe.send(chunk)
            out[pipe].append(number)
        if turn in results:
            result = results.pop(turn)
            if isinstance(result, UserError):
                raise result
            yield result
            turn += 1
        elif busy := [pipe for pipe in pipes if out[pipe]]:
            for pipe in wait(busy):
                results[out[pipe].popleft()] = _receive(pipe)
        else:
            return


def _receive(pipe: Connection) -> TokenChunk | UserError:
    with _named_failure():
        return pipe.recv()


@contextlib.contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # OSError: in the midst of a message
        raise RuntimeError("a tokenising process ended early: killed, or out of memory?") from error


def serve(langs: tuple[str, str], descriptors: list[int]) -> NoReturn:
    """Imports spaCy once, becomes as many processes as there are pipes, and waits for them; they end with their pipes.

    Processes that all import it for themselves, at the same time, are ready later.
    """
    # What a tokenizer does not need of spaCy takes most of the import: torch, which it imports where it finds it, and
    # its commands, of which it offers one as a function.
    sys.modules["torch"] = None
    sys.modules["spacy.cli"] = types.ModuleType("spacy.cli")
    sys.modules["spacy.cli.info"] = types.ModuleType("spacy.cli.info")
    sys.modules["spacy.cli.info"].info = None
    for lang in langs:
        with contextlib.suppress(UserError):  # the first chunk raises it once more
            _tokenizer(lang)
    gc.disable()  # nothing here leaves cycles behind, and to look for them takes a twentieth of the time
    for place, descriptor in enumerate(descriptors):
        if not os.fork():
            for later in descriptors[place + 1 :]:
                os.close(later)  # else it would stay open when its process ends, and nobody would notice that
            _serve(Connection(descriptor), langs)
        os.close(descriptor)
    for _ in descriptors:
        os.wait()
    os._exit(0)  # to tidy up what spaCy has made takes a tenth of a second


def _serve(pipe: Connection, langs: tuple[str, str]) -> NoReturn:
    """The life of a process that tokenises what another sends it. Threads send and take in while it computes."""
    chunks: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(pipe, chunks), daemon=True).start()
    threading.Thread(target=_send_out, args=(pipe, results), daemon=True).start()
    while True:
        try:
            results.put(tokenise_chunk(chunks.get(), langs))
        except UserError as error:
            results.put(error)


def _take_in(pipe: Connection, chunks: queue.SimpleQueue) -> None:
    try:
        while True:
            chunks.put(pipe.recv())
    finally:
        os._exit(1)  # the other has gone, killed perhaps


def _send_out(pipe: Connection, results: queue.SimpleQueue) -> None:
    try:
        while True:
            pipe.send(results.get())
    finally:
        os._exit(1)
