// Runs the kernels of kernels/ascend/ops on the host, as the script on standard input says (shim/script.h).
#include "score.cpp"
#include "shim/script.h"

using shim::Arguments;

int main()
{
    const shim::Kernels kernels = {
        {"svd_score",
            [](Arguments& a) {
                auto *matrix = a.Address(), *z = a.Address(), *bias = a.Address(), *unit = a.Address();
                auto *shift = a.Address(), *counts = a.Address(), *indices = a.Address();
                const uint32_t neurons = a.Integer(), rank = a.Integer(), capacity = a.Integer(), relu = a.Integer();
                return [=] {
                    svd_score(matrix, z, bias, unit, shift, counts, indices, neurons, rank, capacity, relu);
                };
            }},
    };
    return shim::RunScript(kernels);
}
