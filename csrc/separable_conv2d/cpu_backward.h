// The backward stages of the fused separable convolution on the CPU; part of cpu_kernels.h. Compiled once per
// instruction set.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// Where the outer stage standardises: Σg and Σg·n over the tiles of groups [first, last).
template <class E, bool kLast, class T>
void outer_sums(const Call<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t channels = s.R * s.D, step = s.step(channels), size = round_up(channels, 32) * 64 / sizeof(A);
  Scratch memory(2 * size * sizeof(A) + 256);
  const Partial<kLast, A> sum_g{memory.take<A>(size)}, sum_gn{memory.take<A>(size)};
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * s.tiles() / s.forward_groups(),
                  end = (group + 1) * s.tiles() / s.forward_groups();
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = s.offset(s.tile(t), channels, 0), pixels = s.tile(t).size();
      sum_g.clear(channels);
      sum_gn.clear(channels);
      outer_standardised<false, kLast, T, A>({call.dy + at, step}, {call.o + at, step}, {nullptr, 0},
                                             kLast ? pixels : channels, kLast ? channels : pixels, call.outer,
                                             sum_g, sum_gn);
      sum_g.add_to(call.sums2.first + group * channels, channels);
      sum_gn.add_to(call.sums2.second + group * channels, channels);
    }
  }
}

// Items [first, last) of (rate, chunk of channels, group of tiles): g, the gradient of o (without gamma2
// where the outer stage does not standardise); dh = vᵀg; gᵀh; the gradient of d, or what is known of it
// before the moments of the inner stage.
template <class E, bool kLast, class T>
void backward(const Call<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t width = chunk_width(s), groups = s.backward_groups(), dv_step = row_step(width);
  const int64_t left = std::max(E::left_bytes(std::max(kPixels, s.D), std::max(kPixels, s.D)), int64_t(64));
  const int64_t right = E::right_bytes(std::max(kPixels, s.D), std::max(kPixels, width));
  const int64_t sums = round_up(std::max(s.D, width), 32) * 64 / sizeof(A),
                dv_size = round_up(s.D, 32) * dv_step;
  Scratch memory(tile_size<kLast>(s.D) * sizeof(A) + tile_size<kLast>(width) * (sizeof(T) + 2 * sizeof(A)) +
                   left + right + (2 * sums + dv_size) * sizeof(A) + 1024);
  const Matrix<A> g{memory.take<A>(tile_size<kLast>(s.D)), tile_step<kLast>(s.D)};
  const Matrix<T> d{memory.take<T>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  const Matrix<A> h{memory.take<A>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  const Matrix<A> dh{memory.take<A>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  const Partial<kLast, A> sum_g{memory.take<A>(sums)}, sum_gn{memory.take<A>(sums)};
  A* dv = memory.take<A>(dv_size);
  char *left_scratch = memory.take<char>(left), *right_scratch = memory.take<char>(right);
  [[maybe_unused]] const typename E::Session session;

  for (int64_t item = first; item < last; ++item) {
    const int64_t group = item % groups, chunk = item / groups % s.chunks(),
                  rate = item / groups / s.chunks();
    const int64_t c0 = s.chunk_begin(chunk), n = s.chunk_end(chunk) - c0;
    const int64_t begin = group * s.tiles() / groups, end = (group + 1) * s.tiles() / groups;
    const Affine<A> inner = call.inner.from(rate * s.C + c0), outer = call.outer.from(rate * s.D);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = s.tile(t);
      const int64_t pixels = tile.size();
      const int64_t at = s.offset(tile, s.R * s.D, rate * s.D), step = s.step(s.R * s.D);
      const int64_t o_rows = kLast ? pixels : s.D, o_columns = kLast ? s.D : pixels;
      const int64_t h_rows = kLast ? pixels : n, h_columns = kLast ? n : pixels;

      sum_g.clear(s.D);
      if (call.outer.standardised) {
        outer_standardised<true, kLast, T, A>({call.dy + at, step}, {call.o + at, step}, g, o_rows, o_columns,
                                              outer, sum_g, sum_gn);
      } else {
        outer_gradient<kLast, T, A>({call.dy + at, step}, {call.y ? call.y + at : nullptr, step}, g, o_rows,
                                    o_columns, outer.clip, sum_g);
        if (chunk == 0) sum_g.add_to(call.sums2.first + (group * s.R + rate) * s.D, s.D);
      }
      if (!call.want_dv && !call.want_inner) continue;

      depthwise_tile<kLast>(call, tile, rate, chunk, d);
      apply<kLast, T, A>({d.p, d.step}, h, h_rows, h_columns, inner);
      if (call.want_dv) {  // [D][C] += [D][pixels] · [pixels][C]
        const View<A> g_rows = kLast ? View<A>{g.p, 1, g.step} : View<A>{g.p, g.step, 1};
        const View<A> h_pixels = kLast ? View<A>{h.p, h.step, 1} : View<A>{h.p, 1, h.step};
        E::multiply(s.D, n, pixels, E::left(g_rows, s.D, pixels, left_scratch),
                    E::right(h_pixels, pixels, n, right_scratch), dv, dv_step, t > begin);
      }
      if (call.want_inner) {
        multiply_weights<E, kLast, true>(call, rate * s.chunks() + chunk, g, dh, pixels, s.D, n, false,
                                         kLast ? left_scratch : right_scratch);
        T* dd = call.dd ? call.dd + s.offset(tile, s.R * s.C, rate * s.C + c0) : nullptr;
        sum_g.clear(n);
        sum_gn.clear(n);
        inner_gradient<kLast, T, A>({dh.p, dh.step}, {h.p, h.step}, {d.p, d.step}, dd, s.step(s.R * s.C),
                                    h_rows, h_columns, inner, sum_g, sum_gn);
        const int64_t sum = (group * s.R + rate) * s.C + c0;
        sum_g.add_to(call.sums1.first + sum, n);
        sum_gn.add_to(call.sums1.second + sum, n);
      }
    }
    if (call.want_dv)
      for (int64_t i = 0; i < s.D; ++i)
        std::memcpy(call.dv + ((group * s.R + rate) * s.D + i) * s.C + c0, dv + i * dv_step, n * sizeof(A));
  }
}

// Rows [first, last) of [R·D][C]: M = Σ over groups of gᵀh; dv = γ₂·M and dgamma2 = Σ_c v·M.
template <class T>
void finish_dv(const Call<T>& call, const T* v, int64_t groups, const acc_t<T>* gamma, T* dv,
               acc_t<T>* dgamma, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const int64_t C = call.sizes.C, rows = call.sizes.R * call.sizes.D;
  for (int64_t i = first; i < last; ++i) {
    Vec<A> dot = splat(A(0));
    for (int64_t c = 0; c < C; c += Vec<A>::lanes) {
      const Mask m = lane_range<A>(0, C - c);
      Vec<A> product = splat(A(0));
      for (int64_t group = 0; group < groups; ++group)
        product = product + load<A>(call.dv + (group * rows + i) * C + c, m);
      dot = fma(product, load<A>(v + i * C + c, m), dot);
      if (dv) store(dv + i * C + c, gamma ? product * splat(gamma[i]) : product, m);
    }
    if (dgamma) dgamma[i] = sum(dot);
  }
}

// Where the inner stage standardises: the gradient of d from g, over the tiles [first, last).
template <class E, bool kLast, class T>
void inner_finish(const Call<T>& call, int64_t first, int64_t last) {
  const Sizes& s = call.sizes;
  const int64_t width = chunk_width(s);
  Scratch memory(tile_size<kLast>(width) * sizeof(T) + 64);
  const Matrix<T> d{memory.take<T>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  for (int64_t t = first; t < last; ++t)
    for (int64_t chunk = 0; chunk < s.chunks(); ++chunk)
      for (int64_t rate = 0; rate < s.R; ++rate) {
        const int64_t n = s.chunk_end(chunk) - s.chunk_begin(chunk), pixels = s.tile(t).size();
        const int64_t channel = rate * s.C + s.chunk_begin(chunk);
        depthwise_tile<kLast>(call, s.tile(t), rate, chunk, d);
        inner_standardised<kLast, T>({d.p, d.step},
                                     {call.dd + s.offset(s.tile(t), s.R * s.C, channel), s.step(s.R * s.C)},
                                     kLast ? pixels : n, kLast ? n : pixels, call.inner.from(channel));
      }
}

// -- one door for the host ------------------------------------------------------------------------

template <class E, bool kLast, class T>
void run_with(Stage stage, const Call<T>& call, int64_t first, int64_t last) {
  switch (stage) {
    case Stage::pack_forward:
      return pack_weights<E, kLast, false>(call, first, last);
    case Stage::pack_backward:
      return pack_weights<E, kLast, true>(call, first, last);
    case Stage::inner_moments:
      return inner_moments<E, kLast>(call, first, last);
    case Stage::forward:
      return forward<E, kLast>(call, first, last);
    case Stage::finish:
      return finish<E, kLast>(call, first, last);
    case Stage::outer_sums:
      return outer_sums<E, kLast>(call, first, last);
    case Stage::backward:
      return backward<E, kLast>(call, first, last);
    case Stage::inner_finish:
      return inner_finish<E, kLast>(call, first, last);
  }
}

template <class E, class T>
void run_with(Stage stage, const Call<T>& call, int64_t first, int64_t last) {
  return call.sizes.channels_last ? run_with<E, true>(stage, call, first, last)
                                  : run_with<E, false>(stage, call, first, last);
}
template <class E>
int64_t weight_bytes(const Sizes& s, bool backward) {
  return s.channels_last ? weight_bytes<E, true>(s, backward) : weight_bytes<E, false>(s, backward);
}

// The items [first, last) of a stage.
template <class T>
void run(Stage stage, const Call<T>& call, int64_t first, int64_t last) {
  by_engine<T>(call.engine, [&](auto engine) { run_with<decltype(engine)>(stage, call, first, last); });
}
// Bytes of a slot of packed weights.
template <class T>
int64_t weight_bytes(const Call<T>& call, bool backward) {
  return by_engine<T>(call.engine, [&](auto engine) { return weight_bytes<decltype(engine)>(call.sizes, backward); });
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
