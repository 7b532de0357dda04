"""m3kernels: CPU, Triton and CUDA kernels for INT4 GEMM, tree speculation and policy losses. Needs torch only.

Importing does nothing but declare names: no CUDA context, no compilation, no Triton import.
"""

from m3kernels.dispatch import BackendError

__version__ = "0.1.0"
__all__ = ["BackendError", "__version__"]
