"""Few bytes on disk: packed, Huffman-coded and sparse tensors in files that are read back bit for bit."""

from classical.storage.codings import CODINGS, Stored
from classical.storage.csr import Csr, csr
from classical.storage.files import Size, Sizes, load, read, save, sizes
from classical.storage.models import load_model, save_model
from classical.storage.sharing import SharedWeights, share, share_parameter

__all__ = [
    "CODINGS",
    "Csr",
    "SharedWeights",
    "Size",
    "Sizes",
    "Stored",
    "csr",
    "load",
    "load_model",
    "read",
    "save",
    "save_model",
    "share",
    "share_parameter",
    "sizes",
]
