"""RNN, LSTM, GRU and their cells, to be used wherever torch.nn's are.

The classes take the arguments of torch.nn's, draw the same parameters from one seed, read and write
the same ``state_dict`` and return the same results. They derive from ``nn.RNNBase`` and
``nn.RNNCellBase``, which hold parameters and checks, but not from ``nn.RNN``, ``nn.LSTM`` and
``nn.GRU``: ``torch.compile`` refuses every instance of those. So ``isinstance(module, nn.LSTM)`` is
False.

RNN, LSTM and GRU take one argument more, ``recompute=True``, for training in less memory. Between
forward and backward a layer then holds its input and initial states alone, not the tape of its
steps (per row and direction 6 H values for LSTM, 5 H for GRU, H for RNN). Its backward runs the
forward once more, uses the tape and drops it. So a stack holds the tape of one layer at a time, and
a training step takes longer by one forward, about a quarter. (A single layer frees memory for what
comes after it, but its own backward needs as much as ever.) The gradients are the same to the last
bit. It can be switched at any time (``module.recompute = True``), also after ``replace``.
``torch.compile`` of the native kernels keeps to it; ``torch.func``, forward mode and torch's own
operators take no notice.

Sizes in the docstrings: T steps, B sequences, I = ``input_size``, H = ``hidden_size``,
L = ``num_layers``, D = 2 if ``bidirectional`` else 1, P = ``proj_size`` or H. With an unbatched
input, B is missing everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .between import shows_options
from .recurrent import PairLayers, Recurrent
from .step_cells import GRUCell, LSTMCell, RNNCell
from .torch_shaped import torchs_own

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .between import Options
    from .call_types import LayerCall, LSTMCall


def _refuse_projection(proj_size: object) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(Recurrent):
    """A stack of Elman networks (Elman 1990, "Finding structure in time") over whole sequences.

        h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        f = tanh or relu

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        device: where the parameters are.
        dtype: of the parameters.
        proj_size: refused, as in torch.nn: only LSTM has projections.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    ``norm``, ``norm_at``, ``norm_eps``, ``zoneout``, ``recurrent_dropout``, ``dropout_over_time``,
    ``weight_dropout`` and ``blocks`` say what happens between two steps, see ``BetweenSteps``.

    Call ``module(input, hx=None, *, lengths=None, reset=None, reset_to=None,
    return_states=False)`` with

    - input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
      sequence [T, I] (then B is missing everywhere), or a PackedSequence;
    - hx ``[L*D, B, H]``, zeros if None; D is 2 if ``bidirectional``, else 1;
    - lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
      the last states are those at its end, and the second direction begins there;
    - reset, bool, [T, B] ([B, T] if ``batch_first``, [R] for packed rows): where the states
      before that step begin anew, in all layers. No gradient passes there, and the second
      direction is cut at the same places;
    - reset_to: what they begin with, in the form of hx, or of every step, with T in front;
      zeros if None.

    It returns ``(output, h_n)``, and with ``return_states`` ``states`` behind them:

    - output ``[T, B, D*H]``, laid out like input, or a PackedSequence; forward units come first;
    - h_n ``[L*D, B, H]``, layer-major;
    - states, h after every step, ``[L*D, T, B, H]`` (packed: ``[L*D, R, H]``); 0 past ``lengths``.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Examples:
        >>> rnn = fused_rnn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    torch_class = torchs_own("RNN")
    if TYPE_CHECKING:
        __call__: LayerCall
    _wrong_input = "RNN: Expected input to be 2D or 3D, got {1}D tensor instead"

    @shows_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: None = None,
        recompute: bool = False,
        **options: Unpack[Options],
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"rnn_{nonlinearity}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            options=options,
        )


class LSTM(PairLayers):
    """A stack of long short-term memories over whole sequences.

    Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000 and, if
    ``proj_size`` is given, the projection of Sak, Senior & Beaufays 2014 (arXiv:1402.1128).

        i, f, o = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        g = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        c_t = f ⊙ c_{t-1} + i ⊙ g
        h_t = o ⊙ tanh(c_t)        with a projection h_t = W_hr (o ⊙ tanh(c_t))

    The rows of every weight hold the gates in the order i, f, g, o.

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        proj_size: width P < H that h is projected to; 0 for none.
        device: where the parameters are.
        dtype: of the parameters.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    ``norm``, ``norm_at``, ``norm_eps``, ``zoneout``, ``recurrent_dropout``, ``dropout_over_time``,
    ``weight_dropout`` and ``blocks`` say what happens between two steps, see ``BetweenSteps``.

    Call ``module(input, hx=None, *, lengths=None, reset=None, reset_to=None,
    return_states=False)`` with

    - input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
      sequence [T, I] (then B is missing everywhere), or a PackedSequence;
    - hx a pair (h_0 ``[L*D, B, P]``, c_0 ``[L*D, B, H]``), zeros if None; D is 2 if
      ``bidirectional``, else 1, and P is H if nothing is projected;
    - lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
      the last states are those at its end, and the second direction begins there;
    - reset, bool, [T, B] ([B, T] if ``batch_first``, [R] for packed rows): where the states
      before that step begin anew, in all layers. No gradient passes there, and the second
      direction is cut at the same places;
    - reset_to: what they begin with, in the form of hx, or of every step, with T in front;
      zeros if None.

    It returns ``(output, (h_n, c_n))``, and with ``return_states`` ``states`` behind them:

    - output ``[T, B, D*P]``, laid out like input, or a PackedSequence; forward units come first;
    - h_n ``[L*D, B, P]`` and c_n ``[L*D, B, H]``, layer-major;
    - states, (h, c) after every step, ``[L*D, T, B, ..]`` (packed: ``[L*D, R, ..]``); 0 past
      ``lengths``.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype;
            hx not a pair.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Examples:
        >>> rnn = fused_rnn.LSTM(10, 20, num_layers=2, bidirectional=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]), torch.Size([4, 3, 20]))
    """

    torch_class = torchs_own("LSTM")
    if TYPE_CHECKING:
        __call__: LSTMCall
    _operator = "lstm"

    @shows_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            recompute=recompute,
            options=options,
        )


class GRU(Recurrent):
    """A stack of gated recurrent units over whole sequences.

    Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the product, as in
    torch.nn and cuDNN.

        r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The rows of every weight hold the gates in the order r, z, n.

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        device: where the parameters are.
        dtype: of the parameters.
        proj_size: refused, as in torch.nn: only LSTM has projections.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    ``norm``, ``norm_at``, ``norm_eps``, ``zoneout``, ``recurrent_dropout``, ``dropout_over_time``,
    ``weight_dropout`` and ``blocks`` say what happens between two steps, see ``BetweenSteps``.

    Call ``module(input, hx=None, *, lengths=None, reset=None, reset_to=None,
    return_states=False)`` with

    - input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
      sequence [T, I] (then B is missing everywhere), or a PackedSequence;
    - hx ``[L*D, B, H]``, zeros if None; D is 2 if ``bidirectional``, else 1;
    - lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
      the last states are those at its end, and the second direction begins there;
    - reset, bool, [T, B] ([B, T] if ``batch_first``, [R] for packed rows): where the states
      before that step begin anew, in all layers. No gradient passes there, and the second
      direction is cut at the same places;
    - reset_to: what they begin with, in the form of hx, or of every step, with T in front;
      zeros if None.

    It returns ``(output, h_n)``, and with ``return_states`` ``states`` behind them:

    - output ``[T, B, D*H]``, laid out like input, or a PackedSequence; forward units come first;
    - h_n ``[L*D, B, H]``, layer-major;
    - states, h after every step, ``[L*D, T, B, H]`` (packed: ``[L*D, R, H]``); 0 past ``lengths``.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Examples:
        >>> rnn = fused_rnn.GRU(10, 20, batch_first=True)
        >>> output, h_n = rnn(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    torch_class = torchs_own("GRU")
    if TYPE_CHECKING:
        __call__: LayerCall

    @shows_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: None = None,
        recompute: bool = False,
        **options: Unpack[Options],
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "gru",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            options=options,
        )
