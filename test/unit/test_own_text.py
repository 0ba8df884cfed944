"""A user's way from one pair of files to a translated file, by the two commands of README's own section.

`OWN_TEXT=DIR` names a folder with a real `train.XX` and `train.en` of 400 pairs or more. It goes the same way.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import train_8p
import translate
from nmt.errors import run_main

import pytest
from conftest import MULTI30K, REPOSITORY, SMALL, needs_multi30k
from test_readme import CHINESE, ENGLISH, code_lines

TINY = [*SMALL, "--epochs", "1", "-b", "32", "--beam-size", "2"]
LEARNS = "--device cpu --emb-dim 48 --hid-dim 64 --lr 0.02 -b 8 --epochs 4 --case keep"  # in seconds
HELD_OUT = 100  # README's --val-split
REAL = os.environ.get("OWN_TEXT", "")


def own_commands(text: str) -> list[str]:
    """What README tells those who have one pair of files, to train and to translate. Its languages are fr and en."""
    section = next(part for part in re.split(r"\n## ", text) if "my_text/train.fr" in part)
    return code_lines(section)


def in_languages(command: str, source: str, target: str) -> list[str]:
    """The words of a command behind the program, for a user of other languages, with files in the place of < and >."""
    names = {"fr": source, "en": target, "<": "--input", ">": "--output"}
    command = re.sub(r"\b(?:fr|en)\b|[<>]", lambda found: names[found[0]], command)
    return shlex.split(command)[2:]


def sentences(*parts):
    """All pairs of sentences of a small grammar. A part is the choices of a place, (source, target)."""
    for chosen in itertools.product(*parts):
        yield tuple(" ".join(side) + "." for side in zip(*chosen, strict=True))


def french_pairs():
    return sentences(
        [
            ("Le chien", "The dog"),
            ("Élodie", "Élodie"),
            ("L'homme", "The man"),
            ("Mon ami", "My friend"),
            ("Zoé", "Zoé"),
        ],
        [("voit", "sees"), ("aime", "loves"), ("cherche", "looks for"), ("suit", "follows"), ("connaît", "knows")],
        [("l'école", "the school"), ("ma sœur", "my sister"), ("le garçon", "the boy"), ("une île", "an island")],
        [("aujourd'hui", "today"), ("à Paris", "in Paris"), ("chaque été", "every summer"), ("là-bas", "over there")],
    )


def ukrainian_pairs():
    """In another script. Names and first words have capitals."""
    who = [("Оля", "Olha"), ("Тарас", "Taras"), ("Київ", "Kyiv"), ("Наш друг", "Our friend")]
    return sentences(
        [*who, ("Ця жінка", "This woman"), ("Сусід", "The neighbour"), ("Ганна", "Hanna")],
        [("бачить", "sees"), ("любить", "loves"), ("шукає", "looks for"), ("чує", "hears"), ("знає", "knows")],
        [("Марію", "Maria"), ("Дніпро", "the Dnipro"), ("старий дім", "the old house"), ("собаку", "the dog")],
        [("зараз", "now"), ("щодня", "every day"), ("у Львові", "in Lviv"), ("в неділю", "on Sunday")],
    )


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def split_of(folder: Path, name: str, languages) -> list[tuple[str, ...]]:
    """The pairs of a split that --write-split has written."""
    sides = (lines_of(folder / "my_split" / f"{name}.{language}") for language in languages)
    return list(zip(*sides, strict=True))


def put(folder: Path, languages, pairs) -> None:
    (folder / "my_text").mkdir()
    for language, lines in zip(languages, zip(*pairs, strict=True), strict=True):
        path = folder / "my_text" / f"train.{language}"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def check(folder: Path, languages, pairs, log: str) -> list[tuple[str, str]]:
    """Asserts that the text was split as the log says, and its test translated line by line.

    Returns:
        A pair for each line of the test: the translation, and the right one.
    """
    parts = {name: split_of(folder, name, languages) for name in ("train", "val", "test")}
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes["val"] == sizes["test"] == HELD_OUT
    told = f"\ndata: {sizes['train']} training, {HELD_OUT} validation, {HELD_OUT} test pairs; "
    assert told in log
    sources = {name: {" ".join(src.casefold().split()) for src, _ in part} for name, part in parts.items()}
    assert not sources["train"] & sources["val"] | sources["train"] & sources["test"] | sources["val"] & sources["test"]
    held_out = sources["val"] | sources["test"]
    assert parts["train"] == [pair for pair in pairs if " ".join(pair[0].casefold().split()) not in held_out]
    assert set(parts["val"] + parts["test"]) <= set(pairs)
    translations = lines_of(folder / f"out.{languages[1]}")
    assert len(translations) == HELD_OUT
    return list(zip(translations, (right for _, right in parts["test"]), strict=True))


def test_both_languages_of_readme_have_the_two_commands():
    train, translates = own_commands(ENGLISH)
    assert own_commands(CHINESE) == [train, translates]
    assert f" --val-split {HELD_OUT} " in train and train.startswith(".venv/bin/python train_8p.py ")
    assert translates.startswith(".venv/bin/python translate.py ")


def test_readmes_commands_lead_from_one_pair_of_files_to_a_translated_file(tmp_path):
    """As they stand there, by a shell. The flags behind the first one make the model tiny."""
    pairs = list(french_pairs())
    put(tmp_path, ("fr", "en"), pairs)
    train, translates = own_commands(ENGLISH)
    logs = []
    for command in (f"{train} {shlex.join(TINY)}", translates):
        command = re.sub(r"^\.venv/bin/python (?=\w+\.py )", f"{sys.executable} {REPOSITORY}/", command)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        logs.append(done.stdout)
    check(tmp_path, ("fr", "en"), pairs, logs[0])
    assert logs[1] == "", "the translations are in the file"


def on_the_way(folder, monkeypatch, capfd, languages, pairs, flags, *behind) -> tuple[str, list[tuple[str, str]]]:
    """Goes it in this process, with flags behind both commands. Returns the output, and what `check` does."""
    monkeypatch.chdir(folder)
    put(folder, languages, pairs)
    train, translates = (in_languages(command, *languages) for command in own_commands(ENGLISH))
    assert run_main(train_8p.main, [*train, *flags]) == 0, capfd.readouterr().err
    assert run_main(translate.main, [*translates, *behind]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    return out, check(folder, languages, pairs, out)


def test_a_language_of_another_script_is_learned_with_its_capitals(tmp_path, monkeypatch, capfd):
    pairs, reference = list(ukrainian_pairs()), ("--reference", "my_split/test.en")
    out, translated = on_the_way(tmp_path, monkeypatch, capfd, ("uk", "en"), pairs, LEARNS.split(), *reference)
    assert sum(ours == right for ours, right in translated) > 80, "it has learned the grammar"
    assert run_main(train_8p.main, ["--data-dir", "my_text", "--evaluate", "my_model", "--device", "cpu"]) == 0
    out += capfd.readouterr().out
    trained, of_file, again = map(float, re.findall(r"^BLEU score = (\S+)", out, re.M))
    assert trained == again
    assert abs(trained - of_file) < 1


@needs_multi30k
def test_a_real_text_with_capitals_goes_the_same_way(tmp_path, monkeypatch, capfd):
    """A thousand pairs of Multi30k, from English into German."""
    pairs = list(zip(*(lines_of(MULTI30K / f"test2016.{language}") for language in ("en", "de")), strict=True))
    assert len(pairs) == 1000
    on_the_way(tmp_path, monkeypatch, capfd, ("en", "de"), pairs, [*TINY, "--case", "keep"])


@pytest.mark.skipif(not REAL, reason="OWN_TEXT names no folder with a train.XX and a train.en")
def test_the_text_that_is_named_goes_the_same_way(tmp_path, monkeypatch, capfd):
    (source,) = (path.suffix[1:] for path in Path(REAL).glob("train.*") if path.suffix != ".en")
    sides = [lines_of(Path(REAL) / f"train.{language}") for language in (source, "en")]
    pairs = [pair for pair in zip(*sides, strict=True) if all(map(str.strip, pair))]
    on_the_way(tmp_path, monkeypatch, capfd, (source, "en"), pairs, [*TINY, "--case", "keep"])
