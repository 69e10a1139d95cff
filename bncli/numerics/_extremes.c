/* Minimum and maximum of each column of rows of values: exact in any order, so in the order that is fastest. */

#include <math.h>
#include "_vectors.h"

#define WIDE 128 /* columns, or columns of several rows, side by side: their vectors stay in the first-level cache */
#define STEPS 4  /* rows, or several rows, compared before the result is stored */
#define MIN(a, b) ((a) < (b) ? (a) : (b)) /* instructions of their own, which loops over these become */
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Lower `low` and raise `high`, of one number per column, to the values of x. Narrow rows are taken several at a time,
   as one wide row. A zero is stored without its sign. Where x holds NaN, the result has no meaning. */
#define EXTREMES(T, TYPE, LEAST, MOST)                                                                                 \
CLONES static void extremes_##T(const TYPE *x, size rows, size columns, double *low, double *high)                     \
{                                                                                                                      \
    for (size tile = 0; tile < columns; tile += WIDE, x += WIDE, low += WIDE, high += WIDE) {                          \
        size width = MIN(columns - tile, WIDE), lanes = 1, step = 0;                                                   \
        while (2 * lanes * columns <= WIDE && 2 * lanes * STEPS <= rows) lanes *= 2;                                   \
        size wide = width * lanes, stride = columns * lanes, steps = rows / lanes;                                     \
        TYPE least[WIDE], most[WIDE];                                                                                  \
        for (size i = 0; i < wide; i++) { least[i] = MOST; most[i] = LEAST; }                                          \
        for (; step + STEPS <= steps; step += STEPS) {                                                                 \
            const TYPE *a = x + step * stride, *b = a + stride, *c = b + stride, *d = c + stride;                      \
            for (size i = 0; i < wide; i++) {                                                                          \
                TYPE l1 = MIN(a[i], b[i]), l2 = MIN(c[i], d[i]), m1 = MAX(a[i], b[i]), m2 = MAX(c[i], d[i]);           \
                TYPE l = MIN(l1, l2), m = MAX(m1, m2);                                                                 \
                least[i] = MIN(l, least[i]);                                                                           \
                most[i] = MAX(m, most[i]);                                                                             \
            }                                                                                                          \
        }                                                                                                              \
        for (; step < steps; step++)                                                                                   \
            for (size i = 0; i < wide; i++) {                                                                          \
                least[i] = MIN(x[step * stride + i], least[i]);                                                        \
                most[i] = MAX(x[step * stride + i], most[i]);                                                          \
            }                                                                                                          \
        for (size i = 0; i < (rows - steps * lanes) * columns; i++) { /* none with one lane */                         \
            least[i] = MIN(x[steps * stride + i], least[i]);                                                           \
            most[i] = MAX(x[steps * stride + i], most[i]);                                                             \
        }                                                                                                              \
        while (lanes > 1) {                                                                                            \
            lanes /= 2;                                                                                                \
            for (size i = 0; i < lanes * width; i++) {                                                                 \
                least[i] = MIN(least[i + lanes * width], least[i]);                                                    \
                most[i] = MAX(most[i + lanes * width], most[i]);                                                       \
            }                                                                                                          \
        }                                                                                                              \
        for (size i = 0; i < width; i++) {                                                                             \
            double l = (double)least[i] + 0.0, m = (double)most[i] + 0.0;                                              \
            low[i] = MIN(l, low[i]);                                                                                   \
            high[i] = MAX(m, high[i]);                                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
}

EXTREMES(f4, float, -INFINITY, INFINITY)
EXTREMES(f8, double, -INFINITY, INFINITY)
EXTREMES(i1, int8_t, INT8_MIN, INT8_MAX)
EXTREMES(u1, uint8_t, 0, UINT8_MAX)
EXTREMES(i2, int16_t, INT16_MIN, INT16_MAX)
EXTREMES(u2, uint16_t, 0, UINT16_MAX)
EXTREMES(i4, int32_t, INT32_MIN, INT32_MAX)
EXTREMES(u4, uint32_t, 0, UINT32_MAX)
EXTREMES(i8, int64_t, INT64_MIN, INT64_MAX)
EXTREMES(u8, uint64_t, 0, UINT64_MAX)

/* Of each of G blocks of (rows, columns) values; `low` and `high`, of shape (G, columns), hold what is known so far.
   `code` as in bn_blocks. Returns 0, or 1 for a type without a kernel. */
int bn_extremes(int code, const void *x, size blocks, size rows, size columns, double *low, double *high)
{
    switch (code) {
#define CASE(KIND, BYTES, T, TYPE)                                                                                     \
    case KIND << 8 | BYTES:                                                                                            \
        for (size g = 0; g < blocks; g++)                                                                              \
            extremes_##T((const TYPE *)x + g * rows * columns, rows, columns, low + g * columns, high + g * columns);  \
        return 0;
    CASE('f', 4, f4, float) CASE('f', 8, f8, double)
    CASE('i', 1, i1, int8_t) CASE('i', 2, i2, int16_t) CASE('i', 4, i4, int32_t) CASE('i', 8, i8, int64_t)
    CASE('b', 1, u1, uint8_t) CASE('u', 1, u1, uint8_t) CASE('u', 2, u2, uint16_t) CASE('u', 4, u4, uint32_t)
    CASE('u', 8, u8, uint64_t)
    }
    return 1;
}
