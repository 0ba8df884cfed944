"""Text in, translated text out: what stands between lines and an engine, whichever library computes it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nmt.engine import Engine, Hypothesis
from nmt.text import sentences
from nmt.text.detokens import Detokeniser
from nmt.text.subwords import MAX_PIECES
from nmt.text.tokens import MAX_CHARACTERS, MAX_WORD, MAX_WORDS, tokenise_lines, tokenizer_of, without_long_words
from nmt.text.vocabulary import EOS, PAD, SOS, SPECIALS, UNK

LENGTH_STEP = 50  # a translation may have as many tokens as its source, rounded up to a multiple of this
UNKNOWN = SPECIALS[UNK]
WORDS_KEPT = 100_000  # by a tokenizer: 100 MB. A new one costs a tenth of a second

# What may happen to a sentence or a line. Their number stands in front where it is told.
CUT = f"sentence(s) of more than {MAX_WORDS} words or {MAX_CHARACTERS} characters: what is beyond was left out"
CUT_PIECES = f"sentence(s) of more than {MAX_PIECES} pieces: what is beyond was left out"
LONG_WORD = f"line(s) with a word of more than {MAX_WORD} characters: what is beyond was left out"


@dataclass(frozen=True)
class Translation:
    """One translation of a line.

    Attributes:
        tokens: of all its sentences.
        text: the same as people write it. Without a detokeniser it is `tokens_line`.
        score: see `nmt.engine.Hypothesis`. Of several sentences the mean.
    """

    tokens: list[str]
    text: str
    score: float

    @property
    def tokens_line(self) -> str:
        """The tokens with spaces between, in one line."""
        return one_line(" ".join(self.tokens))


EMPTY = Translation([], "", 0.0)


class Translator:
    """Translates lines of text with an engine.

    A line is split into its sentences, because models are trained on single ones. Each is translated on its own. A line
    that is tokenised already is one sentence, and its translation's words have spaces between them.

    Args:
        engine: the model.
        beam_size, length_penalty: as in `nmt.engine.Engine.translate`. None: as the model's run scored.
        max_length: most words or pieces of a sentence's translation. None: as the model's run, or as many as the
            sentence has, rounded up to a multiple of `LENGTH_STEP`.
        n_best: translations of each line.
        replace_unknown: a `<unk>` becomes the source's unknown word, see `with_source_words`.
        detokenise: whether the text is put together as people write it.

    Attributes:
        beam_size, length_penalty: as they were resolved.
        changes: counts what was left out, by `CUT`, `CUT_PIECES` and `LONG_WORD`.
        words, unknown: how many words were translated, and how many of them are not in the vocabulary.

    Raises:
        ValueError, UserError: as from `nmt.engine.ModelInfo.vocabularies`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        beam_size: int | None = None,
        length_penalty: float | None = None,
        max_length: int | None = None,
        n_best: int = 1,
        replace_unknown: bool = False,
        detokenise: bool = True,
    ):
        info = engine.info
        self._engine, self._info = engine, info
        self._src, self._trg = info.vocabularies()
        self._by_rules = info.tokenizer == "spacy"
        width = info.flags.get("beam_size", 1) if beam_size is None else beam_size
        self.beam_size: int = min(width, len(info.trg_words))
        self.length_penalty: float = info.flags.get("length_penalty", 1.0) if length_penalty is None else length_penalty
        self._max_length: int | None = info.flags.get("max_length") if max_length is None else max_length
        self._n_best = n_best
        self._replace_unknown = replace_unknown
        self._detokeniser = Detokeniser(info.trg_lang) if detokenise and self._by_rules else None
        self.changes: Counter[str] = Counter()
        self.words = self.unknown = 0

    def __call__(self, lines: Sequence[str]) -> list[list[Translation]]:
        """Translates lines.

        Args:
            lines: without line ends. Few enough for memory.

        Returns:
            `n_best` translations of each line, the best first. A line without a word gets empty ones.
        """
        if self._by_rules:
            tokenizer_of(self._info.src_lang, WORDS_KEPT)
        texts: list[str] = []
        spans: list[range] = []  # of each line's sentences among the texts
        for line in lines:
            first = len(texts)
            texts += self._sentences(line)
            spans.append(range(first, len(texts)))
        translated = self._translate(texts)
        return [self._joined([translated[place] for place in span if translated[place]]) for span in spans]

    def _sentences(self, line: str) -> list[str]:
        if len(line) > MAX_WORD:
            line, was_cut = without_long_words(line, self._info.src_lang, self._info.tokenizer)
            self.changes[LONG_WORD] += was_cut
        if self._by_rules:
            return sentences.split(line, self._info.src_lang)
        return [line.strip()] if line.strip() else []

    def _translate(self, texts: list[str]) -> list[list[Translation]]:
        """The translations of each sentence. None of white space. One without a letter or a digit is copied."""
        tokenised = tokenise_lines(texts, self._info.src_lang, "keep", self._info.tokenizer)
        self.changes[CUT] += tokenised.cut
        words = [self._kept(tokens) for tokens in tokenised.sentences()]
        spelled = [self._src.spell(map(self._in_model_case, tokens)) for tokens in words]
        self.words += sum(map(len, words))
        self.unknown += sum(UNK in ids for sentence in spelled for ids in sentence)
        by_limit: dict[int, list[int]] = {}
        results: list[list[Translation]] = [[] for _ in texts]
        sources = [[index for word in sentence for index in word] for sentence in spelled]
        for place, tokens in enumerate(words):
            if tokens and not any(map(str.isalnum, texts[place])):
                results[place] = [Translation(tokens, one_line(texts[place]), 0.0)] * self._n_best
            elif tokens:
                if self._src.model is not None and len(sources[place]) > MAX_PIECES:
                    self.changes[CUT_PIECES] += 1
                    sources[place] = sources[place][:MAX_PIECES]
                by_limit.setdefault(self._limit(sources[place]), []).append(place)
        for limit, places in sorted(by_limit.items()):
            found = self._engine.translate(
                [[SOS, *sources[place], EOS] for place in places],
                beam_size=self.beam_size,
                length_penalty=self.length_penalty,
                max_length=limit,
                n_best=self._n_best,
            )
            for place, hypotheses in zip(places, found, strict=True):
                unknown = [word for word, ids in zip(words[place], spelled[place], strict=True) if UNK in ids]
                results[place] = [self._as_text(hypothesis, unknown) for hypothesis in hypotheses]
        return results

    def _in_model_case(self, word: str) -> str:
        return word.lower() if self._info.case == "lower" else word

    def _kept(self, tokens: list[str]) -> list[str]:
        """The tokens that are translated: all except white space that the model does not know.

        What is white space and nothing else is not translated.
        """
        if all(map(str.isspace, tokens)):
            return []
        return [token for token in tokens if not token.isspace() or self._src.encode([token]) not in ([UNK], [])]

    def _limit(self, ids: list[int]) -> int:
        return self._max_length or -(-len(ids) // LENGTH_STEP) * LENGTH_STEP

    def _as_text(self, hypothesis: Hypothesis, unknown: list[str]) -> Translation:
        """A hypothesis as text, for a source with these unknown words."""
        tokens = self._trg.decode(index for index in hypothesis.ids if index not in (PAD, SOS))
        if self._replace_unknown:
            tokens = with_source_words(tokens, unknown)
        tokens = [token for token in tokens if not token.isspace()]
        if self._detokeniser is None:
            text = one_line(" ".join(tokens))
        else:
            text = one_line(self._detokeniser(capitalised(tokens) if self._info.case == "lower" else tokens))
        return Translation(tokens, text, hypothesis.score)

    def _joined(self, found: list[list[Translation]]) -> list[Translation]:
        """The translations of a line, from those of its sentences: the best ones together, then the second ones."""
        if len(found) == 1:
            return found[0]
        if not found:
            return [EMPTY] * self._n_best
        return [
            Translation(
                [token for part in parts for token in part.tokens],
                " ".join(part.text for part in parts if part.text),
                sum(part.score for part in parts) / len(parts),
            )
            for parts in zip(*found, strict=True)
        ]


def with_source_words(tokens: list[str], unknown: list[str]) -> list[str]:
    """Puts the source's unknown words in the place of `<unk>`, by their order, if there are as many of them.

    Otherwise nobody knows which word belongs where, and each `<unk>` stays.

    Args:
        tokens: of a translation.
        unknown: the source's unknown words, in its own case.

    >>> with_source_words(["a", "<unk>", "barks"], ["Dackel"])
    ['a', 'Dackel', 'barks']
    >>> with_source_words(["a", "<unk>", "barks"], ["Dackel", "7"])
    ['a', '<unk>', 'barks']
    """
    if tokens.count(UNKNOWN) != len(unknown):
        return tokens
    words = iter(unknown)
    return [next(words) if token == UNKNOWN else token for token in tokens]


def capitalised(tokens: list[str]) -> list[str]:
    """The tokens of a sentence, the first letter raised. A `<unk>` in front stays as it is.

    >>> capitalised(['"', "ein", "hund"])
    ['"', 'Ein', 'hund']
    >>> capitalised(["3", "hunde"]), capitalised(["<unk>", "hund"])
    (['3', 'hunde'], ['<unk>', 'hund'])
    """
    for place, token in enumerate(tokens):
        if token == UNKNOWN:
            break
        at = next((at for at, character in enumerate(token) if character.isalnum()), None)
        if at is not None:
            raised = token[at].title()
            if len(raised) == 1:  # "ß" has no capital that begins a word
                return [*tokens[:place], token[:at] + raised + token[at + 1 :], *tokens[place + 1 :]]
            break
    return tokens


def one_line(text: str) -> str:
    r"""The text with a space for each run of white space, so that nothing in it ends a line or a field.

    >>> one_line("EE.\u2028UU. \t hoy")
    'EE. UU. hoy'
    """
    return " ".join(text.split())
