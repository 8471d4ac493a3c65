"""Giving descriptors back, and what a sudden end closes first."""

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from datapath.descriptors import close_all


def test_one_that_cannot_be_closed_keeps_no_other_open() -> None:
    gone, still_open = os.pipe()
    os.close(gone)
    close_all([gone, still_open])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(still_open)


#: Given a device's descriptor and a front-end's above it, moves the former and waits to be killed.
HOLDER = """
import signal, sys
from datapath.descriptors import closed_early
device, front_end = map(int, sys.argv[1:])
assert closed_early(device) > front_end
print("ready", flush=True)
signal.pause()
"""


def test_the_device_goes_first_when_a_process_is_killed() -> None:
    device, held_device = socket.socketpair()
    front_end, held_front_end = socket.socketpair()
    held = [held_device.fileno(), held_front_end.fileno()]
    assert held[0] < held[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, held)], pass_fds=held, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    held_device.close()
    held_front_end.close()
    gone = select.epoll()  # tells in the order of what happened
    gone.register(front_end, select.EPOLLRDHUP | select.EPOLLET)
    gone.register(device, select.EPOLLRDHUP | select.EPOLLET)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert [fd for fd, _ in gone.poll(5)] == [device.fileno(), front_end.fileno()]
    holder.stdout.close()
    gone.close()
    device.close()
    front_end.close()


def test_a_descriptor_stays_where_it_is_when_numbers_have_run_out() -> None:
    program = """
import contextlib, os, resource
from datapath.descriptors import closed_early
fd = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, fd + 1))
with contextlib.suppress(OSError):
    while True:
        os.dup(0)
assert closed_early(fd) == fd
os.fstat(fd)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
