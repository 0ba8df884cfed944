"""Builds the cache of a corpus: its text files become token ids and two vocabularies."""

import importlib.metadata
import json
from pathlib import Path

from nmt.devices import cores
from nmt.errors import UserError
from nmt.storage import sha256
from nmt.text import files, tokens
from nmt.text.cache import Writer
from nmt.text.vocabulary import SPECIALS, Vocabulary, add_ends

import numpy as np

CACHE_FORMAT = 3  # raise it when the content of a cache changes, or the way in which lines become tokens


def cache_key(digests: list[str], langs: tuple[str, str], min_freq: int) -> str:
    """The name of a corpus in the cache. It changes with the texts and with every setting of tokenising.

    Args:
        digests: the `files.content_sha256` of the six files.
        langs: spaCy's codes of both languages.
        min_freq: as in `data.load`.
    """
    versions = [importlib.metadata.version(package) for package in ("spacy", "torchtext")]
    return sha256(json.dumps([CACHE_FORMAT, digests, langs, min_freq, versions]).encode())


def build_corpus(
    writer: Writer,
    paths: list[tuple[Path, Path]],
    digests: list[str],
    langs: tuple[str, str],
    min_freq: int,
    workers: int,
) -> dict:
    """Tokenises the files and writes the ids.

    Args:
        writer: takes the arrays `SPLIT.SIDE.ids` and `SPLIT.SIDE.offsets`, such as `train.src.ids`.
        paths: source and target file of each split.
        digests, langs, min_freq: as in `cache_key`.
        workers: processes that tokenise, at most.

    Returns:
        The rest of the corpus: `vocabs` (the words of both languages), `words` (the tokens of val and test, by split)
        and `notes` (lines for the log).

    Raises:
        UserError: data, usage or io, as from reading and tokenising. Or data, if a split has no pairs.
        Unwritable: as from `writer`.
    """
    vocabs, words, notes = [], {}, []
    text_bytes = sum(files.text_bytes(path) for pair in paths for path in pair)
    processes = min(workers, cores(), text_bytes // tokens.BYTES_PER_PROCESS)
    with tokens.tokenising(langs, processes) as tokenise_chunks:
        import torchtext.vocab  # noqa: F401  for `Vocabulary.build`: now, while the processes start

        for index, (name, pair) in enumerate(zip(files.SPLITS, paths, strict=True)):
            sides = [_SideBuilder(writer, f"{name}.{side}", keeps_words=name != "train") for side in ("src", "trg")]
            pairs = dropped = 0
            for chunk in tokenise_chunks(files.pair_chunks(pair, digests[2 * index : 2 * index + 2])):
                for side, side_tokens in zip(sides, (chunk.src, chunk.trg), strict=True):
                    side.add(side_tokens)
                pairs += len(chunk.src.lengths)
                dropped += chunk.dropped
            if not pairs:
                where = " and ".join(map(str, pair))
                raise UserError("data", "0 usable pairs", where, "both files need text on the same lines")
            if dropped:
                notes.append(f"{dropped} pairs dropped: empty in {pair[0].name} or {pair[1].name}")
            for side, path in zip(sides, pair, strict=True):
                if side.cut:
                    notes.append(f"warning: {side.cut} sentences of {path.name} cut to {tokens.MAX_WORDS} words")
            if name == "train":
                vocabs = [Vocabulary.build(side.counts(), min_freq) for side in sides]
            for side, vocab in zip(sides, vocabs, strict=True):
                side.finish(vocab)
            words[name] = [side.words for side in sides]
    return {"vocabs": [vocab.itos for vocab in vocabs], "words": words, "notes": notes}


class _SideBuilder:
    """Writes one language of a split, chunk after chunk.

    A word gets a provisional id when it is first seen. The final ids come with the vocabulary, after the last chunk of
    train. White-space tokens stay among the ids, as in the original: they have their places in the vocabulary.

    Args:
        writer: takes the arrays `{name}.ids` and `{name}.offsets`.
        keeps_words: whether `words` is kept.

    Attributes:
        cut: how many sentences were cut.
        words: the tokens of each sentence, or None if they are not kept.
    """

    def __init__(self, writer: Writer, name: str, keeps_words: bool):
        self._writer, self._name = writer, name
        self._seen: dict[str, int] = {}  # word to provisional id, counted from 0 without the special words
        self._counts = np.zeros(0, np.int64)  # how often each word of `_seen` came
        self._size = 0  # ids written
        self.cut = 0
        self.words: list[list[str]] | None = [] if keeps_words else None
        writer.append(f"{name}.offsets", np.zeros(1, np.int64))

    def add(self, chunk: tokens.Tokens) -> None:
        """Writes a chunk's sentences with provisional ids."""
        places = np.array([self._seen.setdefault(word, len(self._seen)) for word in chunk.words], np.int32)
        self._counts = np.pad(self._counts, (0, len(self._seen) - len(self._counts)))
        self._counts[places] += np.bincount(chunk.ids, minlength=len(places))
        ids, offsets = add_ends(len(SPECIALS) + places[chunk.ids], chunk.lengths)
        self._writer.append(f"{self._name}.ids", ids)
        self._writer.append(f"{self._name}.offsets", self._size + offsets[1:])
        self._size += len(ids)
        self.cut += chunk.cut
        if self.words is not None:
            self.words += chunk.sentences()

    def counts(self) -> dict[str, int]:
        """How often each word came."""
        return dict(zip(self._seen, self._counts.tolist(), strict=True))

    def finish(self, vocab: Vocabulary) -> None:
        """Replaces the provisional ids by those of `vocab`."""
        table = np.array([*range(len(SPECIALS)), *vocab.encode(self._seen)], np.int32)
        self._writer.translate(f"{self._name}.ids", table)
