// Which instructions of a core are known to be finished when another starts.
//
// A core's pipes run side by side: scalar unit, vector unit, copies in (MTE2) and copies out (MTE3). Only flags,
// barriers and queues order them. The host runs them one by one, so a missing flag would never show; therefore every
// instruction gets a number on its pipe, and every pipe remembers up to which number it has waited for each other.
#ifndef SHIM_PIPES_H
#define SHIM_PIPES_H

#include <array>
#include <cstdint>
#include <map>
#include <utility>

#include "failure.h"

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

enum class HardEvent { V_S, S_V, V_MTE2, MTE2_V, V_MTE3, MTE3_V, MTE2_S, S_MTE2, S_MTE3, MTE3_S };

using TEventID = int8_t;

}  // namespace AscendC

namespace shim {

constexpr int PIPES = 4;
constexpr int EVENT_IDS = 8;  // flags of an event on a core
using Clock = std::array<uint32_t, PIPES>;

inline const char* PipeName(int pipe)
{
    static const char* const names[PIPES] = {"S", "V", "MTE2", "MTE3"};
    return names[pipe];
}

inline std::pair<int, int> PipesOf(AscendC::HardEvent event)
{
    using E = AscendC::HardEvent;
    switch (event) {
        case E::V_S: return {PIPE_V, PIPE_S};
        case E::S_V: return {PIPE_S, PIPE_V};
        case E::V_MTE2: return {PIPE_V, PIPE_MTE2};
        case E::MTE2_V: return {PIPE_MTE2, PIPE_V};
        case E::V_MTE3: return {PIPE_V, PIPE_MTE3};
        case E::MTE3_V: return {PIPE_MTE3, PIPE_V};
        case E::MTE2_S: return {PIPE_MTE2, PIPE_S};
        case E::S_MTE2: return {PIPE_S, PIPE_MTE2};
        case E::S_MTE3: return {PIPE_S, PIPE_MTE3};
        case E::MTE3_S: return {PIPE_MTE3, PIPE_S};
    }
    Fail("an event that the shim does not know");
}

// What happened last to four bytes of UB.
struct Word {
    uint32_t written;  // number of the instruction, 0: none
    int32_t writer;    // its pipe
    Clock read;        // number of the last read by each pipe
};

class Pipes {
public:
    // Number of a new instruction.
    uint32_t Start(int pipe)
    {
        return ++now_[pipe];
    }

    // All that `pipe` was given and all that it has waited for.
    Clock Mark(int pipe) const
    {
        Clock mark = seen_[pipe];
        mark[pipe] = now_[pipe];
        return mark;
    }

    void Wait(int pipe, const Clock& mark)
    {
        for (int p = 0; p < PIPES; ++p) {
            seen_[pipe][p] = seen_[pipe][p] < mark[p] ? mark[p] : seen_[pipe][p];
        }
    }

    void Read(int pipe, uint32_t number, Word& word)
    {
        CheckWriter(pipe, number, word);
        word.read[pipe] = number;
    }

    void Write(int pipe, uint32_t number, Word& word)
    {
        CheckWriter(pipe, number, word);
        for (int p = 0; p < PIPES; ++p) {
            // In-order pipes read before they write later.
            if (p != pipe && word.read[p] > seen_[pipe][p]) {
                Fail("pipe %s overwrites what pipe %s may still read: a flag is missing", PipeName(pipe), PipeName(p));
            }
        }
        word.written = number;
        word.writer = pipe;
    }

    void SetFlag(AscendC::HardEvent event, AscendC::TEventID id)
    {
        if (id < 0 || id >= EVENT_IDS) {
            Fail("event id %d, there are %d", id, EVENT_IDS);
        }
        const auto key = std::make_pair(static_cast<int>(event), static_cast<int>(id));
        if (!flags_.emplace(key, Mark(PipesOf(event).first)).second) {
            Fail("a flag is set that is set already");
        }
    }

    void WaitFlag(AscendC::HardEvent event, AscendC::TEventID id)
    {
        const auto flag = flags_.find({static_cast<int>(event), static_cast<int>(id)});
        if (flag == flags_.end()) {
            Fail("a flag is awaited that was not set: the core would hang");
        }
        Wait(PipesOf(event).second, flag->second);
        flags_.erase(flag);
    }

    void CheckIdle() const
    {
        if (!flags_.empty()) {
            Fail("a kernel ends with a flag that nobody awaited");
        }
    }

private:
    // Copies and scalar accesses of one pipe are in order; vector instructions need a barrier between them.
    void CheckWriter(int pipe, uint32_t number, const Word& word) const
    {
        if (word.written == 0 || (word.writer == pipe && (pipe != PIPE_V || word.written == number))) {
            return;
        }
        if (word.written > seen_[pipe][word.writer]) {
            Fail("pipe %s uses what pipe %s may not have written yet: a flag or barrier is missing", PipeName(pipe),
                PipeName(word.writer));
        }
    }

    Clock now_{};           // instructions that each pipe was given
    Clock seen_[PIPES]{};   // [p][q]: the instruction of q up to which p has waited
    std::map<std::pair<int, int>, Clock> flags_;
};

}  // namespace shim

#endif
