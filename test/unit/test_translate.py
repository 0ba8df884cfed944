"""translate.py through its command line: one line out for each line in, scores, files, the prompt, how it ends."""

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import export_onnx
import gru
import translate
from nmt import checkpoint, torch_engine
from nmt.errors import run_main
from nmt.text import stream
from nmt.text.vocabulary import SPECIALS

import pytest
import torch
from conftest import REPOSITORY, heed_signals, refused
from echo import Echo

ECHO = REPOSITORY / "test" / "unit" / "echo.py"  # translate.py with an engine that needs no PyTorch
DE = "Ein Hund läuft.\nEin Katze, nicht ein Hund!\n\nEin Dackel läuft. Ein Hund.\n"
EN = "A dog runs.\nA cat, not a dog!\n\nA dachshund runs. A dog.\n"
TRANSLATED = "A dog runs.\nA cat, n't a dog!\n\nA <unk> runs. A dog.\n"


def write_model(path: Path, seed: int = 0, **changes) -> Path:
    """A checkpoint with drawn weights."""
    torch.manual_seed(seed)
    src, trg = SPECIALS + "ein hund läuft .".split(), SPECIALS + "a dog runs .".split()
    sizes = {"input_dim": len(src), "output_dim": len(trg), "emb_dim": 4, "hid_dim": 6}
    model = gru.build(**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    content = {
        "state_dict": {name: tensor.detach() for name, tensor in model.state_dict().items()},
        "sizes": sizes,
        "src_vocab": src,
        "trg_vocab": trg,
        "flags": {"beam_size": 2, "length_penalty": 1.2, "recipe": "tuned", "seed": 7},
        "scores": {"epoch": 3, "bleu": 12.5},
        "about": {"src_lang": "de", "trg_lang": "en", "data": "fe" * 32, "torch": "2.13.0"},
    }
    checkpoint.save(path, checkpoint.Checkpoint(**content | changes))
    return path


@pytest.fixture
def echo(monkeypatch, tmp_path):
    """Runs translate.py in this process with the engine `Echo`, in a folder of the test's own.

    Returns what `run_main` does. The engines that were made are in `echo.engines`.
    """

    def call(*arguments: object, case: str = "lower") -> int:
        def engine_of(settings, path):
            call.engines.append(Echo(case, beam_size=2))
            return call.engines[-1]

        monkeypatch.setattr(translate, "engine_of", engine_of)
        return run_main(translate.main, list(map(str, arguments)))

    call.engines = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.de").write_text(DE)
    (tmp_path / "ref.en").write_text(EN)
    return call


def run(command: list, given: bytes = b"", **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, input=given, capture_output=True, timeout=120, **options)


# ---------------------------------------------------------------- one line for each line


def test_whatever_a_line_holds_it_gives_one_line(tmp_path):
    """Row 49, with a real model, from another folder."""
    model = write_model(tmp_path / "model")
    lines = [
        b"Ein Hund .",
        b"",
        b" \t ",
        b"Ein\0Hund",
        b"\xff\xfe Hund",
        "Ein\u2028Hund\u0085läuft".encode(),
        b"Ein Hund\r",
        b"Ein\rHund\x0b\x0cl",
        b"a" * 1_000_000,
        b"ein " * 250_000,
        b"a.b" * 300_000,
        b"Hund <sos> <eos> <pad> <unk>",
        b"Ein Hund . Ein Hund .",
        b"no line feed behind this one",
    ]
    command = [sys.executable, "-X", "importtime", REPOSITORY / "translate.py", "--ckptpath", model, "--max-length=5"]
    done = run(command, b"\n".join(lines), cwd="/", env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode().split("\n")
    assert len(out) == len(lines) + 1 and out[-1] == ""
    assert [not line for line in out[:-1]] == [line.strip() == b"" for line in lines]
    assert out[0] == out[6]
    told = done.stderr.decode().splitlines()
    imported = {line.split("|")[-1].strip() for line in told if line.startswith("import time:")}
    assert {"torch", "spacy", "sacremoses", "nmt.torch_engine"} <= imported
    assert not {"torch._dynamo", "torchtext", "sacrebleu", "data", "scoring", "spacy.cli.download"} & imported
    assert sorted(line for line in told if not line.startswith("import time:")) == [
        "note: 1 line(s) not in UTF-8: the wrong bytes became U+FFFD (the first is line 5)",
        "note: 1 line(s) with a CR in the middle, which ends no line here (the first is line 8)",
        "note: 1 line(s) with control characters, such as NUL: these became spaces (the first is line 4)",
        "note: 1 sentence(s) of more than 254 words or 10000 characters: what is beyond was left out",
        "note: 2 line(s) with a word of more than 200 characters: what is beyond was left out",
    ]


@pytest.mark.parametrize("given", ["", "\n", "\n\n\n", " "])
def test_an_empty_input_gives_as_many_empty_lines(echo, given, tmp_path):
    (tmp_path / "in").write_text(given)
    assert echo("--input", "in", "--output", "out") == 0
    assert (tmp_path / "out").read_text() == "\n" * (given.count("\n") + given.endswith(" "))


def test_text_goes_in_and_comes_out(echo, capfd):
    assert echo("--input", "in.de") == 0
    assert capfd.readouterr() == (TRANSLATED, "")
    assert echo("--input", "in.de", "--tokenized") == 0
    assert capfd.readouterr().out == "a dog runs .\na cat , n't a dog !\n\na <unk> runs . a dog .\n"
    assert echo("--input", "in.de", "--replace-unknown") == 0
    assert capfd.readouterr().out == TRANSLATED.replace("<unk>", "Dackel")
    assert echo("--input", "in.de", "--tokenized", "--replace-unknown", case="keep") == 0
    assert capfd.readouterr().out.splitlines()[3] == "A Dackel runs . A Dog ."


def test_scores_and_several_translations_are_fields_between_tabs(echo, capfd):
    assert echo("--input", "in.de", "--scores") == 0
    assert capfd.readouterr().out == "".join(f"0.0000\t{line}\n" for line in TRANSLATED.splitlines())
    assert echo("--input", "in.de", "--n-best", "2", "--scores", "--tokenized") == 0
    lines = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == list("11223344")
    assert [float(line[1]) for line in lines] == [0, -1, 0, -1, 0, 0, 0, -1]
    assert [line[2] for line in lines[:2]] == ["a dog runs .", "a dog runs"]
    assert echo("--input", "in.de", "--n-best", "2", "--beam-size", "3") == 0
    assert capfd.readouterr().out.startswith("1\tA dog runs.\n1\tA dog runs\n2\t")
    assert echo.engines[-1].calls[0][1]["beam_size"] == 3


def test_flags_reach_the_engine(echo):
    flags = "--beam-size 5 --length-penalty 0.25 --max-length 9 --n-best 4"
    assert echo("--input", "in.de", "--output", "out", *flags.split()) == 0
    wanted = {"beam_size": 5, "length_penalty": 0.25, "max_length": 9, "n_best": 4}
    assert [options for _, options in echo.engines[0].calls] == [wanted]


def test_many_lines_come_in_order_and_a_window_at_a_time(echo, tmp_path):
    lines = [f"Ein Hund {'läuft ' * (number * 7 % 20)}." for number in range(5000)]
    (tmp_path / "in").write_text("\n".join(lines))
    assert echo("--input", "in", "--output", "out") == 0
    out = (tmp_path / "out").read_text().splitlines()
    assert out == [f"A dog{' runs' * (number * 7 % 20)}." for number in range(5000)]
    assert len(echo.engines[0].calls) > 3
    assert max(count for count, _ in echo.engines[0].calls) <= stream.LARGEST_WINDOW


# Whatever these tests run in, standard output is buffered as it is by default.
@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdin=sys.stdin, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_million_lines_take_no_more_memory_than_a_hundred_thousand(tmp_path):
    """Each line has a word of its own, so that what a tokenizer keeps counts too. See test_stream.py for a fast one."""
    model = write_model(tmp_path / "model")
    peaks = []
    for lines in (100_000, 1_000_000):
        with open(tmp_path / "in", "w") as file:
            file.writelines(f"Ein Hund{number} .\n" for number in range(lines))
        command = [sys.executable, "-c", PEAK, sys.executable, REPOSITORY / "translate.py", "--ckptpath", model]
        command += ["--beam-size", "1", "--max-length", "3", "--input", tmp_path / "in", "--output", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr
        with open(tmp_path / "out") as file:
            assert sum(1 for _ in file) == lines
        peaks.append(int(done.stderr.split()[-1]))
    print(f"peak memory, KiB: {peaks}")
    assert peaks[1] < peaks[0] * 1.1


# ---------------------------------------------------------------- the model


def test_what_cannot_be_translated_with_is_refused(tmp_path):
    model = write_model(tmp_path / "model")
    original = tmp_path / "original"
    torch.save(checkpoint.load(model).state_dict, original)
    other = write_model(tmp_path / "other", sizes={"input_dim": 8, "output_dim": 8, "emb_dim": 4, "hid_dim": 7})

    def load(*flags):
        settings = translate.Settings(**vars(translate.build_parser().parse_args(list(map(str, flags)))))
        translate.check(settings)
        return translate.engine_of(settings, settings.models[0])

    refused("checkpoint", load, "--ckptpath", original, says="holds no vocabularies")
    refused("checkpoint", load, "--ckptpath", other, says="gru.py")
    refused("checkpoint", load, "--ckptpath", tmp_path / "none", says="no such file")
    refused("usage", load, "--ckptpath", tmp_path, says="add --backend onnx")
    refused("usage", load, "--ckptpath", model, "--backend", "onnx", says="not a folder")
    refused("usage", load, "--backend", "onnx", "--precision", "bfloat16", says="--precision")
    assert load("--ckptpath", model).info.trg_words == [*SPECIALS, "a", "dog", "runs", "."]


def test_onnxruntime_translates_as_pytorch_does_and_alone(tmp_path, capfd):
    model, folder = write_model(tmp_path / "model"), tmp_path / "folder"
    given = "Ein Hund läuft .\n\nHund Hund . Ein Dackel .\n".encode()
    (tmp_path / "in").write_bytes(given)
    assert run_main(export_onnx.main, [f"--ckptpath={model}", f"--out={folder}"]) == 0
    capfd.readouterr()
    same = ["--n-best", "2", "--scores", "--max-length", "6"]
    translating = ["--precision", "float32", "--shortlist", "0", "--input", str(tmp_path / "in"), *same]
    assert run_main(translate.main, [f"--ckptpath={model}", *translating]) == 0
    command = [sys.executable, "-X", "importtime", REPOSITORY / "translate.py", "--backend=onnx", "--ckptpath", folder]
    done = run([*command, *same], given)
    assert done.returncode == 0, done.stderr
    out = capfd.readouterr().out
    assert done.stdout.decode() == out and out.count("\n") == 6
    imported = {line.split("|")[-1].strip() for line in done.stderr.decode().splitlines()}
    assert run_main(translate.main, ["--about", "--backend=onnx", f"--ckptpath={folder}"]) == 0
    card = capfd.readouterr().out
    assert "run: completed\nexport: ONNX, float32\n" in card and "parameters: " in card
    assert "onnxruntime" in imported and not {"torch.nn", "torch._C", "nmt.checkpoint"} & imported


def test_what_the_engine_needs_to_know_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_engine, "TorchEngine", lambda model, info, **options: options)
    with_list = write_model(tmp_path / "model", shortlist=torch.arange(4, 8, dtype=torch.int32).repeat(8, 1))

    def options(*flags):
        settings = translate.Settings(**vars(translate.build_parser().parse_args([f"--ckptpath={with_list}", *flags])))
        return translate.engine_of(settings, settings.models[0])

    assert options("--precision=bfloat16", "--shortlist=0") == {
        "dtype": torch.bfloat16,
        "shortlist": None,
        "scores": False,
    }
    assert options("--precision=float32", "--shortlist=0")["dtype"] == torch.float32
    assert options("--scores")["scores"], "greedy decoding computes them if they are printed"
    assert options("--shortlist=3")["shortlist"].tolist() == [[4, 5, 6]] * 8
    assert "at most 4" in refused("usage", options, "--shortlist=5")


def test_the_card_says_what_a_model_is(tmp_path, capfd):
    model = write_model(tmp_path / "model")
    assert run_main(translate.main, ["--about", f"--ckptpath={model}"]) == 0
    out = capfd.readouterr().out
    parameters = sum(tensor.numel() for tensor in checkpoint.load(model).state_dict.values())
    for text in (
        f"model: {model}\n",
        "translates: de to en, lower-cased\n",
        "vocabularies: 8 words of de, 8 of en\n",
        "sizes: emb_dim 4, hid_dim 6, input_dim 8, output_dim 8\n",
        f"parameters: {parameters:,}\n",
        "run: completed\n",
        "recipe tuned, seed 7",
        "validation: epoch 4, bleu 12.5000\n",
        "beam_size 2, length_penalty 1.2",
        f"data: sha256 {'fe' * 32}\n",
        "torch 2.13.0",
    ):
        assert text in out
    write_model(model, completed=False, flags={"case": "keep"})
    assert run_main(translate.main, ["--about", f"--ckptpath={model}"]) == 0
    out = capfd.readouterr().out
    assert "run: not completed" in out and "with capital letters" in out


def test_without_pytorch_what_needs_it_is_told_in_one_line():
    for flags, missing in (("", "numpy, spacy, tqdm, torch, sacremoses"), ("--tokenized", "numpy, spacy, tqdm, torch")):
        done = run([sys.executable, "-S", REPOSITORY / "translate.py", *flags.split()])
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert f"not installed: {missing};" in done.stderr.decode()
    done = run([sys.executable, "-S", REPOSITORY / "translate.py", "--backend=onnx"])
    assert b"torch" not in done.stderr.partition(b";")[0]
    assert run([sys.executable, "-S", REPOSITORY / "translate.py", "--help"]).returncode == 0


# ---------------------------------------------------------------- scores


def test_the_scores_are_those_of_sacrebleus_command_line(echo, tmp_path, capfd):
    assert echo("--input", "in.de", "--output", "out.en", "--reference", "ref.en") == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == f"scores of {translate.DEFAULT_CKPTPATH} on 4 lines:"
    assert (tmp_path / "out.en").read_text() == TRANSLATED
    printed = [(line.split()[0], line.split()[2], line.partition("(")[2][:-1]) for line in out[3:]]
    commands = [("bleu", ""), ("chrf", ""), ("bleu", "--lowercase"), ("chrf", "--chrf-lowercase")]
    for (name, score, signature), (metric, flag) in zip(printed, commands, strict=True):
        command = [sys.executable, "-m", "sacrebleu", "ref.en", "-i", "out.en", "-m", metric, "-w", "4"]
        done = run([*command, "-f", "text", *flag.split()], cwd=tmp_path)
        theirs = done.stdout.decode().split()
        assert name == {"bleu": "sacreBLEU", "chrf": "chrF"}[metric]
        assert signature in theirs[0], (signature, theirs)
        assert theirs[2] == score
        assert 10 < float(score) < 90
    assert len(set(printed)) == 4
    assert out[1].startswith("BLEU score = ") and out[2].startswith("sacreBLEU = ")
    assert out[1].split()[3] == out[2].split()[2], "of these tokens both count the same"


def test_a_model_with_case_has_cased_scores_too(echo, tmp_path, capfd):
    (tmp_path / "ref.en").write_text(EN)
    assert echo("--input", "in.de", "--output", "out.en", "--reference", "ref.en", case="keep") == 0
    out = capfd.readouterr().out.splitlines()
    scores = dict(zip(("lower", "keep"), (float(line.split(" = ")[1].split()[0]) for line in out[1:4:2]), strict=True))
    assert out[1].startswith("BLEU score = ") and out[3].startswith("cased BLEU score = ")
    assert scores["keep"] < scores["lower"]


def test_scores_go_where_the_translations_do_not(echo, capfd):
    assert echo("--input", "in.de", "--reference", "ref.en", "--tokenized", "--replace-unknown") == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 4 and "score" not in out
    assert err.count("sacreBLEU = ") == 3


def test_a_perfect_translation_has_a_score_of_100(echo, tmp_path, capfd):
    (tmp_path / "in.de").write_text("Ein Hund läuft.\n\nEin Katze, ein Hund läuft! Ein Hund.\n")
    (tmp_path / "ref.en").write_text("A dog runs.\n\nA cat, a dog runs! A dog.\n")
    assert echo("--input", "in.de", "--reference", "ref.en", "--n-best", "2") == 0
    scores = [line.split(" = ")[1].split()[0] for line in capfd.readouterr().err.splitlines() if " = " in line]
    assert scores == ["100.0000"] * 6


def test_a_second_model_is_compared_by_paired_bootstrap(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.de").write_text(DE * 8)
    (tmp_path / "ref.en").write_text(EN * 8)
    monkeypatch.setattr(translate, "engine_of", lambda settings, path: Echo(beam_size=2, max_length=4 - len(path)))
    both = ["--ckptpath", "A", "--ckptpath", "BB", "--input", "in.de", "--reference", "ref.en"]
    assert run_main(translate.main, [*both, "--output", "A.en"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert run_main(translate.main, ["--ckptpath=BB", "--input=in.de", "--output=BB.en"]) == 0
    assert (tmp_path / "A.en").read_text() != (tmp_path / "BB.en").read_text()
    start = out.index("paired bootstrap, each model against the first one:")
    assert [line.split(" on ")[0] for line in out[:start] if line.startswith("scores")] == [
        "scores of A",
        "scores of BB",
    ]
    command = "-m sacrebleu ref.en -i A.en BB.en -m bleu chrf --lowercase --chrf-lowercase --paired-bs -w 4 -f text"
    theirs = run([sys.executable, *command.split()], cwd=tmp_path).stdout.decode()
    figures = [re.findall(r"\d+\.\d{4}", line) for line in out[start + 1 :]]
    assert list(map(len, figures)) == [3, 4, 0, 3, 4, 0]
    rows = [line for line in theirs.splitlines() if "±" in line and "BLEU" not in line]
    assert figures[0] + figures[3] == re.findall(r"\d+\.\d{4}", rows[0])
    assert figures[1][:3] + figures[4][:3] == re.findall(r"\d+\.\d{4}", rows[1])
    assert f"(p = {figures[1][3]})" in theirs and f"(p = {figures[4][3]})" in theirs
    for line in out[start + 3], out[start + 6]:
        assert line.partition(": ")[2] in theirs, "the signature"
    assert ": significant at the level 0.05" in out[start + 2]


@pytest.mark.parametrize("times", [1, 8])
def test_models_that_cannot_be_told_apart_do_not_differ(monkeypatch, tmp_path, capfd, times):
    """The same model twice, and two models on a single line."""
    monkeypatch.chdir(tmp_path)
    line = EN.splitlines(keepends=True)[0]
    (tmp_path / "in.de").write_text(line if times == 1 else DE * times)
    (tmp_path / "ref.en").write_text(line if times == 1 else EN * times)
    monkeypatch.setattr(translate, "engine_of", lambda settings, path: Echo(beam_size=2, max_length=4 - len(path)))
    other = "BB" if times == 1 else "C"
    both = ["--ckptpath", "A", "--ckptpath", other, "--input", "in.de", "--reference", "ref.en"]
    assert run_main(translate.main, [*both, "--output", "out"]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if ", p = " in line]
    assert len(said) == 2
    assert all(line.endswith("p = 1.0000: not significant at the level 0.05") for line in said)


def test_a_reference_of_another_length_is_refused_and_no_translation_lost(echo, tmp_path, capfd, monkeypatch):
    (tmp_path / "ref.en").write_text(EN + "one more\n")
    assert echo("--input", "in.de", "--reference", "ref.en", "--output", "out") == 3
    assert "4 lines, the reference 5" in capfd.readouterr().err
    assert not echo.engines[0].calls
    assert not (tmp_path / "out").exists()
    with open("in.de") as file:  # whose length is known at its end
        monkeypatch.setattr(sys, "stdin", file)
        assert echo("--reference", "ref.en", "--output", "out") == 3
    assert "4 lines, the reference 5" in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == TRANSLATED


def test_flags_that_contradict_each_other_are_refused(echo, capfd):
    for flags, says in (
        ("--ckptpath A --ckptpath B", "--reference"),
        ("--n-best 3 --beam-size 2", "--n-best"),
        ("--n-best 3", "give --beam-size 3"),
        ("--input in.de --input in.de", "more than once"),
        ("--backend onnx --shortlist 5", "--shortlist"),
    ):
        assert echo("--output", "out", "--input", "in.de", "--", *flags.split()) == 2
        assert says in capfd.readouterr().err


# ---------------------------------------------------------------- files


def test_the_output_is_replaced_when_all_of_it_is_there(echo, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("old")
    (tmp_path / "out.partial-12345678").write_text("of a killed process")
    seen = []
    monkeypatch.setattr(translate, "tell", lambda *changes: seen.append((tmp_path / "out").read_text()))
    assert echo("--input", "in.de", "--output", "out") == 0
    assert seen == ["old"]
    assert (tmp_path / "out").read_text() == TRANSLATED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.de", "out", "ref.en"]


def test_what_is_read_is_never_written(echo, tmp_path, capfd, monkeypatch):
    (tmp_path / "link").symlink_to("in.de")
    os.link("in.de", "hard")
    (tmp_path / "model").write_text("a model")
    for flags in (
        "--input in.de --output in.de",
        "--input in.de --output link",
        "--input link --output ./in.de",
        "--input hard --output in.de",
        "--input in.de --output ref.en --reference ref.en",
        "--input in.de --output model --ckptpath model",
    ):
        assert echo(*flags.split()) == 2, flags
        assert "the same file" in capfd.readouterr().err
    with open("in.de") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert echo("--output", "in.de") == 2
    assert [Path(name).read_text() for name in ("in.de", "ref.en", "model")] == [DE, EN, "a model"]
    assert not echo.engines


def test_a_link_stays_and_a_pipe_is_written_to(echo, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    (tmp_path / "out").symlink_to("folder/real")
    assert echo("--input", "in.de", "--output", "out") == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == TRANSLATED
    # A pipe of the test's own: a fault here would replace it, and a device of the machine must not be replaced.
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert echo("--input", "in.de", "--output", "pipe") == 0
    assert (tmp_path / "pipe").is_fifo()
    reader.join(10)
    assert received == [TRANSLATED]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--input none", "none"),
        ("--input .", "a folder"),
        ("--input in.de --output .", "--output ."),
        ("--input in.de --output none/out", "none/out"),
        ("--input in.de --output out --reference none", "none"),
    ],
)
def test_files_that_cannot_be_used_are_told_in_one_line(echo, capfd, flags, says):
    assert echo(*flags.split()) == 5
    err = capfd.readouterr().err
    assert err.startswith("error[io]: ") and err.count("\n") == 1 and says in err


def test_two_runs_do_not_write_one_file(echo, capfd, tmp_path):
    from nmt.storage import locked

    with locked(tmp_path / ".out.lock", None) as lock:
        lock.write(b"4321\n")
        lock.flush()
        assert echo("--input", "in.de", "--output", "out") == 5
    assert "another translate.py writes there (pid 4321)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "unbuffered", "given"),
    [
        ([], "", b"Ein Hund .\n" * 1000),
        ([], "1", b"Ein Hund. " * 300 + b"\n"),  # one write, of which a part fits
        (["--output", "out"], "", b"Ein Hund .\n" * 1000),
    ],
    ids=["stdout", "unbuffered", "file"],
)
def test_a_full_disk_is_told_in_one_line(tmp_path, flags, unbuffered, given):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    (tmp_path / "out").write_text("old")
    with open(tmp_path / "stdout", "wb") as out:
        done = subprocess.run(
            [sys.executable, ECHO, "--tokenized", *flags],
            input=given,
            stdout=out if not flags else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            preexec_fn=limited,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": unbuffered},
            timeout=60,
        )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(b"error[io]: ") and done.stderr.count(b"\n") == 1
    assert (tmp_path / "out").read_text() == "old"


# ---------------------------------------------------------------- pipes, signals, a terminal


def test_a_line_is_translated_while_the_pipe_stays_open_and_ctrl_c_ends_it():
    with subprocess.Popen(
        [sys.executable, ECHO, "--tokenized"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    ) as process:
        for line, translation in ((b"Ein Hund\n", b"a dog\n"), (b"\n", b"\n"), (b"Ein Katze\n", b"a cat\n")):
            process.stdin.write(line)
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0], "no translation before the pipe is closed"
            assert process.stdout.readline() == translation
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_sigterm_ends_it_and_leaves_the_old_file(tmp_path):
    (tmp_path / "out").write_text("old")
    with subprocess.Popen(
        [sys.executable, ECHO, "--tokenized", "--output", "out"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        preexec_fn=heed_signals,
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # it waits for its input now
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        assert process.stderr.read() == b"stopped by SIGTERM\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


def test_nobody_reading_any_more_is_no_error():
    with subprocess.Popen(
        [sys.executable, ECHO, "--tokenized"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        feeder = threading.Thread(target=feed, args=(process,))
        feeder.start()
        assert process.stdout.readline() == b"a dog .\n"
        process.stdout.close()
        assert process.wait(60) == 0
        feeder.join()
        assert process.stderr.read() == b""


def feed(process: subprocess.Popen) -> None:
    """Writes lines until the process has ended."""
    while process.poll() is None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"Ein Hund .\n" * 1000)
            process.stdin.flush()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def test_a_terminal_gets_a_prompt_with_a_history_until_ctrl_d():
    pid, terminal = pty.fork()
    if not pid:
        heed_signals()
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, str(ECHO), "--scores"])

    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
            shown += os.read(terminal, 1000)
        shown = shown.partition(text)[2]

    wait_for(b"translates de to en, line by line; Ctrl-D ends it\r\n")
    for typed, answer in (
        ("Ein Hund läuft.\n".encode(), b"0.0000\tA dog runs."),
        (b"\n", b"0.0000\t\r\n"),
        (b"\x1b[A\x1b[A\x7f!\n", b"0.0000\tA dog runs!"),  # twice up, and another sign at the end
        (b"\xff\n", b"not in UTF-8"),
    ):
        wait_for(b"> ")
        os.write(terminal, typed)
        wait_for(answer)
    wait_for(b"> ")
    os.write(terminal, b"\x04")
    with contextlib.suppress(OSError):  # Linux's way to say that the other end has gone
        while os.read(terminal, 1000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_progress_is_shown_on_a_terminal_alone(tmp_path):
    (tmp_path / "in").write_bytes(b"Ein Hund .\n" * 1000)
    terminal, far_end = pty.openpty()
    fcntl.ioctl(far_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # on one of no size there is no bar
    command = [sys.executable, ECHO, "--tokenized", "--input", tmp_path / "in"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=far_end, timeout=60)
    shown = b""
    while select.select([terminal], [], [], 0)[0]:
        shown += os.read(terminal, 1000)
    os.close(far_end)
    os.close(terminal)
    assert done.stdout == b"a dog .\n" * 1000
    assert b"translated: 0 lines" in shown


# ---------------------------------------------------------------- what a newcomer meets


def test_a_model_that_is_not_there_is_told_of_by_how_it_comes_to_be(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("Ein Hund.\n")
    assert run_main(translate.main, ["--input", "in"]) == 4
    assert capfd.readouterr().err == (
        "error[checkpoint]: there is no model here; ./seq2seq-gru-model.pth.tar; "
        "train one with train_8p.py, or name a model with --ckptpath\n"
    )
    (tmp_path / "seq2seq-gru-model.pth.tar.previous").write_text("")  # a new run has begun, and has no model yet
    assert run_main(translate.main, ["--input", "in"]) == 4
    assert capfd.readouterr().err == (
        "error[checkpoint]: no such file; ./seq2seq-gru-model.pth.tar; give the path of a checkpoint; "
        "that of the run before is seq2seq-gru-model.pth.tar.previous\n"
    )
    assert translate.Settings(backend="onnx").models == [export_onnx.Settings().out]


def test_a_text_of_words_that_the_model_does_not_know_is_noted(echo, capfd):
    assert echo("--input", "in.de") == 0
    assert "does not know" not in capfd.readouterr().err
    Path("strange").write_text("Xylophon Yak Zebu Hund\n" * 3)
    assert echo("--input", "strange") == 0
    assert "note: the model does not know 75% of the words" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("output", "todo"), [("none/out", "give a file in a folder"), (".", "give a file in a folder")]
)
def test_an_output_that_cannot_be_says_what_helps(echo, capfd, output, todo):
    assert echo("--input", "in.de", "--output", output) == 5
    assert todo in capfd.readouterr().err
