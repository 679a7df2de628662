"""llama.cpp's matrix product, for comparison: ggml's own libraries, which `pip install llama-cpp-python` brings."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

Q2_K = 10  # ggml's number of the type: 256 channels in 84 bytes, 2.625 bits a weight
BLOCK, BLOCK_BYTES = 256, 84


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("rest", ctypes.c_void_p * 16),  # more than any version has
    ]


class _PoolParams(ctypes.Structure):
    _fields_ = [("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("rest", ctypes.c_int * 32)]


@cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """(libggml-base, libggml-cpu), or None without the package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("base", "cpu"))
    for library, names in (
        (base, ("ggml_init", "ggml_new_tensor_2d", "ggml_get_data", "ggml_mul_mat", "ggml_new_graph")),
        (cpu, ("ggml_threadpool_new",)),
    ):
        for name in names:
            getattr(library, name).restype = ctypes.c_void_p
    cpu.ggml_graph_plan.restype = _Plan
    cpu.ggml_cpu_init()
    return base, cpu


class Q2Linear:
    """Some copies of one Q2_K matrix [N, K], and products with each on a pool of threads that stays."""

    def __init__(self, W_NK: torch.Tensor, copies: int) -> None:
        found = libraries()
        assert found is not None and W_NK.shape[1] % BLOCK == 0
        self._base, self._cpu = found
        self.n, self.k = W_NK.shape
        self.nbytes = self.n * self.k // BLOCK * BLOCK_BYTES
        context = self._make_context(copies * self.nbytes)
        self._weights = [self._tensor(context, Q2_K, self.k, self.n) for _ in range(copies)]
        source = np.ascontiguousarray(W_NK.float().numpy())
        sizes = [ctypes.c_int64(size) for size in (0, self.n, self.k)]
        first, *others = (self._data(weight) for weight in self._weights)
        self._base.ggml_quantize_chunk(Q2_K, _pointer(source.ctypes.data), first, *sizes, None)
        for other in others:
            ctypes.memmove(other, first, self.nbytes)

    def dequantize(self) -> torch.Tensor:
        """The matrix as its codes say, float32 [N, K]."""
        address = self._data(self._weights[0]).value
        assert address is not None
        packed = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(address)).reshape(self.n, -1)
        from gguf import GGMLQuantizationType, quants  # here, as a GPU's bench runs without it

        return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q2_K))

    def prepare(self, x_MK: torch.Tensor, threads: int) -> tuple[list[Callable[[], object]], torch.Tensor]:
        """A call for each copy, and the memory [M, N] that the first one writes."""
        m, pool = len(x_MK), _pool(threads)
        context = self._make_context(4 * m * (self.k + len(self._weights) * self.n) + (len(self._weights) << 18))
        x = self._tensor(context, 0, self.k, m)
        _view(self._data(x), m, self.k).copy_(x_MK)
        calls: list[Callable[[], object]] = []
        outputs = []
        for weight in self._weights:
            y, graph = _pointer(self._base.ggml_mul_mat(context, weight, x)), self._base.ggml_new_graph(context)
            self._base.ggml_build_forward_expand(_pointer(graph), y)
            plan = self._cpu.ggml_graph_plan(_pointer(graph), threads, pool)
            work = np.empty(plan.work_size + 64, np.uint8)
            plan.work_data = work.ctypes.data
            calls.append(partial(self._compute, _pointer(graph), plan, work))
            outputs.append(y)
        return calls, _view(self._data(outputs[0]), m, self.n)

    def _compute(self, graph: ctypes.c_void_p, plan: _Plan, work: Any) -> None:
        """work: the memory that the plan points to."""
        status = self._cpu.ggml_graph_compute(graph, ctypes.byref(plan))
        assert status == 0

    def _make_context(self, nbytes: int) -> ctypes.c_void_p:
        return _pointer(self._base.ggml_init(_InitParams(nbytes + (1 << 20), None, False)))

    def _tensor(self, context: ctypes.c_void_p, kind: int, width: int, height: int) -> ctypes.c_void_p:
        return _pointer(self._base.ggml_new_tensor_2d(context, kind, *map(ctypes.c_int64, (width, height))))

    def _data(self, tensor: ctypes.c_void_p) -> ctypes.c_void_p:
        return _pointer(self._base.ggml_get_data(tensor))


@cache
def _pool(threads: int) -> ctypes.c_void_p:
    found = libraries()
    assert found is not None
    params = _PoolParams()
    found[0].ggml_threadpool_params_init(ctypes.byref(params), threads)
    return _pointer(found[1].ggml_threadpool_new(ctypes.byref(params)))


def _pointer(address: int | None) -> ctypes.c_void_p:
    assert address  # ggml had the memory
    return ctypes.c_void_p(address)


def _view(data: ctypes.c_void_p, rows: int, columns: int) -> torch.Tensor:
    assert data.value is not None
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * (rows * columns)).from_address(data.value))).view(
        rows, columns
    )
