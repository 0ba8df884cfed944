"""What training in two processes spends on communication: steps with and without it, and the all-reduce alone.

    OMP_NUM_THREADS=1 python -m bench.communication --data-dir data

It needs a core for each process. A step is forward, backward and update, as `train_8p.py` does it in float32 with the
recipe `tuned`, on real batches. Each round runs some steps whose gradients are averaged over the processes by
DistributedDataParallel, then the same steps within its `no_sync`, then the all-reduce of as many numbers as the model
has parameters, with nothing beside it. The first minus the second is what communication costs a step. Divided by the
third it says how much of the all-reduce the backward pass does not hide.
"""

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
from pathlib import Path

import data
import gru
from bench import machine
from nmt import distributed, precision
from nmt.distributed import World
from nmt.errors import run_main

import torch

BATCHES = (64, 512)  # pairs a step over all processes
WARM_UP = 2


class Steps:
    """Training steps of one rank.

    Args:
        world: the ranks.
        corpus: the data.
        batch_size: pairs a step over all ranks.
        count: steps that are timed at once.
    """

    def __init__(self, world: World, corpus: data.Corpus, batch_size: int, count: int):
        torch.manual_seed(0)
        device = world.device
        model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab)).to(device)
        world.copy_from_main(model.parameters())
        self.world = world
        choice = precision.choose(world.device_type, "O0")
        self.trainer = precision.make_trainer(choice, model, device)
        self.criterion = world.parallel(gru.TrainingLoss(self.trainer.working_model, 0.1))
        loader = data.Loader(corpus.train, device)
        batches = data.epoch_batches(corpus.train, batch_size, seed=1, epoch=0)
        rounds = itertools.islice(itertools.cycle(batches), count)  # a small corpus goes round again
        self.batches = [loader(data.rank_share(indices, world.rank, world.size)) for indices in rounds]
        self.run(WARM_UP, averaged=True)

    def run(self, count: int | None = None, *, averaged: bool) -> float:
        """Seconds a step.

        Args:
            count: how many steps, by default all batches.
            averaged: whether the gradients are averaged over the ranks.
        """
        batches = self.batches[:count]
        apart = contextlib.nullcontext if averaged or self.world.size == 1 else self.criterion.no_sync
        self.world.sum(torch.zeros(1, device=self.world.device))  # the ranks begin together
        start = machine.clock(self.world.device)
        for batch in batches:
            with apart():
                loss = self.criterion(batch, 1.0) / batch.target_tokens
                self.trainer.backward(loss)
            self.trainer.step(1e-4, max_norm=1.0)
        return (machine.clock(self.world.device) - start) / len(batches)


def all_reduce_seconds(world: World, numbers: int, count: int) -> float:
    """Seconds of the all-reduce of `numbers` float32 numbers, alone."""
    tensor = torch.zeros(numbers, device=world.device)
    world.sum(tensor)
    start = machine.clock(world.device)
    for _ in range(count):
        world.sum(tensor)
    return (machine.clock(world.device) - start) / count


def figures(middle: dict[str, float], numbers: int) -> list[tuple[str, float, str]]:
    """Name, value and goal of each figure.

    Args:
        middle: the medians that `run_rank` measures, in milliseconds.
        numbers: parameters of the model.

    >>> middle = {"64 averaged": 10.0, "64 apart": 8.0, "512 averaged": 40.0, "512 apart": 37.0, "all-reduce": 4.0}
    >>> [(name, round(value, 3)) for name, value, _ in figures(middle, 1_000_000)][:2]
    [('share of a step, batch 64', 0.2), ('cost / all-reduce alone, batch 64', 0.5)]
    """
    found = []
    for batch in BATCHES:
        whole = middle[f"{batch} averaged"]
        cost = whole - middle[f"{batch} apart"]
        found.append((f"share of a step, batch {batch}", cost / whole, "no bound"))
        found.append((f"cost / all-reduce alone, batch {batch}", cost / middle["all-reduce"], "no bound"))
    return [*found, ("all-reduce, GB/s of gradients", 4 * numbers / (middle["all-reduce"] * 1e6), "no bound")]


def run_rank(world: World, args: argparse.Namespace, cache_dir: str) -> None:
    """Measures, in step with the other ranks. Rank 0 prints."""
    corpus = data.load(args.data_dir, cache_dir=cache_dir, log=lambda line: None)
    world.start()
    model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if world.is_main:
        print(machine.describe(world.device))
        print(f"{world.size} processes; {numbers:,} parameters; milliseconds a step:")
    steps = {batch: Steps(world, corpus, batch, args.steps) for batch in BATCHES}

    def measure(_: int) -> dict[str, float]:
        found = {}
        for batch, its_steps in steps.items():
            found[f"{batch} averaged"] = 1000 * its_steps.run(averaged=True)
            found[f"{batch} apart"] = 1000 * its_steps.run(averaged=False)
        return found | {"all-reduce": 1000 * all_reduce_seconds(world, numbers, args.steps)}

    if not world.is_main:
        for repetition in range(args.repetitions):
            measure(repetition)
    else:
        middle = machine.repeat(args.repetitions, measure)
        for figure in figures(middle, numbers):
            machine.print_figure(*figure)
    world.stop()


def main(argv: list[str]) -> None:
    parser = machine.build_parser(__doc__, repetitions=5)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps timed at once")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes, one core or GPU each")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.data_dir = Path(args.data_dir).resolve()
    plan = distributed.plan(
        device=args.device, device_list=list(range(args.processes)), multiprocessing_distributed=args.processes > 1
    )
    with tempfile.TemporaryDirectory() as cache_dir:
        data.load(args.data_dir, cache_dir=cache_dir)
        if plan.spawns:
            plan.spawn(run_rank, args, cache_dir)
        else:
            run_rank(plan.worlds[0], args, cache_dir)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
