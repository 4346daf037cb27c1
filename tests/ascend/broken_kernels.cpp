// Kernels that each break one rule of the hardware, and a sound one: the shim must tell them apart.
#include "kernel_operator.h"
#include "shim/script.h"

using namespace AscendC;

constexpr uint32_t COUNT = 256;  // floats in `in` and `out`

// What the kernels use: a queue of two buffers, two pieces of UB, and device memory.
struct Fixture {
    explicit Fixture(GM_ADDR from, GM_ADDR to)
    {
        in.SetGlobalBuffer(reinterpret_cast<float*>(from), COUNT);
        out.SetGlobalBuffer(reinterpret_cast<float*>(to), COUNT);
        pipe.InitBuffer(queue, 2, COUNT * sizeof(float));
        pipe.InitBuffer(buffer_a, COUNT * sizeof(float));
        pipe.InitBuffer(buffer_b, COUNT * sizeof(float));
        a = buffer_a.Get<float>();
        b = buffer_b.Get<float>();
    }

    // in -> a, known to the vector unit.
    void Load()
    {
        DataCopy(a, in, COUNT);
        Order<HardEvent::MTE2_V>();
    }

    void Store(const LocalTensor<float>& from)
    {
        Order<HardEvent::V_MTE3>();
        DataCopy(out, from, COUNT);
    }

    template <HardEvent EVENT>
    void Order()
    {
        SetFlag<EVENT>(0);
        WaitFlag<EVENT>(0);
    }

    TPipe pipe;
    GlobalTensor<float> in, out;
    TQue<TPosition::VECIN, 1> queue;
    TBuf<TPosition::VECCALC> buffer_a, buffer_b;
    LocalTensor<float> a, b;
};

using Kernel = void (*)(Fixture&);
static const DataCopyExtParams FIVE_FLOATS{1, 20, 0, 0, 0};
static const DataCopyPadExtParams<float> NO_PADDING{false, 0, 0, 0};

static void Sound(Fixture& f)
{
    f.Load();
    auto slot = f.queue.AllocTensor<float>();
    DataCopy(slot, f.in, COUNT);
    f.queue.EnQue(slot);
    slot = f.queue.DeQue<float>();
    Add(f.b, f.a, slot, COUNT);
    f.queue.FreeTensor(slot);
    f.Store(f.b);
}

static const std::map<std::string, Kernel> KERNELS = {
    {"sound", Sound},
    // Addresses and sizes.
    {"unaligned_vector", [](Fixture& f) { f.Load(); Relu(f.b, f.a[1], 8); }},
    {"unaligned_copy_in", [](Fixture& f) { DataCopy(f.a[4], f.in, 8); }},
    {"unaligned_copy_out", [](Fixture& f) { f.Load(); DataCopy(f.out, f.a[4], 8); }},
    {"unaligned_pad_in", [](Fixture& f) { DataCopyPad(f.a[1], f.in, FIVE_FLOATS, NO_PADDING); }},
    {"unaligned_pad_out", [](Fixture& f) { DataCopyPad(f.out, f.a[1], FIVE_FLOATS); }},
    {"part_of_a_block", [](Fixture& f) { DataCopy(f.a, f.in, 9); }},
    {"part_of_a_block_out", [](Fixture& f) { DataCopy(f.out, f.a, 12); }},
    {"copy_of_nothing", [](Fixture& f) { DataCopyPad(f.a, f.in, {1, 0, 0, 0, 0}, NO_PADDING); }},
    {"compare_of_part", [](Fixture& f) {
         f.Load();
         CompareScalar(f.b.ReinterpretCast<uint8_t>(), f.a, 0.0f, CMPMODE::GT, 32);
     }},
    {"gather_of_part", [](Fixture& f) {
         uint64_t kept = 0;
         GatherMask(f.a, f.b, f.b[128].ReinterpretCast<uint32_t>(), true, 40, {1, 1, 8, 0}, kept);
     }},
    {"too_many_repeats", [](Fixture& f) { WholeReduceSum(f.b, f.a, 64, 256, 1, 1, 0); }},
    {"overlap", [](Fixture& f) { f.Load(); Relu(f.a[8], f.a, 64); }},
    // Memory.
    {"beyond_ub_tensor", [](Fixture& f) { Duplicate(f.a[8], 1.0f, COUNT); }},
    {"beyond_device_tensor", [](Fixture& f) { DataCopy(f.a, f.in[8], COUNT); }},
    {"beyond_device_memory", [](Fixture& f) {
         GlobalTensor<float> wrong;
         wrong.SetGlobalBuffer(f.in.Data(), 2 * COUNT);
         DataCopyPad(f.a, wrong[COUNT - 4], FIVE_FLOATS, NO_PADDING);
     }},
    {"null_address", [](Fixture& f) {
         GlobalTensor<float> wrong;
         wrong.SetGlobalBuffer(nullptr, COUNT);
         DataCopy(f.a, wrong, 8);
     }},
    {"too_much_ub", [](Fixture& f) {
         TBuf<TPosition::VECCALC> large;
         f.pipe.InitBuffer(large, 188160 - 4 * 1024 + 32);
     }},
    {"too_many_buffers", [](Fixture& f) {
         TBuf<TPosition::VECCALC> small[61];
         for (auto& buffer : small) {
             f.pipe.InitBuffer(buffer, 32);
         }
     }},
    // Queues.
    {"alloc_without_free", [](Fixture& f) {
         for (int i = 0; i < 3; ++i) {
             f.queue.AllocTensor<float>();
         }
     }},
    {"end_without_free", [](Fixture& f) { f.queue.AllocTensor<float>(); }},
    {"dequeue_of_nothing", [](Fixture& f) { f.queue.DeQue<float>(); }},
    {"enqueue_twice", [](Fixture& f) {
         auto slot = f.queue.AllocTensor<float>();
         f.queue.EnQue(slot);
         f.queue.EnQue(slot);
     }},
    {"enqueue_too_deep", [](Fixture& f) {
         f.queue.EnQue(f.queue.AllocTensor<float>());
         f.queue.EnQue(f.queue.AllocTensor<float>());
     }},
    {"enqueue_of_another", [](Fixture& f) { f.queue.EnQue(f.a); }},
    {"free_twice", [](Fixture& f) {
         f.queue.EnQue(f.queue.AllocTensor<float>());
         auto slot = f.queue.DeQue<float>();
         f.queue.FreeTensor(slot);
         f.queue.FreeTensor(slot);
     }},
    {"use_after_free", [](Fixture& f) {
         f.queue.EnQue(f.queue.AllocTensor<float>());
         auto slot = f.queue.DeQue<float>();
         f.queue.FreeTensor(slot);
         Duplicate(slot, 1.0f, 8);
     }},
    {"use_of_an_earlier_life", [](Fixture& f) {
         f.queue.EnQue(f.queue.AllocTensor<float>());
         auto slot = f.queue.DeQue<float>();
         f.queue.FreeTensor(slot);
         f.queue.AllocTensor<float>();
         Duplicate(slot, 1.0f, 8);
     }},
    {"use_while_queued", [](Fixture& f) {
         auto slot = f.queue.AllocTensor<float>();
         f.queue.EnQue(slot);
         DataCopy(slot, f.in, 8);
     }},
    // Order of the pipes.
    {"vector_before_copy_in", [](Fixture& f) { DataCopy(f.a, f.in, 8); Relu(f.b, f.a, 8); }},
    {"vector_without_barrier", [](Fixture& f) { Duplicate(f.a, 1.0f, 8); Relu(f.b, f.a, 8); }},
    {"copy_out_before_vector", [](Fixture& f) { Duplicate(f.a, 1.0f, 8); DataCopy(f.out, f.a, 8); }},
    {"scalar_before_copy_in", [](Fixture& f) { DataCopy(f.a, f.in, 8); f.a.GetValue(0); }},
    {"scalar_before_vector", [](Fixture& f) { Duplicate(f.a, 1.0f, 8); f.a.GetValue(7); }},
    {"vector_before_scalar", [](Fixture& f) { f.a.SetValue(3, 1.0f); Relu(f.b, f.a, 8); }},
    {"copy_in_before_read", [](Fixture& f) { f.Load(); Relu(f.b, f.a, 8); DataCopy(f.a, f.in, 8); }},
    {"vector_before_copy_out", [](Fixture& f) { f.Load(); f.Store(f.a); Duplicate(f.a, 1.0f, 8); }},
    {"flag_twice", [](Fixture&) { SetFlag<HardEvent::V_S>(0); SetFlag<HardEvent::V_S>(0); }},
    {"flag_not_set", [](Fixture&) { WaitFlag<HardEvent::V_S>(0); }},
    {"flag_left", [](Fixture&) { SetFlag<HardEvent::V_S>(0); }},
    {"flag_id", [](Fixture&) { SetFlag<HardEvent::V_S>(8); }},
    // Blocks.
    {"two_writers", [](Fixture& f) { Duplicate(f.a, 1.0f, COUNT); f.Store(f.a); }},
    {"reader_of_a_writer", [](Fixture& f) {
         if (GetBlockIdx() == 0) {
             Duplicate(f.a, 1.0f, COUNT);
             f.Store(f.a);
         } else {
             DataCopy(f.a, f.out, 8);
         }
     }},
};

int main()
{
    shim::Kernels kernels;
    for (const auto& [name, kernel] : KERNELS) {
        const Kernel run = kernel;
        kernels[name] = [run](shim::Arguments& arguments) {
            auto *from = arguments.Address(), *to = arguments.Address();
            return [=] {
                Fixture fixture(from, to);
                run(fixture);
            };
        };
    }
    return shim::RunScript(kernels);
}
