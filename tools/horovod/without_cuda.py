"""Run `python without_cuda.py -c PROGRAM` as Python runs a program, but with a torch that finds no CUDA toolkit."""

import sys

import torch.utils.cpp_extension

torch.utils.cpp_extension.CUDA_HOME = None
exec(sys.argv[2])
