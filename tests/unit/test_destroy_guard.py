"""What is taken for a domain that arrives here, and may be destroyed: never the guest itself."""

from typing import Any, cast

import libvirt
import pytest

from libvirt_vdpa.hypervisor import HypervisorError, destroy_incoming, job_of

WAITS = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]
RUNS = [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED]


def failure(code: int) -> libvirt.libvirtError:
    """An error of libvirt's, as a call of it raises."""
    error = libvirt.libvirtError("no")
    error.err = (code, 0, "no", 0, "", None, None, 0, 0)
    return error


class Domain:
    """A domain that has the next of some states each time that it is asked."""

    def __init__(self, job: dict[str, object] | libvirt.libvirtError, *states: list[int]) -> None:
        self.job = job
        self.states = list(states)
        self.destroyed = False

    def state(self) -> list[int]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def jobStats(self) -> dict[str, object]:  # noqa: N802
        if isinstance(self.job, libvirt.libvirtError):
            raise self.job
        return self.job

    def destroy(self) -> None:
        self.destroyed = True


ARRIVES = failure(libvirt.VIR_ERR_OPERATION_UNSUPPORTED)
BUSY = failure(libvirt.VIR_ERR_OPERATION_TIMEOUT)
LEAVES = {
    "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED,
    "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
}


def test_one_that_arrives() -> None:
    domain = Domain(ARRIVES, WAITS)
    destroy_incoming(cast(Any, domain))
    assert domain.destroyed


@pytest.mark.parametrize(
    ("job", "states"),
    [
        pytest.param(LEAVES, [WAITS], id="it leaves"),
        pytest.param({}, [WAITS], id="nothing is done"),
        pytest.param(ARRIVES, [RUNS], id="it runs"),
        # libvirt has resumed it between two questions.
        pytest.param(ARRIVES, [WAITS, WAITS, RUNS], id="it begins to run"),
    ],
)
def test_what_does_not_arrive(job: dict[str, object] | libvirt.libvirtError, states: list[list[int]]) -> None:
    domain = Domain(job, *states)
    with pytest.raises((HypervisorError, libvirt.libvirtError)):
        destroy_incoming(cast(Any, domain))
    assert not domain.destroyed


def test_a_libvirt_that_is_busy_is_no_answer() -> None:
    # One that leaves is in the same state while it stands still.
    domain = Domain(BUSY, WAITS)
    with pytest.raises(libvirt.libvirtError):
        job_of(cast(Any, domain))
    with pytest.raises(libvirt.libvirtError):
        destroy_incoming(cast(Any, domain))
    assert not domain.destroyed
