"""One of two ranks. Arguments: the rank, and a folder in which they meet."""

import datetime
import sys

import torch
import torch.distributed as dist
from report import refused, report, works
from torch import nn

RANK, FOLDER = int(sys.argv[1]), sys.argv[2]
DEVICE = torch.device("npu", RANK + 4)


def meet(name: str) -> None:
    store = dist.FileStore(f"{FOLDER}/{name}", 2)
    dist.init_process_group("hccl", store=store, rank=RANK, world_size=2, timeout=datetime.timedelta(seconds=60))


def mine(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 on the first rank and 2 on the second."""
    return torch.full(size or (3,), RANK + 1, dtype=dtype, device=DEVICE)


@refused(r"both use npu:0.*torch\.npu\.set_device")
def a_forgotten_set_device():
    meet("forgotten")
    try:
        dist.all_reduce(mine())
    finally:
        dist.destroy_process_group()


@works
def two_ranks_meet():
    torch.npu.set_device(DEVICE)
    meet("meeting")
    assert dist.get_backend() == "hccl"
    dist.barrier()


@refused("HCCL does not support float64")
def a_float64_all_reduce():
    dist.all_reduce(mine(dtype=torch.float64))


@refused("HCCL does not support float64")
def a_float64_broadcast():
    dist.broadcast(mine(dtype=torch.float64), 0)


@refused("contiguous")
def an_all_reduce_of_a_transposed_matrix():
    dist.all_reduce(mine(2, 3).T)


@refused("cpu")
def an_all_reduce_on_the_cpu():
    dist.all_reduce(torch.ones(2))


@refused("HCCL does not reduce Byte")
def a_sum_of_bytes():
    dist.all_reduce(mine(dtype=torch.uint8))


@works
def all_reduce_sums_and_averages():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8):
        tensor = mine(dtype=dtype)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [3, 3, 3] and tensor.device == DEVICE
    tensor = mine()
    dist.all_reduce(tensor, dist.ReduceOp.AVG)
    assert tensor.tolist() == [1.5, 1.5, 1.5]
    tensor = mine()
    dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True).wait()
    assert tensor.tolist() == [2, 2, 2]


@works
def the_future_holds_the_npus_tensor():
    tensor = mine()
    future = dist.all_reduce(tensor, async_op=True).get_future()
    assert future.wait()[0].data_ptr() == tensor.data_ptr() and future.value()[0].device == DEVICE


@works
def other_collectives_work():
    tensor = mine(2)
    dist.broadcast(tensor, 1)
    assert tensor.tolist() == [2, 2]
    parts = [mine(2), mine(2)]
    dist.all_gather(parts, mine(2))
    assert [part.tolist() for part in parts] == [[1, 1], [2, 2]]
    dist.reduce(tensor, 0)
    assert tensor.tolist() == [4, 4] or RANK == 1
    dist.reduce_scatter(tensor, [mine(2), mine(2)])
    assert tensor.tolist() == [3, 3]
    dist.all_to_all_single(tensor, torch.arange(2.0, device=DEVICE) + 10 * RANK)
    assert tensor.tolist() == [RANK, 10 + RANK]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": 0}, {"rank": 1}]
    work = dist.isend(mine(2), 1 - RANK)
    dist.recv(tensor, 1 - RANK)
    work.wait()
    assert tensor.tolist() == [2 - RANK, 2 - RANK]


@works
def ddp_averages_gradients():
    for options in ({}, {"gradient_as_bucket_view": True, "find_unused_parameters": True}):
        torch.manual_seed(RANK)
        module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Dropout(0.0)).to(DEVICE)
        model = nn.parallel.DistributedDataParallel(module, device_ids=[DEVICE.index], **options)
        weights = [torch.empty(2, 3, device=DEVICE) for _ in range(2)]
        dist.all_gather(weights, module[0].weight.detach())
        assert torch.equal(*weights)  # the first rank's
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(mine(1, 3)).sum().backward()
            torch.testing.assert_close(module[0].weight.grad, torch.full((2, 3), 1.5, device=DEVICE))
            optimizer.step()


report()
dist.destroy_process_group()
