/* Moments of blocks, and the merging of many moments at once: what kernels.py and moments.py do in NumPy, in one pass.

   Called through ctypes, which lets go of the interpreter's lock. Sums run in a fixed order, vectors run across features
   or lanes that are added up in a fixed order, and products are never contracted (-ffp-contract=off): the bits do not
   depend on the processor. */

#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

#define WIDTH 16     /* sums side by side, in registers */
#define RUN 16       /* rows summed before they go into the block's sums: short sums round little */
#define SHARE 8      /* the pivot is found from at least an 8th of a block */
#define TINY 1e-300  /* a sum of squares below this has lost digits to underflow */

typedef ptrdiff_t size;

INLINE void two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b, t = s - a;
    *sum = s;
    *error = (a - (s - t)) + (b - t);
}

INLINE void quick_two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b;
    *error = b - (s - a);
    *sum = s;
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

/* FLOATING: a block of `rows` rows of `columns` values, about a pivot near the mean (see kernels._about_pivot).
   `wide` takes WIDTH neighbouring columns at a time; `narrow` takes several rows of few columns as lanes. */
#define FLOATING(T, TYPE)                                                                                              \
INLINE void close_##T(const TYPE *x, size rows, size stride, double pivot, double sum, double squares, double *mean,      \
                      double *low, double *m2)                                                                         \
{                                                                                                                      \
    finish((double)rows, pivot, sum, squares, mean, low, m2);                                                          \
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
            if (x[r * stride] != x[0]) { *m2 = NAN; return; } /* the squares vanished although the values vary */      \
}                                                                                                                      \
INLINE void wide_##T(const TYPE *x, size rows, size stride, int width, double *mean, double *low, double *m2)          \
{                                                                                                                      \
    double pivot[WIDTH], sum[WIDTH] = {0}, squares[WIDTH] = {0}, offset[WIDTH] = {0};                                  \
    size step = pivot_step(rows), used = (rows + step - 1) / step;                                                     \
    for (size r = 0; r < rows; r += step)                                                                              \
        for (int c = 0; c < width; c++) offset[c] += (double)x[r * stride + c] - (double)x[c];                         \
    for (int c = 0; c < width; c++) pivot[c] = (double)x[c] + offset[c] / (double)used;                                \
    for (size begin = 0; begin < rows; begin += RUN) {                                                                 \
        size end = begin + RUN < rows ? begin + RUN : rows;                                                            \
        double a[WIDTH] = {0}, b[WIDTH] = {0};                                                                         \
        for (size r = begin; r < end; r++)                                                                             \
            for (int c = 0; c < width; c++) {                                                                          \
                double d = (double)x[r * stride + c] - pivot[c];                                                       \
                a[c] += d;                                                                                             \
                b[c] += d * d;                                                                                         \
            }                                                                                                          \
        for (int c = 0; c < width; c++) { sum[c] += a[c]; squares[c] += b[c]; }                                        \
    }                                                                                                                  \
    for (int c = 0; c < width; c++)                                                                                    \
        close_##T(x + c, rows, stride, pivot[c], sum[c], squares[c], mean + c, low + c, m2 + c);                       \
}                                                                                                                      \
INLINE void narrow_##T(const TYPE *x, size rows, int columns, double *mean, double *low, double *m2)                   \
{                                                                                                                      \
    int lanes = WIDTH / columns, width = lanes * columns;                                                              \
    double offset[WIDTH] = {0}, pivot[WIDTH] = {0}, a[WIDTH] = {0}, b[WIDTH] = {0};                                    \
    size step = pivot_step(rows), used = (rows + step - 1) / step, whole = rows / lanes * lanes;                       \
    for (size r = 0; r < rows; r += step)                                                                              \
        for (int c = 0; c < columns; c++) offset[c] += (double)x[r * columns + c] - (double)x[c];                      \
    for (int c = 0; c < width; c++) pivot[c] = (double)x[c % columns] + offset[c % columns] / (double)used;            \
    size at = 0, values = rows * columns;                                                                              \
    for (; at + WIDTH <= values && at < whole * columns; at += width) /* lanes from `width` on hold nothing of use */  \
        for (int c = 0; c < WIDTH; c++) {                                                                              \
            double d = (double)x[at + c] - pivot[c];                                                                   \
            a[c] += d;                                                                                                 \
            b[c] += d * d;                                                                                             \
        }                                                                                                              \
    for (; at < values; at++) {                                                                                        \
        int c = (int)(at % columns);                                                                                   \
        double d = (double)x[at] - pivot[c];                                                                           \
        a[c] += d;                                                                                                     \
        b[c] += d * d;                                                                                                 \
    }                                                                                                                  \
    for (int c = 0; c < columns; c++) {                                                                                \
        double sum = a[c], squares = b[c];                                                                             \
        for (int lane = 1; lane < lanes; lane++) { sum += a[lane * columns + c]; squares += b[lane * columns + c]; }   \
        close_##T(x + c, rows, columns, pivot[c], sum, squares, mean + c, low + c, m2 + c);                            \
    }                                                                                                                  \
}                                                                                                                      \
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low, double *m2) \
{                                                                                                                      \
    for (size g = 0; g < blocks; g++, x += rows * columns, mean += columns, low += columns, m2 += columns) {           \
        if (columns == 1) narrow_##T(x, rows, 1, mean, low, m2);                                                       \
        else if (columns == 2) narrow_##T(x, rows, 2, mean, low, m2);                                                  \
        else if (columns == 3) narrow_##T(x, rows, 3, mean, low, m2);                                                  \
        else if (columns == 4) narrow_##T(x, rows, 4, mean, low, m2);                                                  \
        else if (columns <= WIDTH / 2) narrow_##T(x, rows, (int)columns, mean, low, m2);                               \
        else if (columns < WIDTH) wide_##T(x, rows, columns, (int)columns, mean, low, m2);                             \
        else for (size c = 0; c < columns; c += WIDTH) {                                                               \
            size at = c + WIDTH <= columns ? c : columns - WIDTH; /* the last strip overlaps the one before */         \
            wide_##T(x + at, rows, columns, WIDTH, mean + at, low + at, m2 + at);                                      \
        }                                                                                                              \
    }                                                                                                                  \
}

FLOATING(f4, float)
FLOATING(f8, double)
FLOATING(i4, int32_t)
FLOATING(u4, uint32_t)
FLOATING(i8, int64_t)
FLOATING(u8, uint64_t)

/* WHOLE: 8- and 16-bit integers, whose sums and squares of up to 2^15 values are exact in 64-bit integers. */
#define WHOLE(T, TYPE, SUM)                                                                                            \
INLINE void exact_##T(int64_t n, int64_t s, int64_t q, double *mean, double *low, double *m2)                          \
{                                                                                                                      \
    *m2 = (double)(n * q - s * s) / (double)n;                                                                         \
    *mean = (double)s / (double)n;                                                                                     \
    *low = fma(-*mean, (double)n, (double)s) / (double)n; /* the division's remainder */                               \
}                                                                                                                      \
INLINE void strip_##T(const TYPE *x, size rows, size stride, int width, double *mean, double *low, double *m2)         \
{                                                                                                                      \
    int64_t sum[WIDTH] = {0}, squares[WIDTH] = {0};                                                                    \
    for (size begin = 0; begin < rows; begin += RUN) {                                                                 \
        size end = begin + RUN < rows ? begin + RUN : rows;                                                            \
        int32_t a[WIDTH] = {0};                                                                                        \
        SUM b[WIDTH] = {0};                                                                                            \
        for (size r = begin; r < end; r++)                                                                             \
            for (int c = 0; c < width; c++) {                                                                          \
                int32_t v = x[r * stride + c];                                                                         \
                a[c] += v;                                                                                             \
                b[c] += (SUM)v * v;                                                                                    \
            }                                                                                                          \
        for (int c = 0; c < width; c++) { sum[c] += a[c]; squares[c] += b[c]; }                                        \
    }                                                                                                                  \
    for (int c = 0; c < width; c++) exact_##T(rows, sum[c], squares[c], mean + c, low + c, m2 + c);                    \
}                                                                                                                      \
INLINE void line_##T(const TYPE *x, size rows, double *mean, double *low, double *m2)                                  \
{                                                                                                                      \
    int64_t sum = 0, squares = 0;                                                                                      \
    for (size begin = 0; begin < rows; begin += 128) {                                                                 \
        size end = begin + 128 < rows ? begin + 128 : rows;                                                            \
        int32_t a = 0;                                                                                                 \
        SUM b = 0;                                                                                                     \
        for (size r = begin; r < end; r++) { int32_t v = x[r]; a += v; b += (SUM)v * v; }                              \
        sum += a;                                                                                                      \
        squares += b;                                                                                                  \
    }                                                                                                                  \
    exact_##T(rows, sum, squares, mean, low, m2);                                                                      \
}                                                                                                                      \
CLONES static void blocks_##T(const TYPE *x, size blocks, size rows, size columns, double *mean, double *low, double *m2) \
{                                                                                                                      \
    for (size g = 0; g < blocks; g++, x += rows * columns, mean += columns, low += columns, m2 += columns) {           \
        if (columns == 1) line_##T(x, rows, mean, low, m2);                                                            \
        else if (columns < WIDTH) strip_##T(x, rows, columns, (int)columns, mean, low, m2);                            \
        else for (size c = 0; c < columns; c += WIDTH) {                                                               \
            size at = c + WIDTH <= columns ? c : columns - WIDTH;                                                      \
            strip_##T(x + at, rows, columns, WIDTH, mean + at, low + at, m2 + at);                                     \
        }                                                                                                              \
    }                                                                                                                  \
}

WHOLE(i1, int8_t, int32_t)
WHOLE(u1, uint8_t, int32_t)
WHOLE(i2, int16_t, int64_t)
WHOLE(u2, uint16_t, int64_t)

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

#ifndef _WIN32
/* bn_blocks of blocks that lie in a file from byte `offset` on, read `at_once` at a time. Returns 0; 1 as bn_blocks; or 2
   when the file ends before or cannot be read. */
int bn_read_blocks(int fd, int64_t offset, int code, char *buffer, size at_once, size item, size blocks, size rows,
                   size columns, double *mean, double *low, double *m2)
{
    for (size first = 0; first < blocks; first += at_once) {
        size count = first + at_once < blocks ? at_once : blocks - first, bytes = count * rows * columns * item, done = 0;
        while (done < bytes) {
            ssize_t got = pread(fd, buffer + done, (size_t)(bytes - done), (off_t)(offset + done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return 2;
            done += got;
        }
        offset += bytes;
        if (bn_blocks(code, buffer, count, rows, columns, mean + first * columns, low + first * columns, m2 + first * columns))
            return 1;
    }
    return 0;
}
#endif

/* Moments.merge of n pairs, in place of the first: Chan, Golub & LeVeque (1983), see moments.py. */
CLONES static void merge_moments(size n, double *restrict ca, double *restrict ma, double *restrict la, double *restrict qa,
                                 double *restrict ra, const double *cb, const double *mb, const double *lb,
                                 const double *qb, const double *rb)
{
    for (size i = 0; i < n; i++) {
        double count = ca[i] + cb[i], at_least_one = count > 1 ? count : 1;
        double small = (ca[i] < cb[i] ? ca[i] : cb[i]) / at_least_one, large = ca[i] < cb[i] ? cb[i] : ca[i];
        double delta = (mb[i] - ma[i]) + (lb[i] - la[i]), mean, error, m2, error1, error2;
        int swap = cb[i] > ca[i];
        two_sum(swap ? mb[i] : ma[i], (swap ? -small : small) * delta, &mean, &error);
        quick_two_sum(mean, (swap ? lb[i] : la[i]) + error, &ma[i], &la[i]);
        two_sum(qa[i], qb[i], &m2, &error1);
        two_sum(m2, delta * (delta * (small * large)), &m2, &error2);
        quick_two_sum(m2, (ra[i] + rb[i]) + (error1 + error2), &m2, &ra[i]);
        qa[i] = (m2 < TINY) & (delta != 0) & (small > 0) ? NAN : m2;
        ca[i] = count;
    }
}

/* Moments.reduce in place: rows of n values, neighbour with neighbour, until one is left. */
void bn_reduce_moments(size rows, size n, double *count, double *mean, double *low, double *m2, double *m2_low)
{
    double *all[5] = {count, mean, low, m2, m2_low};
    for (; rows > 1; rows = (rows + 1) / 2) {
        for (size i = 0; i < rows / 2; i++) {
            for (int k = 0; k < 5 && i; k++)
                for (size j = 0; j < n; j++) all[k][i * n + j] = all[k][2 * i * n + j];
            size a = i * n, b = (2 * i + 1) * n;
            merge_moments(n, count + a, mean + a, low + a, m2 + a, m2_low + a, count + b, mean + b, low + b, m2 + b, m2_low + b);
        }
        if (rows % 2)
            for (int k = 0; k < 5; k++)
                for (size j = 0; j < n; j++) all[k][rows / 2 * n + j] = all[k][(rows - 1) * n + j];
    }
}

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
void bn_reduce_running(size rows, size n, size kn, double log_m, double *k, double *a, double *low, double *first)
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
