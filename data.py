"""The data: parallel text files in, batches of token ids out.

    corpus = data.load("sample")                                    # finds or downloads, tokenises, caches
    for indices in data.epoch_batches(corpus.train.src.lengths, corpus.train.trg.lengths, 128, seed=1234, epoch=0):
        batch = data.make_batch(corpus.train, data.rank_share(indices, rank, world_size))

From top to bottom: the vocabulary, the corpus as tensors, batches, text files, tokenising, the cache, the download.
Everything lives on the CPU until `Batch.to`. Nothing is pickled.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from devices import cores
from errors import UserError, printable

SPECIALS = ["<unk>", "<pad>", "<sos>", "<eos>"]
UNK, PAD, SOS, EOS = 0, 1, 2, 3
SPLITS = ("train", "val", "test")
MAX_CHARACTERS = 10_000  # of a line
MAX_WORDS = 254  # of a sentence; 256 with <sos> and <eos>
POOL = 50  # batches that are sorted by length together

Log = Callable[[str], object]


# ---------------------------------------------------------------- vocabulary


class Vocabulary:
    """The words of one language and their ids.

    Args:
        itos: the words in the order of their ids, the four special ones first.

    Raises:
        ValueError: `itos` does not begin with `SPECIALS`.

    >>> vocab = Vocabulary(["<unk>", "<pad>", "<sos>", "<eos>", "ein", "hund"])
    >>> vocab.encode(["ein", "dackel"])
    [4, 0]
    >>> vocab.decode([2, 4, 5, 3, 1])
    ['ein', 'hund']
    """

    def __init__(self, itos: list[str]):
        if itos[: len(SPECIALS)] != SPECIALS:
            raise ValueError(f"a vocabulary begins with {SPECIALS}, not with {itos[: len(SPECIALS)]}")
        self.itos = itos
        # Without the specials: a `<pad>` that stands in somebody's text is an unknown word and not padding.
        self._ids = {word: index for index, word in enumerate(itos) if index >= len(SPECIALS)}

    @classmethod
    def build(cls, token_lists: Iterable[list[str]], min_freq: int = 2) -> "Vocabulary":
        """The words seen at least `min_freq` times, by frequency, ties alphabetical: torchtext 0.6's order."""
        from torchtext.vocab import Vocab  # here, because a start from the cache does not need it

        counter = Counter(itertools.chain.from_iterable(token_lists))
        return cls(Vocab(counter, min_freq=min_freq, specials=SPECIALS).itos)

    def __len__(self) -> int:
        return len(self.itos)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The tokens' ids, without `<sos>` and `<eos>`; an unknown token is `UNK`."""
        return [self._ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words before the first `EOS`, without a leading `SOS`."""
        words = [self.itos[index] for index in itertools.takewhile(lambda index: index != EOS, ids)]
        return words[1:] if words[:1] == [SPECIALS[SOS]] else words


# ---------------------------------------------------------------- the corpus as tensors


@dataclass(frozen=True)
class Side:
    """One language of a split: all sentences in one flat tensor.

    Args:
        ids: [tokens] int32, every sentence with its `<sos>` and `<eos>`.
        offsets: [sentences + 1] int64; sentence i is `ids[offsets[i]:offsets[i + 1]]`.

    >>> vocab = Vocabulary(SPECIALS + ["ein", "hund"])
    >>> side = Side.encode([["ein", "hund"], ["hund"]], vocab)
    >>> side.ids.tolist(), side.offsets.tolist(), side.lengths.tolist()
    ([2, 4, 5, 3, 2, 5, 3], [0, 4, 7], [4, 3])
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def encode(cls, sentences: list[list[str]], vocab: Vocabulary) -> "Side":
        offsets = np.cumsum([0] + [len(words) + 2 for words in sentences], dtype=np.int64)
        ids = itertools.chain.from_iterable([SOS, *vocab.encode(words), EOS] for words in sentences)
        return cls(torch.from_numpy(np.fromiter(ids, np.int32, offsets[-1])), torch.from_numpy(offsets))

    @property
    def lengths(self) -> torch.Tensor:
        """[sentences] int64, in tokens, `<sos>` and `<eos>` counted."""
        return self.offsets.diff()


@dataclass(frozen=True)
class Split:
    """The pairs of one split.

    Args:
        src, trg: the ids of both languages, pair by pair.
        src_tokens: the sources as words, unknown ones too, for a model with a vocabulary of its own; None for train.
        trg_tokens: the targets as words, unknown ones too and white space left out, for scoring; None for train.
    """

    src: Side
    trg: Side
    src_tokens: list[list[str]] | None = None
    trg_tokens: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.src.offsets) - 1


@dataclass(frozen=True)
class Corpus:
    """Everything `load` returns: vocabularies, splits, `fingerprint` (sha256 of the six files' contents), and `notes`,
    lines for the log about pairs that were dropped and sentences that were cut."""

    src_vocab: Vocabulary
    trg_vocab: Vocabulary
    train: Split
    val: Split
    test: Split
    src_lang: str
    trg_lang: str
    fingerprint: str
    notes: list[str]


def load(
    data_dir: str | Path,
    *,
    src_lang: str = "de",
    trg_lang: str = "en",
    train_name: str = "train",
    val_name: str = "val",
    test_name: str = "test",
    min_freq: int = 2,
    workers: int = 10,
    cache_dir: str | Path | None = None,
    mirror: str | None = None,
    download_timeout: float = 300.0,
    log: Log = print,
) -> Corpus:
    """The corpus in `data_dir`, from the cache where it has these contents; Multi30k is downloaded if nothing is there.

    Args:
        data_dir: holds `multi30k/` or the six files themselves, each plain or as `.gz`.
        src_lang, trg_lang: spaCy's codes of the languages, and the files' suffixes.
        train_name, val_name, test_name: the files' stems; "test" also finds `test2016` and `test_2016_flickr`.
        min_freq: how often a word must stand in train to be in the vocabulary.
        workers: processes that tokenise, at most.
        cache_dir: where the tokenised corpus is kept, by default `${XDG_CACHE_HOME:-~/.cache}/gru-for-pytorch`.
        mirror: a second address to download from.
        download_timeout: seconds, for the whole download.
        log: takes the lines that tell what is going on.

    Raises:
        UserError: data (a file is missing or unusable), usage (no tokenizer for a language), io (no download).
    """
    data_dir = Path(data_dir)
    langs, names = (src_lang, trg_lang), (train_name, val_name, test_name)
    if data_dir.is_file() or not data_dir.absolute().parent.is_dir():
        what = "is a file, not a folder" if data_dir.is_file() else "there is no such folder, nor the one above it"
        raise UserError("data", what, str(data_dir), "name a folder with --data-dir")
    if (langs, names) == (("de", "en"), SPLITS) and not any_corpus(data_dir, langs):
        download_multi30k(data_dir, mirror=mirror, timeout=download_timeout, log=log)
    files = find_files(data_dir, langs, names)
    contents = [(read_file(src), read_file(trg)) for src, trg in files]
    fingerprint = _sha256(*(hashlib.sha256(content).digest() for pair in contents for content in pair))

    def build() -> Corpus:
        log(f"tokenising {files[0][0].parent}: no readable cache has these contents")
        return _build(files, contents, langs, min_freq, workers, fingerprint)

    versions = [importlib.metadata.version(package) for package in ("spacy", "torchtext")]
    key = _sha256(json.dumps([CACHE_FORMAT, fingerprint, langs, min_freq, versions]).encode())
    return _from_cache(_cache_folder(cache_dir, log), key, build, log)


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _build(
    files: list[tuple[Path, Path]],
    contents: list[tuple[bytes, bytes]],
    langs: tuple[str, str],
    min_freq: int,
    workers: int,
    fingerprint: str,
) -> Corpus:
    vocabs, splits, notes = [], [], []
    for name, paths, texts in zip(SPLITS, files, contents, strict=True):
        sides, words = [], []
        for index, lines in enumerate(_read_pairs(paths, texts, notes)):
            sentences, cut = tokenise(lines, langs[index], workers)
            if cut:
                notes.append(f"warning: {cut} sentences of {paths[index].name} cut to {MAX_WORDS} words")
            if name == "train":
                vocabs.append(Vocabulary.build(sentences, min_freq))
            else:
                words.append(sentences if index == 0 else [_drop_spaces(tokens) for tokens in sentences])
            # White-space tokens stay among the ids, as in the original: they have their places in the vocabulary.
            sides.append(Side.encode(sentences, vocabs[index]))
        splits.append(Split(*sides, *words))
    return Corpus(*vocabs, *splits, *langs, fingerprint, notes)


def _drop_spaces(tokens: list[str]) -> list[str]:
    return [token for token in tokens if not token.isspace()]


# ---------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Some pairs, time first and padded.

    Args:
        src: [src_len, batch] int64. trg: [trg_len, batch] int64.
        src_len: [batch] int64, the source sentences' own lengths; None where the encoder shall read the padding.
        positions: [n] int64, increasing: where `trg[1:].reshape(-1)` is not padding.
    """

    src: torch.Tensor
    trg: torch.Tensor
    src_len: torch.Tensor | None
    positions: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(field.to(device) if isinstance(field, torch.Tensor) else field for field in self))


def epoch_batches(
    lengths_src: torch.Tensor,
    lengths_trg: torch.Tensor,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    like_length: bool = True,
    drop_last: bool = False,
) -> list[torch.Tensor]:
    """One epoch's batches over all ranks, in training order, drawn from (seed, epoch) alone.

    Args:
        lengths_src, lengths_trg: [pairs] the sentences' lengths.
        batch_size: pairs in a batch, over all ranks.
        like_length: batches of pairs of about one length, which need little padding: the shuffled pairs are sorted
            within pools of `POOL` batches, and the batches are shuffled.
        drop_last: leave the incomplete batch out, unless it is the only one.

    Returns:
        [batch] int64 indices of pairs for each batch; each pair in one batch, one batch at most incomplete.

    >>> lengths = torch.tensor([9, 4, 8, 5, 9])
    >>> batches = epoch_batches(lengths, lengths, 2, seed=1, epoch=0)
    >>> sorted(lengths[batch].tolist() for batch in batches)
    [[4, 5], [8, 9], [9]]
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths_src))
    if like_length:
        pool = np.arange(len(order)) // (POOL * batch_size)
        order = order[np.lexsort((lengths_src.numpy()[order], lengths_trg.numpy()[order], pool))]
    batches = list(torch.from_numpy(order).split(batch_size))
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return [batches[index] for index in generator.permutation(len(batches))] if like_length else batches


def rank_share(indices: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """One rank's pairs of a batch: the ranks' shares are disjoint and together the batch; a share may be empty.

    >>> [rank_share(torch.tensor([5, 6, 7]), rank, 2).tolist() for rank in range(2)]
    [[5, 7], [6]]
    """
    return indices[rank::world_size]


def make_batch(split: Split, indices: torch.Tensor, *, fixed_length: int = 0) -> Batch:
    """The pairs `indices` of `split`, padded to the longest, or to `fixed_length`.

    Args:
        indices: [batch] int64. Empty (a rank's share of an incomplete batch): the split's first pair stands in, with
            no `positions`, so that the rank takes part in the step with weight 0.
        fixed_length: if not 0, every sentence has this many tokens, `<sos>` and `<eos>` counted: a longer one keeps
            its first `fixed_length - 2` words and `<eos>`.

    >>> vocab = Vocabulary(SPECIALS + ["ein", "hund"])
    >>> side = Side.encode([["ein", "hund"], ["hund"]], vocab)
    >>> batch = make_batch(Split(side, side), torch.tensor([0, 1]))
    >>> batch.trg.tolist()
    [[2, 2], [4, 5], [5, 3], [3, 1]]
    >>> batch.positions.tolist()
    [0, 1, 2, 3, 4]
    """
    stands_in = not len(indices)
    if stands_in:
        indices = torch.zeros(1, dtype=torch.int64)
    src, src_len = pad(split.src, indices, fixed_length)
    trg, _ = pad(split.trg, indices, fixed_length)
    positions = (trg[1:].reshape(-1) != PAD).nonzero().squeeze(1)  # [(trg_len - 1) * batch] -> [n]
    return Batch(src, trg, None if fixed_length else src_len, positions[:0] if stands_in else positions)


def pad(side: Side, indices: torch.Tensor, fixed_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as columns, [length, batch] int64, and their own lengths, [batch] int64; see `make_batch`."""
    starts = side.offsets[indices]  # [batch]
    lengths = side.offsets[indices + 1] - starts  # [batch]
    steps = torch.arange(fixed_length or int(lengths.max())).unsqueeze(1)  # [length, 1]
    real = steps < lengths  # [length, batch]
    columns = side.ids[torch.where(real, starts + steps, 0)].long()  # [length, batch]
    columns = torch.where(real, columns, PAD)
    if fixed_length:
        columns[-1, lengths > fixed_length] = EOS
    return columns, lengths


# ---------------------------------------------------------------- text files


def find_files(data_dir: Path, langs: tuple[str, str], names: tuple[str, str, str]) -> list[tuple[Path, Path]]:
    """The source and target file of train, val and test, all of one folder.

    Args:
        data_dir: the folder, or the one above `multi30k`.
        langs: the files' suffixes, source and target.
        names: the files' stems for train, val and test.

    Raises:
        UserError: data, with the paths that were tried, if no folder has them all.
    """
    tried: list[Path] = []
    for folder in _folders(data_dir):
        missing: list[Path] = []
        pairs = [_find_pair(folder, name, langs, missing) for name in names]
        if all(pairs):
            return pairs
        if folder.is_dir():
            tried += missing
    absent = tried or [data_dir]
    todo = "put it there, or name other files (--src-lang, --trg-lang, --train-name, ...) or another --data-dir"
    raise UserError("data", f"missing; tried {', '.join(map(str, absent))}", str(data_dir), todo)


def any_corpus(data_dir: Path, langs: tuple[str, str]) -> bool:
    """Whether a folder of `data_dir` has a file of one of the languages, whatever its stem."""
    suffixes = tuple(f".{lang}{packed}" for lang in langs for packed in ("", ".gz"))
    folders = (folder for folder in _folders(data_dir) if folder.is_dir())
    return any(path.name.endswith(suffixes) for folder in folders for path in folder.iterdir())


def _folders(data_dir: Path) -> list[Path]:
    return [data_dir / "multi30k", data_dir]


def _find_pair(folder: Path, name: str, langs: tuple[str, str], missing: list[Path]) -> tuple[Path, ...]:
    """A split's two files, under one stem, or (); the paths of a side that is not there are added to `missing`."""
    for stem in ["test", "test2016", "test_2016_flickr"] if name == "test" else [name]:
        sides = [[folder / f"{stem}.{lang}{packed}" for packed in ("", ".gz")] for lang in langs]
        present = [[path for path in paths if os.path.isfile(path)] for paths in sides]
        if all(present):
            return tuple(paths[0] for paths in present)
        missing += [path for paths, found in zip(sides, present, strict=True) if not found for path in paths]
    return ()


def read_file(path: Path) -> bytes:
    """The file's contents, decompressed if its name ends in `.gz`.

    Raises:
        UserError: io (it cannot be read) or data (it is no whole gzip file).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError("io", f"cannot read: {error.strerror}", str(path), "check its permissions") from error
    if path.suffix != ".gz":
        return content
    try:
        if not content:
            raise EOFError("the file is empty")
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("data", f"not a whole gzip file: {error}", str(path), "fetch the file again") from error


def split_lines(content: bytes, name: str | Path) -> list[str]:
    r"""The stripped lines of a text, which end at `\n` alone; a byte order mark is left out.

    Raises:
        UserError: data, with the line and the byte, if the text is not UTF-8 or has a NUL.

    >>> split_lines("\ufeffEin Hund\u2028bellt. \r\n\nJa!".encode(), "train.de")
    ['Ein Hund\u2028bellt.', '', 'Ja!']
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _bad_byte(content, error.start, name, "is not UTF-8", "convert the file to UTF-8") from error
    if "\0" in text:
        raise _bad_byte(content, content.index(b"\0"), name, "is a NUL", "remove it, or convert the file to UTF-8")
    lines = text.removeprefix("\ufeff").split("\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line begins no other
    return [line.strip() for line in lines]


def _bad_byte(content: bytes, offset: int, name: str | Path, fault: str, todo: str) -> UserError:
    line = content.count(b"\n", 0, offset) + 1
    byte = offset - content.rfind(b"\n", 0, offset)
    return UserError("data", f"byte {byte} of line {line}, {content[offset]:#04x}, {fault}", f"{name}:{line}", todo)


def _read_pairs(paths: tuple[Path, Path], texts: tuple[bytes, bytes], notes: list[str]) -> tuple[list[str], list[str]]:
    """The lines of both files, without the pairs of which one is empty."""
    src, trg = (split_lines(text, path) for text, path in zip(texts, paths, strict=True))
    where = " and ".join(map(str, paths))
    if len(src) != len(trg):
        todo = "line n of one must be the translation of line n of the other"
        raise UserError("data", f"{len(src)} lines and {len(trg)} lines", where, todo)
    kept = [pair for pair in zip(src, trg, strict=True) if all(pair)]
    if not kept:
        raise UserError("data", "0 usable pairs", where, "both files need text on the same lines")
    if len(kept) < len(src):
        notes.append(f"{len(src) - len(kept)} pairs dropped: empty in {paths[0].name} or {paths[1].name}")
    return [line for line, _ in kept], [line for _, line in kept]


# ---------------------------------------------------------------- tokenising

# A process takes about 3 s to import spaCy and tokenises some 30,000 lines a second: fewer lines are done sooner here.
LINES_PER_PROCESS = 100_000


def tokenise(lines: list[str], lang: str, workers: int = 1) -> tuple[list[list[str]], int]:
    """Lower-cased tokens of each line, by the rules of spaCy's blank pipeline, cut to `MAX_WORDS`.

    Args:
        lines: stripped; of each, the first `MAX_CHARACTERS` are read.
        lang: spaCy's code of the language.
        workers: processes at most; the result does not depend on it.

    Returns:
        The tokens of each line, white-space tokens among them, and how many lines were cut.

    Raises:
        UserError: usage, if spaCy has no tokenizer for the language, or not without a package that is missing.

    >>> tokenise(["Ein Hund bellt.", "Geht's?"], "de")
    ([['ein', 'hund', 'bellt', '.'], ["geht's", '?']], 0)
    """
    processes = min(workers, cores(), len(lines) // LINES_PER_PROCESS)
    if processes < 2:
        return _tokenise_here(lines, lang)
    size = -(-len(lines) // processes)
    shares = [lines[start : start + size] for start in range(0, len(lines), size)]
    results = _tokenise_in_processes(shares, lang)
    return list(itertools.chain.from_iterable(sentences for sentences, _ in results)), sum(cut for _, cut in results)


def _tokenise_here(lines: list[str], lang: str) -> tuple[list[list[str]], int]:
    tokenizer = _tokenizer(lang)
    sentences, cut = [], 0
    for line in lines:
        # Interned, because a corpus has a hundred times as many tokens as different words.
        words = [sys.intern(token.lower_) for token in tokenizer(line[:MAX_CHARACTERS])]
        cut += len(line) > MAX_CHARACTERS or len(words) > MAX_WORDS
        sentences.append(words[:MAX_WORDS])
    return sentences, cut


@functools.cache
def _tokenizer(lang: str):
    import spacy  # here, because a start from the cache does not need the seconds that it takes

    try:
        return spacy.blank(lang).tokenizer
    except (ImportError, AttributeError) as error:  # AttributeError: one of spaCy's modules that is no language
        reason = str(error).splitlines()[0]
        todo = "install what it needs, or choose another of spaCy's languages (xx for one that has none)"
        raise UserError("usage", f"no tokenizer for {lang!r}: {reason}", "--src-lang, --trg-lang", todo) from error


def _tokenise_in_processes(shares: list[list[str]], lang: str) -> list[tuple[list[list[str]], int]]:
    """`_tokenise_here` of each share, in order. Spawned, because a fork of a process with threads may hang."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for _ in shares:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve_share, args=(theirs, lang), daemon=True))
            pipes.append(ours)
            processes[-1].start()
            theirs.close()
        for pipe, share in zip(pipes, shares, strict=True):
            pipe.send(share)
        results = [pipe.recv() for pipe in pipes]
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a tokenising process ended early: killed, or out of memory?") from error
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()
            process.terminate()
            process.join()
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results


def _serve_share(pipe, lang: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = _tokenise_here(pipe.recv(), lang)
    except UserError as error:
        result = error
    pipe.send(result)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent cannot end its children


# ---------------------------------------------------------------- cache

CACHE_FORMAT = 1  # raise it with every change of what a cache holds or how lines become tokens


def _from_cache(folder: Path | None, key: str, build: Callable[[], Corpus], log: Log) -> Corpus:
    """The cached corpus, or a new one, cached; of many processes one builds and the others wait."""
    if folder is None:
        return build()
    path = folder / f"{key}.npz"
    with _locked(folder / f"{key}.lock", log):
        corpus = _read_cache(path, log)
        if corpus is None:
            corpus = build()
            try:
                _write_cache(path, corpus)
            except OSError as error:
                log(f"not cached: {error}")
        return corpus


def _cache_folder(cache_dir: str | Path | None, log: Log) -> Path | None:
    """A folder that can be written: `cache_dir` or the user's, else one of our own among the temporary files."""
    wanted = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gru-for-pytorch"
    try:
        return _check_writable(Path(wanted).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        log(f"the cache folder cannot be used: {error}")
    spare = Path(tempfile.gettempdir()) / f"gru-for-pytorch-{os.getuid()}"
    try:
        spare.mkdir(mode=0o700, exist_ok=True)
        status = spare.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:  # a link has all rights, too
            raise PermissionError(f"{spare} is not this user's alone")
        _check_writable(spare)
    except OSError as error:
        log(f"the data is not cached: {error}")
        return None
    log(f"caching in {spare} instead")
    return spare


def _check_writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return folder


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Holds the lock file `path`, which goes with the lock; the system frees it when its holder dies."""
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that prepares the same data ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us removed the file that we waited for: then its lock keeps nobody out.
            if _is_file_at(path, file.fileno()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_synced(path: Path, *parts: bytes) -> None:
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _write_cache(path: Path, corpus: Corpus) -> None:
    """A line with the sha256 of the rest; the rest is an .npz of the ids, and of one JSON text for all words."""
    sides = {
        f"{name}.{language}": getattr(getattr(corpus, name), language) for name in SPLITS for language in ("src", "trg")
    }
    arrays = {f"{name}.ids": side.ids.numpy() for name, side in sides.items()}
    arrays |= {f"{name}.offsets": side.offsets.numpy() for name, side in sides.items()}
    text = {
        "vocabs": [corpus.src_vocab.itos, corpus.trg_vocab.itos],
        "words": {name: [getattr(corpus, name).src_tokens, getattr(corpus, name).trg_tokens] for name in SPLITS},
        "rest": [corpus.src_lang, corpus.trg_lang, corpus.fingerprint, corpus.notes],
    }
    arrays["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    body = io.BytesIO()
    np.savez(body, **arrays)
    temporary = path.with_suffix(".tmp")  # one name is enough, we hold the lock; what a killed run left is overwritten
    try:
        _write_synced(temporary, _sha256(body.getbuffer()).encode(), b"\n", body.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_cache(path: Path, log: Log) -> Corpus | None:
    try:
        header, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if header.decode("latin-1") != _sha256(body):
        log(f"the cache {path} is damaged and is built again")
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        text = json.loads(arrays["text"].tobytes())

        def split(name: str) -> Split:
            sides = [
                Side(*(torch.from_numpy(arrays[f"{name}.{language}.{part}"]) for part in ("ids", "offsets")))
                for language in ("src", "trg")
            ]
            return Split(*sides, *text["words"][name])

        return Corpus(*map(Vocabulary, text["vocabs"]), *map(split, SPLITS), *text["rest"])


# ---------------------------------------------------------------- download

BASE_URL = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
MULTI30K = {  # name here: name there, bytes and sha256 of the .gz
    "train.de": ("train.de", 637044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "train.en": ("train.en", 568929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "val.de": ("val.de", 24681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    "val.en": ("val.en", 21650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "test.de": ("test_2016_flickr.de", 22890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    "test.en": ("test_2016_flickr.en", 21077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
}
SOCKET_TIMEOUT = 10.0  # seconds of silence


def download_multi30k(
    directory: Path, *, mirror: str | None = None, base_url: str | None = None, timeout: float = 300.0, log: Log = print
) -> None:
    """Multi30k into `directory`/multi30k: the six files, whole and checked, or none.

    Args:
        mirror: the address to try second; both have `train.de.gz` and so on right below them.
        base_url: the address to try first, by default `BASE_URL`.
        timeout: seconds for everything; of what is left, each address gets an equal share.

    Raises:
        UserError: io, with the failure of each address.
    """
    directory = Path(directory)
    target, temporary = directory / "multi30k", directory / ".multi30k.part"
    sources = [url.rstrip("/") for url in (base_url or BASE_URL, mirror) if url]
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".multi30k.lock", log):
            shutil.rmtree(temporary, ignore_errors=True)  # of a download that was killed: we hold the lock
            if not (target / "train.de").exists():  # else another process has been quicker
                _place(_download(sources, timeout, target, log), temporary, target)
    except OSError as error:
        todo = "name a folder with --data-dir that can be written and has no multi30k/ of its own"
        raise UserError("io", f"Multi30k cannot be stored: {error}", str(directory), todo) from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the download is in it
                directory.rmdir()


def _place(bodies: dict[str, bytes], temporary: Path, target: Path) -> None:
    try:
        temporary.mkdir()
        for name, body in bodies.items():
            _write_synced(temporary / name, gzip.decompress(body))
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(sources: list[str], timeout: float, target: Path, log: Log) -> dict[str, bytes]:
    """The files' names and compressed contents, from the first source that has them all."""
    deadline = time.monotonic() + timeout
    failures = []
    for left, source in zip(range(len(sources), 0, -1), sources, strict=True):
        log(f"downloading Multi30k (1.3 MB) from {source}")
        share = time.monotonic() + (deadline - time.monotonic()) / left
        try:
            return _before(share, _fetch_all, source, share)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(printable(f"{source}: {error}"))  # a server's own words
            log(f"download failed: {failures[-1]}")
    raise UserError(
        "io",
        f"Multi30k cannot be downloaded: {', '.join(failures)}",
        str(target),
        f"fetch {', '.join(f'{there}.gz' for there, _, _ in MULTI30K.values())} from {BASE_URL} by hand and put them "
        "there as they are, or name another address with --mirror, or train with --data-dir sample, which needs none",
    )


def _before(deadline: float, function: Callable, *args):
    """`function(*args)`, or TimeoutError at the deadline, whatever it waits for: a socket's timeout bounds neither the
    look-up of a name nor headers that drip."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    seconds = max(0.0, deadline - time.monotonic())
    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(str(error) or f"not done within {seconds:.1f} s") from error


def _fetch_all(source: str, deadline: float) -> dict[str, bytes]:
    bodies = {}
    for name, (there, size, sha256) in MULTI30K.items():
        body = _fetch(f"{source}/{there}.gz", size + 1, deadline)
        if len(body) != size:
            more = "more than " if len(body) > size else ""
            raise ValueError(f"{there}.gz has {more}{min(len(body), size)} bytes, expected {size}")
        if _sha256(body) != sha256:
            raise ValueError(f"{there}.gz has sha256 {_sha256(body)}, expected {sha256}")
        bodies[name] = body
    return bodies


def _fetch(url: str, limit: int, deadline: float) -> bytes:
    """The first `limit` bytes at `url`; proxies are the environment's."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("not an http or https address")
    opener = urllib.request.build_opener(_NoDowngrade)
    body = bytearray()
    with opener.open(url, timeout=max(0.1, min(SOCKET_TIMEOUT, deadline - time.monotonic()))) as response:
        while chunk := response.read1(min(65536, limit - len(body))):
            body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(body)} bytes of {url} by the deadline")
    return bytes(body)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = [urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl)]
        if schemes[1] != "https" and schemes != ["http", "http"]:
            raise urllib.error.HTTPError(req.full_url, code, f"redirect to {newurl} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
