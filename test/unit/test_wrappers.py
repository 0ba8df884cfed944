"""The shell wrappers: what they pass to train_8p.py, what they write, how they fail.

Most tests run copies of the wrappers beside a stand-in for train_8p.py, which records how it was started and runs a
few lines of the test's own. The last ones run the real program.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import train_8p
from nmt.checkout import commit_of
from nmt.errors import EXIT_CODES

import pytest
from conftest import eventually

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["common.sh", "env_npu.sh"]
FULL = ["train_full_1p.sh", "train_full_8p.sh"]
PERFORMANCE = ["train_performance_1p.sh", "train_performance_8p.sh"]
WRAPPERS = FULL + PERFORMANCE
KEYS = ["data_path", "batch_size", "learning_rate", "epochs", "precision_mode", "device", "device_list", "device_id"]
KEYS += ["recipe", "conda_name", "resume", "restarts", "accept_bleu"]
KEYS += ["profiling", "over_dump", "data_dump_flag", "data_dump_step"]
NETWORK = "GRU_ID0104_for_PyTorch"

STAND_IN = """
import json, os, sys
if sys.argv[1:2] == ["--parse-only"]:
    print(os.environ.get("RUN", "goes on"))
    sys.exit(os.environ.get("REFUSES"))  # nothing, or its one line
record = dict(argv=sys.argv[1:], script=sys.argv[0], cwd=os.getcwd(), env=dict(os.environ), pid=os.getpid())
with open(os.environ["RECORD"], "w") as file:
    json.dump(record, file)
exec(os.environ["BEHAVIOUR"])
"""


def canned_log(*fps, batch=128, processes=1, bleu="28.0046", precision="bfloat16/O2"):
    lines = ["sample/ is used, as no --data-dir was given"]
    lines.append(
        f"run: device=cpu processes={processes} nodes=1 batch={batch} batch_per_device=99 precision={precision} "
        "recipe=tuned seed=1234 epochs=4 data=0123456789ab commit=0123abc torch=2.13.0"
    )
    lines += ["device: x86_64 CPU, 2 cores", "* CompileTime 0.541"]
    for epoch, value in enumerate(fps):
        for step, loss in ((10, f"{9 - epoch}.2500e+00"), (20, f"{9 - epoch}.1250e+00")):
            lines.append(
                f"[cpu id: 0 ] Epoch: [{epoch}][ {step}/20]\tTime  0.270 ( 0.271)\tData  0.001 ( 0.001)"
                f"\tLoss {loss} (7.7777e+00)"
            )
        lines.append(f"* FPS@all {value}")
    if bleu:
        lines.append(f"BLEU score = {bleu}")
    return "\n".join(lines)


def printing(text):
    return f"print({text!r}, flush=True)"


FULL_RUN = printing(canned_log("300.000", "100.000", "200.000"))


def heed_signals():
    """Undoes what a test run in the background, or under nohup, hands down: signals that are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Repo:
    """A copy of the wrappers in a folder whose name needs quoting, with a stand-in for train_8p.py."""

    def __init__(self, folder):
        self.path = folder / "the repo"
        self.home = folder / "elsewhere"
        self.record = folder / "record.json"
        (self.path / "test").mkdir(parents=True)
        self.home.mkdir()
        for script in [*SCRIPTS, *WRAPPERS, "result.py"]:
            shutil.copy(ROOT / "test" / script, self.path / "test")
        for package in ("nmt", "bench"):
            (self.path / package).symlink_to(ROOT / package)  # result.py stands on them
        (self.path / "train_8p.py").write_text(STAND_IN)

    def environment(self, behaviour, changes):
        env = {
            key: value
            for key, value in os.environ.items()
            if key in ("PATH", "HOME", "LANG", "TMPDIR", "PYENV_ROOT", "PYENV_VERSION")
        }
        env |= {"PYTHON": sys.executable, "RECORD": str(self.record), "BEHAVIOUR": behaviour}
        env |= {"GRU_CANN_INFO": "/nonexistent", "GRU_CANN_ROOT": "/nonexistent"}
        env |= changes
        return {key: value for key, value in env.items() if value is not None}

    def command(self, wrapper, arguments):
        return ["bash", str(self.path / "test" / wrapper), *arguments]

    def run(self, wrapper, *arguments, behaviour=FULL_RUN, cwd=None, command=None, **changes):
        self.record.unlink(missing_ok=True)
        return subprocess.run(
            command or self.command(wrapper, arguments),
            cwd=cwd or self.home,
            env=self.environment(behaviour, changes),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
        )

    @contextlib.contextmanager
    def started(self, wrapper, *arguments, behaviour, **changes):
        """A wrapper in a session of its own whose stand-in is at work: it has printed a line."""
        process = subprocess.Popen(
            self.command(wrapper, arguments),
            cwd=self.home,
            env=self.environment(behaviour, changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )
        try:
            assert process.stdout.readline()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)

    def files(self):
        """The names and contents in the output folder, but for the lock and the runs' own folders."""
        paths = (path for path in self.output().iterdir() if path.name not in (".lock", "runs"))
        return {path.name: path.read_text() for path in paths}

    def runs(self, device_id="0"):
        """The runs' own folders, in their order."""
        return sorted((self.output(device_id) / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def recorded(self):
        return json.loads(self.record.read_text())

    def argv(self):
        """What the stand-in was started with, after the flag that names the run's own folder."""
        own, *argv = self.recorded()["argv"]
        assert own == f"--record={self.runs(self.recorded()['env'].get('ASCEND_DEVICE_ID') or '0')[-1]}"
        return argv

    def output(self, device_id="0"):
        return self.path / "test" / "output" / device_id


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path)


def key_values(path):
    return dict(line.split(" = ", 1) for line in path.read_text().splitlines())


def is_usage_error(done):
    lines = done.stderr.splitlines()
    return done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error[usage]: ") and not done.stdout


def gone(pid):
    # A process whose parent has died and that nobody has waited for is gone too.
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] in ("", "Z")


# Arguments


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_help_is_right_for_each_script(repo, wrapper):
    done = repo.run(wrapper, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    listed = [line.split("=")[0].strip() for line in done.stdout.splitlines() if line.startswith("  --")]
    assert listed == [f"--{key}" for key in KEYS] + ["--help, -h             this text"]
    assert f"bash test/{wrapper} " in done.stdout
    assert f"{NETWORK}_bs<BatchSize>_{'8p' if '8p' in wrapper else '1p'}_{'acc' if wrapper in FULL else 'perf'}" in (
        done.stdout
    )
    assert ("checkpoint" in done.stdout) == (wrapper in FULL)
    if wrapper in FULL:
        tuned, modelzoo = (train_8p.RECIPES[name] for name in ("tuned", "modelzoo"))
        on_sample = train_8p.tuned_batch(4000, 1, 1)
        assert (
            f"tuned {tuned['batch_size']}, on several devices {train_8p.SHARED_BATCH}, on sample/ {on_sample}; "
            f"modelzoo {modelzoo['batch_size']}" in done.stdout
        )
        assert f"tuned: {tuned['lr']:g}, times the root of batch / {tuned['batch_size']} where" in done.stdout
        assert f"the recipe's, {tuned['epochs']}" in done.stdout
    else:
        npu, cpu = (train_8p.PERFORMANCE_BATCH[kind] for kind in ("npu", "cpu"))
        assert train_8p.PERFORMANCE_BATCH["cuda"] == npu
        assert f"{npu} a device on NPU and CUDA, {cpu} a process on CPU" in done.stdout
        assert f"until {train_8p.PERFORMANCE_STEPS} steps are done" in done.stdout
    assert repo.run(wrapper, "--batch_size=3", "-h").stdout == done.stdout
    assert not repo.record.exists()
    assert not repo.output().exists()


@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        ("train_full_1p.sh", ["--amp", "--opt-level=O2"]),
        ("train_full_8p.sh", ["--amp", "--opt-level=O2", "--multiprocessing-distributed", "--max-devices=8"]),
        ("train_performance_1p.sh", ["--amp", "--opt-level=O2", "--performance"]),
        (
            "train_performance_8p.sh",
            ["--amp", "--opt-level=O2", "--multiprocessing-distributed", "--max-devices=8", "--performance"],
        ),
    ],
)
def test_without_arguments_only_the_wrappers_own_flags_are_passed(repo, wrapper, expected):
    assert repo.run(wrapper).returncode == 0
    assert repo.argv() == expected


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("spelling", ["--key=value", "--key value", "--hyphen-key=value"])
def test_each_argument_reaches_its_flag_in_every_spelling(repo, wrapper, spelling):
    values = {"data_path": "d", "batch_size": "64", "learning_rate": "0.5", "epochs": "2"}
    values |= {"precision_mode": "must_keep_origin_dtype", "device": "cpu", "device_list": "3", "recipe": "modelzoo"}
    arguments = []
    for key, value in values.items():
        if "hyphen" in spelling:
            key = key.replace("_", "-")
        arguments += [f"--{key}", value] if " " in spelling else [f"--{key}={value}"]
    assert repo.run(wrapper, *arguments).returncode == 0
    expected = ["--data-dir=d", "--batch-size=64", "--lr=0.5", "--epochs=2", "--device=cpu", "--recipe=modelzoo"]
    expected += ["--opt-level=O0"]
    expected += ["--multiprocessing-distributed"] if "8p" in wrapper else []
    expected += ["--device-list=3"]
    if wrapper in PERFORMANCE:
        expected += ["--performance"]
    assert repo.argv() == expected


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("allow_mix_precision", ["--amp", "--opt-level=O2"]),
        ("amp", ["--amp", "--opt-level=O2"]),
        ("must_keep_origin_dtype", ["--opt-level=O0"]),
    ],
)
def test_precision_mode_chooses_o2_or_fp32(repo, mode, flags):
    assert repo.run("train_full_1p.sh", f"--precision_mode={mode}").returncode == 0
    assert repo.argv() == flags


def test_a_device_list_replaces_the_limit_of_eight(repo):
    assert repo.run("train_full_8p.sh", "--device_list=4,5").returncode == 0
    assert repo.argv()[2:] == ["--multiprocessing-distributed", "--device-list=4,5"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--unknown=1"],
        ["--unknown"],
        ["--batch=3"],
        ["--data_path batch_size=3"],
        ["-b", "3"],
        ["sample"],
        [""],
        ["-"],
        ["--=3"],
        ["--data_path\n=3"],
        ["--DATA_PATH=x"],
        ["--$(touch ran)=3"],
    ],
)
def test_an_unknown_argument_is_an_error_that_lists_those_that_exist(repo, arguments):
    for wrapper in ("train_full_1p.sh", "train_performance_8p.sh"):
        done = repo.run(wrapper, *arguments)
        assert is_usage_error(done)
        assert " ".join(f"--{key}" for key in KEYS) in done.stderr
    assert not repo.record.exists()
    assert not list(repo.home.iterdir())


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_an_empty_and_a_repeated_value_are_errors(repo, key):
    for arguments in (
        [f"--{key}"],
        [f"--{key}", "--recipe=tuned"],
        [f"--{key}", "--", "x"],
        [f"--{key}="],
        [f"--{key}", ""],
        [f"--{key}=1", f"--{key.replace('_', '-')}", "2"],
    ):
        done = repo.run("train_full_1p.sh", *arguments)
        assert is_usage_error(done), arguments
        assert f"--{key}" in done.stderr
    assert not repo.record.exists()


@pytest.mark.parametrize("arguments", [["--precision_mode=O2"], ["--precision_mode", "fp16\n"]])
def test_an_unknown_precision_mode_is_an_error_that_lists_the_modes(repo, arguments):
    done = repo.run("train_full_1p.sh", *arguments)
    assert is_usage_error(done)
    assert "allow_mix_precision, amp, must_keep_origin_dtype" in done.stderr


@pytest.mark.parametrize("wrapper", ["train_full_1p.sh", "train_performance_1p.sh"])
def test_one_device_runs_refuse_a_list_of_devices(repo, wrapper):
    done = repo.run(wrapper, "--device_list=0,1")
    assert is_usage_error(done)
    assert " entry: 0,1; " in done.stderr


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_device_id_numbers_the_output_and_chooses_the_device_of_one_process(repo, wrapper):
    """ASCEND_DEVICE_ID does the same, but on an NPU alone: elsewhere it was always a name for the folder."""
    for arguments, changes, number, flags in (
        (["--device_id=3"], {}, "3", ["--device-id=3"]),
        (["--device-id", "4"], {"ASCEND_DEVICE_ID": "5"}, "4", ["--device-id=4"]),
        ([], {"ASCEND_DEVICE_ID": "6"}, "6", ["--device-id=npu:6"]),
        ([], {"ASCEND_DEVICE_ID": ""}, "0", []),
    ):
        assert repo.run(wrapper, *arguments, **changes).returncode == 0
        found = [flag for flag in repo.argv() if "device-id" in flag]
        assert found == (flags if "1p" in wrapper else [])
        assert (repo.output(number) / f"train_{number}.log").exists()
        assert repo.recorded()["env"].get("ASCEND_DEVICE_ID", "0") == (
            number if arguments or changes["ASCEND_DEVICE_ID"] else ""
        )


@pytest.mark.parametrize("value", ["-1", "a", "0,1", "1.5", "9999999999"])
def test_a_device_id_that_is_no_number_is_an_error(repo, value):
    assert is_usage_error(repo.run("train_full_8p.sh", f"--device_id={value}"))
    assert not (repo.path / "test" / "output").exists()


def test_the_modelzoos_flags_for_dumps_are_taken_and_say_that_they_dump_nothing(repo):
    quiet = ["--over_dump=False", "--data_dump_flag=False", "--data_dump_step=10", "--profiling=False"]
    assert "note: " not in repo.run("train_full_1p.sh", *quiet).stdout
    repo.run("train_full_1p.sh", "--profiling=True")
    assert repo.argv() == [f"--profile={repo.runs()[-1]}/profile", "--amp", "--opt-level=O2"]
    repo.run("train_full_1p.sh", *quiet)
    assert repo.argv() == ["--amp", "--opt-level=O2"]
    for arguments, named in (
        (["--over_dump=True"], "--over_dump"),
        (["--data_dump_flag=True", "--data_dump_step=0|5|10"], "--data_dump_flag"),
        (["--data_dump_flag", "True", "--over_dump", "True"], "--over_dump and --data_dump_flag"),
    ):
        done = repo.run("train_performance_1p.sh", *arguments)
        assert done.stdout.startswith(f"note: {named}: nothing is dumped here; ")
        assert repo.files()["train_0.log"].startswith("note: ")
    assert repo.argv() == ["--amp", "--opt-level=O2", "--performance"]


@pytest.mark.parametrize(
    ("argument", "takes"),
    [
        ("--profiling=1", "True or False"),
        ("--over_dump=yes", "True or False"),
        ("--data_dump_flag=$(touch ran)", "True or False"),
        ("--data_dump_step=a", "such as 10"),
        ("--data_dump_step=1|", "such as 10"),
        ("--accept_bleu=nan", "from 0 to 100"),
        ("--accept_bleu=-1", "from 0 to 100"),
        ("--accept_bleu=100.5", "from 0 to 100"),
        ("--accept_bleu=20\n", "from 0 to 100"),
        ("--accept_bleu=1e1", "from 0 to 100"),
    ],
)
def test_a_value_that_the_modelzoos_flags_do_not_have_is_an_error(repo, argument, takes):
    done = repo.run("train_full_1p.sh", argument)
    assert is_usage_error(done)
    assert takes in done.stderr
    assert not (repo.path / "test" / "output").exists() and not (repo.home / "ran").exists()


@pytest.mark.parametrize(
    ("bound", "ends_well"), [("0", True), ("28.0046", True), ("28.00460", True), ("28.0047", False)]
)
def test_a_bleu_below_what_is_accepted_fails_the_wrapper_after_all_results(repo, bound, ends_well):
    done = repo.run("train_full_8p.sh", f"--accept_bleu={bound}")
    assert done.returncode == (0 if ends_well else EXIT_CODES["accept"])
    assert done.stdout.splitlines()[-1] == f"results: {repo.runs()[0]}"
    assert "Final Train Accuracy : 28.0046\n" in done.stdout
    assert len(repo.files()) == 3
    if ends_well:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("error[accept]: BLEU 28.0046 is below 28.0047; ")
        assert len(done.stderr.splitlines()) == 1


def test_a_performance_run_has_no_bleu_to_accept(repo):
    done = repo.run("train_performance_1p.sh", "--accept_bleu=20")
    assert is_usage_error(done)
    assert "use test/train_full_1p.sh" in done.stderr


def test_the_callers_environment_gives_no_arguments(repo):
    assert repo.run("train_full_1p.sh", arg_data_path="x", data_path="x", epochs="3", RANK_SIZE="4").returncode == 0
    assert repo.argv() == ["--amp", "--opt-level=O2"]


def test_what_follows_a_lone_hyphen_pair_is_passed_untouched_after_one(repo):
    user = ["--lr", "0.1", "--unknown", "--", "$(touch ran)", "", "--batch_size=3", "-x"]
    assert repo.run("train_full_8p.sh", "--batch_size=64", "--", *user).returncode == 0
    own = ["--batch-size=64", "--amp", "--opt-level=O2", "--multiprocessing-distributed", "--max-devices=8"]
    assert repo.argv() == [*own, "--", *user]
    assert not (repo.home / "ran").exists()


def test_a_lone_hyphen_pair_with_nothing_behind_it_changes_nothing(repo):
    assert repo.run("train_full_1p.sh", "--").returncode == 0
    assert repo.argv() == ["--amp", "--opt-level=O2"]


@pytest.mark.parametrize("arguments", [["--evaluate", "model"], ["--evaluate=model"]])
def test_evaluate_after_the_hyphens_is_refused_before_anything_is_replaced(repo, arguments):
    done = repo.run("train_full_1p.sh", "--", *arguments)
    assert is_usage_error(done)
    assert "train_8p.py --evaluate" in done.stderr


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("rank", [["--rank", "1"], ["--rank=12"], ["--rank", "0", "--rank=01"]])
def test_a_node_other_than_the_first_is_refused_before_anything_is_written(repo, wrapper, rank):
    done = repo.run(wrapper, "--", "--world-size", "2", *rank, "--dist-url", "tcp://10.0.0.1:29500")
    assert is_usage_error(done)
    assert "; --rank; start python3 " in done.stderr and "docs/several-machines.md" in done.stderr
    assert not repo.record.exists() and not repo.output().exists()


@pytest.mark.parametrize("rank", [["--rank", "0"], ["--rank=-1"], ["--rank", "1", "--rank", "0"], ["--ranks", "1"]])
def test_the_first_node_has_a_wrapper(repo, rank):
    assert repo.run("train_full_8p.sh", "--", "--world-size", "2", *rank).returncode == 0
    assert repo.argv()[-len(rank) :] == rank


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_performance_run_is_refused_where_a_score_is_wanted(repo, wrapper):
    done = repo.run(wrapper, "--", "--performance")
    assert is_usage_error(done) == ("full" in wrapper)
    assert ("use test/train_performance_" in done.stderr) == ("full" in wrapper)


def test_help_after_the_hyphens_is_the_training_scripts_own(repo):
    done = repo.run("train_full_1p.sh", "--", "--help", behaviour="print('its help')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "its help\n", "")
    assert not repo.output().exists()


HOSTILE = [
    "a value  with spaces ",
    "$(touch ran)",
    "`touch ran`",
    "; touch ran",
    "&& touch ran #",
    "| touch ran",
    "> ran",
    "*",
    "~",
    "$HOME ${x:?} $$ !!",
    "line one\nline two\n",
    "\n",
    "\ttab\rreturn",
    'it\'s "quoted" \\',
    "'",
    "-x",
    "-",
    "=a=b",
    "{a,b}",
    "[a-z]?",
    "%s%n",
    "Grün 你好 \U0001f600",
    "\udcff\udcfe",  # bytes that are no UTF-8
    "\x1b[31m",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_passed_intact_and_nothing_runs(repo, value):
    """Row 48."""
    arguments = [f"--data_path={value}", "--recipe", value, f"--device_list={value.replace(',', '')}", "--", value]
    (repo.home / "a file").touch()
    assert repo.run("train_performance_1p.sh", *arguments).returncode == 0
    argv = repo.argv()
    assert argv[:2] == [f"--data-dir={value}", f"--recipe={value}"]
    assert argv[4:] == [f"--device-list={value.replace(',', '')}", "--performance", "--", value]
    assert [path.name for path in repo.home.iterdir()] == ["a file"]


def test_random_values_are_passed_intact(repo):
    """Row 48."""
    draw = random.Random(1234)
    for _ in range(10):
        values = ["".join(chr(draw.randrange(1, 256)) for _ in range(40)) for _ in range(4)]
        data, recipe, *user = values
        assert repo.run("train_full_8p.sh", f"--data_path={data}", f"--recipe={recipe}", "--", *user).returncode == 0
        argv = repo.argv()
        assert argv[:2] == [f"--data-dir={data}", f"--recipe={recipe}"]
        assert argv[-3:] == ["--", *user]
    assert not list(repo.home.iterdir())


def test_hostile_values_are_shown_on_one_line(repo):
    for value in ("$(touch ran)", "line one\nline two\n", "\r", "\x1b[31m", "\udcff", "%s%n"):
        done = repo.run("train_full_1p.sh", f"--precision_mode={value}")
        assert is_usage_error(done)
        assert not {"\r", "\x1b"} & set(done.stderr)
    assert not list(repo.home.iterdir())


# Where it runs


@pytest.mark.parametrize("folder", ["root", "test", "elsewhere", "symlink", "on the PATH"])
def test_it_runs_from_anywhere_in_the_callers_folder(repo, tmp_path, folder):
    wrapper = "train_full_1p.sh"
    cwd = {"root": repo.path, "test": repo.path / "test"}.get(folder, repo.home)
    changes = {}
    if folder == "root":
        command = ["bash", f"test/{wrapper}"]
    elif folder == "test":
        command = ["bash", wrapper]
    elif folder == "elsewhere":
        command = ["bash", f"../the repo/test/{wrapper}"]
    elif folder == "symlink":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "train").symlink_to(repo.path / "test" / wrapper)
        command = [str(tmp_path / "bin" / "train")]
    else:
        command = [wrapper]
        changes["PATH"] = f"{repo.path / 'test'}:{os.environ['PATH']}"
    done = repo.run(wrapper, command=[*command, "--data_path=../my data"], cwd=cwd, CDPATH="/tmp:/", **changes)
    assert done.returncode == 0, done.stderr
    record = repo.recorded()
    assert repo.argv()[0] == "--data-dir=../my data"
    assert record["cwd"] == str(cwd)
    assert record["script"] == str(repo.path / "train_8p.py")
    assert (repo.output() / "train_0.log").exists()


def test_what_the_results_stand_on_is_the_repositorys_own_whatever_the_path_says(repo, tmp_path):
    for package in ("bench", "nmt"):
        (tmp_path / "foreign" / package).mkdir(parents=True)
        (tmp_path / "foreign" / package / "__init__.py").write_text("raise SystemExit('a foreign package')")
    path = f"{tmp_path / 'foreign'}:{repo.path}"
    done = repo.run("train_full_1p.sh", cwd=tmp_path / "foreign", PYTHONPATH=path, PYTHONSAFEPATH="1")
    assert (done.returncode, done.stderr) == (0, "")


# The interpreter and the environment


def fake_python(path):
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nMARK="$0" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_the_repositorys_environment_serves_unless_another_is_asked_for(repo, tmp_path):
    on_path = fake_python(tmp_path / "bin" / "python3")
    of_repo = fake_python(repo.path / ".venv" / "bin" / "python3")
    asked = fake_python(tmp_path / "my python" / "python3")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for changes, expected in (
        ({"PYTHON": asked}, asked),
        ({"PYTHON": asked, "VIRTUAL_ENV": "/x"}, asked),
        ({"PYTHON": None}, of_repo),
        ({"PYTHON": ""}, of_repo),
        ({"PYTHON": None, "VIRTUAL_ENV": "/x"}, of_repo),
        ({"PYTHON": None, "CONDA_PREFIX": "/x"}, of_repo),
    ):
        assert repo.run("train_full_1p.sh", **{"PATH": path} | changes).returncode == 0
        assert repo.recorded()["env"]["MARK"] == expected
    shutil.rmtree(repo.path / ".venv")
    assert repo.run("train_full_1p.sh", PATH=path, PYTHON=None).returncode == 0
    assert repo.recorded()["env"]["MARK"] == on_path


def test_a_missing_interpreter_is_a_usage_error(repo):
    assert is_usage_error(repo.run("train_full_1p.sh", PYTHON="/no such/python"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_torch_is_told_not_to_load_backends_and_threads_are_left_alone(repo, wrapper):
    assert repo.run(wrapper, TORCH_DEVICE_BACKEND_AUTOLOAD="1").returncode == 0
    env = repo.recorded()["env"]
    assert env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert "OMP_NUM_THREADS" not in env
    assert repo.run(wrapper, OMP_NUM_THREADS="7").returncode == 0
    assert repo.recorded()["env"]["OMP_NUM_THREADS"] == "7"


CANN_SCRIPT = """
: "$A_VARIABLE_THAT_IS_NOT_SET"
false
export FROM_CANN="%s"
"""


def fake_cann(root, product):
    (root / product).mkdir(parents=True)
    (root / product / "set_env.sh").write_text(CANN_SCRIPT % f"{root.name}/{product}")


@pytest.mark.parametrize("product", ["ascend-toolkit", "nnae"])
@pytest.mark.parametrize("place", ["info", "root"])
def test_cann_is_found_by_its_install_file_or_in_its_usual_place(repo, tmp_path, product, place):
    installed, usual, info = tmp_path / "my CANN", tmp_path / "usual", tmp_path / "info"
    changes = {"GRU_CANN_ROOT": str(usual)}
    fake_cann(usual, product)
    if place == "info":
        fake_cann(installed, product)
        info.write_text(f"Driver_Install_Path_Param=/wrong\nUserName=x\nInstall_Path_Param={installed} \r\nOther=/y\n")
        changes["GRU_CANN_INFO"] = str(info)
    done = repo.run("train_full_1p.sh", **changes)
    assert (done.returncode, done.stderr) == (0, "")
    env = repo.recorded()["env"]
    assert env["FROM_CANN"] == f"{installed.name if place == 'info' else usual.name}/{product}"
    assert (env["HCCL_WHITELIST_DISABLE"], env["TASK_QUEUE_ENABLE"], env["CPU_AFFINITY_CONF"]) == ("1", "2", "2")


def test_ascend_toolkit_comes_before_nnae_and_settings_of_the_user_stay(repo, tmp_path):
    fake_cann(tmp_path / "cann", "nnae")
    fake_cann(tmp_path / "cann", "ascend-toolkit")
    changes = {"GRU_CANN_ROOT": str(tmp_path / "cann"), "TASK_QUEUE_ENABLE": "1", "HCCL_WHITELIST_DISABLE": ""}
    assert repo.run("train_full_1p.sh", **changes).returncode == 0
    env = repo.recorded()["env"]
    assert env["FROM_CANN"] == "cann/ascend-toolkit"
    assert (env["HCCL_WHITELIST_DISABLE"], env["TASK_QUEUE_ENABLE"]) == ("", "1")


def test_cann_is_left_alone_where_the_platform_has_set_it_up(repo, tmp_path):
    fake_cann(tmp_path / "cann", "nnae")
    for flag, found in (("true", False), ("false", True)):
        changes = {"GRU_CANN_ROOT": str(tmp_path / "cann"), "etp_running_flag": flag}
        assert repo.run("train_full_1p.sh", **changes).returncode == 0
        assert ("FROM_CANN" in repo.recorded()["env"]) == found


@pytest.mark.parametrize("options", ["-c", "-euc"])
def test_without_cann_its_script_is_silent_and_changes_nothing(repo, options):
    state = "$-; $(shopt; set +o; export -p; declare -F)"
    script = f'before="{state}"; source test/env_npu.sh; after="{state}"; [ "$before" = "$after" ]'
    done = repo.run("", command=["bash", options, script], cwd=repo.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("options", ["", "-e", "-eu", "-euo pipefail"])
def test_canns_script_leaves_the_shells_options_as_they_were(repo, tmp_path, options):
    fake_cann(tmp_path / "cann", "nnae")
    state = "$-; $(shopt; shopt -o pipefail; declare -F)"
    script = f'set {options or "--"}; before="{state}"; source test/env_npu.sh; after="{state}"; '
    script += '[ "$before" = "$after" ] && '
    done = repo.run(
        "", command=["bash", "-c", script + "echo $FROM_CANN"], cwd=repo.path, GRU_CANN_ROOT=str(tmp_path / "cann")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cann/nnae\n", "")


FAKE_CONDA = """#!/bin/sh
[ "$*" = "info --base" ] && echo "{base}"
"""
FAKE_CONDA_SH = """
: "$PS1"
conda() { [ "$1 $2" = "activate my env" ] && export CONDA_PREFIX=active PATH="$(dirname "$CONDA_EXE"):$PATH"; }
"""


def test_conda_name_activates_that_environment_and_its_interpreter(repo, tmp_path):
    python = fake_python(tmp_path / "conda bin" / "python3")
    conda = tmp_path / "conda bin" / "conda"
    conda.write_text(FAKE_CONDA.format(base=tmp_path / "conda base"))
    conda.chmod(0o755)
    profile = tmp_path / "conda base" / "etc" / "profile.d"
    profile.mkdir(parents=True)
    (profile / "conda.sh").write_text(FAKE_CONDA_SH)
    done = repo.run("train_full_1p.sh", "--conda_name=my env", PYTHON="/wrong", CONDA_EXE=str(conda))
    assert (done.returncode, done.stderr) == (0, "")
    env = repo.recorded()["env"]
    assert (env["MARK"], env["CONDA_PREFIX"]) == (python, "active")
    assert repo.argv() == ["--amp", "--opt-level=O2"]

    done = repo.run("train_full_1p.sh", "--conda_name=other\n", CONDA_EXE=str(conda), ASCEND_DEVICE_ID="1")
    assert is_usage_error(done)
    assert "cannot activate" in done.stderr
    assert not repo.output("1").exists()


def test_conda_name_without_conda_is_an_error(repo):
    done = repo.run("train_full_1p.sh", "--conda_name=x", CONDA_EXE=None, PATH="/usr/bin:/bin")
    assert is_usage_error(done)
    assert "no conda" in done.stderr
    assert not repo.record.exists()


# Results


METRICS = """
folder = sys.argv[1].removeprefix("--record=")
with open(folder + "/metrics.jsonl", "w") as file:
    for entry in (
        {"kind": "run", "run": "ab"},
        {"kind": "step", "time": "T", "epoch": 1, "step": 10, "loss": 9.0},
        {"kind": "epoch", "time": "T", "epoch": 1, "step": 20, "pairs_per_second": 300.0},
        {"kind": "validation", "time": "T", "epoch": 1, "step": 20, "loss": None},
        {"kind": "epoch", "time": "T", "epoch": 2, "step": 40, "pairs_per_second": 100.0},
        ["no object"],
    ):
        file.write(json.dumps(entry) + "\\n")
    file.write('{"kind": "epo')  # torn
"""


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_run_writes_every_result_and_prints_them_last(repo, wrapper):
    full = wrapper in FULL
    ranks = 8 if "8p" in wrapper else 1
    text = canned_log("300.000", "100.000", "1000.500", "200.000", batch=512, processes=ranks, bleu=full and "28.0046")
    done = repo.run(wrapper, behaviour=printing(text) + METRICS + "import time; time.sleep(1.1)")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    case = f"{NETWORK}_bs512_{ranks}p_{'acc' if full else 'perf'}"
    assert sorted(repo.files()) == sorted(["train_0.log", f"train_{case}_loss.txt", f"{case}.log"])
    results = key_values(repo.output() / f"{case}.log")
    seconds = results.pop("E2ETrainingTime")
    assert 1 <= int(seconds) <= 30
    expected = {
        "Network": NETWORK,
        "RankSize": str(ranks),
        "BatchSize": "512",
        "DeviceType": os.uname().machine,
        "CaseName": case,
        "ActualFPS": "250.00",
        "TrainingTime": "2048.00",
        "ActualLoss": "6.1250e+00",
    }
    if full:
        expected["TrainAccuracy"] = "28.0046"
    expected |= {"CompileTime": "0.541", "Precision": "bfloat16", "OptLevel": "O2", "Device": "cpu", "Recipe": "tuned"}
    expected |= {"Seed": "1234", "Epochs": "4", "DataFingerprint": "0123456789ab", "Commit": "0123abc"}
    expected |= {"DeviceName": "x86_64 CPU, 2 cores"}
    assert list(results.items()) == list(expected.items()), "the ModelZoo's keys come first"

    losses = "9.2500e+00 9.1250e+00 8.2500e+00 8.1250e+00 7.2500e+00 7.1250e+00 6.2500e+00 6.1250e+00"
    assert (repo.output() / f"train_{case}_loss.txt").read_text().split("\n") == [*losses.split(), ""]
    assert (repo.output() / "train_0.log").read_text() == text + "\n"

    last = ["------------------ Final result ------------------", "Final Performance images/sec : 250.00"]
    if full:
        last += ["Final Train Accuracy : 28.0046"]
    (folder,) = repo.runs()
    last += [f"E2E Training Duration sec : {seconds}", f"results: {folder}"]
    assert done.stdout == "\n".join([text, *last, ""])
    check_folder(folder, repo, case, results | {"E2ETrainingTime": seconds})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_tool_that_greps_as_the_modelzoos_do_reads_the_output(repo, wrapper):
    """The real program's output is read likewise, below."""
    full = wrapper in FULL
    text = canned_log("300.000", "250.000", "200.000", batch=512, bleu=full and "28.0046")
    done = repo.run(wrapper, behaviour=printing(text))
    (path,) = repo.output().glob(f"{NETWORK}*.log")
    read = as_the_modelzoo_reads(done.stdout, repo.output(), key_values(path))
    assert (read["ActualFPS"], read["FPS of the log"]) == ("250.00", "200.000")
    assert (read["Network"], read["RankSize"], read["BatchSize"], read["CompileTime"]) == (NETWORK, "1", "512", "0.541")
    assert read.get("TrainAccuracy") == read.get("BLEU of the log") == ("28.0046" if full else None)
    assert read["losses"].split()[-1] == read["ActualLoss"] == "7.1250e+00"
    assert json.loads((repo.runs()[0] / f"{path.stem}_bfloat16.json").read_text())["FiguresByEpoch"] == []
    assert (read["TrainingTime"], read["Time of the log"]) == ("2048.00", "0.54")


@pytest.mark.parametrize("record", [["--record", "a folder"], ["--record=x", "--record=a folder"]])
def test_the_figures_by_epoch_are_those_of_the_users_own_folder(repo, record):
    """It is relative to the caller's folder, and the last one counts."""
    behaviour = printing(canned_log("300.000")) + METRICS.replace('sys.argv[1].removeprefix("--record=")', '"a folder"')
    (repo.home / "a folder").mkdir()
    done = repo.run("train_full_1p.sh", "--", *record, behaviour=behaviour)
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = repo.runs()[0].glob("*.json")
    assert [figures["epoch"] for figures in json.loads(path.read_text())["FiguresByEpoch"]] == [1, 2]


def check_folder(folder, repo, case, results):
    """A run's own folder: the files of the output folder, and the results as JSON."""
    names = ["train_0.log", f"train_{case}_loss.txt", f"{case}_bfloat16.log", f"{case}_bfloat16.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "metrics.jsonl"])
    for own, shown in zip(names[:3], [*names[:2], f"{case}.log"], strict=True):
        assert (folder / own).samefile(repo.output() / shown)
    content = json.loads((folder / names[3]).read_text())
    assert content.pop("FiguresByEpoch") == [
        {"epoch": 1, "step": 20, "pairs_per_second": 300.0, "loss": None},
        {"epoch": 2, "step": 40, "pairs_per_second": 100.0},
    ]
    assert content.keys() == results.keys()
    assert content["Precision"] == "bfloat16" and content["Seed"] == 1234 and content["ActualLoss"] == 6.125
    for key, value in content.items():
        assert value == (results[key] if isinstance(value, str) else float(results[key])), key


@pytest.mark.parametrize(
    ("fps", "median"),
    [(["7.000"], "7.00"), (["9.000", "10.000", "1.000"], "9.00"), (["3.000", "1.000", "2.000", "4.000"], "2.50")],
)
def test_actual_fps_is_the_median_of_the_epochs(repo, fps, median):
    done = repo.run("train_full_1p.sh", behaviour=printing(canned_log(*fps)))
    assert f"Final Performance images/sec : {median}\n" in done.stdout


def test_numbers_have_a_point_in_every_locale(repo):
    done = repo.run("train_full_1p.sh", LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8")
    assert "Final Performance images/sec : 200.00\n" in done.stdout


def test_rank_size_is_what_ran_where_fewer_than_eight_devices_are_there(repo):
    text = canned_log("100.000", batch=128, processes=2)
    assert repo.run("train_full_8p.sh", behaviour=printing(text)).returncode == 0
    results = key_values(repo.output() / f"{NETWORK}_bs128_8p_acc.log")
    assert results["RankSize"] == "2"


def test_the_last_bleu_score_and_the_loss_of_the_last_step_count(repo):
    text = canned_log("100.000", bleu="1.0000") + "\nLoss of something else 3.0\nBLEU score = 2.5000"
    done = repo.run("train_full_1p.sh", behaviour=printing(text))
    assert "Final Train Accuracy : 2.5000\n" in done.stdout
    results = key_values(repo.output() / f"{NETWORK}_bs128_1p_acc.log")
    assert (results["TrainAccuracy"], results["ActualLoss"]) == ("2.5000", "9.1250e+00")


def test_the_log_holds_what_the_run_prints_on_both_streams_and_shows_it_live(repo):
    behaviour = "import time\nprint('on stderr', file=sys.stderr)\nprint('on stdout', flush=True)\ntime.sleep(60)"
    with repo.started("train_full_1p.sh", behaviour=behaviour) as process:
        assert process.stdout.readline() == "on stdout\n"
        assert eventually(lambda: (repo.output() / "train_0.log").read_text() == "on stderr\non stdout\n")


def test_the_run_leaves_the_wrappers_input_alone(repo):
    command = ["bash", "-c", f'echo typed | bash "{repo.path}/test/train_full_1p.sh"']
    done = repo.run("", command=command, behaviour=FULL_RUN + "; print(repr(sys.stdin.read()))")
    assert "''" in done.stdout.splitlines()


def test_ascend_device_id_names_the_folder_and_the_log(repo):
    assert repo.run("train_full_1p.sh", ASCEND_DEVICE_ID="17").returncode == 0
    assert (repo.output("17") / "train_17.log").exists()
    assert (repo.output("17") / f"{NETWORK}_bs128_1p_acc.log").exists()
    assert not repo.output().exists()


@pytest.mark.parametrize("value", ["../../x", "a", "-1", "0 1", "0\n"])
def test_an_ascend_device_id_that_is_no_number_is_an_error(repo, value):
    assert is_usage_error(repo.run("train_full_1p.sh", ASCEND_DEVICE_ID=value))
    assert not (repo.path / "test" / "output").exists()


# Failures


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("code", [1, 2, 3, 7])
def test_a_failed_run_fails_the_wrapper_with_its_code_and_reason(repo, wrapper, code):
    reason = "error[data]: train.en has 3 lines, train.de 4; corpus/; make them equal"
    behaviour = FULL_RUN + f"; print({reason!r}, file=sys.stderr); print('a last word'); sys.exit({code})"
    done = repo.run(wrapper, behaviour=behaviour)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == reason
    assert "Final" not in done.stdout
    assert list(repo.files()) == ["train_0.log"]
    assert reason in (repo.output() / "train_0.log").read_text()


def test_a_traceback_fails_the_wrapper_with_its_last_line(repo):
    done = repo.run("train_full_1p.sh", behaviour=FULL_RUN + "; raise ValueError('a bug')")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: a bug"


def test_a_killed_run_names_the_signal(repo):
    done = repo.run("train_full_1p.sh", behaviour=FULL_RUN + "; sys.stdout.flush(); os.kill(os.getpid(), 9)")
    assert done.returncode == 137
    assert done.stderr.splitlines()[-1].startswith("ended by signal 9 ")
    assert "Final" not in done.stdout


def test_the_folders_name_forges_no_line(tmp_path):
    folder = tmp_path / "a\nBLEU score = 99.0\n"
    folder.mkdir()
    repo = Repo(folder)
    done = repo.run("train_full_1p.sh", behaviour="sys.exit(3)")
    assert done.returncode == 3
    assert "BLEU score = 99.0" in done.stderr, "the name must be told"
    repo.output().parent.rename(repo.output().parent.with_name("kept"))
    repo.output().parent.write_text("no folder")
    done_too = repo.run("train_full_1p.sh")
    assert done_too.returncode == 5
    for run in (done, done_too):
        assert not any(line.startswith("BLEU") for line in (run.stdout + run.stderr).splitlines())


def test_a_run_without_a_word_fails_with_a_reason(repo):
    done = repo.run("train_full_1p.sh", behaviour="sys.exit(3)")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (3, "train_8p.py printed nothing")


@pytest.mark.parametrize("missing", ["run:", "* FPS@all", "[cpu", "BLEU"])
def test_a_log_without_a_result_is_a_failure(repo, missing):
    lines = canned_log("100.000").split("\n")
    text = "\n".join(line for line in lines if not line.startswith(missing))
    done = repo.run("train_full_1p.sh", behaviour=printing(text))
    assert done.returncode == 1
    assert done.stderr.startswith("error[bug]: the run ended without a line")
    assert len(done.stderr.splitlines()) == 1
    assert "Final" not in done.stdout
    assert not list(repo.output().glob(f"*{NETWORK}*"))


@pytest.mark.parametrize("fps", ["0.000", "nan"])
def test_a_speed_of_nothing_is_a_failure(repo, fps):
    done = repo.run("train_full_1p.sh", behaviour=printing(canned_log(fps)))
    assert done.returncode == 1
    assert "FPS@all" in done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FAILS_IN_TRAINING = printing("run: processes=1 batch=2") + "\nsys.exit(6)"
FAILS_BEFORE = printing("error[data]: there is no such folder; nowhere; name another") + "\nsys.exit(3)"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_run_that_fails_in_training_leaves_no_earlier_result_under_its_name(repo, wrapper):
    """And the earlier run's own folder has all of it, whatever comes later."""
    assert repo.run(wrapper).returncode == 0
    assert len(repo.files()) == 3
    (folder,) = repo.runs()
    kept = contents(folder)
    (repo.output() / "killed.log.tmp").touch()
    (repo.output() / "a note.txt").touch()
    assert repo.run(wrapper, behaviour=FAILS_IN_TRAINING).returncode == 6
    assert repo.files() == {"a note.txt": "", "train_0.log": "run: processes=1 batch=2\n"}
    assert repo.run(wrapper).returncode == 0
    assert len(kept) == 4 and contents(folder) == kept
    assert len(repo.runs()) == 3
    assert (repo.runs()[1] / "train_0.log").read_text() == "run: processes=1 batch=2\n"


def test_a_run_that_never_began_to_train_touches_nothing(repo):
    """A wrong folder, an absent device, a batch that cannot be shared out: its log is in its own folder alone."""
    assert repo.run("train_full_1p.sh").returncode == 0
    before = repo.files()
    assert len(before) == 3
    done = repo.run("train_full_1p.sh", behaviour=FAILS_BEFORE)
    assert done.returncode == 3
    assert repo.files() == before
    log = repo.runs()[-1] / "train_0.log"
    assert log.read_text().startswith("error[data]: ")
    assert done.stderr.splitlines()[-2].endswith(str(log).replace("the repo", "the\\ repo"))
    assert repo.run("train_full_1p.sh", behaviour=printing("run: x") + "\nsys.exit(3)").returncode == 3, "it began"
    assert repo.files() == {"train_0.log": "run: x\n"}


def test_without_a_run_that_began_the_log_is_that_of_the_last_one(repo):
    for number in (1, 2):
        behaviour = f"print('no folder {number}', end='', flush=True); sys.exit(3)"
        assert repo.run("train_full_1p.sh", behaviour=behaviour).returncode == 3
        assert repo.files() == {"train_0.log": f"no folder {number}"}
    assert [(folder / "train_0.log").read_text() for folder in repo.runs()] == ["no folder 1", "no folder 2"]


def test_what_an_earlier_version_left_is_kept(repo):
    """It had no folder for each run. Nor has a disk without hard links a second name for a file."""
    names = ["train_0.log", f"train_{NETWORK}_bs8_1p_acc_loss.txt", f"{NETWORK}_bs8_1p_acc.log"]
    for name in names:
        repo.output().mkdir(parents=True, exist_ok=True)
        (repo.output() / name).write_text(f"run: {name}")
    assert repo.run("train_full_1p.sh", behaviour=FAILS_BEFORE).returncode == 3
    assert sorted(repo.files()) == sorted(names)
    assert repo.run("train_full_1p.sh", behaviour=FAILS_IN_TRAINING).returncode == 6
    earlier = repo.output() / "runs" / "earlier"
    assert {path.name: path.read_text() for path in earlier.iterdir()} == {name: f"run: {name}" for name in names}


def test_what_earlier_versions_left_twice_is_kept_twice(repo):
    for text in ("run: 1", "run: 2", "run: 3"):
        repo.output().mkdir(parents=True, exist_ok=True)
        for path in repo.output().glob("train_0.log"):
            path.unlink()
        for name in ("train_0.log", f"{NETWORK}_bs8_1p_acc.log"):
            (repo.output() / name).write_text(text)
        assert repo.run("train_full_1p.sh", behaviour=FAILS_IN_TRAINING).returncode == 6
    for folder, text in (("earlier", "run: 1"), ("earlier_2", "run: 2"), ("earlier_3", "run: 3")):
        found = contents(repo.output() / "runs" / folder)
        assert found == dict.fromkeys(["train_0.log", f"{NETWORK}_bs8_1p_acc.log"], text.encode())


@pytest.fixture
def without_links(tmp_path):
    """What changes the environment to that of a disk without hard links."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ln").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "ln").chmod(0o755)
    refuses = 'import os\ndef refuse(*names): raise OSError(1, "no")\nos.link = refuse\n'
    (tmp_path / "sitecustomize.py").write_text(refuses)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}


KILLS_THE_WRAPPER = (
    printing("run: processes=1 batch=2")
    + """
import time
while open(os.environ["LOG"]).read() != "run: processes=1 batch=2\\n":
    time.sleep(0.05)
print("more", flush=True)
os.kill(os.getppid(), 9)
time.sleep(60)
"""
)


def test_a_copy_of_what_a_run_has_is_dropped_and_another_file_is_kept(repo, without_links):
    """That of a run that was killed is a copy of the log's beginning."""
    assert repo.run("train_full_1p.sh", **without_links).returncode == 0
    assert repo.run("train_full_1p.sh", behaviour=FAILS_BEFORE, **without_links).returncode == 3
    killed = repo.run(
        "train_full_1p.sh", behaviour=KILLS_THE_WRAPPER, LOG=str(repo.output() / "train_0.log"), **without_links
    )
    assert killed.returncode == -9
    own = repo.runs()[-1] / "train_0.log"
    assert eventually(lambda: own.read_text() == "run: processes=1 batch=2\nmore\n")
    assert (repo.output() / "train_0.log").read_text() == "run: processes=1 batch=2\n"
    assert repo.run("train_full_1p.sh", **without_links).returncode == 0
    assert not list((repo.output() / "runs").glob("earlier*")), "each run has its own"
    shown = repo.output() / f"{NETWORK}_bs128_1p_acc.log"
    shown.write_text(shown.read_text() + "a note = 1\n")
    assert repo.run("train_full_1p.sh", **without_links).returncode == 0
    (kept,) = (repo.output() / "runs").glob("earlier*/*")
    assert kept.name == shown.name and kept.read_text().endswith("a note = 1\n")


def test_a_disk_without_hard_links_gets_copies(repo, without_links):
    for _ in range(2):
        assert repo.run("train_full_1p.sh", **without_links).returncode == 0
    case = f"{NETWORK}_bs128_1p_acc"
    assert sorted(repo.files()) == sorted(["train_0.log", f"train_{case}_loss.txt", f"{case}.log"])
    for name, own in (("train_0.log", "train_0.log"), (f"{case}.log", f"{case}_bfloat16.log")):
        shown, kept = repo.output() / name, repo.runs()[-1] / own
        assert shown.read_bytes() == kept.read_bytes() and not shown.samefile(kept)


def test_two_runs_of_one_second_have_two_folders(repo, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "date").write_text("#!/bin/sh\necho 20260102T030405Z\n")
    (tmp_path / "bin" / "date").chmod(0o755)
    for _ in range(3):
        done = repo.run("train_performance_8p.sh", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert done.returncode == 0
    name = "20260102T030405Z_train_performance_8p"
    assert [folder.name for folder in repo.runs()] == [name, f"{name}_2", f"{name}_3"]
    assert done.stdout.endswith(f"\nresults: {repo.output()}/runs/{name}_3\n")


def test_the_results_of_other_wrappers_stay(repo):
    for wrapper in WRAPPERS:
        assert repo.run(wrapper).returncode == 0
    assert len(list(repo.output().glob(f"{NETWORK}*.log"))) == 4
    assert len(list(repo.output().glob(f"train_{NETWORK}*_loss.txt"))) == 4


@pytest.mark.parametrize("blocked", ["output", "output/0", "output/0/train_0.log"])
def test_an_output_that_cannot_be_written_is_an_io_error(repo, blocked):
    # A file where a folder is wanted and the other way round: these stop root too.
    path = repo.path / "test" / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if path.suffix else path.touch()
    done = repo.run("train_full_1p.sh")
    assert done.returncode == 5
    assert done.stderr.startswith("error[io]: ")
    assert len(done.stderr.splitlines()) == 1
    assert not repo.record.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("leftover", [None, ".lock", "train_0.log"])
def test_a_read_only_output_is_an_io_error(repo, leftover):
    repo.output().mkdir(parents=True)
    if leftover:
        (repo.output() / leftover).touch()
    repo.output().chmod(0o555)
    done = repo.run("train_full_1p.sh")
    assert (done.returncode, done.stderr[:11]) == (5, "error[io]: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_for_the_log_is_an_io_error(repo):
    # A tee that writes its copy to a full disk.
    bin_folder = repo.home.parent / "bin"
    bin_folder.mkdir()
    (bin_folder / "tee").write_text('#!/bin/sh\nexec /usr/bin/env PATH="$OLD_PATH" tee /dev/full\n')
    (bin_folder / "tee").chmod(0o755)
    path = os.environ["PATH"]
    done = repo.run("train_full_1p.sh", PATH=f"{bin_folder}:{path}", OLD_PATH=path)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("error[io]: the log is not whole")
    assert "Final" not in done.stdout


# Signals and two runs at once

WAITING = """
import signal, time
def leave(number, frame):
    os.write(1, b"stopped by %d\\n" % number)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""


def training_pid(repo):
    return repo.recorded()["pid"]


@pytest.mark.parametrize("wrapper", ["train_full_1p.sh", "train_performance_8p.sh"])
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_run_and_ends_the_wrapper_without_results(repo, wrapper, to_group, number):
    with repo.started(wrapper, behaviour=FULL_RUN + "\n" + WAITING) as process:
        while "ready" not in process.stdout.readline():
            pass
        pid = training_pid(repo)
        (os.killpg if to_group else os.kill)(process.pid, number)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert eventually(lambda: gone(pid))
    assert stdout == f"stopped by {2 if number == signal.SIGINT else 15}\n"
    assert stderr.splitlines()[-1] == f"interrupted; the last line was: {stdout.strip()}"
    assert list(repo.files()) == ["train_0.log"]


STUBBORN = """
import signal, time
def leave(number, frame):
    signal.signal(signal.SIGINT, leave_slowly)  # first, because the next one comes as soon as the line is read
    os.write(1, b"not yet\\n")
def leave_slowly(number, frame):
    time.sleep(1)
    os.write(1, b"stopped\\n")
    sys.exit(1)
signal.signal(signal.SIGINT, leave)
print("ready", flush=True)
time.sleep(60)
"""


def test_the_wrapper_outlasts_the_run_when_it_is_interrupted_twice(repo):
    with repo.started("train_full_1p.sh", behaviour=STUBBORN) as process:
        os.kill(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "not yet\n"
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130
        assert gone(training_pid(repo))
    assert stderr.splitlines()[-1] == "interrupted; the last line was: stopped"


def test_a_run_that_swallows_the_interrupt_gives_no_results(repo):
    waiting = "\nimport time\nprint('ready', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
    with repo.started("train_full_1p.sh", behaviour=FULL_RUN + waiting) as process:
        while "ready" not in process.stdout.readline():
            pass
        os.kill(process.pid, signal.SIGINT)
        stdout, _ = process.communicate(timeout=30)
        assert process.returncode == 130
    assert "Final" not in stdout
    assert not list(repo.output().glob(f"*{NETWORK}*"))


def test_ctrl_c_on_a_terminal_ends_the_run_with_130(repo):
    pty = pytest.importorskip("pty")
    # The stand-in for a user: an interactive terminal whose foreground job is the wrapper.
    pid, terminal = pty.fork()
    if pid == 0:
        heed_signals()
        os.chdir(repo.home)
        os.execvpe("bash", repo.command("train_full_1p.sh", []), repo.environment(WAITING, {}))
    shown = b""
    with contextlib.suppress(OSError):
        while b"ready" not in shown:
            shown += os.read(terminal, 1024)
        os.write(terminal, b"\x03")
        while part := os.read(terminal, 1024):
            shown += part
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert b"stopped by 2" in shown
    assert shown.count(b"stopped by 2") == 2, "once by the run, once in the reason"
    assert shown.rstrip().split(b"\r\n")[-1] == b"interrupted; the last line was: stopped by 2"


def test_a_killed_wrapper_takes_its_run_along_and_frees_the_folder(repo):
    with repo.started("train_full_1p.sh", behaviour=WAITING) as process:
        pid = training_pid(repo)
        process.kill()
        process.wait()
        assert repo.run("train_full_1p.sh").returncode == 0
        assert eventually(lambda: gone(pid))


def test_the_log_of_a_killed_wrapper_stays_in_its_folder(repo):
    with repo.started("train_full_1p.sh", behaviour=printing("its only trace") + WAITING) as process:
        log = repo.output() / "train_0.log"
        assert eventually(lambda: log.read_text() == "its only trace\nready\n")
        process.kill()
        process.wait()
        assert repo.run("train_full_1p.sh").returncode == 0
    assert "its only trace" not in log.read_text()
    assert (repo.runs()[0] / "train_0.log").read_text().startswith("its only trace\nready\n")


def test_a_killed_wrapper_leaves_no_earlier_result_under_its_name(repo):
    assert repo.run("train_full_1p.sh").returncode == 0
    with repo.started("train_full_1p.sh", behaviour=printing("run: x") + WAITING) as process:
        log, own = repo.output() / "train_0.log", repo.runs()[-1] / "train_0.log"

        def has_taken_over():
            with contextlib.suppress(FileNotFoundError):
                return log.samefile(own)

        assert eventually(has_taken_over)
        process.kill()
        process.wait()
    assert list(repo.files()) == ["train_0.log"]
    assert repo.files()["train_0.log"].startswith("run: x\n")


@pytest.mark.parametrize("flock", [True, False])
def test_a_second_run_with_the_same_number_is_refused_and_harms_nothing(repo, tmp_path, flock):
    changes = {}
    if not flock:
        # A PATH with every tool but flock.
        (tmp_path / "bin").mkdir()
        tools = ["bash", "readlink", "dirname", "sed", "awk", "mkdir", "rm", "mktemp", "mkfifo", "tee", "mv"]
        tools += ["cat", "cp", "date", "find", "ln"]
        for tool in tools:
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
        changes["PATH"] = str(tmp_path / "bin")
    elif not shutil.which("flock"):
        pytest.skip("needs flock")
    with repo.started("train_full_1p.sh", behaviour=WAITING, **changes) as process:
        log = repo.output() / "train_0.log"
        assert eventually(lambda: log.read_text() == "ready\n")  # tee shows a line before it writes it
        for wrapper in WRAPPERS:
            done = repo.run(wrapper, **changes)
            assert done.returncode == 5
            assert done.stderr.startswith(f"error[io]: in use by pid {process.pid}; ")
            assert len(done.stderr.splitlines()) == 1
            assert not repo.record.exists()
        assert log.read_text() == "ready\n"
        assert repo.run("train_full_1p.sh", ASCEND_DEVICE_ID="1", **changes).returncode == 0
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
    assert repo.run("train_full_1p.sh", **changes).returncode == 0


def test_a_run_that_leaves_a_process_behind_does_not_hold_the_folder(repo):
    behaviour = "import subprocess; DEVNULL = subprocess.DEVNULL\n" + FULL_RUN
    behaviour += "\nsubprocess.Popen(['sleep', '5'], stdout=DEVNULL, stderr=DEVNULL, close_fds=False)"
    assert repo.run("train_full_1p.sh", behaviour=behaviour).returncode == 0
    assert repo.run("train_full_1p.sh").returncode == 0


def test_no_reader_of_the_output_ends_the_run_without_noise_of_the_shell(repo):
    script = f'bash "{repo.path}/test/train_full_1p.sh" | head -1; echo "${{PIPESTATUS[0]}}"'
    behaviour = "for i in range(10000):\n    print('line', i, flush=True)\n"
    done = repo.run("", command=["bash", "-c", script], behaviour=behaviour)
    assert done.stdout.splitlines()[0] == "line 0"
    assert int(done.stdout.splitlines()[1]) != 0
    assert "common.sh: line" not in done.stderr


def test_no_temporary_files_stay(repo, tmp_path):
    (tmp_path / "tmp").mkdir()
    for behaviour in (FULL_RUN, "sys.exit(1)"):
        repo.run("train_full_1p.sh", behaviour=behaviour, TMPDIR=str(tmp_path / "tmp"))
        assert not list((tmp_path / "tmp").iterdir())
        assert not list(repo.output().glob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS + WRAPPERS)
def test_shellcheck_finds_nothing(script):
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (beside_python if beside_python.exists() else None)
    if shellcheck is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([shellcheck, "-x", f"test/{script}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# Restarts

# Each start does what its line says: an exit code, or a signal that kills it. It appends its arguments to a file.
STARTS = """
starts = os.environ["RECORD"] + ".starts"
with open(starts, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
with open(starts) as file:
    number = len(file.readlines()) - 1
how = os.environ["STARTS"].split(",")[number]
print(os.environ["TEXTS"].split("|")[number], flush=True)
if how.startswith("-"):
    os.kill(os.getpid(), -int(how))
if how == "6":
    print("error[distributed]: rank 1 was killed by signal 9; here; do this", file=sys.stderr)
sys.exit(int(how))
"""


def run_starts(repo, wrapper, *arguments, starts, texts=None, **changes):
    """The wrapper's end, and the arguments of each start."""
    file = Path(f"{repo.record}.starts")
    file.unlink(missing_ok=True)
    texts = texts or "|".join([canned_log("100.000")] * (starts.count(",") + 1))
    done = repo.run(wrapper, *arguments, behaviour=STARTS, STARTS=starts, TEXTS=texts, **changes)
    starts = [json.loads(line) for line in file.read_text().splitlines()]
    assert {own for own, *_ in starts} == {f"--record={repo.runs()[-1]}"}
    return done, [argv for _, *argv in starts]


@pytest.mark.parametrize("fault", ["6", "-9", "-6", "-11"])
def test_a_run_whose_process_died_goes_on_and_ends_well(repo, fault):
    """Rows 1 and 2: exit code 6, or the death of the launcher itself."""
    arguments = ["--restarts=2", "--batch_size=64", "--", "--lr", "0.1"]
    done, starts = run_starts(repo, "train_full_8p.sh", *arguments, starts=f"{fault},{fault},0")
    assert done.returncode == 0, done.stderr
    assert starts[1] == starts[2] == [*starts[0], "--resume=auto"]
    code = 128 - int(fault) if fault.startswith("-") else 6
    log = (repo.output() / "train_0.log").read_text()
    notes = [line for line in log.splitlines() if line.startswith("note: restart")]
    assert notes == [f"note: restart {n} of 2, because the run ended with exit code {code}" for n in (1, 2)]
    assert log.count("* FPS@all") == 3, "one log of all of it"
    assert "Final Train Accuracy : 28.0046\n" in done.stdout


def test_a_run_is_not_started_again_without_being_asked_to(repo):
    done, starts = run_starts(repo, "train_full_1p.sh", starts="6,0")
    assert (done.returncode, len(starts)) == (6, 1)


def test_a_run_is_started_again_as_often_as_asked_and_its_last_reason_counts(repo):
    done, starts = run_starts(repo, "train_full_1p.sh", "--restarts=02", starts="6,6,-9,0")
    assert (done.returncode, len(starts)) == (137, 3)
    assert done.stderr.splitlines()[-1].startswith("ended by signal 9 "), "not the error of an earlier start"
    assert "Final" not in done.stdout
    done, starts = run_starts(repo, "train_full_1p.sh", "--restarts", "1", starts="-9,6,0")
    assert (done.returncode, len(starts)) == (6, 2)
    assert done.stderr.splitlines()[-1].startswith("error[distributed]: rank 1 was killed")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 7, 130, 143])
def test_what_a_restart_cannot_mend_ends_the_wrapper(repo, code):
    done, starts = run_starts(repo, "train_full_1p.sh", "--restarts=3", starts=f"{code},0")
    assert (done.returncode, len(starts)) == (code, 1)


@pytest.mark.parametrize("user", [["--resume", "my state"], ["--resume=my state"], ["--resume=auto"]])
def test_a_restart_keeps_the_users_own_state_and_says_that_it_is_one(repo, user):
    """`train_8p.py` takes the newer state of the same run then."""
    arguments = ["--restarts=1", "--", "-p", "3", *user, "--lr=1"]
    done, starts = run_starts(repo, "train_full_1p.sh", *arguments, starts="6,0")
    assert done.returncode == 0
    assert starts == [["--amp", "--opt-level=O2", "--", "-p", "3", *user, "--lr=1"]] * 2
    assert "TORCHELASTIC_RESTART_COUNT=$start" in (repo.path / "test" / "common.sh").read_text()


def test_resume_is_an_argument_too_and_leaves_the_precision_to_the_run(repo):
    done, starts = run_starts(repo, "train_full_1p.sh", "--resume=auto", "--restarts=1", starts="6,0")
    assert done.returncode == 0
    assert starts == [["--resume=auto"]] * 2
    repo.run("train_full_1p.sh", "--resume", "my state", "--precision_mode=must_keep_origin_dtype")
    assert repo.argv() == ["--resume=my state", "--opt-level=O0"]


def test_a_resume_that_finds_nothing_to_go_on_with_begins_in_the_wrappers_precision(repo):
    """It began in float32, without a word. The same where the run dies before its first save."""
    assert repo.run("train_full_1p.sh", "--resume=auto", "--", "-p", "3", RUN="begins").returncode == 0
    assert repo.argv() == ["--amp", "--opt-level=O2", "--resume=auto", "--", "-p", "3"]
    twice = ["--resume=auto", "--restarts=1", "--", "-p", "3"]
    _, starts = run_starts(repo, "train_full_1p.sh", *twice, starts="6,0", RUN="begins")
    assert starts == [["--amp", "--opt-level=O2", "--resume=auto", "--", "-p", "3"]] * 2
    repo.run("train_full_1p.sh", "--resume=auto", "--precision_mode=must_keep_origin_dtype", RUN="begins")
    assert repo.argv() == ["--resume=auto", "--opt-level=O0"]


def test_the_program_says_whether_a_run_begins(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "train_8p.py"), "--parse-only"]

    def said(*flags):
        return subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout

    (tmp_path / "is here.state").touch()
    (tmp_path / "link").symlink_to("is here")
    assert said() == said("--resume=auto") == said("--resume=auto", "--ckptpath=is") == "begins\n"
    assert said("--resume=auto", "--", "--ckptpath", "is here") == "goes on\n"
    assert said("--resume=auto", "--ckptpath=link") == said("--resume=any.state") == "goes on\n"


@pytest.mark.parametrize(
    ("wrapper", "start", "says"),
    [
        ("train_full_1p.sh", "begins: measures", "performance = true"),
        ("train_performance_1p.sh", "begins: trains", "performance = false"),
        ("train_full_8p.sh", "goes on: evaluates", "has evaluate"),
    ],
)
def test_a_file_of_flags_that_makes_another_run_than_the_wrappers_is_refused(repo, wrapper, start, says):
    done = repo.run(wrapper, "--", "--config", "run.toml", RUN=start)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert not repo.record.exists(), "nothing was started"
    for kind, other in (("full", "trains"), ("performance", "measures")):
        assert repo.run(f"train_{kind}_1p.sh", "--", "--config", "a", RUN=f"begins: {other}").returncode == 0


def test_a_restart_without_flags_of_the_users_and_one_of_a_performance_run(repo):
    _, starts = run_starts(repo, "train_full_1p.sh", "--restarts=1", starts="6,0")
    assert starts[1] == [*starts[0], "--", "--resume=auto"]
    done, starts = run_starts(repo, "train_performance_1p.sh", "--restarts=1", "--", "-p", "3", starts="6,0")
    assert starts[1] == starts[0], "it leaves no state"
    assert done.returncode == 0


def test_a_step_that_was_done_twice_has_one_loss_even_if_it_is_no_number(repo):
    line = "[cpu id: 0 ] Epoch: [0][ {}/3]\tTime  0.100 ( 0.100)\tData  0.000 ( 0.000)\tLoss {} (7.0000e+00)\n"
    first = line.format(1, "3.0000e+00") + line.format(2, "2.0000e+00")
    second = "run: processes=1 batch=8\n" + line.format(2, "2.5000e+00") + line.format(3, "nan")
    texts = first + "|" + second + "* FPS@all 10.0\nBLEU score = 1.0"
    done, _ = run_starts(repo, "train_full_1p.sh", "--restarts=1", starts="6,0", texts=texts)
    assert done.returncode == 0, done.stderr
    (losses,) = repo.output().glob("*_loss.txt")
    assert losses.read_text().split() == ["3.0000e+00", "2.5000e+00", "nan"]
    (result,) = repo.runs()[0].glob("*.json")
    assert json.loads(result.read_text())["ActualLoss"] is None


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "99999", "1 "])
def test_a_number_of_restarts_that_is_none_is_an_error(repo, value):
    assert is_usage_error(repo.run("train_full_1p.sh", f"--restarts={value}"))
    assert not repo.record.exists()


def test_an_interrupted_run_is_not_started_again(repo):
    behaviour = WAITING.replace("128 + number", "6")
    with repo.started("train_full_1p.sh", "--restarts=3", behaviour=behaviour) as process:
        os.kill(process.pid, signal.SIGTERM)
        stdout, _ = process.communicate(timeout=30)
        assert process.returncode == 143
    assert "restart" not in stdout


# Arguments that the program refuses, and the files of a clone


def test_a_bad_argument_touches_nothing(repo):
    """Kind P: it emptied the log of the run before, and set its result aside."""
    assert repo.run("train_full_1p.sh").returncode == 0
    before = repo.files()
    assert len(before) == 3
    done = repo.run("train_full_1p.sh", "--epochs=abc", REFUSES="error[usage]: no number; --epochs; give one")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error[usage]: no number; --epochs; give one\n"
    assert repo.files() == before


def test_the_scripts_of_a_windows_clone_run(tmp_path):
    """Kind F. Without .gitattributes, git gives them lines that end in CR LF there, and bash dies of them."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
    if not shutil.which("git"):
        pytest.skip("needs git")
    for kept in (False, True):
        origin, clone = tmp_path / f"origin {kept}", tmp_path / f"clone {kept}"
        shutil.copytree(ROOT / "test", origin / "test", ignore=lambda folder, names: {"unit", "output", "simulation"})
        if kept:
            shutil.copy(ROOT / ".gitattributes", origin)
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], cwd=origin, check=True, capture_output=True)
        subprocess.run([*git, "clone", "-q", origin, clone], check=True, capture_output=True)
        for wrapper in WRAPPERS:
            script = clone / "test" / wrapper
            assert (b"\r" in script.read_bytes()) != kept, "the fault"
            done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
            assert (done.returncode == 0) == kept


# The real program

needs_program = pytest.mark.skipif(not (ROOT / "train_8p.py").exists(), reason="needs train_8p.py")


@pytest.fixture
def real(tmp_path):
    """Runs the real wrappers on a tiny corpus in a folder of its own. Gives back the process and its result files."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, count in (("train", 96), ("val", 8), ("test", 8)):
        for language in ("de", "en"):
            (source,) = [*ROOT.glob(f"sample/{split}.{language}"), *ROOT.glob(f"sample/*/{split}.{language}")]
            lines = source.read_text(encoding="utf-8").split("\n")[:count]
            (corpus / f"{split}.{language}").write_text("\n".join([*lines, ""]), encoding="utf-8")
    # A number that nobody uses, so that the output of the user's own runs is left alone.
    device_id = str(900000 + os.getpid())
    output = ROOT / "test" / "output" / device_id

    def run(wrapper, *arguments, timeout=300):
        env = dict(os.environ) | {"PYTHON": sys.executable, "ASCEND_DEVICE_ID": device_id, "OMP_NUM_THREADS": "1"}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            ["bash", str(ROOT / "test" / wrapper), *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return done, output

    yield run
    shutil.rmtree(output, ignore_errors=True)


NEW_KEYS = ["CompileTime", "Precision", "OptLevel", "Device", "Recipe", "Seed", "Epochs", "DataFingerprint", "Commit"]
NEW_KEYS += ["DeviceName"]
RESULT_KEYS = ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime", "ActualLoss"]


def check_real_run(done, output, *, ranks, kind, processes=None):
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob(f"{NETWORK}_bs*_{ranks}p_{kind}.log")
    results = key_values(path)
    assert list(results) == RESULT_KEYS + ["TrainAccuracy"] * (kind == "acc") + ["E2ETrainingTime", *NEW_KEYS]
    assert results["RankSize"] == str(processes or ranks)
    assert float(results["ActualFPS"]) > 0
    assert float(results["ActualLoss"]) > 0
    *last, where = done.stdout.splitlines()[-5 if kind == "acc" else -4 :]
    assert last[0] == "------------------ Final result ------------------"
    assert last[1] == f"Final Performance images/sec : {results['ActualFPS']}"
    assert last[-1] == f"E2E Training Duration sec : {results['E2ETrainingTime']}"
    losses = (output / f"train_{results['CaseName']}_loss.txt").read_text().split()
    assert losses[-1] == results["ActualLoss"]
    assert 0 < float(results["CompileTime"]) < 300
    assert re.fullmatch("[0-9a-f]{12}", results["DataFingerprint"])
    assert results["Commit"] == commit_of(ROOT)
    assert results["Device"] == "cpu" and " CPU, " in results["DeviceName"]
    folder = Path(where.removeprefix("results: "))
    content = json.loads((folder / f"{results['CaseName']}_{results['Precision']}.json").read_text())
    assert [figures["epoch"] for figures in content["FiguresByEpoch"]] == list(range(1, content["Epochs"] + 1))
    for figures in content["FiguresByEpoch"]:
        assert figures["pairs_per_second"] > 0 and figures["train_loss"] > 0
        assert kind == "perf" or figures["free_running_loss"] > 0
    read = as_the_modelzoo_reads(done.stdout, output, results)
    expected = {key: results[key] for key in ("ActualFPS", "ActualLoss", "E2ETrainingTime", "CompileTime", "CaseName")}
    assert read.items() >= expected.items()
    assert read["losses"].split() == losses
    assert read.get("TrainAccuracy") == read.get("BLEU of the log") == results.get("TrainAccuracy")


# What the published wrappers of the ModelZoo grep in their logs, and what tools grep in a wrapper's output and results.
GREPS = """
set -eu
last() { grep -a "$1" "$2" | awk '{ print $NF }' | awk 'END { print }'; }
echo "ActualFPS=$(last 'Final Performance images/sec' "$OUT")"
echo "E2ETrainingTime=$(last 'E2E Training Duration sec' "$OUT")"
if grep -q 'Final Train Accuracy' "$OUT"; then
    echo "TrainAccuracy=$(grep 'Final Train Accuracy' "$OUT" | awk -F ' : ' '{ print $2 }')"
    echo "BLEU of the log=$(grep -a 'BLEU' "$LOG" | awk 'END { print $4 }')"
fi
echo "FPS of the log=$(last FPS "$LOG")"
echo "losses=$(grep Epoch "$LOG" | awk -F Loss '{ print $2 }' | awk '{ print $1 }' | tr '\\n' ' ')"
echo "Time of the log=$(grep -a Epoch "$LOG" | head -n 2 | awk -F Time '{ sum += $2 } END { print sum }')"
for key in Network RankSize BatchSize DeviceType CaseName TrainingTime ActualLoss CompileTime; do
    echo "$key=$(grep "^$key = " "$RESULT" | awk -F ' = ' '{ print $2 }')"
done
"""


def as_the_modelzoo_reads(stdout, output, results):
    """What a tool finds that reads a wrapper's output as those of the ModelZoo are read, by name."""
    (output / "shown").write_text(stdout)
    (log,) = output.glob("train_*.log")
    env = {"OUT": str(output / "shown"), "LOG": str(log), "RESULT": str(output / f"{results['CaseName']}.log")}
    done = subprocess.run(["bash", "-c", GREPS], env=os.environ | env, capture_output=True, text=True, timeout=60)
    (output / "shown").unlink()
    assert (done.returncode, done.stderr) == (0, "")
    read = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert float(read["FPS of the log"]) > 0 and float(read["Time of the log"]) >= 0
    assert all(read.values())
    return read


@needs_program
def test_a_real_full_run_ends_with_its_results_and_a_checkpoint_in_the_callers_folder(real, tmp_path):
    done, output = real("train_full_1p.sh", "--data_path=corpus", "--epochs=1", "--batch_size=16", "--device=cpu")
    check_real_run(done, output, ranks=1, kind="acc")
    assert (tmp_path / "seq2seq-gru-model.pth.tar").exists()


@needs_program
@pytest.mark.slow
def test_a_real_performance_run_ends_with_its_results_and_no_error_before_training_touches_them(real, tmp_path):
    """The user's flags win. A wrong folder and an absent device moved the last results aside."""
    arguments = ["--data_path", "corpus", "--batch_size=32", "--device=cpu"]
    done, output = real("train_performance_1p.sh", *arguments, "--", "--batch-size=16")
    check_real_run(done, output, ranks=1, kind="perf")
    assert (output / f"{NETWORK}_bs16_1p_perf.log").exists()
    assert not list(tmp_path.glob("*.pth.tar*"))
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name != ".lock"}
    assert len(before) == 3
    for faulty, code, kind in (
        (["--data_path=no/such", "--device=cpu"], 3, "data"),
        ([*arguments, "--device_list=999"], 2, "usage"),
        ([*arguments, "--", "--src-lang=fr"], 3, "data"),
    ):
        done, _ = real("train_performance_1p.sh", *faulty)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error[{kind}]: ")
        assert {path.name: path.read_bytes() for path in output.iterdir() if path.name in before} == before
    assert len(list((output / "runs").iterdir())) == 4


@needs_program
@pytest.mark.parametrize(
    "arguments", [["--batch_size=-1"], ["--epochs=abc"], ["--", "--lr", "nan"], ["--", "--no-flag"]]
)
def test_a_real_usage_error_is_the_wrappers_only_line(real, arguments):
    """Kind P."""
    done, output = real("train_full_1p.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error[usage]: ") and done.stderr.count("\n") == 1
    assert not output.exists()


@needs_program
@pytest.mark.slow
def test_without_a_data_path_the_sample_is_used_and_a_line_says_so(real):
    done, output = real("train_performance_1p.sh", "--device=cpu")
    check_real_run(done, output, ranks=1, kind="perf")
    assert "sample" in done.stdout


@needs_program
@pytest.mark.slow
def test_a_real_full_run_of_eight_processes_ends_with_its_results(real):
    arguments = ["--data_path=corpus", "--epochs=2", "--batch_size=16", "--device=cpu"]
    done, output = real("train_full_8p.sh", *arguments, timeout=600)
    check_real_run(done, output, ranks=8, kind="acc")


@needs_program
@pytest.mark.slow
def test_a_real_performance_run_takes_the_listed_devices(real):
    arguments = ["--data_path=corpus", "--batch_size=16", "--device=cpu", "--device_list=0,1", "--profiling=True"]
    done, output = real("train_performance_8p.sh", *arguments, timeout=600)
    check_real_run(done, output, ranks=8, kind="perf", processes=2)
    assert list(output.glob("runs/*/profile/*"))


@needs_program
@pytest.mark.slow
def test_a_real_performance_run_of_eight_processes_ends_with_its_results(real):
    done, output = real("train_performance_8p.sh", "--data_path=corpus", "--device=cpu", timeout=600)
    check_real_run(done, output, ranks=8, kind="perf")
