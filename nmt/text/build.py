"""Builds the cache of a corpus: its text files become token ids and two vocabularies."""

import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.devices import cores
from nmt.errors import UserError
from nmt.storage import Unwritable, new_folder, sha256
from nmt.text import files, held_out, subwords, tokens
from nmt.text.cache import Writer
from nmt.text.vocabulary import SPECIALS, UNK, Vocabulary, add_ends

import numpy as np

CACHE_FORMAT = 4  # raise it when the content of a cache changes, or the way in which lines become tokens
ENOUGH_WORDS = 100  # of a text, for a warning that too many are unknown
FAR = 2  # times as many unknown words as expected, and 5 of 100 words beside


Text = tuple[tuple[Path, Path], Iterable[files.Chunk]]  # the files of a split, and its lines


class Share(NamedTuple):
    """Some of the words of a text, and all."""

    part: int
    total: int

    @property
    def value(self) -> float:
        return self.part / self.total


class Words(NamedTuple):
    """What words a text is made of, and which of them a vocabulary has. Attributes as in `data.load`."""

    min_freq: int = 2
    case: str = "lower"
    tokenizer: str = "spacy"
    max_vocab: int = 0
    subword: int = 0


def cache_key(digests: list[str], langs: tuple[str, str], words: Words, split: Sequence = ()) -> str:
    """The name of a corpus in the cache. It changes with the texts and with every setting of tokenising.

    Args:
        digests: the `files.content_sha256` of the six files, or of those that are there.
        langs: spaCy's codes of both languages.
        words: what they are. Caches of earlier versions, which knew `min_freq` and then `case`, keep their names.
        split: from `split_off`.
    """
    versions = [importlib.metadata.version(package) for package in ("spacy", "torchtext")]
    settings = [CACHE_FORMAT, digests, langs, words.min_freq, versions]
    newer: list = [] if words.case == "lower" else [words.case]
    if words[2:] != Words()[2:]:
        newer = [words.case, *words[2:]]
        if words.subword:
            newer.append(subwords.version())
    return sha256(json.dumps([*settings, *newer, *split]).encode())


def split_off(paths: Sequence[tuple[Path, Path] | None], pairs: int) -> list:
    """What a key says about the splits that are taken out of train. It is empty if there are none.

    Args:
        paths: of all splits, or of the last one. None: there are no files.
        pairs: in each split that has none.
    """
    missing = [name for name, pair in zip(files.SPLITS[-len(paths) :], paths, strict=True) if pair is None]
    return ["split", held_out.RULE, pairs, *missing] if missing else []


def fingerprint(digests: list[str], split: Sequence) -> str:
    """The sha256 of a corpus's contents.

    Args:
        digests, split: as in `cache_key`.
    """
    return sha256(*map(bytes.fromhex, digests), *([json.dumps(split).encode()] if split else []))


def key_of_test(
    digests: list[str], langs: tuple[str, str], case: str, tokenizer: str = "spacy", split: Sequence = ()
) -> str:
    """The name of a test pair in the cache.

    Args:
        digests: the `files.content_sha256` of both files, or of those that it is taken out of.
        langs, split: as in `cache_key`.
        case, tokenizer: as in `tokens.tokenise`.
    """
    settings = [CACHE_FORMAT, "test", digests, langs, case, importlib.metadata.version("spacy")]
    newer = [] if tokenizer == "spacy" else [tokenizer]
    return sha256(json.dumps([*settings, *newer, *split]).encode())


def build_corpus(
    writer: Writer,
    paths: Sequence[tuple[Path, Path] | None],
    digests: list[str],
    langs: tuple[str, str],
    wanted: Words,
    workers: int,
    val_split: int = 0,
) -> dict:
    """Tokenises the files and writes the ids.

    Args:
        writer: takes the arrays `SPLIT.SIDE.ids` and `SPLIT.SIDE.offsets`, such as `train.src.ids`.
        paths: source and target file of each split. None: its pairs are taken out of train.
        digests, langs: as in `cache_key`.
        wanted: as `words` there.
        workers: processes that tokenise, at most.
        val_split: how many pairs are taken out of train for each split without files.

    Returns:
        The rest of the corpus: `vocabs` (the words or pieces of both languages), `subwords` (their models as text, or
        None twice), `words` (the tokens of val and test, by split), `notes` and `unknown` (lines for the log).

    Raises:
        UserError: data, usage or io, as from reading and tokenising. Or data: a split has no pairs, or train too few.
        Unwritable: as from `writer`.
    """
    vocabs: list[Vocabulary] = []
    words, notes = {}, []
    texts, taken = _texts(paths, digests, val_split)
    if taken:
        notes.append(taken.note())
    unknown: dict[str, dict[str, Share]] = {lang: {} for lang in langs}
    expected: dict[str, Share] = {}
    with tokens.tokenising(langs, _processes(paths, workers), wanted.case, wanted.tokenizer) as tokenise_chunks:
        import torchtext.vocab  # noqa: F401  for `Vocabulary.build`: now, while the processes start

        for name, (pair, chunks) in texts.items():
            about = {"keeps_words": name != "train", "spells": bool(wanted.subword)}
            sides = [_SideBuilder(writer, f"{name}.{side}", **about) for side in ("src", "trg")]
            notes += _read_split(pair, chunks, sides, tokenise_chunks)
            if name == "train":
                vocabs = [_vocabulary(side.counts(), wanted, lang) for lang, side in zip(langs, sides, strict=True)]
            for side, vocab in zip(sides, vocabs, strict=True):
                side.finish(vocab)
            words[name] = [side.words for side in sides]
            for lang, side, vocab in zip(langs, sides, vocabs, strict=True):
                unknown[lang][name] = side.unknown(vocab)
                if name == "train":
                    expected[lang] = side.rare(_rarest(side.counts(), wanted))
                if wanted.subword:
                    notes += side.notes(name, lang)
    return {
        "vocabs": [vocab.itos for vocab in vocabs],
        "subwords": [subwords.as_text(vocab.model) for vocab in vocabs],
        "words": words,
        "notes": notes,
        "unknown": list(_about_unknown_words(unknown, expected)),
    }


def _vocabulary(counts: dict[str, int], wanted: Words, lang: str) -> Vocabulary:
    """The words of a training text, or its pieces."""
    if wanted.subword:
        return subwords.learn(counts, wanted.subword, lang)
    return Vocabulary.build(counts, wanted.min_freq, wanted.max_vocab)


def _rarest(counts: dict[str, int], wanted: Words) -> int:
    """How often a word must stand in train to be known. With pieces every word is, so only rubbish is not."""
    if wanted.subword:
        return 0
    if 0 < wanted.max_vocab < len(counts):
        return max(wanted.min_freq, sorted(counts.values(), reverse=True)[wanted.max_vocab])
    return wanted.min_freq


def build_test(
    paths: Sequence[tuple[Path, Path] | None],
    digests: list[str],
    langs: tuple[str, str],
    workers: int,
    case: str,
    tokenizer: str = "spacy",
    val_split: int = 0,
) -> dict:
    """Tokenises the test pairs alone. What they are scored with has its own vocabularies.

    Args:
        paths: source and target file of the test pairs, or of all splits as in `build_corpus`.
        digests, langs, case, tokenizer: as in `key_of_test`.
        val_split: as in `build_corpus`.
        workers: processes that tokenise, at most.

    Returns:
        `words` (the tokens of both sides) and `notes` (lines for the log).

    Raises:
        UserError: as from `build_corpus`.
    """
    sides = [_SideBuilder(Writer(None), side, keeps_words=True) for side in ("src", "trg")]
    texts, taken = _texts(paths, digests, val_split)
    *_, (pair, chunks) = texts.values()
    with tokens.tokenising(langs, _processes([pair], workers), case, tokenizer) as tokenise_chunks:
        notes = _read_split(pair, chunks, sides, tokenise_chunks)
    return {"words": [side.words for side in sides], "notes": [taken.note(), *notes] if taken else notes}


def write_texts(
    folder: Path, paths: Sequence[tuple[Path, Path] | None], digests: list[str], langs: tuple[str, str], val_split: int
) -> bool:
    """Writes the lines of all splits into a new folder: `train`, `val` and `test`, each in both languages.

    Args:
        folder: is made. One that has just these files stays as it is.
        paths, digests, val_split: as in `build_corpus`.
        langs: the files' suffixes.

    Returns:
        Whether they were written now.

    Raises:
        UserError: io, the folder has something else in it, or it cannot be written. Or as from `build_corpus`.
    """

    def sides() -> Iterator[tuple[str, Iterator[bytes]]]:
        for side, lang in enumerate(langs):
            for name, (_, chunks) in _texts(paths, digests, val_split)[0].items():
                yield f"{name}.{lang}", (chunk.texts[side] for chunk in chunks)

    try:
        if folder.is_dir() and any(folder.iterdir()):
            if all((folder / name).is_file() and _is_same(folder / name, text) for name, text in sides()):
                return False
            raise UserError(
                "io", "the folder has something else in it", str(folder), "name a new one for --write-split"
            )
        with new_folder(folder, folder.with_name(f".{folder.name}.tmp")):
            for name, text in sides():
                with open(folder.with_name(f".{folder.name}.tmp") / name, "xb") as file:
                    file.writelines(text)
                    file.flush()
                    os.fsync(file.fileno())
    except (OSError, Unwritable) as error:
        raise UserError(
            "io", f"cannot be written: {error}", str(folder), "name another one for --write-split"
        ) from error
    return True


def _is_same(path: Path, text: Iterator[bytes]) -> bool:
    """Whether a file holds this text. All of it is read."""
    digest = hashlib.sha256()
    for part in text:
        digest.update(part)
    return digest.hexdigest() == files.content_sha256(path)


def _texts(
    paths: Sequence[tuple[Path, Path] | None], digests: list[str], val_split: int
) -> tuple[dict[str, Text], held_out.HeldOut | None]:
    """The files of each split and its lines. And what is taken out of train, if anything.

    Args:
        paths: of all splits, or of the last one.
        digests: of the files that are there.
        val_split: as in `build_corpus`.
    """
    rest = iter(zip(digests[::2], digests[1::2], strict=True))
    known = {pair: next(rest) for pair in paths if pair}
    names = files.SPLITS[-len(paths) :]
    missing = [name for name, pair in zip(names, paths, strict=True) if pair is None]
    texts: dict[str, Text] = {
        name: (pair, files.pair_chunks(pair, known[pair])) for name, pair in zip(names, paths, strict=True) if pair
    }
    if not missing:
        return texts, None
    train, _ = texts["train"]
    taken = held_out.choose(train, known[train], val_split, missing)
    texts |= {name: (train, taken.part(name)) for name in ("train", *missing)}
    return {name: texts[name] for name in names}, taken


def _processes(paths: Iterable[tuple[Path, Path] | None], most: int) -> int:
    """How many processes are to tokenise these files. With fewer than 2, this one does."""
    text_bytes = sum(files.text_bytes(path) for pair in paths if pair for path in pair)
    return min(most, cores(), text_bytes // tokens.BYTES_PER_PROCESS)


def _read_split(
    pair: tuple[Path, Path],
    chunks: Iterable[files.Chunk],
    sides: "list[_SideBuilder]",
    tokenise_chunks: Callable[[Iterable[files.Chunk]], Iterator[tokens.TokenChunk]],
) -> list[str]:
    """Gives the tokens of a split's lines, `chunks` of two files, to `sides`. Returns lines for the log."""
    pairs = dropped = returns = 0
    for chunk in tokenise_chunks(chunks):
        for side, side_tokens in zip(sides, (chunk.src, chunk.trg), strict=True):
            side.add(side_tokens)
        pairs += len(chunk.src.lengths)
        dropped += chunk.dropped
        returns += chunk.returns
    if not pairs:
        where = " and ".join(map(str, pair))
        raise UserError("data", "0 usable pairs", where, "both files need text on the same lines")
    notes = []
    if dropped:
        notes.append(f"{dropped} pairs dropped: empty in {pair[0].name} or {pair[1].name}")
    for side, path in zip(sides, pair, strict=True):
        if side.cut:
            notes.append(f"warning: {side.cut} sentences of {path.name} cut to {tokens.MAX_WORDS} words")
        if side.long_words:
            cut = f"with words cut to {tokens.MAX_WORD} characters"
            notes.append(f"warning: {side.long_words} sentences of {path.name} {cut}")
    if returns:
        where = f"{pair[0].name} or {pair[1].name}"
        notes.append(f"warning: {returns} lines have a carriage return (CR) inside, in {where}")
    return notes


def _about_unknown_words(unknown: dict[str, dict[str, Share]], expected: dict[str, Share]) -> Iterator[str]:
    """Lines for the log: which shares of the words are unknown, and a warning for each text that has far too many.

    Args:
        unknown: by language and split.
        expected: by language, see `_SideBuilder.rare`.
    """
    yield "unknown words: " + "; ".join(
        f"{lang} " + ", ".join(f"{name} {share.value:.1%}" for name, share in shares.items())
        for lang, shares in unknown.items()
    )
    for lang, shares in unknown.items():
        most = FAR * expected[lang].value + 0.05
        for name, share in shares.items():
            if name != "train" and share.total >= ENOUGH_WORDS and share.value > most:
                yield (
                    f"warning: {share.value:.1%} of the {lang} words of {name} are unknown, train leads to expect "
                    f"{expected[lang].value:.1%}: is one of them spelled or tokenised in another way?"
                )


class _SideBuilder:
    """Writes one language of a split, chunk after chunk.

    A word gets a provisional id when it is first seen. The final ids come with the vocabulary, after the last chunk of
    train. White-space tokens stay among the ids, as in the original: they have their places in the vocabulary.

    Args:
        writer: takes the arrays `{name}.ids` and `{name}.offsets`.
        keeps_words: whether `words` is kept.
        spells: whether the vocabulary is one of pieces.

    Attributes:
        cut, long_words: how many sentences were cut, or had a word cut.
        words: the tokens of each sentence, or None if they are not kept.
    """

    def __init__(self, writer: Writer, name: str, keeps_words: bool, spells: bool = False):
        self._writer, self._name = writer, name
        self._given = f"{name}.words" if spells else name  # the arrays until `finish`
        self._lengths = 0, 0  # of all sentences, in words and in pieces
        self._cut_pieces = 0  # sentences with more than `MAX_PIECES`
        self._seen: dict[str, int] = {}  # word to provisional id, counted from 0 without the special words
        self._counts = np.zeros(0, np.int64)  # how often each word of `_seen` came
        self._size = 0  # ids written
        self.cut = self.long_words = 0
        self.words: list[list[str]] | None = [] if keeps_words else None
        writer.append(f"{self._given}.offsets", np.zeros(1, np.int64))

    def add(self, chunk: tokens.Tokens) -> None:
        """Writes a chunk's sentences with provisional ids."""
        places = np.array([self._seen.setdefault(word, len(self._seen)) for word in chunk.words], np.int32)
        self._counts = np.pad(self._counts, (0, len(self._seen) - len(self._counts)))
        self._counts[places] += np.bincount(chunk.ids, minlength=len(places))
        ids, offsets = add_ends(len(SPECIALS) + places[chunk.ids], chunk.lengths)
        self._writer.append(f"{self._given}.ids", ids)
        self._writer.append(f"{self._given}.offsets", self._size + offsets[1:])
        self._size += len(ids)
        self.cut += chunk.cut
        self.long_words += chunk.long_words
        if self.words is not None:
            self.words += chunk.sentences()

    def counts(self) -> dict[str, int]:
        """How often each word came."""
        return dict(zip(self._seen, self._counts.tolist(), strict=True))

    def unknown(self, vocab: Vocabulary) -> Share:
        """The words that are not in a vocabulary. Of pieces: the words with a character that no piece has."""
        return self._share(np.array([UNK in ids for ids in vocab.spell(self._seen)], bool))

    def rare(self, most: int) -> Share:
        """The words that come at most `most` times.

        Of a new text of the same kind, about this share of the words comes fewer than `most` times here. Source: Good
        1953, "The population frequencies of species and the estimation of population parameters".
        """
        return self._share(self._counts <= most)

    def _share(self, of_these: np.ndarray) -> Share:
        return Share(int(self._counts[of_these].sum()), int(self._counts.sum()))

    def finish(self, vocab: Vocabulary) -> None:
        """Replaces the provisional ids by those of `vocab`."""
        if self._given == self._name:
            table = np.array([*range(len(SPECIALS)), *vocab.encode(self._seen)], np.int32)
            self._writer.translate(f"{self._name}.ids", table)
        else:
            self._spell_out(vocab)

    def _spell_out(self, vocab: Vocabulary) -> None:
        """Writes the final arrays: for each word of the provisional ones, the ids of its pieces."""
        spelled = vocab.spell(self._seen)
        pieces = np.array([len(ids) for ids in spelled], np.int64)  # of each word
        starts = np.cumsum(pieces) - pieces
        flat = np.fromiter(itertools.chain.from_iterable(spelled), np.int32, pieces.sum())
        names = [f"{self._given}.ids", f"{self._given}.offsets"]
        ids, offsets = map(self._writer.array, names)
        self._writer.append(f"{self._name}.offsets", np.zeros(1, np.int64))
        self._size = 0
        for first in range(0, len(offsets) - 1, subwords.SENTENCES):
            last = min(first + subwords.SENTENCES, len(offsets) - 1)
            words = ids[offsets[first] : offsets[last]]
            words = words[words >= len(SPECIALS)] - len(SPECIALS)
            sentence = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]) - 2)  # of each word
            of_word = np.repeat(np.arange(len(words)), pieces[words])  # of each piece
            place = np.arange(len(of_word)) - (np.cumsum(pieces[words]) - pieces[words])[of_word]  # in its word
            lengths = np.bincount(sentence[of_word], minlength=last - first)
            in_sentence = np.arange(len(of_word)) - (np.cumsum(lengths) - lengths)[sentence[of_word]]
            kept = in_sentence < subwords.MAX_PIECES
            self._cut_pieces += int((lengths > subwords.MAX_PIECES).sum())
            spelling = flat[starts[words[of_word[kept]]] + place[kept]]
            with_ends, ends = add_ends(spelling, np.minimum(lengths, subwords.MAX_PIECES))
            self._writer.append(f"{self._name}.ids", with_ends)
            self._writer.append(f"{self._name}.offsets", self._size + ends[1:])
            self._size += len(with_ends)
            self._lengths = self._lengths[0] + len(words), self._lengths[1] + len(of_word)
        for name in names:
            self._writer.drop(name)

    def notes(self, split: str, lang: str) -> Iterator[str]:
        """Lines for the log about the pieces of a text."""
        yield f"pieces of a {lang} word of {split}: {self._lengths[1] / max(1, self._lengths[0]):.2f}"
        if self._cut_pieces:
            yield f"warning: {self._cut_pieces} {lang} sentences of {split} cut to {subwords.MAX_PIECES} pieces"
