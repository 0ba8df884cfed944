"""bench/check_device.py: a device that is wrong, slow, lost or hung is found and named, and a good one passes.

The faults are planted in the simulated NPU (npu_sim/README.md) by variables of its environment.
"""

import datetime
import doctest
import json
import os
import re
import subprocess
import sys

from bench import accept, check_device, device_checks, logs
from bench.check_device import FAIL, PASS, SKIPPED, Failure, Row, Settings
from bench.device_checks import Check
from nmt import precision
from nmt.checkout import commit_of
from nmt.distributed import World
from nmt.errors import UserError

import harness
import pytest
import torch
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "test" / "check_device.sh"
DEADLINE = 500  # a clean machine takes 15
QUICK = ["--quick", "--tiny"]
ROW = re.compile(r"^(pass|FAIL|skipped) +(\S.*?)(  .*)?$", re.MULTILINE)


def outcomes(out: str) -> dict[str, str]:
    """Check → pass, FAIL or skipped, of a page."""
    return {match[2]: match[1] for match in ROW.finditer(out)}


def failed(out: str) -> list[str]:
    return [check for check, outcome in outcomes(out).items() if outcome == FAIL]


def on_npus(*arguments: object, folder, devices: int = 2, **faults: str) -> subprocess.CompletedProcess:
    """Runs the script on simulated NPUs."""
    extra = {"NPU_SIM_DEVICES": str(devices), "PYTHON": sys.executable, **faults}
    return harness.run("bash", SCRIPT, *arguments, f"--output={folder}", deadline=DEADLINE, **extra)


@pytest.mark.parametrize("module", [check_device, device_checks], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- through the script


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """A quick run on the CPU from another folder: that folder, and what it printed."""
    here = tmp_path_factory.mktemp("cpu")
    command = ["bash", SCRIPT, *QUICK, "--device", "cpu", "--processes=1", "--output", "found"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return here, done.stdout


def test_a_good_cpu_passes_in_every_precision(on_cpu):
    of_page = outcomes(on_cpu[1])
    assert failed(on_cpu[1]) == []
    for name in ("embedding", "matrix product", "GRU", "softmax and cross entropy", "output layer with its loss"):
        assert of_page[f"{name}, float32"] == of_page[f"{name}, bfloat16"] == PASS
    for name in ("float32", "bfloat16 O1", "bfloat16 O2"):
        assert of_page[f"ten training steps, {name}"] == PASS
    assert of_page["all_reduce"] == of_page["training sample/ on one device"] == SKIPPED
    assert re.fullmatch(r"check_device: PASS: 1 x cpu, \d+ passed, \d+ skipped, 0 failed", on_cpu[1].splitlines()[-1])


def test_the_json_file_says_what_the_page_says_and_no_name_of_the_machine(on_cpu):
    here, out = on_cpu
    assert "  JSON:        found/result.json\n" in out
    result = json.loads((here / "found" / "result.json").read_text())
    assert result["verdict"] == PASS
    assert {row["check"]: row["outcome"] for row in result["checks"]} == outcomes(out)
    assert all(f"  {name + ':':<13}{value}\n" in out for name, value in result["about"].items())
    assert (
        result["about"]["command"] == "bash test/check_device.sh --quick --tiny --device cpu --processes=1 --output DIR"
    )
    assert f"torch {torch.__version__}" in result["about"]["versions"]
    assert result["about"]["commit"] == commit_of(REPOSITORY)
    for secret in (str(here), str(REPOSITORY), os.uname().nodename):
        assert secret not in json.dumps(result)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prosesses=2"], "error[usage]: unrecognized arguments: --prosesses=2"),
        (["--conda_name"], "error[usage]: --conda_name has no value"),
        (["--conda-name", "--quick"], "error[usage]: --conda-name has no value"),
        (["--conda_name="], "error[usage]: --conda_name has an empty value"),
        (["--conda-name", ""], "error[usage]: --conda_name has an empty value"),
        (["--conda_name=a", "--conda-name", "b"], "error[usage]: --conda_name is given twice, a and b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_is_wrong_ends_the_script_before_it_writes(tmp_path, flags, said):
    command = ["bash", SCRIPT, f"--output={tmp_path / 'found'}", *flags]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said), done.stderr
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("settings", [Settings(device_list=[0], processes=2), Settings(processes=2)])
def test_processes_are_those_of_a_cpu_without_a_list(settings):
    device_type = "cpu" if settings.device_list else "cuda"
    with pytest.raises(UserError, match="--processes beside"):
        check_device.indices_of(settings, device_type)


def test_a_device_that_is_absent_is_refused():
    with pytest.raises(UserError, match="no cpu 9999 here; --device-list"):
        check_device.indices_of(Settings(device_list=[0, 9999]), "cpu")


def test_the_page_says_why_it_checks_no_npu(monkeypatch):
    now = datetime.datetime(2026, 1, 2, 3, 4)
    assert next(iter(check_device.heading("cpu", [0, 1], now))) == "Checking 2 x cpu; 2026-01-02 03:04 UTC"
    monkeypatch.setattr(check_device.devices, "passed_over", lambda device_type: "ImportError: libhccl.so")
    assert next(iter(check_device.heading("cpu", [0], now))).endswith(
        "there is no NPU to check: ImportError: libhccl.so"
    )


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="is there already"):
        check_device.new_folder(Settings(output=str(tmp_path)))


def test_the_help_of_the_script_names_its_flags_and_exit_codes():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, "--help"], env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0
    for word in ("--device {auto,npu,cuda,cpu}", "--quick", "--deadline", "--conda_name", "8 one did not"):
        assert word in done.stdout


# ---------------------------------------------------------------- planted faults


@pytest.fixture(scope="module")
def simulation():
    harness.ensure_built()


@pytest.fixture(scope="module")
def faulty(simulation, tmp_path_factory):
    """Two NPUs with three faults: the GRU of npu:1 is wrong, npu:0 is slow, and sums lose rank 1."""
    folder = tmp_path_factory.mktemp("faulty") / "found"
    faults = {"NPU_SIM_WRONG": "aten::gru@1", "NPU_SIM_SLOW": "aten::mm@0", "NPU_SIM_LOST_RANK": "1"}
    done = on_npus(*QUICK, folder=folder, **faults)
    return done, json.loads((folder / "result.json").read_text())


def test_a_wrong_kernel_is_named_and_no_other_one(faulty):
    found = [check for check in failed(faulty[0].stdout) if check.endswith((", float32", ", float16"))]
    assert found[:2] == ["GRU, float32", "GRU, float16"]
    kernels = [f"{name}, float32" for name in device_checks.OPERATORS if name != "GRU"]
    assert all(outcomes(faulty[0].stdout)[name] == PASS for name in kernels)
    assert re.search(r"^FAIL +GRU, float32 +npu:1: error 5.0e-02 ", faulty[0].stdout, re.MULTILINE)


def test_the_steps_with_a_wrong_kernel_are_not_the_cpus(faulty):
    assert [check for check in failed(faulty[0].stdout) if "steps" in check] == [
        f"ten training steps, {name}" for name in ("float32", "float16 O1", "float16 O2")
    ]
    row = next(row for row in faulty[1]["checks"] if row["check"] == "ten training steps, float32")
    assert row["figures"]["npu:0"] < device_checks.STEP_ERROR["float32"] < row["figures"]["npu:1"]


def test_a_slow_device_is_named(faulty):
    rows = [row for row in faulty[1]["checks"] if row["check"].startswith("speed of products")]
    assert [row["outcome"] for row in rows] == [FAIL, FAIL]
    assert all(row["measured"].startswith("npu:0: ") for row in rows)


def test_a_rank_that_a_collective_loses_is_named(faulty):
    row = next(row for row in faulty[1]["checks"] if row["check"] == "all_reduce")
    assert (row["outcome"], row["measured"]) == (FAIL, "the sum lacks rank 1 (npu:0, npu:1)")
    assert [outcomes(faulty[0].stdout)[name] for name in ("broadcast", "all_gather")] == [PASS, PASS]


def test_faults_give_exit_code_8_and_the_last_line_names_them(faulty):
    done, result = faulty
    assert done.returncode == check_device.CHECK_FAILED == 8
    assert result["verdict"] == FAIL
    last = done.stdout.splitlines()[-1]
    assert last.startswith("check_device: FAIL: 2 x npu, ")
    assert last.endswith("; ".join([f"{len(result['failed'])} failed", *result["failed"]]))
    assert result["failed"] == failed(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_good_npus_pass(simulation, tmp_path, devices):
    done = on_npus(*QUICK, folder=tmp_path / "found", devices=devices)
    assert (done.returncode, failed(done.stdout)) == (0, []), done.stdout + done.stderr
    of_page = outcomes(done.stdout)
    assert of_page["all_reduce"] == (SKIPPED if devices == 1 else PASS)
    assert of_page["ten training steps, float16 O2"] == PASS


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, names",
    [
        ("aten::mm", "matrix product"),
        ("aten::argmax", "argmax"),
        ("aten::_log_softmax", "softmax and cross entropy"),
        ("aten::embedding_dense_backward", "embedding"),
    ],
)
def test_each_wrong_kernel_is_named(simulation, tmp_path, wrong, names):
    done = on_npus(*QUICK, folder=tmp_path / "found", devices=1, NPU_SIM_WRONG=f"{wrong}@0")
    assert done.returncode == 8
    assert f"{names}, float32" in failed(done.stdout)


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_collective_is_named_within_the_deadline(simulation, tmp_path):
    done = on_npus(*QUICK, "--deadline=20", folder=tmp_path / "found", NPU_SIM_HUNG_RANK="1")
    assert done.returncode == 8
    assert failed(done.stdout) == ["all_reduce"]
    assert re.search(r"rank 1 \(npu:1\) made no progress for \d+ s", done.stdout)
    assert outcomes(done.stdout)["broadcast"] == SKIPPED


@pytest.mark.slow
def test_training_on_one_device_and_on_all_is_scored(simulation, tmp_path):
    done = on_npus("--tiny", "--epochs=1", folder=tmp_path / "found")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found" / "result.json").read_text())
    rows = [row for row in result["checks"] if row["check"].startswith("training")]
    assert [row["outcome"] for row in rows] == [PASS, PASS]
    assert all(set(row["figures"]) == {"BLEU", "pairs/s", "seconds"} for row in rows)
    several = logs.parse((tmp_path / "found" / "train-all.log").read_text())
    assert (several.facts["processes"], several.facts["precision"]) == ("2", "float16/O2")
    assert not list((tmp_path / "found").glob("*.pth.tar*"))


# ---------------------------------------------------------------- the checks, in this process


@pytest.mark.parametrize("name", device_checks.OPERATORS)
def test_an_operator_of_this_cpu_is_within_its_limit_and_a_wrong_one_is_not(name, monkeypatch):
    place = device_checks.Place(World(), device_checks.TINY, REPOSITORY / "sample")
    good = device_checks.operator_error(place, name, torch.float32)
    assert good <= device_checks.OPERATOR_ERROR["float32"] / 50
    operator = device_checks.OPERATORS[name]

    def slightly_wrong(**inputs):
        return {
            key: value + 1 if name == "argmax" else value * 1.001 for key, value in operator.compute(**inputs).items()
        }

    changed = device_checks.Operator(operator.inputs, slightly_wrong, operator.reference or operator.compute)
    monkeypatch.setitem(device_checks.OPERATORS, name, changed)
    assert device_checks.operator_error(place, name, torch.float32) > device_checks.OPERATOR_ERROR["float32"]


def test_an_operator_that_gives_no_number_is_told(monkeypatch):
    place = device_checks.Place(World(), device_checks.TINY, REPOSITORY / "sample")
    operator = device_checks.OPERATORS["argmax"]
    for result, said in ((torch.full((1,), torch.nan), "has shape"), (torch.full((192,), torch.nan), "is not finite")):
        changed = device_checks.Operator(operator.inputs, lambda logits, r=result: {"forward": r}, operator.compute)
        monkeypatch.setitem(device_checks.OPERATORS, "argmax", changed)
        with pytest.raises(device_checks.Wrong, match=f"forward {said}"):
            device_checks.operator_error(place, "argmax", torch.float32)


def test_a_precision_that_a_device_lacks_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(precision, "import_amp", lambda: (None, precision.NO_APEX))
    table = {check.name: check for check in device_checks.checks("npu", [0, 1])}
    assert table["ten training steps, bfloat16 O2"].skipped == "the NPU's GRU computes in float16 and float32 only"
    assert table["ten training steps, float16 O2"].skipped == ""
    assert "GRU, float16" in table
    assert "GRU, bfloat16" not in table


# ---------------------------------------------------------------- the rows


SPEED = Check("speed of memory", unit="B/s", compared=True)
SUM = Check("all_reduce", together=True)
ERROR = Check("GRU, float32", unit="error", most=1e-4)


def rows(table, found, failure=None, device_type="npu"):
    indices = range(len(found))
    return {row.check: row for row in check_device.rows_of(table, found, failure, device_type, indices)}


def lines(*findings: dict) -> list[dict]:
    return [{"begins": "the preparation of the device"}, {"device": "Ascend910"}, *findings]


def test_one_device_of_eight_below_half_the_others_median_fails():
    speeds = [100e9, 104e9, 98e9, 49e9, 101e9, 100e9, 99e9, 51e9]
    found = [lines({"check": SPEED.name, "value": speed}) for speed in speeds]
    row = rows([SPEED], found)[SPEED.name]
    assert row.outcome == FAIL
    assert row.measured == "npu:3: 49 GB/s; the others' median is 100 GB/s"
    assert rows([SPEED], found[:3])[SPEED.name].outcome == PASS


def test_speeds_are_only_reported_where_there_is_nothing_to_compare():
    found = [lines({"check": SPEED.name, "value": speed}) for speed in (100e9, 10e9)]
    for few, device_type in ((found, "cpu"), (found[:1], "npu")):
        row = rows([SPEED], few, device_type=device_type)[SPEED.name]
        assert (row.outcome, row.expected) == (PASS, "reported only")


def test_a_rank_that_died_is_named_in_its_check_and_what_comes_after_it_is_skipped():
    found = [
        lines({"begins": ERROR.name}, {"check": ERROR.name, "value": 1e-6}, {"begins": SUM.name}),
        lines({"begins": ERROR.name}),
    ]
    error = UserError("distributed", "rank 1 was killed by signal 11", "process 1 of this node", "see above")
    failure = check_device.failure_of(error, found)
    assert failure == Failure(1, ERROR.name, "was killed by signal 11")
    of_page = rows([ERROR, SUM], found, failure)
    assert of_page[ERROR.name][1:3] == (FAIL, "rank 1 (npu:1) was killed by signal 11")
    assert of_page[SUM.name][1:3] == (SKIPPED, "rank 1 had failed before")


def test_a_rank_that_never_starts_fails_the_start():
    found = [lines(), []]
    error = UserError("distributed", "rank 1 ended early with exit code 1", "process 1", "see above")
    of_page = rows([ERROR], found, check_device.failure_of(error, found))
    assert of_page["the devices start"][1:3] == (FAIL, "rank 1 (npu:1) ended early with exit code 1")
    assert of_page[ERROR.name].outcome == SKIPPED


LOG = (REPOSITORY / "results" / "sample-train_full_1p-cpu.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("bleu, outcome", [("83.2408", PASS), ("42.5000", FAIL), ("99.0000", FAIL)])
def test_the_bleu_of_a_training_must_lie_in_its_range(bleu, outcome):
    log = LOG.replace("BLEU score = 83.2408", f"BLEU score = {bleu}")
    row = check_device.row_of_training("training", log, 0, 67.0, Settings())
    accepted = accept.expected("sample", "tuned", "float32/O0", 32)
    assert (row.outcome, row.expected) == (outcome, f"BLEU {accepted.bleu.low} to {accepted.bleu.high}")
    assert row.measured.startswith(f"BLEU {float(bleu):.2f}, ")
    assert row.figures["BLEU"] == float(bleu)
    assert check_device.row_of_training("training", log, 0, 67.0, Settings(epochs=3)).outcome == PASS


def test_a_training_that_fails_or_hangs_is_told_by_its_last_error():
    log = "run: device=npu\nerror[distributed]: rank 3 made no progress; process 3; go on\nlast line\n"
    row = check_device.row_of_training("training", log, 6, 9.0, Settings())
    assert row[:2] == ("training", FAIL)
    assert row.measured == "exit code 6: error[distributed]: rank 3 made no progress; process 3; go on"
    hung = check_device.row_of_training("training", "run: device=npu\n", None, 9.0, Settings())
    assert hung.measured == "it printed nothing more and was ended: run: device=npu"


def test_foreign_bytes_in_the_log_of_a_training_cost_nothing(tmp_path, monkeypatch):
    """A driver may print its messages in another encoding."""

    def train(settings, device_type, indices, several, log):
        log.write_bytes(b"\xb3\xff driver\n" + LOG.encode() + b"\xe4\n")
        return 0

    monkeypatch.setattr(check_device, "train", train)
    rows = list(check_device.training(Settings(), "cpu", [0, 1], tmp_path, broken=False))
    assert [row.outcome for row in rows] == [PASS, PASS]


def test_a_training_that_prints_nothing_is_ended(tmp_path, monkeypatch):
    (tmp_path / "train_8p.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(check_device, "ROOT", tmp_path)
    monkeypatch.setattr(check_device, "GRACE", 0.2)
    settings = Settings(deadline=0.1)
    assert check_device.train(settings, "cpu", [0], False, tmp_path / "train-one.log") is None


def test_a_row_with_long_words_keeps_its_columns():
    short, long = (check_device.lines_of(Row("GRU", FAIL, words, "at most 1")) for words in ("bad", "bad " * 30))
    assert len(short) == 1
    assert [line.index("at most 1") for line in (short[0], long[0])] == [short[0].index("at most 1")] * 2
    assert long[1].strip() == ("bad " * 30).strip()
