"""Build step that setup.cfg cannot express: the C of datapath/native, through cffi."""

from setuptools import setup

setup(cffi_modules=["datapath/native/build.py:ffibuilder"])
