// Padded shard gather: what the Python binding, the CPU code and the CUDA code share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace megavila {

// Fills out (S, D) from the rows of sources; source_index -1 gives a row of zeros. Indices are on out's device and
// were not checked: the kernel traps on one that is out of range. Sources are on out's device or in pinned memory.
void gather_cuda(const std::vector<at::Tensor>& sources, const at::Tensor& source_index, const at::Tensor& row_index,
                 at::Tensor& out);

// Adds the rows of grad (S, D) to the fp32 or fp64 accumulators (rows_i, D); undefined accumulators are skipped.
void scatter_add_cuda(const at::Tensor& grad, const at::Tensor& source_index, const at::Tensor& row_index,
                      const std::vector<at::Tensor>& accumulators);

}  // namespace megavila
