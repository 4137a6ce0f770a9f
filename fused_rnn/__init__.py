"""Drop-in replacements for torch.nn's RNN, LSTM, GRU and their cells, on fused kernels.

rnn = fused_rnn.GRU(64, 128, num_layers=2)  # arguments, parameters, results of torch.nn.GRU
model = fused_rnn.replace(model)            # or swap torch.nn's in a model that exists
fused_rnn.patch_torch()                     # or in all packages that are imported afterwards
fused_rnn.keras.enable()                    # or under the layers of Keras 3
"""

from __future__ import annotations

from typing import Any

from . import build

build.check_torch_version()

from . import flops, keras, registries  # noqa: E402, F401
from .between import BetweenSteps  # noqa: E402
from .cells import BlockGRU, PeepholeLSTM  # noqa: E402
from .convert import Finding, replace, restore, survey  # noqa: E402
from .cpp import export_cpp  # noqa: E402
from .custom import CellError, cell  # noqa: E402
from .frozen import freeze  # noqa: E402
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell  # noqa: E402
from .patch import Patch, patch_torch  # noqa: E402

__version__ = build.VERSION

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BetweenSteps",
    "BlockGRU",
    "CellError",
    "Finding",
    "GRUCell",
    "LSTMCell",
    "Patch",
    "PeepholeLSTM",
    "RNNCell",
    "backend_info",
    "cell",
    "export_cpp",
    "freeze",
    "patch_torch",
    "replace",
    "restore",
    "survey",
]


def backend_info() -> dict[str, Any]:
    """Which backend does the work, and why. Loads the native library, and builds it if need be.

    Returns:
        What ``python -m fused_rnn doctor`` prints, by name: ``backend`` ("native" or "reference"),
        ``reason``, ``library``, ``instructions``, ``cuda`` and, where something stands in the way
        of the kernels, ``problem`` and ``remedy``, among others.

    Raises:
        RuntimeError: the kernels cannot be had, and FUSED_RNN_BACKEND is "native".
    """
    build.backend()
    return build.info()
