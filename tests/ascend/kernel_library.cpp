// The kernels of kernels/ascend/ops on the host, as a library with the launch functions that CANN's build would make.
// A launch runs at once. Before it, the caller says which device memory there is (shim_add_region); what breaks a rule
// is in shim_error afterwards.
#define SHIM_THROWS
#include <string>

#include "gate.cpp"
#include "score.cpp"
#include "shim/launch.h"
#include "sum.cpp"
#include "up_down.cpp"

static std::string error;

extern "C" void shim_add_region(uint8_t* data, uint64_t bytes)
{
    shim::regions.push_back(shim::Region{data, bytes, {}});
}

extern "C" const char* shim_error()
{
    return error.c_str();
}

template <typename Kernel>
static uint32_t Run(uint32_t blocks, Kernel kernel)
{
    error.clear();
    try {
        shim::Launch(static_cast<int>(blocks), 0, kernel);
    } catch (const std::exception& failure) {
        error = failure.what();
    }
    shim::regions.clear();
    return error.empty() ? 0 : 1;
}

extern "C" uint32_t aclrtlaunch_svd_score(uint32_t blocks, void*, GM_ADDR a, GM_ADDR z, GM_ADDR bias, GM_ADDR unit,
    GM_ADDR shift, GM_ADDR rest, GM_ADDR counts, GM_ADDR indices, uint32_t neurons, uint32_t rank, uint32_t capacity,
    uint32_t relu)
{
    return Run(blocks,
        [=] { svd_score(a, z, bias, unit, shift, rest, counts, indices, neurons, rank, capacity, relu); });
}

extern "C" uint32_t aclrtlaunch_svd_gate(uint32_t blocks, void*, GM_ADDR gate, GM_ADDR x, GM_ADDR bias,
    GM_ADDR predicted_counts, GM_ADDR predicted, GM_ADDR counts, GM_ADDR active, GM_ADDR values, uint32_t neurons,
    uint32_t hidden, uint32_t producers, uint32_t predicted_capacity, uint32_t capacity, float threshold,
    uint32_t square)
{
    return Run(blocks, [=] {
        svd_gate(gate, x, bias, predicted_counts, predicted, counts, active, values, neurons, hidden, producers,
            predicted_capacity, capacity, threshold, square);
    });
}

extern "C" uint32_t aclrtlaunch_svd_up_down(uint32_t blocks, void*, GM_ADDR up, GM_ADDR down, GM_ADDR x, GM_ADDR bias,
    GM_ADDR counts, GM_ADDR active, GM_ADDR values, GM_ADDR partials, uint32_t neurons, uint32_t hidden,
    uint32_t producers, uint32_t capacity, uint32_t relu)
{
    return Run(blocks, [=] {
        svd_up_down(
            up, down, x, bias, counts, active, values, partials, neurons, hidden, producers, capacity, relu);
    });
}

extern "C" uint32_t aclrtlaunch_svd_sum(
    uint32_t blocks, void*, GM_ADDR partials, GM_ADDR bias, GM_ADDR y, uint32_t parts, uint32_t hidden)
{
    return Run(blocks, [=] { svd_sum(partials, bias, y, parts, hidden); });
}
