"""Triton's kernels run in its interpreter here, which has to be said before anybody imports it.

Where there is a GPU, `TRITON_INTERPRET=0 pytest tests/unit/test_kernels_gpu.py` runs them on it.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
