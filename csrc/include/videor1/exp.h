// e^x for x <= 0, for floats and for vectors of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "videor1/simd.h"

namespace videor1 {

struct Scalar {
  using F = float;
  using I = int32_t;
};

// x becomes e^x, to 2 units in the last place; below -87 it is 0. Branch-free, so that loops over it are vectorised. P
// names the types: F, a float or a vector of floats, and I, the same of int32_t. Vectors are neither arguments, which
// would be passed as the plainest CPU does, nor a template's arguments, which lose their alignment.
template <typename P>
ALWAYS_INLINE void exp_negative(typename P::F& x) {
  using F = typename P::F;
  const F lowest = F{} - 87.0f;
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  const F clamped = x < lowest ? lowest : x;
  const F shifted = clamped * 1.44269504f + magic;
  const F n = shifted - magic;
  const F f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  F y = F{} + 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  typename P::I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof power);
  x = x < lowest ? F{} : y * power;
}

}  // namespace videor1
