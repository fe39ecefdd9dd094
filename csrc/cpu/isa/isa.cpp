#include "cpu/isa/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fuseline {

#define FL_DECLARE(isa) \
  namespace isa { extern const OpFn kTable[]; }
FL_DECLARE(baseline)
#if defined(__x86_64__)
FL_DECLARE(avx2)
FL_DECLARE(avx512)
FL_DECLARE(avx512bf16)
#endif
#undef FL_DECLARE

#define FL_DECLARE(isa) \
  namespace isa { \
  void linear_codes_int8(const Tensor* t, const int64_t* i, const double* f); \
  void linear_codes_integers(const Tensor* t, const int64_t* i, const double* f); \
  void experts_codes_integers(const Tensor* t, const int64_t* i, const double* f); \
  }
#if defined(__x86_64__)
FL_DECLARE(avxvnni)
FL_DECLARE(avx512vnni)
FL_DECLARE(avx512bf16)
FL_DECLARE(amx)
namespace amx { void linear_tiles(const Tensor* t, const int64_t* i, const double* f); }
#endif
#undef FL_DECLARE

namespace {

struct Isa {
  const char* name;
  std::vector<OpFn> table;
  bool is_supported;
};

std::vector<OpFn> table_of(const OpFn* kernels) { return {kernels, kernels + kNumOps}; }

// Of an instruction set with fast products of integers.
std::vector<OpFn> table_of(const OpFn* kernels, OpFn linear_codes, OpFn experts_codes, OpFn linear_codes_int8) {
  std::vector<OpFn> table = table_of(kernels);
  table[kOp_experts_codes] = experts_codes;
  table[kOp_linear_codes] = linear_codes;
  table[kOp_linear_codes_int8] = linear_codes_int8;
  return table;
}

#if defined(__x86_64__)
// Linux gives a process the registers of AMX when it asks for them.
bool has_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found = {{"baseline", table_of(baseline::kTable), true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
    found.push_back({"avx2", table_of(avx2::kTable), has_avx2});
#define FL_TABLE(isa, base) \
  table_of(base::kTable, isa::linear_codes_integers, isa::experts_codes_integers, isa::linear_codes_int8)
    found.push_back({"avxvnni", FL_TABLE(avxvnni, avx2), has_avx2 && __builtin_cpu_supports("avxvnni")});
    found.push_back({"avx512", table_of(avx512::kTable), has_avx512});
    found.push_back({"avx512vnni", FL_TABLE(avx512vnni, avx512), has_vnni});
    found.push_back({"avx512bf16", FL_TABLE(avx512bf16, avx512bf16), has_bf16});
    found.push_back({"amx", FL_TABLE(amx, avx512bf16), has_bf16 && has_tiles()});
    found.back().table[kOp_linear] = amx::linear_tiles;
#undef FL_TABLE
#endif
    return found;
  }();
  return all;
}

// Process-wide, since there is one machine; written at import and by tests only.
std::atomic<const Isa*> current{nullptr};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const OpFn* op_table() { return current.load(std::memory_order_relaxed)->table.data(); }

std::string cpu_isa() { return current.load()->name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.is_supported) names.emplace_back(isa.name);
  return names;
}

void set_cpu_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name != isa.name) continue;
    if (!isa.is_supported)
      throw std::runtime_error("this machine cannot run " + name + " kernels; it can run: " + join(available_isas()));
    current.store(&isa);
    return;
  }
  throw std::runtime_error("unknown instruction set '" + name + "'; this machine can run: " + join(available_isas()));
}

void choose_cpu_isa() {
  const char* forced = std::getenv("FUSELINE_CPU_ISA");
  if (!forced || !*forced) return set_cpu_isa(available_isas().back());
  try {
    set_cpu_isa(forced);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("FUSELINE_CPU_ISA: ") + error.what());
  }
}

}  // namespace fuseline
