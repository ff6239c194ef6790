// Sampling of a token from a row of logits on a CPU, as reference.py defines it. cpu.py calls it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "elementwise.h"

namespace {

constexpr float UNIT = 1099511627776.0f;  // 2^40
// Weights are in [0, 1]. Buckets of those whose leading bits (exponent and 4 of the mantissa) agree: up to those of 1.
constexpr int SHIFT = 19;
constexpr int BUCKETS = (0x3f800000 >> SHIFT) + 1;

struct Options {
    double temperature;
    int64_t top_k;  // 0: all tokens
    double top_p, min_p;
};

// Number `position` of the SplitMix64 generator that `key` begins, in [0, 1).
double uniform(uint64_t key, uint64_t position) {
    uint64_t z = key + (position + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

int bucket(float weight) {
    int32_t bits;
    std::memcpy(&bits, &weight, sizeof(bits));
    return bits >> SHIFT;
}

// The weights of the tokens of a row, and their counts: weights in units of 2^-40.
class Row {
  public:
    Row(int64_t V, bool likeliest) : V_(V), weights_(likeliest ? 0 : V), counts_(likeliest ? 0 : V) {}

    int64_t sample(const float* logits, int64_t key, int64_t position, const Options& options) {
        float largest = -INFINITY;
        int64_t likeliest = 0;
        for (int64_t i = 0; i < V_; i++) {
            if (std::isnan(logits[i])) return -1;
            if (logits[i] > largest) {
                largest = logits[i];
                likeliest = i;
            }
        }
        if (!std::isfinite(largest)) return -1;
        if (options.temperature == 0) return likeliest;
        weigh(logits, largest, static_cast<float>(options.temperature));
        if (options.top_k && options.top_k < V_) keep_likeliest(options.top_k);
        if (options.top_p < 1) keep_nucleus(options.top_p);
        if (options.min_p > 0)
            for (int64_t i = 0; i < V_; i++) counts_[i] = weights_[i] < float(options.min_p) ? 0 : counts_[i];
        int64_t all = total();
        int64_t drawn = std::min(static_cast<int64_t>(uniform(key, position) * static_cast<double>(all)), all - 1);
        int64_t below = 0;
        for (int64_t i = 0; i < V_; i++) {
            below += counts_[i];
            if (below > drawn) return i;
        }
        return V_ - 1;
    }

  private:
    void weigh(const float* logits, float largest, float temperature) {
#pragma omp simd
        for (int64_t i = 0; i < V_; i++) {
            weights_[i] = exponential((logits[i] - largest) / temperature);
            counts_[i] = static_cast<int64_t>(weights_[i] * UNIT);
        }
    }

    int64_t total() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < V_; i++) sum += counts_[i];
        return sum;
    }

    void keep_likeliest(int64_t top_k) {
        std::vector<float> sorted(weights_);
        std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<float>());
        for (int64_t i = 0; i < V_; i++) counts_[i] = weights_[i] < sorted[top_k - 1] ? 0 : counts_[i];
    }

    // Finds the bucket in which the sum of the likeliest tokens reaches its share, and sorts that bucket alone.
    void keep_nucleus(double top_p) {
        int64_t needed = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(static_cast<double>(total()) * top_p)));
        std::vector<int64_t> sums(BUCKETS), inside;
        for (int64_t i = 0; i < V_; i++) sums[bucket(weights_[i])] += counts_[i];
        int at = BUCKETS - 1;
        for (; at > 0 && sums[at] < needed; at--) needed -= sums[at];
        for (int64_t i = 0; i < V_; i++)
            if (bucket(weights_[i]) == at) inside.push_back(counts_[i]);
        std::sort(inside.begin(), inside.end(), std::greater<int64_t>());
        int64_t least = 0;
        for (int64_t count : inside) {
            least = count;
            needed -= count;
            if (needed <= 0) break;
        }
        for (int64_t i = 0; i < V_; i++) counts_[i] = counts_[i] < least ? 0 : counts_[i];
    }

    int64_t V_;
    std::vector<float> weights_;
    std::vector<int64_t> counts_;
};

}  // namespace

extern "C" void sample(int64_t B, int64_t V, const float* logits, const int64_t* keys, const int64_t* positions,
                       double temperature, int64_t top_k, double top_p, double min_p, int64_t* tokens, int64_t threads) {
#pragma omp parallel num_threads(threads < B ? threads : B)
    {
        Row row(V, temperature == 0);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++)
            tokens[b] = row.sample(logits + b * V, keys[b], positions[b], {temperature, top_k, top_p, min_p});
    }
}
