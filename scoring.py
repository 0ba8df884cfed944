"""How good a model is: its translations, their BLEU and chrF, and the loss on pairs that it has not seen."""

import math
from dataclasses import dataclass

import data
import gru
from nmt import kernels
from nmt.devices import World
from nmt.search import beam_search, greedy

import sacrebleu
import torch

MAX_LENGTH = 50  # most tokens of a translation, as in the original
BATCH_SIZE = 256


@dataclass(frozen=True)
class Scores:
    """Corpus scores of tokenised, lower-cased translations, 0 to 100.

    Attributes:
        bleu: `torchtext.data.metrics.bleu_score`, the metric of the published figure.
        sacrebleu, chrf: sacreBLEU's BLEU and chrF of the same tokens, joined by spaces.
        sacrebleu_signature, chrf_signature: how sacreBLEU was asked to count.
    """

    bleu: float
    sacrebleu: float
    sacrebleu_signature: str
    chrf: float
    chrf_signature: str


def evaluate(translations: list[list[str]], references: list[list[str]]) -> Scores:
    """Scores translations against one reference each.

    Args:
        translations: tokens of each sentence.
        references: as many, in the same order.

    >>> round(evaluate([["a", "dog", "runs", "fast"]], [["a", "dog", "runs", "fast"]]).bleu, 6)
    100.0
    """
    from torchtext.data.metrics import bleu_score  # slow to import, and a performance run does not need it

    texts = [" ".join(tokens) for tokens in translations], [[" ".join(tokens) for tokens in references]]
    found = []
    for metric in (sacrebleu.BLEU(tokenize="none", force=True), sacrebleu.CHRF()):  # force: tokenised on purpose
        found += [metric.corpus_score(*texts).score, str(metric.get_signature())]
    return Scores(100 * bleu_score(translations, [[reference] for reference in references]), *found)


def batches(order: torch.Tensor, world: World, batch_size: int) -> list[torch.Tensor]:
    """This rank's share of the sentences `order`, [n], in batches; none where there are more ranks than sentences."""
    share = data.rank_share(order, world.rank, world.size)
    return list(share.split(max(1, batch_size))) if len(share) else []


def translate(
    model: gru.Seq2Seq,
    src: data.Side,
    vocab: data.Vocabulary,
    world: World,
    *,
    beam_size: int = 1,
    length_penalty: float = 1.0,
) -> list[list[str]]:
    """Translations, shared out over the ranks.

    Args:
        model: the fp32 model, in evaluation mode, on the rank's device.
        src: the source sentences.
        vocab: the target vocabulary.
        world: the ranks; every rank calls this.
        beam_size, length_penalty: as in `beam_search`; a beam of 1 is greedy.

    Returns:
        The tokens of each sentence, those of white space dropped, in the order of `src`, on every rank.
    """
    by_length = torch.argsort(src.lengths, stable=True)
    ids = torch.zeros(len(src.lengths), MAX_LENGTH, dtype=torch.int64)
    length_step = 1 if kernels.computes_steps(world.device) else data.LENGTH_STEP
    for indices in batches(by_length, world, BATCH_SIZE // beam_size):
        tokens, lengths = data.pad(src, indices, length_step=length_step)  # [src len, batch], [batch]
        tokens, lengths = tokens.to(world.device), lengths.to(world.device)
        if beam_size == 1:
            found = greedy(model, tokens, lengths, data.SOS, data.EOS, MAX_LENGTH)
        else:
            options = {"beam_size": beam_size, "max_len": MAX_LENGTH, "length_penalty": length_penalty}
            found = beam_search(model, tokens, lengths, data.SOS, data.EOS, **options).ids[:, :, 0]
        ids[indices] = found.T.cpu()
    # Each rank has filled its own rows and left the others 0, so their sum is the whole.
    ids = world.sum(ids.to(world.device)).cpu()
    return [data.spaceless(vocab.decode(row)) for row in ids.tolist()]


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
    for indices in batches(by_length, world, BATCH_SIZE):
        batch = loader(indices)
        loss_sum = criterion(batch, teacher_forcing_ratio)
        totals += torch.stack((loss_sum, loss_sum.new_full((), batch.target_tokens)))
    loss_sum, count = world.sum(totals).tolist()
    return loss_sum / count


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that says nothing any more.

    >>> round(perplexity(math.log(20.5)), 6), perplexity(100.0)
    (20.5, inf)
    """
    return math.exp(loss) if loss < 50 else math.inf
