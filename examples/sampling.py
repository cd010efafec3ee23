"""A research kernel that embeds gemskit's device functions: sampling the next token, in one pass over the logits.

For each row of logits it draws a token from ``softmax(logits / temperature)`` and gives the logarithm of its probability. A
token is the index of the largest ``logits / temperature - log(-log(u))`` with ``u`` uniform (the Gumbel trick), so nothing is
normalised, sorted or written back: ``uniform`` draws, ``better_max`` keeps the largest with its index, ``online_softmax``
gathers the normaliser beside it. Plain torch needs five passes over the vocabulary for the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import interpret, language


@interpret
@triton.jit
def _sample(logits, tokens, logprobs, seed, cols, row_stride, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    key = tl.load(seed)
    # One running state for each lane: the best score with its position, the plain logit there, and the normaliser.
    score = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lane
        x = tl.load(logits + row * row_stride + col, col < cols, other=-float("inf"))
        x = x.to(tl.float32) * inverse_temperature
        noise = -language.log(-language.log(language.uniform(key, row * cols + col)))
        score, at = language.better_max(score, at, x + noise, col)
        peak, total = language.online_softmax(peak, total, x, tl.where(col < cols, 1.0, 0.0))
    score, at = tl.reduce((score, at), 0, language.better_max)
    peak, total = tl.reduce((peak, total), 0, language.online_softmax)
    chosen = tl.load(logits + row * row_stride + at).to(tl.float32) * inverse_temperature
    tl.store(tokens + row, at.to(tl.int64))
    tl.store(logprobs + row, chosen - peak - language.log(total))


def sample(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A token for each row of ``logits`` (rows, vocabulary), and the logarithm of its probability, in float32.

    It draws one number from torch's ``generator``: the same state of that gives the same tokens.
    """
    rows, cols = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device, generator=generator)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _sample[(rows,)](logits, tokens, logprobs, seed, cols, logits.stride(0), 1 / temperature, BLOCK=1024)
    return tokens, logprobs
