"""Giving descriptors back."""

import os

import pytest

from datapath.descriptors import close_all


def test_one_that_cannot_be_closed_keeps_no_other_open() -> None:
    gone, still_open = os.pipe()
    os.close(gone)
    close_all([gone, still_open])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(still_open)
