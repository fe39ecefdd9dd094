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
constexpr uint64_t kClosed = 0xffffffffu;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as `ready` is; false once the bounded spin is over.
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

// A job is published by one word, ticket = generation << 32 | next chunk. Chunks are claimed by compare-and-swap on it,
// so a worker that wakes late can never claim a chunk of a job it has not read, and nobody waits for sleeping workers.
class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int k = 1; k < num_threads; ++k) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t num_chunks, ChunkFn fn, void* ctx) {
    const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | kClosed, std::memory_order_release);
    fn_.store(fn, std::memory_order_release);
    ctx_.store(ctx, std::memory_order_release);
    num_chunks_.store(num_chunks, std::memory_order_release);
    num_done_.store(0, std::memory_order_release);
    ticket_.store(generation << 32);
    if (num_asleep_.load() > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    claim_chunks();
    const auto all_done = [&] { return num_done_.load(std::memory_order_acquire) == num_chunks; };
    if (spin_until(all_done)) return;
    std::unique_lock lock(mutex_);
    caller_waits_.store(true);
    done_.wait(lock, [&] { return num_done_.load() == num_chunks; });
    caller_waits_.store(false);
  }

 private:
  void claim_chunks() {
    inside_chunk = true;
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t num_chunks = num_chunks_.load(std::memory_order_acquire);
      const ChunkFn fn = fn_.load(std::memory_order_acquire);
      void* ctx = ctx_.load(std::memory_order_acquire);
      const auto chunk = static_cast<int64_t>(ticket & 0xffffffffu);
      if (chunk >= num_chunks) break;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      fn(ctx, chunk);
      finish_chunk(num_chunks);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    inside_chunk = false;
  }

  void finish_chunk(int64_t num_chunks) {
    if (num_done_.fetch_add(1) + 1 != num_chunks || !caller_waits_.load()) return;
    std::lock_guard lock(mutex_);
    done_.notify_one();
  }

  bool has_work() const {
    // Sequentially consistent: a worker that counts itself asleep and sees no ticket is seen asleep by run().
    const uint64_t ticket = ticket_.load();
    return static_cast<int64_t>(ticket & 0xffffffffu) < num_chunks_.load();
  }

  void work() {
    const auto ready = [this] { return has_work() || stop_.load(std::memory_order_relaxed); };
    while (!stop_.load()) {
      if (!spin_until(ready)) {
        std::unique_lock lock(mutex_);
        num_asleep_.fetch_add(1);
        wake_.wait(lock, ready);
        num_asleep_.fetch_sub(1);
      }
      claim_chunks();
    }
  }

  std::atomic<uint64_t> ticket_{kClosed};
  std::atomic<ChunkFn> fn_{nullptr};
  std::atomic<void*> ctx_{nullptr};
  std::atomic<int64_t> num_chunks_{0};
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

// Never destroyed: workers may still be parked when the process runs its static destructors.
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
