"""README's commands are those that CI runs, its links lead somewhere, and both languages say the same."""

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import train_8p

import pytest
from conftest import REPOSITORY, write_corpus

ENGLISH = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "README.zh-CN.md").read_text(encoding="utf-8")
SEARCH = (REPOSITORY / "docs" / "search.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(path for pattern in ("*.md", "[a-z]*/*.md") for path in REPOSITORY.glob(pattern))
LANGUAGES = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])


def code_lines(text: str) -> list[str]:
    """The lines of the indented blocks, each of which follows an empty line."""
    blocks = re.findall(r"\n\n((?:    .*\n)+)", text)
    return [line[4:] for block in blocks for line in block.splitlines()]


def test_both_languages_have_the_same_commands_and_outputs():
    assert code_lines(ENGLISH) == code_lines(CHINESE)


def test_both_languages_have_the_same_headings_and_tables():
    assert [len(level) for level in re.findall(r"^(#+) ", ENGLISH, re.MULTILINE)] == [
        len(level) for level in re.findall(r"^(#+) ", CHINESE, re.MULTILINE)
    ]
    assert ENGLISH.count("\n|") == CHINESE.count("\n|")


def test_both_languages_have_the_same_numbers_in_each_section():
    english, chinese = (text.split("\n## ") for text in (ENGLISH, CHINESE))
    for ours, theirs in zip(english, chinese, strict=True):
        numbers = [sorted(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"\]\([^)]*\)", "", text))) for text in (ours, theirs)]
        assert numbers[0] == numbers[1], ours.partition("\n")[0]


def test_the_recipes_are_as_they_are_described():
    """In English; the other language has the same numbers."""
    training = " ".join(ENGLISH.split("\n## Training")[1].split())
    tuned, modelzoo = re.search(r"- `tuned`, the default: (.*?) - `modelzoo`, (.*?\.) ", training).groups()
    recipe = train_8p.RECIPES["tuned"]
    of_tuned = (
        f"{recipe['optimizer'].capitalize()}, rate {recipe['lr']} with {recipe['warmup']:.0%} warm-up",
        f"{recipe['schedule']} decay",
        f"batch {recipe['batch_size']} in total, {train_8p.SHARED_BATCH} on several devices",
        f"norm clipped to {recipe['clip']:g}",
        f"label smoothing {recipe['label_smoothing']}",
        f"teacher forcing {recipe['teacher_forcing_ratio']:g}",
        f"dropout {recipe['dropout']} on the embeddings and {recipe['output_dropout']} in front of the output layer",
        f"`--update-bias {recipe['update_bias']:g}`",
        f"`--average {recipe['average']}`",
        f"a beam of {recipe['beam_size']} and a length penalty of {recipe['length_penalty']}",
    )
    recipe = train_8p.RECIPES["modelzoo"]
    of_modelzoo = (
        f"{recipe['optimizer'].capitalize()} at {recipe['lr']}",
        f"batch {recipe['batch_size']}",
        f"teacher forcing {recipe['teacher_forcing_ratio']}",
        f"cut to {recipe['fixed_length']} tokens",
    )
    for described, phrases in ((tuned, of_tuned), (modelzoo, of_modelzoo)):
        for phrase in phrases:
            assert phrase in described, phrase


@LANGUAGES
def test_the_test_command_is_the_one_that_ci_runs(text):
    commands = [line for line in code_lines(text) if line.endswith("-m pytest")]
    assert len(commands) == 1
    # `set -e` alone does not stop where a command in front of `&&` fails.
    assert f"{commands[0]} || exit" in (REPOSITORY / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("path", [path.relative_to(REPOSITORY) for path in DOCUMENTS], ids=str)
def test_every_link_into_the_repository_leads_somewhere(path):
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#][^)]*)\)", text) if not link.startswith("http")]
    assert links or "](" not in text
    for link in links:
        target, _, place = link.partition("#")
        target = REPOSITORY / path.parent / target
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in [heading.lower().replace(" ", "-") for heading in headings], link


def test_both_languages_have_the_same_program_and_it_translates(tmp_path):
    programs = [re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1) for text in (ENGLISH, CHINESE)]
    assert programs[0] == programs[1]
    corpus = write_corpus(tmp_path / "corpus", 64)
    small = ["--data-dir", corpus, "--epochs", "1", "--emb-dim", "8", "--hid-dim", "12", "--device", "cpu"]
    subprocess.run([sys.executable, REPOSITORY / "train_8p.py", *small], cwd=tmp_path, check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", programs[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 4  # greedy, and three of the beam
    scores = [float(line.partition(" ")[0]) for line in done.stdout.splitlines()[1:]]
    assert scores == sorted(scores, reverse=True)


def flags_of(log: str) -> dict[str, str]:
    """What the one run of a log ran with."""
    (line,) = re.findall(r"^flags: (.*)$", log, re.MULTILINE)
    flags = dict(flag.split("=", 1) for flag in line.split(" ") if "=" in flag)
    return flags | {"init": train_8p.FORMER_INITIALISATIONS.get(flags.get("init"), flags.get("init"))}


def flags_of_recipe(name: str, arguments: str = "", **values: object) -> dict[str, str]:
    """What a recipe runs with, but for the arguments of a command line and `values`."""
    args = vars(train_8p.build_parser().parse_args(arguments.split()))
    flags = {flag: value if args[flag] is None else args[flag] for flag, value in train_8p.RECIPES[name].items()}
    return {flag: str(value) for flag, value in (flags | values).items()}


def validations(log: Path) -> list[tuple[float, float, int]]:
    """BLEU, perplexity and number of each epoch."""
    pattern = r"^validation: epoch (\d+) .*?\(perplexity (\S+)\).* greedy BLEU (\S+)"
    found = re.findall(pattern, log.read_text(encoding="utf-8"), re.MULTILINE)
    return [(float(bleu), float(perplexity), int(number)) for number, perplexity, bleu in found]


def mean_and_deviation(values: Sequence[float]) -> str:
    """As the tables show it; of one value, that value."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


# How a log says what stands in the results table's columns, from the fourth on.
RESULTS = [
    r"^greedy: BLEU (\S+)",
    r"^beam of 10: BLEU (\S+)",
    r"^chrF = (\S+)",
    r"^test loss \S+ \(perplexity (\S+)\)",
    r"^Final Performance images/sec : (\S+)",
]


@LANGUAGES
def test_the_figures_of_the_results_stand_in_the_logs_of_such_runs(text):
    """In a row of several logs, their mean and the deviation of one of them."""
    rows = [line for line in text.splitlines() if line.startswith("|") and "](results/" in line]
    assert len(rows) == 8
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        logs = [(REPOSITORY / path).read_text(encoding="utf-8") for path in re.findall(r"\]\((results/[^)]*)\)", row)]
        for cell, pattern in zip(cells[4:9], RESULTS, strict=True):
            values = [float(value) for log in logs for value in re.findall(pattern, log, re.MULTILINE)]
            assert len(values) in (0, len(logs))
            assert cell == (mean_and_deviation(values) if values else ""), row
        recipe = re.search("`(tuned|modelzoo)`", cells[1]).group(1)
        for log in logs:
            bleus = [re.findall(rf"^{name} = (\S+)", log, re.MULTILINE) for name in ("sacreBLEU", "BLEU score")]
            assert bleus[0] == bleus[1]
            logged = flags_of(log)
            processes = int(re.search(r" processes=(\d+) ", log).group(1))
            others = {"batch_size": 128, "epochs": 1} if logged["performance"] == "True" else {}
            if processes > 1:
                others = {"batch_size": train_8p.SHARED_BATCH, "lr": train_8p.tuned_rate(train_8p.SHARED_BATCH)}
            assert flags_of_recipe(recipe, **others).items() <= logged.items(), row
            there, threads = map(int, re.search(r"CPU, (\d+) cores, (\d+) threads a process", log).groups())
            cores = min(there, threads * processes)
            assert re.match(rf"{processes} process(es)? on {cores} CPU cores?$", cells[2]) or (
                cells[2] == f"CPU 的 {cores} 个核上 {processes} 个进程"
            )
            precision = re.search(r"precision=(\w+)/(O\d)", log).expand(r"\1, \2").removesuffix(", O0")
            assert cells[3].replace("，", ", ") == precision
        assert len({flags_of(log)["seed"] for log in logs}) == len(logs)
        seconds = re.findall(r"^E2E Training Duration sec : (\d+)", "".join(logs), re.MULTILINE)
        assert cells[9].split()[0] == f"{statistics.mean(map(int, seconds)) / 60:.0f}"


@LANGUAGES
def test_both_precisions_of_tuned_stand_below_the_commands(text):
    rows = rows_of_the_search("What each piece gives")
    *_, below = text.partition("\n## ")[2].partition("\n## ")[0].rpartition("\n\n")
    assert re.findall(r"[\d.]+ ± [\d.]+", " ".join(below.split())) == [*rows[1][2:4], *rows[0][2:4]]


@LANGUAGES
def test_what_else_is_said_of_the_scores_stands_in_their_log(text):
    log = (REPOSITORY / "results" / "multi30k-scores-cpu.log").read_text(encoding="utf-8")
    bleus = re.findall(r"^(greedy|beam of 10): BLEU (\S+)  sacreBLEU (\S+)", log, re.MULTILINE)
    assert len(bleus) == 10
    assert all(bleu == sacrebleu for _, bleu, sacrebleu in bleus)
    of_modelzoo = log.rpartition("losses: without padding")[2]
    perplexity = re.search(r"^test loss \S+ \(perplexity (\S+)\)", of_modelzoo, re.MULTILINE).group(1)
    paragraph = next(part for part in text.split("\n\n") if "multi30k-scores-cpu.log" in part)
    assert [f"{float(bleus[-1][1]):.2f}", perplexity] == re.findall(r"\b\d+\.\d\d\b", paragraph)


@LANGUAGES
def test_the_beginnings_of_modelzoo_are_those_of_its_logs(text):
    """BLEU after four epochs, and what the last one adds, of the two seeds."""
    names = ("multi30k-modelzoo-float32-cpu.log", "multi30k-modelzoo-float32-seed2-cpu.log")
    runs = [[bleu for bleu, *_ in validations(REPOSITORY / "results" / name)] for name in names]
    for bleus in ([run[3] for run in runs], [run[9] - run[8] for run in runs]):
        assert any(join.join(f"{bleu:.1f}" for bleu in bleus) in text for join in (" and ", " 和 "))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, SEARCH], ids=["en", "zh", "search"])
def test_the_best_epochs_of_eight_processes_and_of_one_with_their_batch_stand_in_their_logs(text):
    bleus = [
        f"{max(bleu for bleu, *_ in validations(REPOSITORY / 'results' / name)):.2f}"
        for name in ("multi30k-tuned-8p-cpu.log", "batch/128.log")
    ]
    assert any(re.findall(r"\b\d\d\.\d\d\b", part)[:2] == bleus for part in text.split("\n\n"))


@LANGUAGES
def test_the_bleu_of_each_precision_stands_in_its_log(text):
    log = (REPOSITORY / "results" / "sample-precisions-cpu.log").read_text(encoding="utf-8")
    levels = re.findall(r"^run: .* precision=\w+/(O\d) ", log, re.MULTILINE)
    scores = re.findall(r"^greedy: BLEU (\S+)", log, re.MULTILINE)
    assert levels == ["O0", "O1", "O2", "O3"]
    for run in log.split("\nrun: ")[1:]:
        assert flags_of_recipe("tuned", batch_size=32).items() <= flags_of(run).items()
    paragraph = text[: text.index("(results/sample-precisions-cpu.log)")].rpartition("\n\n")[2]
    for level, score in zip(levels, scores, strict=True):
        assert re.search(rf"{level}\s+{float(score):.2f}|{float(score):.2f}\s+in\s+{level}", paragraph)


@LANGUAGES
def test_the_figures_of_the_speed_table_stand_in_their_logs(text):
    rows = [line for line in text.splitlines() if line.startswith("|") and "](bench/results/" in line]
    assert len(rows) == 16
    for row in rows:
        log = (REPOSITORY / re.search(r"\]\((bench/results/[^)]*)\)", row).group(1)).read_text(encoding="utf-8")
        figures = re.findall(r"[\d.]*\d", " ".join(row.split("|")[2:6]))
        assert figures
        printed = re.findall(r"[\d.]*\d", log)
        assert all(figure in printed for figure in figures), row


def best_epoch(log: str) -> tuple[float, float, int]:
    """BLEU, perplexity and number of the epoch with the highest BLEU."""
    return max(validations(REPOSITORY / "docs" / log))


def beams_of(log: str) -> list[float]:
    """BLEU of each beam search in the log of a run that was scored on the validation pairs; the last is `tuned`'s."""
    text = (REPOSITORY / "docs" / log).read_text(encoding="utf-8")
    assert "--test-name val" in text.partition("\n")[0]
    return [float(bleu) for bleu in re.findall(r"^beam of 10: BLEU (\S+)", text, re.MULTILINE)]


def rows_of_the_search(section: str) -> list[list[str]]:
    """The cells of the rows with a log in one section of docs/search.md; a row's logs are in its last cell."""
    lines = SEARCH.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if ".log)" in line and line[0] == "|"]


def logs_of(row: list[str]) -> list[str]:
    """A row's logs, from docs/."""
    return re.findall(r"\]\(([^)]*)\)", row[-1])


def test_the_figures_of_the_search_stand_in_their_logs():
    rows = [row for row in rows_of_the_search("What was tried") if ", epoch " in row[2]]
    assert len(rows) >= 15
    for row in rows:
        bleu, epoch = re.search(r"(\S+), epoch (\d)", row[2]).groups()
        claim = (float(bleu.strip("*")), float(row[3]), int(epoch))
        assert claim == pytest.approx(best_epoch(logs_of(row)[0]), abs=0.00501), row


def test_what_the_search_compares_at_the_same_epoch_stands_in_the_other_runs_log():
    compared = 0
    for row in rows_of_the_search("What was tried"):
        for epoch, run, bleu in re.findall(r"epoch (\d) \((\w+): ([\d.]+)\)", row[2]):
            other = validations(REPOSITORY / "results" / "search" / f"{run}.log")
            assert f"{next(value for value, _, number in other if number == int(epoch)):.2f}" == bleu, row
            compared += 1
    assert compared == 7


def test_the_means_and_beams_of_the_search_are_those_of_the_rows_logs():
    rows = [row for row in rows_of_the_search("What was tried") if re.fullmatch(r"\**d[1-9]\**", row[0])]
    assert len(rows) == 5
    for row in rows:
        logs = logs_of(row)
        bleu = statistics.mean(beams_of(log)[0] for log in logs)  # before another length penalty was tried
        assert re.search(r" beam.*? ([\d.]{5})", row[1]).group(1) == f"{bleu:.2f}", row
        if len(logs) > 1:
            mean = mean_and_deviation([best_epoch(log)[0] for log in logs])
            assert re.search(r"three seeds: (\S+ ± [\d.]+)", row[1]).group(1) == mean, row


def bleu_of(row: list[str]) -> float:
    """The greedy BLEU of a row of means."""
    return float(row[2].partition(" ")[0])


def check_means(row: list[str], beams: Sequence[float] | None = None) -> None:
    """That a row's figures are those of its logs, and that those ran with the row's flags.

    The cells are a name, flags, greedy BLEU, BLEU of the beam, perplexity, logs by their seeds. `beams` are given where
    the logs have none on the validation pairs.
    """
    links = re.findall(r"\[(\d+)\]\(([^)]*)\)", row[5])
    for seed, log in links:
        expected = flags_of_recipe("tuned", row[1].strip("`"), seed=seed)
        assert expected.items() <= flags_of((REPOSITORY / "docs" / log).read_text(encoding="utf-8")).items(), log
    logs = [log for _, log in links]
    assert logs == logs_of(row)
    bleus, perplexities, _ = zip(*map(best_epoch, logs), strict=True)
    beams = beams or [beams_of(log)[-1] for log in logs]
    for cell, values in zip(row[2:5], (bleus, beams, perplexities), strict=True):
        assert cell == mean_and_deviation(values), row


def check_tuned(row: list[str]) -> None:
    """As `check_means`, for README's `tuned`, whose logs have no beam on the validation pairs."""
    assert logs_of(row) == [f"../results/multi30k-tuned-seed{seed}-cpu.log" for seed in (1234, 2, 3)]
    check_means(row, bleus_of_beams("multi30k-beam-val-cpu.log")["10"])


def precision_of(row: list[str]) -> str:
    """The one that all logs of a row have."""
    logs = [(REPOSITORY / "docs" / log).read_text(encoding="utf-8") for log in logs_of(row)]
    (precision,) = {re.search(r" precision=(\w+)/", log).group(1) for log in logs}
    return precision


def test_the_figures_of_the_ablation_are_the_means_of_their_logs():
    tuned, *rows = rows_of_the_search("What each piece gives")
    check_tuned(tuned)
    assert [tuned[0], rows[0][0]] == ["nothing: `tuned`", "nothing, bfloat16"]
    whole = {"float32": tuned, "bfloat16": rows[0]}
    assert precision_of(tuned) == "float32"
    for row in rows:
        check_means(row)
        assert row[0].endswith(", bfloat16") == (precision_of(row) == "bfloat16"), row
        difference = bleu_of(row) - bleu_of(whole[precision_of(row)])
        assert row[5].count("](") == 3 or abs(difference) >= 0.5, f"{row}: more seeds"


def test_the_bleu_of_the_epochs_with_the_lowest_loss_stands_in_the_logs():
    kept = []
    for seed in (1234, 2, 3):
        log = (REPOSITORY / "results" / f"multi30k-tuned-seed{seed}-cpu.log").read_text(encoding="utf-8")
        found = re.findall(r"^validation: .* free-running loss (\S+) .* greedy BLEU (\S+)", log, re.MULTILINE)
        kept.append(min((float(loss), float(bleu)) for loss, bleu in found)[1])
    assert f"whose greedy BLEU is {mean_and_deviation(kept)}." in " ".join(SEARCH.split())


def test_the_rates_of_both_kinds_of_batches_are_the_means_of_their_log():
    log = (REPOSITORY / "bench" / "results" / "batching.log").read_text(encoding="utf-8")
    rates = {}
    for kind, rate in re.findall(r"^([\w-]+)\n\* FPS@all (\S+)$", log, re.MULTILINE):
        rates.setdefault(kind, []).append(float(rate))
    like, random = statistics.mean(rates["like-length"]), statistics.mean(rates["random"])
    assert f"speed: {like:.1f} pairs/s in training beside {random:.1f} ([log]" in " ".join(SEARCH.split())


def test_the_figures_of_the_batches_are_the_means_of_their_logs():
    tuned, *rows = rows_of_the_search("The batch on several devices")
    assert tuned[0].startswith(f"{train_8p.RECIPES['tuned']['batch_size']}")
    check_tuned(tuned)
    found = bleus_of_beams("multi30k-beam-val-cpu.log")
    for row in rows:
        check_means(row)
        assert f"--batch-size {row[0].partition(',')[0].strip('*')}" in row[1]
    within = [row for row in rows if bleu_of(row) >= statistics.mean(found["1"]) - statistics.stdev(found["1"])]
    assert [row[0] for row in within] == [f"**{train_8p.SHARED_BATCH}**"]
    assert within[0][5].count("](") == 3


def bleus_of_beams(log: str) -> dict[str, list[float]]:
    """BLEU of the validation pairs by the width of the beam, a value a checkpoint."""
    found: dict[str, list[float]] = {}
    for run in (REPOSITORY / "results" / log).read_text(encoding="utf-8").split("--beam-size ")[2:]:
        found.setdefault(run.split("\n")[0], []).append(float(re.search(r"^BLEU score = (\S+)", run, re.M).group(1)))
    return found


def test_the_bleu_of_each_beam_is_the_mean_of_three_seeds_in_the_log():
    table = re.search(r"^\| beam \|(.*)\|\n.*\n\| BLEU \|(.*)\|$", SEARCH, re.MULTILINE)
    sizes, means = ([cell.strip() for cell in row.split("|")] for row in table.groups())
    found = bleus_of_beams("multi30k-beam-val-cpu.log")
    assert sizes == list(found)
    for size, mean in zip(sizes, means, strict=True):
        assert len(found[size]) == 3
        assert mean == f"{statistics.mean(found[size]):.2f}"


def test_the_bleu_of_each_length_penalty_is_the_mean_of_three_seeds_in_the_logs():
    table = re.search(r"^\| length penalty \|(.*)\|\n.*\n\| BLEU \|(.*)\|$", SEARCH, re.MULTILINE)
    penalties, bleus = ([float(cell) for cell in row.split("|")] for row in table.groups())
    log = (REPOSITORY / "results" / "multi30k-length-penalty-val-cpu.log").read_text(encoding="utf-8")
    found = re.findall(r"--length-penalty (\S+) [^#]*?beam of 10: BLEU (\S+)", re.sub("# the checkpoint.*", "", log))
    found += [("1.0", bleu) for bleu in bleus_of_beams("search/d0-seed1234-beams.log")["10"]]
    for penalty, bleu in zip(penalties, bleus, strict=True):
        of_seeds = [float(value) for name, value in found if float(name) == penalty]
        assert len(of_seeds) == 3, penalty
        assert f"{statistics.mean(of_seeds):.2f}" == f"{bleu:.2f}"


@LANGUAGES
def test_the_quick_starts_result_stands_in_its_log(text):
    log = (REPOSITORY / "results" / "sample-train_full_1p-cpu.log").read_text(encoding="utf-8")
    assert flags_of_recipe("tuned", batch_size=32).items() <= flags_of(log).items()
    shown = [line for line in code_lines(text) if line.startswith(("Final ", "E2E "))]
    assert len(shown) == 3
    for line in shown:
        assert line in log.splitlines()
    path = "results/sample-train_full_1p-bfloat16-cpu.log"
    in_bfloat16 = (REPOSITORY / path).read_text(encoding="utf-8")
    assert " precision=bfloat16/O2 " in in_bfloat16
    bleu = re.search(r"^Final Train Accuracy : (\S+)", in_bfloat16, re.MULTILINE).group(1)
    assert re.search(rf"\b{bleu}\s*[(（]\[\w+\]\({path}\)", text)
