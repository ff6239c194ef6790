// y_t = SiLU(sum_s w_s x_{t-s}), and where a stream is normalised y / sqrt(sum over the head of y^2 + eps); CONVOLVE = 0: the
// norm of x alone. `normalized` has a bit a stream. Also writes the last width - 1 inputs of every sequence.
#include "short_conv.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    short_conv_forward(const Element* x0, const Element* x1, const Element* x2, const float* w0, const float* w1, const float* w2,
                       const float* s0, const float* s1, const float* s2, Element* y0, Element* y1, Element* y2, float* f0,
                       float* f1, float* f2, const int* bounds, long long row_step, long long token_step, int batch, int length,
                       int channels, int sequences, int width, int normalized) {
  const Place at(batch, length, channels, RUN);
  if (at.start >= length) return;
  const Element* x = choose(at.stream, x0, x1, x2) + at.row * row_step + at.channel;
  Element* y = choose(at.stream, y0, y1, y2) + static_cast<long long>(at.row) * length * channels + at.channel;
  const States states{choose(at.stream, s0, s1, s2), width, channels, at.channel};
  float* final = choose(at.stream, f0, f1, f2);
  const bool norm = !CONVOLVE || (normalized >> at.stream & 1);
  const int stop = min(length, at.start + RUN);

  const auto pass = [&](int n) {
    for (int lag = 1; lag < width; ++lag) {
      if (at.inside) store_floats<N>(final + states.offset(n, lag), states.before(n, lag));
    }
  };
  Walk walk(bounds, sequences, length, at.row, at.start, pass);

  Numbers4 taps[TAPS], window[PAST + GROUP];
  load_taps(taps, choose(at.stream, w0, w1, w2), width, at.channel);
  Few ahead[GROUP];
#pragma unroll
  for (int j = 0; j < GROUP; ++j) {
    if (at.start + j < stop) fetch(ahead[j], x + (at.start + j) * token_step);
  }
#pragma unroll
  for (int lag = 1; lag <= PAST; ++lag) {
    const int token = at.start - lag;
    window[PAST - lag] = token >= walk.begin ? load_numbers<N>(x + token * token_step) : states.before(walk.n, walk.begin - token);
  }

  for (int first = at.start; first < stop; first += GROUP) {
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      window[PAST + j] = numbers<N>(Element{}, ahead[j]);
      if (first + GROUP + j < stop) fetch(ahead[j], x + (first + GROUP + j) * token_step);
    }
    Numbers4 out[GROUP];
    float squares[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      out[j] = filtered(taps, window + j);
      squares[j] = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if constexpr (CONVOLVE) out[j].x[i] *= sigmoid(out[j].x[i]);
        squares[j] = fmaf(out[j].x[i], out[j].x[i], squares[j]);
      }
      if (PAST > 0 && first + j == walk.end - 1) {
#pragma unroll
        for (int lag = 1; lag <= PAST; ++lag) {
          if (at.inside && lag < width) store_floats<N>(final + states.offset(walk.n, lag), window[PAST + j + 1 - lag]);
        }
        walk.advance(pass);
        if (first + j + 1 < stop) {
#pragma unroll
          for (int lag = 1; lag <= PAST; ++lag) window[PAST + j + 1 - lag] = states.before(walk.n, lag);
        }
      }
    }
    if (norm) {
#pragma unroll
      for (int j = 0; j < GROUP; ++j) squares[j] = rsqrtf(sum_over_lanes<LANES>(squares[j]) + EPS);
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[j].x[i] *= squares[j];
      }
    }
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      if (at.inside && first + j < stop) store_numbers<N>(y + static_cast<long long>(first + j) * channels, out[j]);
    }
#pragma unroll
    for (int p = 0; p < PAST; ++p) window[p] = window[GROUP + p];
  }
}
