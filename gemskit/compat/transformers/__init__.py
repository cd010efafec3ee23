"""Models of Hugging Face Transformers on gemskit's operators: ``optimize(model)``, and ``restore(model)``.

Modules are recognised by what they compute, not by their names or their models: see ``docs/compat-transformers.md``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from gemskit.errors import ArgumentError, MissingExtra

try:
    from transformers import TrainerCallback
except ImportError as e:
    raise MissingExtra('gemskit.compat.transformers needs Transformers 5: pip install "gemskit[transformers]"') from e

from gemskit.compat.transformers import _attention, _experts, _loss, _mlp, _norm, _rope
from gemskit.compat.transformers._loss import DeferredLogits as DeferredLogits
from gemskit.compat.transformers._patch import Patch
from gemskit.compat.transformers._patch import Report as Report

Model = TypeVar("Model", bound=nn.Module)

_RULES = {
    "norms": _norm.norms,
    "mlp": _mlp.mlp,
    "rope": _rope.rope,
    "attention": _attention.attention,
    "experts": _experts.experts,
    "loss": _loss.loss,
}
#: Everything that :func:`optimize` can replace.
RULES = tuple(_RULES)
_KEPT = "_gemskit_patch"


def optimize(model: Model, rules: Iterable[str] = RULES) -> Model:
    """Let ``model`` compute by gemskit; returns the same object. Other models are not touched. Again is like once.

    Call it after loading, and before DistributedDataParallel, FSDP or torch.compile wrap the model.
    """
    chosen = [rules] if isinstance(rules, str) else list(rules)
    for name in chosen:
        if name not in _RULES:
            near = difflib.get_close_matches(name, RULES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"optimize: unknown rule {name!r}; accepted: {', '.join(RULES)}{hint}")
    restore(model)
    patch = Patch()
    try:
        for name in RULES:
            if name in chosen:
                _RULES[name](model, patch)
    except BaseException:
        patch.undo()
        raise
    model.__dict__[_KEPT] = patch
    return model


def restore(model: Model) -> Model:
    """Undo :func:`optimize`: every attribute is what it was. Returns the same object."""
    patch = model.__dict__.pop(_KEPT, None)
    if patch is not None:
        patch.undo()
    return model


def report(model: nn.Module) -> Report:
    """What :func:`optimize` replaced in ``model``, and what it left, with the reason."""
    patch = model.__dict__.get(_KEPT)
    return Report() if patch is None else patch.report


@contextmanager
def optimized(model: Model, rules: Iterable[str] = RULES) -> Iterator[Model]:
    """:func:`optimize` inside a ``with``, :func:`restore` behind it."""
    try:
        yield optimize(model, rules)
    finally:
        restore(model)


def register() -> None:
    """Make ``attn_implementation="gemskit"`` and ``experts_implementation="gemskit"`` known, for use at load."""
    _attention.register()
    _experts.register()


class GemskitCallback(TrainerCallback):  # type: ignore[misc]
    """``Trainer(..., callbacks=[GemskitCallback()])``: optimizes the model before the trainer wraps it."""

    def __init__(self, rules: Iterable[str] = RULES) -> None:
        self.rules = tuple(rules)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has its model."""
        optimize(kwargs["model"], self.rules)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A ``model_init`` may have made another model, which has no record yet."""
        if not any(_KEPT in m.__dict__ for m in kwargs["model"].modules()):
            optimize(kwargs["model"], self.rules)
