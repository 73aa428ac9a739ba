"""LeNet-5 on MNIST with weights and activations of one bit. Run with --help for the options.

The network and the float training of quantized_lenet.py, in the same folder. The first and the last layer have 8-bit
weights and activations. "float, trained on" is the float network after the training that both methods take.
"""

import sys

from compressions import Entry, control, parser, reproduce
from quantized_lenet import EPOCHS, PUBLISHED

SIGN_EPOCHS = 5
RATES = (0.001, 0.002, 0.004, 0.008)  # latent weights that have to change sign take larger steps

# Published: Hubara et al. (arXiv:1602.02830), linear layers, second-hand.
ENTRIES = {
    "float": control(RATES, 0.004, SIGN_EPOCHS),
    "xnor": Entry("XNOR-Net", "xnor", RATES, 0.004, SIGN_EPOCHS, goal=0.8),
    "bnn": Entry("BNN", "bnn", RATES, 0.004, SIGN_EPOCHS, goal=1.0, published="about 0.96, linear layers"),
}


def main() -> int:
    given = parser(__doc__, "lenet5", list(ENTRIES)).parse_args()
    return reproduce("lenet5", EPOCHS, ENTRIES, given, PUBLISHED)


if __name__ == "__main__":  # the workers of a parallel run import this file
    sys.exit(main())
