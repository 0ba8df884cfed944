"""docs/: the tables are what the logs give, the logs are those of such runs, and the prose says what they say."""

import doctest
import math
import re
import statistics
from pathlib import Path

import train_8p
from bench import logs, tables

import pytest
from conftest import REPOSITORY, flags_of_recipe, with_todays_names

RESULTS = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
SEARCH = (REPOSITORY / "docs" / "search.md").read_text(encoding="utf-8")
LOGS = sorted(path for folder in ("results", "bench/results") for path in (REPOSITORY / folder).rglob("*.log"))
RUN_ROWS = [*tables.RESULTS, *tables.EXPECTED, *tables.PADDED, *tables.ON_THE_H200]


def ids(row: tables.Row) -> str:
    return Path(row.logs[0]).stem


def recipe_of(row: tables.Row) -> str:
    """The recipe that a row of full runs names."""
    return re.match("`(tuned|modelzoo)`", row.name).group(1)


# ---------------------------------------------------------------- tables and logs


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(tables).failed == 0


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_every_table_is_what_the_script_writes(path):
    """Otherwise: python -m bench.tables"""
    root = "../" * (len(path.relative_to(REPOSITORY).parts) - 1)
    text = path.read_text(encoding="utf-8")
    assert tables.render(text, root) == text
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(tables.PLACE.findall(text))


def test_a_table_is_replaced_and_the_text_around_it_stays(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "x", lambda root: f"| {root} |")
    text = "a\n<!-- table: x -->\n\n| old |\n\n<!-- end of table -->\nb\n"
    assert tables.render(text, "../") == text.replace("old", "../")
    with pytest.raises(KeyError, match="unknown"):
        tables.render(text.replace("table: x", "table: unknown"), "")


def test_every_log_stands_in_a_document():
    documents = [path for pattern in ("*.md", "docs/*.md") for path in REPOSITORY.glob(pattern)]
    linked = {
        (path.parent / link).resolve()
        for path in documents
        for link in re.findall(r"\]\(([^)#]*\.log)\)", path.read_text(encoding="utf-8"))
    }
    assert [str(path.relative_to(REPOSITORY)) for path in LOGS if path not in linked] == []


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_log_begins_with_its_command_and_its_machine_and_has_no_step_lines(path):
    text = path.read_text(encoding="utf-8")
    first, second = text.splitlines()[:2]
    assert first.startswith("# ") and second.startswith("# ")
    assert re.search(r"commit [0-9a-f]{7}; .*(EPYC|Xeon|H200)", second)
    assert not logs.STEP.search(text)


@pytest.mark.parametrize("row", RUN_ROWS, ids=ids)
def test_the_rows_of_full_runs_have_the_logs_of_such_runs(row):
    runs = [tables.read(path) for path in row.logs]
    for run in runs:
        processes = int(run.facts["processes"])
        others: dict[str, object] = {"batch_size": 128, "epochs": 1} if run.flags["performance"] == "True" else {}
        if processes > 1:
            others = {"batch_size": train_8p.SHARED_BATCH, "lr": train_8p.tuned_rate(train_8p.SHARED_BATCH)}
        assert flags_of_recipe(recipe_of(row), row.flags, **others).items() <= with_todays_names(run.flags).items()
        assert [epoch.number for epoch in run.epochs] == ([] if others.get("epochs") else list(range(10)))
        if "Final Performance images/sec" in run.final:
            assert f"{run.rate:.2f}" == run.final["Final Performance images/sec"]
        if " in " in row.name:
            assert row.name.partition(" in ")[2].removesuffix(", seed 2") == tables.precision(run)
    assert len({run.flags["seed"] for run in runs}) == len(runs)
    assert "seed 2" not in row.name or runs[0].flags["seed"] == "2"


def commands_of(section: str) -> list[str]:
    """The commands of one section of docs/results.md that run training."""
    lines = RESULTS.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [line.strip() for line in lines if line.startswith("    ") and "train_" in line]


@pytest.mark.parametrize(
    ("section", "rows"),
    [
        ("Multi30k on a CPU", tables.RESULTS),
        ("What to expect of modelzoo", [*tables.EXPECTED, *tables.PADDED]),
        ("One NVIDIA H200", tables.ON_THE_H200),
    ],
    ids=["cpu", "modelzoo", "h200"],
)
def test_the_commands_are_those_of_the_rows_in_their_order(section, rows):
    """Of a row of `modelzoo`, the command of the first seed."""
    runs = [tables.read(path) for row in rows for path in (row.logs[:1] if row in tables.EXPECTED else row.logs)]
    commands = commands_of(section)
    if rows is tables.ON_THE_H200:
        measured, commands = commands[len(runs) :], commands[: len(runs)]
        batches = [line.split("|")[1].strip() for line in tables.speed_on_the_h200("").splitlines()[2:]]
        assert [re.search(r" --performance -b (\d+)", command).group(1) for command in measured] == batches
    for command, run in zip(commands, runs, strict=True):
        assert run.facts["recipe"] == ("modelzoo" if re.search("--recipe[ =]modelzoo", command) else "tuned")
        assert run.facts["seed"] == (re.findall(r"--seed (\d+)", command) or ["1234"])[0]
        assert (run.flags["performance"] == "True") == ("performance" in command)
        assert (run.facts["processes"] == "8") == ("_8p.sh" in command)
        assert (run.flags["fixed_length"] == "46") == ("--fixed-length 46" in command)
        assert (run.flags.get("subword", "0") == "8000") == ("--subword 8000" in command)
        in_half = "--amp" in command or ("test/" in command and "must_keep_origin_dtype" not in command)
        level = (re.findall(r"--opt-level (O\d)", command) or ["O2"])[0] if in_half else "O0"
        assert run.facts["precision"].endswith(f"/{level}")
        for dtype in re.findall(r"--amp-dtype (\w+)", command):
            assert run.facts["precision"].startswith(dtype)


@pytest.mark.parametrize("row", [row for row in RUN_ROWS if "speed alone" not in row.name], ids=ids)
def test_sacrebleu_of_the_same_tokens_is_the_bleu_except_where_almost_no_four_words_match(row):
    for path in row.logs:
        run = tables.read(path)
        sacrebleu, bleu = (float(run.final[name]) for name in ("sacreBLEU", "BLEU score"))
        assert sacrebleu == bleu or max(sacrebleu, bleu) < 0.1


def test_what_to_expect_of_modelzoo_is_what_its_runs_reached():
    """Otherwise the BLEU that README names is to be written anew. So is the Chinese."""
    bleus = [tables.bleu_of_test(tables.read(path)) for row in tables.EXPECTED for path in row.logs]
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    expected = [(str(math.floor(min(bleus))), str(math.ceil(max(bleus))))]
    assert re.findall(r"expect (\d+) to (\d+) BLEU", text) == expected


def test_sacrebleu_is_the_bleu_greedy_and_with_the_beam():
    text = tables.text_of("results/multi30k-scores-cpu.log")
    scores = [score for _, run in logs.parts(text, "## ") for score in run.scores]
    assert len(scores) == 10
    assert all(score.bleu == score.sacrebleu for score in scores)


def test_the_processes_compute_what_the_one_with_their_batch_and_seed_does():
    eight = tables.read("results/multi30k-tuned-8p-cpu.log")
    one = tables.read("results/batch/128.log")
    assert (eight.facts["processes"], one.facts["processes"]) == ("8", "1")
    assert float(eight.flags["lr"]) == pytest.approx(float(one.flags["lr"]), rel=1e-3)
    differ = {"test_name", "lr", "print_freq", "device", "amp", "max_devices", "multiprocessing_distributed"}
    same = {name: value for name, value in one.flags.items() if name not in differ and name in eight.flags}
    assert same.items() <= eight.flags.items()


def test_the_sample_is_trained_at_each_level_of_precision():
    runs = [run for _, run in logs.parts(tables.text_of("results/sample-precisions-cpu.log"), "# python3 ")]
    assert [run.facts["precision"] for run in runs] == ["float32/O0", "bfloat16/O1", "bfloat16/O2", "bfloat16/O3"]
    runs += [tables.read(row.logs[0]) for row in tables.SAMPLE]
    assert [run.facts["precision"] for run in runs[4:]] == ["bfloat16/O2", "bfloat16/O2", "float32/O0"]
    for run in runs:
        assert flags_of_recipe("tuned", batch_size=32).items() <= with_todays_names(run.flags).items()


def test_the_card_and_the_versions_of_the_h200_are_those_of_its_logs():
    section = RESULTS.partition("\n## One NVIDIA H200\n")[2].partition("\n## ")[0]
    for path in sorted((REPOSITORY / "results" / "h200").glob("*.log")):
        text = path.read_text(encoding="utf-8")
        commit, driver, python, torch = re.search(
            r"commit (\w+); one NVIDIA H200, driver (\S+); Python (\S+), torch (\S+), which", text
        ).groups()
        for fact in (f"commit {commit}", f"Python {python}", f"driver {driver}", f"torch {torch}"):
            assert fact in " ".join(section.split())
        run = logs.RUN.search(text).group()
        assert f" python={python} torch={torch.partition('+')[0]} " in run
    performance = tables.text_of("results/h200/performance.log")
    assert f"NVIDIA H200, {driver}, " in performance and f"\n{torch} " in performance
    assert re.search(r"^\d+ passed", performance, re.MULTILINE) and "failed" not in performance


def test_the_text_of_the_results_carries_four_figures_at_most():
    """Others would grow old beside the tables. Versions, dates and settings are no figures."""
    text = tables.PLACE.sub("", RESULTS)
    text = re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b(torch|Python|spaCy|torchtext|driver)\s+[\d.]+\S*", "", text)
    figures = re.findall(r"\d+\.\d+", text)
    assert len(figures) <= 4, figures


def mean_words(text: str) -> float:
    """Words in a sentence of a document's prose, on average."""
    text = re.sub(r"^(\||#|    |<!--|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\n+|\n- |\n\d+\. ", text))
    sentences = [s for part in paragraphs for s in re.split(r"(?<=[.:])\s+(?=[A-Z`*(])", part) if len(s.split()) > 1]
    return statistics.mean(len(sentence.split()) for sentence in sentences)


@pytest.mark.parametrize(
    "name", ["docs/results.md", "docs/search.md", "docs/npu.md", "docs/several-machines.md", "bench/README.md"]
)
def test_the_sentences_are_short(name):
    assert mean_words((REPOSITORY / name).read_text(encoding="utf-8")) < 15


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("row", [*tables.WITHOUT, *tables.BATCHES], ids=ids)
def test_the_rows_of_the_search_have_the_logs_of_runs_with_their_flags(row):
    runs = [tables.read(path) for path in row.logs]
    assert [run.flags["seed"] for run in runs] == [str(seed) for seed in tables.SEEDS[: len(runs)]]
    for run in runs:
        assert (
            flags_of_recipe("tuned", row.flags, seed=run.flags["seed"]).items() <= with_todays_names(run.flags).items()
        )
        assert [epoch.number for epoch in run.epochs] == list(range(10))
        if row.logs != tables.TUNED:
            assert run.flags["test_name"] == "val", "its beam is to be that of the validation pairs"


def greedy_of(row: tables.Row) -> float:
    """The mean greedy BLEU of a row."""
    return statistics.mean(tables.read(path).best.bleu for path in row.logs)


def precision_of(row: tables.Row) -> str:
    """The one that all logs of a row have."""
    (name,) = {tables.read(path).facts["precision"].partition("/")[0] for path in row.logs}
    return name


def test_a_piece_has_three_seeds_unless_it_is_half_a_bleu_away_in_its_own_precision():
    tuned, in_bfloat16, *rows = tables.WITHOUT
    assert [tuned.name, in_bfloat16.name] == ["nothing: `tuned`", "nothing, bfloat16"]
    whole = {"float32": greedy_of(tuned), "bfloat16": greedy_of(in_bfloat16)}
    for row in tables.WITHOUT:
        assert row.name.endswith(", bfloat16") == (precision_of(row) == "bfloat16"), row
    assert precision_of(tuned) == "float32"
    for row in rows:
        assert len(row.logs) == 3 or abs(greedy_of(row) - whole[precision_of(row)]) >= 0.5, f"{row}: more seeds"


def test_each_batch_is_the_one_of_its_flags_and_128_alone_is_within_the_deviation():
    tuned, *rows = tables.BATCHES
    assert tuned.name.startswith(f"{train_8p.RECIPES['tuned']['batch_size']}")
    for row in rows:
        assert f"--batch-size {row.name.partition(',')[0].strip('*')}" in row.flags
    bleus = [tables.read(path).best.bleu for path in tuned.logs]
    within = [row for row in rows if greedy_of(row) >= statistics.mean(bleus) - statistics.stdev(bleus)]
    assert [row.name for row in within] == [f"**{train_8p.SHARED_BATCH}**"]
    assert len(within[0].logs) == 3


def test_beams_and_length_penalties_are_means_of_three_checkpoints():
    beams, penalties = tables.beams_of_tuned(), tables.beams_of_penalties()
    assert list(beams) == ["1", "2", "5", "8", "10", "16"]
    assert list(penalties) == ["0.8", "1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]
    assert {name: len(values) for name, values in (beams | penalties).items() if len(values) != 3} == {}
    assert beams["1"] == [tables.read(path).best.bleu for path in tables.TUNED], "the same checkpoints"
    assert max(penalties, key=lambda name: statistics.mean(penalties[name])) == "1.2"


def rows_of_what_was_tried() -> list[list[str]]:
    """The cells of the runs that have logs. The last cell has the logs."""
    section = SEARCH.partition("## What was tried\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if ".log)" in line]


def logs_of(row: list[str]) -> list[logs.Run]:
    paths = re.findall(r"\]\(\.\./([^)]*)\)", row[-1])
    return [tables.read(path) for path in paths]


def test_the_figures_of_what_was_tried_stand_in_their_logs():
    rows = rows_of_what_was_tried()
    assert [row[0].strip("*").partition(" ")[0] for row in rows] == ["former", "d0", "d1", "d2", "d3", "d4", "d5"]
    for row in rows:
        bleu, epoch = re.search(r"(\S+), epoch (\d)", row[2]).groups()
        best = logs_of(row)[0].best
        claim = (float(bleu.strip("*")), float(row[3]), int(epoch))
        assert claim == pytest.approx((best.bleu, best.perplexity, best.number), abs=0.00501), row


def test_the_means_and_beams_of_what_was_tried_are_those_of_the_rows_logs():
    rows = [row for row in rows_of_what_was_tried() if re.fullmatch(r"\**d[1-9]\**", row[0])]
    assert len(rows) == 5
    for row in rows:
        runs = logs_of(row)
        assert all(run.flags["test_name"] == "val" for run in runs)
        bleu = statistics.mean(run.bleus("beam of 10")[0] for run in runs)  # before another length penalty was tried
        assert re.search(r" beam.*? ([\d.]{5})", row[1]).group(1) == f"{bleu:.2f}", row
        if len(runs) > 1:
            mean = tables.mean_and_deviation(run.best.bleu for run in runs)
            assert re.search(r"three seeds: (\S+ ± [\d.]+)", row[1]).group(1) == mean, row


def test_the_bleu_of_the_epochs_with_the_lowest_loss_stands_in_the_logs():
    runs = [tables.read(path) for path in tables.TUNED]
    kept = [min(run.epochs, key=lambda epoch: epoch.free_running_loss).bleu for run in runs]
    assert f"whose greedy BLEU is {tables.mean_and_deviation(kept)}." in " ".join(SEARCH.split())


def test_the_best_epochs_of_eight_processes_and_of_one_with_their_batch_stand_in_their_logs():
    best = [f"{tables.read(f'results/{name}.log').best.bleu:.2f}" for name in ("multi30k-tuned-8p-cpu", "batch/128")]
    assert any(re.findall(r"\b\d\d\.\d\d\b", part)[:2] == best for part in SEARCH.split("\n\n"))
