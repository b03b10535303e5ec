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

// As PieceGrid in grid.rs: pieces of one length, `columns` of them in each row, `stride` bytes from
// one to the next. What is counted in granules has 16 bytes each.
const u32 ROWS_MAX = 256;
struct PieceGrid {
    u64 stride;
    u32 columns;
    u32 piece_granules;
    u32 granules;
    u32 skipped;
    u64 rows[ROWS_MAX];
};

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
// each accumulator. A warp hashes a page: within a block the stripes only add to the accumulators,
// so its lanes take two words of a stripe each, with 16 bytes in one access, and add up afterwards.

const u64 PRIME32_1 = 0x9E3779B1ull;
const u64 PRIME64_1 = 0x9E3779B185EBCA87ull;

// The 192 bytes of the default secret, as little-endian words. Not constant memory: that serves
// one word at a time, and here each lane wants another one.
__device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__device__ const u64 START[8] = {
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

// What a lane knows of the secret: it has accumulators 2 * (lane % 4) and the next, and of a block
// the stripes lane / 4 and lane / 4 + 8.
struct Keys {
    u64 stripes[2][2];
    // For the very last stripe of a page, which has a key of its own; it is the last of the fourth
    // block here because 4096 is a multiple of 64.
    u64 last[2];
    u64 scramble[2];
    u64 merge[2];
    u64 start[2];
};

__device__ Keys keys_of(u32 lane) {
    const u32 accumulator = lane % 4 * 2;
    const u32 stripe = lane / 4;
    Keys keys;
    for (u32 side = 0; side < 2; side++) {
        const u32 own = accumulator + side;
        keys.stripes[0][side] = SECRET[stripe + own];
        keys.stripes[1][side] = SECRET[stripe + 8 + own];
        keys.last[side] = stripe == 7 ? secret_at(192 - 64 - 7 + 8 * own) : keys.stripes[1][side];
        keys.scramble[side] = SECRET[16 + own];
        keys.merge[side] = secret_at(11 + 8 * own);
        keys.start[side] = START[own];
    }
    return keys;
}

// Sixteen bytes of a page, as two words.
struct alignas(16) Pair {
    u64 first;
    u64 second;
};

// Pairs of a page that a lane has: number `index` is pair `index * 32 + lane` of the page.
const u32 PAIRS = 8;

__device__ u64 product(u64 word, u64 key) {
    const u64 mixed = word ^ key;
    return (mixed & 0xffffffffull) * (mixed >> 32);
}

__device__ u64 add_up(u64 value) {
    value += __shfl_xor_sync(0xffffffffu, value, 4);
    value += __shfl_xor_sync(0xffffffffu, value, 8);
    return value + __shfl_xor_sync(0xffffffffu, value, 16);
}

__device__ u64 scrambled(u64 accumulator, u64 key) {
    return ((accumulator ^ (accumulator >> 47)) ^ key) * PRIME32_1;
}

// Returns the hash of a page of which each lane of the warp has its pairs; all lanes get it.
__device__ u64 hash_page(const Pair *pairs, const Keys &keys) {
    u64 first = keys.start[0];
    u64 second = keys.start[1];
#pragma unroll
    for (u32 block = 0; block < 4; block++) {
        u64 to_first = 0;
        u64 to_second = 0;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const Pair pair = pairs[block * 2 + half];
            const bool last = block == 3 && half == 1;
            const u64 *own = last ? keys.last : keys.stripes[half];
            // An accumulator gets the product of its own word, and its neighbour's word.
            to_first += pair.second + product(pair.first, own[0]);
            to_second += pair.first + product(pair.second, own[1]);
        }
        first += add_up(to_first);
        second += add_up(to_second);
        if (block != 3) {
            first = scrambled(first, keys.scramble[0]);
            second = scrambled(second, keys.scramble[1]);
        }
    }
    // Pairs of accumulators are multiplied, and the four products added up.
    const u64 left = first ^ keys.merge[0];
    const u64 right = second ^ keys.merge[1];
    u64 sum = (left * right) ^ __umul64hi(left, right);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    u64 hash = PAGE_BYTES * PRIME64_1 + sum;
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9ull;
    return hash ^ (hash >> 32);
}

// The number of this thread's warp among all, and how many there are.
__device__ u64 warp_number() { return ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32; }
__device__ u64 warp_count() { return (u64)gridDim.x * blockDim.x / 32; }

__device__ void load_page(u64 source, u32 lane, Pair *pairs) {
    const Pair *from = (const Pair *)source + lane;
#pragma unroll
    for (u32 index = 0; index < PAIRS; index++) {
        pairs[index] = from[index * 32];
    }
}

__device__ void store_page(u64 target, u32 lane, const Pair *pairs) {
    Pair *to = (Pair *)target + lane;
#pragma unroll
    for (u32 index = 0; index < PAIRS; index++) {
        to[index * 32] = pairs[index];
    }
}

// Hashes pages of 4096 bytes, a warp for each.
extern "C" __global__ void __launch_bounds__(128)
    kvrail_hash_pages(const HashDescriptor *descriptors, u64 count, u64 pages, u64 *hashes) {
    const u32 lane = threadIdx.x % 32;
    const Keys keys = keys_of(lane);
    for (u64 page = warp_number(); page < pages; page += warp_count()) {
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
        Pair pairs[PAIRS];
        load_page(source, lane, pairs);
        const u64 hash = hash_page(pairs, keys);
        if (lane == 0) {
            hashes[target] = hash;
        }
    }
}

// Makes the entries behind the hashes of the pages zero, up to `entries`.
__device__ void clear_entries(u64 *hashes, u64 pages, u64 entries) {
    const u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 entry = pages + (u64)blockIdx.x * blockDim.x + threadIdx.x; entry < entries;
         entry += threads) {
        hashes[entry] = 0;
    }
}

// Where a piece lies on the side of the pages: pieces are contiguous there, in ascending order.
template <bool GATHER> __device__ u64 on_pages(const CopyDescriptor &piece) {
    return GATHER ? piece.target : piece.source;
}

// Returns the number of the piece that has `address` on the side of the pages.
template <bool GATHER>
__device__ u64 piece_at(const CopyDescriptor *pieces, u64 count, u64 address) {
    const CopyDescriptor first = pieces[0];
    // Most chunks are pieces of one length.
    u64 low = (address - on_pages<GATHER>(first)) / first.bytes;
    if (low < count) {
        const CopyDescriptor guess = pieces[low];
        const u64 start = on_pages<GATHER>(guess);
        if (address >= start && address - start < guess.bytes) {
            return low;
        }
    }
    low = 0;
    u64 high = count;
    while (high - low > 1) {
        const u64 middle = (low + high) / 2;
        if (address < on_pages<GATHER>(pieces[middle])) {
            high = middle;
        } else {
            low = middle;
        }
    }
    return low;
}

// Copies pieces to pages that lie one behind the other from `image` on, and hashes the pages on
// the way, a warp for each. The pieces fill the pages, in ascending order; a piece without a source
// is zeros. What `hashes` has behind the last page, `entries` in all, becomes zero.
extern "C" __global__ void __launch_bounds__(128)
    kvrail_gather_hashed(const CopyDescriptor *pieces, u64 count, u64 image, u64 pages, u64 *hashes,
                         u64 entries) {
    const u32 lane = threadIdx.x % 32;
    const Keys keys = keys_of(lane);
    for (u64 page = warp_number(); page < pages; page += warp_count()) {
        const u64 start = image + page * PAGE_BYTES;
        u64 number = piece_at<true>(pieces, count, start);
        CopyDescriptor piece = pieces[number];
        Pair pairs[PAIRS];
        if (piece.source != 0 && start + PAGE_BYTES <= piece.target + piece.bytes) {
            load_page(piece.source + (start - piece.target), lane, pairs);
        } else {
#pragma unroll
            for (u32 index = 0; index < PAIRS; index++) {
                const u64 address = start + (index * 32 + lane) * sizeof(Pair);
                while (address - piece.target >= piece.bytes) {
                    number++;
                    piece = pieces[number];
                }
                pairs[index] = Pair{0, 0};
                if (piece.source != 0) {
                    pairs[index] = *(const Pair *)(piece.source + (address - piece.target));
                }
            }
        }
        store_page(start, lane, pairs);
        const u64 hash = hash_page(pairs, keys);
        if (lane == 0) {
            hashes[page] = hash;
        }
    }
    clear_entries(hashes, pages, entries);
}

// Copies pieces from pages that lie one behind the other from `image` on, a warp for each page,
// and only from pages whose hash is the expected one; the number of the first other page, if it is
// below, goes to `bad`. The pieces lie in the pages in ascending order, without gaps; the first page
// may begin before the first piece, and the last page end behind the last one.
extern "C" __global__ void __launch_bounds__(128)
    kvrail_scatter_verified(const CopyDescriptor *pieces, u64 count, u64 image, u64 pages,
                            const u64 *expected, u64 *bad) {
    const u32 lane = threadIdx.x % 32;
    const Keys keys = keys_of(lane);
    const u64 begin = pieces[0].source;
    const CopyDescriptor tail = pieces[count - 1];
    const u64 end = tail.source + tail.bytes;
    for (u64 page = warp_number(); page < pages; page += warp_count()) {
        const u64 start = image + page * PAGE_BYTES;
        Pair pairs[PAIRS];
        load_page(start, lane, pairs);
        if (hash_page(pairs, keys) != expected[page]) {
            if (lane == 0) {
                atomicMin(bad, page);
            }
            continue;
        }
        u64 number = piece_at<false>(pieces, count, start < begin ? begin : start);
        CopyDescriptor piece = pieces[number];
        if (start >= piece.source && start + PAGE_BYTES <= piece.source + piece.bytes) {
            store_page(piece.target + (start - piece.source), lane, pairs);
            continue;
        }
#pragma unroll
        for (u32 index = 0; index < PAIRS; index++) {
            const u64 address = start + (index * 32 + lane) * sizeof(Pair);
            if (address < begin || address >= end) {
                continue;
            }
            while (address - piece.source >= piece.bytes) {
                number++;
                piece = pieces[number];
            }
            *(Pair *)(piece.target + (address - piece.source)) = pairs[index];
        }
    }
}

// Granules of a page, each a pair of one lane.
const u32 PAGE_GRANULES = PAGE_BYTES / sizeof(Pair);

// Returns the address of piece `number`.
__device__ u64 piece_start(const PieceGrid &grid, u32 number) {
    const u32 row = number / grid.columns;
    return grid.rows[row] + (number - row * grid.columns) * grid.stride;
}

// Returns the address of a granule, counted over all pieces.
__device__ Pair *granule_at(const PieceGrid &grid, u32 granule) {
    const u32 piece = granule / grid.piece_granules;
    const u32 inside = granule - piece * grid.piece_granules;
    return (Pair *)(piece_start(grid, piece) + (u64)inside * sizeof(Pair));
}

// Returns where the granules from `first` on lie if a whole page of them is in one piece, else 0.
// What lies before the first piece is far above `granules`, since the numbers wrap around.
__device__ u64 page_in_piece(const PieceGrid &grid, u32 first) {
    const u32 piece = first / grid.piece_granules;
    const u32 inside = first - piece * grid.piece_granules;
    const bool whole = first < grid.granules && inside + PAGE_GRANULES <= grid.piece_granules;
    return whole ? piece_start(grid, piece) + (u64)inside * sizeof(Pair) : 0;
}

__device__ void load_granules(const PieceGrid &grid, u64 page, u32 lane, Pair *pairs) {
    const u32 first = (u32)page * PAGE_GRANULES;
    const u64 source = page_in_piece(grid, first);
    if (source != 0) {
        load_page(source, lane, pairs);
        return;
    }
#pragma unroll
    for (u32 index = 0; index < PAIRS; index++) {
        const u32 granule = first + index * 32 + lane;
        pairs[index] = granule < grid.granules ? *granule_at(grid, granule) : Pair{0, 0};
    }
}

__device__ void store_granules(const PieceGrid &grid, u64 page, u32 lane, const Pair *pairs) {
    const u32 first = (u32)page * PAGE_GRANULES - grid.skipped;
    const u64 target = page_in_piece(grid, first);
    if (target != 0) {
        store_page(target, lane, pairs);
        return;
    }
#pragma unroll
    for (u32 index = 0; index < PAIRS; index++) {
        const u32 granule = first + index * 32 + lane;
        if (granule < grid.granules) {
            *granule_at(grid, granule) = pairs[index];
        }
    }
}

// As kvrail_gather_hashed, of a grid of pieces and zeros behind it. The grid comes with the launch,
// which need not wait for a copy to the device. The first page is on its way before anything else
// is read.
extern "C" __global__ void __launch_bounds__(128)
    kvrail_gather_grid(const __grid_constant__ PieceGrid grid, u64 image, u64 pages, u64 *hashes,
                       u64 entries) {
    const u32 lane = threadIdx.x % 32;
    u64 page = warp_number();
    Pair pairs[PAIRS];
    if (page < pages) {
        load_granules(grid, page, lane, pairs);
    }
    const Keys keys = keys_of(lane);
    while (page < pages) {
        store_page(image + page * PAGE_BYTES, lane, pairs);
        const u64 hash = hash_page(pairs, keys);
        if (lane == 0) {
            hashes[page] = hash;
        }
        page += warp_count();
        if (page < pages) {
            load_granules(grid, page, lane, pairs);
        }
    }
    clear_entries(hashes, pages, entries);
}

// As kvrail_scatter_verified, to a grid of pieces, which begins `skipped` granules behind the start
// of the first page.
extern "C" __global__ void __launch_bounds__(128, 5)
    kvrail_scatter_grid(const __grid_constant__ PieceGrid grid, u64 image, u64 pages,
                        const u64 *expected, u64 *bad) {
    const u32 lane = threadIdx.x % 32;
    u64 page = warp_number();
    Pair pairs[PAIRS];
    u64 wanted = 0;
    if (page < pages) {
        load_page(image + page * PAGE_BYTES, lane, pairs);
        wanted = expected[page];
    }
    const Keys keys = keys_of(lane);
    while (page < pages) {
        if (hash_page(pairs, keys) == wanted) {
            store_granules(grid, page, lane, pairs);
        } else if (lane == 0) {
            atomicMin(bad, page);
        }
        page += warp_count();
        if (page < pages) {
            load_page(image + page * PAGE_BYTES, lane, pairs);
            wanted = expected[page];
        }
    }
}
