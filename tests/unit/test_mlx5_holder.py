"""Who has a ConnectX: told to whoever else wants it, however often it is asked."""

import os

import pytest

from datapath.drivers.mlx5.holder import Holder
from datapath.vdpa import DeviceError

#: More than wait to be accepted by a socket.
OFTEN = 200


def test_however_often_it_is_asked() -> None:
    device = f"test{os.getpid()}"
    holder = Holder(device, "mlx5,ibdev=a")
    said = set()
    for _ in range(OFTEN):
        with pytest.raises(DeviceError) as refused:
            Holder(device, "mlx5,ibdev=a")
        said.add(str(refused.value))
    assert said == {
        f"mlx5,ibdev=a: {device} is held by this process",
        f"mlx5,ibdev=a: {device} is held by another process",
    }
    holder.close()
    Holder(device, "mlx5,ibdev=a").close()
