"""Which target words a translation may need: the probable translations of each source word.

The output layer over the whole vocabulary is two thirds of what a translation costs. A shortlist of a batch is the
union of its source words' most probable translations, of the most frequent target words and of the special ids. The
output layer is computed for these words alone. A word that is not in it cannot be said, so the shortlist is no exact
method. Source: Jean et al. 2015, "On Using Very Large Target Vocabulary for Neural Machine Translation", arXiv
1412.2007, section 3.3.

The probabilities are those of IBM model 1 (Brown et al. 1993, "The Mathematics of Statistical Machine Translation"),
found by expectation and maximisation over the training pairs. With t(e|f) for the probability that the source word f
is translated by the target word e, a round is:

    share(f, e) in a pair = t(e|f) / sum over the f' of the pair's source of t(e|f')
    t(e|f)                = sum of share(f, e) over all pairs / sum of that over all e
"""

from nmt.cooccurrence import Sentences, lengths_of, pairs_to_count
from nmt.text.vocabulary import SPECIALS, UNK

import torch
from torch import Tensor

WIDTH = 16  # translations of a source word that are kept
FREQUENT = 1024  # target words that each shortlist has
ROUNDS = 3  # of expectation and maximisation
MAX_LINKS = 1 << 22  # of a larger corpus fewer pairs are read: it bounds the memory, which is about 60 bytes a link
STEP = 256  # the number of words is a multiple of it: oneDNN compiles a kernel for each number that it has not met


def build(src: Sentences, trg: Sentences, src_types: int, trg_types: int, width: int = WIDTH) -> Tensor:
    """The most probable translations of each source word.

    Args:
        src, trg: the training pairs, as ids and offsets.
        src_types, trg_types: sizes of the vocabularies.
        width: how many are kept.

    Returns:
        [source types, width] int32 target ids, the most probable first. Where there are fewer, `<unk>` follows.
    """
    links, together = count_links(src, trg, trg_types)
    found = torch.full((src_types, width), UNK, dtype=torch.int32)
    if len(together) == 0:
        return found
    words, link = links.unique(return_inverse=True)  # the pairs of words; and of each link the place of its pair there
    of_source = words // trg_types
    probability = torch.ones(len(words))
    for _ in range(ROUNDS):
        share = probability[link]
        explained = torch.zeros(int(together[-1]) + 1).index_add_(0, together, share)  # of each target token
        share /= explained[together]
        expected = torch.zeros(len(words)).index_add_(0, link, share)
        probability = expected / torch.zeros(src_types).index_add_(0, of_source, expected)[of_source]
    # The most probable of each source word: sorted by probability, then stably by source word.
    order = probability.argsort(descending=True, stable=True)
    order = order[of_source[order].argsort(stable=True)]
    sources = of_source[order]
    firsts = torch.zeros(src_types + 1, dtype=torch.int64)
    firsts[1:] = sources.bincount(minlength=src_types).cumsum(0)
    rank = torch.arange(len(order)) - firsts[sources]
    kept = rank < width
    found[sources[kept], rank[kept]] = (words[order[kept]] % trg_types).int()
    return found


def count_links(src: Sentences, trg: Sentences, trg_types: int) -> tuple[Tensor, Tensor]:
    """All links of a source token and a target token of the same pair.

    Args:
        src, trg, trg_types: as in `build`.

    Returns:
        [links] int64 each: source id * target types + target id, and the number of the target token, in ascending
        order. The special ids are no words.
    """
    taken = pairs_to_count(src, trg, MAX_LINKS)
    src_lengths, trg_lengths = lengths_of(src, taken), lengths_of(trg, taken)
    # One row for each target token, then one for each of them and each source token of its pair.
    starts = trg[1][taken] - trg_lengths.cumsum(0) + trg_lengths
    tokens = torch.arange(int(trg_lengths.sum()))
    pair = torch.arange(len(taken)).repeat_interleave(trg_lengths)
    target = trg[0][tokens + starts[pair]].long()
    counts = src_lengths[pair]
    token = tokens.repeat_interleave(counts)
    place = torch.arange(len(token)) - (counts.cumsum(0) - counts)[token]
    source = src[0][src[1][taken][pair][token] + place].long()
    words = (source >= len(SPECIALS)) & (target[token] >= len(SPECIALS))
    links, token = source[words] * trg_types + target[token[words]], token[words]
    return links, token


def words_of(src: Tensor, table: Tensor, trg_types: int, frequent: int = FREQUENT) -> Tensor:
    """The shortlist of a batch.

    Args:
        src: token ids of the sources, of any shape.
        table: [source types, any width] from `build`.
        trg_types: size of the target vocabulary, whose words stand by their frequency behind the special ids.
        frequent: how many of the most frequent words are taken.

    Returns:
        [words] int64 target ids, ascending, the special ids first. Further frequent words fill it up to a multiple
        of `STEP`, or to all words.
    """
    wanted = torch.zeros(trg_types, dtype=torch.bool)
    wanted[: len(SPECIALS) + frequent] = True
    wanted[table[src.unique()].flatten().long()] = True
    spare = -int(wanted.sum()) % STEP
    wanted[(~wanted).nonzero()[:spare].flatten()] = True
    return wanted.nonzero().flatten()
