"""A training step of a Transformers model in two processes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers_models import compat, tiny

#: Loss and the sum of the squares of all gradients: plain, optimized.
Found = dict[str, list[tuple[float, float]]]


def trained(folder: Path, device: str = "cpu") -> Found:
    """By kind of data parallelism."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, str(folder), device), nprocs=2)
    found: Found = torch.load(folder / "found")
    return found


def _train(rank: int, port: int, folder: str, device: str) -> None:
    """One step of plain and of optimized models, by both kinds of data parallelism; rank 0 writes what it found."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    if device != "cpu":
        torch.get_device_module(device).set_device(rank)
    backend = "gloo" if device == "cpu" else None
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    ids = torch.randint(6, 128, (2, 12), generator=torch.Generator().manual_seed(rank)).to(device)
    found: dict[str, list[tuple[float, float]]] = {}
    for kind in ("ddp", "fsdp2", "fsdp2 head"):
        for optimizes in (False, True):
            model = tiny("llama").to(device).train()
            if optimizes:
                compat.optimize(model)
            wrapped = DistributedDataParallel(model) if kind == "ddp" else model
            if kind != "ddp":
                for layer in model.model.layers:
                    fully_shard(layer)
                if kind == "fsdp2 head":
                    fully_shard(model.lm_head)
                fully_shard(model)
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            squares = [getattr(p.grad, "_local_tensor", p.grad).double().square().sum() for p in model.parameters()]
            total = torch.stack(squares).sum()
            dist.all_reduce(total)
            found.setdefault(kind, []).append((loss.item(), total.item()))
            if optimizes:
                compat.restore(model)
    if rank == 0:
        torch.save(found, os.path.join(folder, "found"))
    dist.destroy_process_group()
