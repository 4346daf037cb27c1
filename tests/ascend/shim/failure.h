// How a broken rule is reported: one line, and the process ends, so that no test can go on with a wrong result. In a
// library, which defines SHIM_THROWS, an exception says it to the caller.
#ifndef SHIM_FAILURE_H
#define SHIM_FAILURE_H

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace shim {

constexpr int BROKEN_RULE = 3;  // exit code

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void Fail(const char* text, ...)
{
    char line[512];
    std::va_list arguments;
    va_start(arguments, text);
    std::vsnprintf(line, sizeof(line), text, arguments);
    va_end(arguments);
#ifdef SHIM_THROWS
    throw std::runtime_error(line);
#else
    std::fprintf(stderr, "broken rule: %s\n", line);
    std::_Exit(BROKEN_RULE);
#endif
}

}  // namespace shim

#endif
