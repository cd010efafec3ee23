"""The loss of a language model without its logits: the head hands on what it was given until somebody needs numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

import gemskit
from gemskit.compat.transformers._patch import Patch, sharded

_Reduce = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def loss(model: nn.Module, patch: Patch) -> None:
    """Defer the logits of training, and compute the loss of causal language models from the head's input."""
    for submodel in [m for m in model.modules() if isinstance(m, PreTrainedModel)]:
        head = getattr(submodel, "lm_head", None)
        if not isinstance(head, nn.Module):
            continue
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            patch.left("loss", submodel, f"its head is a {type(head).__name__}")
        elif submodel.loss_function is not ForCausalLMLoss:
            patch.left("loss", submodel, "its loss is not that of causal language models")
        elif patch.forward("loss", head, _head):
            patch.set(submodel, "_loss_function", causal_loss)


def _head(self: Any, input: Tensor, reduce: _Reduce | None = None) -> Any:
    """The logits; in training, the promise of them. With ``reduce``, what that makes of the input and the weights.

    It is called here, inside the head's own forward, because sharding and offloading lend the weights only there.
    """
    if reduce is not None:
        return reduce(input, self.weight, self.bias)
    if self.training and torch.is_grad_enabled() and not sharded(self.weight, input):
        return DeferredLogits(self, input)
    return F.linear(input, self.weight, self.bias)


class DeferredLogits:
    """Logits that are not computed yet: a tensor as soon as anything but the loss touches them.

    Numbers may scale them first, which scales the head's input, and ``cap * tanh(logits / cap)`` may cap them. No
    ``torch.Tensor``: ``isinstance`` says so.
    """

    def __init__(self, head: nn.Module, hidden: Tensor) -> None:
        self.head = head
        self.hidden = hidden
        device = hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = self.autocast or hidden.dtype
        self.device = hidden.device
        #: What multiplies the tanh of the head's output; None without a tanh.
        self.softcap: float | None = None
        self.weight = head.weight
        self.version = None if torch.compiler.is_compiling() else head.weight._version  # type: ignore[union-attr]

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))  # type: ignore[arg-type]

    @property
    def ndim(self) -> int:
        """Of the logits."""
        return self.hidden.ndim

    def reduced(self, reduce: _Reduce) -> Tensor:
        """What ``reduce`` makes of the head's input, weight and bias, as if it had been called with them in the model."""
        if self.version is not None and self.head.weight is self.weight and self.weight._version != self.version:  # type: ignore[union-attr]
            raise RuntimeError(
                "these logits were never computed and the weights have changed since; read them before the optimizer's "
                'step, or leave "loss" out of the rules of gemskit.compat.transformers.optimize()'
            )
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            found: Tensor = self.head(self.hidden, reduce=reduce)
        return found

    def materialize(self) -> Tensor:
        """The logits."""
        found = self.reduced(F.linear)
        return found if self.softcap is None else torch.tanh(found) * self.softcap

    def _again(self, hidden: Tensor, softcap: float | None) -> DeferredLogits:
        made = DeferredLogits(self.head, hidden)
        made.autocast, made.dtype, made.version, made.softcap = self.autocast, self.dtype, self.version, softcap
        return made

    def scaled(self, factor: float) -> DeferredLogits:
        """``factor`` times the head's output, whatever becomes of it then."""
        return self._again(self.hidden * factor, self.softcap)

    def tanh(self) -> Any:
        """Kept in mind; a second one is computed."""
        return self._again(self.hidden, 1.0) if self.softcap is None else self.materialize().tanh()

    def _scales(self, other: Any) -> bool:
        # A bias would have to be scaled too.
        return isinstance(other, (int, float)) and (self.softcap is not None or self.head.bias is None)

    def __mul__(self, other: Any) -> Any:
        if not self._scales(other):
            return self.materialize() * other
        return self.scaled(other) if self.softcap is None else self._again(self.hidden, self.softcap * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not self._scales(other):
            return self.materialize() / other
        if self.softcap is None:
            return self._again(self.hidden / other, None)
        return self._again(self.hidden, self.softcap / other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tanh and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map(lambda a: a.materialize() if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.materialize(), name)(*args, **kwargs)

    method.__name__ = name
    return method


# Written out one by one, not by __getattr__, which torch.compile does not follow.
for _name in (
    "add radd sub rsub rtruediv pow rpow neg abs matmul rmatmul eq ne lt le gt ge getitem setitem len iter bool float int "
    "array format".split()
):
    setattr(DeferredLogits, f"__{_name}__", _passed_on(f"__{_name}__"))
for _name in (
    "float double half bfloat16 to type type_as cpu cuda detach clone contiguous numpy tolist item size dim numel stride "
    "view reshape flatten unflatten transpose permute squeeze unsqueeze expand chunk split narrow select index_select gather "
    "masked_fill masked_select where argmax argmin max min amax topk sort sum mean std var norm logsumexp softmax log_softmax "
    "sigmoid exp log abs clamp add sub mul div mul_ div_ masked_fill_ copy_ isnan isinf all any requires_grad_ backward "
    "register_hook retain_grad is_floating_point element_size".split()
):
    setattr(DeferredLogits, _name, _passed_on(_name))


# -- the loss -------------------------------------------------------------------------------------------------------------


def causal_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ForCausalLMLoss`` of Transformers by gemskit's operators: of logits, or of what they would be computed from."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    targets = shift_labels.reshape(-1).to(logits.device)
    if isinstance(logits, DeferredLogits) and logits.softcap is not None and logits.softcap <= 0:
        logits = logits.materialize()
    if isinstance(logits, DeferredLogits):
        cap = logits.softcap
        how = functools.partial(_reduced, targets=targets, ignore_index=ignore_index, reduction=reduction, softcap=cap)
        # cap * tanh(x) of the logits x that the head gives, where linear_cross_entropy takes cap * tanh(x / cap).
        found = (logits if cap is None else logits.scaled(cap)).reduced(how)
    else:
        found = _of_logits(logits.reshape(-1, vocab_size), targets, ignore_index, reduction)
    if num_items_in_batch is None:
        return found
    return found / (
        num_items_in_batch.to(found.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )


def _of_logits(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    return gemskit.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)


def _reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # The loss of logits that were rounded to halves is float32.
    found: Tensor = gemskit.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets, linear_bias=bias, ignore_index=ignore_index,
        reduction=reduction, softcap=softcap, out_dtype=torch.float32 if hidden.dtype.itemsize == 2 else None,
    )  # fmt: skip
    return found.float()
