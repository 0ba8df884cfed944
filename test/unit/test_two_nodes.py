"""Two machines: torchrun's agents in two network namespaces, which meet over a virtual cable.

The nodes have one file system, as the nodes of a cluster that share a folder. Where namespaces cannot be made, the
tests are skipped: they need Linux, root and `ip`.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import train_8p
from bench import tables

import pytest
import torch
from conftest import REPOSITORY, SMALL, eventually, gone, heed_signals, write_corpus
from torch.distributed import run

DEADLINE = 400
PROGRAM = str(REPOSITORY / "test" / "unit" / "hashing.py")
COMMON = [*SMALL, "-p", "1", "--beam-size", "2", "--workers", "1"]
ADDRESSES = ("10.213.71.1", "10.213.71.2")
PORT = 29517
INTERFACE = "veth-node"

pytestmark = pytest.mark.usefixtures("no_launcher")


@dataclass(frozen=True)
class Node:
    """A machine of its own, as far as the network is concerned.

    Attributes:
        name: of its namespace.
        address: on the cable to the other one.
    """

    name: str
    address: str

    def start(self, log: Path, *command: str, **variables: str) -> subprocess.Popen:
        """Runs a command there, in a session of its own. Both outputs go to the end of the file `log`."""
        with log.open("a") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=log.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE} | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def pids(self) -> list[int]:
        """The processes that run there."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> list[int]:
        """SIGKILL for all that runs there: the agent, its workers and their helpers. Returns their ids."""
        killed = self.pids()
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        return killed


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with a cable between them. They know no other network."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command ip (iproute2), to make network namespaces")
    made = tuple(Node(f"gru-{os.getpid()}-{i}", address) for i, address in enumerate(ADDRESSES))
    try:
        for node in made:
            ip("netns", "add", node.name)
        cable = [f"gru{os.getpid() % 10**7}{end}" for end in "ab"]
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for node, end in zip(made, cable, strict=True):
            ip("link", "set", end, "netns", node.name, "name", INTERFACE)
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                ip("-n", node.name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove(made)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        for node in made:
            node.kill()
        assert eventually(lambda: not any(node.pids() for node in made))
        remove(made)


def remove(nodes: tuple[Node, ...]) -> None:
    for node in nodes:  # its end of the cable goes with it, and so the other end
        subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


def agent(node: Node, log: Path, *flags: str, restarts: int = 2) -> subprocess.Popen:
    """torchrun on one of the two nodes, as docs/several-machines.md writes it, with short waits."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--max-restarts", str(restarts)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "test"]
    host = int(node.address == ADDRESSES[0])  # in a namespace torchrun does not recognise its own address
    waits = f"is_host={host},keep_alive_interval=1,keep_alive_max_attempt=2"
    launcher += ["--rdzv-conf", waits, "--monitor-interval", "0.1", "--local-addr", node.address]
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    flags = ("-b", "8", *flags)  # a node's share
    return node.start(log, sys.executable, *launcher, PROGRAM, *COMMON, *flags, **variables)


def on_two_nodes(nodes: tuple[Node, Node], folder: Path, *flags: str) -> str:
    """Trains there to the end, and returns node 0's log. Node 1 prints nothing of its own in it."""
    logs = [folder / f"node{number}.log" for number in range(2)]
    agents = [agent(node, log, *flags) for node, log in zip(nodes, logs, strict=True)]
    codes = [process.wait(timeout=DEADLINE) for process in agents]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return logs[0].read_text()


def on_one_node(folder: Path, *flags: str) -> str:
    """The same with two processes on one node, and no network namespace."""
    devices = ["--multiprocessing-distributed", "--device-list", "0,1"]
    command = [sys.executable, PROGRAM, *COMMON, "-b", "16", *devices, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(log: str) -> list[str]:
    """What must not depend on the nodes: the losses, hashes of weights and optimizer, scores and translations."""
    kept = re.findall(r"^(?:hash: |validation: |  model |test loss |greedy: |chrF = |BLEU score ).*$", log, re.M)
    steps = re.findall(r"Epoch: (\[\d+\]\[ *\d+/\d+\])\t.*\tLoss (\S+) ", log)
    return [*kept, *map(str, steps)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same_weights(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_commands_of_the_page_are_taken_and_its_count_is_the_models():
    """docs/several-machines.md. Of torchrun too: its flags are parsed by torchrun's own parser."""
    text = (REPOSITORY / "docs" / "several-machines.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line) for line in re.findall(r"^    (\S.*)$", text, re.M)]
    (by_torchrun,) = (line for line in lines if line[0] == "torchrun")
    parsed = run.parse_args(by_torchrun[1:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 3)
    assert parsed.training_script == "train_8p.py"
    commands = [line[2:] for line in lines if line[:2] == [".venv/bin/python", "train_8p.py"]] + [
        parsed.training_script_args
    ]
    settings = [vars(train_8p.build_parser().parse_args(words)) for words in commands]
    assert [(each["world_size"], each["rank"], each["resume"]) for each in settings] == [
        (2, 0, None),
        (2, 1, None),
        (-1, -1, "auto"),
    ]
    assert f"{tables.PARAMETERS:,} parameters" in text
    assert f"\nmodel: {tables.PARAMETERS:,} parameters\n" in tables.text_of("results/h200/performance.log")
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 " in text


def test_two_nodes_train_what_two_processes_on_one_node_train(nodes, tiny_corpus, tmp_path):
    flags = ["--data-dir", str(tiny_corpus), "--epochs", "2", "--ckptpath"]
    apart = on_two_nodes(nodes, tmp_path, *flags, str(tmp_path / "two.pth"))
    together = on_one_node(tmp_path, *flags, str(tmp_path / "one.pth"))
    assert " processes=2 nodes=2 " in apart and " processes=2 nodes=1 " in together
    assert len(told(together)) > 10
    assert told(apart) == told(together)
    assert same_weights(tmp_path / "two.pth", tmp_path / "one.pth")
    assert "node1" not in apart and "Epoch" not in (tmp_path / "node1.log").read_text(), "rank 0 alone writes the log"


def assert_same_end(log: str, quiet: str) -> None:
    """Of a run of three epochs."""
    final = [line for line in told(quiet) if line.startswith(("hash: epoch 2", "validation: epoch 3", "BLEU", "chrF"))]
    assert len(final) == 4
    assert [line for line in final if line not in told(log)] == []


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again_goes_on_to_the_weights_of_a_quiet_run(nodes, tmp_path):
    """Every process of node 1 dies, as with a power cut. Node 0's agent waits for it with a new meeting."""
    corpus = write_corpus(tmp_path / "corpus", 800)
    flags = ["--data-dir", str(corpus), "--epochs", "3", "--save-every", "0.0001", "--resume", "auto", "--ckptpath"]
    quiet = on_one_node(tmp_path, *flags, str(tmp_path / "quiet.pth"))
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    flags.append(str(tmp_path / "killed.pth"))
    first, second = (agent(node, log, *flags) for node, log in zip(nodes, logs, strict=True))
    assert eventually(lambda: "Epoch: [1][ 5/50]" in logs[0].read_text(), DEADLINE), logs[0].read_text()
    killed = nodes[1].kill()
    assert len(killed) >= 2 and eventually(lambda: gone(killed)), "an agent and a worker"
    second.wait(timeout=DEADLINE)
    before = logs[0].read_text()
    assert "BLEU score" not in before, "the fault came too late"
    again = agent(nodes[1], logs[1], *flags)
    assert [first.wait(timeout=DEADLINE), again.wait(timeout=DEADLINE)] == [0, 0], logs[0].read_text()
    log = logs[0].read_text()
    (step,) = re.findall(r"^resumed: \S+: (\d+) steps are done", log, re.M)
    assert 50 < int(step) < 150
    assert "not bit for bit" not in log
    assert_same_end(log, quiet)
    assert same_weights(tmp_path / "killed.pth", tmp_path / "quiet.pth")


@pytest.mark.slow
def test_a_run_whose_first_node_was_killed_goes_on_where_all_nodes_find_its_state(nodes, tmp_path):
    """The store was node 0's, so node 1 ends too. A node that does not find the state is told before a step is done."""
    corpus = write_corpus(tmp_path / "corpus", 200)
    flags = ["--data-dir", str(corpus), "--epochs", "3", "--save-every", "0.0001", "--resume", "auto", "--ckptpath"]
    quiet = on_one_node(tmp_path, *flags, str(tmp_path / "quiet.pth"))
    path, elsewhere = str(tmp_path / "killed.pth"), str(tmp_path / "elsewhere.pth")
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    first, second = (agent(node, log, *flags, path) for node, log in zip(nodes, logs, strict=True))
    assert eventually(lambda: "Epoch: [1][ 5/13]" in logs[0].read_text(), DEADLINE), logs[0].read_text()
    killed = nodes[0].kill()
    assert len(killed) >= 2 and eventually(lambda: gone(killed))
    first.wait(timeout=DEADLINE)
    assert second.wait(timeout=DEADLINE) != 0
    assert eventually(lambda: not nodes[1].pids()), "no worker is left"
    assert "BLEU score" not in logs[0].read_text(), "the fault came too late"

    logs = [tmp_path / f"refused{number}.log" for number in range(2)]
    paths = (path, elsewhere)
    refused = [agent(node, log, *flags, its, restarts=0) for node, log, its in zip(nodes, logs, paths, strict=True)]
    assert [process.wait(timeout=DEADLINE) != 0 for process in refused] == [True, True]
    for number, log in enumerate(logs):
        text = log.read_text()
        (error,) = re.findall(r"^error.*$", text, re.M)
        expected = r"error\[checkpoint\]: the ranks have different states of the run, or some have none; rank "
        assert re.match(f"{expected}{number}, .*; give each node the same file, under the same path", error)
        assert "Epoch: " not in text

    log = on_two_nodes(nodes, tmp_path, *flags, path)
    assert re.search(r"^resumed: \S+: \d+ steps are done", log, re.M) and "not bit for bit" not in log
    assert_same_end(log, quiet)
    assert same_weights(Path(path), tmp_path / "quiet.pth")
