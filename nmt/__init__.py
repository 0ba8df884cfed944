"""What the scripts at the root stand on: devices, processes, precision, text, files. No model is here.

Nothing here imports the root. Importing this package sets what PyTorch reads while it is imported, so import it first.
"""

import os

# PyTorch would load torch_npu by itself, and fail where torch_npu is installed without CANN. `nmt.devices` loads it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# oneDNN, and PyTorch's layer above it, each keep up to 1024 kernels of about a megabyte: one for each shape of a matrix
# product. Batches without padding bring ever new shapes. A new kernel takes a millisecond at most, so we keep few.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
