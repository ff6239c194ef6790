// What the forward and the backward of the short convolution share: which tokens and channels a thread has, and the sequences that
// it goes through.
//
// A warp goes through RUN tokens of 32 N channels, one token after another, with the past inputs that the taps need in registers. Up
// to three tensors (q, k and v) of one shape go through one launch; they are streams 0, 1 and 2. In a packed row, sequence n has
// the tokens [bounds[n], bounds[n + 1]). Where bounds is null every row is one sequence.
#pragma once
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = CHANNELS;                 // channels per thread
constexpr int TAPS = CONVOLVE ? 4 : 1;      // the maximum; a narrower filter has zeros for the oldest inputs
constexpr int PAST = TAPS - 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // for these the compiler runs out of registers
constexpr int GROUP = AHEAD < 2 ? AHEAD : 2;  // tokens that are loaded together
#else
constexpr int GROUP = AHEAD;
#endif
constexpr int WARPS = 8;
constexpr int LANES = HEAD_DIM / N;         // lanes per head
constexpr float EPS = 1e-6f;                // of the norm

using Channels = Numbers<N>;
using Few = Raw<N * static_cast<int>(sizeof(Element))>;

template <class T>
__device__ __forceinline__ T choose(int stream, T a, T b, T c) {
  return stream == 0 ? a : stream == 1 ? b : c;
}

__device__ __forceinline__ Channels zeros() {
  Channels x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.x[i] = 0.f;
  return x;
}

// The part of the batch that a thread has. Blocks are numbered by stream, row of the batch, WARPS runs of tokens, and 32 N channels;
// the last one varies fastest.
struct Place {
  int stream, row, start, channel, times, time;
  bool inside;  // lanes past the last channel compute channel 0 and store nothing

  __device__ Place(int batch, int length, int channels) {
    const int columns = (channels + 32 * N - 1) / (32 * N);
    times = (length + WARPS * RUN - 1) / (WARPS * RUN);
    int block = blockIdx.x;
    const int column = block % columns;
    block /= columns;
    time = block % times;
    block /= times;
    row = block % batch;
    stream = block / batch;
    start = (time * WARPS + static_cast<int>(threadIdx.x) / 32) * RUN;
    channel = (column * 32 + static_cast<int>(threadIdx.x) % 32) * N;
    inside = channel < channels;
    if (!inside) channel = 0;
  }
};

// The sequence that a token belongs to.
struct Walk {
  const int* bounds;
  int count, length, n, begin, end;

  // Calls pass(m) for each empty sequence m before the row's first token.
  template <class Pass>
  __device__ Walk(const int* bounds, int count, int length, int row, int token, Pass pass) : bounds(bounds), count(count), length(length) {
    if (bounds == nullptr) {
      n = row;
      begin = 0;
      end = length;
    } else if (token == 0) {
      n = -1;
      end = 0;
      advance(pass);
    } else {
      n = 0;
      for (int above = count; above - n > 1;) {
        const int middle = (n + above) / 2;
        if (bounds[middle] <= token) {
          n = middle;
        } else {
          above = middle;
        }
      }
      begin = bounds[n];
      end = n + 1 < count ? bounds[n + 1] : length;
    }
  }

  // Goes to the next sequence that has tokens, and calls pass(m) for each empty one before it.
  template <class Pass>
  __device__ void advance(Pass pass) {
    if (bounds == nullptr) return;
    begin = end;
    for (++n; n < count; ++n) {
      end = n + 1 < count ? bounds[n + 1] : length;
      if (end > begin) return;
      pass(n);
    }
  }
};

// States are [sequences, width - 1, channels], the newest token last. They hold the inputs `lag` tokens before a sequence's first.
struct States {
  const float* data;
  int width, channels, channel;

  __device__ bool holds(int lag) const { return data != nullptr && lag < width; }
  __device__ long long offset(int n, int lag) const {
    return (static_cast<long long>(n) * (width - 1) + width - 1 - lag) * channels + channel;
  }
  __device__ Channels before(int n, int lag) const { return holds(lag) ? load_floats<N>(data + offset(n, lag)) : zeros(); }
};

// The input at a token of the walk's sequence, or before its first one.
__device__ __forceinline__ Channels input_at(const Element* x, long long step, int token, const Walk& walk, const States& states) {
  return token >= walk.begin ? load_numbers<N>(x + token * step) : states.before(walk.n, walk.begin - token);
}

// window[PAST - lag]: the input `lag` tokens before `start`.
__device__ __forceinline__ void load_past(Channels* window, const Element* x, long long step, int start, const Walk& walk,
                                          const States& states) {
#pragma unroll
  for (int lag = 1; lag <= PAST; ++lag) window[PAST - lag] = input_at(x, step, start - lag, walk, states);
}

// Reads tokens start to end of one tensor, one after another, and loads the next GROUP ahead. From the end on it returns zeros.
struct Reader {
  const Element* from;
  long long step;
  int left;
  Few ahead[GROUP];

  __device__ __forceinline__ Reader(const Element* x, int start, int end, long long step)
      : from(x + start * step), step(step), left(end - start) {
#pragma unroll
    for (int j = 0; j < GROUP; ++j) send(j);
  }
  __device__ __forceinline__ void send(int j) {
    if (left > 0) {
      fetch(ahead[j], from);
    } else {
      ahead[j] = Few{};
    }
    from += step;
    --left;
  }
  // The next token, whose number from `start` on is j modulo GROUP.
  __device__ __forceinline__ Channels take(int j) {
    const Channels x = numbers<N>(Element{}, ahead[j]);
    send(j);
    return x;
  }
};

// Loads the filter [channels, width], the newest token last; taps[s] becomes the factor of the input s tokens ago.
__device__ __forceinline__ void load_taps(Channels (&taps)[TAPS], const float* weight, int width, int channel) {
  if constexpr (!CONVOLVE) {
#pragma unroll
    for (int i = 0; i < N; ++i) taps[0].x[i] = 1.f;
  } else {
    const float* from = weight + static_cast<long long>(channel) * width;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (width == TAPS) {
        const float4 w = *reinterpret_cast<const float4*>(from + i * TAPS);
        taps[3 % TAPS].x[i] = w.x;
        taps[2 % TAPS].x[i] = w.y;
        taps[1 % TAPS].x[i] = w.z;
        taps[0].x[i] = w.w;
      } else {
#pragma unroll
        for (int s = 0; s < TAPS; ++s) taps[s].x[i] = s < width ? from[i * width + width - 1 - s] : 0.f;
      }
    }
  }
}

// sum_s taps_s x_{t-s}; window[PAST] is x_t.
__device__ __forceinline__ Channels filtered(const Channels (&taps)[TAPS], const Channels* window) {
  Channels z;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z.x[i] = taps[0].x[i] * window[PAST].x[i];
#pragma unroll
    for (int s = 1; s < TAPS; ++s) z.x[i] = fmaf(taps[s].x[i], window[PAST - s].x[i], z.x[i]);
  }
  return z;
}
