"""Decoding: greedy, and beam search with several hypotheses a sentence. All sentences of a batch are decoded at once.

Both know three calls of a model and nothing else of it:

    memory, hidden = model.start(src, src_len[, words])       # what decoding keeps of the source; the first state
    logits, hidden = model.step(prev_token, hidden, memory)   # [rows, vocabulary], [rows, hid dim]
    memory = memory.select(rows)                              # the sentences that go on

A sentence may have several rows, which stand together. Memory has one row for each sentence.
"""

import math
from typing import NamedTuple, Protocol, TypeVar

from nmt import kernels

import torch
from torch import Tensor

GROUP = 16  # words of a group, see `survey`
FEWEST_GROUPS = 32  # with fewer, sorting all is quicker
BLOCK = 1 << 17  # logits that are looked at together
SAFE = 60.0  # float32 holds the sums of exponentials of such logits, with all digits
PART = 16  # a sentence stays until so small a part of the batch, or a larger one, has ended
LOWEST = torch.finfo(torch.float32).min
OwnMemory = TypeVar("OwnMemory", bound="Memory")  # a model's own class of memory


class Memory(Protocol):
    """Decoding keeps this of the source sentences."""

    def select(self: OwnMemory, rows: Tensor) -> OwnMemory:
        """The memory of these sentences: [selected] int64 row numbers."""


class Translator(Protocol[OwnMemory]):
    """A model that can be decoded, in evaluation mode."""

    def start(self, src: Tensor, src_len: Tensor, words: Tensor | None = None) -> tuple[OwnMemory, Tensor]:
        """The memory and the first hidden state, [batch, hid dim], of src [src len, batch] with lengths [batch].

        Only a search that has `words`, [words] int64 ids, gives them: then logits are those of these words alone.
        """

    def step(self, prev_token: Tensor, hidden: Tensor, memory: OwnMemory) -> tuple[Tensor, Tensor]:
        """The logits, [rows, words], and the next hidden state for [rows] ids and hidden [rows, hid dim]."""


class Hypotheses(NamedTuple):
    """Translations of a batch, each sentence's best one first.

    Attributes:
        ids: [max len, batch, n best] token ids. From a hypothesis's end on, `<eos>`.
        scores: [batch, n best] float32.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def greedy(
    model: Translator[OwnMemory],
    src: Tensor,
    src_len: Tensor,
    sos_index: int,
    eos_index: int,
    max_len: int = 50,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """Translates a batch. Each step takes the most probable token.

    Sentences that have ended are dropped, see `rows_to_keep`.

    Args:
        model: in evaluation mode.
        src: [src len, batch] token ids.
        src_len: [batch] lengths of the sources.
        sos_index: id of `<sos>`.
        eos_index: id of `<eos>`.
        max_len: most tokens a translation has.
        words: [words] int64 ids, the only ones that a translation may have. `eos_index` is one of them. None: all.

    Returns:
        [max len, batch] token ids. From a sentence's end on, `<eos>`.
    """
    return _greedy(model, src, src_len, sos_index, eos_index, max_len, words, with_scores=False)[0]


def _greedy(
    model: Translator[OwnMemory],
    src: Tensor,
    src_len: Tensor,
    sos_index: int,
    eos_index: int,
    max_len: int,
    words: Tensor | None,
    *,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`greedy`, and [batch] the log probabilities in float64, if they are wanted, and the lengths, `<eos>` counted."""
    memory, hidden = model.start(src, src_len) if words is None else model.start(src, src_len, words)
    translations = src.new_full((max_len, len(hidden)), eos_index)
    log_probs = torch.zeros(len(hidden), dtype=torch.float64, device=src.device)
    lengths = torch.zeros_like(log_probs)
    # From here on of the sentences that are not dropped, [kept, ...]:
    columns = torch.arange(len(hidden), device=src.device)
    prev_token = src.new_full((len(hidden),), sos_index)
    ended = torch.zeros_like(columns, dtype=torch.bool)
    for step in range(max_len):
        logits, hidden = model.step(prev_token, hidden, memory)  # [kept, words], [kept, hid dim]
        maxima, log_sums = survey(logits, with_sums=with_scores)
        best, choices = top(logits.unsqueeze(1), maxima, None, 1)  # [kept, 1]
        if log_sums is not None:
            log_probs[columns] += (best[:, 0] - log_sums).double().masked_fill(ended, 0.0)
            lengths[columns] += ~ended
        tokens = choices[:, 0] if words is None else words[choices[:, 0]]
        prev_token = tokens.masked_fill(ended, eos_index)  # [kept]
        translations[step, columns] = prev_token
        ended = prev_token == eos_index
        rows = rows_to_keep(ended)
        if len(rows) == 0:
            break
        if len(rows) < len(columns):
            state = (columns, prev_token, ended, hidden)
            columns, prev_token, ended, hidden = (part.index_select(0, rows) for part in state)
            memory = memory.select(rows)
    return translations, log_probs, lengths


@torch.no_grad()
def beam_search(
    model: Translator[OwnMemory],
    src: Tensor,
    src_len: Tensor,
    sos_index: int,
    eos_index: int,
    *,
    beam_size: int,
    max_len: int = 50,
    length_penalty: float = 1.0,
    n_best: int = 1,
    words: Tensor | None = None,
) -> Hypotheses:
    """Translates a batch. Follows the `beam_size` most probable beginnings of each sentence.

    A sentence is done when that many of its hypotheses have ended. What has not ended after `max_len` tokens ends
    there. A beam of 1 is `greedy`.

    A hypothesis that ends is taken out of the beam and kept. The beam is one narrower from then on. Source: Sutskever,
    Vinyals and Le 2014, "Sequence to Sequence Learning with Neural Networks", arXiv 1409.3215. Hypotheses of different
    lengths are compared as in Wu et al. 2016, arXiv 1609.08144, equation 14, but by a plain power of the length:

        score = log P(hypothesis | source) / length ** length_penalty

    The length counts the hypothesis's `<eos>`, as its probability does.

    A long sum of log probabilities has fewer digits left than the logits that greedy decoding compares. So it is held
    in two parts. One is common to a sentence's hypotheses, the other is 0 for the leading one. Only the second is
    compared.

    Args:
        model: in evaluation mode.
        src: [src len, batch] token ids.
        src_len: [batch] lengths of the sources.
        sos_index: id of `<sos>`.
        eos_index: id of `<eos>`.
        beam_size: number of hypotheses a sentence, at most the number of words.
        max_len: most tokens a hypothesis has.
        length_penalty: 0 compares probabilities, which favours short translations. 1 compares their means over the
            tokens.
        n_best: how many hypotheses are wanted, at most `beam_size`.
        words: as in `greedy`. They have all of the probability.

    Raises:
        ValueError: there are fewer words than hypotheses in the beam, or fewer of these than are wanted.
    """
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"expected 1 <= n_best ({n_best}) <= beam_size ({beam_size})")
    if beam_size == 1:
        ids, log_p, lengths = _greedy(model, src, src_len, sos_index, eos_index, max_len, words, with_scores=True)
        return Hypotheses(ids.unsqueeze(2), (log_p / lengths**length_penalty).float().unsqueeze(1))
    memory, hidden = model.start(src, src_len) if words is None else model.start(src, src_len, words)
    batch = len(hidden)
    # One place more than can end: what goes on is written there, so that no shape depends on what ends.
    ended_ids = src.new_full((batch, beam_size + 1, max_len), eos_index)
    ended_scores = hidden.new_full((batch, beam_size + 1), -math.inf, dtype=torch.float32)

    # From here on of the sentences that are not done, [kept, ...], and of their hypotheses, [kept * beam, ...]:
    columns = torch.arange(batch, device=src.device)
    ids = ended_ids[:, :beam_size].clone()  # [kept, beam, max len]
    ended = torch.zeros_like(columns)  # how many hypotheses have ended
    common = hidden.new_zeros(batch, 1, dtype=torch.float32)  # [kept, 1], the common part of the log probabilities
    log_probs = ended_scores[:, :beam_size].clone()  # [kept, beam], the other part, -inf of empty places
    log_probs[:, 0] = 0.0  # all begin alike: one is enough
    prev_token = src.new_full((batch * beam_size,), sos_index)
    hidden = hidden.repeat_interleave(beam_size, 0)
    places = torch.arange(beam_size, device=src.device)
    for step in range(max_len):
        logits, hidden = model.step(prev_token, hidden, memory)
        vocabulary = logits.shape[1]
        if beam_size > vocabulary:
            raise ValueError(f"expected beam_size ({beam_size}) <= vocabulary ({vocabulary})")
        logits = logits.float()  # [kept * beam, vocabulary]
        maxima, log_sums = survey(logits)
        assert log_sums is not None
        log_probs = log_probs - log_sums.view(-1, beam_size)
        leading = log_probs.amax(1, keepdim=True).clamp(min=LOWEST)  # if all have ended: -inf less -inf would be nan
        common = common + leading
        # [kept, beam] each, the best first
        log_probs, choices = top(logits.view(-1, beam_size, vocabulary), maxima, log_probs - leading, beam_size)
        parents, tokens = choices // vocabulary, choices % vocabulary
        if words is not None:
            tokens = words[tokens]

        chosen = places < (beam_size - ended).unsqueeze(1)  # the beam is narrower by those that have ended
        ends = chosen & ((tokens == eos_index) if step < max_len - 1 else True)
        ids = ids.gather(1, parents.unsqueeze(2).expand_as(ids))
        ids[:, :, step] = tokens
        slot = torch.where(ends, ended.unsqueeze(1) + ends.cumsum(1) - 1, beam_size)  # [kept, beam]
        ended_ids[columns.unsqueeze(1), slot] = ids
        ended_scores[columns.unsqueeze(1), slot] = (common + log_probs) / (step + 1) ** length_penalty

        ended = ended + ends.sum(1)
        log_probs = log_probs.masked_fill(ends | ~chosen, -math.inf)
        parents = parents + beam_size * torch.arange(len(parents), device=src.device).unsqueeze(1)
        prev_token = tokens.flatten()
        rows = rows_to_keep(ended == beam_size)
        if len(rows) == 0:
            break
        if len(rows) < len(columns):
            state = (columns, ids, ended, common, log_probs, parents, tokens)
            columns, ids, ended, common, log_probs, parents, tokens = (part.index_select(0, rows) for part in state)
            memory = memory.select(rows)
            prev_token = tokens.flatten()
        hidden = hidden.index_select(0, parents.flatten())
    scores, order = ended_scores[:, :beam_size].topk(n_best)  # [batch, n best] each
    return Hypotheses(ended_ids.gather(1, order.unsqueeze(2).expand(-1, -1, max_len)).permute(2, 0, 1), scores)


def survey(logits: Tensor, *, with_sums: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """What a search needs to know of all logits.

    To sort the logits takes longer than to compute them. So on a CPU the words are cut into groups for `top`. Group g
    has the words g, g + groups, g + 2 * groups, and so on, `GROUP` of them. Fewer than that are left over at the end.

    Args:
        logits: [rows, words].
        with_sums: whether log sum exp is wanted.

    Returns:
        [rows, groups] the largest logit of each group, or None where sorting is quicker.
        [rows] log sum exp of each row, or None.
    """
    groups = logits.shape[1] // GROUP
    if groups < FEWEST_GROUPS or not kernels.computes_steps(logits.device):
        return None, logits.logsumexp(1) if with_sums else None
    if not with_sums:
        return logits[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1), None
    maxima, log_sums = logits.new_empty(len(logits), groups), logits.new_empty(len(logits))
    size = max(1, BLOCK // logits.shape[1])  # of blocks that stay in the processor's cache
    work = torch.empty_like(logits[:size])
    for first in range(0, len(logits), size):
        rows = slice(first, first + size)
        block, block_maxima = logits[rows], maxima[rows]
        torch.amax(block[:, : groups * GROUP].unflatten(1, (GROUP, groups)), 1, out=block_maxima)
        largest = torch.maximum(block_maxima.amax(1, keepdim=True), block[:, -GROUP:].amax(1, keepdim=True))
        if bool((largest.abs() < SAFE).all()):  # one pass less
            log_sums[rows] = torch.exp(block, out=work[: len(block)]).sum(1).log_()
        else:
            exponentials = torch.sub(block, largest, out=work[: len(block)]).exp_()
            log_sums[rows] = exponentials.sum(1).log_().add_(largest[:, 0])
    return maxima, log_sums


def top(logits: Tensor, maxima: Tensor | None, offsets: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The largest sums of a logit and its row's offset, for each sentence over all its rows.

    They are in the groups with the largest maxima. Only the logits of those groups are compared, and what is left over.

    Args:
        logits: [sentences, rows of one, words].
        maxima: [sentences * rows of one, groups] from `survey`, or None.
        offsets: [sentences, rows of one], or None for zeros.
        count: how many are wanted, at most the number of words.

    Returns:
        [sentences, count] the sums, the largest first, and [sentences, count] int64 their places in a sentence's
        logits.
    """
    sentences, rows, words = logits.shape
    flat = logits.flatten(1)
    if maxima is None or maxima.shape[1] < count:
        return (flat if offsets is None else (logits + offsets.unsqueeze(2)).flatten(1)).topk(count)
    groups = maxima.shape[1]
    maxima = maxima.view(sentences, rows, groups)
    if offsets is not None:
        maxima = maxima + offsets.unsqueeze(2)
    if count == 1:
        chosen = maxima.flatten(1).max(1, keepdim=True).indices
    else:
        chosen = maxima.flatten(1).topk(count, sorted=False).indices  # [sentences, count]
    row_starts = words * torch.arange(rows, device=logits.device).unsqueeze(1)
    firsts = chosen if rows == 1 else chosen // groups * words + chosen % groups
    inside = groups * torch.arange(GROUP, device=logits.device)
    left_over = (row_starts + torch.arange(groups * GROUP, words, device=logits.device)).flatten()
    places = torch.cat(((firsts.unsqueeze(2) + inside).flatten(1), left_over.expand(sentences, -1)), dim=1)
    candidates = flat.gather(1, places)
    if offsets is not None:
        candidates = candidates + offsets.gather(1, places // words)
    best, order = candidates.topk(count)
    return best, places.gather(1, order)


def rows_to_keep(ended: Tensor) -> Tensor:
    """The sentences that decoding goes on with: those that have not ended.

    On a CPU some others may stay for a while, because each copy of the memory costs as much as a step. Where few
    distinct shapes are wanted, so many others stay that the batch is only ever halved.

    Args:
        ended: [kept] bool. Waits for the device.

    Returns:
        [at most kept] int64 row numbers, those that go on first. None if all have ended.
    """
    going, kept = len(ended) - int(ended.sum()), len(ended)
    if going == 0:
        return ended.new_empty(0, dtype=torch.int64)
    if kernels.computes_steps(ended.device):
        kept = going if kept - going >= max(1, kept // PART) else kept
    while kept // 2 >= going:
        kept //= 2
    return ended.int().argsort(stable=True)[:kept]
