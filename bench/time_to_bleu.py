"""Seconds to the published BLEU from a cold cache, against ten epochs of the plain loop.

    python bench/time_to_bleu.py --data-dir ../shared/data/multi30k

Runs `train_8p.py --amp` with an empty `--cache-dir` up to the first validation line with a greedy BLEU of 12.57, and
in turn with it the plain loop for some steps; its rate over 290,000 pairs, ten epochs of Multi30k, is what the
published training takes on the same machine. Other flags of `train_8p.py` stand after a lone `--`, in place of the
default ones:

    python bench/time_to_bleu.py --data-dir ../shared/data/multi30k --plain-rate 21.9 -- --epochs 3 --seed 7
"""

import contextlib
import re
import sys
import tempfile

import machine
import plain

PUBLISHED_BLEU = 12.57
PLAIN_PAIRS = 290_000  # ten epochs of 29,000 pairs
FLAGS = ["--recipe=tuned", "--epochs=2"]


def seconds_to_bleu(flags: list[str], bleu: float) -> tuple[float, machine.Line]:
    """Runs `train_8p.py` from nothing until a validation reaches `bleu`.

    Returns:
        The BLEU reached, and the validation's line.

    Raises:
        SystemExit: no validation did.
    """
    best = 0.0
    with tempfile.TemporaryDirectory() as folder:
        command = [*machine.TRAIN, "--amp", f"--cache-dir={folder}", *flags]
        with contextlib.closing(machine.follow(command, cwd=folder)) as lines:
            for line in lines:
                if found := re.match(r"validation: .*greedy BLEU ([0-9.]+)", line.text):
                    best = max(best, float(found[1]))
                    if best >= bleu:
                        return best, line
    raise SystemExit(f"the run ended with a best BLEU of {best}, below {bleu}: {' '.join(flags)}")


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__)
    parser.add_argument("--bleu", type=float, default=PUBLISHED_BLEU, help="the greedy validation BLEU to reach")
    parser.add_argument("--plain-steps", type=int, default=8, metavar="N", help="timed steps of the plain loop")
    parser.add_argument("--plain-batch-size", type=int, default=512, metavar="N", help="its pairs a step")
    parser.add_argument("--plain-rate", type=float, metavar="PAIRS", help="its pairs/s, if they are measured already")
    parser.add_argument("flags", nargs="*", default=FLAGS, metavar="FLAG", help="of train_8p.py, after a lone --")
    args = parser.parse_args(argv)
    data_flags = {"data_dir": args.data_dir.resolve(), "device": args.device}
    flags = [*(f"--{name}={value}" for name, value in data_flags.items()), *args.flags]
    machine.use_all_cores()
    print(machine.describe(args.device))
    print(f"train_8p.py --amp {' '.join(args.flags)}; plain pairs/s; BLEU; seconds; MB")

    def measure(_: int) -> dict[str, float]:
        rate = args.plain_rate
        if rate is None:
            with tempfile.TemporaryDirectory() as cache_dir:
                own = {"steps": args.plain_steps, "batch_size": args.plain_batch_size, "cache_dir": cache_dir}
                rate = plain.measure(**own, **data_flags)["pairs_per_second"]
        bleu, line = seconds_to_bleu(flags, args.bleu)
        return {"plain": rate, "BLEU": bleu, "seconds": line.seconds, "MB": line.peak_mb}

    middle = machine.repeat(args.repetitions, measure)
    plain_seconds = PLAIN_PAIRS / middle["plain"]
    print(f"the plain loop's ten epochs: {plain_seconds:.0f} s")
    machine.print_figure(f"seconds to BLEU {args.bleu:g}", middle["seconds"], "stated")
    machine.print_figure(f"time to BLEU {args.bleu:g}, plain / port", plain_seconds / middle["seconds"], ">= 60")


if __name__ == "__main__":
    main(sys.argv[1:])
