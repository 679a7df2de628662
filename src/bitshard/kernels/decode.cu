// mix64 weights times a few tokens on a GPU (sm_80 and later): y[m, n] = sum_k x[m, k] w[n, k].
//
// A block of threads has 16 output channels; its warps take the records of their row of records in turn, two at a time
// (records.py says what is in one: two blocks of 64 channels, eight strips), and add up at the end. Every warp has a ring
// of pairs in shared memory that asynchronous copies fill: while one is multiplied, STAGES - 1 are on their way
// (2311.16442, fig. "asynchronous dequantization"). Nothing but the end needs all warps at once.
//
// Codes go into the tensor core as they are. `word & 0x00030003` is two float16 subnormals, code * 2^-24, exact, and the
// sum of code * x is scaled once for a strip: y += factor * (sum of code * x - zero * sum of x), where the sums of x are
// the same product with ones. bfloat16 has no such subnormals (2^-133 times x is lost in float32), so there a code is
// 128 + code, and the 128 is part of the zero.
//
// Of the eight columns of the product, one token would use one. So a column is a token and a strip: with COLUMNS tokens
// the operand B holds 8 / COLUMNS strips of x, each multiplied by its own strip of weights and by zeros for the others.
//
// Compiled with  WIDE     4-bit strips of a block: 0, 1, 2, 4      COLUMNS  tokens of a product: 1, 2, 4, 8
//                TILES    products side by side: 1, 2              BFLOAT   1: x and y are bfloat16; 0: float16
//                WARPS, STAGES, PREFETCH (1: x of the next record is read while this one is multiplied)

#ifndef BITSHARD_HOST  // the tests define these for a processor

using u16 = unsigned short;
using u8 = unsigned char;
#define SHARED(name) extern __shared__ uint4 name[]

__device__ __forceinline__ float half_value(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 half_bits(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 bfloat_bits(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// float16(step * code + offset) of two strips, rounded once. codes: bits 0-3 and 16-19
__device__ __forceinline__ unsigned scale_pair(unsigned codes, unsigned steps, unsigned offsets) {
    unsigned scales;  // 0x6400 is 1024 in float16, so 0x6400 | code is 1024 + code
    asm("{\n.reg .b32 c;\nsub.rn.f16x2 c, %1, %4;\nfma.rn.f16x2 %0, c, %2, %3;\n}"
        : "=r"(scales)
        : "r"(codes | 0x64006400u), "r"(steps), "r"(offsets), "r"(0x64006400u));
    return scales;
}

__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }

__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }

// kept in a register, as the compiler would rather find it again for every use
__device__ __forceinline__ unsigned kept(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ unsigned address_of(const uint4* shared) {
    return kept((unsigned)__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void copy_async(unsigned shared, const uint4* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

constexpr int STRIPS = 8, ROWS = 16, CHANNELS = 128;                 // of a record
constexpr int GROUP = STRIPS / COLUMNS;                              // strips that one product holds side by side
constexpr int TOKENS = COLUMNS * TILES;                              // of a block of threads
constexpr int WORDS = 32 * (2 * WIDE + (4 - WIDE));                  // of codes, in a record
constexpr int RECORD = (WORDS * 4 + ROWS * 2 * 3) / 16;              // in units of 16 bytes
constexpr int SECOND = STRIPS * 4 / 16;                              // the second order of its scales
constexpr int PAIR = 2;                                              // records of a turn, side by side in memory
constexpr int STAGE = PAIR * (RECORD + SECOND);
constexpr int SCALES = COLUMNS > 1 ? STRIPS * ROWS * 8 / 16 : 0;     // a scale and a zero for each strip and row
constexpr int WARP_SHARED = STAGES * STAGE + SCALES;
constexpr int COPIES = (STAGE + 31) / 32;                            // of a lane, for a turn
constexpr unsigned BIAS = BFLOAT ? 0x43004300u : 0;                  // of two codes: 128, or nothing
constexpr float UNIT = BFLOAT ? 1.f : 1.f / 16777216.f;              // of a code as the tensor core sees it
constexpr unsigned ONES = BFLOAT ? 0x3F803F80u : 0x3C003C00u;

__device__ __forceinline__ constexpr bool is_wide(int strip) { return strip % 4 < WIDE; }

__device__ __forceinline__ float value_of(u16 bits) { return BFLOAT ? as_float((unsigned)bits << 16) : half_value(bits); }

__device__ __forceinline__ u16 bits_of(float value) { return BFLOAT ? bfloat_bits(value) : half_bits(value); }

// What a lane multiplies of a strip: codes of rows g, g + 8, g, g + 8; those of rows g + 8 come four times as large, two
// bits up, which saves 2-bit strips a shift each.
__device__ __forceinline__ void fragments(unsigned (&a)[4], const unsigned* words, int strip, unsigned bias) {
    const int block = strip / 4, place = strip % 4, among = block * (4 - WIDE) + place - WIDE;
    if (is_wide(strip)) {
        const unsigned w = words[32 * (block * WIDE + place)];
        for (int i = 0; i < 4; i += 2) a[i] = w >> 4 * i & 0x000F000Fu | bias, a[i + 1] = w >> 4 * i + 2 & 0x003C003Cu | bias;
    } else {
        const unsigned w = words[32 * (2 * WIDE + among / 2)] >> 8 * (among % 2);
        for (int i = 0; i < 4; i += 2) a[i] = w >> 2 * i & 0x00030003u | bias, a[i + 1] = w >> 2 * i & 0x000C000Cu | bias;
    }
}

// A lane's share of a record's scales, from second to first order, of strips 2 t and 2 t + 1: the scale and the zero of row
// g and those of row g + 8, zeros in units of what the tensor core sees as codes. Two strips at a time, side by side in a
// word. second: step and offset of both; base: what zeros are counted from.
__device__ __forceinline__ void first_order(float4 (&strips)[2], unsigned codes, unsigned zeros, uint2 second, unsigned base) {
    const unsigned steps = low_halves(second.x, second.y), offsets = high_halves(second.x, second.y);
    const unsigned codes_apart = codes | codes << 12, zeros_apart = zeros | zeros << 14;
    const unsigned scale = scale_pair(codes_apart & 0x000F000Fu, steps, offsets);
    const unsigned scale8 = scale_pair(codes_apart >> 8 & 0x000F000Fu, steps, offsets);
    const unsigned zero = (zeros_apart & 0x00030003u) + base | BIAS;
    const unsigned zero8 = (zeros_apart >> 2 & 0x000C000Cu) + (base << 2) | BIAS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        strips[i] = make_float4(half_value((u16)(scale >> 16 * i)), value_of((u16)(zero >> 16 * i)),
                                half_value((u16)(scale8 >> 16 * i)), value_of((u16)(zero8 >> 16 * i)));
    }
}

// Where a strip's scales of rows g and g + 8 stand in shared memory: shuffled, or all lanes of a store would meet in a bank.
__device__ __forceinline__ int place_of(int strip, int g) {
    return strip * 8 + (g ^ (strip & 2 | ((strip ^ strip >> 2) & 1) << 2));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) mix64_decode(
    const uint4* __restrict__ records, const uint4* __restrict__ scales2, const u16* __restrict__ x, u16* __restrict__ y,
    const int* __restrict__ outlier_rows, const u16* __restrict__ outlier_columns, const u16* __restrict__ outlier_values,
    float* partial, unsigned* arrived, int tokens, int n, int k) {
    SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row_tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y, first_token = blockIdx.z * TOKENS;
    const int count = k / CHANNELS, start = PAIR * (split * WARPS + warp), stride = PAIR * splits * WARPS;
    uint4* ring = shared + warp * WARP_SHARED;
    float4* strips = (float4*)(ring + STAGES * STAGE);  // [STRIPS, 8] of rows g and g + 8
    const uint4* own_records = records + (long long)row_tile * count * RECORD;
    const uint4* own_scales2 = scales2 + (long long)(row_tile / 4) * count * SECOND;

    const uint4* source[COPIES];
    int source_step[COPIES], last[COPIES];  // last: the first record of the last turn that has this unit
#pragma unroll
    for (int c = 0; c < COPIES; c++) {
        const bool of_record = 32 * c + 31 < PAIR * RECORD || lane + 32 * c < PAIR * RECORD;
        const int i = lane + 32 * c - (of_record ? 0 : PAIR * RECORD), length = of_record ? RECORD : SECOND;
        source[c] = (of_record ? own_records : own_scales2) + i + (long long)start * length;
        source_step[c] = stride * length;
        last[c] = lane + 32 * c < STAGE ? count - 1 - i / length : -1;
    }
    const unsigned ring_address = address_of(ring + lane);
    int filling = start, at = 0;  // at: bytes, of the stage that is filled next, which is the one that was filled first
    const auto fill = [&]() {
#pragma unroll
        for (int c = 0; c < COPIES; c++) {
            if (filling <= last[c]) copy_async(ring_address + at + 16 * 32 * c, source[c]);
            source[c] += source_step[c];
        }
        commit();
        filling += stride, at = at < (STAGES - 1) * STAGE * 16 ? at + STAGE * 16 : 0;
    };

    // x of a lane: four channels of token g % COLUMNS, in the strip that this column of each product stands for. Nothing
    // is read conditionally, which would make the load be waited for at once: a token or a record that does not exist is
    // the last one. even, odd: of the first and the second record of a turn.
    unsigned x_even[COLUMNS][TILES][2], x_odd[COLUMNS][TILES][2];
    const u16* x_at[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int token = min(first_token + tile * COLUMNS + g % COLUMNS, tokens - 1);
        x_at[tile] = x + (long long)token * k + g / COLUMNS * 16 + 4 * t;
    }
    const auto read_x = [&](unsigned(&into)[COLUMNS][TILES][2], int record) {
        const int channel = min(record, count - 1) * CHANNELS;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int q = 0; q < COLUMNS; q++) {
                const uint2 four = *(const uint2*)(x_at[tile] + channel + q * GROUP * 16);
                into[q][tile][0] = four.x, into[q][tile][1] = four.y;
            }
        }
    };

    const unsigned one = kept(ONES), ones[4] = {one, one, one, one};
    unsigned own_strip[GROUP];  // all ones where this column stands for strip i: as predicates, made anew in every turn
#pragma unroll
    for (int i = 0; i < GROUP; i++) own_strip[i] = kept(g / COLUMNS == i ? ~0u : 0);
    const unsigned base = kept((is_wide(2 * t) ? 6 : 0) + (is_wide(2 * t + 1) ? 6 << 16 : 0));
    // tokens are never negative, which the compiler cannot know: a mask and a bias in one instruction need a register
    const unsigned bias = BFLOAT ? BIAS + (tokens < 0) : 0;
    // where a lane finds its words, scale codes, zero codes and the second order in a stage
    const unsigned own = warp * WARP_SHARED * 16, at_words = kept(own + 4 * lane), at_codes = kept(own + WORDS * 4 + 2 * lane);
    const unsigned at_zeros = kept(own + WORDS * 4 + 64 + lane), at_second = kept(own + PAIR * RECORD * 16 + 8 * t);

    float sums[TILES][4] = {};
    const auto multiply_record = [&](const unsigned(&x_now)[COLUMNS][TILES][2], int which) {
        const u8* stage = (const u8*)shared + at;
        const unsigned* words = (const unsigned*)(stage + at_words + which * RECORD * 16);
        const unsigned codes = *(const u16*)(stage + at_codes + which * RECORD * 16);
        const unsigned zeros = stage[at_zeros + which * RECORD * 16];
        float4 own_strips[2];
        first_order(own_strips, codes, zeros, *(const uint2*)(stage + at_second + which * SECOND * 16), base);
        if (COLUMNS > 1) {  // others need them
            __syncwarp();  // everybody has read those before
            strips[place_of(2 * t, g)] = own_strips[0], strips[place_of(2 * t + 1, g)] = own_strips[1];
            __syncwarp();
        }
#pragma unroll
        for (int q = 0; q < COLUMNS; q++) {
            float products[TILES][4] = {}, sums_x[TILES][4] = {};
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                unsigned a[4];
                fragments(a, words, q * GROUP + i, bias);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const unsigned b[2] = {x_now[q][tile][0] & own_strip[i], x_now[q][tile][1] & own_strip[i]};
                    multiply(products[tile], a, GROUP > 1 ? b : x_now[q][tile]);
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) multiply(sums_x[tile], ones, x_now[q][tile]);
            float4 shared_strip;  // of columns 2 t and 2 t + 1, unless every column is another
            if (COLUMNS > 1) shared_strip = strips[place_of(q * GROUP + 2 * t / COLUMNS, g)];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float4 own = COLUMNS > 1 ? shared_strip : own_strips[e];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    sums[tile][e] += own.x * (products[tile][e] - own.y * sums_x[tile][e]);
                    sums[tile][2 + e] += own.z * (products[tile][2 + e] - own.w * sums_x[tile][2 + e]);
                }
            }
        }
    };

    for (int i = 0; i < STAGES - 1; i++) fill();
    if (PREFETCH) read_x(x_even, start);
    int record = start;
    const auto turn = [&](bool both) {
        __syncwarp();  // everybody has read what is overwritten now
        fill();
        wait<STAGES - 1>();
        __syncwarp();  // everybody's copies of these records have arrived
        read_x(PREFETCH ? x_odd : x_even, PREFETCH ? record + 1 : record);
        multiply_record(x_even, 0);
        if (both) {
            read_x(PREFETCH ? x_even : x_odd, PREFETCH ? record + stride : record + 1);
            multiply_record(x_odd, 1);
        }
        record += stride;
    };
    if (COLUMNS < 8) {  // ptxas would read x_odd after the branch on `both`, if there were one, and wait for it
        while (record + 1 < count) turn(true);
        if (record < count) turn(false);
    } else {  // twice the code would not leave registers enough
        while (record < count) turn(record + 1 < count);
    }

    // what all warps have, and the outliers as one more: [WARPS + 1, ROWS, TOKENS]; a fixed order, so a fixed result
    wait<0>();
    __syncthreads();
    float* slots = (float*)shared;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float weight = 1 / UNIT / (half ? 4 : 1);
            float even = sums[tile][2 * half] * weight, odd = sums[tile][2 * half + 1] * weight;
            if (COLUMNS == 1) even += odd;
            for (int other = COLUMNS / 2 > 0 ? COLUMNS / 2 : 1; other < 4; other *= 2) {
                even += __shfl_xor_sync(~0u, even, other), odd += __shfl_xor_sync(~0u, odd, other);
            }
            float* slot = slots + (warp * ROWS + g + 8 * half) * TOKENS + tile * COLUMNS + 2 * t;
            if (2 * t < COLUMNS) slot[0] = even;
            if (2 * t + 1 < COLUMNS) slot[1] = odd;
        }
    }
    for (int row = warp; row < ROWS; row += WARPS) {
        const int out = row_tile * ROWS + row;
        const bool any = outlier_rows != nullptr && split == 0 && out < n;
        const int first = any ? outlier_rows[out] : 0, last = any ? outlier_rows[out + 1] : 0;
        for (int m = 0; m < TOKENS; m++) {
            float sum = 0;
            if (first_token + m < tokens) {
                const u16* own_x = x + (long long)(first_token + m) * k;
                for (int i = first + lane; i < last; i += 32) {
                    sum += half_value(outlier_values[i]) * value_of(own_x[outlier_columns[i]]);
                }
            }
            for (int other = 1; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
            if (lane == 0) slots[(WARPS * ROWS + row) * TOKENS + m] = sum;
        }
    }
    __syncthreads();

    const int tile = blockIdx.z * gridDim.x + row_tile;
    const auto write = [&](int i, float sum) {
        const int out = row_tile * ROWS + i / TOKENS, token = first_token + i % TOKENS;
        if (out < n && token < tokens) y[(long long)token * n + out] = bits_of(sum);
    };
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += WARPS * 32) {
        float sum = 0;
        for (int slot = 0; slot <= WARPS; slot++) sum += slots[slot * ROWS * TOKENS + i];
        if (splits == 1) {
            write(i, sum);
        } else {
            partial[((long long)tile * splits + split) * ROWS * TOKENS + i] = sum;
        }
    }
    if (splits == 1) return;

    // whoever comes last adds up what all splits have left, in their order
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ((unsigned*)shared)[0] = atomicAdd(arrived + tile, 1);
    __syncthreads();
    if (((unsigned*)shared)[0] != splits - 1) return;
    __threadfence();
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += WARPS * 32) {
        float sum = 0;
        for (int s = 0; s < splits; s++) {
            sum += ((const volatile float*)partial)[((long long)tile * splits + s) * ROWS * TOKENS + i];
        }
        write(i, sum);
    }
}
