"""A hybrid CNN on handwritten digits: a quantum convolution in front, ordinary layers behind, one optimizer."""

import torch
from torch import nn

from qconv import QuantumConv2d
from qconv.data import load_dataset
from qconv.train import evaluate, fit

split = load_dataset("digits").split(seed=0)
torch.manual_seed(0)
model = nn.Sequential(
    QuantumConv2d(1, 8, kernel_size=2, bias=True),  # (B, 1, 8, 8) -> (B, 8, 7, 7): two filters of four qubits
    nn.ReLU(),
    nn.Conv2d(8, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(16 * 9, 10),
)
print(model[0])
print(f"runs on {model[0].backend}\n")

fit(
    model,
    *split.train,
    epochs=15,
    lr=0.02,
    seed=0,
    on_epoch=lambda epoch, loss: print(f"epoch {epoch:2}: training loss {loss:.3f}") if epoch % 5 == 0 else None,
)
score = evaluate(model, *split.test)
print(f"test accuracy {100 * score.accuracy:.1f} % on {score.n} images the model never saw")
