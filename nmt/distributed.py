"""Ranks: from the flags to the processes that train together, and what each of them knows of the others.

`plan` reads the flags and the environment. A run has one rank, or one rank for each device: `Plan.spawn` starts them as
processes, or torchrun has started them. The code of a rank calls `World.start`, trains, and calls `World.stop`.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from nmt import devices, launch
from nmt.errors import LostPeer, UserError, first_line, printable

import torch
import torch.distributed as dist
from torch import Tensor, nn

COLLECTIVES = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}  # each device type's own backend of torch.distributed
NUMBER = re.compile("[0-9]{1,9}")
NPU_VARIABLES = (  # the log shows those that are set
    "ASCEND_RT_VISIBLE_DEVICES",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
)


# ---------------------------------------------------------------- one rank among all


@dataclass(frozen=True)
class World:
    """What one rank knows of all the ranks. `World()` is a process that runs alone on the CPU.

    Attributes:
        rank: this process among all, from 0.
        size: number of processes on all nodes.
        nodes: number of nodes.
        local_size: number of processes on this node.
        device_type: "npu", "cuda" or "cpu".
        index: this process's device.
        backend: "hccl", "nccl", "gloo", or None for the device's own.
        timeout: seconds for the ranks to meet, and for each collective.
        meeting: address and port at which the ranks meet. None: torchrun's environment has them.
        counter: where a spawned rank's launcher looks for its last step.
    """

    rank: int = 0
    size: int = 1
    nodes: int = 1
    local_size: int = 1
    device_type: str = "cpu"
    index: int = 0
    backend: str | None = None
    timeout: float = 600.0
    meeting: tuple[str, int] | None = None
    counter: launch.StepCounter | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_type == "cpu" else torch.device(self.device_type, self.index)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self) -> None:
        """Takes this process's device and joins the process group.

        Raises:
            UserError: distributed, the other ranks did not come.
        """
        devices.prepare(self.device, self.local_size)
        if self.size == 1:
            return
        if self.device_type == "npu":
            set_hccl_timeouts(self.timeout)
        if self.nodes == 1 and sys.platform == "linux":
            # One node needs no other interface than loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self.meeting is None:
            check_meeting_variables()  # torch.distributed reads them
        store = self._store_of_torchrun() if self.meeting is None else join_store(*self.meeting, self.timeout)
        try:
            dist.init_process_group(
                self._collectives,
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=self.timeout),
                # With a device NCCL connects here, and not in the first collective.
                device_id=self.device if self._collectives == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise LostPeer(
                "distributed",
                f"the {self.size} ranks did not meet: {first_line(error)}",
                f"rank {self.rank}",
                "see that every node was started with the same --addr, port and --world-size",
            ) from error

    def _store_of_torchrun(self) -> dist.Store | None:
        """A store with the keys of this start alone. None: PyTorch takes what the environment names.

        torchrun's agent keeps one store for all its restarts. A rank that is early would find there where a dead rank
        was, and wait for it. On one node the number of the restart keeps them apart. The agents of several nodes count
        differently, see `shares_a_store_over_restarts`: there, each meeting should have a store of its own.
        """
        if self.nodes > 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        store = join_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.timeout)
        return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def stop(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            dist.destroy_process_group()

    def progress(self, step: int) -> None:
        """Tells a launcher that `step` steps of the run are done, so that it can say where this rank failed."""
        if self.counter is not None:
            self.counter.set(step)

    def describe(self) -> str:
        """The device's name and how the ranks meet, for the log."""
        parts = [devices.name(self.device)]
        if self.size > 1:
            parts.append(f"{self.size} ranks by {self._collectives}, timeout {self.timeout:g} s")
        if self.device_type == "npu":
            parts += [f"{variable}={os.environ[variable]}" for variable in NPU_VARIABLES if variable in os.environ]
        return printable("; ".join(parts))

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the ranks in each backward pass. With one rank, `module` itself."""
        if self.size == 1:
            return module
        device_ids = None if self.device_type == "cpu" else [self.index]
        return nn.parallel.DistributedDataParallel(module, device_ids=device_ids)

    def averaging(self, module: nn.Module, *, now: bool) -> contextlib.AbstractContextManager:
        """The context of a forward and a backward pass of a module from `parallel`.

        Args:
            now: whether the gradients are averaged over the ranks. If not, they add up on each rank until a later pass.
        """
        if now or self.size == 1:
            return contextlib.nullcontext()
        return cast(nn.parallel.DistributedDataParallel, module).no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor`, of any shape, over the ranks in place. It must be contiguous, and not float64 on an NPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sums(self, loss_sum: Tensor, target_tokens: int) -> tuple[Tensor, Tensor]:
        """The loss and the number of target tokens of all ranks, by one all-reduce.

        Args:
            loss_sum: [] this rank's loss, summed over its target tokens.
            target_tokens: how many those are.

        Returns:
            Both sums over the ranks, [] each, of `loss_sum`'s dtype, on its device, without a gradient.
        """
        count = loss_sum.new_full((), target_tokens)
        total_loss, total_tokens = self.sum(torch.stack((loss_sum.detach(), count)))
        return total_loss, total_tokens

    def agrees_on(self, number: int) -> bool:
        """Whether all ranks have the same number. Every rank calls this.

        Args:
            number: from 0 to 2**18 - 1. So float32 holds the sum over 64 ranks.
        """
        total = self.sum(torch.tensor(float(number), device=self.device))
        return float(total) == number * self.size

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the values of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    @property
    def _collectives(self) -> str:
        return self.backend or COLLECTIVES[self.device_type]


def host_store(addr: str, port: int, nodes: int) -> dist.TCPStore:
    """Opens the store on this node. The launcher holds it, so no other program can take the port before the ranks meet.

    Args:
        addr: the address that the ranks connect to.
        port: its port, or 0 for a free one.
        nodes: with 1, only this machine can connect.

    Raises:
        UserError: distributed, the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((addr if nodes == 1 else "", port))
    except OSError as error:
        raise UserError(
            "distributed",
            f"cannot listen on port {port}: {error.strerror}",
            f"{addr}:{port}",
            "give another port with --dist-url or MASTER_PORT, or none to take a free one",
        ) from error
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(
        addr, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def join_store(addr: str, port: int, timeout: float) -> dist.TCPStore:
    """Connects a rank to the store.

    Raises:
        UserError: distributed, nobody answers there.
    """
    try:
        return dist.TCPStore(addr, port, is_master=False, timeout=datetime.timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise LostPeer(
            "distributed", f"no answer within {timeout:g} s", f"{addr}:{port}", "see that node 0 has been started there"
        ) from error


def set_hccl_timeouts(seconds: float) -> None:
    """Sets HCCL's timeouts, unless the user has.

    By default HCCL waits two minutes for a connection, and 10 to 30 minutes for a collective, depending on its version.
    """
    connect, execute = f"{min(max(seconds, 120), 7200):.0f}", f"{max(seconds, 1):.0f}"  # within HCCL's limits
    for name, value in (("HCCL_CONNECT_TIMEOUT", connect), ("HCCL_EXEC_TIMEOUT", execute)):
        os.environ.setdefault(name, value)


# ---------------------------------------------------------------- from the flags to the ranks


@dataclass(frozen=True)
class Plan:
    """Which ranks this node runs, and on which devices.

    Attributes:
        device_type: "npu", "cuda" or "cpu".
        indices: this node's devices, one for each of its ranks.
        worlds: this node's ranks. Under torchrun only this process's.
        spawns: whether this process starts the ranks as new processes, with `spawn`. If not, it is the one of `worlds`.
        meeting: address and port at which spawned ranks meet. Port 0 stands for any free one.
        scoring_index: the device that scores.
        notes: what the user should know, one line each. They concern this node.
    """

    device_type: str
    indices: tuple[int, ...]
    worlds: tuple[World, ...]
    spawns: bool
    meeting: tuple[str, int]
    scoring_index: int
    notes: tuple[str, ...] = ()

    def spawn(self, run_rank: Callable, *args: object, debug: bool = False, how_to_resume: str = launch.CHECK) -> None:
        """Runs `run_rank(world, *args)` in a new process for each rank of this node, and waits for all of them.

        The ranks of all nodes meet at this process of node 0.

        Args:
            run_rank: a function of a module, since the new processes import it.
            args: can be pickled.
            debug: whether a rank shows the traceback of an expected error too.
            how_to_resume: what the user can do after a rank has died or hung.

        Raises:
            UserError: as from `launch.launch`. Or distributed, the port is taken.
            Stopped: a signal has ended the run.
        """
        addr, port = self.meeting
        first = self.worlds[0]
        if first.is_main and first.size > 1:
            store = host_store(addr, port, first.nodes)  # stays open as long as this function runs
            port = store.port
        counters = launch.step_counters(len(self.worlds))
        worlds = [
            dataclasses.replace(world, meeting=(addr, port), counter=counter)
            for world, counter in zip(self.worlds, counters, strict=True)
        ]
        launch.launch(
            run_one_of,
            len(worlds),
            (worlds, run_rank, args),
            debug,
            counters=counters,
            first_rank=first.rank,
            timeout=first.timeout,
            todo=how_to_resume,
        )


def run_one_of(index: int, worlds: Sequence[World], run_rank: Callable, args: Sequence[object]) -> None:
    """The work of a spawned process: `run_rank` with its own world."""
    run_rank(worlds[index], *args)


def plan(
    *,
    device: str = "auto",
    npu: int | None = None,
    gpu: int | None = None,
    device_list: Sequence[int] | None = None,
    device_id: str | None = None,
    max_devices: int | None = None,
    multiprocessing_distributed: bool = False,
    world_size: int = -1,
    rank: int = -1,
    addr: str = "127.0.0.1",
    dist_url: str | None = None,
    dist_backend: str | None = None,
    dist_timeout: float = 600.0,
    bleu_npu: int | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Decides which ranks run where.

    Args: those of the flags of these names, see train_8p.py --help. `batch_size` is checked only.

    Raises:
        UserError: usage, flags contradict each other, this machine or torchrun's environment.
    """
    named = named_device(device, npu, gpu)
    launched, notes = launched_process(multiprocessing_distributed)
    if named and (device_list or multiprocessing_distributed or launched):
        raise UserError(
            "usage",
            "one device beside a list of devices or several processes",
            "--npu" if gpu is None else "--gpu",
            "leave it out, and give --device-list with --multiprocessing-distributed or under torchrun",
        )
    flag = f"--npu {npu}" if npu is not None else f"--gpu {gpu}"
    device_type = devices.choose_device_type(*((named[0], flag) if named else (device,)))
    check_backend(dist_backend, device_type)
    where = "--npu or --gpu" if named else "--device-list"
    if named:
        indices = [named[1]]
    elif launched:
        indices = indices_under_torchrun(launched, device_list)
    elif multiprocessing_distributed:
        indices = list(device_list or range(devices.default_count(device_type))[:max_devices])
        if not device_list and len(indices) < (max_devices or 0):
            notes.append(f"this machine has {len(indices)} {device_type} devices, not {max_devices}: running on those")
    elif device_list:
        indices = list(device_list)[:1]
        if len(device_list) > 1:
            only = f"one process on device {indices[0]} alone"
            notes.append(f"{only}; --multiprocessing-distributed takes the whole list")
    else:
        indices = [own_index(device_id, device_type)]
        where = (
            "--device-id" if device_id in (None, str(indices[0])) else "--device-id, or ASCEND_DEVICE_ID of a wrapper"
        )
    devices.check_indices(device_type, indices, where)
    scoring_index = indices[0] if bleu_npu is None else bleu_npu
    devices.check_indices(device_type, [scoring_index], "--bleu-npu")
    if batch_size is not None:
        check_divisible(batch_size, len(indices))
    common = World(device_type=device_type, backend=dist_backend, timeout=dist_timeout)
    worlds = worlds_of_this_node(common, launched, indices, world_size, rank)
    if device == "auto" and not named and worlds[0].is_main and (reason := devices.passed_over(device_type)):
        why = printable(f"torch_npu is installed, but there is no NPU to run on: {reason}")
        notes.append(f"{why}; running on {device_type}")
    if launched and worlds[0].nodes > 1 and worlds[0].is_main and shares_a_store_over_restarts():
        found = "torchrun finds a node that is started again only with --rdzv-backend c10d and"
        notes.append(f"{found} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node; see docs/several-machines.md")
    spawns = not launched and (multiprocessing_distributed or worlds[0].nodes > 1)
    return Plan(
        device_type=device_type,
        indices=tuple(indices),
        worlds=worlds,
        spawns=spawns,
        meeting=meeting_point(addr, dist_url, worlds[0].nodes, is_used=spawns and worlds[0].size > 1),
        scoring_index=scoring_index,
        notes=tuple(notes),
    )


def named_device(device: str, npu: int | None, gpu: int | None) -> tuple[str, int] | None:
    """The type and index that --npu or --gpu names, or None.

    Raises:
        UserError: usage, the flags name two types.
    """
    named = [(name, index) for name, index in (("npu", npu), ("cuda", gpu)) if index is not None]
    if len(named) == 2 or (named and device not in ("auto", named[0][0])):
        raise UserError("usage", "two different devices", "--npu, --gpu, --device", "name the device by one of them")
    return named[0] if named else None


def own_index(device_id: str | None, device_type: str) -> int:
    """The index of the device of a run in one process, as --device-id says it.

    >>> own_index("3", "cuda"), own_index("npu:3", "npu"), own_index("npu:3", "cuda"), own_index("3", "cpu")
    (3, 3, 0, 0)
    """
    only, _, index = (device_id or "0").rpartition(":")
    return int(index) if device_type != "cpu" and only in ("", device_type) else 0


def check_backend(backend: str | None, device_type: str) -> None:
    """Raises a usage UserError if collectives of this backend cannot work on such devices."""
    own = COLLECTIVES[device_type]
    if backend not in (None, own) and (backend, device_type) != ("gloo", "cuda"):
        raise UserError("usage", f"{backend} does not work on {device_type}", "--dist-backend", f"use {own}")


def check_divisible(batch_size: int, count: int) -> None:
    """Raises a usage UserError if `count` devices cannot have equal parts of a batch."""
    if batch_size % count:
        raise UserError(
            "usage",
            f"a batch of {batch_size} cannot be shared out evenly over {count} devices",
            "--batch-size",
            f"give a multiple of {count}",
        )


def shares_a_store_over_restarts() -> bool:
    """Whether torchrun would restart, and its workers meet in a store that its agents keep (PyTorch's issue 135712).

    A node's new agent looks for that store where only the first meeting wrote it, and gives up after a minute.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher like it, has started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= given_variables().keys()


def given_variables() -> dict[str, str]:
    """Those of a launcher's variables that are set and not empty."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: value for name in names if (value := os.environ.get(name, "").strip())}


class Launched(NamedTuple):
    """What a launcher has told this process in its environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    notes: tuple[str, ...] = ()


def read_launcher() -> Launched:
    """Reads the variables of a launcher. For a process that is `under_torchrun`.

    A launcher of pods may leave the local ones out. Then each pod has one process.

    Raises:
        UserError: usage, a variable is missing or makes no sense. It names the variable.
    """
    values = {name: variable_as_number(name, text) for name, text in given_variables().items()}
    notes: tuple[str, ...] = ()
    if values["WORLD_SIZE"] == 1:
        values = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} | values
    elif not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} & values.keys():
        values |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place = f"rank {values['RANK']} of {values['WORLD_SIZE']}"
        notes = (f"RANK and WORLD_SIZE are set, LOCAL_RANK is not: this is {place}, the only one on its machine",)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name not in values:
            raise launcher_error(f"{name} is not set, but RANK, WORLD_SIZE and the other local one are", name)
    for name, least, end, of in (
        ("WORLD_SIZE", 1, None, ""),
        ("LOCAL_WORLD_SIZE", 1, values["WORLD_SIZE"] + 1, "WORLD_SIZE"),
        ("RANK", 0, values["WORLD_SIZE"], "WORLD_SIZE"),
        ("LOCAL_RANK", 0, values["LOCAL_WORLD_SIZE"], "LOCAL_WORLD_SIZE"),
    ):
        if values[name] < least or (end is not None and values[name] >= end):
            expected = f"at least {least}" if end is None else f"{least} to {end - 1}, because {of} is {values[of]}"
            raise launcher_error(f"{name} is {values[name]}, expected {expected}", name)
    return Launched(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"], notes)


def launched_process(multiprocessing_distributed: bool) -> tuple[Launched | None, list[str]]:
    """What a launcher says of this process, or None, and notes about it.

    Raises:
        UserError: usage, as from `read_launcher`, or a process of several is to start processes itself.
    """
    given = given_variables()
    for name, text in given.items():
        variable_as_number(name, text)
    if not under_torchrun():
        only = " and ".join(given)
        return None, [f"{only} without RANK and WORLD_SIZE: this process trains on its own"] if given else []
    launched = read_launcher()
    is_local = {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} & given.keys()
    if launched.size == 1 and not is_local:
        return None, []  # a lone pod, whose process may use all its devices
    if multiprocessing_distributed and not is_local:
        what = "RANK and WORLD_SIZE name a process, and --multiprocessing-distributed starts several"
        todo = "unset both, and give --world-size and --rank for the nodes, or leave the flag out"
        raise UserError("usage", what, "environment variable RANK", todo)
    return launched, list(launched.notes)


def variable_as_number(name: str, text: str) -> int:
    if not NUMBER.fullmatch(text):
        raise launcher_error(f"{name} is {text!r}, expected a number from 0", name)
    return int(text)


def launcher_error(what: str, name: str) -> UserError:
    todo = "see what the launcher sets, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to run without one"
    return UserError("usage", what, f"environment variable {name}", todo)


def check_meeting_variables() -> None:
    """Raises a usage UserError if a launcher has not said where the ranks meet."""
    if not os.environ.get("MASTER_ADDR"):
        raise launcher_error("MASTER_ADDR is not set, expected the address of rank 0", "MASTER_ADDR")
    port = os.environ.get("MASTER_PORT", "")
    if not is_port(port) or int(port) == 0:
        raise launcher_error(f"MASTER_PORT is {port!r}, expected a number from 1 to 65535", "MASTER_PORT")


def is_port(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None and int(text) < 65536


def indices_under_torchrun(launched: Launched, device_list: Sequence[int] | None) -> list[int]:
    """The devices of torchrun's processes on this node: those of the list, or the first ones.

    Raises:
        UserError: usage, the list has another length.
    """
    local_size = launched.local_size
    indices = list(device_list or range(local_size))
    if len(indices) != local_size:
        raise UserError(
            "usage",
            f"{len(indices)} devices for the {local_size} processes of torchrun",
            "--device-list",
            "name one device for each process, or leave the flag out",
        )
    return indices


def worlds_of_this_node(
    common: World, launched: Launched | None, indices: Sequence[int], world_size: int, rank: int
) -> tuple[World, ...]:
    """The ranks of this node, or under torchrun the one of this process.

    Args:
        common: what all ranks share.
        launched: what a launcher says of this process, if one has started it.
        indices: this node's devices, one a rank.
        world_size: number of nodes, or -1 for 1.
        rank: this node, or -1 for 0.

    Raises:
        UserError: usage, there is no such node.
    """
    local_size = len(indices)
    if launched:
        nodes = launched.size // local_size
        common = dataclasses.replace(common, size=launched.size, nodes=nodes, local_size=local_size)
        return (dataclasses.replace(common, rank=launched.rank, index=indices[launched.local_rank]),)
    nodes = 1 if world_size == -1 else world_size
    node = 0 if rank == -1 else rank
    if nodes < 1 or not 0 <= node < nodes:
        raise UserError(
            "usage",
            f"node {node} of {nodes}",
            "--rank and --world-size",
            "nodes are counted from 1 and numbered from 0",
        )
    common = dataclasses.replace(common, size=nodes * local_size, nodes=nodes, local_size=local_size)
    first = node * local_size
    return tuple(dataclasses.replace(common, rank=first + i, index=index) for i, index in enumerate(indices))


def meeting_point(addr: str, dist_url: str | None, nodes: int, is_used: bool = True) -> tuple[str, int]:
    """Address and port at which the ranks meet. Port 0 stands for any free one.

    Args:
        addr: of node 0, if the URL does not say.
        dist_url: env://, tcp://HOST:PORT or None. The port is the URL's, or MASTER_PORT, or 0.
        nodes: how many there are.
        is_used: whether ranks will meet there. If not, the environment does not matter.

    Raises:
        UserError: usage, the URL has another form, or several nodes have no port.
    """
    port = (is_used and os.environ.get("MASTER_PORT")) or "0"
    if dist_url == "env://":
        addr = os.environ.get("MASTER_ADDR") or addr
    elif dist_url is not None:
        scheme, _, rest = dist_url.partition("://")
        addr, _, port = rest.rpartition(":")
        if scheme != "tcp" or not addr:
            raise UserError("usage", f"{dist_url!r}", "--dist-url", "expected env:// or tcp://HOST:PORT")
    if not is_port(port):
        raise UserError("usage", f"{port!r} is not a port", "--dist-url or MASTER_PORT", "give a number below 65536")
    if nodes > 1 and is_used and int(port) == 0:
        raise UserError(
            "usage", "several nodes need a port that all know", "--dist-url", f"give tcp://{addr}:29500 on every node"
        )
    return addr, int(port)
