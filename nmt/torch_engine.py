"""The engine that computes with PyTorch."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from nmt import devices, kernels, search
from nmt import shortlist as shortlists
from nmt.checkpoint import Checkpoint
from nmt.engine import Hypothesis, ModelInfo
from nmt.errors import UserError
from nmt.text.vocabulary import EOS, PAD, SOS

import torch
from torch import Tensor

# A batch has at most so much of each, or one sentence. That bounds the memory.
BATCH_SENTENCES = 256
BATCH_ROWS = 512  # hypotheses
BATCH_LOGITS = 1 << 22  # hypotheses times words
BATCH_TOKENS = 1 << 14  # source tokens, padding counted
BATCH_IDS = 1 << 20  # hypotheses times the most tokens of a translation


def info_of(saved: Checkpoint) -> ModelInfo:
    """What a checkpoint of this program says. The original's have no vocabulary, and translate nothing."""
    assert saved.src_vocab is not None and saved.trg_vocab is not None
    models = saved.src_subwords, saved.trg_subwords
    return ModelInfo(
        src_lang=saved.about["src_lang"],
        trg_lang=saved.about["trg_lang"],
        src_words=saved.src_vocab,
        trg_words=saved.trg_vocab,
        case=saved.flags.get("case", "lower"),
        sizes=saved.sizes,
        flags=saved.flags,
        scores=saved.scores,
        about=saved.about
        | {"completed": saved.completed, "parameters": sum(tensor.numel() for tensor in saved.state_dict.values())},
        subwords=None if models[0] is None or models[1] is None else (models[0], models[1]),
    )


def choose_dtype(precision: str) -> torch.dtype:
    """What to translate in on a CPU.

    Args:
        precision: "float32", "bfloat16", or "auto" for bfloat16 where the processor multiplies faster in it. It costs
            less than a tenth of a BLEU (docs/results.md).
    """
    if precision == "auto":
        precision = "bfloat16" if devices.cpu_gains_from_bfloat16() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def shortlist_of(saved: Checkpoint, size: int | None, where: str) -> Tensor | None:
    """The probable translations that a checkpoint has of each source word, for `TorchEngine`.

    Args:
        saved: the checkpoint.
        size: how many of each word are wanted. None or 0: no shortlist.
        where: its path, for errors.

    Returns:
        [source types, size] int32, or None for no shortlist.

    Raises:
        UserError: checkpoint, it has none. Or usage, it has fewer.
    """
    if not size:
        return None
    if saved.shortlist is None:
        todo = "leave --shortlist out, or train again: train_8p.py keeps the probable translations with the model"
        raise UserError("checkpoint", "holds no shortlist, as an earlier version wrote it", where, todo)
    width = saved.shortlist.shape[1]
    if size > width:
        what = f"the model has {width} probable translations of each word"
        raise UserError("usage", what, f"--shortlist {size}", f"give at most {width}, or 0 for the whole vocabulary")
    return saved.shortlist[:, :size].contiguous()


Own = TypeVar("Own", bound="Model")


class Model(Protocol):
    """What the engine needs of a model. `gru.Seq2Seq` has it."""

    def decoding(self) -> search.Translator[Any]:
        """The calls of decoding, see `nmt.search`."""

    def modules(self) -> Iterator[Any]:
        """Its parts, as PyTorch's modules have it."""

    def to(self: Own, dtype: torch.dtype) -> Own:
        """The model itself, with its weights in this type."""


class TorchEngine:
    """See `nmt.engine.Engine`. It is made for the CPU.

    Args:
        model: in evaluation mode. It belongs to the engine from now on.
        info: of the model.
        dtype: to compute in. `choose_dtype` knows what suits the processor.
        shortlist: from `shortlist_of`. A translation has the words of the shortlist alone. None: all words.
        scores: whether anyone reads the scores. Greedy decoding does not need them, and without them they are nan.
    """

    def __init__(
        self,
        model: Model,
        info: ModelInfo,
        *,
        dtype: torch.dtype = torch.float32,
        shortlist: Tensor | None = None,
        scores: bool = True,
    ):
        self.info = info
        model = model.to(dtype)
        kernels.freeze(model.modules())
        self._decoding, self._shortlist, self._scores = model.decoding(), shortlist, scores
        devices.keep_freed_memory()

    def translate(
        self, sentences: list[list[int]], *, beam_size: int, length_penalty: float, max_length: int, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        """See `nmt.engine.Engine.translate`."""
        results: list[list[Hypothesis]] = [[] for _ in sentences]
        lengths = [len(sentence) for sentence in sentences]
        most_rows = min(BATCH_ROWS, BATCH_LOGITS // len(self.info.trg_words), BATCH_IDS // max_length)
        for places in batches(lengths, min(BATCH_SENTENCES, most_rows // beam_size)):
            src = torch.full((lengths[places[-1]], len(places)), PAD)
            for column, place in enumerate(places):
                src[: lengths[place], column] = torch.tensor(sentences[place])
            words = None
            if self._shortlist is not None:
                frequent = max(shortlists.FREQUENT, beam_size)  # a beam has no more hypotheses than words
                words = shortlists.words_of(src, self._shortlist, len(self.info.trg_words), frequent)
            sources = src, torch.tensor([lengths[place] for place in places])
            if beam_size == 1 and not self._scores:
                ids = search.greedy(self._decoding, *sources, SOS, EOS, max_length, words=words).unsqueeze(2)
                scores = torch.full((len(places), 1), math.nan)
            else:
                ids, scores = search.beam_search(
                    self._decoding,
                    *sources,
                    SOS,
                    EOS,
                    beam_size=beam_size,
                    max_len=max_length,
                    length_penalty=length_penalty,
                    n_best=n_best,
                    words=words,
                )
            for place, found, found_scores in zip(places, ids.permute(1, 2, 0).tolist(), scores.tolist(), strict=True):
                results[place] = [
                    Hypothesis(tokens[: tokens.index(EOS)] if EOS in tokens else tokens, score)
                    for tokens, score in zip(found, found_scores, strict=True)
                ]
        return results


def batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Which sentences are translated together: those of like length, the short ones first.

    Args:
        lengths: of the sources, in tokens.
        most: sentences of a batch.

    Yields:
        Numbers of sentences, the longest last. At least one, and with its padding at most `BATCH_TOKENS` otherwise.

    >>> list(batches([9, 3, 5], 2))
    [[1, 2], [0]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) >= most or (len(batch) + 1) * lengths[place] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
