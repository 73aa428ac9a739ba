"""Sizes of tensor networks before anything is allocated: what would fill a machine is refused, with numbers."""

from __future__ import annotations

from math import prod

from qconv.tensors.structures import Shape, Structure

MOST_CORES = 2**30  # bytes of all cores of a layer
# Numbers a patch of the largest tensor, all groups together: 8 MiB of float32, as the state of 20 qubits has.
MOST_PATCH = 2**21
MOST_IMAGE = 2**28  # numbers an image of the largest tensor: 1 GiB of float32
_MOST_MOMENTS = 2**27  # numbers in the covariance of one site's vector: 1 GiB of float64
_MOST_SAMPLES, _FEWEST_SAMPLES = 2048, 32  # random patches that set the scale of fresh outputs
_SAMPLED = 2**25  # numbers (256 MiB of float64) in the largest tensor of all random patches, above the fewest

_ADVICE = {
    "mps": "use a smaller bond_dim or kernel, fewer channels, or more groups",
    "tree": "use a smaller bond_dim or kernel, fewer channels, or more groups",
    "mera": 'use a smaller kernel or bond_dim, or structure "tree", whose cost a site does not grow with their number',
    "eps": 'use a smaller kernel or fewer channels, or structure "mps"',
}


def _counted(number: int, size: int = 4) -> str:
    # Numbers of thousands of digits say nothing, and Python refuses to write them.
    if number.bit_length() > 64:
        return f"over 2^{number.bit_length() - 1} numbers"
    return f"{number:,} numbers, {number * size:,} bytes"


def _in_groups(groups: int) -> str:
    return f" in {groups} groups" if groups > 1 else ""


def check_sites(shape: Shape, groups: int) -> None:
    """Refuse so many sites, or so large ones, that their vectors alone are too much; before the network is laid out.

    Raises:
        ValueError: For these.
    """
    vectors = groups * shape.sites * shape.dim
    if vectors > MOST_PATCH:
        raise ValueError(
            f"{shape.sites} sites of dimension {shape.dim}{_in_groups(groups)} are {_counted(vectors)} a patch; at "
            f"most {_counted(MOST_PATCH)} are taken: use a smaller kernel, fewer channels, or a smaller feature map"
        )
    if shape.dim**2 > _MOST_MOMENTS:
        raise ValueError(
            f"a site has dimension {shape.dim}, whose covariance has {_counted(shape.dim**2, 8)}; at most "
            f"{_counted(_MOST_MOMENTS, 8)} are taken: use fewer channels a group, or site='feature'"
        )


def check_network(structure: str, network: Structure, groups: int, itemsize: int) -> None:
    """Refuse cores, or an intermediate tensor of one patch, that are too large.

    Args:
        structure: Its name.
        network: One group's.
        groups: How many of them.
        itemsize: Bytes of a number.

    Raises:
        ValueError: For these.
    """
    shape = network.shape
    what = f'structure "{structure}" with {shape.sites} sites of dimension {shape.dim}, {shape.outputs} outputs'
    what += f" and bond_dim {shape.bond}" if structure != "eps" else ""
    what += _in_groups(groups)
    numbers = groups * sum(prod(core) for core in network.shapes)
    if numbers * itemsize > MOST_CORES:
        raise ValueError(
            f"{what} has cores of {_counted(numbers, itemsize)}; at most {MOST_CORES:,} bytes are made: "
            f"{_ADVICE[structure]}"
        )
    width = groups * network.width()
    if width > MOST_PATCH:
        raise ValueError(
            f"{what} makes a tensor of {_counted(width, itemsize)} for every patch; at most "
            f"{_counted(MOST_PATCH, itemsize)} are made: {_ADVICE[structure]}"
        )


def check_image(numbers: int, patches: int, itemsize: int) -> None:
    """Refuse an image whose patches are too much together, for a tensor of so many numbers a patch.

    Raises:
        ValueError: For such an image.
    """
    if numbers * patches > MOST_IMAGE:
        raise ValueError(
            f"{patches} patches of one image make a tensor of {_counted(numbers * patches, itemsize)}; at most "
            f"{_counted(MOST_IMAGE, itemsize)} are made: use smaller images, a larger stride, or a smaller bond_dim"
        )


def samples(network: Structure, groups: int) -> int:
    """How many random patches set the scale of a fresh network: fewer where they would take much memory."""
    shape = network.shape
    numbers = groups * max(network.width(), shape.sites * shape.dim)
    return max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, _SAMPLED // numbers))
