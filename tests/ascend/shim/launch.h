// Runs a kernel on the host: its blocks one after the other, in an order that a test chooses.
#ifndef SHIM_LAUNCH_H
#define SHIM_LAUNCH_H

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "core.h"
#include "failure.h"

namespace shim {

// order: 0 ascending, 1 descending, else the seed of a shuffle.
template <typename Kernel>
void Launch(int blocks, unsigned order, Kernel kernel)
{
    if (blocks < 1 || blocks > MOST_BLOCKS) {
        Fail("%d blocks, a device has %d vector cores", blocks, MOST_BLOCKS);
    }
    std::vector<int> sequence(blocks);
    std::iota(sequence.begin(), sequence.end(), 0);
    if (order == 1) {
        std::reverse(sequence.begin(), sequence.end());
    } else if (order > 1) {
        std::shuffle(sequence.begin(), sequence.end(), std::mt19937(order));
    }
    for (Region& region : regions) {
        region.writer.assign(region.bytes, -1);
    }
    for (int block : sequence) {
        core.Reset(block, blocks);
        kernel();
        core.CheckIdle();
    }
}

}  // namespace shim

#endif
