"""Decoding of the test set by onnxruntime, in float32 and with 8-bit products, and by PyTorch, in turn.

    OMP_NUM_THREADS=1 taskset -c 1 python -m bench.exported --data-dir data --ckpt seq2seq-gru-model.pth.tar

Exports the model both ways first. The beam of 1 is greedy. Seconds are the process's own, of all its threads: with one
thread they are those of a core that nothing else uses. BLEU and equal translations are those of the last round.
"""

import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path

import data
import export_onnx
import scoring
from bench import machine
from nmt import checkpoint, onnx_engine
from nmt.engine import Engine
from nmt.errors import run_main
from nmt.text.vocabulary import EOS, SOS
from nmt.torch_engine import TorchEngine, info_of

BEAMS = (1, 5, 10)
MUST = {"speed": ">= 1.5", "BLEU": ">= -0.1"}  # of int8 against onnxruntime's float32


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="the model")
    args = parser.parse_args(argv)
    machine.use_all_cores()
    print(machine.describe())

    print(f"onnxruntime: {importlib.metadata.version('onnxruntime')}")

    saved = checkpoint.load(args.ckpt)
    model = scoring.restore(saved, args.ckpt)
    engines: dict[str, Engine] = {"torch": TorchEngine(model, info_of(saved))}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("onnx", "int8"):
            export_onnx.export(saved, model, Path(folder, name), int8=name == "int8")
            engines[name] = onnx_engine.load(Path(folder, name))
        test = data.load(args.data_dir, cache_dir=folder).test
    src_vocab, trg_vocab = data.Vocabulary(engines["torch"].info.src_words), data.Vocabulary(saved.trg_vocab)
    sentences = [[SOS, *src_vocab.encode(tokens), EOS] for tokens in test.src_tokens]
    penalty = float(saved.flags.get("length_penalty", 1.0))
    found = {}
    print(f"{len(sentences)} sentences; sentences a second of processor time:")

    def measure(_: int) -> dict[str, float]:
        rates = {}
        for beam in BEAMS:
            for name, engine in engines.items():
                start = time.process_time()
                found[name, beam] = engine.translate(
                    sentences, beam_size=beam, length_penalty=penalty, max_length=scoring.MAX_LENGTH
                )
                rates[f"{name}, beam {beam}"] = len(sentences) / (time.process_time() - start)
        return rates

    middle = machine.repeat(args.repetitions, measure)
    for beam in BEAMS:
        ids = {name: [hypotheses[0].ids for hypotheses in found[name, beam]] for name in engines}
        bleu = {}
        for name in engines:
            translations = [data.spaceless(trg_vocab.decode(own)) for own in ids[name]]
            bleu[name] = scoring.evaluate(translations, test.references).bleu
            equal = sum(own == right for own, right in zip(ids[name], ids["torch"], strict=True))
            print(f"{name}, beam {beam}: BLEU {bleu[name]:.4f}, {equal} of {len(sentences)} translations as by torch")
        machine.print_figure(f"equal to torch, onnx, beam {beam}", equal_share(ids["onnx"], ids["torch"]), ">= 0.999")
        speed = middle[f"int8, beam {beam}"] / middle[f"onnx, beam {beam}"]
        machine.print_figure(f"speed of int8 / onnx, beam {beam}", speed, MUST["speed"])
        print(f"figure: BLEU of int8 - onnx, beam {beam} = {bleu['int8'] - bleu['onnx']:+.4f} (must: {MUST['BLEU']})")


def equal_share(translations: list[list[int]], others: list[list[int]]) -> float:
    """The share of sentences whose translations are equal.

    >>> equal_share([[4], [5, 6]], [[4], [5]])
    0.5
    """
    return sum(own == other for own, other in zip(translations, others, strict=True)) / len(translations)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
