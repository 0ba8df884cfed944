"""What `translate.py` asks of a model, whichever library computes it. Needs no PyTorch."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


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
        src_lang, trg_lang: spaCy's codes of the languages.
        src_words, trg_words: the vocabularies, by id.
        case: "lower" or "keep": whether its text was lower-cased.
        sizes: input_dim, output_dim, emb_dim, hid_dim.
        flags: the run's flags, recipe resolved.
        scores: the validation figures of the epoch that was kept.
        about: fingerprints and versions, the number of parameters, and whether the run was completed.
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
