"""A run that is stopped and goes on is the run that was never stopped, bit for bit."""

import copy
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys

import gru
import train_8p
from nmt import checkpoint, precision, resume, sealed
from nmt.errors import run_main

import hashing
import pytest
import torch
from conftest import REPOSITORY, SMALL, refused, write_corpus

STEPS, EPOCHS = 8, 3  # steps of an epoch
COMMON = [*SMALL, "--epochs", str(EPOCHS), "-p", "3", "--beam-size", "2"]
FLAGS = [*COMMON, "-b", "8"]
OVERFLOWING = ["--amp", "--amp-dtype", "bfloat16", "--loss-scale", "dynamic", "--opt-level", "O2"]


class Recorder:
    """Runs the program in this process, stops it between two steps, and notes what each epoch ends with."""

    def __init__(self, monkeypatch):
        self.stop_at = self.stop_in_validation = None
        self.hashes, self.fresh = {}, {}
        begin, step_done, steps_done = resume.Run.__init__, resume.Run.step_done, resume.Run.steps_done

        def watched_begin(run, state, parts, **options):
            self.fresh = copy.deepcopy({name: part.state() for name, part in parts.items()})
            begin(run, state, parts, **options)

        def watched_step_done(run, step, epoch, position):
            if step == self.stop_at:
                run._stop.signal = signal.SIGTERM
            step_done(run, step, epoch, position)

        def watched_steps_done(run, step, epoch, position):
            self.hashes[epoch] = hashing.digest_of(run)
            steps_done(run, step, epoch, position)
            if step == self.stop_in_validation:
                run._stop.signal = signal.SIGTERM

        monkeypatch.setattr(resume.Run, "__init__", watched_begin)
        monkeypatch.setattr(resume.Run, "step_done", watched_step_done)
        monkeypatch.setattr(resume.Run, "steps_done", watched_steps_done)

    def __call__(self, corpus, ckptpath, *flags, stop_at=None, stop_in_validation=None) -> int:
        """The exit code."""
        self.stop_at, self.stop_in_validation, self.hashes = stop_at, stop_in_validation, {}
        argv = ["--data-dir", str(corpus), "--ckptpath", str(ckptpath), *flags]
        return run_main(train_8p.main, argv)


@pytest.fixture
def record(monkeypatch, no_launcher):
    return Recorder(monkeypatch)


def told(out: str) -> list[str]:
    """What a log says about losses, scores and files, without times, names and the lines of saving."""
    lines = [re.sub(r"\tTime .*?\tData .*?\t", "\t", line) for line in out.splitlines()]
    kept = [line for line in lines if re.match(r"\[cpu|validation|saved|note: \d|greedy|BLEU", line)]
    return [re.sub(r"\S*\.pth", "", line) for line in kept]


QUIET = {}  # what `straight` has found, by the flags: all tests have the same corpus


@pytest.fixture
def straight(record, tiny_corpus, tmp_path, capsys):
    """The hashes and the log of a run that nobody stopped, by the flags that come on top."""

    def run(*flags):
        key = (*flags, precision.DYNAMIC_START)
        if key not in QUIET:
            assert record(tiny_corpus, tmp_path / "straight.pth", *FLAGS, *flags) == 0
            QUIET[key] = record.hashes, told(capsys.readouterr().out)
        return QUIET[key]

    return run


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("stop_at", [1, 4, STEPS, STEPS + 1, 2 * STEPS + 3, EPOCHS * STEPS])
def test_a_stopped_run_goes_on_to_the_same_weights(record, straight, tiny_corpus, tmp_path, capsys, stop_at):
    """Row 6: after 1 step, in an epoch, at the end of one, and after the last step."""
    hashes, lines = straight()
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, stop_at=stop_at) == 143
    before = capsys.readouterr()
    assert f"step {stop_at} is saved" in before.err
    assert record(tiny_corpus, path, *FLAGS, "--resume", "auto") == 0
    after = capsys.readouterr().out
    assert record.hashes == {epoch: hashes[epoch] for epoch in range((stop_at - 1) // STEPS, EPOCHS)}
    assert told(before.out) + told(after) == lines, "each line once, with the same losses"
    assert not resume.state_path(path).exists(), "a complete run needs no state"


def test_a_run_that_is_stopped_in_its_validation_goes_on_with_it(record, straight, tiny_corpus, tmp_path, capsys):
    """Rows 6 and 8: a validation may take longer than the time that a signal leaves."""
    hashes, lines = straight()
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, stop_in_validation=STEPS) == 143
    before = capsys.readouterr()
    assert "validation:" not in before.out
    assert f"step {STEPS} is saved" in before.err
    assert record(tiny_corpus, path, *FLAGS, "--resume", "auto") == 0
    assert record.hashes == hashes
    assert told(before.out) + told(capsys.readouterr().out) == lines


def test_a_run_that_has_no_state_yet_begins_anew(record, straight, tiny_corpus, tmp_path, capsys):
    hashes, lines = straight("--resume", "auto")
    assert len(hashes) == EPOCHS
    assert record(tiny_corpus, tmp_path / "new.pth", *FLAGS) == 0
    assert record.hashes == hashes


O1 = ["--recipe", "modelzoo", "--amp-dtype", "bfloat16", "--amp", "--opt-level", "O1"]


@pytest.mark.parametrize("flags", [OVERFLOWING, pytest.param(O1, marks=pytest.mark.slow)], ids=["O2", "O1"])
def test_other_precisions_and_recipes_go_on_likewise(record, straight, tiny_corpus, tmp_path, capsys, flags):
    hashes, lines = straight(*flags)
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, *flags, stop_at=11) == 143
    before = capsys.readouterr().out
    assert record(tiny_corpus, path, "--resume", "auto") == 0, "all flags are those of the run"
    assert record.hashes == {epoch: hashes[epoch] for epoch in (1, 2)}
    assert told(before) + told(capsys.readouterr().out) == lines


def test_a_run_whose_batches_are_computed_in_parts_goes_on_likewise(record, straight, tiny_corpus, tmp_path, capsys):
    flags = ["--accumulate", "3"]
    hashes, lines = straight(*flags)
    assert hashes != straight()[0], "each part drops other positions"
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, *flags, stop_at=STEPS + 5) == 143
    before = capsys.readouterr().out
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert record.hashes == {epoch: hashes[epoch] for epoch in (1, 2)}
    assert told(before) + told(capsys.readouterr().out) == lines


STANDSTILL = ["--lr", "1e-30", "--patience", "1"]  # no epoch is better than the first
EARLY = "note: the training ends early: no epoch since epoch 1 was better, and --patience is 1"


@pytest.mark.parametrize(
    "stop", [{"stop_at": STEPS + 4}, {"stop_in_validation": STEPS}, {"stop_in_validation": 2 * STEPS}]
)
def test_a_run_that_goes_on_waits_no_longer_for_a_better_epoch(record, tiny_corpus, tmp_path, capsys, stop):
    """--patience: the epochs before the stop count."""
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, *STANDSTILL, **stop) == 143
    assert EARLY not in capsys.readouterr().out
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert max(record.hashes) == 1, "of three epochs the third was not trained"
    assert out.count(EARLY) == 1 and "BLEU score = " in out
    saved = checkpoint.load(path)
    assert saved.completed and saved.scores["epoch"] == 0
    assert not resume.state_path(path).exists()


def test_a_file_that_is_newer_than_the_state_counts_as_the_best_epoch(record, tiny_corpus, tmp_path, capsys):
    """A run that was killed after it had saved its best model validates that epoch again, and is no worse for it."""
    path = tmp_path / "model"
    assert record(tiny_corpus, path, *FLAGS, "--lr", "1e-30", "--patience", "2", stop_in_validation=STEPS) == 143
    state = resume.state_path(path).read_bytes()
    assert record(tiny_corpus, path, "--resume", "auto", stop_at=STEPS + 1) == 143
    resume.state_path(path).write_bytes(state)
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert max(record.hashes) == 2 and "ends early" not in out and out.count("saved: ") == 1
    entries = [json.loads(line) for line in path.with_name("model.metrics.jsonl").read_text().splitlines()]
    assert [entry["is_best"] for entry in entries if entry["kind"] == "validation"][0], "as when it was saved"


PARTS = [
    ("trainer", "model"),
    ("trainer", "optimizer"),
    ("average", "model"),
    ("average", "step"),
    ("log", "totals"),
    ("log", "since_line"),
    ("log", "step"),
]


@pytest.mark.parametrize("field", ["step", "epoch", "position", *PARTS])
def test_each_saved_field_counts(record, straight, tiny_corpus, tmp_path, capsys, field):
    """A field that is as in a new run makes another run of it."""
    hashes, lines = straight()
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, stop_at=STEPS + 4) == 143
    before = told(capsys.readouterr().out)
    forget(resume.state_path(path), field, record.fresh)
    if isinstance(field, str):
        assert record(tiny_corpus, path, "--resume", "auto") == 4, "the three counts hold each other"
        return
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert (record.hashes[EPOCHS - 1], before + told(out)) != (hashes[EPOCHS - 1], lines)


def test_the_best_score_counts(record, tiny_corpus, tmp_path, capsys):
    """A worse model does not take the place of the best one that the run had before it was stopped."""
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, stop_at=STEPS + 4) == 143
    content = sealed.read(resume.state_path(path))
    content["parts"]["best"]["merit"] = [100.0, 0.0]
    sealed.write(resume.state_path(path), content)
    capsys.readouterr()
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert "saved: " not in capsys.readouterr().out
    assert checkpoint.load(path).scores["epoch"] == 0


@pytest.mark.parametrize(
    "field", [("update", "scale"), ("update", "clean_steps"), ("counts", "steps"), ("counts", "updates")]
)
def test_each_saved_counter_of_the_scaler_counts(record, straight, tiny_corpus, tmp_path, capsys, monkeypatch, field):
    """The loss scale begins so high that gradients overflow, and grows until they overflow again."""
    monkeypatch.setattr(precision, "DYNAMIC_START", 2.0**66)
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    hashes, lines = straight(*OVERFLOWING)
    assert any("changed no weight" in line for line in lines), "steps have overflowed"
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, *OVERFLOWING, stop_at=STEPS + 2) == 143
    before = told(capsys.readouterr().out)
    forget(resume.state_path(path), ("trainer", *field), record.fresh)
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert (record.hashes[EPOCHS - 1], before + told(capsys.readouterr().out)) != (hashes[EPOCHS - 1], lines)


def forget(path, field, fresh):
    """Sets a field of a saved state to what a new run begins with."""
    content = sealed.read(path)
    if isinstance(field, str):
        assert content[field] != 0
        content[field] = 0
    else:
        *outer, last = field
        inner = content["parts"]
        beginning = fresh | {"log": {"totals": [0.0, 0.0], "since_line": [0.0, 0.0], "step": 0}}
        for name in outer:
            inner, beginning = inner[name], beginning[name]
        assert hashing.digest(inner[last]) != hashing.digest(beginning[last])
        inner[last] = beginning[last]
    sealed.write(path, content)


# ---------------------------------------------------------------- several ranks


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def one_rank(rank: int, size: int, port: int, argv: tuple, stop_at: int | None, results) -> None:
    """One of several ranks, as under torchrun."""
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()}, MASTER_ADDR="127.0.0.1")
    with pytest.MonkeyPatch.context() as monkeypatch:
        record = Recorder(monkeypatch)
        code = record(*argv, "-b", str(4 * size), stop_at=stop_at)
        results.put((rank, code, record.hashes.get(EPOCHS - 1)))
        results.close()
        results.join_thread()
    os._exit(0)


def run_ranks(size: int, *argv, stop_at: int | None = None) -> list[tuple[int, int, str]]:
    """Rank, exit code and last hash of each rank that came to its end. Of a stopped run only rank 0 does."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [context.Process(target=one_rank, args=(rank, size, port, argv, stop_at, results)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    try:
        return sorted(results.get(timeout=120) for _ in (ranks if stop_at is None else ranks[:1]))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def check_ranks(size, stops, corpus, folder, *flags):
    """Asserts that `size` ranks that are stopped and go on end as those that nobody stopped."""
    quiet = run_ranks(size, corpus, folder / "quiet.pth", *COMMON, *flags)
    last = quiet[0][2]
    assert last is not None
    assert quiet == [(rank, 0, last) for rank in range(size)], "all ranks have the same weights"
    for stop_at in stops:
        path = folder / f"stopped{stop_at}.pth"
        ((_, code, _),) = run_ranks(size, corpus, path, *COMMON, *flags, stop_at=stop_at)
        assert code == 143
        assert run_ranks(size, corpus, path, *COMMON, *flags, "--resume", "auto") == quiet


@pytest.mark.slow
def test_patience_ends_two_ranks_together(tiny_corpus, tmp_path, no_launcher):
    """Rank 0 alone knows the best epoch."""
    words = [*COMMON, "--lr", "1e-30", "--patience", "1", "--data-dir", str(tiny_corpus), "--ckptpath", "model"]
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *words]
    command += ["--multiprocessing-distributed", "--device-list", "0,1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(EARLY) == 1 and "BLEU score = " in done.stdout
    assert re.findall(r"^validation: epoch (\d)", done.stdout, re.M) == ["1", "2"]


def test_two_ranks_go_on_to_the_same_weights_and_one_goes_on_with_a_note(
    record, tiny_corpus, tmp_path, no_launcher, capsys
):
    """Row 17: one rank in the place of two is not bit-exact."""
    check_ranks(2, [STEPS + 3], tiny_corpus, tmp_path)
    path = tmp_path / "two.pth"
    ((_, code, _),) = run_ranks(2, tiny_corpus, path, *COMMON, stop_at=3)
    assert code == 143
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert "not bit for bit: processes: 1, in the run 2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_stopped_anywhere_go_on_to_the_same_weights(tmp_path, no_launcher, size):
    """Three ranks differ if DistributedDataParallel lays out its buckets only after the first step."""
    corpus = write_corpus(tmp_path / "corpus", 4 * size * STEPS)
    check_ranks(size, [1, STEPS - 1, STEPS, 2 * STEPS, EPOCHS * STEPS], corpus, tmp_path)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def stopped(record, tiny_corpus, tmp_path):
    """The path of the best model of a run that was stopped in its second epoch."""
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, stop_at=STEPS + 4) == 143
    return path


def resumed(corpus, path, *flags):
    train_8p.main(["--data-dir", str(corpus), "--ckptpath", str(path), *flags])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr", "0.5"], ["lr is 0.5, in the run 0.003", "leave --lr out"]),
        (["--batch-size", "16"], ["batch_size is 16, in the run 8"]),
        (["--recipe", "modelzoo"], ["average is 0.0, in the run 0.2", "and 9 more", "leave --recipe out"]),
        (["--seed", "5"], ["seed is 5, in the run 1234"]),
        (["--emb-dim", "9"], ["emb_dim is 9"]),
        (["--accumulate", "2"], ["accumulate is 2, in the run 1"]),
        (["--patience", "2"], ["patience is 2, in the run 0"]),
        (["--case", "keep"], ["case is keep, in the run lower", "leave --case out"]),
        (["--val-split", "3"], ["val_split is 3, in the run 0", "leave --val-split out"]),
        (["--amp", "--amp-dtype", "bfloat16"], ["amp_dtype is bfloat16, in the run float32"]),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(stopped, tiny_corpus, flags, says):
    message = refused("usage", resumed, tiny_corpus, stopped, "--resume", "auto", *flags, says=says)
    assert str(resume.state_path(stopped)) in message


def test_a_flag_that_has_its_usual_value_counts_as_well(record, tiny_corpus, tmp_path):
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, "--seed", "7", "--recipe", "modelzoo", stop_at=3) == 143
    says = ["seed is 1234, in the run 7", "leave --seed out"]
    refused("usage", resumed, tiny_corpus, path, "--resume", "auto", "--seed", "1234", says=says)
    refused("usage", resumed, tiny_corpus, path, "--resume", "auto", "--recipe", "tuned", says="leave --recipe out")


def test_a_setting_that_differs_without_a_flag_is_to_be_given(stopped, tiny_corpus):
    path = resume.state_path(stopped)
    content = sealed.read(path)
    del content["given"]["batch_size"]
    sealed.write(path, content)
    says = ["batch_size is 1, in the run 8", "give --batch-size 8"]
    refused("usage", resumed, tiny_corpus, stopped, "--resume", "auto", says=says)


def test_a_state_from_before_a_flag_was_there_goes_on_with_what_was_done_then(stopped, record, tiny_corpus):
    path = resume.state_path(stopped)
    content = sealed.read(path)
    for name in train_8p.LATER:
        del content["settings"][name]
    sealed.write(path, content)
    says = ["case is keep, in the run lower", "leave --case out"]
    refused("usage", resumed, tiny_corpus, stopped, "--resume", "auto", "--case", "keep", says=says)
    assert record(tiny_corpus, stopped, "--resume", "auto") == 0
    assert checkpoint.load(stopped).flags["case"] == "lower"


def test_the_state_of_another_model_is_one_line_that_names_what_does_not_fit(stopped, tiny_corpus, monkeypatch):
    """Somebody has changed gru.py since."""
    build = gru.build

    def with_another_layer(*args, **options):
        model = build(*args, **options)
        model.encoder.another = torch.nn.Linear(2, 2)
        return model

    monkeypatch.setattr(gru, "build", with_another_layer)
    says = ["is of another model: ", "encoder.another.weight", "the gru.py that the run began with"]
    refused("checkpoint", resumed, tiny_corpus, stopped, "--resume", "auto", says=says)


def test_a_run_that_keeps_case_goes_on_with_it(record, tiny_corpus, tmp_path):
    for lang in ("de", "en"):
        for name in ("train", "val", "test"):
            path = tiny_corpus / f"{name}.{lang}"
            path.write_text(path.read_text().title())
    path = tmp_path / "stopped.pth"
    assert record(tiny_corpus, path, *FLAGS, "--case", "keep", stop_at=3) == 143
    refused("usage", resumed, tiny_corpus, path, "--resume", "auto", "--case", "lower", says="leave --case out")
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert "Hund" in checkpoint.load(path).src_vocab


def test_a_run_whose_test_pairs_are_taken_out_of_train_goes_on_with_them(record, tiny_corpus, tmp_path):
    for lang in ("de", "en"):
        for name in ("val", "test"):
            (tiny_corpus / f"{name}.{lang}").unlink()
    path = tmp_path / "stopped.pth"
    split = ["--val-split", "6", "--write-split", str(tmp_path / "split")]
    assert record(tiny_corpus, path, *FLAGS, *split, stop_at=3) == 143
    says = ["val_split is 7, in the run 6", "leave --val-split out"]
    refused("usage", resumed, tiny_corpus, path, "--resume", "auto", "--val-split", "7", says=says)
    assert record(tiny_corpus, path, "--resume", "auto") == 0
    assert checkpoint.load(path).flags["val_split"] == 6
    assert "write_split" not in checkpoint.load(path).flags, "it is a path of this machine"


def test_flags_that_change_no_number_may_differ(stopped, record, tiny_corpus):
    flags = ["--resume", "auto", "-p", "1", "--beam-size", "1", "--workers", "1", "--save-every", "1"]
    assert record(tiny_corpus, stopped, *flags) == 0


def test_other_data_is_refused_with_both_fingerprints(stopped, tmp_path):
    """Row 15, for a run that goes on."""
    other = write_corpus(tmp_path / "other", 64)
    with open(other / "test.en", "a") as file, open(other / "test.de", "a") as source:
        file.write("the dog runs .\n")
        source.write("der hund läuft .\n")
    message = refused("checkpoint", resumed, other, stopped, "--resume", "auto", says="other data")
    assert len(re.findall(r"[0-9a-f]{64}", message)) == 2


def test_other_vocabularies_are_refused_with_both_fingerprints(stopped, tiny_corpus):
    """Row 15: the same sizes, two words exchanged."""
    path = resume.state_path(stopped)
    content = sealed.read(path)
    content["about"]["vocabularies"] = "0" * 64
    sealed.write(path, content)
    message = refused("checkpoint", resumed, tiny_corpus, stopped, "--resume", "auto", says="other vocabularies")
    assert len(re.findall(r"[0-9a-f]{64}", message)) == 2


def test_what_keeps_it_from_being_bit_exact_is_said(stopped, record, tiny_corpus, capsys):
    """Row 17."""
    path = resume.state_path(stopped)
    content = sealed.read(path)
    content["about"] |= {"processes": 4, "torch": "1.0"}
    sealed.write(path, content)
    assert record(tiny_corpus, stopped, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "note: the run goes on, but not bit for bit: processes: 1, in the run 4; torch: " in out


def test_a_best_model_is_no_state(stopped, tiny_corpus):
    refused(
        "checkpoint",
        resumed,
        tiny_corpus,
        stopped,
        "--resume",
        str(stopped),
        says=["a model, not the state of a run", f"give --resume {stopped}.state"],
    )


@pytest.mark.parametrize("change", [{"step": -1}, {"epoch": "1"}, {"parts": []}, {"more": 1}])
def test_a_state_that_contradicts_itself_is_refused(stopped, tiny_corpus, change):
    path = resume.state_path(stopped)
    sealed.write(path, sealed.read(path) | change)
    refused("checkpoint", resumed, tiny_corpus, stopped, "--resume", "auto", says=str(path))


class Reached(BaseException):
    """The first step would begin."""


JUNK = [None, -1, 0, 10**20, 3.5, float("nan"), "", "x", True, [], [1], {}, {"a": 1}, torch.ones(2), torch.ones(2, 3)]


def damage(content: dict, generator: random.Random) -> None:
    """Replaces or removes something somewhere in a state."""
    inner = content
    while True:
        key = generator.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if isinstance(inner[key], dict | list) and len(inner[key]) and generator.random() < 0.8:
            inner = inner[key]
        elif generator.random() < 0.3:
            del inner[key]
            return
        else:
            inner[key] = generator.choice(JUNK)
            return


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_state_that_was_signed_with_other_contents_is_refused_or_begins(
    stopped, tiny_corpus, monkeypatch, capsys, cases
):
    """No exception but a user's error, whatever is in the file. Some changes make another state that is in order."""

    def reach(*_):
        raise Reached

    monkeypatch.setattr(train_8p, "seed_step", reach)
    path, generator, kinds = resume.state_path(stopped), random.Random(cases), set()
    original = sealed.read(path)
    for _ in range(cases):
        content = copy.deepcopy(original)
        damage(content, generator)
        sealed.write(path, content)
        try:
            kinds.add(run_main(train_8p.main, ["--data-dir", str(tiny_corpus), "--resume", str(path)]))
        except Reached:
            kinds.add("begins")
    assert kinds <= {2, 4, "begins"} and {4, "begins"} <= kinds


@pytest.mark.parametrize("cases", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_flipped_bit_or_a_lost_end_of_a_state_is_refused(stopped, cases):
    """Rows 12 and 14, for the state of a run."""
    path, generator = resume.state_path(stopped), random.Random(cases)
    original = path.read_bytes()
    for case in range(cases):
        changed = bytearray(original)
        if case % 3:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        else:
            del changed[generator.randrange(len(changed)) :]
        path.write_bytes(changed)
        refused("checkpoint", resume.load, path)


def test_a_state_is_found_by_its_name_too(stopped, record, tiny_corpus):
    """Without --ckptpath the best model stays where it was."""
    path = resume.state_path(stopped)
    assert run_main(train_8p.main, ["--data-dir", str(tiny_corpus), "--resume", str(path)]) == 0
    assert stopped.exists() and not path.exists()


def test_a_performance_run_keeps_no_state(record, tiny_corpus, tmp_path):
    refused("usage", resumed, tiny_corpus, tmp_path / "a.pth", "--resume", "auto", "--performance", says="--resume")


# ---------------------------------------------------------------- the file


def test_a_new_run_keeps_an_unfinished_one_which_can_go_on(record, straight, tiny_corpus, tmp_path, capsys):
    """Row 50, with states: a completed run, one that was killed, and another one that was killed."""
    hashes, lines = straight()
    path, kept = tmp_path / "model", tmp_path / "model.previous"
    assert record(tiny_corpus, path, *FLAGS, "--seed", "2") == 0
    assert record(tiny_corpus, path, *FLAGS, stop_at=STEPS + 4) == 143
    capsys.readouterr()
    assert record(tiny_corpus, path, *FLAGS, "--seed", "3", stop_at=STEPS + 2) == 143
    out = capsys.readouterr().out
    assert f"; that run did not end: --resume {kept}.state goes on with it; 2 earlier runs are kept" in out
    assert checkpoint.load(tmp_path / "model.previous.1").flags["seed"] == 2, "of the run that was completed"
    assert run_main(train_8p.main, ["--data-dir", str(tiny_corpus), "--resume", f"{kept}.state"]) == 0
    assert [record.hashes[epoch] for epoch in (1, 2)] == [hashes[epoch] for epoch in (1, 2)]
    assert "is kept" not in capsys.readouterr().out, "a run that goes on moves nothing"
    assert checkpoint.load(kept).completed
    assert record(tiny_corpus, path, "--resume", "auto") == 0, "nor is the other one lost"
    assert checkpoint.load(path).flags["seed"] == 3


def test_a_run_that_goes_on_from_a_copy_of_its_state_keeps_what_its_file_has(stopped, record, tiny_corpus, tmp_path):
    copy_of_state = tmp_path / "copy.state"
    copy_of_state.write_bytes(resume.state_path(stopped).read_bytes())
    assert record(tiny_corpus, stopped, "--resume", "auto", stop_at=2 * STEPS + 1) == 143
    assert record(tiny_corpus, stopped, "--resume", str(copy_of_state), stop_at=STEPS + 6) == 143
    assert resume.load(resume.state_path(stopped)).step == STEPS + 6
    assert resume.load(tmp_path / "stopped.pth.previous.state").step == 2 * STEPS + 1
    assert (
        checkpoint.load(tmp_path / "stopped.pth.previous").scores["epoch"] == checkpoint.load(stopped).scores["epoch"]
    )


def test_overwriting_is_there_for_whoever_asks(stopped, record, tiny_corpus, capsys):
    assert record(tiny_corpus, stopped, *FLAGS, "--overwrite", "--seed", "5", stop_at=2) == 143
    assert "note: --overwrite: what an earlier run left is removed: stopped.pth" in capsys.readouterr().out
    assert not list(stopped.parent.glob("*previous*"))
    assert resume.load(resume.state_path(stopped)).given["seed"] == 5
    assert "overwrite" not in resume.load(resume.state_path(stopped)).given


def test_a_run_that_saved_nothing_does_not_go_on_as_the_one_before(stopped, record, tiny_corpus, capsys):
    """A restart begins the new run again, and leaves the unfinished one alone."""

    class Killed(BaseException):
        """The process has gone."""

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):

        def kill(*_):
            raise Killed

        monkeypatch.setattr(train_8p, "seed_step", kill)
        record(tiny_corpus, stopped, *FLAGS, "--seed", "5")
    assert record(tiny_corpus, stopped, *FLAGS, "--seed", "5", "--resume", "auto") == 0
    assert f"note: there is no {stopped}.state: a new run begins" in capsys.readouterr().out
    kept = [resume.load(path) for path in stopped.parent.glob("*.previous*.state")]
    assert [state.step for state in kept] == [STEPS + 4]


def test_a_state_that_cannot_be_read_is_kept_too(stopped, record, tiny_corpus):
    path = resume.state_path(stopped)
    path.write_text("no state")
    assert record(tiny_corpus, stopped, *FLAGS) == 0
    assert stopped.with_name(f"{stopped.name}.previous.state").read_text() == "no state"


@pytest.mark.parametrize("name", ["model.state", "model.previous", "model.previous.state", "model.toml"])
def test_a_folder_in_the_place_of_a_state_is_told_before_the_training(tiny_corpus, tmp_path, name):
    (tmp_path / name).mkdir()
    refused("io", resumed, tiny_corpus, tmp_path / "model", *FLAGS, says=str(tmp_path / name))


def test_what_was_saved_is_told_where_the_last_saving_failed(record, tiny_corpus, tmp_path, capsys, monkeypatch):
    write = sealed.write

    def full_later(path, content, **options):
        if str(path).endswith(resume.SUFFIX) and content["step"] > STEPS:
            raise OSError(28, "No space left on device")
        write(path, content, **options)

    monkeypatch.setattr(sealed, "write", full_later)
    assert record(tiny_corpus, tmp_path / "a", *FLAGS, stop_at=STEPS + 2) == 143
    assert f"stopped by SIGTERM: step {STEPS} is saved; to go on, add --resume auto" in capsys.readouterr().err


def test_a_restarted_rank_goes_on_from_what_the_run_has_saved_since(
    stopped, record, tiny_corpus, tmp_path, monkeypatch
):
    """torchrun starts it with the same flags again: `--resume FILE` is where the run began, not where it stands."""
    first = tmp_path / "first.state"
    first.write_bytes(resume.state_path(stopped).read_bytes())
    flags = ["--resume", str(first)]
    assert record(tiny_corpus, stopped, *flags, stop_at=2 * STEPS + 1) == 143
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert record(tiny_corpus, stopped, *flags) == 0
    assert sorted(record.hashes) == [2], "the last epoch alone"


def test_ranks_with_different_states_do_not_begin(stopped, tiny_corpus, monkeypatch):
    monkeypatch.setattr(train_8p.World, "agrees_on", lambda self, number: False)
    says = ["the ranks have different states", "rank 0", "give each node the same file"]
    refused("checkpoint", resumed, tiny_corpus, stopped, "--resume", "auto", says=says)


def test_the_state_is_saved_at_the_interval(record, tiny_corpus, tmp_path, capsys):
    assert record(tiny_corpus, tmp_path / "a.pth", *FLAGS, "--save-every", "1e-9") == 0
    saved = re.findall(r"^state: step (\d+) is saved in .*a\.pth\.state$", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step in saved][:STEPS] == list(range(1, STEPS + 1))


def test_a_full_disk_does_not_end_the_training(record, straight, tiny_corpus, tmp_path, capsys, monkeypatch):
    """Row 11, for the state: the training goes on, and says that it could not save."""
    hashes, lines = straight()
    write = sealed.write

    def full(path, content, **options):
        if str(path).endswith(resume.SUFFIX):
            raise OSError(28, "No space left on device")
        write(path, content, **options)

    monkeypatch.setattr(sealed, "write", full)
    path = tmp_path / "a.pth"
    assert record(tiny_corpus, path, *FLAGS, "--save-every", "1e-9") == 0
    out = capsys.readouterr().out
    assert f"warning: cannot save the run's state in {path}.state: No space left on device" in out
    assert (record.hashes, told(out)) == (hashes, lines)
