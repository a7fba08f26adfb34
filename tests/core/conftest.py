"""Fixtures of the tests that need no server."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton asks when it is imported: without a device kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

_WORKER = """
import sys, traceback, torch
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
for line in sys.stdin:
    task = torch.load(line.strip())
    scope = {"torch": torch, "inputs": task["inputs"], "outputs": {}}
    try:
        exec(task["code"], scope)
        answer = {"outputs": scope["outputs"]}
    except Exception:
        answer = {"error": traceback.format_exc()}
    torch.save(answer, line.strip() + ".answer")
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def in_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict]]:
    """Run code in a process of ComfyUI's own: ``in_comfyui(code, name=tensor, …)``.

    The code finds its arguments in the dict ``inputs`` and fills the dict ``outputs``, which is returned. ComfyUI is
    the one at COMFYUI_PATH; its modules and ours never meet in one process, because both have ``nodes``. One process
    serves all tests: ComfyUI's modules take many seconds to import.
    """
    folder, numbers = tmp_path_factory.mktemp("comfyui"), count()
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        cwd=Path(os.environ["COMFYUI_PATH"]),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def run(code: str, **inputs: object) -> dict:
        task = folder / f"{next(numbers)}.pt"
        torch.save({"code": textwrap.dedent(code), "inputs": inputs}, task)
        print(task, file=worker.stdin, flush=True)
        while (line := worker.stdout.readline()) and line != "done\n":
            pass
        assert line, "the ComfyUI process ended; its last words are on stderr"
        answer = torch.load(f"{task}.answer")
        assert "error" not in answer, answer["error"]
        return answer["outputs"]

    yield run
    worker.stdin.close()
    worker.wait(timeout=30)
