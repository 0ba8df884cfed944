"""Greedy decoding of the test set: the plain loop, one sentence at a time, and the port's batches, in turn.

    python -m bench.decoding --data-dir data --ckpt seq2seq-gru-model.pth.tar

Without a checkpoint, this script trains one epoch first, because untrained weights never end a sentence. Ratios are
over the plain loop's float32. Its bfloat16 is for information. The limit is the rate of products in the same dtype,
divided by two FLOP for each of the `machine.multiply_adds` of the sources and the translations.
"""

import copy
import functools
import statistics
import sys
import tempfile
from pathlib import Path

import data
import gru
import scoring
from bench import machine, plain
from nmt import checkpoint
from nmt.distributed import World
from nmt.errors import run_main

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MUST = {"fp32": 15, "bf16": 30}


def train_one_epoch(data_dir: Path, cache_dir: str, path: Path, device: str) -> None:
    """Leaves a checkpoint of the recipe `tuned` at `path`."""
    flags = [f"--data-dir={data_dir}", f"--cache-dir={cache_dir}", f"--ckptpath={path}", f"--device={device}"]
    for _ in machine.follow([*machine.TRAIN, "--epochs=1", "--amp", *flags]):
        pass


def translate_plainly(model: plain.Seq2Seq, src: data.Side, vocab: data.Vocabulary) -> list[list[str]]:
    """Translates one sentence at a time, and returns the same as `scoring.translate`."""
    device = model.decoder.fc_out.weight.device
    sentences = (data.pad(src, torch.tensor([index]))[0].to(device) for index in range(len(src.lengths)))
    translations = (vocab.decode(model.greedy(sentence)) for sentence in sentences)
    return [data.spaceless(tokens) for tokens in translations]


def agreement(translations: list[list[str]], references: list[list[str]]) -> float:
    """The share of sentences that are equal.

    >>> agreement([["a"], ["b", "c"]], [["a"], ["b"]])
    0.5
    """
    equal = (ours == theirs for ours, theirs in zip(translations, references, strict=True))
    return statistics.mean(map(float, equal))


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="the weights; left out: train an epoch")
    args = parser.parse_args(argv)
    machine.use_all_cores()
    print(machine.describe(args.device))

    with tempfile.TemporaryDirectory() as folder:
        path, data_dir = args.ckpt or Path(folder, "model.pth.tar"), args.data_dir.resolve()
        if args.ckpt is None:
            train_one_epoch(data_dir, folder, path, args.device)
        saved = checkpoint.load(path)
        test = data.load(data_dir, cache_dir=folder).test
    vocab = data.Vocabulary(saved.trg_vocab)
    src = data.Side.encode(test.src_tokens, data.Vocabulary(saved.src_vocab))

    world = World(device_type=args.device)
    port = gru.restore(saved.state_dict, saved.sizes, world.device)
    own = plain.Seq2Seq(**saved.sizes).to(world.device).eval()
    own.load_state_dict(saved.state_dict)
    models = {}
    for name, dtype in DTYPES.items():
        models[f"plain {name}"] = copy.deepcopy(own).to(dtype), translate_plainly
        models[name] = copy.deepcopy(port).to(dtype), functools.partial(scoring.translate, world=world)
    translations = {}
    print(f"{len(src.lengths)} sentences; sentences/s, and GFLOP/s of products:")

    def measure(_: int) -> dict[str, float]:
        rates = {}
        for name, (model, translate) in models.items():
            start = machine.clock(args.device)
            translations[name] = translate(model, src, vocab)
            rates[name] = len(src.lengths) / (machine.clock(args.device) - start)
        return rates | {
            f"GFLOP/s {name}": machine.matmul_rate(dtype, args.device) / 1e9 for name, dtype in DTYPES.items()
        }

    middle = machine.repeat(args.repetitions, measure)
    steps = statistics.mean(len(tokens) + 1 for tokens in translations["plain fp32"])
    sizes = {name: saved.sizes[name] for name in ("output_dim", "emb_dim", "hid_dim")}
    flops = 2 * machine.multiply_adds(src.lengths.double().mean().item(), steps, **sizes)
    print(f"peak memory of all together: {machine.peak_rss_mb():.0f} MB; {steps:.2f} steps a sentence")
    for name in DTYPES:
        share = middle[name] * flops / (middle[f"GFLOP/s {name}"] * 1e9)
        print(f"share of the limit, {name}: {machine.rounded(share)}")
        equal = agreement(translations[name], translations["plain fp32"])
        machine.print_figure(f"equal to plain, {name}", equal, "1" if name == "fp32" else "stated")
    for name in DTYPES:
        machine.print_figure(f"decoding {name} / plain fp32", middle[name] / middle["plain fp32"], f">= {MUST[name]}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
