"""Ranks: which ones the flags ask for, and that several ranks are one training.

The second part watches the real loop from outside while it runs in one and in two processes.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
import nmt.log
import train_8p
from nmt import devices, distributed, precision
from nmt.distributed import World, meeting_point, plan
from nmt.errors import run_main

import pytest
import torch
from conftest import REPOSITORY, SMALL, TEST_PATHS, choose_precision, parse, refused, write_corpus
from harness import SIMULATION, ensure_built, run

PAIRS, BATCH, EPOCHS = 9, 4, 4  # three steps an epoch, and no pair of the third for the second rank
DEADLINE = 120

pytestmark = pytest.mark.usefixtures("no_launcher")


# ---------------------------------------------------------------- from the flags to the ranks


def test_each_argument_of_a_plan_is_a_flag_with_the_same_default():
    parser = train_8p.build_parser()
    for name, parameter in inspect.signature(plan).parameters.items():
        assert parser.get_default(name) == parameter.default, name
        assert any(action.dest == name for action in parser._actions), name


@pytest.mark.parametrize(
    ("named", "todo"), [({"device": "npu"}, "try --device cpu"), ({"npu": 0}, "try --device cpu in the place of --npu")]
)
def test_each_flag_that_asks_for_an_npu_is_refused_where_there_is_none(monkeypatch, named, todo):
    """Row 36."""
    monkeypatch.setattr(devices, "NPU_IMPORT_ERROR", "ImportError: libhccl.so: cannot open shared object file")
    message = refused("usage", plan, **named)
    assert "libhccl.so" in message
    assert todo in message


def test_the_flag_gpu_is_refused_where_there_is_no_gpu(monkeypatch):
    """Row 36."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "try --device cpu in the place of --gpu" in refused("usage", plan, gpu=0)
    assert "try --device cpu" in refused("usage", plan, device="cuda")


@pytest.mark.parametrize(
    "flags",
    [{"multiprocessing_distributed": True, "device_list": [0, 99]}, {"device_list": [99]}, {"bleu_npu": 99}],
)
def test_a_device_that_is_not_there_is_refused(flags):
    """Row 35."""
    assert "99" in refused("usage", plan, device="cpu", **flags)


def test_the_flag_npu_is_named_where_its_index_is_beyond_the_visible_npus(monkeypatch):
    monkeypatch.setattr(devices, "npu_count", lambda: (4, ""))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    said = refused("usage", plan, npu=4, says=["no npu 4 here", "--npu"])
    assert "0 to 3, counted among those that are visible (ASCEND_RT_VISIBLE_DEVICES is '4,5,6,7')" in said


@pytest.mark.parametrize(("device", "backend"), [("cpu", "nccl"), ("npu", "gloo"), ("cuda", "hccl")])
def test_a_backend_of_another_device_is_refused(monkeypatch, device, backend):
    monkeypatch.setattr(devices, "device_count", lambda device_type: 8)
    assert f"{backend} does not work on {device}" in refused("usage", plan, device=device, dist_backend=backend)


@pytest.mark.parametrize(
    ("flags", "index"),
    [
        ({}, 0),
        ({"npu": 3}, 3),
        ({"device_list": [5, 4], "multiprocessing_distributed": True}, 5),
        ({"npu": 3, "bleu_npu": 1}, 1),
    ],
)
def test_what_scores_is_the_first_device_of_the_run(monkeypatch, flags, index):
    """Card 0 may be somebody else's."""
    monkeypatch.setattr(devices, "npu_count", lambda: (8, ""))
    made = plan(**flags)
    assert (made.device_type, made.scoring_index) == ("npu", index)


def test_one_device_for_several_processes_is_refused(torchrun):
    assert "--gpu" in refused("usage", plan, gpu=0)


def test_flags_that_name_different_devices_are_refused():
    refused("usage", plan, npu=0, gpu=0)
    refused("usage", plan, npu=0, device="cpu")


def test_a_batch_that_cannot_be_shared_out_is_refused():
    flags = {"device": "cpu", "multiprocessing_distributed": True, "device_list": [0, 1, 2], "batch_size": 64}
    message = refused("usage", plan, **flags)
    assert "64" in message
    assert "3" in message


def test_on_a_cpu_the_default_is_eight_processes_and_only_the_count_matters():
    made = plan(device="cpu", multiprocessing_distributed=True)
    assert (made.device_type, made.indices, made.spawns) == ("cpu", tuple(range(8)), True)
    worlds = plan(device="cpu", multiprocessing_distributed=True, device_list=[4, 5, 6, 7]).worlds
    assert [(world.rank, world.index, world.size) for world in worlds] == [(0, 4, 4), (1, 5, 4), (2, 6, 4), (3, 7, 4)]


def test_fewer_devices_than_asked_for_are_taken_with_a_notice(monkeypatch):
    monkeypatch.setattr(devices, "device_count", lambda device_type: 2)
    made = plan(device="cuda", multiprocessing_distributed=True, max_devices=8)
    assert (made.device_type, made.indices) == ("cuda", (0, 1))
    assert made.notes == ("this machine has 2 cuda devices, not 8: running on those",)


def test_no_more_devices_than_asked_for_are_taken():
    assert plan(device="cpu", multiprocessing_distributed=True, max_devices=2).indices == (0, 1)
    listed = plan(device="cpu", multiprocessing_distributed=True, device_list=[2, 1, 0], max_devices=2)
    assert listed.indices == (2, 1, 0)


def test_without_several_processes_one_device_is_taken_and_a_list_gets_a_notice():
    for device_list, index in ((None, 0), ([3], 3)):
        made = plan(device="cpu", device_list=device_list)
        assert (made.worlds, made.spawns, made.notes) == ((World(index=index),), False, ())
    made = plan(device="cpu", device_list=[3, 4])
    assert made.indices == (3,)
    assert made.notes == ("one process on device 3 alone; --multiprocessing-distributed takes the whole list",)


@pytest.mark.parametrize(
    ("flags", "indices"),
    [
        ({"device": "npu", "device_id": "3"}, (3,)),
        ({"device": "npu", "device_id": "npu:3"}, (3,)),
        ({"device": "cuda", "device_id": "3"}, (3,)),
        ({"device": "cuda", "device_id": "npu:3"}, (0,)),
        ({"device": "cpu", "device_id": "99"}, (0,)),
        ({"device": "npu", "device_id": "3", "device_list": [5]}, (5,)),
        ({"npu": 6, "device_id": "npu:3"}, (6,)),
        ({"device": "npu", "device_id": "99", "multiprocessing_distributed": True, "max_devices": 2}, (0, 1)),
    ],
)
def test_the_device_id_is_that_of_one_process_unless_another_flag_names_a_device(monkeypatch, flags, indices):
    monkeypatch.setattr(devices, "device_count", lambda device_type: 8)
    made = plan(**flags)
    assert made.indices == indices
    assert made.scoring_index == indices[0]


def test_a_device_id_that_is_not_there_is_refused_with_where_it_may_come_from(monkeypatch):
    monkeypatch.setattr(devices, "device_count", lambda device_type: 8)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    for value, where in (("8", "--device-id"), ("npu:8", "--device-id, or ASCEND_DEVICE_ID of a wrapper")):
        assert f"no npu 8 here; {where}; there is 0 to 7" in refused("usage", plan, device="npu", device_id=value)


def test_an_npu_that_is_passed_over_is_noted_on_rank_0(monkeypatch):
    monkeypatch.setattr(devices, "NPU_IMPORT_ERROR", "ImportError: libhccl.so\x1b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    why = r"torch_npu is installed, but there is no NPU to run on: ImportError: libhccl.so\x1b; running on cpu"
    assert plan().notes == (why,)
    assert plan(device="cpu").notes == (), "what the user asked for needs no note"
    assert plan(world_size=2, rank=1, dist_url="tcp://10.0.0.1:29500").notes == ()


def test_torchrun_decides_rank_and_size(torchrun):
    made = plan(device="cpu", multiprocessing_distributed=True, device_list=[4, 5])
    (world,) = made.worlds
    assert (world.rank, world.size, world.local_size, world.nodes, world.index) == (1, 2, 2, 1, 5)
    assert (made.spawns, made.indices, world.meeting) == (False, (4, 5), None)


def test_a_device_list_that_disagrees_with_torchrun_is_refused(torchrun):
    """Row 37."""
    assert "2 processes" in refused("usage", plan, device="cpu", device_list=[0, 1, 2])


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({"RANK": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"RANK": "1.0"}, "RANK"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "٢"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE"),
    ],
)
def test_a_launchers_variable_that_makes_no_sense_is_a_usage_error_that_names_it(
    torchrun, monkeypatch, variables, name
):
    """Kind I: it was a traceback."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    message = refused("usage", plan, device="cpu")
    assert message.startswith(f"error[usage]: {name} is ")
    assert f"; environment variable {name}; " in message


def test_a_launchers_variables_that_are_empty_are_not_set(no_launcher, monkeypatch):
    """Kind I: `RANK= WORLD_SIZE= ...`, as a template leaves them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    made = plan(device="cpu")
    assert (made.worlds, made.spawns, made.notes) == ((World(),), False, ())
    assert not distributed.under_torchrun()
    assert plan(device="cpu", multiprocessing_distributed=True, dist_url="env://").meeting == ("127.0.0.1", 0)


def test_pods_with_a_rank_and_a_size_are_one_training(no_launcher, monkeypatch):
    """Kind J: without LOCAL_RANK, each pod trained alone, and no line said so."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = plan(device="cpu")
    (world,) = made.worlds
    assert (world.rank, world.size, world.nodes, world.local_size, world.index) == (1, 2, 2, 1, 0)
    assert (made.spawns, distributed.under_torchrun()) == (False, True)
    assert made.notes == (
        "RANK and WORLD_SIZE are set, LOCAL_RANK is not: this is rank 1 of 2, the only one on its machine",
    )
    assert plan(device="cpu", device_list=[3]).worlds[0].index == 3
    message = refused("usage", plan, device="cpu", multiprocessing_distributed=True, device_list=[0, 1])
    assert "RANK and WORLD_SIZE name a process" in message


def test_a_lone_pod_may_use_all_its_devices(no_launcher, monkeypatch):
    """Kind J."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert plan(device="cpu").worlds == (World(),)
    made = plan(device="cpu", multiprocessing_distributed=True, device_list=[0, 1])
    assert (made.spawns, len(made.worlds), made.notes) == (True, 2, ())


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_half_of_a_launchers_variables_get_a_note(no_launcher, monkeypatch, name):
    """Kind J."""
    monkeypatch.setenv(name, "1")
    made = plan(device="cpu")
    assert made.worlds == (World(),)
    assert made.notes == (f"{name} without RANK and WORLD_SIZE: this process trains on its own",)


@pytest.mark.parametrize(
    ("addr", "port", "name"),
    [("", "29500", "MASTER_ADDR"), ("127.0.0.1", "abc", "MASTER_PORT"), ("a", "", "MASTER_PORT")],
)
def test_a_launcher_has_to_say_where_its_ranks_meet(torchrun, monkeypatch, addr, port, name):
    """Kind I."""
    monkeypatch.setenv("MASTER_ADDR", addr)
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (world,) = plan(device="cpu").worlds
    assert name in refused("usage", world.start)


@pytest.mark.parametrize("port", ["abc", "-1", "70000", "9" * 5000])
def test_the_environments_port_matters_only_where_it_is_used(no_launcher, monkeypatch, port):
    """It refused runs of one process."""
    monkeypatch.setenv("MASTER_PORT", port)
    assert plan(device="cpu").worlds == (World(),)
    assert plan(device="cpu", multiprocessing_distributed=True, device_list=[0]).meeting == ("127.0.0.1", 0)
    assert "MASTER_PORT" in refused("usage", plan, device="cpu", multiprocessing_distributed=True)


@pytest.mark.parametrize(("world_size", "rank"), [(0, 0), (-2, 0), (2, 2), (2, -2)])
def test_nodes_that_cannot_be_are_refused(world_size, rank):
    refused("usage", plan, device="cpu", world_size=world_size, rank=rank, dist_url="tcp://10.0.0.1:29500")


def test_ranks_count_on_over_the_nodes():
    flags = {"multiprocessing_distributed": True, "device_list": [4, 5], "dist_url": "tcp://10.0.0.1:29500"}
    made = plan(device="cpu", world_size=2, rank=1, **flags)
    assert [(world.rank, world.size, world.nodes) for world in made.worlds] == [(2, 4, 2), (3, 4, 2)]
    assert made.meeting == ("10.0.0.1", 29500)


def test_backend_and_timeout_reach_the_ranks_and_the_log():
    made = plan(device="cpu", multiprocessing_distributed=True, dist_backend="gloo", dist_timeout=7.0)
    assert {(world.backend, world.timeout) for world in made.worlds} == {("gloo", 7.0)}
    assert made.worlds[0].describe().endswith("; 8 ranks by gloo, timeout 7 s")


def test_the_meeting_point_is_from_the_url_else_the_environment_else_a_free_port(monkeypatch):
    assert meeting_point("127.0.0.1", "tcp://10.0.0.1:29500", nodes=2) == ("10.0.0.1", 29500)
    assert meeting_point("127.0.0.1", None, nodes=1) == ("127.0.0.1", 0)
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.2")
    assert meeting_point("10.0.0.3", None, nodes=2) == ("10.0.0.3", 1234)
    assert meeting_point("127.0.0.1", "env://", nodes=2) == ("10.0.0.2", 1234)


@pytest.mark.parametrize("url", ["http://a:1", "tcp://a", "tcp://:1", "tcp://a:b", "tcp://a:70000"])
def test_a_faulty_dist_url_is_refused(url):
    refused("usage", plan, device="cpu", dist_url=url)


def test_several_nodes_without_a_port_are_refused():
    refused("usage", plan, device="cpu", world_size=2, rank=0)


# ---------------------------------------------------------------- one rank among all


@pytest.mark.parametrize(
    ("seconds", "connect", "execute"), [(600.0, "600", "600"), (5.0, "120", "5"), (9000.0, "7200", "9000")]
)
def test_hccl_waits_as_long_as_asked_for_within_what_it_allows(monkeypatch, seconds, connect, execute):
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    distributed.set_hccl_timeouts(seconds)
    assert [os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["HCCL_EXEC_TIMEOUT"]] == [connect, execute]
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "68")
    distributed.set_hccl_timeouts(seconds)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "68", "the user's own stays"


@pytest.mark.parametrize(("backend", "connects"), [(None, True), ("gloo", False)])
def test_a_gpu_connects_when_the_ranks_meet(monkeypatch, backend, connects):
    """As far as it can be seen without one."""
    calls = []
    monkeypatch.setattr(devices, "prepare", lambda device, processes: calls.append((device, processes)))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **options: calls.append(options))
    for name, value in {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    World(device_type="cuda", index=1, rank=1, size=2, local_size=2, backend=backend).start()
    assert calls[0] == (torch.device("cuda", 1), 2), "before the group is made, and so before the first collective"
    assert calls[1].get("device_id") == (torch.device("cuda", 1) if connects else None)


def test_the_sums_of_a_step_are_the_loss_and_the_tokens_of_all_ranks_by_one_all_reduce(monkeypatch):
    reduced = []

    def all_reduce(tensor):
        reduced.append(tensor.tolist())
        tensor *= 2

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    loss_sum = torch.tensor(1.5, requires_grad=True)
    for size, factor in ((1, 1), (2, 2)):
        total_loss, total_tokens = World(size=size).sums(loss_sum, 7)
        assert (total_loss.item(), total_tokens.item()) == (1.5 * factor, 7.0 * factor)
        assert not total_loss.requires_grad
    assert reduced == [[1.5, 7.0]]
    assert loss_sum.item() == 1.5


# ---------------------------------------------------------------- several ranks are one training


def watched_rank(world: World, settings, mixed, folder: str) -> None:
    """`train_8p.run_rank`, writing down a generator's state, each step's pairs, loss, gradients and weights."""
    shares, totals, steps, generators = [], [], [], []
    rank_share, step_done, step = data.rank_share, nmt.log.EpochLog.step_done, precision.NativeTrainer.step

    def watched_share(indices, rank, world_size):
        share = rank_share(indices, rank, world_size)
        shares.append(share.tolist())
        generators.append(torch.get_rng_state())
        return share

    def watched_step_done(self, total_loss, total_tokens, pairs):
        totals.append(torch.stack((total_loss, total_tokens)).cpu())
        step_done(self, total_loss, total_tokens, pairs)

    def watched_step(self, lr, *, max_norm):
        before = {name: parameter.grad.cpu().clone() for name, parameter in self.model.named_parameters()}
        step(self, lr, max_norm=max_norm)
        steps.append((before, {name: tensor.cpu().clone() for name, tensor in self.model.state_dict().items()}))

    data.rank_share, nmt.log.EpochLog.step_done, precision.NativeTrainer.step = (
        watched_share,
        watched_step_done,
        watched_step,
    )
    train_8p.run_rank(world, settings, mixed)
    if world.size > 1:  # `settle_buckets` has the first batch too
        del shares[0], generators[0]
    record = {"shares": shares, "totals": totals, "steps": steps, "generator": generators[1]}
    torch.save(record, Path(folder) / f"rank{world.rank}.pt")


def overflowing_rank(world: World, settings, mixed, folder: str) -> None:
    """`train_8p.run_rank` with an overflow on rank 1 in the fifth step, writing down the weights after each step."""
    weights = []
    backward, step = precision.NativeTrainer.backward, precision.NativeTrainer.step

    def overflowing_backward(self, loss, **options):
        overflows = world.rank == 1 and len(weights) == 4
        backward(self, loss * float("inf") if overflows else loss, **options)

    def watched_step(self, lr, *, max_norm):
        step(self, lr, max_norm=max_norm)
        weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    precision.NativeTrainer.backward, precision.NativeTrainer.step = overflowing_backward, watched_step
    train_8p.run_rank(world, settings, mixed)
    torch.save(weights, Path(folder) / f"rank{world.rank}.pt")


def train_watched(
    corpus: Path, folder: Path, processes: int, device: str = "cpu", *, rank=watched_rank, flags: str = ""
) -> list:
    """What the ranks of a run wrote down, by rank."""
    folder.mkdir()
    settings = parse(
        f"--data-dir {corpus} --device {device} --performance --epochs {EPOCHS} --batch-size {BATCH} --dropout 0 "
        "--output-dropout 0 --teacher-forcing-ratio 0.5 --emb-dim 8 --hid-dim 12 --multiprocessing-distributed "
        f"--device-list {','.join(map(str, range(processes)))} --ckptpath {folder / 'model'} {flags}"
    )
    ranks = plan(**{name: getattr(settings, name) for name in inspect.signature(plan).parameters})
    mixed = choose_precision(settings, ranks.device_type, ranks.indices)
    settings = train_8p.resolved(settings, mixed, ranks.worlds[0], PAIRS)
    settings = dataclasses.replace(settings, performance=False)  # which has chosen batch and rate
    ranks.spawn(rank, settings, mixed, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus", PAIRS)
    return train_watched(corpus, folder / "one", 1)[0], train_watched(corpus, folder / "two", 2)


@pytest.fixture(scope="module")
def npu_totals(tmp_path_factory):
    """By the number of simulated NPUs: what rank 0 of the same training counted there."""
    ensure_built()
    folder = tmp_path_factory.mktemp("npus")
    corpus = write_corpus(folder / "corpus", PAIRS)
    code = """
import sys
from pathlib import Path
from test_distributed import train_watched

if __name__ == "__main__":
    corpus, folder, processes = sys.argv[1:]
    train_watched(Path(corpus), Path(folder) / processes, int(processes), "npu")
"""
    (folder / "program.py").write_text(code)
    paths = os.pathsep.join(map(str, [SIMULATION, REPOSITORY, *TEST_PATHS]))

    def train(processes: str) -> None:
        done = run(sys.executable, folder / "program.py", corpus, folder, processes, PYTHONPATH=paths)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, ("1", "2")))
    return {count: torch.load(folder / str(count) / "rank0.pt", map_location="cpu")["totals"] for count in (1, 2)}


def training_shares(record: dict) -> list[list[int]]:
    """The pairs of each training step: validation shares its sentences out too, four of them, all in one batch."""
    steps_an_epoch = math.ceil(PAIRS / BATCH)
    shares = record["shares"]
    validations = len(shares) // EPOCHS - steps_an_epoch
    width = steps_an_epoch + validations
    return [share for epoch in range(EPOCHS) for share in shares[epoch * width : epoch * width + steps_an_epoch]]


def test_two_ranks_see_each_pair_once_an_epoch_and_none_twice(runs):
    _, two = runs
    steps = list(zip(*map(training_shares, two), strict=True))
    for epoch in range(EPOCHS):
        seen = [pair for shares in steps[3 * epoch : 3 * epoch + 3] for share in shares for pair in share]
        assert sorted(seen) == list(range(PAIRS))


def test_each_epoch_of_a_run_has_an_order_of_its_own(runs):
    one, _ = runs
    steps = training_shares(one)
    assert len({str(steps[3 * epoch : 3 * epoch + 3]) for epoch in range(EPOCHS)}) == EPOCHS


def test_two_ranks_draw_other_numbers_for_dropout(runs):
    _, two = runs
    assert not torch.equal(two[0]["generator"], two[1]["generator"])


def test_an_uneven_last_batch_leaves_a_rank_without_pairs(runs):
    _, two = runs
    assert sum(share == [] for share in training_shares(two[1])) == EPOCHS


def test_two_ranks_have_the_loss_of_one_process_on_the_joint_batch(runs):
    one, two = runs
    for record in two:
        torch.testing.assert_close(record["totals"], one["totals"], rtol=1e-5, atol=1e-5)


def test_two_ranks_have_the_gradients_of_one_process_on_the_joint_batch(runs):
    one, two = runs
    assert len(one["steps"]) >= 10
    for record in two:
        for (actual, _), (expected, _) in zip(record["steps"], one["steps"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_two_ranks_hold_equal_weights_after_ten_steps(runs):
    one, two = runs
    (_, first), (_, second) = two[0]["steps"][9], two[1]["steps"][9]
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    torch.testing.assert_close(first, one["steps"][9][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 2)])
def test_a_batch_in_parts_is_the_joint_batch(runs, tmp_path, processes, parts):
    """--accumulate: the losses, gradients and weights of a whole batch, also where a part of a rank has no pair."""
    one, _ = runs
    corpus = write_corpus(tmp_path / "corpus", PAIRS)
    found = train_watched(corpus, tmp_path / "parts", processes, flags=f"--accumulate {parts}")
    for record in found:
        torch.testing.assert_close(record["totals"], one["totals"], rtol=1e-5, atol=1e-5)
        for (actual, _), (expected, _) in zip(record["steps"], one["steps"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(record["steps"][9][1], one["steps"][9][1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(record["steps"][9][1], found[0]["steps"][9][1], rtol=0, atol=0)


@pytest.mark.parametrize(("is_last", "reduces"), [(True, 1), (False, 0)])
def test_only_the_last_part_of_a_batch_is_sent_to_the_other_ranks(is_last, reduces):
    """DDP would average the gradients of each part, and that takes time."""

    class Parallel(torch.nn.Linear):
        reduces = 1

        @contextlib.contextmanager
        def no_sync(self):
            self.reduces = 0
            yield

    module = Parallel(1, 1)
    with World(size=2).averaging(module, now=is_last):
        assert module.reduces == reduces
    with World().averaging(torch.nn.Linear(1, 1), now=is_last):
        pass  # which has no `no_sync`


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", PAIRS)
    first, second = train_watched(corpus, tmp_path / "two", 2, rank=overflowing_rank, flags="--amp")
    assert len(first) == 3 * EPOCHS
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    unchanged = [
        step
        for step in range(1, len(first))
        if torch.equal(*(w["decoder.fc_out.weight"] for w in first[step - 1 : step + 1]))
    ]
    assert unchanged == [4]
    assert all(tensor.isfinite().all() for tensor in first[-1].values())


@pytest.mark.parametrize("count", [1, 2])
def test_simulated_npus_have_the_losses_of_the_cpu_in_float32(runs, npu_totals, count):
    one, _ = runs
    assert len(npu_totals[count]) >= 10
    for (actual, pairs), (expected, _) in zip(npu_totals[count], one["totals"], strict=True):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6), pairs


def command(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True, timeout=DEADLINE)


def test_a_rank_counts_its_steps_where_its_launcher_looks():
    counters = distributed.launch.step_counters(2)
    World(counter=counters[1]).progress(7)
    assert [counter.get() for counter in counters] == [0, 7]
    World().progress(7)  # nobody looks
    assert World(counter=counters[1]) == World(), "it is no part of what a rank is"


def as_rank(rank: int, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """The program as one of two ranks that a launcher has started."""
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1"} | variables
    program = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, "--performance", *flags]
    return command(*program, cwd=REPOSITORY, **environment)


def test_a_rank_without_the_others_ends_within_the_timeout(tiny_corpus):
    """Row 39."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = time.monotonic()
    done = as_rank(1, "--data-dir", str(tiny_corpus), "--dist-timeout", "3", MASTER_PORT=port)
    assert done.returncode == 6, done.stderr
    assert "error[distributed]: the 2 ranks did not meet" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 60


def test_a_port_that_is_taken_ends_the_run_with_6(tiny_corpus, tmp_path, monkeypatch, capsys):
    """Row 38. Where none was asked for, the ranks meet at another, as all runs of these tests do."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        flags = ["--data-dir", str(tiny_corpus), "--multiprocessing-distributed", "--device-list", "0,1", "-b", "16"]
        assert run_main(train_8p.main, [*SMALL, *flags, "--ckptpath", str(tmp_path / "model")]) == 6
    assert capsys.readouterr().err.startswith(f"error[distributed]: cannot listen on port {port}")


PUBLISHED = ["--epoch", "1", "--batch-size", "16", "--multiprocessing-distributed", "--device-list", "0,1"]
PUBLISHED += ["--amp", "--addr", "127.0.0.1", "--workers", "2"]


@pytest.mark.parametrize("launcher", [["-m", "torch.distributed.run", "--nproc-per-node", "2"], []])
def test_the_published_flags_run_two_processes(tiny_corpus, tmp_path, launcher):
    script = str(REPOSITORY / "train_8p.py")
    result = command(
        sys.executable, *launcher, script, "--data_dir", str(tiny_corpus), *PUBLISHED, *SMALL, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "leaked" not in result.stderr
    assert " processes=2 " in result.stdout
    assert result.stdout.count("* FPS@all ") == 1, "rank 0 alone writes the log"
    assert result.stdout.count("BLEU score = ") == 1
    assert (tmp_path / "seq2seq-gru-model.pth.tar").exists()


@pytest.mark.parametrize(
    ("nodes", "rank", "restarts", "shares", "says"),
    [(2, 0, "3", "True", True), (2, 1, "3", "True", False), (1, 0, "3", "True", False)]
    + [(2, 0, "0", "True", False), (2, 0, "3", "False", False)],
)
def test_torchrun_that_would_not_find_a_restarted_node_is_told_once(
    no_launcher, monkeypatch, nodes, rank, restarts, shares, says
):
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0 if nodes == 2 else rank, "LOCAL_WORLD_SIZE": 2 // nodes}
    variables |= {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shares}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    notes = [note for note in plan(device="cpu").notes if "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in note]
    assert len(notes) == says


def test_what_a_library_prints_comes_from_rank_0_alone(tiny_corpus, tmp_path):
    """As apex and torch_npu do when a step overflows. The lines of two ranks on one pipe would break each other."""
    (tmp_path / "program.py").write_text(
        """
import sys
import train_8p
from nmt import launch, precision
from nmt.errors import run_main

step = precision.NativeTrainer.step
precision.NativeTrainer.step = lambda *args, **options: (print("printed by a library"), step(*args, **options))
launch.leave(run_main(train_8p.main, sys.argv[1:]))
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "program.py"]
    flags = ["--data-dir", str(tiny_corpus), "--performance", "-b", "16", *SMALL]
    result = command(*torchrun, *flags, cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("printed by a library") == train_8p.PERFORMANCE_STEPS


@pytest.mark.parametrize(("numbers", "agree"), [([5, 5], True), ([5, 6], False), ([0, 2**18 - 1], False)])
def test_ranks_tell_whether_they_agree_on_a_number(monkeypatch, numbers, agree):
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor.fill_(sum(numbers)))
    assert World(size=2).agrees_on(numbers[0]) == agree
    assert World(size=2).agrees_on(numbers[1]) == agree


RANK = """
import sys
from nmt.distributed import World
import torch
world = World(rank=int(sys.argv[1]), size=2, local_size=2, timeout=20.0)
print("joining", flush=True)
world.start()
print(int(world.sum(torch.ones(1))), flush=True)
sys.stdin.read()
"""


def test_ranks_that_torchrun_starts_again_do_not_look_for_the_dead_ones():
    """Its store has the addresses of the earlier start. The second rank is there first, and reads them."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for restart in range(2):
        environment = os.environ | variables | {"TORCHELASTIC_RESTART_COUNT": str(restart)}
        ranks = []
        for rank in (1, 0):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, str(rank)],
                    cwd=REPOSITORY,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert ranks[-1].stdout.readline() == "joining\n"
            if rank == 1:
                time.sleep(1.0)  # in which it would find the dead rank's address
        try:
            assert [rank.stdout.readline() for rank in ranks] == ["2\n", "2\n"]
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
