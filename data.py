"""The data: parallel text files in, batches of token ids out.

    corpus = data.load("sample")                                    # finds or downloads, tokenises, caches
    loader = data.Loader(corpus.train, device)
    for indices in data.epoch_batches(corpus.train, 128, seed=1234, epoch=0):
        batch = loader(data.rank_share(indices, rank, world_size))

From top to bottom: the corpus as tensors, loading it, the batches of an epoch, a batch. `nmt/text/` does what `load`
needs: `files` reads and checks the text, `tokens` splits it, `vocabulary` numbers the words, `build` puts these
together, `cache` keeps the result on disk, and `download` fetches Multi30k. A corpus may be larger than memory: its ids
stay in mapped files. Nothing is pickled.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nmt.errors import UserError
from nmt.storage import Log
from nmt.text import build, cache, download, files, missing, subwords
from nmt.text.files import SPLITS
from nmt.text.tokens import tokenise
from nmt.text.vocabulary import EOS, PAD, SOS, SPECIALS, UNK, Vocabulary, add_ends

import numpy as np
import torch

__all__ = [
    "Batch",
    "Corpus",
    "EOS",
    "EpochBatches",
    "Loader",
    "PAD",
    "SOS",
    "SPECIALS",
    "SPLITS",
    "Side",
    "Split",
    "UNK",
    "Vocabulary",
    "Words",
    "check_cache_dir",
    "epoch_batches",
    "load",
    "load_test",
    "make_batch",
    "pad",
    "rank_share",
    "spaceless",
    "tokenise",
    "write_split",
]


# ---------------------------------------------------------------- the corpus as tensors


@dataclass(frozen=True)
class Side:
    """One language of a split: all sentences in one flat tensor, which may be a mapped file.

    Args:
        ids: [tokens] int32, every sentence with its `<sos>` and `<eos>`.
        offsets: [sentences + 1] int64. Sentence i is `ids[offsets[i]:offsets[i + 1]]`.

    >>> vocab = Vocabulary(SPECIALS + ["ein", "hund"])
    >>> side = Side.encode([["ein", "hund"], ["hund"]], vocab)
    >>> side.ids.tolist(), side.offsets.tolist(), side.lengths.tolist()
    ([2, 4, 5, 3, 2, 5, 3], [0, 4, 7], [4, 3])
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def encode(cls, sentences: list[list[str]], vocab: Vocabulary) -> "Side":
        """The ids of tokenised sentences."""
        ids, offsets = add_ends(*vocab.encode_all(sentences))
        return cls(torch.from_numpy(ids), torch.from_numpy(offsets))

    @property
    def lengths(self) -> torch.Tensor:
        """[sentences] int64, in tokens, with `<sos>` and `<eos>`."""
        return self.offsets.diff()

    @property
    def unknown(self) -> float:
        """The share of the words that are `<unk>`, `<sos>` and `<eos>` not counted."""
        words = len(self.ids) - 2 * (len(self.offsets) - 1)
        return int((self.ids == UNK).sum()) / max(1, words)

    def lengths_of(self, indices: torch.Tensor) -> torch.Tensor:
        """[indices] int64: the lengths of some sentences. The cost does not depend on how many others there are."""
        return self.offsets[indices + 1] - self.offsets[indices]


def spaceless(tokens: list[str]) -> list[str]:
    """The tokens without those of white space, which no score counts.

    >>> spaceless(["ein", " ", "hund"])
    ['ein', 'hund']
    """
    return [token for token in tokens if not token.isspace()]


@dataclass(frozen=True)
class Split:
    """The pairs of one split.

    Args:
        src, trg: the ids of both languages, pair by pair.
        src_tokens, trg_tokens: the same as words, with those outside the vocabulary. A model with its own vocabularies
            needs them. None for train.
    """

    src: Side
    trg: Side
    src_tokens: list[list[str]] | None = None
    trg_tokens: list[list[str]] | None = None

    @classmethod
    def encode(
        cls,
        src_tokens: list[list[str]],
        trg_tokens: list[list[str]],
        src_vocab: Vocabulary,
        trg_vocab: Vocabulary,
    ) -> "Split":
        """The pairs with their ids in these vocabularies."""
        return cls(Side.encode(src_tokens, src_vocab), Side.encode(trg_tokens, trg_vocab), src_tokens, trg_tokens)

    @property
    def references(self) -> list[list[str]]:
        """`trg_tokens` as they are scored, `spaceless`."""
        assert self.trg_tokens is not None
        return [spaceless(tokens) for tokens in self.trg_tokens]

    def __len__(self) -> int:
        return len(self.src.offsets) - 1


def kind_of_types(vocab: Vocabulary) -> str:
    """What a vocabulary has, for the log."""
    return "types" if vocab.model is None else "pieces"


@dataclass(frozen=True)
class Words:
    """The pairs of a split as words. A model numbers them by its own vocabularies.

    Attributes:
        src_tokens, trg_tokens: the words of each sentence, pair by pair.
        src_lang, trg_lang: spaCy's codes of the languages.
        notes: lines for the log about pairs that were dropped and sentences that were cut.
        folder: where the files are.
        fingerprint: that of the `Corpus` whose test pairs these are, if they were taken out of train.
    """

    src_tokens: list[list[str]]
    trg_tokens: list[list[str]]
    src_lang: str
    trg_lang: str
    notes: Sequence[str] = ()
    folder: str = ""
    fingerprint: str = ""

    def encoded(self, src_vocab: Vocabulary, trg_vocab: Vocabulary) -> Split:
        """The pairs with their ids in these vocabularies."""
        return Split.encode(self.src_tokens, self.trg_tokens, src_vocab, trg_vocab)

    def lines(self, split: Split, src_vocab: Vocabulary, trg_vocab: Vocabulary) -> Iterator[str]:
        """What a log says about the test pairs.

        Args:
            split: from `encoded`.
            src_vocab, trg_vocab: the model's.
        """
        sides = ((self.src_lang, split.src, src_vocab), (self.trg_lang, split.trg, trg_vocab))
        types = " and ".join(f"{len(vocab)} {lang}" for lang, _, vocab in sides)
        kind = kind_of_types(src_vocab)
        yield f"data: {len(split)} test pairs; {types} {kind}; in {self.folder}"
        yield "unknown words: " + "; ".join(f"{lang} test {side.unknown:.1%}" for lang, side, _ in sides)
        yield from self.notes


@dataclass(frozen=True)
class Corpus:
    """What `load` returns.

    Attributes:
        src_vocab, trg_vocab: the words of both languages.
        train, val, test: the pairs.
        src_lang, trg_lang: spaCy's codes of the languages.
        fingerprint: the sha256 of the six files' contents. Where some are taken out of train, it knows how many.
        notes: lines for the log about pairs that were dropped and sentences that were cut.
        unknown: lines for the log about the words of each split that are not in the vocabularies.
        folder: where the files are.
    """

    src_vocab: Vocabulary
    trg_vocab: Vocabulary
    train: Split
    val: Split
    test: Split
    src_lang: str
    trg_lang: str
    fingerprint: str
    notes: list[str]
    unknown: Sequence[str] = ()
    folder: str = ""

    def lines(self) -> Iterator[str]:
        """What a log says about the corpus. Names of files are as they are: see `errors.printable`."""
        types = (
            f"{len(vocab)} {lang}" for vocab, lang in ((self.src_vocab, self.src_lang), (self.trg_vocab, self.trg_lang))
        )
        yield (
            f"data: {len(self.train)} training, {len(self.val)} validation, {len(self.test)} test pairs; "
            f"{' and '.join(types)} {kind_of_types(self.src_vocab)}; in {self.folder}"
        )
        yield from self.unknown
        yield from self.notes

    def check_ids(self) -> None:
        """Reads all ids and refuses a wrong one. Call it before a device gets the ids.

        A device may not notice a wrong id: an NPU reads somewhere else in its memory. A CPU raises IndexError.

        Raises:
            UserError: data.
        """
        for name, split in zip(SPLITS, (self.train, self.val, self.test), strict=True):
            for side, vocab in ((split.src, self.src_vocab), (split.trg, self.trg_vocab)):
                lowest, highest = map(int, side.ids.aminmax())
                if lowest < 0 or highest >= len(vocab):
                    wrong = lowest if lowest < 0 else highest
                    what = f"token id {wrong}, but the vocabulary has {len(vocab)} words"
                    raise UserError("data", what, f"the cached ids of {name}", "empty the cache folder and start again")


def spelled_anew(
    split: Split, src_vocab: Vocabulary, trg_vocab: Vocabulary, *, dropout: float, seed: int, epoch: int
) -> Split:
    """The pairs in other spellings, by BPE dropout. They depend on (seed, epoch) alone.

    Args:
        split: the pairs, in pieces of these vocabularies.
        src_vocab, trg_vocab: of pieces.
        dropout: the probability that a join of two pieces is left out. With 0 the split itself is the result.
    """
    if not dropout:
        return split

    def anew(side: Side, vocab: Vocabulary, name: str) -> Side:
        assert isinstance(vocab, subwords.Pieces)
        writer, size = cache.Writer(None), 0
        writer.append("offsets", np.zeros(1, np.int64))
        for found in vocab.spell_anew(side.ids.numpy(), side.offsets.numpy(), dropout, f"{seed} {epoch} {name}"):
            ids, offsets = add_ends(*found)
            writer.append("ids", ids)
            writer.append("offsets", size + offsets[1:])
            size += len(ids)
        arrays = writer.in_memory()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
            return Side(torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["offsets"]))

    return Split(anew(split.src, src_vocab, "src"), anew(split.trg, trg_vocab, "trg"))


# ---------------------------------------------------------------- loading

DOWNLOADS = "data"  # a folder of this name is made for a download, one of another name is not


def load(
    data_dir: str | Path,
    *,
    src_lang: str = "de",
    trg_lang: str = "en",
    train_name: str = "train",
    val_name: str = "val",
    test_name: str = "test",
    min_freq: int = 2,
    case: str = "lower",
    tokenizer: str = "spacy",
    max_vocab: int = 0,
    subword: int = 0,
    workers: int = 10,
    cache_dir: str | Path | None = None,
    mirror: str | None = None,
    download_timeout: float = 300.0,
    verify: bool = True,
    log: Log = print,
    val_split: int = 0,
) -> Corpus:
    """Loads the corpus in `data_dir`, from the cache if it is there. If no corpus is there, downloads Multi30k.

    What killed runs left in the cache folder and in `data_dir` is cleared.

    Args:
        data_dir: holds the six files, or `multi30k/` with the six files, each plain or as `.gz`.
        src_lang, trg_lang: spaCy's codes of the languages, which are also the files' suffixes. With the tokenizer
            "space" they are suffixes alone.
        train_name, val_name, test_name: the files' stems. "test" also finds `test2016` and `test_2016_flickr`.
        min_freq: how often a word must stand in train to be in the vocabulary.
        case: "lower" lower-cases the text, "keep" leaves it as it is.
        tokenizer: "spacy", or "space" for text that is tokenised already.
        max_vocab: how many words of a language its vocabulary has at most, beside the special ones. 0: all.
        subword: how many pieces spell the words of a language, see `nmt/text/subwords.py`. 0: words are whole.
        workers: processes that tokenise, at most.
        cache_dir: where tokenised corpora are kept, by default `${XDG_CACHE_HOME:-~/.cache}/gru-for-pytorch`.
        mirror: a second address to download from.
        download_timeout: seconds, for the whole download.
        verify: whether a cached corpus is read and checked. Another process may just have done that.
        log: takes lines that say what is going on.
        val_split: how many pairs are taken out of train for validation, and as many for test, where these have no
            files. Then nothing is downloaded. 0: the files must be there.

    Raises:
        UserError: data (a file is missing or unusable, there are two corpora, or train has fewer pieces), usage (no
            tokenizer for a language, or a missing package), io (no download, or a file that cannot be read).
    """
    data_dir = Path(data_dir)
    langs, names = (src_lang, trg_lang), (train_name, val_name, test_name)
    _check_languages(langs)
    _fetch_if_absent(data_dir, langs, names, mirror, download_timeout, log, val_split)
    download.clear_strays(data_dir)
    pairs = _find_files(data_dir, langs, names, SPLITS, val_split)
    paths = [path for pair in pairs if pair for path in pair]
    split = build.split_off(pairs, val_split)
    folder = _cache_folder(cache_dir, log)

    wanted = build.Words(min_freq, case, tokenizer, max_vocab, subword)

    def key(digests: list[str]) -> str:
        return build.cache_key(digests, langs, wanted, split)

    def write(writer: cache.Writer, digests: list[str]) -> dict:
        return build.build_corpus(writer, pairs, digests, langs, wanted, workers, val_split)

    entry, digests = _read_or_build(folder, paths, key, write, verify, log)
    models = map(subwords.as_model, entry.about.get("subwords", (None, None)))  # earlier versions had none
    src_vocab, trg_vocab = map(subwords.of, entry.about["vocabs"], models)
    return Corpus(
        src_vocab=src_vocab,
        trg_vocab=trg_vocab,
        train=_split(entry, "train"),
        val=_split(entry, "val"),
        test=_split(entry, "test"),
        src_lang=src_lang,
        trg_lang=trg_lang,
        fingerprint=build.fingerprint(digests, split),
        notes=entry.about["notes"] + _not_split(pairs, val_split),
        unknown=entry.about["unknown"],
        folder=str(paths[0].parent),
    )


def load_test(
    data_dir: str | Path,
    *,
    src_lang: str = "de",
    trg_lang: str = "en",
    train_name: str = "train",
    val_name: str = "val",
    test_name: str = "test",
    case: str = "lower",
    tokenizer: str = "spacy",
    workers: int = 10,
    cache_dir: str | Path | None = None,
    mirror: str | None = None,
    download_timeout: float = 300.0,
    log: Log = print,
    val_split: int = 0,
) -> Words:
    """Loads the test pairs in `data_dir` alone. The other four files may be missing. A model has its vocabularies.

    Args: as in `load`, which finds the same pairs. Without test files, `val_split` takes them out of train.

    Raises:
        UserError: as from `load`.
    """
    data_dir = Path(data_dir)
    langs, names = (src_lang, trg_lang), (train_name, val_name, test_name)
    _check_languages(langs)
    _check_folder(data_dir)
    wanted: Sequence[str] = ["test"]
    if not files.any_pair(data_dir, test_name, langs):
        wanted = SPLITS if val_split and files.any_pair(data_dir, train_name, langs) else wanted
        _fetch_if_absent(data_dir, langs, names, mirror, download_timeout, log, val_split)
    download.clear_strays(data_dir)
    pairs = _find_files(data_dir, langs, names, wanted, val_split)
    paths = [path for pair in pairs if pair for path in pair]
    split = build.split_off(pairs, val_split)

    def key(digests: list[str]) -> str:
        return build.key_of_test(digests, langs, case, tokenizer, split)

    def write(writer: cache.Writer, digests: list[str]) -> dict:
        return build.build_test(pairs, digests, langs, workers, case, tokenizer, val_split)

    entry, digests = _read_or_build(_cache_folder(cache_dir, log), paths, key, write, True, log)
    src_tokens, trg_tokens = entry.about["words"]
    about = {"notes": entry.about["notes"], "folder": str(paths[0].parent)}
    return Words(
        src_tokens,
        trg_tokens,
        src_lang,
        trg_lang,
        **about,
        fingerprint=build.fingerprint(digests, split) if split else "",
    )


def write_split(
    folder: str | Path,
    data_dir: str | Path,
    *,
    src_lang: str = "de",
    trg_lang: str = "en",
    train_name: str = "train",
    val_name: str = "val",
    test_name: str = "test",
    val_split: int = 0,
    log: Log = print,
) -> None:
    """Writes the text of train, val and test into a new folder, to be translated and compared.

    Args:
        folder: is made. One that has just these files stays as it is.
        data_dir and the rest: as in `load`.

    Raises:
        UserError: io, the folder cannot be written. Or as from `load`.
    """
    langs, names = (src_lang, trg_lang), (train_name, val_name, test_name)
    pairs = _find_files(Path(data_dir), langs, names, SPLITS, val_split)
    digests = [files.content_sha256(path) for pair in pairs if pair for path in pair]
    written = build.write_texts(Path(folder), pairs, digests, langs, val_split)
    log(f"the text of train, val and test {'was written to' if written else 'is in'} {folder}")


def _find_files(
    data_dir: Path, langs: tuple[str, str], names: tuple[str, str, str], wanted: Sequence[str], val_split: int
) -> list[tuple[Path, Path] | None]:
    """As `files.find_files`. Raises a data UserError, with a guess, if files are missing."""
    with _telling_folder(data_dir):
        pairs = files.find_files(data_dir, langs, names, wanted, val_split)
        if pairs is None:
            raise missing.error(data_dir, missing.Wish(langs, names, wanted, val_split > 0))
        return pairs


def _not_split(pairs: Sequence[tuple[Path, Path] | None], val_split: int) -> list[str]:
    """Lines that say which files are used as they are, in spite of --val-split."""
    there = [pair for pair in pairs[1:] if pair]
    names = " and ".join(path.name for pair in there for path in pair)
    return [f"--val-split does not concern {names}: these files are used as they are"] if val_split and there else []


def check_cache_dir(cache_dir: str | Path) -> None:
    """Raises an io UserError if nothing can be cached in this folder, which the user has named."""
    cache.check_usable(cache_dir)


def _check_languages(langs: tuple[str, str]) -> None:
    if langs[0] == langs[1]:
        raise UserError("usage", f"both languages are {langs[0]}", "--src-lang, --trg-lang", "give the other one too")


def _fetch_if_absent(
    data_dir: Path,
    langs: tuple[str, str],
    names: tuple[str, str, str],
    mirror: str | None,
    timeout: float,
    log: Log,
    val_split: int,
) -> None:
    """Downloads Multi30k if its languages and names are wanted, and the folder has no corpus of any kind."""
    has_corpus = _has_corpus(data_dir, langs)
    if (langs, names, val_split) == (("de", "en"), SPLITS, 0) and not has_corpus:
        download.download_multi30k(data_dir, mirror=mirror, timeout=timeout, log=log)


def _cache_folder(cache_dir: str | Path | None, log: Log) -> Path | None:
    folder = cache.find_folder(cache_dir, log)
    cache.clear_strays(folder)
    return folder


def _read_or_build(
    folder: Path | None,
    paths: list[Path],
    key: Callable[[list[str]], str],
    write: Callable[[cache.Writer, list[str]], dict],
    verify: bool,
    log: Log,
) -> tuple[cache.Entry, list[str]]:
    """What is cached of some text files, or is built now. And the files' digests.

    Args:
        folder: of the cache.
        paths: of the files.
        key: the entry's name for the digests.
        write: builds it.
        verify, log: as in `load`.
    """
    digests = cache.known_digests(folder, paths)
    entry = None if digests is None else cache.read(folder, key(digests), verify=verify)
    if digests is None or entry is None:
        digests = found = cache.read_digests(folder, paths, log)

        def build_now(writer: cache.Writer) -> dict:
            log(f"tokenising {paths[0].parent}, these contents for the first time; the result is cached in {folder}")
            return write(writer, found)

        entry = cache.read_or_build(folder, key(digests), build_now, log)
    return entry, digests


def _has_corpus(data_dir: Path, langs: tuple[str, str]) -> bool:
    """Whether something like a corpus is there. Raises as `_telling_folder`, and as `_check_folder`."""
    with _telling_folder(data_dir):
        _check_folder(data_dir)
        wish = missing.Wish(langs, SPLITS, SPLITS, False)
        return (
            files.any_corpus(data_dir, langs)
            or files.any_training_file(data_dir)
            or missing.can_guess(data_dir, wish, below=data_dir.name != DOWNLOADS)
        )


def _check_folder(data_dir: Path) -> None:
    """Raises a data UserError unless `data_dir` is a folder, or may become one by a download."""
    with _telling_folder(data_dir):
        if data_dir.is_file():
            raise UserError("data", "is a file, not a folder", str(data_dir), "name a folder with --data-dir")
        if not data_dir.absolute().parent.is_dir():
            what = "there is no such folder, nor the one above it"
            raise UserError("data", what, str(data_dir), "name a folder with --data-dir")
        if not data_dir.is_dir() and data_dir.name != DOWNLOADS:  # most often a slip of the pen
            todo = f"name the folder of your data with --data-dir; for Multi30k's download, name {DOWNLOADS} or make it"
            raise UserError("data", "there is no such folder", str(data_dir), todo)


@contextlib.contextmanager
def _telling_folder(data_dir: Path) -> Iterator[None]:
    """Turns the body's OSError into an io UserError: no permission, or a name that is too long."""
    try:
        yield
    except OSError as error:
        what, todo = f"cannot read: {error.strerror}", "name a folder that you may read with --data-dir"
        raise UserError("io", what, str(error.filename or data_dir), todo) from error


def _split(entry: cache.Entry, name: str) -> Split:
    def side(language: str) -> Side:
        ids, offsets = entry.arrays[f"{name}.{language}.ids"], entry.arrays[f"{name}.{language}.offsets"]
        return Side(torch.from_numpy(ids), torch.from_numpy(offsets))

    src_tokens, trg_tokens = entry.about["words"][name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        return Split(side("src"), side("trg"), src_tokens, trg_tokens)


# ---------------------------------------------------------------- the batches of an epoch

POOL = 100  # batches whose pairs are grouped by length together


class EpochBatches:
    """One epoch's batches over all ranks, in training order. See `epoch_batches`.

    It holds one permutation of the pairs and one pool of batches. Nothing is drawn before the first batch is wanted.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, epoch: int, like_length: bool, drop_last: bool):
        full, rest = divmod(len(split), batch_size)
        self._steps = full + bool(rest and not (drop_last and full))
        self._pools = max(1, round(self._steps / POOL))
        self._split, self._batch_size, self._like_length = split, batch_size, like_length
        self._seeds = [seed, epoch]
        self._pool = -1  # the number of the pool at hand
        self._batches: Sequence[torch.Tensor] = ()  # its batches

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.__getitem__, range(self._steps))

    def __getitem__(self, step: int) -> torch.Tensor:
        """[batch] int64: the indices of the pairs of a step."""
        if not 0 <= step < self._steps:
            raise IndexError(step)
        # Pool p has the steps from steps * p / pools to steps * (p + 1) / pools, rounded down.
        pool = ((step + 1) * self._pools - 1) // self._steps
        first, end = (self._steps * edge // self._pools for edge in (pool, pool + 1))
        if pool != self._pool:
            indices = self._order[first * self._batch_size : end * self._batch_size].astype(np.int64)
            if self._like_length:
                indices = self._group(indices)
            self._batches = torch.from_numpy(indices).split(self._batch_size)
            if self._like_length:
                order = np.random.default_rng([*self._seeds, pool]).permutation(end - first)
                self._batches = [self._batches[place] for place in order]
            self._pool = pool
        return self._batches[step - first]

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """[pairs of all steps]: the pairs in random order."""
        order = np.arange(len(self._split), dtype=np.int32 if len(self._split) < 1 << 31 else np.int64)
        np.random.default_rng(self._seeds).shuffle(order)
        return order[: self._steps * self._batch_size]

    def _group(self, indices: np.ndarray) -> np.ndarray:
        """[pairs of a pool] int64: sorted so that the pairs of each batch have similar lengths in both languages.

        Sorting by one language alone leaves padding in the other, because the lengths of a pair are only roughly
        proportional. So we sort the pool by source length, cut it into stripes of whole batches, and sort each stripe
        by target length. With s stripes of b batches, the sources of a batch spread over 1/s of the pool, and its
        targets over s/b of a stripe. About sqrt(b) stripes make the two spreads equal.
        """
        pairs = torch.from_numpy(indices)
        src_lengths = self._split.src.lengths_of(pairs).numpy()
        trg_lengths = self._split.trg.lengths_of(pairs).numpy()
        batches = math.ceil(len(indices) / self._batch_size)
        stripes = round(math.sqrt(batches))
        by_src = np.lexsort((trg_lengths, src_lengths))
        stripe = np.arange(len(indices)) // self._batch_size * stripes // batches
        return indices[by_src[np.lexsort((src_lengths[by_src], trg_lengths[by_src], stripe))]]


def epoch_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, like_length: bool = True, drop_last: bool = False
) -> EpochBatches:
    """One epoch's batches over all ranks, in training order. They depend on (seed, epoch) alone.

    Args:
        split: the pairs.
        batch_size: pairs in a batch, over all ranks.
        like_length: whether the pairs of a batch have similar lengths in each language, so that little padding is
            needed. The pairs are shuffled, and grouped by length within pools of about `POOL` batches. Then the
            batches of each pool are shuffled.
        drop_last: leave the incomplete batch out, unless it is the only one.

    Returns:
        A sequence of [batch] int64 indices of pairs. Each pair is in one batch, and at most one batch is incomplete.

    >>> vocab = Vocabulary(SPECIALS + ["ein"])
    >>> side = Side.encode([["ein"] * words for words in (7, 2, 6, 3, 7)], vocab)
    >>> batches = epoch_batches(Split(side, side), 2, seed=1, epoch=0)
    >>> len(batches), sorted(side.lengths_of(batch).tolist() for batch in batches)
    (3, [[4, 5], [8, 9], [9]])
    """
    return EpochBatches(split, batch_size, seed, epoch, like_length, drop_last)


def rank_share(indices: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """One rank's pairs of a batch. Each pair goes to one rank. A share may be empty.

    >>> [rank_share(torch.tensor([5, 6, 7]), rank, 2).tolist() for rank in range(2)]
    [[5, 7], [6]]
    """
    return indices[rank::world_size]


# ---------------------------------------------------------------- a batch

LENGTH_STEP = 4  # lengths on an NPU or GPU are rounded up to multiples of this, so that there are few distinct shapes


class Batch(NamedTuple):
    """Sentence pairs as the model reads them: the tokens of step 0, then those of step 1, and so on.

    The pairs are sorted by target length, longest first. The sources are sorted again, by their own length. So the
    sentences with a token at step t are the first `rows_per_step[t]`. Without padding there is a row for each token.
    With padding each step has a row for each sentence.

    Attributes:
        src: [source rows] int64 token ids.
        src_rows_per_step: how many rows of `src` each step has.
        src_last: [batch] int64: the row of each source's last token, in the order of the targets.
        trg: [target rows] int64: the token before each target. It is `SOS` in step 0.
        trg_rows_per_step: how many rows of `trg` and `targets` each step has.
        targets: [target rows] int64: the tokens to predict, and `PAD` where there is none.
        target_tokens: how many targets are no padding.
    """

    src: torch.Tensor
    src_rows_per_step: list[int]
    src_last: torch.Tensor
    trg: torch.Tensor
    trg_rows_per_step: list[int]
    targets: torch.Tensor
    target_tokens: int


class Loader:
    """Makes the batches of a split on a device.

    A CPU gets batches without padding, from `make_batch`. NPUs and GPUs are faster with few distinct shapes, so they
    get padding and rounded lengths. If the ids fit, they stay on the device, and batches are laid out there. If not,
    batches are laid out on the host and copied while the device computes. Nothing waits for the device in either case,
    because the host knows the lengths.

    Args:
        split: the pairs.
        device: where the batches are wanted.
        fixed_length: as in `make_batch`.
        resident_bytes: how much of the device's memory the split's ids may take.
        padded: whether batches are padded. None: on all devices except the CPU.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device | str,
        *,
        fixed_length: int = 0,
        resident_bytes: int = 1 << 30,
        padded: bool | None = None,
    ):
        self.split, self._device, self._fixed_length = split, torch.device(device), fixed_length
        self._padded = self._device.type != "cpu" if padded is None else padded
        ids = split.src.ids, split.trg.ids
        self._is_resident = sum(each.nbytes for each in ids) <= resident_bytes
        self._ids = tuple(each.to(self._device) for each in ids) if self._is_resident else ids

    def __call__(self, indices: torch.Tensor) -> Batch:
        """The batch of the pairs `indices`, [batch] int64 on the CPU. They may be empty, as in `make_batch`."""
        if not self._padded:
            return make_batch(self.split, indices, fixed_length=self._fixed_length)
        plan = _plan(self.split, indices, self._fixed_length, LENGTH_STEP)
        if self._is_resident:
            return _padded_batch(plan._replace(spans=self._send(plan.spans)), *self._ids)
        batch = _padded_batch(plan, *self._ids)
        return batch._replace(
            src=self._send(batch.src),
            src_last=self._send(batch.src_last),
            trg=self._send(batch.trg),
            targets=self._send(batch.targets),
        )

    def target_tokens(self, indices: torch.Tensor) -> int:
        """How many targets the pairs `indices` have. Batches with all of them, each once, have as many together."""
        lengths = self.split.trg.lengths_of(indices)  # [pairs]
        kept = lengths.clamp(max=self._fixed_length) if self._fixed_length else lengths
        return int(kept.sum()) - len(indices)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)  # a copy from pinned memory waits for nothing


def make_batch(split: Split, indices: torch.Tensor, *, fixed_length: int = 0) -> Batch:
    """The batch of the pairs `indices` of `split`, on the CPU and without padding.

    Args:
        split: the pairs.
        indices: [batch] int64. They are empty if a rank has no share of an incomplete batch. Then the split's first
            pair stands in, and all targets are `PAD`: the rank takes part in the step with weight 0.
        fixed_length: 0, or the length of all sources, in tokens with `<sos>` and `<eos>`. Shorter sources are padded,
            and the padding is read. A longer sentence of either language keeps `fixed_length - 2` words and `<eos>`.

    >>> vocab = Vocabulary(SPECIALS + ["ein", "hund"])
    >>> side = Side.encode([["hund"], ["ein", "hund"]], vocab)
    >>> batch = make_batch(Split(side, side), torch.tensor([0, 1]))
    >>> batch.src.tolist(), batch.src_rows_per_step, batch.src_last.tolist()
    ([2, 2, 4, 5, 5, 3, 3], [2, 2, 2, 1], [6, 5])
    >>> batch.trg.tolist(), batch.targets.tolist(), batch.trg_rows_per_step, batch.target_tokens
    ([2, 2, 4, 5, 5], [4, 5, 5, 3, 3], [2, 2, 1], 5)
    """
    plan = _plan(split, indices, fixed_length)
    src_starts, src_lengths, trg_starts, trg_lengths = plan.spans
    if plan.reads_padding:
        src = _columns(split.src.ids, src_starts, src_lengths, plan.src_steps).flatten()
        src_rows_per_step = torch.full((plan.src_steps,), len(src_starts))
        src_last = _last_rows(plan)
    else:
        by_length = torch.argsort(src_lengths, descending=True, stable=True)
        places, src_rows_per_step = _places(src_starts[by_length], src_lengths[by_length], plan.src_steps)
        src = split.src.ids[places].long()
        first_rows = src_rows_per_step.cumsum(0) - src_rows_per_step  # [src_steps], of each step
        src_last = first_rows[src_lengths - 1] + torch.argsort(by_length)

    places, trg_rows_per_step = _places(trg_starts, trg_lengths - 1, plan.trg_steps - 1)
    targets = split.trg.ids[places + 1].long()
    last_step = targets[len(targets) - trg_rows_per_step[-1] :]
    last_step[: (trg_lengths > plan.trg_steps).sum()] = EOS  # the cut sentences are the longest, so they stand first
    return Batch(
        src=src,
        src_rows_per_step=src_rows_per_step.tolist(),
        src_last=src_last,
        trg=split.trg.ids[places].long(),
        trg_rows_per_step=trg_rows_per_step.tolist(),
        targets=targets if plan.target_tokens else torch.full_like(targets, PAD),
        target_tokens=plan.target_tokens,
    )


def pad(
    side: Side, indices: torch.Tensor, fixed_length: int = 0, *, length_step: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as columns, [length, batch] int64, and their own lengths, [batch] int64.

    Args:
        side: the sentences.
        indices: [batch] int64: those that are wanted.
        fixed_length: the length of the columns. A longer sentence is cut, and ends with `<eos>`. 0: the length of the
            longest sentence.
        length_step: that length is rounded up to a multiple of this.
    """
    lengths = side.lengths_of(indices)  # [batch]
    steps = fixed_length or _round_up(int(lengths.max()), length_step)
    return _columns(side.ids, side.offsets[indices], lengths, steps), lengths


class _Plan(NamedTuple):
    """The layout of a batch. It takes only the lengths, which the host knows, and no ids.

    Attributes:
        spans: [4, batch] int64: offsets and lengths of the sources, offsets and lengths of the targets.
        src_steps, trg_steps: the lengths of the longest source and target, or of all if they are padded.
        reads_padding: whether the encoder reads the padding.
        target_tokens: as in `Batch`.
    """

    spans: torch.Tensor
    src_steps: int
    trg_steps: int
    reads_padding: bool
    target_tokens: int


def _plan(split: Split, indices: torch.Tensor, fixed_length: int, length_step: int = 1) -> _Plan:
    pairs = indices if len(indices) else torch.zeros(1, dtype=torch.int64)
    pairs = pairs[torch.argsort(split.trg.lengths_of(pairs), descending=True, stable=True)]
    src_lengths, trg_lengths = split.src.lengths_of(pairs), split.trg.lengths_of(pairs)  # [batch] each
    src_steps, trg_steps = (_round_up(int(each.max()), length_step) for each in (src_lengths, trg_lengths))
    if fixed_length:
        # Nothing reads the targets' padding. It is there only for few distinct shapes.
        src_steps, trg_steps = fixed_length, fixed_length if length_step > 1 else min(trg_steps, fixed_length)
    return _Plan(
        spans=torch.stack([split.src.offsets[pairs], src_lengths, split.trg.offsets[pairs], trg_lengths]),
        src_steps=src_steps,
        trg_steps=trg_steps,
        reads_padding=bool(fixed_length),
        target_tokens=int(trg_lengths.clamp(max=trg_steps).sum()) - len(pairs) if len(indices) else 0,
    )


def _round_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _places(starts: torch.Tensor, lengths: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of sentences stand among the ids: those of step 0, then those of step 1, and so on.

    Args:
        starts: [batch]: where each sentence begins, the longest sentence first.
        lengths: [batch].
        steps: how many tokens of a sentence are wanted at most.

    Returns:
        [rows] int64, and [steps] int64: how many rows each step has.
    """
    step = torch.arange(steps).unsqueeze(1)  # [steps, 1]
    is_real = step < lengths  # [steps, batch]
    return (starts + step)[is_real], is_real.sum(1)


def _padded_batch(plan: _Plan, src_ids: torch.Tensor, trg_ids: torch.Tensor) -> Batch:
    """The batch of a plan, with padding, on the device of the plan's spans and of the ids.

    The host never waits for the device here, because no value on the device decides a shape.
    """
    src_starts, src_lengths, trg_starts, trg_lengths = plan.spans
    src = _columns(src_ids, src_starts, src_lengths, plan.src_steps)  # [src_steps, batch]
    trg = _columns(trg_ids, trg_starts, trg_lengths, plan.trg_steps)  # [trg_steps, batch]
    batch = len(src_starts)
    targets = trg[1:].flatten()
    return Batch(
        src=src.flatten(),
        src_rows_per_step=[batch] * plan.src_steps,
        src_last=_last_rows(plan),
        trg=trg[:-1].flatten(),
        trg_rows_per_step=[batch] * (plan.trg_steps - 1),
        targets=targets if plan.target_tokens else torch.full_like(targets, PAD),
        target_tokens=plan.target_tokens,
    )


def _last_rows(plan: _Plan) -> torch.Tensor:
    """[batch] int64: with padding, the row at which the encoder has read each source."""
    _, src_lengths, _, _ = plan.spans
    last_steps = plan.src_steps - 1 if plan.reads_padding else src_lengths - 1
    return last_steps * len(src_lengths) + torch.arange(len(src_lengths), device=src_lengths.device)


def _columns(ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """The sentences from `starts`, [batch], as columns, [steps, batch] int64. A longer one is cut, and ends."""
    step = torch.arange(steps, device=ids.device).unsqueeze(1)  # [steps, 1]
    is_real = step < lengths  # [steps, batch]
    columns = ids[torch.where(is_real, starts + step, 0)].long()
    columns = torch.where(is_real, columns, PAD)
    columns[-1] = torch.where(lengths > steps, EOS, columns[-1])
    return columns
