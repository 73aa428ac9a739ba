"""LeNet-5 on MNIST with quantized weights and activations: 8 to 2 bits. Run with --help for the options.

32C5-MP2-64C5-MP2-512FC and a linear classifier, with batch normalization. A float network is trained first; each method
starts from its weights. The first and the last layer have 8-bit weights and activations in every method but int8, which
has them everywhere and trains nothing. "float, trained on" is the float network after the training that methods take.

binary_lenet.py is the same for signs; both keep their networks in one folder, so that the float ones train once.
"""

import sys

from compressions import Entry, control, parser, reproduce

EPOCHS, QUANTIZED_EPOCHS = 8, 2
RATES = (0.0005, 0.001, 0.002, 0.004)

# Published: Louizos et al. (arXiv:1810.01875), table 1, on this network: float, RQ-ST at 8 and 2 bits, and TWN, whose
# activations are float. RQ at 2 bits has 0.76 there. The first and the last layer may have as few bits as the others
# there; here they have 8.
PUBLISHED = "0.64"
ENTRIES = {
    "float": control(RATES, 0.002, QUANTIZED_EPOCHS),
    "int8": Entry("int8, calibrated only", "int8", (0.001,), 0.001, 0, goal=0.65, published="0.56, RQ-ST 8/8"),
    "twn": Entry(
        *("TWN, activations int8", "twn", RATES, 0.002, QUANTIZED_EPOCHS),
        goal=0.68,
        published="0.65, activations float",
    ),
    "ttq": Entry("TTQ, activations int8", "ttq", RATES, 0.002, QUANTIZED_EPOCHS, goal=0.68),
    "lsq2": Entry("LSQ 2/2", "lsq2", RATES, 0.002, QUANTIZED_EPOCHS, goal=0.68),
    "dorefa2": Entry("DoReFa 2/2", "dorefa2", RATES, 0.002, QUANTIZED_EPOCHS, goal=0.68),
    "rq_st2": Entry("RQ-ST 2/2", "rq_st2", RATES, 0.001, QUANTIZED_EPOCHS, goal=0.68, published="0.63"),
}


def main() -> int:
    given = parser(__doc__, "lenet5", list(ENTRIES)).parse_args()
    return reproduce("lenet5", EPOCHS, ENTRIES, given, PUBLISHED)


if __name__ == "__main__":  # the workers of a parallel run import this file
    sys.exit(main())
