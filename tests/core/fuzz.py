"""Thousands of damaged files through every door: ``python -m tests.core.fuzz [--many] [--seed N] [--write]``.

A worker process opens them one after the other, so that a file that ends the process is an outcome like others. Each
must be read or refused by a ``WanError`` whose message is fit to be shown, within a second of processor time and
without a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/fuzz.json"
FEW, MANY = 3_000, 20_000
SECONDS, MEMORY = 1.0, 512 * 1024**2  # a file, at most; the second is the bound, half a gigabyte well below one
_STUCK = 60  # seconds in which a worker says nothing
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class Result:
    """``outcome``: "read", "refused", or what went wrong; ``detail`` says more of the latter."""

    number: int
    container: str
    damage: str
    outcome: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.outcome in ("read", "refused")


@dataclass
class Table:
    seed: int
    results: list[Result] = field(default_factory=list)

    @property
    def bad(self) -> list[Result]:
        return [one for one in self.results if not one.good]

    def rows(self) -> list[tuple[str, str, Counter]]:
        """Container, damage, and how often each outcome came."""
        found: dict[tuple[str, str], Counter] = {}
        for one in self.results:
            damage = one.damage.partition(": ")[0] if one.container == "pickle" else one.damage
            found.setdefault((one.container, damage), Counter())[one.outcome] += 1
        return [(*key, counts) for key, counts in sorted(found.items())]

    def text(self) -> str:
        outcomes = ["read", "refused", *sorted({one.outcome for one in self.bad})]
        lines = [f"{'container':12} {'damage':28}" + "".join(f"{name:>12}" for name in outcomes)]
        for container, damage, counts in self.rows():
            lines.append(f"{container:12} {damage:28}" + "".join(f"{counts[name]:12}" for name in outcomes))
        totals = Counter(one.outcome for one in self.results)
        lines.append(f"{'all':12} {len(self.results):<28}" + "".join(f"{totals[name]:12}" for name in outcomes))
        slowest = max(self.results, key=lambda one: one.seconds)
        lines.append(f"slowest: {slowest.seconds:.2f} s ({slowest.container}, {slowest.damage})")
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        rows = [{"container": container, "damage": damage, **counts} for container, damage, counts in self.rows()]
        slowest = max(one.seconds for one in self.results)
        outcomes = Counter(one.outcome for one in self.results)
        found = {
            "files": len(self.results),
            "seed": self.seed,
            "outcomes": outcomes,
            "slowest_seconds": round(slowest, 2),
            "rows": rows,
        }
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fuzz(count: int, seed: int = 0, workers: int = 2) -> Table:
    """Open so many files, in the same order by number whatever the workers."""
    bounds = [count * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(partial(_part, seed), bounds, bounds[1:])
        return Table(seed, [one for part in parts for one in part])


def _part(seed: int, start: int, end: int) -> list[Result]:
    """A worker that dies or stops is started again behind the file that did it."""
    found: list[Result] = []
    while start + len(found) < end:
        found += _from_worker(seed, start + len(found), end)
    return found


def _from_worker(seed: int, start: int, count: int) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="wan-fuzz-") as folder:
        command = [sys.executable, "-m", "tests.core.fuzz", "--worker", folder, str(seed), str(start), str(count)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        worker = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
        done = start
        for line in worker.stdout:
            yield Result(**json.loads(line))
            done += 1
        code = worker.wait(timeout=_STUCK)
        if done < count:
            if code == 3:
                raise RuntimeError(f"The worker failed at file {done} of seed {seed}; its last words are on stderr.")
            yield Result(done, "?", "?", "process ended", detail=f"exit {code}")


def _work(folder: Path, seed: int, start: int, count: int) -> None:
    import faulthandler
    import logging

    from tests.core.damaged_files import make_case
    from tests.core.damaged_values import sound_files

    logging.disable()
    readers, sound = _readers(folder), sound_files()
    os.chdir(folder)  # where code that a file ran would leave its mark
    for number in range(start, count):
        faulthandler.dump_traceback_later(_STUCK, exit=True)
        case = make_case(number, seed, folder, sound)
        before = _peak()
        outcome, detail, seconds = _open(case.path, readers)
        grown = _peak() - before
        if Path("ran-code").exists():
            outcome, detail = "ran code", case.damage
        elif outcome in ("read", "refused") and seconds > SECONDS:
            outcome, detail = "slow", f"{seconds:.1f} s"
        elif outcome in ("read", "refused") and grown > MEMORY:
            outcome, detail = "memory", f"{grown / 1e6:.0f} MB"
        print(json.dumps(asdict(Result(number, case.container, case.damage, outcome, seconds, detail))), flush=True)
        shutil.rmtree(case.path) if case.path.is_dir() else case.path.unlink()
    faulthandler.cancel_dump_traceback_later()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _open(path: Path, readers: Iterable[Callable[[Path], object]]) -> tuple[str, str, float]:
    """Every reader meets every file: "read" if one of them takes it; and the longest that one of them took."""
    outcome, longest = "refused", 0.0
    for reader in readers:
        clock = time.process_time()
        try:
            reader(path)
            outcome = "read"
        except Exception as error:
            if problem := _problem(error):
                return problem, ascii(f"{reader.__name__}: {type(error).__name__}: {error}")[:500], longest
        longest = max(longest, time.process_time() - clock)
    return outcome, "", longest


def _problem(error: Exception) -> str | None:
    """What is wrong with an error that a file caused."""
    from wan_core.errors import WanError

    if not isinstance(error, WanError):
        return "other error"
    text = str(error)
    if _UNFIT.search(text) or "\n" in text:
        return "unfit message"
    if "secret" in text or "cannot be understood" in text or len(text) > 5000:
        return "bad message"
    return None


def _readers(folder: Path) -> list[Callable[[Path], object]]:
    import torch

    from tests.core.damaged_safetensors import safetensors_header, write_safetensors
    from tests.core.damaged_values import sound_files
    from wan_core.files.checkpoint import open_checkpoint
    from wan_core.loading.dit import load_dit, read_dit
    from wan_core.loading.taehv import load_tiny_decoder
    from wan_core.loading.text import load_text_encoder
    from wan_core.loading.vae import load_vae
    from wan_core.lora.files import read_lora

    sound = sound_files()
    header, size = safetensors_header(sound.specs["dit"], {})
    write_safetensors(folder / "sound-dit.safetensors", header, size, {})
    base = read_dit(folder / "sound-dit.safetensors")

    def tensors(path: Path) -> None:
        checkpoint = open_checkpoint(path)
        for key in list(checkpoint.tensors)[:2] + list(checkpoint.tensors)[-2:]:
            checkpoint.tensor(key).float().sum()

    def dit(path: Path) -> None:
        load_dit(path, dtype=torch.float32)

    def text(path: Path) -> None:
        load_text_encoder(path)

    def lora(path: Path) -> None:
        read_lora(path, base)

    def previews(path: Path) -> None:
        load_tiny_decoder(path, 16)

    return [tensors, dit, load_vae, text, lora, previews]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", action="store_true", help=f"{MANY} files instead of {FEW}")
    parser.add_argument("--files", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        try:
            _work(Path(args.worker[0]), *map(int, args.worker[1:]))
        except Exception:  # of the fuzzer's own: what a file caused is caught where it is opened
            traceback.print_exc()
            os._exit(3)
        return
    table = fuzz(args.files or (MANY if args.many else FEW), args.seed)
    print(table.text())
    for one in table.bad[:50]:
        print(f"file {one.number}, {one.container}, {one.damage}: {one.outcome} ({one.detail})")
    if args.write:
        table.write(RESULTS)
    raise SystemExit(bool(table.bad))


if __name__ == "__main__":
    main()
