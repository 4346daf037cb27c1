// float16 for compilers that lack it: storage, and conversions that round to nearest, ties to even.
#ifndef SHIM_HALF_H
#define SHIM_HALF_H

#include <cmath>
#include <cstdint>
#include <cstring>

namespace shim {

inline uint16_t HalfBits(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) {
        return sign | 0x7E00;
    }
    if (size >= 65520.0f) {
        return sign | 0x7C00;
    }
    if (size < 6.103515625e-5f) {
        // Below the smallest normal number the steps are 2^-24; nearbyint rounds ties to even.
        return sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f));
    }
    bits &= 0x7FFFFFFF;
    bits += 0xFFF + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits - (112u << 23)) >> 13);
}

inline float HalfValue(uint16_t bits)
{
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    float size;
    if (exponent == 31) {
        size = fraction ? NAN : INFINITY;
    } else {
        size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24);
    }
    return bits & 0x8000 ? -size : size;
}

struct half {
    uint16_t bits;

    half() = default;
    half(float value) : bits(HalfBits(value)) {}
    explicit operator float() const
    {
        return HalfValue(bits);
    }
};

}  // namespace shim

using shim::half;

#endif
