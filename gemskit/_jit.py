"""``triton.jit`` for the package's own functions, several hundred: each is read from its file when it is first needed.

``triton.jit`` reads and tokenizes the source where it decorates, 0.6 ms a function: half of the time of ``import gemskit``.
"""

from __future__ import annotations

import threading
from typing import Any

from triton.runtime.jit import JITFunction

_lock = threading.RLock()


class _Later(JITFunction):  # type: ignore[misc, type-arg]
    """A ``JITFunction`` that is initialised by the first attribute asked of it."""

    def __init__(self, fn: Any, options: dict[str, Any]) -> None:
        self.fn, self._options = fn, options
        self.__doc__, self.__name__, self.__qualname__, self.__module__ = (
            fn.__doc__, fn.__name__, fn.__qualname__, fn.__module__,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        # The last attribute that is set says that all are.
        if "pre_run_hooks" not in self.__dict__ and (name == "__globals__" or not name.startswith("__")):
            with _lock:
                if "pre_run_hooks" not in self.__dict__:
                    super().__init__(self.fn, **self._options)
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def jit(fn: Any = None, **options: Any) -> Any:
    """Make ``fn`` a Triton function, as ``triton.jit`` does with these options."""
    return _Later(fn, options) if fn is not None else lambda fn: _Later(fn, options)
