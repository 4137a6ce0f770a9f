"""Recurrent cells of the literature, each in the lines of its paper, on compiled kernels.

All are layers like ``fused_rnn.LSTM``, made by ``fused_rnn.cell``: arguments, call and results are
the same, and each has its ``Cell`` for a single step. x_i stands for the row of W x + b that is of
gate i, h_i for that of R h + b. Where a paper has one bias for both, ours is the sum of two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .custom import cell

__all__ = [
    "ATR",
    "CIFG",
    "FGR",
    "GRUD",
    "LEM",
    "MGU",
    "MUT1",
    "MUT2",
    "MUT3",
    "RHN",
    "CfC",
    "CoRNN",
    "FastGRNN",
    "IndRNN",
    "JANET",
    "LeakyRNN",
    "LiGRU",
    "NFG",
    "NIAF",
    "NIG",
    "NOAF",
    "NOG",
    "NP",
    "QRNN",
    "RAN",
    "SRU",
    "UGRNN",
    "AntisymmetricRNN",
    "MinGRU",
    "MinLSTM",
    "MultiplicativeLSTM",
    "OriginalGRU",
    "PeepholeLSTM",
    "SLSTM",
    "UnICORNN",
]

New = dict[str, Tensor]


# --- Long short-term memories -------------------------------------------------------------------


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), params=("p_i", "p_f", "p_o"))
def PeepholeLSTM(x: Any, r: Any, s: Any, p: Any) -> New:
    """LSTM whose gates see the cell state of their unit.

    Gers & Schmidhuber 2000, "Recurrent nets that time and count"; the vanilla LSTM of Greff et al.
    2015 (arXiv:1503.04069): ``i = σ(x_i + h_i + p_i c)``, ``f = σ(x_f + h_f + p_f c)``,
    ``c' = f c + i tanh(x_g + h_g)``, ``o = σ(x_o + h_o + p_o c')``, ``h' = o tanh(c')``.
    """
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("f", "g", "o"), states=("h", "c"), params=("p_f", "p_o"))
def NIG(x: Any, r: Any, s: Any, p: Any) -> New:
    """No input gate: Greff et al. 2015 (arXiv:1503.04069), ``i = 1`` in ``PeepholeLSTM``."""
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("i", "g", "o"), states=("h", "c"), params=("p_i", "p_o"))
def NFG(x: Any, r: Any, s: Any, p: Any) -> New:
    """No forget gate: Greff et al. 2015 (arXiv:1503.04069), ``f = 1`` in ``PeepholeLSTM``."""
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    c = s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("i", "f", "g"), states=("h", "c"), params=("p_i", "p_f"))
def NOG(x: Any, r: Any, s: Any, p: Any) -> New:
    """No output gate: Greff et al. 2015 (arXiv:1503.04069), ``o = 1`` in ``PeepholeLSTM``."""
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    return dict(h=torch.tanh(c), c=c)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), params=("p_i", "p_f", "p_o"))
def NIAF(x: Any, r: Any, s: Any, p: Any) -> New:
    """No input activation: Greff et al. 2015 (arXiv:1503.04069), ``g = x_g + h_g``."""
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * (x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), params=("p_i", "p_f", "p_o"))
def NOAF(x: Any, r: Any, s: Any, p: Any) -> New:
    """No output activation: Greff et al. 2015 (arXiv:1503.04069), ``h' = o c'``."""
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * c, c=c)


@cell(gates=("i", "g", "o"), states=("h", "c"), params=("p_i", "p_o"))
def CIFG(x: Any, r: Any, s: Any, p: Any) -> New:
    """Coupled input and forget gate: Greff et al. 2015 (arXiv:1503.04069), ``f = 1 - i``."""
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    c = (1 - i) * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def NP(x: Any, r: Any, s: Any, p: Any) -> New:
    """No peepholes: Greff et al. 2015 (arXiv:1503.04069), ``p = 0``; the LSTM of torch.nn."""
    i = torch.sigmoid(x.i + r.i)
    f = torch.sigmoid(x.f + r.f)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o)
    return dict(h=o * torch.tanh(c), c=c)


@cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def SLSTM(x: Any, r: Any, s: Any, p: Any) -> New:
    """LSTM with exponential input gate, normaliser n and stabiliser m.

    Beck et al. 2024, "xLSTM" (arXiv:2405.04517) with a sigmoid forget gate. ``blocks=`` is its
    number of heads, whose units do not see each other's h: 1 by default.
    ``m' = max(log f + m, i)``, ``i' = exp(i - m')``, ``f' = exp(log f + m - m')``,
    ``c' = f' c + i' z``, ``n' = f' n + i'``, ``h' = o c' / n'``. Where n is 0, as at the first
    step, ``m' = i``, as in its code, and there is nothing to forget.
    """
    i = x.i + r.i
    f = F.logsigmoid(x.f + r.f) + s.m
    first = s.n == 0
    m = torch.where(first, i, torch.maximum(f, i))
    i = torch.exp(i - m)
    f = torch.exp(torch.where(first, 0, f - m))
    c = f * s.c + i * torch.tanh(x.z + r.z)
    n = f * s.n + i
    return dict(h=torch.sigmoid(x.o + r.o) * c / n, c=c, n=n, m=m)


@cell(gates=("i", "f", "g"), states=("h", "c"))
def RAN(x: Any, r: Any, s: Any, p: Any) -> New:
    """Recurrent additive network: an LSTM whose content is linear in the input alone.

    Lee, Levy & Zettlemoyer 2017 (arXiv:1705.07393): ``c' = i x_g + f c``, ``h' = tanh(c')``.
    """
    i = torch.sigmoid(x.i + r.i)
    f = torch.sigmoid(x.f + r.f)
    c = i * x.g + f * s.c
    return dict(h=torch.tanh(c), c=c)


# --- Gated units with one state -----------------------------------------------------------------


@cell(gates=("f", "g"))
def JANET(x: Any, r: Any, s: Any, p: Any, beta: float = 1.0) -> New:
    """Just another network: an LSTM with a forget gate alone.

    Van der Westhuizen & Lasenby 2018, "The unreasonable effectiveness of the forget gate"
    (arXiv:1804.04849): ``h' = σ(a) h + (1 - σ(a - beta)) tanh(x_g + h_g)``.
    """
    a = x.f + r.f
    g = torch.tanh(x.g + r.g)
    return dict(h=torch.sigmoid(a) * s.h + (1 - torch.sigmoid(a - beta)) * g)


@cell(gates=("g", "c"))
def UGRNN(x: Any, r: Any, s: Any, p: Any) -> New:
    """Update gate network.

    Collins, Sohl-Dickstein & Sussillo 2017, "Capacity and trainability in recurrent neural
    networks" (arXiv:1611.09913): ``h' = g h + (1 - g) tanh(x_c + h_c)``.
    """
    g = torch.sigmoid(x.g + r.g)
    return dict(h=g * s.h + (1 - g) * torch.tanh(x.c + r.c))


@cell(gates=("z", "c"))
def LiGRU(x: Any, r: Any, s: Any, p: Any) -> New:
    """Light gated recurrent unit, without the normalisation of the input.

    Ravanelli et al. 2018, "Light gated recurrent units for speech recognition"
    (arXiv:1803.10225): ``h' = z h + (1 - z) relu(x_c + h_c)``.
    """
    z = torch.sigmoid(x.z + r.z)
    return dict(h=z * s.h + (1 - z) * torch.relu(x.c + r.c))


@cell(gates=("a",))
def ATR(x: Any, r: Any, s: Any, p: Any) -> New:
    """Addition-subtraction twin-gated network: the sum and the difference are the gates.

    Zhang et al. 2018, "Simplifying neural machine translation with addition-subtraction twin-gated
    recurrent networks" (arXiv:1810.12546): ``h' = σ(x + h_a) x + σ(x - h_a) h``,
    where x is x_a.
    """
    i = torch.sigmoid(x.a + r.a)
    f = torch.sigmoid(x.a - r.a)
    return dict(h=i * x.a + f * s.h)


@cell(gates=("a",), params=dict(b_z=1.0, b_h=1.0, zeta=1.0, nu=-4.0))
def FastGRNN(x: Any, r: Any, s: Any, p: Any) -> New:
    """One matrix for gate and content.

    Kusupati et al. 2018, "FastGRNN" (arXiv:1901.02358): ``z = σ(a + b_z)``,
    ``h' = (ζ (1 - z) + ν) tanh(a + b_h) + z h``, where ζ and ν are sigmoids of what is trained.
    Here each unit has its own.
    """
    a = x.a + r.a
    z = torch.sigmoid(a + p.b_z)
    scale = torch.sigmoid(p.zeta) * (1 - z) + torch.sigmoid(p.nu)
    return dict(h=scale * torch.tanh(a + p.b_h) + z * s.h)


@cell(gates=("g", "f", "a", "b"))
def CfC(x: Any, r: Any, s: Any, p: Any, elapsed: float = 1.0) -> New:
    """Closed-form continuous-time network without backbone, for steps of equal length.

    Hasani et al. 2022, "Closed-form continuous-time neural networks" (arXiv:2106.13898), as in
    its code: ``t = σ(a elapsed + b)``, ``h' = (1 - t) tanh(x_g + h_g) + t tanh(x_f + h_f)``.
    """
    t = torch.sigmoid((x.a + r.a) * elapsed + (x.b + r.b))
    return dict(h=(1 - t) * torch.tanh(x.g + r.g) + t * torch.tanh(x.f + r.f))


# --- Without a gate -----------------------------------------------------------------------------


@cell(gates=("a",))
def LeakyRNN(x: Any, r: Any, s: Any, p: Any, alpha: float = 0.2) -> New:
    """Leaky integrator, a continuous-time network in steps.

    Jaeger et al. 2007, "Optimization and applications of echo state networks with leaky-integrator
    neurons": ``h' = (1 - alpha) h + alpha tanh(x_a + h_a)``.
    """
    return dict(h=(1 - alpha) * s.h + alpha * torch.tanh(x.a + r.a))


@cell(gates=("a",), params=dict(u=nn.init.uniform_))
def IndRNN(x: Any, r: Any, s: Any, p: Any) -> New:
    """Independently recurrent network: each unit sees its own state alone.

    Li et al. 2018 (arXiv:1803.04831): ``h' = relu(x_a + u h)``.
    """
    return dict(h=torch.relu(x.a + p.u * s.h))


@cell(gates=("a",))
def _Antisymmetric(x: Any, r: Any, s: Any, p: Any, epsilon: float = 0.1, gamma: float = 0.1) -> New:
    return dict(h=s.h + epsilon * torch.tanh(x.a + r.a - gamma * s.h))


class _Difference(nn.Module):
    """W - W^T, of each block of a block-diagonal W."""

    def forward(self, w: Tensor) -> Tensor:
        blocks = w.unflatten(0, (-1, w.shape[1]))
        return (blocks - blocks.transpose(1, 2)).flatten(0, 1)


class AntisymmetricRNN(_Antisymmetric):  # type: ignore[misc, valid-type]
    """A network whose recurrent matrix is W - W^T - gamma.

    Chang et al. 2019, "AntisymmetricRNN" (arXiv:1902.09689):
    ``h' = h + epsilon tanh(x_a + (W - W^T) h + b - gamma h)``. The trained W is
    ``parametrizations.weight_hh_l0.original``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.proj_size:
            raise ValueError(f"proj_size: expected 0, got {self.proj_size}")
        for name in [n for n in self._flat_weights_names if n.startswith("weight_hh")]:
            parametrize.register_parametrization(self, name, _Difference())


@cell(gates=("a",), states=("y", "z"), params=dict(w=nn.init.uniform_, c=None))
def UnICORNN(x: Any, r: Any, s: Any, p: Any, step: float = 0.1, alpha: float = 0.9) -> New:
    """Undamped independent controlled oscillators.

    Rusch & Mishra 2021, "UnICORNN" (arXiv:2103.05487):
    ``z' = z - step σ(c) (tanh(w y + x_a) + alpha y)``, ``y' = y + step σ(c) z'``.
    """
    dt = step * torch.sigmoid(p.c)
    z = s.z - dt * (torch.tanh(p.w * s.y + x.a) + alpha * s.y)
    return dict(y=s.y + dt * z, z=z)


# --- Products of W_hh with more than the state ---------------------------------------------------
#
# [v] stands for the row of R v + b that is of the gate whose name comes before.


@cell(gates=("r", "z", "n"))
def OriginalGRU(x: Any, r: Any, s: Any, p: Any) -> New:
    """Gated recurrent unit as it was published, which resets before the product.

    Cho et al. 2014 (arXiv:1406.1078): ``r = σ(x_r + h_r)``, ``z = σ(x_z + h_z)``,
    ``h' = z h + (1 - z) tanh(x_n + n[r h])``.
    """
    reset = torch.sigmoid(x.r + r.r)
    z = torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + r(reset * s.h).n)
    return dict(h=n + z * (s.h - n))


@cell(gates=("z", "r", "n"))
def MUT1(x: Any, r: Any, s: Any, p: Any) -> New:
    """The first of three cells that a search found: without h in the update gate.

    Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures":
    ``z = σ(x_z)``, ``r = σ(x_r + h_r)``, ``h' = tanh(n[r h] + tanh(x_n)) z + h (1 - z)``, where x_n
    stands for x, which has a width of its own here.
    """
    z = torch.sigmoid(x.z)
    reset = torch.sigmoid(x.r + r.r)
    n = torch.tanh(r(reset * s.h).n + torch.tanh(x.n))
    return dict(h=s.h + z * (n - s.h))


@cell(gates=("z", "r", "n"))
def MUT2(x: Any, r: Any, s: Any, p: Any) -> New:
    """The second: Jozefowicz et al. 2015, "An empirical exploration of recurrent network
    architectures": ``z = σ(x_z + h_z)``, ``r = σ(x_r + h_r)``,
    ``h' = tanh(n[r h] + x_n) z + h (1 - z)``, where x_r stands for x, which has a width of its own
    here."""
    z = torch.sigmoid(x.z + r.z)
    reset = torch.sigmoid(x.r + r.r)
    n = torch.tanh(r(reset * s.h).n + x.n)
    return dict(h=s.h + z * (n - s.h))


@cell(gates=("z", "r", "n"))
def MUT3(x: Any, r: Any, s: Any, p: Any) -> New:
    """The third: Jozefowicz et al. 2015, "An empirical exploration of recurrent network
    architectures": ``z = σ(x_z + z[tanh(h)])``, ``r = σ(x_r + h_r)``,
    ``h' = tanh(n[r h] + x_n) z + h (1 - z)``."""
    z = torch.sigmoid(x.z + r(torch.tanh(s.h)).z)
    reset = torch.sigmoid(x.r + r.r)
    n = torch.tanh(r(reset * s.h).n + x.n)
    return dict(h=s.h + z * (n - s.h))


@cell(gates=("f", "n"))
def MGU(x: Any, r: Any, s: Any, p: Any) -> New:
    """Minimal gated unit: Zhou et al. 2016 (arXiv:1603.09420): ``f = σ(x_f + h_f)``,
    ``h' = (1 - f) h + f tanh(x_n + n[f h])``."""
    f = torch.sigmoid(x.f + r.f)
    n = torch.tanh(x.n + r(f * s.h).n)
    return dict(h=s.h + f * (n - s.h))


@cell(gates=("m", "i", "f", "g", "o"), states=("h", "c"))
def MultiplicativeLSTM(x: Any, r: Any, s: Any, p: Any) -> New:
    """Each input has a transition of its own from h to the gates.

    Krause et al. 2016, "Multiplicative LSTM for sequence modelling" (arXiv:1609.07959):
    ``m = x_m h_m``, ``i = σ(x_i + i[m])``, f and o alike, ``c' = f c + i tanh(x_g + g[m])``,
    ``h' = o tanh(c')``.
    """
    m = x.m * r.m
    i = torch.sigmoid(x.i + r(m).i)
    f = torch.sigmoid(x.f + r(m).f)
    c = f * s.c + i * torch.tanh(x.g + r(m).g)
    o = torch.sigmoid(x.o + r(m).o)
    return dict(h=o * torch.tanh(c), c=c)


_OLD = ("i_i", "f_i", "o_i", "i_f", "f_f", "o_f", "i_o", "f_o", "o_o")  # i_f: to i, from f


@cell(
    gates=("i", "f", "g", "o", *_OLD),
    states=("h", "c", "i", "f", "o"),
    params=("p_i", "p_f", "p_o"),
)
def FGR(x: Any, r: Any, s: Any, p: Any) -> New:
    """Full gate recurrence: Greff et al. 2015 (arXiv:1503.04069), ``PeepholeLSTM`` whose gates
    i, f and o each have ``i_i[i] + i_f[f] + i_o[o]`` of all three, as they were before the step,
    besides."""
    of_i, of_f, of_o = r(s.i), r(s.f), r(s.o)
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c + of_i.i_i + of_f.i_f + of_o.i_o)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c + of_i.f_i + of_f.f_f + of_o.f_o)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c + of_i.o_i + of_f.o_f + of_o.o_o)
    return dict(h=o * torch.tanh(c), c=c, i=i, f=f, o=o)


@cell(gates=("n1", "t1", "n2", "t2"))
def RHN(x: Any, r: Any, s: Any, p: Any) -> New:
    """Recurrent highway network of depth 2, whose carry gate is 1 - t.

    Zilly et al. 2017 (arXiv:1607.03474): ``t1 = σ(x_t1 + h_t1)``,
    ``s1 = t1 tanh(x_n1 + h_n1) + (1 - t1) h``, ``t2 = σ(t2[s1])``,
    ``h' = t2 tanh(n2[s1]) + (1 - t2) s1``.
    """
    first = torch.lerp(s.h, torch.tanh(x.n1 + r.n1), torch.sigmoid(x.t1 + r.t1))
    return dict(h=torch.lerp(first, torch.tanh(r(first).n2), torch.sigmoid(r(first).t2)))


@cell(gates=("t", "s", "z", "y"), states=("y", "z"))
def LEM(x: Any, r: Any, s: Any, p: Any, step: float = 1.0) -> New:
    """Long expressive memory: two scales of time, of which each unit learns its own.

    Rusch et al. 2022 (arXiv:2110.04744), with step their Δt: ``t = step σ(x_t + y_t)``,
    ``s = step σ(x_s + y_s)``, ``z' = (1 - t) z + t tanh(x_z + y_z)``,
    ``y' = (1 - s) y + s tanh(x_y + y[z'])``.
    """
    z = torch.lerp(s.z, torch.tanh(x.z + r.z), step * torch.sigmoid(x.t + r.t))
    y = torch.lerp(s.y, torch.tanh(x.y + r(z).y), step * torch.sigmoid(x.s + r.s))
    return dict(y=y, z=z)


@cell(gates=("y", "z"), states=("y", "z"))
def CoRNN(
    x: Any, r: Any, s: Any, p: Any, step: float = 0.05, gamma: float = 1.0, epsilon: float = 1.0
) -> New:
    """Coupled oscillators. x_y is the whole part of the input.

    Rusch & Mishra 2021, "Coupled oscillatory recurrent neural network" (arXiv:2010.00951), in the
    explicit form: ``z' = z + step (tanh(x_y + y[y] + z[z]) - gamma y - epsilon z)``,
    ``y' = y + step z'``.
    """
    force = torch.tanh(x.y + r.y + r(s.z).z)
    z = s.z + step * (force - gamma * s.y - epsilon * s.z)
    return dict(y=s.y + step * z, z=z)


@cell(gates=("r", "z", "n"), given=("decay",))
def GRUD(x: Any, r: Any, s: Any, p: Any) -> New:
    """GRU for series with missing values, whose state fades as time passes: ``decay`` [T, B, H]
    says what is left of it.

    Che et al. 2018, "Recurrent neural networks for multivariate time series with missing values"
    (arXiv:1606.01865): ``h = decay h``, then ``r = σ(x_r + r[h])``, ``z = σ(x_z + z[h])``,
    ``h' = (1 - z) h + z tanh(x_n + n[r h])``. Their decay is exp(-relu(W δ + b)) of the time δ
    since a value was seen, and x has the values, or what stands for them, and beside them which of
    them are there.
    """
    h = x.decay * s.h
    reset = torch.sigmoid(x.r + r(h).r)
    z = torch.sigmoid(x.z + r(h).z)
    n = torch.tanh(x.n + r(reset * h).n)
    return dict(h=h + z * (n - h))


# --- Linear in the state, gates of the input alone ----------------------------------------------


@cell(gates=("g", "f", "r", "skip"), states=("h", "c"), params=("v_f", "v_r"))
def SRU(x: Any, r: Any, s: Any, p: Any) -> New:
    """Simple recurrent unit, with a matrix on the way around it.

    Lei et al. 2018, "Simple recurrent units for highly parallelizable recurrence"
    (arXiv:1709.02755): ``f = σ(x_f + v_f c)``, ``c' = f c + (1 - f) x_g``,
    ``r = σ(x_r + v_r c)``, ``h' = r c' + (1 - r) x_skip``.
    """
    f = torch.sigmoid(x.f + p.v_f * s.c)
    reset = torch.sigmoid(x.r + p.v_r * s.c)
    c = f * s.c + (1 - f) * x.g
    return dict(h=reset * c + (1 - reset) * x.skip, c=c)


@cell(gates=("z", "f", "o"), states=("h", "c"))
def QRNN(x: Any, r: Any, s: Any, p: Any) -> New:
    """Quasi-recurrent network: fo-pooling over gates of one step.

    Bradbury et al. 2017 (arXiv:1611.01576): ``c' = f c + (1 - f) tanh(x_z)``,
    ``h' = o c'``. For a convolution of width k give it k steps of the input side by side.
    """
    f = torch.sigmoid(x.f)
    c = f * s.c + (1 - f) * torch.tanh(x.z)
    return dict(h=torch.sigmoid(x.o) * c, c=c)


@cell(gates=("z", "g"))
def MinGRU(x: Any, r: Any, s: Any, p: Any) -> New:
    """Minimal GRU: Feng et al. 2024, "Were RNNs all we needed?" (arXiv:2410.01201):
    ``h' = (1 - z) h + z x_g``."""
    z = torch.sigmoid(x.z)
    return dict(h=(1 - z) * s.h + z * x.g)


@cell(gates=("f", "i", "g"))
def MinLSTM(x: Any, r: Any, s: Any, p: Any) -> New:
    """Minimal LSTM: Feng et al. 2024, "Were RNNs all we needed?" (arXiv:2410.01201):
    ``h' = (f h + i x_g) / (f + i)``."""
    f = torch.sigmoid(x.f)
    i = torch.sigmoid(x.i)
    both = f + i
    return dict(h=f / both * s.h + i / both * x.g)
