"""Cells from Python whose update is affine, of kinds that fused_rnn.zoo has none of, as text."""

from __future__ import annotations

from random_cells import Drawn

# The highway of SRU reads the new state alone, so that this one is no peephole.
SRU = Drawn(
    ("g", "f", "r", "skip"),
    ("h", "c"),
    (),
    "h",
    (),
    """def Drawn(x, r, s, p):
    f = torch.sigmoid(x.f)
    c = f * s.c + (1 - f) * x.g
    reset = torch.sigmoid(x.r)
    return dict(h=reset * c + (1 - reset) * x.skip, c=c)
""",
)
# A complex state: two that are mixed with each other; its decay and its angle are trained.
ROTATION = Drawn(
    ("a", "b"),
    ("re", "im", "y"),
    ("decay", "angle"),
    "y",
    (),
    """def Drawn(x, r, s, p):
    size, c, d = torch.sigmoid(p.decay), torch.cos(p.angle), torch.sin(p.angle)
    re = size * (c * s.re - d * s.im) + x.a
    im = size * (d * s.re + c * s.im) + x.b
    return dict(re=re, im=im, y=torch.tanh(re) * im)
""",
)
# With values given for each step, choices, and a factor beyond 1. The backward reads the new h.
CHOICES = Drawn(
    ("a", "b"),
    ("h", "c"),
    ("u",),
    "h",
    ("keep", "more"),
    """def Drawn(x, r, s, p):
    kept = torch.where(x.keep > 0.4, s.c / (1 + x.more), 1.05 * s.c) - p.u * x.a
    c = -(-kept + torch.where(x.b > 0, x.b, -0.3 * s.c * x.more))
    return dict(h=torch.tanh(c), c=c)
""",
)
ALL = (SRU, ROTATION, CHOICES)
