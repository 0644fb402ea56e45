# CUTLASS's headers, for the kernels that need Hopper's matrix instructions: FASTRLHF_CUTLASS, a folder that holds cute/ and cutlass/,
# or the package nvidia-cutlass of the Python that builds. Sets FASTRLHF_CUTLASS_INCLUDE, empty where there are none.
set(FASTRLHF_CUTLASS "" CACHE PATH "Folder of CUTLASS's headers; empty: from the Python package nvidia-cutlass")

set(FASTRLHF_CUTLASS_INCLUDE "")
if(FASTRLHF_CUTLASS)
  set(FASTRLHF_CUTLASS_INCLUDE "${FASTRLHF_CUTLASS}")
  if(EXISTS "${FASTRLHF_CUTLASS}/include/cute")
    set(FASTRLHF_CUTLASS_INCLUDE "${FASTRLHF_CUTLASS}/include")
  endif()
  if(NOT EXISTS "${FASTRLHF_CUTLASS_INCLUDE}/cute/arch/mma_sm90_gmma.hpp")
    message(FATAL_ERROR "FASTRLHF_CUTLASS: no cute/arch/mma_sm90_gmma.hpp under '${FASTRLHF_CUTLASS}'")
  endif()
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(package AND EXISTS "${package}/source/include/cute/arch/mma_sm90_gmma.hpp")
    set(FASTRLHF_CUTLASS_INCLUDE "${package}/source/include")
  endif()
endif()
