/* The kernels, once for each instruction set; see linear.c. */

#include "simd.h"

#define LOAD(type, pointer) (*(const FN(type) *)(pointer))

/* One token's codes, nearest even. bits: of the four strips of each 64 channels. Number by number, with the C library's
   fmaxf and lrintf, this was a fifth of a product with one token. */
static TARGET void FN(quantize)(const activations *a, int64_t m, const int *bits) {
    int8_t natural[64], eighth[64];
    const VF to_integer = (VF){0} + 0x1.8p23f; /* added, leaves a small number's nearest integer in the low bits */
    const int64_t together = a->together, block = a->block, span = a->span; /* copies, which no store of a code could change */
    int64_t first = m / together, lane = m % together, blocks = a->k / block, spans = block / span;
    for (int64_t b = 0; b < blocks; b++) {
        const float *x = a->exact + m * a->k + b * block;
        VI most = {0}; /* magnitudes order as their bits do, and what is not finite comes last */
        for (int64_t i = 0; i < block; i += LANES) {
            VI magnitude = (VI)LOAD(vf_mem, x + i) & 0x7FFFFFFF, more = magnitude > most;
            most = (magnitude & more) | (most & ~more);
        }
        int32_t most_bits = FN(largest)(most);
        float largest, inverse;
        memcpy(&largest, &most_bits, sizeof(float));
        inverse = largest > 0x1p-120f ? 127 / largest : 0; /* of less it would not be finite */
        int32_t finite = -(most_bits < 0x7F800000); /* a mask; the scale is NaN where an activation is not, which no code could say */
        int64_t at = (first * blocks + b) * together; /* where the eight's part of the block begins, if it is one */
        a->scales[at + lane] = finite ? largest / 127 : NAN;
        for (int64_t i = 0; i < spans; i++) {
            VI sum = {0};
            for (int64_t j = i * span; j < (i + 1) * span; j += LANES) {
                VI code = ((VI)(LOAD(vf_mem, x + j) * inverse + to_integer) - (VI)to_integer) & finite;
                FN(store_bytes)(natural + j, code);
                sum += code;
            }
            int32_t total = FN(total)(sum);
            a->sums[at * spans + i * together + lane] = (float)total;
            a->starts[at * spans + i * together + lane] = -BIAS * total;
        }
        int32_t *codes = a->codes + at * block / 4 + lane;
        int8_t *laid = together == 1 ? (int8_t *)codes : eighth;
        for (int64_t i = 0, step; i < block; i += step) {
            int width = bits[(b * block + i) / 16 % 4];
            step = width == 3 ? 32 : 16;
            if (width == 3)
                for (int64_t j = 0; j < step; j++) laid[i + j] = natural[i + orders[width][j]];
            else
                *(bytes_mem *)(laid + i) =
                    __builtin_shuffle((bytes)*(const bytes_mem *)(natural + i), (bytes)*(const bytes_mem *)orders[width]);
        }
        if (together > 1)
#pragma GCC unroll 8
            for (int64_t i = 0; i < block / 4; i++) memcpy(codes + i * together, laid + 4 * i, sizeof(int32_t));
    }
}

/* LANES rows' words of one strip of 16 channels, and what its codes mean. */
typedef struct {
    int wide; /* 4-bit codes in two words, not 2-bit ones in one */
    VI word[2];
    VI zero;
    VF scale;
} FN(strip);

/* Strip s of block b for the rows of a group from `first` on. */
INLINE FN(strip) FN(mix64_strip)(const mix64 *w, int64_t group, int64_t b, int s, int first) {
    int64_t tile = group * ROWS / TILE;
    const int32_t *record = w->records + (group * w->blocks + b) * record_words(w);
    const uint16_t *scales = (const uint16_t *)(record + (4 + w->wide) * ROWS);
    const uint8_t *zeros = (const uint8_t *)(scales + ROWS);
    const float *second = w->scales2 + 2 * ((tile * w->blocks + b) * 4 + s);
    VI scale_codes = FN(load_shorts)(scales + first), zero_codes = FN(load_bytes)(zeros + first);
    FN(strip) strip = {.wide = s < w->wide};
    strip.word[0] = (VI)LOAD(vi_mem, record + s * ROWS + first);
    if (strip.wide) strip.word[1] = (VI)LOAD(vi_mem, record + (4 + s) * ROWS + first);
    strip.scale = FN(half)(__builtin_convertvector((scale_codes >> (4 * s)) & 15, VF) * second[0] + second[1]);
    strip.zero = ((zero_codes >> (2 * s)) & 3) + (strip.wide ? 6 : 0);
    return strip;
}

/* The record AHEAD blocks on; without it a third fewer weights a second, from memory, by one token. */
INLINE void FN(mix64_prefetch)(const mix64 *w, int64_t block) {
    const int32_t *record = w->records + block * record_words(w);
    for (int64_t word = 0; word < record_words(w); word += 16) __builtin_prefetch(record + word);
}

/* Codes of four channels in the bytes of each lane: which ones, `orders` in linear.c says. */
INLINE VI FN(codes)(const FN(strip) *strip, int j) {
    if (strip->wide) return (strip->word[j / 2] >> (4 * (j % 2))) & 0x0F0F0F0F;
    return (strip->word[0] >> (2 * j)) & 0x03030303;
}

/* The code of channel i less its zero. */
INLINE VF FN(code)(const FN(strip) *strip, int i) {
    VI code = strip->wide ? (strip->word[i / 8] >> (4 * (i % 8))) & 15 : (strip->word[0] >> (2 * i)) & 3;
    return __builtin_convertvector(code - strip->zero, VF);
}

/* y [T, ROWS] of one group of rows, 8-bit activations of T tokens from token m on, at most EIGHT. */
INLINE void FN(mix64_few)(const mix64 *w, int64_t group, const activations *a, int64_t m, int T, float *y) {
    for (int first = 0; first < ROWS; first += LANES) {
        VF sum[EIGHT] = {0};
        for (int64_t b = 0; b < w->blocks; b++) {
            VF block[EIGHT] = {0};
            FN(mix64_prefetch)(w, group * w->blocks + b + AHEAD);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                FN(strip) strip = FN(mix64_strip)(w, group, b, s, first);
                VF offset = __builtin_convertvector(strip.zero, VF) * strip.scale;
                VI codes[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) codes[j] = FN(codes)(&strip, j);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    int64_t at = ((m + t) * w->blocks + b) * 4 + s;
                    VI dot = {0};
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) dot = FN(dot4_at)(dot, codes[j], a->codes + 4 * at + j);
                    block[t] += __builtin_convertvector(dot, VF) * strip.scale;
                    block[t] -= offset * a->sums[at];
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[t] += block[t] * a->scales[(m + t) * w->blocks + b];
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) *(FN(vf_mem) *)(y + t * ROWS + first) = (FN(vf_mem))sum[t];
    }
}

/* y [T, PAIR * ROWS], the same of any eights of tokens and of one or two groups of rows, which share what is read of the
   activations. CHUNK blocks at a time are unpacked once, into the first cache. Codes have their zeros taken off, so that
   no product is spent on these; BIAS keeps them from being negative. */
INLINE void FN(mix64_many)(const mix64 *w, int64_t group, int groups, const activations *a, int64_t m, int64_t tokens, float *y) {
    memset(y, 0, tokens * PAIR * ROWS * sizeof(float));
    for (int first = 0; first < ROWS; first += LANES) {
        for (int64_t chunk = 0; chunk < w->blocks; chunk += CHUNK) {
            int64_t blocks = w->blocks - chunk < CHUNK ? w->blocks - chunk : CHUNK;
            VI codes[CHUNK][4][PAIR][4];
            VF scale[CHUNK][4][PAIR];
            for (int g = 0; g < groups; g++) {
                for (int64_t b = 0; b < blocks; b++) {
                    FN(mix64_prefetch)(w, (group + g) * w->blocks + chunk + b + AHEAD);
#pragma GCC unroll 4
                    for (int s = 0; s < 4; s++) {
                        FN(strip) strip = FN(mix64_strip)(w, group + g, chunk + b, s, first);
                        VI lift = (BIAS - strip.zero) * 0x01010101;
                        scale[b][s][g] = strip.scale;
#pragma GCC unroll 4
                        for (int j = 0; j < 4; j++) codes[b][s][g][j] = FN(codes)(&strip, j) + lift;
                    }
                }
            }
            for (int64_t begin = 0; begin < tokens; begin += EIGHT) {
                int64_t at = EIGHT * ((m + begin) / EIGHT * w->blocks + chunk);
                const int32_t *x = a->codes + 16 * at, *starts = a->starts + 4 * at;
                const float *steps = a->scales + at;
                VF sum[EIGHT][PAIR] = {0};
                for (int64_t b = 0; b < blocks; b++, x += 16 * EIGHT, starts += 4 * EIGHT, steps += EIGHT) {
                    VF block[EIGHT][PAIR] = {0};
#pragma GCC unroll 4
                    for (int s = 0; s < 4; s++) {
#pragma GCC unroll 8
                        for (int t = 0; t < EIGHT; t++) {
                            VI dot[PAIR];
#pragma GCC unroll 2
                            for (int g = 0; g < groups; g++) dot[g] = (VI){0} + starts[EIGHT * s + t];
#pragma GCC unroll 4
                            for (int j = 0; j < 4; j++) {
                                VI four = (VI){0} + x[EIGHT * (4 * s + j) + t];
#pragma GCC unroll 2
                                for (int g = 0; g < groups; g++) dot[g] = FN(dot4)(dot[g], codes[b][s][g][j], four);
                            }
#pragma GCC unroll 2
                            for (int g = 0; g < groups; g++)
                                block[t][g] += __builtin_convertvector(dot[g], VF) * scale[b][s][g];
                        }
                    }
#pragma GCC unroll 8
                    for (int t = 0; t < EIGHT; t++)
#pragma GCC unroll 2
                        for (int g = 0; g < groups; g++) sum[t][g] += block[t][g] * steps[t];
                }
#pragma GCC unroll 8
                for (int t = 0; t < EIGHT; t++)
#pragma GCC unroll 2
                    for (int g = 0; g < groups; g++)
                        *(FN(vf_mem) *)(y + ((begin + t) * PAIR + g) * ROWS + first) += (FN(vf_mem))sum[t][g];
            }
        }
    }
}

/* The same with activations [T, K] as they are. */
INLINE void FN(mix64_float)(const mix64 *w, int64_t group, const float *x, int T, float *y) {
    int64_t k = w->blocks * 64;
    for (int first = 0; first < ROWS; first += LANES) {
        VF sum[EIGHT] = {0};
        for (int64_t b = 0; b < w->blocks; b++) {
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                FN(strip) strip = FN(mix64_strip)(w, group, b, s, first);
                VF part[EIGHT] = {0};
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    VF code = FN(code)(&strip, i);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) part[t] += code * x[t * k + 64 * b + 16 * s + i];
                }
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) sum[t] += part[t] * strip.scale;
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) *(FN(vf_mem) *)(y + t * ROWS + first) = (FN(vf_mem))sum[t];
    }
}

static TARGET void FN(mix64_rows)(const void *weight, int64_t group, const activations *a, int64_t m, int64_t tokens, float *y) {
    const mix64 *w = weight;
    const float *x = a->exact + m * w->blocks * 64;
    if (a->codes) {
        if (a->together == EIGHT && (group + 1) * ROWS < w->n) FN(mix64_many)(w, group, 2, a, m, tokens, y);
        else if (a->together == EIGHT) FN(mix64_many)(w, group, 1, a, m, tokens, y);
        else if (tokens == 8) FN(mix64_few)(w, group, a, m, 8, y);
        else if (tokens == 4) FN(mix64_few)(w, group, a, m, 4, y);
        else if (tokens == 2) FN(mix64_few)(w, group, a, m, 2, y);
        else FN(mix64_few)(w, group, a, m, 1, y);
    } else {
        if (tokens == 8) FN(mix64_float)(w, group, x, 8, y);
        else if (tokens == 4) FN(mix64_float)(w, group, x, 4, y);
        else if (tokens == 2) FN(mix64_float)(w, group, x, 2, y);
        else FN(mix64_float)(w, group, x, 1, y);
    }
}

/* GPTQ. A unit is what begins and ends with a word: 16, 32, 8, 4 channels for 2, 3, 4, 8 bits. */
typedef struct {
    VI word[3]; /* of 3 bits, the four runs of 24 bits that 3 words hold are made of them */
    VI last;
} FN(unit);

INLINE FN(unit) FN(gptq_unit)(const int32_t *words, int bits, int64_t unit) {
    words += unit * (bits == 3 ? 3 : 1) * ROWS;
    FN(unit) u;
    u.word[0] = (VI)LOAD(vi_mem, words);
    if (bits == 3) {
        VI second = (VI)LOAD(vi_mem, words + ROWS), third = (VI)LOAD(vi_mem, words + 2 * ROWS);
        u.word[2] = ((second >> 16) & 0xFFFF) | (third << 16);
        u.word[1] = ((u.word[0] >> 24) & 0xFF) | (second << 8);
        u.last = (third >> 8) & 0xFFFFFF;
    }
    return u;
}

/* Codes of four channels in the bytes of each lane; of 8-bit ones the low (j = 0) or high halves. */
INLINE VI FN(gptq_codes)(const FN(unit) *u, int bits, int j) {
    if (bits == 2) return (u->word[0] >> (2 * j)) & 0x03030303;
    if (bits != 3) return (u->word[0] >> (4 * j)) & 0x0F0F0F0F;
    return ((u->word[0] >> (3 * j)) & 7) | (((u->word[1] >> (3 * j)) & 7) << 8) | (((u->word[2] >> (3 * j)) & 7) << 16) |
           (((u->last >> (3 * j)) & 7) << 24);
}

INLINE VI FN(gptq_code)(const FN(unit) *u, int bits, int i) {
    if (bits == 3) return ((i < 24 ? u->word[i / 8] : u->last) >> (3 * (i % 8))) & 7;
    return (u->word[0] >> (bits * i)) & ((1 << bits) - 1);
}

INLINE VF FN(gptq_zero)(const uint8_t *zeros) {
    return __builtin_convertvector(FN(load_bytes)(zeros), VF);
}

/* y [T, ROWS] of one group of rows, the same two ways as above. */
INLINE void FN(gptq_int8)(const gptq *w, int bits, int64_t rows, const activations *a, int64_t m, int T, float *y) {
    int channels = bits == 3 ? 32 : 32 / bits, steps = bits == 8 ? 2 : channels / 4;
    int64_t blocks = w->k / a->block, per_group = w->group_size / a->block;
    int64_t groups = w->k / w->group_size;
    const int32_t *words = w->qweight + rows * (w->k * bits / 32) * ROWS;
    for (int first = 0; first < ROWS; first += LANES) {
        VF sum[EIGHT] = {0};
        for (int64_t group = 0; group < groups; group++) {
            int64_t at = (rows * groups + group) * ROWS + first;
            VF scale = (VF)LOAD(vf_mem, w->scales + at), zero = FN(gptq_zero)(w->zeros + at), part[EIGHT] = {0};
            for (int64_t b = group * per_group; b < (group + 1) * per_group; b++) {
                VI dot[EIGHT] = {0};
                for (int64_t unit = b * a->block / channels; unit < (b + 1) * a->block / channels; unit++) {
                    FN(unit) u = FN(gptq_unit)(words + first, bits, unit);
#pragma GCC unroll 8
                    for (int j = 0; j < steps; j++) {
                        VI codes = FN(gptq_codes)(&u, bits, j);
#pragma GCC unroll 4
                        for (int t = 0; t < T; t++) {
                            const int32_t *x = a->codes + ((m + t) * w->k + unit * channels) / 4;
                            if (bits == 8 && j) dot[t] += FN(dot4_at)((VI){0}, codes, x) << 4;
                            else dot[t] = FN(dot4_at)(dot[t], codes, x + j);
                        }
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    int64_t at = (m + t) * blocks + b; /* of scales and sums alike */
                    part[t] += (__builtin_convertvector(dot[t], VF) - zero * a->sums[at]) * a->scales[at];
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[t] += part[t] * scale;
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) *(FN(vf_mem) *)(y + t * ROWS + first) = (FN(vf_mem))sum[t];
    }
}

INLINE void FN(gptq_float)(const gptq *w, int bits, int64_t rows, const float *x, int T, float *y) {
    int channels = bits == 3 ? 32 : 32 / bits;
    int64_t per_group = w->group_size / channels;
    int64_t groups = w->k / w->group_size;
    const int32_t *words = w->qweight + rows * (w->k * bits / 32) * ROWS;
    for (int first = 0; first < ROWS; first += LANES) {
        VF sum[EIGHT] = {0};
        for (int64_t group = 0; group < groups; group++) {
            int64_t at = (rows * groups + group) * ROWS + first;
            VF scale = (VF)LOAD(vf_mem, w->scales + at), zero = FN(gptq_zero)(w->zeros + at), part[EIGHT] = {0};
            for (int64_t unit = group * per_group; unit < (group + 1) * per_group; unit++) {
                FN(unit) u = FN(gptq_unit)(words + first, bits, unit);
#pragma GCC unroll 32
                for (int i = 0; i < channels; i++) {
                    VF code = __builtin_convertvector(FN(gptq_code)(&u, bits, i), VF) - zero;
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) part[t] += code * x[t * w->k + unit * channels + i];
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[t] += part[t] * scale;
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) *(FN(vf_mem) *)(y + t * ROWS + first) = (FN(vf_mem))sum[t];
    }
}

#define TOKENS(b, T)                                                                                \
    if (tokens == T) {                                                                              \
        if (a->codes) FN(gptq_int8)(w, b, rows, a, m, T, y);                                        \
        else FN(gptq_float)(w, b, rows, a->exact + m * w->k, T, y);                                 \
    }
#define BITS(b)                                                                                     \
    if (w->bits == b) {                                                                             \
        TOKENS(b, 1) else TOKENS(b, 2) else TOKENS(b, 4)                                            \
    }

static TARGET void FN(gptq_rows)(const void *weight, int64_t rows, const activations *a, int64_t m, int64_t tokens, float *y) {
    const gptq *w = weight;
    BITS(2) BITS(3) BITS(4) BITS(8)
}
#undef BITS
#undef TOKENS

#undef ISA
#undef LANES
#undef TARGET
#undef JOIN_
#undef JOIN
#undef FN
#undef INLINE
#undef VI
#undef VF
#undef LOAD
