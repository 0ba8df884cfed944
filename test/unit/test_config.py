"""A file of flags means what the command line means, and the one that a run writes makes the same run again."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import train_8p
from bench import logs
from nmt import checkpoint, config, resume
from nmt.errors import run_main

import pytest
from conftest import REPOSITORY, SMALL, parse, refused, step_lines

RUN = [*SMALL, "--epochs", "1", "-b", "8", "-p", "2", "--beam-size", "1"]


@pytest.fixture
def toml(tmp_path):
    """Writes a file of flags, and gives its path."""

    def write(text: str) -> str:
        (tmp_path / "run.toml").write_bytes(text.encode())
        return str(tmp_path / "run.toml")

    return write


# ---------------------------------------------------------------- reading


def test_a_file_gives_flags_with_their_types(toml):
    text = "# a comment\r\nbatch-size = 8\nemb_dim = 16\nlr = 1\naverage = 1e-1\namp = true\ndevice_list = [0, 2]\n"
    text += 'loss-scale = "dynamic"\ndata-dir = "a b/ä"\n'
    settings = parse("--config", toml(text))
    values = settings.named("batch_size emb_dim lr average amp device_list loss_scale data_dir hid_dim")
    assert list(values.values()) == [8, 16, 1.0, 0.1, True, [0, 2], "dynamic", "a b/ä", 512]
    assert parse("--config", toml("loss_scale = 8\nepoch = 3\nlearning-rate = 2\n")).named("loss_scale epochs lr") == {
        "loss_scale": 8.0,
        "epochs": 3,
        "lr": 2.0,
    }
    assert parse("--config", toml('init = "modelzoo"\n')).init == "normal", "a former name"


def test_the_command_line_wins_and_behind_a_lone_hyphens_so_does_the_file(toml):
    path = toml("batch-size = 8\nseed = 5\namp = false\n")
    for words in (["--config", path, "--seed", "6"], ["--seed=6", f"--config={path}"]):
        assert parse(*words).named("batch_size seed") == {"batch_size": 8, "seed": 6}
    # A wrapper's own flags stand before the lone hyphens.
    behind = parse("--seed=6", "--amp", "--opt-level=O2", "--", "--config", path, "-b", "4")
    assert behind.named("batch_size seed amp opt_level") == {
        "batch_size": 4,
        "seed": 5,
        "amp": False,
        "opt_level": "O2",
    }


def test_a_flag_of_the_file_counts_as_given(toml):
    parser = train_8p.build_parser()
    parser.parse_args(["--config", toml("seed = 1234\namp = false\n"), "-b", "4"])
    assert parser.given == {"config", "seed", "amp", "batch_size"}
    assert parser.of_files == {"seed", "amp"}
    parser.parse_args(["--config", toml("seed = 1234\namp = false\n"), "--seed", "4"])
    assert parser.of_files == {"amp"}


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("batchsize = 8", "batchsize", "no flag of this name"),
        ('batch-size = "8"', "batch-size", "'8' is of a wrong type"),
        ("batch-size = 8.0", "batch-size", "expected a whole number"),
        ("batch-size = true", "batch-size", "expected a whole number"),
        ("amp = 1", "amp", "expected true or false"),
        ("lr = [1]", "lr", "expected a number"),
        ("seed = 2020-01-01", "seed", "expected a whole number"),
        ("device-list = [0, 1.5]", "device-list", "expected a list such as [0, 1]"),
        ("device-list = []", "device-list", "expected a list such as [0, 1]"),
        ("[lr]\na = 1", "lr", "a table is of a wrong type"),
        ("batch-size = 0", "batch-size", "'0' must be at least 1"),
        ("lr = inf", "lr", "'inf' is not a finite decimal number"),
        ("lr = nan", "lr", "'nan' is not a finite decimal number"),
        ("device-list = [0, 0]", "device-list", "'0,0' names a device twice"),
        ('recipe = "other"', "recipe", "invalid choice: 'other' (choose from"),
        ('data-dir = ""', "data-dir", "has an empty value"),
        ('data-dir = "a\\u0000"', "data-dir", "has a NUL byte"),
        ("batch-size = 1\nbatch_size = 1", "batch_size", "--batch-size is given more than once"),
        ("lr = 1\nlearning-rate = 1", "learning-rate", "--lr is given more than once"),
        ('config = "b"', "config", "a file names no other"),
    ],
)
def test_what_the_command_line_would_refuse_is_one_line_that_names_file_and_key(toml, text, key, says):
    path = toml(text)
    refused("usage", parse, "--config", path, says=[f"{path}: {key}; ", says])


@pytest.mark.parametrize("text", ["lr", "lr = ", "lr = 1\nlr = 2", "\udc80", "a = " + "[" * 5000, "lr = 0x"])
def test_a_file_that_is_no_toml_is_one_line(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    refused("usage", parse, "--config", str(path), says=["no TOML: ", str(path)])


def test_a_file_that_is_not_there_and_two_files_are_refused(toml, tmp_path):
    refused("usage", parse, "--config", str(tmp_path / "none"), says=["cannot read the file of flags: No such file"])
    refused("usage", parse, "--config", str(tmp_path), says=["cannot read the file of flags: Is a directory"])
    refused("usage", parse, "--config", toml(""), "--config", toml(""), says="--config: given more than once")


def test_the_wrappers_question_reads_the_file_too(toml, capsys):
    assert run_main(train_8p.tell_what_starts, ["--config", toml('resume = "none.state"\n')]) == 0
    assert capsys.readouterr().out == "goes on\n"
    for text, what in (
        ("performance = true", "measures"),
        ("performance = false", "trains"),
        ('evaluate = "a"', "evaluates"),
    ):
        assert run_main(train_8p.tell_what_starts, ["--config", toml(text)]) == 0
        assert capsys.readouterr().out == f"begins: {what}\n"
    assert run_main(train_8p.tell_what_starts, ["--config", toml("lr = 0\n")]) == 2


# ---------------------------------------------------------------- writing


def test_all_that_is_written_reads_as_it_was(toml):
    given = parse(
        "--device-list",
        "3,1",
        "--lr",
        "1e-05",
        "--amp",
        "--data-dir",
        'a "b" \\ \x7f \u2028 ä 😀\t\n',
        "--clip",
        "3e38",
    )
    lines = list(config.lines(train_8p.Settings, vars(given), ["a header"]))
    assert all(line.isascii() and line.isprintable() and line for line in lines)
    again = parse("--config", toml("\n".join(lines)))
    assert {**vars(again), "config": None} == vars(given)
    kept = logs.flags_of("".join(f"{config.PREFIX}{line}\n" for line in lines))
    assert (kept["device_list"], kept["lr"], kept["amp"]) == ("[3, 1]", "1e-05", "True")


def test_a_path_that_toml_cannot_say_is_left_out_with_a_word():
    (line,) = list(config.lines(train_8p.Settings, {"data_dir": "a\udcff"}, []))[1:]
    assert line == "# data-dir: not in UTF-8, so it has to be given by hand"


# ---------------------------------------------------------------- the same run again


def run_of(*words: str, cwd: Path) -> str:
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def file_in(log: str) -> str:
    """What `sed -n 's/^config: //p'` gives."""
    return "".join(f"{line}\n" for line in re.findall(r"^config: (.*)$", log, re.MULTILINE))


def test_the_file_of_a_run_makes_the_same_run_again(tiny_corpus, tmp_path, no_launcher, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags_given = [*RUN, "--seed", "7", "--accumulate", "2", "--data-dir", "corpus"]
    assert run_main(train_8p.main, flags_given) == 0
    log = capsys.readouterr().out
    written = Path("seq2seq-gru-model.pth.tar.toml").read_text()
    assert file_in(log) == written
    assert str(tmp_path) not in written and 'data-dir = "corpus"' in written
    assert log.rstrip("\n").rpartition("\n")[2].startswith("config: "), "the log's last lines"
    assert "flags: " not in log
    Path("run.toml").write_text(written)
    assert run_main(train_8p.main, ["--config", "run.toml"]) == 0
    again = capsys.readouterr().out
    assert step_lines(again) == step_lines(log) != []
    assert file_in(again).splitlines()[2:] == written.splitlines()[2:], "but for the date"
    assert run_main(train_8p.main, ["--config", "run.toml", "--seed", "8"]) == 0
    assert step_lines(capsys.readouterr().out) != step_lines(log)
    assert parse("--config", "run.toml").named("config resume overwrite evaluate debug") == {
        "config": "run.toml",
        "resume": None,
        "overwrite": False,
        "evaluate": None,
        "debug": False,
    }


@pytest.mark.parametrize(
    "extra",
    [
        ["--amp", "--amp-dtype", "bfloat16", "--opt-level", "O1"],
        ["--recipe", "modelzoo", "--performance"],
        ["--subword", "40", "--bpe-dropout", "0.1"],
    ],
    ids=["O1", "modelzoo", "pieces"],
)
def test_other_precisions_recipes_and_runs_without_a_checkpoint_too(tiny_corpus, tmp_path, no_launcher, capsys, extra):
    own = ["--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model")]
    assert run_main(train_8p.main, [*RUN, *own, *extra]) == 0
    log = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(file_in(log))
    as_a_wrapper_does = ["--amp", "--opt-level=O2", "--", "--config", str(tmp_path / "run.toml")]
    assert run_main(train_8p.main, as_a_wrapper_does) == 0
    assert step_lines(capsys.readouterr().out) == step_lines(log) != []
    assert (tmp_path / "model.toml").exists() == ("--performance" not in extra)


@pytest.mark.slow
def test_a_run_of_several_processes_too_whose_batch_the_corpus_cuts(tmp_path, tiny_corpus, no_launcher):
    """63 pairs in one batch of two ranks: the file says 64, which both can share."""
    for path in tiny_corpus.glob("train.*"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:63]))
    words = [*SMALL, "--epochs", "2", "-b", "100", "-p", "1", "--recipe", "modelzoo", "--data-dir", "corpus"]
    log = run_of(*words, "--multiprocessing-distributed", "--device-list", "0,1", cwd=tmp_path)
    (tmp_path / "run.toml").write_text(file_in(log))
    assert "batch-size = 64\n" in file_in(log) and "device-list = [0, 1]\n" in file_in(log)
    again = run_of("--config", "run.toml", cwd=tmp_path)
    assert step_lines(again) == step_lines(log) != []


def test_a_run_can_go_on_with_its_own_file(tiny_corpus, tmp_path, no_launcher, monkeypatch, capsys):
    """All flags of the file count as given, and none contradicts the run."""
    path = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(resume.Run, "step_done", stop_in_the_third_step)
        own = ["--data-dir", str(tiny_corpus), "--ckptpath", str(path)]
        assert run_main(train_8p.main, [*RUN, *own]) == 143
    assert run_main(train_8p.main, ["--config", f"{path}.toml", "--resume", "auto"]) == 0
    assert f"resumed: {path}.state: 3 steps are done" in capsys.readouterr().out
    assert checkpoint.load(path).completed


STEP_DONE = resume.Run.step_done


def stop_in_the_third_step(run, step, epoch, position):
    if step == 3:
        run._stop.signal = signal.SIGTERM
    STEP_DONE(run, step, epoch, position)


@pytest.mark.slow
def test_the_log_of_a_wrapper_makes_the_same_run_again(tiny_corpus, tmp_path, no_launcher):
    """As the reference says, with sed. `test_other_precisions...` has the quick form."""
    words = ["--device=cpu", f"--data_path={tiny_corpus}", "--", *RUN[:4], "--epochs", "1", "-b", "8", "-p", "1"]
    environment = os.environ | {"ASCEND_DEVICE_ID": "98765", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    output = REPOSITORY / "test" / "output" / "98765"
    try:
        for arguments in (words, ["--", "--config", "run.toml"]):
            command = ["bash", str(REPOSITORY / "test" / "train_full_1p.sh"), *arguments]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            log = output / "train_98765.log"
            sed = f"sed -n 's/^config: //p' '{log}' > run.toml"
            if arguments is words:
                first = step_lines(log.read_text())
                subprocess.run(sed, shell=True, cwd=tmp_path, check=True)
        assert step_lines(log.read_text()) == first != []
        assert step_lines(run_of("--config", "run.toml", cwd=tmp_path)) == first
    finally:
        shutil.rmtree(output, ignore_errors=True)
