"""Matrix products, dense to grouped to quantised."""

from gemskit.blas.batched import bmm as bmm
from gemskit.blas.matmul import addmm as addmm
from gemskit.blas.matmul import addmm_ as addmm_
from gemskit.blas.matmul import linear as linear
from gemskit.blas.matmul import mm as mm
