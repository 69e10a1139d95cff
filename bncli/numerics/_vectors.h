/* Vectors of four numbers, with which the sums in C run side by side. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* it takes vectors that are put together for unset ones */
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef ptrdiff_t size;

/* Four at a time: the compiler makes of them what the processor has. Written out, since it leaves loops over arrays scalar. */
typedef double four __attribute__((vector_size(32)));
typedef double four_anywhere __attribute__((vector_size(32), aligned(8), may_alias)); /* in an array, at any place */
typedef int64_t mask __attribute__((vector_size(32))); /* all ones where a comparison holds */
#define FOUR(p) ((four){(double)(p)[0], (double)(p)[1], (double)(p)[2], (double)(p)[3]})
#define AT_PLACE(p) (*(four_anywhere *)(p))
#define ALL(value) ((four){(value), (value), (value), (value)})
#define CHOOSE(where, yes, no) ((four)(((mask)(yes) & (where)) | ((mask)(no) & ~(where))))
#define ANY(where) ((where)[0] | (where)[1] | (where)[2] | (where)[3])
#define PUT(p, v) memcpy((p), &(v), sizeof(four))
