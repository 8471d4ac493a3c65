"""Mailboxes of named fields, at offsets and of widths in bits: how ConnectX is told, and tells, anything.

Bits are counted as the Programmer's Reference Manual does: bit 0 is the most significant one of the first
byte, so that a field of many bits reads big-endian. `datapath.mlx5_prm` has the layouts. What belongs to no
field is reserved: `pack` writes 0 there, and `reserved` finds where it is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """Where a field lies: bit offset and width. One of more than 64 bits is bytes, others are numbers."""

    offset: int
    width: int

    @property
    def is_bytes(self) -> bool:
        return self.width > 64


@dataclass(frozen=True)
class Structure:
    """A layout with a fixed part of `size` bytes; a list may follow it."""

    name: str
    size: int
    #: Its name in the sources that the module's docstring names.
    source: str
    fields: Mapping[str, Field]
    #: Fields that have one value always, such as a command's opcode.
    constants: Mapping[str, int]

    def field(self, name: str) -> Field:
        """A field by name.

        :raise ValueError: there is none.
        """
        try:
            return self.fields[name]
        except KeyError:
            raise ValueError(f"{self.name} has no field {name}") from None

    @property
    def known(self) -> int:
        """All bits that belong to a field, of a number as long as the structure."""
        return sum(
            _mask(field) << 8 * self.size - field.offset - field.width for field in self.fields.values()
        )


def _mask(field: Field) -> int:
    return (1 << field.width) - 1


def _place(
    name: str, size: int, parts: Mapping[int, Structure], own: Mapping[str, Field]
) -> dict[str, Field]:
    """The fields of a structure with those of its parts, by place.

    :raise ValueError: two of a name, two at a place, or one beyond the end.
    """
    placed = list(own.items())
    for at, part in parts.items():
        placed += [(key, Field(8 * at + field.offset, field.width)) for key, field in part.fields.items()]
    placed.sort(key=lambda item: item[1].offset)
    end = 0
    for key, field in placed:
        if field.offset < end:
            raise ValueError(f"{name}: {key} overlaps another field")
        end = field.offset + field.width
    if end > 8 * size or len(dict(placed)) < len(placed):
        raise ValueError(f"{name}: a field beyond its end, or two of the same name")
    return dict(placed)


def layout(
    name: str,
    size: int,
    source: str,
    parts: Mapping[int, Structure] | None = None,
    constants: Mapping[str, int] | None = None,
    **fields: tuple[int, int],
) -> Structure:
    """A layout.

    :param size: bytes of its fixed part.
    :param parts: structures within it, by their place in bytes; their fields become its own.
    :param fields: name -> offset and width in bits.
    :raise ValueError: fields of one name, at one place, or beyond the end.
    """
    own = {key: Field(*place) for key, place in fields.items()}
    return Structure(name, size, source, _place(name, size, parts or {}, own), constants or {})


def _checked(structure: Structure, name: str, value: int | bytes) -> int:
    """A field's value as a number.

    :raise ValueError: of the wrong kind, too wide or too short, or other than it must be.
    """
    field = structure.field(name)
    if name in structure.constants and value != structure.constants[name]:
        raise ValueError(f"{structure.name}.{name} is always {structure.constants[name]:#x}")
    if isinstance(value, bytes):
        if not field.is_bytes or 8 * len(value) != field.width:
            raise ValueError(f"{structure.name}.{name} is no field of {len(value)} bytes")
        return int.from_bytes(value)
    if field.is_bytes or not 0 <= value <= _mask(field):
        raise ValueError(f"{structure.name}.{name}: {value:#x} does not fit in {field.width} bits")
    return value


def pack(structure: Structure, **values: int | bytes) -> bytes:
    """The bytes of a structure. What is not given is 0, or what it always is.

    :raise ValueError: for a field that it does not have, or a value that does not fit.
    """
    whole = 0
    for name, value in {**structure.constants, **values}.items():
        field = structure.field(name)
        whole |= _checked(structure, name, value) << 8 * structure.size - field.offset - field.width
    return whole.to_bytes(structure.size)


def _extract(structure: Structure, data: bytes, field: Field) -> int:
    whole = int.from_bytes(data[: structure.size])
    return whole >> 8 * structure.size - field.offset - field.width & _mask(field)


def _complete(structure: Structure, data: bytes) -> bytes:
    """
    :raise ValueError: when the data end before the structure does.
    """
    if len(data) < structure.size:
        raise ValueError(f"{structure.name} has {structure.size} bytes, not {len(data)}")
    return data


def get(structure: Structure, data: bytes, name: str) -> int:
    """The value of one field that is a number.

    :raise ValueError: there is no such field, or the data are too short.
    """
    field = structure.field(name)
    if field.is_bytes:
        raise ValueError(f"{structure.name}.{name} is no number")
    return _extract(structure, _complete(structure, data), field)


def unpack(structure: Structure, data: bytes) -> dict[str, int | bytes]:
    """The values of all fields; what follows the structure is left alone.

    :raise ValueError: when the data are too short.
    """
    _complete(structure, data)
    values: dict[str, int | bytes] = {}
    for name, field in structure.fields.items():
        value = _extract(structure, data, field)
        values[name] = value.to_bytes(field.width // 8) if field.is_bytes else value
    return values


def reserved(structure: Structure, data: bytes) -> Iterator[int]:
    """The offsets of bits that are set and belong to no field.

    :raise ValueError: when the data are too short.
    """
    bits = 8 * structure.size
    strange = int.from_bytes(_complete(structure, data)[: structure.size]) & ~structure.known
    while strange:
        offset = bits - strange.bit_length()
        yield offset
        strange &= (1 << bits - offset - 1) - 1
