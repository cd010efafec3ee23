"""Facts about FlagGems 5.0.2: the names in ``flag_gems.ops`` and ``flag_gems.fused`` and their parameters.

A record is names, then the parameters that they share in parentheses; lines that begin with blanks go on with the record above.
"""

from __future__ import annotations

import functools
import inspect
import re

import torch

#: Names of ``flag_gems.fused``.
FUSED = frozenset(
    """
apply_repetition_penalties apply_rotary_pos_emb bincount bucket_sort_topk chunk_gated_delta_rule_fwd
concat_and_cache_mla cross_entropy_loss cutlass_scaled_mm dgeglu dispatch_fused_moe_kernel dreglu dswiglu flash_mla
flash_mla_sparse_fwd fused_add_rms_norm fused_experts_impl fused_recurrent_gated_delta_rule_fwd geglu gelu_and_mul
grouped_topk inplace_fused_experts instance_norm invoke_fused_moe_triton_kernel mhc_bwd mhc_bwd_ref mhc_post mhc_pre
moe_align_block_size moe_align_block_size_triton moe_sum outer outplace_fused_experts reglu reshape_and_cache
reshape_and_cache_flash rwkv_ka_fusion rwkv_mm_sparsity silu_and_mul silu_and_mul_out sinkhorn_forward skip_layer_norm
sparse_attn_triton swiglu topk_softmax weight_norm
""".split()
)

_RECORDS = """
abs abs_ atan atan_ bitwise_not bitwise_not_ ceil ceil_ cos cos_ cosh cosh_ exp exp2 exp2_ exp_ expm1 expm1_ isfinite
  isinf isnan isneginf log log10 log10_ logical_not neg neg_ reciprocal reciprocal_ relu_ resolve_conj resolve_neg
  rsqrt rsqrt_ sigmoid_ signbit silu_ sin sin_ sqrt sqrt_ square square_ tan tan_ tanh_ (A)
absolute conj_physical floor_ (input)
acos alias_copy erf erf_ hardsigmoid i0 log_sigmoid special_i0e zero_ (x)
act_quant_triton (x, block_size=128, scale_fmt=None)
add add_ sub sub_ (A, B, *, alpha=1)
addcdiv (inp, tensor1, tensor2, value=1.0, out=None)
addcmul (inp, tensor1, tensor2, *, value=1.0, out=None)
addmm (bias, mat1, mat2, *, beta=1, alpha=1)
addmm_out (bias, mat1, mat2, *, beta=1, alpha=1, out=None)
addmv (self, mat, vec, *, beta=1, alpha=1)
addmv_out (self, mat, vec, *, beta=1, alpha=1, out=None)
addr (input, vec1, vec2, *, beta=1, alpha=1)
alias_copy_out hardsigmoid_out i0_out special_i0e_out (x, out)
all_dim all_dims amax any_dim any_dims max_dim min_dim (inp, dim=None, keepdim=False)
allclose isclose (A, B, rtol=1e-05, atol=1e-08, equal_nan=False)
aminmax (inp, dim=None, keepdim=False, *, out=None)
angle arcsinh (input_tensor)
apply_repetition_penalties (logits, prompt_mask, output_mask, repetition_penalties)
apply_rotary_pos_emb (q, k, cos, sin, position_ids=None, rotary_interleaved=False, inplace=False)
arange (end, *, dtype=None, layout=None, device=None, pin_memory=None)
arange_start (start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None)
arcsinh_out (input_tensor, out)
argmax argmin mean_dim prod_dim sum_dim (inp, dim=None, keepdim=False, *, dtype=None)
_assert_async (tensor, msg='Assertion failed')
atan2 vdot (input, other)
atan2_out (input, other, out)
avg_pool2d (input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
  divisor_override=None)
avg_pool2d_backward (grad_output, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
baddbmm (bias, A, B, beta=1.0, alpha=1.0)
batch_norm (input, weight=None, bias=None, running_mean=None, running_var=None, training=False, momentum=0.1,
  eps=1e-05)
batch_norm_backward (grad_out, input, weight=None, running_mean=None, running_var=None, save_mean=None,
  save_invstd=None, train=False, eps=1e-05, output_mask=None)
bernoulli_ (self, p=0.5, *, generator=None)
bincount (input, weights=None, minlength=0)
bitwise_and_scalar bitwise_and_scalar_ bitwise_and_scalar_tensor bitwise_and_tensor bitwise_and_tensor_
  bitwise_or_scalar bitwise_or_scalar_ bitwise_or_scalar_tensor bitwise_or_tensor bitwise_or_tensor_ bmm eq eq_scalar
  floor_divide floor_divide_ ge ge_scalar greater greater_scalar gt gt_scalar kron le le_scalar logical_and
  logical_and_ logical_or logical_or_ logical_xor lt lt_scalar mul mul_ ne ne_scalar remainder remainder_ silu_and_mul
  true_divide true_divide_ (A, B)
bitwise_left_shift bitwise_right_shift (self, other, *, out=None)
bmm_out silu_and_mul_out true_divide_out (A, B, out)
bucket_sort_topk (inputs, starts, ends, topk)
cat (A, dim=0)
ceil_out isneginf_out signbit_out square_out (A, *, out=None)
celu celu_ (A, alpha=1.0)
chunk_gated_delta_rule_fwd (q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens=None)
clamp clamp_ clamp_tensor clamp_tensor_ clip clip_ (A, mini=None, maxi=None)
clamp_min clamp_min_ (A, mini)
concat_and_cache_mla (kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale)
constant_pad_nd (self, pad_list, value=0)
contiguous (inp, memory_format=torch.contiguous_format)
conv1d conv2d conv3d (input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1)
_conv_depthwise2d (input, weight, kernel_size, bias, stride, padding, dilation)
copy (template, src, *, non_blocking=False)
copy_ (dst, src, non_blocking=False)
copysign copysign_out (input, other, *, out=None)
cosh_out exp_out expm1_out log10_out (A, out)
count_nonzero (x, dim=None)
cross_entropy_loss (inp, target, weight=None, reduction='mean', ignore_index=-100, label_smoothing=0.0)
cummax cummin (input, dim, *, out=None)
cumsum (inp, dim=1, *, dtype=None)
cumsum_out (inp, dim=1, *, dtype=None, out)
cutlass_scaled_mm (c, a, b, a_scale, b_scale, bias=None)
dgeglu dreglu dswiglu (grad_output, input_tensor, quantizer=None)
diag (x, diagonal=0)
diag_embed (x, offset=0, dim1=-2, dim2=-1)
diagonal_backward (grad_output, input_sizes, offset, dim1, dim2)
dispatch_fused_moe_kernel (A, B, C, A_scale, B_scale, B_zp, topk_weights, sorted_token_ids, expert_ids,
  num_tokens_post_padded, mul_routed_weight, top_k, config, compute_type, use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16,
  use_int4_w4a16, per_channel_quant, block_shape=None, B_bias=None)
div_mode div_mode_ (A, B, rounding_mode=None)
dot equal (x, y)
dropout (input, p, train=True)
dropout_backward (grad_output, mask, scale)
elu elu_ (A, alpha=1.0, scale=1.0, input_scale=1.0)
elu_backward (grad_output, alpha, scale, input_scale, is_result, self_or_result)
embedding (weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False)
embedding_backward (grad_outputs, indices, num_weights, padding_idx=-1, scale_grad_by_freq=False, sparse=False)
embedding_dense_backward (grad_output, indices, num_weights, padding_idx, scale_grad_by_freq)
exponential_ (x, lambd=1.0, *, generator=None)
eye (size, *, dtype=None, layout=torch.strided, device=None, pin_memory=None)
eye_m (n, m, *, dtype=None, layout=torch.strided, device=None, pin_memory=None)
fill_scalar fill_tensor (input, value)
fill_scalar_ fill_tensor_ (self, value)
fill_scalar_out fill_tensor_out (input, value, *, out=None)
flash_attention_forward (query, key, value, cumulative_sequence_length_q, cumulative_sequence_length_k, max_q, max_k,
  dropout_p, is_causal, return_debug_mask, *, scale=None, softcap=0.0, window_size_left=None, window_size_right=None,
  seqused_k=None, alibi_slopes=None, disable_splitkv=False)
flash_attn_varlen_func (q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
  q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None,
  deterministic=False, return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None,
  scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, s_aux=None, num_splits=0, cp_world_size=1,
  cp_rank=0, cp_tot_seqused_k=None, fa_version=2)
flash_attn_varlen_opt_func (q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
  q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None,
  deterministic=False, return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, lse=None,
  scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, s_aux=None, num_splits=0, cp_world_size=1,
  cp_rank=0, cp_tot_seqused_k=None, fa_version=2)
flash_mla (q, block_table, blocked_k, max_seqlen_pad, block_size, b, s_q, cache_seqlens, h_q, h_kv, d, dv, causal)
flash_mla_sparse_fwd (q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None)
flip (A, dims)
fmin hypot mm (a, b)
fmin_out hypot_out (a, b, out)
fp8_matmul (a, a_s, b, b_s, scale_dtype=torch.float32)
full (size, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None)
full_like (x, fill_value, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None)
_functional_sym_constrain_range_for_size _upsample_nearest_exact1d arcsinh_ arctanh_ asinh_ digamma_ hardswish_ i0_
  lift_fresh_copy log1p_ logit_ margin_ranking_loss prelu relu6 selu selu_ sgn_ sinh_ zero zero_out (*args, **kwargs)
fused_add_rms_norm (x, residual, normalized_shape, weight, eps=1e-05)
fused_experts_impl (hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation='silu',
  apply_router_weight_on_input=False, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
  use_int4_w4a16=False, ocp_mx_scheme=None, per_channel_quant=False, global_num_experts=-1, expert_map=None,
  w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None, w1_bias=None,
  w2_bias=None)
fused_recurrent_gated_delta_rule_fwd (q, k, v, g, beta, scale, initial_state, inplace_final_state=True,
  cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False)
gather (inp, dim, index, out=None, sparse_grad=False)
gather_backward (grad, self, dim, index, sparse_grad)
geglu reglu swiglu (input_tensor, quantizer=None)
gelu (self, *, approximate='none')
gelu_ (A, *, approximate='none')
gelu_and_mul (x, y, approximate='none')
gelu_backward (grad_output, self, *, approximate='none')
get_paged_mqa_logits_metadata (context_lens, block_size, num_sms)
get_scheduler_metadata (batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype,
  seqused_k, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None,
  page_size=None, max_seqlen_k_new=0, is_causal=False, window_size_left=-1, window_size_right=-1, has_softcap=False,
  num_splits=0, pack_gqa=None, sm_margin=0)
glu (self, dim=-1)
glu_backward (grad_output, self, dim=-1)
greater_out greater_scalar_out (A, B, *, out=None)
group_mm (A, B, offs)
group_norm (input, weight, bias, N, C, HxW, group, eps=1e-05)
group_norm_backward (grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask)
grouped_topk (scores, n_group, topk_group, topk, renormalize, routed_scaling_factor, bias, scoring_func=0)
hadamard_transform (x, scale=1.0)
hstack vstack (tensors)
index (inp, indices)
index_add index_add_ (inp, dim, index, src, alpha=1)
index_put index_put_ (inp, indices, values, accumulate=False)
_index_put_impl_ (inp, indices, values, accumulate=False, unsafe=False)
index_select (inp, dim, index)
inplace_fused_experts outplace_fused_experts (hidden_states, w1, w2, topk_weights, topk_ids, activation='silu',
  apply_router_weight_on_input=False, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
  use_int4_w4a16=False, per_channel_quant=False, global_num_experts=-1, w1_scale=None, w2_scale=None, a1_scale=None,
  a2_scale=None, block_shape=None, w1_bias=None, w2_bias=None)
instance_norm (input, weight=None, bias=None, running_mean=None, running_var=None, use_input_stats=True, momentum=0.1,
  eps=1e-05, cudnn_enable=False)
invoke_fused_moe_triton_kernel (A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids,
  num_tokens_post_padded, mul_routed_weight, top_k, config, compute_type, use_fp8_w8a8=False, use_int8_w8a8=False,
  use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, block_shape=None, B_bias=None)
_is_all_true all any max min (inp)
isin (in0, in1, *, assume_unique=False, invert=False)
layer_norm (input, normalized_shape, weight=None, bias=None, eps=1e-05)
layer_norm_backward (grad_out, input, normalized_shape, mean, rstd, weight=None, bias=None, output_mask=None)
lerp_scalar lerp_scalar_ lerp_tensor lerp_tensor_ (input, end, weight)
lift_fresh_copy_out (x, out=None)
linspace (start, end, steps, *, dtype=None, layout=None, device=None, pin_memory=None)
log_softmax softmax (self, dim, half_to_float=False)
log_softmax_backward softmax_backward (grad_output, output, dim, input_dtype)
logaddexp (self, other)
logaddexp_out (self, other, out)
logit (input, eps=None)
logit_out (input, eps=None, out=None)
logspace (start, end, steps, base=10.0, *, dtype=None, layout=None, device=None, pin_memory=None)
masked_fill masked_fill_ (inp, mask, value)
masked_scatter masked_scatter_ (inp, mask, source)
masked_select (inp, mask)
max_pool2d_backward (grad_output, input, indices, kernel_size, stride, padding, dilation, ceil_mode)
max_pool2d_with_indices (input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False)
maximum minimum (X, Y)
mean prod sum (inp, *, dtype=None)
mhc_bwd mhc_bwd_ref (out, dout, cg_iters=None)
mhc_post (x, residual, post_layer_mix, comb_res_mix)
mhc_pre (residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
  n_splits=1)
mm_out (a, b, *, out)
moe_align_block_size (topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False)
moe_align_block_size_triton (topk_ids, num_experts, block_size, sorted_token_ids, expert_ids, num_tokens_post_pad)
moe_sum (input, output)
mse_loss (inp, target, reduction=1)
multinomial (prob, n_samples, with_replacement=False, *, gen=None)
mv (inp, vec)
nan_to_num (A, nan=None, posinf=None, neginf=None)
new_full (self, size, fill_value, *, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
nll_loss2d_backward nll_loss_backward (grad_output, self, target, weight=None, reduction=1, ignore_index=-100,
  total_weight=None)
nll_loss2d_forward nll_loss_forward (self, target, weight=None, reduction=1, ignore_index=-100)
nll_loss_nd_backward (grad_output, input, target, weight=None, reduction=1, ignore_index=-100, total_weight=None)
nll_loss_nd_forward (input, target, weight=None, reduction=1, ignore_index=-100)
nonzero (inp, *, as_tuple=False)
normal_ (self, mean=0, std=1, *, generator=None)
normal_float_tensor normal_tensor_float normal_tensor_tensor (mean, std, *, generator=None)
normed_cumsum (inp, dim=-1)
one_hot (tensor, num_classes=-1)
ones rand randn zeros (size, *, dtype=None, layout=None, device=None, pin_memory=None)
ones_like rand_like randn_like zeros_like (x, *, dtype=None, layout=None, device=None, pin_memory=None,
  memory_format=None)
outer (inp, weight)
pad (self, pad, mode='constant', value=None)
per_token_group_quant_fp8 (x, group_size, eps=1e-10, dtype=None, column_major_scales=False, scale_ue8m0=False)
pixel_unshuffle (input, downscale_factor, *, layout=None)
pixel_unshuffle_out (input, downscale_factor, out)
polar (abs, angle)
pow_scalar pow_tensor_scalar pow_tensor_scalar_ pow_tensor_tensor pow_tensor_tensor_ (A, exponent)
quantile (inp, q, dim=None, keepdim=False, interpolation='linear', out=None)
randperm (n, *, generator=None, out=None, dtype=torch.int64, layout=torch.strided, device=None, requires_grad=False,
  pin_memory=False)
reflection_pad1d reflection_pad2d replication_pad1d (input, padding)
reflection_pad1d_out reflection_pad2d_out replication_pad1d_out (input, padding, out)
relu sigmoid silu special_i1 tanh trace (self)
repeat (inp, sizes)
repeat_interleave_self_int repeat_interleave_self_tensor (inp, repeats, dim=None, *, output_size=None)
repeat_interleave_tensor (repeats, *, output_size=None)
replication_pad3d (x, padding)
reshape_and_cache reshape_and_cache_flash (key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale,
  v_scale)
rms_norm rms_norm_forward (x, normalized_shape, weight, eps=1e-05)
rms_norm_backward (dy, x, inv_rms, normalized_shape, weight, eps=1e-05)
roll (inp, shifts, dims=None)
round (input, decimals=0)
round_ (input, *, decimals=0)
round_out (input, *, decimals=0, out=None)
rrelu_with_noise_backward (grad_output, input, noise, lower, upper, training, self_is_result=False)
rwkv_ka_fusion (k, kk, a, ka, H, N)
rwkv_mm_sparsity (k, v)
_safe_softmax (x, dim=-1, dtype=None)
scaled_dot_product_attention scaled_dot_product_attention_forward (query, key, value, attn_mask=None, dropout_p=0.0,
  is_causal=False, scale=None, enable_gqa=False)
scaled_dot_product_attention_backward (do, query, key, value, o, M, attn_mask=None, dropout_p=0.0, is_causal=False,
  scale=None, enable_gqa=False)
scaled_softmax_backward (grad_output, softmax_results, scale_factor)
scaled_softmax_forward (input_t, scale_factor)
scatter scatter_ (inp, dim, index, src, reduce=None)
scatter_add_ (x, dim, index, src)
select_backward (grad, input_sizes, dim, index, out=None)
select_scatter (inp, src, dim, index)
sigmoid_backward tanh_backward (grad_output, output)
silu_backward (grad_output, self)
sinkhorn_forward (M, iters=20)
skip_layer_norm (x, residual, normalized_shape, weight, bias, eps=1e-05)
slice_backward (grad_output, input_sizes, dim, start, end, step)
slice_scatter (inp, src, dim=0, start=None, end=None, step=1)
soft_margin_loss (input, target, reduction='mean')
soft_margin_loss_out (input, target, reduction='mean', out=None)
softplus (self, beta=1.0, threshold=20.0)
softshrink (input, lambd=0.5)
softshrink_out (input, lambd=0.5, out=None)
sort (inp, dim=-1, descending=False)
sort_stable (inp, *, stable, dim=-1, descending=False)
sparse_attn_triton (q, kv, attn_sink, topk_idxs, softmax_scale)
special_i1_out (self, out)
stack (tensors, dim=0)
std var var_correction var_dim var_mean (x, dim=None, *, correction=None, keepdim=False)
sum_dim_out (inp, dim=None, keepdim=False, *, dtype=None, out)
sum_out (inp, *, dtype=None, out)
t_copy (input, memory_format=None)
t_copy_out (input, out, memory_format=None)
threshold (self, threshold, value)
threshold_backward (grad_output, self, threshold)
tile (inp, dims)
to_copy (x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None)
topk (x, k, dim=-1, largest=True, sorted=True)
topk_softmax (topk_weights, topk_indices, token_expert_indices, gating_output, renormalize=False)
tril (input, diagonal=0)
tril_out (input, diagonal=0, out=None)
triu triu_ (A, diagonal=0)
unfold_backward (grad_in, input_sizes, dim, size, step)
uniform_ (self, from_=0.0, to=1.0, *, generator=None)
_unique2 (in0, sorted=True, return_inverse=False, return_counts=False)
unique_consecutive (input, return_inverse=False, return_counts=False, dim=None)
upsample_bicubic2d (input, output_size=None, align_corners=False, scales_h=None, scales_w=None)
_upsample_bicubic2d_aa (input, output_size, align_corners=False, scales_h=None, scales_w=None)
_upsample_bicubic2d_aa_backward (grad_output, output_size, input_size, align_corners, scales_h=None, scales_w=None)
upsample_linear1d (self, output_size, align_corners, scales=None)
upsample_nearest1d (input, output_size=None, scales=None)
upsample_nearest2d (input, output_size, scales_h=None, scales_w=None)
upsample_nearest3d (input, output_size, scales_d=None, scales_h=None, scales_w=None)
vector_norm (x, ord=2, dim=None, keepdim=False, dtype=None)
w8a8_block_fp8_matmul (A, B, As, Bs, block_size, output_dtype=torch.bfloat16)
weight_norm weight_norm_interface (v, g, dim=0)
weight_norm_interface_backward (w_grad, saved_v, saved_g, saved_norms, dim)
where_scalar_other where_scalar_self where_self (condition, self, other)
where_self_out (condition, self, other, out=None)
"""


@functools.cache
def parameters() -> dict[str, str]:
    """The parameters of every name, as they stand in a ``def``."""
    records = re.findall(r"^(\S[^(]*) \((.*)\)$", re.sub(r"\n\s+", " ", _RECORDS.strip()), re.MULTILINE)
    return {name: given for names, given in records for name in names.split()}


@functools.cache
def signature(name: str) -> inspect.Signature | None:
    """The signature of ``flag_gems.<name>``; None if 5.0.2 has no such function."""
    given = parameters().get(name)
    return None if given is None else inspect.signature(eval(f"lambda {given}: None", {"torch": torch}))
