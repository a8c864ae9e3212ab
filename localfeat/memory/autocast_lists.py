"""The autocast rule of each operation, by target: data from PyTorch's ``aten/src/ATen/autocast_mode.{h,cpp}`` (2.15).

Only operations that Python code can call are listed (no ``cudnn_convolution``), overloads under one name.

- ``LOWER``: floating-point arguments are cast to the autocast dtype.
- ``FP32``: they are cast to float32.
- ``FP32_OUTPUT``: the operation is asked for a float32 result (``dtype=``), unless the call names a dtype itself.
- ``PROMOTE``: they are cast to the widest of their dtypes and the autocast dtype.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOSSES = """cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss poisson_nll_loss smooth_l1_loss l1_loss
    huber_loss margin_ranking_loss soft_margin_loss triplet_margin_loss multi_margin_loss kl_div mse_loss
    multilabel_margin_loss binary_cross_entropy_with_logits cross_entropy_loss nll_loss_nd"""
"""``cross_entropy_loss`` and ``nll_loss_nd`` are made of listed operations where they are not listed themselves."""

_MATRIX = """conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d _convolution prelu addmm
    matmul mm linalg_vecdot linear addbmm baddbmm bmm scaled_dot_product_attention"""

LOWER = {
    "cuda": _names(
        _MATRIX + " convolution addmv addr einsum mv chain_matmul linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell"
        " rnn_relu_cell _thnn_fused_lstm_cell _thnn_fused_gru_cell _scaled_dot_product_flash_attention"
    ),
    "cpu": _names(_MATRIX + " mkldnn_rnn_layer _native_multi_head_attention _addmm_activation"),
}

FP32 = {
    "cuda": _names(
        _LOSSES
        + """ acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
        native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity dist pdist cdist renorm
        logsumexp upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
        _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa"""
    ),
    "cpu": _names(
        _LOSSES
        + """ avg_pool3d binary_cross_entropy grid_sampler polar prod quantile nanquantile stft cdist grid_sampler_2d
        grid_sampler_3d trace view_as_complex cholesky_inverse cholesky_solve inverse lu_solve orgqr ormqr pinverse
        max_pool3d max_unpool2d max_unpool3d adaptive_avg_pool3d reflection_pad1d reflection_pad2d replication_pad1d
        replication_pad2d replication_pad3d ctc_loss fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft
        fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft linalg_cond linalg_matrix_rank
        linalg_solve linalg_cholesky linalg_svdvals linalg_eigvals linalg_eigvalsh linalg_inv
        linalg_householder_product linalg_tensorinv linalg_tensorsolve fake_quantize_per_tensor_affine geqrf
        _lu_with_info svd triangular_solve fractional_max_pool2d fractional_max_pool3d adaptive_max_pool3d
        multilabel_margin_loss_forward linalg_qr linalg_cholesky_ex linalg_svd linalg_eig linalg_eigh linalg_lstsq
        linalg_inv_ex"""
    ),
}

FP32_OUTPUT = {
    "cuda": _names("prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum norm"),
    "cpu": _names(""),
}

PROMOTE = {
    "cuda": _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"),
    "cpu": _names("stack cat index_copy"),
}

SPELLINGS = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__pow__": "pow", "__rpow__": "pow", "concat": "cat"}
"""Python's other names for listed operations."""


def policies(target: str) -> dict[str, str]:
    """``{operation: "lower", "fp32", "fp32_output" or "promote"}`` of autocast on ``cuda`` or ``cpu``."""
    lists = {"lower": LOWER, "fp32": FP32, "fp32_output": FP32_OUTPUT, "promote": PROMOTE}
    found = {name: policy for policy, by_target in lists.items() for name in by_target[target]}
    return found | {other: found[name] for other, name in SPELLINGS.items() if name in found}
