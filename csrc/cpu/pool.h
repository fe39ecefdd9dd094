// The thread pool shared by all CPU kernels. Declarations only: kernel sources are compiled once per ISA.
#pragma once
#include <cstdint>

namespace fuseline {

using ChunkFn = void (*)(void* ctx, int64_t chunk);

// Runs fn(ctx, c) once for every c in [0, num_chunks) on the caller and the workers; returns when all are done.
// A nested call, or one made while another thread uses the pool, runs on its caller alone.
// Split work by output, never by reduction: no result may depend on which thread runs a chunk.
void parallel_for(int64_t num_chunks, ChunkFn fn, void* ctx);

// Number of threads of a parallel_for, the caller included. Default: the size of the process's affinity mask.
int num_threads();
void set_num_threads(int n);

// Thread-local memory, 64-byte aligned, kept until the thread ends. A larger request for the same use may move it, so
// request it once per use. kCaller holds memory shared by chunks, kChunk that of one chunk.
enum class Scratch { kCaller = 0, kChunk = 1 };
void* scratch(Scratch use, int64_t num_bytes);

}  // namespace fuseline
