"""Makes `_abi`, the declarations of `abi` as cffi has them once it has read them: to do that at each start of
a port would cost it a tenth of a second and 4 MB.
"""

from cffi import FFI

from datapath.drivers.mlx5.abi import MLX5, STRUCTURES, VERBS

ffibuilder = FFI()
ffibuilder.cdef(STRUCTURES + VERBS + MLX5)
ffibuilder.set_source("datapath.drivers.mlx5._abi", None)
