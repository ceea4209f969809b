# cmake -DNM=<nm> -DOBJECTS="a.o|b.o" -P check_isa_objects.cmake
# A weak symbol (an inline function or template) in a kernels_<isa> object would let the linker take that copy for the
# whole library, and run AVX code on a machine without AVX.
string(REPLACE "|" ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "/kernels_[a-z0-9_]+\\.cpp\\.o$")
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} defines symbols that another object may define too; give them internal linkage:\n  ${weak}")
  endif()
endforeach()
