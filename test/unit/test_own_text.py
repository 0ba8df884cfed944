"""A user's way from one pair of files to a translated file, in a language of another script, with capitals."""

import itertools
import re
import shlex

import train_8p
import translate
from nmt.errors import run_main

import pytest
from conftest import SMALL

README = {
    "train": "--data-dir my_text --src-lang uk --case keep --val-split 40 --write-split my_split --ckptpath my_model",
    "translate": "--ckptpath my_model --input my_split/test.uk --output out.en --reference my_split/test.en",
    "score": "--data-dir my_text --evaluate my_model",
}
SIZES = "--emb-dim 48 --hid-dim 64"  # a model that learns in seconds


def own_pairs():
    """All sentences of a small grammar, Ukrainian and English. Names and first words have capitals."""
    who = [
        ("Оля", "Olha"),
        ("Тарас", "Taras"),
        ("Київ", "Kyiv"),
        ("Наш друг", "Our friend"),
        ("Ця жінка", "This woman"),
    ]
    does = [("бачить", "sees"), ("любить", "loves"), ("шукає", "looks for"), ("чує", "hears"), ("знає", "knows")]
    whom = [("Марію", "Maria"), ("Дніпро", "the Dnipro"), ("старий дім", "the old house"), ("собаку", "the dog")]
    when = [("зараз", "now"), ("щодня", "every day"), ("у Львові", "in Lviv"), ("в неділю", "on Sunday")]
    for parts in itertools.product(who, does, whom, when):
        yield tuple(" ".join(side) + "." for side in zip(*parts, strict=True))


@pytest.fixture
def my_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text").mkdir()
    for lang, lines in zip(("uk", "en"), zip(*own_pairs(), strict=True), strict=True):
        (tmp_path / "my_text" / f"train.{lang}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_one_pair_of_files_becomes_a_model_and_a_translated_file(my_text, capfd):
    train = [*shlex.split(README["train"]), *SMALL[4:], *shlex.split(SIZES), "--lr", "0.02", "-b", "8", "--epochs", "6"]
    assert run_main(train_8p.main, train) == 0
    trained = capfd.readouterr().out
    assert "\ndata: 320 training, 40 validation, 40 test pairs; " in trained
    assert run_main(translate.main, shlex.split(README["translate"])) == 0
    translated = capfd.readouterr().out
    source, reference, output = (
        (my_text / name).read_text(encoding="utf-8").splitlines()
        for name in ("my_split/test.uk", "my_split/test.en", "out.en")
    )
    assert len(source) == len(reference) == len(output) == 40
    known = dict(own_pairs())
    assert [known[line] for line in source] == reference
    assert not set(source) & set((my_text / "my_split" / "train.uk").read_text(encoding="utf-8").splitlines())
    right = sum(ours == wanted for ours, wanted in zip(output, reference, strict=True))
    assert right > 30, "it has learned the grammar, with its capitals"
    assert run_main(train_8p.main, [*shlex.split(README["score"]), *SMALL[4:]]) == 0
    scored = capfd.readouterr().out
    bleu, again, of_file = (re.search(r"^BLEU score = (\S+)", out, re.M)[1] for out in (trained, scored, translated))
    assert bleu == again
    assert abs(float(bleu) - float(of_file)) < 1
