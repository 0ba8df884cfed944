"""Pieces of words: a vocabulary in which rare words are spelled with several ids, by sentencepiece's BPE.

A model of N pieces is learned from the training text of one language. It starts from single characters and joins the
most frequent neighbours again and again. Pieces never reach over the end of a word, and the first one of a word begins
with `▁`. So the pieces of a sentence join back to its words, which scores and translations are made of. Source:
Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909.

With BPE dropout a model sees other spellings of the same words in each epoch. Source: Provilkov, Emelianenko and Voita
2020, "BPE-Dropout: Simple and Effective Subword Regularization", arXiv 1910.13267.
"""

import base64
import hashlib
import importlib.metadata
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from nmt.errors import UserError, first_line, not_installed
from nmt.text.vocabulary import EOS, SOS, SPECIALS, UNK, Vocabulary

import numpy as np

MAX_PIECES = 510  # of a sentence, which has 512 tokens with <sos> and <eos>: two for each of `tokens.MAX_WORDS`
SENTENCES = 10_000  # that are spelled together. It bounds the memory
START = "▁"  # in front of a word's first piece, as sentencepiece has it
# Within a word, what stands for a character that has a meaning of its own here.
ESCAPES = {START: "_", " ": "␣"}
UNKNOWN_CHARACTER = "\ue000"  # in no text: it stands for characters that no piece has
LEAST_COVERAGE = 0.98
KEPT = 1 << 18  # words whose spelling is remembered
STATES = 1 << 20  # spellings that are remembered for BPE dropout: 1 GB at most


class Pieces(Vocabulary):
    """The pieces of one language and their ids.

    Args:
        itos: the pieces in the order of their ids, `SPECIALS` first.
        model: sentencepiece's, of these pieces.

    Raises:
        ValueError: `model` is none of sentencepiece, or has other pieces.
        UserError: usage, sentencepiece is not installed.

    >>> pieces = learn(Counter({"hund": 5, "hunde": 3, "katze": 2}), 12)
    >>> pieces.spell(["hund", "hunde", "hut"]) == [pieces.encode([word]) for word in ["hund", "hunde", "hut"]]
    True
    >>> pieces.decode(pieces.encode(["hunde", "hatten", "x"]))
    ['hunde', 'hatten', '<unk>']
    """

    def __init__(self, itos: list[str], model: bytes):
        super().__init__(itos)
        library = sentencepiece()
        try:
            self._processor = library.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"no model of sentencepiece: {first_line(error)}") from error
        theirs = [self._processor.id_to_piece(index) for index in range(self._processor.get_piece_size())]
        if theirs[:1] != SPECIALS[:1] or sorted(theirs[1:]) != sorted(itos[len(SPECIALS) :]):
            raise ValueError("the model of sentencepiece has other pieces than the vocabulary")
        self.model = model
        self._of_theirs = np.array([UNK, *(self._ids[piece] for piece in theirs[1:])], np.int32)
        self._spelled: dict[str, list[int]] = {}
        self._joins: Joins | None = None

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of the words' pieces, one word after the other, without `<sos>` and `<eos>`."""
        return list(itertools.chain.from_iterable(self.spell(tokens)))

    def spell(self, words: Iterable[str]) -> list[list[int]]:
        """The ids of each word's pieces. White space has none. A character that no piece has gets `UNK`."""
        words = list(words)
        new = list(dict.fromkeys(word for word in words if word not in self._spelled))
        if len(self._spelled) + len(new) > KEPT:
            self._spelled.clear()
            new = list(dict.fromkeys(words))
        for word, theirs in zip(new, self._processor.encode(list(map(_escaped, new)), num_threads=1), strict=True):
            self._spelled[word] = self._of_theirs[theirs].tolist() if theirs and not word.isspace() else []
        return [self._spelled[word] for word in words]

    def ranks(self) -> dict[str, int]:
        """For each piece of several characters, which of them is joined first: the lowest."""
        size = self._processor.get_piece_size()
        scores = {self._processor.id_to_piece(index): self._processor.get_score(index) for index in range(1, size)}
        joined = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
        return {piece: rank for rank, piece in enumerate(joined)}

    def encode_all(self, sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """As `Vocabulary.encode_all`. A sentence has at most `MAX_PIECES`."""
        spelled = [self.encode(words)[:MAX_PIECES] for words in sentences]
        lengths = np.array(list(map(len, spelled)), np.int64)
        return np.fromiter(itertools.chain.from_iterable(spelled), np.int32, lengths.sum()), lengths

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words that the pieces before the first `EOS` join to. A word of which a piece is unknown is `<unk>`."""
        pieces = super().decode(ids)
        words = "".join(UNKNOWN_CHARACTER if piece == SPECIALS[UNK] else piece for piece in pieces).split(START)
        return [
            SPECIALS[UNK] if UNKNOWN_CHARACTER in word else word.replace(ESCAPES[" "], " ") for word in words if word
        ]

    def spell_anew(
        self, ids: np.ndarray, offsets: np.ndarray, dropout: float, seed: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Other spellings of sentences, by BPE dropout: each join of two pieces is left out with a probability.

        The result follows from the arguments alone, whatever was drawn before, in this process or another.

        Args:
            ids: [tokens] int32, every sentence with its `<sos>` and `<eos>`.
            offsets: [sentences + 1] int64. Sentence i is `ids[offsets[i]:offsets[i + 1]]`.
            dropout: the probability.
            seed: decides on the draws.

        Yields:
            For each `SENTENCES` sentences, their ids and their lengths as `encode_all` gives them.
        """
        texts = np.array(self.itos, object)
        texts[UNK], texts[SOS], texts[EOS] = UNKNOWN_CHARACTER, "", "\n"
        joins = self._joins = self._joins or Joins(self)
        for first in range(0, len(offsets) - 1, SENTENCES):
            last = min(first + SENTENCES, len(offsets) - 1)
            text = "".join(texts[ids[offsets[first] : offsets[last]]].tolist())
            lines = [line.split(START)[1:] for line in text.split("\n")[:-1]]
            draws = np.random.default_rng(list(hashlib.sha256(f"{seed} {first}".encode()).digest()))
            found, pieces = joins.draw(list(itertools.chain.from_iterable(lines)), dropout, draws)
            words = np.array([len(line) for line in lines], np.int64)
            yield in_sentences(found, pieces, words)


def _escaped(word: str) -> str:
    if START in word:
        word = word.replace(START, ESCAPES[START])
    return word if len(word.split()) == 1 else ESCAPES[" "].join(word.split())


class Joins:
    """Which pieces the characters of a word may be joined to, step by step, with BPE dropout.

    In each step every join that is possible is left out with the probability p, and the most frequent of the others is
    made. So the k-th most frequent one, counted from 0, is made with the probability (1 - p) p**k, and a step needs one
    draw. With c possible joins the word stays as it is with the probability p**c. A spelling that a word may have is
    a state here. All words go from state to state at once, by a table, which is filled as it is needed.

    Args:
        pieces: the pieces of a language.
    """

    def __init__(self, pieces: Pieces):
        self._ids = {piece: index for index, piece in enumerate(pieces.itos) if index >= len(SPECIALS)}
        self._ranks = pieces.ranks()
        self._clear()

    def _clear(self) -> None:
        self._states: dict[tuple[str, ...], int] = {}
        self._words: dict[str, int] = {}  # the first state of each word
        self._spellings: list[tuple[str, ...]] = []  # of each state
        self._positions: list[list[int]] = []  # of each state: where it may be joined, the most frequent join first
        self._owners: list[int] = []  # of each slot: the state
        # Of each state: how many joins it has, its first slot, its number of pieces, and where they begin in `_flat`.
        self._counts, self._slots, self._lengths, self._starts = (_Numbers() for _ in range(4))
        self._next = _Numbers()  # of each slot: the state after this join, or -1 if nobody has asked yet
        self._flat = _Numbers()  # ids

    def draw(self, words: list[str], dropout: float, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Spells words.

        Args:
            words: as `Pieces` writes them, without `START`.
            dropout: p.
            draws: as many numbers are taken from it as there are steps.

        Returns:
            The ids of their pieces, one word after the other, [pieces] int32. And how many each word has, [words].
        """
        if len(self._spellings) > STATES:
            self._clear()
        states = np.array([self._first_state(word) for word in words], np.int64)
        places = np.arange(len(states))  # of the words that are not done
        while len(places):
            now = states[places]
            counts = self._counts.values[now]
            chances = dropout ** np.arange(counts.max(), -1, -1)  # ascending
            chances[-1] = 2.0
            # How many of the powers p, p**2, ... are above the draw.
            left_out = counts.max() - np.searchsorted(chances[:-1], draws.random(len(now)), side="right")
            goes_on = left_out < counts
            places, slots = places[goes_on], self._slots.values[now[goes_on]] + left_out[goes_on]
            for slot in np.unique(slots[self._next.values[slots] < 0]).tolist():
                self._next.values[slot] = self._joined(slot)
            states[places] = self._next.values[slots]
        lengths = self._lengths.values[states]
        of_word = np.repeat(np.arange(len(states)), lengths)
        within = np.arange(len(of_word)) - (np.cumsum(lengths) - lengths)[of_word]
        return self._flat.values[self._starts.values[states[of_word]] + within].astype(np.int32), lengths

    def _first_state(self, word: str) -> int:
        state = self._words.get(word)
        if state is None:
            characters = (c if c in self._ids else UNKNOWN_CHARACTER for c in START + word)
            # sentencepiece has one piece for neighbours that are unknown.
            runs = ((c, list(run)) for c, run in itertools.groupby(characters))
            letters = itertools.chain.from_iterable(run[:1] if c == UNKNOWN_CHARACTER else run for c, run in runs)
            state = self._words[word] = self._state(tuple(letters))
        return state

    def _joined(self, slot: int) -> int:
        """The state that a join leads to."""
        owner = self._owners[slot]
        spelling = self._spellings[owner]
        at = self._positions[owner][slot - int(self._slots.values[owner])]
        return self._state((*spelling[:at], spelling[at] + spelling[at + 1], *spelling[at + 2 :]))

    def _state(self, spelling: tuple[str, ...]) -> int:
        """The number of a spelling."""
        state = self._states.get(spelling)
        if state is not None:
            return state
        state = self._states[spelling] = len(self._spellings)
        ranks = (self._ranks.get(left + right) for left, right in itertools.pairwise(spelling))
        positions = [at for _, at in sorted((rank, at) for at, rank in enumerate(ranks) if rank is not None)]
        self._spellings.append(spelling)
        self._positions.append(positions)
        self._counts.extend([len(positions)])
        self._slots.extend([len(self._owners)])
        self._owners += [state] * len(positions)
        self._next.extend([-1] * len(positions))
        self._lengths.extend([len(spelling)])
        self._starts.extend([len(self._flat)])
        self._flat.extend([self._ids.get(piece, UNK) for piece in spelling])
        return state


class _Numbers:
    """An array of int64 that grows.

    Attributes:
        values: the numbers, and room behind them.
    """

    def __init__(self) -> None:
        self.values, self._size = np.zeros(1 << 10, np.int64), 0

    def __len__(self) -> int:
        return self._size

    def extend(self, numbers: list[int]) -> None:
        size = self._size + len(numbers)
        if size > len(self.values):
            self.values = np.concatenate((self.values, np.zeros(max(size, len(self.values)), np.int64)))
        self.values[self._size : size] = numbers
        self._size = size


def in_sentences(ids: np.ndarray, pieces: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts sentences to `MAX_PIECES`.

    Args:
        ids: [pieces], one word after the other.
        pieces: [words]: how many each word has.
        words: [sentences]: how many words each sentence has.

    Returns:
        The ids that are kept, and how many each sentence has of them, [sentences] int64.

    >>> in_sentences(np.array([7, 8, 9]), np.array([1, 2]), np.array([1, 0, 1]))
    (array([7, 8, 9]), array([1, 0, 2]))
    """
    ends = np.concatenate(([0], np.cumsum(pieces)))[np.concatenate(([0], np.cumsum(words)))]
    lengths = np.diff(ends)
    within = np.arange(len(ids)) - np.repeat(ends[:-1], lengths)
    return ids[within < MAX_PIECES], np.minimum(lengths, MAX_PIECES)


def sentencepiece():
    """The library. Whoever has no pieces needs none.

    Raises:
        UserError: usage, it is not installed.
    """
    if told := not_installed(["sentencepiece"], "requirements.txt"):
        raise told
    import sentencepiece

    return sentencepiece


def version() -> str:
    """The library's version. Another one may spell words in another way. Raises as `sentencepiece`."""
    sentencepiece()
    return importlib.metadata.version("sentencepiece")


def of(itos: list[str], model: bytes | None) -> Vocabulary:
    """The vocabulary with these words, or with these pieces if there is a model. Raises as `Pieces`."""
    return Vocabulary(itos) if model is None else Pieces(itos, model)


def as_text(model: bytes | None) -> str | None:
    """A model as text, for JSON."""
    return None if model is None else base64.b64encode(model).decode()


def as_model(text: str | None) -> bytes | None:
    """The model that `as_text` was given. Raises ValueError if it is no such text."""
    return None if text is None else base64.b64decode(text, validate=True)


# ---------------------------------------------------------------- learning


def learn(counts: Mapping[str, int], size: int, lang: str = "") -> Pieces:
    """Learns pieces from the words of a text.

    At least half of the pieces are for joined characters: of a script with very many, the rarest have no piece. They
    make up at most a fiftieth of the text.

    Args:
        counts: how often each word stands in the text.
        size: number of pieces, without the special ids.
        lang: the language, for errors.

    Returns:
        The pieces by their frequency in this text. Those which are only parts of others come last.

    Raises:
        UserError: data, the text has not so many pieces, or more characters.
    """
    library = sentencepiece()
    words: Counter[str] = Counter()
    for word, count in counts.items():
        if not word.isspace():
            words[_escaped(word)] += count
    model = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in words.items()),
            model_writer=model,
            input_format="tsv",
            model_type="bpe",
            vocab_size=size + 1,  # with <unk>
            character_coverage=_coverage(words, size // 2),
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        where = f"--subword {size}" + (f", {lang}" if lang else "")
        if found := re.search(r"too high .* value <= (\d+)", str(error)):
            most = int(found[1]) - 1
            what = f"the training text has no more than {most} pieces"
            raise UserError("data", what, where, f"give --subword {most} or less, or more text") from error
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            least = int(found[1]) - 1
            what = f"the training text has {least} characters that need a piece each"
            raise UserError("data", what, where, f"give --subword {least} or more") from error
        raise
    theirs = library.SentencePieceProcessor(model_proto=model.getvalue())
    uses = np.zeros(size + 1, np.int64)
    spelled = theirs.encode(list(words), num_threads=1)
    for ids, count in zip(spelled, words.values(), strict=True):
        np.add.at(uses, ids, count)
    by_use = 1 + np.argsort(-uses[1:], kind="stable")
    return Pieces(SPECIALS + [theirs.id_to_piece(int(index)) for index in by_use], model.getvalue())


def _coverage(words: Mapping[str, int], most: int) -> float:
    """Which part of a text its `most` most frequent characters make up. sentencepiece takes no less than 0.98."""
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in START + word:
            characters[character] += count
    covered = sum(count for _, count in characters.most_common(max(1, most)))
    return max(LEAST_COVERAGE, covered / characters.total())
