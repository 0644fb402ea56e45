# Each kernel file is compiled once per instruction set, in a namespace of that name; src/csrc/isa.h picks at run time.
#   fastrlhf_add_simd_kernels(<target> <rooms> <rooms that are also built for AVX-512-BF16>)

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" FASTRLHF_PROCESSOR)
set(FASTRLHF_LEVELS scalar)
set(FASTRLHF_FLAGS_scalar -O3)
if(FASTRLHF_PROCESSOR MATCHES "x86_64|amd64")
  set(FASTRLHF_HAVE_X86 ON)
  list(APPEND FASTRLHF_LEVELS avx2 avx512 avx512_bf16)
  # Only processors without AVX2 run it here: half the time to compile, for half the speed in bfloat16.
  set(FASTRLHF_FLAGS_scalar -O2 -fpeel-loops)
  # Loops are unrolled and vectors are chosen in the source; these two of what else -O3 does take time and showed no gain.
  set(FASTRLHF_FLAGS_avx2 -O3 -fno-unswitch-loops -fno-ipa-cp-clone -mavx2 -mfma -mf16c)
  set(FASTRLHF_FLAGS_avx512 ${FASTRLHF_FLAGS_avx2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512)
  set(FASTRLHF_FLAGS_avx512_bf16 ${FASTRLHF_FLAGS_avx512} -mavx512bf16)
endif()

function(fastrlhf_add_simd_kernels target rooms bf16_rooms)
  if(FASTRLHF_HAVE_X86)
    target_compile_definitions(${target} PRIVATE FASTRLHF_HAVE_X86)
  endif()
  set(number 0)
  foreach(level IN LISTS FASTRLHF_LEVELS)
    set(sources "")
    foreach(room IN LISTS rooms)
      if(NOT level STREQUAL "avx512_bf16" OR room IN_LIST bf16_rooms)
        list(APPEND sources kernels/${room}/cpu.cpp)
      endif()
    endforeach()
    add_library(kernels_${level} OBJECT ${sources})
    target_include_directories(kernels_${level} PRIVATE src kernels)
    target_compile_definitions(kernels_${level} PRIVATE FASTRLHF_ISA=${level} FASTRLHF_ISA_LEVEL=${number})
    if(FASTRLHF_HAVE_X86)
      target_compile_definitions(kernels_${level} PRIVATE FASTRLHF_HAVE_X86)
    endif()
    # Optimised even in a debug build: the headers rely on everything that is inline being inlined (see scratch.h).
    # -Wno-psabi, -Wno-unused-function: vectors by value between inline functions; not every file uses every helper.
    # -Wno-*uninitialized: GCC 12 says it of its own AVX-512 intrinsics.
    target_compile_options(kernels_${level} PRIVATE -Wall -Wextra -Wno-psabi -Wno-unused-function -Wno-maybe-uninitialized -Wno-uninitialized
                           -ffp-contract=off -fno-math-errno -fno-trapping-math ${FASTRLHF_FLAGS_${level}})
    # The intrinsics and the vectors once a level, not once a file: 2 s of each.
    target_precompile_headers(kernels_${level} PRIVATE <algorithm> <cmath> <cstring> kernels/common/simd/simd.h)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:kernels_${level}>)
    math(EXPR number "${number} + 1")
  endforeach()
endfunction()
