"""Other simulators, each used as its own documentation would have it for speed.

All compute the strongly entangling circuit of `Workload.moves` from weights (filters, layers, wires, 3) and are
compared with us, values and gradients, before they are timed.
"""

from benchmarks.batched_peers import Deepquantum, Pennylane, Torchquantum
from benchmarks.jax_peer import Tensorcircuit
from benchmarks.peer import Peer
from benchmarks.single_peers import Aer, Lightning, Qulacs

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Pennylane, Tensorcircuit, Torchquantum, Deepquantum, Qulacs, Aer, Lightning)
}
