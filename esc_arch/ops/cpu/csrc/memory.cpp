// Saying when a network begins and ends; see memory.h.

#include "memory.h"

namespace {

void reuse_memory(bool begin) {
  if (begin) {
    esc_arch::reuse().begin();
  } else {
    esc_arch::reuse().end();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def("reuse_memory(bool begin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CompositeImplicitAutograd, m) {
  m.impl("reuse_memory", TORCH_BOX(&reuse_memory));
}
