"""The engine that computes with PyTorch."""

from typing import Any, Protocol

from nmt import search, shortlist
from nmt.checkpoint import Checkpoint
from nmt.engine import Hypothesis, ModelInfo
from nmt.text.vocabulary import EOS, PAD, SOS

import torch

BATCH_ROWS = 256  # hypotheses of a batch


def info_of(saved: Checkpoint) -> ModelInfo:
    """What a checkpoint of this program says. The original's have no vocabulary, and translate nothing."""
    assert saved.src_vocab is not None and saved.trg_vocab is not None
    return ModelInfo(
        src_lang=saved.about["src_lang"],
        trg_lang=saved.about["trg_lang"],
        src_words=saved.src_vocab,
        trg_words=saved.trg_vocab,
        case=saved.flags.get("case", "lower"),
        sizes=saved.sizes,
        flags=saved.flags,
        scores=saved.scores,
        about=saved.about,
    )


class Model(Protocol):
    """What the engine needs of a model: `gru.Seq2Seq` has it."""

    def eval(self) -> Any: ...


class TorchEngine:
    """See `nmt.engine.Engine`.

    Args:
        model: in evaluation mode.
        info: of the model.
    """

    def __init__(self, model: search.Translator, info: ModelInfo, table=None, size=0):
        self.info = info
        self._model, self._table, self._size = model, table, size

    def translate(
        self, sentences: list[list[int]], *, beam_size: int, length_penalty: float, max_length: int, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        """See `nmt.engine.Engine.translate`."""
        order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
        results: list[list[Hypothesis]] = [[] for _ in sentences]
        size = max(1, BATCH_ROWS // beam_size)
        for first in range(0, len(order), size):
            places = order[first : first + size]
            longest = max(len(sentences[place]) for place in places)
            src = torch.full((longest, len(places)), PAD)
            for column, place in enumerate(places):
                src[: len(sentences[place]), column] = torch.tensor(sentences[place])
            src_len = torch.tensor([len(sentences[place]) for place in places])
            words = None
            if self._table is not None:
                words = shortlist.words_of(src, self._table, len(self.info.trg_words), self._size)
            found = search.beam_search(
                self._model,
                src,
                src_len,
                SOS,
                EOS,
                beam_size=beam_size,
                max_len=max_length,
                length_penalty=length_penalty,
                n_best=n_best,
                words=words,
            )
            for column, place in enumerate(places):
                for rank in range(n_best):
                    ids = found.ids[:, column, rank].tolist()
                    tokens = ids[: ids.index(EOS)] if EOS in ids else ids
                    results[place].append(Hypothesis(tokens, float(found.scores[column, rank])))
        return results
