"""What the scripts at the root stand on: devices, processes, precision, text, files. No model is here.

Nothing here imports the root. Importing this package sets what PyTorch reads while it is imported, so import it first.
"""

import os

# PyTorch would load torch_npu by itself, and fail where torch_npu is installed without CANN. `nmt.devices` loads it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
