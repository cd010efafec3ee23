"""GPU operators written in Triton, called explicitly.

Every public operator is imported here by name. Nothing in torch changes; CPU tensors run the operators' meaning in plain torch.
"""

from gemskit import errors as errors
from gemskit import language as language
from gemskit._interpret import interpret as interpret
from gemskit._launch import Call as Call
from gemskit._launch import record as record
from gemskit._op import REGISTRY as _REGISTRY
from gemskit._op import operators as operators
from gemskit._warmup import Warmup as Warmup
from gemskit._warmup import warmup as warmup
from gemskit.backends import device as device
from gemskit.backends import vendor as vendor
from gemskit.blas import addmm as addmm
from gemskit.blas import addmm_ as addmm_
from gemskit.blas import bmm as bmm
from gemskit.blas import linear as linear
from gemskit.blas import mm as mm
from gemskit.nn import LayerNorm as LayerNorm
from gemskit.nn import RMSNorm as RMSNorm
from gemskit.nn import RotaryEmbedding as RotaryEmbedding
from gemskit.nn import SiluAndMul as SiluAndMul
from gemskit.nn import add_rms_norm as add_rms_norm
from gemskit.nn import apply_rotary_pos_emb as apply_rotary_pos_emb
from gemskit.nn import apply_rotary_pos_emb_ as apply_rotary_pos_emb_
from gemskit.nn import cross_entropy as cross_entropy
from gemskit.nn import embedding as embedding
from gemskit.nn import fused_add_rms_norm as fused_add_rms_norm
from gemskit.nn import fused_add_rms_norm_ as fused_add_rms_norm_
from gemskit.nn import gelu_and_mul as gelu_and_mul
from gemskit.nn import layer_norm as layer_norm
from gemskit.nn import log_softmax as log_softmax
from gemskit.nn import rms_norm as rms_norm
from gemskit.nn import scaled_dot_product_attention as scaled_dot_product_attention
from gemskit.nn import silu_and_mul as silu_and_mul
from gemskit.nn import skip_layer_norm as skip_layer_norm
from gemskit.nn import softmax as softmax
from gemskit.pointwise import add as add
from gemskit.pointwise import add_ as add_
from gemskit.pointwise import clamp as clamp
from gemskit.pointwise import clamp_ as clamp_
from gemskit.pointwise import div as div
from gemskit.pointwise import div_ as div_
from gemskit.pointwise import dropout as dropout
from gemskit.pointwise import dropout_ as dropout_
from gemskit.pointwise import eq as eq
from gemskit.pointwise import eq_ as eq_
from gemskit.pointwise import exp as exp
from gemskit.pointwise import exp_ as exp_
from gemskit.pointwise import ge as ge
from gemskit.pointwise import ge_ as ge_
from gemskit.pointwise import gelu as gelu
from gemskit.pointwise import gt as gt
from gemskit.pointwise import gt_ as gt_
from gemskit.pointwise import le as le
from gemskit.pointwise import le_ as le_
from gemskit.pointwise import log as log
from gemskit.pointwise import log_ as log_
from gemskit.pointwise import lt as lt
from gemskit.pointwise import lt_ as lt_
from gemskit.pointwise import maximum as maximum
from gemskit.pointwise import minimum as minimum
from gemskit.pointwise import mul as mul
from gemskit.pointwise import mul_ as mul_
from gemskit.pointwise import ne as ne
from gemskit.pointwise import ne_ as ne_
from gemskit.pointwise import neg as neg
from gemskit.pointwise import neg_ as neg_
from gemskit.pointwise import pow as pow
from gemskit.pointwise import pow_ as pow_
from gemskit.pointwise import relu as relu
from gemskit.pointwise import relu_ as relu_
from gemskit.pointwise import rsqrt as rsqrt
from gemskit.pointwise import rsqrt_ as rsqrt_
from gemskit.pointwise import sigmoid as sigmoid
from gemskit.pointwise import sigmoid_ as sigmoid_
from gemskit.pointwise import silu as silu
from gemskit.pointwise import silu_ as silu_
from gemskit.pointwise import sqrt as sqrt
from gemskit.pointwise import sqrt_ as sqrt_
from gemskit.pointwise import sub as sub
from gemskit.pointwise import sub_ as sub_
from gemskit.pointwise import tanh as tanh
from gemskit.pointwise import tanh_ as tanh_
from gemskit.pointwise import where as where
from gemskit.reduce import amax as amax
from gemskit.reduce import amin as amin
from gemskit.reduce import argmax as argmax
from gemskit.reduce import argmin as argmin
from gemskit.reduce import cumsum as cumsum
from gemskit.reduce import cumsum_ as cumsum_
from gemskit.reduce import max as max
from gemskit.reduce import mean as mean
from gemskit.reduce import min as min
from gemskit.reduce import sum as sum
from gemskit.reduce import var as var

for _name in operators():
    _REGISTRY[_name].register()

__version__ = "0.1.0"
