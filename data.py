"""The data: parallel text files in, batches of token ids out. Here one starts to read.

    corpus = data.load("sample")                                    # finds or downloads, tokenises, caches
    loader = data.Loader(corpus.train, device)
    for indices in data.epoch_batches(corpus.train, 128, seed=1234, epoch=0):
        batch = loader(data.rank_share(indices, rank, world_size))

From top to bottom: the vocabulary, the corpus as tensors, loading it, the batches of an epoch, a batch. Around it:
`textfiles` reads and checks the files, `textwords` makes words of lines, `cache` keeps the result on disk, `download`
fetches Multi30k. A corpus may be larger than memory: its ids stay in mapped files. Nothing is pickled.
"""

import functools
import importlib.metadata
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nmt.devices import cores
from nmt.errors import UserError
from nmt.storage import Log, sha256
from nmt.text import cache
from nmt.text import files as textfiles
from nmt.text import tokens as textwords
from nmt.text.download import download_multi30k
from nmt.text.files import any_corpus, find_files
from nmt.text.tokens import MAX_WORDS, tokenise

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
    "download_multi30k",
    "epoch_batches",
    "find_files",
    "load",
    "make_batch",
    "pad",
    "rank_share",
    "spaceless",
    "tokenise",
]

SPECIALS = ["<unk>", "<pad>", "<sos>", "<eos>"]
UNK, PAD, SOS, EOS = 0, 1, 2, 3
SPLITS = ("train", "val", "test")
FORMAT = 3  # of what is cached: raise it with every change of that, or of how lines become tokens


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
    def build(cls, counts: Mapping[str, int], min_freq: int = 2) -> "Vocabulary":
        """The words counted at least `min_freq` times, by frequency, ties alphabetical: torchtext 0.6's order."""
        from torchtext.vocab import Vocab  # here, because a start from the cache does not need it

        return cls(Vocab(Counter(counts), min_freq=min_freq, specials=SPECIALS).itos)

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
    """One language of a split: all sentences in one flat tensor, which may be a mapped file.

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
        lengths = np.array([len(words) for words in sentences], np.int64)
        ids = np.fromiter(vocab.encode(itertools.chain.from_iterable(sentences)), np.int32, lengths.sum())
        return cls(*map(torch.from_numpy, _with_ends(ids, lengths)))

    @property
    def lengths(self) -> torch.Tensor:
        """[sentences] int64, in tokens, `<sos>` and `<eos>` counted."""
        return self.offsets.diff()

    def lengths_of(self, indices: torch.Tensor) -> torch.Tensor:
        """[indices] int64, the same for some sentences: it costs nothing for the others."""
        return self.offsets[indices + 1] - self.offsets[indices]


def _with_ends(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sentences one after the other, `ids` [tokens] int32, `lengths` [sentences]: the same with `SOS` and `EOS` around
    each, [tokens + 2 * sentences] int32, and the sentences' offsets in that, [sentences + 1] int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths + 2, out=offsets[1:])
    whole = np.empty(offsets[-1], np.int32)
    inner = np.ones(len(whole), bool)
    for token, places in ((SOS, offsets[:-1]), (EOS, offsets[1:] - 1)):
        whole[places] = token
        inner[places] = False
    whole[inner] = ids
    return whole, offsets


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
        src_tokens, trg_tokens: the same as words, unknown ones too, for a model with vocabularies of its own; None for
            train.
    """

    src: Side
    trg: Side
    src_tokens: list[list[str]] | None = None
    trg_tokens: list[list[str]] | None = None

    @property
    def references(self) -> list[list[str]]:
        """`trg_tokens` as they are scored, `spaceless`."""
        return [spaceless(tokens) for tokens in self.trg_tokens]

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

    def check_ids(self) -> None:
        """Reads all ids through: to be called before a device gets them that would not notice a wrong one.

        An NPU looks an id outside the vocabulary up somewhere else in its memory, and a CPU raises IndexError.

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


# ---------------------------------------------------------------- loading


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
    verify: bool = True,
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
        verify: whether a cached corpus is read through and checked; another process may just have done that.
        log: takes the lines that tell what is going on.

    Raises:
        UserError: data (a file is missing or unusable), usage (no tokenizer for a language), io (no download).
    """
    data_dir = Path(data_dir)
    langs, names = (src_lang, trg_lang), (train_name, val_name, test_name)
    if src_lang == trg_lang:
        raise UserError("usage", f"both languages are {src_lang}", "--src-lang, --trg-lang", "give the other one too")
    try:
        if data_dir.is_file() or not data_dir.absolute().parent.is_dir():
            what = "is a file, not a folder" if data_dir.is_file() else "there is no such folder, nor the one above it"
            raise UserError("data", what, str(data_dir), "name a folder with --data-dir")
        nothing_there = not any_corpus(data_dir, langs)
    except PermissionError as error:
        what, todo = f"cannot read: {error.strerror}", "name a folder that you may read with --data-dir"
        raise UserError("io", what, str(error.filename or data_dir), todo) from error
    if nothing_there and (langs, names) == (("de", "en"), SPLITS):
        download_multi30k(data_dir, mirror=mirror, timeout=download_timeout, log=log)
    files = find_files(data_dir, langs, names)
    paths = list(itertools.chain.from_iterable(files))
    versions = [importlib.metadata.version(package) for package in ("spacy", "torchtext")]

    def key(digests: list[str]) -> str:
        return sha256(json.dumps([FORMAT, digests, langs, min_freq, versions]).encode())

    folder = cache.find_folder(cache_dir, log)
    digests = cache.known_digests(folder, paths)
    entry = digests and cache.read(folder, key(digests), verify=verify)
    if not entry:
        digests = cache.read_digests(folder, paths, log)

        def build(writer: cache.Writer) -> dict:
            log(f"tokenising {files[0][0].parent}: no readable cache has these contents")
            return _build(writer, files, digests, langs, min_freq, workers)

        entry = cache.read_or_build(folder, key(digests), build, log)
    vocabs, splits = map(Vocabulary, entry.about["vocabs"]), (_split(entry, name) for name in SPLITS)
    return Corpus(*vocabs, *splits, *langs, sha256(*map(bytes.fromhex, digests)), entry.about["notes"])


def _split(entry: cache.Entry, name: str) -> Split:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        src, trg = (
            Side(*(torch.from_numpy(entry.arrays[f"{name}.{side}.{part}"]) for part in ("ids", "offsets")))
            for side in ("src", "trg")
        )
    return Split(src, trg, *entry.about["words"][name])


class _SideBuilder:
    """One language of a split as chunk after chunk comes in. A word gets a provisional id when it is first seen; the
    vocabulary, and with it the final ids, are known after the last chunk of train.

    Args:
        writer: takes the arrays `{name}.ids` and `{name}.offsets`.
    """

    def __init__(self, writer: cache.Writer, name: str):
        self._writer, self._name = writer, name
        self._seen: dict[str, int] = {}  # provisional ids, the special words not counted
        self._counts = np.zeros(0, np.int64)  # of the words in `_seen`
        self._size = 0
        self.cut = 0
        writer.append(f"{name}.offsets", np.zeros(1, np.int64))

    def add(self, tokens: textwords.Tokens) -> None:
        """Writes a chunk's sentences, in provisional ids."""
        places = np.array([self._seen.setdefault(word, len(self._seen)) for word in tokens.words], np.int32)
        self._counts = np.pad(self._counts, (0, len(self._seen) - len(self._counts)))
        self._counts[places] += np.bincount(tokens.ids, minlength=len(places))
        ids, offsets = _with_ends(len(SPECIALS) + places[tokens.ids], tokens.lengths)
        self._writer.append(f"{self._name}.ids", ids)
        self._writer.append(f"{self._name}.offsets", self._size + offsets[1:])
        self._size += len(ids)
        self.cut += tokens.cut

    def counts(self) -> dict[str, int]:
        """How often each word has come."""
        return dict(zip(self._seen, self._counts.tolist(), strict=True))

    def finish(self, vocab: Vocabulary) -> None:
        """Replaces the provisional ids by those of `vocab`."""
        table = np.array([*range(len(SPECIALS)), *vocab.encode(self._seen)], np.int32)
        self._writer.translate(f"{self._name}.ids", table)


def _build(
    writer: cache.Writer,
    files: list[tuple[Path, Path]],
    digests: list[str],
    langs: tuple[str, str],
    min_freq: int,
    workers: int,
) -> dict:
    """Tokenises the files: the ids go to `writer`, all that is no array is returned. See `load` for the arguments."""
    vocabs, words, notes = [], {}, []
    text_bytes = sum(textfiles.text_bytes(path) for paths in files for path in paths)
    processes = min(workers, cores(), text_bytes // textwords.BYTES_PER_PROCESS)
    with textwords.tokenised(langs, processes) as tokenised:
        import torchtext.vocab  # noqa: F401  for `Vocabulary.build`: now, while the processes start

        for index, (name, paths) in enumerate(zip(SPLITS, files, strict=True)):
            sides = [_SideBuilder(writer, f"{name}.{side}") for side in ("src", "trg")]
            sentences: tuple[list, list] = ([], [])
            pairs = dropped = 0
            for chunk in tokenised(textfiles.pair_chunks(paths, digests[2 * index : 2 * index + 2])):
                for side, tokens, kept in zip(sides, (chunk.src, chunk.trg), sentences, strict=True):
                    # White-space tokens stay among the ids, as in the original: they have their places in the
                    # vocabulary.
                    side.add(tokens)
                    if name != "train":
                        kept += tokens.sentences()
                pairs += len(chunk.src.lengths)
                dropped += chunk.dropped
            if not pairs:
                where = " and ".join(map(str, paths))
                raise UserError("data", "0 usable pairs", where, "both files need text on the same lines")
            if dropped:
                notes.append(f"{dropped} pairs dropped: empty in {paths[0].name} or {paths[1].name}")
            for side, path in zip(sides, paths, strict=True):
                if side.cut:
                    notes.append(f"warning: {side.cut} sentences of {path.name} cut to {MAX_WORDS} words")
            if name == "train":
                vocabs = [Vocabulary.build(side.counts(), min_freq) for side in sides]
            for side, vocab in zip(sides, vocabs, strict=True):
                side.finish(vocab)
            words[name] = [None, None] if name == "train" else sentences
    return {"vocabs": [vocab.itos for vocab in vocabs], "words": words, "notes": notes}


# ---------------------------------------------------------------- the batches of an epoch

POOL = 100  # batches whose pairs are grouped by length together


class EpochBatches(Sequence):  # without slices and negative indices
    """One epoch's batches over all ranks, in training order; see `epoch_batches`. What is held is one permutation of
    the pairs, drawn when the first batch is asked for, and one pool of batches."""

    def __init__(self, split: Split, batch_size: int, seed: int, epoch: int, like_length: bool, drop_last: bool):
        whole, rest = divmod(len(split), batch_size)
        self._steps = whole + bool(rest and not (drop_last and whole))
        self._pools = max(1, round(self._steps / POOL))
        self._split, self._batch_size, self._like_length = split, batch_size, like_length
        self._seeds = [seed, epoch]
        self._pool, self._batches = -1, []  # the pool that is laid out

    def __len__(self) -> int:
        return self._steps

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
        order = np.arange(len(self._split), dtype=np.int32 if len(self._split) < 1 << 31 else np.int64)
        np.random.default_rng(self._seeds).shuffle(order)
        return order[: self._steps * self._batch_size]

    def _group(self, indices: np.ndarray) -> np.ndarray:
        """[pairs of a pool] int64, in an order in which each batch has pairs of like length in both languages.

        Sorted by one language alone, a batch pads the other: a pair's lengths are only about proportional. So the pool
        is sorted by source and cut into stripes of whole batches, and each stripe is sorted by target. With s stripes
        of b batches, the sources of a batch spread over 1/s of all, the targets over s/b of what a stripe has: of b
        batches, about the square root as stripes makes both alike."""
        pairs = torch.from_numpy(indices)
        src, trg = (side.lengths_of(pairs).numpy() for side in (self._split.src, self._split.trg))
        batches = -(-len(indices) // self._batch_size)
        stripes = round(math.sqrt(batches))
        by_src = np.lexsort((trg, src))
        stripe = np.arange(len(indices)) // self._batch_size * stripes // batches
        return indices[by_src[np.lexsort((src[by_src], trg[by_src], stripe))]]


def epoch_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, like_length: bool = True, drop_last: bool = False
) -> EpochBatches:
    """One epoch's batches over all ranks, in training order, drawn from (seed, epoch) alone.

    Args:
        split: the pairs.
        batch_size: pairs in a batch, over all ranks.
        like_length: batches of pairs of about one length in each language, which need little padding: the shuffled
            pairs are grouped by length within pools of about `POOL` batches, and the batches of a pool are shuffled.
        drop_last: leave the incomplete batch out, unless it is the only one.

    Returns:
        A sequence of [batch] int64 indices of pairs; each pair in one batch, one batch at most incomplete.

    >>> vocab = Vocabulary(SPECIALS + ["ein"])
    >>> side = Side.encode([["ein"] * words for words in (7, 2, 6, 3, 7)], vocab)
    >>> batches = epoch_batches(Split(side, side), 2, seed=1, epoch=0)
    >>> len(batches), sorted(side.lengths_of(batch).tolist() for batch in batches)
    (3, [[4, 5], [8, 9], [9]])
    """
    return EpochBatches(split, batch_size, seed, epoch, like_length, drop_last)


def rank_share(indices: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """One rank's pairs of a batch: the ranks' shares are disjoint and together the batch; a share may be empty.

    >>> [rank_share(torch.tensor([5, 6, 7]), rank, 2).tolist() for rank in range(2)]
    [[5, 7], [6]]
    """
    return indices[rank::world_size]


# ---------------------------------------------------------------- a batch

LENGTH_STEP = 4  # on an NPU or GPU lengths are rounded up to multiples of this, to have few distinct shapes


class Batch(NamedTuple):
    """Sentence pairs as the model reads them: the tokens of step 0, then those of step 1, and so on.

    The pairs are ordered by the lengths of their targets, the longest first, and the sources once more by their own.
    So the sentences that have a step t are the first `counts[t]`, and without padding there is a row for each token.
    With padding each step has a row for each sentence.

    Attributes:
        src: [source rows] int64 token ids. src_rows_per_step: how many of them each step has.
        src_last: [batch] int64 the row of each source's last token, in the order of the targets.
        trg: [target rows] int64 the token in front of each target: `SOS` in step 0. trg_rows_per_step: likewise.
        targets: [target rows] int64 the tokens to predict; `PAD` where there is none.
        target_tokens: how many of the targets are none of padding.
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

    On a CPU that is `make_batch`, without padding. NPUs and GPUs want few distinct shapes and get padding, with lengths
    rounded up. There the ids stay on the device if they fit, and batches are laid out by indexing; else they are laid
    out here, and copied while the device computes. Either way nothing waits for the device: the host knows the lengths.

    Args:
        split: the pairs.
        device: where the batches are wanted.
        fixed_length: as in `make_batch`.
        resident_bytes: what the split's ids may take of the device's memory.
        padded: whether batches are padded; None where the device is no CPU.
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
        self._split, self._device, self._fixed_length = split, torch.device(device), fixed_length
        self._padded = self._device.type != "cpu" if padded is None else padded
        ids = split.src.ids, split.trg.ids
        self._is_resident = sum(each.nbytes for each in ids) <= resident_bytes
        self._ids = tuple(each.to(self._device) for each in ids) if self._is_resident else ids

    def __call__(self, indices: torch.Tensor) -> Batch:
        """The pairs `indices`, [batch] int64 on the CPU; empty as in `make_batch`."""
        if not self._padded:
            return make_batch(self._split, indices, fixed_length=self._fixed_length)
        plan = _plan(self._split, indices, self._fixed_length, LENGTH_STEP)
        if self._is_resident:
            return _padded_batch(plan._replace(spans=self._send(plan.spans)), *self._ids)
        batch = _padded_batch(plan, *self._ids)
        return Batch(*(self._send(field) if isinstance(field, torch.Tensor) else field for field in batch))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)  # a copy from pinned memory waits for nothing


def make_batch(split: Split, indices: torch.Tensor, *, fixed_length: int = 0) -> Batch:
    """The pairs `indices` of `split` on the CPU, without padding.

    Args:
        split: the pairs.
        indices: [batch] int64. Empty (a rank's share of an incomplete batch): the split's first pair stands in, and
            none of its targets counts, so that the rank takes part in the step with weight 0.
        fixed_length: if not 0, a sentence with more tokens, `<sos>` and `<eos>` counted, keeps its first
            `fixed_length - 2` words and `<eos>`; and sources with fewer are padded, and the padding is read.

    >>> vocab = Vocabulary(SPECIALS + ["ein", "hund"])
    >>> side = Side.encode([["hund"], ["ein", "hund"]], vocab)
    >>> batch = make_batch(Split(side, side), torch.tensor([0, 1]))
    >>> batch.src.tolist(), batch.src_rows_per_step, batch.src_last.tolist()
    ([2, 2, 4, 5, 5, 3, 3], [2, 2, 2, 1], [6, 5])
    >>> batch.trg.tolist(), batch.targets.tolist(), batch.trg_rows_per_step, batch.target_tokens
    ([2, 2, 4, 5, 5], [4, 5, 5, 3, 3], [2, 2, 1], 5)
    """
    plan = _plan(split, indices, fixed_length)
    padded = _padded_batch(plan, split.src.ids, split.trg.ids)
    _, src_lengths, _, trg_lengths = plan.spans
    trg_rows = torch.arange(1, plan.trg_steps).unsqueeze(1) < trg_lengths  # [trg_steps - 1, batch]
    batch = padded._replace(
        trg=padded.trg[trg_rows.flatten()],
        trg_rows_per_step=trg_rows.sum(1).tolist(),
        targets=padded.targets[trg_rows.flatten()],
    )
    if plan.reads_padding:
        return batch
    by_length = torch.argsort(src_lengths, descending=True, stable=True)
    src_rows = torch.arange(plan.src_steps).unsqueeze(1) < src_lengths[by_length]  # [src_steps, batch]
    counts = src_rows.sum(1)
    first_rows = counts.cumsum(0) - counts  # of each step
    return batch._replace(
        src=padded.src.view(plan.src_steps, -1)[:, by_length][src_rows],
        src_rows_per_step=counts.tolist(),
        src_last=first_rows[src_lengths - 1] + torch.argsort(by_length),
    )


def pad(
    side: Side, indices: torch.Tensor, fixed_length: int = 0, *, length_step: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as columns, [length, batch] int64, and their own lengths, [batch] int64.

    Args:
        side: the sentences.
        indices: [batch] int64 those that are wanted.
        fixed_length: the columns' length: a longer sentence is cut, and ends. 0: that of the longest.
        length_step: that is rounded up to a multiple of this.
    """
    lengths = side.lengths_of(indices)  # [batch]
    steps = fixed_length or _round_up(int(lengths.max()), length_step)
    return _columns(side.ids, side.offsets[indices], lengths, steps), lengths


class _Plan(NamedTuple):
    """What a batch looks like before anybody has read an id: all that needs the lengths, which the host knows.

    Attributes:
        spans: [4, batch] int64: offsets and lengths of the sources, offsets and lengths of the targets.
        src_steps, trg_steps: the lengths of the columns.
        reads_padding: whether the encoder reads the columns to their end.
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
    lengths = [side.lengths_of(pairs) for side in (split.src, split.trg)]  # [batch] each
    src_steps, trg_steps = (_round_up(int(each.max()), length_step) for each in lengths)
    if fixed_length:
        # Nothing reads a target's padding: it is there only where shapes are few.
        src_steps, trg_steps = fixed_length, fixed_length if length_step > 1 else min(trg_steps, fixed_length)
    return _Plan(
        spans=torch.stack([split.src.offsets[pairs], lengths[0], split.trg.offsets[pairs], lengths[1]]),
        src_steps=src_steps,
        trg_steps=trg_steps,
        reads_padding=bool(fixed_length),
        target_tokens=int(lengths[1].clamp(max=trg_steps).sum()) - len(pairs) if len(indices) else 0,
    )


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padded_batch(plan: _Plan, src_ids: torch.Tensor, trg_ids: torch.Tensor) -> Batch:
    """The batch of a plan, with padding; the plan's spans are where the ids are. Nothing here makes the host wait for a
    device: no value decides a shape."""
    src_starts, src_lengths, trg_starts, trg_lengths = plan.spans
    src = _columns(src_ids, src_starts, src_lengths, plan.src_steps)  # [src_steps, batch]
    trg = _columns(trg_ids, trg_starts, trg_lengths, plan.trg_steps)  # [trg_steps, batch]
    batch = len(src_starts)
    last_steps = plan.src_steps - 1 if plan.reads_padding else src_lengths - 1
    targets = trg[1:].flatten()
    return Batch(
        src=src.flatten(),
        src_rows_per_step=[batch] * plan.src_steps,
        src_last=last_steps * batch + torch.arange(batch, device=src.device),
        trg=trg[:-1].flatten(),
        trg_rows_per_step=[batch] * (plan.trg_steps - 1),
        targets=targets if plan.target_tokens else torch.full_like(targets, PAD),
        target_tokens=plan.target_tokens,
    )


def _columns(ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """The sentences from `starts`, [batch], as columns, [steps, batch] int64; one that is longer is cut, and ends."""
    step = torch.arange(steps, device=ids.device).unsqueeze(1)  # [steps, 1]
    is_real = step < lengths  # [steps, batch]
    columns = ids[torch.where(is_real, starts + step, 0)].long()
    columns = torch.where(is_real, columns, PAD)
    columns[-1] = torch.where(lengths > steps, EOS, columns[-1])
    return columns
