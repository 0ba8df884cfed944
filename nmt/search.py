"""Beam search: several hypotheses a sentence, all sentences of a batch at once.

Source: Sutskever, Vinyals and Le 2014, "Sequence to Sequence Learning with Neural Networks", arXiv 1409.3215, where a
hypothesis that ends is taken out of the beam and kept; here the beam is one narrower from then on. Hypotheses of
different lengths are compared as in Wu et al. 2016, arXiv 1609.08144, equation 14, but by a plain power of the length:

    score = log P(hypothesis | source) / length ** length_penalty

A hypothesis's length counts its `<eos>`, as its probability does.

A long sum of log probabilities has fewer digits left than the logits, which greedy decoding compares. So it is held in
two parts, one that a sentence's hypotheses have in common and one that is 0 for the leading one, and only the second is
compared.
"""

import math
from typing import NamedTuple

import gru

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = torch.finfo(torch.float32).min


class Hypotheses(NamedTuple):
    """Translations of a batch, each sentence's best one first.

    Attributes:
        ids: [max len, batch, n best] token ids; from a hypothesis's end on, `<eos>`.
        scores: [batch, n best] float32.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    model: gru.Seq2Seq,
    src: Tensor,
    src_len: Tensor,
    sos_index: int,
    eos_index: int,
    *,
    beam_size: int,
    max_len: int = 50,
    length_penalty: float = 1.0,
    n_best: int = 1,
) -> Hypotheses:
    """Translates a batch, following the `beam_size` most probable beginnings of each sentence.

    A sentence is done when so many of its hypotheses have ended; what has not ended after `max_len` tokens ends there.
    With a beam of 1 this is `Seq2Seq.greedy`, but where two words have exactly the same score.

    Args:
        model: in evaluation mode.
        src: [src len, batch] token ids.
        src_len: [batch] lengths of the sources.
        sos_index: id of `<sos>`.
        eos_index: id of `<eos>`.
        beam_size: number of hypotheses a sentence; at most the target vocabulary's size.
        max_len: most tokens a hypothesis has.
        length_penalty: 0 compares probabilities, which favours short translations; 1 their means over the tokens.
        n_best: how many hypotheses are wanted, at most `beam_size`.

    Raises:
        ValueError: the vocabulary is smaller than the beam, or the beam than what is wanted.
    """
    decoder = model.decoder
    vocabulary = decoder.fc_out.out_features
    if not 1 <= n_best <= beam_size <= vocabulary:
        raise ValueError(f"expected 1 <= n_best ({n_best}) <= beam_size ({beam_size}) <= vocabulary ({vocabulary})")
    context = model.encoder(src, src_len)[0]  # [batch, hid dim]
    batch = len(context)
    # One place more than can end: what goes on is written there, so that no shape depends on what ends.
    ended_ids = src.new_full((batch, beam_size + 1, max_len), eos_index)
    ended_scores = context.new_full((batch, beam_size + 1), -math.inf, dtype=torch.float32)

    # Of the sentences that are not done, here and below [kept, ...]; of each hypothesis [kept * beam, ...].
    columns = torch.arange(batch, device=src.device)
    ids = ended_ids[:, :beam_size].clone()  # [kept, beam, max len]
    ended = torch.zeros_like(columns)  # how many hypotheses have
    common = context.new_zeros(batch, 1, dtype=torch.float32)  # [kept, 1], what the log probabilities have in common
    log_probs = ended_scores[:, :beam_size].clone()  # [kept, beam], without that; of places that nothing is in, -inf
    log_probs[:, 0] = 0.0  # all begin alike: one is enough
    prev_token = src.new_full((batch * beam_size,), sos_index)
    hidden = context.repeat_interleave(beam_size, 0)
    context_gates, context_logits = decoder.rnn.context_gates(batch, context), decoder.context_logits(context)
    places = torch.arange(beam_size, device=src.device)
    for step in range(max_len):
        features, hidden = decoder.decode_rows(
            prev_token, [len(hidden)], hidden, context_gates.repeat_interleave(beam_size, 0)
        )
        logits = F.linear(features, decoder.fc_out.weight[:, : features.shape[1]]).view(-1, beam_size, vocabulary)
        logits = (logits + context_logits.unsqueeze(1)).float()  # [kept, beam, vocabulary]
        log_probs = log_probs - logits.logsumexp(2)
        leading = log_probs.amax(1, keepdim=True).clamp(min=LOWEST)  # -inf, where all have ended, less -inf is nan
        common = common + leading
        candidates = (logits + (log_probs - leading).unsqueeze(2)).flatten(1)
        log_probs, choices = candidates.topk(beam_size)  # [kept, beam] each, the best first
        parents, tokens = choices // vocabulary, choices % vocabulary

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
        hidden, prev_token = hidden.index_select(0, parents.flatten()), tokens.flatten()
        rows = gru.rows_to_keep(ended == beam_size)
        if len(rows) == 0:
            break
        if len(rows) < len(columns):
            state = (columns, ids, ended, common, log_probs, context_gates, context_logits)
            columns, ids, ended, common, log_probs, context_gates, context_logits = (
                part.index_select(0, rows) for part in state
            )
            hidden = hidden.view(len(parents), beam_size, -1).index_select(0, rows).flatten(0, 1)
            prev_token = prev_token.view(len(parents), beam_size).index_select(0, rows).flatten()
    scores, order = ended_scores[:, :beam_size].topk(n_best)  # [batch, n best] each
    return Hypotheses(ended_ids.gather(1, order.unsqueeze(2).expand(-1, -1, max_len)).permute(2, 0, 1), scores)
