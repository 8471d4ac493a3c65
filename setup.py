"""Build steps that setup.cfg cannot express: datapath/native, through cffi, and the emulated ConnectX."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from datapath.emulation.mlx5.build import BuildWithLibrary, extension

setup(
    cffi_modules=["datapath/native/build.py:ffibuilder", "datapath/drivers/mlx5/abi_build.py:ffibuilder"],
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildWithLibrary},
)
