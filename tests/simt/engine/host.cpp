// The entry points of CUDA and of a CUDA PyTorch that the launching code refers to, and the tests' own.
#include <cxxabi.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda_runtime.h"
#include "engine.h"

namespace simt {
namespace {

bool planning = false;
std::string plan;  // a line a launch

}  // namespace

Device& device() {
  static Device here;
  return here;
}

size_t& allowed_shared(const void* kernel) {
  static std::map<const void*, size_t> allowed;
  return allowed.try_emplace(kernel, 48 * 1024).first->second;
}

// As the source says it, without the arguments and the namespaces.
std::string kernel_name(const void* kernel) {
  const std::string symbol = symbol_of(kernel);
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), &std::free);
  std::string name = text ? text.get() : symbol;
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) name = name.substr(0, i);
  }
  for (size_t at; (at = name.find("segkernels::cuda::")) != std::string::npos;) name.erase(at, 18);
  return name;
}

int launch(const Launch& launch) {
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  if (blocks == 0 || threads == 0 || threads > 1024) return kInvalidConfiguration;
  if (launch.cluster == 0 || launch.cluster > 8 || blocks % launch.cluster) return kInvalidConfiguration;
  if (launch.cluster > 1 && device().ptx < 90) return kInvalidConfiguration;
  const size_t together = resident(threads, launch.shared_bytes) * size_t(device().multiprocessors);
  if (launch.cooperative && blocks > together) return kTooLarge;
  if (launch.shared_bytes > allowed_shared(launch.kernel)) return kInvalidValue;
  if (!planning) return run(launch);
  plan += symbol_of(launch.kernel);
  for (const size_t number : {size_t(blocks), size_t(threads), launch.shared_bytes, size_t(launch.cluster)})
    plan += " " + std::to_string(number);
  plan += "\n";
  return 0;
}

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer's report is followed by the place.
const bool places_are_told = [] {
  __asan_set_error_report_callback([](const char*) {
    if (running) std::fprintf(stderr, "simt: out of bounds: %s\n", place().c_str());
  });
  return true;
}();
#endif

}  // namespace simt

extern "C" {

// While on, launches are noted and not run.
void simt_plan(int on) {
  simt::planning = on != 0;
  if (on) simt::plan.clear();
}
// The device from now on.
void simt_device(int ptx, int multiprocessors, int shared_bytes, int l2_bytes) {
  simt::device() = {ptx, multiprocessors, size_t(shared_bytes), l2_bytes};
}
// "symbol blocks threads bytes-of-dynamic-shared-memory blocks-of-a-cluster", a line a launch.
const char* simt_planned() { return simt::plan.c_str(); }

#ifndef SIMT_WATCH  // hooks.cpp has them
int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
#endif
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  if (error == 0) return 0;
  const std::string text = error == simt::kLaunchFailure
                               ? simt::last_report()
                               : "simt: launch refused (cudaError " + std::to_string(error) + ")";
  *message = static_cast<char*>(std::malloc(text.size() + 1));
  std::memcpy(*message, text.c_str(), text.size() + 1);
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
}
