/* Test mode: what affine.Affine does in NumPy, with the same bits, in one pass. */

#include "_vectors.h"

/* the exponent bits of float32 and float64: all of them are set in infinities and NaN only */
#define INFINITE_4 0x7f800000u
#define INFINITE_8 0x7ff0000000000000u

/* ROW: one row, or the positions of one feature. Computes y = (x - mean) * scale + beta in double, with each operation
   rounded as in NumPy, then rounds to the type of the output. Results that are not finite are detected by their bits,
   which compilers vectorize, unlike a branch. `one`, a constant in each call, says that all values are of one feature.
   */
#define ROW(IN, IN_TYPE, OUT, OUT_TYPE, BITS)                                                                          \
INLINE BITS row_##IN##_##OUT(size count, const IN_TYPE *restrict x, const double *restrict mean,                       \
                             const double *restrict scale, const double *restrict beta, OUT_TYPE *restrict y, int one) \
{                                                                                                                      \
    BITS found = 0;                                                                                                    \
    for (size i = 0; i < count; i++) {                                                                                 \
        size c = one ? 0 : i;                                                                                          \
        BITS bits;                                                                                                     \
        y[i] = (OUT_TYPE)(((double)x[i] - mean[c]) * scale[c] + beta[c]);                                              \
        memcpy(&bits, y + i, sizeof bits);                                                                             \
        found |= (bits & (BITS)INFINITE_##OUT) == (BITS)INFINITE_##OUT;                                                \
    }                                                                                                                  \
    return found;                                                                                                      \
}                                                                                                                      \
CLONES static int rows_##IN##_##OUT(size rows, size features, size positions, const IN_TYPE *x, const double *mean,    \
                                    const double *scale, const double *beta, OUT_TYPE *y)                              \
{                                                                                                                      \
    BITS found = 0;                                                                                                    \
    for (size r = 0; r < rows; r++) {                                                                                  \
        if (positions == 1) {                                                                                          \
            found |= row_##IN##_##OUT(features, x, mean, scale, beta, y, 0);                                           \
            x += features;                                                                                             \
            y += features;                                                                                             \
            continue;                                                                                                  \
        }                                                                                                              \
        for (size c = 0; c < features; c++, x += positions, y += positions)                                            \
            found |= row_##IN##_##OUT(positions, x, mean + c, scale + c, beta + c, y, 1);                              \
    }                                                                                                                  \
    return found != 0;                                                                                                 \
}
#define BOTH(IN, TYPE) ROW(IN, TYPE, 4, float, uint32_t) ROW(IN, TYPE, 8, double, uint64_t)
BOTH(f4, float)
BOTH(f8, double)
BOTH(u1, uint8_t)
BOTH(i1, int8_t)
BOTH(u2, uint16_t)
BOTH(i2, int16_t)
BOTH(u4, uint32_t)
BOTH(i4, int32_t)

/* y = (x - mean) * scale + beta of (rows, features, positions) values. `in` is NumPy's kind and item size, such as
   'f' << 8 | 4, and `out` the item size of y, 4 or 8. Returns 0; 1 if a result is not finite; or 2 for a type without a
   kernel. */
int bn_normalize(int in, int out, size rows, size features, size positions, const void *x, const double *mean,
                 const double *scale, const double *beta, void *y)
{
    switch (in) {
#define CASE(KIND, BYTES, IN)                                                                                          \
    case KIND << 8 | BYTES: return out == 4 ? rows_##IN##_4(rows, features, positions, x, mean, scale, beta, y)        \
                                            : rows_##IN##_8(rows, features, positions, x, mean, scale, beta, y);
    CASE('f', 4, f4) CASE('f', 8, f8) CASE('b', 1, u1) CASE('u', 1, u1) CASE('i', 1, i1)
    CASE('u', 2, u2) CASE('i', 2, i2) CASE('u', 4, u4) CASE('i', 4, i4)
    }
    return 2;
}
