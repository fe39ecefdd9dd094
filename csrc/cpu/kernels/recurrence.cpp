// Recurrences whose state is a matrix a head: every token decays it, adds an outer product, and reads it.
//
//   gated delta rule   state = decay * state + key x (beta * (value - key . decayed state));  out = query . state
//   state space        state = decay * state + b x (dt * x);                                  out = c . state + d * x
//
// Tokens are computed one by one in their order, and rows are summed in theirs, so no bit depends on how a sequence is
// cut into steps, or on what else is in them. Columns are independent: a task has one or two panels of a head. Columns beyond the values are zero and stay it.
// Legend: R rows of a state, P panels of 16 columns; a panel is [R][16].
#include "sequences.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kVectors = kPanelColumns / kLanes;  // of a panel

// The numbers of one token that all columns share, in scratch.
struct Token {
  float *key, *query, *decay;  // [R]; a decay of the whole head is in decay[0]
};

struct Matrix {
  float* data;   // the first of the panels, each [R][16]
  int64_t rows;

  FL_INLINE float* at(int vector, int64_t row) const {
    return data + vector / kVectors * rows * kPanelColumns + row * kPanelColumns + vector % kVectors * kLanes;
  }
};

// sums[v] = the decayed state times the key.
template <int N, bool BY_ROW>
FL_INLINE void recall(const Matrix& state, const Token& token, vf* sums) {
  for (int v = 0; v < N; ++v) sums[v] = zero();
  for (int64_t r = 0; r < state.rows; ++r) {
    const vf key = set1(BY_ROW ? token.key[r] * token.decay[r] : token.key[r]);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sums[v] = fma(load(state.at(v, r)), key, sums[v]);
  }
  if (BY_ROW) return;
  for (int v = 0; v < N; ++v) sums[v] = sums[v] * token.decay[0];
}

// Decays the state, adds key x added, and gives out[v] = the new state times the query.
template <int N, bool BY_ROW>
FL_INLINE void advance(const Matrix& state, const Token& token, const vf* added, vf* out) {
  for (int v = 0; v < N; ++v) out[v] = zero();
  for (int64_t r = 0; r < state.rows; ++r) {
    const vf decay = set1(token.decay[BY_ROW ? r : 0]), key = set1(token.key[r]), query = set1(token.query[r]);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const vf now = fma(key, added[v], load(state.at(v, r)) * decay);
      store(state.at(v, r), now);
      out[v] = fma(now, query, out[v]);
    }
  }
}

// Where the columns of a task are, and how many of them the values have.
struct Columns {
  int64_t head, panel, first, count;
};

Matrix begin_state(const Tensor& state, const SequencePart& sequence, const Columns& columns, int64_t num_panels) {
  const Matrix matrix{static_cast<float*>(state.data) + sequence.slot * state.strides[0] +
                      columns.head * state.strides[1] + columns.panel * state.strides[2], state.sizes[3]};
  if (sequence.is_first) __builtin_memset(matrix.data, 0, num_panels * matrix.rows * kPanelColumns * 4);
  return matrix;
}

// Calls body(N, sequence, columns, state) with N as a constant: the vectors of one panel or of two.
template <class F>
void for_columns_of_heads(const Sequences& sequences, const Tensor& state, int64_t width, const F& body) {
  const int64_t panels = state.sizes[2], pairs = (panels + 1) / 2;
  for_parts(sequences, state, state.sizes[1] * pairs, [&](const SequencePart& sequence, int64_t part) {
    const int64_t panel = part % pairs * 2, first = panel * kPanelColumns;
    const int64_t num_panels = panel + 1 < panels ? 2 : 1;
    const Columns columns{part / pairs, panel, first, least(num_panels * kPanelColumns, width - first)};
    const Matrix matrix = begin_state(state, sequence, columns, num_panels);
    if (num_panels == 2)
      body.template operator()<2 * kVectors>(sequence, columns, matrix);
    else
      body.template operator()<kVectors>(sequence, columns, matrix);
  });
}

FL_INLINE int64_t offset(const Tensor& t, int64_t token, int64_t head) {
  return token * t.strides[1] + head * t.strides[2];
}

FL_INLINE void scale_row(float* x, int64_t n, float by) {
  for_columns(n, [&](int64_t c, int64_t count) { store_some(x + c, load_some(x + c, count) * by, count); });
}

// x / sqrt(|x|^2 + 1e-6)
FL_INLINE void normalize_row(float* x, int64_t n) {
  vf squares = zero();
  for_columns(n, [&](int64_t c, int64_t count) {
    const vf v = load_some(x + c, count);
    squares = fma(v, v, squares);
  });
  scale_row(x, n, 1.0f / __builtin_sqrtf(hsum(squares) + 1e-6f));
}

FL_INLINE void exp_row(float* x, int64_t n) {
  for_columns(n, [&](int64_t c, int64_t count) { store_some(x + c, vexp(load_some(x + c, count)), count); });
}

struct Delta {
  const Tensor &out, &q, &k, &v, &g, &beta;
  bool is_normalized;

  bool decays_by_row() const { return g.ndim == 4; }

  FL_INLINE void read(const Token& token, int64_t t, int64_t head) const {
    const int64_t rows = k.sizes[3], of_key = head / (v.sizes[2] / k.sizes[2]);
    read_some(q, offset(q, t, of_key), q.strides[3], rows, token.query);
    read_some(k, offset(k, t, of_key), k.strides[3], rows, token.key);
    if (is_normalized) {
      normalize_row(token.query, rows);
      normalize_row(token.key, rows);
    }
    scale_row(token.query, rows, 1.0f / __builtin_sqrtf(static_cast<float>(rows)));
    read_some(g, offset(g, t, head), decays_by_row() ? g.strides[3] : 1, decays_by_row() ? rows : 1, token.decay);
    exp_row(token.decay, decays_by_row() ? rows : 1);
  }

  template <int N, bool BY_ROW>
  void run(const SequencePart& sequence, const Columns& columns, const Matrix& state) const {
    float* memory = chunk_floats(3 * state.rows);
    const Token token{memory, memory + state.rows, memory + 2 * state.rows};
    alignas(64) float row[2 * kPanelColumns] = {};
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      read(token, t, columns.head);
      vf sums[N], result[N];
      recall<N, BY_ROW>(state, token, sums);
      read_some(v, offset(v, t, columns.head) + columns.first * v.strides[3], v.strides[3], columns.count, row);
      const float rate = float_at(beta, offset(beta, t, columns.head));
      for (int n = 0; n < N; ++n) sums[n] = (load(row + n * kLanes) - sums[n]) * rate;
      advance<N, BY_ROW>(state, token, sums, result);
      for (int n = 0; n < N; ++n) store(row + n * kLanes, result[n]);
      write_some(out, offset(out, t, columns.head) + columns.first * out.strides[3], out.strides[3], columns.count, row);
    }
  }
};

struct StateSpace {
  const Tensor &out, &x, &dt, &a, &b, &c, &d;

  template <int N>
  void run(const SequencePart& sequence, const Columns& columns, const Matrix& state) const {
    float* memory = chunk_floats(2 * state.rows);
    float decay;
    const Token token{memory, memory + state.rows, &decay};
    const int64_t head = columns.head, group = head / (x.sizes[2] / b.sizes[2]);
    const float rate = float_at(a, head * a.strides[0]), skip = d.present() ? float_at(d, head * d.strides[0]) : 0.0f;
    alignas(64) float row[2 * kPanelColumns] = {};
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      const float step = float_at(dt, offset(dt, t, head));
      decay = exp_of(step * rate);
      read_some(b, offset(b, t, group), b.strides[3], state.rows, token.key);
      read_some(c, offset(c, t, group), c.strides[3], state.rows, token.query);
      read_some(x, offset(x, t, head) + columns.first * x.strides[3], x.strides[3], columns.count, row);
      vf added[N], result[N];
      for (int n = 0; n < N; ++n) added[n] = load(row + n * kLanes) * step;
      advance<N, false>(state, token, added, result);
      for (int n = 0; n < N; ++n) store(row + n * kLanes, fma(set1(skip), load(row + n * kLanes), result[n]));
      write_some(out, offset(out, t, head) + columns.first * out.strides[3], out.strides[3], columns.count, row);
    }
  }
};

}  // namespace

void gated_delta_slots(const Tensor* t, const int64_t* i, const double*) {
  const Delta delta{t[0], t[2], t[3], t[4], t[5], t[6], i[0] != 0};
  const auto run = [&]<int N>(const SequencePart& sequence, const Columns& columns, const Matrix& state) {
    if (delta.decays_by_row())
      delta.run<N, true>(sequence, columns, state);
    else
      delta.run<N, false>(sequence, columns, state);
  };
  for_columns_of_heads({t[7], t[8], t[9]}, t[1], t[4].sizes[3], run);
}

void ssd_scan_slots(const Tensor* t, const int64_t*, const double*) {
  const StateSpace space{t[0], t[2], t[3], t[4], t[5], t[6], t[7]};
  const auto run = [&]<int N>(const SequencePart& sequence, const Columns& columns, const Matrix& state) {
    space.run<N>(sequence, columns, state);
  };
  for_columns_of_heads({t[8], t[9], t[10]}, t[1], t[2].sizes[3], run);
}

}  // namespace fuseline::FL_ISA
