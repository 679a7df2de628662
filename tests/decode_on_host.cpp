// decode.cu as a function of a processor: the whole grid, one block after another.
#define BITSHARD_HOST
#include "cuda_on_host.h"
#include DECODE_CU

static const uint4 *records, *scales2;
static const u16 *x, *columns, *values;
static u16* y;
static const int* rows;
static float* partial;
static unsigned* arrived;
static int tokens, n, k;

extern "C" void run(const int* grid, int block, int shared_bytes, void** pointers, const int* sizes, const long* lengths) {
    may_copy = {{(char*)pointers[0], lengths[0]}, {(char*)pointers[1], lengths[1]}};
    records = (const uint4*)pointers[0], scales2 = (const uint4*)pointers[1], x = (const u16*)pointers[2];
    y = (u16*)pointers[3], rows = (const int*)pointers[4], columns = (const u16*)pointers[5];
    values = (const u16*)pointers[6], partial = (float*)pointers[7], arrived = (unsigned*)pointers[8];
    tokens = sizes[0], n = sizes[1], k = sizes[2];
    gridDim = {grid[0], grid[1], grid[2]};
    body = [] { mix64_decode(records, scales2, x, y, rows, columns, values, partial, arrived, tokens, n, k); };
    for (int z = 0; z < grid[2]; z++) {
        for (int s = 0; s < grid[1]; s++) {
            for (int i = 0; i < grid[0]; i++) blockIdx = {i, s, z}, run_block(block, shared_bytes);
        }
    }
}
