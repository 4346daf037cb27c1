// Order between the pipes of a core: scalar unit, vector unit, and the copies into UB (MTE2) and out of it (MTE3).
#ifndef SVDENGINE_ASCEND_SYNC_H
#define SVDENGINE_ASCEND_SYNC_H

#include "kernel_operator.h"

// The event's second pipe waits for all that its first pipe was given so far.
template <AscendC::HardEvent EVENT>
__aicore__ inline void Sync(AscendC::TPipe& pipe)
{
    auto id = pipe.FetchEventID(EVENT);
    AscendC::SetFlag<EVENT>(id);
    AscendC::WaitFlag<EVENT>(id);
}

// The next vector instruction sees what earlier ones wrote.
__aicore__ inline void VectorBarrier()
{
    AscendC::PipeBarrier<PIPE_V>();
}

#endif
