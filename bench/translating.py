"""Translating the test set on one core, as `translate.py` does, beside what one might take instead.

    pip install ctranslate2==4.8.5
    python -m bench.translating --data-dir data --ckpt seq2seq-gru-model.pth.tar

In turn, in one run: CTranslate2 in int8 with a Transformer of 256 dimensions and 3 + 3 layers, and the port in bfloat16
and float32, each with and without a shortlist. Figures are sentences a second, greedy, with a beam of 5 and of 10. The
Transformer is not trained. Its speed does not depend on that if its translations have a given length: the mean length
of the port's, rounded down. Neither gives scores to greedy translations. Seconds are those that the process computes,
so other programs on the machine change little. With `--start`, the seconds from the start of `translate.py` to its
first line are measured too.
"""

import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import data
import gru
import scoring
from bench import machine
from nmt import checkpoint, shortlist
from nmt.engine import Hypothesis
from nmt.errors import UserError, run_main
from nmt.torch_engine import TorchEngine, info_of

import numpy as np
import torch

BEAMS = (1, 5, 10)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEER = "CTranslate2"
PEER_BATCH = 32  # sentences: of 32 to 256 its fastest
TRANSFORMER = {"dim": 256, "layers": 3, "heads": 4, "inner": 1024}
MAX_LENGTH = 50


def write_transformer(folder: str, src_words: list[str], trg_words: list[str]) -> None:
    """Leaves an untrained Transformer in int8 in `folder`, in CTranslate2's format. Sizes are `TRANSFORMER`."""
    from ctranslate2.specs import TransformerSpec

    dim, inner = TRANSFORMER["dim"], TRANSFORMER["inner"]
    spec = TransformerSpec.from_config((TRANSFORMER["layers"], TRANSFORMER["layers"]), TRANSFORMER["heads"])
    generator = np.random.default_rng(0)

    def drawn(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def fill(layer: Any, rows: int, columns: int) -> None:
        layer.weight, layer.bias = drawn(rows, columns), np.zeros(rows, np.float32)

    def fill_norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(dim, np.float32), np.zeros(dim, np.float32)

    spec.encoder.embeddings[0].weight = drawn(len(src_words), dim)
    spec.decoder.embeddings.weight = drawn(len(trg_words), dim)
    fill(spec.decoder.projection, len(trg_words), dim)
    for side in (spec.encoder, spec.decoder):
        side.position_encodings.encodings = drawn(512, dim)
        fill_norm(side.layer_norm)
        for layer in side.layer:
            parts = {layer.self_attention: (3 * dim, dim)}  # the linear layers' numbers of rows
            if side is spec.decoder:
                parts[layer.attention] = (dim, 2 * dim, dim)
            for attention, sizes in parts.items():
                fill_norm(attention.layer_norm)
                for linear, rows in zip(attention.linear, sizes, strict=True):
                    fill(linear, rows, dim)
            fill_norm(layer.ffn.layer_norm)
            fill(layer.ffn.linear_0, inner, dim)
            fill(layer.ffn.linear_1, dim, inner)
    spec.register_source_vocabulary(src_words)
    spec.register_target_vocabulary(trg_words)
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = data.SPECIALS[0], *data.SPECIALS[2:]
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(folder)


def peer(folder: str, words: list[list[str]], steps: int, penalty: float) -> Callable[[int], object]:
    """Translates with a beam of the width that it is given, by CTranslate2, with the model in `folder`."""
    import ctranslate2

    translator = ctranslate2.Translator(folder, compute_type="int8", inter_threads=1, intra_threads=1)
    return lambda beam_size: translator.translate_batch(
        words,
        beam_size=beam_size,
        length_penalty=penalty,
        max_batch_size=PEER_BATCH,
        min_decoding_length=steps,
        max_decoding_length=steps,
    )


def seconds_to_first_line(path: Path, sentence: str, flags: list[str]) -> float:
    """From the start of `translate.py` to its first line."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(f"{sentence}\n" * 1000)
        file.flush()
        command = [sys.executable, str(machine.ROOT / "translate.py"), "--ckptpath", str(path.resolve())]
        line, _ = machine.first_line([*command, "--input", file.name, *flags], r"\S")
    return line.seconds


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the weights")
    parser.add_argument("--shortlist", type=int, default=10, metavar="N", help="translations of each source word")
    parser.add_argument("--start", action="store_true", help="measure translate.py's start too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(machine.describe(args.device))

    saved = checkpoint.load(args.ckpt)
    if saved.src_vocab is None or saved.trg_vocab is None:
        todo = "give a file that train_8p.py has written"
        raise UserError("checkpoint", "it has no vocabulary", str(args.ckpt), todo)
    with tempfile.TemporaryDirectory() as cache:
        corpus = data.load(args.data_dir, cache_dir=cache)
        table = saved.shortlist
        if table is None:
            src, trg = ((side.ids, side.offsets) for side in (corpus.train.src, corpus.train.trg))
            start = process_time()
            table = shortlist.build(src, trg, len(saved.src_vocab), len(saved.trg_vocab))
            print(f"the shortlist was built in {process_time() - start:.2f} s")
        test, val = corpus.test, corpus.val
    src_vocab, vocab = data.Vocabulary(saved.src_vocab), data.Vocabulary(saved.trg_vocab)
    ids, val_ids = (
        [[data.SOS, *src_vocab.encode(tokens), data.EOS] for tokens in part.src_tokens] for part in (test, val)
    )
    penalty = float(saved.flags.get("length_penalty", 1.0))

    engines = {}
    for dtype_name, dtype in DTYPES.items():
        for name, used in ((dtype_name, None), (f"{dtype_name} list", table[:, : args.shortlist].contiguous())):
            model = gru.restore(saved.state_dict, saved.sizes)
            engines[name] = TorchEngine(model, info_of(saved), dtype=dtype, shortlist=used, scores=False)
    found: dict[tuple[str, int], list[list[Hypothesis]]] = {}

    def translate(name: str, beam_size: int, sentences: list[list[int]]) -> list[list[Hypothesis]]:
        options = {"beam_size": beam_size, "length_penalty": penalty, "max_length": MAX_LENGTH}
        return engines[name].translate(sentences, **options)

    def ours(name: str, beam_size: int) -> None:
        found[name, beam_size] = translate(name, beam_size, ids)

    def bleu(hypotheses: list[list[Hypothesis]], references: list[list[str]]) -> float:
        translations = [data.spaceless(vocab.decode(best.ids)) for best, *_ in hypotheses]
        return scoring.evaluate(translations, references).bleu

    ours("fp32", 1)
    steps = statistics.mean(len(hypotheses[0].ids) + 1 for hypotheses in found["fp32", 1])
    with tempfile.TemporaryDirectory() as folder:
        write_transformer(folder, saved.src_vocab, saved.trg_vocab)
        words = [[saved.src_vocab[index] for index in sentence[1:]] for sentence in ids]
        runs: dict[str, Callable[[int], object]] = {PEER: peer(folder, words, int(steps), penalty)}
        runs |= {name: functools.partial(ours, name) for name in engines}
        print(f"{len(ids)} sentences, {steps:.2f} steps each; {PEER} {int(steps)} steps; sentences/s:")

        def measure(number: int) -> dict[str, float]:
            rates = {}
            for beam_size in BEAMS:
                for name, run in runs.items():
                    if number == 1:
                        run(beam_size)  # oneDNN compiles its kernels
                    start = process_time()
                    run(beam_size)
                    rates[f"{name} {beam_size}"] = len(ids) / (process_time() - start)
            return rates

        middle = machine.repeat(args.repetitions, measure)
    print(f"peak memory of all together: {machine.peak_rss_mb():.0f} MB")
    for (name, beam_size), hypotheses in sorted(found.items()):
        machine.print_figure(f"BLEU {name} {beam_size}", bleu(hypotheses, test.references), "stated")
        of_val = bleu(translate(name, beam_size, val_ids), val.references)
        machine.print_figure(f"BLEU of the validation pairs {name} {beam_size}", of_val, "stated")
    for beam_size in BEAMS:
        for name in engines:
            must = ">= 1" if name.startswith("bf16") else "stated"
            ratio = middle[f"{name} {beam_size}"] / middle[f"{PEER} {beam_size}"]
            machine.print_figure(f"{name} / {PEER}, beam {beam_size}", ratio, must)
    if args.start:
        sentence = " ".join(test.src_tokens[0])
        for name in DTYPES:
            flags = ["--precision", {"bf16": "bfloat16", "fp32": "float32"}[name], "--beam-size", "1"]
            seconds = [seconds_to_first_line(args.ckpt, sentence, flags) for _ in range(args.repetitions)]
            machine.print_figure(f"first line {name}, s", statistics.median(seconds), "stated")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
