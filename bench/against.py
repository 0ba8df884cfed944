"""Training speed of this checkout against another one, in turn: pairs a second, peak memory, share of the limit.

    git clone . ../before && git -C ../before checkout COMMIT
    python -m bench.against --other ../before --data-dir data

Each round runs `train_8p.py --performance` of both checkouts over a whole epoch, for each batch and precision. Then it
measures the matrix products' rate, from which the limit follows (`machine.flops_per_pair`).

With `--whole` it runs ten epochs of `tuned` by `--amp` of both, with validation and the final score, and prints the
seconds of the whole commands.
"""

import sys
import tempfile
from pathlib import Path

import data
from bench import logs, machine, training
from nmt.errors import run_main

PRECISIONS = {"float32": [], "amp": ["--amp"]}


def measure_whole(checkout: Path, flags: list[str]) -> tuple[float, float]:
    """Runs ten epochs of `tuned` by `--amp` of a checkout: seconds from start to end, and the final BLEU."""
    with tempfile.TemporaryDirectory() as folder:  # for the checkpoint
        command = [sys.executable, str(checkout / "train_8p.py"), "--recipe=tuned", "--amp", *flags]
        lines = list(machine.follow(command, cwd=folder))
    scores = logs.parse("\n".join(line.text for line in lines)).final
    return lines[-1].seconds, float(scores["BLEU score"])


def figures(middle: dict[str, float], flops: float, batches: list[int]) -> list[tuple[str, float]]:
    """Name and value of each figure of the epochs.

    Args:
        middle: the medians that `main` measures.
        flops: FLOP of a pair, from `machine.flops_per_pair`.
        batches: the batch sizes.
    """
    found = []
    for batch in batches:
        for name in PRECISIONS:
            row = f"{name} {batch}"
            limit = middle[f"GFLOP/s {name}"] * 1e9 / flops
            found += [
                (f"training {name}, batch {batch}, this / other", middle[row] / middle[f"{row} other"]),
                (f"share of the limit, {name}, batch {batch}", middle[row] / limit),
            ]
    return found


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument(
        "--other", required=True, type=Path, metavar="CHECKOUT", help="a checkout of this repository at another commit"
    )
    parser.add_argument("--batch-sizes", default="64,512", metavar="N,N", help="pairs a step")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of train_8p.py, for both, after a lone --")
    parser.add_argument("--whole", action="store_true", help="time ten epochs with validation and the final score")
    args = parser.parse_args(argv)
    checkouts = {"": machine.ROOT, " other": args.other.resolve()}
    batches = [int(batch) for batch in args.batch_sizes.split(",")]
    machine.use_all_cores()
    print(machine.describe(args.device))

    with tempfile.TemporaryDirectory() as cache_dir:
        corpus = data.load(args.data_dir, cache_dir=cache_dir)
        flops = machine.flops_per_pair(corpus.train.src.lengths, corpus.train.trg.lengths, len(corpus.trg_vocab))
        shared = [
            f"--data-dir={args.data_dir.resolve()}",
            f"--cache-dir={cache_dir}",
            f"--device={args.device}",
            *args.flags,
        ]

        def measure_epochs(number: int) -> dict[str, float]:
            rates, memory, dtypes = {}, {}, {}
            turns = list(checkouts.items())[:: 1 if number % 2 else -1]
            for batch in batches:
                for name, flags in PRECISIONS.items():
                    for which, checkout in turns:
                        row = f"{name} {batch}{which}"
                        found = training.measure_port([*shared, f"--batch-size={batch}", *flags], checkout)
                        rates[row], memory[f"MB {row}"], dtypes[name] = found
            limits = {f"GFLOP/s {name}": machine.matmul_rate(dtypes[name], args.device) / 1e9 for name in PRECISIONS}
            return dict(sorted(rates.items())) | dict(sorted(memory.items())) | limits

        def measure_wholes(number: int) -> dict[str, float]:
            found = {}
            for which, checkout in list(checkouts.items())[:: 1 if number % 2 else -1]:
                found[f"seconds{which}"], found[f"BLEU{which}"] = measure_whole(checkout, shared)
            return dict(sorted(found.items()))

        if args.whole:
            middle = machine.repeat(args.repetitions, measure_wholes)
            results = [("ten epochs, this / other", middle["seconds"] / middle["seconds other"])]
        else:
            print(f"{flops / 1e9:.4f} GFLOP a pair; pairs/s, MB, and GFLOP/s of products:")
            middle = machine.repeat(args.repetitions, measure_epochs)
            results = figures(middle, flops, batches)
    for name, value in results:
        machine.print_figure(name, value, "told")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
