// The recurrence of Kimi Delta Attention on a CPU, forward and backward. core.py calls it.
//
//     S'_t = Diag(E_t) S_{t-1}    r_t = v_t - S'_t^T k_t    c_t = beta_t r_t    S_t = S'_t + k_t c_t^T    o_t = S_t^T q_t
//
// The columns of S do not depend on each other. So one item of work is a sequence, a head and a block of LANES columns,
// whose state [K, LANES] stays in the first-level cache. Each token reads and writes the state once: the pass that
// finishes token t also decays the state for token t + 1 and starts its sum S'^T k. An item's result does not depend on
// the number of threads.
//
// The forward saves S' of every EVERY-th token. The backward computes S' of the tokens between again, EVERY at a time.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "vector.h"

namespace {

constexpr int EVERY = 16;
constexpr int VECTORS = 4;  // of a row of a block

// One row of a block's state: VECTORS vectors.
template <typename T>
struct Row {
    static constexpr int LANES = VECTORS * Vector<T>::W;
    typename Vector<T>::type x[VECTORS];
};

template <typename T>
Row<T> zeros() {
    return Row<T>{};
}

// `count` numbers of p, followed by zeros.
template <typename T>
Row<T> load(const T* p, int64_t count) {
    Row<T> row{};
    std::memcpy(&row, p, sizeof(T) * count);
    return row;
}

template <typename T>
void store(T* p, const Row<T>& row, int64_t count) {
    std::memcpy(p, &row, sizeof(T) * count);
}

template <typename T>
T dot(const Row<T>& a, const Row<T>& b) {
    auto sum = a.x[0] * b.x[0];
    for (int n = 1; n < VECTORS; n++) sum += a.x[n] * b.x[n];
    return total<T>(sum);
}

template <typename T>
Row<T> operator*(T factor, const Row<T>& a) {
    Row<T> row;
    for (int n = 0; n < VECTORS; n++) row.x[n] = factor * a.x[n];
    return row;
}

template <typename T>
Row<T> operator-(const Row<T>& a, const Row<T>& b) {
    Row<T> row;
    for (int n = 0; n < VECTORS; n++) row.x[n] = a.x[n] - b.x[n];
    return row;
}

// Memory of one thread, aligned for vectors.
template <typename X>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<X*>(std::aligned_alloc(64, (sizeof(X) * count + 63) / 64 * 64))) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator X*() { return data_; }

  private:
    X* data_;
};

// What all items share. Tensors of tokens are [rows, H, K], [rows, H, V] and [rows, H].
struct Shape {
    const int32_t* bounds;  // [N + 1]: sequence n has the rows bounds[n] to bounds[n + 1]
    int64_t N, H, K, V, rows;
};

// One item of work.
template <typename T>
struct Item {
    int64_t n, h, block, begin, end, first_column, columns, slot;

    Item(const Shape& s, int64_t index) {
        int64_t blocks = count_blocks(s);
        block = index % blocks;
        h = index / blocks % s.H;
        n = index / blocks / s.H;
        begin = s.bounds[n];
        end = s.bounds[n + 1];
        first_column = block * Row<T>::LANES;
        columns = s.V - first_column < Row<T>::LANES ? s.V - first_column : Row<T>::LANES;
        slot = begin / EVERY + n;  // no two sequences share a slot, wherever they begin
    }

    static int64_t count_blocks(const Shape& s) { return (s.V + Row<T>::LANES - 1) / Row<T>::LANES; }
    static int64_t count(const Shape& s) { return s.N * s.H * count_blocks(s); }

    int64_t key_row(const Shape& s, int64_t t) const { return (t * s.H + h) * s.K; }
    int64_t value_row(const Shape& s, int64_t t) const { return (t * s.H + h) * s.V + first_column; }
    int64_t state(const Shape& s) const { return (n * s.H + h) * s.K * s.V + first_column; }
    // Where S' of the token begin + EVERY * i is saved.
    int64_t saved(const Shape& s, int64_t i) const {
        return (((slot + i) * s.H + h) * count_blocks(s) + block) * s.K * Row<T>::LANES;
    }
};

// Finishes a token: S = S' + k c^T and o = S^T q. Starts the next one: S' = Diag(E) S and the sum S'^T k.
// `next_E` and `next_k` are null after the last token, where the result is S itself. Returns the sum.
template <bool OUTPUT, typename T>
inline Row<T> advance(int64_t K, const Row<T>* from, Row<T>* to, const T* k, const Row<T>& c, const T* q, Row<T>* o,
                      const T* next_E, const T* next_k) {
    Row<T> out = zeros<T>(), sum = zeros<T>();
    for (int64_t i = 0; i < K; i++) {
        T E = next_E ? next_E[i] : T(1), key = next_k ? next_k[i] : T(0);
        for (int n = 0; n < VECTORS; n++) {
            auto s = from[i].x[n] + k[i] * c.x[n];
            if (OUTPUT) out.x[n] += s * q[i];
            s *= E;
            sum.x[n] += s * key;
            to[i].x[n] = s;
        }
    }
    if (OUTPUT) *o = out;
    return sum;
}

template <typename T>
void forward_item(const Shape& s, const Item<T>& item, const T* q, const T* k, const T* v, const T* E, const T* beta,
                  T scale, const T* initial, T* o, T* final, T* saved) {
    Scratch<Row<T>> S(s.K);
    Row<T> sum = zeros<T>();
    bool empty = item.begin == item.end;
    for (int64_t i = 0; i < s.K; i++) {
        S[i] = initial ? load(initial + item.state(s) + i * s.V, item.columns) : zeros<T>();
        if (empty) continue;
        int64_t at = item.key_row(s, item.begin) + i;
        for (int n = 0; n < VECTORS; n++) {
            S[i].x[n] *= E[at];
            sum.x[n] += S[i].x[n] * k[at];
        }
    }
    for (int64_t t = item.begin; t < item.end; t++) {
        if (saved && (t - item.begin) % EVERY == 0)
            std::memcpy(saved + item.saved(s, (t - item.begin) / EVERY), S, sizeof(Row<T>) * s.K);
        int64_t key = item.key_row(s, t), next = item.key_row(s, t + 1), value = item.value_row(s, t);
        bool last = t + 1 == item.end;
        Row<T> c = beta[t * s.H + item.h] * (load(v + value, item.columns) - sum), out;
        sum = advance<true, T>(s.K, S, S, k + key, c, q + key, &out, last ? nullptr : E + next, last ? nullptr : k + next);
        store(o + value, scale * out, item.columns);
    }
    for (int64_t i = 0; i < s.K; i++) store(final + item.state(s) + i * s.V, S[i], item.columns);
}

// The tensors of the backward. The gradients dq, dk, dg and dbeta of a block are sums over its own columns only: they
// have a leading dimension of blocks, over which the caller sums.
template <typename T>
struct Backward {
    const T *q, *k, *v, *E, *beta, *dout, *dfinal, *saved;
    T scale;
    T *dq, *dk, *dv, *dg, *dbeta, *dinitial;
};

template <typename T>
void backward_item(const Shape& s, const Item<T>& item, const Backward<T>& b) {
    using Vec = typename Vector<T>::type;
    constexpr int W = Vector<T>::W;
    int64_t K = s.K, groups = (K + W - 1) / W;
    Scratch<Row<T>> dS(K), history(EVERY * K), r(EVERY);
    Scratch<Vec> sums(3 * groups * W);
    std::memset(sums, 0, sizeof(Vec) * 3 * groups * W);
    for (int64_t i = 0; i < K; i++)
        dS[i] = b.dfinal ? load(b.dfinal + item.state(s) + i * s.V, item.columns) : zeros<T>();

    // What the last token of the sequence adds to dS, and its dc = dS^T k. The main loop does it for the other tokens.
    Row<T> dout = zeros<T>(), dc = zeros<T>();
    if (item.begin < item.end) {
        dout = b.scale * load(b.dout + item.value_row(s, item.end - 1), item.columns);
        const T *q = b.q + item.key_row(s, item.end - 1), *k = b.k + item.key_row(s, item.end - 1);
        for (int64_t i = 0; i < K; i++)
            for (int n = 0; n < VECTORS; n++) {
                dS[i].x[n] += q[i] * dout.x[n];
                dc.x[n] += dS[i].x[n] * k[i];
            }
    }
    int64_t pieces = (item.end - item.begin + EVERY - 1) / EVERY;
    for (int64_t piece = pieces - 1; piece >= 0; piece--) {
        int64_t begin = item.begin + piece * EVERY, end = begin + EVERY < item.end ? begin + EVERY : item.end;
        std::memcpy(history, b.saved + item.saved(s, piece), sizeof(Row<T>) * K);
        Row<T> sum = zeros<T>();
        for (int64_t i = 0; i < K; i++)
            for (int n = 0; n < VECTORS; n++) sum.x[n] += history[i].x[n] * b.k[item.key_row(s, begin) + i];
        for (int64_t t = begin; t < end; t++) {
            int64_t m = t - begin, key = item.key_row(s, t), next = item.key_row(s, t + 1);
            r[m] = load(b.v + item.value_row(s, t), item.columns) - sum;
            if (t + 1 == end) break;
            Row<T> c = b.beta[t * s.H + item.h] * r[m];
            sum = advance<false, T>(K, history + m * K, history + (m + 1) * K, b.k + key, c, nullptr, nullptr, b.E + next,
                                    b.k + next);
        }
        for (int64_t t = end - 1; t >= begin; t--) {
            int64_t m = t - begin, at = item.key_row(s, t), partial = item.block * s.rows * s.H * K + at;
            T beta = b.beta[t * s.H + item.h];
            Row<T> c = beta * r[m], e = beta * dc;  // e: the gradient of r, which is that of v
            b.dbeta[(item.block * s.rows + t) * s.H + item.h] = dot(dc, r[m]);
            store(b.dv + item.value_row(s, t), e, item.columns);
            T c_dout = dot(c, dout);
            bool first = t == item.begin;
            int64_t before = first ? at : item.key_row(s, t - 1);
            Row<T> dout_before =
                first ? zeros<T>() : b.scale * load(b.dout + item.value_row(s, t - 1), item.columns);
            const T *k = b.k + at, *E = b.E + at, *q_before = b.q + before, *k_before = b.k + before;
            const Row<T>* S = history + m * K;
            Row<T> dc_before = zeros<T>();
            for (int64_t i = 0; i < K; i++) {
                Vec dq{}, dk{}, dg{};
                for (int n = 0; n < VECTORS; n++) {
                    Vec state = S[i].x[n], d = dS[i].x[n];
                    dq += state * dout.x[n];
                    dk += d * c.x[n];
                    dk -= state * e.x[n];
                    d -= k[i] * e.x[n];
                    dg += d * state;
                    d = d * E[i] + q_before[i] * dout_before.x[n];
                    dc_before.x[n] += d * k_before[i];
                    dS[i].x[n] = d;
                }
                sums[i] = dq;
                sums[groups * W + i] = dk;
                sums[2 * groups * W + i] = dg;
            }
            for (int64_t group = 0; group < groups; group++) {
                int64_t i = group * W, count = K - i < W ? K - i : W;
                Vec keys{};
                std::memcpy(&keys, k + i, sizeof(T) * count);
                Vec dq = totals<T>(sums + i) + keys * c_dout;
                Vec dk = totals<T>(sums + groups * W + i), dg = totals<T>(sums + 2 * groups * W + i);
                std::memcpy(b.dq + partial + i, &dq, sizeof(T) * count);
                std::memcpy(b.dk + partial + i, &dk, sizeof(T) * count);
                std::memcpy(b.dg + partial + i, &dg, sizeof(T) * count);
            }
            dc = dc_before;
            dout = dout_before;
        }
    }
    for (int64_t i = 0; i < K; i++) store(b.dinitial + item.state(s) + i * s.V, dS[i], item.columns);
}

template <typename T>
void forward(const Shape& s, const T* q, const T* k, const T* v, const T* E, const T* beta, double scale,
             const T* initial, T* o, T* final, T* saved, int64_t threads) {
    int64_t count = Item<T>::count(s);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < count; index++)
        forward_item<T>(s, Item<T>(s, index), q, k, v, E, beta, T(scale), initial, o, final, saved);
}

template <typename T>
void backward(const Shape& s, const Backward<T>& b, int64_t threads) {
    int64_t count = Item<T>::count(s);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < count; index++) backward_item<T>(s, Item<T>(s, index), b);
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                             \
    extern "C" void kda_forward_##NAME(const int32_t* bounds, int64_t N, int64_t H, int64_t K, int64_t V, int64_t rows,\
                                       const T* q, const T* k, const T* v, const T* E, const T* beta, double scale,   \
                                       const T* initial, T* o, T* final, T* saved, int64_t threads) {                     \
        forward<T>({bounds, N, H, K, V, rows}, q, k, v, E, beta, scale, initial, o, final, saved, threads);           \
    }                                                                                                                 \
    extern "C" void kda_backward_##NAME(                                                                              \
        const int32_t* bounds, int64_t N, int64_t H, int64_t K, int64_t V, int64_t rows, const T* q, const T* k,       \
        const T* v, const T* E, const T* beta, double scale, const T* dout, const T* dfinal, const T* saved, T* dq,    \
        T* dk, T* dv, T* dg, T* dbeta, T* dinitial, int64_t threads) {                                                    \
        backward<T>({bounds, N, H, K, V, rows},                                                                       \
                    {q, k, v, E, beta, dout, dfinal, saved, T(scale), dq, dk, dv, dg, dbeta, dinitial}, threads);      \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)

extern "C" int64_t kda_every() { return EVERY; }
extern "C" int64_t kda_lanes_float32() { return Row<float>::LANES; }
extern "C" int64_t kda_lanes_float64() { return Row<double>::LANES; }
