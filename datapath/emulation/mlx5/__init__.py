"""An emulated ConnectX: a shared object with the part of libibverbs and libmlx5 that vDPA uses."""
