# Horovod 0.28.1 builds as it is against a present-day torch when CMake reads this file, which the environment
# variable CMAKE_TOOLCHAIN_FILE makes it do. A toolchain file is read before the compiler is known, so the
# settings wait until CMake reads the file a second time, just after project(horovod).
set(CMAKE_PROJECT_horovod_INCLUDE "${CMAKE_CURRENT_LIST_FILE}")

if(PROJECT_NAME STREQUAL "horovod" AND CMAKE_CXX17_STANDARD_COMPILE_OPTION)
    # Horovod requests C++14; torch's headers refuse to compile as anything before C++17.
    set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "${CMAKE_CXX17_STANDARD_COMPILE_OPTION}")
    # GCC 13 and later no longer include these by way of other headers, and Horovod relies on that.
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include cstdint -include stdexcept -include string>")
    # Without debug symbols the wheel is 1 MB instead of 20.
    set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")
    # Find libmpi, libtorch and libnccl relative to the library, so that the wheel serves any environment.
    set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
    set(CMAKE_INSTALL_RPATH "\$ORIGIN/../../../.." "\$ORIGIN/../../torch/lib" "\$ORIGIN/../../nvidia/nccl/lib")

    # With a torch for CUDA, Horovod takes any CUDA toolkit it comes across for a wish to use it, and fails when
    # that one is incomplete. The trainer reduces on the CPU: build for it unless GPUs are asked for by name.
    if(NOT DEFINED ENV{HOROVOD_GPU_OPERATIONS})
        set(CMAKE_CUDA_COMPILER "")
        set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE)
        set(PYTHON_EXECUTABLE "${PYTHON_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/without_cuda.py")
    endif()
endif()
