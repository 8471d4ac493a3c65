"""Numbers of PCI configuration space that buses and emulated functions share.

Source: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.2 (command), 6.7 (capabilities).
"""

from enum import IntFlag

#: Bytes of configuration space that every function has.
CONFIG_SIZE = 256
#: Offsets of registers in the header, and of the first byte behind it.
VENDOR, COMMAND, STATUS, BARS, SUBSYSTEM_VENDOR, CAPABILITIES = 0x00, 0x04, 0x06, 0x10, 0x2C, 0x34
HEADER_END = 0x40
#: Revision id (a byte) and class code (three), read as one: never all ones.
REVISION_AND_CLASS = 0x08
#: In STATUS: there is a capability list.
STATUS_CAPABILITY_LIST = 0x10
#: In a BAR: it is 64 bits wide and takes the next register as well.
BAR_64BIT = 0x04
#: Capability ids: the vendor's own (virtio's), and MSI-X.
CAPABILITY_VENDOR, CAPABILITY_MSIX = 0x09, 0x11


class PciCommand(IntFlag):
    """Bits of the command register."""

    MEMORY = 0x0002
    MASTER = 0x0004
    INTX_DISABLE = 0x0400
