// TPipe, TQue and TBuf: who owns which part of UB, and when.
#ifndef SHIM_QUEUES_H
#define SHIM_QUEUES_H

#include <cstdint>
#include <deque>
#include <vector>

#include "core.h"
#include "failure.h"
#include "tensors.h"

namespace AscendC {

enum class TPosition { VECIN, VECOUT, VECCALC };

// A queue towards the vector unit: allocate, copy in, enqueue; dequeue, compute, free.
template <TPosition POSITION, int DEPTH>
class TQue {
    static_assert(POSITION == TPosition::VECIN, "only queues of copies into UB are modelled");

public:
    template <typename T>
    LocalTensor<T> AllocTensor()
    {
        for (size_t index : buffers_) {
            shim::Buffer& buffer = shim::core.buffers[index];
            if (buffer.life == shim::Life::FREE) {
                buffer.life = shim::Life::ALLOCATED;
                ++buffer.lives;
                shim::core.pipes.Wait(PIPE_MTE2, buffer.mark);
                return LocalTensor<T>(index, buffer.offset, buffer.bytes);
            }
        }
        shim::Fail("AllocTensor: all %zu buffers of the queue are in use, the core would hang", buffers_.size());
    }

    template <typename T>
    void EnQue(const LocalTensor<T>& tensor)
    {
        shim::Buffer& buffer = Own(tensor.Buffer(), "EnQue");
        if (buffer.life != shim::Life::ALLOCATED) {
            shim::Fail("EnQue: the tensor was not just allocated");
        }
        if (queued_.size() == DEPTH) {
            shim::Fail("EnQue: %d tensors are queued already", DEPTH);
        }
        buffer.life = shim::Life::QUEUED;
        buffer.mark = shim::core.pipes.Mark(PIPE_MTE2);
        queued_.push_back(tensor.Buffer());
    }

    template <typename T>
    LocalTensor<T> DeQue()
    {
        if (queued_.empty()) {
            shim::Fail("DeQue: nothing is queued, the core would hang");
        }
        const size_t index = queued_.front();
        queued_.pop_front();
        shim::Buffer& buffer = shim::core.buffers[index];
        buffer.life = shim::Life::IN_USE;
        shim::core.pipes.Wait(PIPE_V, buffer.mark);
        return LocalTensor<T>(index, buffer.offset, buffer.bytes);
    }

    template <typename T>
    void FreeTensor(LocalTensor<T>& tensor)
    {
        shim::Buffer& buffer = Own(tensor.Buffer(), "FreeTensor");
        if (buffer.life != shim::Life::IN_USE) {
            shim::Fail("FreeTensor: the tensor was not dequeued, or was freed before");
        }
        buffer.life = shim::Life::FREE;
        buffer.mark = shim::core.pipes.Mark(PIPE_V);
    }

private:
    friend class TPipe;

    shim::Buffer& Own(size_t index, const char* what)
    {
        if (index >= shim::core.buffers.size() || shim::core.buffers[index].owner != this) {
            shim::Fail("%s: the tensor is of another queue", what);
        }
        return shim::core.buffers[index];
    }

    std::vector<size_t> buffers_;
    std::deque<size_t> queued_;
};

// Memory that a kernel orders itself.
template <TPosition POSITION>
class TBuf {
public:
    template <typename T>
    LocalTensor<T> Get() const
    {
        if (buffer_ == SIZE_MAX) {
            shim::Fail("TBuf::Get before InitBuffer");
        }
        const shim::Buffer& buffer = shim::core.buffers[buffer_];
        return LocalTensor<T>(buffer_, buffer.offset, buffer.bytes);
    }

private:
    friend class TPipe;

    size_t buffer_ = SIZE_MAX;
};

class TPipe {
public:
    template <TPosition POSITION, int DEPTH>
    void InitBuffer(TQue<POSITION, DEPTH>& queue, uint8_t count, uint32_t bytes)
    {
        if (!queue.buffers_.empty()) {
            shim::Fail("InitBuffer: the queue has buffers already");
        }
        for (uint8_t i = 0; i < count; ++i) {
            queue.buffers_.push_back(shim::core.AddBuffer(bytes, shim::Life::FREE, &queue));
        }
    }

    template <TPosition POSITION>
    void InitBuffer(TBuf<POSITION>& buffer, uint32_t bytes)
    {
        if (buffer.buffer_ != SIZE_MAX) {
            shim::Fail("InitBuffer: the buffer has memory already");
        }
        buffer.buffer_ = shim::core.AddBuffer(bytes, shim::Life::IN_USE, nullptr);
    }

    // An id that no set flag of the event has; kernels await each flag before they set the next, so it is the first.
    TEventID FetchEventID(HardEvent)
    {
        return 0;
    }
};

template <HardEvent EVENT>
void SetFlag(TEventID id)
{
    shim::core.pipes.SetFlag(EVENT, id);
}

template <HardEvent EVENT>
void WaitFlag(TEventID id)
{
    shim::core.pipes.WaitFlag(EVENT, id);
}

template <pipe_t PIPE>
void PipeBarrier()
{
    static_assert(PIPE == PIPE_V, "only the barrier of vector instructions is modelled");
    shim::core.pipes.Wait(PIPE_V, shim::core.pipes.Mark(PIPE_V));
}

}  // namespace AscendC

#endif
