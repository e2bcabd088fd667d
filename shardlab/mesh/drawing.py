"""A pod or a cluster drawn as text: every cell is a device, in it the device's position on the mesh's axes.

data=4 (batch) x tensor=2 on gpu:h100:2x4
a cell holds the device's position: data.tensor
NVLink island 0   host 0    0.0 0.1 1.0 1.1
NVLink island 1   host 1    2.0 2.1 3.0 3.1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardlab.mesh.physical import Dim
from shardlab.mesh.spec import MeshSpec

_WIDTH, _HEIGHT = 104, 36  # Columns, and rows of devices, that a drawing fills; a larger machine is elided.
_WAYS = ("across", "down", "plane by plane")


def draw(spec: MeshSpec, dims: Sequence[Dim], order: Sequence[int]) -> str:
    """The drawing.

    Args:
      spec: the mesh.
      dims: the target's, fastest first.
      order: for every mesh position the place of its device, as in `Layout`.
    """
    labels = _labels(spec, order)
    axes = ".".join(axis for axis in spec.names if spec.sizes[axis] > 1)
    head = [str(spec), f"a cell holds the device's position: {axes}" if axes else "one device"]
    torus = any(dim.torus for dim in dims)
    return "\n".join([*head, *(_slice(dims, labels) if torus else _hosts(spec, dims, labels))])


def _labels(spec: MeshSpec, order: Sequence[int]) -> list[str]:
    """For every place, the position of its device."""
    sizes = [size for size in spec.shape if size > 1]
    labels = ["0"] * len(order)
    for position, place in enumerate(order):
        digits = []
        for size in reversed(sizes):
            position, digit = divmod(position, size)
            digits.append(str(digit))
        labels[place] = ".".join(reversed(digits)) or "0"
    return labels


def _slice(dims: Sequence[Dim], labels: Sequence[str]) -> list[str]:
    """A TPU slice in planes of x and y; of several slices the first."""
    cores = dims[0].size if dims[0].name == "core" else 1
    torus = [dim for dim in dims if dim.torus]
    columns, rows, planes = (*(dim.size for dim in torus), 1)[:3]

    def cell(z: int, y: int, x: int) -> str:
        first = ((z * rows + y) * columns + x) * cores
        return "|".join(labels[first : first + cores])

    shapes = [f"a {'ring' if dim.wrap else 'line'} of {dim.size}" for dim in torus]
    ways = zip(torus, _WAYS, shapes, strict=False)
    head = [", ".join(f"{dim.name} {way} ({shape})" for dim, way, shape in ways if dim.size > 1)]
    head = [line for line in head if line]
    if cores > 1:
        head.append("the two devices of a chip are written a|b")
    if dims[-1].tier == "dcn":
        last = labels[len(labels) - len(labels) // dims[-1].size]
        head.append(f"slice 0 of {dims[-1].size}; the others are laid alike, the last one starts at {last}")
    return [*head, *_planes(columns, rows, planes, cell)]


def _planes(columns: int, rows: int, planes: int, cell: Callable[[int, int, int], str]) -> list[str]:
    """Planes beside one another as far as the width goes."""
    width = 1 + max(len(cell(z, y, x)) for z in {0, planes - 1} for y in {0, rows - 1} for x in {0, columns - 1})
    across = _some(columns, max(3, (_WIDTH - 5) // width))
    down = _some(rows, _HEIGHT // 2)
    block = 5 + len(across) * width
    beside = max(1, (_WIDTH + 3) // (block + 3))
    deep = _some(planes, max(3, beside * (_HEIGHT // len(down))))
    out = []
    for first in range(0, len(deep), beside):
        group = [z for z in deep[first : first + beside] if z is not None]
        if len(group) < len(deep[first : first + beside]):
            out += ["", f"    {planes - len(deep) + 1} planes more"]
        if planes > 1:
            out += ["", _beside([f"    z {z}" for z in group], block)]
        out.append(_beside([_row("x", [_text(x) for x in across], width) for _ in group], block))
        for y in down:
            gap = y is None
            cells = [["..." if gap or x is None else cell(z, y or 0, x) for x in across] for z in group]
            out.append(_beside([_row("..." if gap else f"y {y}", row, width) for row in cells], block))
    return out


def _row(name: str, cells: Sequence[str], width: int) -> str:
    return name.rjust(5) + "".join(cell.rjust(width) for cell in cells)


def _beside(blocks: Sequence[str], width: int) -> str:
    return "   ".join(block.ljust(width) for block in blocks).rstrip()


def _text(number: int | None) -> str:
    return "..." if number is None else str(number)


def _some(count: int, most: int) -> list[int | None]:
    """All numbers below `count`, or the first ones, a gap (None) and the last."""
    return list(range(count)) if count <= most else [*range(most - 2), None, count - 1]


def _hosts(spec: MeshSpec, dims: Sequence[Dim], labels: Sequence[str]) -> list[str]:
    """A row for every host of GPUs, its island named; emulated devices in rows of 16."""
    gpus = spec.machine.platform == "gpu"
    row = spec.machine.shape[-1] if gpus else 16
    width = 1 + max(map(len, labels))
    out = []
    for host in _some(-(-len(labels) // row), _HEIGHT):
        if host is None:
            out.append("...")
            continue
        first = host * row
        name = f"host {host:<4}" if gpus else f"device {first:<4}"
        if dims[0].tier == "nvlink":
            island, begun = divmod(first, dims[0].size)
            name = f"{'' if begun else f'NVLink island {island}':<18}{name}"
        out.append(name + "".join(label.rjust(width) for label in labels[first : first + row]))
    return out
