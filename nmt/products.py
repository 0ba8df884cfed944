"""Matrix products on a CPU: by the fastest library that is installed, in shapes that it knows already.

`torch.mm` takes oneDNN for half precision and MKL for float32. Both are fast on Intel's processors. On AMD's, MKL
computes half of what the processor can: 173 GFLOP/s where numpy's OpenBLAS had 475, measured on two cores of a Zen 4.
So float32 products there are numpy's, if numpy has OpenBLAS.

oneDNN compiles a kernel for each shape that it has not met, which takes several times as long as the product itself. A
batch's number of rows differs from step to step. `rounded` makes few numbers of them.
"""

import functools
import math
from pathlib import Path

import numpy
import torch
from torch import Tensor

FEWEST_ROWS = 16  # of an AMX tile


def rounded(rows: int) -> int:
    """A number of rows for a product, at least `rows`. There are sixteen such numbers up to each power of two.

    >>> [rounded(rows) for rows in (1, 16, 17, 900, 6600)]
    [16, 16, 32, 928, 6656]
    """
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
    if not (a.dtype == torch.float32 and a.device.type == "cpu" and float32_by_numpy()):
        if accumulate:
            return out.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    a, b = a.detach().numpy(), b.detach().numpy()
    if accumulate:
        return out.add_(torch.from_numpy(numpy.matmul(a, b)))
    numpy.matmul(a, b, out=out.numpy())
    return out


@functools.cache
def float32_by_numpy(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether numpy multiplies float32 matrices faster than PyTorch: on an AMD processor, by OpenBLAS."""
    try:
        is_amd = "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return is_amd and "openblas" in blas_of_numpy()


def blas_of_numpy() -> str:
    """The name of the library that numpy multiplies with, or an empty string if numpy does not say."""
    config = numpy.show_config(mode="dicts")
    return str(config.get("Build Dependencies", {}).get("blas", {}).get("name", "")).lower() if config else ""
