// By what and for what this library was built: "GCC 12.2.0; CUDA 8.0 9.0+PTX".
#include "common.h"

#define TO_STRING_AS_IT_IS(text) #text
#define TO_STRING(macro) TO_STRING_AS_IT_IS(macro)

namespace cuda_ops {
namespace {

std::string build_info() {
  std::string info = "C++ " __VERSION__ "; ";
#ifdef CUDA_OPS_ARCHITECTURES  // 8.0_9.0+PTX: a macro on a command line has no spaces
  std::string architectures = TO_STRING(CUDA_OPS_ARCHITECTURES);
  for (char& c : architectures) c = c == '_' ? ' ' : c;
  return info + "CUDA " + architectures;
#else
  return info + "no CUDA";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, m) {
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace cuda_ops
