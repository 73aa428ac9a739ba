"""A network of weights -1 and +1: trained as the law of its random bits, then fixed in four ways.

Training carries means and variances, so it is plain gradient descent. At test time each weight takes its likelier value
("map"), or 0 where that is in doubt ("ternary"), or is drawn, once or for several networks that vote. Fixed weights
have other sums than random ones: statistics of the norms, estimated anew on training images, make up for it.
"""

import torch
from torch import nn

from qconv import (
    BinaryActivation,
    PixelBits,
    ProbabilisticBinaryConv2d,
    ProbabilisticBinaryLinear,
    ProbabilisticMaxPool2d,
    StochasticBatchNorm2d,
    binarize,
    ensemble,
    reestimate,
)
from qconv.data import load_dataset
from qconv.energy import count
from qconv.train import evaluate, fit

split = load_dataset("digits").split(seed=0)
torch.manual_seed(0)
model = nn.Sequential(
    PixelBits(),  # a pixel is the probability of a bit +1
    ProbabilisticBinaryConv2d(1, 16, 3),  # (B, 1, 8, 8) -> (B, 16, 6, 6): moments, their norm, means of bits
    ProbabilisticBinaryConv2d(16, 32, 3, norm=False, output="moments"),  # -> (B, 32, 4, 4): moments, to be pooled
    ProbabilisticMaxPool2d(2),
    StochasticBatchNorm2d(32),
    BinaryActivation(),
    nn.Flatten(),
    ProbabilisticBinaryLinear(128, 10, output="mean", gamma=3.0),  # scores for a softmax
)
fit(model, *split.train, epochs=15, lr=0.1, seed=0)
score = evaluate(model, *split.test)
print(f"random bits, by their law: test accuracy {100 * score.accuracy:.1f} % on {score.n} images\n")

draws = torch.Generator().manual_seed(0)
networks = {
    "map": binarize(model),
    "ternary": binarize(model, "ternary"),
    "one draw": binarize(model, "sample", draws),
    "8 draws": ensemble(model, 8, draws),
}
batches = split.train.images.split(64)
print("weights  | norms as trained | estimated anew | multiply-accumulates of an image")
for name, network in networks.items():
    before = evaluate(network, *split.test)
    reestimate(network, batches)
    after = evaluate(network, *split.test)
    macs = ", ".join(f"{n:,} {kind}" for kind, n in sorted(count(network, (1, 8, 8)).macs().items()))
    print(f"{name:8} | {100 * before.accuracy:14.1f} % | {100 * after.accuracy:12.1f} % | {macs}")
