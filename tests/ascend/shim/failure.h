// How a broken rule is reported: one line, and the process ends, so that no test can go on with a wrong result.
#ifndef SHIM_FAILURE_H
#define SHIM_FAILURE_H

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace shim {

constexpr int BROKEN_RULE = 3;  // exit code

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void Fail(const char* text, ...)
{
    std::va_list arguments;
    va_start(arguments, text);
    std::fputs("broken rule: ", stderr);
    std::vfprintf(stderr, text, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    std::_Exit(BROKEN_RULE);
}

}  // namespace shim

#endif
