/* Sums whose rounding errors are known, as unevaluated pairs high + low ("double-double").

   This relies on IEEE 754 double arithmetic, rounded to nearest, with every operation as written. So setup.py compiles
   without contraction (a fused multiply-add, which not all processors have, rounds a product and a sum once instead of
   twice) and without -ffast-math (which would simplify the error terms below to 0). */

#include "_vectors.h"

#define TINY 1e-300 /* a sum of squares below this has lost digits to underflow: squares of parts near 1e-154 vanish */

/* Knuth's two-sum (TAOCP 2, section 4.2.2, theorem B): sum = fl(a + b), and a + b = sum + error exactly, whichever of a
   and b is larger. sum - a is the part of b that arrived in the sum; what is missing of b, and of a, is the error. */
#define TWO_SUM(a, b, sum, error)                                                                                      \
    do {                                                                                                               \
        sum = (a) + (b);                                                                                               \
        four t_ = sum - (a);                                                                                           \
        error = ((a) - (sum - t_)) + ((b) - t_);                                                                       \
    } while (0)

/* The same for scalars. */
INLINE void two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b, t = s - a;
    *sum = s;
    *error = (a - (s - t)) + (b - t);
}

/* Dekker (1971): the same with half the operations; exact where |a| >= |b|. */
INLINE void quick_two_sum(double a, double b, double *sum, double *error)
{
    double s = a + b;
    *sum = s;
    *error = b - (s - a);
}
