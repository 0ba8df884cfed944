"""What `bench/check_device.py` measures on each device, in a process of its own for each.

`checks` is the table. Most checks run on each device alone: operators and training steps against the CPU, then speeds.
The collectives at its end run on all devices together, and each rank contributes its own number.
"""

import functools
import itertools
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import gru
from nmt import devices, kernels, precision
from nmt.distributed import World
from nmt.errors import UserError, first_line, lost_peer

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 10
RATE = 0.003  # the learning rate of the steps: the recipes' peak, so that wrong gradients show
TIMED_AT_LEAST = 5  # times

# The largest error of an operator, as a part of its largest result. A CPU's errors against float64 are at most 1.2e-6
# in float32, 7.7e-4 in float16 and 5.1e-3 in bfloat16 (`python -m bench.device_checks` measures them). TF32 in the
# place of float32 gives about 3e-4. A wrong kernel gives 0.01 and more, most of them far more.
OPERATOR_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
# The largest difference of one of ten losses, as a part of it. By the same command a CPU differs from itself by 1.7e-6
# with another number of threads, by 5.7e-5 in float16 and by 2.8e-4 in bfloat16. Ten times that or more is allowed.
STEP_ERROR = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 3e-3}
ENOUGH_MEMORY = 2e9  # bytes that training takes on Multi30k, and some room


@dataclass(frozen=True)
class Sizes:
    """How large the checks are.

    Attributes:
        emb_dim, hid_dim, batch: of the ten steps and of the operators.
        words: in the operators' vocabulary.
        product: rows, inner size and columns of the timed product.
        copied: bytes of the timed copy.
        reduced: bytes of the timed all-reduce. The gradients of the model of Multi30k are 57 MB.
        seconds: each speed is the best of so long a time.
    """

    emb_dim: int = 256
    hid_dim: int = 512
    batch: int = 32
    words: int = 1000
    product: int = 4096
    copied: int = 1 << 30
    reduced: int = 1 << 26
    seconds: float = 0.3


SIZES = {"npu": Sizes(), "cuda": Sizes(product=8192), "cpu": Sizes(product=512, copied=1 << 27)}
TINY = Sizes(emb_dim=16, hid_dim=24, batch=16, words=100, product=64, copied=1 << 16, reduced=1 << 12, seconds=0.03)


class Wrong(Exception):
    """What a check has found, in words."""


class Figure(float):
    """A figure that knows which of several results it is of."""

    def __new__(cls, value: float, of: str = ""):
        return super().__new__(cls, value)

    def __init__(self, value: float, of: str = ""):
        self.of = of


@dataclass(frozen=True)
class Place:
    """What a check is given: a device, and the rank that has it."""

    world: World
    sizes: Sizes
    sample: Path

    @property
    def device(self) -> torch.device:
        return self.world.device

    def alive(self) -> None:
        """Tells the process that watches this one that it goes on."""
        if self.world.counter is not None:
            self.world.progress(self.world.counter.get() + 1)

    @functools.cached_property
    def corpus(self) -> data.Corpus:
        return data.load(self.sample, verify=False, log=lambda line: None)

    @functools.cached_property
    def losses_on_cpu(self) -> list[float]:
        return losses_of_steps(self, torch.device("cpu"), precision.Choice())


@dataclass(frozen=True)
class Check:
    """One row of the page.

    Attributes:
        name: of the check.
        measure: makes it. It returns a figure, or None if there is none. It may raise `Wrong`.
        unit: of the figure: "error", "FLOP/s", "B/s" or "B".
        most, least: the figure's limit, on each device.
        compared: whether a device must be about as fast as the others.
        together: whether the devices make it together.
        skipped: why it is not made, if it is not.
    """

    name: str
    measure: Callable[[Place], float | None] = lambda place: None
    unit: str = ""
    most: float | None = None
    least: float | None = None
    compared: bool = False
    together: bool = False
    skipped: str = ""


# ---------------------------------------------------------------- single operators


@dataclass(frozen=True)
class Operator:
    """An operator that training uses.

    Attributes:
        inputs: makes the named inputs, in float64 or int64 on the CPU.
        compute: takes them, on a device in some dtype, and returns named results.
        reference: the same by plain means, in float64 on the CPU. None: `compute`.
    """

    inputs: Callable[[Sizes], dict[str, Tensor]]
    compute: Callable[..., dict[str, Tensor]]
    reference: Callable[..., dict[str, Tensor]] | None = None


def _rows(sizes: Sizes) -> int:
    return 12 * sizes.batch  # steps of a batch


def _gradients(result: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """The result, and the gradients of a weighted sum of it."""
    # Weights of both signs and of some variety, the same on every device.
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
    gradients = torch.autograd.grad((result * weights.to(result)).sum(), list(inputs.values()))
    return {"forward": result} | dict(zip((f"gradient of {name}" for name in inputs), gradients, strict=True))


def _embedding(table: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    return _gradients(F.embedding(tokens, table), table=table)


def _product(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    return _gradients(left @ right, left=left, right=right)


def _softmax(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return _gradients(F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets), x=logits)


def _gru(inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> dict[str, Tensor]:
    rnn = kernels.GRU(weight_ih.shape[1], weight_hh.shape[1]).to(inputs)
    weights = {"weight_ih_l0": weight_ih, "weight_hh_l0": weight_hh, "bias_ih_l0": bias, "bias_hh_l0": bias}
    with torch.no_grad():
        for name, value in weights.items():
            getattr(rnn, name).copy_(value)
    batch = len(inputs) // 12
    outputs, _ = rnn.run(inputs, [batch] * 12, None, rnn.context_gates(batch))
    return _gradients(outputs, input=inputs, weight_ih=rnn.weight_ih_l0, weight_hh=rnn.weight_hh_l0)


def _plain_gru(inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """From the formulas of nn.GRU, step by step."""
    weight_ih, weight_hh = weight_ih.clone().requires_grad_(), weight_hh.clone().requires_grad_()
    outputs = []
    hidden = inputs.new_zeros(len(inputs) // 12, weight_hh.shape[1])
    for x in inputs.chunk(12):
        of_input, of_state = (x @ weight_ih.T + bias).chunk(3, 1), (hidden @ weight_hh.T + bias).chunk(3, 1)
        r, z = torch.sigmoid(of_input[0] + of_state[0]), torch.sigmoid(of_input[1] + of_state[1])
        hidden = (1 - z) * torch.tanh(of_input[2] + r * of_state[2]) + z * hidden
        outputs.append(hidden)
    return _gradients(torch.cat(outputs), input=inputs, weight_ih=weight_ih, weight_hh=weight_hh)


def _output_loss(features: Tensor, context: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    steps = [len(context)] * (len(features) // len(context))
    bias = weight.new_zeros(len(weight))
    loss = kernels.output_loss(features, context, weight, bias, targets, steps, label_smoothing=0.1, ignored=1)
    return _gradients(loss, features=features, context=context, weight=weight)


def _plain_output_loss(features: Tensor, context: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    both = torch.cat((features, context.repeat(len(features) // len(context), 1)), dim=1)
    loss = F.cross_entropy(both @ weight.T, targets, ignore_index=1, label_smoothing=0.1, reduction="sum")
    return _gradients(loss, features=features, context=context, weight=weight)


def _argmax(logits: Tensor) -> dict[str, Tensor]:
    return {"forward": logits.argmax(dim=1)}


def _adam(weights: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    parameter = nn.Parameter(weights.detach().clone())
    optimizer = precision.make_optimizer(precision.Choice(), [parameter], weights.device)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for factor in ADAM_FACTORS:
        parameter.grad = gradients.detach() * factor
        optimizer.step()
    return {"change": parameter.detach() - weights.detach()}


def _plain_adam(weights: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """From the formulas of Kingma and Ba 2015, arXiv 1412.6980."""
    change, mean, square = (torch.zeros_like(weights) for _ in range(3))
    for t, factor in enumerate(ADAM_FACTORS, 1):
        mean = 0.9 * mean + 0.1 * gradients * factor
        square = 0.999 * square + 0.001 * (gradients * factor) ** 2
        change = change - RATE * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + precision.EPSILON)
    return {"change": change}


def _draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def _ids(sizes: Sizes) -> Tensor:
    return torch.randint(sizes.words, (_rows(sizes),))


def _one_largest(places: Tensor, words: int) -> Tensor:
    """Rows of small numbers with one that is larger, all of which every dtype holds."""
    return torch.randint(-100, 100, (len(places), words)).double().scatter(1, places.unsqueeze(1), 120.0)


OPERATORS = {
    "embedding": Operator(
        lambda sizes: {"table": _draw(sizes.words, sizes.emb_dim), "tokens": _ids(sizes)}, _embedding
    ),
    "matrix product": Operator(
        lambda sizes: {"left": _draw(_rows(sizes), sizes.hid_dim), "right": _draw(sizes.hid_dim, sizes.words)}, _product
    ),
    "GRU": Operator(
        lambda sizes: {
            "inputs": _draw(_rows(sizes), sizes.emb_dim),
            "weight_ih": _draw(3 * sizes.hid_dim, sizes.emb_dim, scale=sizes.emb_dim**-0.5),
            "weight_hh": _draw(3 * sizes.hid_dim, sizes.hid_dim, scale=sizes.hid_dim**-0.5),
            "bias": _draw(3 * sizes.hid_dim, scale=0.1),
        },
        _gru,
        _plain_gru,
    ),
    "softmax and cross entropy": Operator(
        lambda sizes: {"logits": _draw(_rows(sizes), sizes.words, scale=2), "targets": _ids(sizes)}, _softmax
    ),
    "output layer with its loss": Operator(
        lambda sizes: {
            "features": _draw(_rows(sizes), sizes.emb_dim),
            "context": _draw(sizes.batch, sizes.hid_dim),
            "weight": _draw(sizes.words, sizes.emb_dim + sizes.hid_dim, scale=sizes.hid_dim**-0.5),
            "targets": _ids(sizes),
        },
        _output_loss,
        _plain_output_loss,
    ),
    "argmax": Operator(lambda sizes: {"logits": _one_largest(_ids(sizes), sizes.words)}, _argmax),
    "Adam": Operator(
        lambda sizes: {"weights": _draw(sizes.hid_dim, scale=0.01), "gradients": _draw(sizes.hid_dim)},
        _adam,
        _plain_adam,
    ),
}
ADAM_FACTORS = (1.0, -0.5, 0.25)
FLOAT32_ALONE = ("Adam",)  # the masters' optimizer


def operator_error(place: Place, name: str, dtype: torch.dtype) -> Figure:
    """The largest error of an operator's results, each as a part of that result's largest element.

    Raises:
        Wrong: a result has another shape, or is not finite. It names the result.
    """
    operator = OPERATORS[name]
    torch.manual_seed(1234)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in operator.inputs(place.sizes).items()
    }

    def run(compute: Callable[..., dict[str, Tensor]], to: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        arguments = {key: to(value).detach().clone() for key, value in inputs.items()}
        for argument in arguments.values():
            argument.requires_grad_(argument.is_floating_point())
        return {key: value.detach().cpu().double() for key, value in compute(**arguments).items()}

    found = run(operator.compute, lambda tensor: tensor.to(place.device))
    expected = run(
        operator.reference or operator.compute,
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor,
    )
    errors = {}
    for key, right in expected.items():
        if found[key].shape != right.shape:
            raise Wrong(f"{key} has shape {list(found[key].shape)}, not {list(right.shape)}")
        if not found[key].isfinite().all():
            raise Wrong(f"{key} is not finite")
        errors[key] = float((found[key] - right).abs().max() / right.abs().max())
    worst = max(errors, key=lambda key: errors[key])
    return Figure(errors[worst], of=worst)


# ---------------------------------------------------------------- training steps


def losses_of_steps(
    place: Place, device: torch.device, mixed: precision.Choice, padded: bool | None = None, exact: bool = False
) -> list[float]:
    """The losses of ten steps on a device, without dropout: nats a target token. Weights and batches are the same.

    Args:
        place: its corpus and its sizes count.
        device: to compute on.
        mixed: the precision.
        padded: as in `data.Loader`.
        exact: whether to compute in float64 in the place of float32.
    """
    corpus, sizes = place.corpus, place.sizes
    torch.manual_seed(1234)
    model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab), emb_dim=sizes.emb_dim, hid_dim=sizes.hid_dim)
    gru.init_orthogonal(model)
    model.to(device, torch.float64 if exact else torch.float32)
    trainer = precision.make_trainer(mixed, model, device)
    criterion = gru.TrainingLoss(trainer.working_model, label_smoothing=0.1).train()
    loader = data.Loader(corpus.train, device, padded=padded)
    losses = []
    for indices in itertools.islice(data.epoch_batches(corpus.train, sizes.batch, seed=1234, epoch=0), STEPS):
        batch = loader(indices)
        with trainer.forward_context():
            loss = criterion(batch, 1.0) / batch.target_tokens
        trainer.backward(loss)
        trainer.step(RATE, max_norm=1.0)
        losses.append(float(loss.detach()))
        place.alive()  # a device that compiles for each new shape may take long
    return losses


def steps_error(place: Place, mixed: precision.Choice) -> Figure:
    """The largest difference of a loss from the CPU's in float32, as a part of the latter."""
    losses = losses_of_steps(place, place.device, mixed)
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"the losses are {' '.join(f'{loss:.4f}' for loss in losses)}")
    differences = [abs(own - right) / right for own, right in zip(losses, place.losses_on_cpu, strict=True)]
    step = max(range(STEPS), key=lambda step: differences[step])
    return Figure(differences[step], of=f"step {step + 1}")


def choices(device_type: str, indices: Sequence[int]) -> dict[str, precision.Choice | str]:
    """The precisions of a device by their names. Of those that it has not: why."""
    found: dict[str, precision.Choice | str] = {"float32": precision.Choice()}
    for level, dtype in itertools.product(("O1", "O2"), precision.DTYPES):
        try:
            found[f"{dtype} {level}"] = precision.choose(device_type, level, dtype=dtype, indices=indices)
        except UserError as error:
            found[f"{dtype} {level}"] = str(error.args[1])
    return found


# ---------------------------------------------------------------- speed and memory


def best_seconds(place: Place, work: Callable[[], object]) -> float:
    """The shortest time of some work. The device is synchronised around each.

    The shortest and not the middle one: on a CPU that others use too, it hardly depends on them.
    """
    for _ in range(2):
        work()
    devices.synchronize(place.device)
    best, count, start = math.inf, 0, time.perf_counter()
    while count < TIMED_AT_LEAST or time.perf_counter() - start < place.sizes.seconds:
        before = time.perf_counter()
        work()
        devices.synchronize(place.device)
        best, count = min(best, time.perf_counter() - before), count + 1
    return best


def product_rate(place: Place, dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    size = place.sizes.product
    left, right = (torch.randn(size, size).to(dtype).to(place.device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / best_seconds(place, lambda: torch.mm(left, right, out=out))


def copy_rate(place: Place) -> float:
    """Bytes that the device's memory reads and writes in a second, in a copy.

    Raises:
        Wrong: the copy is not equal.
    """
    source = torch.arange(place.sizes.copied // 4, dtype=torch.int32, device=place.device)
    target = torch.zeros_like(source)
    seconds = best_seconds(place, lambda: target.copy_(source))
    if not torch.equal(source, target):
        raise Wrong("the copy differs")
    return 2 * place.sizes.copied / seconds


def free_memory(place: Place) -> float | None:
    """Bytes that are free. None: nobody can say."""
    if place.device.type == "cpu":
        about = Path("/proc/meminfo")  # Linux's
        match = re.search(r"^MemAvailable: *(\d+) kB", about.read_text() if about.exists() else "", re.MULTILINE)
        return int(match[1]) * 1024.0 if match else None
    module = getattr(torch, place.device.type)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(place.device.index)
    return Figure(float(free), of=f"{total / 1e9:.1f} GB")


# ---------------------------------------------------------------- all devices together


def meet(place: Place) -> None:
    place.world.start()


def all_reduce(place: Place) -> None:
    """Each rank adds its number plus 1 at its own place. So the sum tells who is not in it."""
    rank, size = place.world.rank, place.world.size
    mine = torch.zeros(size)
    mine[rank] = rank + 1
    total = mine.to(place.device)
    dist.all_reduce(total)
    found = total.cpu().tolist()
    wrong = {other: value for other, value in enumerate(found) if value != other + 1}
    if lost := [other for other, value in wrong.items() if value == 0]:
        raise Wrong(f"the sum lacks {_ranks(lost)}")
    if wrong:
        raise Wrong(f"the sum has a wrong number of {_ranks(wrong)}")


def broadcast(place: Place) -> None:
    """Each rank in turn gives its number to all."""
    wrong = []
    for root in range(place.world.size):
        value = torch.full((8,), float(place.world.rank + 1), device=place.device)
        dist.broadcast(value, root)
        if value.cpu().tolist() != [root + 1.0] * 8:
            wrong.append(root)
    if wrong:
        raise Wrong(f"rank {place.world.rank} did not get the number of {_ranks(wrong)}")


def all_gather(place: Place) -> None:
    """Each rank gets the numbers of all."""
    value = torch.full((8,), float(place.world.rank + 1), device=place.device)
    values = [torch.zeros_like(value) for _ in range(place.world.size)]
    dist.all_gather(values, value)
    if wrong := [rank for rank, each in enumerate(values) if each.cpu().tolist() != [rank + 1.0] * 8]:
        raise Wrong(f"rank {place.world.rank} did not get the number of {_ranks(wrong)}")


def reduce_rate(place: Place) -> float:
    """Bytes a second that each device's link carries in a sum as large as the gradients.

    A sum over n devices moves 2 (n - 1) / n of its bytes through each link, in and out (Patarasuk and Yuan 2009,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations").

    Raises:
        Wrong: the sum is not right everywhere.
    """
    size = place.world.size
    value = torch.empty(place.sizes.reduced // 4, device=place.device)
    best = math.inf
    for _ in range(TIMED_AT_LEAST + 1):
        value.fill_(place.world.rank + 1)
        devices.synchronize(place.device)
        start = time.perf_counter()
        dist.all_reduce(value)
        devices.synchronize(place.device)
        best = min(best, time.perf_counter() - start)
    wrong = int((value != size * (size + 1) / 2).sum())
    if wrong:
        raise Wrong(f"{wrong} of {value.numel()} sums are wrong")
    return 2 * (size - 1) / size * place.sizes.reduced / best


def _ranks(numbers: Sequence[int] | dict[int, Any]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


# ---------------------------------------------------------------- the table


def checks(device_type: str, indices: Sequence[int]) -> list[Check]:
    """All checks in their order. Each rank makes those that are not skipped.

    Args:
        device_type: "npu", "cuda" or "cpu".
        indices: of the devices.
    """
    of_device = choices(device_type, indices)
    computed = {choice.dtype_name for choice in of_device.values() if not isinstance(choice, str)}
    dtypes = [dtype for dtype in ("float32", *precision.DTYPES) if dtype in computed]
    table = []
    for name in OPERATORS:
        for dtype in dtypes[:1] if name in FLOAT32_ALONE else dtypes:
            measure = functools.partial(operator_error, name=name, dtype=getattr(torch, dtype))
            table.append(Check(f"{name}, {dtype}", measure, "error", most=OPERATOR_ERROR[dtype]))
    for name, choice in of_device.items():
        title = f"ten training steps, {name}"
        if isinstance(choice, str):
            table.append(Check(title, skipped=choice))
        else:
            limit = STEP_ERROR[choice.dtype_name]
            table.append(Check(title, functools.partial(steps_error, mixed=choice), "error", most=limit))
    for dtype in dtypes:
        rate = functools.partial(product_rate, dtype=getattr(torch, dtype))
        table.append(Check(f"speed of products, {dtype}", rate, "FLOP/s", compared=True))
    table.append(Check("speed of memory", copy_rate, "B/s", compared=True))
    table.append(Check("free memory", free_memory, "B", least=ENOUGH_MEMORY))
    alone = "" if len(indices) > 1 else "there is one device"
    for title, collective, unit in (
        ("the ranks meet", meet, ""),
        ("all_reduce", all_reduce, ""),
        ("broadcast", broadcast, ""),
        ("all_gather", all_gather, ""),
        ("speed of all_reduce", reduce_rate, "B/s"),
    ):
        table.append(Check(title, collective, unit, together=True, skipped=alone))
    return table


# ---------------------------------------------------------------- a rank


def record_path(folder: Path, rank: int) -> Path:
    """The file of a rank's findings: one JSON object a line."""
    return folder / f"rank-{rank}.jsonl"


def examine(index: int, worlds: Sequence[World], sizes: Sizes, sample: Path, folder: Path) -> None:
    """The work of a rank: it makes the checks and writes down what it finds, check by check.

    What libraries print goes to `rank-N.txt`. A check that fails does not end the others. A collective that fails does:
    the other ranks would wait.
    """
    world = worlds[index]
    output = os.open(folder / f"rank-{world.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    place = Place(world, sizes, sample)
    with open(record_path(folder, world.rank), "w", encoding="utf-8") as file:

        def write(**values: object) -> None:
            print(json.dumps(values), file=file, flush=True)
            place.alive()

        write(begins="the preparation of the device")
        devices.prepare(world.device, world.local_size)
        if world.device_type != "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, devices.cores() // world.local_size))  # for what is computed on the CPU
        write(device=devices.name(world.device))
        for check in checks(world.device_type, [each.index for each in worlds]):
            if check.skipped:
                continue
            write(begins=check.name)
            found: dict[str, object] = {"check": check.name}
            try:
                value = check.measure(place)
            except Wrong as wrong:
                found["problem"] = str(wrong)
            except Exception as error:
                if check.together or lost_peer(error):
                    raise
                traceback.print_exc()
                found["problem"] = first_line(error)
            else:
                if value is not None:
                    found["value"] = float(value)
                    if isinstance(value, Figure) and value.of:
                        found["of"] = value.of
            write(**found)
        if world.size > 1:
            world.stop()


def main() -> None:
    """Prints how far a CPU is from exact results, and from itself where it rounds otherwise."""
    place = Place(World(), SIZES["cpu"], Path(__file__).resolve().parent.parent / "sample")
    for dtype in ("float32", *precision.DTYPES):
        for name in OPERATORS:
            if dtype == "float32" or name not in FLOAT32_ALONE:
                print(f"{name}, {dtype}: error {operator_error(place, name, getattr(torch, dtype)):.1e}")
    cpu, threads = torch.device("cpu"), torch.get_num_threads()

    def print_difference(name: str, mixed: precision.Choice, **options: bool) -> None:
        pairs = zip(losses_of_steps(place, cpu, mixed, **options), place.losses_on_cpu, strict=True)
        print(f"ten steps, {name}: error {max(abs(own - right) / right for own, right in pairs):.1e}")

    print(f"ten steps, losses in float32: {' '.join(f'{loss:.4f}' for loss in place.losses_on_cpu)}")
    print_difference("float64", precision.Choice(), exact=True)
    print_difference("float32, padded", precision.Choice(), padded=True)
    torch.set_num_threads(3 - min(threads, 2))
    print_difference("float32, other threads", precision.Choice())
    torch.set_num_threads(threads)
    for level, dtype in itertools.product(("O1", "O2"), precision.DTYPES):
        half = precision.Choice(level, precision.DTYPES[dtype], 32.0 if dtype == "float16" else 1.0)
        print_difference(f"{dtype} {level}", half)
        print_difference(f"{dtype} {level}, padded", half, padded=True)


if __name__ == "__main__":
    main()
