// How Python hands over tensors: addresses as integers, 0 for none.
#pragma once

#include <cstdint>

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
