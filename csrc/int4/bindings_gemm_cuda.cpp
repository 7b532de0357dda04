// Python border of the int4 family's CUDA kernels: gemm.
#include "common/border.h"
#include "int4/gemm_cuda.h"

namespace py = pybind11;

namespace m3::int4 {
namespace {

using WeightTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple, int, int64_t, int64_t, int64_t, int64_t, int64_t>;
using PlanTuple = std::tuple<int, int, int>;

void int4_product(const std::string& which, SpanTuple x, int x_type, int64_t x_rows, int64_t rows, SpanTuple row_index,
                  const WeightTuple& weight, SpanTuple offsets, SpanTuple bias, int epilogue, SpanTuple y,
                  SpanTuple workspace, SpanTuple counters, PlanTuple plan, uintptr_t stream) {
  const auto& [qweight, scales, zeros, scale_type, experts, n, k, group_size, first_k] = weight;
  Product p{at<void>(x),
            DeviceType(x_type),
            x_rows,
            rows,
            at<int32_t>(row_index),
            at<void>(qweight),
            at<void>(scales),
            DeviceType(scale_type),
            at<uint8_t>(zeros),
            experts,
            n,
            k,
            group_size,
            first_k,
            at<int32_t>(offsets),
            at<void>(bias),
            Epilogue(epilogue),
            at<void>(y),
            at<float>(workspace),
            at<int32_t>(counters),
            {std::get<0>(plan), std::get<1>(plan), std::get<2>(plan)},
            at<void>(stream)};
  which == "wgmma" ? gemm_many_sm90(p) : gemm_many(p);
}

}  // namespace

void bind_gemm_cuda(py::module_& m) {
  m.def("int4_product", &int4_product);
  m.def("int4_plan", [](int64_t n, int64_t k, bool grouped) {
    const Plan plan = plan_of(n, k, grouped, 4);
    return std::tuple(plan.part_tiles, plan.split_parts, plan.splits);
  });
}

}  // namespace m3::int4
