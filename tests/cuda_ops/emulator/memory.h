// What machine.cpp and torch_host.cpp tell memory.cpp, and the faults that all of them report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

constexpr size_t kMaxShared = 48 << 10;  // of a block on any device
extern const char* kernel_name;          // of the kernel that runs; null in the host's code
extern bool is_watching;                 // whether the kernel's own code runs: the emulator's may share templates with it
extern unsigned running;                 // thread of the block that runs
extern unsigned char fill;               // what new memory holds

// kind: sync, memory, init, race, launch, hang, value or assert. code: the address after the instruction, if any.
void report(const char* kind, const std::string& told, const void* code = nullptr);

void begin_call();  // of an operator: forgets the tensors of the one before
void add_tensor(const void* data, size_t bytes);
bool is_known(const void* data, size_t bytes);  // whether it lies within one tensor of the call
void set_written(
    const void* data, size_t bytes, bool is_written);  // of a tensor; if not, it is filled with the pattern

void begin_launch(size_t shared_bytes);
void begin_block();
void pass_barrier();
// Ends the fiber that runs, and with it its block or launch: after a fault that would harm this process.
void give_up(bool ends_launch = false);
bool is_of_fiber(uintptr_t at);

}  // namespace emulator
