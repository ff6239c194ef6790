"""The kernels of a training step are sorted into classes by their names, and what waits is what no kernel covers."""

from __future__ import annotations

import pytest
import torch

from lkda.bench.step_profile import Event, breakdown, busy, events_of, kernel_class, profiler

NAMES = {
    "operator": [
        "kda_intra_chunk_fwd",
        "kda_inter_chunk_bwd",
        "kda_gate_backward",
        "simplified_forward",
        "simplified_mark",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bfloat16_t>>",
        "pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x128x64_1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>",
        "chunk_kda_fwd_kernel_intra_sub_inter",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "recompute_w_u_fwd_kda_kernel",
        "merge_16x16_to_64x64_inverse_kernel",
        "kda_gate_fwd_kernel",
        "chunk_local_cumsum_vector_kernel",
        "l2norm_fwd_kernel",
    ],
    "convolution": [
        "short_conv_forward",
        "short_conv_backward",
        "causal_conv1d_fwd_kernel",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<4>",
        "aten::mkldnn_convolution",
    ],
    "norms": [
        "gated_norm_forward",
        "gated_norm_backward",
        "residual_norm_forward",
        "residual_norm_backward",
        "column_sums",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>",
        "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_3",
        "triton_per_fused__fused_rms_norm__fused_rms_norm_backward_add_7",
        "triton_red_fused_add_div_mul_pow_sum_12",
        "layer_norm_gated_bwd_kernel",
        "aten::_fused_rms_norm",
    ],
    "loss": [
        "cross_entropy_rows",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "void at::native::cunn_SoftMaxForward<8, float, float, float, LogSoftMaxForwardEpilogue>",
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_1",
        "cross_entropy_fwd_kernel",
        "aten::_log_softmax_backward_data",
    ],
    "optimizer": [
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<3>, FusedAdamMathFunctor>",
        "multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, NormType::L2, float>, float*, int>",
        "aten::_fused_adamw_",
        "aten::_foreach_norm",
    ],
    "matrix products": [
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopB_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_mm_4",
        "aten::mm",
        "aten::addmm",
    ],
    "element-wise": [
        "triton_poi_fused__to_copy_mul_silu_2",
        "triton_poi_fused__to_copy_mm_9",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
        "embedding_backward_feature_kernel",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized",
        "chunk_cat_cuda_kernel",
        "swiglu_fwdbwd_kernel",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "aten::copy_",
    ],
}


@pytest.mark.parametrize(("expected", "name"), [(found, name) for found, names in NAMES.items() for name in names])
def test_a_kernel_has_the_class_of_what_it_computes(expected: str, name: str) -> None:
    assert kernel_class(name) == expected


def test_time_in_which_kernels_overlap_counts_once() -> None:
    spans = [(0, 10), (5, 12), (6, 7), (20, 25), (25, 30)]
    assert busy([Event("x", start, end, end - start) for start, end in spans]) == 22


def test_a_step_is_divided_into_classes_and_idle_time() -> None:
    once = [("nvjet_a", 0, 2000), ("kda_segments", 2000, 3000), ("nvjet_a", 3500, 4000)]
    events = [Event(name, start + at, end + at, end - start) for at in (0, 10_000) for name, start, end in once]
    found = breakdown(events, steps=2, step_ms=5.0)
    assert found["ms"]["matrix products"] == 2.5
    assert found["ms"]["operator"] == 1.0
    assert sum(found["ms"].values()) == found["busy_ms"] == 3.5
    assert found["idle_share"] == pytest.approx(0.3)
    assert found["launches"] == 3
    assert found["kernels"][0] == {"name": "nvjet_a", "class": "matrix products", "ms": 2.5, "calls": 2}


def test_a_profile_without_kernels_says_so() -> None:
    with pytest.raises(RuntimeError, match="no kernels"):
        breakdown([], steps=1, step_ms=1.0)


def test_operators_of_a_cpu_are_seen() -> None:
    device = torch.device("cpu")
    x = torch.randn(200, 200)
    with profiler(device) as running:
        (x @ x).exp_()
    events = events_of(running, device)
    assert {"aten::mm", "aten::exp_"} <= {event.name for event in events}
    found = breakdown(events, steps=1, step_ms=busy(events) / 1000)
    assert found["ms"]["matrix products"] > 0
    assert sum(found["ms"].values()) == pytest.approx(found["busy_ms"], rel=0.05)
