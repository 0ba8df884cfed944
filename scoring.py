"""How good a model is: its translations, their BLEU and chrF, and its losses on pairs that it has not seen."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import gru
from nmt import kernels
from nmt.checkpoint import Checkpoint
from nmt.distributed import World
from nmt.errors import UserError, printable
from nmt.search import beam_search, greedy

import sacrebleu
import torch
from sacrebleu.significance import PairedTest

MAX_LENGTH = 50  # most tokens of a translation of short sentences, as in the original
BATCH_SIZE = 256
SIGNIFICANT = 0.05  # two translations differ if chance alone gives such a difference less often


# ---------------------------------------------------------------- scores of translations


@dataclass(frozen=True)
class Scores:
    """Corpus scores of tokenised translations, 0 to 100. They count letters as they are, so `lowered` comes first.

    Attributes:
        bleu: `torchtext.data.metrics.bleu_score`, the metric of the published figure.
        sacrebleu: sacreBLEU's BLEU of the same tokens.
        chrf: its chrF of the tokens joined by spaces. It does not count white space.
        sacrebleu_signature, chrf_signature: how sacreBLEU was asked to count.
    """

    bleu: float
    sacrebleu: float
    sacrebleu_signature: str
    chrf: float
    chrf_signature: str

    def figures(self, prefix: str = "") -> dict[str, float]:
        """The scores by name, for the record of a run."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("bleu", "sacrebleu", "chrf")}

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.4f}  sacreBLEU {self.sacrebleu:.4f}  chrF {self.chrf:.4f}"


def evaluate(translations: list[list[str]], references: list[list[str]]) -> Scores:
    """Scores translations against one reference each.

    A token may hold any characters. Both BLEUs would split it at its spaces, so they get a number for each token. For
    tokens without white space that changes no figure.

    Args:
        translations: tokens of each sentence.
        references: as many, in the same order.

    >>> round(evaluate([["los", "ee. uu.", "hoy", "."]], [["los", "ee. uu.", "hoy", "."]]).bleu, 6)
    100.0
    """
    from torchtext.data.metrics import bleu_score  # slow to import, and a performance run does not need it

    numbers: dict[str, str] = {}

    def numbered(sentences: list[list[str]]) -> list[list[str]]:
        return [[numbers.setdefault(token, str(len(numbers))) for token in tokens] for tokens in sentences]

    def joined(sentences: list[list[str]]) -> list[str]:
        return [" ".join(tokens) for tokens in sentences]

    plain, plain_references = numbered(translations), numbered(references)
    bleu, chrf = sacrebleu.BLEU(tokenize="none", force=True), sacrebleu.CHRF()  # force: tokenised on purpose
    return Scores(
        bleu=100 * bleu_score(plain, [[reference] for reference in plain_references]),
        sacrebleu=bleu.corpus_score(joined(plain), [joined(plain_references)]).score,
        sacrebleu_signature=str(bleu.get_signature()),
        chrf=chrf.corpus_score(joined(translations), [joined(references)]).score,
        chrf_signature=str(chrf.get_signature()),
    )


def evaluate_in(case: str, translations: list[list[str]], references: list[list[str]]) -> tuple[Scores, Scores | None]:
    """The scores of lower-cased tokens. And those of the tokens as they are, if the model keeps case, otherwise None.

    Args:
        case: of the model's words, as in `data.load`.
        translations, references: as in `evaluate`.
    """
    if case == "lower":
        return evaluate(translations, references), None
    return evaluate(lowered(translations), lowered(references)), evaluate(translations, references)


def lowered(sentences: list[list[str]]) -> list[list[str]]:
    """The tokens in lower case.

    >>> lowered([["Ein", "Hund"]])
    [['ein', 'hund']]
    """
    return [[token.lower() for token in tokens] for tokens in sentences]


# ---------------------------------------------------------------- how long a translation may be


def longest_translation(split: data.Split, max_length: int | None) -> int:
    """Most tokens of a translation of this split.

    Args:
        split: the pairs.
        max_length: the user's limit. None: `MAX_LENGTH`, or the length of the longest source or reference above that.
    """
    if max_length is not None:
        return max_length
    longest = max(int(side.lengths.max()) for side in (split.src, split.trg))
    return max(MAX_LENGTH, longest - 2)  # without `<sos>` and `<eos>`


def note_on_length(split: data.Split, max_length: int | None, name: str) -> Iterator[str]:
    """The line of the log about references that are too long, if there are any.

    Args:
        split, max_length: as in `longest_translation`.
        name: the split's, for the line.
    """
    usual = MAX_LENGTH if max_length is None else max_length
    longer = int((split.trg.lengths - 2 > usual).sum())
    if longer:
        limit = longest_translation(split, max_length)
        how = f"translations may have {limit}" if max_length is None else "their translations end there"
        yield f"note: {longer} of {len(split)} {name} references have more than {usual} tokens: {how}"


# ---------------------------------------------------------------- what a model gives


def batches(order: torch.Tensor, world: World, batch_size: int) -> list[torch.Tensor]:
    """This rank's share of the sentences `order`, [n], in batches. With more ranks than sentences it may be empty."""
    share = data.rank_share(order, world.rank, world.size)
    return list(share.split(max(1, batch_size))) if len(share) else []


def translate(
    model: gru.Seq2Seq,
    src: data.Side,
    vocab: data.Vocabulary,
    world: World,
    *,
    max_length: int = MAX_LENGTH,
    beam_size: int = 1,
    length_penalty: float = 1.0,
    pause: Callable[[], object] = lambda: None,
) -> list[list[str]]:
    """Translates sentences, shared out over the ranks.

    Args:
        model: the fp32 model, in evaluation mode, on the rank's device.
        src: the source sentences.
        vocab: the target vocabulary.
        world: the ranks. Every rank calls this.
        max_length: most tokens of a translation.
        beam_size, length_penalty: as in `beam_search`. A beam of 1 is greedy.
        pause: as in `validate`.

    Returns:
        The tokens of each sentence without those of white space, in the order of `src`, on every rank.
    """
    by_length = torch.argsort(src.lengths, stable=True)
    ids = torch.zeros(len(src.lengths), max_length, dtype=torch.int64)
    length_step = 1 if kernels.computes_steps(world.device) else data.LENGTH_STEP
    for indices in batches(by_length, world, BATCH_SIZE // beam_size):
        pause()
        tokens, lengths = data.pad(src, indices, length_step=length_step)  # [src len, batch], [batch]
        tokens, lengths = tokens.to(world.device), lengths.to(world.device)
        if beam_size == 1:
            found = greedy(model, tokens, lengths, data.SOS, data.EOS, max_length)
        else:
            hypotheses = beam_search(
                model,
                tokens,
                lengths,
                data.SOS,
                data.EOS,
                beam_size=beam_size,
                max_len=max_length,
                length_penalty=length_penalty,
            )
            found = hypotheses.ids[:, :, 0]
        ids[indices] = found.T.cpu()
    # Each rank has filled its own rows and left the others 0, so their sum is the whole.
    ids = world.sum(ids.to(world.device)).cpu()
    return [data.spaceless(vocab.decode(row)) for row in ids.tolist()]


@dataclass(frozen=True)
class Losses:
    """Cross entropies per target token, without smoothing.

    Attributes:
        forced: each step reads the reference. Its exponential is the perplexity.
        free_running: each step reads the model's own most probable token, as the original's validation did.
    """

    forced: float
    free_running: float

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.forced) and math.isfinite(self.free_running)

    @property
    def figures(self) -> dict[str, float]:
        """The losses and their perplexities by name, for the record of a run."""
        return {
            "loss": self.forced,
            "perplexity": perplexity(self.forced),
            "free_running_loss": self.free_running,
            "free_running_perplexity": perplexity(self.free_running),
        }


@torch.no_grad()
def losses(model: gru.Seq2Seq, loader: data.Loader, world: World, pause: Callable[[], object] = lambda: None) -> Losses:
    """The losses over a whole split, shared out over the ranks.

    Args:
        model: the fp32 model, in evaluation mode, on the rank's device.
        loader: makes the batches of the split. Its `fixed_length` counts as in training.
        world: the ranks. Every rank calls this.
        pause: as in `validate`.
    """
    criterion = gru.TrainingLoss(model)
    totals = torch.zeros(3, device=world.device)  # the losses, forced and free-running, and the target tokens
    by_length = torch.argsort(loader.split.trg.lengths, stable=True)
    for indices in batches(by_length, world, BATCH_SIZE):
        pause()
        batch = loader(indices)
        sums = [criterion(batch, teacher_forcing_ratio) for teacher_forcing_ratio in (1.0, 0.0)]
        totals += torch.stack((*sums, sums[0].new_full((), batch.target_tokens)))
    forced, free_running, target_tokens = world.sum(totals).tolist()
    return Losses(forced / target_tokens, free_running / target_tokens)


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that says nothing any more.

    >>> round(perplexity(math.log(20.5)), 6), perplexity(100.0)
    (20.5, inf)
    """
    return math.exp(loss) if loss < 50 else math.inf


# ---------------------------------------------------------------- the validation pairs after an epoch


@dataclass(frozen=True)
class Validation:
    """What a model does with the validation pairs, decoded greedily.

    Attributes:
        losses: over all pairs.
        bleu: on rank 0, if the losses are finite, otherwise nan. It is of lower-cased tokens.
        examples: source, reference and translation of two pairs, each in one line. They are there with `bleu`.
        cased_bleu: the same of the tokens as they are, for a model that keeps case.
    """

    losses: Losses
    bleu: float = math.nan
    examples: Sequence[tuple[str, str, str]] = ()
    cased_bleu: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The figures by name, for the record of a run."""
        figures = self.losses.figures | {"bleu": self.bleu}
        return figures if self.cased_bleu is None else figures | {"cased_bleu": self.cased_bleu}

    def lines(self, epoch: int, epochs: int, train_loss: float, rate: float) -> Iterator[str]:
        """The lines of the log, for rank 0.

        Args:
            epoch: the epoch that has ended, from 0. The log counts from 1.
            epochs: of the run.
            train_loss: its mean training loss.
            rate: its last learning rate.
        """
        forced, free_running = self.losses.forced, self.losses.free_running
        yield (
            f"validation: epoch {epoch + 1}/{epochs}  train loss {train_loss:.4f}  "
            f"loss {forced:.4f} (perplexity {perplexity(forced):.2f})  "
            f"free-running loss {free_running:.4f} (perplexity {perplexity(free_running):.2f})  "
            f"greedy BLEU {self.bleu:.4f}  learning rate {rate:.2e}"
        )
        if self.cased_bleu is not None:
            yield f"cased greedy BLEU {self.cased_bleu:.4f}"
        for source, reference, translation in self.examples:
            yield printable(f"  source     {source}")
            yield printable(f"  reference  {reference}")
            yield printable(f"  model      {translation}")


def validate(
    model: gru.Seq2Seq,
    loader: data.Loader,
    vocab: data.Vocabulary,
    world: World,
    max_length: int | None = None,
    pause: Callable[[], object] = lambda: None,
    case: str = "lower",
) -> Validation:
    """Scores a model on the pairs of a loader.

    Args:
        model: the fp32 model, on the rank's device. It is put into evaluation mode.
        loader: of the validation pairs.
        vocab: the target vocabulary.
        world: the ranks. Every rank calls this.
        max_length: as in `longest_translation`.
        pause: is called before each batch. It may raise to end the work.
        case: of the model's words, as in `data.load`.
    """
    model.eval()
    split = loader.split
    found = losses(model, loader, world, pause)
    if not found.are_finite:
        return Validation(found)  # such a model translates nothing
    limit = longest_translation(split, max_length)
    translations = translate(model, split.src, vocab, world, max_length=limit, pause=pause)
    if not world.is_main:
        return Validation(found)
    references = split.references
    assert split.src_tokens is not None  # only train's are not kept
    examples = [
        (" ".join(split.src_tokens[index]), " ".join(references[index]), " ".join(translations[index]))
        for index in (0, len(split) // 2)
    ]
    scores, cased = evaluate_in(case, translations, references)
    return Validation(found, scores.bleu, examples, None if cased is None else cased.bleu)


# ---------------------------------------------------------------- a checkpoint on the test set


def restore(saved: Checkpoint, where: str | Path) -> gru.Seq2Seq:
    """The model of a checkpoint, on the CPU and in evaluation mode.

    Args:
        saved: the checkpoint.
        where: its path, for errors.

    Raises:
        UserError: checkpoint, the weights are not those of a model of this kind.
    """
    try:
        return gru.restore(saved.state_dict, saved.sizes or gru.sizes_of(saved.state_dict))
    except ValueError as error:
        todo = "use the file as train_8p.py or the original wrote it, and with the gru.py that it was trained with"
        raise UserError("checkpoint", f"holds no state dict of this model: {error}", str(where), todo) from error


def vocabularies(
    saved: Checkpoint, model: gru.Seq2Seq, corpus: data.Corpus | data.Words, where: str | Path
) -> tuple[data.Vocabulary, data.Vocabulary]:
    """The vocabularies that go with a checkpoint: its own, or the data's where it has none and they fit.

    Args:
        saved: the checkpoint.
        model: from `restore`.
        corpus: the data to score on. A model without vocabularies needs all of it.
        where: the checkpoint's path, for errors.

    Raises:
        UserError: checkpoint, they do not fit.
    """
    if saved.src_vocab is None or saved.trg_vocab is None:
        assert isinstance(corpus, data.Corpus)
        sizes = [model.encoder.embedding.num_embeddings, model.decoder.embedding.num_embeddings]
        there = [len(corpus.src_vocab), len(corpus.trg_vocab)]
        if sizes != there:
            raise UserError(
                "checkpoint",
                f"it has no vocabulary and was trained with {sizes} types, this data has {there}",
                str(where),
                "give the data that it was trained on with --data-dir; ids shift between versions of spaCy",
            )
        return corpus.src_vocab, corpus.trg_vocab
    languages = [saved.about["src_lang"], saved.about["trg_lang"]]
    if languages != [corpus.src_lang, corpus.trg_lang]:
        raise UserError(
            "checkpoint",
            f"it translates {languages[0]} to {languages[1]}, the data is {corpus.src_lang} and {corpus.trg_lang}",
            str(where),
            f"give --src-lang {languages[0]} --trg-lang {languages[1]} and such data",
        )
    return saved.vocabularies(where)


def in_vocabularies(
    split: data.Split, own: tuple[data.Vocabulary, data.Vocabulary], wanted: tuple[data.Vocabulary, data.Vocabulary]
) -> data.Split:
    """`split`, whose ids are of the vocabularies `own`, in ids of the vocabularies `wanted`."""
    if [(vocab.itos, vocab.model) for vocab in own] == [(vocab.itos, vocab.model) for vocab in wanted]:
        return split
    assert split.src_tokens is not None and split.trg_tokens is not None
    return data.Split.encode(split.src_tokens, split.trg_tokens, *wanted)


def report(
    model: gru.Seq2Seq,
    test: data.Split,
    trg_vocab: data.Vocabulary,
    world: World,
    *,
    name: str,
    fixed_length: int,
    max_length: int | None,
    beam_size: int,
    length_penalty: float,
    case: str = "lower",
) -> Generator[str, None, dict[str, Any]]:
    """Scores a model on the test set. Each line of the log comes as soon as its figures are known.

    Args:
        model: in evaluation mode, on the device of `world`.
        test: the pairs, in ids of the model's vocabularies.
        trg_vocab: the model's target vocabulary.
        world: one process.
        name: the model's, for the log.
        fixed_length: for the losses alone, see `data.Loader`.
        max_length: as in `longest_translation`.
        beam_size, length_penalty: of the final score. Greedy decoding is scored beside it.
        case: of the model's words, as in `data.load`. With "keep" there are cased scores beside those of lower case.

    Returns:
        The figures by name, for the record of a run.
    """
    if beam_size > len(trg_vocab):
        yield f"note: the beam is {len(trg_vocab)} wide, not {beam_size}: the target language has no more types"
        beam_size = len(trg_vocab)
    where = f"{world.device_type} {world.index} ({world.describe()})"
    yield f"scored: {name} on {len(test)} test pairs, in float32, on {where}"
    yield f"losses: {f'padded or cut to {fixed_length} tokens' if fixed_length else 'without padding'}"
    found = losses(model, data.Loader(test, world.device, fixed_length=fixed_length), world)
    yield f"test loss {found.forced:.4f} (perplexity {perplexity(found.forced):.2f})"
    yield f"test free-running loss {found.free_running:.4f} (perplexity {perplexity(found.free_running):.2f})"
    if beam_size > 1:
        yield f"length penalty of the beam: {length_penalty:g}"
    yield from note_on_length(test, max_length, "test")
    references, limit = test.references, longest_translation(test, max_length)
    figures: dict[str, Any] = found.figures | {"beam_size": beam_size}
    for size in sorted({1, beam_size}):
        translations = translate(
            model, test.src, trg_vocab, world, max_length=limit, beam_size=size, length_penalty=length_penalty
        )
        scores, cased = evaluate_in(case, translations, references)
        decoding = "greedy" if size == 1 else f"beam of {size}"
        figures |= scores.figures("greedy_" if size == 1 else "beam_")
        if size < beam_size:
            yield f"{decoding}: {scores}"
            if cased is not None:
                yield f"{decoding}, cased: {cased}"
    figures |= scores.figures() | {"signature": scores.sacrebleu_signature}
    yield f"final scores: {decoding}"
    yield "note: BLEU score is torchtext's, to compare with the ModelZoo. A paper quotes sacreBLEU with its signature."
    yield "note: all scores are of tokens in lower case. sacreBLEU of plain text is another figure."
    if cased is not None:
        yield f"cased chrF = {cased.chrf:.4f} ({cased.chrf_signature})"
        yield f"cased sacreBLEU = {cased.sacrebleu:.4f} ({cased.sacrebleu_signature})"
        yield f"cased BLEU = {cased.bleu:.4f}"
    yield f"chrF = {scores.chrf:.4f} ({scores.chrf_signature})"
    yield f"sacreBLEU = {scores.sacrebleu:.4f} ({scores.sacrebleu_signature})"
    yield f"BLEU score = {scores.bleu:.4f}"
    return figures | (cased.figures("cased_") if cased is not None else {})


# ---------------------------------------------------------------- text, as people read it


def text_lines(texts: list[str], reference: list[str]) -> Iterator[str]:
    """The scores of translated text, a line each, with sacreBLEU's signatures. Its command line gives the same ones.

    Args:
        texts: the translations.
        reference: as many lines, in the same order.
    """
    for lowercase in (False, True):
        for metric in (sacrebleu.BLEU(lowercase=lowercase), sacrebleu.CHRF(lowercase=lowercase)):
            score = metric.corpus_score(texts, [reference]).score
            name = "sacreBLEU" if isinstance(metric, sacrebleu.BLEU) else "chrF"
            yield f"{name} = {score:.4f} ({metric.get_signature()})"


def comparison_lines(systems: Sequence[tuple[str, list[str]]], reference: list[str]) -> Iterator[str]:
    """Whether translations are better than the first ones by more than chance: sacreBLEU's paired bootstrap.

    Capital letters do not count, because a model may have none.

    Args:
        systems: a name and its translations, at least two.
        reference: as many lines, in the same order.
    """
    metrics = {"BLEU": sacrebleu.BLEU(lowercase=True), "chrF": sacrebleu.CHRF(lowercase=True)}
    signatures, results = PairedTest(list(systems), metrics, [reference], test_type="bs")()
    for metric, signature in signatures.items():
        for place, (name, _) in enumerate(systems):
            found: Any = results[metric][place]
            line = f"{metric} {name}: {found.score:.4f} (mean {found.mean:.4f} ± {found.ci:.4f})"
            if place:
                # Where nothing varies, sacreBLEU's p is the smallest that there is.
                first: Any = results[metric][0]
                same = len(reference) == 1 or (found.mean, found.ci) == (first.mean, first.ci)
                p = 1.0 if same else found.p_value
                verdict = "significant" if p < SIGNIFICANT else "not significant"
                line += f", p = {p:.4f}: {verdict} at the level {SIGNIFICANT}"
            yield line
        yield f"{metric}: {signature}"
