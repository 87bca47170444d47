// Who calls the watch: instrumented code at every access, and the operators' host code through PyTorch's C
// interface, whose functions this library has in its own name.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "watch.h"

using namespace simt::watch;

namespace {

void note(void* p, size_t bytes, Access how) {
  if (!simt::in_kernel) return;
  const simt::AtWork now;
  access(p, bytes, how);
}

[[noreturn]] void undefined(const char* kind, const char* words) {
  if (!simt::in_kernel) {
    std::fprintf(stderr, "simt: %s: in the host's code: %s\n", kind, words);
    std::abort();
  }
  const simt::AtWork now;
  simt::fault(kind, words);
}

}  // namespace

extern "C" {

#define HOOKS(n)                                               \
  void __tsan_read##n(void* p) { note(p, n, read); }           \
  void __tsan_write##n(void* p) { note(p, n, write); }         \
  void __tsan_unaligned_read##n(void* p) { note(p, n, read); } \
  void __tsan_unaligned_write##n(void* p) { note(p, n, write); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, size_t bytes) { note(p, bytes, read); }
void __tsan_write_range(void* p, size_t bytes) { note(p, bytes, write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Atomics of the host's code: reference counts, the guards of static variables.
#define ATOMICS(bits, T)                                                                                  \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                                         \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                       \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T value, int) {                                        \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                       \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T value, int) {                                        \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                       \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                                         \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                               \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
#undef ATOMICS

// What the undefined behaviour sanitizer's instrumentation calls.
#define UNDEFINED(check, kind, words) \
  void __ubsan_handle_##check##_abort() { undefined(kind, words); }
UNDEFINED(type_mismatch_v1, "misaligned", "an access through a pointer that is not aligned to its type")
UNDEFINED(out_of_bounds, "out of bounds", "an index outside its array")
UNDEFINED(shift_out_of_bounds, "undefined", "a shift by more bits than there are")
UNDEFINED(add_overflow, "undefined", "an overflow of +")
UNDEFINED(sub_overflow, "undefined", "an overflow of -")
UNDEFINED(mul_overflow, "undefined", "an overflow of *")
UNDEFINED(negate_overflow, "undefined", "an overflow of a change of sign")
UNDEFINED(divrem_overflow, "undefined", "a division by zero or its overflow")
#undef UNDEFINED

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
  forget();
  return 0;
}
int aoti_torch_delete_device_guard(void*) {
  forget();
  return 0;
}

int torch_get_mutable_data_ptr(Handle tensor, void** p) {
  const int error = next<int(Handle, void**)>("torch_get_mutable_data_ptr")(tensor, p);
  if (!error) allow(*p, extent(tensor), true);
  return error;
}
int torch_get_const_data_ptr(Handle tensor, const void** p) {
  const int error = next<int(Handle, const void**)>("torch_get_const_data_ptr")(tensor, p);
  if (!error) allow(*p, extent(tensor), false);
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
    set_written(p, extent(made), std::string(name).rfind("aten::empty", 0) != 0);
  return 0;
}

}  // extern "C"
