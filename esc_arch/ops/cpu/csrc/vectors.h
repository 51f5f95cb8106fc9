// Vectors of float as wide as the CPU's registers, in the compiler's own types: one source for AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace esc_arch {

#if defined(CPU_CAPABILITY_AVX512)
#define ESC_ARCH_VECTOR_BYTES 64
#elif defined(CPU_CAPABILITY_AVX2)
#define ESC_ARCH_VECTOR_BYTES 32
#else
#define ESC_ARCH_VECTOR_BYTES 16
#endif

constexpr int64_t kLanes = ESC_ARCH_VECTOR_BYTES / sizeof(float);

// AVX2 has 16 registers, the others 32: how many vectors of columns a tile of a matrix product holds at once.
constexpr int64_t kTileColumns = ESC_ARCH_VECTOR_BYTES == 32 ? 2 : 5;

typedef float Vec __attribute__((vector_size(ESC_ARCH_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(ESC_ARCH_VECTOR_BYTES)));
typedef float UnalignedVec __attribute__((vector_size(ESC_ARCH_VECTOR_BYTES), aligned(4), may_alias));

#define ESC_ARCH_INLINE inline __attribute__((always_inline))
#define ESC_ARCH_INLINE_LAMBDA __attribute__((always_inline))

ESC_ARCH_INLINE Vec load(const float* from) {
  return *reinterpret_cast<const UnalignedVec*>(from);
}

ESC_ARCH_INLINE void store(float* to, Vec value) {
  *reinterpret_cast<UnalignedVec*>(to) = value;
}

#if defined(CPU_CAPABILITY_AVX512)
ESC_ARCH_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}

ESC_ARCH_INLINE Vec load_first(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}

ESC_ARCH_INLINE void store_first(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), value);
}
#elif defined(CPU_CAPABILITY_AVX2)
ESC_ARCH_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ESC_ARCH_INLINE Vec load_first(const float* from, int64_t count) {
  return _mm256_maskload_ps(from, first_lanes(count));
}

ESC_ARCH_INLINE void store_first(float* to, Vec value, int64_t count) {
  _mm256_maskstore_ps(to, first_lanes(count), value);
}
#else
ESC_ARCH_INLINE Vec load_first(const float* from, int64_t count) {
  Vec value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

ESC_ARCH_INLINE void store_first(float* to, Vec value, int64_t count) {
  std::memcpy(to, &value, count * sizeof(float));
}
#endif

ESC_ARCH_INLINE Vec broadcast(float value) {
  return value - Vec{};
}

ESC_ARCH_INLINE float sum_of_lanes(Vec value) {
  typedef float Four __attribute__((vector_size(16)));
  constexpr int64_t quarters = sizeof(Vec) / sizeof(Four);
  Four parts[quarters];
  std::memcpy(parts, &value, sizeof(Vec));
  for (int64_t half = quarters / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// One half of every `width` lanes of a, then of b.
template <int64_t width, bool upper, size_t... lane>
ESC_ARCH_INLINE Vec halves(Vec a, Vec b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, (lane / (width / 2) * width + lane % (width / 2) + (upper ? width / 2 : 0))...);
}

// The sums of the lanes of kLanes vectors, a lane for each, in the order of additions of sum_of_lanes.
template <int64_t width = kLanes>
ESC_ARCH_INLINE Vec sums_of_lanes(const Vec* values) {
  if constexpr (width == 1) {
    return values[0];
  } else {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    Vec sums[width / 2];
#pragma GCC unroll 8
    for (int64_t i = 0; i < width / 2; ++i) {
      sums[i] = halves<width, false>(values[2 * i], values[2 * i + 1], lanes) +
                halves<width, true>(values[2 * i], values[2 * i + 1], lanes);
    }
    return sums_of_lanes<width / 2>(sums);
  }
}

// Memory for vectors: one that lies across two cache lines takes two loads.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;

  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* data, size_t) {
    ::operator delete(data, std::align_val_t{64});
  }
  template <typename U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
};

using Floats = std::vector<float, CacheLineAllocator<float>>;

constexpr int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// |x|, at most `most`; NaN stays NaN.
ESC_ARCH_INLINE Vec bounded_magnitude(Vec x, float most) {
  const Vec magnitude = (Vec)((IntVec)x & 0x7fffffff);
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(_mm512_set1_ps(most), magnitude);  // the second operand where one is NaN
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(_mm256_set1_ps(most), magnitude);
#else
  return broadcast(most) < magnitude ? broadcast(most) : magnitude;
#endif
}

// As bounded_magnitude, but NaN may become `most`.
ESC_ARCH_INLINE Vec bounded_magnitude_of_number(Vec x, float most) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_range_ps(x, _mm512_set1_ps(most), 0b1010);  // the smaller magnitude, its sign cleared
#else
  return bounded_magnitude(x, most);
#endif
}

// max(x, 0); NaN stays NaN.
ESC_ARCH_INLINE Vec positive_part(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(_mm512_setzero_ps(), x);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(_mm256_setzero_ps(), x);
#else
  return Vec{} > x ? Vec{} : x;
#endif
}

template <int64_t count>
ESC_ARCH_INLINE Vec polynomial(const float (&coefficients)[count], Vec x) {
  Vec value = broadcast(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int64_t i = count - 2; i >= 0; --i) value = value * x + broadcast(coefficients[i]);
  return value;
}

// gelu(x) = max(x, 0) - |x| Q(|x|) with Q(a) = erfc(a / sqrt 2) / 2. Q is ((p^2 + c)^2 + d)^2 with a polynomial p of
// degree 7, where c and d cost nothing beside the squares (minimax fit of a Q(a) on [0, 5.5], then rounded so that
// its error in float32 is at most 1.2e-7, and zero on average; beyond, a Q(a) is below that).
constexpr float kRootOfTail[] = {0.9148175716400146f,     -0.09166280925273895f,   -0.031993620097637177f,
                                 -0.0007354826084338129f, 0.0015616597374901175f,  -5.384847554523731e-06f,
                                 -4.4766358769265935e-05f, 4.240161615598481e-06f};
constexpr float kInSquares[] = {0.0041700745932757854f, -0.0002763129014056176f};

ESC_ARCH_INLINE Vec gelu(Vec x) {
  const Vec magnitude = bounded_magnitude_of_number(x, 5.5f);
  Vec tail = polynomial(kRootOfTail, magnitude);
  tail = tail * tail + broadcast(kInSquares[0]);
  tail = tail * tail + broadcast(kInSquares[1]);
  tail *= tail;
  return positive_part(x) - magnitude * tail;
}

// Of 2^f on [-1/2, 1/2], and of Q(a) exp(a^2 / 2) on [0, 6]: minimax fits.
constexpr float kExp2[] = {1.0f, 0.6931471824645996f, 0.24022652208805084f, 0.05550327152013779f,
                           0.009617994539439678f, 0.001340043148957193f, 0.00015478022396564484f};
constexpr float kScaledTail[] = {
    0.5f,                   -0.3989412188529968f,   0.24998274445533752f,   -0.13286930322647095f,
    0.06212523952126503f,   -0.025840483605861664f, 0.009422430768609047f,  -0.0028959615156054497f,
    0.0007094663451425731f, -0.0001296962145715952f, 1.63034928846173e-05f, -1.2410607723722933e-06f,
    4.2753221407565434e-08f};

struct GeluAndSlope {
  Vec value, slope;
};

// With a = |x| and E = exp(-a^2 / 2): gelu'(-a) = Q(a) - a E / sqrt(2 pi), and gelu'(a) is 1 less that.
ESC_ARCH_INLINE GeluAndSlope gelu_and_slope(Vec x) {
  const Vec magnitude = bounded_magnitude(x, 6.0f);
  const Vec exponent = magnitude * magnitude * broadcast(-0.7213475204444817f);
  const Vec shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers, kept in the low bits
  const Vec shifted = exponent + shifter;
  const Vec power = (Vec)(((IntVec)shifted << 23) + (127 << 23));
  const Vec gaussian = polynomial(kExp2, exponent - (shifted - shifter)) * power;
  const Vec scaled_tail = polynomial(kScaledTail, magnitude);
  const Vec slope = gaussian * (scaled_tail - magnitude * broadcast(0.3989422804014327f));
  return {positive_part(x) - magnitude * gaussian * scaled_tail, Vec{} > x ? slope : broadcast(1.0f) - slope};
}

}  // namespace esc_arch
