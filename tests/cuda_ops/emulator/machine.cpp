// Runs kernels, in an order of blocks and threads that the caller chooses. The threads of a block are fibers; one runs
// until it meets a barrier or a primitive of its warp, then the next. Faults:
//   sync    barriers that not all threads reach, or reach at different places; primitives of a warp with absent lanes
//   launch  sizes that CUDA refuses, more threads than __launch_bounds__, and more blocks than can be run here
//   hang    a block that goes on and on without touching memory, which memory.cpp would see; the launch ends with it
//   value, assert  an integer divided by 0; an assertion that does not hold
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <ucontext.h>

#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "memory.h"

namespace emulator {

Now now;

namespace {

constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr uint64_t kMostBlocks = 1 << 24;  // of a launch
constexpr size_t kStackBytes = 128 << 10;
constexpr int kTickMs = 250, kMostTicks = 8;  // of a block: two seconds of processor time

enum class Order { kForward, kReverse, kRandom };
enum class State { kReady, kAtBarrier, kAtWarp, kDone, kGivenUp };

struct Fiber {
  ucontext_t context;
  jmp_buf place_to_go_on;
  bool has_stack = false;
  State state;
  Place place;
  const char* what;
  unsigned mask;
  uint64_t value, seen[kWarp];  // given to a primitive, and got from the lanes of the warp
};

struct {
  Order order = Order::kForward;
  std::mt19937_64 random;
  unsigned max_grid = 0;
} schedule;

Fiber fibers[kMaxThreads];
unsigned char* stacks = nullptr;
jmp_buf scheduler;
void (*kernel_body)(const void*);
const void* kernel_arguments;
bool reads_grid;
bool is_over;        // whether the rest of the launch is given up
unsigned num_votes;  // at the last barrier
volatile int ticks;  // of the block that runs
cudaError_t last_error = cudaSuccess;
std::map<std::string, int64_t> launches;

std::string line_of(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool is_same(const Place& a, const Place& b) {
  return a.line() == b.line() && !strcmp(a.file_name(), b.file_name());
}

std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (schedule.order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
  if (schedule.order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), schedule.random);
  return numbers;
}

// A fiber that is done takes up the next block where it stands, so each is made once.
void live() {
  for (;;) {
    kernel_body(kernel_arguments);
    Fiber& me = fibers[running];
    me.state = State::kDone;
    if (_setjmp(me.place_to_go_on) == 0) _longjmp(scheduler, 1);
  }
}

void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) {
    is_watching = false;
    return;
  }
  is_watching = true;
  if (fiber.has_stack) _longjmp(fiber.place_to_go_on, 1);
  fiber.has_stack = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + (&fiber - fibers) * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

Fiber& wait(State state, const char* what, unsigned mask, const Place& place) {
  Fiber& me = fibers[running];
  me.state = state, me.what = what, me.mask = mask, me.place = place;
  if (_setjmp(me.place_to_go_on) == 0) _longjmp(scheduler, 1);
  return fibers[running];
}

enum class Met { kAll, kNone, kInVain };

bool has_met(const Fiber& one, const Fiber& other) {
  return other.state == State::kAtWarp && other.mask == one.mask && is_same(other.place, one.place);
}

// Lets the lanes go on that have met in a primitive of their warp.
Met release_warps(unsigned threads) {
  Met met = Met::kNone;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber one = fibers[i];
    if (one.state != State::kAtWarp) continue;
    const unsigned first = i / kWarp * kWarp;
    const std::string told = std::string(one.what) + " at " + line_of(one.place);
    if (!(one.mask >> i % kWarp & 1)) return report("sync", told + " by a lane that its mask leaves out"), Met::kInVain;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const bool is_absent = first + lane >= threads || fibers[first + lane].state == State::kDone;
      if (!(one.mask >> lane & 1) || (!is_absent && has_met(one, fibers[first + lane]))) continue;
      const std::string where = is_absent ? "has returned" : "is at " + line_of(fibers[first + lane].place);
      return report("sync", told + " without a lane of its mask, which " + where), Met::kInVain;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(one.mask >> lane & 1)) continue;
      Fiber& fiber = fibers[first + lane];
      for (unsigned from = 0; from < kWarp; ++from)
        fiber.seen[from] = one.mask >> from & 1 ? fibers[first + from].value : 0;
      fiber.state = State::kReady;
    }
    met = Met::kAll;
  }
  return met;
}

Met release_block(unsigned threads) {
  const Fiber* end = fibers + threads;
  const Fiber* one =
      std::find_if(fibers, fibers + threads, [](const Fiber& it) { return it.state == State::kAtBarrier; });
  if (one == end) return Met::kNone;
  num_votes = 0;
  for (const Fiber* it = fibers; it != end; ++it) {
    if (it->state != State::kAtBarrier || !is_same(it->place, one->place)) {
      const std::string where = it->state == State::kDone ? "has returned" : "is at " + line_of(it->place);
      return report("sync", "__syncthreads() at " + line_of(one->place) + " while another thread " + where),
             Met::kInVain;
    }
    num_votes += it->value != 0;
  }
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  pass_barrier();
  return Met::kAll;
}

void run_block(dim3 block, dim3 size) {
  const unsigned threads = size.x * size.y * size.z;
  now.block = block;
  ticks = 0;
  begin_block();
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  for (Met met = Met::kAll; met == Met::kAll;) {
    for (const unsigned i : ordered(threads)) {
      if (fibers[i].state != State::kReady) continue;
      running = i;
      now.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      go_on(fibers[i]);
      if (fibers[i].state == State::kGivenUp) met = Met::kInVain;
      if (is_over) break;
    }
    if (met == Met::kInVain) break;
    met = release_warps(threads);
    if (met == Met::kNone) met = release_block(threads);
  }
  for (unsigned i = 0; i < threads; ++i) {  // of a block that was given up, fibers stand somewhere within the kernel
    if (fibers[i].state != State::kDone) fibers[i].has_stack = false;
  }
}

// Ends a block that runs too long, from within the fiber that the signal has met.
void tick(int) {
  if (++ticks < kMostTicks || !is_watching) return;  // not in the midst of the emulator's own work
  report("hang", "a block that goes on and on");
  give_up(true);
}

void divided(int, siginfo_t* info, void*) {
  if (is_watching) {
    report("value", "integer division by 0, or of the least by -1", static_cast<char*>(info->si_addr) + 1);
    give_up();
  }
  signal(SIGFPE, SIG_DFL);  // not of a kernel: the instruction comes again, and ends the process
}

// Lets this thread tick and report divisions by 0; in its own processor time, so that a busy machine makes no hang.
class Clock {
 public:
  Clock() {
    struct sigaction action {};
    action.sa_handler = tick;
    action.sa_flags = SA_NODEFER | SA_RESTART;  // the handler may not return: its block is given up
    sigaction(SIGRTMAX, &action, &before_);
    action.sa_sigaction = divided, action.sa_flags = SA_NODEFER | SA_SIGINFO;
    sigaction(SIGFPE, &action, &before_division_);
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID, event.sigev_signo = SIGRTMAX, event._sigev_un._tid = gettid();
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
    const timespec tick_s{0, kTickMs * 1000000L};
    const itimerspec spec{tick_s, tick_s};
    timer_settime(timer_, 0, &spec, nullptr);
  }
  ~Clock() {
    timer_delete(timer_);
    sigaction(SIGRTMAX, &before_, nullptr);
    sigaction(SIGFPE, &before_division_, nullptr);
  }

 private:
  timer_t timer_;
  struct sigaction before_ {}, before_division_{};
};

// Blocks are numbered x first. Those that stride are given max_grid blocks at most, on the axis x.
void run_grid(dim3 grid, dim3 size) {
  const auto run_blocks = [&](unsigned first, unsigned end, unsigned width) {
    for (const unsigned i : ordered(end - first)) {
      if (is_over) return;
      const unsigned block = first + i;
      run_block({block % width, block / width % grid.y, block / width / grid.y}, size);
    }
  };
  const unsigned all = grid.x * grid.y * grid.z;
  const bool is_line = grid.y * grid.z == 1;
  const unsigned few = is_line && schedule.max_grid ? std::min(grid.x, schedule.max_grid) : grid.x;
  now.grid = {{few}, {grid.y}, {grid.z}};
  reads_grid = false;
  run_blocks(0, is_line ? few : all, grid.x);
  if (reads_grid || few == grid.x) return;
  now.grid.x.value = grid.x;
  run_blocks(few, grid.x, grid.x);
}

bool is_refused(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  return blocks == 0 || blocks > kMostBlocks || grid.y > 65535 || grid.z > 65535 ||
         threads == 0 || threads > kMaxThreads || block.z > 64 || shared_bytes > kMaxShared;
}

}  // namespace

GridAxis::operator unsigned() const {
  reads_grid = true;
  return value;
}

bool is_of_fiber(uintptr_t at) {
  return at - uintptr_t(stacks) < kMaxThreads * kStackBytes;
}

void give_up(bool ends_launch) {
  is_over = ends_launch;
  wait(State::kGivenUp, "", 0, Place::current());
}

void at_most(unsigned threads, unsigned, unsigned) {
  if (now.block_size.x * now.block_size.y * now.block_size.z <= threads) return;
  last_error = cudaErrorInvalidConfiguration;
  report("launch", "refused: more threads than __launch_bounds__(" + std::to_string(threads) + ")");
  give_up(true);
}

unsigned synchronize(bool vote, Place place) {
  fibers[running].value = vote;
  wait(State::kAtBarrier, "__syncthreads", 0, place);
  return num_votes;
}

uint64_t shuffle(unsigned mask, uint64_t bits, unsigned from, const char* what, Place place) {
  if (from >= kWarp) {
    report("sync", std::string(what) + " at " + line_of(place) + " by 32 lanes or more");
    from = running % kWarp;
  } else if (!(mask >> from & 1))
    report("sync", std::string(what) + " from a lane that its mask leaves out, at " + line_of(place));
  fibers[running].value = bits;
  return wait(State::kAtWarp, what, mask, place).seen[from];
}

unsigned ballot(unsigned mask, bool vote, const char* what, Place place) {
  fibers[running].value = vote;
  const uint64_t* seen = wait(State::kAtWarp, what, mask, place).seen;
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) votes |= unsigned(seen[lane] != 0) << lane;
  return votes;
}

void run(
    const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* arguments) {
  if (stacks == nullptr) {
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, how, -1, 0));
  }
  ++launches[name];
  kernel_name = name, kernel_body = body, kernel_arguments = arguments;
  if (is_refused(grid, block, shared_bytes)) {
    last_error = cudaErrorInvalidConfiguration;
    const auto text = [](dim3 it) {
      return std::to_string(it.x) + "×" + std::to_string(it.y) + "×" + std::to_string(it.z);
    };
    report(
        "launch", "refused: " + text(grid) + " blocks of " + text(block) + " threads, " + std::to_string(shared_bytes) +
                      " bytes");
  } else {
    now.block_size = block;
    is_over = false;
    begin_launch(shared_bytes);
    const Clock clock;
    run_grid(grid, block);
  }
  kernel_name = nullptr;
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  return std::exchange(emulator::last_error, cudaSuccess);
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  if (!emulator::is_known(data, bytes)) {
    emulator::report("memory", "cudaMemsetAsync outside the tensors of the call");
    return cudaErrorInvalidValue;
  }
  emulator::set_written(data, bytes, true);
  memset(data, value, bytes);
  return cudaSuccess;
}

extern "C" {

void __real___assert_fail(const char*, const char*, unsigned, const char*);
void __wrap___assert_fail(const char* claim, const char* file, unsigned line, const char* function) {
  if (!emulator::is_watching) __real___assert_fail(claim, file, line, function);
  emulator::report("assert", std::string(claim) + " does not hold", __builtin_return_address(0));
  emulator::give_up(true);
}

// order: 0 forward, 1 reverse, 2 random. max_grid: blocks of kernels that stride, 0 for all. fill: what new memory
// holds.
__attribute__((visibility("default"))) void emulator_schedule(int order, uint64_t seed, unsigned max_grid, int fill) {
  emulator::schedule = {static_cast<emulator::Order>(order), std::mt19937_64(seed), max_grid};
  emulator::fill = static_cast<unsigned char>(fill);
}

// Launches of each kernel since the last call: lines of a number and a name.
__attribute__((visibility("default"))) const char* emulator_launches() {
  static std::string told;
  told.clear();
  for (const auto& [name, count] : emulator::launches) told += std::to_string(count) + " " + name + "\n";
  emulator::launches.clear();
  return told.c_str();
}
}
