"""QuantLinear as a drop-in: swap a model's linears for 4-bit ones and train a low-rank adapter on top.

    python examples/train_adapter.py

The codes stay as they are; gradients pass through them to the adapters, as in QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import epmq


class Adapted(nn.Module):
    """A frozen layer plus ``scale · B · A``; B starts at zero, so nothing changes before training."""

    def __init__(self, layer: epmq.QuantLinear, rank: int = 4, scale: float = 2.0):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), scale
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + self.scale * ((x @ self.a.T) @ self.b.T)
        return output


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))
    x = torch.randn(512, 64)
    wanted = torch.sin(x[:, :8] * 2.0)

    swapped = epmq.replace_linear(model, bits=4, group_size=32, include=["^[02]$"])
    before = model(x)
    for name in swapped:
        layer = model.get_submodule(name)
        assert isinstance(layer, epmq.QuantLinear)
        setattr(model, name, Adapted(layer))
    assert torch.equal(model(x), before)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("packed")}

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(201):
        loss = nn.functional.mse_loss(model(x), wanted)
        if step % 50 == 0:
            print(f"step {step:3}: loss {float(loss.detach()):.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in codes.items())
    count = sum(parameter.numel() for parameter in trained)
    print(f"{len(swapped)} linears in 4 bits, their codes unchanged; {count} numbers were trained")


if __name__ == "__main__":
    main()
