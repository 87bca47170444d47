// Who calls the watch: instrumented code at every access, and the operators' host code through PyTorch's C
// interface, whose functions this library has in its own name.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

#include "engine.h"

namespace simt::watch {
void forget();
void allow(const void* p, size_t bytes, bool writable);
void set_written(const void* p, size_t bytes, bool written);
}  // namespace simt::watch

using simt::watch::access;

namespace {

inline void access_aligned(void* p, size_t bytes, bool write) {
  if (!simt::running) return;
  if (uintptr_t(p) % bytes)
    simt::fault("misaligned", std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes");
  access(p, bytes, write);
}
inline void access_anyhow(void* p, size_t bytes, bool write) {
  if (simt::running) access(p, bytes, write);
}

}  // namespace

extern "C" {

#define HOOKS(n)                                                                     \
  void __tsan_read##n(void* p) { access_aligned(p, n, false); }                      \
  void __tsan_write##n(void* p) { access_aligned(p, n, true); }                      \
  void __tsan_unaligned_read##n(void* p) { access_anyhow(p, n, false); }             \
  void __tsan_unaligned_write##n(void* p) { access_anyhow(p, n, true); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, size_t bytes) { access_anyhow(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { access_anyhow(p, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// reference counts in the host's code
unsigned __tsan_atomic32_fetch_add(volatile unsigned* p, unsigned value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

}  // extern "C"

namespace {

template <class F>
F* next(const char* name) {
  void* f = dlsym(RTLD_NEXT, name);
  if (!f) f = dlsym(RTLD_DEFAULT, name);
  if (!f) std::abort();
  return reinterpret_cast<F*>(f);
}

using Handle = struct AtenTensorOpaque*;
using GetNumber = int(Handle, int64_t*);
using GetNumbers = int(Handle, int64_t**);

int64_t number(const char* get, Handle tensor) {
  int64_t value = 0;
  next<GetNumber>(get)(tensor, &value);
  return value;
}

// Bytes from a tensor's first element to behind its last.
size_t extent(Handle tensor) {
  int64_t *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t type = 0;
  next<GetNumbers>("aoti_torch_get_sizes")(tensor, &sizes);
  next<GetNumbers>("aoti_torch_get_strides")(tensor, &strides);
  next<int(Handle, int32_t*)>("aoti_torch_get_dtype")(tensor, &type);
  for (int64_t i = 0; i < number("aoti_torch_get_dim", tensor); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return size_t(last + 1) * next<size_t(int32_t)>("aoti_torch_dtype_element_size")(type);
}

}  // namespace

extern "C" {

// An operator begins and ends: what is known of global memory is known within it.
int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  simt::watch::forget();
  return 0;
}
int aoti_torch_delete_device_guard(void*) {
  simt::watch::forget();
  return 0;
}

int torch_get_mutable_data_ptr(Handle tensor, void** p) {
  const int error = next<int(Handle, void**)>("torch_get_mutable_data_ptr")(tensor, p);
  if (!error) simt::watch::allow(*p, extent(tensor), true);
  return error;
}
int torch_get_const_data_ptr(Handle tensor, const void** p) {
  const int error = next<int(Handle, const void**)>("torch_get_const_data_ptr")(tensor, p);
  if (!error) simt::watch::allow(*p, extent(tensor), false);
  return error;
}

// Memory is unwritten where `empty` made it; what PyTorch's other operators return is theirs.
int torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version) {
  const int error = next<int(const char*, const char*, uint64_t*, uint64_t)>("torch_call_dispatcher")(
      name, overload, stack, version);
  if (error) return error;
  const Handle made = reinterpret_cast<Handle>(stack[0]);
  void* p = nullptr;
  if (next<int(Handle, void**)>("aoti_torch_get_data_ptr")(made, &p) == 0 && p)
    simt::watch::set_written(p, extent(made), std::string(name).rfind("aten::empty", 0) != 0);
  return 0;
}

}  // extern "C"
