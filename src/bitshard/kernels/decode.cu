// mix64 weights times a few tokens on a GPU (sm_80 and later): y[m, n] = sum_k x[m, k] w[n, k].
//
// A block of threads has 16 output channels; its warps take the records of their row of records in turn (records.py says
// what is in one: two blocks of 64 channels, eight strips) and add up at the end. Every warp has a ring of records in
// shared memory that asynchronous copies fill: while one is multiplied, STAGES - 1 are on their way (2311.16442, fig.
// "asynchronous dequantization"). Nothing but the end needs all warps at once.
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

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
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
constexpr int STAGE = RECORD + STRIPS * 4 / 16;                      // and with the second order of its scales
constexpr int PAIRS = STRIPS * ROWS * 8 / 16;                        // a factor and a zero for each strip and row
constexpr int WARP_SHARED = STAGES * STAGE + PAIRS;
constexpr unsigned ONES = BFLOAT ? 0x3F803F80u : 0x3C003C00u;

__device__ __forceinline__ constexpr bool is_wide(int strip) { return strip % 4 < WIDE; }

__device__ __forceinline__ float value_of(u16 bits) { return BFLOAT ? as_float((unsigned)bits << 16) : half_value(bits); }

__device__ __forceinline__ u16 bits_of(float value) { return BFLOAT ? bfloat_bits(value) : half_bits(value); }

// What a lane multiplies of a strip: codes of rows g, g + 8, g, g + 8 at `first_bits` and higher of each half word. Codes
// of rows g + 8 come `row_step` times as large.
__device__ __forceinline__ float row_step(int strip) { return is_wide(strip) ? (BFLOAT ? 1.f : 16.f) : 4.f; }

__device__ __forceinline__ void fragments(unsigned (&a)[4], const unsigned* words, int strip) {
    const int block = strip / 4, place = strip % 4;
    if (is_wide(strip)) {
        const unsigned w = words[32 * (block * WIDE + place)];
        if (BFLOAT) {
            for (int i = 0; i < 4; i++) a[i] = w >> 4 * i & 0x000F000Fu | 0x43004300u;
        } else {
            for (int i = 0; i < 4; i += 2) a[i] = w >> 4 * i & 0x000F000Fu, a[i + 1] = w >> 4 * i & 0x00F000F0u;
        }
    } else {
        const int among = block * (4 - WIDE) + place - WIDE;
        const unsigned w = words[32 * (2 * WIDE + among / 2)] >> 8 * (among % 2), bias = BFLOAT ? 0x43004300u : 0;
        for (int i = 0; i < 4; i += 2) {
            a[i] = w >> 2 * i & 0x00030003u | bias, a[i + 1] = w >> 2 * i & 0x000C000Cu | bias;
        }
    }
}

// A record's scales from second to first order, by all lanes, four each: pairs [strip, row] of the factor of a sum and
// the zero to take off before.
__device__ __forceinline__ void expand_scales(float2* pairs, const uint4* stage, int lane) {
    const int row = lane % ROWS, block = lane / ROWS;
    const u16* codes = (const u16*)((const unsigned*)stage + WORDS);
    const u8* zeros = (const u8*)(codes + 2 * ROWS);
    const unsigned* second = (const unsigned*)(stage + RECORD);
    const unsigned four_codes = codes[block * ROWS + row], four_zeros = zeros[block * ROWS + row];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int strip = block * 4 + i;
        const float step = half_value((u16)(second[strip] & 0xFFFF)), offset = half_value((u16)(second[strip] >> 16));
        const float scale = half_value(half_bits(fmaf(step, (float)(four_codes >> 4 * i & 15), offset)));
        const float zero = (float)((four_zeros >> 2 * i & 3) + (i < WIDE ? 6 : 0));
        const float larger = row < 8 ? 1.f : row_step(i);
        const float unit = BFLOAT ? 1.f : 1.f / 16777216.f;  // of a code in the tensor core
        pairs[strip * ROWS + row] = make_float2(scale / (unit * larger), (BFLOAT ? 128.f : 0.f) + zero * unit * larger);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, TOKENS <= 4 ? 4 : 2) mix64_decode(
    const uint4* __restrict__ records, const uint4* __restrict__ scales2, const u16* __restrict__ x, u16* __restrict__ y,
    const int* __restrict__ outlier_rows, const u16* __restrict__ outlier_columns, const u16* __restrict__ outlier_values,
    float* partial, unsigned* arrived, int tokens, int n, int k) {
    SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row_tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y, first_token = blockIdx.z * TOKENS;
    const int count = (k + CHANNELS - 1) / CHANNELS, start = split * WARPS + warp, stride = splits * WARPS;
    uint4* ring = shared + warp * WARP_SHARED;
    float2* pairs = (float2*)(ring + STAGES * STAGE);
    const uint4* own_records = records + (long long)row_tile * count * RECORD;
    const uint4* own_scales2 = scales2 + (long long)(row_tile / 4) * count * (STAGE - RECORD);

    const auto fill = [&](int turn) {
        const long long record = start + (long long)turn * stride;
        if (record < count) {
            uint4* stage = ring + turn % STAGES * STAGE;
            for (int i = lane; i < STAGE; i += 32) {
                copy_async(stage + i, i < RECORD ? own_records + record * RECORD + i
                                                 : own_scales2 + record * (STAGE - RECORD) + i - RECORD);
            }
        }
        commit();
    };

    // x of a lane: four channels of token g % COLUMNS, in the strip that this column of each product stands for
    unsigned x_now[COLUMNS][TILES][2], x_next[COLUMNS][TILES][2];
    const auto read_x = [&](unsigned(&into)[COLUMNS][TILES][2], int record) {
#pragma unroll
        for (int q = 0; q < COLUMNS; q++) {
            const int channel = record * CHANNELS + (q * GROUP + g / COLUMNS) * 16 + 4 * t;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int token = first_token + tile * COLUMNS + g % COLUMNS;
                const bool real = token < tokens && channel < k;
                const uint2 four = real ? *(const uint2*)(x + (long long)token * k + channel) : make_uint2(0, 0);
                into[q][tile][0] = four.x, into[q][tile][1] = four.y;
            }
        }
    };

    for (int turn = 0; turn < STAGES - 1; turn++) fill(turn);
    if (PREFETCH) read_x(x_now, start);
    float sums[TILES][4] = {};
    for (int turn = 0, record = start; record < count; turn++, record += stride) {
        __syncwarp();  // everybody has read what is overwritten now
        fill(turn + STAGES - 1);
        wait<STAGES - 1>();
        __syncwarp();  // everybody's copies of this record have arrived
        if (PREFETCH) {
            read_x(x_next, record + stride);
        } else {
            read_x(x_now, record);
        }
        const uint4* stage = ring + turn % STAGES * STAGE;
        expand_scales(pairs, stage, lane);
        __syncwarp();
        const unsigned* words = (const unsigned*)stage + lane;
#pragma unroll
        for (int q = 0; q < COLUMNS; q++) {
            float products[TILES][4] = {}, sums_x[TILES][4] = {};
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                unsigned a[4];
                fragments(a, words, q * GROUP + i);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const bool own = g / COLUMNS == i;
                    const unsigned b[2] = {own ? x_now[q][tile][0] : 0, own ? x_now[q][tile][1] : 0};
                    multiply(products[tile], a, b);
                }
            }
            const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) multiply(sums_x[tile], ones, x_now[q][tile]);
#pragma unroll
            for (int e = 0; e < 2; e++) {  // of columns 2 t and 2 t + 1
                const float2* of_strip = pairs + (q * GROUP + (2 * t + e) / COLUMNS) * ROWS;
                const float2 low = of_strip[g], high = of_strip[g + 8];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    sums[tile][e] += low.x * (products[tile][e] - low.y * sums_x[tile][e]);
                    sums[tile][2 + e] += high.x * (products[tile][2 + e] - high.y * sums_x[tile][2 + e]);
                }
            }
        }
        if (PREFETCH) {
#pragma unroll
            for (int i = 0; i < COLUMNS * TILES * 2; i++) (&x_now[0][0][0])[i] = (&x_next[0][0][0])[i];
        }
    }

    // what all warps have, and the outliers as one more: [WARPS + 1, ROWS, TOKENS]; a fixed order, so a fixed result
    wait<0>();
    __syncthreads();
    float* slots = (float*)shared;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float even = sums[tile][2 * half], odd = sums[tile][2 * half + 1];
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

    // whoever comes last adds up what all splits have left, in their order, and leaves the counter at zero
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
    if (threadIdx.x == 0) arrived[tile] = 0;
}
