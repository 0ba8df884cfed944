"""The words of a language and their ids, and the ids that stand for no word."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

SPECIALS = ["<unk>", "<pad>", "<sos>", "<eos>"]
UNK, PAD, SOS, EOS = 0, 1, 2, 3


class Vocabulary:
    """The words of one language and their ids.

    `subwords.Pieces` is the other kind: its words are spelled with several ids.

    Args:
        itos: the words in the order of their ids, `SPECIALS` first.

    Attributes:
        itos: as given.
        model: the bytes that spell words with pieces. None: each word has one id.

    Raises:
        ValueError: `itos` does not begin with `SPECIALS`.

    >>> vocab = Vocabulary(["<unk>", "<pad>", "<sos>", "<eos>", "ein", "hund"])
    >>> vocab.encode(["ein", "dackel"])
    [4, 0]
    >>> vocab.decode([2, 4, 5, 3, 1])
    ['ein', 'hund']
    """

    model: bytes | None = None

    def __init__(self, itos: list[str]):
        if itos[: len(SPECIALS)] != SPECIALS:
            raise ValueError(f"a vocabulary begins with {SPECIALS}, not with {itos[: len(SPECIALS)]}")
        self.itos = itos
        # Without the specials: a `<pad>` in somebody's text is an unknown word, not padding.
        self._ids = {word: index for index, word in enumerate(itos) if index >= len(SPECIALS)}

    @classmethod
    def build(cls, counts: Mapping[str, int], min_freq: int = 2, max_words: int = 0) -> "Vocabulary":
        """Takes the words that are counted at least `min_freq` times, and at most `max_words` of them. 0: all.

        Frequent words come first, equally frequent ones in alphabetical order. This is the order of torchtext 0.6.
        """
        from torchtext.vocab import Vocab  # here, because a start from the cache does not need it

        return cls(Vocab(Counter(counts), max_size=max_words or None, min_freq=min_freq, specials=SPECIALS).itos)

    def __len__(self) -> int:
        return len(self.itos)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The tokens' ids, without `<sos>` and `<eos>`. An unknown token gets `UNK`."""
        return [self._ids.get(token, UNK) for token in tokens]

    def spell(self, words: Iterable[str]) -> list[list[int]]:
        """The ids of each word.

        >>> Vocabulary(SPECIALS + ["ein"]).spell(["ein", "dackel"])
        [[4], [0]]
        """
        return [[index] for index in self.encode(words)]

    def encode_all(self, sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of sentences, one after the other, [tokens] int32. And their lengths, [sentences] int64."""
        lengths = np.array([len(words) for words in sentences], np.int64)
        ids = self.encode(itertools.chain.from_iterable(sentences))
        return np.fromiter(ids, np.int32, lengths.sum()), lengths

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words before the first `EOS`, without a leading `SOS`."""
        words = [self.itos[index] for index in itertools.takewhile(lambda index: index != EOS, ids)]
        return words[1:] if words[:1] == [SPECIALS[SOS]] else words


def add_ends(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts `SOS` before each sentence and `EOS` behind it.

    Args:
        ids: [tokens] int32, one sentence after the other.
        lengths: [sentences] int64, in tokens.

    Returns:
        The new ids, [tokens + 2 * sentences] int32. And where each sentence begins in them, [sentences + 1] int64.

    >>> add_ends(np.array([4, 5, 5], np.int32), np.array([2, 1]))
    (array([2, 4, 5, 3, 2, 5, 3], dtype=int32), array([0, 4, 7]))
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths + 2, out=offsets[1:])
    with_ends = np.empty(offsets[-1], np.int32)
    is_word = np.ones(len(with_ends), bool)
    for token, places in ((SOS, offsets[:-1]), (EOS, offsets[1:] - 1)):
        with_ends[places] = token
        is_word[places] = False
    with_ends[is_word] = ids
    return with_ends, offsets
