"""INT4 GEMMs of other projects as arms, each fed the same weights bit for bit where its format allows.

torch: fp32 and bf16 matmul of the dequantised weight, and its own INT4 op. ONNX Runtime: MatMulNBits at one accuracy
level. OpenVINO: a decompression graph, exact or with dynamic quantisation of the activations. auto-round-lib: woqgemm.
ggml: Q4_0, plain or repacked. Graph runtimes run ``span`` products in one graph, so that a
call's fixed cost is shared as in a model.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from bench import ggml
from bench.harness import GemmArm, Rotation, UnavailableError
from bench.workloads import Problem

# Relative RMS error by what an arm rounds: nothing (fp32), activations to int8 per block, everything to bf16.
TOLERANCE = {"fp32": 1e-5, "int8": 8e-3, "bf16": 1e-2}


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed")


class PeerArm(GemmArm):
    def __init__(self, problem: Problem, rotation: Rotation, threads: int) -> None:
        self.threads, self.span, self.parts = threads, rotation.span, rotation.parts
        self.copies = range(rotation.copies)
        self.n, self.k = problem.linear.n, problem.linear.k
        self.tolerance = TOLERANCE[self.computes]

    def part(self, index: int) -> range:
        return range(index * self.span, (index + 1) * self.span)


# -- torch ------------------------------------------------------------------------------------------------------------
class TorchDense(PeerArm):
    """torch.nn.functional.linear on dequantised weights, in fp32 or bf16."""

    def __init__(self, problem: Problem, rotation: Rotation, threads: int, *, dtype: torch.dtype) -> None:
        self.computes = "fp32" if dtype == torch.float32 else "bf16"
        self.lossy = dtype != torch.float32
        super().__init__(problem, rotation, threads)
        self.dtype = dtype
        self.weights = [problem.rows(problem.dense, copy).to(dtype) for copy in self.copies]
        self.stored_bytes = self.weights[0].numel() * self.weights[0].element_size()
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x = x.to(self.dtype)

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = torch.nn.functional.linear(self.x, self.weights[copy])

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy].float()


class TorchInt4(PeerArm):
    """torch.ops.aten._weight_int4pack_mm_for_cpu in bf16, its vectorised type: w = (q - 8) * scale + zero."""

    computes, lossy = "bf16", True

    def __init__(self, problem: Problem, rotation: Rotation, threads: int) -> None:
        super().__init__(problem, rotation, threads)
        if problem.linear.group_size not in (32, 64, 128, 256) or self.k % problem.linear.group_size:
            raise UnavailableError("_weight_int4pack_mm_for_cpu: K is not a multiple of the group")
        self.group_size = problem.linear.group_size
        self.weights, self.scales = [], []
        for copy in self.copies:
            scales = problem.rows(problem.scales, copy).float()
            shift = (8 - problem.rows(problem.zeros, copy).float()) * scales
            self.scales.append(torch.stack((scales, shift), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous())
            q = problem.rows(problem.q, copy).int()
            self.weights.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2))
        self.stored_bytes = self.weights[0].numel() * self.weights[0].element_size() + self.scales[0].numel() * 2
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x = x.to(torch.bfloat16)

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = torch.ops.aten._weight_int4pack_mm_for_cpu(
                self.x, self.weights[copy], self.group_size, self.scales[copy]
            )

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy].float()


# -- ONNX Runtime -----------------------------------------------------------------------------------------------------
class OnnxRuntime(PeerArm):
    """MatMulNBits; level 4 rounds the activations to int8, levels 0 and 1 compute in fp32. One session per part."""

    def __init__(
        self, problem: Problem, rotation: Rotation, threads: int, *, level: int, block: int | None = None
    ) -> None:
        need("onnx", "onnxruntime")
        self.computes = "int8" if level == 4 else "fp32"
        self.lossy = level == 4
        super().__init__(problem, rotation, threads)
        self.block = problem.linear.group_size if block is None else block
        if problem.linear.group_size % self.block or (self.k % self.block and self.block != problem.linear.group_size):
            raise UnavailableError(
                f"MatMulNBits: blocks of {self.block} do not hold groups of {problem.linear.group_size}"
            )
        self.sessions = [self.session(problem, part, level) for part in range(self.parts)]
        blocks = -(-self.k // self.block)
        self.stored_bytes = self.n * blocks * (self.block // 2 + 4) + (
            0 if problem.symmetric else self.n * -(-blocks // 2)
        )

    def session(self, problem: Problem, part: int, level: int) -> Any:
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper

        float32 = onnx.TensorProto.FLOAT
        nodes, tensors, outputs = [], [], []
        for copy in self.part(part):
            named = self.tensors(problem, copy)
            tensors += [numpy_helper.from_array(value.numpy(), f"{name}{copy}") for name, value in named.items()]
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    ["x", *(f"{name}{copy}" for name in named)],
                    [f"y{copy}"],
                    domain="com.microsoft",
                    K=self.k,
                    N=self.n,
                    bits=4,
                    block_size=self.block,
                    accuracy_level=level,
                )
            )
            outputs.append(helper.make_tensor_value_info(f"y{copy}", float32, ["M", self.n]))
        source = helper.make_tensor_value_info("x", float32, ["M", self.k])
        graph = helper.make_graph(nodes, "products", [source], outputs, tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def tensors(self, problem: Problem, copy: int) -> dict[str, Tensor]:
        """B (N, blocks, block / 2) uint8, low nibble first; scales (N, blocks) fp32; zeros (N, blocks / 2), if any."""
        blocks = -(-self.k // self.block)
        repeats = problem.linear.group_size // self.block
        q = problem.rows(problem.q, copy)
        q = torch.nn.functional.pad(q, (0, blocks * self.block - self.k)).reshape(self.n, blocks, self.block)
        scales = problem.rows(problem.scales, copy).float().repeat_interleave(repeats, dim=1)[:, :blocks]
        found = {"B": q[..., ::2] | q[..., 1::2] << 4, "scales": scales.contiguous()}
        if not problem.symmetric:
            zeros = problem.rows(problem.zeros, copy).repeat_interleave(repeats, dim=1)[:, :blocks]
            zeros = torch.nn.functional.pad(zeros, (0, blocks % 2), value=8)
            found["zeros"] = zeros[:, ::2] | zeros[:, 1::2] << 4
        return found

    def load(self, x: Tensor) -> None:
        import onnxruntime

        self.x = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        self.outputs = [torch.zeros(len(x), self.n) for _ in self.copies]
        self.bindings = []
        for part, session in enumerate(self.sessions):
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", self.x)
            for copy in self.part(part):
                y = self.outputs[copy].numpy()
                binding.bind_output(f"y{copy}", "cpu", 0, y.dtype, y.shape, y.ctypes.data)
            self.bindings.append(binding)

    def run(self, part: int) -> None:
        self.sessions[part].run_with_iobinding(self.bindings[part])

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


# -- OpenVINO ---------------------------------------------------------------------------------------------------------
class OpenVino(PeerArm):
    """u4 (i4 where symmetric) -> f16 -> scaled -> matmul. ``dynamic`` rounds the activations to int8 per group."""

    def __init__(self, problem: Problem, rotation: Rotation, threads: int, *, dynamic: bool) -> None:
        need("openvino")
        self.computes = "int8" if dynamic else "fp32"
        self.lossy = dynamic
        super().__init__(problem, rotation, threads)
        self.group_size, self.dynamic = problem.linear.group_size, dynamic
        if self.k % self.group_size:
            raise UnavailableError("OpenVINO: K is not a multiple of the group")
        self.requests = [self.request(problem, part) for part in range(self.parts)]
        self.stored_bytes = problem.weight_bytes

    def request(self, problem: Problem, part: int) -> Any:
        import openvino
        from openvino import opset13 as ops
        from openvino.op import Constant

        def nibbles(values: Tensor, kind: Any, shape: list[int]) -> Any:
            flat = values.reshape(-1)
            packed = (flat[::2] | flat[1::2] << 4).numpy()
            return Constant(openvino.Tensor(packed, openvino.Shape(shape), kind), shared_memory=False)

        groups = self.k // self.group_size
        shape = [self.n, groups, self.group_size]
        half, single = openvino.Type.f16, openvino.Type.f32
        x = ops.parameter(openvino.PartialShape([-1, self.k]), single, name="x")
        results = []
        for copy in self.part(part):
            q = problem.rows(problem.q, copy)
            if problem.symmetric:
                weight = ops.convert(nibbles(q ^ 8, openvino.Type.i4, shape), half)
            else:
                zeros = nibbles(problem.rows(problem.zeros, copy), openvino.Type.u4, [self.n, groups, 1])
                weight = ops.subtract(ops.convert(nibbles(q, openvino.Type.u4, shape), half), ops.convert(zeros, half))
            scales = problem.rows(problem.scales, copy).numpy().reshape(self.n, groups, 1)
            weight = ops.multiply(weight, Constant(scales, shared_memory=False))
            weight = ops.reshape(weight, ops.constant([self.n, self.k]), special_zero=False)
            results.append(ops.result(ops.matmul(x, ops.convert(weight, single), False, True)))
        configuration = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.group_size if self.dynamic else 0,
        }
        model = openvino.Model(results, [x], "products")
        return openvino.Core().compile_model(model, "CPU", configuration).create_infer_request()

    def load(self, x: Tensor) -> None:
        import openvino

        self.x = x.numpy()
        for request in self.requests:
            request.set_input_tensor(openvino.Tensor(self.x, shared_memory=True))

    def run(self, part: int) -> None:
        self.requests[part].infer()

    def output(self, copy: int) -> Tensor:
        part, index = divmod(copy, self.span)
        return torch.from_numpy(self.requests[part].get_output_tensor(index).data.copy())


# -- auto-round-lib ---------------------------------------------------------------------------------------------------
ARK_THREADS: list[int] = []  # the count that auto_round_kernel was first imported with


def import_ark(threads: int) -> None:
    """Import auto_round_kernel: OMP_NUM_THREADS fixes its thread count; with fewer in torch its results are wrong."""
    if not ARK_THREADS:
        ARK_THREADS.append(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        importlib.import_module("auto_round_kernel")
    if ARK_THREADS[0] != threads:
        raise UnavailableError(f"auto_round_kernel keeps the {ARK_THREADS[0]} thread(s) it was imported with")


class Ark(PeerArm):
    """woqgemm (BesTLA) with fp32 scales; ``compute`` int8 rounds the activations per group, fp32 does not."""

    def __init__(self, problem: Problem, rotation: Rotation, threads: int, *, compute: str) -> None:
        need("auto_round_kernel")
        import_ark(threads)
        import auto_round_kernel

        self.computes, self.lossy = compute, compute == "int8"
        super().__init__(problem, rotation, threads)
        if not problem.symmetric or self.k % problem.linear.group_size:
            raise UnavailableError("woqgemm: measured only on symmetric weights whose K is a multiple of the group")
        self.woqgemm, self.nothing = auto_round_kernel.woqgemm, torch.empty(0)
        self.facts = (self.n, self.k, problem.linear.group_size, compute, "int4", "fp32", False)
        self.weights = []
        for copy in self.copies:
            q = (problem.rows(problem.q, copy).to(torch.int8) - 8).T.contiguous()
            scales = problem.rows(problem.scales, copy).float().T.contiguous()
            none = torch.empty(0, dtype=torch.int8)
            self.weights.append(auto_round_kernel.repack_quantized_weight(q, scales, none, *self.facts[2:]))
        self.stored_bytes = self.weights[0].numel()
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x = x

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = self.woqgemm(self.x, self.weights[copy], self.nothing, *self.facts)

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


# -- ggml -------------------------------------------------------------------------------------------------------------
class Ggml(PeerArm):
    """Q4_0 times activations that ggml rounds to int8 per 32 columns."""

    computes, lossy = "int8", True

    def __init__(self, problem: Problem, rotation: Rotation, threads: int, *, repack: bool) -> None:
        super().__init__(problem, rotation, threads)
        if not problem.symmetric:
            raise UnavailableError("Q4_0 is symmetric")
        if self.k % ggml.BLOCK or problem.linear.group_size % ggml.BLOCK or self.k % problem.linear.group_size:
            raise UnavailableError("Q4_0: K is not a multiple of the group, or the group not of 32")
        try:
            ggml.library()
        except ImportError as error:
            raise UnavailableError(str(error)) from error
        rows = [(problem.rows(problem.q, copy), problem.rows(problem.scales, copy)) for copy in self.copies]
        try:
            self.weights = ggml.Weights([ggml.pack_q4_0(*each) for each in rows], self.n, self.k, repack=repack)
        except NotImplementedError as error:
            raise UnavailableError(str(error)) from error
        self.stored_bytes = self.n * self.k // ggml.BLOCK * ggml.BLOCK_BYTES
        self.products: ggml.Products | None = None

    def load(self, x: Tensor) -> None:
        if self.products is not None:
            self.products.close()
        parts = [list(self.part(part)) for part in range(self.parts)]
        self.products = ggml.Products(self.weights, parts, x.contiguous(), self.n)

    def run(self, part: int) -> None:
        assert self.products is not None
        self.products.run(part, self.threads)

    def output(self, copy: int) -> Tensor:
        assert self.products is not None
        return self.products.output(copy)

    def close(self) -> None:
        if self.products is not None:
            self.products.close()
        self.weights.close()
