"""The parts of ``benchmarks/gpu_check.py``: what is found out on a machine with a GPU.

A part is a module with ``measure(settings, rows, clock)``, which fills ``rows`` until the time of
``clock`` is over, and ``table(rows)``, which sums them up in lines of text.
"""
