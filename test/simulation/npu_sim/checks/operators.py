"""One process on several simulated devices."""

import copy
import functools
import io
import multiprocessing
import os

import torch
from report import refused, report, works
from torch import nn
from torch.nn import functional as F

DEVICE = "npu:3"
PARTS = "on the same device"


def on(index: int, *size: int) -> torch.Tensor:
    return torch.ones(size or (3,), device=f"npu:{index}")


def same(npu: torch.Tensor, cpu: torch.Tensor) -> None:
    assert npu.device == torch.device(DEVICE), npu.device
    torch.testing.assert_close(npu.cpu(), cpu)


def same_training(model: nn.Module, run) -> None:
    """`run(model, device)` gives a tensor. It and the gradients must be the CPU's."""
    twin = copy.deepcopy(model).to(DEVICE)
    cpu, npu = run(model, "cpu"), run(twin, DEVICE)
    same(npu, cpu)
    cpu.square().sum().backward()
    npu.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        same(b.grad, a.grad)


# ---------------------------------------------------------------- fork, before anything has used a device


def in_fork(work) -> str:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child():
        try:
            work()
            results.put("")
        except Exception as error:
            results.put(str(error))

    process = context.Process(target=child)
    process.start()
    text = results.get()
    process.join()
    return text


def with_visible_devices(devices: str) -> str:
    def work():
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = devices
        assert on(torch.npu.device_count() - 1).device.index == 1
        on(2)

    return in_fork(work)


@works
def visible_devices_are_counted_from_zero():
    assert with_visible_devices("2,5,9").startswith("Invalid NPU device ID 2: there are 2 NPUs")


@works
def visible_devices_that_do_not_ascend_hide_all():
    def use_under(devices: str):
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = devices
        assert torch.npu.device_count() == 0
        torch.manual_seed(0)
        on(0)

    for devices in ("5,2", "all", ""):
        assert in_fork(functools.partial(use_under, devices)) == "No NPU devices are available"


@works
def a_fork_before_the_first_use_may_use_devices():
    torch.manual_seed(0)
    assert in_fork(lambda: on(0)) == ""


@works
def a_fork_after_the_first_use_is_told_to_spawn():
    tensor = on(1)
    for work in (lambda: on(0), lambda: tensor + 1, tensor.cpu, lambda: torch.npu.set_device(1), torch.npu.synchronize):
        assert in_fork(work).startswith("Cannot re-initialize NPU in forked subprocess"), in_fork(work)
    assert in_fork(lambda: torch.ones(2) + 1) == ""


# ---------------------------------------------------------------- where tensors are


@refused(PARTS)
def adding_tensors_of_two_npus():
    on(0) + on(1)


@refused(PARTS)
def adding_in_place_across_npus():
    on(0).add_(on(1))


@refused(PARTS)
def joining_tensors_of_two_npus():
    torch.cat([on(0), on(1)])


@refused(PARTS)
def multiplying_matrices_of_two_npus():
    torch.mm(on(0, 2, 2), on(1, 2, 2))


@refused(PARTS)
def a_linear_layer_on_cpu_input():
    nn.Linear(2, 2).to(DEVICE)(torch.ones(1, 2))


@refused(PARTS)
def writing_to_another_npu():
    torch.mul(on(0), on(0), out=on(1))


@refused(PARTS)
def a_list_of_tensors_on_two_npus():
    torch._foreach_add_([on(0)], [on(1)])


@refused(PARTS)
def an_embedding_by_cpu_ids():
    F.embedding(torch.tensor([1]), on(3, 2, 2))


@refused(PARTS)
def cpu_targets_of_cross_entropy():
    F.cross_entropy(on(3, 2, 3), torch.tensor([1, 2]))


@refused(PARTS)
def a_cpu_index_of_gather():
    on(3).gather(0, torch.tensor([1]))


@refused(PARTS)
def changing_a_cpu_scalar_by_an_npu_tensor():
    torch.zeros(()).masked_fill_(on(0)[0] > 0, 1.0)


@refused("same device|indices should be")
def an_index_on_another_npu():
    on(0)[torch.tensor([1], device="npu:1")]


@refused("Invalid NPU device ID 8: there are 8 NPUs")
def a_ninth_device():
    on(8)


@refused("Invalid NPU device ID 8: there are 8 NPUs")
def setting_a_ninth_device():
    torch.npu.set_device(8)


@works
def cpu_scalars_and_cpu_indices_are_taken():
    tensor = torch.arange(6.0, device=DEVICE).view(2, 3)
    same(torch.tensor(2.0) * tensor, torch.arange(6.0).view(2, 3) * 2)
    same(tensor[torch.tensor([1])], torch.tensor([[3.0, 4.0, 5.0]]))
    tensor[torch.tensor([1])] = 7
    assert tensor.sum() == 24


@works
def tensors_move_between_devices():
    tensor = torch.arange(3.0).to("npu:0").to(DEVICE)
    same(tensor, torch.arange(3.0))
    assert tensor.npu(1).device == torch.device("npu:1")
    assert torch.zeros(3).copy_(tensor)[2] == 2
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned() and not torch.ones(3).is_pinned()
    same(pinned.to(DEVICE, non_blocking=True), torch.ones(3))


@works
def torch_accelerator_knows_the_devices():
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("npu")
    assert torch.accelerator.device_count() == torch.npu.device_count() == 8
    torch.accelerator.set_device_index(2)
    assert torch.npu.current_device() == 2 and torch.ones(2, device="npu").device.index == 2
    torch.npu.set_device("npu:0")
    torch.accelerator.synchronize(torch.device(DEVICE))
    assert torch.npu.get_device_name(0) == "Simulated NPU"
    before, tensor = torch.accelerator.memory_allocated(6), on(6, 1000)
    assert torch.npu.memory_allocated(6) == before + 4 * tensor.numel()


# ---------------------------------------------------------------- operators


@works
def float64_silently_becomes_float32():
    assert on(3).double().dtype == on(3).to(torch.float64).dtype == torch.float32
    assert torch.zeros(2, dtype=torch.float64, device=DEVICE).dtype == torch.float64


@works
def operators_equal_the_cpus():
    matrix = torch.arange(9.0).view(3, 3).roll(1, 0)
    rows = torch.tensor([[2], [0], [1]])
    for run in (
        lambda m, r: m.argsort(0),
        lambda m, r: m.argmax(1),
        lambda m, r: m.softmax(1),
        lambda m, r: m.gather(1, r),
        lambda m, r: m.index_select(0, r[:, 0]),
        lambda m, r: m.masked_fill(m > 3, 0),
        lambda m, r: torch.zeros_like(m).scatter_add_(1, r, m),
        lambda m, r: torch.lerp(m, m + 1, 0.25),
        lambda m, r: m.T.contiguous(),
        lambda m, r: torch.stack(torch._foreach_mul([m, m], 2)),
        lambda m, r: F.cross_entropy(m, r[:, 0], ignore_index=0, label_smoothing=0.1),
    ):
        same(run(matrix.to(DEVICE), rows.to(DEVICE)), run(matrix, rows))


@works
def operators_write_into_slices():
    def run(device):
        out, factor = torch.zeros(4, 5, device=device), torch.ones(2, 2, device=device)
        torch.mm(factor, factor, out=out[:2, 3:])
        out[1:3, :2].addmm_(factor, factor)
        out[torch.tensor([3], device=device)] = 7
        torch.sub(out[:, 0], 1, out=out[:, 4])
        return out

    same(run(DEVICE), run("cpu"))


@works
def an_embedding_trains():
    ids = torch.tensor([1, 1, 2])
    same_training(nn.Embedding(5, 4), lambda model, device: model(ids.to(device)))


@works
def dropout_works_in_training():
    ones = torch.ones(1000, device=DEVICE, requires_grad=True)
    kept = F.dropout(ones, 0.25)
    kept.sum().backward()
    assert torch.equal(kept.detach(), ones.grad)
    assert 650 < (kept > 0).sum() < 850 and kept.max() == torch.tensor(1 / 0.75)


@works
def random_numbers_follow_the_seed():
    def draw():
        own = torch.Generator(DEVICE).manual_seed(4)
        return torch.cat([torch.randn(4, device=DEVICE), torch.rand(4, generator=own, device=DEVICE)])

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    state = torch.npu.get_rng_state(DEVICE)
    second = draw()
    torch.npu.set_rng_state(state, DEVICE)
    assert torch.equal(second, draw()) and not torch.equal(first, second)


@works
def tensors_are_saved_and_loaded():
    file = io.BytesIO()
    torch.save({"a": torch.arange(3, device=DEVICE)}, file)
    for where, device in (("cpu", "cpu"), (None, DEVICE)):
        file.seek(0)
        loaded = torch.load(file, map_location=where, weights_only=True)["a"]
        assert loaded.device == torch.device(device) and loaded.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- the GRU

INPUTS = torch.linspace(-1, 1, 60).view(4, 3, 5)


def gru(dtype: torch.dtype = torch.float32, **options) -> nn.GRU:
    return nn.GRU(5, 7, **options).to(DEVICE, dtype)


@works
def a_gru_equals_the_cpus():
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True}):
        model = nn.GRU(5, 7, **options)
        start = torch.rand(len(model.all_weights), INPUTS.shape[0 if model.batch_first else 1], 7)
        same_training(model, lambda model, device, start=start: model(INPUTS.to(device), start.to(device))[0])


@works
def a_float16_gru_has_float16_gradients():
    model = gru(torch.float16)
    model(INPUTS.to(DEVICE, torch.float16))[0].sum().backward()
    assert model.weight_hh_l0.grad.dtype == torch.float16


@works
def autocast_leaves_a_gru_alone():
    model, inputs = gru(), INPUTS.to(DEVICE)
    with torch.autocast("npu"):
        outputs = model(inputs)[0]
        assert F.linear(inputs, model.weight_ih_l0).dtype == torch.float16
        assert (inputs @ inputs.mT).softmax(-1).dtype == torch.float32
    assert torch.equal(outputs, model(inputs)[0])
    with torch.npu.amp.autocast(enabled=False):
        assert F.linear(inputs, model.weight_ih_l0).dtype == torch.float32


@refused("does not support packed sequences")
def a_packed_sequence():
    gru()(nn.utils.rnn.pack_padded_sequence(INPUTS.to(DEVICE), [4, 3, 2]))


@refused("float16 or float32, not BFloat16")
def a_bfloat16_gru():
    gru(torch.bfloat16)(INPUTS.to(DEVICE, torch.bfloat16))


@refused("float16 or float32, not BFloat16")
def a_bfloat16_gru_in_inference_mode():
    with torch.inference_mode():
        gru(torch.bfloat16)(INPUTS.to(DEVICE, torch.bfloat16))


@refused("of one dtype: the input is Float, the hidden state Half")
def a_float16_hidden_state_of_a_float32_gru():
    gru()(INPUTS.to(DEVICE), torch.zeros(1, 3, 7, device=DEVICE, dtype=torch.float16))


@refused("of one dtype: the input is Half, .*Float")
def float16_inputs_of_a_float32_gru_under_autocast():
    with torch.autocast("npu"):
        gru()(INPUTS.to(DEVICE, torch.float16))


# ---------------------------------------------------------------- training


@works
def adam_equals_the_cpus():
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        model = nn.Linear(3, 4)
        twin = copy.deepcopy(model).to(DEVICE)
        for module, device in ((model, "cpu"), (twin, DEVICE)):
            optimizer = kind(module.parameters())
            for _ in range(3):
                optimizer.zero_grad()
                module(torch.ones(5, 3, device=device)).square().sum().backward()
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
                optimizer.step()
        same(twin.weight.detach(), model.weight.detach())


@refused("_fused_adam_ has no kernel on an NPU")
def fused_adam():
    model = nn.Linear(3, 4).to(DEVICE)
    model(on(3)).sum().backward()
    torch.optim.Adam(model.parameters(), fused=True).step()


def scaled_step(scaler: torch.amp.GradScaler, value: float) -> bool:
    """Whether a step with gradients of `value` was made, and by the unscaled gradients."""
    weight = nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * value).sum()).backward()
    assert weight.grad[0] == 8 * value
    scaler.unscale_(optimizer)
    assert weight.grad[0] == value, weight.grad
    scaler.step(optimizer)
    scaler.update()
    assert weight[0] in (0, -value)
    return weight[0] == -value


@works
def a_dynamic_scaler_skips_and_halves():
    for scaler in (torch.amp.GradScaler("npu", init_scale=8.0), torch.npu.amp.GradScaler(init_scale=8.0)):
        assert scaled_step(scaler, 1.0) and scaler.get_scale() == 8
        assert not scaled_step(scaler, float("inf")) and scaler.get_scale() == 4


@works
def a_static_scaler_stays_and_does_not_look():
    scaler = torch.npu.amp.GradScaler(init_scale=8.0, dynamic=False)
    assert scaled_step(scaler, 1.0) and scaler.get_scale() == 8
    assert scaled_step(scaler, float("inf")) and scaler.get_scale() == 8, "it steps, by what is not finite"


report()
