"""Convolutions whose kernel is a tensor network: nn.Conv2d's geometry around a multilinear function of a patch."""

from __future__ import annotations

from collections import Counter
from math import prod, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from circuits.naming import unknown
from qconv.patch_conv import PatchConv2d
from qconv.patches import Pair, fold, pad, whole
from qconv.tensors.feature_maps import FeatureMap
from qconv.tensors.mera import Mera
from qconv.tensors.sizes import check_image, check_network, check_sites, samples
from qconv.tensors.spectra import distance, plaquette_values, spectra, truncated
from qconv.tensors.structures import Plaquette, Shape, Structure, Tree, binary, chains

STRUCTURES = ("mps", "tree", "mera", "eps")
ORDERS = ("snake", "raster")
SITES = ("pixel", "feature")
# Numbers in the largest tensor (8 MiB of float32) that is made at a time on a CPU: larger ones leave the cache, and
# above some 32 MiB the C library maps every one into fresh memory.
_BLOCK = 2**21
_AFFORDABLE = 2**27  # numbers kept for the backward pass (512 MiB of float32) before "auto" recomputes them
_LONG = 15  # sites; products of more vectors are tiny or huge on images that are not the random ones of the start
_EVERY = 7  # sites between two divisions by the norm


class TensorNetworkConv2d(PatchConv2d):
    """A convolution whose kernel is a tensor network; a drop-in for nn.Conv2d.

    Each site x_j of a patch is mapped to a vector phi(x_j), and output o is <W_o, phi(x_1) (x) ... (x) phi(x_N)> with W
    a tensor network over the N sites and the output leg. All patches share it; groups have networks of their own.
    With the kernel as large as the image the layer is a classifier. `schmidt_spectra` and `entanglement_entropies` say
    how entangled it is, `truncate` shortens its bonds, and `qconv.tensors.circuits` writes one of bonds up to 4 as a
    circuit.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output: the output leg has out_channels / groups values.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d, "same" and "valid" included; the padded pixels are mapped as any others.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: Whether to add a trainable bias, started at 0; unlike nn.Conv2d's, off by default.
        padding_mode: As nn.Conv2d.
        structure: "mps": a matrix product state, the output leg on a core of its own between the two middle sites.
            "tree": a binary tree, neighbors first; where a level has an odd number of blocks the last goes up as it
            is; the output leg is the root's. "mera": that tree with a gate across neighboring blocks before each
            coarse graining; exact, at a cost that grows exponentially with the level: for up to some 25 sites and
            bonds to 4 (over 2^21 numbers a patch are refused). "eps": an entangled plaquette state, one core of dim^N
            numbers an output (up to 2^18), no bonds.
        bond_dim: Largest bond, at least 1. Bonds never exceed what the sites under them can use. "eps" ignores it.
        feature_map: "cos_sin", "one_cos_sin", "polynomial", "sin2_cos2", "identity", or a
            `qconv.tensors.feature_maps.FeatureMap` with its own degree or scale. Inputs belong in [0, 1], for which
            fresh outputs are scaled; means h of bits go there by (1 + h) / 2. Nothing is refused: beyond, cosines and
            sines wrap around, powers grow, and fresh outputs may be very small or large.
        site: "pixel": a site is a pixel, whose vector has the maps of all channels of the group side by side (dimension
            about d * channels): N = taps. "feature": every number is a site: N = channels * taps, in nn.Unfold's order
            (channel, row, column). For one channel both are the same.
        order: In which order sites stand in the network: "snake" (every second row backwards, so that neighbors in the
            chain are neighbors in the patch) or "raster".
        normalize: Divide bond vectors by their norm, at about every 7th site and at the root ("mera": there alone), so
            that networks of many sites neither overflow nor vanish, on black patches neither: outputs of one patch and
            group are divided by a positive number, which changes no argmax but makes the layer no longer multilinear.
            "auto": only for more than 15 sites. Not for "eps", nor where bonds have one number, which has no direction.
        checkpoint: Whether the backward pass recomputes the contraction, block by block of patches, instead of keeping
            it; "auto": where it would keep more than 512 MiB of float32. Where it recomputes, transforms that
            differentiate (torch.func.grad, jacrev, jacfwd, ...) do not work, as torch's own checkpoints do not.
        device: As nn.Conv2d.
        dtype: torch.float32 (default) or torch.float64.

    Attributes:
        weight: (groups, numbers in all cores), the one trainable parameter besides bias; `cores` gives its parts.

    Raises:
        ValueError: For arguments that do not fit each other, unknown names, or a network too large: cores of over
            1 GiB, a tensor of over 2^21 numbers for every patch, or an "eps" core of over 2^18 an output. In a call on
            the CPU, for an image whose patches make a tensor of over 2^28 numbers.

    Source: Stoudenmire & Schwab (arXiv:1605.05775) and Efthymiou et al. (arXiv:1906.06329) for matrix product states;
        Liu et al. (arXiv:1710.04833) for trees; Blagoveschensky & Phan (arXiv:2005.14506) for plaquettes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        structure: str = "mps",
        bond_dim: int = 4,
        feature_map: str | FeatureMap = "cos_sin",
        site: str = "pixel",
        order: str = "snake",
        normalize: bool | Literal["auto"] = "auto",
        checkpoint: bool | Literal["auto"] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        for name, value, known in (
            ("structure", structure, STRUCTURES),
            ("site", site, SITES),
            ("order", order, ORDERS),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for name, switch in (("normalize", normalize), ("checkpoint", checkpoint)):
            if switch not in (True, False, "auto"):
                raise ValueError(f'{name} is {switch!r}: give True, False or "auto"')
        self.structure, self.site, self.order, self.checkpoint = structure, site, order, checkpoint
        self.bond_dim = whole(bond_dim, "bond_dim", 1)
        self.feature_map = FeatureMap(feature_map) if isinstance(feature_map, str) else feature_map
        if not isinstance(self.feature_map, FeatureMap):
            raise ValueError(f"feature_map is a {type(feature_map).__name__}: give a name or a FeatureMap")
        channels = in_channels // groups
        # Lines: networks' sites a tap; numbers: what one site maps.
        self._lines, self._numbers = (1, channels) if site == "pixel" else (channels, 1)
        shape = Shape(
            self._lines * self.geometry.taps,
            self.feature_map.size(self._numbers),
            out_channels // groups,
            self.bond_dim,
        )
        check_sites(shape, groups)
        self.network = _network(structure, shape, False)
        check_network(structure, self.network, groups, (dtype or torch.get_default_dtype()).itemsize)
        directions = structure != "eps" and prod(self.network.shapes[-1][1:]) > 1
        self.normalize = shape.sites > _LONG and directions if normalize == "auto" else normalize
        if self.normalize:
            if not directions:
                raise ValueError(
                    f'normalize is True but structure "{structure}" with sites of dimension {shape.dim} and bond_dim '
                    f"{bond_dim} has no bonds of 2 numbers or more to divide: use normalize=False, or other bonds"
                )
            self.network = _network(structure, shape, True)
        weight = torch.empty(groups, sum(prod(s) for s in self.network.shapes), device=device, dtype=dtype)
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {weight.dtype}: a tensor network needs torch.float32 or torch.float64")
        self.weight = nn.Parameter(weight)
        self._make_bias(bias, weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new cores from torch's global generator.

        Chains start near the identity, trees near a sum of random linear features; the core of the output leg is then
        centered and scaled, so that for inputs uniform on [0, 1] outputs have mean 0 and variance 1: on random patches
        (2048, or fewer where these would take much memory), for the feature map "identity" by exact moments wherever
        nothing is divided. One number a site is not centered: its network is one product of all sites.
        """
        if self.weight.is_meta:
            return
        with torch.no_grad():
            moments = self.feature_map.moments(self._numbers)
            count, shape = samples(self.network, self.groups), self.network.shape
            draws = torch.rand(self.groups * shape.sites, self._numbers, count, dtype=torch.float64)
            sites = self.feature_map(draws).reshape(self.groups, -1, shape.dim, count).unbind(1)
            cores = self.network.initial(moments, sites)
            self.weight.copy_(torch.cat([core.flatten(1) for core in cores], 1))
            if self.bias is not None:
                self.bias.zero_()

    def _split(self, weight: Tensor) -> list[Tensor]:
        """Cores (groups, *shape)."""
        shapes = self.network.shapes
        # One split for all cores: its backward pass writes the gradient once.
        parts = torch.split(weight, [prod(shape) for shape in shapes], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _places(self) -> list[tuple[int, int, int]]:
        """(line, row, column) under the kernel of each site, in the network's order."""
        rows, columns = self.geometry.kernel_size
        return [
            (line, row, columns - 1 - column if self.order == "snake" and row % 2 else column)
            for line in range(self._lines)
            for row in range(rows)
            for column in range(columns)
        ]

    def convolve(self, images: Tensor) -> Tensor:
        """See PatchConv2d."""
        padded = pad(images, self.geometry)
        size = self.geometry.output_size(images.shape[-2], images.shape[-1])
        # Features once a pixel, not once a patch; patches are last so that every operation runs along them.
        networks = self.groups * self._lines
        pixels = padded.movedim(0, 1).reshape(networks, self._numbers, padded.shape[0], *padded.shape[-2:])
        mapped = self.feature_map(pixels)
        mapped = mapped.reshape(self.groups, self._lines, *mapped.shape[1:])
        return fold(self._in_blocks(mapped, size).flatten(0, 1).t(), images.shape[0], size)

    def _in_blocks(self, mapped: Tensor, size: Pair) -> Tensor:
        """Evaluate some images at a time, where that is faster or where a block is recomputed; see _evaluate."""
        again = self._recomputes(mapped, size)
        # What one block keeps while it is recomputed is many times its largest tensor.
        limit = _BLOCK // 8 if again else _BLOCK
        # One block where shapes are symbols, for any batch size must fit, and on devices that want large tensors.
        if not again and (not mapped.is_cpu or torch.compiler.is_compiling()):
            return self._evaluate(mapped, size, self.weight)
        width = self.groups * self.network.width()
        check_image(width, size[0] * size[1], self.weight.itemsize)
        images = max(1, limit // (width * size[0] * size[1]))
        blocks = torch.split(mapped, images, 3) if images < mapped.shape[3] else (mapped,)
        if again:
            # The weight is an argument: a checkpoint recomputes with what it was given.
            values = [recompute(self._evaluate, block, size, self.weight, use_reentrant=False) for block in blocks]
        else:
            values = [self._evaluate(block, size, self.weight) for block in blocks]
        return torch.cat(values, -1) if len(values) > 1 else values[0]

    def _evaluate(self, mapped: Tensor, size: Pair, weight: Tensor) -> Tensor:
        """Outputs (groups, outputs, patches) of pixels' vectors (groups, lines, dim, B, H, W)."""
        (down, right), (rows, columns) = self.geometry.stride, self.geometry.dilation
        sites = []
        for line, row, column in self._places():
            top, left = row * rows, column * columns
            view = mapped[:, line, :, :, top : top + (size[0] - 1) * down + 1 : down]
            sites.append(view[..., left : left + (size[1] - 1) * right + 1 : right].flatten(2))
        return self.network.contract(sites, self._split(weight))

    def _recomputes(self, mapped: Tensor, size: Pair) -> bool:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return False
        patches = mapped.shape[3] * size[0] * size[1]
        return self.checkpoint is True or self.groups * patches * self.network.saved() > _AFFORDABLE

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """Outputs of one group, see PatchConv2d: patches (P, features) in nn.Unfold's order, weights (1, numbers)."""
        pixels = patches.t().reshape(self._lines, self._numbers, *self.geometry.kernel_size, -1)
        mapped = self.feature_map(pixels)[None]
        sites = [mapped[:, line, :, row, column] for line, row, column in self._places()]
        return self.network.contract(sites, self._split(weights))[0].t()

    def cores(self, group: int = 0) -> list[Tensor]:
        """The network's tensors, as views of the weight.

        Args:
            group: Whose network.

        Returns:
            "mps": the chain (left bond, site or output, right bond), the output's core in the middle; sites in the
            layer's order. "tree": children before parents, (parent, left, right) or (parent, site), the root (output,
            left, right) last. "mera": level by level, gates (out, out, in, in), then isometries (parent, left, right),
            and the root. "eps": one core (output, first half of the sites, second half).
        """
        found = [core[self._group(group)] for core in self._split(self.weight)]
        if self.structure != "mps":
            return found
        middle = (self.network.shape.sites + 1) // 2
        left, right, root = found[:middle], found[middle:-1], found[-1]
        chain = [left[0].T[None], *(core.permute(1, 2, 0) for core in left[1:])]
        if not right:
            return [*chain, root.T[..., None]]
        return [*chain, root.permute(1, 0, 2), *reversed(right[1:]), right[0][..., None]]

    def _group(self, group: int) -> int:
        if not 0 <= whole(group, "group", 0) < self.groups:
            raise ValueError(f"group is {group} but the layer has {self.groups}: give 0 to {self.groups - 1}")
        return group

    def _tree(self) -> Tree:
        if not isinstance(self.network, Tree):
            raise ValueError(f'structure is "{self.structure}", which has no bonds to truncate: use "mps" or "tree"')
        return self.network

    @property
    def cuts(self) -> range:
        """Where the network's tensor can be split in two; see `schmidt_values`."""
        if self.structure == "mera":
            raise ValueError(
                'structure is "mera", whose gates cross every cut: no single bond parts it in two; use "mps", "tree", '
                'or "eps"'
            )
        return (
            range(len(self.network.shapes) - 1) if self.structure == "tree" else range(1, self.network.shape.sites + 1)
        )

    def schmidt_spectra(self, group: int = 0) -> dict[int, Tensor]:
        """The Schmidt values of every cut, from one canonical form; see `schmidt_values`."""
        cores = [core[self._group(group)] for core in self._split(self.weight.detach())]
        cuts, sites = self.cuts, self.network.shape.sites
        if isinstance(self.network, Tree):
            values = spectra(self.network, cores)
            if self.structure == "mps":
                # Cores stand left chain inwards, then right chain inwards.
                middle = (sites + 1) // 2
                values = values[:middle] + values[middle:][::-1]
            return {cut: F.normalize(own, dim=0) for cut, own in zip(cuts, values, strict=True)}
        table = cores[0].double().reshape(self.network.shape.outputs, -1).T
        return {cut: plaquette_values(table, self.network.shape.dim**cut) for cut in cuts}

    def schmidt_values(self, cut: int, group: int = 0) -> Tensor:
        """Singular values of the network's tensor across a cut, largest first, normalized to sum of squares 1.

        The output leg belongs to the tensor as one more site: values tell how much the cut carries for all outputs.
        Divisions by norms (`normalize`) are left out.

        Args:
            cut: One of `cuts`. "mps": between cores cut - 1 and cut of `cores()`, 1 to the number of sites. "tree": the
                bond above core number cut of `cores()`, from 0, the root excepted: the sites under it against all
                others and the outputs. "eps": the first `cut` sites in the layer's order against the others and the
                outputs, 1 to the number of sites.
            group: Whose network.

        Returns:
            (numbers,), float64, at most as many as the bond has, or as the smaller side of a plaquette.

        Raises:
            ValueError: For "mera", which no single bond parts in two, or a cut or group that is not there.
        """
        if whole(cut, "cut", 0) not in self.cuts:
            cuts = self.cuts
            known = f"from {cuts[0]} to {cuts[-1]}" if cuts else "nowhere: it is one core"
            raise ValueError(f"cut is {cut} but this network is cut {known}")
        return self.schmidt_spectra(group)[cut]

    def entanglement_entropies(self, group: int = 0) -> dict[int, float]:
        """S = -sum l^2 ln l^2 of the Schmidt values l of every cut, in nats: at most the logarithm of their number."""
        spectra_of = self.schmidt_spectra(group)
        return {cut: float(torch.special.entr(values**2).sum()) for cut, values in spectra_of.items()}

    def entanglement_entropy(self, cut: int, group: int = 0) -> float:
        """S = -sum l^2 ln l^2 of the Schmidt values l across a cut, in nats: at most ln(bond); see schmidt_values."""
        return float(torch.special.entr(self.schmidt_values(cut, group) ** 2).sum())

    def truncate(self, bond_dim: int) -> tuple[TensorNetworkConv2d, float]:
        """The same layer with bonds of at most `bond_dim`, by singular values.

        Args:
            bond_dim: From 1 to this layer's.

        Returns:
            A new layer, and the Frobenius norm of the difference of both layers' full tensors (all groups together),
            computed in float64 from the weights as they are stored: where nothing is discarded the rounding of the
            new cores is left, some 1e-7 of the norm in float32. For vectors phi of norm 1 no output changes by more.
            With `normalize` that holds for the tensors without any division, up to the factor of the next sentence;
            norms depend on the basis of the bonds, which is a new one, so outputs of a patch get another positive
            factor, and the new layer is scaled to outputs of the old one's size on random patches.

        Raises:
            ValueError: For a structure without bonds, or a bond_dim out of range.
        """
        tree = self._tree()
        if whole(bond_dim, "bond_dim", 1) > self.bond_dim:
            raise ValueError(f"bond_dim is {bond_dim} but the layer has {self.bond_dim}: truncate to a smaller one")
        if self.structure == "tree" and bond_dim < tree.shape.dim <= self.bond_dim:
            raise ValueError(
                f"bond_dim is {bond_dim} but sites have dimension {tree.shape.dim} and no bond of their own in this "
                f"tree: truncate to at least {tree.shape.dim}"
            )
        layer = TensorNetworkConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            structure=self.structure,
            bond_dim=bond_dim,
            feature_map=self.feature_map,
            site=self.site,
            order=self.order,
            normalize=self.normalize,
            checkpoint=self.checkpoint,
            # Nothing is drawn for it: torch's generator stays where it was.
            device="meta",
            dtype=self.weight.dtype,
        ).to_empty(device=self.weight.device)
        error = 0.0
        with torch.no_grad():
            for group in range(self.groups):
                cores = [core[group] for core in self._split(self.weight)]
                found = truncated(tree, cores, layer._tree())
                factor = 1.0
                if self.normalize:
                    # In float64 first: the norm of a long network may be beyond float32's range.
                    factor = float(torch.linalg.vector_norm(found[-1])) or 1.0
                    found[-1] = found[-1] / factor
                layer.weight[group] = torch.cat([core.flatten() for core in found])
                if self.normalize:
                    patches = torch.rand(256, self.features, generator=torch.Generator().manual_seed(0)).to(self.weight)
                    old, new = (part.evaluate(patches, part.weight[group, None]).norm() for part in (self, layer))
                    if old > 0 and new > 0:
                        layer.weight[group, -found[-1].numel() :] *= old / new
                        factor *= float(new / old)
                stored = [core[group].double() for core in layer._split(layer.weight)]
                stored[-1] *= factor
                error += distance(tree, cores, stored) ** 2
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.training), sqrt(error)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: the feature map once a pixel, the contraction once a patch and group.

        Args:
            input_shape: (channels, height, width).
        """
        patches, total = self._shape_counts(input_shape)
        (top, bottom), (left, right) = self.geometry.margins()
        pixels = (input_shape[1] + top + bottom) * (input_shape[2] + left + right)
        for key, amount in self.feature_map.counts(self.in_channels).items():
            total[key] += amount * pixels
        for key, amount in self.network.counts().items():
            total[key] += amount * patches * self.groups
        total["weight_bits"] = 32 * total["params"]
        return total

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        return (
            f"{super().extra_repr()}, structure={self.structure!r}, bond_dim={self.bond_dim}, "
            f"feature_map={self.feature_map.name!r}, site={self.site!r}, normalize={self.normalize}"
        )


def _network(structure: str, shape: Shape, normalize: bool) -> Structure:
    if structure == "mps":
        return chains(shape, _EVERY if normalize else 0)
    if structure == "tree":
        return binary(shape, _EVERY if normalize else 0)
    return Mera(shape, normalize) if structure == "mera" else Plaquette(shape)
