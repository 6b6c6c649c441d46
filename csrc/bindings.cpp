// The operators of csrc/ on the LibTorch stable ABI: one library serves every supported version of torch.
//
// Compiled once as it is (schemas, CPU) and, where there is a card, once more with VIDEOR1_CUDA (that device's half).
// Arguments are checked in videor1_kernels/frames_to_patches/native.py; here what would read or write outside of a tensor
// or divide by 0, for an operator can be called by itself.
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

#ifdef VIDEOR1_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// A plane [frames, height, width] of U or V, or of both next to each other, has half the luma's sides, rounded up.
void check_planes(const std::vector<Tensor>& planes) {
  STD_TORCH_CHECK(planes.size() >= 1 && planes.size() <= 3, "frames_to_patches: planes: expected 1 to 3, got ", planes.size());
  const Tensor& first = planes[0];
  STD_TORCH_CHECK(first.dim() == (planes.size() == 1 ? 4 : 3) && first.numel() > 0 && (planes.size() > 1 || first.size(3) == 3),
                  "frames_to_patches: planes: expected RGB [F, H, W, 3], or luma [F, H, W] and chroma");
  const bool wide = first.scalar_type() == ScalarType::UInt16;
  STD_TORCH_CHECK(first.scalar_type() == ScalarType::Byte || (wide && planes.size() == 2),
                  "frames_to_patches: planes: expected uint8 samples, or uint16 in two planes");
  constexpr int64_t kMost = int64_t(1) << 30;
  STD_TORCH_CHECK(first.size(0) < kMost && first.size(1) < kMost && first.size(2) < kMost / 3,
                  "frames_to_patches: planes: expected sides below 2^30");
  for (size_t i = 0; i < planes.size(); ++i) {
    const Tensor& plane = planes[i];
    STD_TORCH_CHECK(plane.is_cuda() == kCuda && plane.get_device_index() == first.get_device_index() &&
                        plane.scalar_type() == first.scalar_type(),
                    "frames_to_patches: plane ", i, ": expected the device and dtype of the first");
    if (i == 0) continue;
    const bool pairs = planes.size() == 2;
    STD_TORCH_CHECK(plane.dim() == (pairs ? 4 : 3) && plane.size(0) == first.size(0) &&
                        plane.size(1) == (first.size(1) + 1) / 2 && plane.size(2) == (first.size(2) + 1) / 2 &&
                        (!pairs || plane.size(3) == 2),
                    "frames_to_patches: plane ", i, ": expected chroma of half the luma's sides");
  }
}

// The windows of a resize: first source samples [n] int32, weights [n, pitch] fp32 of which ``taps`` are used.
void check_table(const Tensor& first, const Tensor& weights, int64_t taps, int64_t size_in) {
  STD_TORCH_CHECK(first.dim() == 1 && first.scalar_type() == ScalarType::Int && first.is_contiguous() && first.numel() > 0 &&
                      weights.dim() == 2 && weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      weights.size(0) == first.size(0) && taps >= 1 && taps <= weights.size(1) && weights.size(1) % 16 == 0 &&
                      first.is_cuda() == kCuda && weights.is_cuda() == kCuda,
                  "frames_to_patches: expected a table of resample_table on the frames' device");
  if (kCuda) return;
  const int32_t* at = first.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < first.size(0); ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < size_in, "frames_to_patches: a window begins at ", at[i], " of ", size_in, " samples");
}

void check_slots(const Tensor& slots, int64_t frames) {
  STD_TORCH_CHECK(slots.dim() == 1 && slots.scalar_type() == ScalarType::Int && slots.is_contiguous() &&
                      slots.size(0) == frames && slots.is_cuda() == kCuda,
                  "frames_to_patches: slots: expected int32 [", frames, "] on the frames' device");
  if (kCuda) return;
  const int32_t* at = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < frames; ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < frames, "frames_to_patches: slots: expected 0 to ", frames - 1, ", got ", at[i]);
}

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
                       int64_t patch, int64_t quarter_turns, bool mirrored, Tensor levels, std::optional<Tensor> slots,
                       std::optional<Tensor> ordered, std::optional<Tensor> permuted) {
  check_planes(planes);
  check_table(row_first, row_weights, row_taps, planes[0].size(1));
  check_table(column_first, column_weights, column_taps, planes[0].size(2));
  STD_TORCH_CHECK(matrix >= 0 && matrix <= 2 && quarter_turns >= 0 && quarter_turns <= 3 && (patch == 14 || patch == 16) &&
                      row_first.size(0) % (2 * patch) == 0 && column_first.size(0) % (2 * patch) == 0,
                  "frames_to_patches: expected matrix 0 to 2, quarter_turns 0 to 3, patch 14 or 16 and sides that twice the "
                  "patch divides");
  STD_TORCH_CHECK(levels.dim() == 2 && levels.size(0) == 3 && levels.size(1) == 256 && levels.is_contiguous() &&
                      levels.element_size() <= 4 && levels.is_cuda() == kCuda,
                  "frames_to_patches: levels: expected [3, 256] of 1, 2 or 4 bytes on the frames' device");
  if (slots) check_slots(*slots, planes[0].size(0));
  videor1::Job job{};
  job.source = source_of(planes, matrix, full_range);
  job.upright = {row_first.size(0), column_first.size(0), int(quarter_turns), mirrored, int(patch)};
  job.rows = table_of(row_first, row_weights, row_taps);
  job.columns = table_of(column_first, column_weights, column_taps);
  job.levels = levels.const_data_ptr();
  job.out_bytes = int(levels.element_size());
  const int64_t elements = (job.source.frames + 1) / 2 * 2 * 3 * job.upright.height * job.upright.width;
  for (const auto* out : {&ordered, &permuted})
    STD_TORCH_CHECK(!out->has_value() || ((*out)->numel() == elements && (*out)->is_contiguous() &&
                                          (*out)->is_cuda() == kCuda && (*out)->scalar_type() == levels.scalar_type()),
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
  constexpr int64_t kMost = int64_t(1) << 30;
  STD_TORCH_CHECK(size_in > 0 && size_in < kMost && size_out > 0 && size_out < kMost && align > 0 && align <= 64 && !like.is_cuda(),
                  "resample_table: expected sizes from 1 to 2^30, align from 1 to 64 and a tensor on the CPU, got ", size_in, ", ",
                  size_out, " and ", align);
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
      "Tensor column_first, Tensor column_weights, int column_taps, int patch, int quarter_turns, bool mirrored, "
      "Tensor levels, Tensor? slots, Tensor(a!)? ordered, Tensor(b!)? permuted) -> ()");
  m.def("resample_table(Tensor like, int size_in, int size_out, int align) -> (Tensor, Tensor, int)");
}

STABLE_TORCH_LIBRARY_IMPL(videor1_csrc, CPU, m) {
  m.impl("frames_to_patches", TORCH_BOX(&frames_to_patches));
  m.impl("resample_table", TORCH_BOX(&resample_table));
}

#endif
