/* Matrix times tokens, weights packed: y[m, n] = sum over k of x[m, k] * w[n, k].

   Weights are read in groups of 16 rows whose words lie together, so that one vector holds one word of each row and a
   scale, a zero and a sum are vectors too: no sum runs across lanes. Rows of a group are the lanes, K is walked, up to
   eight tokens at a time share what was unpacked. Groups are dealt to threads.

   Activations are float32 as they are, or 8-bit: each block of 64 channels has a scale, and a strip's 16 codes meet the
   weights' in four-byte products. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { ROWS = 16, TILE = 64, EIGHT = 8, PAIR = 2, MANY = 13, PANEL = 64, CHUNK = 8, AHEAD = 8 };
enum { BIAS = 9 }; /* the largest zero of mix64: a code less its zero, plus this, is not negative */

typedef struct {
    int64_t n, blocks; /* rows that are real; blocks of 64 channels */
    int32_t wide;      /* 4-bit strips in each block, the first ones */
    /* [groups, blocks] records of what ROWS rows have of a block, in one stream: the first word of each strip, ROWS times
       four words; the second one of its wide strips; ROWS 16-bit words of scale codes; ROWS bytes of zero codes */
    const int32_t *records;
    const float *scales2; /* [tiles, blocks, 4, 2]: step, offset */
    const int32_t *outlier_rows; /* CSR over real rows, or NULL */
    const uint16_t *outlier_columns;
    const uint16_t *outlier_values; /* float16 */
} mix64;

_Static_assert(sizeof(mix64) == 8 * sizeof(int64_t), "kernels/cpu.py has the same struct");

static inline int64_t record_words(const mix64 *w) { return (4 + w->wide) * ROWS + ROWS / 2 + ROWS / 4; }

typedef struct {
    int64_t n, k, group_size;   /* group_size divides k */
    int32_t bits;
    const int32_t *qweight;     /* [groups of rows, k * bits / 32, ROWS] */
    const float *scales;        /* [groups of rows, k / group_size, ROWS] */
    const uint8_t *zeros;       /* [groups of rows, k / group_size, ROWS] */
} gptq;

typedef struct {
    const float *exact; /* [M, K] */
    int32_t *codes;     /* [M, K / 4] of four signed bytes each, in the order of each strip's words; NULL: use `exact` */
    float *scales;      /* [M, K / block] */
    float *sums;        /* of codes [M, K / span] */
    int32_t *starts;    /* the same times -BIAS */
    int64_t k, block, span;
    int64_t together; /* tokens that lie side by side: what is [M, n] here is [M / together, n, together] */
} activations;

typedef int8_t bytes __attribute__((vector_size(16)));
typedef int8_t bytes_mem __attribute__((vector_size(16), aligned(1), may_alias));

/* By bits: the channel of each byte of 16 (of 3 bits, 32) channels' codes, as the shifts in linear.inc.c take them apart. */
static const uint8_t orders[9][32] = {
    [2] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
    [3] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31},
    [4] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15},
    [8] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};

#if defined(__x86_64__)
#define ISA 3
#include "linear.inc.c"
#define ISA 2
#include "linear.inc.c"
#define ISA 1
#include "linear.inc.c"
#endif
#define ISA 0
#include "linear.inc.c"

/* 3: AVX-512 with VNNI; 2: AVX-512; 1: AVX2; 0: any processor. */
int bitshard_instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

typedef void kernel(const void *, int64_t, const activations *, int64_t, int64_t, float *);
typedef void quantizer(const activations *, int64_t, const int *);
#if defined(__x86_64__)
static kernel *const mix64_kernels[] = {mix64_rows_isa0, mix64_rows_isa1, mix64_rows_isa2, mix64_rows_isa3};
static kernel *const gptq_kernels[] = {gptq_rows_isa0, gptq_rows_isa1, gptq_rows_isa2, gptq_rows_isa3};
static quantizer *const quantizers[] = {quantize_isa0, quantize_isa1, quantize_isa2, quantize_isa3};
#else
static kernel *const mix64_kernels[] = {mix64_rows_isa0};
static kernel *const gptq_kernels[] = {gptq_rows_isa0};
static quantizer *const quantizers[] = {quantize_isa0};
#endif

/* A finite one. Its smallest numbers, which have no leading one, are whole multiples of 2^-24. */
static inline float half(uint16_t bits) {
    uint32_t magnitude = bits & 0x7FFF, shifted = (magnitude << 13) + (112u << 23);
    float value;
    memcpy(&value, &shifted, sizeof(float));
    if (magnitude < 0x400) value = magnitude * 0x1p-24f;
    return bits & 0x8000 ? -value : value;
}

static void add_outliers(const mix64 *w, const float *x, float *y, int64_t stride, int64_t row, int64_t tokens) {
    int32_t first = w->outlier_rows[row], last = w->outlier_rows[row + 1];
    if (first == last) return;
    for (int64_t m = 0; m < tokens; m++, x += w->blocks * 64) {
        float sum = 0;
        for (int32_t i = first; i < last; i++) sum += half(w->outlier_values[i]) * x[w->outlier_columns[i]];
        y[m * stride + row] += sum;
    }
}

/* One matrix of those that a call multiplies with the same activations. */
typedef struct {
    const void *weight;
    const mix64 *outliers; /* NULL, or a weight that may have them */
    int64_t n;
    int bits[4]; /* of the strips of each 64 channels: the order of the codes depends on them */
    activations a;
    int rounds;  /* that nobody before has the same codes */
} factor;

/* y [M, sum of n] = x times the matrices, side by side, one or more of the same K; a group of rows and at most `most`
   tokens at a time, or, of MANY, PAIR groups and a panel if the kernel takes any eights. quantize: NULL for activations
   as they are. */
static int multiply(kernel *run, int64_t most, int eights, factor *factors, int count, quantizer *quantize, float *y,
                    int64_t tokens, int threads) {
    int64_t stride = 0, k = factors->a.k, blocks = k / factors->a.block, spans = k / factors->a.span;
    for (int f = 0; f < count; f++) stride += factors[f].n;
    eights = eights && tokens >= MANY; /* 12 are faster as 8 and 4 than filled up to 16 */
    int64_t height = eights ? PAIR * ROWS : ROWS; /* rows at a time */
    int64_t filled = eights ? (tokens + EIGHT - 1) / EIGHT * EIGHT : tokens; /* with tokens that are 0 */
    int32_t *codes = NULL, *starts = NULL;
    float *scales = NULL;
    if (quantize) {
        codes = calloc(count * filled, k);
        scales = calloc(count * filled, (blocks + spans) * sizeof(float));
        starts = calloc(count * filled, spans * sizeof(int32_t));
        if (!codes || !scales || !starts) return free(codes), free(scales), free(starts), -1;
        for (int f = 0; f < count; f++) {
            int same = 0;
            while (memcmp(factors[same].bits, factors[f].bits, sizeof factors->bits)) same++;
            activations *a = &factors[f].a;
            factors[f].rounds = same == f;
            a->codes = codes + same * filled * k / 4;
            a->scales = scales + same * filled * (blocks + spans);
            a->sums = a->scales + filled * blocks;
            a->starts = starts + same * filled * spans;
            a->together = eights ? EIGHT : 1;
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (quantize) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count * tokens; i++)
                if (factors[i / tokens].rounds) quantize(&factors[i / tokens].a, i % tokens, factors[i / tokens].bits);
        }
        float *columns = y;
        for (const factor *f = factors; f < factors + count; columns += f++->n) {
            for (int64_t panel = 0; panel < tokens; panel += PANEL) {
                int64_t end = tokens - panel < PANEL ? tokens : panel + PANEL;
#pragma omp for schedule(static) nowait
                for (int64_t first = 0; first < f->n; first += height) {
                    int64_t rows = f->n - first < height ? f->n - first : height;
                    for (int64_t m = panel, step; m < end; m += step) {
                        float out[PANEL * PAIR * ROWS];
                        for (step = most; step > end - m;) step /= 2;
                        if (eights) step = end - m;
                        run(f->weight, first / ROWS, &f->a, m, eights ? (step + EIGHT - 1) / EIGHT * EIGHT : step, out);
                        for (int64_t t = 0; t < step; t++)
                            memcpy(columns + (m + t) * stride + first, out + t * height, rows * sizeof(float));
                    }
                    if (f->outliers && f->outliers->outlier_rows)
                        for (int64_t row = first; row < first + rows; row++)
                            add_outliers(f->outliers, f->a.exact + panel * k, columns + panel * stride, stride, row,
                                         end - panel);
                }
            }
        }
    }
    free(codes), free(scales), free(starts);
    return 0;
}

/* y [M, sum of n] = x [M, 64 * blocks] times one or more weights of as many blocks, side by side, all float32. bits8:
   activations rounded to 8 bits. Returns 0, or -1 when there is no memory. */
int bitshard_mix64_side_by_side(const float *x, float *y, int64_t tokens, const mix64 *weights, int count, int bits8,
                                int isa, int threads) {
    factor *factors = calloc(count, sizeof(factor));
    if (!factors) return -1;
    for (int f = 0; f < count; f++) {
        const mix64 *w = weights + f;
        factors[f] = (factor){w, w, w->n, {2, 2, 2, 2}, {.exact = x, .k = w->blocks * 64, .block = 64, .span = 16}, 1};
        for (int s = 0; s < w->wide; s++) factors[f].bits[s] = 4;
    }
    quantizer *quantize = bits8 ? quantizers[isa] : NULL;
    int failed = multiply(mix64_kernels[isa], EIGHT, bits8, factors, count, quantize, y, tokens, threads);
    free(factors);
    return failed;
}

/* y [M, n] = x [M, k] times w. k and group_size are whole strips of 16 channels, of 32 for 3 bits. */
int bitshard_gptq(const float *x, float *y, int64_t tokens, int64_t n, int64_t k, int64_t group_size, int width,
                  const int32_t *qweight, const float *scales, const uint8_t *zeros, int bits8, int isa, int threads) {
    gptq w = {n, k, group_size, width, qweight, scales, zeros};
    int64_t block = 64;
    while (group_size % block) block /= 2;
    factor f = {&w, NULL, n, {width, width, width, width}, {.exact = x, .k = k, .block = block, .span = block}, 1};
    return multiply(gptq_kernels[isa], 4, 0, &f, 1, bits8 ? quantizers[isa] : NULL, y, tokens, threads);
}
