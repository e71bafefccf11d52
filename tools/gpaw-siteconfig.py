# Build GPAW with a C++ compiler and nothing else: PBE is built in, and NumPy does the linear algebra.
mpi = False
compiler = "g++"
nolibxc = True
noblas = True
libraries = []
