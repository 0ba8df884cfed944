"""What `translate.py` asks of a model, whichever library computes it. Needs no PyTorch."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nmt.text import subwords
from nmt.text.vocabulary import Vocabulary


class Hypothesis(NamedTuple):
    """One translation of a sentence.

    Attributes:
        ids: token ids, without `<sos>` and `<eos>`.
        score: log P / length ** length penalty, where the length counts `<eos>`.
    """

    ids: list[int]
    score: float


@dataclass(frozen=True)
class ModelInfo:
    """What a trained model says about itself.

    Attributes:
        src_lang, trg_lang: codes of the languages, for the tokenizer "spacy" those of spaCy.
        src_words, trg_words: the vocabularies, by id: words or pieces.
        case: "lower" or "keep": whether its text was lower-cased.
        sizes: input_dim, output_dim, emb_dim, hid_dim.
        flags: the run's flags, recipe resolved.
        scores: the validation figures of the epoch that was kept.
        about: fingerprints and versions, the number of parameters, and whether the run was completed.
        subwords: sentencepiece's models of the pieces of both languages, or None for whole words.
    """

    src_lang: str
    trg_lang: str
    src_words: list[str]
    trg_words: list[str]
    case: str
    sizes: dict[str, int]
    flags: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    subwords: tuple[bytes, bytes] | None = None

    @property
    def tokenizer(self) -> str:
        """What splits the model's text into words, one of `nmt.flags.TOKENIZERS`."""
        return self.flags.get("tokenizer", "spacy")

    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """What turns words into ids, and back.

        Raises:
            ValueError: the pieces do not go with their models.
            UserError: usage, sentencepiece is not installed.
        """
        src_model, trg_model = self.subwords or (None, None)
        return subwords.of(self.src_words, src_model), subwords.of(self.trg_words, trg_model)


class Engine(Protocol):
    """A model, ready to translate."""

    info: ModelInfo

    def translate(
        self, sentences: list[list[int]], *, beam_size: int, length_penalty: float, max_length: int, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        """Translates sentences of any number and length. It makes the batches itself.

        Args:
            sentences: source ids, each with `<sos>` and `<eos>`.
            beam_size: 1 decodes greedily.
            length_penalty: as in `nmt.search.beam_search`.
            max_length: most tokens of a translation.
            n_best: hypotheses of a sentence, at most `beam_size`.

        Returns:
            For each sentence `n_best` hypotheses, the best first.
        """
