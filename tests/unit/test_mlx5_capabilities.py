"""The virtio features that follow from a ConnectX' capabilities, and what its queues are told of them."""

import pytest

from datapath.drivers.mlx5.capabilities import OFFERED, UmemSize, features
from datapath.drivers.mlx5.virtqueue import offloads
from datapath.mlx5_prm import VDPA_CAPABILITIES
from datapath.virtio import Feature

NOTHING = dict.fromkeys(VDPA_CAPABILITIES.fields, 0)
#: What DPDK's driver makes of a device with all but packed rings.
DPDK = 0x114C60180B


def test_a_device_that_can_do_everything_but_packed_rings() -> None:
    assert features({**NOTHING, **dict.fromkeys(OFFERED, 1), "virtio_queue_type": 1}) == DPDK


def test_packed_rings_are_not_offered() -> None:
    assert not features({**NOTHING, "virtio_queue_type": 3}) >> Feature.F_RING_PACKED & 1


@pytest.mark.parametrize(("capability", "feature"), OFFERED.items())
def test_each_capability_is_a_feature(capability: str, feature: Feature) -> None:
    assert features({**NOTHING, capability: 1}) ^ features(NOTHING) == 1 << feature


@pytest.mark.parametrize("feature", [Feature.NET_F_HOST_TSO4, Feature.NET_F_HOST_TSO6])
def test_segments_have_checksums(feature: Feature) -> None:
    assert offloads(1 << feature)["tx_csum"] == 1
    assert offloads(1 << Feature.NET_F_GUEST_CSUM)["tx_csum"] == 0


def test_umems_grow_with_the_queue() -> None:
    assert UmemSize(per_descriptor=64, constant=4096).of(256) == 64 * 256 + 4096
