# Finds the TensorFlow that the interpreter sees and defines the target freezeops::tensorflow.
#
# Sets TENSORFLOW_VERSION, TENSORFLOW_MAJOR, TENSORFLOW_MINOR, TENSORFLOW_PATCH and FreezeopsTensorFlow_FOUND.
# FREEZEOPS_TENSORFLOW_PYTHON names another interpreter to ask.

if(NOT FREEZEOPS_TENSORFLOW_PYTHON)
  set(FREEZEOPS_TENSORFLOW_PYTHON "${Python_EXECUTABLE}")
endif()

# First the environment that the interpreter belongs to (-I: without what pip's isolated build puts in front), then,
# where that has none, what the build environment brought along.
set(_probe "${CMAKE_CURRENT_LIST_DIR}/tensorflow_probe.py")
foreach(_isolation "-I" "-B")
  execute_process(
    COMMAND "${FREEZEOPS_TENSORFLOW_PYTHON}" "${_isolation}" "${_probe}"
    OUTPUT_VARIABLE _answer
    ERROR_VARIABLE _error
    RESULT_VARIABLE _result
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT _result EQUAL 0)
    message(FATAL_ERROR "${FREEZEOPS_TENSORFLOW_PYTHON} could not import its TensorFlow:\n${_error}")
  endif()
  if(NOT _answer STREQUAL "{}")
    break()
  endif()
endforeach()

set(FreezeopsTensorFlow_FOUND FALSE)
if(_answer STREQUAL "{}")
  message(FATAL_ERROR
    "No TensorFlow was found by ${FREEZEOPS_TENSORFLOW_PYTHON}. Install it first (pip install 'tensorflow==2.21.*'), "
    "or set FREEZEOPS_SKIP_NATIVE=1 for an install without compiled kernels.")
endif()

string(JSON TENSORFLOW_VERSION GET "${_answer}" version)
string(JSON _include GET "${_answer}" include)
string(JSON _lib GET "${_answer}" lib)
string(JSON _flag_count LENGTH "${_answer}" compile_flags)
set(_flags "")
if(_flag_count GREATER 0)
  math(EXPR _last "${_flag_count} - 1")
  foreach(_i RANGE ${_last})
    string(JSON _flag GET "${_answer}" compile_flags ${_i})
    list(APPEND _flags "${_flag}")
  endforeach()
endif()

if(NOT TENSORFLOW_VERSION MATCHES "^([0-9]+)\\.([0-9]+)\\.([0-9]+)")
  message(FATAL_ERROR "TensorFlow's version is not of the form X.Y.Z: ${TENSORFLOW_VERSION}")
endif()
set(TENSORFLOW_MAJOR ${CMAKE_MATCH_1})
set(TENSORFLOW_MINOR ${CMAKE_MATCH_2})
set(TENSORFLOW_PATCH ${CMAKE_MATCH_3})
if(TENSORFLOW_VERSION VERSION_LESS 2.19)
  message(FATAL_ERROR "freezeops needs TensorFlow 2.19 or newer, found ${TENSORFLOW_VERSION} in ${_lib}.")
endif()

add_library(freezeops_tensorflow INTERFACE)
add_library(freezeops::tensorflow ALIAS freezeops_tensorflow)
target_include_directories(freezeops_tensorflow SYSTEM INTERFACE
  "${_include}"
  # XLA's headers include these two by their own paths.
  "${_include}/external/highwayhash"
  "${_include}/external/farmhash_archive/src")
target_compile_options(freezeops_tensorflow INTERFACE ${_flags})
target_compile_definitions(freezeops_tensorflow INTERFACE
  FREEZEOPS_TF_MAJOR=${TENSORFLOW_MAJOR}
  FREEZEOPS_TF_MINOR=${TENSORFLOW_MINOR}
  FREEZEOPS_TF_PATCH=${TENSORFLOW_PATCH})
# libtensorflow_cc has XLA's builder; both are in the process already when the library is loaded, so no rpath is needed.
target_link_directories(freezeops_tensorflow INTERFACE "${_lib}")
target_link_libraries(freezeops_tensorflow INTERFACE
  -l:libtensorflow_framework.so.${TENSORFLOW_MAJOR} -l:libtensorflow_cc.so.${TENSORFLOW_MAJOR})

set(FreezeopsTensorFlow_FOUND TRUE)
message(STATUS "TensorFlow ${TENSORFLOW_VERSION}")
