// What the executor must know of its own shared library: where it lies, and its thread-local memory, which is
// all that kernels call __shared__.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <fstream>
#include <iterator>

#include "engine.h"

namespace segkernels::cuda {
alignas(128) thread_local double shared[simt::SHARED_BYTES / sizeof(double)];
}

namespace simt {
namespace {

// The static arrays of shared memory, from the symbols in the library's file.
std::vector<Static> read_statics(const char* path, ptrdiff_t tls_first) {
  std::ifstream stream(path, std::ios::binary);
  const std::string file((std::istreambuf_iterator<char>(stream)), {});
  const auto at = [&](size_t offset) { return file.data() + offset; };
  const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(at(0));
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(at(header.e_shoff));
  std::vector<Static> found;
  for (int s = 0; s < header.e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = at(sections[sections[s].sh_link].sh_offset);
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(at(sections[s].sh_offset));
    for (size_t i = 0; i < sections[s].sh_size / sizeof(Elf64_Sym); ++i)
      if (ELF64_ST_TYPE(symbols[i].st_info) == STT_TLS && symbols[i].st_shndx != SHN_UNDEF) {
        const ptrdiff_t first = tls_first + ptrdiff_t(symbols[i].st_value);
        if (first != 0)
          found.push_back({first, first + ptrdiff_t(symbols[i].st_size), names + symbols[i].st_name});
      }
  }
  return found;
}

Library find() {
  Library here;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* p) {
        const auto dynamics = reinterpret_cast<uintptr_t>(segkernels::cuda::shared);
        uintptr_t last = 0;
        bool mine = false;
        ptrdiff_t first_shared = 0, last_shared = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          const uintptr_t tls = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          if (part.p_type == PT_LOAD) last = info->dlpi_addr + part.p_vaddr + part.p_memsz;
          if (part.p_type != PT_TLS || dynamics - tls >= part.p_memsz) continue;
          mine = true;
          first_shared = ptrdiff_t(tls - dynamics), last_shared = first_shared + ptrdiff_t(part.p_memsz);
        }
        if (mine) *static_cast<Library*>(p) = {info->dlpi_addr, last, first_shared, last_shared, {}};
        return int(mine);
      },
      &here);
  Dl_info info = {};
  dladdr(reinterpret_cast<const void*>(&find), &info);
  here.statics = read_statics(info.dli_fname, here.shared_first);
  return here;
}

}  // namespace

const Library& library() {
  static const Library here = find();
  return here;
}

std::string symbol_of(const void* kernel) {
  Dl_info info = {};
  return dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "a kernel without a name";
}

}  // namespace simt
