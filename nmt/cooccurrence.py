"""Embeddings that know from the start which words translate each other: from the training pairs' counts of words.

Words that occur in the same pairs get similar vectors, within a language and across the two. Sources: Levy, Søgaard and
Goldberg 2017, "A Strong Baseline for Learning Cross-Lingual Word Embeddings from Sentence Alignments", arXiv 1608.05426
(vectors of both languages from nothing but which sentences words occur in); Levy and Goldberg 2014, "Neural Word
Embedding as Implicit Matrix Factorization" (factors of the positive pointwise mutual information); Pantel and Lin 2002,
"Discovering Word Senses from Text" (the discount); Halko, Martinsson and Tropp 2011, arXiv 0909.4061 (the randomised
decomposition).

For a source word f and a target word e, with n(f, e) of the n pairs having both:

    M[f, e] = max(0, log(n n(f, e) / (n(f) n(e)))) * n(f, e) / (n(f, e) + 1) * m / (m + 1),   m = min(n(f), n(e))
    M      ~= U S V'          # the largest singular values, as many as an embedding has features
    source  = rows of U S^½,  target = rows of V S^½, each of the length that a drawn embedding has
"""

import math
import warnings

import data
import gru

import torch
from torch import Tensor, nn

MAX_PAIRS = 100_000  # of a larger corpus so many are read, spread over it
MAX_COUNTS = 1 << 24  # of these fewer, if they have more than so many pairs of words: it bounds the memory


def pairs_to_count(split: data.Split) -> Tensor:
    """[at most `MAX_PAIRS`] int64: the indices of the pairs that are read, in ascending order."""
    taken = min(len(split), MAX_PAIRS)
    indices = torch.arange(taken) * len(split) // taken
    word_pairs = split.src.lengths_of(indices) * split.trg.lengths_of(indices)
    shuffled = torch.randperm(taken, generator=torch.Generator().manual_seed(0))
    shuffled = shuffled[word_pairs[shuffled] <= MAX_COUNTS]  # else the first that is too long would be the last
    fitting = word_pairs[shuffled].cumsum(0) <= MAX_COUNTS
    return indices[shuffled[fitting].sort().values]


def occurrences(side: data.Side, indices: Tensor, types: int) -> Tensor:
    """[types, indices], sparse float32: 1 where a word occurs in a sentence; the special words occur nowhere."""
    lengths = side.lengths_of(indices)
    starts = side.offsets[indices] - lengths.cumsum(0) + lengths
    ids = side.ids[starts.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))].long()
    sentences = torch.arange(len(indices)).repeat_interleave(lengths)
    words = ids >= len(data.SPECIALS)
    places = torch.stack((ids[words], sentences[words]))
    ones = torch.ones(places.shape[1])
    found = torch.sparse_coo_tensor(places, ones, (types, len(indices)), check_invariants=True).coalesce()
    found.values().fill_(1)  # however often it occurs there
    return found


def association(split: data.Split, src_types: int, trg_types: int) -> Tensor:
    """[source types, target types], sparse float32: M of the formula above."""
    indices = pairs_to_count(split)
    src = occurrences(split.src, indices, src_types)
    trg = occurrences(split.trg, indices, trg_types)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        both = torch.sparse.mm(src, trg.t()).coalesce()
    (rows, columns), together = both.indices(), both.values()
    in_src, in_trg = src.indices()[0].bincount(minlength=src_types), trg.indices()[0].bincount(minlength=trg_types)
    in_src, in_trg = in_src[rows].float(), in_trg[columns].float()
    rarer = torch.minimum(in_src, in_trg)
    information = (len(indices) * together / (in_src * in_trg)).log()
    information *= together / (together + 1) * rarer / (rarer + 1)
    places = both.indices()[:, information > 0]
    values = information[information > 0]
    return torch.sparse_coo_tensor(places, values, both.shape, is_coalesced=True, check_invariants=True)


def embeddings(split: data.Split, src_types: int, trg_types: int, dim: int) -> tuple[Tensor, Tensor]:
    """The words' vectors. The decomposition draws from PyTorch's random generator.

    Args:
        split: the training pairs.
        src_types, trg_types: sizes of the vocabularies.
        dim: the most features of a vector.

    Returns:
        [source types, features] and [target types, features], rows of length 1; zeros for a word that goes with none.
        A vocabulary smaller than `dim` gives as many features as it has words.
    """
    matrix = association(split, src_types, trg_types)
    features = min(dim, src_types, trg_types)
    left, values, right = torch.svd_lowrank(matrix, q=features, niter=2)
    found = []
    for side, factor in enumerate((left, right)):
        associated = matrix.indices()[side].bincount(minlength=len(factor)) > 0
        unit = nn.functional.normalize(factor * values.sqrt(), dim=1)
        found.append(torch.where(associated.unsqueeze(1), unit, 0))
    return tuple(found)


@torch.no_grad()
def start_with(model: gru.Seq2Seq, split: data.Split) -> None:
    """Puts such vectors in the place of drawn ones, in both embeddings and, projected at random, in the output layer:
    there a word's weights for the hidden state and for the context begin similar to those of similar words.

    What drew the weights decides their scale, which is kept; a word without a vector keeps its row.

    Args:
        model: on the CPU, its weights drawn.
        split: the training pairs.
    """
    tables = [model.encoder.embedding.weight, model.decoder.embedding.weight]
    vectors = embeddings(split, *map(len, tables), tables[0].shape[1])
    with_vector = [rows.any(dim=1) for rows in vectors]
    for table, rows, known in zip(tables, vectors, with_vector, strict=True):
        features = rows.shape[1]
        table[known, :features] = rows[known] * table.std() * math.sqrt(features)
    rows, known = vectors[1], with_vector[1]
    weight, hid_dim = model.decoder.fc_out.weight, model.decoder.rnn.hidden_size
    for block in weight[:, -2 * hid_dim :].split(hid_dim, dim=1):  # of the hidden state, of the context
        projected = (rows @ nn.init.orthogonal_(torch.empty(rows.shape[1], hid_dim)))[known]
        if projected.numel() > 1 and projected.std() > 0:  # else they have no scale
            block[known] = projected * (block.std() / projected.std())
