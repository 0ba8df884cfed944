"""Training speed, the plain loop and the port in turn: pairs a second, share of the machine's limit, peak memory.

    python -m bench.training --data-dir data

This takes about half an hour on two cores. On a GPU:

    python -m bench.training --data-dir data --device cuda --batch-size 1536

Each round runs, each in a process of its own: the plain loop (float32, forcing 0.5), then `train_8p.py --performance`
over a whole epoch with `--amp`, in float32, and with `--amp` at forcing 0.5. Then it measures the matrix products'
rate, from which the limit follows (`machine.flops_per_pair`).
"""

import sys
import tempfile
from pathlib import Path

import data
from bench import logs, machine, plain
from nmt.errors import run_main

import torch

PORT = {
    "amp": ["--amp", "--teacher-forcing-ratio=1.0"],
    "fp32": ["--teacher-forcing-ratio=1.0"],
    "amp 0.5": ["--amp", "--teacher-forcing-ratio=0.5"],
}


def measure_port(flags: list[str], checkout: Path = machine.ROOT) -> tuple[float, float, torch.dtype]:
    """Runs `train_8p.py --performance` of a checkout: pairs a second, peak memory in MB, and the dtype."""
    command = [sys.executable, str(checkout / "train_8p.py"), "--performance", "--recipe", "tuned", *flags]
    for line in machine.follow(command, cwd=checkout):
        if logs.RUN.match(line.text):
            dtype = getattr(torch, logs.facts_of(line.text)["precision"].partition("/")[0])
        if found := logs.RATE.match(line.text):
            rate = float(found["rate"])
    return rate, line.peak_mb, dtype


def figures(middle: dict[str, float], flops: float, device: str) -> list[tuple[str, float, str]]:
    """Name, value and goal of each figure.

    Args:
        middle: the medians that `main` measures.
        flops: FLOP of a pair, from `machine.flops_per_pair`.
        device: "cpu" or "cuda". The goals depend on it.
    """
    share = {name: middle[name] * flops / (middle[f"GFLOP/s {name}"] * 1e9) for name in ("amp", "fp32")}
    compared = [
        ("training --amp / plain", middle["amp"] / middle["plain"], ">= 20"),
        ("training fp32 / plain", middle["fp32"] / middle["plain"], ">= 6"),
        ("share of the limit, --amp", share["amp"], ">= 0.65"),
        ("share of the limit, fp32", share["fp32"], ">= 0.70"),
        ("peak memory --amp, MB", middle["MB amp"], "<= 1500"),
        ("peak memory fp32, MB", middle["MB fp32"], "<= 1500"),
        ("forcing 0.5 / 1.0, --amp", middle["amp 0.5"] / middle["amp"], ">= 0.75"),
    ]
    if device == "cpu":
        return compared
    told = [(name, value, "no bound on a GPU") for name, value, _ in compared]
    return [("training --amp, pairs/s", middle["amp"], ">= 150000"), *told]


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="pairs a step")
    parser.add_argument("--plain-steps", type=int, default=8, metavar="N", help="timed steps of the plain loop")
    args = parser.parse_args(argv)
    machine.use_all_cores()
    print(machine.describe(args.device))

    with tempfile.TemporaryDirectory() as cache_dir:
        corpus = data.load(args.data_dir, cache_dir=cache_dir)
        lengths = corpus.train.src.lengths, corpus.train.trg.lengths
        flops = machine.flops_per_pair(*lengths, len(corpus.trg_vocab))
        shared = {
            "data_dir": args.data_dir.resolve(),
            "cache_dir": cache_dir,
            "batch_size": args.batch_size,
            "device": args.device,
        }
        port_flags = [f"--{name}={value}" for name, value in shared.items()]
        print(f"batch {args.batch_size}, {flops / 1e9:.4f} GFLOP a pair; pairs/s, MB, and GFLOP/s of products:")

        def measure(_: int) -> dict[str, float]:
            own = plain.measure(steps=args.plain_steps, **shared)
            rates, memory, dtypes = {"plain": own["pairs_per_second"]}, {"MB plain": own["peak_mb"]}, {}
            for name, flags in PORT.items():
                rates[name], memory[f"MB {name}"], dtypes[name] = measure_port([*port_flags, *flags])
            products = {
                f"GFLOP/s {name}": machine.matmul_rate(dtypes[name], args.device) / 1e9 for name in ("amp", "fp32")
            }
            return rates | memory | products

        middle = machine.repeat(args.repetitions, measure)
    for figure in figures(middle, flops, args.device):
        machine.print_figure(*figure)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
