"""Networks between nodes: bytes a second that one process sends."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NETWORKS", "Network"]


@dataclass(frozen=True)
class Network:
    """One kind of network.

    Attributes:
        name: for people.
        bandwidth: bytes a second in one direction of a port, as its line rate says.
        port_per_gpu: a port for each GPU, as in nodes built for training; else one for the node.
        efficiency: of the line rate, what large collectives reach.
    """

    name: str
    bandwidth: float
    port_per_gpu: bool
    efficiency: float = 0.8

    def of_rank(self, per_node: int) -> float:
        """Bytes a second of one of ``per_node`` processes that send at once."""
        return self.efficiency * self.bandwidth / (1 if self.port_per_gpu else per_node)


# Line rates: InfiniBand NDR 400 Gbit/s and HDR 200 Gbit/s a port (InfiniBand Trade Association's
# roadmap), Ethernet 100 and 25 Gbit/s (IEEE 802.3bj, 802.3by).  Nodes of the vendor's design have
# an InfiniBand port a GPU (NVIDIA DGX H100 and DGX A100 data sheets).
NETWORKS: dict[str, Network] = {
    "ndr": Network("InfiniBand NDR", 400e9 / 8, True),
    "hdr": Network("InfiniBand HDR", 200e9 / 8, True),
    "100gbe": Network("100 Gbit Ethernet", 100e9 / 8, False),
    "25gbe": Network("25 Gbit Ethernet", 25e9 / 8, False),
}
