# FASTRLHF_CUDA = auto | on | off; FASTRLHF_CUDA_ARCHS = "80;90a;100a".
#   auto: on where nvcc and an NVIDIA device are found, so that a CPU user never waits for nvcc.
#   on:   builds without a device too; an error where there is no nvcc.
# CUDA kernels are an object of their own, `_cuda`, linked to the static CUDA runtime: `import fastrlhf` needs no driver.
set(FASTRLHF_CUDA "auto" CACHE STRING "Build the CUDA kernels: auto, on or off")
set(FASTRLHF_CUDA_ARCHS "80;90a;100a" CACHE STRING "CUDA architectures of the fat binary")
set_property(CACHE FASTRLHF_CUDA PROPERTY STRINGS auto on off)

string(TOLOWER "${FASTRLHF_CUDA}" FASTRLHF_CUDA_CHOICE)
if(NOT FASTRLHF_CUDA_CHOICE MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "FASTRLHF_CUDA must be auto, on or off, got '${FASTRLHF_CUDA}'")
endif()

set(FASTRLHF_BUILD_CUDA OFF)
if(NOT FASTRLHF_CUDA_CHOICE STREQUAL "off")
  include(CheckLanguage)
  find_program(FASTRLHF_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  if(FASTRLHF_CUDA_CHOICE STREQUAL "on")
    if(NOT FASTRLHF_NVCC)
      message(FATAL_ERROR "FASTRLHF_CUDA=on, but nvcc was not found (set CUDA_HOME)")
    endif()
    set(FASTRLHF_BUILD_CUDA ON)
  elseif(FASTRLHF_NVCC AND EXISTS "/dev/nvidiactl")
    set(FASTRLHF_BUILD_CUDA ON)
  endif()
endif()
message(STATUS "fastrlhf: CUDA kernels ${FASTRLHF_BUILD_CUDA} (FASTRLHF_CUDA=${FASTRLHF_CUDA_CHOICE})")

if(FASTRLHF_BUILD_CUDA)
  set(CMAKE_CUDA_COMPILER "${FASTRLHF_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES "${FASTRLHF_CUDA_ARCHS}")
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 17)
  enable_language(CUDA)
endif()
