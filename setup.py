"""How are the C++ kernels built? The arithmetic once per instruction set, one chosen at run time; all of it optional.

Without a C++ compiler the installation goes on, and the plain PyTorch kernels are used instead.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = "potential/kernels"
# Never -ffast-math: with GCC before 13, linking with it makes the whole process flush denormals.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-wrapv",  # Python's own flags say -fwrapv, which costs the loops over pairs a tenth
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
COMMON = ("entry.cpp", "evaluate.cpp", "neighbours.cpp", "pairs.cpp")
ARITHMETIC = ("aev.cpp", "motion.cpp", "networks.cpp", "training.cpp")
HEADERS = tuple(path.name for path in sorted(Path(KERNELS).glob("*.h")))
# Per instruction set the sources that are compiled for it, and how.
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], list[str]]] = {"smelt_plain": (ARITHMETIC, [])}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = ["-mavx512f", "-mavx512dq", "-mfma"]
    INSTRUCTION_SETS["smelt_avx2"] = (ARITHMETIC, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["smelt_avx512"] = (ARITHMETIC, AVX512)
    INSTRUCTION_SETS["smelt_amx"] = (ARITHMETIC[2:], [*AVX512, "-mamx-tile", "-mamx-int8"])


class BuildKernels(build_ext):
    """Compile one source with several sets of flags, which an Extension cannot say."""

    def build_extension(self, ext: Extension) -> None:
        objects, built = [], []
        for name, (sources, flags) in INSTRUCTION_SETS.items():
            try:
                for source in sources:
                    objects += self._compile(source, name, [*FLAGS, *flags, f"-DSMELT_SIMD={name}"])
                built.append(f"-D{name.upper()}")
            except CompileError:
                if name != "smelt_amx":  # which compilers before GCC 11 and Clang 12 do not know
                    raise
        objects += [name for source in COMMON for name in self._compile(source, "entry", [*FLAGS, *built])]
        target = Path(self.get_ext_fullpath(ext.name))
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, source: str, folder: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [f"{KERNELS}/{source}"], output_dir=f"{self.build_temp}/{folder}", extra_postargs=flags
        )


setup(
    ext_modules=[
        Extension(
            "potential.kernels._aev",
            sources=[f"{KERNELS}/{name}" for name in COMMON + ARITHMETIC],
            depends=[f"{KERNELS}/{name}" for name in HEADERS],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
