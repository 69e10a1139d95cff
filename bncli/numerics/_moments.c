/* Merging moments and running statistics: what moments.py does in NumPy, bit for bit, many at once.

   Neighbors are merged in pairs until one is left: a tree whose shape depends only on the number of parts. Mean and m2
   are pairs high + low (see _sums.h), so that rounding errors do not accumulate over many merges. */

#define _POSIX_C_SOURCE 200809L /* pread */
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <math.h>
#include <unistd.h>
#include "_sums.h"

/* of _blocks.c */
int bn_blocks(int code, const void *x, size blocks, size rows, size columns, double *mean, double *low, double *m2);
/* of _extremes.c */
int bn_extremes(int code, const void *x, size blocks, size rows, size columns, double *low, double *high);

/* Moments of n features, as arrays: count, mean and m2, the last two as sums high + low. */
typedef struct { double *at[5]; } moments;
enum { COUNT, MEAN, LOW, M2, M2_LOW };

/* Moments.merge of four features (Chan, Golub & LeVeque 1983, eq. 2.1): with delta = mean_b - mean_a,

       mean = mean_a + delta * n_b / n,    m2 = m2_a + m2_b + delta^2 * n_a * n_b / n

   The mean starts from that of the larger part and moves by at most half of delta. Operations and their order are those
   of moments.py, so results are the same bits. */
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
    part = share * delta; /* how far the mean moves; negative where it starts from b */
    TWO_SUM(base, part, mean, error);
    error += base_low;
    out[MEAN] = mean + error;
    out[LOW] = error - (out[MEAN] - mean); /* quick_two_sum: the error is smaller than the mean */
    /* m2 = a + b + part; the errors of both sums and the low words are collected in a new low word */
    TWO_SUM(a[M2], b[M2], m2, error1);
    part = delta * (delta * (small * large));
    base = m2;
    TWO_SUM(base, part, m2, error2);
    error = (a[M2_LOW] + b[M2_LOW]) + (error1 + error2);
    out[M2] = m2 + error;
    out[M2_LOW] = error - (out[M2] - m2);
    /* the means differ but the square of delta underflows: NaN marks that there is no result */
    out[M2] = CHOOSE((out[M2] < TINY) & (delta != 0) & (small > 0), ALL(NAN), out[M2]);
    out[COUNT] = count;
}

/* Merge four features, at positions `at` of one row and at + next of the other; store the first `left`. */
INLINE void merge_at(moments from, const size at[4], size next, size left, moments to, size place)
{
#define AT(x) ((four){(x)[at[0]], (x)[at[1]], (x)[at[2]], (x)[at[3]]})
#define ALL_AT(add)                                                                                                    \
    {AT(from.at[0] + (add)), AT(from.at[1] + (add)), AT(from.at[2] + (add)), AT(from.at[3] + (add)),                   \
     AT(from.at[4] + (add))}
    const four a[5] = ALL_AT(0), b[5] = ALL_AT(next);
    four merged[5];
    merge_four(a, b, merged);
    for (int k = 0; k < 5; k++) memcpy(to.at[k] + place, merged + k, (size_t)left * sizeof(double));
}

/* Merge neighboring rows of n features: each of `pairs` pairs of rows of `from` becomes one row of `to`. Both may be
   the same array, since a pair is read before its result is written, at or before the position of the pair. Lanes
   beyond the last feature repeat another feature, so that nothing outside the arrays is read. */
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
    for (size e = 0; e < pairs * n; e += 4) { /* 1 to 3 features: several pairs side by side */
        size left = pairs * n - e < 4 ? pairs * n - e : 4, at[4];
        for (size j = 0; j < 4; j++) {
            size element = j < left ? e + j : e;
            at[j] = n == 1 ? 2 * element : element / n * 2 * n + element % n;
        }
        merge_at(from, at, n, left, to, e);
    }
}

/* Moments.reduce_runs: merge neighbors in each of `runs` runs of `rows` rows of n features until one row is left. `to`
   has half the rows of `from`, rounded up in each run. With an even number of rows no pair crosses the end of a run, so
   one call merges all runs; with an odd number the last row of each run is copied. */
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
            for (int k = 0; k < 5; k++)
                memmove(out.at[k] + half * n, in.at[k] + 2 * half * n, (size_t)n * sizeof(double));
        }
    }
}

void bn_reduce_moments(size runs, size rows, size n, double *count, double *mean, double *low, double *m2,
                       double *m2_low, double *to_count, double *to_mean, double *to_low, double *to_m2,
                       double *to_m2_low)
{
    moments from = {{count, mean, low, m2, m2_low}}, to = {{to_count, to_mean, to_low, to_m2, to_m2_low}};
    reduce(runs, rows, n, from, to);
}

/* Read `bytes` bytes with pread, which does not use the file position that threads share. Returns 1, or 0 on failure.
   */
static int read_whole(int fd, int64_t offset, char *buffer, size bytes)
{
    for (size done = 0; done < bytes;) {
        ssize_t got = pread(fd, buffer + done, (size_t)(bytes - done), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0; /* an error, or the end of the file */
        done += got;
    }
    return 1;
}

/* bn_blocks, bn_extremes and bn_reduce_moments of runs of blocks that are stored in a file from byte `offset` on.
   Values are summed `at_once` blocks at a time, while they are in the cache, and merged after each `together` runs.

   `scratch` has 5 * max(at_once, blocks) * columns numbers for the moments of these blocks, and half as many, rounded
   up in each run, for `reduce`. Returns 0; 1 as bn_blocks; or 2 if the file ends too early or cannot be read. */
int bn_read_runs(int fd, int64_t offset, int code, char *buffer, double *scratch, size at_once, size item, size runs,
                 size blocks, size rows, size columns, double *count, double *mean, double *low, double *m2,
                 double *m2_low, double *minimum, double *maximum)
{
    size together = at_once / blocks > 0 ? at_once / blocks : 1, room = together * blocks * columns;
    moments found, half, out = {{count, mean, low, m2, m2_low}};
    for (int k = 0; k < 5; k++) {
        found.at[k] = scratch + k * room;
        half.at[k] = scratch + 5 * room + k * (room / 2 + together * columns);
    }
    for (size i = 0; i < room; i++) { found.at[COUNT][i] = (double)rows; found.at[M2_LOW][i] = 0; }
    for (size i = 0; i < runs * columns; i++) { minimum[i] = INFINITY; maximum[i] = -INFINITY; }
    for (size first = 0; first < runs; first += together) {
        size now = first + together < runs ? together : runs - first, all = now * blocks;
        for (size block = 0; block < all; block += at_once) {
            size some = block + at_once < all ? at_once : all - block;
            size bytes = some * rows * columns * item, at = block * columns;
            if (!read_whole(fd, offset, buffer, bytes)) return 2;
            offset += bytes;
            if (bn_blocks(code, buffer, some, rows, columns, found.at[MEAN] + at, found.at[LOW] + at,
                          found.at[M2] + at))
                return 1;
            size of_run = some < blocks ? some : blocks, place = first * columns;
            for (size done = 0; done < some; done += of_run, place += columns)
                bn_extremes(code, buffer + done * rows * columns * item, 1, of_run * rows, columns, minimum + place,
                            maximum + place);
        }
        reduce(now, blocks, columns, found, half);
        for (int k = 0; k < 5; k++)
            memcpy(out.at[k] + first * columns, half.at[k], (size_t)(now * columns) * sizeof(double));
    }
    return 0;
}

/* powers.multiply: a product of two numbers high + low, each of at most 1. The error of the product of the high parts
   is exact: Dekker (1971) splits them into halves of 26 bits. Without a fused multiply-add, as in NumPy. */
INLINE void multiply(const double a[2], const double b[2], double out[2])
{
    const double splitter = 134217729.0; /* 2^27 + 1 */
    double scaled = splitter * a[0], ah = scaled - (scaled - a[0]), al = a[0] - ah;
    double bh, bl, product = a[0] * b[0], error;
    scaled = splitter * b[0];
    bh = scaled - (scaled - b[0]);
    bl = b[0] - bh;
    error = ((ah * bh - product) + ah * bl + al * bh) + al * bl;
    quick_two_sum(product, error + (a[0] * b[1] + a[1] * b[0]), out, out + 1);
}

/* powers._add: the sum of two numbers high + low. */
INLINE void add(const double a[2], const double b[2], double out[2])
{
    double total, error;
    two_sum(a[0], b[0], &total, &error);
    quick_two_sum(total, error + (a[1] + b[1]), out, out + 1);
}

/* powers.powers: m^k and 1 - m^k, each as high + low. Row j of `table` has m^(2^j) and 1 - m^(2^j). */
static void powers(double k, const double *table, double power[2], double rest[2])
{
    power[0] = 1, power[1] = rest[0] = rest[1] = 0;
    for (int64_t bits = (int64_t)k; bits; bits >>= 1, table += 4) {
        double part[2];
        if (!(bits & 1)) continue;
        multiply(power, table + 2, part);
        add(rest, part, rest);
        multiply(power, table, power);
    }
}

/* powers.shares: weights of two consecutive runs of k1 and k2 batches in their mean, m^k2 (1 - m^k1) and 1 - m^k2, over
   their sum. Without a table (momentum None) all batches have the same weight. */
static void shares(double k1, double k2, const double *table, double *earlier, double *later)
{
    double first[2] = {k1, 0}, second[2] = {k2, 0}, whole[2] = {k1 + k2, 0}, power[2], unused[2];
    if (table) {
        powers(k1, table, unused, first);
        powers(k2, table, power, second);
        multiply(power, first, first);
        add(first, second, whole);
    }
    *earlier = first[0] / (whole[0] > 0 ? whole[0] : 1);
    *later = second[0] / (whole[0] > 0 ? whole[0] : 1);
}

/* Running.merge of one statistic: a + (b - a) * w2, or b + (a - b) * w1, starting from the side with the larger weight.
   A feature without batches so far (`empty`) takes the first statistics of the later run. */
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
    for (size i = 0; i < n; i++)
        merge_running_one(w1, w2, a + i, low + i, first + i, b[i], b_low[i], b_first[i], empty);
}

/* Running.reduce in place: rows of (2, n) statistics with k of (1, kn), where kn is 1 or n. Row i becomes the merge of
   rows 2i and 2i + 1, and a last odd row is copied, until one row is left. */
static void reduce_running(size rows, size n, size kn, const double *table, double *k, double *a, double *low,
                           double *first)
{
    for (; rows > 1; rows = (rows + 1) / 2) {
        double last1 = NAN, last2 = NAN, w1 = 0, w2 = 0; /* most pairs have the weights of the pair before */
        for (size i = 0; i < rows / 2; i++) {
            size to = i * 2 * n, one = 2 * i * 2 * n, two = (2 * i + 1) * 2 * n;
            double *k1 = k + 2 * i * kn, *k2 = k1 + kn;
            for (size j = 0; j < 2 * n && i; j++) {
                a[to + j] = a[one + j];
                low[to + j] = low[one + j];
                first[to + j] = first[one + j];
            }
            for (size f = 0; f < kn; f++) {
                if (k1[f] != last1 || k2[f] != last2) shares(last1 = k1[f], last2 = k2[f], table, &w1, &w2);
                if (kn == 1)
                    merge_running(2 * n, w1, w2, k1[0] == 0, a + to, low + to, first + to, a + two, low + two,
                                  first + two);
                else
                    for (size s = 0; s < 2; s++) {
                        size one_to = to + s * n + f, one_two = two + s * n + f;
                        merge_running(1, w1, w2, k1[f] == 0, a + one_to, low + one_to, first + one_to, a + one_two,
                                      low + one_two, first + one_two);
                    }
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

/* Running.of and Running.reduce of the moments of `rows` batches of n features. The first rows of a, low and first, of
   shape (rows, 2, n), and of k, of shape (rows, n), get the result. `table` has `bits` rows (see `powers`), none for
   momentum None. A batch with fewer than two values of a feature is not folded for that feature: it has no usable
   variance. */
void bn_running(size rows, size n, double ddof, size bits, const double *table, const double *count, const double *mean,
                const double *m2, double *k, double *a, double *low, double *first)
{
    int alike = 1; /* all features have the same counts, and so the same weights: k then has one column */
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
    reduce_running(rows, n, alike ? 1 : n, bits ? table : 0, k, a, low, first);
    if (alike)
        for (size c = 1; c < n; c++) k[c] = k[0];
}
