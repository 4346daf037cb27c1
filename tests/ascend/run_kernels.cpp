// Runs the kernels of kernels/ascend/ops on the host, as the script on standard input says (shim/script.h).
#include "gate.cpp"
#include "score.cpp"
#include "shim/script.h"
#include "sum.cpp"
#include "up_down.cpp"

using shim::Arguments;
using Run = std::function<void()>;

static Run RunScore(Arguments& a)
{
    auto *matrix = a.Address(), *z = a.Address(), *bias = a.Address(), *unit = a.Address(), *shift = a.Address();
    auto *rest = a.Address(), *counts = a.Address(), *indices = a.Address();
    const uint32_t neurons = a.Integer(), rank = a.Integer(), capacity = a.Integer(), relu = a.Integer();
    return [=] { svd_score(matrix, z, bias, unit, shift, rest, counts, indices, neurons, rank, capacity, relu); };
}

static Run RunGate(Arguments& a)
{
    auto *gate = a.Address(), *x = a.Address(), *bias = a.Address();
    auto *predicted_counts = a.Address(), *predicted = a.Address();
    auto *counts = a.Address(), *active = a.Address(), *values = a.Address();
    const uint32_t neurons = a.Integer(), hidden = a.Integer(), producers = a.Integer();
    const uint32_t predicted_capacity = a.Integer(), capacity = a.Integer();
    const float threshold = a.Real();
    const uint32_t square = a.Integer();
    return [=] {
        svd_gate(gate, x, bias, predicted_counts, predicted, counts, active, values, neurons, hidden, producers,
            predicted_capacity, capacity, threshold, square);
    };
}

static Run RunUpDown(Arguments& a)
{
    auto *up = a.Address(), *down = a.Address(), *x = a.Address(), *bias = a.Address();
    auto *counts = a.Address(), *active = a.Address(), *values = a.Address(), *partials = a.Address();
    const uint32_t neurons = a.Integer(), hidden = a.Integer(), producers = a.Integer();
    const uint32_t capacity = a.Integer(), relu = a.Integer();
    return [=] {
        svd_up_down(
            up, down, x, bias, counts, active, values, partials, neurons, hidden, producers, capacity, relu);
    };
}

static Run RunSum(Arguments& a)
{
    auto *partials = a.Address(), *bias = a.Address(), *y = a.Address();
    const uint32_t parts = a.Integer(), hidden = a.Integer();
    return [=] { svd_sum(partials, bias, y, parts, hidden); };
}

int main()
{
    return shim::RunScript(
        {{"svd_score", RunScore}, {"svd_gate", RunGate}, {"svd_up_down", RunUpDown}, {"svd_sum", RunSum}});
}
