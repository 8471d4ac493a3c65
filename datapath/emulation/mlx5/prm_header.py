"""Makes the C header of `datapath.mlx5_prm`: its numbers as PRM_… and its structures as prm_…"""

from collections.abc import Iterator
from enum import IntEnum, IntFlag

from datapath import mlx5_prm
from datapath.mlx5_mailbox import Structure

#: Enumeration -> what its C names begin with.
ENUMERATIONS: dict[type[IntEnum] | type[IntFlag], str] = {
    mlx5_prm.Opcode: "OP",
    mlx5_prm.ObjectType: "OBJECT",
    mlx5_prm.Status: "STATUS",
    mlx5_prm.CapabilityPage: "PAGE",
    mlx5_prm.QueueState: "STATE",
    mlx5_prm.EventMode: "EVENT_MODE",
    mlx5_prm.QueueType: "QUEUE_TYPE",
    mlx5_prm.ModifyQueue: "MODIFY",
    mlx5_prm.AccessMode: "ACCESS_MODE",
}


def _numbers() -> Iterator[str]:
    for enumeration, prefix in ENUMERATIONS.items():
        for member in enumeration:
            yield f"#define PRM_{prefix}_{member.name} {int(member):#x}"
    for name, value in vars(mlx5_prm).items():
        if name.isupper() and type(value) is int:
            yield f"#define PRM_{name} {value:#x}"


def _fields(structure: Structure) -> Iterator[str]:
    begin = f"PRM_{structure.name.upper()}"
    yield f"#define {begin}_SIZE {structure.size:#x}"
    for name, field in structure.fields.items():
        yield f"#define {begin}_{name.upper()} ((struct prm_field){{ {field.offset:#x}, {field.width} }})"


def _structure(structure: Structure) -> Iterator[str]:
    """What `prm_reserved` needs to know."""
    yield f"static const struct prm_field prm_{structure.name}_fields[] = {{"
    for field in structure.fields.values():
        yield f"    {{ {field.offset:#x}, {field.width} }},"
    yield "};"
    yield f"static const struct prm_structure prm_{structure.name} __attribute__((unused)) = {{"
    yield f'    "{structure.name}", {structure.size:#x},'
    yield f"    {len(structure.fields)}, prm_{structure.name}_fields,"
    yield "};"


def header() -> str:
    """The text of the header."""
    lines = ["/* Made by prm_header.py from datapath/mlx5_prm.py. */", "#ifndef MLX5_PRM_TABLE_H"]
    lines += ["#define MLX5_PRM_TABLE_H", "", *_numbers()]
    for structure in mlx5_prm.STRUCTURES.values():
        lines += ["", *_fields(structure), *_structure(structure)]
    return "\n".join([*lines, "", "#endif", ""])
