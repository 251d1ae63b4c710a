# Finds a CUDA compiler, says what it did, and makes the language available.
#
# FREEZEOPS_CUDA             ON, OFF or AUTO; the environment variable of that name, else AUTO
# FREEZEOPS_CUDA_ARCHITECTURES   compute capabilities to compile for, such as "80;90", instead of the list below; the
#                            newest is also kept as PTX
#
# Sets FreezeopsCuda_FOUND, FREEZEOPS_CUDA_REAL and FREEZEOPS_CUDA_PTX (capabilities), and CUDA's variables of CMake.
# The compiler is looked for in CUDACXX, on the PATH, in CUDA_HOME and CUDA_PATH, and in /usr/local/cuda.

set(_default AUTO)
if(NOT "$ENV{FREEZEOPS_CUDA}" STREQUAL "")
  set(_default "$ENV{FREEZEOPS_CUDA}")
endif()
set(FREEZEOPS_CUDA "${_default}" CACHE STRING "Compile CUDA kernels: ON, OFF or AUTO")
set(_architectures "$ENV{FREEZEOPS_CUDA_ARCHITECTURES}")
string(REPLACE "," ";" _architectures "${_architectures}")
set(FREEZEOPS_CUDA_ARCHITECTURES "${_architectures}" CACHE STRING "Compute capabilities to compile for, such as 80;90")
if(NOT FREEZEOPS_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "FREEZEOPS_CUDA must be ON, OFF or AUTO. Received: FREEZEOPS_CUDA=${FREEZEOPS_CUDA}")
endif()

set(FreezeopsCuda_FOUND FALSE)
set(_why "")
if(FREEZEOPS_CUDA STREQUAL "OFF")
  set(_why "FREEZEOPS_CUDA=OFF")
else()
  find_program(FREEZEOPS_NVCC
    NAMES "$ENV{CUDACXX}" nvcc
    HINTS "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}"
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(NOT FREEZEOPS_NVCC)
    set(_why "no nvcc in CUDACXX, on the PATH, in CUDA_HOME, in CUDA_PATH or in /usr/local/cuda")
  else()
    execute_process(COMMAND "${FREEZEOPS_NVCC}" --version OUTPUT_VARIABLE _text RESULT_VARIABLE _result ERROR_QUIET)
    if(_text MATCHES "release ([0-9]+)\\.([0-9]+), V([0-9.]+)")
      set(FREEZEOPS_NVCC_RELEASE "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
      set(FREEZEOPS_NVCC_VERSION "${CMAKE_MATCH_3}")
    endif()
    if(NOT _result EQUAL 0 OR NOT FREEZEOPS_NVCC_RELEASE)
      set(_why "${FREEZEOPS_NVCC} does not tell its version")
    elseif(FREEZEOPS_NVCC_RELEASE VERSION_LESS 12.0)
      set(_why "${FREEZEOPS_NVCC} is of CUDA ${FREEZEOPS_NVCC_RELEASE}, older than 12.0")
    else()
      # Whether it gets along with this C++ compiler and has its library. Its machine code is not run.
      set(_probe "${CMAKE_CURRENT_BINARY_DIR}/freezeops_cuda_probe")
      file(WRITE "${_probe}.cu" "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); }\n")
      set(_host "")
      if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
        set(_host -ccbin "$ENV{CUDAHOSTCXX}")
      endif()
      execute_process(
        COMMAND "${FREEZEOPS_NVCC}" -std=c++17 -arch=sm_80 -cudart static ${_host} "${_probe}.cu" -o "${_probe}"
        RESULT_VARIABLE _result OUTPUT_VARIABLE _text ERROR_VARIABLE _text)
      if(_result EQUAL 0)
        set(FreezeopsCuda_FOUND TRUE)
      else()
        string(STRIP "${_text}" _text)
        set(_why "${FREEZEOPS_NVCC} does not compile a small program: ${_text}")
      endif()
    endif()
  endif()
endif()

if(NOT FreezeopsCuda_FOUND)
  if(FREEZEOPS_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "FREEZEOPS_CUDA=ON needs CUDA's compiler, nvcc 12.0 or newer: ${_why}. Install the CUDA toolkit and set CUDA_HOME "
      "(or CUDACXX) to it, or set FREEZEOPS_CUDA=AUTO to build without CUDA kernels where there is none.")
  endif()
  message(STATUS "CUDA kernels: no (${_why})")
  return()
endif()

if(FREEZEOPS_CUDA_ARCHITECTURES)
  set(FREEZEOPS_CUDA_REAL ${FREEZEOPS_CUDA_ARCHITECTURES})
  list(SORT FREEZEOPS_CUDA_REAL COMPARE NATURAL)
  list(GET FREEZEOPS_CUDA_REAL -1 FREEZEOPS_CUDA_PTX)
else()
  # Turing, Ampere (two), Ada, Hopper; Blackwell (two) where the compiler knows it. PTX of Hopper, which all compilers
  # know and every later GPU takes.
  set(FREEZEOPS_CUDA_REAL 75 80 86 89 90)
  if(FREEZEOPS_NVCC_RELEASE VERSION_GREATER_EQUAL 12.8)
    list(APPEND FREEZEOPS_CUDA_REAL 100 120)
  endif()
  set(FREEZEOPS_CUDA_PTX 90)
endif()
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(_architecture IN LISTS FREEZEOPS_CUDA_REAL)
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${_architecture}-real)
endforeach()
list(APPEND CMAKE_CUDA_ARCHITECTURES ${FREEZEOPS_CUDA_PTX}-virtual)

set(CMAKE_CUDA_COMPILER "${FREEZEOPS_NVCC}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)
list(JOIN FREEZEOPS_CUDA_REAL ", " _list)
message(STATUS
  "CUDA kernels: yes (${FREEZEOPS_NVCC}, CUDA ${FREEZEOPS_NVCC_VERSION}; compute capabilities ${_list}, PTX of "
  "${FREEZEOPS_CUDA_PTX})")
