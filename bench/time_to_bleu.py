"""Seconds to the published BLEU from a cold cache, against ten epochs of the plain loop.

    python -m bench.time_to_bleu --data-dir data

Runs `train_8p.py --amp` with an empty `--cache-dir` up to the first validation line with a greedy BLEU of 12.57. In
turn with it runs the plain loop for some steps. The plain loop's rate and 290,000 pairs, ten epochs of Multi30k, give
the time of the published training on the same machine. Other flags of `train_8p.py` stand after a lone `--` and replace
the default ones. `--whole` also gives the seconds to the best BLEU of the run:

    python -m bench.time_to_bleu --data-dir data --whole -- --recipe tuned --seed 7
"""

import contextlib
import sys
import tempfile

from bench import logs, machine, plain

PUBLISHED_BLEU = 12.57
PLAIN_PAIRS = 290_000  # ten epochs of 29,000 pairs
FLAGS = ["--recipe=tuned"]


def seconds_to_bleu(flags: list[str], bleu: float, whole: bool = False) -> dict[str, float]:
    """Runs `train_8p.py` from nothing until a validation reaches `bleu`.

    Args:
        flags: of `train_8p.py`.
        bleu: greedy, on the validation pairs.
        whole: whether the run goes on to its end.

    Returns:
        "BLEU", the first that reached it, and "seconds" and "MB" until then. A whole run also gives "best BLEU" and the
        seconds until that, "to best".

    Raises:
        SystemExit: no validation reached it.
    """
    seen: list[tuple[float, machine.Line]] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [*machine.TRAIN, "--amp", f"--cache-dir={folder}", *flags]
        with contextlib.closing(machine.follow(command, cwd=folder)) as lines:
            for line in lines:
                if found := logs.VALIDATION.match(line.text):
                    seen.append((float(found["bleu"]), line))
                    if seen[-1][0] >= bleu and not whole:
                        break
    best, best_line = max(seen, key=lambda item: item[0], default=(-1.0, None))
    if best < bleu:
        raise SystemExit(f"the run ended with a best BLEU of {best}, below {bleu}: {' '.join(flags)}")
    reached, line = next(item for item in seen if item[0] >= bleu)
    figures = {"BLEU": reached, "seconds": line.seconds, "MB": line.peak_mb}
    return figures | {"best BLEU": best, "to best": best_line.seconds} if whole else figures


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--bleu", type=float, default=PUBLISHED_BLEU, help="the greedy validation BLEU to reach")
    parser.add_argument("--whole", action="store_true", help="run to the end, for the seconds to the run's best BLEU")
    parser.add_argument("--plain-steps", type=int, default=8, metavar="N", help="timed steps of the plain loop")
    parser.add_argument("--plain-batch-size", type=int, default=512, metavar="N", help="its pairs a step")
    parser.add_argument("--plain-rate", type=float, metavar="PAIRS", help="its pairs/s, if they are measured already")
    parser.add_argument("flags", nargs="*", default=FLAGS, metavar="FLAG", help="of train_8p.py, after a lone --")
    args = parser.parse_args(argv)
    data_flags = {"data_dir": args.data_dir.resolve(), "device": args.device}
    flags = [*(f"--{name}={value}" for name, value in data_flags.items()), *args.flags]
    machine.use_all_cores()
    print(machine.describe(args.device))
    print(f"train_8p.py --amp {' '.join(args.flags)}; plain pairs/s; BLEU; seconds; MB:")

    def measure(_: int) -> dict[str, float]:
        rate = args.plain_rate
        if rate is None:
            with tempfile.TemporaryDirectory() as cache_dir:
                own = {"steps": args.plain_steps, "batch_size": args.plain_batch_size, "cache_dir": cache_dir}
                rate = plain.measure(**own, **data_flags)["pairs_per_second"]
        return {"plain": rate} | seconds_to_bleu(flags, args.bleu, args.whole)

    middle = machine.repeat(args.repetitions, measure)
    plain_seconds = PLAIN_PAIRS / middle["plain"]
    if args.whole:
        machine.print_figure("best BLEU of a run", middle["best BLEU"], "stated")
        machine.print_figure("seconds to the best BLEU of a run", middle["to best"], "stated")
    print(f"the plain loop's ten epochs: {plain_seconds:.0f} s")
    machine.print_figure(f"seconds to BLEU {args.bleu:g}", middle["seconds"], "stated")
    machine.print_figure(f"time to BLEU {args.bleu:g}, plain / port", plain_seconds / middle["seconds"], ">= 60")


if __name__ == "__main__":
    main(sys.argv[1:])
