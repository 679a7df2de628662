// Enough of CUDA to run one kernel on a processor, so that what a GPU would compute can be tested where there is none:
// every thread of a block is a coroutine that runs until it must wait for others. Asynchronous copies fill their target
// with NaN when they are issued and with data when they are waited for, so reading too early and overwriting what others
// still read both show.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <utility>
#include <vector>

using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define SHARED(name) uint4* name = block_shared

using u16 = unsigned short;
using u8 = unsigned char;
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim { int x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Copy { uint4* to; const uint4* from; };

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    std::vector<std::vector<Copy>> groups{1};
    enum { running, waits_warp, waits_block, done } state;
    float exchanged;
    unsigned a[4], b[2];
    float *d;
};

static Dim blockIdx, gridDim, threadIdx;
static uint4* block_shared;
static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current;
static std::vector<std::pair<char*, long>> may_copy;  // tensors that are copied from

inline void suspend(decltype(Thread::state) why) {
    const int self = current;
    threads[self].state = why;
    swapcontext(&threads[self].context, &scheduler);
    current = self, threadIdx = {self, 0, 0};
}

inline void __syncwarp() { suspend(Thread::waits_warp); }
inline void __syncthreads() { suspend(Thread::waits_block); }
inline void __threadfence() {}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    threads[current].exchanged = value;
    __syncwarp();
    const float other = threads[current ^ mask].exchanged;
    __syncwarp();
    return other;
}

inline unsigned atomicAdd(unsigned* counter, unsigned by) { return (*counter += by) - by; }

inline float as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline float half_value(u16 bits) { _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
inline u16 half_bits(float value) { const _Float16 rounded = (_Float16)value; u16 bits; memcpy(&bits, &rounded, 2); return bits; }
inline u16 bfloat_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7FFF;
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline unsigned scale_pair(unsigned codes, unsigned steps, unsigned offsets) {
    unsigned scales = 0;
    for (int i = 0; i < 32; i += 16) {
        const double exact = (double)half_value((u16)(steps >> i)) * (codes >> i & 15) + half_value((u16)(offsets >> i));
        const _Float16 rounded = (_Float16)exact;
        u16 bits;
        memcpy(&bits, &rounded, 2);
        scales |= (unsigned)bits << i;
    }
    return scales;
}
inline unsigned low_halves(unsigned a, unsigned b) { return a & 0xFFFF | b << 16; }
inline unsigned high_halves(unsigned a, unsigned b) { return a >> 16 | b & 0xFFFF0000u; }

inline unsigned kept(unsigned value) { return value; }
inline unsigned address_of(const uint4* shared) { return (unsigned)((char*)shared - (char*)block_shared); }

inline void copy_async(unsigned address, const uint4* global) {
    uint4* shared = block_shared + address / 16;
    bool allowed = false;
    for (const auto& [start, length] : may_copy) allowed |= (char*)global >= start && (char*)(global + 1) <= start + length;
    if (!allowed) fprintf(stderr, "copy_async: not of a tensor\n"), abort();
    if ((uintptr_t)global % 16 || (uintptr_t)shared % 16) fprintf(stderr, "copy_async: not aligned\n"), abort();
    memset((void*)shared, 0xFF, 16);
    threads[current].groups.back().push_back({shared, global});
}
inline void commit() { threads[current].groups.emplace_back(); }
template <int pending>
inline void wait() {
    auto& groups = threads[current].groups;  // the last one is open
    while ((int)groups.size() - 1 > pending) {
        for (const Copy& copy : groups.front()) *copy.to = *copy.from;
        groups.erase(groups.begin());
    }
}

inline float operand(unsigned word, int half) {
    const u16 bits = (u16)(word >> 16 * half);
    return BFLOAT ? as_float((unsigned)bits << 16) : half_value(bits);
}

// mma.m16n8k16: who holds what is PTX's (section "Matrix Fragments for mma.m16n8k16 with floating point type")
inline void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    Thread& self = threads[current];
    memcpy(self.a, a, sizeof a), memcpy(self.b, b, sizeof b);
    __syncwarp();
    const int base = current / 32 * 32, g = current % 32 / 4, t = current % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            const int owner = k % 8 / 2;
            const Thread& has_a = threads[base + row % 8 * 4 + owner];
            const Thread& has_b = threads[base + column * 4 + owner];
            sum += (double)operand(has_a.a[row / 8 + 2 * (k / 8)], k % 2) * operand(has_b.b[k / 8], k % 2);
        }
        d[i] = (float)sum;
    }
    __syncwarp();
}

static void (*body)();

static void entry() {
    body();
    threads[current].state = Thread::done;
    swapcontext(&threads[current].context, &scheduler);
}

static void run_block(int count, int shared_bytes) {
    std::vector<uint4> memory(shared_bytes / 16 + 1);
    block_shared = memory.data();
    memset((void*)block_shared, 0xFF, memory.size() * 16);
    threads = std::vector<Thread>(count);
    for (Thread& thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, entry, 0);
        thread.state = Thread::running;
    }
    for (int left = count; left;) {
        bool moved = false;
        for (int i = 0; i < count; i++) {
            if (threads[i].state != Thread::running) continue;
            current = i, threadIdx = {i, 0, 0}, moved = true;
            swapcontext(&scheduler, &threads[i].context);
            left -= threads[i].state == Thread::done;
        }
        int at_block = 0;
        for (int w = 0; w < count; w += 32) {
            int at_warp = 0;
            for (int i = w; i < w + 32; i++) at_warp += threads[i].state == Thread::waits_warp, at_block += threads[i].state == Thread::waits_block;
            if (at_warp == 32) {
                for (int i = w; i < w + 32; i++) threads[i].state = Thread::running;
                moved = true;
            }
        }
        if (at_block == count) {
            for (Thread& thread : threads) thread.state = Thread::running;
            moved = true;
        }
        if (!moved && left) fprintf(stderr, "threads wait for each other\n"), abort();
    }
}
