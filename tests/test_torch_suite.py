"""torch's own module database, with our classes put in: inputs, references, error inputs.

The entries are torch's (torch.testing._internal.common_modules); the checks are our own.
"""

from __future__ import annotations

import copy
import pickle
import unittest
from typing import Any

import pytest
import torch
from helpers import assert_all_close, flatten
from torch import nn

import fused_rnn

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.testing._internal.common_device_type import instantiate_device_type_tests  # noqa: E402
from torch.testing._internal.common_modules import module_db, modules  # noqa: E402
from torch.testing._internal.common_utils import TestCase  # noqa: E402

pytestmark = pytest.mark.module

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def ours(info: Any) -> Any:
    info = copy.copy(info)
    info.module_cls = getattr(fused_rnn, info.module_cls.__name__)
    info.decorators = ()  # these skip what cuDNN cannot do
    return info


OUR_DB = [ours(i) for i in module_db if i.module_cls in [getattr(nn, n) for n in NAMES]]


class TestDatabase(TestCase):
    """Loops inside the methods: torch makes one test for each class, dtype and training flag."""

    @pytest.fixture(autouse=True)
    def know_the_seed(self, seed: int) -> None:
        self.seed = seed

    def samples(self, info: Any, device: str, dtype: torch.dtype, training: bool) -> list[Any]:
        inputs = info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=True, training=training
        )
        pairs = []
        for sample in inputs:
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            module = info.module_cls(*args, **kwargs).to(device, dtype).train(training)
            pairs.append((module, sample))
        assert pairs
        return pairs

    def call(self, module: nn.Module, sample: Any) -> Any:
        return module(*sample.forward_input.args, **sample.forward_input.kwargs)

    @modules(OUR_DB)
    def test_forward(
        self, device: str, dtype: torch.dtype, module_info: Any, training: bool
    ) -> None:
        for module, sample in self.samples(module_info, device, dtype, training):
            outputs = self.call(module, sample)
            if sample.reference_fn is not None:
                arguments = copy.deepcopy(sample.forward_input)
                reference = sample.reference_fn(module, *arguments.args, **arguments.kwargs)
                assert_all_close(outputs, reference, tol=1e-5)

    @modules(OUR_DB)
    def test_copies(
        self, device: str, dtype: torch.dtype, module_info: Any, training: bool
    ) -> None:
        for module, sample in self.samples(module_info, device, dtype, training):
            expected = flatten(self.call(module, sample))
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert_all_close(flatten(self.call(twin, sample)), expected, tol=0)

    @modules(OUR_DB, allowed_dtypes=[torch.float64])
    def test_gradients(
        self, device: str, dtype: torch.dtype, module_info: Any, training: bool
    ) -> None:
        """Of some samples, others each time."""
        samples = self.samples(module_info, device, dtype, training)
        step = min(10, len(samples))
        for module, sample in samples[self.seed % step :: step]:
            parameters = dict(module.named_parameters())
            arguments = [t for t in flatten(sample.forward_input.args) if t.requires_grad]

            def call(
                *tensors: Any,
                module: nn.Module = module,
                sample: Any = sample,
                names: tuple[str, ...] = tuple(parameters),
            ) -> Any:
                weights = dict(zip(names, tensors, strict=False))
                rest = list(tensors[len(names) :])
                args = replace_tensors(sample.forward_input.args, rest)
                return tuple(flatten(torch.func.functional_call(module, weights, args)))

            inputs = (*parameters.values(), *arguments)
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)

    @modules(OUR_DB)
    def test_non_contiguous(
        self, device: str, dtype: torch.dtype, module_info: Any, training: bool
    ) -> None:
        for module, sample in self.samples(module_info, device, dtype, training):
            expected = flatten(self.call(module, sample))
            odd = [
                torch.stack([t, t], -1)[..., 1].detach() for t in flatten(sample.forward_input.args)
            ]
            args = replace_tensors(sample.forward_input.args, odd)
            assert_all_close(flatten(module(*args)), expected, tol=1e-5)

    @modules([i for i in OUR_DB if i.module_error_inputs_func is not None])
    def test_errors(
        self, device: str, dtype: torch.dtype, module_info: Any, training: bool
    ) -> None:
        found = module_info.module_error_inputs_func(
            module_info, device=device, dtype=dtype, requires_grad=False, training=training
        )
        for error_input in found:
            sample = error_input.module_error_input
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs

            def provoke(args: Any = args, kwargs: Any = kwargs, sample: Any = sample) -> None:
                self.call(module_info.module_cls(*args, **kwargs), sample)

            with self.assertRaisesRegex(error_input.error_type, error_input.error_regex):
                provoke()


def replace_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The same structure with its tensors taken from the front of the list."""
    if isinstance(value, torch.Tensor):
        return tensors.pop(0)
    return tuple(replace_tensors(item, tensors) for item in value) if value is not None else None


instantiate_device_type_tests(TestDatabase, globals(), only_for=("cpu",))

if __name__ == "__main__":
    unittest.main()
