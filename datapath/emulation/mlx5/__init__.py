"""An emulated ConnectX: a shared object with the part of libibverbs and libmlx5 that vDPA uses.

A driver opens it by its path, or has it preloaded before the real libraries. `options.h` says what the
environment variable MLX5_EMULATION sets, `device.h` what there is, `build.py` how it is built.
"""

from pathlib import Path

#: The shared object.
LIBRARY = Path(__file__).parent / "libmlx5_emulated.so"
