// How is work shared out over threads?
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// Call `worker` on up to n_threads threads, this one included, never more than there are turns; each worker draws turns
// until they are used up: worker(next), where next() returns the number of a turn, or -1. Threads are started per
// call: a call for one cell takes milliseconds, a thread 20 us, and no pool has to survive fork(). Fewer threads than
// wanted do all the work too. Throws std::bad_alloc when a worker threw it.
template <class Worker> void share_out(int64_t n_turns, int n_threads, Worker worker) {
    std::atomic<int64_t> drawn{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
        try {
            worker([&]() -> int64_t {
                const int64_t turn = drawn.fetch_add(1);
                return turn < n_turns ? turn : -1;
            });
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t i = 1; i < std::min<int64_t>(n_threads, n_turns); ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    if (failed) throw std::bad_alloc();
}
