"""What a run leaves for programs: metrics.jsonl, TensorBoard's events, a profile, and a picture."""

import json
import os
import resource
import subprocess
import sys

import train_8p
from bench import logs
from nmt import curves, jsonlines, keeping, profiling, record, resume
from nmt.errors import run_main

import pytest
from conftest import REPOSITORY, SMALL, refused, write_corpus
from test_resume import Recorder

pytestmark = pytest.mark.usefixtures("no_launcher")
FLAGS = [*SMALL, "--epochs", "2", "-b", "4", "-p", "5", "--beam-size", "2"]  # 16 steps an epoch
PNG = b"\x89PNG\r\n\x1a\n"


def strict(path) -> list[dict]:
    """The objects of a file of JSON lines, which must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def of_kind(entries, kind):
    return [entry for entry in entries if entry["kind"] == kind]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder of a run that was asked for everything, and its log."""
    folder = tmp_path_factory.mktemp("left")
    corpus = write_corpus(folder / "corpus", 64)
    command = [
        sys.executable,
        str(REPOSITORY / "train_8p.py"),
        *FLAGS,
        "--data-dir",
        str(corpus),
        "--ckptpath",
        "model",
    ]
    command += ["--record", "the/record", "--tensorboard", "board", "--profile", "profile"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ---------------------------------------------------------------- metrics.jsonl


def test_each_step_line_is_an_object_with_the_same_figures(left):
    folder, out = left
    lines, entries = list(logs.STEP.finditer(out)), of_kind(strict(folder / "model.metrics.jsonl"), "step")
    assert len(lines) == len(entries) == 8
    for line, entry in zip(lines, entries, strict=True):
        assert (int(line["epoch"]) + 1, int(line["step"])) == (entry["epoch"], entry["epoch_step"])
        assert (f"{entry['loss']:.4e}", f"{entry['mean_loss']:.4e}") == (line["loss"], line["mean_loss"])
        assert f"{entry['seconds']:.3f}" == line["seconds"]
        assert entry["step"] == 16 * int(line["epoch"]) + int(line["step"])
        assert entry["pairs_per_second"] == pytest.approx(4 / entry["seconds"], rel=0.3)
        assert entry["time"].endswith("Z")
        assert entry["loss_scale"] is None
    assert entries[-1]["learning_rate"] < entries[0]["learning_rate"]


def test_validations_and_scores_are_those_of_the_log(left):
    folder, out = left
    entries, log = strict(folder / "model.metrics.jsonl"), logs.parse(out)
    assert [f"{entry['pairs_per_second']:.3f}" for entry in of_kind(entries, "epoch")] == logs.RATE.findall(out)
    found = of_kind(entries, "validation")
    for entry, line, rate in zip(found, logs.VALIDATION.finditer(out), logs.RATE.findall(out), strict=True):
        assert (entry["epoch"], entry["step"]) == (int(line["number"]), 16 * int(line["number"]))
        assert f"{entry['pairs_per_second']:.3f}" == rate
        for name in ("train_loss", "loss", "free_running_loss", "bleu"):
            assert f"{entry[name]:.4f}" == line[name]
        assert f"{entry['perplexity']:.2f}" == line["perplexity"]
        assert f"learning rate {entry['learning_rate']:.2e}" in line.group()
    assert sum(entry["is_best"] for entry in found) == out.count("\nsaved: ")
    (test,) = of_kind(entries, "test")
    for name, printed in (("bleu", "BLEU score"), ("sacrebleu", "sacreBLEU"), ("chrf", "chrF")):
        assert f"{test[name]:.4f}" == log.final[printed]
    assert test["greedy_bleu"] == pytest.approx(log.bleus("greedy")[0], abs=1e-4)
    assert entries[-1] is test


def test_the_first_object_says_what_the_line_of_the_run_says(left):
    folder, out = left
    about, facts = strict(folder / "model.metrics.jsonl")[0], logs.parse(out).facts
    assert about["kind"] == "run"
    assert facts == {name: f"{about[name]:g}" if name == "batch_per_device" else str(about[name]) for name in facts}
    assert f"model: {about['parameters']:,} parameters" in out


def test_the_folder_of_record_has_the_same_and_a_picture(left):
    folder, _ = left
    assert (folder / "the/record/metrics.jsonl").read_bytes() == (folder / "model.metrics.jsonl").read_bytes()
    for path in (folder / "model.curves.png", folder / "the/record/curves.png"):
        assert path.read_bytes().startswith(PNG)


def without_time(entries):
    """What does not depend on the clock, or on the threads that this process has."""
    clock = ("time", "run", "seconds", "data_seconds", "pairs_per_second", "device_name")
    return [{name: value for name, value in entry.items() if name not in clock} for entry in entries]


@pytest.mark.parametrize("stop_at", [16, pytest.param(21, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_has_each_step_once(monkeypatch, left, tiny_corpus, tmp_path, capsys, stop_at):
    """Steps that are done again replace those of the time after the state, and a torn line goes."""
    run, path = Recorder(monkeypatch), tmp_path / "model"
    flags = [*FLAGS, "--tensorboard", str(tmp_path / "board")]
    assert run(tiny_corpus, path, *flags, stop_at=stop_at) == 143
    metrics = tmp_path / "model.metrics.jsonl"
    again = strict(left[0] / "model.metrics.jsonl")
    steps = [entry for entry in of_kind(again, "step") if entry["step"] > stop_at]
    with metrics.open("a") as file:  # as a run that was killed later has left it
        file.write("".join(f"{json.dumps(entry)}\n" for entry in steps[:2]) + '{"kind": "step", "step": 1')
    assert run(tiny_corpus, path, *flags, "--resume", "auto", "--record", str(tmp_path / "later")) == 0
    entries = strict(metrics)
    (resumed,) = of_kind(entries, "resumed")
    assert resumed["steps_done"] == stop_at
    assert without_time(entry for entry in entries if entry["kind"] != "resumed") == without_time(again)
    assert strict(tmp_path / "later" / "metrics.jsonl") == entries, "a folder that is new gets what was before"
    for name in ("train", "validation"):
        ours, theirs = board(tmp_path / "board" / name), board(left[0] / "board" / name)
        assert [(event.step, event.value) for event in ours.Scalars("loss")] == [
            (event.step, event.value) for event in theirs.Scalars("loss")
        ]


def test_another_run_moves_what_is_in_the_folder_aside(tiny_corpus, tmp_path, capsys):
    arguments = [*SMALL, "--data-dir", str(tiny_corpus), "--record", str(tmp_path / "record"), "--performance"]
    for _ in range(2):
        assert run_main(train_8p.main, arguments) == 0
    names = {path.name for path in (tmp_path / "record").iterdir()}
    assert names == {"metrics.jsonl", "metrics.previous.jsonl", "curves.png", "curves.previous.png"}
    runs = {strict(tmp_path / "record" / name)[0]["run"] for name in names if name.endswith(".jsonl")}
    assert len(runs) == 2


def test_a_performance_run_leaves_its_figures_in_the_folder_alone(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(train_8p.main, [*SMALL, "--data-dir", str(tiny_corpus), "--performance", "--record", "record"]) == 0
    assert "to translate" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "record"}
    entries = strict(tmp_path / "record" / "metrics.jsonl")
    assert [entry["kind"] for entry in entries] == ["run", "step", "step", "step", "epoch"]
    assert (tmp_path / "record" / "curves.png").read_bytes().startswith(PNG)


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    file = record.MetricsFile(tmp_path / "metrics", print)
    record.Record([file]).add("step", 1, {"loss": float("nan"), "all": [float("inf"), 1.0]})
    (entry,) = strict(tmp_path / "metrics")
    assert (entry["loss"], entry["all"]) == (None, [None, 1.0])


def test_a_disk_that_is_full_costs_lines_and_one_warning(tmp_path):
    """No line is torn. When there is room again, the lines go on."""
    path, said = tmp_path / "metrics", []
    file = record.MetricsFile(path, said.append)
    line = len(jsonlines.as_line({"step": 0}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * line + 3, before[1]))
        for step in range(4):
            file.write({"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write({"step": 4})
    assert strict(path) == [{"step": 0}, {"step": 1}, {"step": 4}]
    assert said == [f"warning: cannot write the figures to {path}: File too large"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_ends_no_run(tiny_corpus, tmp_path, capsys, monkeypatch):
    begin = record.MetricsFile.__init__

    def on_a_full_disk(self, path, log):
        begin(self, path, log)
        self._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(record.MetricsFile, "__init__", on_a_full_disk)
    arguments = ["--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model"), "--tensorboard"]
    assert run_main(train_8p.main, [*FLAGS, *arguments, str(tmp_path / "board")]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: cannot write the figures") == 2, "once in the training, once at the scores"
    assert "BLEU score = " in out


def test_a_folder_that_cannot_be_used_is_told_before_anything_starts(tiny_corpus, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--record", "--tensorboard", "--profile"):
        arguments = [*FLAGS, "--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model"), flag]
        assert f"{flag} {tmp_path}/file" in refused("io", train_8p.main, [*arguments, str(tmp_path / "file")])
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "file"}


# ---------------------------------------------------------------- TensorBoard


def board(folder):
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_reads_the_figures_of_the_log(left):
    folder, out = left
    steps = [(16 * int(line["epoch"]) + int(line["step"]), line["loss"]) for line in logs.STEP.finditer(out)]
    train = board(folder / "board" / "train")
    assert [(event.step, f"{event.value:.4e}") for event in train.Scalars("loss")] == steps
    assert set(train.Tags()["scalars"]) >= {"learning_rate", "pairs_per_second", "mean_loss"}
    validation, lines = board(folder / "board" / "validation"), list(logs.VALIDATION.finditer(out))
    for name, digits in (("loss", 4), ("free_running_loss", 4), ("bleu", 4), ("perplexity", 2)):
        values = [(event.step, f"{event.value:.{digits}f}") for event in validation.Scalars(name)]
        assert values == [(16 * int(line["number"]), line[name]) for line in lines]
    (bleu,) = board(folder / "board" / "test").Scalars("bleu")
    assert f"{bleu.value:.4f}" == logs.parse(out).final["BLEU score"]


def test_tensorboard_shows_the_sample_translations(left):
    folder, out = left
    validation = board(folder / "board" / "validation")
    for number in (1, 2):
        texts = validation.Tensors(f"translation {number}/text_summary")
        shown = [event.tensor_proto.string_val[0].decode().splitlines() for event in texts]
        printed = [line for line in out.splitlines() if line.startswith(("  source ", "  reference ", "  model "))]
        expected = [printed[start : start + 3] for start in range(3 * (number - 1), len(printed), 6)]
        assert [[line.split() for line in text] for text in shown] == [
            [line.split() for line in text] for text in expected
        ]


def test_tensorboard_that_is_not_installed_is_told_before_anything_starts(tiny_corpus, tmp_path, monkeypatch):
    version = record.not_installed.__globals__["importlib"].metadata.version

    def not_tensorboard(name):
        if name == "tensorboard":
            raise record.not_installed.__globals__["importlib"].metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", not_tensorboard)
    arguments = [*FLAGS, "--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model")]
    said = refused("usage", train_8p.main, [*arguments, "--tensorboard", str(tmp_path / "board")])
    assert "not installed: tensorboard" in said
    assert "requirements-plots.txt" in said
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


# ---------------------------------------------------------------- curves


def test_a_run_starts_without_what_it_draws_with():
    """They are slow to import."""
    program = "import sys, train_8p; print([name for name in ('matplotlib', 'tensorboard') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_picture_shows_the_figures_of_the_run(left):
    from matplotlib.figure import Figure

    entries, figure = strict(left[0] / "model.metrics.jsonl"), Figure()
    curves.draw(entries, figure)
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(titles) == {"loss", "perplexity", "BLEU", "learning rate", "speed"}
    assert all(axes.get_xlabel() == "epochs" and axes.get_ylabel() for axes in titles.values())
    drawn = {line.get_label(): list(line.get_ydata()) for line in titles["loss"].get_lines()}
    assert drawn["training"] == [entry["loss"] for entry in of_kind(entries, "step")]
    assert drawn["validation"] == [entry["loss"] for entry in of_kind(entries, "validation")]
    assert list(titles["BLEU"].get_lines()[0].get_xdata()) == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_no_picture_is_one_note(left, tmp_path, monkeypatch, fails):
    """A picture never loses a run."""
    said = []
    if fails:
        monkeypatch.setattr(curves, "draw", lambda *_: 1 / 0)
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves.draw_run(left[0] / "model.metrics.jsonl", [tmp_path / "curves.png"], said.append)
    (note,) = said
    assert note.startswith("note: no curves.png: ")
    assert ("ZeroDivisionError" if fails else "matplotlib is not installed") in note
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the profile

# The fields that the Trace Event Format asks for, by phase. (Google, "Trace Event Format", 2016: the document that
# Chrome, Perfetto and TensorBoard's profiler go by.)
NUMBER = (int, float)
PHASES = {
    "X": {"name": str, "ts": NUMBER, "dur": NUMBER},
    "B": {"name": str, "ts": NUMBER},
    "E": {"ts": NUMBER},
    "i": {"name": str, "ts": NUMBER},
    "C": {"name": str, "ts": NUMBER, "args": dict},
    "M": {"name": str, "args": dict},
    "s": {"id": (int, str), "ts": NUMBER},
    "t": {"id": (int, str), "ts": NUMBER},
    "f": {"id": (int, str), "ts": NUMBER},
}


def check_trace(trace) -> list[dict]:
    """Asserts that a trace is one that the format allows. Returns its complete events."""
    assert isinstance(trace, dict)
    assert isinstance(trace["traceEvents"], list)
    assert trace.get("displayTimeUnit", "ms") in ("ms", "ns")
    for event in trace["traceEvents"]:
        for name, kind in ({"ph": str, "pid": (int, str), "tid": (int, str)} | PHASES[event["ph"]]).items():
            if event["ph"] == "M" and name == "tid":
                continue
            assert isinstance(event[name], kind), event
        assert event.get("dur", 0) >= 0
        assert event.get("s", "g") in ("g", "p", "t")
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_the_validator_finds_faults():
    """A test of the test."""
    event = {"ph": "X", "name": "a", "ts": 1.0, "dur": 2.0, "pid": 1, "tid": 1}
    check_trace({"traceEvents": [event]})
    for change in ({"ts": "1"}, {"dur": -1}, {"ph": "?"}, {"name": None}, {"pid": None}):
        with pytest.raises((AssertionError, KeyError)):
            check_trace({"traceEvents": [event | change]})


def test_the_profile_is_a_trace_of_five_steps_and_a_table(left):
    folder, out = left
    (path,) = (folder / "profile").glob("*.pt.trace.json")  # TensorBoard's profiler looks for this ending
    events = check_trace(json.loads(path.read_text()))
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert len(steps) == profiling.LAST - profiling.FIRST + 1
    assert len([event for event in events if event["name"] == "aten::mm"]) >= len(steps)
    (table,) = (folder / "profile").glob("*.operators.txt")
    assert table.read_text().startswith("steps 6 to 10\n")
    assert "aten::mm" in table.read_text()
    assert f"profile: steps 6 to 10 are in profile/{path.name}" in out
    assert train_8p.PROFILED == (profiling.FIRST, profiling.LAST)


@pytest.mark.parametrize(
    ("steps", "says"),
    [(3, "note: there is no profile"), (5, "note: there is no profile"), (8, "profile: steps 6 to 8 are in ")],
)
def test_a_run_of_few_steps_has_a_profile_of_those_or_says_so(tmp_path, steps, says):
    said = []
    profile = profiling.StepProfile(str(tmp_path), "cpu", said.append)
    for _ in range(steps):
        profile.step_done()
    profile.close()
    assert len(said) == 1
    assert said[0].startswith(says)
    assert len(list(tmp_path.iterdir())) == (0 if steps < profiling.FIRST else 2)


def test_on_an_npu_the_profile_says_what_it_does_not_see(tmp_path):
    said = []
    profiling.StepProfile(str(tmp_path), "npu", said.append).close()
    assert "torch_npu.profiler" in said[0]


# ---------------------------------------------------------------- several ranks


@pytest.mark.slow
def test_rank_0_alone_writes(tiny_corpus, tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *FLAGS, "--data-dir", str(tiny_corpus)]
    command += ["--multiprocessing-distributed", "--device-list", "0,1", "--record", "record", "--tensorboard", "board"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    entries = strict(tmp_path / "record" / "metrics.jsonl")
    kinds = [entry["kind"] for entry in entries]
    assert [kinds.count(kind) for kind in ("run", "step", "epoch", "validation", "test")] == [1, 8, 2, 2, 1]
    assert len(list((tmp_path / "board" / "train").iterdir())) == 1


def test_no_name_of_a_runs_files_is_a_part_of_another():
    assert resume.SUFFIX not in keeping.METRICS


def test_the_folder_of_a_living_run_is_not_taken(tiny_corpus, tmp_path, capsys):
    arguments = [*SMALL, "--data-dir", str(tiny_corpus), "--performance", "--record", str(tmp_path / "shared")]
    (tmp_path / "shared").mkdir()
    with record.claimed(str(tmp_path / "shared")):
        assert run_main(train_8p.main, arguments) == 5
    assert capsys.readouterr().err == (
        f"error[io]: in use by pid {os.getpid()}; {tmp_path}/shared; "
        "wait for it to end, or give --record another place\n"
    )


def test_scores_that_cannot_be_recorded_are_a_warning(tmp_path):
    lines = []
    record.add_scores([tmp_path / "gone" / "metrics.jsonl"], None, {"bleu": 1.0}, lines.append)
    (line,) = lines
    assert line.startswith("warning: cannot write the figures of the run: ")
