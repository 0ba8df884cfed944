"""Start-up: from the start of the process to the first training step, warm and with a cold cache.

    python -m bench.startup --data-dir data

Runs `train_8p.py --amp -b 128 -p 1` up to its first step line. The step began at that line's time less the line's own
Time field. A cold start has an empty `--cache-dir`, so it tokenises the text. Each round also times the parts of a warm
start: the import of torch alone, all imports of the program, reading the cache, building and initialising the model.
"""

import sys
import tempfile

from bench import logs, machine

PARTS = """
import sys, time
import train_8p
from nmt.distributed import World
from nmt.precision import Choice
settings = train_8p.Settings(data_dir=sys.argv[1], cache_dir=sys.argv[2])
start = time.perf_counter()
corpus = train_8p.load_corpus(settings, log=lambda line: None)
loaded = time.perf_counter()
settings = train_8p.resolved(settings, Choice(), World(), len(corpus.train))
train_8p.first_model(settings, World(), corpus)
print("parts:", loaded - start, time.perf_counter() - loaded)
"""


def seconds_to_first_step(flags: list[str], cache_dir: str) -> tuple[float, float]:
    """Seconds from the start of `train_8p.py` to the start of its first step, and peak memory in MB at its end."""
    with tempfile.TemporaryDirectory() as folder:  # for the checkpoint that the run would leave
        command = [*machine.TRAIN, *flags, f"--cache-dir={cache_dir}", "--amp", "-b", "128", "-p", "1"]
        line, found = machine.first_line(command, logs.STEP, cwd=folder)
    return line.seconds - float(found["seconds"]), line.peak_mb


def seconds_to_import(module: str) -> float:
    """Seconds from the start of a Python process to the end of its import of `module`."""
    program = f"import {module}; print('imported', flush=True)"
    return machine.first_line([sys.executable, "-c", program], "imported")[0].seconds


def main(argv: list[str]) -> None:
    args = machine.build_parser(__doc__, repetitions=5).parse_args(argv)
    data_dir = str(args.data_dir.resolve())
    flags = [f"--data-dir={data_dir}", f"--device={args.device}"]
    machine.use_all_cores()
    print(machine.describe(args.device))
    print("seconds; MB")

    with tempfile.TemporaryDirectory() as warm_cache:
        seconds_to_first_step(flags, warm_cache)  # fills it

        def measure(_: int) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as cold_cache:
                cold, _ = seconds_to_first_step(flags, cold_cache)
            warm, peak_mb = seconds_to_first_step(flags, warm_cache)
            command = [sys.executable, "-c", PARTS, data_dir, warm_cache]
            _, found = machine.first_line(command, "parts: ([0-9.e-]+) ([0-9.e-]+)")
            return {
                "cold": cold,
                "warm": warm,
                "import torch": seconds_to_import("torch"),
                "all imports": seconds_to_import("train_8p"),
                "data": float(found[1]),
                "model": float(found[2]),
                "MB warm": peak_mb,
            }

        middle = machine.repeat(args.repetitions, measure)
    machine.print_figure("cold start, s", middle["cold"], "stated")
    machine.print_figure("import of torch, s", middle["import torch"], "stated")
    machine.print_figure("warm start, s", middle["warm"], "<= 6")


if __name__ == "__main__":
    main(sys.argv[1:])
