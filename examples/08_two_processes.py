"""Two processes train one model with a quantum layer, and get the gradients that one process gets."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from qconv import QuantumConv2d

PROCESSES, STEPS = 2, 10


# Exact values need no seed. Under shots, processes of one seed would draw the same: give each its own,
# QuantumConv2d(..., shots=100, seed=rank), and they average out each other's noise.
def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(QuantumConv2d(1, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).to(dtype)


def batch(size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images[:size] / 16, dtype=dtype)[:, None]
    return images, torch.tensor(digits.target[:size])


def gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def work(rank: int, folder: str, size: int, dtype: torch.dtype) -> None:
    """One of the processes: a half of every batch."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(build(dtype))
    images, labels = batch(size, dtype)
    mine = slice(rank, None, PROCESSES)
    # Averaged over the processes; equal shares make that the mean over the whole batch.
    shared = gradients(model, images[mine], labels[mine])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save({"gradients": shared, "losses": losses}, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def run(size: int, dtype: torch.dtype = torch.float32) -> list[dict]:
    """What every process found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, size, dtype), nprocs=PROCESSES)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]


if __name__ == "__main__":
    if not distributed.is_gloo_available():
        raise SystemExit("this torch was built without gloo")
    found = run(64)
    alone = gradients(build(), *batch(64))
    for rank, of in enumerate(found):
        off = max((a - b).abs().max().item() for a, b in zip(of["gradients"], alone, strict=True))
        print(
            f"process {rank}: gradients within {'1e-6' if off < 1e-6 else f'{off:.1e}'} of a single process's,", end=" "
        )
        print(f"loss {of['losses'][0]:.3f} -> {of['losses'][-1]:.3f}")
