"""What a compiled program moves and says, read from the compiler's text of it.

Instructions of loops count as often as the loop runs; of an operand that an instruction only slices, the
slice counts, of a result that it only updates, the update.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TILE = re.compile(r":T\(([\d,]+)\)")
_ARRAY = re.compile(r"\b(pred|token|opaque|(?:bf|[sufc])\d+\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# They name, bundle or alias what others have written.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id")
_FREE += ("replica-id", "optimization-barrier", "add-dependency")
_NAMES_A_BUFFER = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_MADE_FOR = re.compile(r'op_name="(?:jit\(\w+\)/)?([^"]*)"')
_TO_HOST = ("send", "recv", "infeed", "outfeed")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Bytes(NamedTuple):
    """Traffic of instructions: with the device's memory, and with memory on the chip (TPU: VMEM)."""

    memory: float = 0.0
    on_chip: float = 0.0

    def plus(self, other: "Bytes", times: float = 1.0) -> "Bytes":
        """The sum, the other so many times."""
        return Bytes(self.memory + times * other.memory, self.on_chip + times * other.on_chip)


class Collective(NamedTuple):
    """What devices exchange `times` a step.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        axes: of the mesh that the groups of devices lie along.
        bytes: of the whole array: what is summed, what is put together, what is summed and cut.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations that it runs."""
        found = (names for kind, names in _CALLED.findall(self.text) if kind in kinds)
        return [name for names in found for name in _NAME.findall(names)]


def _size(shape: str) -> Bytes:
    """Bytes of an array or of the arrays of a tuple, as they lie in memory: a TPU fills up its tiles."""
    total = Bytes()
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        bits = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
        sizes = [int(n.lstrip("<=")) for n in dimensions.split(",") if n]
        if sizes and (tile := _TILE.search(layout)):
            minor_first = [int(n) for n in layout.split(":")[0].split(",")]
            for axis, step in zip(minor_first, reversed(tile[1].split(",")), strict=False):
                sizes[axis] = -(-sizes[axis] // int(step)) * int(step)
        size = math.prod(sizes) * bits / 8
        total = total.plus(Bytes(0.0, size) if "S(1)" in layout else Bytes(size))
    return total


def _split_shape(text: str) -> tuple[str, str]:
    """("f32[2]{0}", "add(%a, %b), ...") of an instruction's text; tuples have balanced parentheses."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return text[:i], text[i + 1 :]
    raise ValueError(f"no instruction: {text[:100]}")


def _elements(shape: str) -> list[str]:
    """The arrays of a tuple's shape; of an array's, itself."""
    return [found[0] for found in re.finditer(_ARRAY, shape)]


def _balanced(text: str) -> str:
    """What stands between the first parenthesis and the one that closes it."""
    start, depth = text.index("("), 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return text[start + 1 : i]
    raise ValueError(f"no closing parenthesis: {text[:100]}")


class Program:
    """A compiled program, from `compiled.as_text()`.

    Attributes:
        bytes: what one run of it reads and writes.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations[header[2]] = {}
                self._entry = header[2] if header[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                shape, rest = _split_shape(found[3])
                opcode = rest[: rest.index("(")]
                names = tuple(_NAME.findall(_balanced(rest)))
                current[found[2]] = _Instruction(found[2], opcode, shape, names, rest, bool(found[1]))
        if not self._entry:
            raise ValueError("the text has no entry computation")

    @functools.cached_property
    def bytes(self) -> Bytes:
        return self._bytes_of(self._entry)

    @functools.cache  # noqa: B019 (programs live as long as the command)
    def _bytes_of(self, computation: str) -> Bytes:
        total = Bytes()
        for instruction in self._computations[computation].values():
            total = total.plus(self._traffic(computation, instruction))
        return total

    def movers(self, count: int) -> list[tuple[str, float]]:
        """What moves most: the operation of the source it was made for, and its bytes, on the chip too."""
        moved: dict[str, float] = collections.defaultdict(float)
        for computation, times in self._running():
            for i in self._computations[computation].values():
                if i.opcode not in ("while", "conditional", "call"):
                    made_for = _MADE_FOR.search(i.text)
                    moved[made_for[1] if made_for else i.opcode] += times * sum(self._traffic(computation, i))
        return sorted(moved.items(), key=lambda item: -item[1])[:count]

    def _running(self) -> Iterator[tuple[str, float]]:
        """Computations whose instructions run by themselves, and how often."""
        stack = [(self._entry, 1.0)]
        while stack:
            computation, times = stack.pop()
            yield computation, times
            for i in self._computations[computation].values():
                if i.opcode == "while":
                    stack += [(body, times * self._trips(i)) for body in i.called("body")]
                elif i.opcode == "call":
                    stack += [(name, times) for name in i.called("to_apply", "calls")]
                elif i.opcode == "conditional":
                    stack += [(name, times) for name in self._branches(i)]

    def _branches(self, i: _Instruction) -> list[str]:
        return i.called("branch_computations", "true_computation", "false_computation")

    def _traffic(self, computation: str, i: _Instruction) -> Bytes:
        """What one run of an instruction reads and writes."""
        defined = self._computations[computation]
        opcode = i.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or _NAMES_A_BUFFER.search(i.text):
            return Bytes()
        if opcode == "while":
            return Bytes().plus(self._bytes_of(i.called("body")[0]), self._trips(i))
        if opcode == "call":
            return self._bytes_of(i.called("to_apply", "calls")[0])
        if opcode == "conditional":
            return max((self._bytes_of(name) for name in self._branches(i)), key=sum)
        if opcode == "async-start":
            inner = self._computations[i.called("calls")[0]]
            return self._traffic(i.called("calls")[0], next(x for x in inner.values() if x.is_root))
        operands = [defined[name] for name in i.operands if name in defined]
        result = _size(i.shape)
        if opcode == "fusion-start":  # since JAX 0.11 some run beside others: (operands, result, flags)
            opcode, result = "fusion", _size(_elements(i.shape)[1])
        if opcode.endswith("-start"):  # its result bundles operands, results and flags
            results = _elements(i.shape)
            if "slice" in opcode:
                return _same_place(_size(results[1]), _size(results[0])).plus(_size(results[1]))
            return _size(operands[0].shape).plus(_size(results[1 if opcode == "all-gather-start" else 0]))
        if opcode == "fusion":
            inner = i.called("calls")[0]
            total = self._written(inner, result)
            for place, operand in enumerate(operands):
                total = total.plus(self._read(inner, place, _size(operand.shape)))
            return total
        if opcode in ("dynamic-slice", "slice", "gather"):
            return result.plus(result)
        if opcode == "dynamic-update-slice":
            update = _size(operands[1].shape)
            return update.plus(update)
        return functools.reduce(Bytes.plus, (_size(x.shape) for x in operands), result)

    def _read(self, computation: str, place: int, whole: Bytes) -> Bytes:
        """What a fused computation reads of the parameter at `place`."""
        defined = self._computations[computation]
        aliases = [i.name for i in defined.values() if i.opcode == "parameter" and f"({place})" in i.text]
        total, seen = Bytes(), set()
        while aliases:
            name = aliases.pop()
            for user in defined.values():
                if name not in user.operands or user.name in seen:
                    continue
                position = user.operands.index(name)
                if user.opcode == "bitcast":
                    aliases.append(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    total = total.plus(_same_place(_size(user.shape), whole))
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    pass  # in place
                elif user.opcode == "fusion":
                    total = total.plus(self._read(user.called("calls")[0], position, whole))
                else:
                    return whole
                seen.add(user.name)
        return min(total, whole, key=sum)

    def _written(self, computation: str, whole: Bytes) -> Bytes:
        """What a fused computation writes of its result."""
        defined = self._computations[computation]
        root = next(i for i in defined.values() if i.is_root)
        parts = [defined[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = Bytes()
        for part in parts:
            while part.opcode == "bitcast":
                part = defined[part.operands[0]]
            size = _size(part.shape)
            if part.opcode == "dynamic-update-slice":
                size = _size(defined[part.operands[1]].shape)
            elif part.opcode == "fusion":
                size = self._written(part.called("calls")[0], size)
            total = total.plus(size)
        return _same_place(total, whole)

    def _trips(self, loop: _Instruction) -> float:
        """How often a loop runs: as the compiler notes it, else the limit that its condition compares with.

        One that ends by what it has computed (a random draw that is repeated until it fits) counts once.
        """
        if known := _TRIPS.search(loop.text):
            return float(known[1])
        condition = [i for name in loop.called("condition") for i, _ in self._all_within(name)]
        limits = [float(found[1]) for i in condition if (found := re.match(r"constant\((\d+)\)", i.text))]
        is_counted = sum(i.opcode == "compare" for i in condition) == 1 and len(limits) == 1
        return limits[0] if is_counted else 1.0

    def _all_within(self, computation: str) -> Iterator[tuple[_Instruction, float]]:
        """Each instruction, those of fusions too, and the bytes of its operands."""
        defined = self._computations[computation]
        for i in defined.values():
            yield i, sum(sum(_size(defined[name].shape)) for name in i.operands if name in defined)
            for name in i.called("calls", "to_apply"):
                yield from self._all_within(name)

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """What devices of a mesh say to each other in one run."""
        found: list[Collective] = []
        for computation, times in self._running():
            for i, size in self._all_within(computation):
                kind = i.opcode.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                groups = _groups(i.text, math.prod(mesh_shape.values()))
                parts = len(groups[0]) if kind == "all-gather" else 1
                found.append(Collective(kind, _axes(groups, mesh_shape), int(size * parts), int(times)))
        return found

    @property
    def talks_to_host(self) -> bool:
        """Whether a step waits for the host: it sends or receives, or calls Python back."""
        instructions = [i for each in self._computations.values() for i in each.values()]
        return any(i.opcode in _TO_HOST or "_callback" in i.text for i in instructions)


def _same_place(size: Bytes, where: Bytes) -> Bytes:
    """The bytes of `size`, in the memory that `where` is in."""
    return Bytes(0.0, sum(size)) if where.on_chip > where.memory else Bytes(sum(size))


def _groups(text: str, devices: int) -> list[list[int]]:
    """Groups of devices of a collective, as places in the mesh."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return [list(range(devices))]
    shape, sizes = ([int(n) for n in found[i].split(",")] for i in (1, 2))
    places = np.arange(math.prod(sizes)).reshape(sizes)
    if found[3]:
        places = places.transpose([int(n) for n in found[3].split(",")])
    return places.reshape(shape).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which members of a group differ."""
    members = np.unravel_index(np.array(groups[0]), tuple(mesh_shape.values()))
    return tuple(axis for axis, at in zip(mesh_shape, members, strict=True) if len(set(at.tolist())) > 1)
