"""How good a model is: its translations, their BLEU, and the loss on pairs that it has not seen."""

from dataclasses import dataclass

import sacrebleu
import torch

import data
import gru
from devices import World

MAX_LENGTH = 50  # most tokens of a translation, as in the original
BATCH_SIZE = 256


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU of tokenised, lower-cased translations, 0 to 100.

    Attributes:
        torchtext: `torchtext.data.metrics.bleu_score`, the metric of the published figure.
        sacrebleu: sacreBLEU of the same tokens.
        signature: how sacreBLEU was asked to count.
    """

    torchtext: float
    sacrebleu: float
    signature: str


def bleu(translations: list[list[str]], references: list[list[str]]) -> Bleu:
    """Scores translations against one reference each.

    Args:
        translations: tokens of each sentence.
        references: as many, in the same order.

    >>> round(bleu([["a", "dog", "runs", "fast"]], [["a", "dog", "runs", "fast"]]).torchtext, 6)
    100.0
    """
    from torchtext.data.metrics import bleu_score  # slow to import, and a performance run does not need it

    metric = sacrebleu.BLEU(tokenize="none", force=True)  # force: it is tokenised on purpose, no warning
    joined = metric.corpus_score([" ".join(t) for t in translations], [[" ".join(r) for r in references]])
    own = bleu_score(translations, [[reference] for reference in references])
    return Bleu(100 * own, joined.score, str(metric.get_signature()))


def batches(order: torch.Tensor, world: World) -> list[torch.Tensor]:
    """This rank's share of the sentences `order`, [n], in batches; none where there are more ranks than sentences."""
    share = data.rank_share(order, world.rank, world.size)
    return list(share.split(BATCH_SIZE)) if len(share) else []


def translate(model: gru.Seq2Seq, src: data.Side, vocab: data.Vocabulary, world: World) -> list[list[str]]:
    """Greedy translations, shared out over the ranks.

    Args:
        model: the fp32 model, in evaluation mode, on the rank's device.
        src: the source sentences.
        vocab: the target vocabulary.
        world: the ranks; every rank calls this.

    Returns:
        The tokens of each sentence, those of white space dropped, in the order of `src`, on every rank.
    """
    by_length = torch.argsort(src.lengths, stable=True)
    ids = torch.zeros(len(src.lengths), MAX_LENGTH, dtype=torch.int64)
    length_step = 1 if world.device.type == "cpu" else data.LENGTH_STEP
    for indices in batches(by_length, world):
        tokens, lengths = data.pad(src, indices, length_step=length_step)  # [src len, batch], [batch]
        tokens, lengths = tokens.to(world.device), lengths.to(world.device)
        ids[indices] = model.greedy(tokens, lengths, data.SOS, data.EOS, MAX_LENGTH).T.cpu()
    # Each rank has filled its own rows and left the others 0, so their sum is the whole.
    ids = world.sum(ids.to(world.device)).cpu()
    return [[token for token in vocab.decode(row) if not token.isspace()] for row in ids.tolist()]


@torch.no_grad()
def mean_loss(
    model: gru.Seq2Seq, split: data.Split, world: World, *, teacher_forcing_ratio: float, fixed_length: int = 0
) -> float:
    """Cross entropy per target position over a whole split, without smoothing; its exponential is the perplexity.

    Args:
        model: the fp32 model, in evaluation mode, on the rank's device.
        split: the pairs.
        world: the ranks; every rank calls this.
        teacher_forcing_ratio: 1 reads the reference; 0 reads the model's own argmax ("free-running").
        fixed_length: as in training.
    """
    criterion = gru.TrainingLoss(model)
    loader = data.Loader(split, world.device, fixed_length=fixed_length)
    totals = torch.zeros(2, device=world.device)  # sum of the losses, number of positions
    by_length = torch.argsort(split.trg.lengths, stable=True)
    for indices in batches(by_length, world):
        batch = loader(indices)
        loss_sum = criterion(batch, teacher_forcing_ratio)
        totals += torch.stack((loss_sum, loss_sum.new_full((), batch.count)))
    loss_sum, count = world.sum(totals).tolist()
    return loss_sum / count
