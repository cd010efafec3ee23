"""The native launcher is built once, in the background, by whom it is for; whatever goes wrong leaves the Python path."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from gemskit import _native
from gemskit._native import Extension
from gemskit.errors import ArgumentError, GemskitError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native launcher is for Linux"),
    pytest.mark.skipif(not _native.compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="no Python.h"),
]

SOURCE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_probe", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__probe() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""


class Bench:
    """A source, a cache and a compiler that counts its runs and sleeps a while."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.cache, self.runs = root, root / "cache", root / "runs"
        self.source = root / "probe.cpp"
        self.answer(42)
        self.monkeypatch = monkeypatch
        (real,) = _native.compiler()
        self.real = real
        monkeypatch.setenv("GEMSKIT_CACHE_DIR", str(self.cache))
        for name in ("GEMSKIT_NATIVE", "GEMSKIT_NATIVE_CXXFLAGS", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(_native, "POLL", 0.02)
        monkeypatch.setattr(_native, "SETTLED", 0.02)
        self.compiler(f'exec {real} "$@"')

    def answer(self, value: int) -> None:
        self.source.write_text(SOURCE.replace("ANSWER", str(value)))

    def compiler(self, body: str) -> None:
        script = self.root / "cxx"
        script.write_text(f"#!/bin/sh\necho $$ >> {self.runs}\n{body}\n")
        script.chmod(0o755)
        self.monkeypatch.setenv("CXX", str(script))

    def new(self) -> Extension:
        """What another process would have."""
        return Extension(self.source, "_probe")

    def count(self) -> int:
        return len(self.runs.read_text().split()) if self.runs.exists() else 0

    def file(self, suffix: str = "so") -> Path:
        (found,) = self.cache.glob(f"launcher-*.{suffix}")
        return found


def in_a_small_process(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test that forks in an interpreter of its own: this one may have grown beyond what the system lets fork."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("GEMSKIT_SMALL_PROCESS"):
            test(*args, **kwargs)
            return
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        env = {**os.environ, "GEMSKIT_SMALL_PROCESS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# -- building --------------------------------------------------------------------------------------------------------


def test_builds_in_background(bench: Bench) -> None:
    bench.compiler(f'sleep 0.5; nice > {bench.root}/nice; exec {bench.real} "$@"')
    extension = bench.new()
    assert extension.status() == "python: not built yet, the first call starts it" and not bench.count()
    start = time.monotonic()
    assert extension.load() is None
    assert time.monotonic() - start < 0.4, "the call waited for the build"
    assert extension.status() == "building" == bench.new().status()
    until(extension.load)
    module = extension.load()
    assert module is not None and module.answer == 42
    assert extension.status() == f"native ({bench.file()})" == bench.new().status()
    assert (bench.root / "nice").read_text().strip() == "19"
    assert bench.count() == 1 and not list(bench.cache.glob("*.tmp"))
    assert extension._child == 0, "the builder was not reaped"


def test_wait_builds_here_and_the_next_finds_it(bench: Bench) -> None:
    assert bench.new().load(wait=True) is not None
    assert bench.new().load() is not None
    assert bench.count() == 1


def test_looks_are_rare(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "POLL", 3600.0)
    looks: list[bool] = []
    find = Extension._find
    monkeypatch.setattr(Extension, "_find", lambda self, *a: (looks.append(True), find(self, *a))[1])
    extension = bench.new()
    for _ in range(100):
        assert extension.load() is None
    assert len(looks) == 1
    until(lambda: list(bench.cache.glob("*.so")))


def test_the_parent_may_end_before_the_build(bench: Bench) -> None:
    bench.compiler(f'sleep 0.5; exec {bench.real} "$@"')
    code = f"from gemskit._native import *; assert Extension(Path({str(bench.source)!r}), '_probe').load() is None"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and not done.stderr, done.stderr
    until(bench.new().load)
    assert bench.count() == 1


def test_import_does_nothing(bench: Bench) -> None:
    code = """
import sys, threading
before = threading.active_count()
sys.modules["torch"] = sys.modules["triton"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("native", sys.argv[1])
module = importlib.util.module_from_spec(spec); sys.modules["native"] = module
spec.loader.exec_module(module)
assert threading.active_count() == before
"""
    subprocess.run([sys.executable, "-I", "-c", code, str(_native.__file__)], check=True, timeout=20)
    assert not bench.cache.exists()


@in_a_small_process
def test_sixteen_processes_start_one_build(bench: Bench) -> None:
    bench.compiler(f'sleep 1; exec {bench.real} "$@"')
    go = bench.root / "go"
    children = []
    for _ in range(16):
        pid = os.fork()
        if pid == 0:
            try:
                until(go.exists)
                until(bench.new().load)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    go.touch()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 16
    assert bench.count() == 1


@in_a_small_process
def test_waiting_processes_share_one_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSKIT_NATIVE", "1")
    bench.compiler("sleep 1; exit 1")
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            warnings.simplefilter("ignore")
            try:
                bench.new().load()
            except GemskitError:
                os._exit(0)
            os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert bench.count() == 1


def test_a_killed_builder_does_not_block(bench: Bench) -> None:
    bench.compiler("echo $PPID > ${0%/*}/builder; exec sleep 30")
    extension, mark = bench.new(), bench.root / "builder"
    extension.load()
    until(lambda: mark.exists() and mark.read_text())
    os.kill(int(mark.read_text()), signal.SIGKILL)
    os.kill(int(bench.runs.read_text()), signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="ended without a result"):
        until(lambda: "without a result" in (extension.load() or extension.status()))
    assert bench.count() == 1, "one build per process"
    extension = bench.new()
    assert extension.load() is None and extension.status() == "building", "the lock is free for the next process"
    until(lambda: bench.count() == 2)
    os.kill(int(bench.runs.read_text().split()[-1]), signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="build failed"):
        until(lambda: "failed" in (extension.load() or extension.status()))


@in_a_small_process
def test_a_fork_does_not_inherit_a_held_lock(bench: Bench) -> None:
    assert bench.new().load(wait=True)
    extension = bench.new()
    extension._pid = os.getpid()
    extension._lock.acquire()
    assert extension.load() is None, "another thread is at it"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if extension.load() else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_unlocks_for_processes_forked_meanwhile(bench: Bench) -> None:
    """A descriptor that a fork copied keeps a lock unless it is released, not only closed."""
    bench.cache.mkdir(mode=0o700)
    lock = os.open(bench.cache / "x.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _native._build(bench.cache / "x.so", lock, ["false"])
    other = os.open(bench.cache / "x.lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    os.close(other)


# -- names -----------------------------------------------------------------------------------------------------------


def test_the_name_tells_what_it_depends_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> tuple[str, str]:
        return _native._recipe(bench.source, _native.compiler())[:2]

    seen = {name()}
    assert name() in seen
    for change in (
        lambda: bench.answer(43),
        lambda: monkeypatch.setattr(torch, "__version__", "2.11.0"),
        lambda: monkeypatch.setattr(torch.version, "git_version", "0"),
        lambda: monkeypatch.setattr(torch._C, "_GLIBCXX_USE_CXX11_ABI", not torch._C._GLIBCXX_USE_CXX11_ABI),
        lambda: monkeypatch.setattr(triton, "__version__", "0"),
        lambda: monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".cpython-399.so"]),
        lambda: monkeypatch.setattr(os, "uname", lambda: os.uname_result(("", "", "", "", "other"))),
        lambda: monkeypatch.setenv("GEMSKIT_NATIVE_CXXFLAGS", "-g"),
        lambda: monkeypatch.setenv("CXX", f"{os.environ['CXX']} -m64"),
        lambda: bench.compiler(f'exec {bench.real} -pipe "$@"'),
    ):
        change()
        assert name() not in seen, f"change {len(seen)}"
        seen.add(name())


def test_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSKIT_NATIVE_CXXFLAGS", "-g '-DX=a b'")
    monkeypatch.setattr(torch, "__version__", "2.12.0a0+git")
    command = _native._recipe(bench.source, ["g++"])[2]
    assert "-std=c++20" in command and "-DX=a b" in command and "-ltorch_cuda" not in command
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert "-std=c++17" in _native._recipe(bench.source, ["g++"])[2]


def test_another_source_is_another_build(bench: Bench) -> None:
    assert bench.new().load(wait=True)
    bench.answer(43)
    module = bench.new().load(wait=True)
    assert module is not None and module.answer == 43 and bench.count() == 2


def test_without_a_compiler_a_build_of_another_serves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert bench.new().load(wait=True) is None
    assert bench.new().status() == "python: no C++ compiler (CXX, c++, g++, clang++)"
    bench.compiler(f'exec {bench.real} "$@"')
    assert bench.new().load(wait=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(bench.cache))
    assert bench.new().load()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMSKIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _native.cache_dir() == Path("/a/.cache/gemskit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert _native.cache_dir() == Path("/b/gemskit")
    monkeypatch.setenv("GEMSKIT_CACHE_DIR", "/c")
    assert _native.cache_dir() == Path("/c")


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "other", "foreign"])
def test_a_damaged_file_is_built_once_more(bench: Bench, how: str) -> None:
    bench.new().load(wait=True)
    file = bench.file()
    body = file.read_bytes()
    file.unlink()  # It is mapped.
    file.write_bytes({"truncated": body[: len(body) // 2], "other": b"x" + body[1:], "foreign": body}[how])
    file.chmod(0o777 if how == "foreign" else 0o700)
    extension = bench.new()
    assert "not built" in extension.status()
    with pytest.warns(RuntimeWarning, match="damaged") as told:
        until(extension.load)
    assert len(told) == 1 and bench.count() == 2


def test_a_file_that_does_not_load_is_a_failed_build(bench: Bench) -> None:
    bench.source.write_text(SOURCE.replace("ANSWER", "missing()").replace("static", "int missing();\nstatic", 1))
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert bench.new().load(wait=True) is None
    assert "missing" in bench.file("log").read_text().splitlines()[-1]
    assert bench.new().load() is None and bench.count() == 1


def test_a_failure_is_remembered_for_a_day(bench: Bench) -> None:
    bench.compiler("echo some words; exit 1")
    extension = bench.new()
    with pytest.warns(RuntimeWarning, match="build failed") as told:
        until(lambda: "failed" in (extension.load() or extension.status()))
        extension.load()
    assert len(told) == 1
    log = bench.file("log")
    assert extension.status() == f"python: build failed, see {log}" and "some words" in log.read_text()
    assert str(log) in bench.file("failed").read_text()
    for _ in range(3):
        assert bench.new().load() is None
    assert bench.count() == 1
    mark = bench.file("failed")
    for at in (time.time() - _native.RETRY - 1, time.time() + 1e6):
        mark.write_text(f"{at}\n")
        extension, before = bench.new(), bench.count()
        assert extension.load() is None and extension.status() == "building"
        with pytest.warns(RuntimeWarning, match="build failed"):
            until(lambda e=extension: "failed" in (e.load() or e.status()))
        assert bench.count() == before + 1
    with pytest.warns(RuntimeWarning, match="build failed"):
        assert bench.new().load(wait=True) is None
    assert bench.count() == 4


def test_a_success_ends_the_failure(bench: Bench) -> None:
    broken = bench.root / "broken"
    broken.touch()
    bench.compiler(f'[ -e {broken} ] && exit 1; exec {bench.real} "$@"')
    with pytest.warns(RuntimeWarning):
        assert bench.new().load(wait=True) is None
    broken.unlink()
    assert bench.new().load(wait=True)
    assert not list(bench.cache.glob("*.failed"))


def test_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.new().load(wait=True)
    monkeypatch.setenv("GEMSKIT_NATIVE", "0")
    extension = bench.new()
    assert extension.load() is None and extension.load(wait=True) is None
    assert extension.status() == "off (GEMSKIT_NATIVE=0)"


def test_must(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSKIT_NATIVE", "1")
    assert bench.new().load() is not None
    bench.compiler("exit 1")
    with pytest.warns(RuntimeWarning), pytest.raises(GemskitError, match=r"GEMSKIT_NATIVE=1.*build failed, see"):
        bench.new().load()
    extension, before = bench.new(), bench.count()
    for _ in range(3):  # The mark of the failure above does not count; its own does.
        with warnings.catch_warnings(), pytest.raises(GemskitError):
            warnings.simplefilter("ignore")
            extension.load()
    assert bench.count() == before + 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("GEMSKIT_CACHE_DIR", str(bench.root / "empty"))
    with pytest.raises(GemskitError, match=r"no C\+\+ compiler"):
        bench.new().load()
    monkeypatch.setenv("GEMSKIT_NATIVE", "yes")
    with pytest.raises(ArgumentError, match="GEMSKIT_NATIVE='yes'"):
        bench.new().load()


@pytest.mark.parametrize("where", ["/proc/self", "/proc/nothing/cache", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Of these not even root can write one."""
    monkeypatch.setenv("GEMSKIT_CACHE_DIR", where)
    extension = bench.new()
    with pytest.warns(RuntimeWarning, match="cannot build in") as told:
        for _ in range(3):
            assert extension.load() is None
            time.sleep(0.03)
    assert len(told) == 1 and extension.status().startswith(f"python: cannot build in {where} (")


@pytest.mark.parametrize("what", ["mode", "owner"])
def test_a_cache_of_others_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    bench.new().load(wait=True)
    assert bench.cache.stat().st_mode & 0o777 == 0o700
    if what == "mode":
        bench.cache.chmod(0o770)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.warns(RuntimeWarning, match="not the user's alone"):
        assert bench.new().load(wait=True) is None


def test_missing_headers_and_source(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(bench.root / "nowhere"))
    extension = bench.new()
    assert extension.load(wait=True) is None and "Python.h is missing" in extension.status()
    extension = Extension(bench.root / "absent.cpp", "_probe")
    assert extension.load(wait=True) is None and extension.status() == "python: absent.cpp is not installed"


def test_unreadable_settings_and_other_systems(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMSKIT_NATIVE_CXXFLAGS", "'")
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert bench.new().load(wait=True) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert bench.new().load(wait=True) is None
    assert bench.new().status() == "python: the native launcher is for Linux"


# -- torch -----------------------------------------------------------------------------------------------------------


def test_torch_headers_and_libraries(bench: Bench) -> None:
    bench.source.write_text(
        "#include <torch/csrc/Device.h>\n"
        + SOURCE.replace("ANSWER", "THPDevice_Check(THPDevice_New(c10::Device(c10::DeviceType::CPU)))")
    )
    module = bench.new().load(wait=True)
    assert module is not None, bench.file("log").read_text()
    assert module.answer == 1
