"""Matrix products on a CPU: by the fastest library that is installed, in shapes that it knows already.

`torch.mm` takes oneDNN for half precision and MKL for float32. On Intel's processors both are fast. On AMD's, MKL
computes half of what the processor can: on two cores of a Zen 4 173 GFLOP/s, where oneDNN had 344 to 373. So float32
products there are oneDNN's, by operators of PyTorch that are not public. Where one is missing, or gives a different
result, `torch.mm` does everything. numpy's OpenBLAS is faster still by itself. But its threads and PyTorch's compete
for the same cores, and together they are several times slower.

oneDNN compiles a kernel for each shape that it has not met, which takes several times as long as the product itself. A
batch's number of rows differs from step to step. `rounded` makes few numbers of them. MKL compiles nothing.
"""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST_ROWS = 16  # of an AMX tile
MOST_ROWS = 4096  # of a product of oneDNN's: more would be more shapes, and no quicker
PART_ROWS = 2048  # of a weight's gradient: the operator needs a copy of them
PACKED_ROWS = 128  # of a product, roughly, that a weight is laid out for
ENOUGH_ROWS = 256  # with so many a product is worth a copy of its second matrix
HALF = (torch.bfloat16, torch.float16)
NO_INTEL = ("AuthenticAMD", "HygonGenuine")  # vendors of x86 processors that MKL was not written for


def rounded(rows: int, x: Tensor) -> int:
    """A number of rows for a product with such a matrix as `x`, at least `rows`.

    For MKL it is `rows`. For others there are sixteen such numbers up to each power of two.

    >>> [rounded(rows, torch.empty(0, dtype=torch.bfloat16)) for rows in (1, 16, 17, 900, 6600)]
    [16, 16, 32, 928, 6656]
    """
    if x.device.type == "cpu" and not compiles(x):
        return rows
    step = max(FEWEST_ROWS, 2 ** (rows.bit_length() - 5))
    return math.ceil(rows / step) * step


def with_spare_rows(x: Tensor, rows: int) -> Tensor:
    """`x`, [fewer rows, features], followed by rows of zeros: [rows, features]. It is `x` itself if none is missing."""
    if len(x) == rows:
        return x
    padded = x.new_empty(rows, x.shape[1])
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return padded


def mm(a: Tensor, b: Tensor, out: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
    """The product of two matrices, without a gradient.

    Args:
        a: [rows, inner].
        b: [inner, columns].
        out: [rows, columns] where the result goes. Left out: a new tensor.
        accumulate: adds the product to `out`.
    """
    special = prefers_dense(a) and (is_dense(b) or len(a) >= ENOUGH_ROWS) and a.numel() > 0 and b.numel() > 0
    in_parts = compiles(a) and a.stride(0) != 1  # the rows of a weight's gradient are always as many
    limit = MOST_ROWS if in_parts else max(1, len(a))
    if out is None and len(a) <= limit:
        return by_onednn(a, b) if special else torch.mm(a, b)
    if accumulate:
        assert out is not None
        return out.add_(by_onednn(a, b)) if special else out.addmm_(a, b)
    out = a.new_empty(len(a), b.shape[1]) if out is None else out
    for first in range(0, len(a), limit):
        rows = slice(first, first + limit)
        if special:
            out[rows] = by_onednn(a[rows], b)
        else:
            torch.mm(a[rows], b, out=out[rows])
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [rows, inner] times the transpose of `weight` [columns, inner], as `F.linear`, also under autocast."""
    if prefers_dense(x) and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        return mm(x, weight.T)
    return F.linear(x, weight)


class Weight:
    """A weight matrix that many matrices are multiplied by, without a gradient. It is laid out for that once.

    Args:
        weight: [columns, inner]. It must not change afterwards.
    """

    def __init__(self, weight: Tensor):
        self._weight = weight.detach().contiguous()
        self._packed = None
        if compiles(self._weight) and self._weight.numel() > 0 and onednn_packs(self._weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [rows, inner] times the transpose of the weight: [rows, columns]."""
        if self._packed is None or x.numel() == 0:
            return linear(x, self._weight)
        rows = len(x)
        x = with_spare_rows(x, rounded(rows, x))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")[:rows]

    def select(self, columns: Tensor) -> "Weight":
        """The weight of these columns of the product: [selected] int64 numbers."""
        return Weight(self._weight.index_select(0, columns))


def compiles(a: Tensor) -> bool:
    """Whether a kernel is compiled for each new shape of a product with `a`: by oneDNN, on a CPU."""
    return a.device.type == "cpu" and (a.dtype in HALF or prefers_dense(a))


def prefers_dense(a: Tensor) -> bool:
    """Whether products with `a` are quicker if the other matrix has no gaps: they are oneDNN's by its own operators."""
    return a.dtype == torch.float32 and a.device.type == "cpu" and float32_by_onednn()


def is_dense(matrix: Tensor) -> bool:
    """Whether the rows, or the columns, of a matrix follow each other without a gap."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """`torch.mm` by oneDNN, of two matrices that are not empty."""
    if a.stride(0) == 1:  # the rows' gradients times what the rows were: the gradient of a weight
        total = None
        for first in range(0, len(b), PART_ROWS):
            grad, x = a.T[first : first + PART_ROWS].to_mkldnn(), b[first : first + PART_ROWS].to_mkldnn()
            part = torch.ops.aten.mkldnn_linear_backward_weights(grad, x, b, False)[0]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total
    weight = b.T if is_dense(b) else b.T.contiguous()  # for what has gaps oneDNN has a reference loop, which is slow
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), weight, None, "none", [], "")


@functools.cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes a weight in its own layout, and gives what `torch.mm` gives."""
    a, b = torch.arange(32.0).view(2, 16).to(dtype), torch.arange(48.0).remainder(5).view(3, 16).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, PACKED_ROWS)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), a @ b.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


@functools.cache
def float32_by_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN multiplies float32 matrices faster than `torch.mm`, and can be asked to."""
    try:
        words = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(vendor in words for vendor in NO_INTEL) and onednn_answers()


def onednn_answers() -> bool:
    """Whether the operators exist, and give what `torch.mm` gives."""
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    try:
        return all(
            torch.equal(by_onednn(x, y), x @ y) for x in (a, a.T.contiguous().T) for y in (b, b.T.contiguous().T)
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
