// Padded shard gather on CUDA devices. Sources may lie in pinned host memory: the kernel reads them over the bus.

#include "shard_gather.h"

#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace megavila {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <typename word_t>
__global__ void gather_kernel(const int64_t* __restrict__ sources, const int64_t* __restrict__ source_rows,
                              int64_t source_count, const int32_t* __restrict__ source_index,
                              const int64_t* __restrict__ row_index, word_t* __restrict__ out, int64_t rows,
                              int64_t words) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int32_t source = source_index[i];
    word_t* to = out + i * words;
    if (source < 0) {
      for (int64_t j = threadIdx.x; j < words; j += blockDim.x) to[j] = word_t{};
      continue;
    }
    const int64_t row = row_index[i];
    if (source >= source_count || row < 0 || row >= source_rows[source]) __trap();
    const auto* from = reinterpret_cast<const word_t*>(sources[source]) + row * words;
    for (int64_t j = threadIdx.x; j < words; j += blockDim.x) to[j] = from[j];
  }
}

template <typename scalar_t, typename acc_t>
__global__ void scatter_add_kernel(const scalar_t* __restrict__ grad, const int32_t* __restrict__ source_index,
                                   const int64_t* __restrict__ row_index, const int64_t* __restrict__ accumulators,
                                   const int64_t* __restrict__ source_rows, int64_t source_count, int64_t rows,
                                   int64_t width) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int32_t source = source_index[i];
    if (source < 0) continue;
    if (source >= source_count) __trap();
    auto* target = reinterpret_cast<acc_t*>(accumulators[source]);
    if (target == nullptr) continue;
    const int64_t row = row_index[i];
    if (row < 0 || row >= source_rows[source]) __trap();
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) {
      atomicAdd(target + row * width + j, static_cast<acc_t>(grad[i * width + j]));
    }
  }
}

// A small table of addresses or row counts, on the device that the kernel runs on.
at::Tensor table(const std::vector<int64_t>& values, const at::Device& device) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong)).to(device);
}

dim3 blocks(int64_t rows) { return dim3(static_cast<unsigned>(std::clamp<int64_t>(rows, 1, kMaxBlocks))); }

template <typename word_t>
void launch_gather(const at::Tensor& addresses, const at::Tensor& rows, const at::Tensor& source_index,
                   const at::Tensor& row_index, at::Tensor& out, int64_t row_bytes) {
  gather_kernel<word_t><<<blocks(out.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      addresses.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(), rows.size(0),
      source_index.const_data_ptr<int32_t>(), row_index.const_data_ptr<int64_t>(),
      static_cast<word_t*>(out.mutable_data_ptr()), out.size(0), row_bytes / static_cast<int64_t>(sizeof(word_t)));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void gather_cuda(const std::vector<at::Tensor>& sources, const at::Tensor& source_index, const at::Tensor& row_index,
                 at::Tensor& out) {
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  const int64_t row_bytes = out.size(1) * out.element_size();
  bool wide = row_bytes % sizeof(int4) == 0;
  std::vector<int64_t> addresses, rows;
  for (const auto& source : sources) {
    const auto address = reinterpret_cast<int64_t>(source.const_data_ptr());
    wide = wide && address % static_cast<int64_t>(sizeof(int4)) == 0;
    addresses.push_back(address);
    rows.push_back(source.size(0));
  }
  const auto address_table = table(addresses, out.device()), row_table = table(rows, out.device());
  if (wide) {
    launch_gather<int4>(address_table, row_table, source_index, row_index, out, row_bytes);
  } else {
    launch_gather<int16_t>(address_table, row_table, source_index, row_index, out, row_bytes);
  }
}

void scatter_add_cuda(const at::Tensor& grad, const at::Tensor& source_index, const at::Tensor& row_index,
                      const std::vector<at::Tensor>& accumulators) {
  if (grad.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(grad.device());
  std::vector<int64_t> addresses, rows;
  for (const auto& a : accumulators) {
    addresses.push_back(a.defined() ? reinterpret_cast<int64_t>(a.mutable_data_ptr()) : 0);
    rows.push_back(a.defined() ? a.size(0) : 0);
  }
  const auto address_table = table(addresses, grad.device()), row_table = table(rows, grad.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "shard_scatter_add", [&] {
    using acc_t = at::acc_type<scalar_t, true>;
    scatter_add_kernel<scalar_t, acc_t><<<blocks(grad.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        grad.const_data_ptr<scalar_t>(), source_index.const_data_ptr<int32_t>(), row_index.const_data_ptr<int64_t>(),
        address_table.const_data_ptr<int64_t>(), row_table.const_data_ptr<int64_t>(), row_table.size(0),
        grad.size(0), grad.size(1));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace megavila
