/* What the C library does with freed memory. */

#include "_vectors.h"
#ifdef __linux__
#include <malloc.h> /* which also says whether the library is glibc */
#endif

/* Keep this many bytes of freed memory rather than return them to the system each time, whose page faults cost a third
   of a fit. */
void bn_keep_freed(size bytes)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, (int)bytes);
    mallopt(M_TRIM_THRESHOLD, 2 * (int)bytes);
#else
    (void)bytes;
#endif
}
