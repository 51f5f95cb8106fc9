// Saying when a network begins and ends; see memory.h.

#include <torch/library.h>

#include "memory.h"

TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def("reuse_memory(bool begin) -> ()", [](bool begin) {
    if (begin) {
      esc_arch::reuse().begin();
    } else {
      esc_arch::reuse().end();
    }
  });
}
