/* Moments of blocks of values: what kernels.py does in NumPy, in one pass.

   Called through ctypes, which releases the global interpreter lock. Sums run in a fixed order: vectors run across
   features, or hold lanes that are added in a fixed order, and products are never contracted (see _sums.h). So results
   are the same bits on every processor, whatever the width of its vectors. */

#include <math.h>
#include "_sums.h"

#define RUN_BYTES 128 /* bytes of one column taken at a time: 128 squares of a byte fit 32 bits */
#define WIDTH 16     /* sums side by side: 4 vectors of sums and 4 of squares suit the 16 registers of AVX2 */
#define RUN 16       /* rows summed before they are added to the sums of the block: short sums round less */
#define SHARE 8      /* the pivot is computed from at least one in 8 values of a block */

typedef int32_t whole __attribute__((vector_size(16)));
typedef int32_t eight __attribute__((vector_size(32)));
/* four doubles from four small integers, and eight 32-bit integers from eight bytes */
#define LOAD_four(p) __builtin_convertvector(((whole){(p)[0], (p)[1], (p)[2], (p)[3]}), four)
#define LOAD_eight(p) ((eight){(p)[0], (p)[1], (p)[2], (p)[3], (p)[4], (p)[5], (p)[6], (p)[7]})

/* Mean (high and low part) and m2 of one feature of a block, from the sums of x - pivot and of their squares:
   mean = pivot + sum / n, m2 = squares - sum^2 / n (the shifted data of Chan, Golub & LeVeque 1983, section 3). Little
   cancels, since the pivot is near the mean. two_sum keeps the digits of the mean that the exponent of the pivot cuts
   off. */
INLINE void finish(double n, double pivot, double sum, double squares, double *mean, double *low, double *m2)
{
    double offset = sum / n, m = squares - sum * offset;
    *m2 = m < 0 ? 0 : m;
    two_sum(pivot, offset, mean, low);
}

/* The distance of the rows that the pivot is computed from: every row of small blocks, every 8th of large ones. */
INLINE size pivot_step(size rows)
{
    size step = rows / SHARE;
    return step < 1 ? 1 : step > SHARE ? SHARE : step;
}

/* `finish` for four columns. DOUBTFUL marks columns that look_T has to examine: the subtraction cancelled more than
   half of the squares (the pivot is more than one sd from the mean), or the squares underflowed. */
#define FINISH(n, pivot, sum, squares, mean, low, m2)                                                                  \
    do {                                                                                                               \
        four offset_ = (sum) / (n);                                                                                    \
        m2 = (squares) - (sum) * offset_;                                                                              \
        m2 = CHOOSE(m2 < 0, ALL(0.0), m2);                                                                             \
        TWO_SUM(pivot, offset_, mean, low);                                                                            \
    } while (0)
#define DOUBTFUL(n, sum, squares, m2) ((2 * (sum) * ((sum) / (n)) > (squares)) | ((m2) < TINY))

/* Compute each block with the kernel for its width. Strips of 16 or 8 columns cover wide rows. The last strip overlaps
   the one before and computes the same bits again, which avoids a loop for the remaining columns. */
#define EACH_BLOCK(T, ONE, FEW)                                                                                        \
    for (size g = 0; g < blocks; g++, x += rows * columns, mean += columns, low += columns, m2 += columns) {           \
        if (columns == 1) ONE##_##T(x, rows, 1, mean, low, m2);                                                        \
        else if (columns == 2) FEW##_##T(x, rows, 2, mean, low, m2);                                                   \
        else if (columns == 3) narrow_##T(x, rows, 3, mean, low, m2);                                                  \
        else if (columns == 4) FEW##_##T(x, rows, 4, mean, low, m2);                                                   \
        else if (columns < WIDTH / 2) narrow_##T(x, rows, (int)columns, mean, low, m2);                                \
        else if (columns < WIDTH) {                                                                                    \
            size at = columns - WIDTH / 2;                                                                             \
            strip2_##T(x, rows, columns, mean, low, m2);                                                               \
            if (at) strip2_##T(x + at, rows, columns, mean + at, low + at, m2 + at);                                   \
        }                                                                                                              \
        else for (size c = 0; c < columns; c += WIDTH) {                                                               \
            size at = c + WIDTH <= columns ? c : columns - WIDTH;                                                      \
            strip4_##T(x + at, rows, columns, mean + at, low + at, m2 + at);                                           \
        }                                                                                                              \
    }

/* STRIP: N times four neighboring columns of a block, in two passes. The first computes the pivot: the first row plus
   the mean offset of every 8th row from it (kernels._about_pivot states the error bound). The second sums deviations
   from the pivot and their squares. Sums of RUN rows are added to those of the block: two levels of short sums have
   smaller rounding errors than one long sum. */
#define STRIP(N, T, TYPE)                                                                                              \
INLINE void strip##N##_##T(const TYPE *x, size rows, size stride, double *mean, double *low, double *m2)               \
{                                                                                                                      \
    four pivot[N], sum[N], squares[N];                                                                                 \
    size step = pivot_step(rows);                                                                                      \
    double n = (double)rows, used = (double)((rows + step - 1) / step);                                                \
    for (int i = 0; i < N; i++) sum[i] = squares[i] = pivot[i] = ALL(0.0);                                             \
    for (size r = 0; r < rows; r += step)                                                                              \
        for (int i = 0; i < N; i++) pivot[i] += FOUR(x + r * stride + 4 * i) - FOUR(x + 4 * i);                        \
    for (int i = 0; i < N; i++) pivot[i] = FOUR(x + 4 * i) + pivot[i] / used;                                          \
    for (size begin = 0; begin < rows; begin += RUN) {                                                                 \
        size end = begin + RUN < rows ? begin + RUN : rows;                                                            \
        four a[N], b[N];                                                                                               \
        for (int i = 0; i < N; i++) a[i] = b[i] = ALL(0.0);                                                            \
        for (size r = begin; r < end; r++)                                                                             \
            for (int i = 0; i < N; i++) {                                                                              \
                four d = FOUR(x + r * stride + 4 * i) - pivot[i];                                                      \
                a[i] += d;                                                                                             \
                b[i] += d * d;                                                                                         \
            }                                                                                                          \
        for (int i = 0; i < N; i++) { sum[i] += a[i]; squares[i] += b[i]; }                                            \
    }                                                                                                                  \
    mask look = {0};                                                                                                   \
    for (int i = 0; i < N; i++) {                                                                                      \
        four hi, lo, m;                                                                                                \
        FINISH(n, pivot[i], sum[i], squares[i], hi, lo, m);                                                            \
        PUT(mean + 4 * i, hi);                                                                                         \
        PUT(low + 4 * i, lo);                                                                                          \
        PUT(m2 + 4 * i, m);                                                                                            \
        look |= DOUBTFUL(n, sum[i], squares[i], m);                                                                    \
    }                                                                                                                  \
    if (ANY(look))                                                                                                     \
        for (int c = 0; c < 4 * N; c++)                                                                                \
            look_##T(x + c, rows, stride, sum[c / 4][c % 4], squares[c / 4][c % 4], mean + c, low + c, m2 + c);        \
}

/* FEW: 1, 2 or 4 columns, which divide the four lanes: a vector holds 4, 2 or 1 rows, and value i of the block belongs
   to column i % columns. Four vectors of sums run side by side; FOLD adds the lanes of a column in a fixed order. */
#define FOLD(v, columns)                                                                                               \
    ((columns) == 4   ? (v)                                                                                            \
     : (columns) == 2 ? (v) + (four){(v)[2], (v)[3], (v)[0], (v)[1]}                                                   \
                      : ALL(((v)[0] + (v)[2]) + ((v)[1] + (v)[3])))
#define FEW(T, TYPE)                                                                                                   \
INLINE void few_##T(const TYPE *x, size rows, int columns, double *mean, double *low, double *m2)                      \
{                                                                                                                      \
    size values = rows * columns, step = pivot_step(rows) * columns, used = (values + step - 1) / step, at = 0;        \
    int lanes = 4 / columns;                                                                                           \
    double n = (double)rows;                                                                                           \
    four first, offset = ALL(0.0), pivot, s[4], q[4], hi, lo, m;                                                       \
    for (int j = 0; j < 4; j++) first[j] = (double)x[j % columns];                                                     \
    for (; at + (lanes - 1) * step < values; at += lanes * step) {                                                     \
        four some;                                                                                                     \
        for (int j = 0; j < 4; j++) some[j] = (double)x[at + j / columns * step + j % columns];                        \
        offset += some - first;                                                                                        \
    }                                                                                                                  \
    for (; at < values; at += step)                                                                                    \
        for (int c = 0; c < columns; c++) offset[c] += (double)x[at + c] - first[c];                                   \
    pivot = first + FOLD(offset, columns) / (double)used;                                                              \
    for (int i = 0; i < 4; i++) s[i] = q[i] = ALL(0.0);                                                                \
    for (at = 0; at + WIDTH <= values; at += WIDTH)                                                                    \
        for (int i = 0; i < 4; i++) {                                                                                  \
            four d = FOUR(x + at + 4 * i) - pivot;                                                                     \
            s[i] += d;                                                                                                 \
            q[i] += d * d;                                                                                             \
        }                                                                                                              \
    four sum = (s[0] + s[1]) + (s[2] + s[3]), squares = (q[0] + q[1]) + (q[2] + q[3]);                                 \
    for (; at < values; at++) {                                                                                        \
        double d = (double)x[at] - pivot[at % 4];                                                                      \
        sum[at % 4] += d;                                                                                              \
        squares[at % 4] += d * d;                                                                                      \
    }                                                                                                                  \
    sum = FOLD(sum, columns);                                                                                          \
    squares = FOLD(squares, columns);                                                                                  \
    FINISH(n, pivot, sum, squares, hi, lo, m);                                                                         \
    for (int c = 0; c < columns; c++) { mean[c] = hi[c]; low[c] = lo[c]; m2[c] = m[c]; }                               \
    if (ANY(DOUBTFUL(n, sum, squares, m)))                                                                             \
        for (int c = 0; c < columns; c++)                                                                              \
            look_##T(x + c, rows, columns, sum[c], squares[c], mean + c, low + c, m2 + c);                             \
}

/* FLOATING: all kernels of one type whose sums round.

   look_T recomputes a doubtful column with its first mean as pivot, unless the squares overflow. It sets m2 to NaN
   where values vary but their squares underflowed: kernels.py reads that as "no result".
   narrow_T takes 3, 5, 6 or 7 columns. `width` is the largest multiple of `columns` in WIDTH lanes: 15 of 16 with 3 or
   5 columns. Each step loads 16 values and advances by `width`, so that lane i always holds column i % columns; the
   lanes from `width` on are ignored. */
#define FLOATING(T, TYPE)                                                                                              \
INLINE void look_##T(const TYPE *x, size rows, size stride, double sum, double squares, double *mean, double *low,     \
                     double *m2)                                                                                       \
{                                                                                                                      \
    if (2 * sum * (sum / (double)rows) > squares) { /* the pivot is more than sd from the mean */                      \
        double again = *mean, a = 0, b = 0;                                                                            \
        for (size r = 0; r < rows; r++) {                                                                              \
            double d = (double)x[r * stride] - again;                                                                  \
            a += d;                                                                                                    \
            b += d * d;                                                                                                \
        }                                                                                                              \
        if (isfinite(b)) finish((double)rows, again, a, b, mean, low, m2);                                             \
    }                                                                                                                  \
    if (*m2 < TINY)                                                                                                    \
        for (size r = 1; r < rows; r++)                                                                                \
            if ((double)x[r * stride] != (double)x[0]) { *m2 = NAN; return; } /* squares underflowed */                \
}                                                                                                                      \
STRIP(4, T, TYPE)                                                                                                      \
STRIP(2, T, TYPE)                                                                                                      \
FEW(T, TYPE)                                                                                                           \
INLINE void narrow_##T(const TYPE *x, size rows, int columns, double *mean, double *low, double *m2)                   \
{                                                                                                                      \
    double offset[WIDTH / 2] = {0}, pivot[WIDTH] = {0}, a[WIDTH], b[WIDTH];                                            \
    int lanes = WIDTH / columns, width = lanes * columns;                                                              \
    size step = pivot_step(rows), used = (rows + step - 1) / step, at = 0, values = rows * columns;                    \
    for (size r = 0; r < rows; r += step)                                                                              \
        for (int c = 0; c < columns; c++) offset[c] += (double)x[r * columns + c] - (double)x[c];                      \
    for (int c = 0; c < width; c++) pivot[c] = (double)x[c % columns] + offset[c % columns] / (double)used;            \
    four s[4], q[4];                                                                                                   \
    for (int i = 0; i < 4; i++) s[i] = q[i] = ALL(0.0);                                                                \
    for (; at + WIDTH <= values; at += width) /* lanes from `width` on hold sums that are not used */                  \
        for (int i = 0; i < 4; i++) {                                                                                  \
            four d = FOUR(x + at + 4 * i) - FOUR(pivot + 4 * i);                                                       \
            s[i] += d;                                                                                                 \
            q[i] += d * d;                                                                                             \
        }                                                                                                              \
    for (int i = 0; i < 4; i++) { PUT(a + 4 * i, s[i]); PUT(b + 4 * i, q[i]); }                                        \
    for (; at < values; at++) {                                                                                        \
        int c = (int)(at % columns);                                                                                   \
        double d = (double)x[at] - pivot[c];                                                                           \
        a[c] += d;                                                                                                     \
        b[c] += d * d;                                                                                                 \
    }                                                                                                                  \
    for (int c = 0; c < columns; c++) {                                                                                \
        double sum = a[c], squares = b[c];                                                                             \
        for (int lane = 1; lane < lanes; lane++) { sum += a[lane * columns + c]; squares += b[lane * columns + c]; }   \
        finish((double)rows, pivot[c], sum, squares, mean + c, low + c, m2 + c);                                       \
        look_##T(x + c, rows, columns, sum, squares, mean + c, low + c, m2 + c);                                       \
    }                                                                                                                  \
}                                                                                                                      \
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low,          \
                              double *m2)                                                                              \
{                                                                                                                      \
    EACH_BLOCK(T, few, few)                                                                                            \
}

FLOATING(f4, float)
FLOATING(f8, double)
FLOATING(i4, int32_t)
FLOATING(u4, uint32_t)
FLOATING(i8, int64_t)
FLOATING(u8, uint64_t)

/* 8- and 16-bit integers need no pivot: the sums of up to 2^15 values (31 bits) and of their squares (47 bits) are
   exact in float64 and in 64-bit integers. So are n * q and s * s. m2 is rounded twice, by conversion and division. */
INLINE void exact(size rows, double sum, double squares, double *mean, double *low, double *m2)
{
    int64_t n = rows, s = (int64_t)sum, q = (int64_t)squares;
    double whole = (double)(n * q - s * s), high; /* n * m2 */
    *m2 = whole / (double)n;
    *mean = sum / (double)n;
    /* The low part is the remainder of the division, sum - mean * n, over n. To make the product exact, the mean is
       split into its upper 24 bits and the rest (Dekker 1971), whose products with n < 2^16 fit in 53 bits. */
    high = (double)(float)*mean;
    *low = ((sum - high * (double)n) - (*mean - high) * (double)n) / (double)n;
}

/* WHOLE: the same kernels for integers whose sums are exact, in vectors VECTOR of W numbers NUMBER: doubles for 16
   bits, 32-bit integers for bytes (the sum of 2^15 squares of a byte is below 2^31). Their order does not matter. */
#define WHOLE_STRIP(N, T, TYPE, VECTOR, W)                                                                             \
INLINE void strip##N##_##T(const TYPE *x, size rows, size stride, double *mean, double *low, double *m2)               \
{                                                                                                                      \
    VECTOR a[4 * N / W], b[4 * N / W];                                                                                 \
    for (int i = 0; i < 4 * N / W; i++) a[i] = b[i] = (VECTOR){0};                                                     \
    for (size r = 0; r < rows; r++)                                                                                    \
        for (int i = 0; i < 4 * N / W; i++) {                                                                          \
            VECTOR d = LOAD_##VECTOR(x + r * stride + W * i);                                                          \
            a[i] += d;                                                                                                 \
            b[i] += d * d;                                                                                             \
        }                                                                                                              \
    for (int c = 0; c < 4 * N; c++)                                                                                    \
        exact(rows, (double)a[c / W][c % W], (double)b[c / W][c % W], mean + c, low + c, m2 + c);                      \
}
#define WHOLE(T, TYPE, VECTOR, W, NUMBER, ONE)                                                                         \
WHOLE_STRIP(4, T, TYPE, VECTOR, W)                                                                                     \
WHOLE_STRIP(2, T, TYPE, VECTOR, W)                                                                                     \
INLINE void narrow_##T(const TYPE *x, size rows, int columns, double *mean, double *low, double *m2)                   \
{                                                                                                                      \
    NUMBER a[WIDTH], b[WIDTH];                                                                                         \
    int lanes = WIDTH / columns, width = lanes * columns;                                                              \
    size at = 0, values = rows * columns;                                                                              \
    VECTOR s[WIDTH / W], q[WIDTH / W];                                                                                 \
    for (int i = 0; i < WIDTH / W; i++) s[i] = q[i] = (VECTOR){0};                                                     \
    for (; at + WIDTH <= values; at += width) /* lanes from `width` on hold sums that are not used */                  \
        for (int i = 0; i < WIDTH / W; i++) {                                                                          \
            VECTOR d = LOAD_##VECTOR(x + at + W * i);                                                                  \
            s[i] += d;                                                                                                 \
            q[i] += d * d;                                                                                             \
        }                                                                                                              \
    for (int i = 0; i < WIDTH / W; i++) { PUT(a + W * i, s[i]); PUT(b + W * i, q[i]); }                                \
    for (; at < values; at++) {                                                                                        \
        NUMBER d = (NUMBER)x[at];                                                                                      \
        a[at % columns] += d;                                                                                          \
        b[at % columns] += d * d;                                                                                      \
    }                                                                                                                  \
    for (int c = 0; c < columns; c++) {                                                                                \
        for (int lane = 1; lane < lanes; lane++) { a[c] += a[lane * columns + c]; b[c] += b[lane * columns + c]; }     \
        exact(rows, (double)a[c], (double)b[c], mean + c, low + c, m2 + c);                                            \
    }                                                                                                                  \
}                                                                                                                      \
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low,          \
                              double *m2)                                                                              \
{                                                                                                                      \
    EACH_BLOCK(T, ONE, narrow)                                                                                         \
}

/* LINE: one column of bytes. They are widened to 16 bits, since one instruction (pmaddwd) multiplies those and adds
   pairs of products in 32 bits; compilers emit it for these three loops. */
#define LINE(T, TYPE)                                                                                                  \
INLINE void line_##T(const TYPE *x, size rows, int columns, double *mean, double *low, double *m2)                     \
{                                                                                                                      \
    int64_t sum = 0, squares = 0;                                                                                      \
    size at = 0, values = rows * columns;                                                                              \
    for (; at + RUN_BYTES <= values; at += RUN_BYTES) {                                                                \
        int16_t run[RUN_BYTES];                                                                                        \
        int32_t a = 0, b = 0;                                                                                          \
        for (int r = 0; r < RUN_BYTES; r++) run[r] = x[at + r];                                                        \
        for (int r = 0; r < RUN_BYTES; r++) b += (int32_t)run[r] * run[r];                                             \
        for (int r = 0; r < RUN_BYTES; r++) a += run[r];                                                               \
        sum += a;                                                                                                      \
        squares += b;                                                                                                  \
    }                                                                                                                  \
    for (; at < values; at++) { sum += x[at]; squares += (int32_t)x[at] * x[at]; }                                     \
    exact(rows, (double)sum, (double)squares, mean, low, m2);                                                          \
}

LINE(i1, int8_t)
LINE(u1, uint8_t)
WHOLE(i1, int8_t, eight, 8, int32_t, line)
WHOLE(u1, uint8_t, eight, 8, int32_t, line)
WHOLE(i2, int16_t, four, 4, double, narrow)
WHOLE(u2, uint16_t, four, 4, double, narrow)

/* Moments of G blocks of (rows, columns) values; code is NumPy's kind and item size, such as 'f' << 8 | 4.
   Returns 0, or 1 for a type without a kernel. */
int bn_blocks(int code, const void *x, size blocks, size rows, size columns, double *mean, double *low, double *m2)
{
    switch (code) {
#define CASE(KIND, BYTES, T) case KIND << 8 | BYTES: blocks_##T(x, blocks, rows, columns, mean, low, m2); return 0;
    CASE('f', 4, f4) CASE('f', 8, f8)
    CASE('i', 1, i1) CASE('i', 2, i2) CASE('i', 4, i4) CASE('i', 8, i8)
    CASE('b', 1, u1) CASE('u', 1, u1) CASE('u', 2, u2) CASE('u', 4, u4) CASE('u', 8, u8)
    }
    return 1;
}
