"""Trains one GRU encoder-decoder to translate, on one device or on eight, and scores it.

One device (an NPU if there is one, else a GPU, else the CPU), on the bundled sample or on Multi30k:

    python3 train_8p.py
    python3 train_8p.py --data-dir DIR --amp

One process per device of this machine, or eight processes on its CPU:

    python3 train_8p.py --data-dir DIR --amp --multiprocessing-distributed
    torchrun --nproc-per-node 8 train_8p.py --data-dir DIR --amp

Two machines with eight devices each; the first one's address is 10.0.0.1:

    python3 train_8p.py ... --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://10.0.0.1:29500
    python3 train_8p.py ... --multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://10.0.0.1:29500

Scoring a checkpoint on the test set:

    python3 train_8p.py --data-dir DIR --evaluate seq2seq-gru-model.pth.tar
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nmt.errors import UserError, before_imports, printable, run_main

before_imports()

import data
import gru
import scoring
from nmt import checkpoint, cooccurrence, devices, flags, launch, precision
from nmt.averaging import WeightAverage
from nmt.log import EpochLog, say

import torch

SAMPLE = Path(__file__).resolve().parent / "sample"
ENOUGH_UPDATES = 100  # `tuned` lowers its batch until an epoch has so many
SHARED_BATCH = 128  # `tuned`'s in all on several devices: the largest that keeps 64's BLEU (docs/search.md)
PERFORMANCE_STEPS = 25
PERFORMANCE_BATCH = {"npu": 1536, "cuda": 1536, "cpu": 128}  # pairs a device

FORMER_INITIALISATIONS = {"modelzoo": "normal", "tuned": "orthogonal"}  # names in older logs and checkpoints

# Each value can be overruled by the flag of its name.
RECIPES = {
    # As the published figure was trained.
    "modelzoo": {
        "epochs": 10,
        "batch_size": 512,
        "optimizer": "adam",
        "lr": 0.003,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "clip": 0.0,
        "teacher_forcing_ratio": 0.5,
        "dropout": 0.5,
        "output_dropout": 0.0,
        "label_smoothing": 0.0,
        "average": 0.0,
        "init": "normal",
        "update_bias": 0.0,
        "embeddings": "drawn",
        "fixed_length": 46,
        "batching": "random",
        "last_batch": "drop",
        "best": "loss",
        "beam_size": 1,
        "length_penalty": 1.0,
    },
    # The best that this architecture does in as many epochs. docs/search.md: what each piece gives, and its source.
    "tuned": {
        "epochs": 10,
        "batch_size": 64,
        "optimizer": "adam",
        "lr": 0.003,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup": 0.1,
        "clip": 1.0,
        "teacher_forcing_ratio": 1.0,
        "dropout": 0.5,
        "output_dropout": 0.2,
        "label_smoothing": 0.1,
        "average": 0.2,
        "init": "orthogonal",
        "update_bias": 1.0,
        "embeddings": "cooccurrence",
        "fixed_length": 0,
        "batching": "like-length",
        "last_batch": "keep",
        "best": "bleu",
        "beam_size": 10,
        "length_penalty": 1.2,
    },
}


def build_parser() -> flags.StrictParser:
    """Every flag, by topic. Flags of a recipe have no default of their own."""
    parser = flags.StrictParser(
        prog="train_8p.py",
        description="Trains a GRU encoder-decoder to translate and reports BLEU and pairs a second.",
        epilog="Every flag may be written with underscores too. Flags after a lone -- override those before it.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", metavar="DIR", help="holds multi30k/ or the six files; left out: the sample corpus"
    )
    group.add_argument("--src-lang", default="de", metavar="LANG", help="language to translate from")
    group.add_argument("--trg-lang", default="en", metavar="LANG", help="language to translate into")
    group.add_argument("--train-name", default="train", metavar="NAME", help="name of the training files")
    group.add_argument("--val-name", default="val", metavar="NAME", help="name of the validation files")
    group.add_argument(
        "--test-name", default="test", metavar="NAME", help="name of the test files; test is also test2016"
    )
    group.add_argument("--mirror", metavar="URL", help="second address to download Multi30k's files from")
    group.add_argument(
        "--cache-dir", metavar="DIR", help="tokenised corpora; left out: gru-for-pytorch/ in the user's cache folder"
    )
    group.add_argument(
        "-j",
        "--workers",
        type=flags.non_negative_int,
        default=10,
        help="tokenising processes at most; a small corpus takes one",
    )

    group = parser.add_argument_group(
        "training; what is left out, the recipe decides; with --evaluate, the run that made the checkpoint"
    )
    group.add_argument("--recipe", choices=sorted(RECIPES), default="tuned", help="preset of the flags of this group")
    group.add_argument("--epochs", "--epoch", type=flags.positive_int, metavar="N", help="times through the pairs")
    group.add_argument(
        "-b",
        "--batch-size",
        type=flags.positive_int,
        metavar="N",
        help=f"pairs in a batch over the devices of a node; tuned has {SHARED_BATCH} in all over several devices, and "
        f"fewer on a small corpus, so that an epoch has {ENOUGH_UPDATES} updates",
    )
    group.add_argument("--optimizer", choices=["adam", "adamw"], help="AdamW decouples the weight decay")
    group.add_argument(
        "--lr",
        "--learning-rate",
        type=flags.positive_float,
        metavar="RATE",
        help=f"peak learning rate; tuned's is that of a batch of {RECIPES['tuned']['batch_size']}, and grows with the "
        "root of a larger one, but for --performance",
    )
    group.add_argument("--weight-decay", type=flags.non_negative_float, metavar="DECAY", help="the optimizer's")
    group.add_argument("--schedule", choices=["constant", "cosine"], help="of the learning rate after the warm-up")
    group.add_argument("--warmup", type=flags.fraction, metavar="PART", help="part of the steps in which it rises")
    group.add_argument(
        "--clip", type=flags.non_negative_float, metavar="NORM", help="largest gradient norm; 0 does not clip"
    )
    group.add_argument(
        "--teacher-forcing-ratio", type=flags.fraction, metavar="P", help="probability of reading the reference"
    )
    group.add_argument("--dropout", type=flags.part, metavar="P", help="on both embeddings")
    group.add_argument("--output-dropout", type=flags.part, metavar="P", help="in front of the output layer")
    group.add_argument("--label-smoothing", type=flags.fraction, metavar="P", help="mass spread over the vocabulary")
    group.add_argument(
        "--average",
        type=flags.fraction,
        metavar="PART",
        help="validate and keep the weights' average, mostly over the last PART of the steps so far; 0: the last's",
    )
    group.add_argument(
        "--init",
        type=lambda name: FORMER_INITIALISATIONS.get(name, name),
        choices=sorted(gru.INITIALISATIONS),
        help="how weights start",
    )
    group.add_argument(
        "--update-bias",
        type=flags.decimal,
        metavar="VALUE",
        help="added to the first biases of the update gates; above 0 a state is kept longer",
    )
    group.add_argument(
        "--embeddings",
        choices=["cooccurrence", "drawn"],
        help="how words start: as drawn, or by how often two occur in the same training pairs",
    )
    group.add_argument(
        "--fixed-length",
        type=flags.zero_or_sentence_length,
        metavar="N",
        help="pad or cut to N tokens; 0 to the batch's own; with --evaluate, for the losses alone",
    )
    group.add_argument("--batching", choices=["like-length", "random"], help="which pairs share a batch")
    group.add_argument("--last-batch", choices=["keep", "drop"], help="an epoch's incomplete batch")
    group.add_argument("--best", choices=["bleu", "loss"], help="best epoch: greedy BLEU or free-running loss")
    group.add_argument("--beam-size", type=flags.positive_int, metavar="N", help="hypotheses of the final score")
    group.add_argument(
        "--length-penalty",
        type=flags.power,
        metavar="POWER",
        help="of the length that divides a hypothesis's log probability",
    )

    group = parser.add_argument_group("model; with --evaluate, the checkpoint's")
    group.add_argument("--emb-dim", type=flags.positive_int, default=256, metavar="N", help="size of the embeddings")
    group.add_argument("--hid-dim", type=flags.positive_int, default=512, metavar="N", help="size of the hidden state")

    group = parser.add_argument_group("devices")
    group.add_argument("--device", choices=["auto", *devices.KINDS], default="auto", help="auto: npu, cuda, cpu")
    group.add_argument("--npu", type=flags.non_negative_int, metavar="INDEX", help="run on this NPU")
    group.add_argument("--gpu", type=flags.non_negative_int, metavar="INDEX", help="run on this GPU")
    group.add_argument(
        "--multiprocessing-distributed", action="store_true", help="one process for each device of --device-list"
    )
    group.add_argument(
        "--device-list",
        type=flags.index_list,
        metavar="LIST",
        help="such as 0,1,2,3, one process each with --multiprocessing-distributed, else one on the first; left out: "
        "all of this machine's, on a CPU 0,..,7",
    )
    group.add_argument(
        "--max-devices", type=flags.positive_int, metavar="N", help="without --device-list, use at most N devices"
    )
    group.add_argument("--world-size", type=flags.integer, default=-1, metavar="N", help="number of nodes; -1 means 1")
    group.add_argument("--rank", type=flags.integer, default=-1, metavar="N", help="this node; -1 means 0")
    group.add_argument("--addr", default="127.0.0.1", help="address of node 0")
    group.add_argument(
        "--dist-url", metavar="URL", help="env:// or tcp://HOST:PORT; left out: MASTER_PORT or a free one"
    )
    group.add_argument("--dist-backend", choices=["hccl", "nccl", "gloo"], help="left out: the device's own")
    group.add_argument(
        "--dist-timeout",
        type=flags.positive_float,
        default=600.0,
        metavar="SECONDS",
        help="for the ranks to meet, and for each collective",
    )

    group = parser.add_argument_group("precision")
    group.add_argument("--amp", action="store_true", help="mixed precision at --opt-level; without it float32")
    group.add_argument("--opt-level", choices=precision.LEVELS, default=flags.Default("O2"), help="apex's level")
    group.add_argument(
        "--loss-scale",
        type=flags.loss_scale,
        metavar="SCALE",
        help="a number or dynamic; left out: 32 for float16 in O1 and O2, else 1",
    )
    group.add_argument(
        "--amp-dtype",
        choices=["auto", *precision.DTYPES],
        default=flags.Default("auto"),
        help="the 16-bit format; auto: float16, on a CPU bfloat16 if it is faster there; an NPU has float16 alone",
    )
    group.add_argument(
        "--amp-backend",
        choices=precision.BACKENDS,
        default=flags.Default("auto"),
        help="auto: on NPUs and GPUs apex for O2 and O3, if it is installed; else native",
    )

    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=flags.seed, default=1234, help="of weights, batches and dropout")
    group.add_argument("-p", "--print-freq", type=flags.positive_int, default=10, metavar="N", help="steps a log line")
    group.add_argument("--ckptpath", default="./seq2seq-gru-model.pth.tar", metavar="FILE", help="the best checkpoint")
    group.add_argument("--evaluate", metavar="CKPT", help="do not train: score this checkpoint on the test set")
    group.add_argument(
        "--bleu-npu",
        type=flags.non_negative_int,
        metavar="INDEX",
        help="the device that scores; left out: the first that --npu, --gpu or --device-list names, else 0",
    )
    group.add_argument(
        "--performance", action="store_true", help=f"measure speed: {PERFORMANCE_STEPS} steps or an epoch, no scoring"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of every error")

    for action in parser._actions:
        if action.dest in RECIPES["tuned"]:
            action.help += f" ({', '.join(f'{recipe}: {values[action.dest]}' for recipe, values in RECIPES.items())})"
    return parser


# Flags that --evaluate does not look at.
OF_TRAINING_ALONE = {*RECIPES["tuned"], "recipe", "emb_dim", "hid_dim", "seed", "print_freq", "ckptpath", "performance"}
OF_TRAINING_ALONE |= {"amp", "opt_level", "loss_scale", "amp_dtype", "amp_backend"}
OF_TRAINING_ALONE -= {"fixed_length", "beam_size", "length_penalty"}


def unused_to_score(parser: flags.StrictParser, args: argparse.Namespace) -> list[str]:
    """The flags that were given and have no effect with --evaluate; one with its default's value does not count."""
    return [
        action.option_strings[-1 if len(action.option_strings[0]) == 2 else 0]
        for action in parser._actions
        if action.dest in OF_TRAINING_ALONE and getattr(args, action.dest) != action.default
    ]


# ---------------------------------------------------------------- set-up


def choose_devices(args: argparse.Namespace) -> tuple[str, list[int]]:
    """The kind of device and the indices of this node's devices, one process each.

    Raises:
        UserError: usage, flags contradict each other or this machine.
    """
    given = {"npu": args.npu, "cuda": args.gpu}
    chosen = [kind for kind, index in given.items() if index is not None]
    if len(chosen) == 2 or (chosen and args.device not in ("auto", chosen[0])):
        raise UserError("usage", "two different devices", "--npu, --gpu, --device", "name the device by one of them")
    if chosen and (args.device_list or args.multiprocessing_distributed or under_torchrun()):
        raise UserError(
            "usage",
            "one device beside a list of devices or several processes",
            f"--{chosen[0]}".replace("cuda", "gpu"),
            "leave it out, and give --device-list with --multiprocessing-distributed or under torchrun",
        )
    kind = devices.choose_kind(chosen[0] if chosen else args.device)
    own = devices.BACKENDS[kind]
    if args.dist_backend not in (None, own) and (args.dist_backend, kind) != ("gloo", "cuda"):
        raise UserError("usage", f"{args.dist_backend} does not work on {kind}", "--dist-backend", f"use {own}")
    if under_torchrun():
        indices = args.device_list or list(range(int(os.environ["LOCAL_WORLD_SIZE"])))
        if len(indices) != int(os.environ["LOCAL_WORLD_SIZE"]):
            raise UserError(
                "usage",
                f"{len(indices)} devices for the {os.environ['LOCAL_WORLD_SIZE']} processes of torchrun",
                "--device-list",
                "name one device for each process, or leave the flag out",
            )
    elif chosen:
        indices = [given[kind]]
    elif args.multiprocessing_distributed:
        indices = args.device_list or list(range(devices.default_count(kind)))[: args.max_devices]
        if not args.device_list and len(indices) < (args.max_devices or 0):
            say(f"note: this machine has {len(indices)} {kind} devices, not {args.max_devices}: running on those")
    else:
        indices = (args.device_list or [0])[:1]
        if len(args.device_list or []) > 1:
            say(f"note: one process on device {indices[0]} alone; --multiprocessing-distributed takes the whole list")
    devices.check_indices(kind, indices, "--npu or --gpu" if chosen else "--device-list")
    if args.bleu_npu is None:
        args.bleu_npu = indices[0]
    devices.check_indices(kind, [args.bleu_npu], "--bleu-npu")
    if args.batch_size is not None:
        check_divisible(args.batch_size, len(indices))
    return kind, indices


def choose_precision(args: argparse.Namespace, kind: str, indices: Sequence[int]) -> precision.Choice:
    """What the flags ask for on these devices of `kind`, see `precision.choose`; the flags then say what was chosen."""
    asked = {"--opt-level": args.opt_level, "--amp-dtype": args.amp_dtype, "--amp-backend": args.amp_backend}
    level = str(args.opt_level) if args.amp else "O0"
    wanted = {"dtype": args.amp_dtype, "loss_scale": args.loss_scale, "backend": args.amp_backend}
    chosen = precision.choose(kind, level, **wanted, indices=indices)
    given = [flag for flag, value in asked.items() if not isinstance(value, flags.Default)]
    left = [] if level != "O0" else [flag for flag in given if flag != "--opt-level" or not args.amp]
    if left:  # O0 is float32, whatever else is asked for
        what = "in O0" if args.amp else "without --amp"
        chosen = dataclasses.replace(
            chosen, note=f"{' and '.join(left)} {'have' if left[1:] else 'has'} no effect {what}"
        )
    args.opt_level, args.loss_scale, args.amp_backend = chosen.level, chosen.loss_scale, chosen.backend
    args.amp_dtype = chosen.dtype_name
    return chosen


def check_divisible(batch_size: int, count: int) -> None:
    """Raises a usage UserError if a batch has not the same number of pairs for each of `count` devices."""
    if batch_size % count:
        raise UserError(
            "usage",
            f"a batch of {batch_size} cannot be shared out evenly over {count} devices",
            "--batch-size",
            f"give a multiple of {count}",
        )


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def make_worlds(args: argparse.Namespace, kind: str, indices: list[int]) -> list[devices.World]:
    """What each process of this node knows of all; under torchrun only this process's.

    Raises:
        UserError: usage, --world-size or --rank have no meaning.
    """
    local_size = len(indices)
    if under_torchrun():
        size = int(os.environ["WORLD_SIZE"])
        index = indices[int(os.environ["LOCAL_RANK"])]
        return [devices.World(int(os.environ["RANK"]), size, size // local_size, local_size, kind, index)]
    nodes = 1 if args.world_size == -1 else args.world_size
    node = 0 if args.rank == -1 else args.rank
    if nodes < 1 or not 0 <= node < nodes:
        raise UserError(
            "usage",
            f"node {node} of {nodes}",
            "--rank and --world-size",
            "nodes are counted from 1 and numbered from 0",
        )
    first = node * local_size
    return [
        devices.World(first + i, nodes * local_size, nodes, local_size, kind, index) for i, index in enumerate(indices)
    ]


def meeting_point(args: argparse.Namespace, nodes: int) -> tuple[str, int]:
    """Address and port at which the ranks meet; port 0 stands for any free one.

    Raises:
        UserError: usage, --dist-url cannot be understood, or several nodes were given no port.
    """
    addr, port = args.addr, os.environ.get("MASTER_PORT", "0")
    if args.dist_url == "env://":
        addr = os.environ.get("MASTER_ADDR", addr)
    elif args.dist_url is not None:
        scheme, _, rest = args.dist_url.partition("://")
        addr, _, port = rest.rpartition(":")
        if scheme != "tcp" or not addr:
            raise UserError("usage", f"{args.dist_url!r}", "--dist-url", "expected env:// or tcp://HOST:PORT")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UserError("usage", f"{port!r} is not a port", "--dist-url or MASTER_PORT", "give a number below 65536")
    if nodes > 1 and int(port) == 0:
        raise UserError(
            "usage", "several nodes need a port that all know", "--dist-url", f"give tcp://{addr}:29500 on every node"
        )
    return addr, int(port)


def load_corpus(args: argparse.Namespace, *, verify: bool = True, log: Callable[[str], None] = say) -> data.Corpus:
    """The corpus that the flags name; see `data.load`."""
    if args.data_dir is None:
        log("note: no --data-dir was given: using the bundled sample corpus")
    return data.load(
        SAMPLE if args.data_dir is None else args.data_dir,
        src_lang=args.src_lang,
        trg_lang=args.trg_lang,
        train_name=args.train_name,
        val_name=args.val_name,
        test_name=args.test_name,
        workers=args.workers,
        cache_dir=args.cache_dir,
        mirror=args.mirror,
        verify=verify,
        log=log,
    )


def resolve_recipe(args: argparse.Namespace, pairs: int, world: devices.World) -> None:
    """Fills in the flags that were left to the recipe.

    Args:
        args: the flags; changed in place.
        pairs: pairs in the training data.
        world: any rank's.
    """
    if args.performance:
        args.epochs = args.epochs or 1
        args.batch_size = args.batch_size or PERFORMANCE_BATCH[world.kind] * world.local_size
    elif args.batch_size is None and args.recipe == "tuned":
        args.batch_size = tuned_batch(pairs, world.nodes, world.local_size)
    elif args.batch_size is None:
        args.batch_size = RECIPES[args.recipe]["batch_size"] // world.nodes  # a recipe's batch is that of all nodes
    check_divisible(args.batch_size, world.local_size)
    args.batch_size = min(args.batch_size, math.ceil(pairs / world.nodes))
    # The few steps of a performance run are not there to learn, whatever its batch is.
    if args.lr is None and args.recipe == "tuned" and not args.performance:
        args.lr = tuned_rate(args.batch_size * world.nodes)
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def tuned_batch(pairs: int, nodes: int, local_size: int) -> int:
    """The batch of a node: in total 64, on several devices 128, or less where an epoch would have too few updates.

    Where the ranks cannot share that out evenly it is the next smaller batch that they can, or one pair for each.

    >>> tuned_batch(29000, 1, 1), tuned_batch(29000, 1, 8), tuned_batch(4000, 1, 8)
    (64, 128, 32)
    """
    total = RECIPES["tuned"]["batch_size"] if nodes * local_size == 1 else SHARED_BATCH
    while total > 1 and math.ceil(pairs / total) < ENOUGH_UPDATES:
        total //= 2
    return max(total // nodes // local_size, 1) * local_size


def tuned_rate(batch: int) -> float:
    """The peak learning rate for a batch, counted over all devices: above 64 it grows as the batch's root.

    With Adam, that keeps what the gradients' noise does to the weights: Malladi, Lyu, Panigrahi and Arora 2022, "On
    the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv 2205.10287.

    >>> tuned_rate(32), tuned_rate(64), tuned_rate(256)
    (0.003, 0.003, 0.006)
    """
    recipe = RECIPES["tuned"]
    return recipe["lr"] * math.sqrt(max(1.0, batch / recipe["batch_size"]))


def describe(args: argparse.Namespace, world: devices.World, chosen: precision.Choice, corpus: data.Corpus) -> None:
    """Prints what is about to run."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "spacy", "torchtext")}
    for name in ("torch_npu", "apex"):  # not always installed in a way that leaves metadata
        if name in sys.modules:
            versions[name] = getattr(sys.modules[name], "__version__", "unknown")
    facts = {
        "device": world.kind,
        "processes": world.size,
        "nodes": world.nodes,
        "batch": args.batch_size * world.nodes,
        "batch_per_device": f"{args.batch_size / world.local_size:g}",
        "precision": chosen.name,
        "amp_backend": chosen.backend,
        "loss_scale": chosen.loss_scale,
        "recipe": args.recipe,
        "seed": args.seed,
        "python": platform.python_version(),
    }
    say("run: " + " ".join(f"{key}={value}" for key, value in (facts | versions).items()))
    say(f"device: {world.describe(args.dist_backend, args.dist_timeout)}")
    hidden = ("data_dir", "evaluate", "debug")
    say("flags: " + " ".join(f"{key}={value}" for key, value in sorted(vars(args).items()) if key not in hidden))
    say(
        f"data: {len(corpus.train)} training, {len(corpus.val)} validation, {len(corpus.test)} test pairs; "
        f"{len(corpus.src_vocab)} {corpus.src_lang} and {len(corpus.trg_vocab)} {corpus.trg_lang} types"
    )
    for note in corpus.notes:
        say(printable(note))
    if chosen.note:
        say(printable(f"note: {chosen.note}"))
    # Of float16 elsewhere it is not known; the published run, on NPUs, learned.
    short = chosen.dtype is torch.bfloat16 or (chosen.dtype is torch.float16 and world.kind == "cpu")
    if args.fixed_length and short and not args.performance:
        say(
            f"note: {chosen.dtype_name} has too few digits to carry a sentence through the padding of "
            "--fixed-length, and the encoder may never learn to; float32 does: "
            "without --amp, or --precision_mode=must_keep_origin_dtype"
        )


# ---------------------------------------------------------------- training


def first_model(args: argparse.Namespace, world: devices.World, corpus: data.Corpus) -> gru.Seq2Seq:
    """The model before its first step, on the CPU. What the words start with is counted by rank 0 alone."""
    torch.manual_seed(args.seed)
    model = gru.build(
        len(corpus.src_vocab),
        len(corpus.trg_vocab),
        emb_dim=args.emb_dim,
        hid_dim=args.hid_dim,
        dropout=args.dropout,
        output_dropout=args.output_dropout,
    )
    gru.INITIALISATIONS[args.init](model)
    gru.raise_update_gates(model, args.update_bias)
    if args.embeddings == "cooccurrence" and world.is_main:
        sides = [(side.ids, side.offsets) for side in (corpus.train.src, corpus.train.trg)]
        types = len(corpus.src_vocab), len(corpus.trg_vocab)
        gru.use_vectors(model, *cooccurrence.embeddings(*sides, *types, args.emb_dim))
    return model


def train(
    args: argparse.Namespace,
    chosen: precision.Choice,
    world: devices.World,
    corpus: data.Corpus,
    model: gru.Seq2Seq,
) -> None:
    """One rank's training, from the first step to the best checkpoint.

    Args:
        args: the flags, recipe resolved.
        chosen: the precision.
        world: the ranks.
        corpus: the data.
        model: as `first_model` makes it; rank 0's weights are all ranks'.
    """
    device = world.device
    model.to(device)
    world.copy_from_main(model.parameters())
    torch.manual_seed(args.seed + world.rank)  # from here on, for dropout: the ranks drop different positions

    if world.is_main:
        describe(args, world, chosen, corpus)
        say(f"model: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    settings = precision.OptimizerSettings(args.optimizer, args.lr, args.weight_decay)
    precise = precision.start(chosen, model, device, settings)
    average = WeightAverage(precise, args.average)
    criterion = world.parallel(gru.TrainingLoss(precise.working_model, args.label_smoothing))
    keeper = BestKeeper(args, world, corpus)
    loader = data.Loader(corpus.train, device, fixed_length=args.fixed_length)

    total_steps = args.epochs * len(EpochPlan(args, world, corpus, epoch=0))
    step = 0
    for epoch in range(args.epochs):
        criterion.train()
        batches = EpochPlan(args, world, corpus, epoch)
        log = EpochLog(world, epoch, args.epochs, len(batches), step, args.print_freq)
        for indices in batches:
            # 1. this rank's pairs
            share = data.rank_share(indices, world.rank, world.size)
            batch = loader(share)
            log.data_ready()

            # 2. the loss: the mean over the targets of all ranks
            random.seed(f"{args.seed} {step}")  # teacher forcing: ranks draw alike, however long their sentences are
            with precise.forward_context():
                loss_sum = criterion(batch, args.teacher_forcing_ratio)
            count = loss_sum.new_full((), batch.target_tokens)
            totals = world.sum(torch.stack((loss_sum.detach(), count)))  # [2]
            loss = loss_sum * (world.size / totals[1])  # DDP will divide the gradients by the world's size

            # 3. the update
            rate = learning_rate(args, step, total_steps)
            for group in precise.optimizer.param_groups:
                group["lr"] = rate
            precise.backward(loss)
            precise.step(args.clip)
            step += 1
            average.update(step)
            log.step_done(totals, len(indices))

        pairs_per_second, mean_loss = log.finish()
        precise.refresh_model()
        if world.is_main:
            say(f"* FPS@all {pairs_per_second:.3f}")
        if (skipped := precise.skipped_steps()) and world.is_main:
            say(
                f"note: {skipped} of {len(batches)} steps changed no weight: their gradients were not finite. "
                "If that goes on, lower --loss-scale or --lr, or give --loss-scale dynamic."
            )
        if not args.performance:
            average.catch_up(step)
            keeper.validate(average.model, epoch, mean_loss, rate)


class EpochPlan:
    """The steps of one epoch; a performance run goes round again until it has enough.

    Iterating gives the indices of the pairs of each step, over all ranks, each [batch] int64.
    """

    def __init__(self, args: argparse.Namespace, world: devices.World, corpus: data.Corpus, epoch: int):
        self._args, self._world, self._corpus, self._epoch = args, world, corpus, epoch
        self._steps = len(self._round(0))
        if args.performance:
            self._steps = max(self._steps, PERFORMANCE_STEPS)

    def _round(self, number: int) -> data.EpochBatches:
        return data.epoch_batches(
            self._corpus.train,
            self._args.batch_size * self._world.nodes,
            seed=self._args.seed,
            epoch=self._epoch + number,
            like_length=self._args.batching == "like-length",
            drop_last=self._args.last_batch == "drop",
        )

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        rounds = itertools.chain.from_iterable(map(self._round, itertools.count()))
        return itertools.islice(rounds, self._steps)


def learning_rate(args: argparse.Namespace, step: int, total_steps: int) -> float:
    """The rate of a step: a linear rise, then constant or a cosine's fall to 0 (Loshchilov and Hutter 2017).

    Args:
        args: the flags; lr, warmup and schedule are read.
        step: counted from 0 over the whole run.
        total_steps: of the run.

    >>> args = argparse.Namespace(lr=1.0, warmup=0.2, schedule="cosine")
    >>> [round(learning_rate(args, step, 10), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warmup_steps = int(args.warmup * total_steps)
    if step < warmup_steps:
        return args.lr * (step + 1) / warmup_steps
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


class BestKeeper:
    """Validates after each epoch, and keeps the best weights on disk.

    Args:
        args: the flags.
        world: the ranks; all validate, rank 0 decides and writes.
        corpus: the data.
    """

    def __init__(self, args: argparse.Namespace, world: devices.World, corpus: data.Corpus):
        self._args, self._world, self._corpus = args, world, corpus
        self._path = Path(args.ckptpath)
        self._best = -math.inf

    def validate(self, model: gru.Seq2Seq, epoch: int, train_loss: float, rate: float) -> None:
        """Scores the model on the validation pairs, prints the figures, and saves it if it is the best so far.

        Args:
            model: the fp32 model.
            epoch: the epoch that has ended, from 0.
            train_loss: its mean training loss.
            rate: its last learning rate.

        Raises:
            UserError: diverged, a loss is not finite; on every rank.
        """
        args, world, val = self._args, self._world, self._corpus.val
        model.eval()
        losses = [
            scoring.mean_loss(model, val, world, teacher_forcing_ratio=ratio, fixed_length=args.fixed_length)
            for ratio in (1.0, 0.0)
        ]
        if not all(map(math.isfinite, (train_loss, *losses))):
            raise UserError(
                "diverged",
                f"the training loss is {train_loss}, the validation losses are {losses[0]} and {losses[1]}",
                f"epoch {epoch}",
                "lower --lr, or --loss-scale if one is in use; the best checkpoint of the epochs before is kept",
            )
        translations = scoring.translate(model, val.src, self._corpus.trg_vocab, world)
        if not world.is_main:
            return
        references = val.references
        bleu = scoring.evaluate(translations, references).bleu
        forced, free = losses
        say(
            f"validation: epoch {epoch}  train loss {train_loss:.4f}  "
            f"loss {forced:.4f} (perplexity {scoring.perplexity(forced):.2f})  "
            f"free-running loss {free:.4f} (perplexity {scoring.perplexity(free):.2f})  "
            f"greedy BLEU {bleu:.4f}  learning rate {rate:.2e}"
        )
        for index in (0, len(val) // 2):
            say(printable(f"  source     {' '.join(val.src_tokens[index])}"))
            say(printable(f"  reference  {' '.join(references[index])}"))
            say(printable(f"  model      {' '.join(translations[index])}"))
        merit = bleu if args.best == "bleu" else -free
        if merit > self._best:
            if self._best == -math.inf and (previous := checkpoint.set_aside(self._path)):
                say(f"note: {self._path} was there already: the old one is now {previous.name}")
            self._best = merit
            scores = {"epoch": epoch, "bleu": bleu, "loss": forced, "free_running_loss": free}
            checkpoint.save(self._path, self._checkpoint(model, scores))
            say(f"saved: {self._path} (the best so far)")

    def _checkpoint(self, model: gru.Seq2Seq, scores: dict) -> checkpoint.Checkpoint:
        corpus = self._corpus
        return checkpoint.Checkpoint(
            state_dict={name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()},
            sizes={
                "input_dim": len(corpus.src_vocab),
                "output_dim": len(corpus.trg_vocab),
                "emb_dim": self._args.emb_dim,
                "hid_dim": self._args.hid_dim,
            },
            src_vocab=corpus.src_vocab.itos,
            trg_vocab=corpus.trg_vocab.itos,
            flags=vars(self._args),
            scores=scores,
            about={
                "src_lang": corpus.src_lang,
                "trg_lang": corpus.trg_lang,
                "data": corpus.fingerprint,
                "torch": str(torch.__version__),
                "world_size": self._world.size,
            },
        )


# ---------------------------------------------------------------- scoring


def score(args: argparse.Namespace, kind: str, path: Path, saved: checkpoint.Checkpoint, corpus: data.Corpus) -> None:
    """Translates the test set with a checkpoint and prints its BLEU.

    Args:
        args: the flags; `--bleu-npu` says on which device.
        kind: that device's kind.
        path: where the checkpoint was read from.
        saved: the checkpoint.
        corpus: the data, whose test pairs are used.
    """
    src_vocab, trg_vocab = vocabularies(saved, corpus, str(path))
    world = devices.World(kind=kind, index=args.bleu_npu)
    world.start()
    model = saved.build_model(world.device)
    test = corpus.test
    own = data.Split(*map(data.Side.encode, (test.src_tokens, test.trg_tokens), (src_vocab, trg_vocab)))
    where = f"{kind} {args.bleu_npu} ({world.describe(None, 0)})"
    fixed_length, beam_size, length_penalty = (
        setting_to_score(args, saved, name) for name in ("fixed_length", "beam_size", "length_penalty")
    )
    if beam_size > len(trg_vocab):
        say(f"note: the beam is {len(trg_vocab)} wide, not {beam_size}: the target language has no more types")
        beam_size = len(trg_vocab)
    say(f"scored: {path} on {len(test)} test pairs, in float32, on {where}")
    say(f"losses: {f'padded or cut to {fixed_length} tokens' if fixed_length else 'without padding'}")
    for name, ratio in (("loss", 1.0), ("free-running loss", 0.0)):
        loss = scoring.mean_loss(model, own, world, teacher_forcing_ratio=ratio, fixed_length=fixed_length)
        say(f"test {name} {loss:.4f} (perplexity {scoring.perplexity(loss):.2f})")
    if beam_size > 1:
        say(f"length penalty of the beam: {length_penalty:g}")
    references = test.references
    for size in sorted({1, beam_size}):
        found = scoring.translate(model, own.src, trg_vocab, world, beam_size=size, length_penalty=length_penalty)
        scores = scoring.evaluate(found, references)
        decoding = "greedy" if size == 1 else f"beam of {size}"
        say(f"{decoding}: BLEU {scores.bleu:.4f}  sacreBLEU {scores.sacrebleu:.4f}  chrF {scores.chrf:.4f}")
    say(f"chrF = {scores.chrf:.4f} ({scores.chrf_signature})")
    say(f"sacreBLEU = {scores.sacrebleu:.4f} ({scores.sacrebleu_signature})")
    say(f"BLEU score = {scores.bleu:.4f}")


def setting_to_score(args: argparse.Namespace, saved: checkpoint.Checkpoint, name: str) -> int | float:
    """The flag's value; left out, that of the run that made the checkpoint; else, as the original's, modelzoo's."""
    given = getattr(args, name)
    return saved.flags.get(name, RECIPES["modelzoo"][name]) if given is None else given


def vocabularies(
    saved: checkpoint.Checkpoint, corpus: data.Corpus, where: str
) -> tuple[data.Vocabulary, data.Vocabulary]:
    """The vocabularies to use a checkpoint with: its own, or for one without any, the data's if they fit.

    Raises:
        UserError: checkpoint, they do not fit.
    """
    if saved.src_vocab is None or saved.trg_vocab is None:
        sizes = [saved.sizes["input_dim"], saved.sizes["output_dim"]]
        there = [len(corpus.src_vocab), len(corpus.trg_vocab)]
        if sizes != there:
            raise UserError(
                "checkpoint",
                f"it has no vocabulary and was trained with {sizes} types, this data has {there}",
                where,
                "give the data that it was trained on with --data-dir; ids shift between versions of spaCy",
            )
        return corpus.src_vocab, corpus.trg_vocab
    languages = [saved.about["src_lang"], saved.about["trg_lang"]]
    if languages != [corpus.src_lang, corpus.trg_lang]:
        raise UserError(
            "checkpoint",
            f"it translates {languages[0]} to {languages[1]}, the data is {corpus.src_lang} and {corpus.trg_lang}",
            where,
            f"give --src-lang {languages[0]} --trg-lang {languages[1]} and such data",
        )
    return data.Vocabulary(saved.src_vocab), data.Vocabulary(saved.trg_vocab)


# ---------------------------------------------------------------- processes


def run_rank(
    index: int,
    args: argparse.Namespace,
    chosen: precision.Choice,
    worlds: list[devices.World],
    meeting: tuple[str, int] | None,
    corpus: data.Corpus | None = None,
) -> None:
    """The life of one process that trains: meets the others, if there are any, trains, leaves.

    Args:
        index: which of `worlds` is this process's.
        args: the flags, recipe resolved.
        chosen: the precision.
        worlds: this node's.
        meeting: where the ranks meet; None for one process, and under torchrun, whose environment says.
        corpus: the data; None in a spawned process, which reads it from the cache that its parent has built.
    """
    world = worlds[index]
    if not world.is_main:
        # Rank 0 alone writes the log; apex and torch_npu print lines of their own on every rank.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end of the process)
    # All that takes time comes before the group is made: the others wait in it no longer than HCCL allows.
    corpus = corpus or load_corpus(args, verify=False, log=lambda line: None)
    if world.kind != "cpu":
        corpus.check_ids()
    model = first_model(args, world, corpus)
    store = launch.join_store(*meeting, args.dist_timeout) if meeting and world.size > 1 else None
    world.start(backend=args.dist_backend, timeout=args.dist_timeout, store=store)
    train(args, chosen, world, corpus, model)
    world.stop()


def main(argv: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    unused = unused_to_score(parser, args) if args.evaluate else []
    kind, indices = choose_devices(args)
    worlds = make_worlds(args, kind, indices)
    is_main = worlds[0].is_main
    chosen = None if args.evaluate else choose_precision(args, kind, indices)  # scoring is in float32
    meeting = meeting_point(args, worlds[0].nodes)
    if is_main and unused:
        say(f"note: no effect with --evaluate: {', '.join(unused)}")
    with contextlib.ExitStack() as held:
        if is_main and not (args.evaluate or args.performance):
            held.enter_context(checkpoint.claimed(Path(args.ckptpath)))
        run(args, chosen, worlds, meeting)


def run(
    args: argparse.Namespace,
    chosen: precision.Choice | None,
    worlds: list[devices.World],
    meeting: tuple[str, int],
) -> None:
    """Trains and scores, or only scores.

    Args:
        args: the flags.
        chosen: the precision to train in.
        worlds: this node's processes; under torchrun, this one.
        meeting: address and port at which spawned ranks meet.
    """
    is_main, kind = worlds[0].is_main, worlds[0].kind
    left_open = args.device == "auto" and args.npu is None and args.gpu is None
    saved = checkpoint.load(args.evaluate) if args.evaluate else None  # before a download, or long tokenising
    if is_main and left_open and (reason := devices.passed_over(kind)):
        say(printable(f"note: torch_npu is installed, but there is no NPU to run on: {reason}; running on {kind}"))
    corpus = load_corpus(args, log=say if is_main else lambda line: None)

    if args.evaluate:
        if is_main:
            for note in corpus.notes:
                say(printable(note))
            score(args, kind, Path(args.evaluate), saved, corpus)
        return

    start = time.monotonic()
    resolve_recipe(args, len(corpus.train), worlds[0])
    if not under_torchrun() and (args.multiprocessing_distributed or worlds[0].nodes > 1):
        train_in_processes(args, chosen, worlds, meeting)
    else:
        run_rank(0, args, chosen, worlds, None, corpus)
    if is_main and not args.performance:
        path = Path(args.ckptpath)
        score(args, kind, path, checkpoint.load(path), corpus)
        say(f"done: {time.monotonic() - start:.0f} s")


def train_in_processes(
    args: argparse.Namespace, chosen: precision.Choice, worlds: list[devices.World], meeting: tuple[str, int]
) -> None:
    """Spawns this node's processes and waits for them; node 0's parent is where all meet."""
    addr, port = meeting
    if worlds[0].is_main and worlds[0].size > 1:
        store = launch.host_store(addr, port, worlds[0].nodes)
        port = store.port
    launch.launch(run_rank, len(worlds), (args, chosen, worlds, (addr, port)), args.debug)


if __name__ == "__main__":
    exit_code = run_main(main, sys.argv[1:])
    if under_torchrun():
        launch.leave(exit_code)
    sys.exit(exit_code)
