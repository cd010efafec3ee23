"""Matrix products, dense to grouped to quantised."""

from gemskit.blas.batched import baddbmm as baddbmm
from gemskit.blas.batched import baddbmm_ as baddbmm_
from gemskit.blas.batched import bmm as bmm
from gemskit.blas.contractions import addbmm as addbmm
from gemskit.blas.contractions import addbmm_ as addbmm_
from gemskit.blas.contractions import chain_matmul as chain_matmul
from gemskit.blas.contractions import einsum as einsum
from gemskit.blas.contractions import inner as inner
from gemskit.blas.contractions import linalg_multi_dot as linalg_multi_dot
from gemskit.blas.contractions import tensordot as tensordot
from gemskit.blas.matmul import addmm as addmm
from gemskit.blas.matmul import addmm_ as addmm_
from gemskit.blas.matmul import linear as linear
from gemskit.blas.matmul import matmul as matmul
from gemskit.blas.matmul import mm as mm
from gemskit.blas.vectors import addmv as addmv
from gemskit.blas.vectors import addmv_ as addmv_
from gemskit.blas.vectors import addr as addr
from gemskit.blas.vectors import addr_ as addr_
from gemskit.blas.vectors import dot as dot
from gemskit.blas.vectors import ger as ger
from gemskit.blas.vectors import kron as kron
from gemskit.blas.vectors import linalg_vecdot as linalg_vecdot
from gemskit.blas.vectors import mv as mv
from gemskit.blas.vectors import outer as outer
from gemskit.blas.vectors import vdot as vdot
