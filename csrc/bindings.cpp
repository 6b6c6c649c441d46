// The operators of csrc/ on the LibTorch stable ABI: one library serves every supported version of torch.
//
// Compiled once as it is (schemas, CPU) and, where there is a card, once more with VIDEOR1_CUDA (that device's half).
// Arguments are checked in videor1_kernels/frames_to_patches/native.py; here only what would read outside of a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "frames_to_patches.h"
#include "videor1/resample.h"

#ifdef VIDEOR1_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

videor1::Source source_of(const std::vector<Tensor>& planes, int64_t matrix, bool full_range) {
  videor1::Source source{};
  const Tensor& first = planes[0];
  source.frames = first.size(0), source.height = first.size(1), source.width = first.size(2);
  source.layout = planes.size() == 3 ? videor1::kPlanar : planes.size() == 2 ? videor1::kSemiPlanar : videor1::kRgb;
  source.sample_bytes = first.scalar_type() == ScalarType::UInt16 ? 2 : 1;
  source.color = videor1::color_matrix(int(matrix), full_range, source.sample_bytes == 2 ? 10 : 8);
  for (size_t i = 0; i < planes.size(); ++i) {
    const Tensor& plane = planes[i];
    const bool pairs = plane.dim() == 4;  // RGB, or U next to V
    STD_TORCH_CHECK(plane.dim() >= 3 && plane.stride(plane.dim() - 1) == 1 && (!pairs || plane.stride(2) == plane.size(3)),
                    "frames_to_patches: plane ", i, ": expected the samples of a row next to each other");
    source.planes[i] = plane.const_data_ptr();
    source.frame_stride[i] = plane.stride(0), source.row_stride[i] = plane.stride(1);
  }
  return source;
}

videor1::Table table_of(const Tensor& first, const Tensor& weights, int64_t taps) {
  return {first.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(), weights.size(1), taps};
}

#ifdef VIDEOR1_CUDA
void launch(const videor1::Job& job, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = videor1::frames_to_patches_cuda(job, stream);
  STD_TORCH_CHECK(error == 0, "frames_to_patches: the launch failed with CUDA error ", error);
}
#else
void parallel_for(int64_t tasks, void (*task)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i, context);
  });
}

void launch(const videor1::Job& job, int32_t) {
  videor1::frames_to_patches_cpu(job, torch::stable::get_num_threads(), parallel_for);
}
#endif

void frames_to_patches(std::vector<Tensor> planes, int64_t matrix, bool full_range, Tensor row_first, Tensor row_weights,
                       int64_t row_taps, Tensor column_first, Tensor column_weights, int64_t column_taps,
                       int64_t quarter_turns, bool mirrored, Tensor levels, std::optional<Tensor> slots, std::optional<Tensor> ordered,
                       std::optional<Tensor> permuted) {
  videor1::Job job{};
  job.source = source_of(planes, matrix, full_range);
  job.upright = {row_first.size(0), column_first.size(0), int(quarter_turns), mirrored};
  job.rows = table_of(row_first, row_weights, row_taps);
  job.columns = table_of(column_first, column_weights, column_taps);
  job.levels = levels.const_data_ptr();
  job.out_bytes = int(levels.element_size());
  const int64_t elements = (job.source.frames + 1) / 2 * 2 * 3 * job.upright.height * job.upright.width;
  for (const auto* out : {&ordered, &permuted})
    STD_TORCH_CHECK(!out->has_value() || ((*out)->numel() == elements && (*out)->is_contiguous() &&
                                          (*out)->scalar_type() == levels.scalar_type()),
                    "frames_to_patches: expected contiguous outputs of ", elements, " elements");
  STD_TORCH_CHECK(permuted.has_value() == slots.has_value(), "frames_to_patches: slots and permuted go together");
  job.slots = slots ? slots->const_data_ptr<int32_t>() : nullptr;
  job.ordered = ordered ? ordered->mutable_data_ptr() : nullptr;
  job.permuted = permuted ? permuted->mutable_data_ptr() : nullptr;
  launch(job, planes[0].get_device_index());
}

}  // namespace

#ifdef VIDEOR1_CUDA

STABLE_TORCH_LIBRARY_IMPL(videor1_csrc, CUDA, m) { m.impl("frames_to_patches", TORCH_BOX(&frames_to_patches)); }

#else

namespace {

// (first [size_out] int32, weights [size_out, pitch] fp32, taps of the widest window); pitch is a multiple of 16, each
// first one of ``align``.
std::tuple<Tensor, Tensor, int64_t> resample_table(Tensor like, int64_t size_in, int64_t size_out, int64_t align) {
  const int64_t taps = videor1::most_taps(size_in, size_out, align), pitch = (taps + 15) / 16 * 16;
  Tensor first = torch::stable::new_empty(like, {size_out}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(like, {size_out, pitch}, ScalarType::Float);
  videor1::resample_table(size_in, size_out, align, pitch, first.mutable_data_ptr<int32_t>(), weights.mutable_data_ptr<float>());
  return {first, weights, taps};
}

}  // namespace

STABLE_TORCH_LIBRARY(videor1_csrc, m) {
  m.def(
      "frames_to_patches(Tensor[] planes, int matrix, bool full_range, Tensor row_first, Tensor row_weights, int row_taps, "
      "Tensor column_first, Tensor column_weights, int column_taps, int quarter_turns, bool mirrored, Tensor levels, "
      "Tensor? slots, Tensor(a!)? ordered, Tensor(b!)? permuted) -> ()");
  m.def("resample_table(Tensor like, int size_in, int size_out, int align) -> (Tensor, Tensor, int)");
}

STABLE_TORCH_LIBRARY_IMPL(videor1_csrc, CPU, m) {
  m.impl("frames_to_patches", TORCH_BOX(&frames_to_patches));
  m.impl("resample_table", TORCH_BOX(&resample_table));
}

#endif
