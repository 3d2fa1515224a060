// Padded shard gather on the CPU, and the Python binding.
//
// A rank's shard of a sequence takes rows from several sources (text embeddings, rows of videos, ...) in an order that
// the layout gives. One pass writes the padded shard, without the full sequence ever being in memory; the backward
// pass adds the shard's gradient rows to the sources they came from.

#include "shard_gather.h"

// Not torch/extension.h, which takes minutes to compile on a small machine.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace megavila {
namespace {

// Rows that one thread copies at least.
constexpr int64_t kGrain = 64;
// Outputs beyond this do not fit the caches: writing past them saves reading every line before it is overwritten.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// Shorter runs than this are faster through the caches all the same.
constexpr int64_t kStreamRun = int64_t{64} << 10;

struct Source {
  const char* data;
  int64_t rows;
};

#if defined(__SSE2__)
// No software prefetch: the hardware's is better, and a non-temporal one took a third of the bandwidth.
void stream_copy(char* to, const char* from, int64_t bytes) {
  auto* target = reinterpret_cast<__m128i*>(to);
  const auto* origin = reinterpret_cast<const __m128i*>(from);
  for (int64_t i = 0; i < bytes / 16; i += 4) {
    const __m128i a = _mm_loadu_si128(origin + i);
    const __m128i b = _mm_loadu_si128(origin + i + 1);
    const __m128i c = _mm_loadu_si128(origin + i + 2);
    const __m128i d = _mm_loadu_si128(origin + i + 3);
    _mm_stream_si128(target + i, a);
    _mm_stream_si128(target + i + 1, b);
    _mm_stream_si128(target + i + 2, c);
    _mm_stream_si128(target + i + 3, d);
  }
}
#endif

void copy_rows(char* to, const char* from, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream && bytes >= kStreamRun && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    stream_copy(to, from, bytes);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

void check_indices(const at::Tensor& source_index, const at::Tensor& row_index, const std::vector<int64_t>& rows) {
  const auto* source = source_index.const_data_ptr<int32_t>();
  const auto* row = row_index.const_data_ptr<int64_t>();
  const auto count = static_cast<int32_t>(rows.size());
  for (int64_t i = 0; i < source_index.numel(); ++i) {
    TORCH_CHECK_INDEX(source[i] >= -1 && source[i] < count, "shard row ", i, " names source ", source[i],
                      ", but there are ", count, " (-1 is padding)");
    TORCH_CHECK_INDEX(source[i] < 0 || (row[i] >= 0 && row[i] < rows[source[i]]), "shard row ", i, " names row ",
                      row[i], " of source ", source[i], ", which has ", rows[std::max(source[i], 0)]);
  }
}

void gather_cpu(const std::vector<at::Tensor>& sources, const at::Tensor& source_index, const at::Tensor& row_index,
                at::Tensor& out) {
  std::vector<Source> views;
  for (const auto& source : sources) {
    views.push_back({static_cast<const char*>(source.const_data_ptr()), source.size(0)});
  }
  const auto* source = source_index.const_data_ptr<int32_t>();
  const auto* row = row_index.const_data_ptr<int64_t>();
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = out.size(1) * out.element_size();
  const bool stream = out.numel() * out.element_size() >= kStreamBytes;
  at::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      // Neighbours in the shard are mostly neighbours in their source: copy such a run in one go.
      int64_t stop = i + 1;
      if (source[i] < 0) {
        while (stop < end && source[stop] < 0) ++stop;
        std::memset(target + i * row_bytes, 0, (stop - i) * row_bytes);
      } else {
        while (stop < end && source[stop] == source[i] && row[stop] == row[i] + (stop - i)) ++stop;
        copy_rows(target + i * row_bytes, views[source[i]].data + row[i] * row_bytes, (stop - i) * row_bytes, stream);
      }
      i = stop;
    }
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#endif
  });
}

// Each thread adds a range of columns of all rows in order, so the result does not depend on the number of threads.
template <typename scalar_t, typename acc_t>
void add_rows(const at::Tensor& grad, const at::Tensor& source_index, const at::Tensor& row_index,
              const std::vector<at::Tensor>& accumulators) {
  const auto* source = source_index.const_data_ptr<int32_t>();
  const auto* row = row_index.const_data_ptr<int64_t>();
  const auto* from = grad.const_data_ptr<scalar_t>();
  const int64_t width = grad.size(1);
  std::vector<acc_t*> targets;
  for (const auto& a : accumulators) targets.push_back(a.defined() ? a.mutable_data_ptr<acc_t>() : nullptr);
  at::parallel_for(0, width, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < grad.size(0); ++i) {
      if (source[i] < 0 || targets[source[i]] == nullptr) continue;
      acc_t* to = targets[source[i]] + row[i] * width;
      const scalar_t* origin = from + i * width;
      for (int64_t j = begin; j < end; ++j) to[j] += static_cast<acc_t>(origin[j]);
    }
  });
}

void scatter_add_cpu(const at::Tensor& grad, const at::Tensor& source_index, const at::Tensor& row_index,
                     const std::vector<at::Tensor>& accumulators) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "shard_scatter_add", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    add_rows<scalar_t, acc_t>(grad, source_index, row_index, accumulators);
  });
}

void check_out(const at::Tensor& out, const std::vector<at::Tensor>& sources, const at::Tensor& source_index,
               int64_t width) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == source_index.size(0) && out.size(1) == width &&
                        out.scalar_type() == sources[0].scalar_type() && out.device() == source_index.device() &&
                        out.is_contiguous(),
                    "out must be a contiguous (", source_index.size(0), ", ", width, ") ", sources[0].scalar_type(),
                    " on ", source_index.device(), "; got ", out.sizes(), " ", out.scalar_type(), " on ",
                    out.device());
  const auto* first = static_cast<const char*>(out.const_data_ptr());
  for (const auto& source : sources) {
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    TORCH_CHECK_VALUE(from >= first + out.nbytes() || from + source.nbytes() <= first,
                      "out shares memory with a source; give it memory of its own");
  }
}

void check(const std::vector<int64_t>& rows, const at::Tensor& source_index, const at::Tensor& row_index) {
  TORCH_CHECK_VALUE(source_index.dim() == 1 && source_index.sizes() == row_index.sizes(),
                    "source_index and row_index must both be (S,); got ", source_index.sizes(), " and ",
                    row_index.sizes());
  TORCH_CHECK_VALUE(source_index.scalar_type() == at::kInt && row_index.scalar_type() == at::kLong,
                    "source_index must be int32 and row_index int64; got ", source_index.scalar_type(), " and ",
                    row_index.scalar_type());
  TORCH_CHECK_VALUE(source_index.device() == row_index.device(), "source_index and row_index are on two devices");
  if (source_index.is_cpu()) check_indices(source_index, row_index, rows);
#if !defined(WITH_CUDA)
  TORCH_CHECK_VALUE(source_index.is_cpu(), "this extension was built without CUDA; indices are on ",
                    source_index.device());
#endif
}

}  // namespace

// `into`: what to write instead of a new tensor, so that a loop allocates nothing.
at::Tensor gather(const std::vector<at::Tensor>& sources, const at::Tensor& source_index,
                  const at::Tensor& row_index, const std::optional<at::Tensor>& into) {
  TORCH_CHECK_VALUE(!sources.empty(), "padded shard gather needs at least one source");
  const auto width = sources[0].size(-1);
  const auto dtype = sources[0].scalar_type();
  std::vector<at::Tensor> dense;
  std::vector<int64_t> rows;
  for (const auto& source : sources) {
    TORCH_CHECK_VALUE(source.dim() == 2 && source.size(1) == width && source.scalar_type() == dtype,
                      "sources must be (rows, ", width, ") ", dtype, "; got ", source.sizes(), " ",
                      source.scalar_type());
    TORCH_CHECK_VALUE(source.device() == source_index.device() || (source_index.is_cuda() && source.is_pinned()),
                      "a source is on ", source.device(), ", the indices on ", source_index.device(),
                      "; move it there or into pinned memory");
    dense.push_back(source.contiguous());
    rows.push_back(source.size(0));
  }
  check(rows, source_index, row_index);
  auto out = into ? *into
                  : at::empty({source_index.size(0), width}, sources[0].options().device(source_index.device()));
  if (into) check_out(out, dense, source_index, width);
  const auto from = source_index.contiguous(), row = row_index.contiguous();
#if defined(WITH_CUDA)
  if (out.is_cuda()) {
    gather_cuda(dense, from, row, out);
    return out;
  }
#endif
  gather_cpu(dense, from, row, out);
  return out;
}

// Gradients (rows[i], D) of the sources for which needed[i]; the others are undefined (None in Python).
std::vector<at::Tensor> scatter_add(const at::Tensor& grad, const at::Tensor& source_index,
                                    const at::Tensor& row_index, const std::vector<int64_t>& rows,
                                    const std::vector<bool>& needed) {
  TORCH_CHECK_VALUE(rows.size() == needed.size(), rows.size(), " sources but ", needed.size(), " flags");
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == source_index.size(0), "a gradient of shape ", grad.sizes(),
                    " does not fit ", source_index.size(0), " shard rows");
  check(rows, source_index, row_index);
  const auto dtype = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<at::Tensor> accumulators(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (needed[i]) accumulators[i] = at::zeros({rows[i], grad.size(1)}, grad.options().dtype(dtype));
  }
  const auto dense = grad.contiguous(), from = source_index.contiguous(), row = row_index.contiguous();
#if defined(WITH_CUDA)
  if (grad.is_cuda()) {
    scatter_add_cuda(dense, from, row, accumulators);
  } else {
    scatter_add_cpu(dense, from, row, accumulators);
  }
#else
  scatter_add_cpu(dense, from, row, accumulators);
#endif
  for (auto& a : accumulators) {
    if (a.defined()) a = a.to(grad.scalar_type());
  }
  return accumulators;
}

}  // namespace megavila

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Padded shard gather: one pass from several row sources to a rank's padded shard, and its backward.";
  m.def("gather", &megavila::gather, py::arg("sources"), py::arg("source_index"), py::arg("row_index"),
        py::arg("out") = std::nullopt, py::call_guard<py::gil_scoped_release>());
  m.def("scatter_add", &megavila::scatter_add, py::arg("grad"), py::arg("source_index"), py::arg("row_index"),
        py::arg("rows"), py::arg("needed"), py::call_guard<py::gil_scoped_release>());
}
