/* Moments of blocks, and the merging of many moments at once: what kernels.py and moments.py do in NumPy, in one pass.

   Called through ctypes, which lets go of the interpreter's lock. Sums run in a fixed order, vectors run across features
   or lanes that are added up in a fixed order, and products are never contracted (-ffp-contract=off): the bits do not
   depend on the processor. */

#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <math.h>
#ifndef _WIN32
#include <unistd.h>
#endif
#include "_vectors.h"

#define RUN_BYTES 128 /* bytes of one column taken at a time */
#define WIDTH 16     /* sums side by side, in registers */
#define RUN 16       /* rows summed before they go into the block's sums: short sums round little */
#define SHARE 8      /* the pivot is found from at least an 8th of a block */
#define TINY 1e-300  /* a sum of squares below this has lost digits to underflow */

typedef int32_t whole __attribute__((vector_size(16)));
typedef int32_t eight __attribute__((vector_size(32)));
/* of small integers */
#define LOAD_four(p) __builtin_convertvector(((whole){(p)[0], (p)[1], (p)[2], (p)[3]}), four)
#define LOAD_eight(p) ((eight){(p)[0], (p)[1], (p)[2], (p)[3], (p)[4], (p)[5], (p)[6], (p)[7]})
#define TWO_SUM(a, b, sum, error)                                                                                      \
    do {                                                                                                               \
        sum = (a) + (b);                                                                                               \
        four t_ = sum - (a);                                                                                           \
        error = ((a) - (sum - t_)) + ((b) - t_);                                                                       \
    } while (0)

INLINE void two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b, t = s - a;
    *sum = s;
    *error = (a - (s - t)) + (b - t);
}

INLINE void quick_two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b;
    *sum = s;
    *error = b - (s - a);
}

/* Mean, its low part and m2 of one feature of a block, from its sums about the pivot. */
INLINE void finish(double n, double pivot, double sum, double squares, double *mean, double *low, double *m2)
{
    double offset = sum / n, m = squares - sum * offset;
    *m2 = m < 0 ? 0 : m;
    two_sum(pivot, offset, mean, low);
}

INLINE size pivot_step(size rows)
{
    size step = rows / SHARE;
    return step < 1 ? 1 : step > SHARE ? SHARE : step;
}

/* `finish` for four columns, and where its result needs a look (see look_T). */
#define FINISH(n, pivot, sum, squares, mean, low, m2)                                                                  \
    do {                                                                                                               \
        four offset_ = (sum) / (n);                                                                                    \
        m2 = (squares) - (sum) * offset_;                                                                              \
        m2 = CHOOSE(m2 < 0, ALL(0.0), m2);                                                                             \
        TWO_SUM(pivot, offset_, mean, low);                                                                            \
    } while (0)
#define DOUBTFUL(n, sum, squares, m2) ((2 * (sum) * ((sum) / (n)) > (squares)) | ((m2) < TINY))

/* Each block in turn, as many columns side by side as there are; a last strip overlaps the one before. */
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

/* STRIP: N times four neighbouring columns of a block, about a pivot near the mean (see kernels._about_pivot). */
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

/* FEW: 1, 2 or 4 columns, several rows of them as lanes. */
#define FOLD(v, columns)                                                                                               \
    ((columns) == 4 ? (v) : (columns) == 2 ? (v) + (four){(v)[2], (v)[3], (v)[0], (v)[1]} : ALL(((v)[0] + (v)[2]) + ((v)[1] + (v)[3])))
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
        for (int c = 0; c < columns; c++) look_##T(x + c, rows, columns, sum[c], squares[c], mean + c, low + c, m2 + c); \
}

/* FLOATING: a block of `rows` rows of `columns` values; `narrow` takes several rows of 3, 5, 6 or 7 columns as lanes. */
#define FLOATING(T, TYPE)                                                                                              \
INLINE void look_##T(const TYPE *x, size rows, size stride, double sum, double squares, double *mean, double *low,     \
                     double *m2)                                                                                       \
{                                                                                                                      \
    if (2 * sum * (sum / (double)rows) > squares) { /* the pivot lay farther than sd from the mean: once more */       \
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
            if ((double)x[r * stride] != (double)x[0]) { *m2 = NAN; return; } /* the squares vanished: values vary */ \
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
    for (; at + WIDTH <= values; at += width) /* lanes from `width` on hold nothing of use */                          \
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
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low, double *m2) \
{                                                                                                                      \
    EACH_BLOCK(T, few, few)                                                                                                 \
}

FLOATING(f4, float)
FLOATING(f8, double)
FLOATING(i4, int32_t)
FLOATING(u4, uint32_t)
FLOATING(i8, int64_t)
FLOATING(u8, uint64_t)

/* 8- and 16-bit integers: the sums of up to 2^15 values, and of their squares, are exact in float64. */
INLINE void exact(size rows, double sum, double squares, double *mean, double *low, double *m2)
{
    int64_t n = rows, s = (int64_t)sum, q = (int64_t)squares;
    double whole = (double)(n * q - s * s), high;
    *m2 = whole / (double)n;
    *mean = sum / (double)n;
    high = (double)(float)*mean; /* in two parts, whose products with n are exact */
    *low = ((sum - high * (double)n) - (*mean - high) * (double)n) / (double)n; /* the division's remainder */
}

/* WHOLE: sums in vectors VECTOR of W numbers NUMBER: float64 for 16 bits, 32-bit integers for bytes. */
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
    for (int c = 0; c < 4 * N; c++) exact(rows, (double)a[c / W][c % W], (double)b[c / W][c % W], mean + c, low + c, m2 + c); \
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
    for (; at + WIDTH <= values; at += width) /* lanes from `width` on hold nothing of use */                          \
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
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low, double *m2) \
{                                                                                                                      \
    EACH_BLOCK(T, ONE, narrow)                                                                                         \
}

/* One column of bytes: 16-bit numbers, whose products the processor adds two by two. */
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
   Returns 0, or 1 for a type that is not here. */
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

/* Moments of n features: count, mean and m2, the latter two as sums high + low. */
typedef struct { double *at[5]; } moments;
enum { COUNT, MEAN, LOW, M2, M2_LOW };

/* Moments.merge of four features: Chan, Golub & LeVeque (1983), see moments.py. */
INLINE void merge_four(const four a[5], const four b[5], four out[5])
{
    four count = a[COUNT] + b[COUNT], delta = (b[MEAN] - a[MEAN]) + (b[LOW] - a[LOW]);
    four base = a[MEAN], base_low = a[LOW], share, part, small, large, mean, m2, error, error1, error2;
    if (ANY((mask)(a[COUNT] != b[COUNT]))) {
        mask swap = b[COUNT] > a[COUNT];
        large = CHOOSE(swap, b[COUNT], a[COUNT]);
        small = CHOOSE(swap, a[COUNT], b[COUNT]) / CHOOSE(count > 1, count, ALL(1.0));
        share = CHOOSE(swap, -small, small);
        base = CHOOSE(swap, b[MEAN], base);
        base_low = CHOOSE(swap, b[LOW], base_low);
    } else { /* the same without a division */
        large = a[COUNT];
        share = small = CHOOSE(count > 0, ALL(0.5), ALL(0.0));
    }
    part = share * delta;
    TWO_SUM(base, part, mean, error);
    error += base_low;
    out[MEAN] = mean + error;
    out[LOW] = error - (out[MEAN] - mean);
    TWO_SUM(a[M2], b[M2], m2, error1);
    part = delta * (delta * (small * large));
    base = m2;
    TWO_SUM(base, part, m2, error2);
    error = (a[M2_LOW] + b[M2_LOW]) + (error1 + error2);
    out[M2] = m2 + error;
    out[M2_LOW] = error - (out[M2] - m2);
    /* the means differ, but by too little to square */
    out[M2] = CHOOSE((out[M2] < TINY) & (delta != 0) & (small > 0), ALL(NAN), out[M2]);
    out[COUNT] = count;
}

/* Merge the features of row a and row b at places `at` into row `to`, as many as `left`. */
INLINE void merge_at(moments from, const size at[4], size next, size left, moments to, size place)
{
#define AT(x) ((four){(x)[at[0]], (x)[at[1]], (x)[at[2]], (x)[at[3]]})
#define ALL_AT(add) {AT(from.at[0] + (add)), AT(from.at[1] + (add)), AT(from.at[2] + (add)), AT(from.at[3] + (add)), AT(from.at[4] + (add))}
    const four a[5] = ALL_AT(0), b[5] = ALL_AT(next);
    four merged[5];
    merge_four(a, b, merged);
    for (int k = 0; k < 5; k++) memcpy(to.at[k] + place, merged + k, (size_t)left * sizeof(double));
}

/* Merge neighbouring rows of n features: `pairs` times two rows of `from` become one of `to`, which may be the same. */
CLONES static void merge_pairs(size pairs, size n, moments from, moments to)
{
    if (n >= 4) {
        for (size pair = 0; pair < pairs; pair++) {
            for (size c = 0; c < n; c += 4) {
                size at = 2 * pair * n + c, left = n - c < 4 ? n - c : 4;
                if (left == 4) merge_at(from, (size[]){at, at + 1, at + 2, at + 3}, n, 4, to, pair * n + c);
                else merge_at(from, (size[]){at, at + (left > 1), at + 2 * (left > 2), at}, n, left, to, pair * n + c);
            }
        }
        return;
    }
    for (size e = 0; e < pairs * n; e += 4) { /* several pairs side by side */
        size left = pairs * n - e < 4 ? pairs * n - e : 4, at[4];
        for (size j = 0; j < 4; j++) {
            size element = j < left ? e + j : e;
            at[j] = n == 1 ? 2 * element : element / n * 2 * n + element % n;
        }
        merge_at(from, at, n, left, to, e);
    }
}

/* Moments.reduce: each of `runs` runs of `rows` rows of n features becomes one row, neighbour merged with neighbour until one
   is left. `to` holds half of what `from` does, rounded up in each run. */
static void reduce(size runs, size rows, size n, moments from, moments to)
{
    if (rows == 1)
        for (int k = 0; k < 5; k++) memcpy(to.at[k], from.at[k], (size_t)(runs * n) * sizeof(double));
    for (; rows > 1; rows = (rows + 1) / 2, from = to) {
        if (rows % 2 == 0) {
            merge_pairs(runs * rows / 2, n, from, to);
            continue;
        }
        for (size run = 0; run < runs; run++) {
            size half = rows / 2;
            moments in, out;
            for (int k = 0; k < 5; k++) {
                in.at[k] = from.at[k] + run * rows * n;
                out.at[k] = to.at[k] + run * (half + 1) * n;
            }
            merge_pairs(half, n, in, out);
            for (int k = 0; k < 5; k++) memmove(out.at[k] + half * n, in.at[k] + 2 * half * n, (size_t)n * sizeof(double));
        }
    }
}

void bn_reduce_moments(size runs, size rows, size n, double *count, double *mean, double *low, double *m2, double *m2_low,
                       double *to_count, double *to_mean, double *to_low, double *to_m2, double *to_m2_low)
{
    reduce(runs, rows, n, (moments){{count, mean, low, m2, m2_low}}, (moments){{to_count, to_mean, to_low, to_m2, to_m2_low}});
}

#ifndef _WIN32
static int read_whole(int fd, int64_t offset, char *buffer, size bytes)
{
    for (size done = 0; done < bytes;) {
        ssize_t got = pread(fd, buffer + done, (size_t)(bytes - done), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        done += got;
    }
    return 1;
}

/* bn_blocks and bn_reduce_moments of runs of blocks that lie in a file from byte `offset` on: what is read is summed while it is in
   the cache, `at_once` blocks at a time. `scratch` holds 5 * (at_once or, if more, blocks) * columns numbers, and as
   many again halved. Returns 0; 1 as bn_blocks; or 2 when the file ends before or cannot be read. */
int bn_read_runs(int fd, int64_t offset, int code, char *buffer, double *scratch, size at_once, size item, size runs, size blocks,
                 size rows, size columns, double *count, double *mean, double *low, double *m2, double *m2_low)
{
    size together = at_once / blocks > 0 ? at_once / blocks : 1, room = together * blocks * columns;
    moments found, half, out = {{count, mean, low, m2, m2_low}};
    for (int k = 0; k < 5; k++) {
        found.at[k] = scratch + k * room;
        half.at[k] = scratch + 5 * room + k * (room / 2 + together * columns);
    }
    for (size i = 0; i < room; i++) { found.at[COUNT][i] = (double)rows; found.at[M2_LOW][i] = 0; }
    for (size first = 0; first < runs; first += together) {
        size now = first + together < runs ? together : runs - first, all = now * blocks;
        for (size block = 0; block < all; block += at_once) {
            size some = block + at_once < all ? at_once : all - block, bytes = some * rows * columns * item, at = block * columns;
            if (!read_whole(fd, offset, buffer, bytes)) return 2;
            offset += bytes;
            if (bn_blocks(code, buffer, some, rows, columns, found.at[MEAN] + at, found.at[LOW] + at, found.at[M2] + at)) return 1;
        }
        reduce(now, blocks, columns, found, half);
        for (int k = 0; k < 5; k++)
            memcpy(out.at[k] + first * columns, half.at[k], (size_t)(now * columns) * sizeof(double));
    }
    return 0;
}
#endif

/* Weights of two consecutive runs of k1 and k2 batches in their mean, see moments._weights; log_m is NaN for no momentum. */
static void weights(double k1, double k2, double log_m, double *earlier, double *later)
{
    int plain = isnan(log_m);
    double share1 = plain ? k1 : -expm1(k1 * log_m) * exp(k2 * log_m), share2 = plain ? k2 : -expm1(k2 * log_m);
    double whole = plain ? k1 + k2 : -expm1((k1 + k2) * log_m);
    if (!(whole > 0)) whole = 1;
    *earlier = share1 / whole;
    *later = share2 / whole;
}

INLINE void merge_running_one(double w1, double w2, double *a, double *low, double *first, double b, double b_low,
                              double b_first, int empty)
{
    double delta = (b - *a) + (b_low - *low), sum, error;
    int swap = w2 > 0.5;
    two_sum(swap ? b : *a, delta * (swap ? -w1 : w2), &sum, &error);
    quick_two_sum(sum, (swap ? b_low : *low) + error, a, low);
    if (empty) *first = b_first;
}

/* All features have the same k, so one pair of weights serves them. */
CLONES static void merge_running(size n, double w1, double w2, int empty, double *restrict a, double *restrict low,
                                 double *restrict first, const double *b, const double *b_low, const double *b_first)
{
    for (size i = 0; i < n; i++) merge_running_one(w1, w2, a + i, low + i, first + i, b[i], b_low[i], b_first[i], empty);
}

/* Running.reduce in place: rows of (2, n) statistics with k of (1, kn), kn being 1 or n. */
static void reduce_running(size rows, size n, size kn, double log_m, double *k, double *a, double *low, double *first)
{
    for (; rows > 1; rows = (rows + 1) / 2) {
        double last1 = NAN, last2 = NAN, w1 = 0, w2 = 0; /* most pairs weigh as the pair before */
        for (size i = 0; i < rows / 2; i++) {
            size to = i * 2 * n, one = 2 * i * 2 * n, two = (2 * i + 1) * 2 * n;
            double *k1 = k + 2 * i * kn, *k2 = k1 + kn;
            for (size j = 0; j < 2 * n && i; j++) {
                a[to + j] = a[one + j];
                low[to + j] = low[one + j];
                first[to + j] = first[one + j];
            }
            for (size f = 0; f < kn; f++) {
                if (k1[f] != last1 || k2[f] != last2) weights(last1 = k1[f], last2 = k2[f], log_m, &w1, &w2);
                if (kn == 1)
                    merge_running(2 * n, w1, w2, k1[0] == 0, a + to, low + to, first + to, a + two, low + two, first + two);
                else
                    for (size s = 0; s < 2; s++)
                        merge_running(1, w1, w2, k1[f] == 0, a + to + s * n + f, low + to + s * n + f, first + to + s * n + f,
                                      a + two + s * n + f, low + two + s * n + f, first + two + s * n + f);
                k[i * kn + f] = k1[f] + k2[f];
            }
        }
        if (rows % 2) {
            size to = rows / 2 * 2 * n, from = (rows - 1) * 2 * n;
            for (size j = 0; j < 2 * n; j++) {
                a[to + j] = a[from + j];
                low[to + j] = low[from + j];
                first[to + j] = first[from + j];
            }
            for (size f = 0; f < kn; f++) k[rows / 2 * kn + f] = k[(rows - 1) * kn + f];
        }
    }
}

/* Running.of and Running.reduce of the moments of `rows` batches of n features: a, low and first of shape (rows, 2, n) and k of
   shape (rows, n) hold the result in their first row; log_m is NaN for no momentum. */
void bn_running(size rows, size n, double ddof, double log_m, const double *count, const double *mean, const double *m2,
                double *k, double *a, double *low, double *first)
{
    int alike = 1; /* features that have the same counts have the same weights */
    for (size r = 0; r < rows; r++)
        for (size c = 1; c < n; c++) alike &= count[r * n + c] == count[r * n];
    for (size r = 0; r < rows; r++)
        for (size c = 0; c < n; c++) {
            size i = r * n + c, to = 2 * r * n + c;
            int folded = count[i] >= 2;
            if (!alike) k[i] = folded;
            else if (c == 0) k[r] = folded;
            a[to] = first[to] = folded ? mean[i] : 0;
            a[to + n] = first[to + n] = folded ? m2[i] / (count[i] - ddof) : 0;
            low[to] = low[to + n] = 0;
        }
    reduce_running(rows, n, alike ? 1 : n, log_m, k, a, low, first);
    if (alike)
        for (size c = 1; c < n; c++) k[c] = k[0];
}

/* HDF5's shuffle filter: the first bytes of all elements, then all second bytes and so on; little-endian machines only. */
#define SHUFFLE(BITS)                                                                                                  \
CLONES static void join_##BITS(size first, size count, const uint8_t *from, uint##BITS##_t *to)                        \
{                                                                                                                      \
    for (size i = first; i < count; i++) {                                                                             \
        uint##BITS##_t value = 0;                                                                                      \
        for (int k = 0; k < BITS / 8; k++) value |= (uint##BITS##_t)((uint##BITS##_t)from[k * count + i] << 8 * k);     \
        to[i] = value;                                                                                                 \
    }                                                                                                                  \
}                                                                                                                      \
CLONES static void split_##BITS(size count, const uint##BITS##_t *from, uint8_t *to)                                   \
{                                                                                                                      \
    for (int k = 0; k < BITS / 8; k++)                                                                                 \
        for (size i = 0; i < count; i++) to[k * count + i] = (uint8_t)(from[i] >> 8 * k);                              \
}
SHUFFLE(16)
SHUFFLE(32)
SHUFFLE(64)

/* The same for 4 bytes, 16 elements at a time, by interleaving: bytes of two planes, then pairs of bytes. */
typedef uint8_t sixteen __attribute__((vector_size(16), aligned(1), may_alias));
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (sixteen){__VA_ARGS__})
#endif
#define LOW(a, b) MIX(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) MIX(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) MIX(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23)
#define HIGH_PAIRS(a, b) MIX(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31)
static void join_fours(size count, const uint8_t *from, uint32_t *to)
{
    size whole = count / 16 * 16;
    for (size i = 0; i < whole; i += 16) {
        sixteen a = *(const sixteen *)(from + i), b = *(const sixteen *)(from + count + i);
        sixteen c = *(const sixteen *)(from + 2 * count + i), d = *(const sixteen *)(from + 3 * count + i);
        sixteen ab = LOW(a, b), cd = LOW(c, d), *out = (sixteen *)(to + i);
        out[0] = LOW_PAIRS(ab, cd);
        out[1] = HIGH_PAIRS(ab, cd);
        ab = HIGH(a, b);
        cd = HIGH(c, d);
        out[2] = LOW_PAIRS(ab, cd);
        out[3] = HIGH_PAIRS(ab, cd);
    }
    join_32(whole, count, from, to);
}

/* Shuffle `count` elements of 2, 4 or 8 bytes, or undo it; returns 1 for other sizes. */
int bn_shuffle(int bytes, int undo, size count, const void *from, void *to)
{
    switch (bytes) {
#define EITHER(BITS, JOIN) case BITS / 8: if (undo) JOIN; else split_##BITS(count, from, to); return 0;
    EITHER(16, join_16(0, count, from, to)) EITHER(32, join_fours(count, from, to)) EITHER(64, join_64(0, count, from, to))
    }
    return 1;
}

/* LZF, as h5py's filter stores it (format of liblzf): undone into at most `room` bytes. Returns how many it gives, or
   -1 when it is damaged, room + 1 when it gives more. */
size bn_unlzf(const unsigned char *in, size length, unsigned char *out, size room)
{
    size from = 0, to = 0;
    while (from < length) {
        size code = in[from++], count = code >> 5;
        if (count == 0) { /* a run of bytes as they are */
            count = code + 1;
            if (from + count > length) return -1;
            if (to + count > room) return room + 1;
            while (count--) out[to++] = in[from++];
            continue;
        }
        if (count == 7) {
            if (from >= length) return -1;
            count += in[from++];
        }
        if (from >= length) return -1;
        size back = ((code & 31) << 8 | in[from++]) + 1; /* bytes that were given before, which may overlap these */
        if (back > to) return -1;
        if (to + count + 2 > room) return room + 1;
        for (count += 2; count--; to++) out[to] = out[to - back];
    }
    return to;
}
