"""The guesses' claims: where files are missing, the message is short, and whoever follows it can train."""

import gzip
import re
import shlex
import subprocess

import data
import train_8p
from nmt.errors import run_main
from nmt.text import missing

import pytest
from conftest import SMALL, parse, refused

WORDS = {"it": "un cane corre {}", "en": "a dog runs {}", "de": "ein Hund läuft {}", "nl": "een hond loopt {}"}
SIX = [f"{name}.{lang}" for name in ("train", "val", "test") for lang in ("it", "en")]
PAIRS = 40


def lines(lang, pairs=PAIRS):
    return "".join(WORDS[lang].format(number) + "\n" for number in range(pairs))


def lang_of(name):
    """The language that a file of this name has here, if there is nothing better."""
    found = [lang for lang in WORDS if re.search(rf"(?<![a-z]){lang}(?![a-z])", name.lower())]
    return found[0] if found else "it" if "src" in name else "en"


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = lines(lang_of(path.name))
        if path.suffix == ".tsv":
            text = "".join(
                f"{it}\t{en}\n" for it, en in zip(lines("it").splitlines(), lines("en").splitlines(), strict=True)
            )
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def follow(message, folder, rename=None):
    """Does what a message says, word for word, in the folder above `folder`. Returns the flags that it wants."""
    what, where, todo = message.split("; ")
    assert where == folder.name
    if shell := re.search(r"type (\(.*?\))(, and add|$)", todo):
        subprocess.run(["bash", "-ec", shell[1]], check=True)
    if put := re.search(r"put (\S+) beside (\S+?)(?:,|$)", todo):
        (at,) = folder.rglob(put[2] + "*")
        (at.parent / put[1]).write_text(lines(lang_of(put[1])))
    if put := re.search(r"put (\S+) and (\S+) there", todo):
        for name in put.groups():
            (folder / name).write_text(lines(lang_of(name), 500))
    if renamed := re.search(r"rename (\S+) to (\S+), and so on", todo):
        assert rename(renamed[1]) == renamed[2]
        for path in list(folder.iterdir()):
            path.rename(folder / rename(path.name))
    flags = re.search(r"\badd (--.*)$", todo)
    return shlex.split(flags[1]) if flags else []


LANGS = "--src-lang it --trg-lang en"
KINDS = {
    "an empty folder": ([], LANGS, "no train.it/en, val.it/en, test.it/en, but the folder is empty"),
    "an empty folder, to be split": ([], f"{LANGS} --val-split 9", "no train.it/en, but the folder is empty"),
    "other languages": (SIX, "", "but test.en, test.it, train.en, train.it, ..."),
    "both languages are others": (["train.it", "train.nl"], "", "no train.de/en, val.de/en, test.de/en, but"),
    "other languages, of which one is wanted": (["train.de", "train.nl"], "", "but train.de, train.nl;"),
    "train alone": (["train.it", "train.en"], LANGS, "no val.it/en, test.it/en, but train.en, train.it;"),
    "train alone, in other languages": (["train.it", "train.en"], "", "but train.en, train.it;"),
    "compressed and plain": (["train.it.gz", "train.it", "train.en.gz"], LANGS, "no val.it/en, test.it/en, but"),
    "no test": (SIX[:4], LANGS, "no test.it/en, but"),
    "one stem for all": (["corpus.it", "corpus.en"], LANGS, "but corpus.en, corpus.it;"),
    "a stem with both languages": (["corpus.it-en.it", "corpus.it-en.en"], "", "but corpus.it-en.en, "),
    "stems with a prefix": ([f"news.{name}" for name in SIX], LANGS, "but news.test.en, "),
    "capitals in stems": ([name.capitalize() for name in SIX], LANGS, "but Test.en, "),
    "capitals in suffixes": (["train.IT", "train.EN"], LANGS, "but train.EN, train.IT;"),
    "many capitals": ([name.upper() for name in SIX], LANGS, "but TEST.EN, "),
    "names by side": (["train.src", "train.tgt"], LANGS, "but train.src, train.tgt;"),
    "names by side in text files": (["src.txt", "tgt.txt"], LANGS, "but src.txt, tgt.txt;"),
    "names by language": (["it.txt", "en.txt"], LANGS, "but en.txt, it.txt;"),
    "names by language, without flags": (["it.txt", "en.txt"], "", "but en.txt, it.txt;"),
    "text files": ([f"{name}.txt" for name in SIX], LANGS, "but test.en.txt, "),
    "text files with underscores": ([name.replace(".", "_") + ".txt" for name in SIX], LANGS, "but test_en.txt, "),
    "a table": (["my corpus.tsv"], LANGS, "but my corpus.tsv;"),
    "a table that is called train": (["train.tsv"], LANGS, "but train.tsv;"),
    "one side of train": (["train.it"], LANGS, "but train.it;"),
    "one side of train, in another language": (["train.it"], "", "but train.it;"),
    "one side of test": (SIX[:5], LANGS, "no test.it/en, but test.it, "),
    "a folder below": ([f"a b/{name}" for name in SIX], LANGS, "but the folder is empty"),
    "a folder below, with train alone": (["x/y/train.it", "x/y/train.en"], "", "but the folder is empty"),
    "something else": (["notes.pdf", "notes.txt"], LANGS, "but notes.pdf, notes.txt;"),
    "two folders": (["multi30k/train.it", "multi30k/train.en", *SIX[2:]], LANGS, "not all in one folder, but"),
} | {
    f"val called {name}": ([*SIX[:2], f"{name}.it", f"{name}.en", *SIX[4:]], LANGS, "no val.it/en, but")
    for name in ("dev", "valid", "validation")
}
RENAME = {
    "many capitals": str.lower,
    "text files": lambda name: name.removesuffix(".txt"),
    "text files with underscores": lambda name: name.removesuffix(".txt").replace("_", "."),
}


def no_download(*args, **options):
    raise AssertionError("nothing may be downloaded")


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_follows_the_message_can_train(tmp_path, monkeypatch, kind):
    names, flags, says = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_text"
    folder.mkdir()
    write(folder, names)
    given = ["--data-dir", "my_text", *shlex.split(flags)]
    monkeypatch.setattr(data.download, "download_multi30k", no_download)
    message = refused("data", train_8p.load_corpus, parse(*given), log=lambda line: None, says=says)
    assert len(message) <= 200, "two lines, and not more than a half more of them on a narrow terminal"
    assert ("there, one sentence a line" in message) == (not names or kind == "something else"), "otherwise a guess"
    added = follow(message, folder, RENAME.get(kind))
    for flag in {"--src-lang", "--trg-lang", "--data-dir"} & set(added) & set(given):
        del given[given.index(flag) : given.index(flag) + 2]
    corpus = train_8p.load_corpus(parse(*given, *added), log=lambda line: None)
    assert min(map(len, (corpus.train, corpus.val, corpus.test))) >= 1
    assert {corpus.src_lang, corpus.trg_lang} <= set(WORDS)
    if flags.startswith(LANGS):
        assert (corpus.src_lang, corpus.trg_lang) == ("it", "en")
        assert corpus.test.src_tokens[0][1] == "cane" and corpus.test.trg_tokens[0][1] == "dog"


SCORES = {
    "an empty folder": ([], "no test.it/en of the model, but the folder is empty"),
    "another name": (["flickr.it", "flickr.en"], "but flickr.en, flickr.it;"),
    "a longer name": (["newstest2014.it", "newstest2014.en", *SIX[:2]], "but newstest2014.en, "),
    "one side": (["test.it"], "but test.it;"),
    "text files": (["test.it.txt", "test.en.txt"], "but test.en.txt, test.it.txt;"),
    "a table": (["test.tsv"], "but test.tsv;"),
    "a folder below": (["text/test.it", "text/test.en"], "but the folder is empty;"),
    "other languages": (["test.it", "test.nl"], "no test.it/en of the model, but"),
    "train alone": (SIX[:2], "no test.it/en of the model, but train.en, train.it;"),
}


@pytest.mark.parametrize("kind", SCORES)
def test_whoever_follows_the_message_can_score(tmp_path, monkeypatch, kind):
    names, says = SCORES[kind]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_text"
    folder.mkdir()
    write(folder, names)
    given = ["--data-dir", "my_text", *shlex.split(LANGS)]
    message = refused("data", train_8p.load_test, parse(*given), log=lambda line: None, says=says)
    assert len(message) <= 200
    assert ("there, one sentence a line" in message) == (kind in ("an empty folder", "train alone"))
    added = follow(message, folder)
    words = train_8p.load_test(parse(*[*given[2:], *added] if "--data-dir" in added else [*given, *added]), print)
    assert words.src_tokens[0][1] == "cane" and words.trg_tokens[0][1] == "dog"


def test_the_message_is_what_the_command_says_and_its_advice_runs(tmp_path, monkeypatch, capsys):
    """On the whole way: the one line, its code, and the run that it asks for."""
    write(tmp_path / "my_text", ["corpus.it", "corpus.en"])
    monkeypatch.chdir(tmp_path)
    command = ["--data-dir", "my_text", *SMALL, "--epochs", "1"]
    assert run_main(train_8p.main, command) == 3
    flags = "--src-lang it --train-name corpus --val-split 4"
    says = "no train.de/en, val.de/en, test.de/en, but corpus.en, corpus.it"
    assert capsys.readouterr().err == f"error[data]: {says}; my_text; add {flags}\n"
    assert run_main(train_8p.main, [*command, *flags.split()]) == 0
    assert "data: 32 training, 4 validation, 4 test pairs; " in capsys.readouterr().out


def test_guesses_are_not_made_of_what_one_may_not_see(open_folder, as_nobody):
    folder = open_folder / "empty"
    write(folder / "closed", SIX)
    wish = missing.Wish(("it", "en"), ("train", "val", "test"), ("train", "val", "test"), False)
    assert "add --data-dir" in str(missing.error(folder, wish))
    (folder / "closed").chmod(0)
    with as_nobody():
        assert "--data-dir" not in str(missing.error(folder, wish))
    (folder / "closed").chmod(0o700)
