// Multi-tensor exponential moving average:  ema <- ema + (1 - decay) (p - ema), and copy <- ema in half precision.
//
// The kernel argument itself carries the table of pointers, so a launch needs no device memory and no copy. Tensors
// beyond kMaxTensors go to further launches. A block finds its tensor by bisection over the tensors' first chunks.
// Bytes moved per element: 8 for the fp32 EMA and the size of p, 2 more with a copy: 12 fp32, 10 bf16, 12 bf16+copy.
// Definition: sra_fast/ops/ema_update.py::ema_update_ref_.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

enum class DType { kNone, kFloat32, kBFloat16, kFloat16 };

struct None {};

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }

__host__ __device__ inline void from_float(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__host__ __device__ inline void from_float(float x, __half* y) { *y = __float2half_rn(x); }

// torch.lerp: from the nearer end, so that decay 0 returns p exactly
__host__ __device__ inline float lerp(float ema, float p, float weight, float decay) {
  const float step = p - ema;
  return weight < 0.5f ? ema + weight * step : p - decay * step;
}

template <typename P, typename C>
void update_cpu(float* ema, const P* p, C* copy, int64_t numel, float weight, float decay) {
  for (int64_t i = 0; i < numel; ++i) {
    ema[i] = lerp(ema[i], to_float(p[i]), weight, decay);
    if constexpr (!std::is_same_v<C, None>) from_float(ema[i], copy + i);
  }
}

constexpr int kThreads = 256;
constexpr int kVector = 8;   // elements per thread and step: 16 bytes of half precision, 32 of fp32
constexpr int kUnroll = 2;   // independent steps in flight
constexpr int kChunk = kThreads * kVector * kUnroll;
constexpr int kMaxTensors = 110;

struct Table {
  float* ema[kMaxTensors];
  const void* p[kMaxTensors];
  void* copy[kMaxTensors];
  int64_t numel[kMaxTensors];
  int first_chunk[kMaxTensors];
  int num_tensors;
};
// the limit of kernel arguments on every architecture and toolkit
static_assert(sizeof(Table) + 2 * sizeof(float) <= 4096);

template <typename T>
__host__ __device__ inline void load_vector(const T* source, float (&x)[kVector]) {
  constexpr int kWords = kVector * sizeof(T) / sizeof(uint4);
  alignas(16) T values[kVector];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(source)[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(values[i]);
}

__host__ __device__ inline void store_vector(float* target, const float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    *reinterpret_cast<float4*>(target + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

template <typename C>
__host__ __device__ inline void store_vector(C* target, const float (&x)[kVector]) {
  alignas(16) C values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) from_float(x[i], values + i);
  *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(values);
}

// every load is issued before the first use, so that kUnroll vectors are in flight
template <typename P, typename C>
__host__ __device__ inline void update_vectors(float* ema, const P* p, C* copy, int thread, float weight, float decay) {
  float e[kUnroll][kVector], q[kUnroll][kVector];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (u * kThreads + thread) * kVector;
    load_vector(ema + at, e[u]);
    load_vector(p + at, q[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (u * kThreads + thread) * kVector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) e[u][i] = lerp(e[u][i], q[u][i], weight, decay);
    store_vector(ema + at, e[u]);
    if constexpr (!std::is_same_v<C, None>) store_vector(copy + at, e[u]);
  }
}

__host__ __device__ inline bool is_aligned(const void* x) {
  return reinterpret_cast<uintptr_t>(x) % sizeof(uint4) == 0;
}

// What one thread of one block does. No thread needs another, so the host can run them one by one in tests.
template <typename P, typename C>
__host__ __device__ inline void update_chunk(const Table& table, int chunk, int thread, float weight, float decay) {
  int index = 0;
  for (int end = table.num_tensors; end - index > 1;) {
    const int middle = (index + end) / 2;
    if (table.first_chunk[middle] <= chunk) index = middle;
    else end = middle;
  }
  const int64_t start = static_cast<int64_t>(chunk - table.first_chunk[index]) * kChunk;
  const int64_t left = table.numel[index] - start;
  float* ema = table.ema[index] + start;
  const P* p = static_cast<const P*>(table.p[index]) + start;
  C* copy = nullptr;
  if constexpr (!std::is_same_v<C, None>) copy = static_cast<C*>(table.copy[index]) + start;

  if (left >= kChunk && is_aligned(ema) && is_aligned(p) && is_aligned(copy)) {
    update_vectors(ema, p, copy, thread, weight, decay);
    return;
  }
  for (int i = thread; i < kChunk && i < left; i += kThreads) {
    const float x = lerp(ema[i], to_float(p[i]), weight, decay);
    ema[i] = x;
    if constexpr (!std::is_same_v<C, None>) from_float(x, copy + i);
  }
}

template <typename P, typename C>
__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Table table, float weight, float decay) {
  update_chunk<P, C>(table, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), weight, decay);
}

struct Operands {
  std::vector<int64_t> ema, p, copy, numel;  // addresses; copy is empty without copies
  float weight, decay;
};

struct RunCpu {
  template <typename P, typename C>
  void run(const Operands& x) const {
    for (size_t i = 0; i < x.ema.size(); ++i) {
      C* copy = x.copy.empty() ? nullptr : reinterpret_cast<C*>(x.copy[i]);
      update_cpu(reinterpret_cast<float*>(x.ema[i]), reinterpret_cast<const P*>(x.p[i]), copy, x.numel[i], x.weight,
                 x.decay);
    }
  }
};

// Fills one table after the other with the tensors and hands each to launch(table, number of chunks).
template <typename Launch>
void for_each_table(const Operands& x, const Launch& launch) {
  Table table{};
  int64_t num_chunks = 0;
  for (size_t i = 0; i < x.ema.size(); ++i) {
    const int64_t added = (x.numel[i] + kChunk - 1) / kChunk;
    if (table.num_tensors == kMaxTensors || num_chunks + added > INT32_MAX) {
      if (num_chunks > 0) launch(table, static_cast<int>(num_chunks));
      table.num_tensors = 0;
      num_chunks = 0;
    }
    const int n = table.num_tensors++;
    table.ema[n] = reinterpret_cast<float*>(x.ema[i]);
    table.p[n] = reinterpret_cast<const void*>(x.p[i]);
    table.copy[n] = x.copy.empty() ? nullptr : reinterpret_cast<void*>(x.copy[i]);
    table.numel[n] = x.numel[i];
    table.first_chunk[n] = static_cast<int>(num_chunks);
    num_chunks += added;
  }
  if (num_chunks > 0) launch(table, static_cast<int>(num_chunks));
}

struct RunEmulated {
  template <typename P, typename C>
  void run(const Operands& x) const {
    for_each_table(x, [&](const Table& table, int num_chunks) {
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        for (int thread = 0; thread < kThreads; ++thread) update_chunk<P, C>(table, chunk, thread, x.weight, x.decay);
      }
    });
  }
};

struct RunCuda {
  cudaStream_t stream;

  template <typename P, typename C>
  void run(const Operands& x) const {
    for_each_table(x, [&](const Table& table, int num_chunks) {
      ema_kernel<P, C><<<num_chunks, kThreads, 0, stream>>>(table, x.weight, x.decay);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) throw std::runtime_error(std::string("ema_update: ") + cudaGetErrorString(error));
    });
  }
};

template <typename P, typename Runner>
void dispatch_copy(const Operands& x, DType copy, const Runner& runner) {
  switch (copy) {
    case DType::kNone: return runner.template run<P, None>(x);
    case DType::kBFloat16: return runner.template run<P, __nv_bfloat16>(x);
    case DType::kFloat16: return runner.template run<P, __half>(x);
    default: throw std::invalid_argument("expected copies of bf16 or fp16");
  }
}

template <typename Runner>
void dispatch(const Operands& x, DType p, DType copy, const Runner& runner) {
  const size_t n = x.ema.size();
  if (x.p.size() != n || x.numel.size() != n || x.copy.size() != (copy == DType::kNone ? 0 : n)) {
    throw std::invalid_argument("expected as many params, copies and numels as ema");
  }
  switch (p) {
    case DType::kFloat32: return dispatch_copy<float>(x, copy, runner);
    case DType::kBFloat16: return dispatch_copy<__nv_bfloat16>(x, copy, runner);
    case DType::kFloat16: return dispatch_copy<__half>(x, copy, runner);
    default: throw std::invalid_argument("expected params of fp32, bf16 or fp16");
  }
}

using List = std::vector<int64_t>;

Operands operands(List ema, List p, List copy, List numel, double decay) {
  return {std::move(ema), std::move(p), std::move(copy), std::move(numel), float(1 - decay), float(decay)};
}

void ema_update_cpu(List ema, List p, List copy, List numel, DType p_type, DType copy_type, double decay) {
  dispatch(operands(ema, p, copy, numel, decay), p_type, copy_type, RunCpu{});
}

void ema_update_emulated(List ema, List p, List copy, List numel, DType p_type, DType copy_type, double decay) {
  dispatch(operands(ema, p, copy, numel, decay), p_type, copy_type, RunEmulated{});
}

void ema_update(List ema, List p, List copy, List numel, DType p_type, DType copy_type, double decay, int64_t stream) {
  const RunCuda runner{reinterpret_cast<cudaStream_t>(stream)};
  dispatch(operands(ema, p, copy, numel, decay), p_type, copy_type, runner);
}

}  // namespace

PYBIND11_MODULE(_ema_cuda, m) {
  m.doc() = "Multi-tensor EMA over raw addresses; sra_fast.ops.ema_update_ checks and groups the tensors.";
  pybind11::enum_<DType>(m, "DType")
      .value("none", DType::kNone)
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  m.attr("MAX_TENSORS") = kMaxTensors;
  m.attr("CHUNK") = kChunk;
  m.def("ema_update_cpu", &ema_update_cpu, "Update tensors in host memory; the reference of ema_update.");
  m.def("ema_update_emulated", &ema_update_emulated, "The device code on host memory, thread by thread; for tests.");
  m.def("ema_update", &ema_update, "Update tensors of the current device on `stream` (a cudaStream_t).");
}
