"""Launches that wait on the device for the one before them: who asks for it, and what the driver is told."""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from replaying import faking, forget, native, ones  # noqa: F401

import gemskit
from gemskit import _driver, _launch, _replay, backends

Caught = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]


def caught(row: str) -> Caught:
    """The launches of a sum of all of a large tensor."""
    found: Caught = []
    with _launch.capturing(lambda kernel, grid, args, meta: found.append((kernel, args, meta))), backends.use_arch(row):
        gemskit.sum(ones(1 << 20))
    return found


def test_only_the_second_launch_follows_and_only_where_the_table_says_so() -> None:
    first, second = caught("sm_90")
    assert "launch_pdl" not in first[2]
    assert second[2]["launch_pdl"] and second[2]["FOLLOWS"]
    first, second = caught("sm_80")
    assert "launch_pdl" not in second[2] and not second[2]["FOLLOWS"]


class Device:
    """A driver's functions, which note what they are given."""

    def __init__(self) -> None:
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        self.calls: list[tuple[Any, ...]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer, *[number] * 7, pointer, pointer, pointer)
        self.launch: Any = kind(self._launch)
        self.follow: Any = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 4)(self._follow)
        self.stream: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(pointer))(lambda index, to: 0)

    def _launch(self, function: int, *given: Any) -> int:
        self.calls.append(("launch", function, given[:3], given[3:6], given[6], ()))
        return 0

    def _follow(self, config: int, function: int, where: int, extra: int | None) -> int:
        # The layout of the driver's headers: seven numbers, a stream, a pointer to attributes of 72 bytes and their count.
        numbers = list((ctypes.c_uint * 7).from_address(config))
        attributes = ctypes.c_uint64.from_address(config + 40).value
        (count,) = (ctypes.c_uint * 1).from_address(config + 48)
        each = tuple(
            (
                ctypes.c_int.from_address(attributes + 72 * n).value,
                ctypes.c_int.from_address(attributes + 72 * n + 8).value,
            )
            for n in range(count)
        )
        self.calls.append(("follow", function, tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], each))
        return 0


def address(f: Any) -> int:
    return ctypes.cast(f, ctypes.c_void_p).value or 0


@pytest.mark.parametrize("launcher", ["python", "native"])
def test_what_the_driver_is_told(
    launcher: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    row, device, x = backends.find_arch("sm_90"), Device(), ones(1 << 20)
    with faking(monkeypatch):
        monkeypatch.setattr(backends, "arch", lambda device=None: row)
        forget()
        if launcher == "native":
            native: ModuleType = request.getfixturevalue("native")
            where = address(device.launch), address(device.follow), address(device.stream)
            _replay.install(native, "cpu", *where)
        else:
            library: Any = SimpleNamespace(launch=device.launch, follow=device.follow)
            entry = _driver.Entry(library, "launch", "follow")
            monkeypatch.setattr(_driver, "entry", lambda: entry)
        for _ in range(3):
            device.calls.clear()
            gemskit.sum(x)
        first, second = device.calls
        assert (first[0], second[0]) == ("launch", "follow"), "the third call was not replayed"
        assert first[3] == second[3] == (128, 1, 1) and second[2][1:] == (1, 1)
        # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6; its value says that it is wanted.
        assert second[5] == ((6, 1),)
