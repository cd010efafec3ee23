"""Every error gemskit raises. Each message names the operator, the argument, what was given and what is accepted."""

from __future__ import annotations


class GemskitError(RuntimeError):
    """Base of all gemskit errors; a ``RuntimeError`` because that is what torch raises for the same mistakes."""


class ArgumentError(GemskitError, ValueError):
    """An argument has a value, shape or layout that the operator does not accept."""


class ShapeError(ArgumentError):
    """Shapes do not fit together."""


class DimError(ArgumentError, IndexError):
    """A ``dim`` is out of range or repeated."""


class DtypeError(ArgumentError, TypeError):
    """A dtype is not accepted, or a result cannot be cast to the dtype of ``out``."""


class DeviceError(ArgumentError):
    """Tensors live on different devices, or on one that the resolved vendor does not serve."""


class GradientError(GemskitError):
    """A gradient was asked for where torch refuses one too (``out=``, in-place on a leaf)."""


class NoKernel(GemskitError, NotImplementedError):
    """No kernel serves these inputs on this accelerator; the reason is in the message, nothing falls back silently."""


class CaptureError(GemskitError):
    """A call that would compile or synchronise was made inside a graph capture."""


class VendorError(GemskitError, ImportError):
    """``GEMSKIT_VENDOR`` names a vendor that is unknown or cannot be served by this torch build."""


class MissingExtra(GemskitError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class InterpreterError(GemskitError):
    """The interpreter found an out-of-bounds access or a race between programs."""


class DeclarationError(GemskitError):
    """An operator is declared wrongly. Raised at import, for authors of operators."""
