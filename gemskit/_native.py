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
    texts = [file.read_bytes() for file in (source, *sorted(source.parent.glob(f"{source.stem}*.h")))]
    stem = f"launcher-{digest(texts, versions, machine, flags, libraries[1:])}"
    # File, size and date of each word that is a program: --version would cost a process.
    programs = [Path(found).resolve() for word in words if (found := shutil.which(word))]
    identity = [(str(file), (at := file.stat()).st_size, at.st_mtime_ns) for file in programs]
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


def _build(target: Path, lock: int, command: list[str]) -> None:
    """Compile to ``target``, or leave a mark beside it. Releases ``lock``."""
    import fcntl

    temp = target.with_suffix(f".{os.getpid()}.tmp")
    words = [*command, "-o", str(temp)]
    try:
        if not _sound(target):
            with target.with_suffix(".log").open("wb") as log:
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
    """The extension module ``name``, compiled from ``source``, which may include headers beside it that begin with its name."""

    def __init__(self, source: Path, name: str) -> None:
        self.source, self.name = source, name
        self._module: ModuleType | None = None
        self._reason, self._must, self._next = "", False, 0.0
        self._builds = self._child = self._pid = 0
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def load(self, wait: bool = False) -> ModuleType | None:
        """The extension, or None while it is not built or cannot be; ``wait`` builds it here, even after a failure.

        :raises GemskitError: ``GEMSKIT_NATIVE=1`` and there is none; the reason is in the message.
        :raises ArgumentError: ``GEMSKIT_NATIVE`` is neither ``0`` nor ``1``.
        """
        if self._module is None and (wait or time.monotonic() >= self._next):
            self._look(True, wait)
        if self._module is None and self._must:
            from gemskit import errors

            reason = self._reason.removeprefix("python: ")
            raise errors.GemskitError(f"GEMSKIT_NATIVE=1, but there is no native launcher: {reason}")
        return self._module

    def status(self) -> str:
        """One line: what is in use, or why it is Python. Loads what is built, builds nothing."""
        if self._module is None:
            self._look(False, False)
        return f"native ({self._module.__file__})" if self._module else self._reason

    def _look(self, start: bool, wait: bool) -> None:
        mode = os.environ.get("GEMSKIT_NATIVE", "")
        if mode not in ("", "0", "1"):
            from gemskit import errors

            raise errors.ArgumentError(
                f"GEMSKIT_NATIVE={mode!r}: accepted are 0 (never), 1 (at once), unset (background)"
            )
        if self._pid != os.getpid():  # A fork: a thread of the parent may hold the lock, and the child is not ours.
            self._pid, self._child, self._lock = os.getpid(), 0, threading.Lock()
        self._must = mode == "1"
        wait = wait or (start and self._must and not self._builds)
        if not self._lock.acquire(blocking=wait):
            return  # Another thread is at it.
        try:
            if self._module is None:
                if start:  # Before a warning, which may be an error.
                    self._next = time.monotonic() + SETTLED
                self._reason = "off (GEMSKIT_NATIVE=0)" if mode == "0" else self._find(start, wait)
                if start and self._reason == "building":
                    self._next = time.monotonic() + POLL
        finally:
            self._lock.release()

    def _warn(self, reason: str) -> str:
        """The reason, of which the caller is told once."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"gemskit calls go through Python: {reason.removeprefix('python: ')}", RuntimeWarning)
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
            return self._warn(reason) if self._builds else reason
        if reason := self._open(target):
            _mark(target, reason)
            target.unlink(missing_ok=True)
            self._warn(reason)
        return reason

    def _begin(self, target: Path, command: list[str], start: bool, wait: bool) -> str:
        """Build; returns what stands in the way, or nothing where a build has ended."""
        import fcntl

        header, log, now = Path(sysconfig.get_path("include"), "Python.h"), target.with_suffix(".log"), time.time()
        if not header.is_file():
            return f"python: {header} is missing (a package such as python3-dev has it)"
        lock = os.open(target.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # The kernel releases it when its holder dies. Where the file system has no locks, at worst two build.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return "building"
            except OSError:
                pass
            # By now another process may have built it, or failed to.
            if _sound(target) or _failed(target, now if wait else now - RETRY):
                return ""
            if self._builds and not wait:
                return self._warn(f"python: the build ended without a result, see {log}")
            if not start:
                return "python: not built yet, the first call starts it"
            self._builds = 1
            if wait:
                _build(target, lock, command)
                return ""
            # It inherits the lock, so nobody else starts one before it ends.
            program = [sys.executable or "python3", "-I", "-S", __file__, str(target), str(lock), *command]
            with log.open("ab") as out:
                child = subprocess.Popen(
                    program, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[lock], start_new_session=True
                )
            # It may outlive this process, which would warn of a child without a return code.
            self._child, child.returncode = child.pid, 0
            return "building"
        finally:
            os.close(lock)

    def _open(self, path: Path) -> str:
        """Load the file; returns why it does not load."""
        try:
            loader = importlib.machinery.ExtensionFileLoader(self.name, str(path))
            spec = importlib.machinery.ModuleSpec(self.name, loader, origin=str(path))
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except Exception as error:
            return f"python: {path} does not load ({error})"
        self._module = module
        return ""


_launcher = Extension(Path(__file__).with_name("_native.cpp"), "_gemskit_native")
load, status = _launcher.load, _launcher.status

if __name__ == "__main__":
    os.nice(19)
    _build(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
