/* What a kernel needs of an instruction set. linear.inc.c is compiled once for each of these; everything else in it is
   GNU C's vector arithmetic, which the compiler maps onto the target that TARGET names.

   LANES    32-bit numbers in a vector; 16 rows of a weight are 16 / LANES vectors
   dot4     d + for each lane the sum over its four bytes of unsigned q (at most 18) times signed x
   dot4_at  the same with one x, in memory, for all lanes
   half     each lane rounded to float16, nearest even
   largest, total   of all lanes
   load_bytes, load_shorts, store_bytes   LANES unsigned numbers of 8 or 16 bits, signed ones of 8; GCC 12 would convert
            them one by one, a fifth of a product with one token */

#if ISA == 3
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#elif ISA == 2
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#elif ISA == 1
#define LANES 8
#define TARGET __attribute__((target("avx2,fma,f16c")))
#else
#define LANES 4
#define TARGET
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name##_isa, ISA)
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef int32_t FN(vi) __attribute__((vector_size(4 * LANES)));
typedef float FN(vf) __attribute__((vector_size(4 * LANES)));
typedef int32_t FN(vi_mem) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float FN(vf_mem) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define VI FN(vi)
#define VF FN(vf)

#if ISA == 3
INLINE VI FN(dot4)(VI d, VI q, VI x) { return (VI)_mm512_dpbusd_epi32((__m512i)d, (__m512i)q, (__m512i)x); }
INLINE VI FN(dot4_at)(VI d, VI q, const int32_t *x) { /* GCC 12 makes two instructions of it, 4 to 8 % with 1 to 8 tokens */
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(d) : "v"(q), "m"(*x));
    return d;
}
#else
#if ISA == 2
INLINE VI FN(dot4)(VI d, VI q, VI x) {
    __m512i pairs = _mm512_maddubs_epi16((__m512i)q, (__m512i)x); /* at most 2 * 18 * 127: no saturation */
    return d + (VI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif ISA == 1
INLINE VI FN(dot4)(VI d, VI q, VI x) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)q, (__m256i)x);
    return d + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
INLINE VI FN(dot4)(VI d, VI q, VI x) {
    for (int shift = 0; shift < 32; shift += 8) d += ((q >> shift) & 255) * ((x << (24 - shift)) >> 24);
    return d;
}
#endif
INLINE VI FN(dot4_at)(VI d, VI q, const int32_t *x) { return FN(dot4)(d, q, (VI){0} + *x); }
#endif

#if ISA >= 2
INLINE VF FN(half)(VF v) { return (VF)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif ISA == 1
INLINE VF FN(half)(VF v) { return (VF)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE VF FN(half)(VF v) { /* below 2^-14 v, of float16 step and offset, is a multiple of float16's smallest number already */
    VI bits = (VI)v;
    return (VF)((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF);
}
#endif

#if ISA >= 2
INLINE int32_t FN(largest)(VI v) { return _mm512_reduce_max_epi32((__m512i)v); }
INLINE int32_t FN(total)(VI v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE VI FN(load_bytes)(const uint8_t *p) { return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE VI FN(load_shorts)(const uint16_t *p) { return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void FN(store_bytes)(int8_t *p, VI v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v)); }
#else
INLINE int32_t FN(largest)(VI v) {
    int32_t most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
}
INLINE int32_t FN(total)(VI v) {
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}
#if ISA == 1
INLINE VI FN(load_bytes)(const uint8_t *p) { return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE VI FN(load_shorts)(const uint16_t *p) { return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
INLINE VI FN(load_bytes)(const uint8_t *p) { return (VI){p[0], p[1], p[2], p[3]}; }
INLINE VI FN(load_shorts)(const uint16_t *p) { return (VI){p[0], p[1], p[2], p[3]}; }
#endif
INLINE void FN(store_bytes)(int8_t *p, VI v) {
    for (int lane = 0; lane < LANES; lane++) p[lane] = (int8_t)v[lane];
}
#endif
