"""Tasks shared by processes, of which one that dies, or whose device no longer answers, costs the task that it was at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from gemskit import backends


def share(work: Callable[[Any], Any], tasks: Sequence[Any], devices: Sequence[int]) -> Iterator[tuple[Any, Any, str]]:
    """``(task, work(task), "")``, or ``(task, None, error)``, as they are done, by one process for each of ``devices``.

    A device may be named more than once; where there is no accelerator the numbers mean nothing. What ends a run early, such
    as ``timeout``, raises KeyboardInterrupt here, and the processes end too.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    context = multiprocessing.get_context("spawn")
    todo = list(reversed(tasks))
    busy: dict[Connection, tuple[Any, int, Any]] = {}

    def start(device: int) -> None:
        if todo:
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(work, theirs, device), daemon=False)
            process.start()
            theirs.close()
            give(mine, device, process)

    def give(end: Any, device: int, process: Any) -> None:
        task = todo.pop()
        busy[end] = task, device, process
        end.send(task)

    try:
        for device in devices:
            start(device)
        while busy:
            for end in wait(list(busy)):
                assert isinstance(end, Connection)
                task, device, process = busy.pop(end)
                try:
                    result, error, healthy = end.recv()
                except (EOFError, OSError):
                    process.join()
                    result, error, healthy = None, f"its process ended with status {process.exitcode}", False
                if healthy and todo:
                    give(end, device, process)
                else:
                    end.close()
                    process.join()
                    start(device)
                yield task, result, error
    finally:
        for end, (_, _, process) in busy.items():
            end.close()
            process.terminate()
            process.join()
        if main:
            signal.signal(signal.SIGTERM, before)


def _work(work: Callable[[Any], Any], end: Connection, device: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is for the parent, which ends this process
    accelerated = backends.vendor.device_type != "cpu"
    if accelerated:
        torch.accelerator.set_device_index(device)
    while True:
        try:
            task = end.recv()
        except (EOFError, OSError):
            return
        result, error, healthy = None, "", True
        try:
            result = work(task)
        except Exception as e:
            error = "".join(traceback.format_exception_only(e)).strip()
        if accelerated:
            try:
                torch.accelerator.synchronize()
            except Exception as e:  # an illegal access: nothing works in this process any more
                error, healthy = error or f"{type(e).__name__}: {e}", False
        end.send((result, error, healthy))
        if not healthy:
            # Not by way of destructors, which would meet the same error.
            os._exit(1)
