"""Check what benchmarks.kernels calls of other packages against these packages, where they are installed.

Their kernels need a GPU. Here each of their functions is replaced by one that takes the same arguments and no others,
and returns tensors of the documented shapes. The benchmark compares the real results with the references.
"""

from logging import getLogger
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch.nn.attention import list_flash_attention_impls

from benchmarks.kernels import rivals

ROWS, INNER, HIDDEN = 4, 8, 16


def package(name: str) -> Any:
    """Import a package, or skip the test with the reason."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def test_torch_knows_the_other_flash_attentions() -> None:
    assert {"FA3", "FA4"} <= set(list_flash_attention_impls())


def test_liger() -> None:
    function = package("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "forward", create_autospec(function.forward, side_effect=lambda ctx, x, *_: x.clone()))
        rivals.liger_add_layer_norm(torch.ones(2, 2, 8), torch.ones(2, 2, 8), torch.ones(8), torch.ones(8))
        function.forward.assert_called_once()


def test_quack_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = package("quack.rmsnorm")
    x, weight = torch.randn(2, 2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rows, statistic = torch.zeros(4, 8), torch.zeros(4)
    forward = create_autospec(norms.layernorm_fwd, return_value=(rows, statistic, statistic))
    backward = create_autospec(norms.layernorm_bwd, return_value=(rows, torch.zeros(8), torch.zeros(8)))
    monkeypatch.setattr(norms, "layernorm_fwd", forward)
    monkeypatch.setattr(norms, "layernorm_bwd", backward)
    for result in rivals.quack_add_layer_norm(x, x, weight, torch.ones(8)):
        assert result.shape == x.shape
    result.sum().backward()
    assert x.grad.shape == x.shape
    backward.assert_called_once()


def test_quack_products(monkeypatch: pytest.MonkeyPatch) -> None:
    products, activations = package("quack.gemm_interface"), package("quack.activation")
    z, h = torch.zeros(ROWS, HIDDEN), torch.ones(ROWS, HIDDEN)
    monkeypatch.setattr(products, "gemm_act", create_autospec(products.gemm_act, return_value=(z, h)))
    monkeypatch.setattr(products, "gemm_dact", create_autospec(products.gemm_dact, return_value=(z, h)))
    x, weight, bias = torch.ones(ROWS, INNER), torch.ones(HIDDEN, INNER), torch.ones(HIDDEN)
    assert all(map(torch.equal, rivals.quack_linear_gelu(x, weight, bias), (h, z)))
    dz, again, d_bias = rivals.quack_linear_gelu_backward(x, weight.t(), z)
    assert (dz is z, again is h, d_bias.shape) == (True, True, (HIDDEN,))
    for called, known in (("gemm_act", activations.act_fn_map), ("gemm_dact", activations.dact_fn_map)):
        assert getattr(products, called).call_args.kwargs["activation"] in known


def test_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call gives new operands to the plan of the first."""
    advanced = package("nvmath.linalg.advanced")
    plan = create_autospec(advanced.Matmul, instance=True)
    monkeypatch.setattr(advanced, "Matmul", create_autospec(advanced.Matmul, return_value=plan))
    columns = torch.zeros(HIDDEN, ROWS)
    plan.execute.return_value = columns, {"gelu_aux": columns, "dgelu_bgrad": torch.zeros(HIDDEN)}
    x, weight, bias = torch.ones(ROWS, INNER), torch.ones(HIDDEN, INNER), torch.ones(HIDDEN)
    forward, backward = rivals.cublaslt_linear_gelu(), rivals.cublaslt_linear_gelu_backward()
    for _ in range(2):
        assert [result.shape for result in forward(x, weight, bias)] == [(ROWS, HIDDEN)] * 2
    assert plan.plan.call_args.kwargs["epilog"] is advanced.MatmulEpilog.GELU_AUX_BIAS
    plan.plan.assert_called_once()
    plan.reset_operands.assert_called_once()
    dz, h, d_bias = backward(x, weight.t(), torch.zeros(ROWS, HIDDEN))
    assert (dz.shape, h.shape, d_bias.shape) == ((ROWS, HIDDEN), (ROWS, HIDDEN), (HIDDEN,))
    assert plan.plan.call_args.kwargs["epilog"] is advanced.MatmulEpilog.DGELU_BGRAD


def test_what_cublaslts_epilogues_take_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names and the layouts: a matrix is column by column, so it is the transpose of one of ours."""
    handlers = package("nvmath.linalg._internal.epilog_protocol")
    epilogues = package("nvmath.linalg.advanced").MatmulEpilog
    monkeypatch.setattr(handlers.cublaslt, "get_version", lambda: 130000)  # without a driver the library does not load
    product = SimpleNamespace(M=HIDDEN, N=ROWS, K=INNER, batch_shape=[], batch_axis_order=())

    def handler(table: Any, epilogue: Any) -> Any:
        (kind,) = table[epilogue]
        return kind(getLogger(), product, epilogue, "bfloat16", "bfloat16", None)

    takes, leaves = handlers.EPILOG_INPUT_HANDLERS_MAP, handlers.EPILOG_OUTPUT_HANDLERS_MAP
    assert handler(takes, epilogues.GELU_AUX_BIAS).name == "bias"
    assert handler(takes, epilogues.DGELU_BGRAD).name == "gelu_aux"
    z = handler(leaves, epilogues.GELU_AUX_BIAS)
    assert (z.name, *map(list, z.attributes()[:2])) == ("gelu_aux", [HIDDEN, ROWS], [1, HIDDEN])
    d_bias = handler(leaves, epilogues.DGELU_BGRAD)
    assert (d_bias.name, list(d_bias.attributes()[0])) == ("dgelu_bgrad", [HIDDEN])
