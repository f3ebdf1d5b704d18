// Every access of a kernel, looked at: kernels are compiled with -fsanitize=thread,alignment, whose callbacks are
// defined here instead of libtsan's. For each byte of the tensors of a call and of shared memory it is known who read
// and wrote it last. Faults:
//   memory  accesses outside the tensors of the call and the shared variables, or at a misaligned address
//   init    reads of what nothing has written
//   race    accesses to one byte, one of them a write, that no barrier orders, in a block or between blocks; not two atomics
//   hang    a block that goes on and on
// Primitives of a warp order no memory, as in CUDA.
#include "memory.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace emulator {

constexpr size_t kArena = 4 * kMaxShared;   // shared variables stand in it with gaps between them
constexpr int64_t kMostAccesses = 1 << 24;  // of a block: half a second

const char* kernel_name = nullptr;
bool is_watching = false;
unsigned running = 0;
unsigned char fill = 0xff;
alignas(16) unsigned char shared_memory[kArena];

namespace {

// Times are numbers of intervals; an interval is the time of one block between two barriers.
struct Cell {
  uint32_t written = 0, read = 0;
  uint16_t writer = 0, reader = 0;
  bool by_atomic = false, by_many = false, by_blocks = false, is_empty = false;
};

struct Unwatched {
  const bool before = std::exchange(is_watching, false);
  ~Unwatched() {
    is_watching = before;
  }
};

struct Region {
  uintptr_t begin, end;
  std::vector<Cell> cells;

  bool holds(uintptr_t at, size_t bytes) const {
    return at >= begin && at + bytes <= end;
  }
};

struct SharedVariable {
  const void* declaration;
  size_t begin, end;  // in shared_memory
};

std::map<std::string, int64_t> faults;
std::list<Region> tensors;
Region* recent = nullptr;
std::vector<Cell> shared_cells(kArena);
std::vector<SharedVariable> shared_variables;  // the first is what the launch asks for
uint32_t interval = 1, launch_start, block_start;
int64_t num_accesses;
pthread_t caller;

Region* region_of(uintptr_t at, size_t bytes) {
  if (recent != nullptr && recent->holds(at, bytes)) return recent;
  for (auto& tensor : tensors) {
    if (tensor.holds(at, bytes)) return recent = &tensor;
  }
  return nullptr;
}

bool is_of_host_stack(uintptr_t at) {  // arguments of kernels
  static thread_local uintptr_t begin = 0, end = 0;
  if (end == 0) {
    pthread_attr_t attributes;
    void* lowest;
    size_t bytes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &bytes);
    pthread_attr_destroy(&attributes);
    begin = uintptr_t(lowest), end = begin + bytes;
  }
  return at >= begin && at < end;
}

// Whether an access at a time, by a thread, is unordered with one now.
bool is_unordered(uint32_t when, uint16_t who, bool by_many, bool is_shared) {
  if (when < launch_start) return false;
  return when < block_start ? !is_shared : when == interval && (by_many || who != running);
}

void look_at_byte(Cell& cell, bool is_write, bool is_atomic, bool is_shared, const void* code) {
  const auto tell = [&](const char* kind, const char* what, uint32_t when) {
    report(
        kind,
        std::string(what) + (is_shared            ? " in shared memory"
                             : when < block_start ? " between blocks"
                                                  : ""),
        code);
  };
  const bool reads = !is_write || is_atomic;
  if (reads && (is_shared ? cell.written < block_start : cell.is_empty))
    tell("init", "read of what nothing wrote", interval);
  if (is_unordered(cell.written, cell.writer, false, is_shared) && !(is_atomic && cell.by_atomic)) {
    tell("race", is_write ? "write after write" : "read after write", cell.written);
  }
  const bool is_read = cell.read >= launch_start;
  if (!is_write) {
    cell.by_blocks = is_read && (cell.by_blocks || cell.read < block_start);
    cell.by_many = cell.read == interval && (cell.by_many || cell.reader != running);
    cell.read = interval, cell.reader = running;
    return;
  }
  const bool was_read_elsewhere = is_read && cell.by_blocks && !is_shared;
  if (was_read_elsewhere || is_unordered(cell.read, cell.reader, cell.by_many, is_shared)) {
    tell("race", "write after read", was_read_elsewhere ? 0 : cell.read);
  }
  cell.written = interval, cell.writer = running, cell.by_atomic = is_atomic, cell.is_empty = false;
}

}  // namespace

void report(const char* kind, const std::string& told, const void* code) {
  const Unwatched here;
  std::string at;
  Dl_info info{};
  if (code != nullptr && dladdr(code, &info)) {
    at = " @" + std::to_string(uintptr_t(code) - uintptr_t(info.dli_fbase) - 1);  // for addr2line
  }
  ++faults[std::string(kind) + ": " + (kernel_name ? kernel_name : "host") + ": " + told + at];
}

void access(const void* address, size_t bytes, bool is_write, bool is_atomic, const void* code) {
  const auto at = uintptr_t(address);
  if (kernel_name == nullptr) {
    Region* region = is_write && pthread_equal(caller, pthread_self()) ? region_of(at, bytes) : nullptr;
    for (size_t i = 0; region != nullptr && i < bytes; ++i) region->cells[at - region->begin + i].is_empty = false;
    return;
  }
  if (!is_watching || is_of_fiber(at) || at - uintptr_t(&now) < sizeof now || is_of_host_stack(at)) return;
  const Unwatched here;
  if (++num_accesses == kMostAccesses) {
    report("hang", "a block that goes on and on", code);
    give_up(true);
  }
  const size_t place = at - uintptr_t(shared_memory);
  Cell* cells = nullptr;
  if (place < kArena) {
    const auto holds = [&](const SharedVariable& it) { return place >= it.begin && place + bytes <= it.end; };
    if (std::any_of(shared_variables.begin(), shared_variables.end(), holds)) cells = shared_cells.data() + place;
  } else if (Region* region = region_of(at, bytes)) {
    cells = region->cells.data() + (at - region->begin);
  } else if (!is_write && at >= uintptr_t(&__ehdr_start) && at < uintptr_t(&_end)) {
    return;  // a constant of this library
  }
  if (cells == nullptr) {
    const std::string where = place < kArena ? "shared variables" : "tensors of the call";
    report("memory", (is_write ? "write outside the " : "read outside the ") + where, code);
    give_up();
  }
  for (size_t i = 0; i < bytes; ++i) look_at_byte(cells[i], is_write, is_atomic, place < kArena, code);
}

void begin_call() {
  caller = pthread_self();
  tensors.clear();
  recent = nullptr;
}

void add_tensor(const void* data, size_t bytes) {
  Region added{uintptr_t(data), uintptr_t(data) + bytes, {}};
  if (bytes == 0 || region_of(added.begin, bytes) != nullptr) return;
  const uintptr_t begin = added.begin, end = added.end;
  std::vector<Region*> overlapping;
  for (auto& tensor : tensors) {
    if (tensor.begin >= end || tensor.end <= begin) continue;
    overlapping.push_back(&tensor);
    added.begin = std::min(added.begin, tensor.begin), added.end = std::max(added.end, tensor.end);
  }
  added.cells.resize(added.end - added.begin);
  for (const Region* part : overlapping) {
    std::copy(part->cells.begin(), part->cells.end(), added.cells.begin() + (part->begin - added.begin));
  }
  tensors.remove_if([&](const Region& it) { return std::count(overlapping.begin(), overlapping.end(), &it) > 0; });
  tensors.push_front(std::move(added));
  recent = nullptr;
}

bool is_known(const void* data, size_t bytes) {
  return bytes == 0 || region_of(uintptr_t(data), bytes) != nullptr;
}

void set_written(const void* data, size_t bytes, bool is_written) {
  if (bytes == 0) return;
  add_tensor(data, bytes);
  Region* region = region_of(uintptr_t(data), bytes);
  Cell* cells = region->cells.data() + (uintptr_t(data) - region->begin);
  for (size_t i = 0; i < bytes; ++i) cells[i].is_empty = !is_written;
  if (!is_written) memset(const_cast<void*>(data), fill, bytes);
}

void begin_launch(size_t shared_bytes) {
  shared_variables = {{nullptr, 0, shared_bytes}};
  launch_start = interval + 1;
}

void begin_block() {
  block_start = ++interval;
  num_accesses = 0;
  for (const auto& it : shared_variables) std::fill(shared_memory + it.begin, shared_memory + it.end, fill);
}

void pass_barrier() {
  ++interval;
}

void* shared_variable(const void* declaration, size_t bytes) {
  const Unwatched here;
  for (const auto& it : shared_variables) {
    if (it.declaration == declaration) return shared_memory + it.begin;
  }
  const size_t begin = (shared_variables.back().end + 47) / 16 * 16;
  size_t sum = bytes;
  for (const auto& it : shared_variables) sum += it.end - it.begin;
  if (sum > kMaxShared) report("launch", "refused: " + std::to_string(sum) + " bytes of shared memory");
  if (begin + bytes > kArena) give_up();
  shared_variables.push_back({declaration, begin, begin + bytes});
  std::fill(shared_memory + begin, shared_memory + begin + bytes, fill);
  return shared_memory + begin;
}

}  // namespace emulator

extern "C" {

// Faults since the last call: lines of a number and a text, which may end in @address.
__attribute__((visibility("default"))) const char* emulator_faults() {
  static std::string told;
  told.clear();
  for (const auto& [text, count] : emulator::faults) told += std::to_string(count) + " " + text + "\n";
  emulator::faults.clear();
  return told.c_str();
}

#define CALLBACK(name, bytes, is_write)                                        \
  void name(void* at) {                                                        \
    emulator::access(at, bytes, is_write, false, __builtin_return_address(0)); \
  }
#define CALLBACKS(bytes) CALLBACK(__tsan_read##bytes, bytes, false) CALLBACK(__tsan_write##bytes, bytes, true)
#define UNALIGNED(bytes) \
  CALLBACK(__tsan_unaligned_read##bytes, bytes, false) CALLBACK(__tsan_unaligned_write##bytes, bytes, true)
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_read_range(void* at, size_t bytes) {
  emulator::access(at, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  emulator::access(at, bytes, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
// Of -fsanitize=alignment: a pointer that is no multiple of its type's alignment, which a GPU does not load from.
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t at) {
  if (emulator::kernel_name != nullptr && at != 0) {
    emulator::report("memory", "misaligned address", __builtin_return_address(0));
    emulator::give_up();
  }
}
#define ATOMICS(bits, T)                                            \
  T __tsan_atomic##bits##_load(const volatile T* at, int) {         \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                   \
  }                                                                 \
  void __tsan_atomic##bits##_store(volatile T* at, T value, int) {  \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                  \
  }                                                                 \
  T __tsan_atomic##bits##_fetch_add(volatile T* at, T value, int) { \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);         \
  }
ATOMICS(8, int8_t)
ATOMICS(32, int32_t)
ATOMICS(64, int64_t)  // of the host: counts of shared pointers, statics
}
