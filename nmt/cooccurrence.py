"""Vectors of words that translate each other, from how often they occur in the same training pairs.

Words that occur in the same pairs get similar vectors, within a language and across the two. A model's embeddings start
from them. Sources:

- Levy, Søgaard and Goldberg 2017, "A Strong Baseline for Learning Cross-Lingual Word Embeddings from Sentence
  Alignments", arXiv 1608.05426: vectors of both languages from the sentences that words occur in, and nothing else.
- Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization": factors of the positive pointwise
  mutual information.
- Pantel and Lin 2002, "Discovering Word Senses from Text": the discount.
- Halko, Martinsson and Tropp 2011, arXiv 0909.4061: the randomised decomposition.

For a source word f and a target word e, where n(f, e) of the n pairs have both:

    M[f, e] = max(0, log(n n(f, e) / (n(f) n(e)))) * n(f, e) / (n(f, e) + 1) * m / (m + 1),   m = min(n(f), n(e))
    M      ~= U S V'          # the largest singular values, as many as an embedding has features
    source  = rows of U S^½,  target = rows of V S^½, each of length 1
"""

import warnings

from nmt.text.vocabulary import SPECIALS

import torch
from torch import Tensor, nn

MAX_PAIRS = 100_000  # of a larger corpus so many are read, spread over it
MAX_COUNTS = 1 << 24  # if their pairs of words are more than this, fewer are read: it bounds the memory

# ids [tokens] int32 and offsets [sentences + 1] int64: sentence i is ids[offsets[i]:offsets[i + 1]]
Sentences = tuple[Tensor, Tensor]


def embeddings(src: Sentences, trg: Sentences, src_types: int, trg_types: int, dim: int) -> tuple[Tensor, Tensor]:
    """The words' vectors. The decomposition draws from PyTorch's random generator.

    Args:
        src, trg: the training pairs, as ids and offsets.
        src_types, trg_types: sizes of the vocabularies.
        dim: the most features of a vector.

    Returns:
        [source types, features] and [target types, features], rows of length 1, or zeros for a word that goes with
        none. A vocabulary smaller than `dim` gives as many features as it has words.
    """
    matrix = association(src, trg, src_types, trg_types)
    features = min(dim, src_types, trg_types)
    left, values, right = torch.svd_lowrank(matrix, q=features, niter=2)

    def vectors(side: int, factor: Tensor) -> Tensor:
        associated = matrix.indices()[side].bincount(minlength=len(factor)) > 0
        unit = nn.functional.normalize(factor * values.sqrt(), dim=1)
        return torch.where(associated.unsqueeze(1), unit, 0)

    return vectors(0, left), vectors(1, right)


def association(src: Sentences, trg: Sentences, src_types: int, trg_types: int) -> Tensor:
    """[source types, target types], sparse float32: M of the formula above."""
    indices = pairs_to_count(src, trg)
    of_src = occurrences(src, indices, src_types)
    of_trg = occurrences(trg, indices, trg_types)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        both = torch.sparse.mm(of_src, of_trg.t()).coalesce()
    (rows, columns), together = both.indices(), both.values()
    in_src = of_src.indices()[0].bincount(minlength=src_types)[rows].float()
    in_trg = of_trg.indices()[0].bincount(minlength=trg_types)[columns].float()
    rarer = torch.minimum(in_src, in_trg)
    information = (len(indices) * together / (in_src * in_trg)).log()
    information *= together / (together + 1) * rarer / (rarer + 1)
    places = both.indices()[:, information > 0]
    values = information[information > 0]
    return torch.sparse_coo_tensor(places, values, both.shape, is_coalesced=True, check_invariants=True)


def pairs_to_count(src: Sentences, trg: Sentences, most: int | None = None) -> Tensor:
    """[at most `MAX_PAIRS`] int64: the indices of the pairs that are read, in ascending order.

    Together they have at most `most` pairs of tokens. None: `MAX_COUNTS`.
    """
    most = MAX_COUNTS if most is None else most
    pairs = len(src[1]) - 1
    taken = min(pairs, MAX_PAIRS)
    indices = torch.arange(taken) * pairs // taken
    word_pairs = lengths_of(src, indices) * lengths_of(trg, indices)
    shuffled = torch.randperm(taken, generator=torch.Generator().manual_seed(0))
    shuffled = shuffled[word_pairs[shuffled] <= most]  # otherwise no pair after the first too long one fits
    fitting = word_pairs[shuffled].cumsum(0) <= most
    return indices[shuffled[fitting].sort().values]


def occurrences(sentences: Sentences, indices: Tensor, types: int) -> Tensor:
    """[types, indices], sparse float32: 1 where a word occurs in a sentence. The special ids occur nowhere."""
    ids, offsets = sentences
    lengths = lengths_of(sentences, indices)
    starts = offsets[indices] - lengths.cumsum(0) + lengths
    ids = ids[starts.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))].long()
    columns = torch.arange(len(indices)).repeat_interleave(lengths)
    words = ids >= len(SPECIALS)
    places = torch.stack((ids[words], columns[words]))
    ones = torch.ones(places.shape[1])
    found = torch.sparse_coo_tensor(places, ones, (types, len(indices)), check_invariants=True).coalesce()
    found.values().fill_(1)  # however often it occurs there
    return found


def lengths_of(sentences: Sentences, indices: Tensor) -> Tensor:
    """[indices] int64: numbers of tokens."""
    _, offsets = sentences
    return offsets[indices + 1] - offsets[indices]
