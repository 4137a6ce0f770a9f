"""opacus: private training on its own layer, which keeps a gradient for each sample; then ours.

opacus takes our layers for torch.nn's: it says that it cannot train them, and puts its DPLSTM in
their place. That has the same parameters, so that what was trained serves on our kernels.
"""

from __future__ import annotations

import torch
from measure import compare
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_rnn

SAMPLES, STEPS, INPUTS, UNITS = 64, 32, 16, 64


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.LSTM(INPUTS, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y[:, -1])


def main() -> None:
    x, target = torch.randn(SAMPLES, STEPS, INPUTS), torch.randint(2, (SAMPLES,))
    private = ModuleValidator.fix(Classifier())
    optimizer = torch.optim.SGD(private.parameters(), lr=0.1)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=private,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, target), batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for rows, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows), labels).backward()
        optimizer.step()

    serving = Classifier()
    missing, _ = serving.load_state_dict(private.state_dict(), strict=False)  # it has more names
    assert not missing
    with torch.no_grad():
        compare({"DPLSTM": lambda: private.eval()(x), "fused_rnn": lambda: serving.eval()(x)})


if __name__ == "__main__":
    main()
