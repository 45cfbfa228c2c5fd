// Exact search and gather for CPUs, called by XLA (`native.py` compiles this file).
//
// One pass over the keys: scores live in registers and are compared with the K-th best so far of their query; only the
// few that are larger are written anywhere.
//
//   for each block of slots:                           keys as floats, in the first cache
//     for each 2 vectors of queries:                   queries transposed once to [D, queries]
//       for each 12 slots:                             24 accumulators, 2 vectors of queries, 1 key: 27 of 32 registers
//         scores [12, queries] = keys . queries        a multiply-add per vector and feature
//         any score > the bound of its query?          rarely, once bounds are high
//           append (score, slot); when the query's buffer is full keep its K best, and raise its bound to the K-th
//
// Slots come in ascending order and only a strictly larger score enters, so that of equal scores the lower slot stays.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kKeys = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kKeys = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kKeys = 12;
#else
constexpr int kLanes = 4, kKeys = 6;
#endif
constexpr int kQueries = 2 * kLanes;  // scored at a time
constexpr int kBlock = 96;            // slots whose keys are held as floats: 24 KiB for 64 features

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Calls work(0) .. work(count - 1) on the pool's threads and this one. Only items that a thread has begun are waited for,
// so that this cannot block a pool whose threads all wait here.
ffi::Error Parallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  auto run = [progress, count, work = std::move(work)] {
    for (int64_t item; (item = progress->next++) < count;) {
      try {
        work(item);
      } catch (const std::bad_alloc&) {
        progress->failed = true;
      }
      if (++progress->done == count) {
        std::lock_guard<std::mutex> lock(progress->mutex);
        progress->all_done.notify_all();
      }
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
  return progress->failed ? ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the search on the CPU")
                          : ffi::Error::Success();
}

// Stored numbers as floats.
struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct Float8 {  // e4m3fn: no infinities
  uint8_t bits;
  operator float() const {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
    float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
    return bits >> 7 ? -size : size;
  }
};

template <typename Key>
float ToFloat(Key key) {
  return key;
}

template <>
float ToFloat(Float8 key) {
  static const auto* table = [] {
    auto* values = new float[256];
    for (int bits = 0; bits < 256; ++bits) values[bits] = Float8{uint8_t(bits)};
    return values;
  }();
  return table[key.bits];
}

inline Floats Load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// The best slots so far of some queries of one row and head, and others that were above the bound when they were added.
class Best {
 public:
  Best(int64_t queries, int64_t neighbors, float above)
      : neighbors_(neighbors), capacity_((3 * neighbors + kLanes) / kLanes * kLanes), scores_(queries * capacity_),
        slots_(queries * capacity_), counts_(queries), bounds_(queries, above) {}

  // Each query's bound: only slots with a larger score can be among its best.
  const float* bounds() const { return bounds_.data(); }

  void Add(int64_t query, float score, int32_t slot) {
    int64_t place = query * capacity_ + counts_[query]++;
    scores_[place] = score;
    slots_[place] = slot;
    if (counts_[query] == capacity_) Prune(query);
  }

  void Write(int64_t query, float* scores, int32_t* slots) {
    if (counts_[query] > neighbors_) Prune(query);
    int64_t count = counts_[query];
    const float* found = &scores_[query * capacity_];
    std::fill(scores, scores + neighbors_, kNothing);
    std::fill(slots, slots + neighbors_, 0);
    // A slot's rank is the number of slots before it: larger scores, and equal scores that were added earlier.
    for (int64_t first = 0; first < count; first += kLanes) {
      Floats mine = Load(found + first);
      Integers before = {}, places;
      for (int lane = 0; lane < kLanes; ++lane) places[lane] = int32_t(first + lane);
      for (int32_t place = 0; place < count; ++place) {
        Floats other = Floats{} + found[place];
        before -= (other > mine) | ((other == mine) & (place < places));  // true is -1
      }
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, count - first); ++lane) {
        if (before[lane] >= neighbors_) continue;
        scores[before[lane]] = mine[lane];
        slots[before[lane]] = slots_[query * capacity_ + first + lane];
      }
    }
  }

 private:
  // Keeps the best, in the order in which they were added, and raises the bound: to the K-th score or, since that takes
  // many comparisons to find, to a lower one that lets a few more stay.
  void Prune(int64_t query) {
    float* scores = &scores_[query * capacity_];
    int32_t* slots = &slots_[query * capacity_];
    int64_t count = counts_[query], enough = neighbors_ + neighbors_ / 8;
    std::fill(scores + count, scores + capacity_, scores[0]);  // so that whole vectors can be read
    Floats lows = Load(scores), highs = lows;
    for (int64_t place = kLanes; place < capacity_; place += kLanes) {
      Floats some = Load(scores + place);
      lows = some < lows ? some : lows;
      highs = some > highs ? some : highs;
    }
    float low = lows[0], high = highs[0];
    for (int lane = 1; lane < kLanes; ++lane) {
      low = std::min(low, lows[lane]);
      high = std::max(high, highs[lane]);
    }
    int64_t kept = count;  // number of scores of at least `low`; never below K
    for (int halving = 0; halving < 16 && kept > enough; ++halving) {
      float middle = low + (high - low) / 2;
      int32_t larger = 0;
      for (int64_t place = 0; place < count; ++place) larger += scores[place] >= middle;
      if (larger >= neighbors_) {
        low = middle;
        kept = larger;
      } else {
        high = middle;
      }
    }
    int64_t equal = count;  // number of slots with exactly the score `low` to keep
    if (kept > enough) {    // many equal or nearly equal scores
      sorted_.assign(scores, scores + count);
      std::nth_element(sorted_.begin(), sorted_.begin() + neighbors_ - 1, sorted_.end(), std::greater<float>());
      low = sorted_[neighbors_ - 1];
      equal = neighbors_ - std::count_if(scores, scores + count, [low](float score) { return score > low; });
    }
    kept = 0;
    for (int64_t place = 0; place < count; ++place) {
      float score = scores[place];
      int32_t slot = slots[place];
      scores[kept] = score;
      slots[kept] = slot;
      bool is_equal = score == low;
      kept += (score > low) | (is_equal & (equal > 0));
      equal -= is_equal;
    }
    counts_[query] = kept;
    bounds_[query] = low;  // a later slot with this score loses to the K before it
  }

  int64_t neighbors_, capacity_;
  std::vector<float> scores_;
  std::vector<int32_t> slots_;
  std::vector<int64_t> counts_;
  std::vector<float> bounds_, sorted_;
};

// A bit for each of `kQueries` scores: whether it is above the bound of its query.
inline uint32_t Above(Floats first, Floats second, const float* bounds) {
#if defined(__AVX512F__)
  return uint32_t{_mm512_cmp_ps_mask((__m512)first, _mm512_loadu_ps(bounds), _CMP_GT_OQ)} |
         uint32_t{_mm512_cmp_ps_mask((__m512)second, _mm512_loadu_ps(bounds + kLanes), _CMP_GT_OQ)} << kLanes;
#elif defined(__AVX__)
  __m256 one = _mm256_cmp_ps((__m256)first, _mm256_loadu_ps(bounds), _CMP_GT_OQ);
  __m256 other = _mm256_cmp_ps((__m256)second, _mm256_loadu_ps(bounds + kLanes), _CMP_GT_OQ);
  return uint32_t(_mm256_movemask_ps(one)) | uint32_t(_mm256_movemask_ps(other)) << kLanes;
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= uint32_t{first[lane] > bounds[lane]} << lane | uint32_t{second[lane] > bounds[lane + kLanes]}
                                                               << (lane + kLanes);
  }
  return bits;
#endif
}

// Scores of `kKeys` keys `[kKeys, D]` with `kQueries` queries `[D, kQueries]`, and which are above the bounds.
inline void Score(const float* keys, const float* queries, int64_t size, const float* bounds,
                  float (*scores)[kQueries], uint32_t* above) {
  Floats sums[kKeys][2] = {};
  for (int64_t feature = 0; feature < size; ++feature) {
    Floats first = Load(queries + feature * kQueries), second = Load(queries + feature * kQueries + kLanes);
#pragma GCC unroll 12
    for (int key = 0; key < kKeys; ++key) {
      float value = keys[key * size + feature];
      sums[key][0] += value * first;
      sums[key][1] += value * second;
    }
  }
#pragma GCC unroll 12
  for (int key = 0; key < kKeys; ++key) {
    above[key] = Above(sums[key][0], sums[key][1], bounds);
    std::memcpy(scores[key], &sums[key][0], sizeof(Floats));
    std::memcpy(scores[key] + kLanes, &sums[key][1], sizeof(Floats));
  }
}

struct Sizes {
  int64_t heads, queries, slots, size, neighbors;
};

template <typename Key>
void SearchSome(const Sizes& its, const float* queries, int64_t count, const Key* keys, const float* scales,
                const bool* valid, float above, float* scores_out, int32_t* slots_out) {
  // Queries in whole groups, each `[D, kQueries]`. Zeros fill up the last group; no score passes their bounds.
  int64_t groups = (count + kQueries - 1) / kQueries;
  std::vector<float> turned(groups * its.size * kQueries), block(kBlock * its.size);
  for (int64_t query = 0; query < count; ++query) {
    float* to = &turned[query / kQueries * its.size * kQueries + query % kQueries];
    for (int64_t feature = 0; feature < its.size; ++feature) to[feature * kQueries] = queries[query * its.size + feature];
  }
  Best best(groups * kQueries, its.neighbors, above);
  for (int64_t first = 0; first < its.slots; first += kBlock) {
    int64_t width = std::min<int64_t>(kBlock, its.slots - first);
    if (!std::any_of(valid + first, valid + first + width, [](bool is_valid) { return is_valid; })) continue;
    for (int64_t slot = 0; slot < width; ++slot) {
      const Key* key = keys + (first + slot) * its.size;
      float scale = scales ? scales[first + slot] : 1.0f;
      for (int64_t feature = 0; feature < its.size; ++feature) {
        block[slot * its.size + feature] = scales ? ToFloat(key[feature]) * scale : ToFloat(key[feature]);
      }
    }
    for (int64_t group = 0; group < groups; ++group) {
      uint32_t exist = group * kQueries + kQueries <= count ? ~0u : (1u << count % kQueries) - 1;
      const float* bounds = best.bounds() + group * kQueries;
      for (int64_t some = 0; some < width; some += kKeys) {
        float scores[kKeys][kQueries];
        uint32_t above[kKeys];
        Score(&block[some * its.size], &turned[group * its.size * kQueries], its.size, bounds, scores, above);
        for (int64_t key = 0; key < std::min<int64_t>(kKeys, width - some); ++key) {
          if (!(above[key] &= exist) || !valid[first + some + key]) continue;
          for (; above[key]; above[key] &= above[key] - 1) {
            int query = __builtin_ctz(above[key]);
            // The bound may have risen since.
            if (scores[key][query] > bounds[query]) {
              best.Add(group * kQueries + query, scores[key][query], int32_t(first + some + key));
            }
          }
        }
      }
    }
  }
  for (int64_t query = 0; query < count; ++query) {
    best.Write(query, scores_out + query * its.neighbors, slots_out + query * its.neighbors);
  }
}

template <typename Key>
ffi::Error SearchAll(ffi::ThreadPool& pool, const Sizes& its, int64_t rows, const float* queries, const Key* keys,
               const float* scales, const bool* valid, float above, float* scores, int32_t* slots) {
  // Large parts, because each reads all keys; but enough of them for all threads.
  int64_t parts = 1, pairs = rows * its.heads;
  while (pairs * parts < 4 * pool.num_threads() && its.queries / (2 * parts) >= 2 * kQueries) parts *= 2;
  int64_t part_size = (its.queries + parts - 1) / parts;
  return Parallel(pool, pairs * parts, [=](int64_t item) {
    int64_t pair = item / parts, first = item % parts * part_size;
    int64_t count = std::min(part_size, its.queries - first);
    if (count <= 0) return;
    int64_t query = pair * its.queries + first;
    SearchSome(its, queries + query * its.size, count, keys + pair * its.slots * its.size,
               scales ? scales + pair * its.slots : nullptr, valid + pair / its.heads * its.slots, above,
               scores + query * its.neighbors, slots + query * its.neighbors);
  });
}

ffi::Error Search(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::AnyBuffer keys, ffi::Buffer<ffi::F32> scales,
                  ffi::Buffer<ffi::PRED> valid, ffi::ResultBuffer<ffi::F32> scores, ffi::ResultBuffer<ffi::S32> slots,
                  float above) {
  auto shape = queries.dimensions();
  auto of_keys = keys.dimensions();
  bool agree = shape.size() == 4 && of_keys.size() == 4 && of_keys[0] == shape[0] && of_keys[1] == shape[1] &&
               of_keys[3] == shape[3] && int64_t(valid.element_count()) == shape[0] * of_keys[2] &&
               (!scales.element_count() || int64_t(scales.element_count()) == shape[0] * shape[1] * of_keys[2]);
  if (!agree) return ffi::Error::InvalidArgument("queries, keys, scales and validity differ in their sizes");
  Sizes its{shape[1], shape[2], of_keys[2], shape[3], scores->dimensions()[3]};
  auto search = [&](auto key) {
    return SearchAll(pool, its, shape[0], queries.typed_data(), static_cast<const decltype(key)*>(keys.untyped_data()),
              scales.element_count() ? scales.typed_data() : nullptr, valid.typed_data(), above, scores->typed_data(),
              slots->typed_data());
  };
  switch (keys.element_type()) {
    case ffi::F32: return search(float{});
    case ffi::BF16: return search(BFloat16{});
    case ffi::S8: return search(int8_t{});
    case ffi::F8E4M3FN: return search(Float8{});
    default: return ffi::Error::InvalidArgument("keys of this dtype cannot be searched");
  }
}

// Rows `[G, R, D]` of tables `[G, M, D]`, by index `[G, R]`.
ffi::Error Gather(ffi::ThreadPool pool, ffi::AnyBuffer tables, ffi::Buffer<ffi::S32> index,
                  ffi::Result<ffi::AnyBuffer> out) {
  constexpr int64_t kPart = 1024, kAhead = 16;
  int64_t rows = tables.dimensions()[1], count = index.element_count(), each = index.dimensions()[1];
  int64_t bytes = out->size_bytes() / std::max<int64_t>(count, 1);
  const char* source = static_cast<const char*>(tables.untyped_data());
  char* target = static_cast<char*>(out->untyped_data());
  const int32_t* wanted = index.typed_data();
  return Parallel(pool, (count + kPart - 1) / kPart, [=](int64_t part) {
    int64_t last = std::min(count, (part + 1) * kPart);
    auto at = [&](int64_t place) {
      int64_t row = std::min<int64_t>(std::max<int64_t>(wanted[place], 0), rows - 1);
      return source + (place / each * rows + row) * bytes;
    };
    for (int64_t place = part * kPart; place < last; ++place) {
      if (place + kAhead < last) __builtin_prefetch(at(place + kAhead));
      std::memcpy(target + place * bytes, at(place), bytes);
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(memorizing_search, Search,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("above"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(memorizing_gather, Gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
