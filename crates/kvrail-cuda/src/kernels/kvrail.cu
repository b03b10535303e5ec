// kvrail's kernels. Compiled to kvrail.ptx by scripts/kernels, which also checks that the two
// belong together. The host's C++ compiler takes this file too (KVRAIL_HOST, see tests/kernels.rs),
// so that its logic is tested where there is no GPU.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

// As CopyDescriptor and HashDescriptor in mod.rs.
struct CopyDescriptor {
    u64 source;
    u64 target;
    u64 bytes;
};

struct HashDescriptor {
    u64 source;
    u64 first_page;
    u64 pages;
};

const u32 PAGE_BYTES = 4096;

// Copies `bytes / sizeof(T)` elements with all threads of the block and returns the bytes done.
// Four loads are on their way before the first is stored: memory answers after hundreds of cycles.
template <typename T> __device__ u64 copy_as(u64 source, u64 target, u64 bytes) {
    const T *from = (const T *)source;
    T *to = (T *)target;
    const u64 count = bytes / sizeof(T);
    const u64 step = blockDim.x;
    u64 index = threadIdx.x;
    for (; index + 3 * step < count; index += 4 * step) {
        const T a = from[index];
        const T b = from[index + step];
        const T c = from[index + 2 * step];
        const T d = from[index + 3 * step];
        to[index] = a;
        to[index + step] = b;
        to[index + 2 * step] = c;
        to[index + 3 * step] = d;
    }
    for (; index < count; index += step) {
        to[index] = from[index];
    }
    return count * sizeof(T);
}

// Copies pieces of memory: one block for each descriptor.
extern "C" __global__ void __launch_bounds__(256)
    kvrail_copy(const CopyDescriptor *descriptors, u64 count) {
    for (u64 number = blockIdx.x; number < count; number += gridDim.x) {
        const CopyDescriptor piece = descriptors[number];
        const u64 both = piece.source | piece.target;
        u64 done = 0;
        if ((both & 15) == 0) {
            done = copy_as<uint4>(piece.source, piece.target, piece.bytes);
        } else if ((both & 3) == 0) {
            done = copy_as<u32>(piece.source, piece.target, piece.bytes);
        }
        copy_as<u8>(piece.source + done, piece.target + done, piece.bytes - done);
    }
}

// XXH3-64 with seed 0, as its specification says (doc/xxhash_spec.md of xxHash), for inputs of
// 4096 bytes: four blocks of 1024 bytes, each 16 stripes of 64 bytes, each eight words, one for
// each accumulator. Eight threads hash a page, each with one accumulator.

const u64 PRIME32_1 = 0x9E3779B1ull;
const u64 PRIME64_1 = 0x9E3779B185EBCA87ull;

// The 192 bytes of the default secret, as little-endian words.
__constant__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__constant__ const u64 START[8] = {
    0xC2B2AE3Dull,         0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
    0x85EBCA77C2B2AE63ull, 0x85EBCA77ull,         0x27D4EB2F165667C5ull, 0x9E3779B1ull,
};

// Returns the eight bytes of the secret from `offset` on, which need not be a multiple of eight.
__device__ u64 secret_at(u32 offset) {
    const u32 word = offset / 8;
    const u32 shift = offset % 8 * 8;
    if (shift == 0) {
        return SECRET[word];
    }
    return SECRET[word] >> shift | SECRET[word + 1] << (64 - shift);
}

// Adds one word of a stripe to this thread's accumulator, and the neighbour's word.
__device__ u64 accumulate(u64 accumulator, u64 word, u64 key) {
    const u64 mixed = word ^ key;
    return accumulator + __shfl_xor_sync(0xffffffffu, word, 1) + (mixed & 0xffffffffull) * (mixed >> 32);
}

// Hashes pages of 4096 bytes: four pages for each warp. `pages` is the number of all pages.
extern "C" __global__ void __launch_bounds__(128)
    kvrail_hash_pages(const HashDescriptor *descriptors, u64 count, u64 pages, u64 *hashes) {
    const u32 lane = threadIdx.x % 8;
    const u64 group = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 8;
    const u64 groups = (u64)gridDim.x * blockDim.x / 8;
    // The words of the secret that this accumulator meets, one for each stripe of a block.
    u64 keys[16];
#pragma unroll
    for (u32 stripe = 0; stripe < 16; stripe++) {
        keys[stripe] = SECRET[stripe + lane];
    }
    const u64 scramble_key = SECRET[16 + lane];
    const u64 last_key = secret_at(192 - 64 - 7 + 8 * lane);
    const u64 merge_key = secret_at(11 + 8 * lane);
    // All threads of a warp stay together, for the exchange of words: those without a page of
    // their own hash the last one again.
    for (u64 base = group - group % 4; base < pages; base += groups) {
        const u64 own = base + group % 4;
        const u64 page = own < pages ? own : pages - 1;
        u64 source = 0;
        u64 target = 0;
        u64 before = 0;
        for (u64 number = 0; number < count; number++) {
            const HashDescriptor run = descriptors[number];
            if (page >= before && page - before < run.pages) {
                source = run.source + (page - before) * PAGE_BYTES;
                target = run.first_page + (page - before);
            }
            before += run.pages;
        }
        const u64 *words = (const u64 *)source + lane;
        u64 accumulator = START[lane];
#pragma unroll
        for (u32 block = 0; block < 4; block++) {
            u64 loaded[16];
#pragma unroll
            for (u32 stripe = 0; stripe < 16; stripe++) {
                loaded[stripe] = words[(block * 16 + stripe) * 8];
            }
#pragma unroll
            for (u32 stripe = 0; stripe < 15; stripe++) {
                accumulator = accumulate(accumulator, loaded[stripe], keys[stripe]);
            }
            // The very last stripe has a key of its own; it is the last of the fourth block here
            // because 4096 is a multiple of 64.
            accumulator = accumulate(accumulator, loaded[15], block == 3 ? last_key : keys[15]);
            if (block != 3) {
                accumulator ^= accumulator >> 47;
                accumulator ^= scramble_key;
                accumulator *= PRIME32_1;
            }
        }
        // Pairs of accumulators are multiplied, and the four products added up.
        const u64 mixed = accumulator ^ merge_key;
        const u64 other = __shfl_xor_sync(0xffffffffu, mixed, 1);
        u64 sum = (mixed * other) ^ __umul64hi(mixed, other);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        u64 hash = PAGE_BYTES * PRIME64_1 + sum;
        hash ^= hash >> 37;
        hash *= 0x165667919E3779F9ull;
        hash ^= hash >> 32;
        if (lane == 0 && own < pages) {
            hashes[target] = hash;
        }
    }
}
