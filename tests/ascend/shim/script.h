// What a test asks for, on standard input: device buffers, launches, and which buffers to print.
//
//   buffer NAME BYTES            followed by BYTES bytes of content
//   launch KERNEL BLOCKS ORDER ARGUMENT...    an argument is @NAME, @ (null), i7 or f0.5
//   dump NAME                    its bytes go to standard output
//   used                         UB bytes of a block of each launch so far, as uint64, go there
//
// A buffer starts at a multiple of 64 bytes and ends where its allocation ends, so that the address sanitizer sees
// what a check might miss.
#ifndef SHIM_SCRIPT_H
#define SHIM_SCRIPT_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core.h"
#include "launch.h"

namespace shim {

constexpr size_t DEVICE_ALIGNMENT = 64;

[[noreturn]] inline void WrongScript(const std::string& what)
{
    std::cerr << "wrong script: " << what << std::endl;
    std::exit(2);
}

// The arguments of a launch, in order.
class Arguments {
public:
    Arguments(std::istream& words, const std::map<std::string, uint8_t*>& buffers) : buffers_(buffers)
    {
        for (std::string word; words >> word;) {
            words_.push_back(word);
        }
    }

    uint8_t* Address()
    {
        const std::string name = Next('@');
        if (name.empty()) {
            return nullptr;
        }
        const auto found = buffers_.find(name);
        return found == buffers_.end() ? WrongScript("no buffer " + name), nullptr : found->second;
    }

    uint32_t Integer()
    {
        return static_cast<uint32_t>(std::stoul(Next('i')));
    }

    float Real()
    {
        return std::stof(Next('f'));
    }

    void CheckUsed() const
    {
        if (next_ != words_.size()) {
            WrongScript("more arguments than the kernel has");
        }
    }

private:
    std::string Next(char kind)
    {
        if (next_ == words_.size() || words_[next_][0] != kind) {
            WrongScript("argument " + std::to_string(next_) + " is missing or of another kind");
        }
        return words_[next_++].substr(1);
    }

    const std::map<std::string, uint8_t*>& buffers_;
    std::vector<std::string> words_;
    size_t next_ = 0;
};

// Gives a kernel's name and arguments what to run on every block.
using Kernels = std::map<std::string, std::function<std::function<void()>(Arguments&)>>;

inline void ReadBuffer(std::istream& words, std::map<std::string, uint8_t*>& buffers)
{
    std::string name;
    size_t bytes = 0;
    words >> name >> bytes;
    void* memory = nullptr;
    if (!words || posix_memalign(&memory, DEVICE_ALIGNMENT, bytes) != 0) {
        WrongScript("no memory for buffer " + name);
    }
    uint8_t* data = static_cast<uint8_t*>(memory);  // given back by the process's end
    if (!std::cin.read(reinterpret_cast<char*>(data), static_cast<std::streamsize>(bytes))) {
        WrongScript("buffer " + name + " is cut short");
    }
    buffers[name] = data;
    regions.push_back(Region{data, bytes, {}});
}

inline int RunScript(const Kernels& kernels)
{
    std::map<std::string, uint8_t*> buffers;
    std::vector<uint64_t> used;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string command, name;
        words >> command;
        if (command == "buffer") {
            ReadBuffer(words, buffers);
        } else if (command == "launch") {
            int blocks = 0;
            unsigned order = 0;
            words >> name >> blocks >> order;
            const auto kernel = kernels.find(name);
            if (kernel == kernels.end() || !words) {
                WrongScript("no kernel " + name);
            }
            Arguments arguments(words, buffers);
            const auto run = kernel->second(arguments);
            arguments.CheckUsed();
            Launch(blocks, order, run);
            used.push_back(core.used);
        } else if (command == "dump") {
            words >> name;
            const auto& region = FindRegion(buffers.at(name), 0);
            std::cout.write(reinterpret_cast<const char*>(region.data), static_cast<std::streamsize>(region.bytes));
        } else if (command == "used") {
            std::cout.write(reinterpret_cast<const char*>(used.data()), 8 * static_cast<std::streamsize>(used.size()));
        } else {
            WrongScript(command);
        }
    }
    return 0;
}

}  // namespace shim

#endif
