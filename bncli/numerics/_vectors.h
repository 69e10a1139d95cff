/* Vectors of four numbers, in which the sums in C run side by side.

   Vector types of GCC and Clang, not intrinsics: the same source gives SSE2, AVX2 or NEON, and the same bits, since
   each lane is an IEEE 754 double of its own. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
/* compile twice, for processors with and without AVX2; the loader selects one */
#define CLONES __attribute__((target_clones("avx2", "default")))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* false alarms where vectors are filled lane by lane */
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline)) /* so that a caller's CLONES covers what it calls, too */

typedef ptrdiff_t size;

/* Explicit vectors of four: compilers do not vectorize loops over small arrays. */
typedef double four __attribute__((vector_size(32)));
typedef double four_anywhere __attribute__((vector_size(32), aligned(8), may_alias)); /* unaligned, inside an array */
typedef int64_t mask __attribute__((vector_size(32))); /* all ones where a comparison holds */
/* four neighbors of any type as doubles; exact but for 64-bit integers, which round to the nearest double */
#define FOUR(p) ((four){(double)(p)[0], (double)(p)[1], (double)(p)[2], (double)(p)[3]})
#define AT_PLACE(p) (*(four_anywhere *)(p))
#define ALL(value) ((four){(value), (value), (value), (value)})
/* lane by lane: bits of `yes` under a mask of ones, else of `no` */
#define CHOOSE(where, yes, no) ((four)(((mask)(yes) & (where)) | ((mask)(no) & ~(where))))
#define ANY(where) ((where)[0] | (where)[1] | (where)[2] | (where)[3])
#define PUT(p, v) memcpy((p), &(v), sizeof(four))
