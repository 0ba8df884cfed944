"""Trains one GRU encoder-decoder to translate, on one device or on eight, and scores it.

One device (an NPU if there is one, then a GPU, then the CPU), on the bundled sample or on Multi30k:

    python3 train_8p.py
    python3 train_8p.py --data-dir DIR --amp

One process for each device of this machine, or eight processes on its CPU:

    python3 train_8p.py --data-dir DIR --amp --multiprocessing-distributed
    torchrun --nproc-per-node 8 train_8p.py --data-dir DIR --amp

Two machines with eight devices each. The address of the first one is 10.0.0.1:

    python3 train_8p.py ... --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://10.0.0.1:29500
    python3 train_8p.py ... --multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://10.0.0.1:29500

A run that was stopped or killed goes on:

    python3 train_8p.py --data-dir DIR --amp --resume auto

The score of a checkpoint on the test set:

    python3 train_8p.py --data-dir DIR --evaluate seq2seq-gru-model.pth.tar

From top to bottom: the settings, `main`, `run`, `run_rank`, `train` with the loop and what belongs to it. At last comes
what a run starts with: its data, its first weights, its settings.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
import random
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # with PYTHONSAFEPATH=1
    sys.path.insert(0, HERE)

from nmt import config, flags
from nmt.errors import UserError, prepare_imports, run_main, telling_memory
from nmt.signals import end_imports_at_sigterm, end_with_parent
from nmt.storage import real, replacing, state_path

SAMPLE = Path(__file__).resolve().parent / "sample"
ENOUGH_UPDATES = 100  # `tuned` lowers its batch until an epoch has so many
SHARED_BATCH = 128  # `tuned`'s total on several devices: the largest that keeps the BLEU of 64 (docs/search.md)
PERFORMANCE_STEPS = 25
PROFILED = (6, 10)
PERFORMANCE_BATCH = {"npu": 1536, "cuda": 1536, "cpu": 128}  # pairs a device

# ---------------------------------------------------------------- the settings

COMMON = "common flags"
DATA = "advanced: data"
TRAINING = "advanced: training and scoring; what is left out, the recipe sets"
MODEL = "advanced: model"
PROCESSES = "advanced: devices and processes"
PRECISION = "advanced: precision"
RUN = "advanced: log and errors"


FORMER_INITIALISATIONS = {"modelzoo": "normal", "tuned": "orthogonal"}  # in older commands, logs and checkpoints
INITIALISATIONS = flags.Choices(("normal", "orthogonal"), FORMER_INITIALISATIONS)


def of_recipe(modelzoo: Any, tuned: Any, takes: Any, help: str, *, group=TRAINING, trains=True, **about: Any) -> Any:
    """A row whose value the recipe sets where the flag is left out: a column for each recipe. See `flags.row`."""
    return flags.row(group, {"modelzoo": modelzoo, "tuned": tuned}, takes, help, trains=trains, **about)


@dataclass(frozen=True)
class Settings:
    """All that a run can be told: each row is an attribute and its flag.

    `modelzoo` has the published settings. Unlike the original, it ends a source at its `<eos>`. docs/results.md says
    what to expect of it. `tuned` is the best that this architecture does in as many epochs. docs/search.md says what
    each piece of it gives. `flags.row` says what a row holds.

    As the flags give them, settings that the recipe or the device decides may be None, and `batch_size` is that of a
    node. `resolved` fills them in, and makes `batch_size` that of all devices.
    """

    # fmt: off
    data_dir: str | None = flags.row(COMMON, None, "DIR",
        "folder of the corpus: it holds multi30k/ or the six files; left out: the sample corpus")
    recipe: str = flags.row(COMMON, "tuned", ("modelzoo", "tuned"),
        "preset of the flags of training and scoring", trains=True)
    epochs: int = of_recipe(10, 10, flags.positive_int,
        "times through the training pairs", group=COMMON, also="--epoch")
    batch_size: int = of_recipe(512, 64, flags.positive_int,
        f"pairs in a batch, over the devices of a node; tuned takes {SHARED_BATCH} in total on several devices, "
        f"and fewer on a small corpus, so that an epoch has {ENOUGH_UPDATES} updates", group=COMMON, also="-b")
    lr: float = of_recipe(0.003, 0.003, flags.positive_float,
        "peak learning rate; tuned raises it with the root of a batch above 64, except with --performance",
        group=COMMON, also="--learning-rate", unit="RATE")
    amp: bool = flags.row(COMMON, False, None,
        "train in mixed precision, at --opt-level; otherwise in float32", trains=True)
    device: str = flags.row(COMMON, "auto", ("auto", "npu", "cuda", "cpu"),
        "where to run; auto: npu, then cuda, then cpu")
    multiprocessing_distributed: bool = flags.row(COMMON, False, None,
        "start one process for each device of --device-list")
    performance: bool = flags.row(COMMON, False, None,
        f"measure speed: an epoch of at least {PERFORMANCE_STEPS} steps, without scoring; its batch is 1536 a device, "
        "on a CPU 128 a process, unless --batch-size is given", trains=True)
    evaluate: str | None = flags.row(COMMON, None, "CKPT", "do not train: score this checkpoint on the test set")
    ckptpath: str = flags.row(COMMON, "./seq2seq-gru-model.pth.tar", "FILE", "the best checkpoint", trains=True)
    seed: int = flags.row(COMMON, 1234, flags.seed, "seed of weights, batches and dropout", trains=True)
    resume: str | None = flags.row(COMMON, None, "FILE",
        "go on with the run whose state is FILE; auto: CKPTPATH.state, or a new run if there is none; "
        "flags that are left out are those of the run", trains=True)
    config: str | None = flags.row(COMMON, None, "FILE",
        "take the flags of this TOML file, such as CKPTPATH.toml of another run; the command line wins over it")
    overwrite: bool = flags.row(COMMON, False, None,
        "remove what an earlier run left at --ckptpath; left out: it is kept as CKPTPATH.previous", trains=True)

    src_lang: str = flags.row(DATA, "de", "LANG", "language to translate from")
    trg_lang: str = flags.row(DATA, "en", "LANG", "language to translate into")
    train_name: str = flags.row(DATA, "train", "NAME", "name of the training files")
    val_name: str = flags.row(DATA, "val", "NAME", "name of the validation files")
    test_name: str = flags.row(DATA, "test", "NAME", "name of the test files; test also finds test2016")
    mirror: str | None = flags.row(DATA, None, "URL", "second address to download Multi30k's files from")
    cache_dir: str | None = flags.row(DATA, None, "DIR",
        "folder of tokenised corpora; left out: gru-for-pytorch/ in the user's cache folder")
    min_freq: int = flags.row(DATA, 2, flags.positive_int,
        "how often a word must stand in train to be in the vocabulary")
    case: str = flags.row(DATA, "lower", flags.CASES,
        "keep: words and translations have capitals; scores are of lower case, and cased ones stand beside them")
    val_split: int = flags.row(DATA, 0, flags.non_negative_int,
        "where there are no validation or test files, take so many pairs out of train for each; which ones, the text "
        "alone decides; files that are there are used; 0: all six must be there", unit="PAIRS")
    write_split: str | None = flags.row(DATA, None, "DIR",
        "write the text of train, val and test into this new folder, to see what --val-split took")
    tokenizer: str = flags.row(DATA, "spacy", flags.TOKENIZERS,
        "what splits a line into words: spacy: the rules of its languages; space: the text is tokenised already, in "
        "any language")
    subword: int = flags.row(DATA, 0, flags.non_negative_int,
        "spell the words of each language with so many pieces, learned from train by sentencepiece; 0: whole words")
    bpe_dropout: float = flags.row(DATA, 0.0, flags.part,
        "with --subword: probability that a join of two pieces is left out in training; each epoch draws anew",
        trains=True)
    max_vocab: int = flags.row(DATA, 0, flags.non_negative_int,
        "most words of each language in its vocabulary, the most frequent ones; 0: all that --min-freq leaves")
    workers: int = flags.row(DATA, 10, flags.non_negative_int,
        "most processes that tokenise; a small corpus takes one", also="-j")

    # modelzoo, tuned
    schedule: str = of_recipe("constant", "cosine", ("constant", "cosine"), "learning rate after the warm-up")
    warmup: float = of_recipe(0.0, 0.1, flags.fraction, "part of the steps in which the learning rate rises")
    clip: float = of_recipe(0.0, 1.0, flags.non_negative_float, "largest norm of the gradients; 0 does not clip")
    teacher_forcing_ratio: float = of_recipe(0.5, 1.0, flags.fraction, "probability that a step reads the reference")
    dropout: float = of_recipe(0.5, 0.5, flags.part, "dropout on both embeddings")
    output_dropout: float = of_recipe(0.0, 0.2, flags.part, "dropout in front of the output layer")
    label_smoothing: float = of_recipe(0.0, 0.1, flags.fraction, "probability mass spread over the vocabulary")
    average: float = of_recipe(0.0, 0.2, flags.fraction,
        "validate and keep an average of the weights, mostly over this last part of the steps; 0: the last weights")
    init: str = of_recipe("normal", "orthogonal", INITIALISATIONS, "how weights start")
    update_bias: float = of_recipe(0.0, 1.0, flags.decimal,
        "added to the first biases of the update gates; above 0 a state is kept longer")
    embeddings: str = of_recipe("drawn", "cooccurrence", ("cooccurrence", "drawn"),
        "how word vectors start: drawn, or by how often two words share a training pair")
    fixed_length: int = of_recipe(0, 0, flags.zero_or_sentence_length,
        "pad or cut to so many tokens, and read the padding, as the original did with 46; 0: a sentence ends at its "
        "<eos>; in a score it changes the losses, not BLEU", trains=False)
    batching: str = of_recipe("random", "like-length", ("like-length", "random"), "which pairs share a batch")
    last_batch: str = of_recipe("drop", "keep", ("keep", "drop"), "what becomes of an epoch's incomplete batch")
    best: str = of_recipe("loss", "bleu", ("bleu", "loss"),
        "the best epoch is that of greedy BLEU or free-running loss")
    patience: int = flags.row(TRAINING, 0, flags.non_negative_int,
        "end the training after so many epochs in a row without a better validation; 0: never; the learning rate still "
        "falls as over all --epochs", trains=True)
    accumulate: int = flags.row(TRAINING, 1, flags.positive_int,
        "compute each update in so many parts of its batch, one after the other: less memory, the same loss",
        trains=True)
    beam_size: int = of_recipe(1, 10, flags.positive_int, "hypotheses in the beam of the final score", trains=False)
    length_penalty: float = of_recipe(1.0, 1.2, flags.power,
        "a hypothesis's log probability is divided by its length to this power", trains=False, unit="POWER")
    max_length: int | None = flags.row(TRAINING, None, flags.translation_length,
        "most tokens of a translation; left out: 50, or as many as the longest source or reference has above that")

    emb_dim: int = flags.row(MODEL, 256, flags.size, "size of the embeddings", trains=True)
    hid_dim: int = flags.row(MODEL, 512, flags.size, "size of the hidden states", trains=True)

    npu: int | None = flags.row(PROCESSES, None, flags.non_negative_int, "run on the NPU of this index", unit="INDEX")
    gpu: int | None = flags.row(PROCESSES, None, flags.non_negative_int, "run on the GPU of this index", unit="INDEX")
    device_list: list[int] | None = flags.row(PROCESSES, None, flags.index_list,
        "indices such as 0,1,2,3: with --multiprocessing-distributed one process each, otherwise one process on the "
        "first; left out: all of this machine's devices, on a CPU 0,..,7")
    max_devices: int | None = flags.row(PROCESSES, None, flags.positive_int,
        "without --device-list, use at most so many devices")
    device_id: str | None = flags.row(PROCESSES, None, flags.device_id,
        "index of the NPU or GPU of a run in one process, where no flag above names one; npu:N is for an NPU alone; a "
        "CPU has no index", unit="N")
    world_size: int = flags.row(PROCESSES, -1, flags.integer, "number of nodes; -1 means 1")
    rank: int = flags.row(PROCESSES, -1, flags.integer, "number of this node; -1 means 0")
    addr: str = flags.row(PROCESSES, "127.0.0.1", "HOST", "address of node 0")
    dist_url: str | None = flags.row(PROCESSES, None, "URL",
        "env:// or tcp://HOST:PORT; left out: MASTER_PORT or a free port")
    dist_backend: str | None = flags.row(PROCESSES, None, ("hccl", "nccl", "gloo"),
        "how the ranks talk; left out: the device's own backend")
    dist_timeout: float = flags.row(PROCESSES, 600.0, flags.seconds,
        "seconds that the ranks wait for each other when they meet, and in each collective", unit="SECONDS")
    bleu_npu: int | None = flags.row(PROCESSES, None, flags.non_negative_int,
        "index of the device that scores; left out: the first that --npu, --gpu or --device-list names, otherwise 0",
        unit="INDEX")

    opt_level: str = flags.row(PRECISION, flags.Default("O2"), ("O0", "O1", "O2", "O3"),
        "level of mixed precision, as in apex", trains=True)
    loss_scale: float | str = flags.row(PRECISION, None, flags.loss_scale,
        "a number or dynamic; left out: 32 for float16 in O1 and O2, otherwise 1", trains=True, unit="SCALE")
    amp_dtype: str = flags.row(PRECISION, flags.Default("auto"), ("auto", "float16", "bfloat16"),
        "the 16-bit format; auto: float16, on a CPU bfloat16 if it is faster there; an NPU has float16 alone",
        trains=True)
    amp_backend: str = flags.row(PRECISION, flags.Default("auto"), ("auto", "apex", "native"),
        "auto: apex for O2 and O3 on NPUs and GPUs, if it is installed, otherwise native", trains=True)
    compile_loss: bool = flags.row(PRECISION, False, None,
        "let torch.compile make the loss's softmax: fewer passes over a GPU's memory, some seconds more at the start",
        trains=True)

    save_every: float = flags.row(RUN, 5.0, flags.positive_float,
        "minutes between two times that the run's state is saved, beside the ends of epochs", trains=True,
        unit="MINUTES")
    print_freq: int = flags.row(RUN, 10, flags.positive_int,
        "steps between two lines of the log", also="-p", trains=True)
    record: str | None = flags.row(RUN, None, "DIR",
        "write metrics.jsonl and curves.png there too; without it they stand beside the checkpoint alone", trains=True)
    tensorboard: str | None = flags.row(RUN, None, "DIR",
        "write figures and sample translations there for TensorBoard", trains=True)
    profile: str | None = flags.row(RUN, None, "DIR",
        f"profile steps {PROFILED[0]} to {PROFILED[1]}: a trace for TensorBoard and Perfetto, and the most expensive "
        "operators", trains=True)
    debug: bool = flags.row(RUN, False, None, "show the traceback of every error")
    # fmt: on

    def named(self, names: str) -> dict[str, Any]:
        """Some settings by their names, as arguments for a function."""
        return {name: getattr(self, name) for name in names.split()}


RECIPES = {name: flags.values_of_recipe(Settings, name) for name in ("modelzoo", "tuned")}
# What a resumed run does not take from its first command, because it belongs to the process or to the file.
OF_THE_COMMAND = (
    "ckptpath",
    "resume",
    "config",
    "overwrite",
    "evaluate",
    "debug",
    "rank",
    "addr",
    "dist_url",
    "profile",
    "write_split",
)
# What is in no file of flags that a run writes: it belongs to a process, or says where else a run writes.
OF_NO_CONFIG = tuple({*OF_THE_COMMAND, "device_id", "record", "tensorboard", "profile"} - {"ckptpath"})
# What only training reads, and what does not change its numbers. The rest of it decides on them, and these do too:
INDIFFERENT = ("recipe", "amp", "performance", "ckptpath", "resume", "overwrite", "save_every", "print_freq")
OF_WHOLE_WORDS = ("min_freq", "max_vocab")
OF_THE_WORDS = ("min_freq", "case", "tokenizer", "subword", "max_vocab")
DECISIVE = ("src_lang", "trg_lang", "fixed_length", "max_length", "val_split", *OF_THE_WORDS)
# Settings that states of earlier versions do not have, as they were then.
LATER: dict[str, Any] = {
    "case": "lower",
    "patience": 0,
    "accumulate": 1,
    "val_split": 0,
    "tokenizer": "spacy",
    "subword": 0,
    "bpe_dropout": 0.0,
    "max_vocab": 0,
}
# What a score takes from the checkpoint.
OF_THE_MODEL = ("src_lang", "trg_lang", "val_split", *OF_THE_WORDS)
OF_ITS_SPLIT = ("train_name", "val_name", "test_name")  # where --val-split took the test pairs out of train
EXAMPLES = """examples:
  python3 train_8p.py                                  train on the sample corpus
  python3 train_8p.py --data-dir data --amp            train on Multi30k, which is downloaded into data/
  python3 train_8p.py --data-dir data --multiprocessing-distributed
                                                       one process for each device of this machine
  python3 train_8p.py --resume auto                    go on with a run that was stopped or killed
  python3 train_8p.py --config run.toml --seed 2       the run of a file of flags, with another seed
  python3 train_8p.py --data-dir data --evaluate seq2seq-gru-model.pth.tar
                                                       score a checkpoint

Every flag may be written with underscores too. Flags after a lone -- override those before it.
"""


def build_parser() -> flags.StrictParser:
    return flags.parser_of(
        Settings,
        prog="train_8p.py",
        usage="python3 train_8p.py [--flag value]...",
        description="Trains a GRU encoder-decoder to translate, and reports BLEU and sentence pairs a second.",
        epilog=EXAMPLES,
        file_flag="config",
        read_file=lambda path, parser: config.read(path, Settings, parser),
    )


def check_flags_of_the_words(settings: Settings, given: Collection[str]) -> None:
    """Refuses flags that contradict each other.

    Args:
        settings: as the flags give them.
        given: the flags of the run's command and of this one.

    Raises:
        UserError: usage.
    """
    if settings.subword:
        for name in OF_WHOLE_WORDS:
            if name in given and getattr(settings, name) != getattr(Settings, name):
                flag = flags.flag_of(name)
                what = "no words are left to choose where pieces spell them"
                where = f"--subword {settings.subword}, {flag}"
                raise UserError("usage", what, where, f"leave {flag} or --subword out")
    elif settings.bpe_dropout and settings.evaluate is None:
        what = "whole words have no pieces to leave apart"
        raise UserError("usage", what, f"--bpe-dropout {settings.bpe_dropout:g}", "give --subword too, such as 4000")


# `--help` needs no package and does not wait for one. A package that is missing is told in one line.
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(run_main(lambda argv: build_parser().print_help(), []))


def tell_what_starts(argv: list[str]) -> None:
    """Parses the flags, and prints whether a run would begin or go on.

    A wrapper does not see what a file of flags says, so what may contradict it is printed too.
    """
    parser = build_parser()
    settings = Settings(**vars(parser.parse_args(argv)))
    check_flags_of_the_words(settings, parser.given)
    begins = settings.resume is None or (settings.resume == "auto" and not state_path(settings.ckptpath).exists())
    what = ""
    if settings.evaluate is not None:
        what = ": evaluates"
    elif "performance" in parser.given:
        what = ": measures" if settings.performance else ": trains"
    print(("begins" if begins else "goes on") + what)


# A wrapper asks first whether its arguments are in order. That needs no package either.
if __name__ == "__main__" and sys.argv[1:2] == ["--parse-only"]:
    sys.exit(run_main(tell_what_starts, sys.argv[2:]))
if __name__ == "__main__":
    end_imports_at_sigterm()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun's agent
prepare_imports()

import data
import gru
import scoring
from nmt import (
    checkpoint,
    cooccurrence,
    curves,
    distributed,
    keeping,
    kernels,
    launch,
    precision,
    record,
    resume,
    shortlist,
)
from nmt.averaging import WeightAverage
from nmt.checkout import commit_of
from nmt.cores import CoreWatch
from nmt.distributed import World
from nmt.log import EpochLog, RunBar, StepLine, may_recover, only_rank_0_speaks, say, say_all
from nmt.profiling import StepProfile
from nmt.signals import Stopped, StopRequest

import torch

# ---------------------------------------------------------------- from the command line to the ranks


def main(argv: list[str]) -> None:
    """Decides where and how to run, then trains and scores, or scores alone."""
    parser = build_parser()
    settings = Settings(**vars(parser.parse_args(argv)))
    typed = {name: getattr(settings, name) for name in parser.given}
    settings, given, notes = with_flags_of_the_run(settings, typed)
    check_flags_of_the_words(settings, given)
    plan = distributed.plan(
        **settings.named("device npu gpu device_list device_id max_devices multiprocessing_distributed"),
        **settings.named("world_size rank"),
        **settings.named("addr dist_url dist_backend dist_timeout bleu_npu batch_size"),
    )
    world = plan.worlds[0]
    for note in plan.notes:
        say(f"note: {note}")  # on every node, because it concerns that node
    only_rank_0_speaks(world.rank)
    for note in notes:
        say(f"note: {note}")
    settings = replace(settings, bleu_npu=plan.scoring_index)
    if settings.evaluate is not None:
        typed = {name: value for name, value in typed.items() if name not in parser.of_files}
        if unused := flags.given_in_vain(settings, typed):
            say(f"note: no effect with --evaluate: {', '.join(unused)}")
        evaluate(settings, typed, plan, Path(settings.evaluate))
        return
    mixed = precision.choose_by_flags(
        plan.device_type, plan.indices, **settings.named("amp opt_level loss_scale amp_dtype amp_backend")
    )
    writes = world.is_main and not settings.performance
    if world.is_main:
        record.prepare({flags.flag_of(name): getattr(settings, name) for name in checkpoint.OF_ITS_FOLDERS})
    with (
        checkpoint.claimed(settings.ckptpath) if writes else contextlib.nullcontext(),
        record.claimed(settings.record if world.is_main else None),
    ):
        run(settings, mixed, plan, given, typed)


def with_flags_of_the_run(settings: Settings, typed: dict[str, Any]) -> tuple[Settings, dict[str, Any], list[str]]:
    """The settings of a run that goes on: a flag that is left out is as in the run's own command.

    Args:
        settings: as the flags give them.
        typed: the flags of this command.

    Returns:
        The settings, whose `resume` is the path of the state, or None for a new run. The flags of the run's command and
        of this one. And notes.

    Raises:
        UserError: usage, `--resume` has no meaning here. Or checkpoint, the state cannot be read.
    """
    given = dict(typed)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun, or a wrapper
    wanted = settings.resume
    if wanted is None and restarted and not settings.performance:
        wanted = "auto"
    if wanted is None or settings.evaluate is not None:
        return settings, given, []
    if settings.performance:
        raise UserError("usage", "a performance run keeps no state", "--resume", "leave one of the two flags out")
    if wanted != "auto" and "ckptpath" not in given and wanted.endswith(resume.SUFFIX):
        given["ckptpath"] = wanted.removesuffix(resume.SUFFIX)
    own = resume.state_path(given.get("ckptpath", settings.ckptpath))
    path = own if wanted == "auto" else Path(wanted)
    if wanted != "auto" and restarted and own.exists() and resume.load(own).run == resume.load(path).run:
        path = own  # what the run has saved since its first start
    if wanted == "auto" and not path.exists():
        return replace(settings, resume=None), given, [f"there is no {path}: a new run begins"]
    saved = {name: value for name, value in resume.load(path).given.items() if name not in OF_THE_COMMAND}
    try:  # as if they had been typed again, so that each is one that this version takes
        again = vars(build_parser().parse_args(flags.as_arguments(saved)))
    except UserError as error:
        what = f"the flags of the run are none of this version: {error.args[1]}"
        raise UserError("checkpoint", what, str(path), "go on with the version that wrote it") from error
    given = {name: again[name] for name in saved} | given
    return Settings(**given | {"resume": str(path)}), given, []


def run(
    settings: Settings,
    mixed: precision.Choice,
    plan: distributed.Plan,
    given: dict[str, Any],
    typed: Collection[str] = (),
) -> None:
    """Trains on this node's devices, then scores the best checkpoint on the test set.

    Args:
        settings: as the flags give them.
        mixed: the precision.
        plan: the ranks.
        given: the flags of the run's command and of this one.
        typed: those of this one.
    """
    corpus = load_corpus(settings, log=say)
    start = time.monotonic()
    world = plan.worlds[0]
    if world.is_main:
        write_split(settings)
    lowers = settings.batch_size is None
    settings = resolved(settings, mixed, world, pairs=len(corpus.train))
    if lowers and settings.batch_size < RECIPES["tuned"]["batch_size"] and settings.recipe == "tuned":
        say(
            f"note: a small corpus: the batch is {settings.batch_size}, so that an epoch has about {ENOUGH_UPDATES} "
            "updates; --batch-size sets another"
        )
    goes_on = run_that_goes_on(settings, given, world, corpus, typed)  # told before anything else is
    own_config = list(config_of(settings, plan, given))
    if world.is_main and not settings.performance:
        keep_earlier_run(settings)
        write_config(settings, own_config)
    if world.is_main and settings.record is not None:
        record.make_room(settings.record, goes_on, say, overwrites=settings.overwrite)
    if plan.spawns:
        how = launch.CHECK if settings.performance else resume.HOW
        plan.spawn(run_rank, settings, mixed, given, debug=settings.debug, how_to_resume=how)
    else:
        run_rank(world, settings, mixed, given, corpus)
    if not world.is_main:
        return
    last_lines: list[str] = []
    if settings.performance:
        draw_curves(settings, last_lines.append)
    else:
        with telling_what_is_left(settings.ckptpath):
            score_the_best(settings, plan, corpus)
            draw_curves(settings, last_lines.append)
            resume.state_path(settings.ckptpath).unlink(missing_ok=True)  # only a run that is not complete needs it
        last_lines.append(f"to translate: {translate_command(settings.ckptpath)}")
        say(f"done: {time.monotonic() - start:.0f} s")
    for line in (*last_lines, *(config.PREFIX + line for line in own_config)):
        say(line)


def score_the_best(settings: Settings, plan: distributed.Plan, corpus: data.Corpus) -> None:
    """Scores the best model of a run that has been trained, and records the scores."""
    path = Path(settings.ckptpath)
    saved = checkpoint.load(path)
    if settings.best == "bleu" and saved.scores.get("bleu") == 0:
        say("note: BLEU was 0 on the validation pairs in every epoch: the best epoch is the one of the lowest loss")
    figures = score(settings, plan, path, saved, scoring.restore(saved, path), corpus)
    record.add_scores(metrics_paths(settings), settings.tensorboard, figures, say)


def metrics_paths(settings: Settings) -> list[Path]:
    """Where a run writes its figures. A performance run writes nothing beside a checkpoint."""
    return record.metrics_paths(None if settings.performance else settings.ckptpath, settings.record)


def draw_curves(settings: Settings, log: Callable[[str], object]) -> None:
    """Draws a run that has ended, if it has a place for that, and tells `log`."""
    pictures = record.curves_paths(None if settings.performance else settings.ckptpath, settings.record)
    if pictures:
        curves.draw_run(metrics_paths(settings)[0], pictures, log)


@contextlib.contextmanager
def telling_what_is_left(path: str) -> Iterator[None]:
    """Says what a run has left that is stopped after its training. `path` is that of its best model."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        what = f"the training is complete, and {path} is its best model; to score it, add --resume auto to the command"
        raise Stopped(error.exit_code if isinstance(error, Stopped) else 130, what) from None


def translate_command(ckptpath: str) -> str:
    """The command that translates with a model, for a shell in the current folder."""
    here = Path(HERE)
    own = here / ".venv"
    if here.is_relative_to(Path.cwd()):
        here = here.relative_to(Path.cwd())
    python, on_path = sys.executable, shutil.which("python3")
    if Path(sys.prefix) == own:
        python = str(here / ".venv" / "bin" / "python")
    elif on_path is not None and os.path.abspath(on_path) == os.path.abspath(Path(python).with_name("python3")):
        python = "python3"
    path = f"./{ckptpath}" if ckptpath.startswith("-") else ckptpath
    return shlex.join([python, str(here / "translate.py"), "--ckptpath", path])


def keep_earlier_run(settings: Settings) -> None:
    """Makes room for the files of this run: what an earlier run left there is kept, see `nmt/keeping.py`.

    A run that goes on writes to its own files. If its state is elsewhere, what stands at --ckptpath is copied.

    Raises:
        UserError: io, it cannot be kept.
    """
    if settings.resume is None:
        keeping.make_room(settings.ckptpath, say, overwrites=settings.overwrite)
    elif Path(settings.resume).resolve() != resume.state_path(settings.ckptpath).resolve():
        keeping.make_room(settings.ckptpath, say, copies=True)


def write_config(settings: Settings, lines: list[str]) -> None:
    """Writes the file of flags beside the best model.

    Raises:
        UserError: io.
    """
    path = Path(f"{real(settings.ckptpath)}{keeping.CONFIG}")
    try:
        with replacing(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        what, todo = f"cannot write the run's flags: {error.strerror or error}", "make room there, or give --ckptpath"
        raise UserError("io", what, str(path), todo) from error


def evaluate(settings: Settings, typed: dict[str, Any], plan: distributed.Plan, path: Path) -> None:
    """Scores the checkpoint at `path` on the test set, on rank 0.

    Args:
        settings: as the flags give them. Languages and case are the checkpoint's.
        typed: the flags of this command.
        plan: the ranks.
        path: the checkpoint. One of the original has no vocabulary, so it takes that of the training data.

    Raises:
        UserError: usage, a flag contradicts the checkpoint.
    """
    saved = checkpoint.load(path)
    model = scoring.restore(saved, path)  # a faulty file is told before a download, or long tokenising
    if saved.src_vocab is None:
        corpus: data.Corpus | data.Words = load_corpus(settings, log=say)
    else:
        settings = with_flags_of_the_model(settings, typed, saved, path)
        corpus = load_test(settings)
        if plan.worlds[0].is_main:
            write_split(settings)
        if corpus.fingerprint not in ("", saved.about["data"]):
            say(
                "note: the test pairs are taken out of another text than the model was trained on: it may have been "
                "trained on some of them"
            )
    if plan.worlds[0].is_main:
        score(settings, plan, path, saved, model, corpus, tells_data=True)


def with_flags_of_the_model(
    settings: Settings, typed: dict[str, Any], saved: checkpoint.Checkpoint, path: Path
) -> Settings:
    """The settings with what the checkpoint says about its words and its test pairs.

    Raises:
        UserError: usage, a flag of the command says otherwise.
    """
    told: dict[str, Any] = LATER | saved.flags | saved.about
    own = {name: value for name, value in told.items() if name in OF_THE_MODEL}
    for name in own:
        if typed.get(name, own[name]) != own[name]:
            flag = flags.flag_of(name)
            what = f"{flag} {typed[name]} contradicts the checkpoint, which has {own[name]}"
            raise UserError("usage", what, str(path), f"leave {flag} out, or name another checkpoint")
    if own["val_split"]:
        own |= {name: value for name, value in saved.flags.items() if name in OF_ITS_SPLIT and name not in typed}
    return replace(settings, **own)


def run_rank(
    world: World,
    settings: Settings,
    mixed: precision.Choice,
    given: dict[str, Any] | None = None,
    corpus: data.Corpus | None = None,
) -> None:
    """The life of one process that trains: it meets the others, if there are any, trains, and leaves.

    Args:
        world: what this process knows of all.
        settings: resolved.
        mixed: the precision.
        given: the flags of the command, for the run's state.
        corpus: the data. None in a spawned process, which reads it from the cache that its parent has built.
    """
    only_rank_0_speaks(world.rank)
    # All that takes time comes before the ranks meet: HCCL lets the first ones wait only so long.
    corpus = corpus or load_corpus(settings, verify=False, log=lambda line: None)
    if world.device_type != "cpu":
        corpus.check_ids()  # such a device would not notice a wrong one
    model = first_model(settings, world, corpus)
    world.start()
    if settings.compile_loss:  # it needs the device
        kernels.compile_softmax(world.device, mixed.dtype)
    with (
        StopRequest() as stop,
        telling_memory(lambda: size_of_a_step(settings, world, corpus)),
        contextlib.ExitStack() as held,
    ):
        train(settings, mixed, world, corpus, model, given or {}, stop, held)
    world.stop()


# ---------------------------------------------------------------- training


def train(
    settings: Settings,
    mixed: precision.Choice,
    world: World,
    corpus: data.Corpus,
    model: gru.Seq2Seq,
    given: dict[str, Any],
    stop: StopRequest,
    held: contextlib.ExitStack,
) -> None:
    """One rank's training, from the first step, or from the saved state of the run, to the best checkpoint.

    Args:
        settings: resolved.
        mixed: the precision.
        world: the ranks. All run the same lines, and what ranks other than 0 say is not seen.
        corpus: the data.
        model: from `first_model`. All ranks take rank 0's weights.
        given: the flags of the command.
        stop: tells whether to save the run's state and end.
        held: closes what is open at the end, however that comes.
    """
    device = world.device
    model.to(device)
    world.copy_from_main(model.parameters())
    facts = facts_of(settings, mixed, world, corpus) if world.is_main else {}
    for line in description(settings, mixed, world, corpus, facts):
        say(line)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {parameters:,} parameters")
    trainer = precision.make_trainer(mixed, model, device)  # Adam, in the chosen precision
    average = WeightAverage(trainer, settings.average)
    criterion = world.parallel(gru.TrainingLoss(trainer.working_model, settings.label_smoothing))
    loader, val_loader = (
        data.Loader(split, device, fixed_length=settings.fixed_length) for split in (corpus.train, corpus.val)
    )
    train_pairs = corpus.train
    first_batches = epoch_steps(settings, corpus, epoch=0)
    total_steps = settings.epochs * len(first_batches)
    if world.size > 1:
        settle_buckets(trainer, criterion, parts_of_rank(settings, world, loader, first_batches[0])[0])
    state = state_of_run(settings, given, world, corpus)
    best = checkpoint.BestFile(
        Path(settings.ckptpath), state.run, log=say, shortlist=translations(settings, world, corpus)
    )
    run = open_run(settings, state, world, {"trainer": trainer, "average": average, "best": best}, stop)
    step = run.step
    facts |= {"device_name": world.describe(), "parameters": parameters, "epoch_steps": len(first_batches)}
    beside = held.enter_context(Beside(settings, mixed, state, world, trainer, facts))
    world.progress(step)
    for epoch in range(run.epoch, settings.epochs):
        if settings.bpe_dropout:
            train_pairs = spelled_anew(settings, corpus, epoch)
            loader = data.Loader(train_pairs, device, fixed_length=settings.fixed_length)
        batches = epoch_steps(settings, corpus, epoch, train_pairs)
        criterion.train()
        log = EpochLog(
            world,
            epoch,
            steps=len(batches),
            steps_before=step - run.step,
            print_freq=settings.print_freq,
            bar=beside.bar,
            told=beside.line_done,
        )
        for position in range(run.begin_epoch(log), len(batches)):
            # 1. The pairs of this rank. Without --accumulate they are one part.
            indices = batches[position]
            parts = parts_of_rank(settings, world, loader, indices)
            log.data_ready()

            # 2. The loss, which is the mean over the target tokens of all ranks, and its gradients.
            weight = world.size / loader.target_tokens(indices)  # DDP will divide the gradients by world.size
            loss_sums = []  # of the parts
            for number, part in enumerate(parts):
                seed_step(settings.seed, step, world.rank, number)  # so that no generator is part of the run's state
                is_last = number + 1 == len(parts)
                with world.averaging(criterion, now=is_last):
                    with trainer.forward_context():
                        loss_sum = criterion(part, settings.teacher_forcing_ratio)
                    trainer.backward(weight * loss_sum, is_last=is_last)
                loss_sums.append(loss_sum.detach())

            # 3. The update.
            trainer.step(learning_rate(step, total_steps, settings), max_norm=settings.clip)
            step += 1
            world.progress(step)
            average.update(step)
            own_tokens = sum(part.target_tokens for part in parts)
            total_loss, total_tokens = world.sums(torch.stack(loss_sums).sum(), own_tokens)  # one all-reduce
            log.step_done(total_loss, total_tokens, pairs=len(indices))
            beside.profile.step_done()
            run.step_done(step, epoch, position + 1)

        # 4. The end of the epoch: its speed and, unless speed is all we want, validation and the best weights.
        run.steps_done(step, epoch, len(batches))
        pairs_per_second, train_loss = log.finish()
        trainer.refresh_model()  # the fp32 model takes over what was trained
        say(f"* FPS@all {pairs_per_second:.3f}")
        of_epoch = {"epoch": epoch + 1, "pairs_per_second": pairs_per_second, "train_loss": train_loss}
        of_epoch["learning_rate"] = rate = learning_rate(step - 1, total_steps, settings)
        beside.figures.add("epoch", step, of_epoch)
        if skipped := trainer.skipped_steps():
            say(
                f"note: {skipped} of {len(batches)} steps changed no weight: their gradients were not finite. "
                "If that goes on, lower --loss-scale or --lr, or give --loss-scale dynamic."
            )
        if not settings.performance:
            average.catch_up(step)  # the average takes in the last steps
            found, is_best = validate(
                settings, world, corpus, val_loader, average.model, best, epoch, train_loss, rate, run.end_if_asked
            )
            beside.figures.add("validation", step, of_epoch | found.figures | {"is_best": is_best}, found.examples)
            if ends_early(settings, world, best, epoch):
                break
    if world.is_main:
        best.complete()


def translations(settings: Settings, world: World, corpus: data.Corpus) -> torch.Tensor | None:
    """Which words translate each source word, for the checkpoint. None on ranks that write none."""
    if not world.is_main or settings.performance:
        return None
    src, trg = ((side.ids, side.offsets) for side in (corpus.train.src, corpus.train.trg))
    return shortlist.build(src, trg, len(corpus.src_vocab), len(corpus.trg_vocab))


def parts_of_rank(settings: Settings, world: World, loader: data.Loader, indices: torch.Tensor) -> list[data.Batch]:
    """A rank's share of a batch, in --accumulate parts. A part may be empty, as a share may.

    Args:
        settings, world: as in `train`.
        loader: of the training pairs.
        indices: [batch] int64: the pairs of all ranks.
    """
    share = data.rank_share(indices, world.rank, world.size)
    return [loader(part) for part in share.tensor_split(settings.accumulate)]


def seed_step(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Seeds what a step draws. So no generator belongs to a run's state.

    All ranks and all parts of a batch draw the same teacher forcing, by `random`. Each drops other positions, by
    PyTorch's generators.
    """
    random.seed(f"{seed} {step}")
    own = f"{seed} {step} {rank}" + (f" {part}" if part else "")
    torch.manual_seed(int.from_bytes(hashlib.sha256(own.encode()).digest()[:7], "big"))


def settle_buckets(trainer: precision.Trainer, criterion: torch.nn.Module, batch: data.Batch) -> None:
    """Has DistributedDataParallel lay out its buckets, which it does after a process's first backward pass.

    The buckets decide in which order gradients are added up over the ranks. After this pass, which changes no weight,
    that is the same in the first step of a run and in the first step after it was resumed.
    """
    with trainer.forward_context():
        loss = criterion(batch, 1.0)
    trainer.backward(0 * loss)
    trainer.drop_gradients()


def spelled_anew(settings: Settings, corpus: data.Corpus, epoch: int) -> data.Split:
    """The training pairs as an epoch reads them, with --bpe-dropout. All ranks have the same."""
    vocabs = corpus.src_vocab, corpus.trg_vocab
    return data.spelled_anew(corpus.train, *vocabs, dropout=settings.bpe_dropout, seed=settings.seed, epoch=epoch)


def epoch_steps(
    settings: Settings, corpus: data.Corpus, epoch: int, pairs: data.Split | None = None
) -> data.EpochBatches | list[torch.Tensor]:
    """The steps of one epoch, each with the indices of its pairs over all ranks, [batch] int64.

    A performance run goes round again until it has enough steps.

    Args:
        settings, corpus: as in `train`.
        epoch: from 0.
        pairs: the training pairs as this epoch reads them. Their number does not depend on that.
    """

    def a_round(number: int) -> data.EpochBatches:
        return data.epoch_batches(
            pairs or corpus.train,
            settings.batch_size,
            seed=settings.seed,
            epoch=epoch + number,
            like_length=settings.batching == "like-length",
            drop_last=settings.last_batch == "drop",
        )

    batches = a_round(0)
    if not settings.performance or len(batches) >= PERFORMANCE_STEPS:
        return batches
    rounds = itertools.chain.from_iterable(map(a_round, itertools.count()))
    return list(itertools.islice(rounds, PERFORMANCE_STEPS))


def learning_rate(step: int, total_steps: int, settings: Settings) -> float:
    """The rate of a step: a linear rise, then constant or a cosine's fall to 0 (Loshchilov and Hutter 2017).

    Args:
        step: counted from 0 over the whole run.
        total_steps: of the run.
        settings: lr, warmup and schedule are read.

    >>> settings = Settings(lr=1.0, warmup=0.2, schedule="cosine")
    >>> [round(learning_rate(step, 10, settings), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warmup_steps = int(settings.warmup * total_steps)
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def validate(
    settings: Settings,
    world: World,
    corpus: data.Corpus,
    loader: data.Loader,
    model: gru.Seq2Seq,
    best: checkpoint.BestFile,
    epoch: int,
    train_loss: float,
    rate: float,
    pause: Callable[[], object] = lambda: None,
) -> tuple[scoring.Validation, bool]:
    """Scores the model on the validation pairs, prints the figures, and saves it if it is the best so far.

    Args:
        settings, world, corpus: as in `train`. All ranks share the work. Rank 0 decides and writes.
        loader: of the validation pairs.
        model: the fp32 model.
        best: the file.
        epoch: the epoch that has ended, from 0.
        train_loss: its mean training loss.
        rate: its last learning rate.
        pause: is called before each batch. It may raise to end the run.

    Returns:
        What was found, and whether it is the best so far. Both count on rank 0.

    Raises:
        UserError: diverged, on every rank, if a loss or a weight is not finite, or the validation loss has exploded.
    """
    found = scoring.validate(model, loader, corpus.trg_vocab, world, settings.max_length, pause, settings.case)
    losses = found.losses
    what = ""
    if not (math.isfinite(train_loss) and losses.are_finite and may_recover(losses.forced)):
        what = f"the training loss is {train_loss:g}, the validation losses {losses.forced:g}, {losses.free_running:g}"
    elif not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        what = "a weight is not finite"  # perhaps of a word that no validation pair has
    if what:
        todo = "lower --lr, or --loss-scale if one is in use; the best checkpoint of the epochs before is kept"
        raise UserError("diverged", what, f"epoch {epoch + 1}", todo)
    for line in found.lines(epoch, settings.epochs, train_loss, rate):
        say(line)
    # BLEU is 0 as long as no four words in a row are right, and often equal in small texts.
    merit = (found.bleu, -losses.forced) if settings.best == "bleu" else (-losses.free_running,)
    is_again = best.epoch == epoch and merit == best.merit  # a run that went on has validated it before
    if world.is_main and settings.best == "bleu" and found.bleu and not is_again and best.merit[:1] == (found.bleu,):
        say(f"note: the best epoch so far has a greedy BLEU of {found.bleu:.4f} too: the lower loss is better")
    is_best = is_again or merit > best.merit
    if world.is_main and is_best and not is_again:
        scores = {"epoch": epoch, "bleu": found.bleu, "loss": losses.forced, "free_running_loss": losses.free_running}
        if found.cased_bleu is not None:
            scores["cased_bleu"] = found.cased_bleu
        best.replace(merit, as_checkpoint(settings, world, corpus, model, scores))
    return found, is_best


def ends_early(settings: Settings, world: World, best: checkpoint.BestFile, epoch: int) -> bool:
    """Whether --patience ends the run after this epoch. Rank 0 has the best model and decides. Every rank calls this.

    What is counted is the epochs since that of the best file. So a run that goes on counts on.
    """
    if not settings.patience or epoch + 1 == settings.epochs:
        return False
    waited = epoch - best.epoch
    if not world.sum(torch.tensor(float(world.is_main and waited >= settings.patience), device=world.device)):
        return False
    say(
        f"note: the training ends early: no epoch since epoch {best.epoch + 1} was better, "
        f"and --patience is {settings.patience}"
    )
    return True


def as_checkpoint(
    settings: Settings, world: World, corpus: data.Corpus, model: gru.Seq2Seq, scores: dict
) -> checkpoint.Checkpoint:
    """All that using the model needs, and what is known of it. Nothing says where it was trained."""
    return checkpoint.Checkpoint(
        state_dict={name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()},
        sizes={
            "input_dim": len(corpus.src_vocab),
            "output_dim": len(corpus.trg_vocab),
            "emb_dim": settings.emb_dim,
            "hid_dim": settings.hid_dim,
        },
        src_vocab=corpus.src_vocab.itos,
        trg_vocab=corpus.trg_vocab.itos,
        src_subwords=corpus.src_vocab.model,
        trg_subwords=corpus.trg_vocab.model,
        flags=checkpoint.portable(flags_of(settings, world)),
        scores=scores,
        about={
            "src_lang": corpus.src_lang,
            "trg_lang": corpus.trg_lang,
            "data": corpus.fingerprint,
            "vocabularies": checkpoint.vocabulary_digest(corpus.src_vocab.itos, corpus.trg_vocab.itos),
            "torch": str(torch.__version__),
            "spacy": importlib.metadata.version("spacy"),
            "world_size": world.size,
        }
        | library_of_pieces(settings),
    )


def library_of_pieces(settings: Settings) -> dict[str, str]:
    """The version of what spells words with pieces, where it does."""
    return {"sentencepiece": importlib.metadata.version("sentencepiece")} if settings.subword else {}


def score(
    settings: Settings,
    plan: distributed.Plan,
    path: Path,
    saved: checkpoint.Checkpoint,
    model: gru.Seq2Seq,
    corpus: data.Corpus | data.Words,
    tells_data: bool = False,
) -> dict[str, Any]:
    """Translates the test set with a checkpoint and prints its scores, on the device of --bleu-npu.

    Decoding and losses are as the flags say. What they leave out is as in the run that made the checkpoint.

    Args:
        path: where `saved` was read from.
        model: that of `saved`, from `scoring.restore`.
        corpus: the data, or its test pair alone.
        tells_data: whether to print what is known of the data first.

    Returns:
        The figures by name.
    """
    vocabs = scoring.vocabularies(saved, model, corpus, path)
    if isinstance(corpus, data.Words):
        test = corpus.encoded(*vocabs)
        about_data = corpus.lines(test, *vocabs)
    else:
        test = scoring.in_vocabularies(corpus.test, (corpus.src_vocab, corpus.trg_vocab), vocabs)
        about_data = corpus.lines()
    for line in about_data if tells_data else ():
        say(line)
    world = World(device_type=plan.device_type, index=plan.scoring_index)
    world.start()
    how = settings.named("fixed_length max_length beam_size length_penalty")
    made_with = {"max_length": None} | checkpoint.ORIGINAL_FLAGS | saved.flags  # earlier versions had not all of them
    how |= {name: made_with[name] for name, value in how.items() if value is None}
    how["case"] = settings.case
    return say_all(scoring.report(model.to(world.device), test, vocabs[1], world, name=str(path), **how))


# ---------------------------------------------------------------- what a run starts with


def load_corpus(settings: Settings, *, verify: bool = True, log: Callable[[str], object] = say) -> data.Corpus:
    """The corpus that the flags name, see `data.load`.

    Raises:
        UserError: as from `data.load`. Or io, `--cache-dir` cannot be used.
    """
    where = data_folder(settings, log)
    return data.load(where, **settings.named(f"{OF_FILES} min_freq max_vocab subword"), verify=verify, log=log)


def load_test(settings: Settings, log: Callable[[str], object] = say) -> data.Words:
    """The test pair that the flags name, see `data.load_test`. Raises as `load_corpus` does."""
    return data.load_test(data_folder(settings, log), **settings.named(OF_FILES), log=log)


OF_NAMES = "src_lang trg_lang train_name val_name test_name"
OF_FILES = f"{OF_NAMES} case tokenizer workers cache_dir mirror val_split"


def write_split(settings: Settings) -> None:
    """Writes the text of the splits where --write-split says, see `data.write_split`."""
    if settings.write_split is not None:
        where = data_folder(settings, lambda line: None)
        data.write_split(settings.write_split, where, **settings.named(f"{OF_NAMES} val_split"), log=say)


def data_folder(settings: Settings, log: Callable[[str], object]) -> str | Path:
    """The folder of --data-dir, or of the sample. A cache folder that the user has named must be one."""
    if settings.cache_dir is not None:
        data.check_cache_dir(settings.cache_dir)
    if settings.data_dir is not None:
        return settings.data_dir
    log("note: no --data-dir was given: using the bundled sample corpus")
    return SAMPLE.relative_to(Path.cwd()) if SAMPLE.is_relative_to(Path.cwd()) else SAMPLE


def new_state(settings: Settings, given: dict[str, Any], world: World, corpus: data.Corpus) -> resume.State:
    """A run at its beginning.

    Args:
        settings: resolved.
        given: the flags of the command.
        world, corpus: as in `train`.
    """
    decisive = {row.name for row in dataclasses.fields(settings) if row.metadata["trains"]}
    decisive -= {*INDIFFERENT, *checkpoint.OF_ITS_FOLDERS}
    return resume.State(
        run=secrets.token_hex(8),
        given={name: value for name, value in given.items() if name not in OF_THE_COMMAND},
        settings={name: getattr(settings, name) for name in sorted(decisive | set(DECISIVE))},
        about={
            "data": corpus.fingerprint,
            "vocabularies": checkpoint.vocabulary_digest(corpus.src_vocab.itos, corpus.trg_vocab.itos),
            "processes": world.size,
            "device": world.describe(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        | library_of_pieces(settings),
    )


def saved_state(path: Path) -> resume.State:
    """The state of a run from its file. One of an earlier version gets what that version did without a setting."""
    state = resume.load(path)
    return replace(state, settings=LATER | state.settings)


def run_that_goes_on(
    settings: Settings, given: dict[str, Any], world: World, corpus: data.Corpus, typed: Collection[str]
) -> str | None:
    """The name of the run that --resume goes on with, None for a new run. Its state is not kept in memory.

    Args:
        settings, given, world, corpus: as in `new_state`.
        typed: the flags of this command.

    Raises:
        UserError: as from `resume.load` and `resume.check_same`.
    """
    if settings.resume is None:
        return None
    path = Path(settings.resume)
    state = saved_state(path)
    resume.check_same(state, new_state(settings, given, world, corpus), path, typed)
    return state.run


def state_of_run(settings: Settings, given: dict[str, Any], world: World, corpus: data.Corpus) -> resume.State:
    """Where the run stands: at its beginning, or as its file says. Every rank calls this.

    Args: as in `new_state`.

    Raises:
        UserError: as from `resume.load` and `resume.check_same`. Or checkpoint, the ranks have different states.
    """
    state, number = new_state(settings, given, world, corpus), 0
    if settings.resume is not None:
        path, now = Path(settings.resume), state
        state = saved_state(path)
        others = resume.check_same(state, now, path)
        steps = len(epoch_steps(settings, corpus, epoch=0))
        counts = state.step == state.epoch * steps + state.position
        if not counts or state.position > steps or state.epoch > settings.epochs:
            where = (
                f"step {state.step}, epoch {state.epoch + 1}, position {state.position}, of {settings.epochs} x {steps}"
            )
            todo = "use an earlier copy, or train again"
            raise UserError("checkpoint", f"contradicts itself: {where}", str(path), todo)
        if others:
            say(f"note: the run goes on, but not bit for bit: {'; '.join(others)}")
        say(f"resumed: {path}: {state.step} steps are done, {state.position} of them in epoch {state.epoch + 1}")
        number = 1 + int(hashlib.sha256(f"{state.run} {state.step}".encode()).hexdigest()[:4], 16)
        state = replace(state, given=now.given, settings=now.settings, about=now.about)
    if not world.agrees_on(number):
        what = "the ranks have different states of the run, or some have none"
        todo = "give each node the same file, under the same path"
        raise UserError("checkpoint", what, f"rank {world.rank}, {settings.resume or 'a new run'}", todo)
    return state


def open_run(
    settings: Settings, state: resume.State, world: World, parts: dict[str, resume.Part], stop: StopRequest
) -> resume.Run:
    """The run, whose parts stand where `state` says.

    Args:
        settings: resolved.
        state: from `state_of_run`.
        world: as in `train`. Rank 0 writes the state, has the best model and decides when to stop.
        parts: what has a state.
        stop: as in `train`.
    """
    path = resume.state_path(settings.ckptpath)
    return resume.Run(
        state,
        parts if world.is_main else {name: part for name, part in parts.items() if name != "best"},
        path=path if world.is_main and not settings.performance else None,
        owns=settings.resume is not None and path.resolve() == Path(settings.resume).resolve(),
        minutes=settings.save_every,
        stop=stop if world.is_main else None,
        log=say,
    )


class Beside(contextlib.ExitStack):
    """What goes on beside the training of a rank: figures, a profile, the bar, a look at who has the cores.

    On ranks other than 0 nothing is written. On leaving, what is open is closed.

    Args:
        settings, state, world: as in `open_run`.
        mixed: the precision.
        trainer: tells the loss scale.
        facts: of the run, from `facts_of` and beside.
    """

    def __init__(
        self,
        settings: Settings,
        mixed: precision.Choice,
        state: resume.State,
        world: World,
        trainer: precision.Trainer,
        facts: dict[str, Any],
    ):
        super().__init__()
        self._settings, self._steps = settings, facts["epoch_steps"]
        self._loss_scale = (lambda: None) if mixed.level == "O0" else (lambda: trainer.loss_scale)
        self.figures = record.Record()
        if world.is_main:
            files = record.begin(metrics_paths(settings), state.run, facts, state.step, say)
            board = None
            if settings.tensorboard is not None:
                board = record.Board(Path(settings.tensorboard), ("train", "validation"), state.step, say)
            self.figures = record.Record(files, board)
        self.callback(self.figures.close)
        self.profile = StepProfile(settings.profile if world.is_main else None, world.device_type, say)
        self.callback(self.profile.close)
        self.bar = RunBar(settings.epochs, self._steps, state.step) if sys.stdout.isatty() else None
        if self.bar is not None:
            self.callback(self.bar.close)
        self._watch = CoreWatch(torch.get_num_threads() if world.device_type == "cpu" else 1, say)

    def line_done(self, line: StepLine) -> None:
        """Takes what a step line says."""
        step = line.epoch * self._steps + line.step
        rate = learning_rate(step - 1, self._settings.epochs * self._steps, self._settings)
        self.figures.step(line, step, rate, self._loss_scale())
        self._watch.look()


def first_model(settings: Settings, world: World, corpus: data.Corpus) -> gru.Seq2Seq:
    """The model before its first step, on the CPU. Rank 0 alone computes the word vectors it starts with."""
    torch.manual_seed(settings.seed)
    src_types, trg_types = len(corpus.src_vocab), len(corpus.trg_vocab)
    model = gru.build(src_types, trg_types, **settings.named("emb_dim hid_dim dropout output_dropout"))
    gru.INITIALISATIONS[settings.init](model)
    gru.raise_update_gates(model, settings.update_bias)
    if settings.embeddings == "cooccurrence" and world.is_main and not settings.resume:
        src, trg = ((side.ids, side.offsets) for side in (corpus.train.src, corpus.train.trg))
        gru.use_vectors(model, *cooccurrence.embeddings(src, trg, src_types, trg_types, settings.emb_dim))
    return model


def resolved(settings: Settings, mixed: precision.Choice, world: World, pairs: int) -> Settings:
    """The settings with nothing left open. The batch is that of all devices from here on.

    Args:
        settings: as the flags give them.
        mixed: the precision that was chosen.
        world: any rank's.
        pairs: pairs in the training data.
    """
    values = RECIPES[settings.recipe] | {name: value for name, value in vars(settings).items() if value is not None}
    batch = settings.batch_size  # of a node
    if settings.performance:
        values["epochs"] = settings.epochs or 1
        batch = batch or PERFORMANCE_BATCH[world.device_type] * world.local_size
    elif settings.recipe == "tuned":
        batch = batch or tuned_batch(pairs, world.nodes, world.local_size)
    else:
        batch = batch or values["batch_size"] // world.nodes  # a recipe's batch is that of all nodes
    distributed.check_divisible(batch, world.local_size)
    values["batch_size"] = min(batch, math.ceil(pairs / world.nodes)) * world.nodes
    share = math.ceil(values["batch_size"] / world.size)
    if settings.accumulate > share:
        what = f"--accumulate {settings.accumulate} parts of a batch that has {share} pairs a device"
        raise UserError("usage", what, "--accumulate", f"give at most {share}, or a larger --batch-size")
    # The few steps of a performance run are not there to learn, whatever its batch is.
    if settings.lr is None and settings.recipe == "tuned" and not settings.performance:
        values["lr"] = tuned_rate(values["batch_size"])
    values |= {"opt_level": mixed.level, "loss_scale": mixed.loss_scale}
    values |= {"amp_dtype": mixed.dtype_name, "amp_backend": mixed.backend}
    return replace(settings, **values)


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

    With Adam this keeps the effect of the gradients' noise on the weights. Source: Malladi, Lyu, Panigrahi and Arora
    2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv 2205.10287.

    >>> tuned_rate(32), tuned_rate(64), tuned_rate(256)
    (0.003, 0.003, 0.006)
    """
    recipe = RECIPES["tuned"]
    return recipe["lr"] * math.sqrt(max(1.0, batch / recipe["batch_size"]))


def size_of_a_step(settings: Settings, world: World, corpus: data.Corpus) -> str:
    """How large a rank's steps are, for whoever has to make them smaller."""
    longest = max(int(side.lengths.max()) for side in (corpus.train.src, corpus.train.trg))
    batch = math.ceil(settings.batch_size / world.size)
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    return f"rank {world.rank}, a batch of {batch} pairs a device{parts}, longest sentence {longest} tokens"


def flags_of(settings: Settings, world: World) -> dict[str, Any]:
    """The flags that would give these settings. --batch-size is that of a node."""
    return vars(settings) | {"batch_size": settings.batch_size // world.nodes}


def config_of(settings: Settings, plan: distributed.Plan, given: dict[str, Any]) -> Iterator[str]:
    """The lines of the file of flags that makes the same run again.

    Args:
        settings: resolved.
        plan: the ranks.
        given: the flags of the run's command.
    """
    world = plan.worlds[0]
    values = flags_of(settings, world) | {"device": world.device_type, "amp": settings.opt_level != "O0"}
    # A batch is at most the corpus, and then perhaps not one that the ranks can share out evenly.
    values["batch_size"] = math.ceil(values["batch_size"] / world.local_size) * world.local_size
    if plan.spawns:
        values |= {"device_list": list(plan.indices), "max_devices": None}
    left_out = [*OF_NO_CONFIG, *(["bleu_npu"] if "bleu_npu" not in given else [])]
    if not values["amp"]:
        left_out += ["opt_level", "amp_dtype", "amp_backend"]  # they have no effect
    if values["subword"]:
        left_out += OF_WHOLE_WORDS  # nor have these
    header = [
        "Trains this run again: python3 train_8p.py --config THIS_FILE",
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, torch {torch.__version__}, "
        f"{world.size} {'process' if world.size == 1 else 'processes'} on {world.device_type}",
    ]
    yield from config.lines(Settings, {name: values[name] for name in values if name not in left_out}, header)


def facts_of(settings: Settings, mixed: precision.Choice, world: World, corpus: data.Corpus) -> dict[str, Any]:
    """What the line `run:` says, by name. It asks git for the commit."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "spacy", "torchtext")}
    for name in ("torch_npu", "apex"):  # not always installed in a way that leaves metadata
        if name in sys.modules:
            versions[name] = getattr(sys.modules[name], "__version__", "unknown")
    facts = {
        "device": world.device_type,
        "processes": world.size,
        "nodes": world.nodes,
        "batch": settings.batch_size,
        "batch_per_device": settings.batch_size / world.size,
        "precision": mixed.name,
        "amp_backend": mixed.backend,
        "loss_scale": mixed.loss_scale,
        "recipe": settings.recipe,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "data": corpus.fingerprint[:12],
        "commit": commit_of(Path(HERE)),
        "python": platform.python_version(),
    }
    return facts | versions


def description(
    settings: Settings, mixed: precision.Choice, world: World, corpus: data.Corpus, facts: dict[str, Any]
) -> Iterator[str]:
    """The lines that say what is about to run.

    Args:
        settings, mixed, world, corpus: as in `train`.
        facts: from `facts_of`.
    """
    short = {key: f"{value:g}" if key == "batch_per_device" else value for key, value in facts.items()}
    yield "run: " + " ".join(f"{key}={value}" for key, value in short.items())
    yield f"device: {world.describe()}"
    yield from corpus.lines()
    yield from unknown_words(corpus, settings)
    if not settings.performance:
        yield from scoring.note_on_length(corpus.val, settings.max_length, "validation")
    if mixed.note:
        yield f"note: {mixed.note}"
    # On NPUs it is not known: the published run learned.
    learns = world.device_type == "npu" or (world.device_type == "cpu" and mixed.dtype is torch.float32)
    if settings.fixed_length and not learns and not settings.performance:
        yield (
            f"note: with --fixed-length {settings.fixed_length} the encoder may never learn to carry a sentence "
            "through the padding; of the runs without an NPU, only those in float32 on a CPU did (docs/results.md)"
        )


def unknown_words(corpus: data.Corpus, settings: Settings) -> Iterator[str]:
    """The lines that say of a language that most words of its training text are unknown."""
    for lang, side in ((corpus.src_lang, corpus.train.src), (corpus.trg_lang, corpus.train.trg)):
        ids = side.ids[:1_000_000]  # of a large corpus they tell enough
        words = ((ids != data.SOS) & (ids != data.EOS)).sum()
        part = float((ids == data.UNK).sum() / words)
        if part > 0.5:
            yield (
                f"note: {part:.0%} of the {lang} words of train are unknown, because they stand there fewer than "
                f"{settings.min_freq} times; a lower --min-freq keeps more"
                if not settings.max_vocab
                else f"note: {part:.0%} of the {lang} words of train are unknown; a lower --min-freq, or a higher "
                "--max-vocab, keeps more"
            )


if __name__ == "__main__":
    exit_code = run_main(main, sys.argv[1:])
    if distributed.under_torchrun():
        launch.leave(exit_code)
    sys.exit(exit_code)
