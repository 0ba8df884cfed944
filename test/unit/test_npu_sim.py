"""The simulated NPU itself: that it does what it must do, and refuses what a real one refuses.

The checks are functions in `npu_sim/checks`. Each file runs in one process, or in two as ranks.
"""

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest

CHECKS = harness.SIMULATION / "checks"


def checks(name: str, decorator: str) -> list[str]:
    """The names of the checks in `CHECKS/name`.py that have this decorator, in order."""
    tree = ast.parse((CHECKS / f"{name}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d).partition("(")[0] == decorator for d in f.decorator_list)]


def python(*arguments: object, **extra: str) -> subprocess.CompletedProcess:
    """Runs Python with the simulated NPU."""
    return harness.run(sys.executable, *arguments, **extra)


def results(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The JSON of a process's last line."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # the scaler prints, too


@pytest.fixture(scope="module", autouse=True)
def built():
    harness.ensure_built()


@pytest.fixture(scope="module")
def operators(built):
    return results(python(CHECKS / "operators.py"))


@pytest.fixture(scope="module")
def ranks(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with ThreadPoolExecutor(2) as pool:
        return list(map(results, pool.map(lambda rank: python(CHECKS / "collectives.py", rank, folder), range(2))))


@pytest.mark.parametrize("claim", checks("operators", "works"))
def test_one_process(operators, claim):
    assert operators[claim] == ""


@pytest.mark.parametrize("claim", checks("operators", "refused"))
def test_one_process_is_refused(operators, claim):
    assert operators[claim] == ""


@pytest.mark.parametrize("claim", checks("collectives", "works"))
def test_two_ranks(ranks, claim):
    assert [rank[claim] for rank in ranks] == ["", ""]


@pytest.mark.parametrize("claim", checks("collectives", "refused"))
def test_two_ranks_are_refused(ranks, claim):
    assert [rank[claim] for rank in ranks] == ["", ""]


FAULTS = {
    "no-cann": "ImportError: libhccl.so: cannot open shared object file: No such file or directory",
    "bad-home": "Exception: the folder of ASCEND_HOME_PATH, .* does not exist",
    "cuda-build": "RuntimeError: torch_npu does not work with a CUDA build of torch",
    "other-version": "ImportError: libtorch_npu.so: undefined symbol: .*\n.*another version of torch",
}


@pytest.fixture(scope="module")
def broken_torch():
    """By fault, what `import torch` writes to standard error."""
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda fault: python("-c", "import torch", NPU_SIM_FAULT=fault).stderr, FAULTS)
        return dict(zip(FAULTS, said, strict=True))


@pytest.fixture(scope="module")
def broken_torch_npu():
    """By fault, the error of `import torch_npu` in a process that has torch."""
    code = """if True:
        import json, os, sys
        import torch

        said = {}
        for fault in sys.argv[1:]:
            os.environ["NPU_SIM_FAULT"] = fault
            try:
                import torch_npu
            except Exception as error:
                said[fault] = f"{type(error).__name__}: {error}"
        print(json.dumps(said))
    """
    return results(python("-c", code, *FAULTS, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_installation_breaks_import_torch(broken_torch, fault):
    assert re.search(f"^{FAULTS[fault]}", broken_torch[fault], re.MULTILINE)
    last = broken_torch[fault].splitlines()[-1]
    assert last.startswith("RuntimeError: Failed to load the backend extension: torch_npu.")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_installation_breaks_import_torch_npu_alone_without_autoload(broken_torch_npu, fault):
    assert re.match(FAULTS[fault], broken_torch_npu[fault])


def test_without_devices_only_their_use_fails():
    # torch_npu first: torch, which it imports, must not trip over it.
    code = """if True:
        import torch_npu
        import torch

        print(torch.npu.is_available(), torch.npu.device_count(), torch.accelerator.current_accelerator())
        torch.manual_seed(1)
        torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
        for use in (lambda: torch.ones(2, device="npu"), lambda: torch.autocast("npu", enabled=False)):
            try:
                use()
            except RuntimeError as error:
                print(error)
    """
    done = python("-c", code, NPU_SIM_DEVICES="0")
    assert done.stdout.splitlines() == ["False 0 npu", *["No NPU devices are available"] * 2], done.stderr


def test_this_process_cannot_import_it():
    assert str(harness.SIMULATION) not in map(os.path.abspath, sys.path)
