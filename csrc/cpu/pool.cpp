#include "cpu/pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fuseline {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int64_t kMaxUnits = 0xffff;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for a bounded time; returns whether `ready` became true.
template <class F>
bool spin_until(const F& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int k = 0; k < 64; ++k) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

thread_local bool inside_chunk = false;

// Units [begin, end) of one thread, in one word with the job's generation: generation << 32 | begin << 16 | end.
struct alignas(64) Range {
  std::atomic<uint64_t> word{0};
};

uint64_t range_word(uint64_t generation, int64_t begin, int64_t end) {
  return generation << 32 | static_cast<uint64_t>(begin) << 16 | static_cast<uint64_t>(end);
}

// Work-stealing pool. A job is split into units, and each thread owns a contiguous range of them, for locality. A
// thread takes its own units from the front, then steals others' from the back. A unit is claimed by compare-and-swap
// on a word that carries the job's generation, so a worker that wakes late cannot claim a unit of a job whose state it
// has not read, and no one waits for sleeping workers.
class Pool {
 public:
  explicit Pool(int num_threads) : ranges_(static_cast<size_t>(num_threads)) {
    for (int k = 1; k < num_threads; ++k) workers_.emplace_back([this, k] { work(k); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(int64_t num_chunks, ChunkFn fn, void* ctx) {
    const uint64_t generation = (generation_.load(std::memory_order_relaxed) + 1) & 0xffffffffu;
    for (auto& range : ranges_) range.word.store(range_word(generation, 0, 0), std::memory_order_release);
    const int64_t unit = (num_chunks + kMaxUnits - 1) / kMaxUnits, num_units = (num_chunks + unit - 1) / unit;
    fn_.store(fn, std::memory_order_release);
    ctx_.store(ctx, std::memory_order_release);
    unit_.store(unit, std::memory_order_release);
    num_chunks_.store(num_chunks, std::memory_order_release);
    num_done_.store(0, std::memory_order_release);
    const auto num_threads = static_cast<int64_t>(ranges_.size());
    for (int64_t k = 0; k < num_threads; ++k)
      ranges_[k].word.store(range_word(generation, num_units * k / num_threads, num_units * (k + 1) / num_threads));
    generation_.store(generation);
    if (num_asleep_.load() > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    claim_units(0);
    const auto all_done = [&] { return num_done_.load(std::memory_order_acquire) == num_chunks; };
    if (spin_until(all_done)) return;
    std::unique_lock lock(mutex_);
    caller_waits_.store(true);
    done_.wait(lock, [&] { return num_done_.load() == num_chunks; });
    caller_waits_.store(false);
  }

 private:
  void claim_units(size_t own) {
    inside_chunk = true;
    while (claim_unit(ranges_[own], true)) {
    }
    for (size_t k = 1; k < ranges_.size(); ++k)
      while (claim_unit(ranges_[(own + k) % ranges_.size()], false)) {
      }
    inside_chunk = false;
  }

  // Returns false if the range is empty.
  bool claim_unit(Range& range, bool from_front) {
    uint64_t word = range.word.load(std::memory_order_acquire);
    for (;;) {
      const ChunkFn fn = fn_.load(std::memory_order_acquire);
      void* ctx = ctx_.load(std::memory_order_acquire);
      const int64_t unit = unit_.load(std::memory_order_acquire);
      const int64_t num_chunks = num_chunks_.load(std::memory_order_acquire);
      const auto begin = static_cast<int64_t>(word >> 16 & 0xffff), end = static_cast<int64_t>(word & 0xffff);
      if (begin >= end) return false;
      const uint64_t left = range_word(word >> 32, begin + (from_front ? 1 : 0), end - (from_front ? 0 : 1));
      if (!range.word.compare_exchange_weak(word, left, std::memory_order_acq_rel)) continue;
      const int64_t first = (from_front ? begin : end - 1) * unit;
      const int64_t last = first + unit < num_chunks ? first + unit : num_chunks;
      for (int64_t chunk = first; chunk < last; ++chunk) fn(ctx, chunk);
      finish_chunks(last - first, num_chunks);
      return true;
    }
  }

  void finish_chunks(int64_t count, int64_t num_chunks) {
    if (num_done_.fetch_add(count) + count != num_chunks || !caller_waits_.load()) return;
    std::lock_guard lock(mutex_);
    done_.notify_one();
  }

  void work(int own) {
    uint64_t seen = 0;
    // Sequentially consistent: run() sees as asleep any worker that has counted itself asleep and sees no new job.
    const auto ready = [&] { return generation_.load() != seen || stop_.load(std::memory_order_relaxed); };
    while (!stop_.load()) {
      if (!spin_until(ready)) {
        std::unique_lock lock(mutex_);
        num_asleep_.fetch_add(1);
        wake_.wait(lock, ready);
        num_asleep_.fetch_sub(1);
      }
      seen = generation_.load();
      claim_units(static_cast<size_t>(own));
    }
  }

  std::vector<Range> ranges_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<ChunkFn> fn_{nullptr};
  std::atomic<void*> ctx_{nullptr};
  std::atomic<int64_t> unit_{1}, num_chunks_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> caller_waits_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
};

int default_num_threads() {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) return CPU_COUNT(&mask);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

// Never destroyed: workers may still be asleep when the process runs its static destructors.
struct Owner {
  std::mutex mutex;
  std::unique_ptr<Pool> pool;
  std::atomic<int> num_threads{default_num_threads()};
};

Owner& owner() {
  static Owner* instance = new Owner;
  return *instance;
}

void run_inline(int64_t num_chunks, ChunkFn fn, void* ctx) {
  const bool outer = inside_chunk;
  inside_chunk = true;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) fn(ctx, chunk);
  inside_chunk = outer;
}

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  std::unique_ptr<void, FreeAligned> memory;
  int64_t size = 0;
};

}  // namespace

void parallel_for(int64_t num_chunks, ChunkFn fn, void* ctx) {
  Owner& own = owner();
  if (num_chunks <= 1 || inside_chunk || own.num_threads.load(std::memory_order_relaxed) == 1)
    return run_inline(num_chunks, fn, ctx);
  std::unique_lock lock(own.mutex, std::try_to_lock);
  if (!lock) return run_inline(num_chunks, fn, ctx);
  if (!own.pool) own.pool = std::make_unique<Pool>(own.num_threads.load());
  own.pool->run(num_chunks, fn, ctx);
}

int num_threads() { return owner().num_threads.load(); }

void set_num_threads(int n) {
  Owner& own = owner();
  std::lock_guard lock(own.mutex);
  own.num_threads.store(n < 1 ? 1 : n);
  own.pool.reset();
}

void* scratch(Scratch use, int64_t num_bytes) {
  thread_local Block blocks[2];
  Block& block = blocks[static_cast<int>(use)];
  if (num_bytes > block.size) {
    const int64_t size = (num_bytes + num_bytes / 2 + 63) / 64 * 64;
    block.memory.reset(std::aligned_alloc(64, static_cast<size_t>(size)));
    block.size = block.memory ? size : 0;
    if (!block.memory) throw std::bad_alloc();
  }
  return block.memory.get();
}

}  // namespace fuseline
