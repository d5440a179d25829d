# Read by CMake as it builds llama-cpp-python: leave out llama.cpp's `common`, half of the compiling, which the Python package does not load.
set(LLAMA_BUILD_COMMON OFF)
