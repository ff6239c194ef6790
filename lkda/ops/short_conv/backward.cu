// Gradients of x, of the states before the sequences and of the filter, from the gradient of y and of the last inputs.
//
//     dz = (gradient of y through the norm) * silu'(z)        dx_t = sum_s w_s dz_{t+s}        dw_s = sum_t dz_t x_{t-s}
//
// z is computed again from x. A warp goes on for three tokens beyond its own, because their dz depends on its last tokens. The
// filter's gradient is summed in a fixed order: over a warp's tokens, over the block's warps, and (column_sums.cu) over the blocks,
// from partials [rows * times, streams, channels, width]. The tokens of x have a stride of token_step, those of dx one of dx_step; all
// other tensors are contiguous.
#include "short_conv.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    short_conv_backward(const Element* x0, const Element* x1, const Element* x2, const Element* g0, const Element* g1,
                        const Element* g2, const float* w0, const float* w1, const float* w2, const float* s0, const float* s1,
                        const float* s2, const float* e0, const float* e1, const float* e2, Element* dx0, Element* dx1,
                        Element* dx2, float* ds0, float* ds1, float* ds2, float* partials, const int* bounds,
                        long long row_step, long long token_step, long long dx_step, int batch, int length, int channels, int sequences, int width,
                        int normalized, int streams) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Place at(batch, length, channels);
  const long long row = static_cast<long long>(at.row) * length * channels + at.channel;
  const Element* x = choose(at.stream, x0, x1, x2) + at.row * row_step + at.channel;
  const Element* gradient = choose(at.stream, g0, g1, g2) + row;
  Element* dx = choose(at.stream, dx0, dx1, dx2) + at.row * dx_step * length + at.channel;
  float* dstates = choose(at.stream, ds0, ds1, ds2);
  const States states{choose(at.stream, s0, s1, s2), width, channels, at.channel};
  const States lasts{choose(at.stream, e0, e1, e2), width, channels, at.channel};  // gradients of the last inputs
  const bool norm = !CONVOLVE || (normalized >> at.stream & 1);
  const int own = min(length, at.start + RUN);  // the first token that is another warp's

  Channels dtaps[TAPS];
#pragma unroll
  for (int s = 0; s < TAPS; ++s) dtaps[s] = zeros();

  if (at.start < length) {
    const auto pass = [&](int n) {
      for (int lag = 1; lag < width; ++lag) {
        if (at.inside && dstates != nullptr) store_floats<N>(dstates + states.offset(n, lag), lasts.before(n, lag));
      }
    };
    Channels taps[TAPS];
    load_taps(taps, choose(at.stream, w0, w1, w2), width, at.channel);
    Walk walk(bounds, sequences, length, at.row, at.start, pass);

    // One sequence's tokens at a time: this warp's, and where the sequence goes on up to three beyond. At a sequence's end as
    // many steps without a token bring out the last sums.
    for (int start = at.start; start < own;) {
      const int end = min(walk.end, own + PAST), steps = end == walk.end ? end + PAST : end;
      // The gradient of the input at a token, which may lie before the sequence's first: then it is the state's.
      const auto emit = [&](int token, Channels value) {
        if (token + PAST >= end && lasts.holds(end - token)) {
          const Channels last = lasts.before(walk.n, end - token);
#pragma unroll
          for (int i = 0; i < N; ++i) value.x[i] += last.x[i];
        }
        if (token >= start) {
          if (token < own) store_numbers<N>(dx + token * dx_step, value);
        } else if (walk.begin == start && dstates != nullptr && start - token < width) {
          store_floats<N>(dstates + states.offset(walk.n, start - token), value);
        }
      };
      Reader reader(x, start, end, token_step), upper(gradient, start, end, channels);
      Channels window[PAST + GROUP], sums[PAST + GROUP];  // sums: dx of window's tokens as far as it is known
      load_past(window, x, token_step, start, walk, states);
#pragma unroll
      for (int p = 0; p < PAST; ++p) sums[p] = zeros();

      Element* to = dx + (start - PAST) * dx_step;
      for (int first = start; first < steps; first += GROUP, to += GROUP * dx_step) {
        // Whether all that comes out are gradients of this warp's tokens, with nothing to add.
        const bool plain = at.inside && first - PAST >= start && first + GROUP <= end && first + GROUP - PAST <= own;
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
          const int token = first + j;
          window[PAST + j] = reader.take(j);
          sums[PAST + j] = zeros();
          Channels dz = upper.take(j), slope, y = filtered(taps, window + j);
          if constexpr (CONVOLVE) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
              const float s = sigmoid(y.x[i]);
              y.x[i] *= s;
              slope.x[i] = fmaf(y.x[i], 1.f - s, s);
            }
          }
          if (norm) {
            float squares = 0.f, along = 0.f;
#pragma unroll
            for (int i = 0; i < N; ++i) {
              squares = fmaf(y.x[i], y.x[i], squares);
              along = fmaf(y.x[i], dz.x[i], along);
            }
            const float r = rsqrtf(sum_over_lanes<LANES>(squares) + EPS);
            const float back = sum_over_lanes<LANES>(along) * r * r;
#pragma unroll
            for (int i = 0; i < N; ++i) dz.x[i] = r * fmaf(-back, y.x[i], dz.x[i]);
          }
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if constexpr (CONVOLVE) dz.x[i] *= slope.x[i];
#pragma unroll
            for (int s = 0; s < TAPS; ++s) sums[PAST + j - s].x[i] = fmaf(taps[s].x[i], dz.x[i], sums[PAST + j - s].x[i]);
          }
          if (CONVOLVE && token < own) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
              for (int s = 0; s < TAPS; ++s) dtaps[s].x[i] = fmaf(dz.x[i], window[PAST + j - s].x[i], dtaps[s].x[i]);
            }
          }
          if (plain) {
            store_numbers<N>(to + j * dx_step, sums[j]);
          } else if (at.inside && token < steps) {
            emit(token - PAST, sums[j]);
          }
        }
#pragma unroll
        for (int p = 0; p < PAST; ++p) {
          window[p] = window[GROUP + p];
          sums[p] = sums[GROUP + p];
        }
      }
      if (end == walk.end && end <= own) walk.advance(pass);
      start = end;
    }
  }

  if constexpr (CONVOLVE) {
    float4* shared = reinterpret_cast<float4*>(shared_memory);  // [WARPS][N][32 lanes], the taps of a channel
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      shared[(warp * N + i) * 32 + lane] = {dtaps[3 % TAPS].x[i], dtaps[2 % TAPS].x[i], dtaps[1 % TAPS].x[i], dtaps[0].x[i]};
    }
    __syncthreads();
    if (threadIdx.x >= 32 * N) return;
    float4 sum = shared[threadIdx.x];
    for (int other = 1; other < WARPS; ++other) {
      const float4 more = shared[other * N * 32 + threadIdx.x];
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    if (!at.inside) return;
    const int channel = at.channel + warp;  // of the lane's N, this thread has one
    const long long line = static_cast<long long>(at.row) * at.times + at.time;
    float* to = partials + ((line * streams + at.stream) * channels + channel) * width;
    const float oldest_first[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (s >= 4 - width) to[s - (4 - width)] = oldest_first[s];
    }
  }
}
