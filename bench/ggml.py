"""ggml through ctypes, from the libraries that llama-cpp-python installs: just enough for y = x @ W.T with W in Q4_0.

Q4_0: blocks of 32 columns, an fp16 scale and 16 bytes whose low nibbles are columns 0..15 and high nibbles 16..31, zero
point 8. A symmetric INT4 weight whose group is a multiple of 32 is the same numbers in Q4_0 with repeated scales.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

F32, Q4_0 = 0, 2  # enum ggml_type
BLOCK = 32
BLOCK_BYTES = 18
REPACK = b"CPU_REPACK"  # name of the buffer type that interleaves rows on load

Pointer = ctypes.c_void_p


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool)]


LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
SILENT = LOG_CALLBACK(lambda level, text, data: None)

SIGNATURES = {  # name: (result, arguments)
    "ggml_log_set": (None, [LOG_CALLBACK, Pointer]),
    "ggml_init": (Pointer, [InitParams]),
    "ggml_free": (None, [Pointer]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_graph_overhead": (ctypes.c_size_t, []),
    "ggml_new_tensor_2d": (Pointer, [Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (Pointer, [Pointer, Pointer, Pointer]),
    "ggml_new_graph": (Pointer, [Pointer]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_get_data": (Pointer, [Pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, [Pointer, Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [Pointer, Pointer]),
    "ggml_backend_get_default_buffer_type": (Pointer, [Pointer]),
    "ggml_backend_buffer_free": (None, [Pointer]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [Pointer]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, ctypes.c_size_t]),
    "ggml_backend_free": (None, [Pointer]),
    "ggml_backend_cpu_init": (Pointer, []),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [Pointer, ctypes.c_int]),
}


class Library:
    """The functions of SIGNATURES as attributes, wherever they live."""

    def __init__(self, folder: Path) -> None:
        loaded = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in loaded if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ggml_log_set(SILENT, None)


@functools.cache
def library() -> Library:
    """Raises ImportError if llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("llama-cpp-python is not installed")
    return Library(Path(spec.submodule_search_locations[0]) / "lib")


def pack_q4_0(q: Tensor, scales: Tensor) -> Tensor:
    """q (N, K) uint8, scales (N, G) fp16 of equal groups -> (N, K / 32, 18) uint8."""
    n, k = q.shape
    blocks = q.reshape(n, k // BLOCK, 2, BLOCK // 2)
    scale = scales.repeat_interleave(k // BLOCK // scales.shape[1], dim=1).contiguous().view(torch.uint8)
    return torch.cat((scale.reshape(n, k // BLOCK, 2), blocks[:, :, 0] | blocks[:, :, 1] << 4), dim=-1).contiguous()


class Weights:
    """Several Q4_0 matrices (N, K) in a buffer of their own, plain or repacked."""

    def __init__(self, matrices: list[Tensor], n: int, k: int, *, repack: bool) -> None:
        ggml = library()
        self.backend = ggml.ggml_backend_cpu_init()
        buffer_type = ggml.ggml_backend_get_default_buffer_type(self.backend)
        if repack:
            buffer_type = repack_buffer_type()
        self.context = ggml.ggml_init(InitParams(ggml.ggml_tensor_overhead() * (len(matrices) + 1), None, True))
        self.tensors = [ggml.ggml_new_tensor_2d(self.context, Q4_0, k, n) for _ in matrices]
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise MemoryError(f"ggml: no buffer for {len(matrices)} weights of {n} x {k}")
        for tensor, matrix in zip(self.tensors, matrices, strict=True):
            ggml.ggml_backend_tensor_set(tensor, matrix.data_ptr(), 0, matrix.numel())

    def close(self) -> None:
        library().ggml_backend_buffer_free(self.buffer)
        library().ggml_free(self.context)
        library().ggml_backend_free(self.backend)


class Products:
    """x (M, K) fp32 times lists of weights: one graph per list."""

    def __init__(self, weights: Weights, parts: list[list[int]], x: Tensor, n: int) -> None:
        ggml = library()
        m, k = x.shape
        count = sum(map(len, parts)) + 1
        size = ggml.ggml_tensor_overhead() * (count + 1) + ggml.ggml_graph_overhead() * (len(parts) + 1)
        self.backend, self.shape = weights.backend, (m, n)
        self.context = ggml.ggml_init(InitParams(size, None, True))
        source = ggml.ggml_new_tensor_2d(self.context, F32, k, m)
        self.graphs, self.outputs = [], {}
        for part in parts:
            graph = ggml.ggml_new_graph(self.context)
            for index in part:
                self.outputs[index] = ggml.ggml_mul_mat(self.context, weights.tensors[index], source)
                ggml.ggml_build_forward_expand(graph, self.outputs[index])
            self.graphs.append(graph)
        plain = ggml.ggml_backend_get_default_buffer_type(self.backend)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, plain)
        ggml.ggml_backend_tensor_set(source, x.data_ptr(), 0, x.numel() * 4)

    def run(self, part: int, threads: int) -> None:
        ggml = library()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        if ggml.ggml_backend_graph_compute(self.backend, self.graphs[part]):
            raise RuntimeError("ggml: graph_compute failed")

    def output(self, index: int) -> Tensor:
        m, n = self.shape
        data = (ctypes.c_float * (m * n)).from_address(library().ggml_get_data(self.outputs[index]))
        return torch.frombuffer(data, dtype=torch.float32).reshape(m, n).clone()

    def close(self) -> None:
        library().ggml_backend_buffer_free(self.buffer)
        library().ggml_free(self.context)


def repack_buffer_type() -> int:
    """Raises NotImplementedError where this build or CPU has none."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)
        types = extra(ggml.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while types and types[index]:
            if ggml.ggml_backend_buft_name(types[index]) == REPACK:
                return int(types[index])
            index += 1
    raise NotImplementedError("this ggml has no repacking buffer type")
