"""The program on the simulated NPU (npu_sim/README.md), in processes of its own: the code that runs on Ascend, run.

It proves the path: placing, precision, collectives. It proves no kernel, no speed, and none of HCCL's own behaviour.
"""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from bench import logs

import pytest
from conftest import REPOSITORY, write_corpus
from harness import SIMULATION, ensure_built, environment, run

DEADLINE = 180
ON_NPU = "--emb-dim 16 --hid-dim 24 --device npu -b 16 --print-freq 1".split()


@pytest.fixture(scope="module", autouse=True)
def simulation():
    ensure_built()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("npu") / "corpus", 64)


def train(*flags: object, cwd, program=REPOSITORY / "train_8p.py", **extra: str) -> subprocess.CompletedProcess:
    return run(sys.executable, program, *ON_NPU, *flags, cwd=cwd, **extra)


# ---------------------------------------------------------------- several devices


@pytest.fixture(scope="module")
def spawned(corpus, tmp_path_factory):
    """A run on the devices 4 and 5 in O2: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("spawned")
    devices = ("--multiprocessing-distributed", "--device-list", "4,5")
    done = train(*devices, "--data-dir", corpus, "--amp", "--epochs", 2, "--dist-timeout", 150, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_npus_train_in_float16_with_masters_and_a_static_scale(spawned):
    _, out = spawned
    assert " torch_npu=2.13.0" in out
    facts = logs.parse(out).facts
    said = {name: facts[name] for name in ("device", "processes", "precision", "amp_backend", "loss_scale")}
    assert list(said.values()) == ["npu", "2", "float16/O2", "native", "32.0"]
    losses = [
        float(line["loss"]) for line in logs.STEP.finditer(out) if (line["device"], line["index"]) == ("npu", "4")
    ]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_the_log_says_how_the_ranks_meet_and_how_long_hccl_waits(spawned):
    limits = "timeout 150 s; HCCL_CONNECT_TIMEOUT=150; HCCL_EXEC_TIMEOUT=150"
    assert f"device: Simulated NPU; 2 ranks by hccl, {limits}\n" in spawned[1]


def test_a_checkpoint_of_an_npu_is_scored_on_a_cpu(spawned, corpus):
    folder, out = spawned
    bleu = logs.parse(out).final["BLEU score"]
    program = [sys.executable, REPOSITORY / "train_8p.py", "--device", "cpu", "--data-dir", corpus]
    done = subprocess.run(
        [*program, "--evaluate", "seq2seq-gru-model.pth.tar"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert logs.parse(done.stdout).final["BLEU score"] == bleu


def test_under_torchrun_each_process_takes_its_device_of_the_list(corpus, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, REPOSITORY / "train_8p.py")
    flags = ("--data-dir", corpus, "--amp", "--performance", "--device-list", "4,5")
    done = run(sys.executable, *torchrun, *ON_NPU, *flags, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "[npu id: 4 ] Epoch: " in done.stdout
    assert " processes=2 " in done.stdout


def test_two_nodes_meet_at_the_first_ones_address(corpus, tmp_path):
    meeting = f"--multiprocessing-distributed --world-size 2 --dist-url tcp://127.0.0.1:{free_port()}".split()

    def node(rank: int) -> subprocess.CompletedProcess:
        own = ("--rank", rank, "--device-list", rank)
        return train(*meeting, *own, "--data-dir", corpus, "--performance", cwd=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(node, range(2))
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert " processes=2 nodes=2 batch=32 " in first.stdout
    assert logs.RATE.search(first.stdout)
    assert "FPS@all" not in second.stdout + second.stderr, "rank 0 alone writes the log"


def free_port() -> int:
    """One that the system does not give away by itself before the two nodes are there."""
    for port in random.sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


# ---------------------------------------------------------------- every precision

SEVERAL_RUNS = """
import json, sys
import train_8p
from nmt.errors import run_main

for flags in json.loads(sys.argv[1]):
    print("flags", *flags, flush=True)
    print("exit code", run_main(train_8p.main, flags), flush=True)
"""
LEVELS = {
    "float32/O0 amp_backend=native loss_scale=1.0": [],
    "float16/O1 amp_backend=native loss_scale=32.0": ["--amp", "--opt-level", "O1"],
    "float16/O2 amp_backend=native loss_scale=dynamic": ["--amp", "--amp-backend", "native", "--loss-scale", "dynamic"],
    "float16/O3 amp_backend=native loss_scale=1.0": ["--amp", "--amp-backend", "native", "--opt-level", "O3"],
    "float16/O2 amp_backend=apex loss_scale=32.0": ["--amp"],
}


@pytest.fixture(scope="module")
def levels(corpus, tmp_path_factory):
    """The output of a run in each precision, one after the other in one process, with the fake apex on the path."""
    folder = tmp_path_factory.mktemp("levels")
    common = [*ON_NPU, "--data-dir", str(corpus), "--epochs", "4", "--teacher-forcing-ratio", "0.5", "--lr", "0.02"]
    runs = [[*common, *flags] for flags in LEVELS.values()]
    paths = os.pathsep.join(map(str, [SIMULATION, REPOSITORY, REPOSITORY / "test" / "simulation" / "fake_apex"]))
    done = run(sys.executable, "-c", SEVERAL_RUNS, json.dumps(runs), cwd=folder, PYTHONPATH=paths)
    return dict(zip(LEVELS, done.stdout.split("flags ")[1:], strict=True)), done.stderr


@pytest.mark.parametrize("name", LEVELS)
def test_every_precision_trains_and_scores_on_an_npu(levels, name):
    outputs, err = levels
    out = outputs[name]
    assert "exit code 0" in out, err
    assert f" precision={name} " in out
    assert "BLEU score" in logs.parse(out).final
    losses = [epoch.train_loss for epoch in logs.parse(out).epochs]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    assert "changed no weight" not in out or "dynamic" in name


# ---------------------------------------------------------------- bad installations

# One process imports torch, which takes most of the time, and forks for each case before anything touches an NPU.
FORKS = """
import contextlib, io, json, os, sys
import numpy, sacrebleu, torch, torchtext.data.metrics, torchtext.vocab, tqdm

for number, (environment, path, arguments) in enumerate(json.load(open("cases.json"))):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(f"{number}.code", "w") as file:
            file.write(str(code))
        continue
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY, 0o666), descriptor)
    os.environ.update(environment)
    sys.path[:0] = path
    if arguments:
        import train_8p
        from nmt import errors
        code = errors.run_main(train_8p.main, arguments)
    else:
        from nmt import devices, errors
        print(devices.choose_device_type("auto"))
        code = errors.run_main(devices.choose_device_type, "npu")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""
INSTALLATIONS = {
    "no-cann": ({"NPU_SIM_FAULT": "no-cann"}, "ImportError: libhccl.so: cannot open shared object file"),
    "bad-home": ({"NPU_SIM_FAULT": "bad-home"}, "Exception: the folder of ASCEND_HOME_PATH"),
    "cuda-build": ({"NPU_SIM_FAULT": "cuda-build"}, "RuntimeError: torch_npu does not work with a CUDA build"),
    "other-version": ({"NPU_SIM_FAULT": "other-version"}, "undefined symbol"),
    "no-npu": ({"NPU_SIM_DEVICES": "0"}, "torch_npu finds no NPU"),
    "wrong-order": ({"ASCEND_RT_VISIBLE_DEVICES": "3,1"}, "ASCEND_RT_VISIBLE_DEVICES is '3,1'"),
}
GRU_INPUT = "inputs = torch.cat((inputs, context_gates.expand(len(rows_per_step), -1, -1)), dim=2)"
BREAKS = {  # module, our care, without it, what the simulation says
    "batch-elsewhere": (
        "data.py",
        "return tensor.pin_memory().to(self._device, non_blocking=True)",
        "return tensor",
        "Expected all tensors to be on the same device",
    ),
    "model-elsewhere": ("train_8p.py", "    model.to(device)\n", "", "Expected all tensors to be on the same device"),
    "bfloat16": (
        "nmt/precision.py",
        "copy.deepcopy(model).to(choice.dtype)",
        "copy.deepcopy(model).bfloat16()",
        "GRU kernel takes float16 or float32, not BFloat16",
    ),
    "two-dtypes": (
        "nmt/kernels.py",
        GRU_INPUT,
        f"{GRU_INPUT}; hidden = None if hidden is None else hidden.float()",
        "one dtype",
    ),
}
SPLIT_READ = 'return Split(side("src"), side("trg"), src_tokens, trg_tokens)'
WRONG_IDS = SPLIT_READ.replace('side("trg")', 'Side(side("trg").ids + 1_000_000, side("trg").offsets)')
SET_DEVICE = "getattr(torch, device.type).set_device(device.index)"


def broken_code(folder, module: str, care: str, without: str):
    """A copy of the program in which `care` is replaced."""
    folder.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(REPOSITORY / "nmt", folder / "nmt")
    text = (folder / module).read_text()
    assert text.count(care) == 1
    (folder / module).write_text(text.replace(care, without))
    return folder


@pytest.fixture(scope="module", autouse=True)
def forking(simulation, corpus, tmp_path_factory):
    """The process that runs all cases, their names, and the folder of what they leave. It has a core of its own while
    the tests above run, which mostly wait for a rank."""
    folder = tmp_path_factory.mktemp("forked")
    short = [*ON_NPU, "--data-dir", str(corpus), "--performance", "--amp"]
    on_cpu = [flag if flag != "npu" else "auto" for flag in short]
    paths, own = str(SIMULATION), str(REPOSITORY)
    cases = {name: (extra, [paths, own], []) for name, (extra, _) in INSTALLATIONS.items()}
    cases["absent"] = ({}, [own], [])
    for name in ("no-cann", "no-npu", "wrong-order"):
        cases[f"{name}: on the CPU"] = (INSTALLATIONS[name][0], [paths, own], on_cpu)
    for name, (module, care, without, _) in BREAKS.items():
        cases[name] = ({}, [paths, str(broken_code(folder / name, module, care, without))], short)
    wrong_ids = broken_code(folder / "ids-outside", "data.py", SPLIT_READ, WRONG_IDS)
    cases["ids-outside"] = ({}, [paths, str(wrong_ids)], short)
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    variables = {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], cwd=folder, env=environment(**variables), stderr=subprocess.PIPE, text=True
    )
    yield process, list(cases), folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def forked(forking):
    """By name: exit code, output and errors of each case."""
    process, names, folder = forking
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return {
        name: (
            int((folder / f"{i}.code").read_text()),
            *((folder / f"{i}.{end}").read_text() for end in ("out", "err")),
        )
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize("name", [*INSTALLATIONS, "absent"])
def test_a_bad_installation_is_passed_over_and_named_to_who_asks_for_an_npu(forked, name):
    code, out, err = forked[name]
    assert (code, out) == (2, "cpu\n"), err
    assert err.startswith("error[usage]: no npu here: ")
    assert INSTALLATIONS.get(name, ({}, "No module named 'torch_npu'"))[1] in err
    assert ("unset ASCEND_RT_VISIBLE_DEVICES" in err) is (name == "wrong-order")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["no-cann", "no-npu", "wrong-order"])
def test_the_program_trains_on_the_cpu_beside_an_npu_that_cannot_be_used_and_says_why(forked, name):
    code, out, err = forked[f"{name}: on the CPU"]
    assert code == 0, err
    assert "run: device=cpu " in out
    note = re.search("^note: torch_npu is installed, but there is no NPU to run on: (.*); running on cpu$", out, re.M)
    assert INSTALLATIONS[name][1] in note[1]


def test_a_bad_installation_does_not_reach_torch(corpus, tmp_path):
    """Without the care for autoloading, `import torch` itself fails."""
    done = train("--data-dir", corpus, cwd=tmp_path, NPU_SIM_FAULT="no-cann")
    assert done.returncode == 2
    assert done.stderr.startswith("error[usage]: no npu here: ImportError: libhccl.so")
    assert done.stderr.count("\n") == 1


def test_a_bad_installation_does_not_reach_a_module_that_is_used_alone(tmp_path):
    extra = {"PYTHONPATH": os.pathsep.join(map(str, [SIMULATION, REPOSITORY])), "NPU_SIM_FAULT": "no-cann"}
    modules = ["gru", "data", "nmt.checkpoint"]
    with ThreadPoolExecutor(len(modules)) as pool:
        runs = pool.map(lambda name: run(sys.executable, "-c", f"import {name}", cwd=tmp_path, **extra), modules)
    assert {name: done.stderr for name, done in zip(modules, runs, strict=True)} == dict.fromkeys(modules, "")


# ---------------------------------------------------------------- what would go unseen without the simulation


@pytest.mark.parametrize("name", BREAKS)
def test_code_without_its_care_for_the_npu_fails(forked, name):
    code, _, err = forked[name]
    assert code == 1
    assert BREAKS[name][-1] in err


def test_ids_outside_the_vocabulary_end_the_run_before_an_npu_gets_them(forked):
    code, _, err = forked["ids-outside"]
    assert code == 3
    assert re.match(r"error\[data\]: token id \d{7}, but the vocabulary has \d+ words; the cached ids of train; ", err)


def test_code_that_forgets_set_device_fails(corpus, tmp_path):
    code = broken_code(tmp_path / "code", "nmt/devices.py", SET_DEVICE, "pass")
    devices = ("--multiprocessing-distributed", "--device-list", "0,1")
    done = train("--data-dir", corpus, "--performance", *devices, cwd=tmp_path, program=code / "train_8p.py")
    assert done.returncode == 6
    assert "Call torch.npu.set_device(local_rank)" in done.stderr


# ---------------------------------------------------------------- the wrappers


@pytest.mark.slow
def test_the_full_wrapper_trains_the_sample_on_eight_npus(tmp_path):
    wrapper = REPOSITORY / "test" / "train_full_8p.sh"
    extra = {"PYTHON": sys.executable, "ASCEND_DEVICE_ID": "90"}
    flags = (f"--data_path={REPOSITORY / 'sample'}", "--epochs=2", "--device=npu")
    done = run("bash", wrapper, *flags, cwd=tmp_path, deadline=1800, **extra)
    assert done.returncode == 0, done.stderr
    found = logs.parse(done.stdout)
    facts = [found.facts[name] for name in ("device", "processes", "precision", "loss_scale")]
    assert facts == ["npu", "8", "float16/O2", "32.0"]
    assert found.device.startswith("Simulated NPU; 8 ranks by hccl")
    results = {"Final Performance images/sec", "Final Train Accuracy", "E2E Training Duration sec"}
    assert results <= found.final.keys()
    accuracy = float(found.final["Final Train Accuracy"])
    assert accuracy > 1
    program = [sys.executable, REPOSITORY / "train_8p.py", "--device", "cpu"]
    scored = run(*program, "--evaluate", "seq2seq-gru-model.pth.tar", cwd=tmp_path, deadline=300)
    bleu = float(logs.parse(scored.stdout).final["BLEU score"])
    assert bleu == pytest.approx(accuracy, abs=0.5)


@pytest.mark.slow
def test_the_performance_wrapper_measures_one_npu(tmp_path):
    wrapper = REPOSITORY / "test" / "train_performance_1p.sh"
    extra = {"PYTHON": sys.executable, "ASCEND_DEVICE_ID": "91"}
    flags = ("--device=npu", "--batch_size=64")
    done = run("bash", wrapper, *flags, cwd=tmp_path, deadline=900, **extra)
    assert done.returncode == 2 and "ASCEND_DEVICE_ID" in done.stderr.splitlines()[-1], "there is no NPU 91"
    done = run("bash", wrapper, *flags, "--device_list=3", cwd=tmp_path, deadline=900, **extra)
    assert done.returncode == 0, done.stderr
    assert "[npu id: 3 ] Epoch: " in done.stdout
    found = logs.parse(done.stdout)
    assert (found.facts["device"], found.facts["processes"]) == ("npu", "1")
    assert re.fullmatch(r"\d+\.\d\d", found.final["Final Performance images/sec"])
