"""LeNet-300-100 on MNIST, pruned, with shared weights and Huffman coding. Run with --help for the options.

Deep Compression (Han, Mao & Dally, arXiv:1510.00149) with three changes: weights are pruned while the network trains,
by the cubic schedule of Zhu & Gupta (arXiv:1710.01878) and over all layers together; the pruned network learns from
the float network's scores as well as from the labels (Hinton, Vinyals & Dean, arXiv:1503.02531); biases have 8 bits.
"float, trained on" is the float network after the same training, without pruning.
"""

import sys

from compressions import Entry, control, parser, reproduce

EPOCHS, PRUNING_EPOCHS = 20, 40
RATES = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)
DEEP = "prune+share+huffman"

PUBLISHED = "1.64"  # Han, Mao & Dally, as their abstract's table says; so is the row of 40 times smaller
ENTRIES = {
    "float": control(RATES, 0.001, PRUNING_EPOCHS),
    "12x": Entry("12 times fewer weights", "prune", RATES, 0.001, PRUNING_EPOCHS, None, 1 - 1 / 12, 1.65),
    "19x": Entry(
        "19 times fewer, 8 values a layer",
        *(DEEP, RATES, 0.0005, PRUNING_EPOCHS, 3, 1 - 1 / 19, 1.75, 60),
        published="1.58, 40 times smaller",
    ),
    "32x": Entry("32 times fewer, 8 values a layer", DEEP, RATES, 0.004, PRUNING_EPOCHS, 3, 1 - 1 / 32, 2.2, 100),
}


def main() -> int:
    given = parser(__doc__, "pruned_lenet", list(ENTRIES)).parse_args()
    return reproduce("lenet300", EPOCHS, ENTRIES, given, PUBLISHED)


if __name__ == "__main__":  # the workers of a parallel run import this file
    sys.exit(main())
