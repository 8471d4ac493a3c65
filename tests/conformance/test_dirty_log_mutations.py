"""The tests of the dirty log miss each of its calls: taken out one at a time, in a copy of the project.

A new call belongs into the table, with a test that fails without it: `./test --full -k mutation`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.harness.mutants import Mutation, ProjectCopy

pytestmark = [pytest.mark.full, pytest.mark.dpdk]

HARDWARE_LOG = "tests/unit/test_hardware_log.py"
RELAY = "tests/unit/test_shadow_log.py"
_PAGES = "tests/conformance/test_dirty_log_pages.py::test_the_last_thing_written_is_in_the_log"
OFFERED = f"{_PAGES}[event-idx-ifcvf-software-buffers are offered]"
_PROOF = "tests/conformance/test_dirty_log_proof.py::test_"
BY_RELAY, BY_VF = (
    f"{_PROOF}what_is_written_is_marked_and_nothing_else[small ring-{mode}]"
    for mode in ("software", "hardware")
)
SEVERAL_PAGES = BY_RELAY.replace("small ring", "ring of several pages, both ways")
_DIED = f"{_PROOF}frames_that_came_while_a_port_died_are_marked"
SUSPECTS = f"{_DIED}[software-log first-ring of several pages, both ways]"
SUSPECT_RINGS = f"{_PROOF}used_rings_that_a_dead_port_did_not_mark_are_marked"
UNLOGGED = f"{_DIED}[software-log last-ring of several pages, both ways]"
BACKEND = "tests/unit/test_vhost_user_backend.py"
SESSIONS = "tests/unit/test_vhost_user_log_exchange.py"

NATIVE = "datapath/native"
SHADOW, FORWARDER, LOG = (f"{NATIVE}/{unit}.c" for unit in ("shadow", "forwarder", "log"))
DRIVERS = "datapath/drivers"

#: The relay: what the device has written, and what it writes itself.
SOFTWARE = {
    "buffers": Mutation(SHADOW, "    mark_batch(shadow, table, log);\n    log_flush(log);\n", BY_RELAY),
    "buffers before the guest sees them": Mutation(
        SHADOW, "    log_flush(log);\n    pass_on(shadow);", RELAY, "    pass_on(shadow);"
    ),
    "each buffer of a chain": Mutation(
        f"{NATIVE}/written.c",
        "            log_mark(log, load64(&descriptor->address), part);",
        BY_RELAY,
    ),
    "used ring": Mutation(SHADOW, "    mark_entries(shadow, log, first, count);", SEVERAL_PAGES),
    "used entries": Mutation(
        SHADOW, "    mark_used(shadow, log, &ring[from], part * sizeof(*ring));", OFFERED
    ),
    "used entries at the ring's beginning": Mutation(
        SHADOW, "    mark_used(shadow, log, ring, (count - part) * sizeof(*ring));", RELAY
    ),
    "used index": Mutation(
        SHADOW, "    mark_used(shadow, log, &shadow->used->index, sizeof(shadow->used->index));", RELAY
    ),
    "no wish for kicks": Mutation(
        SHADOW, "mark_used(shadow, log, &shadow->used->flags, sizeof(shadow->used->flags));", RELAY
    ),
    "wish for kicks": Mutation(SHADOW, "    mark_used(shadow, log, wish, sizeof(*wish));", OFFERED),
    "end of a turn": Mutation(
        FORWARDER,
        "        turn->more = shadow_arm(shadow, &relay->log, !turn->entry->held);\n    }\n"
        "    log_flush(&relay->log);",
        OFFERED,
        "        turn->more = shadow_arm(shadow, &relay->log, !turn->entry->held);\n    }\n",
    ),
    "end of the last turn": Mutation(
        FORWARDER,
        "        shadow_leave(shadow, &relay->log);\n    }\n    log_flush(&relay->log);",
        RELAY,
        "        shadow_leave(shadow, &relay->log);\n    }\n",
    ),
}

#: The bitmap: bits that are noted, and then set.
BITMAP = {
    "more than can be noted": Mutation(LOG, "            log_flush(log);\n", RELAY),
    "bits noted before the last": Mutation(
        LOG,
        "        log->marked += set_missing(&log->bitmap[log->set[i].byte], log->set[i].bits);",
        BY_RELAY,
    ),
    "bits noted last": Mutation(
        LOG, "    log->marked += set_missing(&log->bitmap[log->byte], log->bits);", BY_RELAY
    ),
    "pages of a range but the last eight": Mutation(
        LOG, "        note(log, first / 8, 0xffu << first % 8);", RELAY
    ),
    "last pages of a range": Mutation(
        LOG,
        "    note(log, last / 8, (0xffu << first % 8) & (0xffu >> (7 - last % 8)));",
        BY_RELAY,
    ),
}

#: A VF that logs, and what it leaves out.
HARDWARE = {
    "what the VF writes": Mutation(
        f"{NATIVE}/packets.c",
        "        dma_mark(&engine->dma, &engine->log, chain->iova[i] + offset, part);",
        BY_VF,
    ),
    "used rings that stopped": Mutation(
        f"{DRIVERS}/dirty_logging.py",
        "                self._log.mark_used(ring)",
        BY_VF,
        "                pass",
    ),
    "a range": Mutation(
        f"{NATIVE}/device_log.c", "    log_mark(&range->log, range->address, range->length);", BY_VF
    ),
    "the end of a range": Mutation(f"{NATIVE}/device_log.c", "    log_flush(&range->log);", BY_VF),
    "used rings of rings that stop": Mutation(
        f"{DRIVERS}/virtio_net.py",
        "        self._log.rings_stopped(self._rings[index] for index in rings)\n",
        BY_VF,
    ),
    "used rings of a VF that fails": Mutation(
        f"{DRIVERS}/virtio_net.py", "        self._log.rings_stopped(self._rings.values())\n", HARDWARE_LOG
    ),
    "the VF is told after a reset": Mutation(
        f"{DRIVERS}/virtio_net.py",
        "            if not self._log.function_starts():\n",
        HARDWARE_LOG,
        "            if not placed:\n",
    ),
    "the VF is heard": Mutation(
        f"{DRIVERS}/ifcvf.py", "        if read != value:\n", HARDWARE_LOG, "        if read > 1:\n"
    ),
    "the VF is told": Mutation(
        f"{DRIVERS}/dirty_logging.py",
        "            self._registers.switch_on(*self._log.span)",
        BY_VF,
        "            pass",
    ),
    "the relay is told": Mutation(
        f"{DRIVERS}/dirty_logging.py",
        "        self._paths.log(bitmap if self._log is None else None)\n",
        BY_RELAY,
    ),
}

#: A session that begins where another one has died.
SESSION = {
    "rings that ran before the log came": Mutation(
        "datapath/vhost_user/marking.py",
        "            self._unlogged = False\n            self._mark_all(log)",
        UNLOGGED,
        "            self._unlogged = False",
    ),
    "what may have been written before": Mutation(
        "datapath/vhost_user/marking.py",
        "                log.mark(address, length)",
        SUSPECTS,
        "                pass",
    ),
    "used rings of before": Mutation(
        "datapath/vhost_user/suspects.py",
        "    found = [(ring.used, used_size)]",
        SUSPECT_RINGS,
        "    found: list[tuple[int, int]] = []",
    ),
    "buffers of before": Mutation(
        "datapath/vhost_user/suspects.py",
        "            found.append((address, length))",
        SUSPECTS,
        "            pass",
    ),
    "buffers of before in indirect tables": Mutation(
        "datapath/vhost_user/suspects.py",
        "            found += [(at, size) for at, size, flag in inner if flag & DESC_F_WRITE]",
        SESSIONS,
        "            pass",
    ),
    "all, where the device marks nothing": Mutation(
        "datapath/vhost_user/marking.py",
        "not self._device_marks:\n            self._mark_all(self._log)",
        BACKEND,
        "not self._device_marks:\n            pass",
    ),
    "all, where the device fails": Mutation(
        "datapath/vhost_user/marking.py",
        "                self._mark_all(self._log)\n            raise",
        BACKEND,
        "                pass\n            raise",
    ),
    "rings that ran while nobody marked": Mutation(
        "datapath/vhost_user/marking.py",
        "            self._unlogged |= log is None or not marked",
        SESSIONS,
        "            pass",
    ),
    "all rings begin": Mutation(
        "datapath/vhost_user/backend.py", "        self._marking.rings_begin(placed)\n", SESSIONS
    ),
    "one more ring begins": Mutation(
        "datapath/vhost_user/backend.py",
        "                    self._marking.rings_begin({ring.index: placed})\n",
        SESSIONS,
    ),
    "all rings stop": Mutation(
        "datapath/vhost_user/backend.py",
        "            states = self.device.suspend()\n        self._marking.rings_stopped()\n",
        BACKEND,
        "            states = self.device.suspend()\n",
    ),
    "one ring stops": Mutation(
        "datapath/vhost_user/backend.py", "                    self._marking.rings_stopped()\n", BACKEND
    ),
    "a failing start of one ring": Mutation(
        "datapath/vhost_user/backend.py",
        "self._marking.rings_begin({ring.index: placed})\n"
        "                    with self._marking.covered(), self._timing",
        SESSIONS,
        "self._marking.rings_begin({ring.index: placed})\n                    with self._timing",
    ),
    "a failing stop of one ring": Mutation(
        "datapath/vhost_user/backend.py",
        "with self._marking.covered(), self._timing.device():\n                        self._stopped(",
        SESSIONS,
        "with self._timing.device():\n                        self._stopped(",
    ),
    "all, where there is too much to look through": Mutation(
        "datapath/vhost_user/marking.py",
        "        except (TooManyError, ProtocolError):\n            self._mark_all(log)",
        SESSIONS,
        "        except (TooManyError, ProtocolError):\n            pass",
    ),
}

MUTATIONS = {**SOFTWARE, **BITMAP, **HARDWARE, **SESSION}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bool]:
    """Whether tests pass in a copy of the project as it is, found out once for each."""
    copy = ProjectCopy(tmp_path_factory.mktemp("copies") / "untouched")
    return cache(copy.passes)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_call_of_the_log_is_missed(tmp_path: Path, name: str, untouched: Callable[[str], bool]) -> None:
    mutation = MUTATIONS[name]
    assert untouched(mutation.seen_by), f"{mutation.seen_by} fails where nothing is missing"
    mutant = ProjectCopy(tmp_path / "mutant")
    mutant.mutate(mutation)
    missing = f"{mutation.seen_by} does not see that '{mutation.text.strip()}' is missing"
    assert not mutant.passes(mutation.seen_by), missing
