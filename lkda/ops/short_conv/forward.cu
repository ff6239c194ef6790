// y_t = SiLU(sum_s w_s x_{t-s}); in a normalised stream y / sqrt(sum over the head of y^2 + eps). With CONVOLVE = 0 the norm of x alone.
// `normalized` has one bit per stream. Also writes the last width - 1 inputs of each sequence.
#include "short_conv.cuh"

using Result = RESULT;  // y's type: Element, or float16 for normalised heads, of which it keeps more bits

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    short_conv_forward(const Element* x0, const Element* x1, const Element* x2, const float* w0, const float* w1, const float* w2,
                       const float* s0, const float* s1, const float* s2, Result* y0, Result* y1, Result* y2, float* f0,
                       float* f1, float* f2, const int* bounds, long long row_step, long long token_step, int batch, int length,
                       int channels, int sequences, int width, int normalized) {
  const Place at(batch, length, channels);
  if (at.start >= length) return;
  const Element* x = choose(at.stream, x0, x1, x2) + at.row * row_step + at.channel;
  Result* y = choose(at.stream, y0, y1, y2) + static_cast<long long>(at.row) * length * channels + at.channel;
  const States states{choose(at.stream, s0, s1, s2), width, channels, at.channel};
  float* final = choose(at.stream, f0, f1, f2);
  const bool norm = !CONVOLVE || (normalized >> at.stream & 1);
  const int stop = min(length, at.start + RUN);

  const auto pass = [&](int n) {
    for (int lag = 1; lag < width; ++lag) {
      if (at.inside) store_floats<N>(final + states.offset(n, lag), states.before(n, lag));
    }
  };
  Channels taps[TAPS];
  load_taps(taps, choose(at.stream, w0, w1, w2), width, at.channel);
  Walk walk(bounds, sequences, length, at.row, at.start, pass);

  // The tokens of one sequence at a time, as far as this warp has them.
  for (int start = at.start; start < stop;) {
    const int end = min(walk.end, stop);
    Reader reader(x, start, end, token_step);
    Channels window[PAST + GROUP];
    load_past(window, x, token_step, start, walk, states);
    Result* to = y + static_cast<long long>(start) * channels;
    for (int first = start; first < end; first += GROUP, to += GROUP * channels) {
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
        window[PAST + j] = reader.take(j);
        Channels out = filtered(taps, window + j);
        if constexpr (CONVOLVE) {
#pragma unroll
          for (int i = 0; i < N; ++i) out.x[i] *= sigmoid(out.x[i]);
        }
        if (norm) {
          float squares = 0.f;
#pragma unroll
          for (int i = 0; i < N; ++i) squares = fmaf(out.x[i], out.x[i], squares);
          const float r = rsqrtf(sum_over_lanes<LANES>(squares) + EPS);
#pragma unroll
          for (int i = 0; i < N; ++i) out.x[i] *= r;
        }
        if (at.inside && first + j < end) store_numbers<N>(to + j * channels, out);
      }
#pragma unroll
      for (int p = 0; p < PAST; ++p) window[p] = window[GROUP + p];
    }
    if (end == walk.end) {
      for (int lag = 1; lag < width; ++lag) {
        if (at.inside) store_floats<N>(final + states.offset(walk.n, lag), input_at(x, token_step, end - lag, walk, states));
      }
      walk.advance(pass);
    }
    start = end;
  }
}
