// The one thread pool of the CPU kernels. Declarations only: kernel sources are compiled once per ISA.
#pragma once
#include <cstdint>

namespace fuseline {

using ChunkFn = void (*)(void* ctx, int64_t chunk);

// Runs fn(ctx, c) once for every c in [0, num_chunks) on the caller and the workers; returns when all are done.
// A call from inside a chunk, or while another thread owns the pool, runs on its caller alone.
// Cut work by output, never by reduction: nothing may depend on who runs a chunk.
void parallel_for(int64_t num_chunks, ChunkFn fn, void* ctx);

// Threads that a parallel_for uses, the caller among them. The default is the size of the process's affinity mask.
int num_threads();
void set_num_threads(int n);

// Memory of this thread, aligned to 64 bytes, kept until the thread ends. A larger request for the same use may move it,
// so take it once per use. The two uses let a caller hold shared memory while it also runs chunks.
enum class Scratch { kCaller = 0, kChunk = 1 };
void* scratch(Scratch use, int64_t num_bytes);

}  // namespace fuseline
