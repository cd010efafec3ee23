"""Blocks of PTX in the interpreter: integer code without loops, with ballots, shuffles and shared memory of its own.

All threads of a program execute each instruction together: a barrier that is missing does not show, two threads that store to
the same place in one instruction do.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .errors import InterpreterError

Array = Any
_LINE = re.compile(r"(?:@(!?)(\w+)\s+)?([\w.]+)\s*(.*)")
_WRAPPED = np.uint64(0xFFFFFFFF)
_COMPARED = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater, "lt": np.less, "le": np.less_equal}


class Block:
    """One execution: ``inputs`` are the operands, (programs, threads) each; 32 threads from a multiple of 32 on are a warp."""

    def __init__(self, code: str, outputs: int, inputs: list[Array], memory: Array, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.values: dict[str, Array] = {f"${outputs + k}": v.astype(np.uint64) for k, v in enumerate(inputs)}
        thread = np.broadcast_to(np.arange(shape[1], dtype=np.uint64), shape)
        lane = thread % 32
        one = np.uint64(1)
        self.values |= {
            "%tid.x": thread,
            "%lanemask_lt": (one << lane) - one,
            "%lanemask_gt": _WRAPPED ^ ((one << (lane + one)) - one),
        }
        self.memory = memory
        #: By the label that they went to: threads that do nothing before it.
        self.gone: dict[str, Array] = {}
        for line in code.strip().strip("{}").split(";"):
            if line.strip():
                self._step(line.strip())

    def _value(self, text: str) -> Array:
        text = text.strip()
        if re.fullmatch(r"\d+|0x[0-9a-f]+", text):
            return np.full(self.shape, int(text, 0), np.uint64)
        return self.values[text]

    def _step(self, line: str) -> None:
        if line.startswith(".reg"):
            return
        if line.startswith(".shared"):
            name, size = re.findall(r"(\w+)\[(\d+)\]", line)[0]
            start = self.memory.shape[1]
            grown: Array = np.full((self.shape[0], start + -(-int(size) // 16) * 16), 0xFF, np.uint8)
            grown[:, : self.memory.shape[1]] = self.memory
            self.memory = grown
            self.values[name] = np.full(self.shape, start, np.uint64)
            return
        label, colon, after = line.partition(":")
        if colon:
            self.gone.pop(label)
            line = after.strip()
        found = _LINE.fullmatch(line)
        assert found is not None, line
        negated, guard, name, rest = found.groups()
        live = np.ones(self.shape, bool) if guard is None else self.values[guard].astype(bool) ^ bool(negated)
        for threads in self.gone.values():
            live = live & ~threads
        op, *kinds = name.split(".")
        if op == "bra":
            self.gone[rest.strip()] = live
            return
        if op == "bar":
            return
        if op == "st":
            return self._store(kinds, rest, live)
        if op == "red":
            return self._add(rest, live)
        if op == "ld" and rest.startswith("{"):
            names, _, place = rest[1:].partition("},")
            for name, found in zip(names.split(","), self._load(kinds, place, live, names.count(",") + 1)):
                self.values[name.strip()] = np.where(live, found, self.values.get(name.strip(), found))
            return
        to, *given = [part.strip() for part in rest.split(",")]
        result = (
            self._load(kinds, given[0], live)[0] if op == "ld" else self._result(op, kinds, [*map(self._value, given)])
        )
        if op == "shfl":
            to, known = to.split("|")
            self.values[known] = result[1]
            result = result[0]
        old = self.values.get(to, result)
        self.values[to] = np.where(live, result, old)

    def _result(self, op: str, kinds: list[str], v: list[Array]) -> Any:
        wrap = _WRAPPED
        if kinds and kinds[-1] in ("s32", "s64"):
            v = [a.astype(f"u{int(kinds[-1][1:]) // 8}").view(f"i{int(kinds[-1][1:]) // 8}") for a in v]
        if op == "mov":
            return v[0]
        if op in ("add", "sub"):
            return (v[0] + v[1] if op == "add" else v[0] - v[1]) & wrap
        if op in ("and", "or", "xor"):
            return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](v[0], v[1])
        if op == "not":
            return v[0] ^ wrap
        if op in ("shl", "shr"):
            return (v[0] << v[1] if op == "shl" else v[0] >> v[1]) & wrap
        if op == "setp":
            return _COMPARED[kinds[0]](v[0], v[1])
        if op == "selp":
            return np.where(v[2].astype(bool), v[0], v[1])
        if op == "mad":
            return (v[0] * v[1] + v[2]) & wrap
        if op == "brev":
            return sum(((v[0] >> np.uint64(j)) & np.uint64(1)) << np.uint64(31 - j) for j in range(32))
        if op == "clz":
            return np.uint64(32) - np.frexp(v[0].astype(np.float64))[1].astype(np.uint64)
        if op == "popc":
            return np.array([bin(int(n)).count("1") for n in v[0].ravel()], np.uint64).reshape(self.shape)
        warps = v[0].reshape(self.shape[0], -1, 32)
        if op == "vote":
            bits = (warps.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1, keepdims=True, dtype=np.uint64)
            return np.broadcast_to(bits, warps.shape).reshape(self.shape)
        assert (op, kinds[1]) == ("shfl", "up"), op
        source: Array = np.arange(32) - int(v[1].flat[0])
        shifted = warps[..., np.maximum(source, 0)]
        shifted = np.where(source >= 0, shifted, warps)
        return shifted.reshape(self.shape), np.broadcast_to(source >= 0, warps.shape).reshape(self.shape)

    def _at(self, text: str, size: int, live: Array) -> Array:
        base, _, more = text.strip("[] ").partition("+")
        at = self._value(base).astype(np.int64) + int(more or 0)
        if (live & ((at < 0) | (at + size > self.memory.shape[1]) | (at % size != 0))).any():
            raise InterpreterError("PTX: an access outside of shared memory, or one that is not aligned")
        return np.where(live, at, 0)

    def _load(self, kinds: list[str], place: str, live: Array, parts: int = 1) -> list[Array]:
        size = int(kinds[-1][1:]) // 8
        at = self._at(place, size * parts, live)[..., None] + np.arange(size * parts)
        found = self.memory[np.arange(self.shape[0])[:, None, None], at]
        words = np.ascontiguousarray(found).view(f"u{size}").astype(np.uint64)
        return [words[..., k] for k in range(parts)]

    def _add(self, rest: str, live: Array) -> None:
        place, _, given = rest.partition(",")
        program, thread = np.nonzero(live)
        words = self.memory.view(np.uint32)
        at = self._at(place, 4, live)[program, thread] // 4
        np.add.at(words, (program, at), self._value(given)[program, thread].astype(np.uint32))

    def _store(self, kinds: list[str], rest: str, live: Array) -> None:
        place, _, given = rest.partition(",")
        parts = [part.strip() for part in given.strip(" {}").split(",")]
        size = int(kinds[-1][1:]) // 8
        program, thread = np.nonzero(live)
        for k, part in enumerate(parts):
            at = self._at(place, size * len(parts), live)[program, thread] + k * size
            if len(np.unique(np.stack([program, at]), axis=1).T) != len(at):
                raise InterpreterError("PTX: two threads store to the same place")
            data = np.ascontiguousarray(self._value(part)[program, thread].astype(f"u{size}")).view(np.uint8)
            self.memory[program[:, None], at[:, None] + np.arange(size)] = data.reshape(len(at), size)


def elementwise(
    code: str, constraints: str, args: list[Array], per: int, memory: Array | None = None
) -> tuple[Array, Array]:
    """A block with one result on arrays of which each thread has ``per`` elements; and shared memory, after what is there.

    (programs, warps * per, 32): one below the other; or (programs, turns, threads, width): of each turn ``width``.
    """
    given = args[0].shape
    axes: tuple[int, ...]
    if len(given) == 3:
        programs, rows, lanes = given
        assert lanes == 32 and rows % per == 0, "the layout of rows of 32"
        split, axes, shape = (programs, rows // per, per, 32), (0, 2, 1, 3), (programs, rows // per * 32)
    else:
        assert given[1] * given[3] == per, "the layout of vectors"
        split, axes, shape = given, (0, 1, 3, 2), (given[0], given[2])
    # Elements of threads come before threads, and back.
    moved = tuple(split[axis] for axis in axes)
    back = tuple(int(axis) for axis in np.argsort(axes))

    def of_threads(v: Array) -> list[Array]:
        bits = (
            np.ascontiguousarray(v)
            .view(f"u{v.itemsize}")
            .reshape(split)
            .transpose(axes)
            .reshape(shape[0], per, shape[1])
        )
        return [bits[:, k] for k in range(per)]

    assert constraints.count("=") == per
    memory = np.empty((shape[0], 0), np.uint8) if memory is None else memory
    block = Block(code, per, [v for a in args for v in of_threads(a)], memory, shape)
    found = np.stack([block.values[f"${k}"] for k in range(per)], axis=1).reshape(moved).transpose(back)
    size = 8 if "=l" in constraints else 4
    return np.ascontiguousarray(found).astype(f"u{size}").view(f"i{size}").reshape(given), block.memory
