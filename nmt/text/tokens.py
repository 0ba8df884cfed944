"""Splits text into tokens by spaCy's rules or at white space, a chunk of lines at a time, in one process or several.

A process hands on numbers and the chunk's distinct words. This is compact, so the process that collects the chunks has
little to do. torch is not imported here.
"""

import collections
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, NoReturn

from nmt.errors import UserError
from nmt.flags import CASES, TOKENIZERS
from nmt.text import files

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_CHARACTERS = 10_000  # of a line
MAX_WORD = 200  # characters between two spaces. spaCy's time for them grows with their square if it splits them
MAX_WORDS = 254  # of a sentence, which has 256 tokens with <sos> and <eos>
# Lines that spaCy gets as one text. A call costs more than a line, and a longer text leaves the processor's cache.
LINES_PER_DOC = 30
WORDS_KEPT = 1_000_000  # by a tokenizer, which never forgets one by itself
BYTES_PER_PROCESS = 10 << 20  # a process needs seconds to import spaCy, and less text is done sooner without it
SECONDS_TO_END = 5.0  # that processes have for ending by themselves
AHEAD = 3  # chunks that each process may have, and results for each process that may wait for their turn
_LONG_WORD = re.compile(rf"(\S{{{MAX_WORD}}})\S+")
_UNSEEN = re.compile(f"[{files.UNSEEN}]")


class Tokens(NamedTuple):
    """Tokenised lines.

    Attributes:
        words: the distinct tokens.
        ids: [tokens] unsigned integers: each token's place in `words`, line after line.
        lengths: [lines] int64, in tokens.
        cut: how many lines were too long.
        long_words: how many other lines had a word cut to `MAX_WORD`.
    """

    words: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    cut: int
    long_words: int

    def sentences(self) -> list[list[str]]:
        """The tokens of each line, white-space tokens among them."""
        tokens = map(self.words.__getitem__, self.ids.tolist())
        return [list(itertools.islice(tokens, length)) for length in self.lengths.tolist()]


def tokenise(lines: list[str], lang: str, case: str = "lower", tokenizer: str = "spacy") -> tuple[list[list[str]], int]:
    """The tokens of each line, by the rules of spaCy's blank pipeline, or what stands between white space.

    Args:
        lines: are stripped and `normalised`, and cut to `MAX_CHARACTERS` and then to `MAX_WORDS`. A line end within is
            a space. Where spaCy splits at spaces first, what stands between two of them is cut to `MAX_WORD`.
        lang: spaCy's code of the language. "space" reads none, and takes any.
        case: one of `flags.CASES`: "lower" lower-cases each token, "keep" leaves it as it stands in the line.
        tokenizer: one of `flags.TOKENIZERS`: "space" is for text whose tokens have spaces between them already.

    Returns:
        The tokens of each line, white-space tokens among them, and how many lines were cut.

    Raises:
        UserError: usage, spaCy has no tokenizer for the language, or one that needs a missing package.

    >>> tokenise(["Ein Hund bellt.", "Geht's?"], "de")
    ([['ein', 'hund', 'bellt', '.'], ["geht's", '?']], 0)
    >>> tokenise(["Ein Hund bellt."], "de", "keep")
    ([['Ein', 'Hund', 'bellt', '.']], 0)
    >>> tokenise(["Ein Hund bellt."], "de", tokenizer="space")
    ([['ein', 'hund', 'bellt.']], 0)
    """
    tokens = tokenise_lines([files.stripped(line.replace("\n", " ")) for line in lines], lang, case, tokenizer)
    return tokens.sentences(), tokens.cut


def normalised(text: str) -> str:
    r"""One spelling for what looks the same: Unicode's NFC, without the characters of `files.UNSEEN`.

    >>> normalised("Gro\u0308\xdfe und Ta\xadge\u200bbuch")
    'Größe und Tagebuch'
    """
    return text if text.isascii() else unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def without_long_words(line: str, lang: str, tokenizer: str = "spacy") -> tuple[str, bool]:
    """The line with its words cut to `MAX_WORD` characters, and whether one was longer. A word ends at white space.

    Languages that spaCy does not split at spaces first have no such words. Their lines stay.
    """
    from spacy.tokenizer import Tokenizer

    if max(map(len, line.split()), default=0) <= MAX_WORD:
        return line, False
    if tokenizer == "spacy" and not isinstance(tokenizer_of(lang), Tokenizer):
        return line, False
    return _LONG_WORD.sub(r"\1", line), True


def tokenise_lines(lines: list[str], lang: str, case: str = "lower", tokenizer: str = "spacy") -> Tokens:
    """As `tokenise`, in compact form. The lines are `files.stripped`, and hold no line end."""
    if case not in CASES:
        raise ValueError(f"case is {case!r}, expected one of {', '.join(CASES)}")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer is {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}")
    return _split_at_space(lines, case) if tokenizer == "space" else _split_by_spacy(lines, lang, case)


def _split_at_space(lines: list[str], case: str) -> Tokens:
    """The words of lines that are tokenised already."""
    places: dict[str, int] = {}
    ids: list[int] = []
    lengths = np.zeros(len(lines), np.int64)
    cut = long_words = 0
    for number, line in enumerate(lines):
        head = line[:MAX_CHARACTERS]
        has_long_word = len(head) > MAX_WORD and max(map(len, head.split())) > MAX_WORD
        if has_long_word:
            head = _LONG_WORD.sub(r"\1", head)
        head = normalised(head)
        words = (head if case == "keep" else head.lower()).split()
        is_cut = len(line) > MAX_CHARACTERS or len(words) > MAX_WORDS
        ids += [places.setdefault(word, len(places)) for word in words[:MAX_WORDS]]
        lengths[number] = min(len(words), MAX_WORDS)
        cut += is_cut
        long_words += has_long_word and not is_cut
    return Tokens(list(places), np.array(ids, np.min_scalar_type(len(places))), lengths, cut, long_words)


def _split_by_spacy(lines: list[str], lang: str, case: str) -> Tokens:
    """The words of lines by spaCy's rules for a language."""
    from spacy.attrs import LOWER, ORTH
    from spacy.tokenizer import Tokenizer

    attribute = ORTH if case == "keep" else LOWER
    tokenizer = _tokenizer(lang)
    strings = tokenizer.vocab.strings
    newline = strings.add("\n")
    # A rule-based tokenizer makes a token of each line's end, and never looks past it. So many lines can be one text.
    # Others, such as the Chinese one, get one line at a time.
    by_rules = isinstance(tokenizer, Tokenizer)
    together = LINES_PER_DOC if by_rules else 1
    heads = [line[:MAX_CHARACTERS] for line in lines]
    has_long_word = np.zeros(len(heads), bool)
    for place, head in enumerate(heads):
        if by_rules and len(head) > MAX_WORD and max(map(len, head.split())) > MAX_WORD:
            heads[place] = _LONG_WORD.sub(r"\1", head)
            has_long_word[place] = True
    heads = [normalised(head).rstrip() for head in heads]  # now, because its time grows with a word's square too
    texts = [head for head in heads if head]
    pieces = []
    for start in range(0, len(texts), together):
        pieces.append(tokenizer("\n".join(texts[start : start + together])).to_array(attribute))
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
    ids = ids.astype(np.min_scalar_type(len(words)))
    return Tokens(words, ids, lengths, int(cut.sum()), int((has_long_word & ~cut).sum()))


def import_spacy() -> None:
    """Imports spaCy without the parts that a tokenizer does not need, which take most of the time.

    It imports torch if that is installed, and its commands, because it offers one of them as a function.
    """
    if "spacy" in sys.modules:
        return
    stubs: dict[str, types.ModuleType | None] = {
        "torch": None,  # None forbids the import
        "spacy.cli": types.ModuleType("spacy.cli"),
        "spacy.cli.info": types.ModuleType("spacy.cli.info"),
    }
    vars(stubs["spacy.cli.info"])["info"] = None
    before = {name: sys.modules.pop(name) for name in stubs if name in sys.modules}
    sys.modules |= stubs  # type: ignore[arg-type]  # typeshed has modules alone
    try:
        import spacy  # noqa: F401
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
        sys.modules |= before


def tokenizer_of(lang: str, most: int = WORDS_KEPT):
    """spaCy's tokenizer of a language. It is a new one when the last has more than `most` words in its memory.

    Raises:
        UserError: as `tokenise`.
    """
    if len(_tokenizer(lang).vocab.strings) > most:
        _tokenizer.cache_clear()
    return _tokenizer(lang)


@functools.cache
def _tokenizer(lang: str):
    import spacy  # here, because it takes seconds, and a start from the cache does not need it

    try:
        return spacy.blank(lang).tokenizer
    except (ImportError, AttributeError) as error:  # AttributeError: a module of spaCy that is no language
        reason = str(error).splitlines()[0]
        todo = "install what it needs, choose another of spaCy's languages (xx for one that has none), or give "
        todo += "--tokenizer space for text that is tokenised already"
        raise UserError("usage", f"no tokenizer for {lang!r}: {reason}", "--src-lang, --trg-lang", todo) from error


class TokenChunk(NamedTuple):
    """A tokenised `files.Chunk`: the tokens of both sides, and the counts of `files.Pairs`."""

    src: Tokens
    trg: Tokens
    dropped: int
    returns: int


def tokenise_chunk(
    chunk: files.Chunk, langs: tuple[str, str], case: str = "lower", tokenizer: str = "spacy"
) -> TokenChunk:
    """Tokenises a chunk's pairs. Raises as `files.read_pairs` and `tokenise` do."""
    pairs = files.read_pairs(chunk)
    sides = zip((pairs.src, pairs.trg), langs, strict=True)
    src, trg = (tokenise_lines(lines, lang, case, tokenizer) for lines, lang in sides)
    return TokenChunk(src, trg, pairs.dropped, pairs.returns)


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def tokenising(
    langs: tuple[str, str], processes: int, case: str = "lower", tokenizer: str = "spacy"
) -> Iterator[Callable[[Iterable[files.Chunk]], Iterator[TokenChunk]]]:
    """Starts processes that tokenise while the body runs.

    Args:
        langs: spaCy's codes of both languages.
        processes: their number. With fewer than 2, this process does the work. So it does for "space", which is quick.
        case, tokenizer: as in `tokenise`.

    Yields:
        A function from chunks to their `TokenChunk`s, in the same order. It may be called again when the last call's
        results were all taken and none was an error. It raises

        RuntimeError: a process was killed or has failed.
        UserError: as `tokenise_chunk`.
    """
    if processes < 2 or tokenizer == "space":
        yield lambda chunks: (tokenise_chunk(chunk, langs, case, tokenizer) for chunk in chunks)
        return
    pipes, far_ends = zip(*(multiprocessing.Pipe() for _ in range(processes)), strict=True)
    descriptors = [end.fileno() for end in far_ends]
    # This is a program of its own. A process of multiprocessing would import the main program again, and torch with it,
    # which takes longer than tokenising a hundred thousand lines. In its own session, Ctrl-C does not reach it. It will
    # fork, and only a process without threads can do so safely, so numpy is told to start none.
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-m", "nmt.text", *langs, case, *map(str, descriptors)],
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
            server.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _in_turn(pipes: list[Connection], chunks: Iterable[files.Chunk]) -> Iterator[TokenChunk]:
    """The results of `chunks`, in their order. A process that is done gets the next chunk.

    Each process has its own pipe. A killed process could break a shared one and leave the others, and us, waiting.
    """
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
            ready = wait(busy)
            for pipe in [pipe for pipe in busy if pipe in ready]:
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
    except (EOFError, OSError) as error:  # OSError: in the middle of a message
        raise RuntimeError("a tokenising process ended early: killed, or out of memory?") from error


def serve(langs: tuple[str, str], case: str, descriptors: list[int]) -> NoReturn:
    """Imports spaCy once, forks one process for each pipe, and waits for them. They end with their pipes.

    Processes that each import spaCy, at the same time, would be ready later.
    """
    import_spacy()
    for lang in langs:
        with contextlib.suppress(UserError):  # the first chunk raises it again
            _tokenizer(lang)
    gc.disable()  # nothing here leaves cycles behind, and looking for them takes a twentieth of the time
    for place, descriptor in enumerate(descriptors):
        if not os.fork():
            for later in descriptors[place + 1 :]:
                os.close(later)  # left open here, it would hide from the parent that its process has ended
            _serve(Connection(descriptor), langs, case)
        os.close(descriptor)
    for _ in descriptors:
        os.wait()
    os._exit(0)  # tidying up after spaCy takes a tenth of a second


def _serve(pipe: Connection, langs: tuple[str, str], case: str) -> NoReturn:
    """The life of a tokenising process. One thread receives chunks and another sends results while it computes."""
    chunks: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive_chunks, args=(pipe, chunks), daemon=True).start()
    threading.Thread(target=_send_results, args=(pipe, results), daemon=True).start()
    while True:
        try:
            results.put(tokenise_chunk(chunks.get(), langs, case))
        except UserError as error:
            results.put(error)


def _receive_chunks(pipe: Connection, chunks: queue.SimpleQueue) -> None:
    try:
        while True:
            chunks.put(pipe.recv())
    finally:
        os._exit(1)  # the other process has ended, or was killed


def _send_results(pipe: Connection, results: queue.SimpleQueue) -> None:
    try:
        while True:
            pipe.send(results.get())
    finally:
        os._exit(1)
