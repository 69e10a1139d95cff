/* Bytes of HDF5 chunks: the shuffle filter and LZF. */

#include "_vectors.h"

/* The shuffle filter of HDF5 stores the first (lowest) bytes of all elements, then all second bytes and so on, in
   planes of `count` bytes. split_ shuffles and join_ undoes it, from element `first` on. For little-endian machines
   only, where byte k of an element is value >> 8 * k. */
#define SHUFFLE(BITS)                                                                                                  \
CLONES static void join_##BITS(size first, size count, const uint8_t *from, uint##BITS##_t *to)                        \
{                                                                                                                      \
    for (size i = first; i < count; i++) {                                                                             \
        uint##BITS##_t value = 0;                                                                                      \
        for (int k = 0; k < BITS / 8; k++)                                                                             \
            value |= (uint##BITS##_t)((uint##BITS##_t)from[k * count + i] << 8 * k);                                   \
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

/* join_32 for 16 elements at a time. Interleaving planes 0 and 1, and 2 and 3, by bytes gives the lower and upper
   halves of the elements; interleaving those by pairs of bytes gives the elements. LOW takes the first 8 bytes of each
   operand, HIGH the last 8; indexes from 16 on select from the second operand. */
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
    join_32(whole, count, from, to); /* the remaining elements */
}

/* Shuffle `count` elements of 2, 4 or 8 bytes, or undo it; returns 1 for other sizes. */
int bn_shuffle(int bytes, int undo, size count, const void *from, void *to)
{
    switch (bytes) {
#define EITHER(BITS, JOIN) case BITS / 8: if (undo) JOIN; else split_##BITS(count, from, to); return 0;
    EITHER(16, join_16(0, count, from, to))
    EITHER(32, join_fours(count, from, to))
    EITHER(64, join_64(0, count, from, to))
    }
    return 1;
}

/* Decompress LZF, as the filter of h5py stores it (the format of Marc Lehmann's liblzf), to at most `room` bytes.
   Returns their number, -1 for damaged data, or room + 1 if there are more. Never accesses memory outside the two
   buffers, whatever the data is.

   Each item begins with a byte LLLooooo. With L = 0, the next o + 1 bytes are literal. Otherwise the item is a copy of
   L + 2 bytes of the output, or of 9 + the next byte if L = 7. It begins (ooooo << 8 | last byte) + 1 bytes back. */
size bn_unlzf(const unsigned char *in, size length, unsigned char *out, size room)
{
    size from = 0, to = 0;
    while (from < length) {
        size code = in[from++], count = code >> 5;
        if (count == 0) { /* literal bytes */
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
        size back = ((code & 31) << 8 | in[from++]) + 1;
        if (back > to) return -1;
        if (to + count + 2 > room) return room + 1;
        for (count += 2; count--; to++) out[to] = out[to - back]; /* byte by byte: an overlap repeats bytes */
    }
    return to;
}
