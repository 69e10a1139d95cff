/* Loss and gradient of one training batch: what learning.py does in NumPy, a few samples at a time to stay in cache.

   Sums run in a fixed order and exponentials are computed here, not by libm, so that results are the same bits on every
   processor and system. */

#include <math.h>
#include "_vectors.h"

#define TOGETHER 8 /* samples that are multiplied with the weights of the head side by side */

enum { IDENTITY, SIGMOID, TANH, RELU };
enum { MSE, CROSS_ENTROPY };

/* A sample is (rows, features, positions) values, and has features * positions columns. */
typedef struct {
    int activation, loss;
    size samples, rows, features, positions, outputs, columns, values;
    double pooled, batch; /* values per feature and sample, and samples in the whole batch */
} shape;

/* e^x = *up / *down, as a fraction, so that callers can combine it with a division of their own.

   With x = n log(2) + r and |r| <= log(2)/2 it is 2^n e^r, and e^r = N(r)/N(-r), the Pade approximant of degree 6 over
   6 (Golub & Van Loan, Matrix Computations), with an error below 2e-19. N(r) = even(r^2) + odd(r). */
INLINE void exponential(double x, double *up, double *down)
{
    x = x > 600 ? 600 : x;
    x = x < -600 ? -600 : x;
    /* x / log(2) + 1.5 * 2^52: doubles of that size are 1 apart, so the sum rounds to n, in its low bits */
    double shifted = x * 1.4426950408889634 + 0x1.8p52, n = shifted - 0x1.8p52;
    /* log(2) in two parts (Cody & Waite 1980): the first has so few bits that its product with n is exact */
    double r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45, s = r * r, two_to_n;
    double even = ((s + 840) * s + 75600) * s + 665280, odd = r * ((42 * s + 10080) * s + 332640);
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits << 52) + 0x3ff0000000000000; /* move n to the exponent and add the bias: 2^n */
    memcpy(&two_to_n, &bits, 8);
    *up = two_to_n * (even + odd);
    *down = even - odd;
}

/* sigmoid = 1/(1 + e^-y) and tanh = (e^2y - 1)/(e^2y + 1), each with a single division. tanh has an absolute error of
   4e-16; near 0 its relative error is larger. NaN stays NaN. */
INLINE double activation(int kind, double y)
{
    double up, down;
    if (kind == RELU) return y > 0 ? y : y != y ? y : 0;
    if (kind == IDENTITY) return y;
    exponential(kind == SIGMOID ? -y : 2 * y, &up, &down);
    return kind == SIGMOID ? down / (down + up) : (up - down) / (up + down);
}

/* Derivative of the activation, given its value a. */
INLINE double slope(int kind, double a)
{
    if (kind == SIGMOID) return a * (1 - a);
    if (kind == TANH) return 1 - a * a;
    if (kind == RELU) return a > 0;
    return 1;
}

/* The normalized values xhat = (x - mean) * inverse, and a = activation(gamma * xhat + beta). `column` holds mean,
   inverse, gamma and beta of each column, as consecutive arrays. */
#define ACTIVATE(T, TYPE)                                                                                              \
INLINE void activate_##T(int kind, size rows, size columns, const TYPE *restrict x, const double *restrict column,     \
                         double *restrict xhat, double *restrict a)                                                    \
{                                                                                                                      \
    const double *mean = column, *inverse = mean + columns, *gamma = inverse + columns, *beta = gamma + columns;       \
    for (size r = 0; r < rows; r++, x += columns, xhat += columns, a += columns)                                       \
        for (size c = 0; c < columns; c++) {                                                                           \
            xhat[c] = ((double)x[c] - mean[c]) * inverse[c];                                                           \
            a[c] = activation(kind, gamma[c] * xhat[c] + beta[c]);                                                     \
        }                                                                                                              \
}
ACTIVATE(f4, float)
ACTIVATE(f8, double)

/* Add to the gradients of each column: dgamma = sum(dy * xhat) and dbeta = sum(dy), where dy = da * activation'(y)
   (Ioffe & Szegedy 2015, section 3). With `repeated` all rows share one row of da. */
INLINE void gradients(int kind, size rows, size columns, int repeated, const double *restrict da,
                      const double *restrict xhat, const double *restrict a, double *restrict dgamma,
                      double *restrict dbeta)
{
    for (size r = 0; r < rows; r++, xhat += columns, a += columns, da += repeated ? 0 : columns)
        for (size c = 0; c < columns; c++) {
            double dy = da[c] * slope(kind, a[c]);
            dgamma[c] += dy * xhat[c];
            dbeta[c] += dy;
        }
}

/* CALL(KIND) with the activation as a constant: each compiles to a loop without branches. */
#define EACH_KIND(kind, CALL)                                                                                          \
    do {                                                                                                               \
        if (kind == SIGMOID) CALL(SIGMOID);                                                                            \
        else if (kind == TANH) CALL(TANH);                                                                             \
        else if (kind == RELU) CALL(RELU);                                                                             \
        else CALL(IDENTITY);                                                                                           \
    } while (0)

/* Global average pooling: the mean of the values of each feature in one sample, summed in four lanes. */
INLINE void pool(const shape *m, const double *a, double *pooled)
{
    for (size c = 0; c < m->features; c++) pooled[c] = 0;
    for (size r = 0; r < m->rows; r++)
        for (size c = 0; c < m->features; c++, a += m->positions) {
            four lanes = ALL(0.0);
            double sum = 0;
            size i = 0;
            for (; i + 4 <= m->positions; i += 4) lanes += AT_PLACE(a + i);
            for (; i < m->positions; i++) sum += a[i];
            pooled[c] += ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3])) + sum;
        }
    for (size c = 0; c < m->features; c++) pooled[c] /= m->pooled;
}

/* out = pooled · weight^T + bias for `count` samples (a compile-time constant). Each weight is loaded once for all of
   them. A sum has four lanes, added in a fixed order, and a scalar sum of the remaining features. */
INLINE void head(size count, size features, size outputs, const double *pooled, const double *weight,
                 const double *bias, double *out)
{
    for (size k = 0; k < outputs; k++, weight += features) {
        four lanes[TOGETHER];
        size c = 0;
        for (size s = 0; s < count; s++) lanes[s] = ALL(0.0);
        for (; c + 4 <= features; c += 4)
            for (size s = 0; s < count; s++) lanes[s] += AT_PLACE(pooled + s * features + c) * AT_PLACE(weight + c);
        for (size s = 0; s < count; s++) {
            double sum = 0;
            for (size j = c; j < features; j++) sum += pooled[s * features + j] * weight[j];
            out[s * outputs + k] = (((lanes[s][0] + lanes[s][2]) + (lanes[s][1] + lanes[s][3])) + sum) + bias[k];
        }
    }
}

/* Add the gradients of the head, slopes^T · pooled for the weight and sum(slopes) for the bias, and store in `da` the
   gradient of each value that was pooled: slopes · weight / (values per feature). */
INLINE void head_gradients(size count, const shape *m, const double *pooled, const double *weight, const double *slopes,
                           double *dweight, double *dbias, double *da)
{
    size features = m->features, outputs = m->outputs, whole = features / 4 * 4;
    for (size k = 0; k < outputs; k++, dweight += features) {
        for (size s = 0; s < count; s++) dbias[k] += slopes[s * outputs + k];
        for (size c = 0; c < whole; c += 4) {
            four sum = AT_PLACE(dweight + c);
            for (size s = 0; s < count; s++) sum += ALL(slopes[s * outputs + k]) * AT_PLACE(pooled + s * features + c);
            AT_PLACE(dweight + c) = sum;
        }
        for (size c = whole; c < features; c++)
            for (size s = 0; s < count; s++) dweight[c] += slopes[s * outputs + k] * pooled[s * features + c];
    }
    for (size c = 0; c < whole; c += 4) {
        four sum[TOGETHER];
        for (size s = 0; s < count; s++) sum[s] = ALL(0.0);
        for (size k = 0; k < outputs; k++)
            for (size s = 0; s < count; s++)
                sum[s] += ALL(slopes[s * outputs + k]) * AT_PLACE(weight + k * features + c);
        for (size s = 0; s < count; s++) AT_PLACE(da + s * features + c) = sum[s] / m->pooled;
    }
    for (size c = whole; c < features; c++)
        for (size s = 0; s < count; s++) {
            double sum = 0;
            for (size k = 0; k < outputs; k++) sum += slopes[s * outputs + k] * weight[k * features + c];
            da[s * features + c] = sum / m->pooled;
        }
}

/* -log softmax(out)[label]. `out` becomes its gradient, softmax - onehot(label), divided by `samples`. The largest
   output is subtracted first, so that no exponential overflows. */
INLINE double cross_entropy(size outputs, double *out, int64_t label, double samples, int64_t *correct)
{
    double top = out[0], at_label = out[label], total = 0;
    size best = 0;
    for (size k = 1; k < outputs; k++)
        if (out[k] > top) { top = out[k]; best = k; }
    for (size k = 0; k < outputs; k++) {
        double up, down;
        exponential(out[k] - top, &up, &down);
        out[k] = up / down;
    }
    for (size k = 0; k < outputs; k++) total += out[k];
    for (size k = 0; k < outputs; k++) out[k] = (out[k] / total - (k == label)) / samples;
    *correct += best == label;
    return log(total) - (at_label - top);
}

/* The sum of squares of out - target. `out` becomes the gradient of their mean over `elements`. */
INLINE double squares(size count, double *out, const double *target, double elements)
{
    double sum = 0;
    for (size i = 0; i < count; i++) {
        double difference = out[i] - target[i];
        sum += difference * difference;
        out[i] = difference * (2 / elements);
    }
    return sum;
}

/* Loss and gradients of `count` samples (a compile-time constant), given xhat and a: pool, head, loss, then backward.
   `scratch` holds the outputs, da, one row of da repeated for each position (`wide`), and the pooled means. */
INLINE double compare(size count, const shape *m, const double *parameters, const void *target, size first,
                      const double *xhat, const double *a, double *scratch, double *gradient, double *columns,
                      int64_t *correct)
{
    const double *weight = parameters + 2 * m->features, *bias = weight + m->outputs * m->features, *pooled = a;
    double *dweight = gradient + 2 * m->features, *dbias = dweight + m->outputs * m->features;
    double *out = scratch, *da = out + count * m->outputs, *wide = da + count * m->features, sum = 0;
    if (m->pooled > 1) {
        double *means = wide + m->columns;
        for (size s = 0; s < count; s++) pool(m, a + s * m->values, means + s * m->features);
        pooled = means;
    }
    head(count, m->features, m->outputs, pooled, weight, bias, out);
    for (size s = 0; s < count; s++) {
        double *its = out + s * m->outputs;
        if (m->loss == CROSS_ENTROPY)
            sum += cross_entropy(m->outputs, its, ((const int64_t *)target)[first + s], m->batch, correct);
        else
            sum += squares(m->outputs, its, (const double *)target + (first + s) * m->outputs,
                           m->batch * (double)m->outputs);
    }
    head_gradients(count, m, pooled, weight, out, dweight, dbias, da);
    for (size s = 0; s < count; s++) {
        const double *row = da + s * m->features;
        if (m->positions > 1) {
            for (size c = 0, j = 0; c < m->features; c++)
                for (size i = 0; i < m->positions; i++) wide[j++] = row[c];
            row = wide;
        }
#define ADD(KIND)                                                                                                      \
    gradients(KIND, m->rows, m->columns, 1, row, xhat + s * m->values, a + s * m->values, columns, columns + m->columns)
        EACH_KIND(m->activation, ADD);
    }
    return sum;
}

/* Loss and gradients without a head: a itself is compared with a target of its shape. */
INLINE double distill(const shape *m, const double *target, const double *xhat, const double *a, double *scratch,
                      double *columns)
{
    memcpy(scratch, a, (size_t)m->values * sizeof(double));
    double sum = squares(m->values, scratch, target, m->batch * (double)m->values); /* scratch is now da */
#define DISTILL(KIND) gradients(KIND, m->rows, m->columns, 0, scratch, xhat, a, columns, columns + m->columns)
    EACH_KIND(m->activation, DISTILL);
    return sum;
}

/* bn_loss_and_gradient with the sizes in a record. `sums` accumulates dgamma and dbeta of each column, which are added
   to those of the features at the end. */
CLONES static double all_samples(const shape *m, int single, size together, const void *x, const double *mean,
                                 const double *inverse, const double *parameters, const void *target, double *scratch,
                                 double *gradient, int64_t *correct)
{
    double *column = scratch, *xhat = column + 6 * m->columns, *a = xhat + together * m->values;
    double *rest = a + together * m->values;
    double loss = 0;
    /* repeat the statistics and parameters of a feature for each of its positions */
    for (size c = 0, j = 0; c < m->features; c++)
        for (size i = 0; i < m->positions; i++, j++) {
            column[j] = mean[c]; /* then inverse, gamma and beta, as `activate` reads them */
            column[m->columns + j] = inverse[c];
            column[2 * m->columns + j] = parameters[c];
            column[3 * m->columns + j] = parameters[m->features + c];
        }
    double *sums = column + 4 * m->columns;
    for (size j = 0; j < 2 * m->columns; j++) sums[j] = 0;
    for (size first = 0; first < m->samples;) {
        int many = together == TOGETHER && m->outputs && m->samples - first >= TOGETHER;
        size count = many ? TOGETHER : 1, at = first * m->values;
#define FORWARD_f4(KIND) activate_f4(KIND, count * m->rows, m->columns, (const float *)x + at, column, xhat, a)
#define FORWARD_f8(KIND) activate_f8(KIND, count * m->rows, m->columns, (const double *)x + at, column, xhat, a)
        if (single) EACH_KIND(m->activation, FORWARD_f4);
        else EACH_KIND(m->activation, FORWARD_f8);
        if (!m->outputs) loss += distill(m, (const double *)target + at, xhat, a, rest, sums);
        else if (count == 1) loss += compare(1, m, parameters, target, first, xhat, a, rest, gradient, sums, correct);
        else loss += compare(TOGETHER, m, parameters, target, first, xhat, a, rest, gradient, sums, correct);
        first += count;
    }
    for (size half = 0, j = 0; half < 2; half++)
        for (size c = 0; c < m->features; c++)
            for (size i = 0; i < m->positions; i++) gradient[half * m->features + c] += sums[j++];
    return loss;
}

/* Loss and gradient of some samples of a batch of `batch` samples, see learning.loss_and_gradient.

   x is of shape (samples, rows, features, positions), float32 if `single`, else float64. mean and inverse, which is
   1 / sqrt(var + eps), have one value per feature. parameters are gamma, beta, weight (outputs, features) and bias, one
   after the other. target is int64 labels for cross-entropy, else float64 of shape (samples, outputs), or of the shape
   of x without outputs.

   Adds to the gradient, which has the shape of parameters. Stores the sum of the losses (of squares for mse) in *loss
   and the number of samples whose largest output is that of their label in *correct. `together` samples (1 or TOGETHER)
   are computed at a time. With V = rows * columns, scratch has 6 * columns + 2 * together * V numbers, plus the larger
   of together * (2 * features + outputs) + columns and V. */
void bn_loss_and_gradient(int activation, int loss_kind, int single, size together, size samples, size rows,
                          size features, size positions, size outputs, double batch, const void *x, const double *mean,
                          const double *inverse, const double *parameters, const void *target, double *scratch,
                          double *gradient, double *loss, int64_t *correct)
{
    size columns = features * positions;
    shape m = {activation, loss_kind, samples, rows, features, positions, outputs, columns, rows * columns,
               (double)(rows * positions), batch};
    *correct = 0;
    *loss = all_samples(&m, single, together, x, mean, inverse, parameters, target, scratch, gradient, correct);
}
