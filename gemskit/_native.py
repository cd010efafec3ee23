"""Build, cache and load the native launcher, ``_native.cpp``: one C++ extension module, which gemskit can do without.

``load()`` returns it where it is ready and never waits: the compiler runs in a detached process of the lowest priority.
``GEMSKIT_NATIVE=0`` switches it off, ``1`` builds at once and raises where that fails. The file, in ``GEMSKIT_CACHE_DIR``
or the user's cache, is named by all that it depends on, so other versions build their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import IO

#: Seconds between two looks: while a build may finish, and where only the environment can change the answer.
POLL, SETTLED = 1.0, 60.0
#: Seconds that a compiler may take, and after which one that failed is tried again.
TIMEOUT, RETRY = 900.0, 86400.0
SEAL = b"\ngemskit sha256 "


def cache_dir() -> Path:
    """Where builds are kept: ``GEMSKIT_CACHE_DIR``, ``$XDG_CACHE_HOME/gemskit`` or ``~/.cache/gemskit``."""
    if own := os.environ.get("GEMSKIT_CACHE_DIR"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")).absolute() / "gemskit"


def compiler() -> list[str]:
    """The words of ``CXX``, else the first of ``c++``, ``g++``, ``clang++`` on ``PATH``; empty where there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else []
    return [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]


def _recipe(source: Path, words: list[str]) -> tuple[str, str, list[str]]:
    """The file's name up to its compiler, the compiler's part of the name, and the command without ``-o``."""
    import torch
    import triton

    # torch builds extensions as C++20 from 2.12 on, and its headers refuse less from 2.14 on.
    standard = 20 if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12) else 17
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = ["-O2", f"-std=c++{standard}", "-shared", "-fPIC", "-fvisibility=hidden", abi]
    flags += shlex.split(os.environ.get("GEMSKIT_NATIVE_CXXFLAGS", ""))
    root = Path(torch.__file__ or "").parent
    headers = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    command = [*words, *flags, *(f"-I{path}" for path in headers), str(source.absolute()), *libraries]

    def digest(*parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    # No paths but the compiler's: equal versions in two environments share a build.
    versions = (torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip, triton.__version__)
    machine = (importlib.machinery.EXTENSION_SUFFIXES[0], os.uname().machine, os.confstr("CS_GNU_LIBC_VERSION"))
    # File, size and date of each word that is a program: --version would cost a process.
    programs = [os.path.realpath(found) for word in words if (found := shutil.which(word))]
    identity = [(file, (at := os.stat(file)).st_size, at.st_mtime_ns) for file in programs]
    stem = f"launcher-{digest(source.read_bytes(), versions, machine, flags, libraries[1:])}"
    return stem, digest(words[1:], identity), command


def _mine(path: Path) -> bool:
    """Nobody else can have written it: what lies there is executed."""
    at = path.stat()
    return at.st_uid == os.geteuid() and not at.st_mode & 0o022


def _sound(target: Path) -> bool | None:
    """Whether the file is what the compiler wrote, by the digest at its end; None where there is no file."""
    try:
        body, _, digest = target.read_bytes().rpartition(SEAL)
        return _mine(target) and hashlib.sha256(body).hexdigest().encode() == digest
    except FileNotFoundError:
        return None


def _mark(target: Path, why: object) -> None:
    """Remember that this build failed, and when; where nothing can be written the next process tries again."""
    with contextlib.suppress(OSError), target.with_suffix(".log").open("a") as log:
        log.write(f"{why}\n")
        target.with_suffix(".failed").write_text(f"{time.time()}\n{target.stem}\n{log.name}\n")


def _failed(target: Path, since: float) -> bool:
    """Whether a build failed after ``since``; a date in the future, from a wrong clock, does not count."""
    try:
        at = float(target.with_suffix(".failed").read_text().partition("\n")[0])
    except (OSError, ValueError):
        return False
    return since < at < time.time() + SETTLED


def _claim(lock: int, until: float) -> bool:
    """Take the lock, which the kernel releases when its holder dies; tries until that time of the monotonic clock."""
    import fcntl

    # A file system without locks raises another error: at worst two build, and each replaces the file at once.
    with contextlib.suppress(OSError):
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
                time.sleep(0.05)
    return True


def _build(target: Path, log: IO[bytes], lock: int, command: list[str]) -> None:
    """Compile to ``target``, or leave a mark beside it. Releases ``lock``."""
    import fcntl

    temp = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        for old in target.parent.glob("launcher-*.tmp"):  # Of builds that were killed.
            if time.time() - old.stat().st_mtime > 2 * TIMEOUT:
                old.unlink()
        if not _sound(target):
            words = [*command, "-o", str(temp)]
            log.write(f"{shlex.join(words)}\n".encode())
            log.flush()
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=TIMEOUT, check=True)
            body = temp.read_bytes()
            temp.write_bytes(body + SEAL + hashlib.sha256(body).hexdigest().encode())
            temp.chmod(0o700)
            os.replace(temp, target)
        target.with_suffix(".failed").unlink(missing_ok=True)
    except (OSError, subprocess.SubprocessError) as error:
        _mark(target, error)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
            # Closing is not enough: a process forked meanwhile holds the lock too.
            fcntl.flock(lock, fcntl.LOCK_UN)


class Extension:
    """The extension module ``name``, compiled from the one file ``source``."""

    def __init__(self, source: Path, name: str) -> None:
        self.source, self.name = source, name
        self._module: ModuleType | None = None
        self._path: Path | None = None
        self._reason = self._error = ""
        self._next = 0.0
        self._builds = self._child = self._pid = 0
        self._warnings: dict[str, bool] = {}  # Text, and whether the caller has been told.
        self._lock = threading.Lock()

    def load(self, wait: bool = False) -> ModuleType | None:
        """The extension, or None while it is not built or cannot be; ``wait`` builds it here, even after a failure.

        :raises GemskitError: ``GEMSKIT_NATIVE=1`` and there is none; the reason is in the message.
        :raises ArgumentError: ``GEMSKIT_NATIVE`` is neither ``0`` nor ``1``.
        """
        if self._module is None and (wait or self._error or time.monotonic() >= self._next):
            self._look(True, wait)
        return self._module

    def status(self) -> str:
        """One line: what is in use, or why it is Python. Loads what is built, builds nothing."""
        if self._module is None:
            self._look(False, False)
        return self._reason if self._module is None else f"native ({self._path})"

    def _look(self, start: bool, wait: bool) -> None:
        from gemskit.errors import ArgumentError, GemskitError

        mode = os.environ.get("GEMSKIT_NATIVE", "")
        if mode not in ("", "0", "1"):
            raise ArgumentError(
                f"GEMSKIT_NATIVE={mode!r} is not accepted: 0 (never), 1 (at once), unset (in background)"
            )
        must = start and mode == "1"
        if self._pid != os.getpid():  # A fork: a thread of the parent may hold the lock, and the child is not ours.
            self._pid, self._child, self._lock = os.getpid(), 0, threading.Lock()
        if not self._lock.acquire(blocking=wait or must):
            return  # Another thread is at it.
        try:
            if self._module is None and not (must and self._error and not wait):
                self._reason = "off (GEMSKIT_NATIVE=0)" if mode == "0" else self._find(start, wait or must)
                self._next = time.monotonic() + (POLL if self._reason == "building" else SETTLED)
            self._error = self._reason.removeprefix("python: ") if must and self._module is None else ""
        finally:
            self._lock.release()
        if self._error:
            raise GemskitError(f"GEMSKIT_NATIVE=1, but there is no native launcher: {self._error}")
        for text in [text for text, told in self._warnings.items() if not told]:
            self._warnings[text] = True
            warnings.warn(f"gemskit's native launcher: {text}; calls go through Python", RuntimeWarning)

    def _warn(self, reason: str) -> str:
        self._warnings.setdefault(reason.removeprefix("python: "), False)
        return reason

    def _find(self, start: bool, wait: bool) -> str:
        """Load it, or begin what leads there; returns the reason where it is not loaded."""
        if sys.platform != "linux":
            return "python: the native launcher is for Linux"
        if not self.source.is_file():
            return f"python: {self.source.name} is not installed"
        home = cache_dir()
        try:
            words = compiler()
            stem, identity, command = _recipe(self.source, words)
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _mine(home):
                return self._warn(f"python: {home} is not the user's alone (chown, chmod go-w)")
            if words:
                return self._make(home / f"{stem}-{identity}.so", command, start, wait)
            # What another compiler has built is as good.
            built = [path for path in sorted(home.glob(f"{stem}-*.so")) if _sound(path)]
            return self._open(built[0]) if built else "python: no C++ compiler (CXX, c++, g++, clang++)"
        except ValueError as error:
            return self._warn(f"python: CXX or GEMSKIT_NATIVE_CXXFLAGS cannot be read ({error})")
        except OSError as error:
            return self._warn(f"python: cannot build in {home} ({error.strerror or error})")

    def _make(self, target: Path, command: list[str], start: bool, wait: bool) -> str:
        with contextlib.suppress(ChildProcessError):
            if self._child and not wait and os.waitpid(self._child, os.WNOHANG)[0] == 0:
                return "building"
        self._child = 0
        sound = _sound(target)
        if not sound and (wait or not _failed(target, time.time() - RETRY)):
            if sound is False and start:
                self._warn(f"{target} is damaged, it is built anew")
            if reason := self._begin(target, command, start, wait):
                return reason
            sound = _sound(target)
        if not sound:
            reason = f"python: build failed, see {target.with_suffix('.log')}"
            return self._warn(reason) if wait or self._builds else reason
        if reason := self._open(target):
            _mark(target, reason)
            target.unlink(missing_ok=True)
            self._warn(reason)
        return reason

    def _begin(self, target: Path, command: list[str], start: bool, wait: bool) -> str:
        """Build; returns what stands in the way, or nothing where a build has ended."""
        header, log, now = Path(sysconfig.get_path("include"), "Python.h"), target.with_suffix(".log"), time.time()
        if not header.is_file():
            return f"python: {header} is missing (a package such as python3-dev has it)"
        lock = os.open(target.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _claim(lock, time.monotonic() + TIMEOUT if wait else 0.0):
                return "building"
            # By now another process may have built it, or failed to.
            if (_sound(target) and not wait) or _failed(target, now if wait else now - RETRY):
                return ""
            if not start:
                return "python: not built yet, the first call starts it"
            if self._builds and not wait:
                return self._warn(f"python: the build ended without a result, see {log}")
            if not wait and "python" not in Path(sys.executable or "").name:
                return f"python: sys.executable is not Python ({sys.executable}), GEMSKIT_NATIVE=1 builds without it"
            with log.open("wb") as out:
                if wait:
                    _build(target, out, lock, command)
                    return ""
                program = [sys.executable, "-I", "-S", __file__, str(target), str(lock), *command]
                # It inherits the lock, so nobody else starts one before it ends.
                child = subprocess.Popen(
                    program, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[lock], start_new_session=True
                )
            # It may outlive this process, which would warn of a child without a return code.
            self._child, child.returncode, self._builds = child.pid, 0, 1
            return "building"
        finally:
            os.close(lock)

    def _open(self, path: Path) -> str:
        """Load the file; returns why it does not load."""
        try:
            loader = importlib.machinery.ExtensionFileLoader(self.name, str(path))
            module = importlib.util.module_from_spec(
                importlib.machinery.ModuleSpec(self.name, loader, origin=str(path))
            )
            loader.exec_module(module)
        except Exception as error:
            return f"python: {path} does not load ({error})"
        self._path, self._module = path, module
        return ""


_launcher = Extension(Path(__file__).with_name("_native.cpp"), "_gemskit_native")
load, status = _launcher.load, _launcher.status

if __name__ == "__main__":
    os.nice(19)
    _build(Path(sys.argv[1]), sys.stdout.buffer, int(sys.argv[2]), sys.argv[3:])
