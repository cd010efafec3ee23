"""Matrix products, dense to grouped to quantised."""

from .batched import bmm as bmm
from .matmul import addmm as addmm
from .matmul import addmm_ as addmm_
from .matmul import linear as linear
from .matmul import mm as mm
