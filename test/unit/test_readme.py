"""README's commands are those that CI runs, its links lead somewhere, and both languages say the same."""

import os
import re
import subprocess
import sys

import train_8p
from bench import logs

import pytest
from conftest import REPOSITORY, SMALL, flags_of_recipe, with_todays_names, write_corpus

ENGLISH = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "README.zh-CN.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(path for pattern in ("*.md", "[a-z]*/*.md", "test/*/*/*.md") for path in REPOSITORY.glob(pattern))
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
    """In English. The other language has the same numbers."""
    rows = [
        line.strip("| ").split(" | ")
        for line in ENGLISH.splitlines()
        if line.startswith("| `--") and line.count(" | ") == 2
    ]
    assert len(rows) == 9
    for flags, *cells in rows:
        names = [name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", flags)]
        for recipe, cell in zip(("tuned", "modelzoo"), cells, strict=True):
            described = re.sub(r" \([^)]*\)", "", cell).split(", ")[: len(names)]
            values = [train_8p.RECIPES[recipe][name] for name in names]
            assert described == [value if isinstance(value, str) else f"{value:g}" for value in values], flags
    (batch,) = (cells[0] for flags, *cells in rows if "batch-size" in flags)
    assert f"on several devices {train_8p.SHARED_BATCH} in total, " in batch
    assert f"under {train_8p.ENOUGH_UPDATES} updates" in batch


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus and a model, which has the default name."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus", 64)
    command = [sys.executable, REPOSITORY / "train_8p.py", *SMALL, "--data-dir", corpus, "--epochs", "1"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return folder


def test_the_commands_that_translate_do_so(trained):
    """Those of the English README. The other one has the same."""
    (trained / "sample").mkdir(exist_ok=True)
    for name in ("test.de", "test.en"):
        assert (REPOSITORY / "sample" / name).exists()
        (trained / "sample" / name).write_bytes((trained / "corpus" / name).read_bytes())
    commands = [line for line in code_lines(ENGLISH) if "translate.py" in line and "my_model" not in line]
    assert len(commands) == 4
    for command in commands:
        (trained / "out.en").unlink(missing_ok=True)
        program = f"{sys.executable} {REPOSITORY / 'translate.py'}"
        done = subprocess.run(
            command.replace(".venv/bin/python translate.py", program),
            shell=True,
            cwd=trained,
            input="Ein Hund .\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if "out.en" in command:
            lines = (trained / "sample" / "test.de").read_text().count("\n")
            assert (trained / "out.en").read_text().count("\n") == lines
        assert ("BLEU score = " in done.stdout) == ("--reference" in command)
        assert ("translates: de to en" in done.stdout) == ("--about" in command)
        assert (done.stdout.count("\n") == 1) == command.endswith("translate.py")


def test_the_program_that_translates_does_so(trained):
    text = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 4  # greedy, and three of the beam
    scores = [float(line.partition(" ")[0]) for line in done.stdout.splitlines()[1:]]
    assert scores == sorted(scores, reverse=True)


@LANGUAGES
def test_the_quick_starts_result_stands_in_its_log(text):
    log = (REPOSITORY / "results" / "sample-train_full_1p-amx-cpu.log").read_text(encoding="utf-8")
    assert flags_of_recipe("tuned", batch_size=32).items() <= with_todays_names(logs.parse(log).flags).items()
    shown = [line for line in code_lines(text) if line.startswith(("Final ", "E2E "))]
    assert len(shown) == 3
    for line in shown:
        assert line in log.splitlines()
