"""RTNeural with its xsimd backend."""

from __future__ import annotations

from .rtneural import RTNeural


class RTNeuralXsimd(RTNeural):
    name, title = "rtneural_xsimd", "RTNeural xsimd"
    backend = ("RTNEURAL_USE_XSIMD", "modules/xsimd/include", 64)


def peer() -> RTNeuralXsimd:
    return RTNeuralXsimd()
