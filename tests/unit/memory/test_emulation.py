"""The emulation against the devices it stands for: a real CPU, and torch's own CUDA autocast on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from localfeat.backbones.decompose import decompose
from localfeat.efficiency.autocast import AutocastState
from localfeat.memory.autocast_lists import SPELLINGS, policies
from localfeat.memory.emulation import Emulation
from localfeat.memory.tracker import StorageTracker
from tests.helpers.small import CLASSES, FAMILIES, IMAGE_SIZE, backbone

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def exact_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)


# --- whole networks against a real CPU ----------------------------------------------------------------------------


def forward_and_backward(family: str, device: str, context: AbstractContextManager[Any], recompute: bool) -> list[int]:
    """Live bytes after the forward pass, peak, and live bytes at the end."""
    network = backbone(family, drop_path_rate=0.1)
    network.train().to(device)
    pieces = decompose(network, IMAGE_SIZE)
    x = torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    with StorageTracker([*network.parameters(), *network.buffers(), x, labels]) as tracker, context:
        features = pieces.stem(x)
        for block in pieces.blocks:
            features = checkpoint(block, features, use_reentrant=False) if recompute else block(features)
        logits = pieces.tail(features)
        del features
        with torch.autocast(device, enabled=False):
            loss = F.cross_entropy(logits.float(), labels)
            after_forward = tracker.live_bytes
            loss.backward()
    return [after_forward, tracker.peak_bytes, tracker.live_bytes]


@pytest.mark.parametrize(
    ("precision", "recompute"),
    [("bf16-mixed", False), ("32-true", True), pytest.param("bf16-mixed", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_a_real_cpu(family: str, precision: Any, recompute: bool) -> None:
    autocast = torch.autocast("cpu", BF16, precision == "bf16-mixed", cache_enabled=False)
    expected = forward_and_backward(family, "cpu", autocast, recompute)
    assert forward_and_backward(family, "meta", Emulation("cpu", precision), recompute) == expected


def test_autocast_matters_to_the_bytes() -> None:
    """Otherwise the comparison above would prove nothing about it."""
    single = forward_and_backward("swin", "meta", Emulation("cpu", "32-true"), False)
    mixed = forward_and_backward("swin", "meta", Emulation("cpu", "bf16-mixed"), False)
    assert mixed[1] < 0.9 * single[1]


# --- CUDA's autocast, which runs on fake tensors without a GPU (forward only) -------------------------------------


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda")`` refuses to switch itself on without a GPU; the switch itself does not."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)


def on_fake_cuda(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return network


def forward(network: nn.Module, images: Tensor) -> list[int]:
    with StorageTracker() as tracker:
        output = network(images)
        found = [tracker.live_bytes, tracker.peak_bytes]
        del output
    return found


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, (BF16, FP16)[number % 2]) for number, family in enumerate(FAMILIES)]
)
def test_bytes_of_a_forward_pass_are_those_of_cuda_autocast(family: str, dtype: torch.dtype) -> None:
    network = backbone(family).train()
    for module in network.modules():
        if hasattr(module, "fused_attn"):  # without a GPU torch chooses no fused attention on fake tensors
            module.fused_attn = False
    with Emulation("cuda", "bf16-mixed" if dtype == BF16 else "16-mixed"):
        found = forward(network.to("meta"), torch.empty(4, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(dtype):
        expected = forward(on_fake_cuda(network), torch.empty(4, 3, IMAGE_SIZE, IMAGE_SIZE, device="cuda"))
    assert found == expected


# Results by dtype of the argument ``h`` (bfloat16), as AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
# AT_FORALL_FP32_SET_OPT_DTYPE and AT_FORALL_PROMOTE of aten/src/ATen/autocast_mode.h say for CUDA.
Case = Callable[[Tensor, Tensor], Tensor]
ON_CUDA: dict[str, tuple[torch.dtype, Case]] = {
    "linear": (BF16, lambda x, h: F.linear(x, x)),
    "linear with a bias": (BF16, lambda x, h: F.linear(x, x, x[0])),
    "matmul": (BF16, lambda x, h: torch.matmul(x, h)),
    "operator @": (BF16, lambda x, h: x @ x),
    "mm": (BF16, lambda x, h: x.mm(x)),
    "addmm": (BF16, lambda x, h: torch.addmm(x, x, h)),
    "bmm": (BF16, lambda x, h: torch.bmm(x[None], x[None])),
    "einsum": (BF16, lambda x, h: torch.einsum("ij,jk->ik", x, x)),
    "conv2d": (BF16, lambda x, h: F.conv2d(x[None, None], x[None, None])),
    "conv_transpose2d": (BF16, lambda x, h: F.conv_transpose2d(x[None, None], x[None, None])),
    "prelu": (BF16, lambda x, h: F.prelu(x, x[0, :1])),
    "attention": (BF16, lambda x, h: F.scaled_dot_product_attention(*[x[None, None]] * 3)),
    "layer_norm": (FP32, lambda x, h: F.layer_norm(h, (8,))),
    "group_norm": (FP32, lambda x, h: F.group_norm(h[None], 2)),
    "softplus": (FP32, lambda x, h: F.softplus(h)),
    "exp": (FP32, lambda x, h: h.exp()),
    "log": (FP32, lambda x, h: torch.log(h)),
    "rsqrt": (FP32, lambda x, h: h.rsqrt()),
    "pow": (FP32, lambda x, h: h**2),
    "logsumexp": (FP32, lambda x, h: h.logsumexp(-1)),
    "mse_loss": (FP32, lambda x, h: F.mse_loss(h, h)),
    "smooth_l1_loss": (FP32, lambda x, h: F.smooth_l1_loss(h, h)),
    "bce with logits": (FP32, lambda x, h: F.binary_cross_entropy_with_logits(h, h)),
    "cosine_similarity": (FP32, lambda x, h: F.cosine_similarity(h, h)),
    "cross_entropy": (FP32, lambda x, h: F.cross_entropy(h, x.long()[0])),
    "interpolate": (FP32, lambda x, h: F.interpolate(h[None, None], scale_factor=2.0, mode="bilinear")),
    "softmax": (FP32, lambda x, h: F.softmax(h, -1)),
    "Tensor.softmax": (FP32, lambda x, h: h.softmax(-1)),
    "log_softmax": (FP32, lambda x, h: F.log_softmax(h, -1)),
    "sum": (FP32, lambda x, h: h.sum()),
    "sum of a dtype": (BF16, lambda x, h: h.sum(dtype=BF16)),
    "cumsum": (FP32, lambda x, h: h.cumsum(0)),
    "prod": (FP32, lambda x, h: h.prod(1)),
    "norm": (FP32, lambda x, h: h.norm(dim=1)),
    "normalize": (FP32, lambda x, h: F.normalize(h)),
    "vector_norm": (FP32, lambda x, h: torch.linalg.vector_norm(h)),
    "addcmul": (FP32, lambda x, h: torch.addcmul(h, h, x)),
    "dot": (BF16, lambda x, h: torch.dot(h[0], h[0])),
    "grid_sample": (
        FP32,
        lambda x, h: F.grid_sample(h[None, None], x[None, :, :2, None].expand(1, 8, 2, 2), align_corners=False),
    ),
    "gelu": (BF16, lambda x, h: F.gelu(h)),
    "mean": (BF16, lambda x, h: h.mean()),
    "add": (FP32, lambda x, h: h + x),
    "cat": (FP32, lambda x, h: torch.cat([h, x])),
    "relu": (FP32, lambda x, h: x.relu()),
    "in place": (BF16, lambda x, h: h.exp_()),
}
WITHOUT_FAKE = {"attention"}  # the fake device would ask a GPU for its kernel


@pytest.mark.parametrize("case", ON_CUDA)
def test_cuda_autocast_by_operation(case: str) -> None:
    expected, operation = ON_CUDA[case]
    with Emulation("cuda", "bf16-mixed"):
        x = torch.empty(8, 8, device="meta")
        assert operation(x, x.to(BF16)).dtype == expected
        with torch.autocast("meta", enabled=False):
            assert (x @ x).dtype == FP32
    if case not in WITHOUT_FAKE:
        with FakeTensorMode(), cuda_autocast(BF16):
            x = torch.empty(8, 8, device="cuda")
            assert operation(x, x.to(BF16)).dtype == expected


def registered(key: str) -> set[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::").split(".")[0] for name in names if name.startswith("aten::")}


@pytest.mark.parametrize(("target", "key"), [("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")])
def test_the_lists_hold_what_torch_registers(target: str, key: str) -> None:
    """Names without a Python function, and those of other versions than 2.15, may be missing on either side."""
    inner = {"_cudnn_rnn", "cudnn_convolution", "cudnn_convolution_transpose", "_grid_sampler_2d_cpu_fallback"}
    composed = {"cross_entropy_loss", "nll_loss_nd", "norm", "_convolution"}
    listed = policies(target).keys() - SPELLINGS.keys()
    if not torch.__version__.startswith("2.15"):
        assert len(listed & registered(key)) > 0.9 * len(listed)
        return
    assert registered(key) - inner - listed <= ({"linalg_matrix_sqrth", "binary_cross_entropy"})
    assert listed - registered(key) <= composed


# --- attention ----------------------------------------------------------------------------------------------------


def attention_kernel(target: Any, dtype: torch.dtype, mask: Tensor | None = None, head: int = 32, **more: Any) -> str:
    """Which aten operation computes attention."""

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(2, 3, 50, head, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    with Emulation(target, "32-true"), Names():
        out = F.scaled_dot_product_attention(q, k, v, mask, **more)
        out.sum().backward()
    assert out.shape == q.shape
    fused = [name for name in seen if name.startswith("_scaled_dot_product")]
    return fused[0].removeprefix("_scaled_dot_product_") if fused else "math"


def mask(*shape: int, grad: bool = False) -> Tensor:
    return torch.zeros(shape, device="meta", requires_grad=grad)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cuda", BF16), "flash_attention"),
        (("cuda", FP16), "flash_attention"),
        (("cuda", FP32), "efficient_attention"),
        (("cuda", BF16, mask(50, 50).to(BF16)), "efficient_attention"),
        (("cuda", FP32, mask(2, 1, 50, 50, grad=True)), "efficient_attention"),
        (("cuda", BF16, None, 30), "flash_attention"),  # padded
        (("cuda", FP32, None, 30), "math"),
        (("cuda", FP32, None, 512), "efficient_attention"),
        (("cpu", FP32), "flash_attention_for_cpu"),
        (("cpu", BF16), "flash_attention_for_cpu"),
        (("cpu", FP32, mask(2, 1, 50, 50)), "flash_attention_for_cpu"),
        (("cpu", FP32, mask(50, 50, grad=True)), "math"),
        (("cpu", FP32, mask(3, 50, 50)), "math"),
    ],
    ids=str,
)
def test_attention_takes_the_kernel_that_the_target_would_choose(arguments: Any, expected: str) -> None:
    assert attention_kernel(*arguments) == expected


def test_dropout_in_attention_is_math_on_a_cpu_only() -> None:
    assert attention_kernel("cpu", FP32, dropout_p=0.1) == "math"
    assert attention_kernel("cuda", FP32, dropout_p=0.1) == "efficient_attention"


def test_a_mask_for_cuda_is_padded_to_a_multiple_of_8() -> None:
    q = torch.empty(2, 3, 50, 32, device="meta")
    with Emulation("cuda", "32-true"), StorageTracker() as tracker:
        out = F.scaled_dot_product_attention(q, q, q, mask(50, 50))
        output, log_sums, padded = 4 * 2 * 3 * 50 * 32, 0, 4 * 50 * 56
        assert tracker.peak_bytes - 2 * 8 == 4 * 50 * 50 + padded + output + log_sums  # two seeds of 8 bytes
        del out


# --- the rest -----------------------------------------------------------------------------------------------------


def test_torch_is_as_before_afterwards() -> None:
    before = torch.autocast.__init__, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    with pytest.raises(ZeroDivisionError), Emulation("cuda", "16-mixed"):
        assert AutocastState.of("meta").dtype == FP16
        raise ZeroDivisionError
    assert before == (torch.autocast.__init__, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    assert not AutocastState.of("meta").enabled
    with pytest.raises(RuntimeError, match="unsupported"):
        torch.autocast("meta")
    with pytest.raises(RuntimeError, match="fused"):
        fused_step()


def fused_step() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.empty_like(weight)
    optimizer.step()
    return optimizer


def test_a_fused_optimizer_steps_and_allocates_nothing_but_its_state() -> None:
    with Emulation("cuda", "32-true"), StorageTracker() as tracker:
        optimizer = fused_step()
        assert len(optimizer.state) == 1
        assert tracker.peak_bytes == 4 * 64 * 64 * 4 + 4  # weight, gradient, two averages, the step


def test_a_recomputation_in_a_custom_backward_sees_the_restored_state() -> None:
    seen = []

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.state = AutocastState.of(x.device)
            ctx.save_for_backward(x)
            return x @ x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            seen.append((x @ x).dtype)
            with ctx.state.restored():
                seen.append((x @ x).dtype)
            return grad

    x = torch.empty(CLASSES, CLASSES, device="meta", requires_grad=True)
    with Emulation("cuda", "bf16-mixed"):
        loss = Again.apply(x).float().sum()
        with torch.autocast("meta", enabled=False):
            loss.backward()
    assert seen == [FP32, BF16]


def test_the_state_on_a_real_device() -> None:
    with torch.autocast("cpu", FP16, cache_enabled=False):
        state = AutocastState.of(torch.device("cpu"))
    x = torch.zeros(2, 2)
    with state.restored():
        assert (x @ x).dtype == FP16
        assert not torch.is_autocast_cache_enabled()
    off = AutocastState.of("cpu")
    with torch.autocast("cpu"), off.restored():
        assert (x @ x).dtype == FP32
    assert isinstance(AutocastState.of("meta").restored(), nullcontext)
