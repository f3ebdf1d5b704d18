// What the host's code asks of torch, on tensors of the CPU. The linker hands these calls of libtorch's C interface to
// __wrap_… here (--wrap), so sources need no change: pointers of tensors become known to memory.cpp, new memory holds a
// pattern, and kernels are registered as cuda_ops_emulated, for the CPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <pthread.h>

#include <cstring>
#include <string>
#include <vector>

#include "memory.h"

extern "C" AOTITorchError __real_aoti_torch_get_data_ptr(AtenTensorHandle, void**);

namespace {

pthread_t caller;
bool is_in_call = false;
std::vector<AtenTensorHandle> kept;  // until the call ends: memory must not be handed out twice in it

// Bytes from the first element to the last.
size_t bytes_of(AtenTensorHandle tensor) {
  int64_t dim, *sizes, *strides, last = 0;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return (last + 1) * aoti_torch_dtype_element_size(dtype);
}

bool is_of_call() {
  return is_in_call && pthread_equal(caller, pthread_self());
}

void keep(AtenTensorHandle tensor) {
  AtenTensorHandle copy;
  if (aoti_torch_new_tensor_handle(tensor, &copy) == AOTI_TORCH_SUCCESS) kept.push_back(copy);
}

void note(AtenTensorHandle tensor, const void* data) {
  if (!is_of_call()) return;
  keep(tensor);
  emulator::add_tensor(data, bytes_of(tensor));
}

void set_contents(AtenTensorHandle tensor, bool is_written) {
  void* data;
  __real_aoti_torch_get_data_ptr(tensor, &data);
  keep(tensor);
  emulator::set_written(data, bytes_of(tensor), is_written);
}

void end_call() {
  emulator::begin_call();
  for (auto tensor : kept) aoti_torch_delete_tensor_object(tensor);
  kept.clear();
  is_in_call = false;
}

}  // namespace

extern "C" {

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __real_aoti_torch_aten_fill__Scalar(AtenTensorHandle, double);
AOTITorchError __real_torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t);
AOTITorchError __real_aoti_torch_library_init_impl(
    const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError __real_aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*);

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const auto error = __real_torch_get_const_data_ptr(tensor, data);
  note(tensor, *data);
  return error;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const auto error = __real_torch_get_mutable_data_ptr(tensor, data);
  note(tensor, *data);
  return error;
}

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const auto error = __real_aoti_torch_get_data_ptr(tensor, data);
  note(tensor, *data);
  return error;
}

AOTITorchError __wrap_torch_call_dispatcher(
    const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  const auto error = __real_torch_call_dispatcher(name, overload, stack, version);
  const bool is_empty = std::string(name).starts_with("aten::") && strstr(name, "empty") != nullptr;
  const bool is_filled = !strcmp(name, "aten::zero_") || !strcmp(name, "aten::copy_");
  if (error != AOTI_TORCH_SUCCESS || !is_of_call() || !(is_empty || is_filled)) return error;
  set_contents(reinterpret_cast<AtenTensorHandle>(static_cast<uintptr_t>(stack[0])), is_filled);
  return error;
}

AOTITorchError __wrap_aoti_torch_aten_fill__Scalar(AtenTensorHandle tensor, double value) {
  const auto error = __real_aoti_torch_aten_fill__Scalar(tensor, value);
  if (error == AOTI_TORCH_SUCCESS && is_of_call()) set_contents(tensor, true);
  return error;
}

// Kernels are launched under a guard of their device: it stands for the call of an operator.
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&caller);
  end_call();
  caller = pthread_self();
  is_in_call = true;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  end_call();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** told) {
  *told = error == 0 ? nullptr : strdup(("CUDA error " + std::to_string(error)).c_str());
  return AOTI_TORCH_SUCCESS;
}

void __wrap_torch_c10_cuda_free_error_msg(char* told) {
  free(told);
}

AOTITorchError __wrap_aoti_torch_library_init_impl(
    const char* ns, const char*, const char* file, uint32_t line, TorchLibraryHandle* library) {
  static std::vector<std::string*> names;  // torch keeps the pointer
  names.push_back(new std::string(std::string(ns) + "_emulated"));
  return __real_aoti_torch_library_init_impl(names.back()->c_str(), "CPU", file, line, library);
}

AOTITorchError __wrap_aoti_torch_library_init_fragment(
    const char* ns, const char* file, uint32_t line, TorchLibraryHandle* library) {
  static std::vector<std::string*> names;
  names.push_back(new std::string(std::string(ns) + "_emulated"));
  return __real_aoti_torch_library_init_fragment(names.back()->c_str(), file, line, library);
}
}
