// Vectors of float as wide as the CPU's registers, in the compiler's own types: one source for AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

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

ESC_ARCH_INLINE Vec load(const float* from) {
  return *reinterpret_cast<const UnalignedVec*>(from);
}

ESC_ARCH_INLINE void store(float* to, Vec value) {
  *reinterpret_cast<UnalignedVec*>(to) = value;
}

ESC_ARCH_INLINE Vec load_first(const float* from, int64_t count) {
  Vec value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

ESC_ARCH_INLINE void store_first(float* to, Vec value, int64_t count) {
  std::memcpy(to, &value, count * sizeof(float));
}

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

constexpr int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// |x|, at most `most`; NaN stays NaN.
ESC_ARCH_INLINE Vec bounded_magnitude(Vec x, float most) {
  const Vec magnitude = (Vec)((IntVec)x & 0x7fffffff);
  return broadcast(most) < magnitude ? broadcast(most) : magnitude;
}

// max(x, 0); NaN stays NaN.
ESC_ARCH_INLINE Vec positive_part(Vec x) {
  return Vec{} > x ? Vec{} : x;
}

template <int64_t count>
ESC_ARCH_INLINE Vec polynomial(const float (&coefficients)[count], Vec x) {
  Vec value = broadcast(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int64_t i = count - 2; i >= 0; --i) value = value * x + broadcast(coefficients[i]);
  return value;
}

// gelu(x) = max(x, 0) - |x| Q(|x|) with Q(a) = erfc(a / sqrt 2) / 2. Q's eighth root is as good as a polynomial of
// degree 8 (minimax fit on [0, 5.5], error of the GELU at most 1.1e-7; beyond, |x| Q(|x|) is below that).
constexpr float kEighthRootOfTail[] = {
    0.9170040488243103f,    -0.0914577767252922f,   -0.031926751136779785f,
    -0.0006742628174833953f, 0.001506535685621202f, 3.312693297630176e-05f,
    -5.990106728859246e-05f, 7.422256203426514e-06f, -2.921329951277585e-07f};

ESC_ARCH_INLINE Vec gelu(Vec x) {
  const Vec magnitude = bounded_magnitude(x, 5.5f);
  Vec tail = polynomial(kEighthRootOfTail, magnitude);
  tail *= tail;
  tail *= tail;
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
