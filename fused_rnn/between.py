"""What happens between two steps of a layer: the options of its constructor, and what a call makes
of them, ``reference.Stages``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import CELLS, NORM_TENSORS, Norm, Stages, present_names
from .segments import places_of_rows

NormPlace = Literal["input", "recurrent", "sum", "cell"]


class Options(TypedDict, total=False):
    """The arguments of a constructor that become its ``BetweenSteps``."""

    norm: Literal["layer", "rms"] | None
    norm_at: Sequence[NormPlace]
    norm_eps: float
    zoneout: float | tuple[float, float]
    recurrent_dropout: float
    dropout_over_time: bool
    weight_dropout: float
    blocks: int


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_rate(name: str, value: Any) -> None:
    """As torch.nn checks dropout."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")


@dataclass(frozen=True)
class BetweenSteps:
    """What a layer does between two steps, beside its cell. Its constructor takes these by keyword.

    ``docs/between-steps.md`` has the equations. To change them later, as far as the parameters stay
    the same: ``rnn.between_steps = dataclasses.replace(rnn.between_steps, zoneout=0.05)``.

    Args:
        norm: normalise in each step, "layer" (Ba, Kiros & Hinton 2016, arXiv:1607.06450) or "rms"
            (Zhang & Sennrich 2019, arXiv:1910.07467); None: do not.
        norm_at: what is normalised, some of "input" (W x), "recurrent" (R h) and "cell" (c in the
            tanh of the output; LSTMs); "sum" (W x + R h; not GRU) may stand in for the first two.
            The parameters ``gain_ih_l0``, ``gain_hh_l0`` [G*H] (one for "sum", ``gain_l0``),
            ``gain_c_l0`` and ``shift_c_l0`` [H] begin as 1 and 0. Biases are added afterwards.
            None: "input" and "recurrent", and "cell" where there is one.
        norm_eps: added to the variance, or to the mean square.
        zoneout: probability of a unit to keep its old value in a step, while training; in
            evaluation the expectation is taken. One number, or one for h and one for c (Krueger et
            al. 2017, arXiv:1606.01305). Not with ``proj_size``.
        recurrent_dropout: probability of zeroing a unit of h where it goes into R, for the whole
            sequence, while training (Gal & Ghahramani 2016, arXiv:1512.05287).
        dropout_over_time: let ``dropout``, between layers, zero the same features in all steps.
        weight_dropout: probability of zeroing a number of R for a whole call, while training
            (Merity, Keskar & Socher 2018, arXiv:1708.02182).
        blocks: R has so many blocks on its diagonal and no more: ``weight_hh_l0`` is [G*H,
            H / blocks], whose row q*H + u multiplies the h of u's block. Not with ``proj_size``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """

    norm: str | None = None
    norm_at: tuple[str, ...] | None = None
    norm_eps: float = 1e-5
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    dropout_over_time: bool = False
    weight_dropout: float = 0.0
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.norm not in (None, "layer", "rms"):
            raise ValueError(f'norm: expected "layer", "rms" or None, got {self.norm!r}')
        self._check_places(self.norm_at)
        if not _is_number(self.norm_eps):
            raise TypeError(f"norm_eps: expected a number, got {self.norm_eps!r}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps: expected a number from 0 on, got {self.norm_eps!r}")
        self._check_zoneout(self.zoneout)
        _check_rate("recurrent_dropout", self.recurrent_dropout)
        _check_rate("weight_dropout", self.weight_dropout)
        self._check_type("dropout_over_time", bool)
        self._check_type("blocks", int)
        if self.blocks < 1:
            raise ValueError(f"blocks: expected 1 or more, got {self.blocks}")

    def _check_type(self, name: str, kind: type) -> None:
        given = type(getattr(self, name))
        if given is not kind:
            raise TypeError(f"{name} should be of type {kind.__name__}, got: {given.__name__}")

    def _check_zoneout(self, given: Any) -> None:
        if not isinstance(given, (tuple, list)):
            return _check_rate("zoneout", given)
        if len(given) != 2:
            raise ValueError(f"zoneout: expected a number or two, got {len(given)}")
        for rate in given:
            _check_rate("zoneout", rate)
        object.__setattr__(self, "zoneout", tuple(given))

    def _check_places(self, given: Any) -> None:
        known = tuple(NORM_TENSORS)
        if given is None:
            return
        if self.norm is None:
            raise ValueError(f"norm_at: expected None without norm, got {given!r}")
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"norm_at: expected a tuple of {known}, got {given!r}")
        at = tuple(given)
        object.__setattr__(self, "norm_at", at)
        if not at or len(set(at)) < len(at) or not set(at) <= set(known):
            raise ValueError(f"norm_at: expected some of {known}, each once, got {at}")
        if "sum" in at and {"input", "recurrent"} & set(at):
            raise ValueError(f'norm_at: expected "sum" without "input" and "recurrent", got {at}')

    @classmethod
    def of(cls, owner: str, options: Options) -> BetweenSteps:
        """From the keywords of a constructor of ``owner``."""
        for name in options:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{name}'")
        return cls(**options)  # type: ignore[arg-type]

    def fitting(self, owner: str, cell: str, hidden_size: int, proj_size: int) -> BetweenSteps:
        """For a layer; raises ValueError where it does not fit."""
        known = CELLS[cell]
        states = len(known.states)
        if isinstance(self.zoneout, tuple) and states == 1:
            raise ValueError(f"zoneout: expected one number, since {owner} has h alone, got two")
        if proj_size and self.rates() != (0.0, 0.0):
            raise ValueError(f"zoneout: expected 0 with proj_size, got {self.zoneout}")
        if proj_size and self.blocks > 1:
            raise ValueError(f"blocks: expected 1 with proj_size, got {self.blocks}")
        if isinstance(hidden_size, int) and hidden_size % self.blocks:
            raise ValueError(
                f"blocks: expected a divisor of hidden_size, {hidden_size}, got {self.blocks}"
            )
        if not known.recurrent_gates:
            for name in ("recurrent_dropout", "weight_dropout"):
                if getattr(self, name):
                    raise ValueError(f"{name}: expected 0, since {owner} has no recurrent matrix")
        if self.norm is None:
            return self
        places = tuple(p for p in known.norm_places if p != "sum")
        at = places if self.norm_at is None else self.norm_at
        if not set(at) <= set(known.norm_places):
            raise ValueError(
                f"norm_at: expected some of {known.norm_places}, which {owner} has, got {at}"
            )
        return replace(self, norm_at=at)

    @property
    def changed(self) -> dict[str, Any]:
        """Those that are not as torch.nn has it."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }

    @property
    def places(self) -> tuple[str, ...]:
        """What is normalised."""
        return () if self.norm is None else self.norm_at or ()

    @property
    def reshapes(self) -> bool:
        """Whether the parameters are others than torch.nn's."""
        return self.norm is not None or self.blocks > 1

    def rates(self) -> tuple[float, float]:
        """Zoneout of h, and of all other states."""
        rates = self.zoneout
        return rates if isinstance(rates, tuple) else (rates, rates)

    # --- in a call ---

    def weights_of_call(
        self, cell: str, weights: Sequence[Tensor], present: int, *, training: bool
    ) -> list[Tensor]:
        """The weights, with those of R dropped that weight_dropout says."""
        names = present_names(cell, present)
        dropping = training and self.weight_dropout > 0
        return [
            F.dropout(w, self.weight_dropout) if dropping and names[i % len(names)] == "w_hh" else w
            for i, w in enumerate(weights)
        ]

    def masks_between(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        batch: Any,
        layers: int,
        width: int,
        dropout: float,
    ) -> Tensor | None:
        """[L-1, rows of x.., width], what ``dropout`` leaves of the outputs of all layers but the
        last; drawn as torch.nn draws it, layer by layer, or for one step that is like all."""
        if layers == 1 or dropout == 0:
            return None
        rows = x.shape[:-1]
        if not self.dropout_over_time:
            ones = x.new_ones((*rows, width))
            return torch.stack([F.dropout(ones, dropout) for _ in range(layers - 1)])
        if batch_sizes is None:
            ones = x.new_ones((1, *rows[1:], width))
            return torch.stack(
                [F.dropout(ones, dropout).expand(*rows, -1) for _ in range(layers - 1)]
            )
        ones = x.new_ones((batch, width))
        sequence = places_of_rows(batch_sizes, rows[0])[1].to(x.device)
        return torch.stack([F.dropout(ones, dropout)[sequence] for _ in range(layers - 1)])

    def stages(
        self,
        cell: str,
        x: Tensor,
        batch: Any,
        runs: int,
        widths: tuple[int, int],
        *,
        training: bool,
    ) -> Stages:
        """What all engines are told. Random numbers are from torch's generator of x's device."""
        width, units = widths
        rows = x.shape[:-1].numel()
        h_mask = zoneout = None
        if training and self.recurrent_dropout > 0:
            h_mask = F.dropout(x.new_ones((runs, batch, width)), self.recurrent_dropout)
        p_h, p_c = self.rates()
        if p_h or p_c:
            others = (len(CELLS[cell].states) - 1) * units
            p = torch.cat([x.new_full((width,), p_h), x.new_full((others,), p_c)])
            if training:
                zoneout = torch.bernoulli(p.expand(runs, rows, -1))
            else:
                zoneout = p.expand(runs, 1, -1).contiguous()
        return Stages(zoneout=zoneout, h_mask=h_mask, blocks=self.blocks, norm=self.norm_of_call())

    def norm_of_call(self) -> Norm | None:
        """What all engines are told of it."""
        if self.norm is None:
            return None
        return Norm(self.norm, self.places, float(self.norm_eps))


NOTHING = BetweenSteps()  # as torch.nn has it

Init = TypeVar("Init", bound=Callable[..., None])


def shows_options(init: Init) -> Init:
    """A constructor whose ``**options`` help() and editors show by their names."""
    signature = inspect.signature(init)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for field in fields(BetweenSteps):
        of = dict(default=field.default, annotation=field.type)
        named.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **of))
    init.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return init
