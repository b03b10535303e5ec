// What kvrail.cu needs of CUDA, for the host's compiler. A block's threads are threads of the
// host; those of a warp meet at a barrier to exchange words, as lanes do.
#include <atomic>
#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct Dimensions {
    unsigned x;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static Dimensions gridDim, blockDim;
static thread_local Dimensions blockIdx, threadIdx;

struct Warp {
    std::barrier<> meeting{32};
    unsigned long long words[32];
};
static thread_local Warp *warp;

static unsigned long long __shfl_xor_sync(unsigned, unsigned long long word, unsigned mask) {
    const unsigned lane = threadIdx.x % 32;
    warp->words[lane] = word;
    warp->meeting.arrive_and_wait();
    const unsigned long long other = warp->words[lane ^ mask];
    warp->meeting.arrive_and_wait();
    return other;
}

static unsigned long long atomicMin(unsigned long long *address, unsigned long long value) {
    std::atomic_ref<unsigned long long> held(*address);
    unsigned long long before = held.load();
    while (value < before && !held.compare_exchange_weak(before, value)) {
    }
    return before;
}

static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}

// Runs a kernel: blocks one after the other, the threads of each at the same time.
template <typename Kernel> static void launch(unsigned blocks, unsigned threads, Kernel kernel) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned block = 0; block < blocks; block++) {
        std::vector<std::unique_ptr<Warp>> warps;
        for (unsigned lane = 0; lane < threads; lane += 32) {
            warps.push_back(std::make_unique<Warp>());
        }
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; thread++) {
            running.emplace_back([&, thread] {
                blockIdx.x = block;
                threadIdx.x = thread;
                warp = warps[thread / 32].get();
                kernel();
            });
        }
        for (std::thread &thread : running) {
            thread.join();
        }
    }
}
