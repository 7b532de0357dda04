// Tasks that the threads of a parallel region share out among themselves.
//
// Each thread begins with neighbours, a share of its own, and takes them one after another: memory that lies together
// is read by one thread, in order, and what it asks for ahead of time is what it will need. Who has none left takes the
// later half of what the richest has, so that a core which somebody else uses too holds up nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace m3 {

class Tasks {
 public:
  // Fewer than 2^32 tasks, at least one thread.
  Tasks(int64_t count, int threads) : shares_(threads) {
    for (int64_t i = 0; i < threads; i++)
      shares_[i].range.store(pack(count * i / threads, count * (i + 1) / threads), std::memory_order_relaxed);
  }

  // Calls run(task) for every task that falls to this thread; on return none is left to begin. thread: its number.
  template <class Run>
  void draw(int thread, const Run& run) {
    std::atomic<uint64_t>& own = shares_[thread].range;
    do {
      uint64_t range = own.load(std::memory_order_relaxed);
      while (left(range)) {
        const uint64_t first = range >> 32;
        if (!own.compare_exchange_weak(range, pack(first + 1, range & kStop), std::memory_order_relaxed)) continue;
        run((int64_t)first);
        range = own.load(std::memory_order_relaxed);
      }
    } while (take_over(own));
  }

 private:
  static constexpr uint64_t kStop = 0xFFFFFFFF;
  struct alignas(128) Share {  // two cache lines: they are fetched in pairs
    std::atomic<uint64_t> range{0};
  };

  static uint64_t pack(uint64_t first, uint64_t stop) { return first << 32 | stop; }
  static uint64_t left(uint64_t range) { return (range & kStop) - (range >> 32); }

  // Half of the largest share; false where all are empty. A share that reads the same is the same: no task comes back.
  bool take_over(std::atomic<uint64_t>& own) {
    for (;;) {
      std::atomic<uint64_t>* richest = nullptr;
      uint64_t most = 0;
      for (Share& share : shares_) {
        const uint64_t range = share.range.load(std::memory_order_relaxed);
        if (left(range) > left(most)) most = range, richest = &share.range;
      }
      if (!richest) return false;
      const uint64_t stop = most & kStop, middle = stop - (left(most) + 1) / 2;
      if (!richest->compare_exchange_strong(most, pack(most >> 32, middle), std::memory_order_relaxed)) continue;
      own.store(pack(middle, stop), std::memory_order_relaxed);
      return true;
    }
  }

  std::vector<Share> shares_;
};

}  // namespace m3
