"""Writes the tables of the documents from the logs.

    python -m bench.tables

In a document, a table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`. This script replaces
everything between them. The text around the tables is written by hand. A test checks that each document is as this
script would write it, so run it after a change of a log or of a row below.
"""

import functools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import accept, logs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "README.zh-CN.md",
        "docs/results.md",
        "docs/search.md",
        "docs/change-the-model.md",
        "docs/several-machines.md",
    )
]
SEEDS = (1234, 2, 3)


@dataclass(frozen=True)
class Row:
    """A row of a table: what was run.

    Attributes:
        name: the row's first cell.
        logs: of its runs, which differ in the seed alone. The paths are from the repository's root.
        flags: what the runs had beside those of their recipe.
    """

    name: str
    logs: tuple[str, ...]
    flags: str = ""


@dataclass(frozen=True)
class Speed:
    """A row of a table of speeds: names of figures in the log of a benchmark. A `|` stands between several in one cell.

    Attributes:
        name: the row's first cell.
        log: its name below bench/results/.
        plain, port: the figures of the plain loop and of this port.
        ratio, share: port / plain, and the share of the limit.
    """

    name: str
    log: str
    plain: str = ""
    port: str = ""
    ratio: str = ""
    share: str = ""


def of_seeds(name: str, seeds: Sequence[int] = SEEDS) -> tuple[str, ...]:
    """The logs of one run with several seeds, below results/.

    >>> of_seeds("batch/128")
    ('results/batch/128.log', 'results/batch/128-seed2.log', 'results/batch/128-seed3.log')
    """
    return tuple(f"results/{name}{'' if seed == SEEDS[0] else f'-seed{seed}'}.log" for seed in seeds)


# ---------------------------------------------------------------- which runs stand in which table

TUNED = tuple(f"results/multi30k-tuned-seed{seed}-cpu.log" for seed in SEEDS)

TUNED_BY_STEP = (
    "results/multi30k-tuned-amp-cpu.log",
    "results/multi30k-tuned-amp-seed2-cpu.log",
    "results/multi30k-tuned-amp-seed3-cpu.log",
)

RESULTS = [
    Row("`tuned`, three seeds", TUNED),
    Row("`tuned` by `--amp`", ("results/multi30k-tuned-bfloat16-cpu.log",)),
    Row("`tuned` by `--amp`, draws by the step, three seeds", TUNED_BY_STEP),
    Row("`tuned` by `--amp` and `--subword 8000`, three seeds", of_seeds("subword/8000"), "--subword 8000"),
    Row("`tuned` on eight devices", ("results/multi30k-tuned-8p-cpu.log",)),
    Row("`tuned`, speed alone, batch 128", ("results/multi30k-train_performance_1p-cpu.log",)),
]
EXPECTED = [  # of `modelzoo`, each row by its precision
    Row("`modelzoo` in float32", of_seeds("modelzoo/float32", SEEDS[:1])),
    Row("`modelzoo` in bfloat16, O1", of_seeds("modelzoo/bfloat16-O1", SEEDS[:1])),
    Row("`modelzoo` in float16, O1", of_seeds("modelzoo/float16-O1", SEEDS[:1])),
    Row("`modelzoo` in bfloat16, O2", of_seeds("modelzoo/bfloat16-O2")),
    Row("`modelzoo` in float16, O2", of_seeds("modelzoo/float16-O2")),
]
PADDED = [
    Row("`modelzoo` in float32", ("results/multi30k-modelzoo-float32-cpu.log",), "--fixed-length 46"),
    Row("`modelzoo` in float32, seed 2", ("results/multi30k-modelzoo-float32-seed2-cpu.log",), "--fixed-length 46"),
    Row("`modelzoo` in float16, O2", ("results/multi30k-modelzoo-float16-cpu.log",), "--fixed-length 46"),
    Row("`modelzoo` in bfloat16, O2", ("results/multi30k-modelzoo-bfloat16-cpu.log",), "--fixed-length 46"),
]
ON_THE_H200 = [
    Row("`tuned` by `--amp`", ("results/h200/tuned-amp.log",)),
    Row("`modelzoo`, padding read", ("results/h200/modelzoo-fp32.log",), "--fixed-length 46"),
    Row("`modelzoo` by `--amp`, padding read", ("results/h200/modelzoo-amp.log",), "--fixed-length 46"),
]
SAMPLE = [
    Row("the first command of README, Intel Xeon with AMX", ("results/sample-train_full_1p-amx-cpu.log",)),
    Row("the same, AMD EPYC", ("results/sample-train_full_1p-bfloat16-cpu.log",)),
    Row("the same, Intel Xeon without AMX", ("results/sample-train_full_1p-cpu.log",)),
]
WITHOUT = [  # a piece of `tuned`
    Row("nothing: `tuned`", TUNED),
    Row("nothing, bfloat16", of_seeds("ablation/tuned")),
    Row(
        "reading the reference always",
        of_seeds("ablation/teacher-forcing-0.5", SEEDS[:1]),
        "--teacher-forcing-ratio 0.5",
    ),
    Row("label smoothing, bfloat16", of_seeds("ablation/label-smoothing-0", SEEDS[:1]), "--label-smoothing 0"),
    Row("`tuned`'s first weights", of_seeds("ablation/init-modelzoo", SEEDS[:1]), "--init normal"),
    Row(
        "sources that end at `<eos>` in training", of_seeds("ablation/fixed-length-46", SEEDS[:1]), "--fixed-length 46"
    ),
    Row("clipping", of_seeds("ablation/clip-0"), "--clip 0"),
    Row("the words' start from counts", of_seeds("ablation/embeddings-drawn"), "--embeddings drawn"),
    Row("the rate's decay", of_seeds("ablation/schedule-constant"), "--schedule constant"),
    Row("the update gates' bias", of_seeds("ablation/update-bias-0"), "--update-bias 0"),
    Row("the warm-up", of_seeds("ablation/warmup-0"), "--warmup 0"),
    Row("the average, bfloat16", of_seeds("ablation/average-0"), "--average 0"),
    Row("dropout before the output layer, bfloat16", of_seeds("ablation/output-dropout-0"), "--output-dropout 0"),
    Row("batches of like length", of_seeds("ablation/batching-random"), "--batching random"),
]
BATCHES = [
    Row("64, `tuned`", TUNED),
    Row("**128**", of_seeds("batch/128"), "--batch-size 128 --lr 0.00424"),
    Row("256", of_seeds("batch/256", SEEDS[:1]), "--batch-size 256 --lr 0.006"),
    Row("256, the rate of 64", of_seeds("batch/256-unscaled", SEEDS[:1]), "--batch-size 256 --lr 0.003"),
    Row("256, that rate times 4", of_seeds("batch/256-linear", SEEDS[:1]), "--batch-size 256 --lr 0.012"),
    Row(
        "256, a shorter warm-up",
        of_seeds("batch/256-warmup-0.03", SEEDS[:1]),
        "--batch-size 256 --lr 0.006 --warmup 0.03",
    ),
    Row("512", of_seeds("batch/512", SEEDS[:1]), "--batch-size 512 --lr 0.0085"),
    Row("1024", of_seeds("batch/1024", SEEDS[:1]), "--batch-size 1024 --lr 0.012"),
    Row("2048", of_seeds("batch/2048", SEEDS[:1]), "--batch-size 2048 --lr 0.017"),
    Row("4096", of_seeds("batch/4096", SEEDS[:1]), "--batch-size 4096 --lr 0.024"),
]
CHANGES = [  # of docs/change-the-model.md, each with seed 1234
    Row("`gru.py` as it is", TUNED_BY_STEP[:1]),
    Row("hidden size 256", ("results/change/hidden-256.log",), "--hid-dim 256"),
    Row("bidirectional encoder", ("results/change/bidirectional.log",)),
    Row("second layer", ("results/change/two-layers.log",)),
    Row("LSTM", ("results/change/lstm.log",)),
]
PARAMETERS = 14_219_781  # of the published sizes on Multi30k, as the line `model:` of a log says
LINKS = {  # GB/s in one direction
    "within a machine, NVLink of an H200": 450.0,
    "between machines, 400 Gbit/s": 50.0,
    "200 Gbit/s": 25.0,
    "100 Gbit/s": 12.5,
    "25 Gbit/s": 3.125,
    "10 Gbit/s": 1.25,
    "1 Gbit/s": 0.125,
}
BEAMS_OF_TUNED = "results/multi30k-beam-val-cpu.log"  # of its three checkpoints, on the validation pairs
PENALTIES = ("results/multi30k-length-penalty-val-cpu.log", "results/search/d0-seed1234-beams.log")
PENALTIES_SHOWN = ("0.8", "1.0", "1.2", "1.4", "1.6", "1.8", "2.0")


def speeds(suffix: str) -> dict[str, Speed]:
    """The rows that every machine has, by a short name. `suffix` is that of its logs: "" or "-xeon"."""

    def training(name: str, port: str, flag: str) -> Speed:
        ratio, share = f"training {flag} / plain", f"share of the limit, {flag}"
        return Speed(name, f"training{suffix}", "plain", port, ratio, share)

    def decoding(name: str, port: str) -> Speed:
        ratio, share = f"decoding {port} / plain fp32", f"share of the limit, {port}"
        return Speed(f"greedy decoding in {name}, sentences/s", f"decoding{suffix}", "plain fp32", port, ratio, share)

    return {
        "amp": training("training in bfloat16, pairs/s", "amp", "--amp"),
        "fp32": training("training in float32, pairs/s", "fp32", "fp32"),
        "amp 0.5": Speed(
            "training in bfloat16 at teacher forcing 0.5, pairs/s; as a share of that at 1",
            f"training{suffix}",
            plain="plain",
            port="amp 0.5|forcing 0.5 / 1.0, --amp",
        ),
        "decoding bf16": decoding("bfloat16", "bf16"),
        "decoding fp32": decoding("float32", "fp32"),
        "start": Speed(
            "start to the first training step, data cached; cold cache, s", f"startup{suffix}", port="warm|cold"
        ),
        "torch": Speed("import of torch alone, s", f"startup{suffix}", port="import torch"),
        "to BLEU": Speed(
            "published BLEU (12.57) on the validation pairs, from nothing, s",
            f"time_to_bleu{suffix}",
            plain="the plain loop's ten epochs",
            port="seconds to BLEU 12.57",
            ratio="time to BLEU 12.57, plain / port",
        ),
        "BLEU": Speed("the first validation BLEU that reaches it", f"time_to_bleu{suffix}", port="BLEU"),
    }


EPYC, XEON = speeds(""), speeds("-xeon")
SPEED = [  # on the EPYC
    *(EPYC[name] for name in ("amp", "fp32", "amp 0.5")),
    Speed("peak memory in bfloat16; in float32, MB", "training", plain="MB plain", port="MB amp|MB fp32"),
    *(EPYC[name] for name in ("decoding bf16", "decoding fp32")),
    Speed(
        "share of the plain loop's translations: in bfloat16; in float32",
        "decoding",
        port="equal to plain, bf16|equal to plain, fp32",
    ),
    *(EPYC[name] for name in ("start", "torch", "to BLEU", "BLEU")),
    Speed(
        "tokenising 1,000,000 generated pairs with one worker; with two, pairs/s; two / one",
        "tokenising",
        port="1 workers|2 workers|two workers / one",
    ),
    Speed(
        "memory of training (RssAnon) on 29,000; on 5,000,000 generated pairs, MB; large / small",
        "large_corpus",
        port="small peak MB|large peak MB|memory (peak) of training, large / small corpus",
    ),
]
ON_THE_XEON = [
    XEON["fp32"],
    replace(XEON["amp"], name="training by `--amp`, which takes float32 there, pairs/s"),
    replace(XEON["amp 0.5"], name="the same at teacher forcing 0.5, pairs/s; as a share of that at 1"),
    Speed("peak memory in float32, MB", "training-xeon", plain="MB plain", port="MB fp32"),
    *(XEON[name] for name in ("decoding fp32", "decoding bf16", "start", "torch", "to BLEU", "BLEU")),
]
AGAINST = [  # the commit before the kernels of today, on the Xeon with AMX
    *(
        Speed(
            f"{name}, batch {batch}, pairs/s",
            "against-amx",
            plain=f"{short} {batch} other",
            port=f"{short} {batch}",
            ratio=f"training {short}, batch {batch}, this / other",
            share=f"share of the limit, {short}, batch {batch}",
        )
        for batch in (64, 512)
        for name, short in (("bfloat16", "amp"), ("float32", "float32"))
    ),
    *(
        Speed(f"peak memory in {name}, batch 512, MB", "against-amx", f"MB {short} 512 other", f"MB {short} 512")
        for name, short in (("bfloat16", "amp"), ("float32", "float32"))
    ),
    Speed(
        "ten epochs of `tuned` by `--amp`, the whole command, s",
        "against-whole-amx",
        plain="seconds other",
        port="seconds",
        ratio="ten epochs, this / other",
    ),
]


# ---------------------------------------------------------------- cells


@functools.cache
def text_of(path: str) -> str:
    """A log's text. The path is from the repository's root."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def read(path: str) -> logs.Run:
    """The one run of a log. The path is from the repository's root."""
    return logs.parse(text_of(path))


def mean_and_deviation(values: Iterable[float]) -> str:
    """Two digits after the point. Of several values it is their mean and the standard deviation of a run.

    >>> mean_and_deviation([30.0, 31.0]), mean_and_deviation([30.004]), mean_and_deviation([103273.92])
    ('30.50 ± 0.71', '30.00', '103274')
    """
    values = list(values)
    if not values:
        return ""
    digits = 2 if max(values) < 1000 else 0
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def duration(seconds: float, minute: str = "min", second: str = "s") -> str:
    """
    >>> duration(1887), duration(55)
    ('31 min', '55 s')
    """
    return f"{seconds / 60:.0f} {minute}" if seconds >= 120 else f"{seconds:.0f} {second}"


def device(run: logs.Run) -> str:
    """What a run had: processes, and cores of a processor, or the GPU."""
    if run.facts["device"] != "cpu":
        return f"{run.facts['processes']} {run.device}"
    processes, cores = int(run.facts["processes"]), cores_of(run)
    processor = re.search("AMD EPYC|Intel Xeon", " ".join(run.comments))
    plural = ("" if processes == 1 else "es", "" if cores == 1 else "s")
    where = f" of an {processor[0]}" if processor else ""
    return f"{processes} process{plural[0]}, {cores} core{plural[1]}{where}"


def cores_of(run: logs.Run) -> int:
    """The cores that a run on a CPU keeps busy."""
    there, threads = map(int, re.findall(r"(\d+) (?:cores|threads a process)", run.device))
    return min(there, threads * int(run.facts["processes"]))


def precision(run: logs.Run) -> str:
    """
    >>> precision(logs.parse("run: precision=bfloat16/O2")), precision(logs.parse("run: precision=float32/O0"))
    ('bfloat16, O2', 'float32')
    """
    return run.facts["precision"].replace("/", ", ").removesuffix(", O0")


def bleu_of_test(run: logs.Run) -> float:
    """Greedy, of the test pairs."""
    return float(run.bleus("greedy")[0])


def links(paths: Iterable[str], root: str) -> str:
    """A link to each log, named by the seed of its run.

    Args:
        paths: from the repository's root.
        root: the way from the document to the repository's root, such as "../".
    """
    return ", ".join(f"[{read(path).flags['seed']}]({root}{path})" for path in paths)


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. Its header has `|` between the columns."""
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    assert all(len(line) == len(names) for line in lines), header
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


# ---------------------------------------------------------------- tables


def run_row(row: Row, root: str) -> list[str]:
    """What the logs of full runs say about the test pairs, and about speed."""
    runs = [read(path) for path in row.logs]
    (where,), (how,) = {device(run) for run in runs}, {precision(run) for run in runs}
    return [
        row.name,
        where,
        how,
        mean_and_deviation(bleu for run in runs for bleu in run.bleus("greedy")),
        mean_and_deviation(bleu for run in runs for bleu in run.bleus("beam of 10")),
        mean_and_deviation(float(run.final["chrF"]) for run in runs if "chrF" in run.final),
        mean_and_deviation(run.perplexity for run in runs if run.perplexity),
        mean_and_deviation(run.rate for run in runs),
        duration(statistics.mean(run.seconds for run in runs if run.seconds)),
        links(row.logs, root),
    ]


def run_table(rows: Iterable[Row], root: str) -> str:
    header = "run | devices | precision | BLEU, greedy | BLEU, beam of 10 | chrF | perplexity | pairs/s | time | logs"
    return table(header, [run_row(row, root) for row in rows])


def published(root: str) -> str:
    """What others published for this model. No log of theirs is here."""
    tutorial = "https://github.com/bentrevett/pytorch-seq2seq"
    return table(
        "run | devices | precision | BLEU, greedy | perplexity | pairs/s",
        [
            ["the original, 2021", "8 Ascend 910", "O2", "12.57", "", "13693"],
            ["the original with torch 1.5", "8 Ascend 910", "O2", "12.87", "", "7397"],
            ["the original, one epoch", "1 Ascend 910", "O2", "", "", "1956"],
            [f"a tutorial with this model ([2]({tutorial}))", "", "", "20.6", "37.5, free-running", ""],
        ],
    )


def expected_of_modelzoo(root: str) -> str:
    """What an acceptance test compares with: the test pairs' scores of `modelzoo` by its precision."""
    rows = []
    for row in EXPECTED:
        runs = [read(path) for path in row.logs]
        name, _, _, bleu, _, chrf, perplexity, _, _, links = run_row(row, root)  # other work took part of their time
        lowest = min(bleu_of_test(run) for run in runs)
        rows.append([name, bleu, f"{lowest:.2f}", str(len(runs)), chrf, perplexity, links])
    return table("run | BLEU, greedy | lowest | runs | chrF | perplexity | logs", rows)


def commands_of_modelzoo(root: str) -> str:
    """The command of each row's first run."""
    lines = [read(row.logs[0]).comments[0] for row in EXPECTED]
    return "\n".join("    " + line.replace("../shared/data/multi30k", "data") for line in lines)


def scores_of_modelzoo(root: str) -> str:
    """The scores of one run that read the padding, with and without padding, and with a beam."""
    path = "results/multi30k-scores-cpu.log"
    rows = [
        [
            run.losses,
            *(f"{run.bleus(name)[0]:.2f}" for name in ("greedy", "beam of 10")),
            f"{run.perplexity:.2f}",
            f"[log]({root}{path})",
        ]
        for _, run in logs.parts(text_of(path), "## modelzoo")
    ]
    return table("test losses | BLEU, greedy | BLEU, beam of 10 | perplexity | log", rows)


def beginnings_of_modelzoo(root: str) -> str:
    """Greedy BLEU of the validation pairs while `modelzoo` reads the padding, and at last of the test pairs."""
    ended = (1, 2, 4, 6, 8, 9, 10)
    rows = []
    for path in (path for row in (*PADDED, *ON_THE_H200) if row.flags for path in row.logs):
        run = read(path)
        bleus = [f"{run.epochs[number - 1].bleu:.2f}" for number in ended]
        rows.append([device(run), precision(run), *bleus, f"{bleu_of_test(run):.2f}", links([path], root)])
    return table(f"epochs done: | | {' | '.join(map(str, ended))} | test2016 | log", rows)


def processes_and_batch(root: str) -> str:
    """The best epoch's greedy BLEU of the validation pairs: eight processes beside one."""
    rows = [
        Row("8 processes, batch 128", ("results/multi30k-tuned-8p-cpu.log",)),
        Row("1 process, batch 128", of_seeds("batch/128", SEEDS[:1])),
        Row("1 process, batch 64", TUNED),
    ]
    header = "run | best epoch's greedy BLEU, validation pairs | logs"
    return table(
        header,
        [
            [row.name, mean_and_deviation(read(path).best.bleu for path in row.logs), links(row.logs, root)]
            for row in rows
        ],
    )


def changes(root: str) -> str:
    """What other models than `gru.py`'s gave on the test pairs."""
    rows = []
    for row in CHANGES:
        (path,) = row.logs
        run = read(path)
        (parameters,) = re.findall(r"^model: ([\d,]+) parameters$", text_of(path), re.MULTILINE)
        bleus = [mean_and_deviation(run.bleus(name)) for name in ("greedy", "beam of 10")]
        rows.append([row.name, parameters, *bleus, f"{run.perplexity:.2f}", f"[log]({root}{path})"])
    return table("model | parameters | BLEU, greedy | BLEU, beam of 10 | perplexity | log", rows)


def sample(root: str) -> str:
    """The sample corpus: the first command of README, and each level of mixed precision."""
    rows = [[row.name, *sample_cells(read(row.logs[0])), f"[log]({root}{row.logs[0]})"] for row in SAMPLE]
    path = "results/sample-precisions-cpu.log"
    for title, run in logs.parts(text_of(path), r"# python3 train_8p\.py .*--opt-level O\d$"):
        level = title.split()[-1]
        cells = sample_cells(run)
        cells[-2:] = "", ""  # other work ran beside it
        rows.append([f"`--amp --amp-dtype bfloat16 --opt-level {level}`", *cells, f"[log]({root}{path})"])
    return table("run | computes in | BLEU, greedy | BLEU, beam of 10 | pairs/s | time | log", rows)


def sample_cells(run: logs.Run) -> list[str]:
    bleus = [mean_and_deviation(run.bleus(name)) for name in ("greedy", "beam of 10")]
    return [precision(run), *bleus, mean_and_deviation([run.rate]), duration(run.seconds) if run.seconds else ""]


def accept_table(root: str) -> str:
    """Which BLEU to accept from a device, by data, recipe and precision."""
    rows = []
    for key, row in accept.ranges().items():
        seeds = {path: "log" if path in accept.PARTS else read(path).facts["seed"] for path in row.paths}
        rows.append(
            [
                "Multi30k" if key.data == "multi30k" else "`sample/`",
                f"`{key.recipe}`",
                key.precision.replace("/", ", ").removesuffix(", O0"),
                str(key.batch),
                f"{row.bleu.runs} on {', '.join(row.machines)}",
                f"{row.bleu.mean:.2f}",
                f"**{row.bleu.low:.1f}** to {row.bleu.high:.1f}",
                f"{row.greedy.low:.1f} to {row.greedy.high:.1f}",
                ", ".join(f"[{name}]({root}{path})" for path, name in seeds.items()),
            ]
        )
    header = "data | recipe | precision | batch | runs | mean BLEU | accept if BLEU is | greedy alone | logs"
    return table(header, rows)


def speed_table(rows: Iterable[Speed], root: str, other: str = "plain loop", this: str = "this port") -> str:
    """A row for each figure of a benchmark: the one that it is compared with, and the port's."""
    lines = []
    for row in rows:
        path = f"bench/results/{row.log}.log"
        measured = logs.parse_measurement(text_of(path))
        values = measured.figures | measured.medians
        cells = [
            "; ".join(values[name] for name in names.split("|") if name)
            for names in (row.plain, row.port, row.ratio, row.share)
        ]
        lines.append([row.name, *cells, f"[log]({root}{path})"])
    ratio = f"{this.split()[-1]} / {other.split()[0]}"
    return table(f"figure | {other} | {this} | {ratio} | share of the limit | log", lines)


def translating(root: str) -> str:
    """Sentences a second on one core and the BLEU of the test pairs, beside CTranslate2."""
    path = "bench/results/translating-amx.log"
    measured = logs.parse_measurement(text_of(path))
    names = {
        "CTranslate2": "CTranslate2, int8, a Transformer",
        "bf16": "bfloat16",
        "bf16 list": "bfloat16, `--shortlist 10`",
        "fp32": "float32",
        "fp32 list": "float32, `--shortlist 10`",
    }
    lines = []
    for name, shown in names.items():
        rates = [measured.medians[f"{name} {beam}"] for beam in (1, 5, 10)]
        bleus = [measured.figures.get(f"BLEU {name} {beam}", "") for beam in (1, 5, 10)]
        start = measured.figures.get(f"first line {name}, s", "")
        lines.append([shown, *rates, *bleus, start, f"[log]({root}{path})"])
    header = "sentences/s | greedy | beam of 5 | beam of 10 | BLEU, greedy | BLEU, beam of 5 | BLEU, beam of 10"
    return table(f"{header} | seconds to the first line | log", lines)


def exported(root: str) -> str:
    """Sentences a second on one core, BLEU and equal translations of the test pairs, by onnxruntime and by PyTorch."""
    path = "bench/results/exported-amx.log"
    text = text_of(path)
    medians = logs.parse_measurement(text).medians
    names = {"torch": "PyTorch, float32", "onnx": "onnxruntime, float32", "int8": "onnxruntime, `--int8`"}
    lines = []
    for name, shown in names.items():
        rates = [medians[f"{name}, beam {beam}"] for beam in (1, 5, 10)]
        found = [re.search(rf"^{name}, beam {beam}: BLEU (\S+), (\d+) of ", text, re.MULTILINE) for beam in (1, 5, 10)]
        scores = [f"{float(line[1]):.2f}, {line[2]}" for line in found if line]
        lines.append([shown, *rates, *scores, f"[log]({root}{path})"])
    header = (
        "sentences/s | greedy | beam of 5 | beam of 10 | BLEU and equal translations, greedy | beam of 5 | beam of 10"
    )
    return table(f"{header} | log", lines)


def speed_on_the_h200(root: str) -> str:
    path = "results/h200/performance.log"
    computes_in = {"amp": "float16, O2 (`--amp`)", "fp32": "float32", "bf16": "bfloat16, O2"}
    rows = []
    for title, run in logs.parts(text_of(path), "### "):
        if found := re.search(r"performance (\w+) (\d+)$", title):
            rows.append([found[2], computes_in[found[1]], mean_and_deviation([run.rate]), f"[log]({root}{path})"])
    return table("batch | computes in | pairs/s | log", rows)


def sent(devices: int, bytes_each: int) -> float:
    """Bytes that each device sends, and receives, in a ring all-reduce of the gradients.

    >>> round(sent(2, 4)), round(sent(16, 2))
    (56879124, 53324179)
    """
    return 2 * (devices - 1) / devices * PARAMETERS * bytes_each


def volume(root: str) -> str:
    """MB that a device sends in a step, by the number of devices and the gradients' dtype."""
    rows = [
        [str(n), f"{2 * (n - 1) / n:.3f}", f"{sent(n, 4) / 1e6:.1f}", f"{sent(n, 2) / 1e6:.1f}"] for n in (2, 8, 16)
    ]
    header = "devices n | 2 (n - 1) / n | float32 or O1, MB a step | O2 in half precision, MB a step"
    return table(header, rows)


def steps_of_the_h200() -> dict[tuple[str, int], float]:
    """Seconds of a training step on one card, by its name in the log ("amp", "fp32") and the batch."""
    found = {}
    for title, run in logs.parts(text_of("results/h200/performance.log"), "### "):
        if place := re.search(r"performance (\w+) (\d+)$", title):
            found[place[1], int(place[2])] = int(place[2]) / run.rate
    return found


def links_and_shares(root: str) -> str:
    """What an all-reduce over 16 devices takes by the slowest link, and its share of a step if nothing hides it."""
    steps = steps_of_the_h200()
    rows = []
    for name, rate in LINKS.items():
        half, full = (sent(16, size) / (rate * 1e9) for size in (2, 4))
        cells = [f"{1000 * half:.2f}"]
        cells += [f"{100 * half / (half + steps['amp', batch]):.0f}%" for batch in (1536, 64)]
        cells += [f"{1000 * full:.2f}", f"{100 * full / (full + steps['fp32', 1536]):.0f}%"]
        rows.append([name, *cells])
    header = "slowest link | float16, ms | share at 1536 pairs a device | at 64 | float32, ms | share at 1536"
    return table(header, rows)


def communication(root: str) -> str:
    """Steps of two processes with and without the averaging of gradients."""
    path = "bench/results/communication-amx.log"
    measured = logs.parse_measurement(text_of(path))
    (parameters,) = re.findall(r"^2 processes; ([\d,]+) parameters; ", text_of(path), re.MULTILINE)
    rows = []
    for batch in (64, 512):
        times = [measured.medians[name] for name in (f"{batch} averaged", f"{batch} apart", "all-reduce")]
        share = float(measured.figures[f"share of a step, batch {batch}"])
        rows.append([parameters, str(batch), *times, f"{100 * share:.0f}%", f"[log]({root}{path})"])
    header = "parameters | batch of both | step, ms | without averaging, ms | the all-reduce alone, ms"
    return table(f"{header} | share of a step | log", rows)


def beams_of_tuned() -> dict[str, list[float]]:
    """BLEU of the validation pairs by the width of the beam, one for each of `tuned`'s three checkpoints."""
    found: dict[str, list[float]] = {}
    for title, run in logs.parts(text_of(BEAMS_OF_TUNED), "# the checkpoint of seed "):
        found.setdefault(title.split()[-1], []).append(float(run.final["BLEU score"]))
    return found


def beams_of_penalties() -> dict[str, list[float]]:
    """BLEU of the validation pairs by the length penalty, one for each of d0's three checkpoints.

    The log has others, tried with one checkpoint alone. The table shows those of `PENALTIES_SHOWN`.
    """
    found: dict[str, list[float]] = {}
    ours, ones = (text_of(path) for path in PENALTIES)
    for title, run in logs.parts(ours, "# .*--length-penalty [0-9.]+ "):
        penalty = title.partition("--length-penalty ")[2].split()[0]
        found.setdefault(f"{float(penalty):.1f}", []).extend(run.bleus("beam of 10"))
    for _, run in logs.parts(ones, "# .*--beam-size 10$"):
        found.setdefault("1.0", []).extend(run.bleus("beam of 10")[:1])
    return {penalty: found.get(penalty, []) for penalty in PENALTIES_SHOWN}


def mean_row(row: Row) -> list[str]:
    """Greedy BLEU and perplexity of the best epoch, and the beam's BLEU with its weights, on the validation pairs."""
    best = [read(path).best for path in row.logs]
    beams = beams_of_tuned()["10"] if row.logs == TUNED else [read(path).bleus("beam of 10")[-1] for path in row.logs]
    return [
        mean_and_deviation(epoch.bleu for epoch in best),
        mean_and_deviation(beams),
        mean_and_deviation(epoch.perplexity for epoch in best),
    ]


def mean_table(first: str, rows: Iterable[Row], root: str) -> str:
    flags = {row.name: f"`{row.flags}`" if row.flags else "" for row in rows}
    return table(
        f"{first} | flags | BLEU, greedy | BLEU, beam of 10 | perplexity | logs",
        [[row.name, flags[row.name], *mean_row(row), links(row.logs, root)] for row in rows],
    )


def one_line(first: str, values: dict[str, list[float]]) -> str:
    """A table of one row: the mean of each column's values."""
    header = " | ".join([first, *values])
    return table(header, [["BLEU", *(f"{statistics.mean(bleus):.2f}" for bleus in values.values())]])


def batching(root: str) -> str:
    """The speed with batches of like length and with random ones, which ran in turn."""
    path = "bench/results/batching.log"
    rates: dict[str, list[float]] = {}
    for kind, run in logs.parts(text_of(path), "(like-length|random)$"):
        rates.setdefault(kind, []).append(run.rate)
    rows = [[f"`{kind}`", f"{statistics.mean(values):.1f}", f"[log]({root}{path})"] for kind, values in rates.items()]
    return table("batches | training, pairs/s | log", rows)


def summary(root: str, chinese: bool = False) -> str:
    """README's four rows."""
    header = "run | on | BLEU, greedy | BLEU, beam of 10 | pairs/s | logs"
    names = ("published in 2021", "recipe `modelzoo`, with the published settings", "recipe `tuned`, the default")
    where, seeds = ("8 Ascend 910", "{} CPU core", "1 {}"), {2: ", two seeds", 3: ", three seeds"}
    missing, comma = "not published", ", "
    if chinese:
        header = "运行 | 设备 | BLEU（贪心解码） | BLEU（束宽 10） | 句对/秒 | 日志"
        names = ("2021 年公布的结果", "预设 `modelzoo`，采用公布的设置", "预设 `tuned`，默认")
        where, seeds = ("8 卡昇腾 910", "CPU {} 核", "1 张 {}"), {2: "，两个种子", 3: "，三个种子"}
        missing, comma = "未公布", "，"
    rows = [[names[0], f"{where[0]}{comma}O2", "12.57", "", "13693", missing]]
    shown = ((names[1], where[1], EXPECTED[0]), (names[2], where[1], RESULTS[0]), (names[2], where[2], ON_THE_H200[0]))
    for name, place, row in shown:
        runs = [read(path) for path in row.logs]
        on = device(runs[0]).removeprefix("1 ") if runs[0].facts["device"] != "cpu" else cores_of(runs[0])
        bleus = [mean_and_deviation(b for run in runs for b in run.bleus(kind)) for kind in ("greedy", "beam of 10")]
        rates = mean_and_deviation(run.rate for run in runs)
        name += seeds.get(len(runs), "")
        machine = f"{place.format(on)}, {precision(runs[0])}".replace(", ", comma)
        rows.append([name, machine, *bleus, rates, links(row.logs, root).replace(", ", comma)])
    return table(header, rows)


TABLES: dict[str, Callable[[str], str]] = {
    "summary": summary,
    "summary-zh": lambda root: summary(root, chinese=True),
    "published": published,
    "results": lambda root: run_table(RESULTS, root),
    "h200": lambda root: run_table(ON_THE_H200, root),
    "h200-speed": speed_on_the_h200,
    "modelzoo": expected_of_modelzoo,
    "modelzoo-commands": commands_of_modelzoo,
    "modelzoo-scores": scores_of_modelzoo,
    "modelzoo-epochs": beginnings_of_modelzoo,
    "processes": processes_and_batch,
    "changes": changes,
    "sample": sample,
    "accept": accept_table,
    "speed-epyc": lambda root: speed_table(SPEED, root),
    "speed-xeon": lambda root: speed_table(ON_THE_XEON, root),
    "speed-before": lambda root: speed_table(AGAINST, root, "2feed7b", "this commit"),
    "translating": translating,
    "exported": exported,
    "pieces": lambda root: mean_table("without", WITHOUT, root),
    "batching": batching,
    "beams": lambda root: one_line("beam", beams_of_tuned()),
    "length-penalties": lambda root: one_line("length penalty", beams_of_penalties()),
    "volume": volume,
    "links": links_and_shares,
    "communication": communication,
    "batches": lambda root: mean_table("batch", BATCHES, root),
}
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def render(text: str, root: str) -> str:
    """A document with its tables as the logs give them.

    Args:
        text: of the document.
        root: the way from the document to the repository's root: "" or "../".

    Raises:
        KeyError: the document names a table that is not here.
    """
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]](root)}\n\n{place[3]}", text)


def main() -> None:
    for path in DOCUMENTS:
        root = "../" * (len(path.relative_to(ROOT).parts) - 1)
        before = path.read_text(encoding="utf-8")
        after = render(before, root)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
