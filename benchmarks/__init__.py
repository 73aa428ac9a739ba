"""What a quantum convolution costs beside nn.Conv2d and beside other simulators."""
