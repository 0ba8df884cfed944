"""docker/: what can be told without Docker and without an NPU."""

import os
import re
import shlex
import subprocess

import pytest
from conftest import REPOSITORY

FILES = [REPOSITORY / "docker" / f"Dockerfile.{kind}" for kind in ("cpu", "npu")]
START = REPOSITORY / "docker" / "docker_start.sh"


@pytest.fixture
def machine(tmp_path):
    """A machine with two NPUs, and a docker that writes its arguments to a file."""
    for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    (tmp_path / "host/usr/local/Ascend/driver").mkdir(parents=True)
    (tmp_path / "host/usr/local/bin").mkdir()
    (tmp_path / "host/usr/local/bin/npu-smi").touch()
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {shlex.quote(str(tmp_path / 'arguments'))}\n")
    docker.chmod(0o755)
    return tmp_path


def start(machine, *arguments, **variables):
    paths = {"GRU_DEV_ROOT": str(machine), "GRU_HOST_ROOT": str(machine / "host")}
    path = f"{machine / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(START), *arguments],
        env=os.environ | paths | {"PATH": path} | variables,
        cwd=machine,
        capture_output=True,
        text=True,
        timeout=60,
    )


def arguments_of_docker(machine) -> list[str]:
    return (machine / "arguments").read_bytes().decode().split("\0")[:-1]


def test_the_container_gets_all_npus_the_driver_and_the_folders(machine):
    (machine / "my data").mkdir()
    (machine / "model $(x)").mkdir()
    hostile = ["bash", "-c", "echo 'a  b' $(touch x) *", "", "--", "-x", "two\nlines"]
    done = start(machine, "gru npu:1", "my data", "model $(x)", "--", *hostile)
    assert (done.returncode, done.stderr) == (0, "")
    words = arguments_of_docker(machine)
    assert words[0] == "run" and "--rm" in words
    assert words[-len(hostile) - 1 :] == ["gru npu:1", *hostile], "intact, and nothing ran"
    options = words[: -len(hostile) - 1]
    given = {f"{name} {value}" for name, value in zip(options, options[1:], strict=False) if name.startswith("--")}
    for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"):
        assert f"--device {machine}/dev/{name}:/dev/{name}" in given
    for path in ("/usr/local/Ascend/driver", "/usr/local/bin/npu-smi"):
        assert f"--volume {machine}/host{path}:{path}:ro" in given
    assert not any("/usr/local/dcmi" in option for option in given), "this machine has none"
    for folder in ("my data", "model $(x)"):
        assert f"--volume {machine}/{folder}:{machine}/{folder}" in given
    assert f"--workdir {machine}/model $(x)" in given


def test_an_image_alone_is_enough_and_one_npu_can_be_chosen(machine):
    assert start(machine, "image", ASCEND_DEVICES="1").returncode == 0
    words = arguments_of_docker(machine)
    assert words[-1] == "image" and "--workdir" not in words
    assert [word for word in words if "davinci" in word and "manager" not in word] == [
        f"{machine}/dev/davinci1:/dev/davinci1"
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ([], {}, "expected an image"),
        (["--", "bash"], {}, "expected an image"),
        (["a", "b", "c", "d"], {}, "expected an image"),
        (["-x"], {}, "'-x' is no image"),
        (["image", "nosuch\nfolder"], {}, "'nosuch?folder' is no folder"),
        (["image", "a:b"], {}, "has a colon"),
        (["image"], {"ASCEND_DEVICES": "0,1"}, "'0,1' is no index"),
        (["image"], {"ASCEND_DEVICES": "7"}, "davinci7 is missing"),
        (["image"], {"GRU_DEV_ROOT": "/nosuch"}, "this machine has no /nosuch/dev/davinci0"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_started(machine, arguments, variables, says):
    (machine / "a:b").mkdir()
    done = start(machine, *arguments, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("error[usage]: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (machine / "arguments").exists()


def test_a_driver_that_is_there_in_part_is_told(machine):
    (machine / "dev/hisi_hdc").unlink()
    done = start(machine, "image")
    assert done.returncode == 2 and "hisi_hdc is missing" in done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_is_made_of_files_that_are_there_and_complete(path):
    """What is installed and what the wrappers and the acceptance of a device read."""
    text = path.read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    missing = [name for name in copied if not (REPOSITORY / name).exists()]
    assert missing == []
    modules = {path.name for path in REPOSITORY.glob("*.py")}
    needed = modules | {"nmt", "test", "sample", "bench", "results", "url.ini", "pyproject.toml", "requirements.txt"}
    assert needed <= set(copied)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_names_no_address_and_takes_pips_by_arguments(path):
    text = path.read_text()
    assert "://" not in text
    before, base, after = text.partition("\nFROM ")
    assert base and {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} <= set(re.findall(r"^ARG (\w+)$", after, re.M))
    assert not re.search(r"^ENV PIP", text, re.M), "an address with a password would stay in the image"


def test_the_commands_are_readmes():
    readme = (REPOSITORY / "README.md").read_text()
    for path, requirements in zip(FILES, ("requirements.txt", "requirements-npu.txt"), strict=True):
        text = path.read_text()
        assert f"-q -r {requirements}" in text and requirements in readme
    command = ["bash", "test/train_full_1p.sh"]
    assert f"CMD {str(command).replace(chr(39), chr(34))}" in FILES[0].read_text()
    assert f"{' '.join(command)}\n" in readme


def test_what_was_not_run_says_so():
    for path in (FILES[0], FILES[1], START):
        assert re.search(r"^# .*Not (built|run)", path.read_text(), re.M | re.I), path
