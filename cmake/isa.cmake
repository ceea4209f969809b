# acf_isa_sources(<family>) adds csrc/<family>/kernels_<isa>.cpp for every ISA of the target architecture to acf_kernels.
# These are the only files compiled with instructions beyond the baseline; they are never link-time optimised, so that
# nothing of them leaks into code that runs on every machine.
include(CheckCXXSourceCompiles)
check_cxx_source_compiles("#if !defined(__x86_64__)\n#error\n#endif\nint main() {}" ACF_TARGET_X86)
check_cxx_source_compiles("#if !defined(__aarch64__)\n#error\n#endif\nint main() {}" ACF_TARGET_AARCH64)

set(ACF_ISAS generic)
set(ACF_UNITS generic)  # instructions that multiply narrow numbers
if(ACF_TARGET_X86)
  list(APPEND ACF_ISAS avx2 avx512)
  list(APPEND ACF_UNITS avx2 vnni avx512_bf16 amx)
elseif(ACF_TARGET_AARCH64)
  list(APPEND ACF_ISAS neon)
  list(APPEND ACF_UNITS neon dotprod neon_bf16)
endif()
set(ACF_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(ACF_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c)

set(ACF_FLAGS_vnni ${ACF_FLAGS_avx512} -mavx512vnni)
set(ACF_FLAGS_avx512_bf16 ${ACF_FLAGS_avx512} -mavx512bf16)
set(ACF_FLAGS_amx ${ACF_FLAGS_avx512} -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8)
set(ACF_FLAGS_dotprod -march=armv8.2-a+dotprod)
set(ACF_FLAGS_neon_bf16 -march=armv8.2-a+bf16)

# acf_isa_sources(<family> [<name>...]): csrc/<family>/kernels_<name>.cpp, for all ISAs if no names are given.
function(acf_isa_sources family)
  set(names ${ARGN})
  if(NOT names)
    set(names ${ACF_ISAS})
  endif()
  foreach(isa IN LISTS names)
    set(source csrc/${family}/kernels_${isa}.cpp)
    target_sources(acf_kernels PRIVATE ${source})
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ACF_FLAGS_${isa}};-fno-lto")
    if(ACF_SANITIZE STREQUAL "thread" AND NOT isa STREQUAL "generic")  # what intrinsics access is not instrumented anyway
      set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=thread)
    endif()
    if(ACF_SANITIZE)  # kernels hand no local out, and marking the scope of each would take minutes to compile
      set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize-address-use-after-scope)
    endif()
  endforeach()
endfunction()
