"""What the scripts at the root stand on: devices, processes, precision, text, files. No model is here.

Nothing here imports the root. Importing this package sets what PyTorch reads while it is imported, so import it first.
"""

import os

# PyTorch would load torch_npu by itself, and fail where torch_npu is installed without CANN. `nmt.devices` loads it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# oneDNN keeps the kernels that it has compiled, one for each shape of a matrix product. An epoch has 300 to 500 shapes
# (`nmt.products.rounded`). With fewer kernels kept, most would be compiled again and again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
# A thread that has done its part of an operation waits for the others, and spins meanwhile. On cores that other
# programs use too, it keeps those others from running. With a third of libgomp's usual patience two threads there train
# more than twice as fast, and on free cores 1% slower. Without any they are a third slower on free cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
