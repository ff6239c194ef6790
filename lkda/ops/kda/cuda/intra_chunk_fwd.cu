// Forward inside each chunk: everything that does not depend on the state. One block per chunk and head, all chunks in parallel.
//
//   E_t = exp(g_t)    Akk_ij = sum_d k_i k_j decay(j..i), j < i    Aqk_ij = sum_d q_i k_j decay(j..i), j <= i
//   T = (I + B Akk)^-1 = I + B T~,  B = diag(beta)
//
// decay(j..i) is the product of E over (j, i]. It is never computed as a quotient of running products. Instead each pair (i, j)
// belongs to the smallest group of 2h tokens, h = 8, 16 or 32, that has j in its first half and i in its second. With f_i the
// product of E from the boundary of the halves through i, and f_j the product after j up to it, both <= 1, decay = f_i f_j. So
// each level of the tree is a product of two matrices of rounded numbers <= |k|. Pairs inside 8 tokens are summed in float32.
//
// For heads of 128 in half precision on Hopper there is intra_chunk_fwd_helpers.cu.
#include "kda_intra_chunk.cuh"

static_assert(Shared::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// q, k: [rows, H, D] Element. g: [rows, H, D], beta: [rows, H] float32. workspaces: [chunks, H] ChunkWorkspace, result. An item is
// one chunk of one head, items = chunks x H. A block takes item blockIdx.x, then every gridDim.x-th, and reads the inputs of the
// next one while it computes.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kda_intra_chunk_fwd(
    const Element* q, const Element* k, const float* g, const float* beta, char* workspaces, const int4* spans, int items, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);

  struct {
    __device__ __forceinline__ unsigned thread() const { return threadIdx.x; }
    __device__ __forceinline__ int opaque_thread() const { return opaque(threadIdx.x); }
    __device__ __forceinline__ void wait() const { __syncthreads(); }
  } const block;
  const int channel = threadIdx.x % (D / 2) * 2, leaf = threadIdx.x / (D / 2);

  bool exists = false;
  Leaf<float> nats;
  Leaf<Element> qs, ks;
  float own_beta = 0.f;  // of token threadIdx.x
  auto ask = [&](int item) {
    const int channel = opaque(threadIdx.x) % (D / 2) * 2, leaf = opaque(threadIdx.x) / (D / 2);
    const Span span = span_of(item / heads, length, spans);
    exists = span.tokens > 0;
    if (!exists) return;
    nats.read(g, span, heads, item % heads, leaf, channel);
    qs.read(q, span, heads, item % heads, leaf, channel);
    ks.read(k, span, heads, item % heads, leaf, channel);
    if (threadIdx.x < C) own_beta = threadIdx.x < span.tokens ? beta[static_cast<long long>(span.start + threadIdx.x) * heads + item % heads] : 0.f;
  };
  ask(blockIdx.x);
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (!exists) {
      if (item + gridDim.x < items) ask(item + gridDim.x);
      continue;
    }
    auto workspace_of = [&](int item) { return workspaces + static_cast<long long>(item) * ChunkWorkspace::bytes; };
    char* workspace = workspace_of(item);
    if (threadIdx.x < C) {
      reinterpret_cast<float*>(shared + Shared::beta)[threadIdx.x] = own_beta;
      reinterpret_cast<float*>(workspace + ChunkWorkspace::beta)[threadIdx.x] = own_beta;
    }
    Gates gates;
    gates.set(nats);
    Gates::share(nats, reinterpret_cast<float*>(shared + Shared::leaf_logs), leaf, channel);
    block.wait();  // the workspace of the item before has been copied out

    const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
    Reach reach;
    float2 near[LEVELS];  // the reach on each level
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      near[level] = reach.at(level, leaf);
#if __CUDA_ARCH__ < 900  // for fewer registers; the compiler for later architectures does better without it
      reach.widen(leaf_logs, level, opaque(leaf), channel);
#else
      reach.widen(leaf_logs, level, leaf, channel);
#endif
    }
    reach.before = exp2_fast(reach.before);
    reach.after = exp2_fast(reach.after);
    float2 near_k[LEAF], near_q[LEAF];  // times the product inside the leaf
    gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) {
      near_k[i] = times(f, ks[i]);
      near_q[i] = times(make_float2(scale * f.x, scale * f.y), qs[i]);
    });
    char* k_in = Rows::from(workspace + ChunkWorkspace::k_in, leaf * LEAF);
    char* qg = Rows::from(workspace + ChunkWorkspace::qg, leaf * LEAF);
    char* kg = Rows::from(workspace + ChunkWorkspace::kg, leaf * LEAF);
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (Level::is_row(level, leaf)) {
        Level::write_rows(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_k, false);
        Level::write_rows(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_q, true);
      }
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      store_pair(Rows::at(k_in, i, channel), times(reach.before, near_k[i]));
      store_pair(Rows::at(qg, i, channel), times(reach.before, near_q[i]));
    }
    gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { near_k[j] = times(f, ks[j]); });
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (!Level::is_row(level, leaf)) Level::write_columns(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_k);
#pragma unroll
    for (int j = 0; j < LEAF; ++j) store_pair(Rows::at(kg, j, channel), times(reach.after, near_k[j]));
    leaf_pairs(block, shared, shared + Shared::pairs, leaf, gates, qs, ks, scale);
    workspace = workspace_of(opaque(item));  // computed again, to save registers
    if (item + gridDim.x < items) ask(item + gridDim.x);
    pairs_and_inverse(block, shared, shared + Shared::pairs, workspace, 1.f);
    block.wait();
    copy_pairs<THREADS>(shared + Shared::pairs, block.opaque_thread(), workspace);
  }
}
