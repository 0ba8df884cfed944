"""Reads logs: the lines of `train_8p.py`, and the tables and figures of the benchmarks.

All patterns of log lines stand here. The benchmarks, the documents' tables, the wrappers and the tests use them.
Nothing here needs a package.
"""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from nmt import config

RUN = re.compile(r"^run: (?P<facts>.*)$", re.MULTILINE)
DEVICE = re.compile(r"^device: (?P<device>.*)$", re.MULTILINE)
FLAGS = re.compile(r"^flags: (?P<flags>.*)$", re.MULTILINE)
CONFIG = re.compile(r"^config: (?P<line>.*)$", re.MULTILINE)
LOSS_FIGURE = r"(?:\d\.\d{4}e[+-]\d\d|nan|inf)"
STEP = re.compile(
    r"^\[(?P<device>\w+) id: (?P<index>\d+) \] Epoch: \[(?P<epoch>\d+)\]\[ *(?P<step>\d+)/(?P<steps>\d+)\]\t"
    r"Time +(?P<seconds>\d+\.\d{3}) \( *\d+\.\d{3}\)\tData +\d+\.\d{3} \( *\d+\.\d{3}\)\t"
    rf"Loss (?P<loss>{LOSS_FIGURE}) \((?P<mean_loss>{LOSS_FIGURE})\)$",
    re.MULTILINE,
)
RATE = re.compile(r"^\* FPS@all (?P<rate>[0-9.]+)$", re.MULTILINE)
COMPILE_TIME = re.compile(r"^\* CompileTime (?P<seconds>\S+)$", re.MULTILINE)
VALIDATION = re.compile(
    r"^validation: epoch (?P<number>\d+)(?P<of>/\d+)?  train loss (?P<train_loss>\S+)  loss (?P<loss>\S+) "
    r"\(perplexity (?P<perplexity>\S+)\)  free-running loss (?P<free_running_loss>\S+) \(perplexity \S+\)  "
    r"greedy BLEU (?P<bleu>\S+)  learning rate \S+$",
    re.MULTILINE,
)
TEST_LOSS = re.compile(r"^test loss (?P<loss>\S+) \(perplexity (?P<perplexity>\S+)\)$", re.MULTILINE)
SCORE = re.compile(
    r"^(?P<name>greedy|beam of \d+): BLEU (?P<bleu>\S+)(  sacreBLEU (?P<sacrebleu>\S+))?  chrF (?P<chrf>\S+)$",
    re.MULTILINE,
)
FINAL_DECODING = re.compile(r"^final scores: (?P<name>greedy|beam of \d+)$", re.MULTILINE)
LOSSES = re.compile(r"^losses: (?P<losses>.*)$", re.MULTILINE)
FINAL_SCORE = re.compile(r"^(?P<name>BLEU score|sacreBLEU|chrF) = (?P<value>\S+)", re.MULTILINE)
FINAL_RESULT = re.compile(r"^(?P<name>(Final|E2E) [^:]*) : (?P<value>\S+)$", re.MULTILINE)  # the wrappers'
DONE = re.compile(r"^done: (?P<seconds>\d+) s$", re.MULTILINE)
FIGURE = re.compile(r"^figure: (?P<name>.+) = (?P<value>\S+) \(must: .+\)$", re.MULTILINE)  # the benchmarks'
NOTED = re.compile(
    r"^(?P<name>share of the limit, \w+|the plain loop's ten epochs): (?P<value>\S+)( s)?$", re.MULTILINE
)


@dataclass(frozen=True)
class Epoch:
    """What a log says about one epoch, on the validation pairs.

    Attributes:
        number: from 0.
        train_loss, loss, free_running_loss: nats a target token.
        perplexity: the exponential of `loss`.
        bleu: greedy, from 0 to 100.
    """

    number: int
    train_loss: float
    loss: float
    perplexity: float
    free_running_loss: float
    bleu: float


@dataclass(frozen=True)
class Score:
    """One way to decode the test pairs, and its scores. Older logs have no sacreBLEU in this line."""

    name: str
    bleu: float
    chrf: float
    sacrebleu: float | None = None


@dataclass(frozen=True)
class Run:
    """What a log says about one run. Empty or None stands for what the log does not say.

    Attributes:
        comments: the lines at its top that begin with `#`: the command, then commit, machine and company.
        facts: of the line `run:`, by name.
        device: of the line `device:`.
        flags: of the lines `config:`, or of the line `flags:` in older logs, by name.
        epochs: a validation each.
        rates: pairs a second of each epoch.
        scores: in the order in which they stand there. One way to decode may stand there several times.
        losses: how the test losses were computed, such as "without padding". Older logs do not say it.
        perplexity: of the test pairs.
        final: what other tools read: "BLEU score", "sacreBLEU", "chrF", and the wrappers' result, by name.
        seconds: the whole run's.
    """

    comments: list[str]
    facts: dict[str, str]
    device: str
    flags: dict[str, str]
    epochs: list[Epoch]
    rates: list[float]
    scores: list[Score]
    losses: str
    perplexity: float | None
    final: dict[str, str]
    seconds: int | None

    @property
    def best(self) -> Epoch:
        """The epoch with the highest BLEU."""
        return max(self.epochs, key=lambda epoch: epoch.bleu)

    @property
    def rate(self) -> float:
        """Pairs a second: the median over the epochs, as in the wrappers' result."""
        return statistics.median(self.rates)

    def bleus(self, name: str) -> list[float]:
        """BLEU of one way to decode, such as "greedy", once for each time that it stands there."""
        return [score.bleu for score in self.scores if score.name == name]


def facts_of(line: str) -> dict[str, str]:
    """The facts of a line `run:` or `flags:`.

    >>> facts_of("run: device=cpu processes=2 precision=float32/O0")
    {'device': 'cpu', 'processes': '2', 'precision': 'float32/O0'}
    """
    return dict(fact.split("=", 1) for fact in line.partition(": ")[2].split(" ") if "=" in fact)


def flags_of(text: str) -> dict[str, str]:
    """The flags that the end of a log gives, by name, as texts. A log that was cut short has none.

    >>> flags_of("done: 3 s\\nconfig: # a comment\\nconfig: batch-size = 64\\nconfig: amp = true\\n")
    {'batch_size': '64', 'amp': 'True'}
    """
    content = config.parse("\n".join(match["line"] for match in CONFIG.finditer(text)))
    return {name.replace("-", "_"): str(value) for name, value in content.items()}


def parse(text: str) -> Run:
    """Reads the log of one run, or of one evaluation.

    Raises:
        ValueError: the text has several lines `run:`, `flags:`, `device:` or `losses:`, or several files of flags.
    """
    lines = {}
    for name, pattern in (("run", RUN), ("flags", FLAGS), ("device", DEVICE), ("losses", LOSSES)):
        found = [match.group() for match in pattern.finditer(text)]
        if len(found) > 1:
            raise ValueError(f"expected one run, not {len(found)} lines '{name}:'")
        lines[name] = found[0] if found else ""
    end = DONE.search(text)
    test_loss = TEST_LOSS.search(text)
    final = {
        match["name"]: match["value"] for pattern in (FINAL_SCORE, FINAL_RESULT) for match in pattern.finditer(text)
    }
    scores = [_score(match) for match in SCORE.finditer(text)]
    if decoding := FINAL_DECODING.search(text):  # older logs have such scores in a line of their own too
        bleu, chrf, sacrebleu = (float(final[name]) for name in ("BLEU score", "chrF", "sacreBLEU"))
        scores.append(Score(decoding["name"], bleu, chrf, sacrebleu))
    seconds = final.get("E2E Training Duration sec") or (end and end["seconds"])
    return Run(
        comments=re.findall(r"^# (.*)$", text.partition("\nrun: ")[0], re.MULTILINE),
        facts=facts_of(lines["run"]),
        device=lines["device"].partition(": ")[2],
        flags=facts_of(lines["flags"]) or flags_of(text),
        epochs=[_epoch(match) for match in VALIDATION.finditer(text)],
        rates=[float(match["rate"]) for match in RATE.finditer(text)],
        scores=scores,
        losses=lines["losses"].partition(": ")[2],
        perplexity=float(test_loss["perplexity"]) if test_loss else None,
        final=final,
        seconds=int(seconds) if seconds else None,
    )


def _epoch(match: re.Match[str]) -> Epoch:
    number, *values = match.group("number", "train_loss", "loss", "perplexity", "free_running_loss", "bleu")
    # Logs count epochs from 1, and say of how many. Older ones count from 0.
    return Epoch(int(number) - (match["of"] is not None), *map(float, values))


def _score(match: re.Match[str]) -> Score:
    sacrebleu = match["sacrebleu"]
    return Score(match["name"], float(match["bleu"]), float(match["chrf"]), float(sacrebleu) if sacrebleu else None)


def parts(text: str, heading: str) -> Iterator[tuple[str, Run]]:
    """The runs of a log that holds several, each with its heading.

    Args:
        text: of the log.
        heading: a pattern that a part's first line matches from its start. What stands before the first is left out.

    >>> text = "# two runs\\n## a\\n* FPS@all 1.5\\n## b\\n* FPS@all 2.5\\n"
    >>> [(title, run.rate) for title, run in parts(text, "## ")]
    [('## a', 1.5), ('## b', 2.5)]
    """
    starts = [match.start() for match in re.finditer(rf"^{heading}", text, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        title, _, body = text[start:end].partition("\n")
        yield title, parse(body)


@dataclass(frozen=True)
class Measurement:
    """What the log of a benchmark says, digits as they stand there.

    Attributes:
        medians: of the table's last row, by the names of its first.
        figures: of the lines `figure:` and of the other lines with a figure, by name.
    """

    medians: dict[str, str]
    figures: dict[str, str]


def parse_measurement(text: str) -> Measurement:
    """Reads the log of a benchmark.

    >>> text = "     round     plain  GFLOP/s amp\\n         1     21.83        411.1\\n"
    >>> text += "    median     21.83        411.1\\n"
    >>> parse_measurement(text + "figure: training --amp / plain = 22.99 (must: >= 20)\\n")
    Measurement(medians={'plain': '21.83', 'GFLOP/s amp': '411.1'}, figures={'training --amp / plain': '22.99'})
    """
    names = re.search(r"^ +round  (.*)$", text, re.MULTILINE)
    values = re.search(r"^ +median  (.*)$", text, re.MULTILINE)
    medians = zip(re.split(r"\s{2,}", names[1].strip()), values[1].split(), strict=True) if names and values else ()
    figures = {found["name"]: found["value"] for line in (FIGURE, NOTED) for found in line.finditer(text)}
    return Measurement(dict(medians), figures)
